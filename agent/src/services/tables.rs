//! The API's Services and endpoints, and what of them is in the kernel. Work is proportional to what changed.

use std::collections::BTreeMap;
use std::hash::BuildHasher;
use std::net::IpAddr;
use std::sync::Arc;
use std::time::Instant;

use anyhow::Result;
use hashbrown::{DefaultHashBuilder, HashMap, HashSet, HashTable};
use tracing::warn;
use xebec_dataplane_common::service::Backend;

use super::backends::{Backends, Target};
use super::batch::Batch;
use super::claims::Claims;
use super::extents::Extents;
use super::names::ServiceNames;
use super::notices::{Notice, Reason};
use super::objects::{EndpointSlice, Service};
use super::pool::{LOCAL, Places, Slab, Texts};
use super::select::READY;
use super::unit::{Unit, target};
use super::view::{ServiceView, SliceView, full_name, service_name, triggered};
use super::wanted::{Wanted, of_host_port, of_service};
use crate::announce::Announced;
use crate::host_ports::HostPort;
use crate::maps::{Room, ServiceKernel};

/// Changes that are written at once at most, so that a full listing needs no memory for all of it.
const AT_ONCE: usize = 32_768;

/// Who asks for frontends.
pub enum Source {
    /// Nobody: slices whose Service is not there.
    Nobody,
    Service(Box<ServiceView>),
    HostPort(Box<HostPort>),
}

/// A Service with its slices, or a host port, and what of it is in the kernel.
pub struct Entry {
    /// Namespace and name.
    pub name: Arc<str>,
    pub source: Source,
    /// By the hash of their names.
    pub slices: Vec<(u64, SliceView)>,
    pub units: Vec<Unit>,
    dirty: bool,
    /// It does not fit.
    pub full: bool,
    /// It was told of that it does not fit.
    told: bool,
    /// Port and number of endpoints that health checks are answered with; port 0 for none.
    health: (u16, u32),
}

impl Entry {
    fn new(name: &str, source: Source) -> Self {
        Self {
            name: name.into(),
            source,
            slices: Vec::new(),
            units: Vec::new(),
            dirty: false,
            full: false,
            told: false,
            health: (0, 0),
        }
    }

    /// What it asks for now.
    pub fn wanted(&self, places: &Places) -> Vec<Wanted> {
        match &self.source {
            Source::Nobody => Vec::new(),
            Source::Service(view) => {
                of_service(view, self.slices.iter().map(|(_, slice)| slice), places)
            }
            Source::HostPort(port) => of_host_port(port),
        }
    }

    pub fn service(&self) -> Option<&ServiceView> {
        match &self.source {
            Source::Service(view) => Some(view),
            _ => None,
        }
    }

    /// Who is the first to have a frontend that several ask for: the oldest Service, then by name; then host ports.
    fn priority(&self) -> (i64, bool, &str) {
        let created = self.service().map_or(i64::MAX, |view| view.created);
        (created, self.service().is_none(), &self.name)
    }
}

/// The port for health checks of a Service, and how many endpoints this node has; none when it is to be closed.
pub type HealthChange = (Arc<str>, Option<(u16, u32)>);

/// What the API told, and what of it is in the kernel.
pub struct Tables<K> {
    pub(super) kernel: K,
    pub(super) hasher: DefaultHashBuilder,
    texts: Texts,
    pub(super) places: Places,
    pub(super) entries: Slab<Entry>,
    /// Entries of Services by name.
    names: HashTable<u32>,
    /// Entries by the hash of a slice's name.
    slices: HashMap<u64, u32>,
    host_ports: BTreeMap<HostPort, u32>,
    pub(super) node_addresses: BTreeMap<IpAddr, u8>,
    pub(super) claims: Claims,
    /// Numbers of Services' ports, and whose they are.
    pub(super) numbers: ServiceNames,
    pub(super) backends: Backends,
    pub(super) extents: Extents,
    /// How many blocks of sources are in the kernel.
    pub(super) ranges: u32,
    pub(super) dirty: Vec<u32>,
    /// What those lack that do not fit.
    pub(super) lacking: BTreeMap<u32, Room>,
    pub(super) batch: Batch,
    pub(super) notices: Vec<Notice>,
    health: Vec<HealthChange>,
    /// Load balancers' addresses by Service, and whether this node may serve them.
    announced: BTreeMap<Arc<str>, (Vec<IpAddr>, bool)>,
    announced_changed: bool,
    /// Backends of an agent before this one that no Service has claimed yet.
    adopted: Vec<u32>,
    /// When what is not yet in the kernel happened, in seconds of Unix time.
    triggers: Vec<f64>,
    /// When this was made, in the same seconds: what happened before is not this agent's delay.
    began: f64,
    /// Changes of Services that were told so far.
    pub service_changes: u64,
    /// Changes of EndpointSlices that were told so far.
    pub endpoint_changes: u64,
    /// A write failed: everything has to be written again.
    broken: bool,
    /// Larger maps come for what does not fit, unless somebody says that they do not.
    grows: bool,
}

