//! The sets that are in the kernel. A set is never changed while packets are judged by it, but for pods that nobody has
//! met yet: another one is written, then pods are told its number, then the old one is removed.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::net::IpAddr;
use std::sync::Arc;

use anyhow::{Context, Result};
use hashbrown::HashMap;
use tracing::warn;
use xebec_dataplane_common::policy::{Decision, RuleKey};

use crate::content::{Content, Part, selectors as asked_by};
use crate::kernel::{PolicyKernel, Room};
use crate::kind::{Kind, Kinds};
use crate::names::Names;
use crate::places::{Places, places as named_by};
use crate::policies::Row;
use crate::rule::{Action, Direction, Rule, RuleId, Tier};
use crate::selector::Labels;
use crate::selectors::Selectors;

/// What makes a set the one that it is.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct SetKey {
    /// Which way it judges.
    pub direction: Direction,
    /// In which tier.
    pub tier: Tier,
    /// Versions of policies, in their order.
    pub policies: Vec<u32>,
    /// What the pods call their ports, where a rule asks for that.
    pub ports: BTreeSet<(String, u8, u16)>,
}

/// A set, and what it was made of.
#[derive(Debug)]
pub struct Made {
    /// What makes it the one that it is.
    pub key: SetKey,
    /// Its policies.
    pub policies: Vec<Arc<Row>>,
    /// A pod of its own.
    own: Kind,
    /// What it holds.
    pub content: Content,
}

/// A set in the kernel.
#[derive(Debug)]
struct Installed {
    made: Made,
    users: usize,
    /// Whether it is what its key says; otherwise another one is to take its place.
    right: bool,
}

/// The cluster, as sets see it.
#[derive(Clone, Copy)]
pub struct View<'a> {
    /// The pods that there are.
    pub kinds: &'a Kinds,
    /// Labels of namespaces.
    pub namespaces: &'a BTreeMap<String, Labels>,
}

/// Why a set is not in the kernel: the maps have no room for it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Full {
    /// What there is no room for.
    pub what: &'static str,
    /// How many of them the set has.
    pub needed: usize,
    /// For how many there is room.
    pub free: usize,
    /// The rule that has most of them, and how many; none where the set has no rules.
    pub most: Option<(RuleId, usize)>,
}

impl fmt::Display for Full {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            out,
            "{} {} do not fit, there is room for {}",
            self.needed, self.what, self.free
        )?;
        if let Some((rule, count)) = &self.most {
            write!(out, "; {count} are of {rule}")?;
        }
        Ok(())
    }
}

impl std::error::Error for Full {}

/// All of them.
#[derive(Debug, Default)]
pub struct Sets {
    by_number: HashMap<u32, Installed>,
    by_key: HashMap<SetKey, u32>,
    next: u32,
    rules: usize,
    blocks: usize,
    /// Those that nobody uses, but that a packet may still be judged by.
    retired: Vec<(u32, Content)>,
}

/// A row's rules of one direction, with ranks.
fn parts<'a>(policies: &'a [Arc<Row>], direction: Direction, tier: Tier) -> Vec<Part<'a>> {
    let rules = policies.iter().flat_map(|row| {
        let rules = row.policy.rules.iter().zip(&row.rules);
        rules.filter(|(rule, _)| rule.direction == direction)
    });
    rules
        .zip(0..)
        .map(|((rule, number), place)| Part {
            rule,
            number: *number,
            // Of policies of one tier that are asked in order, the first rule decides; NetworkPolicies are asked at once,
            // and what one denies no other allows.
            rank: match (tier, rule.action) {
                (Tier::Network, Action::Deny) => 0,
                (Tier::Network, _) => 1,
                _ => place,
            },
        })
        .collect()
}

impl Made {
    /// Makes the set of these policies for pods of this kind; nothing where there are none. The selectors that it looks
    /// at must be known.
    pub fn new(
        key: SetKey,
        policies: Vec<Arc<Row>>,
        own: &Kind,
        selectors: &Selectors,
        kinds: &Kinds,
        places: &Places,
    ) -> Self {
        let parts = parts(&policies, key.direction, key.tier);
        let denies = policies
            .iter()
            .any(|row| row.policy.isolates[key.direction.index()]);
        let content = Content::new(&parts, own, denies, selectors, kinds, places);
        Self {
            key,
            policies,
            own: own.clone(),
            content,
        }
    }

