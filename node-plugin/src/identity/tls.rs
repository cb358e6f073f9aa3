//! TLS as nodes speak it: version 1.3, certificates on both sides, nothing resumed.
//!
//! A resumed session would skip the look at the certificate, so there are no tickets. The node's name in a certificate is
//! no host name; who the other end is, is compared behind the handshake, where the reason can be told in words (see
//! `transport::hello`). Here it is only made sure that the cluster's authority signed it, for this use, and that its time
//! has come and not gone.

use std::sync::Arc;

use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::client::{Resumption, verify_server_cert_signed_by_trust_anchor};
use rustls::crypto::{CryptoProvider, WebPkiSupportedAlgorithms, ring, verify_tls13_signature};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime};
use rustls::server::{NoServerSessionStorage, ParsedCertificate, WebPkiClientVerifier};
use rustls::version::TLS13;
use rustls::{ClientConfig, ClientConnection, DigitallySignedStruct, RootCertStore, ServerConfig, SignatureScheme};

use super::certificate::{Certified, certified};

/// Spoken by nodes only: whoever reaches this port with another protocol is told by TLS.
const PROTOCOL: &[u8] = b"galleonfs-node";

/// Why a key, a certificate and what is trusted do not make credentials.
#[derive(Debug, thiserror::Error)]
pub enum CredentialsError {
    #[error("the certificate is not usable: {0}")]
    Certificate(String),
    #[error("the key is not usable: {0}")]
    Key(String),
    #[error("what is trusted cannot be used: {0}")]
    Trusted(String),
    #[error("setting up TLS: {0}")]
    Tls(#[from] rustls::Error),
}

/// What a node shows, and what it trusts.
#[derive(Debug)]
pub struct Credentials {
    own: Certified,
    client: Arc<ClientConfig>,
    server: Arc<ServerConfig>,
}

impl Credentials {
    /// Of PEM texts: the node's certificate, its key, and the certificates of the authorities to trust. A certificate that
    /// those did not sign, or that is not valid now, is refused here and not by every peer.
    pub fn new(certificate: &str, key: &str, trusted: &str) -> Result<Credentials, CredentialsError> {
        let chain: Vec<_> = CertificateDer::pem_slice_iter(certificate.as_bytes())
            .collect::<Result<_, _>>()
            .map_err(|error| CredentialsError::Certificate(error.to_string()))?;
        let first = chain
            .first()
            .ok_or_else(|| CredentialsError::Certificate("there is none".to_owned()))?;
        let own = certified(first).map_err(CredentialsError::Certificate)?;
        let key =
            PrivateKeyDer::from_pem_slice(key.as_bytes()).map_err(|error| CredentialsError::Key(error.to_string()))?;
        let mut roots = RootCertStore::empty();
        for authority in CertificateDer::pem_slice_iter(trusted.as_bytes()) {
            authority
                .map_err(|error| error.to_string())
                .and_then(|authority| roots.add(authority).map_err(|error| error.to_string()))
                .map_err(CredentialsError::Trusted)?;
        }
        let (roots, provider) = (Arc::new(roots), provider());
        let clients = WebPkiClientVerifier::builder_with_provider(roots.clone(), provider.clone())
            .build()
            .map_err(|error| CredentialsError::Trusted(error.to_string()))?;
        let servers = Arc::new(Servers {
            roots,
            algorithms: provider.signature_verification_algorithms,
        });
        servers
            .verify_server_cert(first, &chain[1..], &nobody(), &[], UnixTime::now())
            .map_err(|error| CredentialsError::Certificate(error.to_string()))?;

        let mut server = ServerConfig::builder_with_provider(provider.clone())
            .with_protocol_versions(&[&TLS13])?
            .with_client_cert_verifier(clients)
            .with_single_cert(chain.clone(), key.clone_key())?;
        server.alpn_protocols = vec![PROTOCOL.to_vec()];
        server.session_storage = Arc::new(NoServerSessionStorage {});
        server.send_tls13_tickets = 0;
        let mut client = ClientConfig::builder_with_provider(provider)
            .with_protocol_versions(&[&TLS13])?
            .dangerous()
            .with_custom_certificate_verifier(servers)
            .with_client_auth_cert(chain, key)?;
        client.alpn_protocols = vec![PROTOCOL.to_vec()];
        client.resumption = Resumption::disabled();
        client.enable_sni = false;
        Ok(Credentials {
            own,
            client: Arc::new(client),
            server: Arc::new(server),
        })
    }

    /// What the certificate says.
    pub fn own(&self) -> &Certified {
        &self.own
    }

    /// How the dialling end is set up.
    pub fn client_config(&self) -> Arc<ClientConfig> {
        self.client.clone()
    }

    /// How the accepting end is set up.
    pub fn server_config(&self) -> Arc<ServerConfig> {
        self.server.clone()
    }

    /// The dialling end of a new connection.
    pub fn dial(&self) -> Result<ClientConnection, rustls::Error> {
        ClientConnection::new(self.client.clone(), nobody())
    }

    /// The accepting end of a new connection.
    pub fn accept(&self) -> Result<rustls::ServerConnection, rustls::Error> {
        rustls::ServerConnection::new(self.server.clone())
    }
}

/// A name has to be given, and is neither sent nor looked at.
fn nobody() -> ServerName<'static> {
    ServerName::IpAddress(std::net::Ipv4Addr::UNSPECIFIED.into())
}

/// What TLS is made of: the provider that is in the tree, with the fastest cipher that processors of servers have first.
/// 128 bits are enough for keys that live as long as a connection.
fn provider() -> Arc<CryptoProvider> {
    let mut provider = ring::default_provider();
    provider.cipher_suites = vec![
        ring::cipher_suite::TLS13_AES_128_GCM_SHA256,
        ring::cipher_suite::TLS13_AES_256_GCM_SHA384,
        ring::cipher_suite::TLS13_CHACHA20_POLY1305_SHA256,
    ];
    Arc::new(provider)
}

/// Looks at the certificate of a node that was dialled: all but the name.
#[derive(Debug)]
struct Servers {
    roots: Arc<RootCertStore>,
    algorithms: WebPkiSupportedAlgorithms,
}

impl ServerCertVerifier for Servers {
    fn verify_server_cert(
        &self,
        certificate: &CertificateDer<'_>,
        others: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        let parsed = ParsedCertificate::try_from(certificate)?;
        verify_server_cert_signed_by_trust_anchor(&parsed, &self.roots, others, now, self.algorithms.all)?;
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Err(rustls::Error::General("only TLS 1.3 is spoken".to_owned()))
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls13_signature(message, certificate, signed, &self.algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.algorithms.supported_schemes()
    }
}
