//! Whoever uses the volume: writes, zeroes, reads and flushes at random, and notes what came of it.

use std::collections::{BTreeMap, VecDeque};

use galleonfs_storage_engine::buffer::{Buf, BufMut};
use galleonfs_storage_engine::replication::Primary;
use galleonfs_storage_engine::store::{Batch, Stored, WriteEntry};
use galleonfs_storage_engine::types::{Lba, Seq, Version};

use super::backend::Backend;
use super::oracle::{Floors, Oracle, Violation};
use super::rng::Rng;
use super::store::write_id;
use super::swarm::Swarm;

/// Reads that may be under way: who waits for writes goes on reading, as guests with several programs do. A primary that is
/// cut off and does not know it yet is asked to read.
const READS_MAX: usize = 16;
/// Requests that the guest makes when the faults have stopped.
const LAST_REQUESTS: u64 = 40;

#[derive(Debug)]
struct Write {
    seq: Seq,
    blocks: Vec<(Lba, Version)>,
}

#[derive(Debug)]
struct Flush {
    upto: Version,
    covers: Floors,
}

/// What is around a guest when it thinks.
#[derive(Clone, Copy, Debug)]
pub struct Moment {
    /// Whose blocks are checked.
    pub volume: [u8; 16],
    /// Blocks of the volume.
    pub blocks: u64,
    /// The faults have stopped.
    pub calm: bool,
    pub now_us: u64,
}

/// See the module.
#[derive(Debug, Default)]
pub struct Guest {
    writes: VecDeque<(Write, Vec<Version>)>,
    flushes: Vec<Flush>,
    reads: BTreeMap<u64, (Floors, u64)>,
    next: u64,
    written: Seq,
    /// What a flush covers: the guest's own writes, and what was there when it began.
    completed: Floors,
    serving: bool,
    writes_from_us: u64,
    leaving: bool,
    /// Since the faults stopped.
    last_requests: u64,
}

impl Guest {
    /// The volume takes requests; the guest only reads at first.
    pub fn serving(&mut self, oracle: &Oracle, writes_from_us: u64) {
        self.writes_from_us = writes_from_us;
        self.serving = true;
        self.completed = oracle.completed();
    }

    /// No more requests.
    pub fn leave(&mut self) {
        self.leaving = true;
    }

    /// True while writes are under way.
    pub fn has_writes(&self) -> bool {
        !self.writes.is_empty()
    }

    fn is_writing(&self, lba: Lba) -> bool {
        let mut writes = self.writes.iter().flat_map(|(write, _)| &write.blocks);
        writes.any(|(at, _)| *at == lba)
    }

    /// True when it made its last requests and has every answer.
    pub fn is_done(&self) -> bool {
        let idle = self.writes.is_empty() && self.flushes.is_empty() && self.reads.is_empty();
        idle && self.last_requests >= LAST_REQUESTS
    }

    /// Makes a request, or none.
    pub fn think<B: Backend>(
        &mut self,
        primary: &mut Primary,
        oracle: &mut Oracle,
        rng: &mut Rng,
        swarm: &Swarm,
        moment: Moment,
    ) {
        let Moment {
            volume,
            blocks,
            calm,
            now_us,
        } = moment;
        let may_write = self.writes.len() + self.flushes.len() < swarm.writes_max;
        let may_read = self.reads.len() < READS_MAX;
        if !self.serving || self.leaving || !(may_write || may_read) || !primary.is_serving() || !primary.has_room() {
            return;
        }
        if calm {
            if self.last_requests >= LAST_REQUESTS {
                return;
            }
            self.last_requests += 1;
            if self.last_requests == 1 {
                return self.read(primary, oracle, Lba(0), blocks);
            }
        }
        if !calm && rng.ppm(swarm.quiet_ppm) {
            self.writes_from_us = now_us + rng.between(1_000_000, 8_000_000);
        }
        let chance = rng.below(100);
        let reads = chance >= swarm.flush_percent && chance < swarm.flush_percent + swarm.read_percent;
        if reads || !may_write || now_us < self.writes_from_us {
            if may_read {
                let start = rng.below(blocks);
                let count = rng.between(1, 8.min(blocks - start));
                let count = if swarm.reads_apart {
                    (start..start + count)
                        .take_while(|lba| !self.is_writing(Lba(*lba)))
                        .count() as u64
                } else {
                    count
                };
                if count > 0 {
                    self.read(primary, oracle, Lba(start), count);
                }
            }
        } else if chance < swarm.flush_percent {
            let written = Version {
                epoch: primary.epoch(),
                seq: self.written,
            };
            let covers = self.completed.clone();
            if self.written == Seq(0) || primary.durable() >= written {
                oracle.flush_completes(&covers);
                return;
            }
            self.flushes.push(Flush { upto: written, covers });
            primary.sync();
        } else {
            self.write::<B>(primary, oracle, rng, swarm, (volume, blocks));
        }
    }

