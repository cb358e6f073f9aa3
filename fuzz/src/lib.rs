//! What bytes from outside may do to us: fail, and nothing else.
//!
//! A [`Target`] is a function of bytes that somebody else chose: what was read from a disk, what the kernel sent, what a
//! person wrote into an object. It must come back, whatever they are, without a panic and without much memory; and what
//! it lets through must be right. The same functions are driven in two ways:
//!
//! - `tests/targets.rs`, in `make test`: from the kept corpus, changed by chance from numbered seeds, for some seconds;
//! - `libfuzzer/`, in `make fuzz`: by libFuzzer, which keeps what reaches new code, for as long as one likes.
//!
//! A check keeps most changed bytes out before anything looks at them. So the targets of what carries a check make it fit
//! again for one input in two, and see what the decoder makes of nonsense that somebody signed.

mod disk;
mod mutate;
mod seeds;
mod targets;

// What the tests of the engine are made of, too.
#[path = "../../storage-engine/tests/engine/harness.rs"]
#[expect(dead_code, reason = "the engine's tests use the rest")]
mod harness;
#[path = "../../storage-engine/tests/engine/sim_disk.rs"]
#[expect(dead_code, reason = "the engine's tests use the rest")]
mod sim_disk;

pub use mutate::mutated;
pub use seeds::seeds;
pub use targets::TARGETS;

/// A decoder, and how to drive it.
#[derive(Clone, Copy, Debug)]
pub struct Target {
    /// Also the folder of its corpus.
    pub name: &'static str,
    /// Panics if the decoder does something that it must not.
    pub run: fn(&[u8]),
    /// How many inputs are tried in `make test`: what takes some seconds there.
    pub runs: u64,
    /// Longer inputs show nothing new.
    pub bytes_max: usize,
}

/// The target of this name.
pub fn target(name: &str) -> Option<&'static Target> {
    TARGETS.iter().find(|target| target.name == name)
}
