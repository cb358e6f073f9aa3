//! The real API server.

use std::future::Future;
use std::time::Duration;

use futures::FutureExt;
use futures::future::BoxFuture;
use galleonfs_api::{GROUP, GalleonReplica, GalleonVolume, REPLICA_FINALIZER, StoragePool, VERSION};
use k8s_openapi::api::core::v1::{Namespace, Node, ObjectReference};
use kube::api::{ListParams, Patch, PatchParams, PostParams};
use kube::runtime::events::{Event, EventType, Recorder, Reporter};
use kube::{Api, Client, ResourceExt};
use uuid::Uuid;

use super::objects::{Notice, ObjectError, Objects, Subject};

/// How long one request may take. A server that needs longer is away for our purposes.
const REQUEST_DEADLINE: Duration = Duration::from_secs(15);

/// What an Event may say.
const NOTE_BYTES_MAX: usize = 1024;

/// The objects of the namespace that GalleonFS is installed in.
#[derive(Clone)]
pub struct Kubernetes {
    client: Client,
    namespace: String,
    recorder: Recorder,
}

impl std::fmt::Debug for Kubernetes {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Kubernetes")
            .field("namespace", &self.namespace)
            .finish_non_exhaustive()
    }
}

impl Kubernetes {
    pub fn new(client: Client, namespace: &str, node: &str) -> Kubernetes {
        let reporter = Reporter {
            controller: "galleonfs-node".into(),
            instance: Some(node.to_owned()),
        };
        let recorder = Recorder::new(client.clone(), reporter);
        Kubernetes {
            client,
            namespace: namespace.to_owned(),
            recorder,
        }
    }

    /// The interface to one kind.
    pub fn api<K>(&self) -> Api<K>
    where
        K: kube::Resource<Scope = kube::core::NamespaceResourceScope>,
        K::DynamicType: Default,
    {
        Api::namespaced(self.client.clone(), &self.namespace)
    }

    /// The identity of this cluster: the uid of the namespace that every cluster has and nobody can replace.
    pub async fn cluster_id(&self) -> Result<Uuid, ObjectError> {
        let system: Namespace = bounded(Api::all(self.client.clone()).get("kube-system")).await?;
        let uid = system.uid().unwrap_or_default();
        Uuid::parse_str(&uid)
            .map_err(|_| ObjectError::Refused(format!("kube-system has the uid {uid:?}, which is none")))
    }
}

async fn bounded<T>(request: impl Future<Output = Result<T, kube::Error>>) -> Result<T, ObjectError> {
    match tokio::time::timeout(REQUEST_DEADLINE, request).await {
        Ok(outcome) => outcome.map_err(sort),
        Err(_) => Err(ObjectError::Away(format!(
            "no answer within {} s",
            REQUEST_DEADLINE.as_secs()
        ))),
    }
}

fn sort(error: kube::Error) -> ObjectError {
    match &error {
        kube::Error::Api(status) => match status.code {
            404 => ObjectError::NotFound,
            409 => ObjectError::Conflict,
            400..=499 if status.code != 429 && status.code != 408 => ObjectError::Refused(status.message.clone()),
            _ => ObjectError::Away(status.message.clone()),
        },
        _ => ObjectError::Away(error.to_string()),
    }
}

fn if_there<K>(found: Result<K, ObjectError>) -> Result<Option<K>, ObjectError> {
    match found {
        Ok(object) => Ok(Some(object)),
        Err(ObjectError::NotFound) => Ok(None),
        Err(error) => Err(error),
    }
}

impl Objects for Kubernetes {
    fn volume<'a>(&'a self, name: &'a str) -> BoxFuture<'a, Result<Option<GalleonVolume>, ObjectError>> {
        async move { if_there(bounded(self.api().get(name)).await) }.boxed()
    }

    fn replicas_of<'a>(&'a self, volume: &'a str) -> BoxFuture<'a, Result<Vec<GalleonReplica>, ObjectError>> {
        async move {
            let of_volume = ListParams::default().fields(&format!("spec.volumeName={volume}"));
            Ok(bounded(self.api().list(&of_volume)).await?.items)
        }
        .boxed()
    }

