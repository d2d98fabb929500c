//! Float products through the public door, on every tier of the machine.
//!
//! Exact products (and bf16 ones on tiers that run the f32 chain) must have the bits of the
//! definition in docs/NUMERICS.md, written here element by element. bf16 products of `avx512bf16` and
//! `amx` add in another order and are compared with f64 sums.

use half::{bf16, f16};
use mica_kernels::gemm::{
    Epilogue, FloatType, FloatView, FloatViewMut, FloatWeight, Gemm, GemmSpec, Precision,
};
use mica_kernels::{View, ViewMut};
use mica_simd::Isa;
use mica_testkit::Rng;
use mica_threads::Pool;

const TYPES: [FloatType; 3] = [FloatType::F32, FloatType::Bf16, FloatType::F16];
const PRECISIONS: [Precision; 2] = [Precision::Exact, Precision::Bf16];

/// Memory of one type with a strided view on it.
struct Operand {
    float: FloatType,
    words: Vec<u32>,
    halves: Vec<u16>,
    offset: usize,
    shape: Vec<usize>,
    strides: Vec<isize>,
}

impl Operand {
    fn new(rng: &mut Rng, float: FloatType, shape: &[usize], layout: &str) -> Operand {
        // Memory order of the axes, then gaps and directions.
        let rank = shape.len();
        let mut order: Vec<usize> = (0..rank).collect();
        if layout.contains("turned") {
            order.swap(rank - 1, rank - 2);
        }
        if layout.contains("batch inside") && rank > 2 {
            order.swap(0, rank - 2);
        }
        let gap = if layout.contains("spread") { 3 } else { 1 };
        let mut strides = vec![0isize; rank];
        let mut step = gap;
        for &axis in order.iter().rev() {
            strides[axis] = step;
            step *= shape[axis].max(1) as isize;
            if layout.contains("padded") {
                step += 5;
            }
        }
        let mut offset = rng.range(0..4);
        if layout.contains("reversed") {
            offset += (shape[rank - 1].max(1) - 1) * strides[rank - 1] as usize;
            strides[rank - 1] = -strides[rank - 1];
        }
        if layout.contains("broadcast") && rank > 2 {
            strides[0] = 0;
        }
        let count = step as usize + 8;
        let mut operand =
            Operand { float, words: vec![], halves: vec![], offset, shape: shape.into(), strides };
        match float {
            FloatType::F32 => operand.words = (0..count).map(|_| rng.normal().to_bits()).collect(),
            FloatType::Bf16 => {
                operand.halves = (0..count).map(|_| bf16::from_f32(rng.normal()).to_bits()).collect()
            }
            FloatType::F16 => {
                operand.halves = (0..count).map(|_| f16::from_f32(rng.normal()).to_bits()).collect()
            }
        }
        operand
    }

    fn poison(mut self) -> Operand {
        self.words.fill(f32::NAN.to_bits());
        self.halves.fill(0x7fff);
        self
    }

    fn at(&self, index: &[usize]) -> usize {
        let offset: isize = index.iter().zip(&self.strides).map(|(&i, &s)| i as isize * s).sum();
        (self.offset as isize + offset) as usize
    }

    fn get(&self, index: &[usize]) -> f32 {
        let at = self.at(index);
        match self.float {
            FloatType::F32 => f32::from_bits(self.words[at]),
            FloatType::Bf16 => bf16::from_bits(self.halves[at]).to_f32(),
            FloatType::F16 => f16::from_bits(self.halves[at]).to_f32(),
        }
    }

