//! Attaching tc's hooks, with and without tcx: packets between namespaces, replacing the programs under them, and
//! what is left afterwards.
#![allow(clippy::unwrap_used, reason = "tests")]

mod space;

use std::net::{Ipv4Addr, UdpSocket};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use space::{Space, filters, has_qdisc, ip};
use xebec_agent::link::{self, Wires};
use xebec_agent::loader::{self, Loaded, Maps, Xdp};
use xebec_agent::maps::ServiceKernel;
use xebec_agent::network::Device;
use xebec_dataplane_common::ip::Ip;
use xebec_dataplane_common::nat::Settings;
use xebec_dataplane_common::service::{Backend, CHUNK, EXTERNAL, Frontend, FrontendKey, OWN, Run};
use xebec_policy::kernel::{Endpoint, PolicyKernel};

const POD: Ipv4Addr = Ipv4Addr::new(10, 244, 0, 5);
const WEB: Ipv4Addr = Ipv4Addr::new(10, 244, 0, 6);
const NODE: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 10);
const PORT: u16 = 9000;

/// A node with two pods, whose stack forwards nothing: what goes from one pod to the other, a program handed over.
struct Node {
    dir: tempfile::TempDir,
    pods: [Space; 2],
    wires: [Wires; 2],
}

const DEVICES: [&str; 2] = ["pod0", "pod1"];

impl Node {
    /// Runs a test in a network namespace of its own.
    fn with(test: impl FnOnce(&Self) + Send) {
        if !nix::unistd::geteuid().is_root() || !Loaded::built_in() {
            eprintln!("left out: this test needs root, and an agent built by `cargo xtask`");
            return;
        }
        Space::new().run(|| {
            ip("link set lo up");
            ip("addr add 192.0.2.10/32 dev lo");
            let pods = [Space::new(), Space::new()];
            let addresses = [POD, WEB];
            let wires = [0, 1].map(|index| {
                space::block_on(async {
                    let handle = link::handle().unwrap();
                    let (device, netns) = (DEVICES[index], pods[index].path());
                    let address = [addresses[index].into()];
                    link::connect(&handle, device, &netns, "eth0", &address, None)
                        .await
                        .unwrap()
                })
            });
            std::fs::write("/proc/sys/net/ipv4/ip_forward", "0").unwrap();
            let dir = tempfile::tempdir().unwrap();
            let node = Self { dir, pods, wires };
            test(&node);
        });
    }

    /// An agent with its programs, attached to nothing yet.
    fn agent(&self) -> (Loaded, Maps) {
        let mut loaded = Loaded::new(self.dir.path()).unwrap();
        let mut maps = loaded.maps().unwrap();
        for (address, wires) in [(POD, self.wires[0]), (WEB, self.wires[1])] {
            maps.policy.set_identity(address.into(), 1000).unwrap();
            maps.policy
                .set_endpoint(address.into(), endpoint(wires))
                .unwrap();
        }
        (loaded, maps)
    }

    fn attach(loaded: &mut Loaded) {
        for device in DEVICES {
            loaded.attach_pod(device).unwrap();
        }
    }

    /// A socket of each pod, the first connected to the second.
    fn sockets(&self) -> (UdpSocket, UdpSocket) {
        let to = self.pods[1].run(|| space::socket(WEB, PORT));
        let from = self.pods[0].run(|| space::socket(POD, 0));
        from.connect((WEB, PORT)).unwrap();
        (from, to)
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        let _ = nix::mount::umount2(self.dir.path(), nix::mount::MntFlags::MNT_DETACH);
    }
}

fn endpoint(wires: Wires) -> Endpoint {
    Endpoint {
        ifindex: wires.ifindex,
        identity: 1000,
        mac: wires.mac,
        ..Endpoint::default()
    }
}

/// Whether a datagram arrives.
fn arrives(from: &UdpSocket, to: &UdpSocket, words: &[u8]) -> bool {
    let mut buffer = [0; 64];
    from.send(words).unwrap();
    to.recv(&mut buffer)
        .is_ok_and(|length| &buffer[..length] == words)
}

/// Numbered datagrams go from one socket to the other while something is done; says how many were sent and which
/// of them were not received.
fn lost_during(from: &UdpSocket, to: &UdpSocket, done: impl FnOnce()) -> (u32, Vec<u32>) {
    let end = AtomicBool::new(false);
    let mut received = Vec::new();
    let sent = std::thread::scope(|scope| {
        let sender = scope.spawn(|| {
            let mut number = 0_u32;
            while !end.load(Ordering::Relaxed) {
                from.send(&number.to_ne_bytes()).unwrap();
                number += 1;
                // Slowly enough for the receiver's buffer.
                std::thread::sleep(Duration::from_micros(100));
            }
            number
        });
        let receiver = scope.spawn(|| {
            let mut numbers = Vec::new();
            let mut buffer = [0; 4];
            // It ends when nothing has come for as long as a socket waits.
            while to.recv(&mut buffer).is_ok() {
                numbers.push(u32::from_ne_bytes(buffer));
            }
            numbers
        });
        done();
        end.store(true, Ordering::Relaxed);
        received = receiver.join().unwrap();
        sender.join().unwrap()
    });
    received.sort_unstable();
    let lost = (0..sent).filter(|number| received.binary_search(number).is_err());
    (sent, lost.collect())
}

