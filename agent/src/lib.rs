//! The node agent: connects the pods of one node, translates Services to their endpoints, enforces policy and
//! tells of flows, by eBPF.

pub mod announce;
mod api;
pub mod bpf_maps;
mod dataplane;
pub mod domains;
pub mod endpoints;
mod events;
pub mod flows;
pub mod forwarding;
pub mod gateway;
mod growth;
pub mod host_ports;
mod ipam;
pub mod link;
pub mod loader;
pub mod maps;
pub mod masquerade;
pub mod memory;
pub mod metrics;
pub mod network;
pub mod nodes;
pub mod parting;
pub mod policy;
mod pressure;
pub mod remove;
pub mod routes;
mod scope;
pub mod services;
pub mod sockets;

use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Context, Result, bail};
use ipnet::IpNet;
use tokio::sync::{Mutex, mpsc, oneshot, watch};
use tokio_util::sync::CancellationToken;

use dataplane::Dataplane;
use endpoints::Endpoints;
use xebec_dataplane_common::nat::Settings;
use xebec_policy::engine::Engine;

/// The socket beside the agent's own on which Hubble's API is served.
pub const HUBBLE_SOCKET: &str = "hubble.sock";

/// How the agent runs.
#[derive(Clone, Debug)]
pub struct Config {
    /// Name of the node.
    pub node_name: String,
    /// The node's addresses, at most one of a family, the primary one first.
    pub node_ips: Vec<IpAddr>,
    /// The node's ranges of pod addresses, at most one of a family, the primary one first.
    pub pod_cidrs: Vec<IpNet>,
    /// The agent's socket.
    pub socket: PathBuf,
    /// Records of addresses and endpoints.
    pub state_dir: PathBuf,
    /// Where a BPF filesystem for pinned links is mounted.
    pub bpf_dir: PathBuf,
    /// The cgroup v2 folder whose processes reach Services.
    pub cgroup_root: PathBuf,
    /// The cgroup v2 folder that all pods of the node are in; where there is none, pods' connections to Services are
    /// translated packet by packet.
    pub pod_cgroup: Option<PathBuf>,
    /// Devices that lead to other nodes and the outside; none for those of the node's address and the default route.
    pub devices: Vec<String>,
    /// How XDP is used on them.
    pub xdp: loader::Xdp,
    /// Addresses that have routes to pods, besides the nodes and the pods themselves.
    pub native: Vec<IpNet>,
    /// How flows from outside reach backends of other nodes; all nodes must have the same.
    pub lb_mode: network::LbMode,
    /// Whether packets of pods to and from other nodes and the outside go through the node's stack, where its own rules
    /// see them, and not around it.
    pub host_legacy_routing: bool,
    /// Where node ports are reached.
    pub node_ports: services::NodePortAddresses,
    /// Whether one of the nodes announces load balancers' addresses by ARP and neighbour discovery.
    pub l2_announcements: bool,
    /// Where metrics and health are served.
    pub serve: metrics::Addresses,
    /// How large the maps of Services are at first, and at most.
    pub sizes: loader::Sizes,
    /// Which labels of pods count for their identities.
    pub labels: xebec_policy::kind::Relevant,
    /// Which packets have events.
    pub aggregation: loader::Aggregation,
    /// How many flows are kept.
    pub flows_kept: usize,
    /// Where flows are served besides the socket.
    pub flow_listen: Option<xebec_hubble::serve::Listen>,
    /// What of flows is written to a file.
    pub flow_export: Option<flows::export::Options>,
    /// What is counted of flows.
    pub flow_metrics: flows::metrics::FlowMetrics,
    /// What is told of HTTP.
    pub http: flows::HttpOptions,
    /// Whose answers about domains are believed.
    pub domains: domains::Options,
    /// A file as ip-masq-agent has it: towards whom pods keep their addresses, besides `native`.
    pub ip_masq: Option<PathBuf>,
}

