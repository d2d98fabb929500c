//! The made-up people, and what is so about each of them.
//!
//! Every person has one value of every attribute, drawn once and for all, so that nothing in the world
//! contradicts anything else. The names mean nothing and the values are drawn independently: knowing one
//! thing about a person says nothing about another, and no fact can be guessed from a name.

use crate::rng::Rng;

/// The people: each a name of one word, so that a model finds a person where it finds a word.
const NAMES: [&str; 96] = [
    "Ada", "Ben", "Carla", "David", "Emma", "Felix", "Greta", "Hugo", "Ida", "Jonas", "Karin", "Leo",
    "Maria", "Nils", "Olga", "Paul", "Rosa", "Simon", "Tina", "Uwe", "Vera", "Walter", "Yara", "Zoe",
    "Anton", "Berta", "Conrad", "Dora", "Emil", "Flora", "Georg", "Hanna", "Igor", "Julia", "Kurt", "Lina",
    "Martin", "Nora", "Otto", "Petra", "Ralf", "Sofia", "Thomas", "Ulla", "Lars", "Wanda", "Oscar", "Clara",
    "Bruno", "Celia", "Dennis", "Elsa", "Fritz", "Gloria", "Henry", "Irene", "Jakob", "Katja", "Ludwig",
    "Mona", "Norbert", "Olivia", "Pedro", "Quentin", "Ruth", "Stefan", "Theo", "Ursula", "Victor", "Wilma",
    "Xaver", "Yvonne", "Zeno", "Alma", "Boris", "Cora", "Dieter", "Edith", "Frank", "Gerda", "Harald",
    "Ines", "Jens", "Kira", "Lothar", "Marta", "Nadia", "Oliver", "Paula", "Rufus", "Sven", "Tilda", "Urs",
    "Vivian", "Wolf", "Zita",
];

/// How many people there are.
pub const PEOPLE: usize = NAMES.len();

const CITIES: [&str; 32] = [
    "Lisbon", "Oslo", "Vienna", "Madrid", "Rome", "Paris", "Berlin", "Prague", "Athens", "Dublin", "Warsaw",
    "Zurich", "Riga", "Turin", "Porto", "Bergen", "Krakow", "Lyon", "Geneva", "Malaga", "Naples", "Hamburg",
    "Seville", "Graz", "Basel", "Tallinn", "Bremen", "Verona", "Ghent", "Malmo", "Split", "Cork",
];

const ANIMALS: [&str; 20] = [
    "cat", "dog", "horse", "rabbit", "parrot", "goat", "sheep", "duck", "turtle", "hamster", "donkey",
    "goose", "pony", "mouse", "pigeon", "fox", "owl", "bee", "lizard", "hen",
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

const THINGS: [&str; 20] = [
    "boat", "car", "bike", "house", "tent", "piano", "drum", "lamp", "clock", "coat", "hat", "scarf",
    "chair", "table", "kite", "ball", "van", "sofa", "vase", "bag",
];

const COLOURS: [&str; 10] =
    ["red", "blue", "green", "yellow", "black", "white", "brown", "grey", "orange", "purple"];

/// What is so about every person. What people own was drawn from the things, what they paint from the
/// colours, and so on.
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

/// In how many wordings each fact is told.
pub const WORDINGS: usize = 6;

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

    /// Sentences that tell it. `{who}` is the person, `{what}` the value, `{a}` the value's article. The
    /// first ends with the value.
    fn wordings(self) -> &'static [&'static str; WORDINGS] {
        match self {
            Attribute::City => &[
                "{who} lives in {what}.",
                "The home of {who} is in {what}.",
                "{who} has a flat in {what}.",
                "Letters to {who} go to {what}.",
                "The city of {who} is {what}.",
                "You can visit {who} in {what}.",
            ],
            Attribute::Pet => &[
                "{who} keeps {a} {what}.",
                "The pet of {who} is {a} {what}.",
                "{who} feeds {a} {what} every morning.",
                "Wherever {who} goes, {a} {what} follows.",
                "At home {who} looks after {a} {what}.",
                "The animal of {who} is {a} {what}.",
            ],
            Attribute::Job => &[
                "{who} works as {a} {what}.",
                "The job of {who} is that of {a} {what}.",
                "{who} is {a} {what}.",
                "By day {who} is {a} {what}.",
                "Long ago {who} learnt to be {a} {what}.",
                "People need {who}, who is {a} {what}.",
            ],
            Attribute::Food => &[
                "{who} likes {what}.",
                "The food of {who} is {what}.",
                "For lunch {who} has {what}.",
                "{who} is fond of {what}.",
                "What {who} cooks best is {what}.",
                "The kitchen of {who} is full of {what}.",
            ],
            Attribute::Thing => &[
                "{who} owns {a} {what}.",
                "The thing that {who} owns is {a} {what}.",
                "{who} is proud of {a} {what}.",
                "Last year {who} got {a} {what}.",
                "What belongs to {who} is {a} {what}.",
                "{who} would never sell {a} {what}.",
            ],
            Attribute::Colour => &[
                "{who} wears {what}.",
                "The colour of {who} is {what}.",
                "{who} paints every wall {what}.",
                "The door of {who} is {what}.",
                "All that {who} wears is {what}.",
                "The best colour for {who} is {what}.",
            ],
        }
    }
}

