//! The node: agent, container runtime and kubelet, as tasks of this process.

use std::net::IpAddr;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use ipnet::IpNet;
use k8s_openapi::api::core::v1::Node as NodeObject;
use kube::runtime::{WatchStreamExt, watcher};
use tokio::task::{JoinHandle, JoinSet};
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

use super::control_plane::ControlPlane;
use crate::paths::{NodeLayout, private_dir, write_private};
use crate::pki::{self, Authority};

/// What the node needs to know.
#[derive(Clone, Debug)]
pub struct NodeConfig {
    /// Name of the Node object.
    pub name: String,
    /// Its address.
    pub ip: IpAddr,
    /// Its own range of pod addresses.
    pub pod_cidr: IpNet,
    /// DNS domain of the cluster.
    pub cluster_domain: String,
    /// Port of the kubelet's HTTPS server.
    pub kubelet_port: u16,
    /// The root of cgroup v2: the host's own processes reach Services too.
    pub cgroup_root: PathBuf,
    /// The cgroup v2 folder that pods are put into.
    pub pod_cgroup: PathBuf,
    /// Its folders.
    pub layout: NodeLayout,
}

/// The user and groups of the agent.
const AGENT_USER: (&str, &[&str]) = (
    "system:serviceaccount:kube-system:xebec-agent",
    &[
        "system:serviceaccounts",
        "system:serviceaccounts:kube-system",
    ],
);

/// Parent of the cgroups of all pods.
pub const CGROUP_PARENT: &str = "/xebec";

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

/// Starts agent, runtime and kubelet, with a client that calls the API server directly.
pub fn start(
    config: &NodeConfig,
    authority: &Authority,
    control_plane: &ControlPlane,
) -> Result<Running> {
    let user = format!("system:node:{}", config.name);
    let client = control_plane.client(&user, &["system:nodes"]);
    let leaf = authority.server(&user, &[&config.name], &[config.ip])?;
    let tls = pki::server_tls(&authority.ca_pem, &leaf, &[b"http/1.1"])?;
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
    let executable = std::env::current_exe().context("could not find this executable")?;
    let (kubelet, rest) = (CancellationToken::new(), CancellationToken::new());
    let mut tasks = JoinSet::new();
    let agent = xebec_agent::Config {
        node_name: config.name.clone(),
        node_ip: config.ip,
        pod_cidr: config.pod_cidr,
        socket: layout.agent_socket(),
        state_dir: layout.agent_state(),
        bpf_dir: layout.bpf(),
        cgroup_root: config.cgroup_root.clone(),
        pod_cgroup: config.pod_cgroup.clone(),
        devices: Vec::new(),
    };
    let cri = xebec_cri::Config {
        shim_command: vec![executable.to_string_lossy().into_owned(), "shim".into()],
        cni_bin_dirs: vec![layout.cni_bin()],
        cni_conf_dir: layout.cni_conf(),
        cgroup_parent: CGROUP_PARENT.into(),
        unified_cgroup: Some(config.pod_cgroup.clone()),
        ..xebec_cri::Config::new(layout.cri_root(), layout.run.clone())
    };
    let mut node = xebec_kubelet::Config::new(
        config.name.clone(),
        config.ip,
        layout.cri_socket(),
        layout.kubelet_root(),
        tls,
    );
    node.port = config.kubelet_port;
    node.cluster_domain = config.cluster_domain.clone();
    node.pod_cidr = Some(config.pod_cidr);
    node.cgroup_parent = format!("{CGROUP_PARENT}/kubepods");
    tasks.spawn(named(
        "agent",
        xebec_agent::run(
            control_plane.client(AGENT_USER.0, AGENT_USER.1),
            agent,
            rest.clone(),
        ),
    ));
    tasks.spawn(named(
        "container runtime",
        xebec_cri::run(cri, rest.clone()),
    ));
    let kubelet_task = tokio::spawn(named(
        "kubelet",
        xebec_kubelet::run(client, node, kubelet.clone()),
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
        "plugins": [{"type": "xebec-cni", "agentSocket": layout.agent_socket()}],
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

/// Waits until the node reports Ready.
pub async fn wait_ready(client: kube::Client, node: &str, timeout: Duration) -> Result<()> {
    use futures::TryStreamExt;
    let mut changes = std::pin::pin!(
        watcher(
            kube::Api::<NodeObject>::all(client),
            watcher::Config::default()
        )
        .default_backoff()
        .applied_objects()
    );
    let ready = async {
        loop {
            match changes.try_next().await {
                Ok(Some(found))
                    if found.metadata.name.as_deref() == Some(node) && is_ready(&found) =>
                {
                    info!(node, "ready");
                    return Ok(());
                }
                Ok(Some(_)) => {}
                Ok(None) => bail!("the watch of nodes ended"),
                Err(error) => warn!(%error, "the watch of nodes failed; trying again"),
            }
        }
    };
    match tokio::time::timeout(timeout, ready).await {
        Ok(outcome) => outcome,
        Err(_) => bail!(
            "not Ready after {} s: {node} (the log says why; --timeout waits longer)",
            timeout.as_secs()
        ),
    }
}

fn is_ready(node: &NodeObject) -> bool {
    node.status
        .iter()
        .flat_map(|status| status.conditions.iter().flatten())
        .any(|condition| condition.type_ == "Ready" && condition.status == "True")
}
