//! The table of flows, as programs of several CPUs use it at once: finding entries, entering and removing them.
//!
//! A place belongs to whoever writes its mark from free, or from another flow's, to busy: by one atomic exchange. Who
//! reads takes a place whose mark bears the key's print and whose key is the one that it looks for. An entry that takes
//! an older one's place is written elsewhere first, so that nobody reads half of each; what was freed is written over
//! last.

use core::arch::asm;
use core::ptr::{addr_of, addr_of_mut, read_volatile, write_volatile};

use xebec_dataplane_common::flow::{CLOSED, Flow, ticks};
use xebec_dataplane_common::table::{
    AGE, BUSY, FRESH, FlowSet, PRINT, PRINT_SHIFT, Place, Shape, TURN, TURN_SHIFT, WAYS, WORDS, age,
};

use crate::maps::{FLOWS, SHAPE};
use crate::scratch::{Scratch, scratch, settle};

/// Which of the keys in the scratch is meant.
#[derive(Clone, Copy, PartialEq, Eq)]
#[repr(u32)]
pub enum Which {
    /// The packet's own.
    Key,
    /// That of its flow's other entry.
    Other,
}

/// How an entry is entered.
#[derive(Clone, Copy, PartialEq, Eq)]
#[repr(u32)]
pub enum How {
    /// In any case.
    Over,
    /// Unless there is one.
    New,
}

/// How much longer ago than in truth a flow counts as asked for once both ends have closed it: two hours.
const OVER: u32 = ticks(7_200_000_000_000);

/// The word behind the marks: [`FlowSet::next`].
const NEXT: usize = WAYS;

/// The bits of a mark that are a print alone where its place can be read.
const WHOSE: u32 = PRINT | BUSY;

/// How often a place is looked for that another CPU takes first.
const TRIES: u32 = 3;

/// The entry of a key; null if there is none. It counts as asked for now.
#[inline(always)]
pub fn find(which: Which) -> *mut Flow {
    settle();
    let place = xebec_find_flow(which as u32);
    settle();
    if place == 0 {
        return core::ptr::null_mut();
    }
    match FLOWS.get_ptr_mut(place >> 4) {
        // SAFETY: entries of an array stay.
        Some(set) => unsafe { addr_of_mut!((*slot(set, place as usize)).flow) },
        None => core::ptr::null_mut(),
    }
}

/// Enters `begun` under a key; false where there is an entry that must stay. The flow of the set that was asked for
/// longest ago goes, if all places are taken.
#[inline(always)]
pub fn enter(which: Which, how: How) -> bool {
    settle();
    // One after the other: called by each other, they would need more stack than Linux 6.1 has for all.
    if xebec_claim_place(which as u32) == 0 {
        return false;
    }
    // Two CPUs may enter one key at once. Where it must be new, each sees the other's mark, and both give up.
    let met = xebec_meet(how as u32);
    let entered = xebec_write_place(met);
    xebec_let_go();
    settle();
    entered != 0
}

/// Removes the entry of a key, if there is one.
#[inline(always)]
pub fn remove(which: Which) {
    settle();
    xebec_remove_flow(which as u32);
    xebec_let_go();
    settle();
}

/// A place by its number from 1 on: as many bytes as it has hold the marks. So no number leads beyond the set, which the
/// kernel's check sees without a comparison.
#[inline(always)]
fn slot(set: *mut FlowSet, number: usize) -> *mut Place {
    // SAFETY: a set has 16 such pieces.
    unsafe { set.cast::<Place>().add(number & 15) }
}

/// A key, and where it may stand.
pub struct Sought {
    words: [u32; WORDS],
    /// Number of its set.
    set: u32,
    print: u32,
    /// The place where it stands rather than in any other.
    first: u32,
    now: u32,
    /// The place that is written, its mark before, and where the key stood then: one bit for each place.
    place: u32,
    mark: u32,
    stood: u32,
    /// [`FlowSet::next`] when the place was chosen.
    turn: u32,
}

