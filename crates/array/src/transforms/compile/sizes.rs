//! Sizes as symbols: a graph recorded on some sizes, for all.
//!
//! Ops do not know that a number in their fields, or a size of their result, came from a size of
//! an input. It is found out: the function is traced several times, on inputs of different sizes
//! that are prime numbers, and every number that is not the same in all traces is explained by a
//! [`Formula`] in the inputs' sizes that all traces agree with. What no formula explains makes the
//! graph one for the recorded sizes alone.

use std::collections::HashSet;
use std::sync::Arc;

use smallvec::{SmallVec, smallvec};

use super::numbers::{self, Number};
use crate::node::State;
use crate::op::{Op, Scalar};
use crate::storage::Spec;
use crate::transforms::graph::{TracedGraph, TracedNode};
use crate::{Array, Dtype, Shape};

/// Different sizes that inputs may have at most. More are no reason to look for formulas.
const MOST_SYMBOLS: usize = 8;
/// Traces on other sizes.
const PROBES: usize = 3;
/// Sizes of the probes. They are primes so that no product of some is another's, and not small, so
/// that they are not equal to a number that stands in the function.
const PRIMES: [usize; MOST_SYMBOLS * PROBES] = [
    101, 103, 107, 109, 113, 127, 131, 137, 139, 149, 151, 157, 163, 167, 173, 179, 181, 191, 193, 197, 199,
    211, 223, 227,
];
/// How many sizes a product may be of.
const MOST_FACTORS: u8 = 4;

/// The sizes of inputs, numbered: equal ones have one number. Zero and one are numbers of their
/// own, since an empty array, and one that broadcasts, are often treated in another way.
#[derive(Clone)]
pub(super) struct Symbols {
    /// The inputs' shapes, of numbers.
    pub(super) pattern: SmallVec<[(Shape, Dtype); 3]>,
    /// The size behind each number from [`FIRST`] on.
    pub(super) values: SmallVec<[usize; MOST_SYMBOLS]>,
}

/// The numbers of zero and one are they themselves.
const FIRST: usize = 2;

impl Symbols {
    pub(super) fn of(inputs: &[Array]) -> Symbols {
        let mut values: SmallVec<[usize; MOST_SYMBOLS]> = SmallVec::new();
        let mut number = |&size: &usize| {
            if size < FIRST {
                return size;
            }
            FIRST
                + values.iter().position(|&known| known == size).unwrap_or_else(|| {
                    values.push(size);
                    values.len() - 1
                })
        };
        let pattern = inputs
            .iter()
            .map(|input| (input.shape().iter().map(&mut number).collect(), input.dtype()))
            .collect();
        Symbols { pattern, values }
    }

    /// Lazy arrays of this pattern with these sizes.
    fn arrays(&self, values: &[usize]) -> Vec<Array> {
        let size = |&number: &usize| if number < FIRST { number } else { values[number - FIRST] };
        let array = |(shape, dtype): &(Shape, Dtype)| {
            Array::zeros(&shape.iter().map(size).collect::<Shape>(), *dtype)
        };
        self.pattern.iter().map(array).collect()
    }

    /// These sizes with those that are free replaced by a probe's.
    fn probe(&self, probe: usize, free: &[bool]) -> SmallVec<[usize; MOST_SYMBOLS]> {
        let prime = |index: usize| PRIMES[probe * MOST_SYMBOLS + index];
        let size = |(index, &value): (usize, &usize)| if free[index] { prime(index) } else { value };
        self.values.iter().enumerate().map(size).collect()
    }
}

/// Which sizes a graph of this function need not name, per symbol, and that graph. Without such
/// sizes there is none.
pub(super) fn free_symbols(
    symbols: &Symbols,
    actual: &TracedGraph,
    trace: &dyn Fn(&[Array]) -> Option<TracedGraph>,
) -> (SmallVec<[bool; MOST_SYMBOLS]>, Option<TracedGraph>) {
    let count = symbols.values.len();
    let none = SmallVec::from_elem(false, count);
    if count > MOST_SYMBOLS {
        return (none, None);
    }
    let all: SmallVec<[bool; MOST_SYMBOLS]> = SmallVec::from_elem(true, count);
    if let Some(graph) = general(symbols, &all, actual, trace) {
        return (all, Some(graph));
    }
    // Some are tied: to a weight's size, say. Each for itself, then those that are free together.
    let only = |index: usize| (0..count).map(|other| other == index).collect::<SmallVec<[bool; 8]>>();
    let mut found = (none, None);
    for index in 0..count {
        let mut free = found.0.clone();
        free[index] = true;
        if general(symbols, &only(index), actual, trace).is_some()
            && let Some(graph) = general(symbols, &free, actual, trace)
        {
            found = (free, Some(graph));
        }
    }
    found
}

