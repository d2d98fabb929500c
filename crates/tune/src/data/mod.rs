//! From data files to batches: lines → records → samples → batches, in a repeatable order.
//!
//! ```text
//! read ──▶ format ──▶ sample ──▶ order ──▶ batch ──▶ loader
//! bytes    Record     tokens +   which      rows of    the stream that a run
//! of lines             targets    comes next  one length  consumes and resumes
//! ```
//!
//! Nothing here knows an array or a model: a [`batch::Batch`] is plain vectors of tokens, targets,
//! positions and segments.

pub mod batch;

pub mod chat;
pub mod check;
pub mod encode;
pub mod format;
pub mod loader;
pub mod order;
pub mod prefetch;
pub mod read;
pub mod sample;
pub mod samples;
