//! From errors to exit codes.
//!
//! 0 ok, 1 failure, 2 usage, 3 not found, 4 access, 5 will not fit in memory, 6 disk, 7 bad data,
//! 8 integrity, 75 stopped and resumable, 130/143 signals.

use std::process::ExitCode;

use mica_lm::ErrorKind;

/// The run was stopped and can be resumed.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct Stopped(pub String);

/// The command was called in a way that has no meaning.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct Usage(pub String);

/// Prints an error and gives its exit code.
pub fn report(result: anyhow::Result<()>) -> ExitCode {
    let Err(error) = result else { return ExitCode::SUCCESS };
    eprintln!("mica: {}", text(&error));
    ExitCode::from(code(&error))
}

/// The error and its causes; those that a message tells already are not told again.
fn text(error: &anyhow::Error) -> String {
    let mut text = error.to_string();
    for cause in error.chain().skip(1).map(ToString::to_string) {
        if !text.contains(&cause) {
            text = format!("{text}: {cause}");
        }
    }
    text
}

fn code(error: &anyhow::Error) -> u8 {
    for cause in error.chain() {
        if cause.is::<Stopped>() {
            return 75;
        }
        if cause.is::<Usage>() {
            return 2;
        }
        let kind = if let Some(error) = cause.downcast_ref::<mica_lm::Error>() {
            error.kind()
        } else if let Some(error) = cause.downcast_ref::<mica_tune::Error>() {
            error.kind()
        } else if let Some(error) = cause.downcast_ref::<mica_io::Error>() {
            error.kind().into()
        } else if let Some(error) = cause.downcast_ref::<mica_array::Error>() {
            error.into()
        } else if let Some(error) = cause.downcast_ref::<std::io::Error>() {
            mica_io::ErrorKind::of(error).into()
        } else {
            continue;
        };
        return of_kind(kind);
    }
    1
}

fn of_kind(kind: ErrorKind) -> u8 {
    match kind {
        ErrorKind::Usage => 2,
        ErrorKind::NotFound => 3,
        ErrorKind::Access => 4,
        ErrorKind::Memory => 5,
        ErrorKind::DiskFull => 6,
        ErrorKind::BadData | ErrorKind::Unsupported => 7,
        ErrorKind::Integrity => 8,
        _ => 1,
    }
}

/// Rust ignores SIGPIPE, which turns a closed pipe into a panic of `println!`.
pub fn restore_broken_pipe() {
    #[cfg(unix)]
    // SAFETY: sets the default action before any thread is started.
    unsafe {
        libc::signal(libc::SIGPIPE, libc::SIG_DFL);
    }
}
