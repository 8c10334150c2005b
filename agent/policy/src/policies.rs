//! The policies that there are, in their present versions.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use hashbrown::HashMap;

use crate::kind::{Kind, Relevant};
use crate::names::{Names, RuleName};
use crate::rule::{Direction, Place, Policy, PolicyRef, Ports, RuleId, Seat};
use crate::selector::Labels;

/// A version of a policy.
#[derive(Debug)]
pub struct Row {
    /// Number of the version; another version has another one.
    pub number: u32,
    /// What it says.
    pub policy: Policy,
    /// Numbers of its rules.
    pub rules: Vec<u32>,
    /// Where its sets are.
    pub seat: Seat,
}

impl Row {
    /// Whether what it lets out depends on what resolvers answer.
    pub fn names_domains(&self) -> bool {
        let mut places = self.policy.rules.iter().flat_map(crate::places::places);
        places.any(|place| matches!(place, Place::Domains(_)))
    }

    /// Whether what it lets in depends on what its pods call their ports.
    pub fn asks_for_own_ports(&self) -> bool {
        let mut rules = self.policy.rules.iter();
        rules.any(|rule| {
            rule.direction == Direction::Ingress
                && rule
                    .ports
                    .iter()
                    .any(|one| matches!(one, Ports::Named { .. }))
        })
    }
}

/// What an object said, and what it says now.
#[derive(Debug)]
pub struct Versions {
    /// The versions before.
    pub before: Vec<Arc<Row>>,
    /// The versions after.
    pub after: Vec<Arc<Row>>,
}

/// All of them.
#[derive(Debug, Default)]
pub struct Policies {
    rows: BTreeMap<u32, Arc<Row>>,
    by_id: BTreeMap<Arc<PolicyRef>, Vec<u32>>,
    by_namespace: HashMap<String, BTreeSet<u32>>,
    /// Those whose pods may be of any namespace.
    wide: BTreeSet<u32>,
    /// Those for nodes.
    nodes: BTreeSet<u32>,
    /// Numbers of rules, as long as their policy is there.
    rules: BTreeMap<RuleId, u32>,
    next: u32,
    next_rule: u32,
    /// Which labels count without being asked for.
    pub(crate) labels: Relevant,
    /// How often each of the others is asked for.
    asked: BTreeMap<String, usize>,
}

impl Policies {
    /// Takes what an object says now, which may be several policies; none if it is gone. Nothing where it says
    /// what it said. `kinds` tells for how many kinds of this node's pods a policy is.
    pub fn set(
        &mut self,
        id: &Arc<PolicyRef>,
        policies: Vec<Policy>,
        names: &Names,
        kinds: impl Fn(&Policy) -> usize,
    ) -> Option<Versions> {
        let before: Vec<Arc<Row>> = self.of(id).cloned().collect();
        if before.iter().map(|row| &row.policy).eq(&policies) {
            return None;
        }
        for row in &before {
            self.rows.remove(&row.number);
            self.wide.remove(&row.number);
            self.nodes.remove(&row.number);
            if let Some(namespace) = row.policy.subject.namespace() {
                if let Some(all) = self.by_namespace.get_mut(namespace) {
                    all.remove(&row.number);
                    if all.is_empty() {
                        self.by_namespace.remove(namespace);
                    }
                }
            }
            self.ask(&row.policy, |count| *count -= 1);
        }
        self.by_id.remove(id);
        let after: Vec<Arc<Row>> = policies
            .into_iter()
            .map(|policy| {
                let seat = Seat::of(&policy, kinds(&policy));
                self.add(policy, seat, names)
            })
            .collect();
        if after.is_empty() {
            self.rules.retain(|rule, number| {
                let there = rule.policy != *id;
                if !there {
                    names.remove_rule(*number);
                }
                there
            });
        } else {
            let numbers = after.iter().map(|row| row.number).collect();
            self.by_id.insert(id.clone(), numbers);
        }
        Some(Versions { before, after })
    }

