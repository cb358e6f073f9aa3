//! How connections begin and end, and who is let in.

use super::*;

#[test]
fn a_lost_connection_is_made_again_and_what_was_meant_for_the_old_one_goes_nowhere() {
    let authority = authority();
    let (a, b) = (Node::start(&authority, 1), Node::start(&authority, 2));
    let (first, theirs) = a.connect(&b);
    theirs.close("for a test");
    let (ended, why) = a.inbox.down();
    assert_eq!(ended, first);
    assert_eq!(why, Lost::RefusedByPeer("for a test".to_owned()));
    assert_eq!(b.inbox.down().1, Lost::Here("for a test".to_owned()));
    assert!(matches!(first.send(super::frame(1, 512)), Err(SendError::Down(_))));
    let (second, _) = (a.inbox.up(), b.inbox.up());
    assert!(second != first && second.number() > first.number());
    second.send(super::frame(2, 512)).expect("it is up");
    assert_is(&b.inbox.frame(), 2, 512);
}

#[test]
fn a_node_that_starts_later_is_reached_and_so_is_its_successor_with_another_boot_id() {
    let authority = authority();
    let a = Node::start(&authority, 1);
    let port = TcpListener::bind("127.0.0.1:0").expect("a port");
    let address = port.local_addr().expect("it has an address");
    drop(port);
    a.transport.dial(uid(2), vec![address]);
    assert!(matches!(a.inbox.dial_failed(), Lost::Network(_)));
    let start = || {
        let wallet = Wallet::default();
        wallet.put(credentials(&authority, authority.certificate(), uid(2)));
        let inbox = Arc::new(Inbox::default());
        let listener = TcpListener::bind(address).expect("the port is free");
        let config = TransportConfig::new(cluster(), uid(2));
        let transport = Transport::start(config, wallet, Some(listener), inbox.clone()).expect("it starts");
        (transport, inbox)
    };
    let (transport, _) = start();
    let first = a.inbox.up();
    transport.stop();
    let (_, why) = a.inbox.down();
    assert_eq!(why, Lost::RefusedByPeer("the node plugin is ending".to_owned()));
    let (_successor, _) = start();
    let second = a.inbox.up();
    assert_eq!(first.peer(), second.peer());
    assert_ne!(first.boot(), second.boot());
}

#[test]
fn a_peer_that_falls_silent_is_gone_within_the_stated_time() {
    let authority = authority();
    let quick = |config: &mut TransportConfig| {
        config.heartbeat_every = Duration::from_millis(50);
        config.dead_after = Duration::from_millis(300);
    };
    let (a, b) = (Node::with(&authority, 1, quick), Node::with(&authority, 2, quick));
    // Between them a line that can be cut without a word to anybody.
    let line = Line::to(b.address());
    a.transport.dial(b.uid, vec![line.address]);
    let (to_b, _) = (a.inbox.up(), b.inbox.up());
    to_b.send(super::frame(1, 4096)).expect("it is up");
    assert_is(&b.inbox.frame(), 1, 4096);
    line.cut();
    let cut = Instant::now();
    for node in [&a, &b] {
        let (_, why) = node.inbox.down();
        assert!(matches!(why, Lost::Silent(300..)), "{why}");
    }
    assert!(cut.elapsed() < Duration::from_secs(5), "{:?}", cut.elapsed());
}

#[test]
fn an_idle_connection_lives_by_its_heartbeats() {
    let authority = authority();
    let quick = |config: &mut TransportConfig| {
        config.heartbeat_every = Duration::from_millis(50);
        config.dead_after = Duration::from_millis(600);
    };
    let (a, b) = (Node::with(&authority, 1, quick), Node::with(&authority, 2, quick));
    let (to_b, _) = a.connect(&b);
    a.inbox.nothing_ends_for(Duration::from_millis(1500));
    to_b.send(super::frame(1, 512)).expect("it is up");
    assert_is(&b.inbox.frame(), 1, 512);
}

