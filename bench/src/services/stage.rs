//! The stage of every variant: a node with a pod that asks, an outside client, and the ten backends behind another device.
//!
//! ```text
//!  pod 10.244.0.x ── veth ── node 10.200.0.1 ── veth ── 10.200.0.2, backends 10.244.2.2–11
//!                             192.0.2.1 ── veth ── outside client 192.0.2.2
//! ```
//! Each is a network namespace; what differs between variants is only what the node does with the packets.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, SocketAddrV4};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use xebec_agent::loader::Aggregation;
use xebec_tests::{eventually, succeed};

use super::list::{self, BACKENDS, TARGET_PORT};
use super::part::{Network, Part};
use super::{agent, control};
use crate::cleanup::OnInterrupt;

/// The node's address, as in kube-proxy's rule sets.
pub const NODE_IP: Ipv4Addr = Ipv4Addr::new(10, 200, 0, 1);
/// Its other address.
pub const NODE_IP6: Ipv6Addr = Ipv6Addr::new(0xfd00, 0x200, 0, 0, 0, 0, 0, 1);
const OTHER_IP: Ipv4Addr = Ipv4Addr::new(10, 200, 0, 2);
const OTHER_IP6: Ipv6Addr = Ipv6Addr::new(0xfd00, 0x200, 0, 0, 0, 0, 0, 2);
const OTHER_RANGE: &str = "10.244.2.0/23";
/// The pod's address where no agent gives it one.
const POD_IP: &str = "10.244.0.2/32";
/// The pod's next hop, nobody's address.
const GATEWAY: &str = "169.254.1.1";
const API_PORT: u16 = 6443;
/// How long an agent or an API server may take to start.
const PATIENCE: Duration = Duration::from_secs(120);
/// How long all Services may take to come into the kernel.
const SETTLING: Duration = Duration::from_secs(300);

/// A node as the API has it: one of each family, IPv4 first.
#[derive(Serialize, Deserialize)]
pub struct NodeAddresses {
    /// Ranges of pods.
    pub ranges: [String; 2],
    /// Its own.
    pub ips: [IpAddr; 2],
}

impl NodeAddresses {
    /// Of node number `number`.
    fn new(number: u8, v4: Ipv4Addr, v6: Ipv6Addr) -> Self {
        Self {
            ranges: [
                // Room for 500 pods.
                format!("10.244.{}.0/23", 2 * (number - 1)),
                format!("fd00:244:{number}::/64"),
            ],
            ips: [v4.into(), v6.into()],
        }
    }
}

/// Node, outside client and backends, wired.
pub struct Stage {
    /// The node's namespace.
    pub node: Part,
    outside: Option<Part>,
    /// What has the backends.
    pub server: Part,
}

