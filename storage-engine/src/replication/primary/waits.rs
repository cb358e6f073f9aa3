//! What a primary waits for, in words for a person who wonders why nothing goes on.

use std::collections::BTreeSet;

use super::super::concern::Lack;
use super::super::timing::MEMBER_TIMEOUT_MS;
use super::super::{Change, ReplicaId};
use super::member::Standing;
use super::{Phase, Primary};

/// Nobody is told of what takes less.
const NOTICED_MS: u64 = MEMBER_TIMEOUT_MS;

impl Primary {
    /// What it waits for, if anything for longer than a moment. The text stays the same as long as the reason does.
    pub fn waits_for(&self) -> Option<String> {
        if self.is_over() {
            return None;
        }
        if let Some(making) = &self.making
            && self.now_ms >= making.since_ms + NOTICED_MS
        {
            let what = match &making.change {
                Change::Claim(_) => "that a new epoch begins".into(),
                Change::Drop(gone, _) => format!("that {} missed a write", names(gone)),
                Change::Sync(id) => format!("that {id:?} is catching up"),
                Change::Join(id) => format!("that {id:?} is in sync"),
                Change::Release => "that nobody serves the volume".into(),
            };
            return Some(format!("the configuration cannot be written: it is to say {what}"));
        }
        match self.phase {
            Phase::Serving => self.serving_waits_for(),
            Phase::Claiming | Phase::Releasing | Phase::Released | Phase::Deposed => None,
            Phase::Promising(_) => self.beginning_waits_for(Standing::Promised),
            Phase::Trimming(_) => self.beginning_waits_for(Standing::Trimmed),
            Phase::Equalising(_) => {
                let late = !self.late().is_empty();
                late.then(|| "an epoch begins: replicas are given what they lack".into())
            }
            Phase::Settling => self.beginning_waits_for(Standing::Settled),
        }
    }

    /// Who has not got as far as all are to get now.
    fn beginning_waits_for(&self, wanted: Standing) -> Option<String> {
        let mut late = self.late();
        if let Some(failed) = self.failed_among(&late) {
            return Some(format!("an epoch begins: {failed}"));
        }
        late.retain(|id| self.members.get(id).is_none_or(|member| member.standing != wanted));
        let heard = |id: &&ReplicaId| {
            let heard_ms = self.members.get(*id).and_then(|member| member.promising_ms);
            heard_ms.is_some_and(|heard_ms| self.now_ms < heard_ms + MEMBER_TIMEOUT_MS)
        };
        if late.is_empty() {
            return None;
        }
        if late.iter().all(|id| heard(&id)) {
            let text = "an epoch begins: {} waits until nobody can be reading in an older one";
            return Some(text.replace("{}", &names(&late)));
        }
        late.retain(|id| !heard(&id));
        let few = self.too_few_without(&late);
        Some(format!(
            "an epoch begins: {} has not answered for 2 s{few}",
            names(&late)
        ))
    }

    fn serving_waits_for(&self) -> Option<String> {
        let there = || names(&self.config.in_sync);
        match self.options.concern.lacks(&self.config.in_sync, &self.zones) {
            Some(Lack::Members(min)) => return Some(format!("fewer than {min} replicas in sync: only {}", there())),
            Some(Lack::Zones(min)) => {
                return Some(format!(
                    "replicas in sync stand in fewer than {min} zones: only {}",
                    there()
                ));
            }
            None => {}
        }
        let late = self.late();
        if !late.is_empty() {
            let few = self.too_few_without(&late);
            let failed = self.failed_among(&late);
            return Some(failed.unwrap_or_else(|| format!("{} has not answered for 2 s{few}", names(&late))));
        }
        if self.now_ms < self.moved_ms + NOTICED_MS {
            return None;
        }
        let behind = |id: &ReplicaId| {
            let member = self.members.get(id);
            member.is_none_or(|member| member.acked < self.assigned)
        };
        let behind: Vec<ReplicaId> = self.ack_set().filter(behind).collect();
        Some(if behind.is_empty() {
            "replicas take long to answer".into()
        } else {
            format!("{} does not have the last writes yet", names(&behind))
        })
    }

    /// Who of these can do nothing any more, and why.
    fn failed_among(&self, late: &BTreeSet<ReplicaId>) -> Option<String> {
        let failed = |id: &ReplicaId| Some((*id, self.members.get(id)?.failed.as_ref()?));
        let (id, why) = late.iter().find_map(failed)?;
        Some(format!("{id:?} has failed: {why}{}", self.too_few_without(late)))
    }

    fn too_few_without(&self, gone: &BTreeSet<ReplicaId>) -> String {
        let left = self.config.in_sync.difference(gone).copied().collect();
        match self.options.concern.lacks(&left, &self.zones) {
            Some(Lack::Members(min)) => format!(", and without it fewer than {min} would be left"),
            Some(Lack::Zones(min)) => format!(", and without it the others would stand in fewer than {min} zones"),
            None => String::new(),
        }
    }

    /// Remembers since when requests wait without any of them being completed.
    pub(super) fn note_standstill(&mut self) {
        let waits = self.written < self.assigned || self.flush_to > self.agreed || !self.no_reads();
        if !waits {
            self.moved_ms = self.now_ms;
        }
    }
}

fn names<'a>(ids: impl IntoIterator<Item = &'a ReplicaId>) -> String {
    let names: Vec<String> = ids.into_iter().map(|id| format!("{id:?}")).collect();
    names.join(" and ")
}
