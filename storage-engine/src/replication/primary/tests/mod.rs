//! What others do to the configuration while a primary serves, what it waits for, and what new connections bring.

mod compare;
mod concern;
mod takeover;

use super::super::message::{Ask, FromReplica, Reply, Row, Rows};
use super::super::{Change, Concern, Config, Incarnation, ReplicaId, Stamp};
use super::{Decision, Mutants, Primary, PrimaryEvent, PrimaryOptions, PrimaryOutput};
use crate::buffer::BufMut;
use crate::store::{Batch, WriteEntry};
use crate::types::{Check, Epoch, Lba, Seq, Version};

const MINE: Incarnation = Incarnation([9; 16]);
const BOOT: u64 = 77;

fn id(n: u8) -> ReplicaId {
    ReplicaId([n; 16])
}

/// A primary whose replicas answer what they are asked, but for those that are silent.
struct Rig {
    primary: Primary,
    now_ms: u64,
    silent: Vec<ReplicaId>,
    asked: Vec<(ReplicaId, Ask)>,
    proposed: Vec<(Stamp, Config)>,
    reads: usize,
    deposed: Option<String>,
    given_up: Vec<(ReplicaId, Version)>,
    compared: Vec<Option<u64>>,
}

impl Rig {
    /// Its epoch was claimed before it was started.
    fn new(config: Config, concern: Concern) -> Rig {
        let options = PrimaryOptions {
            volume: [1; 16],
            incarnation: MINE,
            replicas: 3,
            concern,
            prefer: None,
            row: None,
            mutants: Mutants::NONE,
        };
        let config = config.with(&Change::Claim(MINE));
        Rig {
            primary: Primary::new(options, Stamp(5), config, 1_000),
            now_ms: 1_000,
            silent: Vec::new(),
            asked: Vec::new(),
            proposed: Vec::new(),
            reads: 0,
            deposed: None,
            given_up: Vec::new(),
            compared: Vec::new(),
        }
    }

    fn serving(in_sync: &[u8], min_in_sync: usize) -> Rig {
        Rig::serving_with(in_sync, Concern::replicated(min_in_sync))
    }

    fn serving_with(in_sync: &[u8], concern: Concern) -> Rig {
        let mut rig = Rig::new_with(in_sync, concern);
        rig.serves();
        rig
    }

    fn new_with(in_sync: &[u8], concern: Concern) -> Rig {
        Rig::new(Config::new(in_sync.iter().map(|n| id(*n))), concern)
    }

    fn serves(&mut self) {
        self.run();
        self.read_as_it_is();
        assert!(self.primary.is_serving(), "{:?}", self.primary);
    }

    fn config(&self) -> Config {
        self.primary.config().clone()
    }

    /// Carries out what it wants until it wants nothing more.
    fn run(&mut self) {
        loop {
            while let Some(event) = self.primary.poll_event() {
                match event {
                    PrimaryEvent::Deposed(why) => self.deposed = Some(why),
                    PrimaryEvent::GivenUp(replica, version) => self.given_up.push((replica, version)),
                    PrimaryEvent::Compared(outcome) => self.compared.push(outcome),
                    _ => {}
                }
            }
            match self.primary.poll() {
                None => return,
                Some(PrimaryOutput::Send(replica, message)) => {
                    let answer = (!self.silent.contains(&replica))
                        .then(|| answer(&message.ask))
                        .flatten();
                    self.asked.push((replica, message.ask));
                    if let Some(reply) = answer {
                        self.primary.received(FromReplica {
                            volume: message.volume,
                            replica,
                            epoch: message.epoch,
                            incarnation: message.incarnation,
                            round: message.round,
                            boot: BOOT,
                            reply,
                        });
                    }
                }
                Some(PrimaryOutput::Propose { expected, config }) => self.proposed.push((expected, config)),
                Some(PrimaryOutput::ReadConfig) => self.reads += 1,
            }
        }
    }

    fn after(&mut self, ms: u64) {
        for _ in 0..ms / 50 {
            self.now_ms += 50;
            self.primary.tick(self.now_ms);
            self.run();
        }
    }

