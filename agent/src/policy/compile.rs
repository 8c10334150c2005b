//! From policies to the set of rules of one pod and direction: exact entries that the kernel finds by lookups.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use ipnet::IpNet;
use k8s_openapi::api::networking::v1::{
    NetworkPolicy, NetworkPolicyPeer, NetworkPolicyPort, NetworkPolicySpec,
};
use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;
use xebec_dataplane_common::policy::{
    NO_SHAPE, RuleKey, SHAPE_CLASS, SHAPE_IDENTITY, SHAPE_PORT, SHAPE_PROTOCOL, SHAPES, Set,
    port_bits,
};

use super::selector::{Labels, matches};

/// Namespace and name.
pub type Name = (String, String);

/// Which way packets go, seen from the pod.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Direction {
    /// To the pod.
    Ingress,
    /// From the pod.
    Egress,
}

impl Direction {
    /// As policyTypes name it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Ingress => "Ingress",
            Self::Egress => "Egress",
        }
    }
}

/// Everything that makes pods alike to policies: namespace, labels, named ports.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Kind {
    /// Namespace.
    pub namespace: String,
    /// Labels.
    pub labels: Labels,
    /// Names of the containers' ports, each with protocol and number.
    pub ports: BTreeSet<(String, u8, u16)>,
}

/// Where a rule stands.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct RuleId {
    /// The policy.
    pub policy: Name,
    /// Under ingress or egress.
    pub direction: Direction,
    /// Its place there, from 0.
    pub index: usize,
}

/// A compiled set.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Compiled {
    /// Entries (their `set` is 0) and the rule of each.
    pub rules: BTreeMap<RuleKey, RuleId>,
    /// Address blocks and their classes.
    pub cidrs: BTreeMap<IpNet, u32>,
    /// The policies that isolate the pod: what no rule allows is denied by them.
    pub policies: Vec<Name>,
}

/// What is known of the cluster.
pub struct View<'a> {
    /// All policies.
    pub policies: &'a BTreeMap<Name, NetworkPolicySpec>,
    /// Labels of all namespaces.
    pub namespaces: &'a BTreeMap<String, Labels>,
    /// All kinds of pods, and their identities.
    pub identities: &'a BTreeMap<Kind, u32>,
}

/// Why a policy can't be compiled.
#[derive(Debug, PartialEq, Eq)]
pub struct Refused {
    /// The policy.
    pub policy: Name,
    /// What is wrong with it.
    pub why: String,
}

/// The number of a protocol.
pub fn protocol(name: Option<&str>) -> u8 {
    match name {
        Some("UDP") => 17,
        Some("SCTP") => 132,
        _ => 6,
    }
}

/// Whether a policy isolates in a direction (`spec.policyTypes` and its default).
pub fn isolates(spec: &NetworkPolicySpec, direction: Direction) -> bool {
    match &spec.policy_types {
        Some(types) if !types.is_empty() => types.iter().any(|one| one == direction.name()),
        _ => {
            direction == Direction::Ingress
                || spec.egress.as_ref().is_some_and(|all| !all.is_empty())
        }
    }
}

/// Ports that a rule allows: protocol (0 for any), port and how many of its bits count.
type Ports = Vec<(u8, u16, u8)>;

/// The blocks of a range of ports: each fixes some high bits.
fn port_range(first: u16, last: u16) -> Vec<(u16, u8)> {
    let (mut at, last, mut blocks) = (u32::from(first), u32::from(last), Vec::new());
    while at <= last {
        let mut size = 0;
        while size < 16 && at % (2 << size) == 0 && at + (2 << size) - 1 <= last {
            size += 1;
        }
        blocks.push((at as u16, 16 - size));
        at += 1 << size;
    }
    blocks
}

/// What a rule's ports are on a pod of this kind, which resolves their names.
fn ports(list: Option<&Vec<NetworkPolicyPort>>, kind: Option<&Kind>) -> Result<Ports, String> {
    let Some(list) = list.filter(|list| !list.is_empty()) else {
        return Ok(vec![(0, 0, 0)]);
    };
    let mut found = Ports::new();
    for one in list {
        let protocol = protocol(one.protocol.as_deref());
        match &one.port {
            None => found.push((protocol, 0, 0)),
            Some(IntOrString::Int(first)) => {
                let number = |value: i32| {
                    u16::try_from(value)
                        .ok()
                        .filter(|port| *port > 0)
                        .ok_or_else(|| format!("port {value} is not between 1 and 65535"))
                };
                let first = number(*first)?;
                let last = one.end_port.map_or(Ok(first), number)?;
                if last < first {
                    return Err(format!("endPort {last} is below port {first}"));
                }
                let blocks = port_range(first, last);
                found.extend(
                    blocks
                        .into_iter()
                        .map(|(port, bits)| (protocol, port, bits)),
                );
            }
            // A name that the pod does not have allows nothing.
            Some(IntOrString::String(name)) => found.extend(
                kind.iter()
                    .flat_map(|kind| &kind.ports)
                    .filter(|(own, over, _)| own == name && *over == protocol)
                    .map(|(_, over, port)| (*over, *port, 16)),
            ),
        }
    }
    Ok(found)
}

