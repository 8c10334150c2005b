//! tc hooks at the host's end of each pod's veth pair: what leaves the pod, and what is about to enter it.

use aya_ebpf::bindings::{__sk_buff, TC_ACT_OK, TC_ACT_SHOT};
use aya_ebpf::helpers::generated::bpf_redirect_peer;
use aya_ebpf::macros::classifier;
use aya_ebpf::programs::TcContext;
use xebec_dataplane_common::flow::{
    EGRESS, Flow, INGRESS, REASON_CHECKSUM, REASON_FRAGMENT, REASON_INVALID, REASON_NO_MAPPING,
    REASON_NO_SERVICE, REASON_POLICY, REASON_SOURCE, TURN_BACK, TURN_FORTH, TURN_LATE, TURN_STAYS,
};
use xebec_dataplane_common::policy::{
    IDENTITY_HOST, LEARNS, Standing, UNDER_EGRESS, UNDER_INGRESS,
};

use crate::balance::{self, CHOSEN, Client};
use crate::errors;
use crate::flow::{self, SYN};
use crate::hold;
use crate::host;
use crate::lookup::{At, Found, look_up};
use crate::message;
use crate::nat::{self, Turn};
use crate::packet::{self, Packet, Read};
use crate::policy::{self, Met, UNASKED, meet};
use crate::refuse;
use crate::rewrite;
use crate::scratch::{Scratch, scratch, settle};
use crate::tell::{self, As};
use crate::translate;
use crate::way::{self, GO, LEAVES_HERE, LEAVES_NOT, LEAVES_THERE};

/// What comes out of a pod: its source is checked, a Service's address becomes a backend's, then come the pod's egress
/// rules, and the ingress rules of a pod of this node, to which the packet is then handed without going through the
/// stack.
#[classifier]
pub fn xebec_from_pod(ctx: TcContext) -> i32 {
    let Some(all) = scratch() else {
        return dropped();
    };
    // Before any rules are looked at: who is judged by those of before must not pass for judged by those of after.
    all.generation = flow::generation();
    match packet::read(&ctx) {
        Read::Ip => {}
        Read::Link => return TC_ACT_OK as i32,
        // Nothing else is routed to or from pods, so nothing else may slip past the rules.
        Read::Other | Read::Invalid => return dropped(),
        Read::Early => return tell::dropped(EGRESS, REASON_FRAGMENT),
    }
    // A pod speaks for itself alone, in its errors too.
    if !meet(all.packet.sender(), &mut all.pod)
        || all.pod.ifindex != ifindex(&ctx)
        || !all.packet.is_of_sender()
    {
        return tell::dropped(EGRESS, REASON_SOURCE);
    }
    all.exempt = 0;
    let Found { up, turn } = look_up(At::FromPod);
    // A packet to a pod of this node meets no other hook. All others are translated where they leave, if so.
    all.turned = match turn {
        Turn::Entry => 1,
        Turn::Exit => u8::from(translate::is_endpoint(&all.to.destination)),
        Turn::None | Turn::Direct => 0,
    };
    all.leaves = LEAVES_NOT;
    if turn == Turn::Exit && all.turned == 0 {
        all.leaves = LEAVES_HERE;
        all.late.set(&all.to);
    }
    all.done = 1;
    settle();
    if all.known.again != 0 {
        all.told.begin(&all.packet, EGRESS);
        let reason = xebec_judge_answer(u32::from(up)) as u8;
        settle();
        if reason != 0 {
            all.told.reason = reason;
            tell::tell();
            return dropped();
        }
        settle();
    }
    let known = &all.known;
    // A flow to a Service that has no backend any more gets another.
    if known.yes != 0 && (all.turned != 0 || known.reply != 0 || known.service == 0) {
        tell_known(all, EGRESS);
    } else {
        let reason = decide(all, up);
        if reason != 0 {
            all.told.reason = reason;
            tell::tell();
            settle();
            return if all.refused != 0 {
                answered(&ctx, all, refuse::NO_PORT)
            } else {
                dropped()
            };
        }
        tell::tell();
        // What the table said may hold no longer.
        all.answers = 0;
        if all.leaves != LEAVES_NOT {
            all.leaves = LEAVES_THERE;
        }
    }
    settle();
    let mut by_route = false;
    if all.turned != 0 {
        // What bears the node's address already, the stack would take for a forgery.
        by_route = all.to.source != all.packet.tuple.source
            && !translate::is_endpoint(&all.to.destination);
        if by_route {
            let why = way::find(&ctx, 0);
            if why != GO {
                all.told.begin(&all.packet, EGRESS);
                all.told.reason = refuse::reason(why);
                tell::tell();
                return answered(&ctx, all, why);
            }
            settle();
        }
        if !rewritten(&ctx, &all.packet) {
            return tell::dropped(EGRESS, REASON_CHECKSUM);
        }
    }
    tell::count(As::Forwarded);
    settle();
    all.copied = 0;
    if message::may_leave(all, all.pod.rules) {
        xebec_leave(ctx.skb.skb);
        settle();
    }
    if by_route {
        return way::go(&ctx, all);
    }
    let receiver = if all.turned != 0 {
        &all.to.destination
    } else {
        all.packet.receiver()
    };
    if meet(receiver, &mut all.peer) {
        return hand_over(&ctx, all, &all.peer);
    }
    if nat::settings().around == 0 {
        return TC_ACT_OK as i32;
    }
    if all.turned == 0 {
        all.to.set(&all.packet.tuple);
    }
    settle();
    way::around(&ctx)
}

