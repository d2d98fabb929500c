//! How an elementwise op walks memory: tiles of 1,024 elements that fit the L1 cache.
//!
//! A tile's operands are brought into the type that the op computes in, densely: in place where
//! memory already is that, else through scratch (strides gathered, half types converted). The op
//! itself ([`TileOp`]) then only ever sees dense arrays. The fused programs of [`crate::program`]
//! use the same loads, ops and stores, which is why fusion cannot change a bit.

use mica_threads::{Scratch, Task};
use smallvec::SmallVec;

use super::convert::{Convert, converter};
use crate::dtype::{Dtype, DynView, DynViewMut};
use crate::error::KernelError;
use crate::layout::{Linear, by_size, gather_run, scatter_run};

/// Elements of a chunk: 64 KB of f32, enough to hide what a chunk costs (~100 ns), small enough
/// that a layer's activations give every worker several.
pub(crate) const CHUNK: usize = 16 * 1024;
/// Elements of a tile: 4 KB of f32, so that a dozen operands stay in a 48 KB L1 cache.
pub(crate) const TILE: usize = 1024;
/// Bytes that a tile of the largest type takes.
pub(crate) const TILE_BYTES: usize = TILE * 8;

/// Arithmetic on dense arrays.
pub(crate) trait TileOp: Send + Sync {
    /// # Safety
    /// `inputs` and `output` hold `count` elements of the types the op was made for, aligned;
    /// `output` is apart from each input, or the same.
    unsafe fn run(&self, inputs: &[*const u8], output: *mut u8, count: usize);
}

/// The type that an op computes in for operands of `dtype`: f32 for half types, else itself.
pub(crate) fn compute_dtype(dtype: Dtype) -> Dtype {
    match dtype {
        Dtype::F16 | Dtype::BF16 => Dtype::F32,
        other => other,
    }
}

/// Memory that is read tile by tile.
pub(crate) struct Source {
    pub pointer: *const u8,
    pub dtype: Dtype,
    pub linear: Linear,
    convert: Option<Convert>,
}

/// Memory that is written tile by tile.
pub(crate) struct Sink {
    pub pointer: *mut u8,
    pub dtype: Dtype,
    pub linear: Linear,
    convert: Option<Convert>,
}

// SAFETY: a Source is made of a DynView, which its maker promised to be readable from anywhere.
unsafe impl Send for Source {}
// SAFETY: as above.
unsafe impl Sync for Source {}
// SAFETY: a Sink is made of a DynViewMut; chunks write disjoint elements.
unsafe impl Send for Sink {}
// SAFETY: as above.
unsafe impl Sync for Sink {}

impl Source {
    /// A view that is read as `compute`.
    pub fn new(view: &DynView, compute: Dtype) -> Source {
        Source::with_linear(view, compute, Linear::new(&view.shape, &view.strides))
    }

    /// Elements of a view in another order or number than its shape's.
    pub fn with_linear(view: &DynView, compute: Dtype, linear: Linear) -> Source {
        Source {
            pointer: view.pointer,
            dtype: view.dtype,
            linear,
            convert: (view.dtype != compute).then(|| converter(view.dtype, compute)),
        }
    }

    /// Elements `start .. start + count` moved by `base` elements, if they are dense and in the compute type where
    /// they are.
    #[inline]
    pub fn dense(&self, base: isize, start: usize, count: usize) -> Option<*const u8> {
        if self.convert.is_some() {
            return None;
        }
        let offset = base + self.linear.contiguous_from(start, count)?;
        Some(self.pointer.wrapping_offset(offset * self.dtype.size() as isize))
    }

    /// Elements `start .. start + count` moved by `base` elements, dense and in the compute type:
    /// either where they are, or copied to `buffer`.
    ///
    /// # Safety
    /// The elements are inside the view (with `base`); `buffer` and `raw` hold `count` elements
    /// of any type (`raw` is overwritten), aligned to 64.
    #[inline(never)] // once in the program, not in every generic kernel
    pub unsafe fn load(
        &self,
        base: isize,
        start: usize,
        count: usize,
        buffer: *mut u8,
        raw: *mut u8,
    ) -> *const u8 {
        let size = self.dtype.size();
        let pointer = self.pointer.wrapping_offset(base * size as isize);
        let direct = self.linear.contiguous_from(start, count);
        // SAFETY: promised by the caller.
        unsafe {
            let dense = match direct {
                Some(offset) => pointer.offset(offset * size as isize),
                None => {
                    let target = if self.convert.is_some() { raw } else { buffer };
                    by_size!(size, gather_run(pointer, &self.linear, start, count, target));
                    target
                }
            };
            match self.convert {
                Some(convert) => {
                    convert(dense, buffer, count);
                    buffer
                }
                None => dense,
            }
        }
    }
}

