//! `xebec agent`: the node agent alone, on any Kubernetes, in place of its kube-proxy and CNI plugin.

mod cgroup;
mod cleanup;
mod cni;
mod hubble;
pub use hubble::parse_address;
#[cfg(test)]
mod manifests;
mod node_object;
mod ports;
mod ways;

use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;
use xebec_agent::flows::metrics::FlowMetrics;

use anyhow::{Context, Result, bail};
use clap::{Args, Subcommand};
use ipnet::IpNet;
use nix::mount::MsFlags;
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};
use xebec_policy::kind::Relevant;

use crate::paths::{Layout, NodeLayout, private_dir};
use crate::up::XdpMode;
use node_object::Found;
pub use ports::Ports;
pub use ways::Ways;

/// How the agent runs; nothing but root's rights and an API server is needed.
#[derive(Args)]
#[command(args_conflicts_with_subcommands = true)]
pub struct Agent {
    #[command(subcommand)]
    action: Option<Action>,
    #[command(flatten)]
    run: Run,
}

#[derive(Subcommand)]
enum Action {
    /// Take away all that an agent left on this node: links, maps, routes, pods' devices, CNI plugin and configuration
    Cleanup(cleanup::Cleanup),
    /// Prepare a node: mount the BPF filesystem where there is none, so that it outlives the agent's pod
    Init {
        /// Where the BPF filesystem is
        #[arg(long, default_value = "/sys/fs/bpf")]
        bpf_root: PathBuf,
    },
}

/// Where things are on the node: the same for running and for cleaning up.
#[derive(Args, Clone, Debug)]
struct Place {
    /// Name of this node's Node object; the host name by default
    #[arg(long, env = "NODE_NAME")]
    node_name: Option<String>,
    /// Where the BPF filesystem is; links and flows are kept in its folder `xebec`
    #[arg(long, default_value = "/sys/fs/bpf")]
    bpf_root: PathBuf,
    #[command(flatten)]
    cni: cni::Cni,
}

