//! The checker of histories is itself checked, with good ones and with bad ones.

mod by_hand;
mod mutations;
mod reference;

use std::collections::BTreeMap;

use by_hand::{BAD, GOOD};
use galleonfs_sim::history::{Call, History, Item, Rule, Value, check};
use mutations::{Bad, KINDS, inserted};
use reference::{Chance, history};

fn parsed(name: &str, text: &str) -> History {
    History::parse(text).unwrap_or_else(|fault| panic!("{name}: {fault}"))
}

#[test]
fn what_a_disk_may_do_is_accepted() {
    for (name, text) in GOOD {
        if let Err(fault) = check(&parsed(name, text)) {
            panic!("{name}: {fault}");
        }
    }
}

#[test]
fn what_no_disk_does_is_found_with_its_rule() {
    for (name, rule, text) in BAD {
        match check(&parsed(name, text)) {
            Ok(_) => panic!("{name}: nothing was found"),
            Err(fault) => assert_eq!(fault.rule, *rule, "{name}: {fault}"),
        }
    }
}

/// What is found says where: the items are named in order, with what they say.
#[test]
fn a_violation_names_its_items_in_order() {
    let text = "1 write 7 1\n1 ok\n2 write 7 2\n2 ok\n3 read 7\n3 ok 1\n";
    let fault = check(&parsed("a stale read", text)).expect_err("the read is stale");
    let shown = fault.to_string();
    assert!(shown.starts_with("rule a, block 7: "), "{shown}");
    assert!(
        shown.contains("item 3: 2 ok") && shown.contains("item 5: 3 ok 1"),
        "{shown}"
    );
    assert!(fault.items.is_sorted_by_key(|(at, _)| *at), "{shown}");
}

#[test]
fn two_hundred_lives_of_a_reference_disk_are_accepted() {
    let mut operations = 0;
    for seed in 0..200 {
        let history = history(seed);
        match check(&history) {
            Ok(summary) => {
                assert!(
                    summary.undecided.is_empty(),
                    "seed {seed}: undecided: {:?}",
                    summary.undecided
                );
                operations += summary.operations;
            }
            Err(fault) => panic!("seed {seed}: {fault}\n{history}"),
        }
        let again = parsed("what was printed", &history.to_string());
        assert_eq!(again, history, "seed {seed}: a history survives being written down");
    }
    assert!(operations > 8_000, "only {operations} operations");
}

/// What is good stays good beside other blocks' troubles, and what is bad does not hide among them.
#[test]
fn histories_within_histories_are_judged_as_they_are_alone() {
    for seed in 0..60 {
        let mut chance = Chance(seed);
        let (name, text) = GOOD[chance.below(GOOD.len())];
        let good = inserted(&history(seed), &parsed(name, text), &mut chance);
        if let Err(fault) = check(&good) {
            panic!("seed {seed}, {name}: {fault}\n{good}");
        }
    }
    for seed in 0..200 {
        let mut chance = Chance(seed);
        let (name, rule, text) = BAD[chance.below(BAD.len())];
        if rule == Rule::Record {
            continue;
        }
        let bad = inserted(&history(seed), &parsed(name, text), &mut chance);
        match check(&bad) {
            Ok(_) => panic!("seed {seed}, {name}: nothing was found in\n{bad}"),
            Err(fault) => assert_eq!(fault.rule, rule, "seed {seed}, {name}: {fault}"),
        }
    }
}

#[test]
fn each_change_for_the_worse_is_found() {
    let mut found: BTreeMap<&str, usize> = BTreeMap::new();
    for seed in 0..300 {
        let good = history(seed);
        for (name, kind) in KINDS {
            let Some(Bad { history, rules }) = kind(&good, &mut Chance(seed)) else {
                continue;
            };
            match check(&history) {
                Ok(_) => panic!("seed {seed}, {name}: nothing was found in\n{history}"),
                Err(fault) => assert!(rules.contains(&fault.rule), "seed {seed}, {name}: {fault}"),
            }
            *found.entry(name).or_default() += 1;
        }
    }
    println!("{found:?}");
    for (name, _) in KINDS {
        assert!(
            found.get(name).is_some_and(|&count| count >= 25),
            "{name}: too few of {found:?}"
        );
    }
}

#[test]
fn a_line_that_says_nothing_is_refused_with_its_number() {
    for (text, line) in [
        ("crash\n1 wirte 7 1\n", 2),
        ("1 read\n", 1),
        ("\n# x\n1 ok seven", 3),
        ("copy 1 2 3 4", 1),
        ("9", 1),
    ] {
        let fault = History::parse(text).expect_err("that is no history");
        assert_eq!(fault.line, line, "{fault}");
    }
}

/// The work grows with the square of what happens to one block, not with the number of its orders.
#[test]
fn a_hundred_thousand_operations_at_a_depth_of_sixteen_are_judged() {
    let (blocks, depth) = (64, 16);
    let mut items = Vec::new();
    for round in 0..100_000 / (2 * depth) {
        let block = round % blocks;
        let writes = (1..=depth).map(|at| round * depth + at);
        let begin = |op: u64, call: Call| Item::Invoke { op, call };
        items.extend(
            writes
                .clone()
                .map(|id| begin(id, Call::Write { block, id, fua: false })),
        );
        items.extend(writes.clone().map(|op| Item::Ok { op, value: None }));
        // Reads see the writes in any order that is the same for all: here the one that ended first was first.
        let reads = writes.map(|id| (id + 1_000_000, id)).collect::<Vec<_>>();
        let last = reads.last().expect("there are some").1;
        items.extend(reads.iter().map(|&(op, _)| begin(op, Call::Read { block })));
        items.extend(reads.iter().map(|&(op, _)| Item::Ok {
            op,
            value: Some(Value::Write(last)),
        }));
    }
    let good = History { items };
    let summary = check(&good).unwrap_or_else(|fault| panic!("{fault}"));
    assert!(
        summary.operations > 99_000 && summary.undecided.is_empty(),
        "{summary:?}"
    );
    // The very last read shows another of the last writes than its neighbours.
    let mut bad = good;
    let last = bad.items.last_mut().expect("there are items");
    let Item::Ok {
        value: Some(Value::Write(id)),
        ..
    } = last
    else {
        panic!("{last} is no read")
    };
    *id -= depth;
    assert!(check(&bad).is_err());
}
