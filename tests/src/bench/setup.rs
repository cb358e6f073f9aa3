//! What is measured beside the raw file. Results of different days are compared by these names.

/// One way of serving a volume.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Setup {
    /// One replica, on the disk of the raw file.
    OneReplica,
    /// The same, sealed.
    Sealed,
}

impl Setup {
    /// In the order they run in.
    pub const ALL: [Setup; 2] = [Setup::OneReplica, Setup::Sealed];

    /// Its name in the results.
    pub fn name(self) -> &'static str {
        match self {
            Setup::OneReplica => "one-replica",
            Setup::Sealed => "sealed",
        }
    }

    /// The setup of this name.
    pub fn find(name: &str) -> Option<Setup> {
        Setup::ALL.into_iter().find(|setup| setup.name() == name)
    }
}
