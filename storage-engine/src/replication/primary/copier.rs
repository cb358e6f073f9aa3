//! Bringing one replica up to what another one has, block by block, by version.
//!
//! Both are asked what they have with a version behind some point, part by part; what the target lacks is read from the
//! source, verified, and handed to the target, which takes it only if it still is newer. So it may be cut off and begun
//! again at any point, goes along with new writes, and costs what differs.
//!
//! What nobody waits for lets the guest go first: each list and each copy that was made while the guest had requests is followed by a rest
//! as long as it took. So it takes half of whatever is the bottleneck at most, without knowing what that is, and when the
//! replicas are busy it takes less of their time, not more.

use std::collections::VecDeque;

use super::super::limits::{COPY_BLOCKS_MAX, ROWS_MAX};
use super::super::message::{Ask, Row, Rows, Stored};
use super::super::mutant::Mutant;
use super::super::timing::{ASK_AGAIN_MS, COPY_REST_MS_MAX, GUEST_ACTIVE_MS, MEMBER_TIMEOUT_MS};
use super::{Phase, Primary};
use crate::replication::ReplicaId;
use crate::types::{Lba, Version};

/// One pass over the volume.
#[derive(Debug)]
pub(super) struct Copier {
    pub source: ReplicaId,
    pub target: ReplicaId,
    /// What is not newer is surely there.
    after: Version,
    /// What is newer comes another way, or not at all.
    until: Version,
    at: Lba,
    stage: Stage,
    asked_ms: u64,
    since_ms: u64,
    /// Nobody waits for it.
    yields: bool,
    /// When the copy that is under way was begun, and when the next one may be.
    began_ms: u64,
    rest_until_ms: u64,
    /// Blocks before this one are read by themselves: one of them is damaged at the source.
    alone_until: Lba,
    /// Rows that the target lacked.
    pub lacked: u64,
    /// The newest version at the source that is too new to be copied: the target gets it with the stream, and nothing else
    /// of that block.
    pub overwritten: Version,
}

/// How far it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Progress {
    Going,
    Done,
    SourceFailed,
    /// The source has this write of a block, and cannot read it.
    SourceDamaged(Version),
    TargetFailed,
}

#[derive(Debug)]
enum Stage {
    Next,
    List {
        source: u64,
        target: u64,
        has: Option<Rows>,
        lacks: Option<Rows>,
    },
    Take(Part),
    Read {
        id: u64,
        /// Without a hole between them.
        rows: Vec<Row>,
        part: Part,
    },
    Copy {
        id: u64,
        blocks: Vec<Stored>,
        part: Part,
    },
    End(Progress),
}

/// What is left of a part that both listed.
#[derive(Debug, Default)]
struct Part {
    lacking: VecDeque<Row>,
    /// Where the next one begins.
    next: Option<Lba>,
}

impl Copier {
    pub fn new(source: ReplicaId, target: ReplicaId, after: Version, until: Version) -> Copier {
        Copier {
            source,
            target,
            after,
            until,
            at: Lba(0),
            stage: Stage::Next,
            asked_ms: 0,
            since_ms: 0,
            yields: false,
            began_ms: 0,
            rest_until_ms: 0,
            alone_until: Lba(0),
            lacked: 0,
            overwritten: Version::default(),
        }
    }

    /// It lets the guest go first.
    pub fn behind_the_guest(self) -> Copier {
        Copier { yields: true, ..self }
    }

    /// When it goes on, if it waits for nothing but that.
    pub fn rests_until_ms(&self) -> Option<u64> {
        matches!(self.stage, Stage::Next | Stage::Take(_)).then_some(self.rest_until_ms)
    }

    /// What this one was asked for may be lost: it is asked again at the next occasion.
    pub fn ask_soon(&mut self, id: ReplicaId) {
        if id == self.source || id == self.target {
            self.asked_ms = 0;
        }
    }

    fn fail(&mut self, whose: Progress) {
        self.stage = Stage::End(whose);
    }

    /// Goes on behind a part.
    fn finish_part(&mut self, next: Option<Lba>) {
        match next {
            Some(next) => {
                assert!(next > self.at, "a list goes on behind what it listed");
                self.at = next;
                self.stage = Stage::Next;
            }
            None => self.stage = Stage::End(Progress::Done),
        }
    }
}

