//! Copies of messages that pods exchange: questions to resolvers and their answers, and the first lines of HTTP of pods
//! that want them told. Packets go on as they are.

use aya_ebpf::bindings::__sk_buff;
use aya_ebpf::helpers::generated::bpf_skb_load_bytes;
use aya_ebpf::helpers::{bpf_get_smp_processor_id, bpf_ktime_get_ns};
use xebec_dataplane_common::flow::{AGGREGATE_OFF, AT_MESSAGE, EGRESS, Event, FORWARDED, INGRESS};
use xebec_dataplane_common::ip::Ip;
use xebec_dataplane_common::message::{HTTP_BEGINNINGS, LONG, Message, SHORT};
use xebec_dataplane_common::policy::{LEARNS, READS_HTTP};
use xebec_dataplane_common::{TCP, UDP};

use crate::maps::{EVENTS, LISTENING};
use crate::scratch::{Scratch, scratch, settle};
use crate::table::hidden;
use crate::tell;

/// Bytes of UDP's header.
const UDP_HEADER: u32 = 8;
/// Bytes of TCP's header as far as its length, which stands last.
const TCP_BEGINNING: usize = 13;

/// The ports of resolvers, as pods see them.
#[inline(always)]
fn resolvers() -> u64 {
    match LISTENING.get_ptr(0) {
        // SAFETY: the entry is there as long as the map is, and aligned; the agent writes all ports at once.
        Some(listening) => unsafe {
            core::ptr::read_volatile((&raw const (*listening).ports).cast::<u64>())
        },
        None => 0,
    }
}

/// Not 0 where the port is among these four. There is no branch in it that the verifier would follow both ways.
#[inline(always)]
fn is_among(ports: u64, port: u16) -> u64 {
    const ONES: u64 = 0x0001_0001_0001_0001;
    // One of four numbers of 16 bits is 0 then.
    let unlike = ports ^ (u64::from(port) * ONES);
    unlike.wrapping_sub(ONES) & !unlike & (ONES << 15)
}

/// Whether what leaves a pod under `rules` may be a message that is told of.
#[inline(always)]
pub fn may_leave(all: &Scratch, rules: u32) -> bool {
    let asks = is_among(resolvers(), all.packet.tuple.destination_port);
    asks | u64::from(rules & READS_HTTP) != 0
}

/// Whether what is about to enter a pod under `rules` may be a message that is told of, or held.
#[inline(always)]
pub fn may_enter(all: &Scratch, rules: u32) -> bool {
    let ports = resolvers();
    let answers =
        is_among(ports, all.packet.tuple.source_port) | is_among(ports, all.to.source_port);
    answers | u64::from(rules & (READS_HTTP | LEARNS)) != 0
}

/// 1 where the packet answers what the other end began.
#[inline(always)]
fn is_reply(all: &Scratch) -> u8 {
    (all.known.yes | all.known.again) & all.known.reply
}

/// Whether the packet is of a protocol that messages come by.
#[inline(always)]
fn may_carry(all: &Scratch) -> bool {
    matches!(all.packet.tuple.protocol, UDP | TCP) && !all.packet.is_error()
}

/// Whether the packet answers what its pod asked a resolver.
#[inline(always)]
pub fn is_answer(all: &Scratch) -> bool {
    // As the pod sees it.
    let port = if all.turned != 0 {
        all.to.source_port
    } else {
        all.packet.tuple.source_port
    };
    is_reply(all) != 0 && may_carry(all) && is_among(resolvers(), port) != 0
}

/// Tells of what a pod under `rules` says, if it is a message.
#[inline(always)]
pub fn leaves(skb: *mut __sk_buff, all: &Scratch, rules: u32) {
    let asks = || is_among(resolvers(), all.packet.tuple.destination_port) != 0;
    if is_reply(all) == 0 && may_carry(all) && asks() {
        tell(skb, EGRESS, true);
    } else if reads_http(all, rules) {
        tell(skb, EGRESS, false);
    }
}

/// Tells of what is about to enter a pod under `rules`, if it is a message that was not told of where it left another.
#[inline(always)]
pub fn enters(skb: *mut __sk_buff, all: &Scratch, rules: u32) {
    if all.copied == 0 && reads_http(all, rules) {
        tell(skb, INGRESS, false);
    }
}

#[inline(always)]
fn reads_http(all: &Scratch, rules: u32) -> bool {
    rules & READS_HTTP != 0 && all.packet.tuple.protocol == TCP && !all.packet.is_error()
}

/// Tells of a resolver's answer that is about to enter a pod.
#[inline(always)]
pub fn answers(skb: *mut __sk_buff) {
    tell(skb, INGRESS, true);
}

#[inline(always)]
fn tell(skb: *mut __sk_buff, direction: u8, dns: bool) {
    if tell::aggregation() != AGGREGATE_OFF {
        xebec_message(skb, u32::from(direction), u32::from(dns));
    }
}

