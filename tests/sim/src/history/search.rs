//! Trying the orders in which a segment can have happened, where zeros do not say which discard they come from.
//!
//! Each operation takes effect at one moment between its begin and its end. A state of the search is the set of those that
//! have, and the last write among them; no state is looked at twice. What may be read at once is read at once, which is
//! never wrong. The work grows with the length of the segment, and exponentially only with what is under way at a time.

use std::collections::HashSet;

use super::block::{Init, Segment, Survivor};

/// States after which it is left undecided. Histories that were recorded need some hundreds.
const STATES_MAX: usize = 200_000;

/// Whether some order explains what was seen. None if there are too many to say.
pub fn explains(segment: &Segment, init: Init, survivor: Survivor) -> Option<bool> {
    let search = Search {
        segment,
        init,
        survivor,
    };
    let writes = segment.writes.len();
    let words = (writes + segment.reads.len()).div_ceil(64);
    let mut open = vec![(vec![0u64; words], writes)];
    let mut known = HashSet::new();
    while let Some((mut done, mut last)) = open.pop() {
        search.read(&mut done, last);
        if search.is_explained(&done) {
            return Some(true);
        }
        if !known.insert((done.clone(), last)) {
            continue;
        }
        if known.len() > STATES_MAX {
            return None;
        }
        for write in (0..writes).filter(|&write| search.may_land(&done, write)) {
            let mut next = done.clone();
            set(&mut next, write);
            last = write;
            open.push((next, last));
        }
    }
    Some(false)
}

fn has(bits: &[u64], at: usize) -> bool {
    bits[at / 64] & 1 << (at % 64) != 0
}

fn set(bits: &mut [u64], at: usize) {
    bits[at / 64] |= 1 << (at % 64);
}

/// Operations are numbered: the writes, then the reads.
struct Search<'a> {
    segment: &'a Segment,
    init: Init,
    survivor: Survivor,
}

impl Search<'_> {
    fn must_land(&self, write: usize) -> bool {
        self.segment.writes[write].answered || self.survivor == Survivor::Write(write)
    }

    /// The first end of what is not done and must be.
    fn deadline(&self, done: &[u64]) -> usize {
        let writes = self
            .segment
            .writes
            .iter()
            .enumerate()
            .filter(|&(at, _)| !has(done, at) && self.must_land(at));
        let reads = self
            .segment
            .reads
            .iter()
            .enumerate()
            .filter(|&(at, _)| !has(done, self.segment.writes.len() + at));
        let ends = writes
            .map(|(_, write)| write.end)
            .chain(reads.map(|(_, read)| read.end));
        ends.min().unwrap_or(usize::MAX)
    }

    fn is_explained(&self, done: &[u64]) -> bool {
        let writes = (0..self.segment.writes.len()).all(|write| has(done, write) || !self.must_land(write));
        let reads = (0..self.segment.reads.len()).all(|read| has(done, self.segment.writes.len() + read));
        let init = self.survivor == Survivor::Init && self.segment.writes.iter().any(|write| write.flushed);
        writes && reads && !init
    }

    /// Lets every read happen that may and that sees what is there.
    fn read(&self, done: &mut [u64], last: usize) {
        let there = match (self.segment.writes.get(last), self.init) {
            (Some(write), _) => Some(write.value),
            (None, Init::Value(value)) => Some(value),
            (None, Init::Unread) => None,
        };
        let writes = self.segment.writes.len();
        loop {
            let deadline = self.deadline(done);
            let next = self
                .segment
                .reads
                .iter()
                .enumerate()
                .find(|&(at, read)| !has(done, writes + at) && read.start <= deadline && Some(read.value) == there);
            let Some((at, _)) = next else { return };
            set(done, writes + at);
        }
    }

    fn may_land(&self, done: &[u64], write: usize) -> bool {
        let it = &self.segment.writes[write];
        if has(done, write) || it.start > self.deadline(done) {
            return false;
        }
        // Nothing that began after its end may have happened.
        let writes = self
            .segment
            .writes
            .iter()
            .enumerate()
            .filter(|&(at, _)| has(done, at))
            .map(|(_, write)| write.start);
        let reads = self
            .segment
            .reads
            .iter()
            .enumerate()
            .filter(|&(at, _)| has(done, self.segment.writes.len() + at));
        if writes
            .chain(reads.map(|(_, read)| read.start))
            .any(|start| start > it.end)
        {
            return false;
        }
        // What a flush covers comes before what survives.
        let survived = matches!(self.survivor, Survivor::Write(survivor) if has(done, survivor));
        !(survived && it.flushed)
    }
}
