//! The rules in our definitions, tried on the API server that enforces them.

use galleonfs_api::{
    Capability, GalleonVolume, GalleonVolumeSpec, MediaType, StoragePool, StoragePoolSpec, VolumeConfig, VolumeMode,
    WriteConcern, size::GIB,
};
use kube::{Api, ResourceExt, api::PostParams};

use crate::lab::Lab;

fn volume() -> GalleonVolume {
    let spec = GalleonVolumeSpec {
        size_bytes: GIB,
        block_size: 4096,
        sector_size: 4096,
        compression: None,
        no_space_timeout_seconds: None,
        replica_count: 1,
        min_in_sync: None,
        pool: None,
        write_concern: WriteConcern::Acknowledged,
        csi_name: "v".to_string(),
        parameters: [("mediaType".to_string(), "ssd".to_string())].into(),
        capability: Capability {
            mode: VolumeMode::Block,
            fs_type: None,
        },
        attach_to: None,
        leaving: None,
    };
    GalleonVolume::new("v", spec)
}

struct Volumes(Api<GalleonVolume>);

impl Volumes {
    async fn spec(&self, change: impl Fn(&mut GalleonVolumeSpec)) -> Result<(), String> {
        let mut volume = self.0.get("v").await.expect("the volume");
        change(&mut volume.spec);
        let written = self.0.replace("v", &PostParams::default(), &volume).await;
        written.map(drop).map_err(|error| error.to_string())
    }

    async fn config(&self, change: impl Fn(&mut VolumeConfig)) -> Result<(), String> {
        let mut volume = self.0.get("v").await.expect("the volume");
        change(volume.status.get_or_insert_default().config.get_or_insert_default());
        let written = self.0.replace_status("v", &PostParams::default(), &volume).await;
        written.map(drop).map_err(|error| error.to_string())
    }
}

fn refused(outcome: Result<(), String>, part: &str) {
    let error = outcome.expect_err(part);
    assert!(error.contains(part), "{error:?} does not say {part:?}");
}

fn names(names: &[&str]) -> Vec<String> {
    names.iter().map(|name| name.to_string()).collect()
}

