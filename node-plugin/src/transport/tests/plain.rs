//! Ends without TLS, which only the benchmark makes: to each other they talk, to a node they do not.

use super::*;

fn plain(authority: &Authority, number: u128) -> Node {
    Node::with(authority, number, |config| config.plain = true)
}

#[test]
fn two_ends_without_tls_talk_to_each_other() {
    let authority = authority();
    let (a, b) = (plain(&authority, 1), plain(&authority, 2));
    let (to_b, to_a) = a.connect(&b);
    for (session, receiver) in [(&to_b, &b), (&to_a, &a)] {
        for (number, size) in [0, 512, 65536, frame::PAYLOAD_BYTES_MAX, 4096].into_iter().enumerate() {
            session.queue(super::frame(number as u64, size)).expect("there is room");
        }
        session.flush();
        for (number, size) in [0, 512, 65536, frame::PAYLOAD_BYTES_MAX, 4096].into_iter().enumerate() {
            assert_is(&receiver.inbox.frame(), number as u64, size);
        }
    }
}

#[test]
fn an_end_without_tls_and_one_with_refuse_each_other_and_say_why() {
    let authority = authority();
    let (without, with) = (plain(&authority, 1), Node::start(&authority, 2));
    without.dial(&with);
    let why = without.inbox.dial_failed().to_string();
    assert_eq!(why, "TLS: it speaks that, and this end does not");
    with.dial(&without);
    let why = with.inbox.dial_failed().to_string();
    assert_eq!(why, "TLS: it speaks without");
    for end in [&without, &with] {
        assert_eq!(end.transport.counts().sessions, 0);
        assert!(end.transport.counts().refused > 0);
    }
}
