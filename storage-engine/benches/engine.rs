//! What the engine itself costs: a volume on a disk in memory that answers at once.
//!
//! `cargo bench -p galleonfs-storage-engine [-- PART-OF-A-JOB]` prints, for each job, the CPU time per request between
//! the guest and the disk: submit, poll, completed. What the disk in memory spends on copying is not in it. The checks
//! (CRC-32C of each block) are measured on their own and shown beside it, because they are bought on purpose. A machine
//! that does other work preempts us now and then: such turns are left out and counted.

#![expect(
    clippy::disallowed_methods,
    reason = "the engine has no clock, whoever measures it does"
)]

use std::time::{Duration, Instant};

use galleonfs_storage_engine::BlockEngine;
use galleonfs_storage_engine::buffer::{Buf, BufMut};
use galleonfs_storage_engine::io::{Disk, FileId, Io, IoDone, IoFailure, IoId, IoResult, Output, SegmentId, perform};
use galleonfs_storage_engine::request::{Control, Reply, Request, RequestId};
use galleonfs_storage_engine::seal::{DataKey, EpochSalt, KeyId, Keyring};
use galleonfs_storage_engine::store::{
    FormatOptions, OpenOptions, Seals, format_replica, format_sealed_replica, open_replica,
};
use galleonfs_storage_engine::types::{BLOCK_BYTES, BlockSize, Epoch, Identity, Lba, Seq, SnapshotId, Version};
use galleonfs_storage_engine::volume::Volume;

const IDENTITY: Identity = Identity {
    cluster: [1; 16],
    volume: [2; 16],
    replica: [3; 16],
};
const VOLUME_BLOCKS: u64 = 64 << 10;
/// One round: long enough that checkpoints and cleaning have their part in it.
const ROUND: Duration = Duration::from_millis(250);
/// The best of them counts: what a busy machine adds is not the engine's.
const ROUNDS: usize = 8;
/// The engine's clock, as a shard that is busy would tell it.
const TURNS_PER_MS: u64 = 32;
/// Steps of a volume's history, and blocks that each overwrites.
const STEPS: usize = 500;
const STEP_BLOCKS: u64 = 100;
/// No turn of the engine takes so long by itself.
const PREEMPTED: Duration = Duration::from_millis(2);

/// Files in memory.
#[derive(Default)]
struct MemoryDisk {
    superblocks: [Vec<u8>; 2],
    keys: [Vec<u8>; 2],
    segments: Vec<Option<Vec<u8>>>,
}

impl MemoryDisk {
    fn file(&mut self, file: FileId) -> Result<&mut Vec<u8>, IoFailure> {
        match file {
            FileId::Superblock(slot) => Some(&mut self.superblocks[usize::from(slot)]).filter(|file| !file.is_empty()),
            FileId::Keys(slot) => Some(&mut self.keys[usize::from(slot)]),
            FileId::Segment(id) => self.segments.get_mut(id.0 as usize).and_then(Option::as_mut),
        }
        .ok_or(IoFailure::NotFound)
    }
}

impl Disk for MemoryDisk {
    fn read(&mut self, file: FileId, offset: u64, buf: &mut [u8]) -> Result<(), IoFailure> {
        let from = offset as usize;
        buf.copy_from_slice(&self.file(file)?[from..from + buf.len()]);
        Ok(())
    }

    fn write(&mut self, file: FileId, offset: u64, parts: &[Buf]) -> Result<(), IoFailure> {
        let mut at = offset as usize;
        let file = self.file(file)?;
        for part in parts {
            file[at..at + part.len()].copy_from_slice(part.as_ref());
            at += part.len();
        }
        Ok(())
    }

    fn sync(&mut self, _: FileId) -> Result<(), IoFailure> {
        Ok(())
    }

    fn create(&mut self, file: FileId, len: u64) -> Result<(), IoFailure> {
        let file = match file {
            FileId::Superblock(slot) => &mut self.superblocks[usize::from(slot)],
            FileId::Keys(slot) => &mut self.keys[usize::from(slot)],
            FileId::Segment(id) => {
                let index = id.0 as usize;
                self.segments.resize(self.segments.len().max(index + 1), None);
                self.segments[index].get_or_insert_default()
            }
        };
        file.resize(len as usize, 0);
        Ok(())
    }

    fn remove(&mut self, file: FileId) -> Result<(), IoFailure> {
        if let FileId::Segment(id) = file {
            self.segments[id.0 as usize] = None;
        }
        Ok(())
    }

