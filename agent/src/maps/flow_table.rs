//! The table of flows, as the agent reads it: its memory is the kernel's, and programs write it meanwhile.

use std::mem::offset_of;
use std::ops::ControlFlow;
use std::sync::atomic::{AtomicU32, Ordering, fence};

use anyhow::{Context, Result, bail, ensure};
use aya::maps::{Array, Map, MapData};
use bytemuck::{Zeroable, must_cast, must_cast_ref};
use xebec_dataplane_common::flow::{Flow, FlowKey};
use xebec_dataplane_common::table::{AGE, BUSY, FlowSet, PRINT, Place, Shape, WAYS};

use super::memory::Memory;
use crate::bpf_maps;

/// The name of the map that holds the table.
pub const FLOWS: &str = "FLOWS";
/// The name of the map that tells how keys find their places.
pub const SHAPE: &str = "SHAPE";

/// Words of a set, and of a place.
const SET: usize = size_of::<FlowSet>() / 4;
const PLACE: usize = size_of::<Place>() / 4;

/// How often a place is read that programs write meanwhile.
const TRIES: usize = 4;

/// How keys find their places in a table of so many sets.
fn new_shape(sets: u32) -> Shape {
    let random = || {
        use std::hash::{BuildHasher, RandomState};
        RandomState::new().hash_one(()) as u32
    };
    let mut shape = Shape {
        sets,
        last: random(),
        ..Shape::zeroed()
    };
    shape.secrets = shape.secrets.map(|_| random());
    shape
}

/// Gives the table its shape, unless an agent before this one has: its flows would be found no more.
pub(crate) fn shape(ebpf: &mut aya::Ebpf) -> Result<()> {
    let flows = ebpf.map(FLOWS).context("the eBPF object has no FLOWS")?;
    let Map::Array(flows) = flows else {
        bail!("the eBPF map FLOWS is no array");
    };
    let sets = flows
        .info()
        .context("could not ask for the size of FLOWS")?;
    let map = ebpf
        .map_mut(SHAPE)
        .context("the eBPF object has no SHAPE")?;
    let mut map: Array<&mut MapData, [u8; size_of::<Shape>()]> =
        Array::try_from(map).context("the eBPF map SHAPE is no array")?;
    let shape: Shape = must_cast(map.get(&0, 0).context("could not read SHAPE")?);
    if shape.sets == 0 {
        map.set(0, must_cast::<_, [u8; _]>(new_shape(sets.max_entries())), 0)
            .context("could not write SHAPE")?;
        return Ok(());
    }
    ensure!(
        shape.sets == sets.max_entries(),
        "the table of flows has {} sets, not {}: remove the agent's folder of maps and start it again",
        sets.max_entries(),
        shape.sets
    );
    Ok(())
}

/// The table of flows.
pub struct FlowTable {
    memory: Memory,
    sets: usize,
    shape: Shape,
}

impl FlowTable {
    /// The one in these maps.
    pub fn new(flows: &MapData, shape: MapData) -> Result<Self> {
        let info = flows
            .info()
            .context("could not ask for the size of FLOWS")?;
        ensure!(
            info.value_size() as usize == size_of::<FlowSet>(),
            "FLOWS has sets of {} bytes, not {}: an agent of another version made it",
            info.value_size(),
            size_of::<FlowSet>()
        );
        let shape: Array<MapData, [u8; size_of::<Shape>()]> =
            Array::try_from(Map::Array(shape)).context("SHAPE is no array")?;
        let shape = shape.get(&0, 0).context("could not read SHAPE")?;
        Self::mapped(flows, must_cast(shape))
    }

    /// The one that this process holds.
    pub(crate) fn open() -> Result<Self> {
        Self::new(&bpf_maps::open(FLOWS)?, bpf_maps::open(SHAPE)?)
    }

    fn mapped(flows: &MapData, shape: Shape) -> Result<Self> {
        let info = flows
            .info()
            .context("could not ask for the size of FLOWS")?;
        let sets = info.max_entries() as usize;
        let memory = Memory::of(flows.fd(), sets * size_of::<FlowSet>())
            .context("could not map the memory of FLOWS")?;
        Ok(Self {
            memory,
            sets,
            shape,
        })
    }

    /// All of it, as words: programs write them at any time, so they are read as atomic ones are.
    fn words(&self) -> &[AtomicU32] {
        let first = self.memory.start().cast::<AtomicU32>().as_ptr();
        // SAFETY: so much is mapped as long as `self` lives, and a page's beginning is aligned.
        unsafe { std::slice::from_raw_parts(first, self.sets * SET) }
    }

    /// How many entries there is room for.
    pub fn capacity(&self) -> u64 {
        (self.sets * WAYS) as u64
    }

    /// A word of a set.
    fn word(&self, set: usize, word: usize) -> &AtomicU32 {
        assert!(word < SET, "no such word");
        &self.words()[set * SET + word]
    }