/// The graph of a function for all sizes of the symbols that are free, if traces on other sizes
/// are of the same ops and formulas explain the numbers in which they differ.
pub(super) fn general(
    symbols: &Symbols,
    free: &[bool],
    actual: &TracedGraph,
    trace: &dyn Fn(&[Array]) -> Option<TracedGraph>,
) -> Option<TracedGraph> {
    let mut samples = vec![symbols.values.clone()];
    let mut graphs: Vec<TracedGraph> = Vec::with_capacity(PROBES);
    for probe in 0..PROBES {
        let values = symbols.probe(probe, free);
        let graph = trace(&symbols.arrays(&values))?;
        if !is_same_but_for_sizes(actual, &graph) {
            return None;
        }
        samples.push(values);
        graphs.push(graph);
    }
    let finder = Finder { samples: &samples, free };
    let mut sizes = Vec::with_capacity(actual.nodes.len());
    for index in 0..actual.nodes.len() {
        let nodes: SmallVec<[&TracedNode; 4]> =
            std::iter::once(actual).chain(&graphs).map(|graph| &graph.nodes[index]).collect();
        sizes.push(finder.node(&nodes)?);
    }
    // The first probe's: on primes, sizes are equal only where they always are.
    let mut graph = graphs.swap_remove(0);
    for (node, sizes) in graph.nodes.iter_mut().zip(sizes) {
        node.sizes = sizes.map(Arc::new);
    }
    Some(graph)
}

/// Whether two graphs are of the same ops on the same values, apart from sizes.
pub(crate) fn is_same_but_for_sizes(a: &TracedGraph, b: &TracedGraph) -> bool {
    let is_same_node = |(a, b): (&TracedNode, &TracedNode)| {
        let dtypes_and_ranks = |node: &TracedNode| {
            node.specs.iter().map(|spec| (spec.dtype, spec.shape.len())).collect::<SmallVec<[_; 4]>>()
        };
        a.inputs == b.inputs
            && dtypes_and_ranks(a) == dtypes_and_ranks(b)
            && numbers::is_same_but_for_numbers(&a.op, &b.op)
    };
    a.nodes.len() == b.nodes.len()
        && a.outputs == b.outputs
        && a.captured.len() == b.captured.len()
        && a.captured.iter().zip(&b.captured).all(|(a, b)| is_same_array(a, b))
        && a.nodes.iter().zip(&b.nodes).all(is_same_node)
}

/// Whether two captured arrays are one; or small and equal: lists of indices that the function makes
/// at every call; or made in the same way from such.
fn is_same_array(a: &Array, b: &Array) -> bool {
    const SMALL: usize = 4096;
    const MOST_NODES: usize = 1000;
    let small = |array: &Array| array.nbytes() <= SMALL && array.is_ready() && array.packed().is_none();
    let values_are_equal = |a: &Array, b: &Array| {
        small(a)
            && small(b)
            && a.with_bytes(|a| b.with_bytes(|b| a == b)).is_ok_and(|equal| equal.is_ok_and(|equal| equal))
    };
    let made_of = |array: &Array| match &*array.node().state() {
        State::Lazy { op, inputs } => Some((op.clone(), inputs.clone())),
        _ => None,
    };
    let mut pairs = vec![(a.clone(), b.clone())];
    let mut seen = HashSet::new();
    while let Some((a, b)) = pairs.pop() {
        if a.output() != b.output() || a.shape() != b.shape() || a.dtype() != b.dtype() {
            return false;
        }
        if a.id() == b.id() || !seen.insert((a.id(), b.id())) || values_are_equal(&a, &b) {
            continue;
        }
        let (Some((op, inputs)), Some((other_op, others))) = (made_of(&a), made_of(&b)) else { return false };
        let same = numbers::is_same(&op, &other_op) && inputs.len() == others.len();
        if !same || seen.len() > MOST_NODES {
            return false;
        }
        pairs.extend(inputs.into_iter().zip(others));
    }
    true
}

