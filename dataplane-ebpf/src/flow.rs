//! The table of flows: finding them, and entering those that were allowed. Translations are `nat`'s.

use aya_ebpf::helpers::bpf_ktime_get_ns;
use aya_ebpf::helpers::generated::bpf_ktime_get_coarse_ns;
use xebec_dataplane_common::flow::{
    AGGREGATE_MAXIMUM, AGGREGATE_NONE, AGGREGATE_OFF, CLOSED, CLOSED_BACK, CLOSED_FORTH, Flow,
    MANY_BYTES, TURN_LATE, TURN_NONE, micros, ticks,
};
use xebec_dataplane_common::ip::Ip;
use xebec_dataplane_common::nat::Tuple;
use xebec_dataplane_common::{SCTP, TCP};

use crate::maps::{BACKENDS, GENERATION};
use crate::packet::Packet;
use crate::scratch::Scratch;
use crate::table::{self, How, Which};
use crate::tell::{self, As, Told};

/// TCP flags.
pub const FIN: u8 = 0x01;
pub const SYN: u8 = 0x02;
pub const RST: u8 = 0x04;
pub const ACK: u8 = 0x10;

/// Stands with the flags that were told of where the other end answered, before its answer was told of.
pub const ANSWERED: u8 = 0x80;

/// No tuple: something to write the real one over.
const NOWHERE: Tuple = Tuple {
    source: Ip::NONE,
    destination: Ip::NONE,
    source_port: 0,
    destination_port: 0,
    protocol: 0,
    pad: [0; 3],
};

/// What the table knows of a packet's flow.
pub struct Known {
    /// 1 where it was allowed and that still holds; otherwise the packet is judged.
    pub yes: u8,
    /// 1 for the other end's answer.
    pub reply: u8,
    /// 1 for an answer to a flow that was judged by rules of another generation.
    pub again: u8,
    /// 1 where this packet has news.
    pub tell: u8,
    /// The rule that allowed it.
    pub rule: u32,
    /// Number of the Service's port.
    pub service: u32,
    /// Packets that its event tells of.
    pub packets: u32,
    /// Their bytes.
    pub bytes: [u32; 2],
    /// How long the first answer took, µs.
    pub answered_in: u32,
}

/// How a packet's flow was judged.
pub struct Judged {
    /// The rules' generation; 0 if it was not.
    pub generation: u32,
    /// The rule that allowed it.
    pub rule: u32,
    /// What was told of it.
    pub told: [u8; 2],
}

/// When a packet came, in ticks.
#[inline(always)]
pub fn now(packet: &Packet) -> u32 {
    ticks(packet.seen)
}

/// ns of the monotonic clock, exact to a few ms.
#[inline(always)]
pub fn now_ns() -> u64 {
    // SAFETY: the helper has no arguments.
    unsafe { bpf_ktime_get_coarse_ns() }
}

/// The rules' generation; never 0, which is that of flows that were not judged.
#[inline(always)]
pub fn generation() -> u32 {
    match GENERATION.get(0) {
        Some(generation) if *generation != 0 => *generation,
        _ => 1,
    }
}

/// Whether a protocol's flows say when they begin and end.
#[inline(always)]
pub fn is_told(protocol: u8) -> bool {
    protocol == TCP || protocol == SCTP
}

/// Whether a packet begins a TCP connection or an SCTP association.
#[inline(always)]
pub fn begins(packet: &Packet) -> bool {
    is_told(packet.tuple.protocol) && packet.tcp_flags & (SYN | ACK) == SYN && !packet.is_error()
}

/// Which ends have closed a connection with a packet that ends it.
#[inline(always)]
pub fn closes(packet: &Packet, forth: bool) -> u8 {
    if packet.tcp_flags & RST != 0 {
        CLOSED
    } else if forth {
        CLOSED_FORTH
    } else {
        CLOSED_BACK
    }
}

/// Whether a flow's backend is the one that it began with.
#[inline(always)]
pub fn has_backend(flow: &Flow) -> bool {
    if flow.backend == 0 {
        return true;
    }
    BACKENDS
        .get(flow.backend)
        .is_some_and(|backend| backend.is(flow.backend_generation))
}

