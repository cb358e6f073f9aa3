//! The loop of the leader that keeps the authority and answers what nodes ask for.
//!
//! The key of the authority is in one Secret, read when something is to be signed and held no longer. What nodes trust is
//! in one ConfigMap, written before the first certificate is signed. Every write is conditional on what was read, so two
//! controllers that both believe to lead make one authority and give one answer to each request.

use std::{
    sync::Arc,
    time::{Duration, SystemTime},
};

use futures::StreamExt;
use galleonfs_api::{
    LABEL_MANAGED_BY, MANAGED_BY,
    identity::{NODE_CA, NODE_CA_BUNDLE, NODE_SIGNER},
};
use k8s_openapi::{
    ByteString,
    api::{
        certificates::v1::{CertificateSigningRequest, CertificateSigningRequestCondition},
        core::v1::{ConfigMap, Namespace, Node, Secret},
    },
    apimachinery::pkg::apis::meta::v1::Time,
    jiff::Timestamp,
};
use kube::{
    Api, Client, ResourceExt,
    api::{ObjectMeta, PostParams},
    runtime::{
        controller::{Action, Controller},
        watcher,
    },
};
use uuid::Uuid;

use super::{
    generations::{Generations, Times},
    judge::{Approved, Known, Request, judge},
};
use crate::{
    cluster::{get, replace},
    error::{Error, Kind, Result, is_already_exists, is_conflict},
    metrics::Metrics,
};

/// How often the authority is looked at: its steps take days.
const LOOK_EVERY: Duration = Duration::from_secs(3600);

/// How often to try when the API server does not answer.
const AGAIN_AFTER: Duration = Duration::from_secs(5);

/// Requests looked at at once.
const CONCURRENCY: u16 = 4;

/// Attempts to write what somebody else writes, too.
const TRIES_MAX: usize = 20;

/// The words of conditions of a CertificateSigningRequest.
const APPROVED: &str = "Approved";
const DENIED: &str = "Denied";
const FAILED: &str = "Failed";

/// What the loop works with.
pub struct Issuer {
    requests: Api<CertificateSigningRequest>,
    secrets: Api<Secret>,
    config_maps: Api<ConfigMap>,
    nodes: Api<Node>,
    namespaces: Api<Namespace>,
    /// The user name of the node plugins' service account.
    account: String,
    times: Times,
    metrics: Metrics,
}

impl std::fmt::Debug for Issuer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Issuer")
            .field("account", &self.account)
            .finish_non_exhaustive()
    }
}

impl Issuer {
    pub fn new(client: Client, namespace: &str, service_account: &str, times: Times, metrics: Metrics) -> Self {
        Self {
            requests: Api::all(client.clone()),
            secrets: Api::namespaced(client.clone(), namespace),
            config_maps: Api::namespaced(client.clone(), namespace),
            nodes: Api::all(client.clone()),
            namespaces: Api::all(client),
            account: format!("system:serviceaccount:{namespace}:{service_account}"),
            times,
            metrics,
        }
    }

    /// Runs until dropped.
    pub async fn run(self) {
        let issuer = Arc::new(self);
        // Before anything is signed: what is signed by somebody whom nobody knows is of no use.
        while let Err(error) = issuer.keep().await {
            tracing::warn!(
                error = error.full_text(),
                "the nodes' authority cannot be looked at; trying again"
            );
            tokio::time::sleep(AGAIN_AFTER).await;
        }
        let keeping = async {
            loop {
                tokio::time::sleep(LOOK_EVERY).await;
                if let Err(error) = issuer.keep().await {
                    tracing::warn!(error = error.full_text(), "the nodes' authority cannot be looked at");
                }
            }
        };
        let ours = watcher::Config::default().fields(&format!("spec.signerName={NODE_SIGNER}"));
        let answering = Controller::new(issuer.requests.clone(), ours)
            .with_config(kube::runtime::controller::Config::default().concurrency(CONCURRENCY))
            .run(answer, failed, issuer.clone())
            .for_each(|result| async {
                if let Err(kube::runtime::controller::Error::QueueError(error)) = result {
                    tracing::warn!(%error, "watching requests for certificates failed; trying again");
                }
            });
        tokio::join!(keeping, answering);
    }

