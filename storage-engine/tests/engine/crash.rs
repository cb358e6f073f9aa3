//! Crash states: at every boundary of a run, every kind of power cut, and the death of the process.
//!
//! Snapshots are taken, deleted and reverted to in between, and are part of the state.
//!
//! The oracle is strict. The log is one order of all writes, so what is there after a crash must be the state after
//! the first k of them, exactly, with k at least the last that a completed flush (or, for a mere kill, an answer)
//! covered, and at most the last submitted. Opening twice must give the same.

use galleonfs_storage_engine::BlockEngine;
use galleonfs_storage_engine::request::{Control, Request, RequestId};
use galleonfs_storage_engine::types::Identity;

use crate::clones::clone_disk;
use crate::harness::{Change, IDENTITY, Model, Rig, Shape, assert_check_passes, open_as, snapshot_id};
use crate::sim_disk::{Cut, Random, SimDisk};
use crate::snapshot_model::Run;

/// Bytes of a volume, in blocks of 4 KiB.
const SIZE_PAGES: u64 = 600;
/// Crash states in one run of the tests.
const STATES_MIN: usize = 20_000;

/// A guest that writes, zeroes and flushes by chance, and knows what it may count on.
struct Guest {
    /// Whose volume it is, and what was in it before.
    identity: Identity,
    base: Model,
    /// Whether it uses snapshots.
    snapshots: bool,
    shape: Shape,
    random: Random,
    changes: Vec<Change>,
    /// Change → its request, until answered.
    open: Vec<(usize, RequestId, bool)>,
    flushes: Vec<(usize, RequestId)>,
    /// Changes covered by a completed flush or FUA.
    flushed: usize,
    /// Changes answered, as the length of the answered prefix.
    answered: usize,
    next_stamp: u64,
    next_snapshot: u64,
}

impl Guest {
    fn new(seed: u64, snapshots: bool, shape: Shape, identity: Identity, base: Model) -> Guest {
        let (changes, open, flushes) = (Vec::new(), Vec::new(), Vec::new());
        Guest {
            identity,
            base,
            snapshots,
            shape,
            random: Random(seed),
            changes,
            open,
            flushes,
            flushed: 0,
            answered: 0,
            next_stamp: 1,
            next_snapshot: 1,
        }
    }

    fn act(&mut self, rig: &mut Rig) {
        let random = &mut self.random;
        let size = self.base.head.len() as u64;
        let block = rig.block();
        let lba = random.below(size);
        match random.below(if self.snapshots { 12 } else { 10 }) {
            0..=6 => {
                let most = if random.chance(10) { self.shape.most(200) } else { 4 };
                let blocks = 1 + random.below((size - lba).min(most));
                let fua = random.chance(10);
                let stamp = self.next_stamp;
                self.next_stamp += blocks;
                let id = rig.submit(rig.write_request(lba, blocks, stamp, fua));
                self.open.push((self.changes.len(), id, fua));
                self.changes.push(Change::Write { lba, blocks, stamp });
            }
            7 => {
                let blocks = 1 + random.below(size - lba);
                let (offset, len) = (lba * block, blocks * block);
                let id = rig.submit(Request::Zero {
                    offset,
                    len,
                    fua: false,
                });
                self.open.push((self.changes.len(), id, false));
                self.changes.push(Change::Write { lba, blocks, stamp: 0 });
            }
            10 | 11 => self.order(rig),
            _ => {
                let id = rig.submit(Request::Flush);
                self.flushes.push((self.answered, id));
            }
        }
    }

    /// Something about snapshots. Few are kept, so that each has much to keep.
    fn order(&mut self, rig: &mut Rig) {
        let model = self.base.clone().after(&self.changes);
        let picked = model.pick(&mut self.random);
        let (control, change) = match (self.random.below(8), picked) {
            (0, Some(id)) => {
                let discard_newer = true;
                (Control::Revert { id, discard_newer }, Change::Revert(id))
            }
            (1..=3, Some(id)) => (Control::Delete { id }, Change::Delete(id)),
            _ if model.snapshots.len() < 4 => {
                let id = snapshot_id(self.next_snapshot);
                self.next_snapshot += 1;
                (Control::Snapshot { id, time_ms: 1 }, Change::Snapshot(id))
            }
            _ => return,
        };
        let id = rig.order(control);
        self.open.push((self.changes.len(), id, true));
        self.changes.push(change);
    }

