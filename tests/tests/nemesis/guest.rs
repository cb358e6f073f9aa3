//! Guests of one device: threads that read, write, discard and flush a few blocks, past every cache.

use std::fs::{File, OpenOptions};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use galleonfs_sim::history::{Call, Value};

use super::record::{End, Generation, Record};
use super::run::Random;

/// Few, so that guests meet at them.
pub const BLOCKS: u64 = 24;
const BLOCK_BYTES: usize = 4096;
const THREADS: u64 = 6;
/// Between two operations, so that a run has as many as can be judged.
const PAUSE: Duration = Duration::from_millis(4);

/// A block in memory as the kernel wants it for direct I/O.
#[repr(align(4096))]
struct Block([u8; BLOCK_BYTES]);

pub struct Guests {
    stop: Arc<AtomicBool>,
    threads: Vec<JoinHandle<Duration>>,
}

impl Guests {
    pub fn start(device: &Path, generation: Generation, record: &Record, seed: u64) -> Result<Self> {
        let stop = Arc::new(AtomicBool::new(false));
        let threads = (0..THREADS).map(|number| {
            let guest = Guest {
                file: open(device)?,
                generation,
                record: record.clone(),
                random: Random::new(seed * 100 + number),
                stop: stop.clone(),
            };
            Ok(thread::spawn(move || guest.run()))
        });
        Ok(Self {
            threads: threads.collect::<Result<_>>()?,
            stop,
        })
    }

    /// True when the device has told all of them of an error.
    pub fn gone(&self) -> bool {
        self.threads.iter().all(JoinHandle::is_finished)
    }

    pub fn ask_to_stop(&self) {
        self.stop.store(true, Ordering::Relaxed);
    }

    /// Waits until all have ended. Gives the longest time that an operation took.
    pub fn join(self) -> Duration {
        self.ask_to_stop();
        let longest = self
            .threads
            .into_iter()
            .map(|thread| thread.join().expect("a guest does not panic"));
        longest.max().unwrap_or_default()
    }
}

fn open(device: &Path) -> Result<File> {
    OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(libc::O_DIRECT)
        .open(device)
        .with_context(|| format!("opening {}", device.display()))
}

struct Guest {
    file: File,
    generation: Generation,
    record: Record,
    random: Random,
    stop: Arc<AtomicBool>,
}

impl Guest {
    /// Until it is told to stop, or the device fails.
    fn run(mut self) -> Duration {
        let mut longest = Duration::ZERO;
        while !self.stop.load(Ordering::Relaxed) {
            let call = self.choose();
            let op = self.record.begin(self.generation, call);
            let began = Instant::now();
            let done = self.perform(call);
            longest = longest.max(began.elapsed());
            let failed = done.is_err();
            self.record.end(op, done.map_or(End::Error, End::Ok));
            if failed {
                return longest;
            }
            thread::sleep(PAUSE);
        }
        longest
    }

    fn choose(&mut self) -> Call {
        let block = self.random.below(BLOCKS);
        match self.random.below(100) {
            0..45 => Call::Read { block },
            45..90 => Call::Write {
                block,
                id: self.record.write_id(),
                fua: false,
            },
            90..94 => Call::Discard { block },
            _ => Call::Flush,
        }
    }

    fn perform(&self, call: Call) -> std::io::Result<Option<Value>> {
        match call {
            Call::Read { block } => read(&self.file, block).map(Some),
            Call::Write { block, id, .. } => {
                let bytes = filled(id);
                self.file
                    .write_all_at(&bytes.0, block * BLOCK_BYTES as u64)
                    .map(|()| None)
            }
            Call::Discard { block } => zero(&self.file, block).map(|()| None),
            Call::Flush => self.file.sync_data().map(|()| None),
            Call::Snapshot { .. } | Call::SnapshotRead { .. } => unreachable!("guests take no snapshots"),
        }
    }
}

/// The whole block tells which write it was.
fn filled(id: u64) -> Block {
    let mut block = Block([0; BLOCK_BYTES]);
    for (n, word) in block.0.chunks_exact_mut(8).enumerate() {
        word.copy_from_slice(&(id << 16 | n as u64).to_le_bytes());
    }
    block
}

fn read(file: &File, block: u64) -> std::io::Result<Value> {
    let mut bytes = Block([0; BLOCK_BYTES]);
    file.read_exact_at(&mut bytes.0, block * BLOCK_BYTES as u64)?;
    if bytes.0.iter().all(|byte| *byte == 0) {
        return Ok(Value::Zero);
    }
    let first = bytes.0[..8].try_into().expect("eight bytes");
    let id = u64::from_le_bytes(first) >> 16;
    Ok(if filled(id).0 == bytes.0 {
        Value::Write(id)
    } else {
        Value::Garbage
    })
}

/// A hole in the device: afterwards it reads as zeros.
fn zero(file: &File, block: u64) -> std::io::Result<()> {
    let mode = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
    let (at, bytes) = (block * BLOCK_BYTES as u64, BLOCK_BYTES);
    // SAFETY: the descriptor is open, and no memory is passed.
    let done = unsafe { libc::fallocate(file.as_raw_fd(), mode, at as libc::off_t, bytes as libc::off_t) };
    if done == 0 {
        Ok(())
    } else {
        Err(std::io::Error::last_os_error())
    }
}

/// What a device shows of all blocks.
pub fn look(device: &Path) -> Result<Vec<Value>> {
    let file = open(device)?;
    (0..BLOCKS).map(|block| Ok(read(&file, block)?)).collect()
}
