//! Rows by the weights that indices name, against each row's product alone, bit for bit.

use mica_kernels::gemm::{self, FloatExperts, FloatView, FloatWeight, Grouped, GroupedSpec, Matrices};
use mica_kernels::quant::{Epilogue, Precision, QuantExperts, QuantWeight};
use mica_kernels::{KernelError, View, ViewMut};
use mica_simd::Isa;
use mica_testkit::Rng;
use mica_threads::{Pool, Task};

use super::cases::{GROUPS, SCALES, Weight, with_workspace};

/// Which rows of x and which weights.
struct Routes {
    left: Vec<u32>,
    right: Vec<u32>,
    lefts: usize,
    /// Rows of an entry.
    m: usize,
}

impl Routes {
    fn new(rng: &mut Rng, [entries, m, lefts, experts]: [usize; 4], all_on_one: bool) -> Routes {
        let left = (0..entries).map(|_| rng.range(0..lefts) as u32).collect();
        // An even expert has no rows.
        let mut expert = || (rng.range(0..experts) | 1).min(experts - 1) as u32;
        let one = expert();
        let right = (0..entries).map(|_| if all_on_one { one } else { expert() }).collect();
        Routes { left, right, lefts, m }
    }

    fn indices(&self) -> (View<'_, u32>, View<'_, u32>) {
        let view = |indices: &'static str, of| View::new(of, &[self.left.len()]).expect(indices);
        (view("left", &self.left), view("right", &self.right))
    }
}

/// Runs what `plan` makes of an output of NaN, `[entries, m, n]`.
fn run<'a>(
    pool: &Pool,
    [entries, m, n]: [usize; 3],
    tasks: impl FnOnce(
        ViewMut<'a, f32>,
        &mut dyn FnMut(usize) -> *mut u8,
    ) -> Result<Vec<Box<dyn Task + 'a>>, KernelError>,
) -> Result<Vec<f32>, KernelError> {
    let mut out = vec![f32::NAN; entries * m * n];
    let strides = [(m * n) as isize, n as isize, 1];
    // SAFETY: the output outlives the tasks, which are dropped in this function.
    let view = unsafe { ViewMut::from_raw(out.as_mut_ptr(), &[entries, m, n], &strides) };
    let mut memory = Vec::new();
    let list = tasks(view, &mut |bytes| {
        memory = vec![0xffu8; bytes + 64];
        let offset = memory.as_mut_ptr().align_offset(64);
        memory[offset..].as_mut_ptr()
    })?;
    gemm::run(pool, &list)?;
    drop(list);
    Ok(out)
}

fn quantized(
    pool: &Pool,
    experts: &QuantExperts,
    x: &[f32],
    routes: &Routes,
    transposed: bool,
    precision: Precision,
    isa: Isa,
) -> Result<Vec<f32>, KernelError> {
    let [_, out, inner] = experts.shape();
    let (k, n) = if transposed { (out, inner) } else { (inner, out) };
    let x = View::new(x, &[routes.lefts, routes.m, k])?;
    let (left, right) = routes.indices();
    run(pool, [routes.left.len(), routes.m, n], |view, workspace| {
        let plan = experts.plan(FloatView::F32(x), (&left, &right), view, transposed, precision, isa)?;
        let mut list = Vec::new();
        let pointer = workspace(plan.workspace_bytes());
        // SAFETY: aligned, large enough, used by nothing else.
        unsafe { plan.tasks(pointer, &mut list) };
        Ok(list)
    })
}

