//! Optimizer steps fused over all parameters: one pass over memory, in parallel.
//!
//! [`adamw`] updates parameters and both moments in place. It takes the factor of clipping by the global norm, and
//! leaves gradients as they are. Chunks are cut by shape.

use mica_simd::{Isa, Kernel, LANES, Vector, dispatch};
use mica_threads::{Scratch, Task};

use crate::dtype::{Dtype, DynView, DynViewMut};
use crate::elementwise::tile::{CHUNK, Sink, Source, TILE, TILE_BYTES, check_output, check_rank};
use crate::error::KernelError;

/// The numbers of an AdamW step (Loshchilov and Hutter, 2019).
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct AdamWOptions {
    /// Learning rate of this step.
    pub learning_rate: f32,
    /// Decay of the first moment.
    pub beta1: f32,
    /// Decay of the second moment.
    pub beta2: f32,
    /// Added to the root of the second moment.
    pub epsilon: f32,
    /// Decoupled decay: a parameter first loses `learning_rate · weight_decay` of itself.
    pub weight_decay: f32,
    /// The step's number from 1 if moments are corrected for their start at zero, else `None`.
    /// (MLX's default is not to correct, torch's is to.)
    pub correct_bias: Option<u64>,
}

/// One parameter with its gradient and moments, all of one shape.
pub struct AdamWParameter {
    /// float32, bfloat16 or float16.
    pub parameter: DynViewMut,
    /// float32, bfloat16 or float16.
    pub gradient: DynView,
    /// First moment; float32 or a half type.
    pub m: DynViewMut,
    /// Second moment; float32 or a half type.
    pub v: DynViewMut,
}

/// One AdamW step over all `parameters`, in f32:
///
/// m ← β₁m + (1-β₁)g, v ← β₂v + (1-β₂)g², p ← p(1 - ηλ) - η·m̂ / (√v̂ + ε),
/// where m̂ = m / (1-β₁ᵗ) and v̂ = v / (1-β₂ᵗ) if bias is corrected. `gradient_scale`, a float32
/// scalar that is read when the task runs, multiplies g first.
pub fn adamw(
    options: AdamWOptions,
    parameters: Vec<AdamWParameter>,
    gradient_scale: Option<DynView>,
) -> Result<Box<dyn Task>, KernelError> {
    adamw_on(Isa::get(), options, parameters, gradient_scale)
}

pub(crate) fn adamw_on(
    isa: Isa,
    options: AdamWOptions,
    parameters: Vec<AdamWParameter>,
    gradient_scale: Option<DynView>,
) -> Result<Box<dyn Task>, KernelError> {
    const NAME: &str = "adamw";
    let mut items = Vec::new();
    let mut sizes = Vec::new();
    for (at, item) in parameters.iter().enumerate() {
        let shapes = [&item.parameter.shape, &item.gradient.shape, &item.m.shape, &item.v.shape];
        if shapes.iter().any(|shape| *shape != shapes[0]) {
            let message = format!("parameter {at}, its gradient and moments have shapes {shapes:?}");
            return Err(KernelError::new(NAME, message));
        }
        sizes.push(shapes[0].iter().product());
        items.push(Item {
            parameter: Place::new(NAME, &item.parameter)?,
            gradient: source(NAME, &item.gradient)?,
            m: Place::new(NAME, &item.m)?,
            v: Place::new(NAME, &item.v)?,
        });
    }
    let scale = gradient_scale.map(|view| scalar(NAME, &view)).transpose()?;
    Ok(Box::new(AdamW { isa, options, items, scale, cut: Cut::new(&sizes) }))
}

fn check_dtype(name: &'static str, dtype: Dtype) -> Result<(), KernelError> {
    if matches!(dtype, Dtype::F32 | Dtype::BF16 | Dtype::F16) {
        return Ok(());
    }
    Err(KernelError::new(name, format!("takes float32, bfloat16 and float16, got {dtype}")))
}

fn source(name: &'static str, view: &DynView) -> Result<Source, KernelError> {
    check_dtype(name, view.dtype)?;
    check_rank(name, &view.shape, &view.strides)?;
    Ok(Source::new(view, Dtype::F32))
}

