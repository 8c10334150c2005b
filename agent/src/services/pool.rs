//! Values that many objects share, kept once.

use std::hash::{BuildHasher, Hash};
use std::sync::Arc;

use hashbrown::{DefaultHashBuilder, HashSet, HashTable};

use super::pages::Pages;
use super::view::{PortView, SlicePort};

/// Values that many objects share; what nobody holds any more goes at times.
pub struct Shared<T: ?Sized> {
    all: HashSet<Arc<T>>,
    /// How many there may be before those that nobody holds are looked for.
    limit: usize,
}

impl<T: ?Sized> Default for Shared<T> {
    fn default() -> Self {
        Self {
            all: HashSet::new(),
            limit: 0,
        }
    }
}

impl<T: ?Sized + Eq + Hash> Shared<T>
where
    Arc<T>: for<'a> From<&'a T>,
{
    /// The one value that is equal.
    pub fn get(&mut self, value: &T) -> Arc<T> {
        if let Some(there) = self.all.get(value) {
            return there.clone();
        }
        if self.all.len() >= self.limit.max(64) {
            self.all.retain(|value| Arc::strong_count(value) > 1);
            self.limit = self.all.len() * 2;
        }
        let new = Arc::<T>::from(value);
        self.all.insert(new.clone());
        new
    }

    #[cfg(test)]
    pub fn len(&self) -> usize {
        self.all.len()
    }
}

/// What objects share.
#[derive(Default)]
pub struct Texts {
    all: Shared<str>,
    /// Ports of Services: most have the same as many others.
    pub ports: Shared<[PortView]>,
    /// Ports of slices.
    pub slice_ports: Shared<[SlicePort]>,
}

impl Texts {
    /// The one text that reads so.
    pub fn get(&mut self, text: &str) -> Arc<str> {
        self.all.get(text)
    }

    #[cfg(test)]
    pub fn len(&self) -> usize {
        self.all.len()
    }
}

/// Where an endpoint is, and for whom it is meant. An object names it by texts of its own.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Place<T = Arc<str>> {
    pub node: Option<T>,
    pub zone: Option<T>,
    pub for_zones: Box<[T]>,
    pub for_nodes: Box<[T]>,
}

impl Place<&str> {
    /// Whether it is this one; both have the same hash then.
    fn is(&self, other: &Place) -> bool {
        let same = |a: &[&str], b: &[Arc<str>]| a.iter().copied().eq(b.iter().map(|text| &**text));
        self.node == other.node.as_deref()
            && self.zone == other.zone.as_deref()
            && same(&self.for_zones, &other.for_zones)
            && same(&self.for_nodes, &other.for_nodes)
    }

    /// The same, with texts that are shared.
    fn shared(&self, texts: &mut Texts) -> Place {
        let mut all = |all: &[&str]| all.iter().map(|text| texts.get(text)).collect();
        let (for_zones, for_nodes) = (all(&self.for_zones), all(&self.for_nodes));
        Place {
            node: self.node.map(|text| texts.get(text)),
            zone: self.zone.map(|text| texts.get(text)),
            for_zones,
            for_nodes,
        }
    }
}

/// The endpoint is on this node.
pub const LOCAL: u8 = 1;
/// It has hints of nodes.
pub const NODE_HINTS: u8 = 1 << 1;
/// One of them is this node.
pub const FOR_NODE: u8 = 1 << 2;
/// It has hints of zones.
pub const ZONE_HINTS: u8 = 1 << 3;
/// One of them is this node's zone.
pub const FOR_ZONE: u8 = 1 << 4;

struct Held {
    place: Place,
    holders: u32,
    /// [`LOCAL`] and the others.
    traits: u8,
}

/// Places by number, counted by holders.
pub struct Places {
    node: String,
    zone: String,
    hasher: DefaultHashBuilder,
    numbers: HashTable<u32>,
    held: Slab<Held>,
}

fn traits(place: &Place, node: &str, zone: &str) -> u8 {
    let is = |set: bool, bit: u8| if set { bit } else { 0 };
    let has = |all: &[Arc<str>], one: &str| all.iter().any(|text| **text == *one);
    is(
        !node.is_empty() && place.node.as_deref() == Some(node),
        LOCAL,
    ) | is(!place.for_nodes.is_empty(), NODE_HINTS)
        | is(has(&place.for_nodes, node), FOR_NODE)
        | is(!place.for_zones.is_empty(), ZONE_HINTS)
        | is(has(&place.for_zones, zone), FOR_ZONE)
}

impl Places {
    /// Places as a node sees them whose zone is not known yet.
    pub fn new(node: &str) -> Self {
        Self {
            node: node.to_owned(),
            zone: String::new(),
            hasher: DefaultHashBuilder::default(),
            numbers: HashTable::new(),
            held: Slab::default(),
        }
    }

