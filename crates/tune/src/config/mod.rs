//! What a run is to do: read from YAML and flags, completed with defaults, written down as resolved.
//!
//! There are two dialects with one result. [`train::TrainConfig`] is `mica train` (names and defaults after trl and
//! peft), [`lora::LoraConfig`] is `mica lora` (mlx-lm's keys, defaults and meanings). In both, an unset
//! key stays unset until [`RunConfig`] is resolved, because some defaults depend on the model and on other
//! keys. A key that is unknown is an error that names the nearest known one.

pub mod keys;
pub mod lora;
pub mod optimizer;
pub mod run;
pub mod train;

pub use lora::LoraConfig;
pub use optimizer::Optimizer;
pub use run::{AdapterConfig, Duration, FineTune, Method, ModelFacts, RunConfig, TestRun};
pub use train::TrainConfig;