impl Sink {
    /// A view that takes values computed as `compute`.
    pub fn new(view: &DynViewMut, compute: Dtype) -> Sink {
        Sink {
            pointer: view.pointer,
            dtype: view.dtype,
            linear: Linear::new(&view.shape, &view.strides),
            convert: (view.dtype != compute).then(|| converter(compute, view.dtype)),
        }
    }

    /// Where the op may write elements `start .. start + count` at once, if it may.
    pub fn direct(&self, start: usize, count: usize) -> Option<*mut u8> {
        if self.convert.is_some() {
            return None;
        }
        let offset = self.linear.contiguous_from(start, count)?;
        Some(self.pointer.wrapping_offset(offset * self.dtype.size() as isize))
    }

    /// Stores `count` dense values of the compute type as elements from `start`.
    ///
    /// # Safety
    /// The elements are inside the view; `values` holds `count`; `raw` holds `count` of any type.
    pub unsafe fn store(&self, values: *const u8, start: usize, count: usize, raw: *mut u8) {
        let size = self.dtype.size();
        // SAFETY: promised by the caller.
        unsafe {
            let direct = self.linear.contiguous_from(start, count);
            let place = direct.map(|offset| self.pointer.wrapping_offset(offset * size as isize));
            let dense = match (self.convert, place) {
                (Some(convert), Some(place)) => return convert(values, place, count),
                (Some(convert), None) => {
                    convert(values, raw, count);
                    raw.cast_const()
                }
                (None, Some(place)) => {
                    return std::ptr::copy_nonoverlapping(values, place, count * size);
                }
                (None, None) => values,
            };
            by_size!(size, scatter_run(dense, self.pointer, &self.linear, start, count));
        }
    }
}

/// An op over up to three inputs.
pub(crate) struct Elementwise {
    name: &'static str,
    inputs: SmallVec<[Source; 3]>,
    output: Sink,
    op: Box<dyn TileOp>,
    size: usize,
}

impl Elementwise {
    /// `inputs` come with the types in which `op` takes them, `output` with the one it gives.
    pub fn task(
        name: &'static str,
        op: Box<dyn TileOp>,
        inputs: &[(&DynView, Dtype)],
        output: (&DynViewMut, Dtype),
    ) -> Result<Box<dyn Task>, KernelError> {
        let shape = &output.0.shape;
        let mut sources = SmallVec::new();
        for &(view, compute) in inputs {
            let linear = if view.shape == *shape && view.strides.len() == shape.len() {
                Linear::new(shape, &view.strides)
            } else {
                let wide = broadcast(name, view, shape)?;
                Linear::new(&wide.shape, &wide.strides)
            };
            sources.push(Source::with_linear(view, compute, linear));
        }
        check_output(name, output.0)?;
        Ok(Box::new(Elementwise {
            name,
            inputs: sources,
            output: Sink::new(output.0, output.1),
            op,
            size: shape.iter().product(),
        }))
    }
}

/// An op over dense arrays of one shape. Graphs of small ops are made of these, so the task is small, too, and comes
/// without a box.
pub struct Dense {
    name: &'static str,
    op: &'static dyn TileOp,
    /// Up to two inputs, and the output last.
    lines: [Line; 3],
    inputs: usize,
    size: usize,
}

/// The memory of a dense operand.
#[derive(Clone, Copy)]
struct Line {
    pointer: *mut u8,
    bytes: usize,
    convert: Option<Convert>,
}

// SAFETY: as for `Source` and `Sink`, which these are simple cases of.
unsafe impl Send for Line {}
// SAFETY: as above.
unsafe impl Sync for Line {}

