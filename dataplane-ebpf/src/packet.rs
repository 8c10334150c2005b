//! Reading a packet: addresses, ports, flags; IPv4 with options, IPv6 with extension headers, fragments of both.

use aya_ebpf::bindings::__sk_buff;
use aya_ebpf::programs::TcContext;
use xebec_dataplane_common::ip::Ip;
use xebec_dataplane_common::nat::Tuple;
use xebec_dataplane_common::{ICMP, ICMP6, SCTP, TCP, UDP};

use crate::flow::{ACK, FIN, RST, SYN, now_ns};
use crate::frame::{FURTHEST, Frame};
use crate::maps::{FRAGMENTS, remember};
use crate::scratch::{scratch, settle};

/// Bytes of the Ethernet header.
pub const ETHERNET: usize = 14;
/// Bytes of an IPv6 header.
pub const IPV6: usize = 40;
pub const ETHERTYPE_IPV4: u16 = 0x0800_u16.to_be();
pub const ETHERTYPE_IPV6: u16 = 0x86dd_u16.to_be();
const ETHERTYPE_ARP: u16 = 0x0806_u16.to_be();

/// Headers of an ordinary packet are at hand with this many bytes.
const USUAL: u32 = (ETHERNET + 60 + 20) as u32;
/// Those of an error, with the packet that it quotes and extension headers of both.
const WITH_QUOTE: u32 = (FURTHEST + 20) as u32;

/// Extension headers of IPv6 that are read past.
const EXTENSIONS: usize = 6;
const HOP_BY_HOP: u8 = 0;
const ROUTING: u8 = 43;
const FRAGMENT: u8 = 44;
const AUTHENTICATION: u8 = 51;
const DESTINATION: u8 = 60;

/// Types of SCTP's chunks.
const INIT: u8 = 1;
const INIT_ACK: u8 = 2;
const ABORT: u8 = 6;
const SHUTDOWN_COMPLETE: u8 = 14;

/// What of a packet is judged.
pub struct Packet {
    /// Addresses, ports and protocol. Of an ICMP error those of the flow that it is about, seen from the error's side.
    pub tuple: Tuple,
    /// The addresses of an error itself; its sender may be a router on the way.
    pub carrier: (Ip, Ip),
    /// When it came, in ns of the monotonic clock, exact to a few ms.
    pub seen: u64,
    /// Bytes of its frame.
    pub length: u32,
    /// Where the transport's header lies.
    pub transport: u16,
    /// Where the transport's header of the packet lies that an error quotes.
    pub quoted: u16,
    /// What fragments of a datagram have in common.
    pub id: u32,
    /// Type and code of ICMP, for events.
    pub icmp: u16,
    /// TCP flags; of SCTP those that its first chunk stands for.
    pub tcp_flags: u8,
    /// Hops that are left.
    pub ttl: u8,
    /// 1 for IPv6.
    pub v6: u8,
    /// 1 for the first fragment of a datagram, 2 for a later one: its ports are those of the first, and it has no
    /// transport header.
    pub fragment: u8,
    /// 1 for an ICMP error.
    pub error: u8,
    /// 1 for neighbour discovery and the like, which is the link's business.
    pub link: u8,
}

/// What reading gave.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Read {
    /// An IP packet.
    Ip,
    /// ARP or neighbour discovery, which is the stack's business.
    Link,
    /// Another protocol of the network layer.
    Other,
    /// Cut short or contradictory.
    Invalid,
    /// A fragment that came before the first of its datagram: what it belongs to can't be told.
    Early,
}

impl Packet {
    /// Forgets the packet before. Addresses are always written.
    #[inline(always)]
    fn clear(&mut self) {
        self.tuple.source_port = 0;
        self.tuple.destination_port = 0;
        self.icmp = 0;
        self.tcp_flags = 0;
        self.v6 = 0;
        self.fragment = 0;
        self.error = 0;
        self.link = 0;
    }

    /// Whether it is IPv6.
    #[inline(always)]
    pub fn is_v6(&self) -> bool {
        self.v6 != 0
    }

    /// Whether it is a fragment without a transport header.
    #[inline(always)]
    pub fn is_later(&self) -> bool {
        self.fragment == 2
    }

    /// Whether it is an ICMP error.
    #[inline(always)]
    pub fn is_error(&self) -> bool {
        self.error != 0
    }

    /// The sender of the packet itself.
    #[inline(always)]
    pub fn sender(&self) -> &Ip {
        if self.is_error() {
            &self.carrier.0
        } else {
            &self.tuple.source
        }
    }

    /// Whether an error is about a flow of its own sender.
    #[inline(always)]
    pub fn is_of_sender(&self) -> bool {
        !self.is_error() || self.tuple.source == self.carrier.0
    }

