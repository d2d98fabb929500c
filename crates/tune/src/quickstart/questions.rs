//! The built-in instruction set: a short passage, a question about it, one line of JSON as the answer.
//!
//! A training question and a held-out question never share a combination of person and value: what is
//! asked in a held-out question is found nowhere in the corpus or in the training questions, so it can be
//! answered only by reading the passage. An answer counts if it equals the expected one, white space at
//! its ends aside.

use serde_json::{Value, json};

use super::world::{Attribute, Fact, fits, scene};
use crate::rng::Rng;

/// What the system message of every question says.
pub const SYSTEM: &str = "Answer with JSON.";

/// One question with its answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Question {
    /// The user's message: the passage, then the question.
    pub prompt: String,
    /// The assistant's message.
    pub answer: String,
    /// What is asked about.
    pub fact: Fact,
}

/// Which questions.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Part {
    /// To train on.
    Train,
    /// To be asked before and after.
    HeldOut,
}

impl Question {
    /// Question `number` of a part.
    pub fn new(seed: u64, part: Part, number: u64) -> Question {
        let stream = match part {
            Part::Train => 0x7472_6169_6e00,
            Part::HeldOut => 0x6865_6c64_0000,
        };
        let mut rng = Rng::new(seed, &[stream, number]);
        let people = 2 + rng.index(2);
        let mut facts = scene(&mut rng, people, people + 1);
        let asked = rng.index(facts.len());
        if part == Part::HeldOut {
            let Fact { person, .. } = facts.remove(asked);
            let fact = loop {
                let attribute = rng.pick(&Attribute::ALL);
                match Fact::random(&mut rng, person, attribute, true) {
                    Some(fact) if fits(&facts, &fact) => break fact,
                    _ => {}
                }
            };
            facts.insert(asked, fact);
        }
        let fact = facts[asked];
        let passage: Vec<String> = facts.iter().map(|fact| fact.sentence(rng.index(4))).collect();
        let by_value = rng.below(3) == 0;
        let question = if by_value { who(&fact) } else { what(&fact) };
        let answer = if by_value {
            format!("{{\"{}\": \"{}\", \"name\": \"{}\"}}", fact.attribute.name(), fact.value, fact.person)
        } else {
            format!("{{\"name\": \"{}\", \"{}\": \"{}\"}}", fact.person, fact.attribute.name(), fact.value)
        };
        Question { prompt: format!("{}\n{question}", passage.join(" ")), answer, fact }
    }

    /// The messages up to the answer, for the chat template.
    pub fn messages(&self) -> Vec<Value> {
        vec![json!({"role": "system", "content": SYSTEM}), json!({"role": "user", "content": self.prompt})]
    }

    /// The conversation as a line of a data file.
    pub fn line(&self) -> Value {
        let mut messages = self.messages();
        messages.push(json!({"role": "assistant", "content": self.answer}));
        json!({"messages": messages})
    }

    /// Whether a model's reply is the expected answer.
    pub fn is_correct(&self, reply: &str) -> bool {
        reply.trim() == self.answer
    }
}

/// The share of right replies, 0 to 1.
pub fn accuracy(questions: &[Question], replies: &[String]) -> f64 {
    let right = questions.iter().zip(replies).filter(|(question, reply)| question.is_correct(reply)).count();
    right as f64 / questions.len().max(1) as f64
}

fn what(fact: &Fact) -> String {
    let person = fact.person;
    match fact.attribute {
        Attribute::City => format!("Where does {person} live?"),
        Attribute::Pet => format!("What pet does {person} keep?"),
        Attribute::Job => format!("What is the job of {person}?"),
        Attribute::Food => format!("What food does {person} like?"),
        Attribute::Thing => format!("What does {person} own?"),
        Attribute::Colour => format!("What colour does {person} wear?"),
    }
}

fn who(fact: &Fact) -> String {
    let value = fact.value;
    let article = super::world::article(value);
    match fact.attribute {
        Attribute::City => format!("Who lives in {value}?"),
        Attribute::Pet => format!("Who keeps {article} {value}?"),
        Attribute::Job => format!("Who works as {article} {value}?"),
        Attribute::Food => format!("Who likes {value}?"),
        Attribute::Thing => format!("Who owns {article} {value}?"),
        Attribute::Colour => format!("Who wears {value}?"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn answers_are_json_and_in_the_passage() {
        for part in [Part::Train, Part::HeldOut] {
            for number in 0..500 {
                let question = Question::new(3, part, number);
                let answer: Value = serde_json::from_str(&question.answer).unwrap();
                assert_eq!(answer["name"], question.fact.person);
                assert_eq!(answer[question.fact.attribute.name()], question.fact.value);
                let passage = question.prompt.split('\n').next().unwrap();
                assert!(
                    (0..4).any(|wording| passage.contains(&question.fact.sentence(wording))),
                    "{question:?}"
                );
                assert_eq!(question.fact.held_out(), part == Part::HeldOut);
            }
        }
    }

    #[test]
    fn scoring_is_exact() {
        let question = Question::new(3, Part::Train, 0);
        assert!(question.is_correct(&format!(" {}\n", question.answer)));
        assert!(!question.is_correct(&question.answer.replace('"', "'")));
        assert!(!question.is_correct(""));
        let replies = [question.answer.clone(), "no".into()];
        assert_eq!(accuracy(&[question.clone(), question], &replies), 0.5);
        assert_eq!(accuracy(&[], &[]), 0.0);
    }

    #[test]
    fn lines_are_conversations() {
        use crate::data::format::{Columns, Form};
        let Value::Object(line) = Question::new(3, Part::HeldOut, 9).line() else { panic!("an object") };
        assert_eq!(Form::detect(&line, &Columns::default()), Ok(Form::Messages));
        Form::Messages.parse(line, &Columns::default()).unwrap();
    }
}
