//! What a guest feels of the cleaner, on a disk that is modelled: its time is virtual, so the figures are always the same.

use std::collections::{BTreeMap, VecDeque};

use galleonfs_storage_engine::BlockEngine;
use galleonfs_storage_engine::io::{Io, IoId, Output, perform};
use galleonfs_storage_engine::request::{Request, RequestId};
use galleonfs_storage_engine::types::BLOCK_BYTES;

use crate::harness::Pool;
use crate::steady::Guest;

/// The disk moves a gigabyte a second, one operation after the other, and answers each a little later.
const BYTES_PER_US: u64 = 1_000;
const LATENCY_US: u64 = 60;
/// The guest writes a block so often, whether the last one was answered or not: 40 MB/s.
const ARRIVAL_US: u64 = 100;

/// Microseconds in which half and 99 of 100 single-block writes were answered.
fn answered_within(guest: &mut Guest, writes: u64) -> (u64, u64) {
    let mut now_us = (guest.now_ms + 1) * 1_000;
    let (mut bus_free_us, mut next_arrival_us, mut submitted) = (now_us, now_us, 0);
    let mut under_way: BTreeMap<(u64, u64), (IoId, Io)> = BTreeMap::new();
    let mut order = 0;
    let mut since: BTreeMap<RequestId, u64> = BTreeMap::new();
    let mut took = Vec::new();
    let left: VecDeque<(IoId, Io)> = std::mem::take(&mut guest.outstanding);
    let mut to_start: Vec<(IoId, Io)> = left.into();
    while (took.len() as u64) < writes {
        while let Some(output) = guest.engine.poll() {
            match output {
                Output::Io(id, io) => to_start.push((id, io)),
                Output::Answer(id, answer) => {
                    answer.expect("the pool has room");
                    took.push(now_us - since.remove(&id).expect("it was asked for"));
                }
            }
        }
        let next_turn = guest.engine.next_tick_ms().is_some_and(|at| at <= guest.now_ms);
        for (id, io) in to_start.drain(..) {
            let bytes = match &io {
                Io::Read { buf, .. } => buf.len() as u64,
                Io::Write { parts, .. } => parts.iter().map(|part| part.len() as u64).sum(),
                Io::Sync { .. } | Io::Create { .. } | Io::Remove { .. } => 0,
            };
            bus_free_us = bus_free_us.max(now_us) + bytes / BYTES_PER_US;
            order += 1;
            under_way.insert((bus_free_us + LATENCY_US, order), (id, io));
        }
        let completes = under_way.first_key_value().map(|((at, _), _)| *at);
        match completes.filter(|at| submitted >= writes || *at <= next_arrival_us) {
            Some(at) => {
                now_us = at;
                let (_, (id, io)) = under_way.pop_first().expect("it is there");
                let made = matches!(io, Io::Create { .. });
                let done = perform(&mut guest.disk, io);
                let done = done.map(|done| if made { guest.created() } else { done });
                guest.engine.completed(id, done);
            }
            None if submitted == writes => now_us += 1_000, // it waits for the clock
            None => {
                now_us = next_arrival_us;
                next_arrival_us += ARRIVAL_US;
                submitted += 1;
                let id = RequestId(u64::MAX / 2 + submitted);
                since.insert(id, now_us);
                let offset = guest.random.below(guest.blocks) * BLOCK_BYTES;
                let data = guest.payload.slice(0..BLOCK_BYTES as usize);
                guest.engine.submit(
                    id,
                    Request::Write {
                        offset,
                        data,
                        fua: false,
                    },
                );
            }
        }
        if next_turn || guest.now_ms < now_us / 1_000 {
            guest.now_ms = now_us / 1_000;
            guest.engine.tick(guest.now_ms);
        }
    }
    guest.outstanding = under_way.into_values().collect();
    took.sort_unstable();
    (took[took.len() / 2], took[took.len() / 100 * 99])
}

#[test]
fn while_the_cleaner_works_99_of_100_writes_are_answered_within_three_times_the_time() {
    let blocks = 128 << 8;
    let mut without = Guest::new(blocks, Pool::Roomy);
    without.fill();
    let before = answered_within(&mut without, blocks / 4);
    assert_eq!(without.engine.store_stats().moved_bytes, 0, "nothing was cleaned");

    let mut with = Guest::new(blocks, Pool::Tight);
    with.disk.capacity = Some((128 << 20) * 10 / 7);
    with.fill();
    with.overwrite(blocks * 2, 1, 0);
    let moved = with.engine.store_stats().moved_bytes;
    let cleaning = answered_within(&mut with, blocks);
    let moved = with.engine.store_stats().moved_bytes - moved;
    println!(
        "p50 and p99 without cleaning {before:?} us, with {cleaning:?} us, {} MiB moved",
        moved >> 20
    );
    assert!(moved > blocks * BLOCK_BYTES / 2, "the cleaner had to work");
    assert!(
        before.1 <= 350,
        "checkpoints and files that are filled hold nobody up for long"
    );
    assert!(cleaning.1 <= 3 * before.1);
}
