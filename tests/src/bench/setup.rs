//! What is measured beside the raw file. Results of different days are compared by these names.

/// One way of serving a volume.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Setup {
    /// One replica, on the disk of the raw file.
    OneReplica,
    /// The same, sealed.
    Sealed,
    /// Three replicas on that disk, in three processes that talk over the loopback interface and TLS.
    ThreeReplicas,
    /// The same without TLS, for comparison. Only this program can be built so.
    ThreeReplicasPlain,
}

impl Setup {
    /// In the order they run in.
    #[cfg(not(feature = "plain-wire"))]
    pub const ALL: [Setup; 3] = [Setup::OneReplica, Setup::Sealed, Setup::ThreeReplicas];
    #[cfg(feature = "plain-wire")]
    pub const ALL: [Setup; 4] = [
        Setup::OneReplica,
        Setup::Sealed,
        Setup::ThreeReplicas,
        Setup::ThreeReplicasPlain,
    ];

    /// Its name in the results.
    pub fn name(self) -> &'static str {
        match self {
            Setup::OneReplica => "one-replica",
            Setup::Sealed => "sealed",
            Setup::ThreeReplicas => "three-replicas",
            Setup::ThreeReplicasPlain => "three-replicas-plain",
        }
    }

    /// Copies of everything that is written.
    pub fn replicas(self) -> u64 {
        match self {
            Setup::OneReplica | Setup::Sealed => 1,
            Setup::ThreeReplicas | Setup::ThreeReplicasPlain => 3,
        }
    }

    /// The setup of this name.
    pub fn find(name: &str) -> Option<Setup> {
        Setup::ALL.into_iter().find(|setup| setup.name() == name)
    }
}
