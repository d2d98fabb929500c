//! Pooling over windows of the spatial axes: [batch, spatial.., channels].

use mica_array::{Array, Dtype, Result};

use super::invalid;
use crate::{Context, Layer, module};

/// Window, step and margin of a pooling layer, per spatial axis.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Windows<const D: usize> {
    kernel_size: [usize; D],
    stride: [usize; D],
    padding: [usize; D],
}

impl<const D: usize> Windows<D> {
    fn new(
        op: &'static str,
        kernel_size: [usize; D],
        stride: Option<[usize; D]>,
        padding: [usize; D],
    ) -> Result<Windows<D>> {
        let stride = stride.unwrap_or(kernel_size);
        if kernel_size.contains(&0) || stride.contains(&0) {
            let message = format!("kernel_size and stride must be positive, got {kernel_size:?}, {stride:?}");
            return Err(invalid(op, message));
        }
        Ok(Windows { kernel_size, stride, padding })
    }

    /// [batch, spatial.., channels] → [batch, windows.., places in the window.., channels]
    fn of(&self, op: &'static str, x: &Array, margin: f64) -> Result<Array> {
        if x.rank() != D + 2 {
            let message = format!("expected [batch, {D} spatial axes, channels], got {:?}", x.shape());
            return Err(invalid(op, message));
        }
        let mut x = self.padded(x, margin)?;
        for axis in 0..D {
            let (size, window, step) = (x.shape()[1 + 2 * axis], self.kernel_size[axis], self.stride[axis]);
            if size < window {
                let message = format!("a window of {window} does not fit in {size} places");
                return Err(invalid(op, message));
            }
            // After this axis comes that of its windows' places.
            let at = 1 + 2 * axis as i32;
            x = if window == step && size.is_multiple_of(window) {
                x.unflatten(at, &[-1, window as i64])?
            } else {
                let count = (size - window) / step + 1;
                let starts = Array::arange(0.0, (count * step) as f64, step as f64, Dtype::I32)?;
                let places = Array::arange(0.0, window as f64, 1.0, Dtype::I32)?;
                x.take(&starts.expand_dims(&[1])?.add(places)?, at)?
            };
        }
        let order: Vec<i32> = std::iter::once(0)
            .chain((0..D).map(|axis| 1 + 2 * axis as i32))
            .chain((0..D).map(|axis| 2 + 2 * axis as i32))
            .chain([1 + 2 * D as i32])
            .collect();
        x.transpose(&order)
    }

    fn padded(&self, x: &Array, margin: f64) -> Result<Array> {
        if self.padding == [0; D] {
            return Ok(x.clone());
        }
        let (mut shape, mut start) = (x.shape().to_vec(), vec![0; x.rank()]);
        for (axis, &padding) in self.padding.iter().enumerate() {
            shape[axis + 1] += 2 * padding;
            start[axis + 1] = padding;
        }
        Array::full(&shape, margin, x.dtype()).slice_update(x, &start)
    }

    fn axes(&self) -> Vec<i32> {
        (0..D as i32).map(|axis| axis - D as i32 - 1).collect()
    }
}

macro_rules! pools {
    ($($(#[$doc:meta])* $name:ident: $reduce:ident, $margin:expr, $($alias:ident $dims:literal)*;)*) => { $(
        $(#[$doc])*
        #[derive(Clone, Copy, Debug)]
        pub struct $name<const D: usize>(Windows<D>);

        $(
            #[doc = concat!("[`", stringify!($name), "`] over ", stringify!($dims), " spatial axes.")]
            pub type $alias = $name<$dims>;

            module!($alias {});
        )*

        impl<const D: usize> $name<D> {
            /// Windows of `kernel_size` places every `stride` places (as far as a window, if there
            /// is none), with `padding` more places at both ends of each axis.
            pub fn new(
                kernel_size: [usize; D],
                stride: Option<[usize; D]>,
                padding: [usize; D],
            ) -> Result<$name<D>> {
                Ok($name(Windows::new(stringify!($name), kernel_size, stride, padding)?))
            }
        }

        impl<const D: usize> Layer for $name<D>
        where
            $name<D>: crate::Module,
        {
            fn forward(&self, x: &Array, _: &Context) -> Result<Array> {
                self.0.of(stringify!($name), x, $margin)?.$reduce(&self.0.axes(), false)
            }
        }
    )* };
}

pools! {
    /// The largest of each window.
    MaxPool: max, f64::NEG_INFINITY, MaxPool1d 1 MaxPool2d 2 MaxPool3d 3;
    /// The mean of each window, margins included as zeros.
    AvgPool: mean, 0.0, AvgPool1d 1 AvgPool2d 2 AvgPool3d 3;
}
