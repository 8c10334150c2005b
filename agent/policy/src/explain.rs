//! Explains a verdict: asks the sets that the kernel has, one after the other as the kernel does, and says what they
//! answer and what would have to be different.

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::sync::Arc;

use anyhow::{Result, bail};
use serde::Serialize;
use xebec_dataplane_common::policy::{
    ALLOW, DENY, Decision, IDENTITY_HOST, IDENTITY_REMOTE_NODE, IDENTITY_WORLD, VERDICT_ACTION,
};

use crate::content::{Content, Question, pieces};
use crate::domains;
use crate::engine::{Engine, set_key};
use crate::kernel::PolicyKernel;
use crate::kind::Kind;
use crate::policies::Row;
use crate::rule::{Action, Direction, Name, Peer, RuleId, Tier};
use crate::sets::Made;

/// An end of a flow.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Party {
    /// A pod.
    Pod(Name),
    /// A node.
    Node(String),
    /// Whoever has an address.
    Address(IpAddr),
    /// Whom resolvers gave this name.
    Domain(String),
}

/// What is asked.
#[derive(Clone, Debug)]
pub struct Asked {
    /// Who begins.
    pub from: Party,
    /// With whom.
    pub to: Party,
    /// IP protocol number.
    pub protocol: u8,
    /// Port of the destination; of ICMP, type and code.
    pub port: u16,
    /// Only of this family; the first that both have otherwise.
    pub v4: Option<bool>,
}

/// What became of it.
#[derive(Clone, Debug, Serialize)]
pub struct Explanation {
    /// Whether the first packet arrives.
    pub allowed: bool,
    /// Who begins, and its address.
    pub from: String,
    /// With whom, and its address.
    pub to: String,
    /// What the beginner's side says.
    pub egress: Side,
    /// What the other side says.
    pub ingress: Side,
}

/// One side's verdict.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Side {
    /// Whether it lets the flow through.
    pub allowed: bool,
    /// Why, in words.
    pub why: String,
    /// The rule that decided, if one did.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub rule: Option<String>,
    /// The policies that were asked, tier by tier.
    pub asked: Vec<Step>,
    /// What would let it through, where it is not let through.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub remedies: Vec<String>,
    /// What policies in audit mode would have done.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub audit: Option<String>,
    #[serde(skip)]
    decided_by: Option<RuleId>,
}

impl Side {
    /// The rule that decided, if one did.
    pub fn decided_by(&self) -> Option<&RuleId> {
        self.decided_by.as_ref()
    }
}

/// A tier that was asked.
#[derive(Clone, Debug, Serialize)]
pub struct Step {
    /// Its name.
    pub tier: String,
    /// Its set in the kernel; none for a pod of another node, whose set was made for this answer.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub set: Option<u32>,
    /// Its policies.
    pub policies: Vec<String>,
    /// What it said.
    pub said: String,
}

/// An end as it was found.
struct Found<'a> {
    name: String,
    address: IpAddr,
    /// Its name, kind, node and identity, where it is a pod that policies can be for.
    pod: Option<(&'a Name, &'a Arc<Kind>, &'a str, u32)>,
    /// The node that it is.
    node: Option<String>,
}

impl<K: PolicyKernel> Engine<K> {
    /// Explains what becomes of a flow.
    pub fn explain(&self, asked: &Asked) -> Result<Explanation> {
        let (from, to) = (
            self.addresses_of(&asked.from)?,
            self.addresses_of(&asked.to)?,
        );
        let fits = |one: &&IpAddr| asked.v4.is_none_or(|v4| one.is_ipv4() == v4);
        let pair = from.iter().filter(fits).find_map(|from| {
            let other = to.iter().find(|to| to.is_ipv4() == from.is_ipv4());
            other.map(|to| (*from, *to))
        });
        let Some((from, to)) = pair else {
            bail!("{from:?} and {to:?} have no family of addresses in common");
        };
        let (from, to) = (self.found(&asked.from, from), self.found(&asked.to, to));
        let egress = self.side(&from, &to, Direction::Egress, asked);
        let ingress = self.side(&to, &from, Direction::Ingress, asked);
        Ok(Explanation {
            allowed: egress.allowed && ingress.allowed,
            from: from.name,
            to: to.name,
            egress,
            ingress,
        })
    }