pub async fn the_api_server_refuses_what_must_never_happen(lab: Lab) {
    let volumes = Volumes(Api::namespaced(lab.client.clone(), &lab.namespace));
    let mut odd = volume();
    odd.spec.size_bytes += 1;
    let error = volumes
        .0
        .create(&PostParams::default(), &odd)
        .await
        .expect_err("an odd size")
        .to_string();
    assert!(error.contains("multiple of blockSize"), "{error}");
    volumes
        .0
        .create(&PostParams::default(), &volume())
        .await
        .expect("a volume");

    refused(
        volumes.spec(|spec| spec.block_size = 5000).await,
        "spec.blockSize: Unsupported value",
    );
    refused(
        volumes.spec(|spec| spec.block_size = 8192).await,
        "blockSize is immutable",
    );
    refused(
        volumes.spec(|spec| spec.sector_size = 512).await,
        "sectorSize is immutable",
    );
    volumes
        .spec(|spec| spec.compression = Some(galleonfs_api::Compression::Zstd))
        .await
        .expect("what is written from now on may be compressed");
    refused(volumes.spec(|spec| spec.size_bytes -= 4096).await, "must not shrink");
    refused(
        volumes.spec(|spec| spec.replica_count = 3).await,
        "replicaCount is immutable",
    );
    refused(
        volumes.spec(|spec| spec.min_in_sync = Some(2)).await,
        "minInSync must not be more than replicaCount",
    );
    volumes
        .spec(|spec| spec.min_in_sync = Some(1))
        .await
        .expect("as many as there are");
    refused(
        volumes.spec(|spec| spec.csi_name = "w".into()).await,
        "csiName is immutable",
    );
    refused(
        volumes.spec(|spec| spec.parameters.clear()).await,
        "parameters is immutable",
    );
    refused(
        volumes.spec(|spec| spec.pool = Some(Default::default())).await,
        "pool is immutable",
    );
    refused(
        volumes.spec(|spec| spec.capability.mode = VolumeMode::Filesystem).await,
        "capability is immutable",
    );
    volumes
        .spec(|spec| spec.size_bytes *= 2)
        .await
        .expect("growing is fine");
    let attach_to = |node: &str| galleonfs_api::AttachTo {
        node_name: node.to_string(),
        read_only: false,
        access_mode: "SINGLE_NODE_WRITER".to_string(),
        mode: VolumeMode::Block,
    };
    volumes
        .spec(|spec| spec.attach_to = Some(attach_to("a")))
        .await
        .expect("from nowhere to a node");
    refused(
        volumes.spec(|spec| spec.attach_to = Some(attach_to("b"))).await,
        "attachTo must be cleared",
    );
    volumes
        .spec(|spec| spec.attach_to = None)
        .await
        .expect("and back to nowhere");

    refused(volumes.config(|config| config.in_sync = vec![]).await, "inSync");
    volumes
        .config(|config| config.in_sync = names(&["r1", "r2"]))
        .await
        .expect("a first configuration");
    let lead = |config: &mut VolumeConfig, node: &str, incarnation: &str| {
        config.primary = Some(node.to_string());
        config.incarnation = Some(incarnation.to_string());
    };
    volumes
        .config(|config| {
            config.epoch = 5;
            lead(config, "a", "i1");
        })
        .await
        .expect("a primary under a new epoch");
    refused(
        volumes.config(|config| config.epoch = 4).await,
        "epoch must not go back",
    );
    refused(
        volumes.config(|config| lead(config, "b", "i2")).await,
        "one primary and one incarnation",
    );
    refused(
        volumes.config(|config| lead(config, "a", "i2")).await,
        "one primary and one incarnation",
    );
    let promote = |config: &mut VolumeConfig| {
        config.epoch = 6;
        config.in_sync = names(&["r1", "r3"]);
    };
    refused(volumes.config(promote).await, "in sync in the old one");
    let shrink = |config: &mut VolumeConfig| {
        config.epoch = 6;
        config.in_sync = names(&["r1"]);
        lead(config, "b", "i2");
    };
    volumes.config(shrink).await.expect("a subset under a new epoch");
    let release = |config: &mut VolumeConfig| (config.primary, config.incarnation) = (None, None);
    volumes.config(release).await.expect("letting go");
    let crowd = |config: &mut VolumeConfig| config.in_sync = (0..9).map(|index| format!("r{index}")).collect();
    refused(volumes.config(crowd).await, "at most 8");
    let mut without = volumes.0.get("v").await.expect("the volume");
    without.status = Some(Default::default());
    let outcome = volumes.0.replace_status("v", &PostParams::default(), &without).await;
    refused(
        outcome.map(drop).map_err(|error| error.to_string()),
        "config must not be removed",
    );

    let pools: Api<StoragePool> = Api::namespaced(lab.client.clone(), &lab.namespace);
    let spec = StoragePoolSpec {
        pool: "default".to_string(),
        node_name: "node-a.example.org".to_string(),
        path: "/var/lib/pool".to_string(),
        media: MediaType::Ssd,
        reserve_bytes: None,
    };
    let create = async |name: &str, path: &str| {
        let pool = StoragePool::new(
            name,
            StoragePoolSpec {
                path: path.to_string(),
                ..spec.clone()
            },
        );
        pools
            .create(&PostParams::default(), &pool)
            .await
            .map(drop)
            .map_err(|error| error.to_string())
    };
    refused(
        create("fast.node-a.example.org", "/a").await,
        "is named <spec.pool>.<spec.nodeName>",
    );
    refused(
        create("default.node-a.example.org", "relative").await,
        "path must be absolute",
    );
    refused(
        create("default.node-a.example.org", "/a/../b").await,
        "path must be absolute",
    );
    create("default.node-a.example.org", "/var/lib/pool")
        .await
        .expect("a pool");
    let mut pool = pools.get("default.node-a.example.org").await.expect("the pool");
    pool.spec.path = "/elsewhere".to_string();
    let outcome = pools.replace(&pool.name_any(), &PostParams::default(), &pool).await;
    refused(
        outcome.map(drop).map_err(|error| error.to_string()),
        "path is immutable",
    );
}