/// An address block with its exceptions.
struct Block {
    cidr: IpNet,
    except: Vec<IpNet>,
    rule: RuleId,
    ports: Ports,
}

impl Block {
    fn holds(&self, prefix: IpNet) -> bool {
        self.cidr.contains(&prefix) && !self.except.iter().any(|hole| hole.contains(&prefix))
    }
}

fn parse_block(text: &str) -> Result<IpNet, String> {
    text.parse::<IpNet>()
        .map(|block| block.trunc())
        .map_err(|_| format!("{text:?} is no address block (such as 192.0.2.0/24)"))
}

/// Compiles the set of a pod in one direction; none where no policy isolates it.
pub fn compile(
    view: &View<'_>,
    pod: &Kind,
    direction: Direction,
) -> Result<Option<Compiled>, Refused> {
    let mut set = Compiled::default();
    let mut blocks = Vec::new();
    for (name, spec) in view.policies {
        let selected = spec
            .pod_selector
            .as_ref()
            .is_none_or(|selector| matches(selector, &pod.labels));
        if name.0 != pod.namespace || !selected || !isolates(spec, direction) {
            continue;
        }
        set.policies.push(name.clone());
        let refused = |why: String| Refused {
            policy: name.clone(),
            why,
        };
        type Peers<'a> = Option<&'a Vec<NetworkPolicyPeer>>;
        type Listed<'a> = Option<&'a Vec<NetworkPolicyPort>>;
        let rules: Vec<(Peers<'_>, Listed<'_>)> = match direction {
            Direction::Ingress => spec
                .ingress
                .iter()
                .flatten()
                .map(|rule| (rule.from.as_ref(), rule.ports.as_ref()))
                .collect(),
            Direction::Egress => spec
                .egress
                .iter()
                .flatten()
                .map(|rule| (rule.to.as_ref(), rule.ports.as_ref()))
                .collect(),
        };
        for (index, (peers, listed)) in rules.into_iter().enumerate() {
            let rule = RuleId {
                policy: name.clone(),
                direction,
                index,
            };
            // Named ports are the destination's: the pod's own for ingress, the peer's for egress; a block of
            // addresses has none.
            let of = |peer: Option<&Kind>| {
                let kind = match direction {
                    Direction::Ingress => Some(pod),
                    Direction::Egress => peer,
                };
                ports(listed, kind).map_err(refused)
            };
            let Some(peers) = peers.filter(|peers| !peers.is_empty()) else {
                let named = listed
                    .into_iter()
                    .flatten()
                    .any(|one| matches!(one.port, Some(IntOrString::String(_))));
                add(&mut set, 0, 0, &of(None)?, &rule);
                if direction == Direction::Egress && named {
                    for (kind, identity) in view.identities {
                        add(&mut set, *identity, SHAPE_IDENTITY, &of(Some(kind))?, &rule);
                    }
                }
                continue;
            };
            for peer in peers {
                if let Some(block) = &peer.ip_block {
                    let cidr = parse_block(&block.cidr).map_err(refused)?;
                    let except = block
                        .except
                        .iter()
                        .flatten()
                        .map(|hole| parse_block(hole).map_err(refused));
                    blocks.push(Block {
                        cidr,
                        except: except.collect::<Result<Vec<_>, _>>()?,
                        rule: rule.clone(),
                        ports: of(None)?,
                    });
                    continue;
                }
                for (kind, identity) in view.identities {
                    if is_peer(view, peer, &pod.namespace, kind) {
                        add(&mut set, *identity, SHAPE_IDENTITY, &of(Some(kind))?, &rule);
                    }
                }
            }
        }
    }
    if set.policies.is_empty() {
        return Ok(None);
    }
    add_blocks(&mut set, &blocks);
    let shapes = set
        .rules
        .keys()
        .map(|key| key.shape)
        .collect::<BTreeSet<u8>>()
        .len();
    if shapes > SHAPES {
        let policy = set.policies.first().cloned().unwrap_or_default();
        let why = format!(
            "its port ranges and those of other policies of the pod need {shapes} kinds of lookups, of which the kernel makes {SHAPES}; use fewer or rounder ranges"
        );
        return Err(Refused { policy, why });
    }
    Ok(Some(set))
}

