//! ICMP errors about translated flows: whom they are for, and the packet that they quote, become what the flow was
//! before it was translated. Without them, a sender behind a translation never learns that nobody listens, or that
//! its packets are too long.

use aya_ebpf::bindings::__sk_buff;
use aya_ebpf::programs::TcContext;
use xebec_dataplane_common::nat::Tuple;
use xebec_dataplane_common::{ICMP, ICMP6, TCP, UDP};

use crate::frame::{Change, Frame, differ, differ_ip, difference, mended};
use crate::packet::{ETHERNET, Packet, quote};
use crate::rewrite::addresses;
use crate::scratch::scratch;

/// Translates an error about a flow that becomes `to`, and tells in it whom the error itself is for. False if it could
/// not be changed wholly, and then it must be dropped.
#[inline(always)]
pub fn apply(ctx: &TcContext) -> bool {
    xebec_translate_error(ctx.skb.skb) != 0
}

/// The same; checked by itself and once.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn xebec_translate_error(skb: *mut __sk_buff) -> u32 {
    let Some(all) = scratch() else {
        return 0;
    };
    u32::from(change(&TcContext::new(skb), &all.packet, &all.to).is_some())
}

#[inline(always)]
fn change(ctx: &TcContext, packet: &Packet, to: &Tuple) -> Option<()> {
    let (carrier, old) = (&packet.carrier, &packet.tuple);
    // Of a router on the way, too: who must not see the far end's address must not see the way to it.
    let sender = if to.source == old.source {
        carrier.0
    } else {
        to.source
    };
    // What of the error's checksum changes: of IPv6 its own addresses, and all that is quoted.
    if packet.is_v6() {
        let sum = differ_ip(0, &carrier.0, &sender);
        let sum = differ_ip(sum, &carrier.1, &to.destination);
        mend(ctx, packet, sum, true)?;
    }
    let new = (&sender, &to.destination);
    addresses(ctx, ETHERNET, (&carrier.0, &carrier.1), new)?;
    // It went the other way, so its source is the translation's destination. IPv4's header makes up for the change by
    // its own checksum.
    let (source, destination) = (&to.destination, &to.source);
    if packet.is_v6() {
        let sum = differ_ip(0, &old.destination, source);
        let sum = differ_ip(sum, &old.source, destination);
        mend(ctx, packet, sum, false)?;
    }
    let network = quote(packet);
    let quoted_ends = (&old.destination, &old.source);
    addresses(ctx, network, quoted_ends, (source, destination))?;
    quoted(ctx, packet, to)
}

/// Changes the transport header of the packet that the error quotes.
#[inline(always)]
fn quoted(ctx: &TcContext, packet: &Packet, to: &Tuple) -> Option<()> {
    let (at, old) = (usize::from(packet.quoted), &packet.tuple);
    if old.protocol == ICMP || old.protocol == ICMP6 {
        // The identifier stands for both ports.
        let mut sum = differ(0, old.source_port.into(), to.source_port.into());
        word(ctx, packet, at + 4, old.source_port, to.source_port)?;
        if packet.is_v6() {
            sum = differ_ip(sum, &old.source, &to.source);
            sum = differ_ip(sum, &old.destination, &to.destination);
        }
        let checksum: u16 = ctx.read(at + 2)?;
        let mended = mended(checksum, difference(sum));
        return word(ctx, packet, at + 2, checksum, mended);
    }
    word(ctx, packet, at, old.destination_port, to.destination_port)?;
    word(ctx, packet, at + 2, old.source_port, to.source_port)?;
    let at = match old.protocol {
        TCP => at + 16,
        UDP => at + 6,
        _ => return Some(()),
    };
    // Eight bytes are quoted at least; TCP's checksum may be missing.
    let Some(checksum) = ctx.read::<u16>(at) else {
        return Some(());
    };
    if old.protocol == UDP && checksum == 0 {
        return Some(());
    }
    let mut sum = differ_ip(0, &old.source, &to.source);
    sum = differ_ip(sum, &old.destination, &to.destination);
    sum = differ(sum, old.source_port.into(), to.source_port.into());
    sum = differ(sum, old.destination_port.into(), to.destination_port.into());
    let mut new = mended(checksum, difference(sum));
    if old.protocol == UDP && new == 0 {
        new = 0xffff;
    }
    word(ctx, packet, at, checksum, new)
}

/// Changes two bytes that the error's checksum covers.
#[inline(always)]
fn word(ctx: &TcContext, packet: &Packet, at: usize, old: u16, new: u16) -> Option<()> {
    if old == new {
        return Some(());
    }
    mend(ctx, packet, differ(0, old.into(), new.into()), false)?;
    ctx.write(at, &new)
}

/// Mends the error's own checksum.
#[inline(always)]
fn mend(ctx: &TcContext, packet: &Packet, sum: u64, pseudo: bool) -> Option<()> {
    let change = Change {
        by: difference(sum),
        pseudo,
        udp: false,
        v6: packet.is_v6(),
    };
    ctx.mend_transport(usize::from(packet.transport) + 2, change)
}
