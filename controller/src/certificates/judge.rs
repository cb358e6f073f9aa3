//! Who gets a certificate: decided from plain values.
//!
//! A node plugin may have the certificate of the node that its token was made for, and nobody may have anything else.
//! What counts is what the API server wrote into the request about whoever made it; what the request says of itself is
//! only compared with that.

use std::collections::BTreeMap;

use galleonfs_api::{
    NodeIdentity,
    identity::{CLAIM_NODE_NAME, CLAIM_NODE_UID, NODE_USAGES},
};
use rcgen::{CertificateSigningRequestParams, PublicKey};
use uuid::Uuid;
use x509_parser::{
    certification_request::X509CertificationRequest,
    cri_attributes::ParsedCriAttribute,
    extensions::{GeneralName, ParsedExtension},
    prelude::{FromDer, Pem},
};

/// A request, as the API server has it.
#[derive(Clone, Debug)]
pub struct Request {
    /// Written by the API server: who asked.
    pub username: String,
    /// Written by the API server: the claims of the token.
    pub extra: BTreeMap<String, Vec<String>>,
    pub usages: Vec<String>,
    /// The request proper, in PEM.
    pub pem: Vec<u8>,
}

/// What is known of the cluster.
#[derive(Clone, Debug)]
pub struct Known {
    pub cluster: Uuid,
    /// The user name of the node plugins' service account.
    pub account: String,
    /// The uid of the Node whose name the request's token bears; `None` if there is no such node.
    pub node: Option<Uuid>,
}

/// A request that may be signed.
pub struct Approved {
    pub identity: NodeIdentity,
    pub key: PublicKey,
}

impl std::fmt::Debug for Approved {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Approved")
            .field("identity", &self.identity)
            .finish_non_exhaustive()
    }
}

impl Request {
    /// The node that the token was made for: the one to look up before [`judge`].
    pub fn node_name(&self) -> Option<&str> {
        single(&self.extra, CLAIM_NODE_NAME)
    }
}

fn single<'a>(extra: &'a BTreeMap<String, Vec<String>>, claim: &str) -> Option<&'a str> {
    match extra.get(claim)?.as_slice() {
        [value] => Some(value),
        _ => None,
    }
}

/// Whether the request may be signed, or why not.
pub fn judge(request: &Request, known: &Known) -> Result<Approved, String> {
    if request.username != known.account {
        return Err(format!(
            "asked for by {}; only {} may have certificates of nodes",
            request.username, known.account
        ));
    }
    let name = request
        .node_name()
        .ok_or("the token of whoever asks names no node: it must be the one that the kubelet gave to the pod")?;
    let node = known.node.ok_or_else(|| format!("there is no node {name}"))?;
    // A Node that was made anew under its old name is another node, and the old pod's token is not for it.
    if let Some(uid) = single(&request.extra, CLAIM_NODE_UID)
        && uid != node.to_string()
    {
        return Err(format!(
            "the token is of a node {name} with uid {uid}; its uid is {node}"
        ));
    }
    let mut usages: Vec<&str> = request.usages.iter().map(String::as_str).collect();
    usages.sort_unstable();
    let mut wanted = NODE_USAGES;
    wanted.sort_unstable();
    if usages != wanted {
        return Err(format!("asked for {usages:?}; a node's certificate is for {wanted:?}"));
    }
    let (identity, key) = read(&request.pem)?;
    let expected = NodeIdentity {
        cluster: known.cluster,
        node,
    };
    if identity.cluster != expected.cluster {
        return Err(format!(
            "asked for a node of cluster {}; this is cluster {}",
            identity.cluster, expected.cluster
        ));
    }
    if identity != expected {
        return Err(format!(
            "asked for {identity}; whoever asks is on node {name}, which is {expected}"
        ));
    }
    Ok(Approved { identity, key })
}

/// The name that is asked for and the key that it is asked for, of a request that asks for nothing else.
fn read(pem: &[u8]) -> Result<(NodeIdentity, PublicKey), String> {
    let unreadable = |error: &dyn std::fmt::Display| format!("the request cannot be read: {error}");
    let (pem, _) = Pem::read(std::io::Cursor::new(pem)).map_err(|error| unreadable(&error))?;
    let (rest, parsed) = X509CertificationRequest::from_der(&pem.contents).map_err(|error| unreadable(&error))?;
    if !rest.is_empty() {
        return Err(format!("{} bytes behind the request", rest.len()));
    }
    let info = &parsed.certification_request_info;
    if info.subject.iter().next().is_some() {
        return Err(format!(
            "asked for the subject {}; a node's request has none",
            info.subject
        ));
    }
    let mut identity = None;
    for attribute in info.iter_attributes() {
        let ParsedCriAttribute::ExtensionRequest(extensions) = attribute.parsed_attribute() else {
            return Err(format!("asked for the attribute {}", attribute.oid));
        };
        for extension in &extensions.extensions {
            let ParsedExtension::SubjectAlternativeName(names) = extension.parsed_extension() else {
                return Err(format!("asked for the extension {}", extension.oid));
            };
            let [GeneralName::URI(uri)] = names.general_names.as_slice() else {
                return Err(format!(
                    "asked for the names {:?}; a node has one, a URI",
                    names.general_names
                ));
            };
            if identity.replace(uri.parse::<NodeIdentity>()?).is_some() {
                return Err("asked for two lists of names".to_owned());
            }
        }
    }
    let identity = identity.ok_or("asked for no name")?;
    // Looks at the signature, too: whoever asks has the key.
    let params = CertificateSigningRequestParams::from_der(&pem.contents.as_slice().into())
        .map_err(|error| unreadable(&error))?;
    if params.public_key.algorithm() != &rcgen::PKCS_ECDSA_P256_SHA256 {
        return Err("the key is none of ECDSA on P-256, which is what nodes have".to_owned());
    }
    Ok((identity, params.public_key))
}
