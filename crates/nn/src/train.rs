//! Gradients by parameter name.

use mica_array::transforms::{Grads, value_and_grad_many};
use mica_array::{Array, Error, Result};

use crate::{Module, parameters, set_parameters};

/// Runs `f` on the module with some parameters replaced, and puts the old ones back.
pub fn with_parameters<M: Module + ?Sized, R>(
    module: &mut M,
    values: &[(String, Array)],
    f: impl FnOnce(&M) -> Result<R>,
) -> Result<R> {
    let names: std::collections::HashSet<&str> = values.iter().map(|(name, _)| name.as_str()).collect();
    let before: Vec<(String, Array)> =
        parameters(module).into_iter().filter(|(name, _)| names.contains(name.as_str())).collect();
    set_parameters(module, values)?;
    let result = f(module);
    set_parameters(module, &before)?;
    result
}

/// The outputs of `f`, whose first is the loss, and the gradients of the named parameters.
pub fn gradients<M: Module + ?Sized>(
    module: &mut M,
    names: &[String],
    f: impl FnOnce(&M) -> Result<Vec<Array>>,
) -> Result<Grads<Vec<Array>>> {
    let all: std::collections::HashMap<String, Array> = parameters(module).into_iter().collect();
    let primals = names
        .iter()
        .map(|name| {
            all.get(name).cloned().ok_or_else(|| Error::Invalid {
                op: "gradients",
                message: format!("there is no parameter {name}").into(),
            })
        })
        .collect::<Result<Vec<_>>>()?;
    drop(all);
    value_and_grad_many(
        |tracers| {
            let values: Vec<(String, Array)> = names.iter().cloned().zip(tracers.iter().cloned()).collect();
            with_parameters(module, &values, f)
        },
        &primals,
    )
}
