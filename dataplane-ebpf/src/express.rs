//! XDP hook at the devices that lead to other nodes and the outside: the simple part of what `network` does, before
//! the kernel makes a packet of the frame.
//!
//! Whatever is not simple passes untouched, and tc does it as if there were no XDP.

use aya_ebpf::bindings::BPF_FIB_LKUP_RET_SUCCESS;
use aya_ebpf::bindings::xdp_action::{XDP_DROP, XDP_PASS, XDP_TX};
use aya_ebpf::helpers::generated::bpf_redirect;
use aya_ebpf::macros::xdp;
use aya_ebpf::programs::XdpContext;
use xebec_dataplane_common::flow::FROM_NETWORK;
use xebec_dataplane_common::nat::{BACK_BY_QUEUE, BACK_BY_REDIRECT};
use xebec_dataplane_common::{ICMP, ICMP6, SCTP, TCP, UDP};

use crate::frame::Frame;
use crate::lookup::At;
use crate::packet::{self, Packet};
use crate::rewrite;
use crate::route;
use crate::scratch::{Scratch, scratch, settle};
use crate::tell::{self, As};
use crate::translate::{self, Plan};
use crate::way;

/// Where a frame goes.
#[derive(Clone, Copy)]
#[repr(u8)]
enum Goes {
    /// Up to the stack.
    Up,
    /// Out of the device of its way.
    Out,
    /// Back by the queue that it came by.
    Back,
}

/// What comes in: answers to translated flows, and connections to node ports.
#[xdp]
pub fn xebec_express(ctx: XdpContext) -> u32 {
    let Some(all) = scratch() else {
        return XDP_PASS;
    };
    if packet::read_simple(&ctx, &mut all.packet).is_none() {
        return XDP_PASS;
    }
    if all.packet.ttl <= 1 || !is_simple(&ctx, &all.packet) {
        return XDP_PASS;
    }
    let plan = translate::plan(all, At::Early);
    if plan != Plan::Known && plan != Plan::Begins {
        return XDP_PASS;
    }
    settle();
    all.goes = Goes::Up as u8;
    // The way is found before anything is entered or changed: a frame that tc must send, because the neighbour is
    // not known yet for example, is still the frame that came, of a flow that has not begun.
    if all.stays == 0 {
        match find_way(&ctx, all) {
            Some(found) => all.goes = found as u8,
            None => return XDP_PASS,
        }
    }
    if plan == Plan::Begins {
        if !translate::begin(all) {
            return XDP_PASS;
        }
        tell::tell_translated(FROM_NETWORK);
    }
    settle();
    if !rewrite::apply_early(&ctx, &all.packet, &all.to) {
        return XDP_DROP;
    }
    tell::count(As::TranslatedEarly);
    // Read back: kept across the calls above, frames of Linux 6.1 went back by the wrong device. Its check seems to have
    // taken a branch for dead that was not.
    settle();
    let goes = all.goes;
    if goes == Goes::Up as u8 {
        return XDP_PASS;
    }
    if !rewrite::hop(&ctx, &all.packet) || ctx.write(0, &all.way.hardware).is_none() {
        return XDP_DROP;
    }
    if goes == Goes::Back as u8 {
        return XDP_TX;
    }
    // SAFETY: the helper takes numbers alone.
    unsafe { bpf_redirect(all.way.device, 0) as u32 }
}

/// Whether the packet is of a kind that is translated here, with all of its transport's header at hand.
#[inline(always)]
fn is_simple(ctx: &XdpContext, packet: &Packet) -> bool {
    let header = match packet.tuple.protocol {
        TCP => 20,
        UDP => 8,
        SCTP => 16,
        // Echo and its reply.
        ICMP if matches!(packet.icmp.to_ne_bytes()[0], 0 | 8) => 8,
        ICMP6 if matches!(packet.icmp.to_ne_bytes()[0], 128 | 129) => 8,
        _ => return false,
    };
    ctx.place(usize::from(packet.transport), header).is_some()
}

/// Looks for the way to where a packet goes; none if there is none that a frame can take from here.
#[inline(always)]
fn find_way(ctx: &XdpContext, all: &mut Scratch) -> Option<Goes> {
    let device = ctx.ingress_ifindex() as u32;
    // What does not fit the way's MTU is tc's: it answers for it.
    let length = way::length(ctx, &all.packet)?;
    let found = route::ask(ctx, all, device, length);
    if found != Some(BPF_FIB_LKUP_RET_SUCCESS) {
        return None;
    }
    // A device without the program may have no queues for such frames, or may not be one that has frames at all: it
    // would lose them.
    if !matches!(all.way.back, BACK_BY_QUEUE | BACK_BY_REDIRECT) {
        return None;
    }
    let same = all.way.back == BACK_BY_QUEUE && all.way.device == device;
    Some(if same { Goes::Back } else { Goes::Out })
}
