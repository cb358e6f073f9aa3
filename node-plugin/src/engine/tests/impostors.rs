//! Nodes with certificates of their own that take part where they have no part.

use galleonfs_storage_engine::replication::message::{FromReplica, Refusal, Reply};
use galleonfs_storage_engine::replication::{Incarnation, ReplicaId, wire};
use galleonfs_storage_engine::types::Epoch;

use super::several::{Cluster, Object, VOLUME, VOLUME_UID, Writer};
use super::*;
use crate::engine::post::frame;
use crate::transport::Side;

#[tokio::test(flavor = "multi_thread")]
async fn a_node_that_only_says_that_it_leads_is_refused_and_counted_and_the_true_leader_goes_on() {
    let mut cluster = Cluster::new(4, 3).await;
    let device = cluster.lead(0).await.expect("lead").path;
    let writer = Writer::start(&device);
    writer.goes_on();
    let before = cluster.object.state().look_ups;
    // It has the configuration, a certificate, and an epoch that is higher than the true one.
    let made_up = Object::new(cluster.object.config().in_sync);
    made_up.state().config.epoch = Epoch(40);
    {
        let leads = cluster.lead_by(3, &made_up);
        tokio::pin!(leads);
        let refused = |index: usize| cluster.hosts[index].engine().refused_orders() > 1;
        let mut patience = 500;
        while !(0..3).all(refused) {
            let polled = tokio::time::timeout(Duration::from_millis(20), &mut leads).await;
            assert!(polled.is_err(), "it leads: {polled:?}");
            patience -= 1;
            assert!(patience > 0, "it is not refused");
        }
    }
    writer.goes_on();
    assert_eq!(cluster.in_sync(), 3, "nobody was lost for it");
    let look_ups = cluster.object.state().look_ups - before;
    assert!(look_ups <= 6, "{look_ups} look-ups");
    cluster.hosts[3].kill();
    let written = writer.end();
    assert!(written.failed.is_none(), "{:?}", written.failed);
    cluster.hosts[0].engine().detach(VOLUME).await.expect("detach");
    let contents = cluster.contents().await;
    assert_eq!(contents.len(), 3);
    written.assert_all_in(&contents[0]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_takeover_costs_one_look_up_for_each_replica_elsewhere() {
    let mut cluster = Cluster::new(3, 3).await;
    cluster.lead(0).await.expect("lead");
    assert_eq!(cluster.object.state().look_ups, 2, "its own replica needs none");
    cluster.hosts[0].kill();
    cluster.lead(1).await.expect("another leads");
    // By the one replica that is neither dead nor the new leader's own.
    assert_eq!(cluster.object.state().look_ups, 3);
    for host in &cluster.hosts[1..] {
        assert_eq!(host.engine().refused_orders(), 0);
    }
    cluster.hosts[1].engine().detach(VOLUME).await.expect("detach");
}

#[tokio::test(flavor = "multi_thread")]
async fn nobody_answers_for_the_replica_of_another_node() {
    let cluster = Cluster::new(4, 3).await;
    let device = cluster.lead(0).await.expect("lead").path;
    let writer = Writer::start(&device);
    writer.goes_on();
    let config = cluster.object.config();
    let up = |index: usize| cluster.hosts[index].up.as_ref().expect("it is up");
    let leader = &cluster.hosts[0];
    let address = up(0).transport.address().expect("it listens");
    up(3).transport.dial(leader.uid, vec![address]);
    let session = || up(3).exchange.session(leader.uid, Side::Dialled);
    wait_until("it is connected", || session().is_some());
    // Whoever believes it ends: another epoch seems to have taken over.
    let forged = FromReplica {
        volume: VOLUME_UID.into_bytes(),
        replica: ReplicaId(cluster.hosts[1].replica.into_bytes()),
        epoch: config.epoch,
        incarnation: config.incarnation.unwrap_or(Incarnation([0; 16])),
        round: 1,
        boot: 0,
        reply: Reply::Refused {
            promised: Epoch(99),
            why: Refusal::Fenced,
        },
    };
    let frame = frame(wire::pack_reply(&forged), forged.volume, forged.replica, forged.epoch);
    session().expect("it is connected").send(frame).expect("it is sent");
    wait_until("it is counted", || up(0).exchange.refused() == 1);
    writer.goes_on();
    assert_eq!(cluster.in_sync(), 3);
    let written = writer.end();
    assert!(written.failed.is_none(), "{:?}", written.failed);
    cluster.hosts[0].engine().detach(VOLUME).await.expect("detach");
}
