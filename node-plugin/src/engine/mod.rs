//! The engine driver: brings volumes up as block devices, and runs their engines on a few threads.
//!
//! ```text
//! attach: lock the replica, open it ─► frontend.open ─► a shard serves it ─► frontend.connect ─► Device
//! detach: frontend.disconnect ─► engine.close (checkpoint) ─► the shard lets go ─► frontend.close, unlock
//! lead:   read the configuration ─► a shard leads the replicas ─► they are ready ─► frontend.connect ─► Device
//! host:   lock the replica, open it ─► a shard serves it to whoever leads the volume
//! ```
//!
//! Each operation on a volume runs on a thread of its own from its first step to its last, also when whoever asked for
//! it stops waiting: a device is never left half made because a deadline passed. One operation per volume at a time;
//! another one is told to try again.

mod attached;
mod border;
mod claims;
mod clock;
mod disk_queue;
mod error;
mod files;
mod helper;
mod hosted;
mod hosting;
mod inbox;
mod leading;
mod limits;
mod memory;
mod open;
mod post;
mod reactor;
mod ring;
mod scrub;
mod served;
mod settings;
mod several;
mod shard;
mod spec;
mod stats;
#[cfg(test)]
mod tests;

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, mpsc};

use galleonfs_storage_engine::BlockEngine;
use galleonfs_storage_engine::volume::Led;
use uuid::Uuid;

use crate::disk::{FileDisk, ReplicaDir};
use crate::frontend::{Export, Frontend, FuseLoop, ring_switched_on};
use crate::transport::exchange::Exchange;
use attached::{Attached, Grant, Reservation};
use claims::Claims;
use files::FileBudget;
use hosting::Hosting;
use inbox::{Outbox, inbox};
use leading::Leading;
use open::MapBudget;
use post::Post;
use served::Closed;
use shard::{Message, NewVolume};

pub use crate::frontend::{Device, GuestPath};
pub use error::{EngineError, ErrorKind};
pub(crate) use memory::give_back_freed_memory;
pub(crate) use open::explain;
pub use post::Dial;
pub use scrub::{Finding, ScrubPlan};
pub use settings::{Settings, VolumeKey};
pub use spec::{
    Configs, HostSpec, Hosted, LeadSpec, Leader, Leaders, Leadership, LookUpDone, ProposeDone, ReadDone, Route,
};
pub use stats::{DiskPath, StoreReport, VolumeStats};

/// How the node's engine is set up.
#[derive(Clone, Debug)]
pub struct EngineConfig {
    /// Threads that serve volumes; 0 for the default.
    pub shards: usize,
    /// Memory that the maps of all volumes together may occupy.
    pub map_budget_bytes: usize,
    /// When what is stored is verified; `None` for never.
    pub scrub: Option<ScrubPlan>,
    /// FUSE mount points live below.
    pub runtime_dir: PathBuf,
    pub network: Network,
}

/// How other nodes are reached. The default reaches none: enough for volumes of one replica.
#[derive(Clone, Default)]
pub struct Network {
    pub exchange: Exchange,
    pub dial: Option<Arc<dyn Dial>>,
}

impl std::fmt::Debug for Network {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Network")
    }
}

/// Which ways requests and disk operations take.
#[derive(Clone, Copy, Debug)]
pub struct Paths {
    /// `None` takes the best there is.
    pub disk: Option<DiskPath>,
    /// [`GuestPath::Ring`] needs a ring, and a kernel that offers it; otherwise requests come through the device.
    pub guest: GuestPath,
}

impl Paths {
    /// The best that this kernel has.
    pub const BEST: Paths = Paths {
        disk: None,
        guest: GuestPath::Ring,
    };
}

