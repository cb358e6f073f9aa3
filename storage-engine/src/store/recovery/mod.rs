//! Making, opening and telling torn from corrupt.
//!
//! Opening takes the newer valid superblock and replays the records behind its checkpoint. The log of a crash ends in
//! a torn tail: records that were on their way and that no flush covered. It is cut off, and the superblock notes
//! where the epoch ended, so that what lies behind is never taken for valid again. Anything else that does not fit is
//! damage, and damage is never cut off: a record that is unreadable although a later one says that it was flushed
//! makes opening fail with the place, and a flushed block with a bad check stays in the map, so that reading it says so.

mod format;
mod found;
mod tail;

use std::collections::BTreeMap;

use super::keys::{self, Keys};
use super::log::Log;
use super::map::Map;
use super::page::Entry;
use super::read::Reads;
use super::record::Seals;
use super::segment::{LINKED, SEGMENT_HEADER_BYTES, SegmentHeader, SegmentKind, Segments, Used};
use super::snapshot::{Origins, Recent};
use super::superblock::{ENDS_MAX, EpochEnd, Superblock};
use super::{Store, StoreStats};
use crate::buffer::BufMut;
use crate::io::{Disk, FileId, IoFailure, SegmentId};
use crate::seal::{KeyError, KeyProof};
use crate::types::{Epoch, Hex, Identity, Lba, Location, Seq, Version};

#[cfg(test)]
pub(super) use format::segment_bytes_for;
pub(super) use format::{Blank, check_first_salt, make_blank};
pub use format::{FormatOptions, format_joining_replica, format_replica, format_sealed_replica};
pub use found::inspect;
pub(super) use found::{
    Found, read_catalog, read_page, read_superblocks, read_table, segment_files, write_superblocks,
};
pub(super) use tail::{Replay, makes_sense, replay};

/// Rows of the memtable that make a checkpoint due, unless somebody asks for another number.
const MEMTABLE_ROWS_MAX: usize = 128 << 10;

/// Who decides where epochs ended that were not closed in order.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Settle {
    /// This is the only replica: what is in its log is what was written.
    #[default]
    Own,
    /// Others have a say. The log is cut at these ends, and nowhere else: what is behind the end of its epoch is dropped,
    /// everything before is kept, and an epoch whose end is not among them goes on.
    Told(Vec<EpochEnd>),
}

/// How to open a replica.
#[derive(Clone, Debug)]
pub struct OpenOptions {
    /// Whose it must be.
    pub identity: Identity,
    /// The epoch to serve in; higher than any before. A replica whose ends are told may go on in the one it promised.
    pub epoch: Epoch,
    /// Who decides where earlier epochs ended.
    pub settle: Settle,
    /// Map pages kept in memory (4 KiB each).
    pub cache_pages_max: usize,
    /// Rows of the memtable that make a checkpoint due.
    pub memtable_rows_max: usize,
    /// Log segments that make a checkpoint due.
    pub tail_segments_max: u64,
    /// Pause in the writes after which a completed flush is written down.
    pub mark_after_ms: u64,
    /// Pause in the writes after which a checkpoint is made.
    pub idle_checkpoint_ms: u64,
    /// Pause after the pool was found full.
    pub retry_create_ms: u64,
    /// For a sealed replica: that its keys are at hand, and the salt of the epoch that begins.
    pub keys: Option<KeyProof>,
}

impl OpenOptions {
    /// The defaults: 16 MiB of cached map pages, a checkpoint after 128 Ki blocks or 16 segments.
    pub fn new(identity: Identity, epoch: Epoch) -> OpenOptions {
        OpenOptions {
            identity,
            epoch,
            settle: Settle::Own,
            cache_pages_max: 4096,
            memtable_rows_max: MEMTABLE_ROWS_MAX,
            tail_segments_max: 16,
            mark_after_ms: 50,
            idle_checkpoint_ms: 10_000,
            retry_create_ms: 1_000,
            keys: None,
        }
    }
}

/// What opening found.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct OpenReport {
    /// Records replayed behind the checkpoint.
    pub replayed_records: u64,
    /// Where the log of an engine that was not closed in order ends; what was behind it was on its way and is cut off.
    pub torn_at: Option<(u32, u64)>,
    /// Something was dropped because it lies behind the end of its epoch. What that had replaced or kept away is not
    /// here either: such a replica begins to catch up from where it last was in sync.
    pub cut: bool,
    /// One of the superblocks was not valid and was written anew; what was wrong with it.
    pub superblock_repaired: Option<String>,
    /// One of the files with the salts was not whole and was written anew; what was wrong with it.
    pub salts_repaired: Option<String>,
    /// Flushed blocks that do not pass their check, and that nothing replaced since. They stay in the map and fail when they are read.
    pub damaged_blocks: Vec<u64>,
}