    fn listen(&mut self, rig: &mut Rig) {
        let (answered, flushed) = (&mut self.answered, &mut self.flushed);
        self.open.retain(|(change, id, fua)| match rig.answers.remove(id) {
            None => true,
            Some(answer) => {
                answer.expect("a healthy disk with room serves every write");
                *answered = (*answered).max(change + 1);
                if *fua {
                    *flushed = (*flushed).max(change + 1);
                }
                false
            }
        });
        // A write is answered when all before it are in the log too, but answers of FUA writes come later.
        self.flushes.retain(|(covers, id)| match rig.answers.remove(id) {
            None => true,
            Some(answer) => {
                answer.expect("a healthy disk serves every flush");
                *flushed = (*flushed).max(*covers);
                false
            }
        });
    }
}

/// Opens `disk` and compares; returns the number of changes that survived.
fn verify(disk: &SimDisk, epoch: u32, guest: &Guest, at_least: usize, what: &str) -> usize {
    let mut disk = disk.clone();
    let (engine, report) = open_as(&mut disk, guest.identity, epoch).unwrap_or_else(|error| panic!("{what}: {error}"));
    assert_eq!(report.damaged_blocks, Vec::<u64>::new(), "{what}");
    let mut rig = Rig::new(disk, engine);
    let state = rig.view();
    let most = guest.changes.len();
    // Which prefix it is follows from the newest stamp in it; zeroes leave no stamp, so several may fit.
    let mut model = guest.base.clone().after(&guest.changes[..at_least]);
    let kept = (at_least..=most).find(|count| {
        if *count > at_least {
            model.apply(&guest.changes[count - 1]);
        }
        state == model
    });
    let kept = kept.unwrap_or_else(|| {
        panic!("{what}: the state is not that after the first k changes for any k in {at_least}..={most}")
    });
    // Once more from what recovery itself left, with its own writes cut: nothing may change.
    let again = rig.disk.cut(Cut::Random(epoch.into()));
    drop(rig);
    let mut again = again;
    let (engine, _) =
        open_as(&mut again, guest.identity, epoch + 1).unwrap_or_else(|error| panic!("{what}, opened again: {error}"));
    let mut rig = Rig::new(again, engine);
    assert_eq!(rig.view(), state, "{what}: opening again changed what is read");
    kept
}

/// A clone of a volume that has something everywhere, before its first start: who it is, what it holds, and its first epoch.
fn clone(seed: u64, shape: Shape) -> (Identity, Model, SimDisk, u32) {
    let size = shape.blocks(SIZE_PAGES);
    let mut source = Run::with(Rig::shaped(size, shape), Model::new(size), IDENTITY, 1, seed);
    for n in 0..size / 16 {
        let (lba, blocks, stamp) = (n * 16, 3, 1_000_000 + n * 4);
        source.rig.write(lba, blocks, stamp).unwrap();
        source.model.apply(&Change::Write { lba, blocks, stamp });
    }
    source.take(snapshot_id(1_000));
    let (identity, disk, epoch, _) = clone_disk(&mut source, snapshot_id(1_000), size, 70);
    let mut base = Model::new(size);
    base.head = source.model.head;
    (identity, base, disk, epoch)
}

