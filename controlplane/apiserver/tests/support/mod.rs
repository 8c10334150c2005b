//! A real API server over a store in a directory, with certificates of its own, and an HTTP/1 client for it.

#![allow(
    dead_code,
    clippy::unwrap_used,
    reason = "each test uses a part of it; a failed step fails the test"
)]

use std::net::{Ipv4Addr, SocketAddr};
use std::path::Path;
use std::sync::Arc;

use bytes::Bytes;
use http::{HeaderMap, Request, Response};
use http_body_util::{BodyExt, Full};
use hyper::body::Incoming;
use hyper::client::conn::http1::{self, SendRequest};
use hyper_util::rt::TokioIo;
use rcgen::{
    BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair,
};
use rustls_pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer, ServerName};
use tokio::net::TcpStream;
use tokio_util::sync::CancellationToken;
use xebec_apiserver::{ApiServer, Config};
use xebec_store::{Embedded, Options};

/// A running server and what a client needs to speak to it.
pub struct Cluster {
    pub server: Arc<ApiServer>,
    pub address: SocketAddr,
    ca: CertificateDer<'static>,
    ca_pem: String,
    issuer: Issuer<'static, KeyPair>,
    shutdown: CancellationToken,
}

impl Drop for Cluster {
    fn drop(&mut self) {
        self.shutdown.cancel();
    }
}

fn private(key: &KeyPair) -> PrivateKeyDer<'static> {
    PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(key.serialize_der()))
}

impl Cluster {
    /// Starts it on loopback; port 0 is any free one.
    pub async fn start(directory: &Path, port: u16, mut config: Config) -> Self {
        let ca_key = KeyPair::generate().unwrap();
        let mut ca = CertificateParams::new(Vec::new()).unwrap();
        ca.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        ca.distinguished_name
            .push(DnType::CommonName, "xebec-example");
        let ca_certificate = ca.self_signed(&ca_key).unwrap();
        let issuer = Issuer::new(ca, ca_key);

        let key = KeyPair::generate().unwrap();
        let names = vec!["localhost".into(), "127.0.0.1".into()];
        let mut params = CertificateParams::new(names).unwrap();
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
        let certificate = params.signed_by(&key, &issuer).unwrap();
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let mut roots = rustls::RootCertStore::empty();
        roots.add(ca_certificate.der().clone()).unwrap();
        let clients = rustls::server::WebPkiClientVerifier::builder_with_provider(
            Arc::new(roots),
            provider.clone(),
        )
        .allow_unauthenticated()
        .build()
        .unwrap();
        let mut tls = rustls::ServerConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_client_cert_verifier(clients)
            .with_single_cert(vec![certificate.der().clone()], private(&key))
            .unwrap();
        tls.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];

