//! Telling of flows: events and counters.

use aya_ebpf::helpers::bpf_ktime_get_ns;
use aya_ebpf::programs::TcContext;
use xebec_dataplane_common::flow::{AUDITED, DROPPED, Event, FORWARDED};
use xebec_dataplane_common::{ICMP, ICMP6, TCP};

use crate::maps::{COUNTERS, EVENTS};
use crate::packet::{self, Packet};
use crate::scratch::scratch;

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
    /// Bytes of the packet.
    pub length: u16,
    /// The set that judged.
    pub set: u32,
    /// The rule that decided.
    pub rule: u32,
    /// Number of the Service's port.
    pub service: u32,
}

impl Told {
    /// Nothing but the direction and the length, which every event has.
    #[inline(always)]
    pub fn begin(&mut self, ctx: &TcContext, direction: u8) {
        *self = Self {
            direction,
            reason: 0,
            audit: 0,
            reply: 0,
            length: packet::length(ctx),
            set: 0,
            rule: 0,
            service: 0,
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
    let Some(all) = scratch() else {
        return 0;
    };
    write(&all.packet, &all.told);
    0
}

#[inline(always)]
fn write(packet: &Packet, told: &Told) {
    let tuple = &packet.tuple;
    let event = Event {
        // SAFETY: the helper has no arguments.
        time: unsafe { bpf_ktime_get_ns() },
        source: tuple.source,
        destination: tuple.destination,
        // An echo's reply is of type and code 0.
        source_port: if packet.icmp != 0 || matches!(tuple.protocol, ICMP | ICMP6) {
            packet.icmp
        } else {
            tuple.source_port
        },
        destination_port: tuple.destination_port,
        protocol: tuple.protocol,
        tcp_flags: if tuple.protocol == TCP {
            packet.tcp_flags
        } else {
            0
        },
        verdict: match (told.reason, told.audit) {
            (0, 0) => FORWARDED,
            (0, _) => AUDITED,
            _ => DROPPED,
        },
        direction: told.direction,
        reason: if told.reason != 0 {
            told.reason
        } else {
            told.audit
        },
        reply: told.reply,
        length: told.length,
        set: told.set,
        rule: told.rule,
        service: told.service,
    };
    let written = EVENTS.output::<Event>(&event, 0).is_ok();
    if let Some(counters) = COUNTERS.get_ptr_mut(0) {
        // SAFETY: the entry is this CPU's own, and programs of one CPU don't interrupt each other here.
        unsafe {
            if written {
                (*counters).produced += 1;
            } else {
                (*counters).lost += 1;
            }
        }
    }
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
}

/// Counts a packet.
#[inline(always)]
pub fn count(what: As) {
    if let Some(counters) = COUNTERS.get_ptr_mut(0) {
        // SAFETY: as in `tell`.
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
            }
        }
    }
}
