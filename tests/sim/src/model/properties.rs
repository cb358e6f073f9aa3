//! What must hold in every state, and what must happen in some.

use stateright::Property;

use super::state::{Phase, Primary, State, bits};
use super::{Bounds, Model};

/// The invariants, by their numbers.
pub fn always() -> Vec<Property<Model>> {
    vec![
        Property::always("I1 the epoch in the API object never falls", |_, state: &State| {
            state.primaries.iter().all(|it| it.epoch <= state.api.epoch)
        }),
        Property::always("I2 a promise is for ever", |_, state: &State| {
            let kept = |it: &Primary| {
                it.promised
                    .iter()
                    .all(|replica| state.replicas[replica].promised >= it.epoch)
            };
            state.primaries.iter().all(kept)
        }),
        Property::always("I3 one incarnation completes writes in an epoch", |_, state: &State| {
            intact(state, 3)
        }),
        Property::always(
            "I4 a completed write is in the log of every possible member",
            |_, state: &State| intact(state, 4),
        ),
        Property::always(
            "I5 a flushed write is on stable storage of every member",
            |_, state: &State| {
                state.api.in_sync.iter().all(|replica| {
                    let it = &state.replicas[replica];
                    bits(state.flushed).all(|write| state.holds(&it.log, it.durable, write))
                })
            },
        ),
        Property::always("I6 whoever missed a completed write is out", |_, state: &State| {
            state.api.in_sync.iter().all(|replica| {
                let it = &state.replicas[replica];
                it.cut || bits(state.completed & !state.excused).all(|write| state.holds(&it.log, it.log.len(), write))
            })
        }),
        Property::always(
            "I7 a replica is let in when its copy is flushed and whole",
            |_, state: &State| intact(state, 7),
        ),
        Property::always(
            "I8 promoted are members of the recorded in-sync set",
            |_, state: &State| intact(state, 8),
        ),
        Property::always(
            "I9 a write completes with the minimum of members",
            |_, state: &State| intact(state, 9),
        ),
        Property::always(
            "I10 members have no gaps, and equal versions are equal writes",
            |model, state: &State| gapless(model, state) && unambiguous(model, state),
        ),
        Property::always(
            "I11 nothing beyond the end of its epoch is served",
            |_, state: &State| intact(state, 11),
        ),
        Property::always(
            "I12 reads see every completed write, and are never taken back",
            |_, state: &State| intact(state, 12),
        ),
        Property::always(
            "I13 what a deposed primary left takes effect before the next one reads, or never",
            |_, state: &State| intact(state, 13),
        ),
    ]
}

fn intact(state: &State, invariant: u8) -> bool {
    state.broken & 1 << invariant == 0
}

/// A member has everything up to where its log ends.
fn gapless(_: &Model, state: &State) -> bool {
    state.api.in_sync.iter().all(|replica| {
        let it = &state.replicas[replica];
        let position = state.position(&it.log);
        let counts = |write: &u8| {
            let version = state.version(*write);
            let end = it.ends[usize::from(version.epoch)];
            version <= position && (end == 0 || version.seq < end)
        };
        (0..state.issued)
            .filter(counts)
            .all(|write| state.holds(&it.log, it.log.len(), write))
    })
}

fn unambiguous(model: &Model, state: &State) -> bool {
    let logged = |write: &u8| (0..model.bounds.replicas).any(|replica| state.replicas[replica].log.contains(*write));
    let all: Vec<u8> = (0..state.issued).filter(logged).collect();
    all.iter().all(|&one| {
        all.iter()
            .all(|&other| one == other || state.version(one) != state.version(other))
    })
}

/// Rare situations that the search must have been in, or it has shown nothing about them.
pub fn sometimes(bounds: &Bounds) -> Vec<Property<Model>> {
    let mut all = Vec::new();
    let cuts = bounds.power_cuts > 0;
    if bounds.primaries > 1 {
        all.extend(takeovers());
    }
    if bounds.requests > 1 && bounds.resyncs > 0 {
        all.push(Property::sometimes(
            "two changes are on their way at a time",
            |_, state: &State| state.primaries.iter().any(|it| it.queued.len() > 1),
        ));
    }
    if bounds.resyncs > 0 {
        all.extend(resyncs(bounds));
    }
    if cuts {
        all.extend(power_cuts(bounds));
    }
    all
}

