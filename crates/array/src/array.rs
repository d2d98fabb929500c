//! The array handle.

use std::fmt;
use std::sync::Arc;

use mica_kernels::in_pieces;
use mica_threads::Scratch;
use smallvec::smallvec;

use crate::dtype::Element;
use crate::node::{Handle, Inputs, Node, State};
use crate::op::Op;
use crate::packed::PackedWeight;
use crate::shape::{Shape, size_of};
use crate::storage::{Buffer, HostStorage, Spec, Storage};
use crate::{Dtype, Error, Result, eval};

/// An n-dimensional array: a cheap handle on a node of the lazy graph.
///
/// Building one never computes. [`Array::eval`], [`crate::eval`], or reading a value does.
#[derive(Clone)]
pub struct Array {
    node: Handle,
    output: u32,
}

fn too_large(op: &Op, spec: &Spec) -> State {
    let (name, shape, dtype) = (op.name(), &spec.shape, spec.dtype);
    State::Failed(Error::invalid(
        name,
        format!("a result of shape {shape:?} in {dtype} is larger than memory can be"),
    ))
}

impl Array {
    /// A node with one output. If an input failed, so does the node: the first error is the one
    /// that the reader sees.
    pub(crate) fn lazy(op: Op, inputs: Inputs, shape: impl Into<Shape>, dtype: Dtype) -> Array {
        let spec = Spec::new(shape, dtype);
        let state = if spec.is_addressable() { State::Lazy { op, inputs } } else { too_large(&op, &spec) };
        Array { node: Handle::new(Node::new(spec, None, state)), output: 0 }
    }

    /// A node with several outputs; the handle is on the first. [`Array::sibling`] gives others.
    pub(crate) fn lazy_many(op: Op, inputs: Inputs, mut specs: Vec<Spec>) -> Array {
        let state = match specs.iter().find(|spec| !spec.is_addressable()) {
            None => State::Lazy { op, inputs },
            Some(spec) => too_large(&op, spec),
        };
        let more = specs.split_off(1);
        let first = specs.pop().expect("a node has an output");
        Array { node: Handle::new(Node::new(first, Some(more.into()), state)), output: 0 }
    }

    pub(crate) fn ready(storage: Storage, shape: impl Into<Shape>, dtype: Dtype) -> Array {
        let node = Node::new(Spec::new(shape, dtype), None, State::Ready(smallvec![storage]));
        Array { node: Handle::new(node), output: 0 }
    }

    pub(crate) fn failed(error: Error, shape: impl Into<Shape>, dtype: Dtype) -> Array {
        let node = Node::new(Spec::new(shape, dtype), None, State::Failed(error));
        Array { node: Handle::new(node), output: 0 }
    }

    /// Another output of the same node; from now on it will be computed too.
    pub(crate) fn sibling(&self, output: usize) -> Array {
        debug_assert!(output < self.node.outputs());
        self.node.want(output);
        Array { node: self.node.clone(), output: output as u32 }
    }

    #[inline]
    pub(crate) fn node(&self) -> &Handle {
        &self.node
    }

    #[inline]
    pub(crate) fn into_handle(self) -> Handle {
        self.node
    }

    #[inline]
    pub(crate) fn output(&self) -> usize {
        self.output as usize
    }

    /// A number that tells this node from all others that are alive.
    pub(crate) fn id(&self) -> usize {
        self.node.pointer() as usize
    }

    #[inline]
    pub(crate) fn spec(&self) -> &Spec {
        self.node.spec(self.output())
    }

    /// The sizes of the dimensions.
    #[inline]
    pub fn shape(&self) -> &[usize] {
        &self.spec().shape
    }

    /// The size of one dimension; negative axes count from the end.
    ///
    /// # Panics
    /// If there is no such axis: a mistake in the calling program.
    pub fn dim(&self, axis: i32) -> usize {
        let rank = self.shape().len() as i32;
        self.shape()[if axis < 0 { axis + rank } else { axis } as usize]
    }

