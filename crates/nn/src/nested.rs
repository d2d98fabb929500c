//! Nested values, and what `mlx.utils` does with them.
//!
//! This crate passes parameters around as flat lists of names and arrays. A [`Nested`] is the same
//! thing unfolded, where the shape of the tree matters: configurations, states, checkpoints of
//! other programs.

use std::collections::BTreeMap;

use mica_array::{Error, Result};

/// So many places of a list may be skipped by its names: more is a mistake, or an attack.
const MOST_HOLES: usize = 1 << 16;

/// A value, or lists and maps of such. What counts as one value is up to `T`.
///
/// ```
/// use mica_array::Array;
/// use mica_nn::{Keys, Linear, Nested, parameters};
///
/// let model = vec![Linear::new(4, 2, true, &mut Keys::new(0)?)?];
/// let tree = Nested::unflatten(parameters(&model))?;
/// let halved = tree.map(|array| array.multiply(0.5)).all_ok()?;
/// let names: Vec<String> = halved.flatten().into_iter().map(|(name, _)| name).collect();
/// assert_eq!(names, ["0.weight", "0.bias"]);
/// assert!(tree.reduce(true, |all, array: &Array| all && array.rank() > 0));
/// # Ok::<(), mica_array::Error>(())
/// ```
#[derive(Clone, Debug, PartialEq)]
pub enum Nested<T> {
    /// A value.
    Leaf(T),
    /// Named by their index.
    List(Vec<Nested<T>>),
    /// Named by a key, each of which is there once, in the order in which they came.
    Map(Vec<(String, Nested<T>)>),
}

impl<T> From<T> for Nested<T> {
    fn from(value: T) -> Nested<T> {
        Nested::Leaf(value)
    }
}

impl<T> Nested<T> {
    /// The same tree of what `f` makes of the values.
    pub fn map<R>(&self, mut f: impl FnMut(&T) -> R) -> Nested<R> {
        self.map_with_path(|_, value| f(value))
    }

    /// The same tree of what `f` makes of the values and their names, as `model.0.weight`.
    pub fn map_with_path<R>(&self, mut f: impl FnMut(&str, &T) -> R) -> Nested<R> {
        self.walk(&mut String::new(), &mut f)
    }

    fn walk<R>(&self, path: &mut String, f: &mut impl FnMut(&str, &T) -> R) -> Nested<R> {
        match self {
            Nested::Leaf(value) => Nested::Leaf(f(path, value)),
            Nested::List(items) => {
                let items = items.iter().enumerate();
                Nested::List(
                    items
                        .map(|(index, item)| within(path, &index.to_string(), |p| item.walk(p, f)))
                        .collect(),
                )
            }
            Nested::Map(entries) => Nested::Map(
                entries
                    .iter()
                    .map(|(key, item)| (key.clone(), within(path, key, |p| item.walk(p, f))))
                    .collect(),
            ),
        }
    }

    /// The same tree of what `f` makes of each value and those at its place in the other trees,
    /// which may have more.
    ///
    /// # Errors
    /// If another tree lacks a place.
    pub fn map_with<U, R>(
        &self,
        others: &[&Nested<U>],
        mut f: impl FnMut(&T, &[&U]) -> R,
    ) -> Result<Nested<R>> {
        self.map_with_path(|path, value| {
            let found = others.iter().map(|other| match other.at(path) {
                Some(Nested::Leaf(value)) => Ok(value),
                _ => Err(invalid(format!("another tree has no value at {path:?}"))),
            });
            Ok(f(value, &found.collect::<Result<Vec<&U>>>()?))
        })
        .all_ok()
    }

    /// What is called so, as `model.0.weight`; all of it is called "".
    pub fn at(&self, path: &str) -> Option<&Nested<T>> {
        if path.is_empty() {
            return Some(self);
        }
        match self {
            Nested::Leaf(_) => None,
            Nested::List(items) => {
                let (index, rest) = path.split_once('.').unwrap_or((path, ""));
                items.get(index.parse::<usize>().ok()?)?.at(rest)
            }
            // A key may have dots of its own.
            Nested::Map(entries) => entries.iter().find_map(|(key, item)| {
                let rest = path.strip_prefix(key.as_str())?;
                if rest.is_empty() { Some(item) } else { item.at(rest.strip_prefix('.')?) }
            }),
        }
    }

