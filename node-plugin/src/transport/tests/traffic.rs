//! What goes over a connection that is well.

use super::*;

#[test]
fn frames_of_all_sizes_arrive_whole_in_order_and_aligned_in_both_directions() {
    let authority = authority();
    let (a, b) = (Node::start(&authority, 1), Node::start(&authority, 2));
    let (to_b, to_a) = a.connect(&b);
    assert_eq!((to_b.peer(), to_b.side()), (b.uid, Side::Dialled));
    assert_eq!((to_a.peer(), to_a.side()), (a.uid, Side::Accepted));
    assert_eq!((to_b.boot(), to_a.boot()), (b.transport.boot(), a.transport.boot()));
    let sizes = [0, 512, 4096, 4096 + 512, 65536, frame::PAYLOAD_BYTES_MAX, 4096, 0];
    for (session, receiver) in [(&to_b, &b), (&to_a, &a)] {
        for (number, size) in sizes.into_iter().enumerate() {
            session.queue(super::frame(number as u64, size)).expect("there is room");
        }
        session.flush();
        for (number, size) in sizes.into_iter().enumerate() {
            assert_is(&receiver.inbox.frame(), number as u64, size);
        }
    }
    let (sent, received) = (a.transport.counts(), b.transport.counts());
    assert_eq!(sent.frames_sent, sizes.len() as u64);
    assert_eq!(
        (sent.frames_sent, sent.bytes_sent),
        (received.frames_received, received.bytes_received)
    );
}

#[test]
fn a_payload_in_parts_arrives_as_one() {
    let authority = authority();
    let (a, b) = (Node::start(&authority, 1), Node::start(&authority, 2));
    let (to_b, _) = a.connect(&b);
    let mut parted = super::frame(3, 3 * 4096);
    let whole = parted.payload.remove(0);
    parted.payload = vec![whole.slice(0..512), whole.slice(512..8192), whole.slice(8192..12288)];
    to_b.send(parted).expect("there is room");
    assert_is(&b.inbox.frame(), 3, 3 * 4096);
}

#[test]
fn many_threads_send_at_once_and_each_finds_its_order_kept() {
    const THREADS: u64 = 4;
    const EACH: u64 = 2000;
    let authority = authority();
    let (a, b) = (Node::start(&authority, 1), Node::start(&authority, 2));
    let (to_b, _) = a.connect(&b);
    std::thread::scope(|scope| {
        for thread in 0..THREADS {
            let session = to_b.clone();
            scope.spawn(move || {
                for number in 0..EACH {
                    let mut frame = super::frame(thread << 32 | number, 512);
                    while let Err(error) = session.send(frame) {
                        match error {
                            SendError::Full(back) => frame = back,
                            SendError::Down(_) => panic!("the connection is well"),
                        }
                        std::thread::yield_now();
                    }
                }
            });
        }
    });
    let mut next = [0; THREADS as usize];
    for _ in 0..THREADS * EACH {
        let found = b.inbox.frame();
        let (thread, number) = ((found.request >> 32) as usize, found.request & 0xffff_ffff);
        assert_eq!(number, next[thread], "thread {thread}");
        assert_is(&found, found.request, 512);
        next[thread] += 1;
    }
}

#[test]
fn a_full_queue_is_told_and_never_grows_and_room_is_told_too() {
    let authority = authority();
    let a = Node::with(&authority, 1, |config| config.limits.queue_bytes_max = 8 << 20);
    let b = Node::with(&authority, 2, |config| {
        config.limits.held_bytes_max = 4 << 20;
        // What comes back while the line is full must not make anybody forget what waits.
        config.heartbeat_every = Duration::from_millis(1);
    });
    let (to_b, _) = a.connect(&b);
    // The reader holds on to what it gets, so it is read from no more; kernel and queue fill up.
    let mut sent = 0;
    let refused = loop {
        match to_b.send(super::frame(sent, 1 << 20)) {
            Ok(()) => sent += 1,
            Err(SendError::Full(frame)) => break frame,
            Err(SendError::Down(_)) => panic!("the connection is well"),
        }
        assert!(sent < 10_000, "somebody takes everything");
    };
    assert_eq!(refused.request, sent, "the frame comes back");
    assert!(to_b.queued_bytes() <= 8 << 20);
    assert_eq!(a.transport.counts().full, 1);
    // It lets go: everything arrives, once and in order, and room is told.
    for number in 0..sent {
        assert_is(&b.inbox.frame(), number, 1 << 20);
    }
    a.inbox.wait("room", |event| match event {
        Event::Room(session) => (session == to_b).then_some(()),
        Event::Down { why, .. } => panic!("a slow reader is no dead one: {why}"),
        _ => None,
    });
    to_b.send(refused).expect("there is room again");
    assert_is(&b.inbox.frame(), sent, 1 << 20);
}

#[test]
fn a_reader_that_is_slow_for_longer_than_a_dead_one_lives_is_not_taken_for_dead() {
    let authority = authority();
    let soon = |config: &mut TransportConfig| {
        config.limits.held_bytes_max = 1 << 20;
        config.heartbeat_every = Duration::from_millis(50);
        config.dead_after = Duration::from_millis(600);
    };
    let (a, b) = (Node::with(&authority, 1, soon), Node::with(&authority, 2, soon));
    let (to_b, _) = a.connect(&b);
    for number in 0..8 {
        to_b.send(super::frame(number, 1 << 20)).expect("there is room");
    }
    // What is held here keeps the rest from being read.
    let held = b.inbox.incoming();
    a.inbox.nothing_ends_for(Duration::from_millis(1500));
    drop(held);
    for number in 1..8 {
        assert_is(&b.inbox.frame(), number, 1 << 20);
    }
}
