//! Addresses that rules name by what they are of: nodes, the API server, groups of blocks.

use std::borrow::Cow;
use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::Arc;

use hashbrown::{HashMap, HashSet};
use ipnet::{IpNet, Ipv4Net, Ipv6Net};

use crate::domains::{Domains, Pattern, Told};
use crate::rule::{Action, Block, Peer, Place, Rule};
use crate::selector::Labels;

/// What of a Node rules look at.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Node {
    labels: Labels,
    addresses: Vec<IpAddr>,
}

/// A group of address blocks.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Group {
    /// Its blocks.
    pub blocks: Vec<IpNet>,
    /// Whether that is all of them: what denies a group that is not understood denies everybody outside.
    pub whole: bool,
}

/// All of them, and the sets that were made of them.
#[derive(Debug, Default)]
pub struct Places {
    nodes: BTreeMap<String, Node>,
    api_server: BTreeSet<IpAddr>,
    groups: BTreeMap<Arc<str>, Group>,
    domains: Domains,
    sets: HashMap<Place, HashSet<u32>>,
}

/// The places that a rule names.
pub fn places(rule: &Rule) -> impl Iterator<Item = &Place> {
    rule.peers.iter().filter_map(|peer| match peer {
        Peer::Place(place) => Some(place),
        _ => None,
    })
}

fn one(address: IpAddr) -> Block {
    Block {
        cidr: address.into(),
        except: Vec::new(),
        outside: false,
    }
}

