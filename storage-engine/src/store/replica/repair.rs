//! Mending: what does not pass its check here is written anew as it is elsewhere, in the same version.
//!
//! What is here is read first: only a block that cannot be read is written again, so an order that comes twice, or late,
//! costs a read. From then on it is a copy like the others, but that it replaces its own version, too. Whatever came in
//! between is newer, and stays. In the log it is a record of copies; the map lets go of the old place with the next
//! checkpoint, and snapshots that have the block in common with the volume get the new one.

use std::collections::VecDeque;

use super::super::page::Entry;
use super::super::read::Asker;
use super::super::scrub::{Damage, DamagedThing};
use super::super::{Event, Store};
use super::stored::Stored;
use crate::types::Lba;

/// Orders to mend whose blocks are being looked at.
#[derive(Debug, Default)]
pub struct Repairs {
    next: u64,
    orders: VecDeque<Looking>,
}

#[derive(Debug)]
struct Looking {
    id: u64,
    token: u64,
    copies: Vec<Stored>,
    damaged: Vec<usize>,
    outstanding: usize,
}

impl Repairs {
    pub fn is_empty(&self) -> bool {
        self.orders.is_empty()
    }

    /// Orders and bytes.
    pub fn waiting(&self) -> (usize, usize) {
        let copies = self.orders.iter().flat_map(|order| &order.copies);
        let bytes = copies.map(|copy| match copy {
            Stored::Block(block) => block.bytes.len(),
            Stored::Zeros { .. } => 0,
        });
        (self.orders.len(), bytes.sum())
    }

    pub fn take_all(&mut self) -> Vec<u64> {
        self.orders.drain(..).map(|order| order.token).collect()
    }
}

impl Store {
    /// Like [`Store::copy_in`], and also takes what is as old as what is here, if that is a block that cannot be read or
    /// does not pass its check.
    pub fn repair_in(&mut self, token: u64, copies: Vec<Stored>) {
        if let Err(error) = self.verify_copies(&copies) {
            return self.events.push_back(Event::CopiedIn(token, Err(error)));
        }
        let id = self.copying.repairs.next;
        self.copying.repairs.next += 1;
        let blocks = copies.iter().enumerate().filter_map(|(index, copy)| match copy {
            Stored::Block(block) => Some((index, block.lba)),
            Stored::Zeros { .. } => None,
        });
        let blocks: Vec<(usize, Lba)> = blocks.collect();
        if blocks.is_empty() {
            return self.order_copies(token, copies, &[]);
        }
        self.copying.repairs.orders.push_back(Looking {
            id,
            token,
            copies,
            damaged: Vec::new(),
            outstanding: blocks.len(),
        });
        for (index, lba) in blocks {
            self.start_read(Asker::Repair(id, index), lba, 1, None, None);
        }
    }

    /// One block of an order was read, or cannot be.
    pub(in super::super) fn repair_looked_at(&mut self, id: u64, index: usize, failed: bool) {
        let orders = &mut self.copying.repairs.orders;
        let Some(place) = orders.iter().position(|order| order.id == id) else {
            return; // the store has stopped, and said so
        };
        let order = &mut orders[place];
        order.outstanding -= 1;
        if failed {
            order.damaged.push(index);
        }
        if order.outstanding == 0 {
            let order = orders.remove(place).expect("it was just found");
            self.order_copies(order.token, order.copies, &order.damaged);
        }
    }

    /// A flushed block did not pass its check when the log was replayed.
    pub(in super::super) fn replayed_damage(&mut self, lba: Lba, entry: Entry) {
        self.found_damage(Damage {
            thing: DamagedThing::Block { lba, snapshot: None },
            version: entry.version,
            segment: entry.location.segment(),
            offset: entry.location.offset(),
            why: "it did not pass its check when the log was replayed".into(),
        });
    }
}
