//! Which names pods asked for, by the addresses that they got: their flows to these show them.

use std::sync::Arc;

use hashbrown::HashMap;
use xebec_dataplane_common::ip::Ip;
use xebec_policy::names::Peer;

/// Addresses of all pods together.
const ROOM: usize = 65_536;
/// Names of one.
const NAMES: usize = 8;
/// For how long a name is kept after it was last told or a flow had it: connections outlive what resolvers say, ns.
const KEPT: u64 = 3_600 * 1_000_000_000;

/// Who asked, and the address that it got.
type Key = (Ip, Ip);

struct Known {
    names: Arc<Vec<String>>,
    /// Who had the asking address.
    whose: Arc<Peer>,
    /// ns of the kernel's clock.
    until: u64,
}

#[derive(Default)]
pub(super) struct Names(HashMap<Key, Known>);

impl Names {
    /// An answer has told of an address, for so many seconds.
    pub fn learn(&mut self, key: Key, whose: &Arc<Peer>, name: &str, ttl: u32, now: u64) {
        let until = now + KEPT.max(u64::from(ttl) * 1_000_000_000);
        if let Some(known) = self.0.get_mut(&key)
            && known.whose.pod == whose.pod
        {
            known.until = until;
            if known.names.first().is_none_or(|first| first != name) {
                let names = Arc::make_mut(&mut known.names);
                names.retain(|one| one != name);
                names.insert(0, name.to_owned());
                names.truncate(NAMES);
            }
            return;
        }
        if self.0.len() >= ROOM && !self.0.contains_key(&key) {
            self.make_room(now);
        }
        let known = Known {
            names: Arc::new(vec![name.to_owned()]),
            whose: whose.clone(),
            until,
        };
        self.0.insert(key, known);
    }

    /// Forgets what is over, and if that is nothing, the half that would be first.
    fn make_room(&mut self, now: u64) {
        self.0.retain(|_, known| known.until > now);
        if self.0.len() < ROOM {
            return;
        }
        let mut ends: Vec<u64> = self.0.values().map(|known| known.until).collect();
        let (_, middle, _) = ends.select_nth_unstable(ROOM / 2);
        let middle = *middle;
        self.0.retain(|_, known| known.until > middle);
    }

    /// What the pod called the address.
    pub fn get(&mut self, key: Key, whose: &Peer, now: u64) -> Option<Arc<Vec<String>>> {
        if self.0.is_empty() {
            return None;
        }
        let known = self.0.get_mut(&key)?;
        if known.until <= now || known.whose.pod != whose.pod {
            self.0.remove(&key);
            return None;
        }
        known.until = known.until.max(now + KEPT);
        Some(known.names.clone())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pod(name: &str) -> Arc<Peer> {
        let name = ("shop".to_owned(), name.to_owned());
        Arc::new(Peer::pod(&name, 1000, &Default::default(), None))
    }

    #[test]
    fn names_are_the_askers_own_and_the_last_comes_first() {
        let (web, api) = (pod("web"), pod("api"));
        let key = (Ip::v4(1), Ip::v4(2));
        let mut names = Names::default();
        for (name, at) in [("a.example", 5), ("b.example", 6), ("a.example", 7)] {
            names.learn(key, &web, name, 30, at);
        }
        assert_eq!(
            *names.get(key, &web, 8).unwrap(),
            ["a.example", "b.example"]
        );
        assert_eq!(names.get((Ip::v4(2), Ip::v4(1)), &web, 8), None);
        // Another pod has the address now.
        assert_eq!(names.get(key, &api, 9), None);
        assert_eq!(names.get(key, &web, 9), None);
        for number in 0..20 {
            names.learn(key, &web, &format!("{number}.example"), 30, 9);
        }
        assert_eq!(names.get(key, &web, 9).unwrap().len(), NAMES);
        // Flows keep them.
        assert!(names.get(key, &web, 8 + KEPT).is_some());
        assert!(names.get(key, &web, 7 + 2 * KEPT).is_some());
        assert_eq!(names.get(key, &web, 8 + 4 * KEPT), None);
    }

    #[test]
    fn there_is_always_room_for_a_new_one() {
        let web = pod("web");
        let mut names = Names::default();
        let key = |number: usize| (Ip::v4(1), Ip::v4(number as u32));
        for number in 0..=ROOM {
            names.learn(key(number), &web, "a.example", 30, number as u64);
        }
        assert!(names.0.len() <= ROOM / 2 + 1, "{}", names.0.len());
        let now = ROOM as u64;
        assert!(names.get(key(ROOM), &web, now).is_some());
        assert!(names.get(key(0), &web, now).is_none());
    }
}