impl Places {
    /// The blocks that a peer is, if it is addresses.
    pub fn blocks<'a>(&self, peer: &'a Peer, action: Action) -> Vec<Cow<'a, Block>> {
        let place = match peer {
            Peer::Block(block) => return vec![Cow::Borrowed(block)],
            Peer::Place(place) => place,
            _ => return Vec::new(),
        };
        let blocks: Vec<Block> = match place {
            Place::Nodes(selector) => self
                .nodes
                .values()
                .filter(|node| selector.selects_labels(&node.labels))
                .flat_map(|node| node.addresses.iter().copied().map(one))
                .collect(),
            Place::ApiServer => self.api_server.iter().copied().map(one).collect(),
            Place::Domains(pattern) => {
                let all = self.domains.of(pattern).into_iter();
                all.map(|one| outside(one.into(), Vec::new())).collect()
            }
            Place::Group { name, except } => self.group(name, except, action),
        };
        blocks.into_iter().map(Cow::Owned).collect()
    }

    /// A group that is not there has no blocks.
    fn group(&self, name: &str, except: &[IpNet], action: Action) -> Vec<Block> {
        let Some(group) = self.groups.get(name) else {
            return Vec::new();
        };
        if action == Action::Deny && !group.whole {
            let all = [IpNet::V4(Ipv4Net::default()), IpNet::V6(Ipv6Net::default())];
            return all.map(|cidr| outside(cidr, Vec::new())).into();
        }
        let left = group.blocks.iter().filter(|block| {
            let mut holes = except.iter();
            !holes.any(|hole| hole.contains(*block))
        });
        left.map(|cidr| {
            let holes = except.iter().filter(|hole| cidr.contains(*hole));
            outside(*cidr, holes.copied().collect())
        })
        .collect()
    }

    /// How many address blocks and exceptions a peer is.
    pub fn size(&self, peer: &Peer, action: Action) -> usize {
        let blocks = self.blocks(peer, action);
        blocks.iter().map(|block| 1 + block.except.len()).sum()
    }

    /// Takes a node; no addresses remove it. The sets that are no longer right.
    pub fn set_node(&mut self, name: &str, labels: Labels, addresses: &[IpAddr]) -> HashSet<u32> {
        let node = Node {
            labels,
            addresses: addresses.to_vec(),
        };
        let after = (!addresses.is_empty()).then(|| node.clone());
        let before = match addresses {
            [] => self.nodes.remove(name),
            _ => self.nodes.insert(name.to_owned(), node),
        };
        let selected = |place: &Place, node: &Option<Node>| match (place, node) {
            (Place::Nodes(selector), Some(node)) if selector.selects_labels(&node.labels) => {
                node.addresses.clone()
            }
            _ => Vec::new(),
        };
        self.wrong(|place| selected(place, &before) != selected(place, &after))
    }

    /// The labels of a node.
    pub fn labels(&self, node: &str) -> Labels {
        let node = self.nodes.get(node);
        node.map(|node| node.labels.clone()).unwrap_or_default()
    }

    /// Takes the addresses of the API server. The sets that are no longer right.
    pub fn set_api_server(&mut self, addresses: BTreeSet<IpAddr>) -> HashSet<u32> {
        let changed = self.api_server != addresses;
        self.api_server = addresses;
        self.wrong(|place| changed && *place == Place::ApiServer)
    }

    /// Takes a group; none removes it. The sets that are no longer right.
    pub fn set_group(&mut self, name: &str, group: Option<Group>) -> HashSet<u32> {
        let before = match &group {
            Some(group) => self.groups.insert(name.into(), group.clone()),
            None => self.groups.remove(name),
        };
        let changed = before != group;
        self.wrong(|place| {
            changed && matches!(place, Place::Group { name: own, .. } if **own == *name)
        })
    }

    /// Takes what a name was told to be. The sets with rules about it, to which its addresses are to be added; and the
    /// addresses that names lost for it.
    pub fn learn(&mut self, name: &str, told: &[Told]) -> (HashSet<u32>, BTreeSet<IpAddr>) {
        let patterns: Vec<&Pattern> = self
            .sets
            .keys()
            .filter_map(|place| match place {
                Place::Domains(pattern) => Some(&**pattern),
                _ => None,
            })
            .collect();
        let wanted = |name: &str| patterns.iter().any(|pattern| pattern.matches(name));
        let lost = self.domains.learn(name, told, wanted);
        let about = |place: &Place| matches!(place, Place::Domains(one) if one.matches(name));
        (self.wrong(about), lost)
    }

    /// Forgets what resolvers told that ended before `now` and is not used any more; the addresses that names lost.
    pub fn expire(&mut self, now: u64, used: impl Fn(IpAddr) -> bool) -> BTreeSet<IpAddr> {
        self.domains.expire(now, used)
    }

    /// The sets with rules about domains.
    pub fn about_domains(&self) -> HashSet<u32> {
        self.wrong(|place| matches!(place, Place::Domains(_)))
    }

    /// The names that resolvers told of.
    pub fn domains(&self) -> &Domains {
        &self.domains
    }

    /// Whether a peer is addresses, this one among them; of those that are, whether only outsiders are meant.
    pub fn has(&self, peer: &Peer, action: Action, address: IpAddr) -> Option<bool> {
        let blocks = self.blocks(peer, action);
        let own = blocks.iter().find(|block| {
            let mut holes = block.except.iter();
            block.cidr.contains(&address) && !holes.any(|hole| hole.contains(&address))
        });
        own.map(|block| block.outside)
    }

    /// Whether a peer is domains, one of which has an address.
    pub fn is_domain_of(&self, peer: &Peer, address: IpAddr) -> bool {
        matches!(peer, Peer::Place(Place::Domains(pattern)) if self.domains.has(pattern, address))
    }

    /// Names of all groups that are known.
    pub fn groups(&self) -> impl Iterator<Item = &Arc<str>> {
        self.groups.keys()
    }

    fn wrong(&self, is: impl Fn(&Place) -> bool) -> HashSet<u32> {
        let wrong = self.sets.iter().filter(|(place, _)| is(place));
        wrong.flat_map(|(_, sets)| sets.iter().copied()).collect()
    }

    /// Notes that a set is made of a place.
    pub fn use_in(&mut self, place: &Place, set: u32) {
        self.sets.entry(place.clone()).or_default().insert(set);
    }

    /// Notes that a set is gone.
    pub fn unuse_in(&mut self, place: &Place, set: u32) {
        if let Some(sets) = self.sets.get_mut(place) {
            sets.remove(&set);
            if sets.is_empty() {
                self.sets.remove(place);
            }
        }
    }
}