    fn view(&self) -> FloatView<'_> {
        let (shape, strides) = (&self.shape, &self.strides);
        match self.float {
            FloatType::F32 => {
                let data: &[f32] = bytemuck::cast_slice(&self.words);
                View::strided(data, self.offset, shape, strides).unwrap().into()
            }
            FloatType::Bf16 => {
                let data: &[bf16] = bytemuck::cast_slice(&self.halves);
                View::strided(data, self.offset, shape, strides).unwrap().into()
            }
            FloatType::F16 => {
                let data: &[f16] = bytemuck::cast_slice(&self.halves);
                View::strided(data, self.offset, shape, strides).unwrap().into()
            }
        }
    }

    fn view_mut(&mut self) -> FloatViewMut<'_> {
        let (shape, strides) = (&self.shape, &self.strides);
        match self.float {
            FloatType::F32 => {
                let data: &mut [f32] = bytemuck::cast_slice_mut(&mut self.words);
                ViewMut::strided(data, self.offset, shape, strides).unwrap().into()
            }
            FloatType::Bf16 => {
                let data: &mut [bf16] = bytemuck::cast_slice_mut(&mut self.halves);
                ViewMut::strided(data, self.offset, shape, strides).unwrap().into()
            }
            FloatType::F16 => {
                let data: &mut [f16] = bytemuck::cast_slice_mut(&mut self.halves);
                ViewMut::strided(data, self.offset, shape, strides).unwrap().into()
            }
        }
    }

    /// Places outside the view.
    fn untouched(&self, before: &Operand) -> bool {
        let mut inside = vec![false; self.words.len() + self.halves.len()];
        let count: usize = self.shape.iter().product();
        for number in 0..count {
            inside[self.at(&unravel(number, &self.shape))] = true;
        }
        inside.iter().enumerate().all(|(at, &inside)| {
            inside
                || (self.words.get(at) == before.words.get(at)
                    && self.halves.get(at) == before.halves.get(at))
        })
    }
}

fn unravel(mut number: usize, shape: &[usize]) -> Vec<usize> {
    let mut index = vec![0; shape.len()];
    for (at, &size) in index.iter_mut().zip(shape).rev() {
        *at = number % size;
        number /= size;
    }
    index
}

fn to(float: FloatType, value: f32) -> f32 {
    match float {
        FloatType::F32 => value,
        FloatType::Bf16 => bf16::from_f32(value).to_f32(),
        FloatType::F16 => f16::from_f32(value).to_f32(),
    }
}

/// The definition: chain (exact bits), f64 sum, and sum of magnitudes (the scale of errors).
fn define(precision: Precision, pairs: impl Iterator<Item = (f32, f32)>) -> (f32, f64, f64) {
    let (mut chain, mut sum, mut scale) = (0f32, 0f64, 0f64);
    for (a, b) in pairs {
        let (a, b) = match precision {
            Precision::Exact => (a, b),
            Precision::Bf16 => (to(FloatType::Bf16, a), to(FloatType::Bf16, b)),
        };
        chain = a.mul_add(b, chain);
        sum += a as f64 * b as f64;
        scale += (a as f64 * b as f64).abs();
    }
    (chain, sum, scale)
}

fn chain_is_exact(isa: Isa, precision: Precision) -> bool {
    precision == Precision::Exact || isa < Isa::Avx512Bf16
}

/// Compares one element: bits where the order is the chain, else within the error of an f32 sum.
fn check_element(
    name: &str,
    isa: Isa,
    precision: Precision,
    out: FloatType,
    got: f32,
    (chain, sum, scale): (f32, f64, f64),
    added: &[f32],
) {
    let finish = |mut value: f32| {
        for &x in added {
            value += x;
        }
        to(out, value)
    };
    if chain_is_exact(isa, precision) {
        let expected = finish(chain);
        assert!(got.to_bits() == expected.to_bits(), "{name}: got {got}, expected {expected}");
    } else {
        let expected = sum + added.iter().map(|&x| x as f64).sum::<f64>();
        // A sum of k rounded products errs by less than k/2 units of 2^-24 of its magnitudes;
        // far less in practice. The output type adds half of its own unit.
        let unit = match out {
            FloatType::F32 => 2f64.powi(-23),
            FloatType::Bf16 => 2f64.powi(-8),
            FloatType::F16 => 2f64.powi(-10),
        };
        let bound = 1e-5 * scale + unit * (expected.abs() + scale * 1e-5) + 1e-7;
        assert!((got as f64 - expected).abs() <= bound, "{name}: got {got}, expected {expected} ± {bound}");
    }
}

