//! The cases. benches/peers/torch_numpy_micro.py has the same, by name.

use anyhow::Result;
use mica_array::conv::conv2d;
use mica_array::transforms::compile;
use mica_array::{Array, Dtype, fast};

/// Sides of the square of 4,194,304 elements.
const N: usize = 2048;

/// One thing to measure.
pub struct Case {
    pub name: &'static str,
    /// Makes the inputs, and gives what to time.
    pub make: Make,
    /// How far a peer's values may be off, of the largest.
    pub tolerance: f64,
    /// The last axis comes in any order.
    pub unordered: bool,
}

type Work = Box<dyn Fn() -> mica_array::Result<Vec<Array>>>;
type Make = Box<dyn Fn() -> Result<Work>>;
type Operands = Vec<Array>;

fn case(
    name: &'static str,
    inputs: impl Fn() -> Result<Operands> + 'static,
    run: impl Fn(&[Array]) -> mica_array::Result<Vec<Array>> + Clone + 'static,
) -> Case {
    let make = move || -> Result<Work> {
        let (inputs, run) = (inputs()?, run.clone());
        mica_array::eval(&inputs)?;
        Ok(Box::new(move || run(&inputs)))
    };
    Case { name, make: Box::new(make), tolerance: 1e-3, unordered: false }
}

/// As [`case`], for one output.
fn op(
    name: &'static str,
    inputs: impl Fn() -> Result<Operands> + 'static,
    run: impl Fn(&[Array]) -> mica_array::Result<Array> + Clone + 'static,
) -> Case {
    case(name, inputs, move |inputs| Ok(vec![run(inputs)?]))
}

/// As [`op`], compiled. A function is compiled once, as its user would.
fn chain(
    name: &'static str,
    inputs: impl Fn() -> Result<Operands> + 'static,
    f: impl Fn(&[Array]) -> mica_array::Result<Vec<Array>> + Clone + 'static,
) -> Case {
    let make = move || -> Result<Work> {
        let (inputs, compiled) = (inputs()?, compile(f.clone()));
        mica_array::eval(&inputs)?;
        Ok(Box::new(move || compiled.call(&inputs)))
    };
    Case { name, make: Box::new(make), tolerance: 1e-3, unordered: false }
}

/// A half type's results.
fn coarse(case: Case) -> Case {
    Case { tolerance: 2e-2, ..case }
}

/// Numbers that the script makes in the same way: a hash of the place and the seed.
fn hashes(seed: u32, shape: &[usize]) -> Vec<u32> {
    let mix = |place: usize| {
        let mut h = (place as u32).wrapping_mul(0x9E37_79B1).wrapping_add(seed.wrapping_mul(0x85EB_CA77));
        h = (h ^ (h >> 16)).wrapping_mul(0x85EB_CA6B);
        h = (h ^ (h >> 13)).wrapping_mul(0xC2B2_AE35);
        h ^ (h >> 16)
    };
    (0..shape.iter().product()).map(mix).collect()
}

/// Floats from −3 to 3.
fn floats(seed: u32, shape: &[usize]) -> Result<Array> {
    let values: Vec<f32> =
        hashes(seed, shape).into_iter().map(|h| ((h >> 8) as f32 / (1 << 24) as f32 - 0.5) * 6.0).collect();
    Ok(Array::from_slice(&values, shape)?)
}

fn bf16(seed: u32, shape: &[usize]) -> Result<Array> {
    Ok(floats(seed, shape)?.astype(Dtype::BF16)?)
}

/// Integers from 0 to `below` − 1.
fn integers(seed: u32, shape: &[usize], below: u32) -> Result<Array> {
    let values: Vec<i32> = hashes(seed, shape).into_iter().map(|h| (h % below) as i32).collect();
    Ok(Array::from_slice(&values, shape)?)
}

fn square() -> Result<Operands> {
    Ok(vec![floats(1, &[N, N])?])
}

fn flat() -> Result<Operands> {
    Ok(vec![floats(1, &[N * N])?])
}

fn two() -> Result<Operands> {
    Ok(vec![floats(1, &[N, N])?, floats(2, &[N, N])?])
}

