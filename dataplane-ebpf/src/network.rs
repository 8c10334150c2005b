//! tc hooks at the devices that lead to other nodes and the outside: node ports, and pods' traffic to the outside.

use aya_ebpf::bindings::{TC_ACT_OK, TC_ACT_SHOT};
use aya_ebpf::helpers::generated::bpf_redirect_neigh;
use aya_ebpf::macros::classifier;
use aya_ebpf::maps::lpm_trie::Key;
use aya_ebpf::programs::TcContext;
use xebec_dataplane_common::flow::{EGRESS, REASON_NO_MAPPING};
use xebec_dataplane_common::nat::Tuple;

use crate::errors::{self, Outcome};
use crate::flow::{self, Told};
use crate::maps::{ENDPOINTS, NATIVE};
use crate::nat;
use crate::packet::{self, Packet, Read};
use crate::rewrite;
use crate::translate::{self, Plan};

/// What comes in: answers to translated flows, and connections to node ports. All else is the stack's.
#[classifier]
pub fn xebec_from_network(ctx: TcContext) -> i32 {
    let Read::Ipv4(packet) = packet::read(&ctx) else {
        return TC_ACT_OK as i32;
    };
    let from = nat::tuple(&packet);
    let mut to = from;
    if packet.error {
        return match errors::translate(&ctx, &packet, &mut to) {
            Outcome::Leave => TC_ACT_OK as i32,
            Outcome::Changed => forward(&ctx, &packet, &to),
            Outcome::Broken => TC_ACT_SHOT as i32,
        };
    }
    let plan = translate::plan(&packet, &from, &mut to);
    if plan == Plan::Leave || plan == Plan::Begins && !translate::begin(&from, &mut to) {
        return TC_ACT_OK as i32;
    }
    if !rewrite::apply(&ctx, &packet, &to) {
        return TC_ACT_SHOT as i32;
    }
    translate::count(false);
    forward(&ctx, &packet, &to)
}

/// Sends on what was translated, if it does not stay.
#[inline(always)]
fn forward(ctx: &TcContext, packet: &Packet, to: &Tuple) -> i32 {
    if translate::stays(to) {
        return TC_ACT_OK as i32;
    }
    // To a backend of another node, or from it back to the client: the stack would take our own source address
    // for a forgery.
    if !rewrite::hop(ctx, packet) {
        return TC_ACT_SHOT as i32;
    }
    // SAFETY: the kernel gives a valid context, and without parameters the helper asks the routing table.
    unsafe { bpf_redirect_neigh((*ctx.skb.skb).ifindex, core::ptr::null_mut(), 0, 0) as i32 }
}

/// What goes out: pods' packets to whoever has no route to pods bear the node's address, and what answers a node port
/// from this node bears the port's.
#[classifier]
pub fn xebec_to_network(ctx: TcContext) -> i32 {
    let Read::Ipv4(packet) = packet::read(&ctx) else {
        return TC_ACT_OK as i32;
    };
    // A pod on the host's network may be behind a node port.
    let own = packet.source == nat::settings().node;
    // SAFETY: only whether it is there counts.
    if !own && unsafe { ENDPOINTS.get(&packet.source) }.is_none() {
        return TC_ACT_OK as i32;
    }
    let from = nat::tuple(&packet);
    let mut to = from;
    if packet.error {
        return match errors::translate(&ctx, &packet, &mut to) {
            Outcome::Leave | Outcome::Changed => TC_ACT_OK as i32,
            Outcome::Broken => TC_ACT_SHOT as i32,
        };
    }
    if !nat::find(&from, packet.tcp_flags, &mut to) {
        if own {
            return TC_ACT_OK as i32;
        }
        // Who came to the pod by its own address is answered from it.
        if is_native(packet.destination) || nat::settings().ports == 0 || flow::answers(&packet) {
            return TC_ACT_OK as i32;
        }
        if !nat::enter_masqueraded(&from, &mut to) {
            return no_port(&ctx, &packet);
        }
    }
    if rewrite::apply(&ctx, &packet, &to) {
        TC_ACT_OK as i32
    } else {
        TC_ACT_SHOT as i32
    }
}

/// Whether an address knows the way to pods.
#[inline(always)]
fn is_native(address: u32) -> bool {
    NATIVE.get(&Key::new(32, address)).is_some()
}

#[inline(always)]
fn no_port(ctx: &TcContext, packet: &Packet) -> i32 {
    let told = Told {
        direction: EGRESS,
        set: 0,
        rule: 0,
        reason: REASON_NO_MAPPING,
        reply: false,
        length: packet::length(ctx),
    };
    flow::tell(packet, &told);
    flow::count(true);
    TC_ACT_SHOT as i32
}
