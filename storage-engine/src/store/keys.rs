//! The salts of a sealed replica: what its keys are derived with, and how the right data key is told from a wrong one.
//!
//! A row for each epoch whose blocks may be stored, in two files with the same content. An epoch's row is in both before
//! the epoch is promised, so every block that can be there has one. Rows are added at the end and never changed, except
//! for one whose epoch was never promised and is asked for again. A row never reaches over the end of a sector,
//! and has its own check: however a power cut tears the writing of a new one, all others stay whole. Nothing in them is
//! secret.

use super::format::{FORMAT_VERSION, Get, Put, check_around};
use super::recovery::{OpenError, disk};
use crate::buffer::{Buf, BufMut};
use crate::io::{Disk, FileId};
use crate::seal::{EpochSalt, KeyCheck, KeyId, KeyProof, KeyRow};
use crate::types::{Epoch, PAGE_BYTES};

const MAGIC: u32 = u32::from_le_bytes(*b"GFSK");
const CHECK_AT: usize = 8;
/// Bytes of a row; a sector has a whole number of them.
pub const KEY_ROW_BYTES: usize = 128;
/// The files grow by so much, 512 rows: a full pool must not keep a replica from being opened.
const GROW_BYTES: u64 = 64 << 10;

/// Encodes row number `index` of the files of `replica`.
pub fn encode_row(index: u32, replica: &[u8; 16], row: &KeyRow) -> [u8; KEY_ROW_BYTES] {
    let mut bytes = [0; KEY_ROW_BYTES];
    let mut put = Put::new(&mut bytes);
    put.u32(MAGIC).u16(FORMAT_VERSION).u16(0).u32(0);
    put.u32(index).bytes(replica);
    put.bytes(&row.volume).u32(row.epoch.0).u32(row.key.0);
    put.bytes(&row.salt.0).bytes(&row.check.0);
    let check = check_around(0, &bytes, CHECK_AT);
    bytes[CHECK_AT..CHECK_AT + 4].copy_from_slice(&check.to_le_bytes());
    bytes
}

/// The opposite of [`encode_row`]; `None` if it is no row of these files in its place.
pub fn decode_row(bytes: &[u8], index: u32, replica: &[u8; 16]) -> Option<KeyRow> {
    let mut get = Get::new(bytes);
    if get.u32() != MAGIC || get.u16() != FORMAT_VERSION {
        return None;
    }
    let (_, check) = (get.u16(), get.u32());
    let ours = get.u32() == index && get.array::<16>() == *replica;
    (ours && check_around(0, bytes, CHECK_AT) == check).then(|| KeyRow {
        volume: get.array(),
        epoch: Epoch(get.u32()),
        key: KeyId(get.u32()),
        salt: EpochSalt(get.array()),
        check: KeyCheck(get.array()),
    })
}

/// What the two files hold.
#[derive(Debug, Default)]
pub struct Keys {
    pub rows: Vec<KeyRow>,
    /// What is wrong with one of the files, if anything; the other one has it right.
    pub damaged: Option<String>,
}

/// Reads the rows; each counts from either file.
pub fn read(on: &mut dyn Disk, replica: &[u8; 16]) -> Result<Keys, OpenError> {
    let files = disk(on.list(), || "listing the replica directory".into())?;
    let mut copies: [Vec<u8>; 2] = Default::default();
    let mut keys = Keys::default();
    for (slot, copy) in (0..).zip(&mut copies) {
        let file = FileId::Keys(slot);
        let Some((_, len)) = files.iter().find(|(listed, _)| *listed == file) else {
            keys.damaged = Some(format!("keys.{slot} is missing"));
            continue;
        };
        let mut buf = BufMut::zeroed((len / PAGE_BYTES * PAGE_BYTES) as usize);
        match on.read(file, 0, buf.as_mut()) {
            Ok(()) => *copy = buf.as_ref().to_vec(),
            Err(error) => keys.damaged = Some(format!("keys.{slot}: {error}")),
        }
    }
    let most = copies.iter().map(Vec::len).max().unwrap_or(0) / KEY_ROW_BYTES;
    let mut ended = false;
    for index in 0..most {
        let (mut found, mut empty) = (None, true);
        for (slot, copy) in copies.iter().enumerate() {
            // A power cut between the two may leave one of them a row behind.
            let bytes = copy.get(index * KEY_ROW_BYTES..(index + 1) * KEY_ROW_BYTES);
            let Some(bytes) = bytes.filter(|bytes| bytes.iter().any(|byte| *byte != 0)) else {
                continue;
            };
            empty = false;
            match decode_row(bytes, index as u32, replica) {
                Some(row) => found = found.or(Some(row)),
                None => keys.damaged = Some(format!("keys.{slot} is damaged at row {index}")),
            }
        }
        match found {
            Some(row) if !ended => keys.rows.push(row),
            None if empty => ended = true,
            _ => return Err(lost(index)),
        }
    }
    if keys.rows.is_empty() {
        return Err(lost(0));
    }
    Ok(keys)
}

