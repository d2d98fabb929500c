//! The innermost loops of reductions: values into the lanes of a row, rows onto the totals of
//! their columns.
//!
//! Those of f32 are written in vectors, because it is what memory can keep up with: from loops over arrays of lanes
//! LLVM makes gathers across the blocks. The other types have plain loops. Both join in the same order.

use std::marker::PhantomData;

use mica_simd::{Isa, Kernel, Vector, dispatch};

use super::{LANES, TILE};

/// Rows that [`Loops::columns`] takes at a time (a total is read and written once for all), and [`Loops::whole`]
/// (sums of one row wait for each other, and memory delivers more from several places at a time).
pub(super) const ROWS: usize = 4;
/// Vectors that an extreme is looked for in: a comparison does not wait for the one before.
const CHAINS: usize = 4;

/// Loops over values of type T, joined by F.
pub(super) struct Loops<T, F> {
    isa: Isa,
    row: RowLoop<T, F>,
    whole: WholeLoop<T, F>,
    columns: ColumnLoop<T, F>,
    fold: FoldLanes<T, F>,
}

type RowLoop<T, F> = fn(&F, Isa, &mut [T; LANES], &[T]);
type WholeLoop<T, F> = unsafe fn(&F, Isa, Whole<T>, &mut [T]);
type FoldLanes<T, F> = fn(&F, Isa, [T; LANES]) -> T;
type ColumnLoop<T, F> = unsafe fn(&F, Isa, &mut [T], &[*const T]);

impl<T: Copy, F: Fn(T, T) -> T> Loops<T, F> {
    /// Loops over values one by one.
    pub fn plain() -> Self {
        Loops {
            isa: Isa::Scalar,
            row: plain_row::<T, F>,
            whole: plain_whole::<T, F>,
            columns: plain_columns::<T, F>,
            fold: plain_fold::<T, F>,
        }
    }

    /// Joins a row's values with its lanes: value *i* with lane *i* mod [`LANES`] (extremes of f32, of which any
    /// order gives the same number, in an order of their own).
    pub fn row(&self, join: &F, lanes: &mut [T; LANES], values: &[T]) {
        (self.row)(join, self.isa, lanes, values)
    }

    /// Reduces whole rows, one for each result.
    ///
    /// # Safety
    /// So many rows are readable.
    pub unsafe fn whole(&self, join: &F, rows: Whole<T>, results: &mut [T]) {
        // SAFETY: promised by the caller.
        unsafe { (self.whole)(join, self.isa, rows, results) }
    }

    /// The lanes as one: the upper half joins the lower until one is left.
    pub fn fold(&self, join: &F, lanes: [T; LANES]) -> T {
        (self.fold)(join, self.isa, lanes)
    }

    /// Joins up to [`ROWS`] rows, each as long as the totals, with these, one row after the other.
    ///
    /// # Safety
    /// The rows are readable and apart from the totals.
    pub unsafe fn columns(&self, join: &F, totals: &mut [T], rows: &[*const T]) {
        // SAFETY: promised by the caller.
        unsafe { (self.columns)(join, self.isa, totals, rows) }
    }
}

impl<F> Loops<f32, F> {
    /// Loops over vectors. `J` is `F` in vectors.
    pub fn vectors<J: Join>(isa: Isa) -> Self {
        Loops {
            isa,
            row: |_, isa, lanes, values| join_row::<InOrder<J>>(isa, lanes, values),
            // SAFETY: promised by the caller of `whole`.
            whole: |_, isa, rows, results| unsafe { whole_rows::<InOrder<J>>(isa, rows, results) },
            columns: vector_columns::<J, F>,
            fold: |_, isa, lanes| fold::<J>(isa, lanes),
        }
    }

    /// The same for the largest or smallest value.
    pub fn extremes<J: Extreme>(isa: Isa) -> Self {
        Loops {
            row: |_, isa, lanes, values| join_row::<AnyOrder<J>>(isa, lanes, values),
            // SAFETY: promised by the caller of `whole`.
            whole: |_, isa, rows, results| unsafe { whole_rows::<AnyOrder<J>>(isa, rows, results) },
            ..Loops::vectors::<J>(isa)
        }
    }
}

/// Rows of values that lie side by side.
#[derive(Clone, Copy)]
pub(super) struct Whole<T> {
    pub first: *const T,
    /// From one row to the next, in elements.
    pub stride: isize,
    /// Of each row.
    pub length: usize,
    /// What lanes begin with.
    pub neutral: T,
}

impl<T: Copy> Whole<T> {
    /// # Safety
    /// There is this row.
    #[inline(always)]
    unsafe fn row<'a>(self, index: usize) -> &'a [T] {
        // SAFETY: promised by the caller.
        unsafe {
            std::slice::from_raw_parts(self.first.wrapping_offset(index as isize * self.stride), self.length)
        }
    }
}

