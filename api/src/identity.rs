//! Who a node is when nodes talk to each other: the words that the controller, which issues certificates, and the node
//! plugin, which asks for one, must agree on.

use std::{fmt, str::FromStr, time::Duration};

use uuid::Uuid;

/// Signer of the certificates of nodes, as CertificateSigningRequests name it.
pub const NODE_SIGNER: &str = "galleonfs.io/node";
/// Name of the Secret with the key of the authority, and of the ConfigMap with the certificates that nodes trust.
pub const NODE_CA: &str = "galleonfs-node-ca";
/// Key of that ConfigMap.
pub const NODE_CA_BUNDLE: &str = "ca.crt";

/// Claims of a service account's token that was given to a pod: the API server writes them into what the pod asks for.
pub const CLAIM_NODE_NAME: &str = "authentication.kubernetes.io/node-name";
pub const CLAIM_NODE_UID: &str = "authentication.kubernetes.io/node-uid";

/// Certificates are valid from so long before they were made: clocks of nodes differ.
pub const BACKDATED: Duration = Duration::from_secs(300);

/// What a certificate of a node is for, in the words of CertificateSigningRequests.
pub const NODE_USAGES: [&str; 3] = ["digital signature", "client auth", "server auth"];

/// A node of a cluster, written `galleon://<cluster>/node/<uid>` in its certificate.
///
/// Both are uids that the API server gave: of the namespace kube-system, and of the Node. A node that is removed and
/// joins again under its old name is another one.
#[derive(Clone, Copy, Debug, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub struct NodeIdentity {
    pub cluster: Uuid,
    pub node: Uuid,
}

impl fmt::Display for NodeIdentity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "galleon://{}/node/{}", self.cluster, self.node)
    }
}

impl FromStr for NodeIdentity {
    type Err = String;

    /// Takes exactly what [`fmt::Display`] writes: one identity has one spelling.
    fn from_str(text: &str) -> Result<Self, String> {
        let parse = || {
            let (cluster, node) = text.strip_prefix("galleon://")?.split_once("/node/")?;
            let identity = Self {
                cluster: Uuid::parse_str(cluster).ok()?,
                node: Uuid::parse_str(node).ok()?,
            };
            (identity.to_string() == text).then_some(identity)
        };
        parse().ok_or_else(|| format!("{text:?} is not of the form galleon://<cluster>/node/<uid>"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_identity_is_read_as_it_is_written_and_in_no_other_spelling() {
        let identity = NodeIdentity {
            cluster: Uuid::from_u128(1),
            node: Uuid::from_u128(0xabc),
        };
        let text = identity.to_string();
        assert_eq!(
            text,
            "galleon://00000000-0000-0000-0000-000000000001/node/00000000-0000-0000-0000-000000000abc"
        );
        assert_eq!(text.parse(), Ok(identity));
        let others = [
            text.to_uppercase(),
            text.replace("-", ""),
            format!("{text}/"),
            format!(" {text}"),
            text.replace("galleon:", "spiffe:"),
            text.replace("/node/", "/volume/"),
            "galleon:///node/".to_string(),
            String::new(),
        ];
        for other in others {
            assert!(other.parse::<NodeIdentity>().is_err(), "{other:?}");
        }
    }
}