impl Primary {
    /// Does what can be done now.
    pub(super) fn run_copier(&mut self, copier: &mut Copier) -> Progress {
        loop {
            if let Stage::End(progress) = copier.stage {
                return progress;
            }
            let now_ms = self.now_ms;
            let again = now_ms >= copier.asked_ms + ASK_AGAIN_MS;
            let given_up = now_ms >= copier.since_ms + 2 * MEMBER_TIMEOUT_MS;
            match std::mem::replace(&mut copier.stage, Stage::Next) {
                Stage::Next if now_ms < copier.rest_until_ms => return Progress::Going,
                Stage::Next => {
                    (copier.since_ms, copier.began_ms) = (now_ms, now_ms);
                    self.list(copier, None, None);
                    return Progress::Going;
                }
                Stage::List {
                    has: Some(has),
                    lacks: Some(lacks),
                    ..
                } => {
                    let part = compare(&has, &lacks, copier.after, copier.until);
                    copier.lacked += part.lacking.len() as u64;
                    copier.overwritten = copier.overwritten.max(overwritten(&has, copier.until));
                    copier.since_ms = now_ms;
                    copier.stage = Stage::Take(part);
                    self.let_the_guest_go_first(copier);
                }
                Stage::List {
                    source,
                    target,
                    has,
                    lacks,
                } => {
                    if given_up {
                        return if has.is_none() {
                            Progress::SourceFailed
                        } else {
                            Progress::TargetFailed
                        };
                    }
                    if again {
                        self.list(copier, has, lacks);
                    } else {
                        copier.stage = Stage::List {
                            source,
                            target,
                            has,
                            lacks,
                        };
                    }
                    return Progress::Going;
                }
                Stage::Take(part) if now_ms < copier.rest_until_ms => {
                    copier.since_ms = now_ms;
                    copier.stage = Stage::Take(part);
                    return Progress::Going;
                }
                Stage::Take(mut part) => {
                    (copier.since_ms, copier.began_ms) = (now_ms, now_ms);
                    let Some(row) = part.lacking.pop_front() else {
                        copier.finish_part(part.next);
                        continue;
                    };
                    if row.zero && self.mutant(Mutant::ZeroesNotCopied) {
                        copier.stage = Stage::Take(part);
                        copier.lacked -= 1;
                        continue;
                    }
                    if row.zero {
                        let (start, end, version) = (row.start, row.end, row.version);
                        let blocks = vec![Stored::Zeros { start, end, version }];
                        self.copy(copier, blocks, part);
                    } else {
                        let rows = with_its_neighbours(row, &mut part, copier.alone_until);
                        self.read_rows(copier, rows, part);
                    }
                    return Progress::Going;
                }
                Stage::Read { id, rows, part } => {
                    if given_up {
                        return Progress::SourceFailed;
                    }
                    if again {
                        self.read_rows(copier, rows, part);
                    } else {
                        copier.stage = Stage::Read { id, rows, part };
                    }
                    return Progress::Going;
                }
                Stage::Copy { id, blocks, part } => {
                    if given_up {
                        return Progress::TargetFailed;
                    }
                    if again {
                        self.copy(copier, blocks, part);
                    } else {
                        copier.stage = Stage::Copy { id, blocks, part };
                    }
                    return Progress::Going;
                }
                Stage::End(_) => unreachable!("it was looked for"),
            }
        }
    }

    fn list(&mut self, copier: &mut Copier, has: Option<Rows>, lacks: Option<Rows>) {
        let (source, target) = (self.id(), self.id());
        for (replica, id, known) in [
            (copier.source, source, has.is_some()),
            (copier.target, target, lacks.is_some()),
        ] {
            if !known {
                let (from, after, rows_max) = (copier.at, copier.after, ROWS_MAX);
                self.ask(
                    replica,
                    Ask::Rows {
                        id,
                        from,
                        after,
                        rows_max,
                    },
                );
            }
        }
        copier.asked_ms = self.now_ms;
        copier.stage = Stage::List {
            source,
            target,
            has,
            lacks,
        };
    }

    /// Reads these rows from the source.
    fn read_rows(&mut self, copier: &mut Copier, rows: Vec<Row>, part: Part) {
        let id = self.id();
        let (lba, blocks) = extent(&rows);
        self.ask(copier.source, Ask::Read { id, lba, blocks });
        copier.asked_ms = self.now_ms;
        copier.stage = Stage::Read { id, rows, part };
    }

    fn copy(&mut self, copier: &mut Copier, blocks: Vec<Stored>, part: Part) {
        let id = self.id();
        let ask = Ask::Copy {
            id,
            repair: false,
            blocks: blocks.clone(),
        };
        self.ask(copier.target, ask);
        copier.asked_ms = self.now_ms;
        copier.stage = Stage::Copy { id, blocks, part };
    }

