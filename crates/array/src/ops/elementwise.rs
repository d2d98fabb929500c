//! Elementwise ops: unary, binary, comparison, selection, cast.

pub(crate) mod jvp;
pub(crate) mod vmap;

use std::ops;
use std::panic::Location;

use mica_kernels::elementwise::complex;
use smallvec::smallvec;

use super::{Grads, Vjp};
use crate::dtype::{Complex32, promote};
use crate::op::{BinaryOp, CompareOp, Op, Scalar, UnaryOp, first_failure};
use crate::shape::{broadcast_shapes, same};
use crate::{Array, Dtype, Error, Result, Shape};

/// The right-hand side of a binary function: an array, or a number whose dtype gives way to the
/// array's, as a Python number's does.
pub trait Operand {
    /// The operand as an array, for an op with an array of dtype `other`.
    fn operand(&self, other: Dtype) -> Array;
}

impl Operand for Array {
    fn operand(&self, _: Dtype) -> Array {
        self.clone()
    }
}

impl<T: Operand + ?Sized> Operand for &T {
    fn operand(&self, other: Dtype) -> Array {
        (**self).operand(other)
    }
}

macro_rules! float_operand {
    ($($t:ty)*) => { $(
        impl Operand for $t {
            fn operand(&self, other: Dtype) -> Array {
                let dtype = if other.is_inexact() { other } else { Dtype::F32 };
                Array::scalar(Scalar::Float(*self as f64), dtype)
            }
        }
    )* };
}
float_operand!(f32 f64);

macro_rules! int_operand {
    ($($t:ty)*) => { $(
        impl Operand for $t {
            fn operand(&self, other: Dtype) -> Array {
                whole_number(*self as i128, other)
            }
        }
    )* };
}
int_operand!(i32 i64 u32 usize);

/// A whole number beside an array of dtype `other`; one that its integers do not reach is an error, as in MLX.
fn whole_number(value: i128, other: Dtype) -> Array {
    let dtype = if other == Dtype::Bool { Dtype::I32 } else { other };
    let bits = 8 * dtype.size() as u32;
    let fits = match dtype {
        // Of this type alone MLX takes negative numbers, which wrap.
        Dtype::U64 => true,
        Dtype::U8 | Dtype::U16 | Dtype::U32 => (0..1i128 << bits).contains(&value),
        Dtype::I8 | Dtype::I16 | Dtype::I32 | Dtype::I64 => {
            (-(1i128 << (bits - 1))..1i128 << (bits - 1)).contains(&value)
        }
        _ => true,
    };
    if !fits {
        let message = format!("the number {value} is none of {dtype}; cast the array to a wider type first");
        return Array::failed(Error::invalid("array", message), &[][..], dtype);
    }
    match i64::try_from(value) {
        Ok(value) if dtype != Dtype::U64 => Array::scalar(Scalar::Int(value), dtype),
        _ => Array::scalar(Scalar::UInt(value as u64), dtype),
    }
}

impl Operand for bool {
    fn operand(&self, _: Dtype) -> Array {
        Array::scalar(Scalar::Bool(*self), Dtype::Bool)
    }
}

impl Operand for Complex32 {
    fn operand(&self, _: Dtype) -> Array {
        let part = |value: f32| Array::full(&[], value as f64, Dtype::F32);
        Array::complex(&part(self.re), &part(self.im)).expect("two numbers are a complex one")
    }
}

fn float_result(dtype: Dtype) -> Dtype {
    if dtype.is_inexact() { dtype } else { Dtype::F32 }
}

impl Array {
    /// Applies a unary op. Functions of analysis turn integers into f32 first; the others keep
    /// the dtype.
    pub fn unary(&self, op: UnaryOp) -> Result<Array> {
        use UnaryOp::*;
        first_failure(&[self])?;
        let dtype = match op {
            Abs | Neg | Sign | Floor | Ceil | Round | Square | BitwiseInvert => self.dtype(),
            LogicalNot => Dtype::Bool,
            _ => float_result(self.dtype()),
        };
        if matches!(op, BitwiseInvert) && self.dtype().is_inexact() {
            return Err(Error::dtype("bitwise_invert", "an integer or bool array", self.dtype()));
        }
        if matches!(op, Neg) && self.dtype() == Dtype::Bool {
            return Err(Error::dtype("negative", "a number", self.dtype()));
        }
        if self.dtype() == Dtype::C64 && op != LogicalNot && complex::unary(op).is_none() {
            return Err(Error::dtype(op.name(), "real numbers", self.dtype()));
        }
        let input = match op {
            LogicalNot => self.astype(Dtype::Bool)?,
            _ => self.astype(dtype)?,
        };
        let result = Array::lazy(Op::Unary(op), smallvec![input], self.shape(), dtype);
        // The kernel gives a complex number without imaginary part.
        if (op, dtype) == (Abs, Dtype::C64) { result.real() } else { Ok(result) }
    }

