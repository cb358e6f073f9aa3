//! Sealed volumes: who has no key learns nothing, who changes anything is noticed, and no key meets a nonce twice.

use std::collections::BTreeMap;
use std::sync::mpsc::{Receiver, Sender, channel};

use galleonfs_storage_engine::buffer::{Buf, BufMut};
use galleonfs_storage_engine::io::{Disk, FileId};
use galleonfs_storage_engine::request::{Control, Request, RequestError};
use galleonfs_storage_engine::seal::{DataKey, KeyError, KeyId, Keyring, UsedNonce};
use galleonfs_storage_engine::store::{
    Body, Header, OpenError, OpenOptions, Seals, check::check, inspect, open_replica,
};
use galleonfs_storage_engine::types::{BLOCK_BYTES, BlockSize, Check, SECTOR_BYTES};
use galleonfs_storage_engine::volume::Volume;

use crate::clones::clone_disk;
use crate::harness::{
    DATA_KEY, IDENTITY, Model, Rig, Shape, assert_check_passes, fill, format_sealed, keyring, open, open_as, options,
    proof, segment, snapshot_id,
};
use crate::sim_disk::{Cut, Random, SimDisk};
use crate::snapshot_model::Run;

const BLOCK: usize = BLOCK_BYTES as usize;
const KEYS: [FileId; 2] = [FileId::Keys(0), FileId::Keys(1)];

/// Everything on the disk.
fn contents(disk: &SimDisk) -> BTreeMap<(FileId, u64), Vec<u8>> {
    let mut pages = BTreeMap::new();
    for file in disk.file_ids() {
        for page in disk.written_pages(file) {
            let mut bytes = vec![0; BLOCK];
            disk.clone().read(file, page * BLOCK_BYTES, &mut bytes).unwrap();
            pages.insert((file, page), bytes);
        }
    }
    pages
}

/// Writes, overwrites, zeroes, a snapshot, cleaning and checkpoints.
fn busy(rig: &mut Rig, random: &mut Random, stamp: &mut u64, size: u64) {
    let block = rig.block();
    let large = 200 * BLOCK_BYTES / block;
    for _ in 0..60 {
        let lba = random.below(size - large);
        let most = if random.chance(10) { large } else { large.min(12) };
        let blocks = 1 + random.below(most);
        rig.write(lba, blocks, *stamp).unwrap();
        *stamp += blocks;
    }
    rig.run(Request::Zero {
        offset: random.below(size / 2) * block,
        len: large / 5 * block,
        fua: false,
    })
    .unwrap();
    rig.flush().unwrap();
    rig.pass_time(20_000);
}

#[test]
fn nothing_that_a_guest_writes_lies_on_the_disk_in_the_clear() {
    let mut rig = Rig::fresh_as(2_000, true);
    let (mut random, mut stamp) = (Random(4), 1);
    busy(&mut rig, &mut random, &mut stamp, 2_000);
    rig.close();
    let mut words = std::collections::BTreeSet::new();
    for stamp in 1..stamp {
        let mut block = vec![0; BLOCK];
        fill(stamp, &mut block);
        words.extend(block[8..].chunks(8).take(64).map(<[u8]>::to_vec));
    }
    for ((file, page), bytes) in contents(&rig.disk) {
        let found = bytes.chunks(8).find(|word| words.contains(*word));
        assert_eq!(found, None, "page {page} of {file:?}");
        assert!(
            !bytes
                .windows(8)
                .any(|window| DATA_KEY.windows(8).any(|part| part == window)),
            "page {page} of {file:?}: a part of the key"
        );
    }
    assert_check_passes(&mut rig.disk);
}

#[test]
fn writes_of_every_length_come_back_whatever_room_their_tags_need() {
    let mut rig = Rig::fresh_as(3_000, true);
    let mut stamp = 1;
    for blocks in [1, 2, 100, 193, 194, 195, 196, 197, 198, 199, 200, 201, 255, 256] {
        rig.write(7, blocks, stamp).unwrap();
        let expected: Vec<u64> = (stamp..stamp + blocks).collect();
        assert_eq!(rig.read(7, blocks).unwrap(), expected, "{blocks} blocks");
        stamp += blocks;
    }
    rig.close();
    let mut disk = rig.disk;
    assert_check_passes(&mut disk);
    let (engine, _) = open(&mut disk, 2).unwrap();
    let mut rig = Rig::new(disk, engine);
    assert_eq!(rig.read(7, 256).unwrap(), (stamp - 256..stamp).collect::<Vec<_>>());
}

