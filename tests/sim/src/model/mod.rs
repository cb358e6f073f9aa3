//! The protocol of `docs/replication.md`, small enough to try every order of events.
//!
//! One volume, up to three replicas, a few engine starts and writes. Processes die, replicas lose power, changes of the
//! API object are lost, late, or made without anybody hearing of it, messages come in any order or not at all. In every
//! state that can be reached the invariants must hold, and the rare situations that the protocol is made for must have
//! been among these states. A [`Mutant`] leaves out one rule; each must break an invariant.
//!
//! The state keeps only what matters to somebody's next step ([`events`], [`step`]); what guests have been told and shown is kept
//! beside it to be judged ([`observe`]).

mod events;
mod mutant;
mod observe;
mod properties;
mod set;
mod state;
mod step;

pub use mutant::Mutant;
pub use set::{REPLICAS, Set, Sets};
pub use state::{Primary, Replica, State};
pub use step::Action;

use state::{Api, BLOCKS, Phase, WRITES};
use stateright::Property;

/// How much may happen.
#[derive(Clone, Copy, Debug)]
pub struct Bounds {
    /// Replicas of the volume, all in sync at the begin.
    pub replicas: usize,
    /// Engine starts, with the one that serves at the begin.
    pub primaries: usize,
    /// Writes of all guests together.
    pub writes: u8,
    /// The block that each of them goes to.
    pub blocks: [u8; WRITES],
    pub power_cuts: u8,
    /// Resyncs that begin.
    pub resyncs: u8,
    /// Changes of the object that one primary may have on their way.
    pub requests: usize,
    pub flushes: bool,
    pub min_in_sync: usize,
}

/// The protocol, or a mutant of it, within bounds.
#[derive(Clone, Debug)]
pub struct Model {
    pub bounds: Bounds,
    pub mutant: Option<Mutant>,
}

impl Model {
    fn has(&self, mutant: Mutant) -> bool {
        self.mutant == Some(mutant)
    }

    fn all(&self) -> Set {
        Set::first(self.bounds.replicas)
    }

    /// Blocks that any write goes to.
    fn blocks(&self) -> usize {
        let used = &self.bounds.blocks[..usize::from(self.bounds.writes)];
        used.iter()
            .map(|&block| usize::from(block) + 1)
            .max()
            .unwrap_or(0)
            .min(BLOCKS)
    }

    /// A primary serves and has promises of all.
    fn begin(&self) -> State {
        let everybody = self.all();
        let mut primaries = [Primary::default(); state::PRIMARIES];
        primaries[0] = Primary {
            phase: Phase::Serving,
            epoch: 1,
            found: everybody,
            known: everybody,
            promised: everybody,
            ..Primary::default()
        };
        let mut replicas = [Replica::default(); REPLICAS];
        for replica in &mut replicas[..self.bounds.replicas] {
            (
                replica.promised,
                replica.promised_durable,
                replica.next,
                replica.complete,
            ) = (1, 1, 1, true);
        }
        State {
            api: Api {
                epoch: 1,
                primary: 0,
                in_sync: everybody,
            },
            primaries,
            replicas,
            writes: Default::default(),
            issued: 0,
            completed: 0,
            flushed: 0,
            excused: 0,
            seen: Default::default(),
            completer: Default::default(),
            broken: 0,
            power_cuts: 0,
            resyncs: 0,
        }
    }
}

impl stateright::Model for Model {
    type State = State;
    type Action = Action;

    fn init_states(&self) -> Vec<State> {
        vec![self.begin()]
    }

    fn actions(&self, state: &State, actions: &mut Vec<Action>) {
        self.enabled(state, actions);
    }

    fn next_state(&self, state: &State, action: Action) -> Option<State> {
        let next = self.after(state, action);
        (next != *state).then_some(next)
    }

    fn properties(&self) -> Vec<Property<Self>> {
        let mut properties = properties::always();
        if self.mutant.is_none() {
            properties.extend(properties::sometimes(&self.bounds));
        }
        properties
    }
}
