//! Dense loops over one or two operands.
//!
//! A loop loads sixteen values, computes, and stores: it may therefore write over an operand that
//! it reads. The functions given compute one value from one place, so the compiler makes vectors
//! of them and every instruction-set tier gives the same bits. `map` loops are compiled for each
//! tier; `narrow` ones (integers, f64: never hot) once, for what the target has at least, which
//! keeps the program small.

use std::marker::PhantomData;

use mica_simd::Isa;

use super::tile::TileOp;

const BLOCK: usize = 16;

struct Map1<A, O, F, const TIERS: bool> {
    isa: Isa,
    f: F,
    types: PhantomData<fn(A) -> O>,
}

struct Map2<A, O, F, const TIERS: bool> {
    isa: Isa,
    f: F,
    types: PhantomData<fn(A) -> O>,
}

/// `out = f(a)`, a loop for each tier.
pub(crate) fn map1<A, O, F>(isa: Isa, f: F) -> Box<dyn TileOp>
where
    A: Copy + 'static,
    O: Copy + Default + 'static,
    F: Fn(A) -> O + Send + Sync + 'static,
{
    Box::new(Map1::<A, O, F, true> { isa, f, types: PhantomData })
}

/// `out = f(a)`, one loop.
pub(crate) fn narrow1<A, O, F>(f: F) -> Box<dyn TileOp>
where
    A: Copy + 'static,
    O: Copy + Default + 'static,
    F: Fn(A) -> O + Send + Sync + 'static,
{
    Box::new(Map1::<A, O, F, false> { isa: Isa::Scalar, f, types: PhantomData })
}

/// `out = f(a, b)`, a loop for each tier.
pub(crate) fn map2<A, O, F>(isa: Isa, f: F) -> Box<dyn TileOp>
where
    A: Copy + 'static,
    O: Copy + Default + 'static,
    F: Fn(A, A) -> O + Send + Sync + 'static,
{
    Box::new(Map2::<A, O, F, true> { isa, f, types: PhantomData })
}

/// `out = f(a, b)`, one loop.
pub(crate) fn narrow2<A, O, F>(f: F) -> Box<dyn TileOp>
where
    A: Copy + 'static,
    O: Copy + Default + 'static,
    F: Fn(A, A) -> O + Send + Sync + 'static,
{
    Box::new(Map2::<A, O, F, false> { isa: Isa::Scalar, f, types: PhantomData })
}

/// The same number, of which the compiler knows nothing. Without it, where arrays do not overlap,
/// LLVM makes vectors *across* the blocks too, with gathers and scatters: five times slower.
#[inline(always)]
fn opaque(i: usize) -> usize {
    #[allow(unused_mut)]
    let mut i = i;
    #[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
    // SAFETY: no instruction.
    unsafe {
        std::arch::asm!("/* {0} */", inout(reg) i, options(nomem, nostack, preserves_flags))
    };
    i
}

#[inline(always)]
unsafe fn loop1<A: Copy, O: Copy + Default, F: Fn(A) -> O>(f: &F, a: *const A, out: *mut O, count: usize) {
    // SAFETY: promised by the caller; arrays of A have A's alignment.
    unsafe {
        let mut i = 0;
        while i + BLOCK <= count {
            let x = a.add(i).cast::<[A; BLOCK]>().read();
            let mut z = [O::default(); BLOCK];
            for lane in 0..BLOCK {
                z[lane] = f(x[lane]);
            }
            out.add(i).cast::<[O; BLOCK]>().write(z);
            i = opaque(i + BLOCK);
        }
        while i < count {
            *out.add(i) = f(*a.add(i));
            i += 1;
        }
    }
}

#[inline(always)]
unsafe fn loop2<A: Copy, O: Copy + Default, F: Fn(A, A) -> O>(
    f: &F,
    a: *const A,
    b: *const A,
    out: *mut O,
    count: usize,
) {
    // SAFETY: promised by the caller; arrays of A have A's alignment.
    unsafe {
        let mut i = 0;
        while i + BLOCK <= count {
            let x = a.add(i).cast::<[A; BLOCK]>().read();
            let y = b.add(i).cast::<[A; BLOCK]>().read();
            let mut z = [O::default(); BLOCK];
            for lane in 0..BLOCK {
                z[lane] = f(x[lane], y[lane]);
            }
            out.add(i).cast::<[O; BLOCK]>().write(z);
            i = opaque(i + BLOCK);
        }
        while i < count {
            *out.add(i) = f(*a.add(i), *b.add(i));
            i += 1;
        }
    }
}

macro_rules! for_tiers {
    ($([$features:literal] $one:ident $two:ident)*) => { $(
        #[cfg(target_arch = "x86_64")]
        #[target_feature(enable = $features)]
        unsafe fn $one<A: Copy, O: Copy + Default, F: Fn(A) -> O>(
            f: &F,
            a: *const A,
            out: *mut O,
            count: usize,
        ) {
            // SAFETY: promised by the caller.
            unsafe { loop1(f, a, out, count) }
        }

        #[cfg(target_arch = "x86_64")]
        #[target_feature(enable = $features)]
        unsafe fn $two<A: Copy, O: Copy + Default, F: Fn(A, A) -> O>(
            f: &F,
            a: *const A,
            b: *const A,
            out: *mut O,
            count: usize,
        ) {
            // SAFETY: promised by the caller.
            unsafe { loop2(f, a, b, out, count) }
        }
    )* };
}
for_tiers! {
    ["avx2,fma,f16c"] loop1_avx2 loop2_avx2
    ["avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c"] loop1_avx512 loop2_avx512
}

impl<A, O, F, const TIERS: bool> TileOp for Map1<A, O, F, TIERS>
where
    A: Copy,
    O: Copy + Default,
    F: Fn(A) -> O + Send + Sync,
{
    unsafe fn run(&self, inputs: &[*const u8], output: *mut u8, count: usize) {
        let (a, out) = (inputs[0].cast::<A>(), output.cast::<O>());
        // SAFETY: promised by the caller; the tier was found on this machine.
        unsafe {
            match self.isa {
                #[cfg(target_arch = "x86_64")]
                Isa::Avx2 | Isa::Avx2Vnni if TIERS => loop1_avx2(&self.f, a, out, count),
                #[cfg(target_arch = "x86_64")]
                Isa::Avx512 | Isa::Avx512Bf16 | Isa::Amx if TIERS => loop1_avx512(&self.f, a, out, count),
                _ => loop1(&self.f, a, out, count),
            }
        }
    }
}

impl<A, O, F, const TIERS: bool> TileOp for Map2<A, O, F, TIERS>
where
    A: Copy,
    O: Copy + Default,
    F: Fn(A, A) -> O + Send + Sync,
{
    unsafe fn run(&self, inputs: &[*const u8], output: *mut u8, count: usize) {
        let (a, b, out) = (inputs[0].cast::<A>(), inputs[1].cast::<A>(), output.cast::<O>());
        // SAFETY: promised by the caller; the tier was found on this machine.
        unsafe {
            match self.isa {
                #[cfg(target_arch = "x86_64")]
                Isa::Avx2 | Isa::Avx2Vnni if TIERS => loop2_avx2(&self.f, a, b, out, count),
                #[cfg(target_arch = "x86_64")]
                Isa::Avx512 | Isa::Avx512Bf16 | Isa::Amx if TIERS => loop2_avx512(&self.f, a, b, out, count),
                _ => loop2(&self.f, a, b, out, count),
            }
        }
    }
}
