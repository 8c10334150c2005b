//! One port of a Service in one family, as it is in the kernel, and how it becomes what is wanted.

use std::hash::Hasher;

use ipnet::IpNet;
use smallvec::SmallVec;
use xebec_dataplane_common::UDP;
use xebec_dataplane_common::service::{Frontend, FrontendKey, Run};

use super::backends::{State, Target};
use super::claims::Claim;
use super::maglev;
use super::notices::{Notice, Reason};
use super::pool::LOCAL;
use super::select::{READY, SERVING, TERMINATING};
use super::slots::{chunk_count, chunks, fingerprint, slots};
use super::tables::Tables;
use super::view::Algorithm;
use super::wanted::{End, Front, Wanted};
use crate::maps::{Room, ServiceKernel};

/// Flags that no frontend has: it has to be written whatever is wanted.
const UNKNOWN: u32 = u32::MAX;

/// A frontend, and whether it is this unit's.
#[derive(Clone, Copy, Debug)]
pub struct Held {
    pub front: Front,
    /// Another Service has it otherwise.
    pub owned: bool,
}

/// A run that is in the kernel.
#[derive(Clone, Copy, Debug)]
struct Written {
    run: Run,
    /// Tells what stands in it.
    fingerprint: u64,
}

/// One port of a Service in one family.
#[derive(Debug)]
pub struct Unit {
    /// Its number in the kernel.
    pub number: u32,
    affinity: u32,
    port: u16,
    protocol: u8,
    v4: bool,
    pub held: SmallVec<[Held; 1]>,
    /// Numbers of the backends that it holds, in order.
    members: Box<[u32]>,
    runs: SmallVec<[Written; 1]>,
    #[allow(
        clippy::box_collection,
        reason = "nearly all units have none, and there are many"
    )]
    ranges: Option<Box<Vec<IpNet>>>,
}

impl Unit {
    /// Whether it is what this is wanted of.
    pub fn is_of(&self, wanted: &Wanted) -> bool {
        (self.port, self.protocol, self.v4) == (wanted.number, wanted.protocol, wanted.v4)
    }

    /// Its frontends, those among them that another has.
    pub fn keys(&self) -> impl Iterator<Item = FrontendKey> {
        self.held.iter().map(|held| held.front.key)
    }

    /// The runs that take room, each once.
    fn extents(&self) -> impl Iterator<Item = Run> {
        let runs = self.runs.iter().enumerate();
        let runs = runs.filter(|(at, one)| {
            one.run.count > 0 && !self.runs[..*at].iter().any(|before| before.run == one.run)
        });
        runs.map(|(_, one)| one.run)
    }

    /// All has to be written again, into maps that are empty.
    pub fn forget(&mut self) {
        for held in &mut self.held {
            held.front.flags = UNKNOWN;
        }
        self.runs = SmallVec::new();
        self.ranges = None;
    }
}

/// A stable number for a text: the same after a restart, so that clients keep their backends.
fn stable(text: &str) -> u32 {
    let mut hasher = fnv::FnvHasher::default();
    hasher.write(text.as_bytes());
    let hash = hasher.finish();
    (hash ^ (hash >> 32)) as u32
}

/// What became of a port.
pub(super) struct Applied {
    /// As it is now.
    pub unit: Option<Unit>,
    /// As it was, if it has changed: what it has no more is still to be given back.
    pub before: Option<Unit>,
    /// What lacks for it; then it is as it was.
    pub lack: Room,
}

/// What is to become of an endpoint.
#[derive(Clone, Copy)]
struct Member {
    /// The backend's number, 0 if it is none yet.
    number: u32,
    /// It has to be a backend in the kernel.
    needed: bool,
    /// New flows may go to it.
    chosen: bool,
}

