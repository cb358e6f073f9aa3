//! Where the volume is attached: a primary is started when nobody seems to serve, and sometimes when somebody does.

use galleonfs_storage_engine::replication::primary::PrimaryOptions;
use galleonfs_storage_engine::replication::{Change, Config, Incarnation, Primary, Stamp};

use super::backend::Backend;
use super::guest::Guest;
use super::{Event, MS, Serving, World};

impl<B: Backend> World<B> {
    /// Sees to it that somebody serves the volume.
    pub(super) fn control(&mut self) {
        let holder = self.api.config.incarnation;
        // Whoever cannot be seen is taken for dead, which it often is not.
        let alive = self.nodes.iter().enumerate().any(|(n, node)| {
            let seen = node.paused_until_us <= self.now_us && self.api_reachable(n);
            let serving = node.serving.as_ref();
            seen && serving.is_some_and(|serving| Some(serving.incarnation) == holder && !serving.primary.is_over())
        });
        let claiming = self.nodes.iter().any(|node| {
            let serving = node.serving.as_ref();
            serving.is_some_and(|serving| {
                serving.primary.epoch() <= self.api.config.epoch && !serving.primary.is_serving()
            })
        });
        if !alive && (!claiming || self.rng.percent(10)) {
            self.attach();
        }
        self.at(self.rng.clone().between(100, 1_000) * MS, Event::Control);
        self.rng.next_u64();
    }

    /// Starts a primary somewhere; another one may still be there.
    pub(super) fn attach(&mut self) {
        let node = self.rng.below(self.nodes.len() as u64) as usize;
        let it = &self.nodes[node];
        let is_down = it.replica.is_none() && !it.given_up;
        if is_down || it.paused_until_us > self.now_us || !self.api_reachable(node) {
            return;
        }
        let incarnation = Incarnation(self.rng.uid());
        let (stamp, config) = (self.api.stamp, self.api.config.clone());
        if self.rng.percent(50) {
            return self.lead(node, incarnation, stamp, config);
        }
        // The node claims the epoch before it starts the primary, which may take a moment.
        let config = config.with(&Change::Claim(incarnation));
        match self.api.put(stamp, config.clone()) {
            Ok(stamp) => {
                let stamp = stamp.expect("the object is as it was just read");
                let takes = if self.rng.percent(20) { 5_000 * MS } else { 10 * MS };
                let takes = self.rng.between(500, takes);
                self.at(takes, Event::Lead(node, incarnation, stamp, Box::new(config)));
            }
            Err(broken) => self.violated(broken),
        }
    }

    /// Starts a primary on a node, if that is up.
    pub(super) fn lead(&mut self, node: usize, incarnation: Incarnation, stamp: Stamp, config: Config) {
        if self.nodes[node].replica.is_none() && !self.nodes[node].given_up {
            return;
        }
        let prefer = self.rng.percent(70).then_some(self.nodes[node].id);
        let options = PrimaryOptions {
            volume: self.volume,
            incarnation,
            // Whoever administers adds replicas, and nobody gives one up because there are enough.
            replicas: usize::MAX,
            concern: self.concern,
            prefer,
            row: None,
            mutants: self.setup.mutants,
        };
        let now_ms = self.nodes[node].now_ms(self.now_us);
        let mut primary = Primary::new(options, stamp, config, now_ms);
        primary.stand(self.zones.clone());
        self.nodes[node].serving = Some(Serving {
            incarnation,
            primary,
            guest: Guest::default(),
        });
        self.at(0, Event::TickPrimary(node, incarnation));
        self.drain_primary(node);
    }
}
