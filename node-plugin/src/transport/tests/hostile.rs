//! What somebody who means no good, or a program that is broken, can do: be refused and counted.

use std::io::{Read, Write};
use std::net::TcpStream;

use super::super::frame::{BODY_BYTES_MAX, Decoder, Expect, FrameError, HEADER_BYTES, Kinds, PAYLOAD_BYTES_MAX};
use super::super::hello::Hello;
use super::*;

const SESSION: Expect = Expect {
    version: 1,
    cluster: Some(Uuid::from_u128(0xc1)),
    kinds: Kinds::Session,
};

fn on_wire(frame: &Frame) -> Vec<u8> {
    let mut bytes = frame.header(1, cluster()).to_vec();
    bytes.extend_from_slice(&frame.body);
    frame
        .payload
        .iter()
        .for_each(|part| bytes.extend_from_slice(part.as_ref()));
    bytes
}

#[test]
fn the_bytes_of_a_frame_are_these() {
    let mut frame = super::frame(0x0807_0605_0403_0201, 512);
    frame.kind = Kind(0x1234);
    frame.flags = 0x0a0b_0c0d;
    frame.epoch = Epoch(0x1a1b_1c1d);
    frame.body = Bytes::from_static(b"body");
    let golden = [
        "47465357 0100 3412 0d0c0b0a 1d1c1b1a",
        "000000000000000000000000000000c1",
        "00000000000000000000000000000011",
        "00000000000000000000000000000022",
        "0102030405060708 04000000 00020000",
        "34e6c02c 000000000000000000000000",
    ]
    .concat()
    .replace(' ', "");
    let found: String = frame
        .header(1, cluster())
        .iter()
        .map(|byte| format!("{byte:02x}"))
        .collect();
    assert_eq!(found, golden, "what other versions of this program expect");
}

/// The rows `| offset | bytes | field |` of the table under a heading of the page.
fn documented(heading: &str) -> Vec<(usize, usize, String)> {
    let path = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/replication.md");
    let page = std::fs::read_to_string(path).expect("the page is there");
    let (_, section) = page
        .split_once(&format!("\n### {heading}\n"))
        .expect("the heading is there");
    let section = section.split("\n#").next().expect("what is up to the next heading");
    let cells = section
        .lines()
        .map(|line| line.split('|').map(str::trim).collect::<Vec<_>>());
    cells
        .filter_map(|cells| {
            Some((
                cells.get(1)?.parse().ok()?,
                cells.get(2)?.parse().ok()?,
                cells.get(3)?.to_string(),
            ))
        })
        .collect()
}

