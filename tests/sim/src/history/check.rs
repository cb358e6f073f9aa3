//! Reading a history, and judging what concerns more than one block.

use std::collections::{BTreeMap, HashMap};
use std::fmt;

use super::block::{Fault, Read, Segment, Write, judge};
use super::{Call, History, Item, Value, Version};

/// What was broken. See [`super`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Rule {
    A,
    B,
    D,
    E,
    F,
    G,
    /// The history contradicts itself, so whoever wrote it down is wrong.
    Record,
}

/// What a history shows that no disk could have done.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Violation {
    pub rule: Rule,
    pub block: Option<u64>,
    pub why: String,
    /// The items that show it, with their places, in order.
    pub items: Vec<(usize, Item)>,
}

impl fmt::Display for Violation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "rule {}", format!("{:?}", self.rule).to_lowercase())?;
        if let Some(block) = self.block {
            write!(f, ", block {block}")?;
        }
        writeln!(f, ": {}", self.why)?;
        self.items
            .iter()
            .try_for_each(|(at, item)| writeln!(f, "  item {at}: {item}"))
    }
}

impl std::error::Error for Violation {}

/// What was judged.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Summary {
    pub operations: usize,
    pub blocks: usize,
    /// Blocks of which zeros left more orders than could be tried. Nothing wrong was found in them.
    pub undecided: Vec<u64>,
}

/// Whether a disk could have answered like that.
pub fn check(history: &History) -> Result<Summary, Violation> {
    let checker = Checker::new(history)?;
    checker.failed_reads()?;
    checker.values()?;
    let snapshots = checker.seen_of_snapshots()?;
    let mut blocks = checker.blocks(&snapshots);
    checker.copies(&mut blocks)?;
    let mut summary = Summary {
        operations: checker.ops.len(),
        blocks: blocks.len(),
        undecided: Vec::new(),
    };
    for (&block, segments) in &blocks {
        match judge(segments) {
            Ok(true) => {}
            Ok(false) => summary.undecided.push(block),
            Err(Fault { rule, items, why }) => return Err(checker.violation(rule, Some(block), items, why)),
        }
    }
    checker.moments(&snapshots, &blocks)?;
    Ok(summary)
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum End {
    Ok(usize, Option<Value>),
    Fail(usize),
    Info(usize),
    Open,
}

/// A call and its end.
#[derive(Clone, Copy, Debug)]
struct Op {
    call: Call,
    start: usize,
    end: End,
}

impl Op {
    fn block(&self) -> Option<u64> {
        match self.call {
            Call::Read { block }
            | Call::Write { block, .. }
            | Call::Discard { block }
            | Call::SnapshotRead { block, .. } => Some(block),
            Call::Flush | Call::Snapshot { .. } => None,
        }
    }

    /// What a read saw.
    fn seen(&self) -> Option<(usize, Value)> {
        match (self.call, self.end) {
            (Call::Read { .. } | Call::SnapshotRead { .. }, End::Ok(at, value)) => value.map(|value| (at, value)),
            _ => None,
        }
    }
}

/// What a snapshot was seen to hold: by name and block, the value and where that was read.
type Snapshots = BTreeMap<(u64, u64), (Value, usize)>;

/// From when until when, each with the item that says so.
type Window = ((usize, usize), (usize, usize));

struct Checker<'a> {
    items: &'a [Item],
    ops: Vec<Op>,
    /// Where crashes and losses of power stand, and where epochs begin.
    crashes: Vec<usize>,
    epochs: Vec<usize>,
    /// Who wrote what, by id, and who took which snapshot, by name.
    writers: HashMap<u64, usize>,
    snapshots: HashMap<u64, usize>,
}

impl<'a> Checker<'a> {
    fn new(history: &'a History) -> Result<Self, Violation> {
        let items = &history.items[..];
        let mut checker = Self {
            items,
            ops: Vec::new(),
            crashes: Vec::new(),
            epochs: Vec::new(),
            writers: HashMap::new(),
            snapshots: HashMap::new(),
        };
        let mut open: HashMap<u64, usize> = HashMap::new();
        for (at, item) in items.iter().enumerate() {
            let wrong = |why: &str| Violation {
                rule: Rule::Record,
                block: None,
                why: why.to_owned(),
                items: vec![(at, *item)],
            };
            let mut close = |op: &u64| open.remove(op).ok_or_else(|| wrong("it ends and was not under way"));
            match item {
                Item::Invoke { op, call } => {
                    if open.insert(*op, checker.ops.len()).is_some() {
                        return Err(wrong("it begins and was under way already"));
                    }
                    if let Call::Write { id, .. } = call
                        && checker.writers.insert(*id, checker.ops.len()).is_some()
                    {
                        return Err(wrong("another write has this id"));
                    }
                    if let Call::Snapshot { name } = call
                        && checker.snapshots.insert(*name, checker.ops.len()).is_some()
                    {
                        return Err(wrong("another snapshot has this name"));
                    }
                    checker.ops.push(Op {
                        call: *call,
                        start: at,
                        end: End::Open,
                    });
                }
                Item::Ok { op, value } => {
                    let op = &mut checker.ops[close(op)?];
                    op.end = End::Ok(at, *value);
                    let reads = matches!(op.call, Call::Read { .. } | Call::SnapshotRead { .. });
                    if reads != value.is_some() {
                        return Err(wrong("a read that is done saw something, and nothing else did"));
                    }
                }
                Item::Fail { op } => checker.ops[close(op)?].end = End::Fail(at),
                Item::Info { op } => checker.ops[close(op)?].end = End::Info(at),
                Item::Epoch => checker.epochs.push(at),
                Item::Crash | Item::PowerLoss => {
                    checker.crashes.push(at);
                    open.clear();
                }
                Item::Damaged { .. } | Item::Mended { .. } | Item::Copy { .. } => {}
            }
        }
        Ok(checker)
    }

