//! A case as a call of mica's functions.

use mica_array::{Array, Dtype, Index, PadMode, Result, Side};
use serde_json::Value;

use crate::cases::Case;

/// The arguments of a case, under MLX's names.
struct Args<'a>(&'a Value);

impl Args<'_> {
    fn int(&self, name: &str) -> i64 {
        self.0[name].as_i64().unwrap_or_else(|| panic!("{name} of {}", self.0))
    }

    fn int_or(&self, name: &str, default: i64) -> i64 {
        self.0.get(name).map_or(default, |_| self.int(name))
    }

    fn float(&self, name: &str) -> f64 {
        self.0[name].as_f64().unwrap_or_else(|| panic!("{name} of {}", self.0))
    }

    fn flag(&self, name: &str) -> bool {
        self.0[name].as_bool().unwrap_or_else(|| panic!("{name} of {}", self.0))
    }

    fn flag_or(&self, name: &str, default: bool) -> bool {
        self.0.get(name).map_or(default, |_| self.flag(name))
    }

    fn text(&self, name: &str) -> &str {
        self.0[name].as_str().unwrap_or_else(|| panic!("{name} of {}", self.0))
    }

    /// One number, or a list of them; none for null.
    fn ints(&self, name: &str) -> Vec<i64> {
        match &self.0[name] {
            Value::Null => Vec::new(),
            Value::Array(list) => list.iter().map(|value| value.as_i64().unwrap()).collect(),
            value => vec![value.as_i64().unwrap()],
        }
    }

    fn axes(&self, name: &str) -> Vec<i32> {
        self.ints(name).into_iter().map(|axis| axis as i32).collect()
    }

    fn sizes(&self, name: &str) -> Vec<usize> {
        self.ints(name).into_iter().map(|size| size as usize).collect()
    }

    /// `None` for null.
    fn axis(&self) -> Option<i32> {
        self.0["axis"].as_i64().map(|axis| axis as i32)
    }

    fn dtype(&self) -> Dtype {
        Dtype::from_name(self.text("dtype")).unwrap()
    }

    fn index(&self, used: &[Array]) -> Vec<Index> {
        let bound = |value: &Value| value.as_i64();
        let entry = |item: &Value| match item {
            Value::Null => Index::NewAxis,
            Value::String(_) => Index::Ellipsis,
            Value::Number(at) => Index::At(at.as_i64().unwrap()),
            Value::Object(object) => match object.get("slice") {
                Some(slice) => {
                    Index::stepped(bound(&slice[0]), bound(&slice[1]), bound(&slice[2]).unwrap_or(1))
                }
                None => Index::from(&used[object["array"].as_u64().unwrap() as usize - 1]),
            },
            other => panic!("index {other}"),
        };
        self.0["index"].as_array().unwrap().iter().map(entry).collect()
    }
}