impl Stage {
    /// All but the pod.
    pub fn new() -> Result<Self> {
        let node = Part::start(Network::Own, false, &["hold"])?;
        let backends: Vec<String> = BACKENDS
            .map(|last| list::backend(last).to_string())
            .collect();
        // Its namespace must have the addresses before it listens on them.
        let others = Part::start(Network::Own, false, &["hold"])?;
        let cpu = crate::traffic::client_cpu()?.to_string();
        let outside = Part::start(Network::Own, false, &["--cpu", &cpu, "ask"])?;
        for part in [&node, &others, &outside] {
            part.run("ip", "link set lo up")?;
        }
        let client = |last| {
            let v6 = Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, last);
            (Ipv4Addr::new(192, 0, 2, last as u8), v6)
        };
        wire(
            &node,
            &others,
            "b0",
            (NODE_IP, NODE_IP6),
            (OTHER_IP, OTHER_IP6),
        )?;
        wire(&node, &outside, "o0", client(1), client(2))?;
        more_ports(&outside)?;
        for (address, last) in backends.iter().zip(BACKENDS) {
            others.run("ip", &format!("addr add {address}/32 dev eth0"))?;
            let other = list::backend6(last);
            others.run("ip", &format!("addr add {other}/128 dev eth0 nodad"))?;
        }
        sysctl(&node, "net/ipv4/ip_forward", "1")?;
        sysctl(&node, "net/ipv6/conf/all/forwarding", "1")?;
        let port = TARGET_PORT.to_string();
        let server_cpu = crate::traffic::SERVER_CPU.to_string();
        let mut words = vec!["--cpu", &server_cpu, "serve", "--port", &port];
        words.extend(backends.iter().map(String::as_str));
        let mut server = Part::start(Network::Of(&others), false, &words)?;
        server.hear::<Value>()?;
        // The namespace lives on with the server.
        others.end();
        Ok(Self {
            node,
            outside: Some(outside),
            server,
        })
    }

    /// The outside client, once.
    pub fn take_outside(&mut self) -> Result<Part> {
        self.outside.take().context("the outside client was taken")
    }

    /// The pod on a node without an agent, and its client.
    pub fn plain_pod(&self) -> Result<Part> {
        let cpu = crate::traffic::client_cpu()?.to_string();
        let pod = Part::start(Network::Own, false, &["--cpu", &cpu, "ask"])?;
        pod.run("ip", "link set lo up")?;
        self.node.run(
            "ip",
            &format!("link add c0 type veth peer name eth0 netns {}", pod.pid()),
        )?;
        self.node.run("ip", "link set c0 up")?;
        sysctl(&self.node, "net/ipv4/conf/c0/rp_filter", "0")?;
        pod.run("ip", "link set eth0 up")?;
        pod.run("ip", &format!("addr add {POD_IP} dev eth0"))?;
        pod.run(
            "ip",
            &format!(
                "neigh add {GATEWAY} lladdr {} dev eth0 nud permanent",
                mac(&self.node, "c0")?
            ),
        )?;
        pod.run("ip", &format!("route add {GATEWAY} dev eth0 scope link"))?;
        pod.run("ip", &format!("route add default via {GATEWAY} dev eth0"))?;
        let ip = POD_IP.trim_end_matches("/32");
        self.node
            .run("ip", &format!("route add {ip} dev c0 scope link"))?;
        let inner = mac(&pod, "eth0")?;
        self.node.run(
            "ip",
            &format!("neigh add {ip} lladdr {inner} dev c0 nud permanent"),
        )?;
        self.route()?;
        more_ports(&pod)?;
        Ok(pod)
    }

    /// The way to the backends, where no agent makes it.
    fn route(&self) -> Result<()> {
        self.node
            .run("ip", &format!("route add {OTHER_RANGE} via {OTHER_IP}"))
            .map(drop)
    }

    /// Feeds a program in the node's namespace.
    pub fn feed(&self, program: &str, words: &[&str], input: &[u8]) -> Result<()> {
        let mut child = Command::new("nsenter")
            .arg(format!("--net={}", self.node.netns().display()))
            .arg(program)
            .args(words)
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .with_context(|| format!("could not start {program}"))?;
        if let Some(mut stdin) = child.stdin.take() {
            // What it does not read, its exit code tells better than a broken pipe.
            let _ = std::io::Write::write_all(&mut stdin, input);
        }
        let output = child.wait_with_output()?;
        succeed(program, output).map(drop)
    }
}

/// Joins a namespace to the node's by a veth pair, with an address of each family at both ends; the node is its default
/// route.
fn wire(
    node: &Part,
    other: &Part,
    device: &str,
    near: (Ipv4Addr, Ipv6Addr),
    far: (Ipv4Addr, Ipv6Addr),
) -> Result<()> {
    node.run(
        "ip",
        &format!(
            "link add {device} type veth peer name eth0 netns {}",
            other.pid()
        ),
    )?;
    sysctl(node, &format!("net/ipv4/conf/{device}/rp_filter"), "0")?;
    for (part, device, (v4, v6)) in [(node, device, near), (other, "eth0", far)] {
        part.run("ip", &format!("addr add {v4}/24 dev {device}"))?;
        part.run("ip", &format!("addr add {v6}/64 dev {device} nodad"))?;
        part.run("ip", &format!("link set {device} up"))?;
    }
    other.run("ip", &format!("route add default via {}", near.0))?;
    other.run("ip", &format!("-6 route add default via {}", near.1))?;
    // No ARP in the middle of a measurement.
    for (part, ips, device, mac) in [
        (node, far, device, mac(other, "eth0")?),
        (other, near, "eth0", mac(node, device)?),
    ] {
        for ip in [IpAddr::from(ips.0), IpAddr::from(ips.1)] {
            part.run(
                "ip",
                &format!("neigh replace {ip} lladdr {mac} dev {device} nud permanent"),
            )?;
        }
    }
    Ok(())
}