    fn addresses_of(&self, party: &Party) -> Result<Vec<IpAddr>> {
        let addresses = match party {
            Party::Pod(name) => match self.pods.get(name) {
                None => bail!("there is no pod {}/{}", name.0, name.1),
                Some(row) if row.view.kind.is_none() => bail!(
                    "the pod {}/{} has ended, or is of its node's network: ask for the node {}",
                    name.0,
                    name.1,
                    row.view.node
                ),
                Some(row) => row.view.addresses.clone(),
            },
            Party::Node(name) => match self.nodes.get(name) {
                None => bail!("there is no node {name}"),
                Some(addresses) => addresses.clone(),
            },
            Party::Address(address) => vec![*address],
            Party::Domain(name) => {
                let addresses = self.places.domains().addresses(&domains::plain(name));
                if addresses.is_empty() {
                    bail!(
                        "no resolver told pods of this node that are under rules for domains of {name} (see `xebec fqdn list`); ask for an address"
                    );
                }
                addresses
            }
        };
        if addresses.is_empty() {
            bail!("{party:?} has no address yet");
        }
        Ok(addresses)
    }

    fn found(&self, party: &Party, address: IpAddr) -> Found<'_> {
        let named = match party {
            Party::Pod(name) => self.pods.get_key_value(name),
            Party::Node(_) => None,
            Party::Address(_) | Party::Domain(_) => self
                .pods
                .iter()
                .find(|(_, row)| row.view.addresses.contains(&address)),
        };
        let pod = named.and_then(|(name, row)| {
            let identity = row.identity?;
            let kind = self.kinds.get(identity)?;
            Some((name, kind, row.view.node.as_str(), identity))
        });
        let node = match party {
            Party::Node(name) => Some(name.clone()),
            _ => {
                let mut nodes = self.nodes.iter();
                let has = nodes.find(|(_, addresses)| addresses.contains(&address));
                let own = self.local_addresses.contains(&address);
                has.map(|(name, _)| name.clone())
                    .or_else(|| own.then(|| self.node_name.clone()))
            }
        };
        let name = match (&pod, &node) {
            (Some((name, ..)), _) => format!("pod {}/{} ({address})", name.0, name.1),
            (None, Some(node)) => format!("node {node} ({address})"),
            (None, None) => match party {
                Party::Domain(name) => format!("{name} ({address}), outside of the cluster"),
                _ => format!("{address}, outside of the cluster"),
            },
        };
        Found {
            name,
            address,
            pod,
            node,
        }
    }

    /// What the rules of one end say of the other.
    fn side(&self, own: &Found<'_>, peer: &Found<'_>, direction: Direction, asked: &Asked) -> Side {
        let Some((name, kind, node, identity)) = own.pod else {
            if let Some(node) = &own.node {
                return self.node_side(node, own, peer, direction, asked);
            }
            return Side {
                allowed: true,
                why: format!("no policy is for {}", own.name),
                ..Side::default()
            };
        };
        let here = peer.node.as_deref().is_some_and(|peer| peer == node);
        if direction == Direction::Ingress && here {
            return Side {
                allowed: true,
                why: "a node always reaches its own pods".to_owned(),
                ..Side::default()
            };
        }
        let question = question(peer, here, asked);
        let destination = match direction {
            Direction::Ingress => Some(&**kind),
            Direction::Egress => peer.pod.map(|(_, kind, ..)| &**kind),
        };
        let local = self.locals.get(&identity);
        let numbers = local.map_or_else(
            || {
                let namespace = self.namespaces.get(&kind.namespace);
                self.policies.about(kind, namespace)
            },
            |local| local.policies.clone(),
        );
        let audited_pod = self.pods.get(name).is_some_and(|row| row.view.audit);
        let enforced = (!audited_pod).then_some(&numbers);
        let numbers = (enforced, &numbers);
        self.judge((kind, numbers), direction, question, destination, peer)
    }

    /// What a node's own rules say of the other end.
    fn node_side(
        &self,
        node: &str,
        own: &Found<'_>,
        peer: &Found<'_>,
        direction: Direction,
        asked: &Asked,
    ) -> Side {
        let always = |why: String| Side {
            allowed: true,
            why,
            ..Side::default()
        };
        let pod_here = peer.pod.is_some_and(|(_, _, home, _)| home == node);
        let itself = peer.node.as_deref() == Some(node);
        if itself || pod_here && direction == Direction::Egress {
            return always("a node always reaches itself and its own pods".to_owned());
        }
        let labels = self.places.labels(node);
        let numbers = self.policies.about_node(&labels);
        if numbers.is_empty() {
            return always(format!("no policy is for {}", own.name));
        }
        let kind = Kind {
            labels,
            ..Kind::default()
        };
        let destination = match direction {
            Direction::Ingress => Some(&kind),
            Direction::Egress => peer.pod.map(|(_, kind, ..)| &**kind),
        };
        let question = question(peer, false, asked);
        let numbers = (Some(&numbers), &numbers);
        self.judge((&kind, numbers), direction, question, destination, peer)
    }

    /// What policies do, none for a pod in audit mode, and what they would, were nothing in it.
    fn judge(
        &self,
        (kind, (enforced, whole)): (&Kind, (Option<&BTreeSet<u32>>, &BTreeSet<u32>)),
        direction: Direction,
        question: Question,
        destination: Option<&Kind>,
        peer: &Found<'_>,
    ) -> Side {
        let walk = |numbers, audit| {
            let own = (kind, numbers);
            self.walk(own, direction, audit, question, destination, peer)
        };
        let in_audit = || Side {
            allowed: true,
            why: "the pod is in audit mode".to_owned(),
            ..Side::default()
        };
        let mut side = enforced.map_or_else(in_audit, |numbers| walk(numbers, false));
        let whole = walk(whole, true);
        if side.allowed && !whole.allowed {
            side.audit = Some(format!("would be dropped: {}", whole.why));
        }
        side
    }

    fn walk(
        &self,
        (kind, numbers): (&Kind, &BTreeSet<u32>),
        direction: Direction,
        audit: bool,
        question: Question,
        destination: Option<&Kind>,
        peer: &Found<'_>,
    ) -> Side {
        let mut side = Side::default();
        for tier in Tier::ALL {
            let mut sets: Vec<Judge<'_>> = Vec::new();
            for seat in tier.seats() {
                let policies = self.policies.chosen(numbers, seat, direction, audit);
                if !policies.is_empty() {
                    sets.push(self.set_of(policies, kind, tier, direction));
                }
            }
            let mut best = None::<(Decision, &Judge<'_>)>;
            for there in &sets {
                let decision = there.content.decide(question);
                let policies = there.policies.iter();
                side.asked.push(Step {
                    tier: format!("{tier:?}"),
                    set: there.number(),
                    policies: policies.map(|row| row.policy.id.to_string()).collect(),
                    said: match decision {
                        // What that means, the tier's sets decide together.
                        None if sets.len() > 1 => "no rule of these is about it".to_owned(),
                        _ => said(decision, there),
                    },
                });
                if let Some(decision) = decision {
                    // Of two that are as strong, the first decides.
                    if best.is_none_or(|(before, _)| decision.verdict < before.verdict) {
                        best = Some((decision, there));
                    }
                }
            }
            let isolating = sets.iter().find(|there| there.content.denies());
            let allowed = match (best, isolating) {
                (Some((decision, _)), _) => match decision.verdict & VERDICT_ACTION {
                    ALLOW => true,
                    DENY => false,
                    _ => continue,
                },
                (None, Some(_)) => false,
                (None, None) => continue,
            };
            let by = best.map(|(_, there)| there).or(isolating);
            let rule = best.and_then(|(decision, there)| rule_of(&there.policies, decision.rule));
            side.allowed = allowed;
            side.why = by.map_or_else(String::new, |there| said(best.map(|(best, _)| best), there));
            if !allowed {
                side.remedies = match &rule {
                    Some(rule) => vec![format!(
                        "{rule} denies it: change that rule, or have one of higher precedence allow it"
                    )],
                    None => self.remedies(&sets, question, destination, peer),
                };
            }
            side.rule = rule.as_ref().map(ToString::to_string);
            side.decided_by = rule;
            return side;
        }
        side.allowed = true;
        side.why = if side.asked.is_empty() {
            format!(
                "no policy is for it in this direction ({})",
                direction.name()
            )
        } else {
            "no policy decides it, and none isolates the pod".to_owned()
        };
        side
    }

    /// The set of these policies: the one that is in the kernel with its number, or one as it would be.
    fn set_of(
        &self,
        policies: Vec<Arc<Row>>,
        kind: &Kind,
        tier: Tier,
        direction: Direction,
    ) -> Judge<'_> {
        let key = set_key(&policies, kind, tier, direction);
        let number = self.sets.find(&key);
        match number.and_then(|number| Some((number, self.sets.get(number)?))) {
            Some((number, there)) => Judge::Kernel(number, there),
            None => {
                let (kinds, places) = (&self.kinds, &self.places);
                let made = Made::new(key, policies, kind, &self.selectors, kinds, places);
                Judge::Nobody(Box::new(made))
            }
        }
    }

    /// What would have to be added, the nearest first.
    fn remedies(
        &self,
        sets: &[Judge<'_>],
        question: Question,
        destination: Option<&Kind>,
        peer: &Found<'_>,
    ) -> Vec<String> {
        let port = port_words(question.protocol, question.port);
        let mut near = Vec::new();
        let parts = sets.iter();
        let parts =
            parts.flat_map(|there| there.parts().into_iter().map(move |part| (there, part)));
        for (there, part) in parts.filter(|(_, part)| part.rule.action == Action::Allow) {
            let Some(rule) = rule_of(&there.policies, part.number) else {
                continue;
            };
            let named = pieces(&part.rule.ports, destination);
            let fits = named.iter().any(|piece| Content::fits(*piece, question));
            let means = part
                .rule
                .peers
                .iter()
                .any(|one| self.means(one, part.rule.action, question));
            if means && !fits {
                near.push(format!(
                    "{rule} is about this peer, but not {port}: add it to its ports"
                ));
            } else if fits && !means {
                near.push(format!(
                    "{rule} allows {port}, but to others: add a peer that means {}",
                    peer.name
                ));
            }
        }
        if near.is_empty() {
            let mut rows = sets.iter().flat_map(|there| &there.policies);
            let first = rows.next().map(|row| row.policy.id.to_string());
            near.push(format!(
                "add a rule for {} with {port}, for example to {}",
                peer.name,
                first.unwrap_or_default()
            ));
        }
        near
    }

    fn means(&self, peer: &Peer, action: Action, question: Question) -> bool {
        match peer {
            Peer::Anybody => true,
            Peer::Pods(selector) => self.selectors.has(selector, question.identity),
            Peer::Identity(identity) => *identity == question.identity,
            Peer::Services(_) => false,
            Peer::Block(_) | Peer::Place(_) => {
                let blocks = self.places.blocks(peer, action);
                blocks.iter().any(|block| {
                    let mut holes = block.except.iter();
                    block.cidr.contains(&question.address)
                        && !holes.any(|hole| hole.contains(&question.address))
                        && (!block.outside || question.identity == IDENTITY_WORLD)
                })
            }
        }
    }
}

