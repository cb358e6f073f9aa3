//! What the controller counts, in Prometheus' terms.

use std::{future::Future, time::Instant};

use prometheus::{
    Encoder, HistogramOpts, HistogramVec, IntCounterVec, IntGauge, Opts, Registry, TextEncoder, core::Collector,
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
        Self {
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
    }

    /// Everything in the text format.
    pub fn text(&self) -> String {
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
