//! Messages as bytes: what goes into the body of a frame, and what follows it as payload.
//!
//! A frame says for which volume, replica and epoch it is, and has a check of its own; here is the rest. Each message has
//! a number (its kind), a body that begins with the sender's incarnation, the round and the start of the replica, and a
//! payload: the stored form of blocks, one after the other, never copied on the way. All numbers are little-endian.
//! Whatever comes from the wire is checked: lengths against what is there, counts against what may be.

use std::sync::Arc;

use super::limits::MENDED_AT_ONCE;
use super::message::{Ask, Batch, FromReplica, Refusal, Reply, Row, Rows, Stored, StoredBlock, ToReplica};
use super::{Incarnation, ReplicaId};
use crate::buffer::Buf;
use crate::seal::{EpochSalt, KeyCheck, KeyId, KeyRow, Tag};
use crate::store::layout::EpochEnd;
use crate::store::{PAGES_MAX, WRITES_MAX, WriteEntry};
use crate::types::{BlockSize, Check, Epoch, Lba, PAGE_BYTES, Seq, Version};

/// The first kind that is a message of replication; frames leave lower ones to themselves.
pub const KIND_FIRST: u16 = 16;
/// Bytes of a text at most: why something failed.
const TEXT_BYTES_MAX: usize = 1024;
/// Ends of epochs in a message at most: a superblock holds fewer.
const ENDS_MAX: usize = 1024;
/// Rows in an answer at most.
const ROWS_MAX: usize = 4096;
/// Blocks in an answer or a copy at most: those of the largest read.
const BLOCKS_MAX: usize = 4096;

/// A message in a form that can be sent.
#[derive(Clone, Debug)]
pub struct Packed {
    /// Which message it is.
    pub kind: u16,
    pub body: Vec<u8>,
    pub payload: Vec<Buf>,
}