/// The same, one row after another.
fn one_at_a_time(
    pool: &Pool,
    weights: &[QuantWeight],
    x: &[f32],
    routes: &Routes,
    transposed: bool,
    precision: Precision,
    isa: Isa,
) -> Vec<f32> {
    let [out, inner] = weights[0].shape();
    let (k, n) = if transposed { (out, inner) } else { (inner, out) };
    let mut all = Vec::new();
    for (&left, &right) in routes.left.iter().zip(&routes.right) {
        for row in 0..routes.m {
            let x = View::new(&x[(left as usize * routes.m + row) * k..][..k], &[1, k]).unwrap();
            let weight = &weights[right as usize];
            let mut one = vec![f32::NAN; n];
            let view = ViewMut::new(&mut one, &[1, n]).unwrap();
            let plan = match transposed {
                true => weight.plan_transposed(x, view, precision, Epilogue::none(), isa),
                false => weight.plan_forward(x, view, precision, Epilogue::none(), isa),
            };
            let plan = plan.unwrap();
            with_workspace(plan.workspace_bytes(), |workspace| {
                let mut tasks: Vec<Box<dyn Task + '_>> = Vec::new();
                // SAFETY: aligned, large enough, used by nothing else.
                unsafe { plan.tasks(workspace, &mut tasks) };
                pool.run(&tasks).unwrap();
            });
            all.extend(one);
        }
    }
    all
}

fn same(a: &[f32], b: &[f32]) -> bool {
    a.len() == b.len() && a.iter().zip(b).all(|(a, b)| a.to_bits() == b.to_bits())
}

#[test]
fn routed_rows_have_the_bits_of_their_products_alone() {
    let pools = [Pool::new(1), Pool::new(3)];
    let mut rng = Rng::new(41);
    // Entries, rows of each, left matrices, experts; and the shape of a weight.
    let cases = [
        ([1, 1, 1, 1], [40, 128], false),
        ([8, 1, 1, 16], [100, 256], false),
        ([50, 1, 12, 6], [33, 128], false),
        ([290, 1, 9, 4], [50, 128], true),
        ([130, 2, 65, 9], [17, 256], false),
    ];
    for (at, (routing, [out, inner], all_on_one)) in cases.into_iter().enumerate() {
        for bits in [2, 4, 5, 8] {
            let (group, scale) = (GROUPS[(at + bits) % 3], SCALES[rng.range(0..3)]);
            let weight = |_| Weight::random(&mut rng, &pools[0], bits, group, scale, out, inner).packed;
            let experts = QuantExperts::new((0..routing[3]).map(weight).collect()).unwrap();
            let routes = Routes::new(&mut rng, routing, all_on_one);
            let rows = routes.lefts * routes.m;
            let (x, dy) = (rng.normals(rows * inner), rng.normals(rows * out));
            for &isa in Isa::available() {
                for (precision, transposed) in [
                    (Precision::Fast, false),
                    (Precision::Bf16, false),
                    (Precision::Exact, false),
                    (Precision::Bf16, true),
                    (Precision::Exact, true),
                ] {
                    let x = if transposed { &dy } else { &x };
                    let weights = experts.weights();
                    let expected = one_at_a_time(&pools[0], weights, x, &routes, transposed, precision, isa);
                    for pool in &pools {
                        let got = quantized(pool, &experts, x, &routes, transposed, precision, isa).unwrap();
                        assert!(
                            same(&got, &expected),
                            "{isa} {precision:?} transposed {transposed}, {bits} bits of {group}, {routing:?} by [{out}, {inner}], {} threads",
                            pool.threads()
                        );
                    }
                }
            }
        }
    }
}

