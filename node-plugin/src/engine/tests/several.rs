//! Volumes of several replicas: nodes with engines, real devices, real disks and real connections, in one process.

use std::collections::BTreeSet;
use std::net::TcpListener;
use std::os::unix::fs::FileExt;
use std::sync::atomic::AtomicU64;
use std::sync::{Mutex, MutexGuard, OnceLock};

use galleonfs_controller::certificates::Authority;
use galleonfs_storage_engine::buffer::BufMut;
use galleonfs_storage_engine::replication::primary::Decision;
use galleonfs_storage_engine::replication::{Change, Concern, Config, Incarnation, ReplicaId, Stamp};

use super::*;
use crate::disk::{BlockSize, FormatSpec, format_replica};
use crate::engine::spec::{
    Configs, HostSpec, LeadSpec, Leader, Leaders, Leadership, LookUpDone, ProposeDone, ReadDone, Route,
};
use crate::identity::Wallet;
use crate::transport::tests::{authority, cluster, credentials};
use crate::transport::{Transport, TransportConfig};

pub(super) const VOLUME: &str = "volume";
pub(super) const VOLUME_UID: Uuid = Uuid::from_u128(0x7001);
const SIZE: u64 = 64 * MIB;

/// The volume's object.
#[derive(Debug)]
pub(super) struct Object(Mutex<State>);

#[derive(Debug)]
pub(super) struct State {
    stamp: u64,
    pub(super) config: Config,
    /// The node that claimed the epoch.
    leader: Uuid,
    /// The API server does not answer.
    away: bool,
    seen: Vec<Config>,
    /// How often it was looked up who leads.
    pub(super) look_ups: usize,
}

impl Object {
    pub(super) fn new(replicas: impl IntoIterator<Item = ReplicaId>) -> Arc<Object> {
        Arc::new(Object(Mutex::new(State {
            stamp: 1,
            config: Config::new(replicas),
            leader: Uuid::nil(),
            away: false,
            seen: Vec::new(),
            look_ups: 0,
        })))
    }

    pub(super) fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().expect("no panic")
    }

    pub(super) fn config(&self) -> Config {
        self.state().config.clone()
    }

    /// As the registry does before it leads.
    fn claim(&self, node: Uuid) -> (u64, Uuid) {
        let incarnation = Uuid::new_v4();
        let mut state = self.state();
        state.leader = node;
        state.config = state.config.with(&Change::Claim(Incarnation(incarnation.into_bytes())));
        state.stamp += 1;
        (u64::from(state.config.epoch.0), incarnation)
    }
}

impl Configs for Object {
    fn read(&self, done: ReadDone) {
        let state = self.state();
        let found = (!state.away).then(|| (Stamp(state.stamp), state.config.clone()));
        drop(state);
        done(found);
    }

    fn propose(&self, expected: Stamp, config: Config, done: ProposeDone) {
        let mut state = self.state();
        let decision = if state.away {
            Decision::Unknown
        } else if expected == Stamp(state.stamp) {
            config.follows(&state.config).expect("the rules of the object");
            state.config = config.clone();
            state.seen.push(config);
            state.stamp += 1;
            Decision::Made(Stamp(state.stamp))
        } else {
            Decision::Conflict
        };
        drop(state);
        done(decision);
    }
}

impl Leaders for Object {
    fn look_up(&self, _: Uuid, done: LookUpDone) {
        let mut state = self.state();
        state.look_ups += 1;
        let leadership = Leadership {
            epoch: state.config.epoch,
            leader: state.config.incarnation.map(|incarnation| Leader {
                incarnation,
                name: "leader".to_owned(),
                node: Some(state.leader),
            }),
        };
        let found = (!state.away).then_some(leadership);
        drop(state);
        done(found);
    }
}

