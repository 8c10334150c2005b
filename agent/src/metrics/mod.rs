//! Metrics and health of the node's agent, under the names and on the ports that users of kube-proxy know.

mod dataplane;
mod eligible;
mod health;
mod process;
mod server;

use std::net::SocketAddr;
use std::sync::Arc;

use anyhow::{Context, Result};
use prometheus_client::encoding::text;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::info::Info;
use prometheus_client::registry::Registry;
use tokio_util::sync::CancellationToken;

use crate::endpoints::Endpoints;
use crate::flows::Flows;
use crate::maps::PolicyMaps;
use crate::policy::watch::Shared;
pub use health::Health;

/// Where metrics and health are served.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Addresses {
    /// `/metrics`, `/healthz` and `/proxyMode`; none for nowhere.
    pub metrics: Option<SocketAddr>,
    /// `/healthz` and `/livez`, as load balancers ask for them; none for nowhere.
    pub healthz: Option<SocketAddr>,
}

/// What has metrics of its own. Each part keeps its counters, and registers them once when the agent starts.
pub trait Register {
    /// Puts them into the registry, under their full names.
    fn register(&self, registry: &mut Registry);
}

/// All metrics of the agent.
pub(crate) struct Metrics {
    registry: Registry,
    endpoints: Gauge,
    policies: Gauge,
    sources: Sources,
}

/// What is asked when somebody reads the metrics, and not before.
#[derive(Clone)]
pub(crate) struct Sources {
    pub endpoints: Arc<Endpoints>,
    pub engine: Shared<PolicyMaps>,
    pub flows: Flows,
}

impl Metrics {
    /// The agent's own metrics, and those of `parts`.
    pub(crate) fn new(sources: Sources, parts: &[&dyn Register]) -> Self {
        let mut registry = Registry::default();
        let (endpoints, policies) = (Gauge::default(), Gauge::default());
        let build = Info::new(vec![
            ("version", env!("CARGO_PKG_VERSION")),
            ("arch", std::env::consts::ARCH),
        ]);
        registry.register(
            "xebec_build",
            "Version and platform of this executable",
            build,
        );
        registry.register(
            "xebec_endpoints",
            "Pods of this node that the agent has connected",
            endpoints.clone(),
        );
        registry.register(
            "xebec_policies",
            "Network policies of the cluster that the agent knows",
            policies.clone(),
        );
        registry.register_collector(Box::new(dataplane::Packets(sources.flows.clone())));
        registry.register_collector(Box::new(dataplane::KernelMaps(crate::bpf_maps::held)));
        registry.register_collector(Box::new(dataplane::InUse(crate::maps::usage::count)));
        registry.register_collector(Box::new(process::Process));
        for part in parts {
            part.register(&mut registry);
        }
        Self {
            registry,
            endpoints,
            policies,
            sources,
        }
    }

    /// All of them as they are now, in OpenMetrics' text form.
    async fn text(&self) -> Result<String> {
        let count = |count: usize| i64::try_from(count).unwrap_or(i64::MAX);
        let endpoints = self.sources.endpoints.list().await.len();
        let policies = self.sources.engine.lock().await.policy_ids().len();
        self.endpoints.set(count(endpoints));
        self.policies.set(count(policies));
        encode(&self.registry)
    }
}

fn encode(registry: &Registry) -> Result<String> {
    let mut out = String::new();
    text::encode(&mut out, registry).context("could not write the metrics")?;
    Ok(out)
}

/// Serves metrics and health until `shutdown`. A port that another process has is waited for: the kube-proxy that this
/// agent replaces may still be ending.
pub(crate) async fn run(
    client: kube::Client,
    node_name: String,
    addresses: Addresses,
    metrics: Metrics,
    health: Health,
    shutdown: CancellationToken,
) -> Result<()> {
    let metrics = Arc::new(metrics);
    let eligible = async {
        if addresses.healthz.is_some() {
            eligible::run(client, &node_name, &health, shutdown.clone()).await
        } else {
            Ok(())
        }
    };
    let of_metrics = server::run(
        addresses.metrics,
        "metrics",
        server::Pages::Metrics(metrics),
        shutdown.clone(),
    );
    let of_health = server::run(
        addresses.healthz,
        "health",
        server::Pages::Health(health.clone()),
        shutdown.clone(),
    );
    tokio::try_join!(eligible, of_metrics, of_health).map(drop)
}
