//! The end of a checkpoint: sync, the superblocks one after the other, and then everybody sees the new trees.

use std::collections::BTreeSet;

use super::super::{Event, Purpose, Store};
use super::Phase;
use crate::io::{FileId, Io, SegmentId};

impl Store {
    /// Once the pages are written and the log is durable up to the freeze: sync, then the superblocks.
    pub(in super::super) fn maybe_sync_checkpoint(&mut self) {
        if matches!(&self.job, Some(job) if matches!(job.phase, Phase::Sync { outstanding: 0 })) {
            return self.begin_superblocks();
        }
        let Some(job) = self.job.as_mut() else { return };
        if !matches!(job.phase, Phase::Table) || job.next.is_none() || job.out.writes_out > 0 {
            return;
        }
        let frozen = self.frozen.as_ref().expect("a checkpoint has a frozen table");
        if self.log.synced < frozen.written {
            return;
        }
        if !self.is_kept(frozen.highest) {
            // Others may still decide that some of it never happened. At the end nobody waits for them: the log has it.
            if self.closing {
                let job = self.job.take().expect("it is there");
                self.abandon(*job);
            }
            return;
        }
        let job = self.job.as_mut().expect("it is there");
        let files: BTreeSet<SegmentId> = job.out.dirty.iter().chain(&frozen.moved_dirty).copied().collect();
        job.phase = Phase::Sync {
            outstanding: files.len(),
        };
        for segment in files {
            self.issue(
                Io::Sync {
                    file: FileId::Segment(segment),
                },
                Purpose::CheckpointSync,
            );
        }
    }

    pub(in super::super) fn checkpoint_synced(&mut self) {
        let job = self.job.as_mut().expect("a sync belongs to a checkpoint");
        let Phase::Sync { outstanding } = &mut job.phase else {
            unreachable!("syncs end in the sync phase")
        };
        *outstanding -= 1;
        if *outstanding == 0 {
            self.begin_superblocks();
        }
    }

    /// Writes the superblocks, once nobody else does.
    fn begin_superblocks(&mut self) {
        if self.amendments.is_writing() {
            return;
        }
        let job = self.job.as_mut().expect("superblocks belong to a checkpoint");
        job.phase = Phase::Superblocks;
        // What was promised or settled since the tables were written.
        let now = &self.superblock;
        let next = job.next.as_mut().expect("it was made before the sync");
        (next.generation, next.epoch) = (now.generation + 1, now.epoch);
        next.epoch_ends.clone_from(&now.epoch_ends);
        next.forget_ends_before_replay();
        self.write_superblock(0);
    }

    /// A checkpoint is writing the superblocks.
    pub(in super::super) fn is_writing_superblocks(&self) -> bool {
        self.job
            .as_ref()
            .is_some_and(|job| matches!(job.phase, Phase::Superblocks))
    }

    fn write_superblock(&mut self, slot: u8) {
        let job = self.job.as_ref().expect("superblocks belong to a checkpoint");
        let bytes = job.next.as_ref().expect("it was made before the sync").encode();
        let io = Io::Write {
            file: FileId::Superblock(slot),
            offset: 0,
            parts: vec![bytes],
        };
        self.issue(io, Purpose::Superblock { slot, synced: false });
    }

    pub(in super::super) fn superblock_done(&mut self, slot: u8, synced: bool) {
        match (slot, synced) {
            (slot, false) => {
                self.issue(
                    Io::Sync {
                        file: FileId::Superblock(slot),
                    },
                    Purpose::Superblock { slot, synced: true },
                );
            }
            (0, true) => self.write_superblock(1),
            (_, true) => self.commit(),
        }
    }

    /// From here on everybody sees the new trees. What is in proportion to the checkpoint is left to [`Store::wind_up`].
    fn commit(&mut self) {
        let mut job = self.job.take().expect("a commit belongs to a checkpoint");
        let frozen = self.frozen.take().expect("a checkpoint has a frozen table");
        let meta_before = self.superblock.checkpoint.meta.map(|at| at.segment);
        self.superblock = job.next.take().expect("it was written");
        self.superblock_table_pages = std::mem::take(&mut job.table_pages);
        self.map.root = job.head.root;
        self.map.height = job.head.height;
        self.recent.catalog.committed(frozen.position.last, &job.catalog);
        let meta_open = job.out.meta.map(|at| at.segment);
        for id in meta_before.into_iter().chain(job.out.taken.iter().copied()) {
            if Some(id) != meta_open {
                self.segments.close(id);
            }
        }
        if job.revert.is_some() {
            self.recent.revert = None;
            self.events.push_back(Event::Reverted);
        }
        self.report_holds();
        if let Some(size) = self.grow_to.filter(|size| *size <= self.size_blocks()) {
            self.grow_to = None;
            self.events.push_back(Event::Grown(size));
        } else if self.grow_to.is_some() {
            self.checkpoint_wanted = true;
        }
        self.stats.checkpoints += 1;
        self.begin_winding_up(&mut job, frozen);
        self.job = Some(job);
        self.background_due = true;
    }
}
