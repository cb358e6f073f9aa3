//! What the controller counts, in Prometheus' terms.

use std::{
    collections::HashMap,
    future::Future,
    sync::{Arc, Mutex, PoisonError},
    time::Instant,
};

use prometheus::{
    CounterVec, Encoder, HistogramOpts, HistogramVec, IntCounterVec, IntGauge, IntGaugeVec, Opts, Registry,
    TextEncoder, core::Collector,
};
use tonic::{Code, Response, Status};

use crate::error::Error;

/// Handles to every counter; cheap to clone.
#[derive(Clone, Debug)]
pub struct Metrics {
    registry: Registry,
    calls: IntCounterVec,
    call_seconds: HistogramVec,
    reconciles: IntCounterVec,
    leader: IntGauge,
    in_sync: IntGaugeVec,
    wanted: IntGaugeVec,
    below: CounterVec,
    /// Volumes of several replicas that the leader knows; for those below what was asked for, until when that is counted.
    below_since: Arc<Mutex<HashMap<String, Option<Instant>>>>,
}

impl Default for Metrics {
    fn default() -> Self {
        let registry = Registry::new();
        fn register<C: Collector + Clone + 'static>(registry: &Registry, collector: prometheus::Result<C>) -> C {
            let collector = collector.expect("metric names and labels are constants");
            registry
                .register(Box::new(collector.clone()))
                .expect("each metric is registered once");
            collector
        }
        let calls = Opts::new(
            "galleonfs_csi_calls_total",
            "CSI calls served, by method and gRPC code.",
        );
        let seconds = HistogramOpts::new("galleonfs_csi_call_seconds", "Time to serve a CSI call, by method.")
            .buckets(vec![0.01, 0.05, 0.1, 0.5, 1.0, 5.0, 15.0, 60.0]);
        let reconciles = Opts::new("galleonfs_reconciles_total", "Looks at an object, by kind and outcome.");
        let in_sync = Opts::new(
            "galleonfs_volume_in_sync_replicas",
            "Replicas that have every completed write, of volumes with several. The leader knows.",
        );
        let wanted = Opts::new(
            "galleonfs_volume_wanted_replicas",
            "Replicas that were asked for, of volumes with several. The leader knows.",
        );
        let below = Opts::new(
            "galleonfs_volume_below_wanted_seconds_total",
            "Time that a volume had fewer replicas in sync than were asked for, as long as this controller has led.",
        );
        Self {
            in_sync: register(&registry, IntGaugeVec::new(in_sync, &["volume"])),
            wanted: register(&registry, IntGaugeVec::new(wanted, &["volume"])),
            below: register(&registry, CounterVec::new(below, &["volume"])),
            below_since: Arc::default(),
            calls: register(&registry, IntCounterVec::new(calls, &["method", "code"])),
            call_seconds: register(&registry, HistogramVec::new(seconds, &["method"])),
            reconciles: register(&registry, IntCounterVec::new(reconciles, &["kind", "outcome"])),
            leader: register(
                &registry,
                IntGauge::new("galleonfs_leader", "1 while this controller is the leader."),
            ),
            registry,
        }
    }
}

impl Metrics {
    /// Serves a CSI call: counts it, logs what went wrong, and maps the error to its gRPC code.
    pub async fn call<T>(
        &self,
        method: &'static str,
        volume: &str,
        work: impl Future<Output = Result<T, Error>>,
    ) -> Result<Response<T>, Status> {
        let start = Instant::now();
        let answer = work.await.map_err(Status::from);
        let code = answer.as_ref().err().map_or(Code::Ok, Status::code);
        self.calls.with_label_values(&[method, &format!("{code:?}")]).inc();
        self.call_seconds
            .with_label_values(&[method])
            .observe(start.elapsed().as_secs_f64());
        match &answer {
            Ok(_) => tracing::debug!(method, volume, "served"),
            Err(status) if code == Code::Internal => {
                tracing::error!(method, volume, ?code, error = status.message(), "refused");
            }
            Err(status) => tracing::info!(method, volume, ?code, error = status.message(), "refused"),
        }
        answer.map(Response::new)
    }

    pub fn reconciled(&self, kind: &str, outcome: &str) {
        self.reconciles.with_label_values(&[kind, outcome]).inc();
    }