#[test]
fn random_products_equal_the_definition() {
    let pool = Pool::new(3);
    let mut rng = Rng::new(11);
    let layouts = [
        "rows",
        "turned",
        "padded",
        "turned padded",
        "spread",
        "turned spread",
        "reversed",
        "batch inside",
        "broadcast",
        "turned broadcast",
    ];
    let sizes = [0, 1, 1, 2, 3, 5, 7, 8, 9, 15, 16, 17, 31, 32, 33, 47, 50, 64, 70];
    for round in 0..120 {
        let (m, n, k) = (*rng.choose(&sizes), *rng.choose(&sizes), *rng.choose(&sizes));
        let batches: [&[usize]; 6] = [&[], &[], &[1], &[3], &[2, 2], &[0]];
        let batch = *rng.choose(&batches);
        let with = |rows, columns| [batch, &[rows, columns]].concat();
        let (fa, fb, fo) = (*rng.choose(&TYPES), *rng.choose(&TYPES), *rng.choose(&TYPES));
        let (la, lb, lo) = (*rng.choose(&layouts), *rng.choose(&layouts), *rng.choose(&layouts[..8]));
        let a = Operand::new(&mut rng, fa, &with(m, k), la);
        let b_shape = if rng.chance(0.3) { vec![k, n] } else { with(k, n) };
        let b = Operand::new(&mut rng, fb, &b_shape, lb);
        let bias_type = *rng.choose(&TYPES);
        let bias = rng.chance(0.4).then(|| Operand::new(&mut rng, bias_type, &[n, 1], "rows"));
        let residual_layout = *rng.choose(&layouts);
        let residual = rng.chance(0.3).then(|| Operand::new(&mut rng, fo, &with(m, n), residual_layout));
        let accumulate = residual.is_none() && rng.chance(0.3);
        let blank = Operand::new(&mut rng, fo, &with(m, n), lo);
        let blank_words = (blank.words.clone(), blank.halves.clone());
        for (&isa, precision) in
            Isa::available().iter().flat_map(|isa| PRECISIONS.map(|precision| (isa, precision)))
        {
            let name = format!(
                "round {round}: {batch:?} {m}x{n}x{k} {fa:?} {la} by {fb:?} {lb} {b_shape:?} to {fo:?} {lo} on {isa} {precision:?}, \
                 bias {}, residual {}, accumulate {accumulate}",
                bias.is_some(),
                residual.is_some()
            );
            let fresh = || Operand {
                float: fo,
                words: blank_words.0.clone(),
                halves: blank_words.1.clone(),
                offset: blank.offset,
                shape: blank.shape.clone(),
                strides: blank.strides.clone(),
            };
            let mut out = if accumulate { fresh() } else { fresh().poison() };
            let before = if accumulate { fresh() } else { fresh().poison() };
            let epilogue = Epilogue {
                bias: bias.as_ref().map(|bias| flat(bias)),
                residual: residual.as_ref().map(|residual| residual.view()),
                accumulate,
            };
            let mut spec = GemmSpec::new(a.view(), b.view(), out.view_mut());
            spec.precision = precision;
            spec.epilogue = epilogue;
            spec.isa = isa;
            Gemm::plan(&spec).unwrap_or_else(|error| panic!("{name}: {error}")).run(&pool).unwrap();
            assert!(out.untouched(&before), "{name}: wrote outside its view");
            let count: usize = out.shape.iter().product();
            for number in 0..count {
                let index = unravel(number, &out.shape);
                let rank = index.len();
                let (i, j) = (index[rank - 2], index[rank - 1]);
                let lead = &index[..rank - 2];
                let pairs = (0..k).map(|at| {
                    let b_index = if b_shape.len() == 2 { vec![at, j] } else { [lead, &[at, j]].concat() };
                    (a.get(&[lead, &[i, at]].concat()), b.get(&b_index))
                });
                let mut added = vec![];
                added.extend(bias.as_ref().map(|bias| bias.get(&[j, 0])));
                added.extend(residual.as_ref().map(|residual| residual.get(&index)));
                if accumulate {
                    added.push(before.get(&index));
                }
                let got = out.get(&index);
                check_element(&name, isa, precision, fo, got, define(precision, pairs), &added);
            }
        }
    }
}

