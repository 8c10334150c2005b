//! Who owns whom, as far as the watches have told.

use std::collections::{HashMap, HashSet};

use k8s_openapi::apimachinery::pkg::apis::meta::v1::{ObjectMeta, OwnerReference};

pub(super) const FOREGROUND: &str = "foregroundDeletion";
pub(super) const ORPHAN: &str = "orphan";

/// Something to look at.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) enum Work {
    /// The object with this uid may have lost its owners.
    Dependent(String),
    /// The object with this uid is being deleted, and waits for its dependents to go, or to be let go.
    Owner(String),
}

impl std::fmt::Display for Work {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Dependent(uid) => write!(f, "dependent {uid}"),
            Self::Owner(uid) => write!(f, "owner {uid}"),
        }
    }
}

/// An object that is owned, or that waits for its dependents. Others are only known to be there.
#[derive(Clone, Debug)]
pub(super) struct Node {
    /// Index of its resource.
    pub resource: usize,
    pub namespace: String,
    pub name: String,
    pub owners: Vec<OwnerReference>,
    /// Being deleted in the foreground.
    pub foreground: bool,
    /// Being deleted with its dependents to be let go.
    pub orphan: bool,
}

#[derive(Default)]
pub(super) struct Graph {
    nodes: HashMap<String, Node>,
    dependents: HashMap<String, HashSet<String>>,
    /// Every object there is, with its resource's index. Sixteen bytes each, since these are many.
    alive: HashMap<u128, u16>,
}

/// A uid without its dashes; another form (nothing of ours makes one) is hashed.
fn number(uid: &str) -> u128 {
    let digits: String = uid.chars().filter(|c| *c != '-').collect();
    u128::from_str_radix(&digits, 16).unwrap_or_else(|_| {
        use std::hash::{DefaultHasher, Hash, Hasher};
        let mut hasher = DefaultHasher::new();
        uid.hash(&mut hasher);
        u128::from(hasher.finish())
    })
}

impl Graph {
    /// An object is there, new or changed; gives what is to be looked at.
    pub(super) fn set(&mut self, resource: usize, meta: &ObjectMeta) -> Vec<Work> {
        let Some(uid) = meta.uid.clone() else {
            return Vec::new();
        };
        self.alive
            .insert(number(&uid), u16::try_from(resource).unwrap_or(u16::MAX));
        self.unlink(&uid);
        let owners = meta.owner_references.clone().unwrap_or_default();
        let deleting = meta.deletion_timestamp.is_some();
        let finalizer = |name: &str| {
            meta.finalizers
                .iter()
                .flatten()
                .any(|finalizer| finalizer == name)
        };
        let node = Node {
            resource,
            namespace: meta.namespace.clone().unwrap_or_default(),
            name: meta.name.clone().unwrap_or_default(),
            foreground: deleting && finalizer(FOREGROUND),
            orphan: deleting && finalizer(ORPHAN),
            owners,
        };
        let mut work = Vec::new();
        if node.foreground || node.orphan {
            work.push(Work::Owner(uid.clone()));
        } else if node.owners.is_empty() {
            return work;
        }
        for owner in &node.owners {
            self.dependents
                .entry(owner.uid.clone())
                .or_default()
                .insert(uid.clone());
            match self.nodes.get(&owner.uid) {
                Some(owning) if owning.foreground => {
                    work.push(Work::Dependent(uid.clone()));
                    work.push(Work::Owner(owner.uid.clone()));
                }
                _ if !self.is_alive(&owner.uid) => work.push(Work::Dependent(uid.clone())),
                _ => {}
            }
        }
        self.nodes.insert(uid, node);
        work
    }

    /// An object is gone; gives what is to be looked at.
    pub(super) fn remove(&mut self, uid: &str) -> Vec<Work> {
        self.alive.remove(&number(uid));
        let node = self.unlink(uid);
        let owners = node.into_iter().flat_map(|node| node.owners);
        let mut work: Vec<Work> = owners
            .filter(|owner| {
                self.nodes
                    .get(&owner.uid)
                    .is_some_and(|owner| owner.foreground)
            })
            .map(|owner| Work::Owner(owner.uid))
            .collect();
        work.extend(self.dependents(uid).into_iter().map(Work::Dependent));
        work
    }

    /// After a relist: whatever of the resource was not listed is gone.
    pub(super) fn retain(&mut self, resource: usize, listed: &HashSet<String>) -> Vec<Work> {
        let listed: HashSet<u128> = listed.iter().map(|uid| number(uid)).collect();
        let gone = |number: &u128| !listed.contains(number);
        let known: Vec<String> = self
            .nodes
            .iter()
            .filter(|(uid, node)| node.resource == resource && gone(&number(uid)))
            .map(|(uid, _)| uid.clone())
            .chain(
                self.dependents
                    .keys()
                    .filter(|uid| {
                        self.alive
                            .get(&number(uid))
                            .is_some_and(|of| usize::from(*of) == resource)
                            && gone(&number(uid))
                    })
                    .cloned(),
            )
            .collect();
        self.alive
            .retain(|number, of| usize::from(*of) != resource || !gone(number));
        known.iter().flat_map(|uid| self.remove(uid)).collect()
    }

