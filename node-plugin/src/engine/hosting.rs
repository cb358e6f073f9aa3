//! Volumes of several replicas, from the outside: replicas opened and closed, volumes led, routes told.

use std::collections::{HashMap, HashSet};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError, mpsc};

use galleonfs_storage_engine::replication::ReplicaId;
use uuid::Uuid;

use super::attached::Grant;
use super::claims::{Claim, Claims};
use super::hosted::{NewHosted, Shown, open_hosted};
use super::leading::{ConfigNews, Leading, led_volume};
use super::open::MapBudget;
use super::post::Dial;
use super::scrub::{Schedule, ScrubPlan};
use super::shard::Message;
use super::spec::{HostSpec, Hosted, LeadSpec, Route};
use super::{Engine, EngineError, ErrorKind, Inner, StoreReport, limits, on_thread};
use crate::disk::FileDisk;
use crate::frontend::{Device, Export};

/// What the engine knows of such volumes, besides its shards.
pub(super) struct Hosting {
    dial: Option<Arc<dyn Dial>>,
    maps: MapBudget,
    plan: Option<ScrubPlan>,
    replicas: Claims<Uuid, Place>,
    routes: Mutex<HashMap<Uuid, Vec<Route>>>,
    /// Orders of nodes that do not lead the volume.
    refused: Arc<AtomicU64>,
}

/// Where a hosted replica is.
#[derive(Clone)]
struct Place {
    key: u32,
    shard: usize,
    replica: String,
    shown: Shown,
}

impl Hosting {
    pub fn new(dial: Option<Arc<dyn Dial>>, maps: MapBudget, plan: Option<ScrubPlan>) -> Hosting {
        Hosting {
            dial,
            maps,
            plan,
            replicas: Claims::default(),
            routes: Mutex::default(),
            refused: Arc::default(),
        }
    }

    fn place(&self, replica: Uuid) -> Option<Place> {
        self.replicas.get(&replica, Place::clone)
    }

    /// Claims a replica for one operation.
    fn reserve(&self, replica: Uuid) -> Result<Claim<'_, Uuid, Place>, EngineError> {
        self.replicas.claim(replica).ok_or_else(|| {
            let text = format!("replica {replica} is being opened or closed; try again");
            EngineError::new(ErrorKind::Retry, text)
        })
    }

    /// Has connections to the nodes that replicas are on, and to no others.
    fn reach(&self, volume: Uuid, routes: &[Route]) {
        let mut all = self.routes.lock().unwrap_or_else(PoisonError::into_inner);
        let before = all.remove(&volume).unwrap_or_default();
        if !routes.is_empty() {
            all.insert(volume, routes.to_vec());
        }
        let Some(dial) = &self.dial else { return };
        let needed: HashSet<Uuid> = all.values().flatten().map(|route| route.node).collect();
        for gone in before.iter().filter(|route| !needed.contains(&route.node)) {
            dial.forget(gone.node);
        }
        for route in routes.iter().filter(|route| !before.contains(route)) {
            dial.dial(route.node, route.addresses.clone());
        }
    }
}

impl Engine {
    /// Has a replica take part in its volume. Hosting what is hosted already is fine.
    pub async fn host(&self, spec: HostSpec) -> Result<(), EngineError> {
        let inner = self.inner.clone();
        on_thread(format!("host {}", spec.replica), move || inner.host(spec)).await
    }

    /// Closes a hosted replica. One that is not hosted is fine.
    pub async fn unhost(&self, replica: Uuid) -> Result<(), EngineError> {
        let inner = self.inner.clone();
        on_thread(format!("unhost {replica}"), move || inner.unhost(replica)).await
    }

    /// Every replica that is hosted.
    pub fn all_hosted(&self) -> Vec<Uuid> {
        self.inner.hosting.replicas.list(|replica, _| *replica)
    }

    /// Makes a hosted replica larger, durably; gives the size that it has then.
    pub async fn grow_hosted(&self, replica: Uuid, size_bytes: u64) -> Result<u64, EngineError> {
        let inner = self.inner.clone();
        on_thread(format!("grow {replica}"), move || {
            inner.grow_hosted(replica, size_bytes)
        })
        .await
    }

