use super::*;
use crate::fixtures::{deleting, failed, one_of_several, ready, replicated, settled};
use galleonfs_api::{reason, size::GIB};
use std::collections::BTreeSet;

const MINUTE: i64 = 60;
const DELAY: Duration = Duration::from_secs(600);

fn at(second: i64) -> Timestamp {
    Timestamp::from_second(1_000_000 + second).expect("a small number of seconds")
}

/// A volume of three; its replicas are called v-a on node a and so on.
fn volume_with(in_sync: &[&str], syncing: &[&str], out: &[&str]) -> GalleonVolume {
    let mut volume = settled(replicated("v", 3), in_sync);
    let config = volume.status.as_mut().and_then(|status| status.config.as_mut());
    let config = config.expect("it is settled");
    config.epoch = 1;
    config.syncing = syncing.iter().map(|name| name.to_string()).collect();
    let had = OutReplica {
        epoch: 1,
        flushed_seq: 7,
    };
    config.out = out.iter().map(|name| (name.to_string(), had)).collect();
    volume
}

fn attached(mut volume: GalleonVolume) -> GalleonVolume {
    let config = volume.status.as_mut().and_then(|status| status.config.as_mut());
    config.expect("it is settled").primary = Some("a".to_string());
    volume
}

fn on(node: &str) -> GalleonReplica {
    ready(one_of_several("v", node, GIB))
}

fn out_from(mut replica: GalleonReplica, second: i64) -> GalleonReplica {
    let since = at(second).to_string();
    replica
        .annotations_mut()
        .insert(ANNOTATION_OUT_SINCE.to_string(), since);
    replica
}

/// What is to be done `second` seconds in, with these nodes away since these seconds.
fn next_at(second: i64, volume: &GalleonVolume, replicas: &[GalleonReplica], away: &[(&str, i64)]) -> Repair {
    next_with(second, volume, replicas, away, &[])
}

/// The same, and the disks of these nodes are not to be trusted.
fn next_with(
    second: i64,
    volume: &GalleonVolume,
    replicas: &[GalleonReplica],
    away: &[(&str, i64)],
    failing: &[&str],
) -> Repair {
    let standing = |node: &str| {
        let gone = away.iter().find(|(other, _)| *other == node);
        Standing {
            trouble: gone.map(|_| "is not ready".to_string()),
            since: gone.map(|(_, since)| at(*since)),
            zone: None,
        }
    };
    let circumstances = Circumstances {
        now: at(second),
        delay: DELAY,
        standing: &standing,
        failing: &|pool| failing.iter().any(|node| pool == format!("default.{node}")),
        unchanged_since: at(0),
    };
    let own: Vec<&GalleonReplica> = replicas.iter().collect();
    next(volume, volume.config().expect("it is settled"), &own, &circumstances)
}

fn names(names: &[&str]) -> Vec<String> {
    names.iter().map(|name| name.to_string()).collect()
}

#[test]
fn a_volume_that_has_all_in_sync_needs_nothing() {
    let volume = volume_with(&["v-a", "v-b", "v-c"], &[], &[]);
    let own = [on("a"), on("b"), on("c")];
    assert_eq!(next_at(0, &volume, &own, &[]), Repair::Wait(None));
    // A node that is away while nobody writes to the volume costs it nothing yet.
    assert_eq!(next_at(9 * MINUTE * 60, &volume, &own, &[("c", 0)]), Repair::Wait(None));
}

#[test]
fn a_replica_that_is_out_is_marked_with_the_time_and_waited_for() {
    let volume = volume_with(&["v-a", "v-b"], &[], &["v-c"]);
    let mark = Repair::Mark {
        replica: "v-c".to_string(),
        out: true,
    };
    assert_eq!(next_at(0, &volume, &[on("a"), on("b"), on("c")], &[]), mark);
    let own = [on("a"), on("b"), out_from(on("c"), 0)];
    // Its node is well and the volume is attached nowhere: whoever attaches it next gives it what it lacks.
    assert_eq!(next_at(MINUTE * 60 * 24, &volume, &own, &[]), Repair::Wait(None));

    let back = volume_with(&["v-a", "v-b", "v-c"], &[], &[]);
    let unmark = Repair::Mark {
        replica: "v-c".to_string(),
        out: false,
    };
    assert_eq!(next_at(0, &back, &own, &[]), unmark);
}