/// Decides on a flow that begins: chooses a backend if it is for a Service, judges it by the rules, and enters it. 0, or
/// why not.
#[inline(always)]
fn decide(all: &mut Scratch, up: bool) -> u8 {
    all.told.begin(&all.packet, EGRESS);
    all.choice.backend = 0;
    all.refused = 0;
    if all.turned == 0 {
        if translate::may_begin(&all.packet) {
            let client = Client {
                address: all.packet.tuple.source,
                namespace: false,
                unseen: false,
                inside: true,
            };
            let outcome = balance::choose(&all.packet.tuple, &client, &mut all.choice);
            if outcome == balance::REFUSE || outcome == balance::DROP {
                all.refused = u8::from(outcome == balance::REFUSE);
                all.told.service = all.choice.service;
                return REASON_NO_SERVICE;
            }
            if outcome == CHOSEN {
                all.turned = 1;
                all.told.service = all.choice.service;
            } else {
                all.choice.backend = 0;
            }
        } else if translate::goes_on(&all.packet)
            && balance::refuses(&all.packet.tuple, true, &mut all.choice)
        {
            all.refused = 1;
            all.told.service = all.choice.service;
            return REASON_NO_SERVICE;
        }
        all.to.set(&all.packet.tuple);
        if all.turned != 0 {
            all.to.destination = all.choice.address;
            all.to.destination_port = all.choice.port;
        }
    }
    all.told.turned = all.turned;
    settle();
    // Rules are about the backend, not about the Service's address.
    let reason = xebec_judge_both() as u8;
    settle();
    if reason != 0 {
        return reason;
    }
    settle();
    if all.choice.backend != 0 {
        if all.listed != 0 {
            flow::inherit_key(all);
            settle();
        }
        if !begin(all) {
            return REASON_NO_MAPPING;
        }
    } else if !all.packet.is_error() {
        // An error about a flow that is not known is let through by the rules, but begins no flow.
        flow::enter(all, up);
    }
    settle();
    0
}

/// Judges what a pod begins by its own rules, and by those of the pod of this node that it is for: 0, or why it is
/// dropped. Checked by itself and once.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn xebec_judge_both() -> u32 {
    match scratch() {
        Some(all) => u32::from(judge_both(all)),
        None => u32::from(REASON_POLICY),
    }
}