#[test]
fn a_certificate_is_renewed_while_connected_and_new_connections_show_the_new_one() {
    let authority = authority();
    let (a, b) = (Node::start(&authority, 1), Node::start(&authority, 2));
    let (to_b, _) = a.connect(&b);
    // The next authority, too: during its rotation both are trusted.
    let next = super::authority();
    let both = format!("{}{}", authority.certificate(), next.certificate());
    for node in [&a, &b] {
        node.wallet.put(credentials(&next, &both, node.uid));
    }
    to_b.send(super::frame(1, 4096)).expect("the old connection stays");
    assert_is(&b.inbox.frame(), 1, 4096);
    to_b.close("for a test");
    let (again, theirs) = (a.inbox.up(), b.inbox.up());
    again.send(super::frame(2, 4096)).expect("it is up");
    assert_is(&b.inbox.frame(), 2, 4096);
    // Whoever trusts only the old authority is not reached by the new certificate.
    drop(theirs);
    b.wallet.put(credentials(&authority, authority.certificate(), b.uid));
    again.close("for a test");
    assert!(matches!(a.inbox.dial_failed(), Lost::Tls(_)));
}

#[test]
fn a_connection_ends_with_the_certificate_that_it_was_made_with() {
    let authority = authority();
    let (a, b) = (Node::start(&authority, 1), Node::start(&authority, 2));
    let identity = NodeIdentity {
        cluster: cluster(),
        node: a.uid,
    };
    let short = certificate(&authority, identity, SystemTime::now(), Duration::from_millis(1900));
    a.wallet
        .put(Credentials::new(&short.0, &short.1, authority.certificate()).expect("valid for a second or two"));
    let (to_b, _) = a.connect(&b);
    // Renewed in time: the next connection is made at once.
    a.wallet.put(credentials(&authority, authority.certificate(), a.uid));
    let (ended, why) = b.inbox.down();
    assert!(
        why.to_string().contains("a certificate of this connection has ended"),
        "{why}"
    );
    assert_eq!(ended.peer(), a.uid);
    let again = a.inbox.wait("the next session", |event| match event {
        Event::Up(session) => (session != to_b).then_some(session),
        _ => None,
    });
    again.send(super::frame(1, 512)).expect("it is up");
}

#[test]
fn a_node_without_a_certificate_waits_for_one() {
    let authority = authority();
    let b = Node::start(&authority, 2);
    let a = Node::of(Wallet::default(), 1, |_| {});
    a.dial(&b);
    assert_eq!(
        a.inbox.dial_failed(),
        Lost::Network("this node has no certificate yet".to_owned())
    );
    a.wallet.put(credentials(&authority, authority.certificate(), a.uid));
    assert_eq!(a.inbox.up().peer(), b.uid);
}

#[test]
fn whoever_dials_again_replaces_the_connection_that_it_has_lost() {
    let authority = authority();
    let b = Node::start(&authority, 2);
    let first = Node::start(&authority, 1);
    first.dial(&b);
    let old = b.inbox.up();
    let again = Node::start(&authority, 1);
    again.dial(&b);
    let (ended, why) = b.inbox.down();
    assert_eq!(ended, old);
    assert!(why.to_string().contains("replaced"), "{why}");
    assert_eq!(b.inbox.up().boot(), again.transport.boot());
    assert!(matches!(first.inbox.down().1, Lost::RefusedByPeer(words) if words.contains("replaced")));
    first.transport.forget(b.uid);
}

#[test]
fn a_node_that_is_forgotten_is_not_dialled_any_more() {
    let authority = authority();
    let (a, b) = (Node::start(&authority, 1), Node::start(&authority, 2));
    a.connect(&b);
    a.transport.forget(b.uid);
    let (_, why) = b.inbox.down();
    assert_eq!(why, Lost::RefusedByPeer("it is not needed any more".to_owned()));
    a.inbox.down();
    let failed = a.transport.counts().failed_dials;
    // Were it still dialled, this one would come second.
    a.dial(&b);
    assert_eq!(a.inbox.up().number(), 2);
    assert_eq!(a.transport.counts().failed_dials, failed);
}