#[test]
fn the_page_about_the_wire_draws_these_bytes() {
    let contiguous = |rows: &[(usize, usize, String)]| {
        rows.iter().fold(0, |at, (offset, bytes, field)| {
            assert_eq!(at, *offset, "{field}");
            offset + bytes
        })
    };
    let rows = documented("Hello");
    let hello = |versions, cluster, node, boot, called| Hello {
        versions,
        cluster: uid(cluster),
        node: uid(node),
        boot: uid(boot),
        called: uid(called),
    };
    let (base, other) = (hello(1..=2, 3, 4, 5, 6), hello(7..=8, 9, 10, 11, 12));
    assert_eq!(contiguous(&rows), base.frame().body.len());
    let changes = [
        ("oldest version that is spoken", hello(2..=2, 3, 4, 5, 6)),
        ("newest version that is spoken", hello(1..=8, 3, 4, 5, 6)),
        ("cluster", hello(1..=2, 9, 4, 5, 6)),
        ("node", hello(1..=2, 3, 10, 5, 6)),
        ("boot", hello(1..=2, 3, 4, 11, 6)),
        ("called", hello(1..=2, 3, 4, 5, 12)),
    ];
    assert_eq!(rows.len(), changes.len());
    for ((offset, bytes, field), (name, changed)) in rows.iter().zip(changes) {
        assert_eq!(field, name);
        assert!(base.frame().body[*offset..offset + bytes] != other.frame().body[*offset..offset + bytes]);
        let place = *offset..offset + bytes;
        let (before, after) = (base.frame().body, changed.frame().body);
        assert!(
            (0..before.len()).all(|at| before[at] == after[at] || place.contains(&at)),
            "{field}"
        );
    }

    let rows = documented("Frame");
    assert_eq!(contiguous(&rows), HEADER_BYTES);
    let base = super::frame(1, 512);
    let places = |change: &dyn Fn(&mut Frame, &mut u16, &mut Uuid)| {
        let (mut frame, mut version, mut cluster) = (base.clone(), 1, cluster());
        change(&mut frame, &mut version, &mut cluster);
        let (before, after) = (base.header(1, super::cluster()), frame.header(version, cluster));
        let check = 80..84;
        let differ: Vec<usize> = (0..HEADER_BYTES)
            .filter(|at| before[*at] != after[*at] && !check.contains(at))
            .collect();
        assert_ne!(before[check.clone()], after[check], "the check covers it");
        let row = rows
            .iter()
            .position(|(offset, bytes, _)| differ.iter().all(|at| (*offset..offset + bytes).contains(at)));
        row.expect("one field changes")
    };
    let found = [
        places(&|_, version, _| *version = 2),
        places(&|frame, _, _| frame.kind = Kind(99)),
        places(&|frame, _, _| frame.flags = 99),
        places(&|frame, _, _| frame.epoch = Epoch(99)),
        places(&|_, _, cluster| *cluster = uid(99)),
        places(&|frame, _, _| frame.volume = uid(99)),
        places(&|frame, _, _| frame.replica = uid(99)),
        places(&|frame, _, _| frame.request = 99),
        places(&|frame, _, _| frame.body = Bytes::new()),
        places(&|frame, _, _| frame.payload.clear()),
    ];
    let fields: Vec<&str> = found
        .iter()
        .map(|row| rows[*row].2.split([';', ',', ' ']).next().expect("a word"))
        .collect();
    assert_eq!(found, [1, 2, 3, 4, 5, 6, 7, 8, 9, 10], "{fields:?}");
    assert_eq!(
        fields[..7],
        ["version", "kind", "flags", "epoch", "cluster", "volume", "replica"]
    );
}

#[test]
fn a_stream_of_frames_is_the_same_however_it_is_cut() {
    let sizes = [0, 512, 4096, 0, 8192];
    let stream: Vec<u8> = (0..)
        .zip(sizes)
        .flat_map(|(number, size)| on_wire(&super::frame(number, size)))
        .collect();
    for step in [1, 7, 95, 96, 97, 4096, stream.len()] {
        let mut decoder = Decoder::new(SESSION);
        let mut found = Vec::new();
        for mut piece in stream.chunks(step) {
            while !piece.is_empty() {
                let (taken, frame) = decoder.take(piece).expect("well formed");
                piece = &piece[taken..];
                found.extend(frame);
            }
        }
        assert!(decoder.is_between_frames());
        assert_eq!(found.len(), sizes.len(), "in steps of {step}");
        for (number, size) in sizes.into_iter().enumerate() {
            assert_is(&found[number], number as u64, size);
        }
    }
}

/// The first error that a decoder finds in `bytes`.
fn error_in(bytes: &[u8]) -> Option<FrameError> {
    let mut decoder = Decoder::new(SESSION);
    let mut rest = bytes;
    while !rest.is_empty() {
        match decoder.take(rest) {
            Ok((taken, _)) => rest = &rest[taken..],
            Err(error) => return Some(error),
        }
    }
    None
}

#[test]
fn every_flipped_bit_of_header_and_body_is_noticed() {
    let good = on_wire(&super::frame(1, 512));
    assert_eq!(error_in(&good), None);
    let covered = HEADER_BYTES + 24;
    for bit in 0..covered * 8 {
        let mut bad = good.clone();
        bad[bit / 8] ^= 1 << (bit % 8);
        // Something longer than it was is noticed when the rest comes.
        bad.extend_from_slice(&good.repeat(8));
        bad.resize(bad.len() + BODY_BYTES_MAX + PAYLOAD_BYTES_MAX, 0);
        assert!(error_in(&bad).is_some(), "bit {bit}");
    }
}

