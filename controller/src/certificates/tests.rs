//! Decisions about certificates, from plain values.

use std::{
    collections::BTreeMap,
    time::{Duration, SystemTime},
};

use galleonfs_api::{
    NodeIdentity,
    identity::{CLAIM_NODE_NAME, CLAIM_NODE_UID, NODE_USAGES},
};
use rcgen::{CertificateParams, DistinguishedName, DnType, KeyPair, KeyUsagePurpose, SanType};
use uuid::Uuid;
use x509_parser::prelude::{FromDer, Pem, X509Certificate};

use super::*;

const DAY: Duration = Duration::from_secs(24 * 3600);
const CLUSTER: Uuid = Uuid::from_u128(0xc1);
const NODE: Uuid = Uuid::from_u128(0xa);
const ACCOUNT: &str = "system:serviceaccount:galleonfs-system:galleonfs-node";

fn identity() -> NodeIdentity {
    NodeIdentity {
        cluster: CLUSTER,
        node: NODE,
    }
}

fn known() -> Known {
    Known {
        cluster: CLUSTER,
        account: ACCOUNT.to_owned(),
        node: Some(NODE),
    }
}

fn uri(text: &str) -> SanType {
    SanType::URI(text.try_into().expect("ASCII"))
}

/// A request as a node plugin makes it, but for what `change` does.
fn pem(change: impl FnOnce(&mut CertificateParams)) -> Vec<u8> {
    let key = KeyPair::generate().expect("a key");
    let mut params = CertificateParams::default();
    params.distinguished_name = DistinguishedName::new();
    params.subject_alt_names = vec![uri(&identity().to_string())];
    change(&mut params);
    let request = params.serialize_request(&key).expect("a request");
    request.pem().expect("PEM").into_bytes()
}

fn request(pem: Vec<u8>) -> Request {
    let claims = [
        (CLAIM_NODE_NAME, "node-a".to_owned()),
        (CLAIM_NODE_UID, NODE.to_string()),
    ];
    Request {
        username: ACCOUNT.to_owned(),
        extra: claims.map(|(key, value)| (key.to_owned(), vec![value])).into(),
        usages: NODE_USAGES.map(str::to_owned).to_vec(),
        pem,
    }
}

#[test]
fn a_node_plugin_gets_the_certificate_of_its_own_node() {
    let approved = judge(&request(pem(|_| {})), &known()).expect("all is as it should be");
    assert_eq!(approved.identity, identity());
    // In whatever order, and from an API server that does not tell the uid.
    let mut other = request(pem(|_| {}));
    other.usages.reverse();
    other.extra.remove(CLAIM_NODE_UID);
    judge(&other, &known()).expect("still as it should be");
}

#[test]
fn what_somebody_else_asks_for_or_asks_with_another_token_is_denied_with_the_reason() {
    type Change = fn(&mut Request);
    let changes: &[(Change, &str)] = &[
        (
            |r| r.username = "system:serviceaccount:default:galleonfs-node".into(),
            "only system:serviceaccount:galleonfs-system",
        ),
        (|r| r.username = "admin".into(), "asked for by admin"),
        (|r| drop(r.extra.remove(CLAIM_NODE_NAME)), "names no node"),
        (
            |r| drop(r.extra.insert(CLAIM_NODE_NAME.into(), vec![])),
            "names no node",
        ),
        (
            |r| {
                drop(
                    r.extra
                        .insert(CLAIM_NODE_NAME.into(), vec!["node-a".into(), "node-b".into()]),
                )
            },
            "names no node",
        ),
        (
            |r| {
                drop(
                    r.extra
                        .insert(CLAIM_NODE_UID.into(), vec![Uuid::from_u128(9).to_string()]),
                )
            },
            "its uid is",
        ),
        (|r| r.usages.clear(), "a node's certificate is for"),
        (|r| r.usages.push("cert sign".into()), "cert sign"),
        (|r| r.usages.truncate(2), "a node's certificate is for"),
        (|r| r.usages[2] = r.usages[1].clone(), "a node's certificate is for"),
        (|r| r.pem.clear(), "cannot be read"),
        (
            |r| r.pem = b"-----BEGIN CERTIFICATE REQUEST-----\nAAAA\n-----END CERTIFICATE REQUEST-----\n".to_vec(),
            "cannot be read",
        ),
    ];
    for (change, part) in changes {
        let mut request = request(pem(|_| {}));
        change(&mut request);
        let denied = judge(&request, &known()).expect_err(part);
        assert!(denied.contains(part), "{denied:?} lacks {part:?}");
    }
    let gone = Known { node: None, ..known() };
    let denied = judge(&request(pem(|_| {})), &gone).expect_err("no such node");
    assert_eq!(denied, "there is no node node-a");
}

