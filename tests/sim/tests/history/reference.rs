//! A disk that does what is promised and no more: where it is free, it draws lots.

use galleonfs_sim::history::{Call, History, Item, Value};

/// A generator that depends on nothing but its seed.
#[derive(Debug)]
pub struct Chance(pub u64);

impl Chance {
    pub fn below(&mut self, limit: usize) -> usize {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = (self.0 ^ self.0 >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ mixed >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((mixed ^ mixed >> 31) % limit as u64) as usize
    }

    pub fn one_in(&mut self, limit: usize) -> bool {
        self.below(limit) == 0
    }
}

pub const BLOCKS: u64 = 3;

/// What a block was, in order, since the last crash. The first is what that left.
#[derive(Clone, Debug)]
struct Entry {
    value: Value,
    op: Option<u64>,
    durable: bool,
}

/// An operation under way.
#[derive(Clone, Debug)]
struct Open {
    op: u64,
    call: Call,
    /// It has taken effect; a read knows what it saw.
    done: Option<Option<Value>>,
    /// For a flush: the writes that had completed when it was asked for.
    covers: Vec<u64>,
}

struct Disk {
    chance: Chance,
    items: Vec<Item>,
    blocks: Vec<Vec<Entry>>,
    damaged: Vec<bool>,
    open: Vec<Open>,
    /// Writes whose end nobody knows. They may still land.
    unknown: Vec<Open>,
    completed: Vec<u64>,
    snapshots: Vec<(u64, Vec<Value>)>,
    ops: u64,
    versions: u64,
}

/// A life of some hundred operations.
pub fn history(seed: u64) -> History {
    let entry = Entry {
        value: Value::Zero,
        op: None,
        durable: true,
    };
    let mut disk = Disk {
        chance: Chance(seed),
        items: Vec::new(),
        blocks: vec![vec![entry]; BLOCKS as usize],
        damaged: vec![false; BLOCKS as usize],
        open: Vec::new(),
        unknown: Vec::new(),
        completed: Vec::new(),
        snapshots: Vec::new(),
        ops: 0,
        versions: 0,
    };
    // Some lives have no discards, so that the way without search is taken, too.
    let discards = seed.is_multiple_of(2);
    for _ in 0..100 + disk.chance.below(200) {
        disk.step(discards);
    }
    disk.end();
    History { items: disk.items }
}

impl Disk {
    fn step(&mut self, discards: bool) {
        match self.chance.below(100) {
            0..40 if self.open.len() < 6 => self.invoke(discards),
            40..65 => self.land(),
            65..90 => self.answer(),
            90..93 => self.give_up(),
            93..95 => {
                self.items.push(Item::Epoch);
                self.unknown.clear();
            }
            95 => self.crash(),
            96 => {
                let block = self.chance.below(BLOCKS as usize);
                let damaged = &mut self.damaged[block];
                *damaged = !*damaged;
                let block = block as u64;
                self.items.push(if *damaged {
                    Item::Damaged { block }
                } else {
                    Item::Mended { block }
                });
            }
            _ => {}
        }
    }

    fn invoke(&mut self, discards: bool) {
        self.ops += 1;
        let op = self.ops;
        let block = self.chance.below(BLOCKS as usize) as u64;
        let call = match self.chance.below(20) {
            0..7 => Call::Write {
                block,
                id: op,
                fua: false,
            },
            7 => Call::Write {
                block,
                id: op,
                fua: true,
            },
            8 if discards => Call::Discard { block },
            9..11 => Call::Flush,
            11 => Call::Snapshot { name: op },
            12 if !self.snapshots.is_empty() => {
                let (name, _) = self.snapshots[self.chance.below(self.snapshots.len())];
                Call::SnapshotRead { name, block }
            }
            _ => Call::Read { block },
        };
        self.items.push(Item::Invoke { op, call });
        let covers = if call == Call::Flush {
            self.completed.clone()
        } else {
            Vec::new()
        };
        self.open.push(Open {
            op,
            call,
            done: None,
            covers,
        });
    }

    /// Something takes effect.
    fn land(&mut self) {
        let waiting = (0..self.open.len()).filter(|&at| self.open[at].done.is_none());
        let waiting: Vec<usize> = waiting.collect();
        if !self.unknown.is_empty() && self.chance.one_in(6) {
            let at = self.chance.below(self.unknown.len());
            let late = self.unknown.swap_remove(at);
            self.write(&late);
        } else if !waiting.is_empty() {
            let at = waiting[self.chance.below(waiting.len())];
            let open = self.open[at].clone();
            self.open[at].done = Some(self.effect(&open));
        }
    }

