//! What can go wrong with an array.

use std::sync::Arc;

use crate::{Dtype, Shape};

/// The result of building or evaluating an array.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// An array error. Cheap to clone, because a failed node hands it to every reader.
#[derive(Debug, Clone, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// Operands do not fit the op: shapes, axes, dtypes or values.
    #[error("[{op}] {message}")]
    Invalid {
        /// The op's name.
        op: &'static str,
        /// What was expected and what came.
        message: Arc<str>,
    },
    /// The backend has no kernel for this op on these dtypes.
    #[error("[{op}] {message}")]
    Unsupported {
        /// The op's name.
        op: &'static str,
        /// What was asked and what there is.
        message: Arc<str>,
    },
    /// The memory limit would be exceeded. Nothing was allocated.
    #[error("[memory] {}", too_much(*.requested, *.active, *.limit))]
    OutOfMemory {
        /// Bytes that were asked for.
        requested: usize,
        /// Bytes in use.
        active: usize,
        /// The limit in force.
        limit: usize,
    },
    /// A value was read while a transformation was tracing it.
    #[error("[{op}] the value of an array cannot be read while grad, vjp or compile traces it")]
    Tracing {
        /// What was called.
        op: &'static str,
    },
    /// An op made a NaN while [`crate::set_check_nan`] was on.
    #[error("[{op}] {message}")]
    Nan {
        /// The first op whose result has one.
        op: &'static str,
        /// Shapes, how many there are, and whether it came from outside.
        message: Arc<str>,
    },
    /// The system does not start as many threads as were asked for.
    #[error("[threads] {0}")]
    Threads(Arc<mica_threads::TooManyThreads>),
    /// A kernel panicked: a defect of mica, reported instead of aborting.
    #[error("[eval] internal error: {0}")]
    Kernel(Arc<str>),
    /// An operator between arrays failed where the program could not be told at once.
    #[error("{error} (built at {place})")]
    Operator {
        /// The error.
        error: Box<Error>,
        /// The file and line of the expression.
        place: &'static std::panic::Location<'static>,
    },
    /// Reading or writing a file failed.
    #[error("[{op}] {message}")]
    File {
        /// What was being done.
        op: &'static str,
        /// Of what kind the cause is.
        kind: mica_io::ErrorKind,
        /// The cause.
        message: Arc<str>,
    },
}

fn too_much(requested: usize, active: usize, limit: usize) -> String {
    let why = match limit {
        usize::MAX => format!("the system does not give {requested} bytes more"),
        limit => format!("{requested} bytes more would exceed the limit of {limit} bytes"),
    };
    format!("{why} ({active} in use): lower the batch or sequence length, or raise the limit")
}

impl Error {
    pub(crate) fn invalid(op: &'static str, message: impl AsRef<str>) -> Error {
        Error::Invalid { op, message: message.as_ref().into() }
    }

    pub(crate) fn unsupported(op: &'static str, message: impl AsRef<str>) -> Error {
        Error::Unsupported { op, message: message.as_ref().into() }
    }

    pub(crate) fn shapes(op: &'static str, a: &Shape, b: &Shape) -> Error {
        Error::invalid(op, format!("shapes {a:?} and {b:?} do not fit together"))
    }

    pub(crate) fn dtype(op: &'static str, expected: &str, got: Dtype) -> Error {
        Error::invalid(op, format!("expected {expected}, got {got}"))
    }
}

impl From<mica_threads::TooManyThreads> for Error {
    fn from(error: mica_threads::TooManyThreads) -> Error {
        Error::Threads(Arc::new(error))
    }
}

impl From<mica_codec::CodecError> for Error {
    fn from(error: mica_codec::CodecError) -> Error {
        let text = error.to_string();
        Error::invalid("quantize", text.strip_prefix("[quantize] ").unwrap_or(&text))
    }
}

impl From<mica_kernels::KernelError> for Error {
    fn from(error: mica_kernels::KernelError) -> Error {
        Error::Invalid { op: error.kernel, message: error.message.into() }
    }
}
