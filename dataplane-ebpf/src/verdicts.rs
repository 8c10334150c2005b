//! Verdicts that were given lately, of each CPU: who asks again before anything changed needs no rules.

use aya_ebpf::macros::map;
use aya_ebpf::maps::{Array, PerCpuArray};
use xebec_dataplane_common::ip::Ip;

use crate::maps::MMAPABLE;
use crate::scratch::Scratch;

/// How many of them there are; a power of two.
const PLACES: u32 = 256;

/// What was asked, and what the rules said.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct Verdict {
    asked: Asked,
    /// The peer's identity.
    identity: u32,
    /// What told of it: the set, 0 where none did, and the rule.
    set: u32,
    rule: u32,
    /// Why it is dropped, or 0.
    reason: u8,
    /// Why it would be, were nothing in audit mode.
    audit: u8,
    pad: u16,
}

/// All that a verdict depends on.
#[repr(C)]
#[derive(Clone, Copy)]
struct Asked {
    /// How often what pods are judged by had changed.
    changes: u64,
    peer: Ip,
    rules: u32,
    identity: u32,
    port: u16,
    protocol: u8,
    pad: u8,
}

/// How often what pods are judged by has changed. The agent counts a change once it is in the kernel: who read the count
/// before asked the rules before it, or while it was made.
#[map]
static CHANGES: Array<u64> = Array::with_max_entries(1, MMAPABLE);

#[map]
static VERDICTS: PerCpuArray<Verdict> = PerCpuArray::with_max_entries(PLACES, 0);

/// How often what pods are judged by has changed; asked for before the rules are.
#[inline(always)]
pub fn changes() -> u64 {
    match CHANGES.get_ptr(0) {
        // SAFETY: it is there, and aligned; the agent writes it as one word.
        Some(changes) => unsafe { core::ptr::read_volatile(changes) },
        None => 0,
    }
}

impl Asked {
    /// The question that stands in a CPU's memory.
    #[inline(always)]
    fn of(all: &Scratch, changes: u64) -> Self {
        let question = &all.question;
        Self {
            changes,
            peer: question.peer.words(),
            rules: question.rules,
            identity: question.identity,
            port: question.port,
            protocol: question.protocol,
            pad: 0,
        }
    }

    #[inline(always)]
    fn is(&self, other: &Self) -> bool {
        let words = self.peer.differs(&other.peer)
            | self.rules ^ other.rules
            | self.identity ^ other.identity
            | self.ports() ^ other.ports();
        words == 0 && self.changes == other.changes
    }

    #[inline(always)]
    fn ports(&self) -> u32 {
        u32::from(self.port) << 16 | u32::from(self.protocol)
    }

    /// Where such a question's verdict is kept: one of the last that fell there.
    #[inline(always)]
    fn place(&self) -> u32 {
        let peer = &self.peer.0;
        let peer =
            peer[3] ^ peer[2].rotate_left(8) ^ peer[1].rotate_left(16) ^ peer[0].rotate_left(24);
        let hash = (peer ^ self.ports()).wrapping_mul(0x9e37_79b1) ^ self.rules;
        hash.wrapping_mul(0x85eb_ca6b) >> (32 - PLACES.trailing_zeros())
    }
}

/// Answers the question in a CPU's memory as it was answered before, if it was and nothing has changed: 0, or why the
/// packet is dropped. `None` where the rules have to be asked; then [`keep`] takes what they say.
#[inline(always)]
pub fn recall(all: &mut Scratch, changes: u64) -> Option<u32> {
    let asked = Asked::of(all, changes);
    let kept = VERDICTS.get_ptr(asked.place())?;
    // SAFETY: as in `keep`.
    let kept = unsafe { &*kept };
    if !kept.asked.is(&asked) {
        return None;
    }
    all.question.identity = kept.identity;
    if kept.set != 0 {
        all.told.set = kept.set;
        all.told.rule = kept.rule;
    }
    if kept.audit != 0 {
        all.told.audit = kept.audit;
    }
    Some(u32::from(kept.reason))
}

/// Keeps what the rules said to the question in a CPU's memory, which was asked with this identity of the peer.
#[inline(always)]
pub fn keep(all: &Scratch, changes: u64, identity: u32, reason: u32) {
    let mut asked = Asked::of(all, changes);
    asked.identity = identity;
    if let Some(place) = VERDICTS.get_ptr_mut(asked.place()) {
        let verdict = Verdict {
            asked,
            identity: all.question.identity,
            set: all.told.set,
            rule: all.told.rule,
            reason: reason as u8,
            audit: all.told.audit,
            pad: 0,
        };
        // SAFETY: it is there; programs of a CPU do not interrupt one another.
        unsafe { *place = verdict };
    }
}