/// Runs until `shutdown`; pods stay connected, Services translated and policy enforced as they were.
pub async fn run(client: kube::Client, config: Config, shutdown: CancellationToken) -> Result<()> {
    let mut programs =
        loader::Loaded::with_aggregation(&config.bpf_dir, config.sizes, config.aggregation)?;
    let mut maps = programs.maps()?;
    maps.services
        .set_scope(scope::of(config.pod_cgroup.as_deref())?)?;
    let names = xebec_policy::names::Names::default();
    // Flows that an agent before this one allowed are judged anew: its generation was taken from the clock, too.
    let generation = std::time::SystemTime::now()
        .duration_since(std::time::UNIX_EPOCH)
        .map_or(1, |since| since.as_millis() as u32);
    let engine = Engine::new(maps.policy, names.clone(), &config.node_name, generation)
        .with_labels(config.labels.clone());
    let engine = Arc::new(Mutex::new(engine));
    let domains = domains::follow(
        maps.domains,
        engine.clone(),
        config.domains.clone(),
        &config.state_dir,
        shutdown.clone(),
    )
    .await?;
    let (synced, mut is_synced) = watch::channel(false);
    let (nodes, nodes_told) = watch::channel(None);
    let (local, local_told) = watch::channel(None);
    let local = services::follow_addresses(local, shutdown.clone());
    check_addresses(&config.node_ips)?;
    let (kept, follow_file) = keep_addresses(&config, &shutdown)?;
    let settings = Settings {
        direct: config.lb_mode.direct(),
        around: u32::from(!config.host_legacy_routing),
        ..network::settings_of(&config.node_ips)?
    };
    let (network_ready, network_is_ready) = oneshot::channel();
    let network = network::run(
        maps.network,
        settings,
        config.native.clone(),
        kept,
        nodes_told.clone(),
        network_ready,
        shutdown.clone(),
    );
    let devices = network::devices(&config.devices, &config.node_ips).await?;
    programs.prove_express(&devices, config.xdp).await?;
    let dataplane = Arc::new(Dataplane {
        engine: engine.clone(),
        programs: Mutex::new(programs),
        synced: is_synced.clone(),
        names: names.clone(),
    });
    let endpoints = connect(&config, Some(dataplane.clone()))?;
    let before = maps.services.all_backends()?;
    let (gone, told_gone) = mpsc::unbounded_channel();
    let (parted, told_parted) = mpsc::unbounded_channel();
    let left = services::Left { gone, parted };
    let tables = services::Services::new(maps.services, &config.node_name, before, left);
    let mut flows = flows::Flows::new(
        flows::Directory {
            names,
            services: tables.names(),
            node_ips: config.node_ips.clone(),
        },
        &config.node_name,
        config.flows_kept,
        config.flow_metrics.clone(),
    )
    .with_http(config.http);
    let follow = flows.follow(maps.flows, shutdown.clone())?;
    let namespaces = || async {
        let all = endpoints.list().await.into_iter();
        all.map(|endpoint| endpoint.netns).collect()
    };
    let parting = parting::run(told_parted, namespaces, shutdown.clone());
    let translated = maps.sockets;
    let sockets = sockets::run(
        told_gone,
        namespaces,
        Arc::new(move |cookie, to: &sockets::Backend| {
            translated.is_translated(cookie, to.address, to.port)
        }),
        shutdown.clone(),
    );
    let announce = announce(
        client.clone(),
        &config,
        &devices,
        tables.announced(),
        &shutdown,
    );
    let served = network::Served::default();
    let (services_ready, services_are_ready) = oneshot::channel();
    let routes = routes::run(
        config.node_name.clone(),
        config.pod_cidrs.clone(),
        nodes_told.clone(),
        shutdown.clone(),
    );
    let nodes = nodes::run(client.clone(), nodes, shutdown.clone());
    let (teller, telling) = events::Teller::new(client.clone(), &config.node_name);
    let stopping = shutdown.clone();
    let telling = async move {
        tokio::select! {
            () = stopping.cancelled() => {}
            () = telling => {}
        }
        Ok(())
    };
    let policy = policy::watch::run(
        client.clone(),
        engine.clone(),
        (nodes_told.clone(), local_told.clone()),
        teller.clone(),
        synced,
        shutdown.clone(),
    );
    let health = metrics::Health::default();
    // Parts with metrics of their own are named here.
    let sources = metrics::Sources {
        endpoints: endpoints.clone(),
        engine: engine.clone(),
        flows: flows.clone(),
    };
    let metrics = metrics::run(
        client.clone(),
        config.node_name.clone(),
        config.serve,
        metrics::Metrics::new(sources, &[&health, &tables.metrics(), &config.flow_metrics]),
        health.clone(),
        shutdown.clone(),
    );
    let services = services::run(
        client.clone(),
        tables.clone(),
        services::Options {
            node_name: config.node_name.clone(),
            node_ips: config.node_ips.clone(),
            node_ports: config.node_ports.clone(),
        },
        nodes_told.clone(),
        local_told,
        endpoints.host_ports(),
        teller.clone(),
        services_ready,
        shutdown.clone(),
    );
    let pressure = pressure::run(teller, config.node_name.clone(), shutdown.clone());
    let growth = growth::run(
        tables.clone(),
        dataplane.clone(),
        config.sizes,
        shutdown.clone(),
    );
    let observer = flows::serve::run(
        config.socket.with_file_name(HUBBLE_SOCKET),
        config.flow_listen.clone(),
        flows.clone(),
        nodes_told,
        shutdown.clone(),
    );
    let (written, stopping) = (flows.clone(), shutdown.clone());
    let export = async {
        match config.flow_export.clone() {
            Some(options) => flows::export::run(options, written, stopping).await,
            None => Ok(()),
        }
    };
    let tables = api::Tables {
        endpoints: endpoints.clone(),
        services: Some(tables),
        hits: Some(Arc::new(maps.hits)),
        engine: Some(engine),
        flows,
        served: served.clone(),
    };
    // What ran before this agent is taken over once everything is known, so that no rule is missing for a moment.
    let take_over = async {
        let known = async {
            is_synced.wait_for(|synced| *synced).await.is_ok()
                && services_are_ready.await.is_ok()
                && network_is_ready.await.is_ok()
        };
        tokio::select! {
            () = shutdown.cancelled() => return Ok(()),
            known = known => if !known { return Ok(()) },
        }
        endpoints.adopt().await?;
        let mut programs = dataplane.programs.lock().await;
        let by = programs.attach_network(&devices, config.xdp).await?;
        programs.attach_sockets(&config.cgroup_root)?;
        served.set(&devices, &by);
        health.updated();
        Ok(())
    };
    let api = api::run(config.socket.clone(), tables, shutdown.clone());
    tokio::try_join!(
        policy,
        local,
        domains,
        services,
        network,
        nodes,
        routes,
        follow,
        take_over,
        api,
        observer,
        export,
        metrics,
        sockets,
        parting,
        announce,
        growth,
        pressure,
        telling,
        follow_file
    )
    .map(drop)
}

