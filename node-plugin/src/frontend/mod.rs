//! The guest's side: a block device whose requests reach an engine.
//!
//! A frontend has two halves. [`Frontend`] makes and removes devices; its calls block (mounting, loop ioctls, a
//! `stat` that our own server must answer) and are made on threads of their own. [`Session`] is the channel that the
//! device's requests arrive on; it lives on a shard and never blocks.
//!
//! ```text
//! open() ─► Session ─► a shard serves it ─► connect() ─► Device … disconnect() ─► the shard lets go ─► close()
//! ```

mod abi;
mod buffers;
mod fuse;
mod fuse_loop;
mod loop_device;
mod mounts;
mod one_file;
mod slots;

use std::fmt::Debug;
use std::os::fd::RawFd;
use std::path::PathBuf;

use galleonfs_storage_engine::buffer::BufMut;
use galleonfs_storage_engine::request::{Answer, Request};

use crate::engine::EngineError;
pub use buffers::Buffers;
pub use fuse::FuseSession;
pub use fuse_loop::FuseLoop;
pub use slots::{COMMAND_VECTORS, Command, switch_on as ring_switched_on};

/// What a device calls its block where it tells sizes: the unit that suits it best, not the smallest.
pub const BLOCK_BYTES: u64 = 4096;

/// What a frontend needs to know of a volume.
#[derive(Clone, Debug)]
pub struct Export {
    /// The volume's object name: unique on this node, and fit for a file name.
    pub volume: String,
    /// A multiple of [`BLOCK_BYTES`].
    pub size_bytes: u64,
    /// The unit of every request: 512 or 4096 bytes.
    pub sector_bytes: u32,
    /// Refuse writes.
    pub read_only: bool,
}

/// A block device that is up.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Device {
    /// Its node in `/dev`.
    pub path: PathBuf,
    /// Its capacity.
    pub size_bytes: u64,
    /// What is behind it, in words: "FUSE over io_uring".
    pub frontend: &'static str,
}

/// Makes and removes block devices of one kind. All calls may block, and none is made on a shard.
pub trait Frontend: Debug + Send + Sync {
    /// Makes the channel of a device. Nothing is answered before a shard serves the session.
    fn open(&self, export: &Export) -> Result<Box<dyn Session>, EngineError>;

    /// Makes the block device. The session is being served by now.
    fn connect(&self, export: &Export) -> Result<Device, EngineError>;

    /// Tells the kernel of a new capacity. The session knows it already.
    fn resize(&self, export: &Export, device: &Device) -> Result<Device, EngineError>;

    /// Removes the block device; the session is still being served. [`ErrorKind::Retry`](crate::engine::ErrorKind)
    /// while something has the device open.
    fn disconnect(&self, export: &Export, device: &Device) -> Result<(), EngineError>;

    /// Removes what [`Frontend::open`] made. Harmless when it is gone already.
    fn close(&self, volume: &str);

    /// Removes the devices of a process that died. The devices of a living process are left alone.
    fn remove_stale(&self) -> Result<(), EngineError>;
}

/// How requests reach a session.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum GuestPath {
    /// In memory that the kernel was given, many for one system call.
    Ring,
    /// One at a time, by reading the device.
    Device,
}

impl GuestPath {
    /// What a device whose requests come this way has behind it, in words.
    pub fn frontend(self) -> &'static str {
        match self {
            GuestPath::Ring => "FUSE over io_uring",
            GuestPath::Device => "FUSE",
        }
    }
}

/// Where one request is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Origin {
    /// It was read from the device.
    Device,
    /// It is in this slot.
    Slot(u32),
}

/// Names one guest request of a session until it is answered.
#[derive(Clone, Copy, Debug)]
pub struct Ticket {
    unique: u64,
    origin: Origin,
    /// What was asked, for the counters and for the form of the answer.
    pub kind: RequestKind,
    /// Length of the range asked for.
    pub bytes: u64,
    /// The payload is one of the session's few large buffers.
    pub handed_over: bool,
}

/// The kind of a guest request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RequestKind {
    Read,
    Write,
    Flush,
    Zero,
}

/// What [`Session::receive`] found.
#[derive(Debug)]
pub enum Received {
    /// A request for the engine.
    Request(Ticket, Request),
    /// A read from this offset, whose answer may be put in place.
    Read(Ticket, u64, BufMut),
    /// Something that the session answered by itself.
    Served,
    /// Nothing for now: wait until the descriptor is readable.
    Empty,
    /// The device is gone; nothing will come any more.
    Ended(String),
}

/// The channel of one device, on a shard. No call blocks.
///
/// Requests come through the descriptor, and, if [`Session::allow_ring`] was called, also as ends of commands that the
/// shard carries out on its ring: [`Session::command`] says what to do, [`Session::commanded`] is told of the end.
pub trait Session: Debug + Send {
    /// Readable when [`Session::receive`] may have something.
    fn descriptor(&self) -> RawFd;

    /// The descriptor is readable.
    fn readable(&mut self);

    /// Takes the next request.
    fn receive(&mut self, buffers: &mut Buffers) -> Received;

    /// Answers a request. A device that is gone takes no answer, and that is no error.
    fn answer(&mut self, ticket: Ticket, answer: Answer);

    /// Changes the size that the device is told when it asks.
    fn resize(&mut self, size_bytes: u64);

    /// From now on every request for data is refused with an I/O error; the rest is still served, so that the device
    /// can be taken down.
    fn refuse(&mut self);

    /// Commands can be carried out. To be called before anything is received.
    fn allow_ring(&mut self);

    /// The next command to carry out. What it points to stays until it has ended.
    fn command(&mut self) -> Option<Command>;

    /// The command for `slot` has ended.
    fn commanded(&mut self, slot: u32, result: i32);

    /// Commands that have not ended. Nothing of the session may go before they have; the end of the device ends them.
    fn commands_out(&self) -> usize;

    /// True if [`Session::receive`] has something that no event will tell of.
    fn has_arrived(&self) -> bool;

    /// The way that requests take.
    fn path(&self) -> GuestPath;

    /// True while there is memory that [`Session::trim`] would free.
    fn is_warm(&self) -> bool;

    /// Frees memory that is not in use.
    fn trim(&mut self);
}