/// A number as a function of the symbols.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Formula {
    /// The same for all sizes.
    Fixed(Num),
    /// base + numerator · (Π − at) / denominator, with Π the product of symbols to these powers.
    Linear(Linear),
    /// 1 / a linear one.
    Inverse(Linear),
}

/// A number of a graph.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Num {
    Whole(i128),
    Float(f64),
}

/// See [`Formula::Linear`].
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Linear {
    base: i128,
    numerator: i128,
    denominator: i128,
    at: i128,
    powers: SmallVec<[u8; MOST_SYMBOLS]>,
}

impl Linear {
    fn value(&self, symbols: &[usize]) -> Option<i128> {
        let product = product(&self.powers, symbols)?;
        let above = self.numerator.checked_mul(product - self.at)?;
        (above % self.denominator == 0).then(|| self.base + above / self.denominator)
    }
}

fn product(powers: &[u8], symbols: &[usize]) -> Option<i128> {
    powers
        .iter()
        .zip(symbols)
        .try_fold(1i128, |product, (&power, &size)| product.checked_mul((size as i128).pow(power as u32)))
}

impl Formula {
    fn is_fixed(&self) -> bool {
        matches!(self, Formula::Fixed(_))
    }

    /// The number for these sizes; nothing if it should be whole and is not.
    fn value(&self, symbols: &[usize]) -> Option<Num> {
        match self {
            Formula::Fixed(number) => Some(*number),
            Formula::Linear(linear) => linear.value(symbols).map(Num::Whole),
            Formula::Inverse(linear) => linear.value(symbols).map(|value| Num::Float(1.0 / value as f64)),
        }
    }
}

/// The formulas of a node.
#[derive(Clone, Debug, Default)]
pub(crate) struct NodeSizes {
    /// Of the numbers in its op, in the order of [`numbers::visit`]; empty if all are fixed.
    pub(super) op: SmallVec<[Formula; 2]>,
    /// Of its outputs' sizes, one output after another; empty if all are fixed.
    pub(super) shapes: SmallVec<[Formula; 4]>,
}

impl NodeSizes {
    /// The op and its outputs' shapes for these sizes, from those that were recorded.
    pub(crate) fn apply(&self, symbols: &[usize], op: &mut Op, specs: &mut [Spec]) -> Option<()> {
        let mut formulas = self.op.iter();
        let mut whole = true;
        if !self.op.is_empty() {
            numbers::visit(op, specs[0].dtype, &mut |number| {
                if let Some(formula) = formulas.next() {
                    let value = formula.value(symbols);
                    whole &= value.is_some_and(|value| set(number, value));
                }
            });
        }
        let sizes = specs.iter_mut().flat_map(|spec| spec.shape.iter_mut());
        for (size, formula) in sizes.zip(&self.shapes) {
            let Some(Num::Whole(value)) = formula.value(symbols) else { return None };
            *size = usize::try_from(value).ok()?;
        }
        whole.then_some(())
    }
}

/// Whether the number can be that.
fn set(number: Number, value: Num) -> bool {
    fn write<T: TryFrom<i128>>(place: &mut T, value: i128) -> bool {
        T::try_from(value).map(|value| *place = value).is_ok()
    }
    let float = |value: Num| match value {
        Num::Whole(value) => value as f64,
        Num::Float(value) => value,
    };
    match (number, value) {
        (Number::Size(place), Num::Whole(value)) => write(place, value),
        (Number::Step(place), Num::Whole(value)) => write(place, value),
        (Number::Value(Scalar::Int(place), _), Num::Whole(value)) => write(place, value),
        (Number::Value(Scalar::UInt(place), _), Num::Whole(value)) => write(place, value),
        (Number::Float(place, _) | Number::Value(Scalar::Float(place), _), value) => {
            *place = float(value);
            true
        }
        (Number::Value(Scalar::Bool(place), _), Num::Whole(value)) => {
            *place = value != 0;
            true
        }
        _ => false,
    }
}

