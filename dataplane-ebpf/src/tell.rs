//! Telling of flows: events and counters.

use core::arch::asm;

use aya_ebpf::Global;
use aya_ebpf::bindings::TC_ACT_SHOT;
use aya_ebpf::helpers::{bpf_get_smp_processor_id, bpf_ktime_get_ns};
use xebec_dataplane_common::flow::{
    AGGREGATE_MEDIUM, AGGREGATE_OFF, AT_POD, AT_SOCKET, AUDITED, DROPPED, EGRESS, Event, FORWARDED,
    INGRESS, TO_NETWORK, aggregate_shift,
};
use xebec_dataplane_common::ip::Ip;
use xebec_dataplane_common::{ICMP, ICMP6, TCP};

use crate::maps::{COUNTERS, EVENTS};
use crate::packet::Packet;
use crate::scratch::{Scratch, scratch};

/// How events are put together: `AGGREGATE_NONE` and the others. The agent sets it before it loads the programs.
#[unsafe(no_mangle)]
static AGGREGATION: Global<u32> = Global::new(AGGREGATE_MEDIUM);
/// How many ticks a flow that goes on is silent, as a power of two.
#[unsafe(no_mangle)]
static SILENCE: Global<u32> = Global::new(aggregate_shift(AGGREGATE_MEDIUM));

/// How events are put together.
#[inline(always)]
pub fn aggregation() -> u32 {
    AGGREGATION.load()
}

/// Whether a flow of which nothing else is told has been silent for so long that something is, by when it was seen
/// before and when it is now. Each has its own time for that, so that not all speak at once.
#[inline(always)]
pub fn is_due(packet: &Packet, before: u32, now: u32) -> bool {
    let ports = packet.tuple.source_port ^ packet.tuple.destination_port;
    let own = u32::from(ports ^ ports >> 8);
    (before.wrapping_add(own) ^ now.wrapping_add(own)) >> SILENCE.load() != 0
}

/// What is told of a packet besides its headers.
pub struct Told {
    /// INGRESS or EGRESS.
    pub direction: u8,
    /// Why it was dropped; 0 for a packet that went on.
    pub reason: u8,
    /// Why it would have been, were no policy in audit mode.
    pub audit: u8,
    /// 1 for a reply.
    pub reply: u8,
    /// AT_POD and the others.
    pub at: u8,
    /// 1 where it becomes what `to` says.
    pub turned: u8,
    /// The set that judged.
    pub set: u32,
    /// The rule that decided.
    pub rule: u32,
    /// Number of the Service's port.
    pub service: u32,
    /// Packets that are told of.
    pub packets: u32,
    /// Their bytes: the beginner's, and the replies'.
    pub bytes: [u32; 2],
    /// How long the answer took, µs.
    pub answered_in: u32,
}

impl Told {
    /// Nothing but the direction, and the packet itself.
    #[inline(always)]
    pub fn begin(&mut self, packet: &Packet, direction: u8) {
        *self = Self {
            direction,
            reason: 0,
            audit: 0,
            reply: 0,
            at: AT_POD,
            turned: 0,
            set: 0,
            rule: 0,
            service: 0,
            packets: 1,
            bytes: [packet.length, 0],
            answered_in: 0,
        };
    }
}

/// Writes an event of what stands in this CPU's memory, and counts it.
#[inline(always)]
pub fn tell() {
    xebec_tell();
}

/// The same; the kernel checks a function that is visible outside by itself and once.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn xebec_tell() -> u32 {
    if let Some(all) = scratch()
        && aggregation() != AGGREGATE_OFF
    {
        count_event(write(all));
    }
    0
}

/// Tells of a packet that is dropped, and counts it; gives the verdict of tc.
#[inline(always)]
pub fn dropped(direction: u8, reason: u8) -> i32 {
    xebec_dropped(u32::from(direction), u32::from(reason)) as i32
}

/// The same; checked by itself and once.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn xebec_dropped(direction: u32, reason: u32) -> u32 {
    if let Some(all) = scratch() {
        all.told.begin(&all.packet, direction as u8);
        all.told.reason = reason as u8;
        tell();
        count(As::Dropped);
    }
    TC_ACT_SHOT as u32
}