fn lost(index: usize) -> OpenError {
    OpenError::Damaged(format!(
        "row {index} of the salts is whole in neither keys.0 nor keys.1: without it what was sealed in its epoch cannot \
         be opened; another copy or a backup is needed"
    ))
}

/// What is written at the start of both files.
pub fn encode_rows(replica: &[u8; 16], rows: &[KeyRow]) -> Buf {
    let bytes: Vec<u8> = (0..)
        .zip(rows)
        .flat_map(|(index, row)| encode_row(index, replica, row))
        .collect();
    BufMut::copy_of(&bytes).freeze()
}

/// Length of a file with so many rows.
pub fn file_bytes(rows: usize) -> u64 {
    ((rows * KEY_ROW_BYTES) as u64).next_multiple_of(GROW_BYTES)
}

/// Writes all rows into both files, one after the other, and syncs each: one is whole at any time.
pub fn write(on: &mut dyn Disk, replica: &[u8; 16], rows: &[KeyRow]) -> Result<(), OpenError> {
    let block = encode_rows(replica, rows);
    for slot in 0..2 {
        let file = FileId::Keys(slot);
        let doing = || format!("writing the salts into keys.{slot}");
        disk(on.create(file, file_bytes(rows.len())), doing)?;
        disk(on.write(file, 0, std::slice::from_ref(&block)), doing)?;
        disk(on.sync(file), doing)?;
    }
    Ok(())
}

/// The rows for an engine start: every key must be at hand, and the proof's row joins. One of the same epoch can only be
/// left of a start that never promised it, and sealed nothing.
pub fn admit(mut rows: Vec<KeyRow>, proof: &KeyProof) -> Result<Vec<KeyRow>, OpenError> {
    for row in rows.iter().chain([&proof.row]) {
        proof.covers(row)?;
    }
    let same = |row: &&mut KeyRow| (row.volume, row.epoch) == (proof.row.volume, proof.row.epoch);
    match rows.iter_mut().find(same) {
        Some(row) => *row = proof.row,
        None => rows.push(proof.row),
    }
    Ok(rows)
}

#[cfg(test)]
mod tests {
    use super::*;

    const REPLICA: [u8; 16] = [3; 16];

    fn row(epoch: u32) -> KeyRow {
        KeyRow {
            volume: [2; 16],
            epoch: Epoch(epoch),
            key: KeyId(epoch + 1),
            salt: EpochSalt([epoch as u8; 32]),
            check: KeyCheck([epoch as u8; 8]),
        }
    }

    #[test]
    fn a_row_gives_back_what_it_was_made_of_in_its_place_only() {
        let bytes = encode_row(5, &REPLICA, &row(9));
        assert_eq!(decode_row(&bytes, 5, &REPLICA), Some(row(9)));
        assert_eq!(decode_row(&bytes, 6, &REPLICA), None);
        assert_eq!(decode_row(&bytes, 5, &[4; 16]), None);
    }

    #[test]
    fn every_flipped_bit_of_a_row_is_noticed() {
        let bytes = encode_row(5, &REPLICA, &row(9));
        for bit in 0..KEY_ROW_BYTES * 8 {
            let mut flipped = bytes;
            flipped[bit / 8] ^= 1 << (bit % 8);
            assert_eq!(decode_row(&flipped, 5, &REPLICA), None, "bit {bit}");
        }
    }
}