#[test]
fn a_replica_is_replaced_when_its_node_has_been_away_for_the_delay_since_it_was_out() {
    let volume = volume_with(&["v-a", "v-b"], &[], &["v-c"]);
    let own = [on("a"), on("b"), out_from(on("c"), 60)];
    let replace = Repair::Replace("v-c".to_string());
    assert_eq!(next_at(100, &volume, &own, &[("c", 30)]), Repair::Wait(Some(at(660))));
    assert_eq!(next_at(659, &volume, &own, &[("c", 30)]), Repair::Wait(Some(at(660))));
    assert_eq!(next_at(660, &volume, &own, &[("c", 30)]), replace);
    // It was out for a day when its node went away for a moment.
    assert_eq!(
        next_at(90_000, &volume, &own, &[("c", 89_990)]),
        Repair::Wait(Some(at(90_590)))
    );
}

#[test]
fn a_replica_that_failed_is_replaced_too() {
    let volume = volume_with(&["v-a", "v-b"], &[], &["v-c"]);
    let broken = failed(one_of_several("v", "c", GIB), reason::IO_ERROR, "reading failed");
    let when = broken.trouble().expect("it says so").last_transition_time.0;
    let second = when.as_second() - 1_000_000;
    let own = [on("a"), on("b"), out_from(broken, 0)];
    assert_eq!(
        next_at(second + 599, &volume, &own, &[]),
        Repair::Wait(Some(at(second + 600)))
    );
    assert_eq!(
        next_at(second + 600, &volume, &own, &[]),
        Repair::Replace("v-c".to_string())
    );
}

#[test]
fn a_replica_that_its_primary_does_not_reach_is_replaced_but_not_one_that_waits_for_its_turn() {
    let own = [on("a"), out_from(on("b"), 0), out_from(on("c"), 0)];
    let idle = attached(volume_with(&["v-a", "v-b"], &[], &["v-c"]));
    assert_eq!(
        next_at(600, &idle, &[on("a"), on("b"), own[2].clone()], &[]),
        Repair::Replace("v-c".to_string())
    );
    let busy = attached(volume_with(&["v-a"], &["v-b"], &["v-b", "v-c"]));
    assert_eq!(next_at(6000, &busy, &own, &[]), Repair::Wait(None));
}

#[test]
fn the_new_one_is_made_then_added_then_waited_for_and_only_then_the_lost_one_given_up() {
    let lost = out_from(on("c"), 0);
    let away = [("c", 0)];
    let volume = volume_with(&["v-a", "v-b"], &[], &["v-c"]);
    let mut new = one_of_several("v", "d", GIB);
    new.annotations_mut()
        .insert(ANNOTATION_REPLACES.to_string(), "v-c".to_string());
    let own = |new: &GalleonReplica| [on("a"), on("b"), lost.clone(), new.clone()];
    assert_eq!(
        next_at(700, &volume, &own(&new), &away),
        Repair::Wait(None),
        "it is being made"
    );
    new = ready(new);
    assert_eq!(next_at(700, &volume, &own(&new), &away), Repair::Add("v-d".to_string()));

    let mut added = volume_with(&["v-a", "v-b"], &[], &["v-c"]);
    let config = added.status.as_mut().and_then(|status| status.config.as_mut());
    let out = &mut config.expect("it is settled").out;
    out.insert("v-d".to_string(), OutReplica::default());
    assert!(matches!(
        next_at(700, &added, &own(&new), &away),
        Repair::Mark { out: true, .. }
    ));
    new = out_from(new, 700);
    assert_eq!(
        next_at(701, &added, &own(&new), &away),
        Repair::Wait(None),
        "the primary is to sync it"
    );
    let mut syncing = added.clone();
    let config = syncing.status.as_mut().and_then(|status| status.config.as_mut());
    config.expect("it is settled").syncing = names(&["v-d"]);
    assert_eq!(next_at(9000, &syncing, &own(&new), &away), Repair::Wait(None));

    let joined = volume_with(&["v-a", "v-b", "v-d"], &[], &["v-c"]);
    assert!(matches!(
        next_at(9000, &joined, &own(&new), &away),
        Repair::Mark { out: false, .. }
    ));
    assert_eq!(
        next_at(9000, &joined, &own(&on("d")), &away),
        Repair::GiveUp("v-c".to_string())
    );
    let done = volume_with(&["v-a", "v-b", "v-d"], &[], &[]);
    assert_eq!(
        next_at(9000, &done, &own(&on("d")), &away),
        Repair::Delete(names(&["v-c"]))
    );
    assert_eq!(
        next_at(9000, &done, &[on("a"), on("b"), deleting(lost), on("d")], &away),
        Repair::Wait(None)
    );
}