    fn unlink(&mut self, uid: &str) -> Option<Node> {
        let node = self.nodes.remove(uid)?;
        for owner in &node.owners {
            if let Some(dependents) = self.dependents.get_mut(&owner.uid) {
                dependents.remove(uid);
                if dependents.is_empty() {
                    self.dependents.remove(&owner.uid);
                }
            }
        }
        Some(node)
    }

    pub(super) fn get(&self, uid: &str) -> Option<Node> {
        self.nodes.get(uid).cloned()
    }

    pub(super) fn dependents(&self, uid: &str) -> Vec<String> {
        self.dependents
            .get(uid)
            .into_iter()
            .flatten()
            .cloned()
            .collect()
    }

    /// Whether a dependent keeps its owner from going away in the foreground.
    pub(super) fn blocks(&self, dependent: &str, owner: &str) -> bool {
        self.nodes.get(dependent).is_some_and(|node| {
            node.owners.iter().any(|reference| {
                reference.uid == owner && reference.block_owner_deletion == Some(true)
            })
        })
    }

    fn is_alive(&self, uid: &str) -> bool {
        self.alive.contains_key(&number(uid))
    }

    /// Whatever has an owner that is not there, once all watches are complete.
    pub(super) fn ownerless(&self) -> Vec<Work> {
        self.nodes
            .iter()
            .filter(|(_, node)| node.owners.iter().any(|owner| !self.is_alive(&owner.uid)))
            .map(|(uid, _)| Work::Dependent(uid.clone()))
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn meta(uid: u8, owners: &[u8], more: serde_json::Value) -> ObjectMeta {
        let id = |n: u8| format!("00000000-0000-0000-0000-0000000000{n:02x}");
        let owners: Vec<_> = owners.iter().map(|owner| json!({
            "apiVersion": "v1", "kind": "K", "name": "o", "uid": id(*owner), "blockOwnerDeletion": true})).collect();
        let mut value =
            json!({"uid": id(uid), "name": format!("n{uid}"), "ownerReferences": owners});
        for (key, field) in more.as_object().unwrap() {
            value[key] = field.clone();
        }
        serde_json::from_value(value).unwrap()
    }

    fn uid(n: u8) -> String {
        format!("00000000-0000-0000-0000-0000000000{n:02x}")
    }

    #[test]
    fn dependents_are_looked_at_when_their_owner_goes() {
        let mut graph = Graph::default();
        assert!(graph.set(0, &meta(1, &[], json!({}))).is_empty());
        assert!(graph.set(1, &meta(2, &[1], json!({}))).is_empty());
        assert!(graph.set(1, &meta(3, &[1], json!({}))).is_empty());
        let mut work = graph.remove(&uid(1));
        work.sort_by_key(ToString::to_string);
        assert_eq!(work, [Work::Dependent(uid(2)), Work::Dependent(uid(3))]);
        assert_eq!(
            graph.set(1, &meta(4, &[1], json!({}))),
            [Work::Dependent(uid(4))]
        );
    }

    #[test]
    fn an_owner_that_was_not_relisted_is_gone() {
        let mut graph = Graph::default();
        graph.set(0, &meta(1, &[], json!({})));
        graph.set(0, &meta(5, &[], json!({})));
        graph.set(1, &meta(2, &[1], json!({})));
        graph.set(1, &meta(3, &[5], json!({})));
        assert_eq!(
            graph.retain(0, &HashSet::from([uid(5)])),
            [Work::Dependent(uid(2))]
        );
        assert_eq!(graph.ownerless(), [Work::Dependent(uid(2))]);
        assert!(graph.retain(1, &HashSet::from([uid(2), uid(3)])).is_empty());
    }

    #[test]
    fn a_foreground_owner_is_looked_at_when_a_dependent_goes() {
        let mut graph = Graph::default();
        let going =
            json!({"deletionTimestamp": "2025-01-01T00:00:00Z", "finalizers": [FOREGROUND]});
        assert_eq!(graph.set(0, &meta(1, &[], going)), [Work::Owner(uid(1))]);
        assert_eq!(
            graph.set(1, &meta(2, &[1], json!({}))),
            [Work::Dependent(uid(2)), Work::Owner(uid(1))]
        );
        assert!(graph.blocks(&uid(2), &uid(1)));
        assert_eq!(graph.remove(&uid(2)), [Work::Owner(uid(1))]);
        assert!(graph.dependents(&uid(1)).is_empty());
    }
}
