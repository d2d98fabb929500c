//! Where a product's rows go, and what is added on the way.

use crate::{KernelError, View, ViewMut};

use super::lanes::Lanes;

/// What is added to a product before it is written: y = (x·wᵀ + bias) + residual.
#[derive(Clone, Debug, Default)]
pub struct Epilogue<'a> {
    /// `[n]`, added to every row.
    pub bias: Option<View<'a, f32>>,
    /// `[m, n]`; may be the output itself, element for element.
    pub residual: Option<View<'a, f32>>,
}

impl<'a> Epilogue<'a> {
    /// Adds nothing.
    pub fn none() -> Epilogue<'a> {
        Epilogue::default()
    }

    /// Adds a vector `[n]` to every row.
    pub fn bias(bias: View<'a, f32>) -> Epilogue<'a> {
        Epilogue { bias: Some(bias), residual: None }
    }

    /// Adds a matrix `[m, n]`.
    pub fn residual(residual: View<'a, f32>) -> Epilogue<'a> {
        Epilogue { bias: None, residual: Some(residual) }
    }
}

/// A checked output `[m, n]` with its epilogue.
pub(super) struct Sink<'a> {
    out: ViewMut<'a, f32>,
    epilogue: Epilogue<'a>,
    /// Where each row is, in elements behind the start of the output, if they lie anywhere.
    places: Option<&'a [isize]>,
}

impl<'a> Sink<'a> {
    /// Checks that all fits `[m, n]` and that rows are contiguous.
    pub fn new(
        kernel: &'static str,
        out: ViewMut<'a, f32>,
        epilogue: Epilogue<'a>,
        [m, n]: [usize; 2],
    ) -> Result<Sink<'a>, KernelError> {
        let refuse = |message| Err(KernelError::new(kernel, message));
        if out.shape() != [m, n] {
            return refuse(format!("expected an output [{m}, {n}], got {:?}", out.shape()));
        }
        if n > 1 && out.strides()[1] != 1 {
            return refuse(format!("rows of the output must be contiguous, got strides {:?}", out.strides()));
        }
        if m > 1 && n > 0 && out.strides()[0].unsigned_abs() < n {
            return refuse(format!("rows of the output overlap: strides {:?} of [{m}, {n}]", out.strides()));
        }
        if let Some(bias) = &epilogue.bias
            && (bias.shape() != [n] || !bias.is_contiguous())
        {
            return refuse(format!("expected a contiguous bias [{n}], got {:?}", bias.shape()));
        }
        if let Some(residual) = &epilogue.residual
            && (residual.shape() != [m, n] || (n > 1 && residual.strides()[1] != 1))
        {
            return refuse(format!(
                "expected a residual [{m}, {n}] of contiguous rows, got {:?}",
                residual.shape()
            ));
        }
        Ok(Sink { out, epilogue, places: None })
    }

    /// Rows of `n` contiguous values anywhere: at these places behind `out`.
    ///
    /// # Safety
    /// They are valid to write for as long as the sink, and nobody else writes what is put there.
    pub unsafe fn scattered(out: *mut f32, places: &'a [isize], n: usize) -> Sink<'a> {
        // SAFETY: promised by the caller; the stride of rows is not used.
        let out = unsafe { ViewMut::from_raw(out, &[places.len(), n], &[0, 1]) };
        Sink { out, epilogue: Epilogue::none(), places: Some(places) }
    }

    /// Columns of the output.
    fn n(&self) -> usize {
        self.out.shape()[1]
    }

    /// Writes 16 values of `row` from `column` on; those past the last column are dropped.
    ///
    /// # Safety
    /// As for [`Lanes`]; `row` is inside the output and `column` below its width, and no other
    /// chunk writes these places.
    #[inline(always)]
    pub unsafe fn put<L: Lanes>(&self, row: usize, column: usize, value: L::F) {
        let n = self.n();
        // SAFETY: row and column are inside the views; 16 lanes are touched only where they fit.
        unsafe {
            let place = match self.places {
                Some(places) => places[row],
                None => row as isize * self.out.strides()[0],
            };
            let out = self.out.pointer().offset(place).add(column);
            let bias = self.epilogue.bias.as_ref().map(|bias| bias.pointer().add(column));
            let residual = self
                .epilogue
                .residual
                .as_ref()
                .map(|view| view.pointer().offset(row as isize * view.strides()[0]).add(column));
            if column + 16 <= n {
                let mut value = value;
                if let Some(bias) = bias {
                    value = L::add(value, L::load_f32(bias));
                }
                if let Some(residual) = residual {
                    value = L::add(value, L::load_f32(residual));
                }
                L::store_f32(out, value);
            } else {
                let mut values = [0f32; 16];
                L::store_f32(values.as_mut_ptr(), value);
                for (lane, value) in values.iter().enumerate().take(n - column) {
                    let mut value = *value;
                    if let Some(bias) = bias {
                        value += *bias.add(lane);
                    }
                    if let Some(residual) = residual {
                        value += *residual.add(lane);
                    }
                    *out.add(lane) = value;
                }
            }
        }
    }
}