// ---- keys -------------------------------------------------------------------------------------------------------

fn written() -> (SimDisk, u64) {
    let mut rig = Rig::fresh_as(500, true);
    rig.write(3, 5, 100).unwrap();
    rig.flush().unwrap();
    rig.pass_time(100);
    (rig.disk.cut(Cut::All), 2)
}

fn open_with(disk: &mut SimDisk, epoch: u32, ring: Option<(&Keyring, KeyId)>) -> Result<(), OpenError> {
    let keys = ring.map(|(ring, id)| {
        let salt = proof(&keyring(), epoch).row.salt;
        ring.prove(IDENTITY.volume, options(epoch).epoch, id, salt).unwrap()
    });
    open_replica(disk, OpenOptions { keys, ..options(epoch) }).map(|_| ())
}

#[test]
fn a_wrong_or_missing_key_is_refused_before_anything_is_changed() {
    let (mut disk, epoch) = written();
    let before = contents(&disk);
    let wrong = Keyring::new(IDENTITY.volume, KeyId(1), DataKey::from_slice(&[0xa7; 32]).unwrap());
    let other = Keyring::new(IDENTITY.volume, KeyId(9), DataKey::from_slice(&DATA_KEY).unwrap());
    let cases = [
        (None, KeyError::NotGiven),
        (Some((&wrong, KeyId(1))), KeyError::Wrong(KeyId(1))),
        (Some((&other, KeyId(9))), KeyError::Missing(KeyId(1))),
    ];
    for (given, expected) in cases {
        let error = open_with(&mut disk, epoch as u32, given).unwrap_err();
        let text = format!("{error} {error:?}");
        assert!(
            matches!(error, OpenError::Key(found) if found == expected),
            "{text}, expected {expected}"
        );
        assert!(!text.contains("167") && !text.contains("a7a7"), "no key in: {text}");
        assert!(contents(&disk) == before, "{expected}: something was written");
    }
    // The epoch was not promised to any of them.
    let (engine, _) = open(&mut disk, epoch as u32).unwrap();
    assert_eq!(Rig::new(disk, engine).read(3, 5).unwrap(), [100, 101, 102, 103, 104]);
}

#[test]
fn a_key_for_a_volume_that_is_not_sealed_is_refused() {
    let mut rig = Rig::fresh(100);
    rig.close();
    let error = open_with(&mut rig.disk, 2, Some((&keyring(), KeyId(1)))).unwrap_err();
    assert!(matches!(error, OpenError::Key(KeyError::NotSealed)), "{error}");
    let store = open_replica(&mut rig.disk, options(2)).unwrap().0;
    assert!(matches!(Volume::sealed(store, keyring()), Err(KeyError::NotSealed)));
}

#[test]
fn a_new_data_key_serves_from_the_next_epoch_on_beside_the_old_one() {
    let (mut disk, epoch) = written();
    let ring = || {
        let mut ring = keyring();
        ring.add(IDENTITY.volume, KeyId(2), DataKey::from_slice(&[5; 32]).unwrap());
        ring
    };
    let salt = proof(&keyring(), epoch as u32).row.salt;
    let keys = ring()
        .prove(IDENTITY.volume, options(epoch as u32).epoch, KeyId(2), salt)
        .unwrap();
    let options = OpenOptions {
        keys: Some(keys),
        ..options(epoch as u32)
    };
    let store = open_replica(&mut disk, options).unwrap().0;
    let mut rig = Rig::new(disk, Volume::sealed(store, ring()).unwrap());
    rig.write(4, 1, 900).unwrap();
    assert_eq!(rig.read(3, 5).unwrap(), [100, 900, 102, 103, 104]);
    rig.close();
    // The old key alone does not serve any more.
    let error = open(&mut rig.disk.clone(), 3).unwrap_err();
    assert!(matches!(error, OpenError::Key(KeyError::Missing(KeyId(2)))), "{error}");
    assert_check_passes(&mut rig.disk);
}