/// The numbers of a node's op, with the type that each was rounded to.
fn numbers_of(node: &TracedNode) -> SmallVec<[(Num, Dtype); 8]> {
    let mut found = SmallVec::new();
    numbers::visit(&mut node.op.clone(), node.specs[0].dtype, &mut |number| {
        found.push(match number {
            Number::Size(size) => (Num::Whole(*size as i128), Dtype::I64),
            Number::Step(step) => (Num::Whole(*step as i128), Dtype::I64),
            Number::Float(float, dtype) => (Num::Float(*float), dtype),
            Number::Value(Scalar::Bool(value), dtype) => (Num::Whole(*value as i128), dtype),
            Number::Value(Scalar::Int(value), dtype) => (Num::Whole(*value as i128), dtype),
            Number::Value(Scalar::UInt(value), dtype) => (Num::Whole(*value as i128), dtype),
            Number::Value(Scalar::Float(value), dtype) => (Num::Float(*value), dtype),
        });
    });
    found
}

/// Finds formulas that agree with all samples.
struct Finder<'a> {
    /// The symbols' values per trace.
    samples: &'a [SmallVec<[usize; MOST_SYMBOLS]>],
    free: &'a [bool],
}

impl Finder<'_> {
    /// The formulas of one node in all traces: nothing if some number has none, `None` within if
    /// none is needed.
    fn node(&self, traces: &[&TracedNode]) -> Option<Option<NodeSizes>> {
        let numbers: SmallVec<[SmallVec<[(Num, Dtype); 8]>; 4]> =
            traces.iter().map(|node| numbers_of(node)).collect();
        let shapes: SmallVec<[SmallVec<[(Num, Dtype); 8]>; 4]> = traces
            .iter()
            .map(|node| {
                let sizes = node.specs.iter().flat_map(|spec| spec.shape.iter());
                sizes.map(|&size| (Num::Whole(size as i128), Dtype::I64)).collect()
            })
            .collect();
        let op: SmallVec<[Formula; 2]> = self.all(&numbers)?;
        let shapes: SmallVec<[Formula; 4]> = self.all(&shapes)?;
        let op = if op.iter().all(Formula::is_fixed) { SmallVec::new() } else { op };
        let shapes = if shapes.iter().all(Formula::is_fixed) { SmallVec::new() } else { shapes };
        Some((!op.is_empty() || !shapes.is_empty()).then_some(NodeSizes { op, shapes }))
    }

    /// A formula per number of a list, given in all traces.
    fn all<const N: usize>(&self, lists: &[SmallVec<[(Num, Dtype); 8]>]) -> Option<SmallVec<[Formula; N]>>
    where
        [Formula; N]: smallvec::Array<Item = Formula>,
    {
        (0..lists[0].len())
            .map(|at| {
                let values: SmallVec<[Num; 4]> = lists.iter().map(|list| list[at].0).collect();
                self.formula(&values, lists[0][at].1)
            })
            .collect()
    }

    fn formula(&self, values: &[Num], dtype: Dtype) -> Option<Formula> {
        let is_equal = |value: &Num| match (*value, values[0]) {
            (Num::Float(a), Num::Float(b)) => a.to_bits() == b.to_bits(),
            (a, b) => a == b,
        };
        if values.iter().all(is_equal) {
            return Some(Formula::Fixed(values[0]));
        }
        let whole = |value: &Num| match *value {
            Num::Whole(value) => Some(value),
            Num::Float(value) if value.fract() == 0.0 && value.abs() < 9e15 => Some(value as i128),
            Num::Float(_) => None,
        };
        if let Some(values) = values.iter().map(whole).collect::<Option<SmallVec<[i128; 4]>>>() {
            return self.linear(&values).map(Formula::Linear);
        }
        // 1 / n, in doubles or already rounded to the array's type.
        let inverse = |value: &Num| {
            let Num::Float(value) = *value else { return None };
            let below = (1.0 / value).round();
            let again = 1.0 / below;
            let same = again == value || (dtype == Dtype::F32 && again as f32 == value as f32);
            (same && below.abs() < 9e15).then_some(below as i128)
        };
        let below = values.iter().map(inverse).collect::<Option<SmallVec<[i128; 4]>>>()?;
        self.linear(&below).map(Formula::Inverse)
    }

    /// The simplest product of free symbols that the values are linear in.
    fn linear(&self, values: &[i128]) -> Option<Linear> {
        let mut powers: SmallVec<[u8; MOST_SYMBOLS]> = smallvec![0; self.free.len()];
        (1..=MOST_FACTORS).find_map(|degree| self.products(values, &mut powers, 0, degree))
    }

    /// Tries the products in which symbols from `first` on have `degree` powers to share.
    fn products(
        &self,
        values: &[i128],
        powers: &mut SmallVec<[u8; MOST_SYMBOLS]>,
        first: usize,
        degree: u8,
    ) -> Option<Linear> {
        if degree == 0 {
            return self.in_product(values, powers);
        }
        for index in first..self.free.len() {
            if self.free[index] {
                powers[index] += 1;
                let found = self.products(values, powers, index, degree - 1);
                powers[index] -= 1;
                if found.is_some() {
                    return found;
                }
            }
        }
        None
    }

    fn in_product(&self, values: &[i128], powers: &[u8]) -> Option<Linear> {
        let products = self
            .samples
            .iter()
            .map(|sample| product(powers, sample))
            .collect::<Option<SmallVec<[i128; 4]>>>()?;
        // Two probes, which differ in every free symbol.
        let (run, rise) = (products[2] - products[1], values[2] - values[1]);
        let fits = |(&product, &value): (&i128, &i128)| {
            (value - values[1])
                .checked_mul(run)
                .zip(rise.checked_mul(product - products[1]))
                .is_some_and(|(a, b)| a == b)
        };
        if run == 0 || !products.iter().zip(values).all(fits) {
            return None;
        }
        let common = greatest_common_divisor(rise.unsigned_abs(), run.unsigned_abs()) as i128;
        Some(Linear {
            base: values[1],
            numerator: rise / common,
            denominator: run / common,
            at: products[1],
            powers: powers.into(),
        })
    }
}

