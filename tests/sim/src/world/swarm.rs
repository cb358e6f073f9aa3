//! Which faults a run has: each seed draws its own subset and rates (swarm testing, Groce and others 2012), because a run
//! with everything at once hides what needs one thing to work while another does not.

use galleonfs_storage_engine::replication::{Concern, Copies, Mutant, Mutants};

use super::rng::Rng;

/// Rates in times in a million per message, or as a mean pause in milliseconds; 0: never.
#[derive(Clone, Debug, Default)]
pub struct Swarm {
    pub lose_ppm: u64,
    pub repeat_ppm: u64,
    pub delay_us: u64,
    pub slow_ppm: u64,
    pub partition_ms: u64,
    pub kill_ms: u64,
    pub power_ms: u64,
    pub pause_ms: u64,
    pub api_out_ms: u64,
    pub api_unknown_ppm: u64,
    pub api_late_ppm: u64,
    pub api_touch_ms: u64,
    pub move_ms: u64,
    pub rot_ms: u64,
    pub slow_disk_ms: u64,
    pub administer_ms: u64,
    pub lag_ms: u64,
    /// Of a hundred replicas that join so many lose power soon.
    pub cut_joined_percent: u64,
    /// Of a hundred replicas that are brought up to date so many have a disk that is slow meanwhile.
    pub slow_copies_percent: u64,
    pub checkpoint_ms: u64,
    /// Clocks differ by so much in a thousand.
    pub skew: u64,
    /// Of a million thoughts of the guest so many make it only read for a while.
    pub quiet_ppm: u64,
    /// Mean microseconds between requests of the guest.
    pub think_us: u64,
    pub zero_percent: u64,
    pub flush_percent: u64,
    pub read_percent: u64,
    /// Writes and flushes that may be under way.
    pub writes_max: usize,
    /// The guest reads no block that it is writing, as file systems do: on a primary that is cut off with writes under way
    /// other reads would soon all wait for these.
    pub reads_apart: bool,
}

impl Swarm {
    /// Draws one.
    pub fn draw(rng: &mut Rng) -> Swarm {
        let maybe = |rng: &mut Rng, percent, low, high| {
            if rng.percent(percent) {
                rng.between(low, high)
            } else {
                0
            }
        };
        Swarm {
            lose_ppm: maybe(rng, 50, 100, 100_000),
            repeat_ppm: maybe(rng, 40, 100, 100_000),
            delay_us: rng.between(50, 3_000),
            slow_ppm: maybe(rng, 40, 100, 30_000),
            partition_ms: maybe(rng, 60, 1_000, 20_000),
            kill_ms: maybe(rng, 60, 1_000, 20_000),
            power_ms: maybe(rng, 40, 2_000, 20_000),
            pause_ms: maybe(rng, 40, 2_000, 20_000),
            api_out_ms: maybe(rng, 40, 3_000, 30_000),
            api_unknown_ppm: maybe(rng, 50, 10_000, 500_000),
            api_late_ppm: maybe(rng, 40, 10_000, 300_000),
            api_touch_ms: maybe(rng, 40, 500, 5_000),
            move_ms: maybe(rng, 60, 2_000, 20_000),
            rot_ms: maybe(rng, 30, 500, 5_000),
            slow_disk_ms: maybe(rng, 30, 2_000, 20_000),
            lag_ms: maybe(rng, 40, 2_000, 15_000),
            cut_joined_percent: maybe(rng, 40, 5, 60),
            slow_copies_percent: maybe(rng, 40, 10, 80),
            administer_ms: maybe(rng, 40, 1_000, 20_000),
            checkpoint_ms: rng.between(50, 3_000),
            skew: match rng.below(10) {
                0..4 => 0,
                4..7 => 99,
                _ => rng.between(1, 99),
            },
            quiet_ppm: maybe(rng, 30, 200, 4_000),
            think_us: rng.between(500, 20_000),
            zero_percent: rng.between(0, 30),
            flush_percent: rng.between(1, 15),
            // Some guests hardly write: their reads seldom wait for writes that wait.
            read_percent: if rng.percent(30) {
                rng.between(85, 98)
            } else {
                rng.between(10, 60)
            },
            writes_max: *rng.pick(&[1, 3, 10, 10]),
            reads_apart: rng.percent(50),
        }
    }
}

/// What the volume wants of a write. Drawn apart from everything else, so that a seed's faults do not depend on it.
pub fn concern(seed: u64, mutants: Mutants, replicas: usize, min_in_sync: usize) -> Concern {
    let all = Concern::replicated(min_in_sync);
    let first = Concern {
        copies: Copies::First,
        ..all
    };
    if mutants.has(Mutant::FirstUnbound) {
        return first;
    }
    if mutants != Mutants::NONE {
        return all;
    }
    match Rng::new(seed).fork().below(100) {
        0..20 => first,
        20..35 if replicas >= 2 => Concern { min_zones: 2, ..all },
        _ => all,
    }
}
