//! Judging by compiled sets of rules.

use core::ffi::c_void;

use aya_ebpf::helpers::generated::bpf_loop;
use aya_ebpf::maps::lpm_trie::Key;
use xebec_dataplane_common::flow::{REASON_POLICY, REASON_RULE};
use xebec_dataplane_common::ip::Ip;
use xebec_dataplane_common::policy::{
    ALLOW, CHAINS_NUMBER, Chain, Chains, CidrKey, DENY, Decision, IDENTITY_HELD, IDENTITY_WORLD,
    Known, NO_SHAPE, RuleKey, SEATS, SET_ALLOWS, SET_DENIES, SET_FIRST, SHAPE_CLASS,
    SHAPE_IDENTITY, SHAPE_PORT, SHAPE_PROTOCOL, SHAPES, Set, Standing, UNDER_EGRESS, UNDER_INGRESS,
    VERDICT_ACTION, WIDE, port_bits,
};
use xebec_dataplane_common::{ICMP, ICMP6};

use crate::maps::{CHAINS, CIDRS, ENDPOINTS, IDENTITIES, RULES, SETS, STANDINGS, look_up};
use crate::packet::Packet;
use crate::scratch::{Scratch, scratch, settle};
use crate::verdicts;

/// A pod of this node.
pub struct Met {
    /// Index of the host's end of its veth pair.
    pub ifindex: u32,
    /// What its labels make it.
    pub identity: u32,
    /// As in [`Standing::rules`].
    pub rules: u32,
    /// Hardware address of the pod's end.
    pub mac: [u8; 6],
}

/// Looks for the pod of this node that has an address. False if there is none.
#[inline(always)]
pub fn meet(address: &Ip, met: &mut Met) -> bool {
    // SAFETY: entries never change.
    let Some(there) = (unsafe { ENDPOINTS.get(address) }) else {
        return false;
    };
    met.ifindex = there.ifindex;
    met.mac = there.mac;
    match STANDINGS.get_ptr(there.slot) {
        Some(standing) => {
            // SAFETY: it is there, and aligned; it is read at once, since it may change at any moment.
            let standing = unsafe { core::ptr::read_volatile(standing.cast::<u64>()) };
            met.identity = standing as u32;
            met.rules = (standing >> 32) as u32;
        }
        // Under rules that nobody has: nothing is let through.
        None => met.rules = UNDER_INGRESS | UNDER_EGRESS | CHAINS_NUMBER,
    }
    true
}

