//! How this node gets its certificate, and the next one.
//!
//! ```text
//! who am I? (the API server says it, of our token) ─► key pair, request ─► wait ─► certificate ─► wallet, file
//!                                                        ▲                                          │
//!                                                        └──────── when half of its life is over ◄──┘
//! ```
//!
//! The key is made here and leaves this process only into a file that root alone can read, beside the certificate: a node
//! plugin that starts again goes on with what its predecessor had, and needs no controller for it.

use std::fs;
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, SystemTime};

use galleonfs_api::NodeIdentity;
use galleonfs_api::identity::{BACKDATED, CLAIM_NODE_UID, NODE_CA, NODE_CA_BUNDLE, NODE_SIGNER, NODE_USAGES};
use k8s_openapi::ByteString;
use k8s_openapi::api::authentication::v1::SelfSubjectReview;
use k8s_openapi::api::certificates::v1::{CertificateSigningRequest, CertificateSigningRequestSpec};
use k8s_openapi::api::core::v1::ConfigMap;
use kube::api::{ObjectMeta, PostParams};
use kube::{Api, Client, ResourceExt};
use rcgen::{CertificateParams, DistinguishedName, KeyPair, SanType};
use uuid::Uuid;
use zeroize::Zeroizing;

use super::{Credentials, Wallet};

/// How long one request to the API server may take.
const REQUEST_DEADLINE: Duration = Duration::from_secs(15);

/// Between two looks at our request: the controller answers within a moment, or is not there.
const LOOK_FIRST: Duration = Duration::from_millis(100);
const LOOK_MAX: Duration = Duration::from_secs(5);

/// Before trying again what went wrong.
const AGAIN_FIRST: Duration = Duration::from_secs(1);
const AGAIN_MAX: Duration = Duration::from_secs(300);

/// How often is looked whether others are trusted now. A new authority is made known days before it signs.
const TRUST_EVERY: Duration = Duration::from_secs(1800);

/// What an enrolment needs.
#[derive(Clone)]
pub struct Enrolment {
    pub client: Client,
    /// The namespace that GalleonFS is installed in.
    pub namespace: String,
    pub cluster: Uuid,
    /// Certificate and key, for our successor.
    pub file: PathBuf,
    pub wallet: Wallet,
    pub progress: Progress,
}

impl std::fmt::Debug for Enrolment {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Enrolment")
            .field("file", &self.file)
            .finish_non_exhaustive()
    }
}

/// How it goes, for a person to see. Cheap to clone; all clones are one.
#[derive(Clone, Debug, Default)]
pub struct Progress(Arc<Mutex<Option<String>>>);

impl Progress {
    /// Why there is no certificate, or no new one, if something is wrong.
    pub fn trouble(&self) -> Option<String> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn set(&self, trouble: Option<String>) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = trouble;
    }
}

/// Why there is no certificate yet.
#[derive(Debug, thiserror::Error)]
pub enum EnrolError {
    #[error("{doing}")]
    Api {
        doing: &'static str,
        #[source]
        source: Box<kube::Error>,
    },
    #[error("{0}: no answer within {REQUEST_DEADLINE:?}")]
    NoAnswer(&'static str),
    #[error(
        "this process's token does not say which node it is on (claim {CLAIM_NODE_UID}); it must be the one that the \
         kubelet projects into the pod"
    )]
    NoNode,
    #[error("the controller denied the certificate: {0}")]
    Denied(String),
    #[error("the controller has not made ConfigMap {NODE_CA} yet")]
    NoAuthority,
    #[error("the request for a certificate has gone before it was answered")]
    Gone,
    #[error("{0}")]
    Unusable(String),
    #[error("keeping the certificate in {path}")]
    File {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
}

/// One request to the API server, within its time.
async fn ask<T>(doing: &'static str, request: impl Future<Output = Result<T, kube::Error>>) -> Result<T, EnrolError> {
    match tokio::time::timeout(REQUEST_DEADLINE, request).await {
        Ok(answer) => answer.map_err(|source| EnrolError::Api {
            doing,
            source: Box::new(source),
        }),
        Err(_) => Err(EnrolError::NoAnswer(doing)),
    }
}