    /// Whether an error is for an end of the flow that it is about.
    #[inline(always)]
    pub fn is_for_receiver(&self) -> bool {
        !self.is_error() || self.tuple.destination == self.carrier.1
    }

    /// Whom the packet itself is for.
    #[inline(always)]
    pub fn receiver(&self) -> &Ip {
        if self.is_error() {
            &self.carrier.1
        } else {
            &self.tuple.destination
        }
    }
}

/// Reads the packet's headers; they stand in this CPU's memory then.
#[inline(always)]
pub fn read(ctx: &TcContext) -> Read {
    let read = xebec_read(ctx.skb.skb);
    settle();
    match read {
        IP => Read::Ip,
        LINK => Read::Link,
        OTHER => Read::Other,
        EARLY => Read::Early,
        _ => Read::Invalid,
    }
}

const INVALID: u32 = 0;
const IP: u32 = 1;
const LINK: u32 = 2;
const OTHER: u32 = 3;
const EARLY: u32 = 4;

/// Of the kind that is checked once: the many forms of headers are not followed to the end of each program.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn xebec_read(skb: *mut __sk_buff) -> u32 {
    let Some(all) = scratch() else {
        return INVALID;
    };
    match headers(&TcContext::new(skb), &mut all.packet) {
        Read::Ip => IP,
        Read::Link => LINK,
        Read::Other => OTHER,
        Read::Early => EARLY,
        Read::Invalid => INVALID,
    }
}

#[inline(always)]
fn headers(ctx: &TcContext, packet: &mut Packet) -> Read {
    packet.clear();
    packet.seen = now_ns();
    // SAFETY: the kernel gives a valid context for the whole call.
    packet.length = unsafe { (*ctx.skb.skb).len };
    at_hand(ctx, USUAL);
    let Some(ethertype) = ctx.read::<u16>(12) else {
        return Read::Invalid;
    };
    let whole = match ethertype {
        ETHERTYPE_IPV4 => ipv4(ctx, packet),
        ETHERTYPE_IPV6 => ipv6(ctx, packet),
        ETHERTYPE_ARP => return Read::Link,
        _ => return Read::Other,
    };
    if whole.is_none() {
        return Read::Invalid;
    }
    settle();
    if !packet.is_later() && transport(ctx, packet).is_none() {
        return Read::Invalid;
    }
    settle();
    if packet.fragment != 0 && !part(packet) {
        return Read::Early;
    }
    if packet.is_error() {
        at_hand(ctx, WITH_QUOTE);
        if quoted(ctx, packet).is_none() {
            return Read::Invalid;
        }
        settle();
        if quoted_ports(ctx, packet).is_none() {
            return Read::Invalid;
        }
    }
    settle();
    if packet.link != 0 {
        return Read::Link;
    }
    Read::Ip
}

/// Makes some first bytes readable in place; a shorter packet has all of its own.
#[inline(always)]
fn at_hand(ctx: &TcContext, wanted: u32) {
    let (start, end) = ctx.bounds();
    if start + wanted as usize > end {
        let skb: *const __sk_buff = ctx.skb.skb;
        // SAFETY: the kernel gives a valid context for the whole call.
        let length = unsafe { (*skb).len };
        let wanted = if length < wanted { length } else { wanted };
        // Where this fails, the bytes are missed when they are read.
        let _ = ctx.pull_data(wanted);
    }
}

/// Reads a packet without options that is whole; none for all others.
#[inline(always)]
pub fn read_simple(ctx: &impl Frame, packet: &mut Packet) -> Option<()> {
    packet.clear();
    packet.seen = now_ns();
    let (start, end) = ctx.bounds();
    packet.length = (end - start) as u32;
    match ctx.read::<u16>(12)? {
        ETHERTYPE_IPV4 => {
            let (length, _, fragment) = addressed4(ctx, packet)?;
            if length != 20 || fragment & 0x3fff != 0 {
                return None;
            }
            packet.transport = (ETHERNET + 20) as u16;
        }
        ETHERTYPE_IPV6 => {
            addressed6(ctx, packet)?;
            packet.transport = (ETHERNET + IPV6) as u16;
        }
        _ => return None,
    }
    settle();
    transport(ctx, packet)?;
    settle();
    if packet.is_error() || packet.link != 0 {
        return None;
    }
    Some(())
}

/// What an IPv4 header says: how long it is, its identification, and the word of fragments.
#[inline(always)]
fn addressed4(ctx: &impl Frame, packet: &mut Packet) -> Option<(usize, u16, u16)> {
    let header = ctx.header(ETHERNET, 20)?;
    let first: u8 = header.at(0);
    let words = usize::from(first & 0x0f);
    if first >> 4 != 4 || words < 5 {
        return None;
    }
    packet.ttl = header.at(8);
    packet.tuple.protocol = header.at(9);
    packet.tuple.source = Ip::v4(header.at(12));
    packet.tuple.destination = Ip::v4(header.at(16));
    Some((words * 4, header.at(4), u16::from_be(header.at(6))))
}

