//! Products of f64 and integers: correct and blocked a little, not tuned.

use mica_threads::{Scratch, Task};

use crate::view::offset_of;
use crate::{KernelError, View, ViewMut};

/// A type that [`MatmulTask`] multiplies. Integers wrap; f64 is one fused chain over k.
pub trait Number: Copy + Send + Sync {
    /// Zero.
    const ZERO: Self;
    /// `self * by + plus`.
    fn multiply_add(self, by: Self, plus: Self) -> Self;
}

impl Number for f64 {
    const ZERO: f64 = 0.0;
    #[inline]
    fn multiply_add(self, by: f64, plus: f64) -> f64 {
        self.mul_add(by, plus)
    }
}

macro_rules! integers {
    ($($t:ty)*) => { $(
        impl Number for $t {
            const ZERO: $t = 0;
            #[inline]
            fn multiply_add(self, by: $t, plus: $t) -> $t {
                self.wrapping_mul(by).wrapping_add(plus)
            }
        }
    )* };
}
integers!(u8 i8 u16 i16 u32 i32 u64 i64);

/// `out[b, m, n] = a[b, m, k] · b[b, k, n]`, any strides; a chunk is up to 16 rows.
pub struct MatmulTask<'a, T> {
    a: View<'a, T>,
    b: View<'a, T>,
    out: ViewMut<'a, T>,
}

const ROWS: usize = 16;
/// Columns of a block: its sums stay in the first-level cache.
const COLUMNS: usize = 256;

impl<'a, T: Number> MatmulTask<'a, T> {
    /// Checks the shapes, which are all of rank 3 (broadcast batches have stride zero).
    pub fn new(a: View<'a, T>, b: View<'a, T>, out: ViewMut<'a, T>) -> Result<Self, KernelError> {
        let fits = match (a.shape(), b.shape(), out.shape()) {
            (&[a0, m, k], &[b0, k2, n], &[o0, om, on]) => {
                a0 == o0 && b0 == o0 && k == k2 && m == om && n == on
            }
            _ => false,
        };
        if !fits {
            let message = format!(
                "expected [b, m, k] x [b, k, n] = [b, m, n], got {:?} x {:?} = {:?}",
                a.shape(),
                b.shape(),
                out.shape()
            );
            return Err(KernelError::new("matmul", message));
        }
        Ok(MatmulTask { a, b, out })
    }
}

impl<T: Number> Task for MatmulTask<'_, T> {
    fn chunks(&self) -> usize {
        self.out.shape()[0] * self.out.shape()[1].div_ceil(ROWS)
    }

    fn run(&self, chunk: usize, _: &mut Scratch) {
        let &[_, m, n] = self.out.shape() else { return };
        let k = self.a.shape()[2];
        let (entry, first) = (chunk / m.div_ceil(ROWS), chunk % m.div_ceil(ROWS) * ROWS);
        let (b_row, b_column) = (self.b.strides()[1], self.b.strides()[2]);
        for column in (0..n).step_by(COLUMNS) {
            let columns = COLUMNS.min(n - column);
            for row in first..m.min(first + ROWS) {
                let mut sums = [T::ZERO; COLUMNS];
                let sums = &mut sums[..columns];
                for at in 0..k {
                    // SAFETY: all indices are inside the checked shapes.
                    unsafe {
                        let x = *self.a.pointer().offset(offset_of(&[entry, row, at], self.a.strides()));
                        let start = self.b.pointer().offset(offset_of(&[entry, 0, column], self.b.strides()));
                        let start = start.wrapping_offset(at as isize * b_row);
                        for (j, sum) in sums.iter_mut().enumerate() {
                            let w = *start.wrapping_offset(j as isize * b_column);
                            *sum = x.multiply_add(w, *sum);
                        }
                    }
                }
                for (j, &sum) in sums.iter().enumerate() {
                    let offset = offset_of(&[entry, row, column + j], self.out.strides());
                    // SAFETY: as above; rows belong to this chunk alone.
                    unsafe { *self.out.pointer().offset(offset) = sum };
                }
            }
        }
    }

    fn name(&self) -> &'static str {
        "matmul"
    }
}

#[cfg(test)]
mod tests {
    use mica_testkit::Rng;
    use mica_threads::Pool;

    use super::*;

    #[test]
    fn products_of_f64_and_integers() {
        let pool = Pool::new(2);
        let mut rng = Rng::new(3);
        for (name, batch, m, k, n) in [
            ("plain", 1, 5, 7, 9),
            ("batched", 3, 17, 4, 33),
            ("wide", 1, 2, 3, 600),
            ("k is zero", 2, 3, 0, 4),
            ("m is zero", 2, 0, 3, 4),
        ] {
            let a: Vec<i32> = (0..batch * m * k).map(|_| rng.u32() as i32).collect();
            let b: Vec<i32> = (0..k * n).map(|_| rng.u32() as i32).collect();
            let mut out = vec![-1i32; batch * m * n];
            {
                // b is stored [n, k] and shared by the batch.
                let a = View::new(&a, &[batch, m, k]).unwrap();
                let b = View::strided(&b, 0, &[batch, k, n], &[0, 1, k as isize]).unwrap();
                let out = ViewMut::new(&mut out, &[batch, m, n]).unwrap();
                pool.run(&[Box::new(MatmulTask::new(a, b, out).unwrap())]).unwrap();
            }
            for e in 0..batch {
                for i in 0..m {
                    for j in 0..n {
                        let expected = (0..k).fold(0i32, |sum, at| {
                            sum.wrapping_add(a[(e * m + i) * k + at].wrapping_mul(b[j * k + at]))
                        });
                        assert_eq!(out[(e * m + i) * n + j], expected, "{name} {e} {i} {j}");
                    }
                }
            }
        }
    }

    #[test]
    fn shapes_that_do_not_fit_are_refused() {
        let data = [0f64; 24];
        let mut out = [0f64; 24];
        let a = View::new(&data, &[1, 4, 6]).unwrap();
        let out = ViewMut::new(&mut out, &[1, 4, 6]).unwrap();
        let error = MatmulTask::new(a.clone(), a, out).err().unwrap();
        assert!(error.to_string().contains("[b, m, k]"), "{error}");
    }
}
