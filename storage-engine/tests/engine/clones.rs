//! Clones: they read as the snapshot they were made of, and neither side can harm the other.

use galleonfs_storage_engine::io::FileId;
use galleonfs_storage_engine::request::{Control, Request};
use galleonfs_storage_engine::seal::{DataKey, KeyError, KeyId, Keyring};
use galleonfs_storage_engine::store::{
    FormatOptions, OpenError, OpenOptions, inspect, open_replica, plan_clone, write_clone, write_sealed_clone,
};
use galleonfs_storage_engine::types::{BLOCK_BYTES, BlockSize, Epoch, Identity, SnapshotId};

use crate::harness::{
    Change, DATA_KEY, IDENTITY, Model, Rig, Shape, assert_check_passes, keyring, open_as, proof_of, snapshot_id,
};
use crate::sim_disk::SimDisk;
use crate::snapshot_model::Run;

fn identity(n: u8) -> Identity {
    Identity {
        volume: [n; 16],
        replica: [n + 100; 16],
        ..IDENTITY
    }
}

fn options(size_blocks: u64, n: u8) -> FormatOptions {
    FormatOptions {
        identity: identity(n),
        block_size: BlockSize::K4,
        size_blocks,
        segment_bytes: None,
        salt: u64::from(n) * 99,
    }
}

/// Which files of two directories are one.
pub type Links = Vec<(FileId, FileId)>;

/// Clones a snapshot of a volume that is being served: whose it is, its directory, the first epoch it may be opened
/// for, and which files it shares.
pub fn clone_disk(source: &mut Run, id: SnapshotId, size_blocks: u64, n: u8) -> (Identity, SimDisk, u32, Links) {
    source.rig.control(Control::Hold { id }).unwrap();
    let plan = plan_clone(&mut source.rig.disk, id).unwrap();
    let links: Links = plan.links().collect();
    let mut disk = SimDisk::default();
    for (from, to) in &links {
        disk.link_from(&mut source.rig.disk, *from, *to);
    }
    let options = FormatOptions {
        block_size: source.rig.engine.block_size(),
        ..options(size_blocks, n)
    };
    let from = &mut source.rig.disk;
    let epoch = if inspect(from).unwrap().geometry.sealed {
        let proof = proof_of(&keyring(), options.identity.volume, 0);
        write_sealed_clone(from, &mut disk, &plan, &options, &proof)
    } else {
        write_clone(from, &mut disk, &plan, &options)
    };
    let epoch = epoch.unwrap();
    source.rig.control(Control::LetGo).unwrap();
    assert_check_passes(&mut disk);
    (options.identity, disk, epoch.0 + 1, links)
}

/// Clones a snapshot of a volume that is being served, and serves the clone.
fn clone_of(source: &mut Run, id: SnapshotId, size_blocks: u64, n: u8) -> (Run, Links) {
    let (identity, mut disk, epoch, links) = clone_disk(source, id, size_blocks, n);
    let (engine, report) = open_as(&mut disk, identity, epoch).unwrap();
    assert_eq!(report.replayed_records, 0);
    let held = source.model.snapshots.iter().find(|(other, _)| *other == id).unwrap();
    let mut model = Model::new(size_blocks);
    model.head[..held.1.len()].copy_from_slice(&held.1);
    let run = Run::with(Rig::new(disk, engine), model, identity, epoch, u64::from(n));
    (run, links)
}

fn look_again(clone: &mut Run, source: &Run, links: &Links) {
    for (from, to) in links {
        clone.rig.disk.look_again(&source.rig.disk, *from, *to);
    }
}

fn take(run: &mut Run, n: u64) -> SnapshotId {
    let id = snapshot_id(n);
    run.take(id);
    id
}

/// Overwrites everything and lets go of every snapshot, so that all segments there were can be used again.
fn renew(run: &mut Run) {
    for (id, _) in std::mem::take(&mut run.model.snapshots) {
        run.rig.control(Control::Delete { id }).unwrap();
    }
    let size = run.model.head.len() as u64;
    for round in 0..3 {
        let most = 200 * BLOCK_BYTES / run.rig.block();
        for lba in (0..size).step_by(most as usize) {
            let blocks = most.min(size - lba);
            let stamp = run.stamp;
            run.stamp += blocks;
            run.rig.write(lba, blocks, stamp).unwrap();
            run.model.apply(&Change::Write { lba, blocks, stamp });
        }
        if round > 0 {
            run.rig.pass_time(20_000);
        }
    }
}

