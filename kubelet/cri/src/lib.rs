//! The container runtime: the CRI v1 server, images, sandboxes and containers.
//!
//! [`run`] serves CRI v1 on a UNIX socket. What runs is kept by one shim per pod
//! (`xebec-shim`) and on disk, so that a server that was killed finds everything
//! as it was.

pub mod cni;
pub mod container;
mod events;
mod image_service;
pub mod images;
mod netns;
mod overlay;
pub mod records;
pub mod runtime;
mod runtime_service;
mod sandbox;
pub mod shim_client;
mod spec;
mod stats;
mod status;
pub mod streaming;
mod users;

use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;

use anyhow::Context;
use tokio_stream::wrappers::UnixListenerStream;
use tokio_util::sync::CancellationToken;
use xebec_cri_api::v1::image_service_server::ImageServiceServer;
use xebec_cri_api::v1::runtime_service_server::RuntimeServiceServer;

pub use xebec_cri_api as api;

/// How long calls under way may take after a shutdown.
const DRAIN: std::time::Duration = std::time::Duration::from_secs(1);

/// What the runtime needs to know.
#[derive(Clone, Debug, serde::Serialize)]
pub struct Config {
    /// The UNIX socket to serve CRI on.
    pub socket: PathBuf,
    /// Images, layers, and what is known of pods; survives a reboot.
    pub root: PathBuf,
    /// Sockets, network namespaces and mounts; gone after a reboot.
    pub state: PathBuf,
    /// How to start a shim, for example `["/proc/self/exe", "shim"]`.
    pub shim_command: Vec<String>,
    /// Where CNI plugins are, in the order to look.
    pub cni_bin_dirs: Vec<PathBuf>,
    /// Where CNI configurations are; the first by name counts.
    pub cni_conf_dir: PathBuf,
    /// The cgroup of pods for which the kubelet names none, for example `/xebec`.
    pub cgroup_parent: String,
    /// A directory in the cgroup2 hierarchy; each pod's processes are put into a
    /// directory of their own below it, so that cgroup eBPF programs see them.
    pub unified_cgroup: Option<PathBuf>,
    /// Registries (`host` or `host:port`) spoken to over plain HTTP, or over
    /// HTTPS without checking certificates. Loopback addresses are always tried
    /// over HTTP as well.
    pub insecure_registries: Vec<String>,
    /// Where exec, attach and port-forward streams are served; loopback only.
    /// Port 0 lets the kernel choose.
    pub streaming_address: SocketAddr,
}

impl Config {
    /// The usual layout of one node: data in `root`, sockets in `run`.
    pub fn new(root: PathBuf, run: PathBuf) -> Self {
        Self {
            socket: run.join("cri.sock"),
            root,
            state: run.join("cri"),
            shim_command: vec!["/proc/self/exe".to_owned(), "shim".to_owned()],
            cni_bin_dirs: vec![PathBuf::from("/opt/cni/bin"), PathBuf::from("/usr/lib/cni")],
            cni_conf_dir: PathBuf::from("/etc/cni/net.d"),
            cgroup_parent: "/xebec".to_owned(),
            unified_cgroup: None,
            insecure_registries: Vec::new(),
            streaming_address: SocketAddr::from(([127, 0, 0, 1], 0)),
        }
    }
}

/// How long a process that was killed may take to end.
const LETS_GO: std::time::Duration = std::time::Duration::from_secs(3);

/// Serves CRI until `shutdown`; pods go on running after that.
///
/// # Errors
/// When the directories or the socket can't be made, or the socket is in use.
pub async fn run(config: Config, shutdown: CancellationToken) -> anyhow::Result<()> {
    let socket = config.socket.clone();
    if let Some(dir) = socket.parent() {
        std::fs::create_dir_all(dir).with_context(|| format!("cannot make {}", dir.display()))?;
    }
    // The socket's file outlives a killed server; a live one still answers. One that was killed just now may not have let
    // go of it yet.
    let begun = std::time::Instant::now();
    while tokio::net::UnixStream::connect(&socket).await.is_ok() {
        anyhow::ensure!(
            begun.elapsed() < LETS_GO,
            "another container runtime serves {}; stop it first",
            socket.display()
        );
        tokio::time::sleep(std::time::Duration::from_millis(20)).await;
    }
    match std::fs::remove_file(&socket) {
        Err(err) if err.kind() != std::io::ErrorKind::NotFound => {
            return Err(err).with_context(|| format!("cannot remove {}", socket.display()));
        }
        _ => {}
    }
    let runtime = Arc::new(runtime::Runtime::open(config, shutdown.clone()).await?);
    let streams = streaming::server::listen(&runtime).await?;
    runtime.recover().await;
    let listener = tokio::net::UnixListener::bind(&socket)
        .with_context(|| format!("cannot listen on {}", socket.display()))?;
    set_owner_only(&socket)?;
    tokio::spawn(streaming::server::serve(runtime.clone(), streams));
    tracing::info!("container runtime serves {}", socket.display());
    let server = tonic::transport::Server::builder()
        .add_service(
            RuntimeServiceServer::new(runtime_service::Service(runtime.clone()))
                .max_decoding_message_size(16 << 20),
        )
        .add_service(
            ImageServiceServer::new(image_service::Service(runtime.clone()))
                .max_decoding_message_size(16 << 20),
        )
        .serve_with_incoming_shutdown(
            UnixListenerStream::new(listener),
            shutdown.clone().cancelled_owned(),
        );
    // Calls under way may end; a client that keeps its connection open may not
    // keep the server.
    let served = tokio::select! {
        served = server => served,
        () = async {
            shutdown.cancelled().await;
            tokio::time::sleep(DRAIN).await;
        } => Ok(()),
    };
    let _ = std::fs::remove_file(&socket);
    if runtime.registry.sandboxes().is_empty() {
        // With the last pod gone, its parent cgroups should not stay behind.
        container::remove_cgroup(&runtime.config.cgroup_parent);
        if let Some(dir) = &runtime.config.unified_cgroup {
            let _ = std::fs::remove_dir(dir);
        }
    }
    served.context("the CRI server failed")
}

fn set_owner_only(socket: &std::path::Path) -> anyhow::Result<()> {
    use std::os::unix::fs::PermissionsExt;
    std::fs::set_permissions(socket, std::fs::Permissions::from_mode(0o600))
        .with_context(|| format!("cannot protect {}", socket.display()))
}
