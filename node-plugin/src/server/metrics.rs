//! Metrics, gathered when somebody asks. Nothing is counted a second time for them: they are read off the engine and the
//! tables.

use prometheus::core::Collector;
use prometheus::{IntCounterVec, IntGauge, IntGaugeVec, Opts, Registry, TextEncoder};

use crate::mount::HungChildren;
use crate::served::{NodeEngine, Served, VolumeMetrics};

/// A counter per volume: name, help, and where its value is.
type PerVolume = (&'static str, &'static str, fn(&VolumeMetrics) -> u64);

const COUNTERS: [PerVolume; 6] = [
    ("galleonfs_volume_reads_total", "Reads answered.", |volume| volume.reads),
    ("galleonfs_volume_writes_total", "Writes answered.", |volume| {
        volume.writes
    }),
    ("galleonfs_volume_read_bytes_total", "Bytes read.", |volume| {
        volume.read_bytes
    }),
    ("galleonfs_volume_written_bytes_total", "Bytes written.", |volume| {
        volume.written_bytes
    }),
    ("galleonfs_volume_flushes_total", "Flushes answered.", |volume| {
        volume.flushes
    }),
    (
        "galleonfs_volume_errors_total",
        "Requests answered with an error.",
        |volume| volume.errors,
    ),
];

/// The page for Prometheus.
pub fn render(engine: &dyn NodeEngine, served: &Served, hung: &HungChildren) -> Result<String, prometheus::Error> {
    let registry = Registry::new();
    let add = |metric: Box<dyn Collector>| registry.register(metric);
    let volumes = engine.metrics();
    for (name, help, value) in COUNTERS {
        let counter = IntCounterVec::new(Opts::new(name, help), &["volume"])?;
        for (volume, metrics) in &volumes {
            counter.with_label_values(&[volume]).inc_by(value(metrics));
        }
        add(Box::new(counter))?;
    }
    let inflight = Opts::new("galleonfs_volume_inflight", "Requests that are not answered yet.");
    let inflight = IntGaugeVec::new(inflight, &["volume"])?;
    for (volume, metrics) in &volumes {
        inflight
            .with_label_values(&[volume])
            .set(i64::try_from(metrics.inflight).unwrap_or(i64::MAX));
    }
    add(Box::new(inflight))?;
    let states = IntGaugeVec::new(
        Opts::new("galleonfs_node_volumes", "Volumes wanted on this node, by state."),
        &["state"],
    )?;
    let (here, coming, failed) = served.counts();
    for (state, count) in [("here", here), ("coming", coming), ("failed", failed)] {
        states.with_label_values(&[state]).set(count as i64);
    }
    add(Box::new(states))?;
    let children = IntGauge::new(
        "galleonfs_node_hung_programs",
        "Programs that hang in the kernel and cannot be killed.",
    )?;
    children.set(hung.count() as i64);
    add(Box::new(children))?;
    TextEncoder::new().encode_to_string(&registry.gather())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::served::{FakeEngine, Presence};

    #[test]
    fn the_page_names_the_volumes_by_state() {
        let served = Served::default();
        served.set("v", Some(Presence::Coming));
        let page = render(&FakeEngine::default(), &served, &HungChildren::default()).unwrap();
        assert!(page.contains("galleonfs_node_volumes{state=\"coming\"} 1"), "{page}");
        assert!(page.contains("galleonfs_node_hung_programs 0"), "{page}");
    }
}