#[derive(Args)]
struct Run {
    #[command(flatten)]
    place: Place,
    /// How to reach the API server; without it, as a pod of the cluster does
    #[arg(long)]
    kubeconfig: Option<PathBuf>,
    /// Addresses of this node, where those of its Node object will not do
    #[arg(long, value_delimiter = ',')]
    node_ip: Vec<IpAddr>,
    /// Ranges of this node's pods, one for each family, where the Node object has none
    #[arg(long, value_delimiter = ',')]
    pod_cidr: Vec<IpNet>,
    /// Blocks with routes to all pods, such as the cluster's range of pods: packets to them keep a pod's address
    #[arg(long, alias = "native-routing-cidr", value_delimiter = ',')]
    cluster_cidr: Vec<IpNet>,
    /// A file as ip-masq-agent has it, followed as it changes: packets of pods to its nonMasqueradeCIDRs keep the pod's
    /// address, by default those to private addresses. Without this flag, packets to all but the cluster are masqueraded
    #[arg(long, value_name = "PATH", num_args = 0..=1, default_missing_value = xebec_agent::masquerade::DEFAULT_PATH)]
    ip_masq_config: Option<PathBuf>,
    /// Beginnings of the labels of pods that count for their identities, or with ! before them those that do not; by default
    /// all but those that tell pods of one controller apart. A label that a policy asks for counts in any case
    #[arg(long, value_name = "LABELS", value_delimiter = ' ')]
    labels: Vec<String>,
    /// Addresses or blocks of resolvers whose answers tell policies the addresses of domains, besides the cluster's own
    /// (pods of kube-system with the label k8s-app=kube-dns), nodes, and those of this node's /etc/resolv.conf
    #[arg(long, value_name = "CIDR", value_delimiter = ',')]
    dns_resolvers: Vec<String>,
    /// For how many seconds policies know an address of a domain at least, whatever the resolver says
    #[arg(long, value_name = "SECONDS", default_value_t = 0)]
    tofqdns_min_ttl: u32,
    /// Metrics of flows with their options, divided by blanks: drop, tcp, flow, icmp, policy, flows-to-world,
    /// port-distribution, as in `flow:sourceContext=pod|ip;labelsContext=source_app,destination_app`; "" for none
    #[arg(long, value_name = "METRICS", default_value = xebec_agent::flows::metrics::DEFAULT, value_parser = FlowMetrics::parse)]
    hubble_metrics: FlowMetrics,
    #[command(flatten)]
    hubble: hubble::Hubble,
    /// Devices that lead to other nodes and the outside; by default those of the node's address and the default route
    #[arg(long, value_delimiter = ',')]
    devices: Vec<String>,
    /// Node ports by XDP on these devices; tc serves what XDP does not
    #[arg(long, value_enum, env = "XEBEC_XDP", default_value_t)]
    xdp: XdpMode,
    #[command(flatten)]
    ways: Ways,
    /// Entries of the table of flows, 137 bytes each; a translated flow takes two. A table that an agent before this
    /// one left keeps its size until the node starts anew
    #[arg(long, default_value_t = xebec_agent::loader::FLOWS, value_parser = clap::value_parser!(u32).range(1_024..=33_554_432))]
    flow_entries: u32,
    /// Entries of the table of clients that keep their backend (sessionAffinity), 100 bytes each
    #[arg(long, default_value_t = xebec_agent::loader::AFFINITIES, value_parser = clap::value_parser!(u32).range(1_024..=33_554_432))]
    affinity_entries: u32,
    /// The host's cgroup v2 hierarchy, or the folder with all hierarchies; by default where it is mounted
    #[arg(long)]
    cgroup_root: Option<PathBuf>,
    /// The cgroup v2 folder of all pods; by default the kubelet's `kubepods` is looked for
    #[arg(long)]
    pod_cgroup: Option<PathBuf>,
    /// One of the nodes announces load balancers' addresses by ARP and neighbour discovery
    #[arg(long)]
    l2_announcements: bool,
    #[command(flatten)]
    ports: Ports,
}

impl Agent {
    /// Runs until SIGINT or SIGTERM; the dataplane goes on without the agent.
    pub async fn run(self, layout: Layout) -> Result<()> {
        match self.action {
            None => self.run.run(layout).await,
            Some(Action::Cleanup(cleanup)) => cleanup.run(layout).await,
            Some(Action::Init { bpf_root }) => mount_bpf(&bpf_root),
        }
    }
}

impl Place {
    /// This node's name: as the kubelet, in lower case.
    fn name(&self) -> Result<String> {
        match &self.node_name {
            Some(name) if name.is_empty() => {
                bail!("the node's name is empty (--node-name, NODE_NAME)")
            }
            Some(name) => Ok(name.clone()),
            None => {
                let name = nix::unistd::gethostname().context("could not read the host name")?;
                Ok(name.to_string_lossy().trim().to_lowercase())
            }
        }
    }

    /// Pinned links and maps.
    fn bpf_dir(&self) -> PathBuf {
        self.bpf_root.join("xebec")
    }
}