    /// The rules that it was made of, with their numbers.
    pub fn parts(&self) -> Vec<Part<'_>> {
        parts(&self.policies, self.key.direction, self.key.tier)
    }

    fn rules(&self) -> impl Iterator<Item = &Rule> {
        let rules = self.policies.iter().flat_map(|row| &row.policy.rules);
        rules.filter(|rule| rule.direction == self.key.direction)
    }

    /// The rule that has most entries or, of `blocks`, is most of them.
    fn most(&self, blocks: Option<&Places>) -> Option<(RuleId, usize)> {
        let mut counts = HashMap::<u32, usize>::new();
        if blocks.is_none() {
            for decision in self.content.rules.values() {
                *counts.entry(decision.rule).or_default() += 1;
            }
        }
        let all = self.policies.iter().flat_map(|row| {
            let rules = row.policy.rules.iter().zip(&row.rules);
            rules.map(move |(rule, number)| (row, rule, number))
        });
        all.filter(|(_, rule, _)| rule.direction == self.key.direction)
            .map(|(row, rule, number)| {
                let count = match blocks {
                    Some(places) => {
                        let peers = rule.peers.iter();
                        peers.map(|peer| places.size(peer, rule.action)).sum()
                    }
                    None => counts.get(number).copied().unwrap_or(0),
                };
                (row.policy.rule_id(rule), count)
            })
            .max_by_key(|(_, count)| *count)
    }

    /// Whether there is room for it.
    fn check(&self, free: Room, places: &Places) -> Result<(), Full> {
        self.check_size(&self.content, free, places)?;
        if free.sets == 0 {
            return Err(Full {
                what: "sets",
                needed: 1,
                free: 0,
                most: self.most(None),
            });
        }
        Ok(())
    }

    /// Whether there is room for what it has, or gets besides.
    fn check_size(&self, content: &Content, free: Room, places: &Places) -> Result<(), Full> {
        let full = |what, needed, free, blocks| Full {
            what,
            needed,
            free,
            most: self.most(blocks),
        };
        if content.rules.len() > free.rules {
            return Err(full("entries", content.rules.len(), free.rules, None));
        }
        if content.blocks.len() > free.blocks {
            return Err(full(
                "address blocks",
                content.blocks.len(),
                free.blocks,
                Some(places),
            ));
        }
        Ok(())
    }
}

fn keyed(number: u32, key: RuleKey) -> RuleKey {
    RuleKey { set: number, ..key }
}

impl Sets {
    /// What is left of a room.
    fn free(&self, room: Room) -> Room {
        Room {
            rules: room.rules.saturating_sub(self.rules),
            blocks: room.blocks.saturating_sub(self.blocks),
            sets: room
                .sets
                .saturating_sub(self.by_number.len() + self.retired.len()),
        }
    }

    /// How much they take of the kernel's maps.
    pub fn used(&self) -> Room {
        Room {
            rules: self.rules,
            blocks: self.blocks,
            sets: self.by_number.len() + self.retired.len(),
        }
    }

    /// The set of this number.
    pub fn get(&self, number: u32) -> Option<&Made> {
        self.by_number.get(&number).map(|one| &one.made)
    }

    /// The number of a set that is in the kernel.
    pub fn find(&self, key: &SetKey) -> Option<u32> {
        self.by_key.get(key).copied()
    }

    /// The number of a set, which is written if it is new; to be given back by [`release`](Self::release). 0 for no
    /// policies.
    pub fn acquire<K: PolicyKernel>(
        &mut self,
        kernel: &mut K,
        names: &Names,
        (selectors, places): (&mut Selectors, &mut Places),
        view: View<'_>,
        (key, policies, own): (SetKey, Vec<Arc<Row>>, &Kind),
    ) -> Result<u32> {
        if policies.is_empty() {
            return Ok(0);
        }
        if let Some(number) = self.by_key.get(&key) {
            if let Some(installed) = self.by_number.get_mut(number) {
                installed.users += 1;
                return Ok(*number);
            }
        }
        self.next = self.next.wrapping_add(1).max(1);
        let number = self.next;
        let asked: Vec<_> = policies
            .iter()
            .flat_map(|row| &row.policy.rules)
            .filter(|rule| rule.direction == key.direction)
            .flat_map(asked_by)
            .collect();
        for selector in &asked {
            selectors.use_in(selector, number, view.kinds, view.namespaces);
        }
        let made = Made::new(key, policies, own, selectors, view.kinds, places);
        let written = made
            .check(self.free(kernel.room()), places)
            .map_err(anyhow::Error::new)
            .and_then(|()| write(kernel, number, &made.content));
        if let Err(error) = written {
            for selector in &asked {
                selectors.unuse_in(selector, number);
            }
            return Err(error);
        }
        made.rules()
            .flat_map(named_by)
            .for_each(|place| places.use_in(place, number));
        self.rules += made.content.rules.len();
        self.blocks += made.content.blocks.len();
        let ids = made.policies.iter().map(|row| row.policy.id.clone());
        names.set_set(number, ids.collect());
        self.by_key.insert(made.key.clone(), number);
        let installed = Installed {
            made,
            users: 1,
            right: true,
        };
        self.by_number.insert(number, installed);
        Ok(number)
    }

