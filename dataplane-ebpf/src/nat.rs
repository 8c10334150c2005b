//! Translations in the table of flows: what a packet becomes, and entering both sides of a flow that is translated.

use core::ffi::c_void;

use aya_ebpf::helpers::bpf_get_prandom_u32;
use aya_ebpf::helpers::generated::bpf_loop;
use xebec_dataplane_common::flow::{
    CLOSED, Flow, FlowKey, TURN_BACK, TURN_DIRECT, TURN_FORTH, TURN_KEPT, TURN_NONE, TURN_STAYS,
};
use xebec_dataplane_common::nat::{BACK_BY_TC, Settings};
use xebec_dataplane_common::{ICMP, ICMP6, SCTP, TCP, UDP};

use crate::flow::{self, ACK, FIN, RST, SYN, begins, now};
use crate::hash;
use crate::maps::{DEVICES, SETTINGS};
use crate::scratch::{Scratch, scratch, settle};
use crate::table::{self, How, Which};
use crate::tell::{self, As};

/// How many ports are tried before a packet is dropped: where 99 of 100 are taken, one of so many is free.
const TRIES: u32 = 1_024;
/// How far apart: a prime beyond all numbers of ports, so that each try is another port.
const STEP: u32 = 104_729;

/// The node's settings; without any, nothing is translated.
#[inline(always)]
pub fn settings() -> Settings {
    SETTINGS.get(0).copied().unwrap_or(Settings {
        node4: xebec_dataplane_common::ip::Ip::NONE,
        node6: xebec_dataplane_common::ip::Ip::NONE,
        first_port: 0,
        ports: 0,
        first_node_port: 0,
        last_node_port: 0,
        errors: 0,
        direct: 0,
        around: 0,
        seed: 0,
    })
}

/// How a packet is translated.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Turn {
    /// Not, or not any more.
    None,
    /// Where it comes in.
    Entry,
    /// Where it leaves.
    Exit,
    /// Where it comes in it goes to the backend's node as it is.
    Direct,
}

/// What a packet becomes, if its flow is translated and that still holds, and where.
#[inline(always)]
pub fn find(flow: *mut Flow, all: &mut Scratch, up: bool) -> Turn {
    if flow.is_null() {
        return Turn::None;
    }
    let packet = &all.packet;
    all.stays = 0;
    // SAFETY: entries of a map stay readable and writable until the program ends, even when they are replaced;
    // a field that two CPUs write at once holds one of the two values, and any of them will do.
    unsafe {
        let turn = (*flow).turn;
        let forth = ((*flow).from_low != 0) == up;
        let mine = if forth { TURN_FORTH } else { TURN_BACK };
        if turn & (TURN_FORTH | TURN_BACK) != mine {
            return Turn::None;
        }
        all.stays = u8::from(turn & TURN_STAYS != 0);
        let direct = turn & TURN_DIRECT != 0;
        let place = if direct {
            Turn::Direct
        } else if flow::is_late(turn) {
            Turn::Exit
        } else {
            Turn::Entry
        };
        if packet.is_error() {
            all.to.set(&(*flow).to);
            return place;
        }
        let now = now(packet);
        if (*flow).is_forgotten(packet.tuple.protocol, now) {
            return Turn::None;
        }
        let connection = flow::is_told(packet.tuple.protocol);
        if forth && (*flow).backend != 0 {
            // A connection that begins keeps its backend until that has answered: what is sent again is no other.
            if begins(packet) && ((*flow).told[1] != 0 || (*flow).closed != 0) {
                return Turn::None;
            }
            // Who talks to a backend that is gone talks to another from here on. An open connection can't.
            if (!connection || (*flow).told[1] == 0) && !flow::has_backend(&*flow) {
                return Turn::None;
            }
        }
        if !forth && (*flow).told[1] == 0 {
            (*flow).told[1] = flow::ANSWERED;
            (*flow).paired = 0;
        }
        if begins(packet) {
            (*flow).closed = 0;
        }
        let ends = connection && packet.tcp_flags & (FIN | RST) != 0;
        if ends {
            (*flow).closed |= flow::closes(packet, forth);
        }
        all.to.set(&(*flow).to);
        if direct {
            // Answers go another way: the client's own words tell that there was one.
            if connection && packet.tcp_flags & (SYN | ACK) == ACK {
                (*flow).told[1] = flow::ANSWERED;
            }
            (*flow).seen = now;
            return place;
        }
        if ends || (*flow).paired != now {
            (*flow).paired = now;
            (*flow).seen = now;
            if !pair(&*flow, all, forth) {
                table::remove(Which::Key);
                all.listed = 0;
                all.answers = 0;
                return Turn::None;
            }
        }
        place
    }
}