#[inline(always)]
fn judge_both(all: &mut Scratch) -> u8 {
    let (peer, port) = (all.to.destination.words(), all.to.destination_port);
    let reason = policy::ask(all, all.pod.rules, UNDER_EGRESS, &peer, UNASKED, port);
    if reason != 0 {
        return reason;
    }
    if meet(&peer, &mut all.peer) && Standing::has_rules(all.peer.rules, UNDER_INGRESS) {
        if all.told.audit == 0 {
            all.told.direction = INGRESS;
        }
        let (peer, identity) = (all.packet.tuple.source.words(), all.pod.identity);
        return policy::ask(all, all.peer.rules, UNDER_INGRESS, &peer, identity, port);
    }
    settle();
    host::judge_pod(all, &peer, port)
}

/// Judges a pod's answer by the rules for what it answers: 0, or why it is dropped. The rules may have changed since the
/// flow was let through, and its beginner may say nothing more that would be judged. Checked by itself and once.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn xebec_judge_answer(up: u32) -> u32 {
    match scratch() {
        Some(all) => u32::from(judge_answer(all, up != 0)),
        None => u32::from(REASON_POLICY),
    }
}

#[inline(always)]
fn judge_answer(all: &mut Scratch, up: bool) -> u8 {
    let (peer, port) = (
        all.packet.tuple.destination.words(),
        all.packet.tuple.source_port,
    );
    let identity = policy::identity(&peer);
    // Flows that an agent of before entered do not say that the node began them.
    if identity != IDENTITY_HOST {
        let reason = policy::ask(all, all.pod.rules, UNDER_INGRESS, &peer, identity, port);
        if reason != 0 {
            return reason;
        }
    }
    // It came from a pod of this node, if there is one: through a Service it may be known by another address.
    let beginner = if all.turned != 0 {
        all.to.destination.words()
    } else {
        peer
    };
    if meet(&beginner, &mut all.peer) {
        let (peer, identity) = (all.packet.tuple.source.words(), all.pod.identity);
        let reason = policy::ask(all, all.peer.rules, UNDER_EGRESS, &peer, identity, port);
        if reason != 0 {
            return reason;
        }
    }
    flow::renew(all, up);
    0
}

/// Enters a pod's flow to the backend that was chosen; `to` then has the rest.
#[inline(never)]
fn begin(all: &mut Scratch) -> bool {
    all.begun = Flow {
        backend: all.choice.backend,
        backend_generation: all.choice.generation,
        service: all.choice.service,
        generation: all.generation,
        rule: all.told.rule,
        turn: TURN_FORTH,
        other: TURN_BACK | TURN_LATE,
        told: [all.packet.tcp_flags & SYN, 0],
        ..flow::plain()
    };
    flow::time(&all.packet, &mut all.begun);
    let node = nat::settings().node(&all.to.destination);
    // A pod that reaches itself must take the node for the other end: no stack accepts its own address from outside.
    // A backend that has no route to pods must take it for that, too; what the flow's packets become is one thing, so
    // it is done here, and not where they leave.
    if all.to.destination == all.packet.tuple.source
        || node.is_some()
            && !translate::is_endpoint(&all.to.destination)
            && !translate::is_native(&all.to.destination)
    {
        all.to.source = node;
        all.begun.other = TURN_BACK | TURN_STAYS;
    }
    let listed = all.listed != 0;
    nat::enter_with_port(all, listed)
}

/// Gives the packet its new addresses and ports.
#[inline(always)]
fn rewritten(ctx: &TcContext, packet: &Packet) -> bool {
    if packet.is_error() {
        errors::apply(ctx)
    } else {
        rewrite::apply(ctx)
    }
}

