//! A node with an agent of its own process, a pod that asks, and another node whose pods are all addresses of a block.
//!
//! ```text
//!  pod 10.244.0.x ── veth ── node 192.0.2.10 ── veth ── other node 192.0.2.20, pods 10.128.0.0/10
//! ```
//!
//! All but the other node's many pods is there of IPv6, too.

use std::io::{Read, Write};
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use nix::sys::socket::{ControlMessage, ControlMessageOwned, MsgFlags, SockaddrIn};
use serde_json::{Value, json};
use tokio_util::sync::CancellationToken;
use xebec_agent::loader::{Loaded, Sizes, Xdp};
use xebec_agent::maps::Room;

use super::api::Api;
use crate::space::{Space, ip};

/// Where agents find their settings when this executable is started again as one.
const SETTINGS: &str = "XEBEC_TEST_AGENT";
/// The test that is an agent.
const PART: &str = "part_agent";
/// The node's addresses, IPv4's first as in all pairs.
pub const NODE: [&str; 2] = ["192.0.2.10", "2001:db8:2::10"];
/// The other node's.
pub const OTHER: [&str; 2] = ["192.0.2.20", "2001:db8:2::20"];
const PODS: [&str; 2] = ["10.244.0.0/24", "fd00:10:244::/64"];
const OTHER_PODS: [&str; 2] = ["10.128.0.0/10", "fd00:10:128::/64"];
const API: &str = "127.0.0.1:6443";
/// The port of every backend, of every Service, and of a server that is no backend.
pub const TARGET: u16 = 8080;
pub const PORT: u16 = 80;
/// Someone outside the cluster.
pub const OUTSIDE: [&str; 2] = ["198.51.100.7", "2001:db8:51::7"];
/// A pod of the other node.
pub const FAR_POD: [&str; 2] = ["10.128.0.9", "fd00:10:128::9"];
/// How long anything may take.
const PATIENCE: Duration = Duration::from_secs(120);

/// Whether to leave a test out.
pub fn left_out() -> bool {
    if nix::unistd::geteuid().is_root() && Loaded::built_in() {
        return false;
    }
    eprintln!("left out: this test needs root, and an agent built by `cargo xtask`");
    true
}

/// How an agent runs.
#[derive(Clone, Debug, Default)]
pub struct Options {
    /// How large the maps of Services are at first and at most: frontends, chunks, backends and ranges.
    pub sizes: Option<[[u32; 4]; 2]>,
    /// How many flows and affinities there is room for.
    pub forgetful: Option<[u32; 2]>,
    /// A file as ip-masq-agent has it.
    pub ip_masq: Option<PathBuf>,
    /// As on kernels without tcx.
    pub filters: bool,
    /// XDP on the device that leads to the other node.
    pub xdp: bool,
}