pub(crate) fn call(case: &Case) -> Result<Vec<Array>> {
    let args = Args(&case.args);
    let mut inputs = case.inputs.clone();
    // The cases of this label store their first input transposed.
    if case.name.contains(" turned of ") {
        inputs[0] = inputs[0].transpose(&[])?;
    }
    let inputs = inputs.as_slice();
    // The cases of this label call the function on a view.
    let strided = case.name.contains(" strided of ");
    let turned =
        |x: &Array| x.transpose(&[])?.index(&[Index::stepped(None, None, 2), Index::stepped(None, None, -1)]);
    let x = || inputs[0].clone();
    let pair = |(a, b): (Array, Array)| vec![a, b];
    let keep = || args.flag_or("keepdims", false);
    let one = |result: Result<Array>| Ok(vec![result?]);
    let ddof = || args.int_or("ddof", 0) as usize;
    let run = |f: fn(&Array, Option<i32>, bool, bool) -> Result<Array>| {
        let x = reductions_view(&inputs[0], strided)?;
        f(&x, args.axis(), args.flag_or("reverse", false), args.flag_or("inclusive", true))
    };
    let reduced = |f: fn(&Array, &[i32], bool) -> Result<Array>| {
        f(&reductions_view(&inputs[0], strided)?, &args.axes("axis"), keep())
    };
    let unary: Option<fn(&Array) -> Result<Array>> = match case.op.as_str() {
        "abs" => Some(Array::abs),
        "negative" => Some(Array::negative),
        "sign" => Some(Array::sign),
        "floor" => Some(Array::floor),
        "ceil" => Some(Array::ceil),
        "trunc" => Some(Array::trunc),
        "sqrt" => Some(Array::sqrt),
        "rsqrt" => Some(Array::rsqrt),
        "square" => Some(Array::square),
        "reciprocal" => Some(Array::reciprocal),
        "exp" => Some(Array::exp),
        "expm1" => Some(Array::expm1),
        "log" => Some(Array::log),
        "log2" => Some(Array::log2),
        "log10" => Some(Array::log10),
        "log1p" => Some(Array::log1p),
        "sin" => Some(Array::sin),
        "cos" => Some(Array::cos),
        "tan" => Some(Array::tan),
        "arcsin" => Some(Array::arcsin),
        "arccos" => Some(Array::arccos),
        "arctan" => Some(Array::arctan),
        "sinh" => Some(Array::sinh),
        "cosh" => Some(Array::cosh),
        "tanh" => Some(Array::tanh),
        "arcsinh" => Some(Array::arcsinh),
        "arccosh" => Some(Array::arccosh),
        "arctanh" => Some(Array::arctanh),
        "erf" => Some(Array::erf),
        "erfinv" => Some(Array::erfinv),
        "sigmoid" => Some(Array::sigmoid),
        "logical_not" => Some(Array::logical_not),
        "bitwise_invert" => Some(Array::bitwise_invert),
        "isnan" => Some(Array::isnan),
        "isinf" => Some(Array::isinf),
        "isposinf" => Some(Array::isposinf),
        "isneginf" => Some(Array::isneginf),
        "isfinite" => Some(Array::isfinite),
        "real" => Some(Array::real),
        "imag" => Some(Array::imag),
        "conjugate" => Some(Array::conjugate),
        "degrees" => Some(Array::degrees),
        "radians" => Some(Array::radians),
        "positive" => Some(Array::positive),
        "atleast_1d" => Some(Array::atleast_1d),
        "atleast_2d" => Some(Array::atleast_2d),
        "atleast_3d" => Some(Array::atleast_3d),
        "matrix_transpose" => Some(Array::matrix_transpose),
        _ => None,
    };
    if let Some(f) = unary {
        return one(if strided { f(&turned(&x())?) } else { f(&x()) });
    }
    let binary: Option<fn(&Array, &Array) -> Result<Array>> = match case.op.as_str() {
        "add" => Some(|a, b| a.add(b)),
        "subtract" => Some(|a, b| a.subtract(b)),
        "multiply" => Some(|a, b| a.multiply(b)),
        "divide" => Some(|a, b| a.divide(b)),
        "floor_divide" => Some(|a, b| a.floor_divide(b)),
        "remainder" => Some(|a, b| a.remainder(b)),
        "power" => Some(|a, b| a.power(b)),
        "maximum" => Some(|a, b| a.maximum(b)),
        "minimum" => Some(|a, b| a.minimum(b)),
        "logaddexp" => Some(|a, b| a.logaddexp(b)),
        "arctan2" => Some(|a, b| a.arctan2(b)),
        "equal" => Some(|a, b| a.equal(b)),
        "not_equal" => Some(|a, b| a.not_equal(b)),
        "less" => Some(|a, b| a.less(b)),
        "less_equal" => Some(|a, b| a.less_equal(b)),
        "greater" => Some(|a, b| a.greater(b)),
        "greater_equal" => Some(|a, b| a.greater_equal(b)),
        "logical_and" => Some(|a, b| a.logical_and(b)),
        "logical_or" => Some(|a, b| a.logical_or(b)),
        "logical_xor" => Some(|a, b| a.logical_xor(b)),
        "bitwise_and" => Some(|a, b| a.bitwise_and(b)),
        "bitwise_or" => Some(|a, b| a.bitwise_or(b)),
        "bitwise_xor" => Some(|a, b| a.bitwise_xor(b)),
        "left_shift" => Some(|a, b| a.left_shift(b)),
        "right_shift" => Some(|a, b| a.right_shift(b)),
        _ => None,
    };
    if let Some(f) = binary {
        return one(if strided { f(&turned(&x())?, &inputs[1]) } else { f(&x(), &inputs[1]) });
    }
    match case.op.as_str() {
        "round" => one(x().round_to(args.int_or("decimals", 0) as i32)),
        "divmod" => Ok(pair(x().divmod(&inputs[1])?)),
        "where" => one(Array::select(&inputs[0], &inputs[1], &inputs[2])),
        "clip" => match args.0["a_min"].as_i64() {
            Some(low) => one(x().clip(low, args.int("a_max"))),
            None => one(x().clip(args.float("a_min"), args.float("a_max"))),
        },
        "nan_to_num" => one(x().nan_to_num(
            args.0.get("nan").map_or(0.0, |_| args.float("nan")),
            args.0["posinf"].as_f64(),
            args.0["neginf"].as_f64(),
        )),
        "isclose" => {
            one(x().isclose(&inputs[1], args.float("rtol"), args.float("atol"), args.flag("equal_nan")))
        }
        "allclose" => {
            one(x().allclose(&inputs[1], args.float("rtol"), args.float("atol"), args.flag("equal_nan")))
        }
        "array_equal" => one(x().array_equal(&inputs[1], args.flag("equal_nan"))),
        "astype" => one(x().astype(args.dtype())),
        "view" => one(if strided { x().transpose(&[])?.view(args.dtype()) } else { x().view(args.dtype()) }),
        "sum" => one(reduced(Array::sum)),
        "prod" => one(reduced(Array::prod)),
        "min" => one(reduced(Array::min)),
        "max" => one(reduced(Array::max)),
        "mean" => one(reduced(Array::mean)),
        "all" => one(reduced(Array::all)),
        "any" => one(reduced(Array::any)),
        "median" => one(reduced(Array::median)),
        "count_nonzero" => one(reduced(Array::count_nonzero)),
        "logsumexp" => one(reduced(Array::logsumexp_axes)),
        "minmax" => Ok(pair(x().minmax(&args.axes("axis"), keep())?)),
        "var" => one(x().var(&args.axes("axis"), keep(), ddof())),
        "std" => one(x().std(&args.axes("axis"), keep(), ddof())),
        "argmax" => one(reductions_view(&x(), strided)?.argmax(args.axis(), keep())),
        "argmin" => one(x().argmin(args.axis(), keep())),
        "softmax" => one(x().softmax_axes(&args.axes("axis"))),
        "cumsum" => one(run(|x, a, r, i| x.cumsum(a, r, i))),
        "cumprod" => one(run(|x, a, r, i| x.cumprod(a, r, i))),
        "cummax" => one(run(|x, a, r, i| x.cummax(a, r, i))),
        "cummin" => one(run(|x, a, r, i| x.cummin(a, r, i))),
        "logcumsumexp" => one(run(|x, a, r, i| x.logcumsumexp(a, r, i))),
        "sort" => one(reductions_view(&x(), strided)?.sort(args.axis())),
        "argsort" => one(reductions_view(&x(), strided)?.argsort(args.axis())),
        // Orders that MLX leaves open were closed when the case was made.
        "topk" => one(x().topk(args.int("k") as usize, args.axis())?.sort(args.axis())),
        "partition" if case.outputs.is_none() => one(x().partition(args.int("kth"), args.axis())),
        "partition" => {
            let kth = Array::from_slice(&[args.int("kth")], &[])?;
            one(x().partition(args.int("kth"), args.axis())?.take(&kth, args.axis()))
        }
        "argpartition" => {
            let kth = Array::from_slice(&[args.int("kth")], &[])?;
            let places = x().argpartition(args.int("kth"), args.axis())?;
            one(x().take_along_axis(&places, args.axis())?.take(&kth, args.axis()))
        }
        "diff" => one(x().diff(args.int("n") as usize, args.axis().unwrap())),
        "vecdot" => one(x().vecdot(&inputs[1], args.axis().unwrap())),
        "trace" => {
            one(x().trace(args.int("offset"), args.int("axis1") as i32, args.int("axis2") as i32, None))
        }
        "unique" => {
            let fill = args.0["fill_value"].as_i64().map(|value| Array::from_slice(&[value], &[]).unwrap());
            let unique = x().unique(args.int("size") as usize, fill.as_ref())?;
            Ok(vec![unique.values, unique.index, unique.inverse, unique.counts])
        }
        "searchsorted" => {
            let side = if args.text("side") == "left" { Side::Left } else { Side::Right };
            one(x().searchsorted(&inputs[1], side))
        }
        "pad" => {
            let widths: Vec<(usize, usize)> = serde_json::from_value(args.0["pad_width"].clone()).unwrap();
            let mode = match args.0["mode"].as_str() {
                None => PadMode::Constant(args.float("constant_values")),
                Some("edge") => PadMode::Edge,
                Some("reflect") => PadMode::Reflect,
                Some("symmetric") => PadMode::Symmetric,
                Some(other) => panic!("mode {other}"),
            };
            one(x().pad(&widths, mode))
        }
        "tile" => one(x().tile(&args.sizes("reps"))),
        "repeat" => one(x().repeat(args.int("repeats") as usize, args.axis())),
        "roll" => one(x().roll(&args.ints("shift"), &args.axes("axis"))),
        "split" => match &args.0["indices_or_sections"] {
            Value::Array(_) => x().split_at(&args.ints("indices_or_sections"), args.axis().unwrap()),
            _ => x().split(args.int("indices_or_sections") as usize, args.axis().unwrap()),
        },
        "stack" => one(Array::stack(inputs, args.axis().unwrap())),
        "concatenate" => one(Array::concatenate(inputs, args.axis().unwrap())),
        "moveaxis" => one(x().moveaxis(args.int("source") as i32, args.int("destination") as i32)),
        "swapaxes" => one(x().swap_axes(args.int("axis1") as i32, args.int("axis2") as i32)),
        "transpose" => one(x().transpose(&args.axes("axes"))),
        "flip" => one(x().flip(&args.axes("axis"))),
        "unstack" => x().unstack(args.axis().unwrap()),
        "unflatten" => one(x().unflatten(args.axis().unwrap(), &args.ints("shape"))),
        "flatten" => one(x().flatten_axes(args.int("start_axis") as i32, args.int("end_axis") as i32)),
        "squeeze" => one(x().squeeze(&args.axes("axis"))),
        "expand_dims" => one(x().expand_dims(&args.axes("axis"))),
        "broadcast_to" => one(x().broadcast_to(&args.sizes("shape"))),
        "broadcast_arrays" => Array::broadcast_arrays(inputs),
        "diagonal" => {
            one(x().diagonal(args.int("offset"), args.int("axis1") as i32, args.int("axis2") as i32))
        }
        "diag" => one(x().diag(args.int("k"))),
        "tril" => one(x().tril(args.int("k"))),
        "triu" => one(x().triu(args.int("k"))),
        "eye" => one(Array::eye(args.int("n") as usize, args.int("m") as usize, args.int("k"), Dtype::F32)),
        "tri" => one(Array::tri(args.int("n") as usize, args.int("m") as usize, args.int("k"), Dtype::F32)),
        "identity" => one(Array::identity(args.int("n") as usize, Dtype::F32)),
        "arange" => {
            let whole = ["start", "stop", "step"].iter().all(|name| args.0[*name].is_i64());
            let dtype = if whole { Dtype::I32 } else { Dtype::F32 };
            one(Array::arange(args.float("start"), args.float("stop"), args.float("step"), dtype))
        }
        "linspace" => {
            let dtype = args.0.get("dtype").map_or(Dtype::F32, |_| args.dtype());
            let endpoint = args.flag_or("endpoint", true);
            let (start, stop) = (args.float("start"), args.float("stop"));
            one(Array::linspace(start, stop, args.int("num") as usize, endpoint, dtype))
        }
        "bartlett" => one(Array::bartlett(args.int("M") as usize)),
        "hanning" => one(Array::hanning(args.int("M") as usize)),
        "hamming" => one(Array::hamming(args.int("M") as usize)),
        "blackman" => one(Array::blackman(args.int("M") as usize)),
        "meshgrid" => Array::meshgrid(inputs, args.flag("sparse"), args.text("indexing") == "ij"),
        "as_strided" => {
            let x = if strided { x().transpose(&[])? } else { x() };
            one(x.as_strided(&args.sizes("shape"), &args.ints("strides"), args.int("offset") as usize))
        }
        "getitem" => one(x().index(&args.index(&inputs[1..]))),
        "update" => {
            let index = args.index(&inputs[2..]);
            let (x, value) = (x(), &inputs[1]);
            let at = x.at(&index);
            one(match args.text("how") {
                "set" => at.set(value),
                "add" => at.add(value),
                "subtract" => at.subtract(value),
                "multiply" => at.multiply(value),
                "divide" => at.divide(value),
                "maximum" => at.maximum(value),
                "minimum" => at.minimum(value),
                other => panic!("at.{other}"),
            })
        }
        "setitem_mask" => one(x().masked_update(&inputs[1], &inputs[2])),
        "take" => one(x().take(&inputs[1], args.axis())),
        "take_along_axis" => one(x().take_along_axis(&inputs[1], args.axis())),
        "put_along_axis" => one(x().put_along_axis(&inputs[1], &inputs[2], args.axis())),
        "slice" => one(x().dynamic_slice(&inputs[1], &args.axes("axes"), &args.sizes("slice_size"))),
        "slice_update" => one(x().dynamic_slice_update(&inputs[1], &inputs[2], &args.axes("axes"))),
        other => panic!("no call for {other}"),
    }
}

/// The view that the strided cases of reductions were made with.
fn reductions_view(x: &Array, strided: bool) -> Result<Array> {
    if !strided {
        return Ok(x.clone());
    }
    x.transpose(&[2, 0, 1])?.index(&[
        Index::stepped(None, None, 2),
        Index::ALL,
        Index::stepped(None, None, -1),
    ])
}
