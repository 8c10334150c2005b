//! Direct server return between real nodes: a client, the node that it asks, and the node of the backend.
#![allow(clippy::unwrap_used, reason = "tests")]

mod space;

use std::io::{Read, Write};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::time::Duration;

use space::{Space, ip};
use xebec_agent::link;
use xebec_agent::loader::{Loaded, Maps, Xdp};
use xebec_agent::maps::ServiceKernel;
use xebec_agent::network::Device;
use xebec_dataplane_common::ip::Ip;
use xebec_dataplane_common::nat::{DIRECT_TCP, DIRECT_UDP, Settings};
use xebec_dataplane_common::service::{
    Backend, CHUNK, EXTERNAL, Frontend, FrontendKey, OTHERS, OWN, Run,
};
use xebec_policy::kernel::{Endpoint, PolicyKernel};

const PATIENCE: Duration = Duration::from_secs(3);
const NODE_PORT: u16 = 30_080;
const PORT: u16 = 8080;

/// Addresses of both families.
type Both = [&'static str; 2];
const CLIENT: Both = ["192.0.2.7", "fd00:192:0:2::7"];
const ASKED: Both = ["192.0.2.10", "fd00:192:0:2::10"];
const BACKENDS: Both = ["192.0.2.20", "fd00:192:0:2::20"];
const POD: Both = ["10.244.1.5", "fd00:10:244:1::5"];
const RANGE: Both = ["10.244.1.0/24", "fd00:10:244:1::/64"];
const OTHER_RANGE: Both = ["10.244.0.0/24", "fd00:10:244::/64"];

fn address(text: &str) -> IpAddr {
    text.parse().unwrap()
}

/// A node with its programs.
struct Node {
    space: Space,
    dir: tempfile::TempDir,
    loaded: Option<Loaded>,
    maps: Option<Maps>,
}

impl Node {
    /// One with these addresses, of which the other has those.
    fn new(own: Both, other: Both, ranges: [Both; 2]) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let mut loaded = Loaded::new(dir.path()).unwrap();
        let mut maps = loaded.maps().unwrap();
        for family in [0, 1] {
            let (own, other) = (address(own[family]), address(other[family]));
            let network = &mut maps.network;
            let of = |range: Both| range[family].parse().unwrap();
            network.set_native(own.into(), Some(own)).unwrap();
            network.set_native(other.into(), Some(other)).unwrap();
            network.set_native(of(ranges[0]), Some(own)).unwrap();
            network.set_native(of(ranges[1]), Some(other)).unwrap();
            let services = &mut maps.services;
            services.set_node_address(own, OWN).unwrap();
            services.set_node_address(other, OTHERS).unwrap();
            // One backend a family, behind a node port.
            let number = 1 + family as u32;
            let backend = Backend {
                address: address(POD[family]).into(),
                port: PORT.to_be(),
                flags: 0,
                generation: 1,
            };
            let mut chunk = [0; CHUNK];
            chunk[0] = number;
            let run = Run {
                first: number,
                count: 1,
            };
            services.set_backends(&[(number, backend)]).unwrap();
            services.set_chunks(&[(number, chunk)]).unwrap();
            for protocol in [6, 17] {
                let key = FrontendKey {
                    address: Ip::from(own).every(),
                    port: NODE_PORT.to_be(),
                    protocol,
                    pad: 0,
                };
                let value = Frontend {
                    service: 1,
                    flags: EXTERNAL,
                    affinity: 0,
                    inside: run,
                    outside: run,
                };
                services.set_frontends(&[(key, value)]).unwrap();
            }
        }
        let settings = Settings {
            node4: address(own[0]).into(),
            node6: address(own[1]).into(),
            first_port: 61_000,
            ports: 4_536,
            direct: DIRECT_TCP | DIRECT_UDP,
            ..Settings::default()
        };
        maps.network.set_settings(settings).unwrap();
        Self {
            space: Space::new(),
            dir,
            loaded: Some(loaded),
            maps: Some(maps),
        }
    }

    /// Attaches the hooks of the device that leads to the others.
    fn attach(&mut self) {
        let loaded = self.loaded.as_mut().unwrap();
        self.space.run(|| {
            let device = Device {
                name: "eth0".into(),
                index: nix::net::if_::if_nametoindex("eth0").unwrap(),
                bus: None,
            };
            space::block_on(loaded.attach_network(&[device], Xdp::Off)).unwrap();
        });
    }

    fn translated(&self) -> u64 {
        self.maps
            .as_ref()
            .unwrap()
            .flows
            .count()
            .unwrap()
            .translated
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        self.maps = None;
        self.loaded = None;
        let _ = nix::mount::umount2(self.dir.path(), nix::mount::MntFlags::MNT_DETACH);
    }
}

/// Connects a namespace to the network that all share.
fn connect(lan: &Space, space: &Space, name: &str, mac: u8, addresses: Both) {
    let path = space.path();
    lan.run(|| {
        ip(&format!(
            "link add {name} type veth peer name eth0 address 02:00:00:00:09:{mac:02x} netns {}",
            path.display()
        ));
        ip(&format!("link set {name} master lan up"));
    });
    space.run(|| {
        ip("link set lo up");
        ip(&format!("addr add {}/24 dev eth0", addresses[0]));
        ip(&format!("-6 addr add {}/64 dev eth0 nodad", addresses[1]));
        ip("link set eth0 up");
        for file in ["ipv4/ip_forward", "ipv6/conf/all/forwarding"] {
            std::fs::write(format!("/proc/sys/net/{file}"), "1").unwrap();
        }
    });
}

