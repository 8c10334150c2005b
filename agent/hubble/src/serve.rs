//! Where Hubble's API is served: gRPC on a UNIX socket, and on TCP for who has a certificate.

use std::net::SocketAddr;
use std::path::Path;

use anyhow::{Context, Result};
use futures::{Stream, StreamExt};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, UnixListener};
use tokio_stream::wrappers::{ReceiverStream, TcpListenerStream, UnixListenerStream};
use tokio_util::sync::CancellationToken;
use tonic::service::{Routes, RoutesBuilder};
use tonic::transport::Server;
use tonic::transport::server::Connected;
use tonic_health::ServingStatus;

use crate::observer::observer_server::{Observer, ObserverServer};
use crate::peer::peer_server::{Peer, PeerServer};
use crate::tls;

/// What `hubble status` asks the health of.
const HEALTH: &str = "hubble.server.Observer";
/// Bytes of a request: filters, and nothing else that is large.
const LONGEST: usize = 1 << 20;
/// How many requests of one connection are answered at a time.
const AT_ONCE: u32 = 100;

/// An address where it is served.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Listen {
    /// The address.
    pub address: SocketAddr,
    /// Certificates; none to serve whoever asks.
    pub tls: Option<tls::Files>,
}

/// A server of flows, and of the nodes that serve them, if it knows these.
#[derive(Clone)]
pub struct Api {
    routes: Routes,
    shutdown: CancellationToken,
}

impl Api {
    /// Serves these until `shutdown`.
    pub async fn new<O: Observer, P: Peer>(
        observer: O,
        peers: Option<P>,
        shutdown: CancellationToken,
    ) -> Self {
        let (health, serving) = tonic_health::server::health_reporter();
        health.set_serving::<ObserverServer<O>>().await;
        health
            .set_service_status(HEALTH, ServingStatus::Serving)
            .await;
        let observer = ObserverServer::new(observer).max_decoding_message_size(LONGEST);
        let mut routes = RoutesBuilder::default();
        routes.add_service(serving).add_service(observer);
        if let Some(peers) = peers {
            routes.add_service(PeerServer::new(peers));
        }
        Self {
            routes: routes.routes(),
            shutdown,
        }
    }

    /// Serves on a socket that root alone may use: who reads flows sees who talks to whom.
    ///
    /// # Errors
    /// If it can't listen there.
    pub async fn unix(&self, socket: &Path) -> Result<()> {
        let _ = std::fs::remove_file(socket);
        let listener = UnixListener::bind(socket)
            .with_context(|| format!("could not listen on {}", socket.display()))?;
        use std::os::unix::fs::PermissionsExt;
        std::fs::set_permissions(socket, std::fs::Permissions::from_mode(0o600))
            .with_context(|| format!("could not protect {}", socket.display()))?;
        let served = self.connections(UnixListenerStream::new(listener)).await;
        let _ = std::fs::remove_file(socket);
        served
    }

    /// Serves at an address.
    ///
    /// # Errors
    /// If it can't listen there, or the certificates can't be used.
    pub async fn tcp(&self, listen: Listen) -> Result<()> {
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
        let ended = self.shutdown.clone();
        let served = Server::builder()
            .max_concurrent_streams(AT_ONCE)
            .add_routes(self.routes.clone())
            // One connection that fails takes no other with it.
            .serve_with_incoming_shutdown(
                connections.filter(|one| std::future::ready(one.is_ok())),
                ended.cancelled_owned(),
            );
        // Who follows flows does not keep the server from ending.
        tokio::select! {
            served = served => served.context("could not serve flows"),
            () = self.shutdown.cancelled() => Ok(()),
        }
    }
}
