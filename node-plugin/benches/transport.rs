//! What a message between nodes costs: frames of 4 KiB there and back over loopback, TLS on, in one process.
//!
//! `cargo bench -p galleonfs-node-plugin --bench transport [-- SECONDS]` prints for each way and depth the round trip
//! and the CPU time for each message, both ends and the kernel's part together. Three ways:
//!
//! - *shard*: as it is built. The wire thread reads and hands over to a thread that stands for a shard, which answers;
//!   whoever sends seals and writes itself.
//! - *wire*: answered on the wire thread, with no hand-over. What connections that a shard owns could save at most.
//! - *tokio*: tokio-rustls, a task that reads and one that writes for each connection, channels to and from the shard.

use std::net::{SocketAddr, TcpListener};
use std::sync::{Arc, mpsc};
use std::time::{Duration, Instant, SystemTime};

use bytes::Bytes;
use galleonfs_api::NodeIdentity;
use galleonfs_controller::certificates::Authority;
use galleonfs_node_plugin::identity::{Credentials, Wallet};
use galleonfs_node_plugin::transport::frame::{Decoder, Expect, Kinds};
use galleonfs_node_plugin::transport::{Event, Frame, Kind, Session, Sink, Transport, TransportConfig};
use galleonfs_storage_engine::buffer::BufMut;
use galleonfs_storage_engine::types::Epoch;
use rcgen::{CertificateParams, CertificateSigningRequestParams, KeyPair};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use uuid::Uuid;

const CLUSTER: Uuid = Uuid::from_u128(1);
const PAYLOAD_BYTES: usize = 4096;
const DEPTHS: [u64; 2] = [1, 32];
const DAY: Duration = Duration::from_secs(24 * 3600);

fn main() {
    let seconds = std::env::args().skip(1).find_map(|word| word.parse().ok()).unwrap_or(3);
    let time = Duration::from_secs(seconds);
    let authority = Authority::make(CLUSTER, SystemTime::now(), 10 * DAY).expect("an authority");
    println!("way     depth   round trip   messages/s   CPU per message");
    for depth in DEPTHS {
        for (way, run) in [
            ("shard", over_shards as fn(&Authority, u64, Duration) -> u64),
            ("wire", on_the_wire_thread),
            ("tokio", over_tokio),
        ] {
            // What is done once, and what the caches learn, is not counted.
            run(&authority, depth, time / 10);
            let (began, cpu) = (Instant::now(), cpu_time());
            let trips = run(&authority, depth, time);
            let (took, cpu) = (began.elapsed(), cpu_time() - cpu);
            println!(
                "{way:<7} {depth:>5} {:>9.1} us {:>12.0} {:>14.2} us",
                took.as_secs_f64() * 1e6 * depth as f64 / trips as f64,
                2.0 * trips as f64 / took.as_secs_f64(),
                cpu.as_secs_f64() * 1e6 / (2.0 * trips as f64),
            );
        }
    }
}

fn cpu_time() -> Duration {
    let usage = nix::sys::resource::getrusage(nix::sys::resource::UsageWho::RUSAGE_SELF).expect("our own usage");
    let time = |time: nix::sys::time::TimeVal| {
        Duration::from_secs(time.tv_sec().unsigned_abs()) + Duration::from_micros(time.tv_usec().unsigned_abs())
    };
    time(usage.user_time()) + time(usage.system_time())
}

fn credentials(authority: &Authority, node: u128) -> Credentials {
    let key = KeyPair::generate().expect("a key");
    let request = CertificateParams::default().serialize_request(&key).expect("a request");
    let request = CertificateSigningRequestParams::from_der(request.der()).expect("a request that can be read");
    let identity = NodeIdentity {
        cluster: CLUSTER,
        node: Uuid::from_u128(node),
    };
    let certificate = authority.sign(identity, &request.public_key, SystemTime::now(), DAY);
    let certificate = certificate.expect("a certificate");
    Credentials::new(&certificate, &key.serialize_pem(), authority.certificate()).expect("they fit together")
}

fn frame(request: u64) -> Frame {
    Frame {
        kind: Kind::FIRST_OF_OTHERS,
        flags: 0,
        volume: Uuid::nil(),
        replica: Uuid::nil(),
        epoch: Epoch(1),
        request,
        body: Bytes::from_static(&[7; 64]),
        payload: vec![BufMut::zeroed(PAYLOAD_BYTES).freeze()],
    }
}