#[test]
fn one_damaged_file_of_salts_is_repaired_and_two_are_refused() {
    for file in KEYS {
        let (mut disk, _) = written();
        disk.flip(file, 200, 3);
        assert_eq!(check(&mut disk.clone()).unwrap().problems.len(), 1, "{file:?}");
        let (engine, report) = open(&mut disk, 2).unwrap();
        assert!(report.salts_repaired.is_some(), "{file:?}");
        let mut rig = Rig::new(disk, engine);
        assert_eq!(rig.read(3, 1).unwrap(), [100]);
        rig.close();
        assert_check_passes(&mut rig.disk);
    }
    let (mut disk, _) = written();
    KEYS.iter().for_each(|file| disk.flip(*file, 200, 3));
    let error = open(&mut disk, 2).unwrap_err().to_string();
    assert!(error.contains("row 1 of the salts"), "{error}");
    assert!(check(&mut disk).unwrap().problems[0].contains("row 1 of the salts"));
    let (mut disk, _) = written();
    KEYS.iter().for_each(|file| disk.delete(*file));
    assert!(matches!(open(&mut disk, 2), Err(OpenError::Damaged(_))));
}

#[test]
fn the_salts_of_a_hundred_epochs_are_kept_and_blocks_of_all_of_them_open() {
    let mut disk = SimDisk::default();
    format_sealed(&mut disk, 500);
    for epoch in 1..=100 {
        let (engine, report) = open(&mut disk, epoch).unwrap();
        assert_eq!(report.salts_repaired, None);
        let mut rig = Rig::new(disk, engine);
        rig.write(u64::from(epoch), 1, u64::from(epoch)).unwrap();
        rig.flush().unwrap();
        disk = rig.disk.cut(Cut::None);
    }
    let (engine, _) = open(&mut disk, 101).unwrap();
    let mut rig = Rig::new(disk, engine);
    assert_eq!(rig.read(1, 100).unwrap(), (1..=100).collect::<Vec<_>>());
}

#[test]
fn a_power_cut_while_the_salts_are_written_loses_none() {
    for cut in 0..300 {
        let (disk, _) = written();
        // What an opening writes, up to the first sync, torn by chance.
        let mut dying = disk.clone();
        let mut whole = disk.clone();
        open(&mut whole, 2).unwrap();
        for file in KEYS {
            let mut bytes = BufMut::zeroed(BLOCK);
            whole.read(file, 0, bytes.as_mut()).unwrap();
            dying.write_in_flight(file, 0, &[bytes.freeze()]);
            if cut % 2 == 0 {
                break;
            }
        }
        let mut dying = dying.cut(Cut::Random(cut));
        assert_check_passes(&mut dying);
        let (engine, report) = open(&mut dying, 2).unwrap();
        assert_eq!(report.salts_repaired, None, "torn is not damaged");
        assert_eq!(Rig::new(dying, engine).read(3, 1).unwrap(), [100]);
    }
}

// ---- tampering --------------------------------------------------------------------------------------------------

/// Somebody who can write to the disk, and to whom checks are no obstacle: CRCs are made anew wherever he wants.
struct Attacker {
    disk: SimDisk,
    seals: Seals,
}

/// A record of one block in the log of a fresh replica.
#[derive(Clone)]
struct Found {
    header: Header,
    block: Buf,
}

impl Attacker {
    fn new(mut disk: SimDisk) -> Attacker {
        let seals = Seals::of(&inspect(&mut disk).unwrap().geometry);
        Attacker { disk, seals }
    }

    /// Record number `n`, each of one block.
    fn record(&mut self, n: u64) -> Found {
        let mut bytes = BufMut::zeroed(2 * BLOCK);
        let at = BLOCK_BYTES * (1 + 2 * n);
        self.disk.read(segment(0), at, bytes.as_mut()).unwrap();
        let bytes = bytes.freeze();
        let (header, _) = self.seals.decode(&bytes.as_ref()[..BLOCK]).expect("a record is there");
        let block = bytes.slice(BLOCK..2 * BLOCK);
        Found { header, block }
    }

    /// Puts records where they were, each chained to the one before it.
    fn put(&mut self, records: &[Found]) {
        let mut chain = 0;
        for (n, record) in (0..).zip(records) {
            let mut header = record.header.clone();
            header.chain = chain;
            let (bytes, check) = self.seals.encode(&header);
            chain = check;
            let at = BLOCK_BYTES * (1 + 2 * n);
            let parts = [bytes, record.block.clone()];
            self.disk.write(segment(0), at, &parts).unwrap();
        }
    }

