//! Engines for the tests of what drives them.

use std::collections::{HashMap, VecDeque};
use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard};

use galleonfs_storage_engine::BlockEngine;
use galleonfs_storage_engine::buffer::{Buf, BufMut};
use galleonfs_storage_engine::io::{Disk, FileId, Io, IoDone, IoFailure, IoId, IoResult, Output, SegmentId};
use galleonfs_storage_engine::request::{Answer, Piece, Reply, Request, RequestError, RequestId};

use crate::disk::FileDisk;
use crate::engine::{AttachSpec, EngineError, ErrorKind, Finding, StoreReport, VolumeEngine};

const BLOCK: u64 = 4096;
const SEGMENT: FileId = FileId::Segment(SegmentId(0));

/// What a test sees of a fake, and what it can make it do.
#[derive(Clone, Debug, Default)]
pub struct Control(Arc<Mutex<Seen>>);

#[derive(Debug, Default)]
pub struct Seen {
    /// Requests that touch this range are held until it is empty again.
    pub hold: Range<u64>,
    /// How many are held.
    pub held: usize,
    pub flushes: u64,
    pub written_bytes: u64,
    pub zeroed: Vec<(u64, u64)>,
    /// Every request fails as if the disk had.
    pub stopped: Option<String>,
}

impl Control {
    pub fn lock(&self) -> MutexGuard<'_, Seen> {
        // A test that fails may hold it; its fakes go on.
        self.0.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }
}

/// A volume in memory.
pub struct Ram {
    control: Control,
    blocks: HashMap<u64, Buf>,
    size_bytes: u64,
    held: Vec<(RequestId, Request)>,
    out: VecDeque<Output>,
    now_ms: u64,
    closed: bool,
}

impl Ram {
    pub fn new(control: Control, size_bytes: u64) -> Ram {
        Ram {
            control,
            blocks: HashMap::new(),
            size_bytes,
            held: Vec::new(),
            out: VecDeque::new(),
            now_ms: 0,
            closed: false,
        }
    }

    fn serve(&mut self, request: Request) -> Answer {
        let mut seen = self.control.lock();
        if let Some(why) = &seen.stopped {
            return Err(RequestError::Failed(why.clone()));
        }
        match request {
            Request::Read { offset, len } => {
                let blocks = (offset / BLOCK..(offset + len) / BLOCK).map(|block| match self.blocks.get(&block) {
                    Some(buf) => Piece::Bytes(buf.clone()),
                    None => Piece::Zeros(BLOCK as usize),
                });
                Ok(Reply::Data(blocks.collect()))
            }
            Request::Write { offset, data, .. } => {
                seen.written_bytes += data.len() as u64;
                for at in (0..data.len()).step_by(BLOCK as usize) {
                    // A copy: holding on to the payload would pin a whole buffer for one of its blocks.
                    let block = BufMut::copy_of(&data.as_ref()[at..at + BLOCK as usize]).freeze();
                    self.blocks.insert((offset + at as u64) / BLOCK, block);
                }
                Ok(Reply::Done)
            }
            Request::Flush => {
                seen.flushes += 1;
                Ok(Reply::Done)
            }
            Request::Zero { offset, len, .. } => {
                seen.zeroed.push((offset, len));
                self.blocks
                    .retain(|block, _| !(offset..offset + len).contains(&(block * BLOCK)));
                Ok(Reply::Done)
            }
            Request::Grow { len } => {
                self.size_bytes = len;
                Ok(Reply::Done)
            }
        }
    }
}

fn touches(request: &Request, range: &Range<u64>) -> bool {
    let (offset, len) = match request {
        Request::Read { offset, len } | Request::Zero { offset, len, .. } => (*offset, *len),
        Request::Write { offset, data, .. } => (*offset, data.len() as u64),
        Request::Flush => (0, u64::MAX),
        Request::Grow { .. } => return false,
    };
    offset < range.end && range.start < offset.saturating_add(len)
}

impl BlockEngine for Ram {
    fn submit(&mut self, id: RequestId, request: Request) {
        let hold = self.control.lock().hold.clone();
        if touches(&request, &hold) {
            self.held.push((id, request));
            self.control.lock().held = self.held.len();
        } else {
            let answer = self.serve(request);
            self.out.push_back(Output::Answer(id, answer));
        }
    }

    fn read_into(&mut self, id: RequestId, offset: u64, into: BufMut) {
        let len = into.len() as u64;
        drop(into);
        self.submit(id, Request::Read { offset, len });
    }

    fn completed(&mut self, id: IoId, _: IoResult) {
        panic!("a volume in memory has no disk operation {id:?}");
    }

