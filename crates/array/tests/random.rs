//! Random numbers against `mlx` (fixtures/mlx/random): keys, bits, integers and choices exactly, floats
//! bit for bit where they are products of the same operations, else within roundings of `log` and
//! `erfinv`.

use mica_array::random::{self, Draws};
use mica_array::{Array, Dtype, Result};
use mica_testkit::{Golden, fixture};
use serde_json::Value;

fn dtype_of(name: &str) -> Dtype {
    match name {
        "f32" => Dtype::F32,
        "bf16" => Dtype::BF16,
        "f16" => Dtype::F16,
        "i32" => Dtype::I32,
        "i64" => Dtype::I64,
        "u8" => Dtype::U8,
        other => panic!("dtype {other}"),
    }
}

fn draw(case: &Value, golden: &Golden) -> Result<Array> {
    let int = |key: &str| case[key].as_u64().map(|value| value as usize);
    let number = |key: &str| case[key].as_f64();
    let shape: Vec<usize> = case["shape"]
        .as_array()
        .map_or(Vec::new(), |list| list.iter().map(|n| n.as_u64().unwrap() as usize).collect());
    let dtype = || dtype_of(case["dtype"].as_str().unwrap());
    let key = random::key(case["seed"].as_u64().unwrap())?;
    match case["fn"].as_str().unwrap() {
        "key" => Ok(key),
        "split" => random::split(&key, int("num").unwrap()),
        "bits" => random::bits(&shape, int("width").unwrap(), &key),
        "uniform" => random::uniform(number("low").unwrap(), number("high").unwrap(), &shape, dtype(), &key),
        "normal" => {
            let value = |name: &str| number(name).map(|value| Array::full(&[], value, Dtype::F32));
            random::normal_with(&shape, dtype(), value("loc").as_ref(), value("scale").as_ref(), &key)
        }
        "gumbel" => random::gumbel(&shape, dtype(), &key),
        "truncated_normal" => {
            let (low, high) = (number("low").unwrap(), number("high").unwrap());
            random::truncated_normal(low, high, Some(&shape), dtype(), &key)
        }
        "laplace" => random::laplace(&shape, dtype(), number("loc").unwrap(), number("scale").unwrap(), &key),
        "randint" => {
            let (low, high) = (case["low"].as_i64().unwrap(), case["high"].as_i64().unwrap());
            random::randint(low, high, &shape, dtype(), &key)
        }
        "bernoulli" => random::bernoulli(number("p").unwrap(), &shape, &key),
        "permutation" => match int("n") {
            Some(count) => random::permutation_of(count, &key),
            None => {
                let count: usize = shape.iter().product();
                let sizes: Vec<i64> = shape.iter().map(|&size| size as i64).collect();
                let x = Array::arange(0.0, count as f64, 1.0, Dtype::I32)?.reshape(&sizes)?;
                random::permutation(&x, case["axis"].as_i64().unwrap() as i32, &key)
            }
        },
        "categorical" => {
            let logits = Array::from_slice(&golden.f32s("logits"), golden.shape("logits"))?;
            let draws = match int("num_samples") {
                Some(count) => Draws::Many(count),
                None if !shape.is_empty() => Draws::Shape(&shape),
                None => Draws::One,
            };
            random::categorical(&logits, case["axis"].as_i64().unwrap() as i32, draws, &key)
        }
        other => panic!("function {other}"),
    }
}

/// By how many units in the last place a float may differ, and of which number at least: `log`, `erf`
/// and `erfinv` are mica's own. What ends in a logarithm, or starts from a bound's `erf`, has the error of
/// a number near one however small it is.
fn tolerance(function: &str) -> (f64, f64) {
    match function {
        "uniform" => (0.0, 0.0),
        "normal" => (16.0, 1e-3),
        // `erfinv` is steep towards the bounds.
        "truncated_normal" => (32.0, 1.0),
        _ => (8.0, 1.0),
    }
}

#[test]
fn numbers_are_those_of_mlx() {
    let golden = Golden::load(fixture("mlx/random.safetensors"));
    let text = std::fs::read_to_string(fixture("mlx/random.json")).unwrap();
    let file: Value = serde_json::from_str(&text).unwrap();
    let mut failures = Vec::new();
    let cases = file["cases"].as_array().unwrap();
    for case in cases {
        let (name, function) = (case["name"].as_str().unwrap(), case["fn"].as_str().unwrap());
        // The sequence of a seed has a test of its own.
        if function == "global" {
            continue;
        }
        let got = match draw(case, &golden).and_then(|x| x.eval().map(|()| x)) {
            Ok(got) => got,
            Err(error) => {
                failures.push(format!("{name}: {error}"));
                continue;
            }
        };
        if got.shape() != golden.shape(name) {
            failures.push(format!("{name}: shape {:?}, expected {:?}", got.shape(), golden.shape(name)));
            continue;
        }
        let unit = match got.dtype() {
            Dtype::F32 => 2f64.powi(-24),
            Dtype::F16 => 2f64.powi(-11),
            Dtype::BF16 => 2f64.powi(-8),
            _ => 0.0,
        };
        let values = got.astype(Dtype::F64).unwrap().to_vec::<f64>().unwrap();
        for (place, (&a, &e)) in values.iter().zip(&golden.f64s(name)).enumerate() {
            let (ulps, least) = tolerance(function);
            if a != e && (a - e).abs() > ulps * unit * e.abs().max(least) {
                failures.push(format!("{name}, element {place}: {a:e}, expected {e:e}"));
                break;
            }
        }
    }
    assert!(
        failures.is_empty(),
        "{} of {} cases differ:\n{}",
        failures.len(),
        cases.len(),
        failures.join("\n")
    );
}