fn mac(part: &Part, device: &str) -> Result<String> {
    let text = part.run("ip", &format!("-json link show dev {device}"))?;
    let links: Value = serde_json::from_str(&text).context("ip printed no JSON")?;
    links[0]["address"]
        .as_str()
        .map(str::to_owned)
        .with_context(|| format!("{device} has no hardware address"))
}

/// So that clients of short connections seldom use a port again.
pub fn more_ports(part: &Part) -> Result<()> {
    sysctl(part, "net/ipv4/ip_local_port_range", "1024 65535")
}

/// One half of the ports for what a part connects from here on. Two ways to a backend from one pod would meet there
/// in one connection's addresses and ports, whose timestamps (which depend on the address that was asked) would not go
/// on where the connection before ended: the backend refuses such a one for a minute (RFC 7323, PAWS).
pub fn half_of_ports(part: &Part, upper: bool) -> Result<()> {
    let range = if upper { "32768 65535" } else { "1024 32767" };
    sysctl(part, "net/ipv4/ip_local_port_range", range)
}

/// Sets a sysctl of a part's network namespace.
fn sysctl(part: &Part, name: &str, value: &str) -> Result<()> {
    let output = Command::new("nsenter")
        .arg(format!("--net={}", part.netns().display()))
        .args(["sh", "-c", "echo \"$2\" > \"$1\"", "sh"])
        .args([&format!("/proc/sys/{name}"), value])
        .output()
        .context("could not start nsenter")?;
    succeed(&format!("setting {name}"), output).map(drop)
}

/// A stage whose node has the API server and, when it is started, Xebec's agent.
pub struct XebecStage {
    // Dropped in this order: what runs before the folders that it uses.
    /// The agent.
    pub agent: Option<Part>,
    /// The API server.
    pub control: Part,
    /// The rest.
    pub stage: Stage,
    /// Entries of the agent's table of flows.
    pub flows: u32,
    /// Which packets have events of flows.
    pub aggregation: Aggregation,
    /// How many Services there are in the API, besides its own.
    services: u64,
    cgroup: Cgroup,
    dir: Folder,
}

impl XebecStage {
    /// The stage and an API server with so many Services.
    pub fn new(name: &str, services: usize, endpoints: usize) -> Result<Self> {
        Self::with_outside(name, services, endpoints, BACKENDS)
    }

    /// The same with these backends of the Service for outside.
    pub fn with_outside(
        name: &str,
        services: usize,
        endpoints: usize,
        outside: std::ops::RangeInclusive<u8>,
    ) -> Result<Self> {
        let dir = Folder::new(name)?;
        let cgroup = Cgroup::new(name)?;
        let stage = Stage::new()?;
        // Ports for as many flows to the backends as a benchmark begins: 32768 and above are translation's.
        sysctl(&stage.node, "net/ipv4/ip_local_port_range", "1024 32767")?;
        let listen = SocketAddr::from((NODE_IP, API_PORT)).to_string();
        let path = dir.0.display().to_string();
        let mut control = Part::start(
            Network::Of(&stage.node),
            false,
            &["control", "--dir", &path, "--listen", &listen],
        )?;
        control.hear::<Value>()?;
        let nodes = vec![
            (
                agent::NODE.to_owned(),
                NodeAddresses::new(1, NODE_IP, NODE_IP6),
            ),
            (
                "other".to_owned(),
                NodeAddresses::new(2, OTHER_IP, OTHER_IP6),
            ),
        ];
        control.ask::<Value>(&control::Order::Rig { nodes })?;
        let services = control.ask::<u64>(&control::Order::Load {
            count: services,
            endpoints,
            outside,
        })?;
        Ok(Self {
            agent: None,
            services,
            flows: xebec_agent::loader::FLOWS,
            aggregation: Aggregation::default(),
            control,
            stage,
            cgroup,
            dir,
        })
    }