/// Who asked is told, and all that came comes back.
fn echo(listener: &TcpListener, length: usize) -> IpAddr {
    let (mut stream, peer) = listener.accept().unwrap();
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    let mut data = vec![0; length];
    stream.read_exact(&mut data).unwrap();
    stream.write_all(&data).unwrap();
    peer.ip()
}

#[test]
fn answers_go_straight_to_the_client() {
    if !nix::unistd::geteuid().is_root() || !Loaded::built_in() {
        eprintln!("left out: this test needs root, and an agent built by `cargo xtask`");
        return;
    }
    let (lan, client, pod) = (Space::new(), Space::new(), Space::new());
    lan.run(|| ip("link add lan type bridge"));
    lan.run(|| ip("link set lan up"));
    let mut asked = Node::new(ASKED, BACKENDS, [OTHER_RANGE, RANGE]);
    let mut backends = Node::new(BACKENDS, ASKED, [RANGE, OTHER_RANGE]);
    connect(&lan, &client, "client", 7, CLIENT);
    connect(&lan, &asked.space, "asked", 0x10, ASKED);
    connect(&lan, &backends.space, "backends", 0x20, BACKENDS);
    let wires = backends.space.run(|| {
        space::block_on(async {
            let handle = link::handle().unwrap();
            let own = POD.map(address);
            link::connect(&handle, "pod0", &pod.path(), "eth0", &own, None)
                .await
                .unwrap()
        })
    });
    let maps = backends.maps.as_mut().unwrap();
    for own in POD.map(address) {
        let endpoint = Endpoint {
            ifindex: wires.ifindex,
            identity: 1000,
            mac: wires.mac,
            ..Endpoint::default()
        };
        maps.policy.set_identity(own, 1000).unwrap();
        maps.policy.set_endpoint(own, endpoint).unwrap();
    }
    let loaded = backends.loaded.as_mut().unwrap();
    backends.space.run(|| loaded.attach_pod("pod0").unwrap());
    asked.attach();
    backends.attach();
    asked.space.run(|| {
        for (range, node) in RANGE.into_iter().zip(BACKENDS) {
            ip(&format!("route add {range} via {node}"));
        }
        // An answer that came this way would go nowhere.
        ip(&format!("route add blackhole {}/32", CLIENT[0]));
        ip(&format!("-6 route add blackhole {}/128", CLIENT[1]));
    });
    client.run(|| {
        for node in ASKED {
            ip(&format!(
                "neigh replace {node} dev eth0 lladdr 02:00:00:00:09:10 nud permanent"
            ));
        }
    });
    for family in [0, 1] {
        let to: SocketAddr = (address(ASKED[family]), NODE_PORT).into();
        let listener = pod.run(|| TcpListener::bind((address(POD[family]), PORT)).unwrap());
        // More than a packet holds: it finds out what fits on the way.
        let data: Vec<u8> = (0..300_000_u32)
            .map(|number| (number % 251) as u8)
            .collect();
        std::thread::scope(|scope| {
            let heard = scope.spawn(|| echo(&listener, data.len()));
            let said = client.run(|| {
                let mut stream = TcpStream::connect_timeout(&to, PATIENCE)?;
                stream.set_read_timeout(Some(PATIENCE))?;
                let mut writer = stream.try_clone()?;
                let sent = data.clone();
                let writer = std::thread::spawn(move || writer.write_all(&sent));
                let mut back = vec![0; data.len()];
                stream.read_exact(&mut back)?;
                writer.join().unwrap()?;
                Ok::<_, std::io::Error>(back)
            });
            if said.is_err() {
                // Who still listens must not wait for ever.
                let _ = pod.run(|| TcpStream::connect(listener.local_addr().unwrap()));
            }
            assert!(said.unwrap() == data, "what came back is what was sent");
            assert_eq!(
                heard.join().unwrap(),
                address(CLIENT[family]),
                "the client's own"
            );
        });
        let server = pod.run(|| UdpSocket::bind((address(POD[family]), PORT)).unwrap());
        server.set_read_timeout(Some(PATIENCE)).unwrap();
        let socket = client.run(|| UdpSocket::bind((address(CLIENT[family]), 0)).unwrap());
        socket
            .set_read_timeout(Some(Duration::from_millis(500)))
            .unwrap();
        socket.connect(to).unwrap();
        // A short one, and one that fits the client's device but not the way between the nodes: after the first was
        // refused the client's kernel sends it in fragments.
        for length in [10, 1440] {
            let data = vec![length as u8; length];
            let mut room = vec![0; 2000];
            let mut answered = false;
            for _ in 0..4 {
                // The kernel may tell of what did not fit.
                if socket.send(&data).is_err() {
                    continue;
                }
                server
                    .set_read_timeout(Some(Duration::from_millis(500)))
                    .unwrap();
                let Ok((got, peer)) = server.recv_from(&mut room) else {
                    continue;
                };
                assert_eq!(peer.ip(), address(CLIENT[family]));
                server.send_to(&room[..got], peer).unwrap();
                let got = socket.recv(&mut room).unwrap();
                assert_eq!(room[..got], data);
                answered = true;
                break;
            }
            assert!(answered, "{to} {length}");
        }
        // Nobody listens at the pod any more: the client is told by the other node's port.
        drop(server);
        socket.send(b"anybody?").unwrap();
        let error = socket.recv(&mut [0; 9]).unwrap_err();
        assert_eq!(error.kind(), std::io::ErrorKind::ConnectionRefused);
    }
    assert!(asked.translated() > 8 && backends.translated() > 8);
}
