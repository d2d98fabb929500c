//! What moves a square of 4 million values: casts, bf16 arithmetic, gathers, transposed copies. GB/s counts what is
//! read and what is written, beside the read bandwidth.
//!
//! `cargo bench --workspace --bench copy -- [threads] [words]`.

mod ceiling;

use mica_kernels::copy::copy;
use mica_kernels::elementwise::{BinaryOp, Flat, binary_dense, cast};
use mica_kernels::index::{take, take_along_axis};
use mica_kernels::{Dtype, DynView, DynViewMut};
use mica_threads::{Pool, Task};

use ceiling::{arguments, block, is_asked_for, moved};

/// Sides of the square.
const N: usize = 2048;

/// Memory for a square of any type.
struct Square(Vec<u64>);

impl Square {
    fn new(value: impl Fn(usize) -> u32) -> Square {
        let pair = |i: usize| (value(2 * i + 1) as u64) << 32 | value(2 * i) as u64;
        Square((0..N * N / 2).map(pair).collect())
    }

    fn view(&self, dtype: Dtype, strides: [isize; 2]) -> DynView {
        let pointer = self.0.as_ptr().cast();
        DynView { pointer, dtype, shape: [N, N].as_slice().into(), strides: strides.as_slice().into() }
    }

    fn view_mut(&mut self, dtype: Dtype) -> DynViewMut {
        let (pointer, strides) = (self.0.as_mut_ptr().cast(), [N as isize, 1]);
        DynViewMut { pointer, dtype, shape: [N, N].as_slice().into(), strides: strides.as_slice().into() }
    }

    fn flat(&self, dtype: Dtype) -> Flat {
        Flat { pointer: self.0.as_ptr().cast_mut().cast(), dtype }
    }
}

fn main() {
    let (threads, words) = arguments();
    let pool = Pool::new(threads);
    let block = block(&pool, 64 << 20);
    let hash = |i: usize| (i as u32).wrapping_mul(0x9E37_79B1);
    let floats = Square::new(|i| (hash(i) as f32 / 4e9 - 0.5).to_bits());
    let indices = Square::new(|i| (hash(i) >> 7) % N as u32);
    let mut out = Square::new(|_| 0);
    let rows = [N as isize, 1];
    let mut time = |name: &str, bytes: usize, make: &dyn Fn(&mut Square) -> Box<dyn Task>| {
        if is_asked_for(name, &words) {
            let task = make(&mut out);
            moved(&pool, name, bytes * N * N, &block, &[task]);
        }
    };
    for (from, to) in [
        (Dtype::F32, Dtype::BF16),
        (Dtype::BF16, Dtype::F32),
        (Dtype::F32, Dtype::F16),
        (Dtype::I32, Dtype::F32),
    ] {
        time(&format!("cast from {from} to {to}"), from.size() + to.size(), &|out| {
            cast(floats.view(from, rows), out.view_mut(to)).expect("shapes are equal")
        });
    }
    for dtype in [Dtype::F32, Dtype::BF16] {
        time(&format!("add of {dtype}"), 3 * dtype.size(), &|out| {
            let a = floats.flat(dtype);
            Box::new(binary_dense(BinaryOp::Add, a, a, out.flat(dtype), N * N).expect("types are equal"))
        });
    }
    time("gather along the last axis", 12, &|out| {
        take_along_axis(
            floats.view(Dtype::F32, rows),
            1,
            indices.view(Dtype::I32, rows),
            out.view_mut(Dtype::F32),
        )
        .expect("shapes are equal")
    });
    time("gather of rows", 8, &|out| {
        let mut line = indices.view(Dtype::I32, rows);
        line.shape = [N].as_slice().into();
        line.strides = [1].as_slice().into();
        take(floats.view(Dtype::F32, rows), 0, line, out.view_mut(Dtype::F32)).expect("shapes fit")
    });
    time("transposed copy", 8, &|out| {
        copy(floats.view(Dtype::F32, [1, N as isize]), out.view_mut(Dtype::F32)).expect("shapes are equal")
    });
}
