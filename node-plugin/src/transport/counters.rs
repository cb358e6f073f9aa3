//! What the transport has done, for the metrics page.

use std::sync::atomic::{AtomicU64, Ordering};

/// Counted by all threads.
#[derive(Debug, Default)]
pub struct Counters {
    frames_sent: AtomicU64,
    bytes_sent: AtomicU64,
    frames_received: AtomicU64,
    bytes_received: AtomicU64,
    sessions: AtomicU64,
    refused: AtomicU64,
    failed_dials: AtomicU64,
    full: AtomicU64,
}

/// How the counters stand.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    pub frames_sent: u64,
    /// Before TLS.
    pub bytes_sent: u64,
    pub frames_received: u64,
    pub bytes_received: u64,
    /// Connections on which both ends knew each other.
    pub sessions: u64,
    /// Connections that ended because of what came, or of who it was.
    pub refused: u64,
    pub failed_dials: u64,
    /// Frames that found their queue full.
    pub full: u64,
}

impl Counters {
    pub(super) fn sent(&self, frames: usize, bytes: usize) {
        self.frames_sent.fetch_add(frames as u64, Ordering::Relaxed);
        self.bytes_sent.fetch_add(bytes as u64, Ordering::Relaxed);
    }

    pub(super) fn received(&self, frames: usize, bytes: usize) {
        self.frames_received.fetch_add(frames as u64, Ordering::Relaxed);
        self.bytes_received.fetch_add(bytes as u64, Ordering::Relaxed);
    }

    pub(super) fn session(&self) {
        self.sessions.fetch_add(1, Ordering::Relaxed);
    }

    pub(super) fn refused(&self) {
        self.refused.fetch_add(1, Ordering::Relaxed);
    }

    pub(super) fn failed_dial(&self) {
        self.failed_dials.fetch_add(1, Ordering::Relaxed);
    }

    pub(super) fn full(&self) {
        self.full.fetch_add(1, Ordering::Relaxed);
    }

    pub fn read(&self) -> Counts {
        Counts {
            frames_sent: self.frames_sent.load(Ordering::Relaxed),
            bytes_sent: self.bytes_sent.load(Ordering::Relaxed),
            frames_received: self.frames_received.load(Ordering::Relaxed),
            bytes_received: self.bytes_received.load(Ordering::Relaxed),
            sessions: self.sessions.load(Ordering::Relaxed),
            refused: self.refused.load(Ordering::Relaxed),
            failed_dials: self.failed_dials.load(Ordering::Relaxed),
            full: self.full.load(Ordering::Relaxed),
        }
    }
}
