//! Random weights, their f64 values, and running plans.

use half::{bf16, f16};
use mica_codec::gguf::{GgufBlock, Groups};
use mica_codec::micro::{self, MicroMode};
use mica_codec::{Float, QuantSpec, affine, minifloat};
use mica_kernels::gemm::FloatView;
use mica_kernels::quant::{Epilogue, Precision, QuantWeight, ScaleType, ScaleVec, Scales};
use mica_kernels::{View, ViewMut};
use mica_simd::Isa;
use mica_testkit::Rng;
use mica_threads::{Pool, Task};

pub const BITS: [usize; 7] = [1, 2, 3, 4, 5, 6, 8];
pub const GROUPS: [usize; 3] = [32, 64, 128];
pub const SCALES: [ScaleType; 3] = [ScaleType::F32, ScaleType::Bf16, ScaleType::F16];

/// A packed weight beside the numbers it stands for.
pub struct Weight {
    pub packed: QuantWeight,
    /// s·q + b in f64, `[out, in]`.
    pub exact: Vec<f64>,
    /// Values as `mx.dequantize` gives them.
    pub dequantized: Vec<f32>,
}

impl Weight {
    /// Normal values, quantized.
    pub fn random(
        rng: &mut Rng,
        pool: &Pool,
        bits: usize,
        group: usize,
        scale: ScaleType,
        out: usize,
        inner: usize,
    ) -> Weight {
        match scale {
            ScaleType::F32 => Weight::of::<f32>(rng, pool, bits, group, out, inner, ScaleVec::F32),
            ScaleType::Bf16 => Weight::of::<bf16>(rng, pool, bits, group, out, inner, ScaleVec::Bf16),
            ScaleType::F16 => Weight::of::<f16>(rng, pool, bits, group, out, inner, ScaleVec::F16),
            ScaleType::E8m0 | ScaleType::E4m3 => unreachable!("not of affine codes"),
        }
    }

    /// Normal values of all magnitudes, in a micro-scaled mode.
    pub fn micro(rng: &mut Rng, pool: &Pool, mode: MicroMode, out: usize, inner: usize) -> Weight {
        let group = mode.group_size();
        let mut values = rng.normals(out * inner);
        for group in values.chunks_exact_mut(group) {
            let magnitude = 2f32.powi(rng.range(0..12) as i32 - 9);
            group.iter_mut().for_each(|value| *value *= magnitude);
        }
        let mut words = vec![0; out * inner * mode.bits() / 32];
        let mut scales = vec![0; out * inner / group];
        micro::quantize(&values, mode, None, &mut words, &mut scales).unwrap();
        let mut dequantized = values;
        micro::dequantize(&words, &scales, mode, None, &mut dequantized).unwrap();
        let spec = QuantSpec::usual(mode.name().parse().unwrap());
        let scales = match mode {
            MicroMode::Nvfp4 => Scales::E4m3(&scales),
            MicroMode::Mxfp4 | MicroMode::Mxfp8 => Scales::E8m0(&scales),
        };
        let packed = QuantWeight::pack(pool, spec, [out, inner], &words, scales, None).unwrap();
        let exact = dequantized.iter().map(|&value| f64::from(value)).collect();
        Weight { packed, exact, dequantized }
    }

    fn of<T: Float>(
        rng: &mut Rng,
        pool: &Pool,
        bits: usize,
        group: usize,
        out: usize,
        inner: usize,
        wrap: impl Fn(Vec<T>) -> ScaleVec,
    ) -> Weight {
        let spec = QuantSpec::affine(bits, group).unwrap();
        let values: Vec<T> = (0..out * inner).map(|_| T::from_f32(rng.normal())).collect();
        let groups = out * inner / group;
        let mut words = vec![0; out * spec.words(inner)];
        let (mut s, mut b) = (vec![T::from_f32(0.0); groups], vec![T::from_f32(0.0); groups]);
        affine::quantize(&values, inner, spec, &mut words, &mut s, &mut b).unwrap();
        let mut back = values;
        affine::dequantize(&words, &s, &b, inner, spec, &mut back).unwrap();
        let mut codes = vec![0u8; out * inner];
        mica_codec::bits::unpack(&words, bits, &mut codes);
        let wide = |value: T| f64::from(value.to_f32());
        let exact = codes
            .iter()
            .enumerate()
            .map(|(i, &q)| f64::from(q) * wide(s[i / group]) + wide(b[i / group]))
            .collect();
        let (s, b) = (wrap(s), wrap(b));
        let packed =
            QuantWeight::pack(pool, spec, [out, inner], &words, s.as_scales(), Some(b.as_scales())).unwrap();
        Weight { packed, exact, dequantized: back.into_iter().map(|value| value.to_f32()).collect() }
    }