/// Which node this process is on, as the API server reads it in our token.
pub async fn node_uid(client: &Client) -> Result<Uuid, EnrolError> {
    let reviews: Api<SelfSubjectReview> = Api::all(client.clone());
    let review = ask(
        "asking who we are",
        reviews.create(&PostParams::default(), &SelfSubjectReview::default()),
    )
    .await?;
    let extra = review
        .status
        .and_then(|status| status.user_info)
        .and_then(|user| user.extra);
    let claim = extra.and_then(|mut extra| extra.remove(CLAIM_NODE_UID));
    match claim.as_deref() {
        Some([uid]) => uid.parse().map_err(|_| EnrolError::NoNode),
        _ => Err(EnrolError::NoNode),
    }
}

/// A certificate with its key, in PEM. The key is wiped from memory with it.
struct Pair {
    certificate: String,
    key: Zeroizing<String>,
}

impl Enrolment {
    /// Has a certificate of `node` in the wallet, always a valid one, for ever.
    pub async fn run(self, node: Uuid) {
        let identity = NodeIdentity {
            cluster: self.cluster,
            node,
        };
        let mut again = AGAIN_FIRST;
        let mut pair = self.kept();
        loop {
            match self.round(identity, &mut pair).await {
                Ok(next) => {
                    self.progress.set(None);
                    again = AGAIN_FIRST;
                    tokio::time::sleep(next).await;
                }
                Err(error) => {
                    let text = format!("{:#}", anyhow::Error::new(error));
                    tracing::warn!(%node, error = text, again_in = ?again, "no certificate for this node");
                    self.progress.set(Some(text));
                    tokio::time::sleep(again).await;
                    again = (again * 2).min(AGAIN_MAX);
                }
            }
        }
    }

    /// Looks at what there is, and renews what is to be renewed. Gives when to look again.
    async fn round(&self, identity: NodeIdentity, pair: &mut Option<Pair>) -> Result<Duration, EnrolError> {
        let trusted = self.trusted().await?;
        let usable = pair.as_ref().and_then(|pair| {
            let credentials = Credentials::new(&pair.certificate, &pair.key, &trusted).ok()?;
            (credentials.own().identity == identity).then_some(credentials)
        });
        let mut due = Duration::ZERO;
        if let Some(credentials) = usable {
            due = renew_in(&credentials, SystemTime::now());
            self.wallet.put(credentials);
        }
        if due.is_zero() {
            let fresh = self.request(identity).await?;
            let credentials = Credentials::new(&fresh.certificate, &fresh.key, &trusted)
                .map_err(|error| EnrolError::Unusable(error.to_string()))?;
            if credentials.own().identity != identity {
                let text = format!(
                    "the certificate is of {}, not of {identity}",
                    credentials.own().identity
                );
                return Err(EnrolError::Unusable(text));
            }
            due = renew_in(&credentials, SystemTime::now());
            tracing::info!(%identity, until = ?credentials.own().not_after, "this node has a new certificate");
            self.wallet.put(credentials);
            self.keep(&fresh)?;
            *pair = Some(fresh);
        }
        Ok(due.clamp(LOOK_FIRST, TRUST_EVERY))
    }

    /// The certificates of whoever may have signed for a node.
    async fn trusted(&self) -> Result<String, EnrolError> {
        let maps: Api<ConfigMap> = Api::namespaced(self.client.clone(), &self.namespace);
        let map = ask("reading what nodes trust", maps.get_opt(NODE_CA)).await?;
        map.and_then(|map| map.data?.remove(NODE_CA_BUNDLE))
            .ok_or(EnrolError::NoAuthority)
    }

