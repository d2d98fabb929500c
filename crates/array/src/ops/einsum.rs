//! Einstein summation: parsing, the order of contractions, and contracting.
//!
//! The order is found as NumPy's `greedy` does: of all pairs that share an index the one that removes
//! most, and the naive order if that is no worse. A pair is contracted as one batched product of
//! matrices, or elementwise if nothing is summed.

use std::collections::{BTreeMap, BTreeSet};

use crate::{Array, Error, Result};

/// An index of the sum: a letter, or a dimension that an ellipsis stands for, counted from the last.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Label {
    Ellipsis(usize),
    Letter(char),
}

type Labels = Vec<Label>;

struct Parsed {
    inputs: Vec<Labels>,
    output: Labels,
    sizes: BTreeMap<Label, usize>,
}

fn bad(message: impl AsRef<str>) -> Error {
    Error::invalid("einsum", message)
}

fn parse(subscripts: &str, shapes: &[&[usize]]) -> Result<Parsed> {
    let text: String = subscripts.chars().filter(|c| !c.is_whitespace()).collect();
    let (left, right) = match text.split_once("->") {
        Some((left, right)) => (left, Some(right)),
        None => (text.as_str(), None),
    };
    let terms: Vec<&str> = left.split(',').collect();
    if terms.len() != shapes.len() {
        return Err(bad(format!(
            "{} operands for {} subscripts in {subscripts:?}",
            shapes.len(),
            terms.len()
        )));
    }
    let letter = |c: char| {
        if c.is_ascii_alphabetic() {
            Ok(Label::Letter(c))
        } else {
            Err(bad(format!("subscripts are letters and one \"...\" a term, got {c:?} in {subscripts:?}")))
        }
    };
    let expand = |term: &str, dimensions: usize| -> Result<Labels> {
        let mut labels = Labels::new();
        let (before, after) = term.split_once("...").unwrap_or((term, ""));
        for c in before.chars() {
            labels.push(letter(c)?);
        }
        labels.extend((0..dimensions).rev().map(Label::Ellipsis));
        for c in after.chars() {
            labels.push(letter(c)?);
        }
        Ok(labels)
    };
    let mut inputs = Vec::new();
    let mut sizes: BTreeMap<Label, usize> = BTreeMap::new();
    for (at, (term, shape)) in terms.iter().zip(shapes).enumerate() {
        let letters = term.chars().filter(|&c| c != '.').count();
        let fits = if term.contains("...") { letters <= shape.len() } else { letters == shape.len() };
        if !fits {
            return Err(bad(format!("{letters} subscripts for operand {at} of shape {shape:?}")));
        }
        let labels = expand(term, shape.len() - letters)?;
        for (&label, &size) in labels.iter().zip(*shape) {
            let known = sizes.entry(label).or_insert(size);
            if *known == 1 {
                *known = size;
            } else if size != 1 && size != *known {
                return Err(bad(format!(
                    "an index of operand {at} of shape {shape:?} has size {size}, elsewhere {known}"
                )));
            }
        }
        inputs.push(labels);
    }
    let dots = sizes.keys().filter(|label| matches!(label, Label::Ellipsis(_))).count();
    let output = match right {
        Some(term) => expand(term, if term.contains("...") { dots } else { 0 })?,
        None => {
            // What an ellipsis stands for, then the letters that occur once, in alphabetic order.
            let count = |label: Label| inputs.iter().flatten().filter(|&&other| other == label).count();
            let mut once: Vec<char> = sizes
                .keys()
                .filter_map(|&label| match label {
                    Label::Letter(c) if count(label) == 1 => Some(c),
                    _ => None,
                })
                .collect();
            once.sort_unstable();
            (0..dots).rev().map(Label::Ellipsis).chain(once.into_iter().map(Label::Letter)).collect()
        }
    };
    for (at, label) in output.iter().enumerate() {
        if output[..at].contains(label) {
            return Err(bad(format!("the output of {subscripts:?} repeats an index")));
        }
        if !sizes.contains_key(label) {
            return Err(bad(format!("the output of {subscripts:?} has an index that no operand has")));
        }
    }
    Ok(Parsed { inputs, output, sizes })
}

