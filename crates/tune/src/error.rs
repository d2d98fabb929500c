//! What can go wrong while preparing, running or storing a training run, told so that it can be mended.

use std::path::{Path, PathBuf};

/// The result of this crate's fallible functions.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Errors of the training crate. The texts name the file, the place in it and what to do.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A file could not be opened, read or written.
    #[error("{}: {source}", path.display())]
    File {
        /// The file or folder.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },

    /// A file could not be read or written as its format demands.
    #[error(transparent)]
    Io(mica_io::Error),

    /// A line (or row, or list element) of a data file is not usable.
    #[error("{}, line {line}{}: {cause}", path.display(), column.map(|c| format!(", column {c}")).unwrap_or_default())]
    BadLine {
        /// The data file.
        path: PathBuf,
        /// Line in the file, counted from 1.
        line: u64,
        /// Column in the line in bytes, counted from 1, where it is known.
        column: Option<usize>,
        /// What is wrong and what was expected.
        cause: String,
    },

    /// More lines were bad than `skip_bad_lines` allows; the last one is told.
    #[error("{count} bad lines are more than the {allowed} that skip_bad_lines allows; the latest: {latest}")]
    TooManyBadLines {
        /// Bad lines so far.
        count: usize,
        /// The limit.
        allowed: usize,
        /// The latest bad line.
        latest: Box<Error>,
    },

    /// A data file or a set of them cannot be trained on as a whole.
    #[error("{}: {cause}", path.display())]
    Data {
        /// The file or folder.
        path: PathBuf,
        /// What is wrong and what was expected.
        cause: String,
    },

    /// Text could not be turned into tokens.
    #[error("tokenizing: {0}")]
    Tokenize(String),

    /// A setting is unknown, of the wrong kind, out of range, or at odds with another one.
    #[error("configuration: {0}")]
    Config(String),

    /// A saved run, checkpoint or adapter does not hold what it should.
    #[error("{}: {cause}", path.display())]
    Checkpoint {
        /// The file or folder.
        path: PathBuf,
        /// What is wrong and what to do.
        cause: String,
    },

    /// Another process is using the run folder.
    #[error("{}: the run folder is in use by process {owner}; wait for it to end or choose another folder", path.display())]
    Locked {
        /// The run folder.
        path: PathBuf,
        /// Who holds it, as written into the lock file.
        owner: String,
    },

    /// The loss or its gradient stopped being a number.
    #[error(
        "step {step}: the {what} is {value}; the weights are those of step {}, the batch is in {}; lower the \
         learning rate or clip the gradient, and go on from the last checkpoint",
        step - 1,
        batch.display()
    )]
    NotFinite {
        /// The step that could not be taken.
        step: u64,
        /// `loss` or `norm of the gradient`.
        what: &'static str,
        /// NaN or an infinity.
        value: f64,
        /// Where the step's batches were saved, as JSON.
        batch: PathBuf,
    },

    /// Computing failed.
    #[error(transparent)]
    Array(#[from] mica_array::Error),

    /// A model could not be opened or written.
    #[error(transparent)]
    Model(#[from] mica_lm::Error),

    /// The disk is full; whatever was saved before is untouched.
    #[error("{}: no space left while saving; the earlier checkpoint is untouched, free some space and resume", path.display())]
    DiskFull {
        /// The file or folder that was being written.
        path: PathBuf,
    },
}

impl Error {
    /// Wraps a system error with its file, and tells a full disk apart.
    pub fn file(path: impl AsRef<Path>, source: std::io::Error) -> Self {
        let path = path.as_ref().to_path_buf();
        match source.kind() {
            std::io::ErrorKind::StorageFull | std::io::ErrorKind::QuotaExceeded => Error::DiskFull { path },
            _ => Error::File { path, source },
        }
    }
}

impl From<mica_io::Error> for Error {
    fn from(error: mica_io::Error) -> Self {
        match error.kind() {
            mica_io::ErrorKind::DiskFull => Error::DiskFull { path: error.path().into() },
            _ => Error::Io(error),
        }
    }
}
