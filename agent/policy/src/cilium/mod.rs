//! `cilium.io/v2` CiliumNetworkPolicy, CiliumClusterwideNetworkPolicy and CiliumCIDRGroup.

use std::collections::BTreeMap;
use std::sync::Arc;

use serde_json::Value;

use crate::object::{self, audit, fields, list};
use crate::rule::{Action, Direction, Peer, Place, Policy, PolicyRef, Ports, Rule, Source, Tier};
use crate::selector::Selector;

pub mod group;
mod labels;
mod peers;
mod ports;

/// Reads a CiliumNetworkPolicy: `spec` and each of `specs` are a policy, and the places of their rules count on. What
/// can't be understood is an error, and lets nothing through meanwhile: a rule that allows is left out, one that denies
/// denies everything, and a policy of which it is not known whom it is for isolates everybody.
pub fn read(policy: &Value) -> (Vec<Policy>, Vec<String>) {
    read_as(object::id(Source::CiliumNetworkPolicy, policy), policy)
}

/// Reads a CiliumClusterwideNetworkPolicy, in the same way.
pub fn read_clusterwide(policy: &Value) -> (Vec<Policy>, Vec<String>) {
    read_as(
        object::id(Source::CiliumClusterwideNetworkPolicy, policy),
        policy,
    )
}

fn read_as(id: PolicyRef, object: &Value) -> (Vec<Policy>, Vec<String>) {
    let mut reader = Reader {
        id: Arc::new(id),
        audit: audit(object),
        before: BTreeMap::new(),
        policies: Vec::new(),
        errors: Vec::new(),
    };
    let several = list(object, "specs").unwrap_or_else(|error| {
        reader.deny_all(error);
        None
    });
    if object["spec"].is_null()
        && reader.errors.is_empty()
        && several.is_none_or(<[Value]>::is_empty)
    {
        reader
            .errors
            .push("there is neither spec nor specs; write one".to_owned());
    }
    if !object["spec"].is_null() {
        reader.spec(&object["spec"], "spec");
    }
    for (at, spec) in several.into_iter().flatten().enumerate() {
        reader.spec(spec, &format!("specs[{at}]"));
    }
    (reader.policies, reader.errors)
}

/// The lists of rules that a spec has.
const LISTS: [(Direction, Action, &str); 4] = [
    (Direction::Ingress, Action::Allow, "ingress"),
    (Direction::Ingress, Action::Deny, "ingressDeny"),
    (Direction::Egress, Action::Allow, "egress"),
    (Direction::Egress, Action::Deny, "egressDeny"),
];

/// The fields of a spec.
const KNOWN: [&str; 9] = [
    "endpointSelector",
    "nodeSelector",
    "ingress",
    "ingressDeny",
    "egress",
    "egressDeny",
    "enableDefaultDeny",
    "labels",
    "description",
];

struct Reader {
    id: Arc<PolicyRef>,
    audit: bool,
    /// How many rules each list has in the specs that were read.
    before: BTreeMap<&'static str, usize>,
    policies: Vec<Policy>,
    errors: Vec<String>,
}

impl Reader {
    /// Stands in for a spec of which nothing is understood.
    fn deny_all(&mut self, error: String) {
        self.errors
            .push(format!("{error}; all is denied to all pods until then"));
        let denying = LISTS
            .into_iter()
            .filter(|(_, action, _)| *action == Action::Deny);
        let rules = denying.map(|(direction, _, name)| Rule::deny_all(direction, name, 0));
        let subject = labels::all(&self.id.namespace);
        self.add(subject, false, [true, true], rules.collect());
    }

    fn add(&mut self, subject: Selector, for_nodes: bool, isolates: [bool; 2], rules: Vec<Rule>) {
        self.policies.push(Policy {
            id: self.id.clone(),
            tier: Tier::Network,
            priority: 0,
            subject: Arc::new(subject),
            for_nodes,
            isolates,
            audit: self.audit,
            rules,
        });
    }

