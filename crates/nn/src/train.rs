//! Gradients by parameter name.

use mica_array::transforms::{self, Grads, value_and_grad_many};
use mica_array::{Array, Error, Result};

use crate::{Module, parameters, set_parameters, trainable_parameters};

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

/// The value of `f`, and its gradients by the name of each parameter that learns.
///
/// ```
/// use mica_array::{Array, Dtype};
/// use mica_nn::{Context, Keys, Layer, Linear, losses::{Reduction, mse_loss}, value_and_grad};
///
/// let mut model = Linear::new(3, 1, true, &mut Keys::new(0)?)?;
/// let (x, y) = (Array::ones(&[4, 3], Dtype::F32), Array::zeros(&[4, 1], Dtype::F32));
/// let (loss, grads) = value_and_grad(&mut model, |model| {
///     mse_loss(&model.forward(&x, &Context::default())?, &y, Reduction::Mean)
/// })?;
/// assert!(loss.item::<f32>()? > 0.0);
/// assert_eq!(grads.iter().map(|(name, _)| name.as_str()).collect::<Vec<_>>(), ["weight", "bias"]);
/// # Ok::<(), mica_array::Error>(())
/// ```
pub fn value_and_grad<M: Module + ?Sized>(
    module: &mut M,
    f: impl FnOnce(&M) -> Result<Array>,
) -> Result<(Array, Vec<(String, Array)>)> {
    let names: Vec<String> = trainable_parameters(module).into_iter().map(|(name, _)| name).collect();
    let Grads { mut value, grads } = gradients(module, &names, |module| Ok(vec![f(module)?]))?;
    Ok((value.remove(0), names.into_iter().zip(grads).collect()))
}

/// `f` of an array, such that nothing in it is kept for the gradient: the backward pass computes
/// it again. Parameters that `f` reads get their gradients all the same.
pub fn checkpoint(f: impl FnOnce(&Array) -> Result<Array>, x: &Array) -> Result<Array> {
    let outputs = transforms::checkpoint(|inputs| Ok(vec![f(&inputs[0])?]), std::slice::from_ref(x))?;
    Ok(outputs.into_iter().next().expect("one output was given"))
}
