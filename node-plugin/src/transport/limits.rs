//! Every bound of the transport in one place, and how they relate.

use std::time::Duration;

use super::frame::{BODY_BYTES_MAX, HEADER_BYTES, PAYLOAD_BYTES_MAX};

const FRAME_BYTES_MAX: usize = HEADER_BYTES + BODY_BYTES_MAX + PAYLOAD_BYTES_MAX;

/// What may wait to be sent to one peer: a few times what a replica may have unanswered of one volume.
pub const QUEUE_BYTES_MAX: usize = 64 << 20;
/// And in how many frames. A queue of heartbeats and answers is short in bytes.
pub const QUEUE_FRAMES_MAX: usize = 16 << 10;

/// What was received of one peer and is still held by whoever got it; beyond that nothing more is read from it. It is the
/// last resort, and stops all volumes of that peer: whoever sends keeps less than this unanswered.
pub const HELD_BYTES_MAX: usize = 96 << 20;

const _: () = assert!(FRAME_BYTES_MAX < QUEUE_BYTES_MAX && QUEUE_BYTES_MAX < HELD_BYTES_MAX);

/// Plaintext that is encrypted in one go. What is encrypted cannot be taken back, and others wait for the connection.
pub const SEAL_BYTES_MAX: usize = 256 << 10;

/// What is taken from a socket at a time, while others wait for the connection.
pub const READ_BYTES_MAX: usize = 256 << 10;

/// Connections that have not said who they are. The port is open to whatever reaches the node.
pub const OPENING_MAX: usize = 64;

/// What a connection may take to say who it is, from the first packet on: enough for a busy machine on a bad line.
pub const OPEN_WITHIN: Duration = Duration::from_secs(3);

/// How often something is sent when there is nothing to say.
pub const HEARTBEAT_EVERY: Duration = Duration::from_millis(500);

/// A peer that was silent for so long is gone. A guest waits about that long when a replica dies without a word.
pub const DEAD_AFTER: Duration = Duration::from_secs(2);

/// Three heartbeats may get lost or late.
const _: () = assert!(HEARTBEAT_EVERY.as_millis() * 4 <= DEAD_AFTER.as_millis());

/// What was sent and is not acknowledged by the peer's kernel for so long ends the connection. Also when the peer is
/// there and takes nothing, so longer than silence.
pub const UNACKNOWLEDGED_MAX: Duration = Duration::from_secs(10);

/// The wait before a node is dialled again: the first, which then doubles, and the longest. Half of it is by chance.
pub const REDIAL_FIRST: Duration = Duration::from_millis(50);
pub const REDIAL_MAX: Duration = Duration::from_secs(2);

/// A connection that lasted so long was a good one: when it ends, dialling begins anew with the first wait.
pub const GOOD_AFTER: Duration = Duration::from_secs(5);

/// How long a refused peer has to take our reason before we hang up.
pub const FAREWELL: Duration = Duration::from_secs(1);