fn plain_row<T: Copy, F: Fn(T, T) -> T>(join: &F, _: Isa, lanes: &mut [T; LANES], values: &[T]) {
    let mut joined = *lanes;
    let (blocks, tail) = values.as_chunks::<LANES>();
    for block in blocks {
        for lane in 0..LANES {
            joined[lane] = join(joined[lane], block[lane]);
        }
    }
    for (lane, &value) in tail.iter().enumerate() {
        joined[lane] = join(joined[lane], value);
    }
    *lanes = joined;
}

fn plain_fold<T: Copy, F: Fn(T, T) -> T>(join: &F, _: Isa, mut lanes: [T; LANES]) -> T {
    for width in [8, 4, 2, 1] {
        for lane in 0..width {
            lanes[lane] = join(lanes[lane], lanes[lane + width]);
        }
    }
    lanes[0]
}

unsafe fn plain_whole<T: Copy, F: Fn(T, T) -> T>(join: &F, isa: Isa, rows: Whole<T>, results: &mut [T]) {
    for (index, result) in results.iter_mut().enumerate() {
        let mut lanes = [rows.neutral; LANES];
        // SAFETY: promised by the caller.
        plain_row(join, isa, &mut lanes, unsafe { rows.row(index) });
        *result = plain_fold(join, isa, lanes);
    }
}

unsafe fn plain_columns<T: Copy, F: Fn(T, T) -> T>(join: &F, _: Isa, totals: &mut [T], rows: &[*const T]) {
    for &row in rows {
        // SAFETY: promised by the caller.
        let values = unsafe { std::slice::from_raw_parts(row, totals.len()) };
        for (total, &value) in totals.iter_mut().zip(values) {
            *total = join(*total, value);
        }
    }
}

/// How vectors are joined.
pub(super) trait Join: 'static {
    /// Joined with anything it changes nothing.
    const NEUTRAL: f32;
    fn join<V: Vector>(a: V, b: V) -> V;

    /// The lanes as one: the upper half joins the lower until one is left.
    #[inline(always)]
    fn fold<V: Vector>(lanes: V) -> f32 {
        let mut lanes = lanes.to_array();
        for width in [8, 4, 2, 1] {
            let mut upper = [Self::NEUTRAL; LANES];
            upper[..width].copy_from_slice(&lanes[width..2 * width]);
            lanes = Self::join(V::from_array(lanes), V::from_array(upper)).to_array();
        }
        lanes[0]
    }
}

/// A [`Join`] of which one instruction does all but let NaN win.
pub(super) trait Extreme: Join {
    fn quick<V: Vector>(a: V, b: V) -> V;
}

pub(super) struct Sum;
pub(super) struct Product;
pub(super) struct Largest;
pub(super) struct Smallest;

impl Join for Sum {
    const NEUTRAL: f32 = 0.0;
    #[inline(always)]
    fn join<V: Vector>(a: V, b: V) -> V {
        a + b
    }
    #[inline(always)]
    fn fold<V: Vector>(lanes: V) -> f32 {
        lanes.sum()
    }
}

impl Join for Product {
    const NEUTRAL: f32 = 1.0;
    #[inline(always)]
    fn join<V: Vector>(a: V, b: V) -> V {
        a * b
    }
}

impl Join for Largest {
    const NEUTRAL: f32 = f32::NEG_INFINITY;
    #[inline(always)]
    fn join<V: Vector>(a: V, b: V) -> V {
        V::select(a.is_nan(), a, a.max(b))
    }
    #[inline(always)]
    fn fold<V: Vector>(lanes: V) -> f32 {
        if V::any(lanes.is_nan()) { f32::NAN } else { lanes.max_lane() }
    }
}

impl Extreme for Largest {
    #[inline(always)]
    fn quick<V: Vector>(a: V, b: V) -> V {
        a.max(b)
    }
}

impl Join for Smallest {
    const NEUTRAL: f32 = f32::INFINITY;
    #[inline(always)]
    fn join<V: Vector>(a: V, b: V) -> V {
        V::select(a.is_nan(), a, a.min(b))
    }
    #[inline(always)]
    fn fold<V: Vector>(lanes: V) -> f32 {
        if V::any(lanes.is_nan()) { f32::NAN } else { lanes.min_lane() }
    }
}

impl Extreme for Smallest {
    #[inline(always)]
    fn quick<V: Vector>(a: V, b: V) -> V {
        a.min(b)
    }
}

/// How the values of rows of one length join their lanes.
pub(super) trait Order: 'static {
    type Join: Join;

    fn rows<V: Vector, const N: usize>(lanes: &mut [V; N], values: [&[f32]; N]);
}