fn unix_now() -> f64 {
    std::time::SystemTime::now()
        .duration_since(std::time::UNIX_EPOCH)
        .map_or(0.0, |since| since.as_secs_f64())
}

impl<K: ServiceKernel> Tables<K> {
    /// Empty tables of a node. `before` is the map of backends of an agent before this one, whose flows go on.
    pub fn new(kernel: K, node: &str, before: Vec<Backend>) -> Self {
        let room = kernel.room();
        let mut backends = Backends::new(room.backends);
        let adopted = backends.adopt(before.into_iter());
        Self {
            kernel,
            hasher: DefaultHashBuilder::default(),
            texts: Texts::default(),
            places: Places::new(node),
            entries: Slab::default(),
            names: HashTable::new(),
            slices: HashMap::new(),
            host_ports: BTreeMap::new(),
            node_addresses: BTreeMap::new(),
            claims: Claims::default(),
            numbers: ServiceNames::default(),
            backends,
            extents: Extents::new(room.chunks),
            ranges: 0,
            dirty: Vec::new(),
            lacking: BTreeMap::new(),
            batch: Batch::default(),
            notices: Vec::new(),
            health: Vec::new(),
            announced: BTreeMap::new(),
            announced_changed: false,
            adopted,
            triggers: Vec::new(),
            began: unix_now(),
            service_changes: 0,
            endpoint_changes: 0,
            broken: false,
            grows: false,
        }
    }

    /// The entry of a name, whose hash this is.
    fn find(&self, name: &str, hash: u64) -> Option<u32> {
        let is = |number: &u32| {
            self.entries
                .get(*number)
                .is_some_and(|one| *one.name == *name)
        };
        self.names.find(hash, is).copied()
    }

    fn find_or_make(&mut self, name: &str, hash: u64) -> u32 {
        self.find(name, hash).unwrap_or_else(|| {
            let number = self.entries.insert(Entry::new(name, Source::Nobody));
            let (hasher, entries) = (&self.hasher, &self.entries);
            let rehash = |number: &u32| {
                hasher.hash_one(entries.get(*number).map_or("", |entry| &*entry.name))
            };
            self.names.insert_unique(hash, number, rehash);
            number
        })
    }

    /// Notes that an entry has to be looked at.
    pub(super) fn mark(&mut self, number: u32) {
        if let Some(entry) = self.entries.get_mut(number) {
            if !std::mem::replace(&mut entry.dirty, true) {
                self.dirty.push(number);
            }
        }
    }

    /// Whether the first goes before the second where both ask for a frontend.
    pub(super) fn before(entries: &Slab<Entry>, first: u32, second: u32) -> bool {
        match (entries.get(first), entries.get(second)) {
            (Some(first), Some(second)) => first.priority() < second.priority(),
            (first, _) => first.is_some(),
        }
    }