    /// The number of dimensions.
    pub fn rank(&self) -> usize {
        self.shape().len()
    }

    /// The number of elements.
    pub fn size(&self) -> usize {
        size_of(self.shape())
    }

    /// The type of the elements.
    #[inline]
    pub fn dtype(&self) -> Dtype {
        self.spec().dtype
    }

    /// Bytes of the elements, when stored plainly.
    #[inline]
    pub fn nbytes(&self) -> usize {
        self.spec().bytes()
    }

    /// An array of these values in row-major order.
    pub fn from_slice<T: Element>(values: &[T], shape: &[usize]) -> Result<Array> {
        if values.len() != size_of(shape) {
            return Err(Error::invalid(
                "from_slice",
                format!("shape {shape:?} has {} elements, got {} values", size_of(shape), values.len()),
            ));
        }
        // SAFETY: Elements are plain values without padding.
        let bytes = unsafe { std::slice::from_raw_parts(values.as_ptr().cast::<u8>(), size_of_val(values)) };
        Array::from_bytes(bytes, shape, T::DTYPE)
    }

    /// An array of the values that these bytes hold, in row-major order and native byte order.
    pub fn from_bytes(bytes: &[u8], shape: &[usize], dtype: Dtype) -> Result<Array> {
        Array::from_fill(shape, dtype, |into| {
            if into.len() != bytes.len() {
                return Err(Error::invalid(
                    "from_bytes",
                    format!("{dtype} of shape {shape:?} takes {} bytes, got {}", into.len(), bytes.len()),
                ));
            }
            into.copy_from_slice(bytes);
            Ok(())
        })
    }

    /// An array whose bytes `fill` writes, for reading files without a second copy. The bytes are
    /// unspecified (but initialised) when `fill` gets them.
    pub fn from_fill<E: From<Error>>(
        shape: &[usize],
        dtype: Dtype,
        fill: impl FnOnce(&mut [u8]) -> Result<(), E>,
    ) -> Result<Array, E> {
        let buffer = new_buffer(shape, dtype)?;
        let bytes = size_of(shape) * dtype.size();
        // SAFETY: the buffer is new, at least that long, and nobody else has it. Zeroing makes the
        // bytes initialised.
        let into = unsafe {
            std::ptr::write_bytes(buffer.pointer(), 0, bytes);
            std::slice::from_raw_parts_mut(buffer.pointer(), bytes)
        };
        fill(into)?;
        let storage = HostStorage::contiguous(triomphe::Arc::new(buffer), shape);
        Ok(Array::ready(Storage::Host(storage), shape, dtype))
    }

    /// As [`Array::from_fill`], in pieces of so many bytes (the last may be shorter), on all threads: `fill` gets where
    /// a piece starts. It must not evaluate arrays.
    ///
    /// # Errors
    /// Of several pieces that fail, the first.
    pub fn from_pieces<E: From<Error> + Send>(
        shape: &[usize],
        dtype: Dtype,
        piece: usize,
        fill: impl Fn(usize, &mut [u8]) -> Result<(), E> + Sync + Send,
    ) -> Result<Array, E> {
        let piece = piece.max(1);
        let buffer = new_buffer(shape, dtype)?;
        let bytes = size_of(shape) * dtype.size();
        let work = |index: usize, _: &mut Scratch| {
            let start = index * piece;
            let length = piece.min(bytes - start);
            // SAFETY: pieces are disjoint, inside the buffer, which is new and nobody else's. Zeroing makes the bytes
            // initialised.
            let into = unsafe {
                let pointer = buffer.pointer().add(start);
                std::ptr::write_bytes(pointer, 0, length);
                std::slice::from_raw_parts_mut(pointer, length)
            };
            fill(start, into)
        };
        eval::with_pool(|pool| in_pieces(pool, bytes.div_ceil(piece), work)).map_err(Error::from)??;
        let storage = HostStorage::contiguous(triomphe::Arc::new(buffer), shape);
        Ok(Array::ready(Storage::Host(storage), shape, dtype))
    }