    /// One more user of a set that has one.
    pub fn share(&mut self, number: u32) {
        if let Some(installed) = self.by_number.get_mut(&number) {
            installed.users += 1;
        }
    }

    /// One user less. What nobody uses goes with the next [`sweep`](Self::sweep).
    pub fn release(&mut self, selectors: &mut Selectors, places: &mut Places, number: u32) {
        let Some(installed) = self.by_number.get_mut(&number) else {
            return;
        };
        installed.users -= 1;
        if installed.users > 0 {
            return;
        }
        let Some(installed) = self.by_number.remove(&number) else {
            return;
        };
        if installed.right {
            self.by_key.remove(&installed.made.key);
        }
        for selector in installed.made.rules().flat_map(asked_by) {
            selectors.unuse_in(&selector, number);
        }
        for place in installed.made.rules().flat_map(named_by) {
            places.unuse_in(place, number);
        }
        self.retired.push((number, installed.made.content));
    }

    /// Whether there are sets that nobody uses.
    pub fn has_retired(&self) -> bool {
        !self.retired.is_empty()
    }

    /// The sets that nobody uses now.
    pub fn retired(&self) -> Vec<u32> {
        self.retired.iter().map(|(number, _)| *number).collect()
    }

    /// Removes these from the kernel, by which no packet is judged any more.
    pub fn sweep<K: PolicyKernel>(
        &mut self,
        kernel: &mut K,
        names: &Names,
        numbers: &[u32],
    ) -> Result<()> {
        let mut outcome = Ok(());
        let (rules, blocks) = (&mut self.rules, &mut self.blocks);
        self.retired.retain(|(number, content)| {
            if !numbers.contains(number) {
                return true;
            }
            names.remove_set(*number);
            match erase(kernel, *number, content) {
                Ok(()) => {
                    *rules -= content.rules.len();
                    *blocks -= content.blocks.len();
                    false
                }
                // It is tried again with the next one.
                Err(error) => {
                    outcome = Err(error);
                    true
                }
            }
        });
        outcome
    }

    /// These are not what their keys say any more.
    pub fn mark_wrong(&mut self, numbers: impl IntoIterator<Item = u32>) {
        for number in numbers {
            if let Some(installed) = self.by_number.get_mut(&number) {
                if std::mem::replace(&mut installed.right, false) {
                    self.by_key.remove(&installed.made.key);
                }
            }
        }
    }

    /// Gives a set the entries of a kind of pods that nobody has met yet.
    pub fn meet<K: PolicyKernel>(
        &mut self,
        kernel: &mut K,
        selectors: &Selectors,
        number: u32,
        identity: u32,
        kind: &Kind,
    ) -> Result<()> {
        let free = self.free(kernel.room());
        let Some(installed) = self.by_number.get_mut(&number) else {
            return Ok(());
        };
        let made = &mut installed.made;
        let parts = parts(&made.policies, made.key.direction, made.key.tier);
        let more = Content::of_pod(&parts, &made.own, identity, kind, selectors);
        if more.rules.len() > free.rules {
            return Err(Full {
                what: "entries",
                needed: more.rules.len(),
                free: free.rules,
                most: made.most(None),
            }
            .into());
        }
        self.take_in(kernel, number, more)
    }

    /// Gives a set what it must have for addresses that resolvers gave names of its rules. Where that fails, the set is
    /// wrong: another is to take its place.
    pub fn learn<K: PolicyKernel>(
        &mut self,
        kernel: &mut K,
        places: &Places,
        number: u32,
        addresses: &[IpAddr],
    ) -> Result<()> {
        for address in addresses {
            let free = self.free(kernel.room());
            let Some(installed) = self.by_number.get_mut(&number) else {
                return Ok(());
            };
            let made = &installed.made;
            let parts = made.parts();
            let Some(more) = made.content.of_address(&parts, &made.own, *address, places) else {
                continue;
            };
            made.check_size(&more, free, places)?;
            self.take_in(kernel, number, more)?;
        }
        Ok(())
    }

