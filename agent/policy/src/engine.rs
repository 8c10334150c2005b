//! What the API says of pods, namespaces, nodes and policies, and what of it is in the kernel.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::Arc;

use anyhow::{Context, Result};
use hashbrown::{HashMap, HashSet};
use k8s_openapi::api::core::v1::Pod;
use serde_json::Value;
use tracing::warn;
use xebec_dataplane_common::policy::{
    Chain, IDENTITY_HOST, IDENTITY_REMOTE_NODE, IDENTITY_UNMANAGED,
};

use crate::kernel::{Endpoint, PolicyKernel};
use crate::kind::{Kind, Kinds, Relevant};
use crate::names::{Names, Peer};
use crate::object;
use crate::places::{Group, Places};
use crate::pod::{self, PodView, relevant};
use crate::policies::{Policies, Row, Versions};
use crate::read::{Said, read};
use crate::rule::{Direction, Name, Policy, PolicyRef, Source, Tier};
use crate::selector::Labels;
use crate::selectors::Selectors;
use crate::services::Services;
use crate::sets::{SetKey, Sets};

mod domains;
mod refresh;
mod services;

/// A pod, and its identity.
#[derive(Debug)]
pub(crate) struct PodRow {
    pub(crate) view: PodView,
    /// That of its kind, if it has one.
    pub(crate) identity: Option<u32>,
}

/// A pod of this node that is connected.
#[derive(Clone, Debug)]
pub(crate) struct Connected {
    pub(crate) pod: Name,
    ifindex: u32,
    mac: [u8; 6],
    /// The identity under whose sets it is, once it is under any.
    pub(crate) identity: Option<u32>,
    /// Whether its drops are told alone.
    pub(crate) audit: bool,
    /// What the kernel has of it.
    written: Option<Endpoint>,
}

/// The chains of both directions, by [`Direction::index`].
pub(crate) type Chains = [Chain; 2];

/// A kind that pods of this node have.
#[derive(Debug, Default)]
pub(crate) struct Local {
    endpoints: BTreeSet<IpAddr>,
    /// The policies that are for it.
    pub(crate) policies: BTreeSet<u32>,
    /// The sets that are in force, once there are any: without what is in audit mode, and with it.
    pub(crate) chains: Option<[Chains; 2]>,
}

/// Who has an address.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Owner {
    /// No pod's name for a node's.
    pod: Option<Name>,
    identity: u32,
}

/// The tables, and the kernel behind them.
pub struct Engine<K> {
    kernel: K,
    pub(crate) names: Names,
    pub(crate) node_name: String,
    pub(crate) pods: HashMap<Name, PodRow>,
    pub(crate) namespaces: BTreeMap<String, Labels>,
    pub(crate) nodes: BTreeMap<String, Vec<IpAddr>>,
    pub(crate) kinds: Kinds,
    pub(crate) selectors: Selectors,
    pub(crate) places: Places,
    pub(crate) policies: Policies,
    services: Services,
    /// Policies that name Services, as they were read.
    with_services: BTreeMap<Arc<PolicyRef>, Vec<Policy>>,
    /// Whether Services changed since their policies were told whom they are made of.
    services_moved: bool,
    /// What is wrong with objects.
    errors: BTreeMap<Arc<PolicyRef>, Vec<String>>,
    /// What did not fit.
    pub(crate) full: BTreeMap<u32, Vec<Problem>>,
    /// Kinds that pods of this node have; under the node's own identity, the node.
    pub(crate) locals: BTreeMap<u32, Local>,
    /// The node, as a kind: its labels.
    pub(crate) host: Arc<Kind>,
    /// Whether the kernel may have other sets of the node.
    host_moved: bool,
    /// Addresses of the node's devices.
    pub(crate) local_addresses: BTreeSet<IpAddr>,
    addresses: HashMap<IpAddr, Owner>,
    pub(crate) endpoints: BTreeMap<IpAddr, Connected>,
    pub(crate) sets: Sets,
    generation: u32,
    /// Whether the next refresh gives flows a new generation.
    judge_anew: bool,
    /// Kinds that are new, whose entries no set has.
    fresh: BTreeSet<u32>,
    /// Kinds whose last pod went.
    gone: BTreeSet<u32>,
    /// Kinds whose entries did not fit.
    held: BTreeSet<u32>,
    /// Addresses whose identity the kernel may not have.
    moved: HashSet<IpAddr>,
    /// Pods of this node that may be of another kind.
    changed: BTreeSet<IpAddr>,
    /// Kinds of this node whose sets may be others.
    stale: BTreeSet<u32>,
}

