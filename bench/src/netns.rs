//! The peer of the network benchmarks: two network namespaces, each wired to the host by a veth pair as pods are,
//! with nothing attached to the devices.

use std::net::Ipv4Addr;
use std::os::unix::fs::MetadataExt;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result};
use xebec_tests::{eventually, succeed, xebec_bin};

use crate::cleanup::OnInterrupt;
use crate::traffic::Place;

/// Addresses of the range that is set aside for benchmarks (RFC 2544).
const CLIENT_IP: Ipv4Addr = Ipv4Addr::new(198, 18, 0, 1);
const SERVER_IP: Ipv4Addr = Ipv4Addr::new(198, 18, 0, 2);
/// The next hop of both, as in pods nobody's address.
const GATEWAY: &str = "169.254.1.1";

/// Two namespaces that reach each other through the host; gone when this is dropped.
pub struct BareVeth {
    /// Where the asking end runs.
    pub client: Place,
    /// Where the answering end runs.
    pub server: Place,
    /// Where it listens.
    pub server_ip: Ipv4Addr,
    _processes: [Process; 2],
}

impl BareVeth {
    /// Makes both, with the cgroups of two pods; the answering end listens soon after.
    pub fn beside(pod_client: &Place, pod_server: &Place) -> Result<Self> {
        let client = Process::in_own_network()?;
        let server = Process::in_own_network()?;
        pod_client.take_in(client.pid())?;
        pod_server.take_in(server.pid())?;
        wire(client.pid(), "xbbenchc", CLIENT_IP)?;
        wire(server.pid(), "xbbenchs", SERVER_IP)?;
        Ok(Self {
            client: pod_client.with_network_of(client.pid()),
            server: pod_server.with_network_of(server.pid()),
            server_ip: SERVER_IP,
            _processes: [client, server],
        })
    }
}

/// A `tcp-serve` whose network namespace lives as long as itself: with it go the veth pair and its routes.
struct Process {
    child: Child,
    _interrupt: OnInterrupt,
}

impl Process {
    fn in_own_network() -> Result<Self> {
        // Should the benchmark be killed, the kernel ends this too.
        let child = Command::new("setpriv")
            .args(["--pdeathsig", "KILL", "unshare", "--net"])
            .arg(xebec_bin())
            .args(["demo", "tcp-serve"])
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .spawn()
            .context("could not start setpriv (package util-linux)")?;
        let mut kill = Command::new("kill");
        kill.args(["-KILL", &child.id().to_string()]);
        let process = Self {
            _interrupt: OnInterrupt::run(kill),
            child,
        };
        let network = |pid: &str| -> Result<u64> {
            let path = format!("/proc/{pid}/ns/net");
            let metadata =
                std::fs::metadata(&path).with_context(|| format!("could not look at {path}"))?;
            Ok(metadata.ino())
        };
        let ours = network("self")?;
        eventually(
            "a network namespace of its own",
            Duration::from_secs(5),
            || Ok(network(&process.pid().to_string())? != ours),
        )?;
        Ok(process)
    }

    fn pid(&self) -> i32 {
        self.child.id() as i32
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Wires the namespace of a process to ours, step for step as the agent wires a pod.
fn wire(pid: i32, device: &str, address: Ipv4Addr) -> Result<()> {
    let temporary = format!("{device}p");
    let address = format!("{address}/32");
    let host = |line: &str| run("ip", &line.split(' ').collect::<Vec<_>>());
    let netns = format!("--net=/proc/{pid}/ns/net");
    let inside = |line: &str| {
        let words: Vec<&str> = [netns.as_str(), "ip"]
            .into_iter()
            .chain(line.split(' '))
            .collect();
        run("nsenter", &words)
    };
    host(&format!(
        "link add {device} type veth peer name {temporary}"
    ))?;
    let mac = |name: &str| -> Result<String> {
        let path = format!("/sys/class/net/{name}/address");
        let mac =
            std::fs::read_to_string(&path).with_context(|| format!("could not read {path}"))?;
        Ok(mac.trim().to_owned())
    };
    let (host_mac, inner_mac) = (mac(device)?, mac(&temporary)?);
    host(&format!("link set {temporary} netns {pid} name eth0"))?;
    host(&format!("link set {device} up"))?;
    let filter = format!("/proc/sys/net/ipv4/conf/{device}/rp_filter");
    std::fs::write(&filter, "0").with_context(|| format!("could not write {filter}"))?;
    inside("link set lo up")?;
    inside("link set eth0 up")?;
    inside(&format!("addr add {address} dev eth0"))?;
    inside(&format!(
        "neigh add {GATEWAY} lladdr {host_mac} dev eth0 nud permanent"
    ))?;
    inside(&format!("route add {GATEWAY} dev eth0 scope link"))?;
    inside(&format!("route add default via {GATEWAY} dev eth0"))?;
    host(&format!("route add {address} dev {device} scope link"))?;
    let ip = address.trim_end_matches("/32");
    host(&format!(
        "neigh add {ip} lladdr {inner_mac} dev {device} nud permanent"
    ))
}

fn run(program: &str, words: &[&str]) -> Result<()> {
    let output = Command::new(program)
        .args(words)
        .output()
        .with_context(|| format!("could not start {program}"))?;
    succeed(&format!("{program} {}", words.join(" ")), output).map(drop)
}
