//! XDP hook at the devices that lead to other nodes and the outside: the simple part of what `network` does, before
//! the kernel makes a packet of the frame.
//!
//! Whatever is not simple passes untouched, and tc does it as if there were no XDP.

use core::mem::zeroed;

use aya_ebpf::bindings::xdp_action::{XDP_DROP, XDP_PASS, XDP_TX};
use aya_ebpf::bindings::{BPF_FIB_LKUP_RET_SUCCESS, bpf_fib_lookup};
use aya_ebpf::helpers::generated::bpf_redirect;
use aya_ebpf::macros::xdp;
use aya_ebpf::programs::XdpContext;
use xebec_dataplane_common::nat::{BACK_BY_QUEUE, Tuple};
use xebec_dataplane_common::{ICMP, ICMP6, SCTP, TCP, UDP};

use crate::frame::Frame;
use crate::maps::EXPRESS;
use crate::packet::{self, Packet};
use crate::rewrite;
use crate::scratch::{scratch, settle};
use crate::tell::{self, As};
use crate::translate::{self, Plan};
use crate::way;

/// Where a frame goes that leaves the node.
struct Way {
    /// The device; 0 for a frame that stays.
    device: u32,
    /// Whether it goes back by the queue that it came by.
    back: bool,
    /// Hardware addresses: whose it goes to, and whose it comes from.
    hardware: [[u8; 6]; 2],
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
    let plan = translate::plan(all);
    if plan != Plan::Known && plan != Plan::Begins {
        return XDP_PASS;
    }
    settle();
    let mut way = Way {
        device: 0,
        back: false,
        hardware: [[0; 6]; 2],
    };
    // The way is found before anything is entered or changed: a frame that tc must send, because the neighbour is
    // not known yet for example, is still the frame that came, of a flow that has not begun.
    if !translate::stays(&all.to) && !find_way(&ctx, &all.packet, &all.to, &mut way) {
        return XDP_PASS;
    }
    if plan == Plan::Begins && !translate::begin(all) {
        return XDP_PASS;
    }
    settle();
    if !rewrite::apply_early(&ctx, &all.packet, &all.to) {
        return XDP_DROP;
    }
    tell::count(As::TranslatedEarly);
    if way.device == 0 {
        return XDP_PASS;
    }
    if !rewrite::hop(&ctx, &all.packet) || ctx.write(0, &way.hardware).is_none() {
        return XDP_DROP;
    }
    if way.back {
        return XDP_TX;
    }
    // SAFETY: the helper takes numbers alone.
    unsafe { bpf_redirect(way.device, 0) as u32 }
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

/// Asks the routing table for the way to where a packet goes; false if it knows none that a frame can take from here.
#[inline(always)]
fn find_way(ctx: &XdpContext, packet: &Packet, to: &Tuple, way: &mut Way) -> bool {
    // SAFETY: the kernel's structure holds numbers alone, of which all may be 0.
    let mut route: bpf_fib_lookup = unsafe { zeroed() };
    let device = ctx.ingress_ifindex() as u32;
    // What does not fit the way's MTU is tc's: it answers for it.
    let Some(length) = way::length(ctx, packet) else {
        return false;
    };
    let found = way::ask(ctx, packet, to, &mut route, (device, length));
    if found != Some(i64::from(BPF_FIB_LKUP_RET_SUCCESS)) {
        return false;
    }
    // A device without the program may have no queues for such frames, or may not be one that has frames at all: it
    // would lose them.
    // SAFETY: the value is read once, here.
    let Some(&back) = (unsafe { EXPRESS.get(&route.ifindex) }) else {
        return false;
    };
    way.device = route.ifindex;
    way.back = back == BACK_BY_QUEUE && route.ifindex == device;
    way.hardware = [route.dmac, route.smac];
    true
}