    fn tick(&mut self, now_ms: u64) {
        self.now_ms = now_ms;
        if self.control.lock().hold.is_empty() {
            for (id, request) in std::mem::take(&mut self.held) {
                let answer = self.serve(request);
                self.out.push_back(Output::Answer(id, answer));
            }
            self.control.lock().held = 0;
        }
    }

    fn next_tick_ms(&self) -> Option<u64> {
        (!self.held.is_empty()).then_some(self.now_ms + 5)
    }

    fn poll(&mut self) -> Option<Output> {
        self.out.pop_front()
    }

    fn close(&mut self) {
        self.closed = true;
    }

    fn is_closed(&self) -> bool {
        self.closed && self.held.is_empty()
    }
}

impl VolumeEngine for Ram {
    fn size_bytes(&self) -> u64 {
        self.size_bytes
    }

    fn stopped(&self) -> Option<String> {
        self.control.lock().stopped.clone()
    }

    fn waits_for_space(&self) -> bool {
        false
    }

    fn store(&self) -> StoreReport {
        StoreReport::default()
    }

    fn finding(&mut self) -> Option<Finding> {
        None
    }
}

/// A volume that is one file, block for block: every request is a disk operation of the same form.
pub struct Mapped {
    control: Control,
    size_bytes: u64,
    next: u64,
    out: VecDeque<Output>,
    pending: HashMap<IoId, RequestId>,
    closing: bool,
}

impl Mapped {
    pub fn open(control: Control, spec: &AttachSpec, mut disk: FileDisk) -> Result<Mapped, EngineError> {
        disk.create(SEGMENT, spec.size_bytes)
            .map_err(|error| EngineError::new(ErrorKind::Failed, "make the file of a fake").because(error))?;
        Ok(Mapped {
            control,
            size_bytes: spec.size_bytes,
            next: 0,
            out: VecDeque::new(),
            pending: HashMap::new(),
            closing: false,
        })
    }
}

impl Mapped {
    fn start(&mut self, request: RequestId, io: Io) {
        self.next += 1;
        self.pending.insert(IoId(self.next), request);
        self.out.push_back(Output::Io(IoId(self.next), io));
    }
}

impl BlockEngine for Mapped {
    fn submit(&mut self, id: RequestId, request: Request) {
        let file = SEGMENT;
        let io = match request {
            Request::Read { offset, len } => Io::Read {
                file,
                offset,
                buf: BufMut::zeroed(len as usize),
            },
            Request::Write { offset, data, .. } => Io::Write {
                file,
                offset,
                parts: vec![data],
            },
            Request::Flush => {
                self.control.lock().flushes += 1;
                Io::Sync { file }
            }
            Request::Zero { offset, len, .. } => {
                let parts = vec![BufMut::zeroed(BLOCK as usize).freeze(); (len / BLOCK) as usize];
                Io::Write { file, offset, parts }
            }
            Request::Grow { len } => {
                self.size_bytes = len;
                Io::Create { file, len }
            }
        };
        self.start(id, io);
    }

    fn read_into(&mut self, id: RequestId, offset: u64, into: BufMut) {
        let io = Io::Read {
            file: SEGMENT,
            offset,
            buf: into,
        };
        self.start(id, io);
    }

    fn completed(&mut self, id: IoId, result: IoResult) {
        let request = self.pending.remove(&id).expect("an operation is completed once");
        let answer = match result {
            Ok(IoDone::Read(buf)) => Ok(Reply::Data(vec![Piece::Bytes(buf.freeze())])),
            Ok(IoDone::Done | IoDone::Created { .. }) => Ok(Reply::Done),
            Err(IoFailure::NoSpace) => Err(RequestError::NoSpace),
            Err(error) => Err(RequestError::Failed(error.to_string())),
        };
        self.out.push_back(Output::Answer(request, answer));
    }

    fn tick(&mut self, _: u64) {}

    fn next_tick_ms(&self) -> Option<u64> {
        None
    }

    fn poll(&mut self) -> Option<Output> {
        self.out.pop_front()
    }

    fn close(&mut self) {
        self.closing = true;
    }

    fn is_closed(&self) -> bool {
        self.closing && self.pending.is_empty()
    }
}

impl VolumeEngine for Mapped {
    fn size_bytes(&self) -> u64 {
        self.size_bytes
    }

    fn stopped(&self) -> Option<String> {
        None
    }

    fn waits_for_space(&self) -> bool {
        false
    }

    fn store(&self) -> StoreReport {
        StoreReport::default()
    }

    fn finding(&mut self) -> Option<Finding> {
        None
    }
}
