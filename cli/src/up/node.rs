//! A node: agent, container runtime and kubelet, as tasks of the process that this runs in.

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use ipnet::IpNet;
use k8s_openapi::api::core::v1::Node as NodeObject;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use kube::runtime::{WatchStreamExt, watcher};
use serde::{Deserialize, Serialize};
use tokio::task::{JoinHandle, JoinSet};
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};
use xebec_agent::endpoints::one_or_many;
use xebec_agent::network::LbMode;
use xebec_agent::services::NodePortAddresses;

use super::control_plane::ControlPlane;
use super::switch::Cable;
use crate::paths::{NodeLayout, private_dir, write_private};
use crate::pki::{self, Authority};

/// What the node needs to know.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct NodeConfig {
    /// Name of the Node object.
    pub name: String,
    /// Its addresses, at most one of a family, the primary one first.
    #[serde(alias = "ip", deserialize_with = "one_or_many")]
    pub ips: Vec<IpAddr>,
    /// Its own ranges of pod addresses, of the same families in the same order.
    #[serde(alias = "pod_cidr", deserialize_with = "one_or_many")]
    pub pod_cidrs: Vec<IpNet>,
    /// DNS domain of the cluster.
    pub cluster_domain: String,
    /// Port of the kubelet's HTTPS server.
    pub kubelet_port: u16,
    /// How XDP is used.
    #[serde(default)]
    pub xdp: xebec_agent::loader::Xdp,
    /// How clients outside reach backends of other nodes.
    #[serde(default)]
    pub lb_mode: LbMode,
    /// Whether packets of pods go through the node's stack.
    #[serde(default)]
    pub host_legacy_routing: bool,
    /// Where node ports are reached.
    #[serde(default)]
    pub node_ports: NodePortAddresses,
    /// Whether load balancers' addresses are announced.
    #[serde(default)]
    pub l2_announcements: bool,
    /// Where its agent serves metrics.
    #[serde(default)]
    pub metrics: Option<SocketAddr>,
    /// Where its agent tells load balancers of its health.
    #[serde(default)]
    pub healthz: Option<SocketAddr>,
    /// The cgroup v2 folder whose processes reach Services: of a node that is the whole machine the root, since
    /// the machine's own processes do too.
    pub cgroup_root: PathBuf,
    /// The cgroup v2 folder that pods are put into.
    pub pod_cgroup: PathBuf,
    /// Parent of the cgroups of all its pods.
    pub cgroup_parent: String,
    /// Its folders.
    pub layout: NodeLayout,
    /// Where it has a network namespace of its own: how it is joined to the others.
    pub cable: Option<Cable>,
}

/// The user and groups of the agent.
pub const AGENT_USER: (&str, &[&str]) = (
    "system:serviceaccount:kube-system:xebec-agent",
    &[
        "system:serviceaccounts",
        "system:serviceaccounts:kube-system",
    ],
);

/// How a node's parts reach the API server, and how its kubelet is reached.
pub struct Access {
    /// The kubelet's client.
    pub kubelet: kube::Client,
    /// The agent's client.
    pub agent: kube::Client,
    /// The kubelet's certificate.
    pub serving: Arc<rustls::ServerConfig>,
}

impl Access {
    /// For a node in the API server's process: its calls are function calls.
    pub fn in_process(
        config: &NodeConfig,
        authority: &Authority,
        control_plane: &ControlPlane,
    ) -> Result<Self> {
        Ok(Self {
            kubelet: control_plane.client(&config.user(), &["system:nodes"]),
            agent: control_plane.client(AGENT_USER.0, AGENT_USER.1),
            serving: serving_tls(&authority.ca_pem, &config.serving_leaf(authority)?)?,
        })
    }
}

/// TLS of a kubelet's server.
pub fn serving_tls(ca_pem: &str, leaf: &pki::Leaf) -> Result<Arc<rustls::ServerConfig>> {
    pki::server_tls(ca_pem, leaf, &[b"http/1.1"])
}

impl NodeConfig {
    /// The user that its kubelet is.
    pub fn user(&self) -> String {
        format!("system:node:{}", self.name)
    }

    /// A certificate for its kubelet's server.
    pub fn serving_leaf(&self, authority: &Authority) -> Result<pki::Leaf> {
        authority.server(&self.user(), &[&self.name], &self.ips)
    }

