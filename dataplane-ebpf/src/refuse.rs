//! Answering what goes no further. For Services without endpoints TCP is reset, and the senders of other protocols learn
//! that the port is unreachable; what can't be sent on is answered as a router does. The packet itself becomes the
//! answer, which goes back the way it came.

use aya_ebpf::bindings::__sk_buff;
use aya_ebpf::bindings::bpf_adj_room_mode::BPF_ADJ_ROOM_MAC;
use aya_ebpf::helpers::generated::{
    bpf_csum_diff, bpf_skb_adjust_room, bpf_skb_change_tail, bpf_skb_load_bytes,
    bpf_skb_store_bytes,
};
use aya_ebpf::macros::map;
use aya_ebpf::maps::PerCpuArray;
use aya_ebpf::programs::TcContext;
use xebec_dataplane_common::flow::{
    REASON_NO_ROUTE, REASON_NO_SERVICE, REASON_TOO_BIG, REASON_TTL, SECOND,
};
use xebec_dataplane_common::ip::Ip;
use xebec_dataplane_common::{ICMP, ICMP6, TCP, UDP};

use crate::flow::{ACK, FIN, RST, SYN, now_ns};
use crate::frame::{Change, Frame, difference, mended};
use crate::nat;
use crate::packet::{ETHERNET, IPV6, Packet};
use crate::rewrite::pair;
use crate::scratch::{scratch, settle};

/// Bytes of an IPv4 header without options.
const IPV4: usize = 20;
/// Bytes of a TCP header without options.
const TCP_HEADER: usize = 20;
/// Bytes of an ICMP error before what it quotes.
const ICMP_HEADER: usize = 8;
/// So much of the refused packet is quoted at most: a checksum helper takes 512 bytes with the error's own header.
const QUOTE: u32 = 448;

/// Words of an answer before its transport's header, which lies at the same place for both families.
const BEFORE: usize = IPV6 / 4;
/// The first word of an IPv4 header.
const FIRST4: usize = (IPV6 - IPV4) / 4;
/// The first word of a quote.
const QUOTED: usize = BEFORE + ICMP_HEADER / 4;

/// An answer: its headers, and what it quotes, with a word to fill its last one up, and as much as IPv6's header is longer:
/// the verifier takes what is behind either for as long as it can be behind the shorter.
struct Answer {
    words: [u32; QUOTED + QUOTE as usize / 4 + 1 + (IPV6 - IPV4) / 4],
    /// Bytes of the quote beyond the shortest header.
    beyond: u32,
    /// Bytes of the quote behind the packet's own header.
    rest: u32,
}

#[map]
static ANSWER: PerCpuArray<Answer> = PerCpuArray::with_max_entries(1, 0);

/// A Service has no endpoints.
pub const NO_PORT: u32 = 2;
/// A packet has no hop left.
pub const EXCEEDED: u32 = 3;
/// It is too big for its way.
pub const TOO_BIG: u32 = 4;
/// No route leads there.
pub const NO_ROUTE: u32 = 5;
/// A route says that nobody may go there.
pub const PROHIBITED: u32 = 6;

/// What events say of it.
#[inline(always)]
pub fn reason(why: u32) -> u8 {
    match why {
        NO_PORT => REASON_NO_SERVICE,
        EXCEEDED => REASON_TTL,
        TOO_BIG => REASON_TOO_BIG,
        _ => REASON_NO_ROUTE,
    }
}

/// Type and code of its error.
#[inline(always)]
fn kind(why: u32, v6: bool) -> (u8, u8) {
    match (why, v6) {
        (EXCEEDED, false) => (11, 0),
        (TOO_BIG, false) => (3, 4),
        (NO_ROUTE, false) => (3, 0),
        (PROHIBITED, false) => (3, 13),
        (_, false) => (3, 3),
        (EXCEEDED, true) => (3, 0),
        (TOO_BIG, true) => (2, 0),
        (NO_ROUTE, true) => (1, 0),
        (PROHIBITED, true) => (1, 1),
        (_, true) => (1, 4),
    }
}

/// What may be sent of ICMP errors (RFC 1812, 4.3.2.8): time that was not used up yet.
struct Allowance {
    /// When it was last counted, in ns of the monotonic clock.
    counted: u64,
    /// ns that are left.
    left: u64,
}

#[map]
static ALLOWANCE: PerCpuArray<Allowance> = PerCpuArray::with_max_entries(1, 0);

/// So much time may be saved up.
const SAVED: u64 = SECOND / 20;

