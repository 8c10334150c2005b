//! Reading a packet: addresses, ports, flags; IPv4 with options and fragments.

use aya_ebpf::bindings::__sk_buff;
use aya_ebpf::programs::TcContext;
use xebec_dataplane_common::{ICMP, SCTP, TCP, UDP};

use crate::frame::Frame;
use crate::maps::FRAGMENTS;

/// Bytes of the Ethernet header.
pub const ETHERNET: usize = 14;
const ETHERTYPE_IPV4: u16 = 0x0800_u16.to_be();
const ETHERTYPE_ARP: u16 = 0x0806_u16.to_be();

/// What of a packet is judged.
pub struct Packet {
    /// Source address.
    pub source: u32,
    /// Destination address.
    pub destination: u32,
    /// Source port, or of ICMP echo the identifier.
    pub source_port: u16,
    /// Destination port, or of ICMP echo the identifier.
    pub destination_port: u16,
    /// IP protocol number.
    pub protocol: u8,
    /// TCP flags.
    pub tcp_flags: u8,
    /// Hops that are left.
    pub ttl: u8,
    /// Bytes of the IPv4 header.
    pub header: u8,
    /// A fragment that is not the first: its ports are those of the first, and it has no transport header.
    pub later: bool,
    /// The packet is an ICMP error: addresses and ports are those of the flow that it is about, seen from the
    /// error's side.
    pub error: bool,
    /// The addresses of the packet itself; an error's sender may be a router on the way.
    pub carrier: (u32, u32),
    /// Type and code of ICMP, for events.
    pub icmp: u16,
}

/// What reading gave.
pub enum Read {
    /// An IPv4 packet.
    Ipv4(Packet),
    /// ARP, which is the stack's business.
    Arp,
    /// Another protocol of the network layer.
    Other,
    /// Cut short or contradictory.
    Invalid,
}

/// Reads the packet's headers.
#[inline(always)]
pub fn read(ctx: &TcContext) -> Read {
    let Some(ethertype) = Frame::load::<u16>(ctx, 12) else {
        return Read::Invalid;
    };
    if ethertype == ETHERTYPE_ARP {
        return Read::Arp;
    }
    if ethertype != ETHERTYPE_IPV4 {
        return Read::Other;
    }
    match ipv4(ctx, ETHERNET) {
        Some(packet) => Read::Ipv4(packet),
        None => Read::Invalid,
    }
}

#[inline(always)]
fn ipv4(ctx: &TcContext, at: usize) -> Option<Packet> {
    let header: [u8; 20] = Frame::load(ctx, at)?;
    let words = usize::from(header[0] & 0x0f);
    if header[0] >> 4 != 4 || words < 5 {
        return None;
    }
    let mut packet = addressed(&header);
    let fragment = u16::from_be_bytes([header[6], header[7]]);
    let (more, offset) = (fragment & 0x2000 != 0, fragment & 0x1fff);
    let id = u32::from(u16::from_be_bytes([header[4], header[5]]));
    let datagram = [
        packet.source,
        packet.destination,
        id << 8 | u32::from(packet.protocol),
    ];
    if offset != 0 {
        // Only the first fragment has ports; a fragment that comes before it can't be judged.
        // SAFETY: the value is copied at once.
        let ports = unsafe { FRAGMENTS.get(&datagram) }?;
        (packet.source_port, packet.destination_port) = (ports[0], ports[1]);
        packet.later = true;
        return Some(packet);
    }
    transport(ctx, at + words * 4, &mut packet)?;
    if more {
        let _ = FRAGMENTS.insert(&datagram, &[packet.source_port, packet.destination_port], 0);
    }
    Some(packet)
}

/// What an IPv4 header says.
#[inline(always)]
fn addressed(header: &[u8; 20]) -> Packet {
    let source = u32::from_ne_bytes([header[12], header[13], header[14], header[15]]);
    let destination = u32::from_ne_bytes([header[16], header[17], header[18], header[19]]);
    Packet {
        source,
        destination,
        source_port: 0,
        destination_port: 0,
        protocol: header[9],
        tcp_flags: 0,
        ttl: header[8],
        header: (header[0] & 0x0f) * 4,
        later: false,
        error: false,
        carrier: (source, destination),
        icmp: 0,
    }
}

