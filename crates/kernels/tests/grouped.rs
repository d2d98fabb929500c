//! Grouped products against the product of each row alone, bit for bit, on every tier of the machine.

use half::{bf16, f16};
use mica_kernels::gemm::{
    FloatType, FloatView, FloatViewMut, Gemm, GemmSpec, Grouped, GroupedSpec, Matrices, Precision,
    WorkspaceBuf,
};
use mica_kernels::{KernelError, View, ViewMut};
use mica_simd::Isa;
use mica_testkit::Rng;
use mica_threads::Pool;

/// Matrices `[count, rows, columns]` of a type in memory.
struct Operand {
    float: FloatType,
    /// The elements, in the lower half if they have 16 bits.
    words: Vec<u32>,
    halves: Vec<u16>,
    shape: [usize; 3],
    strides: [isize; 3],
}

impl Operand {
    fn new(rng: &mut Rng, float: FloatType, shape: [usize; 3], layout: &str) -> Operand {
        let [count, rows, columns] = shape.map(|size| size as isize);
        let (strides, elements) = match layout {
            "plain" => ([rows * columns, columns, 1], count * rows * columns),
            "turned" => ([rows * columns, 1, rows], count * rows * columns),
            "padded" => ([rows * (columns + 3) + 5, columns + 3, 1], count * (rows * (columns + 3) + 5)),
            "spread" => ([2 * rows * columns, 2 * columns, 2], 2 * count * rows * columns),
            "inside" => ([columns, count * columns, 1], count * rows * columns),
            other => panic!("no layout {other}"),
        };
        let (mut words, mut halves) = (Vec::new(), Vec::new());
        for _ in 0..elements {
            let value = rng.normal();
            match float {
                FloatType::F32 => words.push(value.to_bits()),
                FloatType::Bf16 => halves.push(bf16::from_f32(value).to_bits()),
                FloatType::F16 => halves.push(f16::from_f32(value).to_bits()),
            }
        }
        Operand { float, words, halves, shape, strides }
    }

    fn poison(mut self) -> Operand {
        self.words.fill(0x7fc0_dead);
        self.halves.fill(0x7fff);
        self
    }

    /// The whole, or one matrix's row or columns.
    fn view(&self, offset: isize, shape: &[usize], strides: &[isize]) -> FloatView<'_> {
        let at = offset as usize;
        match self.float {
            FloatType::F32 => {
                View::strided(bytemuck::cast_slice::<_, f32>(&self.words), at, shape, strides).unwrap().into()
            }
            FloatType::Bf16 => {
                View::strided(bytemuck::cast_slice::<_, bf16>(&self.halves), at, shape, strides)
                    .unwrap()
                    .into()
            }
            FloatType::F16 => View::strided(bytemuck::cast_slice::<_, f16>(&self.halves), at, shape, strides)
                .unwrap()
                .into(),
        }
    }

    fn view_mut(&mut self, offset: isize, shape: &[usize], strides: &[isize]) -> FloatViewMut<'_> {
        let at = offset as usize;
        match self.float {
            FloatType::F32 => {
                let data: &mut [f32] = bytemuck::cast_slice_mut(&mut self.words);
                ViewMut::strided(data, at, shape, strides).unwrap().into()
            }
            FloatType::Bf16 => {
                let data: &mut [bf16] = bytemuck::cast_slice_mut(&mut self.halves);
                ViewMut::strided(data, at, shape, strides).unwrap().into()
            }
            FloatType::F16 => {
                let data: &mut [f16] = bytemuck::cast_slice_mut(&mut self.halves);
                ViewMut::strided(data, at, shape, strides).unwrap().into()
            }
        }
    }

    fn all(&self) -> FloatView<'_> {
        self.view(0, &self.shape, &self.strides)
    }

    fn bits(&self) -> (&[u32], &[u16]) {
        (&self.words, &self.halves)
    }
}

struct Case {
    entries: usize,
    m: usize,
    k: usize,
    n: usize,
    lefts: usize,
    rights: usize,
}