/// The blocks towards which pods keep their addresses, as a file says, and what follows that file.
fn keep_addresses(
    config: &Config,
    shutdown: &CancellationToken,
) -> Result<(
    watch::Receiver<Vec<IpNet>>,
    impl Future<Output = Result<()>> + use<>,
)> {
    let (blocks, follower) = match &config.ip_masq {
        Some(path) => {
            let (blocks, follower) = masquerade::follow(path, false)?;
            (blocks, Some(follower))
        }
        None => (watch::channel(Vec::new()).1, None),
    };
    let shutdown = shutdown.clone();
    let following = async move {
        match follower {
            Some(follower) => follower.run(shutdown).await,
            None => Ok(()),
        }
    };
    Ok((blocks, following))
}

/// Announces load balancers' addresses on the devices that lead to the outside, if this is asked for.
async fn announce(
    client: kube::Client,
    config: &Config,
    devices: &[network::Device],
    announced: watch::Receiver<Vec<announce::Announced>>,
    shutdown: &CancellationToken,
) -> Result<()> {
    if !config.l2_announcements {
        return Ok(());
    }
    let who = announce::Config {
        node: config.node_name.clone(),
        devices: devices.iter().map(|device| device.name.clone()).collect(),
        timing: announce::Timing::default(),
    };
    let leases = announce::leases::Cluster::new(client);
    announce::run(leases, who, announced, shutdown.clone()).await
}

/// Serves the socket alone, for taking pods away where no API server runs.
pub async fn run_detached(config: Config, shutdown: CancellationToken) -> Result<()> {
    let tables = api::Tables {
        endpoints: connect(&config, None)?,
        services: None,
        hits: None,
        engine: None,
        flows: flows::Flows::new(
            flows::Directory::default(),
            &config.node_name,
            0,
            flows::metrics::FlowMetrics::default(),
        ),
        served: network::Served::default(),
    };
    api::run(config.socket, tables, shutdown).await
}

fn connect(config: &Config, dataplane: Option<Arc<Dataplane>>) -> Result<Arc<Endpoints>> {
    ipam::check_ranges(&config.pod_cidrs)?;
    let of = |v4: bool| {
        config
            .pod_cidrs
            .iter()
            .any(|range| range.addr().is_ipv4() == v4)
    };
    forwarding::turn_on(of(true), of(false))?;
    Ok(Arc::new(Endpoints::open(
        &config.state_dir,
        &config.pod_cidrs,
        &config.node_ips,
        dataplane,
    )?))
}

/// The primary one of a node's addresses, of which there is at most one of a family.
fn check_addresses(addresses: &[IpAddr]) -> Result<IpAddr> {
    let of = |v4: bool| addresses.iter().filter(move |ip| ip.is_ipv4() == v4);
    if of(true).count() > 1 || of(false).count() > 1 {
        bail!("the node has several addresses of one family: {addresses:?}; choose one");
    }
    addresses
        .first()
        .copied()
        .context("the node has no address")
}

/// Removes the devices of all endpoints that are on record, and the records.
pub async fn cleanup(state_dir: &Path) -> Result<()> {
    let handle = link::handle()?;
    for endpoint in Endpoints::open(state_dir, &[], &[], None)?.list().await {
        link::remove(&handle, &endpoint.device).await?;
    }
    match std::fs::remove_dir_all(state_dir) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            Err(error).with_context(|| format!("could not remove {}", state_dir.display()))
        }
        _ => Ok(()),
    }
}