/// A `[n, 1]` operand as a vector.
fn flat(operand: &Operand) -> FloatView<'_> {
    let (shape, strides) = (&operand.shape[..1], &operand.strides[..1]);
    match operand.float {
        FloatType::F32 => {
            View::strided(bytemuck::cast_slice::<_, f32>(&operand.words), operand.offset, shape, strides)
                .unwrap()
                .into()
        }
        FloatType::Bf16 => {
            View::strided(bytemuck::cast_slice::<_, bf16>(&operand.halves), operand.offset, shape, strides)
                .unwrap()
                .into()
        }
        FloatType::F16 => {
            View::strided(bytemuck::cast_slice::<_, f16>(&operand.halves), operand.offset, shape, strides)
                .unwrap()
                .into()
        }
    }
}

/// Sizes past every block size, checked at random places and at the corners.
#[test]
fn large_products_equal_the_definition() {
    let mut rng = Rng::new(12);
    for (name, m, n, k, la, lb, lo) in [
        ("one row, long k", 1, 1000, 2000, "rows", "rows", "rows"),
        ("one row, weight order", 1, 1000, 2000, "rows", "turned", "rows"),
        ("few rows", 21, 530, 1500, "turned", "rows", "rows"),
        ("one column", 1500, 1, 700, "rows", "rows", "rows"),
        ("narrow", 900, 5, 700, "turned", "rows", "padded"),
        ("square", 500, 500, 500, "rows", "rows", "rows"),
        ("square, weight order", 401, 530, 1100, "rows", "turned", "padded"),
        ("tall", 1300, 100, 600, "turned", "turned", "rows"),
        ("many blocks of rows", 1300, 800, 300, "spread", "spread", "turned"),
    ] {
        for fb in TYPES {
            let a = Operand::new(&mut rng, FloatType::F32, &[m, k], la);
            let b = Operand::new(&mut rng, fb, &[k, n], lb);
            let mut expected = Vec::new();
            for sample in 0..60 {
                let (i, j) = match sample {
                    0 => (0, 0),
                    1 => (m - 1, n - 1),
                    _ => (rng.range(0..m), rng.range(0..n)),
                };
                let define =
                    |precision| define(precision, (0..k).map(|at| (a.get(&[i, at]), b.get(&[at, j]))));
                expected.push((i, j, PRECISIONS.map(define)));
            }
            for &isa in Isa::available() {
                // A library call per product: the scalar tier has had its share above.
                if isa == Isa::Scalar && m * n * k > 2_000_000 {
                    continue;
                }
                for (which, precision) in PRECISIONS.into_iter().enumerate() {
                    let name = format!("{name} {fb:?} {isa} {precision:?}");
                    let mut reference: Option<Vec<u32>> = None;
                    for threads in [1, 2, 5] {
                        let mut out = Operand::new(&mut Rng::new(0), FloatType::F32, &[m, n], lo).poison();
                        let mut spec = GemmSpec::new(a.view(), b.view(), out.view_mut());
                        (spec.precision, spec.isa) = (precision, isa);
                        Gemm::plan(&spec).unwrap().run(&Pool::new(threads)).unwrap();
                        for &(i, j, definitions) in &expected {
                            let name = format!("{name} at {i}, {j}");
                            let got = out.get(&[i, j]);
                            check_element(
                                &name,
                                isa,
                                precision,
                                FloatType::F32,
                                got,
                                definitions[which],
                                &[],
                            );
                        }
                        assert!(reference.get_or_insert(out.words.clone()) == &out.words, "{name} {threads}");
                    }
                }
            }
        }
    }
}

