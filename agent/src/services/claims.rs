//! Who has a frontend that several ask for.

use hashbrown::HashMap;
use xebec_dataplane_common::service::FrontendKey;

/// Who has written nothing.
const NOBODY: u32 = u32::MAX;

/// Who has a frontend, and whose value the kernel has: a new owner's comes a little later.
#[derive(Clone, Copy)]
struct Owner {
    who: u32,
    writer: u32,
}

/// Frontends and their owners, by number; others that ask for the same wait. The owner is always the first in order
/// of all that ask.
#[derive(Default)]
pub struct Claims {
    owners: HashMap<FrontendKey, Owner>,
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
        self.owners.get(key).map(|owner| owner.who)
    }

    /// The kernel gets this one's value.
    pub fn write(&mut self, key: &FrontendKey, who: u32) {
        if let Some(owner) = self.owners.get_mut(key) {
            owner.writer = who;
        }
    }

    /// Whether the kernel has this one's value.
    pub fn wrote(&self, key: &FrontendKey, who: u32) -> bool {
        self.owners
            .get(key)
            .is_some_and(|owner| owner.writer == who)
    }

    /// Takes this one's value back; whether the kernel had it.
    pub fn unwrite(&mut self, key: &FrontendKey, who: u32) -> bool {
        let wrote = self.wrote(key, who);
        if wrote {
            self.write(key, NOBODY);
        }
        wrote
    }

    /// Asks for a frontend; `before` tells whether the first goes before the second.
    pub fn claim(
        &mut self,
        key: FrontendKey,
        who: u32,
        before: impl Fn(u32, u32) -> bool,
    ) -> Claim {
        let new = Owner {
            who,
            writer: NOBODY,
        };
        let owner = self.owners.entry(key).or_insert(new);
        let other = owner.who;
        if other == who {
            return Claim::Own;
        }
        let waiting = self.waiting.entry(key).or_default();
        if before(who, other) {
            waiting.retain(|one| *one != who);
            waiting.push(other);
            owner.who = who;
            Claim::From(other)
        } else {
            if !waiting.contains(&who) {
                waiting.push(who);
            }
            Claim::Lost(other)
        }
    }

    /// One that asks has another place in the order; who has the frontend from now on because of that, and who had
    /// it.
    pub fn reorder(
        &mut self,
        key: &FrontendKey,
        who: u32,
        before: impl Fn(u32, u32) -> bool,
    ) -> Option<(u32, u32)> {
        let owner = self.owners.get_mut(key)?;
        let waiting = self.waiting.get_mut(key)?;
        let first = if owner.who == who {
            first(waiting, &before)?
        } else {
            who
        };
        if !before(first, owner.who) {
            return None;
        }
        let last = std::mem::replace(&mut owner.who, first);
        waiting.retain(|one| *one != first);
        waiting.push(last);
        Some((first, last))
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
            if self.owners.get(key).is_some_and(|owner| owner.who == who) {
                next = first(waiting, &before);
                waiting.retain(|one| Some(*one) != next);
            }
            if waiting.is_empty() {
                self.waiting.remove(key);
            }
        }
        match (self.owners.get_mut(key), next) {
            (Some(owner), Some(next)) if owner.who == who => owner.who = next,
            (Some(owner), None) if owner.who == who => {
                self.owners.remove(key);
            }
            _ => {}
        }
        next
    }
}

fn first(waiting: &[u32], before: impl Fn(u32, u32) -> bool) -> Option<u32> {
    let all = waiting.iter().copied();
    all.reduce(|a, b| if before(b, a) { b } else { a })
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

    #[test]
    fn whose_order_changes_loses_it_or_gets_it_and_the_writer_is_remembered() {
        let key = FrontendKey {
            address: Ip::EVERY_V4,
            port: 1,
            protocol: 6,
            pad: 0,
        };
        let forward = |a: u32, b: u32| a < b;
        let mut claims = Claims::default();
        claims.claim(key, 1, forward);
        claims.write(&key, 1);
        assert_eq!(claims.reorder(&key, 1, forward), None);
        for who in [2, 3] {
            assert_eq!(claims.claim(key, who, forward), Claim::Lost(1));
        }
        let first_is_last = |a: u32, b: u32| a != 1 && (b == 1 || a < b);
        assert_eq!(claims.reorder(&key, 1, first_is_last), Some((2, 1)));
        assert_eq!(claims.reorder(&key, 1, forward), Some((1, 2)));
        assert_eq!(claims.reorder(&key, 3, |a, _| a == 3), Some((3, 1)));
        assert!(claims.wrote(&key, 1));
        assert_eq!(claims.give_up(&key, 1, first_is_last), None);
        assert_eq!(
            (claims.unwrite(&key, 3), claims.unwrite(&key, 1)),
            (false, true)
        );
        assert!(!claims.wrote(&key, 1));
    }
}
