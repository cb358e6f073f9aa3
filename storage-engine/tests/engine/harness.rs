//! A guest, an engine and a disk in one thread, with every choice drawn from a seed.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};

use galleonfs_storage_engine::BlockEngine;
use galleonfs_storage_engine::buffer::BufMut;
use galleonfs_storage_engine::compress::Codec;
use galleonfs_storage_engine::io::{Disk, FileId, Io, IoDone, IoId, Output, perform};
use galleonfs_storage_engine::request::{Answer, Control, Piece, Reply, Request, RequestError, RequestId, Scan};
use galleonfs_storage_engine::seal::{DataKey, EpochSalt, KeyId, KeyProof, Keyring};
use galleonfs_storage_engine::store::{
    FormatOptions, OpenError, OpenOptions, OpenReport, format_replica, format_sealed_replica, inspect, open_replica,
};
use galleonfs_storage_engine::types::{BLOCK_BYTES, BlockSize, Epoch, Identity, SnapshotId};
use galleonfs_storage_engine::volume::{Volume, WhenFull};

use crate::sim_disk::{Random, SimDisk};

pub const IDENTITY: Identity = Identity {
    cluster: [1; 16],
    volume: [2; 16],
    replica: [3; 16],
};
/// Small segments, so that a short run fills several.
pub const SEGMENT_BYTES: u64 = (1 << 20) + 64 * 1024;

/// What a volume is like. Whether its blocks are compressed follows from the epoch: see [`codec_of`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Shape {
    pub block_size: BlockSize,
    pub sealed: bool,
}

impl Shape {
    pub const PLAIN: Shape = Shape {
        block_size: BlockSize::K4,
        sealed: false,
    };
    pub const SEALED: Shape = Shape {
        sealed: true,
        ..Shape::PLAIN
    };

    /// Of every four seeds in a row two are plain volumes, and of every eight one has blocks of each size; every third is
    /// sealed.
    pub fn of(seed: u64) -> Shape {
        let block_size = match seed % 8 {
            2 => BlockSize::K16,
            4 => BlockSize::K64,
            5 => BlockSize::K8,
            6 => BlockSize::K16,
            _ => BlockSize::K4,
        };
        Shape {
            block_size,
            sealed: seed.is_multiple_of(3),
        }
    }

    /// How many blocks it has where one of 4 KiB each would have so many: about as many bytes, and some blocks in any case.
    pub fn blocks(self, of_4_kib: u64) -> u64 {
        (of_4_kib / u64::from(self.block_size.pages())).max(40)
    }

    /// At most as many blocks as a write may have.
    pub fn most(self, of_4_kib: u64) -> u64 {
        (of_4_kib / u64::from(self.block_size.pages())).max(1)
    }

    pub fn format(self, disk: &mut SimDisk, size_blocks: u64) {
        let options = FormatOptions {
            block_size: self.block_size,
            ..format_options(size_blocks)
        };
        let done = if self.sealed {
            format_sealed_replica(disk, &options, &proof(&keyring(), 0))
        } else {
            format_replica(disk, &options)
        };
        done.expect("an empty disk can be formatted");
    }
}

/// Volumes change their codec with every start.
fn codec_of(epoch: u32) -> Option<Codec> {
    match epoch % 3 {
        0 => None,
        1 => Some(Codec::Lz4),
        _ => Some(Codec::Zstd),
    }
}

fn format_options(size_blocks: u64) -> FormatOptions {
    FormatOptions {
        identity: IDENTITY,
        block_size: BlockSize::K4,
        size_blocks,
        segment_bytes: Some(SEGMENT_BYTES),
        salt: 0x5a17,
    }
}

pub fn format(disk: &mut SimDisk, size_blocks: u64) {
    Shape::PLAIN.format(disk, size_blocks);
}

pub fn format_sealed(disk: &mut SimDisk, size_blocks: u64) {
    Shape::SEALED.format(disk, size_blocks);
}

/// The bytes of the data key of every sealed volume here.
pub const DATA_KEY: [u8; 32] = *b"a key that no one but a test has";

