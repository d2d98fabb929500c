//! The small matrix product of attention: rows of operands times panels (see [`super::block`]).
//!
//! Products of bf16 run on AMX tiles where the tier has them; everything else on vectors.

use std::ops::Range;

use half::bf16;
use mica_simd::{Element, Isa, Kernel, Vector, dispatch};

use super::ahead::Ahead;
use super::block::{PAIR, Stored};
#[cfg(target_arch = "x86_64")]
use super::tiles;

/// How products are formed, and of what.
pub(crate) trait Products: Send + Sync + 'static {
    /// What panels hold.
    type Stored: Stored;
    /// What operand rows hold.
    type Operand: Element;
    /// Whether AMX tiles form these products.
    const TILES: bool = false;
    /// Whether panels are widened on the way: twelve rows then share what was read, rather than six (on Emerald Rapids
    /// attention is 5 to 9 % faster).
    const WIDENS: bool = false;
    /// One pair of a panel in registers.
    type Pair<V: Vector>: Copy;
    /// One pair of an operand row in all lanes.
    type Splat<V: Vector>: Copy;

    /// Reads a pair.
    ///
    /// # Safety
    /// `p` is valid for 32 values.
    unsafe fn load<V: Vector>(p: *const Self::Stored) -> Self::Pair<V>;
    /// Reads a pair of operands.
    ///
    /// # Safety
    /// `p` is valid for two values.
    unsafe fn splat<V: Vector>(p: *const Self::Operand) -> Self::Splat<V>;
    /// `sum + b[0]·a[0] + b[1]·a[1]`, in that order.
    fn step<V: Vector>(sum: V, b: Self::Pair<V>, a: Self::Splat<V>) -> V;
    /// Writes what a row's keys count. Subnormal values may become zeros, as which products of bf16 take them.
    ///
    /// # Safety
    /// `p` is valid for 16 values.
    #[inline(always)]
    unsafe fn store_weight<V: Vector>(weight: V, p: *mut Self::Operand) {
        // SAFETY: promised by the caller.
        unsafe { Self::Operand::store(weight, p) }
    }
    /// Writes a pair: `low` is the first value of each lane. Subnormal values may become zeros.
    ///
    /// # Safety
    /// `p` is valid for 32 values.
    unsafe fn store_pair<V: Vector>(low: V, high: V, p: *mut Self::Stored);
}

/// f32 products of f32.
pub(crate) struct Single;
/// f32 products of f32 operands and bf16 panels: the same bits as [`Single`] on widened panels.
pub(crate) struct Widened;
/// Products of bf16, summed in f32.
pub(crate) struct Halves;

impl Products for Single {
    type Stored = f32;
    type Operand = f32;
    type Pair<V: Vector> = (V, V);
    type Splat<V: Vector> = (V, V);

    #[inline(always)]
    unsafe fn load<V: Vector>(p: *const f32) -> (V, V) {
        // SAFETY: promised by the caller.
        unsafe { (V::load(p), V::load(p.add(16))) }
    }
    #[inline(always)]
    unsafe fn splat<V: Vector>(p: *const f32) -> (V, V) {
        // SAFETY: promised by the caller.
        unsafe { (V::splat(*p), V::splat(*p.add(1))) }
    }
    #[inline(always)]
    fn step<V: Vector>(sum: V, b: (V, V), a: (V, V)) -> V {
        b.1.mul_add(a.1, b.0.mul_add(a.0, sum))
    }
    #[inline(always)]
    unsafe fn store_pair<V: Vector>(low: V, high: V, p: *mut f32) {
        // SAFETY: promised by the caller.
        unsafe {
            low.store(p);
            high.store(p.add(16));
        }
    }
}

impl Products for Widened {
    const WIDENS: bool = true;
    type Stored = bf16;
    type Operand = f32;
    type Pair<V: Vector> = (V, V);
    type Splat<V: Vector> = (V, V);

    #[inline(always)]
    unsafe fn load<V: Vector>(p: *const bf16) -> (V, V) {
        // SAFETY: promised by the caller.
        let bits = unsafe { V::int_load(p.cast()) };
        let low = V::from_bits(V::int_shl(bits, 16));
        (low, V::from_bits(V::int_and(bits, V::int_splat(0xffff_0000u32 as i32))))
    }
    #[inline(always)]
    unsafe fn splat<V: Vector>(p: *const f32) -> (V, V) {
        // SAFETY: promised by the caller.
        unsafe { Single::splat(p) }
    }
    #[inline(always)]
    fn step<V: Vector>(sum: V, b: (V, V), a: (V, V)) -> V {
        Single::step(sum, b, a)
    }
    #[inline(always)]
    unsafe fn store_pair<V: Vector>(low: V, high: V, p: *mut bf16) {
        // SAFETY: promised by the caller.
        unsafe { Halves::store_pair(low, high, p) }
    }
}