impl<K: ServiceKernel> Tables<K> {
    /// Brings one port in step.
    pub(super) fn apply(&mut self, entry: u32, wanted: &Wanted, known: Option<Unit>) -> Applied {
        let mut lack = Room::default();
        let owned = self.claim_all(entry, wanted, known.as_ref());
        let had = |key: &FrontendKey| {
            let mut held = known.iter().flat_map(|unit| unit.held.iter());
            held.any(|held| held.owned && held.front.key == *key)
        };
        let fresh = wanted.fronts.iter().zip(&owned);
        let fresh = fresh
            .filter(|(front, owned)| **owned && !had(&front.key))
            .count();
        let room = self.room();
        let all = self.claims.len() + self.batch.removals();
        if fresh > 0 && all > room.frontends as usize {
            lack.frontends = fresh as u32;
        }
        let mut members = self.members(wanted, known.as_ref());
        let missing = members.iter().filter(|one| one.needed && one.number == 0);
        let missing = missing.count() as u32;
        if missing > self.backends.room() {
            lack.backends = missing;
        }
        let ranges_before = known.as_ref().and_then(|unit| unit.ranges.as_deref());
        let new_ranges: Vec<IpNet> = wanted
            .ranges
            .iter()
            .filter(|block| ranges_before.is_none_or(|before| !before.contains(block)))
            .copied()
            .collect();
        if self.ranges as usize + new_ranges.len() > room.ranges as usize {
            lack.ranges = new_ranges.len() as u32;
        }
        if lack != Room::default() {
            lack.chunks = self.chunks_for(wanted);
            self.give_up_new(entry, wanted, known.as_ref());
            return self.unchanged(entry, known, lack);
        }
        let all = self.hold_all(wanted, &mut members, known.as_ref());
        let runs = match self.write_runs(wanted, &members, known.as_ref()) {
            Ok(runs) => runs,
            Err(chunks) => {
                lack.chunks = chunks;
                lack.frontends = fresh as u32;
                self.let_go(&all, known.as_ref());
                self.give_up_new(entry, wanted, known.as_ref());
                return self.unchanged(entry, known, lack);
            }
        };
        let number = match &known {
            Some(unit) => unit.number,
            None => self.number(entry, wanted),
        };
        let unit = Unit {
            number,
            affinity: wanted.affinity,
            port: wanted.number,
            protocol: wanted.protocol,
            v4: wanted.v4,
            held: wanted
                .fronts
                .iter()
                .zip(&owned)
                .map(|(front, owned)| Held {
                    front: *front,
                    owned: *owned,
                })
                .collect(),
            members: all.into(),
            runs,
            ranges: (!wanted.ranges.is_empty()).then(|| Box::new(wanted.ranges.clone())),
        };
        self.ranges += new_ranges.len() as u32;
        let added = new_ranges.into_iter().map(|block| ((number, block), true));
        self.batch.ranges.extend(added);
        self.write_fronts(entry, &unit, known.as_ref());
        Applied {
            unit: Some(unit),
            before: known,
            lack,
        }
    }

    /// The port stays as it is, but for frontends that another has by now.
    fn unchanged(&mut self, entry: u32, mut known: Option<Unit>, lack: Room) -> Applied {
        let held = known.iter_mut().flat_map(|unit| &mut unit.held);
        for held in held.filter(|held| held.owned) {
            if self.claims.owner(&held.front.key) != Some(entry) {
                held.owned = false;
                self.take_out(entry, &held.front.key);
            }
        }
        Applied {
            unit: known,
            before: None,
            lack,
        }
    }

    /// Removes a port; `kept` are frontends that the Service's other ports have by now.
    pub(super) fn retire(&mut self, entry: u32, unit: Unit, kept: &[FrontendKey]) {
        for held in unit
            .held
            .iter()
            .filter(|held| !kept.contains(&held.front.key))
        {
            self.give_up(entry, &held.front.key);
        }
        self.batch.released.extend(&unit.members);
        self.batch.freed.extend(unit.extents());
        for block in unit.ranges.into_iter().flat_map(|all| *all) {
            self.ranges -= 1;
            self.batch.ranges.insert((unit.number, block), false);
        }
        self.numbers.remove(unit.number);
    }

    /// Asks for all frontends; which of them are ours.
    fn claim_all(&mut self, entry: u32, wanted: &Wanted, known: Option<&Unit>) -> Vec<bool> {
        let mut owned = Vec::with_capacity(wanted.fronts.len());
        for front in &wanted.fronts {
            let before = |a: u32, b: u32| Self::before(&self.entries, a, b);
            let winner = match self.claims.claim(front.key, entry, before) {
                Claim::Own => None,
                Claim::From(other) => {
                    self.mark(other);
                    None
                }
                Claim::Lost(winner) => Some(winner),
            };
            owned.push(winner.is_none());
            let mut known = known.iter().flat_map(|unit| unit.held.iter());
            let told = known.any(|held| held.front.key == front.key && !held.owned);
            let ours = self.entries.get(entry);
            if let (Some(winner), Some(ours), false) = (winner, ours, told) {
                let other = self.entries.get(winner).map_or("another", |one| &*one.name);
                let words = format!(
                    "{} {} belongs to {other}, which was there before; it is not served for this one",
                    front.kind.name(),
                    super::rows::frontend_text(&front.key)
                );
                let notice = Notice::new(&ours.name, ours.service(), Reason::PortConflict, words);
                self.notices.push(notice);
            }
        }
        owned
    }

