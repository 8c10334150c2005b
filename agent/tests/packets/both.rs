//! Frames of both families by hand, with right checksums, and Services for them.

use std::net::IpAddr;

use etherparse::checksum::Sum16BitWords;
use etherparse::{EtherType, Ethernet2Header, IpNumber, Ipv4Header, Ipv6FlowLabel, Ipv6Header};
use xebec_agent::maps::{PolicyKernel, ServiceKernel};
use xebec_dataplane_common::policy::Endpoint;
use xebec_dataplane_common::service::{
    Backend, CHUNK, EXTERNAL, Frontend, FrontendKey, OWN as OWN_ADDRESS, Run,
};

use super::{Kernel, POD_MAC};

/// The hardware address of the device that frames come by in tests: the loopback's.
pub const HERE: [u8; 6] = [0; 6];
/// Whoever sends them.
pub const THERE: [u8; 6] = [2, 0, 0, 0, 0, 1];

pub const TCP: u8 = 6;
pub const UDP: u8 = 17;
pub const SCTP: u8 = 132;
const FRAGMENT: u8 = 44;

/// An address.
pub fn at(text: &str) -> IpAddr {
    text.parse().unwrap()
}

/// A packet before it becomes bytes.
#[derive(Clone, Debug)]
pub struct Datagram {
    pub mac_source: [u8; 6],
    pub mac_destination: [u8; 6],
    pub source: IpAddr,
    pub destination: IpAddr,
    pub protocol: u8,
    /// Traffic class.
    pub class: u8,
    pub hops: u8,
    /// All behind the network header.
    pub payload: Vec<u8>,
    /// Identification, offset in bytes, and whether more follow.
    pub part: Option<(u16, u16, bool)>,
}

impl Datagram {
    /// From someone else to this host's device.
    pub fn new(source: IpAddr, destination: IpAddr, protocol: u8, payload: Vec<u8>) -> Self {
        Self {
            mac_source: THERE,
            mac_destination: HERE,
            source,
            destination,
            protocol,
            class: 0,
            hops: 64,
            payload,
            part: None,
        }
    }

    /// The datagram in two fragments, of which the first has so many bytes.
    pub fn parts(&self, id: u16, bytes: u16) -> [Self; 2] {
        [(0, true), (bytes, false)].map(|(from, more)| {
            let mut part = self.clone();
            let to = if more {
                bytes.into()
            } else {
                self.payload.len()
            };
            part.payload = self.payload[usize::from(from)..to].to_vec();
            part.part = Some((id, from, more));
            part
        })
    }

    /// The frame.
    pub fn bytes(&self) -> Vec<u8> {
        let v4 = self.source.is_ipv4();
        let ethernet = Ethernet2Header {
            source: self.mac_source,
            destination: self.mac_destination,
            ether_type: if v4 { EtherType::IPV4 } else { EtherType::IPV6 },
        };
        let network = match (self.source, self.destination) {
            (IpAddr::V4(source), IpAddr::V4(destination)) => {
                let mut header = Ipv4Header::new(
                    self.payload.len() as u16,
                    self.hops,
                    IpNumber(self.protocol),
                    source.octets(),
                    destination.octets(),
                )
                .unwrap();
                header.dscp = (self.class >> 2).try_into().unwrap();
                header.ecn = (self.class & 3).try_into().unwrap();
                header.dont_fragment = self.part.is_none();
                if let Some((id, offset, more)) = self.part {
                    header.identification = id;
                    header.more_fragments = more;
                    header.fragment_offset = (offset / 8).try_into().unwrap();
                }
                header.header_checksum = header.calc_header_checksum();
                header.to_bytes().to_vec()
            }
            (IpAddr::V6(source), IpAddr::V6(destination)) => {
                let (next, part) = match self.part {
                    None => (self.protocol, vec![]),
                    Some((id, offset, more)) => {
                        let offset = (offset | u16::from(more)).to_be_bytes();
                        let id = u32::from(id).to_be_bytes();
                        let part = [&[self.protocol, 0], &offset[..], &id];
                        (FRAGMENT, part.concat())
                    }
                };
                let header = Ipv6Header {
                    traffic_class: self.class,
                    flow_label: Ipv6FlowLabel::ZERO,
                    payload_length: (part.len() + self.payload.len()) as u16,
                    next_header: IpNumber(next),
                    hop_limit: self.hops,
                    source: source.octets(),
                    destination: destination.octets(),
                };
                [&header.to_bytes()[..], &part].concat()
            }
            _ => panic!("two families in one packet"),
        };
        [&ethernet.to_bytes()[..], &network, &self.payload].concat()
    }

    /// Fills in the checksum at this place of the payload.
    pub fn sum(mut self, place: usize) -> Self {
        let length = self.payload.len() as u32;
        let mut sum = Sum16BitWords::new().add_slice(&self.payload);
        if self.protocol != 1 {
            sum = match (self.source, self.destination) {
                (IpAddr::V4(a), IpAddr::V4(b)) => sum.add_4bytes(a.octets()).add_4bytes(b.octets()),
                (IpAddr::V6(a), IpAddr::V6(b)) => {
                    sum.add_16bytes(a.octets()).add_16bytes(b.octets())
                }
                _ => panic!("two families in one packet"),
            };
            sum = sum.add_4bytes(length.to_be_bytes());
            sum = sum.add_2bytes([0, self.protocol]);
        }
        let sum = sum.ones_complement().to_ne_bytes();
        self.payload[place..place + 2].copy_from_slice(&sum);
        self
    }
}

