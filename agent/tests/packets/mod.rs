//! Building packets, and a kernel with the programs and a few pods to run them.

mod both;
mod errors;
mod express;
mod fragments;
mod ports;
mod refuse;
mod sctp;
mod wires;

use std::net::Ipv4Addr;

use aya::TestRun;
use aya::maps::MapData;
use aya::programs::TestRunOptions;
use etherparse::{
    EtherType, Ethernet2Header, IpFragOffset, IpNumber, Ipv4Header, Ipv4Options, PacketHeaders,
    TcpHeader, TransportHeader, UdpHeader,
};
use xebec_agent::loader::{By, Loaded, Maps, Xdp};
use xebec_agent::maps::{PolicyKernel, PolicyMaps, ServiceKernel};
use xebec_agent::network::Device;
use xebec_dataplane_common::LAYOUT;
use xebec_dataplane_common::flow::{Event, Flow, TURN_NONE};
use xebec_dataplane_common::ip::Ip;
use xebec_dataplane_common::nat::Settings;
use xebec_dataplane_common::policy::{
    Endpoint, NO_SHAPE, RuleKey, SHAPE_PROTOCOL, SHAPES, Set, port_bits,
};
use xebec_dataplane_common::service::{
    Backend, CHUNK, EXTERNAL, Frontend, FrontendKey, OWN as OWN_ADDRESS, Run,
};

/// Whether to leave a test out: `cargo xtask test` builds the programs and runs these tests as root.
pub fn left_out() -> bool {
    if nix::unistd::geteuid().is_root() && Loaded::built_in() {
        return false;
    }
    eprintln!("left out: this test needs root, and an agent built by `cargo xtask`");
    true
}

/// `TC_ACT_OK`.
pub const OK: u32 = 0;
/// `TC_ACT_SHOT`.
pub const SHOT: u32 = 2;
/// `TC_ACT_REDIRECT`.
pub const REDIRECT: u32 = 7;

/// `XDP_PASS`.
pub const PASS: u32 = 2;
/// `XDP_TX`.
pub const TX: u32 = 3;
/// `XDP_REDIRECT`.
pub const SENT_ON: u32 = 4;

/// A pod's hardware address.
pub const POD_MAC: [u8; 6] = [2, 0, 0, 0, 0, 9];

/// A pod of this node.
pub fn pod() -> Ipv4Addr {
    Ipv4Addr::new(10, 244, 0, 5)
}

/// Another.
pub fn web() -> Ipv4Addr {
    Ipv4Addr::new(10, 244, 0, 6)
}

/// This node.
pub fn node() -> Ipv4Addr {
    Ipv4Addr::new(192, 0, 2, 10)
}

/// Someone outside.
pub fn client() -> Ipv4Addr {
    Ipv4Addr::new(198, 51, 100, 7)
}

/// What a packet carries.
#[derive(Clone, Debug, PartialEq)]
enum Transport {
    Tcp(String),
    Udp,
    Icmp { kind: u8, code: u8, body: Vec<u8> },
}

/// A packet before it becomes bytes, with right checksums.
#[derive(Clone, Debug, PartialEq)]
pub struct Packet {
    pub mac_source: [u8; 6],
    pub mac_destination: [u8; 6],
    pub source: Ipv4Addr,
    pub destination: Ipv4Addr,
    pub source_port: u16,
    pub destination_port: u16,
    pub ttl: u8,
    /// IPv4 options, in multiples of four bytes.
    pub options: Vec<u8>,
    /// A UDP checksum of 0.
    pub no_checksum: bool,
    transport: Transport,
    /// Identification, offset in bytes, more fragments.
    fragment: Option<(u16, u16, bool)>,
}

fn packet(
    source: Ipv4Addr,
    destination: Ipv4Addr,
    ports: (u16, u16),
    transport: Transport,
) -> Packet {
    Packet {
        mac_source: [2, 0, 0, 0, 0, 1],
        mac_destination: [2, 0, 0, 0, 0, 2],
        source,
        destination,
        source_port: ports.0,
        destination_port: ports.1,
        ttl: 64,
        options: Vec::new(),
        no_checksum: false,
        transport,
        fragment: None,
    }
}

/// A TCP segment with flags such as "SA".
pub fn tcp(source: Ipv4Addr, destination: Ipv4Addr, from: u16, to: u16, flags: &str) -> Packet {
    packet(
        source,
        destination,
        (from, to),
        Transport::Tcp(flags.into()),
    )
}

