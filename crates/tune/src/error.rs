//! What can go wrong while preparing, running or storing a training run, told so that it can be mended.

use std::path::{Path, PathBuf};

use mica_lm::ErrorKind;

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

    /// The data hold nothing that could be learnt.
    #[error("{0}")]
    NothingToLearn(String),

    /// Text could not be turned into tokens.
    #[error("tokenizing: {0}")]
    Tokenize(String),

    /// A setting is unknown, of the wrong kind, out of range, or at odds with another one.
    #[error("configuration: {0}")]
    Config(String),

    /// A checkpoint or the log of a run is not what was written.
    #[error("{}: {cause}", path.display())]
    Checkpoint {
        /// The file or folder.
        path: PathBuf,
        /// What is wrong and what to do.
        cause: String,
    },

    /// An adapter cannot be read, or does not fit the model.
    #[error("{}: {cause}", path.display())]
    Adapter {
        /// The file or folder.
        path: PathBuf,
        /// What is wrong and what to do.
        cause: String,
    },

    /// What was asked for is not there.
    #[error("{}: {what}", path.display())]
    Missing {
        /// The file or folder.
        path: PathBuf,
        /// What is missing and what to do.
        what: String,
    },

    /// The folder for a new run holds one already.
    #[error("{}: holds a run already; add --resume to go on with it, or choose another folder", path.display())]
    Taken {
        /// The run folder.
        path: PathBuf,
    },

    /// It would not fit in memory, and was not begun.
    #[error("{0}")]
    Memory(String),

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
    /// The kind of this failure, from which a program makes its exit code.
    pub fn kind(&self) -> ErrorKind {
        match self {
            Error::File { source, .. } => mica_io::ErrorKind::of(source).into(),
            Error::Io(error) => error.kind().into(),
            Error::Model(error) => error.kind(),
            Error::Array(error) => error.into(),
            Error::Config(_) | Error::Taken { .. } => ErrorKind::Usage,
            Error::Missing { .. } => ErrorKind::NotFound,
            Error::Memory(_) => ErrorKind::Memory,
            Error::DiskFull { .. } => ErrorKind::DiskFull,
            Error::BadLine { .. }
            | Error::TooManyBadLines { .. }
            | Error::Data { .. }
            | Error::NothingToLearn(_)
            | Error::Tokenize(_)
            | Error::Adapter { .. } => ErrorKind::BadData,
            Error::Checkpoint { .. } => ErrorKind::Integrity,
            Error::Locked { .. } | Error::NotFinite { .. } => ErrorKind::Failed,
        }
    }

    /// Wraps a system error with its file, and tells a full disk apart.
    pub fn file(path: impl AsRef<Path>, source: std::io::Error) -> Self {
        let path = path.as_ref().to_path_buf();
        match mica_io::ErrorKind::of(&source) {
            mica_io::ErrorKind::DiskFull => Error::DiskFull { path },
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
