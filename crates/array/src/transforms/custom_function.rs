//! Functions with rules of one's own for gradients, tangents and batches.

use std::any::TypeId;
use std::fmt;
use std::sync::Arc;

use super::jvp::{forward_from, trace_from};
use super::{TracedGraph, backward};
use crate::node::Inputs;
use crate::op::Op;
use crate::ops::custom::{Batched, CustomOp};
use crate::{Array, Error, Result};

type Function = dyn Fn(&[Array]) -> Result<Vec<Array>> + Send + Sync;
type VjpRule = dyn Fn(&[Array], &[Array], &[Array]) -> Result<Vec<Array>> + Send + Sync;
type JvpRule = dyn Fn(&[Array], &[Array]) -> Result<Vec<Array>> + Send + Sync;
type VmapRule = dyn Fn(&[Array], &[Option<usize>]) -> Result<Batched> + Send + Sync;

#[derive(Clone, Default)]
struct Rules {
    vjp: Option<Rule<VjpRule>>,
    jvp: Option<Rule<JvpRule>>,
    vmap: Option<Rule<VmapRule>>,
}

struct Rule<F: ?Sized> {
    f: Arc<F>,
    /// The closure's type, if it captured nothing: then that is all there is to it.
    whole: Option<TypeId>,
}

impl<F: ?Sized> Rule<F> {
    fn new<R: 'static>(f: Arc<F>) -> Rule<F> {
        Rule { f, whole: (size_of::<R>() == 0).then(TypeId::of::<R>) }
    }

    fn is(&self, other: &Rule<F>) -> bool {
        Arc::ptr_eq(&self.f, &other.f) || (self.whole.is_some() && self.whole == other.whole)
    }
}

impl<F: ?Sized> Clone for Rule<F> {
    fn clone(&self) -> Self {
        Rule { f: self.f.clone(), whole: self.whole }
    }
}

/// A function that transformations treat as its author says: see [`custom_function`].
#[derive(Clone)]
pub struct CustomFunction {
    name: &'static str,
    f: Arc<Function>,
    rules: Rules,
}

/// A function whose gradient, tangents or batched form are given rather than derived, as MLX's
/// `custom_function`. What no rule is given for is derived from `f`.
///
/// Arrays that `f` captures count as inputs: derivatives and batches reach them, by what `f` does
/// with them (the rules speak of the arguments alone). Rules may use nothing but what they are
/// given, and constants.
///
/// ```
/// use mica_array::{Array, transforms::{custom_function, grad}};
///
/// // The identity, whose gradient is cut off at 1.
/// let clipped = custom_function(|x| Ok(x.to_vec())).with_vjp(|_primals, cotangents, _outputs| {
///     Ok(vec![cotangents[0].minimum(1.0)?])
/// });
/// let x = Array::from_slice(&[1.0f32, 2.0], &[2])?;
/// let grads = grad(|x| clipped.call(x)?[0].square()?.sum(&[], false), &[x])?;
/// assert_eq!(grads[0].to_vec::<f32>()?, [1.0, 1.0]);
/// # Ok::<(), mica_array::Error>(())
/// ```
pub fn custom_function(f: impl Fn(&[Array]) -> Result<Vec<Array>> + Send + Sync + 'static) -> CustomFunction {
    CustomFunction { name: "custom_function", f: Arc::new(f), rules: Rules::default() }
}

impl CustomFunction {
    /// The name in messages, profiles and printed graphs.
    pub fn named(self, name: &'static str) -> Self {
        CustomFunction { name, ..self }
    }

    /// The gradients: `rule(primals, cotangents, outputs)` gives one per primal, of its shape. An
    /// output that no gradient reached has zeros for its cotangent.
    pub fn with_vjp<R>(mut self, rule: R) -> Self
    where
        R: Fn(&[Array], &[Array], &[Array]) -> Result<Vec<Array>> + Send + Sync + 'static,
    {
        self.rules.vjp = Some(Rule::new::<R>(Arc::new(rule)));
        self
    }

    /// The tangents: `rule(primals, tangents)` gives one per output, of its shape. A primal that
    /// does not move has zeros for its tangent.
    pub fn with_jvp<R>(mut self, rule: R) -> Self
    where
        R: Fn(&[Array], &[Array]) -> Result<Vec<Array>> + Send + Sync + 'static,
    {
        self.rules.jvp = Some(Rule::new::<R>(Arc::new(rule)));
        self
    }

    /// The batched form: `rule(inputs, axes)` gets inputs with a batch at these axes (`None`:
    /// shared), and gives the outputs with the axes of theirs. It is not used where a captured
    /// array has a batch, since it could not tell.
    pub fn with_vmap<R>(mut self, rule: R) -> Self
    where
        R: Fn(&[Array], &[Option<usize>]) -> Result<Batched> + Send + Sync + 'static,
    {
        self.rules.vmap = Some(Rule::new::<R>(Arc::new(rule)));
        self
    }

    /// The outputs of the function, as lazy arrays.
    ///
    /// # Errors
    /// Those of `f`.
    pub fn call(&self, inputs: &[Array]) -> Result<Vec<Array>> {
        let mut graph = TracedGraph::trace(|traced| (self.f)(traced), inputs)?;
        let specs = graph.output_specs();
        let count = specs.len();
        if count == 0 {
            return Ok(Vec::new());
        }
        let captured = std::mem::take(&mut graph.captured);
        let all: Inputs = inputs.iter().cloned().chain(captured).collect();
        let custom = CallOfCustom { name: self.name, graph, inputs: inputs.len(), rules: self.rules.clone() };
        let first = Array::lazy_many(Op::Custom(Arc::new(custom)), all, specs);
        Ok((0..count).map(|output| first.sibling(output)).collect())
    }
}