    fn finds(&mut self, stamp: u64, config: Config) {
        self.reads = 0;
        self.primary.config_read(Some((Stamp(stamp), config)));
        self.run();
    }

    /// Somebody adds a replica to the configuration, and the primary finds it when it looks.
    fn is_given(&mut self, replica: u8) -> Config {
        let mut config = self.config();
        config.out.insert(id(replica), Version::default());
        self.primary.look();
        self.run();
        assert_eq!(self.reads, 1);
        self.finds(6, config.clone());
        config
    }

    fn read_as_it_is(&mut self) {
        if self.reads > 0 {
            self.finds(5, self.config());
        }
    }

    fn writes(&mut self) {
        let payload = vec![BufMut::zeroed(4096).freeze()];
        self.primary.append(Batch {
            first_seq: self.primary.assigned().next(),
            writes: vec![WriteEntry {
                lba: Lba(0),
                blocks: 1,
                zero: false,
            }],
            checks: vec![Check::default()],
            pages: Vec::new(),
            payload,
        });
        self.run();
    }

    fn says(&mut self, replica: u8, reply: Reply) {
        self.primary.received(FromReplica {
            volume: [1; 16],
            replica: id(replica),
            epoch: self.primary.epoch(),
            incarnation: MINE,
            round: self.primary.round,
            boot: BOOT,
            reply,
        });
        self.run();
    }

    fn was_asked(&self, replica: u8, what: impl Fn(&Ask) -> bool) -> usize {
        let asked = self.asked.iter().filter(|(to, ask)| *to == id(replica) && what(ask));
        asked.count()
    }
}

fn answer(ask: &Ask) -> Option<Reply> {
    Some(match ask {
        Ask::Promise { .. } => Reply::Promised {
            last: Version::default(),
            ends: Vec::new(),
            agreed: Version::default(),
        },
        Ask::Trim { .. } => Reply::Trimmed,
        Ask::Settle { .. } => Reply::Settled,
        Ask::Write(batch) => Reply::Written { upto: batch.last_seq() },
        Ask::Flush { upto, id } => Reply::Flushed { upto: *upto, id: *id },
        Ask::Beat { sent_ms, .. } => Reply::Beaten { sent_ms: *sent_ms },
        Ask::Join { base } => Reply::Written { upto: *base },
        Ask::Read { .. } | Ask::Rows { .. } | Ask::Copy { .. } | Ask::Release => return None,
    })
}

#[test]
fn an_epoch_that_was_claimed_for_it_begins_without_another_claim() {
    let rig = Rig::serving(&[1, 2, 3], 2);
    assert_eq!(rig.proposed, []);
    assert_eq!(rig.primary.epoch().0, 1);
}

#[test]
fn a_replica_that_somebody_added_is_brought_up_to_date() {
    let mut rig = Rig::serving(&[1, 2], 1);
    let config = rig.is_given(3);
    rig.after(100);
    assert_eq!(rig.was_asked(3, |ask| matches!(ask, Ask::Promise { .. })), 1);
    let (expected, proposed) = rig.proposed.last().expect("it is to be recorded as syncing");
    assert_eq!((*expected, proposed), (Stamp(6), &config.with(&Change::Sync(id(3)))));
}

