//! After the commit: counts of what is needed are put down, segments that nothing needs become free, and the frozen rows are
//! let go of. Each is in proportion to what the checkpoint did, so all of it is done in pieces. Until it is over the
//! checkpoint counts as under way: nobody looks at the counts before they are right.

use super::super::Store;
use super::super::segment::SegmentKind;
use super::super::turn::ROW;
use super::{Frozen, Job, Phase};

impl Store {
    pub(super) fn begin_winding_up(&mut self, job: &mut Job, frozen: Frozen) {
        job.phase = Phase::WindUp;
        job.unsettled = Some(job.out.live.keys().copied().collect());
        job.leftover = Some(frozen);
        let is_meta = |id: &_| {
            let used = self.segments.get(*id).expect("it is used until it is released");
            used.kind == SegmentKind::Meta
        };
        let pages = job.freed.iter().copied().filter(is_meta).collect();
        self.map.forget(&pages);
    }

    /// Takes the end of a checkpoint a step further; true when it is over.
    pub(super) fn wind_up(&mut self, job: &mut Job) -> bool {
        let leftover = job.leftover.as_mut().expect("it was kept at the commit");
        while self.turn.goes_on() {
            self.turn.spend(ROW);
            if let Some(id) = job.unsettled.as_mut().and_then(Vec::pop) {
                let delta = job.out.live.get(&id).copied().unwrap_or(0);
                self.segments.add_live(id, delta);
            } else if let Some(id) = job.freed.pop_first() {
                self.segments.release(id);
            } else if !leftover.forget_some() {
                let segments = &self.segments;
                self.cleaner
                    .committed(&leftover.moved_dirty, |id| segments.get(id).is_some());
                self.pace.settled = false;
                self.come_down();
                self.ask_for_pool();
                self.background_due = true;
                return true;
            }
        }
        false
    }
}

impl Frozen {
    /// Lets go of a few rows; false if there are none.
    fn forget_some(&mut self) -> bool {
        while let Some(table) = self.tables.last_mut() {
            if table.forget_leaf() {
                return true;
            }
            self.tables.pop();
        }
        self.relocated.pop_first().is_some()
    }
}
