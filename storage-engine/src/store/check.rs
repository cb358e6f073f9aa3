//! Verifying a replica offline, with the code that the engine itself reads it by. Nothing is written.

use std::collections::BTreeMap;

use super::log::Op;
use super::memtable::Memtable;
use super::page::{Entry, FANOUT, PageKind, PageName, span};
use super::record::Seals;
use super::recovery::{Found, OpenError, read_page, read_superblocks, read_table, replay, segment_files};
use super::segment::Used;
use super::superblock::Superblock;
use crate::buffer::BufMut;
use crate::io::{Disk, FileId, SegmentId};
use crate::types::{BLOCK_BYTES, Lba};

/// What a check found.
#[derive(Debug, Default)]
pub struct CheckReport {
    /// What is wrong, one sentence each. Empty means that every byte that matters passed.
    pub problems: Vec<String>,
    /// What is worth knowing, and harms nothing.
    pub notes: Vec<String>,
    /// Blocks of the volume that hold data and were read and verified.
    pub blocks: u64,
    /// Pages of the map that were verified.
    pub pages: u64,
    /// Records behind the checkpoint.
    pub replayed_records: u64,
    /// Used segments.
    pub segments: u64,
}

/// Verifies the whole replica: superblocks, segment table, map, every block that is needed, and the tail of the log.
/// Fails only if the replica cannot be read at all.
pub fn check(on: &mut dyn Disk) -> Result<CheckReport, OpenError> {
    let Found { superblock, other, .. } = read_superblocks(on)?;
    let mut report = CheckReport::default();
    if let Some(wrong) = other {
        report
            .problems
            .push(format!("{wrong} (the other one is valid and is used)"));
    }
    let files = segment_files(on)?;
    let (used, table_pages) = read_table(on, &superblock)?;
    report.segments = used.len() as u64;
    for id in used.keys().filter(|id| !files.contains_key(id)) {
        report.problems.push(format!("segment {} is missing", id.0));
    }
    let mut walk = Walk {
        on,
        superblock: &superblock,
        report,
        live: BTreeMap::new(),
        blocks: BTreeMap::new(),
    };
    for location in table_pages {
        *walk.live.entry(location.segment()).or_default() += 1;
    }
    let top = PageName {
        level: superblock.checkpoint.height - 1,
        index: 0,
    };
    walk.page(top, superblock.checkpoint.root);
    let Walk {
        mut report,
        live,
        mut blocks,
        ..
    } = walk;
    compare_live(&mut report, &used, &live);

    match replay(on, &superblock, &files, &used) {
        Ok(tail) => {
            let mut table = Memtable::default();
            for op in &tail.ops {
                match *op {
                    Op::Block(lba, entry) => table.insert(lba, entry),
                    Op::Zero(start, end, version) => table.zero(start, end, version),
                }
            }
            let mut from = Lba(0);
            while let Some((start, end, _)) = table.next_zero(from) {
                let covered: Vec<Lba> = blocks.range(start..end).map(|(lba, _)| *lba).collect();
                covered.iter().for_each(|lba| {
                    blocks.remove(lba);
                });
                from = end;
            }
            let mut from = Lba(0);
            while let Some((lba, entry)) = table.next_block(from) {
                blocks.insert(lba, entry);
                from = Lba(lba.0 + 1);
            }
            report.replayed_records = tail.report.replayed_records;
            if let Some((segment, offset)) = tail.report.torn_at {
                report.notes.push(format!(
                    "the replica was not closed in order; its log ends at segment {segment} offset {offset}"
                ));
            }
        }
        Err(error) => report.problems.push(error.to_string()),
    }
    verify_blocks(on, &superblock, &blocks, &mut report);
    Ok(report)
}

fn compare_live(report: &mut CheckReport, used: &BTreeMap<SegmentId, Used>, live: &BTreeMap<SegmentId, u64>) {
    for (id, counted) in live {
        let noted = used.get(id).map(|row| u64::from(row.live));
        if noted != Some(*counted) {
            let noted = noted.map_or("is not in the segment table".into(), |noted| {
                format!("is noted with {noted}")
            });
            report
                .problems
                .push(format!("segment {} holds {counted} needed blocks and {noted}", id.0));
        }
    }
    for (id, row) in used.iter().filter(|(id, row)| row.live > 0 && !live.contains_key(id)) {
        report.problems.push(format!(
            "segment {} is noted with {} needed blocks and holds none",
            id.0, row.live
        ));
    }
}

struct Walk<'a> {
    on: &'a mut dyn Disk,
    superblock: &'a Superblock,
    report: CheckReport,
    live: BTreeMap<SegmentId, u64>,
    blocks: BTreeMap<Lba, Entry>,
}

impl Walk<'_> {
    fn page(&mut self, name: PageName, pointer: Entry) {
        if pointer.location.is_none() {
            return;
        }
        *self.live.entry(pointer.location.segment()).or_default() += 1;
        let page = match read_page(self.on, self.superblock, pointer, PageKind::Map, name) {
            Ok(page) => page,
            Err(error) => {
                let last = name.first().0 + span(name.level) - 1;
                self.report
                    .problems
                    .push(format!("blocks {} to {last} cannot be found: {error}", name.first().0));
                return;
            }
        };
        self.report.pages += 1;
        for (slot, entry) in page.entries().into_iter().enumerate() {
            let index = name.index * FANOUT as u64 + slot as u64;
            if name.level > 0 {
                self.page(
                    PageName {
                        level: name.level - 1,
                        index,
                    },
                    entry,
                );
            } else if !entry.location.is_none() {
                *self.live.entry(entry.location.segment()).or_default() += 1;
                self.blocks.insert(Lba(index), entry);
            }
        }
    }
}

fn verify_blocks(on: &mut dyn Disk, superblock: &Superblock, blocks: &BTreeMap<Lba, Entry>, report: &mut CheckReport) {
    let seals = Seals::new(&superblock.geometry.identity, superblock.geometry.salt);
    let mut buf = BufMut::zeroed(BLOCK_BYTES as usize);
    for (lba, entry) in blocks {
        report.blocks += 1;
        let (segment, offset) = (entry.location.segment(), entry.location.offset());
        let place = format!(
            "block {} (version {}) at segment {} offset {offset}",
            lba.0, entry.version, segment.0
        );
        if lba.0 >= superblock.checkpoint.size_blocks {
            report.problems.push(format!("{place} lies outside the volume"));
        }
        match on.read(FileId::Segment(segment), offset, buf.as_mut()) {
            Err(error) => report.problems.push(format!("{place}: {error}")),
            Ok(()) if seals.block(*lba, entry.version, buf.as_ref()) != entry.check => {
                report.problems.push(format!("{place} does not pass its check"));
            }
            Ok(()) => {}
        }
    }
}
