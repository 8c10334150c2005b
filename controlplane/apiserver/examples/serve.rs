//! Serves an empty cluster on loopback with certificates of its own, and writes an administrator's kubeconfig.
//!
//! `serve <directory> <port>`: `<directory>/admin.kubeconfig` is there when requests are served.

use std::net::{Ipv4Addr, SocketAddr};
use std::path::PathBuf;
use std::sync::Arc;

use base64::Engine;
use rcgen::{
    BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair,
};
use rustls_pki_types::{PrivateKeyDer, PrivatePkcs8KeyDer};
use tokio_util::sync::CancellationToken;
use xebec_apiserver::{ApiServer, Config};
use xebec_store::{Embedded, Options};

type Any = Box<dyn std::error::Error + Send + Sync>;

#[tokio::main]
async fn main() -> Result<(), Any> {
    let mut arguments = std::env::args().skip(1);
    let directory = PathBuf::from(arguments.next().ok_or("usage: serve <directory> <port>")?);
    let port: u16 = arguments
        .next()
        .ok_or("usage: serve <directory> <port>")?
        .parse()?;
    std::fs::create_dir_all(&directory)?;

    let ca_key = KeyPair::generate()?;
    let mut ca = CertificateParams::new(Vec::new())?;
    ca.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    ca.distinguished_name
        .push(DnType::CommonName, "xebec-example");
    let ca_certificate = ca.self_signed(&ca_key)?;
    let issuer = Issuer::new(ca, ca_key);

    let server_key = KeyPair::generate()?;
    let mut server = CertificateParams::new(vec!["localhost".into(), "127.0.0.1".into()])?;
    server.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
    let server_certificate = server.signed_by(&server_key, &issuer)?;

    let admin_key = KeyPair::generate()?;
    let mut admin = CertificateParams::new(Vec::new())?;
    admin
        .distinguished_name
        .push(DnType::CommonName, "kubernetes-admin");
    admin
        .distinguished_name
        .push(DnType::OrganizationName, "system:masters");
    admin.extended_key_usages = vec![ExtendedKeyUsagePurpose::ClientAuth];
    let admin_certificate = admin.signed_by(&admin_key, &issuer)?;

    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let mut roots = rustls::RootCertStore::empty();
    roots.add(ca_certificate.der().clone())?;
    let clients = rustls::server::WebPkiClientVerifier::builder_with_provider(
        Arc::new(roots),
        provider.clone(),
    )
    .allow_unauthenticated()
    .build()?;
    let key = PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(server_key.serialize_der()));
    let mut tls = rustls::ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()?
        .with_client_cert_verifier(clients)
        .with_single_cert(vec![server_certificate.der().clone()], key)?;
    tls.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];

    let store = Embedded::open(&directory.join("store"), Options::default())?;
    let config = Config {
        listen: vec![SocketAddr::from((Ipv4Addr::LOCALHOST, port))],
        tls: Arc::new(tls),
        service_account_key_pem: KeyPair::generate()?.serialize_pem(),
        secure_port: port,
        ..Config::default()
    };
    let shutdown = CancellationToken::new();
    let server = ApiServer::start(config, store, shutdown.clone()).await?;
    let text = |pem: String| base64::engine::general_purpose::STANDARD.encode(pem);
    let kubeconfig = serde_json::json!({
        "apiVersion": "v1", "kind": "Config", "current-context": "x",
        "clusters": [{"name": "x", "cluster": {"server": format!("https://127.0.0.1:{port}"), "certificate-authority-data": text(ca_certificate.pem())}}],
        "users": [{"name": "x", "user": {"client-certificate-data": text(admin_certificate.pem()), "client-key-data": text(admin_key.serialize_pem())}}],
        "contexts": [{"name": "x", "context": {"cluster": "x", "user": "x"}}],
    });
    std::fs::write(directory.join("admin.kubeconfig"), kubeconfig.to_string())?;
    tokio::signal::ctrl_c().await?;
    shutdown.cancel();
    drop(server);
    Ok(())
}
