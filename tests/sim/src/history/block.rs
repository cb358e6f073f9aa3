//! One block, from one crash to the next.
//!
//! All accesses that concern one value, a write and the reads that saw it, are a **cluster**. In any order that explains
//! what was seen, the operations of a cluster stand together, for the next write ends what can be seen of the one before.
//! So the question is whether the clusters can be put in order. Cluster A must come before B if any operation of A ended
//! before any of B began, that is, if A's earliest end is before B's latest begin. Such a relation has a cycle only if it
//! has one of two (from the cluster of a cycle that ends earliest, every other one can be left out), so pairs are enough:
//! the work grows with the square of the operations on a block, never with the number of their orders.
//!
//! What a crash leaves adds arrows: whatever a flush had covered comes before what is seen afterwards.
//!
//! Zeros are the one value that several writes may leave: discards, and the begin. Where that matters, [`search`] tries.

use std::collections::{HashMap, HashSet};

use super::search;
use super::{Rule, Value};

/// A write or a discard.
#[derive(Clone, Debug)]
pub struct Write {
    /// Places in the history: when it was asked for, and the last moment when it can have landed.
    pub start: usize,
    pub end: usize,
    pub value: Value,
    /// It was done for sure.
    pub answered: bool,
    /// A completed flush covers it.
    pub flushed: bool,
}

/// Somebody saw the block: a guest, a snapshot, or whoever looked at the copies in the end.
#[derive(Clone, Debug)]
pub struct Read {
    pub start: usize,
    pub end: usize,
    pub value: Value,
    pub rule: Rule,
    /// Where the history says so.
    pub item: usize,
}

/// What happened to a block between two crashes.
#[derive(Clone, Debug, Default)]
pub struct Segment {
    pub writes: Vec<Write>,
    pub reads: Vec<Read>,
}

/// What the block was when the segment began.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Init {
    Value(Value),
    /// Something that nobody looked at.
    Unread,
}

/// What the crash at the end of the segment left.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Survivor {
    Anything,
    Init,
    /// By its place among the writes.
    Write(usize),
}

/// Why a block cannot have been like that.
#[derive(Clone, Debug)]
pub struct Fault {
    pub rule: Rule,
    pub items: Vec<usize>,
    pub why: String,
}

/// What was found out.
pub type Verdict = Result<(), Fault>;

/// Judges a block. True if everything could be decided.
pub fn judge(segments: &[Segment]) -> Result<bool, Fault> {
    let (required, known) = (vec![None; segments.len()], HashMap::new());
    let mut block = Block {
        segments,
        required,
        known,
        decided: true,
    };
    block.require()?;
    block.from(0, Init::Value(Value::Zero))?;
    Ok(block.decided)
}

struct Block<'a> {
    segments: &'a [Segment],
    /// For each segment, what it must have begun with, and where that was seen.
    required: Vec<Option<(Value, usize)>>,
    known: HashMap<(usize, Init), Verdict>,
    decided: bool,
}

