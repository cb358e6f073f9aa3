//! Changes of the superblocks between checkpoints: an epoch is promised, the ends of epochs are settled.
//!
//! ```text
//! promise: no more writes ─► the log is in the kernel's hands ─► sync ─► mark ─► sync ─► salts ─┐
//! settle: ──────────────────────────────────────────────────────────────────────────────────────┴─► superblock 0, 1
//! ```
//!
//! They are carried out one after the other, and never while a checkpoint writes the superblocks; a checkpoint that
//! is done with everything else waits for them in turn. Whoever comes second writes what the first one changed.

use std::collections::VecDeque;

use super::super::keys;
use super::super::superblock::{EpochEnd, Superblock};
use super::super::{Event, Purpose, Room, Store};
use crate::buffer::Buf;
use crate::io::{FileId, Io};
use crate::seal::KeyRow;
use crate::types::{Epoch, PAGE_BYTES, Seq, Version};

/// What is to be changed, in the order in which it was asked for.
#[derive(Debug, Default)]
pub struct Amendments {
    waiting: VecDeque<Amendment>,
    step: Step,
}

#[derive(Debug)]
enum Amendment {
    Promise { epoch: Epoch, rows: Vec<KeyRow> },
    Settle(Vec<EpochEnd>),
}

/// Where the first of them is.
#[derive(Debug, Default)]
enum Step {
    #[default]
    Log,
    /// The salts of a sealed replica are being written, file by file.
    Keys {
        slot: u8,
        file: KeyStep,
    },
    /// Everything else is done; a checkpoint may be writing the superblocks.
    Ready,
    Superblocks {
        slot: u8,
        next: Box<Superblock>,
    },
}

#[derive(Clone, Copy, Debug)]
enum KeyStep {
    Create,
    Write,
    Sync,
}

impl Amendments {
    /// Nothing is to be changed.
    pub fn is_empty(&self) -> bool {
        self.waiting.is_empty()
    }

    /// The superblocks are being written.
    pub fn is_writing(&self) -> bool {
        matches!(self.step, Step::Superblocks { .. })
    }
}

impl Store {
    /// Raises the promised epoch of an open store; reported by [`Event::Promised`] once a power cut cannot undo it. From
    /// now on nothing is appended until then, and then only in the new epoch. `rows` are the salts that a sealed replica
    /// needs to have for it: that of the epoch, and those of epochs that it had no part in; known ones may be among them.
    pub fn promise(&mut self, epoch: Epoch, rows: &[KeyRow]) {
        let newest = self
            .amendments
            .waiting
            .iter()
            .rev()
            .find_map(|amendment| match amendment {
                Amendment::Promise { epoch, .. } => Some(*epoch),
                Amendment::Settle(_) => None,
            });
        let promised = newest.unwrap_or(self.superblock.epoch);
        assert!(
            epoch > promised,
            "I2: epoch {} was promised, not {}",
            promised.0,
            epoch.0
        );
        assert!(!self.closing, "a store that is being closed promises nothing");
        assert_eq!(
            self.is_sealed(),
            !rows.is_empty(),
            "a sealed replica needs a salt for each epoch"
        );
        let rows = rows.to_vec();
        self.amendments.waiting.push_back(Amendment::Promise { epoch, rows });
        self.background_due = true;
    }

    /// True from the call of [`Store::promise`] until it is reported.
    pub fn is_promising(&self) -> bool {
        let promise = |amendment: &Amendment| matches!(amendment, Amendment::Promise { .. });
        self.amendments.waiting.iter().any(promise)
    }

    /// The newest version in this log that lies behind one of these ends. It cannot be dropped from an open store: open it
    /// again with [`Settle::Told`](super::super::Settle).
    pub fn beyond(&self, ends: &[EpochEnd]) -> Option<Version> {
        let highest = self.log.highest;
        ends.iter()
            .find(|row| row.covers(highest.epoch))
            .filter(|row| highest.seq > row.end)
            .map(|_| highest)
    }