    /// The Service is as told; what a listing's names are remembered by, if it is one that matters here.
    pub fn set_service(&mut self, service: &Service) -> Option<u64> {
        let name = full_name(&service.metadata)?;
        let view = ServiceView::new(service, &mut self.texts);
        let Some(view) = view else {
            self.remove_service(&name);
            return None;
        };
        let hash = self.hasher.hash_one(&*name);
        let number = self.find_or_make(&name, hash);
        let entry = self.entries.get_mut(number)?;
        if entry.service() == Some(&view) {
            return Some(hash);
        }
        self.service_changes += 1;
        let before = entry.service();
        // One that was removed and made again is another, though it may still hold what it had.
        let moved = before.is_none_or(|before| before.created != view.created);
        let told = &view.extra().problems;
        if !told.is_empty() && before.is_none_or(|before| before.extra().problems != *told) {
            let words = told.join("; ");
            self.notices.push(Notice::new(
                &name,
                Some(&view),
                Reason::InvalidService,
                words,
            ));
        }
        entry.source = Source::Service(Box::new(view));
        if moved {
            self.reorder(number);
        }
        self.mark(number);
        Some(hash)
    }

    /// Its place among those that ask for the same has changed.
    fn reorder(&mut self, number: u32) {
        let units = self.entries.get(number).map(|entry| &entry.units);
        let keys: Vec<_> = units.into_iter().flatten().flat_map(Unit::keys).collect();
        for key in keys {
            let before = |a: u32, b: u32| Self::before(&self.entries, a, b);
            if let Some((next, last)) = self.claims.reorder(&key, number, before) {
                self.mark(next);
                self.mark(last);
            }
        }
    }

    /// There is no such Service.
    pub fn remove_service(&mut self, name: &str) {
        let Some(number) = self.find(name, self.hasher.hash_one(name)) else {
            return;
        };
        if let Some(entry) = self.entries.get_mut(number) {
            if entry.service().is_some() {
                entry.source = Source::Nobody;
                self.service_changes += 1;
                self.reorder(number);
                self.mark(number);
            }
        }
    }

    /// The slice is as told; what a listing's names are remembered by, if it is one that matters here.
    pub fn set_slice(&mut self, slice: &EndpointSlice) -> Option<u64> {
        let own_name = full_name(&slice.metadata)?;
        let service = service_name(slice);
        let view = service
            .as_ref()
            .and_then(|_| SliceView::new(slice, &mut self.texts, &mut self.places));
        let (Some(service), Some(view)) = (service, view) else {
            self.remove_slice(&own_name);
            return None;
        };
        let key = self.hasher.hash_one(&*own_name);
        let number = self.find_or_make(&service, self.hasher.hash_one(&*service));
        if self.slices.get(&key).is_some_and(|other| *other != number) {
            // It went from one Service to another.
            self.remove_slice(&own_name);
        }
        self.slices.insert(key, number);
        let entry = self.entries.get_mut(number)?;
        let problems = view.problems.clone();
        let at = entry.slices.iter().position(|(other, _)| *other == key);
        let mut known = None;
        match at {
            Some(at) if entry.slices[at].1 == view => {
                view.release(&mut self.places);
                return Some(key);
            }
            Some(at) => {
                let before = std::mem::replace(&mut entry.slices[at].1, view);
                before.release(&mut self.places);
                known = before.problems;
            }
            None => {
                entry.slices.reserve_exact(1);
                entry.slices.push((key, view));
            }
        }
        if let Some(problems) = problems.filter(|problems| Some(problems) != known.as_ref()) {
            let words = format!("EndpointSlice {own_name}: {}", problems.join("; "));
            let notice = Notice::new(&service, entry.service(), Reason::InvalidEndpoints, words);
            self.notices.push(notice);
        }
        self.endpoint_changes += 1;
        self.triggers
            .extend(triggered(slice).filter(|time| *time > self.began));
        self.mark(number);
        Some(key)
    }

    /// There is no such slice.
    pub fn remove_slice(&mut self, name: &str) {
        let key = self.hasher.hash_one(name);
        let Some(number) = self.slices.remove(&key) else {
            return;
        };
        if let Some(entry) = self.entries.get_mut(number) {
            entry.slices.retain(|(other, slice)| {
                if *other == key {
                    slice.release(&mut self.places);
                }
                *other != key
            });
            self.endpoint_changes += 1;
            self.mark(number);
        }
    }