/// A place's number, which is never 0.
#[inline(always)]
fn at(set: u32, way: u32) -> u32 {
    set << 4 | way + 1
}

/// Notes where a key may stand.
#[inline(always)]
fn seek(all: &mut Scratch, which: u32) -> Option<*mut FlowSet> {
    let shape: &Shape = SHAPE.get(0)?;
    let key = if which == Which::Key as u32 {
        &all.key
    } else {
        &all.other
    };
    let words = &mut all.sought.words;
    words[0] = key.low.0[0];
    words[1] = key.low.0[1];
    words[2] = key.low.0[2];
    words[3] = key.low.0[3];
    words[4] = key.high.0[0];
    words[5] = key.high.0[1];
    words[6] = key.high.0[2];
    words[7] = key.high.0[3];
    words[8] = u32::from(key.low_port) | u32::from(key.high_port) << 16;
    words[9] = u32::from(key.protocol);
    let found = shape.find(words);
    all.sought.set = found.set;
    all.sought.print = found.print;
    all.sought.first = found.first;
    all.sought.now = age(ticks(all.packet.seen));
    settle();
    FLOWS.get_ptr_mut(found.set)
}

/// The mark of a place.
#[inline(always)]
fn mark(set: *mut FlowSet, way: usize) -> *mut u32 {
    // SAFETY: a set has so many.
    unsafe { set.cast::<u32>().add(way & 15) }
}

/// A mark as it is now: other CPUs write it.
#[inline(always)]
fn read(set: *mut FlowSet, way: usize) -> u32 {
    // SAFETY: entries of an array stay, and a mark is read whole.
    unsafe { read_volatile(mark(set, way)) }
}

/// Writes a mark if it still is what it was. All CPUs write marks so, but for their ages.
#[inline(always)]
fn exchange(set: *mut FlowSet, way: usize, was: u32, becomes: u32) -> bool {
    let found: u32;
    // The compiler has no such function for BPF; the instruction is there since Linux 5.12 (`BPF_CMPXCHG`).
    // SAFETY: as in `read`.
    unsafe {
        asm!(
            "w0 = cmpxchg32_32(r1 + 0, w0, w2)",
            in("r1") mark(set, way),
            in("r2") becomes,
            inout("r0") was => found,
        );
    }
    found == was
}

impl Sought {
    /// Whether a place's key is this one.
    #[inline(always)]
    fn is_at(&self, set: *mut FlowSet, way: usize) -> bool {
        // SAFETY: entries of an array stay; what is torn is no key that somebody looks for.
        let key = unsafe { &*addr_of!((*slot(set, way + 1)).key).cast::<[u32; WORDS]>() };
        // Ports first: they differ most. Word by word, nothing waits on the stack, of which there is little.
        key[8] == self.words[8]
            && key[3] == self.words[3]
            && key[7] == self.words[7]
            && key[0] == self.words[0]
            && key[1] == self.words[1]
            && key[2] == self.words[2]
            && key[4] == self.words[4]
            && key[5] == self.words[5]
            && key[6] == self.words[6]
            && key[9] == self.words[9]
    }

    /// Notes that a place was asked for now.
    #[inline(always)]
    fn date(&self, set: *mut FlowSet, way: usize) {
        // SAFETY: entries of an array stay.
        let closed = unsafe { (*slot(set, way + 1)).flow.closed };
        // What is over goes before what goes on, however late it was.
        let asked = if closed == CLOSED {
            self.now.wrapping_sub(OVER) & AGE
        } else {
            self.now
        };
        if read(set, way) & AGE != asked {
            // SAFETY: the lower half of the mark, in this machine's order, which is the kernel's.
            unsafe { write_volatile(mark(set, way).cast::<u16>(), asked as u16) };
        }
    }
}

