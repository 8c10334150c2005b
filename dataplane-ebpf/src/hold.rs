//! Holding resolvers' answers: a pod whose rules name domains gets an answer once the agent has made the rules know its
//! addresses, so that the pod's first packet there is let through.

use aya_ebpf::bindings::__sk_buff;
use aya_ebpf::helpers::generated::{bpf_ktime_get_ns, bpf_skb_load_bytes};
use xebec_dataplane_common::dns::{Held, LONGEST};

use crate::maps::{ANSWERS, LISTENING};
use crate::scratch::scratch;
use crate::table::hidden;
use crate::tell::{self, As};

/// Whether a resolver's answer that is about to enter a pod whose rules name domains, as it is now, was taken instead, to be sent on
/// by the agent.
#[inline(always)]
pub fn holds(skb: *mut __sk_buff, ifindex: u32) -> bool {
    xebec_hold(skb, ifindex) != 0
}

/// The same; checked by itself and once.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn xebec_hold(skb: *mut __sk_buff, ifindex: u32) -> u32 {
    let Some(listening) = LISTENING.get_ptr(0) else {
        return 0;
    };
    // SAFETY: the entry is there as long as the map is, and the agent writes a word at once; the other helper has no
    // arguments.
    let listens =
        unsafe { bpf_ktime_get_ns() < core::ptr::read_volatile(&raw const (*listening).until) };
    if listens && take(skb, ifindex).is_some() {
        tell::count(As::Held);
        return 1;
    }
    tell::count(As::Unheld);
    0
}

/// Puts the frame into the ring. None where it is too long, or the ring is full.
#[inline(always)]
fn take(skb: *mut __sk_buff, ifindex: u32) -> Option<()> {
    let all = scratch()?;
    // SAFETY: the kernel gives a valid context for the whole call.
    let (length, size, came_by) = unsafe { ((*skb).len, (*skb).gso_size, (*skb).ingress_ifindex) };
    if length == 0 || length as usize > LONGEST || size != 0 || all.packet.fragment != 0 {
        return None;
    }
    let mut entry = ANSWERS.reserve::<Held>(0)?;
    let held = entry.as_mut_ptr();
    let length = (hidden(length).wrapping_sub(1) & (LONGEST as u32 - 1)) + 1;
    // SAFETY: the entry has room for all of it, and the frame so many bytes at least.
    let loaded = unsafe {
        (*held).server = all.packet.tuple.source.words();
        (*held).ifindex = ifindex;
        (*held).length = length as u16;
        (*held).here = u8::from(came_by == 0);
        (*held).pad = 0;
        bpf_skb_load_bytes(skb.cast(), 0, (&raw mut (*held).frame).cast(), length)
    };
    if loaded != 0 {
        entry.discard(0);
        return None;
    }
    entry.submit(0);
    Some(())
}
