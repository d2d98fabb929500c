//! Dropout (Srivastava et al. 2014) of values and of whole channels. Nothing happens unless the
//! context is one for training.

use mica_array::{Array, Result};

use super::invalid;
use crate::{Context, Layer, module};

fn checked(rate: f32) -> Result<f32> {
    if (0.0..1.0).contains(&rate) {
        return Ok(rate);
    }
    Err(invalid("Dropout", format!("expected a probability of at least 0 and less than 1, got {rate}")))
}

macro_rules! dropouts {
    ($($(#[$doc:meta])* $name:ident: ranks $ranks:expr, shared $shared:expr;)*) => { $(
        $(#[$doc])*
        #[derive(Debug, Clone, Copy)]
        pub struct $name {
            rate: f32,
        }

        module!($name {});

        impl $name {
            /// Zeroes with probability `rate`; MLX's default is 0.5.
            ///
            /// # Errors
            /// If the rate is not in [0, 1).
            pub fn new(rate: f32) -> Result<$name> {
                Ok($name { rate: checked(rate)? })
            }
        }

        impl Layer for $name {
            fn forward(&self, x: &Array, context: &Context) -> Result<Array> {
                let ranks: &[usize] = &$ranks;
                if !ranks.is_empty() && !ranks.contains(&x.rank()) {
                    let message = format!("expected {ranks:?} dimensions, got {:?}", x.shape());
                    return Err(invalid(stringify!($name), message));
                }
                let mut shape = x.shape().to_vec();
                let end = shape.len().saturating_sub(1);
                shape[end - $shared..end].fill(1);
                context.dropout_shaped(x, self.rate, &shape)
            }
        }
    )* };
}

dropouts! {
    /// Zeroes single values and scales the others up.
    Dropout: ranks [], shared 0;
    /// Zeroes whole channels of [.., height, width, channels].
    Dropout2d: ranks [3, 4], shared 2;
    /// Zeroes whole channels of [.., depth, height, width, channels].
    Dropout3d: ranks [4, 5], shared 3;
}