/// With the keys of the clones that tests make, too: each has its own.
pub fn keyring() -> Keyring {
    let key = |bytes: &[u8]| DataKey::from_slice(bytes).expect("it has the right length");
    let mut ring = Keyring::new(IDENTITY.volume, KeyId(1), key(&DATA_KEY));
    for clone in [50, 60, 70] {
        ring.add([clone; 16], KeyId(1), key(&[clone; 32]));
    }
    ring
}

/// That the key is at hand, with a salt that was never drawn before.
pub fn proof(ring: &Keyring, epoch: u32) -> KeyProof {
    proof_of(ring, IDENTITY.volume, epoch)
}

pub fn proof_of(ring: &Keyring, volume: [u8; 16], epoch: u32) -> KeyProof {
    static DRAWN: AtomicU64 = AtomicU64::new(1);
    let mut random = Random(DRAWN.fetch_add(1, Ordering::Relaxed) << 32);
    let mut salt = [0; 32];
    salt.chunks_mut(8)
        .for_each(|word| word.copy_from_slice(&random.next().to_le_bytes()));
    ring.prove(volume, Epoch(epoch), KeyId(1), EpochSalt(salt))
        .expect("the key is in the ring")
}

/// Small limits, so that a short run makes checkpoints.
pub fn options(epoch: u32) -> OpenOptions {
    OpenOptions {
        memtable_rows_max: 60,
        tail_segments_max: 2,
        cache_pages_max: 64,
        ..OpenOptions::new(IDENTITY, Epoch(epoch))
    }
}

pub fn open(disk: &mut SimDisk, epoch: u32) -> Result<(Volume, OpenReport), OpenError> {
    open_as(disk, IDENTITY, epoch)
}

pub fn open_as(disk: &mut SimDisk, identity: Identity, epoch: u32) -> Result<(Volume, OpenReport), OpenError> {
    let options = OpenOptions {
        identity,
        ..options(epoch)
    };
    // A write that waits for ever would look like one that was lost.
    let refuse = |volume: Volume| {
        volume
            .when_full(WhenFull::RefuseAfter { ms: 0 })
            .compression(codec_of(epoch))
    };
    if !inspect(disk).is_ok_and(|superblock| superblock.geometry.sealed) {
        return open_replica(disk, options).map(|(store, report)| (refuse(Volume::new(store)), report));
    }
    let ring = keyring();
    let options = OpenOptions {
        keys: Some(proof_of(&ring, identity.volume, epoch)),
        ..options
    };
    let (store, report) = open_replica(disk, options)?;
    let volume = Volume::sealed(store, ring).expect("the replica took the key");
    Ok((refuse(volume), report))
}

/// What the guest wrote into a block: 0 for zeros, else a number that no other write used.
pub type Stamp = u64;

/// Noise. Blocks of several pages are noise up to some place in them, and one word over and over behind it: what they
/// are compressed to is anything between a page and all of them.
pub fn fill(stamp: Stamp, block: &mut [u8]) {
    let mut random = Random(stamp);
    let noisy = match block.len() / BLOCK_BYTES as usize {
        0 | 1 => block.len(),
        pages => (random.below(pages as u64 + 1) as usize * BLOCK_BYTES as usize).max(8),
    };
    let (noise, rest) = block.split_at_mut(noisy);
    for word in noise.chunks_mut(8) {
        word.copy_from_slice(&random.next().to_le_bytes());
    }
    let again = random.next().to_le_bytes();
    rest.chunks_mut(8).for_each(|word| word.copy_from_slice(&again));
    block[..8].copy_from_slice(&stamp.to_le_bytes());
}

/// Reads the stamp back, and makes sure that the whole block is what was written with it.
pub fn stamp_of(block: &[u8]) -> Result<Stamp, String> {
    if block.iter().all(|byte| *byte == 0) {
        return Ok(0);
    }
    let stamp = u64::from_le_bytes(block[..8].try_into().unwrap());
    let mut expected = vec![0; block.len()];
    fill(stamp, &mut expected);
    if expected == block {
        Ok(stamp)
    } else {
        Err(format!("bytes that nobody wrote (stamp {stamp:x})"))
    }
}

