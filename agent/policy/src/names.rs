//! What addresses, rules and sets are called, for those who read flows.

use std::net::IpAddr;
use std::sync::{Arc, PoisonError, RwLock, RwLockReadGuard};

use hashbrown::HashMap;

use crate::rule::{Name, PolicyRef, RuleId};
use crate::selector::Labels;

/// Who has an address.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Peer {
    /// Its identity.
    pub identity: u32,
    /// Namespace and name of a pod; both empty for what is no pod.
    pub pod: Name,
    /// Labels as Hubble writes them: `k8s:app=web`, `reserved:host`.
    pub labels: Vec<String>,
    /// Kind and name of the pod's controller.
    pub workload: Option<(String, String)>,
}

impl Peer {
    /// A pod.
    pub fn pod(
        name: &Name,
        identity: u32,
        labels: &Labels,
        workload: Option<&(String, String)>,
    ) -> Self {
        Self {
            identity,
            pod: name.clone(),
            labels: labels
                .iter()
                .map(|(key, value)| format!("k8s:{key}={value}"))
                .collect(),
            workload: workload.cloned(),
        }
    }

    /// A node, this one or another.
    pub fn node(name: &str, identity: u32) -> Self {
        let reserved = match identity {
            xebec_dataplane_common::policy::IDENTITY_HOST => "reserved:host",
            _ => "reserved:remote-node",
        };
        Self {
            identity,
            labels: vec![
                reserved.to_owned(),
                format!("k8s:kubernetes.io/hostname={name}"),
            ],
            ..Self::default()
        }
    }

    /// Whoever is not known.
    pub fn world() -> Self {
        Self {
            identity: xebec_dataplane_common::policy::IDENTITY_WORLD,
            labels: vec!["reserved:world".to_owned()],
            ..Self::default()
        }
    }
}

#[derive(Default)]
struct Inner {
    peers: HashMap<IpAddr, Arc<Peer>>,
    rules: HashMap<u32, Arc<RuleId>>,
    sets: HashMap<u32, Arc<Vec<Arc<PolicyRef>>>>,
}

/// The names; cheap to clone.
#[derive(Clone, Default)]
pub struct Names(Arc<RwLock<Inner>>);

/// The names of a moment.
pub struct Now<'a>(RwLockReadGuard<'a, Inner>);

impl Now<'_> {
    /// Who has an address, if it is known.
    pub fn peer(&self, address: IpAddr) -> Option<&Arc<Peer>> {
        self.0.peers.get(&address)
    }

    /// Where a rule stands.
    pub fn rule(&self, rule: u32) -> Option<&Arc<RuleId>> {
        self.0.rules.get(&rule)
    }

    /// The policies behind a set.
    pub fn policies(&self, set: u32) -> Option<&Arc<Vec<Arc<PolicyRef>>>> {
        self.0.sets.get(&set)
    }
}

impl Names {
    fn write(&self, change: impl FnOnce(&mut Inner)) {
        change(&mut self.0.write().unwrap_or_else(PoisonError::into_inner));
    }

    /// The names of this moment; none changes while it is held.
    pub fn now(&self) -> Now<'_> {
        Now(self.0.read().unwrap_or_else(PoisonError::into_inner))
    }

    /// Tells who has an address.
    pub fn set(&self, address: IpAddr, peer: Peer) {
        self.write(|inner| drop(inner.peers.insert(address, Arc::new(peer))));
    }

    /// Nobody is known to have it any more.
    pub fn remove(&self, address: IpAddr) {
        self.write(|inner| drop(inner.peers.remove(&address)));
    }

    /// Tells where a rule stands.
    pub fn set_rule(&self, number: u32, rule: &RuleId) {
        self.write(|inner| {
            inner
                .rules
                .entry(number)
                .or_insert_with(|| Arc::new(rule.clone()));
        });
    }

    /// Forgets a rule.
    pub fn remove_rule(&self, number: u32) {
        self.write(|inner| drop(inner.rules.remove(&number)));
    }

    /// Tells which policies are behind a set.
    pub fn set_set(&self, number: u32, policies: Vec<Arc<PolicyRef>>) {
        self.write(|inner| drop(inner.sets.insert(number, Arc::new(policies))));
    }

    /// Forgets a set.
    pub fn remove_set(&self, number: u32) {
        self.write(|inner| drop(inner.sets.remove(&number)));
    }
}
