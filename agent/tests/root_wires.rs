//! Pods of both families on wires that the kernel's own stack forwards: made, spoken over both ways, taken away.
#![allow(clippy::unwrap_used, reason = "tests")]

mod namespaces;

use std::io::{Read, Write};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream};
use std::time::Duration;

use namespaces::Namespace;
use serde_json::{Value, json};
use xebec_agent::endpoints::Endpoints;
use xebec_agent::{forwarding, link};

const PATIENCE: Duration = Duration::from_secs(10);
/// The node's addresses.
const NODE: [&str; 2] = ["192.0.2.9", "fd00:98::9"];
/// The first device of every namespace.
const LOOPBACK: u32 = 1;

/// A node without a dataplane, and pods that are connected to it.
struct Node {
    namespace: Namespace,
    ranges: Vec<ipnet::IpNet>,
    records: tempfile::TempDir,
}

impl Node {
    fn new(ranges: &[&str]) -> Self {
        let namespace = Namespace::new();
        let ranges: Vec<ipnet::IpNet> = ranges.iter().map(|one| one.parse().unwrap()).collect();
        let has = |v4: bool| ranges.iter().any(|one| one.addr().is_ipv4() == v4);
        namespace.within(|| forwarding::turn_on(has(true), has(false)).unwrap());
        namespace.block_on(async || {
            let handle = link::handle().unwrap();
            let up = rtnetlink::LinkUnspec::new_with_index(LOOPBACK).up().build();
            handle.link().set(up).execute().await.unwrap();
            // One that is more like the pods' than the node's own is no reason to speak from it.
            for address in NODE.into_iter().chain(["fd00:99:0:1::9"]) {
                let net = ipnet::IpNet::from(address.parse::<IpAddr>().unwrap());
                let add = handle.address().add(LOOPBACK, net.addr(), net.prefix_len());
                add.execute().await.unwrap();
            }
        });
        Self {
            namespace,
            ranges,
            records: tempfile::tempdir().unwrap(),
        }
    }

    /// What a fresh agent of this node does.
    fn with<T: Send>(&self, work: impl AsyncFnOnce(&Endpoints) -> T + Send) -> T {
        self.namespace.block_on(async || {
            let own = NODE.map(|ip| ip.parse::<IpAddr>().unwrap());
            let endpoints = Endpoints::open(self.records.path(), &self.ranges, &own, None).unwrap();
            work(&endpoints).await
        })
    }

    fn ask(&self, command: &str, name: &str, pod: &Namespace, config: Value) -> Value {
        let request = json!({
            "command": command, "containerID": name, "netns": pod.path(), "ifname": "eth0",
            "args": format!("K8S_POD_NAMESPACE=default;K8S_POD_NAME={name}"), "config": config,
        });
        self.with(async |endpoints| endpoints.cni(&request).await.unwrap())
    }

    /// Connects a pod; its addresses.
    fn add(&self, name: &str, pod: &Namespace) -> Vec<IpAddr> {
        let result = self.ask("ADD", name, pod, json!({"cniVersion": "1.1.0"}));
        let ips = result["ips"].as_array().unwrap().iter();
        ips.map(|ip| {
            let net: ipnet::IpNet = ip["address"].as_str().unwrap().parse().unwrap();
            assert_eq!(net.prefix_len(), net.max_prefix_len());
            net.addr()
        })
        .collect()
    }
}

