//! The table of flows: sets of places, each of which a flow's entry may have. Which set, its key tells; which place in
//! it, the marks at its head. So a lookup reads the marks and one place, and a new flow is written over the one of its
//! set that was asked for longest ago: nothing is allocated, listed or locked.

use bytemuck::{Pod, Zeroable};

use crate::flow::{Flow, FlowKey};

/// Places of a set. With their marks they fill 2 KiB, so that no set is in two pages.
pub const WAYS: usize = 15;

/// One entry: two cache lines.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Pod, Zeroable)]
pub struct Place {
    /// Whose it is.
    pub key: FlowKey,
    /// What is known of it.
    pub flow: Flow,
}

/// All places that a flow may have.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Pod, Zeroable)]
pub struct FlowSet {
    /// What stands in each place, and since when: [`print`](Shape::find) of its key, [`BUSY`], and its [`age`].
    pub marks: [u32; WAYS],
    /// How many entries were entered, in the bits of [`TURN`]. Of those that were asked for in the same moment, the one
    /// that was entered longest ago goes.
    pub next: u32,
    /// Always 0; what is before the places fills as many bytes as one.
    pub pad: [u32; 16],
    /// The places.
    pub places: [Place; WAYS],
}

/// The bits of a mark that tell when its flow was asked for.
pub const AGE: u32 = 0xffff;
/// Set in a mark whose place is being written: whoever reads passes it by.
pub const BUSY: u32 = 1 << 16;
/// The bits of a mark that tell when its flow was entered: [`FlowSet::next`] at that time.
pub const TURN: u32 = 0xf << TURN_SHIFT;
/// Where [`TURN`] begins.
pub const TURN_SHIFT: u32 = 17;
/// The bits of a mark that tell whose it is; none in a free one.
pub const PRINT: u32 = !(AGE | BUSY | TURN);
/// Where [`PRINT`] begins.
pub const PRINT_SHIFT: u32 = 21;

/// When something was asked for, as marks tell it, of the ticks of [`ticks`](crate::flow::ticks): they come again after
/// 19 hours.
#[inline(always)]
pub const fn age(ticks: u32) -> u32 {
    ticks & AGE
}

/// What was asked for so many ticks ago at most has just begun, as far as anybody can tell.
pub const FRESH: u32 = 1;

/// Words of a key.
pub const WORDS: usize = size_of::<FlowKey>() / 4;

/// How keys find their places in a table: its size, and secrets without which nobody can tell which flows meet in a set.
#[repr(C, align(8))]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Pod, Zeroable)]
pub struct Shape {
    /// A secret for each word of a key.
    pub secrets: [u32; WORDS],
    /// How many sets there are; 0 before the table is used.
    pub sets: u32,
    /// Another secret.
    pub last: u32,
}

/// Where a key may stand.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Found {
    /// The number of its set.
    pub set: u32,
    /// The [`PRINT`] of its mark.
    pub print: u32,
    /// The place where it stands rather than in any other: a lookup reads it at the same time as the marks.
    pub first: u32,
}

impl Shape {
    /// Where a key may stand. No two keys meet more often than by chance, whoever chooses them: it is NH, the
    /// hash of UMAC (RFC 4418, 5.2), and a last mixing by a secret.
    #[inline(always)]
    pub fn find(&self, words: &[u32; WORDS]) -> Found {
        let secret = &self.secrets;
        let pair = |one: usize| {
            let low = words[one].wrapping_add(secret[one]);
            let high = words[one + 1].wrapping_add(secret[one + 1]);
            u64::from(low).wrapping_mul(u64::from(high))
        };
        let mut hash = pair(0)
            .wrapping_add(pair(2))
            .wrapping_add(pair(4))
            .wrapping_add(pair(6))
            .wrapping_add(pair(8));
        hash ^= u64::from(self.last) << 32 | u64::from(self.last);
        hash = (hash ^ hash >> 32).wrapping_mul(0xd6e8_feb8_6659_fd93);
        hash = (hash ^ hash >> 32).wrapping_mul(0xd6e8_feb8_6659_fd93);
        let print = hash as u32 & PRINT;
        Found {
            set: ((hash >> 32).wrapping_mul(u64::from(self.sets)) >> 32) as u32,
            // 0 is a free place's.
            print: if print == 0 { PRINT } else { print },
            first: ((hash as u32 & 0xffff) * WAYS as u32) >> 16,
        }
    }
}

// A set fills its bytes: the marks as many as a place, and both a power of two, so that programs count places by shifts.
const _: () = {
    assert!(size_of::<Place>() == 128 && size_of::<FlowSet>() == 16 * size_of::<Place>());
    assert!(core::mem::offset_of!(FlowSet, places) == size_of::<Place>());
    assert!(core::mem::offset_of!(FlowSet, next) == 4 * WAYS);
};
