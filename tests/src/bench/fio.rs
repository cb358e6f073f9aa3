//! Running fio and reading what it measured.
//!
//! fio runs as one process (`--thread`) that dies with us, so that ending it ends its I/O, too, and its device can go.

use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use serde_json::Value;

use super::interrupt::Interrupt;
use super::job::Job;

/// What one run of a job gave.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Measured {
    pub iops: f64,
    /// Millions of bytes per second.
    pub mbps: f64,
    /// From the submission to the completion; where each write is synced, of the write and the sync together.
    pub p50_us: f64,
    pub p99_us: f64,
    /// Operations in all.
    pub count: u64,
}

/// fio on one file or device.
#[derive(Debug)]
pub struct Fio<'a> {
    pub target: PathBuf,
    pub size_bytes: u64,
    pub interrupt: &'a Interrupt,
}

/// Says in one line what to do if there is no fio.
pub fn ensure() -> Result<()> {
    match Command::new("fio").arg("--version").output() {
        Ok(found) if found.status.success() => Ok(()),
        _ => bail!("fio is missing, and it is what measures: install it (Debian and Ubuntu: apt-get install fio)"),
    }
}

impl Fio<'_> {
    /// Writes all of it once, so that no later access finds a hole.
    pub fn fill(&self) -> Result<()> {
        let arguments = ["--name=fill", "--rw=write", "--bs=1m", "--iodepth=8", "--end_fsync=1"];
        self.run(arguments.map(str::to_owned).to_vec()).map(drop)
    }

    /// Writes as much as it holds at random places.
    pub fn age(&self) -> Result<()> {
        self.overwrite(self.size_bytes)
    }

    /// Writes so much at random places.
    pub fn overwrite(&self, bytes: u64) -> Result<()> {
        let arguments = [
            "--name=overwrite",
            "--rw=randwrite",
            "--bs=4k",
            "--iodepth=32",
            "--norandommap=1",
            "--randrepeat=0",
        ];
        let arguments = arguments.map(str::to_owned).into_iter();
        self.run(arguments.chain([format!("--io_size={bytes}")]).collect())
            .map(drop)
    }

    pub fn measure(&self, job: &Job, time: Duration) -> Result<Measured> {
        let report = self.run(job.arguments(time))?;
        parse(&report, job.sync).with_context(|| format!("read what fio reports of {}", job.name))
    }

    fn run(&self, arguments: Vec<String>) -> Result<String> {
        let mut command = Command::new("fio");
        command
            .args(arguments)
            .arg(format!("--filename={}", escape(&self.target)))
            .arg(format!("--size={}", self.size_bytes))
            .args(["--ioengine=io_uring", "--direct=1", "--thread=1"])
            .args(["--lat_percentiles=1", "--clat_percentiles=0", "--percentile_list=50:99"])
            .arg("--output-format=json")
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        // SAFETY: prctl is async-signal-safe and touches nothing that the parent shares.
        unsafe {
            command.pre_exec(|| {
                nix::sys::prctl::set_pdeathsig(nix::sys::signal::Signal::SIGKILL)?;
                Ok(())
            });
        }
        let output = self.interrupt.output(command).context("run fio")?;
        let report = String::from_utf8_lossy(&output.stdout).into_owned();
        if !output.status.success() {
            let said = String::from_utf8_lossy(&output.stderr);
            let first: Vec<&str> = said.lines().chain(report.lines()).take(6).collect();
            bail!(
                "fio on {} ended with {}: {}",
                self.target.display(),
                output.status,
                first.join("; ")
            );
        }
        Ok(report)
    }
}

/// fio takes a colon for the end of a file name.
fn escape(path: &Path) -> String {
    path.display().to_string().replace(':', "\\:")
}

fn parse(report: &str, sync: bool) -> Result<Measured> {
    // Notes may stand before the report.
    let start = report.find('{').context("there is no report")?;
    let report: Value = serde_json::from_str(&report[start..])?;
    let job = &report["jobs"][0];
    let directions = ["mixed", "read", "write"].map(|name| &job[name]);
    let moved = directions
        .into_iter()
        .find(|found| found["total_ios"].as_u64().is_some_and(|count| count > 0))
        .context("not one operation was done")?;
    let number = |value: &Value, name: &str| value.as_f64().with_context(|| format!("there is no {name}"));
    let percentile = |of: &Value, percent: &str| {
        number(&of["lat_ns"]["percentile"][percent], &format!("percentile {percent}")).map(|ns| ns / 1e3)
    };
    let mut measured = Measured {
        iops: number(&moved["iops"], "iops")?,
        mbps: number(&moved["bw_bytes"], "bw_bytes")? / 1e6,
        p50_us: percentile(moved, "50.000000")?,
        p99_us: percentile(moved, "99.000000")?,
        count: moved["total_ios"].as_u64().context("there is no total_ios")?,
    };
    if sync {
        measured.p50_us += percentile(&job["sync"], "50.000000")?;
        measured.p99_us += percentile(&job["sync"], "99.000000")?;
    }
    Ok(measured)
}

#[cfg(test)]
mod tests {
    use super::*;

    const SYNCED: &str = r#"fio: a note
        {"jobs": [{
            "read": {"total_ios": 0, "iops": 0.0, "bw_bytes": 0, "lat_ns": {"min": 0}},
            "write": {"total_ios": 975, "iops": 973.5, "bw_bytes": 4000000,
                "lat_ns": {"percentile": {"50.000000": 61696, "99.000000": 90000}}},
            "sync": {"total_ios": 975, "lat_ns": {"percentile": {"50.000000": 102912, "99.000000": 910000}}}
        }]}"#;

    #[test]
    fn a_synced_write_takes_as_long_as_the_write_and_its_sync() {
        let expected = Measured {
            iops: 973.5,
            mbps: 4.0,
            p50_us: 164.608,
            p99_us: 1000.0,
            count: 975,
        };
        assert_eq!(parse(SYNCED, true).unwrap(), expected);
    }

    #[test]
    fn a_mix_is_one_figure() {
        let report = r#"{"jobs": [{"mixed": {"total_ios": 9, "iops": 4.5, "bw_bytes": 18000,
            "lat_ns": {"percentile": {"50.000000": 1000, "99.000000": 2000}}}}]}"#;
        let measured = parse(report, false).unwrap();
        assert_eq!((measured.iops, measured.p99_us, measured.count), (4.5, 2.0, 9));
    }

    #[test]
    fn a_run_that_did_nothing_is_no_result() {
        let report = SYNCED.replace("975", "0");
        assert!(parse(&report, true).is_err());
    }
}
