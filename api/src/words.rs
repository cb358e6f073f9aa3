//! The fixed words of the API: the names under which the parts of GalleonFS know each other.
//!
//! Conditions are read by people and by programs. A reason is therefore a constant, never a string typed in place.

/// The API group of every resource here.
pub const GROUP: &str = "galleonfs.io";
/// The only version served.
pub const VERSION: &str = "v1alpha1";

/// Name of the CSI driver, of its CSIDriver object, and the provisioner that StorageClasses name.
pub const DRIVER_NAME: &str = "csi.galleonfs.io";
/// Topology key of a volume that can be reached from one node only; its value is the node's name.
pub const TOPOLOGY_KEY: &str = "topology.galleonfs.io/node";

/// Set by the controller at creation, removed by it when the last replica is gone.
pub const VOLUME_FINALIZER: &str = "galleonfs.io/volume";
/// Set by the controller at creation, removed by the node when the replica's directory is gone.
pub const REPLICA_FINALIZER: &str = "galleonfs.io/replica";

/// Set by the controller on each replica of a replicated volume, removed by it when the volume's configuration does not
/// name the replica and never will again. While it is there the node keeps the replica's data, whoever deletes the object.
pub const MEMBER_FINALIZER: &str = "galleonfs.io/member";

/// Labels that let a person find what belongs together. Programs use spec fields.
pub const LABEL_VOLUME: &str = "galleonfs.io/volume";
pub const LABEL_MANAGED_BY: &str = "app.kubernetes.io/managed-by";
/// Value of [`LABEL_MANAGED_BY`] on objects the controller made.
pub const MANAGED_BY: &str = "galleonfs-controller";

/// Annotations on a GalleonVolume: whom it was made for.
pub const ANNOTATION_PVC_NAME: &str = "galleonfs.io/pvc-name";
pub const ANNOTATION_PVC_NAMESPACE: &str = "galleonfs.io/pvc-namespace";
pub const ANNOTATION_PV_NAME: &str = "galleonfs.io/pv-name";

/// On a GalleonVolume: how often a replica has been let go of. New replicas are named after it, so no name comes twice.
pub const ANNOTATION_REPLICA_GENERATION: &str = "galleonfs.io/replica-generation";
/// On a GalleonReplica: since when its volume's configuration says that it missed a write.
pub const ANNOTATION_OUT_SINCE: &str = "galleonfs.io/out-since";
/// On a StoragePool: a person says that its disk is to be trusted, whatever was found before this time (RFC 3339).
pub const ANNOTATION_DISK_TRUSTED_AT: &str = "galleonfs.io/disk-trusted-at";
/// On a GalleonReplica that is not in sync yet: the one in whose place it was made.
pub const ANNOTATION_REPLACES: &str = "galleonfs.io/replaces";

/// Condition types.
pub mod condition_type {
    /// The object does what its spec asks for. On every kind.
    pub const READY: &str = "Ready";
    /// A GalleonVolume has its block device on the node it is attached to.
    pub const ATTACHED: &str = "Attached";
    /// A GalleonReplica or GalleonVolume has reached the size its spec asks for.
    pub const SIZED: &str = "Sized";
    /// A GalleonVolume of several replicas has as many in sync as its spec asks for.
    pub const REDUNDANT: &str = "Redundant";
    /// The disk of a StoragePool is not to be trusted. Stays until a person says otherwise.
    pub const FAILING: &str = "Failing";
}