type Set = BTreeSet<Label>;

/// A step of a path: which operands, what is left, and what it costs.
struct Step {
    positions: Vec<usize>,
    left: Set,
    cost: f64,
    scaling: usize,
}

impl Parsed {
    fn size(&self, labels: &Set) -> f64 {
        labels.iter().map(|label| self.sizes[label] as f64).product()
    }

    /// Multiplications and additions of contracting `terms` operands over `labels`.
    fn flops(&self, labels: &Set, summed: bool, terms: usize) -> f64 {
        let factor = terms.saturating_sub(1).max(1) + summed as usize;
        self.size(labels) * factor as f64
    }

    /// Contracting these of the operands, when the others remain.
    fn step(&self, operands: &[Set], positions: &[usize], output: &Set) -> Step {
        let mut remain = output.clone();
        let mut involved = Set::new();
        for (at, operand) in operands.iter().enumerate() {
            if positions.contains(&at) { &mut involved } else { &mut remain }.extend(operand);
        }
        let left: Set = involved.intersection(&remain).copied().collect();
        let summed = left.len() < involved.len();
        let cost = self.flops(&involved, summed, positions.len());
        Step { positions: positions.to_vec(), left, cost, scaling: involved.len() }
    }

    fn path(&self) -> (Vec<Step>, Step) {
        let output: Set = self.output.iter().copied().collect();
        let mut operands: Vec<Set> =
            self.inputs.iter().map(|labels| labels.iter().copied().collect()).collect();
        let everything: Vec<usize> = (0..operands.len()).collect();
        let naive = self.step(&operands, &everything, &output);
        if operands.len() <= 2 {
            return (vec![self.step(&operands, &everything, &output)], naive);
        }
        let mut path = Vec::new();
        while operands.len() > 1 {
            let mut best: Option<(f64, f64, Step)> = None;
            for outer in [false, true] {
                for i in 0..operands.len() {
                    for j in i + 1..operands.len() {
                        if !outer && operands[i].is_disjoint(&operands[j]) {
                            continue;
                        }
                        let step = self.step(&operands, &[i, j], &output);
                        let removed =
                            self.size(&operands[i]) + self.size(&operands[j]) - self.size(&step.left);
                        let better = best.as_ref().is_none_or(|(most, cost, _)| {
                            removed > *most || (removed == *most && step.cost < *cost)
                        });
                        if better {
                            best = Some((removed, step.cost, step));
                        }
                    }
                }
                // Outer products only if nothing shares an index.
                if best.is_some() {
                    break;
                }
            }
            let (_, _, step) = best.expect("two operands make a pair");
            for &at in step.positions.iter().rev() {
                operands.remove(at);
            }
            operands.push(step.left.clone());
            path.push(step);
        }
        let cost: f64 = path.iter().map(|step| step.cost).sum();
        if cost > naive.cost {
            // In one go, which is pair after pair in the given order.
            let mut operands: Vec<Set> =
                self.inputs.iter().map(|labels| labels.iter().copied().collect()).collect();
            path.clear();
            while operands.len() > 1 {
                let step = self.step(&operands, &[0, 1], &output);
                operands.drain(..2);
                operands.push(step.left.clone());
                path.push(step);
            }
        }
        (path, naive)
    }
}

/// The order in which [`einsum`] contracts: per step the positions of its operands, the result
/// going to the end of the list; and a description with costs.
pub fn einsum_path(subscripts: &str, operands: &[Array]) -> Result<(Vec<Vec<usize>>, String)> {
    let shapes: Vec<&[usize]> = operands.iter().map(Array::shape).collect();
    let parsed = parse(subscripts, &shapes)?;
    let (path, naive) = parsed.path();
    let cost: f64 = path.iter().map(|step| step.cost).sum();
    let scaling = path.iter().map(|step| step.scaling).max().unwrap_or(0);
    let text: String = subscripts.chars().filter(|c| !c.is_whitespace()).collect();
    let info = format!(
        "  Complete contraction:  {text}\n         Naive scaling:  {}\n     Optimized scaling:  {scaling}\n      \
         Naive FLOP count:  {}\n  Optimized FLOP count:  {cost}\n",
        naive.scaling, naive.cost
    );
    Ok((path.into_iter().map(|step| step.positions).collect(), info))
}

