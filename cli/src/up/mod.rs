//! `xebec up`: wires the parts into a running cluster, and takes it down again.

pub mod child;
mod control_plane;
pub mod detach;
mod node;
pub mod nodes;
mod plan;
mod preflight;
mod process;
mod ranges;
pub mod state;
mod switch;
pub mod teardown;

pub use preflight::{lock, root as require_root};

use std::net::{IpAddr, SocketAddr};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use clap::{Args, ValueEnum};
use ipnet::IpNet;
use tokio_util::sync::CancellationToken;
use tracing::info;
use xebec_agent::loader::Xdp;
use xebec_hubble::client::Server;

use crate::paths::{Layout, private_dir, write_private};
use crate::pki::Authority;
use control_plane::ControlPlane;
use nodes::Nodes;
use state::UpState;

/// How `up` starts the cluster.
#[derive(Args)]
pub struct Up {
    /// Return when all nodes are Ready; the cluster goes on in the background
    #[arg(long)]
    pub detach: bool,
    /// Leave the pods running when `up` ends
    #[arg(long)]
    keep: bool,
    /// How many nodes: with more than one, each has a process and a network namespace of its own
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u8).range(1..=64))]
    nodes: u8,
    /// Addresses of this machine, where those of the default routes will not do: at most one of IPv4 and one of IPv6
    #[arg(long, value_delimiter = ',')]
    node_ip: Vec<IpAddr>,
    /// Name of the node; the host name by default. Several nodes are node1, node2, ...
    #[arg(long)]
    node_name: Option<String>,
    /// Port of the API server
    #[arg(long, default_value_t = 6443)]
    api_port: u16,
    /// Ranges of pod addresses, one of a family or one of each ("10.244.0.0/16,fd00:10:244::/56"); each node takes
    /// a /24 (IPv4) and a /64 (IPv6) of them. The first one's family is the primary one
    #[arg(
        long,
        visible_alias = "cluster-cidr",
        value_delimiter = ',',
        default_value = "10.244.0.0/16"
    )]
    pod_cidr: Vec<IpNet>,
    /// Ranges of Service addresses, the primary one first [default: 10.96.0.0/16 and fd00:10:96::/112, of the
    /// families that pods have]
    #[arg(
        long,
        visible_alias = "service-cluster-ip-range",
        value_delimiter = ','
    )]
    service_cidr: Vec<IpNet>,
    /// Addresses for Services of type LoadBalancer, of either family: 192.0.2.0/24, 192.0.2.10-192.0.2.20 or one
    #[arg(long, value_delimiter = ',')]
    load_balancer_cidr: Vec<xebec_controllers::AddressRange>,
    /// Ranges of the addresses of several nodes, one of each family that pods have; with one node they are not used
    /// [default: 10.245.0.0/24, fd00:10:245::/64]
    #[arg(long, value_delimiter = ',')]
    node_cidr: Vec<IpNet>,
    /// Node ports by XDP, on the devices that lead to other nodes and the outside; tc serves what XDP does not
    #[arg(long, value_enum, env = "XEBEC_XDP", default_value_t)]
    xdp: XdpMode,
    #[command(flatten)]
    ways: crate::agent::Ways,
    #[command(flatten)]
    ports: crate::agent::Ports,
    /// Do not build the demo image
    #[arg(long)]
    no_demo_image: bool,
    /// Seconds to wait for the nodes to become Ready
    #[arg(long, default_value_t = 60)]
    timeout: u64,
}

/// How XDP is used.
#[derive(Clone, Copy, Default, ValueEnum)]
pub enum XdpMode {
    /// By the driver, where the device is hardware whose driver can
    #[default]
    Auto,
    /// By the driver, or `up` fails
    Native,
    /// By the kernel's network stack, slowly: for tests
    Generic,
    /// Not at all
    Off,
}

impl From<XdpMode> for Xdp {
    fn from(mode: XdpMode) -> Self {
        match mode {
            XdpMode::Auto => Self::Auto,
            XdpMode::Native => Self::Native,
            XdpMode::Generic => Self::Generic,
            XdpMode::Off => Self::Off,
        }
    }
}

/// DNS domain of the cluster.
const CLUSTER_DOMAIN: &str = "cluster.local";

