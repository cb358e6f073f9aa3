use std::process::Stdio;

use super::*;

const DIR: &str = "GALLEONFS_TEST_STALE_DIR";

/// Runs in a process of its own, which the test below kills.
#[tokio::test(flavor = "multi_thread")]
#[ignore = "the victim of a_successor_removes_what_a_killed_process_left"]
async fn a_process_that_serves_until_it_is_killed() {
    let dir = PathBuf::from(std::env::var_os(DIR).expect("started by the other test"));
    let node = Node::at(dir.clone(), 1, Paths::BEST);
    let idle = node.attach("ram-idle", 16 * MIB).await;
    let busy = node.attach("ram-busy", 16 * MIB).await;
    fs::write(dir.join("devices.new"), format!("{}\n{}", text(&idle), text(&busy))).expect("tell the devices");
    fs::rename(dir.join("devices.new"), dir.join("devices")).expect("tell the devices");
    std::future::pending::<()>().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_successor_removes_what_a_killed_process_left() {
    let dir = std::env::temp_dir().join(format!("galleonfs-node-{}", Uuid::new_v4()));
    fs::create_dir_all(&dir).expect("make a directory for the test");
    let mut victim = Command::new(std::env::current_exe().expect("a test has a program"))
        .args([
            "--ignored",
            "--exact",
            "engine::tests::stale::a_process_that_serves_until_it_is_killed",
        ])
        .env(DIR, &dir)
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .expect("start the victim");
    wait_until("the victim serves", || dir.join("devices").exists());
    let devices = fs::read_to_string(dir.join("devices")).expect("read");
    let (idle, busy) = devices.split_once('\n').expect("two devices");
    let backing = |device: &str| {
        let name = device.strip_prefix("/dev/").expect("a device");
        fs::read_to_string(format!("/sys/block/{name}/loop/backing_file")).ok()
    };

    // Another node on this kernel looks while the victim lives: nothing of it may go.
    Engine::remove_stale(&dir.join("run")).await.expect("look");
    assert!(backing(idle).is_some() && backing(busy).is_some());

    let user = File::open(busy).expect("open");
    victim.kill().expect("kill");
    victim.wait().expect("wait");
    Engine::remove_stale(&dir.join("run")).await.expect("remove");
    wait_until("the idle device is gone", || backing(idle).is_none());
    assert_eq!(
        run("findmnt", &["-rn", "-o", "TARGET"])
            .lines()
            .filter(|line| line.starts_with(&text(&dir)))
            .count(),
        0
    );
    drop(user);
    wait_until("the busy device went with its user", || backing(busy).is_none());

    let node = Node::at(dir, 1, Paths::BEST);
    let device = node.attach("ram-idle", 16 * MIB).await;
    run("blkdiscard", &[&text(&device)]);
    node.engine.detach("ram-idle").await.expect("detach");
}
