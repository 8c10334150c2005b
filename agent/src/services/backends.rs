//! Backends: each has one number, however many Services it serves.

use std::collections::VecDeque;
use std::hash::BuildHasher;
use std::net::IpAddr;
use std::time::Instant;

use hashbrown::{DefaultHashBuilder, HashTable};
use xebec_dataplane_common::ip::Ip;
use xebec_dataplane_common::service::{Backend, ENDING, ON_THIS_NODE};

use super::extents::REST;
use super::pages::Pages;
use super::pool::Slab;

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

/// Of [`Held::traits`]: the backend is on this node.
const HERE: u8 = 1;
/// The backend gets nothing new.
const ENDS: u8 = 1 << 1;
/// Its address is of IPv6.
const SIX: u8 = 1 << 2;

/// A backend. There are many, and nearly all have addresses of IPv4: others' lie apart.
struct Held {
    /// The address, or the number of one of IPv6.
    address: u32,
    port: u16,
    protocol: u8,
    /// [`HERE`] and the others.
    traits: u8,
    generation: u32,
    /// How many ports of Services have it; with none, it is not there.
    holders: u32,
}

impl Held {
    /// Takes what is said of it; whether that is news. Who says that it is here is believed. Whether it ends, all say
    /// alike, if not at the same moment: the last one is believed.
    fn is_now(&mut self, state: State) -> bool {
        let before = self.traits;
        self.traits = (before & !ENDS) | state.traits();
        self.traits != before
    }

    fn target(&self, six: &Slab<Ip>) -> Target {
        let ip = if self.traits & SIX == 0 {
            Ip::v4(self.address)
        } else {
            six.get(self.address).copied().unwrap_or_default()
        };
        Target {
            ip,
            port: self.port,
            protocol: self.protocol,
        }
    }
}

impl State {
    /// [`HERE`] and [`ENDS`].
    fn traits(self) -> u8 {
        (u8::from(self.local) * HERE) | (u8::from(self.ending) * ENDS)
    }
}