impl fmt::Debug for CustomFunction {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "CustomFunction({})", self.name)
    }
}

/// One call. The arrays that the function captured come after its inputs.
#[derive(Clone)]
pub(super) struct CallOfCustom {
    name: &'static str,
    pub(super) graph: TracedGraph,
    pub(super) inputs: usize,
    rules: Rules,
}

impl fmt::Debug for CallOfCustom {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}({} ops)", self.name, self.graph.nodes.len())
    }
}

impl CallOfCustom {
    /// Whether the two have the same rules, as far as that can be known.
    pub(super) fn has_rules_of(&self, other: &CallOfCustom) -> bool {
        fn same<F: ?Sized>(a: &Option<Rule<F>>, b: &Option<Rule<F>>) -> bool {
            match (a, b) {
                (Some(a), Some(b)) => a.is(b),
                (None, None) => true,
                _ => false,
            }
        }
        let (a, b) = (&self.rules, &other.rules);
        self.name == other.name && same(&a.vjp, &b.vjp) && same(&a.jvp, &b.jvp) && same(&a.vmap, &b.vmap)
    }

    fn check(&self, rule: &str, got: &[Array], expected: usize) -> Result<()> {
        if got.len() == expected {
            return Ok(());
        }
        let message = format!("the {rule} rule gave {} arrays, {expected} were expected", got.len());
        Err(Error::invalid(self.name, message))
    }

    /// Gradients of the inputs from `from` on, by what the function does.
    fn derived_vjp(
        &self,
        inputs: &[Array],
        from: usize,
        cotangents: &[Option<Array>],
    ) -> Result<Vec<Option<Array>>> {
        let is_target = |index: usize| index >= from && inputs[index].dtype().is_inexact();
        let traced = trace_from(inputs, is_target);
        let targets: Vec<Array> =
            (0..traced.len()).filter(|&index| is_target(index)).map(|index| traced[index].clone()).collect();
        if targets.is_empty() {
            return Ok(vec![None; inputs.len()]);
        }
        let outputs = self.expand(&traced)?;
        let seeds = outputs.into_iter().zip(cotangents);
        let seeds = seeds.filter_map(|(output, cotangent)| Some((output, cotangent.clone()?))).collect();
        let mut grads = backward(seeds, &targets)?.into_iter();
        Ok((0..traced.len()).map(|index| if is_target(index) { grads.next() } else { None }).collect())
    }

    /// Tangents of the outputs from those of the inputs from `from` on, by what the function does.
    fn derived_jvp(
        &self,
        inputs: &[Array],
        from: usize,
        tangents: &[Option<Array>],
    ) -> Result<Vec<Option<Array>>> {
        let moves = |index: usize| index >= from && tangents[index].is_some();
        let traced = trace_from(inputs, moves);
        let outputs = self.expand(&traced)?;
        let seeds =
            (from..inputs.len()).filter_map(|index| Some((traced[index].clone(), tangents[index].clone()?)));
        forward_from(seeds.collect(), &outputs)
    }
}

impl CustomOp for CallOfCustom {
    fn name(&self) -> &'static str {
        self.name
    }

    fn expand(&self, inputs: &[Array]) -> Result<Vec<Array>> {
        Ok(self.graph.build(&inputs[..self.inputs], &inputs[self.inputs..]))
    }

    fn vjp(
        &self,
        inputs: &[Array],
        outputs: &[Array],
        cotangents: &[Option<Array>],
    ) -> Result<Vec<Option<Array>>> {
        let Some(rule) = &self.rules.vjp else { return self.derived_vjp(inputs, 0, cotangents) };
        let given: Vec<Array> = cotangents
            .iter()
            .zip(outputs)
            .map(|(cotangent, output)| cotangent.clone().unwrap_or_else(|| output.zeros_like()))
            .collect();
        let grads = (rule.f)(&inputs[..self.inputs], &given, outputs)?;
        self.check("vjp", &grads, self.inputs)?;
        let mut all = self.derived_vjp(inputs, self.inputs, cotangents)?;
        for (slot, grad) in all.iter_mut().zip(grads) {
            *slot = Some(grad);
        }
        Ok(all)
    }

    fn jvp(&self, inputs: &[Array], tangents: &[Option<Array>]) -> Result<Vec<Option<Array>>> {
        let Some(rule) = &self.rules.jvp else { return self.derived_jvp(inputs, 0, tangents) };
        let count = self.graph.outputs.len();
        let mut all = self.derived_jvp(inputs, self.inputs, tangents)?;
        if tangents[..self.inputs].iter().any(Option::is_some) {
            let zeros = |(tangent, input): (&Option<Array>, &Array)| {
                tangent.clone().unwrap_or_else(|| input.zeros_like())
            };
            let given: Vec<Array> = tangents.iter().zip(inputs).take(self.inputs).map(zeros).collect();
            let found = (rule.f)(&inputs[..self.inputs], &given)?;
            self.check("jvp", &found, count)?;
            for (slot, tangent) in all.iter_mut().zip(found) {
                *slot = Some(match slot.take() {
                    Some(captured) => captured.add(tangent)?,
                    None => tangent,
                });
            }
        }
        Ok(all)
    }

    fn vmap(&self, inputs: &[Array], axes: &[Option<usize>]) -> Result<Option<Batched>> {
        match &self.rules.vmap {
            Some(rule) if axes[self.inputs..].iter().all(Option::is_none) => {
                (rule.f)(&inputs[..self.inputs], &axes[..self.inputs]).map(Some)
            }
            _ => Ok(None),
        }
    }
}
