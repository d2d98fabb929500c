//! How a product is cut into blocks: rows, columns and steps of k of a chunk. Cutting never changes a bit.

use super::micro::{Line, Micro};

/// Up to this many rows a product is bound by reading B: weights are read in place even if they
/// must be widened, and each chunk packs its own A.
pub(super) const FEW_ROWS: usize = 32;
/// Bytes of a packed weight per chunk when rows are few: long reads for the prefetchers, and still
/// many chunks to share out.
const STREAM_BYTES: usize = 128 << 10;

/// Rows and columns of a chunk at most, where vectors multiply.
const MOST_ROWS: usize = 192;
const MOST_COLUMNS: usize = 384;
/// Chunks to have for many cores.
const CHUNKS: usize = 16;

/// Block sizes.
#[derive(Clone, Copy, Debug)]
pub(super) struct Cut {
    pub mc: usize,
    pub nc: usize,
    pub kc: usize,
}

impl Cut {
    pub fn new(
        micro: &Micro,
        in_place: bool,
        strided: bool,
        fine: bool,
        batches: usize,
        m: usize,
        n: usize,
        k: usize,
    ) -> Cut {
        let wide = micro.panels_for(m.min(micro.rows)) * 16;
        // A third of a 48 KB first-level cache a panel; f32 that need not start at multiples of 256 take three
        // quarters of that, so that three panels stay there while the rows of A pass (Emerald Rapids, 2,048 square:
        // 285 GFLOP/s with 128 lines, 305 with 192, 297 with 256).
        let lines = if fine && micro.line == Line::F32 { 192 } else { 256 };
        let unit = if micro.line == Line::Pairs { 2 * lines } else { lines };
        let few = m <= FEW_ROWS;
        // Read in place with few rows: straight through.
        let kc = if (few && in_place) || k <= unit + unit / 2 { k.max(1) } else { unit };
        let kc = kc.next_multiple_of(32);
        let blocks = m.div_ceil(most_rows(micro)).max(1);
        let mut mc = m.div_ceil(blocks).max(1).next_multiple_of(micro.rows);
        let mut nc = if few {
            let panel = micro.line.panel_bytes(if in_place { k.max(1) } else { kc });
            (STREAM_BYTES / panel).max(1) * 16
        } else {
            MOST_COLUMNS
        };
        nc = nc.next_multiple_of(wide).min(n.max(1).next_multiple_of(wide));
        // Enough chunks for many cores, as long as the blocks stay worth their packing.
        let chunks = |mc: usize, nc: usize| batches * m.div_ceil(mc) * n.div_ceil(nc);
        // A weight that has to be unpacked is unpacked by each block of rows, and every block of columns
        // reads all of A, which no cache holds if k is long.
        let unpacks = !in_place && !strided;
        let least = if k > 8 * kc { 128 } else { wide };
        while chunks(mc, nc) < CHUNKS && nc >= 2 * least && !few {
            nc = (nc / 2).next_multiple_of(wide);
            if chunks(mc, nc) < CHUNKS && mc >= 128 && !unpacks {
                mc = (mc / 2).next_multiple_of(micro.rows);
            }
        }
        Cut { mc, nc, kc }
    }

    /// Of rows that were chosen, any number may belong to a matrix: as many as a block can have.
    pub fn any_rows(&mut self, micro: &Micro) {
        self.mc = most_rows(micro).next_multiple_of(micro.rows);
    }

    /// Large blocks where there would be small ones for the sake of [`CHUNKS`], of sums so long that no cache holds
    /// their packed operands, if there are enough for the threads: their chunks pack for themselves. True if that was
    /// chosen. (Emerald Rapids, sums of 8,192: 256 x 256 1.33 times as fast, 256 x 768 1.1 to 1.2 times; AVX2 gained
    /// nothing, other tiers were not measured.)
    pub fn long(
        &mut self,
        micro: &Micro,
        (batches, threads): (usize, usize),
        m: usize,
        n: usize,
        k: usize,
    ) -> bool {
        let large = batches * m.div_ceil(MOST_ROWS) * n.div_ceil(MOST_COLUMNS);
        if k <= 8 * self.kc || m <= FEW_ROWS || large >= CHUNKS {
            return false;
        }
        let even = |size: usize, most: usize, unit: usize| {
            size.div_ceil(size.div_ceil(most).max(1)).max(1).next_multiple_of(unit)
        };
        let (mc, nc) = (even(m, 128, micro.rows), even(n, MOST_COLUMNS, 16 * micro.panels_for(micro.rows)));
        let chunks = batches * m.div_ceil(mc) * n.div_ceil(nc);
        if !chunks.is_multiple_of(threads.max(1)) && chunks < 4 * threads {
            return false;
        }
        (self.mc, self.nc) = (mc, nc);
        true
    }

    /// Few rows by all columns: for pairs in vectors. Their rows are packed almost as fast as they are copied, so the
    /// chunk that needs them does it, and no other core has to send them (Zen 5, 512 to 4,096 square: 2 to 5 % faster
    /// where both cores share a third-level cache, 4 to 23 % where they don't).
    pub fn across(&mut self, micro: &Micro, batches: usize, m: usize, n: usize) {
        let wide = micro.panels_for(micro.rows) * 16;
        let mut nc = n.clamp(1, 4096).next_multiple_of(wide);
        let blocks = CHUNKS.div_ceil((batches * n.div_ceil(nc)).max(1));
        let mc = m.div_ceil(blocks).clamp(FEW_ROWS, 256).next_multiple_of(micro.rows);
        while batches * m.div_ceil(mc) * n.div_ceil(nc) < CHUNKS && nc >= 4 * wide {
            nc = (nc / 2).next_multiple_of(wide);
        }
        (self.mc, self.nc) = (mc, nc);
    }
}

/// Rows of A per chunk: `mc * kc` is half of a 1 MB second-level cache at most.
fn most_rows(micro: &Micro) -> usize {
    if micro.tile_rows.is_some() { 512 } else { MOST_ROWS }
}