/// What did not fit, and whom it is for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Problem {
    /// Namespaces and names of pods of this node that go on as before.
    pub pods: Vec<Name>,
    /// The policies of the set.
    pub policies: Vec<Arc<PolicyRef>>,
    /// What it was.
    pub why: String,
}

impl<K: PolicyKernel> Engine<K> {
    /// An engine that knows nothing yet. `generation` must differ from that of any agent before this one.
    pub fn new(kernel: K, names: Names, node_name: &str, generation: u32) -> Self {
        Self {
            kernel,
            names,
            node_name: node_name.to_owned(),
            pods: HashMap::new(),
            namespaces: BTreeMap::new(),
            nodes: BTreeMap::new(),
            kinds: Kinds::default(),
            selectors: Selectors::default(),
            places: Places::default(),
            policies: Policies::default(),
            services: Services::default(),
            with_services: BTreeMap::new(),
            services_moved: false,
            errors: BTreeMap::new(),
            full: BTreeMap::new(),
            locals: BTreeMap::from([(IDENTITY_HOST, Local::default())]),
            host: Arc::default(),
            host_moved: false,
            local_addresses: BTreeSet::new(),
            addresses: HashMap::new(),
            endpoints: BTreeMap::new(),
            sets: Sets::default(),
            generation,
            judge_anew: false,
            fresh: BTreeSet::new(),
            gone: BTreeSet::new(),
            held: BTreeSet::new(),
            moved: HashSet::new(),
            changed: BTreeSet::new(),
            stale: BTreeSet::new(),
        }
    }

    /// The same with another hash of kinds.
    pub fn with_hash(mut self, hash: fn(&Kind) -> u32) -> Self {
        self.kinds = Kinds::with_hash(hash);
        self
    }

    /// The same with other labels that count.
    pub fn with_labels(mut self, labels: Relevant) -> Self {
        self.policies.labels = labels;
        self
    }

    /// Whether a pod is known.
    pub fn knows(&self, pod: &Name) -> bool {
        self.pods.contains_key(pod)
    }

    /// The `metadata.uid` of a pod.
    pub fn uid(&self, pod: &Name) -> Option<String> {
        self.pods.get(pod).and_then(|row| row.view.uid.clone())
    }

    /// Names of all pods that are known.
    pub fn pod_names(&self) -> Vec<Name> {
        self.pods.keys().cloned().collect()
    }

    /// The name of the node that this is for.
    pub fn node_name(&self) -> &str {
        &self.node_name
    }

    /// Names of all namespaces and nodes that are known.
    pub fn known(&self) -> (Vec<String>, Vec<String>) {
        (
            self.namespaces.keys().cloned().collect(),
            self.nodes.keys().cloned().collect(),
        )
    }

    /// All objects that are policies and are known, those of which nothing could be understood among them.
    pub fn policy_ids(&self) -> Vec<Arc<PolicyRef>> {
        let wrong = self.errors.keys();
        let wrong = wrong.filter(|id| id.source != Source::CiliumCidrGroup);
        let all: BTreeSet<_> = self.policies.ids().chain(wrong).collect();
        all.into_iter().cloned().collect()
    }

    /// All objects of a kind that are known.
    pub fn ids_of(&self, source: Source) -> BTreeSet<Arc<PolicyRef>> {
        let known = self.policies.ids().chain(self.errors.keys());
        let known = known.filter(|id| id.source == source).cloned();
        let group = |name: &Arc<str>| PolicyRef {
            source: Source::CiliumCidrGroup,
            namespace: String::new(),
            name: name.to_string(),
        };
        let groups = self.places.groups().map(|name| Arc::new(group(name)));
        known
            .chain(groups.filter(|_| source == Source::CiliumCidrGroup))
            .collect()
    }