#[test]
fn a_clone_reads_as_its_snapshot_and_both_go_their_own_way() {
    for seed in 1..=8 {
        let mut source = Run::new(seed);
        (0..200).for_each(|_| source.step());
        let id = take(&mut source, 5_000);
        (0..60).for_each(|_| source.step());
        let Some(held) = source.model.snapshots.iter().find(|(other, _)| *other == id) else {
            continue; // a run may delete it, or revert to an older one
        };
        let size = held.1.len() as u64 + [0, 1, 30_000][seed as usize % 3];
        let (mut clone, links) = clone_of(&mut source, id, size, 50);
        clone.compare();
        for _ in 0..150 {
            source.step();
            clone.step();
        }
        look_again(&mut clone, &source, &links);
        clone.compare();
        // The source uses everything anew, with and without a restart; what the clone needs stays.
        renew(&mut source);
        source.end();
        renew(&mut source);
        look_again(&mut clone, &source, &links);
        clone.compare();
        clone.end();
        clone.compare();

        // A clone of the clone has blocks of three volumes.
        let id = take(&mut clone, 6_000);
        let size = clone.model.head.len() as u64;
        let (mut second, second_links) = clone_of(&mut clone, id, size, 60);
        (0..100).for_each(|_| second.step());
        renew(&mut clone);
        look_again(&mut second, &clone, &second_links);
        second.compare();
        for run in [&mut source, &mut clone, &mut second] {
            run.compare();
            run.rig.close();
            assert_check_passes(&mut run.rig.disk);
        }
    }
}

#[test]
fn a_clone_that_needs_its_source_no_more_gives_all_links_back() {
    let mut source = Run::with(Rig::fresh(1_000), Model::new(1_000), IDENTITY, 1, 1);
    renew(&mut source);
    let id = take(&mut source, 1);
    let (mut clone, links) = clone_of(&mut source, id, 1_000, 50);
    let linked = |run: &Run| {
        let files = run.rig.disk.file_ids();
        links.iter().filter(|(_, to)| files.contains(to)).count()
    };
    assert!(linked(&clone) > 0);
    // Half of it is overwritten, the rest is moved by the cleaner or overwritten.
    let (offset, len) = (0, 500 * BLOCK_BYTES);
    clone.rig.run(Request::Zero { offset, len, fua: true }).unwrap();
    clone.model.apply(&Change::Write {
        lba: 0,
        blocks: 500,
        stamp: 0,
    });
    clone.rig.pass_time(20_000);
    clone.compare();
    renew(&mut clone);
    assert_eq!(linked(&clone), 0, "no file of the source has a name here");
    clone.end();
    clone.compare();
}