/// What to attach.
#[derive(Clone, Debug)]
pub struct AttachSpec {
    /// Object name of the volume.
    pub volume: String,
    pub volume_uid: Uuid,
    pub replica_uid: Uuid,
    pub cluster_id: Uuid,
    pub replica_dir: PathBuf,
    /// The epoch that this node was made primary in.
    pub epoch: u64,
    pub size_bytes: u64,
    pub read_only: bool,
    pub settings: Settings,
    /// Of a sealed volume.
    pub key: Option<VolumeKey>,
}

/// What a shard serves: a volume's engine, and what its driver asks besides requests.
pub trait VolumeEngine: BlockEngine + Send {
    /// The size that also a power cut would leave.
    fn size_bytes(&self) -> u64;

    /// Why the engine has stopped itself, if it has.
    fn stopped(&self) -> Option<String>;

    /// True while writes wait for room in the pool.
    fn waits_for_space(&self) -> bool;

    /// What the store says of itself: its space, its work, its findings.
    fn store(&self) -> StoreReport;

    /// What the scrub found, or that it is mended, since this was asked last.
    fn finding(&mut self) -> Option<Finding>;

    /// What it stands on, if it leads several replicas: its shard brings what it says to them.
    fn led(&mut self) -> Option<&mut Led> {
        None
    }
}

/// Opens the engine of a replica; called on a thread that may block.
pub type OpenEngine = dyn Fn(&AttachSpec, FileDisk) -> Result<Box<dyn VolumeEngine>, EngineError> + Send + Sync;

/// The node's engine. Cheap to clone; the threads end with the last clone.
#[derive(Clone)]
pub struct Engine {
    inner: Arc<Inner>,
}

struct Inner {
    shards: Vec<Outbox<Message>>,
    frontend: Arc<dyn Frontend>,
    open: Box<OpenEngine>,
    volumes: Claims<String, Attached>,
    next_key: AtomicU32,
    hosting: Hosting,
}

impl std::fmt::Debug for Engine {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Engine")
            .field("shards", &self.inner.shards.len())
            .finish_non_exhaustive()
    }
}

impl Drop for Inner {
    fn drop(&mut self) {
        for shard in &self.shards {
            // One that is gone needs no telling.
            let _ = shard.send(Message::Stop);
        }
    }
}

impl Engine {
    /// Starts the shards, to serve replicas of the store.
    pub fn start(config: EngineConfig) -> Result<Engine, EngineError> {
        let budget = MapBudget::new(config.map_budget_bytes);
        let scrub = config.scrub;
        let open = {
            let budget = budget.clone();
            move |spec: &AttachSpec, disk: FileDisk| open::open_volume(spec, disk, &budget, scrub)
        };
        Engine::start_sharing(&config, budget, Box::new(open), Paths::BEST)
    }

    /// Starts the shards; `open` makes the engines.
    pub fn start_with(config: &EngineConfig, open: Box<OpenEngine>, paths: Paths) -> Result<Engine, EngineError> {
        let maps = MapBudget::new(config.map_budget_bytes);
        Engine::start_sharing(config, maps, open, paths)
    }

    fn start_sharing(
        config: &EngineConfig,
        maps: MapBudget,
        open: Box<OpenEngine>,
        mut paths: Paths,
    ) -> Result<Engine, EngineError> {
        if paths.guest == GuestPath::Ring && !ring_switched_on() {
            paths.guest = GuestPath::Device;
        }
        let count = match config.shards {
            0 => std::thread::available_parallelism()
                .map_or(1, |processors| processors.get().div_ceil(2))
                .min(limits::SHARDS_DEFAULT_MAX),
            count => count,
        };
        memory::keep_freed_memory();
        let budget = FileBudget::of_this_process();
        let mut shards = Vec::new();
        for index in 0..count {
            let (outbox, inbox) =
                inbox().map_err(|error| EngineError::os(format!("make the inbox of shard {index}"), error))?;
            let (own, budget) = (outbox.clone(), budget.clone());
            let post = Post::new(config.network.exchange.clone(), outbox.clone());
            std::thread::Builder::new()
                .name(format!("shard {index}"))
                .spawn(move || {
                    let _guard = AbortOnPanic;
                    shard::run(inbox, own, paths, budget, post);
                })
                .map_err(|error| EngineError::os(format!("start shard {index}"), error))?;
            shards.push(outbox);
        }
        // Two turns to another thread less for each message. One shard does it for all: what is for others it hands on.
        let first = shards[0].clone();
        config.network.exchange.work_at(move |work| {
            // The process ends if nobody is there.
            let _ = first.send(Message::Work(Box::new(work)));
        });
        let inner = Inner {
            shards,
            frontend: Arc::new(FuseLoop::new(&config.runtime_dir)),
            open,
            volumes: Claims::default(),
            next_key: AtomicU32::new(0),
            hosting: Hosting::new(config.network.dial.clone(), maps, config.scrub),
        };
        Ok(Engine { inner: Arc::new(inner) })
    }

