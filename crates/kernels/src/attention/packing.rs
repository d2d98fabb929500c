//! Keys and values of arrays in blocks, as the products read them.

use std::marker::PhantomData;

use mica_simd::{Isa, Kernel, Vector, dispatch};
use mica_threads::{Scratch, Task};

use super::block::{BLOCK, BlockShape};
use super::heads::{Heads, Part};
use super::product::Products;
use crate::dtype::DynView;
use crate::plan::Workspace;

/// Brings keys and values of arrays into blocks.
pub(super) struct Pack {
    pub isa: Isa,
    pub shape: BlockShape,
    pub kv_heads: usize,
    pub keys: usize,
    pub blocks: usize,
    /// Sequences times KV heads.
    pub units: usize,
    pub k: DynView,
    pub v: DynView,
    pub to: Workspace,
}

impl Pack {
    /// The task, of blocks as these products read them.
    pub fn task<P: Products>(self) -> Box<dyn Task> {
        Box::new(PackTask::<P> { pack: self, kind: PhantomData })
    }
}

struct PackTask<P> {
    pack: Pack,
    kind: PhantomData<P>,
}

impl<P: Products> Task for PackTask<P> {
    fn chunks(&self) -> usize {
        self.pack.units * self.pack.blocks
    }

    fn run(&self, chunk: usize, scratch: &mut Scratch) {
        dispatch(self.pack.isa, PackChunk::<P> { pack: &self.pack, chunk, scratch, kind: PhantomData });
    }

    fn name(&self) -> &'static str {
        "attention_pack"
    }
}

struct PackChunk<'a, P> {
    pack: &'a Pack,
    chunk: usize,
    scratch: &'a Scratch,
    kind: PhantomData<P>,
}

impl<P: Products> Kernel for PackChunk<'_, P> {
    type Output = ();

    #[inline(always)]
    fn run<V: Vector>(self) {
        let pack = self.pack;
        let (unit, block) = (self.chunk / pack.blocks, self.chunk % pack.blocks);
        let (batch, kv_head) = (unit / pack.kv_heads, unit % pack.kv_heads);
        let shape = pack.shape;
        let to =
            pack.to.0.cast::<P::Stored>().wrapping_add(self.chunk * (shape.key_len() + shape.value_len()));
        let [k, v] = [&pack.k, &pack.v]
            .map(|view| Heads::new(view.pointer.cast_mut(), view.dtype, &view.strides[1..]));
        let part = |heads, view: &DynView, dim| Part {
            heads,
            base: batch as isize * view.strides[0],
            head: kv_head,
            position: block * BLOCK,
            count: (pack.keys - block * BLOCK).min(BLOCK),
            dim,
        };
        let (keys, values) = (part(&k, &pack.k, shape.key_dim), part(&v, &pack.v, shape.value_dim));
        // SAFETY: heads and positions are inside the arrays; the block is this chunk's own.
        unsafe { shape.pack::<V, P::Stored>(pack.isa, keys, values, to, self.scratch) };
    }
}