/// Why a replica cannot be opened or made.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// The directory holds no replica yet.
    #[error("there is no replica here")]
    NotFormatted,
    /// The directory holds something already.
    #[error("there is a replica here already")]
    AlreadyFormatted,
    /// Made by a newer version.
    #[error(
        "the replica has format version {0}, this program reads up to 4: run the version that wrote it, or a newer one"
    )]
    NewerFormat(u16),
    /// Another volume's, replica's or cluster's.
    #[error("the replica belongs to another {what}: found {found}, expected {expected}")]
    WrongIdentity {
        what: &'static str,
        found: String,
        expected: String,
    },
    /// What must be there is missing or does not pass its check.
    #[error("the replica is damaged: {0}")]
    Damaged(String),
    /// It holds for ever what others decided never happened. It must not serve, and cannot catch up.
    #[error("the replica went another way than the others: {0}; it has to be made anew")]
    Diverged(String),
    /// A higher epoch has been promised.
    #[error("the replica has promised epoch {promised} and refuses epoch {asked}")]
    Fenced { promised: u32, asked: u32 },
    /// The keys that were given are not those of the volume. Nothing was changed.
    #[error(transparent)]
    Key(#[from] KeyError),
    /// Asked for something that cannot be.
    #[error("{0}")]
    Invalid(String),
    /// The pool is full.
    #[error("the pool has no space left")]
    NoSpace,
    /// The disk failed.
    #[error("{doing}: {cause}")]
    Disk { doing: String, cause: IoFailure },
}

pub(super) fn disk<T>(result: Result<T, IoFailure>, doing: impl FnOnce() -> String) -> Result<T, OpenError> {
    result.map_err(|cause| match cause {
        IoFailure::NoSpace => OpenError::NoSpace,
        cause => OpenError::Disk { doing: doing(), cause },
    })
}

fn check_identity(found: &Identity, expected: &Identity) -> Result<(), OpenError> {
    let parts = [
        ("cluster", found.cluster, expected.cluster),
        ("volume", found.volume, expected.volume),
        ("replica", found.replica, expected.replica),
    ];
    for (what, found, expected) in parts {
        if found != expected {
            return Err(OpenError::WrongIdentity {
                what,
                found: Hex(&found).to_string(),
                expected: Hex(&expected).to_string(),
            });
        }
    }
    Ok(())
}

/// True if a stream used this free segment once: then its blocks were written.
fn was_filled(on: &mut dyn Disk, superblock: &Superblock, segment: SegmentId) -> Result<bool, OpenError> {
    let mut buf = BufMut::for_reading(SEGMENT_HEADER_BYTES as usize);
    let read = on.read(FileId::Segment(segment), 0, buf.as_mut());
    disk(read, || format!("reading the header of segment {}", segment.0))?;
    Ok(SegmentHeader::decode(buf.as_ref(), &superblock.geometry.identity).is_some())
}

/// The salts of a sealed replica with that of the epoch that begins; nothing for one that is not sealed.
fn admit_keys(on: &mut dyn Disk, superblock: &Superblock, options: &OpenOptions) -> Result<Keys, OpenError> {
    let goes_on = options.epoch == superblock.epoch;
    let proof = match (superblock.geometry.sealed, &options.keys) {
        (false, None) => return Ok(Keys::default()),
        (false, Some(_)) => return Err(KeyError::NotSealed.into()),
        // The salt of this epoch is there.
        (true, None) if goes_on => return keys::read(on, &options.identity.replica),
        (true, Some(proof)) if goes_on => {
            let keys = keys::read(on, &options.identity.replica)?;
            keys.rows.iter().try_for_each(|row| proof.covers(row))?;
            return Ok(keys);
        }
        (true, None) => return Err(KeyError::NotGiven.into()),
        (true, Some(proof)) => proof,
    };
    if (proof.row.volume, proof.row.epoch) != (options.identity.volume, options.epoch) {
        return Err(OpenError::Invalid(
            "the salt that was given is for another epoch or volume".into(),
        ));
    }
    let keys = keys::read(on, &options.identity.replica)?;
    Ok(Keys {
        rows: keys::admit(keys.rows, proof)?,
        ..keys
    })
}

