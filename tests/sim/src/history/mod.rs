//! What guests asked of a volume and what they were told, and whether a disk could have answered like that.
//!
//! A [`History`] is a list of plain values in the order in which they happened: simulated runs and real ones write the
//! same. Every write fills its block with an id that no other write has, so a read says which write it saw. Blocks do not
//! depend on each other, but for flushes and snapshots, so each is judged alone ([`check`]):
//!
//! | rule | what holds |
//! |---|---|
//! | a | Without a crash a block is a linearizable register. A write with an unknown end lands before the next epoch begins, or never. |
//! | b | After a crash a block is as the last write that a completed flush or FUA covered left it, or as any later write did that was asked for before the crash. The first read settles which. |
//! | c | Replicas that fail add nothing to that: there is no event for them. |
//! | d | A read fails only while no clean copy of its block is left. |
//! | e | A read never shows what nobody wrote. |
//! | f | In the end all copies of a block are equal, in version and content, and as a read would show them. |
//! | g | A snapshot shows all blocks as they were at one moment between its order and its end, whenever it is read. |
//!
//! The text form has one item a line ([`History::parse`], and `Display`), so a run that failed can be kept and judged again.

mod block;
mod check;
mod search;
mod text;

pub use check::{Rule, Summary, Violation, check};
pub use text::Malformed;

/// What a block was seen to hold.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Value {
    /// Zeros: never written, or discarded.
    Zero,
    /// What the write with this id filled it with.
    Write(u64),
    /// Neither.
    Garbage,
}

/// What a guest asks for. What covers several blocks is several calls, for only single blocks are never torn.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Call {
    Read {
        block: u64,
    },
    /// With FUA it is answered when a power cut cannot take it any more.
    Write {
        block: u64,
        id: u64,
        fua: bool,
    },
    Discard {
        block: u64,
    },
    Flush,
    Snapshot {
        name: u64,
    },
    SnapshotRead {
        name: u64,
        block: u64,
    },
}

/// A version of a block: epoch and seq.
pub type Version = (u32, u64);

/// One thing that happened.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Item {
    Invoke {
        op: u64,
        call: Call,
    },
    /// It was done. A read says what it saw.
    Ok {
        op: u64,
        value: Option<Value>,
    },
    /// It was not done, and never will be. For a read: an I/O error.
    Fail {
        op: u64,
    },
    /// Nobody will ever know.
    Info {
        op: u64,
    },
    /// Another engine serves from here on, for the same guest.
    Epoch,
    /// The guest is gone with its node. What it had asked for and was not told about ends unknown.
    Crash,
    /// All replicas in sync have lost power, and the guest is told.
    PowerLoss,
    /// From here on no clean copy of a block is left.
    Damaged {
        block: u64,
    },
    /// From here on there is one again.
    Mended {
        block: u64,
    },
    /// At the end: what a replica in sync holds.
    Copy {
        replica: u64,
        block: u64,
        version: Version,
        value: Value,
    },
}

/// What happened, in order. The place of an item is its time.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct History {
    pub items: Vec<Item>,
}