/// Value *i* joins lane *i* mod [`LANES`], one after the other.
pub(super) struct InOrder<J>(PhantomData<J>);
/// For extremes: finds those of what is no NaN and notes beside it whether there is one; a row that has one is joined
/// once more, so that it wins.
///
/// Tile by tile: the order in which zeros meet must not depend on whether a row comes whole.
pub(super) struct AnyOrder<J>(PhantomData<J>);

impl<J: Join> Order for InOrder<J> {
    type Join = J;

    #[inline(always)]
    fn rows<V: Vector, const N: usize>(lanes: &mut [V; N], values: [&[f32]; N]) {
        let count = length(&values);
        let whole = count - count % LANES;
        for at in (0..whole).step_by(LANES) {
            for row in 0..N {
                // SAFETY: a whole vector of the row.
                lanes[row] = J::join(lanes[row], unsafe { V::load(values[row].as_ptr().add(at)) });
            }
        }
        if whole < count {
            for row in 0..N {
                lanes[row] = J::join(lanes[row], V::from_slice(&values[row][whole..], J::NEUTRAL));
            }
        }
    }
}

impl<J: Extreme> Order for AnyOrder<J> {
    type Join = J;

    #[inline(always)]
    fn rows<V: Vector, const N: usize>(lanes: &mut [V; N], values: [&[f32]; N]) {
        const BLOCK: usize = CHAINS * LANES;
        let length = length(&values);
        for start in (0..length).step_by(TILE) {
            let count = TILE.min(length - start);
            let whole = count - count % BLOCK;
            let mut found = [[V::splat(J::NEUTRAL); CHAINS]; N];
            let mut numbers = [V::mask_from_bits(u16::MAX); N];
            for at in (start..start + whole).step_by(BLOCK) {
                for row in 0..N {
                    for chain in (0..CHAINS).step_by(2) {
                        // SAFETY: a block is so many vectors.
                        let (a, b) = unsafe {
                            let at = values[row].as_ptr().add(at + chain * LANES);
                            (V::load(at), V::load(at.add(LANES)))
                        };
                        found[row][chain] = J::quick(found[row][chain], a);
                        found[row][chain + 1] = J::quick(found[row][chain + 1], b);
                        // One comparison for two vectors: from a cache, values come faster than these take.
                        numbers[row] = V::mask_and(numbers[row], a.ordered(b));
                    }
                }
            }
            for row in 0..N {
                let lanes = std::array::from_mut(&mut lanes[row]);
                let values = &values[row][start..start + count];
                if !V::all(numbers[row]) {
                    InOrder::<J>::rows(lanes, [values]);
                    continue;
                }
                let [a, b, c, d] = found[row];
                lanes[0] = J::join(lanes[0], J::quick(J::quick(a, b), J::quick(c, d)));
                if whole < count {
                    InOrder::<J>::rows(lanes, [&values[whole..]]);
                }
            }
        }
    }
}

/// The length of all rows.
#[inline(always)]
fn length<const N: usize>(rows: &[&[f32]; N]) -> usize {
    let length = rows[0].len();
    assert!(rows.iter().all(|row| row.len() == length), "rows of one length");
    length
}

/// Joins the values of a row with its lanes.
pub(super) fn join_row<O: Order>(isa: Isa, lanes: &mut [f32; LANES], values: &[f32]) {
    dispatch(isa, JoinRow::<O> { lanes, values, order: PhantomData })
}

struct JoinRow<'a, O> {
    lanes: &'a mut [f32; LANES],
    values: &'a [f32],
    order: PhantomData<O>,
}

impl<O: Order> Kernel for JoinRow<'_, O> {
    type Output = ();

    #[inline(always)]
    fn run<V: Vector>(self) {
        let mut lanes = [V::from_array(*self.lanes)];
        O::rows(&mut lanes, [self.values]);
        *self.lanes = lanes[0].to_array();
    }
}

/// Reduces whole rows, one for each result.
///
/// # Safety
/// So many rows are readable.
pub(super) unsafe fn whole_rows<O: Order>(isa: Isa, rows: Whole<f32>, results: &mut [f32]) {
    dispatch(isa, WholeRows::<O> { rows, results, order: PhantomData })
}

struct WholeRows<'a, O> {
    rows: Whole<f32>,
    results: &'a mut [f32],
    order: PhantomData<O>,
}

impl<O: Order> WholeRows<'_, O> {
    #[inline(always)]
    fn several<V: Vector, const N: usize>(&mut self, from: usize) {
        let mut lanes = [V::splat(O::Join::NEUTRAL); N];
        // SAFETY: promised by the caller of `whole_rows`.
        O::rows(&mut lanes, std::array::from_fn(|i| unsafe { self.rows.row(from + i) }));
        for (result, lanes) in self.results[from..from + N].iter_mut().zip(lanes) {
            *result = O::Join::fold(lanes);
        }
    }
}

