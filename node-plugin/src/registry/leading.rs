//! Volumes of several replicas that are attached here: led, kept in touch with their replicas, given up.
//!
//! A grant serves for one attempt to lead. When that fails, the engine ends what it began, the grant is forgotten, and the
//! next attempt takes the volume over anew. The replicas need not be here, nor be opened yet: the engine finds each where
//! its pool says that its node is reached.

use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::sync::Arc;

use galleonfs_api::{Endpoint, GalleonVolume, VolumeConfig};
use kube::ResourceExt;
use tokio::time::{Duration, Instant};
use uuid::Uuid;

use super::configs::{Member, VolumeConfigs};
use super::objects::ObjectError;
use super::patience::Patience;
use super::plan::{self, Grant};
use super::{Next, Registry, Retry};
use crate::engine::{LeadSpec, Route};
use crate::served::{Presence, Trouble};

/// How often a led volume is looked at: a look at memory, as long as all is well.
pub const KEEP_EVERY: Duration = Duration::from_secs(10);

/// How often one is looked at while the engine gets its replicas together.
const KEEP_EVERY_BEFORE: Duration = Duration::from_secs(2);

/// How long it counts where a pool was when that was read last.
const REACHED_FOR: Duration = Duration::from_secs(5);

/// A volume that is led here.
#[derive(Clone)]
pub struct Led {
    volume_uid: Uuid,
    configs: VolumeConfigs,
    /// What the engine was told last; nothing yet at first.
    routes: Option<Vec<Route>>,
    /// The replicas that this was about.
    names: BTreeSet<String>,
    /// Of all of them it was known where they are.
    whole: bool,
    asked: Instant,
    /// The replica that the engine was told is to leave.
    leaving: Option<Uuid>,
}

impl Led {
    /// What is known was asked for long ago.
    #[cfg(test)]
    pub(super) fn doubt(&mut self) {
        self.asked -= REACHED_FOR;
    }
}

impl std::fmt::Debug for Led {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Led")
            .field("routes", &self.routes)
            .finish_non_exhaustive()
    }
}

impl Registry {
    /// Leads the volume under the grant, once.
    pub(super) async fn lead(&self, name: &str, object: &GalleonVolume) -> Result<Next, Retry> {
        if self.served.get(name).is_none() {
            self.served.set(name, Some(Presence::Coming));
        }
        let grant = self
            .own(|own| own.grants.get(name).copied())
            .expect("to lead follows a grant");
        let Some(config) = object.config() else {
            return Ok(Next::Wait);
        };
        let (spec, configs) = match self.lead_spec(name, object, grant) {
            Ok(spec) => spec,
            Err(text) => return self.could_not_lead(name, object, text).await,
        };
        let led = Led {
            volume_uid: spec.volume_uid,
            configs,
            routes: None,
            names: BTreeSet::new(),
            whole: false,
            asked: Instant::now(),
            leaving: None,
        };
        self.own(|own| own.led.insert(name.to_owned(), led));
        let missing = self.tell_routes(name, config).await?;
        if let Some(replica) = missing.iter().find(|replica| config.in_sync.contains(replica)) {
            let text = format!(
                "replica {replica} is in sync, and there is no GalleonReplica of that name: nobody knows where it is"
            );
            return self.could_not_lead(name, object, text).await;
        }
        self.own(|own| own.spent.insert(name.to_owned()));
        let mut lead = self.engine.lead(spec);
        let outcome = loop {
            if let Ok(outcome) = tokio::time::timeout(KEEP_EVERY_BEFORE, &mut lead).await {
                break outcome;
            }
            // The engine may wait for a replica that is elsewhere now, or that was given up.
            match self.still_led(name, &grant) {
                Some(object) => self.keep(name, &object).await,
                // What the engine makes of it is taken down in the next look.
                None => return Err(Retry::Soon(format!("volume {name} is not to be led here any more"))),
            }
        };
        match outcome {
            Ok(device) => {
                self.own(|own| own.patience.remove(name));
                self.came_up(name, device);
                Ok(Next::Again(Duration::ZERO))
            }
            Err(error) => self.could_not_lead(name, object, plan::text_of(&error)).await,
        }
    }

    /// The volume's object, while it says that this node is to lead it under this grant.
    fn still_led(&self, name: &str, grant: &Grant) -> Option<Arc<GalleonVolume>> {
        let object = self.cache.volumes.get(name)?;
        let wanted = object.attached_node() == Some(&self.node);
        let held = object
            .config()
            .is_some_and(|config| plan::holds(&self.node, config, grant));
        (wanted && held).then_some(object)
    }

    fn lead_spec(&self, name: &str, object: &GalleonVolume, grant: Grant) -> Result<(LeadSpec, VolumeConfigs), String> {
        let uid = object.uid().unwrap_or_default();
        let volume_uid = Uuid::parse_str(&uid).map_err(|_| format!("{name} has the uid {uid:?}, which is none"))?;
        let bytes = object.spec.block_size;
        let block_size = plan::block_size(bytes)
            .ok_or_else(|| format!("its blocks have {bytes} bytes, which this version cannot serve"))?;
        let named = |name: String| {
            let config = object.config();
            config.is_some_and(|config| plan::names(config).any(|member| *member == name))
        };
        let own_replica = self.cache.replicas.list().into_iter().find(|replica| {
            replica.spec.node_name == self.node && replica.spec.volume_uid == uid && named(replica.name_any())
        });
        let configs = VolumeConfigs::new(self.objects.clone(), &self.node, name, volume_uid);
        let spec = LeadSpec {
            volume: name.to_owned(),
            volume_uid,
            cluster_id: self.cluster_id,
            epoch: grant.epoch(),
            incarnation: grant.incarnation,
            size_bytes: plan::target_bytes(object, None),
            block_size,
            read_only: plan::is_read_only(object),
            settings: plan::settings(&object.spec),
            replicas: usize::try_from(object.spec.replica_count).unwrap_or(1),
            concern: plan::concern(&object.spec),
            prefer: own_replica.and_then(|replica| Uuid::parse_str(&replica.uid()?).ok()),
            configs: Arc::new(configs.clone()),
        };
        Ok((spec, configs))
    }

