//! The node's own rules (host firewall): for what comes to its addresses from elsewhere, and for what its processes send
//! elsewhere. Its own pods it always reaches.

use aya_ebpf::programs::TcContext;
use xebec_dataplane_common::flow::{EGRESS, INGRESS, REASON_FRAGMENT};
use xebec_dataplane_common::ip::Ip;
use xebec_dataplane_common::policy::{IDENTITY_HOST, Standing, UNDER_EGRESS, UNDER_INGRESS};

use crate::flow;
use crate::lookup::{At, look_up};
use crate::maps::HOST;
use crate::pod;
use crate::policy::{self, UNASKED};
use crate::scratch::{Scratch, scratch, settle};
use crate::tell::{self, As};

/// The node's rules, as in [`Standing::rules`].
#[inline(always)]
pub fn rules() -> u32 {
    match HOST.get_ptr(0) {
        Some(standing) => {
            // SAFETY: it is there, and aligned; it is read at once, since it may change at any moment.
            let standing = unsafe { core::ptr::read_volatile(standing.cast::<u64>()) };
            (standing >> 32) as u32
        }
        None => 0,
    }
}

/// Whether an address is one of the node's own.
#[inline(always)]
fn is_own(address: &Ip) -> bool {
    policy::identity(address) == IDENTITY_HOST
}

/// Judges what a pod of this node sends to the node: 0, or why it is dropped.
#[inline(always)]
pub fn judge_pod(all: &mut Scratch, to: &Ip, port: u16) -> u8 {
    let rules = rules();
    if !Standing::has_rules(rules, UNDER_INGRESS) || !is_own(to) {
        return 0;
    }
    if all.told.audit == 0 {
        all.told.direction = INGRESS;
    }
    let (peer, identity) = (all.packet.tuple.source.words(), all.pod.identity);
    policy::ask(all, rules, UNDER_INGRESS, &peer, identity, port)
}

/// Judges the node's answer to a pod of its own by the rules for what it answers: 0, or why it is dropped.
#[inline(always)]
pub fn judge_answer(all: &mut Scratch) -> u8 {
    let (peer, port) = (
        all.packet.tuple.destination.words(),
        all.packet.tuple.source_port,
    );
    let identity = all.pod.identity;
    policy::ask(all, rules(), UNDER_INGRESS, &peer, identity, port)
}

/// Whether a packet from the network, which is the stack's to do with, may come in: as what enters a pod is judged, by
/// the node's rules.
#[inline(always)]
pub fn lets_in(ctx: &TcContext, all: &mut Scratch) -> bool {
    let rules = rules();
    if rules == 0 {
        return true;
    }
    // Before any rules are looked at.
    all.generation = flow::generation();
    if !is_own(all.packet.receiver()) {
        return true;
    }
    all.pod.rules = rules;
    all.exempt = 0;
    pod::admit(ctx)
}

/// The same of a fragment of which it is not known what it belongs to.
#[inline(always)]
pub fn lets_in_early() -> bool {
    rules() & UNDER_INGRESS == 0 || xebec_early_to_host() != 0
}

/// Checked by itself and once.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn xebec_early_to_host() -> u32 {
    let Some(all) = scratch() else {
        return 0;
    };
    if !is_own(&all.packet.tuple.destination) {
        return 1;
    }
    tell::dropped(INGRESS, REASON_FRAGMENT);
    0
}

/// Whether a packet of the node itself may leave by a device that leads elsewhere.
#[inline(always)]
pub fn lets_out(ctx: &TcContext) -> bool {
    // SAFETY: the kernel gives a valid context for the whole call.
    let sent_on = unsafe { (*ctx.skb.skb).ingress_ifindex } != 0;
    sent_on || rules() == 0 || xebec_from_host() != 0
}

/// The same.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn xebec_from_host() -> u32 {
    let Some(all) = scratch() else {
        return 0;
    };
    all.generation = flow::generation();
    u32::from(passes(all))
}

/// Judges what the node sends, an answer by the rules for what it answers. The node's flows are known only while it is
/// under rules, and then both ways: what one lets through has its answers let through.
#[inline(always)]
fn passes(all: &mut Scratch) -> bool {
    all.exempt = 0;
    let up = look_up(At::ToPod).up;
    settle();
    if all.known.yes != 0 {
        pod::tell_known(all, EGRESS);
        return true;
    }
    all.told.begin(&all.packet, EGRESS);
    let again = all.known.again != 0;
    let tuple = &all.packet.tuple;
    let (way, port) = if again {
        (UNDER_INGRESS, tuple.source_port)
    } else {
        (UNDER_EGRESS, tuple.destination_port)
    };
    let peer = tuple.destination.words();
    let reason = policy::ask(all, rules(), way, &peer, UNASKED, port);
    settle();
    if reason != 0 {
        all.told.reason = reason;
        tell::tell();
        tell::count(As::Dropped);
        return false;
    }
    if again {
        flow::renew(all, up);
    } else {
        if !all.packet.is_error() {
            flow::enter(all, up);
        }
        tell::tell();
    }
    true
}
