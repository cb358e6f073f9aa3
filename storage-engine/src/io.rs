//! Disk operations as values: what the engine wants done, and how it is told of the outcome.
//!
//! All files live in one replica directory. Offsets and lengths are multiples of 4096 bytes, buffers are page
//! aligned, so a driver may use direct I/O throughout.

use crate::buffer::{Buf, BufMut};
use crate::request::{Answer, RequestId};

/// Names one disk operation of one engine until it is completed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct IoId(pub u64);

/// Number of a log segment; never used twice at the same time, but used again after the segment was freed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct SegmentId(pub u32);

/// A file of a replica directory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum FileId {
    /// One of the two superblock files, 0 or 1.
    Superblock(u8),
    /// One of the two files with the salts of a sealed replica, 0 or 1.
    Keys(u8),
    /// A segment of the log.
    Segment(SegmentId),
}

impl FileId {
    /// The path below the replica directory: `superblock.0`, `segments/00000007`.
    pub fn path(self) -> String {
        match self {
            FileId::Superblock(slot) => format!("superblock.{slot}"),
            FileId::Keys(slot) => format!("keys.{slot}"),
            FileId::Segment(id) => format!("segments/{:08}", id.0),
        }
    }

    /// The opposite of [`FileId::path`]; `None` for any other name.
    pub fn from_path(path: &str) -> Option<FileId> {
        match path {
            "superblock.0" => Some(FileId::Superblock(0)),
            "superblock.1" => Some(FileId::Superblock(1)),
            "keys.0" => Some(FileId::Keys(0)),
            "keys.1" => Some(FileId::Keys(1)),
            _ => {
                let number = path.strip_prefix("segments/")?;
                let id = number.parse().ok()?;
                (number.len() >= 8).then_some(FileId::Segment(SegmentId(id)))
            }
        }
    }
}

/// One disk operation.
#[derive(Debug)]
pub enum Io {
    /// Fill `buf` from `offset`. A read past the end of the file fails.
    Read { file: FileId, offset: u64, buf: BufMut },
    /// Write `parts`, one after the other, at `offset`. Done means: a read sees it, and the death of this process
    /// cannot take it back. It does not mean that a power cut cannot.
    Write { file: FileId, offset: u64, parts: Vec<Buf> },
    /// Make everything that was written to `file` before this was issued survive a power cut (`fdatasync`).
    Sync { file: FileId },
    /// Make the file, or take the one that is there, give it `len` bytes with its blocks allocated (`fallocate`,
    /// keeping what it holds), and make both its metadata and its name survive a power cut.
    /// [`IoFailure::NoSpace`] leaves no file behind that was not there before.
    Create { file: FileId, len: u64 },
    /// Remove the file. Its space returns to the pool. No sync needed.
    Remove { file: FileId },
}

/// How an operation ended.
pub type IoResult = Result<IoDone, IoFailure>;

/// What a successful operation gives back.
#[derive(Debug)]
pub enum IoDone {
    /// The filled buffer of a read.
    Read(BufMut),
    /// A file was made, and the pool has so much left beyond what has to stay free: engines share it, and give back what
    /// others need.
    Created { pool_free_bytes: u64 },
    /// Any other operation.
    Done,
}

/// Why an operation failed, as far as the engine cares.
#[derive(Debug, Clone, thiserror::Error)]
pub enum IoFailure {
    /// The pool's file system has no room (`ENOSPC`, `EDQUOT`).
    #[error("no space left in the pool")]
    NoSpace,
    /// The file is not there.
    #[error("the file is missing")]
    NotFound,
    /// Anything else; the text is the operating system's.
    #[error("{0}")]
    Failed(String),
}

/// What an engine hands out.
#[derive(Debug)]
pub enum Output {
    /// Perform this, then call `completed`.
    Io(IoId, Io),
    /// Answer this guest request.
    Answer(RequestId, Answer),
}

/// The same operations, one at a time and waited for: recovery, formatting, the offline checker and the tests.
///
/// [`perform`] carries out an [`Io`] on one.
pub trait Disk {
    /// See [`Io::Read`].
    fn read(&mut self, file: FileId, offset: u64, buf: &mut [u8]) -> Result<(), IoFailure>;
    /// See [`Io::Write`].
    fn write(&mut self, file: FileId, offset: u64, parts: &[Buf]) -> Result<(), IoFailure>;
    /// See [`Io::Sync`].
    fn sync(&mut self, file: FileId) -> Result<(), IoFailure>;
    /// See [`Io::Create`].
    fn create(&mut self, file: FileId, len: u64) -> Result<(), IoFailure>;
    /// How many names the file has, here and in other replicas' directories. A disk on which files are linked says so:
    /// a file with a second name is never written into.
    fn names(&mut self, file: FileId) -> Result<u64, IoFailure> {
        let _ = file;
        Ok(1)
    }
    /// See [`Io::Remove`].
    fn remove(&mut self, file: FileId) -> Result<(), IoFailure>;
    /// Every file of the replica directory with its length in bytes, in any order. Names that are not a [`FileId`]
    /// are left out.
    fn list(&mut self) -> Result<Vec<(FileId, u64)>, IoFailure>;
}

/// Carries out one operation on a blocking disk.
pub fn perform(disk: &mut dyn Disk, io: Io) -> IoResult {
    match io {
        Io::Read { file, offset, mut buf } => {
            disk.read(file, offset, buf.as_mut())?;
            Ok(IoDone::Read(buf))
        }
        Io::Write { file, offset, parts } => disk.write(file, offset, &parts).map(|()| IoDone::Done),
        Io::Sync { file } => disk.sync(file).map(|()| IoDone::Done),
        Io::Create { file, len } => disk.create(file, len).map(|()| IoDone::Done),
        Io::Remove { file } => disk.remove(file).map(|()| IoDone::Done),
    }
}