#[test]
fn each_of_two_nodes_may_dial_the_other() {
    let authority = authority();
    let (a, b) = (Node::start(&authority, 1), Node::start(&authority, 2));
    a.dial(&b);
    b.dial(&a);
    for (node, other) in [(&a, &b), (&b, &a)] {
        let mut sides = [node.inbox.up(), node.inbox.up()].map(|session| {
            assert_eq!(session.peer(), other.uid);
            session.side()
        });
        sides.sort_unstable();
        assert_eq!(sides, [Side::Dialled, Side::Accepted]);
    }
}

// ---- who is not let in --------------------------------------------------------------------------------------------

/// A node that is refused, and what both ends say about it. `change` makes it what it should not be.
fn refused(change: impl FnOnce(&Authority, &Node) -> Node) -> (Lost, crate::transport::Counts) {
    let authority = authority();
    let b = Node::start(&authority, 2);
    let a = change(&authority, &b);
    let why = a.inbox.dial_failed();
    let deadline = Instant::now() + PATIENCE;
    while b.transport.counts().refused == 0 {
        assert!(Instant::now() < deadline, "the other end counts it, too");
        std::thread::park_timeout(Duration::from_millis(5));
    }
    let counts = b.transport.counts();
    assert_eq!(counts.sessions, 0, "nobody got in");
    (why, counts)
}

#[test]
fn a_node_that_is_not_the_one_that_was_dialled_is_refused() {
    let (why, _) = refused(|authority, b| {
        let a = Node::start(authority, 1);
        a.transport.dial(uid(3), vec![b.address()]);
        a
    });
    let words =
        "it called node 00000000-0000-0000-0000-000000000003, this is node 00000000-0000-0000-0000-000000000002";
    assert_eq!(why, Lost::RefusedByPeer(words.to_owned()));
}

#[test]
fn a_node_that_says_it_is_another_than_its_certificate_does_is_refused() {
    let (why, _) = refused(|authority, b| {
        let wallet = Wallet::default();
        wallet.put(credentials(authority, authority.certificate(), uid(9)));
        let a = Node::of(wallet, 1, |_| {});
        a.dial(b);
        a
    });
    assert!(
        matches!(&why, Lost::RefusedByPeer(words) if words.contains("its certificate is that of")),
        "{why}"
    );
}

#[test]
fn a_node_of_another_cluster_is_refused_even_if_the_same_authority_signed() {
    let (why, _) = refused(|authority, b| {
        let elsewhere = NodeIdentity {
            cluster: Uuid::from_u128(0xc2),
            node: uid(1),
        };
        let (certificate, key) = certificate(authority, elsewhere, SystemTime::now(), DAY);
        let wallet = Wallet::default();
        wallet.put(Credentials::new(&certificate, &key, authority.certificate()).expect("valid"));
        let a = Node::of(wallet, 1, |config| config.cluster = elsewhere.cluster);
        a.dial(b);
        a
    });
    assert!(
        matches!(&why, Lost::RefusedByPeer(words) if words.contains("is of cluster 00000000-0000-0000-0000-0000000000c2")),
        "{why}"
    );
}

#[test]
fn a_node_that_speaks_only_other_versions_is_refused() {
    let (why, _) = refused(|authority, b| {
        let a = Node::with(authority, 1, |config| config.versions = 7..=8);
        a.dial(b);
        a
    });
    assert!(
        matches!(&why, Lost::RefusedByPeer(words) if words.contains("speaks versions 7 to 8, this node 1 to 1")),
        "{why}"
    );
}

#[test]
fn a_node_of_a_foreign_authority_is_refused_by_tls() {
    let (why, _) = refused(|authority, b| {
        let foreign = super::authority();
        let wallet = Wallet::default();
        // It trusts ours, and shows one of its own.
        let both = format!("{}{}", authority.certificate(), foreign.certificate());
        wallet.put(credentials(&foreign, &both, uid(1)));
        let a = Node::of(wallet, 1, |_| {});
        a.dial(b);
        a
    });
    assert!(matches!(&why, Lost::Tls(_)), "{why}");
}