/// Runs the agent that the settings tell of, if there are any.
pub fn run_agent() {
    let Ok(settings) = std::env::var(SETTINGS) else {
        return;
    };
    let settings: Value = serde_json::from_str(&settings).unwrap();
    let dir = PathBuf::from(settings["dir"].as_str().unwrap());
    tracing_subscriber::fmt()
        .with_writer(std::io::stderr)
        .with_ansi(false)
        .init();
    let room = |value: &Value| {
        let of = |index: usize| value[index].as_u64().unwrap() as u32;
        Room {
            frontends: of(0),
            chunks: of(1),
            backends: of(2),
            ranges: of(3),
        }
    };
    let sizes = settings["sizes"].as_array().map(|sizes| Sizes {
        least: room(&sizes[0]),
        most: room(&sizes[1]),
        ..Sizes::default()
    });
    let mut sizes = sizes.unwrap_or_default();
    if let Some(entries) = settings["forgetful"].as_array() {
        let of = |index: usize| entries[index].as_u64().unwrap() as u32;
        (sizes.flows, sizes.affinities) = (of(0), of(1));
    }
    let cgroup = PathBuf::from(settings["cgroup"].as_str().unwrap());
    let config = xebec_agent::Config {
        lb_mode: xebec_agent::network::LbMode::Snat,
        host_legacy_routing: false,
        node_name: "a".into(),
        node_ips: NODE.map(|ip| ip.parse().unwrap()).into(),
        pod_cidrs: PODS.map(|range| range.parse().unwrap()).into(),
        socket: dir.join("agent.sock"),
        state_dir: dir.join("state"),
        bpf_dir: dir.join("bpf"),
        pod_cgroup: Some(cgroup.join("pods")),
        cgroup_root: cgroup,
        devices: vec!["net".into()],
        xdp: if settings["xdp"] == true {
            Xdp::Generic
        } else {
            Xdp::Off
        },
        native: Vec::new(),
        node_ports: xebec_agent::services::NodePortAddresses::All,
        l2_announcements: false,
        serve: xebec_agent::metrics::Addresses {
            metrics: Some("127.0.0.1:10249".parse().unwrap()),
            healthz: None,
        },
        sizes,
        domains: Default::default(),
        labels: Default::default(),
        aggregation: xebec_agent::loader::Aggregation::default(),
        flows_kept: xebec_agent::flows::KEPT,
        flow_listen: None,
        flow_export: None,
        flow_metrics: xebec_agent::flows::metrics::FlowMetrics::usual(),
        http: xebec_agent::flows::HttpOptions::default(),
        ip_masq: settings["ip_masq"].as_str().map(PathBuf::from),
    };
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .unwrap();
    let outcome = runtime.block_on(async {
        let api = kube::Config::new(format!("http://{API}").parse().unwrap());
        let client = kube::Client::try_from(api).unwrap();
        xebec_agent::run(client, config, CancellationToken::new()).await
    });
    panic!("the agent ended: {outcome:?}");
}

/// A folder of the agent's, and its cgroup; both go with it.
struct Place {
    dir: tempfile::TempDir,
    cgroup: PathBuf,
}

impl Place {
    fn new() -> Self {
        static COUNT: std::sync::atomic::AtomicU32 = std::sync::atomic::AtomicU32::new(0);
        let number = COUNT.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
        let mounts = std::fs::read_to_string("/proc/self/mounts").unwrap();
        let root = mounts
            .lines()
            .map(|line| line.split(' ').collect::<Vec<&str>>())
            .find(|words| words[2] == "cgroup2")
            .unwrap()[1]
            .to_owned();
        let name = format!("xebec-test-{}-{number}", std::process::id());
        let cgroup = Path::new(&root).join(name);
        std::fs::create_dir(&cgroup).unwrap();
        let dir = tempfile::tempdir().unwrap();
        std::fs::create_dir(dir.path().join("bpf")).unwrap();
        Self { dir, cgroup }
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let _ = nix::mount::umount2(
            &self.dir.path().join("bpf"),
            nix::mount::MntFlags::MNT_DETACH,
        );
        for folder in [self.cgroup.join("pods"), self.cgroup.clone()] {
            let _ = std::fs::remove_dir(folder);
        }
    }
}

/// All of it.
pub struct Stage {
    pub api: Api,
    pub pod: Space,
    other: Space,
    node: Space,
    agent: Option<Child>,
    place: Place,
}