#[test]
fn what_is_too_long_or_of_no_known_kind_is_refused_at_its_header() {
    let good = super::frame(1, 512).header(1, cluster());
    let changed = |at: usize, bytes: &[u8]| {
        let mut header = good;
        header[at..at + bytes.len()].copy_from_slice(bytes);
        frame::make_check_fit(&mut header);
        error_in(&header).expect("refused before anything follows").to_string()
    };
    assert!(changed(72, &u32::MAX.to_le_bytes()).contains("a body of 4294967295 bytes"));
    assert!(changed(72, &(BODY_BYTES_MAX as u32 + 1).to_le_bytes()).contains("a body of"));
    assert!(changed(76, &u32::MAX.to_le_bytes()).contains("a payload of 4294967295 bytes"));
    assert!(changed(76, &513u32.to_le_bytes()).contains("a payload of 513 bytes"));
    assert!(changed(76, &(PAYLOAD_BYTES_MAX as u32 + 512).to_le_bytes()).contains("a payload of"));
    assert!(changed(6, &1u16.to_le_bytes()).contains("kind 1 has no place here"));
    assert!(changed(6, &9u16.to_le_bytes()).contains("kind 9 has no place here"));
    assert!(changed(4, &2u16.to_le_bytes()).contains("version 2 where 1 is spoken"));
    assert!(changed(16, &[9; 16]).contains("a frame of cluster 09090909"));
    assert!(changed(0, b"HTTP").contains("no frame begins with"));
}

/// TLS to a node with a certificate that is good, and whatever is sent inside.
struct Insider {
    tls: rustls::ClientConnection,
    socket: TcpStream,
}

impl Insider {
    fn to(authority: &Authority, node: &Node) -> Insider {
        let socket = TcpStream::connect(node.address()).expect("it listens");
        socket.set_read_timeout(Some(PATIENCE)).expect("a socket");
        let credentials = credentials(authority, authority.certificate(), uid(1));
        Insider {
            tls: credentials.dial().expect("TLS"),
            socket,
        }
    }

    fn hello(&mut self) {
        let hello = Hello {
            versions: VERSIONS,
            cluster: cluster(),
            node: uid(1),
            boot: Uuid::from_u128(0xb0),
            called: uid(2),
        };
        let frame = hello.frame();
        self.send(&[&frame.header(0, cluster())[..], &frame.body].concat());
    }

    fn send(&mut self, bytes: &[u8]) {
        // It may have been shown the door meanwhile.
        let mut stream = rustls::Stream::new(&mut self.tls, &mut self.socket);
        let _ = stream.write_all(bytes).and_then(|()| stream.flush());
    }

    /// All that comes until the other end hangs up.
    fn heard(&mut self) -> Vec<u8> {
        let mut heard = Vec::new();
        let _ = rustls::Stream::new(&mut self.tls, &mut self.socket).read_to_end(&mut heard);
        heard
    }
}

fn contains(bytes: &[u8], words: &str) -> bool {
    bytes.windows(words.len()).any(|window| window == words.as_bytes())
}

#[test]
fn nonsense_from_a_certified_node_ends_its_connection_with_the_reason_and_nothing_else() {
    let authority = authority();
    let b = Node::start(&authority, 2);
    let bystander = Node::start(&authority, 3);
    let (well, _) = bystander.connect(&b);
    let oversized = {
        let mut header = super::frame(1, 512).header(1, cluster());
        header[72..76].copy_from_slice(&u32::MAX.to_le_bytes());
        frame::make_check_fit(&mut header);
        header.to_vec()
    };
    let mut other_cluster = super::frame(1, 0).header(1, Uuid::from_u128(0xc2)).to_vec();
    other_cluster.extend_from_slice(&super::frame(1, 0).body);
    let mut flipped = on_wire(&super::frame(1, 0));
    flipped[HEADER_BYTES] ^= 1;
    for (bytes, part) in [
        (b"GET / HTTP/1.1\r\n\r\n".to_vec(), "no frame begins with"),
        (oversized, "a body of 4294967295 bytes"),
        (other_cluster, "a frame of cluster"),
        (flipped, "the check of header and body does not fit"),
        (
            Hello {
                versions: 1..=1,
                cluster: cluster(),
                node: uid(1),
                boot: uid(7),
                called: uid(2),
            }
            .frame()
            .header(1, cluster())
            .to_vec(),
            "kind 1 has no place here",
        ),
    ] {
        let mut insider = Insider::to(&authority, &b);
        insider.hello();
        insider.send(&bytes);
        let heard = insider.heard();
        assert!(contains(&heard, part), "{part}: {}", String::from_utf8_lossy(&heard));
        let (ended, why) = b.inbox.down();
        assert_eq!(ended.peer(), uid(1));
        assert!(why.to_string().contains(part), "{why}");
    }
    well.send(super::frame(1, 512)).expect("nobody else is concerned");
    assert_is(&b.inbox.frame(), 1, 512);
    assert!(b.transport.counts().refused >= 5);
}