/// One byte there and back; who spoke is told by the one who heard.
fn speak(from: &Namespace, to: &Namespace, address: IpAddr) -> IpAddr {
    let listener = to.within(|| TcpListener::bind((address, 0)).unwrap());
    let at: SocketAddr = listener.local_addr().unwrap();
    std::thread::scope(|scope| {
        let heard = scope.spawn(|| {
            let (mut stream, peer) = listener.accept().unwrap();
            let mut byte = [0];
            stream.read_exact(&mut byte).unwrap();
            stream.write_all(&byte).unwrap();
            peer.ip()
        });
        let said = from.within(|| {
            let mut stream = TcpStream::connect_timeout(&at, PATIENCE)?;
            stream.set_read_timeout(Some(PATIENCE))?;
            stream.write_all(&[7])?;
            let mut byte = [0];
            stream.read_exact(&mut byte)?;
            Ok::<_, std::io::Error>(byte)
        });
        if let Err(error) = &said {
            // The one who still listens must not wait for ever.
            let _ = to.within(|| TcpStream::connect(at));
            panic!("{at}: {error}");
        }
        assert_eq!(said.unwrap(), [7]);
        heard.join().unwrap()
    })
}

/// Lines of a file of /proc/net that name a device of a pod.
fn left(namespace: &Namespace, file: &str) -> Vec<String> {
    let text =
        namespace.within(|| std::fs::read_to_string(format!("/proc/thread-self/net/{file}")));
    let lines = text.unwrap();
    let of_pods = lines.lines().filter(|line| line.contains("xbc"));
    of_pods.map(str::to_owned).collect()
}

fn wire_speak_and_remove(ranges: &[&str]) {
    if namespaces::left_out() {
        return;
    }
    let node = Node::new(ranges);
    let (one, two) = (Namespace::new(), Namespace::new());
    let (ips, others) = (node.add("one", &one), node.add("two", &two));
    assert_eq!((ips.len(), others.len()), (ranges.len(), ranges.len()));
    for ((ip, other), range) in ips.iter().zip(&others).zip(&node.ranges) {
        assert!(range.contains(ip) && range.contains(other) && ip != other);
        assert_eq!(speak(&one, &two, *other), *ip);
        assert_eq!(speak(&two, &one, *ip), *other);
        let source = speak(&node.namespace, &one, *ip).to_string();
        assert!(
            NODE.contains(&source.as_str()),
            "the node spoke from {source}"
        );
    }
    // What an agent finds after its start is what the one before it has made.
    let again = node.ask("CHECK", "one", &one, json!({}));
    assert_eq!(again, Value::Null);
    for (name, pod) in [("one", &one), ("two", &two)] {
        node.ask("DEL", name, pod, json!({}));
    }
    for file in ["dev", "route", "if_inet6", "ipv6_route"] {
        assert_eq!(left(&node.namespace, file), Vec::<String>::new(), "{file}");
    }
    assert!(node.with(async |endpoints| endpoints.list().await.is_empty()));
}

#[test]
fn pods_of_both_families() {
    wire_speak_and_remove(&["10.99.0.0/24", "fd00:99::/64"]);
}

#[test]
fn pods_of_ipv6_first() {
    wire_speak_and_remove(&["fd00:99::/64", "10.99.0.0/24"]);
}

#[test]
fn pods_of_ipv6_alone() {
    wire_speak_and_remove(&["fd00:99::/64"]);
}

#[test]
fn pods_of_ipv4_alone() {
    wire_speak_and_remove(&["10.99.0.0/24"]);
}

/// An address that must be asked around for first is of no use for a second or two: none of a pod's is.
#[test]
fn addresses_are_usable_at_once() {
    if namespaces::left_out() {
        return;
    }
    let node = Node::new(&["fd00:99::/64"]);
    let pod = Namespace::new();
    let own = node.add("one", &pod);
    let flags = |namespace: &Namespace| -> Vec<(String, u8)> {
        let text = namespace.within(|| std::fs::read_to_string("/proc/thread-self/net/if_inet6"));
        let text = text.unwrap();
        let words =
            |line: &str| -> Vec<String> { line.split_whitespace().map(str::to_owned).collect() };
        let of_line =
            |line: Vec<String>| (line[0].clone(), u8::from_str_radix(&line[4], 16).unwrap());
        text.lines().map(words).map(of_line).collect()
    };
    const TENTATIVE: u8 = 0x40;
    const NO_DAD: u8 = 0x02;
    let hex = |ip: IpAddr| match ip {
        IpAddr::V6(ip) => format!("{:032x}", u128::from(ip)),
        IpAddr::V4(_) => unreachable!("an IPv6 range"),
    };
    let (inside, outside) = (flags(&pod), flags(&node.namespace));
    for (address, flags) in inside.iter().chain(&outside) {
        assert_eq!(flags & TENTATIVE, 0, "{address}");
    }
    for (all, address) in [(&inside, own[0]), (&outside, "fe80::1".parse().unwrap())] {
        let found = all.iter().find(|one| one.0 == hex(address));
        let flags = found
            .unwrap_or_else(|| panic!("{address} is not there: {all:?}"))
            .1;
        assert_ne!(flags & NO_DAD, 0);
    }
}