/// One change that the guest made, in the order in which the engine numbered them.
#[derive(Clone, Copy, Debug)]
pub enum Change {
    Write {
        lba: u64,
        blocks: u64,
        /// Stamp of the first block, the next has one more; 0 for zeroes.
        stamp: Stamp,
    },
    Snapshot(SnapshotId),
    Delete(SnapshotId),
    Revert(SnapshotId),
}

/// What the volume and its snapshots hold.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Model {
    pub head: Vec<Stamp>,
    /// Oldest first.
    pub snapshots: Vec<(SnapshotId, Vec<Stamp>)>,
}

impl Model {
    pub fn new(size_blocks: u64) -> Model {
        Model {
            head: vec![0; size_blocks as usize],
            snapshots: Vec::new(),
        }
    }

    pub fn apply(&mut self, change: &Change) {
        match *change {
            Change::Write { lba, blocks, stamp } => {
                for n in 0..blocks {
                    self.head[(lba + n) as usize] = if stamp == 0 { 0 } else { stamp + n };
                }
            }
            Change::Snapshot(id) => self.snapshots.push((id, self.head.clone())),
            Change::Delete(id) => self.snapshots.retain(|(other, _)| *other != id),
            Change::Revert(id) => {
                let index = self.index(id);
                self.snapshots.truncate(index + 1);
                // A volume never shrinks: what came behind the snapshot's end reads as zeros.
                let size = self.head.len();
                self.head = self.snapshots[index].1.clone();
                self.head.resize(size, 0);
            }
        }
    }

    fn index(&self, id: SnapshotId) -> usize {
        let found = self.snapshots.iter().position(|(other, _)| *other == id);
        found.expect("the model knows the snapshot")
    }

    /// After these changes.
    pub fn after(mut self, changes: &[Change]) -> Model {
        changes.iter().for_each(|change| self.apply(change));
        self
    }

    /// A snapshot by chance.
    pub fn pick(&self, random: &mut Random) -> Option<SnapshotId> {
        let count = self.snapshots.len() as u64;
        (count > 0).then(|| self.snapshots[random.below(count) as usize].0)
    }
}

/// The name of the nth snapshot.
pub fn snapshot_id(n: u64) -> SnapshotId {
    let mut id = [0xaa; 16];
    id[..8].copy_from_slice(&n.to_le_bytes());
    SnapshotId(id)
}

/// The pool that a replica stands in, as its driver sees it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pool {
    /// Nothing is free beyond what was promised.
    Tight,
    /// More is free than anybody wants.
    Roomy,
    /// So many bytes are there for this replica, those that it has included.
    Of(u64),
}

impl Pool {
    /// What is free while the replica has so many bytes.
    pub fn free_bytes(self, allocated: u64) -> u64 {
        match self {
            Pool::Tight => 0,
            Pool::Roomy => 1 << 50,
            Pool::Of(bytes) => bytes.saturating_sub(allocated),
        }
    }
}

/// An engine with a guest in front and a disk behind it.
pub struct Rig {
    pub disk: SimDisk,
    pub engine: Volume,
    pub outstanding: Vec<(IoId, Io)>,
    pub answers: BTreeMap<RequestId, Answer>,
    pub now_ms: u64,
    pub pool: Pool,
    /// Files that were made since the start.
    pub created: u64,
    next_request: u64,
}

impl Rig {
    pub fn new(disk: SimDisk, engine: Volume) -> Rig {
        Rig {
            disk,
            engine,
            outstanding: Vec::new(),
            answers: BTreeMap::new(),
            now_ms: 0,
            pool: Pool::Tight,
            created: 0,
            next_request: 1,
        }
    }

    pub fn fresh(size_blocks: u64) -> Rig {
        Rig::fresh_as(size_blocks, false)
    }

    pub fn fresh_as(size_blocks: u64, sealed: bool) -> Rig {
        Rig::shaped(size_blocks, if sealed { Shape::SEALED } else { Shape::PLAIN })
    }

    pub fn shaped(size_blocks: u64, shape: Shape) -> Rig {
        let mut disk = SimDisk::default();
        shape.format(&mut disk, size_blocks);
        let (engine, _) = open(&mut disk, 1).unwrap();
        Rig::new(disk, engine)
    }

