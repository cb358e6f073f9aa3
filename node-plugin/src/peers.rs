//! What this node has to talk to others: an identity, a port, connections, and an address that they know.
//!
//! ```text
//! the API server says which node we are ─► transport listens as that node ─► pools say where (status.endpoint)
//!                                     └──► enrolment keeps the wallet full
//! ```
//!
//! A process whose token names no node (started by hand, not in a pod) goes on without: it serves its own replicas and
//! talks to nobody.

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr, TcpListener};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, SystemTime};

use anyhow::{Context, Result};
use galleonfs_api::Endpoint;
use kube::Client;
use prometheus::{IntCounter, IntGauge, Registry, TextEncoder};
use uuid::Uuid;

use crate::engine::{Dial, Network};
use crate::identity::{EnrolError, Enrolment, Progress, Wallet, node_uid};
use crate::registry::OwnEndpoint;
use crate::transport::exchange::Exchange;
use crate::transport::{Counts, Transport, TransportConfig};

/// Before the API server is asked again which node we are; longer if it has said that it does not know.
const ASK_AGAIN_AFTER: Duration = Duration::from_secs(2);
const NOT_KNOWN_AGAIN_AFTER: Duration = Duration::from_secs(300);

/// One per process. Cheap to clone; all clones are one.
#[derive(Clone, Debug)]
pub struct Peers(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    exchange: Exchange,
    wallet: Wallet,
    progress: Progress,
    endpoint: OwnEndpoint,
    transport: OnceLock<Transport>,
    /// Nodes that are to be connected to; told to the transport as soon as there is one.
    wanted: Mutex<BTreeMap<Uuid, Vec<SocketAddr>>>,
    /// Taken by the transport once it is known who we are. Held from the start, so that a port which is taken is told then.
    listener: Mutex<Option<TcpListener>>,
    reached_at: Option<IpAddr>,
    /// Certificate and key, for our successor.
    file: PathBuf,
}

impl Peers {
    /// Knows nobody yet. Other nodes reach this one under `reached_at`; `file` holds its certificate and key.
    pub fn new(reached_at: Option<IpAddr>, file: PathBuf) -> Peers {
        Peers(Arc::new(Inner {
            exchange: Exchange::default(),
            wallet: Wallet::default(),
            progress: Progress::default(),
            endpoint: OwnEndpoint::default(),
            transport: OnceLock::new(),
            wanted: Mutex::default(),
            listener: Mutex::default(),
            reached_at,
            file,
        }))
    }

    /// Takes the port, once, before [`Peers::run`].
    pub fn bind(&self, address: SocketAddr) -> Result<()> {
        let listener = TcpListener::bind(address).with_context(|| format!("listening on {address} for other nodes"))?;
        *self.0.listener.lock().unwrap_or_else(PoisonError::into_inner) = Some(listener);
        Ok(())
    }

    /// The way to other nodes, for the engine.
    pub fn network(&self) -> Network {
        Network {
            exchange: self.0.exchange.clone(),
            dial: Some(Arc::new(self.clone())),
        }
    }

    /// Where frames arrive, and which sessions there are.
    pub fn exchange(&self) -> &Exchange {
        &self.0.exchange
    }

    /// The connections, once it is known which node this is.
    pub fn transport(&self) -> Option<&Transport> {
        self.0.transport.get()
    }

    /// Where others reach this node, once that is known.
    pub fn endpoint(&self) -> &OwnEndpoint {
        &self.0.endpoint
    }

    /// Finds out who we are, then listens, and has a valid certificate for ever.
    pub async fn run(self, client: Client, namespace: String, cluster: Uuid) -> Result<()> {
        let node = self.who(&client).await;
        self.listen(cluster, node)?;
        let enrolment = Enrolment {
            client,
            namespace,
            cluster,
            file: self.0.file.clone(),
            wallet: self.0.wallet.clone(),
            progress: self.0.progress.clone(),
        };
        enrolment.run(node).await;
        Ok(())
    }

    async fn who(&self, client: &Client) -> Uuid {
        loop {
            let again = match node_uid(client).await {
                Ok(node) => return node,
                Err(error @ EnrolError::NoNode) => {
                    tracing::warn!(%error, "this node talks to no other");
                    NOT_KNOWN_AGAIN_AFTER
                }
                Err(error) => {
                    tracing::warn!(%error, "which node this is cannot be told yet");
                    ASK_AGAIN_AFTER
                }
            };
            tokio::time::sleep(again).await;
        }
    }

    fn listen(&self, cluster: Uuid, node: Uuid) -> Result<()> {
        let listener = self.0.listener.lock().unwrap_or_else(PoisonError::into_inner).take();
        let listener = listener.context("the port for other nodes is taken once")?;
        let port = listener.local_addr().context("asking for our own port")?.port();
        let config = TransportConfig::new(cluster, node);
        let sink = Arc::new(self.0.exchange.clone());
        let transport = Transport::start(config, self.0.wallet.clone(), Some(listener), sink)
            .context("starting to talk to other nodes")?;
        {
            let wanted = self.wanted();
            for (node, addresses) in wanted.iter() {
                transport.dial(*node, addresses.clone());
            }
            assert!(self.0.transport.set(transport).is_ok(), "there is one transport");
        }
        if let Some(address) = self.0.reached_at {
            let endpoint = Endpoint {
                address: SocketAddr::new(address, port).to_string(),
                node_uid: node.to_string(),
            };
            assert!(self.0.endpoint.set(endpoint).is_ok(), "there is one endpoint");
        }
        Ok(())
    }