    /// How a hosted replica fares.
    pub fn hosted(&self, replica: Uuid) -> Option<Hosted> {
        let place = self.inner.hosting.place(replica)?;
        let shown = place.shown.lock().unwrap_or_else(PoisonError::into_inner);
        Some(shown.clone())
    }

    /// What the stores of the hosted replicas say of themselves, by the replica's object name. Asks the shards.
    pub fn hosted_stores(&self) -> Vec<(String, StoreReport)> {
        let places = self.inner.hosting.replicas.list(|_, place| place.clone());
        let ask = |place: Place| {
            let replica = place.key;
            // One that has gone meanwhile, or is being opened, gives no answer.
            let report = self
                .inner
                .ask(place.shard, |done| Message::ReportHosted { replica, done });
            Some((place.replica, report.ok()?))
        };
        places.into_iter().filter_map(ask).collect()
    }

    /// How many orders were refused because they came from nodes that do not lead the volume.
    pub fn refused_orders(&self) -> u64 {
        self.inner.hosting.refused.load(Ordering::Relaxed)
    }

    /// Says where the replicas of a volume are.
    pub fn routes(&self, volume: Uuid, routes: Vec<Route>) {
        self.inner.hosting.reach(volume, &routes);
        let shard = self.inner.shard_of(volume);
        // The process ends if nobody is there.
        let _ = self.inner.tell(shard, Message::Routes { volume, routes });
    }

    /// Somebody else may have changed the configuration of an attached volume.
    pub fn look(&self, volume: &str) {
        let place = self.attached(volume, |attached| (attached.key, attached.shard));
        if let Some((key, shard)) = place {
            let _ = self.inner.tell(shard, Message::Config(key, ConfigNews::Look));
        }
    }

    /// A replica of an attached volume is to leave when another one is in sync in its place; `None`: all may stay.
    pub fn leave(&self, volume: &str, replica: Option<Uuid>) {
        let place = self.attached(volume, |attached| (attached.key, attached.shard));
        if let Some((key, shard)) = place {
            let replica = replica.map(|replica| ReplicaId(replica.into_bytes()));
            let _ = self.inner.tell(shard, Message::Config(key, ConfigNews::Leave(replica)));
        }
    }

    /// Leads the replicas of a volume, and makes its device once they are ready.
    pub async fn lead(&self, spec: LeadSpec) -> Result<Device, EngineError> {
        let inner = self.inner.clone();
        on_thread(format!("lead {}", spec.volume), move || inner.lead(&spec)).await
    }
}

impl Inner {
    /// A volume and its replica on this node meet on one shard.
    fn shard_of(&self, volume: Uuid) -> usize {
        (volume.as_u64_pair().1 % self.shards.len() as u64) as usize
    }

    fn host(&self, spec: HostSpec) -> Result<(), EngineError> {
        let claim = self.hosting.reserve(spec.replica_uid)?;
        if claim.held().is_some() {
            return Ok(());
        }
        let mut disk = FileDisk::open(&spec.replica_dir)?;
        let share = self.hosting.maps.share();
        let store = open_hosted(&spec, &mut disk, &share, Vec::new())?;
        let shown = Shown::new(Mutex::new(Hosted {
            size_bytes: store.size_bytes(),
            stopped: store.stopped().map(str::to_owned),
        }));
        let place = Place {
            key: self.next_key.fetch_add(1, Ordering::Relaxed),
            shard: self.shard_of(spec.volume_uid),
            replica: spec.replica.clone(),
            shown: shown.clone(),
        };
        let new = NewHosted {
            key: place.key,
            spec,
            store,
            dir: disk.dir(),
            shown,
            plan: self.hosting.plan,
            share,
            refused: self.hosting.refused.clone(),
        };
        self.ask(place.shard, |done| Message::Host(Box::new(new), done))
            .and_then(|hosted| hosted)?;
        claim.set(Some(place));
        Ok(())
    }

