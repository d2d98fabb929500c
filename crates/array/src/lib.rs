//! Lazy arrays with function transformations.
//!
//! Building an [`Array`] records a graph; [`Array::eval`], or reading a value, computes it. The
//! functions in [`transforms`] turn functions of arrays into their gradients.
//!
//! This crate knows arrays, not models: see `mica-nn` for layers and `mica-lm` for language models.

mod array;
pub mod backend;
pub mod consts;
mod dtype;
pub mod dtype_info;
mod error;
mod eval;
mod export;
pub mod fast;
pub mod files;
pub mod graph;
mod inspect;
pub mod kv;
pub mod memory;
mod nan;
mod node;
pub mod op;
mod ops;
mod packed;
mod print;
pub mod profile;
mod replay;
mod shape;
mod storage;
mod stream;
pub mod transforms;

pub use array::Array;
pub use dtype::{Complex32, Dtype, Element, promote};
pub use error::{Error, Result};
pub use eval::{eval, set_backend, set_threads, threads, threads_of_environment, with_pool};
pub use export::{FunctionExporter, ImportedFunction, Signature, export_function, import_function};
pub use inspect::{buffer_bytes, pending_ops};
pub use nan::set_check_nan;
pub use op::{Precision, Scalar};
pub use ops::arrange::{PadMode, broadcast_shapes};
pub use ops::assign::At;
pub use ops::conv;
pub use ops::custom::{Batched, CustomOp};
pub use ops::einsum::{einsum, einsum_path};
pub use ops::elementwise::Operand;
pub use ops::fft;
pub use ops::linalg;
pub use ops::quantized;
pub use ops::random;
pub use ops::select::Index;
pub use ops::sort::{Side, Unique};
pub use packed::{PackedWeight, Part};
pub use print::{PrintOptions, print_options, set_print_options, with_print_options};
pub use replay::{Record, Replay};
pub use shape::{Shape, Strides};
pub use stream::{Stream, ThreadLocalStream, async_eval, clear_streams, synchronize};
