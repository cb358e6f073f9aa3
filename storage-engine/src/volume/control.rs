//! Snapshots of a volume: orders that take their place among the writes.
//!
//! An order is carried out when every write that was submitted before it is in the log, and those submitted later wait
//! until it is there too. So a snapshot holds exactly the writes that came before it, and its place in the log is a
//! number like that of a write: every replica cuts at the same one.

use std::collections::{BTreeMap, VecDeque};

use super::{Backing, Blocks, Inflight, Owner, Volume};
use crate::request::{Control, Ranges, Reply, Request, RequestError, RequestId};
use crate::store::{ControlOp, Extents, ReadToken, Room, SnapshotInfo, WriteEntry};
use crate::types::{BlockSize, Lba, SECTOR_BYTES, SnapshotId};

/// Orders, and what came behind them.
#[derive(Debug, Default)]
pub(super) struct Orders {
    held: VecDeque<Held>,
    /// Reverts that are in the log, until the volume is what it was.
    reverting: Option<RequestId>,
    /// Answered, and not taken yet.
    lists: BTreeMap<RequestId, Ranges>,
}

#[derive(Debug)]
enum Held {
    Order(RequestId, Order),
    Request(RequestId, Request),
}

/// An order that goes through the log.
#[derive(Clone, Copy, Debug)]
enum Order {
    Snapshot { id: SnapshotId, time_ms: u64 },
    Delete { id: SnapshotId },
    Revert { id: SnapshotId, discard_newer: bool },
}

impl Orders {
    pub fn is_idle(&self) -> bool {
        self.held.is_empty() && self.reverting.is_none()
    }

    /// Reverts that are in the log, and that the store may not know of yet.
    pub fn is_reverting(&self) -> bool {
        self.reverting.is_some()
    }

    /// Keeps a list until it is taken.
    pub fn listed(&mut self, id: RequestId, size: BlockSize, found: Extents) {
        let bytes = |lba: Lba| lba.0 * size.bytes();
        let ranges = found.extents.iter().map(|(start, end)| bytes(*start)..bytes(*end));
        let ranges = Ranges {
            ranges: ranges.collect(),
            next: found.next.map(bytes),
        };
        self.lists.insert(id, ranges);
    }

    /// Everybody who waits.
    pub fn take_all(&mut self) -> Vec<RequestId> {
        let held = std::mem::take(&mut self.held).into_iter().map(|held| match held {
            Held::Order(id, _) | Held::Request(id, _) => id,
        });
        self.reverting.take().into_iter().chain(held).collect()
    }
}

impl<B: Backing> Volume<B> {
    /// Takes an order about snapshots. It is answered like a request, also when it is refused.
    pub fn control(&mut self, id: RequestId, control: Control) {
        if let Err(error) = self.take_control(id, control) {
            self.answer(id, Err(error));
        }
    }

    /// The snapshots, oldest first.
    pub fn snapshots(&self) -> Vec<SnapshotInfo> {
        self.store.snapshots()
    }

    /// The list that was asked for by this request, once it was answered.
    pub fn take_ranges(&mut self, id: RequestId) -> Option<Ranges> {
        self.orders.lists.remove(&id)
    }

    fn take_control(&mut self, id: RequestId, control: Control) -> Result<(), RequestError> {
        if self.closing {
            return Err(RequestError::Fenced);
        }
        let order = match control {
            Control::Snapshot { id, time_ms } => Order::Snapshot { id, time_ms },
            Control::Delete { id } => Order::Delete { id },
            Control::Revert { id, discard_newer } => Order::Revert { id, discard_newer },
            Control::Read {
                id: snapshot,
                offset,
                len,
            } => {
                self.counters.reads += 1;
                let Some(Blocks { lba, count, cut }) = Blocks::of(self.block_size(), offset, len) else {
                    return Err(RequestError::Invalid(format!(
                        "{len} bytes at {offset} of snapshot {snapshot}; expected multiples of {SECTOR_BYTES}"
                    )));
                };
                self.store
                    .read_snapshot(ReadToken::Request(id.0), snapshot, lba, count)?;
                if let Some(cut) = cut {
                    self.partials.cut_answer(id, cut);
                }
                return Ok(());
            }
            Control::Hold { id: snapshot } => {
                self.check_writable()?;
                return self.store.hold(id.0, snapshot);
            }
            Control::LetGo => {
                self.store.let_go()?;
                self.answer(id, Ok(Reply::Done));
                return Ok(());
            }
            Control::List {
                scan,
                offset,
                ranges_max,
            } => {
                let from = Lba(offset / self.block_size().bytes());
                return self.store.scan(id.0, scan, from, ranges_max);
            }
        };
        self.check_writable()?;
        self.orders.held.push_back(Held::Order(id, order));
        Ok(())
    }