/// Asks whether a packet's flow was allowed, and notes that it was seen.
#[inline(always)]
pub fn find(flow: *mut Flow, packet: &Packet, up: bool, generation: u32, known: &mut Known) {
    known.yes = 0;
    known.again = 0;
    known.tell = 0;
    if flow.is_null() {
        return;
    }
    // SAFETY: entries of a map stay readable and writable until the program ends, even when they are replaced;
    // a field that two CPUs write at once holds one of the two values, and any of them will do.
    unsafe {
        let reply = ((*flow).from_low != 0) != up;
        known.reply = u8::from(reply);
        known.rule = (*flow).rule;
        known.service = (*flow).service;
        // What a node port entered is judged by the pod's own hook, once.
        let judged = (*flow).generation != 0;
        if packet.is_error() {
            known.yes = u8::from(judged);
            known.reply = 1;
            if judged {
                tally(flow, packet, known);
            }
            return;
        }
        // A new connection over an old one's addresses is another flow. Both ends' packets are judged by the rules of
        // today: an answer by what it answers.
        let now = now(packet);
        if begins(packet) || (*flow).is_forgotten(packet.tuple.protocol, now) || !judged {
            return;
        }
        if (*flow).generation != generation && !(reply && (*flow).exempt != 0) {
            known.again = u8::from(reply);
            return;
        }
        known.yes = 1;
        let before = (*flow).seen;
        if before != now {
            (*flow).seen = now;
        }
        let told = if reply {
            &mut (*flow).told[1]
        } else {
            &mut (*flow).told[0]
        };
        // Of other protocols the first reply is news.
        let connection = is_told(packet.tuple.protocol);
        let news = if connection {
            packet.tcp_flags & (SYN | FIN | RST)
        } else {
            u8::from(reply)
        };
        if news & !*told != 0 {
            // What answers first is also news to the flow's other entry.
            if reply && *told == 0 {
                (*flow).paired = 0;
            }
            *told |= news;
            known.tell = u8::from(is_told_of(news, connection));
            if connection && news & (FIN | RST) != 0 {
                (*flow).closed |= closes(packet, !reply);
            }
        }
        let answered = reply && (*flow).timed != 0;
        if answered || tell::is_due(packet, before, now) || (*flow).bytes & MANY_BYTES != 0 {
            known.tell = 1;
        }
        tally(flow, packet, known);
    }
}

/// Whether events tell of such news: the flags of a connection, the first answer of others.
#[inline(always)]
fn is_told_of(news: u8, connection: bool) -> bool {
    tell::aggregation() != AGGREGATE_MAXIMUM || connection && news & (FIN | RST) != 0
}

/// Counts a packet of a flow that was allowed: in its entry, or in the packet's event together with all that the entry
/// counted.
///
/// # Safety
/// There is an entry.
#[inline(always)]
unsafe fn tally(flow: *mut Flow, packet: &Packet, known: &mut Known) {
    if tell::aggregation() == AGGREGATE_OFF {
        known.tell = 0;
        return;
    }
    if tell::aggregation() == AGGREGATE_NONE {
        known.tell = 1;
    }
    let own = u64::from(packet.length) << (u32::from(known.reply) * 32);
    // SAFETY: the caller's.
    unsafe {
        if known.tell == 0 {
            tell::add(&raw mut (*flow).bytes, own);
            tell::add32(&raw mut (*flow).packets, 1);
            tell::count(As::Aggregated);
            return;
        }
        let mut bytes = tell::take(&raw mut (*flow).bytes);
        known.packets = tell::take32(&raw mut (*flow).packets) + 1;
        known.answered_in = 0;
        if (*flow).timed != 0 {
            (*flow).timed = 0;
            if known.reply != 0 {
                let took = micros(bpf_ktime_get_ns()).wrapping_sub((bytes >> 32) as u32);
                known.answered_in = micros(u64::from(took) * 1_000);
            }
            bytes = u64::from(bytes as u32);
        }
        bytes += own;
        known.bytes = [bytes as u32, (bytes >> 32) as u32];
    }
}

/// Tells, with the first packet of a flow, of those that were counted for the one before it between the same ends.
///
/// # Safety
/// There is an entry.
#[inline(always)]
unsafe fn inherit(flow: *mut Flow, told: &mut Told) {
    // SAFETY: the caller's.
    unsafe {
        let packets = tell::take32(&raw mut (*flow).packets);
        let bytes = tell::take(&raw mut (*flow).bytes);
        told.packets += packets;
        told.bytes[0] += bytes as u32;
        if (*flow).timed == 0 {
            told.bytes[1] += (bytes >> 32) as u32;
        }
    }
}

