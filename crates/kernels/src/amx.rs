//! AMX tiles: 16 rows of 64 bytes, multiplied 16 × 16 outputs at a time.
//!
//! Stable Rust has no intrinsics for them, so each instruction is a line of assembly. The compiler
//! never touches tile registers; they keep their contents from one function here to the next, on
//! the thread that holds [`Tiles`].

use std::arch::asm;

/// What `ldtilecfg` reads.
#[repr(C, align(64))]
struct Config {
    palette: u8,
    start_row: u8,
    reserved: [u8; 14],
    row_bytes: [u16; 16],
    rows: [u8; 16],
}

/// Rows and bytes per row of the eight tiles, in force while this value lives.
pub(crate) struct Tiles(());

impl Tiles {
    /// Configures the tiles: (rows, bytes per row) of each.
    ///
    /// # Safety
    /// The tier is `Isa::Amx`; no other `Tiles` lives on this thread. At most 16 rows of at most
    /// 64 bytes, none of them zero.
    pub unsafe fn new(shapes: [(usize, usize); 8]) -> Tiles {
        let mut config =
            Config { palette: 1, start_row: 0, reserved: [0; 14], row_bytes: [0; 16], rows: [0; 16] };
        for (at, (rows, bytes)) in shapes.into_iter().enumerate() {
            debug_assert!((1..=16).contains(&rows) && (4..=64).contains(&bytes));
            config.rows[at] = rows as u8;
            config.row_bytes[at] = bytes as u16;
        }
        // SAFETY: the configuration is 64 valid bytes.
        unsafe { asm!("ldtilecfg [{}]", in(reg) &config, options(nostack, readonly)) };
        Tiles(())
    }
}

impl Drop for Tiles {
    fn drop(&mut self) {
        // SAFETY: whoever made the value promised AMX.
        unsafe { asm!("tilerelease", options(nostack, nomem)) };
    }
}

/// Sets tile `$tile` to zero.
macro_rules! zero {
    ($tile:literal) => {
        std::arch::asm!(concat!("tilezero tmm", $tile), options(nostack, nomem))
    };
}

/// Reads tile `$tile` from rows `$stride` bytes apart.
macro_rules! load {
    ($tile:literal, $from:expr, $stride:expr) => {
        std::arch::asm!(
            concat!("tileloadd tmm", $tile, ", [{from} + {stride}*1]"),
            from = in(reg) $from,
            stride = in(reg) $stride,
            options(nostack, readonly)
        )
    };
}

/// Writes tile `$tile` to rows `$stride` bytes apart.
macro_rules! store {
    ($tile:literal, $to:expr, $stride:expr) => {
        std::arch::asm!(
            concat!("tilestored [{to} + {stride}*1], tmm", $tile),
            to = in(reg) $to,
            stride = in(reg) $stride,
            options(nostack)
        )
    };
}

/// `$c` += `$a` (signed bytes) · `$b` (unsigned bytes), in int32.
macro_rules! dot_i8_u8 {
    ($c:literal, $a:literal, $b:literal) => {
        std::arch::asm!(concat!("tdpbsud tmm", $c, ", tmm", $a, ", tmm", $b), options(nostack, nomem))
    };
}

/// `$c` += `$a` · `$b`, pairs of bf16, in f32.
macro_rules! dot_bf16 {
    ($c:literal, $a:literal, $b:literal) => {
        std::arch::asm!(concat!("tdpbf16ps tmm", $c, ", tmm", $a, ", tmm", $b), options(nostack, nomem))
    };
}

pub(crate) use {dot_bf16, dot_i8_u8, load, store, zero};

/// Two rows of tiles by two panels of 16 columns, or less: what bf16 products are made of. Four
/// products for four loads is the best ratio that eight tiles allow.
///
/// Tiles 0-3 are sums (0 and 1 the upper row), 4 and 5 hold A, 6 and 7 B. A row of a right-hand tile is
/// a pair of k in 16 columns.
pub(crate) struct Pairs {
    /// How many tiles of k.
    pub steps: usize,
    pub a: *const u8,
    /// Bytes from a row of A to the next, to the lower tile, and to the next tile of k.
    pub a_row: usize,
    pub a_below: usize,
    pub a_step: usize,
    /// Tiles of k follow each other.
    pub b: *const u8,
    /// Bytes to the other panel.
    pub b_right: usize,
}

/// Where the sums are.
#[derive(Clone, Copy)]
pub(crate) struct Sums {
    pub at: *mut f32,
    /// Bytes from a row to the next, to the lower tile, and to the other panel.
    pub row: usize,
    pub below: usize,
    pub right: usize,
}

/// Bytes of a whole tile, and of a row of one.
const TILE_BYTES: usize = 1024;
const ROW_BYTES: usize = 64;

impl Pairs {
    /// Goes on from the sums (`go_on`), or from zero, and writes them.
    ///
    /// # Safety
    /// Tiles are configured as described above; operands and sums are there for them.
    #[inline(always)]
    pub unsafe fn run<const LOWER: bool, const WIDE: bool>(&self, sums: Sums, go_on: bool) {
        let Pairs { steps, mut a, a_row, a_below, a_step, mut b, b_right } = *self;
        let Sums { at, row, below, right } = sums;
        // SAFETY: promised by the caller.
        unsafe {
            if go_on {
                load!(0, at, row);
                if WIDE {
                    load!(1, at.wrapping_byte_add(right), row);
                }
                if LOWER {
                    load!(2, at.wrapping_byte_add(below), row);
                }
                if LOWER && WIDE {
                    load!(3, at.wrapping_byte_add(below + right), row);
                }
            } else {
                zero!(0);
                zero!(1);
                zero!(2);
                zero!(3);
            }
            for _ in 0..steps {
                load!(6, b, ROW_BYTES);
                load!(4, a, a_row);
                dot_bf16!(0, 4, 6);
                if LOWER {
                    load!(5, a.wrapping_add(a_below), a_row);
                    dot_bf16!(2, 5, 6);
                }
                if WIDE {
                    load!(7, b.wrapping_add(b_right), ROW_BYTES);
                    dot_bf16!(1, 4, 7);
                }
                if LOWER && WIDE {
                    dot_bf16!(3, 5, 7);
                }
                a = a.wrapping_add(a_step);
                b = b.wrapping_add(TILE_BYTES);
            }
            store!(0, at, row);
            if WIDE {
                store!(1, at.wrapping_byte_add(right), row);
            }
            if LOWER {
                store!(2, at.wrapping_byte_add(below), row);
            }
            if LOWER && WIDE {
                store!(3, at.wrapping_byte_add(below + right), row);
            }
        }
    }
}