    /// Bytes in a block.
    pub fn block(&self) -> u64 {
        self.engine.block_size().bytes()
    }

    pub fn submit(&mut self, request: Request) -> RequestId {
        let id = RequestId(self.next_request);
        self.next_request += 1;
        self.engine.submit(id, request);
        id
    }

    pub fn order(&mut self, control: Control) -> RequestId {
        let id = RequestId(self.next_request);
        self.next_request += 1;
        self.engine.control(id, control);
        id
    }

    /// Takes everything the engine has to say.
    pub fn poll(&mut self) {
        while let Some(output) = self.engine.poll() {
            match output {
                Output::Io(id, io) => self.outstanding.push((id, io)),
                Output::Answer(id, answer) => {
                    assert!(self.answers.insert(id, answer).is_none(), "a request is answered once");
                }
            }
        }
    }

    pub fn complete(&mut self, index: usize) {
        let (id, io) = self.outstanding.swap_remove(index);
        let made = matches!(io, Io::Create { .. });
        let mut result = perform(&mut self.disk, io);
        if made && result.is_ok() {
            self.created += 1;
            result = Ok(IoDone::Created {
                pool_free_bytes: self.pool.free_bytes(self.disk.allocated()),
            });
        }
        self.engine.completed(id, result);
    }

    /// Runs until nothing is left to do without the clock.
    pub fn settle(&mut self) {
        loop {
            self.poll();
            if !self.outstanding.is_empty() {
                self.complete(0);
            } else if self.engine.next_tick_ms().is_some_and(|at| at <= self.now_ms) {
                self.engine.tick(self.now_ms);
            } else {
                return;
            }
        }
    }

    pub fn pass_time(&mut self, ms: u64) {
        self.now_ms += ms;
        self.engine.tick(self.now_ms);
        self.settle();
    }

    pub fn run(&mut self, request: Request) -> Answer {
        let id = self.submit(request);
        self.settle();
        let answer = self.answers.remove(&id);
        answer.unwrap_or_else(|| panic!("every request is answered: {:?}", self.engine))
    }

    /// Like [`Rig::run`], and gives a full pool time to win space back.
    pub fn run_patiently(&mut self, request: Request) -> Answer {
        let id = self.submit(request);
        self.settle();
        for _ in 0..30 {
            if let Some(answer) = self.answers.remove(&id) {
                return answer;
            }
            self.pass_time(1_100);
        }
        panic!("a request hangs");
    }

    pub fn write(&mut self, lba: u64, blocks: u64, stamp: Stamp) -> Answer {
        self.run(self.write_request(lba, blocks, stamp, false))
    }

    pub fn write_request(&self, lba: u64, blocks: u64, stamp: Stamp, fua: bool) -> Request {
        write_request_of(self.block(), lba, blocks, stamp, fua)
    }

    pub fn flush(&mut self) -> Answer {
        self.run(Request::Flush)
    }

    pub fn read(&mut self, lba: u64, blocks: u64) -> Result<Vec<Stamp>, RequestError> {
        let block = self.block();
        match self.run(Request::Read {
            offset: lba * block,
            len: blocks * block,
        })? {
            Reply::Data(pieces) => Ok(stamps(block, &pieces)),
            Reply::Done => panic!("a read gives data"),
        }
    }

    pub fn control(&mut self, control: Control) -> Answer {
        let id = self.order(control);
        self.settle();
        let answer = self.answers.remove(&id);
        answer.unwrap_or_else(|| panic!("every order is answered: {:?}", self.engine))
    }

    pub fn snapshot(&mut self, id: SnapshotId) {
        self.control(Control::Snapshot { id, time_ms: 7 }).unwrap();
    }

    pub fn read_at(&mut self, id: SnapshotId, lba: u64, blocks: u64) -> Result<Vec<Stamp>, RequestError> {
        let block = self.block();
        match self.control(Control::Read {
            id,
            offset: lba * block,
            len: blocks * block,
        })? {
            Reply::Data(pieces) => Ok(stamps(block, &pieces)),
            Reply::Done => panic!("a read gives data"),
        }
    }