fn greatest_common_divisor(a: u128, b: u128) -> u128 {
    if b == 0 { a } else { greatest_common_divisor(b, a % b) }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Values of `f` on samples, explained, and then asked for on other sizes.
    fn check(name: &str, f: impl Fn(i128, i128) -> Num, dtype: Dtype, expected: bool) {
        let samples: Vec<SmallVec<[usize; 8]>> =
            [[4, 6], [101, 103], [139, 149], [181, 191]].iter().map(|sample| sample[..].into()).collect();
        let finder = Finder { samples: &samples, free: &[true, true] };
        let values: Vec<Num> = samples.iter().map(|s| f(s[0] as i128, s[1] as i128)).collect();
        let formula = finder.formula(&values, dtype);
        assert_eq!(formula.is_some(), expected, "{name}: {formula:?}");
        for (a, b) in [(5, 9), (1, 1), (64, 3), (1000, 7)] {
            if let Some(formula) = &formula {
                assert_eq!(formula.value(&[a, b]), Some(f(a as i128, b as i128)), "{name} at {a}, {b}");
            }
        }
    }

    #[test]
    fn formulas_explain_what_sizes_do_to_numbers() {
        let float = Dtype::F32;
        check("fixed", |_, _| Num::Whole(7), float, true);
        check("a size", |a, _| Num::Whole(a), float, true);
        check("less one", |_, b| Num::Whole(b - 1), float, true);
        check("three and more", |a, _| Num::Whole(3 * a + 5), float, true);
        check("backwards", |a, _| Num::Whole(-a), float, true);
        check("flattened", |a, b| Num::Whole(2 * a * b), float, true);
        check("padded", |a, b| Num::Whole(a * b + 1), float, true);
        check("a square", |a, _| Num::Whole(a * a), float, true);
        check("a mean", |a, b| Num::Float(1.0 / (a * b) as f64), float, true);
        check("of a sample", |a, _| Num::Float(1.0 / (a - 1) as f64), float, true);
        check("a logarithm", |a, _| Num::Float((a as f64).ln()), float, false);
        check("halves", |a, _| Num::Whole(a / 2), float, false);
        check("a sum", |a, b| Num::Whole(a + b), float, false);
    }
}
