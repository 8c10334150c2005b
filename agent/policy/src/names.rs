//! What addresses, rules and sets are called, for those who read flows.

use std::net::IpAddr;
use std::sync::{Arc, PoisonError, RwLock, RwLockReadGuard};

use hashbrown::HashMap;

use crate::rule::{Name, PolicyRef, Ports, Rule, RuleId};
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

/// Where a rule stands, and by what it matches.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RuleName {
    /// Where it stands.
    pub id: RuleId,
    /// Whether it is about certain peers.
    pub by_peer: bool,
    /// How much of protocol and port it is about.
    pub by: By,
}

/// How much of protocol and port a rule is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum By {
    /// Nothing of them.
    All,
    /// The protocol.
    Protocol,
    /// The port, too.
    Port,
}

impl RuleName {
    /// The name of a rule of a policy.
    pub fn new(id: RuleId, rule: &Rule) -> Self {
        Self {
            id,
            by_peer: !rule.peers.contains(&crate::rule::Peer::Anybody),
            by: if rule.ports.contains(&Ports::All) {
                By::All
            } else if rule
                .ports
                .iter()
                .all(|ports| matches!(ports, Ports::Protocol(_)))
            {
                By::Protocol
            } else {
                By::Port
            },
        }
    }
}

#[derive(Default)]
struct Inner {
    peers: HashMap<IpAddr, Arc<Peer>>,
    rules: HashMap<u32, Arc<RuleName>>,
    sets: HashMap<u32, Arc<Vec<Arc<PolicyRef>>>>,
    /// Addresses of the pods of this node, by the cookies of their network namespaces.
    namespaces: HashMap<u64, Vec<IpAddr>>,
    /// The other way round.
    local: HashMap<IpAddr, u64>,
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
    pub fn rule(&self, rule: u32) -> Option<&Arc<RuleName>> {
        self.0.rules.get(&rule)
    }

    /// Whether an address is of a pod of this node.
    pub fn is_local(&self, address: IpAddr) -> bool {
        self.0.local.contains_key(&address)
    }

    /// The address of the pod in a network namespace, of the family of `like` if it has one of it.
    pub fn in_namespace(&self, cookie: u64, like: IpAddr) -> Option<IpAddr> {
        let addresses = self.0.namespaces.get(&cookie)?;
        let same = addresses.iter().find(|one| one.is_ipv4() == like.is_ipv4());
        same.or(addresses.first()).copied()
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

    /// Tells of a pod of this node: the cookie of its network namespace (`SO_NETNS_COOKIE`), and its addresses.
    pub fn set_local(&self, cookie: u64, addresses: &[IpAddr]) {
        self.write(|inner| {
            for address in addresses {
                inner.local.insert(*address, cookie);
            }
            inner.namespaces.insert(cookie, addresses.to_vec());
        });
    }

    /// The pod of these addresses is gone.
    pub fn remove_local(&self, addresses: &[IpAddr]) {
        self.write(|inner| {
            for address in addresses {
                if let Some(cookie) = inner.local.remove(address) {
                    inner.namespaces.remove(&cookie);
                }
            }
        });
    }

    /// Tells where a rule stands, and by what it matches.
    pub fn set_rule(&self, number: u32, rule: RuleName) {
        self.write(|inner| match inner.rules.get(&number) {
            Some(known) if **known == rule => {}
            _ => drop(inner.rules.insert(number, Arc::new(rule))),
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