fn run(seed: u64, boundaries: usize) -> usize {
    // Every third guest knows no snapshots: what has none must not need them. Every fifth has a clone.
    let shape = Shape {
        sealed: seed % 4 >= 2,
        ..Shape::of(seed)
    };
    let (identity, base, mut disk, mut epoch) = if seed % 5 == 4 {
        clone(seed, shape)
    } else {
        let mut disk = SimDisk::default();
        let size = shape.blocks(SIZE_PAGES);
        shape.format(&mut disk, size);
        (IDENTITY, Model::new(size), disk, 1)
    };
    let mut guest = Guest::new(seed, !seed.is_multiple_of(3), shape, identity, base);
    let (engine, _) = open_as(&mut disk, identity, epoch).unwrap();
    let mut rig = Rig::new(disk, engine);
    let mut states = 0;
    let mut boundary = 0;
    while boundary < boundaries {
        match guest.random.below(10) {
            0..=3 => guest.act(&mut rig),
            4 => {
                rig.now_ms += guest.random.below(60);
                rig.engine.tick(rig.now_ms);
            }
            _ => {}
        }
        rig.poll();
        if rig.engine.next_tick_ms().is_some_and(|at| at <= rig.now_ms) {
            rig.engine.tick(rig.now_ms);
            rig.poll();
        }
        guest.listen(&mut rig);
        if rig.outstanding.is_empty() {
            continue;
        }
        let index = guest.random.below(rig.outstanding.len() as u64) as usize;
        rig.complete(index);
        rig.poll();
        guest.listen(&mut rig);
        boundary += 1;

        let in_flight = rig.disk_in_flight();
        let cuts = [
            Cut::None,
            Cut::All,
            Cut::Random(guest.random.next()),
            Cut::Random(guest.random.next()),
        ];
        let what = format!("seed {seed} boundary {boundary}");
        let mut kept = Vec::new();
        for cut in cuts {
            kept.push(verify(
                &in_flight.cut(cut),
                epoch + 1,
                &guest,
                guest.flushed,
                &format!("{what} {cut:?}"),
            ));
        }
        verify(
            &rig.disk.kill(),
            epoch + 1,
            &guest,
            guest.answered,
            &format!("{what} kill"),
        );
        states += cuts.len() + 1;

        // Now and then the crash really happens, and life goes on from there.
        if guest.random.chance(2) {
            let pick = guest.random.below(cuts.len() as u64) as usize;
            guest.changes.truncate(kept[pick]);
            guest.open.clear();
            guest.flushes.clear();
            guest.answered = kept[pick];
            guest.flushed = kept[pick];
            let mut disk = in_flight.cut(cuts[pick]);
            assert_check_passes(&mut disk);
            epoch += 2;
            let (engine, _) = open_as(&mut disk, identity, epoch).unwrap();
            rig = Rig::new(disk, engine);
        }
    }
    rig.settle();
    guest.listen(&mut rig);
    rig.close();
    assert_check_passes(&mut rig.disk);
    let all = guest.changes.len();
    verify(
        &rig.disk.cut(Cut::None),
        epoch + 1,
        &guest,
        all,
        &format!("seed {seed} closed"),
    );
    states
}

/// `SEEDS=n FIRST=m` runs seeds m to m+n-1; otherwise as many as it takes for [`STATES_MIN`], on two threads.
#[test]
#[expect(
    clippy::disallowed_methods,
    reason = "the engine starts no threads; whoever drives it may"
)]
fn every_crash_state_recovers_to_a_prefix_that_covers_every_flush() {
    let number = |name| std::env::var(name).ok().and_then(|text| text.parse::<u64>().ok());
    let first = number("FIRST").unwrap_or(1);
    let states: usize = match number("SEEDS") {
        Some(seeds) => (first..first + seeds).map(|seed| run(seed, 200)).sum(),
        None => std::thread::scope(|scope| {
            let half = |from: u64| {
                scope.spawn(move || {
                    let mut states = 0;
                    for seed in (from..).step_by(2) {
                        states += run(seed, 200);
                        if states >= STATES_MIN / 2 {
                            break;
                        }
                    }
                    states
                })
            };
            let halves = [half(first), half(first + 1)];
            halves
                .into_iter()
                .map(|half| half.join().expect("no crash state fails"))
                .sum()
        }),
    };
    println!("{states} crash states recovered");
    assert!(states >= STATES_MIN || number("SEEDS").is_some());
}
