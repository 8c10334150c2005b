//! tc hooks at the devices that lead to other nodes and the outside: Services for outside clients, and pods' traffic
//! to the outside.

use aya_ebpf::bindings::{__sk_buff, TC_ACT_OK, TC_ACT_SHOT};
use aya_ebpf::helpers::generated::bpf_redirect;
use aya_ebpf::macros::classifier;
use aya_ebpf::programs::TcContext;
use xebec_dataplane_common::flow::{
    EGRESS, FROM_NETWORK, INGRESS, REASON_CHECKSUM, REASON_INVALID, REASON_NO_MAPPING, TO_NETWORK,
    TURN_BACK, TURN_FORTH, TURN_LATE, TURN_STAYS,
};

use crate::direct;
use crate::errors;
use crate::flow;
use crate::host;
use crate::lookup::{At, look_up};
use crate::nat::{self, Turn};
use crate::packet::{self, Read};
use crate::pod;
use crate::refuse;
use crate::rewrite;
use crate::scratch::{Scratch, scratch, settle};
use crate::tell::{self, As};
use crate::translate::{self, Plan};
use crate::way::{self, GO};

/// What comes in: answers to translated flows, and flows to Services. All else is the stack's.
#[classifier]
pub fn xebec_from_network(ctx: TcContext) -> i32 {
    let Some(all) = scratch() else {
        return TC_ACT_SHOT as i32;
    };
    all.done = 1;
    // A tagged frame is another network's, with a device of its own.
    if is_tagged(&ctx) {
        return TC_ACT_OK as i32;
    }
    match packet::read(&ctx) {
        Read::Ip => {}
        Read::Early if !host::lets_in_early() => return TC_ACT_SHOT as i32,
        _ => return TC_ACT_OK as i32,
    }
    let plan = if direct::is_wrapped(all) && direct::unwrap(&ctx) {
        settle();
        if packet::read(&ctx) != Read::Ip {
            return tell::dropped(INGRESS, REASON_INVALID);
        }
        settle();
        direct::plan(all)
    } else {
        // SAFETY: the kernel gives a valid context for the whole call.
        all.device = unsafe { (*ctx.skb.skb).ifindex };
        translate::plan(all, At::FromNetwork)
    };
    settle();
    if plan != Plan::Leave {
        if let Some(verdict) = translated(&ctx, all, plan) {
            return verdict;
        }
    }
    settle();
    reach(&ctx, all)
}

/// Translates a packet as planned; none where its way ends here, and its receiver stands in its tuple.
#[inline(always)]
fn translated(ctx: &TcContext, all: &mut Scratch, plan: Plan) -> Option<i32> {
    match plan {
        Plan::Refuse => return Some(refused(ctx, all, refuse::NO_PORT)),
        Plan::Drop => return Some(TC_ACT_SHOT as i32),
        Plan::Direct | Plan::BeginsDirect => return Some(sent_directly(ctx, all, plan)),
        Plan::Leave | Plan::Known | Plan::Begins => {}
    }
    let stays = all.stays != 0;
    if !stays {
        // To a backend of another node, or from it back to the client: the stack would take our own source address
        // for a forgery. The way is found before anything is entered or changed: what is answered is what came.
        let why = way::find(ctx, 0);
        if why != GO {
            return Some(refused(ctx, all, why));
        }
        settle();
    }
    if plan == Plan::Begins && !translate::begin(all) {
        return Some(tell::dropped(EGRESS, REASON_NO_MAPPING));
    }
    if plan == Plan::Begins {
        tell::tell_translated(FROM_NETWORK);
    }
    settle();
    if !changed(ctx, all) {
        return Some(tell::dropped(INGRESS, REASON_CHECKSUM));
    }
    tell::count(As::Translated);
    settle();
    if !stays {
        return Some(way::go(ctx, all));
    }
    // Of errors, the pod's hook reads again whom they are about. A flow that was let through has its errors.
    if all.packet.is_error() {
        return Some(TC_ACT_OK as i32);
    }
    all.packet.tuple.set(&all.to);
    None
}

/// Hands a packet to its pod if it is for one, and to the stack if not, where the node's rules let it in.
#[inline(always)]
fn reach(ctx: &TcContext, all: &mut Scratch) -> i32 {
    if nat::settings().around != 0 {
        if let Some(verdict) = pod::reach(ctx, all) {
            return verdict;
        }
        settle();
    }
    if host::lets_in(ctx, all) {
        TC_ACT_OK as i32
    } else {
        TC_ACT_SHOT as i32
    }
}

