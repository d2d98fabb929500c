//! The people and things of the made-up world, and the facts about them.

use crate::rng::Rng;

/// The people.
pub const PEOPLE: [&str; 48] = [
    "Ada", "Ben", "Carla", "David", "Emma", "Felix", "Greta", "Hugo", "Ida", "Jonas", "Karin", "Leo",
    "Maria", "Nils", "Olga", "Paul", "Rosa", "Simon", "Tina", "Uwe", "Vera", "Walter", "Yara", "Zoe",
    "Anton", "Berta", "Conrad", "Dora", "Emil", "Flora", "Georg", "Hanna", "Igor", "Julia", "Kurt", "Lina",
    "Martin", "Nora", "Otto", "Petra", "Ralf", "Sofia", "Thomas", "Ulla", "Viktor", "Wanda", "Oscar",
    "Clara",
];

const CITIES: [&str; 32] = [
    "Lisbon", "Oslo", "Vienna", "Madrid", "Rome", "Paris", "Berlin", "Prague", "Athens", "Dublin", "Warsaw",
    "Zurich", "Riga", "Turin", "Porto", "Bergen", "Krakow", "Lyon", "Geneva", "Malaga", "Naples", "Hamburg",
    "Seville", "Graz", "Basel", "Tallinn", "Bremen", "Verona", "Ghent", "Malmo", "Split", "Cork",
];

const ANIMALS: [&str; 20] = [
    "cat", "dog", "horse", "rabbit", "parrot", "goat", "sheep", "duck", "turtle", "hamster", "donkey",
    "goose", "pony", "mouse", "pigeon", "fox", "owl", "bee", "lizard", "hen",
];

const COLOURS: [&str; 10] =
    ["red", "blue", "green", "yellow", "black", "white", "brown", "grey", "orange", "purple"];

const THINGS: [&str; 20] = [
    "boat", "car", "bike", "house", "tent", "piano", "drum", "lamp", "clock", "coat", "hat", "scarf",
    "chair", "table", "kite", "ball", "van", "sofa", "vase", "bag",
];

const JOBS: [&str; 20] = [
    "baker", "doctor", "teacher", "pilot", "farmer", "painter", "singer", "lawyer", "nurse", "tailor",
    "driver", "cook", "writer", "dancer", "judge", "gardener", "sailor", "smith", "miller", "barber",
];

const FOODS: [&str; 24] = [
    "soup", "rice", "bread", "cheese", "apples", "pears", "cake", "fish", "beans", "honey", "plums", "nuts",
    "eggs", "pasta", "salad", "cherries", "potatoes", "tomatoes", "carrots", "olives", "grapes", "butter",
    "onions", "figs",
];

/// What can be said of a person.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[allow(missing_docs)] // the variants name themselves
pub enum Attribute {
    City,
    Pet,
    Job,
    Food,
    Thing,
    Colour,
}

impl Attribute {
    /// All of them.
    pub const ALL: [Attribute; 6] = [
        Attribute::City,
        Attribute::Pet,
        Attribute::Job,
        Attribute::Food,
        Attribute::Thing,
        Attribute::Colour,
    ];

    /// The values it can have.
    pub fn values(self) -> &'static [&'static str] {
        match self {
            Attribute::City => &CITIES,
            Attribute::Pet => &ANIMALS,
            Attribute::Job => &JOBS,
            Attribute::Food => &FOODS,
            Attribute::Thing => &THINGS,
            Attribute::Colour => &COLOURS,
        }
    }

    /// Its one-word name, in records and in answers.
    pub fn name(self) -> &'static str {
        match self {
            Attribute::City => "city",
            Attribute::Pet => "pet",
            Attribute::Job => "job",
            Attribute::Food => "food",
            Attribute::Thing => "thing",
            Attribute::Colour => "colour",
        }
    }
}

/// One thing that is so, in one document.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Fact {
    /// Of whom.
    pub person: &'static str,
    /// What kind of thing.
    pub attribute: Attribute,
    /// What it is.
    pub value: &'static str,
}

/// Every so-manieth combination of person and value is kept for the held-out questions.
const HELD_OUT_SHARE: u64 = 6;

impl Fact {
    /// Whether this combination is kept for held-out questions: it then occurs neither in the corpus nor
    /// in a training question, not even as a fact that is not asked about.
    pub fn held_out(&self) -> bool {
        let mut hash = 0u64;
        for byte in self.person.bytes().chain([b'/']).chain(self.value.bytes()) {
            hash = hash.wrapping_mul(257).wrapping_add(u64::from(byte));
        }
        Rng::new(hash, &[]).below(HELD_OUT_SHARE) == 0
    }

    /// A random fact about a person, of either side; `None` if no value is on that side.
    pub fn random(rng: &mut Rng, person: &'static str, attribute: Attribute, held_out: bool) -> Option<Fact> {
        let facts = attribute.values().iter().map(|value| Fact { person, attribute, value });
        let facts: Vec<Fact> = facts.filter(|fact| fact.held_out() == held_out).collect();
        (!facts.is_empty()).then(|| rng.pick(&facts))
    }