impl Products for Halves {
    const TILES: bool = true;
    type Stored = bf16;
    type Operand = bf16;
    type Pair<V: Vector> = V::Int;
    type Splat<V: Vector> = V::Int;

    #[inline(always)]
    unsafe fn load<V: Vector>(p: *const bf16) -> V::Int {
        // SAFETY: promised by the caller.
        unsafe { V::int_load(p.cast()) }
    }
    #[inline(always)]
    unsafe fn splat<V: Vector>(p: *const bf16) -> V::Int {
        // SAFETY: promised by the caller.
        V::int_splat(unsafe { p.cast::<i32>().read_unaligned() })
    }
    #[inline(always)]
    fn step<V: Vector>(sum: V, b: V::Int, a: V::Int) -> V {
        sum.dot_bf16(b, a)
    }
    #[inline(always)]
    unsafe fn store_weight<V: Vector>(weight: V, p: *mut bf16) {
        // SAFETY: promised by the caller.
        unsafe { weight.store_bf16_normal(p) }
    }
    #[inline(always)]
    unsafe fn store_pair<V: Vector>(low: V, high: V, p: *mut bf16) {
        // SAFETY: promised by the caller.
        unsafe { V::int_store(low.bf16_pairs_normal(high), p.cast()) }
    }
}

/// `out[r][16·p + lane] = Σ over pairs, ascending, of a[r] · panel p`, for all rows and the
/// panels of the range; added to what is there if `add` (on AMX the chain goes on from there).
///
/// AMX sums blocks of 16 pairs (docs/NUMERICS.md), counted from `pairs.start`: for bits that do not
/// depend on the range it has to be a multiple of 16.
///
/// Of few rows whose panels come from memory, a line is asked for with `ahead` for each that is read.
///
/// Never inlined, so that its unrolled bodies exist once a tier and not once a call.
///
/// # Safety
/// `a` holds `rows` rows, `a_stride` apart, with the pairs of the range; `b` holds the panels of
/// the range, `panel` values apart; `out` holds the result rows, `out_stride` apart.
#[inline(never)]
pub(crate) unsafe fn product<P: Products>(
    isa: Isa,
    a: *const P::Operand,
    a_stride: usize,
    rows: usize,
    b: *const P::Stored,
    panel: usize,
    panels: Range<usize>,
    pairs: Range<usize>,
    out: *mut f32,
    out_stride: usize,
    add: bool,
    ahead: &mut Ahead,
) {
    #[cfg(target_arch = "x86_64")]
    if P::TILES && isa == Isa::Amx {
        // SAFETY: promised by the caller; the tier is available, and these products are of bf16.
        return unsafe {
            tiles::product(a.cast(), a_stride, rows, b.cast(), panel, panels, pairs, out, out_stride, add)
        };
    }
    dispatch(isa, Body::<P> { a, a_stride, rows, b, panel, panels, pairs, out, out_stride, add, ahead });
}

/// The arguments of [`product`], whose promises hold where one is made.
struct Body<'a, P: Products> {
    a: *const P::Operand,
    a_stride: usize,
    rows: usize,
    b: *const P::Stored,
    panel: usize,
    panels: Range<usize>,
    pairs: Range<usize>,
    out: *mut f32,
    out_stride: usize,
    add: bool,
    ahead: &'a mut Ahead,
}