    fn effect(&mut self, open: &Open) -> Option<Value> {
        match open.call {
            Call::Read { block } => return self.blocks[block as usize].last().map(|entry| entry.value),
            Call::SnapshotRead { name, block } => {
                let (_, values) = self.snapshots.iter().find(|(it, _)| *it == name).expect("it was taken");
                return Some(values[block as usize]);
            }
            Call::Snapshot { name } => {
                let values = self
                    .blocks
                    .iter()
                    .map(|block| block.last().expect("a block is something").value);
                let values = values.collect();
                // It can be read once it is done, and is done when it is answered: nobody asks before.
                self.snapshots.retain(|(it, _)| *it != name);
                self.snapshots.push((name, values));
            }
            Call::Write { .. } | Call::Discard { .. } => self.write(open),
            Call::Flush => {}
        }
        None
    }

    fn write(&mut self, open: &Open) {
        let (block, value) = match open.call {
            Call::Write { block, id, .. } => (block, Value::Write(id)),
            Call::Discard { block } => (block, Value::Zero),
            _ => unreachable!("only these change a block"),
        };
        self.blocks[block as usize].push(Entry {
            value,
            op: Some(open.op),
            durable: false,
        });
    }

    /// Something is answered: what has taken effect, or what fails before it does.
    fn answer(&mut self) {
        if self.open.is_empty() {
            return;
        }
        let at = self.chance.below(self.open.len());
        let open = &self.open[at];
        let op = open.op;
        if let Some(value) = open.done {
            let open = self.open.swap_remove(at);
            self.items.push(Item::Ok { op, value });
            match open.call {
                Call::Write { fua, .. } => {
                    self.completed.push(op);
                    if fua {
                        self.make_durable(&[op]);
                    }
                }
                Call::Discard { .. } => self.completed.push(op),
                Call::Flush => self.make_durable(&open.covers),
                _ => {}
            }
            return;
        }
        let may_fail = match open.call {
            Call::Read { block } | Call::SnapshotRead { block, .. } => self.damaged[block as usize],
            Call::Snapshot { .. } => false,
            _ => self.chance.one_in(8),
        };
        if may_fail {
            self.open.swap_remove(at);
            self.items.push(Item::Fail { op });
        }
    }

    fn make_durable(&mut self, ops: &[u64]) {
        let entries = self.blocks.iter_mut().flatten();
        entries
            .filter(|entry| entry.op.is_some_and(|op| ops.contains(&op)))
            .for_each(|entry| entry.durable = true);
    }

    /// Nobody waits for a write any more.
    fn give_up(&mut self) {
        let mut writes =
            (0..self.open.len()).filter(|&at| matches!(self.open[at].call, Call::Write { .. } | Call::Discard { .. }));
        let Some(at) = writes.next_back() else { return };
        let open = self.open.swap_remove(at);
        self.items.push(Item::Info { op: open.op });
        if open.done.is_none() {
            self.unknown.push(open);
        }
    }

    fn crash(&mut self) {
        let mut under_way: Vec<Open> = self.unknown.drain(..).chain(self.open.drain(..)).collect();
        under_way.retain(|open| open.done.is_none() && matches!(open.call, Call::Write { .. } | Call::Discard { .. }));
        for open in under_way {
            if self.chance.one_in(2) {
                self.write(&open);
            }
        }
        self.items.push(if self.chance.one_in(2) {
            Item::Crash
        } else {
            Item::PowerLoss
        });
        for block in &mut self.blocks {
            let least = block
                .iter()
                .rposition(|entry| entry.durable)
                .expect("what the last crash left is durable");
            let kept = least + self.chance.below(block.len() - least);
            *block = vec![Entry {
                op: None,
                durable: true,
                ..block[kept].clone()
            }];
        }
    }

    /// Everything under way ends, and the copies are looked at.
    fn end(&mut self) {
        for open in std::mem::take(&mut self.open) {
            let value = open.done.unwrap_or_else(|| self.effect(&open));
            self.items.push(Item::Ok { op: open.op, value });
        }
        for (block, entries) in (0..).zip(&self.blocks) {
            self.versions += 1;
            let value = entries.last().expect("a block is something").value;
            let copies = (0..3).map(|replica| Item::Copy {
                replica,
                block,
                version: (1, self.versions),
                value,
            });
            self.items.extend(copies);
        }
    }
}