/// The memory of one operand, whose elements lie one after another.
#[derive(Clone, Copy, Debug)]
pub struct Flat {
    /// The first element.
    pub pointer: *mut u8,
    /// Of the elements.
    pub dtype: Dtype,
}

impl Flat {
    #[inline]
    fn line(self, from: Dtype, to: Dtype) -> Line {
        let convert = if from == to { None } else { Some(converter(from, to)) };
        Line { pointer: self.pointer, bytes: self.dtype.size(), convert }
    }
}

impl Dense {
    /// `op` takes and gives values of type `compute`.
    #[inline(always)]
    pub(crate) fn new(
        name: &'static str,
        op: &'static dyn TileOp,
        inputs: &[Flat],
        output: Flat,
        compute: Dtype,
        size: usize,
    ) -> Dense {
        let output = output.line(compute, output.dtype);
        let line = |at: usize| inputs.get(at).map_or(output, |input| input.line(input.dtype, compute));
        Dense { name, op, lines: [line(0), line(1), output], inputs: inputs.len(), size }
    }
}

impl Task for Dense {
    #[inline]
    fn chunks(&self) -> usize {
        self.size.div_ceil(CHUNK)
    }

    fn run(&self, chunk: usize, scratch: &mut Scratch) {
        let (inputs, output) = (&self.lines[..self.inputs], &self.lines[2]);
        let tile = |line: &Line| match line.convert {
            Some(_) => scratch.take::<u8>(TILE_BYTES).as_mut_ptr(),
            None => std::ptr::null_mut(),
        };
        let mut buffers = [std::ptr::null_mut(); 2];
        buffers.iter_mut().zip(inputs).for_each(|(buffer, line)| *buffer = tile(line));
        let result = tile(output);
        let end = self.size.min((chunk + 1) * CHUNK);
        for start in (chunk * CHUNK..end).step_by(TILE) {
            let count = TILE.min(end - start);
            let at = |line: &Line| line.pointer.wrapping_add(start * line.bytes);
            let mut operands = [std::ptr::null::<u8>(); 2];
            for ((operand, line), &buffer) in operands.iter_mut().zip(inputs).zip(&buffers) {
                *operand = match line.convert {
                    Some(convert) => {
                        // SAFETY: the range is inside the operand, the buffer holds a tile.
                        unsafe { convert(at(line), buffer, count) };
                        buffer
                    }
                    None => at(line),
                };
            }
            // SAFETY: operands hold `count` values of the op's types; the output is the caller's
            // promise: apart from the inputs or exactly one of them, so that a tile is read before
            // it is written.
            unsafe {
                match output.convert {
                    Some(convert) => {
                        self.op.run(&operands[..self.inputs], result, count);
                        convert(result, at(output), count);
                    }
                    None => self.op.run(&operands[..self.inputs], at(output), count),
                }
            }
        }
    }

    fn name(&self) -> &'static str {
        self.name
    }
}

/// Values in another type. What is dense goes from memory to memory, without a tile between.
pub(crate) struct Cast {
    input: Source,
    output: Sink,
    /// Both are the same memory.
    in_place: bool,
}

impl Cast {
    pub fn task(a: &DynView, out: &DynViewMut) -> Result<Box<dyn Task>, KernelError> {
        let wide = broadcast("cast", a, &out.shape)?;
        check_output("cast", out)?;
        let in_place = std::ptr::eq(a.pointer, out.pointer);
        let (input, output) = (Source::new(&wide, out.dtype), Sink::new(out, out.dtype));
        Ok(Box::new(Cast { input, output, in_place }))
    }
}

impl Task for Cast {
    fn chunks(&self) -> usize {
        self.output.linear.size().div_ceil(CHUNK)
    }

    fn run(&self, chunk: usize, scratch: &mut Scratch) {
        let buffer = scratch.take::<u8>(TILE_BYTES).as_mut_ptr();
        let raw = scratch.take::<u8>(TILE_BYTES).as_mut_ptr();
        let end = self.output.linear.size().min((chunk + 1) * CHUNK);
        for start in (chunk * CHUNK..end).step_by(TILE) {
            let count = TILE.min(end - start);
            let place = self.output.direct(start, count).filter(|_| !self.in_place);
            // SAFETY: the range is inside both views, the buffers hold a tile. The output is apart from the input,
            // or laid out exactly as it and written after it was read.
            unsafe {
                let values = self.input.load(0, start, count, place.unwrap_or(buffer), raw);
                match place {
                    // The same type: the values are still where they were.
                    Some(place) if !std::ptr::eq(values, place) => {
                        std::ptr::copy_nonoverlapping(values, place, count * self.output.dtype.size())
                    }
                    Some(_) => {}
                    None => self.output.store(values, start, count, raw),
                }
            }
        }
    }

