//! A simple engine that works: sparse files behind loop devices. For tests, and for running the CSI services alone.

use std::collections::HashMap;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Mutex, PoisonError};

use futures::FutureExt;
use futures::future::BoxFuture;
use galleonfs_storage_engine::replication::primary::Decision;
use galleonfs_storage_engine::replication::{Change, Incarnation};

use super::{AttachSpec, Device, FormatSpec, NodeEngine, ReplicaDisks, Trouble, VolumeMetrics};
use crate::engine::{EngineError, ErrorKind, HostSpec, Hosted, LeadSpec, Route, StoreReport};
use uuid::Uuid;

/// One sparse file per volume, in its replica directory, behind a loop device of the kernel's.
#[derive(Debug, Default)]
pub struct FakeEngine {
    /// Each with the file behind it.
    devices: Mutex<HashMap<String, (Device, File)>>,
    /// What the next attach of a volume fails with.
    failures: Mutex<HashMap<String, String>>,
    attached: Mutex<Vec<AttachSpec>>,
    troubles: Mutex<HashMap<String, Trouble>>,
    led: Mutex<Vec<LeadSpec>>,
    /// Those whose epoch is still to be ended.
    leading: Mutex<HashMap<String, LeadSpec>>,
    /// As long as it is locked, nobody gets ready to be led.
    readiness: tokio::sync::Mutex<()>,
    hosted: Mutex<HashMap<Uuid, (HostSpec, Hosted)>>,
    /// What opening a replica fails with.
    host_failures: Mutex<HashMap<Uuid, String>>,
    routes: Mutex<HashMap<Uuid, Vec<Route>>>,
    looks: Mutex<Vec<String>>,
    leaving: Mutex<Vec<(String, Option<Uuid>)>>,
    damage: Mutex<HashMap<String, u64>>,
}

impl FakeEngine {
    /// Lets every attach of `volume` fail with `why`, until `None` is set.
    pub fn fail_attach(&self, volume: &str, why: Option<&str>) {
        let mut failures = self.failures.lock().unwrap_or_else(PoisonError::into_inner);
        match why {
            Some(why) => drop(failures.insert(volume.to_owned(), why.to_owned())),
            None => drop(failures.remove(volume)),
        }
    }

    /// Lets the engine tell of trouble with a volume.
    pub fn tell_trouble(&self, volume: &str, trouble: Option<Trouble>) {
        let mut troubles = self.troubles.lock().unwrap_or_else(PoisonError::into_inner);
        match trouble {
            Some(trouble) => troubles.insert(volume.to_owned(), trouble),
            None => troubles.remove(volume),
        };
    }

