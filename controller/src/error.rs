//! What goes wrong, sorted by what the caller should do about it.
//!
//! Inside the controller an error carries a kind, a sentence and its cause. At the CSI door the kind becomes the gRPC
//! code that the specification names for it, in the reconcile loop it becomes the wait until the next try.

use std::time::Duration;

use tonic::{Code, Status};

/// What the caller should do.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Kind {
    /// Ask for something that makes sense.
    Invalid,
    /// Give up: the object is not there.
    NotFound,
    /// Give up: the name stands for something else.
    Exists,
    /// Ask for another size.
    OutOfRange,
    /// Ask elsewhere, or make room.
    NoRoom,
    /// Change something else first.
    Precondition,
    /// Ask again: the same object is being worked on, or is not done yet.
    Busy,
    /// Ask again later: the API server does not answer.
    Unavailable,
    /// A mistake of ours, or of the installation.
    Internal,
}

/// An error with its kind.
#[derive(Debug, thiserror::Error)]
#[error("{text}")]
pub struct Error {
    pub kind: Kind,
    pub text: String,
    #[source]
    pub source: Option<Box<kube::Error>>,
}

pub type Result<T, E = Error> = std::result::Result<T, E>;

impl Error {
    pub fn new(kind: Kind, text: impl Into<String>) -> Self {
        Self {
            kind,
            text: text.into(),
            source: None,
        }
    }

    /// An error of the API server while doing something; the text says what we were doing and to which object.
    pub fn api(doing: impl std::fmt::Display, source: kube::Error) -> Self {
        let kind = match &source {
            kube::Error::Api(status) => match status.code {
                404 if is_object_missing(&source) => Kind::NotFound,
                409 => Kind::Busy,
                400 | 401 | 403 | 405 | 406 | 415 | 422 => Kind::Internal,
                _ => Kind::Unavailable,
            },
            // Whatever happened between us and the API server, asking again is the answer; it never means "not found".
            _ => Kind::Unavailable,
        };
        Self {
            kind,
            text: doing.to_string(),
            source: Some(Box::new(source)),
        }
    }

    /// When to try again by ourselves. `None`: not until something changes.
    pub fn retry_after(&self, failures: u32) -> Option<Duration> {
        let backoff = |first: u64, most: u64| Duration::from_secs((first << failures.min(10)).min(most));
        match self.kind {
            Kind::Busy => Some(backoff(1, 30)),
            Kind::Unavailable | Kind::Internal | Kind::NotFound | Kind::Exists => Some(backoff(2, 300)),
            Kind::NoRoom | Kind::Precondition => Some(backoff(10, 300)),
            Kind::Invalid | Kind::OutOfRange => None,
        }
    }

    /// The sentence and the chain of its causes.
    pub fn full_text(&self) -> String {
        match &self.source {
            Some(source) => match source.as_ref() {
                kube::Error::Api(status) => format!("{}: {}", self.text, status.message),
                other => format!("{}: {other}", self.text),
            },
            None => self.text.clone(),
        }
    }
}

impl From<Error> for Status {
    fn from(error: Error) -> Self {
        let code = match error.kind {
            Kind::Invalid => Code::InvalidArgument,
            Kind::NotFound => Code::NotFound,
            Kind::Exists => Code::AlreadyExists,
            Kind::OutOfRange => Code::OutOfRange,
            Kind::NoRoom => Code::ResourceExhausted,
            Kind::Precondition => Code::FailedPrecondition,
            Kind::Busy => Code::Aborted,
            Kind::Unavailable => Code::Unavailable,
            Kind::Internal => Code::Internal,
        };
        Status::new(code, error.full_text())
    }
}

/// Whether a write was refused because somebody else wrote first.
pub fn is_conflict(error: &kube::Error) -> bool {
    matches!(error, kube::Error::Api(status) if status.code == 409 && status.reason == "Conflict")
}

/// Whether an object of that name exists already.
pub fn is_already_exists(error: &kube::Error) -> bool {
    matches!(error, kube::Error::Api(status) if status.code == 409 && status.reason == "AlreadyExists")
}

/// Whether the API server says that this object does not exist. A 404 for the whole kind (our definitions are not
/// installed, or not served yet) names no object and must never pass for it: the caller would forget its volumes.
pub fn is_object_missing(error: &kube::Error) -> bool {
    matches!(error, kube::Error::Api(status)
        if status.code == 404 && status.details.as_ref().is_some_and(|details| !details.name.is_empty()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn api_error(code: u16, reason: &str) -> kube::Error {
        let status = kube::core::Status::failure("the API server's words", reason).with_code(code);
        kube::Error::Api(status.boxed())
    }

    #[test]
    fn an_api_server_that_does_not_answer_is_unavailable_and_never_a_made_up_not_found() {
        for code in [429, 500, 502, 503, 504] {
            let status = Status::from(Error::api("reading a volume", api_error(code, "")));
            assert_eq!(status.code(), Code::Unavailable, "HTTP {code}");
        }
        let cut = kube::Error::ReadEvents(std::io::ErrorKind::ConnectionReset.into());
        assert_eq!(
            Status::from(Error::api("reading a volume", cut)).code(),
            Code::Unavailable
        );
    }

    #[test]
    fn a_kind_that_is_not_served_is_unavailable_and_not_a_missing_object() {
        let unserved = api_error(404, "NotFound");
        assert!(!is_object_missing(&unserved));
        assert_eq!(Status::from(Error::api("reading", unserved)).code(), Code::Unavailable);

        let details = serde_json::from_value(serde_json::json!({"name": "data"})).expect("details of a status");
        let missing = kube::core::Status::failure("no", "NotFound")
            .with_code(404)
            .with_details(details);
        let missing = kube::Error::Api(missing.boxed());
        assert!(is_object_missing(&missing));
        assert_eq!(Status::from(Error::api("reading", missing)).code(), Code::NotFound);
    }

    #[test]
    fn a_lack_of_permission_is_an_internal_error_that_names_what_was_tried() {
        let status = Status::from(Error::api("creating GalleonReplica a-1", api_error(403, "Forbidden")));
        assert_eq!(status.code(), Code::Internal);
        assert_eq!(status.message(), "creating GalleonReplica a-1: the API server's words");
    }

    #[test]
    fn a_lost_race_asks_the_caller_to_come_again() {
        let error = api_error(409, "Conflict");
        assert!(is_conflict(&error) && !is_already_exists(&error));
        assert_eq!(Status::from(Error::api("writing", error)).code(), Code::Aborted);
    }

    #[test]
    fn waits_grow_with_the_failures_and_stay_bounded() {
        let error = Error::new(Kind::Unavailable, "");
        assert!(error.retry_after(0) < error.retry_after(3));
        assert_eq!(error.retry_after(40), Some(Duration::from_secs(300)));
        assert_eq!(Error::new(Kind::Invalid, "").retry_after(0), None);
    }
}
