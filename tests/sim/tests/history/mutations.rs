//! Changes that turn a good history into one that no disk can have had, each with the reason why.

use galleonfs_sim::history::{Call, History, Item, Rule, Value};

use super::reference::Chance;

/// A history that is bad, and the rules that it can be said to break.
pub struct Bad {
    pub history: History,
    pub rules: &'static [Rule],
}

type Kind = fn(&History, &mut Chance) -> Option<Bad>;

pub const KINDS: &[(&str, Kind)] = &[
    ("a read shows what a completed write had replaced", stale),
    ("a read shows what was asked for after it had ended", early),
    ("a read shows garbage", garbage),
    ("a read shows what was written to another block", foreign),
    ("a read shows a write that failed", failed),
    ("a read fails although nothing is damaged", unexcused),
    ("one of two copies has other content", copy_content),
    ("one of two copies has another version", copy_version),
    ("all copies show what a completed write had replaced", copies_stale),
    ("a snapshot shows what was asked for after it was taken", snapshot_early),
    ("a snapshot reads differently the second time", snapshot_changed),
];

/// An operation that was done.
#[derive(Clone, Copy)]
struct Done {
    call: Call,
    start: usize,
    end: usize,
    value: Option<Value>,
    segment: usize,
}

impl Done {
    fn block(&self) -> Option<u64> {
        match self.call {
            Call::Read { block } | Call::Write { block, .. } | Call::Discard { block } => Some(block),
            _ => None,
        }
    }

    fn written(&self) -> Option<Value> {
        match self.call {
            Call::Write { id, .. } => Some(Value::Write(id)),
            Call::Discard { .. } => Some(Value::Zero),
            _ => None,
        }
    }
}

fn done(history: &History) -> Vec<Done> {
    let mut open = std::collections::HashMap::new();
    let mut segment = 0;
    let mut all = Vec::new();
    for (at, item) in history.items.iter().enumerate() {
        match item {
            Item::Invoke { op, call } => {
                open.insert(*op, (*call, at));
            }
            Item::Ok { op, value } => {
                let (call, start) = open[op];
                all.push(Done {
                    call,
                    start,
                    end: at,
                    value: *value,
                    segment,
                });
            }
            Item::Crash | Item::PowerLoss => segment += 1,
            _ => {}
        }
    }
    all
}

fn reads(all: &[Done]) -> impl Iterator<Item = Done> {
    all.iter().copied().filter(|it| matches!(it.call, Call::Read { .. }))
}

/// One of them, by chance.
fn any<T: Copy>(all: impl Iterator<Item = T>, chance: &mut Chance) -> Option<T> {
    let all: Vec<T> = all.collect();
    if all.is_empty() {
        None
    } else {
        Some(all[chance.below(all.len())])
    }
}

fn with_value(history: &History, at: usize, value: Value) -> History {
    let mut changed = history.clone();
    match &mut changed.items[at] {
        Item::Ok { value: seen, .. } => *seen = Some(value),
        Item::Copy { value: seen, .. } => *seen = value,
        other => unreachable!("{other} shows no value"),
    }
    changed
}

/// Two writes of a segment to one block, the second of which began after the first had ended. Only what no discard can
/// bring back is taken for the first.
fn replaced(all: &[Done]) -> Vec<(Done, Done)> {
    let writes = |it: &&Done| it.written().is_some();
    let first = all.iter().filter(writes).filter(|it| it.written() != Some(Value::Zero));
    first
        .flat_map(|one| {
            let later = all
                .iter()
                .filter(writes)
                .filter(move |it| it.block() == one.block() && it.segment == one.segment);
            later.filter(|it| it.start > one.end).map(|it| (*one, *it))
        })
        .collect()
}

fn stale(history: &History, chance: &mut Chance) -> Option<Bad> {
    let all = done(history);
    let pairs = replaced(&all);
    let triples = pairs.iter().flat_map(|&(old, new)| {
        let after =
            reads(&all).filter(move |it| it.block() == new.block() && it.segment == new.segment && it.start > new.end);
        after.map(move |read| (old, read))
    });
    let (old, read) = any(triples, chance)?;
    // Another rule may be named if a snapshot or a copy shows one of the two, too, or if zeros are left unexplained.
    let rules = &[Rule::A, Rule::B, Rule::F, Rule::G];
    Some(Bad {
        history: with_value(history, read.end, old.written()?),
        rules,
    })
}

