//! From errors to exit codes.
//!
//! 0 ok, 1 failure, 2 usage, 3 not found, 4 access, 5 will not fit in memory, 6 disk, 7 bad data,
//! 8 integrity, 75 stopped and resumable, 130/143 signals.
//!
//! In doubt: what the person typed is usage (2), a prompt that is too long for the model included; what files hold
//! is data (7), a tensor that is missing in them included; a file or folder that is not there is not found (3). A run
//! that Ctrl-C stops can be resumed (75); one that is terminated is saved too, and says that it was (143).

use std::process::ExitCode;

use mica_lm::ErrorKind;

/// The exit code of a program that SIGTERM ended.
const TERMINATED: u8 = 143;

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
            return if crate::signals::code() == Some(TERMINATED) { TERMINATED } else { 75 };
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
        ErrorKind::Interrupted => crate::signals::code().unwrap_or(130),
        _ => 1,
    }
}

/// Runs the program's work; a panic, which is a defect, ends it as a failure that is told in a line.
pub fn guarded(work: impl FnOnce() -> anyhow::Result<()> + std::panic::UnwindSafe) -> ExitCode {
    // Who asks for traces gets them.
    if std::env::var_os("RUST_BACKTRACE").is_none() {
        std::panic::set_hook(Box::new(|panic| {
            if mica_lm::tokenizer::is_parsing() {
                return;
            }
            let place = panic.location().map(|place| format!(" at {place}")).unwrap_or_default();
            let what = panic.payload();
            let what =
                what.downcast_ref::<String>().map(String::as_str).or(what.downcast_ref::<&str>().copied());
            eprintln!(
                "mica: internal error{place}: {}; this is a defect of mica, please report it with the command",
                what.unwrap_or("unknown")
            );
        }));
    }
    match std::panic::catch_unwind(work) {
        Ok(result) => report(result),
        Err(_) => ExitCode::FAILURE,
    }
}

/// Rust ignores SIGPIPE, which turns a closed pipe into an error of every write.
pub fn restore_broken_pipe() {
    #[cfg(unix)]
    // SAFETY: sets the default action before any thread is started.
    unsafe {
        libc::signal(libc::SIGPIPE, libc::SIG_DFL);
    }
}
