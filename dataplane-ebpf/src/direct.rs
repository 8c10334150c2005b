//! Direct server return: a packet from outside to a backend of another node goes there in a Geneve packet (RFC 8926) as it
//! came, with the backend in an option. The node of the backend translates it as if it had come to that node, so the
//! backend sees the client's address, and answers leave by that node's own routes with the frontend's address.

use aya_ebpf::bindings::{
    __sk_buff, BPF_F_ADJ_ROOM_ENCAP_L3_IPV4, BPF_F_ADJ_ROOM_ENCAP_L3_IPV6,
    BPF_F_ADJ_ROOM_ENCAP_L4_UDP, bpf_adj_room_mode::BPF_ADJ_ROOM_MAC,
};
use aya_ebpf::helpers::generated::{bpf_skb_adjust_room, bpf_skb_store_bytes};
use aya_ebpf::maps::lpm_trie::Key;
use aya_ebpf::programs::TcContext;
use xebec_dataplane_common::flow::{Flow, FlowKey, TURN_DIRECT, TURN_FORTH};
use xebec_dataplane_common::ip::Ip;
use xebec_dataplane_common::nat::{DIRECT_TCP, DIRECT_UDP, GENEVE_OPTION, GENEVE_PORT};
use xebec_dataplane_common::service::EXTERNAL;
use xebec_dataplane_common::{SCTP, TCP, UDP};

use crate::balance;
use crate::flow;
use crate::frame::{Frame, difference, mended};
use crate::lookup::{At, look_up};
use crate::maps::NATIVE;
use crate::nat::{self, Turn};
use crate::packet::{ETHERNET, ETHERTYPE_IPV4, ETHERTYPE_IPV6, IPV6};
use crate::rewrite::{self, pair};
use crate::scratch::{Scratch, scratch, settle};
use crate::table::{self, How, Which};
use crate::translate::{self, Plan};
use crate::way;

/// Words of an IPv6 header; one of IPv4 begins at [`FIRST4`], so that what follows lies at one place.
const BEFORE: usize = IPV6 / 4;
const FIRST4: usize = 5;
/// Words of the headers of UDP and Geneve, and of the option.
const BEHIND: usize = 2 + 2 + OPTION;
/// Words of the option: its header, an address, a port.
const OPTION: usize = 6;
/// Bytes of all outer headers.
const MORE4: u32 = ((BEFORE - FIRST4 + BEHIND) * 4) as u32;
const MORE6: u32 = ((BEFORE + BEHIND) * 4) as u32;

/// Hops that an outer packet has.
const HOPS: u32 = 64;
/// Ports that outer packets come from: they spread flows over ways, and nobody answers.
const FIRST_SOURCE: u32 = 0xc000;

/// Outer headers.
pub struct Outer([u32; BEFORE + BEHIND]);

/// Bytes of the outer headers of a family.
#[inline(always)]
fn more(v6: bool) -> u32 {
    if v6 { MORE6 } else { MORE4 }
}

/// The node that an address is of or on; none for those outside of the cluster.
#[inline(always)]
fn home(address: &Ip) -> Option<Ip> {
    let home = NATIVE.get(&Key::new(128, *address))?;
    if home.is_some() {
        Some(home.words())
    } else {
        None
    }
}

/// Whether the flow to the backend that was chosen is one whose backend answers directly.
#[inline(always)]
pub fn is_meant(all: &Scratch) -> bool {
    let wanted = match all.packet.tuple.protocol {
        TCP | SCTP => DIRECT_TCP,
        UDP => DIRECT_UDP,
        _ => return false,
    };
    // Who knows the way to pods may be one, or be on the backend's node, whose answers meet no hook on their way.
    nat::settings().direct & wanted != 0
        && all.choice.flags & EXTERNAL != 0
        && home(&all.choice.address).is_some_and(|home| !translate::is_node(&home))
        && !translate::is_native(&all.packet.tuple.source)
}

/// Enters a flow to the backend that was chosen.
#[inline(never)]
pub fn begin(all: &mut Scratch) -> bool {
    // `to` is the outer packet's, and the flow's own source stays.
    let outer = all.to.source.words();
    all.to.source = all.packet.tuple.source.words();
    nat::part();
    all.to.source = outer;
    all.begun = Flow {
        seen: flow::now(&all.packet),
        backend: all.choice.backend,
        backend_generation: all.choice.generation,
        service: all.choice.service,
        turn: TURN_FORTH | TURN_DIRECT,
        ..flow::plain()
    };
    all.begun.to.set(&all.packet.tuple);
    all.begun.to.destination = all.choice.address.words();
    all.begun.to.destination_port = all.choice.port;
    all.begun.from_low = u8::from(FlowKey::write(&all.packet.tuple, &mut all.key));
    table::enter(Which::Key, How::Over)
}