    fn violation(&self, rule: Rule, block: Option<u64>, mut items: Vec<usize>, why: String) -> Violation {
        items.sort_unstable();
        items.dedup();
        let items = items
            .into_iter()
            .filter_map(|at| self.items.get(at).map(|item| (at, *item)));
        Violation {
            rule,
            block,
            why,
            items: items.collect(),
        }
    }

    /// The number of the segment that a moment is in.
    fn segment(&self, at: usize) -> usize {
        self.crashes.partition_point(|&crash| crash < at)
    }

    /// The next crash.
    fn crash_after(&self, at: usize) -> usize {
        self.crashes.get(self.segment(at)).copied().unwrap_or(usize::MAX)
    }

    /// When an operation had taken effect at the latest, if it did.
    fn latest(&self, op: &Op) -> usize {
        let crash = self.crash_after(op.start);
        match op.end {
            End::Ok(at, _) | End::Fail(at) => at,
            End::Info(at) => self
                .epochs
                .iter()
                .copied()
                .find(|&epoch| epoch > at)
                .map_or(crash, |epoch| epoch.min(crash)),
            End::Open => crash,
        }
    }

    /// Rule d.
    fn failed_reads(&self) -> Result<(), Violation> {
        for op in &self.ops {
            let (Call::Read { block } | Call::SnapshotRead { block, .. }, End::Fail(end)) = (op.call, op.end) else {
                continue;
            };
            let mut damaged = false;
            let mut excused = false;
            for (at, item) in self.items.iter().enumerate().take(end) {
                match item {
                    Item::Damaged { block: it } if *it == block => damaged = true,
                    Item::Mended { block: it } if *it == block => damaged = false,
                    _ => {}
                }
                excused |= damaged && at >= op.start;
            }
            if !excused {
                let why = "a read failed although there was a clean copy".to_owned();
                return Err(self.violation(Rule::D, Some(block), vec![op.start, end], why));
            }
        }
        Ok(())
    }

    /// Rule e, and what can be said of a value without looking at others.
    fn values(&self) -> Result<(), Violation> {
        let copies = self.items.iter().enumerate().filter_map(|(at, item)| match item {
            Item::Copy { block, value, .. } => Some((*block, at, *value)),
            _ => None,
        });
        let reads = self
            .ops
            .iter()
            .filter_map(|op| op.seen().zip(op.block()).map(|((at, value), block)| (block, at, value)));
        for (block, at, value) in reads.chain(copies) {
            let nobody = |why: String| self.violation(Rule::E, Some(block), vec![at], why);
            match value {
                Value::Zero => {}
                Value::Garbage => return Err(nobody("what was seen is neither zeros nor a whole write".to_owned())),
                Value::Write(id) => {
                    let writer = self.writers.get(&id).map(|&writer| &self.ops[writer]);
                    let writer = writer.filter(|writer| writer.block() == Some(block));
                    let writer = writer.ok_or_else(|| nobody(format!("nobody wrote {id} to this block")))?;
                    if writer.start > at {
                        let why = format!("{id} was seen before it was written");
                        return Err(self.violation(Rule::A, Some(block), vec![at, writer.start], why));
                    }
                    if let End::Fail(end) = writer.end {
                        let why = format!("{id} was seen although its write had failed");
                        return Err(self.violation(Rule::A, Some(block), vec![writer.start, end, at], why));
                    }
                }
            }
        }
        Ok(())
    }

    fn snapshot(&self, name: u64) -> Option<&Op> {
        self.snapshots.get(&name).map(|&op| &self.ops[op])
    }

    /// What was read of snapshots, which is the same whenever it is read.
    fn seen_of_snapshots(&self) -> Result<Snapshots, Violation> {
        let mut seen = Snapshots::new();
        for op in &self.ops {
            let (Call::SnapshotRead { name, block }, Some((at, value))) = (op.call, op.seen()) else {
                continue;
            };
            let snapshot = self
                .snapshot(name)
                .filter(|it| it.start < at && !matches!(it.end, End::Fail(_)));
            if snapshot.is_none() {
                let why = "a snapshot was read that there was not".to_owned();
                return Err(self.violation(Rule::G, Some(block), vec![at], why));
            }
            let &mut (first, there) = seen.entry((name, block)).or_insert((value, at));
            if first != value {
                let why = format!("snapshot {name} was seen to hold {first}, and {value}");
                return Err(self.violation(Rule::G, Some(block), vec![there, at], why));
            }
        }
        Ok(seen)
    }