fn outside(cidr: IpNet, except: Vec<IpNet>) -> Block {
    Block {
        cidr,
        except,
        outside: true,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::selector::{Key, Selector, Test};

    fn block(text: &str) -> IpNet {
        text.parse().unwrap()
    }

    fn texts(places: &Places, place: &Place, action: Action) -> Vec<String> {
        let peer = Peer::Place(place.clone());
        let blocks = places.blocks(&peer, action).into_iter();
        let text = |one: Cow<'_, Block>| format!("{}{:?}{}", one.cidr, one.except, one.outside);
        blocks.map(text).collect()
    }

    #[test]
    fn nodes_are_found_by_their_labels() {
        let zone = |value: &str| Labels::from([("zone".to_owned(), value.to_owned())]);
        let of = |value: &str| {
            let values = BTreeSet::from([value.to_owned()]);
            let asked = (Key::Label("zone".to_owned()), Test::In(values));
            Place::Nodes(Arc::new(Selector::from_iter([asked])))
        };
        let mut places = Places::default();
        places.use_in(&of("a"), 7);
        places.use_in(&of("b"), 8);
        let addresses = ["192.0.2.1".parse().unwrap(), "fd00::1".parse().unwrap()];
        assert_eq!(places.set_node("n", zone("a"), &addresses), [7].into());
        assert_eq!(places.set_node("n", zone("a"), &addresses), [].into());
        assert_eq!(
            texts(&places, &of("a"), Action::Allow),
            ["192.0.2.1/32[]false", "fd00::1/128[]false"]
        );
        assert_eq!(places.set_node("n", zone("b"), &addresses), [7, 8].into());
        assert_eq!(places.set_node("n", zone("b"), &addresses[..1]), [8].into());
        places.unuse_in(&of("b"), 8);
        assert_eq!(places.set_node("n", Labels::new(), &[]), [].into());
        assert_eq!(places.nodes.len(), 0);
    }

    #[test]
    fn the_api_server_is_where_it_is_said_to_be() {
        let mut places = Places::default();
        places.use_in(&Place::ApiServer, 7);
        let addresses = BTreeSet::from(["192.0.2.1".parse().unwrap()]);
        assert_eq!(places.set_api_server(addresses.clone()), [7].into());
        assert_eq!(places.set_api_server(addresses), [].into());
        assert_eq!(
            texts(&places, &Place::ApiServer, Action::Allow),
            ["192.0.2.1/32[]false"]
        );
    }

    #[test]
    fn a_group_that_is_not_whole_is_denied_with_all_that_is_outside() {
        let group = |except: &[&str]| Place::Group {
            name: "g".into(),
            except: except.iter().map(|one| block(one)).collect(),
        };
        let mut places = Places::default();
        places.use_in(&group(&[]), 7);
        assert_eq!(texts(&places, &group(&[]), Action::Deny), [""; 0]);
        let mut own = Group {
            blocks: vec![block("10.0.0.0/8"), block("192.0.2.0/24")],
            whole: true,
        };
        assert_eq!(places.set_group("g", Some(own.clone())), [7].into());
        assert_eq!(places.set_group("other", Some(own.clone())), [].into());
        assert_eq!(
            texts(
                &places,
                &group(&["10.1.0.0/16", "192.0.0.0/8"]),
                Action::Deny
            ),
            ["10.0.0.0/8[10.1.0.0/16]true"]
        );
        own.whole = false;
        assert_eq!(places.set_group("g", Some(own)), [7].into());
        assert_eq!(
            texts(&places, &group(&["10.1.0.0/16"]), Action::Deny),
            ["0.0.0.0/0[]true", "::/0[]true"]
        );
        assert_eq!(texts(&places, &group(&[]), Action::Allow).len(), 2);
        assert_eq!(places.set_group("g", None), [7].into());
        assert_eq!(places.groups().count(), 1);
    }
}