/// Condition reasons. Each says what was found; the message says where, and what to do.
pub mod reason {
    /// All is as the spec asks.
    pub const READY: &str = "Ready";
    /// Work is under way and needs nobody.
    pub const PENDING: &str = "Pending";
    /// The directory of the replica is being made.
    pub const FORMATTING: &str = "Formatting";
    /// The store is being grown.
    pub const RESIZING: &str = "Resizing";
    /// The object is being deleted.
    pub const REMOVING: &str = "Removing";
    /// Deletion waits because the volume is attached to a node.
    pub const ATTACHED: &str = "Attached";
    /// The volume is not attached to a node.
    pub const DETACHED: &str = "Detached";
    /// The volume is being brought up on its node.
    pub const ATTACHING: &str = "Attaching";
    /// The volume is being closed on its node.
    pub const DETACHING: &str = "Detaching";
    /// Bringing the device up failed.
    pub const ATTACH_FAILED: &str = "AttachFailed";
    /// The volume has no replica: its creation was not finished.
    pub const NO_REPLICA: &str = "NoReplica";
    /// Fewer replicas are in sync than a write needs.
    pub const TOO_FEW_IN_SYNC: &str = "TooFewInSync";
    /// Replicas in sync stand in fewer zones than a write needs.
    pub const TOO_FEW_ZONES: &str = "TooFewZones";
    /// As many replicas are in sync as were asked for.
    pub const ALL_IN_SYNC: &str = "AllInSync";
    /// A replica missed a write; it comes back, or is replaced in a while.
    pub const REPLICA_OUT: &str = "ReplicaOut";
    /// A replica is being given the writes that it missed.
    pub const SYNCING: &str = "Syncing";
    /// A replica is made in the place of one that stayed away.
    pub const REPLACING: &str = "Replacing";
    /// A replica should be replaced, and no other node can take it.
    pub const NO_OTHER_NODE: &str = "NoOtherNode";
    /// A replica of the volume is not ready.
    pub const REPLICA_NOT_READY: &str = "ReplicaNotReady";

    /// The pool's path does not exist on the node.
    pub const PATH_MISSING: &str = "PathMissing";
    /// The path exists and is not a directory.
    pub const NOT_A_DIRECTORY: &str = "NotADirectory";
    /// The file system is mounted read-only, or refuses writes.
    pub const READ_ONLY: &str = "ReadOnly";
    /// No room is left on the file system.
    pub const DISK_FULL: &str = "DiskFull";
    /// Writes of the volume wait, because its pool is full.
    pub const POOL_FULL: &str = "PoolFull";
    /// Requests of the volume wait for replicas that do not answer, or for the API server.
    pub const WAITING_FOR_REPLICAS: &str = "WaitingForReplicas";
    /// The directory carries the label of another cluster.
    pub const OTHER_CLUSTER: &str = "OtherCluster";
    /// The directory is labelled as another pool of this cluster.
    pub const OTHER_POOL: &str = "OtherPool";
    /// The directory or the replica is of a format newer than this release.
    pub const NEWER_FORMAT: &str = "NewerFormat";
    /// The label file cannot be read.
    pub const BAD_LABEL: &str = "BadLabel";
    /// The file system lacks something the store needs (for example direct I/O).
    pub const UNSUPPORTED_FILE_SYSTEM: &str = "UnsupportedFileSystem";
    /// The pool the replica names does not exist on this node.
    pub const POOL_MISSING: &str = "PoolMissing";
    /// The pool the replica names is not ready.
    pub const POOL_NOT_READY: &str = "PoolNotReady";
    /// The replica's directory is gone or empty although it was ready once.
    pub const DATA_MISSING: &str = "DataMissing";
    /// The replica's superblock or log is damaged.
    pub const CORRUPT: &str = "Corrupt";
    /// The directory holds another volume's replica.
    pub const OTHER_VOLUME: &str = "OtherVolume";
    /// So many blocks on a disk were found damaged in a short time that it is not to be trusted.
    pub const TOO_MANY_REPAIRS: &str = "TooManyRepairs";
    /// A person says that the disk of a pool is to be trusted again.
    pub const DISK_TRUSTED: &str = "DiskTrusted";
    /// A replica of the volume lies in a pool whose disk is not to be trusted.
    pub const POOL_FAILING: &str = "PoolFailing";
    /// Reading or writing failed.
    pub const IO_ERROR: &str = "IoError";
}
