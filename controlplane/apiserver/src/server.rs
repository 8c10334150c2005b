//! Listening: TLS connections and in-process calls, both into the one handler.

use std::convert::Infallible;
use std::net::{IpAddr, SocketAddr};
use std::ops::RangeInclusive;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use bytes::Bytes;
use http::{Request, Response};
use http_body_util::BodyExt;
use http_body_util::combinators::UnsyncBoxBody;
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo};
use ipnet::{IpNet, Ipv4Net};
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;
use tracing::{debug, warn};
use xebec_store::Store;

use crate::authn::{self, UserInfo};
use crate::handler::{Handler, Identity};
use crate::tokens::Tokens;

/// Any error of a body.
pub(crate) type BoxError = Box<dyn std::error::Error + Send + Sync>;
/// The body of a request, from a connection or from this process.
pub(crate) type RequestBody = UnsyncBoxBody<Bytes, BodyError>;

/// The body of a request broke off.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub(crate) struct BodyError(String);

impl BodyError {
    fn of(error: &dyn std::error::Error) -> Self {
        Self(error.to_string())
    }
}

/// The body of an answer.
pub type ResponseBody = UnsyncBoxBody<Bytes, BoxError>;

/// How the API server runs.
pub struct Config {
    /// Addresses to listen on.
    pub listen: Vec<SocketAddr>,
    /// TLS; client certificates are optional and verified by it.
    pub tls: Arc<rustls::ServerConfig>,
    /// Ranges of Service addresses, at most one of each family; the first is that of Services that do not say.
    pub service_cidrs: Vec<IpNet>,
    /// Range of node ports.
    pub node_port_range: RangeInclusive<u16>,
    /// `iss` of service-account tokens, and their default audience.
    pub service_account_issuer: String,
    /// P-256 key that signs them, PKCS #8 PEM.
    pub service_account_key_pem: String,
    /// TLS towards kubelets.
    pub kubelet_client_tls: Arc<rustls::ClientConfig>,
    /// The address that others reach this server by.
    pub advertise_address: IpAddr,
    /// The port that they reach it by.
    pub secure_port: u16,
    /// Gives volumes and claims the finalizers that keep them while they are used (StorageObjectInUseProtection).
    /// Only controllers take them away again, so it is for clusters that run these.
    pub storage_protection: bool,
}

impl Default for Config {
    /// Everything but credentials, which have no default: no TLS handshake succeeds, and starting asks for a key.
    fn default() -> Self {
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let versions = "the provider has the default protocol versions";
        let tls = rustls::ServerConfig::builder_with_provider(provider.clone())
            .with_safe_default_protocol_versions()
            .expect(versions)
            .with_no_client_auth()
            .with_cert_resolver(Arc::new(rustls::server::ResolvesServerCertUsingSni::new()));
        let kubelet = rustls::ClientConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .expect(versions)
            .with_root_certificates(rustls::RootCertStore::empty())
            .with_no_client_auth();
        Self {
            listen: Vec::new(),
            tls: Arc::new(tls),
            service_cidrs: vec![IpNet::V4(Ipv4Net::new_assert(
                std::net::Ipv4Addr::new(10, 96, 0, 0),
                16,
            ))],
            node_port_range: 30000..=32767,
            service_account_issuer: "https://kubernetes.default.svc.cluster.local".into(),
            service_account_key_pem: String::new(),
            kubelet_client_tls: Arc::new(kubelet),
            advertise_address: IpAddr::from([127, 0, 0, 1]),
            secure_port: 6443,
            storage_protection: false,
        }
    }
}

/// Why the server could not be started.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// A port is taken, or an address is not ours.
    #[error("could not listen on {0}: {1}")]
    Listen(SocketAddr, std::io::Error),
    /// The configuration makes no sense.
    #[error("{0}")]
    Config(String),
    /// The store refused the objects that every cluster has.
    #[error("could not make the cluster's first objects: {0}")]
    Bootstrap(String),
}

/// A running API server.
pub struct ApiServer {
    handler: Arc<Handler>,
    addresses: Vec<SocketAddr>,
}

impl ApiServer {
    /// Starts it; requests are served when this returns. It ends with `shutdown`.
    pub async fn start(
        config: Config,
        store: Arc<dyn Store>,
        shutdown: CancellationToken,
    ) -> Result<Arc<Self>, StartError> {
        let cidrs = service_ranges(&config.service_cidrs).map_err(StartError::Config)?;
        let tokens = Tokens::new(
            &config.service_account_key_pem,
            config.service_account_issuer.clone(),
        )
        .map_err(StartError::Config)?;
        let (mut listeners, mut addresses) = (Vec::new(), Vec::new());
        for address in &config.listen {
            let failed = |error| StartError::Listen(*address, error);
            let listener = TcpListener::bind(address).await.map_err(failed)?;
            addresses.push(listener.local_addr().map_err(failed)?);
            listeners.push(listener);
        }
        let tls = tokio_rustls::TlsAcceptor::from(config.tls.clone());
        let handler = Arc::new(Handler::new(config, tokens, cidrs, store));
        handler
            .bootstrap()
            .await
            .map_err(|error| StartError::Bootstrap(error.to_string()))?;
        for listener in listeners {
            tokio::spawn(accept(
                listener,
                tls.clone(),
                handler.clone(),
                shutdown.clone(),
            ));
        }
        Ok(Arc::new(Self { handler, addresses }))
    }