    /// Puts `block` with its tag into the place of `record`, and makes its CRC fit there.
    fn replace(&self, record: &mut Found, block: &Found) {
        let tag = self.check_of(block).tag;
        let Body::Data {
            first_seq,
            writes,
            checks,
            ..
        } = &mut record.header.body
        else {
            panic!("a record of data")
        };
        let version = galleonfs_storage_engine::types::Version {
            epoch: record.header.epoch,
            seq: *first_seq,
        };
        let crc = self.seals.block(writes[0].lba, version, block.block.as_ref());
        checks[0] = Check { crc, tag };
        record.block = block.block.clone();
    }

    fn check_of(&self, record: &Found) -> Check {
        match &record.header.body {
            Body::Data { checks, .. } => checks[0],
            other => panic!("a record of data, not {other:?}"),
        }
    }

    fn read(self, lba: u64) -> Result<Vec<u64>, RequestError> {
        let mut disk = self.disk;
        let report = check(&mut disk.clone()).unwrap();
        assert_eq!(
            report.problems,
            Vec::<String>::new(),
            "without the key nothing is wrong with it"
        );
        let (engine, _) = open(&mut disk, 2).unwrap();
        Rig::new(disk, engine).read(lba, 1)
    }
}

/// Blocks 10 and 20, and block 10 again: three records of one block each.
fn three_writes() -> Attacker {
    let mut rig = Rig::fresh_as(500, true);
    for (lba, stamp) in [(10, 1), (20, 2), (10, 3)] {
        rig.write(lba, 1, stamp).unwrap();
        rig.flush().unwrap();
    }
    Attacker::new(rig.disk)
}

fn refused(read: Result<Vec<u64>, RequestError>) {
    match read {
        Err(RequestError::Corrupt(text)) => assert!(text.contains("its seal does not fit"), "{text}"),
        other => panic!("{other:?} of a block that was tampered with"),
    }
}

#[test]
fn a_block_that_was_swapped_with_another_is_noticed() {
    for lba in [10, 20] {
        let mut attacker = three_writes();
        let records: Vec<Found> = (0..3).map(|n| attacker.record(n)).collect();
        let mut swapped = records.clone();
        attacker.replace(&mut swapped[1], &records[2]);
        attacker.replace(&mut swapped[2], &records[1]);
        attacker.put(&swapped);
        refused(attacker.read(lba));
    }
}

#[test]
fn an_old_state_of_a_block_in_the_place_of_the_new_one_is_noticed() {
    let mut attacker = three_writes();
    let records: Vec<Found> = (0..3).map(|n| attacker.record(n)).collect();
    let mut stale = records.clone();
    attacker.replace(&mut stale[2], &records[0]);
    attacker.put(&stale);
    refused(attacker.read(10));
}

#[test]
fn a_block_under_another_address_is_noticed() {
    let mut attacker = three_writes();
    let mut records: Vec<Found> = (0..3).map(|n| attacker.record(n)).collect();
    let Body::Data { writes, .. } = &mut records[1].header.body else {
        panic!("a record of data")
    };
    writes[0].lba.0 = 21;
    let itself = records[1].clone();
    attacker.replace(&mut records[1], &itself);
    attacker.put(&records);
    refused(attacker.read(21));
}

#[test]
fn a_changed_bit_under_a_fitting_check_is_noticed() {
    let mut attacker = three_writes();
    let mut records: Vec<Found> = (0..3).map(|n| attacker.record(n)).collect();
    let mut changed = BufMut::copy_of(records[1].block.as_ref());
    changed.as_mut()[77] ^= 4;
    let changed = Found {
        block: changed.freeze(),
        ..records[1].clone()
    };
    attacker.replace(&mut records[1], &changed);
    attacker.put(&records);
    refused(attacker.read(20));
}

#[test]
fn what_was_not_touched_still_opens() {
    let mut attacker = three_writes();
    let records: Vec<Found> = (0..3).map(|n| attacker.record(n)).collect();
    attacker.put(&records);
    assert_eq!(attacker.read(10).unwrap(), [3]);
}

// ---- nonces -----------------------------------------------------------------------------------------------------

/// Collects every use of every key in a volume's life.
struct Audit {
    send: Sender<UsedNonce>,
    used: Receiver<UsedNonce>,
    seen: BTreeMap<(Vec<u8>, [u8; 12]), u64>,
}

impl Audit {
    fn new() -> Audit {
        let (send, used) = channel();
        let seen = BTreeMap::new();
        Audit { send, used, seen }
    }