#[test]
fn if_the_lost_one_is_back_first_the_new_one_is_given_up() {
    let mut new = ready(one_of_several("v", "d", GIB));
    new.annotations_mut()
        .insert(ANNOTATION_REPLACES.to_string(), "v-c".to_string());
    let whole = volume_with(&["v-a", "v-b", "v-c"], &[], &[]);
    let own = [on("a"), on("b"), on("c"), new.clone()];
    assert_eq!(
        next_at(700, &whole, &own, &[]),
        Repair::Delete(names(&["v-d"])),
        "it was not added yet"
    );

    let beside = volume_with(&["v-a", "v-b", "v-c"], &[], &["v-d"]);
    let own = [on("a"), on("b"), on("c"), out_from(new, 700)];
    assert_eq!(next_at(701, &beside, &own, &[]), Repair::GiveUp("v-d".to_string()));
    assert_eq!(next_at(702, &whole, &own, &[]), Repair::Delete(names(&["v-d"])));
}

#[test]
fn one_that_was_given_up_is_never_taken_for_a_new_one() {
    let volume = volume_with(&["v-a"], &[], &["v-b"]);
    let mut given_up = out_from(on("c"), 0);
    given_up
        .annotations_mut()
        .insert(ANNOTATION_REPLACES.to_string(), "v-z".to_string());
    let own = [on("a"), out_from(on("b"), 0), given_up];
    assert_eq!(
        next_at(700, &volume, &own, &[("b", 0)]),
        Repair::Delete(names(&["v-c"]))
    );
}

#[test]
fn a_new_one_that_fails_or_whose_node_goes_away_makes_room_for_another() {
    let volume = volume_with(&["v-a", "v-b"], &[], &["v-c"]);
    let own = |new: GalleonReplica| [on("a"), on("b"), out_from(on("c"), 0), new];
    let away = [("c", 0), ("d", 650)];
    assert_eq!(
        next_at(700, &volume, &own(on("d")), &away),
        Repair::Delete(names(&["v-d"]))
    );
    let broken = failed(one_of_several("v", "e", GIB), reason::READ_ONLY, "mounted read-only");
    assert_eq!(
        next_at(700, &volume, &own(broken), &away),
        Repair::Delete(names(&["v-e"]))
    );
    let left = deleting(on("d"));
    assert_eq!(
        next_at(700, &volume, &own(left), &away),
        Repair::Replace("v-c".to_string())
    );
}

#[test]
fn what_a_person_deleted_is_replaced_at_once_if_it_is_out_and_never_while_it_is_in_sync() {
    let leaving = deleting(on("c"));
    let out = volume_with(&["v-a", "v-b"], &[], &["v-c"]);
    assert_eq!(
        next_at(0, &out, &[on("a"), on("b"), leaving.clone()], &[]),
        Repair::Replace("v-c".to_string())
    );
    assert_eq!(
        next_at(0, &out, &[on("a"), on("b")], &[]),
        Repair::Replace("v-c".to_string())
    );
    let in_sync = volume_with(&["v-a", "v-b", "v-c"], &[], &[]);
    assert_eq!(
        next_at(0, &in_sync, &[on("a"), on("b"), leaving], &[]),
        Repair::Wait(None)
    );
}