    /// What concerns each block, from crash to crash.
    fn blocks(&self, snapshots: &Snapshots) -> BTreeMap<u64, Vec<Segment>> {
        let mut blocks: BTreeMap<u64, Vec<Segment>> = BTreeMap::new();
        let segments = self.crashes.len() + 1;
        // In each segment the begin of the last flush that was completed.
        let mut flushed = vec![0; segments];
        for op in &self.ops {
            if let (Call::Flush, End::Ok(..)) = (op.call, op.end) {
                let last = &mut flushed[self.segment(op.start)];
                *last = op.start.max(*last);
            }
        }
        for op in &self.ops {
            let segment = self.segment(op.start);
            let (block, value, fua) = match op.call {
                Call::Write { block, id, fua } => (block, Value::Write(id), fua),
                Call::Discard { block } => (block, Value::Zero, false),
                Call::Read { block } => {
                    if let Some((end, value)) = op.seen() {
                        of(&mut blocks, block, segments)[segment].reads.push(Read {
                            start: op.start,
                            end,
                            value,
                            rule: Rule::A,
                            item: end,
                        });
                    }
                    continue;
                }
                _ => continue,
            };
            let (answered, covered) = match op.end {
                End::Ok(at, _) => (true, at < flushed[segment] || fua),
                End::Fail(_) => continue,
                End::Info(_) | End::Open => (false, false),
            };
            of(&mut blocks, block, segments)[segment].writes.push(Write {
                start: op.start,
                end: self.latest(op),
                value,
                answered,
                flushed: covered,
            });
        }
        for (&(name, block), &(value, item)) in snapshots {
            let it = self.snapshot(name).expect("it was found before");
            let read = Read {
                start: it.start,
                end: self.latest(it),
                value,
                rule: Rule::G,
                item,
            };
            of(&mut blocks, block, segments)[self.segment(it.start)]
                .reads
                .push(read);
        }
        blocks
    }

    /// Rule f.
    fn copies(&self, blocks: &mut BTreeMap<u64, Vec<Segment>>) -> Result<(), Violation> {
        let mut first: HashMap<u64, (Version, Value, usize)> = HashMap::new();
        for (at, item) in self.items.iter().enumerate() {
            let Item::Copy {
                block, version, value, ..
            } = *item
            else {
                continue;
            };
            let &mut (of_first, there, place) = first.entry(block).or_insert((version, value, at));
            if (of_first, there) != (version, value) {
                let why = format!("two copies differ: {there} and {value}, in versions {of_first:?} and {version:?}");
                return Err(self.violation(Rule::F, Some(block), vec![place, at], why));
            }
            if place == at {
                let segments = of(blocks, block, self.crashes.len() + 1);
                segments[self.segment(at)].reads.push(Read {
                    start: at,
                    end: at,
                    value,
                    rule: Rule::F,
                    item: at,
                });
            }
        }
        Ok(())
    }

    /// The other half of rule g: what a snapshot shows of several blocks was there at one moment.
    fn moments(&self, snapshots: &Snapshots, blocks: &BTreeMap<u64, Vec<Segment>>) -> Result<(), Violation> {
        let mut windows: BTreeMap<u64, Window> = BTreeMap::new();
        for (&(name, block), &(value, item)) in snapshots {
            let it = self.snapshot(name).expect("it was found before");
            let (from, until) = window(&blocks[&block][self.segment(it.start)], value);
            let window = windows
                .entry(name)
                .or_insert(((it.start, item), (self.latest(it), item)));
            window.0 = window.0.max((from, item));
            window.1 = window.1.min((until, item));
            let ((from, one), (until, other)) = *window;
            if from > until {
                let why = format!("what snapshot {name} shows of two blocks was never there at the same time");
                return Err(self.violation(Rule::G, Some(block), vec![one, other], why));
            }
        }
        Ok(())
    }
}

fn of(blocks: &mut BTreeMap<u64, Vec<Segment>>, block: u64, segments: usize) -> &mut Vec<Segment> {
    blocks
        .entry(block)
        .or_insert_with(|| vec![Segment::default(); segments])
}

/// From when until when a block can have held a value at the most.
fn window(segment: &Segment, value: Value) -> (usize, usize) {
    // Zeros may have been there more than once.
    let Some(write) = segment
        .writes
        .iter()
        .find(|write| write.value == value && value != Value::Zero)
    else {
        return (0, usize::MAX);
    };
    let seen = segment
        .reads
        .iter()
        .filter(|read| read.value == value)
        .map(|read| read.end);
    let ended = seen.chain([write.end]).min().unwrap_or(write.end);
    let later = segment
        .writes
        .iter()
        .filter(|other| other.value != value && other.answered && other.start > ended);
    let ends = later.map(|other| {
        let seen = segment
            .reads
            .iter()
            .filter(|read| read.value == other.value && other.value != Value::Zero);
        seen.map(|read| read.end).chain([other.end]).min().unwrap_or(other.end)
    });
    (write.start, ends.min().unwrap_or(usize::MAX))
}
