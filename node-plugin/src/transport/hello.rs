//! The first words on a connection, in both directions, inside TLS.
//!
//! TLS has shown by then that the other end holds a certificate that the cluster's authority signed. The hello says what
//! TLS does not know: which versions it speaks, which cluster it believes to be in, which node it is (that must be what
//! its certificate says) and which start of its process this is. Whoever does not like what it hears answers with the
//! reason in words and hangs up, so both ends can tell a person.
//!
//! These frames have version 0, for ever: what the versions are is only known behind them.

use std::ops::RangeInclusive;

use galleonfs_api::NodeIdentity;
use uuid::Uuid;

use super::frame::{Frame, Kind};

/// Version of the frames of this file.
pub const HELLO_VERSION: u16 = 0;

/// The versions that this program speaks: the newest, and the one before it once there are two.
pub const VERSIONS: RangeInclusive<u16> = 1..=1;

const VERSION_MIN_AT: usize = 0;
const VERSION_MAX_AT: usize = VERSION_MIN_AT + 2;
const CLUSTER_AT: usize = VERSION_MAX_AT + 2;
const NODE_AT: usize = CLUSTER_AT + 16;
const BOOT_AT: usize = NODE_AT + 16;
const CALLED_AT: usize = BOOT_AT + 16;
const HELLO_BYTES: usize = CALLED_AT + 16;

/// Words of a refusal.
const REFUSAL_BYTES_MAX: usize = 1024;

/// Who speaks.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Hello {
    pub versions: RangeInclusive<u16>,
    pub cluster: Uuid,
    pub node: Uuid,
    /// A new one for each start of the process.
    pub boot: Uuid,
    /// Whom it believes to speak to. An address may have been given to another node meanwhile.
    pub called: Uuid,
}

impl Hello {
    pub fn identity(&self) -> NodeIdentity {
        NodeIdentity {
            cluster: self.cluster,
            node: self.node,
        }
    }

    pub fn frame(&self) -> Frame {
        let mut body = vec![0; HELLO_BYTES];
        body[VERSION_MIN_AT..VERSION_MAX_AT].copy_from_slice(&self.versions.start().to_le_bytes());
        body[VERSION_MAX_AT..CLUSTER_AT].copy_from_slice(&self.versions.end().to_le_bytes());
        body[CLUSTER_AT..NODE_AT].copy_from_slice(self.cluster.as_bytes());
        body[NODE_AT..BOOT_AT].copy_from_slice(self.node.as_bytes());
        body[BOOT_AT..CALLED_AT].copy_from_slice(self.boot.as_bytes());
        body[CALLED_AT..].copy_from_slice(self.called.as_bytes());
        Frame::own(Kind::HELLO, body)
    }

    /// What is behind the fields that this program knows was added by a newer one, and is passed over.
    pub fn of_body(body: &[u8]) -> Option<Hello> {
        let body = body.get(..HELLO_BYTES)?;
        let number = |at: usize| u16::from_le_bytes([body[at], body[at + 1]]);
        let uuid = |at: usize| Uuid::from_slice(&body[at..at + 16]).expect("sixteen bytes");
        Some(Hello {
            versions: number(VERSION_MIN_AT)..=number(VERSION_MAX_AT),
            cluster: uuid(CLUSTER_AT),
            node: uuid(NODE_AT),
            boot: uuid(BOOT_AT),
            called: uuid(CALLED_AT),
        })
    }

    /// The version to speak with whoever said `theirs`, or why not to speak at all. `certified` is what the certificate
    /// says that it showed; `expected` the node that was dialled.
    pub fn judge(&self, theirs: &Hello, certified: NodeIdentity, expected: Option<Uuid>) -> Result<u16, String> {
        if theirs.cluster != self.cluster {
            return Err(format!(
                "it is of cluster {}, this is cluster {}",
                theirs.cluster, self.cluster
            ));
        }
        if certified != theirs.identity() {
            return Err(format!(
                "it says that it is {}, and its certificate is that of {certified}",
                theirs.identity()
            ));
        }
        if theirs.called != self.node {
            return Err(format!("it called node {}, this is node {}", theirs.called, self.node));
        }
        if let Some(expected) = expected
            && theirs.node != expected
        {
            return Err(format!("it is node {}, and node {expected} was dialled", theirs.node));
        }
        let common = *self.versions.end().min(theirs.versions.end());
        if !self.versions.contains(&common) || !theirs.versions.contains(&common) {
            return Err(format!(
                "it speaks versions {} to {}, this node {} to {}",
                theirs.versions.start(),
                theirs.versions.end(),
                self.versions.start(),
                self.versions.end()
            ));
        }
        Ok(common)
    }
}