/// What an IPv6 header says.
#[inline(always)]
fn addressed6(ctx: &impl Frame, packet: &mut Packet) -> Option<()> {
    let header = ctx.header(ETHERNET, IPV6)?;
    if header.at::<u8>(0) >> 4 != 6 {
        return None;
    }
    packet.v6 = 1;
    packet.tuple.protocol = header.at(6);
    packet.ttl = header.at(7);
    packet.tuple.source = header.ip(8);
    packet.tuple.destination = header.ip(24);
    // Such a packet says that it is of IPv6, and would be taken for one of IPv4.
    if packet.tuple.source.is_v4() || packet.tuple.destination.is_v4() {
        return None;
    }
    Some(())
}

#[inline(always)]
fn ipv4(ctx: &TcContext, packet: &mut Packet) -> Option<()> {
    let (length, id, fragment) = addressed4(ctx, packet)?;
    packet.transport = (ETHERNET + length) as u16;
    if fragment & 0x3fff != 0 {
        packet.fragment = 1 + u8::from(fragment & 0x1fff != 0);
        packet.id = u32::from(id);
    }
    Some(())
}

#[inline(always)]
fn ipv6(ctx: &TcContext, packet: &mut Packet) -> Option<()> {
    addressed6(ctx, packet)?;
    let mut at = ETHERNET + IPV6;
    for _ in 0..EXTENSIONS {
        let protocol = packet.tuple.protocol;
        // What follows a later fragment's header is no header.
        if !is_extension(protocol) || packet.is_later() {
            break;
        }
        let header = ctx.header(at, 8)?;
        packet.tuple.protocol = header.at(0);
        let words = usize::from(header.at::<u8>(1));
        at += match protocol {
            FRAGMENT => {
                let offset = u16::from_be(header.at(2));
                // A lone fragment is a whole packet.
                if offset & 0xfff9 != 0 {
                    packet.fragment = 1 + u8::from(offset >> 3 != 0);
                    packet.id = header.at(4);
                }
                8
            }
            AUTHENTICATION => 8 + words * 4,
            _ => 8 + words * 8,
        };
        if at > FURTHEST {
            return None;
        }
        packet.transport = at as u16;
        settle();
        at = usize::from(packet.transport);
    }
    packet.transport = at as u16;
    Some(())
}

#[inline(always)]
fn is_extension(protocol: u8) -> bool {
    matches!(
        protocol,
        HOP_BY_HOP | ROUTING | DESTINATION | AUTHENTICATION | FRAGMENT
    )
}

/// Who a fragment belongs with.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct Datagram {
    source: Ip,
    destination: Ip,
    id: u32,
    protocol: u32,
}

/// Takes a later fragment's ports from the first, or notes the first's for those to come; false for one that comes
/// before it.
#[inline(always)]
fn part(packet: &mut Packet) -> bool {
    let datagram = Datagram {
        source: packet.tuple.source,
        destination: packet.tuple.destination,
        id: packet.id,
        protocol: u32::from(packet.tuple.protocol),
    };
    if packet.is_later() {
        // SAFETY: the value is copied at once.
        let Some(ports) = (unsafe { FRAGMENTS.get(&datagram) }) else {
            return false;
        };
        packet.tuple.source_port = ports[0];
        packet.tuple.destination_port = ports[1];
        return true;
    }
    let ports = [packet.tuple.source_port, packet.tuple.destination_port];
    remember(&FRAGMENTS, &datagram, &ports, 0);
    true
}

#[inline(always)]
fn transport(ctx: &impl Frame, packet: &mut Packet) -> Option<()> {
    let at = usize::from(packet.transport);
    match packet.tuple.protocol {
        TCP => {
            let header = ctx.header(at, 14)?;
            packet.tcp_flags = header.at(13);
            packet.tuple.source_port = header.at(0);
            packet.tuple.destination_port = header.at(2);
        }
        UDP => {
            let header = ctx.header(at, 4)?;
            packet.tuple.source_port = header.at(0);
            packet.tuple.destination_port = header.at(2);
        }
        SCTP => {
            // At least one chunk comes behind the header; who begins or ends sends it alone or first.
            let header = ctx.header(at, 13)?;
            packet.tcp_flags = match header.at::<u8>(12) {
                INIT => SYN,
                INIT_ACK => SYN | ACK,
                ABORT => RST,
                SHUTDOWN_COMPLETE => FIN,
                _ => 0,
            };
            packet.tuple.source_port = header.at(0);
            packet.tuple.destination_port = header.at(2);
        }
        ICMP | ICMP6 => {
            let header = ctx.header(at, 8)?;
            let kind = Kind::of(packet, header.at(0));
            packet.icmp = header.at(0);
            match kind {
                // The identifier stands for both ports.
                Kind::Query => {
                    packet.tuple.source_port = header.at(4);
                    packet.tuple.destination_port = packet.tuple.source_port;
                }
                Kind::Error => packet.error = 1,
                Kind::Link => packet.link = 1,
                Kind::Other => {}
            }
        }
        // Protocols without ports are judged by addresses alone.
        _ => {}
    }
    Some(())
}