    /// Asks for a certificate, and waits for it as long as it takes.
    async fn request(&self, identity: NodeIdentity) -> Result<Pair, EnrolError> {
        let unusable = |error: rcgen::Error| EnrolError::Unusable(error.to_string());
        let key = KeyPair::generate().map_err(unusable)?;
        let mut params = CertificateParams::default();
        // The name, and nothing else: all the rest is for whoever signs to say.
        params.distinguished_name = DistinguishedName::new();
        params.subject_alt_names = vec![SanType::URI(identity.to_string().try_into().map_err(unusable)?)];
        let request = params.serialize_request(&key).and_then(|request| request.pem());
        let object = CertificateSigningRequest {
            metadata: ObjectMeta {
                generate_name: Some(format!("galleonfs-node-{}-", identity.node)),
                ..ObjectMeta::default()
            },
            spec: CertificateSigningRequestSpec {
                request: ByteString(request.map_err(unusable)?.into_bytes()),
                signer_name: NODE_SIGNER.to_owned(),
                usages: Some(NODE_USAGES.map(str::to_owned).to_vec()),
                ..CertificateSigningRequestSpec::default()
            },
            status: None,
        };
        let requests: Api<CertificateSigningRequest> = Api::all(self.client.clone());
        let made = ask(
            "asking for a certificate",
            requests.create(&PostParams::default(), &object),
        )
        .await?;
        let name = made.name_any();
        let mut wait = LOOK_FIRST;
        loop {
            tokio::time::sleep(wait).await;
            wait = (wait * 2).min(LOOK_MAX);
            // Who does not answer now does later; the request stays.
            let found = match ask("looking for our certificate", requests.get_opt(&name)).await {
                Ok(found) => found.ok_or(EnrolError::Gone)?,
                Err(error) => {
                    self.progress.set(Some(error.to_string()));
                    continue;
                }
            };
            let status = found.status.unwrap_or_default();
            if let Some(certificate) = status.certificate {
                let certificate = String::from_utf8(certificate.0)
                    .map_err(|_| EnrolError::Unusable("the certificate is no text".to_owned()))?;
                return Ok(Pair {
                    certificate,
                    key: Zeroizing::new(key.serialize_pem()),
                });
            }
            let over = status
                .conditions
                .unwrap_or_default()
                .into_iter()
                .find(|condition| ["Denied", "Failed"].contains(&condition.type_.as_str()));
            if let Some(over) = over {
                return Err(EnrolError::Denied(over.message.unwrap_or_default()));
            }
            let waits = format!("CertificateSigningRequest {name} waits for the controller");
            self.progress.set(Some(waits));
        }
    }

    // ---- the file ---------------------------------------------------------------------------------------------

    /// What our predecessor had. A file that is missing or broken just means a new certificate.
    fn kept(&self) -> Option<Pair> {
        const KEY: &str = "-----BEGIN PRIVATE KEY-----";
        let text = Zeroizing::new(fs::read_to_string(&self.file).ok()?);
        let at = text.find(KEY)?;
        Some(Pair {
            certificate: text[..at].to_owned(),
            key: Zeroizing::new(text[at..].to_owned()),
        })
    }

    fn keep(&self, pair: &Pair) -> Result<(), EnrolError> {
        let text = Zeroizing::new(format!("{}\n{}", pair.certificate.trim_end(), *pair.key));
        write_secret(&self.file, &text).map_err(|source| EnrolError::File {
            path: self.file.clone(),
            source,
        })
    }
}

/// Writes a file that only root can read: the whole of it or nothing.
fn write_secret(path: &Path, text: &str) -> io::Result<()> {
    let beside = path.with_extension("new");
    // Whatever a predecessor left may have other rights.
    match fs::remove_file(&beside) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let mut file = fs::OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(&beside)?;
    file.write_all(text.as_bytes())?;
    file.sync_all()?;
    fs::rename(&beside, path)
}

/// How long a certificate is good enough: half of its life, and a little less by chance, so that nodes which were set up
/// together do not all ask at once.
fn renew_in(credentials: &Credentials, now: SystemTime) -> Duration {
    let own = credentials.own();
    let life = own
        .not_after
        .duration_since(own.not_before + BACKDATED)
        .unwrap_or_default();
    let chance = f64::from(Uuid::new_v4().as_bytes()[0]) / 256.0;
    let due = own.not_after - life / 2 - life.mul_f64(chance * 0.1);
    due.duration_since(now).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::temp_dir;

    #[test]
    fn what_is_kept_is_roots_alone_and_is_replaced_whole() {
        use std::os::unix::fs::PermissionsExt;
        let dir = temp_dir("identity");
        let path = dir.path().join("identity.pem");
        fs::write(path.with_extension("new"), "half of something").expect("a leftover");
        for text in ["first", "second"] {
            write_secret(&path, text).expect("written");
            assert_eq!(fs::read_to_string(&path).expect("readable"), text);
            let mode = fs::metadata(&path).expect("there").permissions().mode();
            assert_eq!(mode & 0o777, 0o600);
        }
        assert!(!path.with_extension("new").exists());
    }
}
