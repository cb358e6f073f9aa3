//! What changed here since a version, block by block: what a replica that was away may lack.

use std::collections::BTreeMap;

use super::super::read::Waiter;
use super::super::{Event, Store};
use super::newer::{MapWalk, Row, Sweep};
use crate::request::RequestError;
use crate::types::{Lba, Version};

/// Most rows in one answer, so that guests get their turn in between.
const ROWS_MAX: usize = 4096;

/// Rows in ascending order that do not overlap.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Rows {
    pub rows: Vec<Row>,
    /// Where to go on; none at the end of the volume.
    pub next: Option<Lba>,
}

/// Those that are being looked for.
#[derive(Debug, Default)]
pub struct RowScans {
    next: u64,
    under_way: BTreeMap<u64, Running>,
}

#[derive(Debug)]
struct Running {
    token: u64,
    from: Lba,
    after: Version,
    rows_max: usize,
    walk: MapWalk,
}

impl Store {
    /// Looks for what is here with a version above `after`, from `from` on and at most so many rows; reported by
    /// [`Event::Rows`] with `token`. What is on its way to the log is not there yet. It costs pages in proportion to what
    /// it finds: subtrees of the map that are older are passed over. A writer in between may replace what was found.
    pub fn rows(&mut self, token: u64, from: Lba, after: Version, rows_max: usize) {
        let walk = MapWalk::new(self, from, Lba(self.size_blocks()), after);
        let id = self.row_scans.next;
        self.row_scans.next += 1;
        let rows_max = rows_max.clamp(1, ROWS_MAX);
        let running = Running {
            token,
            from,
            after,
            rows_max,
            walk,
        };
        self.row_scans.under_way.insert(id, running);
        self.run_rows(id, Ok(()));
    }

    /// Goes on after a page was read.
    pub(in super::super) fn run_rows(&mut self, id: u64, page: Result<(), RequestError>) {
        let mut running = self.row_scans.under_way.remove(&id).expect("it is under way");
        let result = match page {
            Err(error) => Err(error),
            Ok(()) => match running.walk.run(self, running.rows_max) {
                Ok(()) => Ok(self.found_rows(&running)),
                Err((name, pointer)) => {
                    self.row_scans.under_way.insert(id, running);
                    return self.fetch(name, pointer, Waiter::Rows(id));
                }
            },
        };
        self.events.push_back(Event::Rows(running.token, result));
    }

    fn found_rows(&self, running: &Running) -> Rows {
        let until = running.walk.until();
        let mut sweep = Sweep::new(self.tables(), running.walk.found(), running.after);
        let mut rows: Vec<Row> = Vec::new();
        let mut at = running.from;
        while let Some(mut row) = sweep.next(at).filter(|row| row.start < until) {
            row.end = row.end.min(until);
            at = row.end;
            if let Some(last) = rows.last_mut().filter(|last| last.joins(&row)) {
                last.end = row.end;
                continue;
            }
            if rows.len() == running.rows_max {
                let next = Some(row.start);
                return Rows { rows, next };
            }
            rows.push(row);
        }
        let next = (until < Lba(self.size_blocks())).then_some(until);
        Rows { rows, next }
    }
}