#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn xebec_find_flow(which: u32) -> u32 {
    let Some(all) = scratch() else {
        return 0;
    };
    let Some(set) = seek(all, which) else {
        return 0;
    };
    let sought = &all.sought;
    let first = sought.first as usize;
    // Read before the mark is compared: neither waits for the other's memory.
    let same = sought.is_at(set, first);
    if read(set, first) & WHOSE == sought.print && same {
        sought.date(set, first);
        return at(sought.set, sought.first);
    }
    for way in 0..WAYS {
        settle();
        if read(set, way) & WHOSE == sought.print && sought.is_at(set, way) {
            sought.date(set, way);
            return at(sought.set, way as u32);
        }
    }
    0
}

#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn xebec_remove_flow(which: u32) -> u32 {
    let Some(all) = scratch() else {
        return 0;
    };
    all.sought.stood = 0;
    if seek(all, which).is_some() {
        all.sought.place = WAYS as u32;
        settle();
        xebec_meet(0);
    }
    0
}

/// Chooses the place of the key that is sought: its first, if that is free or at least half as old as the oldest, and
/// nothing that has just begun; the oldest if not, of those that are as old the one that was taken longest ago. A free
/// one is older than any that is taken; where the key stands it is not written over. False if there is none.
#[inline(always)]
fn choose(sought: &mut Sought, set: *mut FlowSet) -> bool {
    let first = read(set, sought.first as usize);
    (sought.place, sought.mark) = (sought.first, first);
    sought.turn = read(set, NEXT) & TURN;
    if first & PRINT == 0 {
        return true;
    }
    let mut oldest = 0;
    for way in 0..WAYS as u32 {
        let mark = read(set, way as usize);
        let since = sought.turn.wrapping_sub(mark & TURN) & TURN;
        oldest = later(
            oldest,
            sought.idle(mark) << 8 | since >> TURN_SHIFT - 4 | way,
        );
    }
    let idle = sought.idle(first);
    if idle <= FRESH + 1 || idle * 2 < oldest >> 8 {
        sought.place = oldest & 15;
        sought.mark = read(set, (oldest & 15) as usize);
    }
    // Another CPU may have taken it since.
    oldest >> 8 != 0 && sought.mark & BUSY == 0
}

impl Sought {
    /// For how long nobody asked for what has this mark, and one more; 0 where another must not take its place.
    #[inline(always)]
    fn idle(&self, mark: u32) -> u32 {
        idle(mark, self.now) & is_not(mark & PRINT, self.print)
    }
}

/// For how long nobody asked for what has this mark, and one more; 0 where it is being written.
#[inline(always)]
fn idle(mark: u32, now: u32) -> u32 {
    let free = hidden((mark >> PRINT_SHIFT).wrapping_sub(1)) >> 31;
    let settled = hidden(mark >> 16 & 1).wrapping_sub(1);
    ((now.wrapping_sub(mark) & AGE) + 1 + (free << 16)) & settled
}

/// All bits where two numbers differ, none where they don't.
#[inline(always)]
fn is_not(one: u32, other: u32) -> u32 {
    let differ = hidden(one ^ other);
    (hidden(differ | differ.wrapping_neg()) >> 31).wrapping_neg()
}

/// The greater of two numbers below 2^31.
#[inline(always)]
fn later(one: u32, other: u32) -> u32 {
    let less = hidden(other.wrapping_sub(one)) >> 31;
    one.wrapping_add(other.wrapping_sub(one) & hidden(less).wrapping_sub(1))
}

/// The same number, of which the compiler knows nothing: else it would make branches of what is counted with it, of which
/// the kernel's check would follow each on its own, and leave out what that check needs to see.
#[inline(always)]
pub fn hidden(number: u32) -> u32 {
    let mut number = u64::from(number);
    // SAFETY: nothing is done.
    unsafe { asm!("{0} += 0", inout(reg) number, options(pure, nomem, nostack)) };
    number as u32
}