    /// Takes a Pod as the API has it now.
    pub fn set_pod(&mut self, pod: &Pod) {
        self.set_pod_view(pod::name(pod), pod::view(pod));
    }

    fn set_pod_view(&mut self, name: Name, view: PodView) {
        if self.pods.get(&name).is_some_and(|row| row.view == view) {
            return;
        }
        let before = self.pods.remove(&name);
        let identity = view.kind.clone().map(|kind| self.begin(kind));
        let of_before = before.as_ref().and_then(|row| row.identity);
        if let Some(identity) = of_before {
            self.end(identity);
        }
        let old = before.map(|row| row.view.addresses).unwrap_or_default();
        for address in &view.addresses {
            self.take_address(*address, &name, identity, &view);
        }
        for gone in old.iter().filter(|ip| !view.addresses.contains(ip)) {
            self.drop_address(*gone, &name);
        }
        self.pods.insert(name.clone(), PodRow { view, identity });
        self.look_again(&name);
    }

    /// Forgets a Pod.
    pub fn remove_pod(&mut self, name: &Name) {
        let Some(row) = self.pods.remove(name) else {
            return;
        };
        for address in row.view.addresses {
            self.drop_address(address, name);
        }
        if let Some(identity) = row.identity {
            self.end(identity);
        }
    }

    /// A pod of this kind has come.
    fn begin(&mut self, kind: Kind) -> u32 {
        let policies = &self.policies;
        let kind = relevant(kind, &policies.labels, |label| policies.asks(label));
        let (identity, new) = self.kinds.add(kind);
        if new {
            self.fresh.insert(identity);
        }
        identity
    }

    /// A pod of this kind has gone.
    fn end(&mut self, identity: u32) {
        if self.kinds.remove(identity) {
            self.gone.insert(identity);
        }
    }

    /// Has the endpoints of a pod looked at with the next refresh.
    fn look_again(&mut self, pod: &Name) {
        let own = self.endpoints.iter().filter(|(_, one)| one.pod == *pod);
        let own: Vec<IpAddr> = own.map(|(address, _)| *address).collect();
        self.changed.extend(own);
    }

    fn take_address(
        &mut self,
        address: IpAddr,
        name: &Name,
        identity: Option<u32>,
        view: &PodView,
    ) {
        let Some(identity) = identity else {
            return;
        };
        let labels = view.kind.as_ref().map(|kind| &kind.labels);
        let (labels, none) = (labels, Labels::new());
        let peer = Peer::pod(
            name,
            identity,
            labels.unwrap_or(&none),
            view.workload.as_ref(),
        );
        self.names.set(address, peer);
        let owner = Owner {
            pod: Some(name.clone()),
            identity,
        };
        if self.addresses.insert(address, owner.clone()).as_ref() != Some(&owner) {
            self.moved.insert(address);
        }
    }

    fn drop_address(&mut self, address: IpAddr, owner: &Name) {
        // It may be another's by now; a connected pod's is known until it is disconnected.
        let own = self.addresses.get(&address);
        let own = own.is_some_and(|of| of.pod.as_ref() == Some(owner));
        let connected = self.endpoints.get(&address);
        if !own || connected.is_some_and(|one| one.pod == *owner) {
            return;
        }
        self.addresses.remove(&address);
        self.names.remove(address);
        self.moved.insert(address);
    }

    /// Takes a Namespace's labels; none removes it.
    pub fn set_namespace(&mut self, name: &str, labels: Option<Labels>) {
        let before = match &labels {
            Some(labels) => self.namespaces.insert(name.to_owned(), labels.clone()),
            None => self.namespaces.remove(name),
        };
        if before == labels {
            return;
        }
        let wrong = self
            .selectors
            .relabelled(name, &self.kinds, &self.namespaces);
        self.supersede(wrong);
        let kinds: Vec<u32> = self.kinds.of_namespace(name).collect();
        for identity in kinds {
            let (Some(kind), Some(local)) =
                (self.kinds.get(identity), self.locals.get_mut(&identity))
            else {
                continue;
            };
            let about = self.policies.about(kind, self.namespaces.get(name));
            if local.policies != about {
                local.policies = about;
                self.stale.insert(identity);
            }
        }
    }