    fn list(&mut self) -> Result<Vec<(FileId, u64)>, IoFailure> {
        let segments = self.segments.iter().enumerate().filter_map(|(n, file)| {
            let len = file.as_ref()?.len() as u64;
            Some((FileId::Segment(SegmentId(n as u32)), len))
        });
        let keys = (0..2).map(|slot| (FileId::Keys(slot), self.keys[usize::from(slot)].len() as u64));
        Ok(segments.chain(keys).collect())
    }
}

/// SplitMix64 (Steele et al. 2014).
struct Random(u64);

impl Random {
    fn below(&mut self, end: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (z ^ (z >> 31)) % end
    }
}

struct Job {
    name: &'static str,
    blocks: u64,
    depth: usize,
    /// Of a hundred requests.
    reads: u64,
    sequential: bool,
    /// Writes are answered when they are durable.
    flush: bool,
    /// The cleaner has to keep the replica small.
    pool_tight: bool,
    sealed: bool,
    /// Before, random blocks are overwritten in [`STEPS`] steps; of `Some(true)` with a snapshot before each.
    history: Option<bool>,
    /// Disk operations that end before the engine is asked again: a busy shard finds a few each time it looks.
    completed_per_turn: usize,
}

const JOBS: [Job; 17] = [
    job("randread-4k-qd1", 1, 1, 100),
    job("randread-4k-qd32", 1, 32, 100),
    job("randwrite-4k-qd1", 1, 1, 0),
    job("randwrite-4k-qd32", 1, 32, 0),
    job("mixed-70-30-4k-qd32", 1, 32, 70),
    Job {
        sequential: true,
        ..job("seqread-1m", 256, 8, 100)
    },
    Job {
        sequential: true,
        ..job("seqwrite-1m", 256, 8, 0)
    },
    Job {
        flush: true,
        ..job("write-fua-4k-qd1", 1, 1, 0)
    },
    Job {
        pool_tight: true,
        ..job("randwrite-4k-qd32-tight", 1, 32, 0)
    },
    Job {
        history: Some(false),
        ..job("randread-4k-qd32-old", 1, 32, 100)
    },
    Job {
        history: Some(true),
        ..job("randread-4k-qd32-old-500", 1, 32, 100)
    },
    Job {
        history: Some(false),
        ..job("randwrite-4k-qd32-old", 1, 32, 0)
    },
    Job {
        history: Some(true),
        ..job("randwrite-4k-qd32-old-500", 1, 32, 0)
    },
    Job {
        sealed: true,
        ..job("sealed-randread-4k-qd32", 1, 32, 100)
    },
    Job {
        sealed: true,
        ..job("sealed-randwrite-4k-qd32", 1, 32, 0)
    },
    Job {
        sealed: true,
        sequential: true,
        // Opening a MiB takes half a millisecond: four in a turn would look like a turn that was preempted.
        completed_per_turn: 1,
        ..job("sealed-seqread-1m", 256, 8, 100)
    },
    Job {
        sealed: true,
        sequential: true,
        ..job("sealed-seqwrite-1m", 256, 8, 0)
    },
];

const fn job(name: &'static str, blocks: u64, depth: usize, reads: u64) -> Job {
    Job {
        name,
        blocks,
        depth,
        reads,
        sequential: false,
        flush: false,
        pool_tight: false,
        sealed: false,
        history: None,
        completed_per_turn: if reads == 0 { 1 } else { 4 },
    }
}

/// What a run gave.
#[derive(Default)]
struct Spent {
    requests: u64,
    blocks: u64,
    engine: Duration,
    disk_operations: u64,
    preempted: u64,
}

struct Rig {
    disk: MemoryDisk,
    engine: Volume,
    outstanding: std::collections::VecDeque<(IoId, Io)>,
    /// Payloads, shared by all writes: filling them is the guest's work.
    payload: Buf,
    random: Random,
    next_lba: u64,
    next_request: u64,
    now_ms: u64,
    pool_tight: bool,
    /// Time of the engine for each snapshot.
    snapshots: Vec<Duration>,
}

