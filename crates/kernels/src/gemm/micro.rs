//! The innermost loops as a table: what a tier offers to the driver.
//!
//! Everything that the driver hands to a micro-kernel has one of two layouts, the same on every
//! tier, so that a packed weight serves all of them:
//!
//! - **A panel**: up to [`Micro::rows`] rows. Blocks of 16 *steps*; a block holds 64 bytes per row.
//!   A step is one f32 of k, or a pair of bf16 (k even, k odd).
//! - **B panel**: 16 columns. A *line* per step: 16 f32, or 16 pairs of bf16 (64 bytes), or, for
//!   f16 weights read in place, 16 f16 (32 bytes).
//!
//! Sums go to tiles of [`Micro::rows`] x 16 f32.

use mica_simd::Isa;

use super::types::Precision;

/// One call of a micro-kernel: `rows` x `panels * 16` sums over `steps`.
pub(super) struct Call {
    pub steps: usize,
    pub a: *const u8,
    /// Bytes from one block of 16 steps to the next: 64 times the rows of the panel.
    pub a_block: usize,
    pub b: *const u8,
    /// Bytes from one B panel to the next.
    pub b_panel: usize,
    pub acc: *mut f32,
    /// f32 from the tile of one B panel to that of the next.
    pub acc_panel: usize,
    /// Go on from the sums in `acc`; otherwise from zero.
    pub load: bool,
    /// B comes from memory, not from a cache: worth asking for it early.
    pub stream: bool,
}

/// A micro-kernel.
///
/// # Safety
/// The processor has the tier's features; the panels that the call names are readable for `steps`
/// (rounded up to 16 in A, and in B for AMX), the tiles writable.
pub(super) type MicroFn = unsafe fn(&Call);

/// How the lines of a B panel are stored, and so which instruction multiplies them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Line {
    /// f32, f32 chain.
    F32,
    /// Pairs of bf16, widened, f32 chain.
    WidenBf16,
    /// f16, widened, f32 chain.
    WidenF16,
    /// Pairs of bf16, products of pairs.
    Pairs,
}

impl Line {
    /// Bytes of `k` elements of one panel. Panels of pairs and f16 are padded to 32 k.
    pub fn panel_bytes(self, k: usize) -> usize {
        match self {
            Line::F32 => k.next_multiple_of(16) * 64,
            Line::WidenBf16 | Line::WidenF16 | Line::Pairs => k.next_multiple_of(32) * 32,
        }
    }
}

/// The micro-kernels of one tier for one kind of line.
#[derive(Clone, Copy)]
pub(super) struct Micro {
    /// Rows of an A panel.
    pub rows: usize,
    pub line: Line,
    /// How many B panels a call of `r` rows should take, at `panels[r - 1]` (the last entry
    /// stands for all larger r).
    pub panels: &'static [usize],
    /// By rows - 1 (AMX: by tiles of 16 rows - 1) and panels - 1.
    pub table: &'static [&'static [MicroFn]],
    /// AMX: rows per tile, padded with zeros.
    pub tile_rows: Option<usize>,
}

impl Micro {
    /// Rows that a panel of `rows` rows occupies in packed A, when its block has `block_rows`.
    pub fn padded(&self, rows: usize, block_rows: usize) -> usize {
        match self.tile_rows {
            Some(tile) if block_rows >= tile => rows.next_multiple_of(tile),
            _ => rows,
        }
    }

    /// Panels per call when the A panels have (at most) `rows` rows.
    pub fn panels_for(&self, rows: usize) -> usize {
        self.panels[rows.clamp(1, self.panels.len()) - 1]
    }

    /// The kernel for so many rows and B panels.
    pub fn get(&self, rows: usize, panels: usize) -> MicroFn {
        let index = match self.tile_rows {
            Some(tile) => rows.div_ceil(tile) - 1,
            None => rows - 1,
        };
        self.table[index][panels - 1]
    }
}

/// Whether `precision` packs pairs of bf16 on this tier (otherwise it packs f32).
pub(crate) fn uses_pairs(isa: Isa, precision: Precision) -> bool {
    precision == Precision::Bf16 && matches!(isa, Isa::Avx512Bf16 | Isa::Amx)
}

/// The micro-kernels of a tier.
pub(super) fn select(isa: Isa, line: Line) -> Micro {
    match (isa, line) {
        #[cfg(target_arch = "x86_64")]
        (Isa::Amx, Line::Pairs) => super::amx::micro(),
        #[cfg(target_arch = "x86_64")]
        (Isa::Avx512 | Isa::Avx512Bf16 | Isa::Amx, _) => super::avx512::micro(line),
        #[cfg(target_arch = "x86_64")]
        (Isa::Avx2 | Isa::Avx2Vnni, _) => super::avx2::micro(line),
        #[cfg(target_arch = "aarch64")]
        (Isa::Neon | Isa::NeonDot | Isa::NeonI8mm, _) => super::neon::micro(line),
        _ => super::scalar::micro(line),
    }
}
