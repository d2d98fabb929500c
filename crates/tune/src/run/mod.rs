//! The run folder: what a run leaves on disk, and how it is found again after a crash.
//!
//! ```text
//! run/
//!   run.lock            held while a process uses the folder
//!   config.yaml         the settings as resolved
//!   metrics.jsonl       one line a step
//!   checkpoints/step-N/ weights or adapter, optimizer, state.json, manifest.json
//!   adapters.safetensors, adapter_config.json, loss.svg …   written by others
//! ```
//!
//! Everything but `metrics.jsonl` appears under its name only when it is complete; `metrics.jsonl` is cut back
//! to where the checkpoint was when a run resumes, so that its lines are those of an undisturbed run.

pub mod checkpoint;
pub mod folder;
pub mod metrics;

pub use checkpoint::{About, Checkpoints, Found};
pub use folder::RunFolder;
pub use metrics::Metrics;