impl Rig {
    fn new(measured: &Job) -> Rig {
        let (pool_tight, sealed) = (measured.pool_tight, measured.sealed);
        let mut disk = MemoryDisk::default();
        let options = FormatOptions {
            identity: IDENTITY,
            block_size: BlockSize::default(),
            size_blocks: VOLUME_BLOCKS,
            segment_bytes: None,
            salt: 7,
        };
        let key = DataKey::from_slice(&[5; 32]).expect("it has the right length");
        let ring = Keyring::new(IDENTITY.volume, KeyId(1), key);
        let proof = |epoch| {
            let salt = EpochSalt([epoch as u8; 32]);
            let proof = ring.prove(IDENTITY.volume, Epoch(epoch), KeyId(1), salt);
            sealed.then(|| proof.expect("the key is in the ring"))
        };
        match proof(0) {
            Some(proof) => format_sealed_replica(&mut disk, &options, &proof),
            None => format_replica(&mut disk, &options),
        }
        .expect("an empty disk can be formatted");
        let options = OpenOptions {
            keys: proof(1),
            ..OpenOptions::new(IDENTITY, Epoch(1))
        };
        let (store, _) = open_replica(&mut disk, options).expect("it can be opened");
        let engine = if sealed {
            Volume::sealed(store, ring).expect("its key is in the ring")
        } else {
            Volume::new(store)
        };
        let mut payload = BufMut::zeroed(256 * BLOCK_BYTES as usize);
        payload
            .as_mut()
            .iter_mut()
            .enumerate()
            .for_each(|(n, byte)| *byte = (n * 7) as u8);
        let mut rig = Rig {
            disk,
            engine,
            outstanding: Default::default(),
            payload: payload.freeze(),
            random: Random(5),
            next_lba: 0,
            next_request: 0,
            now_ms: 0,
            pool_tight,
            snapshots: Vec::new(),
        };
        let fill = Job {
            sequential: true,
            ..job("fill", 256, 1, 0)
        };
        rig.run(&fill, |spent| spent.blocks >= VOLUME_BLOCKS);
        for step in measured
            .history
            .iter()
            .flat_map(|snapshots| (0..STEPS).map(move |step| (step, *snapshots)))
        {
            if let (step, true) = step {
                rig.take_snapshot(step);
            }
            let write = job("step", 1, 32, 0);
            rig.run(&write, |spent| spent.blocks >= STEP_BLOCKS);
        }
        rig.idle();
        rig
    }

    /// Takes a snapshot, up to the answer that no power cut can undo it.
    fn take_snapshot(&mut self, number: usize) {
        let mut id = [0; 16];
        id[..8].copy_from_slice(&(number as u64 + 1).to_le_bytes());
        let order = Control::Snapshot {
            id: SnapshotId(id),
            time_ms: self.now_ms,
        };
        self.next_request += 1;
        let (start, mut at_disk) = (Instant::now(), Duration::ZERO);
        self.engine.control(RequestId(self.next_request), order);
        loop {
            match self.engine.poll() {
                Some(Output::Io(id, io)) => {
                    let start = Instant::now();
                    let result = self.perform(io);
                    at_disk += start.elapsed();
                    self.engine.completed(id, result);
                }
                Some(Output::Answer(_, answer)) => {
                    answer.expect("the disk is large and never fails");
                    break;
                }
                None => self.engine.tick(self.now_ms),
            }
        }
        self.snapshots.push(start.elapsed() - at_disk);
        self.settle();
    }

    /// Lets time pass until the engine has nothing left to do: reads then go through the map on the disk.
    fn idle(&mut self) {
        for _ in 0..2 {
            self.now_ms += 20_000;
            self.engine.tick(self.now_ms);
            self.settle();
        }
    }

    fn perform(&mut self, io: Io) -> IoResult {
        let create = matches!(io, Io::Create { .. });
        let done = perform(&mut self.disk, io)?;
        let pool_free_bytes = if self.pool_tight { 0 } else { 1 << 50 };
        Ok(if create {
            IoDone::Created { pool_free_bytes }
        } else {
            done
        })
    }

    fn settle(&mut self) {
        loop {
            while let Some(output) = self.engine.poll() {
                if let Output::Io(id, io) = output {
                    self.outstanding.push_back((id, io));
                }
            }
            match self.outstanding.pop_front() {
                Some((id, io)) => {
                    let result = self.perform(io);
                    self.engine.completed(id, result);
                }
                None if self.engine.next_tick_ms().is_some_and(|due| due <= self.now_ms) => {
                    self.engine.tick(self.now_ms);
                }
                None => return,
            }
        }
    }

    fn request(&mut self, job: &Job) -> Request {
        let len = job.blocks * BLOCK_BYTES;
        let lba = if job.sequential {
            let lba = self.next_lba;
            self.next_lba = (lba + job.blocks) % VOLUME_BLOCKS;
            lba
        } else {
            self.random.below(VOLUME_BLOCKS / job.blocks) * job.blocks
        };
        let offset = lba * BLOCK_BYTES;
        if self.random.below(100) < job.reads {
            return Request::Read { offset, len };
        }
        let data = self.payload.slice(0..len as usize);
        Request::Write {
            offset,
            data,
            fua: job.flush,
        }
    }

