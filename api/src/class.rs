//! StorageClass parameters: one table, one type.
//!
//! [`TABLE`] names every parameter and its spellings; [`ClassParameters::parse`] is the only reader. Our own spelling is
//! camelCase; the one with underscores is accepted beside it. What is not in the table is refused by a text that names
//! what is, because a parameter silently ignored is a promise silently broken.

use std::collections::BTreeMap;

use crate::volume::{BLOCK_SIZE_DEFAULT, BLOCK_SIZES, NO_SPACE_TIMEOUT_SECONDS_MAX, SECTOR_SIZE_DEFAULT, SECTOR_SIZES};
use crate::{Compression, MediaType, PoolSelector, WriteConcern};

/// One parameter.
#[derive(Debug)]
pub struct Parameter {
    /// Our spelling, and the key in the normal form.
    pub name: &'static str,
    /// Other spellings that mean the same.
    pub aliases: &'static [&'static str],
    /// What may be asked for, in words.
    pub values: &'static str,
    /// What it does.
    pub help: &'static str,
    set: fn(&mut ClassParameters, &str) -> Result<(), Refusal>,
}

/// Every StorageClass parameter there is.
pub const TABLE: &[Parameter] = &[
    Parameter {
        name: "replicaCount",
        aliases: &["replication"],
        values: "1 to 7",
        help: "Number of copies on different nodes.",
        set: |parameters, value| {
            parameters.replica_count = count(value)?;
            Ok(())
        },
    },
    Parameter {
        name: "minInSync",
        aliases: &["min_in_sync"],
        values: "1 to replicaCount",
        help: "With fewer copies in sync writes wait. Half of replicaCount, rounded up, unless the class says otherwise.",
        set: |parameters, value| {
            parameters.min_in_sync = Some(count(value)?);
            Ok(())
        },
    },
    Parameter {
        name: "blockSize",
        aliases: &["block_size"],
        values: "4096, 8192, 16384, 65536",
        help: "Bytes per block, the unit that is stored, checked and compressed. 4096 unless the class compresses, then 16384.",
        set: |parameters, value| {
            parameters.block_size = one_of(&BLOCK_SIZES, value)?;
            Ok(())
        },
    },
    Parameter {
        name: "sectorSize",
        aliases: &["sector_size"],
        values: "4096, 512",
        help: "Bytes per logical sector of the device. 512 for guests that cannot do with 4096; parts of blocks are slower to write.",
        set: |parameters, value| {
            parameters.sector_size = one_of(&SECTOR_SIZES, value)?;
            Ok(())
        },
    },
    Parameter {
        name: "compression",
        aliases: &[],
        values: "none, lz4, zstd",
        help: "Compress blocks before they are stored. Needs blocks of 8192 bytes or more.",
        set: |parameters, value| {
            parameters.compression = match value {
                "none" => None,
                "lz4" => Some(Compression::Lz4),
                "zstd" => Some(Compression::Zstd),
                _ => return Err(Refusal::Value),
            };
            Ok(())
        },
    },
    Parameter {
        name: "noSpaceTimeoutSeconds",
        aliases: &["no_space_timeout_seconds"],
        values: "never, or a number of seconds from 0 to 86400",
        help: "After how long without room in the pool a write fails with ENOSPC. By default it waits until there is room.",
        set: |parameters, value| {
            parameters.no_space_timeout_seconds = match value {
                "never" => None,
                seconds => Some(
                    seconds
                        .parse::<i32>()
                        .ok()
                        .filter(|seconds| (0..=NO_SPACE_TIMEOUT_SECONDS_MAX).contains(seconds))
                        .ok_or(Refusal::Value)?,
                ),
            };
            Ok(())
        },
    },
    Parameter {
        name: "mediaType",
        aliases: &["disk_type", "diskType"],
        values: "ssd, hdd, nvme",
        help: "Place replicas only in pools of this medium.",
        set: |parameters, value| {
            parameters.media = Some(value.parse::<MediaType>().map_err(|_| Refusal::Value)?);
            Ok(())
        },
    },
    Parameter {
        name: "pool",
        aliases: &[],
        values: "the name of a pool",
        help: "Place replicas only in pools of this name (StoragePool.spec.pool).",
        set: |parameters, value| {
            if !crate::name::is_dns_label(value) {
                return Err(Refusal::Value);
            }
            parameters.pool = Some(value.to_string());
            Ok(())
        },
    },
    Parameter {
        name: "fsType",
        aliases: &["fs_type", FS_TYPE_PREFIXED],
        values: "ext4, xfs",
        help: "File system to make on volumes that are not raw block.",
        set: |parameters, value| {
            if !FS_TYPES.contains(&value) {
                return Err(Refusal::Value);
            }
            parameters.fs_type = Some(value.to_string());
            Ok(())
        },
    },
    Parameter {
        name: "writeConcern",
        aliases: &["write_concern"],
        values: "acknowledged, durable, replicated, distributed",
        help: "When a write of the guest counts as done.",
        set: |parameters, value| {
            parameters.write_concern = Some(match value {
                "acknowledged" => WriteConcern::Acknowledged,
                "durable" => WriteConcern::Durable,
                "replicated" => WriteConcern::Replicated,
                "distributed" => WriteConcern::Distributed,
                _ => return Err(Refusal::Value),
            });
            Ok(())
        },
    },
    Parameter {
        name: "encryption",
        aliases: &[],
        values: "false (true in a later release)",
        help: "Seal every block before it leaves the node that writes it.",
        set: |_, value| match value {
            "false" => Ok(()),
            "true" => Err(Refusal::NotYet(
                "this release stores volumes unsealed; encryption comes later",
            )),
            _ => Err(Refusal::Value),
        },
    },
    Parameter {
        name: "encryptionAlgorithm",
        aliases: &["encryption_algorithm"],
        values: "aes-256-gcm",
        help: "The cipher, where encryption is \"true\".",
        // Accepted so that a class can be written ahead of the release that seals; without encryption it means nothing.
        set: |_, value| match value.to_ascii_lowercase().replace('_', "-").as_str() {
            "aes-256-gcm" | "aes256-gcm" => Ok(()),
            _ => Err(Refusal::Value),
        },
    },
];

