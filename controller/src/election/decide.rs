//! Whether a Lease may be taken, decided without reading anybody else's clock.

use std::time::Duration;

use k8s_openapi::api::coordination::v1::Lease;
use kube::ResourceExt;
use tokio::time::Instant;

/// What to do about a Lease that was just read.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Decision {
    /// It is free, or ours.
    Take,
    /// Somebody else is alive, as far as we know.
    Wait,
}

/// Remembers since when a Lease has not changed.
#[derive(Debug)]
pub struct Observer {
    lasts: Duration,
    /// The version last seen, and when it was first seen.
    seen: Option<(String, Instant)>,
}

/// Who holds a Lease.
pub fn holder(lease: &Lease) -> Option<&String> {
    lease
        .spec
        .as_ref()?
        .holder_identity
        .as_ref()
        .filter(|holder| !holder.is_empty())
}

impl Observer {
    pub fn new(lasts: Duration) -> Self {
        Self { lasts, seen: None }
    }

    /// Judges a Lease read at `now`.
    pub fn decide(&mut self, lease: Option<&Lease>, identity: &str, now: Instant) -> Decision {
        let Some(lease) = lease else { return Decision::Take };
        let version = lease.resource_version().unwrap_or_default();
        let since = match &self.seen {
            Some((seen, since)) if *seen == version => *since,
            _ => now,
        };
        self.seen = Some((version, since));
        match holder(lease) {
            None => Decision::Take,
            Some(holder) if holder == identity => Decision::Take,
            // A holder may have set itself a longer term than ours.
            Some(_) if now.duration_since(since) > self.lasts.max(term(lease)) => Decision::Take,
            Some(_) => Decision::Wait,
        }
    }
}

fn term(lease: &Lease) -> Duration {
    let seconds = lease
        .spec
        .as_ref()
        .and_then(|spec| spec.lease_duration_seconds)
        .unwrap_or(0);
    Duration::from_secs(u64::try_from(seconds).unwrap_or(0))
}

#[cfg(test)]
mod tests {
    use super::*;
    use k8s_openapi::api::coordination::v1::LeaseSpec;

    const LASTS: Duration = Duration::from_secs(30);

    fn lease(version: &str, holder: &str) -> Lease {
        let spec = LeaseSpec {
            holder_identity: Some(holder.to_string()),
            ..LeaseSpec::default()
        };
        let mut lease = Lease {
            spec: Some(spec),
            ..Lease::default()
        };
        lease.metadata.resource_version = Some(version.to_string());
        lease
    }

    fn seconds(seconds: u64) -> Duration {
        Duration::from_secs(seconds)
    }

    #[test]
    fn a_lease_that_is_absent_free_or_ours_is_taken() {
        let (mut observer, now) = (Observer::new(LASTS), Instant::now());
        assert_eq!(observer.decide(None, "us", now), Decision::Take);
        assert_eq!(observer.decide(Some(&lease("1", "")), "us", now), Decision::Take);
        assert_eq!(observer.decide(Some(&lease("2", "us")), "us", now), Decision::Take);
    }

    #[test]
    fn a_lease_of_another_is_taken_only_after_it_stood_still_for_its_term() {
        let (mut observer, start) = (Observer::new(LASTS), Instant::now());
        assert_eq!(observer.decide(Some(&lease("1", "them")), "us", start), Decision::Wait);
        assert_eq!(
            observer.decide(Some(&lease("1", "them")), "us", start + seconds(30)),
            Decision::Wait
        );
        assert_eq!(
            observer.decide(Some(&lease("1", "them")), "us", start + seconds(31)),
            Decision::Take
        );
    }

    #[test]
    fn a_renewal_starts_the_wait_anew_whatever_time_it_claims() {
        let (mut observer, start) = (Observer::new(LASTS), Instant::now());
        observer.decide(Some(&lease("1", "them")), "us", start);
        assert_eq!(
            observer.decide(Some(&lease("2", "them")), "us", start + seconds(29)),
            Decision::Wait
        );
        assert_eq!(
            observer.decide(Some(&lease("2", "them")), "us", start + seconds(58)),
            Decision::Wait
        );
        assert_eq!(
            observer.decide(Some(&lease("2", "them")), "us", start + seconds(60)),
            Decision::Take
        );
    }

    #[test]
    fn a_holder_with_a_longer_term_is_given_it() {
        let (mut observer, start) = (Observer::new(LASTS), Instant::now());
        let mut patient = lease("1", "them");
        patient.spec.as_mut().expect("a spec").lease_duration_seconds = Some(60);
        observer.decide(Some(&patient), "us", start);
        assert_eq!(
            observer.decide(Some(&patient), "us", start + seconds(45)),
            Decision::Wait
        );
        assert_eq!(
            observer.decide(Some(&patient), "us", start + seconds(61)),
            Decision::Take
        );
    }
}