    /// Where it listens, also where the configuration left the port to the system.
    pub fn addresses(&self) -> &[SocketAddr] {
        &self.addresses
    }

    /// A service for `kube::Client::new` whose requests are function calls with this identity.
    pub fn in_process(self: &Arc<Self>, user: UserInfo) -> InProcess {
        InProcess {
            handler: self.handler.clone(),
            user: Arc::new(user),
        }
    }
}

/// The ranges without the bits of hosts; or what is wrong with them.
fn service_ranges(given: &[IpNet]) -> Result<Vec<IpNet>, String> {
    match given {
        [] => return Err("there is no range of Service addresses".into()),
        [_] => {}
        [one, other] if one.addr().is_ipv4() != other.addr().is_ipv4() => {}
        [one, other] => {
            return Err(format!(
                "the Service ranges {one} and {other} are of one family: give one of each"
            ));
        }
        more => {
            return Err(format!(
                "there are {} Service ranges: give one of each family at most",
                more.len()
            ));
        }
    }
    if let Some(range) = given.iter().find(|range| range.hosts().nth(1).is_none()) {
        return Err(format!("the Service range {range} is too small"));
    }
    Ok(given.iter().map(IpNet::trunc).collect())
}

async fn accept(
    listener: TcpListener,
    tls: tokio_rustls::TlsAcceptor,
    handler: Arc<Handler>,
    shutdown: CancellationToken,
) {
    loop {
        let (stream, peer) = tokio::select! {
            () = shutdown.cancelled() => return,
            accepted = listener.accept() => match accepted {
                Ok(accepted) => accepted,
                Err(error) => {
                    // Out of descriptors, most likely: others will be closed meanwhile.
                    warn!(%error, "could not accept a connection");
                    tokio::time::sleep(std::time::Duration::from_millis(50)).await;
                    continue;
                }
            },
        };
        let (tls, handler, shutdown) = (tls.clone(), handler.clone(), shutdown.clone());
        tokio::spawn(async move {
            // Small answers must not wait for the peer's acknowledgement.
            let _ = stream.set_nodelay(true);
            let handshake =
                tokio::time::timeout(std::time::Duration::from_secs(10), tls.accept(stream)).await;
            let stream = match handshake {
                Ok(Ok(stream)) => stream,
                Ok(Err(error)) => return debug!(%peer, %error, "TLS handshake failed"),
                Err(_) => return debug!(%peer, "TLS handshake took too long"),
            };
            let certificate = stream
                .get_ref()
                .1
                .peer_certificates()
                .and_then(|all| all.first())
                .and_then(authn::of_certificate);
            let identity = Identity::Connection {
                certificate: certificate.map(Arc::new),
            };
            let service = service_fn(move |request: Request<hyper::body::Incoming>| {
                let (handler, identity) = (handler.clone(), identity.clone());
                async move {
                    let request = request
                        .map(|body| body.map_err(|error| BodyError::of(&error)).boxed_unsync());
                    Ok::<_, Infallible>(handler.handle(request, identity).await)
                }
            });
            let builder = hyper_util::server::conn::auto::Builder::new(TokioExecutor::new());
            let connection = builder.serve_connection_with_upgrades(TokioIo::new(stream), service);
            tokio::select! {
                result = connection => if let Err(error) = result {
                    debug!(%peer, %error, "connection ended");
                },
                () = shutdown.cancelled() => {}
            }
        });
    }
}

/// Calls into the server from within its process.
#[derive(Clone)]
pub struct InProcess {
    handler: Arc<Handler>,
    user: Arc<UserInfo>,
}

impl<B> tower_service::Service<Request<B>> for InProcess
where
    B: http_body::Body<Data = Bytes> + Send + 'static,
    B::Error: Into<BoxError>,
{
    type Response = Response<ResponseBody>;
    type Error = Infallible;
    type Future = Pin<Box<dyn Future<Output = Result<Self::Response, Infallible>> + Send>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: Request<B>) -> Self::Future {
        let (handler, user) = (self.handler.clone(), self.user.clone());
        let request = request.map(|body| {
            let text = |error: B::Error| BodyError::of(error.into().as_ref());
            body.map_err(text).boxed_unsync()
        });
        Box::pin(async move { Ok(handler.handle(request, Identity::Known(user)).await) })
    }
}