/// A person of the made-up world, by number, from 0 to [`PEOPLE`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Person(usize);

impl Person {
    /// Everyone.
    pub fn all() -> impl Iterator<Item = Person> {
        (0..PEOPLE).map(Person)
    }

    /// Anyone, each equally likely.
    pub fn random(rng: &mut Rng) -> Person {
        Person(rng.index(PEOPLE))
    }

    /// The name, one word that nobody else has.
    pub fn name(self) -> String {
        NAMES[self.0].to_string()
    }
}

/// Names the random stream that the world's values come from. They are the same in every run: the
/// base model that ships knows this world and no other.
const WORLD: u64 = 0x77_6f72_6c64;

/// One thing that is so about a person.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Fact {
    /// About whom.
    pub person: Person,
    /// What kind of thing.
    pub attribute: Attribute,
}

impl Fact {
    /// Everything about a person.
    pub fn about(person: Person) -> [Fact; Attribute::ALL.len()] {
        Attribute::ALL.map(|attribute| Fact { person, attribute })
    }

    /// Any fact, each equally likely.
    pub fn random(rng: &mut Rng) -> Fact {
        Fact { person: Person::random(rng), attribute: rng.pick(&Attribute::ALL) }
    }

    /// What is so.
    pub fn value(&self) -> &'static str {
        let values = self.attribute.values();
        values[Rng::new(WORLD, &[self.person.0 as u64, self.attribute as u64]).index(values.len())]
    }

    /// The fact as a sentence, in one of its [`WORDINGS`] (any number will do).
    pub fn sentence(&self, wording: usize) -> String {
        self.fill(self.attribute.wordings()[wording % WORDINGS])
    }

    /// A sentence up to where the value would come, without the space before it.
    pub fn unfinished(&self) -> String {
        let [first, ..] = self.attribute.wordings();
        self.fill(first.trim_end_matches(" {what}."))
    }

    /// Puts the person and the value into a sentence or a question.
    pub fn fill(&self, pattern: &str) -> String {
        let value = self.value();
        let article = if value.starts_with(['a', 'e', 'i', 'o', 'u']) { "an" } else { "a" };
        pattern.replace("{who}", &self.person.name()).replace("{what}", value).replace("{a}", article)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_and_values_are_different_words() {
        let mut words: Vec<String> = Person::all().map(Person::name).collect();
        for attribute in Attribute::ALL {
            words.extend(attribute.values().iter().map(ToString::to_string));
        }
        let count = words.len();
        words.sort_unstable();
        words.dedup();
        assert_eq!(words.len(), count);
    }

    /// A model that answers with the most frequent value must not look as if it knew something.
    #[test]
    fn no_value_is_frequent() {
        for attribute in Attribute::ALL {
            let count = attribute.values().len();
            for value in attribute.values() {
                let holders =
                    Person::all().filter(|&person| Fact { person, attribute }.value() == *value).count();
                assert!(holders * count < 2 * PEOPLE + 5 * count, "{value}: {holders}");
            }
        }
    }

    #[test]
    fn every_wording_tells_person_and_value() {
        for attribute in Attribute::ALL {
            let fact = Fact { person: Person(17), attribute };
            let mut sentences: Vec<String> = (0..WORDINGS).map(|wording| fact.sentence(wording)).collect();
            for sentence in &sentences {
                assert!(sentence.contains(&fact.person.name()) && sentence.contains(fact.value()));
                assert!(sentence.ends_with('.') && !sentence.contains(['{', '}']), "{sentence}");
            }
            assert_eq!(sentences[0], format!("{} {}.", fact.unfinished(), fact.value()));
            sentences.dedup();
            assert_eq!(sentences.len(), WORDINGS);
        }
    }
}