impl Stage {
    /// A node without an agent yet, and with the API's objects but Services.
    pub fn new() -> Self {
        let (pod, node, other) = (Space::new(), Space::new(), Space::new());
        let api = Api::default();
        node.run(|| {
            ip("link set lo up");
            ip("link add net type veth peer name far");
            ip(&format!("link set far netns {}", other.path().display()));
            ip(&format!("addr add {}/24 dev net", NODE[0]));
            ip(&format!("addr add {}/64 dev net nodad", NODE[1]));
            ip("link set net up");
            for name in ["all", "default", "net"] {
                set("net/ipv4/conf", name, "rp_filter", "0");
            }
        });
        other.run(|| {
            ip("link set lo up");
            ip(&format!("addr add {}/24 dev far", OTHER[0]));
            ip(&format!("addr add {}/64 dev far nodad", OTHER[1]));
            ip("link set far up");
            for (range, node) in PODS.iter().zip(NODE) {
                ip(&format!("route add {range} via {node}"));
            }
            // Every address of IPv4's block is this node's, and so is the one outside.
            ip(&format!("route add local {} dev lo", OTHER_PODS[0]));
            ip(&format!("addr add {}/128 dev lo nodad", FAR_POD[1]));
            // Without `nodad` an address is not there until a moment later, on `lo` as elsewhere.
            for (outside, rest) in OUTSIDE.iter().zip(["", " nodad"]) {
                ip(&format!("addr add {outside} dev lo{rest}"));
            }
            for name in ["all", "far"] {
                set("net/ipv4/conf", name, "rp_filter", "0");
            }
            echo_tcp(TARGET);
            echo_udp(TARGET);
            for at in OUTSIDE.iter().chain(&FAR_POD).chain(&OTHER) {
                tell_sources(at.parse().unwrap());
            }
        });
        node.run(|| {
            for (outside, other) in OUTSIDE.iter().zip(OTHER) {
                ip(&format!("route add {outside} via {other}"));
            }
            api.serve(API.parse().unwrap());
        });
        api.set("namespaces", [json!({"metadata": {"name": "n"}})]);
        api.set(
            "nodes",
            [
                node_object("a", NODE, PODS, json!({})),
                other_node(json!({})),
            ],
        );
        api.set(
            "pods",
            [json!({
                "metadata": {"namespace": "n", "name": "client", "labels": {}},
                "spec": {"nodeName": "a", "containers": []},
            })],
        );
        Self {
            api,
            pod,
            other,
            node,
            agent: None,
            place: Place::new(),
        }
    }

    /// Where the agent has something.
    pub fn path(&self, name: &str) -> PathBuf {
        self.place.dir.path().join(name)
    }

    /// Where the node's programs and maps are pinned.
    pub fn pins(&self) -> PathBuf {
        self.path("bpf")
    }

    /// Starts an agent, which may have one before it.
    pub fn start(&mut self, options: &Options) {
        assert!(self.agent.is_none());
        let settings = json!({
            "dir": self.place.dir.path(), "cgroup": self.place.cgroup,
            "sizes": options.sizes, "forgetful": options.forgetful, "ip_masq": options.ip_masq,
            "xdp": options.xdp,
        });
        let _ = std::fs::remove_file(self.path("agent.sock"));
        let log = std::fs::OpenOptions::new()
            .create(true)
            .append(true)
            .open(self.path("log"))
            .unwrap();
        let mut command = Command::new(std::env::current_exe().unwrap());
        command
            .args([PART, "--exact", "--ignored", "--nocapture"])
            .env(SETTINGS, settings.to_string())
            .stdin(Stdio::null())
            .stdout(log.try_clone().unwrap())
            .stderr(log);
        if options.xdp {
            // As on a wire, frames have their checksums.
            self.other.run(|| {
                let mut ethtool = Command::new("ethtool");
                let off = ethtool.args(["-K", "far", "tx", "off"]).output().unwrap();
                assert!(off.status.success(), "{off:?}");
            });
        }
        if options.filters {
            command.env("XEBEC_TC", "clsact");
        }
        self.agent = Some(self.node.run(|| command.spawn().unwrap()));
    }

    /// Waits until the agent has taken over.
    pub fn wait_until_ready(&mut self) {
        self.wait("the agent serves the network's devices", |stage| {
            stage
                .try_ask("GET", "/status", "")
                .is_some_and(|status| !status["devices"].as_str().unwrap_or("").is_empty())
        });
    }

