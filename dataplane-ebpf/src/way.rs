//! The way of a packet that was translated: looking for it, and sending the packet there.

use aya_ebpf::bindings::{
    __sk_buff, BPF_FIB_LKUP_RET_BLACKHOLE, BPF_FIB_LKUP_RET_FRAG_NEEDED, BPF_FIB_LKUP_RET_NO_NEIGH,
    BPF_FIB_LKUP_RET_NOT_FWDED, BPF_FIB_LKUP_RET_PROHIBIT, BPF_FIB_LKUP_RET_SUCCESS,
    BPF_FIB_LKUP_RET_UNREACHABLE, TC_ACT_OK, TC_ACT_SHOT, bpf_redir_neigh,
};
use aya_ebpf::helpers::generated::bpf_redirect_neigh;
use aya_ebpf::programs::TcContext;
use xebec_dataplane_common::flow::{EGRESS, REASON_CHECKSUM};
use xebec_dataplane_common::nat::MARK_DONE;
use xebec_dataplane_common::{TCP, UDP};

use crate::frame::Frame;
use crate::packet::{ETHERNET, IPV6, Packet};
use crate::refuse;
use crate::rewrite;
use crate::route;
use crate::scratch::{Scratch, scratch, settle};
use crate::tell::{self, As};

/// There is a way.
pub const GO: u32 = 0;
/// There is none, and nobody is told.
pub const LOST: u32 = 1;

/// The packet is not translated where it leaves.
pub const LEAVES_NOT: u8 = 0;
/// It is, and what it becomes stands in `late`.
pub const LEAVES_HERE: u8 = 1;
/// It may be: the hook that it leaves by looks again.
pub const LEAVES_THERE: u8 = 2;

/// Bytes of the packet by its own header, without what fills a short frame up.
#[inline(always)]
pub fn length(ctx: &impl Frame, packet: &Packet) -> Option<u16> {
    if packet.is_v6() {
        let length: u16 = ctx.read(ETHERNET + 4)?;
        return Some(u16::from_be(length).saturating_add(IPV6 as u16));
    }
    Some(u16::from_be(ctx.read(ETHERNET + 2)?))
}

/// Bytes of the packet, or of each of those that the kernel put together to one and will cut again.
#[inline(always)]
pub fn length_of_each(ctx: &TcContext, packet: &Packet) -> Option<u16> {
    let skb: *const __sk_buff = ctx.skb.skb;
    // SAFETY: the kernel gives a valid context for the whole call.
    let size = unsafe { (*skb).gso_size };
    if size == 0 {
        return length(ctx, packet);
    }
    let headers = match packet.tuple.protocol {
        TCP => {
            let words: [u8; 2] = ctx.read(usize::from(packet.transport) + 12)?;
            usize::from(words[0] >> 4) * 4
        }
        UDP => 8,
        // Which are put together, and how, nobody else needs to know.
        _ => return Some(0),
    };
    let before = usize::from(packet.transport) - ETHERNET;
    Some((before + headers + size as usize) as u16)
}

/// Looks for the way of a packet that becomes `to`, before anything of it is changed: [`GO`] if there is one, or why
/// not: [`LOST`], or what its sender is told. Before it leaves it gets so many bytes `more`.
#[inline(always)]
pub fn find(ctx: &TcContext, more: u16) -> u32 {
    xebec_find_way(ctx.skb.skb, u32::from(more))
}

/// The same; checked by itself and once.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn xebec_find_way(skb: *mut __sk_buff, more: u32) -> u32 {
    match scratch() {
        Some(all) => look(&TcContext::new(skb), all, more as u16),
        None => LOST,
    }
}

