//! Building packets of both families, every checksum computed from nothing.

use std::borrow::Cow;
use std::net::IpAddr;

use super::crc::crc32c;

/// A family of addresses.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Family {
    V4,
    V6,
}

/// Both.
pub const FAMILIES: [Family; 2] = [Family::V4, Family::V6];

/// TCP flags.
pub const FIN: u8 = 1;
pub const SYN: u8 = 2;
pub const RST: u8 = 4;
pub const ACK: u8 = 16;

/// Chunks of SCTP.
pub const DATA: u8 = 0;
pub const INIT: u8 = 1;
pub const INIT_ACK: u8 = 2;
pub const ABORT: u8 = 6;
pub const SHUTDOWN_COMPLETE: u8 = 14;

/// Extension headers of IPv6.
pub const HOP_BY_HOP: u8 = 0;
pub const ROUTING: u8 = 43;
pub const FRAGMENT: u8 = 44;
pub const AUTHENTICATION: u8 = 51;
pub const DESTINATION: u8 = 60;

/// What a packet carries.
#[derive(Clone, Debug, PartialEq)]
pub enum Transport {
    /// With these flags.
    Tcp(u8),
    Udp,
    /// With one chunk of this kind.
    Sctp(u8),
    Icmp {
        kind: u8,
        code: u8,
        body: Vec<u8>,
    },
    /// A protocol without ports.
    Other(u8),
}

/// A packet before it becomes bytes, with right checksums.
#[derive(Clone, Debug, PartialEq)]
pub struct Packet {
    pub mac_source: [u8; 6],
    pub mac_destination: [u8; 6],
    pub source: IpAddr,
    pub destination: IpAddr,
    pub source_port: u16,
    pub destination_port: u16,
    pub ttl: u8,
    /// IPv4 options, in multiples of four bytes.
    pub options: Vec<u8>,
    /// Extension headers of IPv6, by their numbers.
    pub extensions: Vec<u8>,
    /// Traffic class, or type of service.
    pub class: u8,
    /// IPv6's flow label.
    pub label: u32,
    /// TCP's sequence and acknowledgment numbers, and its window.
    pub numbers: (u32, u32),
    pub window: u16,
    /// What TCP, UDP and SCTP carry.
    pub data: Cow<'static, [u8]>,
    /// SCTP's checksum, if it is not that of the packet.
    pub crc: Option<u32>,
    /// A UDP checksum of 0.
    pub no_checksum: bool,
    pub transport: Transport,
    /// Identification, offset in bytes, more fragments.
    pub fragment: Option<(u32, u16, bool)>,
}

fn packet(source: IpAddr, destination: IpAddr, ports: (u16, u16), transport: Transport) -> Packet {
    Packet {
        mac_source: [2, 0, 0, 0, 0, 1],
        mac_destination: [2, 0, 0, 0, 0, 2],
        source,
        destination,
        source_port: ports.0,
        destination_port: ports.1,
        ttl: 64,
        options: Vec::new(),
        extensions: Vec::new(),
        class: 1,
        label: 0x2_3456,
        numbers: (7, 0),
        window: 8192,
        data: PAYLOAD.into(),
        crc: None,
        no_checksum: false,
        transport,
        fragment: None,
    }
}

/// Flags of TCP such as "SA".
pub fn tcp_flags(flags: &str) -> u8 {
    flags.bytes().fold(0, |all, flag| {
        all | match flag {
            b'S' => SYN,
            b'A' => ACK,
            b'F' => FIN,
            b'R' => RST,
            _ => 0,
        }
    })
}

/// A TCP segment with flags such as "SA".
pub fn tcp(source: IpAddr, destination: IpAddr, from: u16, to: u16, flags: &str) -> Packet {
    let flags = tcp_flags(flags);
    packet(source, destination, (from, to), Transport::Tcp(flags))
}

/// A UDP datagram.
pub fn udp(source: IpAddr, destination: IpAddr, from: u16, to: u16) -> Packet {
    packet(source, destination, (from, to), Transport::Udp)
}