/// Counts an event, and whether there was room for it.
#[inline(always)]
pub fn count_event(written: bool) {
    if let Some(counters) = COUNTERS.get_ptr_mut(0) {
        // SAFETY: the entry is this CPU's own, and programs of tc and XDP don't interrupt each other there.
        unsafe {
            (*counters).produced += 1;
            if !written {
                (*counters).lost += 1;
            }
        }
    }
}

/// Tells of a flow that is translated from here on; its packets another hook tells of.
#[inline(always)]
pub fn tell_translated(at: u8) {
    xebec_tell_translated(u32::from(at));
}

/// The same; checked by itself and once.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn xebec_tell_translated(at: u32) -> u32 {
    let Some(all) = scratch() else {
        return 0;
    };
    let leaves = at == u32::from(TO_NETWORK);
    let direction = if leaves { EGRESS } else { INGRESS };
    all.told.begin(&all.packet, direction);
    all.told.at = at as u8;
    all.told.turned = 1;
    all.told.service = if leaves { 0 } else { all.choice.service };
    all.told.packets = 0;
    all.told.bytes = [0; 2];
    tell();
    0
}

#[inline(always)]
fn write(all: &Scratch) -> bool {
    let (packet, told) = (&all.packet, &all.told);
    let tuple = &packet.tuple;
    // SAFETY: the helpers have no arguments.
    let (cpu, time) = unsafe { (bpf_get_smp_processor_id(), bpf_ktime_get_ns()) };
    let Some(mut place) = EVENTS.get(cpu).and_then(|ring| ring.reserve(0)) else {
        return false;
    };
    // In its place: it would take a quarter of a program's stack.
    // SAFETY: the kernel gave as many bytes, aligned, and each of them is written.
    let event: &mut Event = unsafe { &mut *place.as_mut_ptr() };
    event.time = time;
    event.source = tuple.source;
    event.destination = tuple.destination;
    // An echo's reply is of type and code 0.
    event.source_port = if packet.icmp != 0 || matches!(tuple.protocol, ICMP | ICMP6) {
        packet.icmp
    } else {
        tuple.source_port
    };
    event.destination_port = tuple.destination_port;
    event.protocol = tuple.protocol;
    event.tcp_flags = if tuple.protocol == TCP {
        packet.tcp_flags
    } else {
        0
    };
    event.verdict = match (told.reason, told.audit) {
        (0, 0) => FORWARDED,
        (0, _) => AUDITED,
        _ => DROPPED,
    };
    event.direction = told.direction;
    event.reason = if told.reason != 0 {
        told.reason
    } else {
        told.audit
    };
    event.reply = told.reply;
    event.length = if packet.length > 0xffff {
        u16::MAX
    } else {
        packet.length as u16
    };
    event.set = told.set;
    event.rule = told.rule;
    event.service = told.service;
    if told.turned != 0 {
        event.new_source = all.to.source;
        event.new_destination = all.to.destination;
        event.new_source_port = all.to.source_port;
        event.new_destination_port = all.to.destination_port;
    } else {
        event.new_source = Ip::NONE;
        event.new_destination = Ip::NONE;
        event.new_source_port = 0;
        event.new_destination_port = 0;
    }
    event.packets = told.packets;
    event.bytes = told.bytes;
    event.answered_in = told.answered_in;
    event.at = told.at;
    event.pad = [0; 3];
    event.socket = 0;
    place.submit(0);
    true
}

