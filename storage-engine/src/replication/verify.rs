//! Whether an order that came over a network can be carried out: inside the volume, and with the bytes that were sent.
//!
//! Whoever is at the other end is known by its certificate, but may have been made by somebody else, or be broken. What a
//! replica appends is verified before, so that damage on the way is not taken for a write.

use super::message::{Ask, Batch, Stored, ToReplica};
use crate::store::Seals;
use crate::types::{Epoch, Lba, PAGE_BYTES, Version};

/// Why an order is not carried out.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Unfit {
    #[error("{what} from block {} on, {blocks} of them, of a volume of {size}", lba.0)]
    Outside {
        what: &'static str,
        lba: Lba,
        blocks: u64,
        size: u64,
    },
    #[error("a record whose parts do not belong together")]
    Torn,
    #[error("block {} version {version} is not what was sent", lba.0)]
    Damaged { lba: Lba, version: Version },
}

/// Whether a replica whose blocks have the checks of `seals` and that is `size_blocks` large can carry this out.
pub fn verify(message: &ToReplica, seals: &Seals, size_blocks: u64) -> Result<(), Unfit> {
    let inside = |what, lba: Lba, blocks: u64| match lba.0.checked_add(blocks) {
        Some(end) if end <= size_blocks => Ok(()),
        _ => Err(Unfit::Outside {
            what,
            lba,
            blocks,
            size: size_blocks,
        }),
    };
    match &message.ask {
        Ask::Write(batch) => {
            for write in &batch.writes {
                inside("a write", write.lba, u64::from(write.blocks))?;
            }
            verify_batch(batch, message.epoch, seals)
        }
        Ask::Read { lba, blocks, .. } => inside("a read", *lba, *blocks),
        Ask::Rows { from, .. } => inside("a list", *from, 0),
        Ask::Copy { blocks, .. } => {
            for stored in blocks {
                let (start, end) = (stored.start(), stored.end());
                inside("a copy", start, end.0.saturating_sub(start.0))?;
                if let Stored::Block(block) = stored
                    && seals.block(block.lba, block.version, block.bytes.as_ref()) != block.check.crc
                {
                    let (lba, version) = (block.lba, block.version);
                    return Err(Unfit::Damaged { lba, version });
                }
            }
            Ok(())
        }
        Ask::Promise { .. }
        | Ask::Trim { .. }
        | Ask::Settle { .. }
        | Ask::Join { .. }
        | Ask::Flush { .. }
        | Ask::Beat { .. }
        | Ask::Release => Ok(()),
    }
}

