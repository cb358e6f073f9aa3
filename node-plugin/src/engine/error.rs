//! The error of the engine's door: a kind that tells the caller what to do next, and a text for a person.

use std::fmt;

/// What the caller does next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ErrorKind {
    /// Try again: something is still in use, still in progress, or busy elsewhere.
    Retry,
    /// The pool has no room.
    NoSpace,
    /// What is stored is damaged; another replica or a person is needed.
    Corrupt,
    /// The replica or the volume is not here.
    NotFound,
    /// A newer release wrote this; only that release can open it.
    Unsupported,
    /// The directory holds another volume, replica or cluster.
    WrongIdentity,
    /// The operating system or the disk refused.
    Failed,
}

/// An operation of the engine, a device or a replica directory that failed.
pub struct EngineError {
    kind: ErrorKind,
    text: String,
    source: Option<Box<dyn std::error::Error + Send + Sync>>,
}

impl EngineError {
    /// An error whose text says what was done, to which object, and what was found.
    pub fn new(kind: ErrorKind, text: impl Into<String>) -> Self {
        EngineError {
            kind,
            text: text.into(),
            source: None,
        }
    }

    /// Chains the cause.
    pub fn because(mut self, source: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> Self {
        self.source = Some(source.into());
        self
    }

    /// What to do next.
    pub fn kind(&self) -> ErrorKind {
        self.kind
    }

    /// An operating-system error: a full disk and a missing file have kinds of their own.
    pub fn os(text: impl Into<String>, source: std::io::Error) -> Self {
        let kind = match source.raw_os_error() {
            Some(libc::ENOSPC | libc::EDQUOT) => ErrorKind::NoSpace,
            Some(libc::ENOENT) => ErrorKind::NotFound,
            _ => ErrorKind::Failed,
        };
        EngineError::new(kind, text).because(source)
    }
}

impl fmt::Display for EngineError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

/// With the causes, so that `{:?}` in a log line is complete.
impl fmt::Debug for EngineError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}: {}", self.kind, self.text)?;
        let mut cause = std::error::Error::source(self);
        while let Some(error) = cause {
            write!(f, ": {error}")?;
            cause = error.source();
        }
        Ok(())
    }
}

impl std::error::Error for EngineError {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        self.source.as_deref().map(|source| source as _)
    }
}
