//! The jobs: what fio is asked to do, the same for every device.

use std::time::Duration;

/// One access pattern.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Job {
    pub name: &'static str,
    /// fio's word for it.
    pub pattern: &'static str,
    pub block: &'static str,
    pub depth: u32,
    /// Percent of reads, of a pattern that mixes them.
    pub reads_percent: Option<u32>,
    /// A sync behind each write.
    pub sync: bool,
    /// The volume is overwritten before, once over and at random: its log has come round, and there is something to clean.
    pub aged: bool,
}

const RANDOM_4K: Job = Job {
    name: "",
    pattern: "randread",
    block: "4k",
    depth: 1,
    reads_percent: None,
    sync: false,
    aged: false,
};

const SEQUENTIAL_1M: Job = Job {
    block: "1m",
    depth: 8,
    ..RANDOM_4K
};

/// In the order they run in: first what reads the volume as it was filled, then what writes, then random writes to a
/// volume whose log has to be cleaned, and in the end a scan of what the random writes left. A log puts blocks where they
/// were written, not where they belong, so the two scans differ, and both are told. Results of different days are compared by these names.
pub const JOBS: [Job; 10] = [
    Job {
        name: "randread-4k-qd1",
        ..RANDOM_4K
    },
    Job {
        name: "randread-4k-qd32",
        depth: 32,
        ..RANDOM_4K
    },
    Job {
        name: "seqread-1m",
        pattern: "read",
        ..SEQUENTIAL_1M
    },
    Job {
        name: "seqwrite-1m",
        pattern: "write",
        ..SEQUENTIAL_1M
    },
    Job {
        name: "randwrite-4k-qd1",
        pattern: "randwrite",
        ..RANDOM_4K
    },
    Job {
        name: "randwrite-4k-qd32",
        pattern: "randwrite",
        depth: 32,
        ..RANDOM_4K
    },
    Job {
        name: "write-fsync-4k-qd1",
        pattern: "randwrite",
        sync: true,
        ..RANDOM_4K
    },
    Job {
        name: "mixed-70-30-4k-qd32",
        pattern: "randrw",
        depth: 32,
        reads_percent: Some(70),
        ..RANDOM_4K
    },
    Job {
        name: "randwrite-4k-qd32-aged",
        pattern: "randwrite",
        depth: 32,
        aged: true,
        ..RANDOM_4K
    },
    Job {
        name: "seqread-1m-aged",
        pattern: "read",
        ..SEQUENTIAL_1M
    },
];

/// What a guest does while a replica is brought up to date.
pub const BESIDE_A_RESYNC: [Job; 2] = [
    Job {
        name: "randread-4k-qd4",
        depth: 4,
        ..RANDOM_4K
    },
    Job {
        name: "randwrite-4k-qd4",
        pattern: "randwrite",
        depth: 4,
        ..RANDOM_4K
    },
];

impl Job {
    /// fio's arguments for one run.
    pub fn arguments(&self, time: Duration) -> Vec<String> {
        let mut arguments = vec![
            format!("--name={}", self.name),
            format!("--rw={}", self.pattern),
            format!("--bs={}", self.block),
            format!("--iodepth={}", self.depth),
            format!("--runtime={}ms", time.as_millis()),
            "--time_based".to_owned(),
            // Every run its own random order, and any block again at any time.
            "--randrepeat=0".to_owned(),
            "--norandommap=1".to_owned(),
        ];
        if let Some(reads) = self.reads_percent {
            arguments.push(format!("--rwmixread={reads}"));
            // One figure for both directions.
            arguments.push("--unified_rw_reporting=mixed".to_owned());
        }
        if self.sync {
            arguments.push("--fsync=1".to_owned());
        }
        arguments
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_jobs_are_the_ones_that_results_are_compared_by() {
        let names: Vec<&str> = JOBS.iter().map(|job| job.name).collect();
        let known = [
            "randread-4k-qd1",
            "randread-4k-qd32",
            "seqread-1m",
            "seqwrite-1m",
            "randwrite-4k-qd1",
            "randwrite-4k-qd32",
            "write-fsync-4k-qd1",
            "mixed-70-30-4k-qd32",
            "randwrite-4k-qd32-aged",
            "seqread-1m-aged",
        ];
        assert_eq!(names, known);
    }
}
