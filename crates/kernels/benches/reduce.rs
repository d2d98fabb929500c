//! Reductions of a square of 4 million f32, as a fraction of the read bandwidth.
//!
//! `cargo bench --workspace --bench reduce -- [threads] [words]`.

mod ceiling;

use mica_kernels::reduce::{ReduceOp, reduce};
use mica_kernels::{Dtype, DynView, DynViewMut};
use mica_threads::Pool;

use ceiling::{arguments, block, is_asked_for, moved};

/// Sides of the square.
const N: usize = 2048;

fn main() {
    let (threads, words) = arguments();
    let pool = Pool::new(threads);
    let block = block(&pool, 64 << 20);
    let values: Vec<f32> = (0..N * N).map(|i| ((i * 7919) % 1013) as f32 / 1013.0 - 0.5).collect();
    let mut out = vec![0f32; N];
    for op in [ReduceOp::Sum, ReduceOp::Max] {
        for (axes, kept) in [(&[0, 1][..], &[][..]), (&[0], &[N]), (&[1], &[N])] {
            let name = format!("{} over axes {axes:?} of [{N}, {N}]", op.name());
            if !is_asked_for(&name, &words) {
                continue;
            }
            let source = DynView {
                pointer: values.as_ptr().cast(),
                dtype: Dtype::F32,
                shape: [N, N].as_slice().into(),
                strides: [N as isize, 1].as_slice().into(),
            };
            let target = DynViewMut {
                pointer: out.as_mut_ptr().cast(),
                dtype: Dtype::F32,
                shape: kept.into(),
                strides: kept.iter().map(|_| 1).collect(),
            };
            let task = reduce(op, source, axes, target).expect("the shapes fit");
            moved(&pool, &name, 4 * N * N, &block, &[task]);
        }
    }
}