#[test]
fn one_that_is_to_leave_is_recorded_as_out_when_there_is_one_more_and_not_before() {
    let mut rig = Rig::serving(&[1, 2, 3], 2);
    let config = rig.is_given(4);
    rig.primary.leave(Some(id(3)));
    rig.after(100);
    let (_, proposed) = rig.proposed.last().expect("the new one is to be recorded as syncing");
    assert_eq!(
        *proposed,
        config.with(&Change::Sync(id(4))),
        "it is wanted, and nobody left"
    );
    // The one that was to leave may stay: the new one is in nobody's place any more.
    let mut rig = Rig::serving(&[1, 2, 3], 2);
    rig.is_given(4);
    rig.primary.leave(Some(id(3)));
    rig.primary.leave(None);
    rig.after(100);
    assert!(rig.proposed.len() <= 1);

    let mut rig = Rig::serving(&[1, 2, 3, 4], 2);
    rig.after(100);
    assert_eq!(rig.proposed, [], "one more than are wanted, and nobody is to leave");
    rig.primary.leave(Some(id(9)));
    rig.after(100);
    assert_eq!(rig.proposed, [], "nobody of that name is in sync");
    rig.primary.leave(Some(id(3)));
    rig.run();
    let (_, proposed) = rig.proposed.last().expect("it leaves");
    assert_eq!(proposed.in_sync, [id(1), id(2), id(4)].into());
    assert!(proposed.out.contains_key(&id(3)));
    rig.primary.decided(Decision::Made(Stamp(7)));
    rig.after(1_000);
    assert_eq!(rig.proposed.len(), 1, "and is not brought back");
    assert!(rig.deposed.is_none());
}

/// What is too new to be copied replaced what was to be copied: the target has neither until it came with the stream.
#[test]
fn a_replica_does_not_join_before_it_has_what_was_overwritten_meanwhile() {
    let mut rig = copying();
    // The write is on one member, on its way to the others, and not completed.
    rig.silent = vec![id(2), id(3)];
    rig.writes();
    assert_eq!(rig.primary.written(), Seq(0));
    let version = rig.primary.version(Seq(1));
    let (start, end, zero) = (Lba(0), Lba(1), false);
    let written = vec![Row {
        start,
        end,
        version,
        zero,
    }];
    let lists: Vec<_> = rig.asked.iter().filter_map(list_of).collect();
    for (replica, list) in lists {
        let rows = if replica == id(3) { Vec::new() } else { written.clone() };
        let found = Ok(Rows { rows, next: None });
        rig.says(replica.0[0], Reply::Rows { id: list, found });
    }
    let begun = rig.primary.version(Seq(0));
    rig.says(
        3,
        Reply::Flushed {
            upto: begun,
            id: u64::MAX,
        },
    );
    rig.after(100);
    let joins = |rig: &Rig| {
        rig.proposed
            .last()
            .is_some_and(|(_, config)| config.in_sync.contains(&id(3)))
    };
    assert!(
        !joins(&rig),
        "it has neither what was overwritten nor what overwrote it"
    );
    rig.says(3, Reply::Written { upto: Seq(1) });
    rig.says(
        3,
        Reply::Flushed {
            upto: version,
            id: u64::MAX,
        },
    );
    rig.after(100);
    assert!(joins(&rig), "{:?}", rig.primary);
}

/// Nothing was written since the stream was taken up, so that it has everything on stable storage was said before the copies
/// came. They are lost with its power if it joins on that.
#[test]
fn a_replica_does_not_join_before_it_was_told_to_flush_what_was_copied_and_did() {
    let mut rig = copying();
    rig.silent = vec![id(3)];
    let begun = rig.primary.version(Seq(0));
    rig.says(3, Reply::Flushed { upto: begun, id: 0 });
    list_two_lacking_blocks(&mut rig);
    for _ in 0..2 {
        let copy = *copies(&rig).last().expect("one is copied after the other");
        rig.says(3, Reply::Copied { id: copy, done: Ok(()) });
        rig.after(50);
    }
    // Once more: nothing is lacking.
    let lists: Vec<_> = rig.asked.iter().filter_map(list_of).collect();
    for (replica, list) in lists {
        let (rows, next) = (Vec::new(), None);
        let found = Ok(Rows { rows, next });
        rig.says(replica.0[0], Reply::Rows { id: list, found });
    }
    let order = rig.asked.iter().rev().find_map(|(to, ask)| match ask {
        Ask::Flush { id: order, .. } if *to == id(3) => Some(*order),
        _ => None,
    });
    let order = order.expect("it is told to flush");
    rig.after(500);
    let joins = |rig: &Rig| {
        let last = rig.proposed.last();
        last.is_some_and(|(_, config)| config.in_sync.contains(&id(3)))
    };
    assert!(!joins(&rig), "what was copied is not on its stable storage");
    rig.says(
        3,
        Reply::Flushed {
            upto: begun,
            id: order - 1,
        },
    );
    rig.after(100);
    assert!(!joins(&rig), "that was an answer to an earlier order");
    rig.says(3, Reply::Flushed { upto: begun, id: order });
    rig.after(100);
    assert!(joins(&rig), "{:?}", rig.primary);
}

