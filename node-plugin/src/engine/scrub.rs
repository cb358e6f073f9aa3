//! When a volume is scrubbed: a while after it was attached, and then again and again.
//!
//! The engine knows how to read everything that is stored and to stay out of the guest's way; here is only the clock.
//! Volumes that were attached together, as after a restart of the node, begin at different times.

use std::time::Duration;

use galleonfs_storage_engine::store::{Damage, ScrubOrder, ScrubProgress};
use galleonfs_storage_engine::volume::Volume;
use uuid::Uuid;

/// A volume that was just attached has other things to do.
const FIRST_AFTER_MAX: Duration = Duration::from_secs(3600);

/// How often it is looked whether a pass has ended.
const LOOK_EVERY: Duration = Duration::from_secs(60);

/// How often everything that is stored is verified, and how fast at most.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ScrubPlan {
    /// From the end of a pass to the beginning of the next one.
    pub every: Duration,
    /// Of one volume; 0 for as fast as the disk is.
    pub bytes_per_second: u64,
}

impl Default for ScrubPlan {
    fn default() -> ScrubPlan {
        ScrubPlan {
            every: Duration::from_secs(7 * 24 * 3600),
            bytes_per_second: 32 << 20,
        }
    }
}

/// News of what is damaged.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Finding {
    /// There is new damage; in words.
    Damaged(String),
    /// All that was damaged was written anew.
    Mended,
}

/// What is scrubbed.
pub(super) trait Scrubbed {
    fn scrub(&mut self, order: ScrubOrder);
    fn is_running(&self) -> bool;
}

impl Scrubbed for Volume {
    fn scrub(&mut self, order: ScrubOrder) {
        Volume::scrub(self, order);
    }

    fn is_running(&self) -> bool {
        self.scrub_progress().running
    }
}

/// One volume's clock.
#[derive(Debug)]
pub(super) struct Schedule {
    plan: Option<ScrubPlan>,
    /// Part of the first wait, of 256.
    share: u8,
    state: State,
}

#[derive(Debug)]
enum State {
    /// The time is not known yet.
    New,
    /// The next pass begins.
    Waiting { until_ms: u64 },
    /// A pass is under way.
    Running { look_ms: u64 },
}

impl Schedule {
    /// Without a plan nothing is scrubbed.
    pub fn new(plan: Option<ScrubPlan>, volume: Uuid) -> Schedule {
        let share = volume
            .as_bytes()
            .iter()
            .fold(0u8, |share, byte| share.wrapping_mul(31) ^ byte);
        Schedule {
            plan,
            share,
            state: State::New,
        }
    }

    /// When [`Schedule::tick`] is due.
    pub fn next_tick_ms(&self) -> Option<u64> {
        self.plan?;
        Some(match self.state {
            State::New => 0,
            State::Waiting { until_ms } => until_ms,
            State::Running { look_ms } => look_ms,
        })
    }

    /// Starts what is due.
    pub fn tick(&mut self, now_ms: u64, volume: &mut impl Scrubbed) {
        let Some(plan) = self.plan else { return };
        if self.next_tick_ms().is_some_and(|due| now_ms < due) {
            return;
        }
        let in_ms = |wait: Duration| now_ms.saturating_add(u64::try_from(wait.as_millis()).unwrap_or(u64::MAX));
        self.state = match self.state {
            State::New => {
                let wait = plan.every.min(FIRST_AFTER_MAX) / 2;
                State::Waiting {
                    until_ms: in_ms(wait + wait * u32::from(self.share) / 256),
                }
            }
            State::Waiting { .. } => {
                let bytes_per_second = plan.bytes_per_second;
                volume.scrub(ScrubOrder::Start { bytes_per_second });
                State::Running {
                    look_ms: in_ms(LOOK_EVERY),
                }
            }
            State::Running { .. } if volume.is_running() => State::Running {
                look_ms: in_ms(LOOK_EVERY),
            },
            State::Running { .. } => State::Waiting {
                until_ms: in_ms(plan.every),
            },
        };
    }
}

/// What a person is told of new findings.
pub(super) fn told(found: &[Damage], progress: &ScrubProgress) -> Option<String> {
    let first = found.first()?;
    Some(format!(
        "the scrub found {} damaged, {} in all, first {first}; reading it fails until it is written anew",
        if found.len() == 1 {
            "one place".to_owned()
        } else {
            format!("{} places", found.len())
        },
        progress.damaged_count,
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Default)]
    struct Fake {
        orders: Vec<ScrubOrder>,
        running: bool,
    }

    impl Scrubbed for Fake {
        fn scrub(&mut self, order: ScrubOrder) {
            self.orders.push(order);
            self.running = true;
        }

        fn is_running(&self) -> bool {
            self.running
        }
    }

    const HOUR_MS: u64 = 3_600_000;

    #[test]
    fn a_pass_begins_a_while_after_the_attach_and_the_next_one_an_interval_after_its_end() {
        let plan = ScrubPlan::default();
        let mut schedule = Schedule::new(Some(plan), Uuid::from_u128(7));
        let mut volume = Fake::default();
        let mut now_ms = 5_000;
        schedule.tick(now_ms, &mut volume);
        let first = schedule.next_tick_ms().expect("a plan");
        assert!((HOUR_MS / 2..=HOUR_MS).contains(&(first - now_ms)), "{first}");
        schedule.tick(first - 1, &mut volume);
        assert!(volume.orders.is_empty());
        schedule.tick(first, &mut volume);
        let start = ScrubOrder::Start {
            bytes_per_second: plan.bytes_per_second,
        };
        assert_eq!(volume.orders, [start]);
        now_ms = first + HOUR_MS;
        schedule.tick(now_ms, &mut volume);
        assert_eq!(volume.orders.len(), 1, "one is under way");
        volume.running = false;
        now_ms = schedule.next_tick_ms().expect("a look");
        schedule.tick(now_ms, &mut volume);
        assert_eq!(schedule.next_tick_ms(), Some(now_ms + 7 * 24 * HOUR_MS));
        schedule.tick(now_ms + 7 * 24 * HOUR_MS, &mut volume);
        assert_eq!(volume.orders.len(), 2);
    }

    #[test]
    fn volumes_begin_at_different_times_and_without_a_plan_never() {
        let first = |uid| {
            let mut schedule = Schedule::new(Some(ScrubPlan::default()), Uuid::from_u128(uid));
            schedule.tick(0, &mut Fake::default());
            schedule.next_tick_ms().expect("a plan")
        };
        let starts: std::collections::BTreeSet<u64> = (0..100).map(|uid| first((uid << 64) | (uid * 77))).collect();
        assert!(starts.len() > 50, "{starts:?}");
        let mut never = Schedule::new(None, Uuid::from_u128(1));
        never.tick(0, &mut Fake::default());
        assert_eq!(never.next_tick_ms(), None, "an idle volume is not woken");
    }
}
