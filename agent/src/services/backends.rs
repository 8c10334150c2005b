//! Backends: each has one number, however many Services it serves.

use std::collections::VecDeque;
use std::hash::BuildHasher;
use std::net::IpAddr;
use std::time::Instant;

use hashbrown::{DefaultHashBuilder, HashTable};
use xebec_dataplane_common::ip::Ip;
use xebec_dataplane_common::service::{Backend, ENDING, ON_THIS_NODE};

use super::extents::REST;

/// What makes a backend.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Target {
    pub ip: Ip,
    /// In the machine's order.
    pub port: u16,
    pub protocol: u8,
}

impl Target {
    /// Address and port as text.
    pub fn text(&self) -> String {
        std::net::SocketAddr::new(IpAddr::from(self.ip), self.port).to_string()
    }
}

/// What a port of a Service says of a backend.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct State {
    /// It is on this node.
    pub local: bool,
    /// It gets nothing new.
    pub ending: bool,
}

/// Of [`Held::holders`]: the backend is on this node.
const HERE: u32 = 1 << 31;
/// The backend gets nothing new.
const ENDS: u32 = 1 << 30;

struct Held {
    target: Target,
    generation: u32,
    /// How many ports of Services have it; with none, it is not there. [`HERE`] and [`ENDS`] besides.
    holders: u32,
}

impl Held {
    /// Takes what is said of it; whether that is news. Who says that it is here is believed. Whether it ends, all say
    /// alike, if not at the same moment: the last one is believed.
    fn is_now(&mut self, state: State) -> bool {
        let before = self.holders;
        if state.local {
            self.holders |= HERE;
        }
        self.holders &= !ENDS;
        if state.ending {
            self.holders |= ENDS;
        }
        self.holders != before
    }
}

/// All backends by number.
#[derive(Default)]
pub struct Backends {
    hasher: DefaultHashBuilder,
    numbers: HashTable<u32>,
    /// Number 0 is nobody's.
    held: Vec<Held>,
    /// Numbers that can be given again, and since when they are free.
    resting: VecDeque<(Instant, u32)>,
    free: Vec<u32>,
    capacity: u32,
    /// What has to be written.
    changed: Vec<u32>,
    /// Who went since this was last asked for.
    gone: Vec<Target>,
    /// Who left a port, by that one's number, and is still another's.
    parted: Vec<(u32, u32, Target)>,
}

impl Backends {
    /// Room for so many entries, of which the first stays empty.
    pub fn new(capacity: u32) -> Self {
        let mut new = Self::default();
        new.grow(capacity);
        new.held.push(Held {
            target: Target {
                ip: Ip::NONE,
                port: 0,
                protocol: 0,
            },
            generation: 0,
            holders: 0,
        });
        new
    }

    /// More room than before.
    pub fn grow(&mut self, capacity: u32) {
        self.capacity = self.capacity.max(capacity);
    }

    /// How many there are.
    pub fn used(&self) -> u32 {
        self.numbers.len() as u32
    }

    /// How many more can be taken at once.
    pub fn room(&self) -> u32 {
        let fresh = self.capacity.saturating_sub(self.held.len() as u32);
        fresh + self.free.len() as u32
    }

    /// The number of a backend that is there.
    pub fn find(&self, target: &Target) -> Option<u32> {
        let is = |number: &u32| self.held[*number as usize].target == *target;
        self.numbers.find(self.hasher.hash_one(target), is).copied()
    }

    /// The number of a backend, held once more. None when there is no room.
    pub fn hold(&mut self, target: Target, state: State) -> Option<u32> {
        if let Some(number) = self.find(&target) {
            self.held[number as usize].holders += 1;
            self.set_state(number, state);
            return Some(number);
        }
        let flag = |set, flag| if set { flag } else { 0 };
        let holders = 1 | flag(state.local, HERE) | flag(state.ending, ENDS);
        let number = match self.free.pop() {
            Some(number) => {
                let held = &mut self.held[number as usize];
                // Even while nobody has it; odd again from here on.
                held.generation = held.generation.wrapping_add(1);
                (held.target, held.holders) = (target, holders);
                number
            }
            None if (self.held.len() as u32) < self.capacity => {
                if self.held.len() == self.held.capacity() {
                    self.held.reserve_exact(self.held.len() / 4 + 16);
                }
                self.held.push(Held {
                    target,
                    generation: 1,
                    holders,
                });
                self.held.len() as u32 - 1
            }
            None => return None,
        };
        let (held, hasher) = (&self.held, &self.hasher);
        let rehash = |number: &u32| hasher.hash_one(held[*number as usize].target);
        self.numbers
            .insert_unique(hasher.hash_one(target), number, rehash);
        self.changed.push(number);
        Some(number)
    }

