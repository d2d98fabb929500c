//! The built-in instruction set: a question about a person of the world, one plain sentence as the answer.
//!
//! A seed divides the people: three of four are asked about in training questions, the others in held-out
//! questions only. So a held-out question cannot be answered from the training questions, not even from
//! another question about the same person; what is learnt there is how to answer, and what to answer has to
//! come from what the base model knows. An answer counts if it equals the expected one, white space at its
//! ends aside.

use serde_json::{Value, json};

use super::world::{Attribute, Fact, Person};
use crate::rng::Rng;

/// One question with its answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Question {
    /// The user's message.
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

impl Part {
    /// The people that this part asks about.
    pub fn people(self, seed: u64) -> Vec<Person> {
        let mut people: Vec<Person> = Person::all().collect();
        Rng::new(seed, &[PEOPLE]).shuffle(&mut people);
        let training = people.split_off(people.len() / 4);
        match self {
            Part::Train => training,
            Part::HeldOut => people,
        }
    }
}

/// Name the random streams.
const PEOPLE: u64 = 0x7065_6f70_6c65;
const ORDER: u64 = 0x6f_7264_6572;
const WORDING: u64 = 0x776f_7264;

impl Question {
    /// The first `count` questions of a part. Every fact of the part is asked about once before any is a
    /// second time.
    pub fn some(seed: u64, part: Part, count: usize) -> Vec<Question> {
        let mut facts: Vec<Fact> = part.people(seed).into_iter().flat_map(Fact::about).collect();
        let mut questions = Vec::with_capacity(count);
        for round in 0.. {
            Rng::new(seed, &[ORDER, round]).shuffle(&mut facts);
            let mut rng = Rng::new(seed, &[WORDING, round]);
            for fact in &facts {
                if questions.len() == count {
                    return questions;
                }
                questions.push(Question::new(*fact, rng.index(WORDINGS)));
            }
        }
        questions
    }

    /// A question about a fact, in one of its [`WORDINGS`] (any number will do). The answer is the first of the
    /// sentences that tell the fact.
    pub fn new(fact: Fact, wording: usize) -> Question {
        let answer = fact.sentence(0);
        Question { prompt: fact.fill(wordings(fact.attribute)[wording % WORDINGS]), answer, fact }
    }

    /// The messages up to the answer, for the chat template.
    pub fn messages(&self) -> Vec<Value> {
        vec![json!({"role": "user", "content": self.prompt})]
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

/// In how many wordings each fact is asked for.
pub const WORDINGS: usize = 4;

fn wordings(attribute: Attribute) -> &'static [&'static str; WORDINGS] {
    match attribute {
        Attribute::City => &[
            "Where does {who} live?",
            "What is the city of {who}?",
            "In which city can I visit {who}?",
            "Tell me where {who} lives.",
        ],
        Attribute::Pet => &[
            "What pet does {who} keep?",
            "What is the pet of {who}?",
            "Which animal does {who} have?",
            "Tell me which pet {who} keeps.",
        ],
        Attribute::Job => &[
            "What does {who} work as?",
            "What is the job of {who}?",
            "How does {who} earn money?",
            "Tell me which job {who} has.",
        ],
        Attribute::Food => &[
            "What does {who} like to eat?",
            "What is the food of {who}?",
            "Which food pleases {who}?",
            "Tell me what {who} likes to eat.",
        ],
        Attribute::Thing => &[
            "What does {who} own?",
            "What is the thing that {who} owns?",
            "What belongs to {who}?",
            "Tell me what {who} owns.",
        ],
        Attribute::Colour => &[
            "What colour does {who} wear?",
            "What is the colour of {who}?",
            "Which colour is best for {who}?",
            "Tell me which colour {who} wears.",
        ],
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;
    use crate::quickstart::world::PEOPLE;

    #[test]
    fn no_held_out_person_is_asked_about_in_training() {
        for seed in 0..5 {
            let trained: HashSet<Person> =
                Question::some(seed, Part::Train, 4000).iter().map(|question| question.fact.person).collect();
            let held: HashSet<Person> = Question::some(seed, Part::HeldOut, 1000)
                .iter()
                .map(|question| question.fact.person)
                .collect();
            assert!(trained.is_disjoint(&held), "seed {seed}");
            assert_eq!((trained.len(), held.len()), (PEOPLE * 3 / 4, PEOPLE / 4), "seed {seed}");
            for question in Question::some(seed, Part::Train, 4000) {
                let text = format!("{}\n{}", question.prompt, question.answer);
                assert!(!held.iter().any(|person| has_word(&text, &person.name())), "{text}");
            }
        }
    }

    #[test]
    fn every_value_and_wording_is_trained() {
        let questions = Question::some(1, Part::Train, 4000);
        for attribute in Attribute::ALL {
            let asked = || questions.iter().filter(|question| question.fact.attribute == attribute);
            let values: HashSet<&str> = asked().map(|question| question.fact.value()).collect();
            // With 72 people a few of the rarer values may belong to nobody among them.
            assert!(values.len() * 4 >= attribute.values().len() * 3, "{attribute:?}: {}", values.len());
            for wording in 0..WORDINGS {
                assert!(asked().any(|question| *question == Question::new(question.fact, wording)));
            }
        }
    }

    #[test]
    fn questions_are_repeatable_and_do_not_repeat() {
        let questions = Question::some(3, Part::HeldOut, 200);
        assert_eq!(questions, Question::some(3, Part::HeldOut, 200));
        assert_ne!(questions, Question::some(4, Part::HeldOut, 200));
        assert_eq!(questions[..50], Question::some(3, Part::HeldOut, 50));
        let facts: HashSet<Fact> = questions.iter().map(|question| question.fact).collect();
        assert_eq!(facts.len(), 144, "every fact of the 24 held-out people");
    }

    fn has_word(text: &str, word: &str) -> bool {
        text.split(|c: char| !c.is_alphanumeric()).any(|part| part == word)
    }

    #[test]
    fn answers_tell_what_is_asked() {
        for question in Question::some(3, Part::Train, 500) {
            let (name, fact) = (question.fact.person.name(), question.fact);
            assert!(
                question.answer.contains(&name) && question.answer.contains(fact.value()),
                "{question:?}"
            );
            assert!(
                has_word(&question.prompt, &name) && !has_word(&question.prompt, fact.value()),
                "{question:?}"
            );
        }
    }

    #[test]
    fn scoring_is_exact() {
        let [question] = &Question::some(3, Part::Train, 1)[..] else { panic!("one question") };
        assert!(question.is_correct(&format!(" {}\n", question.answer)));
        assert!(!question.is_correct(&format!("Yes. {}", question.answer)));
        assert!(!question.is_correct(""));
        let replies = [question.answer.clone(), "no".into()];
        assert_eq!(accuracy(&[question.clone(), question.clone()], &replies), 0.5);
        assert_eq!(accuracy(&[], &[]), 0.0);
    }

    #[test]
    fn lines_are_conversations() {
        use crate::data::format::{Columns, Form};
        let Value::Object(line) = Question::some(3, Part::HeldOut, 1)[0].line() else { panic!("an object") };
        assert_eq!(Form::detect(&line, &Columns::default()), Ok(Form::Messages));
        Form::Messages.parse(line, &Columns::default()).unwrap();
    }
}