/// Reads a packet without options that is whole; none for all others.
#[inline(always)]
pub fn read_simple(ctx: &impl Frame) -> Option<Packet> {
    let header: [u8; 20] = ctx.load(ETHERNET)?;
    if ctx.load::<u16>(12)? != ETHERTYPE_IPV4 || header[0] != 0x45 {
        return None;
    }
    // More fragments, or an offset.
    if u16::from_be_bytes([header[6], header[7]]) & 0x3fff != 0 {
        return None;
    }
    let mut packet = addressed(&header);
    transport(ctx, ETHERNET + 20, &mut packet)?;
    Some(packet)
}

#[inline(always)]
fn transport(ctx: &impl Frame, at: usize, packet: &mut Packet) -> Option<()> {
    match packet.protocol {
        TCP => {
            let header: [u8; 14] = ctx.load(at)?;
            ports(&header, packet);
            packet.tcp_flags = header[13];
        }
        UDP | SCTP => {
            let header: [u8; 4] = ctx.load(at)?;
            ports(&header, packet);
        }
        ICMP => {
            let header: [u8; 8] = ctx.load(at)?;
            packet.icmp = u16::from_ne_bytes([header[0], header[1]]);
            match header[0] {
                // Echo, timestamp, and their replies: the identifier stands for both ports.
                0 | 8 | 13 | 14 => {
                    let id = u16::from_ne_bytes([header[4], header[5]]);
                    (packet.source_port, packet.destination_port) = (id, id);
                }
                // Unreachable, time exceeded, bad parameter: they belong to the flow of the packet that they quote.
                3 | 11 | 12 => return quoted(ctx, at + 8, packet),
                _ => {}
            }
        }
        // Protocols without ports are judged by addresses alone.
        _ => {}
    }
    Some(())
}

#[inline(always)]
fn ports(header: &[u8], packet: &mut Packet) {
    packet.source_port = u16::from_ne_bytes([header[0], header[1]]);
    packet.destination_port = u16::from_ne_bytes([header[2], header[3]]);
}

/// Takes the flow from the packet that an ICMP error quotes; it went the other way.
#[inline(always)]
fn quoted(ctx: &impl Frame, at: usize, packet: &mut Packet) -> Option<()> {
    let header: [u8; 20] = ctx.load(at)?;
    let words = usize::from(header[0] & 0x0f);
    if header[0] >> 4 != 4 || words < 5 {
        return None;
    }
    packet.error = true;
    packet.protocol = header[9];
    if packet.protocol == TCP || packet.protocol == UDP || packet.protocol == SCTP {
        let quoted: [u8; 4] = ctx.load(at + words * 4)?;
        packet.destination_port = u16::from_ne_bytes([quoted[0], quoted[1]]);
        packet.source_port = u16::from_ne_bytes([quoted[2], quoted[3]]);
    } else if packet.protocol == ICMP {
        let quoted: [u8; 8] = ctx.load(at + words * 4)?;
        let id = u16::from_ne_bytes([quoted[4], quoted[5]]);
        (packet.source_port, packet.destination_port) = (id, id);
    }
    // The error may come from a router on the way; the flow is between the quoted ends.
    packet.destination = u32::from_ne_bytes([header[12], header[13], header[14], header[15]]);
    packet.source = u32::from_ne_bytes([header[16], header[17], header[18], header[19]]);
    Some(())
}

/// Bytes of the packet.
#[inline(always)]
pub fn length(ctx: &TcContext) -> u16 {
    let skb: *const __sk_buff = ctx.skb.skb;
    // SAFETY: the kernel gives a valid context for the whole call.
    let length = unsafe { (*skb).len };
    if length > 0xffff {
        u16::MAX
    } else {
        length as u16
    }
}