/// The product of every row alone.
fn one_at_a_time(
    (a, b, out): (&Operand, &Operand, &mut Operand),
    (left, right): (&[u32], &[u32]),
    (precision, isa): (Precision, Isa),
    pool: &Pool,
) {
    let ([_, m, k], [.., n]) = (a.shape, b.shape);
    for (entry, (&x, &y)) in left.iter().zip(right).enumerate() {
        for row in 0..m {
            let place = |of: &Operand, index: usize, row: usize| {
                index as isize * of.strides[0] + row as isize * of.strides[1]
            };
            let x = a.view(place(a, x as usize, row), &[1, k], &a.strides[1..]);
            let y = b.view(place(b, y as usize, 0), &[k, n], &b.strides[1..]);
            let (to, strides) = (place(out, entry, row), out.strides);
            let mut spec = GemmSpec::new(x, y, out.view_mut(to, &[1, n], &strides[1..]));
            (spec.precision, spec.isa) = (precision, isa);
            Gemm::plan(&spec).unwrap().run(pool).unwrap();
        }
    }
}

fn grouped(
    (a, b, out): (&Operand, &Operand, &mut Operand),
    (left, right): (&[u32], &[u32]),
    (precision, isa): (Precision, Isa),
    pool: &Pool,
) -> Result<(), KernelError> {
    let (shape, strides) = (out.shape, out.strides);
    let spec = GroupedSpec {
        a: a.all(),
        b: Matrices::Plain(b.all()),
        left: View::new(left, &[left.len()])?,
        right: View::new(right, &[right.len()])?,
        out: out.view_mut(0, &shape, &strides),
        precision,
        isa,
    };
    let plan = Grouped::plan(&spec)?;
    let mut workspace = WorkspaceBuf::new(plan.workspace_bytes());
    // SAFETY: all of the workspace.
    unsafe { workspace.pointer().write_bytes(0xa5, workspace.bytes()) };
    let mut list = Vec::new();
    // SAFETY: the workspace outlives the run.
    unsafe { plan.tasks(workspace.pointer(), &mut list) };
    mica_kernels::gemm::run(pool, &list)
}

fn routing(rng: &mut Rng, how: &str, entries: usize, lefts: usize, rights: usize) -> (Vec<u32>, Vec<u32>) {
    let mut right: Vec<u32> = (0..entries)
        .map(|entry| match how {
            "random" => rng.range(0..rights) as u32,
            "sorted" => (entry * rights / entries) as u32,
            "all on the last" => rights as u32 - 1,
            "most idle" => (rng.range(0..rights) / 3 * 3) as u32,
            other => panic!("no routing {other}"),
        })
        .collect();
    if how == "most idle" {
        right.reverse();
    }
    let left = (0..entries).map(|_| rng.range(0..lefts) as u32).collect();
    (left, right)
}

#[test]
fn rows_have_the_bits_of_their_products_alone() {
    let case = |entries, m, k, n, lefts, rights| Case { entries, m, k, n, lefts, rights };
    let cases = [
        case(1, 1, 1, 1, 1, 1),
        case(9, 1, 33, 17, 7, 5),
        case(40, 1, 700, 50, 10, 6),
        case(420, 1, 24, 40, 9, 2),
        case(12, 1, 40, 420, 12, 8),
        case(6, 3, 70, 20, 4, 4),
        case(30, 2, 8, 1, 30, 3),
        case(3, 230, 16, 18, 2, 3),
        case(64, 1, 31, 5, 8, 64),
        case(560, 1, 5, 18, 3, 1),
    ];
    let routings = ["random", "sorted", "all on the last", "most idle"];
    let layouts = ["plain", "turned", "padded", "spread", "inside"];
    let types = [FloatType::F32, FloatType::Bf16, FloatType::F16];
    let pools = [Pool::new(1), Pool::new(3)];
    let mut rng = Rng::new(31);
    for &isa in Isa::available() {
        for precision in [Precision::Exact, Precision::Bf16] {
            for (at, case) in cases.iter().enumerate() {
                // Each case sees all of these with some tier or precision.
                for turn in 0..3 {
                    let float = types[(at + turn) % 3];
                    let [la, lb, lo] = [0, 1, 2].map(|_| layouts[rng.range(0..layouts.len())]);
                    let how = routings[rng.range(0..routings.len())];
                    let &Case { entries, m, k, n, lefts, rights } = case;
                    let name = format!(
                        "{isa} {precision:?} {float:?} {entries} x {m}x{n}x{k} of {lefts} and {rights}, {how}, {la} {lb} {lo}"
                    );
                    let a = Operand::new(&mut rng, float, [lefts, m, k], la);
                    let b = Operand::new(&mut rng, float, [rights, k, n], lb);
                    let other = types[rng.range(0..3)];
                    let out = |rng: &mut Rng| Operand::new(rng, other, [entries, m, n], lo).poison();
                    let (left, right) = routing(&mut rng, how, entries, lefts, rights);
                    let indices = (left.as_slice(), right.as_slice());
                    let mut expected = out(&mut rng);
                    one_at_a_time((&a, &b, &mut expected), indices, (precision, isa), &pools[0]);
                    for pool in &pools {
                        let mut got = out(&mut rng);
                        grouped((&a, &b, &mut got), indices, (precision, isa), pool).unwrap();
                        assert!(got.bits() == expected.bits(), "{name}, {} threads", pool.threads());
                    }
                }
            }
        }
    }
}

