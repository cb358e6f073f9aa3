//! The lists that a checkpoint writes whole: which segments are used, and which snapshots there are.

use super::super::Store;
use super::super::page::{Entry, FANOUT, Page, PageKind, PageName, TreeId};
use super::super::segment::{SegmentKind, Used, row};
use super::super::superblock::Checkpoint;
use super::super::turn::ROW;
use super::{Job, Phase, Step};
use crate::io::SegmentId;
use crate::types::Version;

/// The segment table on its way into pages.
#[derive(Debug)]
pub(super) struct Listing {
    /// The next segment to list.
    next: SegmentId,
    rows: Vec<Entry>,
    /// To the pages that are full.
    pointers: Vec<Entry>,
    /// Pages that it will have, and the segment they go to.
    pages: usize,
    home: SegmentId,
}

impl Store {
    /// Finds the segments that this checkpoint leaves without anything needed in them.
    pub(super) fn find_free(&mut self, job: &mut Job) -> Step {
        let Some(candidates) = &mut job.unsettled else {
            let reverted = job.revert;
            job.catalog.retain(|snapshot| {
                let gone = snapshot.deleting || reverted.is_some_and(|to| snapshot.version > to);
                !(gone && snapshot.root.is_vacant())
            });
            // Room for the lists, which may take a segment. One more than there are now may have to be listed then.
            let most = (self.segments.used().len() + 1).div_ceil(FANOUT);
            let snapshots = job.catalog.page_count();
            match self.meta_room(&mut job.out, most + most.div_ceil(FANOUT) + snapshots) {
                Step::Done => {}
                other => return other,
            }
            for location in &self.superblock_table_pages {
                *job.out.live.entry(location.segment()).or_default() -= 1;
            }
            // Nothing else can become free: what is needed somewhere and was not touched is needed still.
            let mut candidates: Vec<SegmentId> = job.out.live.keys().chain(self.segments.idle()).copied().collect();
            candidates.sort_unstable();
            candidates.dedup();
            job.unsettled = Some(candidates);
            return Step::Done;
        };
        let frozen = self.frozen.as_ref().expect("a checkpoint has a frozen table");
        let open = [job.out.meta, frozen.moved].map(|at| at.map(|at| at.segment));
        let past = self.superblock.checkpoint.meta.map(|at| at.segment);
        while self.turn.goes_on() {
            let Some(id) = candidates.pop() else {
                job.phase = Phase::Table;
                return Step::Done;
            };
            self.turn.spend(ROW);
            let Some(used) = self.segments.get(id).filter(|_| !open.contains(&Some(id))) else {
                continue;
            };
            // Those that a stream appended to when this was frozen are not done yet. Pages are: it went past the one.
            let closed = match used.kind {
                SegmentKind::Data => used.log_index < frozen.position.log_index,
                SegmentKind::Moved | SegmentKind::Linked => !used.open,
                SegmentKind::Meta => !used.open || past == Some(id),
            };
            let delta = job.out.live.get(&id).copied().unwrap_or(0);
            if closed && i64::from(used.live) + delta == 0 {
                job.freed.insert(id);
            }
        }
        Step::Done
    }

    /// Writes the lists, and says what the superblocks will.
    pub(super) fn write_table(&mut self, job: &mut Job) -> Step {
        if job.next.is_some() {
            return Step::Wait;
        }
        assert!(
            job.unsettled.as_ref().is_some_and(Vec::is_empty),
            "the table leaves out what becomes free"
        );
        let replay = self
            .frozen
            .as_ref()
            .expect("a checkpoint has a frozen table")
            .position
            .log_index;
        let mut listing = match job.listing.take() {
            Some(listing) => listing,
            None => {
                // What the log took since the freeze is found by replaying it.
                let later = (self.log.position.log_index - replay) as usize;
                let pages = (self.segments.used().len() - job.freed.len() - later).div_ceil(FANOUT);
                Listing {
                    next: SegmentId(0),
                    rows: Vec::with_capacity(FANOUT),
                    pointers: Vec::with_capacity(pages),
                    pages,
                    home: job.out.meta.expect("there is room").segment,
                }
            }
        };
        // The table counts its own pages too, and those of the list of snapshots behind it.
        let own = listing.pages + listing.pages.div_ceil(FANOUT) + job.catalog.page_count();
        while self.turn.goes_on() {
            let mut more = self.segments.used().range(listing.next..);
            let Some((id, used)) = more.next().map(|(id, used)| (*id, *used)) else {
                return self.end_table(job, listing, own);
            };
            listing.next = SegmentId(id.0 + 1);
            self.turn.spend(ROW);
            if job.freed.contains(&id) || used.kind == SegmentKind::Data && used.log_index > replay {
                continue;
            }
            // Those of its pages that have their places are counted already.
            let own = if id == listing.home {
                own - job.table_pages.len()
            } else {
                0
            } as i64;
            let delta = job.out.live.get(&id).copied().unwrap_or(0) + own;
            let live = u32::try_from(i64::from(used.live) + delta).expect("a segment's live count stays in range");
            listing.rows.push(row(id, &Used { live, ..used }));
            if listing.rows.len() == FANOUT {
                self.place_table_page(job, &mut listing);
            }
        }
        job.listing = Some(listing);
        Step::Done
    }

    fn place_table_page(&mut self, job: &mut Job, listing: &mut Listing) {
        let replica = self.superblock.geometry.identity.replica;
        let name = listed_page(listing.pointers.len());
        let page = Page::encode(PageKind::Table, name, replica, job.number, &listing.rows);
        listing.rows.clear();
        let pointer = self.place_listed(job, &page);
        listing.pointers.push(pointer);
    }

    fn end_table(&mut self, job: &mut Job, mut listing: Listing, own: usize) -> Step {
        if !listing.rows.is_empty() {
            self.place_table_page(job, &mut listing);
        }
        let index = self.write_index_pages(job, &listing.pointers);
        let catalog = self.write_catalog(job);
        assert_eq!(job.table_pages.len(), own, "the table counts its own pages");
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
        Step::Wait
    }

    /// Writes the pages that point to those of the segment table; returns pointers to them.
    fn write_index_pages(&mut self, job: &mut Job, entries: &[Entry]) -> Vec<Entry> {
        let replica = self.superblock.geometry.identity.replica;
        let chunks = entries.chunks(FANOUT).enumerate();
        chunks
            .map(|(index, chunk)| {
                let page = Page::encode(PageKind::TableIndex, listed_page(index), replica, job.number, chunk);
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
}

/// The name of a page that belongs to a list and not to a tree.
pub(in super::super) fn listed_page(index: usize) -> PageName {
    PageName {
        tree: TreeId::HEAD,
        level: 0,
        index: index as u64,
    }
}
