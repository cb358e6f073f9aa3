//! The authority over time: who signs now, who will, and who has.
//!
//! ```text
//!            made and made known          signs                     only trusted              forgotten
//!   next ───────── announce ──────► current ───── ... ─────► previous ── a node's life, twice ──►
//! ```
//!
//! Nodes trust all generations that they are told of, so a new one is made known long before it signs, and an old one is
//! forgotten long after it has signed last. What to do follows from the dates in the certificates alone, so whoever leads
//! comes to the same result, and nothing has to be remembered.

use std::{
    collections::BTreeMap,
    time::{Duration, SystemTime},
};

use galleonfs_api::identity::BACKDATED;
use k8s_openapi::ByteString;
use uuid::Uuid;

use super::authority::{Authority, AuthorityError, validity};

const DAY: Duration = Duration::from_secs(24 * 3600);

/// How long things last.
#[derive(Clone, Copy, Debug)]
pub struct Times {
    /// A node's certificate.
    pub node: Duration,
    /// An authority.
    pub authority: Duration,
    /// An authority that ends within this time gets a successor.
    pub renew_before: Duration,
    /// So long a successor is known before it signs.
    pub announce: Duration,
}

impl Default for Times {
    fn default() -> Self {
        Self {
            node: 7 * DAY,
            authority: 2 * 365 * DAY,
            renew_before: 90 * DAY,
            announce: 7 * DAY,
        }
    }
}

/// All generations there are.
#[derive(Debug)]
pub struct Generations {
    pub current: Authority,
    pub next: Option<Authority>,
    /// Its certificate. Its key is gone: nobody signs with it any more.
    pub previous: Option<String>,
}

impl Generations {
    /// The first one of a cluster.
    pub fn first(cluster: Uuid, now: SystemTime, times: &Times) -> Result<Self, AuthorityError> {
        Ok(Self {
            current: Authority::make(cluster, now, times.authority)?,
            next: None,
            previous: None,
        })
    }

    /// Takes the step that is due, if one is. True: something has changed.
    pub fn step(&mut self, cluster: Uuid, now: SystemTime, times: &Times) -> Result<bool, AuthorityError> {
        let made = |authority: &Authority| authority.not_before() + BACKDATED;
        let over = self.current.not_after() <= now + times.node;
        if let Some(next) = self.next.take_if(|next| over || made(next) + times.announce <= now) {
            let current = std::mem::replace(&mut self.current, next);
            self.previous = Some(current.certificate().to_owned());
            return Ok(true);
        }
        if self.next.is_none() && self.current.not_after() <= now + times.renew_before {
            self.next = Some(Authority::make(cluster, now, times.authority)?);
            return Ok(true);
        }
        let forgotten = made(&self.current) + times.announce + 2 * times.node;
        if self.previous.is_some() && forgotten <= now {
            self.previous = None;
            return Ok(true);
        }
        Ok(false)
    }

    /// What nodes trust: the certificates of all, in PEM.
    pub fn bundle(&self) -> String {
        let next = self.next.as_ref().map(Authority::certificate);
        let all = [Some(self.current.certificate()), next, self.previous.as_deref()];
        all.into_iter()
            .flatten()
            .map(|one| format!("{}\n", one.trim()))
            .collect()
    }

    /// The data of the Secret.
    pub fn data(&self) -> BTreeMap<String, ByteString> {
        let mut data = BTreeMap::new();
        let mut put = |key: &str, value: &str| data.insert(key.to_string(), ByteString(value.as_bytes().to_vec()));
        put("current.crt", self.current.certificate());
        put("current.key", self.current.key());
        if let Some(next) = &self.next {
            put("next.crt", next.certificate());
            put("next.key", next.key());
        }
        if let Some(previous) = &self.previous {
            put("previous.crt", previous);
        }
        data
    }

    /// Of the data of the Secret.
    pub fn of_data(data: &BTreeMap<String, ByteString>) -> Result<Self, AuthorityError> {
        let text = |key: &str| {
            data.get(key)
                .map(|value| {
                    std::str::from_utf8(&value.0).map_err(|_| AuthorityError::Read(format!("{key} is no text")))
                })
                .transpose()
        };
        let authority = |name: &str| match (text(&format!("{name}.crt"))?, text(&format!("{name}.key"))?) {
            (Some(certificate), Some(key)) => Authority::of_pem(certificate, key).map(Some),
            (None, None) => Ok(None),
            _ => Err(AuthorityError::Read(format!(
                "{name}.crt and {name}.key belong together"
            ))),
        };
        let previous = text("previous.crt")?;
        if let Some(previous) = previous {
            validity(previous).map_err(AuthorityError::Read)?;
        }
        Ok(Self {
            current: authority("current")?.ok_or_else(|| AuthorityError::Read("there is no current.crt".to_owned()))?,
            next: authority("next")?,
            previous: previous.map(str::to_owned),
        })
    }
}