/// What the rules of one end are asked about the other, which may be the node that the first is `here` on.
fn question(peer: &Found<'_>, here: bool, asked: &Asked) -> Question {
    Question {
        address: peer.address,
        identity: match (&peer.pod, &peer.node) {
            (Some((.., identity)), _) => *identity,
            (None, Some(_)) if here => IDENTITY_HOST,
            (None, Some(_)) => IDENTITY_REMOTE_NODE,
            (None, None) => IDENTITY_WORLD,
        },
        protocol: asked.protocol,
        port: asked.port,
    }
}

/// A set that is asked.
enum Judge<'a> {
    /// The one of this number, which the kernel has.
    Kernel(u32, &'a Made),
    /// As it would be: nobody of this node is under it.
    Nobody(Box<Made>),
}

impl Judge<'_> {
    fn number(&self) -> Option<u32> {
        match self {
            Self::Kernel(number, _) => Some(*number),
            Self::Nobody(_) => None,
        }
    }
}

impl std::ops::Deref for Judge<'_> {
    type Target = Made;

    fn deref(&self) -> &Made {
        match self {
            Self::Kernel(_, made) => made,
            Self::Nobody(made) => made,
        }
    }
}

/// What a set says by this decision.
fn said(decision: Option<Decision>, made: &Made) -> String {
    let rule = decision.and_then(|decision| rule_of(&made.policies, decision.rule));
    let action = decision.map(|decision| decision.verdict & VERDICT_ACTION);
    match (action, &rule) {
        (Some(ALLOW), Some(rule)) => format!("{rule} allows it"),
        (Some(DENY), Some(rule)) => format!("{rule} denies it"),
        (Some(_), Some(rule)) => format!("{rule} leaves it to the next tier"),
        _ if made.content.denies() => {
            "no rule allows it, and what none allows is denied".to_owned()
        }
        _ => "no rule is about it".to_owned(),
    }
}

/// Where the rule of this number stands.
fn rule_of(policies: &[Arc<Row>], number: u32) -> Option<RuleId> {
    policies.iter().find_map(|row| {
        let mut rules = row.policy.rules.iter().zip(&row.rules);
        let (rule, _) = rules.find(|(_, own)| **own == number)?;
        Some(row.policy.rule_id(rule))
    })
}

/// A port as it is written in commands.
fn port_words(protocol: u8, port: u16) -> String {
    use xebec_dataplane_common::{ICMP, ICMP6, SCTP, TCP, UDP};
    match protocol {
        TCP => format!("port {port}/TCP"),
        UDP => format!("port {port}/UDP"),
        SCTP => format!("port {port}/SCTP"),
        ICMP => format!("ICMP type {}", port >> 8),
        ICMP6 => format!("ICMPv6 type {}", port >> 8),
        other => format!("IP protocol {other}"),
    }
}