/// Two nodes, each with the sink that it is given.
fn two_nodes(authority: &Authority, sinks: [Arc<dyn Sink>; 2]) -> [Transport; 2] {
    let start = |number: u128, sink| {
        let wallet = Wallet::default();
        wallet.put(credentials(authority, number));
        let config = TransportConfig::new(CLUSTER, Uuid::from_u128(number));
        let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
        Transport::start(config, wallet, Some(listener), sink).expect("it starts")
    };
    let [first, second] = sinks;
    let nodes = [start(1, first), start(2, second)];
    let address = nodes[1].address().expect("it listens");
    nodes[0].dial(Uuid::from_u128(2), vec![address]);
    nodes
}

/// Keeps `depth` frames out until the time is over; gives how many came back.
struct Guest {
    depth: u64,
    until: Instant,
    sent: u64,
    back: u64,
}

impl Guest {
    fn new(depth: u64, time: Duration) -> Guest {
        Guest {
            depth,
            until: Instant::now() + time,
            sent: 0,
            back: 0,
        }
    }

    /// How many to send now, or `None` when all that was sent is back and the time is over.
    fn next(&mut self) -> Option<u64> {
        if Instant::now() < self.until {
            return Some(self.depth - (self.sent - self.back));
        }
        (self.sent > self.back).then_some(0)
    }
}

// ---- as it is built -----------------------------------------------------------------------------------------------

struct ToShard(mpsc::Sender<Vec<Event>>);

impl Sink for ToShard {
    fn deliver(&self, events: &mut Vec<Event>) {
        // The shard has gone once the time is over.
        let _ = self.0.send(std::mem::take(events));
    }
}

fn over_shards(authority: &Authority, depth: u64, time: Duration) -> u64 {
    let ((to_near, near), (to_far, far)) = (mpsc::channel(), mpsc::channel());
    let nodes = two_nodes(authority, [Arc::new(ToShard(to_near)), Arc::new(ToShard(to_far))]);
    std::thread::scope(|scope| {
        scope.spawn(move || {
            while let Ok(events) = far.recv() {
                let mut session = None;
                for event in events {
                    match event {
                        Event::Incoming(incoming) => {
                            incoming
                                .session
                                .queue(frame(incoming.frame.request))
                                .expect("there is room");
                            session = Some(incoming.session);
                        }
                        Event::Down { .. } => return,
                        _ => {}
                    }
                }
                session.iter().for_each(Session::flush);
            }
        });
        let mut guest = Guest::new(depth, time);
        let mut session: Option<Session> = None;
        for events in &near {
            for event in events {
                match event {
                    Event::Up(up) => session = Some(up),
                    Event::Incoming(_) => guest.back += 1,
                    _ => {}
                }
            }
            let Some(session) = &session else { continue };
            let Some(count) = guest.next() else { break };
            for _ in 0..count {
                session.queue(frame(guest.sent)).expect("there is room");
                guest.sent += 1;
            }
            session.flush();
        }
        nodes.iter().for_each(Transport::stop);
        guest.back
    })
}

// ---- without handing over -----------------------------------------------------------------------------------------

struct Echo;

impl Sink for Echo {
    fn deliver(&self, events: &mut Vec<Event>) {
        let mut session = None;
        for event in events.drain(..) {
            if let Event::Incoming(incoming) = event {
                incoming
                    .session
                    .queue(frame(incoming.frame.request))
                    .expect("there is room");
                session = Some(incoming.session);
            }
        }
        session.iter().for_each(Session::flush);
    }
}

struct OnTheSpot {
    guest: std::sync::Mutex<Guest>,
    done: mpsc::Sender<u64>,
}

impl Sink for OnTheSpot {
    fn deliver(&self, events: &mut Vec<Event>) {
        let mut guest = self.guest.lock().expect("no panic");
        let mut session = None;
        for event in events.drain(..) {
            match event {
                Event::Up(up) => session = Some(up),
                Event::Incoming(incoming) => {
                    guest.back += 1;
                    session = Some(incoming.session);
                }
                _ => {}
            }
        }
        let Some(session) = session else { return };
        match guest.next() {
            Some(count) => {
                for _ in 0..count {
                    session.queue(frame(guest.sent)).expect("there is room");
                    guest.sent += 1;
                }
                drop(guest);
                session.flush();
            }
            None => {
                let _ = self.done.send(guest.back);
            }
        }
    }
}