    /// Connects the pod; its addresses.
    pub fn connect(&self) -> [IpAddr; 2] {
        let request = json!({
            "command": "ADD", "containerID": "client", "netns": self.pod.path(), "ifname": "eth0",
            "args": "K8S_POD_NAMESPACE=n;K8S_POD_NAME=client", "path": "",
            "config": {"cniVersion": "1.1.0", "name": "xebec", "type": "xebec-cni"},
        });
        let result = self.try_ask("POST", "/cni", &request.to_string()).unwrap();
        [0, 1].map(|at| {
            let address = result["ips"][at]["address"].as_str();
            let address = address.unwrap_or_else(|| panic!("{result}"));
            address.split('/').next().unwrap().parse().unwrap()
        })
    }

    /// Does something on the node.
    pub fn on_node<T: Send>(&self, work: impl FnOnce() -> T + Send) -> T {
        self.node.run(work)
    }

    /// From here on the node has these labels.
    pub fn label_node(&self, labels: Value) {
        self.api
            .set("nodes", [node_object("a", NODE, PODS, labels)]);
    }

    /// Does something on the other node.
    pub fn on_other_node<T: Send>(&self, work: impl FnOnce() -> T + Send) -> T {
        self.other.run(work)
    }

    /// SIGKILL.
    pub fn kill(&mut self) {
        let mut agent = self.agent.take().unwrap();
        agent.kill().unwrap();
        agent.wait().unwrap();
    }

    /// The agent's process.
    pub fn process(&self) -> u32 {
        self.agent.as_ref().unwrap().id()
    }

    /// Waits for something, and for nothing if the agent ends.
    pub fn wait(&mut self, what: &str, mut is: impl FnMut(&Self) -> bool) {
        let begun = Instant::now();
        while !is(self) {
            let ended = self
                .agent
                .as_mut()
                .and_then(|agent| agent.try_wait().unwrap());
            if begun.elapsed() > PATIENCE || ended.is_some() {
                panic!("{what}: not within {PATIENCE:?}; {ended:?}\n{}", self.log());
            }
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// The end of what the agents logged.
    pub fn log(&self) -> String {
        let text = std::fs::read_to_string(self.path("log")).unwrap_or_default();
        let lines: Vec<&str> = text.lines().collect();
        lines[lines.len().saturating_sub(60)..].join("\n")
    }

    /// Asks the agent over its socket.
    pub fn try_ask(&self, method: &str, path: &str, body: &str) -> Option<Value> {
        let mut stream = UnixStream::connect(self.path("agent.sock")).ok()?;
        write!(
            stream,
            "{method} {path} HTTP/1.1\r\nHost: agent\r\nConnection: close\r\nContent-Length: {}\r\n\r\n{body}",
            body.len()
        )
        .ok()?;
        let mut text = String::new();
        stream.read_to_string(&mut text).ok()?;
        let (_, body) = text.split_once("\r\n\r\n")?;
        serde_json::from_str(body).ok()
    }

    /// One of the agent's metrics.
    pub fn metric(&self, name: &str) -> Option<f64> {
        let text = self.node.run(|| {
            let mut stream = TcpStream::connect("127.0.0.1:10249").ok()?;
            write!(
                stream,
                "GET /metrics HTTP/1.1\r\nHost: agent\r\nConnection: close\r\n\r\n"
            )
            .ok()?;
            let mut text = String::new();
            stream.read_to_string(&mut text).ok()?;
            Some(text)
        })?;
        let mut lines = text.lines().filter_map(|line| line.rsplit_once(' '));
        lines.find(|(found, _)| *found == name)?.1.parse().ok()
    }

    /// The source address of a connection, or a datagram, of the pod as an address of the other node sees it.
    pub fn seen_source(&self, to: IpAddr, tcp: bool) -> Option<IpAddr> {
        let (to, time) = (SocketAddr::new(to, TARGET + 1), Duration::from_millis(300));
        self.pod.run(|| {
            let mut text = String::new();
            if tcp {
                let mut stream = TcpStream::connect_timeout(&to, time).ok()?;
                stream.set_read_timeout(Some(time)).unwrap();
                stream.read_to_string(&mut text).ok()?;
            } else {
                let any = if to.is_ipv4() { "0.0.0.0:0" } else { "[::]:0" };
                let socket = UdpSocket::bind(any).unwrap();
                socket.set_read_timeout(Some(time)).unwrap();
                socket.send_to(b"who", to).ok()?;
                let mut buffer = [0; 64];
                let length = socket.recv(&mut buffer).ok()?;
                text.push_str(std::str::from_utf8(&buffer[..length]).ok()?);
            }
            text.parse().ok()
        })
    }
}

impl Drop for Stage {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("{}", self.log());
        }
        if self.agent.is_some() {
            self.kill();
        }
        // Links end with their pins, when the filesystem is unmounted.
        let _ = &self.other;
    }
}