#[test]
fn filters_judge_packets_and_are_replaced_in_place() {
    Node::with(|node| {
        let (mut first, mut maps) = node.agent();
        first.use_filters();
        let (from, to) = node.sockets();
        assert!(!arrives(&from, &to, b"nobody hands it over"));
        Node::attach(&mut first);
        assert_eq!(first.uses_filters(), Some(true));
        assert!(arrives(&from, &to, b"handed over"));
        assert!(arrives_from_node(&to), "egress filter lets the node in");
        maps.policy.remove_endpoint(WEB.into()).unwrap();
        assert!(!arrives(&from, &to, b"to a pod that is unknown"));
        assert!(!arrives_from_node(&to), "egress filter drops");
        let wires = endpoint(node.wires[1]);
        maps.policy.set_endpoint(WEB.into(), wires).unwrap();
        // Two agents after one another, many times.
        let (mut second, _maps) = node.agent();
        second.use_filters();
        let (sent, lost) = lost_during(&from, &to, || {
            let since = Instant::now();
            let mut times = 0;
            while times < 100 || since.elapsed() < Duration::from_secs(1) {
                Node::attach(&mut second);
                Node::attach(&mut first);
                times += 1;
            }
            // The last one is the second, and nothing holds the first any more.
            Node::attach(&mut second);
            drop(first);
        });
        assert!(sent > 100, "{sent}");
        assert_eq!(lost, Vec::<u32>::new(), "of {sent}");
        for device in DEVICES {
            assert_eq!(filters(device), [1, 1], "{device}");
        }
        // They outlive the agent.
        drop(second);
        assert!(arrives(&from, &to, b"without an agent"));
        // A pod that goes.
        loader::forget_pod(node.dir.path(), DEVICES[0]).unwrap();
        assert_eq!(filters(DEVICES[0]), [0, 0]);
        loader::forget_pod(node.dir.path(), "gone").unwrap();
    });
}

/// Whether the node itself reaches the pod, through its stack.
fn arrives_from_node(to: &UdpSocket) -> bool {
    let from = UdpSocket::bind("0.0.0.0:0").unwrap();
    from.connect((WEB, PORT)).unwrap();
    arrives(&from, to, b"from the node")
}

/// Another agent's path is another filter's number, and qdiscs of others stay.
#[test]
fn what_is_ours_alone_is_removed() {
    Node::with(|node| {
        let (mut loaded, _maps) = node.agent();
        loaded.use_filters();
        // Someone else made this one.
        aya::programs::tc::qdisc_add_clsact(DEVICES[1]).unwrap();
        Node::attach(&mut loaded);
        let other = tempfile::tempdir().unwrap();
        let mut others = Loaded::new(other.path()).unwrap();
        others.use_filters();
        others.attach_pod(DEVICES[0]).unwrap();
        assert_eq!(filters(DEVICES[0]), [2, 2]);
        loader::detach(node.dir.path()).unwrap();
        assert_eq!(filters(DEVICES[0]), [1, 1]);
        assert_eq!(filters(DEVICES[1]), [0, 0]);
        assert!(has_qdisc(DEVICES[0]), "the other's filters need it");
        assert!(has_qdisc(DEVICES[1]), "it was not ours");
        loader::detach(other.path()).unwrap();
        assert_eq!(filters(DEVICES[0]), [0, 0]);
        // Who made it left it to the other; with only one of them it goes.
        loaded.attach_pod(DEVICES[0]).unwrap();
        loader::detach(node.dir.path()).unwrap();
        loader::detach(node.dir.path()).unwrap();
        nix::mount::umount2(other.path(), nix::mount::MntFlags::MNT_DETACH).unwrap();
    });
}

#[test]
fn a_qdisc_that_was_made_for_filters_goes_with_them() {
    Node::with(|node| {
        let (mut loaded, _maps) = node.agent();
        loaded.use_filters();
        Node::attach(&mut loaded);
        assert!(DEVICES.iter().all(|device| has_qdisc(device)));
        loader::detach(node.dir.path()).unwrap();
        assert!(!DEVICES.iter().any(|device| has_qdisc(device)));
    });
}