    /// Starts the agent, with nothing in the kernel from before; when it began. `xdp` has it on the devices that lead
    /// to others.
    pub fn start_agent(&mut self, xdp: bool) -> Result<u64> {
        ensure!(self.agent.is_none(), "the agent runs already");
        let dir = self.dir.0.display().to_string();
        let node = NodeAddresses::new(1, NODE_IP, NODE_IP6);
        let ips = node.ips.map(|ip| ip.to_string());
        let cgroup = self.cgroup.node.display().to_string();
        // Its BPF filesystem, and with it what is pinned there, ends with it.
        let mut words = vec![
            "agent",
            "--dir",
            &dir,
            "--node-cgroup",
            &cgroup,
            "--device",
            "b0",
            "--device",
            "o0",
        ];
        for (ip, range) in ips.iter().zip(&node.ranges) {
            words.extend(["--ip", ip, "--range", range]);
        }
        words.extend(xdp.then_some("--xdp"));
        let flows = self.flows.to_string();
        words.extend(["--flows", &flows]);
        let aggregation = (self.aggregation as u32).to_string();
        words.extend(["--aggregation", &aggregation]);
        let mut agent = Part::start(Network::Of(&self.stage.node), true, &words)?;
        let started: Value = agent.hear()?;
        self.agent = Some(agent);
        started["starting"]
            .as_u64()
            .context("the agent's part did not say when it began")
    }

    /// Waits until the agent connects pods and has all Services in the kernel, in maps that grow no more: what is
    /// measured then is no part of its start. The pod's two clients: with its sockets' Services, and without.
    pub fn agent_pod(&self) -> Result<(Part, Part)> {
        let cpu = crate::traffic::client_cpu()?.to_string();
        let with = self.client_in_pods(Network::Own)?;
        with.run("ip", "link set lo up")?;
        // In no cgroup of the node, so that only the packets meet its programs.
        let without = Part::start(Network::Of(&with), false, &["--cpu", &cpu, "ask"])?;
        self.wait_for_agent()?;
        self.connect(&with.netns(), (list::NAMESPACE, agent::POD))?;
        more_ports(&with)?;
        self.wait_for_services()?;
        Ok((with, without))
    }

    /// Waits until the agent connects pods.
    pub fn wait_for_agent(&self) -> Result<()> {
        eventually("the agent's socket", PATIENCE, || {
            Ok(agent::ask(&self.dir.0, "GET", "/status", "").is_ok())
        })
    }

    /// Waits until all Services are in the kernel, in maps that grow no more.
    pub fn wait_for_services(&self) -> Result<()> {
        eventually("all Services in the kernel", SETTLING, || {
            let status = agent::ask(&self.dir.0, "GET", "/status", "")?;
            Ok(is_settled(&status, self.services))
        })
    }

    /// Connects the pod of this namespace and name, whose network namespace this is; its address.
    pub fn connect(&self, netns: &Path, pod: (&str, &str)) -> Result<IpAddr> {
        agent::add_pod(&self.dir.0, netns, pod)
    }

    /// A client whose sockets are those of a pod.
    pub fn client_in_pods(&self, network: Network) -> Result<Part> {
        let cpu = crate::traffic::client_cpu()?.to_string();
        let client = agent::pods(&self.cgroup.node).join("client");
        std::fs::create_dir_all(&client)
            .with_context(|| format!("could not make {}", client.display()))?;
        let client = client.display().to_string();
        Part::start(network, false, &["--cgroup", &client, "--cpu", &cpu, "ask"])
    }

    /// Ends the agent.
    pub fn stop_agent(&mut self) -> Result<()> {
        if let Some(agent) = self.agent.take() {
            agent.end();
        }
        // Addresses of pods, which go with it.
        let state = self.dir.0.join("state");
        match std::fs::remove_dir_all(&state) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                Err(error).with_context(|| format!("could not remove {}", state.display()))
            }
            _ => Ok(()),
        }
    }

    /// Rows of one of the agent's tables.
    pub fn table(&self, name: &str) -> Result<Vec<Value>> {
        let rows = agent::ask(&self.dir.0, "GET", &format!("/tables/{name}"), "")?;
        rows.as_array()
            .cloned()
            .with_context(|| format!("the agent's table {name} is no list"))
    }
}

