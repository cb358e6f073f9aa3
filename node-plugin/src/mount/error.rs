//! What can go wrong with a mount, by what the caller should do next.

use std::time::Duration;

/// Each variant is one answer to "and now?"; the CSI room maps them to gRPC codes one to one.
#[derive(Debug, thiserror::Error)]
pub enum MountError {
    /// The request itself is wrong; repeating it changes nothing.
    #[error("{0}")]
    Invalid(String),
    /// The device or the path is in a state in which going on could destroy something; a person has to look.
    #[error("{0}")]
    Refused(String),
    /// A program did not end in time and was killed. Trying again is fine.
    #[error("{what} was not done after {} s and was stopped", after.as_secs())]
    TimedOut { what: String, after: Duration },
    /// A program did not even end when it was killed: it sleeps in the kernel. Until it wakes, nothing can be done.
    #[error("{what} (process {pid}) hangs in the kernel: the volume does not answer")]
    Hung { what: String, pid: u32 },
    /// A program said no.
    #[error("{0}")]
    Failed(String),
    /// We could not look or act ourselves.
    #[error("{doing}")]
    Io {
        doing: String,
        #[source]
        source: std::io::Error,
    },
}

impl MountError {
    /// Wraps an operating system error with what we were doing.
    pub fn io(doing: impl Into<String>) -> impl FnOnce(std::io::Error) -> MountError {
        let doing = doing.into();
        move |source| MountError::Io { doing, source }
    }

    /// The whole chain in one line, for a person.
    pub fn text(&self) -> String {
        match self {
            MountError::Io { doing, source } => format!("{doing}: {source}"),
            other => other.to_string(),
        }
    }
}