/// Row i of a product of m rows has the bits of that row alone, for strided operands and packed
/// weights of every type, in both directions.
#[test]
fn a_row_never_depends_on_the_others() {
    let pool = Pool::new(2);
    let mut rng = Rng::new(13);
    let (k, n) = (333, 83);
    let x = Operand::new(&mut rng, FloatType::F32, &[70, k], "rows");
    let x: &[f32] = &bytemuck::cast_slice(&x.words)[..70 * k];
    for fb in TYPES {
        let source = Operand::new(&mut rng, fb, &[n, k], "padded");
        let turned = Operand::new(&mut rng, fb, &[k, n], "padded");
        let forward = FloatWeight::pack(source.view(), &pool).unwrap();
        let backward = FloatWeight::pack(turned.view(), &pool).unwrap();
        for &isa in Isa::available() {
            for precision in PRECISIONS {
                for how in ["strided", "forward", "transposed"] {
                    let name = format!("{fb:?} {isa} {precision:?} {how}");
                    let product = |first: usize, m: usize| {
                        let mut out = vec![f32::NAN; m * n];
                        let rows = View::new(&x[first * k..][..m * k], &[m, k]).unwrap();
                        let view = ViewMut::new(&mut out, &[m, n]).unwrap();
                        let none = Epilogue::none();
                        let plan = match how {
                            "strided" => {
                                let mut spec = GemmSpec::new(rows, turned.view(), view);
                                (spec.precision, spec.isa) = (precision, isa);
                                Gemm::plan(&spec)
                            }
                            "forward" => forward.plan(rows.into(), view.into(), false, precision, none, isa),
                            _ => backward.plan(rows.into(), view.into(), true, precision, none, isa),
                        };
                        plan.unwrap().run(&pool).unwrap();
                        out
                    };
                    let alone: Vec<Vec<f32>> = (0..70).map(|row| product(row, 1)).collect();
                    let counts: Vec<usize> = match isa {
                        Isa::Scalar => vec![2, 3, 4, 5, 9, 70],
                        // Every count on the best tiers, one of three on AVX2 and NEON.
                        Isa::Avx2 | Isa::Avx2Vnni | Isa::Neon | Isa::NeonDot => {
                            (1..=70).step_by(3).chain([70]).collect()
                        }
                        _ => (1..=70).collect(),
                    };
                    for m in counts {
                        let first = 70 - m;
                        let all = product(first, m);
                        for (i, row) in all.chunks(n).enumerate() {
                            let same =
                                row.iter().zip(&alone[first + i]).all(|(a, b)| a.to_bits() == b.to_bits());
                            assert!(same, "{name}: row {i} of {m}");
                        }
                    }
                    // And they are the right rows.
                    for (i, row) in alone.iter().enumerate().step_by(23) {
                        for j in [0, n / 2, n - 1] {
                            let pairs = (0..k).map(|at| {
                                let w = match how {
                                    "forward" => source.get(&[j, at]),
                                    _ => turned.get(&[at, j]),
                                };
                                (x[i * k + at], w)
                            });
                            let definition = define(precision, pairs);
                            check_element(&name, isa, precision, FloatType::F32, row[j], definition, &[]);
                        }
                    }
                }
            }
        }
    }
}

