//! One graph for inputs of many sizes: shapes written as expressions in the sizes of the inputs.
//!
//! The function is traced on several sets of sizes. Its graph must be the same each time but for
//! shapes, and every dimension must be one expression that gives all that were seen. A size of a
//! call is then put into the text, and the graph read as usual, with every check.

use std::collections::BTreeMap;

use serde_json::{Map, Value as Json, json};

use super::decode::{bad, list};
use super::{MOST_ELEMENTS, encode, spec_to_json, traced};
use crate::transforms::TracedGraph;
use crate::{Array, Error, Result};

/// Sizes by their name.
pub(super) type Sizes = BTreeMap<String, usize>;

/// Sizes that no program has by itself, and whose products differ: primes.
const PROBES: [usize; 36] = [
    53, 59, 61, 67, 71, 73, 79, 83, 89, 97, 101, 103, 107, 109, 113, 127, 131, 137, 139, 149, 151, 157, 163,
    167, 173, 179, 181, 191, 193, 197, 199, 211, 223, 227, 229, 233,
];
/// Sets of sizes that expressions are found from.
const SETS: usize = 3;
/// A function may have so many sizes.
const MOST_SIZES: usize = PROBES.len() / SETS;

fn no_general_form(what: String) -> Error {
    Error::invalid("export_function", format!("a graph for all sizes can't be made: {what}"))
}

/// `f` for all sizes that it works with; `graph` is its trace on `inputs`.
pub(super) fn generalized(
    f: &impl Fn(&[Array]) -> Result<Vec<Array>>,
    inputs: &[Array],
    graph: &TracedGraph,
    constants: &mut encode::Constants,
) -> Result<Json> {
    let mut distinct: Vec<usize> =
        inputs.iter().flat_map(|input| input.shape()).copied().filter(|&size| size > 1).collect();
    distinct.sort_unstable();
    distinct.dedup();
    if distinct.len() > MOST_SIZES {
        return Err(no_general_form(format!("{} sizes differ, {MOST_SIZES} may", distinct.len())));
    }
    let with = |new: &BTreeMap<usize, usize>| -> Vec<Array> {
        let size = |size: &usize| new.get(size).copied().unwrap_or(*size);
        let shape = |input: &Array| input.shape().iter().map(size).collect::<Vec<usize>>();
        inputs.iter().map(|input| Array::zeros(&shape(input), input.dtype())).collect()
    };
    // What stays is what the function does not work without.
    let varies = |&size: &usize| traced(f, &with(&[(size, PROBES[0])].into())).is_ok();
    let varying: Vec<usize> = distinct.into_iter().filter(varies).collect();
    let mut sets: Vec<Vec<usize>> = Vec::new();
    let mut functions = Vec::new();
    for set in 0..SETS {
        let values = PROBES[set * MOST_SIZES..][..varying.len()].to_vec();
        let graph = traced(f, &with(&varying.iter().copied().zip(values.iter().copied()).collect()))?;
        let mut own = constants.clone();
        functions.push(encode::encode(&graph, &mut own)?);
        if set == 0 {
            *constants = own;
        } else if !same_constants(constants, &own)? {
            return Err(no_general_form("an array that it captured depends on a size".to_string()));
        }
        sets.push(values);
    }
    let mut general = merged(&functions, &sets)?;
    let recorded: Sizes = varying.iter().enumerate().map(|(at, &size)| (format!("s{at}"), size)).collect();
    general["sizes"] = json!(recorded);
    // On the sizes that the caller knows, it must be what was asked for.
    let filled = filled(&general, &recorded)?;
    let check = super::decode::decode(&filled, constants.arrays())?;
    let (got, expected) = (check.output_specs(), graph.output_specs());
    if got != expected {
        let list = |specs: &[_]| specs.iter().map(spec_to_json).collect::<Vec<Json>>();
        return Err(no_general_form(format!("it gives {:?}, not {:?}", list(&got), list(&expected))));
    }
    Ok(general)
}

