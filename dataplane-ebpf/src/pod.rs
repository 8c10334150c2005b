//! tc hooks at the host's end of each pod's veth pair: what leaves the pod, and what is about to enter it.

use aya_ebpf::bindings::{TC_ACT_OK, TC_ACT_SHOT};
use aya_ebpf::helpers::generated::bpf_redirect_peer;
use aya_ebpf::macros::classifier;
use aya_ebpf::programs::TcContext;
use xebec_dataplane_common::flow::{EGRESS, INGRESS, REASON_INVALID, REASON_POLICY, REASON_SOURCE};
use xebec_dataplane_common::policy::Endpoint;

use crate::flow::{self, Known, Told};
use crate::maps::ENDPOINTS;
use crate::packet::{self, Packet, Read};
use crate::policy;
use crate::rewrite;

/// What comes out of a pod: its source is checked, then its egress rules, then the ingress rules of a pod of
/// this node, to which the packet is then handed without going through the stack.
#[classifier]
pub fn xebec_from_pod(ctx: TcContext) -> i32 {
    let packet = match packet::read(&ctx) {
        Read::Ipv4(packet) => packet,
        Read::Arp => return TC_ACT_OK as i32,
        // Nothing else is routed to or from pods, so nothing else may slip past the rules.
        Read::Other | Read::Invalid => return dropped(),
    };
    // SAFETY: the value is copied at once.
    let Some(from) = (unsafe { ENDPOINTS.get(&packet.carrier.0) }).copied() else {
        return refuse(&ctx, &packet, EGRESS, 0, REASON_SOURCE);
    };
    // A pod speaks for itself alone, in its errors too.
    if from.ifindex != ifindex(&ctx) || packet.source != packet.carrier.0 {
        return refuse(&ctx, &packet, EGRESS, 0, REASON_SOURCE);
    }
    // SAFETY: the value is copied at once.
    let to = unsafe { ENDPOINTS.get(&packet.carrier.1) }.copied();
    let (key, up) = flow::key(&packet);
    let known = flow::find(&packet, &key, up);
    if known.yes {
        tell_known(&ctx, &packet, &known, EGRESS);
    } else {
        let mut told = Told {
            direction: EGRESS,
            set: from.egress_set,
            rule: 0,
            reason: 0,
            reply: false,
            length: packet::length(&ctx),
        };
        if from.egress_set != 0 {
            let identity = match &to {
                Some(to) => to.identity,
                None => policy::identity(packet.destination),
            };
            told.rule = policy::ask(from.egress_set, packet.destination, identity, &packet);
            if told.rule == 0 {
                return refuse(&ctx, &packet, EGRESS, from.egress_set, REASON_POLICY);
            }
        }
        if let Some(to) = &to {
            if to.ingress_set != 0 {
                told.direction = INGRESS;
                told.set = to.ingress_set;
                told.rule = policy::ask(to.ingress_set, packet.source, from.identity, &packet);
                if told.rule == 0 {
                    return refuse(&ctx, &packet, INGRESS, to.ingress_set, REASON_POLICY);
                }
            }
        }
        // An error about a flow that is not known is let through by the rules, but begins no flow.
        if !packet.error {
            flow::enter(&packet, &key, up, told.rule);
        }
        flow::tell(&packet, &told);
    }
    flow::count(false);
    match &to {
        Some(to) => hand_over(&ctx, &packet, to),
        None => TC_ACT_OK as i32,
    }
}

/// What the stack is about to send to a pod: from other nodes, from outside, from this node's own processes.
#[classifier]
pub fn xebec_to_pod(ctx: TcContext) -> i32 {
    let packet = match packet::read(&ctx) {
        Read::Ipv4(packet) => packet,
        Read::Arp => return TC_ACT_OK as i32,
        Read::Other | Read::Invalid => return dropped(),
    };
    // SAFETY: the value is copied at once.
    let Some(to) = (unsafe { ENDPOINTS.get(&packet.carrier.1) }).copied() else {
        return refuse(&ctx, &packet, INGRESS, 0, REASON_INVALID);
    };
    if to.ifindex != ifindex(&ctx) || packet.destination != packet.carrier.1 {
        return refuse(&ctx, &packet, INGRESS, 0, REASON_INVALID);
    }
    let (key, up) = flow::key(&packet);
    let known = flow::find(&packet, &key, up);
    if known.yes {
        tell_known(&ctx, &packet, &known, INGRESS);
    } else {
        let mut told = Told {
            direction: INGRESS,
            set: to.ingress_set,
            rule: 0,
            reason: 0,
            reply: false,
            length: packet::length(&ctx),
        };
        // A node may always reach its own pods: its kubelet probes them.
        if to.ingress_set != 0 && !from_this_node(&ctx) {
            told.rule = policy::ask(
                to.ingress_set,
                packet.source,
                policy::identity(packet.source),
                &packet,
            );
            if told.rule == 0 {
                return refuse(&ctx, &packet, INGRESS, to.ingress_set, REASON_POLICY);
            }
        }
        if !packet.error {
            flow::enter(&packet, &key, up, told.rule);
        }
        flow::tell(&packet, &told);
    }
    flow::count(false);
    TC_ACT_OK as i32
}

/// The device that this program is attached to.
#[inline(always)]
fn ifindex(ctx: &TcContext) -> u32 {
    // SAFETY: the kernel gives a valid context for the whole call.
    unsafe { (*ctx.skb.skb).ifindex }
}

/// Whether a process of this node sent the packet: it came in by no device.
#[inline(always)]
fn from_this_node(ctx: &TcContext) -> bool {
    // SAFETY: as in `ifindex`.
    unsafe { (*ctx.skb.skb).ingress_ifindex == 0 }
}

#[inline(always)]
fn dropped() -> i32 {
    flow::count(true);
    TC_ACT_SHOT as i32
}

/// Tells of a packet of a known flow, if it has news.
#[inline(always)]
fn tell_known(ctx: &TcContext, packet: &Packet, known: &Known, direction: u8) {
    if known.tell {
        let told = Told {
            direction,
            set: 0,
            rule: known.rule,
            reason: 0,
            reply: known.reply,
            length: packet::length(ctx),
        };
        flow::tell(packet, &told);
    }
}

/// Drops a packet and tells why.
#[inline(always)]
fn refuse(ctx: &TcContext, packet: &Packet, direction: u8, set: u32, reason: u8) -> i32 {
    let told = Told {
        direction,
        set,
        rule: 0,
        reason,
        reply: false,
        length: packet::length(ctx),
    };
    flow::tell(packet, &told);
    dropped()
}

/// Puts a packet into a pod of this node as a router would: one hop less, new hardware addresses. What can't be
/// handed over goes to the stack, which routes it, or answers that its time is exceeded.
#[inline(always)]
fn hand_over(ctx: &TcContext, packet: &Packet, to: &Endpoint) -> i32 {
    if !rewrite::hop(ctx, packet) || !rewrite::forward_to(ctx, to.mac) {
        return TC_ACT_OK as i32;
    }
    // SAFETY: the helper takes numbers alone.
    unsafe { bpf_redirect_peer(to.ifindex, 0) as i32 }
}