    /// Every attach that was asked for, in order.
    pub fn attached(&self) -> Vec<AttachSpec> {
        self.attached.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Every volume of several replicas that was to be led, in order.
    pub fn led(&self) -> Vec<LeadSpec> {
        self.led.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Where the replicas of a volume are said to be.
    pub fn routes_of(&self, volume_uid: Uuid) -> Vec<Route> {
        let routes = self.routes.lock().unwrap_or_else(PoisonError::into_inner);
        routes.get(&volume_uid).cloned().unwrap_or_default()
    }

    /// The volumes whose configurations were to be looked at, in order.
    pub fn looks(&self) -> Vec<String> {
        self.looks.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Which replicas were to leave, in order.
    pub fn leaving(&self) -> Vec<(String, Option<Uuid>)> {
        self.leaving.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Lets the store of this name have found so many damaged places.
    pub fn damage(&self, store: &str, places: u64) {
        let mut damage = self.damage.lock().unwrap_or_else(PoisonError::into_inner);
        damage.insert(store.to_owned(), places);
    }

    /// Lets nobody get ready to be led until what is returned is dropped.
    pub async fn hold_leading(&self) -> tokio::sync::MutexGuard<'_, ()> {
        self.readiness.lock().await
    }

    /// Lets opening a replica fail with `why`, until `None` is set.
    pub fn fail_host(&self, replica: Uuid, why: Option<&str>) {
        let mut failures = self.host_failures.lock().unwrap_or_else(PoisonError::into_inner);
        match why {
            Some(why) => drop(failures.insert(replica, why.to_owned())),
            None => drop(failures.remove(&replica)),
        }
    }

    /// Lets a hosted replica take no more writes.
    pub fn stop_hosted(&self, replica: Uuid, why: &str) {
        let mut all = self.hosted.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((_, hosted)) = all.get_mut(&replica) {
            hosted.stopped = Some(why.to_owned());
        }
    }

    fn host_now(&self, spec: HostSpec) -> Result<(), EngineError> {
        let failures = self.host_failures.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(why) = failures.get(&spec.replica_uid) {
            return Err(EngineError::new(ErrorKind::Failed, why));
        }
        let file = spec.replica_dir.join("size");
        let size = std::fs::read_to_string(&file)
            .map_err(|error| EngineError::os(format!("read {}", file.display()), error))?;
        let hosted = Hosted {
            size_bytes: size.parse().expect("we have written it"),
            stopped: None,
        };
        let mut all = self.hosted.lock().unwrap_or_else(PoisonError::into_inner);
        all.entry(spec.replica_uid).or_insert((spec, hosted));
        Ok(())
    }

    fn led_now(&self, volume: &str) -> Option<LeadSpec> {
        let leading = self.leading.lock().unwrap_or_else(PoisonError::into_inner);
        leading.get(volume).cloned()
    }

    /// Ends the epoch of a volume that is led, in its object.
    async fn release(&self, volume: &str) -> Result<(), EngineError> {
        let Some(spec) = self.led_now(volume) else {
            return Ok(());
        };
        let away = || EngineError::new(ErrorKind::Retry, format!("the epoch of {volume} cannot be ended yet"));
        let (done, read) = tokio::sync::oneshot::channel();
        spec.configs.read(Box::new(move |found| drop(done.send(found))));
        let (stamp, config) = read.await.ok().flatten().ok_or_else(away)?;
        if config.incarnation == Some(Incarnation(spec.incarnation.into_bytes())) {
            let (done, decided) = tokio::sync::oneshot::channel();
            let released = config.with(&Change::Release);
            let tell = Box::new(move |decision| {
                let _ = done.send(decision);
            });
            spec.configs.propose(stamp, released, tell);
            let decision = decided.await.map_err(|_| away())?;
            if !matches!(decision, Decision::Made(_)) {
                return Err(away());
            }
        }
        self.leading
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .remove(volume);
        Ok(())
    }

    fn lead_now(&self, spec: LeadSpec) -> Result<Device, EngineError> {
        let (volume, size_bytes, read_only) = (spec.volume.clone(), spec.size_bytes, spec.read_only);
        self.refuse_if_told(&volume)?;
        // Gone with the device: the loop device keeps it as long as it is needed.
        let file = std::env::temp_dir().join(format!("galleonfs-fake-{}", Uuid::new_v4()));
        let device = self.device_on(&volume, &file, size_bytes, read_only);
        std::fs::remove_file(&file).map_err(|error| EngineError::os(format!("remove {}", file.display()), error))?;
        device
    }

    fn refuse_if_told(&self, volume: &str) -> Result<(), EngineError> {
        let failures = self.failures.lock().unwrap_or_else(PoisonError::into_inner);
        match failures.get(volume) {
            Some(why) => Err(EngineError::new(ErrorKind::Failed, why)),
            None => Ok(()),
        }
    }

    fn attach_now(&self, spec: AttachSpec) -> Result<Device, EngineError> {
        self.attached
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .push(spec.clone());
        self.refuse_if_told(&spec.volume)?;
        self.device_on(
            &spec.volume,
            &spec.replica_dir.join("fake"),
            spec.size_bytes,
            spec.read_only,
        )
    }

    fn device_on(&self, volume: &str, file: &Path, size_bytes: u64, read_only: bool) -> Result<Device, EngineError> {
        if let Some(device) = self.device(volume) {
            return Ok(device);
        }
        let opened = File::options().write(true).create(true).truncate(false).open(file);
        let opened = opened.and_then(|file| {
            file.set_len(size_bytes.max(file.metadata()?.len()))?;
            Ok(file)
        });
        let open = opened.map_err(|error| EngineError::os(format!("open {}", file.display()), error))?;
        let mut args = vec!["--show", "-f"];
        if read_only {
            args.push("-r");
        }
        let path = losetup(&args, &[file.to_owned()])?;
        let device = Device {
            path: PathBuf::from(path.trim()),
            size_bytes,
            frontend: "fake",
        };
        self.devices
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .insert(volume.to_owned(), (device.clone(), open));
        Ok(device)
    }

    fn detach_now(&self, volume: &str) -> Result<(), EngineError> {
        match self
            .devices
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .remove(volume)
        {
            Some((device, _)) => losetup(&["-d"], &[device.path]).map(drop),
            None => Ok(()),
        }
    }

    fn grow_now(&self, volume: &str, size_bytes: u64) -> Result<Device, EngineError> {
        let mut devices = self.devices.lock().unwrap_or_else(PoisonError::into_inner);
        let missing = || EngineError::new(ErrorKind::NotFound, format!("volume {volume} is not attached"));
        let (device, file) = devices.get_mut(volume).ok_or_else(missing)?;
        let grown = file.set_len(size_bytes);
        grown.map_err(|error| EngineError::os(format!("grow the file of {volume}"), error))?;
        losetup(&["-c"], std::slice::from_ref(&device.path))?;
        device.size_bytes = size_bytes;
        Ok(device.clone())
    }
}

impl Drop for FakeEngine {
    fn drop(&mut self) {
        let devices = self.devices.get_mut().unwrap_or_else(PoisonError::into_inner);
        for (device, _) in std::mem::take(devices).into_values() {
            let _ = losetup(&["-d"], &[device.path]);
        }
    }
}

fn losetup(args: &[&str], paths: &[PathBuf]) -> Result<String, EngineError> {
    let doing = || format!("losetup {args:?} {paths:?}");
    let done = Command::new("losetup").args(args).args(paths).output();
    let done = done.map_err(|error| EngineError::os(doing(), error))?;
    if done.status.success() {
        Ok(String::from_utf8_lossy(&done.stdout).into_owned())
    } else {
        let text = format!("{}: {}", doing(), String::from_utf8_lossy(&done.stderr));
        Err(EngineError::new(ErrorKind::Failed, text))
    }
}

impl NodeEngine for FakeEngine {
    fn remove_stale(&self) -> BoxFuture<'_, Result<(), EngineError>> {
        async { Ok(()) }.boxed()
    }

    fn attach(&self, spec: AttachSpec) -> BoxFuture<'_, Result<Device, EngineError>> {
        async move { self.attach_now(spec) }.boxed()
    }

    fn detach<'a>(&'a self, volume: &'a str) -> BoxFuture<'a, Result<(), EngineError>> {
        async move {
            self.detach_now(volume)?;
            self.release(volume).await
        }
        .boxed()
    }

    fn grow<'a>(&'a self, volume: &'a str, size_bytes: u64) -> BoxFuture<'a, Result<Device, EngineError>> {
        async move { self.grow_now(volume, size_bytes) }.boxed()
    }

    fn lead(&self, spec: LeadSpec) -> BoxFuture<'_, Result<Device, EngineError>> {
        async move {
            let volume = spec.volume.clone();
            self.led
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .push(spec.clone());
            self.leading
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .insert(volume, spec.clone());
            let _ready = self.readiness.lock().await;
            self.lead_now(spec)
        }
        .boxed()
    }