/// Who is asked to list what it has, and the number of the question.
fn list_of((replica, ask): &(ReplicaId, Ask)) -> Option<(ReplicaId, u64)> {
    match ask {
        Ask::Rows { id, .. } => Some((*replica, *id)),
        _ => None,
    }
}

#[test]
fn one_that_was_given_up_while_it_is_recorded_as_syncing_does_not_come_back() {
    let mut rig = Rig::serving(&[1, 2], 1);
    let without = rig.config();
    rig.is_given(3);
    rig.after(100);
    assert_eq!(rig.proposed.len(), 1);
    rig.primary.decided(Decision::Conflict);
    rig.run();
    rig.finds(7, without.clone());
    rig.after(5_000);
    assert_eq!(rig.proposed.len(), 1, "nothing is asked for a replica that is given up");
    assert_eq!(rig.config(), without);
    assert!(rig.primary.is_serving());
}

#[test]
fn that_somebody_else_changed_who_is_in_sync_ends_it_and_says_so() {
    let mut rig = Rig::serving(&[1, 2, 3], 2);
    let mut config = rig.config();
    config.in_sync.remove(&id(3));
    rig.primary.look();
    rig.run();
    rig.finds(6, config);
    let why = rig.deposed.expect("nobody knows who has what");
    assert!(
        why.contains("somebody else changed which replicas are in sync"),
        "{why}"
    );
}

#[test]
fn a_change_waits_until_a_look_has_ended_and_a_look_until_a_change_has() {
    let mut rig = Rig::serving(&[1, 2, 3], 2);
    rig.primary.look();
    rig.silent.push(id(3));
    rig.after(4_000);
    assert_eq!((rig.reads, rig.proposed.len()), (1, 0));
    rig.finds(6, rig.config());
    rig.after(50);
    // It has the beginning of the epoch: that is on stable storage everywhere when one begins to serve.
    let begun = rig.primary.version(Seq(0));
    let dropped = rig.config().with(&Change::Drop([id(3)].into(), begun));
    assert_eq!(rig.proposed, [(Stamp(6), dropped)]);
    rig.primary.look();
    rig.after(1_000);
    assert_eq!(rig.reads, 0);
    rig.primary.decided(Decision::Made(Stamp(7)));
    rig.run();
    assert_eq!(rig.reads, 1);
}

#[test]
fn it_says_what_it_waits_for_and_nothing_if_it_waits_for_nothing() {
    let mut rig = Rig::serving(&[1, 2], 2);
    rig.writes();
    rig.after(3_000);
    assert_eq!(rig.primary.waits_for(), None);
    rig.silent.push(id(2));
    rig.writes();
    rig.after(1_000);
    assert_eq!(
        rig.primary.waits_for(),
        None,
        "what takes a moment is nobody's business"
    );
    rig.after(2_000);
    let text = rig.primary.waits_for().expect("it cannot go on without the other one");
    let want = format!(
        "{:?} has not answered for 2 s, and without it fewer than 2 would be left",
        id(2)
    );
    assert_eq!(text, want);
    rig.silent.clear();
    rig.after(1_000);
    assert_eq!(rig.primary.waits_for(), None);
}

#[test]
fn it_says_that_the_configuration_cannot_be_written() {
    let mut rig = Rig::serving(&[1, 2, 3], 2);
    rig.silent.push(id(2));
    rig.writes();
    rig.after(5_000);
    assert_eq!(rig.proposed.len(), 1);
    let text = rig.primary.waits_for().expect("the change was not made");
    assert!(text.starts_with("the configuration cannot be written"), "{text}");
    rig.primary.decided(Decision::Made(Stamp(6)));
    rig.run();
    assert_eq!(rig.primary.waits_for(), None);
    assert_eq!(rig.primary.written(), Seq(1));
}