#[test]
fn packed_floats_are_experts_too() {
    let pool = Pool::new(2);
    let mut rng = Rng::new(42);
    for (routing, [out, inputs]) in [([40, 1, 9, 5], [50, 70]), ([90, 2, 9, 3], [33, 600])] {
        let values: Vec<Vec<f32>> = (0..routing[3]).map(|_| rng.normals(out * inputs)).collect();
        let halves = |values: &[f32]| values.iter().map(|&x| half::bf16::from_f32(x)).collect::<Vec<_>>();
        let routes = Routes::new(&mut rng, routing, false);
        let (left, right) = routes.indices();
        let (rows, entries) = (routes.lefts * routes.m, routes.left.len());
        for half in [false, true] {
            let pack = |values: &Vec<f32>| match half {
                true => {
                    FloatWeight::pack(View::new(&halves(values), &[out, inputs]).unwrap(), &pool).unwrap()
                }
                false => FloatWeight::pack(View::new(values, &[out, inputs]).unwrap(), &pool).unwrap(),
            };
            let experts = FloatExperts::new(values.iter().map(pack).collect()).unwrap();
            for &isa in Isa::available() {
                for (precision, transposed) in [gemm::Precision::Exact, gemm::Precision::Bf16]
                    .iter()
                    .flat_map(|&p| [(p, false), (p, true)])
                {
                    let (k, n) = if transposed { (out, inputs) } else { (inputs, out) };
                    let x = rng.normals(rows * k);
                    let spec = |out| GroupedSpec {
                        a: View::new(&x, &[routes.lefts, routes.m, k]).unwrap().into(),
                        b: Matrices::Packed { experts: &experts, transposed },
                        left: left.clone(),
                        right: right.clone(),
                        out,
                        precision,
                        isa,
                    };
                    let got = run(&pool, [entries, routes.m, n], |view, workspace| {
                        let plan = Grouped::plan(&spec(view.into()))?;
                        let mut list = Vec::new();
                        let pointer = workspace(plan.workspace_bytes());
                        // SAFETY: aligned, large enough, used by nothing else.
                        unsafe { plan.tasks(pointer, &mut list) };
                        Ok(list)
                    });
                    let mut expected = vec![f32::NAN; entries * routes.m * n];
                    for (row, to) in expected.chunks_exact_mut(n).enumerate() {
                        let (entry, row) = (row / routes.m, row % routes.m);
                        let at = routes.left[entry] as usize * routes.m + row;
                        let x = View::new(&x[at * k..][..k], &[1, k]).unwrap();
                        let to = ViewMut::new(to, &[1, n]).unwrap();
                        let weight = &experts.weights()[routes.right[entry] as usize];
                        let none = gemm::Epilogue::none();
                        let plan = weight.plan(x.into(), to.into(), transposed, precision, none, isa);
                        plan.unwrap().run(&pool).unwrap();
                    }
                    let name = format!("{isa} {precision:?} transposed {transposed} half {half} {routing:?}");
                    assert!(same(&got.unwrap(), &expected), "{name}");
                }
            }
        }
    }
}

#[test]
fn experts_fit_together_and_rows_fit_them() {
    let (pool, mut rng) = (Pool::new(1), Rng::new(43));
    let mut weight = |bits, out| Weight::random(&mut rng, &pool, bits, 32, SCALES[0], out, 64).packed;
    assert!(QuantExperts::new(Vec::new()).is_err(), "none");
    assert!(QuantExperts::new(vec![weight(4, 16), weight(4, 32)]).is_err(), "shapes");
    assert!(QuantExperts::new(vec![weight(4, 16), weight(8, 16)]).is_err(), "widths");
    let experts = QuantExperts::new(vec![weight(4, 16), weight(4, 16)]).unwrap();
    let check = |right: u32, transposed: bool, precision: Precision| {
        let routes = Routes { left: vec![0], right: vec![right], lefts: 1, m: 1 };
        let x = vec![0.5; if transposed { 16 } else { 64 }];
        quantized(&pool, &experts, &x, &routes, transposed, precision, Isa::get()).map(|_| ())
    };
    for precision in [Precision::Fast, Precision::Bf16, Precision::Exact] {
        check(1, false, precision).unwrap();
        let error = check(2, false, precision).unwrap_err().to_string();
        assert!(error.contains("2 of 2 matrices"), "{error}");
    }
    assert!(check(1, true, Precision::Fast).is_err(), "gradients are not quantized");
    let none = Routes { left: vec![], right: vec![], lefts: 1, m: 1 };
    let x = [0.5; 64];
    let empty = quantized(&pool, &experts, &x, &none, false, Precision::Fast, Isa::get()).unwrap();
    assert!(empty.is_empty());
}
