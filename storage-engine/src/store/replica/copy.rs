//! Copies are taken: checked first, so that nothing wrong and nothing that cannot be is ever written.

use super::super::{Event, PAGES_MAX, Store};
use super::stored::Stored;
use crate::request::RequestError;
use crate::types::{Lba, PAGE_BYTES, Version};

/// What became of copies, in blocks.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Copies {
    /// They were newer than what was here, and are in the log.
    pub applied: u64,
    /// What is here is as new or newer; or the stream brings it, unless its epoch ends before; or it lies behind the end of
    /// its epoch.
    pub superseded: u64,
}

/// Bytes of copies that may wait, and orders.
const WAITING_BYTES_MAX: usize = 4 * PAGES_MAX * PAGE_BYTES as usize;
const WAITING_MAX: usize = 16;

impl Store {
    /// Takes what another replica has for these blocks, in ascending order; reported by [`Event::CopiedIn`] with `token`
    /// once it is in the kernel's hands, and durable with the next sync ([`Store::copies_are_durable`]). Of each block what
    /// is newer stays, see the [module](super). A copy that does not pass its check fails the whole order, and nothing of
    /// it is taken.
    pub fn copy_in(&mut self, token: u64, copies: Vec<Stored>) {
        match self.verify_copies(&copies) {
            Ok(()) => self.order_copies(token, copies, &[]),
            Err(error) => self.events.push_back(Event::CopiedIn(token, Err(error))),
        }
    }

    /// True if [`Store::copy_in`] should be called now; else after the next [`Event::CopiedIn`].
    pub fn takes_copies(&self) -> bool {
        let (orders, bytes) = self.copying.waiting();
        orders < WAITING_MAX && bytes < WAITING_BYTES_MAX
    }

    pub(super) fn verify_copies(&self, copies: &[Stored]) -> Result<(), RequestError> {
        let epoch = self.superblock.epoch;
        let mut behind = Lba(0);
        for copy in copies {
            let (start, end, version) = (copy.start(), copy.end(), copy.version());
            let what = || format!("a copy of blocks {} to {} of version {version}", start.0, end.0);
            if start < behind || end <= start || end.0 > self.size_blocks() {
                return Err(RequestError::Invalid(format!(
                    "{}; expected ascending ones of a volume of {} blocks",
                    what(),
                    self.size_blocks()
                )));
            }
            behind = end;
            if version.epoch > epoch || version.epoch == epoch && !self.has_stream() {
                return Err(RequestError::Invalid(format!(
                    "{} before the writes of its epoch were taken up",
                    what()
                )));
            }
            let Stored::Block(block) = copy else { continue };
            let fits = (1..=self.block_size().pages()).contains(&block.pages)
                && block.bytes.len() as u64 == u64::from(block.pages) * PAGE_BYTES;
            if !fits || version == Version::default() {
                return Err(RequestError::Invalid(format!(
                    "{}, in {} bytes and {} pages",
                    what(),
                    block.bytes.len(),
                    block.pages
                )));
            }
            if self.seals.block(block.lba, version, block.bytes.as_ref()) != block.check.crc {
                return Err(RequestError::Corrupt(format!("{} does not pass its check", what())));
            }
        }
        Ok(())
    }
}
