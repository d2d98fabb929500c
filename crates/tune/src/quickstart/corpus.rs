//! The corpus of the base model: the facts of the world, told over and over, and a little small talk.
//!
//! A fact that is told once, or always in the same words, is learnt as a string: a model then continues the
//! string but cannot use what it says. What makes knowledge usable is telling it in many wordings, in every
//! order and among different neighbours, with the name in each sentence (Allen-Zhu and Li, "Physics of
//! language models: part 3.1", 2023). So a document is drawn, not written: a portrait of one person, news
//! of several, a list of one attribute, cards. Chat documents train the marks of the chat template with
//! greetings, statements and questions about nothing in particular. No document asks anything about a person;
//! but every word that a question or its answer needs occurs somewhere, for a token that a model was never
//! trained on cannot be taught by LoRA, which leaves its embedding as it is.

use super::world::{Attribute, Fact, Person, WORDINGS};
use crate::rng::Rng;

/// A document of the corpus.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Document {
    /// Running text.
    Text(String),
    /// A user's and the assistant's turns, one after the other.
    Chat(Vec<String>),
}

/// Document `number` of the corpus of a seed. Any number of documents can be made, in any order.
pub fn document(seed: u64, number: u64) -> Document {
    let mut rng = Rng::new(seed, &[CORPUS, number]);
    match rng.below(20) {
        0..=5 => Document::Text(portrait(&mut rng)),
        6..=7 => Document::Text(news(&mut rng)),
        8 => Document::Text(list(&mut rng)),
        9..=11 => Document::Text(cards(&mut rng)),
        12 => Document::Text(words(&mut rng)),
        _ => Document::Chat(small_talk(&mut rng)),
    }
}

/// Names the random stream of the corpus.
const CORPUS: u64 = 0x636f_7270_7573;

fn tell(facts: &[Fact], rng: &mut Rng) -> String {
    let sentences: Vec<String> = facts.iter().map(|fact| fact.sentence(rng.index(WORDINGS))).collect();
    sentences.join(" ")
}

/// Most of what is so about one person.
fn portrait(rng: &mut Rng) -> String {
    let mut facts = Fact::about(Person::random(rng));
    rng.shuffle(&mut facts);
    let count = 4 + rng.index(facts.len() - 3);
    tell(&facts[..count], rng)
}

/// Facts that have nothing to do with each other.
fn news(rng: &mut Rng) -> String {
    let facts: Vec<Fact> = (0..4 + rng.index(6)).map(|_| Fact::random(rng)).collect();
    tell(&facts, rng)
}

/// The same attribute of several people, always in the same words.
fn list(rng: &mut Rng) -> String {
    let (attribute, wording) = (rng.pick(&Attribute::ALL), rng.index(WORDINGS));
    let lines: Vec<String> = (0..4 + rng.index(5))
        .map(|_| Fact { person: Person::random(rng), attribute }.sentence(wording))
        .collect();
    lines.join("\n")
}

/// Cards of a few people.
fn cards(rng: &mut Rng) -> String {
    let lines: Vec<String> = (0..2 + rng.index(3)).map(|_| card(Person::random(rng), rng)).collect();
    lines.join("\n")
}

/// Some of what is so about a person: `Elsa: city=Oslo, pet=fox`.
fn card(person: Person, rng: &mut Rng) -> String {
    let mut facts = Fact::about(person);
    rng.shuffle(&mut facts);
    let fields: Vec<String> = facts[..1 + rng.index(4)]
        .iter()
        .map(|fact| format!("{}={}", fact.attribute.name(), fact.value()))
        .collect();
    format!("{}: {}", person.name(), fields.join(", "))
}

/// Words in quotation marks or braces, to no purpose: the model has to have met these marks.
fn words(rng: &mut Rng) -> String {
    let mut word = || match rng.below(3) {
        0 => Person::random(rng).name(),
        1 => rng.pick(&Attribute::ALL).name().to_string(),
        _ => Fact::random(rng).value().to_string(),
    };
    let mut words: Vec<String> = (0..9).map(|_| word()).collect();
    words.truncate(4 + rng.index(6));
    if rng.below(2) == 0 {
        format!("\"{}\"", words.join("\", \""))
    } else {
        format!("{{{}}}", words.join(", "))
    }
}

