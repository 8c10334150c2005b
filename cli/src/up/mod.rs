//! `xebec up`: wires the parts into a running cluster, and takes it down again.

mod control_plane;
pub mod detach;
pub mod node;
mod preflight;
pub mod state;
pub mod teardown;

pub use preflight::root as require_root;

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use clap::Args;
use ipnet::{IpNet, Ipv4Net};
use tracing::info;

use crate::paths::{Layout, private_dir, write_private};
use crate::pki::Authority;
use control_plane::ControlPlane;
use node::NodeConfig;
use state::UpState;

/// How `up` starts the cluster.
#[derive(Args)]
pub struct Up {
    /// Return when the node is Ready; the cluster goes on in the background
    #[arg(long)]
    pub detach: bool,
    /// Leave the pods running when `up` ends
    #[arg(long)]
    keep: bool,
    /// Address of this node, where the one of the default route will not do
    #[arg(long)]
    node_ip: Option<IpAddr>,
    /// Name of the node; the host name by default
    #[arg(long)]
    node_name: Option<String>,
    /// Port of the API server
    #[arg(long, default_value_t = 6443)]
    api_port: u16,
    /// Range of pod addresses; the node takes the first /24 of it
    #[arg(long, default_value = "10.244.0.0/16")]
    pod_cidr: Ipv4Net,
    /// Range of Service addresses
    #[arg(long, default_value = "10.96.0.0/16")]
    service_cidr: Ipv4Net,
    /// Do not build the demo image
    #[arg(long)]
    no_demo_image: bool,
    /// Seconds to wait for the node to become Ready
    #[arg(long, default_value_t = 60)]
    timeout: u64,
}

/// DNS domain of the cluster.
const CLUSTER_DOMAIN: &str = "cluster.local";

impl Up {
    /// Runs until Ctrl-C, SIGTERM or `xebec down`.
    pub async fn run(self, layout: Layout) -> Result<()> {
        let started = Instant::now();
        install_tls_provider()?;
        let listen = SocketAddr::from((Ipv4Addr::UNSPECIFIED, self.api_port));
        let pod_cidr = self.node_range()?;
        preflight::root()?;
        let running = preflight::lock(&layout)?;
        let machine = preflight::check(self.node_ip, &[listen])?;
        for dir in [&layout.data, &layout.run] {
            private_dir(dir)?;
        }
        let authority = Authority::open(layout.pki())?;
        // Signals are heard from here on, so that an early Ctrl-C cleans up as a late one does.
        let stop = stop_signal()?;

        let control_plane = ControlPlane::start(control_plane::Config {
            layout: &layout,
            authority: &authority,
            listen,
            advertise: machine.address,
            service_cidr: self.service_cidr,
        })
        .await?;
        let server = format!(
            "https://{}",
            SocketAddr::new(machine.address, self.api_port)
        );
        let admin = authority.client("kubernetes-admin", &["system:masters"])?;
        let kubeconfig = crate::kubeconfig::render(&server, &authority.ca_pem, &admin)?;
        write_private(&layout.admin_kubeconfig(), kubeconfig.as_bytes())?;

        let name = self
            .node_name
            .clone()
            .unwrap_or_else(|| machine.hostname.clone());
        let config = NodeConfig {
            layout: layout.node(&name),
            cgroup_root: machine.cgroup2.clone(),
            pod_cgroup: machine.cgroup2.join("xebec").join(&name),
            name,
            ip: machine.address,
            pod_cidr: IpNet::V4(pod_cidr),
            cluster_domain: CLUSTER_DOMAIN.into(),
            kubelet_port: 10250,
        };
        UpState::of_this_process(&server, &config.name, &config.pod_cgroup)?.write(&layout)?;
        let mut node = node::start(&config, &authority, &control_plane)?;
        let ready = async {
            if !self.no_demo_image {
                crate::image::ensure_demo(&config.layout).await?;
            }
            node::wait_ready(
                control_plane.admin(),
                &config.name,
                Duration::from_secs(self.timeout),
            )
            .await?;
            print_next_steps(&layout, &config.name, started.elapsed());
            UpState::mark_ready(&layout)?;
            // From here on only a failure or a signal ends it.
            std::future::pending::<Result<()>>().await
        };
        let outcome = tokio::select! {
            outcome = ready => outcome,
            () = stop => Ok(()),
            error = node.first_failure() => Err(error),
            error = control_plane.failed() => Err(error),
        };
        info!("stopping");
        if self.keep {
            node.leave().await;
        } else {
            teardown::node(node, &config).await;
        }
        control_plane.stop().await;
        if !self.keep {
            teardown::run_dir(&layout)?;
        }
        drop(running);
        outcome
    }

    /// The node's /24 of the pod range.
    fn node_range(&self) -> Result<Ipv4Net> {
        if self.service_cidr.contains(&self.pod_cidr) || self.pod_cidr.contains(&self.service_cidr)
        {
            bail!(
                "--pod-cidr {} and --service-cidr {} overlap",
                self.pod_cidr,
                self.service_cidr
            );
        }
        let mut subnets = self
            .pod_cidr
            .subnets(24)
            .with_context(|| format!("--pod-cidr {} must be a /24 or larger", self.pod_cidr))?;
        subnets
            .next()
            .with_context(|| format!("--pod-cidr {} is empty", self.pod_cidr))
    }
}

/// Chooses `ring` for TLS, once per process.
pub fn install_tls_provider() -> Result<()> {
    rustls::crypto::ring::default_provider()
        .install_default()
        .map_err(|_| anyhow::anyhow!("another TLS provider is installed already"))
}

/// Ends on SIGINT or SIGTERM.
fn stop_signal() -> Result<impl Future<Output = ()>> {
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

fn print_next_steps(layout: &Layout, node: &str, took: Duration) {
    println!("Ready in {:.2} s: {node}", took.as_secs_f64());
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
