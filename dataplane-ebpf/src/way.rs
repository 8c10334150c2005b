//! Asking the routing table for the way of a packet that was translated, and sending it there.

use aya_ebpf::EbpfContext;
use aya_ebpf::bindings::{
    __sk_buff, BPF_FIB_LKUP_RET_BLACKHOLE, BPF_FIB_LKUP_RET_FRAG_NEEDED, BPF_FIB_LKUP_RET_NO_NEIGH,
    BPF_FIB_LKUP_RET_NOT_FWDED, BPF_FIB_LKUP_RET_PROHIBIT, BPF_FIB_LKUP_RET_SUCCESS,
    BPF_FIB_LKUP_RET_UNREACHABLE, TC_ACT_SHOT, bpf_fib_lookup, bpf_redir_neigh,
};
use aya_ebpf::helpers::generated::{bpf_fib_lookup as ask_routes, bpf_redirect_neigh};
use aya_ebpf::programs::TcContext;
use xebec_dataplane_common::nat::Tuple;
use xebec_dataplane_common::{TCP, UDP};

use crate::frame::Frame;
use crate::packet::{ETHERNET, IPV6, Packet};
use crate::refuse;
use crate::rewrite;
use crate::scratch::{Scratch, scratch};

const AF_INET: u8 = 2;
const AF_INET6: u8 = 10;

/// What is asked and what is known of the way then, in the kernel's own words.
pub struct Way {
    /// The question, and the answer over it.
    pub route: bpf_fib_lookup,
    /// The next hop.
    hop: bpf_redir_neigh,
    /// Bytes that the way takes, where a packet has more.
    pub mtu: u32,
}

/// There is a way.
pub const GO: u32 = 0;
/// There is none, and nobody is told.
pub const LOST: u32 = 1;

/// Asks the routing table, of a packet of this many bytes that came by a device; 0 bytes for one that the kernel cuts
/// before it is sent.
#[inline(always)]
pub fn ask(
    ctx: &(impl EbpfContext + Frame),
    packet: &Packet,
    to: &Tuple,
    route: &mut bpf_fib_lookup,
    (device, length): (u32, u16),
) -> Option<i64> {
    // All of it counts: of zeros, the table takes nothing for a wish.
    (route.l4_protocol, route.sport, route.dport) = (0, 0, 0);
    route.ifindex = device;
    route.__bindgen_anon_1.tot_len = length;
    route.__bindgen_anon_5.tbid = 0;
    if packet.is_v6() {
        let first: u32 = ctx.read(ETHERNET)?;
        route.family = AF_INET6;
        // Traffic class and flow label, without the version.
        route.__bindgen_anon_2.flowinfo = first & 0x0fff_ffff_u32.to_be();
        route.__bindgen_anon_3.ipv6_src = to.source.words().0;
        route.__bindgen_anon_4.ipv6_dst = to.destination.words().0;
    } else {
        let [_, service]: [u8; 2] = ctx.read(ETHERNET)?;
        route.family = AF_INET;
        route.__bindgen_anon_2.flowinfo = 0;
        route.__bindgen_anon_2.tos = service;
        route.__bindgen_anon_3.ipv4_src = to.source.as_v4();
        route.__bindgen_anon_4.ipv4_dst = to.destination.as_v4();
    }
    // SAFETY: context and structure are valid, and the size is the structure's.
    Some(unsafe { ask_routes(ctx.as_ptr(), route, size_of::<bpf_fib_lookup>() as i32, 0) })
}

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
    let way = &mut all.way;
    let found = ask(ctx, &all.packet, &all.to, &mut way.route, (device, length));
    let Some(found) = found else {
        return LOST;
    };
    // SAFETY: all bytes of the unions are written, and mean something as numbers.
    unsafe {
        match u32::try_from(found).unwrap_or(u32::MAX) {
            BPF_FIB_LKUP_RET_SUCCESS | BPF_FIB_LKUP_RET_NO_NEIGH => {
                // The next hop may be of another family.
                way.hop.nh_family = u32::from(way.route.family);
                way.hop.__bindgen_anon_1.ipv6_nh = way.route.__bindgen_anon_4.ipv6_dst;
                GO
            }
            BPF_FIB_LKUP_RET_FRAG_NEEDED => {
                way.mtu = u32::from(way.route.__bindgen_anon_1.mtu_result);
                refuse::TOO_BIG
            }
            BPF_FIB_LKUP_RET_NOT_FWDED | BPF_FIB_LKUP_RET_UNREACHABLE => refuse::NO_ROUTE,
            BPF_FIB_LKUP_RET_PROHIBIT => refuse::PROHIBITED,
            BPF_FIB_LKUP_RET_BLACKHOLE => LOST,
            // The device is none of a router's, or the way is one that this table doesn't tell of: it goes back by
            // where it came from, if that leads there.
            _ => {
                way.route.ifindex = device;
                way.hop.nh_family = 0;
                GO
            }
        }
    }
}

/// Sends a packet the way that was found, as a router would.
#[inline(always)]
pub fn go(ctx: &TcContext, all: &mut Scratch) -> i32 {
    if !rewrite::hop(ctx, &all.packet) {
        return TC_ACT_SHOT as i32;
    }
    leave(all)
}

/// Sends a packet the way that was found.
#[inline(always)]
pub fn leave(all: &mut Scratch) -> i32 {
    let device = all.way.route.ifindex;
    let hop = &raw mut all.way.hop;
    // SAFETY: the parameters are the map's; without them the helper asks the routing table.
    unsafe {
        if (*hop).nh_family == 0 {
            return bpf_redirect_neigh(device, core::ptr::null_mut(), 0, 0) as i32;
        }
        bpf_redirect_neigh(device, hop, size_of::<bpf_redir_neigh>() as i32, 0) as i32
    }
}