/// Single ops.
pub fn ops() -> Vec<Case> {
    let half = || Ok(vec![bf16(1, &[N, N])?]);
    let halves = || Ok(vec![bf16(1, &[N, N])?, bf16(2, &[N, N])?]);
    let mut list = vec![
        op("add", two, |x| x[0].add(&x[1])),
        coarse(op("add, bf16", halves, |x| x[0].add(&x[1]))),
        op(
            "add, int32",
            || Ok(vec![integers(1, &[N, N], 1000)?, integers(2, &[N, N], 1000)?]),
            |x| x[0].add(&x[1]),
        ),
        op("divide", || Ok(vec![floats(1, &[N, N])?, floats(2, &[N, N])?.exp()?]), |x| x[0].divide(&x[1])),
        op("exp", square, |x| x[0].exp()),
        coarse(op("exp, bf16", half, |x| x[0].exp())),
        op("tanh", square, |x| x[0].tanh()),
        op("sigmoid", square, |x| x[0].sigmoid()),
        op(
            "where",
            || {
                let (a, b) = (floats(1, &[N, N])?, floats(2, &[N, N])?);
                Ok(vec![a.less(&b)?, a, b])
            },
            |x| Array::select(&x[0], &x[1], &x[2]),
        ),
        coarse(op("float32 to bf16", square, |x| x[0].astype(Dtype::BF16))),
        op("sum", square, |x| x[0].sum(&[], false)),
        op("sum, axis 0", square, |x| x[0].sum(&[0], false)),
        op("sum, axis 1", square, |x| x[0].sum(&[1], false)),
        op("max, axis 1", square, |x| x[0].max(&[1], false)),
        op("argmax, axis 1", square, |x| x[0].argmax(1, false)),
        op("variance, axis 1", square, |x| x[0].var(&[1], false, 0)),
        op("softmax", square, |x| x[0].softmax(-1)),
        op("logsumexp", square, |x| x[0].logsumexp(-1, false)),
        op("cumsum, axis 1", square, |x| x[0].cumsum(1, false, true)),
        op("cumsum, one line", flat, |x| x[0].cumsum(0, false, true)),
        op("sort, axis 1", square, |x| x[0].sort(1)),
        op("sort, one line", flat, |x| x[0].sort(0)),
        op("argsort, axis 1", square, |x| x[0].argsort(1)),
        Case { unordered: true, ..op("largest 50, axis 1", square, |x| x[0].topk(50, 1)) },
        op(
            "gather rows",
            || Ok(vec![floats(1, &[N, N])?, integers(3, &[N], N as u32)?]),
            |x| x[0].take(&x[1], 0),
        ),
        op(
            "gather along axis 1",
            || Ok(vec![floats(1, &[N, N])?, integers(3, &[N, N], N as u32)?]),
            |x| x[0].take_along_axis(&x[1], 1),
        ),
        op("transposed copy", square, |x| x[0].transpose(&[])?.contiguous()),
        op("concatenate, axis 1", two, |x| Array::concatenate(x, 1)),
        op(
            "layer norm",
            || Ok(vec![floats(1, &[N, N])?, floats(2, &[N])?, floats(3, &[N])?]),
            |x| fast::layer_norm(&x[0], Some(&x[1]), Some(&x[2]), 1e-5),
        ),
        op(
            "rms norm",
            || Ok(vec![floats(1, &[N, N])?, floats(2, &[N])?]),
            |x| fast::rms_norm(&x[0], Some(&x[1]), 1e-5),
        ),
        op(
            "convolution 3 x 3, 64 to 64 channels",
            || Ok(vec![floats(1, &[16, 64, 64, 64])?, floats(2, &[64, 3, 3, 64])?]),
            |x| conv2d(&x[0], &x[1], [1, 1], [1, 1], [1, 1], 1),
        ),
        op(
            "convolution 3 x 3, each of 64 channels",
            || Ok(vec![floats(1, &[16, 64, 64, 64])?, floats(2, &[64, 3, 3, 1])?]),
            |x| conv2d(&x[0], &x[1], [1, 1], [1, 1], [1, 1], 64),
        ),
    ];
    for (name, half_name, size) in [
        ("matmul 512", "matmul 512, bf16", 512),
        ("matmul 1024", "matmul 1024, bf16", 1024),
        ("matmul 2048", "matmul 2048, bf16", 2048),
        ("matmul 4096", "matmul 4096, bf16", 4096),
    ] {
        let operands = move || Ok(vec![floats(1, &[size, size])?, floats(2, &[size, size])?]);
        let half_operands = move || Ok(vec![bf16(1, &[size, size])?, bf16(2, &[size, size])?]);
        list.push(op(name, operands, |x| x[0].matmul(&x[1])));
        list.push(coarse(op(half_name, half_operands, |x| x[0].matmul(&x[1]))));
    }
    list
}