#[test]
fn before_its_hello_nobody_may_send_anything_else_or_anything_long() {
    let authority = authority();
    let b = Node::start(&authority, 2);
    let mut long = Frame::own(Kind::HELLO, vec![0; 5000]).header(0, cluster()).to_vec();
    long.resize(HEADER_BYTES + 5000, 0);
    for (bytes, part) in [
        (on_wire(&super::frame(1, 512)), "version 1 where 0 is spoken"),
        (
            super::frame(1, 512).header(0, cluster()).to_vec(),
            "kind 20 has no place here",
        ),
        (long, "a body of 5000 bytes"),
        (
            [&Frame::own(Kind::HELLO, vec![1]).header(0, cluster())[..], &[1]].concat(),
            "its hello is too short",
        ),
    ] {
        let mut insider = Insider::to(&authority, &b);
        insider.send(&bytes);
        let heard = insider.heard();
        assert!(contains(&heard, part), "{part}: {}", String::from_utf8_lossy(&heard));
    }
    assert_eq!(b.transport.counts().sessions, 0);
}

#[test]
fn a_frame_that_breaks_off_ends_the_session_and_is_not_delivered() {
    let authority = authority();
    let b = Node::start(&authority, 2);
    let whole = on_wire(&super::frame(1, 8192));
    for len in [1, HEADER_BYTES - 1, HEADER_BYTES, HEADER_BYTES + 10, whole.len() - 1] {
        let mut insider = Insider::to(&authority, &b);
        insider.hello();
        b.inbox.up();
        insider.send(&whole[..len]);
        insider.tls.send_close_notify();
        insider.send(&[]);
        drop(insider);
        b.inbox.wait("the end of the session", |event| match event {
            Event::Incoming(_) => panic!("half a frame is none"),
            Event::Down { .. } => Some(()),
            _ => None,
        });
    }
}

#[test]
fn somebody_without_tls_gets_nothing_and_is_counted() {
    let authority = authority();
    let b = Node::start(&authority, 2);
    for bytes in [
        &b"GET / HTTP/1.1\r\n\r\n"[..],
        &on_wire(&super::frame(1, 512)),
        &[0x16, 3, 1, 0xff, 0xff],
    ] {
        let mut socket = TcpStream::connect(b.address()).expect("it listens");
        socket.set_read_timeout(Some(PATIENCE)).expect("a socket");
        socket.write_all(bytes).expect("the kernel takes it");
        let _ = socket.shutdown(std::net::Shutdown::Write);
        let mut heard = Vec::new();
        let _ = socket.read_to_end(&mut heard);
        assert!(heard.len() < 16, "an alert of TLS at most: {heard:02x?}");
    }
    assert!(b.transport.counts().refused >= 2);
    assert_eq!(b.transport.counts().sessions, 0);
}

#[test]
fn connections_that_say_nothing_are_few_and_short_lived() {
    let authority = authority();
    let b = Node::with(&authority, 2, |config| config.open_within = Duration::from_millis(300));
    let silent: Vec<TcpStream> = (0..limits::OPENING_MAX + 8)
        .map(|_| TcpStream::connect(b.address()).expect("the kernel takes it"))
        .collect();
    for mut socket in silent {
        socket.set_read_timeout(Some(PATIENCE)).expect("a socket");
        let mut heard = Vec::new();
        // Hung up on, with or without a word of TCP.
        let _ = socket.read_to_end(&mut heard);
        assert!(heard.is_empty());
    }
    let a = Node::start(&authority, 1);
    assert_eq!(a.connect(&b).0.peer(), b.uid);
}
