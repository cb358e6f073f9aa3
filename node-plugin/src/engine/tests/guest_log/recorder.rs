//! Writes down what a guest asks of its volume, and when it is answered: the log that `dm-log-writes` keeps in a kernel.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard};

use galleonfs_storage_engine::BlockEngine;
use galleonfs_storage_engine::buffer::BufMut;
use galleonfs_storage_engine::io::{IoId, IoResult, Output};
use galleonfs_storage_engine::request::{Request, RequestId};

use crate::engine::{Finding, StoreReport, VolumeEngine};

/// What a guest asked that changes the volume or makes it durable.
#[derive(Debug)]
pub enum Asked {
    Write { offset: u64, data: Vec<u8>, fua: bool },
    Zero { offset: u64, len: u64, fua: bool },
    Flush,
}

/// A moment of the log. The number is the place of the request in [`Log::asked`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Event {
    Asked(usize),
    Answered(usize),
}

/// Everything in the order in which it happened.
#[derive(Debug, Default)]
pub struct Log {
    pub asked: Vec<Asked>,
    pub events: Vec<Event>,
    /// Requests that the engine failed; a test expects none.
    pub failed: Vec<String>,
}

/// The log while it grows.
#[derive(Clone, Debug, Default)]
pub struct SharedLog(Arc<Mutex<Log>>);

impl SharedLog {
    fn lock(&self) -> MutexGuard<'_, Log> {
        self.0.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    /// How many moments have passed. What a guest was told before it looked here happened before this moment.
    pub fn moment(&self) -> usize {
        self.lock().events.len()
    }

    pub fn take(&self) -> Log {
        std::mem::take(&mut self.lock())
    }
}

/// An engine that does what the one inside does, and writes it down.
pub struct Recorder {
    inner: Box<dyn VolumeEngine>,
    log: SharedLog,
    open: HashMap<RequestId, usize>,
}

impl Recorder {
    pub fn new(inner: Box<dyn VolumeEngine>, log: SharedLog) -> Recorder {
        Recorder {
            inner,
            log,
            open: HashMap::new(),
        }
    }
}

impl BlockEngine for Recorder {
    fn submit(&mut self, id: RequestId, request: Request) {
        let asked = match &request {
            Request::Write { offset, data, fua } => Some(Asked::Write {
                offset: *offset,
                data: data.as_ref().to_vec(),
                fua: *fua,
            }),
            Request::Zero { offset, len, fua } => Some(Asked::Zero {
                offset: *offset,
                len: *len,
                fua: *fua,
            }),
            Request::Flush => Some(Asked::Flush),
            Request::Read { .. } | Request::Grow { .. } => None,
        };
        if let Some(asked) = asked {
            let mut log = self.log.lock();
            let number = log.asked.len();
            log.asked.push(asked);
            log.events.push(Event::Asked(number));
            self.open.insert(id, number);
        }
        self.inner.submit(id, request);
    }

    fn read_into(&mut self, id: RequestId, offset: u64, into: BufMut) {
        self.inner.read_into(id, offset, into);
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
        let output = self.inner.poll();
        if let Some(Output::Answer(id, answer)) = &output
            && let Some(number) = self.open.remove(id)
        {
            // Before the guest can know of it.
            let mut log = self.log.lock();
            match answer {
                Ok(_) => log.events.push(Event::Answered(number)),
                Err(error) => log.failed.push(error.to_string()),
            }
        }
        output
    }

    fn close(&mut self) {
        self.inner.close();
    }

    fn is_closed(&self) -> bool {
        self.inner.is_closed()
    }
}

impl VolumeEngine for Recorder {
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