/// The other node with these labels, as the API has it.
pub fn other_node(labels: Value) -> Value {
    node_object("b", OTHER, OTHER_PODS, labels)
}

fn node_object(name: &str, addresses: [&str; 2], ranges: [&str; 2], labels: Value) -> Value {
    let own = addresses.map(|ip| json!({"type": "InternalIP", "address": ip}));
    json!({
        "metadata": {"name": name, "labels": labels},
        "spec": {"podCIDR": ranges[0], "podCIDRs": ranges},
        "status": {"addresses": own},
    })
}

fn set(folder: &str, device: &str, name: &str, value: &str) {
    std::fs::write(format!("/proc/sys/{folder}/{device}/{name}"), value).unwrap();
}

/// Answers every line-sized piece with itself, at all addresses of this thread's namespace.
fn echo_tcp(port: u16) {
    let listener = TcpListener::bind(("0.0.0.0", port)).unwrap();
    std::thread::spawn(move || {
        for mut stream in listener.incoming().flatten() {
            std::thread::spawn(move || {
                let _ = stream.set_nodelay(true);
                let mut buffer = [0; 1024];
                while let Ok(length @ 1..) = stream.read(&mut buffer) {
                    if stream.write_all(&buffer[..length]).is_err() {
                        break;
                    }
                }
            });
        }
    });
}

/// A UDP socket that tells which of this namespace's addresses was meant.
fn everywhere(port: u16) -> UdpSocket {
    let socket = UdpSocket::bind(("0.0.0.0", port)).unwrap();
    nix::sys::socket::setsockopt(&socket, nix::sys::socket::sockopt::Ipv4PacketInfo, &true)
        .unwrap();
    nix::sys::socket::setsockopt(&socket, nix::sys::socket::sockopt::RcvBuf, &(4 << 20)).unwrap();
    socket
}

/// Answers each datagram with itself, from the address that it was sent to.
fn echo_udp(port: u16) {
    let socket = everywhere(port);
    std::thread::spawn(move || {
        let mut buffer = [0; 2048];
        loop {
            let mut space = nix::cmsg_space!(nix::libc::in_pktinfo);
            let mut parts = [std::io::IoSliceMut::new(&mut buffer)];
            let received = nix::sys::socket::recvmsg::<SockaddrIn>(
                socket.as_raw_fd(),
                &mut parts,
                Some(&mut space),
                MsgFlags::empty(),
            );
            let Ok(message) = received else { return };
            let mut info = message.cmsgs().unwrap().find_map(|one| match one {
                ControlMessageOwned::Ipv4PacketInfo(info) => Some(info),
                _ => None,
            });
            let (Some(info), Some(from)) = (info.as_mut(), message.address) else {
                continue;
            };
            info.ipi_spec_dst = info.ipi_addr;
            info.ipi_ifindex = 0;
            let length = message.bytes;
            let parts = [std::io::IoSlice::new(&buffer[..length])];
            let control = [ControlMessage::Ipv4PacketInfo(info)];
            // Who is gone needs no answer.
            let _ = nix::sys::socket::sendmsg(
                socket.as_raw_fd(),
                &parts,
                &control,
                MsgFlags::empty(),
                Some(&from),
            );
        }
    });
}

