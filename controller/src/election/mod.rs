//! Electing the one controller that runs the reconcile loops, by a Lease of coordination.k8s.io.
//!
//! Being leader is a courtesy, not a lock: two leaders at once would do the same work twice and harm nothing, because
//! every write is conditional. So the timing is relaxed and an idle cluster sees one write in ten seconds: the holder
//! renews every [`RENEW_EVERY`], others take over when a Lease has not changed for [`LEASE_LASTS`] by *their own* clock
//! (clocks of different machines are never compared), and a holder that could not renew for [`RENEW_WITHIN`] stops
//! before that.

mod decide;

use std::{future::Future, time::Duration};

use galleonfs_api::{LABEL_MANAGED_BY, MANAGED_BY};
use k8s_openapi::{
    api::coordination::v1::{Lease, LeaseSpec},
    apimachinery::pkg::apis::meta::v1::MicroTime,
    jiff::Timestamp,
};
use kube::{Api, Client, ResourceExt, api::PostParams};
use tokio::time::Instant;

use crate::{
    cluster::{get, replace},
    error::{Error, Result, is_already_exists},
    metrics::Metrics,
};
use decide::{Decision, Observer};

/// Name of the Lease, in the namespace of the controller.
pub const LEASE_NAME: &str = "galleonfs-controller";
/// How long a Lease that nobody renews keeps others away.
const LEASE_LASTS: Duration = Duration::from_secs(30);
/// How often the holder renews.
const RENEW_EVERY: Duration = Duration::from_secs(10);
/// How long a holder goes on without having been able to renew.
const RENEW_WITHIN: Duration = Duration::from_secs(20);
/// How often the others look (reads only), and how soon a failed renewal is tried again.
const RETRY_EVERY: Duration = Duration::from_secs(4);

const _: () = assert!(RENEW_EVERY.as_secs() + 2 * RETRY_EVERY.as_secs() < RENEW_WITHIN.as_secs());
const _: () = assert!(RENEW_WITHIN.as_secs() < LEASE_LASTS.as_secs());

/// One candidate.
#[derive(Debug)]
pub struct Election {
    leases: Api<Lease>,
    identity: String,
    metrics: Metrics,
}

impl Election {
    pub fn new(client: Client, namespace: &str, identity: String, metrics: Metrics) -> Self {
        Self {
            leases: Api::namespaced(client, namespace),
            identity,
            metrics,
        }
    }

    /// Runs `work` whenever this candidate is the leader and drops it when it is not; ends with `stop`, giving the Lease
    /// back.
    pub async fn run<W: Future<Output = ()>>(self, work: impl Fn() -> W, stop: impl Future<Output = ()>) {
        tokio::pin!(stop);
        loop {
            let lease = tokio::select! {
                lease = self.win() => lease,
                () = &mut stop => {
                    // It may have been won without our having heard of it yet.
                    self.give_back().await;
                    return;
                }
            };
            tracing::info!(identity = self.identity, "leading");
            self.metrics.set_leader(true);
            let stopped = tokio::select! {
                () = self.keep(lease) => false,
                () = work() => false,
                () = &mut stop => true,
            };
            self.metrics.set_leader(false);
            if stopped {
                self.give_back().await;
                return;
            }
            tracing::warn!(identity = self.identity, "not leading any more");
        }
    }

    /// Waits until the Lease is ours.
    async fn win(&self) -> Held {
        let mut observer = Observer::new(LEASE_LASTS);
        loop {
            match self.try_to_win(&mut observer).await {
                Ok(Some(held)) => return held,
                Ok(None) => {}
                Err(error) => tracing::warn!(error = error.full_text(), "the election cannot be held; trying again"),
            }
            tokio::time::sleep(RETRY_EVERY).await;
        }
    }