impl Block<'_> {
    /// What is seen after a crash and was not written since was there before it.
    fn require(&mut self) -> Verdict {
        let mut after: Option<(Value, usize)> = None;
        for (at, segment) in self.segments.iter().enumerate().rev() {
            let written: HashSet<Value> = segment.writes.iter().map(|write| write.value).collect();
            let seen = segment.reads.iter().map(|read| (read.value, read.item));
            let seen = seen.filter(|(value, _)| matches!(value, Value::Write(_)));
            let mut first: Option<(Value, usize)> = None;
            for (value, item) in seen.chain(after).filter(|&(value, _)| !written.contains(&value)) {
                match first {
                    Some((other, there)) if other != value => {
                        let why = format!(
                            "of what was written before the crash, both {other} and {value} were seen after it"
                        );
                        return Err(Fault {
                            rule: Rule::B,
                            items: vec![there, item],
                            why,
                        });
                    }
                    Some(_) => {}
                    None => first = Some((value, item)),
                }
            }
            self.required[at] = first;
            after = first;
        }
        if let Some((value, item)) = after {
            let why = format!("{value} was seen before it was written");
            return Err(Fault {
                rule: Rule::A,
                items: vec![item],
                why,
            });
        }
        Ok(())
    }

    /// Whether this segment and those behind it can be explained. Each is asked about three beginnings at the most.
    fn from(&mut self, at: usize, init: Init) -> Verdict {
        if let Some(known) = self.known.get(&(at, init)) {
            return known.clone();
        }
        let verdict = self.find(at, init);
        self.known.insert((at, init), verdict.clone());
        verdict
    }

    fn find(&mut self, at: usize, init: Init) -> Verdict {
        let Some(next) = self.required.get(at + 1).copied() else {
            return self.segment(at, init, Survivor::Anything, None);
        };
        if let Some((value, item)) = next {
            let written = self.segments[at].writes.iter().position(|write| write.value == value);
            self.segment(at, init, written.map_or(Survivor::Init, Survivor::Write), Some(item))?;
            return self.from(at + 1, Init::Value(value));
        }
        self.segment(at, init, Survivor::Anything, None)?;
        let zeros = self.segments[at + 1]
            .reads
            .iter()
            .find(|read| read.value == Value::Zero)
            .map(|read| read.item);
        let mut later = self.segments[at + 1..].iter().flat_map(|it| &it.reads);
        if later.all(|read| read.value != Value::Zero) {
            return self.from(at + 1, Init::Unread);
        }
        if self.from(at + 1, Init::Unread).is_ok() {
            return Ok(());
        }
        // Zeros must have survived: those of the begin, or of a discard.
        self.from(at + 1, Init::Value(Value::Zero))?;
        let mut last = None;
        let discards = self.segments[at]
            .writes
            .iter()
            .enumerate()
            .filter(|(_, write)| write.value == Value::Zero);
        let begin = Some(Survivor::Init).filter(|_| init == Init::Value(Value::Zero));
        let survivors: Vec<Survivor> = begin
            .into_iter()
            .chain(discards.map(|(at, _)| Survivor::Write(at)))
            .collect();
        for survivor in survivors {
            match self.segment(at, init, survivor, zeros) {
                Ok(()) => return Ok(()),
                fault => last = fault.err(),
            }
        }
        Err(last.unwrap_or_else(|| {
            let why = "zeros were seen after the crash, but there were none to survive it".to_owned();
            Fault {
                rule: Rule::B,
                items: zeros.into_iter().collect(),
                why,
            }
        }))
    }

    fn segment(&mut self, at: usize, init: Init, survivor: Survivor, evidence: Option<usize>) -> Verdict {
        let segment = &self.segments[at];
        let zeros = segment.writes.iter().filter(|write| write.value == Value::Zero).count();
        let zeros = zeros + usize::from(init == Init::Value(Value::Zero));
        let seen = segment.reads.iter().find(|read| read.value == Value::Zero);
        match seen {
            Some(read) if zeros > 1 => match search::explains(segment, init, survivor) {
                Some(true) => Ok(()),
                Some(false) => {
                    let reads = segment
                        .reads
                        .iter()
                        .filter(|read| read.value == Value::Zero)
                        .map(|read| read.item);
                    let why = "no order of the writes and discards explains the zeros that were seen".to_owned();
                    let rule = if survivor == Survivor::Anything {
                        read.rule
                    } else {
                        Rule::B
                    };
                    Err(Fault {
                        rule,
                        items: reads.chain(evidence).collect(),
                        why,
                    })
                }
                None => {
                    self.decided = false;
                    Ok(())
                }
            },
            Some(read) if zeros == 0 => {
                let why = "zeros were seen, but there were none to be seen".to_owned();
                Err(Fault {
                    rule: read.rule,
                    items: vec![read.item],
                    why,
                })
            }
            _ => ordered(segment, init, survivor, evidence),
        }
    }
}

/// The operations on one value.
struct Cluster {
    value: Option<Value>,
    flushed: bool,
    survives: bool,
    /// When the first of them had ended, and where the history says so.
    ended: (i64, usize),
    /// When the last of them began.
    began: (i64, usize),
    rule: Rule,
}

/// Whether the clusters of a segment can be put in order. Each value comes from one write.
pub fn ordered(segment: &Segment, init: Init, survivor: Survivor, evidence: Option<usize>) -> Verdict {
    let mut clusters = vec![Cluster {
        value: match init {
            Init::Value(value) => Some(value),
            Init::Unread => None,
        },
        flushed: false,
        survives: survivor == Survivor::Init,
        ended: (-1, usize::MAX),
        began: (-2, usize::MAX),
        rule: Rule::A,
    }];
    let seen: HashSet<Value> = segment.reads.iter().map(|read| read.value).collect();
    for (at, write) in segment.writes.iter().enumerate() {
        let survives = survivor == Survivor::Write(at);
        // What nobody saw and nobody was told of may not have happened.
        if write.answered || survives || seen.contains(&write.value) {
            clusters.push(Cluster {
                value: Some(write.value),
                flushed: write.flushed,
                survives,
                ended: (time(write.end), write.end),
                began: (time(write.start), write.start),
                rule: Rule::A,
            });
        }
    }
    // Where a value is there twice, at the begin and by a discard, nobody has seen it.
    let places: HashMap<Value, usize> = (0..clusters.len())
        .rev()
        .filter_map(|at| clusters[at].value.map(|value| (value, at)))
        .collect();
    let written = clusters.iter().map(|it| it.began.0).collect::<Vec<_>>();
    for read in &segment.reads {
        let wrong = |why: String| {
            let items = vec![read.item];
            Err(Fault {
                rule: read.rule,
                items,
                why,
            })
        };
        let Some(&at) = places.get(&read.value) else {
            return wrong(format!("{} was seen, but was not there to be seen", read.value));
        };
        if time(read.end) < written[at] {
            return wrong(format!("{} was seen before it was written", read.value));
        }
        let cluster = &mut clusters[at];
        cluster.ended = cluster.ended.min((time(read.end), read.item));
        cluster.began = cluster.began.max((time(read.start), read.item));
        if read.rule != Rule::A {
            cluster.rule = read.rule;
        }
    }
    in_order(&clusters, evidence)
}

