//! Changing a packet's addresses and ports, and keeping its checksums right.

use aya_ebpf::programs::TcContext;
use xebec_dataplane_common::nat::Tuple;
use xebec_dataplane_common::{ICMP, TCP, UDP};

use crate::packet::{ETHERNET, Packet};

/// `BPF_F_PSEUDO_HDR`: the field is part of the pseudo header.
const PSEUDO: u64 = 0x10;
/// `BPF_F_MARK_MANGLED_0`: a UDP checksum of 0 means none, and stays.
const ZERO_STAYS: u64 = 0x20;

const IP_TTL: usize = ETHERNET + 8;
/// Bytes of the headers that a hop changes.
const HEADERS: usize = ETHERNET + 20;
const IP_CHECKSUM: usize = ETHERNET + 10;
const IP_SOURCE: usize = ETHERNET + 12;
const IP_DESTINATION: usize = ETHERNET + 16;

/// Gives the packet the addresses and ports of `to`; false if it can't be changed, and then it must be dropped.
#[inline(never)]
pub fn apply(ctx: &TcContext, packet: &Packet, to: &Tuple) -> bool {
    change(ctx, packet, to).is_some()
}

#[inline(always)]
fn change(ctx: &TcContext, packet: &Packet, to: &Tuple) -> Option<()> {
    let transport = ETHERNET + usize::from(packet.header);
    // Where the transport's checksum lies; a later fragment has none.
    let (checksum, flags) = match packet.protocol {
        _ if packet.later => (0, 0),
        TCP => (transport + 16, 0),
        UDP => (transport + 6, ZERO_STAYS),
        _ => (0, 0),
    };
    for (at, old, new) in [
        (IP_SOURCE, packet.source, to.source),
        (IP_DESTINATION, packet.destination, to.destination),
    ] {
        if old == new {
            continue;
        }
        if checksum != 0 {
            ctx.l4_csum_replace(checksum, u64::from(old), u64::from(new), PSEUDO | flags | 4)
                .ok()?;
        }
        ctx.l3_csum_replace(IP_CHECKSUM, u64::from(old), u64::from(new), 4)
            .ok()?;
        ctx.store(at, &new, 0).ok()?;
    }
    if packet.later {
        return Some(());
    }
    if packet.protocol == ICMP {
        // The identifier stands for both ports.
        if packet.source_port != to.source_port {
            port(
                ctx,
                transport + 2,
                0,
                transport + 4,
                packet.source_port,
                to.source_port,
            )?;
        }
        return Some(());
    }
    if packet.source_port != to.source_port {
        port(
            ctx,
            checksum,
            flags,
            transport,
            packet.source_port,
            to.source_port,
        )?;
    }
    if packet.destination_port != to.destination_port {
        port(
            ctx,
            checksum,
            flags,
            transport + 2,
            packet.destination_port,
            to.destination_port,
        )?;
    }
    Some(())
}

/// Changes one port. Protocols whose checksum can't be mended (SCTP's is a CRC of everything) keep theirs.
#[inline(always)]
fn port(ctx: &TcContext, checksum: usize, flags: u64, at: usize, old: u16, new: u16) -> Option<()> {
    if checksum == 0 {
        return None;
    }
    ctx.l4_csum_replace(checksum, u64::from(old), u64::from(new), flags | 2)
        .ok()?;
    ctx.store(at, &new, 0).ok()
}

/// Takes one hop off the packet's time to live, as a router does; false, and nothing changed, if none is left or the
/// headers are not at hand.
#[inline(always)]
pub fn hop(ctx: &TcContext, packet: &Packet) -> bool {
    let (start, end) = (ctx.data(), ctx.data_end());
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