    /// Settles where epochs ended; reported by [`Event::Settled`] once a power cut cannot undo it. What is settled is never
    /// changed, and nothing in this log may be behind it ([`Store::beyond`]).
    pub fn settle(&mut self, ends: &[EpochEnd]) {
        assert_eq!(
            self.beyond(ends),
            None,
            "I11: the log goes beyond an end that is to be settled"
        );
        for row in ends {
            assert!(
                self.superblock.agrees_with(row),
                "the end of an epoch never changes: {row:?}, and settled are {:?}",
                self.superblock.epoch_ends
            );
        }
        self.amendments.waiting.push_back(Amendment::Settle(ends.to_vec()));
        self.background_due = true;
    }

    /// Takes the first amendment a step further.
    pub(in super::super) fn run_amendments(&mut self) {
        loop {
            let Some(first) = self.amendments.waiting.front() else {
                return;
            };
            match (&self.amendments.step, first) {
                (Step::Log, Amendment::Promise { .. }) => {
                    if !self.log_is_down() {
                        return;
                    }
                    self.amendments.step = Step::Ready;
                    if self.take_rows_of_promise() {
                        self.amendments.step = Step::Keys {
                            slot: 0,
                            file: KeyStep::Create,
                        };
                        self.write_keys();
                        return;
                    }
                }
                (Step::Log, Amendment::Settle(_)) => self.amendments.step = Step::Ready,
                (Step::Ready, _) => {
                    if self.is_writing_superblocks() {
                        return;
                    }
                    let next = Box::new(self.amended());
                    self.amendments.step = Step::Superblocks { slot: 0, next };
                    self.write_amended();
                    return;
                }
                (Step::Keys { .. } | Step::Superblocks { .. }, _) => return,
            }
        }
    }

    /// Everything that was appended is on stable storage, and so is a mark that says so: whoever opens the replica
    /// later tells damage to its end from a torn one.
    fn log_is_down(&mut self) -> bool {
        if self.log.inflight() > 0 {
            return false;
        }
        if self.log.synced < self.log.written() {
            self.sync();
            self.start_sync();
            return self.log.synced >= self.log.written();
        }
        if self.log.unmarked() && self.room(0, true) == Room::Ready {
            self.write_mark();
            return false;
        }
        true
    }

    /// Adds the rows that are new; false if none is.
    fn take_rows_of_promise(&mut self) -> bool {
        let Some(Amendment::Promise { rows, .. }) = self.amendments.waiting.front() else {
            unreachable!("a promise is first")
        };
        let (promised, mut new) = (self.superblock.epoch, false);
        for row in rows {
            let same = |known: &&mut KeyRow| (known.volume, known.epoch) == (row.volume, row.epoch);
            match self.key_rows.iter_mut().find(same) {
                Some(known) if known == row => continue,
                // Left of a promise that never was made: nothing was sealed with it.
                Some(known) if row.epoch > promised => *known = *row,
                Some(known) => panic!("I22: the salt of an epoch never changes: {known:?}, {row:?}"),
                None => self.key_rows.push(*row),
            }
            new = true;
        }
        new
    }

    fn write_keys(&mut self) {
        let Step::Keys { slot, file: step } = self.amendments.step else {
            unreachable!("salts are being written")
        };
        let file = FileId::Keys(slot);
        let bytes = || keys::encode_rows(&self.superblock.geometry.identity.replica, &self.key_rows);
        let io = match step {
            KeyStep::Create => {
                let len = keys::file_bytes(self.key_rows.len());
                Io::Create { file, len }
            }
            KeyStep::Write => {
                let (offset, parts) = (0, vec![bytes()]);
                Io::Write { file, offset, parts }
            }
            KeyStep::Sync => Io::Sync { file },
        };
        self.issue(io, Purpose::Amend);
    }

    /// What the superblocks say with the first amendment.
    fn amended(&self) -> Superblock {
        let mut next = self.superblock.clone();
        next.generation += 1;
        match self.amendments.waiting.front().expect("there is one") {
            Amendment::Promise { epoch, .. } => {
                next.epoch = *epoch;
                next.clean = false;
            }
            Amendment::Settle(ends) => {
                ends.iter().for_each(|row| next.settle_told(row));
                next.forget_old_ends();
            }
        }
        next
    }

