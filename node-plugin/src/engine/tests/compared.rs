//! The replicas of a volume are compared as often as they are scrubbed.

use std::time::Duration;

use super::several::{Cluster, VOLUME, Writer};
use super::wait_until;
use crate::engine::ScrubPlan;

#[tokio::test(flavor = "multi_thread")]
async fn replicas_are_compared_by_the_plan_of_the_scrub_beside_a_guest_and_are_the_same() {
    let plan = ScrubPlan {
        every: Duration::from_secs(1),
        bytes_per_second: 0,
    };
    let cluster = Cluster::with(3, 3, None, Some(plan)).await;
    let device = cluster.lead(0).await.expect("lead").path;
    let writer = Writer::start(&device);
    let engine = cluster.hosts[0].engine();
    let compared = || engine.stats_of(VOLUME).expect("it is attached").compared;
    wait_until("the replicas to be compared", || compared().passes >= 1);
    assert_eq!(compared().differing, 0);
    assert!(writer.end().failed.is_none());
    engine.detach(VOLUME).await.expect("detach");
}