    async fn try_to_win(&self, observer: &mut Observer) -> Result<Option<Held>> {
        let asked = Instant::now();
        let lease = get(&self.leases, LEASE_NAME).await?;
        let won = match (observer.decide(lease.as_ref(), &self.identity, asked), lease) {
            (Decision::Wait, _) => None,
            (Decision::Take, Some(lease)) => replace(&self.leases, &self.taken(lease)).await?,
            (Decision::Take, None) => {
                let fresh = self.taken(Lease::default());
                match self.leases.create(&PostParams::default(), &fresh).await {
                    Ok(lease) => Some(lease),
                    Err(error) if is_already_exists(&error) => None,
                    Err(error) => return Err(Error::api(format!("creating Lease {LEASE_NAME}"), error)),
                }
            }
        };
        Ok(won.map(|lease| Held { lease, since: asked }))
    }

    fn taken(&self, mut lease: Lease) -> Lease {
        lease.metadata.name = Some(LEASE_NAME.to_string());
        lease
            .labels_mut()
            .insert(LABEL_MANAGED_BY.to_string(), MANAGED_BY.to_string());
        let now = MicroTime(Timestamp::now());
        let before = lease.spec.take().unwrap_or_default();
        let same_holder = before.holder_identity.as_deref() == Some(&self.identity);
        lease.spec = Some(LeaseSpec {
            holder_identity: Some(self.identity.clone()),
            lease_duration_seconds: Some(LEASE_LASTS.as_secs() as i32),
            acquire_time: if same_holder {
                before.acquire_time
            } else {
                Some(now.clone())
            },
            renew_time: Some(now),
            lease_transitions: Some(before.lease_transitions.unwrap_or(0) + i32::from(!same_holder)),
            ..LeaseSpec::default()
        });
        lease
    }

    /// Renews until that fails for too long or somebody else has the Lease.
    async fn keep(&self, mut held: Held) {
        let mut pause = RENEW_EVERY;
        loop {
            tokio::time::sleep(pause).await;
            let deadline = held.since + RENEW_WITHIN;
            match tokio::time::timeout_at(deadline, self.renew(&held.lease)).await {
                Ok(Ok(Some(renewed))) => {
                    held = renewed;
                    pause = RENEW_EVERY;
                    continue;
                }
                Ok(Ok(None)) => return,
                Ok(Err(error)) => tracing::warn!(error = error.full_text(), "the Lease could not be renewed"),
                Err(_) => {}
            }
            if Instant::now() + RETRY_EVERY >= deadline {
                return;
            }
            pause = RETRY_EVERY;
        }
    }

    /// `None`: it is somebody else's.
    async fn renew(&self, lease: &Lease) -> Result<Option<Held>> {
        let since = Instant::now();
        if let Some(lease) = replace(&self.leases, &self.taken(lease.clone())).await? {
            return Ok(Some(Held { lease, since }));
        }
        // Perhaps an earlier renewal arrived although its answer did not.
        let since = Instant::now();
        match get(&self.leases, LEASE_NAME).await? {
            Some(lease) if decide::holder(&lease) == Some(&self.identity) => {
                Ok(replace(&self.leases, &self.taken(lease))
                    .await?
                    .map(|lease| Held { lease, since }))
            }
            _ => Ok(None),
        }
    }

    /// Lets a successor begin at once. Nothing is lost if this fails: it then waits for the Lease to run out.
    async fn give_back(&self) {
        let give_back = async {
            let Some(mut lease) = get(&self.leases, LEASE_NAME).await? else {
                return Ok(());
            };
            if decide::holder(&lease) == Some(&self.identity) {
                lease.spec.get_or_insert_default().holder_identity = None;
                replace(&self.leases, &lease).await?;
            }
            Ok::<_, Error>(())
        };
        match tokio::time::timeout(RETRY_EVERY, give_back).await {
            Ok(Ok(())) => {}
            Ok(Err(error)) => tracing::info!(error = error.full_text(), "the Lease was not given back"),
            Err(_) => tracing::info!("the Lease was not given back in time"),
        }
    }
}

/// A Lease that is ours, and since when that is certain.
struct Held {
    lease: Lease,
    since: Instant,
}