    /// Takes addresses that names lost from a set, as far as other rules do not mean them. No flow goes to them: those that
    /// were judged stay judged.
    pub fn forget<K: PolicyKernel>(
        &mut self,
        kernel: &mut K,
        places: &Places,
        number: u32,
        addresses: &BTreeSet<IpAddr>,
    ) -> Result<()> {
        for address in addresses {
            let Some(installed) = self.by_number.get_mut(&number) else {
                return Ok(());
            };
            let made = &installed.made;
            let parts = made.parts();
            let left = made
                .content
                .without_address(&parts, &made.own, *address, places);
            let Some((mut more, class)) = left else {
                continue;
            };
            match class {
                Some(class) => {
                    more.blocks.insert((*address).into(), class);
                    self.take_in(kernel, number, more)?;
                }
                None => {
                    kernel.remove_block(number, (*address).into())?;
                    installed.made.content.give_up_address(*address);
                    self.blocks -= 1;
                }
            }
        }
        Ok(())
    }

    /// Writes what a set gets besides: entries first, then that there are such, then what leads to them.
    fn take_in<K: PolicyKernel>(
        &mut self,
        kernel: &mut K,
        number: u32,
        more: Content,
    ) -> Result<()> {
        let Some(installed) = self.by_number.get_mut(&number) else {
            return Ok(());
        };
        let content = &mut installed.made.content;
        let entries: Vec<(RuleKey, Decision)> = more
            .rules
            .iter()
            .map(|(key, decision)| (keyed(number, *key), *decision))
            .collect();
        let before = (content.set(), content.rules.len(), content.blocks.len());
        kernel.set_rules(&entries)?;
        content.absorb(&more);
        self.rules += content.rules.len() - before.1;
        self.blocks += content.blocks.len() - before.2;
        let after = content.set();
        if after != before.0 {
            kernel.set_set(number, after)?;
        }
        for (block, class) in &more.blocks {
            kernel.set_block(number, *block, *class)?;
        }
        Ok(())
    }

    /// Takes the entries of a kind of pods that is gone from a set.
    pub fn part<K: PolicyKernel>(
        &mut self,
        kernel: &mut K,
        selectors: &Selectors,
        number: u32,
        identity: u32,
        kind: &Kind,
    ) -> Result<()> {
        let Some(installed) = self.by_number.get_mut(&number) else {
            return Ok(());
        };
        let made = &mut installed.made;
        let parts = parts(&made.policies, made.key.direction, made.key.tier);
        let less = Content::of_pod(&parts, &made.own, identity, kind, selectors);
        let keys: Vec<RuleKey> = less.rules.keys().map(|key| keyed(number, *key)).collect();
        kernel.remove_rules(&keys)?;
        let before = made.content.rules.len();
        made.content.give_up(&less);
        self.rules -= before - made.content.rules.len();
        Ok(())
    }
}

/// Writes a set that is new; what did not fit leaves nothing behind.
fn write<K: PolicyKernel>(kernel: &mut K, number: u32, content: &Content) -> Result<()> {
    let mut entries: Vec<(RuleKey, Decision)> = content
        .rules
        .iter()
        .map(|(key, decision)| (keyed(number, *key), *decision))
        .collect();
    // For those who follow what is written.
    entries.sort_unstable();
    let written = kernel.set_rules(&entries).and_then(|()| {
        for (block, class) in &content.blocks {
            kernel.set_block(number, *block, *class)?;
        }
        kernel.set_set(number, content.set())
    });
    written
        .context("could not write a set of rules")
        .inspect_err(|_| {
            if let Err(second) = erase(kernel, number, content) {
                warn!(
                    error = format!("{second:#}"),
                    "half a set of rules stays in the kernel, unused"
                );
            }
        })
}

fn erase<K: PolicyKernel>(kernel: &mut K, number: u32, content: &Content) -> Result<()> {
    kernel.remove_set(number)?;
    let keys: Vec<RuleKey> = content
        .rules
        .keys()
        .map(|key| keyed(number, *key))
        .collect();
    kernel.remove_rules(&keys)?;
    for block in content.blocks.keys() {
        kernel.remove_block(number, *block)?;
    }
    Ok(())
}