    /// A weight in a kernel's own layout, as an array of its logical shape and dtype.
    pub fn from_packed(weight: PackedWeight) -> Array {
        let (shape, dtype) = (weight.shape(), weight.dtype());
        Array::ready(Storage::Packed(Arc::new(weight)), shape.as_slice(), dtype)
    }

    /// The packed weight behind this array, if it is one.
    pub fn packed(&self) -> Option<Arc<PackedWeight>> {
        match &self.node.ready()?[self.output()] {
            Storage::Packed(weight) => Some(weight.clone()),
            _ => None,
        }
    }

    /// Whether the values are there.
    pub fn is_ready(&self) -> bool {
        self.node.ready().is_some()
    }

    /// Computes the values, if they are not there yet.
    pub fn eval(&self) -> Result<()> {
        eval::eval(std::slice::from_ref(self))
    }

    /// All values in row-major order.
    ///
    /// # Errors
    /// If computing fails, or if the dtype is not `T`'s.
    pub fn to_vec<T: Element>(&self) -> Result<Vec<T>> {
        if T::DTYPE != self.dtype() {
            return Err(Error::invalid(
                "to_vec",
                format!("the array is {}, asked for {}", self.dtype(), T::DTYPE),
            ));
        }
        let mut values: Vec<T> = Vec::with_capacity(self.size());
        self.with_bytes(|bytes| {
            // SAFETY: the bytes are `size` contiguous elements of type T; bool arrays hold 0 or 1.
            unsafe {
                std::ptr::copy_nonoverlapping(bytes.as_ptr(), values.as_mut_ptr().cast::<u8>(), bytes.len());
                values.set_len(bytes.len() / std::mem::size_of::<T>());
            }
        })?;
        Ok(values)
    }

    /// The only value of an array with one element.
    pub fn item<T: Element>(&self) -> Result<T> {
        if self.size() != 1 {
            return Err(Error::invalid(
                "item",
                format!("needs one element, the shape is {:?}", self.shape()),
            ));
        }
        Ok(self.to_vec::<T>()?[0])
    }

    /// Hands the values' bytes, row-major and contiguous, to `read` without copying them (unless
    /// the array is a strided view or packed).
    pub fn with_bytes<R>(&self, read: impl FnOnce(&[u8]) -> R) -> Result<R> {
        self.eval()?;
        let dense = self.contiguous()?;
        dense.eval()?;
        let storage = match &*dense.node.state() {
            State::Ready(storage) => storage[dense.output()].clone(),
            State::Failed(error) => return Err(error.clone()),
            State::Lazy { .. } => return Err(Error::Tracing { op: "with_bytes" }),
        };
        let Storage::Host(host) = &storage else {
            return Err(Error::unsupported(
                "with_bytes",
                "the array is a packed weight; dequantize it first",
            ));
        };
        eval::wait_for(&host.buffer)?;
        // SAFETY: contiguous and inside the buffer, complete (waited for), and kept alive by
        // `storage`; evaluated buffers are never written again while somebody holds them.
        Ok(read(unsafe { std::slice::from_raw_parts(host.pointer(), self.nbytes()) }))
    }
}

/// Memory for the values of such an array, not written yet.
fn new_buffer(shape: &[usize], dtype: Dtype) -> Result<Buffer> {
    let bytes = shape
        .iter()
        .try_fold(dtype.size(), |product, &size| product.checked_mul(size))
        .ok_or_else(|| Error::invalid("from_bytes", format!("shape {shape:?} is too large")))?;
    Buffer::new(bytes, false)
}

impl fmt::Debug for Array {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let state = match &*self.node.state() {
            State::Lazy { op, .. } => op.name(),
            State::Ready(_) => "ready",
            State::Failed(_) => "failed",
        };
        write!(f, "Array({}{:?}, {state})", self.dtype(), self.shape())
    }
}