    fn read(&mut self, primary: &mut Primary, oracle: &Oracle, lba: Lba, blocks: u64) {
        self.next += 1;
        self.reads.insert(self.next, (oracle.floors(lba, blocks), blocks));
        primary.read(self.next, lba, blocks);
    }

    fn write<B: Backend>(
        &mut self,
        primary: &mut Primary,
        oracle: &mut Oracle,
        rng: &mut Rng,
        swarm: &Swarm,
        (volume, blocks): ([u8; 16], u64),
    ) {
        let first_seq = primary.assigned().next();
        let (mut writes, mut checks, mut payload) = (Vec::new(), Vec::new(), Vec::new());
        let mut pending = Vec::new();
        for n in 0..rng.between(1, 3) {
            let start = rng.below(blocks);
            let zero = rng.percent(swarm.zero_percent);
            let most = if zero { blocks - start } else { 4.min(blocks - start) };
            let count = rng.between(1, most);
            let version = Version {
                epoch: primary.epoch(),
                seq: Seq(first_seq.0 + n),
            };
            writes.push(WriteEntry {
                lba: Lba(start),
                blocks: count as u32,
                zero,
            });
            let mut written = Vec::new();
            let mut floors = Vec::new();
            for lba in (start..start + count).map(Lba) {
                let id = (!zero).then(|| rng.next_u64());
                if let Some(id) = id {
                    let bytes = block(id);
                    checks.push(B::check(volume, lba, version, &bytes));
                    payload.push(bytes);
                }
                floors.push(oracle.write_begins(lba, version, id));
                written.push((lba, version));
            }
            pending.push((
                Write {
                    seq: version.seq,
                    blocks: written,
                },
                floors,
            ));
        }
        self.writes.extend(pending);
        let pages = Vec::new();
        primary.append(Batch {
            first_seq,
            writes,
            checks,
            pages,
            payload,
        });
    }

    /// Writes up to this one completed.
    pub fn written(&mut self, oracle: &mut Oracle, upto: Seq) -> Result<(), Violation> {
        self.written = self.written.max(upto);
        while let Some((write, _)) = self.writes.front()
            && write.seq <= upto
        {
            let (write, floors) = self.writes.pop_front().expect("it is there");
            for ((lba, version), floor) in write.blocks.into_iter().zip(floors) {
                oracle.write_completes(lba, version, floor)?;
                self.completed.insert(lba, version);
            }
        }
        Ok(())
    }

    /// Everything up to this write is durable.
    pub fn durable(&mut self, oracle: &mut Oracle, upto: Version) {
        let (done, waiting) = std::mem::take(&mut self.flushes)
            .into_iter()
            .partition(|flush: &Flush| flush.upto <= upto);
        self.flushes = waiting;
        let done: Vec<Flush> = done;
        done.iter().for_each(|flush| oracle.flush_completes(&flush.covers));
    }

    /// A read ended.
    pub fn read_ended(
        &mut self,
        oracle: &mut Oracle,
        token: u64,
        found: Result<Vec<Stored>, String>,
    ) -> Result<(), Violation> {
        let Some((floors, blocks)) = self.reads.remove(&token) else {
            return Err(format!("read {token} was answered, and nobody asked"));
        };
        let found = found.map_err(|why| format!("I14: a read failed although one copy is whole: {why}"))?;
        let mut seen = 0;
        for stored in found {
            match stored {
                Stored::Block(block) => {
                    let id = write_id(&block.bytes);
                    oracle.read_ends(&floors, block.lba, block.version, Some(id))?;
                    seen += 1;
                }
                Stored::Zeros { start, end, version } => {
                    for lba in (start.0..end.0).map(Lba) {
                        oracle.read_ends(&floors, lba, version, None)?;
                        seen += 1;
                    }
                }
            }
        }
        if seen == blocks {
            Ok(())
        } else {
            Err(format!("a read of {blocks} blocks brought {seen}"))
        }
    }
}

/// A block that says at both ends which write it is of.
fn block(id: u64) -> Buf {
    let mut buf = BufMut::zeroed(4096);
    let bytes = buf.as_mut();
    bytes[..8].copy_from_slice(&id.to_le_bytes());
    bytes[4088..].copy_from_slice(&id.to_le_bytes());
    buf.freeze()
}
