//! `galleonfs check`: verifies one replica that nobody has open, with the code the engine itself reads it by.
//!
//! Standard output says what was found, for a person or as JSON. The process ends with 0 when every byte that matters
//! passed, with 1 when something is wrong or the directory holds no replica.

mod disk;

use std::{io::Write, path::Path, process::ExitCode};

use anyhow::{Context, Result};
use galleonfs_storage_engine::store::{
    OpenError, Superblock,
    check::{CheckReport, check as verify},
    inspect,
};
use serde_json::{Value, json};

use disk::ReadOnlyDisk;

/// Most problems that are listed for a person; JSON has them all.
const LISTED_MAX: usize = 50;

pub(crate) fn check(directory: &Path, as_json: bool, to: &mut impl Write) -> Result<ExitCode> {
    let mut disk = ReadOnlyDisk::open(directory)?;
    let superblock = inspect(&mut disk).map_err(|error| refusal(error, directory))?;
    let report = verify(&mut disk).map_err(|error| refusal(error, directory))?;
    let printed = if as_json {
        writeln!(to, "{:#}", to_json(directory, &superblock, &report))
    } else {
        print(to, directory, &superblock, &report)
    };
    printed.context("printing what was found")?;
    Ok(if report.problems.is_empty() {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}

/// What cannot be checked at all, and what to do about it.
fn refusal(error: OpenError, directory: &Path) -> anyhow::Error {
    let advice = match &error {
        OpenError::NotFormatted => "; name the replica's directory, <pool>/replicas/<uid>, in which superblock.0 lies",
        OpenError::Damaged(_) => "; nothing was changed: keep a copy of the directory before anything else is tried",
        _ => "",
    };
    anyhow::anyhow!("{error}{advice}").context(format!("checking {}", directory.display()))
}

fn print(to: &mut impl Write, directory: &Path, superblock: &Superblock, report: &CheckReport) -> std::io::Result<()> {
    let identity = &superblock.geometry.identity;
    writeln!(to, "{}", directory.display())?;
    writeln!(to, "  volume   {}", uid(&identity.volume))?;
    writeln!(to, "  replica  {}", uid(&identity.replica))?;
    writeln!(to, "  cluster  {}", uid(&identity.cluster))?;
    writeln!(to, "  size     {} bytes", superblock.size_bytes())?;
    writeln!(
        to,
        "  verified {} blocks, {} map pages, {} log records behind the checkpoint, in {} segments",
        report.blocks, report.pages, report.replayed_records, report.segments
    )?;
    if let Some(digest) = &report.digest {
        writeln!(to, "  digest   {}", hex(digest))?;
    }
    for note in &report.notes {
        writeln!(to, "  note: {note}")?;
    }
    for problem in report.problems.iter().take(LISTED_MAX) {
        writeln!(to, "  PROBLEM: {problem}")?;
    }
    match report.problems.len() {
        0 => writeln!(to, "good: every block was read and passed its check"),
        found if found > LISTED_MAX => writeln!(
            to,
            "{found} problems, of which {LISTED_MAX} are listed: --json lists all"
        ),
        found => writeln!(to, "{found} problem{}", if found == 1 { "" } else { "s" }),
    }
}

fn to_json(directory: &Path, superblock: &Superblock, report: &CheckReport) -> Value {
    let identity = &superblock.geometry.identity;
    json!({
        "directory": directory.display().to_string(),
        "good": report.problems.is_empty(),
        "volume": uid(&identity.volume),
        "replica": uid(&identity.replica),
        "cluster": uid(&identity.cluster),
        "sizeBytes": superblock.size_bytes(),
        "blocks": report.blocks,
        "pages": report.pages,
        "replayedRecords": report.replayed_records,
        "segments": report.segments,
        "digest": report.digest.as_ref().map(|digest| hex(digest)),
        "problems": report.problems,
        "notes": report.notes,
    })
}

/// As Kubernetes writes uids.
fn uid(bytes: &[u8; 16]) -> String {
    let hex = hex(bytes);
    [&hex[..8], &hex[8..12], &hex[12..16], &hex[16..20], &hex[20..]].join("-")
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}