impl Run {
    async fn run(self, layout: Layout) -> Result<()> {
        crate::up::install_tls_provider()?;
        crate::up::require_root()?;
        let stop = crate::up::stop_signal()?;
        let _held = crate::up::lock(&layout)?;
        let name = self.place.name()?;
        let node_layout = layout.node(&name);
        let (cgroup_root, pod_cgroup) = self.cgroups()?;
        sysctls()?;
        if !is_bpf(&self.place.bpf_root) {
            anyhow::ensure!(
                std::env::var_os("KUBERNETES_SERVICE_HOST").is_none(),
                "{} is no BPF filesystem, and one that is mounted in this pod would end with it: mount the node's there (`xebec agent init` in a privileged init container makes one)",
                self.place.bpf_root.display()
            );
            mount_bpf(&self.place.bpf_root)?;
        }
        let client = self.client().await?;
        let mut stop = std::pin::pin!(stop);
        let found = tokio::select! {
            found = node_object::wait(client.clone(), &name, &self.node_ip, &self.pod_cidr) => found?,
            () = &mut stop => return Ok(()),
        };
        info!(
            node = name,
            addresses = ?found.addresses,
            pod_ranges = ?found.pod_ranges,
            cgroup = %cgroup_root.display(),
            "found"
        );
        for dir in [
            &layout.data,
            &layout.run,
            &node_layout.data,
            &node_layout.run,
            &node_layout.agent_state(),
        ] {
            private_dir(dir)?;
        }
        let socket = node_layout.agent_socket();
        // One that a killed agent left answers nobody.
        let _ = std::fs::remove_file(&socket);
        let config = self.config(name, &found, &node_layout, cgroup_root, pod_cgroup)?;
        let shutdown = CancellationToken::new();
        let agent = xebec_agent::run(client, config, shutdown.clone());
        let mut agent = std::pin::pin!(agent);
        // Pods are sent here once the agent answers.
        let installed = async {
            while !socket.exists() {
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
            self.place.cni.install(Path::new("/proc/self/exe"), &socket)
        };
        tokio::select! {
            outcome = &mut agent => return outcome.and_then(|()| bail!("the agent ended by itself")),
            installed = installed => installed?,
            () = &mut stop => {
                shutdown.cancel();
                return agent.await;
            }
        }
        tokio::select! {
            outcome = &mut agent => outcome.and_then(|()| bail!("the agent ended by itself")),
            () = &mut stop => {
                info!("stopping; pods, Services and policies stay as they are");
                shutdown.cancel();
                agent.await
            }
        }
    }

    /// The root of cgroup v2, and the cgroup of all pods.
    fn cgroups(&self) -> Result<(PathBuf, Option<PathBuf>)> {
        let root = cgroup::root(self.cgroup_root.as_deref())?;
        let pods = match &self.pod_cgroup {
            Some(named) => Some(named.clone()),
            None => cgroup::pods(&root)?,
        };
        match (&pods, cgroup::is_whole(&root)) {
            (Some(_), _) => {}
            (None, false) => bail!(
                "{} is this container's part of cgroup v2, and no pod is in it: mount the host's /sys/fs/cgroup, and name it with --cgroup-root",
                root.display()
            ),
            (None, true) => warn!(
                "no cgroup of a kubelet's pods is in {} (cgroup v1?): what pods send to Services is translated packet by packet; a kubelet that starts later needs --pod-cgroup",
                root.display()
            ),
        }
        Ok((root, pods))
    }

    async fn client(&self) -> Result<kube::Client> {
        let config = match &self.kubeconfig {
            Some(path) => {
                let found = kube::config::Kubeconfig::read_from(path)
                    .with_context(|| format!("could not read {}", path.display()))?;
                let options = kube::config::KubeConfigOptions::default();
                kube::Config::from_custom_kubeconfig(found, &options)
                    .await
                    .with_context(|| format!("{} names no cluster to use", path.display()))?
            }
            None => kube::Config::incluster()
                .context("this is no pod of a cluster: name a kubeconfig with --kubeconfig")?,
        };
        kube::Client::try_from(config).context("could not make an API client")
    }

    /// The one place that knows how the agent is told of addresses and ranges.
    fn config(
        &self,
        node_name: String,
        found: &Found,
        layout: &NodeLayout,
        cgroup_root: PathBuf,
        pod_cgroup: Option<PathBuf>,
    ) -> Result<xebec_agent::Config> {
        let is_v4 = |range: &IpNet| range.addr().is_ipv4();
        let node_ips = of_each_family(&found.addresses, IpAddr::is_ipv4);
        let pod_cidrs = of_each_family(&found.pod_ranges, is_v4);
        Ok(xebec_agent::Config {
            node_ips,
            pod_cidrs,
            socket: layout.agent_socket(),
            state_dir: layout.agent_state(),
            bpf_dir: self.place.bpf_dir(),
            cgroup_root,
            pod_cgroup,
            devices: self.devices.clone(),
            xdp: self.xdp.into(),
            lb_mode: self.ways.lb_mode(),
            host_legacy_routing: self.ways.host_legacy_routing,
            native: self.cluster_cidr.iter().map(IpNet::trunc).collect(),
            node_ports: self.ports.node_ports()?,
            l2_announcements: self.l2_announcements,
            sizes: xebec_agent::loader::Sizes {
                flows: self.flow_entries,
                affinities: self.affinity_entries,
                ..Default::default()
            },
            labels: self.labels()?,
            aggregation: self.hubble.aggregation(),
            flows_kept: self.hubble.event_buffer_capacity(),
            flow_listen: self.hubble.listen()?,
            flow_export: self.hubble.export(),
            flow_metrics: self.hubble_metrics.clone(),
            http: self.hubble.http(),
            domains: xebec_agent::domains::Options {
                resolvers: xebec_agent::domains::resolvers(&self.dns_resolvers)?,
                min_ttl: self.tofqdns_min_ttl,
            },
            ip_masq: self.ip_masq_config.clone(),
            serve: xebec_agent::metrics::Addresses {
                metrics: self.ports.metrics(),
                healthz: self.ports.healthz(),
            },
            node_name,
        })
    }
}

impl Run {
    fn labels(&self) -> Result<Relevant> {
        let words = self.labels.iter().map(String::as_str);
        let words = words.filter(|word| !word.is_empty());
        Relevant::read(words).map_err(|error| anyhow::anyhow!("--labels: {error}"))
    }
}

/// The first of each family, in their order: the primary one first.
fn of_each_family<T: Copy>(all: &[T], is_v4: impl Fn(&T) -> bool) -> Vec<T> {
    let mut firsts: Vec<T> = Vec::new();
    for one in all {
        if !firsts.iter().any(|first| is_v4(first) == is_v4(one)) {
            firsts.push(*one);
        }
    }
    firsts
}

/// Makes sysctls writable: container runtimes mount them read-only for pods that are not privileged.
fn sysctls() -> Result<()> {
    const ROOT: &str = "/proc/sys";
    let probe = std::fs::OpenOptions::new()
        .write(true)
        .open("/proc/sys/net/ipv4/ip_forward");
    match probe {
        Err(error) if error.raw_os_error() == Some(nix::libc::EROFS) => nix::mount::mount(
            None::<&str>,
            ROOT,
            None::<&str>,
            MsFlags::MS_REMOUNT
                | MsFlags::MS_BIND
                | MsFlags::MS_NOSUID
                | MsFlags::MS_NODEV
                | MsFlags::MS_NOEXEC,
            None::<&str>,
        )
        .context(
            "could not make /proc/sys writable (the pod needs SYS_ADMIN, and no AppArmor profile)",
        ),
        // Whatever else there is, is told by who writes there.
        _ => Ok(()),
    }
}

fn is_bpf(dir: &Path) -> bool {
    nix::sys::statfs::statfs(dir)
        .is_ok_and(|found| found.filesystem_type() == nix::sys::statfs::BPF_FS_MAGIC)
}

/// Mounts a BPF filesystem, unless it is there.
fn mount_bpf(root: &Path) -> Result<()> {
    if is_bpf(root) {
        return Ok(());
    }
    crate::up::require_root()?;
    nix::mount::mount(
        Some("bpf"),
        root,
        Some("bpf"),
        MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC,
        Some("mode=0700"),
    )
    .with_context(|| format!("could not mount the BPF filesystem on {}", root.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_address_of_each_family() {
        let all = ["fd00::1", "192.0.2.1", "192.0.2.2", "fd00::2"].map(|one| one.parse().unwrap());
        let firsts = of_each_family::<IpAddr>(&all, IpAddr::is_ipv4);
        assert_eq!(firsts, all[..2]);
        assert!(of_each_family(&[], IpAddr::is_ipv4).is_empty());
    }
}
