//! The cluster's certificates: one authority, made at the first `up` and kept; leaves are made anew at each start.

use std::net::IpAddr;
use std::path::PathBuf;
use std::sync::Arc;

use anyhow::{Context, Result};
use rcgen::{
    BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair,
    KeyUsagePurpose, SanType,
};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::server::WebPkiClientVerifier;
use serde::{Deserialize, Serialize};

use crate::paths::{private_dir, write_private};

/// A certificate with its key, both PEM.
#[derive(Clone, Serialize, Deserialize)]
pub struct Leaf {
    /// The certificate.
    pub cert: String,
    /// Its private key (PKCS #8).
    pub key: String,
}

/// The authority that signs every certificate of the cluster.
pub struct Authority {
    /// The authority's certificate, PEM; what clients trust.
    pub ca_pem: String,
    issuer: Issuer<'static, KeyPair>,
    /// The key that signs service-account tokens, PEM.
    pub service_account_key: String,
}

/// How long leaves are valid; they are made anew at each start.
const LEAF_DAYS: i64 = 365;
const CA_DAYS: i64 = 3650;

impl Authority {
    /// Reads the authority from `dir`, or makes it there.
    pub fn open(dir: PathBuf) -> Result<Self> {
        private_dir(&dir)?;
        let (cert, key, sa) = (dir.join("ca.crt"), dir.join("ca.key"), dir.join("sa.key"));
        if !key.exists() {
            let key_pair = KeyPair::generate().context("could not make a key")?;
            let mut params = base_params("xebec-ca", &[], CA_DAYS)?;
            params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
            params.key_usages = vec![
                KeyUsagePurpose::KeyCertSign,
                KeyUsagePurpose::CrlSign,
                KeyUsagePurpose::DigitalSignature,
            ];
            let certificate = params
                .self_signed(&key_pair)
                .context("could not sign the authority")?;
            write_private(&cert, certificate.pem().as_bytes())?;
            write_private(&key, key_pair.serialize_pem().as_bytes())?;
        }
        if !sa.exists() {
            let key_pair = KeyPair::generate().context("could not make the service-account key")?;
            write_private(&sa, key_pair.serialize_pem().as_bytes())?;
        }
        let read = |path: &PathBuf| {
            std::fs::read_to_string(path)
                .with_context(|| format!("could not read {}", path.display()))
        };
        let ca_pem = read(&cert)?;
        let key_pair = KeyPair::from_pem(&read(&key)?)
            .with_context(|| format!("{} holds no usable private key", key.display()))?;
        let issuer = Issuer::from_ca_cert_pem(&ca_pem, key_pair)
            .with_context(|| format!("{} is no usable certificate", cert.display()))?;
        Ok(Self {
            ca_pem,
            issuer,
            service_account_key: read(&sa)?,
        })
    }

    /// A client certificate; `groups` become organizations (RFC 5280 `O`), as the API server reads them.
    pub fn client(&self, user: &str, groups: &[&str]) -> Result<Leaf> {
        let mut params = base_params(user, groups, LEAF_DAYS)?;
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ClientAuth];
        self.sign(params)
    }

    /// A server certificate for these names and addresses.
    pub fn server(&self, name: &str, dns: &[&str], addresses: &[IpAddr]) -> Result<Leaf> {
        let mut params = base_params(name, &[], LEAF_DAYS)?;
        for dns in dns {
            let name = (*dns)
                .try_into()
                .with_context(|| format!("{dns:?} is no DNS name"))?;
            params.subject_alt_names.push(SanType::DnsName(name));
        }
        params
            .subject_alt_names
            .extend(addresses.iter().map(|ip| SanType::IpAddress(*ip)));
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
        self.sign(params)
    }

    fn sign(&self, mut params: CertificateParams) -> Result<Leaf> {
        params.key_usages = vec![
            KeyUsagePurpose::DigitalSignature,
            KeyUsagePurpose::KeyEncipherment,
        ];
        params.use_authority_key_identifier_extension = true;
        let key = KeyPair::generate().context("could not make a key")?;
        let cert = params
            .signed_by(&key, &self.issuer)
            .context("could not sign a certificate")?;
        Ok(Leaf {
            cert: cert.pem(),
            key: key.serialize_pem(),
        })
    }
}

