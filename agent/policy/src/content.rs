//! What a set holds: exact entries that the kernel finds by lookups, and the classes of addresses.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use hashbrown::HashMap;
use ipnet::IpNet;
use xebec_dataplane_common::policy::{
    ALLOW, DENY, Decision, IDENTITY_WORLD, NO_SHAPE, PASS, RuleKey, SET_ALLOWS, SET_DENIES,
    SET_FIRST, SHAPE_CLASS, SHAPE_IDENTITY, SHAPE_PORT, SHAPE_PROTOCOL, SHAPES, Set,
    VERDICT_ACTION, port_bits,
};

use crate::blocks::classes;
use crate::kind::{Kind, Kinds};
use crate::places::Places;
use crate::rule::{Action, Direction, Peer, Ports, Rule};
use crate::selectors::Selectors;

/// A rule of a set.
#[derive(Clone, Copy, Debug)]
pub struct Part<'a> {
    /// The rule.
    pub rule: &'a Rule,
    /// Its number.
    pub number: u32,
    /// 0 for the strongest.
    pub rank: u32,
}

impl Part<'_> {
    fn decision(&self) -> Decision {
        let action = match self.rule.action {
            Action::Allow => ALLOW,
            Action::Deny => DENY,
            Action::Pass => PASS,
        };
        Decision {
            verdict: self.rank * (VERDICT_ACTION + 1) + action,
            rule: self.number,
        }
    }
}

/// What is asked of a set.
#[derive(Clone, Copy, Debug)]
pub struct Question {
    /// Address of the peer.
    pub address: IpAddr,
    /// Its identity.
    pub identity: u32,
    /// IP protocol number.
    pub protocol: u8,
    /// Port of the destination; of ICMP, type and code.
    pub port: u16,
}

/// A set as the kernel has it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Content {
    /// Entries (their `set` is 0).
    pub rules: HashMap<RuleKey, Decision>,
    /// Address blocks and their classes.
    pub blocks: BTreeMap<IpNet, u32>,
    /// Whose blocks hold the addresses of a class, from that of class 1 on: twice a rule's place, and 1 more where pods
    /// and nodes are not meant.
    members: Vec<Vec<usize>>,
    /// How many entries are of a shape.
    shapes: BTreeMap<u8, usize>,
    flags: u32,
}

/// A part of what a rule's ports are: protocol (0 for any), port and how many of its bits count.
pub(crate) type Piece = (u8, u16, u8);

/// The pieces of a range of ports: each fixes some high bits.
fn range(first: u16, last: u16) -> impl Iterator<Item = (u16, u8)> {
    let (mut at, last) = (u32::from(first), u32::from(last));
    std::iter::from_fn(move || {
        if at > last {
            return None;
        }
        let mut size = 0;
        while size < 16 && at % (2 << size) == 0 && at + (2 << size) - 1 <= last {
            size += 1;
        }
        let piece = (at as u16, 16 - size);
        at += 1 << size;
        Some(piece)
    })
}

/// What a rule's ports are where the destination is of this kind, which resolves their names. A name that it does not
/// have stands for nothing.
pub(crate) fn pieces(ports: &[Ports], destination: Option<&Kind>) -> Vec<Piece> {
    let mut found = Vec::new();
    for one in ports {
        match one {
            Ports::All => found.push((0, 0, 0)),
            Ports::Protocol(protocol) => found.push((*protocol, 0, 0)),
            Ports::Range {
                protocol,
                first,
                last,
            } => found.extend(range(*first, *last).map(|(port, bits)| (*protocol, port, bits))),
            Ports::Named { protocol, name } => {
                let own = destination.iter().flat_map(|kind| &kind.ports);
                let own = own.filter(|(called, over, _)| **called == **name && over == protocol);
                found.extend(own.map(|(_, over, port)| (*over, *port, 16)));
            }
            // The type stands in the higher byte of what is a port elsewhere.
            Ports::Icmp { protocol, kind } => found.push((*protocol, u16::from(*kind) << 8, 8)),
        }
    }
    found
}