    fn wanted(&self) -> MutexGuard<'_, BTreeMap<Uuid, Vec<SocketAddr>>> {
        self.0.wanted.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Ends all connections, with a word to everybody.
    pub fn stop(&self) {
        if let Some(transport) = self.0.transport.get() {
            transport.stop();
        }
    }

    /// For the metrics page.
    pub fn metrics(&self) -> Result<String, prometheus::Error> {
        let registry = Registry::new();
        let counts = self.0.transport.get().map(Transport::counts).unwrap_or_default();
        let Counts {
            frames_sent,
            bytes_sent,
            frames_received,
            bytes_received,
            sessions,
            refused,
            failed_dials,
            full,
        } = counts;
        for (name, help, value) in [
            (
                "galleonfs_wire_sent_frames_total",
                "Frames sent to other nodes.",
                frames_sent,
            ),
            (
                "galleonfs_wire_sent_bytes_total",
                "Bytes sent to other nodes, before TLS.",
                bytes_sent,
            ),
            (
                "galleonfs_wire_received_frames_total",
                "Frames received of other nodes.",
                frames_received,
            ),
            (
                "galleonfs_wire_received_bytes_total",
                "Bytes received of other nodes, after TLS.",
                bytes_received,
            ),
            (
                "galleonfs_wire_sessions_total",
                "Connections on which both ends knew each other.",
                sessions,
            ),
            (
                "galleonfs_wire_refused_total",
                "Connections that ended for what came, or for who it was.",
                refused,
            ),
            (
                "galleonfs_wire_failed_dials_total",
                "Attempts to reach another node that failed.",
                failed_dials,
            ),
            (
                "galleonfs_wire_queue_full_total",
                "Frames that found their queue full.",
                full,
            ),
            (
                "galleonfs_wire_unclaimed_frames_total",
                "Frames for volumes that are not served here.",
                self.0.exchange.unclaimed(),
            ),
            (
                "galleonfs_wire_refused_messages_total",
                "Frames that are no message of replication, or that ask for what cannot be.",
                self.0.exchange.refused(),
            ),
        ] {
            let counter = IntCounter::new(name, help)?;
            counter.inc_by(value);
            registry.register(Box::new(counter))?;
        }
        if let Some(credentials) = self.0.wallet.current() {
            let ends = IntGauge::new(
                "galleonfs_node_certificate_ends_seconds",
                "When this node's certificate ends, in seconds since 1970.",
            )?;
            let end = credentials.own().not_after.duration_since(SystemTime::UNIX_EPOCH);
            ends.set(end.map_or(0, |end| i64::try_from(end.as_secs()).unwrap_or(i64::MAX)));
            registry.register(Box::new(ends))?;
        }
        let trouble = IntGauge::new(
            "galleonfs_node_certificate_trouble",
            "1 while this node cannot get a certificate, or no new one.",
        )?;
        trouble.set(self.0.progress.trouble().is_some().into());
        registry.register(Box::new(trouble))?;
        TextEncoder::new().encode_to_string(&registry.gather())
    }
}

/// What is wanted before there is a transport is kept for it.
impl Dial for Peers {
    fn dial(&self, node: Uuid, addresses: Vec<SocketAddr>) {
        let mut wanted = self.wanted();
        wanted.insert(node, addresses.clone());
        if let Some(transport) = self.0.transport.get() {
            transport.dial(node, addresses);
        }
    }

    fn forget(&self, node: Uuid) {
        let mut wanted = self.wanted();
        wanted.remove(&node);
        if let Some(transport) = self.0.transport.get() {
            transport.forget(node);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::temp_dir;

    #[test]
    fn a_node_that_knows_who_it_is_listens_and_says_where() {
        let dir = temp_dir("peers");
        let any = "127.0.0.1:0".parse().expect("an address");
        let peers = Peers::new(Some([192, 0, 2, 7].into()), dir.path().join("identity.pem"));
        peers.bind(any).expect("a port");
        assert!(peers.endpoint().get().is_none() && peers.transport().is_none());
        let node = Uuid::from_u128(5);
        peers.listen(Uuid::from_u128(1), node).expect("it starts");
        let port = peers
            .transport()
            .and_then(Transport::address)
            .expect("it listens")
            .port();
        let endpoint = peers.endpoint().get().expect("known now");
        assert_eq!(endpoint.address, format!("192.0.2.7:{port}"));
        assert_eq!(endpoint.node_uid, node.to_string());
        let page = peers.metrics().expect("a page");
        assert!(page.contains("galleonfs_wire_sent_frames_total 0"), "{page}");
        assert!(page.contains("galleonfs_node_certificate_trouble 0"), "{page}");
        peers.stop();
    }

    #[test]
    fn a_port_that_is_taken_is_told_at_once() {
        let dir = temp_dir("peers");
        let taken = TcpListener::bind("127.0.0.1:0").expect("a port");
        let address = taken.local_addr().expect("it has an address");
        let peers = Peers::new(None, dir.path().join("identity.pem"));
        let refused = peers.bind(address).expect_err("it is taken");
        assert!(refused.to_string().contains(&address.to_string()), "{refused}");
    }
}