        config.listen = vec![SocketAddr::from((Ipv4Addr::LOCALHOST, port))];
        config.tls = Arc::new(tls);
        config.service_account_key_pem = KeyPair::generate().unwrap().serialize_pem();
        let store = Embedded::open(&directory.join("store"), Options::default()).unwrap();
        let shutdown = CancellationToken::new();
        let server = ApiServer::start(config, store, shutdown.clone())
            .await
            .unwrap();
        Self {
            address: server.addresses()[0],
            server,
            ca: ca_certificate.der().clone(),
            ca_pem: ca_certificate.pem(),
            issuer,
            shutdown,
        }
    }

    fn identity(&self, user: &str, groups: &[&str]) -> (rcgen::Certificate, KeyPair) {
        let key = KeyPair::generate().unwrap();
        let mut params = CertificateParams::new(Vec::new()).unwrap();
        params.distinguished_name.push(DnType::CommonName, user);
        for group in groups {
            params
                .distinguished_name
                .push(DnType::OrganizationName, *group);
        }
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ClientAuth];
        let certificate = params.signed_by(&key, &self.issuer).unwrap();
        (certificate, key)
    }

    fn client_tls(
        &self,
    ) -> rustls::ConfigBuilder<rustls::ClientConfig, rustls::client::WantsClientCert> {
        let mut roots = rustls::RootCertStore::empty();
        roots.add(self.ca.clone()).unwrap();
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        rustls::ClientConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_root_certificates(roots)
    }

    /// A client with a certificate of this user.
    pub fn client(&self, user: &str, groups: &[&str]) -> Client {
        let (certificate, key) = self.identity(user, groups);
        let tls = self
            .client_tls()
            .with_client_auth_cert(vec![certificate.der().clone()], private(&key))
            .unwrap();
        Client::new(self.address, tls)
    }

    /// A client of the cluster's administrator.
    pub fn admin(&self) -> Client {
        self.client("kubernetes-admin", &["system:masters"])
    }

    /// A client without a certificate.
    pub fn stranger(&self) -> Client {
        Client::new(self.address, self.client_tls().with_no_client_auth())
    }

    /// The administrator's kubeconfig.
    pub fn kubeconfig(&self) -> String {
        use base64::Engine;
        let text = |pem: String| base64::engine::general_purpose::STANDARD.encode(pem);
        let (certificate, key) = self.identity("kubernetes-admin", &["system:masters"]);
        serde_json::json!({
            "apiVersion": "v1", "kind": "Config", "current-context": "x",
            "clusters": [{"name": "x", "cluster": {"server": format!("https://{}", self.address),
                "certificate-authority-data": text(self.ca_pem.clone())}}],
            "users": [{"name": "x", "user": {"client-certificate-data": text(certificate.pem()),
                "client-key-data": text(key.serialize_pem())}}],
            "contexts": [{"name": "x", "context": {"cluster": "x", "user": "x"}}],
        })
        .to_string()
    }
}

/// Requests over one kept connection.
pub struct Client {
    address: SocketAddr,
    tls: Arc<rustls::ClientConfig>,
    kept: tokio::sync::Mutex<Option<SendRequest<Full<Bytes>>>>,
}

/// A whole answer.
pub struct Reply {
    pub status: u16,
    pub headers: HeaderMap,
    pub body: Bytes,
}

impl Client {
    fn new(address: SocketAddr, tls: rustls::ClientConfig) -> Self {
        Self {
            address,
            tls: Arc::new(tls),
            kept: tokio::sync::Mutex::default(),
        }
    }

    async fn connect(&self) -> SendRequest<Full<Bytes>> {
        let stream = TcpStream::connect(self.address).await.unwrap();
        stream.set_nodelay(true).unwrap();
        let name = ServerName::try_from("localhost").unwrap();
        let stream = tokio_rustls::TlsConnector::from(self.tls.clone())
            .connect(name, stream)
            .await
            .unwrap();
        let (sender, connection) = http1::handshake(TokioIo::new(stream)).await.unwrap();
        tokio::spawn(connection);
        sender
    }

    /// One request and its whole answer.
    pub async fn ask(&self, mut request: Request<Full<Bytes>>) -> Reply {
        request
            .headers_mut()
            .insert("host", "localhost".parse().unwrap());
        let mut kept = self.kept.lock().await;
        let mut sender = match kept.take() {
            Some(sender) => sender,
            None => self.connect().await,
        };
        if sender.ready().await.is_err() {
            sender = self.connect().await;
        }
        let response = sender.send_request(request).await.unwrap();
        let (parts, body) = response.into_parts();
        let body = body.collect().await.unwrap().to_bytes();
        *kept = Some(sender);
        Reply {
            status: parts.status.as_u16(),
            headers: parts.headers,
            body,
        }
    }

    /// One request on a connection of its own, whose answer is read bit by bit.
    pub async fn open(&self, mut request: Request<Full<Bytes>>) -> Response<Incoming> {
        request
            .headers_mut()
            .insert("host", "localhost".parse().unwrap());
        self.connect().await.send_request(request).await.unwrap()
    }
}
