//! The table of volumes: one row each, changed by the registry room, waited on by the CSI room.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

use tokio::sync::watch;
use tokio::time::Instant;

use super::Device;

/// How a volume stands on this node.
///
/// ```text
///          attachTo names this node            the engine is up
/// (no row) ───────────────────────▶ Coming ───────────────────▶ Here
///                                    │  ▲                         │
///                             failed ▼  │ tried again             │ released, or the engine died
///                                  Failed ◀──────────────────────┘
/// ```
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Presence {
    /// Wanted here and on its way.
    Coming,
    /// Its device works.
    Here(Device),
    /// It could not be brought up; the text says why and what to do. It is tried again.
    Failed(String),
}

/// How waiting for a device ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Waited {
    Device(Device),
    Failed(String),
    /// The deadline passed with the volume on its way.
    StillComing,
    /// The deadline passed and the volume is not wanted here.
    Absent,
}

/// The table. Cheap to clone; all clones are one table.
#[derive(Debug, Clone)]
pub struct Served {
    rows: Arc<Mutex<HashMap<String, Presence>>>,
    /// Counts changes; whoever waits looks at its row again. Volumes come and go rarely, so one bell for all is enough.
    bell: Arc<watch::Sender<u64>>,
}

impl Default for Served {
    fn default() -> Served {
        Served {
            rows: Arc::default(),
            bell: Arc::new(watch::Sender::new(0)),
        }
    }
}

impl Served {
    /// Sets or (with `None`) removes a row.
    pub fn set(&self, volume: &str, presence: Option<Presence>) {
        let mut rows = self.rows.lock().unwrap_or_else(PoisonError::into_inner);
        let before = match presence {
            Some(presence) => rows
                .insert(volume.to_owned(), presence.clone())
                .filter(|old| *old == presence),
            None => {
                rows.remove(volume);
                None
            }
        };
        drop(rows);
        if before.is_none() {
            self.bell.send_modify(|count| *count += 1);
        }
    }

    pub fn get(&self, volume: &str) -> Option<Presence> {
        self.rows
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .get(volume)
            .cloned()
    }

    /// The device, if the volume is here.
    pub fn device(&self, volume: &str) -> Option<Device> {
        match self.get(volume)? {
            Presence::Here(device) => Some(device),
            Presence::Coming | Presence::Failed(_) => None,
        }
    }

    /// How many volumes are here, on their way, failed: a metric.
    pub fn counts(&self) -> (usize, usize, usize) {
        let rows = self.rows.lock().unwrap_or_else(PoisonError::into_inner);
        rows.values().fold((0, 0, 0), |(here, coming, failed), row| match row {
            Presence::Here(_) => (here + 1, coming, failed),
            Presence::Coming => (here, coming + 1, failed),
            Presence::Failed(_) => (here, coming, failed + 1),
        })
    }

    /// Waits until the volume's device is there and `enough` says yes to it. A failure is told at once: the caller's
    /// caller shows it to a person and tries again.
    pub async fn wait(&self, volume: &str, deadline: Instant, enough: impl Fn(&Device) -> bool) -> Waited {
        let mut bell = self.bell.subscribe();
        loop {
            bell.mark_unchanged();
            let row = self.get(volume);
            match &row {
                Some(Presence::Here(device)) if enough(device) => return Waited::Device(device.clone()),
                Some(Presence::Failed(why)) => return Waited::Failed(why.clone()),
                Some(Presence::Here(_) | Presence::Coming) | None => {}
            }
            // The sender lives as long as this table, so the only way to end is a change or the deadline.
            if tokio::time::timeout_at(deadline, bell.changed()).await.is_err() {
                return if row.is_some() {
                    Waited::StillComing
                } else {
                    Waited::Absent
                };
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    fn device(size_bytes: u64) -> Device {
        Device {
            path: "/dev/loop0".into(),
            size_bytes,
            frontend: "fake",
        }
    }

    #[tokio::test]
    async fn a_waiter_is_woken_by_the_device_it_waits_for() {
        let served = Served::default();
        let waiter = served.clone();
        let deadline = Instant::now() + Duration::from_secs(60);
        let waiting = tokio::spawn(async move { waiter.wait("v", deadline, |device| device.size_bytes >= 2).await });
        tokio::task::yield_now().await;
        served.set("v", Some(Presence::Coming));
        served.set("other", Some(Presence::Here(device(9))));
        served.set("v", Some(Presence::Here(device(1))));
        tokio::task::yield_now().await;
        assert!(!waiting.is_finished());
        served.set("v", Some(Presence::Here(device(2))));
        assert_eq!(waiting.await.unwrap(), Waited::Device(device(2)));
    }

    #[tokio::test]
    async fn a_failure_is_told_at_once_and_a_deadline_says_how_far_it_got() {
        let served = Served::default();
        let now = Instant::now();
        assert_eq!(served.wait("v", now, |_| true).await, Waited::Absent);
        served.set("v", Some(Presence::Coming));
        assert_eq!(served.wait("v", now, |_| true).await, Waited::StillComing);
        served.set("v", Some(Presence::Failed("no disk".into())));
        let later = now + Duration::from_secs(60);
        assert_eq!(
            served.wait("v", later, |_| true).await,
            Waited::Failed("no disk".into())
        );
        served.set("v", None);
        assert_eq!(served.get("v"), None);
    }
}
