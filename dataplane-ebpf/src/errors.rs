//! ICMP errors about translated flows: whom they are for, and the packet that they quote, become what the flow was
//! before it was translated. Without them, a sender behind a translation never learns that nobody listens, or that
//! its packets are too long.

use aya_ebpf::programs::TcContext;
use xebec_dataplane_common::nat::Tuple;
use xebec_dataplane_common::{ICMP, TCP, UDP};

use crate::frame::{Field, Frame, mended};
use crate::nat;
use crate::packet::{ETHERNET, Packet};
use crate::rewrite::{IP_CHECKSUM, IP_DESTINATION, IP_SOURCE};

/// What is to be done with an error.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    /// It is about no flow that is translated.
    Leave,
    /// It was changed.
    Changed,
    /// It could not be changed wholly.
    Broken,
}

/// Translates an error; `to` is the flow's translation.
#[inline(never)]
pub fn translate(ctx: &TcContext, packet: &Packet, to: &mut Tuple) -> Outcome {
    if !nat::look(&nat::tuple(packet), to) {
        return Outcome::Leave;
    }
    // Of a router on the way, too: who must not see the far end's address must not see the way to it.
    let sender = if to.source == packet.source {
        packet.carrier.0
    } else {
        to.source
    };
    let carried = address(ctx, IP_SOURCE, IP_CHECKSUM, packet.carrier.0, sender).and_then(|()| {
        let (old, new) = (packet.carrier.1, to.destination);
        address(ctx, IP_DESTINATION, IP_CHECKSUM, old, new)
    });
    if carried.is_some() && quoted(ctx, packet, to).is_some() {
        Outcome::Changed
    } else {
        Outcome::Broken
    }
}

/// Changes an address and its header's checksum. The header's sum stays what it was, so the checksum of an error that
/// quotes it holds on.
#[inline(always)]
fn address(ctx: &TcContext, at: usize, checksum: usize, old: u32, new: u32) -> Option<()> {
    if old == new {
        return Some(());
    }
    ctx.mend_ip(checksum, old, new)?;
    Frame::store(ctx, at, &new)
}

/// Changes the packet that the error quotes. It went the other way, so its source is the translation's destination.
#[inline(always)]
fn quoted(ctx: &TcContext, packet: &Packet, to: &Tuple) -> Option<()> {
    let error = ETHERNET + usize::from(packet.header);
    let inner = error + 8;
    let words: u8 = Frame::load(ctx, inner)?;
    let transport = inner + usize::from(words & 0x0f) * 4;
    let checksum = inner + IP_CHECKSUM - ETHERNET;
    for (at, old, new) in [
        (IP_SOURCE, packet.destination, to.destination),
        (IP_DESTINATION, packet.source, to.source),
    ] {
        address(ctx, inner + at - ETHERNET, checksum, old, new)?;
    }
    let error = error + 2;
    if packet.protocol == ICMP {
        // The identifier stands for both ports.
        let (old, new) = (packet.source_port, to.source_port);
        let sum: u16 = Frame::load(ctx, transport + 2)?;
        let mended = mended(sum, u32::from(old), u32::from(new));
        word(ctx, error, transport + 2, sum, mended)?;
        return word(ctx, error, transport + 4, old, new);
    }
    let ports = [
        (packet.destination_port, to.destination_port),
        (packet.source_port, to.source_port),
    ];
    for (index, (old, new)) in ports.into_iter().enumerate() {
        word(ctx, error, transport + 2 * index, old, new)?;
    }
    let at = match packet.protocol {
        TCP => transport + 16,
        UDP => transport + 6,
        _ => return Some(()),
    };
    // Eight bytes are quoted at least; TCP's checksum may be missing.
    let Some(old) = Frame::load::<u16>(ctx, at) else {
        return Some(());
    };
    if packet.protocol == UDP && old == 0 {
        return Some(());
    }
    let mut new = mended(old, packet.source, to.source);
    new = mended(new, packet.destination, to.destination);
    new = mended(new, ports[0].0.into(), ports[0].1.into());
    new = mended(new, ports[1].0.into(), ports[1].1.into());
    if packet.protocol == UDP && new == 0 {
        new = 0xffff;
    }
    word(ctx, error, at, old, new)
}

/// Changes two bytes that the error's checksum covers.
#[inline(always)]
fn word(ctx: &TcContext, checksum: usize, at: usize, old: u16, new: u16) -> Option<()> {
    if old == new {
        return Some(());
    }
    let field = Field {
        size: 2,
        pseudo: false,
        udp: false,
    };
    ctx.mend_transport(checksum, old.into(), new.into(), field)?;
    Frame::store(ctx, at, &new)
}