/// A UDP datagram.
pub fn udp(source: Ipv4Addr, destination: Ipv4Addr, from: u16, to: u16) -> Packet {
    packet(source, destination, (from, to), Transport::Udp)
}

/// An ICMP message. `body` follows type, code and checksum; of errors it is what they quote, after four bytes of 0.
pub fn icmp(source: Ipv4Addr, destination: Ipv4Addr, kind: u8, code: u8, body: &[u8]) -> Packet {
    let body = if matches!(kind, 3 | 11 | 12) {
        [&[0; 4], body].concat()
    } else {
        body.to_vec()
    };
    packet(
        source,
        destination,
        (0, 0),
        Transport::Icmp { kind, code, body },
    )
}

const PAYLOAD: &[u8] = b"what the packet carries must stay";

impl Packet {
    /// Makes it a fragment: identification, offset in bytes, whether more follow.
    pub fn fragment(&mut self, id: u16, offset: u16, more: bool) {
        self.fragment = Some((id, offset, more));
    }

    /// Also ICMP's identifier.
    pub fn set_source_port(&mut self, port: u16) {
        self.source_port = port;
        if let Transport::Icmp { body, .. } = &mut self.transport {
            body[..2].copy_from_slice(&port.to_be_bytes());
        }
    }

    /// What the other end says to it.
    pub fn answer(&self) -> Self {
        let mut answer = self.clone();
        (answer.source, answer.destination) = (self.destination, self.source);
        (answer.source_port, answer.destination_port) = (self.destination_port, self.source_port);
        match &mut answer.transport {
            Transport::Tcp(flags) => *flags = "SA".into(),
            Transport::Icmp { kind, .. } => *kind = 0,
            Transport::Udp => {}
        }
        answer
    }

    fn transport_bytes(&self, ip: &Ipv4Header) -> Vec<u8> {
        match &self.transport {
            Transport::Tcp(flags) => {
                let mut header = TcpHeader::new(self.source_port, self.destination_port, 7, 8192);
                header.syn = flags.contains('S');
                header.ack = flags.contains('A');
                header.fin = flags.contains('F');
                header.rst = flags.contains('R');
                header.checksum = header.calc_checksum_ipv4(ip, PAYLOAD).unwrap();
                [&header.to_bytes()[..], PAYLOAD].concat()
            }
            Transport::Udp => {
                let header = UdpHeader::with_ipv4_checksum(
                    self.source_port,
                    self.destination_port,
                    ip,
                    PAYLOAD,
                );
                let mut header = header.unwrap();
                if self.no_checksum {
                    header.checksum = 0;
                }
                [&header.to_bytes()[..], PAYLOAD].concat()
            }
            Transport::Icmp { kind, code, body } => {
                let mut bytes = [&[*kind, *code, 0, 0], &body[..]].concat();
                let sum = etherparse::checksum::Sum16BitWords::new().add_slice(&bytes);
                let sum = sum.ones_complement().to_be().to_be_bytes();
                bytes[2..4].copy_from_slice(&sum);
                bytes
            }
        }
    }

    fn ip(&self, payload: usize) -> Ipv4Header {
        let protocol = match &self.transport {
            Transport::Tcp(_) => IpNumber::TCP,
            Transport::Udp => IpNumber::UDP,
            Transport::Icmp { .. } => IpNumber::ICMP,
        };
        let mut ip = Ipv4Header::new(
            payload as u16,
            self.ttl,
            protocol,
            self.source.octets(),
            self.destination.octets(),
        )
        .unwrap();
        ip.options = Ipv4Options::try_from(&self.options[..]).unwrap();
        ip.set_payload_len(payload).unwrap();
        ip.dont_fragment = self.fragment.is_none();
        if let Some((id, offset, more)) = self.fragment {
            ip.identification = id;
            ip.more_fragments = more;
            ip.fragment_offset = IpFragOffset::try_new(offset / 8).unwrap();
        }
        ip.header_checksum = ip.calc_header_checksum();
        ip
    }

    fn frame(&self, payload: &[u8]) -> Vec<u8> {
        let ethernet = Ethernet2Header {
            source: self.mac_source,
            destination: self.mac_destination,
            ether_type: EtherType::IPV4,
        };
        [
            &ethernet.to_bytes()[..],
            &self.ip(payload.len()).to_bytes(),
            payload,
        ]
        .concat()
    }

