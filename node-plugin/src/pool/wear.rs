//! How much of a pool's disk was found damaged lately, and when that is too much.
//!
//! Damage is mended where there is another copy, so nobody notices a disk that rots: until two of them do. What was found is
//! counted by replica, each place once; the counts come from the stores, which begin anew with each opening. Only the
//! verdict lasts: it stands in the pool's object, where the controller reads it, and survives this process.

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::time::Duration;

use galleonfs_api::{ANNOTATION_DISK_TRUSTED_AT, Condition, condition_type, reason};
use k8s_openapi::jiff::Timestamp;
use tokio::time::Instant;

/// With more damaged places than this within [`WITHIN`] a disk is not to be trusted. One sector that goes bad spoils a few
/// blocks, and a good disk loses less than that in the whole of its life by its data sheet (one sector in 10^15 bits);
/// a scrub reads about 100 GB of a volume in the time. So 16 are no accident: a surface, a cable or a controller fails.
pub const DAMAGED_MAX: u64 = 16;

/// Damage counts for so long. Most is found by scrubs, and all volumes that were attached together begin theirs within half
/// of that.
pub const WITHIN: Duration = Duration::from_secs(3600);

/// Replicas that are named in a verdict; a long list helps nobody.
const NAMED_MAX: usize = 8;

/// What was found on one pool's disk.
#[derive(Debug, Default)]
pub struct Wear {
    /// What each replica's store has counted since it was opened, as it said last.
    counted: HashMap<String, u64>,
    found: VecDeque<Found>,
}

#[derive(Debug)]
struct Found {
    at: Instant,
    replica: String,
    places: u64,
}

impl Wear {
    /// What the stores of the replicas in the pool have counted until now.
    pub fn count(&mut self, stores: &[(String, u64)], now: Instant) {
        self.counted
            .retain(|replica, _| stores.iter().any(|(name, _)| name == replica));
        for (replica, counted) in stores {
            let before = self.counted.insert(replica.clone(), *counted).unwrap_or(0);
            // Fewer than before: it was opened again.
            let places = if *counted < before { *counted } else { counted - before };
            if places > 0 {
                tracing::warn!(%replica, places, "damage was found on the disk");
                let replica = replica.clone();
                self.found.push_back(Found {
                    at: now,
                    replica,
                    places,
                });
            }
        }
        while self.found.front().is_some_and(|found| now - found.at > WITHIN) {
            self.found.pop_front();
        }
    }

    /// Nothing that was found until now counts any more.
    pub fn forget(&mut self) {
        self.found.clear();
    }

    /// What was found, in words, if it is too much.
    pub fn too_much(&self) -> Option<String> {
        let sum: u64 = self.found.iter().map(|found| found.places).sum();
        if sum <= DAMAGED_MAX {
            return None;
        }
        let mut replicas: BTreeMap<&str, u64> = BTreeMap::new();
        for found in &self.found {
            *replicas.entry(&found.replica).or_default() += found.places;
        }
        let more = match replicas.len().saturating_sub(NAMED_MAX) {
            0 => String::new(),
            more => format!(" and {more} more"),
        };
        let named: Vec<String> = replicas
            .iter()
            .take(NAMED_MAX)
            .map(|(replica, places)| format!("{replica} ({places})"))
            .collect();
        Some(format!(
            "{sum} blocks were found damaged within {} minutes, of {}{more}",
            WITHIN.as_secs() / 60,
            named.join(", ")
        ))
    }
}