/// A node, up or down.
pub(super) struct Host {
    dir: PathBuf,
    pub(super) uid: Uuid,
    pub(super) replica: Uuid,
    wallet: Wallet,
    scrub: Option<ScrubPlan>,
    /// The volume's, once there is one.
    object: Option<Arc<Object>>,
    pub(super) up: Option<Up>,
}

pub(super) struct Up {
    pub(super) engine: Engine,
    pub(super) transport: Transport,
    pub(super) exchange: Exchange,
}

impl Host {
    fn new(authority: &Authority, number: u128, scrub: Option<ScrubPlan>) -> Host {
        let uid = Uuid::from_u128(0xA0 + number);
        let wallet = Wallet::default();
        wallet.put(credentials(authority, authority.certificate(), uid));
        let mut host = Host {
            dir: std::env::temp_dir().join(format!("galleonfs-several-{}", Uuid::new_v4())),
            uid,
            replica: Uuid::from_u128(0xB0 + number),
            wallet,
            scrub,
            object: None,
            up: None,
        };
        host.start();
        host
    }

    fn start(&mut self) {
        fs::create_dir_all(&self.dir).expect("make a directory for the test");
        let exchange = Exchange::default();
        let dial = Arc::new(OnceLock::new());
        let config = EngineConfig {
            shards: 1,
            map_budget_bytes: 32 << 20,
            scrub: self.scrub,
            runtime_dir: self.dir.join("run"),
            network: Network {
                exchange: exchange.clone(),
                dial: Some(dial.clone()),
            },
        };
        let engine = Engine::start(config).expect("start the engine");
        let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
        let config = TransportConfig::new(cluster(), self.uid);
        let transport = Transport::start(config, self.wallet.clone(), Some(listener), Arc::new(exchange.clone()))
            .expect("the transport starts");
        let transport = dial.get_or_init(|| transport).clone();
        self.up = Some(Up {
            engine,
            transport,
            exchange,
        });
    }

    /// As if the process were killed: what it handed to the kernel stays.
    pub(super) fn kill(&mut self) {
        let up = self.up.take().expect("it is up");
        up.transport.stop();
        drop(up);
    }

    pub(super) fn engine(&self) -> &Engine {
        &self.up.as_ref().expect("it is up").engine
    }

    fn replica_dir(&self) -> PathBuf {
        self.dir.join("pool/replicas").join(self.replica.to_string())
    }

    fn format(&self) {
        let format = FormatSpec {
            volume_uid: VOLUME_UID,
            replica_uid: self.replica,
            cluster_id: cluster(),
            block_size: BlockSize::default(),
            size_bytes: SIZE,
            salt: self.replica.as_u64_pair().1,
            key: None,
        };
        format_replica(&self.replica_dir(), &format).expect("format");
    }

    async fn host(&self) {
        let spec = HostSpec {
            volume: VOLUME.to_owned(),
            volume_uid: VOLUME_UID,
            replica: format!("{VOLUME}-{}", self.replica),
            replica_uid: self.replica,
            cluster_id: cluster(),
            replica_dir: self.replica_dir(),
            leaders: self.object.clone().expect("there is a volume"),
        };
        // The lock of the one that was killed is released when its last thread has ended.
        for _ in 0..200 {
            match self.engine().host(spec.clone()).await {
                Err(error) if error.kind() == ErrorKind::Retry => tokio::time::sleep(Duration::from_millis(50)).await,
                hosted => return hosted.expect("host"),
            }
        }
        panic!("the replica stays locked");
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        if self.up.is_some() {
            self.kill();
        }
        let _ = nix::mount::umount2(&self.dir.join("pool"), nix::mount::MntFlags::MNT_DETACH);
        clean_up(&self.dir);
    }
}

pub(super) struct Cluster {
    pub(super) hosts: Vec<Host>,
    pub(super) object: Arc<Object>,
    replicas: usize,
    /// So many are to be in sync.
    wanted: usize,
}

impl Cluster {
    /// So many nodes, of which the first ones have a replica.
    pub(super) async fn new(nodes: u128, replicas: usize) -> Cluster {
        Cluster::with(nodes, replicas, None, None).await
    }