/// Tells everybody who asks this address who they seem to be, by TCP and UDP.
fn tell_sources(at: IpAddr) {
    let socket = UdpSocket::bind((at, TARGET + 1)).unwrap();
    std::thread::spawn(move || {
        while let Ok((_, from)) = socket.recv_from(&mut [0; 64]) {
            // Who is gone needs no answer.
            let _ = socket.send_to(from.ip().to_string().as_bytes(), from);
        }
    });
    let listener = TcpListener::bind((at, TARGET + 1)).unwrap();
    std::thread::spawn(move || {
        for mut stream in listener.incoming().flatten() {
            if let Ok(from) = stream.peer_addr() {
                let _ = stream.write_all(from.ip().to_string().as_bytes());
            }
        }
    });
}

/// Address of Service number `number`.
pub fn frontend(number: u32) -> Ipv4Addr {
    Ipv4Addr::from_bits(0x0a60_0000 + number)
}

/// A pod of the other node.
pub fn server(number: u32) -> Ipv4Addr {
    Ipv4Addr::from_bits(0x0a80_0000 + 1 + number % 0x3f_fff0)
}

/// Service number `number` and its slice with so many endpoints from the `first` of the other node's pods on.
pub fn service(number: u32, protocol: &str, first: u32, endpoints: u32) -> [Value; 2] {
    let name = format!("s{number}");
    let at = |index: u32| server(first + index);
    let endpoints: Vec<Value> = (0..endpoints)
        .map(|index| {
            json!({
                "addresses": [at(index)], "nodeName": "b",
                "conditions": {"ready": true, "serving": true, "terminating": false},
            })
        })
        .collect();
    let created = "2026-01-01T00:00:00Z";
    [
        json!({
            "metadata": {"namespace": "n", "name": name, "creationTimestamp": created},
            "spec": {
                "type": "ClusterIP", "clusterIP": frontend(number), "clusterIPs": [frontend(number)],
                "ipFamilies": ["IPv4"],
                "ports": [{"name": "p", "port": PORT, "protocol": protocol, "targetPort": TARGET}],
            },
        }),
        json!({
            "metadata": {
                "namespace": "n", "name": name, "creationTimestamp": created,
                "labels": {"kubernetes.io/service-name": name},
            },
            "addressType": "IPv4",
            "endpoints": endpoints,
            "ports": [{"name": "p", "port": TARGET, "protocol": protocol}],
        }),
    ]
}

impl Stage {
    /// Adds UDP Services with these numbers, each with so many endpoints that nobody else has.
    pub fn add(&self, numbers: std::ops::Range<u32>, endpoints: u32) {
        let of = |number: u32| service(number, "UDP", number * endpoints, endpoints);
        self.api.set(
            "endpointslices",
            numbers.clone().map(|number| of(number)[1].clone()),
        );
        self.api
            .set("services", numbers.map(|number| of(number)[0].clone()));
    }

    /// Asks UDP Services with these numbers, each once or, if that is lost, a few times more; which of them do not answer.
    pub fn silent(&self, numbers: impl Iterator<Item = u32>) -> Vec<u32> {
        let mut left: Vec<u32> = numbers.collect();
        self.pod.run(|| {
            for _ in 0..5 {
                // A port of its own for each round: every flow is new.
                let socket = UdpSocket::bind("0.0.0.0:0").unwrap();
                let time = Some(Duration::from_millis(200));
                socket.set_read_timeout(time).unwrap();
                let mut heard = std::collections::HashSet::new();
                let mut buffer = [0; 16];
                for some in left.chunks(64) {
                    for number in some {
                        let to = (frontend(*number), PORT);
                        // What was refused before is told here.
                        let _ = socket.send_to(&number.to_ne_bytes(), to);
                    }
                    for _ in some {
                        let Ok((4, from)) = socket.recv_from(&mut buffer) else {
                            break;
                        };
                        let number = u32::from_ne_bytes(buffer[..4].try_into().unwrap());
                        assert_eq!(from.ip(), frontend(number), "who answers is the Service");
                        heard.insert(number);
                    }
                }
                left.retain(|number| !heard.contains(number));
                if left.is_empty() {
                    break;
                }
            }
        });
        left
    }