/// What is asked.
pub struct Question {
    /// Number of the chains that judge, with [`UNDER_INGRESS`] or [`UNDER_EGRESS`] for which of them.
    pub rules: u32,
    /// The sets that are asked.
    chain: Chain,
    /// The set that is asked now.
    set: u32,
    /// What was decided in its tier, if its `rule` is not 0.
    best: Decision,
    /// Which set of the tier did, or else the first one that denies what none decides, or the first one; 0 before any.
    judged: u32,
    /// Flags of the tier's sets.
    tier: u32,
    /// The peer's address.
    pub peer: Ip,
    /// The peer's identity; [`UNASKED`] until it is looked up.
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

impl Question {
    /// Nothing was decided yet.
    #[inline(always)]
    fn begin_tier(&mut self) {
        self.best = Decision {
            verdict: u32::MAX,
            rule: 0,
        };
        self.judged = 0;
        self.tier = 0;
    }
}

/// The identity of an address.
#[inline(always)]
pub fn identity(address: &Ip) -> u32 {
    // Where it changes, the kernel puts the new entry before it takes the old one away, but elsewhere: who passes in
    // between may find neither, and both the next time.
    for _ in 0..2 {
        let Some(known) = look_up::<_, Known, _>(&IDENTITIES, address) else {
            continue;
        };
        // SAFETY: entries stay readable until the program ends. This one may be given to another address meanwhile,
        // and then says so: its address is written before its identity, and read after it.
        unsafe {
            let identity = core::ptr::read_volatile(&raw const (*known).identity);
            if core::ptr::read_volatile(&raw const (*known).address) == *address {
                return identity;
            }
        }
    }
    IDENTITY_WORLD
}

/// The peer's identity is not known yet; no address has this one.
pub const UNASKED: u32 = u32::MAX;

/// Judges what begins a flow to `port`, by a pod's rules of one way ([`UNDER_INGRESS`] or [`UNDER_EGRESS`]), for a peer
/// with this address and identity (or [`UNASKED`]): 0, or why it is dropped. What decided is told.
#[inline(always)]
pub fn ask(all: &mut Scratch, rules: u32, way: u32, peer: &Ip, identity: u32, port: u16) -> u8 {
    if !Standing::has_rules(rules, way) {
        return 0;
    }
    let question = &mut all.question;
    question.rules = rules & CHAINS_NUMBER | way;
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

/// Judges what stands in the question: 0, or why it is dropped. The kernel checks a function that is visible outside by
/// itself and once, not for each call.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn xebec_judge() -> u32 {
    let Some(all) = scratch() else {
        return u32::from(REASON_POLICY);
    };
    let changes = verdicts::changes();
    // What was told before this has a say in what is told now.
    let fresh = all.told.audit == 0;
    if fresh {
        if let Some(reason) = verdicts::recall(all, changes) {
            return reason;
        }
    }
    let identity = all.question.identity;
    let (set, rule) = (all.told.set, all.told.rule);
    all.told.set = 0;
    let reason = decide(all);
    settle();
    if fresh {
        verdicts::keep(all, changes, identity, reason);
    }
    if all.told.set == 0 {
        all.told.set = set;
        all.told.rule = rule;
    }
    reason
}

/// The same, by the rules.
#[inline(always)]
fn decide(all: &mut Scratch) -> u32 {
    let rules = all.question.rules;
    let Some(chains) = look_up::<_, Chains, _>(&CHAINS, &(rules & CHAINS_NUMBER)) else {
        return u32::from(REASON_POLICY);
    };
    // SAFETY: entries never change.
    let chains = unsafe { &*chains };
    let audit = if rules & UNDER_INGRESS != 0 {
        all.question.chain = chains.ingress;
        chains.ingress_audit
    } else {
        all.question.chain = chains.egress;
        chains.egress_audit
    };
    if all.question.identity == UNASKED {
        all.question.identity = identity(&all.question.peer);
    }
    settle();
    let reason = xebec_walk();
    if reason != 0 || audit[0] | audit[1] | audit[2] | audit[3] == 0 {
        return reason;
    }
    let (set, rule) = (all.told.set, all.told.rule);
    all.question.chain = audit;
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

/// Asks the sets of a chain, tier after tier, until one decides: 0, or why it is dropped.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn xebec_walk() -> u32 {
    let Some(all) = scratch() else {
        return u32::from(REASON_POLICY);
    };
    // What would have been dropped before is told of, and not what let this through.
    let told = all.told.audit != 0;
    all.question.begin_tier();
    for seat in 0..SEATS {
        let set = all.question.chain[seat];
        if set != 0 {
            all.question.set = set;
            all.question.class = UNASKED;
            let before = all.question.best.verdict;
            settle();
            let flags = xebec_ask_set();
            settle();
            let question = &mut all.question;
            let denies = flags & !question.tier & SET_DENIES != 0 && question.best.rule == 0;
            if question.best.verdict < before || denies || question.judged == 0 {
                question.judged = set;
            }
            question.tier |= flags;
            settle();
        }
        if seat == WIDE || all.question.judged == 0 {
            continue;
        }
        let best = all.question.best;
        let denied = if all.question.identity == IDENTITY_HELD {
            REASON_POLICY
        } else if best.rule == 0 {
            if all.question.tier & SET_DENIES == 0 {
                all.question.begin_tier();
                continue;
            }
            REASON_POLICY
        } else {
            match best.verdict & VERDICT_ACTION {
                ALLOW => 0,
                DENY => REASON_RULE,
                _ => {
                    all.question.begin_tier();
                    continue;
                }
            }
        };
        if !told || denied != 0 {
            all.told.set = all.question.judged;
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
    // One that gets entries of a new shape is put elsewhere: who passes in between may find neither, and it the next time.
    let set = look_up::<_, Set, _>(&SETS, &all.question.set)
        .or_else(|| look_up::<_, Set, _>(&SETS, &all.question.set));
    let Some(set) = set else {
        return SET_DENIES;
    };
    // SAFETY: entries stay readable until the program ends, and a set's number is given to no other while that can be.
    let set = unsafe { &*set };
    let flags = set.flags;
    // Only what is stronger than an entry of the other set would matter.
    if flags & SET_ALLOWS != 0 && all.question.best.rule != 0 {
        return flags;
    }
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
    let Some(found) = look_up::<_, Decision, _>(&RULES, &key) else {
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