    fn host(&self, spec: HostSpec) -> BoxFuture<'_, Result<(), EngineError>> {
        let done = self.host_now(spec);
        async { done }.boxed()
    }

    fn unhost(&self, replica: Uuid) -> BoxFuture<'_, Result<(), EngineError>> {
        self.hosted
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .remove(&replica);
        async { Ok(()) }.boxed()
    }

    fn all_hosted(&self) -> Vec<Uuid> {
        let all = self.hosted.lock().unwrap_or_else(PoisonError::into_inner);
        all.keys().copied().collect()
    }

    fn grow_hosted(&self, replica: Uuid, size_bytes: u64) -> BoxFuture<'_, Result<u64, EngineError>> {
        let mut all = self.hosted.lock().unwrap_or_else(PoisonError::into_inner);
        let grown = match all.get_mut(&replica) {
            Some((_, hosted)) => {
                hosted.size_bytes = hosted.size_bytes.max(size_bytes);
                Ok(hosted.size_bytes)
            }
            None => Err(EngineError::new(
                ErrorKind::NotFound,
                format!("replica {replica} is not hosted"),
            )),
        };
        async { grown }.boxed()
    }

    fn hosted(&self, replica: Uuid) -> Option<Hosted> {
        let all = self.hosted.lock().unwrap_or_else(PoisonError::into_inner);
        all.get(&replica).map(|(_, hosted)| hosted.clone())
    }

    fn routes(&self, volume_uid: Uuid, routes: Vec<Route>) {
        self.routes
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .insert(volume_uid, routes);
    }

    fn look(&self, volume: &str) {
        self.looks
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .push(volume.to_owned());
    }

    fn leave(&self, volume: &str, replica: Option<Uuid>) {
        let mut leaving = self.leaving.lock().unwrap_or_else(PoisonError::into_inner);
        leaving.push((volume.to_owned(), replica));
    }

    fn device(&self, volume: &str) -> Option<Device> {
        self.devices
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .get(volume)
            .map(|(device, _)| device.clone())
    }

    fn trouble(&self, volume: &str) -> Option<Trouble> {
        self.troubles
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .get(volume)
            .cloned()
    }

    fn metrics(&self) -> Vec<(String, VolumeMetrics)> {
        let devices = self.devices.lock().unwrap_or_else(PoisonError::into_inner);
        devices
            .keys()
            .map(|volume| (volume.clone(), VolumeMetrics::default()))
            .collect()
    }

    fn stores(&self) -> Vec<(String, StoreReport)> {
        let devices = self.devices.lock().unwrap_or_else(PoisonError::into_inner);
        let hosted = self.hosted.lock().unwrap_or_else(PoisonError::into_inner);
        let damage = self.damage.lock().unwrap_or_else(PoisonError::into_inner);
        let replicas = hosted.values().map(|(spec, _)| &spec.replica);
        let report = |store: &String| {
            let mut report = StoreReport::default();
            report.stats.damaged_places = damage.get(store).copied().unwrap_or(0);
            (store.clone(), report)
        };
        devices.keys().chain(replicas).map(report).collect()
    }

    fn refused_orders(&self) -> u64 {
        0
    }

    fn alive(&self) -> Result<(), String> {
        Ok(())
    }
}

/// Replica directories with nothing but an identity and a size in them.
#[derive(Debug, Default)]
pub struct FakeDisks;

impl ReplicaDisks for FakeDisks {
    fn make(&self, dir: &Path, spec: &FormatSpec) -> Result<(), EngineError> {
        let identity = spec.replica_uid.to_string();
        let made = std::fs::create_dir_all(dir)
            .and_then(|()| std::fs::write(dir.join("identity"), identity))
            .and_then(|()| std::fs::write(dir.join("size"), spec.size_bytes.to_string()));
        made.map_err(|error| EngineError::os(format!("make {}", dir.display()), error))
    }

    fn remove(&self, dir: &Path) -> Result<(), EngineError> {
        match std::fs::remove_dir_all(dir) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                Err(EngineError::os(format!("remove {}", dir.display()), error))
            }
            _ => Ok(()),
        }
    }

    fn sweep(&self, _replicas: &Path) -> Result<(), EngineError> {
        Ok(())
    }

    fn used_bytes(&self, dir: &Path) -> std::io::Result<u64> {
        crate::disk::used_bytes(dir)
    }
}