    /// The same, with pools of so many bytes, and scrubbed by this plan.
    pub(super) async fn with(
        nodes: u128,
        replicas: usize,
        pool_bytes: Option<u64>,
        scrub: Option<ScrubPlan>,
    ) -> Cluster {
        let authority = authority();
        let mut hosts: Vec<Host> = (1..=nodes).map(|number| Host::new(&authority, number, scrub)).collect();
        let ids = hosts[..replicas]
            .iter()
            .map(|host| ReplicaId(host.replica.into_bytes()));
        let object = Object::new(ids);
        for host in &mut hosts {
            host.object = Some(object.clone());
        }
        for (host, bytes) in hosts.iter().zip(pool_bytes.iter().cycle()) {
            let pool = host.dir.join("pool");
            fs::create_dir_all(&pool).expect("make a directory");
            let size = format!("size={bytes}");
            run("mount", &["-t", "tmpfs", "-o", &size, "tmpfs", &text(&pool)]);
        }
        for host in &hosts[..replicas] {
            host.format();
            host.host().await;
        }
        Cluster {
            object,
            hosts,
            replicas,
            wanted: replicas,
        }
    }

    fn route(&self, leader: usize) {
        let routes = self.hosts[..self.replicas]
            .iter()
            .enumerate()
            .filter(|(index, host)| *index != leader && host.up.is_some())
            .map(|(_, host)| Route {
                replica: host.replica,
                node: host.uid,
                addresses: vec![
                    host.up
                        .as_ref()
                        .and_then(|up| up.transport.address())
                        .expect("it listens"),
                ],
            })
            .collect();
        self.hosts[leader].engine().routes(VOLUME_UID, routes);
    }

    pub(super) async fn lead(&self, leader: usize) -> Result<Device, EngineError> {
        self.lead_by(leader, &self.object).await
    }

    /// Makes a node lead by an object that may not be the volume's.
    pub(super) async fn lead_by(&self, leader: usize, object: &Arc<Object>) -> Result<Device, EngineError> {
        self.route(leader);
        let host = &self.hosts[leader];
        let (epoch, incarnation) = object.claim(host.uid);
        let spec = LeadSpec {
            volume: VOLUME.to_owned(),
            volume_uid: VOLUME_UID,
            cluster_id: cluster(),
            epoch,
            incarnation,
            size_bytes: SIZE,
            block_size: BlockSize::default(),
            read_only: false,
            settings: Settings::default(),
            replicas: self.wanted,
            concern: Concern::replicated(self.replicas.div_ceil(2)),
            prefer: (leader < self.replicas).then_some(host.replica),
            configs: object.clone(),
        };
        host.engine().lead(spec).await
    }

    pub(super) fn in_sync(&self) -> usize {
        self.object.config().in_sync.len()
    }

    /// What each replica has, asked for by leading it alone. Ends everything else.
    pub(super) async fn contents(&mut self) -> Vec<Vec<u8>> {
        let all: BTreeSet<ReplicaId> = self.object.config().in_sync;
        let mut contents = Vec::new();
        for index in 0..self.replicas {
            let id = ReplicaId(self.hosts[index].replica.into_bytes());
            if !all.contains(&id) {
                continue;
            }
            {
                let mut state = self.object.state();
                state.config.in_sync = [id].into();
                state.stamp += 1;
            }
            let device = self.lead(index).await.expect("lead one alone").path;
            contents.push(read_all(&device));
            self.hosts[index].engine().detach(VOLUME).await.expect("detach");
        }
        contents
    }
}