    /// The frame.
    pub fn bytes(&self) -> Vec<u8> {
        let payload = self.transport_bytes(&self.ip(0));
        self.frame(&payload)
    }

    /// The frame, with the transport's bytes of another.
    pub fn bytes_as_of(&self, other: &Self) -> Vec<u8> {
        let payload = other.transport_bytes(&other.ip(0));
        self.frame(&payload)
    }

    /// Bytes of Ethernet, IP and as much of the transport as is needed to judge it.
    pub fn header_bytes(&self) -> usize {
        34 + self.options.len()
            + match &self.transport {
                Transport::Tcp(_) => 14,
                Transport::Udp => 4,
                Transport::Icmp { .. } => 8 + 20 + 4,
            }
    }
}

/// The source port of a frame, or its ICMP identifier. Also checks that every checksum is right.
pub fn source_port(frame: &[u8]) -> u16 {
    let headers = PacketHeaders::from_ethernet_slice(frame).unwrap();
    match headers.transport {
        Some(TransportHeader::Tcp(tcp)) => tcp.source_port,
        Some(TransportHeader::Udp(udp)) => udp.source_port,
        // A fragment's headers are not parsed, and an ICMP's identifier stands where its kind of message has it.
        _ => {
            let transport = 14 + usize::from(frame[14] & 0x0f) * 4;
            let at = if frame[23] == 1 {
                transport + 4
            } else {
                transport
            };
            u16::from_be_bytes([frame[at], frame[at + 1]])
        }
    }
}

/// The node's settings with these ports.
pub fn settings(first_port: u16, ports: u16) -> Settings {
    Settings {
        node4: node().into(),
        first_port,
        ports,
        first_node_port: 30_000,
        last_node_port: 32_767,
        ..Settings::default()
    }
}

/// Loaded programs with two pods, a node, and a folder that goes with them.
pub struct Kernel {
    loaded: Loaded,
    maps: Maps,
    dir: tempfile::TempDir,
    ifindex: u32,
    ingress_ifindex: u32,
    /// Numbers of Services, of which each has a chunk and a backend.
    services: u32,
}

/// The loopback device stands for the pod's, and this for the web pod's.
const WEB_IFINDEX: u32 = 77;