/// File systems the node plugin can make.
pub const FS_TYPES: &[&str] = &["ext4", "xfs"];
/// The file system of a volume for which none was asked.
pub const FS_TYPE_DEFAULT: &str = "ext4";

/// Keys with this prefix belong to the sidecars. The ones they pass on are listed below, any other is refused.
const SIDECAR_PREFIX: &str = "csi.storage.k8s.io/";
const FS_TYPE_PREFIXED: &str = "csi.storage.k8s.io/fstype";
const PVC_NAME: &str = "csi.storage.k8s.io/pvc/name";
const PVC_NAMESPACE: &str = "csi.storage.k8s.io/pvc/namespace";
const PV_NAME: &str = "csi.storage.k8s.io/pv/name";

/// A block size of a class that compresses and does not say: one page of 4 KiB is never stored shorter.
const BLOCK_SIZE_COMPRESSED: i32 = 16_384;

/// Why a value was not taken.
#[derive(Debug)]
enum Refusal {
    Value,
    NotYet(&'static str),
}

/// What a StorageClass asks for, checked.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct ClassParameters {
    pub replica_count: i32,
    /// `None`: as [`crate::GalleonVolumeSpec::min_in_sync`] has it.
    pub min_in_sync: Option<i32>,
    pub block_size: i32,
    pub sector_size: i32,
    pub compression: Option<Compression>,
    /// `None`: writes wait for room.
    pub no_space_timeout_seconds: Option<i32>,
    pub media: Option<MediaType>,
    pub pool: Option<String>,
    pub fs_type: Option<String>,
    pub write_concern: Option<WriteConcern>,
    /// Whom the volume is for, as the provisioner tells it. Not part of the volume's identity.
    pub owner: Owner,
    normal: BTreeMap<String, String>,
}

/// The claim behind a request.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct Owner {
    pub pvc_name: Option<String>,
    pub pvc_namespace: Option<String>,
    pub pv_name: Option<String>,
}

/// A parameter or value that does not exist, or not yet. The text says which ones do.
#[derive(Clone, Debug, Eq, PartialEq, thiserror::Error)]
pub enum ClassError {
    #[error("unknown StorageClass parameter {key:?}; there are: {known}")]
    UnknownParameter { key: String, known: String },
    #[error("StorageClass parameter {key:?} cannot be {value:?}; possible: {values}")]
    BadValue {
        key: String,
        value: String,
        values: &'static str,
    },
    #[error("StorageClass parameter {key:?} cannot be {value:?}: {why}")]
    Refused {
        key: String,
        value: String,
        why: &'static str,
    },
    #[error("StorageClass parameter {key:?} is given twice, also as {other:?}, with different values")]
    Twice { key: String, other: String },
}

