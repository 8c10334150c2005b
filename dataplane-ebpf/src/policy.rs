//! Judging by compiled sets of rules.

use core::ffi::c_void;

use aya_ebpf::helpers::generated::bpf_loop;
use aya_ebpf::maps::lpm_trie::Key;
use xebec_dataplane_common::flow::{REASON_POLICY, REASON_RULE};
use xebec_dataplane_common::ip::Ip;
use xebec_dataplane_common::policy::{
    ALLOW, Chain, CidrKey, DENY, Decision, IDENTITY_HELD, IDENTITY_WORLD, NO_SHAPE, RuleKey,
    SET_DENIES, SET_FIRST, SHAPE_CLASS, SHAPE_IDENTITY, SHAPE_PORT, SHAPE_PROTOCOL, SHAPES, TIERS,
    VERDICT_ACTION, port_bits,
};
use xebec_dataplane_common::{ICMP, ICMP6};

use crate::maps::{CIDRS, IDENTITIES, RULES, SETS, look_up};
use crate::packet::Packet;
use crate::scratch::{Scratch, scratch, settle};

/// What is asked.
pub struct Question {
    /// The sets that judge.
    pub chain: Chain,
    /// The sets that would, were no policy in audit mode.
    pub audit: Chain,
    /// The set that is asked now.
    pub set: u32,
    /// What it decided, if its `rule` is not 0.
    pub best: Decision,
    /// The peer's address.
    pub peer: Ip,
    /// The peer's identity.
    pub identity: u32,
    /// What the set's address blocks make of the peer; [`UNASKED`] until an entry wants to know.
    class: u32,
    /// Port of the destination; of ICMP, type and code.
    pub port: u16,
    /// IP protocol number.
    pub protocol: u8,
    /// Shapes and flags of a set that has many.
    shapes: [u8; SHAPES],
    flags: u32,
}

/// The identity of an address.
#[inline(always)]
pub fn identity(address: &Ip) -> u32 {
    match look_up(&IDENTITIES, address) {
        // SAFETY: the value is copied at once.
        Some(identity) => unsafe { *identity },
        None => IDENTITY_WORLD,
    }
}

/// Whether there are rules.
#[inline(always)]
pub fn any(chain: &Chain) -> bool {
    chain[0] | chain[1] | chain[2] != 0
}

/// Judges what begins a flow to `port`, by the chains of a pod, for a peer with this address and identity: 0, or why it
/// is dropped. What decided is told.
#[inline(always)]
pub fn ask(all: &mut Scratch, chains: &[Chain; 2], peer: &Ip, identity: u32, port: u16) -> u8 {
    if !any(&chains[0]) && !any(&chains[1]) {
        return 0;
    }
    let question = &mut all.question;
    question.chain = chains[0];
    question.audit = chains[1];
    question.peer = peer.words();
    question.identity = identity;
    question.protocol = all.packet.tuple.protocol;
    question.port = match question.protocol {
        ICMP | ICMP6 => kind(&all.packet),
        _ => port,
    };
    settle();
    let reason = xebec_judge() as u8;
    settle();
    reason
}

/// Type and code of an ICMP message; of an answer, those of what it answers.
#[inline(always)]
fn kind(packet: &Packet) -> u16 {
    let [kind, code] = packet.icmp.to_ne_bytes();
    let asked = match kind {
        0 if packet.tuple.protocol == ICMP => 8,
        14 if packet.tuple.protocol == ICMP => 13,
        129 if packet.tuple.protocol == ICMP6 => 128,
        other => other,
    };
    u16::from_ne_bytes([asked, code])
}

/// No class has this number.
const UNASKED: u32 = u32::MAX;

/// Judges what stands in the question: 0, or why it is dropped. The kernel checks a function that is visible outside by
/// itself and once, not for each call.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn xebec_judge() -> u32 {
    let Some(all) = scratch() else {
        return u32::from(REASON_POLICY);
    };
    let reason = xebec_walk();
    if reason != 0 || !any(&all.question.audit) {
        return reason;
    }
    let (set, rule) = (all.told.set, all.told.rule);
    all.question.chain = all.question.audit;
    settle();
    let audit = xebec_walk();
    if audit != 0 {
        all.told.audit = audit as u8;
    } else {
        all.told.set = set;
        all.told.rule = rule;
    }
    0
}