    /// Has other sets take the place of these.
    fn supersede(&mut self, sets: HashSet<u32>) {
        if sets.is_empty() {
            return;
        }
        for (identity, local) in &self.locals {
            let mut own = local.chains.iter().flatten().flatten().flatten();
            if own.any(|set| sets.contains(set)) {
                self.stale.insert(*identity);
            }
        }
        self.sets.mark_wrong(sets);
    }

    /// Takes the addresses of the API server.
    pub fn set_api_server(&mut self, addresses: BTreeSet<IpAddr>) {
        let wrong = self.places.set_api_server(addresses);
        self.supersede(wrong);
    }

    /// Takes a group of address blocks, and what is wrong with it; none removes it.
    fn set_cidr_group(&mut self, id: &Arc<PolicyRef>, group: Option<Group>, errors: Vec<String>) {
        self.set_errors(id, errors);
        let wrong = self.places.set_group(&id.name, group);
        self.supersede(wrong);
    }

    fn set_errors(&mut self, id: &Arc<PolicyRef>, errors: Vec<String>) {
        if errors.is_empty() {
            self.errors.remove(id);
        } else {
            self.errors.insert(id.clone(), errors);
        }
    }

    /// Takes a Node's labels and addresses; no addresses remove it.
    pub fn set_node(&mut self, name: &str, labels: Labels, addresses: Vec<IpAddr>) {
        if name == self.node_name && !addresses.is_empty() && self.host.labels != labels {
            self.host = Arc::new(Kind {
                labels: labels.clone(),
                ..Kind::default()
            });
            let about = self.policies.about_node(&labels);
            let local = self.locals.entry(IDENTITY_HOST).or_default();
            if local.policies != about {
                local.policies = about;
                self.stale.insert(IDENTITY_HOST);
            }
        }
        let wrong = self.places.set_node(name, labels, &addresses);
        self.supersede(wrong);
        let before = self
            .nodes
            .insert(name.to_owned(), addresses.clone())
            .unwrap_or_default();
        if addresses.is_empty() {
            self.nodes.remove(name);
        }
        let identity = if name == self.node_name {
            IDENTITY_HOST
        } else {
            IDENTITY_REMOTE_NODE
        };
        let gone = before.iter().filter(|ip| !addresses.contains(ip));
        gone.for_each(|ip| self.drop_node_address(*ip));
        for address in addresses {
            self.take_node_address(address, name, identity);
        }
    }

    /// Takes the addresses that this node's devices have, those that its object has among them.
    pub fn set_local_addresses(&mut self, addresses: BTreeSet<IpAddr>) {
        let before = std::mem::replace(&mut self.local_addresses, addresses.clone());
        let name = self.node_name.clone();
        let gone = before.difference(&addresses);
        gone.for_each(|address| self.drop_node_address(*address));
        for address in addresses.difference(&before) {
            // What is a pod's, or another node's, is so by the API.
            if !self.addresses.contains_key(address) {
                self.take_node_address(*address, &name, IDENTITY_HOST);
            }
        }
    }

    fn take_node_address(&mut self, address: IpAddr, name: &str, identity: u32) {
        self.names.set(address, Peer::node(name, identity));
        let owner = Owner {
            pod: None,
            identity,
        };
        if self.addresses.insert(address, owner.clone()).as_ref() != Some(&owner) {
            self.moved.insert(address);
        }
    }

    /// A node has an address no more, by its object or by its devices.
    fn drop_node_address(&mut self, address: IpAddr) {
        let own = self.addresses.get(&address);
        let of_node = own.is_some_and(|owner| owner.pod.is_none());
        let elsewhere = self.local_addresses.contains(&address)
            || self.nodes.values().any(|all| all.contains(&address));
        if of_node && !elsewhere {
            self.addresses.remove(&address);
            self.names.remove(address);
            self.moved.insert(address);
        }
    }

    /// Takes an object of this kind as the API has it now.
    pub fn set_object(&mut self, source: Source, object: &Value) -> Arc<PolicyRef> {
        let id = Arc::new(object::id(source, object));
        match read(source, object) {
            (Said::Policies(policies), errors) => self.set_policy(&id, policies, errors),
            (Said::Group(group), errors) => self.set_cidr_group(&id, Some(group), errors),
        }
        id
    }