    /// Brings a volume up. Attaching what is attached already gives its device again.
    pub async fn attach(&self, spec: AttachSpec) -> Result<Device, EngineError> {
        let inner = self.inner.clone();
        on_thread(format!("attach {}", spec.volume), move || inner.attach(spec)).await
    }

    /// Takes a volume down. Detaching what is not attached is fine.
    pub async fn detach(&self, volume: &str) -> Result<(), EngineError> {
        let (inner, volume) = (self.inner.clone(), volume.to_owned());
        on_thread(format!("detach {volume}"), move || inner.detach(&volume)).await
    }

    /// Makes an attached volume and its device larger. The size is never reduced.
    pub async fn grow(&self, volume: &str, size_bytes: u64) -> Result<Device, EngineError> {
        let (inner, volume) = (self.inner.clone(), volume.to_owned());
        on_thread(format!("grow {volume}"), move || inner.grow(&volume, size_bytes)).await
    }

    /// The device of an attached volume.
    pub fn device(&self, volume: &str) -> Option<Device> {
        self.attached(volume, |attached| attached.device.clone())?
    }

    /// The directory of the pool that an attached volume's replica is in.
    pub fn pool(&self, volume: &str) -> Option<PathBuf> {
        let replica_dir = self.attached(volume, |attached| attached.replica_dir.clone())??;
        // <pool>/replicas/<replica>
        Some(replica_dir.ancestors().nth(2)?.to_owned())
    }

    /// The counters of every attached volume.
    pub fn stats(&self) -> Vec<(String, VolumeStats)> {
        let volumes = &self.inner.volumes;
        volumes.list(|name, attached| (name.clone(), attached.counters.read()))
    }

    /// The counters of an attached volume.
    pub fn stats_of(&self, volume: &str) -> Option<VolumeStats> {
        self.attached(volume, |attached| attached.counters.read())
    }

    fn attached<T>(&self, volume: &str, pick: impl FnOnce(&Attached) -> T) -> Option<T> {
        self.inner.volumes.get(volume, pick)
    }

    /// What the stores of the attached volumes say of themselves. Asks the shards, which takes as long as one round of
    /// theirs.
    pub fn stores(&self) -> Vec<(String, StoreReport)> {
        let volumes = &self.inner.volumes;
        let attached = volumes.list(|name, attached| (name.clone(), attached.key, attached.shard));
        let ask = |(name, volume, shard)| {
            // One that has gone meanwhile gives no answer.
            let report = self.inner.ask(shard, |done| Message::Report { volume, done }).ok()?;
            Some((name, report))
        };
        attached.into_iter().filter_map(ask).collect()
    }

    /// Removes the mounts and devices that a dead predecessor left. To be called at start, before anything is attached;
    /// a device that is still mounted goes when it is unmounted.
    pub async fn remove_stale(runtime_dir: &Path) -> Result<(), EngineError> {
        let frontend = FuseLoop::new(runtime_dir);
        on_thread("remove stale devices".to_owned(), move || frontend.remove_stale()).await
    }
}