/// Keeps a flow's other entry alive; a full table may have forgotten it. False if its place is another flow's.
#[inline(never)]
fn pair(flow: &Flow, all: &mut Scratch, forth: bool) -> bool {
    let up = FlowKey::write(&all.to, &mut all.other);
    all.packet.tuple.reverse(&mut all.back);
    let other = table::find(Which::Other);
    if !other.is_null() {
        // SAFETY: as in `find`.
        unsafe {
            if (*other).turn != flow.other || (*other).to != all.back {
                return false;
            }
            (*other).seen = flow.seen;
            (*other).closed = flow.closed;
            (*other).told[1] |= flow.told[1];
        }
        return true;
    }
    all.begun = *flow;
    all.begun.to.set(&all.back);
    all.begun.from_low = u8::from(up == forth);
    all.begun.turn = flow.other;
    all.begun.other = flow.turn;
    table::enter(Which::Other, How::New)
}

/// Whether a flow is gone now: one of datagrams that were translated to the very tuple that the packet has by itself.
/// Answers bear one tuple for both, so they are the younger one's; the older finds another port for itself. Where the
/// hook is not the `first` that sees the packet, it is on devices without XDP.
#[inline(always)]
pub fn gives_way(flow: *mut Flow, all: &mut Scratch, up: bool, first: bool) -> bool {
    if flow.is_null() || all.packet.tuple.protocol != UDP || all.packet.is_error() {
        return false;
    }
    // SAFETY: as in `find`.
    unsafe {
        if (*flow).turn & TURN_BACK == 0 || ((*flow).from_low != 0) != up {
            return false;
        }
        if !first && DEVICES.get(&all.device).copied().unwrap_or(BACK_BY_TC) != BACK_BY_TC {
            return false;
        }
        FlowKey::write(&(*flow).to, &mut all.other);
    }
    table::remove(Which::Other);
    table::remove(Which::Key);
    true
}

/// How much a port is wanted.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Try {
    /// It is the packet's own, or the one that it had: rather this than another.
    Own,
    /// It is one of many.
    Any,
    /// Many others are taken: that of a flow that [yields](Flow::yields) will do.
    Last,
}

/// Enters a translated flow, of which `begun` tells all but the tuples: that of the packet which becomes `to`, and its
/// counterpart. False if the counterpart's place is in use.
#[inline(always)]
fn enter(all: &mut Scratch, how: Try) -> bool {
    let now = now(&all.packet);
    let (turn, other) = (all.begun.turn, all.begun.other);
    let up = FlowKey::write(&all.to, &mut all.other);
    all.packet.tuple.reverse(&mut all.back);
    let mut how_to = How::New;
    let old = table::find(Which::Other);
    if !old.is_null() {
        // SAFETY: as in `find`.
        unsafe {
            if (*old).turn != other && (*old).turn != TURN_KEPT || (*old).to != all.back {
                let over = (*old).closed != 0 && (*old).turn == TURN_NONE
                    || how == Try::Last && (*old).yields(all.to.protocol, now)
                    || (*old).is_replaceable(all.to.protocol, now);
                if (*old).turn & (TURN_FORTH | TURN_BACK) != 0 && (*old).turn & TURN_DIRECT == 0 {
                    // Another port is found sooner than whether half of this flow is forgotten.
                    if !over && how == Try::Any {
                        return false;
                    }
                    FlowKey::write(&(*old).to, &mut all.other);
                    // A full table has forgotten the other half of a flow: what is left of it holds no port.
                    let half = table::find(Which::Other);
                    let whole = !half.is_null() && (*half).turn == (*old).other;
                    if whole && over {
                        table::remove(Which::Other);
                    }
                    FlowKey::write(&all.to, &mut all.other);
                    if whole && !over {
                        return false;
                    }
                } else if !over {
                    return false;
                }
            }
        }
        how_to = How::Over;
    }
    let begun = &mut all.begun;
    begun.seen = now;
    begun.paired = now;
    begun.to.set(&all.back);
    begun.from_low = u8::from(up);
    (begun.turn, begun.other) = (other, turn);
    let entered = table::enter(Which::Other, how_to);
    (begun.turn, begun.other) = (turn, other);
    if !entered {
        return false;
    }
    begun.to.set(&all.to);
    begun.from_low = u8::from(FlowKey::write(&all.packet.tuple, &mut all.key));
    table::enter(Which::Key, How::Over)
}

/// Parts from the translation of a packet's flow, which is about to be entered anew. True if it becomes the same but
/// for the port, which `to` then has, too: to the far end no other port is as good, for it may remember the connection
/// before and knows this one to come after it. If not, a connection's port is kept from others for as long.
#[inline(always)]
pub fn part() -> bool {
    xebec_part() != 0
}