#[test]
fn a_node_whose_certificate_has_ended_is_refused_by_tls() {
    let (why, _) = refused(|authority, b| {
        let identity = NodeIdentity {
            cluster: cluster(),
            node: uid(1),
        };
        let short = certificate(authority, identity, SystemTime::now(), Duration::from_millis(1100));
        let credentials = Credentials::new(&short.0, &short.1, authority.certificate()).expect("valid for a second");
        let ends = credentials.own().not_after;
        let wallet = Wallet::default();
        wallet.put(credentials);
        // Seconds are what certificates count in.
        while SystemTime::now() < ends + Duration::from_millis(1000) {
            std::thread::park_timeout(Duration::from_millis(50));
        }
        let a = Node::of(wallet, 1, |_| {});
        a.dial(b);
        a
    });
    assert!(
        matches!(&why, Lost::Tls(words) if words.to_lowercase().contains("expired")),
        "{why}"
    );
}

#[test]
fn credentials_that_do_not_fit_together_are_refused_before_anybody_sees_them() {
    let (authority, foreign) = (authority(), super::authority());
    let identity = NodeIdentity {
        cluster: cluster(),
        node: uid(1),
    };
    let now = SystemTime::now();
    let (good, key) = certificate(&authority, identity, now, DAY);
    let (_, other_key) = certificate(&authority, identity, now, DAY);
    let (past, past_key) = certificate(&authority, identity, now - 3 * DAY, DAY);
    for (certificate, key, trusted, part) in [
        (good.as_str(), key.as_str(), foreign.certificate(), "UnknownIssuer"),
        (&good, &other_key, authority.certificate(), "keys"),
        (&past, &past_key, authority.certificate(), "invalid peer certificate"),
        (
            authority.certificate(),
            authority.key(),
            authority.certificate(),
            "without a name",
        ),
        ("", &key, authority.certificate(), "there is none"),
        (&good, &key, "", "trusted"),
    ] {
        let refused = Credentials::new(certificate, key, trusted).expect_err(part).to_string();
        assert!(refused.contains(part), "{refused:?} lacks {part:?}");
        assert!(!refused.contains("PRIVATE"), "no key in it");
    }
}

// ---- a line that can be cut ---------------------------------------------------------------------------------------

/// Passes bytes on in both directions, until it is cut: then it passes on nothing, not even an end.
struct Line {
    address: SocketAddr,
    cut: Arc<std::sync::atomic::AtomicBool>,
}

impl Line {
    fn to(target: SocketAddr) -> Line {
        use std::io::{Read, Write};
        use std::sync::atomic::{AtomicBool, Ordering};
        let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
        let address = listener.local_addr().expect("it has an address");
        let cut = Arc::new(AtomicBool::new(false));
        let is_cut = cut.clone();
        std::thread::spawn(move || {
            let mut ends = Vec::new();
            while let Ok((near, _)) = listener.accept() {
                if is_cut.load(Ordering::SeqCst) {
                    ends.push((near.try_clone().expect("a second handle"), near));
                    continue;
                }
                let far = std::net::TcpStream::connect(target).expect("it listens");
                for (mut from, mut to) in [
                    (
                        near.try_clone().expect("a second handle"),
                        far.try_clone().expect("a second handle"),
                    ),
                    (
                        far.try_clone().expect("a second handle"),
                        near.try_clone().expect("a second handle"),
                    ),
                ] {
                    let is_cut = is_cut.clone();
                    std::thread::spawn(move || {
                        let mut bytes = [0; 65536];
                        while let Ok(len @ 1..) = from.read(&mut bytes) {
                            if !is_cut.load(Ordering::SeqCst) && to.write_all(&bytes[..len]).is_err() {
                                return;
                            }
                        }
                        if !is_cut.load(Ordering::SeqCst) {
                            let _ = to.shutdown(std::net::Shutdown::Both);
                        }
                    });
                }
                // Nobody sees an end for as long as the test runs.
                ends.push((near, far));
            }
        });
        Line { address, cut }
    }

    fn cut(&self) {
        self.cut.store(true, std::sync::atomic::Ordering::SeqCst);
    }
}