/// What the stack is about to send to a pod: from other nodes, from outside, from this node's own processes.
#[classifier]
pub fn xebec_to_pod(ctx: TcContext) -> i32 {
    let Some(all) = scratch() else {
        return dropped();
    };
    all.generation = flow::generation();
    let read = packet::read(&ctx);
    match read {
        Read::Ip | Read::Early => {}
        Read::Link => return TC_ACT_OK as i32,
        Read::Other | Read::Invalid => return dropped(),
    }
    if !meet(all.packet.receiver(), &mut all.pod)
        || all.pod.ifindex != ifindex(&ctx)
        || !all.packet.is_for_receiver()
    {
        return tell::dropped(INGRESS, REASON_INVALID);
    }
    if read == Read::Early {
        // Networks change the order of fragments, and a pod under no rules may get them in any. Those of a translated
        // flow find no first one there and are forgotten.
        if all.pod.rules & UNDER_INGRESS != 0 {
            return tell::dropped(INGRESS, REASON_FRAGMENT);
        }
        tell::count(As::Forwarded);
        return TC_ACT_OK as i32;
    }
    // A node may always reach its own pods: its kubelet probes them.
    all.exempt = u8::from(from_this_node(&ctx));
    all.copied = 0;
    if !admit(&ctx) {
        return TC_ACT_SHOT as i32;
    }
    settle();
    if is_kept(&ctx, all, &all.pod) {
        TC_ACT_SHOT as i32
    } else {
        TC_ACT_OK as i32
    }
}

/// What the network sends to a pod of this node, once it is translated: it is judged, and handed over without going
/// through the stack. None for what the stack is to do.
#[inline(always)]
pub fn reach(ctx: &TcContext, all: &mut Scratch) -> Option<i32> {
    all.generation = flow::generation();
    if !meet(all.packet.receiver(), &mut all.pod) {
        return None;
    }
    if all.packet.ttl <= 1 || all.packet.is_error() || !refuse::is_for_this_host(ctx) {
        return None;
    }
    // What claims to be a pod's would have come from that: the stack knows whether there is another way.
    if translate::is_endpoint(all.packet.sender()) {
        return None;
    }
    all.exempt = 0;
    all.copied = 0;
    Some(if admit(ctx) {
        hand_over(ctx, all, &all.pod)
    } else {
        TC_ACT_SHOT as i32
    })
}

/// Judges what is about to enter a pod by its rules, unless it is exempt, and gives it the addresses that the pod knows
/// the sender by. False if it is dropped.
#[inline(always)]
pub fn admit(ctx: &TcContext) -> bool {
    xebec_admit(ctx.skb.skb) != 0
}

/// The same; checked by itself and once.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn xebec_admit(skb: *mut __sk_buff) -> u32 {
    match scratch() {
        Some(all) => u32::from(let_in(&TcContext::new(skb), all)),
        None => 0,
    }
}

/// Judges what is about to enter a pod, an answer by the rules for what it answers: 0, or why it is dropped. Checked by
/// itself and once.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn xebec_judge_entry() -> u32 {
    let Some(all) = scratch() else {
        return u32::from(REASON_POLICY);
    };
    let tuple = &all.packet.tuple;
    let (way, port) = if all.known.again != 0 {
        (UNDER_EGRESS, tuple.source_port)
    } else if all.exempt != 0 {
        return 0;
    } else {
        (UNDER_INGRESS, tuple.destination_port)
    };
    let peer = tuple.source.words();
    let reason = policy::ask(all, all.pod.rules, way, &peer, UNASKED, port);
    settle();
    if reason != 0 || all.exempt == 0 {
        return u32::from(reason);
    }
    // What answers the pod is the node.
    u32::from(host::judge_answer(all))
}

