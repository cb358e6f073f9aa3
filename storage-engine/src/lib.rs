//! The block engine of GalleonFS: it thinks, somebody else acts.
//!
//! Everything here is a state machine. A [`BlockEngine`] takes guest requests and the outcomes of disk operations,
//! and hands out disk operations to perform ([`io::Io`]) and answers for the guest ([`request::Answer`]). It never
//! opens a file, reads a clock, draws a random number or starts a task: what is random or timed arrives as an
//! argument. That is what lets the same code run under the node plugin, the offline checker and the crash tests.
//!
//! ```text
//! guest request ─► volume ─► (replication) ─► store ─► Io ─► the driver performs it ─► completed() ─► store ─► Answer
//! ```

#![forbid(unsafe_code)]

pub mod buffer;
pub mod compress;
pub mod io;
pub mod replication;
pub mod request;
pub mod seal;
pub mod store;
pub mod types;
pub mod volume;

use buffer::BufMut;
use io::{IoId, IoResult, Output};
use request::{Request, RequestId};

/// What a driver drives: one volume's engine. The node plugin drives a real volume, its own tests drive a fake in memory.
///
/// The contract: the driver calls one of the three verbs, then drains [`BlockEngine::poll`] until it is empty, always
/// from one thread. Every [`Output::Io`] is answered by exactly one [`BlockEngine::completed`], in any order; every
/// request by exactly one [`Output::Answer`].
pub trait BlockEngine {
    /// Takes one guest request. The answer comes through [`BlockEngine::poll`], also when the request is refused. By
    /// then the engine holds nothing of a write's payload any more: its memory may be lent, and the answer waits for it.
    fn submit(&mut self, id: RequestId, request: Request);

    /// Takes a read of `into.len()` bytes from `offset` whose answer may be put in `into`, lent memory, in place: then
    /// the pieces of the answer are parts of it, each where it belongs. Otherwise the engine lets go of it.
    fn read_into(&mut self, id: RequestId, offset: u64, into: BufMut);

    /// Reports how a disk operation ended.
    fn completed(&mut self, id: IoId, result: IoResult);

    /// Tells the time: milliseconds of a clock that never goes back, from any origin. Called when the time that
    /// [`BlockEngine::next_tick_ms`] named has come; calling it more often does no harm.
    fn tick(&mut self, now_ms: u64);

    /// When [`BlockEngine::tick`] should be called next; `None` while there is nothing to wait for (an idle volume
    /// costs no CPU).
    fn next_tick_ms(&self) -> Option<u64>;

    /// The next thing to do, `None` when there is nothing left for now. Work that was batched is let go here, so a
    /// driver submits all requests that have arrived before it polls.
    fn poll(&mut self) -> Option<Output>;

    /// Starts an orderly end: no more requests will come; what is dirty is written, a checkpoint is made, and then
    /// [`BlockEngine::is_closed`] turns true (or the engine is poisoned and stays as it is).
    fn close(&mut self);

    /// True once an orderly end is complete: no disk operation is out and none will come.
    fn is_closed(&self) -> bool;
}