/// Whether two lists of constants have the same values.
fn same_constants(a: &encode::Constants, b: &encode::Constants) -> Result<bool> {
    if a.list != b.list || a.tensors.len() != b.tensors.len() {
        return Ok(false);
    }
    for ((_, a), (_, b)) in a.tensors.iter().zip(&b.tensors) {
        let same = (a.id() == b.id() && a.output() == b.output())
            || (a.spec() == b.spec() && a.with_bytes(|a| b.with_bytes(|b| a == b))??);
        if !same {
            return Ok(false);
        }
    }
    Ok(true)
}

/// One text from those of all sets; shapes become expressions, all else must be the same.
fn merged(functions: &[Json], sets: &[Vec<usize>]) -> Result<Json> {
    let specs = |specs: Vec<&Json>, what: &str| -> Result<Json> {
        let count = specs[0].as_array().map_or(0, Vec::len);
        let one = |index: usize| -> Result<Json> {
            let each: Vec<&Json> = specs.iter().map(|list| &list[index]).collect();
            let ranks: Vec<usize> =
                each.iter().map(|spec| spec["shape"].as_array().map_or(0, Vec::len)).collect();
            if each.iter().any(|spec| spec["dtype"] != each[0]["dtype"])
                || ranks.iter().any(|&r| r != ranks[0])
            {
                return Err(no_general_form(format!("dtype or rank of {what} depends on a size")));
            }
            let dims = (0..ranks[0]).map(|axis| {
                let seen: Vec<usize> =
                    each.iter().map(|spec| spec["shape"][axis].as_u64().unwrap_or(0) as usize).collect();
                expression(&seen, sets).ok_or_else(|| {
                    no_general_form(format!(
                        "how dimension {axis} of {what} depends on the sizes is not clear"
                    ))
                })
            });
            Ok(json!({ "dtype": each[0]["dtype"], "shape": dims.collect::<Result<Vec<Json>>>()? }))
        };
        Ok(Json::Array((0..count).map(one).collect::<Result<_>>()?))
    };
    let part = |key: &str| -> Vec<&Json> { functions.iter().map(|function| &function[key]).collect() };
    let lengths: Vec<usize> =
        part("nodes").iter().map(|nodes| nodes.as_array().map_or(0, Vec::len)).collect();
    let outputs = part("outputs");
    if lengths.iter().any(|&length| length != lengths[0]) || outputs.iter().any(|o| *o != outputs[0]) {
        return Err(no_general_form("it does other things for other sizes".to_string()));
    }
    let nodes = (0..lengths[0]).map(|index| -> Result<Json> {
        let each: Vec<&Json> = functions.iter().map(|function| &function["nodes"][index]).collect();
        let without = |node: &Json| {
            let mut rest = node.as_object().cloned().unwrap_or_default();
            rest.remove("outputs");
            rest
        };
        let mut node: Map<String, Json> = without(each[0]);
        let name = format!("node {index}, {}", node["op"]);
        if each.iter().any(|other| without(other) != node) {
            return Err(no_general_form(format!("what {name} does depends on a size")));
        }
        let outputs: Vec<&Json> = each.iter().map(|node| &node["outputs"]).collect();
        if outputs.iter().any(|list| list.as_array().map(Vec::len) != outputs[0].as_array().map(Vec::len)) {
            return Err(no_general_form(format!("{name} has more outputs for other sizes")));
        }
        node.insert("outputs".into(), specs(outputs, &name)?);
        Ok(Json::Object(node))
    });
    let nodes = nodes.collect::<Result<Vec<Json>>>()?;
    Ok(json!({ "inputs": specs(part("inputs"), "an input")?, "nodes": nodes, "outputs": outputs[0] }))
}

