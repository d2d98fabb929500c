//! One case per op and form: what gradients, tangents, batches and compiled functions are tested
//! on. A new op gets a line here and is tested everywhere.

use mica_array::op::{
    AdamWSpec, AttentionSpec, BinaryOp, CrossEntropySpec, Precision, RopeSpec, ScatterOp, UnaryOp,
};
use mica_array::{Array, Dtype, Result, random};

use super::random as numbers;

/// Floats are f64; tests on kernels cast them.
pub struct OpCase {
    pub name: &'static str,
    pub inputs: Vec<Array>,
    pub f: fn(&[Array]) -> Result<Vec<Array>>,
    /// Whether results have derivatives by the float inputs.
    pub differentiable: bool,
    /// Whether something inside is f32 whatever the inputs are.
    pub single: bool,
}

fn normal(shape: &[usize], seed: u64) -> Array {
    numbers(shape, Dtype::F64, seed)
}

/// Between 0.5 and a few.
fn positive(shape: &[usize], seed: u64) -> Array {
    let x = normal(shape, seed).abs().unwrap().add(0.5).unwrap();
    x.eval().unwrap();
    x
}

/// Between −0.9 and 0.9.
fn small(shape: &[usize], seed: u64) -> Array {
    let x = normal(shape, seed).tanh().unwrap().multiply(0.9).unwrap();
    x.eval().unwrap();
    x
}

fn ints(values: &[i32], shape: &[usize]) -> Array {
    Array::from_slice(values, shape).unwrap()
}

fn bools(shape: &[usize], seed: u64) -> Array {
    numbers(shape, Dtype::Bool, seed)
}

fn one(x: Array) -> Result<Vec<Array>> {
    Ok(vec![x])
}

fn attention_spec() -> AttentionSpec {
    AttentionSpec {
        scale: 0.4,
        causal: true,
        window: None,
        softcap: None,
        key_start: false,
        precision: Precision::Exact,
    }
}

fn rope_spec(traditional: bool, dims: usize) -> RopeSpec {
    RopeSpec { dims, traditional, inverse: false, scale: 1.1 }
}

macro_rules! unary_cases {
    ($cases:ident, $($op:ident $input:expr;)*) => { $(
        $cases.push(OpCase {
            name: stringify!($op),
            inputs: vec![$input],
            f: |x| one(x[0].unary(UnaryOp::$op)?),
            differentiable: true,
            single: false,
        });
    )* };
}

macro_rules! binary_cases {
    ($cases:ident, $($op:ident $a:expr, $b:expr;)*) => { $(
        $cases.push(OpCase {
            name: stringify!($op),
            inputs: vec![$a, $b],
            f: |x| one(x[0].binary(BinaryOp::$op, &x[1])?),
            differentiable: true,
            single: false,
        });
    )* };
}