impl ClassParameters {
    /// Reads the parameters of a request.
    pub fn parse<'a>(given: impl IntoIterator<Item = (&'a str, &'a str)>) -> Result<Self, ClassError> {
        let mut parsed = Self {
            replica_count: 1,
            min_in_sync: None,
            block_size: BLOCK_SIZE_DEFAULT,
            sector_size: SECTOR_SIZE_DEFAULT,
            compression: None,
            no_space_timeout_seconds: None,
            media: None,
            pool: None,
            fs_type: None,
            write_concern: None,
            owner: Owner::default(),
            normal: BTreeMap::new(),
        };
        let mut seen: BTreeMap<&'static str, (&str, &str)> = BTreeMap::new();
        for (key, value) in given {
            match key {
                PVC_NAME => parsed.owner.pvc_name = Some(value.to_string()),
                PVC_NAMESPACE => parsed.owner.pvc_namespace = Some(value.to_string()),
                PV_NAME => parsed.owner.pv_name = Some(value.to_string()),
                _ => {
                    let parameter = find(key)?;
                    if let Some((other, other_value)) = seen.insert(parameter.name, (key, value))
                        && other_value != value
                    {
                        return Err(ClassError::Twice {
                            key: key.to_string(),
                            other: other.to_string(),
                        });
                    }
                    (parameter.set)(&mut parsed, value).map_err(|refusal| match refusal {
                        Refusal::Value => ClassError::BadValue {
                            key: key.into(),
                            value: value.into(),
                            values: parameter.values,
                        },
                        Refusal::NotYet(why) => ClassError::Refused {
                            key: key.into(),
                            value: value.into(),
                            why,
                        },
                    })?;
                    parsed.normal.insert(parameter.name.to_string(), value.to_string());
                }
            }
        }
        parsed.refuse_what_does_not_go_together(&seen)?;
        if parsed.compression.is_some() && parsed.block_size == BLOCK_SIZE_DEFAULT {
            match seen.get("blockSize") {
                None => parsed.block_size = BLOCK_SIZE_COMPRESSED,
                Some((key, value)) => {
                    return Err(ClassError::Refused {
                        key: key.to_string(),
                        value: value.to_string(),
                        why: "blocks are stored in pages of 4096 bytes, so smaller blocks than 8192 are never stored \
                              shorter, and the class asks for compression",
                    });
                }
            }
        }
        Ok(parsed)
    }

    /// What each parameter allows by itself, and the number of replicas does not. `seen`: how it was written.
    fn refuse_what_does_not_go_together(&self, seen: &BTreeMap<&str, (&str, &str)>) -> Result<(), ClassError> {
        let refused = |name: &str, why: &'static str| {
            let (key, value) = seen.get(name).copied().unwrap_or((name, ""));
            Err(ClassError::Refused {
                key: key.to_string(),
                value: value.to_string(),
                why,
            })
        };
        if self.min_in_sync.is_some_and(|least| least > self.replica_count) {
            return refused("minInSync", "no more replicas can be in sync than the class asks for");
        }
        match self.write_concern {
            Some(WriteConcern::Distributed) if self.replica_count < 2 => refused(
                "writeConcern",
                "a write is in two zones only if there are two replicas or more (\"replicaCount\")",
            ),
            _ => Ok(()),
        }
    }

    /// The parameters under our own names, as given: two requests ask for the same class if these are equal. Defaults are
    /// left out, so that a request repeated after an upgrade with other defaults is still the same request.
    pub fn normal(&self) -> &BTreeMap<String, String> {
        &self.normal
    }

    /// Which pools fit.
    pub fn pool_selector(&self) -> PoolSelector {
        PoolSelector {
            media: self.media,
            name: self.pool.clone(),
        }
    }

    /// The write concern asked for, or the default: `replicated` as soon as there is more than one replica, else
    /// `acknowledged`, which with one replica is the same promise.
    pub fn write_concern(&self) -> WriteConcern {
        self.write_concern.unwrap_or(match self.replica_count {
            1 => WriteConcern::Acknowledged,
            _ => WriteConcern::Replicated,
        })
    }
}

fn count(value: &str) -> Result<i32, Refusal> {
    let count = value.parse().ok();
    count.filter(|count| (1..=7).contains(count)).ok_or(Refusal::Value)
}

