//! What every test shares: seeded random cases, tolerances, golden files, and where fixtures live.
//!
//! The crate stands above all others, so it knows only slices of numbers and files: no array, no
//! model, no reader that another crate would have to be tested with. For the same reason it has its
//! own small safetensors reader ([`Golden`]) beside the strict one in `mica-io`.
//!
//! Everything here panics with a message on failure, because it runs inside tests only.

mod close;
mod golden;
mod paths;
mod rng;

pub use close::{assert_bits_eq, assert_close, max_abs_rel_to_max, relative_l2};
pub use golden::Golden;
pub use paths::{fixture, shared, workspace};
pub use rng::Rng;
