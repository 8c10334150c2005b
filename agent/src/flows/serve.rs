//! Where flows are served: gRPC on a UNIX socket, and on TCP for who has a certificate.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use futures::{Stream, StreamExt};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, UnixListener};
use tokio::sync::watch;
use tokio_stream::wrappers::{ReceiverStream, TcpListenerStream, UnixListenerStream};
use tokio_util::sync::CancellationToken;
use tonic::transport::Server;
use tonic::transport::server::Connected;
use tonic_health::ServingStatus;
use xebec_hubble::observer::observer_server::ObserverServer;
use xebec_hubble::peer::peer_server::PeerServer;

use super::Flows;
use super::observer::NodeObserver;
use super::peers::Peers;
use super::tls;
use crate::nodes::Nodes;

/// What `hubble status` asks the health of.
const HEALTH: &str = "hubble.server.Observer";
/// Bytes of a request: filters, and nothing else that is large.
const LONGEST: usize = 1 << 20;
/// How many requests of one connection are answered at a time.
const AT_ONCE: u32 = 100;

/// Where flows are served besides the socket.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Listen {
    /// The address.
    pub address: SocketAddr,
    /// Certificates; none to serve whoever asks.
    pub tls: Option<tls::Files>,
}

/// Serves until `shutdown`.
pub(crate) async fn run(
    socket: PathBuf,
    listen: Option<Listen>,
    flows: Flows,
    nodes: watch::Receiver<Nodes>,
    shutdown: CancellationToken,
) -> Result<()> {
    let on_tcp = listen
        .as_ref()
        .map(|listen| (listen.address.port(), listen.tls.is_some()));
    let served = Served {
        observer: NodeObserver::new(flows, shutdown.clone()),
        peers: Peers::new(nodes, on_tcp, shutdown.clone()),
        shutdown,
    };
    let tcp = async {
        match listen {
            Some(listen) => served.tcp(listen).await,
            None => Ok(()),
        }
    };
    tokio::try_join!(served.unix(&socket), tcp).map(drop)
}

struct Served {
    observer: NodeObserver,
    peers: Peers,
    shutdown: CancellationToken,
}

impl Served {
    async fn unix(&self, socket: &Path) -> Result<()> {
        let _ = std::fs::remove_file(socket);
        let listener = UnixListener::bind(socket)
            .with_context(|| format!("could not listen on {}", socket.display()))?;
        // Who reads flows sees who talks to whom: root alone.
        use std::os::unix::fs::PermissionsExt;
        std::fs::set_permissions(socket, std::fs::Permissions::from_mode(0o600))
            .with_context(|| format!("could not protect {}", socket.display()))?;
        let served = self.connections(UnixListenerStream::new(listener)).await;
        let _ = std::fs::remove_file(socket);
        served
    }

    async fn tcp(&self, listen: Listen) -> Result<()> {
        let listener = TcpListener::bind(listen.address)
            .await
            .with_context(|| format!("could not listen on {} for flows", listen.address))?;
        match listen.tls {
            Some(files) => {
                let proved =
                    tls::accept(listener, files).context("could not serve flows by TLS")?;
                self.connections(ReceiverStream::new(proved)).await
            }
            None => {
                tracing::warn!(address = %listen.address, "flows are served to whoever asks, without TLS");
                self.connections(TcpListenerStream::new(listener)).await
            }
        }
    }

    async fn connections<C>(
        &self,
        connections: impl Stream<Item = std::io::Result<C>>,
    ) -> Result<()>
    where
        C: AsyncRead + AsyncWrite + Connected + Unpin + Send + 'static,
    {
        let (health, serving) = tonic_health::server::health_reporter();
        let observer =
            ObserverServer::new(self.observer.clone()).max_decoding_message_size(LONGEST);
        health.set_serving::<ObserverServer<NodeObserver>>().await;
        health
            .set_service_status(HEALTH, ServingStatus::Serving)
            .await;
        let ended = self.shutdown.clone();
        let served = Server::builder()
            .max_concurrent_streams(AT_ONCE)
            .add_service(serving)
            .add_service(observer)
            .add_service(PeerServer::new(self.peers.clone()))
            // One connection that fails takes no other with it.
            .serve_with_incoming_shutdown(
                connections.filter(|one| std::future::ready(one.is_ok())),
                ended.cancelled_owned(),
            );
        // Who follows flows does not keep the agent from ending.
        tokio::select! {
            served = served => served.context("could not serve flows"),
            () = self.shutdown.cancelled() => Ok(()),
        }
    }
}