    pub fn set_leader(&self, leading: bool) {
        self.leader.set(leading.into());
        if !leading {
            // Another one knows from now on.
            self.below_since().clear();
            self.in_sync.reset();
            self.wanted.reset();
            self.below.reset();
        }
    }

    /// How many replicas of a volume are in sync, and whether it is `whole`, as its class wants it, from now on.
    pub fn redundancy(&self, volume: &str, in_sync: usize, wanted: usize, whole: bool) {
        let gauge = |count: usize| i64::try_from(count).unwrap_or(i64::MAX);
        self.in_sync.with_label_values(&[volume]).set(gauge(in_sync));
        self.wanted.with_label_values(&[volume]).set(gauge(wanted));
        let now = Instant::now();
        let mut known = self.below_since();
        let since = known.entry(volume.to_string()).or_default();
        self.count_below(volume, since, now);
        *since = (!whole).then_some(now);
    }

    /// A volume is not there any more.
    pub fn volume_gone(&self, volume: &str) {
        if self.below_since().remove(volume).is_some() {
            let _ = self.in_sync.remove_label_values(&[volume]);
            let _ = self.wanted.remove_label_values(&[volume]);
            let _ = self.below.remove_label_values(&[volume]);
        }
    }

    fn count_below(&self, volume: &str, since: &mut Option<Instant>, now: Instant) {
        let counter = self.below.with_label_values(&[volume]);
        if let Some(since) = since {
            counter.inc_by(now.saturating_duration_since(*since).as_secs_f64());
            *since = now;
        }
    }

    fn below_since(&self) -> std::sync::MutexGuard<'_, HashMap<String, Option<Instant>>> {
        self.below_since.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Everything in the text format.
    pub fn text(&self) -> String {
        let now = Instant::now();
        for (volume, since) in self.below_since().iter_mut() {
            self.count_below(volume, since, now);
        }
        let mut text = vec![];
        TextEncoder::new()
            .encode(&self.registry.gather(), &mut text)
            .expect("writing to memory cannot fail");
        String::from_utf8(text).expect("the text format is text")
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::Kind;

    #[test]
    fn time_below_the_wanted_count_is_counted_while_it_passes_and_only_then() {
        let metrics = Metrics::default();
        let below = |metrics: &Metrics| {
            let text = metrics.text();
            let line = text
                .lines()
                .find(|line| line.starts_with("galleonfs_volume_below_wanted_seconds_total{"));
            let figure = line.and_then(|line| line.rsplit(' ').next());
            figure.expect("the volume is known").parse::<f64>().expect("a number")
        };
        metrics.redundancy("v", 3, 3, true);
        assert!(
            metrics
                .text()
                .contains("galleonfs_volume_in_sync_replicas{volume=\"v\"} 3")
        );
        assert_eq!(below(&metrics), 0.0);
        metrics.redundancy("v", 2, 3, false);
        let minute_ago = Instant::now().checked_sub(std::time::Duration::from_secs(60));
        *metrics.below_since().get_mut("v").expect("it is known") = minute_ago;
        let counted = below(&metrics);
        assert!((60.0..70.0).contains(&counted), "{counted}");
        assert!(below(&metrics) < 70.0, "no second is counted twice");
        metrics.redundancy("v", 3, 3, true);
        let whole = below(&metrics);
        assert_eq!(below(&metrics), whole);
        metrics.volume_gone("v");
        assert!(!metrics.text().contains("volume=\"v\""));
        metrics.redundancy("w", 1, 2, false);
        metrics.set_leader(false);
        assert!(!metrics.text().contains("volume=\"w\""));
    }

    #[tokio::test]
    async fn calls_are_counted_by_their_outcome() {
        let metrics = Metrics::default();
        metrics
            .call("CreateVolume", "v", async { Ok(()) })
            .await
            .expect("served");
        let refused = metrics
            .call("CreateVolume", "v", async {
                Err::<(), _>(Error::new(Kind::NoRoom, "full"))
            })
            .await;
        assert_eq!(refused.expect_err("refused").code(), Code::ResourceExhausted);
        metrics.set_leader(true);
        let text = metrics.text();
        for line in [
            "galleonfs_csi_calls_total{code=\"Ok\",method=\"CreateVolume\"} 1",
            "galleonfs_csi_calls_total{code=\"ResourceExhausted\",method=\"CreateVolume\"} 1",
            "galleonfs_leader 1",
        ] {
            assert!(text.contains(line), "{text} lacks {line}");
        }
    }
}