    /// The copier that waits for this answer, if any.
    fn with_copier(&mut self, mut take: impl FnMut(&mut Primary, &mut Copier) -> bool) -> bool {
        if matches!(self.phase, Phase::Equalising(_)) {
            let Phase::Equalising(mut copiers) = std::mem::replace(&mut self.phase, Phase::Settling) else {
                unreachable!("it was just looked at")
            };
            let taken = copiers.iter_mut().any(|copier| take(self, copier));
            self.phase = Phase::Equalising(copiers);
            return taken;
        } else if let Some(mut sync) = self.sync.take() {
            let taken = sync.copier_mut().is_some_and(|copier| take(self, copier));
            self.sync = Some(sync);
            return taken;
        } else if let Some(mut comparison) = self.comparison.take() {
            let taken = take(self, &mut comparison.copier);
            self.comparison = Some(comparison);
            return taken;
        }
        false
    }

    pub(super) fn rows(&mut self, from: ReplicaId, list: u64, found: Result<Rows, String>) {
        self.with_copier(|_, copier| {
            let Stage::List {
                source,
                target,
                has,
                lacks,
            } = &mut copier.stage
            else {
                return false;
            };
            let (place, whose) = match list {
                _ if list == *source && from == copier.source => (has, Progress::SourceFailed),
                _ if list == *target && from == copier.target => (lacks, Progress::TargetFailed),
                _ => return false,
            };
            match &found {
                Ok(rows) => *place = Some(rows.clone()),
                Err(_) => copier.fail(whose),
            }
            true
        });
    }

    /// What was read for a copier; false if none asked for it.
    pub(super) fn copier_read(&mut self, from: ReplicaId, read: u64, found: &Result<Vec<Stored>, String>) -> bool {
        let skips_zeroes = self.mutant(Mutant::ZeroesNotCopied);
        self.with_copier(|primary, copier| {
            let Stage::Read { id, rows, part } = &mut copier.stage else {
                return false;
            };
            if *id != read || from != copier.source {
                return false;
            }
            let (rows, mut part) = (std::mem::take(rows), std::mem::take(part));
            // I15: damage is not copied. What was read with it is, block by block.
            let Ok(found) = found else {
                let (lba, blocks) = extent(&rows);
                if blocks == 1 {
                    copier.fail(Progress::SourceDamaged(rows[0].version));
                    return true;
                }
                for row in rows.into_iter().rev() {
                    for start in (row.start.0..row.end.0).rev().map(Lba) {
                        let end = Lba(start.0 + 1);
                        part.lacking.push_front(Row { start, end, ..row });
                    }
                }
                copier.alone_until = Lba(lba.0 + blocks);
                copier.stage = Stage::Take(part);
                return true;
            };
            // What was overwritten since comes with the stream.
            let counts = |version: Version| version > copier.after && version <= copier.until;
            let blocks = found.iter().filter(|stored| {
                let zero = matches!(stored, Stored::Zeros { .. });
                counts(stored.version()) && !(zero && skips_zeroes)
            });
            let blocks: Vec<Stored> = blocks.cloned().collect();
            copier.since_ms = primary.now_ms;
            if blocks.is_empty() {
                copier.stage = Stage::Take(part);
            } else {
                primary.copy(copier, blocks, part);
            }
            true
        })
    }

    pub(super) fn copied(&mut self, from: ReplicaId, copy: u64, done: Result<(), String>) {
        self.mend_ended(from, copy, &done);
        self.with_copier(|primary, copier| {
            let Stage::Copy { id, part, .. } = &mut copier.stage else {
                return false;
            };
            if *id != copy || from != copier.target {
                return false;
            }
            let part = std::mem::take(part);
            if done.is_err() {
                copier.fail(Progress::TargetFailed);
                return true;
            }
            let now_ms = primary.now_ms;
            copier.since_ms = now_ms;
            copier.stage = Stage::Take(part);
            primary.let_the_guest_go_first(copier);
            true
        });
    }

    /// What was begun took its time: it rests for as long, if it yields and there is a guest to yield to.
    fn let_the_guest_go_first(&self, copier: &mut Copier) {
        let now_ms = self.now_ms;
        if copier.yields && self.guest_ms > 0 && now_ms < self.guest_ms + GUEST_ACTIVE_MS {
            // Also one that took no time that the clock shows.
            copier.rest_until_ms = now_ms + (now_ms - copier.began_ms).clamp(1, COPY_REST_MS_MAX);
        }
    }
}