#[test]
fn nothing_to_multiply_is_nothing_to_do() {
    let (pool, mut rng) = (Pool::new(2), Rng::new(1));
    let mut check = |entries: usize, [m, k, n]: [usize; 3], rights: usize| {
        let a = Operand::new(&mut rng, FloatType::F32, [2, m, k], "plain");
        let b = Operand::new(&mut rng, FloatType::F32, [rights, k, n], "plain");
        let mut out = Operand::new(&mut rng, FloatType::F32, [entries, m, n], "plain").poison();
        let (left, right) = (vec![0; entries], vec![0; entries]);
        let how = (Precision::Exact, Isa::get());
        grouped((&a, &b, &mut out), (&left, &right), how, &pool).map(|()| out)
    };
    for (entries, shape, rights) in
        [(0, [1, 4, 4], 3), (0, [1, 4, 4], 0), (3, [0, 4, 4], 1), (3, [1, 4, 0], 1)]
    {
        check(entries, shape, rights).unwrap();
    }
    let sums = check(3, [2, 0, 5], 1).unwrap();
    assert!(sums.words.iter().all(|&bits| bits == 0), "sums of nothing are zero");
    assert!(check(1, [1, 4, 4], 0).is_err(), "there is no matrix to choose");
}

#[test]
fn indices_out_of_range_are_errors_that_name_them() {
    let (pool, mut rng) = (Pool::new(2), Rng::new(2));
    let a = Operand::new(&mut rng, FloatType::F32, [3, 1, 8], "plain");
    let b = Operand::new(&mut rng, FloatType::F32, [2, 8, 8], "plain");
    let how = (Precision::Exact, Isa::get());
    for (left, right, text) in [
        ([0, 3], [0, 1], "indices 3 of 3 and 1 of 2 matrices"),
        ([0, 1], [u32::MAX, 1], "indices 0 of 3 and 4294967295 of 2 matrices"),
    ] {
        let mut out = Operand::new(&mut rng, FloatType::F32, [2, 1, 8], "plain");
        let error = grouped((&a, &b, &mut out), (&left, &right), how, &pool).unwrap_err();
        assert!(error.to_string().contains(text), "{error}");
    }
}

#[test]
fn shapes_that_do_not_fit_are_refused() {
    let mut rng = Rng::new(3);
    let how = (Precision::Exact, Isa::get());
    let mut check = |a: [usize; 3], b: [usize; 3], out: [usize; 3], left: usize, right: usize| {
        let [a, b, mut out] = [a, b, out].map(|shape| Operand::new(&mut rng, FloatType::F32, shape, "plain"));
        grouped((&a, &b, &mut out), (&vec![0; left], &vec![0; right]), how, &Pool::new(1)).is_ok()
    };
    assert!(check([2, 3, 4], [5, 4, 6], [7, 3, 6], 7, 7), "fits");
    for (name, ok) in [
        ("inner sizes", check([2, 3, 4], [5, 3, 6], [7, 3, 6], 7, 7)),
        ("rows", check([2, 3, 4], [5, 4, 6], [7, 2, 6], 7, 7)),
        ("columns", check([2, 3, 4], [5, 4, 6], [7, 3, 5], 7, 7)),
        ("entries", check([2, 3, 4], [5, 4, 6], [6, 3, 6], 7, 7)),
        ("one entry for all", check([2, 3, 4], [5, 4, 6], [1, 3, 6], 7, 7)),
        ("right indices", check([2, 3, 4], [5, 4, 6], [7, 3, 6], 7, 6)),
    ] {
        assert!(!ok, "{name}");
    }
}
