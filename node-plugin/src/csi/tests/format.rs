//! Only what is proven blank is formatted.

use super::*;

/// Puts bytes at the start of a volume's device, behind everybody's back.
fn scribble(bench: &Bench, volume: &str, bytes: &[u8]) -> std::path::PathBuf {
    let device = bench.node.served.device(volume).unwrap().path;
    std::fs::OpenOptions::new()
        .write(true)
        .open(&device)
        .and_then(|mut f| std::io::Write::write_all(&mut f, bytes))
        .unwrap();
    device
}

/// Notes that the volume `v` with this uid is being formatted.
async fn mark_formatting(bench: &Bench, volume_uid: &str) {
    let mark = |record: &mut crate::state::Record| {
        record.volume_uid = Some(volume_uid.into());
        record.formatting = Some(crate::mount::FsType::Ext4);
    };
    bench.node.stager.records().change("v", mark).await.unwrap();
}

#[tokio::test]
async fn what_is_on_a_device_is_never_formatted_over() {
    let bench = Bench::new();
    for (name, program) in [("xfs", "mkfs.xfs"), ("swap", "mkswap")] {
        bench.volume(name, 320 * MIB).await;
        let device = bench.node.served.device(name).unwrap().path;
        assert!(Command::new(program).arg(&device).output().unwrap().status.success());
        is(bench.stage(name, ext4()).await, Code::FailedPrecondition, name);
    }
    bench.volume("junk", 16 * MIB).await;
    let device = scribble(&bench, "junk", b"precious");
    is(
        bench.stage("junk", ext4()).await,
        Code::FailedPrecondition,
        "not formatted over",
    );
    let mut found = [0; 8];
    std::fs::File::open(&device)
        .and_then(|mut f| std::io::Read::read_exact(&mut f, &mut found))
        .unwrap();
    assert_eq!(&found, b"precious");
    assert!(bench.node.stager.records().volumes().is_empty());
    // As a raw block volume its owner can still look at it.
    bench.stage("junk", block()).await.unwrap();
}

#[tokio::test]
async fn a_format_that_was_cut_short_is_done_again() {
    let bench = Bench::new();
    bench.volume("v", 16 * MIB).await;
    scribble(&bench, "v", b"half");
    mark_formatting(&bench, "uid-v").await;
    bench.stage("v", ext4()).await.unwrap();
    assert_eq!(bench.node.stager.records().get("v").unwrap().formatting, None);
}

#[tokio::test]
async fn the_mark_of_an_earlier_volume_of_the_same_name_permits_nothing() {
    let bench = Bench::new();
    bench.volume("v", 16 * MIB).await;
    scribble(&bench, "v", b"data");
    mark_formatting(&bench, "another").await;
    is(
        bench.stage("v", ext4()).await,
        Code::FailedPrecondition,
        "not formatted over",
    );
}

#[tokio::test]
async fn a_damaged_file_system_is_refused_with_the_words_of_e2fsck() {
    let bench = Bench::new();
    bench.volume("v", 16 * MIB).await;
    bench.stage("v", ext4()).await.unwrap();
    std::fs::create_dir(Path::new(&bench.path("staging/v")).join("d")).unwrap();
    bench.unstage("v").await.unwrap();
    let device = bench.node.served.device("v").unwrap().path;
    // The root directory's inode loses its type; the superblock says that there were errors.
    for request in ["clri <2>", "ssv state 2"] {
        assert!(
            Command::new("debugfs")
                .args(["-w", "-R", request])
                .arg(&device)
                .output()
                .unwrap()
                .status
                .success()
        );
    }
    is(bench.stage("v", ext4()).await, Code::FailedPrecondition, "e2fsck");
    assert!(!bench.mounted(&bench.path("staging/v")).await);
}
