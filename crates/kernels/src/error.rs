//! What a kernel's constructor refuses.

/// Views that do not fit together.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("[{kernel}] {message}")]
pub struct KernelError {
    /// The kernel's name.
    pub kernel: &'static str,
    /// What was expected and what came.
    pub message: String,
}

impl KernelError {
    /// An error of `kernel`.
    pub fn new(kernel: &'static str, message: impl Into<String>) -> KernelError {
        KernelError { kernel, message: message.into() }
    }
}