    async fn could_not_lead(&self, name: &str, object: &GalleonVolume, text: String) -> Result<Next, Retry> {
        self.own(|own| {
            let patience = Patience::after_failure(own.patience.get(name).copied());
            own.patience.insert(name.to_owned(), patience);
            // Also if nothing was begun: whoever reads the object sees an epoch that nobody serves.
            own.spent.insert(name.to_owned());
        });
        let told = self.tell_failure(name, object, &text).await;
        self.give_up(name).await?;
        told?;
        Err(Retry::Later(format!("volume {name} could not be led: {text}")))
    }

    /// Ends what was begun under the grant, and forgets it.
    pub(super) async fn give_up(&self, name: &str) -> Result<Next, Retry> {
        let ended = self.engine.detach(name).await;
        ended.map_err(|error| Retry::Later(format!("closing volume {name}: {}", plan::text_of(&error))))?;
        self.forget_grant(name);
        Ok(Next::Again(Duration::ZERO))
    }

    /// Tells the engine what changed around a volume that it leads: its configuration, or where its replicas are.
    pub(super) async fn keep(&self, name: &str, object: &GalleonVolume) {
        let Some(led) = self.own(|own| own.led.get(name).cloned()) else {
            return;
        };
        let Some(config) = object.config() else { return };
        if led.configs.latest().as_ref() != Some(config) {
            self.engine.look(name);
        }
        self.tell_leaving(name, object, config, &led).await;
        let named: BTreeSet<String> = plan::names(config).cloned().collect();
        let limps = !led.whole
            || !config.out.is_empty()
            || !config.syncing.is_empty()
            || matches!(self.engine.trouble(name), Some(Trouble::Waiting(_)));
        let due = named != led.names || (limps && led.asked.elapsed() >= REACHED_FOR);
        if due && let Err(error) = self.tell_routes(name, config).await {
            // The engine goes on with what it was told before, and this is tried again.
            tracing::debug!(volume = name, %error, "where its replicas are cannot be read");
        }
    }

    /// Tells the engine which replica is to leave, if that is news.
    async fn tell_leaving(&self, name: &str, object: &GalleonVolume, config: &VolumeConfig, led: &Led) {
        let wanted = match &object.spec.leaving {
            None => None,
            Some(replica) => match led.configs.uid_of(config, replica).await {
                // Nobody of that name leaves.
                Ok(found) => found,
                Err(error) => {
                    tracing::debug!(volume = name, %error, "which replica is to leave cannot be read");
                    return;
                }
            },
        };
        if wanted != led.leaving && self.engine.device(name).is_some() {
            tracing::info!(volume = name, leaving = ?object.spec.leaving, "who is to leave");
            self.engine.leave(name, wanted);
            self.own(|own| {
                if let Some(led) = own.led.get_mut(name) {
                    led.leaving = wanted;
                }
            });
        }
    }

    /// Tells the engine where the replicas are that this configuration names. Returns those that nobody knows.
    async fn tell_routes(&self, name: &str, config: &VolumeConfig) -> Result<Vec<String>, ObjectError> {
        let Some(led) = self.own(|own| own.led.get(name).cloned()) else {
            return Ok(vec![]);
        };
        let members = led.configs.members(config).await?;
        let mut whole = members.missing.is_empty();
        let mut routes = Vec::new();
        for member in members.known.iter().filter(|member| member.node != self.node) {
            match self.route(member).await? {
                Some(route) if !routes.contains(&route) => routes.push(route),
                Some(_) => {}
                None => whole = false,
            }
        }
        if led.routes.as_ref() != Some(&routes) {
            tracing::info!(volume = name, ?routes, "where its replicas are");
            self.engine.routes(led.volume_uid, routes.clone());
        }
        self.own(|own| {
            if let Some(led) = own.led.get_mut(name) {
                led.routes = Some(routes);
                led.names = plan::names(config).cloned().collect();
                led.whole = whole;
                led.asked = Instant::now();
            }
        });
        Ok(members.missing)
    }

    async fn route(&self, member: &Member) -> Result<Option<Route>, ObjectError> {
        let known = self.own(|own| own.reached.get(&member.pool).cloned());
        let endpoint = match known.filter(|(read, _)| read.elapsed() < REACHED_FOR) {
            Some((_, endpoint)) => endpoint,
            None => {
                let pool = self.objects.pool(&member.pool).await?;
                let endpoint = pool.and_then(|pool| pool.status).and_then(|status| status.endpoint);
                let read = (Instant::now(), endpoint.clone());
                self.own(|own| own.reached.insert(member.pool.clone(), read));
                endpoint
            }
        };
        let Some(Endpoint { address, node_uid }) = endpoint else {
            return Ok(None);
        };
        let (Ok(address), Ok(node)) = (address.parse::<SocketAddr>(), Uuid::parse_str(&node_uid)) else {
            tracing::warn!(pool = %member.pool, %address, %node_uid, "says nothing of use about where it is reached");
            return Ok(None);
        };
        Ok(Some(Route {
            replica: member.uid,
            node,
            addresses: vec![address],
        }))
    }

    pub(super) fn forget_led(&self, name: &str) {
        if let Some(led) = self.own(|own| own.led.remove(name)) {
            self.engine.routes(led.volume_uid, vec![]);
        }
    }
}