    /// All values with their names, in order. Empty lists and maps leave nothing.
    pub fn flatten(&self) -> Vec<(String, &T)> {
        self.flatten_until(|_| false)
            .into_iter()
            .filter_map(|(path, item)| match item {
                Nested::Leaf(value) => Some((path, value)),
                _ => None,
            })
            .collect()
    }

    /// The values, and the subtrees that `is_leaf` says are to be taken as one, with their names.
    pub fn flatten_until(&self, is_leaf: impl Fn(&Nested<T>) -> bool) -> Vec<(String, &Nested<T>)> {
        fn go<'a, T>(
            item: &'a Nested<T>,
            path: &mut String,
            is_leaf: &impl Fn(&Nested<T>) -> bool,
            list: &mut Vec<(String, &'a Nested<T>)>,
        ) {
            match item {
                _ if is_leaf(item) => list.push((path.clone(), item)),
                Nested::Leaf(_) => list.push((path.clone(), item)),
                Nested::List(items) => {
                    for (index, item) in items.iter().enumerate() {
                        within(path, &index.to_string(), |path| go(item, path, is_leaf, list));
                    }
                }
                Nested::Map(entries) => {
                    for (key, item) in entries {
                        within(path, key, |path| go(item, path, is_leaf, list));
                    }
                }
            }
        }
        let mut list = Vec::new();
        go(self, &mut String::new(), &is_leaf, &mut list);
        list
    }

    /// The tree that values with such names make. Where all names are numbers they make a list;
    /// empty maps fill its gaps.
    ///
    /// # Errors
    /// If a name is given twice, is both a value's and a subtree's, or skips 65536 places of a list.
    pub fn unflatten(flat: impl IntoIterator<Item = (String, T)>) -> Result<Nested<T>> {
        let mut flat: Vec<(String, T)> = flat.into_iter().collect();
        if flat.len() == 1 && flat[0].0.is_empty() {
            return Ok(Nested::Leaf(flat.remove(0).1));
        }
        let mut order: Vec<String> = Vec::new();
        let mut groups: BTreeMap<String, Vec<(String, T)>> = BTreeMap::new();
        for (name, value) in flat {
            let (first, rest) = name.split_once('.').unwrap_or((name.as_str(), ""));
            let group = groups.entry(first.to_string()).or_insert_with(|| {
                order.push(first.to_string());
                Vec::new()
            });
            group.push((rest.to_string(), value));
        }
        let mut build = |key: &str| -> Result<Nested<T>> {
            let group = groups.remove(key).expect("every key in the order has a group");
            if group.len() > 1 && group.iter().any(|(rest, _)| rest.is_empty()) {
                return Err(invalid(format!("{key:?} is given twice, or as a value and as a tree")));
            }
            Nested::unflatten(group).map_err(|error| invalid(format!("in {key:?}: {error}")))
        };
        let mut indices: Vec<(usize, &String)> =
            order.iter().filter_map(|key| Some((index(key)?, key))).collect();
        indices.sort_unstable();
        indices.dedup_by_key(|(index, _)| *index);
        // "01" and "1" are two keys, and no places of a list.
        if indices.len() < order.len() {
            let entries = order.iter().map(|key| Ok((key.clone(), build(key)?)));
            return Ok(Nested::Map(entries.collect::<Result<_>>()?));
        }
        let mut items = Vec::new();
        for (index, key) in indices {
            if index - items.len() > MOST_HOLES {
                return Err(invalid(format!("{key:?} skips more than {MOST_HOLES} places of a list")));
            }
            items.resize_with(index, || Nested::Map(Vec::new()));
            items.push(build(key)?);
        }
        Ok(Nested::List(items))
    }

    /// What `f` makes of `start` and all values, one after another.
    pub fn reduce<A>(&self, start: A, mut f: impl FnMut(A, &T) -> A) -> A {
        self.flatten().into_iter().fold(start, |so_far, (_, value)| f(so_far, value))
    }

    /// One tree with all that is in either.
    ///
    /// # Errors
    /// If both have something at one place that is neither two lists nor two maps.
    pub fn merge(self, other: Nested<T>) -> Result<Nested<T>> {
        self.merge_with(other, &mut |_, _| {
            Err(invalid("both trees have a value at one place; merge_with says what to do then".into()))
        })
    }