/// Writes an event with the packet's message, and counts it. What is not between a pod and a resolver must look like
/// HTTP. Checked by itself and once.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn xebec_message(skb: *mut __sk_buff, direction: u32, dns: u32) -> u32 {
    let Some(all) = scratch() else {
        return 0;
    };
    // What comes in parts has no message that could be read.
    if all.packet.fragment != 0 {
        return 0;
    }
    let Some(payload) = payload(skb, all) else {
        return 0;
    };
    all.payload = payload;
    settle();
    let Payload { from, length, .. } = all.payload;
    if dns == 0 && !is_http(skb, from) {
        return 0;
    }
    all.copied = 1;
    all.told.direction = direction as u8;
    let written = if length <= SHORT as u32 || dns == 0 {
        write::<SHORT>(skb, all, from, length)
    } else {
        write::<LONG>(skb, all, from, length)
    };
    tell::count_event(written);
    0
}

/// What a packet carries.
pub struct Payload {
    /// Where it begins.
    from: u32,
    /// Its bytes.
    length: u32,
    /// TCP's number of the first.
    sequence: u32,
}

/// What the packet carries; none where that is nothing.
#[inline(always)]
fn payload(skb: *mut __sk_buff, all: &Scratch) -> Option<Payload> {
    let transport = u32::from(all.packet.transport);
    let (header, sequence) = if all.packet.tuple.protocol == UDP {
        (UDP_HEADER, 0)
    } else {
        let [_, _, _, _, a, b, c, d, .., words] = load::<TCP_BEGINNING>(skb, transport)?;
        (u32::from(words >> 4) * 4, u32::from_be_bytes([a, b, c, d]))
    };
    // SAFETY: the kernel gives a valid context for the whole call.
    let end = unsafe { (*skb).len };
    let from = transport + header;
    (from < end).then(|| Payload {
        from,
        length: end - from,
        sequence,
    })
}

/// Whether a payload begins as a message of HTTP/1 does.
#[inline(always)]
fn is_http(skb: *mut __sk_buff, from: u32) -> bool {
    let Some(beginning) = load::<4>(skb, from) else {
        return false;
    };
    let beginning = u32::from_ne_bytes(beginning);
    let mut found = false;
    for one in HTTP_BEGINNINGS {
        found |= beginning == u32::from_ne_bytes(one);
    }
    found
}

/// Bytes of the frame.
#[inline(always)]
fn load<const BYTES: usize>(skb: *mut __sk_buff, from: u32) -> Option<[u8; BYTES]> {
    let mut bytes = [0_u8; BYTES];
    // SAFETY: there is room for so many.
    let loaded =
        unsafe { bpf_skb_load_bytes(skb.cast(), from, (&raw mut bytes).cast(), BYTES as u32) };
    (loaded == 0).then_some(bytes)
}

/// Writes it. False where there is no room.
#[inline(always)]
fn write<const ROOM: usize>(skb: *mut __sk_buff, all: &Scratch, from: u32, length: u32) -> bool {
    // SAFETY: the helpers have no arguments.
    let (cpu, time) = unsafe { (bpf_get_smp_processor_id(), bpf_ktime_get_ns()) };
    let ring = EVENTS.get(cpu);
    let Some(mut place) = ring.and_then(|ring| ring.reserve_untyped::<Message<ROOM>>(0)) else {
        return false;
    };
    let length = if length > ROOM as u32 {
        ROOM as u32
    } else {
        length
    };
    // The room is a power of two.
    let length = (hidden(length).wrapping_sub(1) & (ROOM as u32 - 1)) + 1;
    let message = place.as_mut_ptr();
    // SAFETY: the kernel gave as many bytes, aligned. All of the event is written, and of the rest only what was loaded
    // is read.
    let loaded = unsafe {
        fill(&mut (*message).event, all);
        (*message).event.time = time;
        (*message).event.length = length as u16;
        bpf_skb_load_bytes(skb.cast(), from, (&raw mut (*message).bytes).cast(), length)
    };
    if loaded != 0 {
        place.discard(0);
        return false;
    }
    place.submit(0);
    true
}

/// Who sent it to whom. Its packet is told of elsewhere.
#[inline(always)]
fn fill(event: &mut Event, all: &Scratch) {
    let tuple = &all.packet.tuple;
    event.source = tuple.source;
    event.source_port = tuple.source_port;
    event.destination = tuple.destination;
    event.destination_port = tuple.destination_port;
    // Not the Service that it was sent to, but the backend.
    if all.turned != 0 {
        event.destination = all.to.destination;
        event.destination_port = all.to.destination_port;
    }
    event.service = 0;
    if all.known.yes != 0 {
        event.service = all.known.service;
    } else if all.choice.backend != 0 {
        event.service = all.choice.service;
    }
    settle();
    event.protocol = tuple.protocol;
    event.tcp_flags = 0;
    event.verdict = FORWARDED;
    event.direction = all.told.direction;
    event.reason = 0;
    event.reply = is_reply(all);
    event.set = 0;
    event.rule = 0;
    event.new_source = Ip::NONE;
    event.new_destination = Ip::NONE;
    event.new_source_port = 0;
    event.new_destination_port = 0;
    event.packets = 0;
    event.bytes = [0; 2];
    event.answered_in = 0;
    event.at = AT_MESSAGE;
    event.pad = [0; 3];
    event.socket = u64::from(all.payload.sequence);
}