impl Kernel {
    /// Loads the programs; needs root.
    pub fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let mut loaded = Loaded::new(dir.path()).unwrap();
        let maps = loaded.maps().unwrap();
        let mut kernel = Self {
            loaded,
            maps,
            dir,
            ifindex: 1,
            ingress_ifindex: 0,
            services: 0,
        };
        kernel
            .maps
            .services
            .set_node_address(node().into(), OWN_ADDRESS)
            .unwrap();
        kernel.endpoints(1, WEB_IFINDEX, [0, 0], [0, 0]);
        for (address, identity) in [(pod(), 1000), (web(), 1001), (node(), 1)] {
            kernel
                .policy()
                .set_identity(address.into(), identity)
                .unwrap();
        }
        for block in [
            "10.244.0.0/24",
            "10.244.1.0/24",
            "192.0.2.10/32",
            "192.0.2.20/32",
        ] {
            kernel
                .maps
                .network
                .set_native(block.parse().unwrap())
                .unwrap();
        }
        kernel.settings(settings(61_000, 4_536));
        kernel
    }

    pub fn policy(&mut self) -> &mut PolicyMaps {
        &mut self.maps.policy
    }

    pub fn settings(&mut self, settings: Settings) {
        self.maps.network.set_settings(settings).unwrap();
    }

    fn endpoint(&mut self, address: Ipv4Addr, ifindex: u32, identity: u32, sets: [u32; 2]) {
        let endpoint = Endpoint {
            ifindex,
            identity,
            ingress_set: sets[0],
            egress_set: sets[1],
            mac: POD_MAC,
            pad: 0,
        };
        self.policy()
            .set_endpoint(address.into(), endpoint)
            .unwrap();
    }

    fn endpoints(
        &mut self,
        pod_device: u32,
        web_device: u32,
        pod_sets: [u32; 2],
        web_sets: [u32; 2],
    ) {
        self.endpoint(pod(), pod_device, 1000, pod_sets);
        self.endpoint(web(), web_device, 1001, web_sets);
    }

    fn state(&mut self) -> ([u32; 2], [u32; 2]) {
        (self.sets_of(pod()), self.sets_of(web()))
    }

    fn sets_of(&self, address: Ipv4Addr) -> [u32; 2] {
        let endpoint = self.maps.policy.endpoint(address.into()).unwrap().unwrap();
        [endpoint.ingress_set, endpoint.egress_set]
    }

    /// From here on the device is the web pod's.
    pub fn as_web(&mut self) {
        let (pod_sets, web_sets) = self.state();
        self.endpoints(WEB_IFINDEX, 1, pod_sets, web_sets);
    }

    /// From here on the device is the pod's.
    pub fn as_pod(&mut self) {
        let (pod_sets, web_sets) = self.state();
        self.endpoints(1, WEB_IFINDEX, pod_sets, web_sets);
    }

    /// The device that packets come by.
    pub fn with_ifindex(&mut self, ifindex: u32) {
        self.ifindex = ifindex;
    }

    /// The device on which the node received them; 0 for its own.
    pub fn received_on(&mut self, ifindex: u32) {
        self.ingress_ifindex = ifindex;
    }

    fn set(&mut self, number: u32, protocol: u8, port: Option<u16>) {
        let shape = SHAPE_PROTOCOL | 16;
        if let Some(port) = port {
            let key = RuleKey {
                set: number,
                peer: 0,
                port: port_bits(port.to_be(), 16),
                protocol,
                shape,
            };
            self.policy().set_rule(key, 42).unwrap();
        }
        let mut shapes = [NO_SHAPE; SHAPES];
        shapes[0] = shape;
        self.policy().set_set(number, Set { shapes }).unwrap();
    }

    fn isolate_web_as(&mut self, protocol: u8, port: u16) {
        for old in [80, 443] {
            let key = RuleKey {
                set: 7,
                peer: 0,
                port: port_bits(u16::to_be(old), 16),
                protocol,
                shape: SHAPE_PROTOCOL | 16,
            };
            self.policy().remove_rule(key).unwrap();
        }
        self.set(7, protocol, Some(port));
        let egress = self.sets_of(web())[1];
        let device = self
            .maps
            .policy
            .endpoint(web().into())
            .unwrap()
            .unwrap()
            .ifindex;
        self.endpoint(web(), device, 1001, [7, egress]);
    }

    /// The web pod lets in this TCP port alone, by rule 42 of set 7.
    pub fn isolate_web(&mut self, port: u16) {
        self.isolate_web_as(6, port);
    }

    /// The web pod lets in this UDP port alone.
    pub fn isolate_web_udp(&mut self, port: u16) {
        self.isolate_web_as(17, port);
    }

    /// The web pod may send nothing.
    pub fn isolate_web_egress(&mut self) {
        self.set(8, 6, None);
        let sets = [self.sets_of(web())[0], 8];
        let device = self
            .maps
            .policy
            .endpoint(web().into())
            .unwrap()
            .unwrap()
            .ifindex;
        self.endpoint(web(), device, 1001, sets);
    }

    /// The pod lets nothing in.
    pub fn isolate_pod(&mut self) {
        self.set(9, 6, None);
        let device = self
            .maps
            .policy
            .endpoint(pod().into())
            .unwrap()
            .unwrap()
            .ifindex;
        self.endpoint(pod(), device, 1000, [9, 0]);
    }

    /// The pod is under no rules.
    pub fn open_pod(&mut self) {
        let device = self
            .maps
            .policy
            .endpoint(pod().into())
            .unwrap()
            .unwrap()
            .ifindex;
        self.endpoint(pod(), device, 1000, [0, 0]);
    }

    /// A node port with one backend.
    pub fn node_port(&mut self, port: u16, backend: Ipv4Addr, backend_port: u16) {
        self.services += 1;
        let mut chunk = [0; CHUNK];
        chunk[0] = self.services;
        let backend = Backend {
            address: backend.into(),
            port: backend_port.to_be(),
            flags: 0,
            generation: 1,
        };
        let services = &mut self.maps.services;
        services.set_backends(&[(self.services, backend)]).unwrap();
        services.set_chunks(&[(self.services, chunk)]).unwrap();
        self.frontends(port, self.services, 1);
    }

    /// A node port without backends.
    pub fn no_backends(&mut self, port: u16) {
        self.frontends(port, 0, 0);
    }

    fn frontends(&mut self, port: u16, first: u32, count: u32) {
        let run = Run { first, count };
        for protocol in [6, 17] {
            let key = FrontendKey {
                address: Ip::EVERY_V4,
                port: port.to_be(),
                protocol,
                pad: 0,
            };
            let value = Frontend {
                service: first + 1,
                flags: EXTERNAL,
                affinity: 0,
                inside: run,
                outside: run,
            };
            self.maps.services.set_frontends(&[(key, value)]).unwrap();
        }
    }

    /// Attaches the hooks of devices that lead outside.
    pub fn attach(&mut self, devices: &[Device], xdp: Xdp) -> anyhow::Result<Vec<By>> {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .unwrap();
        runtime.block_on(self.loaded.attach_network(devices, xdp))
    }

    /// The programs of an agent that comes after this one.
    pub fn next_agent(&mut self) {
        self.loaded = Loaded::new(self.dir.path()).unwrap();
        self.maps = self.loaded.maps().unwrap();
    }

    /// How many translations are known, of both directions.
    pub fn translations(&self) -> usize {
        let path = self.dir.path().join(format!("maps-{LAYOUT}/FLOWS"));
        let map = aya::maps::Map::LruHashMap(MapData::from_pin(path).unwrap());
        let map = aya::maps::HashMap::<_, [u8; 40], [u8; 76]>::try_from(map).unwrap();
        map.iter()
            .map(|entry| bytemuck::cast::<_, Flow>(entry.unwrap().1))
            .filter(|flow| flow.turn != TURN_NONE)
            .count()
    }

    /// Runs a program on a frame: its verdict and the frame as it is then.
    pub fn run(&mut self, program: &str, frame: &[u8]) -> (u32, Vec<u8>) {
        // struct __sk_buff of linux/bpf.h: ingress_ifindex and ifindex are its tenth and eleventh words.
        let mut context = [0_u8; 192];
        context[36..40].copy_from_slice(&self.ingress_ifindex.to_ne_bytes());
        context[40..44].copy_from_slice(&self.ifindex.to_ne_bytes());
        let mut out = vec![0; frame.len() + 256];
        let mut options = TestRunOptions::new();
        options.data_in = Some(frame);
        options.data_out = Some(&mut out);
        options.ctx_in = Some(&context);
        let result = self
            .loaded
            .classifier(program)
            .unwrap()
            .test_run(options)
            .unwrap();
        out.truncate(result.data_size_out as usize);
        (result.return_value, out)
    }

    /// Runs the XDP program on a frame that came by this device, or by the loopback device if that is 0.
    pub fn run_early(&mut self, device: u32, frame: &[u8]) -> (u32, Vec<u8>) {
        // struct xdp_md of linux/bpf.h: where the data ends, and the device, are its second and fourth words.
        let mut context = [0_u8; 24];
        context[4..8].copy_from_slice(&(frame.len() as u32).to_ne_bytes());
        context[12..16].copy_from_slice(&device.to_ne_bytes());
        let mut out = vec![0; frame.len() + 256];
        let mut options = TestRunOptions::new();
        options.data_in = Some(frame);
        options.data_out = Some(&mut out);
        options.ctx_in = Some(&context);
        let result = self.loaded.express().unwrap().test_run(options).unwrap();
        out.truncate(result.data_size_out as usize);
        (result.return_value, out)
    }

    /// The oldest event that was not read yet.
    pub fn event(&mut self) -> Option<Event> {
        self.maps.flows.next_event()
    }

    /// The newest event.
    pub fn last_event(&mut self) -> Option<Event> {
        std::iter::from_fn(|| self.event()).last()
    }

    /// How many packets from the network tc and XDP translated.
    pub fn translated(&self) -> (u64, u64) {
        let counters = self.maps.flows.count().unwrap();
        (counters.translated, counters.translated_early)
    }

    /// How many packets were dropped.
    pub fn dropped(&self) -> u64 {
        self.maps.flows.count().unwrap().dropped
    }
}

impl Drop for Kernel {
    fn drop(&mut self) {
        let _ = nix::mount::umount2(self.dir.path(), nix::mount::MntFlags::MNT_DETACH);
    }
}