fn scalar(name: &'static str, view: &DynView) -> Result<Scalar, KernelError> {
    if view.dtype != Dtype::F32 || view.shape.iter().product::<usize>() != 1 {
        let message = format!("a factor is a float32 scalar, got {} of {:?}", view.dtype, view.shape);
        return Err(KernelError::new(name, message));
    }
    Ok(Scalar(view.pointer.cast()))
}

/// One f32 in memory.
struct Scalar(*const f32);

// SAFETY: made of views that may be read from any thread (their maker's promise).
unsafe impl Send for Scalar {}
// SAFETY: as above.
unsafe impl Sync for Scalar {}

/// Memory that is read and written in place.
struct Place {
    source: Source,
    sink: Sink,
}

impl Place {
    fn new(name: &'static str, view: &DynViewMut) -> Result<Place, KernelError> {
        check_output(name, view)?;
        Ok(Place { source: source(name, &view.as_view())?, sink: Sink::new(view, Dtype::F32) })
    }

    /// A tile that may be changed: the memory itself, or a copy in `buffer`, which [`Place::put`]
    /// brings back.
    ///
    /// # Safety
    /// As [`Source::load`].
    unsafe fn get(&self, start: usize, count: usize, buffer: *mut u8, raw: *mut u8) -> *mut f32 {
        match self.sink.direct(start, count) {
            Some(place) => place.cast(),
            None => {
                // SAFETY: promised by the caller.
                let tile = unsafe { self.source.load(0, start, count, buffer, raw) };
                debug_assert!(tile == buffer.cast_const());
                buffer.cast()
            }
        }
    }

    /// # Safety
    /// `tile` is what `get` gave for the same elements.
    unsafe fn put(&self, tile: *mut f32, start: usize, count: usize, raw: *mut u8) {
        if self.sink.direct(start, count).is_none() {
            // SAFETY: promised by the caller.
            unsafe { self.sink.store(tile.cast(), start, count, raw) }
        }
    }
}

/// Many arrays cut into chunks of [`CHUNK`] elements, none across two arrays.
struct Cut {
    sizes: Vec<usize>,
    /// The first chunk of each array, and the number of all.
    first: Vec<usize>,
}

impl Cut {
    fn new(sizes: &[usize]) -> Cut {
        let mut first = vec![0];
        for size in sizes {
            first.push(first[first.len() - 1] + size.div_ceil(CHUNK));
        }
        Cut { sizes: sizes.to_vec(), first }
    }

    fn chunks(&self) -> usize {
        self.first[self.sizes.len()]
    }

    /// The array of a chunk, and the elements.
    fn find(&self, chunk: usize) -> (usize, std::ops::Range<usize>) {
        let array = self.first.partition_point(|&first| first <= chunk) - 1;
        let start = (chunk - self.first[array]) * CHUNK;
        (array, start..self.sizes[array].min(start + CHUNK))
    }
}

struct Item {
    parameter: Place,
    gradient: Source,
    m: Place,
    v: Place,
}

struct AdamW {
    isa: Isa,
    options: AdamWOptions,
    items: Vec<Item>,
    scale: Option<Scalar>,
    cut: Cut,
}

impl Task for AdamW {
    fn chunks(&self) -> usize {
        self.cut.chunks()
    }

    fn run(&self, chunk: usize, scratch: &mut Scratch) {
        let take = || scratch.take::<u8>(TILE_BYTES).as_mut_ptr();
        let (p_buffer, g_buffer, m_buffer, v_buffer, raw) = (take(), take(), take(), take(), take());
        let o = &self.options;
        let (mut rate, mut correction) = (o.learning_rate, 1.0);
        if let Some(step) = o.correct_bias {
            // In f64: 1 - β₂ᵗ loses digits near 0.
            let remaining = |beta: f32| 1.0 - (beta as f64).powf(step as f64);
            rate = (o.learning_rate as f64 / remaining(o.beta1)) as f32;
            correction = (1.0 / remaining(o.beta2).sqrt()) as f32;
        }
        let (item, range) = self.cut.find(chunk);
        let item = &self.items[item];
        for start in range.clone().step_by(TILE) {
            let count = TILE.min(range.end - start);
            // SAFETY: inside the views, this chunk's own; buffers hold a tile; the scalar is
            // readable while the task runs.
            unsafe {
                let p = item.parameter.get(start, count, p_buffer, raw);
                let m = item.m.get(start, count, m_buffer, raw);
                let v = item.v.get(start, count, v_buffer, raw);
                let g = item.gradient.load(0, start, count, g_buffer, raw).cast();
                dispatch(
                    self.isa,
                    AdamWTile {
                        p,
                        g,
                        m,
                        v,
                        count,
                        scale: self.scale.as_ref().map_or(1.0, |scale| *scale.0),
                        beta1: o.beta1,
                        beta2: o.beta2,
                        epsilon: o.epsilon,
                        keep: 1.0 - o.learning_rate * o.weight_decay,
                        rate,
                        correction,
                    },
                );
                item.parameter.put(p, start, count, raw);
                item.m.put(m, start, count, raw);
                item.v.put(v, start, count, raw);
            }
        }
    }