/// Looks for the way to the node of the backend in `to`, which then is the outer packet's. As [`way::find`], nothing is
/// changed.
#[inline(always)]
pub fn find_way(ctx: &TcContext, all: &mut Scratch) -> u32 {
    let Some(home) = home(&all.to.destination) else {
        return way::LOST;
    };
    let words = &mut all.outer.0;
    words[BEFORE + 4] = GENEVE_OPTION.to_be();
    words[BEFORE + 5] = all.to.destination.0[0];
    words[BEFORE + 6] = all.to.destination.0[1];
    words[BEFORE + 7] = all.to.destination.0[2];
    words[BEFORE + 8] = all.to.destination.0[3];
    words[BEFORE + 9] = pair(all.to.destination_port, 0);
    all.to.source = nat::settings().node(&home);
    all.to.destination = home;
    settle();
    let more = more(all.packet.is_v6());
    let why = way::find(ctx, more as u16);
    all.way.mtu = all.way.mtu.saturating_sub(more);
    why
}

/// Puts the packet into another, from `to`'s source to its destination.
#[inline(always)]
pub fn wrap(ctx: &TcContext) -> bool {
    xebec_wrap(ctx.skb.skb) != 0
}

/// The same; checked by itself and once.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn xebec_wrap(skb: *mut __sk_buff) -> u32 {
    let Some(all) = scratch() else {
        return 0;
    };
    u32::from(put_on(&TcContext::new(skb), all).is_some())
}

#[inline(always)]
fn put_on(ctx: &TcContext, all: &mut Scratch) -> Option<()> {
    let v6 = all.packet.is_v6();
    if !rewrite::hop(ctx, &all.packet) {
        return None;
    }
    let inner = u32::from(way::length(ctx, &all.packet)?);
    let first = u32::from_be(ctx.read(ETHERNET)?);
    let tuple = &all.packet.tuple;
    let spread =
        tuple.source.0[3] ^ u32::from(tuple.source_port) ^ (u32::from(tuple.destination_port) << 7);
    let source = FIRST_SOURCE | (spread ^ spread >> 16) & 0x3fff;
    let (from, to) = (&all.to.source, &all.to.destination);
    let words = &mut all.outer.0;
    // What the kernel will cut is too long to be told of; it tells then.
    let length = |more: u32| {
        let length = inner + more;
        if length > 0xffff { 0xffff } else { length }
    };
    words[BEFORE] = (source << 16 | u32::from(GENEVE_PORT)).to_be();
    // A checksum of 0 means none (RFC 6935, 5).
    words[BEFORE + 1] = (length(BEHIND as u32 * 4) << 16).to_be();
    let ethertype = if v6 { ETHERTYPE_IPV6 } else { ETHERTYPE_IPV4 };
    // The option is critical: who does not know it must not take the packet.
    words[BEFORE + 2] =
        ((OPTION as u32) << 24 | 0x40 << 16 | u32::from(u16::from_be(ethertype))).to_be();
    words[BEFORE + 3] = 0;
    let (start, more) = if v6 {
        // Version, class and flow label are the inner packet's.
        words[0] = first.to_be();
        let behind = length(BEHIND as u32 * 4);
        words[1] = (behind << 16 | u32::from(UDP) << 8 | HOPS).to_be();
        (words[2], words[3], words[4], words[5]) = (from.0[0], from.0[1], from.0[2], from.0[3]);
        (words[6], words[7], words[8], words[9]) = (to.0[0], to.0[1], to.0[2], to.0[3]);
        (&raw const words[0], MORE6)
    } else {
        let class = first & 0x00ff_0000;
        let third = HOPS << 24 | u32::from(UDP) << 16;
        words[FIRST4] = (0x45 << 24 | class | length(MORE4)).to_be();
        // Not to be made fragments of, so it needs no identification.
        words[FIRST4 + 1] = 0x4000_u32.to_be();
        words[FIRST4 + 2] = third.to_be();
        words[FIRST4 + 3] = from.as_v4();
        words[FIRST4 + 4] = to.as_v4();
        let mut sum = 0;
        for index in 0..5 {
            sum += u64::from(words[FIRST4 + index]);
        }
        let checksum = mended(0xffff, difference(sum));
        words[FIRST4 + 2] = (third | u32::from(u16::from_be(checksum))).to_be();
        (&raw const words[FIRST4], MORE4)
    };
    let family = if v6 {
        BPF_F_ADJ_ROOM_ENCAP_L3_IPV6
    } else {
        BPF_F_ADJ_ROOM_ENCAP_L3_IPV4
    };
    let flags = u64::from(family | BPF_F_ADJ_ROOM_ENCAP_L4_UDP);
    let skb = ctx.skb.skb;
    // SAFETY: the context is the kernel's, and the headers have so many bytes.
    let done = unsafe {
        bpf_skb_adjust_room(skb, more as i32, BPF_ADJ_ROOM_MAC, flags) == 0
            && bpf_skb_store_bytes(skb, ETHERNET as u32, start.cast(), more, 0) == 0
    };
    done.then_some(())
}