/// The last frame to somebody who is not talked to.
pub fn refusal(words: &str) -> Frame {
    let mut end = words.len().min(REFUSAL_BYTES_MAX);
    while !words.is_char_boundary(end) {
        end -= 1;
    }
    Frame::own(Kind::REFUSAL, words.as_bytes()[..end].to_vec())
}

/// The words of a refusal, fit to be logged: whoever sent them may be anybody.
pub fn words_of(body: &[u8]) -> String {
    let body = &body[..body.len().min(REFUSAL_BYTES_MAX)];
    let text = String::from_utf8_lossy(body);
    text.chars().map(|c| if c.is_control() { ' ' } else { c }).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hello() -> Hello {
        Hello {
            versions: 2..=3,
            cluster: Uuid::from_u128(1),
            node: Uuid::from_u128(2),
            boot: Uuid::from_u128(3),
            called: Uuid::from_u128(2),
        }
    }

    #[test]
    fn a_hello_is_read_as_it_was_written_also_with_more_behind_it() {
        let mut body = hello().frame().body.to_vec();
        assert_eq!(Hello::of_body(&body), Some(hello()));
        assert_eq!(Hello::of_body(&body[..body.len() - 1]), None);
        body.extend_from_slice(b"what a later version adds");
        assert_eq!(Hello::of_body(&body), Some(hello()));
    }

    #[test]
    fn neighbouring_versions_speak_the_older_one() {
        let newer = Hello {
            versions: 3..=4,
            ..hello()
        };
        let judged = |ours: &Hello, theirs: &Hello| ours.judge(theirs, theirs.identity(), None);
        assert_eq!(judged(&hello(), &newer), Ok(3));
        assert_eq!(judged(&newer, &hello()), Ok(3));
        assert_eq!(judged(&hello(), &hello()), Ok(3));
    }

    #[test]
    fn whoever_is_not_who_it_should_be_is_refused_with_the_reason() {
        let ours = hello();
        let too_new = Hello {
            versions: 4..=5,
            ..hello()
        };
        let backwards = Hello {
            versions: RangeInclusive::new(3, 2),
            ..hello()
        };
        let elsewhere = Hello {
            cluster: Uuid::from_u128(9),
            ..hello()
        };
        let misled = Hello {
            called: Uuid::from_u128(7),
            ..hello()
        };
        let me = hello().identity();
        let another = NodeIdentity {
            node: Uuid::from_u128(8),
            ..me
        };
        for (theirs, certified, expected, part) in [
            (&too_new, me, None, "speaks versions 4 to 5, this node 2 to 3"),
            (&backwards, me, None, "speaks versions 3 to 2"),
            (
                &elsewhere,
                me,
                None,
                "is of cluster 00000000-0000-0000-0000-000000000009",
            ),
            (&ours, another, None, "its certificate is that of galleon://"),
            (&ours, me, Some(another.node), "0008 was dialled"),
            (
                &misled,
                me,
                None,
                "it called node 00000000-0000-0000-0000-000000000007, this is node",
            ),
        ] {
            let refused = ours.judge(theirs, certified, expected).expect_err(part);
            assert!(refused.contains(part), "{refused:?} lacks {part:?}");
        }
    }

    #[test]
    fn words_of_a_refusal_are_cut_and_cleaned() {
        let long = refusal(&"ä".repeat(2000));
        assert!(long.body.len() <= REFUSAL_BYTES_MAX);
        assert_eq!(words_of(&long.body), "ä".repeat(512));
        assert_eq!(words_of(b"two\nlines\x1b[2J\xff"), "two lines [2J\u{fffd}");
    }
}