/// A row, and what follows it without a hole: all of it is read at once.
fn with_its_neighbours(row: Row, part: &mut Part, alone_until: Lba) -> Vec<Row> {
    let mut rows = vec![row];
    let mut end = row.end;
    while row.start >= alone_until
        && end.0 - row.start.0 < COPY_BLOCKS_MAX as u64
        && let Some(more) = part.lacking.pop_front_if(|more| !more.zero && more.start == end)
    {
        end = more.end;
        rows.push(more);
    }
    rows
}

/// Where rows without a hole between them begin, and how many blocks that is.
fn extent(rows: &[Row]) -> (Lba, u64) {
    let (start, end) = (rows[0].start, rows[rows.len() - 1].end);
    (start, end.0 - start.0)
}

/// The newest version that the source has instead of one that was to be copied.
fn overwritten(has: &Rows, until: Version) -> Version {
    let versions = has.rows.iter().map(|row| row.version);
    versions.filter(|version| *version > until).max().unwrap_or_default()
}

/// What the source has between the two versions and the target has not, up to where both lists go; and where they go on.
fn compare(has: &Rows, other: &Rows, after: Version, until: Version) -> Part {
    let next = match (has.next, other.next) {
        (Some(one), Some(other)) => Some(one.min(other)),
        (one, other) => one.or(other),
    };
    let limit = next.unwrap_or(Lba(u64::MAX));
    let mut lacking = VecDeque::new();
    let mut others = other.rows.iter().peekable();
    for row in &has.rows {
        if row.version <= after || row.version > until {
            continue;
        }
        let mut start = row.start;
        let end = row.end.min(limit);
        while start < end {
            while others.next_if(|other| other.end <= start).is_some() {}
            // The part up to where the target's next row begins, or the part that it covers.
            let (stop, there) = match others.peek() {
                Some(other) if other.start <= start => (other.end.min(end), Some(other.version)),
                Some(other) => (other.start.min(end), None),
                None => (end, None),
            };
            if there.is_none_or(|there| there < row.version) {
                lacking.push_back(Row {
                    start,
                    end: stop,
                    ..*row
                });
            }
            start = stop;
        }
    }
    Part { lacking, next }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::types::{Epoch, Seq};

    fn version(seq: u64) -> Version {
        Version {
            epoch: Epoch(1),
            seq: Seq(seq),
        }
    }

    fn row(start: u64, end: u64, seq: u64, zero: bool) -> Row {
        Row {
            start: Lba(start),
            end: Lba(end),
            version: version(seq),
            zero,
        }
    }

    fn lacking(has: &[Row], next: Option<u64>, other: &[Row], other_next: Option<u64>) -> (Vec<Row>, Option<u64>) {
        let rows = |rows: &[Row], next: Option<u64>| Rows {
            rows: rows.to_vec(),
            next: next.map(Lba),
        };
        let part = compare(&rows(has, next), &rows(other, other_next), version(2), version(10));
        (part.lacking.into(), part.next.map(|next| next.0))
    }

    #[test]
    fn only_what_is_newer_at_the_source_is_lacking() {
        let has = [row(0, 1, 3, false), row(1, 2, 4, false), row(5, 6, 5, false)];
        let other = [row(1, 2, 4, false), row(5, 6, 4, true)];
        let (found, next) = lacking(&has, None, &other, None);
        assert_eq!(found, [row(0, 1, 3, false), row(5, 6, 5, false)]);
        assert_eq!(next, None);
    }

    #[test]
    fn what_is_too_old_or_comes_with_the_stream_is_not() {
        let has = [row(0, 1, 2, false), row(1, 2, 11, false)];
        assert_eq!(lacking(&has, None, &[], None).0, []);
    }

    #[test]
    fn a_zeroed_range_is_cut_where_the_other_is_newer() {
        let has = [row(0, 100, 6, true)];
        let other = [row(10, 20, 7, false), row(30, 31, 5, false), row(90, 200, 6, true)];
        let (found, _) = lacking(&has, None, &other, None);
        let want = [
            row(0, 10, 6, true),
            row(20, 30, 6, true),
            row(30, 31, 6, true),
            row(31, 90, 6, true),
        ];
        assert_eq!(found, want);
    }

    #[test]
    fn lists_of_different_length_are_compared_as_far_as_both_go() {
        let has = [row(0, 4, 6, true), row(10, 20, 7, true)];
        let (found, next) = lacking(&has, Some(30), &[row(2, 3, 8, false)], Some(12));
        assert_eq!(found, [row(0, 2, 6, true), row(3, 4, 6, true), row(10, 12, 7, true)]);
        assert_eq!(next, Some(12));
        let (found, next) = lacking(&has, Some(12), &[], None);
        assert_eq!(found, [row(0, 4, 6, true), row(10, 12, 7, true)]);
        assert_eq!(next, Some(12));
    }
}
