//! The cluster's keys: one authority, and a certificate for each component that the others know it by.

use std::fs::{self, Permissions};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair,
    KeyUsagePurpose,
};

use super::layout::write_file;

/// Who a certificate speaks for.
#[derive(Clone, Copy, Debug)]
pub struct Subject<'a> {
    /// What RBAC sees as the user, e.g. `system:node:node1`.
    pub name: &'a str,
    /// What RBAC sees as the group.
    pub group: Option<&'a str>,
    /// Host names and addresses, for those who serve.
    pub hosts: &'a [String],
}

/// Files of one certificate.
#[derive(Clone, Debug)]
pub struct Identity {
    pub certificate: PathBuf,
    pub key: PathBuf,
}

pub struct Authority {
    directory: PathBuf,
    issuer: Issuer<'static, KeyPair>,
}

impl std::fmt::Debug for Authority {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Authority")
            .field("directory", &self.directory)
            .finish_non_exhaustive()
    }
}

impl Authority {
    /// Makes a new authority in an empty directory that only root may enter.
    pub fn create(directory: &Path) -> Result<Self> {
        fs::create_dir_all(directory).with_context(|| format!("could not create {}", directory.display()))?;
        fs::set_permissions(directory, Permissions::from_mode(0o700))?;
        let key = KeyPair::generate()?;
        let mut params = CertificateParams::default();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::DigitalSignature];
        params.distinguished_name = DistinguishedName::new();
        params.distinguished_name.push(DnType::CommonName, "galleonfs-lab");
        let certificate = params.self_signed(&key)?;
        write_file(&directory.join("ca.crt"), certificate.pem())?;
        let service_accounts = KeyPair::generate()?;
        write_file(
            &directory.join("service-accounts.key"),
            service_accounts.serialize_pem(),
        )?;
        write_file(
            &directory.join("service-accounts.pub"),
            service_accounts.public_key_pem(),
        )?;
        Ok(Self {
            directory: directory.to_path_buf(),
            issuer: Issuer::new(params, key),
        })
    }

    pub fn certificate(&self) -> PathBuf {
        self.directory.join("ca.crt")
    }

    pub fn service_account_key(&self) -> PathBuf {
        self.directory.join("service-accounts.key")
    }

    pub fn service_account_public_key(&self) -> PathBuf {
        self.directory.join("service-accounts.pub")
    }

    /// A certificate for both serving and calling.
    pub fn issue(&self, file: &str, subject: Subject<'_>) -> Result<Identity> {
        let key = KeyPair::generate()?;
        let mut params = CertificateParams::new(subject.hosts)?;
        params.distinguished_name = DistinguishedName::new();
        params.distinguished_name.push(DnType::CommonName, subject.name);
        if let Some(group) = subject.group {
            params.distinguished_name.push(DnType::OrganizationName, group);
        }
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
        let certificate = params.signed_by(&key, &self.issuer)?;
        let identity = Identity {
            certificate: self.directory.join(format!("{file}.crt")),
            key: self.directory.join(format!("{file}.key")),
        };
        write_file(&identity.certificate, certificate.pem())?;
        write_file(&identity.key, key.serialize_pem())?;
        Ok(identity)
    }

    /// A kubeconfig with a certificate of its own. JSON, which is YAML too.
    pub fn kubeconfig(&self, path: &Path, server: &str, context: &str, file: &str, subject: Subject<'_>) -> Result<()> {
        let identity = self.issue(file, subject)?;
        // Everything is inside the file: a person may copy it elsewhere.
        let embedded = |path: &Path| -> Result<String> { Ok(base64(&fs::read(path)?)) };
        let config = serde_json::json!({
            "apiVersion": "v1",
            "kind": "Config",
            "current-context": context,
            "clusters": [{"name": context, "cluster": {
                "server": server,
                "certificate-authority-data": embedded(&self.certificate())?,
            }}],
            "users": [{"name": subject.name, "user": {
                "client-certificate-data": embedded(&identity.certificate)?,
                "client-key-data": embedded(&identity.key)?,
            }}],
            "contexts": [{"name": context, "context": {"cluster": context, "user": subject.name}}],
        });
        write_file(path, format!("{config:#}\n"))?;
        fs::set_permissions(path, Permissions::from_mode(0o600))?;
        Ok(())
    }
}

fn base64(bytes: &[u8]) -> String {
    const ALPHABET: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let mut text = String::with_capacity(bytes.len().div_ceil(3) * 4);
    for chunk in bytes.chunks(3) {
        let word = chunk.iter().fold(0u32, |word, byte| word << 8 | u32::from(*byte)) << (8 * (3 - chunk.len()));
        for position in 0..4 {
            let sextet = (word >> (18 - 6 * position)) as usize & 63;
            text.push(if position <= chunk.len() {
                char::from(ALPHABET[sextet])
            } else {
                '='
            });
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn base64_agrees_with_the_examples_of_its_standard() {
        for (plain, encoded) in [
            ("", ""),
            ("f", "Zg=="),
            ("fo", "Zm8="),
            ("foo", "Zm9v"),
            ("foob", "Zm9vYg=="),
            ("foobar", "Zm9vYmFy"),
        ] {
            assert_eq!(base64(plain.as_bytes()), encoded);
        }
    }
}