impl Up {
    /// Runs until Ctrl-C, SIGTERM or `xebec down`. `log` is what is logged, by other processes of the cluster too.
    pub async fn run(self, layout: Layout, log: &str) -> Result<()> {
        let started = Instant::now();
        let since = std::time::SystemTime::now()
            .duration_since(std::time::UNIX_EPOCH)
            .map_or(0, |since| since.as_secs() as i64);
        install_tls_provider()?;
        let ranges = self.ranges()?;
        let listen = SocketAddr::new(ranges.everywhere(), self.api_port);
        preflight::root()?;
        let running = preflight::lock(&layout)?;
        let machine = preflight::check(&self.node_ip, &[listen])?;
        let nodes = self.plan(&layout, &machine, &ranges)?;
        self.check_predecessor(&layout, &nodes).await?;
        for dir in [&layout.data, &layout.run] {
            private_dir(dir)?;
        }
        let authority = Authority::open(layout.pki())?;
        // Signals are heard from here on, so that an early Ctrl-C cleans up as a late one does.
        let stop = stop_signal()?;

        // Several nodes reach the API server by the host's address on their switch.
        let v4 = ranges.services_v4();
        let inside = match nodes.first().and_then(|node| node.cable.as_ref()) {
            Some(cable) => cable.host(v4),
            None => machine.address(v4),
        };
        let inside = inside.with_context(|| {
            let family = switch::family(v4);
            format!("Services have {family} first, of which this machine has no address")
        })?;
        let address = machine.primary(v4);
        let control_plane = ControlPlane::start(control_plane::Config {
            layout: &layout,
            authority: &authority,
            listen,
            advertise: inside,
            addresses: &machine.addresses,
            service_cidrs: &ranges.services,
            load_balancer_ranges: &self.load_balancer_cidr,
        })
        .await?;
        let url = |address| format!("https://{}", SocketAddr::new(address, self.api_port));
        let server = url(address);
        let admin = authority.client("kubernetes-admin", &["system:masters"])?;
        let kubeconfig = crate::kubeconfig::render(&server, &authority.ca_pem, &admin)?;
        write_private(&layout.admin_kubeconfig(), kubeconfig.as_bytes())?;

        let state = UpState::of_this_process(&server, &nodes)?;
        state.write(&layout)?;
        plan::forget_nodes(&layout, control_plane.admin(), &nodes).await;
        let outside = nodes::Outside {
            server: &url(inside),
            log,
            addresses: &ranges.of_pods(&machine.addresses),
            layout: &layout,
        };
        let before = node::versions(control_plane.admin()).await?;
        let mut parts = Nodes::start(&nodes, &authority, &control_plane, &outside).await?;
        let flows = relay_flows(&layout, &nodes);
        let ready = async {
            if !self.no_demo_image {
                let images = nodes
                    .iter()
                    .map(|node| crate::image::ensure_demo(&node.layout));
                futures::future::try_join_all(images).await?;
            }
            let names: Vec<&str> = nodes.iter().map(|node| node.name.as_str()).collect();
            let patience = Duration::from_secs(self.timeout);
            node::wait_ready(control_plane.admin(), &names, since, &before, patience).await?;
            print_next_steps(&layout, &state.node_names(), started.elapsed());
            UpState::mark_ready(&layout)?;
            // From here on only a failure or a signal ends it.
            std::future::pending::<Result<()>>().await
        };
        let outcome = tokio::select! {
            outcome = ready => outcome,
            () = stop => Ok(()),
            error = parts.first_failure() => Err(error),
            error = control_plane.failed() => Err(error),
            outcome = flows => outcome.context("the flows of all nodes can't be served"),
        };
        info!("stopping");
        if self.keep {
            parts.leave().await;
        } else {
            parts.take_down(&nodes).await;
        }
        control_plane.stop().await;
        if !self.keep {
            teardown::run_dir(&layout)?;
        }
        drop(running);
        outcome
    }
}

/// Serves the flows of all nodes on one socket.
fn relay_flows(
    layout: &Layout,
    nodes: &[node::NodeConfig],
) -> impl Future<Output = Result<()>> + use<> {
    let servers = nodes.iter().map(|node| {
        let server = Server::Unix(node.layout.hubble_socket());
        (node.name.clone(), server)
    });
    let config = xebec_relay::Config {
        peers: xebec_relay::Peers::These(servers.collect()),
        tls: None,
        listen: None,
        socket: Some(layout.hubble_socket()),
    };
    xebec_relay::run(config, CancellationToken::new())
}

/// Chooses `ring` for TLS, once per process.
pub fn install_tls_provider() -> Result<()> {
    rustls::crypto::ring::default_provider()
        .install_default()
        .map_err(|_| anyhow::anyhow!("another TLS provider is installed already"))
}

/// Ends on SIGINT or SIGTERM.
pub fn stop_signal() -> Result<impl Future<Output = ()>> {
    use tokio::signal::unix::{SignalKind, signal};
    let mut interrupt = signal(SignalKind::interrupt()).context("could not listen for SIGINT")?;
    let mut terminate = signal(SignalKind::terminate()).context("could not listen for SIGTERM")?;
    Ok(async move {
        tokio::select! {
            _ = interrupt.recv() => {}
            _ = terminate.recv() => {}
        }
    })
}

fn print_next_steps(layout: &Layout, nodes: &str, took: Duration) {
    println!("Ready in {:.2} s: {nodes}", took.as_secs_f64());
    println!();
    println!(
        "  export KUBECONFIG={}",
        layout.admin_kubeconfig().display()
    );
    println!("  kubectl get nodes -o wide");
    println!("  kubectl apply -f docs/examples/shop.yaml");
    println!("  xebec status");
    println!();
    println!("Stop with Ctrl-C or `xebec down`.");
}