    /// How its agent runs.
    pub fn agent(&self) -> xebec_agent::Config {
        xebec_agent::Config {
            node_name: self.name.clone(),
            node_ips: self.ips.clone(),
            pod_cidrs: self.pod_cidrs.clone(),
            socket: self.layout.agent_socket(),
            state_dir: self.layout.agent_state(),
            bpf_dir: self.layout.bpf(),
            cgroup_root: self.cgroup_root.clone(),
            pod_cgroup: Some(self.pod_cgroup.clone()),
            devices: Vec::new(),
            xdp: self.xdp,
            lb_mode: self.lb_mode,
            host_legacy_routing: self.host_legacy_routing,
            // The host of several nodes is none of them, but has routes to their pods.
            native: self
                .cable
                .iter()
                .flat_map(|cable| cable.hosts.iter().copied().map(IpNet::from))
                .collect(),
            node_ports: self.node_ports.clone(),
            l2_announcements: self.l2_announcements,
            sizes: xebec_agent::loader::Sizes::default(),
            domains: Default::default(),
            labels: Default::default(),
            aggregation: xebec_agent::loader::Aggregation::default(),
            flows_kept: xebec_agent::flows::KEPT,
            flow_listen: None,
            flow_export: None,
            flow_metrics: xebec_agent::flows::metrics::FlowMetrics::usual(),
            http: xebec_agent::flows::HttpOptions::default(),
            ip_masq: None,
            serve: xebec_agent::metrics::Addresses {
                metrics: self.metrics,
                healthz: self.healthz,
            },
        }
    }

    /// How its container runtime runs.
    pub fn runtime(&self) -> Result<xebec_cri::Config> {
        let executable = std::env::current_exe().context("could not find this executable")?;
        let layout = &self.layout;
        Ok(xebec_cri::Config {
            shim_command: vec![executable.to_string_lossy().into_owned(), "shim".into()],
            cni_bin_dirs: vec![layout.cni_bin()],
            cni_conf_dir: layout.cni_conf(),
            cgroup_parent: self.cgroup_parent.clone(),
            unified_cgroup: Some(self.pod_cgroup.clone()),
            ..xebec_cri::Config::new(layout.cri_root(), layout.run.clone())
        })
    }
}

/// The parts of a node that run in this process.
pub struct Running {
    /// Ends the kubelet; pods stay as they are.
    pub kubelet: CancellationToken,
    /// Ends runtime and agent.
    pub rest: CancellationToken,
    /// What runs besides the kubelet.
    pub tasks: JoinSet<Result<()>>,
    /// The kubelet, which ends first.
    pub kubelet_task: JoinHandle<Result<()>>,
}

/// Starts agent, runtime and kubelet.
pub fn start(config: &NodeConfig, access: Access) -> Result<Running> {
    let layout = &config.layout;
    for dir in [
        &layout.data,
        &layout.run,
        &layout.cni_bin(),
        &layout.cni_conf(),
    ] {
        private_dir(dir)?;
    }
    install_cni(layout)?;
    let (kubelet, rest) = (CancellationToken::new(), CancellationToken::new());
    let mut tasks = JoinSet::new();
    let mut node = xebec_kubelet::Config::new(
        config.name.clone(),
        config.ips.clone(),
        layout.cri_socket(),
        layout.kubelet_root(),
        access.serving,
    );
    node.port = config.kubelet_port;
    node.cluster_domain = config.cluster_domain.clone();
    node.pod_cidrs = config.pod_cidrs.clone();
    node.cgroup_parent = format!("{}/kubepods", config.cgroup_parent);
    let runtime = xebec_cri::run(config.runtime()?, rest.clone());
    let agent = xebec_agent::run(access.agent, config.agent(), rest.clone());
    tasks.spawn(named("agent", agent));
    tasks.spawn(named("container runtime", runtime));
    let kubelet_task = tokio::spawn(named(
        "kubelet",
        xebec_kubelet::run(access.kubelet, node, kubelet.clone()),
    ));
    Ok(Running {
        kubelet,
        rest,
        tasks,
        kubelet_task,
    })
}

async fn named(what: &'static str, part: impl Future<Output = Result<()>>) -> Result<()> {
    part.await.with_context(|| format!("the {what} failed"))
}

/// Puts the CNI executable (this one, under the plugin's name) and its configuration in place.
fn install_cni(layout: &NodeLayout) -> Result<()> {
    let executable = std::env::current_exe().context("could not find this executable")?;
    let link = layout.cni_bin().join("xebec-cni");
    let temporary = layout.cni_bin().join(".xebec-cni.tmp");
    let _ = std::fs::remove_file(&temporary);
    std::os::unix::fs::symlink(&executable, &temporary)
        .and_then(|()| std::fs::rename(&temporary, &link))
        .with_context(|| format!("could not make {}", link.display()))?;
    let conf = serde_json::json!({
        "cniVersion": "1.1.0",
        "name": "xebec",
        "plugins": [{
            "type": "xebec-cni",
            "agentSocket": layout.agent_socket(),
            "capabilities": {"portMappings": true},
        }],
    });
    write_private(
        &layout.cni_conf().join("10-xebec.conflist"),
        conf.to_string().as_bytes(),
    )
}