/// The end of what never ended is after everything.
fn time(at: usize) -> i64 {
    i64::try_from(at).unwrap_or(i64::MAX)
}

fn before(one: &Cluster, other: &Cluster) -> bool {
    one.ended.0 < other.began.0
}

fn in_order(clusters: &[Cluster], evidence: Option<usize>) -> Verdict {
    let name = |cluster: &Cluster| {
        cluster
            .value
            .map_or_else(|| "what was there".to_owned(), |value| value.to_string())
    };
    for (at, one) in clusters.iter().enumerate() {
        for other in &clusters[at + 1..] {
            if before(one, other) && before(other, one) {
                let rule = if other.rule == Rule::A { one.rule } else { other.rule };
                let why = format!("{} and {} each come before the other", name(one), name(other));
                let mut items = vec![one.ended.1, other.began.1, other.ended.1, one.began.1];
                items.retain(|&item| item != usize::MAX);
                return Err(Fault { rule, items, why });
            }
        }
    }
    let Some(survivor) = clusters.iter().position(|it| it.survives) else {
        return Ok(());
    };
    // Everything that comes after what survived.
    let mut after = vec![false; clusters.len()];
    let mut open = vec![survivor];
    while let Some(at) = open.pop() {
        for next in 0..clusters.len() {
            // What was there at the begin comes before all.
            if !after[next] && next != at && (at == 0 || before(&clusters[at], &clusters[next])) {
                after[next] = true;
                open.push(next);
            }
        }
    }
    let lost = clusters
        .iter()
        .enumerate()
        .find(|&(at, it)| it.flushed && at != survivor && after[at]);
    lost.map_or(Ok(()), |(_, lost)| {
        let why = format!(
            "{} was flushed, yet after the crash the block is as {} left it before",
            name(lost),
            name(&clusters[survivor])
        );
        Err(Fault {
            rule: Rule::B,
            items: [lost.began.1, lost.ended.1].into_iter().chain(evidence).collect(),
            why,
        })
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A generator that depends on nothing but its seed.
    struct Chance(u64);

    impl Chance {
        fn below(&mut self, limit: usize) -> usize {
            self.0 = self
                .0
                .wrapping_mul(6364136223846793005)
                .wrapping_add(1442695040888963407);
            (self.0 >> 33) as usize % limit
        }
    }

    /// Up to four writes and four reads of any of their values, at any times.
    fn segment(chance: &mut Chance) -> (Segment, Init, Survivor) {
        let mut segment = Segment::default();
        let span = |chance: &mut Chance| {
            let start = chance.below(20);
            (start, start + 1 + chance.below(8))
        };
        let writes = 1 + chance.below(4);
        for id in 0..writes {
            let (start, end) = span(chance);
            let answered = chance.below(4) > 0;
            let flushed = answered && chance.below(3) == 0;
            segment.writes.push(Write {
                start,
                end,
                value: Value::Write(id as u64),
                answered,
                flushed,
            });
        }
        for item in 0..chance.below(5) {
            let (start, end) = span(chance);
            let value = match chance.below(writes + 1) {
                0 => Value::Zero,
                id => Value::Write(id as u64 - 1),
            };
            segment.reads.push(Read {
                start,
                end,
                value,
                rule: Rule::A,
                item,
            });
        }
        let survivor = match chance.below(3) {
            0 => Survivor::Anything,
            1 => Survivor::Init,
            _ => Survivor::Write(chance.below(writes)),
        };
        (segment, Init::Value(Value::Zero), survivor)
    }

    #[test]
    fn pairs_of_clusters_say_what_trying_every_order_says() {
        let (mut good, mut bad) = (0, 0);
        for seed in 0..100_000 {
            let (segment, init, survivor) = segment(&mut Chance(seed));
            let tried = search::explains(&segment, init, survivor).expect("it is small");
            let ordered = ordered(&segment, init, survivor, None).is_ok();
            assert_eq!(ordered, tried, "seed {seed}: {segment:?} {survivor:?}");
            *(if tried { &mut good } else { &mut bad }) += 1;
        }
        assert!(
            good > 10_000 && bad > 10_000,
            "{good} can be explained, and {bad} cannot"
        );
    }
}