/// All backends by number.
#[derive(Default)]
pub struct Backends {
    hasher: DefaultHashBuilder,
    numbers: HashTable<u32>,
    /// Number 0 is nobody's.
    held: Pages<Held>,
    /// Addresses of IPv6.
    six: Slab<Ip>,
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
        let nobody = Target {
            ip: Ip::NONE,
            port: 0,
            protocol: 0,
        };
        new.push(nobody, 0, 0, 0);
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
        let fresh = self.capacity.saturating_sub(self.held.len());
        fresh + self.free.len() as u32
    }

    /// The number of a backend that is there.
    pub fn find(&self, target: &Target) -> Option<u32> {
        let is = |number: &u32| self.target(*number) == *target;
        self.numbers.find(self.hasher.hash_one(target), is).copied()
    }

    /// Who a number stands for, or did last.
    fn target(&self, number: u32) -> Target {
        self.held[number].target(&self.six)
    }

    /// A backend as it is kept.
    fn keep(&mut self, target: Target, traits: u8, generation: u32, holders: u32) -> Held {
        let (address, family) = if target.ip.is_v4() {
            (target.ip.as_v4(), 0)
        } else {
            (self.six.insert(target.ip), SIX)
        };
        Held {
            address,
            port: target.port,
            protocol: target.protocol,
            traits: traits | family,
            generation,
            holders,
        }
    }

    /// Adds a number.
    fn push(&mut self, target: Target, traits: u8, generation: u32, holders: u32) -> u32 {
        let held = self.keep(target, traits, generation, holders);
        self.held.push(held)
    }

    /// Holds a backend that is there once more.
    pub fn hold(&mut self, number: u32, state: State) {
        self.held[number].holders += 1;
        self.set_state(number, state);
    }

    /// The number of a backend that was not there, held once. None when there is no room.
    pub fn add(&mut self, target: Target, state: State) -> Option<u32> {
        let number = match self.free.pop() {
            Some(number) => {
                let before = &self.held[number];
                if before.traits & SIX != 0 {
                    self.six.remove(before.address);
                }
                // Even while nobody has it; odd again from here on.
                let generation = before.generation.wrapping_add(1);
                self.held[number] = self.keep(target, state.traits(), generation, 1);
                number
            }
            None if self.held.len() < self.capacity => self.push(target, state.traits(), 1, 1),
            None => return None,
        };
        self.enter(number, &target);
        self.changed.push(number);
        Some(number)
    }

    /// Lets a backend be found.
    fn enter(&mut self, number: u32, target: &Target) {
        let (held, six, hasher) = (&self.held, &self.six, &self.hasher);
        let rehash = |number: &u32| hasher.hash_one(held[*number].target(six));
        self.numbers
            .insert_unique(hasher.hash_one(target), number, rehash);
    }

    /// What a port says of a backend that it holds.
    pub fn set_state(&mut self, number: u32, state: State) {
        if self.held[number].is_now(state) {
            self.changed.push(number);
        }
    }

    /// Lets go of a backend once; with its last holder it is gone, and its flows choose anew.
    pub fn release(&mut self, number: u32, now: Instant) {
        let held = &mut self.held[number];
        held.holders -= 1;
        if held.holders > 0 {
            return;
        }
        held.generation = held.generation.wrapping_add(1);
        held.traits &= SIX;
        let target = self.target(number);
        let hash = self.hasher.hash_one(target);
        if let Ok(entry) = self.numbers.find_entry(hash, |other| *other == number) {
            entry.remove();
        }
        self.gone.push(target);
        self.changed.push(number);
        self.resting.push_back((now, number));
    }

    /// Takes one [`Self::hold`] or [`Self::add`] back. Who was there for nobody else was never named: the number can be given at once.
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
        if self.held[number].holders > 0 {
            self.parted.push((port, number, self.target(number)));
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
        let (held, target) = (&self.held[number], self.target(number));
        let flag = |bit, flag| if held.traits & bit != 0 { flag } else { 0 };
        let flags = flag(HERE, ON_THIS_NODE) | flag(ENDS, ENDING);
        Backend {
            address: target.ip,
            port: target.port.to_be(),
            // The protocol is for who reads the map: an agent after this one, a person.
            flags: flags | u16::from(target.protocol) << 8,
            generation: held.generation,
        }
    }

    /// All entries as the kernel has them, or is about to.
    pub fn all(&self) -> impl Iterator<Item = (u32, Backend)> + use<'_> {
        (1..self.held.len()).map(|number| (number, self.entry(number)))
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
        self.changed = (1..self.held.len()).collect();
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
            let there = entry.generation & 1 == 1;
            let protocol = (entry.flags >> 8) as u8;
            let target = Target {
                ip: entry.address,
                port: u16::from_be(entry.port),
                protocol,
            };
            let known = there && protocol != 0 && self.find(&target).is_none();
            let state = State {
                local: known && entry.flags & ON_THIS_NODE != 0,
                ending: known && entry.flags & ENDING != 0,
            };
            // Who can't be told apart from another is gone.
            let generation = entry.generation.wrapping_add(u32::from(there && !known));
            let number = self.push(target, state.traits(), generation, u32::from(known));
            if known {
                self.enter(number, &target);
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

    /// The third has an IPv6 address.
    fn target(number: u8) -> Target {
        let ip: IpAddr = match number {
            3 => std::net::Ipv6Addr::LOCALHOST.into(),
            number => std::net::Ipv4Addr::new(10, 0, 0, number).into(),
        };
        Target {
            ip: ip.into(),
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
        let one = backends.add(target(1), there).unwrap();
        backends.hold(one, there);
        assert_eq!(backends.find(&target(1)), Some(one));
        let two = backends.add(target(2), here).unwrap();
        assert_eq!(backends.add(target(3), there), None);
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
        assert!(!backends.wake(now) && backends.add(target(3), there).is_none());
        assert!(backends.wake(now + REST));
        assert_eq!(backends.add(target(3), there), Some(one));
        assert_eq!(backends.entry(one).generation, 3);
        assert_eq!(backends.find(&target(3)), Some(one));
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
        // What has an IPv6 address makes way for what has none.
        assert_eq!(backends.entry(one).address, target(3).ip);
        backends.release(one, now);
        backends.wake(now + REST);
        for number in [4, 5] {
            let again = backends.add(target(number), there).unwrap();
            assert_eq!(backends.find(&target(number)), Some(again));
        }
        // Nobody's is left.
        assert_eq!(backends.six.len(), 1);
    }
}