/// Whether an agent with this status has attached its hooks, and has so many Services in maps that grow no more.
fn is_settled(status: &Value, services: u64) -> bool {
    let told = &status["services"];
    status["devices"]
        .as_str()
        .is_some_and(|devices| !devices.is_empty())
        && told["known"]
            .as_u64()
            .is_some_and(|known| known >= services)
        && told["lacking"] == 0
        && told["growing"] == false
}

/// A folder that goes with the benchmark.
pub struct Folder(
    PathBuf,
    #[allow(dead_code, reason = "kept until the folder is gone")] OnInterrupt,
);

impl Folder {
    /// One with this in its name.
    pub fn new(name: &str) -> Result<Self> {
        let dir = PathBuf::from(format!("/tmp/xebec-bench-{name}-{}", std::process::id()));
        std::fs::create_dir_all(&dir)
            .with_context(|| format!("could not make {}", dir.display()))?;
        let mut remove = Command::new("rm");
        remove.arg("-rf").arg(&dir);
        Ok(Self(dir, OnInterrupt::run(remove)))
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.0
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        if let Err(error) = std::fs::remove_dir_all(&self.0) {
            eprintln!("bench: could not remove {}: {error}", self.0.display());
        }
    }
}

/// The node's cgroup v2 folder.
struct Cgroup {
    node: PathBuf,
    _interrupt: OnInterrupt,
}

impl Cgroup {
    fn new(name: &str) -> Result<Self> {
        let mounts =
            std::fs::read_to_string("/proc/self/mounts").context("could not read mounts")?;
        let root = mounts
            .lines()
            .map(|line| line.split(' ').collect::<Vec<_>>())
            .find(|words| words.get(2) == Some(&"cgroup2"))
            .and_then(|words| words.get(1).map(PathBuf::from))
            .context("no cgroup v2 hierarchy is mounted")?;
        let node = root.join(format!("xebec-bench-{name}-{}", std::process::id()));
        let pods = agent::pods(&node);
        std::fs::create_dir_all(&pods)
            .with_context(|| format!("could not make {}", pods.display()))?;
        let mut remove = Command::new("sh");
        // Its processes were killed before: newest first.
        let line = "sleep 0.2; find \"$1\" -depth -type d -exec rmdir {} +";
        remove.args(["-c", line, "sh"]).arg(&node);
        Ok(Self {
            node,
            _interrupt: OnInterrupt::run(remove),
        })
    }
}

impl Drop for Cgroup {
    fn drop(&mut self) {
        let removed = eventually("the end of the cgroup", Duration::from_secs(5), || {
            Ok(remove_tree(&self.node).is_ok())
        });
        if let Err(error) = removed {
            eprintln!("bench: {} stays: {error:#}", self.node.display());
        }
    }
}

fn remove_tree(dir: &Path) -> std::io::Result<()> {
    for entry in std::fs::read_dir(dir)? {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            remove_tree(&entry.path())?;
        }
    }
    std::fs::remove_dir(dir)
}

/// Where `s0` is.
pub fn first_service(services: usize) -> Result<SocketAddrV4> {
    let listed = list::services(services, BACKENDS.count())?;
    let first = listed.first().context("there are no Services")?;
    Ok(SocketAddrV4::new(first.cluster_ip, first.port))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn an_agent_is_settled_once_nothing_is_missing() {
        let status = |devices: &str, known: u64, lacking: u64, growing: bool| {
            json!({
                "devices": devices,
                "services": {"known": known, "lacking": lacking, "growing": growing},
            })
        };
        assert!(is_settled(&status("b0 by tc", 12, 0, false), 12));
        for early in [
            status("", 12, 0, false),
            status("b0 by tc", 11, 0, false),
            status("b0 by tc", 12, 1, false),
            status("b0 by tc", 12, 0, true),
            json!({"healthy": false, "error": "no counters"}),
        ] {
            assert!(!is_settled(&early, 12), "{early}");
        }
    }
}