    fn watch(&self, volume: &mut Volume) {
        let send = self.send.clone();
        volume
            .sealer()
            .expect("a sealed volume")
            .watch(move |used| send.send(used).expect("the audit listens"));
    }

    fn take(&mut self) {
        for used in self.used.try_iter() {
            let row = used.row;
            let mut key = row.volume.to_vec();
            key.extend(row.epoch.0.to_le_bytes());
            key.extend(row.key.0.to_le_bytes());
            key.extend(row.salt.0);
            let before = self.seen.insert((key, used.nonce), 1);
            assert_eq!(before, None, "{used:?} came twice");
        }
    }
}

/// Parts of blocks, many at a time: they are merged, wait, and are written anew.
fn partial(rig: &mut Rig, random: &mut Random, size: u64) {
    let sectors = size * rig.block() / SECTOR_BYTES;
    for _ in 0..40 {
        let (first, count) = (random.below(sectors - 64), 1 + random.below(63));
        let data = BufMut::copy_of(&vec![random.next() as u8; (count * SECTOR_BYTES) as usize]).freeze();
        rig.submit(Request::Write {
            offset: first * SECTOR_BYTES,
            data: data.slice(0..(count * SECTOR_BYTES) as usize),
            fua: random.chance(10),
        });
        if random.chance(30) {
            rig.poll();
        }
    }
    rig.settle();
}

#[test]
fn no_key_meets_a_nonce_twice_over_restarts_crashes_snapshots_reverts_and_clones() {
    for seed in 1..=4 {
        let shape = Shape {
            block_size: BlockSize::ALL[seed as usize - 1],
            sealed: true,
        };
        let size = shape.blocks(1_500);
        let mut audit = Audit::new();
        let (mut random, mut stamp, mut taken) = (Random(seed), 1, 0);
        let mut disk = SimDisk::default();
        shape.format(&mut disk, size);
        let mut epoch = 0;
        for _ in 0..12 {
            // Now and then an opening is interrupted, and its epoch is lost.
            epoch += 1 + u32::from(random.chance(30));
            let (mut engine, _) = open(&mut disk, epoch).unwrap();
            audit.watch(&mut engine);
            let mut rig = Rig::new(disk, engine);
            busy(&mut rig, &mut random, &mut stamp, size);
            partial(&mut rig, &mut random, size);
            taken += 1;
            rig.snapshot(snapshot_id(taken));
            busy(&mut rig, &mut random, &mut stamp, size);
            if random.chance(50) {
                let snapshots = rig.engine.snapshots();
                let id = snapshots[random.below(snapshots.len() as u64) as usize].id;
                rig.control(Control::Revert {
                    id,
                    discard_newer: true,
                })
                .unwrap();
                busy(&mut rig, &mut random, &mut stamp, size);
                partial(&mut rig, &mut random, size);
            }
            if taken == 6 {
                // The clone starts with epochs that its source will use, too: it has a key of its own.
                taken += 1;
                rig.snapshot(snapshot_id(taken));
                let mut source = Run::with(rig, Model::new(size), IDENTITY, epoch, seed);
                let (identity, disk, first, _) = clone_disk(&mut source, snapshot_id(taken), size, 50);
                rig = source.rig;
                let mut disk = disk;
                for epoch in first..first + 3 {
                    let (mut engine, _) = open_as(&mut disk, identity, epoch).unwrap();
                    audit.watch(&mut engine);
                    let mut clone = Rig::new(disk, engine);
                    busy(&mut clone, &mut random, &mut stamp, size);
                    partial(&mut clone, &mut random, size);
                    clone.flush().unwrap();
                    disk = clone.disk.cut(Cut::Random(random.next()));
                }
            }
            disk = match random.below(3) {
                0 => {
                    rig.close();
                    rig.disk
                }
                1 => rig.disk.kill(),
                _ => {
                    // Writes on their way are cut off, and made again under the next epoch.
                    for n in 0..20 {
                        rig.submit(rig.write_request(n, 1, stamp, false));
                        stamp += 1;
                    }
                    rig.poll();
                    rig.disk_in_flight().cut(Cut::Random(random.next()))
                }
            };
            assert_check_passes(&mut disk);
            audit.take();
        }
        println!("seed {seed}: {} uses of keys, none twice", audit.seen.len());
        assert!(audit.seen.len() > 12_000 / shape.block_size.pages() as usize);
    }
}