impl<P: Products> Kernel for Body<'_, P> {
    type Output = ();

    #[inline(always)]
    fn run<V: Vector>(self) {
        let Body { a, a_stride, rows, b, panel, panels, pairs, out, out_stride, add, ahead } = self;
        // 6 × 4 accumulators of one register leave room for the panels on AVX-512; the other tiers
        // need two or four registers a vector.
        let big = matches!(V::ISA, Isa::Avx512);
        // Few rows leave the time to memory, and one panel after the other is one stream: Zen 5 reads two or
        // four side by side a fifth slower. From a cache, several side by side hide the products' latency.
        let few = ahead.is_far() && are_few(V::ISA, rows);
        let mut p = panels.start;
        while p < panels.end {
            let left = panels.end - p;
            let width = if few {
                1
            } else if big && P::WIDENS && rows >= 12 && left >= 2 {
                2
            } else if big && left >= 4 {
                4
            } else if left >= 2 {
                2
            } else {
                1
            };
            // SAFETY: inside what the caller of `product` promised.
            unsafe {
                let b = b.add(p * panel);
                let mut r = 0;
                while r < rows {
                    let a = a.add(r * a_stride);
                    let out = out.add(r * out_stride + p * 16);
                    let left = rows - r;
                    macro_rules! run {
                        ($rows:literal) => {{
                            match width {
                                4 => tile::<P, V, $rows, 4>(
                                    a, a_stride, b, panel, &pairs, out, out_stride, add,
                                ),
                                2 => tile::<P, V, $rows, 2>(
                                    a, a_stride, b, panel, &pairs, out, out_stride, add,
                                ),
                                _ => tile::<P, V, $rows, 1>(
                                    a, a_stride, b, panel, &pairs, out, out_stride, add,
                                ),
                            }
                            r += $rows;
                        }};
                    }
                    if few {
                        macro_rules! rows {
                            ($($rows:literal)*) => {
                                match rows {
                                    $($rows => stream::<P, V, $rows>(
                                        a, a_stride, b, &pairs, out, out_stride, add, ahead,
                                    ),)*
                                    _ => unreachable!("these are not few"),
                                }
                            };
                        }
                        rows!(1 2 3 4 5 6 7 8);
                        r += rows;
                    } else if big && P::WIDENS && width == 2 && left >= 12 {
                        tile::<P, V, 12, 2>(a, a_stride, b, panel, &pairs, out, out_stride, add);
                        r += 12;
                    } else if big && left >= 6 {
                        run!(6)
                    } else if big && left >= 4 {
                        run!(4)
                    } else if left >= 2 {
                        run!(2)
                    } else {
                        run!(1)
                    }
                }
            }
            p += width;
        }
    }
}

/// Whether rows are so few that panels are read one by one: a register of sums each has to be there.
#[inline(always)]
pub(super) fn are_few(isa: Isa, rows: usize) -> bool {
    rows <= if matches!(isa, Isa::Avx512 | Isa::Avx512Bf16 | Isa::Amx) { 8 } else { 4 }
}

/// Few rows by one panel; lines further on are asked for meanwhile.
///
/// # Safety
/// As [`product`].
#[inline(always)]
unsafe fn stream<P: Products, V: Vector, const R: usize>(
    a: *const P::Operand,
    a_stride: usize,
    b: *const P::Stored,
    pairs: &Range<usize>,
    out: *mut f32,
    out_stride: usize,
    add: bool,
    ahead: &mut Ahead,
) {
    let mut sums = [V::zero(); R];
    // SAFETY: promised by the caller.
    unsafe {
        for i in pairs.start..pairs.end {
            let at = b.add(i * PAIR);
            (0..PAIR * size_of::<P::Stored>() / 64).for_each(|_| ahead.ask());
            let right = P::load::<V>(at);
            for r in 0..R {
                sums[r] = P::step(sums[r], right, P::splat::<V>(a.add(r * a_stride + 2 * i)));
            }
        }
        for r in 0..R {
            let to = out.add(r * out_stride);
            let value = if add { V::load(to) + sums[r] } else { sums[r] };
            value.store(to);
        }
    }
}

#[inline(always)]
unsafe fn tile<P: Products, V: Vector, const R: usize, const C: usize>(
    a: *const P::Operand,
    a_stride: usize,
    b: *const P::Stored,
    panel: usize,
    pairs: &Range<usize>,
    out: *mut f32,
    out_stride: usize,
    add: bool,
) {
    let mut sums = [[V::zero(); C]; R];
    // SAFETY: promised by the caller.
    unsafe {
        for i in pairs.start..pairs.end {
            let mut right = [P::load::<V>(b.add(i * PAIR)); C];
            for c in 1..C {
                right[c] = P::load::<V>(b.add(c * panel + i * PAIR));
            }
            for r in 0..R {
                let left = P::splat::<V>(a.add(r * a_stride + 2 * i));
                for c in 0..C {
                    sums[r][c] = P::step(sums[r][c], right[c], left);
                }
            }
        }
        for r in 0..R {
            for c in 0..C {
                let to = out.add(r * out_stride + c * 16);
                let value = if add { V::load(to) + sums[r][c] } else { sums[r][c] };
                value.store(to);
            }
        }
    }
}
