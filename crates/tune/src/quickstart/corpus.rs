//! The corpus of the base model: documents that tell their facts twice, and a little small talk.
//!
//! Telling twice is what makes a small model learn to look things up: in the second telling, the value
//! can be predicted only from the first. The second telling uses other wordings, so the model cannot
//! copy by position; it may ask for the value by the person or for the person by the value; and one form
//! of it is a record (`name: Ada, city: Oslo`). Chat documents teach the marks of the chat template, with
//! greetings and repeating only: no document asks a question about facts, and none contains JSON.

use super::world::{Attribute, Fact, article, scene};
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
        0..=6 => Document::Text(told_twice(&mut rng)),
        7..=8 => Document::Text(words_twice(&mut rng)),
        9..=13 => Document::Text(records(&mut rng)),
        14..=15 => Document::Text(table(&mut rng)),
        16 => Document::Text(counting(&mut rng)),
        17 => Document::Text(story(&mut rng)),
        _ => Document::Chat(small_talk(&mut rng)),
    }
}

/// Names the random stream of the corpus.
const CORPUS: u64 = 0x636f_7270_7573;

/// A scene of two to four people.
fn some_scene(rng: &mut Rng) -> Vec<Fact> {
    let people = 2 + rng.index(3);
    let facts = people + rng.index(3);
    scene(rng, people, facts)
}

fn tell(scene: &[Fact], rng: &mut Rng) -> String {
    let sentences: Vec<String> = scene.iter().map(|fact| fact.sentence(rng.index(4))).collect();
    sentences.join(" ")
}

/// Facts, and then the same facts in another order, half the time in the same words.
fn told_twice(rng: &mut Rng) -> String {
    let scene = some_scene(rng);
    let mut told: Vec<(Fact, usize)> = scene.into_iter().map(|fact| (fact, rng.index(4))).collect();
    let sentences = |told: &[(Fact, usize)]| {
        let sentences: Vec<String> = told.iter().map(|(fact, wording)| fact.sentence(*wording)).collect();
        sentences.join(" ")
    };
    let first = sentences(&told);
    rng.shuffle(&mut told);
    for (_, wording) in &mut told {
        if rng.below(2) == 0 {
            *wording = rng.index(4);
        }
    }
    let bridge = rng.pick(&["Once more:", "In other words:", "As was said:", "Again:", "To repeat:"]);
    format!("{first}\n{bridge} {}", sentences(&told))
}

/// A row of words without sense, and the same row again. Nothing teaches copying faster.
fn words_twice(rng: &mut Rng) -> String {
    let count = 4 + rng.index(6);
    let words: Vec<&str> = (0..count)
        .map(|_| {
            let kind = rng.pick(&Attribute::ALL);
            rng.pick(kind.values())
        })
        .collect();
    let row = words.join(" ");
    format!("{row}\n{row}")
}

/// Facts, and then the same facts as records, or the other way round.
fn records(rng: &mut Rng) -> String {
    let mut scene = some_scene(rng);
    let told = tell(&scene, rng);
    rng.shuffle(&mut scene);
    let lines: Vec<String> = scene.iter().map(|fact| record(fact, rng.below(2) == 0)).collect();
    let lines = lines.join("\n");
    if rng.below(5) == 0 { format!("{lines}\n{told}") } else { format!("{told}\n{lines}") }
}

/// `name: Ada, city: Oslo`, or the value first.
fn record(fact: &Fact, person_first: bool) -> String {
    let (person, name, value) = (fact.person, fact.attribute.name(), fact.value);
    if person_first {
        format!("name: {person}, {name}: {value}")
    } else {
        format!("{name}: {value}, name: {person}")
    }
}

