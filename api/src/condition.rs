//! Conditions, shaped like `metav1.Condition`, and the one way to change them.
//!
//! A condition is written when something changed and left alone otherwise; [`set`] says which it was, so that the
//! caller can skip the write. That rule is what keeps an idle cluster from writing to the API server.

use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// One aspect of an object's state.
#[derive(Clone, Debug, Deserialize, Eq, JsonSchema, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Condition {
    /// What this is about, in CamelCase.
    #[serde(rename = "type")]
    #[schemars(length(min = 1, max = 316))]
    pub type_: String,
    /// True, False or Unknown.
    pub status: ConditionStatus,
    /// The generation of the object that this was said about.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub observed_generation: Option<i64>,
    /// When `status` last changed.
    #[schemars(schema_with = "crate::schema::date_time")]
    pub last_transition_time: Time,
    /// Why, as one CamelCase word.
    #[schemars(length(min = 1, max = 1024))]
    pub reason: String,
    /// Why, as a sentence: what was found, and what to do about it.
    #[schemars(length(max = 32768))]
    pub message: String,
}

/// Truth of a condition.
#[derive(Clone, Copy, Debug, Deserialize, Eq, JsonSchema, PartialEq, Serialize)]
pub enum ConditionStatus {
    True,
    False,
    Unknown,
}

impl From<bool> for ConditionStatus {
    fn from(value: bool) -> Self {
        if value { Self::True } else { Self::False }
    }
}

impl Condition {
    /// A condition that has just come to be so. [`set`] keeps the older time if the status is not new.
    pub fn new(type_: &str, status: impl Into<ConditionStatus>, reason: &str, message: impl Into<String>) -> Self {
        Self {
            type_: type_.to_string(),
            status: status.into(),
            observed_generation: None,
            last_transition_time: now(),
            reason: reason.to_string(),
            message: message.into(),
        }
    }

    /// Whether the condition holds.
    pub fn is_true(&self) -> bool {
        self.status == ConditionStatus::True
    }
}

/// The time of day, in the precision that survives a round trip through the API server.
pub fn now() -> Time {
    let now = k8s_openapi::jiff::Timestamp::now();
    Time(k8s_openapi::jiff::Timestamp::from_second(now.as_second()).unwrap_or(now))
}

/// Puts `new` in the place of the condition of the same type and returns whether anything a reader would notice changed.
/// The transition time moves only with the status.
pub fn set(conditions: &mut Vec<Condition>, mut new: Condition) -> bool {
    let Some(old) = conditions.iter_mut().find(|old| old.type_ == new.type_) else {
        conditions.push(new);
        return true;
    };
    if old.status == new.status {
        new.last_transition_time = old.last_transition_time.clone();
    }
    let changed = *old != new;
    if changed {
        *old = new;
    }
    changed
}

/// Looks a condition up by type.
pub fn get<'a>(conditions: &'a [Condition], type_: &str) -> Option<&'a Condition> {
    conditions.iter().find(|condition| condition.type_ == type_)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(second: i64, condition: Condition) -> Condition {
        let time = k8s_openapi::jiff::Timestamp::from_second(second).expect("a small number of seconds");
        Condition {
            last_transition_time: Time(time),
            ..condition
        }
    }

    #[test]
    fn setting_the_same_condition_again_changes_nothing() {
        let mut conditions = vec![];
        assert!(set(
            &mut conditions,
            at(1, Condition::new("Ready", true, "Ready", "fine"))
        ));
        assert!(!set(
            &mut conditions,
            at(9, Condition::new("Ready", true, "Ready", "fine"))
        ));
        assert_eq!(conditions[0].last_transition_time.0.as_second(), 1);
    }

    #[test]
    fn a_new_message_keeps_the_transition_time() {
        let mut conditions = vec![at(1, Condition::new("Ready", false, "DiskFull", "0 bytes left"))];
        assert!(set(
            &mut conditions,
            at(9, Condition::new("Ready", false, "DiskFull", "10 bytes left"))
        ));
        assert_eq!(conditions[0].last_transition_time.0.as_second(), 1);
        assert_eq!(conditions[0].message, "10 bytes left");
    }

    #[test]
    fn a_new_status_moves_the_transition_time() {
        let mut conditions = vec![at(1, Condition::new("Ready", false, "DiskFull", ""))];
        assert!(set(&mut conditions, at(9, Condition::new("Ready", true, "Ready", ""))));
        assert_eq!(conditions.len(), 1);
        assert_eq!(conditions[0].last_transition_time.0.as_second(), 9);
    }

    #[test]
    fn conditions_of_other_types_are_left_alone() {
        let mut conditions = vec![at(1, Condition::new("Attached", true, "Ready", ""))];
        assert!(set(&mut conditions, Condition::new("Ready", true, "Ready", "")));
        assert_eq!(conditions.len(), 2);
        assert!(get(&conditions, "Attached").is_some_and(Condition::is_true));
        assert!(get(&conditions, "Sized").is_none());
    }

    #[test]
    fn a_condition_is_written_as_kubernetes_writes_its_own() {
        let written = serde_json::to_value(at(0, Condition::new("Ready", true, "Ready", ""))).expect("plain data");
        assert_eq!(written["type"], "Ready");
        assert_eq!(written["status"], "True");
        assert_eq!(written["lastTransitionTime"], "1970-01-01T00:00:00Z");
    }
}
