//! Front ends that break the promise of a flush, each in one way: what the check of the log has to find.

use std::collections::{HashSet, VecDeque};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use galleonfs_storage_engine::BlockEngine;
use galleonfs_storage_engine::buffer::BufMut;
use galleonfs_storage_engine::io::{IoId, IoResult, Output};
use galleonfs_storage_engine::request::{Reply, Request, RequestId};

use super::recorder::Recorder;
use crate::engine::{Finding, StoreReport, VolumeEngine};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// Every second flush is answered and not passed on.
    LosesFlushes,
    /// Every third write is answered, and passed on only behind the flush that follows it.
    WritesPassFlushes,
}

/// Stands between the guest and the log, so the log has what a disk below a faulty front end would see.
pub struct Faulty {
    inner: Recorder,
    fault: Fault,
    /// Nothing is broken before the file system is made and mounted.
    armed: Arc<AtomicBool>,
    writes: u64,
    flushes: u64,
    /// Answered and not passed on.
    held: Vec<(u64, BufMut)>,
    /// Held writes on their way; until they are answered everything else waits.
    releasing: HashSet<RequestId>,
    flushing: HashSet<RequestId>,
    waiting: VecDeque<Waiting>,
    next: u64,
    out: VecDeque<Output>,
}

enum Waiting {
    Request(RequestId, Request),
    ReadInto(RequestId, u64, BufMut),
}

impl Faulty {
    pub fn new(inner: Recorder, fault: Fault, armed: Arc<AtomicBool>) -> Faulty {
        Faulty {
            inner,
            fault,
            armed,
            writes: 0,
            flushes: 0,
            held: Vec::new(),
            releasing: HashSet::new(),
            flushing: HashSet::new(),
            waiting: VecDeque::new(),
            next: 0,
            out: VecDeque::new(),
        }
    }

    fn release(&mut self) {
        for (offset, data) in self.held.drain(..) {
            // The driver numbers its requests from 0 on, and never comes here.
            let id = RequestId(u64::MAX - self.next);
            self.next += 1;
            self.releasing.insert(id);
            let data = data.freeze();
            self.inner.submit(
                id,
                Request::Write {
                    offset,
                    data,
                    fua: false,
                },
            );
        }
    }

    fn take(&mut self, next: Waiting) {
        let touched = match &next {
            Waiting::ReadInto(_, offset, into) => *offset..*offset + into.len() as u64,
            Waiting::Request(_, Request::Read { offset, len } | Request::Zero { offset, len, .. }) => {
                *offset..*offset + *len
            }
            Waiting::Request(_, Request::Write { offset, data, .. }) => *offset..*offset + data.len() as u64,
            Waiting::Request(_, Request::Flush | Request::Grow { .. }) => 0..0,
        };
        // A guest sees its own writes, also here.
        if self
            .held
            .iter()
            .any(|(offset, data)| *offset < touched.end && touched.start < offset + data.len() as u64)
        {
            self.release();
        }
        if !self.releasing.is_empty() {
            self.waiting.push_back(next);
            return;
        }
        match next {
            Waiting::ReadInto(id, offset, into) => self.inner.read_into(id, offset, into),
            Waiting::Request(id, request) => self.pass(id, request),
        }
    }

    fn pass(&mut self, id: RequestId, request: Request) {
        let armed = self.armed.load(Ordering::Relaxed);
        match (&request, self.fault) {
            (Request::Flush, Fault::LosesFlushes) if armed => {
                self.flushes += 1;
                if self.flushes.is_multiple_of(2) {
                    return self.out.push_back(Output::Answer(id, Ok(Reply::Done)));
                }
            }
            (Request::Flush, Fault::WritesPassFlushes) => drop(self.flushing.insert(id)),
            (Request::Write { offset, data, .. }, Fault::WritesPassFlushes) if armed => {
                self.writes += 1;
                if self.writes.is_multiple_of(3) {
                    self.held.push((*offset, BufMut::copy_of(data.as_ref())));
                    return self.out.push_back(Output::Answer(id, Ok(Reply::Done)));
                }
            }
            _ => {}
        }
        self.inner.submit(id, request);
    }
}

impl BlockEngine for Faulty {
    fn submit(&mut self, id: RequestId, request: Request) {
        self.take(Waiting::Request(id, request));
    }

    fn read_into(&mut self, id: RequestId, offset: u64, into: BufMut) {
        self.take(Waiting::ReadInto(id, offset, into));
    }

    fn completed(&mut self, id: IoId, result: IoResult) {
        self.inner.completed(id, result);
    }

    fn tick(&mut self, now_ms: u64) {
        self.inner.tick(now_ms);
    }

    fn next_tick_ms(&self) -> Option<u64> {
        self.inner.next_tick_ms()
    }

    fn poll(&mut self) -> Option<Output> {
        loop {
            if let Some(output) = self.out.pop_front() {
                return Some(output);
            }
            match self.inner.poll()? {
                Output::Answer(id, answer) if self.releasing.remove(&id) => {
                    answer.expect("a write that was held back succeeds");
                    if self.releasing.is_empty() {
                        for next in std::mem::take(&mut self.waiting) {
                            self.take(next);
                        }
                    }
                }
                Output::Answer(id, answer) => {
                    if self.flushing.remove(&id) {
                        self.release();
                    }
                    return Some(Output::Answer(id, answer));
                }
                output @ Output::Io(..) => return Some(output),
            }
        }
    }

    fn close(&mut self) {
        assert!(self.held.is_empty(), "a guest flushes before it lets go");
        self.inner.close();
    }

    fn is_closed(&self) -> bool {
        self.inner.is_closed()
    }
}

impl VolumeEngine for Faulty {
    fn size_bytes(&self) -> u64 {
        self.inner.size_bytes()
    }

    fn stopped(&self) -> Option<String> {
        self.inner.stopped()
    }

    fn waits_for_space(&self) -> bool {
        self.inner.waits_for_space()
    }

    fn store(&self) -> StoreReport {
        self.inner.store()
    }

    fn finding(&mut self) -> Option<Finding> {
        self.inner.finding()
    }
}