    /// Gives up what was asked for in vain: what is not in the kernel for this unit.
    fn give_up_new(&mut self, entry: u32, wanted: &Wanted, known: Option<&Unit>) {
        for front in &wanted.fronts {
            let mut held = known.iter().flat_map(|unit| unit.held.iter());
            if !held.any(|held| held.front.key == front.key) {
                let before = |a: u32, b: u32| Self::before(&self.entries, a, b);
                if let Some(next) = self.claims.give_up(&front.key, entry, before) {
                    self.mark(next);
                }
            }
        }
    }

    /// Gives a frontend up that is, or was, in the kernel.
    fn give_up(&mut self, entry: u32, key: &FrontendKey) {
        self.take_out(entry, key);
        let before = |a: u32, b: u32| Self::before(&self.entries, a, b);
        if let Some(next) = self.claims.give_up(key, entry, before) {
            self.mark(next);
        }
    }

    /// Removes a frontend from the kernel unless another has put it there since.
    fn take_out(&mut self, entry: u32, key: &FrontendKey) {
        if self.claims.unwrite(key, entry) {
            self.batch.set_front(*key, None);
        }
    }

    /// What each endpoint, in their order, is to the kernel: its number there, and whether it has to be a backend: those
    /// that new flows may go to are chosen, and those whose flows go on are needed: whoever ends, and who was a backend
    /// and is still there. Without a connection, only who answers keeps it.
    fn members(&self, wanted: &Wanted, known: Option<&Unit>) -> Vec<Member> {
        let lasts = |end: &End| wanted.protocol != UDP || end.traits & SERVING != 0;
        let ends = wanted.ends.iter();
        let mut members: Vec<Member> = ends
            .map(|end| Member {
                number: self.backends.find(&target(end, wanted)).unwrap_or(0),
                needed: end.traits & TERMINATING != 0 && lasts(end),
                chosen: false,
            })
            .collect();
        for (index, _) in wanted.runs.iter().flat_map(|run| &run.members) {
            let member = &mut members[*index as usize];
            (member.needed, member.chosen) = (true, true);
        }
        if let Some(known) = known {
            let idle = members.iter_mut().zip(&wanted.ends);
            for (member, end) in idle.filter(|(member, _)| !member.needed) {
                member.needed = lasts(end) && known.members.binary_search(&member.number).is_ok();
            }
        }
        members
    }

    /// Holds all backends that are needed and not held yet; there is room for them. Their numbers, in order.
    fn hold_all(
        &mut self,
        wanted: &Wanted,
        members: &mut [Member],
        known: Option<&Unit>,
    ) -> Vec<u32> {
        let held = known.map_or(&[][..], |unit| &unit.members);
        let needed = || members.iter().filter(|member| member.needed);
        let mut all = Vec::with_capacity(needed().count());
        for (member, end) in members.iter_mut().zip(&wanted.ends) {
            if !member.needed {
                continue;
            }
            let state = State {
                local: end.traits & LOCAL != 0,
                // Where no other is left it gets what is new, too, and clients stay with it.
                ending: end.traits & READY == 0 && !member.chosen,
            };
            if member.number == 0 {
                match self.backends.add(target(end, wanted), state) {
                    Some(number) => member.number = number,
                    None => continue,
                }
            } else if held.binary_search(&member.number).is_ok() {
                self.backends.set_state(member.number, state);
            } else {
                self.backends.hold(member.number, state);
            }
            all.push(member.number);
        }
        all.sort_unstable();
        all
    }

    /// Undoes [`Self::hold_all`].
    fn let_go(&mut self, members: &[u32], known: Option<&Unit>) {
        let held = known.map_or(&[][..], |unit| &unit.members);
        let new = members
            .iter()
            .filter(|number| held.binary_search(number).is_err());
        // The moment does not matter: they do not rest.
        let now = std::time::Instant::now();
        new.for_each(|number| self.backends.undo(*number, now));
    }

    /// How many chunks all runs need.
    pub(super) fn chunks_for(&self, wanted: &Wanted) -> u32 {
        let runs = wanted.runs.iter().map(|run| match run.algorithm {
            Algorithm::Maglev => chunk_count(maglev::size(run.members.len()) as usize),
            Algorithm::Random => chunk_count(run.members.len()),
        });
        runs.sum()
    }