    /// Keeps `job.depth` requests with the engine until `done`.
    fn run(&mut self, job: &Job, done: impl Fn(&Spent) -> bool) -> Spent {
        let mut spent = Spent::default();
        let mut requests: Vec<Request> = Vec::new();
        let (mut answered, mut turns) = (job.depth, 0u64);
        let mut ended: Vec<(IoId, IoResult)> = Vec::new();
        let mut read: Vec<Reply> = Vec::new();
        while !done(&spent) {
            requests.extend((0..answered).map(|_| self.request(job)));
            let before = answered as u64;
            answered = 0;
            let start = Instant::now();
            self.engine.tick(self.now_ms);
            for (id, result) in ended.drain(..) {
                self.engine.completed(id, result);
            }
            for request in requests.drain(..) {
                self.next_request += 1;
                self.engine.submit(RequestId(self.next_request), request);
            }
            while let Some(output) = self.engine.poll() {
                match output {
                    Output::Io(id, io) => self.outstanding.push_back((id, io)),
                    Output::Answer(_, answer) => {
                        answered += 1;
                        read.push(answer.expect("the disk is large and never fails"));
                    }
                }
            }
            read.clear();
            let took = start.elapsed();
            if took < PREEMPTED {
                spent.engine += took;
                spent.requests += before;
                spent.blocks += before * job.blocks;
            } else {
                spent.preempted += 1;
            }
            for _ in 0..job.completed_per_turn {
                let Some((id, io)) = self.outstanding.pop_front() else {
                    break;
                };
                spent.disk_operations += 1;
                ended.push((id, self.perform(io)));
            }
            turns += 1;
            self.now_ms += u64::from(turns % TURNS_PER_MS == 0);
        }
        for (id, result) in ended {
            self.engine.completed(id, result);
        }
        self.settle();
        spent
    }
}

/// Nanoseconds that the check of one block takes.
fn check_ns() -> f64 {
    let seals = Seals::new(&IDENTITY, 7);
    let blocks: Vec<u8> = (0..64 * BLOCK_BYTES as usize).map(|n| (n * 7) as u8).collect();
    let version = Version {
        epoch: Epoch(1),
        seq: Seq(1),
    };
    let mut best = f64::MAX;
    for _ in 0..20 {
        let (start, mut checks) = (Instant::now(), 0);
        for n in 0..50 {
            for (lba, block) in blocks.chunks(BLOCK_BYTES as usize).enumerate() {
                checks ^= seals.block(Lba(lba as u64 + n), version, block);
            }
        }
        std::hint::black_box(checks);
        best = best.min(start.elapsed().as_nanos() as f64 / (50 * 64) as f64);
    }
    best
}

fn main() {
    let only = std::env::args()
        .skip(1)
        .find(|argument| !argument.starts_with('-'))
        .unwrap_or_default();
    let check = check_ns();
    println!(
        "one check of a block: {check:.0} ns, {:.1} GB/s\n",
        BLOCK_BYTES as f64 / check
    );
    println!(
        "{:<26} {:>10} {:>12} {:>14} {:>12} {:>10}",
        "job", "requests", "ns/request", "beside checks", "disk ops/req", "preempted"
    );
    for job in JOBS.iter().filter(|job| job.name.contains(&only)) {
        let mut best: Option<(f64, Spent)> = None;
        let mut rig = Rig::new(job);
        for _ in 0..ROUNDS {
            let spent = rig.run(job, |spent| spent.engine >= ROUND);
            let each = spent.engine.as_nanos() as f64 / spent.requests as f64;
            if best.as_ref().is_none_or(|(least, _)| each < *least) {
                best = Some((each, spent));
            }
        }
        rig.snapshots.sort();
        if let (Some(middle), Some(last)) = (rig.snapshots.get(STEPS / 2), rig.snapshots.last()) {
            println!("{STEPS} snapshots, each {middle:.1?} of the engine's time, at most {last:.1?}:");
        }
        let (each, spent) = best.expect("there is at least one round");
        println!(
            "{:<26} {:>10} {:>12.0} {:>14.0} {:>12.2} {:>10}",
            job.name,
            spent.requests,
            each,
            each - check * job.blocks as f64,
            spent.disk_operations as f64 / spent.requests as f64,
            spent.preempted
        );
    }
}