    fn write_amended(&mut self) {
        let Step::Superblocks { slot, next } = &self.amendments.step else {
            unreachable!("the superblocks are being written")
        };
        let file = FileId::Superblock(*slot);
        let parts: Vec<Buf> = vec![next.encode()];
        let offset = 0;
        self.issue(Io::Write { file, offset, parts }, Purpose::AmendWrite);
    }

    /// A superblock was written; it counts when it is synced.
    pub(in super::super) fn amend_written(&mut self) {
        let Step::Superblocks { slot, .. } = &self.amendments.step else {
            unreachable!("the superblocks are being written")
        };
        let file = FileId::Superblock(*slot);
        self.issue(Io::Sync { file }, Purpose::Amend);
    }

    pub(in super::super) fn amend_done(&mut self) {
        match &mut self.amendments.step {
            Step::Keys { slot, file } => {
                match file {
                    KeyStep::Create => *file = KeyStep::Write,
                    KeyStep::Write => *file = KeyStep::Sync,
                    KeyStep::Sync if *slot == 0 => (*slot, *file) = (1, KeyStep::Create),
                    KeyStep::Sync => {
                        self.amendments.step = Step::Ready;
                        return self.run_amendments();
                    }
                }
                self.write_keys();
            }
            Step::Superblocks { slot: slot @ 0, .. } => {
                *slot = 1;
                self.write_amended();
            }
            Step::Superblocks { next, .. } => {
                self.superblock = (**next).clone();
                self.amendments.step = Step::Log;
                let done = self.amendments.waiting.pop_front().expect("it was carried out");
                self.events.push_back(match done {
                    Amendment::Promise { epoch, .. } => Event::Promised(epoch),
                    Amendment::Settle(_) => Event::Settled,
                });
                self.background_due = true;
            }
            Step::Log | Step::Ready => unreachable!("nothing of an amendment is out"),
        }
    }
}

impl Superblock {
    /// Nothing else is settled for these epochs.
    pub fn agrees_with(&self, row: &EpochEnd) -> bool {
        let same = |known: &EpochEnd| known.end == row.end || known.last < row.first || known.first > row.last;
        self.epoch_ends.iter().all(same)
    }

    /// Forgets what was settled otherwise for these epochs.
    pub fn unsettle(&mut self, row: &EpochEnd) {
        let kept = std::mem::take(&mut self.epoch_ends);
        for known in kept {
            let differs = known.end != row.end && known.last >= row.first && known.first <= row.last;
            if !differs {
                self.epoch_ends.push(known);
                continue;
            }
            if known.first < row.first {
                let last = Epoch(row.first.0 - 1);
                self.epoch_ends.push(EpochEnd { last, ..known });
            }
            if known.last > row.last {
                let first = Epoch(row.last.0 + 1);
                self.epoch_ends.push(EpochEnd { first, ..known });
            }
        }
    }

    /// Settles an end that somebody else decided, in its place. What is known of it stays.
    pub fn settle_told(&mut self, row: &EpochEnd) {
        debug_assert!(self.agrees_with(row), "the end of an epoch never changes");
        let mut first = row.first;
        let mut known: Vec<EpochEnd> = self.epoch_ends.clone();
        known.sort_by_key(|known| known.first);
        for other in known
            .iter()
            .filter(|other| other.last >= row.first && other.first <= row.last)
        {
            if other.first > first {
                let last = Epoch(other.first.0 - 1);
                self.epoch_ends.push(EpochEnd { first, last, ..*row });
            }
            first = first.max(Epoch(other.last.0 + 1));
        }
        if first <= row.last {
            self.epoch_ends.push(EpochEnd { first, ..*row });
        }
        self.epoch_ends.sort_by_key(|end| end.first);
        self.epoch_ends.dedup_by(|next, row| {
            let joins = row.end == next.end && next.end == Seq(0) && row.last.0 + 1 == next.first.0;
            if joins {
                row.last = next.last;
            }
            joins
        });
    }
}

const _: () = assert!(PAGE_BYTES == 4096, "superblocks and salts are written in whole pages");