/// The same of one that is translated anew.
#[inline(never)]
pub fn inherit_key(all: &mut Scratch) {
    let flow = table::find(Which::Key);
    if !flow.is_null() {
        // SAFETY: there is an entry.
        unsafe { inherit(flow, &mut all.told) };
    }
}

/// Notes when a connection begins, in the entry that it is about to get.
#[inline(always)]
pub fn time(packet: &Packet, begun: &mut Flow) {
    if begins(packet) && tell::aggregation() != AGGREGATE_OFF {
        // SAFETY: the helper has no arguments.
        begun.bytes = u64::from(micros(unsafe { bpf_ktime_get_ns() })) << 32;
        begun.timed = 1;
    }
}

/// Notes that the packet's flow is allowed by the rules of today, too, and asks what is known of it.
#[inline(never)]
pub fn renew(all: &mut Scratch, up: bool) {
    let flow = table::find(Which::Key);
    if !flow.is_null() {
        // SAFETY: as in `find`.
        unsafe {
            (*flow).generation = all.generation;
            (*flow).rule = all.told.rule;
        }
    }
    find(flow, &all.packet, up, all.generation, &mut all.known);
}

/// Whether a packet answers a flow that the other end began.
#[inline(always)]
pub fn answers(flow: *mut Flow, up: bool) -> bool {
    // SAFETY: as in `find`.
    !flow.is_null() && unsafe { ((*flow).from_low != 0) != up }
}

/// How a flow was judged, for one that takes its place.
#[inline(always)]
pub fn judged(flow: *mut Flow, judged: &mut Judged) {
    if flow.is_null() {
        judged.generation = 0;
        judged.rule = 0;
        judged.told = [0; 2];
        return;
    }
    // SAFETY: as in `find`.
    unsafe {
        judged.generation = (*flow).generation;
        judged.rule = (*flow).rule;
        judged.told = (*flow).told;
    }
}

/// Whether a connection was answered, or has ended since.
#[inline(always)]
pub fn has_begun(flow: *mut Flow) -> bool {
    // SAFETY: as in `find`.
    !flow.is_null() && unsafe { (*flow).told[1] != 0 || (*flow).closed != 0 }
}

/// Enters a flow that was allowed, by the rule that is told of, and is not translated here. One that a
/// node port entered keeps its translation.
#[inline(never)]
pub fn enter(all: &mut Scratch, up: bool) {
    let (packet, rule) = (&all.packet, all.told.rule);
    let (now, protocol) = (now(packet), packet.tuple.protocol);
    let told = packet.tcp_flags & (SYN | FIN | RST);
    let flow = table::find(Which::Key);
    if !flow.is_null() {
        // SAFETY: as in `find`.
        unsafe {
            let same = ((*flow).from_low != 0) == up;
            let over = (*flow).closed != 0 && begins(packet);
            if same && !over && !(*flow).is_forgotten(protocol, now) {
                (*flow).seen = now;
                (*flow).generation = all.generation;
                (*flow).rule = rule;
                (*flow).exempt = all.exempt;
                // Judged anew it is still the same: who answered has answered.
                if begins(packet) {
                    (*flow).told = [told, 0];
                    // Which of the two is answered can't be told.
                    if (*flow).timed != 0 {
                        (*flow).timed = 0;
                        let bytes = tell::take(&raw mut (*flow).bytes);
                        tell::add(&raw mut (*flow).bytes, u64::from(bytes as u32));
                    }
                } else {
                    (*flow).told[0] |= told;
                }
                return;
            }
            inherit(flow, &mut all.told);
        }
    }
    all.begun = Flow {
        seen: now,
        generation: all.generation,
        rule,
        from_low: u8::from(up),
        told: [told, 0],
        exempt: all.exempt,
        ..plain()
    };
    time(&all.packet, &mut all.begun);
    // A full table forgets the flow that was idle longest; this can't fail for want of room.
    table::enter(Which::Key, How::Over);
}

/// A flow of which nothing is known.
#[inline(always)]
pub fn plain() -> Flow {
    Flow {
        to: NOWHERE,
        bytes: 0,
        packets: 0,
        seen: 0,
        paired: 0,
        generation: 0,
        rule: 0,
        backend: 0,
        backend_generation: 0,
        service: 0,
        from_low: 0,
        turn: TURN_NONE,
        told: [0; 2],
        closed: 0,
        other: TURN_NONE,
        exempt: 0,
        timed: 0,
    }
}

/// Whether packets of a turn are translated at a hook that they leave by.
#[inline(always)]
pub fn is_late(turn: u8) -> bool {
    turn & TURN_LATE != 0
}