#[test]
fn what_was_lost_with_a_connection_is_sent_again_when_there_is_a_new_one() {
    let mut rig = Rig::serving(&[1, 2], 2);
    rig.silent.push(id(2));
    rig.writes();
    assert_eq!(rig.was_asked(2, |ask| matches!(ask, Ask::Write(_))), 1);
    rig.primary.connection_lost(id(2));
    rig.run();
    rig.silent.clear();
    rig.primary.connected(id(2));
    rig.run();
    assert_eq!(rig.was_asked(2, |ask| matches!(ask, Ask::Write(_))), 2);
    assert_eq!(rig.primary.written(), Seq(1));
}

#[test]
fn a_record_that_is_missing_is_sent_again_once_however_many_came_in_its_place() {
    let mut rig = Rig::serving(&[1, 2], 1);
    rig.silent = vec![id(2)];
    for _ in 0..8 {
        rig.writes();
    }
    let writes = |rig: &Rig| rig.was_asked(2, |ask| matches!(ask, Ask::Write(_)));
    assert_eq!(writes(&rig), 8);
    // The first one was lost, and each of the others says so.
    for _ in 0..7 {
        rig.says(2, Reply::Gap { last: Seq(0) });
    }
    assert_eq!(writes(&rig), 16);
    // It was lost once more.
    rig.after(150);
    rig.says(2, Reply::Gap { last: Seq(0) });
    assert_eq!(writes(&rig), 24);
    // Another one is missing now.
    rig.says(2, Reply::Written { upto: Seq(3) });
    rig.says(2, Reply::Gap { last: Seq(3) });
    assert_eq!(writes(&rig), 29);
}

#[test]
fn a_flush_covers_what_came_meanwhile_and_is_not_waited_for_in_vain() {
    let mut rig = Rig::serving(&[1, 2], 1);
    rig.silent = vec![id(2)];
    let flushes = |rig: &Rig| rig.was_asked(2, |ask| matches!(ask, Ask::Flush { .. }));
    let durable = |rig: &Rig, seq| rig.primary.version(Seq(seq));
    rig.writes();
    rig.says(2, Reply::Written { upto: Seq(1) });
    rig.primary.sync();
    rig.run();
    assert_eq!(flushes(&rig), 1);
    for seq in 2..=4 {
        rig.writes();
        rig.says(2, Reply::Written { upto: Seq(seq) });
        rig.primary.sync();
        rig.run();
    }
    assert_eq!(flushes(&rig), 1, "one at a time");
    let upto = durable(&rig, 1);
    rig.says(2, Reply::Flushed { upto, id: 0 });
    assert_eq!(flushes(&rig), 2, "the next one at once");
    assert_eq!(rig.primary.durable(), durable(&rig, 1));
    // Whoever answers each flush is never late, however many are wanted.
    for seq in 5..=64 {
        rig.writes();
        rig.says(2, Reply::Written { upto: Seq(seq) });
        rig.primary.sync();
        let upto = durable(&rig, seq - 1);
        rig.says(2, Reply::Flushed { upto, id: 0 });
        rig.now_ms += 100;
        let sent_ms = rig.now_ms;
        rig.says(2, Reply::Beaten { sent_ms });
        rig.primary.tick(rig.now_ms);
        rig.run();
    }
    assert!(rig.proposed.is_empty(), "nobody is dropped: {:?}", rig.proposed);
}