/// A TCP segment: its flags as the header has them.
pub fn tcp(
    ends: (IpAddr, IpAddr),
    ports: (u16, u16),
    numbers: (u32, u32),
    flags: u8,
    window: u16,
    data: &[u8],
) -> Datagram {
    let payload = [
        &ports.0.to_be_bytes()[..],
        &ports.1.to_be_bytes(),
        &numbers.0.to_be_bytes(),
        &numbers.1.to_be_bytes(),
        &[5 << 4, flags],
        &window.to_be_bytes(),
        &[0; 4],
        data,
    ]
    .concat();
    Datagram::new(ends.0, ends.1, TCP, payload).sum(16)
}

/// A UDP datagram.
pub fn udp(ends: (IpAddr, IpAddr), ports: (u16, u16), data: &[u8]) -> Datagram {
    let payload = [
        &ports.0.to_be_bytes()[..],
        &ports.1.to_be_bytes(),
        &(8 + data.len() as u16).to_be_bytes(),
        &[0; 2],
        data,
    ]
    .concat();
    Datagram::new(ends.0, ends.1, UDP, payload).sum(6)
}

/// An ICMP error of the family.
pub fn error(ends: (IpAddr, IpAddr), kind: u8, code: u8, quote: &[u8]) -> Datagram {
    let payload = [&[kind, code, 0, 0, 0, 0, 0, 0], quote].concat();
    let protocol = if ends.0.is_ipv4() { 1 } else { 58 };
    Datagram::new(ends.0, ends.1, protocol, payload).sum(2)
}

/// CRC32c, as SCTP has it: bit by bit, of all bytes.
pub fn crc32c(bytes: &[u8]) -> u32 {
    let mut crc = u32::MAX;
    for byte in bytes {
        crc ^= u32::from(*byte);
        for _ in 0..8 {
            crc = crc >> 1 ^ (0x82f6_3b78 & 0_u32.wrapping_sub(crc & 1));
        }
    }
    !crc
}

/// An SCTP packet with one chunk of this type.
pub fn sctp(ends: (IpAddr, IpAddr), ports: (u16, u16), chunk: u8, data: &[u8]) -> Datagram {
    let mut payload = [
        &ports.0.to_be_bytes()[..],
        &ports.1.to_be_bytes(),
        &0xdead_beef_u32.to_be_bytes(),
        &[0; 4],
        &[chunk, 0],
        &(4 + data.len() as u16).to_be_bytes(),
        data,
    ]
    .concat();
    let crc = crc32c(&payload).to_le_bytes();
    payload[8..12].copy_from_slice(&crc);
    Datagram::new(ends.0, ends.1, SCTP, payload)
}

impl Kernel {
    /// A pod of this node; the loopback device is its own if `here`.
    pub fn pod_at(&mut self, address: IpAddr, here: bool) {
        let device = if here { 1 } else { super::WEB_IFINDEX };
        self.pod_on(address, device, POD_MAC);
    }

    /// A pod of this node by this device, with this hardware address.
    pub fn pod_on(&mut self, address: IpAddr, ifindex: u32, mac: [u8; 6]) {
        let endpoint = Endpoint {
            ifindex,
            identity: 1000,
            ingress_set: 0,
            egress_set: 0,
            mac,
            pad: 0,
        };
        self.policy().set_endpoint(address, endpoint).unwrap();
    }

    /// The node has this IPv6 address, too.
    pub fn node6(&mut self, address: IpAddr) {
        let mut settings = super::settings(61_000, 4_536);
        settings.node6 = address.into();
        self.settings(settings);
        let services = &mut self.maps.services;
        services.set_node_address(address, OWN_ADDRESS).unwrap();
    }

    /// A Service's address for these protocols, with one backend or none.
    pub fn service(
        &mut self,
        address: IpAddr,
        port: u16,
        flags: u32,
        backend: Option<(IpAddr, u16)>,
    ) {
        self.services += 1;
        let number = self.services;
        let services = &mut self.maps.services;
        if let Some((address, port)) = backend {
            let backend = Backend {
                address: address.into(),
                port: port.to_be(),
                flags: 0,
                generation: 1,
            };
            let mut chunk = [0; CHUNK];
            chunk[0] = number;
            services.set_backends(&[(number, backend)]).unwrap();
            services.set_chunks(&[(number, chunk)]).unwrap();
        }
        let run = Run {
            first: number,
            count: u32::from(backend.is_some()),
        };
        for protocol in [TCP, UDP, SCTP] {
            let key = FrontendKey {
                address: address.into(),
                port: port.to_be(),
                protocol,
                pad: 0,
            };
            let value = Frontend {
                service: number,
                flags: EXTERNAL | flags,
                affinity: 0,
                inside: run,
                outside: run,
            };
            services.set_frontends(&[(key, value)]).unwrap();
        }
    }

    /// The newest Service's backend goes.
    pub fn end_backend(&mut self) {
        let gone = Backend {
            generation: 2,
            ..Backend::default()
        };
        self.maps
            .services
            .set_backends(&[(self.services, gone)])
            .unwrap();
    }

    /// Packets that were answered for Services without endpoints, and flows that got no port.
    pub fn refused(&self) -> (u64, u64) {
        let counters = self.maps.flows.count().unwrap();
        (counters.refused, counters.no_port)
    }
}