fn read_all(device: &Path) -> Vec<u8> {
    let file = open_direct(device);
    let mut all = BufMut::zeroed(SIZE as usize);
    for (at, part) in all.as_mut().chunks_mut(MIB as usize).enumerate() {
        file.read_exact_at(part, at as u64 * MIB).expect("read");
    }
    all.as_ref().to_vec()
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_written_through_one_node_is_there_on_every_replica_and_through_every_node() {
    let mut cluster = Cluster::new(4, 3).await;
    let device = cluster.lead(0).await.expect("lead").path;
    let mounted = Mounted::ext4(&device, cluster.hosts[0].dir.join("mnt"));
    let bytes: Vec<u8> = (0..10_000_000u32).map(|n| (n.wrapping_mul(7919) >> 8) as u8).collect();
    fs::write(mounted.0.join("data"), &bytes).expect("write");
    drop(mounted);
    cluster.hosts[0].engine().detach(VOLUME).await.expect("detach");
    assert_eq!(cluster.object.config().incarnation, None, "the epoch ended in order");
    // One with a replica, and one without.
    for leader in [1, 3] {
        let device = cluster.lead(leader).await.expect("lead").path;
        let target = cluster.hosts[leader].dir.join("mnt");
        fs::create_dir_all(&target).expect("make a mount point");
        run("mount", &[&text(&device), &text(&target)]);
        let mounted = Mounted(target);
        assert_eq!(fs::read(mounted.0.join("data")).expect("read"), bytes);
        fs::write(mounted.0.join(format!("by-{leader}")), &bytes[..100_000]).expect("write");
        drop(mounted);
        cluster.hosts[leader].engine().detach(VOLUME).await.expect("detach");
    }
    assert_eq!(cluster.in_sync(), 3);
    let contents = cluster.contents().await;
    assert!(contents.iter().all(|other| *other == contents[0]) && contents.len() == 3);
}

/// Writes blocks all over the device until it is told to stop, each with the number of the round, and remembers the last
/// one that was taken at each place.
pub(super) struct Writer {
    stop: Arc<std::sync::atomic::AtomicBool>,
    done: Arc<AtomicU64>,
    thread: std::thread::JoinHandle<Written>,
}

#[derive(Default)]
pub(super) struct Written {
    /// By block: the last time that was completed.
    times: std::collections::HashMap<u64, u64>,
    longest: Duration,
    writes: u64,
    /// What the write after these was told.
    pub(super) failed: Option<std::io::Error>,
}

const BLOCKS_WRITTEN: u64 = 2_000;

impl Writer {
    pub(super) fn start(device: &Path) -> Writer {
        let stop = Arc::new(std::sync::atomic::AtomicBool::new(false));
        let done = Arc::new(AtomicU64::new(0));
        let (stopped, counted, file) = (stop.clone(), done.clone(), open_direct(device));
        let thread = std::thread::spawn(move || {
            let mut written = Written::default();
            let mut time = 0;
            while !stopped.load(Ordering::Relaxed) {
                time += 1;
                // All over the place, and the same places again and again.
                let block = time * 7919 % BLOCKS_WRITTEN;
                let began = Instant::now();
                let mut bytes = BufMut::zeroed(4096);
                fill(bytes.as_mut(), block, time);
                let mut taken = file.write_all_at(bytes.as_ref(), block * 4096);
                if time % 64 == 0 {
                    taken = taken.and_then(|()| file.sync_data());
                }
                if let Err(error) = taken {
                    written.failed = Some(error);
                    return written;
                }
                written.longest = written.longest.max(began.elapsed());
                written.writes += 1;
                counted.store(written.writes, Ordering::Relaxed);
                written.times.insert(block, time);
            }
            written
        });
        Writer { stop, done, thread }
    }

    /// Waits until writes are completed that are begun now.
    pub(super) fn goes_on(&self) {
        let before = self.done.load(Ordering::Relaxed);
        wait_until("writes are completed", || {
            self.done.load(Ordering::Relaxed) > before + 100
        });
    }

    pub(super) fn end(self) -> Written {
        self.stop.store(true, Ordering::Relaxed);
        self.thread.join().expect("the writer does not panic")
    }
}

/// A block that tells its place and its time.
fn fill(bytes: &mut [u8], block: u64, time: u64) {
    for (n, word) in bytes.chunks_mut(8).enumerate() {
        word.copy_from_slice(&(block << 40 ^ time << 8 ^ n as u64).to_le_bytes());
    }
}

impl Written {
    /// Every block is what was written last.
    pub(super) fn assert_all_in(&self, contents: &[u8]) {
        for (block, time) in &self.times {
            let mut expected = vec![0; 4096];
            fill(&mut expected, *block, *time);
            let found = &contents[*block as usize * 4096..][..4096];
            assert!(found == expected, "block {block} is not of time {time}");
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_replica_that_dies_costs_a_pause_and_catches_up_by_what_it_missed() {
    let mut cluster = Cluster::new(3, 3).await;
    let device = cluster.lead(0).await.expect("lead").path;
    let writer = Writer::start(&device);
    let lost = ReplicaId(cluster.hosts[2].replica.into_bytes());
    writer.goes_on();
    cluster.hosts[2].kill();
    wait_until("the dead replica is out", || {
        cluster.object.config().out.contains_key(&lost)
    });
    writer.goes_on();
    cluster.hosts[2].start();
    cluster.hosts[2].host().await;
    cluster.route(0);
    wait_until("the replica is in sync again", || cluster.in_sync() == 3);
    writer.goes_on();
    let written = writer.end();
    assert!(written.failed.is_none(), "{:?}", written.failed);
    assert!(
        written.longest < Duration::from_secs(3),
        "a write took {:?}",
        written.longest
    );
    println!("{} writes, the longest took {:?}", written.writes, written.longest);
    cluster.hosts[0].engine().detach(VOLUME).await.expect("detach");
    let contents = cluster.contents().await;
    assert_eq!(contents.len(), 3);
    written.assert_all_in(&contents[0]);
    assert!(
        contents.iter().all(|other| *other == contents[0]),
        "the replicas are the same"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn an_old_leader_completes_nothing_once_another_serves() {
    let mut cluster = Cluster::new(3, 3).await;
    let old = cluster.lead(0).await.expect("lead").path;
    let writer = Writer::start(&old);
    writer.goes_on();
    let new = cluster.lead(1).await.expect("another leads").path;
    let at_takeover = read_all(&new);
    let written = writer.thread.join().expect("the writer ends by itself");
    assert!(written.failed.is_some(), "the old device fails");
    // Reads are answered, too, and not with what may be old.
    let (told, done) = mpsc::channel();
    let file = open_direct(&old);
    std::thread::spawn(move || {
        let mut bytes = BufMut::zeroed(4096);
        let _ = told.send(file.read_exact_at(bytes.as_mut(), 4096));
    });
    let read = done.recv_timeout(Duration::from_secs(10)).expect("it is answered");
    assert!(read.is_err(), "the old device reads nothing");
    // What was completed before is there, and nothing came after.
    written.assert_all_in(&at_takeover);
    assert!(read_all(&new) == at_takeover, "nothing has changed since");
    drop(cluster.hosts[0].engine().detach(VOLUME).await);
    cluster.hosts[1].engine().detach(VOLUME).await.expect("detach");
    let contents = cluster.contents().await;
    assert!(contents.iter().all(|other| *other == at_takeover));
}

#[tokio::test(flavor = "multi_thread")]
async fn without_the_api_server_guests_go_on_until_a_replica_is_lost_and_then_they_wait() {
    let mut cluster = Cluster::new(3, 3).await;
    let device = cluster.lead(0).await.expect("lead").path;
    let writer = Writer::start(&device);
    cluster.object.state().away = true;
    writer.goes_on();
    let file = open_direct(&device);
    let mut bytes = BufMut::zeroed(4096);
    fill(bytes.as_mut(), BLOCKS_WRITTEN, 1);
    file.write_all_at(bytes.as_ref(), BLOCKS_WRITTEN * 4096)
        .expect("a write without the API server");
    cluster.hosts[2].kill();
    let (told, done) = mpsc::channel();
    std::thread::spawn(move || {
        fill(bytes.as_mut(), BLOCKS_WRITTEN, 2);
        let _ = told.send(file.write_all_at(bytes.as_ref(), BLOCKS_WRITTEN * 4096));
    });
    assert!(
        done.recv_timeout(Duration::from_secs(4)).is_err(),
        "it waits to be told who is in sync"
    );
    cluster.object.state().away = false;
    done.recv_timeout(Duration::from_secs(10))
        .expect("it goes on")
        .expect("and did not fail");
    let mut written = writer.end();
    assert!(written.failed.is_none(), "{:?}", written.failed);
    written.times.insert(BLOCKS_WRITTEN, 2);
    assert_eq!(cluster.in_sync(), 2);
    written.assert_all_in(&read_all(&device));
    cluster.hosts[0].engine().detach(VOLUME).await.expect("detach");
}

#[tokio::test(flavor = "multi_thread")]
async fn below_the_minimum_guests_wait_and_reads_do_not_fail() {
    let mut cluster = Cluster::new(3, 3).await;
    let device = cluster.lead(0).await.expect("lead").path;
    let writer = Writer::start(&device);
    writer.goes_on();
    cluster.hosts[1].kill();
    cluster.hosts[2].kill();
    let before = writer.done.load(Ordering::Relaxed);
    tokio::time::sleep(Duration::from_secs(4)).await;
    // What one of them had taken before it died may be completed without the other.
    let after = writer.done.load(Ordering::Relaxed);
    assert!(after <= before + 2, "{after} writes, {before} before");
    assert!(cluster.in_sync() >= 2, "{:?}", cluster.object.config());
    for index in [1, 2] {
        cluster.hosts[index].start();
        cluster.hosts[index].host().await;
    }
    cluster.route(0);
    writer.goes_on();
    wait_until("all are in sync again", || cluster.in_sync() == 3);
    let written = writer.end();
    assert!(written.failed.is_none(), "{:?}", written.failed);
    cluster.hosts[0].engine().detach(VOLUME).await.expect("detach");
    let contents = cluster.contents().await;
    written.assert_all_in(&contents[0]);
    assert!(contents.iter().all(|other| *other == contents[0]) && contents.len() == 3);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_leader_that_dies_leaves_everything_that_it_completed() {
    let mut cluster = Cluster::new(3, 3).await;
    let device = cluster.lead(0).await.expect("lead").path;
    let writer = Writer::start(&device);
    writer.goes_on();
    let written = writer.end();
    // Its guest's device hangs without it; nothing is asked of it any more.
    cluster.hosts[0].kill();
    let device = cluster.lead(2).await.expect("lead").path;
    written.assert_all_in(&read_all(&device));
    assert_eq!(cluster.in_sync(), 2, "the replica of the dead node is out");
    cluster.hosts[0].start();
    cluster.hosts[0].host().await;
    cluster.route(2);
    wait_until("the dead node's replica is in sync again", || cluster.in_sync() == 3);
    cluster.hosts[2].engine().detach(VOLUME).await.expect("detach");
    let contents = cluster.contents().await;
    written.assert_all_in(&contents[0]);
    assert!(contents.iter().all(|other| *other == contents[0]) && contents.len() == 3);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_volume_grows_when_its_replicas_have() {
    let cluster = Cluster::new(3, 3).await;
    let device = cluster.lead(0).await.expect("lead");
    assert_eq!(device.size_bytes, SIZE);
    for host in &cluster.hosts {
        let grown = host
            .engine()
            .grow_hosted(host.replica, 2 * SIZE)
            .await
            .expect("grow the replica");
        assert_eq!(grown, 2 * SIZE);
        assert_eq!(host.engine().hosted(host.replica).expect("hosted").size_bytes, 2 * SIZE);
    }
    let device = cluster.hosts[0]
        .engine()
        .grow(VOLUME, 2 * SIZE)
        .await
        .expect("grow the device");
    assert_eq!(device.size_bytes, 2 * SIZE);
    let file = open_direct(&device.path);
    let last = 2 * SIZE / 4096 - 1;
    let mut bytes = BufMut::zeroed(4096);
    fill(bytes.as_mut(), last, 1);
    file.write_all_at(bytes.as_ref(), last * 4096)
        .expect("write behind the old end");
    let mut found = BufMut::zeroed(4096);
    file.read_exact_at(found.as_mut(), last * 4096).expect("read");
    assert!(found.as_ref() == bytes.as_ref());
    drop(file);
    cluster.hosts[0].engine().detach(VOLUME).await.expect("detach");
    for host in &cluster.hosts {
        host.engine().unhost(host.replica).await.expect("unhost");
        host.engine()
            .unhost(host.replica)
            .await
            .expect("unhosting twice is fine");
        assert!(host.engine().hosted(host.replica).is_none());
        host.host().await;
        assert_eq!(host.engine().hosted(host.replica).expect("hosted").size_bytes, 2 * SIZE);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn replicas_in_pools_that_are_nearly_full_are_cleaned_while_they_are_written_to() {
    // What placement asks for, and no more.
    let pool_bytes = SIZE + SIZE / 5 + 80 * MIB;
    let cluster = Cluster::with(3, 3, Some(pool_bytes), None).await;
    let device = cluster.lead(0).await.expect("lead").path;
    let file = open_direct(&device);
    let mut bytes = BufMut::zeroed(MIB as usize);
    for time in 1..=10 {
        for at in 0..SIZE / MIB {
            fill(bytes.as_mut(), at, time);
            file.write_all_at(bytes.as_ref(), at * MIB).expect("write");
        }
    }
    let contents = read_all(&device);
    for (at, found) in contents.chunks(MIB as usize).enumerate() {
        fill(bytes.as_mut(), at as u64, 10);
        assert!(found == bytes.as_ref(), "megabyte {at} is not what was written last");
    }
    drop(file);
    cluster.hosts[0].engine().detach(VOLUME).await.expect("detach");
}

#[tokio::test(flavor = "multi_thread")]
async fn one_that_is_to_leave_is_followed_by_another_and_writes_go_on() {
    let mut cluster = Cluster::new(4, 4).await;
    cluster.wanted = 3;
    let id = |index: usize| ReplicaId(cluster.hosts[index].replica.into_bytes());
    let (leaving, new) = (id(2), id(3));
    let rest: BTreeSet<ReplicaId> = [id(0), id(1), new].into();
    {
        let mut state = cluster.object.state();
        state.config.in_sync.remove(&new);
        state
            .config
            .out
            .insert(new, galleonfs_storage_engine::types::Version::default());
    }
    let device = cluster.lead(0).await.expect("lead").path;
    let writer = Writer::start(&device);
    writer.goes_on();
    assert!(
        !cluster.object.config().in_sync.contains(&new),
        "nobody asked for a fourth"
    );
    cluster.hosts[0]
        .engine()
        .leave(VOLUME, Some(Uuid::from_bytes(leaving.0)));
    wait_until("it has left", || cluster.object.config().in_sync == rest);
    let fewest = cluster
        .object
        .state()
        .seen
        .iter()
        .map(|config| config.in_sync.len())
        .min();
    assert_eq!(fewest, Some(3), "never fewer than are wanted");
    writer.goes_on();
    let written = writer.end();
    assert!(written.failed.is_none(), "{:?}", written.failed);
    cluster.hosts[0].engine().detach(VOLUME).await.expect("detach");
    let contents = cluster.contents().await;
    assert_eq!(contents.len(), 3);
    written.assert_all_in(&contents[0]);
    assert!(contents.iter().all(|other| *other == contents[0]));
}