#[test]
fn weights_multiply_in_both_directions() {
    let pool = Pool::new(2);
    let mut rng = Rng::new(14);
    for (name, m, out, inputs) in [
        ("small", 3, 5, 7),
        ("one by one", 1, 1, 1),
        ("tail lines", 40, 100, 63),
        ("several blocks", 300, 200, 900),
        ("one row", 1, 700, 1500),
        ("no rows", 0, 32, 32),
        ("no inputs", 4, 32, 0),
    ] {
        for float in TYPES {
            for layout in ["rows", "turned", "spread"] {
                let source = Operand::new(&mut rng, float, &[out, inputs], layout);
                let weight = FloatWeight::pack(source.view(), &pool).unwrap();
                for (transposed, k, n) in [(false, inputs, out), (true, out, inputs)] {
                    let x_type = *rng.choose(&TYPES[..2]);
                    let x = Operand::new(&mut rng, x_type, &[m, k], "padded");
                    let bias = Operand::new(&mut rng, FloatType::F32, &[n, 1], "rows");
                    let start = Operand::new(&mut rng, FloatType::F32, &[m, n], "rows");
                    for &isa in Isa::available() {
                        if isa == Isa::Scalar && m > 40 {
                            continue;
                        }
                        for precision in PRECISIONS {
                            let name = format!(
                                "{name} {float:?} {layout} transposed {transposed} {isa} {precision:?}"
                            );
                            let mut result = Operand::new(&mut Rng::new(0), FloatType::F32, &[m, n], "rows");
                            result.offset = start.offset;
                            result.words = start.words.clone();
                            result.words.resize(start.words.len() + 8, 0);
                            let epilogue =
                                Epilogue { bias: Some(flat(&bias)), residual: None, accumulate: true };
                            weight
                                .plan(x.view(), result.view_mut(), transposed, precision, epilogue, isa)
                                .unwrap()
                                .run(&pool)
                                .unwrap();
                            for _ in 0..20.min(m * n) {
                                let (i, j) = (rng.range(0..m), rng.range(0..n));
                                let pairs = (0..k).map(|at| {
                                    let index = if transposed { [at, j] } else { [j, at] };
                                    (x.get(&[i, at]), source.get(&index))
                                });
                                let added = [bias.get(&[j, 0]), start.get(&[i, j])];
                                let definition = define(precision, pairs);
                                let got = result.get(&[i, j]);
                                let f32 = FloatType::F32;
                                check_element(&name, isa, precision, f32, got, definition, &added);
                            }
                        }
                    }
                }
            }
        }
    }
}

/// Packing is a bijection on bits: NaN payloads, denormal numbers and signed zeros survive.
#[test]
fn weights_come_back_bit_for_bit() {
    let pool = Pool::new(2);
    let mut rng = Rng::new(15);
    for (out, inputs) in [(1, 1), (16, 32), (17, 33), (100, 70), (5, 0), (0, 5)] {
        for float in TYPES {
            for layout in ["rows", "turned", "spread", "padded reversed"] {
                let name = format!("[{out}, {inputs}] {float:?} {layout}");
                let mut source = Operand::new(&mut rng, float, &[out, inputs], layout);
                source.words.iter_mut().for_each(|word| *word = rng.u32());
                source.halves.iter_mut().for_each(|half| *half = rng.u32() as u16);
                let weight = FloatWeight::pack(source.view(), &pool).unwrap();
                let mut back = Operand::new(&mut rng, float, &[out, inputs], "padded").poison();
                let before = Operand {
                    words: back.words.clone(),
                    halves: back.halves.clone(),
                    shape: back.shape.clone(),
                    strides: back.strides.clone(),
                    ..back
                };
                let task = weight.unpack(back.view_mut()).unwrap();
                pool.run(&[task]).unwrap();
                assert!(back.untouched(&before), "{name}");
                for o in 0..out {
                    for i in 0..inputs {
                        let (to, from) = (back.at(&[o, i]), source.at(&[o, i]));
                        assert_eq!(back.words.get(to), source.words.get(from), "{name} {o} {i}");
                        assert_eq!(back.halves.get(to), source.halves.get(from), "{name} {o} {i}");
                    }
                }
                if out == 0 {
                    continue;
                }
                let rows: Vec<u32> = (0..9).map(|_| rng.range(0..out) as u32).collect();
                let mut gathered = vec![f32::NAN; rows.len() * inputs];
                let view = ViewMut::new(&mut gathered, &[rows.len(), inputs]).unwrap();
                pool.run(&[weight.gather(&rows, view).unwrap()]).unwrap();
                for (at, value) in gathered.iter().enumerate() {
                    let expected = source.get(&[rows[at / inputs] as usize, at % inputs]);
                    let same = value.to_bits() == expected.to_bits() || (value.is_nan() && expected.is_nan());
                    assert!(same, "{name} gathered {at}: {value} {expected}");
                }
            }
        }
    }
}

