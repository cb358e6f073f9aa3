//! How much background work is done before the guest is looked at again.
//!
//! A turn is what happens between two polls that find nothing more to do. The driver submits what was put out, takes what
//! arrived and ended meanwhile, and comes again. So whoever merges, moves or counts does it in pieces: a turn has so many
//! units to spend, and each row, page and segment costs some. A unit is about a tenth of a microsecond.
//!
//! A guest that brings much at a time waits for more, in proportion: what it writes now has to be merged before the next
//! memtable is full, so a turn may spend as much as merging that will cost. So no checkpoint takes longer than the next one
//! takes to come together.
//!
//! What the guest asked for goes out first: a turn that put out operations of the guest leaves longer work to the next one,
//! which the driver begins when it has submitted them. Two in a row do not, or a guest that never pauses would stop it.
//! Where the guest itself waits for what the work will bring, a turn is longer.

/// A row is merged, counted or looked at.
pub const ROW: u32 = 1;
/// A page is made, taken apart or verified, or a block is.
pub const PAGE: u32 = 8;
/// What a turn may spend: some 30 us.
pub const UNITS: u32 = 256;
/// The same while guest writes wait for space.
const UNITS_AWAITED: u32 = 4 * UNITS;
/// What merging a leaf may cost beside its rows: its page, and its share of those above.
pub const LEAF: u32 = 2 * PAGE;
/// The last step of a turn may spend so much more than there is: a leaf's rows, and a path of pages on either side.
const STEP_UNITS_MAX: i64 = 1024;

/// See the module.
#[derive(Debug, Default)]
pub struct Turn {
    left: i64,
    state: State,
    /// Operations of the guest were put out.
    guest_went_out: bool,
    /// The last turn left its work to this one.
    was_put_off: bool,
    /// What merging the memtable would cost when that was looked at last.
    seen: u64,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum State {
    #[default]
    Fresh,
    /// Background work had its turn.
    Over,
}

/// What kind of background work there is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Work {
    /// Nothing but looking after things.
    Short,
    /// It uses its turn up.
    Long,
    /// It uses its turn up, and the guest waits for what it brings.
    Awaited,
}

impl Turn {
    /// Something for the guest goes out.
    pub fn guest_goes_first(&mut self) {
        self.guest_went_out = true;
    }

    /// Whether background work may begin. `cost` is what merging the memtable would cost now.
    pub fn begin(&mut self, work: Work, cost: u64) -> bool {
        if self.state == State::Over {
            return false;
        }
        if work == Work::Long && self.guest_went_out && !self.was_put_off {
            self.was_put_off = true;
            self.state = State::Over;
            return false;
        }
        self.was_put_off = false;
        self.state = State::Over;
        let fresh = cost.saturating_sub(self.seen);
        self.seen = cost;
        let units = if work == Work::Awaited { UNITS_AWAITED } else { UNITS };
        self.left = i64::from(units).max(fresh as i64);
        true
    }

    /// Nothing more is to be put out: the driver turns to others.
    pub fn end(&mut self) {
        (self.state, self.guest_went_out) = (State::Fresh, false);
    }

    /// Work was done.
    pub fn spend(&mut self, units: u32) {
        self.left -= i64::from(units);
        debug_assert!(
            self.left >= -STEP_UNITS_MAX,
            "a step of background work is short, not {} units longer than its turn",
            -self.left
        );
    }

    /// True while there is something left to spend.
    pub fn goes_on(&self) -> bool {
        self.left > 0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_turn_has_background_work_once() {
        let mut turn = Turn::default();
        assert!(turn.begin(Work::Long, 0));
        assert!(turn.goes_on());
        turn.spend(UNITS);
        assert!(!turn.goes_on());
        assert!(!turn.begin(Work::Long, 0), "the driver comes first");
        turn.end();
        assert!(turn.begin(Work::Long, 0));
    }

    #[test]
    fn long_work_waits_for_the_guests_operations_but_not_twice_in_a_row() {
        let mut turn = Turn::default();
        let mut ran = Vec::new();
        for _ in 0..6 {
            turn.guest_goes_first();
            ran.push(turn.begin(Work::Long, 0));
            turn.end();
        }
        assert_eq!(ran, [false, true, false, true, false, true]);
        turn.guest_goes_first();
        assert!(turn.begin(Work::Short, 0), "short work need not wait");
        turn.end();
        turn.guest_goes_first();
        assert!(turn.begin(Work::Awaited, 0), "the guest waits for it");
        assert_eq!(turn.left, i64::from(UNITS_AWAITED));
    }

    #[test]
    fn a_guest_that_brings_more_has_more_of_it_merged() {
        let units = |turn: &mut Turn, cost| {
            assert!(turn.begin(Work::Long, cost));
            turn.end();
            turn.left
        };
        let mut turn = Turn::default();
        assert_eq!(units(&mut turn, 1_000), 1_000);
        assert_eq!(units(&mut turn, 1_010), i64::from(UNITS));
        assert_eq!(units(&mut turn, 1_510), 500);
        assert_eq!(units(&mut turn, 0), i64::from(UNITS), "it was frozen");
        assert_eq!(units(&mut turn, 700), 700);
    }
}