/// Looks where the key that is sought stands, but for the place that is this program's. Where it must be `new`, tells
/// whether it does, or another CPU is about to enter it.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn xebec_meet(new: u32) -> u32 {
    let Some(all) = scratch() else {
        return 1;
    };
    let sought = &mut all.sought;
    let Some(set) = FLOWS.get_ptr_mut(sought.set) else {
        return 1;
    };
    sought.stood = 0;
    for way in 0..WAYS {
        settle();
        let mark = read(set, way);
        if mark & PRINT == sought.print && way as u32 != sought.place {
            if mark & BUSY != 0 {
                if new != 0 {
                    return 1;
                }
            } else if sought.is_at(set, way) {
                if new != 0 {
                    return 1;
                }
                sought.stood |= 1 << way;
            }
        }
    }
    0
}

/// Frees the places where the key stood.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn xebec_let_go() -> u32 {
    let Some(all) = scratch() else {
        return 0;
    };
    let sought = &all.sought;
    if sought.stood == 0 {
        return 0;
    }
    let Some(set) = FLOWS.get_ptr_mut(sought.set) else {
        return 0;
    };
    for way in 0..WAYS {
        settle();
        if sought.stood & 1 << way != 0 {
            let mut mark = read(set, way);
            if mark & WHOSE == sought.print && !exchange(set, way, mark, sought.now) {
                // Somebody has dated it at this moment, or freed it.
                mark = read(set, way);
                if mark & WHOSE == sought.print {
                    exchange(set, way, mark, sought.now);
                }
            }
        }
    }
    0
}

/// Takes a place for a key; 0 if there is none.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn xebec_claim_place(which: u32) -> u32 {
    let Some(all) = scratch() else {
        return 0;
    };
    let Some(set) = seek(all, which) else {
        return 0;
    };
    for _ in 0..TRIES {
        let chosen = choose(&mut all.sought, set);
        settle();
        let sought = &all.sought;
        let becomes = sought.print | sought.turn | BUSY | sought.now;
        if chosen && exchange(set, sought.place as usize, sought.mark, becomes) {
            return 1;
        }
    }
    0
}

/// Writes `begun` into the place that was taken, or gives that back.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn xebec_write_place(give_back: u32) -> u32 {
    let Some(all) = scratch() else {
        return 0;
    };
    let sought = &mut all.sought;
    let Some(set) = FLOWS.get_ptr_mut(sought.set) else {
        return 0;
    };
    let place = sought.place as usize;
    let busy = sought.print | sought.turn | BUSY | sought.now;
    if give_back != 0 {
        sought.stood = 0;
        publish(set, place, busy, sought.now);
        return 0;
    }
    let entry = slot(set, place + 1);
    // SAFETY: the place is this program's until its mark says otherwise.
    unsafe {
        copy(
            addr_of_mut!((*entry).key).cast(),
            sought.words.as_ptr(),
            WORDS,
        );
        let begun = addr_of!(all.begun).cast();
        copy(
            addr_of_mut!((*entry).flow).cast(),
            begun,
            size_of::<Flow>() / 4,
        );
    }
    publish(set, place, busy, busy & !BUSY);
    // SAFETY: as in `read`. What two CPUs write here at once is either's.
    unsafe { write_volatile(mark(set, NEXT), sought.turn.wrapping_add(1 << TURN_SHIFT)) };
    1
}

/// Copies words one by one: read at once, they would wait on the stack, of which there is little.
///
/// # Safety
/// There are as many in both places.
#[inline(always)]
unsafe fn copy(to: *mut u32, from: *const u32, words: usize) {
    for word in 0..words {
        // SAFETY: the caller says so.
        unsafe { write_volatile(to.add(word), read_volatile(from.add(word))) };
    }
}

/// Writes the mark of a place that is this program's, behind all that it wrote before. Nobody else writes anything of it
/// but its age.
#[inline(always)]
fn publish(set: *mut FlowSet, way: usize, was: u32, becomes: u32) {
    // x86 makes what is written seen in its order; an exchange would wait for all of it.
    if cfg!(bpf_target_arch = "x86_64") || !exchange(set, way, was, becomes) {
        settle();
        // SAFETY: as in `read`.
        unsafe { write_volatile(mark(set, way), becomes) };
    }
}