/// A number, `k*s0`, `k*s0*s1` or `s0+k` that is all that was seen.
fn expression(seen: &[usize], sets: &[Vec<usize>]) -> Option<Json> {
    if seen.iter().all(|size| *size == seen[0]) {
        return Some(json!(seen[0]));
    }
    let sizes = sets[0].len();
    // The factor that is missing from a product, if it is the same in all sets.
    let factor = |product: &dyn Fn(&[usize]) -> usize| {
        let quotient = |(size, set): (&usize, &Vec<usize>)| {
            let product = product(set);
            size.is_multiple_of(product).then(|| size / product)
        };
        let all: Option<Vec<usize>> = seen.iter().zip(sets).map(quotient).collect();
        all.filter(|all| all.iter().all(|one| *one == all[0])).map(|all| all[0])
    };
    let times = |factor: usize, name: String| if factor == 1 { name } else { format!("{factor}*{name}") };
    for i in 0..sizes {
        if let Some(factor) = factor(&|set| set[i]) {
            return Some(times(factor, format!("s{i}")).into());
        }
    }
    for i in 0..sizes {
        for j in i..sizes {
            if let Some(factor) = factor(&|set| set[i] * set[j]) {
                return Some(times(factor, format!("s{i}*s{j}")).into());
            }
        }
    }
    for i in 0..sizes {
        let rest: Vec<i64> = seen.iter().zip(sets).map(|(size, set)| *size as i64 - set[i] as i64).collect();
        if rest.iter().all(|one| *one == rest[0]) {
            return Some(format!("s{i}{:+}", rest[0]).into());
        }
    }
    None
}

/// The value of an expression.
fn value(text: &str, sizes: &Sizes) -> Result<usize> {
    let unknown = || bad(format!("{text:?} is no size: a product of numbers and {:?}", sizes.keys()));
    let (product, plus) = match text.find(['+', '-']) {
        Some(at) => (&text[..at], text[at..].parse::<i64>().map_err(|_| unknown())?),
        None => (text, 0),
    };
    let mut total = 1usize;
    for factor in product.split('*') {
        let factor = match sizes.get(factor) {
            Some(size) => *size,
            None => factor.parse().map_err(|_| unknown())?,
        };
        total = total.checked_mul(factor).ok_or_else(unknown)?;
    }
    let total = i64::try_from(total).ok().and_then(|total| total.checked_add(plus));
    total
        .and_then(|total| usize::try_from(total).ok())
        .filter(|total| *total <= MOST_ELEMENTS)
        .ok_or_else(|| bad(format!("{text:?} is out of range for {sizes:?}")))
}

/// The text of a function with these sizes in it.
pub(super) fn filled(json: &Json, sizes: &Sizes) -> Result<Json> {
    let mut json = json.clone();
    let fill = |specs: Option<&mut Json>| -> Result<()> {
        for spec in specs.and_then(Json::as_array_mut).into_iter().flatten() {
            for size in spec.get_mut("shape").and_then(Json::as_array_mut).into_iter().flatten() {
                if let Some(text) = size.as_str() {
                    *size = json!(value(text, sizes)?);
                }
            }
        }
        Ok(())
    };
    fill(json.get_mut("inputs"))?;
    for node in json.get_mut("nodes").and_then(Json::as_array_mut).into_iter().flatten() {
        fill(node.get_mut("outputs"))?;
    }
    Ok(json)
}

/// The sizes that a function was traced on.
pub(super) fn recorded(json: &Json) -> Result<Sizes> {
    let object = json.as_object().filter(|object| object.len() <= MOST_SIZES);
    let object = object.ok_or_else(|| bad(format!("\"sizes\" are no map of {MOST_SIZES} sizes at most")))?;
    let one = |(name, size): (&String, &Json)| {
        let size = size.as_u64().and_then(|size| usize::try_from(size).ok());
        let size = size.filter(|&size| size <= MOST_ELEMENTS);
        Ok((name.clone(), size.ok_or_else(|| bad(format!("{name:?} is no size in range")))?))
    };
    object.iter().map(one).collect()
}

/// The sizes of a call's inputs, of which one stands for another wherever they have a name.
pub(super) fn of_inputs(json: &Json, inputs: &[Array]) -> Result<Sizes> {
    let mut sizes = Sizes::new();
    for (index, (spec, input)) in list(json, "inputs")?.iter().zip(inputs).enumerate() {
        for (name, &size) in list(spec, "shape")?.iter().zip(input.shape()) {
            let Some(name) = name.as_str() else { continue };
            let known = *sizes.entry(name.to_string()).or_insert(size);
            if known != size {
                return Err(Error::invalid(
                    "import_function",
                    format!(
                        "input {index} has {size} where {known} was given before: these sizes are one, {name}"
                    ),
                ));
            }
        }
    }
    Ok(sizes)
}