    /// Holds a request back that must not overtake an order. Reads and flushes may: they ask for what was answered.
    pub(super) fn hold(&mut self, id: RequestId, request: Request) -> Option<Request> {
        let overtakes = matches!(request, Request::Read { .. } | Request::Flush);
        if overtakes || self.orders.is_idle() && !self.store.is_reverting() {
            return Some(request);
        }
        self.orders.held.push_back(Held::Request(id, request));
        None
    }

    /// Carries out orders whose turn has come, and lets go of the writes behind them.
    pub(super) fn run_orders(&mut self) {
        while !self.store.is_reverting() {
            // An order is alone in the log: nothing before it is on its way, nothing behind it was begun.
            // Writes that wait for a full pool are not answered, so an order may pass them; it may be what makes room.
            let none_waits = self.waiting.is_empty() && self.partials.is_idle() || self.waits_for_space();
            let quiet = none_waits && self.records_inflight.is_empty();
            match self.orders.held.front() {
                Some(Held::Order(..)) if quiet => {}
                Some(Held::Request(..)) if self.records_inflight.is_empty() || !self.waiting.is_empty() => {}
                _ => return,
            }
            match self.orders.held.pop_front().expect("it is there") {
                Held::Request(id, request) => {
                    if let Err(error) = self.take(id, request) {
                        self.answer(id, Err(error));
                    }
                }
                Held::Order(id, order) => {
                    if !self.run_order(id, order) {
                        self.orders.held.push_front(Held::Order(id, order));
                        return;
                    }
                }
            }
        }
    }

    /// False if the order has to wait.
    fn run_order(&mut self, id: RequestId, order: Order) -> bool {
        let (op, discard_newer) = match order {
            Order::Snapshot { id, time_ms } => {
                let size_blocks = self.store.size_blocks();
                let op = ControlOp::Snapshot {
                    id,
                    time_ms,
                    size_blocks,
                };
                (op, false)
            }
            Order::Delete { id } => (ControlOp::Delete { id }, false),
            Order::Revert { id, discard_newer } => (ControlOp::Revert { id }, discard_newer),
        };
        match self.store.allows(&op, discard_newer) {
            Err(error) => {
                self.answer(id, Err(error));
                return true;
            }
            Ok(false) => {
                self.store.want_checkpoint();
                return false;
            }
            Ok(true) => {}
        }
        match self.store.room(0, true) {
            Room::Ready => {}
            Room::Wait => return false,
            Room::NoSpace => {
                self.answer(id, Err(RequestError::NoSpace));
                return true;
            }
        }
        let seq = self.next_seq;
        self.next_seq = seq.next();
        if matches!(op, ControlOp::Revert { .. }) {
            self.orders.reverting = Some(id);
            self.change_after_revert();
        } else {
            let entry = WriteEntry {
                lba: Lba(0),
                blocks: 0,
                zero: true,
            };
            self.inflight.push_back(Inflight {
                owner: Owner::Request(id),
                entry,
                seq,
                fua: true,
            });
        }
        self.counters.records += 1;
        self.store.append_control(seq, op);
        self.records_inflight.push_back(seq);
        true
    }

    /// The volume is what it was: whoever asked for it is told, and writes go on.
    pub(super) fn reverted(&mut self) {
        if let Some(id) = self.orders.reverting.take() {
            self.answer(id, Ok(Reply::Done));
        }
        self.partials.look_again();
    }

    /// Nothing is written until the volume is what it was.
    pub(super) fn is_reverting(&self) -> bool {
        self.orders.is_reverting() || self.store.is_reverting()
    }
}