    /// Puts runs that are new into the kernel, or tells how many chunks they would need.
    fn write_runs(
        &mut self,
        wanted: &Wanted,
        members: &[Member],
        known: Option<&Unit>,
    ) -> Result<SmallVec<[Written; 1]>, u32> {
        let mut runs = SmallVec::<[Written; 1]>::with_capacity(wanted.runs.len());
        let (mut new, begun) = (Vec::new(), self.batch.chunks.len());
        let written = known.map_or(&[][..], |unit| &unit.runs);
        for run in &wanted.runs {
            let numbers = run.members.iter();
            let numbers = numbers.map(|(index, _)| members[*index as usize].number);
            let weights = run.members.iter().map(|(_, weight)| *weight);
            let stands = numbers.clone().zip(weights);
            let fingerprint = fingerprint(&self.hasher, run.algorithm, stands);
            let mut there = runs.iter().chain(written);
            if let Some(same) = there.find(|one: &&Written| one.fingerprint == fingerprint) {
                let same = *same;
                runs.push(same);
                continue;
            }
            let slots = slots(run, numbers.collect(), || wanted.candidates(run));
            let count = chunk_count(slots.len());
            let Some(first) = self.extents.take(count) else {
                for (first, count) in new {
                    self.extents.undo(first, count);
                }
                self.batch.chunks.truncate(begun);
                return Err(self.chunks_for(wanted).max(count));
            };
            new.push((first, count));
            self.batch.chunks.extend((first..).zip(chunks(&slots)));
            let run = Run {
                first,
                count: slots.len() as u32,
            };
            runs.push(Written { run, fingerprint });
        }
        Ok(runs)
    }

    /// Has frontends written that are new or changed.
    fn write_fronts(&mut self, entry: u32, unit: &Unit, known: Option<&Unit>) {
        for held in unit.held.iter().filter(|held| held.owned) {
            let value = unit.value(&held.front);
            let same = known.is_some_and(|before| {
                let mut those = before.held.iter();
                those.any(|one| {
                    let same = one.owned && one.front.key == held.front.key;
                    same && one.front.flags != UNKNOWN && before.value(&one.front) == value
                })
            });
            if !same || !self.claims.wrote(&held.front.key, entry) {
                self.claims.write(&held.front.key, entry);
                self.batch.set_front(held.front.key, Some(value));
            }
        }
    }

    /// Gives back what a port has no more.
    pub(super) fn leave_behind(
        &mut self,
        entry: u32,
        before: Unit,
        now: &Unit,
        kept: &[FrontendKey],
    ) {
        for old in &before.held {
            match now.held.iter().find(|held| held.front.key == old.front.key) {
                None if kept.contains(&old.front.key) => {}
                None => self.give_up(entry, &old.front.key),
                // Another has it from here on.
                Some(held) if old.owned && !held.owned => self.take_out(entry, &old.front.key),
                Some(_) => {}
            }
        }
        let gone = before.members.iter();
        let gone = gone.filter(|number| now.members.binary_search(number).is_err());
        for number in gone {
            self.batch.released.push(*number);
            if now.protocol == UDP {
                self.batch.parted.push((now.number, *number));
            }
        }
        let used: Vec<Run> = now.extents().collect();
        let gone = before.extents().filter(|run| !used.contains(run));
        self.batch.freed.extend(gone);
        for block in before.ranges.into_iter().flat_map(|all| *all) {
            if now.ranges.as_ref().is_none_or(|all| !all.contains(&block)) {
                self.ranges -= 1;
                self.batch.ranges.insert((now.number, block), false);
            }
        }
    }

    /// A number for a new port.
    fn number(&mut self, entry: u32, wanted: &Wanted) -> u32 {
        let name = self.entries.get(entry).map(|entry| entry.name.clone());
        let name = name.unwrap_or_default();
        let family = if wanted.v4 { 4 } else { 6 };
        let text = format!("{name} {}/{} {family}", wanted.number, wanted.protocol);
        let mut number = stable(&text).max(1);
        while !self.numbers.add(number, &name) {
            number = number.wrapping_add(1).max(1);
        }
        number
    }
}

impl Unit {
    /// A frontend as the kernel has it.
    fn value(&self, front: &Front) -> Frontend {
        let run = |index: u8| {
            self.runs
                .get(usize::from(index))
                .map_or_else(Run::default, |one| one.run)
        };
        Frontend {
            service: self.number,
            flags: front.flags,
            affinity: self.affinity,
            inside: run(front.inside),
            outside: run(front.outside),
        }
    }
}

/// The backend that an endpoint is.
pub(super) fn target(end: &End, wanted: &Wanted) -> Target {
    Target {
        ip: end.ip,
        port: end.port,
        protocol: wanted.protocol,
    }
}
