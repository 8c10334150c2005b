//! The built-in controllers, one folder or file each.
//!
//! Ordinary API clients: each kind is watched once and shared (`informer`), changes put keys into
//! rate-limited queues (`queue`), and a reconcile looks at the whole of one object, whatever woke it.

mod cluster;
mod deployment;
mod endpoint_slice;
mod endpoints;
mod garbage_collector;
mod informer;
mod load_balancer;
mod mirroring;
mod namespace;
mod node_ipam;
mod node_lifecycle;
mod pod_gc;
mod pods;
mod queue;
mod refs;
mod replica_set;
mod service_account;

use std::sync::Arc;
use std::time::Duration;

use futures::future::{BoxFuture, FutureExt};
use tokio_util::sync::CancellationToken;
use tracing::info;

use cluster::Cluster;
pub use load_balancer::{
    AddressRange, CLASS as LOAD_BALANCER_CLASS, WANTED as LOAD_BALANCER_ADDRESSES,
};

/// How the controllers run.
#[derive(Clone, Debug)]
pub struct Config {
    /// PEM bundle that pods trust the API server by; it goes into each namespace's `kube-root-ca.crt`.
    pub service_account_ca: String,
    /// How long a node's lease may go unrenewed before the node counts as lost
    /// (kube-controller-manager's `--node-monitor-grace-period`).
    pub node_monitor_grace_period: Duration,
    /// How long a node must be gone before its pods are removed.
    pub pod_gc_quarantine: Duration,
    /// Finished pods that are kept in the cluster (kube-controller-manager's `--terminated-pod-gc-threshold`).
    pub terminated_pod_threshold: usize,
    /// Addresses for Services of type LoadBalancer; where there are none, nobody here gives them any.
    pub load_balancer_ranges: Vec<AddressRange>,
    /// Ranges that nodes without ranges of pod addresses get theirs from, one of each family
    /// (kube-controller-manager's `--cluster-cidr`); where there are none, nodes bring their own.
    pub cluster_cidrs: Vec<ipnet::IpNet>,
    /// Prefix length of a node's part of an IPv4 range (`--node-cidr-mask-size-ipv4`).
    pub node_cidr_mask_size_ipv4: u8,
    /// Prefix length of a node's part of an IPv6 range (`--node-cidr-mask-size-ipv6`).
    pub node_cidr_mask_size_ipv6: u8,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            service_account_ca: String::new(),
            node_monitor_grace_period: Duration::from_secs(50),
            pod_gc_quarantine: Duration::from_secs(40),
            terminated_pod_threshold: 12_500,
            load_balancer_ranges: Vec::new(),
            cluster_cidrs: Vec::new(),
            node_cidr_mask_size_ipv4: 24,
            node_cidr_mask_size_ipv6: 64,
        }
    }
}

/// Runs every controller until `shutdown`. The client's user must be `system:kube-controller-manager`,
/// or one who may do the same.
///
/// # Errors
/// When a controller ends although nobody asked it to.
pub async fn run(
    client: kube::Client,
    config: Config,
    shutdown: CancellationToken,
) -> anyhow::Result<()> {
    // When one ends, so do the others: a half-working set is worse than a restart.
    let stop = shutdown.child_token();
    let _guard = stop.clone().drop_guard();
    let cluster = Arc::new(Cluster::new(client));
    // Handlers are registered before the first object comes.
    let parts: Vec<(&str, BoxFuture<'static, anyhow::Result<()>>)> = vec![
        (
            "deployment",
            deployment::start(&cluster, stop.clone()).boxed(),
        ),
        (
            "replica set",
            replica_set::start(&cluster, stop.clone()).boxed(),
        ),
        (
            "endpoint slice",
            endpoint_slice::start(&cluster, stop.clone()).boxed(),
        ),
        (
            "endpoints",
            endpoints::start(&cluster, stop.clone()).boxed(),
        ),
        (
            "endpoint slice mirroring",
            mirroring::start(&cluster, stop.clone()).boxed(),
        ),
        (
            "load balancer",
            load_balancer::start(&cluster, &config, stop.clone()).boxed(),
        ),
        (
            "namespace",
            namespace::start(&cluster, stop.clone()).boxed(),
        ),
        (
            "service account",
            service_account::start(&cluster, &config, stop.clone()).boxed(),
        ),
        (
            "garbage collector",
            garbage_collector::start(cluster.client.clone(), stop.clone()).boxed(),
        ),
        (
            "node lifecycle",
            node_lifecycle::start(&cluster, &config, stop.clone()).boxed(),
        ),
        (
            "node ipam",
            node_ipam::start(&cluster, &config, stop.clone()).boxed(),
        ),
        (
            "pod gc",
            pod_gc::start(&cluster, &config, stop.clone()).boxed(),
        ),
        ("watches", cluster.clone().watch(stop.clone()).boxed()),
    ];
    let mut tasks = tokio::task::JoinSet::new();
    for (name, part) in parts {
        tasks.spawn(async move { (name, part.await) });
    }
    info!("controllers started");
    while let Some(ended) = tasks.join_next().await {
        let (name, result) =
            ended.map_err(|error| anyhow::anyhow!("a controller panicked: {error}"))?;
        if shutdown.is_cancelled() {
            continue;
        }
        result.map_err(|error| error.context(format!("the {name} controller failed")))?;
        anyhow::bail!("the {name} controller ended unasked");
    }
    Ok(())
}
