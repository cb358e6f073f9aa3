//! Every bound of the shards in one place, and how they relate.

/// Shard threads when nobody says otherwise: one for each two processors, but not more than so many. Two keep up with what
/// one loop device each can send, and more would only take cores from the guests.
pub const SHARDS_DEFAULT_MAX: usize = 2;

/// Payload bytes of one volume that are with its engine at a time; beyond that its requests wait in the kernel. A
/// guest's queue of 128 requests of 256 KiB fits.
pub const INFLIGHT_BYTES_PER_VOLUME_MAX: u64 = 32 << 20;

/// Requests taken from one volume before the others on its shard have their turn.
pub const REQUESTS_PER_TURN_MAX: usize = 256;

/// Disk operations of one volume that are with the kernel at a time; the rest wait in order. A disk that answers keeps
/// up with fewer, and a disk that hangs can hold no more of the ring's workers than this.
pub const DISK_OPS_PER_VOLUME_MAX: usize = 64;

/// Threads that the kernel may start for operations that would block. They exist only while they are needed.
pub const RING_WORKERS_MAX: u32 = 256;

/// Volumes with a hanging disk that a shard tolerates without holding up the others.
const HANGING_VOLUMES_MAX: usize = 4;

const _: () = assert!(DISK_OPS_PER_VOLUME_MAX * HANGING_VOLUMES_MAX <= RING_WORKERS_MAX as usize);

/// Submissions that the kernel may be told of at once. Power of two.
pub const RING_ENTRIES: u32 = 256;

/// Submissions after which the kernel is told within a round: it starts on them while the rest of the round is thought
/// about, and an answer does not wait for the end of a long round.
pub const RING_SUBMIT_EVERY: usize = 8;

const _: () = assert!(RING_SUBMIT_EVERY < RING_ENTRIES as usize);

/// Completions that fit before the kernel has to queue them elsewhere.
pub const RING_COMPLETIONS: u32 = 4096;

const _: () = assert!(RING_COMPLETIONS as usize >= 16 * DISK_OPS_PER_VOLUME_MAX);

/// Open segment files of one volume: all of a volume of 128 GiB in segments of 64 MiB.
pub const FILES_PER_VOLUME_MAX: usize = 2048;

/// Files that a volume may have open even when the process has too many: the log's, the cleaner's, the superblocks.
pub const FILES_PER_VOLUME_MIN: usize = 16;

const _: () = assert!(FILES_PER_VOLUME_MIN < FILES_PER_VOLUME_MAX);

/// Threads that serve one volume's disk where io_uring is forbidden. A hanging disk holds only its own.
pub const DISK_THREADS_WITHOUT_RING: usize = 4;

/// How long a shard must have nothing to do before it frees its spare buffers.
pub const IDLE_BEFORE_TRIM_MS: u64 = 1000;

/// How long an engine may take to end in an orderly way before the caller is told to come back later.
pub const CLOSE_WAIT_MAX: std::time::Duration = std::time::Duration::from_secs(30);

/// How long the configuration of a volume may take to be read before whoever attaches it tries again.
pub const CONFIG_WAIT_MAX: std::time::Duration = std::time::Duration::from_secs(10);

/// How long the replicas of a volume may take to be ready before whoever attaches it tries again: longer than it takes to
/// wait for leases, to give up who does not answer, and to write that down.
pub const READY_WAIT_MAX: std::time::Duration = std::time::Duration::from_secs(60);
