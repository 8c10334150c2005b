//! The table of flows, and telling of them.

use aya_ebpf::helpers::bpf_ktime_get_ns;
use aya_ebpf::helpers::generated::bpf_ktime_get_coarse_ns;
use xebec_dataplane_common::TCP;
use xebec_dataplane_common::flow::{DROPPED, Event, FORWARDED, Flow, FlowKey, longest_idle};

use crate::maps::{COUNTERS, EVENTS, FLOWS, GENERATION};
use crate::packet::Packet;

/// TCP flags.
pub const FIN: u8 = 0x01;
pub const SYN: u8 = 0x02;
pub const RST: u8 = 0x04;
pub const ACK: u8 = 0x10;

/// What the table knows of a packet's flow. All fields always have a value: the compiler makes of an enum
/// registers that are set on some paths alone, which the verifier refuses to copy.
#[derive(Clone, Copy)]
pub struct Known {
    /// Whether it was allowed and that still holds; otherwise the packet is judged.
    pub yes: bool,
    /// Whether it is the other end's answer.
    pub reply: bool,
    /// Whether this packet has news.
    pub tell: bool,
    /// The rule that allowed it.
    pub rule: u32,
}

const UNKNOWN: Known = Known {
    yes: false,
    reply: false,
    tell: false,
    rule: 0,
};

/// The flow's key and whether the packet goes up.
#[inline(always)]
pub fn key(packet: &Packet) -> (FlowKey, bool) {
    FlowKey::new(
        (packet.source, packet.source_port),
        (packet.destination, packet.destination_port),
        packet.protocol,
    )
}

/// ns of the monotonic clock, exact to a few ms.
#[inline(always)]
pub fn now() -> u64 {
    // SAFETY: the helper has no arguments.
    unsafe { bpf_ktime_get_coarse_ns() }
}

/// The rules' generation.
#[inline(always)]
pub fn generation() -> u32 {
    GENERATION.get(0).copied().unwrap_or(0)
}

/// Looks a packet's flow up, and notes that it was seen.
#[inline(always)]
pub fn find(packet: &Packet, key: &FlowKey, up: bool) -> Known {
    let Some(flow) = FLOWS.get_ptr_mut(key) else {
        return UNKNOWN;
    };
    // SAFETY: entries of a map stay readable and writable until the program ends, even when they are replaced;
    // a field that two CPUs write at once holds one of the two values, and any of them will do.
    unsafe {
        if packet.error {
            return Known {
                yes: true,
                reply: true,
                tell: false,
                rule: (*flow).rule,
            };
        }
        // A new connection over an old one's addresses is another flow.
        if packet.protocol == TCP && packet.tcp_flags & (SYN | ACK) == SYN {
            return UNKNOWN;
        }
        let now = now();
        if now.saturating_sub((*flow).seen) > longest_idle(packet.protocol) {
            return UNKNOWN;
        }
        let reply = ((*flow).from_low != 0) != up;
        // A reply belongs to what was allowed; the beginner's packets are judged by the rules of today.
        if !reply && (*flow).generation != generation() {
            return UNKNOWN;
        }
        (*flow).seen = now;
        let mut tell = false;
        if packet.protocol == TCP {
            let news = packet.tcp_flags & (SYN | FIN | RST);
            let told = if reply {
                &mut (*flow).told[1]
            } else {
                &mut (*flow).told[0]
            };
            if news & !*told != 0 {
                *told |= news;
                tell = true;
            }
        } else if reply && (*flow).told[1] == 0 {
            (*flow).told[1] = 1;
            tell = true;
        }
        Known {
            yes: true,
            reply,
            tell,
            rule: (*flow).rule,
        }
    }
}

/// Whether a packet answers a flow that the other end began.
#[inline(always)]
pub fn answers(packet: &Packet) -> bool {
    let (key, up) = key(packet);
    // SAFETY: the value is read once, here.
    unsafe { FLOWS.get(&key) }.is_some_and(|flow| (flow.from_low != 0) != up)
}

/// Enters a flow that was allowed.
#[inline(always)]
pub fn enter(packet: &Packet, key: &FlowKey, up: bool, rule: u32) {
    let flow = Flow {
        seen: now(),
        generation: generation(),
        rule,
        from_low: u8::from(up),
        told: [packet.tcp_flags & (SYN | FIN | RST), 0],
        pad: [0; 5],
    };
    // A full table forgets the flow that was idle longest; this can't fail for want of room.
    let _ = FLOWS.insert(key, &flow, 0);
}

/// What is told of a packet besides its headers.
pub struct Told {
    /// INGRESS or EGRESS.
    pub direction: u8,
    /// The set that judged.
    pub set: u32,
    /// The rule that allowed.
    pub rule: u32,
    /// Why it was dropped; 0 for a packet that went on.
    pub reason: u8,
    /// Whether it is a reply.
    pub reply: bool,
    /// Bytes of the packet.
    pub length: u16,
}

/// Writes an event and counts it.
#[inline(never)]
pub fn tell(packet: &Packet, told: &Told) {
    let event = Event {
        // SAFETY: the helper has no arguments.
        time: unsafe { bpf_ktime_get_ns() },
        source: packet.source,
        destination: packet.destination,
        source_port: if packet.icmp != 0 || packet.protocol == 1 {
            packet.icmp
        } else {
            packet.source_port
        },
        destination_port: packet.destination_port,
        protocol: packet.protocol,
        tcp_flags: packet.tcp_flags,
        verdict: if told.reason == 0 { FORWARDED } else { DROPPED },
        direction: told.direction,
        reason: told.reason,
        reply: u8::from(told.reply),
        length: told.length,
        set: told.set,
        rule: told.rule,
        pad: 0,
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

/// Counts a packet.
#[inline(always)]
pub fn count(dropped: bool) {
    if let Some(counters) = COUNTERS.get_ptr_mut(0) {
        // SAFETY: as in `tell`.
        unsafe {
            if dropped {
                (*counters).dropped += 1;
            } else {
                (*counters).forwarded += 1;
            }
        }
    }
}