/// Whether an error may be sent; then it counts.
#[inline(always)]
fn may_tell() -> bool {
    let rate = nat::settings().errors;
    if rate == 0 {
        return true;
    }
    let Some(allowance) = ALLOWANCE.get_ptr_mut(0) else {
        return false;
    };
    let (now, price) = (now_ns(), SECOND / u64::from(rate));
    // SAFETY: the entry is this CPU's own, and no program of tc interrupts another on a CPU.
    unsafe {
        let most = if price > SAVED { price } else { SAVED };
        let saved = (*allowance).left + now.saturating_sub((*allowance).counted);
        let left = if saved > most { most } else { saved };
        let may = left >= price;
        (*allowance).counted = now;
        (*allowance).left = if may { left - price } else { left };
        may
    }
}

/// `PACKET_HOST`: the frame was for this device, and for no others.
const FOR_THIS_HOST: u32 = 0;

/// Whether the frame was sent to this node's device alone.
#[inline(always)]
pub fn is_for_this_host(ctx: &TcContext) -> bool {
    let skb: *const __sk_buff = ctx.skb.skb;
    // SAFETY: the kernel gives a valid context for the whole call.
    unsafe { (*skb).pkt_type == FOR_THIS_HOST }
}

/// Makes the packet the answer to itself, but for its hardware addresses. False if there is no answer, and then it must
/// be dropped.
#[inline(always)]
pub fn answer(ctx: &TcContext, why: u32) -> bool {
    xebec_answer(ctx.skb.skb, why) != 0
}

/// The same; checked by itself and once.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn xebec_answer(skb: *mut __sk_buff, why: u32) -> u32 {
    let Some(all) = scratch() else {
        return 0;
    };
    u32::from(is_answered(
        &TcContext::new(skb),
        &all.packet,
        (why, all.way.mtu),
    ))
}

#[inline(always)]
fn is_answered(ctx: &TcContext, packet: &Packet, (why, mtu): (u32, u32)) -> bool {
    // Whom nobody can have been is not answered, nor what is about something else, nor a part of a datagram.
    if packet.is_error() || packet.is_later() || !is_single(&packet.tuple.source) {
        return false;
    }
    let Some(answer) = ANSWER.get_ptr_mut(0) else {
        return false;
    };
    // SAFETY: the entry is this CPU's own, and no program of tc interrupts another on a CPU.
    let answer = unsafe { &mut *answer };
    if why == NO_PORT && packet.tuple.protocol == TCP {
        reset(ctx, packet, answer).is_some()
    } else {
        may_tell() && told(ctx, packet, answer, (why, mtu)).is_some()
    }
}

/// Whether a source is one host, which may be answered (RFC 1122, 3.2.2).
#[inline(always)]
fn is_single(source: &Ip) -> bool {
    let first = source.0[0].to_ne_bytes()[0];
    if source.is_v4() {
        let [first, ..] = source.as_v4().to_ne_bytes();
        return !matches!(first, 0 | 127 | 224..);
    }
    source.is_some() && first != 0xff
}

/// What the packet's network header says of it: its bytes, and its class of traffic.
#[inline(always)]
fn outer(ctx: &TcContext, packet: &Packet) -> Option<(u32, u8)> {
    if packet.is_v6() {
        let header = ctx.header(ETHERNET, IPV6)?;
        let (first, length): (u32, u16) = (header.at(0), header.at(4));
        let class = (u32::from_be(first) >> 20) as u8;
        return Some((u32::from(u16::from_be(length)) + IPV6 as u32, class));
    }
    let header = ctx.header(ETHERNET, IPV4)?;
    let (class, length): (u8, u16) = (header.at(1), header.at(2));
    Some((u32::from(u16::from_be(length)), class))
}

/// TCP's answer to a segment that comes to a closed port (RFC 9293, 3.10.7.1).
#[inline(always)]
fn reset(ctx: &TcContext, packet: &Packet, answer: &mut Answer) -> Option<()> {
    let flags = packet.tcp_flags;
    if flags & RST != 0 || packet.fragment != 0 {
        return None;
    }
    let (total, class) = outer(ctx, packet)?;
    let transport = usize::from(packet.transport);
    let header = ctx.header(transport, TCP_HEADER)?;
    let (sequence, acknowledged, words) = (
        u32::from_be(header.at(4)),
        header.at::<u32>(8),
        header.at::<u8>(12) >> 4,
    );
    let (sequence, acknowledged, flags) = if flags & ACK != 0 {
        (acknowledged, 0, RST)
    } else {
        let headers = (transport - ETHERNET) as u32 + u32::from(words) * 4;
        let mut length = total.checked_sub(headers)?;
        length += u32::from(flags & SYN != 0) + u32::from(flags & FIN != 0);
        (0, sequence.wrapping_add(length).to_be(), RST | ACK)
    };
    let tuple = &packet.tuple;
    let words = &mut answer.words;
    words[BEFORE] = pair(tuple.destination_port, tuple.source_port);
    words[BEFORE + 1] = sequence;
    words[BEFORE + 2] = acknowledged;
    words[BEFORE + 3] = (5 << 28 | u32::from(flags) << 16).to_be();
    words[BEFORE + 4] = 0;
    // The class stays, without what it says of congestion.
    let class = class & 0xfc;
    let sum = network(packet, answer, (TCP_HEADER as u32, TCP, class), NO_PORT);
    let own = sum_of::<{ TCP_HEADER / 4 }>(&answer.words, BEFORE);
    settle();
    put(ctx, packet, answer, TCP_HEADER as u32)?;
    // A pod's kernel leaves the checksum to the last device, and then only that of the pseudo header is due. The
    // helper knows; from nothing on, it makes either.
    let change = |by, pseudo| Change {
        by,
        pseudo,
        udp: false,
        v6: packet.is_v6(),
    };
    let at = ETHERNET + network_length(packet) + 16;
    ctx.mend_transport(at, change(difference(own), false))?;
    ctx.mend_transport(at, change(difference(sum), true))
}