/// Takes the ends that others settled, before anything is looked at.
fn take_ends(superblock: &mut Superblock, ends: &[EpochEnd]) -> Result<(), OpenError> {
    for row in ends {
        if row.first > row.last {
            return Err(OpenError::Invalid(format!("an end of epochs that cannot be: {row:?}")));
        }
        // What was settled here by somebody whose epoch never began does not count: nothing of it is irrevocable.
        superblock.unsettle(row);
        superblock.settle_told(row);
    }
    let merged = superblock.checkpoint.replay.last;
    if superblock.end_of(merged.epoch).is_some_and(|end| merged.seq > end) {
        return Err(OpenError::Diverged(format!(
            "a checkpoint holds write {merged}, behind the end of its epoch"
        )));
    }
    superblock.forget_old_ends();
    if superblock.epoch_ends.len() > ENDS_MAX - 4 {
        return Err(OpenError::Invalid(
            "the replica missed more epochs than it can take in: it has to be made anew".into(),
        ));
    }
    Ok(())
}

/// Opens a replica for `options.epoch`. The promise of that epoch is durable when this returns.
pub fn open_replica(on: &mut dyn Disk, options: OpenOptions) -> Result<(Store, OpenReport), OpenError> {
    let Found {
        mut superblock,
        slot: in_use,
        other: repaired,
    } = read_superblocks(on)?;
    check_identity(&superblock.geometry.identity, &options.identity)?;
    let told = match &options.settle {
        Settle::Own => None,
        Settle::Told(ends) => Some(ends),
    };
    if options.epoch < superblock.epoch || options.epoch == superblock.epoch && told.is_none() {
        return Err(OpenError::Fenced {
            promised: superblock.epoch.0,
            asked: options.epoch.0,
        });
    }
    let keys = admit_keys(on, &superblock, &options)?;
    if let Some(ends) = told {
        take_ends(&mut superblock, ends)?;
    }
    let files = segment_files(on)?;
    let (used, mut table_pages) = read_table(on, &superblock)?;
    let (catalog, catalog_pages) = read_catalog(on, &superblock)?;
    table_pages.extend(catalog_pages);
    let origins = Origins::new(&superblock.geometry, &catalog, &used)?;
    let segment_bytes = superblock.geometry.segment_bytes;
    for id in used.keys() {
        match files.get(id) {
            None => return Err(OpenError::Damaged(format!("segment {} is missing", id.0))),
            Some(len) if *len < segment_bytes => {
                return Err(OpenError::Damaged(format!(
                    "segment {} has {len} bytes instead of {segment_bytes}",
                    id.0
                )));
            }
            Some(_) => {}
        }
    }
    let Replay {
        ops,
        end,
        segments: replayed,
        mut report,
        highest,
        damaged,
    } = replay(on, &superblock, &files, &used)?;
    makes_sense(&ops, &catalog)?;
    report.superblock_repaired = repaired;
    report.salts_repaired = keys.damaged;

    let mut segments = Segments::default();
    let replayed: BTreeMap<SegmentId, u64> = replayed.into_iter().collect();
    for (id, row) in &used {
        segments.load(*id, *row);
    }
    for (id, log_index) in &replayed {
        let live = used.get(id).map_or(0, |row| row.live);
        segments.load(
            *id,
            Used {
                kind: SegmentKind::Data,
                live,
                log_index: *log_index,
                open: *id == end.segment,
            },
        );
    }
    for (id, len) in &files {
        // A file with a second name belongs to a clone, or to the source of this one: nobody writes into it.
        let names = on.names(FileId::Segment(*id));
        let shared = disk(names, || format!("looking at segment {}", id.0))? > 1 || id.0 >= LINKED;
        if segments.get(*id).is_some() {
            if shared {
                segments.share(*id);
            }
            continue;
        }
        if *len == segment_bytes && !shared {
            segments.load_free(*id, was_filled(on, &superblock, *id)?);
        } else {
            // Left half made by a crash, or shared and no longer needed here.
            disk(on.remove(FileId::Segment(*id)), || format!("removing segment {}", id.0))?;
        }
    }
    for (stream, kind) in [
        (superblock.checkpoint.meta, SegmentKind::Meta),
        (superblock.checkpoint.moved, SegmentKind::Moved),
    ] {
        let Some(stream) = stream else { continue };
        if segments.get(stream.segment).is_none_or(|used| used.kind != kind) {
            return Err(OpenError::Damaged(format!(
                "segment {} is to be written on with {kind:?}, and the segment table has it for something else",
                stream.segment.0
            )));
        }
        segments.reopen(stream.segment);
    }
    let mut recent = Recent::new(catalog);
    ops.iter().for_each(|op| recent.apply(op));
    let needed = |(lba, location): &(Lba, Location)| {
        let entries = recent.tables().filter_map(|table| table.get(*lba));
        let entry = entries.into_iter().find(|entry| entry.location == *location)?;
        Some((*lba, entry))
    };
    let damaged: Vec<(Lba, Entry)> = damaged.iter().filter_map(needed).collect();
    report.damaged_blocks = damaged.iter().map(|(lba, _)| lba.0).collect();
    // What is served after this must still be there after the next power cut.
    for id in replayed.keys() {
        disk(on.sync(FileId::Segment(*id)), || format!("syncing segment {}", id.0))?;
    }
    if told.is_none() && superblock.told {
        superblock.own_ends(highest);
    }
    if told.is_none() && superblock.epoch > Epoch(0) {
        let ended = end.last.epoch;
        let promised = superblock.epoch;
        if superblock.end_of(ended).is_none() && ended > Epoch(0) {
            superblock.settle(ended, ended, end.last.seq);
        }
        if promised > ended && superblock.end_of(promised).is_none() {
            superblock.settle(promised, promised, Seq(0));
        }
    }
    superblock.generation += 1;
    superblock.epoch = options.epoch;
    superblock.clean = false;
    superblock.told = told.is_some();
    if !keys.rows.is_empty() {
        // Before the epoch is promised: what is sealed in it can be opened ever after.
        keys::write(on, &superblock.geometry.identity.replica, &keys.rows)?;
    }
    let crowded = superblock.epoch_ends.len() > ENDS_MAX - 4;
    // The one that is not in use goes first: a power cut in the middle must leave a valid one.
    write_superblocks(on, &superblock, 1 - in_use)?;

    let seals = Seals::of(&superblock.geometry);
    let checkpoint = &superblock.checkpoint;
    let cache_pages_max = (options.cache_pages_max / seals.leaf_pages() as usize).max(64);
    let map = Map::new(checkpoint.root, checkpoint.height, cache_pages_max);
    let cleaner = super::cleaner::Cleaner::new(checkpoint.moved);
    // Nothing is for ever but what is settled, until somebody says so.
    let gate = told.map(|_| Version::default());
    let mut log = Log::new(end);
    log.highest = highest;
    let mut store = Store {
        seals,
        key_rows: keys.rows,
        origins,
        holds: Vec::new(),
        segments,
        supply: Default::default(),
        turn: Default::default(),
        pace: Default::default(),
        scrub: Default::default(),
        map,
        recent,
        frozen: None,
        log,
        reads: Reads::default(),
        scans: Default::default(),
        job: None,
        cleaner,
        gate,
        amendments: Default::default(),
        copying: Default::default(),
        row_scans: Default::default(),
        checkpoint_wanted: crowded,
        grow_to: None,
        closing: false,
        close_unclean: false,
        stopped: None,
        now_ms: 0,
        last_write_ms: 0,
        unmerged_since_ms: None,
        background_due: true,
        retry_create_ms: None,
        share: Default::default(),
        pending: Default::default(),
        out: Default::default(),
        out_behind: Default::default(),
        events: Default::default(),
        stats: StoreStats::default(),
        damaged_places: std::collections::BTreeSet::new(),
        disk_bytes: 0,
        superblock_table_pages: table_pages,
        options,
        superblock,
    };
    if store.is_led() {
        // Others may have them.
        damaged
            .iter()
            .for_each(|(lba, entry)| store.replayed_damage(*lba, *entry));
    }
    if store.is_reverting() && !store.is_led() {
        // Whoever asked for it got no answer, but what is read from now on must stay.
        store.drive(on);
        if store.is_reverting() {
            return Err(OpenError::NoSpace);
        }
    }
    if crowded {
        // The history of epochs must not overflow in a loop of crashes.
        store.drive(on);
        if store.superblock.epoch_ends.len() > ENDS_MAX - 4 {
            return Err(OpenError::NoSpace);
        }
    }
    Ok((store, report))
}
