//! From what went wrong to what the caller is told.

use std::time::Duration;

use tokio::time::Instant;
use tonic::Status;
use tonic::metadata::MetadataMap;

use crate::mount::MountError;
use crate::served::{Unguarded, Waited};

/// What a caller without a deadline of its own waits for; the kubelet's own is two minutes.
const DEADLINE_DEFAULT: Duration = Duration::from_secs(110);

/// How long before the caller's deadline we answer, so that our reason arrives instead of its "deadline exceeded".
const ANSWER_EARLY: Duration = Duration::from_millis(500);

impl From<MountError> for Status {
    fn from(error: MountError) -> Status {
        let text = error.text();
        match error {
            MountError::Invalid(_) => Status::invalid_argument(text),
            MountError::Refused(_) => Status::failed_precondition(text),
            MountError::TimedOut { .. } | MountError::Hung { .. } => Status::aborted(text),
            MountError::Failed(_) | MountError::Io { .. } => Status::internal(text),
        }
    }
}

impl From<Unguarded> for Status {
    fn from(unguarded: Unguarded) -> Status {
        match unguarded {
            Unguarded::Busy(text) | Unguarded::GoesOn(text) => Status::aborted(text),
            Unguarded::Broke(text) => Status::internal(text),
        }
    }
}

/// What a caller is told when the device it waited for is not there.
pub fn not_here(volume: &str, waited: Waited) -> Status {
    match waited {
        Waited::Device(device) => Status::unavailable(format!(
            "volume {volume} has {} bytes on this node so far: it is still being enlarged",
            device.size_bytes
        )),
        Waited::Failed(why) => {
            Status::unavailable(format!("volume {volume} could not be brought up on this node: {why}"))
        }
        Waited::StillComing => Status::aborted(format!("volume {volume} is still being brought up on this node")),
        Waited::Absent => Status::aborted(format!(
            "the order to attach volume {volume} has not reached this node yet"
        )),
    }
}

/// Until when the caller waits, by the `grpc-timeout` it sent.
pub fn deadline(metadata: &MetadataMap) -> Instant {
    let wished = metadata
        .get("grpc-timeout")
        .and_then(|value| parse_timeout(value.to_str().ok()?));
    let span = wished.unwrap_or(DEADLINE_DEFAULT);
    Instant::now() + span.saturating_sub(ANSWER_EARLY.min(span / 10))
}

/// Until when a part of the work may wait for something to come: early enough for its own reason to be the answer.
pub fn patience(until: Instant) -> Instant {
    let now = Instant::now();
    now + until.saturating_duration_since(now).mul_f32(0.9)
}

/// At most eight digits and a unit.
fn parse_timeout(text: &str) -> Option<Duration> {
    let (digits, unit) = text.split_at_checked(text.len().checked_sub(1)?)?;
    let number: u64 = digits.parse().ok().filter(|_| digits.len() <= 8)?;
    Some(match unit {
        "H" => Duration::from_secs(number * 3600),
        "M" => Duration::from_secs(number * 60),
        "S" => Duration::from_secs(number),
        "m" => Duration::from_millis(number),
        "u" => Duration::from_micros(number),
        "n" => Duration::from_nanos(number),
        _ => return None,
    })
}

#[cfg(test)]
mod unit {
    use super::*;

    #[test]
    fn timeouts_of_callers_are_read_in_every_unit() {
        assert_eq!(parse_timeout("2M"), Some(Duration::from_secs(120)));
        assert_eq!(parse_timeout("119999m"), Some(Duration::from_millis(119_999)));
        assert_eq!(parse_timeout("7u"), Some(Duration::from_micros(7)));
        for bad in ["", "m", "-1S", "1x", "999999999S", "1é"] {
            assert_eq!(parse_timeout(bad), None, "{bad}");
        }
    }
}
