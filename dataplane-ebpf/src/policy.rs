//! Judging by a compiled set of rules.

use aya_ebpf::maps::lpm_trie::Key;
use xebec_dataplane_common::ip::Ip;
use xebec_dataplane_common::nat::Tuple;
use xebec_dataplane_common::policy::{
    CidrKey, IDENTITY_WORLD, NO_SHAPE, RuleKey, SHAPE_CLASS, SHAPE_IDENTITY, SHAPE_PORT,
    SHAPE_PROTOCOL, port_bits,
};

use crate::maps::{CIDRS, IDENTITIES, RULES, SETS};
use crate::scratch::{scratch, settle};

/// What is asked of a set.
pub struct Question {
    /// The set.
    pub set: u32,
    /// The peer's address.
    pub peer: Ip,
    /// The peer's identity.
    pub identity: u32,
    /// What the set's address blocks make of the peer; [`UNASKED`] until an entry wants to know.
    class: u32,
    /// Port of the destination.
    pub port: u16,
    /// IP protocol number.
    pub protocol: u8,
}

/// The identity of an address.
#[inline(always)]
pub fn identity(address: &Ip) -> u32 {
    // SAFETY: the value is copied at once.
    match unsafe { IDENTITIES.get(address) } {
        Some(identity) => *identity,
        None => IDENTITY_WORLD,
    }
}

/// Judges what begins a flow, by a set, for a peer with this address and identity. `tuple` is what it is for.
#[inline(always)]
pub fn ask(question: &mut Question, set: u32, peer: &Ip, identity: u32, tuple: &Tuple) -> u32 {
    question.set = set;
    question.peer = peer.words();
    question.identity = identity;
    question.class = UNASKED;
    question.port = tuple.destination_port;
    question.protocol = tuple.protocol;
    settle();
    xebec_judge()
}

/// No class has this number.
const UNASKED: u32 = u32::MAX;

/// The rule that allows what stands in the question, if any. A set that is not there allows nothing. The kernel checks
/// a function that is visible outside by itself and once, not for each call.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn xebec_judge() -> u32 {
    let Some(all) = scratch() else {
        return 0;
    };
    // SAFETY: sets are never changed, only replaced by new ones under another number.
    let Some(set) = (unsafe { SETS.get(&all.question.set) }) else {
        return 0;
    };
    for shape in set.shapes {
        if shape == NO_SHAPE {
            break;
        }
        let rule = xebec_look_for_rule(u32::from(shape));
        if rule != 0 {
            return rule;
        }
    }
    0
}

/// The rule that allows it by an entry of this shape, if any. Not a part of the loop: the kernel walks each of its turns.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn xebec_look_for_rule(shape: u32) -> u32 {
    let Some(all) = scratch() else {
        return 0;
    };
    let (question, shape) = (&mut all.question, shape as u8);
    let mut peer = 0;
    if shape & SHAPE_IDENTITY != 0 {
        peer = question.identity;
    } else if shape & SHAPE_CLASS != 0 {
        if question.class == UNASKED {
            question.class = class(question.set, &question.peer);
        }
        if question.class == 0 {
            return 0;
        }
        peer = question.class;
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
    // SAFETY: the value is copied at once.
    unsafe { RULES.get(&key) }.copied().unwrap_or(0)
}

/// What a set's blocks make of an address; 0 where none matches.
#[inline(always)]
fn class(set: u32, address: &Ip) -> u32 {
    let address = address.words();
    let key = Key::new(160, CidrKey { set, address });
    CIDRS.get(&key).copied().unwrap_or(0)
}