    fn name(&self) -> &'static str {
        "cast"
    }
}

/// `view` with size-1 and missing leading dimensions repeated to `shape`, as numpy does.
pub(crate) fn broadcast(name: &'static str, view: &DynView, shape: &[usize]) -> Result<DynView, KernelError> {
    let fail = || {
        KernelError::new(name, format!("shape {:?} does not broadcast to the output's {shape:?}", view.shape))
    };
    let missing = shape.len().checked_sub(view.shape.len()).ok_or_else(fail)?;
    check_rank(name, &view.shape, &view.strides)?;
    let mut wide = DynView {
        pointer: view.pointer,
        dtype: view.dtype,
        shape: shape.into(),
        strides: SmallVec::from_elem(0, shape.len()),
    };
    for (axis, (&size, &stride)) in view.shape.iter().zip(&view.strides).enumerate() {
        let target = shape[missing + axis];
        if size == target {
            wide.strides[missing + axis] = if size == 1 { 0 } else { stride };
        } else if size != 1 {
            return Err(fail());
        }
    }
    Ok(wide)
}

pub(crate) fn check_rank(name: &'static str, shape: &[usize], strides: &[isize]) -> Result<(), KernelError> {
    if shape.len() == strides.len() {
        return Ok(());
    }
    Err(KernelError::new(name, format!("shape {shape:?} and strides {strides:?} differ in rank")))
}

/// Refuses outputs of which two elements are one place.
pub(crate) fn check_output(name: &'static str, view: &DynViewMut) -> Result<(), KernelError> {
    check_rank(name, &view.shape, &view.strides)?;
    let repeated = view.shape.iter().zip(&view.strides).any(|(&size, &stride)| size > 1 && stride == 0);
    if repeated && !view.shape.contains(&0) {
        let message = format!(
            "an output of shape {:?} with strides {:?} would be written more than once",
            view.shape, view.strides
        );
        return Err(KernelError::new(name, message));
    }
    Ok(())
}

impl Task for Elementwise {
    fn chunks(&self) -> usize {
        self.size.div_ceil(CHUNK)
    }

    fn run(&self, chunk: usize, scratch: &mut Scratch) {
        let buffers: SmallVec<[*mut u8; 3]> =
            self.inputs.iter().map(|_| scratch.take::<u8>(TILE_BYTES).as_mut_ptr()).collect();
        let result = scratch.take::<u8>(TILE_BYTES).as_mut_ptr();
        let raw = scratch.take::<u8>(TILE_BYTES).as_mut_ptr();
        let end = self.size.min((chunk + 1) * CHUNK);
        let mut operands: SmallVec<[*const u8; 3]> = SmallVec::from_elem(std::ptr::null(), self.inputs.len());
        let mut first = true;
        for start in (chunk * CHUNK..end).step_by(TILE) {
            let count = TILE.min(end - start);
            for (i, input) in self.inputs.iter().enumerate() {
                // A constant's tile is filled once a chunk; the first tile is the longest.
                if first || !input.linear.is_constant() {
                    // SAFETY: the range is inside the shape, the buffers hold a tile.
                    operands[i] = unsafe { input.load(0, start, count, buffers[i], raw) };
                }
            }
            first = false;
            // SAFETY: operands hold `count` values of the op's types; the output is the caller's
            // promise: apart from the inputs or laid out exactly as one, so that a tile is read
            // before it is written.
            unsafe {
                match self.output.direct(start, count) {
                    Some(place) => self.op.run(&operands, place, count),
                    None => {
                        self.op.run(&operands, result, count);
                        self.output.store(result, start, count, raw);
                    }
                }
            }
        }
    }

    fn name(&self) -> &'static str {
        self.name
    }
}
