//! Metrics, gathered when somebody asks. Nothing is counted a second time for them: they are read off the engine and the
//! tables.

use prometheus::core::Collector;
use prometheus::{IntCounter, IntCounterVec, IntGauge, IntGaugeVec, Opts, Registry, TextEncoder};

use crate::engine::StoreReport;
use crate::mount::HungChildren;
use crate::served::{NodeEngine, Served, VolumeMetrics};

/// A figure per volume: name, help, and where its value is in what is known of the volume.
type Figure<T> = (&'static str, &'static str, fn(&T) -> u64);

const COUNTERS: [Figure<VolumeMetrics>; 8] = [
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
    (
        "galleonfs_volume_comparisons_total",
        "Times that all replicas were compared with each other.",
        |volume| volume.compared.passes,
    ),
    (
        "galleonfs_volume_differing_ranges_total",
        "Ranges of blocks in which one of them had lost a confirmed write, and was given it again.",
        |volume| volume.compared.differing,
    ),
];

const GAUGES: [Figure<VolumeMetrics>; 4] = [
    (
        "galleonfs_volume_inflight",
        "Requests that are not answered yet.",
        |volume| volume.inflight,
    ),
    (
        "galleonfs_volume_lag_writes",
        "Writes that were answered and that the replica furthest behind does not have yet (write concern acknowledged).",
        |volume| volume.lag.writes,
    ),
    ("galleonfs_volume_lag_bytes", "Bytes of these writes.", |volume| {
        volume.lag.bytes
    }),
    (
        "galleonfs_volume_lag_milliseconds",
        "How long that replica has said nothing of them.",
        |volume| volume.lag.ms,
    ),
];

/// Write amplification is the sum of what is stored, headers, filled, moved and map over the first.
const STORE_COUNTERS: [Figure<StoreReport>; 9] = [
    (
        "galleonfs_store_guest_bytes_total",
        "Bytes of blocks that the guest wrote, before they were compressed.",
        |store| store.stats.written_bytes,
    ),
    (
        "galleonfs_store_stored_bytes_total",
        "Bytes that these blocks are stored in.",
        |store| store.stats.stored_bytes,
    ),
    (
        "galleonfs_store_copied_bytes_total",
        "Of these, bytes that were copied from another replica.",
        |store| store.stats.copied_bytes,
    ),
    (
        "galleonfs_store_header_bytes_total",
        "Bytes of headers written.",
        |store| store.stats.header_bytes,
    ),
    (
        "galleonfs_store_filled_bytes_total",
        "Bytes of zeros written into new segments.",
        |store| store.stats.filled_bytes,
    ),
    (
        "galleonfs_store_moved_bytes_total",
        "Bytes of blocks that the cleaner moved.",
        |store| store.stats.moved_bytes,
    ),
    (
        "galleonfs_store_map_bytes_total",
        "Bytes of map pages written.",
        |store| store.stats.map_bytes,
    ),
    ("galleonfs_store_checkpoints_total", "Checkpoints made.", |store| {
        store.stats.checkpoints
    }),
    (
        "galleonfs_store_damaged_blocks_total",
        "Times that a block did not pass its check.",
        |store| store.stats.damaged_blocks,
    ),
];

const STORE_GAUGES: [Figure<StoreReport>; 3] = [
    (
        "galleonfs_store_allocated_bytes",
        "Bytes that the replica takes from its pool.",
        |store| store.stats.allocated_bytes,
    ),
    (
        "galleonfs_store_live_bytes",
        "Bytes of blocks and pages that the last checkpoint needs.",
        |store| store.stats.live_bytes,
    ),
    ("galleonfs_store_cached_map_pages", "Map pages in memory.", |store| {
        store.stats.cached_pages
    }),
];

/// They begin anew with each attach.
const SCRUB_GAUGES: [Figure<StoreReport>; 5] = [
    (
        "galleonfs_scrub_pass",
        "The pass over everything stored that is under way, or was the last; 0 before the first.",
        |store| store.scrub.pass,
    ),
    ("galleonfs_scrub_running", "1 while a pass is under way.", |store| {
        u64::from(store.scrub.running)
    }),
    (
        "galleonfs_scrub_verified_bytes",
        "Bytes that passed their checks in this pass.",
        |store| store.scrub.verified_bytes,
    ),
    (
        "galleonfs_scrub_total_bytes",
        "Bytes that were stored when this pass began.",
        |store| store.scrub.total_bytes,
    ),
    (
        "galleonfs_scrub_damaged",
        "Places that are known to be damaged.",
        |store| store.scrub.damaged_count,
    ),
];

/// The page for Prometheus.
pub fn render(engine: &dyn NodeEngine, served: &Served, hung: &HungChildren) -> Result<String, prometheus::Error> {
    let registry = Registry::new();
    let add = |metric: Box<dyn Collector>| registry.register(metric);
    let volumes = engine.metrics();
    add_counters(&registry, &COUNTERS, &volumes)?;
    add_gauges(&registry, &GAUGES, &volumes)?;
    let stores = engine.stores();
    add_counters(&registry, &STORE_COUNTERS, &stores)?;
    add_gauges(&registry, &STORE_GAUGES, &stores)?;
    add_gauges(&registry, &SCRUB_GAUGES, &stores)?;
    let states = IntGaugeVec::new(
        Opts::new("galleonfs_node_volumes", "Volumes wanted on this node, by state."),
        &["state"],
    )?;
    let (here, coming, failed) = served.counts();
    for (state, count) in [("here", here), ("coming", coming), ("failed", failed)] {
        states.with_label_values(&[state]).set(count as i64);
    }
    add(Box::new(states))?;
    let refused = IntCounter::new(
        "galleonfs_node_refused_orders_total",
        "Orders to replicas on this node from nodes that do not lead the volume by its object.",
    )?;
    refused.inc_by(engine.refused_orders());
    add(Box::new(refused))?;
    let children = IntGauge::new(
        "galleonfs_node_hung_programs",
        "Programs that hang in the kernel and cannot be killed.",
    )?;
    children.set(hung.count() as i64);
    add(Box::new(children))?;
    TextEncoder::new().encode_to_string(&registry.gather())
}

fn add_counters<T>(registry: &Registry, figures: &[Figure<T>], volumes: &[(String, T)]) -> prometheus::Result<()> {
    for (name, help, value) in figures {
        let counter = IntCounterVec::new(Opts::new(*name, *help), &["volume"])?;
        for (volume, known) in volumes {
            counter.with_label_values(&[volume]).inc_by(value(known));
        }
        registry.register(Box::new(counter))?;
    }
    Ok(())
}

fn add_gauges<T>(registry: &Registry, figures: &[Figure<T>], volumes: &[(String, T)]) -> prometheus::Result<()> {
    for (name, help, value) in figures {
        let gauge = IntGaugeVec::new(Opts::new(*name, *help), &["volume"])?;
        for (volume, known) in volumes {
            gauge
                .with_label_values(&[volume])
                .set(i64::try_from(value(known)).unwrap_or(i64::MAX));
        }
        registry.register(Box::new(gauge))?;
    }
    Ok(())
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
        assert!(page.contains("galleonfs_node_refused_orders_total 0"), "{page}");
    }
}