    fn pool<'a>(&'a self, name: &'a str) -> BoxFuture<'a, Result<Option<StoragePool>, ObjectError>> {
        async move { if_there(bounded(self.api().get(name)).await) }.boxed()
    }

    fn node_uid<'a>(&'a self, name: &'a str) -> BoxFuture<'a, Result<Option<Uuid>, ObjectError>> {
        async move {
            let found = if_there(bounded(Api::<Node>::all(self.client.clone()).get_metadata(name)).await)?;
            let Some(uid) = found.and_then(|node| node.uid()) else {
                return Ok(None);
            };
            let none = |_| ObjectError::Refused(format!("node {name} has the uid {uid:?}, which is none"));
            Uuid::parse_str(&uid).map(Some).map_err(none)
        }
        .boxed()
    }

    fn put_volume_status<'a>(&'a self, volume: &'a GalleonVolume) -> BoxFuture<'a, Result<GalleonVolume, ObjectError>> {
        async move {
            bounded(
                self.api()
                    .replace_status(&volume.name_any(), &PostParams::default(), volume),
            )
            .await
        }
        .boxed()
    }

    fn put_replica_status<'a>(
        &'a self,
        replica: &'a GalleonReplica,
    ) -> BoxFuture<'a, Result<GalleonReplica, ObjectError>> {
        async move {
            bounded(
                self.api()
                    .replace_status(&replica.name_any(), &PostParams::default(), replica),
            )
            .await
        }
        .boxed()
    }

    fn put_pool_status<'a>(&'a self, pool: &'a StoragePool) -> BoxFuture<'a, Result<StoragePool, ObjectError>> {
        async move {
            bounded(
                self.api()
                    .replace_status(&pool.name_any(), &PostParams::default(), pool),
            )
            .await
        }
        .boxed()
    }

    fn drop_replica_finalizer<'a>(&'a self, replica: &'a GalleonReplica) -> BoxFuture<'a, Result<(), ObjectError>> {
        async move {
            let kept: Vec<&String> = replica
                .finalizers()
                .iter()
                .filter(|name| *name != REPLICA_FINALIZER)
                .collect();
            if kept.len() == replica.finalizers().len() {
                return Ok(());
            }
            // With the resourceVersion: a list that somebody else changed meanwhile must not be overwritten.
            let patch = serde_json::json!({
                "metadata": {"finalizers": kept, "resourceVersion": replica.resource_version(), "uid": replica.uid()}
            });
            let api = self.api::<GalleonReplica>();
            let done = bounded(api.patch(&replica.name_any(), &PatchParams::default(), &Patch::Merge(patch))).await;
            match done {
                Ok(_) | Err(ObjectError::NotFound) => Ok(()),
                Err(error) => Err(error),
            }
        }
        .boxed()
    }

    fn notify<'a>(&'a self, subject: &'a Subject, notice: &'a Notice) -> BoxFuture<'a, ()> {
        async move {
            let regarding = ObjectReference {
                api_version: Some(format!("{GROUP}/{VERSION}")),
                kind: Some(subject.kind.into()),
                name: Some(subject.name.clone()),
                namespace: Some(self.namespace.clone()),
                uid: subject.uid.clone(),
                ..Default::default()
            };
            let mut text = notice.text.clone();
            if text.len() > NOTE_BYTES_MAX {
                let end = (0..=NOTE_BYTES_MAX)
                    .rev()
                    .find(|end| text.is_char_boundary(*end))
                    .unwrap_or(0);
                text.truncate(end);
            }
            let event = Event {
                type_: if notice.warning {
                    EventType::Warning
                } else {
                    EventType::Normal
                },
                reason: notice.reason.into(),
                note: Some(text),
                action: notice.action.into(),
                secondary: None,
            };
            let sent = bounded(self.recorder.publish(&event, &regarding)).await;
            if let Err(error) = sent {
                tracing::warn!(%error, object = %subject.name, text = %notice.text, "an Event could not be made");
            }
        }
        .boxed()
    }
}