#[test]
fn two_that_are_lost_are_replaced_one_after_the_other() {
    let volume = volume_with(&["v-a"], &[], &["v-b", "v-c"]);
    let (b, c) = (out_from(on("b"), 0), out_from(on("c"), 10));
    let away = [("b", 0), ("c", 10)];
    assert_eq!(
        next_at(700, &volume, &[on("a"), b.clone(), c.clone()], &away),
        Repair::Replace("v-b".to_string())
    );
    let one = volume_with(&["v-a", "v-d"], &[], &["v-b", "v-c"]);
    let own = [on("a"), b, c.clone(), on("d")];
    assert_eq!(next_at(700, &one, &own, &away), Repair::GiveUp("v-b".to_string()));
    let then = volume_with(&["v-a", "v-d"], &[], &["v-c"]);
    assert_eq!(next_at(700, &then, &own, &away), Repair::Delete(names(&["v-b"])));
    assert_eq!(
        next_at(700, &then, &[on("a"), c, on("d")], &away),
        Repair::Replace("v-c".to_string())
    );
}

/// A volume with a primary that drops whoever is away and syncs whoever is not, in a cluster of six nodes, and the plans
/// above performed: a minute at a time.
struct Toy {
    volume: GalleonVolume,
    replicas: Vec<GalleonReplica>,
    away: Vec<(&'static str, i64)>,
    away_max: usize,
    /// Nodes whose disks are not to be trusted.
    failing: Vec<&'static str>,
    minute: i64,
    unchanged: (VolumeConfig, i64),
    made: usize,
    seed: u64,
}

/// Whether the one that is to leave is still in sync: then one more is wanted.
fn leaving_of(config: &VolumeConfig, told: Option<&String>) -> bool {
    told.is_some_and(|told| config.in_sync.contains(told))
}

const NODES: [&str; 6] = ["a", "b", "c", "d", "e", "f"];

impl Toy {
    fn new(seed: u64) -> Self {
        let volume = attached(volume_with(&["v-a", "v-b", "v-c"], &[], &[]));
        Self {
            unchanged: (volume.config().expect("it is settled").clone(), 0),
            volume,
            replicas: vec![on("a"), on("b"), on("c")],
            away: vec![],
            away_max: 3,
            failing: vec![],
            minute: 0,
            made: 0,
            seed,
        }
    }

    fn chance(&mut self, of: u64) -> bool {
        self.seed = self
            .seed
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        (self.seed >> 33).is_multiple_of(of)
    }

    fn config(&mut self) -> &mut VolumeConfig {
        let config = self.volume.status.as_mut().and_then(|status| status.config.as_mut());
        config.expect("it is settled")
    }

    fn is_away(&self, replica: &str) -> bool {
        let found = self.replicas.iter().find(|other| other.name_any() == replica);
        found.is_none_or(|replica| self.away.iter().any(|(node, _)| *node == replica.spec.node_name))
    }

    /// Whoever is to leave does when there is one more than are wanted.
    fn let_leave(&mut self) {
        let Some(leaving) = self.volume.spec.leaving.clone() else {
            return;
        };
        let config = self.config();
        if config.in_sync.contains(&leaving) && config.in_sync.len() > 3 {
            config.in_sync.retain(|other| *other != leaving);
            let had = OutReplica {
                epoch: 1,
                flushed_seq: 9,
            };
            config.out.insert(leaving, had);
        }
    }