/// Asks the sets of a chain, one after the other, until one decides: 0, or why it is dropped.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn xebec_walk() -> u32 {
    let Some(all) = scratch() else {
        return u32::from(REASON_POLICY);
    };
    // What would have been dropped before is told of, and not what let this through.
    let told = all.told.audit != 0;
    for tier in 0..TIERS {
        let set = all.question.chain[tier];
        if set == 0 {
            continue;
        }
        all.question.set = set;
        all.question.class = UNASKED;
        all.question.best = Decision {
            verdict: u32::MAX,
            rule: 0,
        };
        settle();
        let flags = xebec_ask_set();
        settle();
        let best = all.question.best;
        let denied = if all.question.identity == IDENTITY_HELD {
            REASON_POLICY
        } else if best.rule == 0 {
            if flags & SET_DENIES == 0 {
                continue;
            }
            REASON_POLICY
        } else {
            match best.verdict & VERDICT_ACTION {
                ALLOW => 0,
                DENY => REASON_RULE,
                _ => continue,
            }
        };
        if !told || denied != 0 {
            all.told.set = set;
            all.told.rule = best.rule;
        }
        return u32::from(denied);
    }
    0
}

/// Asks the set in the question, and gives its flags. One that is not there lets nothing through.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn xebec_ask_set() -> u32 {
    let Some(all) = scratch() else {
        return SET_DENIES;
    };
    let Some(set) = look_up(&SETS, &all.question.set) else {
        return SET_DENIES;
    };
    // SAFETY: entries stay readable until the program ends; sets are never changed, only replaced by new ones under
    // another number.
    let set = unsafe { &*set };
    let flags = set.flags;
    for shape in &set.shapes[..FEW] {
        let shape = *shape;
        if shape == NO_SHAPE {
            return flags;
        }
        if xebec_look_for_rule(u32::from(shape)) != 0 && flags & SET_FIRST != 0 {
            return flags;
        }
    }
    all.question.flags = flags;
    all.question.shapes = set.shapes;
    settle();
    // SAFETY: the function is of the kind that the helper calls, and takes nothing from here.
    unsafe {
        bpf_loop(
            (SHAPES - FEW) as u32,
            look_for_another as *mut c_void,
            core::ptr::null_mut(),
            0,
        )
    };
    flags
}

/// Nearly all sets have no more shapes; the kernel walks each turn of a loop over these, and one of the others.
const FEW: usize = 8;

/// Looks for an entry of the shape at this place behind the first ones; 1 once there is nothing more to look for.
#[inline(never)]
extern "C" fn look_for_another(number: u64, _: *mut c_void) -> i64 {
    let Some(all) = scratch() else {
        return 1;
    };
    let place = number as usize + FEW;
    if place >= SHAPES {
        return 1;
    }
    let shape = all.question.shapes[place];
    if shape == NO_SHAPE {
        return 1;
    }
    let found = xebec_look_for_rule(u32::from(shape)) != 0;
    i64::from(found && all.question.flags & SET_FIRST != 0)
}

/// Looks for an entry of this shape, and keeps it if it is stronger than what was found before. Whether there is one.
/// Not a part of the loop: the kernel walks each of its turns.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn xebec_look_for_rule(shape: u32) -> u32 {
    let Some(all) = scratch() else {
        return 0;
    };
    let (question, shape) = (&mut all.question, shape as u8);
    let mut peer = 0;
    if shape & SHAPE_CLASS != 0 {
        if shape & SHAPE_IDENTITY != 0 && question.identity != IDENTITY_WORLD {
            return 0;
        }
        if question.class == UNASKED {
            question.class = class(question.set, &question.peer);
        }
        if question.class == 0 {
            return 0;
        }
        peer = question.class;
    } else if shape & SHAPE_IDENTITY != 0 {
        peer = question.identity;
    }
    let key = RuleKey {
        set: question.set,
        peer,
        port: port_bits(question.port, shape & SHAPE_PORT),
        protocol: if shape & SHAPE_PROTOCOL != 0 {
            question.protocol
        } else {
            0
        },
        shape,
    };
    let Some(found) = look_up(&RULES, &key) else {
        return 0;
    };
    // SAFETY: the value is copied at once.
    let found = unsafe { *found };
    if found.verdict < question.best.verdict {
        question.best = found;
    }
    1
}

/// What a set's blocks make of an address; 0 where none matches.
#[inline(always)]
fn class(set: u32, address: &Ip) -> u32 {
    let address = address.words();
    let key = Key::new(160, CidrKey { set, address });
    CIDRS.get(&key).copied().unwrap_or(0)
}
