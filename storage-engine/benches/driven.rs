//! An engine on a synthetic disk, and a guest that asks for one block at a time or many.

use std::collections::VecDeque;

use galleonfs_storage_engine::BlockEngine;
use galleonfs_storage_engine::buffer::{Buf, BufMut};
use galleonfs_storage_engine::io::{Io, IoDone, IoId, Output, perform};
use galleonfs_storage_engine::request::{Request, RequestId};
use galleonfs_storage_engine::store::{OpenOptions, OpenReport, open_replica};
use galleonfs_storage_engine::types::Epoch;
use galleonfs_storage_engine::volume::Volume;

use super::synthetic::{IDENTITY, Synthetic};

const BLOCK: u64 = 4096;

pub struct Driven {
    pub disk: Synthetic,
    pub engine: Volume,
    outstanding: VecDeque<(IoId, Io)>,
    block: Buf,
    next: u64,
    random: u64,
}

impl Driven {
    /// Opens the replica with the default options.
    pub fn open(mut disk: Synthetic, epoch: u32) -> (Driven, OpenReport) {
        let (store, report) =
            open_replica(&mut disk, OpenOptions::new(IDENTITY, Epoch(epoch))).expect("the map is whole");
        let driven = Driven {
            disk,
            engine: Volume::new(store),
            outstanding: VecDeque::new(),
            block: BufMut::zeroed(BLOCK as usize).freeze(),
            next: 0,
            random: 5,
        };
        (driven, report)
    }

    /// A block by chance (SplitMix64, Steele et al. 2014).
    fn any_block(&mut self) -> u64 {
        self.random = self.random.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.random;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (z ^ (z >> 31)) % self.disk.size_blocks()
    }

    fn submit(&mut self, request: Request) {
        self.next += 1;
        self.engine.submit(RequestId(self.next), request);
    }

    fn answer(&mut self, mut waiting: usize) {
        loop {
            while let Some(output) = self.engine.poll() {
                match output {
                    Output::Io(id, io) => self.outstanding.push_back((id, io)),
                    Output::Answer(_, answer) => {
                        answer.expect("the disk never fails");
                        waiting -= 1;
                    }
                }
            }
            if waiting == 0 {
                return;
            }
            let (id, io) = self.outstanding.pop_front().expect("an answer needs the disk");
            let made = matches!(io, Io::Create { .. });
            let done = perform(&mut self.disk, io);
            let done = done.map(|done| {
                if made {
                    IoDone::Created {
                        pool_free_bytes: 1 << 50,
                    }
                } else {
                    done
                }
            });
            self.engine.completed(id, done);
        }
    }

    /// Looks so many blocks up, all over the volume.
    pub fn look_up(&mut self, count: u64) {
        for _ in 0..count {
            let offset = Synthetic::hole_near(self.any_block()) * BLOCK;
            self.submit(Request::Read { offset, len: BLOCK });
            self.answer(1);
        }
    }

    /// Writes so many blocks all over the volume.
    pub fn write(&mut self, count: u64) {
        for _ in 0..count / 32 {
            for _ in 0..32 {
                let (offset, data) = (self.any_block() * BLOCK, self.block.clone());
                self.submit(Request::Write {
                    offset,
                    data,
                    fua: false,
                });
            }
            self.answer(32);
        }
    }
}