/// Whether a rule needs to know what pods it is about, though it is about everybody: they give ports their names.
fn asks_everybody(rule: &Rule) -> bool {
    rule.direction == Direction::Egress
        && rule
            .ports
            .iter()
            .any(|one| matches!(one, Ports::Named { .. }))
}

/// The selectors whose pods a rule has entries for.
pub fn selectors(rule: &Rule) -> impl Iterator<Item = std::sync::Arc<crate::selector::Selector>> {
    rule.peers.iter().filter_map(|peer| match peer {
        Peer::Pods(selector) => Some(selector.clone()),
        Peer::Anybody if asks_everybody(rule) => Some(Default::default()),
        _ => None,
    })
}

impl Content {
    /// The entries of rules for a pod of this kind; `denies` where what none of them decides is denied.
    pub fn new(
        parts: &[Part<'_>],
        own: &Kind,
        denies: bool,
        selectors: &Selectors,
        kinds: &Kinds,
        places: &Places,
    ) -> Self {
        let mut content = Self::default();
        let mut blocks = Vec::new();
        for (at, part) in parts.iter().enumerate() {
            for peer in &part.rule.peers {
                match peer {
                    Peer::Anybody => {
                        let named = (part.rule.direction == Direction::Ingress).then_some(own);
                        content.add(0, 0, &pieces(&part.rule.ports, named), part);
                    }
                    Peer::Identity(identity) => {
                        let named = (part.rule.direction == Direction::Ingress).then_some(own);
                        let pieces = pieces(&part.rule.ports, named);
                        content.add(*identity, SHAPE_IDENTITY, &pieces, part);
                    }
                    // Those for outsiders have entries of their own.
                    Peer::Block(_) | Peer::Place(_) => {
                        let all = places.blocks(peer, part.rule.action).into_iter();
                        blocks.extend(all.map(|one| (2 * at + usize::from(one.outside), one)));
                    }
                    Peer::Pods(_) | Peer::Services(_) => {}
                }
            }
            for selector in self::selectors(part.rule) {
                for identity in selectors.matching(&selector) {
                    if let Some(kind) = kinds.get(identity) {
                        content.add_pod(identity, kind, own, part);
                    }
                }
            }
        }
        let classes = classes(blocks.iter().map(|(owner, block)| (*owner, &**block)));
        for (class, owners) in (1..).zip(&classes.members) {
            content.add_class(class, owners, parts, own);
        }
        content.blocks = classes.prefixes;
        content.members = classes.members;
        let verdict = parts.first().map(|part| part.decision().verdict);
        let alike = parts
            .iter()
            .all(|part| Some(part.decision().verdict) == verdict);
        let allows = parts.iter().all(|part| part.rule.action == Action::Allow);
        for (flag, has) in [
            (SET_DENIES, denies),
            (SET_FIRST, alike),
            (SET_ALLOWS, alike && allows),
        ] {
            content.flags |= if has { flag } else { 0 };
        }
        content
    }

    /// The entries that the rules have for one kind of pods, and no others.
    pub fn of_pod(
        parts: &[Part<'_>],
        own: &Kind,
        identity: u32,
        kind: &Kind,
        selectors: &Selectors,
    ) -> Self {
        let mut content = Self::default();
        for part in parts {
            if self::selectors(part.rule).any(|selector| selectors.has(&selector, identity)) {
                content.add_pod(identity, kind, own, part);
            }
        }
        content
    }

    fn add_class(&mut self, class: u32, owners: &[usize], parts: &[Part<'_>], own: &Kind) {
        for owner in owners {
            let Some(part) = parts.get(owner / 2) else {
                continue;
            };
            let shape = match owner % 2 {
                0 => SHAPE_CLASS,
                _ => SHAPE_CLASS | SHAPE_IDENTITY,
            };
            let named = (part.rule.direction == Direction::Ingress).then_some(own);
            self.add(class, shape, &pieces(&part.rule.ports, named), part);
        }
    }

    /// What it must have besides for an address that resolvers gave names of these rules: entries, and the address with
    /// its class. Nothing where it has that.
    pub fn of_address(
        &self,
        parts: &[Part<'_>],
        own: &Kind,
        address: IpAddr,
        places: &Places,
    ) -> Option<Self> {
        let class = self.class(address);
        let before = (class as usize).checked_sub(1);
        let before = before.and_then(|at| self.members.get(at));
        let mut owners = before.cloned().unwrap_or_default();
        let had = owners.len();
        for (at, part) in parts.iter().enumerate() {
            let mut peers = part.rule.peers.iter();
            if peers.any(|peer| places.is_domain_of(peer, address))
                && !owners.contains(&(2 * at + 1))
            {
                owners.push(2 * at + 1);
            }
        }
        if owners.len() == had {
            return None;
        }
        owners.sort_unstable();
        let (mut more, class) = self.with_class(owners, parts, own);
        more.blocks.insert(address.into(), class);
        Some(more)
    }

    /// The class that an address has now that names lost it, and what that must have besides; no class where the address
    /// is as those around it. Nothing where it has none of its own.
    pub fn without_address(
        &self,
        parts: &[Part<'_>],
        own: &Kind,
        address: IpAddr,
        places: &Places,
    ) -> Option<(Self, Option<u32>)> {
        self.blocks.get(&IpNet::from(address))?;
        let mut owners = BTreeSet::new();
        for (at, part) in parts.iter().enumerate() {
            let peers = part.rule.peers.iter();
            let has = peers.filter_map(|peer| places.has(peer, part.rule.action, address));
            owners.extend(has.map(|outside| 2 * at + usize::from(outside)));
        }
        let owners: Vec<usize> = owners.into_iter().collect();
        let around = (self.class_up_to(address, 1) as usize).checked_sub(1);
        let around = around.and_then(|at| self.members.get(at));
        if around.map_or(&[][..], |all| all) == owners {
            return Some((Self::default(), None));
        }
        let (more, class) = self.with_class(owners, parts, own);
        Some((more, Some(class)))
    }

    /// The class of those whom these blocks hold, and what it must have besides.
    fn with_class(&self, owners: Vec<usize>, parts: &[Part<'_>], own: &Kind) -> (Self, u32) {
        let mut more = Self::default();
        if owners.is_empty() {
            return (more, 0);
        }
        let known = self.members.iter().position(|all| *all == owners);
        let class = known.unwrap_or(self.members.len()) as u32 + 1;
        if known.is_none() {
            more.add_class(class, &owners, parts, own);
            more.members.push(owners);
        }
        (more, class)
    }

    /// Gives an address up, which then is as those around it.
    pub fn give_up_address(&mut self, address: IpAddr) {
        self.blocks.remove(&IpNet::from(address));
    }

    /// The class of an address; 0 for none.
    fn class(&self, address: IpAddr) -> u32 {
        self.class_up_to(address, 0)
    }

    /// The same by prefixes that leave so many bits open at least.
    fn class_up_to(&self, address: IpAddr, open: u8) -> u32 {
        let longest = if address.is_ipv4() { 32 } else { 128 };
        let prefixes = (0..=longest - open).rev();
        let blocks = prefixes.filter_map(|bits| IpNet::new(address, bits).ok());
        let mut found = blocks.filter_map(|block| self.blocks.get(&block.trunc()));
        found.next().copied().unwrap_or(0)
    }

    fn add_pod(&mut self, identity: u32, kind: &Kind, own: &Kind, part: &Part<'_>) {
        let destination = match part.rule.direction {
            Direction::Ingress => own,
            Direction::Egress => kind,
        };
        let pieces = pieces(&part.rule.ports, Some(destination));
        self.add(identity, SHAPE_IDENTITY, &pieces, part);
    }

    /// Adds entries for one peer; of several rules, the strongest has it.
    fn add(&mut self, peer: u32, shape: u8, pieces: &[Piece], part: &Part<'_>) {
        let decision = part.decision();
        for (protocol, port, bits) in pieces {
            let key = RuleKey {
                set: 0,
                peer,
                port: port_bits(port.to_be(), *bits),
                protocol: *protocol,
                shape: shape | bits | if *protocol == 0 { 0 } else { SHAPE_PROTOCOL },
            };
            self.insert(key, decision);
        }
    }

    fn insert(&mut self, key: RuleKey, decision: Decision) {
        match self.rules.entry(key) {
            hashbrown::hash_map::Entry::Occupied(mut there) => {
                if decision.verdict < there.get().verdict {
                    there.insert(decision);
                }
            }
            hashbrown::hash_map::Entry::Vacant(place) => {
                place.insert(decision);
                *self.shapes.entry(key.shape).or_default() += 1;
            }
        }
    }

    /// Takes in what a new kind of pods, or a new address, has.
    pub fn absorb(&mut self, more: &Self) {
        for (key, decision) in &more.rules {
            self.insert(*key, *decision);
        }
        self.blocks.extend(&more.blocks);
        self.members.extend_from_slice(&more.members);
    }

    /// Gives entries up that a kind of pods had which is gone.
    pub fn give_up(&mut self, less: &Self) {
        for key in less.rules.keys() {
            if self.rules.remove(key).is_some() {
                if let Some(count) = self.shapes.get_mut(&key.shape) {
                    *count -= 1;
                }
            }
        }
        self.shapes.retain(|_, count| *count > 0);
    }

    /// Whether a piece of a rule's ports is about what is asked.
    pub(crate) fn fits((protocol, port, bits): Piece, asked: Question) -> bool {
        (protocol == 0 || protocol == asked.protocol)
            && port_bits(asked.port.to_be(), bits) == port_bits(port.to_be(), bits)
    }

    /// Whether what no entry decides is denied.
    pub fn denies(&self) -> bool {
        self.flags & SET_DENIES != 0
    }

    /// As the kernel is told of it.
    pub fn set(&self) -> Set {
        let mut shapes = [NO_SHAPE; SHAPES];
        for (slot, shape) in shapes.iter_mut().zip(self.shapes.keys().rev()) {
            *slot = *shape;
        }
        Set {
            shapes,
            flags: self.flags,
        }
    }

    /// What the entries decide, looked up as the kernel does.
    pub fn decide(&self, asked: Question) -> Option<Decision> {
        let class = self.class(asked.address);
        let found = self.shapes.keys().rev().filter_map(|shape| {
            let peer = match shape & (SHAPE_IDENTITY | SHAPE_CLASS) {
                0 => 0,
                SHAPE_IDENTITY => asked.identity,
                _ if class == 0 => return None,
                SHAPE_CLASS => class,
                _ if asked.identity == IDENTITY_WORLD => class,
                _ => return None,
            };
            let protocol = if shape & SHAPE_PROTOCOL == 0 {
                0
            } else {
                asked.protocol
            };
            self.rules.get(&RuleKey {
                set: 0,
                peer,
                port: port_bits(asked.port.to_be(), shape & SHAPE_PORT),
                protocol,
                shape: *shape,
            })
        });
        let mut found = found.copied();
        if self.flags & SET_FIRST != 0 {
            return found.next();
        }
        found.min_by_key(|decision| decision.verdict)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_are_covered_exactly_by_few_pieces() {
        for (first, last) in [
            (1, 65_535),
            (80, 80),
            (79, 8_081),
            (1_024, 2_047),
            (0, 65_535),
        ] {
            let pieces: Vec<_> = range(first, last).collect();
            assert!(pieces.len() <= 30, "{first}-{last}: {pieces:?}");
            for port in 0..=u16::MAX {
                let within = pieces
                    .iter()
                    .filter(|(start, bits)| port_bits(port.to_be(), *bits) == start.to_be())
                    .count();
                assert_eq!(
                    within,
                    usize::from((first..=last).contains(&port)),
                    "{port}"
                );
            }
        }
    }
}
