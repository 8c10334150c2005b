//! Who has which chunks of the map of slots.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::time::{Duration, Instant};

/// For how long nothing is put where something was: a program that runs while its frontend changes may still read
/// there. Programs run for microseconds.
pub const REST: Duration = Duration::from_millis(20);

/// Chunks side by side, given to whom they fit best.
pub struct Extents {
    /// Length by first chunk, of what is free; no two of them touch.
    free: BTreeMap<u32, u32>,
    /// The same by length.
    by_length: BTreeSet<(u32, u32)>,
    /// What was given back and still rests.
    resting: VecDeque<(Instant, u32, u32)>,
    capacity: u32,
    used: u32,
}

impl Extents {
    /// Room for so many chunks.
    pub fn new(capacity: u32) -> Self {
        let mut new = Self {
            free: BTreeMap::new(),
            by_length: BTreeSet::new(),
            resting: VecDeque::new(),
            capacity: 0,
            used: 0,
        };
        new.grow(capacity);
        new
    }

    /// More room than before.
    pub fn grow(&mut self, capacity: u32) {
        if capacity > self.capacity {
            self.add(self.capacity, capacity - self.capacity);
            self.capacity = capacity;
        }
    }

    /// How many of them are given away, those at rest not counted.
    pub fn used(&self) -> u32 {
        self.used
    }

    fn add(&mut self, mut first: u32, mut length: u32) {
        if let Some((&before, &its)) = self.free.range(..first).next_back() {
            if before + its == first {
                self.take_out(before, its);
                (first, length) = (before, its + length);
            }
        }
        if let Some(&its) = self.free.get(&(first + length)) {
            self.take_out(first + length, its);
            length += its;
        }
        self.free.insert(first, length);
        self.by_length.insert((length, first));
    }

    fn take_out(&mut self, first: u32, length: u32) {
        self.free.remove(&first);
        self.by_length.remove(&(length, first));
    }

    /// Takes so many chunks, if there are that many side by side.
    pub fn take(&mut self, count: u32) -> Option<u32> {
        if count == 0 {
            return Some(0);
        }
        let &(length, first) = self.by_length.range((count, 0)..).next()?;
        self.take_out(first, length);
        if length > count {
            self.free.insert(first + count, length - count);
            self.by_length.insert((length - count, first + count));
        }
        self.used += count;
        Some(first)
    }

    /// Gives chunks back that no frontend names any more; they rest first.
    pub fn give_back(&mut self, first: u32, count: u32, now: Instant) {
        if count > 0 {
            self.used -= count;
            self.resting.push_back((now, first, count));
        }
    }

    /// Gives chunks back that no frontend ever named.
    pub fn undo(&mut self, first: u32, count: u32) {
        if count > 0 {
            self.used -= count;
            self.add(first, count);
        }
    }

    /// What has rested can be taken again; whether there was any.
    pub fn wake(&mut self, now: Instant) -> bool {
        let mut any = false;
        while let Some(&(since, first, count)) = self.resting.front() {
            if now.saturating_duration_since(since) < REST {
                break;
            }
            self.resting.pop_front();
            self.add(first, count);
            any = true;
        }
        any
    }

    /// Whether anything rests.
    pub fn rests(&self) -> bool {
        !self.resting.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rand::rngs::StdRng;
    use rand::{Rng, SeedableRng};

    #[test]
    fn nobody_gets_what_another_has_or_what_rests() {
        let seed = rand::random::<u64>();
        println!("seed {seed}");
        let mut rng = StdRng::seed_from_u64(seed);
        let mut extents = Extents::new(500);
        let mut now = Instant::now();
        // Who has a chunk: nobody, somebody, or it rests until then.
        let mut owned = vec![false; 1000];
        let mut rests: Vec<Option<Instant>> = vec![None; 1000];
        let mut held: Vec<(u32, u32)> = Vec::new();
        for step in 0..20_000 {
            if step == 10_000 {
                extents.grow(1000);
            }
            if rng.random_bool(0.5) || held.is_empty() {
                let count = rng.random_range(1..=20);
                if let Some(first) = extents.take(count) {
                    for at in first..first + count {
                        let at = at as usize;
                        assert!(!std::mem::replace(&mut owned[at], true));
                        if let Some(since) = rests[at] {
                            assert!(now - since >= REST);
                        }
                    }
                    held.push((first, count));
                }
            } else {
                let (first, count) = held.swap_remove(rng.random_range(0..held.len()));
                let unseen = rng.random_bool(0.2);
                for at in first..first + count {
                    owned[at as usize] = false;
                    rests[at as usize] = (!unseen).then_some(now);
                }
                if unseen {
                    extents.undo(first, count);
                } else {
                    extents.give_back(first, count, now);
                }
            }
            now += Duration::from_millis(rng.random_range(0..5));
            extents.wake(now);
            let used = owned.iter().filter(|used| **used).count();
            assert_eq!(extents.used() as usize, used);
        }
        for (first, count) in held {
            extents.give_back(first, count, now);
        }
        assert!(extents.rests() && extents.wake(now + REST) && !extents.rests());
        // All of it lies together again.
        assert_eq!(extents.take(1000), Some(0));
        assert_eq!(extents.take(1), None);
    }
}
