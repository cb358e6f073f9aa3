//! The authority that signs the certificates of nodes: a key and a certificate of its own, and what it puts its name to.

use std::time::{Duration, SystemTime};

use galleonfs_api::{NodeIdentity, identity::BACKDATED};
use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair,
    KeyUsagePurpose, PublicKey, SanType, SerialNumber,
};
use uuid::Uuid;
use x509_parser::prelude::{FromDer, Pem, X509Certificate};

/// A certificate and its key could not be made or read.
#[derive(Debug, thiserror::Error)]
pub enum AuthorityError {
    #[error("{doing}: {source}")]
    Made {
        doing: &'static str,
        #[source]
        source: rcgen::Error,
    },
    #[error("the authority's certificate cannot be read: {0}")]
    Read(String),
}

fn made(doing: &'static str) -> impl FnOnce(rcgen::Error) -> AuthorityError {
    move |source| AuthorityError::Made { doing, source }
}

/// One generation of the authority.
pub struct Authority {
    certificate: String,
    key: String,
    issuer: Issuer<'static, KeyPair>,
    not_before: SystemTime,
    not_after: SystemTime,
}

impl std::fmt::Debug for Authority {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        // The key is nobody's to read.
        f.debug_struct("Authority")
            .field("not_before", &self.not_before)
            .field("not_after", &self.not_after)
            .finish_non_exhaustive()
    }
}

impl Authority {
    /// A new one for a cluster.
    pub fn make(cluster: Uuid, now: SystemTime, life: Duration) -> Result<Authority, AuthorityError> {
        let key = KeyPair::generate().map_err(made("making a key"))?;
        let mut params = CertificateParams::default();
        let serial = Uuid::new_v4();
        // Generations have names of their own, so that nobody tries the wrong one's key.
        params.distinguished_name = DistinguishedName::new();
        let name = format!("GalleonFS nodes of cluster {cluster}, authority {serial}");
        params.distinguished_name.push(DnType::CommonName, name);
        params.serial_number = Some(SerialNumber::from_slice(serial.as_bytes()));
        params.not_before = (now - BACKDATED).into();
        params.not_after = (now + life).into();
        params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign];
        let certificate = params
            .self_signed(&key)
            .map_err(made("making the authority's certificate"))?;
        Authority::of_pem(&certificate.pem(), &key.serialize_pem())
    }

    /// Of what was kept.
    pub fn of_pem(certificate: &str, key: &str) -> Result<Authority, AuthorityError> {
        let pair = KeyPair::from_pem(key).map_err(made("reading the authority's key"))?;
        let (not_before, not_after) = validity(certificate).map_err(AuthorityError::Read)?;
        let issuer =
            Issuer::from_ca_cert_pem(certificate, pair).map_err(made("reading the authority's certificate"))?;
        Ok(Authority {
            certificate: certificate.to_owned(),
            key: key.to_owned(),
            issuer,
            not_before,
            not_after,
        })
    }

    /// What others trust.
    pub fn certificate(&self) -> &str {
        &self.certificate
    }

    /// To be kept where nobody but the controller can read it.
    pub fn key(&self) -> &str {
        &self.key
    }

    pub fn not_before(&self) -> SystemTime {
        self.not_before
    }

    pub fn not_after(&self) -> SystemTime {
        self.not_after
    }

    /// The certificate of a node. All of it is ours but the key: nothing is taken over from what somebody asked for.
    pub fn sign(
        &self,
        identity: NodeIdentity,
        key: &PublicKey,
        now: SystemTime,
        life: Duration,
    ) -> Result<String, AuthorityError> {
        let mut params = CertificateParams::default();
        params.distinguished_name = DistinguishedName::new();
        params
            .distinguished_name
            .push(DnType::CommonName, format!("GalleonFS node {}", identity.node));
        let name = identity.to_string().try_into();
        params.subject_alt_names = vec![SanType::URI(name.map_err(made("writing a node's name"))?)];
        params.serial_number = Some(SerialNumber::from_slice(Uuid::new_v4().as_bytes()));
        params.not_before = (now - BACKDATED).max(self.not_before).into();
        params.not_after = (now + life).min(self.not_after).into();
        params.is_ca = IsCa::ExplicitNoCa;
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ClientAuth, ExtendedKeyUsagePurpose::ServerAuth];
        params.use_authority_key_identifier_extension = true;
        let signed = params.signed_by(key, &self.issuer);
        Ok(signed.map_err(made("signing a node's certificate"))?.pem())
    }
}

/// From when to when a certificate is valid.
pub fn validity(certificate: &str) -> Result<(SystemTime, SystemTime), String> {
    let (pem, _) = Pem::read(std::io::Cursor::new(certificate)).map_err(|error| error.to_string())?;
    let (_, parsed) = X509Certificate::from_der(&pem.contents).map_err(|error| error.to_string())?;
    let time = |seconds: i64| SystemTime::UNIX_EPOCH + Duration::from_secs(seconds.max(0).unsigned_abs());
    let validity = parsed.validity();
    Ok((
        time(validity.not_before.timestamp()),
        time(validity.not_after.timestamp()),
    ))
}
