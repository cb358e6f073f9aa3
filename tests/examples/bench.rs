//! `make bench`: fio through the real device, beside the raw file, on the same disk in the same run.
//!
//! The engine runs in this process as it runs in the node plugin: replica on the disk, FUSE file, loop device. Each
//! round of a job measures the raw file and the device right after each other, because a shared machine is not the same
//! a minute later; what is reported is the median over the rounds. Everything is direct I/O and was written once before.
//!
//! `GALLEONFS_BENCH_DIR` (a directory on the disk to measure), `_SECONDS`, `_ROUNDS`, `_MIB` change the defaults.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use galleonfs_node_plugin::disk::{FormatSpec, format_replica, remove_replica};
use galleonfs_node_plugin::engine::{AttachSpec, Engine, EngineConfig};
use galleonfs_tests::lab::layout::{Layout, write_file};
use galleonfs_tests::lab::{prerequisites, run};
use nix::sys::resource::{UsageWho, getrusage};
use serde_json::{Value, json};
use uuid::Uuid;

const VOLUME: &str = "bench";
const SETUP: &str = "one-replica";

struct Job {
    name: &'static str,
    options: &'static str,
}

const JOBS: &[Job] = &[
    Job {
        name: "randread-4k-qd1",
        options: "--rw=randread --bs=4k --iodepth=1",
    },
    Job {
        name: "randread-4k-qd32",
        options: "--rw=randread --bs=4k --iodepth=32",
    },
    Job {
        name: "randwrite-4k-qd1",
        options: "--rw=randwrite --bs=4k --iodepth=1",
    },
    Job {
        name: "randwrite-4k-qd32",
        options: "--rw=randwrite --bs=4k --iodepth=32",
    },
    Job {
        name: "write-fsync-4k-qd1",
        options: "--rw=randwrite --bs=4k --iodepth=1 --fsync=1",
    },
    Job {
        name: "mixed-70-30-4k-qd32",
        options: "--rw=randrw --rwmixread=70 --bs=4k --iodepth=32",
    },
    Job {
        name: "seqread-1m",
        options: "--rw=read --bs=1m --iodepth=8",
    },
    Job {
        name: "seqwrite-1m",
        options: "--rw=write --bs=1m --iodepth=8",
    },
];

/// What one run of fio found.
#[derive(Clone, Copy, Debug)]
struct Figures {
    iops: f64,
    mbps: f64,
    p50_us: f64,
    p99_us: f64,
    /// Of this process, per I/O.
    cpu_us: f64,
}

fn main() -> Result<()> {
    prerequisites::ensure()?;
    let layout = Layout::new("bench")?;
    let results = layout.checkout().join("target/bench");
    let work = std::env::var_os("GALLEONFS_BENCH_DIR").map_or_else(|| results.join("work"), PathBuf::from);
    let seconds = setting("GALLEONFS_BENCH_SECONDS", 4)?;
    let rounds = setting("GALLEONFS_BENCH_ROUNDS", 3)?;
    let bytes = setting("GALLEONFS_BENCH_MIB", 2048)? << 20;
    ensure!(
        seconds > 0 && rounds > 0 && bytes > 0,
        "seconds, rounds and size must be more than nothing"
    );
    fs::create_dir_all(&work).with_context(|| format!("could not create {}", work.display()))?;

    let tokio = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(1)
        .enable_all()
        .build()?;
    let bench = Bench {
        work: std::path::absolute(work)?,
        bytes,
        seconds,
        rounds,
        tokio,
    };
    let list = bench.run()?;
    print_table(&list);
    let file = results.join("results.json");
    write_file(&file, format!("{:#}\n", Value::from(list)))?;
    println!("\nwritten to {}", file.display());
    Ok(())
}

fn setting(name: &str, default: u64) -> Result<u64> {
    match std::env::var(name) {
        Ok(text) if !text.is_empty() => text
            .parse()
            .with_context(|| format!("{name} must be a number, not {text:?}")),
        _ => Ok(default),
    }
}

struct Bench {
    work: PathBuf,
    bytes: u64,
    seconds: u64,
    rounds: u64,
    tokio: tokio::runtime::Runtime,
}

impl Bench {
    fn run(&self) -> Result<Vec<Value>> {
        let raw = self.work.join("raw");
        let replica = self.work.join("replica");
        let runtime = self.work.join("run");
        self.tokio.block_on(Engine::remove_stale(&runtime))?;
        let _ = fs::remove_file(&raw);
        remove_replica(&replica)?;

        let (volume_uid, replica_uid, cluster_id) = (Uuid::new_v4(), Uuid::new_v4(), Uuid::new_v4());
        let size_bytes = self.bytes;
        format_replica(
            &replica,
            &FormatSpec {
                volume_uid,
                replica_uid,
                cluster_id,
                size_bytes,
                salt: random(),
            },
        )?;
        let engine = Engine::start(EngineConfig {
            shards: 0,
            map_budget_bytes: 256 << 20,
            runtime_dir: runtime,
        })?;
        let device = self.tokio.block_on(engine.attach(AttachSpec {
            volume: VOLUME.to_string(),
            volume_uid,
            replica_uid,
            cluster_id,
            replica_dir: replica.clone(),
            epoch: 1,
            size_bytes,
            read_only: false,
            salt: random(),
        }))?;
        let measured = self.measure(&raw, &device.path);
        // Also after a failure: a device must not outlive its server.
        let detached = self.tokio.block_on(engine.detach(VOLUME));
        let list = measured?;
        detached?;
        remove_replica(&replica)?;
        fs::remove_file(&raw)?;
        Ok(list)
    }

