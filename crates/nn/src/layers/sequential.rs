//! Layers one after another.

use mica_array::{Array, Result};

use crate::{Context, Layer, module};

/// Calls its layers in order. Activations are layers too: [`Relu`](crate::Relu) and so on.
///
/// ```
/// use mica_array::{Array, Dtype};
/// use mica_nn::{Context, Keys, Layer, Linear, Relu, Sequential, parameters};
///
/// let keys = &mut Keys::new(0)?;
/// let model = Sequential::new(vec![
///     Box::new(Linear::new(4, 8, true, keys)?),
///     Box::new(Relu),
///     Box::new(Linear::new(8, 2, false, keys)?),
/// ]);
/// let y = model.forward(&Array::ones(&[3, 4], Dtype::F32), &Context::default())?;
/// assert_eq!(y.shape(), [3, 2]);
/// let names: Vec<String> = parameters(&model).into_iter().map(|(name, _)| name).collect();
/// assert_eq!(names, ["layers.0.weight", "layers.0.bias", "layers.2.weight"]);
/// # Ok::<(), mica_array::Error>(())
/// ```
#[derive(Debug)]
pub struct Sequential {
    /// The layers.
    pub layers: Vec<Box<dyn Layer>>,
}

module!(Sequential { layers });

impl Sequential {
    /// Of these layers.
    pub fn new(layers: Vec<Box<dyn Layer>>) -> Sequential {
        Sequential { layers }
    }
}

impl Layer for Sequential {
    fn forward(&self, x: &Array, context: &Context) -> Result<Array> {
        self.layers.iter().try_fold(x.clone(), |x, layer| layer.forward(&x, context))
    }
}