    /// A connection of the pod to a Service.
    pub fn dial(&self, number: u32) -> TcpStream {
        self.dial_at((frontend(number), PORT).into())
    }

    /// A connection of the pod to anybody.
    pub fn dial_at(&self, to: SocketAddr) -> TcpStream {
        self.pod.run(|| {
            let stream = TcpStream::connect_timeout(&to, Duration::from_secs(5)).unwrap();
            stream.set_nodelay(true).unwrap();
            stream
                .set_read_timeout(Some(Duration::from_secs(10)))
                .unwrap();
            stream
        })
    }
}

/// How often the kernel has sent something of a connection again: no packet was lost where it never did.
pub fn retransmissions(stream: &TcpStream) -> u32 {
    // SAFETY: all zeros are a valid value of this plain structure.
    let mut info: nix::libc::tcp_info = unsafe { std::mem::zeroed() };
    let mut length = size_of_val(&info) as nix::libc::socklen_t;
    // SAFETY: the kernel writes at most `length` bytes, which `info` has.
    let outcome = unsafe {
        nix::libc::getsockopt(
            stream.as_raw_fd(),
            nix::libc::IPPROTO_TCP,
            nix::libc::TCP_INFO,
            (&raw mut info).cast(),
            &raw mut length,
        )
    };
    assert_eq!(outcome, 0);
    info.tcpi_total_retrans
}

/// Asks and hears over a connection until told to end; how often, and how long the longest took.
pub struct Talk {
    end: std::sync::Arc<std::sync::atomic::AtomicBool>,
    thread: std::thread::JoinHandle<(u32, Duration, u32)>,
}

impl Talk {
    /// Over this connection, which has carried nothing yet.
    pub fn begin(mut stream: TcpStream) -> Self {
        let end = std::sync::Arc::new(std::sync::atomic::AtomicBool::new(false));
        let ended = end.clone();
        let thread = std::thread::spawn(move || {
            let (mut count, mut longest) = (0_u32, Duration::ZERO);
            while !ended.load(std::sync::atomic::Ordering::Relaxed) {
                let (began, mut answer) = (Instant::now(), [0; 4]);
                stream.write_all(&count.to_ne_bytes()).unwrap();
                stream.read_exact(&mut answer).unwrap();
                assert_eq!(u32::from_ne_bytes(answer), count);
                longest = longest.max(began.elapsed());
                count += 1;
                std::thread::sleep(Duration::from_millis(1));
            }
            (count, longest, retransmissions(&stream))
        });
        Self { end, thread }
    }

    /// How often it asked, how long the longest answer took, and how often something was sent again.
    pub fn end(self) -> (u32, Duration, u32) {
        self.end.store(true, std::sync::atomic::Ordering::Relaxed);
        self.thread.join().unwrap()
    }
}

impl Stage {
    /// The agent's answer of one JSON object a line.
    pub fn dump(&self, path: &str) -> Vec<Value> {
        let mut stream = UnixStream::connect(self.path("agent.sock")).unwrap();
        write!(stream, "GET {path} HTTP/1.0\r\nHost: agent\r\n\r\n").unwrap();
        let mut text = String::new();
        stream.read_to_string(&mut text).unwrap();
        let (_, body) = text.split_once("\r\n\r\n").unwrap();
        let rows = body.lines().map(|line| serde_json::from_str(line).unwrap());
        rows.collect()
    }
}

/// Connections one after another.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Dials {
    /// How many.
    pub made: u32,
    /// How many of them failed, or had to send something again.
    pub bad: u32,
}