impl Inner {
    /// Claims a volume's name for one operation.
    fn reserve(&self, volume: &str) -> Result<Reservation<'_>, EngineError> {
        self.volumes.claim(volume.to_owned()).ok_or_else(|| {
            let text = format!("volume {volume} is being attached, detached or grown; try again");
            EngineError::new(ErrorKind::Retry, text)
        })
    }

    fn attach(&self, spec: AttachSpec) -> Result<Device, EngineError> {
        let reservation = self.reserve(&spec.volume)?;
        let grant = Grant {
            epoch: spec.epoch,
            holder: spec.replica_uid,
            read_only: spec.read_only,
        };
        if let Some(attached) = reservation.held() {
            return attached.again(&grant);
        }
        let disk = FileDisk::open(&spec.replica_dir)?;
        let dir = disk.dir();
        let engine = (self.open)(&spec, disk)?;
        let attached = self.serve(
            engine,
            Export {
                volume: spec.volume,
                // The size is the replica's.
                size_bytes: 0,
                sector_bytes: spec.settings.sector_bytes,
                read_only: spec.read_only,
            },
            grant,
            self.quietest_shard(),
            Some(dir),
            None,
        )?;
        reservation.set(Some(attached.clone()));
        self.connect(attached, &reservation)
    }

    /// Has a shard serve an engine to a session that has no device yet.
    fn serve(
        &self,
        engine: Box<dyn VolumeEngine>,
        mut export: Export,
        grant: Grant,
        shard: usize,
        dir: Option<Arc<ReplicaDir>>,
        leading: Option<Leading>,
    ) -> Result<Attached, EngineError> {
        export.size_bytes = engine.size_bytes();
        let session = self.frontend.open(&export)?;
        let key = self.next_key.fetch_add(1, Ordering::Relaxed);
        let replica_dir = dir.as_ref().map(|dir| dir.path().to_owned());
        let new = NewVolume {
            key,
            name: export.volume.clone(),
            engine,
            session,
            dir,
            leading,
        };
        let added = self
            .ask(shard, |done| Message::Add(Box::new(new), done))
            .and_then(|added| added);
        let counters = added.inspect_err(|_| self.frontend.close(&export.volume))?;
        Ok(Attached {
            key,
            shard,
            grant,
            replica_dir,
            export,
            counters,
            device: None,
        })
    }

    /// Makes the device of a volume that is served.
    fn connect(&self, attached: Attached, reservation: &Reservation<'_>) -> Result<Device, EngineError> {
        let volume = &attached.export.volume;
        match self.frontend.connect(&attached.export) {
            Ok(mut device) => {
                // Requests have come by now: the device was looked at while it was made.
                let stats = attached.counters.read();
                device.frontend = stats.guest_path.frontend();
                tracing::info!(
                    volume,
                    device = %device.path.display(),
                    frontend = device.frontend,
                    disk = ?stats.path,
                    "a volume is up"
                );
                reservation.set(Some(Attached {
                    device: Some(device.clone()),
                    ..attached
                }));
                Ok(device)
            }
            Err(error) => {
                self.clean_up(&attached, reservation);
                Err(error)
            }
        }
    }

    /// Takes down what failed to come up.
    fn clean_up(&self, attached: &Attached, reservation: &Reservation<'_>) {
        if let Err(cleanup) = self.take_down(attached, reservation) {
            tracing::warn!(volume = attached.export.volume, error = ?cleanup, "clean up after a failed attach");
        }
    }

    fn detach(&self, volume: &str) -> Result<(), EngineError> {
        let reservation = self.reserve(volume)?;
        let Some(mut attached) = reservation.held() else {
            return Ok(());
        };
        if let Some(device) = &attached.device {
            self.frontend.disconnect(&attached.export, device)?;
            attached.device = None;
            reservation.set(Some(attached.clone()));
        }
        self.take_down(&attached, &reservation)
    }

    /// Ends the engine of a volume without a device, and lets go of everything.
    fn take_down(&self, attached: &Attached, reservation: &Reservation<'_>) -> Result<(), EngineError> {
        let volume = &attached.export.volume;
        let (done, closed) = mpsc::channel();
        self.tell(
            attached.shard,
            Message::Close {
                volume: attached.key,
                done,
            },
        )?;
        match closed.recv_timeout(limits::CLOSE_WAIT_MAX) {
            Ok(Closed::Clean) => {}
            Ok(Closed::Stopped(why)) => {
                tracing::warn!(
                    volume,
                    why,
                    "the engine had stopped; what it had is recovered at the next attach"
                );
            }
            Err(_) => {
                return Err(EngineError::new(ErrorKind::Retry, attached.hangs()));
            }
        }
        // The unmount first: it ends the connection, and with it the shard's watch.
        self.frontend.close(volume);
        let threads = self.ask(attached.shard, |done| Message::Remove {
            volume: attached.key,
            done,
        })?;
        for thread in threads {
            // One that panicked has let go of the replica as well.
            let _ = thread.join();
        }
        reservation.set(None);
        Ok(())
    }

    fn grow(&self, volume: &str, size_bytes: u64) -> Result<Device, EngineError> {
        let reservation = self.reserve(volume)?;
        let found = reservation
            .held()
            .and_then(|attached| Some((attached.device.clone()?, attached)));
        let Some((device, mut attached)) = found else {
            let text = format!("grow volume {volume}: it is not attached here");
            return Err(EngineError::new(ErrorKind::NotFound, text));
        };
        let message = |done| Message::Grow {
            volume: attached.key,
            size_bytes,
            done,
        };
        let size_bytes = self.ask(attached.shard, message).and_then(|grown| grown)?;
        attached.export.size_bytes = size_bytes;
        let device = self.frontend.resize(&attached.export, &device)?;
        attached.device = Some(device.clone());
        reservation.set(Some(attached));
        Ok(device)
    }

    fn quietest_shard(&self) -> usize {
        let served = self.volumes.list(|_, attached| attached.shard);
        let load = |shard: usize| served.iter().filter(|found| **found == shard).count();
        (0..self.shards.len())
            .min_by_key(|&shard| load(shard))
            .expect("there is at least one shard")
    }

    fn tell(&self, shard: usize, message: Message) -> Result<(), EngineError> {
        self.shards[shard].send(message).map_err(|_| gone())
    }

    fn ask<T>(&self, shard: usize, message: impl FnOnce(mpsc::Sender<T>) -> Message) -> Result<T, EngineError> {
        let (done, answer) = mpsc::channel();
        self.tell(shard, message(done))?;
        answer.recv().map_err(|_| gone())
    }
}

fn gone() -> EngineError {
    EngineError::new(ErrorKind::Retry, "the engine of this node is being stopped")
}

/// A shard that panicked leaves volumes that nobody serves, which hangs every guest; a process that ends is restarted.
struct AbortOnPanic;

impl Drop for AbortOnPanic {
    fn drop(&mut self) {
        if std::thread::panicking() {
            std::process::abort();
        }
    }
}

/// Runs `work` on a thread of its own: it may block for as long as a disk or the kernel likes.
async fn on_thread<T: Send + 'static>(
    name: String,
    work: impl FnOnce() -> Result<T, EngineError> + Send + 'static,
) -> Result<T, EngineError> {
    let (done, outcome) = tokio::sync::oneshot::channel();
    let failed = |text: String| EngineError::new(ErrorKind::Failed, text);
    std::thread::Builder::new()
        .name(name.clone())
        .spawn(move || {
            // Nobody waits any more if this fails; the work is done all the same.
            let _ = done.send(work());
        })
        .map_err(|error| failed(format!("{name}: start a thread")).because(error))?;
    outcome
        .await
        .map_err(|_| failed(format!("{name}: the thread ended early")))?
}