/// x / √(mean x² + ε) · w, by hand.
fn by_rms(x: &Array, weight: &Array) -> mica_array::Result<Array> {
    x.multiply(x.square()?.mean(&[-1], true)?.add(1e-5)?.rsqrt()?)?.multiply(weight)
}

/// Functions of several ops.
pub fn chains() -> Vec<Case> {
    vec![
        chain("GELU by tanh", square, |x| {
            let x = &x[0];
            let inner = (x * x * x * 0.044715 + x) * 0.797_884_56;
            Ok(vec![(inner.tanh()? + 1.0) * x * 0.5])
        }),
        coarse(chain(
            "SwiGLU, bf16",
            || Ok(vec![bf16(1, &[N, N])?, bf16(2, &[N, N])?]),
            |x| Ok(vec![x[0].silu()?.multiply(&x[1])?]),
        )),
        chain(
            "SwiGLU and RMS norm",
            || Ok(vec![floats(1, &[N, N])?, floats(2, &[N, N])?, floats(3, &[N])?]),
            |x| Ok(vec![by_rms(&x[0].silu()?.multiply(&x[1])?, &x[2])?]),
        ),
        chain(
            "softmax of scaled, masked scores",
            || {
                let places = Array::arange(0.0, 1024.0, 1.0, Dtype::I32)?;
                let mask = places.expand_dims(&[1])?.greater_equal(&places)?;
                Ok(vec![floats(1, &[4, 1024, 1024])?, mask])
            },
            |x| Ok(vec![Array::select(&x[1], &(&x[0] * 0.125), f64::NEG_INFINITY)?.softmax(-1)?]),
        ),
        chain(
            "Adam step",
            || {
                Ok(vec![
                    floats(1, &[N, N])?,
                    floats(2, &[N, N])?,
                    floats(3, &[N, N])?,
                    floats(4, &[N, N])?.square()?,
                ])
            },
            |x| {
                let [parameter, gradient, mean, square] = x else { unreachable!("four inputs") };
                let mean = mean * 0.9 + gradient * 0.1;
                let square = square * 0.999 + gradient * gradient * 0.001;
                let step = &mean * 1e-3 / (square.sqrt()? + 1e-8);
                Ok(vec![parameter - step, mean, square])
            },
        ),
        chain(
            "rotary positions",
            || Ok(vec![floats(1, &[4, 16, 1024, 64])?, floats(2, &[1024, 32])?, floats(3, &[1024, 32])?]),
            |x| {
                let (low, high) = (x[0].narrow(-1, 0, 32)?, x[0].narrow(-1, 32, 64)?);
                let (cos, sin) = (&x[1], &x[2]);
                let turned = [&low * cos - &high * sin, &high * cos + &low * sin];
                Ok(vec![Array::concatenate(&turned, -1)?])
            },
        ),
        chain(
            "log-softmax, gather, mean",
            || Ok(vec![floats(1, &[1024, 4096])?, integers(2, &[1024, 1], 4096)?]),
            |x| {
                let scores = x[0].log_softmax(-1)?.take_along_axis(&x[1], -1)?;
                Ok(vec![scores.mean(&[], false)?.negative()?])
            },
        ),
        chain(
            "layer norm by hand",
            || Ok(vec![floats(1, &[N, N])?, floats(2, &[N])?, floats(3, &[N])?]),
            |x| {
                let centred = x[0].subtract(x[0].mean(&[-1], true)?)?;
                let variance = centred.square()?.mean(&[-1], true)?;
                Ok(vec![centred * variance.add(1e-5)?.rsqrt()? * &x[1] + &x[2]])
            },
        ),
        chain("mean Huber loss", two, |x| {
            let distance = (&x[0] - &x[1]).abs()?;
            let near = distance.square()? * 0.5;
            Ok(vec![Array::select(&distance.less_equal(1.0)?, &near, &distance - 0.5)?.mean(&[], false)?])
        }),
        coarse(chain(
            "residual, RMS norm, bf16",
            || Ok(vec![bf16(1, &[N, N])?, bf16(2, &[N, N])?, bf16(3, &[N])?]),
            |x| {
                let sum = &x[0] + &x[1];
                let wide = sum.astype(Dtype::F32)?;
                let scale = wide.square()?.mean(&[-1], true)?.add(1e-5)?.rsqrt()?;
                let normed = (wide * scale).astype(Dtype::BF16)?.multiply(&x[2])?;
                Ok(vec![sum, normed])
            },
        )),
    ]
}
