//! The part that is Xebec: the agent on the benchmark's node, and the pod that it connects.

use std::io::{Read, Write};
use std::net::IpAddr;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use kube::config::{KubeConfigOptions, Kubeconfig};
use serde_json::{Value, json};
use tokio_util::sync::CancellationToken;
use xebec_agent::loader::Aggregation;

use super::part;

/// The Node object.
pub const NODE: &str = "bench";
/// The pod that asks.
pub const POD: &str = "client";
/// The agent's kubeconfig, in the benchmark's folder.
pub const KUBECONFIG: &str = "agent.kubeconfig";
/// Who the agent is to the API server.
pub const USER: (&str, &[&str]) = (
    "system:serviceaccount:kube-system:xebec-agent",
    &[
        "system:serviceaccounts",
        "system:serviceaccounts:kube-system",
    ],
);

#[derive(clap::Args)]
pub struct Args {
    /// The benchmark's folder
    #[arg(long)]
    dir: PathBuf,
    /// The node's addresses
    #[arg(long)]
    ip: Vec<IpAddr>,
    /// The node's ranges of pods
    #[arg(long)]
    range: Vec<ipnet::IpNet>,
    /// The cgroup v2 folder of the node
    #[arg(long)]
    node_cgroup: PathBuf,
    /// Devices that lead to other nodes and the outside
    #[arg(long)]
    device: Vec<String>,
    /// Entries of the table of flows
    #[arg(long, default_value_t = xebec_agent::loader::FLOWS)]
    flows: u32,
    /// Which packets have events of flows, as programs number it
    #[arg(long, default_value_t = Aggregation::default() as u32)]
    aggregation: u32,
    /// Have XDP on them
    #[arg(long)]
    xdp: bool,
}

/// The cgroup of pods, below that of the node.
pub fn pods(node_cgroup: &Path) -> PathBuf {
    node_cgroup.join("pods")
}

fn socket(dir: &Path) -> PathBuf {
    dir.join("agent.sock")
}

/// Runs the agent until standard input ends.
pub fn run(args: Args) -> Result<()> {
    // As `xebec agent` does.
    xebec_agent::memory::share_one_heap();
    let runtime = part::runtime()?;
    let shutdown = CancellationToken::new();
    let ended = shutdown.clone();
    std::thread::spawn(move || {
        let mut rest = Vec::new();
        // Its end is what matters.
        let _ = std::io::stdin().read_to_end(&mut rest);
        ended.cancel();
    });
    let config = xebec_agent::Config {
        node_name: NODE.to_owned(),
        node_ips: args.ip,
        pod_cidrs: args.range,
        socket: socket(&args.dir),
        state_dir: args.dir.join("state"),
        bpf_dir: args.dir.join("bpf"),
        pod_cgroup: Some(pods(&args.node_cgroup)),
        cgroup_root: args.node_cgroup,
        devices: args.device,
        xdp: if args.xdp {
            xebec_agent::loader::Xdp::Native
        } else {
            xebec_agent::loader::Xdp::Auto
        },
        native: Vec::new(),
        lb_mode: xebec_agent::network::LbMode::Snat,
        host_legacy_routing: false,
        node_ports: xebec_agent::services::NodePortAddresses::All,
        l2_announcements: false,
        sizes: xebec_agent::loader::Sizes {
            flows: args.flows,
            ..Default::default()
        },
        domains: Default::default(),
        labels: Default::default(),
        aggregation: Aggregation::of(args.aggregation).context("there is no such aggregation")?,
        flows_kept: xebec_agent::flows::KEPT,
        flow_listen: None,
        flow_export: None,
        flow_metrics: xebec_agent::flows::metrics::FlowMetrics::usual(),
        http: xebec_agent::flows::HttpOptions::default(),
        ip_masq: None,
        serve: xebec_agent::metrics::Addresses::default(),
    };
    runtime.block_on(async {
        let path = args.dir.join(KUBECONFIG);
        let kubeconfig = Kubeconfig::read_from(&path)
            .with_context(|| format!("could not read {}", path.display()))?;
        let options = KubeConfigOptions::default();
        let api = kube::Config::from_custom_kubeconfig(kubeconfig, &options)
            .await
            .with_context(|| format!("{} is of no use", path.display()))?;
        let client = kube::Client::try_from(api).context("could not make a client")?;
        part::say(&json!({"starting": part::now()?}))?;
        xebec_agent::run(client, config, shutdown).await
    })
}

/// Connects a pod whose network namespace this is; its address.
pub fn add_pod(dir: &Path, netns: &Path, (namespace, name): (&str, &str)) -> Result<IpAddr> {
    let request = json!({
        "command": "ADD",
        "containerID": name,
        "netns": netns,
        "ifname": "eth0",
        "args": format!("K8S_POD_NAMESPACE={namespace};K8S_POD_NAME={name}"),
        "path": "",
        "config": {"cniVersion": "1.1.0", "name": "xebec", "type": "xebec-cni"},
    });
    let result = ask(dir, "POST", "/cni", &request.to_string())?;
    let address = result["ips"][0]["address"].as_str().unwrap_or_default();
    let address = address.split('/').next().unwrap_or_default();
    address
        .parse()
        .with_context(|| format!("the agent gave the pod no address but {result}"))
}

/// Asks the agent over its socket.
pub fn ask(dir: &Path, method: &str, path: &str, body: &str) -> Result<Value> {
    let socket = socket(dir);
    let mut stream = UnixStream::connect(&socket)
        .with_context(|| format!("could not connect to {}", socket.display()))?;
    stream.set_read_timeout(Some(Duration::from_secs(60)))?;
    write!(
        stream,
        "{method} {path} HTTP/1.1\r\nHost: agent\r\nConnection: close\r\nContent-Length: {}\r\n\r\n{body}",
        body.len()
    )
    .context("could not ask the agent")?;
    let mut text = String::new();
    stream
        .read_to_string(&mut text)
        .context("the agent did not answer")?;
    let (head, body) = text
        .split_once("\r\n\r\n")
        .context("the agent's answer is no HTTP")?;
    let body: Value = serde_json::from_str(body)
        .with_context(|| format!("the agent answered {path} with {body:?}"))?;
    if !head
        .lines()
        .next()
        .is_some_and(|status| status.contains(" 200 "))
    {
        bail!("the agent answered {path} with {body}");
    }
    Ok(body)
}
