//! Changing a packet's addresses and ports, and keeping its checksums right.

use aya_ebpf::programs::{TcContext, XdpContext};
use xebec_dataplane_common::nat::Tuple;
use xebec_dataplane_common::{ICMP, TCP, UDP};

use crate::frame::{Field, Frame};
use crate::packet::{ETHERNET, Packet};

const IP_TTL: usize = ETHERNET + 8;
/// Bytes of the headers that a hop changes.
const HEADERS: usize = ETHERNET + 20;
/// The IPv4 header's checksum.
pub const IP_CHECKSUM: usize = ETHERNET + 10;
/// Its source.
pub const IP_SOURCE: usize = ETHERNET + 12;
/// Its destination.
pub const IP_DESTINATION: usize = ETHERNET + 16;

/// Gives the packet the addresses and ports of `to`; false if it can't be changed, and then it must be dropped.
#[inline(never)]
pub fn apply(ctx: &TcContext, packet: &Packet, to: &Tuple) -> bool {
    change(ctx, packet, to).is_some()
}

/// The same for XDP.
#[inline(never)]
pub fn apply_early(ctx: &XdpContext, packet: &Packet, to: &Tuple) -> bool {
    change(ctx, packet, to).is_some()
}

#[inline(always)]
fn change(ctx: &impl Frame, packet: &Packet, to: &Tuple) -> Option<()> {
    let transport = ETHERNET + usize::from(packet.header);
    // Where the transport's checksum lies; a later fragment has none.
    let checksum = match packet.protocol {
        _ if packet.later => 0,
        TCP => transport + 16,
        UDP => transport + 6,
        _ => 0,
    };
    let udp = packet.protocol == UDP;
    for (at, old, new) in [
        (IP_SOURCE, packet.source, to.source),
        (IP_DESTINATION, packet.destination, to.destination),
    ] {
        if old == new {
            continue;
        }
        if checksum != 0 {
            let address = Field {
                size: 4,
                pseudo: true,
                udp,
            };
            ctx.mend_transport(checksum, old, new, address)?;
        }
        ctx.mend_ip(IP_CHECKSUM, old, new)?;
        ctx.store(at, &new)?;
    }
    if packet.later {
        return Some(());
    }
    if packet.protocol == ICMP {
        // The identifier stands for both ports.
        let (old, new) = (packet.source_port, to.source_port);
        return port(ctx, transport + 2, false, transport + 4, old, new);
    }
    let (old, new) = (packet.source_port, to.source_port);
    port(ctx, checksum, udp, transport, old, new)?;
    let (old, new) = (packet.destination_port, to.destination_port);
    port(ctx, checksum, udp, transport + 2, old, new)
}

/// Changes one port. Protocols whose checksum can't be mended (SCTP's is a CRC of everything) keep theirs.
#[inline(always)]
fn port(ctx: &impl Frame, checksum: usize, udp: bool, at: usize, old: u16, new: u16) -> Option<()> {
    if old == new {
        return Some(());
    }
    if checksum == 0 {
        return None;
    }
    let port = Field {
        size: 2,
        pseudo: false,
        udp,
    };
    ctx.mend_transport(checksum, u32::from(old), u32::from(new), port)?;
    ctx.store(at, &new)
}

/// Takes one hop off the packet's time to live, as a router does; false, and nothing changed, if none is left or the
/// headers are not at hand.
#[inline(always)]
pub fn hop(ctx: &impl Frame, packet: &Packet) -> bool {
    let (start, end) = ctx.bounds();
    if packet.ttl <= 1 || start + HEADERS > end {
        return false;
    }
    let bytes = start as *mut u8;
    // SAFETY: the bounds of both headers were checked against the end of the packet just above.
    unsafe {
        *bytes.add(IP_TTL) -= 1;
        // RFC 1624: the high byte of the word fell by one, so the sum of the others rises by 0x100.
        let checksum = bytes.add(IP_CHECKSUM) as *mut u16;
        let sum = u32::from(u16::from_be(core::ptr::read_unaligned(checksum))) + 0x100;
        core::ptr::write_unaligned(checksum, ((sum + (sum >> 16)) as u16).to_be());
    }
    true
}

/// Addresses the frame to `mac`, from whom it was addressed to before; false, and nothing changed, if it is too short.
#[inline(always)]
pub fn forward_to(ctx: &TcContext, mac: [u8; 6]) -> bool {
    let (start, end) = (ctx.data(), ctx.data_end());
    if start + ETHERNET > end {
        return false;
    }
    let bytes = start as *mut [u8; 6];
    // SAFETY: the bounds of the header were checked against the end of the packet just above.
    unsafe {
        let router = core::ptr::read_unaligned(bytes);
        core::ptr::write_unaligned(bytes, mac);
        core::ptr::write_unaligned(bytes.add(1), router);
    }
    true
}