/// An SCTP packet with one chunk of this kind.
pub fn sctp(source: IpAddr, destination: IpAddr, from: u16, to: u16, chunk: u8) -> Packet {
    packet(source, destination, (from, to), Transport::Sctp(chunk))
}

/// A packet of a protocol without ports.
pub fn other(source: IpAddr, destination: IpAddr, protocol: u8) -> Packet {
    packet(source, destination, (0, 0), Transport::Other(protocol))
}

/// An ICMP message; `body` follows type, code and checksum.
pub fn icmp(source: IpAddr, destination: IpAddr, kind: u8, code: u8, body: &[u8]) -> Packet {
    let body = body.to_vec();
    packet(
        source,
        destination,
        (0, 0),
        Transport::Icmp { kind, code, body },
    )
}

/// An echo request with this identifier.
pub fn echo(source: IpAddr, destination: IpAddr, identifier: u16) -> Packet {
    let kind = if source.is_ipv4() { 8 } else { 128 };
    let [high, low] = identifier.to_be_bytes();
    let mut packet = icmp(source, destination, kind, 0, &[high, low, 0, 1, 9, 9]);
    (packet.source_port, packet.destination_port) = (identifier, identifier);
    packet
}

/// Kinds of errors.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Why {
    NoPort,
    TimeExceeded,
    TooBig,
}

pub const WHYS: [Why; 3] = [Why::NoPort, Why::TimeExceeded, Why::TooBig];

/// An error about a packet, which it quotes as far as `length` bytes.
pub fn error(
    source: IpAddr,
    destination: IpAddr,
    why: Why,
    about: &Packet,
    length: usize,
) -> Packet {
    let (kind, code) = match (source.is_ipv4(), why) {
        (true, Why::NoPort) => (3, 3),
        (true, Why::TimeExceeded) => (11, 0),
        (true, Why::TooBig) => (3, 4),
        (false, Why::NoPort) => (1, 4),
        (false, Why::TimeExceeded) => (3, 0),
        (false, Why::TooBig) => (2, 0),
    };
    let bytes = about.bytes();
    let end = bytes.len().min(14 + length);
    let mtu: [u8; 4] = match why {
        Why::TooBig => 1400_u32.to_be_bytes(),
        _ => [0; 4],
    };
    icmp(
        source,
        destination,
        kind,
        code,
        &[&mtu, &bytes[14..end]].concat(),
    )
}

/// What a Service without endpoints answers to a packet.
pub fn refusal(to: &Packet) -> Packet {
    let from = to.destination;
    let mut answer = match to.transport {
        Transport::Tcp(flags) => {
            let mut reset = to.back(RST).with(b"");
            (reset.options, reset.extensions) = (Vec::new(), Vec::new());
            (reset.ttl, reset.class, reset.window) = (64, to.class & 0xfc, 0);
            reset.numbers = (to.numbers.1, 0);
            if flags & ACK == 0 {
                let marks = u32::from(flags & SYN != 0) + u32::from(flags & FIN != 0);
                let length = to.data.len() as u32 + marks;
                reset.numbers = (0, to.numbers.0.wrapping_add(length));
                reset = reset.flags(RST | ACK);
            }
            reset
        }
        _ => return told_by(from, to, Why::NoPort),
    };
    answer.label = 0;
    answer
}

/// What a node says of a packet that it can't send on.
pub fn told_by(node: IpAddr, about: &Packet, why: Why) -> Packet {
    let mut error = error(node, about.source, why, about, 448);
    (error.class, error.label) = (0xc0, 0);
    error
}

const PAYLOAD: &[u8] = b"what the packet carries must stay";

/// The sum of 16-bit words (RFC 1071), to be folded.
fn sum(mut total: u64, bytes: &[u8]) -> u64 {
    let mut pairs = bytes.chunks_exact(2);
    for pair in &mut pairs {
        total += u64::from(pair[0]) << 8 | u64::from(pair[1]);
    }
    if let [last] = pairs.remainder() {
        total += u64::from(*last) << 8;
    }
    total
}