    fn name(&self) -> &'static str {
        "adamw"
    }
}

struct AdamWTile {
    p: *mut f32,
    g: *const f32,
    m: *mut f32,
    v: *mut f32,
    count: usize,
    scale: f32,
    beta1: f32,
    beta2: f32,
    epsilon: f32,
    /// What weight decay leaves of a parameter.
    keep: f32,
    /// Learning rate over 1 - β₁ᵗ.
    rate: f32,
    /// 1 / √(1 - β₂ᵗ).
    correction: f32,
}

impl Kernel for AdamWTile {
    type Output = ();

    #[inline(always)]
    fn run<V: Vector>(self) {
        let (beta1, beta2) = (V::splat(self.beta1), V::splat(self.beta2));
        let (rest1, rest2) = (V::splat(1.0 - self.beta1), V::splat(1.0 - self.beta2));
        for at in (0..self.count).step_by(LANES) {
            let left = self.count - at;
            // SAFETY: `left` elements from `at` are inside all four arrays.
            unsafe {
                let g = V::load_part(self.g.add(at), left, 0.0) * V::splat(self.scale);
                let m = V::load_part(self.m.add(at), left, 0.0).mul_add(beta1, g * rest1);
                let v = V::load_part(self.v.add(at), left, 0.0).mul_add(beta2, g * g * rest2);
                let p = V::load_part(self.p.add(at), left, 0.0) * V::splat(self.keep);
                let below = v.sqrt().mul_add(V::splat(self.correction), V::splat(self.epsilon));
                let p = p - m * V::splat(self.rate) / below;
                m.store_part(self.m.add(at), left);
                v.store_part(self.v.add(at), left);
                p.store_part(self.p.add(at), left);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use mica_testkit::Rng;
    use mica_threads::Pool;

    use super::*;
    use crate::testing::{Laid, Layout, layouts};

    struct State {
        p: Laid,
        g: Laid,
        m: Laid,
        v: Laid,
    }

    fn states(rng: &mut Rng, dtype: Dtype) -> Vec<State> {
        [&[3][..], &[0], &[300, 70], &[17, 5], &[1], &[33_000]]
            .into_iter()
            .map(|shape| {
                let mut laid = |dtype| Laid::random(dtype, shape, *rng.choose(&layouts(shape)), rng);
                let (p, g, m) = (laid(dtype), laid(Dtype::F32), laid(Dtype::F32));
                let squares: Vec<f64> = laid(Dtype::F32).values().iter().map(|x| x * x).collect();
                State { p, g, m, v: Laid::new(Dtype::F32, shape, Layout::Padded, &squares) }
            })
            .collect()
    }

    /// The formula in f64.
    fn reference(o: &AdamWOptions, p: f64, g: f64, m: f64, v: f64) -> (f64, f64, f64) {
        let (b1, b2) = (o.beta1 as f64, o.beta2 as f64);
        let (m, v) = (b1 * m + (1.0 - b1) * g, b2 * v + (1.0 - b2) * g * g);
        let (mut m_hat, mut v_hat) = (m, v);
        if let Some(t) = o.correct_bias {
            m_hat /= 1.0 - b1.powf(t as f64);
            v_hat /= 1.0 - b2.powf(t as f64);
        }
        let rate = o.learning_rate as f64;
        let p = p * (1.0 - rate * o.weight_decay as f64) - rate * m_hat / (v_hat.sqrt() + o.epsilon as f64);
        (p, m, v)
    }

    #[test]
    fn a_step_is_the_formula_with_the_same_bits_on_every_tier() {
        let options = AdamWOptions {
            learning_rate: 0.01,
            beta1: 0.9,
            beta2: 0.999,
            epsilon: 1e-8,
            weight_decay: 0.1,
            correct_bias: None,
        };
        for (dtype, correct_bias, scaled) in [
            (Dtype::F32, None, None),
            (Dtype::F32, Some(1), Some(0.25)),
            (Dtype::BF16, Some(1000), None),
            (Dtype::F16, Some(7), Some(2.0)),
        ] {
            let options = AdamWOptions { correct_bias, ..options };
            let mut first: Option<Vec<f64>> = None;
            for &isa in Isa::available() {
                for threads in [1, 3] {
                    let mut rng = Rng::new(61);
                    let mut items = states(&mut rng, dtype);
                    let before: Vec<[Vec<f64>; 4]> = items
                        .iter()
                        .map(|s| [s.p.values(), s.g.values(), s.m.values(), s.v.values()])
                        .collect();
                    let factor = Laid::contiguous(Dtype::F32, &[], &[scaled.unwrap_or(1.0)]);
                    let parameters = items
                        .iter_mut()
                        .map(|s| AdamWParameter {
                            parameter: s.p.view_mut(),
                            gradient: s.g.view(),
                            m: s.m.view_mut(),
                            v: s.v.view_mut(),
                        })
                        .collect();
                    let scale = scaled.map(|_| factor.view());
                    Pool::new(threads).run(&[adamw_on(isa, options, parameters, scale).unwrap()]).unwrap();
                    let mut all = Vec::new();
                    for (state, [p, g, m, v]) in items.iter().zip(&before) {
                        for laid in [&state.p, &state.m, &state.v] {
                            laid.check_untouched_outside();
                        }
                        let (new_p, new_m, new_v) = (state.p.values(), state.m.values(), state.v.values());
                        // f32 arithmetic of a handful of steps, then the parameter's own rounding.
                        let step = match dtype {
                            Dtype::BF16 => 2f64.powi(-8),
                            Dtype::F16 => 2f64.powi(-11),
                            _ => 1e-6,
                        };
                        for i in 0..p.len() {
                            let g = g[i] * scaled.unwrap_or(1.0);
                            let (p, m, v) = reference(&options, p[i], g, m[i], v[i]);
                            assert!(
                                (new_p[i] - p).abs() <= step * p.abs() + 1e-6,
                                "{dtype} p {} {p}",
                                new_p[i]
                            );
                            assert!((new_m[i] - m).abs() <= 1e-6 * (m.abs() + g.abs()), "{dtype} m");
                            assert!((new_v[i] - v).abs() <= 1e-6 * v, "{dtype} v");
                        }
                        all.extend(new_p.into_iter().chain(new_m).chain(new_v));
                    }
                    match &first {
                        None => first = Some(all),
                        Some(first) => assert!(*first == all, "{dtype} {isa} {threads}"),
                    }
                }
            }
        }
    }

    #[test]
    fn misfits_are_refused() {
        let options = AdamWOptions {
            learning_rate: 0.01,
            beta1: 0.9,
            beta2: 0.999,
            epsilon: 1e-8,
            weight_decay: 0.0,
            correct_bias: None,
        };
        let laid = |dtype| Laid::contiguous(dtype, &[2], &[1.0, 2.0]);
        let (mut integers, mut m, mut v) = (laid(Dtype::I32), laid(Dtype::F32), laid(Dtype::F32));
        let mut step = |parameter: DynViewMut, scale: Option<DynView>| {
            let (gradient, m, v) = (v.view(), m.view_mut(), v.view_mut());
            adamw(options, vec![AdamWParameter { parameter, gradient, m, v }], scale)
                .err()
                .unwrap()
                .to_string()
        };
        let error = step(integers.view_mut(), None);
        assert!(error.contains("got int32"), "{error}");
        let mut p = laid(Dtype::F32);
        let error = step(p.view_mut(), Some(integers.view()));
        assert!(error.contains("float32 scalar"), "{error}");
    }
}