    /// Applies a binary op, with promotion and broadcasting.
    pub fn binary(&self, op: BinaryOp, rhs: impl Operand) -> Result<Array> {
        use BinaryOp::*;
        let rhs = rhs.operand(self.dtype());
        first_failure(&[self, &rhs])?;
        let mut dtype = promote(self.dtype(), rhs.dtype());
        if dtype == Dtype::C64 && !op.is_logical() && complex::binary(op).is_none() {
            return Err(Error::dtype(op.name(), "real numbers", dtype));
        }
        match op {
            Divide | Atan2 | LogAddExp => dtype = float_result(dtype),
            LogicalAnd | LogicalOr => dtype = Dtype::Bool,
            LeftShift | RightShift if dtype == Dtype::Bool => dtype = Dtype::U8,
            BitwiseAnd | BitwiseOr | BitwiseXor | LeftShift | RightShift if dtype.is_inexact() => {
                return Err(Error::dtype(op.name(), "integer or bool arrays", dtype));
            }
            _ => {}
        }
        if dtype == self.dtype() && dtype == rhs.dtype() && same(self.shape(), rhs.shape()) {
            let shape = Shape::from_slice(self.shape());
            return Ok(Array::lazy(Op::Binary(op), smallvec![self.clone(), rhs], shape, dtype));
        }
        let shape = broadcast_shapes(op.name(), self.shape(), rhs.shape())?;
        let inputs = smallvec![self.clone().brought_to(dtype, &shape)?, rhs.brought_to(dtype, &shape)?];
        Ok(Array::lazy(Op::Binary(op), inputs, shape, dtype))
    }

    /// Compares, with promotion and broadcasting; the result is bool.
    pub fn compare(&self, op: CompareOp, rhs: impl Operand) -> Result<Array> {
        let rhs = rhs.operand(self.dtype());
        first_failure(&[self, &rhs])?;
        let dtype = promote(self.dtype(), rhs.dtype());
        let shape = broadcast_shapes(op.name(), self.shape(), rhs.shape())?;
        let inputs = smallvec![self.clone().brought_to(dtype, &shape)?, rhs.brought_to(dtype, &shape)?];
        Ok(Array::lazy(Op::Compare(op), inputs, shape, Dtype::Bool))
    }

    /// The handle itself, where it has the dtype and the shape already: small ops are cheap.
    fn brought_to(self, dtype: Dtype, shape: &[usize]) -> Result<Array> {
        let cast = if self.dtype() == dtype { self } else { self.astype(dtype)? };
        if same(cast.shape(), shape) { Ok(cast) } else { cast.broadcast_to(shape) }
    }

    /// Where `condition` holds this array's values, elsewhere `other`'s.
    pub fn select(condition: &Array, a: &Array, b: impl Operand) -> Result<Array> {
        let b = b.operand(a.dtype());
        first_failure(&[condition, a, &b])?;
        let dtype = promote(a.dtype(), b.dtype());
        let shape = broadcast_shapes("where", condition.shape(), a.shape())?;
        let shape = broadcast_shapes("where", &shape, b.shape())?;
        let inputs = smallvec![
            condition.clone().brought_to(Dtype::Bool, &shape)?,
            a.clone().brought_to(dtype, &shape)?,
            b.brought_to(dtype, &shape)?,
        ];
        Ok(Array::lazy(Op::Select, inputs, shape, dtype))
    }

    /// The values in another dtype.
    pub fn astype(&self, dtype: Dtype) -> Result<Array> {
        if dtype == self.dtype() {
            return Ok(self.clone());
        }
        first_failure(&[self])?;
        Ok(Array::lazy(Op::Cast, smallvec![self.clone()], self.shape(), dtype))
    }