fn early(history: &History, chance: &mut Chance) -> Option<Bad> {
    let all = done(history);
    let pairs = reads(&all).flat_map(|read| {
        let later = all
            .iter()
            .filter(move |it| it.block() == read.block() && it.start > read.end);
        later.filter_map(move |it| it.written().map(|value| (read, value)))
    });
    let (read, value) = any(pairs.filter(|(_, value)| *value != Value::Zero), chance)?;
    Some(Bad {
        history: with_value(history, read.end, value),
        rules: &[Rule::A],
    })
}

fn garbage(history: &History, chance: &mut Chance) -> Option<Bad> {
    let read = any(reads(&done(history)), chance)?;
    Some(Bad {
        history: with_value(history, read.end, Value::Garbage),
        rules: &[Rule::E],
    })
}

fn foreign(history: &History, chance: &mut Chance) -> Option<Bad> {
    let all = done(history);
    let read = any(reads(&all), chance)?;
    let others = all
        .iter()
        .filter(|it| it.block() != read.block())
        .filter_map(Done::written);
    let value = any(others.filter(|value| *value != Value::Zero), chance)?;
    Some(Bad {
        history: with_value(history, read.end, value),
        rules: &[Rule::E],
    })
}

fn failed(history: &History, chance: &mut Chance) -> Option<Bad> {
    let all = done(history);
    let seen = all.iter().copied().filter(|it| {
        let value = it.written().filter(|value| *value != Value::Zero);
        value.is_some() && reads(&all).any(|read| read.value == value)
    });
    let write = any(seen, chance)?;
    let mut changed = history.clone();
    let Item::Ok { op, .. } = changed.items[write.end] else {
        unreachable!("it was done")
    };
    changed.items[write.end] = Item::Fail { op };
    Some(Bad {
        history: changed,
        rules: &[Rule::A],
    })
}

fn unexcused(history: &History, chance: &mut Chance) -> Option<Bad> {
    let all = done(history);
    let whole = |block: Option<u64>| {
        !history
            .items
            .iter()
            .any(|item| matches!(item, Item::Damaged { block: it } if Some(*it) == block))
    };
    let read = any(reads(&all).filter(|read| whole(read.block())), chance)?;
    let mut changed = history.clone();
    let Item::Ok { op, .. } = changed.items[read.end] else {
        unreachable!("it was done")
    };
    changed.items[read.end] = Item::Fail { op };
    Some(Bad {
        history: changed,
        rules: &[Rule::D],
    })
}

fn copies(history: &History) -> impl Iterator<Item = usize> {
    (0..history.items.len()).filter(|&at| matches!(history.items[at], Item::Copy { .. }))
}

fn copy_content(history: &History, chance: &mut Chance) -> Option<Bad> {
    let at = any(copies(history), chance)?;
    let Item::Copy { block, value, .. } = history.items[at] else {
        unreachable!("it is a copy")
    };
    let others = done(history)
        .into_iter()
        .filter(|it| it.block() == Some(block))
        .filter_map(|it| it.written());
    let other = any(others.filter(|it| *it != value), chance)?;
    Some(Bad {
        history: with_value(history, at, other),
        rules: &[Rule::F],
    })
}

fn copy_version(history: &History, chance: &mut Chance) -> Option<Bad> {
    let at = any(copies(history), chance)?;
    let mut changed = history.clone();
    let Item::Copy { version, .. } = &mut changed.items[at] else {
        unreachable!("it is a copy")
    };
    version.1 += 1;
    Some(Bad {
        history: changed,
        rules: &[Rule::F],
    })
}

fn copies_stale(history: &History, chance: &mut Chance) -> Option<Bad> {
    let all = done(history);
    let last = history
        .items
        .iter()
        .filter(|item| matches!(item, Item::Crash | Item::PowerLoss))
        .count();
    let pairs = replaced(&all).into_iter().filter(|(old, _)| old.segment == last);
    let (old, _) = any(pairs, chance)?;
    let mut changed = history.clone();
    for item in &mut changed.items {
        if let Item::Copy { block, value, .. } = item
            && Some(*block) == old.block()
        {
            *value = old.written()?;
        }
    }
    // A snapshot that shows one of the two may be named instead, or zeros that nothing explains any more.
    Some(Bad {
        history: changed,
        rules: &[Rule::F, Rule::G, Rule::A],
    })
}