/// An ICMP error.
#[inline(always)]
fn told(
    ctx: &TcContext,
    packet: &Packet,
    answer: &mut Answer,
    (why, mtu): (u32, u32),
) -> Option<()> {
    let (total, _) = outer(ctx, packet)?;
    let left = left_to_device(ctx, packet);
    let skb: *const __sk_buff = ctx.skb.skb;
    // SAFETY: the kernel gives a valid context for the whole call.
    let there = unsafe { (*skb).len }.checked_sub(ETHERNET as u32)?;
    // A short frame is filled up to what Ethernet wants.
    let whole = if total < there { total } else { there };
    let whole = if whole < QUOTE { whole } else { QUOTE };
    // At least a header, and no more than there is room for: kernels before 6.8 or so learn that from one bound at a time.
    answer.beyond = whole.checked_sub(IPV4 as u32)?;
    settle();
    let beyond = answer.beyond;
    if beyond > QUOTE - IPV4 as u32 {
        return None;
    }
    let quoted = IPV4 as u32 + beyond;
    let quote = &raw mut answer.words[QUOTED];
    // SAFETY: the quote has room for so many bytes, and the word behind them is there, too.
    let loaded = unsafe {
        let loaded = bpf_skb_load_bytes(ctx.skb.skb.cast(), ETHERNET as u32, quote.cast(), quoted);
        core::ptr::write_unaligned(quote.byte_add(quoted as usize), 0);
        loaded
    };
    if loaded != 0 {
        return None;
    }
    let v6 = packet.is_v6();
    let (kind, code) = kind(why, v6);
    let protocol = if v6 { ICMP6 } else { ICMP };
    let length = ICMP_HEADER as u32 + quoted;
    // Such errors are of the network's own class.
    let pseudo = network(packet, answer, (length, protocol, 0xc0), why);
    answer.words[BEFORE] = u32::from_ne_bytes([kind, code, 0, 0]);
    answer.words[BEFORE + 1] = if why == TOO_BIG { mtu.to_be() } else { 0 };
    let network = network_length(packet) as u32;
    answer.rest = quoted.checked_sub(network)?;
    settle();
    let rest = answer.rest;
    if rest > QUOTE - IPV4 as u32 {
        return None;
    }
    let words = &raw mut answer.words;
    // SAFETY: all of the quote and a word more were written just above, and the rest ends with it.
    let (head, tail) = unsafe {
        let (first, size, behind) = if v6 {
            ((*words).as_mut_ptr().add(BEFORE), 48, IPV6 / 4)
        } else {
            ((*words).as_mut_ptr().add(BEFORE), 28, IPV4 / 4)
        };
        let last = (*words).as_mut_ptr().add(QUOTED + behind);
        let null = core::ptr::null_mut();
        (
            bpf_csum_diff(null, 0, first, size, 0),
            bpf_csum_diff(null, 0, last, (rest + 3) & !3, 0),
        )
    };
    if head < 0 || tail < 0 {
        return None;
    }
    // Once the last device has made a checksum, all that it covers has this sum.
    let tail = if left == OWN {
        tail as u64
    } else {
        u64::from(!(left as u16))
    };
    // IPv4's errors have no pseudo header.
    let pseudo = if v6 { pseudo } else { 0 };
    let checksum = mended(0xffff, difference(head as u64 + tail + pseudo)).to_ne_bytes();
    answer.words[BEFORE] = u32::from_ne_bytes([kind, code, checksum[0], checksum[1]]);
    settle();
    let (first, more) = if v6 {
        (&raw const answer.words[0], IPV6 + ICMP_HEADER)
    } else {
        (&raw const answer.words[FIRST4], IPV4 + ICMP_HEADER)
    };
    // What is quoted stays where it is, and the error's headers come before it: so what the last device does is right.
    let skb = ctx.skb.skb;
    // SAFETY: the context is the kernel's, and the headers have so many bytes.
    let put = unsafe {
        bpf_skb_change_tail(skb, ETHERNET as u32 + quoted, 0) == 0
            && bpf_skb_adjust_room(skb, more as i32, BPF_ADJ_ROOM_MAC, 0) == 0
            && bpf_skb_store_bytes(skb, ETHERNET as u32, first.cast(), more as u32, 0) == 0
    };
    put.then_some(())
}