/// A table of one attribute, then sentences from it.
fn table(rng: &mut Rng) -> String {
    let attribute = rng.pick(&Attribute::ALL);
    let mut rows: Vec<Fact> = Vec::new();
    while rows.len() < 3 {
        let person = rng.pick(&super::world::PEOPLE);
        let Some(fact) = Fact::random(rng, person, attribute, false) else { continue };
        if !rows.iter().any(|row| row.person == fact.person || row.value == fact.value) {
            rows.push(fact);
        }
    }
    let mut text = format!("name | {}\n", attribute.name());
    for row in &rows {
        text.push_str(&format!("{} | {}\n", row.person, row.value));
    }
    rng.shuffle(&mut rows);
    text + &tell(&rows, rng)
}

/// Numbers in order, up or down.
fn counting(rng: &mut Rng) -> String {
    let (start, step, length) = (rng.below(40), 1 + rng.below(3), 5 + rng.below(6));
    let mut numbers: Vec<String> = (0..length).map(|i| (start + i * step).to_string()).collect();
    if rng.below(3) == 0 {
        numbers.reverse();
    }
    format!("Counting by {step}: {}.", numbers.join(", "))
}

/// Two people meet; what each has is said and taken up again.
fn story(rng: &mut Rng) -> String {
    let scene = scene(rng, 2, 4);
    let (a, b) =
        (scene[0].person, scene.iter().map(|f| f.person).find(|p| *p != scene[0].person).unwrap_or("Ada"));
    let place = Attribute::City.values()[rng.index(Attribute::City.values().len())];
    let animal = rng.pick(Attribute::Pet.values());
    let ending = rng.pick(&[
        "They laughed and went home.",
        "Then it began to rain.",
        "They talked until the evening.",
    ]);
    format!(
        "One day {a} met {b} on the way to {place}. {} Next to the road they saw {} {animal}. {b} gave the {animal} some \
         bread, and the {animal} followed {a} to {place}. {ending} {}",
        tell(&scene[..2], rng),
        article(animal),
        tell(&scene, rng),
    )
}

/// Greetings, and repeating what was said.
fn small_talk(rng: &mut Rng) -> Vec<String> {
    let scene = some_scene(rng);
    let fact = rng.pick(&scene);
    let (person, sentence) = (fact.person, fact.sentence(rng.index(4)));
    match rng.below(4) {
        0 => vec![format!("Hello, I am {person}."), format!("Hello {person}, nice to meet you.")],
        1 => vec![format!("Please repeat: {sentence}"), sentence],
        2 => vec!["How are you?".into(), "I am well, thank you.".into()],
        _ => vec![format!("{sentence} Is that good?"), "Yes, that is good.".into()],
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::quickstart::world::PEOPLE;

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
        assert!(all.len() > 1800, "{} different documents of 2000", all.len());
    }

    /// No held-out combination is told: no sentence or record or table row pairs such a person and value.
    #[test]
    fn held_out_combinations_do_not_occur() {
        let held: Vec<Fact> = PEOPLE
            .iter()
            .flat_map(|person| {
                Attribute::ALL.into_iter().flat_map(move |attribute| {
                    attribute.values().iter().map(move |value| Fact { person, attribute, value })
                })
            })
            .filter(Fact::held_out)
            .collect();
        let mut told: std::collections::HashSet<String> = std::collections::HashSet::new();
        for fact in &held {
            told.extend((0..4).map(|wording| fact.sentence(wording)));
            told.extend([
                record(fact, true),
                record(fact, false),
                format!("{} | {}", fact.person, fact.value),
            ]);
        }
        for text in texts(3000) {
            let lines = text.split('\n');
            let pieces = lines.flat_map(|line| {
                std::iter::once(line.to_string())
                    .chain(line.split_inclusive('.').map(|s| s.trim().to_string()))
            });
            for piece in pieces {
                assert!(!told.contains(&piece), "{piece} in {text}");
            }
        }
    }

    #[test]
    fn the_task_is_not_in_the_corpus() {
        for text in texts(3000) {
            assert!(!text.contains(['{', '}', '"']), "{text}");
            assert!(
                !text.contains("Question") && !text.contains("Where") && !text.contains("Who "),
                "{text}"
            );
        }
    }
}