fn snapshot_early(history: &History, chance: &mut Chance) -> Option<Bad> {
    let all = done(history);
    let taken = |name: u64| all.iter().find(|it| it.call == Call::Snapshot { name });
    let pairs = all.iter().flat_map(|read| {
        let Call::SnapshotRead { name, block } = read.call else {
            return Vec::new();
        };
        let Some(snapshot) = taken(name) else { return Vec::new() };
        let later = all
            .iter()
            .filter(|it| it.block() == Some(block) && it.start > snapshot.end && it.start < read.end);
        later
            .filter_map(Done::written)
            .filter(|value| *value != Value::Zero)
            .map(|value| (*read, value))
            .collect()
    });
    let (read, value) = any(pairs, chance)?;
    Some(Bad {
        history: with_value(history, read.end, value),
        rules: &[Rule::G, Rule::A, Rule::B],
    })
}

fn snapshot_changed(history: &History, chance: &mut Chance) -> Option<Bad> {
    let all = done(history);
    let read = any(
        all.iter()
            .copied()
            .filter(|it| matches!(it.call, Call::SnapshotRead { .. })),
        chance,
    )?;
    let Call::SnapshotRead { block, .. } = read.call else {
        unreachable!("it is one")
    };
    let before = all
        .iter()
        .filter(|it| it.block() == Some(block) && it.start < read.start)
        .filter_map(Done::written);
    let other = any(
        before.filter(|value| Some(*value) != read.value && *value != Value::Zero),
        chance,
    )?;
    let mut changed = history.clone();
    let op = u64::MAX;
    let twice = [
        Item::Invoke { op, call: read.call },
        Item::Ok { op, value: Some(other) },
    ];
    changed.items.splice(read.end + 1..=read.end, twice);
    Some(Bad {
        history: changed,
        rules: &[Rule::G],
    })
}

/// A history with another one in it, at a moment when nothing is under way, on blocks of its own. What crashes comes at the
/// end, before the copies: it would cut off what the outer one does afterwards.
pub fn inserted(outer: &History, inner: &History, chance: &mut Chance) -> History {
    let crashes = inner
        .items
        .iter()
        .any(|item| matches!(item, Item::Crash | Item::PowerLoss | Item::Epoch));
    let mut open = 0;
    let mut quiet = vec![0];
    for (at, item) in outer.items.iter().enumerate() {
        match item {
            Item::Invoke { .. } => open += 1,
            Item::Ok { .. } | Item::Fail { .. } | Item::Info { .. } => open -= 1,
            Item::Crash | Item::PowerLoss => open = 0,
            _ => {}
        }
        if open == 0 && !matches!(item, Item::Copy { .. }) {
            quiet.push(at + 1);
        }
    }
    let at = if crashes {
        *quiet.last().expect("the begin is quiet")
    } else {
        quiet[chance.below(quiet.len())]
    };
    // Its own operations, ids and blocks.
    let away = 1_000_000;
    let value = |value: Value| match value {
        Value::Write(id) => Value::Write(id + away),
        other => other,
    };
    let renamed = inner.items.iter().map(|&item| match item {
        Item::Invoke { op, call } => {
            let call = match call {
                Call::Read { block } => Call::Read { block: block + away },
                Call::Write { block, id, fua } => Call::Write {
                    block: block + away,
                    id: id + away,
                    fua,
                },
                Call::Discard { block } => Call::Discard { block: block + away },
                Call::Flush => Call::Flush,
                Call::Snapshot { name } => Call::Snapshot { name: name + away },
                Call::SnapshotRead { name, block } => Call::SnapshotRead {
                    name: name + away,
                    block: block + away,
                },
            };
            Item::Invoke { op: op + away, call }
        }
        Item::Ok { op, value: seen } => Item::Ok {
            op: op + away,
            value: seen.map(value),
        },
        Item::Fail { op } => Item::Fail { op: op + away },
        Item::Info { op } => Item::Info { op: op + away },
        Item::Damaged { block } => Item::Damaged { block: block + away },
        Item::Mended { block } => Item::Mended { block: block + away },
        Item::Copy {
            replica,
            block,
            version,
            value: seen,
        } => Item::Copy {
            replica,
            block: block + away,
            version,
            value: value(seen),
        },
        other => other,
    });
    let mut items = outer.items[..at].to_vec();
    items.extend(renamed);
    items.extend_from_slice(&outer.items[at..]);
    History { items }
}
