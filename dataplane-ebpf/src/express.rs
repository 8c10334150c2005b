//! XDP hook at the devices that lead to other nodes and the outside: the simple part of what `network` does, before
//! the kernel makes a packet of the frame.
//!
//! Whatever is not simple passes untouched, and tc does it as if there were no XDP.

use core::mem::zeroed;

use aya_ebpf::EbpfContext as _;
use aya_ebpf::bindings::xdp_action::{XDP_DROP, XDP_PASS, XDP_TX};
use aya_ebpf::bindings::{BPF_FIB_LKUP_RET_SUCCESS, bpf_fib_lookup};
use aya_ebpf::helpers::generated::{bpf_fib_lookup as ask_routes, bpf_redirect};
use aya_ebpf::macros::xdp;
use aya_ebpf::programs::XdpContext;
use xebec_dataplane_common::nat::{BACK_BY_QUEUE, Tuple};
use xebec_dataplane_common::{ICMP, TCP, UDP};

use crate::frame::Frame;
use crate::maps::EXPRESS;
use crate::nat;
use crate::packet::{self, ETHERNET, Packet};
use crate::rewrite;
use crate::translate::{self, Plan};

const AF_INET: u8 = 2;

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
    let Some(packet) = packet::read_simple(&ctx) else {
        return XDP_PASS;
    };
    if packet.ttl <= 1 || !is_simple(&ctx, &packet) {
        return XDP_PASS;
    }
    let from = nat::tuple(&packet);
    let mut to = from;
    let plan = translate::plan(&packet, &from, &mut to);
    if plan == Plan::Leave {
        return XDP_PASS;
    }
    let mut way = Way {
        device: 0,
        back: false,
        hardware: [[0; 6]; 2],
    };
    // The way is found before anything is entered or changed: a frame that tc must send, because the neighbour is
    // not known yet for example, is still the frame that came, of a flow that has not begun.
    if !translate::stays(&to) && !find_way(&ctx, &to, &mut way) {
        return XDP_PASS;
    }
    if plan == Plan::Begins && !translate::begin(&from, &mut to) {
        return XDP_PASS;
    }
    if !rewrite::apply_early(&ctx, &packet, &to) {
        return XDP_DROP;
    }
    translate::count(true);
    if way.device == 0 {
        return XDP_PASS;
    }
    if !rewrite::hop(&ctx, &packet) || ctx.store(0, &way.hardware).is_none() {
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
    let header = match packet.protocol {
        TCP => 20,
        UDP => 8,
        // Echo and its reply.
        ICMP if matches!(packet.icmp.to_ne_bytes()[0], 0 | 8) => 8,
        _ => return false,
    };
    let (start, end) = ctx.bounds();
    start + ETHERNET + 20 + header <= end
}

/// Asks the routing table for the way to where a packet goes; false if it knows none that a frame can take from here.
#[inline(always)]
fn find_way(ctx: &XdpContext, to: &Tuple, way: &mut Way) -> bool {
    let (Some(length), Some(service)) =
        (ctx.load::<u16>(ETHERNET + 2), ctx.load::<u8>(ETHERNET + 1))
    else {
        return false;
    };
    // SAFETY: the kernel's structure holds numbers alone, of which all may be 0.
    let mut route: bpf_fib_lookup = unsafe { zeroed() };
    route.family = AF_INET;
    route.ifindex = ctx.ingress_ifindex() as u32;
    // What does not fit the way's MTU is tc's: the stack answers for it.
    route.__bindgen_anon_1.tot_len = u16::from_be(length);
    route.__bindgen_anon_2.tos = service;
    // Whoever begins a flow to another node gets this node's address, which all others here have already.
    route.__bindgen_anon_3.ipv4_src = nat::settings().node;
    route.__bindgen_anon_4.ipv4_dst = to.destination;
    // SAFETY: context and structure are valid, and the size is the structure's.
    let found = unsafe {
        ask_routes(
            ctx.as_ptr(),
            &mut route,
            size_of::<bpf_fib_lookup>() as i32,
            0,
        )
    };
    if found != i64::from(BPF_FIB_LKUP_RET_SUCCESS) {
        return false;
    }
    // A device without the program may have no queues for such frames, or may not be one that has frames at all: it
    // would lose them.
    // SAFETY: the value is read once, here.
    let Some(&back) = (unsafe { EXPRESS.get(&route.ifindex) }) else {
        return false;
    };
    way.device = route.ifindex;
    way.back = back == BACK_BY_QUEUE && route.ifindex as usize == ctx.ingress_ifindex();
    way.hardware = [route.dmac, route.smac];
    true
}