#[test]
fn a_request_for_anything_but_the_nodes_own_name_is_denied_with_the_reason() {
    type Change = fn(&mut CertificateParams);
    let changes: &[(Change, &str)] = &[
        (
            |p| {
                let other = NodeIdentity {
                    node: Uuid::from_u128(0xb),
                    ..identity()
                };
                p.subject_alt_names = vec![uri(&other.to_string())];
            },
            "whoever asks is on node node-a",
        ),
        (
            |p| {
                let other = NodeIdentity {
                    cluster: Uuid::from_u128(0xc2),
                    ..identity()
                };
                p.subject_alt_names = vec![uri(&other.to_string())];
            },
            "this is cluster 00000000-0000-0000-0000-0000000000c1",
        ),
        (
            |p| p.subject_alt_names = vec![uri("galleon://x/node/y")],
            "is not of the form",
        ),
        (
            |p| p.subject_alt_names = vec![SanType::DnsName("node-a".try_into().expect("ASCII"))],
            "a node has one, a URI",
        ),
        (
            |p| {
                p.subject_alt_names
                    .push(SanType::DnsName("kubernetes".try_into().expect("ASCII")))
            },
            "a node has one, a URI",
        ),
        (
            |p| p.subject_alt_names.push(uri("galleon://x/node/y")),
            "a node has one, a URI",
        ),
        (|p| p.subject_alt_names.clear(), "asked for no name"),
        (
            |p| p.distinguished_name.push(DnType::OrganizationName, "system:masters"),
            "asked for the subject O=system:masters",
        ),
        (
            |p| p.key_usages = vec![KeyUsagePurpose::KeyCertSign],
            "asked for the extension",
        ),
        (
            |p| p.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained),
            "asked for the extension",
        ),
    ];
    for (change, part) in changes {
        let Err(denied) = judge(&request(pem(change)), &known()) else {
            panic!("{part}: approved")
        };
        assert!(denied.contains(part), "{denied:?} lacks {part:?}");
    }
}

#[test]
fn a_request_that_is_not_signed_with_its_key_or_has_another_kind_of_key_is_denied() {
    let good = pem(|_| {});
    let (parsed, _) = Pem::read(std::io::Cursor::new(&good)).expect("PEM");
    let mut forged = parsed.contents;
    let last = forged.len() - 1;
    forged[last] ^= 1;
    let forged = pem::encode(&forged);
    let denied = judge(&request(forged.into_bytes()), &known()).expect_err("forged");
    assert!(denied.contains("cannot be read"), "{denied}");

    let key = KeyPair::generate_for(&rcgen::PKCS_ED25519).expect("a key");
    let mut params = CertificateParams::default();
    params.distinguished_name = DistinguishedName::new();
    params.subject_alt_names = vec![uri(&identity().to_string())];
    let other = params.serialize_request(&key).expect("a request").pem().expect("PEM");
    let denied = judge(&request(other.into_bytes()), &known()).expect_err("another kind");
    assert!(denied.contains("P-256"), "{denied}");
}

mod pem {
    /// PEM of a request: base 64 by hand, because a broken request cannot be made with what makes good ones.
    pub fn encode(der: &[u8]) -> String {
        const DIGITS: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
        let mut text = String::new();
        for three in der.chunks(3) {
            let bits = three.iter().fold(0u32, |bits, byte| bits << 8 | u32::from(*byte)) << (8 * (3 - three.len()));
            for digit in 0..4 {
                match digit <= three.len() {
                    true => text.push(char::from(DIGITS[(bits >> (18 - 6 * digit) & 63) as usize])),
                    false => text.push('='),
                }
            }
        }
        format!("-----BEGIN CERTIFICATE REQUEST-----\n{text}\n-----END CERTIFICATE REQUEST-----\n")
    }
}

