use galleonfs_storage_engine::io::SegmentId;

use super::*;

/// A directory of its own, gone when dropped.
struct Scratch(PathBuf);

impl Scratch {
    fn new() -> Scratch {
        let path = std::env::temp_dir().join(format!("galleonfs-disk-{}", uuid::Uuid::new_v4()));
        fs::create_dir_all(&path).expect("make a scratch directory");
        Scratch(path)
    }

    fn replica(&self) -> PathBuf {
        let dir = self.0.join("replicas/one");
        make_replica_dir(&dir, |_| Ok(())).expect("make a replica directory");
        dir
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

const SEGMENT: FileId = FileId::Segment(SegmentId(7));

#[test]
fn what_is_written_in_parts_is_read_back() {
    let scratch = Scratch::new();
    let mut disk = FileDisk::open(&scratch.replica()).expect("open");
    disk.create(SEGMENT, 1 << 20).expect("create");
    let parts: Vec<Buf> = (0..1500u32).map(|n| BufMut::copy_of(&[n as u8; 64]).freeze()).collect();
    disk.create(SEGMENT, 8 << 20)
        .expect("a file that is there is made longer");
    disk.write(SEGMENT, 8192, &parts)
        .expect("more parts than one call takes");
    disk.sync(SEGMENT).expect("sync");
    let mut unaligned = vec![0; 4096 + 1];
    disk.read(SEGMENT, 8192 + 1499 * 4096, &mut unaligned[1..])
        .expect("a read into any memory");
    assert_eq!(unaligned[1..65], [1499u32 as u8; 64]);
    assert_eq!(disk.list().expect("list"), vec![(SEGMENT, 8 << 20)]);
}

#[test]
fn creating_a_file_that_exists_keeps_what_it_holds() {
    let scratch = Scratch::new();
    let mut disk = FileDisk::open(&scratch.replica()).expect("open");
    disk.create(SEGMENT, 4096).expect("create");
    disk.write(SEGMENT, 0, &[BufMut::copy_of(b"kept").freeze()])
        .expect("write");
    disk.create(SEGMENT, 8192).expect("create again");
    let mut page = BufMut::zeroed(4096);
    disk.read(SEGMENT, 0, page.as_mut()).expect("read");
    assert_eq!(&page.as_ref()[..4], b"kept");
}

/// A file system of two megabytes, so that a full disk needs no patience. Needs root, as mounting does.
struct SmallDisk(Scratch);

impl SmallDisk {
    fn new() -> SmallDisk {
        let scratch = Scratch::new();
        let options = Some("size=2m");
        nix::mount::mount(
            Some("tmpfs"),
            &scratch.0,
            Some("tmpfs"),
            nix::mount::MsFlags::empty(),
            options,
        )
        .expect("mount a tmpfs");
        SmallDisk(scratch)
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        let _ = nix::mount::umount2(&self.0.0, nix::mount::MntFlags::MNT_DETACH);
    }
}

#[test]
fn a_file_that_does_not_fit_is_not_left_behind() {
    let small = SmallDisk::new();
    let mut disk = FileDisk::open(&small.0.replica()).expect("open");
    assert!(matches!(disk.create(SEGMENT, 4 << 20), Err(IoFailure::NoSpace)));
    assert_eq!(disk.list().expect("list"), vec![]);
    disk.create(SEGMENT, 4096).expect("a small one fits");
    assert!(matches!(disk.create(SEGMENT, 4 << 20), Err(IoFailure::NoSpace)));
    assert_eq!(
        disk.list().expect("list"),
        vec![(SEGMENT, 4096)],
        "and keeps its length when it cannot grow"
    );
}

#[test]
fn reading_past_the_end_fails_and_a_missing_file_is_told_apart() {
    let scratch = Scratch::new();
    let mut disk = FileDisk::open(&scratch.replica()).expect("open");
    let mut page = BufMut::zeroed(4096);
    assert!(matches!(disk.read(SEGMENT, 0, page.as_mut()), Err(IoFailure::NotFound)));
    disk.create(SEGMENT, 4096).expect("create");
    assert!(matches!(
        disk.read(SEGMENT, 4096, page.as_mut()),
        Err(IoFailure::Failed(_))
    ));
}

#[test]
fn a_replica_is_opened_by_one_only() {
    let scratch = Scratch::new();
    let dir = scratch.replica();
    let first = FileDisk::open(&dir).expect("open");
    assert_eq!(FileDisk::open(&dir).expect_err("locked").kind(), ErrorKind::Retry);
    assert_eq!(remove_replica(&dir).expect_err("locked").kind(), ErrorKind::Retry);
    drop(first);
    drop(FileDisk::open(&dir).expect("free again"));
    assert_eq!(
        FileDisk::open(&dir.join("absent")).expect_err("absent").kind(),
        ErrorKind::NotFound
    );
}

#[test]
fn a_replica_that_could_not_be_filled_leaves_nothing() {
    let scratch = Scratch::new();
    let dir = scratch.0.join("replicas/two");
    let error = make_replica_dir(&dir, |_| Err(EngineError::new(ErrorKind::NoSpace, "full"))).expect_err("full");
    assert_eq!(error.kind(), ErrorKind::NoSpace);
    assert_eq!(fs::read_dir(scratch.0.join("replicas")).expect("list").count(), 0);
}

#[test]
fn removing_a_replica_twice_is_fine_and_leftovers_are_swept() {
    let scratch = Scratch::new();
    let dir = scratch.replica();
    assert!(used_bytes(&dir).is_ok());
    remove_replica(&dir).expect("remove");
    remove_replica(&dir).expect("remove again");
    let replicas = scratch.0.join("replicas");
    fs::create_dir_all(replicas.join(".trash-x/segments")).expect("leftover");
    fs::create_dir_all(replicas.join(".new-y")).expect("leftover");
    sweep_leftovers(&replicas).expect("sweep");
    assert_eq!(fs::read_dir(&replicas).expect("list").count(), 0);
}

#[test]
fn what_is_free_in_a_pool_is_what_is_available_without_what_it_leaves_free() {
    assert_eq!(free_bytes(1000, 300), 250);
    assert_eq!(free_bytes(1000, 49), 0);
    // Of a large disk it leaves ten gigabytes.
    assert_eq!(free_bytes(4 << 40, 30 << 30), 20 << 30);
}

#[test]
fn a_replica_counts_on_what_placement_sets_aside_for_it() {
    use galleonfs_api::size::{GIB, MIB, TIB, reserved_bytes};
    for size in [16 * MIB, 17 * MIB, GIB, 3 * GIB + MIB, 100 * GIB, 16 * TIB] {
        let counted_on = galleonfs_storage_engine::store::promised_bytes(size as u64);
        assert_eq!(counted_on, reserved_bytes(size) as u64, "of {size} bytes");
    }
}
