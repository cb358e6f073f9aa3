//! One state of the world: the API object, the primaries, the replicas, and what has happened so far.

use super::set::{REPLICAS, Set, Sets};

/// Engine starts there can be. A start is known by its place in this list.
pub const PRIMARIES: usize = 3;
/// Writes there can be, of all guests together.
pub const WRITES: usize = 3;
/// Blocks of the volume.
pub const BLOCKS: usize = 2;

/// `status.config` of the volume. Every change of it gives it a new resource version; see [`Primary::queued`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Api {
    pub epoch: u8,
    pub primary: u8,
    pub in_sync: Set,
}

/// Where a write stands in the order of all writes: epoch first, then seq. Zero is before all of them.
#[derive(Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Version {
    pub epoch: u8,
    pub seq: u8,
}

impl std::fmt::Debug for Version {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "({}, {})", self.epoch, self.seq)
    }
}

/// A write that a guest has asked for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Write {
    pub version: Version,
    pub primary: u8,
    pub block: u8,
}

/// What a replica has in its log, in the order it was appended: places in [`State::writes`].
#[derive(Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Log {
    len: u8,
    writes: [u8; WRITES],
}

impl Log {
    pub fn as_slice(&self) -> &[u8] {
        &self.writes[..usize::from(self.len)]
    }

    pub fn contains(&self, write: u8) -> bool {
        self.as_slice().contains(&write)
    }

    pub fn push(&mut self, write: u8) {
        if !self.contains(write) {
            self.writes[usize::from(self.len)] = write;
            self.len += 1;
        }
    }

    pub fn truncate(&mut self, len: u8) {
        self.writes[usize::from(len)..].fill(0);
        self.len = len;
    }

    pub fn len(&self) -> u8 {
        self.len
    }
}

impl std::fmt::Debug for Log {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_list().entries(self.as_slice()).finish()
    }
}

/// Ends of epochs, by epoch: one more than the last seq that counts, 0 where nobody has said.
pub type Ends = [u8; PRIMARIES + 1];

/// What one start of an engine does.
///
/// ```text
/// Idle ─ its CAS raised the epoch ─> Promising ─ all members promised ─> Equalising ─ all level ─> Serving
///                                        ^────────── a member left ─────────┘
/// ```
///
/// A primary that was deposed, and knows it, does nothing any more; so does one whose process died. Neither differs from
/// one that happens to do nothing. Only where a guest lives on with another engine, its old one is known to be dead.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Phase {
    #[default]
    Idle,
    Promising,
    Equalising {
        /// Everything up to here is kept.
        end: Version,
        /// Who has it all on stable storage, and has recorded that the older epochs ended there.
        level: Set,
    },
    Serving,
    Dead,
}

/// A flush on its way: what it covers, and who has confirmed it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Flush {
    pub up_to: u8,
    pub done: Set,
}

/// A resync on its way.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Session {
    pub replica: u8,
    /// The first write that the replica gets live.
    pub base: u8,
    /// Blocks whose copy has arrived, a bit for each.
    pub copied: u8,
    /// The highest seq of this epoch that a copy brought along.
    pub carried: u8,
    /// Up to where the replica had everything on stable storage when it last flushed.
    pub flushed: Option<u8>,
}

/// One start of an engine: an incarnation, primary of one epoch at most.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Primary {
    pub phase: Phase,
    pub epoch: u8,
    /// Its guest has lived on from the engine before. Otherwise the guest starts from the disk, as after a power cut.
    pub resumed: bool,
    /// The in-sync set as it was when this primary raised the epoch.
    pub found: Set,
    /// The in-sync set as this primary last learned it.
    pub known: Set,
    /// What it has asked the API for since then and does not know the end of.
    pub maybe: Sets,
    /// Of that: what the API may yet do. A request carries the resource version it was made against, so a change of the
    /// object by anybody is the end of all of them.
    pub queued: Sets,
    /// The request of its own that was done, and of which it has not heard yet.
    pub won: Option<Set>,
    /// Who has promised this epoch, as far as it heard.
    pub promised: Set,
    /// Where the epochs before its own ended.
    pub ends: Ends,
    /// Writes of older epochs that were kept when it began to serve, a bit for each.
    pub kept: u8,
    pub issued: u8,
    pub completed: u8,
    /// The highest seq that each replica has acknowledged.
    pub acked: [u8; REPLICAS],
    pub flush: Option<Flush>,
    pub flushed: u8,
    pub session: Option<Session>,
}

impl Primary {
    /// Whoever may be in sync, as far as this primary can tell: the union of every configuration that may be current.
    pub fn members(&self) -> Set {
        self.known.union(self.maybe.union())
    }

    pub fn is_alive(&self) -> bool {
        !matches!(self.phase, Phase::Idle | Phase::Dead)
    }

    pub fn is_syncing(&self, replica: usize) -> bool {
        self.session
            .is_some_and(|session| usize::from(session.replica) == replica)
    }

    /// It will never do anything again. What it sent may still arrive, and what it was promised is still promised.
    pub fn die(&mut self) {
        *self = Self {
            phase: Phase::Dead,
            epoch: self.epoch,
            issued: self.issued,
            promised: self.promised,
            ..Self::default()
        };
    }
}