fn one_of(values: &[i32], value: &str) -> Result<i32, Refusal> {
    let number: i32 = value.parse().map_err(|_| Refusal::Value)?;
    values
        .iter()
        .copied()
        .find(|known| *known == number)
        .ok_or(Refusal::Value)
}

fn find(key: &str) -> Result<&'static Parameter, ClassError> {
    TABLE
        .iter()
        .find(|parameter| parameter.name == key || parameter.aliases.contains(&key))
        .ok_or_else(|| {
            let names = |parameter: &'static Parameter| {
                let others = parameter
                    .aliases
                    .iter()
                    .filter(|alias| !alias.starts_with(SIDECAR_PREFIX));
                std::iter::once(parameter.name).chain(others.copied())
            };
            let mut known: Vec<&str> = TABLE.iter().flat_map(names).collect();
            known.push(FS_TYPE_PREFIXED);
            ClassError::UnknownParameter {
                key: key.to_string(),
                known: known.join(", "),
            }
        })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse<const N: usize>(given: [(&str, &str); N]) -> Result<ClassParameters, ClassError> {
        ClassParameters::parse(given)
    }

    fn refusal<const N: usize>(given: [(&str, &str); N]) -> String {
        parse(given).expect_err("refused").to_string()
    }

    #[test]
    fn a_class_without_parameters_is_one_replica_anywhere() {
        let parsed = parse([]).expect("nothing to refuse");
        assert_eq!((parsed.replica_count, parsed.block_size), (1, 4096));
        assert_eq!(parsed.pool_selector(), PoolSelector::default());
        assert_eq!(parsed.write_concern(), WriteConcern::Acknowledged);
        assert!(parsed.normal().is_empty());
    }

    #[test]
    fn both_spellings_mean_the_same() {
        let ours = parse([
            ("mediaType", "ssd"),
            ("fsType", "xfs"),
            ("replicaCount", "1"),
            ("encryption", "false"),
            ("encryptionAlgorithm", "aes-256-gcm"),
            ("writeConcern", "durable"),
        ]);
        let theirs = parse([
            ("disk_type", "ssd"),
            ("fs_type", "xfs"),
            ("replication", "1"),
            ("encryption", "false"),
            ("encryption_algorithm", "aes-256-gcm"),
            ("write_concern", "durable"),
        ]);
        assert_eq!(ours, theirs);
        assert_eq!(ours.expect("accepted").media, Some(MediaType::Ssd));
    }

    #[test]
    fn an_unknown_parameter_is_refused_by_naming_the_known_ones() {
        let text = refusal([("replicas", "1")]);
        for parameter in TABLE {
            assert!(text.contains(parameter.name), "{text} lacks {}", parameter.name);
        }
        assert!(text.contains("\"replicas\""));
        assert!(refusal([("csi.storage.k8s.io/made-up", "1")]).contains("made-up"));
    }

    #[test]
    fn an_unknown_value_is_refused_by_naming_the_possible_ones() {
        assert!(refusal([("disk_type", "tape")]).contains("ssd, hdd, nvme"));
        assert!(refusal([("fsType", "ntfs")]).contains("ext4, xfs"));
        assert!(refusal([("blockSize", "512")]).contains("4096, 8192"));
        assert!(refusal([("pool", "../etc")]).contains("the name of a pool"));
    }

    #[test]
    fn replica_counts_that_are_no_numbers_or_out_of_range_are_refused() {
        for bad in ["0", "8", "-1", "two", "", "1.0"] {
            assert!(
                matches!(parse([("replicaCount", bad)]), Err(ClassError::BadValue { .. })),
                "{bad:?} was taken"
            );
        }
    }

    #[test]
    fn blocks_sectors_compression_and_patience_are_what_the_class_says() {
        let parsed = parse([
            ("blockSize", "65536"),
            ("sector_size", "512"),
            ("compression", "zstd"),
            ("noSpaceTimeoutSeconds", "30"),
        ])
        .expect("all of these exist");
        assert_eq!((parsed.block_size, parsed.sector_size), (65_536, 512));
        assert_eq!(parsed.compression, Some(Compression::Zstd));
        assert_eq!(parsed.no_space_timeout_seconds, Some(30));
        let never = parse([("noSpaceTimeoutSeconds", "never"), ("compression", "none")]).expect("the defaults");
        assert_eq!((never.no_space_timeout_seconds, never.compression), (None, None));
        for bad in [
            ("noSpaceTimeoutSeconds", "-1"),
            ("noSpaceTimeoutSeconds", "86401"),
            ("noSpaceTimeoutSeconds", "5m"),
            ("compression", "gzip"),
            ("sectorSize", "1024"),
            ("blockSize", "32768"),
        ] {
            assert!(
                matches!(parse([bad]), Err(ClassError::BadValue { .. })),
                "{bad:?} was taken"
            );
        }
    }

    #[test]
    fn a_class_that_compresses_gets_blocks_that_can_shrink() {
        assert_eq!(parse([("compression", "lz4")]).expect("a default").block_size, 16_384);
        assert_eq!(
            parse([("compression", "lz4"), ("blockSize", "8192")])
                .expect("asked for")
                .block_size,
            8192
        );
        let text = refusal([("compression", "lz4"), ("block_size", "4096")]);
        assert!(text.contains("\"block_size\"") && text.contains("8192"), "{text}");
        let other_order = refusal([("blockSize", "4096"), ("compression", "zstd")]);
        assert!(other_order.contains("\"blockSize\""), "{other_order}");
    }

    #[test]
    fn what_a_later_release_brings_is_recognised_and_refused() {
        assert!(refusal([("encryption", "true")]).contains("comes later"));
    }

    #[test]
    fn a_write_in_two_zones_needs_two_replicas_and_the_first_copy_will_do_for_any_number() {
        let text = refusal([("write_concern", "distributed")]);
        assert!(
            text.contains("\"write_concern\"") && text.contains("two replicas or more"),
            "{text}"
        );
        for count in ["2", "3"] {
            let parsed = parse([("writeConcern", "distributed"), ("replicaCount", count)]).expect("it may");
            assert_eq!(parsed.write_concern().min_zones(), 2);
        }
        for count in ["1", "3"] {
            let parsed = parse([("writeConcern", "acknowledged"), ("replicaCount", count)]).expect("it may");
            assert_eq!(parsed.write_concern(), WriteConcern::Acknowledged);
        }
    }

    #[test]
    fn each_write_may_have_to_be_on_stable_storage_whatever_the_number_of_replicas() {
        for count in ["1", "2", "3"] {
            let parsed = parse([("writeConcern", "durable"), ("replicaCount", count)]).expect("it may");
            assert_eq!(parsed.write_concern(), WriteConcern::Durable);
        }
    }

    #[test]
    fn a_class_of_several_replicas_promises_that_all_in_sync_have_a_write() {
        for count in 2..=7 {
            let parsed = parse([("replicaCount", count.to_string().as_str())]).expect("as many as there may be");
            assert_eq!((parsed.replica_count, parsed.min_in_sync), (count, None));
            assert_eq!(parsed.write_concern(), WriteConcern::Replicated);
        }
    }

    #[test]
    fn the_least_number_in_sync_is_a_number_of_the_replicas_that_there_are() {
        let parsed = parse([("minInSync", "3"), ("replicaCount", "3")]).expect("all of them");
        assert_eq!(parsed.min_in_sync, Some(3));
        assert_eq!(
            parsed,
            parse([("min_in_sync", "3"), ("replication", "3")]).expect("the same")
        );
        let text = refusal([("replicaCount", "3"), ("minInSync", "4")]);
        assert!(text.contains("\"minInSync\" cannot be \"4\""), "{text}");
        assert!(refusal([("minInSync", "2")]).contains("than the class asks for"));
        for bad in ["0", "8", "half"] {
            assert!(refusal([("replicaCount", "3"), ("minInSync", bad)]).contains("1 to replicaCount"));
        }
    }

    #[test]
    fn what_the_provisioner_adds_is_not_part_of_the_class() {
        let parsed = parse([
            ("csi.storage.k8s.io/pvc/name", "data"),
            ("csi.storage.k8s.io/pvc/namespace", "shop"),
            ("csi.storage.k8s.io/pv/name", "pvc-1"),
            ("csi.storage.k8s.io/fstype", "xfs"),
        ])
        .expect("all of these are passed on");
        assert_eq!(parsed.owner.pvc_name.as_deref(), Some("data"));
        assert_eq!(parsed.fs_type.as_deref(), Some("xfs"));
        assert_eq!(parsed.normal().keys().collect::<Vec<_>>(), ["fsType"]);
    }

    #[test]
    fn one_parameter_in_two_spellings_must_agree() {
        assert!(parse([("fsType", "xfs"), ("fs_type", "xfs")]).is_ok());
        assert!(refusal([("fsType", "xfs"), ("fs_type", "ext4")]).contains("twice"));
    }
}
