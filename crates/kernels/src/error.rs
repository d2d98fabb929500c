//! What a kernel's constructor refuses.

use mica_simd::Isa;

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

/// Refuses a tier that this machine does not have.
pub(crate) fn check_tier(kernel: &'static str, isa: Isa) -> Result<(), KernelError> {
    if Isa::available().contains(&isa) {
        return Ok(());
    }
    let names: Vec<&str> = Isa::available().iter().map(|isa| isa.name()).collect();
    Err(KernelError::new(kernel, format!("this machine has no {isa}: it has {}", names.join(", "))))
}