/// What SCTP says in the place of TCP's flags.
fn chunk_of(flags: u8) -> u8 {
    match flags {
        SYN => INIT,
        flags if flags == SYN | ACK => INIT_ACK,
        flags if flags & RST != 0 => ABORT,
        flags if flags & FIN != 0 => SHUTDOWN_COMPLETE,
        _ => DATA,
    }
}

fn folded(mut total: u64) -> u16 {
    while total > 0xffff {
        total = (total & 0xffff) + (total >> 16);
    }
    !(total as u16)
}

/// Bytes of an address.
fn push(bytes: &mut Vec<u8>, address: IpAddr) {
    match address {
        IpAddr::V4(address) => bytes.extend_from_slice(&address.octets()),
        IpAddr::V6(address) => bytes.extend_from_slice(&address.octets()),
    }
}

impl Packet {
    /// Makes it a fragment: identification, offset in bytes, whether more follow.
    pub fn fragment(&mut self, id: u32, offset: u16, more: bool) {
        self.fragment = Some((id, offset, more));
    }

    /// Gives it IPv4 options or extension headers.
    pub fn with_options(mut self) -> Self {
        if self.source.is_ipv4() {
            self.options = vec![1, 1, 1, 0];
        } else {
            self.extensions = vec![HOP_BY_HOP, ROUTING, AUTHENTICATION, DESTINATION];
        }
        self
    }

    /// Also ICMP's identifier.
    pub fn set_source_port(&mut self, port: u16) {
        self.source_port = port;
        if let Transport::Icmp { body, .. } = &mut self.transport {
            self.destination_port = port;
            body[..2].copy_from_slice(&port.to_be_bytes());
        }
    }

    /// Flags of TCP, or those that SCTP's chunk stands for.
    pub fn tcp_flags(&self) -> u8 {
        match self.transport {
            Transport::Tcp(flags) => flags,
            Transport::Sctp(INIT) => SYN,
            Transport::Sctp(INIT_ACK) => SYN | ACK,
            Transport::Sctp(ABORT) => RST,
            Transport::Sctp(SHUTDOWN_COMPLETE) => FIN,
            _ => 0,
        }
    }

    /// The same with this in it.
    pub fn with(mut self, data: impl Into<Cow<'static, [u8]>>) -> Self {
        self.data = data.into();
        self
    }

    /// The same between these hardware addresses.
    pub fn between(mut self, source: [u8; 6], destination: [u8; 6]) -> Self {
        (self.mac_source, self.mac_destination) = (source, destination);
        self
    }

    /// SCTP's checksum.
    pub fn crc(&self) -> u32 {
        let bytes = self.transport_bytes();
        u32::from_le_bytes(bytes[8..12].try_into().unwrap())
    }

    /// The same in the other direction, with these flags of TCP.
    pub fn back(&self, flags: u8) -> Self {
        let mut answer = self.clone();
        (answer.source, answer.destination) = (self.destination, self.source);
        (answer.source_port, answer.destination_port) = (self.destination_port, self.source_port);
        match &mut answer.transport {
            Transport::Tcp(own) => *own = flags,
            Transport::Sctp(chunk) => *chunk = chunk_of(flags),
            Transport::Icmp { kind, .. } => {
                *kind = match *kind {
                    8 => 0,
                    0 => 8,
                    128 => 129,
                    _ => 128,
                };
            }
            _ => {}
        }
        answer
    }

    /// What the other end says to it.
    pub fn answer(&self) -> Self {
        self.back(SYN | ACK)
    }

    /// The same with other flags of TCP.
    pub fn flags(&self, flags: u8) -> Self {
        let mut other = self.clone();
        other.transport = Transport::Tcp(flags);
        other
    }

    /// The same with other flags, or the chunk that says so, if it is TCP or SCTP.
    pub fn flags_if_tcp(&self, flags: u8) -> Self {
        match self.transport {
            Transport::Tcp(_) => self.flags(flags),
            Transport::Sctp(_) => {
                let mut other = self.clone();
                other.transport = Transport::Sctp(chunk_of(flags));
                other
            }
            _ => self.clone(),
        }
    }

