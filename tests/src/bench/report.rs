//! What the rounds amount to: medians, a table for people, a list for programs.

use std::fmt::Write;

use serde::Serialize;

use super::fio::Measured;
use super::job::Job;
use super::setup::Setup;

/// One run of a job on the raw file and, seconds later, one on our device.
#[derive(Clone, Copy, Debug)]
pub struct Pair {
    pub raw: Measured,
    pub ours: Measured,
    /// CPU time of our process per operation, in microseconds.
    pub cpu_us: f64,
}

/// One line of the results.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Row {
    pub job: String,
    pub setup: String,
    pub iops: f64,
    pub mbps: f64,
    pub p50_us: f64,
    pub p99_us: f64,
    /// Operations per second, as a share of the raw file's in the same round.
    pub ratio: f64,
    pub cpu_us: f64,
    /// The lowest and the highest ratio of a round: how much the median is worth.
    #[serde(skip)]
    pub ratio_range: (f64, f64),
}

/// The rows of a job: the raw file's, and one for each setup, whose pairs these are. Every figure is the median of its
/// own over the rounds.
pub fn rows(job: &Job, setups: &[Setup], found: &[Vec<Pair>]) -> Vec<Row> {
    let raw = found.first().map(|pairs| row(job, "raw", pairs, |pair| pair.raw));
    let ours = setups.iter().zip(found).map(|(setup, pairs)| {
        // A ratio is taken within its round: the disk of a shared machine is another one a minute later.
        let ratios: Vec<f64> = pairs.iter().map(|pair| pair.ours.iops / pair.raw.iops).collect();
        Row {
            ratio_range: ratios.iter().fold((f64::INFINITY, 0.0), |(low, high), ratio| {
                (low.min(*ratio), high.max(*ratio))
            }),
            ratio: median(ratios),
            cpu_us: median(pairs.iter().map(|pair| pair.cpu_us).collect()),
            ..row(job, setup.name(), pairs, |pair| pair.ours)
        }
    });
    raw.into_iter().chain(ours).collect()
}

/// The figures of one side of the pairs.
fn row(job: &Job, setup: &str, pairs: &[Pair], side: impl Fn(&Pair) -> Measured) -> Row {
    let of = |figure: fn(Measured) -> f64| median(pairs.iter().map(|pair| figure(side(pair))).collect());
    Row {
        job: job.name.to_owned(),
        setup: setup.to_owned(),
        iops: of(|measured| measured.iops),
        mbps: of(|measured| measured.mbps),
        p50_us: of(|measured| measured.p50_us),
        p99_us: of(|measured| measured.p99_us),
        ratio: 1.0,
        cpu_us: 0.0,
        ratio_range: (1.0, 1.0),
    }
}

/// The figure in the middle; of an even number, the mean of the two there.
fn median(mut figures: Vec<f64>) -> f64 {
    figures.sort_by(f64::total_cmp);
    let middle = figures.len() / 2;
    match figures.len() {
        0 => f64::NAN,
        even if even.is_multiple_of(2) => (figures[middle - 1] + figures[middle]) / 2.0,
        _ => figures[middle],
    }
}

/// The rows as a table.
pub fn table(rows: &[Row]) -> String {
    let mut text = String::new();
    let mut line = |cells: [&str; 8]| {
        let [job, setup, iops, mbps, p50, p99, ratio, cpu] = cells;
        writeln!(
            text,
            "{job:<22} {setup:<20} {iops:>9} {mbps:>8} {p50:>9} {p99:>9}   {ratio:<18} {cpu:>9}"
        )
        .expect("a string takes everything");
    };
    line([
        "job",
        "setup",
        "IOPS",
        "MB/s",
        "p50 us",
        "p99 us",
        "ratio (low..high)",
        "CPU us/IO",
    ]);
    for row in rows {
        let raw = row.setup == "raw";
        let (low, high) = row.ratio_range;
        line([
            if raw { &row.job } else { "" },
            &row.setup,
            &format!("{:.0}", row.iops),
            &format!("{:.0}", row.mbps),
            &format!("{:.0}", row.p50_us),
            &format!("{:.0}", row.p99_us),
            &if raw {
                String::new()
            } else {
                format!("{:.2} ({low:.2}..{high:.2})", row.ratio)
            },
            &if raw {
                String::new()
            } else {
                format!("{:.1}", row.cpu_us)
            },
        ]);
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bench::job::JOBS;

    fn measured(iops: f64) -> Measured {
        Measured {
            iops,
            mbps: iops / 100.0,
            p50_us: 10.0,
            p99_us: 20.0,
            count: 100,
        }
    }

    fn pair(raw: f64, ours: f64) -> Pair {
        Pair {
            raw: measured(raw),
            ours: measured(ours),
            cpu_us: 5.0,
        }
    }

    #[test]
    fn a_ratio_is_of_one_round_and_not_of_two_medians() {
        let pairs = vec![pair(100.0, 50.0), pair(1000.0, 500.0), pair(200.0, 40.0)];
        let sealed = vec![pair(100.0, 10.0), pair(1000.0, 100.0), pair(200.0, 20.0)];
        let rows = rows(&JOBS[0], &Setup::ALL, &[pairs, sealed]);
        let [raw, ours, sealed] = &rows[..] else {
            panic!("three rows")
        };
        assert_eq!((sealed.setup.as_str(), sealed.ratio), ("sealed", 0.1));
        assert_eq!((raw.iops, raw.ratio, raw.cpu_us), (200.0, 1.0, 0.0));
        assert_eq!((ours.iops, ours.ratio, ours.cpu_us), (50.0, 0.5, 5.0));
        assert_eq!(ours.ratio_range, (0.2, 0.5));
    }

    #[test]
    fn the_median_of_an_even_number_is_between_the_two_in_the_middle() {
        assert_eq!(median(vec![4.0, 1.0, 3.0, 2.0]), 2.5);
        assert_eq!(median(vec![7.0]), 7.0);
    }

    #[test]
    fn a_row_is_written_with_the_fields_that_others_read() {
        let rows = rows(&JOBS[0], &[Setup::OneReplica], &[vec![pair(100.0, 50.0)]]);
        let json = serde_json::to_value(&rows[0]).unwrap();
        let mut fields: Vec<&str> = json.as_object().unwrap().keys().map(String::as_str).collect();
        fields.sort_unstable();
        let mut known = ["job", "setup", "iops", "mbps", "p50_us", "p99_us", "ratio", "cpu_us"];
        known.sort_unstable();
        assert_eq!(fields, known);
    }
}
