//! What a certificate says, for us: which node it is for, and how long.

use std::time::{Duration, SystemTime};

use galleonfs_api::NodeIdentity;
use rustls::pki_types::CertificateDer;
use x509_parser::extensions::GeneralName;
use x509_parser::prelude::{FromDer, X509Certificate};

/// Whose a certificate is, and from when to when.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Certified {
    pub identity: NodeIdentity,
    pub not_before: SystemTime,
    pub not_after: SystemTime,
}

/// Reads a certificate. That somebody who is trusted signed it is not looked at here: TLS does that.
pub fn certified(certificate: &CertificateDer<'_>) -> Result<Certified, String> {
    let (rest, parsed) = X509Certificate::from_der(certificate).map_err(|error| format!("no certificate: {error}"))?;
    if !rest.is_empty() {
        return Err(format!("{} bytes behind a certificate", rest.len()));
    }
    let names = parsed
        .subject_alternative_name()
        .map_err(|error| format!("a certificate whose names cannot be read: {error}"))?
        .ok_or("a certificate without a name")?;
    let identity = match names.value.general_names.as_slice() {
        [GeneralName::URI(uri)] => uri.parse::<NodeIdentity>()?,
        names => {
            return Err(format!(
                "a certificate of {} names that are not one node's",
                names.len()
            ));
        }
    };
    let time = |seconds: i64| SystemTime::UNIX_EPOCH + Duration::from_secs(seconds.max(0).unsigned_abs());
    Ok(Certified {
        identity,
        not_before: time(parsed.validity().not_before.timestamp()),
        not_after: time(parsed.validity().not_after.timestamp()),
    })
}