/// Makes new connections to a Service until `is_over`, each of which asks and hears.
fn dial_on(number: u32, is_over: impl Fn() -> bool) -> Dials {
    let to = SocketAddr::from((frontend(number), PORT));
    let once = || -> std::io::Result<u32> {
        let mut stream = TcpStream::connect_timeout(&to, Duration::from_secs(5))?;
        stream.set_read_timeout(Some(Duration::from_secs(5)))?;
        let mut answer = [0; 4];
        stream.write_all(b"ping")?;
        stream.read_exact(&mut answer)?;
        Ok(retransmissions(&stream))
    };
    let mut dials = Dials::default();
    while !is_over() {
        dials.made += 1;
        let outcome = once();
        if !matches!(outcome, Ok(0)) {
            eprintln!("a new connection: {outcome:?} sent again");
            dials.bad += 1;
        }
        std::thread::sleep(Duration::from_millis(1));
    }
    dials
}

/// Which Service a client asks, where this executable is started again as one.
const CLIENT: &str = "XEBEC_TEST_CLIENT";
/// The test that is such a client.
const PART_CLIENT: &str = "part_client";

/// Makes connections until standard input ends, from the cgroup that the agent's hooks are at: sockets are translated.
pub fn run_client() {
    let Ok(settings) = std::env::var(CLIENT) else {
        return;
    };
    let (number, cgroup) = settings.split_once(' ').unwrap();
    std::fs::write(Path::new(cgroup).join("cgroup.procs"), "0").unwrap();
    let over = std::sync::Arc::new(std::sync::atomic::AtomicBool::new(false));
    let ended = over.clone();
    std::thread::spawn(move || {
        let _ = std::io::stdin().read(&mut [0]);
        ended.store(true, std::sync::atomic::Ordering::Relaxed);
    });
    let is_over = || over.load(std::sync::atomic::Ordering::Relaxed);
    let dials = dial_on(number.parse().unwrap(), is_over);
    println!("dials {} {}", dials.made, dials.bad);
}

/// New connections all the time, until it ends: of the pod, packet by packet, and of a process of the node, by sockets.
pub struct Dialing {
    over: std::sync::Arc<std::sync::atomic::AtomicBool>,
    pod: std::thread::JoinHandle<Dials>,
    node: Child,
}

impl Stage {
    /// To a TCP Service.
    pub fn keep_dialing(&self, number: u32) -> Dialing {
        let over = std::sync::Arc::new(std::sync::atomic::AtomicBool::new(false));
        let ended = over.clone();
        let is_over = move || ended.load(std::sync::atomic::Ordering::Relaxed);
        let pod = self
            .pod
            .run(|| std::thread::spawn(move || dial_on(number, is_over)));
        let mut command = Command::new(std::env::current_exe().unwrap());
        command
            .args([PART_CLIENT, "--exact", "--ignored", "--nocapture"])
            .env(CLIENT, format!("{number} {}", self.place.cgroup.display()))
            .stdin(Stdio::piped())
            .stdout(Stdio::piped());
        let node = self.node.run(|| command.spawn().unwrap());
        Dialing { over, pod, node }
    }
}

impl Dialing {
    /// Those of the pod and those of the node.
    pub fn end(mut self) -> [Dials; 2] {
        self.over.store(true, std::sync::atomic::Ordering::Relaxed);
        drop(self.node.stdin.take());
        let output = self.node.wait_with_output().unwrap();
        let text = String::from_utf8(output.stdout).unwrap();
        let line = text.split("dials ").nth(1);
        let line = line.and_then(|rest| rest.lines().next());
        let mut words = line.unwrap_or_else(|| panic!("{text}")).split(' ');
        let mut number = || words.next().unwrap().parse().unwrap();
        let node = Dials {
            made: number(),
            bad: number(),
        };
        [self.pod.join().unwrap(), node]
    }
}