/// Left to itself, an agent takes what the kernel has; one that is told otherwise, and the next one, change the way
/// without a packet that nobody judges.
#[test]
fn the_way_of_attaching_is_found_and_can_change() {
    Node::with(|node| {
        let (mut first, _first_maps) = node.agent();
        Node::attach(&mut first);
        let (from, to) = node.sockets();
        assert!(arrives(&from, &to, b"attached in some way"));
        let kernel = nix::sys::utsname::uname().unwrap();
        let release = kernel.release().to_string_lossy().into_owned();
        let numbers: Vec<u32> = release
            .split(['.', '-', '+'])
            .map_while(|number| number.parse().ok())
            .collect();
        let old = (numbers[0], numbers[1]) < (6, 6);
        assert_eq!(first.uses_filters(), Some(old), "{release}");
        let expected = if old { [1, 1] } else { [0, 0] };
        assert_eq!(filters(DEVICES[0]), expected);
        let (mut second, _second_maps) = node.agent();
        second.use_filters();
        let (mut third, _third_maps) = node.agent();
        let (sent, lost) = lost_during(&from, &to, || {
            Node::attach(&mut second);
            assert_eq!(filters(DEVICES[0]), [1, 1]);
            Node::attach(&mut third);
        });
        assert_eq!(filters(DEVICES[0]), expected);
        assert_eq!(lost, Vec::<u32>::new(), "of {sent}");
        assert!(arrives(&from, &to, b"after all of them"));
    });
}

/// A node port whose backend is on another node: the packet is sent on by `bpf_redirect_neigh`, and so is the answer.
#[test]
fn a_networks_filters_send_on_and_are_let_go() {
    Node::with(|node| {
        let (mut loaded, mut maps) = node.agent();
        loaded.use_filters();
        let outside = Space::new();
        ip("link add net type veth peer name far");
        ip(&format!("link set far netns {}", outside.path().display()));
        ip("addr add 192.0.2.10/24 dev net");
        ip("link set net up");
        let (client, backend) = outside.run(|| {
            ip("addr add 192.0.2.20/24 dev far");
            ip("addr add 198.51.100.7/32 dev far");
            ip("addr add 10.244.1.9/32 dev far");
            ip("link set far up");
            let backend = space::socket(Ipv4Addr::new(10, 244, 1, 9), 80);
            (space::socket(Ipv4Addr::new(198, 51, 100, 7), 0), backend)
        });
        for block in ["198.51.100.0/24", "10.244.1.0/24"] {
            ip(&format!("route add {block} via 192.0.2.20"));
        }
        for block in [
            "10.244.0.0/24",
            "10.244.1.0/24",
            "192.0.2.10/32",
            "192.0.2.20/32",
        ] {
            maps.network
                .set_native(block.parse().unwrap(), None)
                .unwrap();
        }
        maps.network
            .set_settings(Settings {
                node4: NODE.into(),
                first_port: 61_000,
                ports: 4_536,
                ..Settings::default()
            })
            .unwrap();
        let backend_of = Backend {
            address: Ipv4Addr::new(10, 244, 1, 9).into(),
            port: 80_u16.to_be(),
            flags: 0,
            generation: 1,
        };
        let mut chunk = [0; CHUNK];
        chunk[0] = 1;
        let run = Run { first: 1, count: 1 };
        let key = FrontendKey {
            address: Ip::EVERY_V4,
            port: 30_080_u16.to_be(),
            protocol: 17,
            pad: 0,
        };
        let value = Frontend {
            service: 1,
            flags: EXTERNAL,
            affinity: 0,
            inside: run,
            outside: run,
        };
        let services = &mut maps.services;
        services.set_backends(&[(1, backend_of)]).unwrap();
        services.set_chunks(&[(1, chunk)]).unwrap();
        services.set_node_address(NODE.into(), OWN).unwrap();
        services.set_frontends(&[(key, value)]).unwrap();
        // Programs redirect only where the stack may forward.
        std::fs::write("/proc/sys/net/ipv4/ip_forward", "1").unwrap();
        let device = Device {
            name: "net".into(),
            index: nix::net::if_::if_nametoindex("net").unwrap(),
            bus: None,
        };
        let by = space::block_on(loaded.attach_network(&[device], Xdp::Off)).unwrap();
        assert_eq!(by.len(), 1);
        assert_eq!(filters("net"), [1, 1]);
        client.connect((NODE, 30_080)).unwrap();
        let mut buffer = [0; 64];
        client.send(b"question").unwrap();
        let (length, peer) = backend.recv_from(&mut buffer).unwrap();
        assert_eq!(&buffer[..length], b"question");
        assert_eq!(peer.ip(), NODE, "it bears the node's address");
        backend.send_to(b"answer", peer).unwrap();
        let length = client.recv(&mut buffer).unwrap();
        assert_eq!(&buffer[..length], b"answer");
        space::block_on(loaded.attach_network(&[], Xdp::Off)).unwrap();
        assert_eq!(filters("net"), [0, 0]);
    });
}