/// The sum over products of operands that `subscripts` names: `"ij,jk->ik"`.
///
/// Letters are indices; those missing on the right are summed, equal ones within an operand take its
/// diagonal, `...` stands for the remaining dimensions, which broadcast. Without `->` the result has
/// the letters that occur once.
pub fn einsum(subscripts: &str, operands: &[Array]) -> Result<Array> {
    let shapes: Vec<&[usize]> = operands.iter().map(Array::shape).collect();
    let parsed = parse(subscripts, &shapes)?;
    let mut terms: Vec<Term> = parsed
        .inputs
        .iter()
        .zip(operands)
        .map(|(labels, array)| Term::new(labels.clone(), array.clone())?.without_ones(&parsed))
        .collect::<Result<_>>()?;
    let (path, _) = parsed.path();
    for step in &path {
        let mut taken: Vec<Term> = step.positions.iter().rev().map(|&at| terms.remove(at)).collect();
        let mut result = taken.pop().expect("a step has operands");
        while let Some(next) = taken.pop() {
            let keep: Set = terms
                .iter()
                .chain(&taken)
                .flat_map(|term| term.labels.iter().copied())
                .chain(parsed.output.iter().copied())
                .collect();
            result = contract(&result, &next, &keep)?;
        }
        terms.push(result);
    }
    let result = terms.pop().ok_or_else(|| bad("needs an operand"))?;
    let keep: Set = parsed.output.iter().copied().collect();
    let result = result.summed(&keep)?;
    // Indices of size one that were dropped come back.
    let mut array = result.array;
    let mut labels = result.labels;
    for &label in &parsed.output {
        if !labels.contains(&label) {
            array = array.expand_dims(&[-1])?;
            labels.push(label);
        }
    }
    let order: Vec<i32> = parsed
        .output
        .iter()
        .map(|label| labels.iter().position(|other| other == label).expect("put there above") as i32)
        .collect();
    let array = array.transpose_or_same(&order)?;
    let shape: Vec<usize> = parsed.output.iter().map(|label| parsed.sizes[label]).collect();
    array.broadcast_to(&shape)
}

/// An operand with the name of each dimension.
struct Term {
    labels: Labels,
    array: Array,
}

impl Term {
    /// Takes the diagonal where an index repeats.
    fn new(mut labels: Labels, mut array: Array) -> Result<Term> {
        while let Some((first, second)) = repeated(&labels) {
            // The two axes last, merged, every (n + 1)th element.
            let n = array.shape()[first];
            if array.shape()[second] != n {
                return Err(bad(format!("a repeated index has sizes {n} and {}", array.shape()[second])));
            }
            let mut order: Vec<i32> = (0..array.rank())
                .filter(|&axis| axis != first && axis != second)
                .map(|axis| axis as i32)
                .collect();
            order.extend([first as i32, second as i32]);
            let moved = array.transpose(&order)?;
            let mut shape: Vec<i64> =
                moved.shape()[..moved.rank() - 2].iter().map(|&size| size as i64).collect();
            shape.push((n * n) as i64);
            let flat = moved.reshape(&shape)?;
            let last = flat.rank() - 1;
            let (mut count, mut step) = (flat.shape().to_vec(), vec![1; flat.rank()]);
            (count[last], step[last]) = (n, n as isize + 1);
            array = flat.window(&vec![0; flat.rank()], &count, &step)?;
            let label = labels[first];
            labels.remove(second);
            labels.remove(first);
            labels.push(label);
        }
        Ok(Term { labels, array })
    }