#[test]
fn a_sealed_clone_needs_the_keys_of_its_source_and_writes_under_its_own() {
    let mut source = Run::with(Rig::shaped(1_000, Shape::SEALED), Model::new(1_000), IDENTITY, 1, 1);
    renew(&mut source);
    let id = take(&mut source, 1);
    source.rig.control(Control::Hold { id }).unwrap();
    let from = &mut source.rig.disk;
    let plan = plan_clone(from, id).unwrap();
    let options = options(1_000, 50);
    let refused = |result: Result<_, OpenError>| match result {
        Err(OpenError::Key(error)) => error,
        _ => panic!("it is refused for its keys"),
    };
    assert_eq!(
        refused(write_clone(from, &mut SimDisk::default(), &plan, &options).map(|_| ())),
        KeyError::NotGiven
    );
    let key = |bytes: &[u8; 32]| DataKey::from_slice(bytes).unwrap();
    let alone = Keyring::new([50; 16], KeyId(1), key(&[50; 32]));
    let proof = proof_of(&alone, [50; 16], 0);
    assert_eq!(
        refused(write_sealed_clone(from, &mut SimDisk::default(), &plan, &options, &proof).map(|_| ())),
        KeyError::Missing(KeyId(1))
    );
    source.rig.control(Control::LetGo).unwrap();

    let (mut clone, _) = clone_of(&mut source, id, 1_000, 50);
    clone.compare();
    // What it writes opens with its own key; the cleaner moves what is the source's, and it still opens with the source's.
    for lba in (0..1_000).step_by(2) {
        let stamp = clone.stamp;
        clone.stamp += 1;
        clone.rig.write(lba, 1, stamp).unwrap();
        clone.model.apply(&Change::Write { lba, blocks: 1, stamp });
    }
    clone.rig.pass_time(20_000);
    clone.rig.pass_time(20_000);
    clone.compare();
    clone.end();
    clone.compare();
    clone.rig.close();

    // Without the source's key nothing of the clone can be served.
    let epoch = clone.epoch + 1;
    let options = OpenOptions {
        keys: Some(proof_of(&alone, [50; 16], epoch)),
        ..OpenOptions::new(identity(50), Epoch(epoch))
    };
    let refused = refused(open_replica(&mut clone.rig.disk, options).map(|_| ()));
    assert_eq!(refused, KeyError::Missing(KeyId(1)));
    let mut swapped = Keyring::new([50; 16], KeyId(1), key(&DATA_KEY));
    swapped.add(IDENTITY.volume, KeyId(1), key(&[50; 32]));
    let options = OpenOptions {
        keys: Some(proof_of(&swapped, [50; 16], epoch)),
        ..OpenOptions::new(identity(50), Epoch(epoch))
    };
    assert!(matches!(
        open_replica(&mut clone.rig.disk, options),
        Err(OpenError::Key(KeyError::Wrong(KeyId(1))))
    ));
}

#[test]
fn a_clone_that_is_sealed_and_a_source_that_is_not_do_not_go_together() {
    let mut source = Run::with(Rig::fresh(100), Model::new(100), IDENTITY, 1, 1);
    let id = take(&mut source, 1);
    source.rig.control(Control::Hold { id }).unwrap();
    let disk = &mut source.rig.disk;
    let plan = plan_clone(disk, id).unwrap();
    let proof = proof_of(&keyring(), [50; 16], 0);
    let refused = write_sealed_clone(disk, &mut SimDisk::default(), &plan, &options(100, 50), &proof);
    assert!(matches!(refused, Err(OpenError::Key(KeyError::NotSealed))));
    let large = FormatOptions {
        block_size: BlockSize::K16,
        ..options(100, 50)
    };
    match write_clone(disk, &mut SimDisk::default(), &plan, &large) {
        Err(OpenError::Invalid(text)) => assert!(text.contains("blocks of 4096 bytes"), "{text}"),
        other => panic!("a clone has its source's block size: {other:?}"),
    }
}

#[test]
fn a_clone_that_makes_no_sense_is_refused_with_the_reason() {
    let mut source = Run::with(Rig::fresh(100), Model::new(100), IDENTITY, 1, 1);
    source.rig.write(1, 1, 5).unwrap();
    let text = |result: Result<_, OpenError>| match result {
        Err(OpenError::Invalid(text)) => text,
        _ => panic!("it is refused"),
    };
    let disk = &mut source.rig.disk;
    assert!(text(plan_clone(disk, snapshot_id(9)).map(|_| ())).contains("no snapshot"));
    assert!(source.rig.control(Control::LetGo).is_err(), "nothing is held");
    assert!(source.rig.control(Control::Hold { id: snapshot_id(9) }).is_err());
    let id = take(&mut source, 1);
    source.rig.control(Control::Hold { id }).unwrap();
    let disk = &mut source.rig.disk;
    let plan = plan_clone(disk, id).unwrap();
    let mut refused =
        |options: &FormatOptions| text(write_clone(disk, &mut SimDisk::default(), &plan, options).map(|_| ()));
    assert!(refused(&options(99, 50)).contains("at least as many"));
    let same = FormatOptions {
        identity: IDENTITY,
        ..options(100, 50)
    };
    assert!(refused(&same).contains("another volume"));
    let other = FormatOptions {
        segment_bytes: Some(8 << 20),
        ..options(100, 50)
    };
    assert!(refused(&other).contains("no other length"));
}