    async fn cluster(&self) -> Result<Uuid> {
        let system = get(&self.namespaces, "kube-system").await?;
        let uid = system.and_then(|system| system.uid()).unwrap_or_default();
        uid.parse().map_err(|_| {
            Error::new(
                Kind::Internal,
                format!("kube-system has the uid {uid:?}, which is none"),
            )
        })
    }

    /// Has an authority, takes the step that is due, and makes it known. Gives all generations.
    async fn keep(&self) -> Result<Generations> {
        let cluster = self.cluster().await?;
        for _ in 0..TRIES_MAX {
            let now = SystemTime::now();
            let Some(mut secret) = get(&self.secrets, NODE_CA).await? else {
                let first = Generations::first(cluster, now, &self.times).map_err(|error| of_authority(&error))?;
                let secret = Secret {
                    metadata: metadata(),
                    type_: Some("galleonfs.io/node-ca".to_owned()),
                    data: Some(first.data()),
                    ..Secret::default()
                };
                match self.secrets.create(&PostParams::default(), &secret).await {
                    Ok(_) => tracing::info!("made the authority for certificates of nodes"),
                    // Somebody was faster: then it is that one.
                    Err(error) if is_already_exists(&error) => {}
                    Err(error) => return Err(Error::api(format!("creating Secret {NODE_CA}"), error)),
                }
                continue;
            };
            let mut generations = self.generations(&secret)?;
            if generations
                .step(cluster, now, &self.times)
                .map_err(|error| of_authority(&error))?
            {
                secret.data = Some(generations.data());
                // If somebody else has written, what is due is looked at anew.
                if replace(&self.secrets, &secret).await?.is_some() {
                    tracing::info!(?generations, "the nodes' authority has changed");
                }
                continue;
            }
            if self.make_known(&generations.bundle()).await? {
                return Ok(generations);
            }
        }
        Err(Error::new(
            Kind::Busy,
            format!("Secret {NODE_CA} changes faster than it can be written"),
        ))
    }

    fn generations(&self, secret: &Secret) -> Result<Generations> {
        let empty = Default::default();
        // Never made anew over one that cannot be read: every node trusts the old one.
        Generations::of_data(secret.data.as_ref().unwrap_or(&empty)).map_err(|error| of_authority(&error))
    }

    /// Writes what nodes trust. False: somebody else has just written.
    async fn make_known(&self, bundle: &str) -> Result<bool> {
        let Some(mut map) = get(&self.config_maps, NODE_CA).await? else {
            let map = ConfigMap {
                metadata: metadata(),
                data: Some([(NODE_CA_BUNDLE.to_owned(), bundle.to_owned())].into()),
                ..ConfigMap::default()
            };
            return match self.config_maps.create(&PostParams::default(), &map).await {
                Ok(_) => Ok(true),
                Err(error) if is_already_exists(&error) => Ok(false),
                Err(error) => Err(Error::api(format!("creating ConfigMap {NODE_CA}"), error)),
            };
        };
        let data = map.data.get_or_insert_default();
        if data.get(NODE_CA_BUNDLE).is_some_and(|there| there == bundle) {
            return Ok(true);
        }
        data.insert(NODE_CA_BUNDLE.to_owned(), bundle.to_owned());
        Ok(replace(&self.config_maps, &map).await?.is_some())
    }

    /// Looks at one request as it is now, and takes the step that is due.
    async fn step(&self, name: &str) -> Result<()> {
        let Some(request) = get(&self.requests, name).await? else {
            return Ok(());
        };
        let status = request.status.clone().unwrap_or_default();
        let conditions = status.conditions.unwrap_or_default();
        let has = |type_: &str| conditions.iter().any(|condition| condition.type_ == type_);
        if status.certificate.is_some() || has(DENIED) || has(FAILED) {
            return Ok(());
        }
        let found = self.judged(&request).await?;
        match (found, has(APPROVED)) {
            (Ok(approved), true) => self.sign(request, &approved).await,
            // The next event signs it.
            (Ok(approved), false) => {
                let message = format!("certificate of {}", approved.identity);
                self.conclude(request, APPROVED, "NodePlugin", &message, "approval")
                    .await
            }
            (Err(why), false) => {
                tracing::warn!(request = name, why, "a request for a node's certificate is denied");
                self.conclude(request, DENIED, "NotThisNode", &why, "approval").await
            }
            // Somebody has approved by hand what must not be signed. An approval cannot be taken back.
            (Err(why), true) => {
                tracing::warn!(
                    request = name,
                    why,
                    "an approved request for a node's certificate is not signed"
                );
                self.conclude(request, FAILED, "NotThisNode", &why, "status").await
            }
        }
    }