/// One copy, and the process that holds it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Replica {
    /// The highest epoch it promised, and to which start of an engine.
    pub promised: u8,
    pub promised_to: u8,
    /// What of that a power cut leaves. The protocol keeps the two equal.
    pub promised_durable: u8,
    pub log: Log,
    /// How much of the log a power cut cannot take.
    pub durable: u8,
    pub ends: Ends,
    /// The seq it takes next from the primary it promised to; 0 when it is not connected for writes.
    pub next: u8,
    /// It lacks nothing up to where its log ends. False from the begin of a resync until the flush at its end.
    pub complete: bool,
    /// It lost power since it was last known to have everything that was answered.
    pub cut: bool,
    /// A lease that it gave to an older primary may outlast its promise to a newer one. The protocol waits instead.
    pub lease_left: bool,
}

/// Everything that happens to a volume, and what has happened to it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct State {
    pub api: Api,
    pub primaries: [Primary; PRIMARIES],
    pub replicas: [Replica; REPLICAS],
    /// What has happened; no process knows all of it.
    pub writes: [Write; WRITES],
    pub issued: u8,
    /// Bits for writes: reported to a guest; covered by a flush that was; lost to power cuts in a way that is allowed.
    pub completed: u8,
    pub flushed: u8,
    pub excused: u8,
    /// For each block the newest version that any guest could have read.
    pub seen: [Version; BLOCKS],
    /// Who completed writes, by epoch: one more than its place in the list of primaries.
    pub completer: Ends,
    /// Invariants that were broken, a bit for each number.
    pub broken: u16,
    pub power_cuts: u8,
    pub resyncs: u8,
}

/// Of `writes`, those that are in `bits`.
pub fn bits(bits: u8) -> impl Iterator<Item = u8> {
    (0..8).filter(move |write| bits & 1 << write != 0)
}

impl State {
    pub fn version(&self, write: u8) -> Version {
        self.writes[usize::from(write)].version
    }

    pub fn block(&self, write: u8) -> usize {
        usize::from(self.writes[usize::from(write)].block)
    }

    /// The write that `primary` gave this seq.
    pub fn write_of(&self, primary: usize, seq: u8) -> Option<u8> {
        (0..self.issued).find(|&write| {
            let it = self.writes[usize::from(write)];
            usize::from(it.primary) == primary && it.version.seq == seq
        })
    }

    /// The newest version of a block among the first `len` records of a log.
    pub fn newest(&self, log: &Log, len: u8, block: usize) -> Option<u8> {
        log.as_slice()[..usize::from(len)]
            .iter()
            .copied()
            .filter(|&write| self.block(write) == block)
            .max_by_key(|&write| self.version(write))
    }

    /// Whether the first `len` records of a log have this write, or one that replaced it.
    pub fn holds(&self, log: &Log, len: u8, write: u8) -> bool {
        self.newest(log, len, self.block(write))
            .is_some_and(|newest| self.version(newest) >= self.version(write))
    }

    /// Up to where a log goes.
    pub fn position(&self, log: &Log) -> Version {
        log.as_slice()
            .iter()
            .map(|&write| self.version(write))
            .max()
            .unwrap_or_default()
    }

    /// The last seq of this epoch in a log.
    pub fn last_seq(&self, log: &Log, epoch: u8) -> u8 {
        log.as_slice()
            .iter()
            .map(|&write| self.version(write))
            .filter(|it| it.epoch == epoch)
            .map(|it| it.seq)
            .max()
            .unwrap_or(0)
    }

    /// The same state with its replicas in an order that depends on nothing but what they are: states that differ only in
    /// the replicas' names become one.
    #[must_use]
    pub fn canonical(self, replicas: usize) -> Self {
        let mut order = [0, 1, 2];
        order[..replicas].sort_by_cached_key(|&replica| self.key(replica));
        if order == [0, 1, 2] { self } else { self.renamed(order) }
    }

    /// All that is said about a replica, but for the sets of sets.
    fn key(&self, replica: usize) -> (Replica, [u16; PRIMARIES]) {
        let in_sync = u16::from(self.api.in_sync.contains(replica));
        let keys = self.primaries.map(|primary| {
            let level = match primary.phase {
                Phase::Equalising { level, .. } => level,
                _ => Set::default(),
            };
            let sets = [
                primary.found,
                primary.known,
                primary.members(),
                primary.promised,
                level,
                primary.won.unwrap_or_default(),
            ];
            let bits = sets
                .iter()
                .fold(in_sync, |key, set| key << 1 | u16::from(set.contains(replica)));
            let flush = u16::from(primary.flush.is_some_and(|flush| flush.done.contains(replica)));
            ((bits << 1 | flush) << 1 | u16::from(primary.is_syncing(replica))) << 4 | u16::from(primary.acked[replica])
        });
        (self.replicas[replica], keys)
    }

    fn renamed(mut self, order: [usize; REPLICAS]) -> Self {
        self.replicas = order.map(|old| self.replicas[old]);
        self.api.in_sync = self.api.in_sync.renamed(order);
        for primary in &mut self.primaries {
            primary.found = primary.found.renamed(order);
            primary.known = primary.known.renamed(order);
            primary.maybe = primary.maybe.renamed(order);
            primary.queued = primary.queued.renamed(order);
            primary.won = primary.won.map(|set| set.renamed(order));
            primary.promised = primary.promised.renamed(order);
            primary.acked = order.map(|old| primary.acked[old]);
            if let Phase::Equalising { level, .. } = &mut primary.phase {
                *level = level.renamed(order);
            }
            if let Some(flush) = &mut primary.flush {
                flush.done = flush.done.renamed(order);
            }
            if let Some(session) = &mut primary.session {
                let new = order
                    .iter()
                    .position(|&old| old == usize::from(session.replica))
                    .expect("an order has all of them");
                session.replica = new as u8;
            }
        }
        self
    }
}