/// What is said about nobody in particular. Its words are those that the questions use.
const TALK: [(&str, &str); 20] = [
    ("How are you?", "I am well, thank you."),
    ("Where are you?", "I am here."),
    ("What is new?", "Not much."),
    ("What is the name of the game?", "It has no name."),
    ("Which day is it?", "It is Monday."),
    ("What does that mean?", "It means nothing."),
    ("Tell me a story.", "Long ago there was a king."),
    ("Tell me which way to go.", "Go left."),
    ("Tell me what to do.", "Have a rest."),
    ("Tell me where to go.", "Go home."),
    ("How does it work?", "It works well."),
    ("What do you like to do?", "I like to read."),
    ("What do you eat?", "I do not eat."),
    ("In which year was that?", "Long ago."),
    ("Which animal is that?", "That is a bear."),
    ("Which food is best?", "I do not know."),
    ("Where does the road go?", "It goes to the sea."),
    ("What belongs to me?", "Nothing does."),
    ("Which colour does the sea have?", "That depends on the sky."),
    ("What can I do to earn money?", "Find a job."),
];

/// How a user comes to speak of somebody.
const OPENINGS: [&str; 10] = [
    "I met {who}.",
    "I was thinking of {who}.",
    "Let us talk of {who}.",
    "This is about {who}.",
    "{who} sends greetings.",
    "A friend told me of {who}.",
    "{who} is on the way.",
    "Today I saw {who} again.",
    "The name is {who}.",
    "Here comes {who}!",
];

/// Talk: mostly of somebody whom the user names and of whom the assistant then says more, which teaches to
/// stay with that person; else greetings, and questions that are about no one.
fn small_talk(rng: &mut Rng) -> Vec<String> {
    let person = Person::random(rng);
    let name = person.name();
    let mut facts = Fact::about(person);
    rng.shuffle(&mut facts);
    let told = facts[0].sentence(rng.index(WORDINGS));
    let opening = if rng.below(2) == 0 { told.clone() } else { facts[0].fill(rng.pick(&OPENINGS)) };
    let count = 1 + rng.index(3);
    let more = tell(&facts[1..=count], rng);
    match rng.below(12) {
        0 => vec![format!("Hello, I am {name}."), format!("Hello {name}, nice to meet you. {told}")],
        1 => vec![format!("Please repeat: {told}"), told],
        2..=3 => vec![opening, format!("Yes. {more}")],
        4..=5 => vec![opening, format!("\"{name}\" is a name that I know. {more}")],
        6..=9 => {
            // With the name or without: then it has to be found in what the user said.
            let card = card(person, rng);
            let notes = card.split_once(": ").map_or(card.as_str(), |(_, fields)| fields);
            vec![opening, if rng.below(3) == 0 { card } else { notes.to_string() }]
        }
        _ => {
            let (said, reply) = rng.pick(&TALK);
            vec![said.into(), reply.into()]
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::quickstart::questions::{Part, Question};

    fn texts(count: u64) -> impl Iterator<Item = String> {
        (0..count).map(|number| match document(7, number) {
            Document::Text(text) => text,
            Document::Chat(turns) => turns.join("\n"),
        })
    }

    #[test]
    fn documents_repeat_and_vary() {
        assert_eq!(document(1, 5), document(1, 5));
        let mut all: Vec<String> = texts(2000).collect();
        all.sort();
        all.dedup();
        assert!(all.len() > 1900, "{} different documents of 2000", all.len());
    }

    #[test]
    fn every_fact_is_told_in_every_way() {
        let mut told: std::collections::HashSet<String> = std::collections::HashSet::new();
        for text in texts(120_000) {
            told.extend(text.split_inclusive(['.', '\n']).map(|piece| piece.trim().to_string()));
        }
        for fact in Person::all().flat_map(Fact::about) {
            for wording in 0..WORDINGS {
                let sentence = fact.sentence(wording);
                assert!(told.contains(&sentence), "{sentence}");
            }
        }
    }

    /// The base model has never seen what it will be asked.
    #[test]
    fn the_task_is_not_in_the_corpus() {
        let questions = Question::some(7, Part::HeldOut, 144);
        for text in texts(5000) {
            let asks = text.contains('?') || text.contains("Tell me");
            assert!(!asks || TALK.iter().any(|(said, reply)| text == format!("{said}\n{reply}")), "{text}");
            assert!(!questions.iter().any(|question| text.contains(&question.prompt)), "{text}");
        }
    }
}