/// Whether the packet is one that another node put a packet into.
#[inline(always)]
pub fn is_wrapped(all: &Scratch) -> bool {
    let tuple = &all.packet.tuple;
    tuple.protocol == UDP
        && tuple.destination_port == GENEVE_PORT.to_be()
        && all.packet.fragment == 0
        && nat::settings().direct != 0
        && translate::is_node(&tuple.destination)
        // A node, and not one of its pods: those speak for themselves alone.
        && !translate::is_node(&tuple.source)
        && home(&tuple.source) == Some(tuple.source)
}

/// Takes the packet out of another, and the backend from its option; none, and nothing changed, if it has no such
/// option.
#[inline(always)]
pub fn unwrap(ctx: &TcContext) -> bool {
    xebec_unwrap(ctx.skb.skb) != 0
}

/// The same; checked by itself and once.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn xebec_unwrap(skb: *mut __sk_buff) -> u32 {
    let Some(all) = scratch() else {
        return 0;
    };
    u32::from(take_off(&TcContext::new(skb), all).is_some())
}

#[inline(always)]
fn take_off(ctx: &TcContext, all: &mut Scratch) -> Option<()> {
    let v6 = all.packet.is_v6();
    let (ip, ethertype) = if v6 {
        (IPV6, ETHERTYPE_IPV6)
    } else {
        (IPV6 - FIRST4 * 4, ETHERTYPE_IPV4)
    };
    if usize::from(all.packet.transport) != ETHERNET + ip {
        return None;
    }
    let skb: *const __sk_buff = ctx.skb.skb;
    let more = more(v6);
    // As much as there will be to be read of what is inside.
    // SAFETY: the kernel gives a valid context for the whole call.
    let length = unsafe { (*skb).len };
    let wanted = ETHERNET as u32 + more + 80;
    ctx.pull_data(if length < wanted { length } else { wanted })
        .ok()?;
    let header = ctx.header(ETHERNET + ip + 8, 32)?;
    let (kind, option): (u32, u32) = (header.at(0), header.at(8));
    let ours = (OPTION as u32) << 24 | 0x40 << 16 | u32::from(u16::from_be(ethertype));
    if kind != ours.to_be() || option != GENEVE_OPTION.to_be() {
        return None;
    }
    all.choice.address = header.ip(12);
    all.choice.port = header.at(28);
    // SAFETY: the context is the kernel's.
    let done = unsafe { bpf_skb_adjust_room(ctx.skb.skb, -(more as i32), BPF_ADJ_ROOM_MAC, 0) };
    (done == 0).then_some(())
}

/// Looks for the translation of a packet that was taken out of another: the backend was chosen by the other node.
#[inline(always)]
pub fn plan(all: &mut Scratch) -> Plan {
    let here =
        translate::is_node(&all.choice.address) || translate::is_endpoint(&all.choice.address);
    if !here {
        return Plan::Drop;
    }
    if look_up(At::Unwrapped).turn == Turn::Entry {
        let same =
            all.to.destination == all.choice.address && all.to.destination_port == all.choice.port;
        if same || all.packet.is_error() {
            return Plan::Known;
        }
    }
    // The other node knows the flow, if this one doesn't, but not whom the rest of a datagram is for.
    if all.packet.is_error() || all.packet.is_later() {
        return Plan::Drop;
    }
    all.choice.backend = 0;
    all.choice.generation = 0;
    all.choice.service = balance::service(&all.packet.tuple);
    all.to.set(&all.packet.tuple);
    all.to.destination = all.choice.address.words();
    all.to.destination_port = all.choice.port;
    all.stays = 1;
    Plan::Begins
}