    /// One tree with all that is in either; `f` decides where both have something that can't be
    /// joined.
    ///
    /// # Errors
    /// Those of `f`, and if an empty list meets an empty map.
    pub fn merge_with(
        self,
        other: Nested<T>,
        f: &mut dyn FnMut(Nested<T>, Nested<T>) -> Result<Nested<T>>,
    ) -> Result<Nested<T>> {
        use Nested::{List, Map};
        match (self, other) {
            (List(a), Map(b)) | (Map(b), List(a)) if a.is_empty() && b.is_empty() => {
                Err(invalid("an empty list and an empty map are at one place".into()))
            }
            (a, b) if b.is_empty() => Ok(a),
            (a, b) if a.is_empty() => Ok(b),
            (List(a), List(b)) => {
                let (mut a, mut b) = (a.into_iter(), b.into_iter());
                let mut merged = Vec::new();
                loop {
                    merged.push(match (a.next(), b.next()) {
                        (Some(a), Some(b)) => a.merge_with(b, f)?,
                        (Some(one), None) | (None, Some(one)) => one,
                        (None, None) => return Ok(List(merged)),
                    });
                }
            }
            (Map(mut a), Map(b)) => {
                for (key, item) in b {
                    match a.iter_mut().find(|(other, _)| *other == key) {
                        Some((_, place)) => {
                            let before = std::mem::replace(place, List(Vec::new()));
                            *place = before.merge_with(item, f)?;
                        }
                        None => a.push((key, item)),
                    }
                }
                Ok(Map(a))
            }
            (a, b) => f(a, b),
        }
    }

    /// Whether it is a list or a map of nothing.
    pub fn is_empty(&self) -> bool {
        match self {
            Nested::Leaf(_) => false,
            Nested::List(items) => items.is_empty(),
            Nested::Map(entries) => entries.is_empty(),
        }
    }
}

impl<T> Nested<Result<T>> {
    /// The tree of values, or the first error.
    pub fn all_ok(self) -> Result<Nested<T>> {
        Ok(match self {
            Nested::Leaf(value) => Nested::Leaf(value?),
            Nested::List(items) => {
                Nested::List(items.into_iter().map(Nested::all_ok).collect::<Result<_>>()?)
            }
            Nested::Map(entries) => Nested::Map(
                entries.into_iter().map(|(key, item)| Ok((key, item.all_ok()?))).collect::<Result<_>>()?,
            ),
        })
    }
}

/// Calls `f` with `path.key`, and takes the key away again.
fn within<R>(path: &mut String, key: &str, f: impl FnOnce(&mut String) -> R) -> R {
    let length = path.len();
    if length > 0 {
        path.push('.');
    }
    path.push_str(key);
    let result = f(path);
    path.truncate(length);
    result
}

/// A place in a list: digits alone.
fn index(key: &str) -> Option<usize> {
    let digits = !key.is_empty() && key.bytes().all(|byte| byte.is_ascii_digit());
    key.parse().ok().filter(|_| digits)
}

fn invalid(message: String) -> Error {
    Error::Invalid { op: "tree", message: message.into() }
}

#[cfg(test)]
mod tests {
    use super::*;
    use Nested::{Leaf, List, Map};

    fn map<const N: usize>(entries: [(&str, Nested<i32>); N]) -> Nested<i32> {
        Map(entries.map(|(key, item)| (key.to_string(), item)).to_vec())
    }

    fn list<const N: usize>(items: [Nested<i32>; N]) -> Nested<i32> {
        List(items.to_vec())
    }

    fn leaves<const N: usize>(values: [i32; N]) -> Nested<i32> {
        List(values.map(Leaf).to_vec())
    }

    fn unflatten(flat: &[(&str, i32)]) -> Result<Nested<i32>> {
        Nested::unflatten(flat.iter().map(|&(name, value)| (name.to_string(), value)))
    }