    fn mark(&self, set: usize, way: usize) -> &AtomicU32 {
        self.word(set, way)
    }

    fn place_word(&self, set: usize, way: usize, word: usize) -> &AtomicU32 {
        let first = offset_of!(FlowSet, places) / 4;
        self.word(set, first + way * PLACE + word)
    }

    /// What stands in a place, and its mark; none where it is free, or written again and again.
    fn read(&self, set: usize, way: usize) -> Option<(u32, Place)> {
        for _ in 0..TRIES {
            let mark = self.mark(set, way).load(Ordering::Acquire);
            if mark & PRINT == 0 {
                return None;
            }
            if mark & BUSY != 0 {
                continue;
            }
            let mut words = [0_u32; PLACE];
            for (at, word) in words.iter_mut().enumerate() {
                *word = self.place_word(set, way, at).load(Ordering::Relaxed);
            }
            fence(Ordering::Acquire);
            if self.mark(set, way).load(Ordering::Relaxed) & !AGE == mark & !AGE {
                return Some((mark, must_cast(words)));
            }
        }
        None
    }

    /// Frees a place if it still is whose it was; false if not.
    fn free(&self, set: usize, way: usize, mark: u32) -> bool {
        let print = mark & PRINT;
        self.mark(set, way)
            .fetch_update(Ordering::AcqRel, Ordering::Relaxed, |now| {
                (now & (PRINT | BUSY) == print).then_some(now & AGE)
            })
            .is_ok()
    }

    /// The places of a set that are not free, one bit for each.
    fn taken(&self, set: usize) -> u32 {
        let marks = &self.words()[set * SET..][..WAYS];
        let mut taken = 0;
        for (way, mark) in marks.iter().enumerate() {
            taken |= u32::from(mark.load(Ordering::Relaxed) & PRINT != 0) << way;
        }
        taken
    }

    /// All places that are not free: their sets, their numbers, their marks, and what they hold.
    fn places(&self) -> impl Iterator<Item = (usize, usize, u32, Place)> {
        (0..self.sets).flat_map(move |set| {
            let taken = self.taken(set);
            let ways = if taken == 0 { 0..0 } else { 0..WAYS };
            ways.filter(move |way| taken & 1 << way != 0)
                .filter_map(move |way| {
                    let (mark, place) = self.read(set, way)?;
                    Some((set, way, mark, place))
                })
        })
    }

    /// Gives all entries, until it breaks.
    pub fn each(&self, mut each: impl FnMut(&FlowKey, &Flow) -> ControlFlow<()>) {
        for (_, _, _, place) in self.places() {
            if each(&place.key, &place.flow).is_break() {
                return;
            }
        }
    }

    /// Gives all entries, which may be changed; those for which it says `false` are removed, and counted. What programs
    /// enter meanwhile may be given or not.
    pub fn retain(&self, mut keep: impl FnMut(&FlowKey, &mut Flow) -> bool) -> usize {
        let mut removed = 0;
        for (set, way, mark, place) in self.places() {
            let mut after = place;
            if keep(&place.key, &mut after.flow) {
                self.change(set, way, &place, &after);
            } else {
                removed += usize::from(self.free(set, way, mark));
            }
        }
        removed
    }

    fn change(&self, set: usize, way: usize, before: &Place, after: &Place) {
        if before == after {
            return;
        }
        let (before, after): (&[u32; PLACE], &[u32; PLACE]) =
            (must_cast_ref(before), must_cast_ref(after));
        for (at, (before, after)) in before.iter().zip(after).enumerate() {
            if before != after {
                self.place_word(set, way, at)
                    .store(*after, Ordering::Relaxed);
            }
        }
    }

    /// The set of a key, and the places in it that have it.
    fn ways(&self, key: &FlowKey) -> (usize, u32, Vec<(usize, u32, Place)>) {
        let found = self.shape.find(must_cast_ref(key));
        let (set, print) = (found.set as usize, found.print);
        let ways = (0..WAYS).filter_map(|way| {
            let (mark, place) = self.read(set, way)?;
            (place.key == *key).then_some((way, mark, place))
        });
        (set, print, ways.collect())
    }

    /// The entry of a key.
    pub fn get(&self, key: &FlowKey) -> Option<Flow> {
        let (_, _, ways) = self.ways(key);
        ways.first().map(|(_, _, place)| place.flow)
    }

    /// Removes the entry of a key; false if there is none.
    pub fn remove(&self, key: &FlowKey) -> bool {
        let (set, _, ways) = self.ways(key);
        let mut any = false;
        for (way, mark, _) in ways {
            any |= self.free(set, way, mark);
        }
        any
    }

