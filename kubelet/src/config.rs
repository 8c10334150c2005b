//! What the kubelet is told, and how its parts are started.

use std::net::IpAddr;
use std::path::PathBuf;
use std::sync::Arc;

use anyhow::{Context, Result};
use ipnet::IpNet;
use kube::api::ObjectMeta;
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use crate::events::Teller;
use crate::runtime::Runtime;
use crate::worker::Shared;
use crate::{node, pods, server};

/// How the kubelet runs.
#[derive(Clone)]
pub struct Config {
    /// Name of the Node object.
    pub node_name: String,
    /// Its InternalIPs, at most one of a family, the primary one first.
    pub node_ips: Vec<IpAddr>,
    /// Port of the HTTPS server.
    pub port: u16,
    /// The container runtime's socket (CRI v1).
    pub cri_socket: PathBuf,
    /// Pod volumes and logs.
    pub root: PathBuf,
    /// TLS of the server; client certificates are asked for and verified by it.
    pub tls: Arc<rustls::ServerConfig>,
    /// DNS servers of pods with `dnsPolicy: ClusterFirst`; none = the node's own.
    pub cluster_dns: Vec<IpAddr>,
    /// DNS domain of the cluster.
    pub cluster_domain: String,
    /// The node's ranges of pod addresses, written into the Node when it is registered.
    pub pod_cidrs: Vec<IpNet>,
    /// Most pods at once.
    pub max_pods: u32,
    /// Parent of the pods' cgroups.
    pub cgroup_parent: String,
}

impl Config {
    /// The usual values, for this node with this runtime.
    pub fn new(
        node_name: String,
        node_ips: Vec<IpAddr>,
        cri_socket: PathBuf,
        root: PathBuf,
        tls: Arc<rustls::ServerConfig>,
    ) -> Self {
        Self {
            node_name,
            node_ips,
            port: 10250,
            cri_socket,
            root,
            tls,
            cluster_dns: Vec::new(),
            cluster_domain: "cluster.local".into(),
            pod_cidrs: Vec::new(),
            max_pods: 110,
            cgroup_parent: "/kubepods".into(),
        }
    }

    /// The node's addresses in the order that pods have theirs in.
    pub(crate) fn node_addresses(&self) -> Vec<String> {
        self.node_ips.iter().map(IpAddr::to_string).collect()
    }

    /// Where a pod's logs lie: `<root>/logs/<namespace>_<name>_<uid>`.
    pub(crate) fn log_dir(&self, pod: &ObjectMeta) -> PathBuf {
        let text = |value: &Option<String>| value.clone().unwrap_or_default();
        let (namespace, name) = (text(&pod.namespace), text(&pod.name));
        let folder = format!("{namespace}_{name}_{}", text(&pod.uid));
        self.root.join("logs").join(folder)
    }

    /// Where a pod's volumes lie.
    pub(crate) fn pod_dir(&self, uid: &str) -> PathBuf {
        self.root.join("pods").join(uid)
    }
}

/// Runs until `shutdown`; pods stay as they are.
pub async fn run(client: kube::Client, config: Config, shutdown: CancellationToken) -> Result<()> {
    // When one part fails, the others end with it.
    let shutdown = shutdown.child_token();
    let _end = shutdown.clone().drop_guard();
    for dir in ["logs", "pods"] {
        let dir = config.root.join(dir);
        std::fs::create_dir_all(&dir)
            .with_context(|| format!("could not make {}", dir.display()))?;
    }
    let runtime = Runtime::connect(&config.cri_socket).await?;
    let config = Arc::new(config);
    let (told, readiness) = watch::channel(None);
    let shared = Shared {
        client: client.clone(),
        config: config.clone(),
        runtime: runtime.clone(),
        teller: Teller::new(client.clone(), &config.node_name),
        readiness,
    };
    let pods = pods::Pods::new(shared, shutdown.clone());
    let mut tasks = JoinSet::new();
    tasks.spawn(server::run(
        config.clone(),
        runtime.clone(),
        pods.clone(),
        shutdown.clone(),
    ));
    tasks.spawn(node::run(client, config, runtime, told, shutdown.clone()));
    tasks.spawn(pods.run());
    while let Some(ended) = tasks.join_next().await {
        ended.context("a part of the kubelet panicked")??;
    }
    Ok(())
}