fn on_the_wire_thread(authority: &Authority, depth: u64, time: Duration) -> u64 {
    let (done, is_done) = mpsc::channel();
    let guest = std::sync::Mutex::new(Guest::new(depth, time));
    let nodes = two_nodes(authority, [Arc::new(OnTheSpot { guest, done }), Arc::new(Echo)]);
    let trips = is_done.recv().expect("it gets done");
    nodes.iter().for_each(Transport::stop);
    trips
}

// ---- the easy way -------------------------------------------------------------------------------------------------

/// Frames of a connection go to a shard, and what the shard sends comes through a channel.
async fn carry(
    stream: impl tokio::io::AsyncRead + tokio::io::AsyncWrite + Send + Unpin + 'static,
    to_shard: mpsc::Sender<Frame>,
    mut from_shard: tokio::sync::mpsc::Receiver<Frame>,
) {
    let (mut reader, mut writer) = tokio::io::split(stream);
    let writing = tokio::spawn(async move {
        let mut batch = Vec::new();
        while from_shard.recv_many(&mut batch, 64).await > 0 {
            let mut bytes = Vec::new();
            for frame in batch.drain(..) {
                bytes.extend_from_slice(&frame.header(1, CLUSTER));
                bytes.extend_from_slice(&frame.body);
                frame
                    .payload
                    .iter()
                    .for_each(|part| bytes.extend_from_slice(part.as_ref()));
            }
            if writer.write_all(&bytes).await.is_err() || writer.flush().await.is_err() {
                return;
            }
        }
        let _ = writer.shutdown().await;
    });
    let mut decoder = Decoder::new(Expect {
        version: 1,
        cluster: Some(CLUSTER),
        kinds: Kinds::Session,
    });
    let mut bytes = vec![0; 256 << 10];
    while let Ok(len @ 1..) = reader.read(&mut bytes).await {
        let mut rest = &bytes[..len];
        while !rest.is_empty() {
            let (taken, frame) = decoder.take(rest).expect("well formed");
            rest = &rest[taken..];
            if let Some(frame) = frame
                && to_shard.send(frame).is_err()
            {
                return;
            }
        }
    }
    writing.abort();
}

fn over_tokio(authority: &Authority, depth: u64, time: Duration) -> u64 {
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .expect("a runtime");
    let listener = runtime
        .block_on(tokio::net::TcpListener::bind("127.0.0.1:0"))
        .expect("a port");
    let address: SocketAddr = listener.local_addr().expect("an address");
    let (server, client) = (credentials(authority, 2), credentials(authority, 1));
    let ((to_near, near), (to_far, far)) = (mpsc::channel::<Frame>(), mpsc::channel::<Frame>());
    let (near_out, from_near) = tokio::sync::mpsc::channel(1024);
    let (far_out, from_far) = tokio::sync::mpsc::channel(1024);
    runtime.spawn(async move {
        let (socket, _) = listener.accept().await.expect("it is dialled");
        socket.set_nodelay(true).expect("a socket");
        let stream = server.acceptor().accept(socket).await.expect("TLS");
        carry(stream, to_far, from_far).await;
    });
    runtime.spawn(async move {
        let socket = tokio::net::TcpStream::connect(address).await.expect("it listens");
        socket.set_nodelay(true).expect("a socket");
        let (connector, name) = client.connector();
        let stream = connector.connect(name, socket).await.expect("TLS");
        carry(stream, to_near, from_near).await;
    });
    let shard = std::thread::spawn(move || {
        while let Ok(incoming) = far.recv() {
            if far_out.blocking_send(frame(incoming.request)).is_err() {
                return;
            }
        }
    });
    let mut guest = Guest::new(depth, time);
    while let Some(count) = guest.next() {
        for _ in 0..count {
            near_out.blocking_send(frame(guest.sent)).expect("it is up");
            guest.sent += 1;
        }
        near.recv().expect("it comes back");
        guest.back += 1;
        guest.back += near.try_iter().count() as u64;
    }
    drop(near_out);
    runtime.shutdown_background();
    shard.join().expect("it ends");
    guest.back
}

/// The same TLS for both.
trait ForTokio {
    fn acceptor(&self) -> tokio_rustls::TlsAcceptor;
    fn connector(&self) -> (tokio_rustls::TlsConnector, rustls::pki_types::ServerName<'static>);
}

impl ForTokio for Credentials {
    fn acceptor(&self) -> tokio_rustls::TlsAcceptor {
        self.server_config().into()
    }

    fn connector(&self) -> (tokio_rustls::TlsConnector, rustls::pki_types::ServerName<'static>) {
        let name = rustls::pki_types::ServerName::try_from("node").expect("a name");
        (self.client_config().into(), name)
    }
}
