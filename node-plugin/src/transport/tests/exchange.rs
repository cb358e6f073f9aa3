//! Frames find their volume.

use super::*;
use crate::transport::Work;
use crate::transport::exchange::{Exchange, Subscriber};

#[derive(Default)]
struct Shelf {
    inbox: Inbox,
    calls: std::sync::atomic::AtomicUsize,
}

impl Subscriber for Shelf {
    fn deliver(&self, mut events: Vec<Event>) {
        self.calls.fetch_add(1, std::sync::atomic::Ordering::SeqCst);
        self.inbox.deliver(&mut events);
    }
}

#[test]
fn frames_reach_the_subscriber_of_their_volume_and_sessions_reach_all() {
    let authority = authority();
    let (a, b) = (Node::start(&authority, 1), Exchange::default());
    let wallet = Wallet::default();
    wallet.put(credentials(&authority, authority.certificate(), uid(2)));
    let (first, second) = (Arc::new(Shelf::default()), Arc::new(Shelf::default()));
    assert!(b.subscribe(uid(0x11), first.clone()).is_empty());
    let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
    let config = TransportConfig::new(cluster(), uid(2));
    let transport = Transport::start(config, wallet, Some(listener), Arc::new(b.clone())).expect("it starts");
    a.transport.dial(uid(2), vec![transport.address().expect("it listens")]);
    let to_b = a.inbox.up();
    assert_eq!(first.inbox.up().peer(), a.uid);
    // Whoever comes later is given what there is.
    let there = b.subscribe(uid(0x12), second.clone());
    assert_eq!(there.len(), 1);
    assert_eq!(b.session(a.uid, Side::Accepted).as_ref(), there.first());
    assert!(b.session(a.uid, Side::Dialled).is_none());

    for (number, volume) in [(1, 0x11), (2, 0x12), (3, 0x13), (4, 0x11), (5, 0x12)] {
        let mut frame = super::frame(number, 512);
        frame.volume = uid(volume);
        to_b.queue(frame).expect("there is room");
    }
    to_b.flush();
    let numbers = |shelf: &Shelf| [shelf.inbox.frame().request, shelf.inbox.frame().request];
    assert_eq!((numbers(&first), numbers(&second)), ([1, 4], [2, 5]));
    assert_eq!(b.unclaimed(), 1, "nobody serves volume 13");

    b.unsubscribe(uid(0x12));
    to_b.close("for a test");
    assert_eq!(first.inbox.down().0.peer(), a.uid);
    assert!(second.inbox.events.lock().expect("no panic").is_empty());
    let again = first.inbox.up();
    assert_eq!(b.session(a.uid, Side::Accepted), Some(again));
}

#[test]
fn why_a_node_cannot_be_reached_is_known_until_it_is() {
    let authority = authority();
    let (exchange, shelf) = (Exchange::default(), Arc::new(Shelf::default()));
    exchange.subscribe(uid(0x11), shelf.clone());
    let wallet = Wallet::default();
    wallet.put(credentials(&authority, authority.certificate(), uid(1)));
    let mut config = TransportConfig::new(cluster(), uid(1));
    config.redial_max = Duration::from_millis(20);
    let transport = Transport::start(config, wallet, None, Arc::new(exchange.clone())).expect("it starts");
    let port = TcpListener::bind("127.0.0.1:0").expect("a port");
    let nobody = port.local_addr().expect("it has an address");
    drop(port);
    transport.dial(uid(2), vec![nobody]);
    shelf.inbox.dial_failed();
    let why = exchange.trouble(uid(2)).expect("it was not reached");
    assert!(why.contains("refused"), "{why}");
    let b = Node::start(&authority, 2);
    transport.dial(uid(2), vec![b.address()]);
    shelf.inbox.up();
    assert_eq!(exchange.trouble(uid(2)), None);
}

/// Does a transport's work as a shard does, beside nothing else.
fn works_at(exchange: &Exchange) -> std::thread::JoinHandle<()> {
    let (sender, receiver) = std::sync::mpsc::channel::<Work>();
    exchange.work_at(move |work| sender.send(work).expect("the loop is there"));
    std::thread::spawn(move || {
        let mut work = receiver.recv().expect("the transport has begun");
        while work.turn() {
            let mut fd = libc::pollfd {
                fd: work.descriptor(),
                events: libc::POLLIN,
                revents: 0,
            };
            let until = work.due().saturating_duration_since(Instant::now());
            // SAFETY: `fd` is one live entry.
            unsafe { libc::poll(&mut fd, 1, until.as_millis() as i32 + 1) };
        }
    })
}

#[test]
fn whoever_has_a_loop_does_the_work_in_it_until_the_transport_stops() {
    let authority = authority();
    let (a, b, shelf) = (
        Node::start(&authority, 1),
        Exchange::default(),
        Arc::new(Shelf::default()),
    );
    b.subscribe(uid(0x11), shelf.clone());
    let worker = works_at(&b);
    let wallet = Wallet::default();
    wallet.put(credentials(&authority, authority.certificate(), uid(2)));
    let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
    let config = TransportConfig::new(cluster(), uid(2));
    let transport = Transport::start(config, wallet, Some(listener), Arc::new(b.clone())).expect("it starts");
    a.transport.dial(uid(2), vec![transport.address().expect("it listens")]);
    let to_b = a.inbox.up();
    for number in 1..=100 {
        let mut frame = super::frame(number, 4096);
        frame.volume = uid(0x11);
        to_b.send(frame).expect("there is room");
        assert_eq!(shelf.inbox.frame().request, number);
    }
    transport.stop();
    let (_, why) = a.inbox.down();
    assert!(why.to_string().contains("the node plugin is ending"), "{why}");
    worker.join().expect("it ended, and did not panic");
}