    fn add(&mut self, policy: Policy, seat: Seat, names: &Names) -> Arc<Row> {
        let mut rules = Vec::new();
        for rule in &policy.rules {
            let id = policy.rule_id(rule);
            let number = match self.rules.get(&id) {
                Some(number) => *number,
                None => {
                    self.next_rule = self.next_rule.wrapping_add(1).max(1);
                    self.rules.insert(id.clone(), self.next_rule);
                    self.next_rule
                }
            };
            // It may have changed where it stands.
            names.set_rule(number, RuleName::new(id, rule));
            rules.push(number);
        }
        self.ask(&policy, |count| *count += 1);
        self.next += 1;
        let number = self.next;
        match policy.subject.namespace() {
            _ if policy.for_nodes => drop(self.nodes.insert(number)),
            Some(namespace) => {
                let all = self.by_namespace.entry(namespace.to_owned()).or_default();
                all.insert(number);
            }
            None => drop(self.wide.insert(number)),
        }
        let row = Arc::new(Row {
            number,
            seat,
            policy,
            rules,
        });
        self.rows.insert(number, row.clone());
        row
    }

    fn ask(&mut self, policy: &Policy, change: impl Fn(&mut usize)) {
        let peers = policy.rules.iter().flat_map(crate::content::selectors);
        let subject = (!policy.for_nodes).then(|| policy.subject.clone());
        for selector in peers.chain(subject) {
            for label in selector.labels() {
                if !self.labels.has(label) {
                    change(self.asked.entry(label.to_owned()).or_default());
                }
            }
        }
        self.asked.retain(|_, uses| *uses > 0);
    }

    /// The labels that count because a policy asks for them.
    pub fn asked(&self) -> BTreeSet<String> {
        self.asked.keys().cloned().collect()
    }

    /// Whether a policy asks for a label that would not count otherwise.
    pub fn asks(&self, label: &str) -> bool {
        self.asked.contains_key(label)
    }

    /// The present versions of an object's policies.
    pub fn of(&self, id: &PolicyRef) -> impl Iterator<Item = &Arc<Row>> {
        let numbers = self.by_id.get(id).into_iter().flatten();
        numbers.filter_map(|number| self.rows.get(number))
    }

    /// One version.
    pub fn get(&self, number: u32) -> Option<&Arc<Row>> {
        self.rows.get(&number)
    }

    /// All objects.
    pub fn ids(&self) -> impl Iterator<Item = &Arc<PolicyRef>> {
        self.by_id.keys()
    }

    /// The numbers of those that are for pods of this kind.
    pub fn about(&self, kind: &Kind, namespace: Option<&Labels>) -> BTreeSet<u32> {
        let near = self.by_namespace.get(&kind.namespace);
        near.into_iter()
            .flatten()
            .chain(&self.wide)
            .filter(|number| {
                let row = self.rows.get(number);
                row.is_some_and(|row| row.policy.subject.selects(kind, namespace))
            })
            .copied()
            .collect()
    }

    /// The numbers of those that are for nodes with these labels.
    pub fn about_node(&self, labels: &Labels) -> BTreeSet<u32> {
        let all = self.nodes.iter();
        all.filter(|number| {
            let row = self.rows.get(number);
            row.is_some_and(|row| row.policy.subject.selects_labels(labels))
        })
        .copied()
        .collect()
    }

    /// Of these, the ones that have a say at a seat in a direction, in the order in which they are asked.
    pub fn chosen(
        &self,
        numbers: &BTreeSet<u32>,
        seat: Seat,
        direction: Direction,
        audit: bool,
    ) -> Vec<Arc<Row>> {
        let mut rows: Vec<&Arc<Row>> = numbers
            .iter()
            .filter_map(|number| self.rows.get(number))
            .filter(|row| {
                row.seat == seat && row.policy.judges(direction) && (audit || !row.policy.audit)
            })
            .collect();
        // Of one priority, the API leaves open who comes first: here it is by name.
        fn place(row: &Row) -> impl Ord {
            let id = &row.policy.id;
            (row.policy.priority, &id.name, id, row.number)
        }
        rows.sort_unstable_by(|a, b| place(a).cmp(&place(b)));
        rows.into_iter().cloned().collect()
    }
}