/// Sends a packet to the node of its backend as it is.
#[inline(always)]
fn sent_directly(ctx: &TcContext, all: &mut Scratch, plan: Plan) -> i32 {
    let why = direct::find_way(ctx, all);
    if why != GO {
        return refused(ctx, all, why);
    }
    settle();
    if plan == Plan::BeginsDirect && !direct::begin(all) {
        return tell::dropped(EGRESS, REASON_NO_MAPPING);
    }
    settle();
    if !direct::wrap(ctx) {
        return tell::dropped(EGRESS, REASON_INVALID);
    }
    tell::count(As::Translated);
    way::leave(ctx, all)
}

/// Gives the packet its new addresses and ports.
#[inline(always)]
fn changed(ctx: &TcContext, all: &Scratch) -> bool {
    if all.packet.is_error() {
        errors::apply(ctx)
    } else {
        rewrite::apply(ctx)
    }
}

/// Whether the frame has a VLAN tag, which the kernel has taken out of it.
#[inline(always)]
fn is_tagged(ctx: &TcContext) -> bool {
    let skb: *const __sk_buff = ctx.skb.skb;
    // SAFETY: the kernel gives a valid context for the whole call.
    unsafe { (*skb).vlan_present != 0 }
}

/// What goes out: pods' packets to whoever has no route to pods bear the node's address, and what answers a Service's
/// client from this node bears the Service's.
#[classifier]
pub fn xebec_to_network(ctx: TcContext) -> i32 {
    if way::is_done(&ctx) {
        return TC_ACT_OK as i32;
    }
    let Some(all) = scratch() else {
        return TC_ACT_SHOT as i32;
    };
    if is_tagged(&ctx) || packet::read(&ctx) != Read::Ip {
        return TC_ACT_OK as i32;
    }
    if !host::lets_out(&ctx) {
        return TC_ACT_SHOT as i32;
    }
    settle();
    let pod = translate::is_endpoint(&all.packet.tuple.source);
    // A pod on the host's network may be behind a node port.
    if !pod && !translate::is_node(&all.packet.tuple.source) {
        return TC_ACT_OK as i32;
    }
    if look_up(At::ToNetwork).turn != Turn::Exit {
        // Who came to the pod by its own address is answered from it.
        if !pod || all.packet.is_error() || all.answers != 0 {
            return TC_ACT_OK as i32;
        }
        if translate::is_native(&all.packet.tuple.destination) || nat::settings().ports == 0 {
            return TC_ACT_OK as i32;
        }
        if !masquerade(all) {
            return tell::dropped(EGRESS, REASON_NO_MAPPING);
        }
        tell::tell_translated(TO_NETWORK);
    }
    settle();
    if changed(&ctx, all) {
        TC_ACT_OK as i32
    } else {
        tell::dropped(EGRESS, REASON_CHECKSUM)
    }
}

/// Gives a pod's flow to the outside the node's address and a port; `to` is what its packets become.
#[inline(never)]
fn masquerade(all: &mut Scratch) -> bool {
    all.begun = flow::plain();
    all.begun.generation = all.judged.generation;
    all.begun.rule = all.judged.rule;
    all.begun.told = all.judged.told;
    all.begun.turn = TURN_FORTH | TURN_LATE;
    all.begun.other = TURN_BACK | TURN_STAYS;
    all.to.set(&all.packet.tuple);
    all.to.source = nat::settings().node(&all.to.destination);
    // Without an address of its family there is no way out.
    all.to.source.is_some() && nat::enter_with_port(all, false)
}

/// Drops what goes no further, and tells its sender why, by the device and the router that the packet came by.
#[inline(always)]
fn refused(ctx: &TcContext, all: &mut Scratch, why: u32) -> i32 {
    // What was sent to many, or to another and merely overheard, is the stack's to drop.
    let here = refuse::is_for_this_host(ctx);
    if why == refuse::NO_PORT && !here {
        return TC_ACT_OK as i32;
    }
    all.told.begin(&all.packet, INGRESS);
    all.told.reason = refuse::reason(why);
    if why == refuse::NO_PORT {
        all.told.service = all.choice.service;
    }
    tell::tell();
    tell::count(As::Dropped);
    settle();
    if !here || why == way::LOST || !refuse::answer(ctx, why) || !rewrite::turn_round(ctx) {
        return TC_ACT_SHOT as i32;
    }
    if why == refuse::NO_PORT {
        tell::count(As::Refused);
    }
    // SAFETY: the kernel gives a valid context for the whole call.
    unsafe { bpf_redirect((*ctx.skb.skb).ifindex, 0) as i32 }
}