    /// Removes Services that a full listing did not name.
    pub fn keep_services(&mut self, seen: &HashSet<u64>) {
        let gone = |entry: &Entry| {
            entry.service().is_some() && !seen.contains(&self.hasher.hash_one(&*entry.name))
        };
        let entries = self.entries.iter();
        let gone: Vec<Arc<str>> = entries
            .filter(|(_, entry)| gone(entry))
            .map(|(_, entry)| entry.name.clone())
            .collect();
        gone.iter().for_each(|name| self.remove_service(name));
    }

    /// Removes slices that a full listing did not name.
    pub fn keep_slices(&mut self, seen: &HashSet<u64>) {
        let gone: Vec<(u64, u32)> = self
            .slices
            .iter()
            .filter(|(key, _)| !seen.contains(*key))
            .map(|(key, number)| (*key, *number))
            .collect();
        for (key, number) in gone {
            self.slices.remove(&key);
            if let Some(entry) = self.entries.get_mut(number) {
                entry.slices.retain(|(other, slice)| {
                    if *other == key {
                        slice.release(&mut self.places);
                    }
                    *other != key
                });
            }
            self.endpoint_changes += 1;
            self.mark(number);
        }
    }

    /// The host ports of this node's pods are these.
    pub fn set_host_ports(&mut self, ports: &[HostPort]) {
        let gone: Vec<HostPort> = self
            .host_ports
            .keys()
            .filter(|port| !ports.contains(port))
            .cloned()
            .collect();
        for port in gone {
            if let Some(number) = self.host_ports.remove(&port) {
                if let Some(entry) = self.entries.get_mut(number) {
                    entry.source = Source::Nobody;
                }
                self.reorder(number);
                self.mark(number);
            }
        }
        for port in ports {
            if self.host_ports.contains_key(port) {
                continue;
            }
            let name = format!("hostPort/{}", port.pod_ip);
            let entry = Entry::new(&name, Source::HostPort(Box::new(port.clone())));
            let number = self.entries.insert(entry);
            self.host_ports.insert(port.clone(), number);
            self.mark(number);
        }
    }

    /// This node's zone, as its label says.
    pub fn set_zone(&mut self, zone: &str) {
        if self.places.set_zone(zone) {
            let all: Vec<u32> = self.entries.iter().map(|(number, _)| number).collect();
            all.into_iter().for_each(|number| self.mark(number));
        }
    }

    /// Node ports are reached at these addresses.
    pub fn set_node_addresses(&mut self, wanted: BTreeMap<IpAddr, u8>) -> Result<()> {
        for (address, whose) in &wanted {
            if self.node_addresses.get(address) != Some(whose) {
                self.kernel.set_node_address(*address, *whose)?;
                self.node_addresses.insert(*address, *whose);
            }
        }
        let gone: Vec<IpAddr> = self.node_addresses.keys().copied().collect();
        for address in gone.into_iter().filter(|one| !wanted.contains_key(one)) {
            self.kernel.remove_node_address(address)?;
            self.node_addresses.remove(&address);
        }
        Ok(())
    }

    /// Whether there is anything to write, or to try again.
    #[cfg(test)]
    pub fn is_behind(&self) -> bool {
        !self.dirty.is_empty() || self.broken
    }

    /// Whether [`Self::sync`] is to be called again in a moment though nothing changed: somebody does not fit, and
    /// what was freed still rests.
    pub fn wants_another_try(&self) -> bool {
        self.broken || !self.lacking.is_empty() && (self.extents.rests() || self.backends.rests())
    }

    /// Brings the kernel in step with what was told. What failed is tried again by the next call.
    pub fn sync(&mut self, now: Instant) -> Result<()> {
        let woke = self.extents.wake(now) | self.backends.wake(now);
        if woke {
            let lacking: Vec<u32> = self.lacking.keys().copied().collect();
            lacking.into_iter().for_each(|number| self.mark(number));
        }
        if self.broken {
            // What could not be written goes first: the rest builds on it.
            self.flush(now)?;
        }
        while let Some(number) = self.dirty.pop() {
            self.reconcile(number);
            if self.batch.weight() >= AT_ONCE {
                self.flush(now)?;
            }
        }
        self.flush(now)
    }

    fn flush(&mut self, now: Instant) -> Result<()> {
        let outcome =
            self.batch
                .flush(&mut self.kernel, &mut self.backends, &mut self.extents, now);
        self.broken = outcome.is_err();
        outcome
    }