#[inline(always)]
fn look(ctx: &TcContext, all: &mut Scratch, more: u16) -> u32 {
    if all.packet.ttl <= 1 {
        return refuse::EXCEEDED;
    }
    let Some(mut length) = length_of_each(ctx, &all.packet) else {
        return LOST;
    };
    let skb: *const __sk_buff = ctx.skb.skb;
    // SAFETY: the kernel gives a valid context for the whole call.
    let (device, size) = unsafe { ((*skb).ifindex, (*skb).gso_size) };
    // What the kernel cuts it cuts smaller then.
    if size == 0 {
        length = length.saturating_add(more);
    }
    let Some(found) = route::ask(ctx, all, device, length) else {
        return LOST;
    };
    match found {
        BPF_FIB_LKUP_RET_SUCCESS | BPF_FIB_LKUP_RET_NO_NEIGH => GO,
        BPF_FIB_LKUP_RET_FRAG_NEEDED => refuse::TOO_BIG,
        BPF_FIB_LKUP_RET_NOT_FWDED | BPF_FIB_LKUP_RET_UNREACHABLE => refuse::NO_ROUTE,
        BPF_FIB_LKUP_RET_PROHIBIT => refuse::PROHIBITED,
        BPF_FIB_LKUP_RET_BLACKHOLE => LOST,
        // The device is none of a router's, or the way is one that this table doesn't tell of: it goes back by where
        // it came from, if that leads there.
        _ => {
            all.way.device = device;
            all.way.hop.nh_family = 0;
            GO
        }
    }
}

/// Sends a packet that becomes `to` its way around the stack. What no device takes is the stack's: what is for the node
/// itself, and what is answered.
#[inline(always)]
pub fn around(ctx: &TcContext) -> i32 {
    xebec_around(ctx.skb.skb) as i32
}

/// The same; checked by itself and once.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn xebec_around(skb: *mut __sk_buff) -> u32 {
    match scratch() {
        Some(all) => pass(&TcContext::new(skb), all) as u32,
        None => TC_ACT_SHOT as u32,
    }
}

#[inline(always)]
fn pass(ctx: &TcContext, all: &mut Scratch) -> i32 {
    let skb: *const __sk_buff = ctx.skb.skb;
    // SAFETY: the kernel gives a valid context for the whole call.
    let device = unsafe { (*skb).ifindex };
    if all.packet.ttl <= 1
        || all.packet.is_error()
        || !all.to.destination.is_sent_on()
        || !refuse::is_for_this_host(ctx)
    {
        return TC_ACT_OK as i32;
    }
    let Some(length) = length_of_each(ctx, &all.packet) else {
        return TC_ACT_OK as i32;
    };
    match route::ask(ctx, all, device, length) {
        // By a device without our hooks the answers come through the stack, whose connection tracking must have seen
        // what they answer. Whom the node has not met yet, the stack looks for.
        Some(BPF_FIB_LKUP_RET_SUCCESS) if all.way.back != 0 => {}
        _ => return TC_ACT_OK as i32,
    }
    // Whether it is to bear the node's address, the other hook decides.
    let mut done = all.answers != 0 || all.way.native != 0;
    if all.leaves != LEAVES_NOT {
        done = all.leaves == LEAVES_HERE;
        if done {
            all.to.set(&all.late);
            settle();
            if !rewrite::apply(ctx) {
                return tell::dropped(EGRESS, REASON_CHECKSUM);
            }
        }
    }
    all.done = u8::from(done);
    settle();
    go(ctx, all)
}

/// Sends a packet the way that was found, as a router would.
#[inline(always)]
pub fn go(ctx: &TcContext, all: &mut Scratch) -> i32 {
    if !rewrite::hop(ctx, &all.packet) {
        return TC_ACT_SHOT as i32;
    }
    leave(ctx, all)
}

/// Sends a packet the way that was found.
#[inline(always)]
pub fn leave(ctx: &TcContext, all: &mut Scratch) -> i32 {
    let skb = ctx.skb.skb;
    // SAFETY: the kernel gives a valid context for the whole call.
    unsafe {
        // Another's mark is left to it.
        if all.done != 0 && all.way.back != 0 && (*skb).mark == 0 {
            (*skb).mark = MARK_DONE;
        }
    }
    let device = all.way.device;
    let hop = &raw mut all.way.hop;
    // SAFETY: the parameters are the map's; without them the helper asks the routing table.
    unsafe {
        if (*hop).nh_family == 0 {
            return bpf_redirect_neigh(device, core::ptr::null_mut(), 0, 0) as i32;
        }
        bpf_redirect_neigh(device, hop, size_of::<bpf_redir_neigh>() as i32, 0) as i32
    }
}

/// Whether a hook that sent the packet here did all that is to be done with it; then its mark is gone.
#[inline(always)]
pub fn is_done(ctx: &TcContext) -> bool {
    let skb = ctx.skb.skb;
    // SAFETY: the kernel gives a valid context for the whole call.
    unsafe {
        let done = (*skb).mark == MARK_DONE;
        if done {
            (*skb).mark = 0;
        }
        done
    }
}
