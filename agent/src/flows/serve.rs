//! Where flows are served: gRPC on a UNIX socket.

use std::path::PathBuf;

use anyhow::{Context, Result};
use tokio::net::UnixListener;
use tokio_stream::wrappers::UnixListenerStream;
use tokio_util::sync::CancellationToken;
use tonic::transport::Server;
use tonic_health::ServingStatus;
use xebec_hubble::observer::observer_server::ObserverServer;

use super::Flows;
use super::observer::NodeObserver;

/// What `hubble status` asks the health of.
const HEALTH: &str = "hubble.server.Observer";
/// Bytes of a request: filters, and nothing else that is large.
const LONGEST: usize = 1 << 20;
/// How many requests of one connection are answered at a time.
const AT_ONCE: u32 = 100;

/// Serves until `shutdown`.
pub(crate) async fn run(socket: PathBuf, flows: Flows, shutdown: CancellationToken) -> Result<()> {
    let _ = std::fs::remove_file(&socket);
    let listener = UnixListener::bind(&socket)
        .with_context(|| format!("could not listen on {}", socket.display()))?;
    // Who reads flows sees who talks to whom: root alone.
    use std::os::unix::fs::PermissionsExt;
    std::fs::set_permissions(&socket, std::fs::Permissions::from_mode(0o600))
        .with_context(|| format!("could not protect {}", socket.display()))?;
    let (health, serving) = tonic_health::server::health_reporter();
    let observer = ObserverServer::new(NodeObserver::new(flows, shutdown.clone()))
        .max_decoding_message_size(LONGEST);
    health.set_serving::<ObserverServer<NodeObserver>>().await;
    health
        .set_service_status(HEALTH, ServingStatus::Serving)
        .await;
    let ended = shutdown.clone();
    let served = Server::builder()
        .max_concurrent_streams(AT_ONCE)
        .add_service(serving)
        .add_service(observer)
        .serve_with_incoming_shutdown(UnixListenerStream::new(listener), ended.cancelled_owned());
    // Who follows flows does not keep the agent from ending.
    tokio::select! {
        served = served => served.context("could not serve flows")?,
        () = shutdown.cancelled() => {}
    }
    let _ = std::fs::remove_file(&socket);
    Ok(())
}