    /// A whole list, asked for in pieces; true for each block in it.
    pub fn list(&mut self, scan: Scan, ranges_max: usize) -> Vec<bool> {
        let block = self.block();
        let blocks = (self.engine.size_bytes() / block) as usize;
        let (mut listed, mut offset) = (vec![false; blocks], 0);
        loop {
            let id = self.order(Control::List {
                scan,
                offset,
                ranges_max,
            });
            self.settle();
            self.answers.remove(&id).expect("every order is answered").unwrap();
            let found = self.engine.take_ranges(id).expect("a list is there");
            assert!(found.ranges.len() <= ranges_max);
            let mut end = offset;
            for range in found.ranges {
                assert!(
                    range.start >= end && range.end > range.start,
                    "in order: {range:?} after {end}"
                );
                end = range.end;
                listed[(range.start / block) as usize..(end / block) as usize].fill(true);
            }
            match found.next {
                Some(next) => {
                    assert!(next >= end && next > offset, "it goes on");
                    offset = next;
                }
                None => return listed,
            }
        }
    }

    /// Everything that can be read.
    pub fn view(&mut self) -> Model {
        let block = self.block();
        let size_blocks = self.engine.size_bytes() / block;
        let head = self.read_all(size_blocks);
        let held = self.engine.snapshots().into_iter();
        let snapshots = held.map(|held| {
            let blocks = held.size_bytes / block;
            let mut all = Vec::new();
            for lba in (0..blocks).step_by(256) {
                all.extend(self.read_at(held.id, lba, 256.min(blocks - lba)).unwrap());
            }
            (held.id, all)
        });
        let snapshots = snapshots.collect();
        Model { head, snapshots }
    }

    pub fn read_all(&mut self, size_blocks: u64) -> Vec<Stamp> {
        let mut all = Vec::new();
        for lba in (0..size_blocks).step_by(256) {
            all.extend(self.read(lba, 256.min(size_blocks - lba)).unwrap());
        }
        all
    }

    pub fn close(&mut self) {
        self.engine.close();
        self.settle();
        assert!(self.engine.is_closed(), "closing comes to an end");
    }

    /// The disk as it is with the operations that are out counted as on their way.
    pub fn disk_in_flight(&self) -> SimDisk {
        let mut disk = self.disk.clone();
        for (_, io) in &self.outstanding {
            if let Io::Write { file, offset, parts } = io {
                disk.write_in_flight(*file, *offset, parts);
            }
        }
        disk
    }
}

pub fn stamps(block: u64, pieces: &[Piece]) -> Vec<Stamp> {
    let mut stamps = Vec::new();
    for piece in pieces {
        match piece {
            Piece::Zeros(len) => stamps.extend(vec![0; len / block as usize]),
            Piece::Bytes(bytes) => {
                let blocks = bytes.as_ref().chunks(block as usize);
                stamps.extend(blocks.map(|block| stamp_of(block).expect("a read returns only what was written")));
            }
        }
    }
    stamps
}

pub fn write_request(lba: u64, blocks: u64, stamp: Stamp, fua: bool) -> Request {
    write_request_of(BLOCK_BYTES, lba, blocks, stamp, fua)
}

fn write_request_of(block_bytes: u64, lba: u64, blocks: u64, stamp: Stamp, fua: bool) -> Request {
    let mut data = BufMut::zeroed((blocks * block_bytes) as usize);
    for (n, block) in data.as_mut().chunks_mut(block_bytes as usize).enumerate() {
        fill(stamp + n as u64, block);
    }
    Request::Write {
        offset: lba * block_bytes,
        data: data.freeze(),
        fua,
    }
}

/// Verifies a disk with the offline checker.
pub fn assert_check_passes(disk: &mut SimDisk) {
    let report = galleonfs_storage_engine::store::check::check(disk as &mut dyn Disk).expect("the replica can be read");
    assert_eq!(report.problems, Vec::<String>::new());
}

pub fn segment(n: u32) -> FileId {
    FileId::Segment(galleonfs_storage_engine::io::SegmentId(n))
}