/// The condition Failing as it is to be from now on, if it is to change. `trusted`: when a person trusted the disk last.
pub fn judge(known: Option<&Condition>, trusted: Option<Timestamp>, wear: &mut Wear) -> Option<Condition> {
    let failing = known.filter(|known| known.is_true());
    if let Some(failing) = failing {
        let trusted = trusted.filter(|trusted| *trusted >= failing.last_transition_time.0)?;
        wear.forget();
        let text = format!(
            "a person trusts the disk since {trusted}; before that: {}",
            failing.message
        );
        return Some(Condition::new(
            condition_type::FAILING,
            false,
            reason::DISK_TRUSTED,
            text,
        ));
    }
    let text = format!(
        "{}. The disk is not to be trusted: no replicas are made here any more, and those of volumes with several are \
         replaced on other nodes, one after the other. When it was changed, delete this StoragePool and make it again; if \
         it is good, annotate this one with {ANNOTATION_DISK_TRUSTED_AT}=<now>",
        wear.too_much()?
    );
    Some(Condition::new(
        condition_type::FAILING,
        true,
        reason::TOO_MANY_REPAIRS,
        text,
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn says(rows: &[(&str, u64)]) -> Vec<(String, u64)> {
        rows.iter().map(|(name, count)| (name.to_string(), *count)).collect()
    }

    #[test]
    fn more_than_the_limit_within_the_time_is_too_much_and_says_whose_they_were() {
        let (mut wear, start) = (Wear::default(), Instant::now());
        wear.count(&says(&[("v-a", 10), ("w-a", 0)]), start);
        wear.count(&says(&[("v-a", 10), ("w-a", 6)]), start + WITHIN / 2);
        assert_eq!(wear.too_much(), None, "as many as may be");
        wear.count(&says(&[("v-a", 10), ("w-a", 7)]), start + WITHIN / 2);
        let text = wear.too_much().expect("one more");
        assert_eq!(
            text,
            "17 blocks were found damaged within 60 minutes, of v-a (10), w-a (7)"
        );
    }

    #[test]
    fn what_was_found_long_ago_does_not_count() {
        let (mut wear, start) = (Wear::default(), Instant::now());
        for hour in 0..20 {
            wear.count(
                &says(&[("v-a", 10 * (hour + 1))]),
                start + hour as u32 * (WITHIN + Duration::from_secs(1)),
            );
            assert_eq!(wear.too_much(), None);
        }
        assert_eq!(wear.found.len(), 1);
    }

    #[test]
    fn a_store_that_was_opened_again_counts_from_nothing() {
        let (mut wear, now) = (Wear::default(), Instant::now());
        wear.count(&says(&[("v-a", 10)]), now);
        wear.count(&says(&[("v-a", 4)]), now);
        assert_eq!(wear.too_much(), None);
        wear.count(&says(&[]), now);
        wear.count(&says(&[("v-a", 4)]), now);
        assert!(wear.too_much().is_some(), "10 and 4 and 4");
    }

    #[test]
    fn a_verdict_stays_until_a_person_trusts_the_disk_after_it() {
        let (mut wear, now) = (Wear::default(), Instant::now());
        assert_eq!(judge(None, None, &mut wear), None);
        wear.count(&says(&[("v-a", 17)]), now);
        let failing = judge(None, None, &mut wear).expect("too much");
        assert!(failing.is_true() && failing.message.contains("v-a (17)"), "{failing:?}");
        // The next process has counted nothing.
        let mut next = Wear::default();
        assert_eq!(judge(Some(&failing), None, &mut next), None);
        let said = failing.last_transition_time.0;
        let earlier = Timestamp::from_second(said.as_second() - 1).expect("a time");
        assert_eq!(
            judge(Some(&failing), Some(earlier), &mut next),
            None,
            "for an earlier one"
        );
        let trusted = judge(Some(&failing), Some(said), &mut wear).expect("it is trusted");
        assert!(!trusted.is_true() && trusted.reason == reason::DISK_TRUSTED);
        assert_eq!(
            judge(Some(&trusted), Some(said), &mut wear),
            None,
            "what was found before is forgotten"
        );
        wear.count(&says(&[("v-a", 34)]), now);
        assert!(judge(Some(&trusted), Some(said), &mut wear).expect("again").is_true());
    }
}