    /// The same to another end.
    pub fn to(&self, destination: IpAddr, port: u16) -> Self {
        let mut other = self.clone();
        (other.destination, other.destination_port) = (destination, port);
        other
    }

    /// The same from another end.
    pub fn from(&self, source: IpAddr, port: u16) -> Self {
        let mut other = self.clone();
        (other.source, other.source_port) = (source, port);
        other
    }

    /// The same after a router.
    pub fn hop(&self) -> Self {
        let mut other = self.clone();
        other.ttl -= 1;
        other
    }

    /// The same after the program handed it to a pod: as after a router, which has this hardware address.
    pub fn handed_over(&self, mac: [u8; 6]) -> Self {
        let mut other = self.hop();
        (other.mac_source, other.mac_destination) = (self.mac_destination, mac);
        other
    }

    /// The number of its protocol.
    pub fn protocol(&self) -> u8 {
        match &self.transport {
            Transport::Tcp(_) => 6,
            Transport::Udp => 17,
            Transport::Sctp(_) => 132,
            Transport::Icmp { .. } if self.source.is_ipv4() => 1,
            Transport::Icmp { .. } => 58,
            Transport::Other(protocol) => *protocol,
        }
    }

    fn transport_bytes(&self) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(64);
        let checksum = match &self.transport {
            Transport::Tcp(flags) => {
                bytes.extend_from_slice(&self.source_port.to_be_bytes());
                bytes.extend_from_slice(&self.destination_port.to_be_bytes());
                bytes.extend_from_slice(&self.numbers.0.to_be_bytes());
                bytes.extend_from_slice(&self.numbers.1.to_be_bytes());
                bytes.extend_from_slice(&[0x50, *flags]);
                bytes.extend_from_slice(&self.window.to_be_bytes());
                bytes.extend_from_slice(&[0; 4]);
                bytes.extend_from_slice(&self.data);
                16
            }
            Transport::Udp => {
                bytes.extend_from_slice(&self.source_port.to_be_bytes());
                bytes.extend_from_slice(&self.destination_port.to_be_bytes());
                bytes.extend_from_slice(&(8 + self.data.len() as u16).to_be_bytes());
                bytes.extend_from_slice(&[0, 0]);
                bytes.extend_from_slice(&self.data);
                if self.no_checksum {
                    return bytes;
                }
                6
            }
            Transport::Sctp(chunk) => {
                bytes.extend_from_slice(&self.source_port.to_be_bytes());
                bytes.extend_from_slice(&self.destination_port.to_be_bytes());
                bytes.extend_from_slice(&0xdead_beef_u32.to_be_bytes());
                bytes.extend_from_slice(&[0, 0, 0, 0, *chunk, 0]);
                bytes.extend_from_slice(&(4 + self.data.len() as u16).to_be_bytes());
                bytes.extend_from_slice(&self.data);
                let crc = self.crc.unwrap_or_else(|| crc32c(&bytes));
                bytes[8..12].copy_from_slice(&crc.to_le_bytes());
                return bytes;
            }
            Transport::Icmp { kind, code, body } => {
                bytes.extend_from_slice(&[*kind, *code, 0, 0]);
                bytes.extend_from_slice(body);
                2
            }
            Transport::Other(_) => return PAYLOAD.to_vec(),
        };
        let mut total = sum(0, &bytes);
        if self.protocol() != 1 {
            let mut pseudo = Vec::with_capacity(40);
            push(&mut pseudo, self.source);
            push(&mut pseudo, self.destination);
            total = sum(total, &pseudo) + u64::from(self.protocol()) + bytes.len() as u64;
        }
        let mut value = folded(total);
        if value == 0 && self.transport == Transport::Udp {
            value = 0xffff;
        }
        bytes[checksum..checksum + 2].copy_from_slice(&value.to_be_bytes());
        bytes
    }

    fn frame(&self, payload: &[u8]) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(160);
        bytes.extend_from_slice(&self.mac_destination);
        bytes.extend_from_slice(&self.mac_source);
        if self.source.is_ipv4() {
            self.push_v4(&mut bytes, payload.len());
        } else {
            self.push_v6(&mut bytes, payload.len());
        }
        bytes.extend_from_slice(payload);
        bytes
    }

    fn push_v4(&self, bytes: &mut Vec<u8>, payload: usize) {
        let header = 20 + self.options.len();
        bytes.extend_from_slice(&[8, 0, 0x40 | (header / 4) as u8, self.class]);
        bytes.extend_from_slice(&((header + payload) as u16).to_be_bytes());
        let (id, word) = match self.fragment {
            None => (0, 0x4000),
            Some((id, offset, more)) => (id as u16, (u16::from(more) << 13) | (offset / 8)),
        };
        bytes.extend_from_slice(&id.to_be_bytes());
        bytes.extend_from_slice(&word.to_be_bytes());
        bytes.extend_from_slice(&[self.ttl, self.protocol(), 0, 0]);
        push(bytes, self.source);
        push(bytes, self.destination);
        bytes.extend_from_slice(&self.options);
        let checksum = folded(sum(0, &bytes[14..]));
        bytes[24..26].copy_from_slice(&checksum.to_be_bytes());
    }

    fn push_v6(&self, bytes: &mut Vec<u8>, payload: usize) {
        let mut extensions = Vec::new();
        let mut kinds = self.extensions.clone();
        if self.fragment.is_some() {
            kinds.push(FRAGMENT);
        }
        for (index, kind) in kinds.iter().enumerate() {
            let next = kinds.get(index + 1).copied().unwrap_or(self.protocol());
            match *kind {
                FRAGMENT => {
                    let (id, offset, more) = self.fragment.unwrap_or((0, 0, false));
                    extensions.extend_from_slice(&[next, 0]);
                    extensions.extend_from_slice(&(offset | u16::from(more)).to_be_bytes());
                    extensions.extend_from_slice(&id.to_be_bytes());
                }
                // Its length counts in four bytes, less two of them.
                AUTHENTICATION => extensions
                    .extend_from_slice(&[next, 2, 0, 0, 0, 0, 0, 7, 0, 0, 0, 9, 1, 2, 3, 4]),
                ROUTING => extensions.extend_from_slice(&[next, 0, 4, 0, 0, 0, 0, 0]),
                // Padding, with a length that is not 0.
                _ => extensions
                    .extend_from_slice(&[next, 1, 1, 12, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]),
            }
        }
        let first = kinds.first().copied().unwrap_or(self.protocol());
        bytes.extend_from_slice(&[0x86, 0xdd]);
        let word = 6 << 28 | u32::from(self.class) << 20 | self.label;
        bytes.extend_from_slice(&word.to_be_bytes());
        bytes.extend_from_slice(&((extensions.len() + payload) as u16).to_be_bytes());
        bytes.extend_from_slice(&[first, self.ttl]);
        push(bytes, self.source);
        push(bytes, self.destination);
        bytes.extend_from_slice(&extensions);
    }

    /// The frame.
    pub fn bytes(&self) -> Vec<u8> {
        self.frame(&self.transport_bytes())
    }

    /// The frames of its two fragments, of which the first has so many bytes.
    pub fn parts(&self, id: u32, bytes: u16) -> [Vec<u8>; 2] {
        let whole = self.transport_bytes();
        let (first, rest) = whole.split_at(bytes.into());
        [(0, true, first), (bytes, false, rest)].map(|(offset, more, part)| {
            let mut fragment = self.clone();
            fragment.fragment(id, offset, more);
            fragment.frame(part)
        })
    }

    /// The frame, with the transport's bytes of another.
    pub fn bytes_as_of(&self, other: &Self) -> Vec<u8> {
        self.frame(&other.transport_bytes())
    }

    /// Where its transport header lies in the frame.
    pub fn transport_at(&self) -> usize {
        if self.source.is_ipv4() {
            return 34 + self.options.len();
        }
        let fragment = if self.fragment.is_some() { 8 } else { 0 };
        let sizes = self.extensions.iter().map(|kind| match *kind {
            ROUTING | FRAGMENT => 8,
            _ => 16,
        });
        54 + fragment + sizes.sum::<usize>()
    }

    /// Where its network header lies that an error quotes, too.
    pub fn network_bytes(&self) -> usize {
        if self.source.is_ipv4() { 20 } else { 40 }
    }

    /// Bytes of Ethernet, IP and as much of the transport as is needed to judge it.
    pub fn header_bytes(&self) -> usize {
        self.transport_at()
            + match &self.transport {
                Transport::Tcp(_) => 14,
                Transport::Udp => 4,
                Transport::Sctp(_) => 13,
                Transport::Icmp {
                    kind: 0 | 8 | 128 | 129,
                    ..
                } => 8,
                Transport::Icmp { .. } => 8 + self.network_bytes() + 4,
                Transport::Other(_) => 0,
            }
    }
}

