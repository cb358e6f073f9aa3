//! Space: a full pool damages nothing, overwriting does not grow without bound, trimming gives back.

use galleonfs_storage_engine::request::{Request, RequestError};
use galleonfs_storage_engine::types::BLOCK_BYTES;

use crate::harness::{Rig, SEGMENT_BYTES, assert_check_passes, open};
use crate::sim_disk::{Cut, Random};

#[test]
fn a_full_pool_refuses_writes_and_damages_nothing() {
    let blocks = 8_000;
    let mut rig = Rig::fresh(blocks);
    rig.disk.capacity = Some(14 * SEGMENT_BYTES);
    let mut model = vec![0; blocks as usize];
    let mut refused = 0;
    for n in 0..blocks / 8 {
        match rig.write(n * 8, 8, n * 8 + 1) {
            Ok(_) => (0..8).for_each(|i| model[(n * 8 + i) as usize] = n * 8 + 1 + i),
            Err(RequestError::NoSpace) => refused += 1,
            Err(other) => panic!("a full pool is no other error: {other}"),
        }
    }
    assert!(refused > 0, "the pool is smaller than the volume");
    assert_eq!(rig.read_all(blocks), model, "what was written before is all there");
    rig.flush().unwrap();

    // Trimming works on a full pool, and makes room by itself.
    rig.run(Request::Zero {
        offset: 0,
        len: blocks / 2 * BLOCK_BYTES,
        fua: true,
    })
    .unwrap();
    model[..blocks as usize / 2].fill(0);
    for _ in 0..20 {
        rig.pass_time(2_000);
    }
    rig.write(1, 4, 900_000).unwrap();
    (0..4).for_each(|i| model[1 + i] = 900_000 + i as u64);
    assert_eq!(rig.read_all(blocks), model);

    rig.flush().unwrap();
    let mut disk = rig.disk.cut(Cut::None);
    assert_check_passes(&mut disk);
    let (engine, _) = open(&mut disk, 2).unwrap();
    let mut rig = Rig::new(disk, engine);
    assert_eq!(rig.read_all(blocks), model, "and after a power cut");
}

#[test]
fn overwriting_for_ever_takes_bounded_space() {
    let blocks = 4_000;
    let mut rig = Rig::fresh(blocks);
    let mut random = Random(9);
    let mut model = vec![0; blocks as usize];
    let mut most = 0;
    for n in 0..12_000 {
        let lba = random.below(blocks - 4);
        rig.write(lba, 4, n * 4 + 1).unwrap();
        (0..4).for_each(|i| model[(lba + i) as usize] = n * 4 + 1 + i);
        most = most.max(rig.disk.allocated());
    }
    let volume = blocks * BLOCK_BYTES;
    assert!(
        most < volume / 4 * 5 + 24 * SEGMENT_BYTES,
        "{} segments for a volume of {}",
        most / SEGMENT_BYTES,
        volume / SEGMENT_BYTES
    );
    let stats = rig.engine.store_stats();
    assert!(stats.moved_bytes > 0, "the cleaner had to work");
    println!(
        "write amplification {:.2}",
        1.0 + (stats.moved_bytes + stats.map_bytes) as f64 / stats.written_bytes as f64
    );
    assert_eq!(rig.read_all(blocks), model);
    rig.close();
    assert_check_passes(&mut rig.disk);
}

#[test]
fn trimmed_space_goes_back_to_the_pool() {
    let blocks = 8_000;
    let mut rig = Rig::fresh(blocks);
    for n in 0..blocks / 100 {
        rig.write(n * 100, 100, n * 100 + 1).unwrap();
    }
    let full = rig.disk.allocated();
    rig.run(Request::Zero {
        offset: 0,
        len: blocks * BLOCK_BYTES,
        fua: true,
    })
    .unwrap();
    for _ in 0..6 {
        rig.pass_time(11_000);
    }
    let after = rig.disk.allocated();
    assert!(
        after < full / 2,
        "{} of {} segments are still taken",
        after / SEGMENT_BYTES,
        full / SEGMENT_BYTES
    );
}