impl Running {
    /// The error of the first part that ends by itself; waits for ever while all run.
    pub async fn first_failure(&mut self) -> anyhow::Error {
        let ended = tokio::select! {
            ended = self.tasks.join_next() => ended,
            ended = &mut self.kubelet_task => Some(ended),
        };
        match ended {
            Some(Ok(Ok(()))) => anyhow::anyhow!("a part of the node ended by itself"),
            Some(Ok(Err(error))) => error,
            Some(Err(error)) => anyhow::anyhow!("a part of the node panicked: {error}"),
            None => anyhow::anyhow!("the node has no parts"),
        }
    }

    /// Ends the kubelet and waits until it touches nothing any more.
    pub async fn end_kubelet(&mut self) {
        self.kubelet.cancel();
        if !self.kubelet_task.is_finished() {
            // Its failure was told already, or matters no more.
            let _ = (&mut self.kubelet_task).await;
        }
    }

    /// Ends the parts and leaves pods and their network as they are.
    pub async fn leave(mut self) {
        self.end_kubelet().await;
        self.rest.cancel();
        while self.tasks.join_next().await.is_some() {}
    }
}

/// The versions of the nodes as an earlier cluster left them; to be asked for before any node is started.
pub async fn versions(client: kube::Client) -> Result<BTreeMap<String, String>> {
    let nodes = kube::Api::<NodeObject>::all(client)
        .list_metadata(&kube::api::ListParams::default())
        .await
        .context("could not list the nodes")?;
    let version = |metadata: ObjectMeta| Some((metadata.name?, metadata.resource_version?));
    Ok(nodes
        .items
        .into_iter()
        .filter_map(|node| version(node.metadata))
        .collect())
}

/// Waits until all these nodes report Ready. What a node said before `since` (seconds of the epoch), or in one of the
/// versions of `before`, was said by an earlier cluster: its last second may be the first of this one.
pub async fn wait_ready(
    client: kube::Client,
    nodes: &[&str],
    since: i64,
    before: &BTreeMap<String, String>,
    timeout: Duration,
) -> Result<()> {
    use futures::TryStreamExt;
    let mut changes = std::pin::pin!(
        watcher(
            kube::Api::<NodeObject>::all(client),
            watcher::Config::default()
        )
        .default_backoff()
        .applied_objects()
    );
    let mut waiting = nodes.to_vec();
    let ready = async {
        while !waiting.is_empty() {
            match changes.try_next().await {
                Ok(Some(found)) => {
                    let name = found.metadata.name.as_deref().unwrap_or_default();
                    if is_ready(&found, since, before) && waiting.contains(&name) {
                        info!(node = name, "ready");
                        waiting.retain(|waiting| *waiting != name);
                    }
                }
                Ok(None) => bail!("the watch of nodes ended"),
                Err(error) => warn!(%error, "the watch of nodes failed; trying again"),
            }
        }
        Ok(())
    };
    match tokio::time::timeout(timeout, ready).await {
        Ok(outcome) => outcome,
        Err(_) => bail!(
            "not Ready after {} s: {} (the log says why; --timeout waits longer)",
            timeout.as_secs(),
            waiting.join(", ")
        ),
    }
}

fn is_ready(node: &NodeObject, since: i64, before: &BTreeMap<String, String>) -> bool {
    let metadata = &node.metadata;
    let was = metadata.name.as_ref().and_then(|name| before.get(name));
    if was.is_some() && was == metadata.resource_version.as_ref() {
        return false;
    }
    node.status
        .iter()
        .flat_map(|status| status.conditions.iter().flatten())
        .filter(|condition| condition.type_ == "Ready" && condition.status == "True")
        .filter_map(|condition| condition.last_heartbeat_time.as_ref())
        .any(|heartbeat| heartbeat.0.as_second() >= since)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_an_ended_cluster_said_does_not_count() {
        let node = |status: &str| -> NodeObject {
            serde_json::from_value(serde_json::json!({
                "metadata": {"name": "one", "resourceVersion": "7"},
                "status": {"conditions": [
                    {"type": "Ready", "status": status, "lastHeartbeatTime": "1970-01-01T00:01:40Z"},
                ]},
            }))
            .unwrap()
        };
        let before = |version: &str| BTreeMap::from([("one".to_owned(), version.to_owned())]);
        assert!(is_ready(&node("True"), 100, &BTreeMap::new()));
        assert!(is_ready(&node("True"), 100, &before("6")));
        assert!(!is_ready(&node("True"), 100, &before("7")));
        assert!(!is_ready(&node("True"), 101, &before("6")));
        assert!(!is_ready(&node("False"), 100, &before("6")));
    }
}