#[test]
fn the_sequence_of_a_seed() {
    let golden = Golden::load(fixture("mlx/random.safetensors"));
    random::seed(7).unwrap();
    let floats = |name: &str, got: &Array| {
        mica_testkit::assert_close(name, &got.to_vec::<f32>().unwrap(), &golden.f32s(name), 1e-6, 1e-6);
    };
    floats("global.uniform_1", &random::uniform(0.0, 1.0, &[3], Dtype::F32, None).unwrap());
    floats("global.normal_2", &random::normal(&[4], Dtype::F32, None).unwrap());
    let saved = random::state().unwrap();
    let draw = || random::randint(0, 100, &[5], Dtype::I32, None).unwrap().to_vec::<i32>().unwrap();
    let first = draw();
    assert_eq!(first.iter().map(|&n| n as i64).collect::<Vec<_>>(), golden.i64s("global.randint_3"));
    assert_ne!(draw(), first, "each call draws another key");
    random::set_state(saved).unwrap();
    assert_eq!(draw(), first, "a saved state goes on where it was");
}

#[test]
fn several_normals_have_their_covariance() {
    let key = random::key(5).unwrap();
    let mean = Array::from_slice(&[1.0f32, -2.0], &[2]).unwrap();
    let covariance = Array::from_slice(&[2.0f32, 1.2, 1.2, 1.0], &[2, 2]).unwrap();
    let x = random::multivariate_normal(&mean, &covariance, Some(&[20_000]), &key).unwrap();
    assert_eq!(x.shape(), [20_000, 2]);
    let average = x.mean(&[0], false).unwrap();
    let centred = x.subtract(&average).unwrap();
    let spread = centred.transpose(&[]).unwrap().matmul(&centred).unwrap().multiply(1.0 / 20_000.0).unwrap();
    // Deviations of the estimates are about 0.01 and 0.02.
    mica_testkit::assert_close("mean", &average.to_vec().unwrap(), &[1.0, -2.0], 0.0, 0.05);
    mica_testkit::assert_close("covariance", &spread.to_vec().unwrap(), &[2.0, 1.2, 1.2, 1.0], 0.0, 0.1);
    // As mlx.core.random.multivariate_normal(zeros(2), [[2, 1], [1, 2]], (3,), key=key(3)).
    let covariance = Array::from_slice(&[2.0f32, 1.0, 1.0, 2.0], &[2, 2]).unwrap();
    let zeros = Array::zeros(&[2], Dtype::F32);
    let x = random::multivariate_normal(&zeros, &covariance, Some(&[3]), &random::key(3).unwrap()).unwrap();
    let expected = [-1.244_88, -0.734_551, 0.154_169, 1.121_62, 0.891_147, 1.407_49];
    mica_testkit::assert_close("mlx", &x.to_vec().unwrap(), &expected, 2e-5, 2e-5);
}

#[test]
fn arguments_that_do_not_fit_are_refused() {
    let key = random::key(1).unwrap();
    let pair = Array::from_slice(&[0.5f32, 0.5], &[2]).unwrap();
    let ints = Array::from_slice(&[1i32, 0], &[2]).unwrap();
    let cases: [(&str, Result<Array>); 9] = [
        ("uniform of integers", random::uniform(0.0, 1.0, &[2], Dtype::I32, &key)),
        ("uniform of f64", random::uniform(0.0, 1.0, &[2], Dtype::F64, &key)),
        ("bounds of another shape", random::uniform(&pair, 1.0, &[3], Dtype::F32, &key)),
        ("bounds beyond the shape", random::uniform(&pair, 1.0, &[], Dtype::F32, &key)),
        ("integers of floats", random::randint(0, 5, &[2], Dtype::F32, &key)),
        ("an integer probability", random::bernoulli(&ints, &[2], &key)),
        ("truncated integers", random::truncated_normal(-1.0, 1.0, None, Dtype::I32, &key)),
        ("a key of i32", random::uniform(0.0, 1.0, &[2], Dtype::F32, &ints)),
        ("a shape for categories", random::categorical(&pair, 0, Draws::Shape(&[]), &pair)),
    ];
    for (name, result) in cases {
        assert!(result.is_err(), "{name}: {result:?}");
    }
}