    fn measure(&self, raw: &Path, device: &Path) -> Result<Vec<Value>> {
        for (title, target) in [("raw file", raw), ("device", device)] {
            run::step(&format!("Filling the {title} ({} MiB)", self.bytes >> 20), || {
                self.fio(target, "--rw=write --bs=1m --iodepth=8 --end_fsync=1")
                    .map(drop)
            })?;
        }
        let mut list = Vec::new();
        for job in JOBS {
            let options = format!("{} --time_based --runtime={}", job.options, self.seconds);
            let (mut raws, mut devices, mut ratios) = (Vec::new(), Vec::new(), Vec::new());
            run::step(&format!("{}, {} rounds", job.name, self.rounds), || {
                for _ in 0..self.rounds {
                    let (raw, device) = (self.fio(raw, &options)?, self.fio(device, &options)?);
                    ratios.push(device.iops / raw.iops);
                    raws.push(raw);
                    devices.push(device);
                }
                Ok(())
            })?;
            list.push(entry(job.name, "raw", &raws, 1.0, false));
            list.push(entry(job.name, SETUP, &devices, median(ratios), true));
        }
        Ok(list)
    }

    fn fio(&self, target: &Path, options: &str) -> Result<Figures> {
        let mut command = run::command(
            "fio",
            [
                "--name=job",
                "--ioengine=io_uring",
                "--direct=1",
                "--output-format=json",
            ],
        );
        command.args(["--norandommap=1", "--randrepeat=0", "--refill_buffers=1"]);
        // One report for reads and writes together; latencies that include the submission.
        command.args([
            "--unified_rw_reporting=1",
            "--lat_percentiles=1",
            "--clat_percentiles=0",
        ]);
        command
            .arg(format!("--size={}", self.bytes))
            .arg(format!("--filename={}", target.display()));
        command.args(options.split_whitespace());
        let before = cpu()?;
        let said = run::output(&mut command)?;
        let cpu = cpu()?.saturating_sub(before);
        // fio may say a word before its JSON begins.
        let json: Value = serde_json::from_str(&said[said.find('{').context("fio said no JSON")?..])?;
        let job = &json["jobs"][0]["mixed"];
        let number = |value: &Value| value.as_f64().with_context(|| format!("fio left something out: {job}"));
        let percentile = |which: &str| number(&job["lat_ns"]["percentile"][which]).map(|ns| ns / 1000.0);
        Ok(Figures {
            iops: number(&job["iops"])?,
            mbps: number(&job["bw_bytes"])? / 1e6,
            p50_us: percentile("50.000000")?,
            p99_us: percentile("99.000000")?,
            cpu_us: cpu.as_secs_f64() * 1e6 / number(&job["total_ios"])?.max(1.0),
        })
    }
}

fn random() -> u64 {
    Uuid::new_v4().as_u64_pair().1
}

/// User and system time of this process, i.e. of the engine: fio is a process of its own.
fn cpu() -> Result<Duration> {
    let usage = getrusage(UsageWho::RUSAGE_SELF)?;
    let micros = |time: nix::sys::time::TimeVal| time.tv_sec() as u64 * 1_000_000 + time.tv_usec() as u64;
    Ok(Duration::from_micros(
        micros(usage.user_time()) + micros(usage.system_time()),
    ))
}

fn entry(job: &str, setup: &str, rounds: &[Figures], ratio: f64, served: bool) -> Value {
    let of = |pick: fn(&Figures) -> f64| round(median(rounds.iter().map(pick).collect()));
    json!({
        "job": job,
        "setup": setup,
        "iops": of(|figures| figures.iops),
        "mbps": of(|figures| figures.mbps),
        "p50_us": of(|figures| figures.p50_us),
        "p99_us": of(|figures| figures.p99_us),
        "ratio": round(ratio),
        // Nobody serves the raw file.
        "cpu_us": if served { of(|figures| figures.cpu_us) } else { 0.0 },
    })
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    let middle = values.len() / 2;
    if values.len() % 2 == 1 {
        values[middle]
    } else {
        (values[middle - 1] + values[middle]) / 2.0
    }
}

fn round(value: f64) -> f64 {
    (value * 1000.0).round() / 1000.0
}

fn print_table(list: &[Value]) {
    println!(
        "\n{:<22}{:>10}{:>10}{:>9}{:>9}{:>9}{:>9}{:>9}{:>8}",
        "job", "raw iops", "iops", "MB/s", "raw p50", "p50 us", "p99 us", "cpu us", "ratio"
    );
    for pair in list.chunks_exact(2) {
        let (raw, ours) = (&pair[0], &pair[1]);
        let number = |value: &Value| value.as_f64().unwrap_or_default();
        println!(
            "{:<22}{:>10.0}{:>10.0}{:>9.0}{:>9.0}{:>9.0}{:>9.0}{:>9.1}{:>8.2}",
            ours["job"].as_str().unwrap_or_default(),
            number(&raw["iops"]),
            number(&ours["iops"]),
            number(&ours["mbps"]),
            number(&raw["p50_us"]),
            number(&ours["p50_us"]),
            number(&ours["p99_us"]),
            number(&ours["cpu_us"]),
            number(&ours["ratio"]),
        );
    }
}