    async fn judged(&self, request: &CertificateSigningRequest) -> Result<Result<Approved, String>> {
        let spec = &request.spec;
        let request = Request {
            username: spec.username.clone().unwrap_or_default(),
            extra: spec.extra.clone().unwrap_or_default(),
            usages: spec.usages.clone().unwrap_or_default(),
            pem: spec.request.0.clone(),
        };
        let node = match request.node_name() {
            Some(name) if galleonfs_api::name::is_dns_subdomain(name) => get(&self.nodes, name).await?,
            _ => None,
        };
        let known = Known {
            cluster: self.cluster().await?,
            account: self.account.clone(),
            node: node.and_then(|node| node.uid()).and_then(|uid| uid.parse().ok()),
        };
        Ok(judge(&request, &known))
    }

    async fn sign(&self, mut request: CertificateSigningRequest, approved: &Approved) -> Result<()> {
        let life = request
            .spec
            .expiration_seconds
            .and_then(|seconds| u64::try_from(seconds).ok())
            .map_or(self.times.node, |seconds| {
                Duration::from_secs(seconds).min(self.times.node)
            });
        let generations = self.keep().await?;
        let certificate = generations
            .current
            .sign(approved.identity, &approved.key, SystemTime::now(), life)
            .map_err(|error| of_authority(&error))?;
        request.status.get_or_insert_default().certificate = Some(ByteString(certificate.into_bytes()));
        if self.write(&request, "status").await? {
            tracing::info!(node = %approved.identity.node, "signed a certificate");
        }
        Ok(())
    }

    async fn conclude(
        &self,
        mut request: CertificateSigningRequest,
        type_: &str,
        reason: &str,
        message: &str,
        part: &str,
    ) -> Result<()> {
        let now = Some(Time(Timestamp::now()));
        let condition = CertificateSigningRequestCondition {
            type_: type_.to_owned(),
            status: "True".to_owned(),
            reason: Some(reason.to_owned()),
            message: Some(message.to_owned()),
            last_transition_time: now.clone(),
            last_update_time: now,
        };
        let status = request.status.get_or_insert_default();
        status.conditions.get_or_insert_default().push(condition);
        self.write(&request, part).await.map(|_| ())
    }

    /// Writes a part of a request under the version that was read. False: somebody else has, and that comes as an event.
    async fn write(&self, request: &CertificateSigningRequest, part: &str) -> Result<bool> {
        let name = request.name_any();
        let written = self
            .requests
            .replace_subresource(part, &name, &PostParams::default(), request)
            .await;
        match written {
            Ok(_) => Ok(true),
            Err(error) if is_conflict(&error) => Ok(false),
            Err(error) => Err(Error::api(
                format!("writing the {part} of CertificateSigningRequest {name}"),
                error,
            )),
        }
    }
}

fn metadata() -> ObjectMeta {
    ObjectMeta {
        name: Some(NODE_CA.to_owned()),
        labels: Some([(LABEL_MANAGED_BY.to_owned(), MANAGED_BY.to_owned())].into()),
        ..ObjectMeta::default()
    }
}

fn of_authority(error: &super::authority::AuthorityError) -> Error {
    Error::new(
        Kind::Internal,
        format!("the nodes' authority in Secret {NODE_CA}: {error}"),
    )
}

async fn answer(request: Arc<CertificateSigningRequest>, issuer: Arc<Issuer>) -> Result<Action> {
    issuer.step(&request.name_any()).await?;
    issuer.metrics.reconciled("certificate", "ok");
    Ok(Action::await_change())
}

fn failed(request: Arc<CertificateSigningRequest>, error: &Error, issuer: Arc<Issuer>) -> Action {
    issuer.metrics.reconciled("certificate", "error");
    tracing::warn!(
        request = request.name_any(),
        error = error.full_text(),
        "a request for a certificate could not be answered; trying again"
    );
    Action::requeue(AGAIN_AFTER)
}