/// The same; checked by itself and once.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn xebec_part() -> u32 {
    match scratch() {
        Some(all) => u32::from(leave(all)),
        None => 0,
    }
}

#[inline(always)]
fn leave(all: &mut Scratch) -> bool {
    let flow = table::find(Which::Key);
    if flow.is_null() {
        return false;
    }
    // SAFETY: as in `find`.
    unsafe {
        if (*flow).turn & (TURN_FORTH | TURN_BACK) == 0 || (*flow).turn & TURN_DIRECT != 0 {
            return false;
        }
        let (old, new) = (&(*flow).to, &mut all.to);
        let changed = old.source != all.packet.tuple.source;
        if changed
            && (*flow).turn & TURN_FORTH != 0
            && old.source == new.source
            && old.destination == new.destination
            && old.destination_port == new.destination_port
        {
            new.source_port = old.source_port;
            return true;
        }
        FlowKey::write(old, &mut all.other);
        all.packet.tuple.reverse(&mut all.back);
        let other = table::find(Which::Other);
        if !other.is_null() {
            // A full table may have forgotten it, and its place be another flow's.
            if (*other).turn != (*flow).other || (*other).to != all.back {
                return false;
            }
            if changed && flow::is_told(all.packet.tuple.protocol) {
                (*other).turn = TURN_KEPT;
                (*other).closed = CLOSED;
            } else {
                table::remove(Which::Other);
            }
        }
    }
    false
}

/// Enters a translated flow with a source port that is free; `to` has the rest. Where the table has a flow that it
/// takes the place of, it [parts](part) from that. Its own port is kept if it can be and the source stays whose it was.
/// False if no port was found.
#[inline(always)]
pub fn enter_with_port(all: &mut Scratch, listed: bool) -> bool {
    all.own = u8::from(listed);
    settle();
    xebec_enter_with_port() != 0
}

/// The same; checked by itself and once.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn xebec_enter_with_port() -> u32 {
    match scratch() {
        Some(all) => u32::from(search(all)),
        None => 0,
    }
}

#[inline(always)]
fn search(all: &mut Scratch) -> bool {
    let protocol = all.packet.tuple.protocol;
    // Others have no port that could be changed.
    let fixed = !matches!(protocol, TCP | UDP | SCTP | ICMP | ICMP6);
    let ports = u32::from(settings().ports);
    let former = all.own != 0 && part();
    all.own = u8::from(former || fixed || all.to.source == all.packet.tuple.source);
    all.entered = 0;
    let mut tries = u32::from(all.own);
    all.free = u16::MAX;
    if !fixed {
        let once = if ports < TRIES { ports } else { TRIES };
        all.free = (tries + once) as u16;
        tries += 2 * once;
    }
    // A connection that the table has forgotten the far end may still remember, and refuse another one from that port
    // whose timestamps are earlier (RFC 7323, 5.3), as another client port's may be. So a client's ports keep their
    // order: what it uses again late is used again late, and its own port again by itself, whose timestamps go on.
    all.start = if flow::is_told(protocol) {
        let port = u32::from(u16::from_be(all.packet.tuple.source_port));
        // Linux gives out all ports that are even before those that are odd.
        let place = port / 2 + port % 2 * (ports / 2);
        hash::of(settings().seed, &all.packet.tuple, true).wrapping_add(place)
    } else {
        // SAFETY: the helper has no arguments.
        unsafe { bpf_get_prandom_u32() }
    };
    settle();
    // SAFETY: the function is of the kind that the helper calls, and takes nothing from here.
    unsafe { bpf_loop(tries, try_port as *mut c_void, core::ptr::null_mut(), 0) };
    settle();
    if all.entered == 0 {
        tell::count(As::NoPort);
    }
    all.entered != 0
}

/// Tries one port, the packet's own first if it may have that, and those of flows that yield only after all others; 1
/// once a flow is entered.
#[inline(never)]
extern "C" fn try_port(number: u64, _: *mut c_void) -> i64 {
    let Some(all) = scratch() else {
        return 1;
    };
    let how = if all.own != 0 {
        all.own = 0;
        Try::Own
    } else {
        let settings = settings();
        let ports = u32::from(settings.ports);
        if ports == 0 {
            return 1;
        }
        let offset = (all.start % ports + number as u32 * STEP) % ports;
        all.to.source_port = (settings.first_port + offset as u16).to_be();
        if matches!(all.packet.tuple.protocol, ICMP | ICMP6) {
            all.to.destination_port = all.to.source_port;
        }
        if number < u64::from(all.free) {
            Try::Any
        } else {
            Try::Last
        }
    };
    settle();
    all.entered = u8::from(enter(all, how));
    // Read again, it is compared: the kernel wants to see 0 or 1.
    settle();
    i64::from(all.entered != 0)
}