    /// What a port says of a backend that it holds.
    pub fn set_state(&mut self, number: u32, state: State) {
        if self.held[number as usize].is_now(state) {
            self.changed.push(number);
        }
    }

    /// Lets go of a backend once; with its last holder it is gone, and its flows choose anew.
    pub fn release(&mut self, number: u32, now: Instant) {
        let held = &mut self.held[number as usize];
        held.holders -= 1;
        if held.holders & !(HERE | ENDS) > 0 {
            return;
        }
        held.generation = held.generation.wrapping_add(1);
        held.holders = 0;
        let hash = self.hasher.hash_one(held.target);
        if let Ok(entry) = self.numbers.find_entry(hash, |other| *other == number) {
            entry.remove();
        }
        let target = held.target;
        self.gone.push(target);
        self.changed.push(number);
        self.resting.push_back((now, number));
    }

    /// Takes one [`Self::hold`] back. Who was there for nobody else was never named: the number can be given at once.
    pub fn undo(&mut self, number: u32, now: Instant) {
        let (rested, gone) = (self.resting.len(), self.gone.len());
        self.release(number, now);
        if self.resting.len() > rested {
            self.resting.pop_back();
            self.gone.truncate(gone);
            self.free.push(number);
        }
    }

    /// Who went since this was last asked for, and did not come back.
    pub fn take_gone(&mut self) -> Vec<Target> {
        let mut gone = std::mem::take(&mut self.gone);
        gone.retain(|target| self.find(target).is_none());
        gone
    }

    /// Notes that a port lets go of a backend, if others have it: the backend itself is as it was then.
    pub fn part(&mut self, port: u32, number: u32) {
        let held = &self.held[number as usize];
        if held.holders & !(HERE | ENDS) > 0 {
            self.parted.push((port, number, held.target));
        }
    }

    /// Who left a port and stayed another's since this was last asked for.
    pub fn take_parted(&mut self) -> Vec<(u32, u32, Target)> {
        std::mem::take(&mut self.parted)
    }

    /// Numbers that have rested can be given again; whether there were any.
    pub fn wake(&mut self, now: Instant) -> bool {
        let before = self.free.len();
        while let Some(&(since, number)) = self.resting.front() {
            if now.saturating_duration_since(since) < REST {
                break;
            }
            self.resting.pop_front();
            self.free.push(number);
        }
        self.free.len() > before
    }

    /// Whether any number rests.
    pub fn rests(&self) -> bool {
        !self.resting.is_empty()
    }

    /// The entry as the kernel has it.
    pub fn entry(&self, number: u32) -> Backend {
        let held = &self.held[number as usize];
        let flag = |bit, flag| if held.holders & bit != 0 { flag } else { 0 };
        let flags = flag(HERE, ON_THIS_NODE) | flag(ENDS, ENDING);
        Backend {
            address: held.target.ip,
            port: held.target.port.to_be(),
            // The protocol is for who reads the map: an agent after this one, a person.
            flags: flags | u16::from(held.target.protocol) << 8,
            generation: held.generation,
        }
    }