#[test]
fn a_signed_certificate_says_what_we_say_and_nothing_that_was_asked_for() {
    let now = SystemTime::now();
    let authority = Authority::make(CLUSTER, now, 100 * DAY).expect("an authority");
    let approved = judge(&request(pem(|_| {})), &known()).expect("approved");
    let signed = authority
        .sign(approved.identity, &approved.key, now, 7 * DAY)
        .expect("signed");
    let (not_before, not_after) = validity(&signed).expect("a certificate");
    assert!(not_before < now && not_before >= now - Duration::from_secs(301));
    assert!(not_after <= now + 7 * DAY && not_after > now + 6 * DAY);

    let (parsed, _) = Pem::read(std::io::Cursor::new(&signed)).expect("PEM");
    let (_, certificate) = X509Certificate::from_der(&parsed.contents).expect("a certificate");
    assert!(!certificate.is_ca());
    let usage = certificate
        .extended_key_usage()
        .expect("readable")
        .expect("there")
        .value;
    assert!(usage.client_auth && usage.server_auth && !usage.any && !usage.code_signing);
    let usage = certificate.key_usage().expect("readable").expect("there").value;
    assert!(usage.digital_signature() && !usage.key_cert_sign());
    // It never outlives whoever signed it.
    let long = authority
        .sign(approved.identity, &approved.key, now, 1000 * DAY)
        .expect("signed");
    assert_eq!(validity(&long).expect("a certificate").1, authority.not_after());
}

#[test]
fn generations_are_kept_and_read_again_and_what_is_broken_is_not_passed_over() {
    let (now, times) = (SystemTime::now(), Times::default());
    let mut generations = Generations::first(CLUSTER, now, &times).expect("the first");
    let later = now + times.authority - times.renew_before;
    assert!(generations.step(CLUSTER, later, &times).expect("a step"));
    let again = Generations::of_data(&generations.data()).expect("readable");
    assert_eq!(again.bundle(), generations.bundle());
    assert_eq!(again.data(), generations.data());
    assert!(!format!("{again:?}").contains("PRIVATE"), "no key in a log");

    let without = |key: &str| {
        let mut data = generations.data();
        data.remove(key);
        Generations::of_data(&data).expect_err(key).to_string()
    };
    assert!(without("current.key").contains("belong together"));
    assert!(without("next.crt").contains("belong together"));
    assert!(Generations::of_data(&BTreeMap::new()).is_err());
}

#[test]
fn an_authority_is_replaced_without_a_moment_in_which_a_valid_certificate_is_not_trusted() {
    let times = Times {
        node: 7 * DAY,
        authority: 100 * DAY,
        renew_before: 30 * DAY,
        announce: 5 * DAY,
    };
    let start = SystemTime::now();
    let mut generations = Generations::first(CLUSTER, start, &times).expect("the first");
    // (signer, end) of every certificate that was given out, one a day; and when each generation was first known.
    let mut given: Vec<(String, SystemTime)> = Vec::new();
    let mut known_since: BTreeMap<String, SystemTime> = BTreeMap::new();
    let (mut signers, mut most) = (std::collections::BTreeSet::new(), 0);
    for day in 0..400 {
        let now = start + day * DAY;
        while generations.step(CLUSTER, now, &times).expect("a step") {}
        let bundle = generations.bundle();
        let ones: Vec<&str> = bundle
            .split_inclusive("-----END CERTIFICATE-----\n")
            .filter(|one| one.len() > 1)
            .collect();
        most = most.max(ones.len());
        for one in &ones {
            known_since.entry(one.trim().to_owned()).or_insert(now);
        }
        let signer = generations.current.certificate().trim().to_owned();
        let known = now.duration_since(known_since[&signer]).expect("time goes on");
        assert!(
            day == 0 || signers.contains(&signer) || known >= times.announce,
            "day {day}: signs before it is known"
        );
        signers.insert(signer.clone());
        assert!(
            generations.current.not_after() >= now + times.node,
            "day {day}: it lives as long as what it signs"
        );
        given.push((signer, now + times.node));
        for (signer, _) in given.iter().filter(|(_, end)| *end > now) {
            assert!(
                bundle.contains(signer),
                "day {day}: a certificate that is valid is not trusted"
            );
        }
    }
    assert!(signers.len() >= 4, "{} generations in 400 days", signers.len());
    assert_eq!(most, 2, "old ones are forgotten before the next are made");
}

#[test]
fn an_authority_that_nobody_looked_after_is_replaced_at_once() {
    let times = Times::default();
    let start = SystemTime::now();
    let mut generations = Generations::first(CLUSTER, start, &times).expect("the first");
    let late = start + times.authority + 30 * DAY;
    while generations.step(CLUSTER, late, &times).expect("a step") {}
    assert!(generations.current.not_after() > late + times.node);
    assert!(generations.next.is_none());
}
