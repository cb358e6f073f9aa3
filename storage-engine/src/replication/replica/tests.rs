//! What a replica tells of its own accord.

use super::super::message::{Rows, Stored};
use super::*;

const VOLUME: [u8; 16] = [1; 16];
const SELF: [u8; 16] = [2; 16];
const BOOT: u64 = 7;

/// A store that has what it is given at once, and whose checkpoint waits when the test says so.
#[derive(Debug, Default)]
struct Fake {
    promised: Epoch,
    last: Version,
    agreed: Version,
    waits_for: Option<Version>,
    events: VecDeque<ReplicaEvent>,
}

impl ReplicaStore for Fake {
    fn identity(&self) -> ([u8; 16], [u8; 16]) {
        (VOLUME, SELF)
    }

    fn promised(&self) -> Epoch {
        self.promised
    }

    fn last(&self) -> (Version, Version) {
        (self.last, self.last)
    }

    fn durable(&self) -> Version {
        self.last
    }

    fn copies_durable(&self) -> bool {
        true
    }

    fn ends(&self) -> Vec<EpochEnd> {
        Vec::new()
    }

    fn agreed(&self) -> Version {
        self.agreed
    }

    fn agree(&mut self, upto: Version) {
        self.agreed = upto;
    }

    fn promise(&mut self, epoch: Epoch, _: Option<KeyRow>) {
        self.promised = epoch;
        self.events.push_back(ReplicaEvent::Promised(epoch));
    }

    fn settle(&mut self, _: &[EpochEnd]) {
        self.events.push_back(ReplicaEvent::Settled);
    }

    fn is_behind(&self, _: &[EpochEnd]) -> bool {
        false
    }

    fn join(&mut self, base: Seq) {
        self.last = Version {
            epoch: self.promised,
            seq: base,
        };
        self.events.push_back(ReplicaEvent::Written(self.last));
    }

    fn room(&mut self, _: usize) -> Room {
        Room::Ready
    }

    fn append(&mut self, batch: Arc<Batch>) {
        self.last.seq = batch.last_seq();
        self.events.push_back(ReplicaEvent::Written(self.last));
    }

    fn sync(&mut self) {
        self.events.push_back(ReplicaEvent::Durable(self.last));
    }

    fn read_stored(&mut self, token: u64, _: Lba, _: u64) {
        self.events.push_back(ReplicaEvent::Read(token, Ok(Vec::new())));
    }

    fn rows(&mut self, token: u64, _: Lba, _: Version, _: usize) {
        let found: Result<Rows, String> = Err("not in this test".into());
        self.events.push_back(ReplicaEvent::Rows(token, found));
    }

    fn copy_in(&mut self, token: u64, _: Vec<Stored>, _: CopyMode) {
        self.events.push_back(ReplicaEvent::Copied(token, Ok(())));
    }

    fn gate_wanted(&self) -> Option<Version> {
        self.waits_for.filter(|wanted| *wanted > self.agreed)
    }

    fn poll_event(&mut self) -> Option<ReplicaEvent> {
        self.events.pop_front()
    }
}

fn order(replica: &mut Replica<Fake>, ask: Ask) -> Vec<Reply> {
    replica.received(ToReplica {
        volume: VOLUME,
        replica: ReplicaId(SELF),
        epoch: Epoch(1),
        incarnation: Incarnation([9; 16]),
        round: 1,
        boot: BOOT,
        ask,
    });
    said(replica)
}

fn said(replica: &mut Replica<Fake>) -> Vec<Reply> {
    let mut replies = Vec::new();
    while let Some(output) = replica.poll() {
        match output {
            ReplicaOutput::Reply(message) => replies.push(message.reply),
            ReplicaOutput::Reopen(ends) => panic!("nothing is to be cut off: {ends:?}"),
        }
    }
    replies
}

fn waits_for(replica: &mut Replica<Fake>, seq: u64) -> Version {
    let version = Version {
        epoch: Epoch(1),
        seq: Seq(seq),
    };
    replica.store_mut().expect("it is open").waits_for = Some(version);
    version
}

fn wants(replies: &[Reply]) -> Vec<Version> {
    let wanted = |reply: &Reply| match reply {
        Reply::Wants { durable } => Some(*durable),
        _ => None,
    };
    replies.iter().filter_map(wanted).collect()
}

#[test]
fn a_checkpoint_that_waits_is_told_at_once_and_not_with_the_next_beat() {
    let mut replica = Replica::new(Fake::default(), BOOT, 1_000, Mutants::NONE);
    order(&mut replica, Ask::Promise { row: None });
    let first = waits_for(&mut replica, 5);
    assert_eq!(wants(&said(&mut replica)), [], "nobody is there who could do something");
    let settle = Ask::Settle {
        ends: Vec::new(),
        whole: true,
    };
    assert_eq!(wants(&order(&mut replica, settle)), [first]);
    assert_eq!(wants(&said(&mut replica)), [], "it was said");
    let second = waits_for(&mut replica, 9);
    assert_eq!(wants(&said(&mut replica)), [second]);
    // What got lost is said again with each beat, until it is given.
    let beat = |durable| Ask::Beat { sent_ms: 1, durable };
    assert_eq!(wants(&order(&mut replica, beat(first))), [second]);
    assert_eq!(wants(&order(&mut replica, beat(second))), []);
}