    fn primary(&mut self) {
        self.let_leave();
        let told = self.volume.spec.leaving.clone();
        let members: Vec<String> = members(self.config()).cloned().collect();
        for name in members {
            let away = self.is_away(&name);
            let leaving = self
                .replicas
                .iter()
                .any(|other| other.name_any() == name && is_leaving(other));
            let slow = self.chance(3);
            let begun = leaving_of(self.config(), told.as_ref());
            // One after the other, and no more than are wanted.
            let enough = self.config().in_sync.len() >= 3 + usize::from(begun) || !self.config().syncing.is_empty();
            let config = self.config();
            let in_sync = config.in_sync.contains(&name);
            if in_sync && away && config.in_sync.len() > 1 {
                config.in_sync.retain(|other| *other != name);
                let had = OutReplica {
                    epoch: 1,
                    flushed_seq: 9,
                };
                config.out.insert(name, had);
            } else if config.syncing.contains(&name) {
                config.syncing.retain(|other| *other != name);
                if !away && !slow {
                    config.out.remove(&name);
                    config.in_sync.push(name);
                }
            } else if !in_sync && !away && !leaving && !slow && !enough {
                config.syncing.push(name);
            }
        }
    }

    fn repair(&mut self) -> bool {
        let now = self.volume.config().expect("it is settled").clone();
        if self.unchanged.0 != now {
            self.unchanged = (now, self.minute);
        }
        let standing = |node: &str| {
            let gone = self.away.iter().find(|(other, _)| *other == node);
            Standing {
                trouble: gone.map(|_| "is not ready".to_string()),
                since: gone.map(|(_, minute)| at(minute * MINUTE)),
                zone: None,
            }
        };
        let failing = self.failing.clone();
        let circumstances = Circumstances {
            now: at(self.minute * MINUTE),
            delay: DELAY,
            standing: &standing,
            failing: &|pool| failing.iter().any(|node| pool == format!("default.{node}")),
            unchanged_since: at(self.unchanged.1 * MINUTE),
        };
        let own: Vec<&GalleonReplica> = self.replicas.iter().collect();
        let next = next(&self.volume, &self.unchanged.0, &own, &circumstances);
        let stamp = at(self.minute * MINUTE).to_string();
        let minute = self.minute;
        let find = |replicas: &mut Vec<GalleonReplica>, name: &str| {
            let place = replicas.iter().position(|replica| replica.name_any() == name);
            place.unwrap_or_else(|| panic!("minute {minute}: there is no {name}"))
        };
        match next {
            Repair::Wait(_) => return false,
            Repair::Mark { replica, out } => {
                let place = find(&mut self.replicas, &replica);
                let marks = self.replicas[place].annotations_mut();
                match out {
                    true => drop(marks.insert(ANNOTATION_OUT_SINCE.to_string(), stamp)),
                    false => marks.clear(),
                }
            }
            Repair::GiveUp(name) => {
                let config = self.config();
                assert!(!config.in_sync.contains(&name) && !config.syncing.contains(&name));
                assert!(config.out.remove(&name).is_some(), "{name} is not out");
            }
            Repair::Add(name) => {
                let place = find(&mut self.replicas, &name);
                assert!(!is_leaving(&self.replicas[place]));
                let config = self.config();
                assert!(members(config).all(|member| *member != name));
                config.out.insert(name, OutReplica::default());
            }
            Repair::Delete(names) => {
                for name in names {
                    let place = find(&mut self.replicas, &name);
                    assert!(!is_named(&self.volume, &self.replicas[place]), "{name} is needed");
                    // Its node takes the data away when it is back; the object goes at once in this toy.
                    self.replicas.remove(place);
                }
            }
            Repair::Leave(replica) => {
                if let Some(replica) = &replica {
                    assert!(self.config().in_sync.contains(replica) && members(self.config()).count() > 3);
                }
                self.volume.spec.leaving = replica;
            }
            Repair::Replace(_) => {
                let free = NODES.iter().find(|node| {
                    !self.failing.contains(node)
                        && self.away.iter().all(|(other, _)| other != *node)
                        && self.replicas.iter().all(|replica| replica.spec.node_name != **node)
                });
                let Some(node) = free else { return false };
                self.made += 1;
                let mut new = on(node);
                new.metadata.name = Some(format!("v-{node}-{}", self.made));
                new.annotations_mut()
                    .insert(ANNOTATION_REPLACES.to_string(), String::new());
                self.replicas.push(new);
            }
        }
        true
    }