fn takeovers() -> Vec<Property<Model>> {
    vec![
        Property::sometimes("a deposed primary holds a write that all have", |_, state: &State| {
            state.primaries.iter().enumerate().any(|(primary, it)| {
                let deposed = it.phase == Phase::Serving && usize::from(state.api.primary) != primary;
                deposed && it.completed < it.issued && it.known.iter().all(|replica| it.acked[replica] > it.completed)
            })
        }),
        Property::sometimes(
            "a deposed primary completes a write while its successor serves",
            |_, state: &State| {
                let serves = state.primaries[usize::from(state.api.primary)].phase == Phase::Serving;
                let deposed = |it: &Primary| it.phase == Phase::Serving && it.epoch < state.api.epoch;
                serves && state.primaries.iter().any(|it| deposed(it) && it.completed > 0)
            },
        ),
        Property::sometimes(
            "a change was made, its primary does not know and holds a write",
            |_, state: &State| serving(state, |it| it.won.is_some() && it.completed < it.issued),
        ),
        Property::sometimes(
            "a write that no guest was told of is kept by the next primary",
            |_, state: &State| serving(state, |it| bits(it.kept & !state.completed).next().is_some()),
        ),
        Property::sometimes(
            "a write that no guest was told of is dropped by the next primary",
            |_, state: &State| {
                serving(state, |it| {
                    let older = |write: &u8| state.version(*write).epoch < it.epoch;
                    (0..state.issued).filter(older).any(|write| it.kept & 1 << write == 0)
                })
            },
        ),
        Property::sometimes("a primary that resumes a guest serves", |_, state: &State| {
            serving(state, |it| it.resumed)
        }),
    ]
}

fn power_cuts(bounds: &Bounds) -> Vec<Property<Model>> {
    let lost = Property::sometimes(
        "a member lost a completed write with its power, and others have it",
        |_, state: &State| {
            let lost = |replica: usize| {
                let it = &state.replicas[replica];
                bits(state.completed & !state.excused).any(|write| !state.holds(&it.log, it.log.len(), write))
            };
            state.api.in_sync.len() > 1 && state.api.in_sync.iter().any(lost)
        },
    );
    let all = Property::sometimes(
        "power cuts of all members lose a write that was completed",
        |_, state: &State| state.excused & state.completed != 0,
    );
    if bounds.primaries > 1 && bounds.min_in_sync == 1 {
        vec![lost, all]
    } else {
        vec![lost]
    }
}

/// What takes a replica to leave and come back.
fn resyncs(bounds: &Bounds) -> Vec<Property<Model>> {
    let mut all = vec![
        Property::sometimes(
            "a write is completed without the replica that is copied to",
            |_, state: &State| {
                serving(state, |it| {
                    it.session
                        .is_some_and(|to| it.completed >= to.base && it.acked[usize::from(to.replica)] < it.completed)
                })
            },
        ),
        Property::sometimes("a copy arrives beside live writes", |_, state: &State| {
            serving(state, |it| {
                it.session
                    .is_some_and(|to| to.copied != 0 && state.replicas[usize::from(to.replica)].next > to.base)
            })
        }),
        Property::sometimes("a copy runs ahead of the live writes", |_, state: &State| {
            serving(state, |it| {
                it.session
                    .is_some_and(|to| to.carried >= state.replicas[usize::from(to.replica)].next)
            })
        }),
        Property::sometimes(
            "a replica that was out is a member again, and has a write",
            |model: &Model, state: &State| {
                let again = |it: &Primary| it.session.is_none() && it.known == state.api.in_sync;
                state.resyncs > 0 && state.completed != 0 && state.api.in_sync == model.all() && serving(state, again)
            },
        ),
        Property::sometimes("it is not known whether a replica was let in", |_, state: &State| {
            serving(state, |it| {
                it.session
                    .is_some_and(|to| it.members().contains(usize::from(to.replica)))
            })
        }),
    ];
    if bounds.primaries > 1 {
        all.push(Property::sometimes(
            "a replica comes back with a write that the new epoch dropped",
            |_, state: &State| {
                serving(state, |it| {
                    let dropped = |write: u8| it.epoch > state.version(write).epoch && it.kept & 1 << write == 0;
                    let held = |write: u8| state.replicas.iter().any(|replica| replica.log.contains(write));
                    state.resyncs == 0 && (0..state.issued).any(|write| dropped(write) && held(write))
                })
            },
        ));
    }
    all
}

fn serving(state: &State, it: impl Fn(&Primary) -> bool) -> bool {
    state
        .primaries
        .iter()
        .any(|primary| primary.phase == Phase::Serving && it(primary))
}
