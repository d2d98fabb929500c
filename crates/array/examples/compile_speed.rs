//! What `compile` gains here: GELU and SwiGLU, forward and backward, eager and compiled.
//!
//! `cargo run --release -p mica-array --example compile_speed [elements] [rounds]`
//! prints the median time of each, taken in turns so that other processes disturb both alike, the
//! least memory traffic as GB/s, and the ratio of the medians. Results are compared bit for bit
//! first.

use std::time::Instant;

use mica_array::transforms::{compile, value_and_grad};
use mica_array::{Array, Dtype, Result, eval, pending_ops};
use mica_testkit::Rng;

type Function<'a> = &'a dyn Fn(&[Array]) -> Result<Vec<Array>>;

fn main() -> Result<()> {
    let mut arguments = std::env::args().skip(1).map(|text| text.parse::<usize>().expect("a number"));
    let elements = arguments.next().unwrap_or(4 << 20);
    let rounds = arguments.next().unwrap_or(15);
    println!("{} threads, {elements} elements, median of {rounds} rounds", mica_array::threads());
    let mut rng = Rng::new(1);
    let mut normal = || Array::from_slice(&rng.normals(elements), &[elements]);
    let (x, y, weight) = (normal()?, normal()?, normal()?);

    let gelu = |x: &[Array]| -> Result<Vec<Array>> {
        let cube = x[0].square()? * &x[0];
        let inner = (cube * 0.044715 + &x[0]) * (2.0 / std::f64::consts::PI).sqrt();
        Ok(vec![(inner.tanh()? + 1.0) * &x[0] * 0.5])
    };
    let swiglu = |x: &[Array]| -> Result<Vec<Array>> { Ok(vec![x[0].silu()?.multiply(&x[1])?]) };
    let (fast_gelu, fast_swiglu) = (compile(gelu), compile(swiglu));
    let fast_gelu = |x: &[Array]| fast_gelu.call(x);
    let fast_swiglu = |x: &[Array]| fast_swiglu.call(x);
    let (one, two) = ([x.clone()], [x, y]);
    for dtype in [Dtype::F32, Dtype::BF16] {
        let cast = |x: &Array| -> Result<Array> {
            let x = x.astype(dtype)?;
            x.eval()?;
            Ok(x)
        };
        let one = [cast(&one[0])?];
        let two = [cast(&two[0])?, cast(&two[1])?];
        let weight = cast(&weight)?;
        let train = |f: Function, x: &[Array]| -> Result<Vec<Array>> {
            Ok(value_and_grad(|x| f(x)?[0].multiply(&weight)?.astype(Dtype::F32)?.sum(&[], false), x)?.grads)
        };
        let cases: [(&str, Function, Function, &[Array], usize); 4] = [
            ("gelu", &gelu, &fast_gelu, &one, 2),
            ("swiglu", &swiglu, &fast_swiglu, &two, 3),
            ("gelu, gradient", &|x| train(&gelu, x), &|x| train(&fast_gelu, x), &one, 3),
            ("swiglu, gradients", &|x| train(&swiglu, x), &|x| train(&fast_swiglu, x), &two, 5),
        ];
        for (name, eager, compiled, inputs, streams) in cases {
            check(name, eager, compiled, inputs)?;
            let mut times = [Vec::new(), Vec::new()];
            for _ in 0..rounds {
                for (f, times) in [eager, compiled].into_iter().zip(&mut times) {
                    let start = Instant::now();
                    eval(&f(inputs)?)?;
                    times.push(start.elapsed().as_secs_f64());
                }
            }
            let [eager_time, time] = times.map(|mut times| {
                times.sort_by(f64::total_cmp);
                times[times.len() / 2]
            });
            println!(
                "{dtype:<9} {name:<18} eager {:6.2} ms ({:2} ops), compiled {:6.2} ms ({} ops, {:5.1} GB/s): {:.2} x",
                eager_time * 1e3,
                pending_ops(&eager(inputs)?).len(),
                time * 1e3,
                pending_ops(&compiled(inputs)?).len(),
                (streams * elements * dtype.size()) as f64 / time / 1e9,
                eager_time / time,
            );
        }
    }
    Ok(())
}

/// The same bits, or at most the last one in gradients, whose sums may be in another order.
fn check(name: &str, eager: Function, compiled: Function, inputs: &[Array]) -> Result<()> {
    for (a, b) in eager(inputs)?.iter().zip(compiled(inputs)?) {
        let difference = a.subtract(&b)?.abs()?.astype(Dtype::F32)?.max(&[], false)?.item::<f32>()?;
        let largest = a.abs()?.astype(Dtype::F32)?.max(&[], false)?.item::<f32>()?;
        let bound = if name.contains("gradient") && a.dtype() == Dtype::BF16 { 0.02 } else { 1e-6 };
        assert!(difference <= bound * largest, "{name} differs by {difference} of {largest}");
    }
    Ok(())
}
