//! The targets: one file for the structures of the disk, one for whole replicas, one for what comes from elsewhere.

#[cfg(feature = "node")]
mod guest;
#[cfg(feature = "node")]
mod objects;
pub mod replica;
pub mod replication;
mod structures;
#[cfg(feature = "node")]
pub mod wire;

use crate::Target;

/// All of them.
pub const TARGETS: &[Target] = &[
    Target {
        name: "superblocks",
        run: structures::superblocks,
        runs: 40_000,
        bytes_max: 8193,
    },
    Target {
        name: "segment_header",
        run: structures::segment_header,
        runs: 100_000,
        bytes_max: 4097,
    },
    Target {
        name: "record_header",
        run: structures::record_header,
        runs: 60_000,
        bytes_max: 8193,
    },
    Target {
        name: "page",
        run: structures::page,
        runs: 12_000,
        bytes_max: 8193,
    },
    Target {
        name: "rows",
        run: structures::rows,
        runs: 200_000,
        bytes_max: 97,
    },
    Target {
        name: "key_row",
        run: structures::key_row,
        runs: 200_000,
        bytes_max: 129,
    },
    Target {
        name: "location",
        run: structures::location,
        runs: 400_000,
        bytes_max: 8,
    },
    Target {
        name: "compressed_block",
        run: structures::compressed_block,
        runs: 20_000,
        bytes_max: 16 << 10,
    },
    Target {
        name: "sealed_block",
        run: structures::sealed_block,
        runs: 20_000,
        bytes_max: 4200,
    },
    Target {
        name: "replica",
        run: replica::replica,
        runs: 400,
        bytes_max: 400,
    },
    Target {
        name: "replication_message",
        run: replication::replication_message,
        runs: 100_000,
        bytes_max: 10 << 10,
    },
    #[cfg(feature = "node")]
    Target {
        name: "fuse_request",
        run: guest::fuse_request,
        runs: 20_000,
        bytes_max: 16 << 10,
    },
    #[cfg(feature = "node")]
    Target {
        name: "pool_label",
        run: objects::pool_label,
        runs: 100_000,
        bytes_max: 1000,
    },
    #[cfg(feature = "node")]
    Target {
        name: "class_parameters",
        run: objects::class_parameters,
        runs: 60_000,
        bytes_max: 1000,
    },
    #[cfg(feature = "node")]
    Target {
        name: "wire_frame",
        run: wire::wire_frame,
        runs: 60_000,
        bytes_max: 8 << 10,
    },
];