/// A socket's translation.
pub struct Translated<'a> {
    /// The cookie of its network namespace.
    pub namespace: u64,
    /// Its own.
    pub cookie: u64,
    /// IP protocol number.
    pub protocol: u8,
    /// What it asked for.
    pub asked: (&'a Ip, u16),
    /// What it got.
    pub given: (&'a Ip, u16),
    /// Number of the Service's port.
    pub service: u32,
}

/// Writes an event of a socket's translation, and counts it. Its task may be interrupted by programs of tc.
#[inline(always)]
pub fn tell_socket(what: &Translated) {
    if aggregation() == AGGREGATE_OFF {
        return;
    }
    let written = write_socket(what);
    if let Some(counters) = COUNTERS.get_ptr_mut(0) {
        // SAFETY: the entry is this CPU's own.
        unsafe {
            add(&raw mut (*counters).produced, 1);
            if !written {
                add(&raw mut (*counters).lost, 1);
            }
        }
    }
}

#[inline(always)]
fn write_socket(what: &Translated) -> bool {
    // SAFETY: the helpers have no arguments.
    let (cpu, time) = unsafe { (bpf_get_smp_processor_id(), bpf_ktime_get_ns()) };
    let Some(mut place) = EVENTS.get(cpu).and_then(|ring| ring.reserve(0)) else {
        return false;
    };
    // SAFETY: as in `write`.
    let event: &mut Event = unsafe { &mut *place.as_mut_ptr() };
    event.time = time;
    event.source = Ip([what.namespace as u32, (what.namespace >> 32) as u32, 0, 0]);
    (event.destination, event.destination_port) = (*what.asked.0, what.asked.1);
    event.source_port = 0;
    event.protocol = what.protocol;
    event.tcp_flags = 0;
    event.verdict = FORWARDED;
    event.direction = EGRESS;
    event.reason = 0;
    event.reply = 0;
    event.length = 0;
    event.set = 0;
    event.rule = 0;
    event.service = what.service;
    event.new_source = Ip::NONE;
    (event.new_destination, event.new_destination_port) = (*what.given.0, what.given.1);
    event.new_source_port = 0;
    event.packets = 0;
    event.bytes = [0; 2];
    event.answered_in = 0;
    event.at = AT_SOCKET;
    event.pad = [0; 3];
    event.socket = what.cookie;
    place.submit(0);
    true
}

/// Adds to a number that others write at the same time.
///
/// # Safety
/// It may be written.
#[inline(always)]
pub unsafe fn add(place: *mut u64, more: u64) {
    // SAFETY: the caller's; the instruction is there in all kernels (`BPF_ADD`).
    unsafe { asm!("lock *(u64 *)({0} + 0) += {1}", in(reg) place, in(reg) more) };
}

/// The same of 32 bits.
///
/// # Safety
/// As of [`add`].
#[inline(always)]
pub unsafe fn add32(place: *mut u32, more: u32) {
    // SAFETY: the caller's.
    unsafe { asm!("lock *(u32 *)({0} + 0) += {1}", in(reg) place, in(reg) u64::from(more)) };
}

/// Takes a number that others add to: it is 0 from here on.
///
/// # Safety
/// As of [`add`].
#[inline(always)]
pub unsafe fn take(place: *mut u64) -> u64 {
    let mut taken = 0_u64;
    // SAFETY: the caller's; the instruction is there since Linux 5.12 (`BPF_XCHG`).
    unsafe { asm!("r0 = xchg_64(r1 + 0, r0)", in("r1") place, inout("r0") taken) };
    taken
}

/// The same of 32 bits.
///
/// # Safety
/// As of [`add`].
#[inline(always)]
pub unsafe fn take32(place: *mut u32) -> u32 {
    let mut taken = 0_u32;
    // SAFETY: as in `take`.
    unsafe { asm!("w0 = xchg32_32(r1 + 0, w0)", in("r1") place, inout("r0") taken) };
    taken
}

/// What a packet is counted as.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum As {
    Forwarded,
    Dropped,
    Translated,
    TranslatedEarly,
    Refused,
    NoPort,
    Held,
    Unheld,
    Aggregated,
}

/// Counts a packet.
#[inline(always)]
pub fn count(what: As) {
    if let Some(counters) = COUNTERS.get_ptr_mut(0) {
        // SAFETY: the entry is this CPU's own, and programs of tc and XDP don't interrupt each other there.
        unsafe {
            match what {
                As::Forwarded => (*counters).forwarded += 1,
                As::Dropped => (*counters).dropped += 1,
                As::Translated => (*counters).translated += 1,
                As::TranslatedEarly => (*counters).translated_early += 1,
                As::Refused => (*counters).refused += 1,
                As::NoPort => (*counters).no_port += 1,
                As::Held => (*counters).held += 1,
                As::Unheld => (*counters).unheld += 1,
                As::Aggregated => (*counters).aggregated += 1,
            }
        }
    }
}
