//! What guests did, in the order in which it happened: one list for all threads of all devices.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use galleonfs_sim::history::{Call, History, Item, Value};

/// Counts the devices of a run. Each is of another epoch.
pub type Generation = u64;

#[derive(Clone, Default)]
pub struct Record(Arc<Mutex<State>>);

#[derive(Default)]
struct State {
    history: History,
    ops: u64,
    writes: u64,
    generation: Generation,
    /// Under way, and whether it changes something on a device that was already an old one when it began.
    open: HashMap<u64, bool>,
    done: u64,
}

/// How an operation ended.
pub enum End {
    Ok(Option<Value>),
    Error,
}

impl Record {
    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A number that no other write has.
    pub fn write_id(&self) -> u64 {
        let mut state = self.state();
        state.writes += 1;
        state.writes
    }

    pub fn begin(&self, generation: Generation, call: Call) -> u64 {
        let mut state = self.state();
        state.ops += 1;
        let changes = matches!(call, Call::Write { .. } | Call::Discard { .. });
        let (op, too_late) = (state.ops, changes && generation < state.generation);
        state.open.insert(op, too_late);
        state.history.items.push(Item::Invoke { op, call });
        op
    }

    /// What was under way when another engine took over is no longer waited for.
    pub fn end(&self, op: u64, end: End) {
        let mut state = self.state();
        let Some(too_late) = state.open.remove(&op) else {
            return;
        };
        state.done += u64::from(matches!(end, End::Ok(_)));
        let item = match end {
            End::Ok(value) => Item::Ok { op, value },
            // A device whose successor serves already can have done nothing any more.
            End::Error if too_late => Item::Fail { op },
            End::Error => Item::Info { op },
        };
        state.history.items.push(item);
    }

    /// Another device serves. What the former one was asked for has been done by now, or never will be.
    pub fn epoch(&self) -> Generation {
        let mut state = self.state();
        let mut open: Vec<u64> = state.open.drain().map(|(op, _)| op).collect();
        open.sort_unstable();
        let unknown = open.into_iter().map(|op| Item::Info { op });
        state.history.items.extend(unknown);
        state.history.items.push(Item::Epoch);
        state.generation += 1;
        state.generation
    }

    /// A copy of a block, in the end.
    pub fn copy(&self, replica: u64, block: u64, value: Value) {
        let version = (0, 0);
        self.state().history.items.push(Item::Copy {
            replica,
            block,
            version,
            value,
        });
    }

    /// Operations that were done.
    pub fn done(&self) -> u64 {
        self.state().done
    }

    pub fn history(&self) -> History {
        self.state().history.clone()
    }
}