/// What is no message.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum WireError {
    #[error("message kind {0} is not known")]
    UnknownKind(u16),
    #[error("the message ends in the middle of {0}")]
    Short(&'static str),
    #[error("the message has {0} bytes behind its end")]
    Long(usize),
    #[error("{what} is {found}; expected at most {most}")]
    TooMany { what: &'static str, found: u64, most: u64 },
    #[error("{0} cannot be")]
    Impossible(&'static str),
}

mod kind {
    use super::KIND_FIRST;

    pub const PROMISE: u16 = KIND_FIRST;
    pub const TRIM: u16 = KIND_FIRST + 1;
    pub const SETTLE: u16 = KIND_FIRST + 2;
    pub const JOIN: u16 = KIND_FIRST + 3;
    pub const WRITE: u16 = KIND_FIRST + 4;
    pub const FLUSH: u16 = KIND_FIRST + 5;
    pub const BEAT: u16 = KIND_FIRST + 6;
    pub const READ: u16 = KIND_FIRST + 7;
    pub const ROWS: u16 = KIND_FIRST + 8;
    pub const COPY: u16 = KIND_FIRST + 9;
    pub const RELEASE: u16 = KIND_FIRST + 10;

    pub const PROMISING: u16 = KIND_FIRST + 32;
    pub const PROMISED: u16 = KIND_FIRST + 33;
    pub const REFUSED: u16 = KIND_FIRST + 34;
    pub const TRIMMED: u16 = KIND_FIRST + 35;
    pub const SETTLED: u16 = KIND_FIRST + 36;
    pub const WRITTEN: u16 = KIND_FIRST + 37;
    pub const GAP: u16 = KIND_FIRST + 38;
    pub const FLUSHED: u16 = KIND_FIRST + 39;
    pub const BEATEN: u16 = KIND_FIRST + 40;
    pub const BLOCKS: u16 = KIND_FIRST + 41;
    pub const LISTED: u16 = KIND_FIRST + 42;
    pub const COPIED: u16 = KIND_FIRST + 43;
    pub const FAILED: u16 = KIND_FIRST + 44;
    pub const DAMAGED: u16 = KIND_FIRST + 45;
    pub const WANTS: u16 = KIND_FIRST + 46;
}

/// Whether this message is a replica's answer; otherwise it is an order of a primary, or none.
pub fn is_reply(kind: u16) -> bool {
    kind >= kind::PROMISING
}

/// Writes fields one after the other.
struct Out(Packed);

impl Out {
    fn new(kind: u16, incarnation: Incarnation, round: u64, boot: u64) -> Out {
        let mut out = Out(Packed {
            kind,
            body: Vec::with_capacity(64),
            payload: Vec::new(),
        });
        out.bytes(&incarnation.0).u64(round).u64(boot);
        out
    }

    fn bytes(&mut self, bytes: &[u8]) -> &mut Out {
        self.0.body.extend_from_slice(bytes);
        self
    }

    fn u8(&mut self, value: u8) -> &mut Out {
        self.bytes(&[value])
    }

    fn u32(&mut self, value: u32) -> &mut Out {
        self.bytes(&value.to_le_bytes())
    }

    fn u64(&mut self, value: u64) -> &mut Out {
        self.bytes(&value.to_le_bytes())
    }

    fn version(&mut self, version: Version) -> &mut Out {
        self.u32(version.epoch.0).u64(version.seq.0)
    }

    fn check(&mut self, check: Check) -> &mut Out {
        self.u32(check.crc).bytes(&check.tag.0)
    }

    fn text(&mut self, text: &str) -> &mut Out {
        let mut end = text.len().min(TEXT_BYTES_MAX);
        while !text.is_char_boundary(end) {
            end -= 1;
        }
        self.u32(end as u32).bytes(&text.as_bytes()[..end])
    }

    fn ends(&mut self, ends: &[EpochEnd]) -> &mut Out {
        self.u32(ends.len() as u32);
        for row in ends {
            self.u32(row.first.0).u32(row.last.0).u64(row.end.0);
        }
        self
    }

    fn row(&mut self, row: Option<&KeyRow>) -> &mut Out {
        self.u8(u8::from(row.is_some()));
        if let Some(row) = row {
            self.bytes(&row.volume).u32(row.epoch.0).u32(row.key.0);
            self.bytes(&row.salt.0).bytes(&row.check.0);
        }
        self
    }

    fn batch(&mut self, batch: &Batch) -> &mut Out {
        self.u64(batch.first_seq.0);
        self.u32(batch.writes.len() as u32)
            .u32(batch.checks.len() as u32)
            .u32(batch.pages.len() as u32);
        for write in &batch.writes {
            self.u64(write.lba.0).u32(write.blocks).u8(u8::from(write.zero));
        }
        for check in &batch.checks {
            self.check(*check);
        }
        self.bytes(&batch.pages);
        self.0.payload.extend(batch.payload.iter().cloned());
        self
    }

    fn stored(&mut self, blocks: &[Stored]) -> &mut Out {
        self.u32(blocks.len() as u32);
        for stored in blocks {
            match stored {
                Stored::Block(block) => {
                    self.u8(block.pages).u64(block.lba.0).version(block.version);
                    self.check(block.check);
                    self.0.payload.push(block.bytes.clone());
                }
                Stored::Zeros { start, end, version } => {
                    self.u8(0).u64(start.0).u64(end.0).version(*version);
                }
            }
        }
        self
    }

    /// What came of something: the text of why not.
    fn outcome<T>(&mut self, id: u64, result: &Result<T, String>, put: impl FnOnce(&mut Out, &T)) {
        self.u64(id).u8(u8::from(result.is_ok()));
        match result {
            Ok(found) => put(self, found),
            Err(why) => drop(self.text(why)),
        }
    }
}

/// Reads fields one after the other.
struct In<'a> {
    body: &'a [u8],
    payload: Option<Buf>,
    /// Bytes of the payload that were taken.
    taken: usize,
}

impl<'a> In<'a> {
    fn new(body: &'a [u8], payload: Option<Buf>) -> In<'a> {
        let taken = 0;
        In { body, payload, taken }
    }

    /// What every body begins with: the incarnation, the round, and the start of the replica.
    fn sender(&mut self) -> Result<(Incarnation, u64, u64), WireError> {
        let incarnation = Incarnation(self.array("an incarnation")?);
        Ok((incarnation, self.u64("a round")?, self.u64("a start")?))
    }

    fn array<const N: usize>(&mut self, what: &'static str) -> Result<[u8; N], WireError> {
        let (value, rest) = self.body.split_first_chunk::<N>().ok_or(WireError::Short(what))?;
        self.body = rest;
        Ok(*value)
    }

    fn u8(&mut self, what: &'static str) -> Result<u8, WireError> {
        Ok(self.array::<1>(what)?[0])
    }

    fn bool(&mut self, what: &'static str) -> Result<bool, WireError> {
        match self.u8(what)? {
            0 => Ok(false),
            1 => Ok(true),
            _ => Err(WireError::Impossible(what)),
        }
    }

    fn u32(&mut self, what: &'static str) -> Result<u32, WireError> {
        Ok(u32::from_le_bytes(self.array(what)?))
    }

    fn u64(&mut self, what: &'static str) -> Result<u64, WireError> {
        Ok(u64::from_le_bytes(self.array(what)?))
    }

    fn count(&mut self, what: &'static str, most: usize) -> Result<usize, WireError> {
        let found = self.u32(what)? as usize;
        if found > most {
            let (found, most) = (found as u64, most as u64);
            return Err(WireError::TooMany { what, found, most });
        }
        Ok(found)
    }

    fn version(&mut self) -> Result<Version, WireError> {
        Ok(Version {
            epoch: Epoch(self.u32("an epoch")?),
            seq: Seq(self.u64("a number")?),
        })
    }

    fn check(&mut self) -> Result<Check, WireError> {
        Ok(Check {
            crc: self.u32("a check")?,
            tag: Tag(self.array("a tag")?),
        })
    }

    fn text(&mut self) -> Result<String, WireError> {
        let len = self.count("a text", TEXT_BYTES_MAX)?;
        let (text, rest) = self.body.split_at_checked(len).ok_or(WireError::Short("a text"))?;
        self.body = rest;
        // It is only shown to people.
        Ok(String::from_utf8_lossy(text).into_owned())
    }

    /// A version of this epoch or an earlier one.
    fn version_until(&mut self, epoch: Epoch) -> Result<Version, WireError> {
        let version = self.version()?;
        match version.epoch <= epoch {
            true => Ok(version),
            false => Err(WireError::Impossible("a version of an epoch that has not begun")),
        }
    }

    /// Ends of epochs before this one.
    fn ends(&mut self, before: Epoch) -> Result<Vec<EpochEnd>, WireError> {
        let count = self.count("ends of epochs", ENDS_MAX)?;
        let mut ends = Vec::with_capacity(count.min(64));
        let mut behind = 0;
        for _ in 0..count {
            let row = EpochEnd {
                first: Epoch(self.u32("an epoch")?),
                last: Epoch(self.u32("an epoch")?),
                end: Seq(self.u64("a number")?),
            };
            // In order, and so without an overlap; and over: whoever reads goes through them one by one.
            if row.first.0 < behind || row.last < row.first || row.last >= before {
                return Err(WireError::Impossible("an end of epochs"));
            }
            behind = row.last.0 + 1;
            ends.push(row);
        }
        Ok(ends)
    }

    fn row(&mut self) -> Result<Option<KeyRow>, WireError> {
        if !self.bool("a salt")? {
            return Ok(None);
        }
        Ok(Some(KeyRow {
            volume: self.array("a volume")?,
            epoch: Epoch(self.u32("an epoch")?),
            key: KeyId(self.u32("a key's number")?),
            salt: EpochSalt(self.array("a salt")?),
            check: KeyCheck(self.array("a key's check")?),
        }))
    }

    /// The next `len` bytes of the payload.
    fn payload(&mut self, len: usize) -> Result<Buf, WireError> {
        let payload = self.payload.as_ref().ok_or(WireError::Short("the payload"))?;
        let end = self.taken + len;
        if end > payload.len() {
            return Err(WireError::Short("the payload"));
        }
        let part = payload.slice(self.taken..end);
        self.taken = end;
        Ok(part)
    }

    fn batch(&mut self) -> Result<Batch, WireError> {
        let first_seq = Seq(self.u64("a number")?);
        let writes = self.count("writes", WRITES_MAX)?;
        let checks = self.count("checks", PAGES_MAX)?;
        let pages = self.count("lengths", PAGES_MAX)?;
        if first_seq == Seq(0) || writes == 0 || first_seq.0.checked_add(writes as u64).is_none() {
            return Err(WireError::Impossible("a record without numbers"));
        }
        if pages != 0 && pages != checks {
            return Err(WireError::Impossible("a record with lengths for some of its blocks"));
        }
        let mut entries = Vec::with_capacity(writes);
        let mut blocks = 0_u64;
        for _ in 0..writes {
            let write = WriteEntry {
                lba: Lba(self.u64("a block")?),
                blocks: self.u32("blocks")?,
                zero: self.bool("whether it is zeros")?,
            };
            if write.blocks == 0 || write.lba.0.checked_add(u64::from(write.blocks)).is_none() {
                return Err(WireError::Impossible("a write of these blocks"));
            }
            if !write.zero {
                blocks += u64::from(write.blocks);
            }
            entries.push(write);
        }
        if blocks != checks as u64 {
            return Err(WireError::Impossible("a record with as many checks"));
        }
        let checks: Vec<Check> = (0..checks).map(|_| self.check()).collect::<Result<_, _>>()?;
        let lengths = self.body.split_at_checked(pages).ok_or(WireError::Short("lengths"))?;
        let pages = lengths.0.to_vec();
        self.body = lengths.1;
        let total: usize = if pages.is_empty() {
            checks.len()
        } else {
            pages.iter().map(|pages| usize::from(*pages)).sum()
        };
        if total > PAGES_MAX || pages.contains(&0) {
            return Err(WireError::Impossible("a record of this length"));
        }
        let payload = match total {
            0 => Vec::new(),
            _ => vec![self.payload(total * PAGE_BYTES as usize)?],
        };
        Ok(Batch {
            first_seq,
            writes: entries,
            checks,
            pages,
            payload,
        })
    }

    fn stored(&mut self) -> Result<Vec<Stored>, WireError> {
        let count = self.count("blocks", BLOCKS_MAX)?;
        let mut blocks = Vec::with_capacity(count.min(256));
        for _ in 0..count {
            let pages = self.u8("a length")?;
            let lba = Lba(self.u64("a block")?);
            if pages == 0 {
                let end = Lba(self.u64("a block")?);
                let version = self.version()?;
                if end <= lba {
                    return Err(WireError::Impossible("a range of zeros"));
                }
                let start = lba;
                blocks.push(Stored::Zeros { start, end, version });
                continue;
            }
            if pages > BlockSize::K64.pages() || lba.0 == u64::MAX {
                return Err(WireError::Impossible("a block of this length"));
            }
            let (version, check) = (self.version()?, self.check()?);
            let bytes = self.payload(usize::from(pages) * PAGE_BYTES as usize)?;
            blocks.push(Stored::Block(StoredBlock {
                lba,
                version,
                check,
                pages,
                bytes,
            }));
        }
        Ok(blocks)
    }

    fn rows(&mut self) -> Result<Rows, WireError> {
        let count = self.count("rows", ROWS_MAX)?;
        let mut rows = Vec::with_capacity(count.min(256));
        for _ in 0..count {
            let row = Row {
                start: Lba(self.u64("a block")?),
                end: Lba(self.u64("a block")?),
                version: self.version()?,
                zero: self.bool("whether it is zeros")?,
            };
            let follows = rows.last().is_none_or(|last: &Row| last.end <= row.start);
            if row.end <= row.start || !follows {
                return Err(WireError::Impossible("a row that does not follow the one before it"));
            }
            rows.push(row);
        }
        let next = self.bool("whether it goes on")?;
        let next = if next { Some(Lba(self.u64("a block")?)) } else { None };
        let last = rows.last().map_or(Lba(0), |row| row.end);
        if next.is_some_and(|next| next < last) {
            return Err(WireError::Impossible("a list that goes on before its end"));
        }
        Ok(Rows { rows, next })
    }

    fn outcome<T>(
        &mut self,
        get: impl FnOnce(&mut Self) -> Result<T, WireError>,
    ) -> Result<(u64, Result<T, String>), WireError> {
        let id = self.u64("a number")?;
        let found = if self.bool("how it ended")? {
            Ok(get(self)?)
        } else {
            Err(self.text()?)
        };
        Ok((id, found))
    }

    fn end(&self) -> Result<(), WireError> {
        let payload = self.payload.as_ref().map_or(0, Buf::len) - self.taken;
        match self.body.len() + payload {
            0 => Ok(()),
            left => Err(WireError::Long(left)),
        }
    }
}

/// Makes a message to a replica ready to be sent.
pub fn pack_ask(message: &ToReplica) -> Packed {
    let kind = match &message.ask {
        Ask::Promise { .. } => kind::PROMISE,
        Ask::Trim { .. } => kind::TRIM,
        Ask::Settle { .. } => kind::SETTLE,
        Ask::Join { .. } => kind::JOIN,
        Ask::Write(_) => kind::WRITE,
        Ask::Flush { .. } => kind::FLUSH,
        Ask::Beat { .. } => kind::BEAT,
        Ask::Read { .. } => kind::READ,
        Ask::Rows { .. } => kind::ROWS,
        Ask::Copy { .. } => kind::COPY,
        Ask::Release => kind::RELEASE,
    };
    let mut out = Out::new(kind, message.incarnation, message.round, message.boot);
    match &message.ask {
        Ask::Promise { row } => drop(out.row(row.as_ref())),
        Ask::Trim { ends } => drop(out.ends(ends)),
        Ask::Settle { ends, whole } => drop(out.u8(u8::from(*whole)).ends(ends)),
        Ask::Join { base } => drop(out.u64(base.0)),
        Ask::Write(batch) => drop(out.batch(batch)),
        Ask::Flush { upto, id } => drop(out.version(*upto).u64(*id)),
        Ask::Beat { sent_ms, durable } => drop(out.u64(*sent_ms).version(*durable)),
        Ask::Read { id, lba, blocks } => drop(out.u64(*id).u64(lba.0).u64(*blocks)),
        Ask::Rows {
            id,
            from,
            after,
            rows_max,
        } => drop(out.u64(*id).u64(from.0).version(*after).u32(*rows_max as u32)),
        Ask::Copy { id, repair, blocks } => drop(out.u64(*id).u8(u8::from(*repair)).stored(blocks)),
        Ask::Release => {}
    }
    out.0
}

/// The message to a replica that a frame holds. `payload` is all that followed the body.
pub fn unpack_ask(
    volume: [u8; 16],
    replica: ReplicaId,
    epoch: Epoch,
    kind: u16,
    body: &[u8],
    payload: Option<Buf>,
) -> Result<ToReplica, WireError> {
    let mut from = In::new(body, payload);
    let (incarnation, round, boot) = from.sender()?;
    let ask = match kind {
        kind::PROMISE => Ask::Promise { row: from.row()? },
        kind::TRIM => Ask::Trim {
            ends: from.ends(epoch)?,
        },
        kind::SETTLE => Ask::Settle {
            whole: from.bool("whether it is whole")?,
            ends: from.ends(epoch)?,
        },
        kind::JOIN => Ask::Join {
            base: Seq(from.u64("a number")?),
        },
        kind::WRITE => Ask::Write(Arc::new(from.batch()?)),
        kind::FLUSH => Ask::Flush {
            upto: from.version()?,
            id: from.u64("a number")?,
        },
        kind::BEAT => Ask::Beat {
            sent_ms: from.u64("a time")?,
            durable: from.version()?,
        },
        kind::READ => {
            let (id, lba, blocks) = (from.u64("a number")?, from.u64("a block")?, from.u64("blocks")?);
            if blocks == 0 || blocks > BLOCKS_MAX as u64 || lba.checked_add(blocks).is_none() {
                return Err(WireError::Impossible("a read of these blocks"));
            }
            let lba = Lba(lba);
            Ask::Read { id, lba, blocks }
        }
        kind::ROWS => Ask::Rows {
            id: from.u64("a number")?,
            from: Lba(from.u64("a block")?),
            after: from.version()?,
            rows_max: from.count("rows", ROWS_MAX)?.max(1),
        },
        kind::COPY => Ask::Copy {
            id: from.u64("a number")?,
            repair: from.bool("whether it mends")?,
            blocks: from.stored()?,
        },
        kind::RELEASE => Ask::Release,
        other => return Err(WireError::UnknownKind(other)),
    };
    from.end()?;
    Ok(ToReplica {
        volume,
        replica,
        epoch,
        incarnation,
        round,
        boot,
        ask,
    })
}

const REFUSALS: [Refusal; 5] = [
    Refusal::Fenced,
    Refusal::OtherIncarnation,
    Refusal::NoSession,
    Refusal::Stranger,
    Refusal::Diverged,
];

/// Makes an answer of a replica ready to be sent.
pub fn pack_reply(message: &FromReplica) -> Packed {
    let kind = match &message.reply {
        Reply::Promising => kind::PROMISING,
        Reply::Promised { .. } => kind::PROMISED,
        Reply::Refused { .. } => kind::REFUSED,
        Reply::Trimmed => kind::TRIMMED,
        Reply::Settled => kind::SETTLED,
        Reply::Written { .. } => kind::WRITTEN,
        Reply::Gap { .. } => kind::GAP,
        Reply::Flushed { .. } => kind::FLUSHED,
        Reply::Beaten { .. } => kind::BEATEN,
        Reply::Blocks { .. } => kind::BLOCKS,
        Reply::Rows { .. } => kind::LISTED,
        Reply::Copied { .. } => kind::COPIED,
        Reply::Damaged { .. } => kind::DAMAGED,
        Reply::Wants { .. } => kind::WANTS,
        Reply::Failed { .. } => kind::FAILED,
    };
    let mut out = Out::new(kind, message.incarnation, message.round, message.boot);
    match &message.reply {
        Reply::Promised { last, ends, agreed } => drop(out.version(*last).ends(ends).version(*agreed)),
        Reply::Refused { promised, why } => {
            let code = REFUSALS.iter().position(|known| known == why);
            out.u32(promised.0).u8(code.expect("all are listed") as u8);
        }
        Reply::Promising | Reply::Trimmed | Reply::Settled => {}
        Reply::Written { upto } => drop(out.u64(upto.0)),
        Reply::Gap { last } => drop(out.u64(last.0)),
        Reply::Flushed { upto, id } => drop(out.version(*upto).u64(*id)),
        Reply::Beaten { sent_ms } => drop(out.u64(*sent_ms)),
        Reply::Blocks { id, found } => out.outcome(*id, found, |out, found| {
            out.stored(found);
        }),
        Reply::Rows { id, found } => out.outcome(*id, found, |out, found| {
            out.u32(found.rows.len() as u32);
            for row in &found.rows {
                out.u64(row.start.0)
                    .u64(row.end.0)
                    .version(row.version)
                    .u8(u8::from(row.zero));
            }
            out.u8(u8::from(found.next.is_some()));
            if let Some(next) = found.next {
                out.u64(next.0);
            }
        }),
        Reply::Copied { id, done } => out.outcome(*id, done, |_, ()| {}),
        Reply::Damaged { blocks } => {
            out.u32(blocks.len() as u32);
            for lba in blocks {
                out.u64(lba.0);
            }
        }
        Reply::Wants { durable } => drop(out.version(*durable)),
        Reply::Failed { why } => drop(out.text(why)),
    }
    out.0
}

/// The answer of a replica that a frame holds.
pub fn unpack_reply(
    volume: [u8; 16],
    replica: ReplicaId,
    epoch: Epoch,
    kind: u16,
    body: &[u8],
    payload: Option<Buf>,
) -> Result<FromReplica, WireError> {
    let mut from = In::new(body, payload);
    let (incarnation, round, boot) = from.sender()?;
    let reply = match kind {
        kind::PROMISING => Reply::Promising,
        kind::PROMISED => Reply::Promised {
            last: from.version_until(epoch)?,
            ends: from.ends(epoch)?,
            agreed: from.version_until(epoch)?,
        },
        kind::REFUSED => {
            let promised = Epoch(from.u32("an epoch")?);
            let code = from.u8("a refusal")?;
            let why = REFUSALS.get(usize::from(code)).copied();
            let why = why.ok_or(WireError::Impossible("a refusal of this kind"))?;
            Reply::Refused { promised, why }
        }
        kind::TRIMMED => Reply::Trimmed,
        kind::SETTLED => Reply::Settled,
        kind::WRITTEN => Reply::Written {
            upto: Seq(from.u64("a number")?),
        },
        kind::GAP => Reply::Gap {
            last: Seq(from.u64("a number")?),
        },
        kind::FLUSHED => Reply::Flushed {
            upto: from.version()?,
            id: from.u64("a number")?,
        },
        kind::BEATEN => Reply::Beaten {
            sent_ms: from.u64("a time")?,
        },
        kind::BLOCKS => {
            let (id, found) = from.outcome(In::stored)?;
            Reply::Blocks { id, found }
        }
        kind::LISTED => {
            let (id, found) = from.outcome(In::rows)?;
            Reply::Rows { id, found }
        }
        kind::COPIED => {
            let (id, done) = from.outcome(|_| Ok(()))?;
            Reply::Copied { id, done }
        }
        kind::DAMAGED => {
            let count = from.count("damaged blocks", MENDED_AT_ONCE)?;
            let blocks = (0..count).map(|_| from.u64("a block").map(Lba));
            let blocks = blocks.collect::<Result<_, _>>()?;
            Reply::Damaged { blocks }
        }
        kind::WANTS => Reply::Wants {
            durable: from.version()?,
        },
        kind::FAILED => Reply::Failed { why: from.text()? },
        other => return Err(WireError::UnknownKind(other)),
    };
    from.end()?;
    Ok(FromReplica {
        volume,
        replica,
        epoch,
        incarnation,
        round,
        boot,
        reply,
    })
}

#[cfg(test)]
mod tests;