    /// Writes an entry, in a place that is free or its own; false if there is none.
    pub fn set(&self, key: &FlowKey, flow: Flow) -> bool {
        let (set, print, ways) = self.ways(key);
        if let Some((way, _, place)) = ways.first() {
            let after = Place { flow, ..*place };
            self.change(set, *way, place, &after);
            return true;
        }
        let claimed = (0..WAYS).find(|way| {
            let claim = |mark: u32| (mark & !AGE == 0).then_some(print | BUSY | mark);
            let mark = self.mark(set, *way);
            mark.fetch_update(Ordering::AcqRel, Ordering::Relaxed, claim)
                .is_ok()
        });
        let Some(way) = claimed else {
            return false;
        };
        let place = Place { key: *key, flow };
        let words: &[u32; PLACE] = must_cast_ref(&place);
        for (at, word) in words.iter().enumerate() {
            self.place_word(set, way, at)
                .store(*word, Ordering::Relaxed);
        }
        self.mark(set, way).fetch_and(!BUSY, Ordering::Release);
        true
    }
}

#[cfg(test)]
impl FlowTable {
    /// One that no program has, with room for so many entries at least.
    pub(crate) fn alone(entries: u32) -> Self {
        // `BPF_F_MMAPABLE`.
        let map: Array<MapData, [u8; size_of::<FlowSet>()]> =
            Array::create(entries.div_ceil(WAYS as u32), 1 << 10).unwrap();
        let held = bpf_maps::held().unwrap();
        let sets = map.len();
        let one = held.iter().rev().find(|map| {
            map.capacity == u64::from(sets) && map.value_size == size_of::<FlowSet>() as u64
        });
        Self::mapped(&one.unwrap().open().unwrap(), new_shape(sets)).unwrap()
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use xebec_dataplane_common::table::Found;

    use super::*;

    fn key(number: u32) -> FlowKey {
        let mut key = FlowKey::zeroed();
        (key.low.0[3], key.low_port, key.protocol) = (number, number as u16, 6);
        key
    }

    #[test]
    fn what_was_entered_is_found_changed_and_removed() {
        if !nix::unistd::geteuid().is_root() {
            println!("skipped: it needs root");
            return;
        }
        // So much room that no set of any secret is full.
        let table = FlowTable::alone(100_000);
        let mut known = HashMap::new();
        for number in 0..8_000 {
            let mut flow = Flow::zeroed();
            flow.rule = number;
            assert!(table.set(&key(number), flow), "a set of {number} is full");
            known.insert(key(number), flow);
        }
        let all = || {
            let mut all = HashMap::new();
            table.each(|key, flow| {
                assert_eq!(all.insert(*key, *flow), None, "twice");
                ControlFlow::Continue(())
            });
            all
        };
        assert_eq!(all(), known);
        let removed = table.retain(|_, flow| {
            flow.seen = 7;
            flow.rule % 2 == 0
        });
        assert_eq!(removed, 4_000);
        known.retain(|_, flow| {
            flow.seen = 7;
            flow.rule % 2 == 0
        });
        assert_eq!(all(), known);
        assert_eq!(table.get(&key(1)), None);
        assert_eq!(table.get(&key(2)), known.get(&key(2)).copied());
        assert!(table.remove(&key(2)) && !table.remove(&key(2)));
        assert_eq!(table.get(&key(2)), None);
    }

    #[test]
    fn a_full_set_takes_no_more_and_what_is_being_written_is_passed_by() {
        if !nix::unistd::geteuid().is_root() {
            println!("skipped: it needs root");
            return;
        }
        let table = FlowTable::alone(1);
        assert_eq!(table.capacity(), WAYS as u64);
        for number in 0..WAYS as u32 {
            assert!(table.set(&key(number), Flow::zeroed()));
        }
        assert!(!table.set(&key(99), Flow::zeroed()));
        table.mark(0, 3).fetch_or(BUSY, Ordering::Relaxed);
        let mut found = 0;
        table.each(|_, _| {
            found += 1;
            ControlFlow::Continue(())
        });
        assert_eq!(found, WAYS - 1);
    }

    #[test]
    fn keys_are_spread_evenly_and_by_secrets() {
        let [one, other] = [new_shape(1_000), new_shape(1_000)];
        let mut counts = vec![0_u32; 1_000];
        let mut firsts = [0_u32; WAYS];
        let mut same = 0;
        for number in 0..16_000 {
            let key = key(number);
            let Found { set, print, first } = one.find(must_cast_ref(&key));
            assert!(print & PRINT == print && print != 0 && first < WAYS as u32);
            counts[set as usize] += 1;
            firsts[first as usize] += 1;
            same += u32::from(other.find(must_cast_ref(&key)).set == set);
        }
        // 16 each by chance: a set with 45 comes once in ten million.
        assert!(counts.iter().all(|count| *count < 45), "{counts:?}");
        assert!(
            firsts.iter().all(|count| (900..1_250).contains(count)),
            "{firsts:?}"
        );
        assert!(
            same < 100,
            "{same} of 16,000 keys have one set for two tables"
        );
    }
}