    fn unhost(&self, replica: Uuid) -> Result<(), EngineError> {
        let claim = self.hosting.reserve(replica)?;
        let Some(place) = claim.held() else {
            return Ok(());
        };
        let (done, closed) = mpsc::channel();
        let key = place.key;
        self.tell(place.shard, Message::Unhost { replica: key, done })?;
        match closed.recv_timeout(limits::CLOSE_WAIT_MAX) {
            Ok(threads) => {
                for thread in threads {
                    // One that panicked has let go of the replica as well.
                    let _ = thread.join();
                }
            }
            // Nobody is there to answer: it was closed by an earlier attempt that was not waited for.
            Err(mpsc::RecvTimeoutError::Disconnected) => {}
            Err(mpsc::RecvTimeoutError::Timeout) => {
                let text = format!(
                    "close replica {}: its disk has not answered for {} s",
                    place.replica,
                    limits::CLOSE_WAIT_MAX.as_secs()
                );
                return Err(EngineError::new(ErrorKind::Retry, text));
            }
        }
        claim.set(None);
        Ok(())
    }

    fn grow_hosted(&self, replica: Uuid, size_bytes: u64) -> Result<u64, EngineError> {
        let missing = || EngineError::new(ErrorKind::NotFound, format!("replica {replica} is not hosted here"));
        let place = self.hosting.place(replica).ok_or_else(missing)?;
        let (done, grown) = mpsc::channel();
        let message = Message::GrowHosted {
            replica: place.key,
            size_bytes,
            done,
        };
        self.tell(place.shard, message)?;
        grown.recv_timeout(limits::CLOSE_WAIT_MAX).map_err(|_| {
            let text = format!(
                "grow replica {} to {size_bytes} bytes: not done yet; try again",
                place.replica
            );
            EngineError::new(ErrorKind::Retry, text)
        })?
    }

    fn lead(&self, spec: &LeadSpec) -> Result<Device, EngineError> {
        let reservation = self.reserve(&spec.volume)?;
        let grant = Grant {
            epoch: spec.epoch,
            holder: spec.incarnation,
            read_only: spec.read_only,
        };
        if let Some(attached) = reservation.held() {
            return attached.again(&grant);
        }
        let doing = || format!("lead the replicas of volume {}", spec.volume);
        let retry = |text: String| EngineError::new(ErrorKind::Retry, format!("{}: {text}", doing()));
        let (found, config) = mpsc::channel();
        // Nobody waits any more if this fails.
        spec.configs.read(Box::new(move |read| drop(found.send(read))));
        let config = config.recv_timeout(limits::CONFIG_WAIT_MAX).ok().flatten();
        let (stamp, config) = config.ok_or_else(|| retry("its configuration cannot be read".to_owned()))?;
        let ours = config
            .incarnation
            .is_some_and(|incarnation| incarnation.0 == *spec.incarnation.as_bytes());
        if !ours || u64::from(config.epoch.0) != spec.epoch {
            return Err(retry(format!(
                "epoch {} was granted to this node, and now the configuration says epoch {}",
                spec.epoch, config.epoch.0
            )));
        }
        let (ready, serving) = mpsc::channel();
        let leading = Leading {
            volume: spec.volume_uid,
            configs: spec.configs.clone(),
            ready: Some(ready),
            look_ms: 0,
            compares: Schedule::new(self.hosting.plan, spec.volume_uid),
        };
        let export = Export {
            volume: spec.volume.clone(),
            size_bytes: spec.size_bytes,
            sector_bytes: spec.settings.sector_bytes,
            read_only: spec.read_only,
        };
        let engine = Box::new(led_volume(spec, stamp, config));
        let shard = self.shard_of(spec.volume_uid);
        let attached = self.serve(engine, export, grant, shard, None, Some(leading))?;
        reservation.set(Some(attached.clone()));
        match serving.recv_timeout(limits::READY_WAIT_MAX) {
            Ok(Ok(())) => self.connect(attached, &reservation),
            not_ready => {
                let why = match not_ready {
                    Ok(Err(why)) => why,
                    _ => format!(
                        "too few of its replicas have answered within {} s",
                        limits::READY_WAIT_MAX.as_secs()
                    ),
                };
                self.clean_up(&attached, &reservation);
                Err(retry(why))
            }
        }
    }
}