    /// Everything that the API had at first is in the kernel: backends of an agent before this one that nobody
    /// has claimed are gone.
    pub fn settle(&mut self, now: Instant) -> Result<()> {
        self.batch.released.append(&mut self.adopted);
        self.flush(now)
    }

    /// Everything goes into other maps, which are as large as those before or larger.
    pub fn rewrite(&mut self, kernel: K, now: Instant) -> Result<()> {
        // What was decided for the maps before is decided again.
        let before = std::mem::take(&mut self.batch);
        before
            .released
            .into_iter()
            .for_each(|number| self.backends.release(number, now));
        self.batch.parted = before.parted;
        self.kernel = kernel;
        let room = self.kernel.room();
        self.extents = Extents::new(room.chunks);
        self.backends.grow(room.backends);
        self.ranges = 0;
        self.backends.change_all();
        let mut all: Vec<u32> = self.entries.iter().map(|(number, _)| number).collect();
        // The last is the first that gets room: who had it has it again, whoever else comes.
        all.sort_by_key(|number| !self.lacking.contains_key(number));
        self.dirty.clear();
        for number in all {
            if let Some(entry) = self.entries.get_mut(number) {
                entry.units.iter_mut().for_each(Unit::forget);
                entry.dirty = true;
            }
            self.dirty.push(number);
        }
        for (address, whose) in &self.node_addresses {
            self.kernel.set_node_address(*address, *whose)?;
        }
        self.broken = false;
        self.sync(now)
    }

    /// Writes all backends, and nothing else, into a map that is to take the place of the one that is.
    pub fn copy_backends(&self, kernel: &mut K) -> Result<()> {
        let mut all = self.backends.all();
        loop {
            let some: Vec<(u32, Backend)> = all.by_ref().take(AT_ONCE).collect();
            if some.is_empty() {
                return Ok(());
            }
            kernel.set_backends(&some)?;
        }
    }

    /// A larger map of backends, with all that the one before has, has taken its place; all other maps are the same.
    pub fn change_backends(&mut self, kernel: K) {
        self.kernel = kernel;
        self.backends.grow(self.kernel.room().backends);
        let lacking: Vec<u32> = self.lacking.keys().copied().collect();
        lacking.into_iter().for_each(|number| self.mark(number));
    }

    /// From here on larger maps come for what does not fit, unless [`Self::refuse_growth`] says that they do not.
    pub fn expect_growth(&mut self) {
        self.grows = true;
    }

    /// No larger maps come for those that do not fit now, and why.
    pub fn refuse_growth(&mut self, why: &str) {
        let lacking: Vec<u32> = self.lacking.keys().copied().collect();
        lacking
            .into_iter()
            .for_each(|number| self.tell_of_lack(number, why));
    }

    /// Whether somebody does not fit, and larger maps may come.
    pub fn waits_for_growth(&self) -> bool {
        let untold = |number: &u32| self.entries.get(*number).is_some_and(|entry| !entry.told);
        self.grows && self.lacking.keys().any(untold)
    }

    /// Tells once that an entry does not fit, when that is sure to last.
    fn tell_of_lack(&mut self, number: u32, why: &str) {
        let Some(entry) = self.entries.get_mut(number) else {
            return;
        };
        if std::mem::replace(&mut entry.told, true) {
            return;
        }
        let lack = self.lacking.get(&number).copied().unwrap_or_default();
        let words = format!(
            "the dataplane has no room for all of it: {} frontends, {} chunks of slots, {} backends and {} source ranges are missing; {why}",
            lack.frontends, lack.chunks, lack.backends, lack.ranges
        );
        let notice = Notice::new(&entry.name, entry.service(), Reason::DataplaneFull, words);
        self.notices.push(notice);
    }