    /// Forgets an object.
    pub fn remove_object(&mut self, id: &Arc<PolicyRef>) {
        match id.source {
            Source::CiliumCidrGroup => self.set_cidr_group(id, None, Vec::new()),
            _ => self.set_policy(id, Vec::new(), Vec::new()),
        }
    }

    /// Takes what an object says, which may be several policies, and what is wrong with it; neither removes it.
    pub fn set_policy(&mut self, id: &Arc<PolicyRef>, policies: Vec<Policy>, errors: Vec<String>) {
        self.set_errors(id, errors);
        let policies = self.resolve(id, policies);
        self.take_policies(id, policies);
    }

    fn take_policies(&mut self, id: &Arc<PolicyRef>, policies: Vec<Policy>) {
        let asked = self.policies.asked();
        let kinds = |policy: &Policy| {
            let locals = self.locals.keys().filter_map(|one| self.kinds.get(*one));
            let selected = locals.filter(|kind| {
                let namespace = self.namespaces.get(&kind.namespace);
                policy.subject.selects(kind, namespace)
            });
            selected.count()
        };
        let set = self.policies.set(id, policies, &self.names, kinds);
        let Some(Versions { before, after }) = set else {
            return;
        };
        // The new ones' first: what both use stays.
        self.use_selectors(&after, true);
        self.use_selectors(&before, false);
        for (identity, local) in &mut self.locals {
            let had = before
                .iter()
                .filter(|row| local.policies.remove(&row.number))
                .count();
            let is_host = *identity == IDENTITY_HOST;
            let kind = match is_host {
                true => Some(&self.host),
                false => self.kinds.get(*identity),
            };
            let Some(kind) = kind else {
                continue;
            };
            let namespace = self.namespaces.get(&kind.namespace);
            let has: Vec<u32> = after
                .iter()
                .map(|row| (row.number, &row.policy))
                .filter(|(_, policy)| policy.for_nodes == is_host)
                .filter(|(_, policy)| match is_host {
                    true => policy.subject.selects_labels(&kind.labels),
                    false => policy.subject.selects(kind, namespace),
                })
                .map(|(number, _)| number)
                .collect();
            if had > 0 || !has.is_empty() {
                self.stale.insert(*identity);
            }
            local.policies.extend(has);
        }
        if self.policies.asked() != asked {
            self.look_at_all_kinds();
        }
    }

    fn use_selectors(&mut self, rows: &[Arc<Row>], use_: bool) {
        for rule in rows.iter().flat_map(|row| &row.policy.rules) {
            for selector in crate::content::selectors(rule) {
                if use_ {
                    self.selectors.add(&selector, &self.kinds, &self.namespaces);
                } else {
                    self.selectors.remove(&selector);
                }
            }
        }
    }

    /// Other labels matter now: pods may be of other kinds.
    fn look_at_all_kinds(&mut self) {
        for name in self.pod_names() {
            let Some(row) = self.pods.get(&name) else {
                continue;
            };
            let (Some(kind), Some(before)) = (row.view.kind.clone(), row.identity) else {
                continue;
            };
            let view = row.view.clone();
            let identity = self.begin(kind);
            self.end(before);
            if identity == before {
                continue;
            }
            for address in view.addresses.clone() {
                self.take_address(address, &name, Some(identity), &view);
            }
            if let Some(row) = self.pods.get_mut(&name) {
                row.identity = Some(identity);
            }
            self.look_again(&name);
        }
    }

    /// Puts a pod of this node under its policies. Nothing may be sent before this has succeeded; a pod that the
    /// API does not know can send nothing until it does.
    pub fn connect(
        &mut self,
        pod: &Name,
        address: IpAddr,
        ifindex: u32,
        mac: [u8; 6],
    ) -> Result<()> {
        let before = self.endpoints.remove(&address);
        self.leave(address, before.as_ref());
        let connected = Connected {
            pod: pod.clone(),
            ifindex,
            mac,
            identity: None,
            audit: false,
            written: None,
        };
        self.endpoints.insert(address, connected);
        if pod.1.is_empty() {
            // A sandbox that is no pod of the cluster: nothing can select it.
            return self.kernel.set_endpoint(
                address,
                Endpoint {
                    ifindex,
                    identity: IDENTITY_UNMANAGED,
                    mac,
                    ..Endpoint::default()
                },
            );
        }
        if let Some(row) = self.pods.get(pod) {
            let (identity, view) = (row.identity, row.view.clone());
            self.take_address(address, pod, identity, &view);
        }
        self.changed.insert(address);
        self.refresh()?;
        let (known, connected) = (self.pods.contains_key(pod), self.endpoints.get(&address));
        if known && connected.is_some_and(|one| one.identity.is_none()) {
            anyhow::bail!(
                "the rules for the pod {}/{} are not in the kernel: {}",
                pod.0,
                pod.1,
                self.why_not(pod)
            );
        }
        Ok(())
    }