#[test]
fn a_volume_without_requests_is_looked_after_as_often_as_beats_are_due() {
    let mut rig = Rig::serving(&[1, 2], 1);
    let mut ticks = 0;
    let until = rig.now_ms + 10_000;
    while let Some(due) = rig.primary.next_tick_ms().filter(|due| *due <= until) {
        rig.now_ms = due;
        rig.primary.tick(due);
        rig.run();
        let sent_ms = due;
        rig.says(1, Reply::Beaten { sent_ms });
        rig.says(2, Reply::Beaten { sent_ms });
        ticks += 1;
    }
    assert!((15..=50).contains(&ticks), "{ticks} in ten seconds");
    // Whoever does not answer is noticed as soon as ever.
    rig.silent = vec![id(2)];
    rig.writes();
    let since = rig.now_ms;
    while rig.proposed.is_empty() {
        rig.now_ms = rig.primary.next_tick_ms().expect("it serves");
        rig.primary.tick(rig.now_ms);
        rig.run();
        let sent_ms = rig.now_ms;
        rig.says(1, Reply::Beaten { sent_ms });
    }
    assert!(
        (2_000..2_200).contains(&(rig.now_ms - since)),
        "after {} ms",
        rig.now_ms - since
    );
}

/// A replica is on its way into the in-sync set, and lacks two blocks.
fn copying() -> Rig {
    let mut rig = Rig::serving(&[1, 2], 1);
    rig.is_given(3);
    rig.after(100);
    rig.primary.decided(Decision::Made(Stamp(7)));
    rig.run();
    rig.after(50);
    rig
}

fn list_two_lacking_blocks(rig: &mut Rig) {
    let row = |start| Row {
        start: Lba(start),
        end: Lba(start + 1),
        version: Version {
            epoch: Epoch(0),
            seq: Seq(1),
        },
        zero: true,
    };
    let lists: Vec<_> = rig.asked.iter().filter_map(list_of).collect();
    for (replica, list) in lists {
        let rows = if replica == id(3) {
            Vec::new()
        } else {
            vec![row(0), row(5)]
        };
        rig.says(
            replica.0[0],
            Reply::Rows {
                id: list,
                found: Ok(Rows { rows, next: None }),
            },
        );
    }
}

fn copies(rig: &Rig) -> Vec<u64> {
    let copy = |(_, ask): &(ReplicaId, Ask)| match ask {
        Ask::Copy { id, .. } => Some(*id),
        _ => None,
    };
    rig.asked.iter().filter_map(copy).collect()
}

#[test]
fn a_copy_that_nobody_waits_for_rests_while_the_guest_has_requests() {
    for guest in [false, true] {
        let mut rig = copying();
        list_two_lacking_blocks(&mut rig);
        let [first] = copies(&rig)[..] else {
            panic!("one block at a time: {:?}", rig.asked)
        };
        rig.now_ms += 7;
        rig.primary.tick(rig.now_ms);
        if guest {
            rig.primary.read(1, Lba(0), 1);
        }
        rig.says(
            3,
            Reply::Copied {
                id: first,
                done: Ok(()),
            },
        );
        assert_eq!(copies(&rig).len(), if guest { 1 } else { 2 });
        if guest {
            let until = rig.now_ms + 7;
            assert_eq!(rig.primary.next_tick_ms(), Some(until), "as long as the copy took");
            rig.now_ms = until;
            rig.primary.tick(until);
            rig.run();
            assert_eq!(copies(&rig).len(), 2);
        }
    }
}

#[test]
fn one_more_than_the_volume_wants_is_not_brought_up_to_date_until_somebody_falls_out() {
    let mut rig = Rig::serving(&[1, 2, 3], 1);
    rig.is_given(4);
    rig.after(1_000);
    let asked = |rig: &Rig| rig.asked.iter().any(|(replica, _)| *replica == id(4));
    assert!(!asked(&rig) && rig.proposed.is_empty());
    // One does not answer, and is recorded as out: now it is wanted.
    rig.silent = vec![id(3)];
    rig.writes();
    rig.after(2_500);
    assert!(
        rig.proposed
            .last()
            .is_some_and(|(_, config)| config.out.contains_key(&id(3)))
    );
    rig.primary.decided(Decision::Made(Stamp(7)));
    // Whoever fell out is asked first, and given up after a while.
    rig.after(11_000);
    assert!(asked(&rig));
}