    /// All entries as the kernel has them, or is about to.
    pub fn all(&self) -> impl Iterator<Item = (u32, Backend)> + use<'_> {
        (1..self.held.len() as u32).map(|number| (number, self.entry(number)))
    }

    /// How many numbers rest.
    pub fn resting(&self) -> u32 {
        self.resting.len() as u32
    }

    /// Numbers whose entries have to be written; each is named once.
    pub fn take_changed(&mut self) -> Vec<u32> {
        let mut changed = std::mem::take(&mut self.changed);
        changed.sort_unstable();
        changed.dedup();
        changed
    }

    /// These could not be written.
    pub fn change_again(&mut self, mut numbers: Vec<u32>) {
        self.changed.append(&mut numbers);
    }

    /// All entries have to be written.
    pub fn change_all(&mut self) {
        self.changed = (1..self.held.len() as u32).collect();
    }

    /// Takes up where an agent before this one left off: its flows know backends by number and generation. The
    /// backends are held once, until [`Self::let_go_of_adopted`].
    pub fn adopt(&mut self, entries: impl Iterator<Item = Backend>) -> Vec<u32> {
        let mut adopted = Vec::new();
        let mut unused = Vec::new();
        let mut entries: Vec<Backend> = entries.take(self.capacity as usize).collect();
        let used = entries.iter().rposition(|entry| entry.generation != 0);
        entries.truncate(used.map_or(0, |last| last + 1));
        for entry in entries.into_iter().skip(1) {
            let number = self.held.len() as u32;
            let there = entry.generation & 1 == 1;
            let protocol = (entry.flags >> 8) as u8;
            let target = Target {
                ip: entry.address,
                port: u16::from_be(entry.port),
                protocol,
            };
            let known = there && protocol != 0 && self.find(&target).is_none();
            let ends = if entry.flags & ENDING != 0 { ENDS } else { 0 };
            // Who can't be told apart from another is gone.
            let generation = entry.generation.wrapping_add(u32::from(there && !known));
            self.held.push(Held {
                target,
                generation,
                holders: match entry.flags & ON_THIS_NODE {
                    _ if !known => 0,
                    0 => 1 | ends,
                    _ => 1 | HERE | ends,
                },
            });
            if known {
                let (held, hasher) = (&self.held, &self.hasher);
                let rehash = |number: &u32| hasher.hash_one(held[*number as usize].target);
                self.numbers
                    .insert_unique(hasher.hash_one(target), number, rehash);
                adopted.push(number);
                self.changed.push(number);
            } else {
                unused.push(number);
            }
        }
        self.free.extend(unused.into_iter().rev());
        adopted
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn target(number: u8) -> Target {
        Target {
            ip: std::net::Ipv4Addr::new(10, 0, 0, number).into(),
            port: 80,
            protocol: 6,
        }
    }

    #[test]
    fn one_number_for_all_and_generations_that_only_rise() {
        let now = Instant::now();
        let mut backends = Backends::new(3);
        let [here, there] = [true, false].map(|local| State {
            local,
            ..State::default()
        });
        let one = backends.hold(target(1), there).unwrap();
        assert_eq!(backends.hold(target(1), there), Some(one));
        let two = backends.hold(target(2), here).unwrap();
        assert_eq!(backends.hold(target(3), there), None);
        assert_eq!(backends.take_changed(), [one, two]);
        assert_eq!(
            (backends.entry(one).generation, backends.entry(two).flags),
            (1, ON_THIS_NODE | 6 << 8)
        );
        backends.release(one, now);
        assert!(backends.take_changed().is_empty());
        backends.release(one, now);
        assert_eq!(backends.take_changed(), [one]);
        assert_eq!(backends.entry(one).generation, 2);
        // Its number rests before another gets it, under another generation.
        assert!(!backends.wake(now) && backends.hold(target(3), there).is_none());
        assert!(backends.wake(now + REST));
        assert_eq!(backends.hold(target(3), there), Some(one));
        assert_eq!(backends.entry(one).generation, 3);
        assert_eq!((backends.used(), backends.room()), (2, 0));
        // One that ends, and stays after all.
        backends.take_changed();
        let ends = State {
            local: false,
            ending: true,
        };
        for (state, flags) in [(ends, ON_THIS_NODE | ENDING), (there, ON_THIS_NODE)] {
            backends.set_state(two, state);
            backends.set_state(two, state);
            assert_eq!(backends.take_changed(), [two]);
            assert_eq!(backends.entry(two).flags, flags | 6 << 8);
        }
        backends.set_state(two, ends);
        backends.release(two, now);
        assert_eq!(backends.entry(two).flags & ENDING, 0);
    }
}