pub fn op_cases() -> Vec<OpCase> {
    let mut cases = Vec::new();
    unary_cases! { cases,
        Abs normal(&[2, 3], 1);
        Neg normal(&[2, 3], 2);
        Sign normal(&[2, 3], 3);
        Floor normal(&[2, 3], 4);
        Ceil normal(&[2, 3], 5);
        Round normal(&[2, 3], 6);
        Sqrt positive(&[2, 3], 7);
        Rsqrt positive(&[2, 3], 8);
        Square normal(&[2, 3], 9);
        Reciprocal positive(&[2, 3], 10);
        Exp normal(&[2, 3], 11);
        Expm1 normal(&[2, 3], 12);
        Log positive(&[2, 3], 13);
        Log2 positive(&[2, 3], 14);
        Log10 positive(&[2, 3], 15);
        Log1p positive(&[2, 3], 16);
        Sin normal(&[2, 3], 17);
        Cos normal(&[2, 3], 18);
        Tan small(&[2, 3], 19);
        Arcsin small(&[2, 3], 20);
        Arccos small(&[2, 3], 21);
        Arctan normal(&[2, 3], 22);
        Sinh normal(&[2, 3], 23);
        Cosh normal(&[2, 3], 24);
        Tanh normal(&[2, 3], 25);
        Arcsinh normal(&[2, 3], 26);
        Arccosh positive(&[2, 3], 27).add(1.0).unwrap();
        Arctanh small(&[2, 3], 28);
        Erf normal(&[2, 3], 29);
        ErfInv small(&[2, 3], 30);
        Sigmoid normal(&[2, 3], 31);
        Silu normal(&[2, 3], 32);
        GeluErf normal(&[2, 3], 33);
        GeluTanh normal(&[2, 3], 34);
        Softplus normal(&[2, 3], 35);
    }
    binary_cases! { cases,
        Add normal(&[2, 3], 40), normal(&[3], 41);
        Subtract normal(&[2, 1], 42), normal(&[3], 43);
        Multiply normal(&[2, 3], 44), normal(&[2, 1], 45);
        Divide normal(&[2, 3], 46), positive(&[3], 47);
        Power positive(&[2, 3], 48), normal(&[3], 49);
        Remainder normal(&[2, 3], 50), positive(&[3], 51);
        FloorDivide normal(&[2, 3], 52), positive(&[3], 53);
        Maximum normal(&[2, 3], 54), normal(&[3], 55);
        Minimum normal(&[2, 3], 56), normal(&[3], 57);
        Atan2 normal(&[2, 3], 58), positive(&[3], 59);
        LogAddExp normal(&[2, 3], 60), normal(&[3], 61);
    }
    cases.push(OpCase {
        name: "saved as",
        inputs: vec![normal(&[2, 3], 173), normal(&[3, 4], 174)],
        f: |x| {
            let saved = x[0].saved_as(Dtype::F32)?;
            let y = saved.matmul(&x[1])?.tanh()?.saved_as(Dtype::F32)?;
            one(y.reshape(&[4, 2])?.multiply(y.reshape(&[4, 2])?)?)
        },
        differentiable: true,
        single: true,
    });
    type F = fn(&[Array]) -> Result<Vec<Array>>;
    let mut add = |name, inputs, f: F| {
        cases.push(OpCase { name, inputs, f, differentiable: true, single: false });
    };
    add("select", vec![bools(&[2, 3], 70), normal(&[2, 3], 71), normal(&[3], 72)], |x| {
        one(Array::select(&x[0], &x[1], &x[2])?)
    });
    add("cast", vec![normal(&[2, 3], 73)], |x| {
        one(x[0].astype(Dtype::F32)?.astype(x[0].dtype())?.multiply(&x[0])?)
    });
    add("cast of bools", vec![bools(&[2, 3], 74), normal(&[3], 75)], |x| one(x[0].multiply(&x[1])?));
    add("stop_gradient", vec![normal(&[2, 3], 76)], |x| {
        one(x[0].multiply(x[0].exp()?)?.add(x[0].stop_gradient()?)?.subtract(x[0].stop_gradient()?)?)
    });
    add("reshape", vec![normal(&[2, 3, 2], 77)], |x| one(x[0].reshape(&[3, -1])?.square()?));
    add("transpose", vec![normal(&[2, 3, 2], 78)], |x| one(x[0].transpose(&[2, 0, 1])?.square()?));
    add("broadcast", vec![normal(&[3, 1], 79)], |x| one(x[0].broadcast_to(&[2, 3, 4])?.square()?));
    add("a number broadcast", vec![normal(&[], 80)], |x| one(x[0].broadcast_to(&[2, 3])?.sin()?));
    add("slice", vec![normal(&[2, 3, 4], 81)], |x| {
        one(x[0].window(&[0, 2, 3], &[2, 2, 2], &[1, -1, -2])?.square()?)
    });
    add("contiguous", vec![normal(&[2, 3], 82)], |x| one(x[0].swap_axes(0, 1)?.contiguous()?.square()?));
    add("concatenate", vec![normal(&[2, 3], 83), normal(&[2, 1], 84)], |x| {
        one(Array::concatenate(&[x[0].square()?, x[1].clone(), x[0].sin()?], 1)?)
    });
    add("stack", vec![normal(&[2, 3], 85), normal(&[2, 3], 86)], |x| one(Array::stack(x, -1)?.square()?));
    add("slice_update", vec![normal(&[2, 3, 4], 87), normal(&[1, 2, 2], 88)], |x| {
        one(x[0].slice_update(&x[1], &[1, 0, 2])?.square()?)
    });
    add("sum", vec![normal(&[2, 3, 4], 89)], |x| {
        Ok(vec![x[0].square()?.sum(&[0, 2], true)?, x[0].sin()?.sum(&[1], false)?])
    });
    add("sum of a number", vec![normal(&[], 90)], |x| one(x[0].square()?.sum(&[], false)?));
    add("mean and var", vec![normal(&[2, 3, 4], 91)], |x| {
        Ok(vec![x[0].exp()?.mean(&[1], false)?, x[0].var(&[-1], false, 1)?])
    });
    add("prod", vec![positive(&[2, 3], 92)], |x| one(x[0].prod(&[1], false)?));
    add("max", vec![normal(&[2, 3, 4], 93)], |x| one(x[0].square()?.max(&[0, 2], false)?));
    add("min", vec![normal(&[2, 3, 4], 94)], |x| one(x[0].square()?.min(&[1], true)?));
    add("max of a number", vec![normal(&[], 95)], |x| one(x[0].square()?.max(&[], false)?));
    add("softmax", vec![normal(&[2, 4], 96)], |x| one(x[0].softmax(-1)?));
    add("softmax of another axis", vec![normal(&[3, 2], 97)], |x| one(x[0].softmax(0)?));
    add("logsumexp", vec![normal(&[2, 4], 98)], |x| {
        Ok(vec![x[0].logsumexp(-1, false)?, x[0].logsumexp(0, true)?])
    });
    add("log_softmax", vec![normal(&[2, 4], 99)], |x| one(x[0].log_softmax(-1)?));
    add("take", vec![normal(&[2, 3, 4], 100), ints(&[2, 0, 2, -1], &[2, 2])], |x| {
        one(x[0].square()?.take(&x[1], 1)?)
    });
    add("take a number", vec![normal(&[3, 2], 101), ints(&[1], &[])], |x| {
        one(x[0].square()?.take(&x[1], 0)?)
    });
    add("take of the last axis", vec![normal(&[2, 3], 102), ints(&[2, 0, 1, 1], &[4])], |x| {
        one(x[0].square()?.take(&x[1], -1)?)
    });
    add("take_along_axis", vec![normal(&[2, 3, 4], 103), ints(&[1, 0, 3, 3, 2, 1], &[2, 3, 1])], |x| {
        one(x[0].square()?.take_along_axis(&x[1], 2)?)
    });
    add("scatter_add", vec![normal(&[2, 3, 2, 2], 104), ints(&[2, 0, 2, 1, -1, 2], &[3, 2])], |x| {
        one(Array::scatter_add(&x[0].square()?, &x[1], 1, 4)?)
    });
    add("scatter_add_along_axis", vec![normal(&[2, 3], 105), ints(&[1, 0, 1, 1, 0, 1], &[2, 3])], |x| {
        // The gradient of take_along_axis.
        let weighted =
            |y: &[Array]| y[0].take_along_axis(&x[1], 1)?.multiply(&x[0])?.square()?.sum(&[], false);
        mica_array::transforms::grad(weighted, &[x[0].cos()?])
    });
    let places = ints(&[1, 0, 2, 1], &[4, 1]);
    add("gather", vec![normal(&[3, 4, 2], 210), places.clone(), ints(&[2, 0], &[2])], |x| {
        one(x[0].square()?.gather(&[&x[1], &x[2]], &[0, 1], &[1, 2, 2])?)
    });
    let updates = normal(&[4, 2, 1, 2, 2], 211);
    let several = vec![normal(&[3, 4, 2], 212), updates, places.clone(), ints(&[2, 0], &[2])];
    add("scatter by adding", several.clone(), |x| {
        one(x[0].sin()?.scatter(ScatterOp::Add, &[&x[2], &x[3]], &[0, 1], &x[1].square()?)?)
    });
    let single_places = vec![normal(&[3, 4], 213), normal(&[2, 1, 4], 214), ints(&[2, 0], &[2])];
    add("scatter by setting", single_places, |x| {
        one(x[0].sin()?.scatter(ScatterOp::Set, &[&x[2]], &[0], &x[1].square()?)?)
    });
    add(
        "put_along_axis",
        vec![normal(&[2, 4], 215), ints(&[3, 0, 1, 2], &[2, 2]), normal(&[2, 2], 216)],
        |x| one(x[0].sin()?.put_along_axis(&x[1], &x[2].square()?, 1)?),
    );
    add("cumsum", vec![normal(&[2, 4], 217)], |x| {
        Ok(vec![x[0].square()?.cumsum(1, false, true)?, x[0].square()?.cumsum(0, true, false)?])
    });
    add("cumprod", vec![positive(&[2, 4], 218)], |x| one(x[0].cumprod(1, true, true)?));
    add("logcumsumexp", vec![normal(&[2, 4], 219)], |x| {
        Ok(vec![x[0].logcumsumexp(1, false, true)?, x[0].logcumsumexp(1, true, true)?])
    });
    add("sort", vec![normal(&[3, 4], 220)], |x| Ok(vec![x[0].square()?.sort(1)?, x[0].sin()?.sort(0)?]));
    add("as_strided", vec![normal(&[3, 4], 221)], |x| {
        one(x[0].square()?.as_strided(&[2, 3, 2], &[4, 2, 1], 1)?)
    });
    add("matmul", vec![normal(&[2, 3], 106), normal(&[3, 4], 107)], |x| one(x[0].matmul(&x[1])?));
    add("matmul of batches", vec![normal(&[2, 2, 3], 108), normal(&[2, 3, 2], 109)], |x| {
        one(x[0].matmul(&x[1])?)
    });
    add("matmul of a vector", vec![normal(&[3], 110), normal(&[3, 4], 111)], |x| one(x[0].matmul(&x[1])?));
    add("matmul with broadcasting", vec![normal(&[2, 2, 3], 112), normal(&[3, 2], 113)], |x| {
        one(x[0].matmul(&x[1])?)
    });
    add("linear", vec![normal(&[2, 3, 4], 114), normal(&[5, 4], 115), normal(&[5], 116)], |x| {
        one(x[0].linear(&x[1], Some(&x[2]), Precision::Exact)?)
    });
    let chosen = || ints(&[2, 0, 2, 1], &[2, 2]);
    add("gather_mm", vec![normal(&[2, 1, 3, 4], 171), normal(&[4, 4, 2], 172), chosen()], |x| {
        one(x[0].gather_mm(&x[1], None, Some(&x[2]), false)?)
    });
    add("gather_linear", vec![normal(&[2, 1, 3, 4], 173), normal(&[4, 2, 4], 174), chosen()], |x| {
        one(x[0].gather_linear(&x[1], None, Some(&x[2]), Precision::Exact)?)
    });
    add(
        "gather_linear of chosen rows",
        vec![normal(&[3, 1, 4], 175), normal(&[3, 2, 4], 176), chosen()],
        |x| {
            one(x[0].gather_linear(
                &x[1],
                Some(&x[2]),
                Some(&x[2].flatten()?.reshape(&[2, 2])?),
                Precision::Exact,
            )?)
        },
    );
    add("embedding", vec![normal(&[5, 3], 117), ints(&[4, 0, 4, 2], &[2, 2])], |x| {
        one(Array::embedding(&x[0].square()?, &x[1], x[0].dtype())?)
    });
    add("rms_norm", vec![normal(&[2, 3, 4], 118), normal(&[4], 119)], |x| one(x[0].rms_norm(&x[1], 1e-5)?));
    add("layer_norm", vec![normal(&[2, 4], 120), normal(&[4], 121), normal(&[4], 122)], |x| {
        one(x[0].layer_norm(&x[1], &x[2], 1e-5)?)
    });
    add("short_conv", vec![normal(&[2, 5, 3], 123), normal(&[3, 3], 124)], |x| {
        one(x[0].short_conv(&x[1], None, None)?.0)
    });
    add(
        "short_conv with a state",
        vec![normal(&[2, 4, 2], 125), normal(&[2, 3], 126), normal(&[2, 2, 2], 127)],
        |x| {
            let (y, next) = x[0].short_conv(&x[1], Some(&x[2]), None)?;
            Ok(vec![y, next])
        },
    );
    add(
        "short_conv of packed sequences",
        vec![normal(&[1, 5, 2], 128), normal(&[2, 3], 129), ints(&[0, 0, 2, 2, 4], &[1, 5])],
        |x| one(x[0].short_conv(&x[1], None, Some(&x[2]))?.0),
    );
    add("checkpoint", vec![normal(&[2, 3], 130), normal(&[3, 3], 131)], |x| {
        let inner = |y: &[Array]| Ok(vec![y[0].matmul(&x[1])?.tanh()?, y[0].square()?]);
        mica_array::transforms::checkpoint(inner, &x[..1])
    });
    let qkv = |seed| {
        vec![normal(&[2, 4, 4, 3], seed), normal(&[2, 4, 2, 3], seed + 1), normal(&[2, 4, 2, 3], seed + 2)]
    };
    add("attention", qkv(140), |x| one(x[0].attention(&x[1], &x[2], None, attention_spec())?));
    add("attention to all", qkv(143), |x| {
        one(x[0].attention(&x[1], &x[2], None, AttentionSpec { causal: false, ..attention_spec() })?)
    });
    add("attention in a window", qkv(146), |x| {
        one(x[0].attention(&x[1], &x[2], None, AttentionSpec { window: Some(2), ..attention_spec() })?)
    });
    add("attention with a soft cap", qkv(149), |x| {
        one(x[0].attention(&x[1], &x[2], None, AttentionSpec { softcap: Some(1.5), ..attention_spec() })?)
    });
    let mut packed = qkv(152);
    packed.push(ints(&[0, 0, 2, 2, 0, 1, 1, 0], &[2, 4]));
    add("attention over packed sequences", packed, |x| {
        one(x[0].attention(&x[1], &x[2], Some(&x[3]), attention_spec())?)
    });
    add("several outputs", vec![normal(&[2, 3], 160), normal(&[3], 161)], |x| {
        let sum = x[0].add(&x[1])?;
        Ok(vec![sum.exp()?, x[1].square()?, sum])
    });
    add("an input as it is", vec![normal(&[2], 162), normal(&[2], 163)], |x| {
        Ok(vec![x[1].clone(), x[0].clone()])
    });

    let mut single = |name, inputs, f: F| {
        cases.push(OpCase { name, inputs, f, differentiable: true, single: true });
    };
    for (name, f) in [
        ("rope of halves", (|x| one(x[0].rope(&x[1], &x[2], rope_spec(false, 4))?)) as F),
        ("rope of neighbours", |x| one(x[0].rope(&x[1], &x[2], rope_spec(true, 4))?)),
    ] {
        let frequencies = Array::from_slice(&[1.0f32, 0.3], &[2]).unwrap();
        single(name, vec![normal(&[2, 3, 2, 6], 170), ints(&[0, 1, 2, 5, 6, 7], &[2, 3]), frequencies], f);
    }
    single("linear_transposed", vec![normal(&[2, 5], 180), normal(&[5, 4], 181)], |x| {
        one(x[0].linear_transposed(&x[1], Precision::Exact)?)
    });
    for (name, f) in [
        (
            "linear_cross_entropy",
            (|x| {
                let spec = CrossEntropySpec { precision: Precision::Exact, softcap: None };
                let (sum, rows) = x[0].linear_cross_entropy(&x[1], &x[2], spec)?;
                Ok(vec![sum, rows])
            }) as F,
        ),
        ("linear_cross_entropy with a soft cap", |x| {
            let spec = CrossEntropySpec { precision: Precision::Exact, softcap: Some(3.0) };
            one(x[0].linear_cross_entropy(&x[1], &x[2], spec)?.0)
        }),
    ] {
        single(name, vec![normal(&[3, 4], 182), normal(&[6, 4], 183), ints(&[2, 0, 5], &[3])], f);
    }
    let f32s = |shape: &[usize], seed| positive(shape, seed).astype(Dtype::F32).unwrap();
    single(
        "adamw",
        vec![f32s(&[2, 3], 190), f32s(&[2, 3], 191), f32s(&[2, 3], 192), f32s(&[2, 3], 193)],
        |x| {
            let spec = AdamWSpec {
                lr: 0.1,
                beta1: 0.9,
                beta2: 0.95,
                eps: 1e-3,
                weight_decay: 0.1,
                step: 3,
                grad_scale: 0.5,
            };
            Ok(x[0].adamw(&x[1], &x[2], &x[3], spec)?.into())
        },
    );

    let mut constant = |name, inputs, f: F| {
        cases.push(OpCase { name, inputs, f, differentiable: false, single: false });
    };
    constant("comparisons", vec![normal(&[2, 3], 200), normal(&[3], 201)], |x| {
        Ok(vec![x[0].less(&x[1])?, x[0].equal(&x[1])?, x[0].greater_equal(&x[1])?])
    });
    constant("argsort", vec![normal(&[3, 4], 205)], |x| Ok(vec![x[0].argsort(1)?, x[0].argsort(0)?]));
    constant("logic", vec![bools(&[2, 3], 202), bools(&[3], 203)], |x| {
        Ok(vec![x[0].logical_and(&x[1])?, x[0].logical_or(&x[1])?, x[0].logical_not()?])
    });
    constant("all and any", vec![bools(&[2, 3], 204)], |x| {
        Ok(vec![x[0].all(&[1], false)?, x[0].any(&[0], true)?])
    });
    constant("argmax and argmin", vec![normal(&[2, 3, 2], 205)], |x| {
        Ok(vec![x[0].argmax(1, false)?, x[0].argmin(-1, true)?])
    });
    constant("integers", vec![ints(&[5, -3, 7, 2, -9, 1], &[2, 3]), ints(&[2, 3, -4], &[3])], |x| {
        Ok(vec![x[0].remainder(&x[1])?, x[0].floor_divide(&x[1])?, x[0].sum(&[0], false)?])
    });
    constant("bits", vec![ints(&[5, -3, 7, 2, -9, 1], &[2, 3]), ints(&[2, 3, 4], &[3])], |x| {
        Ok(vec![
            x[0].binary(BinaryOp::BitwiseAnd, &x[1])?,
            x[0].binary(BinaryOp::BitwiseOr, &x[1])?,
            x[0].binary(BinaryOp::BitwiseXor, &x[1])?,
            x[0].binary(BinaryOp::LeftShift, &x[1])?,
            x[0].binary(BinaryOp::RightShift, &x[1])?,
            x[0].unary(UnaryOp::BitwiseInvert)?,
        ])
    });
    constant("random bits", vec![Array::from_slice(&[3u32, 5], &[2]).unwrap()], |x| {
        Ok(vec![
            random::bits(&[2, 3], 4, &x[0])?,
            random::bits(&[5], 1, &x[0])?,
            random::split(&x[0], 3)?,
            random::uniform(0.0, 1.0, &[4], Dtype::F32, &x[0])?,
        ])
    });
    cases
}
