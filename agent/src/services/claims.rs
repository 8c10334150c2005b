//! Who has a frontend that several ask for.

use hashbrown::HashMap;
use xebec_dataplane_common::service::FrontendKey;

/// Frontends and their owners, by number; others that ask for the same wait.
#[derive(Default)]
pub struct Claims {
    owners: HashMap<FrontendKey, u32>,
    waiting: HashMap<FrontendKey, Vec<u32>>,
}

/// What became of a claim.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Claim {
    /// It is the claimant's, and was nobody else's.
    Own,
    /// It is the claimant's, and no more this one's.
    From(u32),
    /// This one has it.
    Lost(u32),
}

impl Claims {
    /// How many frontends have an owner.
    pub fn len(&self) -> usize {
        self.owners.len()
    }

    pub fn owner(&self, key: &FrontendKey) -> Option<u32> {
        self.owners.get(key).copied()
    }

    /// Asks for a frontend; `before` tells whether the first goes before the second.
    pub fn claim(
        &mut self,
        key: FrontendKey,
        who: u32,
        before: impl Fn(u32, u32) -> bool,
    ) -> Claim {
        let owner = *self.owners.entry(key).or_insert(who);
        if owner == who {
            return Claim::Own;
        }
        let waiting = self.waiting.entry(key).or_default();
        if before(who, owner) {
            waiting.retain(|one| *one != who);
            waiting.push(owner);
            self.owners.insert(key, who);
            Claim::From(owner)
        } else {
            if !waiting.contains(&who) {
                waiting.push(who);
            }
            Claim::Lost(owner)
        }
    }

    /// Gives a claim up; who has the frontend from now on because of that.
    pub fn give_up(
        &mut self,
        key: &FrontendKey,
        who: u32,
        before: impl Fn(u32, u32) -> bool,
    ) -> Option<u32> {
        let mut next = None;
        if let Some(waiting) = self.waiting.get_mut(key) {
            waiting.retain(|one| *one != who);
            if self.owners.get(key) == Some(&who) {
                next = waiting
                    .iter()
                    .copied()
                    .reduce(|a, b| if before(b, a) { b } else { a });
                waiting.retain(|one| Some(*one) != next);
            }
            if waiting.is_empty() {
                self.waiting.remove(key);
            }
        }
        if self.owners.get(key) == Some(&who) {
            match next {
                Some(next) => self.owners.insert(*key, next),
                None => self.owners.remove(key),
            };
        }
        next
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use xebec_dataplane_common::ip::Ip;

    #[test]
    fn the_first_in_order_has_it_whoever_comes_when() {
        let key = FrontendKey {
            address: Ip::EVERY_V4,
            port: 1,
            protocol: 6,
            pad: 0,
        };
        let before = |a: u32, b: u32| a < b;
        let mut claims = Claims::default();
        assert_eq!(claims.claim(key, 5, before), Claim::Own);
        assert_eq!(claims.claim(key, 7, before), Claim::Lost(5));
        assert_eq!(claims.claim(key, 7, before), Claim::Lost(5));
        assert_eq!(claims.claim(key, 3, before), Claim::From(5));
        assert_eq!(claims.give_up(&key, 7, before), None);
        assert_eq!(claims.claim(key, 7, before), Claim::Lost(3));
        assert_eq!(claims.give_up(&key, 3, before), Some(5));
        assert_eq!(claims.give_up(&key, 5, before), Some(7));
        assert_eq!(claims.owner(&key), Some(7));
        assert_eq!(claims.give_up(&key, 7, before), None);
        assert_eq!((claims.len(), claims.waiting.len()), (0, 0));
    }
}