    /// Brings one entry in step.
    fn reconcile(&mut self, number: u32) {
        let Some(entry) = self.entries.get_mut(number) else {
            return;
        };
        entry.dirty = false;
        let mut before = std::mem::take(&mut entry.units);
        let wanted = entry.wanted(&self.places);
        let mut units: Vec<Unit> = Vec::with_capacity(wanted.len());
        let mut changed = Vec::new();
        let mut lack = Room::default();
        for one in &wanted {
            let at = before.iter().position(|unit| unit.is_of(one));
            let known = at.map(|at| before.swap_remove(at));
            let applied = self.apply(number, one, known);
            changed.extend(applied.before.map(|before| (before, units.len())));
            units.extend(applied.unit);
            lack.frontends += applied.lack.frontends;
            lack.chunks += applied.lack.chunks;
            lack.backends += applied.lack.backends;
            lack.ranges += applied.lack.ranges;
        }
        // A frontend can go from one port of the Service to another.
        let mut kept = Vec::new();
        if units.len() + before.len() > 1 {
            kept.extend(units.iter().flat_map(Unit::keys));
        }
        for (before, at) in changed {
            self.leave_behind(number, before, &units[at], &kept);
        }
        for unit in before {
            self.retire(number, unit, &kept);
        }
        let health = self.health_of(number, &wanted);
        self.announce(number, &wanted);
        let full = lack != Room::default();
        if full {
            self.lacking.insert(number, lack);
        } else {
            self.lacking.remove(&number);
        }
        let Some(entry) = self.entries.get_mut(number) else {
            return;
        };
        entry.units = units;
        entry.full = full;
        entry.told &= full;
        if full && !self.grows {
            self.tell_of_lack(number, "its maps do not grow");
        }
        let Some(entry) = self.entries.get_mut(number) else {
            return;
        };
        if entry.health != health {
            entry.health = health;
            let (port, count) = health;
            let told = (port != 0).then_some((port, count));
            self.health.push((entry.name.clone(), told));
        }
        let idle = matches!(entry.source, Source::Nobody)
            && entry.slices.is_empty()
            && entry.units.is_empty();
        if idle {
            let name = entry.name.clone();
            let hash = self.hasher.hash_one(&*name);
            if let Ok(found) = self.names.find_entry(hash, |other| *other == number) {
                found.remove();
            }
            self.entries.remove(number);
            self.lacking.remove(&number);
        }
    }

    /// Notes what of a Service is to be announced on the node's network.
    fn announce(&mut self, number: u32, wanted: &[Wanted]) {
        let Some(entry) = self.entries.get(number) else {
            return;
        };
        let view = entry.service();
        let addresses: Vec<IpAddr> = view.map_or_else(Vec::new, |view| {
            let all = view.extra().load_balancer_ips.iter();
            all.map(|ip| IpAddr::from(*ip)).collect()
        });
        if addresses.is_empty() {
            self.announced_changed |= self.announced.remove(&entry.name).is_some();
            return;
        }
        let local = view.is_some_and(|view| view.external_local);
        let mut ends = wanted.iter().flat_map(|one| &one.ends);
        let eligible = !local || ends.any(|end| end.traits & (LOCAL | READY) == LOCAL | READY);
        let now = (addresses, eligible);
        if self.announced.get(&entry.name) != Some(&now) {
            self.announced.insert(entry.name.clone(), now);
            self.announced_changed = true;
        }
    }

    /// All that is to be announced, if it changed since this was last asked for.
    pub fn take_announced(&mut self) -> Option<Vec<Announced>> {
        if !std::mem::take(&mut self.announced_changed) {
            return None;
        }
        let all = self.announced.iter().map(|(name, (addresses, eligible))| {
            let (namespace, name) = name.split_once('/').unwrap_or(("", name));
            Announced {
                service: (namespace.to_owned(), name.to_owned()),
                addresses: addresses.clone(),
                eligible: *eligible,
            }
        });
        Some(all.collect())
    }

    /// Backends that went since this was last asked for; the kernel does not name them any more.
    pub fn take_gone(&mut self) -> Vec<Target> {
        self.backends.take_gone()
    }

    /// Backends that left a port of UDP and are still another's: the port's number, theirs, and who they are. The
    /// kernel does not name them for the port any more.
    pub fn take_parted(&mut self) -> Vec<(u32, u32, Target)> {
        self.backends.take_parted()
    }