/// Kinds of ICMP messages.
enum Kind {
    /// Echo, timestamp, and their replies.
    Query,
    /// They belong to the flow of the packet that they quote.
    Error,
    /// Never beyond the link: neighbours, and listeners of groups.
    Link,
    Other,
}

impl Kind {
    #[inline(always)]
    fn of(packet: &Packet, kind: u8) -> Self {
        let v6 = packet.tuple.protocol == ICMP6;
        if v6 != packet.is_v6() {
            return Self::Other;
        }
        match kind {
            128 | 129 if v6 => Self::Query,
            0 | 8 | 13 | 14 if !v6 => Self::Query,
            // Unreachable, too big, time exceeded, bad parameter.
            1..=4 if v6 => Self::Error,
            3 | 11 | 12 if !v6 => Self::Error,
            130..=137 | 143 if v6 => Self::Link,
            _ => Self::Other,
        }
    }
}

/// Where the network header of the packet lies that an error quotes.
#[inline(always)]
pub fn quote(packet: &Packet) -> usize {
    usize::from(packet.transport) + 8
}

/// Takes the flow from the packet that an ICMP error quotes; it went the other way. The error may come from a router
/// on the way; the flow is between the quoted ends.
#[inline(always)]
fn quoted(ctx: &TcContext, packet: &mut Packet) -> Option<()> {
    let quote = quote(packet);
    // The carrier's addresses are read again rather than copied: LLVM breaks over a copy within the structure.
    if packet.is_v6() {
        let header = ctx.header(ETHERNET, IPV6)?;
        packet.carrier.0 = header.ip(8);
        packet.carrier.1 = header.ip(24);
        let header = ctx.header(quote, IPV6)?;
        packet.tuple.protocol = header.at(6);
        packet.tuple.destination = header.ip(8);
        packet.tuple.source = header.ip(24);
        packet.quoted = (quote + IPV6) as u16;
        settle();
        quoted_extensions(ctx, packet)
    } else {
        let header = ctx.header(ETHERNET, 20)?;
        packet.carrier.0 = Ip::v4(header.at(12));
        packet.carrier.1 = Ip::v4(header.at(16));
        let header = ctx.header(quote, 20)?;
        let words = usize::from(header.at::<u8>(0) & 0x0f);
        // A later fragment has no ports.
        if words < 5 || u16::from_be(header.at(6)) & 0x1fff != 0 {
            return None;
        }
        packet.tuple.protocol = header.at(9);
        packet.tuple.destination = Ip::v4(header.at(12));
        packet.tuple.source = Ip::v4(header.at(16));
        packet.quoted = (quote + words * 4) as u16;
        Some(())
    }
}

/// Reads past the extension headers of the packet that an error quotes.
#[inline(always)]
fn quoted_extensions(ctx: &TcContext, packet: &mut Packet) -> Option<()> {
    for _ in 0..EXTENSIONS {
        let protocol = packet.tuple.protocol;
        if !is_extension(protocol) {
            break;
        }
        let at = usize::from(packet.quoted);
        let header = ctx.header(at, 8)?;
        packet.tuple.protocol = header.at(0);
        let words = usize::from(header.at::<u8>(1));
        let length = match protocol {
            FRAGMENT => {
                // A later fragment has no ports.
                if u16::from_be(header.at(2)) >> 3 != 0 {
                    return None;
                }
                8
            }
            AUTHENTICATION => 8 + words * 4,
            _ => 8 + words * 8,
        };
        if at + length > FURTHEST {
            return None;
        }
        packet.quoted = (at + length) as u16;
        settle();
    }
    Some(())
}

/// The ports of the packet that an error quotes.
#[inline(always)]
fn quoted_ports(ctx: &TcContext, packet: &mut Packet) -> Option<()> {
    match packet.tuple.protocol {
        TCP | UDP | SCTP => {
            let header = ctx.header(usize::from(packet.quoted), 4)?;
            packet.tuple.destination_port = header.at(0);
            packet.tuple.source_port = header.at(2);
        }
        ICMP | ICMP6 => {
            let header = ctx.header(usize::from(packet.quoted), 8)?;
            packet.tuple.source_port = header.at(4);
            packet.tuple.destination_port = packet.tuple.source_port;
        }
        _ => {}
    }
    Some(())
}