    /// x·wᵀ in f64 of x `[m, in]`.
    pub fn forward(&self, x: &[f32]) -> Vec<f32> {
        let [out, inner] = self.packed.shape();
        let row = |x: &[f32], n: usize| -> f64 {
            x.iter().zip(&self.exact[n * inner..]).map(|(&x, &w)| f64::from(x) * w).sum()
        };
        x.chunks_exact(inner).flat_map(|x| (0..out).map(move |n| row(x, n) as f32)).collect()
    }
}

impl Weight {
    /// Random blocks of ggml's.
    pub fn gguf(rng: &mut Rng, pool: &Pool, block: GgufBlock, out: usize, inner: usize) -> Weight {
        let mut blocks: Vec<u8> =
            (0..out * inner / block.values() * block.bytes()).map(|_| rng.u32() as u8).collect();
        for block_bytes in blocks.chunks_exact_mut(block.bytes()) {
            let places: &[usize] = match block {
                GgufBlock::MXFP4 => &[],
                GgufBlock::Q6_K => &[208],
                _ if block.has_biases() => &[0, 2],
                _ => &[0],
            };
            for &at in places {
                block_bytes[at..at + 2].copy_from_slice(&f16::from_f32(0.05 * rng.normal()).to_le_bytes());
            }
            if block == GgufBlock::MXFP4 {
                block_bytes[0] = rng.range(115..130) as u8;
            }
        }
        let row = inner / block.values() * block.bytes();
        let read = |rows: std::ops::Range<usize>, into: &mut [u8]| {
            into.copy_from_slice(&blocks[rows.start * row..rows.end * row]);
            Ok::<(), ()>(())
        };
        let packed = QuantWeight::read_gguf(pool, block, [out, inner], read).unwrap().unwrap();
        let mut dequantized = vec![0f32; out * inner];
        block.dequantize(&blocks, &mut dequantized).unwrap();
        let (mut exact, mut groups) = (Vec::new(), Groups::default());
        for bytes in blocks.chunks_exact(block.bytes()) {
            block.take_apart(bytes, &mut groups);
            for (at, &code) in groups.codes[..block.values()].iter().enumerate() {
                let group = at / block.group_size();
                let number = match block {
                    GgufBlock::MXFP4 => f64::from(minifloat::E2M1[usize::from(code)]),
                    _ => f64::from(code) - f64::from(block.centre().unwrap_or(0)),
                };
                let bias = if block.has_biases() { f64::from(groups.biases[group]) } else { 0.0 };
                exact.push(number * f64::from(groups.scales[group]) + bias);
            }
        }
        Weight { packed, exact, dequantized }
    }
}

/// Runs a task list made over a workspace aligned to 64.
pub fn with_workspace<R>(bytes: usize, f: impl FnOnce(*mut u8) -> R) -> R {
    // Poisoned, so that reading what was not staged shows.
    let mut memory = vec![0xffu8; bytes + 64];
    let offset = memory.as_mut_ptr().align_offset(64);
    f(memory[offset..].as_mut_ptr())
}

/// x·wᵀ through a plan: NaN where nothing was written.
pub fn run_forward<'a>(
    pool: &Pool,
    weight: &'a QuantWeight,
    x: impl Into<FloatView<'a>>,
    m: usize,
    precision: Precision,
    epilogue: Epilogue<'a>,
    isa: Isa,
) -> Vec<f32> {
    let n = weight.shape()[0];
    let mut out = vec![f32::NAN; m * n];
    let x = x.into();
    {
        // SAFETY: the output outlives the tasks, which are dropped in this block.
        let view = unsafe { ViewMut::from_raw(out.as_mut_ptr(), &[m, n], &[n as isize, 1]) };
        let plan = weight.plan_forward(x, view, precision, epilogue, isa).unwrap();
        with_workspace(plan.workspace_bytes(), |workspace| {
            let mut tasks: Vec<Box<dyn Task + '_>> = Vec::new();
            // SAFETY: aligned, large enough, used by nothing else.
            unsafe { plan.tasks(workspace, &mut tasks) };
            pool.run(&tasks).unwrap();
        });
    }
    out
}

/// A contiguous view of `[rows, columns]`.
pub fn rows(data: &[f32], columns: usize) -> View<'_, f32> {
    View::new(data, &[data.len() / columns, columns]).unwrap()
}