    /// How many ready endpoints a Service has on this node, each address once.
    fn health_of(&self, number: u32, wanted: &[Wanted]) -> (u16, u32) {
        let entry = self.entries.get(number);
        let port = entry
            .and_then(Entry::service)
            .map_or(0, |view| view.health_port);
        if port == 0 {
            return (0, 0);
        }
        let of = |v4: bool| {
            let units = wanted.iter().filter(|one| one.v4 == v4);
            let ready = |traits: u8| traits & (LOCAL | READY) == LOCAL | READY;
            let ends = units
                .flat_map(|one| &one.ends)
                .filter(|end| ready(end.traits));
            ends.map(|end| end.ip).collect::<HashSet<_>>().len() as u32
        };
        (port, of(true).max(of(false)))
    }

    /// How much is in use.
    pub fn used(&self) -> Room {
        Room {
            frontends: self.claims.len() as u32,
            chunks: self.extents.used(),
            backends: self.backends.used() + 1,
            ranges: self.ranges,
        }
    }

    /// How much there is room for.
    pub fn room(&self) -> Room {
        self.kernel.room()
    }

    /// How much room everything would need.
    pub fn need(&self) -> Room {
        let lacking = self.lacking.values();
        lacking.fold(self.used(), |sum, one| Room {
            frontends: sum.frontends.saturating_add(one.frontends),
            chunks: sum.chunks.saturating_add(one.chunks),
            backends: sum.backends.saturating_add(one.backends),
            ranges: sum.ranges.saturating_add(one.ranges),
        })
    }

    /// How much room everything would need, looked at more closely than by [`Self::need`]: what does not fit for one
    /// reason may not fit for another, and backends that many lack are needed once.
    pub fn whole_need(&self) -> Room {
        let mut need = self.used();
        let mut backends = HashSet::new();
        let lacking = self.lacking.keys();
        for entry in lacking.filter_map(|number| self.entries.get(*number)) {
            for wanted in &entry.wanted(&self.places) {
                let held: HashSet<_> = entry.units.iter().flat_map(Unit::keys).collect();
                let fresh = wanted.fronts.iter().filter(|one| !held.contains(&one.key));
                need.frontends = need.frontends.saturating_add(fresh.count() as u32);
                need.chunks = need.chunks.saturating_add(self.chunks_for(wanted));
                need.ranges = need.ranges.saturating_add(wanted.ranges.len() as u32);
                let targets = wanted.ends.iter().map(|end| target(end, wanted));
                let missing = targets.filter(|one| self.backends.find(one).is_none());
                backends.extend(missing.map(|one| self.hasher.hash_one(one) as u32));
            }
        }
        // Those that rest have their numbers still.
        let missing = backends.len() as u32 + self.backends.resting();
        need.backends = need.backends.saturating_add(missing);
        // All of it fits, and yet somebody lacks: no free chunks lie side by side in that number.
        let room = self.room();
        if need.chunks <= room.chunks && !self.lacking.is_empty() && !self.extents.rests() {
            let fits = need.frontends <= room.frontends
                && need.backends <= room.backends
                && need.ranges <= room.ranges;
            if fits {
                need.chunks = room.chunks + 1;
            }
        }
        need
    }

    /// How many Services there are, and how many of them do not fit.
    pub fn count(&self) -> (usize, usize) {
        let entries = self.entries.iter();
        let services = entries.filter(|(_, entry)| entry.service().is_some());
        (services.count(), self.lacking.len())
    }

    /// What users have to be told, once.
    pub fn take_notices(&mut self) -> Vec<Notice> {
        std::mem::take(&mut self.notices)
    }

    /// What health checks are answered with from now on, once.
    pub fn take_health(&mut self) -> Vec<HealthChange> {
        std::mem::take(&mut self.health)
    }

    /// When what the last [`Self::sync`] wrote happened, once.
    pub fn take_triggers(&mut self) -> Vec<f64> {
        std::mem::take(&mut self.triggers)
    }

    #[cfg(test)]
    pub(super) fn sizes(&self) -> [usize; 5] {
        [
            self.entries.len(),
            self.slices.len(),
            self.claims.len(),
            self.numbers.len(),
            self.places.len(),
        ]
    }

    /// Tells of a write that failed.
    pub fn warn_of(error: &anyhow::Error) {
        warn!(
            error = format!("{error:#}"),
            "the dataplane could not take a change of Services; trying again"
        );
    }
}