    fn pass(&mut self, faults: bool) {
        self.minute += 1;
        if faults {
            for node in NODES {
                let gone = self.away.iter().position(|(other, _)| *other == node);
                match gone {
                    Some(place) if self.chance(15) => {
                        self.away.remove(place);
                    }
                    None if self.chance(30) && self.away.len() < self.away_max => self.away.push((node, self.minute)),
                    _ => {}
                }
            }
        }
        self.primary();
        let before: BTreeSet<String> = self.config().in_sync.iter().cloned().collect();
        for action in 0.. {
            assert!(action < 50, "minute {}: it never comes to rest", self.minute);
            if !self.repair() {
                break;
            }
        }
        let after: BTreeSet<String> = self.config().in_sync.iter().cloned().collect();
        assert_eq!(before, after, "who is in sync is for the primary to say");
        let (minute, config) = (self.minute, self.config());
        assert!(members(config).count() <= 4, "minute {minute}: {config:?}");
    }
}

#[test]
fn whatever_nodes_do_the_copies_come_back_and_nobody_else_is_touched() {
    let mut made = 0;
    for seed in 0..200 {
        let mut toy = Toy::new(seed);
        for _ in 0..300 {
            toy.pass(true);
        }
        // Three of six nodes stay away at most, and one of three is not among those that have a copy.
        for _ in 0..100 {
            toy.pass(false);
        }
        made += toy.made;
        let away: Vec<&str> = toy.away.iter().map(|(node, _)| *node).collect();
        let config = toy.config().clone();
        assert!(
            (3..=4).contains(&config.in_sync.len()),
            "seed {seed}: {config:?}, {away:?} are away"
        );
        assert!(
            config.syncing.is_empty() && config.out.is_empty(),
            "seed {seed}: {config:?}"
        );
        assert_eq!(
            toy.replicas.len(),
            config.in_sync.len(),
            "seed {seed}: nothing is left over"
        );
    }
    assert!(made > 100, "{made} replacements are no test");
}

#[test]
fn a_replica_on_a_disk_that_fails_leaves_when_another_is_in_sync_and_not_before() {
    let next = |volume: &GalleonVolume, own: &[GalleonReplica]| next_with(0, volume, own, &[], &["c"]);
    let old = || Some("v-c".to_string());
    let new = || {
        let mut new = on("d");
        new.annotations_mut()
            .insert(ANNOTATION_REPLACES.to_string(), "v-c".to_string());
        new
    };
    let whole = volume_with(&["v-a", "v-b", "v-c"], &[], &[]);
    let three = [on("a"), on("b"), on("c")];
    assert_eq!(next(&whole, &three), Repair::Replace("v-c".to_string()));
    let four = [on("a"), on("b"), on("c"), new()];
    assert_eq!(next(&whole, &four), Repair::Add("v-d".to_string()));

    let added = volume_with(&["v-a", "v-b", "v-c"], &[], &["v-d"]);
    let mut marked = four.clone();
    marked[3] = out_from(new(), 0);
    assert_eq!(next(&added, &marked), Repair::Leave(old()));
    let told = |mut volume: GalleonVolume| {
        volume.spec.leaving = old();
        volume
    };
    assert_eq!(next(&told(added), &marked), Repair::Wait(None), "the primary is at it");
    let syncing = volume_with(&["v-a", "v-b", "v-c"], &["v-d"], &["v-d"]);
    assert_eq!(next(&told(syncing), &marked), Repair::Wait(None));
    // Both are in sync; then the primary lets the old one go.
    let both = volume_with(&["v-a", "v-b", "v-c", "v-d"], &[], &[]);
    assert_eq!(
        next(&told(both), &[on("a"), on("b"), on("c"), on("d")]),
        Repair::Wait(None)
    );
    let left = volume_with(&["v-a", "v-b", "v-d"], &[], &["v-c"]);
    let own = [on("a"), on("b"), out_from(on("c"), 0), on("d")];
    assert_eq!(next(&told(left.clone()), &own), Repair::Leave(None));
    assert_eq!(next(&left, &own), Repair::GiveUp("v-c".to_string()));
    let done = volume_with(&["v-a", "v-b", "v-d"], &[], &[]);
    assert_eq!(next(&done, &own), Repair::Delete(names(&["v-c"])));
    assert_eq!(next(&done, &[on("a"), on("b"), on("d")]), Repair::Wait(None));
}

#[test]
fn a_replica_that_is_out_on_a_disk_that_fails_is_replaced_without_delay() {
    let volume = volume_with(&["v-a", "v-b"], &[], &["v-c"]);
    let own = [on("a"), on("b"), out_from(on("c"), 0)];
    assert_eq!(next_with(1, &volume, &own, &[], &[]), Repair::Wait(None));
    let replace = Repair::Replace("v-c".to_string());
    assert_eq!(next_with(1, &volume, &own, &[], &["c"]), replace);
    // While one is missing nobody else leaves.
    assert_eq!(next_with(1, &volume, &own, &[], &["a"]), Repair::Wait(None));
}

#[test]
fn a_disk_that_is_trusted_again_stops_what_has_not_begun_and_not_what_has() {
    let mut added = volume_with(&["v-a", "v-b", "v-c"], &[], &["v-d"]);
    added.spec.leaving = Some("v-c".to_string());
    let own = [on("a"), on("b"), on("c"), out_from(on("d"), 0)];
    assert_eq!(next_at(0, &added, &own, &[]), Repair::Leave(None));
    added.spec.leaving = None;
    assert_eq!(next_at(0, &added, &own, &[]), Repair::GiveUp("v-d".to_string()));

    let mut syncing = volume_with(&["v-a", "v-b", "v-c"], &["v-d"], &["v-d"]);
    syncing.spec.leaving = Some("v-c".to_string());
    assert_eq!(next_at(0, &syncing, &own, &[]), Repair::Wait(None));
}

#[test]
fn disks_that_fail_are_emptied_whatever_nodes_do_and_no_copy_is_lost_for_it() {
    let mut made = 0;
    for seed in 0..200 {
        let mut toy = Toy::new(seed);
        toy.away_max = 2;
        for minute in 0..300 {
            if minute == 20 {
                toy.failing = vec![NODES[seed as usize % 3]];
            }
            toy.pass(true);
        }
        for _ in 0..100 {
            toy.pass(false);
        }
        made += toy.made;
        let (config, failing) = (toy.config().clone(), toy.failing.clone());
        let away: Vec<&str> = toy.away.iter().map(|(node, _)| *node).collect();
        let there: Vec<&str> = toy
            .replicas
            .iter()
            .map(|replica| replica.spec.node_name.as_str())
            .collect();
        assert!(
            config.in_sync.len() == 3 && config.syncing.is_empty() && config.out.is_empty(),
            "seed {seed}: {config:?}, {away:?} are away"
        );
        assert!(
            there.len() == 3 && !there.contains(&failing[0]),
            "seed {seed}: {there:?} and {failing:?}"
        );
        assert_eq!(toy.volume.spec.leaving, None, "seed {seed}");
    }
    assert!(made > 200, "{made} replacements are no test");
}

/// Without faults: from the first moment to the last there are three copies in sync.
#[test]
fn emptying_a_disk_takes_no_copy_before_there_is_another() {
    let mut toy = Toy::new(7);
    toy.failing = vec!["a"];
    for _ in 0..60 {
        toy.pass(false);
        assert!(toy.config().in_sync.len() >= 3, "minute {}", toy.minute);
    }
    assert!(toy.replicas.iter().all(|replica| replica.spec.node_name != "a"));
}