    /// The same values, as a constant to gradients.
    pub fn stop_gradient(&self) -> Result<Array> {
        first_failure(&[self])?;
        Ok(Array::lazy(Op::StopGradient, smallvec![self.clone()], self.shape(), self.dtype()))
    }
}

macro_rules! unary_methods {
    ($($(#[$doc:meta])* $name:ident => $op:ident;)*) => {
        impl Array { $(
            $(#[$doc])*
            pub fn $name(&self) -> Result<Array> {
                self.unary(UnaryOp::$op)
            }
        )* }
    };
}
pub(super) use unary_methods;

unary_methods! {
    /// |x|
    abs => Abs;
    /// −x
    negative => Neg;
    /// −1, 0 or 1
    sign => Sign;
    /// Largest integer not above x.
    floor => Floor;
    /// Smallest integer not below x.
    ceil => Ceil;
    /// Nearest integer, ties to even.
    round => Round;
    /// √x
    sqrt => Sqrt;
    /// 1/√x
    rsqrt => Rsqrt;
    /// x²
    square => Square;
    /// 1/x
    reciprocal => Reciprocal;
    /// eˣ
    exp => Exp;
    /// eˣ − 1
    expm1 => Expm1;
    /// Natural logarithm.
    log => Log;
    /// Logarithm to base 2.
    log2 => Log2;
    /// Logarithm to base 10.
    log10 => Log10;
    /// log(1 + x)
    log1p => Log1p;
    /// Sine.
    sin => Sin;
    /// Cosine.
    cos => Cos;
    /// Hyperbolic tangent.
    tanh => Tanh;
    /// Error function.
    erf => Erf;
    /// 1 / (1 + e⁻ˣ)
    sigmoid => Sigmoid;
    /// x · sigmoid(x)
    silu => Silu;
    /// Gaussian error linear unit, by erf.
    gelu => GeluErf;
    /// Gaussian error linear unit, by tanh.
    gelu_tanh => GeluTanh;
    /// log(1 + eˣ)
    softplus => Softplus;
    /// not x
    logical_not => LogicalNot;
}

macro_rules! binary_methods {
    ($($(#[$doc:meta])* $name:ident => $op:ident;)*) => {
        impl Array { $(
            $(#[$doc])*
            pub fn $name(&self, rhs: impl Operand) -> Result<Array> {
                self.binary(BinaryOp::$op, rhs)
            }
        )* }
    };
}
pub(super) use binary_methods;

binary_methods! {
    /// a + b
    add => Add;
    /// a − b
    subtract => Subtract;
    /// a · b
    multiply => Multiply;
    /// a / b; integers become f32.
    divide => Divide;
    /// aᵇ
    power => Power;
    /// The sign of the divisor, as Python's `%`.
    remainder => Remainder;
    /// ⌊a / b⌋
    floor_divide => FloorDivide;
    /// The larger; NaN wins.
    maximum => Maximum;
    /// The smaller; NaN wins.
    minimum => Minimum;
    /// log(eᵃ + eᵇ)
    logaddexp => LogAddExp;
    /// a and b
    logical_and => LogicalAnd;
    /// a or b
    logical_or => LogicalOr;
}

macro_rules! compare_methods {
    ($($(#[$doc:meta])* $name:ident => $op:ident;)*) => {
        impl Array { $(
            $(#[$doc])*
            pub fn $name(&self, rhs: impl Operand) -> Result<Array> {
                self.compare(CompareOp::$op, rhs)
            }
        )* }
    };
}
compare_methods! {
    /// a = b
    equal => Eq;
    /// a ≠ b
    not_equal => Ne;
    /// a < b
    less => Lt;
    /// a ≤ b
    less_equal => Le;
    /// a > b
    greater => Gt;
    /// a ≥ b
    greater_equal => Ge;
}

#[track_caller]
fn or_failed(result: Result<Array>, like: &Array) -> Array {
    let place = Location::caller();
    result.unwrap_or_else(|error| {
        let error = match error {
            already @ Error::Operator { .. } => already,
            error => Error::Operator { error: Box::new(error), place },
        };
        Array::failed(error, like.shape(), like.dtype())
    })
}

/// Operators build the node that the method builds. What they can't build is a node that holds
/// the error and its place; it surfaces, once, at `eval`.
macro_rules! operators {
    ($($trait:ident $name:ident $method:ident;)*) => { $(
        impl<R: Operand> ops::$trait<R> for &Array {
            type Output = Array;
            #[track_caller]
            fn $name(self, rhs: R) -> Array {
                or_failed(Array::$method(self, rhs), self)
            }
        }

        impl<R: Operand> ops::$trait<R> for Array {
            type Output = Array;
            #[track_caller]
            fn $name(self, rhs: R) -> Array {
                or_failed(Array::$method(&self, rhs), &self)
            }
        }
    )* };
}
operators! {
    Add add add;
    Sub sub subtract;
    Mul mul multiply;
    Div div divide;
    Rem rem remainder;
}

impl ops::Neg for &Array {
    type Output = Array;
    #[track_caller]
    fn neg(self) -> Array {
        or_failed(self.negative(), self)
    }
}

pub(crate) fn unary_vjp(op: UnaryOp, rule: &Vjp) -> Result<Grads> {
    use UnaryOp::*;
    let (x, y, ct) = (&rule.inputs[0], &rule.values(0), rule.cotangent());
    let grad = match op {
        Abs => ct.multiply(x.sign()?)?,
        Neg => ct.negative()?,
        Sign | Floor | Ceil | Round | LogicalNot | BitwiseInvert => return rule.none(),
        Sqrt => ct.multiply(0.5)?.divide(y)?,
        Rsqrt => ct.multiply(-0.5)?.multiply(y.square()?.multiply(y)?)?,
        Square => ct.multiply(x.multiply(2.0)?)?,
        Reciprocal => ct.multiply(y.square()?)?.negative()?,
        Exp => ct.multiply(y)?,
        Expm1 => ct.multiply(y.add(1.0)?)?,
        Log => ct.divide(x)?,
        Log2 => ct.divide(x.multiply(std::f64::consts::LN_2)?)?,
        Log10 => ct.divide(x.multiply(std::f64::consts::LN_10)?)?,
        Log1p => ct.divide(x.add(1.0)?)?,
        Sin => ct.multiply(x.cos()?)?,
        Cos => ct.multiply(x.sin()?)?.negative()?,
        Tan => ct.multiply(y.square()?.add(1.0)?)?,
        Arcsin => ct.multiply(one_minus_square(x)?.rsqrt()?)?,
        Arccos => ct.multiply(one_minus_square(x)?.rsqrt()?)?.negative()?,
        Arctan => ct.divide(x.square()?.add(1.0)?)?,
        Sinh => ct.multiply(x.unary(Cosh)?)?,
        Cosh => ct.multiply(x.unary(Sinh)?)?,
        Tanh => ct.multiply(one_minus_square(y)?)?,
        Arcsinh => ct.multiply(x.square()?.add(1.0)?.rsqrt()?)?,
        Arccosh => ct.multiply(x.square()?.subtract(1.0)?.rsqrt()?)?,
        Arctanh => ct.divide(one_minus_square(x)?)?,
        Erf => {
            let slope = x.square()?.negative()?.exp()?.multiply(std::f64::consts::FRAC_2_SQRT_PI)?;
            ct.multiply(slope)?
        }
        ErfInv => {
            let slope = y.square()?.exp()?.multiply(1.0 / std::f64::consts::FRAC_2_SQRT_PI)?;
            ct.multiply(slope)?
        }
        Sigmoid => ct.multiply(y.multiply(y.negative()?.add(1.0)?)?)?,
        Silu => {
            // σ(x) · (1 + x · (1 − σ(x)))
            let sigmoid = x.sigmoid()?;
            let rest = sigmoid.negative()?.add(1.0)?.multiply(x)?.add(1.0)?;
            ct.multiply(sigmoid.multiply(rest)?)?
        }
        GeluErf => {
            // Φ(x) + x · φ(x)
            let cdf = x.multiply(std::f64::consts::FRAC_1_SQRT_2)?.erf()?.add(1.0)?.multiply(0.5)?;
            let pdf =
                x.square()?.multiply(-0.5)?.exp()?.multiply(1.0 / (2.0 * std::f64::consts::PI).sqrt())?;
            ct.multiply(cdf.add(x.multiply(pdf)?)?)?
        }
        GeluTanh => {
            let c = (2.0 / std::f64::consts::PI).sqrt();
            let square = x.square()?;
            let inner = square.multiply(0.044715)?.add(1.0)?.multiply(x)?.multiply(c)?;
            let tanh = inner.tanh()?;
            let slope = square.multiply(3.0 * 0.044715)?.add(1.0)?.multiply(c)?;
            let left = tanh.add(1.0)?.multiply(0.5)?;
            let right = one_minus_square(&tanh)?.multiply(slope)?.multiply(x)?.multiply(0.5)?;
            ct.multiply(left.add(right)?)?
        }
        Softplus => ct.multiply(x.sigmoid()?)?,
    };
    rule.one(grad)
}

fn one_minus_square(x: &Array) -> Result<Array> {
    x.square()?.negative()?.add(1.0)
}

pub(crate) fn binary_vjp(op: BinaryOp, rule: &Vjp) -> Result<Grads> {
    use BinaryOp::*;
    let (a, b, y, ct) = (&rule.inputs[0], &rule.inputs[1], &rule.values(0), rule.cotangent());
    let want = |index: usize, grad: &dyn Fn() -> Result<Array>| -> Result<Option<Array>> {
        if rule.needs[index] { grad().map(Some) } else { Ok(None) }
    };
    let pair: [Option<Array>; 2] = match op {
        Add => [want(0, &|| Ok(ct.clone()))?, want(1, &|| Ok(ct.clone()))?],
        Subtract => [want(0, &|| Ok(ct.clone()))?, want(1, &|| ct.negative())?],
        Multiply => [want(0, &|| ct.multiply(b))?, want(1, &|| ct.multiply(a))?],
        Divide => [want(0, &|| ct.divide(b))?, want(1, &|| ct.multiply(y)?.divide(b)?.negative())?],
        Power => [
            want(0, &|| ct.multiply(b)?.multiply(a.power(b.subtract(1.0)?)?))?,
            want(1, &|| {
                // 0ᵇ has the slope 0, not 0 · −∞.
                let log = Array::select(&a.equal(0.0)?, &a.multiply(0.0)?, a.log()?)?;
                ct.multiply(y)?.multiply(log)
            })?,
        ],
        Maximum => [
            want(0, &|| ct.multiply(a.greater(b)?.astype(ct.dtype())?))?,
            want(1, &|| ct.multiply(a.less_equal(b)?.astype(ct.dtype())?))?,
        ],
        Minimum => [
            want(0, &|| ct.multiply(a.less(b)?.astype(ct.dtype())?))?,
            want(1, &|| ct.multiply(a.greater_equal(b)?.astype(ct.dtype())?))?,
        ],
        Remainder => {
            [want(0, &|| Ok(ct.clone()))?, want(1, &|| ct.multiply(a.floor_divide(b)?)?.negative())?]
        }
        Atan2 => {
            let norm = || a.square()?.add(b.square()?);
            [
                want(0, &|| ct.multiply(b)?.divide(norm()?))?,
                want(1, &|| ct.multiply(a)?.divide(norm()?)?.negative())?,
            ]
        }
        LogAddExp => [
            want(0, &|| ct.multiply(a.subtract(y)?.exp()?))?,
            want(1, &|| ct.multiply(b.subtract(y)?.exp()?))?,
        ],
        FloorDivide | BitwiseAnd | BitwiseOr | BitwiseXor | LeftShift | RightShift | LogicalAnd
        | LogicalOr => {
            return rule.none();
        }
    };
    Ok(pair.into_iter().collect())
}

pub(crate) fn select_vjp(rule: &Vjp) -> Result<Grads> {
    let (condition, ct) = (&rule.inputs[0], rule.cotangent());
    let zero = Array::scalar(Scalar::Float(0.0), ct.dtype());
    Ok(smallvec![
        None,
        Some(Array::select(condition, ct, &zero)?),
        Some(Array::select(condition, &zero, ct)?),
    ])
}

pub(crate) fn cast_vjp(rule: &Vjp) -> Result<Grads> {
    let to = rule.inputs[0].dtype();
    if !to.is_inexact() {
        return rule.none();
    }
    rule.one(rule.cotangent().astype(to)?)
}