/// Ports of the node are told of while their pod is there, by an agent that starts meanwhile, too.
#[test]
fn ports_of_the_node_come_and_go_with_their_pod() {
    if namespaces::left_out() {
        return;
    }
    let node = Node::new(&["10.99.0.0/24", "fd00:99::/64"]);
    let pod = Namespace::new();
    let config = json!({"runtimeConfig": {"portMappings": [
        {"hostPort": 8080, "containerPort": 80, "protocol": "tcp", "hostIP": ""},
    ]}});
    let request = |command: &str| {
        json!({
            "command": command, "containerID": "one", "netns": pod.path(), "ifname": "eth0", "config": config,
        })
    };
    let seen = node.with(async |endpoints| {
        let mut ports = endpoints.host_ports();
        assert!(ports.borrow_and_update().is_empty());
        endpoints.cni(&request("ADD")).await.unwrap();
        assert!(ports.has_changed().unwrap());
        ports.borrow_and_update().clone()
    });
    let pods: Vec<IpAddr> = seen.iter().map(|port| port.pod_ip).collect();
    assert_eq!(
        pods,
        ["10.99.0.1", "fd00:99::1"].map(|ip| ip.parse::<IpAddr>().unwrap())
    );
    let expected = |port: &xebec_agent::host_ports::HostPort| {
        (
            port.protocol,
            port.host_ip,
            port.host_port,
            port.container_port,
        )
    };
    assert!(
        seen.iter()
            .all(|port| expected(port) == (6, None, 8080, 80))
    );
    node.with(async |endpoints| {
        let mut ports = endpoints.host_ports();
        assert_eq!(*ports.borrow_and_update(), seen);
        endpoints.cni(&request("DEL")).await.unwrap();
        assert!(ports.borrow_and_update().is_empty());
    });
}

/// A pod that can't be connected leaves no device and no address behind.
#[test]
fn what_fails_leaves_nothing() {
    if namespaces::left_out() {
        return;
    }
    let node = Node::new(&["10.99.0.0/24", "fd00:99::/64"]);
    let request = json!({
        "command": "ADD", "containerID": "one", "netns": "/nonexistent", "ifname": "eth0", "config": {},
    });
    let error = node.with(async |endpoints| endpoints.cni(&request).await.unwrap_err());
    assert!(error.message.contains("/nonexistent"), "{}", error.message);
    assert_eq!(left(&node.namespace, "dev"), Vec::<String>::new());
    let pod = Namespace::new();
    // A freed address comes last.
    assert_eq!(node.add("two", &pod).len(), 2);
    let bad = json!({"runtimeConfig": {"portMappings": [{"hostPort": 99999, "containerPort": 1}]}});
    let request = json!({
        "command": "ADD", "containerID": "three", "netns": pod.path(), "ifname": "eth1", "config": bad,
    });
    let error = node.with(async |endpoints| endpoints.cni(&request).await.unwrap_err());
    assert_eq!(error.code, 7);
    let found = node.namespace.block_on(async || {
        let handle = link::handle().unwrap();
        let name = xebec_agent::endpoints::device_name("three/eth1");
        link::find(&handle, &name).await.unwrap()
    });
    assert!(found.is_none());
}
