//! How long a call may wait.
//!
//! The caller says so in the `grpc-timeout` header. We answer a little before, because "ABORTED, the replica on node a is
//! still pending" tells more than the caller's own "deadline exceeded".

use std::time::Duration;

use tokio::time::Instant;
use tonic::metadata::MetadataMap;

/// For callers that set no deadline.
const WAIT_DEFAULT: Duration = Duration::from_secs(60);
/// Waiting longer than this in one call helps nobody: the call is repeated anyway.
const WAIT_MAX: Duration = Duration::from_secs(600);
/// What is left for the answer to travel.
const MARGIN_MAX: Duration = Duration::from_secs(1);

/// When waiting has to end.
pub fn of(metadata: &MetadataMap) -> Instant {
    let header = metadata.get("grpc-timeout").and_then(|value| value.to_str().ok());
    Instant::now() + wait(header)
}

fn wait(header: Option<&str>) -> Duration {
    let given = header.and_then(parse).unwrap_or(WAIT_DEFAULT).min(WAIT_MAX);
    given.saturating_sub((given / 10).min(MARGIN_MAX))
}

/// At most eight digits and a unit.
fn parse(header: &str) -> Option<Duration> {
    let unit = header.chars().last()?;
    let digits = &header[..header.len() - unit.len_utf8()];
    let value: u64 = digits.parse().ok().filter(|_| digits.len() <= 8)?;
    Some(match unit {
        'H' => Duration::from_secs(value * 3600),
        'M' => Duration::from_secs(value * 60),
        'S' => Duration::from_secs(value),
        'm' => Duration::from_millis(value),
        'u' => Duration::from_micros(value),
        'n' => Duration::from_nanos(value),
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_answer_is_ready_before_the_caller_gives_up() {
        assert_eq!(wait(Some("10S")), Duration::from_secs(9));
        assert_eq!(wait(Some("60000000u")), Duration::from_secs(59));
        assert_eq!(wait(Some("500m")), Duration::from_millis(450));
    }

    #[test]
    fn a_deadline_that_is_missing_unreadable_or_endless_is_replaced_by_ours() {
        for header in [
            None,
            Some(""),
            Some("S"),
            Some("10"),
            Some("-1S"),
            Some("999999999S"),
            Some("1é"),
        ] {
            assert_eq!(wait(header), wait(Some("60S")), "{header:?}");
        }
        assert_eq!(wait(Some("9999H")), wait(Some("600S")));
    }
}