    /// The number of a place, held once more.
    pub fn hold(&mut self, place: &Place<&str>, texts: &mut Texts) -> u32 {
        let hash = self.hasher.hash_one(place);
        let (hasher, held) = (&self.hasher, &mut self.held);
        let is = |number: &u32| held.get(*number).is_some_and(|held| place.is(&held.place));
        if let Some(&number) = self.numbers.find(hash, is) {
            if let Some(held) = held.get_mut(number) {
                held.holders += 1;
            }
            return number;
        }
        let place = place.shared(texts);
        let number = held.insert(Held {
            traits: traits(&place, &self.node, &self.zone),
            place,
            holders: 1,
        });
        let rehash = |number: &u32| {
            held.get(*number)
                .map_or(0, |one| hasher.hash_one(&one.place))
        };
        self.numbers.insert_unique(hash, number, rehash);
        number
    }

    /// Lets go of a number once.
    pub fn release(&mut self, number: u32) {
        let Some(held) = self.held.get_mut(number) else {
            return;
        };
        held.holders -= 1;
        if held.holders > 0 {
            return;
        }
        let hash = self.hasher.hash_one(&held.place);
        if let Ok(found) = self.numbers.find_entry(hash, |other| *other == number) {
            found.remove();
        }
        self.held.remove(number);
    }

    /// [`LOCAL`] and the others.
    pub fn traits(&self, number: u32) -> u8 {
        self.held.get(number).map_or(0, |held| held.traits)
    }

    /// The place of a number.
    pub fn get(&self, number: u32) -> Option<&Place> {
        self.held.get(number).map(|held| &held.place)
    }

    /// Tells this node's zone; whether that changed anything.
    pub fn set_zone(&mut self, zone: &str) -> bool {
        if self.zone == zone {
            return false;
        }
        self.zone = zone.to_owned();
        let mut changed = false;
        for held in self.held.iter_mut() {
            let now = traits(&held.place, &self.node, &self.zone);
            changed |= std::mem::replace(&mut held.traits, now) != now;
        }
        changed
    }

    #[cfg(test)]
    pub fn len(&self) -> usize {
        self.numbers.len()
    }
}

/// Holds many values of a kind by number, and gives numbers that were let go of again.
pub struct Slab<T> {
    slots: Pages<Option<T>>,
    free: Vec<u32>,
}

impl<T> Default for Slab<T> {
    fn default() -> Self {
        Self {
            slots: Pages::default(),
            free: Vec::new(),
        }
    }
}

impl<T> Slab<T> {
    pub fn insert(&mut self, value: T) -> u32 {
        match self.free.pop() {
            Some(number) => {
                self.slots[number] = Some(value);
                number
            }
            None => self.slots.push(Some(value)),
        }
    }

    pub fn remove(&mut self, number: u32) -> Option<T> {
        let value = self.slots.get_mut(number)?.take()?;
        self.free.push(number);
        Some(value)
    }

    pub fn get(&self, number: u32) -> Option<&T> {
        self.slots.get(number)?.as_ref()
    }

    pub fn get_mut(&mut self, number: u32) -> Option<&mut T> {
        self.slots.get_mut(number)?.as_mut()
    }

    pub fn iter(&self) -> impl Iterator<Item = (u32, &T)> {
        let all = (0..).zip(self.slots.iter());
        all.filter_map(|(number, slot)| Some((number, slot.as_ref()?)))
    }

    pub fn iter_mut(&mut self) -> impl Iterator<Item = &mut T> {
        self.slots.iter_mut().flatten()
    }

    #[cfg(test)]
    pub fn len(&self) -> usize {
        self.slots.len() as usize - self.free.len()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn places_go_with_their_last_holder_and_follow_the_zone() {
        let mut places = Places::new("a");
        let mut texts = Texts::default();
        let place = Place {
            node: Some("a"),
            zone: None,
            for_zones: ["z"].into(),
            for_nodes: [].into(),
        };
        let one = places.hold(&place, &mut texts);
        assert_eq!(places.hold(&place, &mut texts), one);
        assert_eq!(places.traits(one), LOCAL | ZONE_HINTS);
        assert!(places.set_zone("z") && !places.set_zone("z"));
        assert_eq!(places.traits(one), LOCAL | ZONE_HINTS | FOR_ZONE);
        places.release(one);
        assert_eq!(places.get(one), Some(&place.shared(&mut texts)));
        assert_eq!(places.len(), 1);
        places.release(one);
        assert_eq!((places.len(), places.get(one)), (0, None));
        let other = Place {
            node: Some("b"),
            ..place
        };
        assert_eq!(places.hold(&other, &mut texts), one);
    }

    #[test]
    fn texts_that_nobody_holds_go() {
        let mut texts = Texts::default();
        let kept = texts.get("kept");
        for number in 0..10_000 {
            texts.get(&number.to_string());
        }
        assert!(texts.len() < 200, "{}", texts.len());
        assert!(Arc::ptr_eq(&kept, &texts.get("kept")));
    }
}
