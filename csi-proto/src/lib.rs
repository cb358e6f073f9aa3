//! The wire contracts with the rest of Kubernetes: CSI 1.13 and the kubelet's plugin registration.
//!
//! `proto/` states them, `src/generated/` is what follows from it, clients and servers both, and is committed: building
//! needs nothing but cargo. `cargo run -p galleonfs-csi-proto --example gen` writes it anew, a test holds the two equal.
//! Maps are BTreeMaps, so that what is compared and logged has one order.
//!
//! A server method that is not written answers UNIMPLEMENTED, which is what the specification wants of a call whose
//! capability is not declared.

/// The Container Storage Interface, package `csi.v1`.
#[allow(
    clippy::all,
    clippy::allow_attributes_without_reason,
    missing_debug_implementations,
    rustdoc::bare_urls,
    reason = "generated code follows its generator's taste, not ours"
)]
pub mod csi {
    include!("generated/csi.v1.rs");

    /// The version of the specification that `proto/csi.proto` states.
    pub const SPEC_VERSION: &str = "1.13.0";
}

/// Registration of a plugin with the kubelet.
#[allow(
    clippy::all,
    clippy::allow_attributes_without_reason,
    missing_debug_implementations,
    reason = "generated code follows its generator's taste, not ours"
)]
pub mod registration {
    include!("generated/pluginregistration.rs");

    /// What a CSI driver puts into `PluginInfo.type`.
    pub const TYPE_CSI_PLUGIN: &str = "CSIPlugin";
}