/// TLS for a server of ours: clients may show a certificate of the authority, and need not.
pub fn server_tls(ca_pem: &str, leaf: &Leaf, alpn: &[&[u8]]) -> Result<Arc<rustls::ServerConfig>> {
    let verifier = WebPkiClientVerifier::builder(Arc::new(roots(ca_pem)?))
        .allow_unauthenticated()
        .build()
        .context("could not build the client verifier")?;
    let (certs, key) = leaf.parse()?;
    let mut config = rustls::ServerConfig::builder()
        .with_client_cert_verifier(verifier)
        .with_single_cert(certs, key)
        .context("the server certificate and its key do not fit")?;
    config.alpn_protocols = alpn.iter().map(|name| name.to_vec()).collect();
    Ok(Arc::new(config))
}

/// TLS for a client of ours that shows `leaf` and trusts the authority alone.
pub fn client_tls(ca_pem: &str, leaf: &Leaf) -> Result<Arc<rustls::ClientConfig>> {
    let (certs, key) = leaf.parse()?;
    let config = rustls::ClientConfig::builder()
        .with_root_certificates(roots(ca_pem)?)
        .with_client_auth_cert(certs, key)
        .context("the client certificate and its key do not fit")?;
    Ok(Arc::new(config))
}

fn roots(ca_pem: &str) -> Result<rustls::RootCertStore> {
    let mut roots = rustls::RootCertStore::empty();
    let ca =
        CertificateDer::from_pem_slice(ca_pem.as_bytes()).context("the authority is no PEM")?;
    roots.add(ca).context("the authority can't be trusted")?;
    Ok(roots)
}

impl Leaf {
    fn parse(&self) -> Result<(Vec<CertificateDer<'static>>, PrivateKeyDer<'static>)> {
        let cert = CertificateDer::from_pem_slice(self.cert.as_bytes())
            .context("the certificate is no PEM")?;
        let key =
            PrivateKeyDer::from_pem_slice(self.key.as_bytes()).context("the key is no PEM")?;
        Ok((vec![cert], key))
    }
}

fn base_params(common_name: &str, organizations: &[&str], days: i64) -> Result<CertificateParams> {
    let mut params =
        CertificateParams::new(Vec::new()).context("could not make certificate parameters")?;
    params
        .distinguished_name
        .push(DnType::CommonName, common_name);
    for organization in organizations {
        params
            .distinguished_name
            .push(DnType::OrganizationName, *organization);
    }
    // A clock that runs a little behind must not refuse a certificate made just now.
    let now = std::time::SystemTime::now();
    params.not_before = (now - std::time::Duration::from_secs(3600)).into();
    params.not_after = (now + std::time::Duration::from_secs(days as u64 * 86_400)).into();
    Ok(params)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn authority_is_kept_and_signs_usable_leaves() {
        let _ = rustls::crypto::ring::default_provider().install_default();
        let dir = tempfile::tempdir().unwrap();
        let first = Authority::open(dir.path().join("pki")).unwrap();
        let again = Authority::open(dir.path().join("pki")).unwrap();
        assert_eq!(first.ca_pem, again.ca_pem);
        assert_eq!(first.service_account_key, again.service_account_key);
        let server = again
            .server(
                "kube-apiserver",
                &["localhost"],
                &["127.0.0.1".parse().unwrap()],
            )
            .unwrap();
        server_tls(&again.ca_pem, &server, &[b"h2"]).unwrap();
        let client = again
            .client("kubernetes-admin", &["system:masters"])
            .unwrap();
        client_tls(&again.ca_pem, &client).unwrap();
    }
}
