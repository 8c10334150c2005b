//! The table of translations: finding, entering, choosing ports.

use aya_ebpf::helpers::bpf_get_prandom_u32;
use xebec_dataplane_common::nat::{Nat, Settings, Tuple};
use xebec_dataplane_common::{ICMP, TCP, UDP};

use crate::flow::{FIN, RST, SYN, now};
use crate::maps::{NATS, SETTINGS};
use crate::packet::Packet;

/// `BPF_NOEXIST`.
const NEW_ONLY: u64 = 1;
/// How many ports are tried before a packet is dropped.
const TRIES: u32 = 16;
/// The packet's tuple.
#[inline(always)]
pub fn tuple(packet: &Packet) -> Tuple {
    Tuple {
        source: packet.source,
        destination: packet.destination,
        source_port: packet.source_port,
        destination_port: packet.destination_port,
        protocol: packet.protocol,
        pad: [0; 3],
    }
}

/// The node's settings; without any, nothing is translated.
#[inline(always)]
pub fn settings() -> Settings {
    SETTINGS.get(0).copied().unwrap_or(Settings {
        node: 0,
        first_port: 0,
        ports: 0,
    })
}

/// What a packet becomes, if it belongs to a translation that is known: false if not.
#[inline(never)]
pub fn find(tuple: &Tuple, tcp_flags: u8, to: &mut Tuple) -> bool {
    let Some(nat) = NATS.get_ptr_mut(tuple) else {
        return false;
    };
    let now = now();
    // SAFETY: entries of a map stay readable and writable until the program ends, even when they are replaced;
    // a field that two CPUs write at once holds one of the two values, and any of them will do.
    unsafe {
        if (*nat).is_forgotten(now) {
            return false;
        }
        (*nat).seen = now;
        if tuple.protocol == TCP && tcp_flags & (FIN | RST) != 0 {
            (*nat).closed = 1;
        } else if tuple.protocol == TCP && tcp_flags & SYN != 0 {
            (*nat).closed = 0;
        }
        *to = (*nat).to;
        // A full table may have forgotten the counterpart, or given its place to another.
        let back = to.reversed();
        match NATS.get_ptr_mut(&back) {
            Some(other) if (*other).to == tuple.reversed() => {
                (*other).seen = now;
                (*other).closed = (*nat).closed;
                true
            }
            Some(_) => {
                let _ = NATS.remove(tuple);
                false
            }
            None => {
                let other = Nat {
                    seen: now,
                    to: tuple.reversed(),
                    closed: (*nat).closed,
                    pad: [0; 7],
                };
                NATS.insert(&back, &other, NEW_ONLY).is_ok()
            }
        }
    }
}

/// What a flow's packets become, without noting that one was seen.
#[inline(never)]
pub fn look(tuple: &Tuple, to: &mut Tuple) -> bool {
    let Some(nat) = NATS.get_ptr_mut(tuple) else {
        return false;
    };
    // SAFETY: as in `find`.
    unsafe {
        *to = (*nat).to;
        !(*nat).is_forgotten(now())
    }
}

/// Enters a translation with its counterpart; false if the counterpart's tuple is in use.
#[inline(never)]
pub fn enter(from: &Tuple, to: &Tuple) -> bool {
    let now = now();
    let back = to.reversed();
    let counterpart = Nat {
        seen: now,
        to: from.reversed(),
        closed: 0,
        pad: [0; 7],
    };
    if NATS.insert(&back, &counterpart, NEW_ONLY).is_err() {
        let Some(old) = NATS.get_ptr_mut(&back) else {
            return false;
        };
        // SAFETY: as in `find`.
        unsafe {
            if (*old).to != counterpart.to {
                if !(*old).is_replaceable(now) {
                    return false;
                }
                let old_from = (*old).to.reversed();
                let _ = NATS.remove(&old_from);
            }
        }
        if NATS.insert(&back, &counterpart, 0).is_err() {
            return false;
        }
    }
    let forward = Nat {
        seen: now,
        to: *to,
        closed: 0,
        pad: [0; 7],
    };
    NATS.insert(from, &forward, 0).is_ok()
}

/// For a connection that begins without translation: what answers it must not be taken for the answer of one between
/// the same ends that came through a node port and has ended. While that one lives, the backend can't have both.
#[inline(never)]
pub fn make_way(from: &Tuple) {
    let back = from.reversed();
    // SAFETY: as in `find`.
    let ended = NATS
        .get_ptr_mut(&back)
        .is_some_and(|nat| unsafe { (*nat).closed != 0 });
    if ended {
        forget(&back);
    }
}

/// Forgets the translation of a tuple and its counterpart.
#[inline(never)]
pub fn forget(from: &Tuple) {
    let Some(nat) = NATS.get_ptr_mut(from) else {
        return;
    };
    // SAFETY: as in `find`.
    let back = unsafe { (*nat).to.reversed() };
    let _ = NATS.remove(&back);
    let _ = NATS.remove(from);
}

/// Enters a translation whose source becomes the node's address and a free port; `to` has the rest. False if no
/// port was found.
#[inline(never)]
pub fn enter_masqueraded(from: &Tuple, to: &mut Tuple) -> bool {
    let settings = settings();
    if settings.ports == 0 {
        return false;
    }
    to.source = settings.node;
    // SCTP's checksum covers its ports, and others have none: their source port must stay.
    if from.protocol != TCP && from.protocol != UDP && from.protocol != ICMP {
        return enter(from, to);
    }
    let ports = u32::from(settings.ports);
    // SAFETY: the helper has no arguments.
    let start = unsafe { bpf_get_prandom_u32() };
    for try_number in 0..TRIES {
        // An odd step visits other ports each time.
        let offset = start.wrapping_add(try_number.wrapping_mul(7_919)) % ports;
        to.source_port = (settings.first_port + offset as u16).to_be();
        if from.protocol == ICMP {
            to.destination_port = to.source_port;
        }
        if enter(from, to) {
            return true;
        }
    }
    false
}
