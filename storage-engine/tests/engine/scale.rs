//! A large map costs what is looked at, not what is there. The figures for 100 million blocks are in `benches/map.rs`.

use crate::driven::Driven;
use crate::synthetic::Synthetic;

/// 4 million of these are mapped.
const SIZE_BLOCKS: u64 = 10_700_000;

#[test]
fn opening_a_large_map_reads_the_list_of_segments_and_not_the_map() {
    let disk = Synthetic::new(SIZE_BLOCKS);
    assert!(disk.mapped_blocks() > 4_000_000 && disk.map_pages() > 60_000);
    let (mut driven, report) = Driven::open(disk, 2);
    assert_eq!(report.replayed_records, 0);
    let opened = driven.disk.reads;
    assert!(opened < 60, "{opened} reads to open it");
    // A leaf each, and the few pages above them once.
    driven.look_up(20_000);
    let each = (driven.disk.reads - opened) as f64 / 20_000.0;
    assert!(each < 1.1, "{each} reads for a lookup");
    assert!(
        driven.engine.store_stats().cached_pages <= 4_096,
        "memory stays in its budget"
    );

    driven.write(60_000);
    let Driven { mut disk, engine, .. } = driven;
    drop(engine); // nobody closed it
    (disk.reads, disk.read_bytes) = (0, 0);
    let (driven, report) = Driven::open(disk, 3);
    assert!(report.replayed_records >= 60_000 / 32, "{report:?}");
    let tail = 60_000 * 4096 / 32 * 33;
    let read = driven.disk.read_bytes;
    assert!(read < tail / 10 * 22, "{read} bytes read for a tail of {tail}");
}
