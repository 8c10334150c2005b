//! Changing a packet's addresses and ports, and keeping its checksums right.

use aya_ebpf::bindings::__sk_buff;
use aya_ebpf::programs::{TcContext, XdpContext};
use xebec_dataplane_common::ip::Ip;
use xebec_dataplane_common::nat::Tuple;
use xebec_dataplane_common::{ICMP, ICMP6, SCTP, TCP, UDP};

use crate::crc;
use crate::frame::{Change, Frame, differ, differ_ip, difference, mended};
use crate::packet::{ETHERNET, IPV6, Packet};
use crate::scratch::scratch;

/// Where IPv4's checksum lies within its header.
pub const IP_CHECKSUM: usize = 10;

/// Gives the packet the addresses and ports of `to`; false if it can't be changed, and then it must be dropped.
#[inline(always)]
pub fn apply(ctx: &TcContext) -> bool {
    xebec_rewrite(ctx.skb.skb) != 0
}

/// The same; checked by itself and once.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn xebec_rewrite(skb: *mut __sk_buff) -> u32 {
    let Some(all) = scratch() else {
        return 0;
    };
    u32::from(change(&TcContext::new(skb), &all.packet, &all.to).is_some())
}

/// The same for XDP.
#[inline(never)]
pub fn apply_early(ctx: &XdpContext, packet: &Packet, to: &Tuple) -> bool {
    change(ctx, packet, to).is_some()
}

/// Writes both addresses of the network header at `network`, and mends IPv4's checksum.
#[inline(always)]
pub fn addresses(ctx: &impl Frame, network: usize, old: (&Ip, &Ip), new: (&Ip, &Ip)) -> Option<()> {
    if new.0.is_v4() {
        let header = ctx.header(network, 20)?;
        let checksum: u16 = header.at(IP_CHECKSUM);
        let sum = differ(0, old.0.as_v4(), new.0.as_v4());
        let sum = differ(sum, old.1.as_v4(), new.1.as_v4());
        header.set(IP_CHECKSUM, &mended(checksum, difference(sum)));
        header.set(12, &new.0.as_v4());
        header.set(16, &new.1.as_v4());
    } else {
        let header = ctx.header(network, IPV6)?;
        header.set(8, new.0);
        header.set(24, new.1);
    }
    Some(())
}

#[inline(always)]
fn change(ctx: &impl Frame, packet: &Packet, to: &Tuple) -> Option<()> {
    let (transport, old) = (usize::from(packet.transport), &packet.tuple);
    let echo = old.protocol == ICMP || old.protocol == ICMP6;
    // Where the transport's checksum lies; a later fragment has none.
    let checksum = match old.protocol {
        _ if packet.is_later() => 0,
        TCP => transport + 16,
        UDP => transport + 6,
        ICMP | ICMP6 => transport + 2,
        _ => 0,
    };
    let ports = !packet.is_later()
        && (old.source_port != to.source_port || old.destination_port != to.destination_port);
    if ports && old.protocol == SCTP {
        associated(ctx, packet, to)?;
    } else if ports && checksum == 0 {
        // Others have no ports.
        return None;
    }
    let udp = old.protocol == UDP;
    let mut sum = differ_ip(0, &old.source, &to.source);
    sum = differ_ip(sum, &old.destination, &to.destination);
    // ICMP of IPv4 alone has no pseudo header.
    let moved = old.source != to.source || old.destination != to.destination;
    if moved && checksum != 0 && old.protocol != ICMP {
        let addresses = Change {
            by: difference(sum),
            pseudo: true,
            udp,
            v6: packet.is_v6(),
        };
        ctx.mend_transport(checksum, addresses)?;
    }
    if ports && checksum != 0 {
        let mut sum = differ(0, old.source_port.into(), to.source_port.into());
        // An identifier stands for both.
        if !echo {
            sum = differ(sum, old.destination_port.into(), to.destination_port.into());
        }
        let change = Change {
            by: difference(sum),
            pseudo: false,
            udp,
            v6: packet.is_v6(),
        };
        ctx.mend_transport(checksum, change)?;
        if echo {
            ctx.write(transport + 4, &to.source_port)?;
        } else {
            ctx.write(transport, &[to.source_port, to.destination_port])?;
        }
    }
    addresses(
        ctx,
        ETHERNET,
        (&old.source, &old.destination),
        (&to.source, &to.destination),
    )
}

/// Gives an SCTP packet its new ports and a checksum that fits.
#[inline(always)]
fn associated(ctx: &impl Frame, packet: &Packet, to: &Tuple) -> Option<()> {
    // How long the whole is, no fragment tells.
    if packet.fragment != 0 {
        return None;
    }
    let (transport, old) = (usize::from(packet.transport), &packet.tuple);
    let network = if packet.is_v6() {
        let length: u16 = ctx.read(ETHERNET + 4)?;
        u32::from(u16::from_be(length)) + IPV6 as u32
    } else {
        let length: u16 = ctx.read(ETHERNET + 2)?;
        u32::from(u16::from_be(length))
    };
    let length = network.checked_sub((transport - ETHERNET) as u32)?;
    let checksum: u32 = ctx.read(transport + 8)?;
    // None yet: the last device makes it (as for packets of pods), or the ends have agreed on none (RFC 9653).
    if checksum != 0 {
        let first = pair(
            old.source_port ^ to.source_port,
            old.destination_port ^ to.destination_port,
        );
        ctx.write(
            transport + 8,
            &(checksum ^ crc::xebec_crc_difference(first, length)),
        )?;
    }
    ctx.write(transport, &[to.source_port, to.destination_port])
}

/// Two ports as they lie in a header.
#[inline(always)]
pub fn pair(first: u16, second: u16) -> u32 {
    let ([a, b], [c, d]) = (first.to_ne_bytes(), second.to_ne_bytes());
    u32::from_ne_bytes([a, b, c, d])
}

/// Takes one hop off the packet's time to live, as a router does; false, and nothing changed, if none is left or the
/// headers are not at hand.
#[inline(always)]
pub fn hop(ctx: &impl Frame, packet: &Packet) -> bool {
    if packet.ttl <= 1 {
        return false;
    }
    let Some(place) = ctx.place(ETHERNET, 20) else {
        return false;
    };
    let header = place as *mut u8;
    // SAFETY: the bounds of the header were checked against the end of the packet just above.
    unsafe {
        if packet.is_v6() {
            *header.add(7) -= 1;
            return true;
        }
        *header.add(8) -= 1;
        // RFC 1624: the high byte of the word fell by one, so the sum of the others rises by 0x100.
        let checksum = header.add(IP_CHECKSUM) as *mut u16;
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

/// Addresses the frame to whom it came from; false, and nothing changed, if it is too short.
#[inline(always)]
pub fn turn_round(ctx: &TcContext) -> bool {
    let (start, end) = (ctx.data(), ctx.data_end());
    if start + ETHERNET > end {
        return false;
    }
    let bytes = start as *mut [u8; 6];
    // SAFETY: the bounds of the header were checked against the end of the packet just above.
    unsafe {
        let (to, from) = (
            core::ptr::read_unaligned(bytes),
            core::ptr::read_unaligned(bytes.add(1)),
        );
        core::ptr::write_unaligned(bytes, from);
        core::ptr::write_unaligned(bytes.add(1), to);
    }
    true
}