    #[test]
    fn flat_names_and_trees_turn_into_each_other() {
        let layer = |w, b| map([("w", Leaf(w)), ("b", Leaf(b))]);
        let cases: [(&[(&str, i32)], Nested<i32>); 7] = [
            (&[("", 3)], Leaf(3)),
            (&[("0.0.0", 0)], list([list([leaves([0])])])),
            (&[("hello.world", 42)], map([("hello", map([("world", Leaf(42))]))])),
            (
                &[("m.0.w", 0), ("m.0.b", 1), ("m.1.w", 2), ("m.1.b", 3)],
                map([("m", list([layer(0, 1), layer(2, 3)]))]),
            ),
            (&[("01", 1), ("1", 2)], map([("01", Leaf(1)), ("1", Leaf(2))])),
            (&[("10", 1), ("a", 2)], map([("10", Leaf(1)), ("a", Leaf(2))])),
            (&[], list([])),
        ];
        for (flat, tree) in cases {
            assert_eq!(unflatten(flat).unwrap(), tree, "{flat:?}");
            let again = tree.flatten();
            let again: Vec<(&str, i32)> =
                again.iter().map(|(name, value)| (name.as_str(), **value)).collect();
            assert_eq!(again, flat);
            for (name, value) in flat {
                assert_eq!(tree.at(name), Some(&Leaf(*value)), "{name}");
            }
        }
        // Gaps are empty maps, and the order of the names does not matter.
        let gaps = unflatten(&[("3", 3), ("1", 1)]).unwrap();
        assert_eq!(gaps, list([map([]), Leaf(1), map([]), Leaf(3)]));
    }

    #[test]
    fn names_that_make_no_tree() {
        for (flat, part) in [
            (&[("a", 1), ("a", 2)][..], "given twice"),
            (&[("b.a", 1), ("b.a.c", 2)], "in \"b\""),
            (&[("x.99999999", 1)], "skips more than"),
        ] {
            let error = unflatten(flat).unwrap_err().to_string();
            assert!(error.contains(part), "{flat:?}: {error}");
        }
    }

    #[test]
    fn values_are_mapped_with_their_names_and_with_other_trees() {
        let tree = map([("model", list([map([("w", Leaf(1))]), Leaf(2)])), ("none", list([]))]);
        let named = tree.map_with_path(|path, value| format!("{path}={value}"));
        let names: Vec<&String> = named.flatten().into_iter().map(|(_, value)| value).collect();
        assert_eq!(names, ["model.0.w=1", "model.1=2"]);
        assert_eq!(tree.map(|value| value * 10).reduce(3, |sum, value| sum + value), 33);
        assert_eq!(named.at("none"), Some(&List(Vec::new())), "what is empty stays");
        let more = map([("model", list([map([("w", Leaf(5)), ("b", Leaf(0))]), Leaf(7)]))]);
        let sums = tree.map_with(&[&more, &more], |a, rest| a + rest[0] + rest[1]).unwrap();
        assert_eq!(sums.at("model"), Some(&list([map([("w", Leaf(11))]), Leaf(16)])));
        let error = more.map_with(&[&tree], |a, _| *a).unwrap_err().to_string();
        assert!(error.contains("model.0.b"), "{error}");
        let pairs = tree.flatten_until(|item| matches!(item, Map(entries) if entries.len() == 1));
        assert_eq!(
            pairs,
            [("model.0".to_string(), &map([("w", Leaf(1))])), ("model.1".to_string(), &Leaf(2))]
        );
    }

    #[test]
    fn trees_are_merged() {
        let (a, b) = (
            map([("x", leaves([1])), ("y", map([])), ("z", Leaf(3))]),
            map([("x", list([map([]), Leaf(2)])), ("y", leaves([9])), ("w", Leaf(4))]),
        );
        let both = map([("x", leaves([1, 2])), ("y", leaves([9])), ("z", Leaf(3)), ("w", Leaf(4))]);
        assert_eq!(a.clone().merge(b).unwrap(), both);
        let error = a.clone().merge(map([("z", Leaf(5))])).unwrap_err().to_string();
        assert!(error.contains("merge_with"), "{error}");
        let sum = &mut |a: Nested<i32>, b: Nested<i32>| {
            Ok(Leaf(a.reduce(0, |sum, value| sum + value) + b.reduce(0, |sum, value| sum + value)))
        };
        assert_eq!(a.merge_with(map([("z", Leaf(5))]), sum).unwrap().at("z"), Some(&Leaf(8)));
        assert!(list([]).merge(map([])).is_err());
        assert_eq!(list([]).merge(list([])).unwrap(), list([]));
    }
}