    fn spec(&mut self, spec: &Value, path: &str) {
        if !spec.is_object() {
            return self.deny_all(format!("{path}: is no object; write one"));
        }
        let told = self.errors.len();
        let mut found = Vec::new();
        let mut isolates = [false, false];
        for (direction, action, name) in LISTS {
            let first = self.before.get(name).copied().unwrap_or_default();
            let rules = list(spec, name).unwrap_or_else(|error| {
                self.errors
                    .push(format!("{path}.{error}; all is denied until then"));
                isolates[direction.index()] = true;
                if action == Action::Deny {
                    found.push(Rule::deny_all(direction, name, first));
                }
                None
            });
            let rules = rules.unwrap_or_default();
            isolates[direction.index()] |= !rules.is_empty();
            for (at, one) in rules.iter().enumerate() {
                let index = first + at;
                match rule(one, direction, action, &self.id.namespace) {
                    Ok((peers, ports)) => found.push(Rule {
                        direction,
                        list: name,
                        index,
                        action,
                        peers,
                        ports,
                    }),
                    Err(error) if action == Action::Deny => {
                        self.errors.push(format!(
                            "{path}.{name}[{at}]{error}; the rule denies everything until then"
                        ));
                        found.push(Rule::deny_all(direction, name, index));
                    }
                    Err(error) => self.errors.push(format!(
                        "{path}.{name}[{at}]{error}; the rule lets nothing through"
                    )),
                }
            }
            self.before.insert(name, first + rules.len());
        }
        for direction in Direction::ALL {
            isolates[direction.index()] &= self.denies_by_default(spec, path, direction);
        }
        if !spec["nodeSelector"].is_null() && spec["endpointSelector"].is_null() {
            return self.node_spec(spec, path, isolates, found, told);
        }
        if let Some(subject) = self.subject(spec, path, &mut found) {
            self.add(subject, false, isolates, found);
        }
    }

    /// A spec for nodes. Where something of it is not understood (more than so many errors), it is for none: what closes
    /// nodes to the API that could mend it must be meant.
    fn node_spec(
        &mut self,
        spec: &Value,
        path: &str,
        isolates: [bool; 2],
        rules: Vec<Rule>,
        told: usize,
    ) {
        if let Some(field) = fields(spec).find(|one| !KNOWN.contains(one)) {
            self.errors
                .push(format!("{path}.{field}: is not known; leave it out"));
        }
        if self.id.source.is_namespaced() {
            self.errors.push(format!(
                "{path}.nodeSelector: only a CiliumClusterwideNetworkPolicy can be for nodes; use one"
            ));
        }
        let names = |rule: &Rule| {
            crate::places::places(rule).any(|place| matches!(place, Place::Domains(_)))
        };
        if rules.iter().any(names) {
            self.errors.push(format!(
                "{path}.egress: what resolvers tell nodes is not known, so only rules for pods can have toFQDNs; use toCIDR"
            ));
        }
        let subject = labels::of_others(&spec["nodeSelector"])
            .map_err(|error| format!("{path}.nodeSelector: {error}"));
        match subject {
            Ok(subject) if self.errors.len() == told => self.add(subject, true, isolates, rules),
            Ok(_) => self.errors.push(format!(
                "{path}.nodeSelector: not all of the policy is understood; it is for no node"
            )),
            Err(error) => self.errors.push(format!("{error}; it is for no node")),
        }
    }

    /// What `enableDefaultDeny` says of a direction that has rules.
    fn denies_by_default(&mut self, spec: &Value, path: &str, direction: Direction) -> bool {
        let word = direction.name().to_ascii_lowercase();
        match &spec["enableDefaultDeny"][&word] {
            Value::Null => true,
            Value::Bool(said) => *said,
            other => {
                self.errors.push(format!(
                    "{path}.enableDefaultDeny.{word}: {other} is neither true nor false; write one of them; it counts as true until then"
                ));
                true
            }
        }
    }

    /// The pods that a spec is for, if it is for pods. Where that is not known, its rules that allow are left out.
    fn subject(&mut self, spec: &Value, path: &str, rules: &mut Vec<Rule>) -> Option<Selector> {
        let namespace = &self.id.namespace;
        let strange = fields(spec).find(|one| !KNOWN.contains(one));
        let subject = match strange {
            Some(field) => Err(format!("{field}: is not known; leave it out")),
            None if !spec["nodeSelector"].is_null() => Err(
                "nodeSelector: can't be together with endpointSelector; leave it out".to_owned(),
            ),
            None => labels::subject(&spec["endpointSelector"], namespace)
                .map_err(|error| format!("endpointSelector: {error}")),
        };
        subject.unwrap_or_else(|error| {
            self.errors.push(format!(
                "{path}.{error}; until then it is for all pods, and its rules that allow count for nothing"
            ));
            rules.retain(|rule| rule.action == Action::Deny);
            Some(labels::all(namespace))
        })
    }
}

/// Whom and what a rule is about.
fn rule(
    rule: &Value,
    direction: Direction,
    action: Action,
    namespace: &str,
) -> Result<(Vec<Peer>, Vec<Ports>), String> {
    if !rule.is_object() {
        return Err(": is no rule; write {} for nobody".to_owned());
    }
    let peers = peers::read(rule, direction, action, namespace)?;
    let ports = ports::read(rule)?;
    // One that says nothing is about nobody: it is there to isolate.
    Ok(match (peers, ports) {
        (Some(peers), Some(ports)) => (peers, ports),
        (Some(peers), None) => (peers, vec![Ports::All]),
        (None, Some(ports)) => (vec![Peer::Anybody], ports),
        (None, None) => (Vec::new(), vec![Ports::All]),
    })
}

#[cfg(test)]
mod tests;
