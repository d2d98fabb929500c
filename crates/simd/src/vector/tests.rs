use mica_testkit::Rng;

use super::*;

/// Many operations on two vectors and what they give, lane by lane, as bits.
struct Everything<'a> {
    a: &'a [f32],
    b: &'a [f32],
    out: &'a mut Vec<(&'static str, Vec<u32>)>,
}

impl Kernel for Everything<'_> {
    type Output = ();

    #[inline(always)]
    fn run<V: Vector>(self) {
        let (a, b) = (V::from_slice(self.a, 0.0), V::from_slice(self.b, 0.0));
        let c = V::from_array([0.75; LANES]);
        let mut put = |name: &'static str, x: V| {
            // A NaN's payload may differ between tiers; that it is one may not.
            let bits = x.to_array().map(|v| if v.is_nan() { 0x7fc0_0000 } else { v.to_bits() });
            self.out.push((name, bits.to_vec()))
        };
        put("add", a + b);
        put("sub", a - b);
        put("mul", a * b);
        put("div", a / b);
        put("neg", -a);
        put("mul_add", a.mul_add(b, c));
        put("neg_mul_add", a.neg_mul_add(b, c));
        put("min", a.min(b));
        put("max", a.max(b));
        put("sqrt", a.sqrt());
        put("round", a.round());
        put("floor", a.floor());
        put("trunc", a.trunc());
        put("abs", a.abs());
        put("copy_sign", a.copy_sign(b));
        put("scale", a.scale_exp2(V::splat(-130.0)));
        put("scale up", a.scale_exp2(V::splat(100.0)));
        put("lt", V::select(a.lt(b), a, c));
        put("le", V::select(a.le(b), a, c));
        put("eq", V::select(a.eq(b), a, c));
        put("gt", V::select(a.gt(b), a, c));
        put("ge", V::select(a.ge(b), a, c));
        put("ordered", V::select(a.ordered(b), b, c));
        put("nan", V::select(a.is_nan(), b, c));
        put("and", V::select(V::mask_and(a.lt(b), a.gt(c)), a, c));
        put("or", V::select(V::mask_or(a.lt(b), V::mask_not(a.gt(c))), a, c));
        put("mask", V::select(V::mask_from_bits(V::mask_bits(a.lt(b)) ^ 0x8421), a, c));
        let (x, y) = (a.to_bits(), b.to_bits());
        let mut put_int = |name: &'static str, x: V::Int| {
            self.out.push((name, V::int_to_array(x).map(|v| v as u32).to_vec()));
        };
        put_int("int_add", V::int_add(x, y));
        put_int("int_sub", V::int_sub(x, y));
        put_int("int_and", V::int_and(x, y));
        put_int("int_or", V::int_or(x, y));
        put_int("int_xor", V::int_xor(x, y));
        put_int("int_shl", V::int_shl(x, 5));
        put_int("int_shr", V::int_shr(x, 7));
        put_int("int_shr_logical", V::int_shr_logical(x, 7));
        put_int("to_int", V::from_array(a.to_array().map(|v| if v.abs() < 1e9 { v } else { 1.0 })).to_int());
        put_int("int_gt", V::select(V::int_gt(x, y), a, b).to_bits());
        put_int("int_eq", V::select(V::int_eq(x, V::int_or(x, y)), a, b).to_bits());
        put_int("from_int", V::from_int(x).to_bits());
        self.out.push(("sum", vec![if a.sum().is_nan() { 0 } else { a.sum().to_bits() }]));
        for count in 0..=LANES {
            let mut out = [7.0f32; LANES + 1];
            // SAFETY: the slices hold at least `count` values.
            unsafe {
                let part = V::load_part(self.a.as_ptr(), count, 3.0);
                self.out.push(("load_part", part.to_bits_array()));
                a.store_part(out.as_mut_ptr(), count);
            }
            self.out.push(("store_part", out.map(f32::to_bits).to_vec()));
        }
    }
}

trait BitsArray {
    fn to_bits_array(self) -> Vec<u32>;
}

impl<V: Vector> BitsArray for V {
    #[inline(always)]
    fn to_bits_array(self) -> Vec<u32> {
        self.to_array().map(f32::to_bits).to_vec()
    }
}

#[test]
fn every_operation_has_the_scalar_tiers_bits() {
    let mut rng = Rng::new(4);
    let special =
        [0.0, -0.0, f32::INFINITY, f32::NEG_INFINITY, f32::NAN, 1e-45, 2.5, -2.5, 0.5, 1.5, f32::MAX];
    for round in 0..300 {
        let mut case = || {
            let wild = round % 2 == 0;
            let mut value = || match rng.range(0..6) {
                0 => *rng.choose(&special),
                1 if wild => f32::from_bits(rng.u32()),
                _ => rng.normal(),
            };
            (0..LANES).map(|_| value()).collect::<Vec<f32>>()
        };
        let (a, b) = (case(), case());
        let mut expected = Vec::new();
        dispatch(Isa::Scalar, Everything { a: &a, b: &b, out: &mut expected });
        for &isa in Isa::available() {
            let mut out = Vec::new();
            dispatch(isa, Everything { a: &a, b: &b, out: &mut out });
            for ((name, got), (_, want)) in out.iter().zip(&expected) {
                assert_eq!(got, want, "{isa} {name} of {a:?} and {b:?}");
            }
        }
    }
}

struct Dot<'a>(&'a [bf16], &'a [bf16]);

impl Kernel for Dot<'_> {
    type Output = Vec<f32>;

    #[inline(always)]
    fn run<V: Vector>(self) -> Vec<f32> {
        // SAFETY: both slices hold 32 values.
        unsafe {
            let (a, b) = (V::int_load(self.0.as_ptr().cast()), V::int_load(self.1.as_ptr().cast()));
            V::splat(0.25).dot_bf16(a, b).to_array().to_vec()
        }
    }
}

#[test]
fn dot_bf16_adds_both_halves() {
    let mut rng = Rng::new(8);
    let mut values = || (0..32).map(|_| bf16::from_f32(rng.normal())).collect::<Vec<_>>();
    let (a, b) = (values(), values());
    let expected: Vec<f32> = (0..16)
        .map(|i| 0.25 + (0..2).map(|j| a[2 * i + j].to_f32() * b[2 * i + j].to_f32()).sum::<f32>())
        .collect();
    for &isa in Isa::available() {
        // Three roundings of terms below 10.
        mica_testkit::assert_close(isa.name(), &dispatch(isa, Dot(&a, &b)), &expected, 1e-6, 1e-6);
    }
}

#[test]
fn the_sum_folds_as_documented() {
    struct Sum([f32; LANES]);
    impl Kernel for Sum {
        type Output = (f32, f32, f32);
        #[inline(always)]
        fn run<V: Vector>(self) -> (f32, f32, f32) {
            let x = V::from_array(self.0);
            (x.sum(), x.max_lane(), x.min_lane())
        }
    }
    let mut rng = Rng::new(3);
    let x: [f32; LANES] = std::array::from_fn(|_| rng.normal() * 1e3f32.powf(rng.normal()));
    let mut folded = x;
    for half in [8, 4, 2, 1] {
        for i in 0..half {
            folded[i] += folded[i + half];
        }
    }
    let largest = x.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let smallest = x.iter().copied().fold(f32::INFINITY, f32::min);
    for &isa in Isa::available() {
        assert_eq!(dispatch(isa, Sum(x)), (folded[0], largest, smallest), "{isa}");
    }
}