    /// The fact as a sentence, in one of its wordings (any number will do).
    pub fn sentence(&self, wording: usize) -> String {
        let Fact { person, value, .. } = self;
        let wordings: [String; 4] = match self.attribute {
            Attribute::City => [
                format!("{person} lives in {value}."),
                format!("The home of {person} is {value}."),
                format!("It is {person} who lives in {value}."),
                format!("{value} is where {person} lives."),
            ],
            Attribute::Pet => [
                format!("{person} keeps {} {value}.", article(value)),
                format!("The pet of {person} is {} {value}.", article(value)),
                format!("It is {person} who keeps {} {value}.", article(value)),
                format!("There is {} {value}, and {person} keeps it.", article(value)),
            ],
            Attribute::Job => [
                format!("{person} works as {} {value}.", article(value)),
                format!("The job of {person} is that of {} {value}.", article(value)),
                format!("It is {person} who works as {} {value}.", article(value)),
                format!("As {} {value}, {person} works all day.", article(value)),
            ],
            Attribute::Food => [
                format!("{person} likes {value}."),
                format!("The food that {person} likes is {value}."),
                format!("It is {person} who likes {value}."),
                format!("Every day {person} eats {value}."),
            ],
            Attribute::Thing => [
                format!("{person} owns {} {value}.", article(value)),
                format!("The thing that {person} owns is {} {value}.", article(value)),
                format!("It is {person} who owns {} {value}.", article(value)),
                format!("There is {} {value}, and {person} owns it.", article(value)),
            ],
            Attribute::Colour => [
                format!("{person} wears {value}."),
                format!("The colour of {person} is {value}."),
                format!("It is {person} who wears {value}."),
                format!("Dressed in {value}, {person} goes out."),
            ],
        };
        let [a, b, c, d] = wordings;
        match wording % 4 {
            0 => a,
            1 => b,
            2 => c,
            _ => d,
        }
    }
}

/// "a" or "an".
pub fn article(word: &str) -> &'static str {
    if word.starts_with(['a', 'e', 'i', 'o', 'u']) { "an" } else { "a" }
}

/// A scene: facts about a few people, in which a person has each attribute at most once and a value
/// belongs to at most one person, so that every question has one answer.
pub fn scene(rng: &mut Rng, people: usize, facts: usize) -> Vec<Fact> {
    let mut names = PEOPLE;
    rng.shuffle(&mut names);
    let names = &names[..people.clamp(1, PEOPLE.len())];
    let mut scene: Vec<Fact> = Vec::with_capacity(facts);
    let most = names.len() * Attribute::ALL.len();
    while scene.len() < facts.min(most) {
        // Everyone is mentioned once before anyone is a second time.
        let person = names.get(scene.len()).copied().unwrap_or_else(|| rng.pick(names));
        let attribute = rng.pick(&Attribute::ALL);
        if let Some(fact) = Fact::random(rng, person, attribute, false)
            && fits(&scene, &fact)
        {
            scene.push(fact);
        }
    }
    rng.shuffle(&mut scene);
    scene
}

/// Whether a fact can be added without making any question ambiguous.
pub fn fits(scene: &[Fact], fact: &Fact) -> bool {
    !scene.iter().any(|other| {
        (other.person == fact.person && other.attribute == fact.attribute) || other.value == fact.value
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn everyone_has_values_on_both_sides() {
        for person in PEOPLE {
            let held = |attribute: &Attribute| {
                Fact::random(&mut Rng::new(0, &[]), person, *attribute, true).is_some()
            };
            assert!(Attribute::ALL.iter().filter(|attribute| held(attribute)).count() > 2, "{person}");
            for attribute in Attribute::ALL {
                let facts = attribute.values().iter().map(|value| Fact { person, attribute, value });
                let free = facts.filter(|fact| !fact.held_out()).count();
                assert!(free > attribute.values().len() / 3, "{person} {attribute:?}: {free}");
            }
        }
        let all = PEOPLE.iter().flat_map(|person| {
            let fact = move |attribute: Attribute| {
                attribute.values().iter().map(move |value| Fact { person, attribute, value })
            };
            Attribute::ALL.into_iter().flat_map(fact)
        });
        let held = all.clone().filter(Fact::held_out).count();
        let share = held as f64 / all.count() as f64;
        assert!((0.13..0.20).contains(&share), "{share}");
    }

    #[test]
    fn names_and_values_are_different_words() {
        let mut words: Vec<&str> = PEOPLE.to_vec();
        Attribute::ALL.iter().for_each(|attribute| words.extend(attribute.values()));
        let count = words.len();
        words.sort_unstable();
        words.dedup();
        assert_eq!(words.len(), count);
    }

    #[test]
    fn scenes_are_unambiguous() {
        let mut rng = Rng::new(1, &[]);
        for (people, facts) in [(1, 1), (3, 4), (2, 40), (4, 8)] {
            for _ in 0..200 {
                let scene = scene(&mut rng, people, facts);
                assert_eq!(scene.len(), facts.min(people * 6));
                for (i, fact) in scene.iter().enumerate() {
                    assert!(!fact.held_out() && fits(&scene[..i], fact));
                }
            }
        }
    }
}