#[inline(always)]
fn let_in(ctx: &TcContext, all: &mut Scratch) -> bool {
    let Found { up, turn } = look_up(At::ToPod);
    all.turned = u8::from(turn == Turn::Exit);
    settle();
    if all.known.yes == 0 {
        all.told.begin(&all.packet, INGRESS);
        let again = all.known.again != 0;
        let reason = xebec_judge_entry() as u8;
        settle();
        if reason != 0 {
            all.told.reason = reason;
            tell::tell();
            tell::count(As::Dropped);
            return false;
        }
        settle();
        if again {
            flow::renew(all, up);
        } else {
            if !all.packet.is_error() {
                flow::enter(all, up);
            }
            tell::tell();
        }
    }
    settle();
    if all.known.yes != 0 {
        tell_known(all, INGRESS);
    }
    settle();
    if all.turned != 0 && !rewritten(ctx, &all.packet) {
        tell::dropped(INGRESS, REASON_CHECKSUM);
        return false;
    }
    tell::count(As::Forwarded);
    true
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
    tell::count(As::Dropped);
    TC_ACT_SHOT as i32
}

/// Tells of a packet of a known flow, if it has news.
#[inline(always)]
pub fn tell_known(all: &mut Scratch, direction: u8) {
    if all.known.tell != 0 {
        all.told.begin(&all.packet, direction);
        all.told.rule = all.known.rule;
        all.told.reply = all.known.reply;
        all.told.service = all.known.service;
        all.told.packets = all.known.packets;
        all.told.bytes = all.known.bytes;
        all.told.answered_in = all.known.answered_in;
        all.told.turned = all.turned;
        tell::tell();
    }
}

/// Drops what goes no further and tells its pod why, by the pod's own device: rules judge what a pod sends, not this.
#[inline(always)]
fn answered(ctx: &TcContext, all: &Scratch, why: u32) -> i32 {
    tell::count(As::Dropped);
    if why == way::LOST
        || !refuse::is_for_this_host(ctx)
        || !refuse::answer(ctx, why)
        || !rewrite::forward_to(ctx, all.pod.mac)
    {
        return TC_ACT_SHOT as i32;
    }
    if why == refuse::NO_PORT {
        tell::count(As::Refused);
    }
    // SAFETY: the helper takes numbers alone.
    unsafe { bpf_redirect_peer(all.pod.ifindex, 0) as i32 }
}

/// Puts a packet into a pod of this node as a router would: one hop less, new hardware addresses. What can't be
/// handed over goes to the stack, which routes it, or answers that its time is exceeded.
#[inline(always)]
fn hand_over(ctx: &TcContext, all: &Scratch, to: &Met) -> i32 {
    if !rewrite::hop(ctx, &all.packet) || !rewrite::forward_to(ctx, to.mac) {
        return TC_ACT_OK as i32;
    }
    if is_kept(ctx, all, to) {
        return TC_ACT_SHOT as i32;
    }
    // SAFETY: the helper takes numbers alone.
    unsafe { bpf_redirect_peer(to.ifindex, 0) as i32 }
}

/// Tells of what a frame says that has left its pod. Checked by itself and once.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn xebec_leave(skb: *mut __sk_buff) -> u32 {
    if let Some(all) = scratch() {
        let rules = all.pod.rules;
        message::leaves(skb, all, rules);
    }
    0
}

/// Whether a frame that is about to enter a pod as it is now is kept from it, to be sent on by the agent. What it says is
/// told of.
#[inline(always)]
fn is_kept(ctx: &TcContext, all: &Scratch, to: &Met) -> bool {
    message::may_enter(all, to.rules) && xebec_enter(ctx.skb.skb, to.ifindex, to.rules) != 0
}

/// The same of what may be a message; checked by itself and once.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn xebec_enter(skb: *mut __sk_buff, ifindex: u32, rules: u32) -> u32 {
    let Some(all) = scratch() else {
        return 0;
    };
    if !message::is_answer(all) {
        message::enters(skb, all, rules);
        return 0;
    }
    message::answers(skb);
    if rules & LEARNS == 0 {
        return 0;
    }
    u32::from(hold::holds(skb, ifindex))
}
