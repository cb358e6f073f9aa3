//! A guest that writes, reads and verifies at a pace of its own, and notices each error and each pause.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use galleonfs_tests::lab::run::wait_for;
use serde_json::Value;

use super::super::world::SOON;
use super::volume::Volume;

/// One file is written at random places, each block once, so fio knows what must be everywhere when it verifies in the end.
/// Another one is there already, and is read and verified all the time.
const WRITES_PER_SECOND: u64 = 300;
const READS_PER_SECOND: u64 = 150;
const COMMON: &str = "--directory=/data --ioengine=libaio --direct=1 --bs=4k --verify=crc32c --verify_fatal=1";
const BASE: &str = "--name=base --filename=base --size=16M --iodepth=16";
/// Before the load is what it will be.
const WRITES_BEFORE: u64 = 200;

pub struct Load<'a> {
    volume: &'a Volume<'a>,
    lasts: Duration,
}

/// What the guest has seen.
#[derive(Debug)]
pub struct Seen {
    /// The longest that a request took.
    pub longest: Duration,
    pub writes: u64,
}

impl<'a> Load<'a> {
    /// Starts it for so long, not counting pauses, and waits until it is under way.
    pub fn start(volume: &'a Volume<'a>, lasts: Duration) -> Result<Self> {
        let prepare = format!(
            "test -e /data/base || fio {COMMON} {BASE} --rw=write --do_verify=0 --end_fsync=1; rm -f /data/load /tmp/load.*"
        );
        volume.shell(&prepare)?;
        let seconds = lasts.as_secs();
        let kib = seconds * WRITES_PER_SECOND * 4;
        let fio = format!(
            "fio --output=/tmp/load.json --output-format=json {COMMON} {BASE} --rw=randread --iodepth=4 \
             --rate_iops={READS_PER_SECOND} --time_based --runtime={seconds} --name=load --filename=load --size={kib}k \
             --rw=randwrite --iodepth=8 --rate_iops={WRITES_PER_SECOND} --fsync=64"
        );
        let line = format!("{fio} >/tmp/load.log 2>&1; echo $? >/tmp/load.rc");
        volume.shell(&format!("setsid sh -c '{line}' >/dev/null 2>&1 </dev/null &"))?;
        volume.device()?.wait_writes(WRITES_BEFORE)?;
        Ok(Self { volume, lasts })
    }

    /// Waits for its end. Fails if the guest was told of an error or found other data than it wrote.
    pub fn end(self) -> Result<Seen> {
        let code = wait_for("the load to end", self.lasts + 2 * SOON, || {
            let said = self.volume.shell("cat /tmp/load.rc 2>/dev/null || true")?;
            Ok(said.trim().parse::<i32>().ok())
        })?;
        let told = self.volume.shell("cat /tmp/load.json; cat /tmp/load.log >&2")?;
        ensure!(
            code == 0,
            "fio ended with {code}: {}\n{}",
            told.lines().take(20).collect::<Vec<_>>().join("\n"),
            self.volume
                .shell("dmesg 2>/dev/null | tail -n 5; tail -n 20 /tmp/load.log")
                .unwrap_or_default()
        );
        let json = told.find('{').map(|at| &told[at..]).context("fio said nothing")?;
        let report: Value = serde_json::from_str(json).context("fio did not answer with JSON")?;
        let jobs = report["jobs"].as_array().context("no jobs")?;
        ensure!(jobs.len() == 2, "{} jobs instead of two", jobs.len());
        let nanoseconds = |value: &Value| value.as_u64().unwrap_or_default();
        let longest = jobs.iter().flat_map(|job| {
            let of = |kind: &str| nanoseconds(&job[kind]["lat_ns"]["max"]);
            [of("read"), of("write"), of("sync")]
        });
        let seen = Seen {
            longest: Duration::from_nanos(longest.max().unwrap_or_default()),
            writes: jobs.iter().map(|job| nanoseconds(&job["write"]["total_ios"])).sum(),
        };
        ensure!(
            seen.writes == self.lasts.as_secs() * WRITES_PER_SECOND,
            "fio wrote {} blocks",
            seen.writes
        );
        println!(
            "    {} writes, all verified; the longest request took {} ms",
            seen.writes,
            seen.longest.as_millis()
        );
        Ok(seen)
    }
}