    /// Without dimensions of size one: they broadcast anyway.
    fn without_ones(self, parsed: &Parsed) -> Result<Term> {
        let ones: Vec<i32> = (0..self.array.rank())
            .filter(|&axis| self.array.shape()[axis] == 1)
            .map(|axis| axis as i32)
            .collect();
        let _ = parsed;
        if ones.is_empty() {
            return Ok(self);
        }
        let labels = (0..self.labels.len())
            .filter(|&axis| !ones.contains(&(axis as i32)))
            .map(|axis| self.labels[axis])
            .collect();
        Ok(Term { labels, array: self.array.squeeze(&ones)? })
    }

    /// Summed over what nobody needs.
    fn summed(self, keep: &Set) -> Result<Term> {
        let axes: Vec<i32> = (0..self.labels.len())
            .filter(|&axis| !keep.contains(&self.labels[axis]))
            .map(|axis| axis as i32)
            .collect();
        if axes.is_empty() {
            return Ok(self);
        }
        let labels = self.labels.iter().copied().filter(|label| keep.contains(label)).collect();
        Ok(Term { labels, array: self.array.sum(&axes, false)? })
    }

    /// The dimensions in groups, each merged into one.
    fn grouped(&self, groups: &[&[Label]], sizes: &[i64]) -> Result<Array> {
        let place = |label: &Label| {
            self.labels.iter().position(|other| other == label).expect("groups name its labels") as i32
        };
        let order: Vec<i32> = groups.iter().flat_map(|group| group.iter().map(place)).collect();
        self.array.transpose_or_same(&order)?.reshape(sizes)
    }

    fn sizes(&self, labels: &[Label]) -> Vec<i64> {
        let size = |label: &Label| {
            let at = self.labels.iter().position(|other| other == label).expect("its own label");
            self.array.shape()[at] as i64
        };
        labels.iter().map(size).collect()
    }
}

fn repeated(labels: &[Label]) -> Option<(usize, usize)> {
    (0..labels.len()).find_map(|second| {
        labels[..second].iter().position(|&label| label == labels[second]).map(|first| (first, second))
    })
}

/// The product of two operands, summed over what is not in `keep`.
fn contract(a: &Term, b: &Term, keep: &Set) -> Result<Term> {
    let alone = |term: &Term, other: &Term| {
        let mut keep = keep.clone();
        keep.extend(&other.labels);
        Term { labels: term.labels.clone(), array: term.array.clone() }.summed(&keep)
    };
    let (a, b) = (alone(a, b)?, alone(b, a)?);
    let in_both = |label: &Label| a.labels.contains(label) && b.labels.contains(label);
    let batch: Labels = a.labels.iter().copied().filter(|l| in_both(l) && keep.contains(l)).collect();
    let inner: Labels = a.labels.iter().copied().filter(|l| in_both(l) && !keep.contains(l)).collect();
    let rows: Labels = a.labels.iter().copied().filter(|l| !b.labels.contains(l)).collect();
    let columns: Labels = b.labels.iter().copied().filter(|l| !a.labels.contains(l)).collect();
    let labels: Labels = batch.iter().chain(&rows).chain(&columns).copied().collect();
    let mut shape = a.sizes(&batch);
    shape.extend(a.sizes(&rows));
    shape.extend(b.sizes(&columns));
    let product = |list: Vec<i64>| list.iter().product::<i64>();
    let (e, m, n) = (product(a.sizes(&batch)), product(a.sizes(&rows)), product(b.sizes(&columns)));
    let array = if inner.is_empty() {
        let left = a.grouped(&[&batch, &rows], &[e, m, 1])?;
        left.multiply(b.grouped(&[&batch, &columns], &[e, 1, n])?)?
    } else {
        let k = product(a.sizes(&inner));
        let left = a.grouped(&[&batch, &rows, &inner], &[e, m, k])?;
        left.matmul(&b.grouped(&[&batch, &inner, &columns], &[e, k, n])?)?
    };
    Ok(Term { labels, array: array.reshape(&shape)? })
}