    fn why_not(&self, pod: &Name) -> String {
        let mut all = self.full.values().flatten();
        let own = all.find(|one| one.pods.contains(pod));
        own.map_or_else(|| "it has none".to_owned(), |one| one.why.clone())
    }

    /// Forgets a pod of this node.
    pub fn disconnect(&mut self, address: IpAddr) -> Result<()> {
        if !self.endpoints.contains_key(&address) {
            return Ok(());
        }
        // First: what stays in the kernel is asked for again.
        self.kernel.remove_endpoint(address)?;
        let Some(gone) = self.endpoints.remove(&address) else {
            return Ok(());
        };
        self.leave(address, Some(&gone));
        let pod = self.pods.get(&gone.pod);
        if !pod.is_some_and(|row| row.view.addresses.contains(&address)) {
            self.drop_address(address, &gone.pod);
        }
        // What was allowed to or from the old pod says nothing of the next one with this address.
        self.judge_anew = true;
        self.refresh()
    }

    /// An endpoint is no longer of its kind.
    fn leave(&mut self, address: IpAddr, endpoint: Option<&Connected>) {
        let Some(identity) = endpoint.and_then(|one| one.identity) else {
            return;
        };
        if let Some(local) = self.locals.get_mut(&identity) {
            local.endpoints.remove(&address);
            if local.endpoints.is_empty() {
                self.drop_local(identity);
            }
        }
        self.end(identity);
    }

    fn drop_local(&mut self, identity: u32) {
        self.full.remove(&identity);
        self.stale.remove(&identity);
        if let Some(local) = self.locals.remove(&identity) {
            for set in local.chains.iter().flatten().flatten().flatten() {
                self.sets
                    .release(&mut self.selectors, &mut self.places, *set);
            }
        }
    }

    /// Whether sets wait for [`sweep`](Self::sweep).
    pub fn retired(&self) -> Vec<u32> {
        self.sets.retired()
    }

    /// Removes sets from the kernel that were retired before all programs that may have known them have ended.
    pub fn sweep(&mut self, sets: &[u32]) -> Result<()> {
        self.sets
            .sweep(&mut self.kernel, &self.names, sets)
            .context("sets of rules stay in the kernel, unused")?;
        // What had no room may have it now.
        if self.full.is_empty() && self.held.is_empty() {
            return Ok(());
        }
        self.refresh()
    }

    /// What did not fit.
    pub fn problems(&self) -> impl Iterator<Item = &Problem> {
        self.full.values().flatten()
    }

    /// What is wrong with objects.
    pub fn errors(&self) -> &BTreeMap<Arc<PolicyRef>, Vec<String>> {
        &self.errors
    }

    /// As [`refresh`](Self::refresh), with failures told in the log alone.
    pub fn refresh_or_warn(&mut self) {
        if let Err(error) = self.refresh() {
            warn!(
                error = format!("{error:#}"),
                "the dataplane could not take a change; it is tried again with the next"
            );
        }
    }
}

/// What makes the set of these policies, for pods of this kind, the one that it is.
pub(crate) fn set_key(
    policies: &[Arc<Row>],
    own: &Kind,
    tier: Tier,
    direction: Direction,
) -> SetKey {
    let ports =
        direction == Direction::Ingress && policies.iter().any(|row| row.asks_for_own_ports());
    SetKey {
        direction,
        tier,
        policies: policies.iter().map(|row| row.number).collect(),
        ports: if ports {
            own.ports.clone()
        } else {
            BTreeSet::new()
        },
    }
}