fn is_peer(view: &View<'_>, peer: &NetworkPolicyPeer, own: &str, kind: &Kind) -> bool {
    let namespace = match &peer.namespace_selector {
        None => kind.namespace == own,
        Some(selector) => view
            .namespaces
            .get(&kind.namespace)
            .is_some_and(|labels| matches(selector, labels)),
    };
    namespace
        && peer
            .pod_selector
            .as_ref()
            .is_none_or(|selector| matches(selector, &kind.labels))
}

/// Adds entries for one peer; the first rule that allows keeps the entry.
fn add(set: &mut Compiled, peer: u32, shape: u8, ports: &Ports, rule: &RuleId) {
    for (protocol, port, bits) in ports {
        let shape = shape | bits | if *protocol == 0 { 0 } else { SHAPE_PROTOCOL };
        let key = RuleKey {
            set: 0,
            peer,
            port: port_bits(port.to_be(), *bits),
            protocol: *protocol,
            shape,
        };
        set.rules.entry(key).or_insert_with(|| rule.clone());
    }
}

/// Each prefix that a block or an exception names gets the class of the blocks that hold it, so that the longest
/// prefix of an address tells all of them at once.
fn add_blocks(set: &mut Compiled, blocks: &[Block]) {
    let mut prefixes: BTreeSet<IpNet> = blocks
        .iter()
        .flat_map(|block| block.except.iter().chain([&block.cidr]))
        .copied()
        .collect();
    // In the kernel's table IPv4 is a part of IPv6: a wide block of IPv6 must not hold it.
    if prefixes.iter().any(|prefix| matches!(prefix, IpNet::V6(_))) {
        prefixes.insert(IpNet::V4(ipnet::Ipv4Net::default()));
    }
    let mut classes = BTreeMap::<Vec<usize>, u32>::new();
    for prefix in prefixes {
        let holding: Vec<usize> = blocks
            .iter()
            .enumerate()
            .filter(|(_, block)| block.holds(prefix))
            .map(|(at, _)| at)
            .collect();
        let next = classes.len() as u32 + 1;
        let class = if holding.is_empty() {
            0
        } else {
            *classes.entry(holding).or_insert(next)
        };
        set.cidrs.insert(prefix, class);
    }
    for (holding, class) in classes {
        for block in holding.iter().filter_map(|at| blocks.get(*at)) {
            add(set, class, SHAPE_CLASS, &block.ports, &block.rule);
        }
    }
}

impl Compiled {
    /// The kinds of lookups, the most specific first.
    pub fn shapes(&self) -> Set {
        let used: BTreeSet<u8> = self.rules.keys().map(|key| key.shape).collect();
        let mut shapes = [NO_SHAPE; SHAPES];
        for (slot, shape) in shapes.iter_mut().zip(used.into_iter().rev()) {
            *slot = shape;
        }
        Set { shapes }
    }

    /// The rule that allows, found as the kernel finds it.
    pub fn judge(&self, peer: IpAddr, identity: u32, protocol: u8, port: u16) -> Option<&RuleId> {
        let class = self
            .cidrs
            .iter()
            .filter(|(block, _)| block.contains(&peer))
            .max_by_key(|(block, _)| block.prefix_len())
            .map_or(0, |(_, class)| *class);
        self.shapes()
            .shapes
            .iter()
            .take_while(|shape| **shape != NO_SHAPE)
            .find_map(|shape| {
                let peer = match shape & (SHAPE_IDENTITY | SHAPE_CLASS) {
                    SHAPE_IDENTITY => identity,
                    SHAPE_CLASS if class == 0 => return None,
                    SHAPE_CLASS => class,
                    _ => 0,
                };
                let protocol = if shape & SHAPE_PROTOCOL == 0 {
                    0
                } else {
                    protocol
                };
                let port = port_bits(port.to_be(), shape & SHAPE_PORT);
                self.rules.get(&RuleKey {
                    set: 0,
                    peer,
                    port,
                    protocol,
                    shape: *shape,
                })
            })
    }
}

/// Name of a policy.
pub fn name_of(policy: &NetworkPolicy) -> Name {
    (
        policy.metadata.namespace.clone().unwrap_or_default(),
        policy.metadata.name.clone().unwrap_or_default(),
    )
}

#[cfg(test)]
mod tests;
