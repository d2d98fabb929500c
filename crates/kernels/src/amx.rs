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
