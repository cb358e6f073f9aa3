//! A volume grows while it is used, or says when it will.

use super::*;

impl Bench {
    async fn expand(&self, volume: &str, path: &str, required: u64, limit: u64) -> Result<i64, Status> {
        let mut request = Request::new(NodeExpandVolumeRequest {
            volume_id: volume.into(),
            volume_path: path.into(),
            capacity_range: Some(CapacityRange {
                required_bytes: required as i64,
                limit_bytes: limit as i64,
            }),
            ..Default::default()
        });
        request.metadata_mut().insert("grpc-timeout", "5S".parse().unwrap());
        Ok(self.node.node_expand_volume(request).await?.into_inner().capacity_bytes)
    }

    /// What the registry room does when the volume's object asks for more.
    async fn enlarge(&self, volume: &str, size_bytes: u64) {
        let device = self.engine.grow(volume, size_bytes).await.unwrap();
        self.node.served.set(volume, Some(Presence::Here(device)));
    }
}

#[tokio::test]
async fn an_xfs_volume_grows_under_its_mount() {
    let bench = Bench::new();
    bench.volume("v", 320 * MIB).await;
    let target = bench.path("pods/a");
    let xfs = || mount("xfs", Mode::SingleNodeWriter);
    bench.stage("v", xfs()).await.unwrap();
    bench.publish("v", &target, xfs()).await.unwrap();
    let before = bench.stats("v", &target).await.unwrap();
    let (grown, ()) = tokio::join!(bench.expand("v", &target, 640 * MIB, 0), bench.enlarge("v", 640 * MIB));
    assert_eq!(grown.unwrap(), 640 * MIB as i64);
    assert_eq!(
        bench.expand("v", &target, 640 * MIB, 0).await.unwrap(),
        640 * MIB as i64
    );
    is(
        bench.expand("v", &target, 0, 400 * MIB).await.map(drop),
        Code::OutOfRange,
        "limit",
    );
    let after = bench.stats("v", &target).await.unwrap();
    assert!(after[0].0 > before[0].0 + 250 * MIB as i64, "{before:?} {after:?}");
}

#[tokio::test]
async fn an_ext4_volume_grows_under_its_mount_or_says_when_it_will() {
    let bench = Bench::new();
    bench.volume("v", 64 * MIB).await;
    let staged = bench.path("staging/v");
    bench.stage("v", ext4()).await.unwrap();
    let before = bench.stats("v", &staged).await.unwrap();
    bench.enlarge("v", 128 * MIB).await;
    match bench.expand("v", &staged, 128 * MIB, 0).await {
        Ok(size) => assert_eq!(size, 128 * MIB as i64),
        // Not every machine that runs the tests gives us the capability.
        Err(status) => {
            is(Err(status), Code::FailedPrecondition, "CAP_SYS_RESOURCE");
            bench.unstage("v").await.unwrap();
            bench.stage("v", ext4()).await.unwrap();
        }
    }
    let after = bench.stats("v", &staged).await.unwrap();
    assert!(after[0].0 > before[0].0 + 50 * MIB as i64, "{before:?} {after:?}");
    assert!(after[1].0 > before[1].0, "inodes grow too");
}

#[tokio::test]
async fn a_volume_that_was_not_enlarged_yet_is_tried_again() {
    let bench = Bench::new();
    bench.volume("v", 16 * MIB).await;
    bench.stage("v", ext4()).await.unwrap();
    let mut request = Request::new(NodeExpandVolumeRequest {
        volume_id: "v".into(),
        volume_path: bench.path("staging/v"),
        capacity_range: Some(CapacityRange {
            required_bytes: 32 * MIB as i64,
            limit_bytes: 0,
        }),
        ..Default::default()
    });
    request.metadata_mut().insert("grpc-timeout", "300m".parse().unwrap());
    is(
        bench.node.node_expand_volume(request).await.map(drop),
        Code::Unavailable,
        "still being enlarged",
    );
}

#[tokio::test]
async fn expanding_what_is_not_there_or_not_allowed_is_refused() {
    let bench = Bench::new();
    bench.volume("v", 16 * MIB).await;
    bench.stage("v", ext4()).await.unwrap();
    let expand = |volume: &str, path: String, required_bytes: i64| {
        let capacity_range = Some(CapacityRange {
            required_bytes,
            limit_bytes: 0,
        });
        let request = NodeExpandVolumeRequest {
            volume_id: volume.into(),
            volume_path: path,
            capacity_range,
            ..Default::default()
        };
        bench.node.node_expand_volume(Request::new(request))
    };
    is(
        expand("", bench.path("staging/v"), 0).await.map(drop),
        Code::InvalidArgument,
        "volume_id",
    );
    is(
        expand("v", String::new(), 0).await.map(drop),
        Code::InvalidArgument,
        "volume_path",
    );
    is(
        expand("w", bench.path("staging/v"), 0).await.map(drop),
        Code::NotFound,
        "w",
    );
    is(
        expand("v", bench.path("staging/w"), 0).await.map(drop),
        Code::NotFound,
        "staging/w",
    );
    is(
        expand("v", bench.path("staging/v"), -1).await.map(drop),
        Code::OutOfRange,
        "negative",
    );
}

#[tokio::test]
async fn a_raw_block_volume_grows_by_whatever_path_the_kubelet_names() {
    let bench = Bench::new();
    bench.volume("v", 16 * MIB).await;
    bench.stage("v", block()).await.unwrap();
    bench.enlarge("v", 32 * MIB).await;
    let path = bench.path("plugins/kubernetes.io/csi/volumeDevices/v/dev");
    assert_eq!(bench.expand("v", &path, 32 * MIB, 0).await.unwrap(), 32 * MIB as i64);
}