/// The source port of a frame without options or extension headers, or its ICMP identifier.
pub fn source_port(frame: &[u8]) -> u16 {
    let (transport, protocol) = if frame[12] == 8 {
        (14 + usize::from(frame[14] & 0x0f) * 4, frame[23])
    } else {
        (54, frame[20])
    };
    let (transport, protocol) = match protocol {
        FRAGMENT => (transport + 8, frame[transport]),
        protocol => (transport, protocol),
    };
    let at = match protocol {
        1 | 58 => transport + 4,
        _ => transport,
    };
    u16::from_be_bytes([frame[at], frame[at + 1]])
}

/// A second opinion on the packets that are built here.
#[test]
fn packets_have_the_checksums_that_others_compute() {
    use etherparse::{PacketHeaders, TransportHeader};
    for family in FAMILIES {
        let (a, b) = (super::pod(family), super::client(family));
        for packet in [
            tcp(a, b, 4000, 80, "SA"),
            tcp(a, b, 4000, 80, "S").with_options(),
            udp(a, b, 4000, 53),
            udp(a, b, 4000, 53).with_options(),
            echo(a, b, 77),
            error(a, b, Why::NoPort, &udp(b, a, 5, 6), 500),
        ] {
            let bytes = packet.bytes();
            let headers = PacketHeaders::from_ethernet_slice(&bytes).unwrap();
            let (payload, net) = (headers.payload.slice(), headers.net.clone().unwrap());
            let (v4, v6) = (
                net.ipv4_ref().map(|net| net.0),
                net.ipv6_ref().map(|net| net.0),
            );
            if let Some(v4) = v4 {
                assert_eq!(v4.header_checksum, v4.calc_header_checksum());
            }
            let (found, right) = match headers.transport.unwrap() {
                TransportHeader::Tcp(tcp) => (
                    tcp.checksum,
                    v4.map(|ip| tcp.calc_checksum_ipv4(ip, payload).unwrap())
                        .or(v6.map(|ip| tcp.calc_checksum_ipv6(ip, payload).unwrap())),
                ),
                TransportHeader::Udp(udp) => (
                    udp.checksum,
                    v4.map(|ip| udp.calc_checksum_ipv4(ip, payload).unwrap())
                        .or(v6.map(|ip| udp.calc_checksum_ipv6(ip, payload).unwrap())),
                ),
                TransportHeader::Icmpv4(icmp) => {
                    (icmp.checksum, Some(icmp.icmp_type.calc_checksum(payload)))
                }
                TransportHeader::Icmpv6(icmp) => (
                    icmp.checksum,
                    v6.map(|ip| {
                        icmp.icmp_type
                            .calc_checksum(ip.source, ip.destination, payload)
                            .unwrap()
                    }),
                ),
            };
            assert_eq!(Some(found), right, "{packet:?}");
        }
    }
}