/// Walks the blocks of a record beside its checks.
fn verify_batch(batch: &Batch, epoch: Epoch, seals: &Seals) -> Result<(), Unfit> {
    let whole = seals.block_size().pages();
    let blocks: u64 = batch
        .writes
        .iter()
        .filter(|write| !write.zero)
        .map(|write| u64::from(write.blocks))
        .sum();
    let lengths = if whole == 1 { 0 } else { blocks };
    if batch.checks.len() as u64 != blocks || batch.pages.len() as u64 != lengths {
        return Err(Unfit::Torn);
    }
    // What arrives is one run of memory; what is sent may be several, each of whole blocks.
    let mut parts = batch.payload.iter().map(AsRef::as_ref);
    let mut rest: &[u8] = &[];
    let mut index = 0;
    for (write, seq) in batch.writes.iter().zip(batch.first_seq.0..) {
        if write.zero {
            continue;
        }
        let version = Version {
            epoch,
            seq: crate::types::Seq(seq),
        };
        for lba in (write.lba.0..write.lba.0 + u64::from(write.blocks)).map(Lba) {
            if rest.is_empty() {
                rest = parts.next().ok_or(Unfit::Torn)?;
            }
            let pages = batch.pages.get(index).copied().unwrap_or(whole);
            let len = usize::from(pages) * PAGE_BYTES as usize;
            let (block, behind) = rest.split_at_checked(len).filter(|_| len > 0).ok_or(Unfit::Torn)?;
            if seals.block(lba, version, block) != batch.checks[index].crc {
                return Err(Unfit::Damaged { lba, version });
            }
            rest = behind;
            index += 1;
        }
    }
    if rest.is_empty() && parts.next().is_none() {
        Ok(())
    } else {
        Err(Unfit::Torn)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::buffer::{Buf, BufMut};
    use crate::replication::{Incarnation, ReplicaId};
    use crate::store::{StoredBlock, WriteEntry};
    use crate::types::{BlockSize, Check, Seq};

    const VOLUME: [u8; 16] = [7; 16];
    const EPOCH: Epoch = Epoch(3);

    fn order(ask: Ask) -> ToReplica {
        ToReplica {
            volume: VOLUME,
            replica: ReplicaId([1; 16]),
            epoch: EPOCH,
            incarnation: Incarnation([2; 16]),
            round: 1,
            boot: 1,
            ask,
        }
    }

    fn bytes(value: u8) -> Buf {
        BufMut::copy_of(&[value; 4096]).freeze()
    }

    /// Two blocks, a zeroed range, one more block.
    fn batch(seals: &Seals) -> Batch {
        let entry = |lba, blocks, zero| WriteEntry {
            lba: Lba(lba),
            blocks,
            zero,
        };
        let check = |lba, seq, bytes: &Buf| {
            let version = Version {
                epoch: EPOCH,
                seq: Seq(seq),
            };
            Check::from(seals.block(Lba(lba), version, bytes.as_ref()))
        };
        let (first, second, third) = (bytes(1), bytes(2), bytes(3));
        let two = BufMut::copy_of(&[first.as_ref(), second.as_ref()].concat()).freeze();
        Batch {
            first_seq: Seq(5),
            writes: vec![entry(10, 2, false), entry(0, 4, true), entry(99, 1, false)],
            checks: vec![check(10, 5, &first), check(11, 5, &second), check(99, 7, &third)],
            pages: Vec::new(),
            payload: vec![two, third],
        }
    }

    #[test]
    fn what_was_sent_is_taken_and_what_changed_on_the_way_is_not() {
        let seals = Seals::shared(VOLUME, BlockSize::K4);
        let good = batch(&seals);
        assert_eq!(verify(&order(Ask::Write(Arc::new(good.clone()))), &seals, 100), Ok(()));
        let mut changed = good.clone();
        let mut copy = BufMut::copy_of(changed.payload[1].as_ref());
        copy.as_mut()[77] ^= 1;
        changed.payload[1] = copy.freeze();
        let damaged = verify(&order(Ask::Write(Arc::new(changed))), &seals, 100);
        assert!(
            matches!(damaged, Err(Unfit::Damaged { lba: Lba(99), .. })),
            "{damaged:?}"
        );
        for torn in [
            Batch {
                payload: vec![good.payload[0].clone()],
                ..good.clone()
            },
            Batch {
                payload: [good.payload.clone(), vec![bytes(9)]].concat(),
                ..good.clone()
            },
            Batch {
                checks: good.checks[..2].to_vec(),
                ..good.clone()
            },
            Batch {
                pages: vec![1],
                ..good.clone()
            },
        ] {
            assert_eq!(
                verify(&order(Ask::Write(Arc::new(torn))), &seals, 100),
                Err(Unfit::Torn)
            );
        }
        // The same record in another epoch is another one.
        let other = ToReplica {
            epoch: Epoch(4),
            ..order(Ask::Write(Arc::new(good)))
        };
        assert!(matches!(verify(&other, &seals, 100), Err(Unfit::Damaged { .. })));
    }

    #[test]
    fn nothing_is_done_outside_of_the_volume() {
        let seals = Seals::shared(VOLUME, BlockSize::K4);
        let good = batch(&seals);
        let block = StoredBlock {
            lba: Lba(100),
            version: Version::default(),
            check: Check::from(seals.block(Lba(100), Version::default(), &[4; 4096])),
            pages: 1,
            bytes: bytes(4),
        };
        let (start, end, version) = (Lba(90), Lba(u64::MAX), Version::default());
        for ask in [
            Ask::Write(Arc::new(good)),
            Ask::Read {
                id: 1,
                lba: Lba(98),
                blocks: 2,
            },
            Ask::Read {
                id: 1,
                lba: Lba(u64::MAX),
                blocks: 2,
            },
            Ask::Rows {
                id: 1,
                from: Lba(100),
                after: version,
                rows_max: 1,
            },
            Ask::Copy {
                id: 1,
                repair: false,
                blocks: vec![Stored::Block(block)],
            },
            Ask::Copy {
                id: 1,
                repair: false,
                blocks: vec![Stored::Zeros { start, end, version }],
            },
        ] {
            let refused = verify(&order(ask), &seals, 99);
            assert!(matches!(refused, Err(Unfit::Outside { size: 99, .. })), "{refused:?}");
        }
    }
}
