//! Values that many objects share, kept once.

use std::collections::{HashMap, HashSet};
use std::hash::Hash;
use std::sync::Arc;

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
    #[cfg(test)]
    pub fn len(&self) -> usize {
        self.all.len()
    }
}

/// Where an endpoint is, and for whom it is meant.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub struct Place {
    pub node: Option<Arc<str>>,
    pub zone: Option<Arc<str>>,
    pub for_zones: Box<[Arc<str>]>,
    pub for_nodes: Box<[Arc<str>]>,
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
    place: Arc<Place>,
    holders: u32,
    /// [`LOCAL`] and the others.
    traits: u8,
}

/// Places by number, counted by holders.
pub struct Places {
    node: String,
    zone: String,
    numbers: HashMap<Arc<Place>, u32>,
    held: Vec<Option<Held>>,
    free: Vec<u32>,
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
            numbers: HashMap::new(),
            held: Vec::new(),
            free: Vec::new(),
        }
    }

    /// The number of a place, held once more.
    pub fn hold(&mut self, place: Place) -> u32 {
        if let Some(&number) = self.numbers.get(&place) {
            if let Some(Some(held)) = self.held.get_mut(number as usize) {
                held.holders += 1;
            }
            return number;
        }
        let place = Arc::new(place);
        let held = Held {
            traits: traits(&place, &self.node, &self.zone),
            place: place.clone(),
            holders: 1,
        };
        let number = self.free.pop().unwrap_or(self.held.len() as u32);
        if number as usize == self.held.len() {
            self.held.push(Some(held));
        } else {
            self.held[number as usize] = Some(held);
        }
        self.numbers.insert(place, number);
        number
    }

    /// Lets go of a number once.
    pub fn release(&mut self, number: u32) {
        let Some(Some(held)) = self.held.get_mut(number as usize) else {
            return;
        };
        held.holders -= 1;
        if held.holders == 0 {
            let place = held.place.clone();
            self.numbers.remove(&place);
            self.held[number as usize] = None;
            self.free.push(number);
        }
    }

    /// [`LOCAL`] and the others.
    pub fn traits(&self, number: u32) -> u8 {
        let held = self.held.get(number as usize).and_then(Option::as_ref);
        held.map_or(0, |held| held.traits)
    }

    /// The place of a number.
    pub fn get(&self, number: u32) -> Option<&Place> {
        let held = self.held.get(number as usize)?.as_ref()?;
        Some(&held.place)
    }

    /// Tells this node's zone; whether that changed anything.
    pub fn set_zone(&mut self, zone: &str) -> bool {
        if self.zone == zone {
            return false;
        }
        self.zone = zone.to_owned();
        let mut changed = false;
        for held in self.held.iter_mut().flatten() {
            let now = traits(&held.place, &self.node, &self.zone);
            changed |= std::mem::replace(&mut held.traits, now) != now;
        }
        changed
    }

    #[cfg(test)]
    #[cfg(test)]
    pub fn len(&self) -> usize {
        self.numbers.len()
    }
}

/// Holds many values of a kind by number, and gives numbers that were let go of again.
pub struct Slab<T> {
    slots: Vec<Option<T>>,
    free: Vec<u32>,
}

impl<T> Default for Slab<T> {
    fn default() -> Self {
        Self {
            slots: Vec::new(),
            free: Vec::new(),
        }
    }
}

impl<T> Slab<T> {
    pub fn insert(&mut self, value: T) -> u32 {
        match self.free.pop() {
            Some(number) => {
                self.slots[number as usize] = Some(value);
                number
            }
            None => {
                // A quarter more each time: doubling would leave half of it empty.
                if self.slots.len() == self.slots.capacity() {
                    self.slots.reserve_exact(self.slots.len() / 4 + 16);
                }
                self.slots.push(Some(value));
                self.slots.len() as u32 - 1
            }
        }
    }

    pub fn remove(&mut self, number: u32) -> Option<T> {
        let value = self.slots.get_mut(number as usize)?.take()?;
        self.free.push(number);
        Some(value)
    }

    pub fn get(&self, number: u32) -> Option<&T> {
        self.slots.get(number as usize)?.as_ref()
    }

    pub fn get_mut(&mut self, number: u32) -> Option<&mut T> {
        self.slots.get_mut(number as usize)?.as_mut()
    }

    pub fn iter(&self) -> impl Iterator<Item = (u32, &T)> {
        let all = self.slots.iter().enumerate();
        all.filter_map(|(number, slot)| Some((number as u32, slot.as_ref()?)))
    }

    #[cfg(test)]
    pub fn len(&self) -> usize {
        self.slots.len() - self.free.len()
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
            node: Some(texts.get("a")),
            for_zones: [texts.get("z")].into(),
            ..Place::default()
        };
        let one = places.hold(place.clone());
        assert_eq!(places.hold(place.clone()), one);
        assert_eq!(places.traits(one), LOCAL | ZONE_HINTS);
        assert!(places.set_zone("z") && !places.set_zone("z"));
        assert_eq!(places.traits(one), LOCAL | ZONE_HINTS | FOR_ZONE);
        places.release(one);
        assert_eq!((places.len(), places.get(one)), (1, Some(&place)));
        places.release(one);
        assert_eq!((places.len(), places.get(one)), (0, None));
        assert_eq!(places.hold(Place::default()), one);
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