impl<O: Order> Kernel for WholeRows<'_, O> {
    type Output = ();

    #[inline(always)]
    fn run<V: Vector>(mut self) {
        let count = self.results.len();
        let fours = count - count % ROWS;
        for from in (0..fours).step_by(ROWS) {
            self.several::<V, ROWS>(from);
        }
        for from in fours..count {
            self.several::<V, 1>(from);
        }
    }
}

/// The largest or smallest value; NaN if any is.
pub(super) fn extreme<J: Extreme>(isa: Isa, values: &[f32]) -> f32 {
    let mut lanes = [J::NEUTRAL; LANES];
    join_row::<AnyOrder<J>>(isa, &mut lanes, values);
    fold::<J>(isa, lanes)
}

/// The lanes as one: the upper half joins the lower until one is left.
pub(super) fn fold<J: Join>(isa: Isa, lanes: [f32; LANES]) -> f32 {
    dispatch(isa, Fold::<J> { lanes, join: PhantomData })
}

/// The place of the first value that is `top`, which is one of them (NaN if `top` is).
pub(super) fn first_place(isa: Isa, values: &[f32], top: f32) -> usize {
    dispatch(isa, FirstPlace { values, top })
}

struct FirstPlace<'a> {
    values: &'a [f32],
    top: f32,
}

impl Kernel for FirstPlace<'_> {
    type Output = usize;

    #[inline(always)]
    fn run<V: Vector>(self) -> usize {
        let top = V::splat(self.top);
        let is_nan = self.top.is_nan();
        macro_rules! is_top {
            ($at:expr) => {{
                // SAFETY: a whole vector.
                let values = unsafe { V::load(self.values.as_ptr().add($at)) };
                if is_nan { values.is_nan() } else { values.eq(top) }
            }};
        }
        let count = self.values.len();
        let mut at = 0;
        while at + 4 * LANES <= count {
            let low = V::mask_or(is_top!(at), is_top!(at + LANES));
            let high = V::mask_or(is_top!(at + 2 * LANES), is_top!(at + 3 * LANES));
            if V::any(V::mask_or(low, high)) {
                break;
            }
            at += 4 * LANES;
        }
        while at + LANES <= count {
            let found = V::mask_bits(is_top!(at));
            if found != 0 {
                return at + found.trailing_zeros() as usize;
            }
            at += LANES;
        }
        let is_top = |value: &f32| if is_nan { value.is_nan() } else { *value == self.top };
        at + self.values[at..].iter().position(is_top).expect("the value is one of them")
    }
}

struct Fold<J> {
    lanes: [f32; LANES],
    join: PhantomData<J>,
}

impl<J: Join> Kernel for Fold<J> {
    type Output = f32;

    #[inline(always)]
    fn run<V: Vector>(self) -> f32 {
        J::fold(V::from_array(self.lanes))
    }
}

unsafe fn vector_columns<J: Join, F>(_: &F, isa: Isa, totals: &mut [f32], rows: &[*const f32]) {
    if let Ok(&rows) = <&[*const f32; ROWS]>::try_from(rows) {
        dispatch(isa, Columns::<J, ROWS> { totals, rows, join: PhantomData });
    } else {
        for &row in rows {
            dispatch(isa, Columns::<J, 1> { totals, rows: [row], join: PhantomData });
        }
    }
}

/// The rows are readable as far as there are totals.
struct Columns<'a, J, const N: usize> {
    totals: &'a mut [f32],
    rows: [*const f32; N],
    join: PhantomData<J>,
}

impl<J: Join, const N: usize> Kernel for Columns<'_, J, N> {
    type Output = ();

    #[inline(always)]
    fn run<V: Vector>(self) {
        let count = self.totals.len();
        let totals = self.totals.as_mut_ptr();
        let whole = count - count % LANES;
        for at in (0..whole).step_by(LANES) {
            // SAFETY: a whole vector of each row and of the totals.
            unsafe {
                let mut total = V::load(totals.add(at));
                for row in self.rows {
                    total = J::join(total, V::load(row.add(at)));
                }
                total.store(totals.add(at));
            }
        }
        if whole < count {
            // SAFETY: the rest of each, and nothing past it.
            unsafe {
                let mut total = V::load_part(totals.add(whole), count - whole, J::NEUTRAL);
                for row in self.rows {
                    total = J::join(total, V::load_part(row.add(whole), count - whole, J::NEUTRAL));
                }
                total.store_part(totals.add(whole), count - whole);
            }
        }
    }
}
