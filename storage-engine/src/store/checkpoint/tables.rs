//! The lists that a checkpoint writes whole: which segments are used, and which snapshots there are.

use std::collections::BTreeSet;

use super::super::Store;
use super::super::page::{Entry, FANOUT, Page, PageKind, PageName, TreeId};
use super::super::segment::{SegmentKind, Used, row};
use super::super::superblock::Checkpoint;
use super::{Job, Step};
use crate::io::SegmentId;
use crate::types::Version;

impl Store {
    pub(super) fn write_table(&mut self, job: &mut Job) -> Step {
        if job.next.is_some() {
            return Step::Wait;
        }
        let reverted = job.revert;
        job.catalog.retain(|snapshot| {
            let gone = snapshot.deleting || reverted.is_some_and(|to| snapshot.version > to);
            !(gone && snapshot.root.is_vacant())
        });
        // One more than there are: the room for the table may take a segment.
        let most = (self.segments.used().len() + 1).div_ceil(FANOUT);
        let snapshots = job.catalog.page_count();
        match self.meta_room(&mut job.out, most + most.div_ceil(FANOUT) + snapshots) {
            Step::Done => {}
            other => return other,
        }
        for location in &self.superblock_table_pages {
            *job.out.live.entry(location.segment()).or_default() -= 1;
        }
        let catalog = self.write_catalog(job);
        // The table counts its own pages too, and leaves out segments that this checkpoint frees. Those are closed
        // ones, so where its pages go does not change which they are.
        let home = job.out.meta.expect("there is room").segment;
        let freed = self.freed_by(job);
        let replay = self
            .frozen
            .as_ref()
            .expect("a checkpoint has a frozen table")
            .position
            .log_index;
        let listed: Vec<(SegmentId, Used)> = self
            .segments
            .used()
            .iter()
            .filter(|(id, _)| !freed.contains(id))
            // What the log took since the freeze is found by replaying it.
            .filter(|(_, used)| used.kind != SegmentKind::Data || used.log_index <= replay)
            .map(|(id, used)| (*id, *used))
            .collect();
        let pages = listed.len().div_ceil(FANOUT);
        let own = (pages + pages.div_ceil(FANOUT)) as i64;
        let rows: Vec<Entry> = listed
            .iter()
            .map(|(id, used)| {
                let delta = job.out.live.get(id).copied().unwrap_or(0) + if *id == home { own } else { 0 };
                let live = u32::try_from(i64::from(used.live) + delta).expect("a segment's live count stays in range");
                row(*id, &Used { live, ..*used })
            })
            .collect();
        let pointers = self.write_table_pages(job, PageKind::Table, &rows);
        let index = self.write_table_pages(job, PageKind::TableIndex, &pointers);
        debug_assert_eq!(job.table_pages.len() as i64, own + snapshots as i64);
        self.flush_pages(&mut job.out);

        let frozen = self.frozen.as_ref().expect("a checkpoint has a frozen table");
        let mut next = self.superblock.clone();
        next.generation += 1;
        next.checkpoint = Checkpoint {
            number: job.number,
            size_blocks: job.size_blocks,
            height: job.head.height,
            root: job.head.root,
            replay: frozen.position,
            table: index,
            catalog,
            meta: job.out.meta,
            moved: frozen.moved,
        };
        next.forget_ends_before_replay();
        next.clean = self.closing && self.recent.is_empty() && frozen.position == self.log.position;
        job.next = Some(next);
        Step::Done
    }

    /// Writes entries as pages of the segment table; returns pointers to them.
    fn write_table_pages(&mut self, job: &mut Job, kind: PageKind, entries: &[Entry]) -> Vec<Entry> {
        let replica = self.superblock.geometry.identity.replica;
        let chunks = entries.chunks(FANOUT).enumerate();
        chunks
            .map(|(index, chunk)| {
                let page = Page::encode(kind, listed_page(index), replica, job.number, chunk);
                self.place_listed(job, &page)
            })
            .collect()
    }

    /// Writes the list of snapshots; returns pointers to its pages.
    fn write_catalog(&mut self, job: &mut Job) -> Vec<Entry> {
        let replica = self.superblock.geometry.identity.replica;
        let pages: Vec<Page> = job.catalog.list_pages(replica, job.number).collect();
        pages.iter().map(|page| self.place_listed(job, page)).collect()
    }

    fn place_listed(&mut self, job: &mut Job, page: &Page) -> Entry {
        let entry = self.place(&mut job.out, page);
        job.table_pages.push(entry.location);
        Entry {
            version: Version::default(),
            ..entry
        }
    }

    /// Segments that this checkpoint leaves without anything needed in them.
    pub(super) fn freed_by(&self, job: &Job) -> BTreeSet<SegmentId> {
        let frozen = self.frozen.as_ref().expect("a checkpoint has a frozen table");
        let open = [job.out.meta, frozen.moved]
            .into_iter()
            .flatten()
            .map(|at| at.segment)
            .collect::<BTreeSet<_>>();
        let mut candidates: Vec<SegmentId> = frozen.closed.iter().copied().collect();
        // The meta segment that this checkpoint went past, and those it took and filled.
        candidates.extend(self.superblock.checkpoint.meta.map(|at| at.segment));
        candidates.retain(|id| !open.contains(id));
        candidates
            .into_iter()
            .filter(|id| {
                let live = self.segments.get(*id).map(|used| i64::from(used.live));
                live.is_some_and(|live| live + job.out.live.get(id).copied().unwrap_or(0) == 0)
            })
            .collect()
    }
}

/// The name of a page that belongs to a list and not to a tree.
pub(in super::super) fn listed_page(index: usize) -> PageName {
    PageName {
        tree: TreeId::HEAD,
        level: 0,
        index: index as u64,
    }
}