#[test]
fn products_that_do_not_fit_are_refused() {
    let data = [0f32; 64];
    let view = |shape: &[usize]| View::new(&data, shape).unwrap();
    for (a, b, out, says) in [
        (&[2, 3][..], &[4, 5][..], &[2, 5][..], "expected [] (or broadcast) x [3, 5]"),
        (&[2, 3], &[3, 5], &[3, 5], "a has shape [2, 3]"),
        (&[3], &[3, 5], &[1, 5], "two dimensions"),
        (&[2, 2, 3], &[3, 3, 5], &[2, 2, 5], "b has shape [3, 3, 5]"),
    ] {
        let mut memory = [0f32; 64];
        let out = ViewMut::new(&mut memory, out).unwrap();
        let error = Gemm::plan(&GemmSpec::new(view(a), view(b), out)).err().unwrap().to_string();
        assert!(error.contains(says), "{error}");
    }
    let pool = Pool::new(1);
    let weight = FloatWeight::pack(view(&[4, 6]), &pool).unwrap();
    let mut memory = [0f32; 64];
    let out = ViewMut::new(&mut memory, &[2, 5]).unwrap();
    let error = weight.plan_forward(view(&[2, 6]), out, Precision::Exact, Epilogue::none()).err().unwrap();
    assert!(error.to_string().contains("[2, 5]"), "{error}");
    let mut memory = [0f32; 64];
    let out = ViewMut::new(&mut memory, &[1, 6]).unwrap();
    let error = weight.gather(&[4], out).err().unwrap();
    assert!(error.to_string().contains("row 4 of a weight with 4 rows"), "{error}");
}

#[test]
fn bits_do_not_depend_on_how_many_threads_are_expected() {
    let (mut rng, pool) = (Rng::new(37), Pool::new(2));
    // Sums so long that the blocks depend on them.
    let (m, n, k) = (270, 130, 2400);
    for float in [FloatType::F32, FloatType::Bf16] {
        let a = Operand::new(&mut rng, float, &[m, k], "turned");
        let b = Operand::new(&mut rng, float, &[k, n], "padded");
        for &isa in Isa::available().iter().filter(|&&isa| isa > Isa::Scalar) {
            for precision in PRECISIONS {
                let product = |threads: usize| {
                    let mut out = vec![f32::NAN; m * n];
                    let mut spec =
                        GemmSpec::new(a.view(), b.view(), ViewMut::new(&mut out, &[m, n]).unwrap());
                    (spec.precision, spec.isa, spec.threads) = (precision, isa, threads);
                    let plan = Gemm::plan(&spec).unwrap();
                    plan.run(&pool).unwrap();
                    let bytes = plan.workspace_bytes();
                    (out.into_iter().map(f32::to_bits).collect::<Vec<_>>(), bytes)
                };
                let (expected, bytes) = product(16);
                for threads in [0, 1, 3] {
                    let (bits, others) = product(threads);
                    assert!(bits == expected, "{float:?} {isa} {precision:?} for {threads} threads");
                    assert!(isa != Isa::Avx512 || others < bytes, "cut alike for 16 and {threads} threads");
                }
            }
        }
    }
}
