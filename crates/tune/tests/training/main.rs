//! Training through the public door: golden curves, adapters of other programs, resuming.

mod adapters;
mod fuse;
mod golden;
mod resume;
mod session;

use mica_lm::load::{Loaded, load};
use mica_lm::weights::Packing;
use mica_testkit::fixture;

/// A tiny model of the fixtures.
fn model(name: &str, packing: Packing) -> Loaded {
    load(fixture(format!("models/{name}")), packing).unwrap_or_else(|error| panic!("{name}: {error}"))
}
