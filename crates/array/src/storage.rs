//! Where an evaluated array's values live.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use mica_kernels::view::contiguous_strides;

use crate::memory::Block;
use crate::shape::{Strides, size_of};
use crate::{Dtype, Result, packed::PackedWeight};

/// Memory that one or several arrays view.
#[derive(Debug)]
pub(crate) struct Buffer {
    block: Block,
    /// The run of the engine that writes this buffer; 0 when the host wrote it. Values may be
    /// read once that run is complete.
    epoch: AtomicU64,
}

impl Buffer {
    pub(crate) fn new(bytes: usize, planner: bool) -> Result<Buffer> {
        Ok(Buffer { block: Block::new(bytes, planner)?, epoch: AtomicU64::new(0) })
    }

    pub(crate) fn pointer(&self) -> *mut u8 {
        self.block.pointer()
    }

    pub(crate) fn bytes(&self) -> usize {
        self.block.bytes()
    }

    /// Whether there is no memory behind it ([`crate::memory::rehearse`]).
    pub(crate) fn is_rehearsed(&self) -> bool {
        self.block.is_rehearsed()
    }

    pub(crate) fn epoch(&self) -> u64 {
        self.epoch.load(Ordering::Acquire)
    }

    pub(crate) fn set_epoch(&self, epoch: u64) {
        self.epoch.store(epoch, Ordering::Release);
    }
}

/// A strided window on a buffer.
#[derive(Debug)]
pub(crate) struct HostStorage {
    pub(crate) buffer: triomphe::Arc<Buffer>,
    /// Bytes from the start of the buffer to the first element.
    pub(crate) offset: usize,
    /// In elements.
    pub(crate) strides: Strides,
}

// By hand, as the specs' below: cloning a SmallVec goes element by element, copying a slice does not, and small graphs
// are made of little else.
impl Clone for HostStorage {
    fn clone(&self) -> HostStorage {
        HostStorage {
            buffer: self.buffer.clone(),
            offset: self.offset,
            strides: Strides::from_slice(&self.strides),
        }
    }
}

impl HostStorage {
    #[inline]
    pub(crate) fn contiguous(buffer: triomphe::Arc<Buffer>, shape: &[usize]) -> HostStorage {
        HostStorage { buffer, offset: 0, strides: contiguous_strides(shape) }
    }

    #[inline]
    pub(crate) fn pointer(&self) -> *mut u8 {
        self.buffer.pointer().wrapping_add(self.offset)
    }

    #[inline]
    pub(crate) fn is_contiguous(&self, shape: &[usize]) -> bool {
        is_contiguous(shape, &self.strides)
    }
}

/// Whether elements follow each other in row-major order without gaps.
#[inline]
pub(crate) fn is_contiguous(shape: &[usize], strides: &[isize]) -> bool {
    let mut step = 1isize;
    for (&size, &stride) in shape.iter().zip(strides).rev() {
        if size != 1 && stride != step {
            return size == 0;
        }
        step *= size as isize;
    }
    true
}

/// The values of one output of a node.
#[derive(Clone, Debug)]
pub(crate) enum Storage {
    /// Plain memory.
    Host(HostStorage),
    /// A weight in a kernel's own layout. The node's shape and dtype are the logical ones.
    Packed(Arc<PackedWeight>),
    /// An output that nobody asked for.
    Absent,
}

/// An output's shape and dtype.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Spec {
    pub(crate) shape: crate::Shape,
    pub(crate) dtype: Dtype,
}

impl Clone for Spec {
    fn clone(&self) -> Spec {
        Spec { shape: crate::Shape::from_slice(&self.shape), dtype: self.dtype }
    }
}

impl Spec {
    #[inline]
    pub(crate) fn new(shape: impl Into<crate::Shape>, dtype: Dtype) -> Spec {
        Spec { shape: shape.into(), dtype }
    }

    /// `usize::MAX` if there are more than that.
    #[inline]
    pub(crate) fn bytes(&self) -> usize {
        size_of(&self.shape).saturating_mul(self.dtype.size())
    }

    /// Whether the elements, and strides that reach them, have numbers.
    #[inline]
    pub(crate) fn is_addressable(&self) -> bool {
        let bytes = self.shape.iter().try_fold(self.dtype.size(), |bytes, &size| bytes.checked_mul(size));
        bytes.is_some_and(|bytes| bytes <= isize::MAX as usize) || self.shape.contains(&0)
    }
}