/// The packet has a checksum of its own.
const OWN: u32 = 1 << 16;

/// What stands in the place of a checksum that the last device makes from there on, or [`OWN`].
#[inline(always)]
fn left_to_device(ctx: &TcContext, packet: &Packet) -> u32 {
    let transport = usize::from(packet.transport);
    let at = match packet.tuple.protocol {
        TCP => transport + 16,
        UDP => transport + 6,
        _ => return OWN,
    };
    if transport != ETHERNET + network_length(packet) {
        return OWN;
    }
    let Some(found) = ctx.read::<u16>(at) else {
        return OWN;
    };
    let probe = Change {
        by: 1,
        pseudo: false,
        udp: false,
        v6: packet.is_v6(),
    };
    // The helper leaves alone what the last device makes.
    let _ = ctx.mend_transport(at, probe);
    if ctx.read::<u16>(at) == Some(found) {
        return u32::from(found);
    }
    let _ = ctx.write(at, &found);
    OWN
}

/// Bytes of the answer's network header.
#[inline(always)]
fn network_length(packet: &Packet) -> usize {
    if packet.is_v6() { IPV6 } else { IPV4 }
}

/// Writes the network header, to the packet's sender from whom it was for, or from this node where that is who speaks;
/// gives the sum of the pseudo header.
#[inline(always)]
fn network(
    packet: &Packet,
    answer: &mut Answer,
    (length, protocol, class): (u32, u8, u8),
    why: u32,
) -> u64 {
    let words = &mut answer.words;
    let (mut from, to) = (packet.tuple.destination.words(), &packet.tuple.source);
    if why != NO_PORT {
        let node = nat::settings().node(to);
        if node.is_some() {
            from = node;
        }
    }
    let sum = u64::from(length.to_be()) + u64::from(u32::from(protocol).to_be());
    if packet.is_v6() {
        words[0] = (6 << 28 | u32::from(class) << 20).to_be();
        words[1] = (length << 16 | u32::from(protocol) << 8 | HOPS).to_be();
        words[2] = from.0[0];
        words[3] = from.0[1];
        words[4] = from.0[2];
        words[5] = from.0[3];
        words[6] = to.0[0];
        words[7] = to.0[1];
        words[8] = to.0[2];
        words[9] = to.0[3];
        return sum + sum_of::<8>(words, 2);
    }
    words[FIRST4] = (0x45 << 24 | u32::from(class) << 16 | (length + IPV4 as u32)).to_be();
    // Not to be made fragments of, so it needs no identification.
    words[FIRST4 + 1] = 0x4000_u32.to_be();
    let third = HOPS << 24 | u32::from(protocol) << 16;
    words[FIRST4 + 2] = third.to_be();
    words[FIRST4 + 3] = from.as_v4();
    words[FIRST4 + 4] = to.as_v4();
    let checksum = mended(0xffff, difference(sum_of::<5>(words, FIRST4)));
    words[FIRST4 + 2] = (third | u32::from(u16::from_be(checksum))).to_be();
    sum + sum_of::<2>(words, FIRST4 + 3)
}

/// Hops that an answer has.
const HOPS: u32 = 64;

/// The sum of some words.
#[inline(always)]
fn sum_of<const COUNT: usize>(words: &[u32], first: usize) -> u64 {
    let mut sum = 0;
    for index in 0..COUNT {
        sum += u64::from(words[first + index]);
    }
    sum
}

/// Puts the answer in the packet's place; `length` is all behind its network header.
#[inline(always)]
fn put(ctx: &TcContext, packet: &Packet, answer: &Answer, length: u32) -> Option<()> {
    let (first, network) = if packet.is_v6() {
        (&raw const answer.words[0], IPV6 as u32)
    } else {
        (&raw const answer.words[FIRST4], IPV4 as u32)
    };
    if length > ICMP_HEADER as u32 + QUOTE {
        return None;
    }
    let (skb, length) = (ctx.skb.skb, network + length);
    // SAFETY: the context is the kernel's, and the answer has so many bytes.
    let put = unsafe {
        bpf_skb_change_tail(skb, ETHERNET as u32 + length, 0) == 0
            && bpf_skb_store_bytes(skb, ETHERNET as u32, first.cast(), length, 0) == 0
    };
    put.then_some(())
}
