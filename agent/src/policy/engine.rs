//! What the API says of pods, namespaces, nodes and policies, and what of it is in the kernel.

use std::collections::{BTreeMap, HashMap};
use std::net::IpAddr;

use anyhow::{Context, Result};
use k8s_openapi::api::core::v1::Pod;
use k8s_openapi::api::networking::v1::NetworkPolicySpec;
use serde_json::{Value, json};
use tracing::warn;
use xebec_dataplane_common::policy::{
    Endpoint, FIRST_POD_IDENTITY, IDENTITY_HOST, IDENTITY_REMOTE_NODE, IDENTITY_UNMANAGED, RuleKey,
};

use super::compile::{Compiled, Direction, Kind, Name, RuleId, View, compile, protocol};
use super::selector::Labels;
use crate::maps::PolicyKernel;
use crate::names::{Names, Peer};

/// What of a Pod is needed.
#[derive(Clone, Debug, PartialEq, Eq)]
struct PodView {
    kind: Kind,
    addresses: Vec<IpAddr>,
    workload: Option<(String, String)>,
}

/// A pod of this node that is connected.
#[derive(Clone, Debug)]
struct Connected {
    pod: Name,
    ifindex: u32,
    mac: [u8; 6],
    /// Numbers of its sets, ingress then egress; 0 for none.
    sets: [u32; 2],
}

struct Installed {
    number: u32,
    users: usize,
}

/// The tables, and the kernel behind them.
pub struct Engine<K> {
    kernel: K,
    names: Names,
    node_name: String,
    pods: HashMap<Name, PodView>,
    namespaces: BTreeMap<String, Labels>,
    nodes: BTreeMap<String, Vec<IpAddr>>,
    policies: BTreeMap<Name, NetworkPolicySpec>,
    identities: BTreeMap<Kind, u32>,
    /// How many pods are of each kind.
    counts: HashMap<Kind, usize>,
    /// Whose an address is (no pod's name for a node's), and its identity.
    addresses: HashMap<IpAddr, (Option<Name>, u32)>,
    endpoints: BTreeMap<IpAddr, Connected>,
    sets: BTreeMap<Compiled, Installed>,
    /// Numbers of rules, as long as their policy is there.
    rules: BTreeMap<RuleId, u32>,
    next_rule: u32,
    next_set: u32,
    generation: u32,
    /// Whether sets may have changed since they were compiled.
    stale: bool,
    /// Policies that could not be put into force, and why.
    refused: BTreeMap<Name, String>,
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
            policies: BTreeMap::new(),
            identities: BTreeMap::new(),
            counts: HashMap::new(),
            addresses: HashMap::new(),
            endpoints: BTreeMap::new(),
            sets: BTreeMap::new(),
            rules: BTreeMap::new(),
            next_rule: 0,
            next_set: 0,
            generation,
            stale: false,
            refused: BTreeMap::new(),
        }
    }

    /// Whether a pod is known.
    pub fn knows(&self, pod: &Name) -> bool {
        self.pods.contains_key(pod)
    }

    /// Names of all pods that are known.
    pub fn pod_names(&self) -> Vec<Name> {
        self.pods.keys().cloned().collect()
    }

    /// Takes a Pod as the API has it now.
    pub fn set_pod(&mut self, pod: &Pod) -> Result<()> {
        let name = (
            pod.metadata.namespace.clone().unwrap_or_default(),
            pod.metadata.name.clone().unwrap_or_default(),
        );
        let view = view(pod);
        let before = self.pods.insert(name.clone(), view.clone());
        if before.as_ref() == Some(&view) {
            return Ok(());
        }
        if before.as_ref().map(|before| &before.kind) != Some(&view.kind) {
            self.count(&view.kind);
            if let Some(before) = &before {
                self.uncount(&before.kind);
            }
            self.stale = true;
        }
        let old = before.map(|before| before.addresses).unwrap_or_default();
        for gone in old.iter().filter(|ip| !view.addresses.contains(ip)) {
            self.drop_address(*gone, &name)?;
        }
        for address in &view.addresses {
            self.take_address(*address, &name, &view)?;
        }
        Ok(())
    }

    /// Forgets a Pod.
    pub fn remove_pod(&mut self, name: &Name) -> Result<()> {
        let Some(view) = self.pods.remove(name) else {
            return Ok(());
        };
        for address in view.addresses {
            self.drop_address(address, name)?;
        }
        self.uncount(&view.kind);
        Ok(())
    }

    fn take_address(&mut self, address: IpAddr, name: &Name, view: &PodView) -> Result<()> {
        let identity = self.identities.get(&view.kind).copied().unwrap_or_default();
        self.names.set(
            address,
            Peer::pod(name, identity, &view.kind.labels, view.workload.as_ref()),
        );
        let before = self
            .addresses
            .insert(address, (Some(name.clone()), identity));
        if before.is_some_and(|(_, before)| before == identity) {
            return Ok(());
        }
        self.kernel.set_identity(address, identity)
    }

    fn drop_address(&mut self, address: IpAddr, owner: &Name) -> Result<()> {
        // It may be another's by now; a connected pod's is known until it is disconnected.
        let own = self
            .addresses
            .get(&address)
            .is_some_and(|(of, _)| of.as_ref() == Some(owner));
        if !own
            || self
                .endpoints
                .get(&address)
                .is_some_and(|one| one.pod == *owner)
        {
            return Ok(());
        }
        self.addresses.remove(&address);
        self.names.remove(address);
        self.kernel.remove_identity(address)
    }

    /// Gives a kind of pods its identity: a hash of it, or the next free number where two have the same hash.
    /// Only this node uses the number, so nothing need be agreed with others.
    fn count(&mut self, kind: &Kind) {
        *self.counts.entry(kind.clone()).or_default() += 1;
        if self.identities.contains_key(kind) {
            return;
        }
        let mut identity = hash(kind).max(FIRST_POD_IDENTITY);
        while self.identities.values().any(|taken| *taken == identity) {
            identity = identity.wrapping_add(1).max(FIRST_POD_IDENTITY);
        }
        self.identities.insert(kind.clone(), identity);
        self.stale = true;
    }

    fn uncount(&mut self, kind: &Kind) {
        if let Some(count) = self.counts.get_mut(kind) {
            *count -= 1;
            if *count == 0 {
                self.counts.remove(kind);
                self.identities.remove(kind);
                self.stale = true;
            }
        }
    }

    /// Takes a Namespace's labels; none removes it.
    pub fn set_namespace(&mut self, name: &str, labels: Option<Labels>) {
        let before = match &labels {
            Some(labels) => self.namespaces.insert(name.to_owned(), labels.clone()),
            None => self.namespaces.remove(name),
        };
        self.stale |= before != labels;
    }

    /// Takes a Node's addresses; none removes it.
    pub fn set_node(&mut self, name: &str, addresses: Vec<IpAddr>) -> Result<()> {
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
        for gone in before.iter().filter(|ip| !addresses.contains(ip)) {
            self.addresses.remove(gone);
            self.names.remove(*gone);
            self.kernel.remove_identity(*gone)?;
        }
        for address in addresses {
            self.names.set(address, Peer::node(name, identity));
            let before = self.addresses.insert(address, (None, identity));
            if before.is_none_or(|(_, before)| before != identity) {
                self.kernel.set_identity(address, identity)?;
            }
        }
        Ok(())
    }

    /// Takes a NetworkPolicy; none removes it.
    pub fn set_policy(&mut self, name: &Name, spec: Option<NetworkPolicySpec>) {
        let before = match &spec {
            Some(spec) => self.policies.insert(name.clone(), spec.clone()),
            None => self.policies.remove(name),
        };
        self.stale |= before != spec;
        if spec.is_none() {
            self.refused.remove(name);
        }
    }

    /// Names of all namespaces, nodes and policies that are known.
    pub fn known(&self) -> (Vec<String>, Vec<String>, Vec<Name>) {
        (
            self.namespaces.keys().cloned().collect(),
            self.nodes.keys().cloned().collect(),
            self.policies.keys().cloned().collect(),
        )
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
        let connected = Connected {
            pod: pod.clone(),
            ifindex,
            mac,
            sets: [0, 0],
        };
        self.endpoints.insert(address, connected);
        if let Some(view) = self.pods.get(pod).cloned() {
            self.take_address(address, pod, &view)?;
        }
        if pod.1.is_empty() {
            // A sandbox that is no pod of the cluster: nothing can select it.
            let endpoint = Endpoint {
                ifindex,
                identity: IDENTITY_UNMANAGED,
                ingress_set: 0,
                egress_set: 0,
                mac,
                pad: 0,
            };
            return self.kernel.set_endpoint(address, endpoint);
        }
        if self.refresh_endpoint(address)? {
            self.next_generation()?;
        }
        Ok(())
    }

    /// Forgets a pod of this node.
    pub fn disconnect(&mut self, address: IpAddr) -> Result<()> {
        let Some(gone) = self.endpoints.remove(&address) else {
            return Ok(());
        };
        self.kernel.remove_endpoint(address)?;
        for set in gone.sets {
            self.release(set)?;
        }
        let listed = self
            .pods
            .get(&gone.pod)
            .is_some_and(|pod| pod.addresses.contains(&address));
        if !listed {
            self.drop_address(address, &gone.pod)?;
        }
        // What was allowed to or from the old pod says nothing of the next one with this address.
        self.next_generation()
    }

    fn next_generation(&mut self) -> Result<()> {
        self.generation = self.generation.wrapping_add(1);
        self.kernel.set_generation(self.generation)
    }

    /// Brings the kernel in step, if anything changed. Where a set can't be compiled or written, the one before it stays.
    pub fn refresh(&mut self) -> Result<()> {
        if !std::mem::take(&mut self.stale) {
            return Ok(());
        }
        self.refused.clear();
        let mut outcome = Ok(());
        let mut changed = false;
        let addresses: Vec<IpAddr> = self.endpoints.keys().copied().collect();
        for address in addresses {
            match self.refresh_endpoint(address) {
                Ok(fresh) => changed |= fresh,
                Err(error) => {
                    // It is tried again with the next change.
                    self.stale = true;
                    outcome = Err(error);
                }
            }
        }
        if changed {
            self.next_generation()?;
        }
        if outcome.is_ok() {
            // No set names a policy any more that is gone.
            let (policies, names) = (&self.policies, &self.names);
            self.rules.retain(|rule, id| {
                let there = policies.contains_key(&rule.policy);
                if !there {
                    names.remove_rule(*id);
                }
                there
            });
        }
        outcome
    }

    fn refresh_endpoint(&mut self, address: IpAddr) -> Result<bool> {
        let Some(connected) = self.endpoints.get(&address).cloned() else {
            return Ok(false);
        };
        // A pod that the API has forgotten keeps what it had until it is disconnected.
        let Some(kind) = self.pods.get(&connected.pod).map(|pod| pod.kind.clone()) else {
            return Ok(false);
        };
        let identity = self.identities.get(&kind).copied().unwrap_or_default();
        let view = View {
            policies: &self.policies,
            namespaces: &self.namespaces,
            identities: &self.identities,
        };
        let mut compiled = Vec::new();
        for direction in [Direction::Ingress, Direction::Egress] {
            match compile(&view, &kind, direction) {
                Ok(set) => compiled.push(set),
                Err(refused) => {
                    self.refused
                        .insert(refused.policy.clone(), refused.why.clone());
                    anyhow::bail!(
                        "NetworkPolicy {}/{} can't be put into force: {}; the rules before it stay",
                        refused.policy.0,
                        refused.policy.1,
                        refused.why
                    );
                }
            }
        }
        let mut sets = [0, 0];
        for (slot, set) in compiled.into_iter().enumerate() {
            if let Some(set) = set {
                match self.acquire(set) {
                    Ok(number) => sets[slot] = number,
                    Err(error) => return Err(self.give_back(sets, error)),
                }
            }
        }
        let endpoint = Endpoint {
            ifindex: connected.ifindex,
            identity,
            ingress_set: sets[0],
            egress_set: sets[1],
            mac: connected.mac,
            pad: 0,
        };
        if let Err(error) = self.kernel.set_endpoint(address, endpoint) {
            return Err(self.give_back(sets, error));
        }
        if let Some(connected) = self.endpoints.get_mut(&address) {
            connected.sets = sets;
        }
        let before = connected.sets;
        for set in before {
            self.release(set)?;
        }
        Ok(before != sets)
    }

    /// The number of a set, which is written if it is new.
    fn acquire(&mut self, compiled: Compiled) -> Result<u32> {
        if let Some(installed) = self.sets.get_mut(&compiled) {
            installed.users += 1;
            return Ok(installed.number);
        }
        self.next_set = self.next_set.wrapping_add(1).max(1);
        let number = self.next_set;
        if let Err(error) = self.write_set(number, &compiled) {
            // What did not fit leaves nothing behind.
            if let Err(second) = self.erase_set(number, &compiled) {
                warn!(
                    error = format!("{second:#}"),
                    "half a set of rules stays in the kernel, unused"
                );
            }
            return Err(error);
        }
        self.names.set_set(number, &compiled.policies);
        self.sets.insert(compiled, Installed { number, users: 1 });
        Ok(number)
    }

    fn release(&mut self, number: u32) -> Result<()> {
        if number == 0 {
            return Ok(());
        }
        let unused = self
            .sets
            .iter_mut()
            .find(|(_, installed)| installed.number == number)
            .and_then(|(compiled, installed)| {
                installed.users -= 1;
                (installed.users == 0).then(|| compiled.clone())
            });
        let Some(compiled) = unused else {
            return Ok(());
        };
        self.sets.remove(&compiled);
        self.names.remove_set(number);
        self.erase_set(number, &compiled)
    }

    /// Gives sets back that an endpoint could not be given after all.
    fn give_back(&mut self, sets: [u32; 2], error: anyhow::Error) -> anyhow::Error {
        for set in sets {
            if let Err(second) = self.release(set) {
                warn!(
                    error = format!("{second:#}"),
                    "a set of rules stays in the kernel, unused"
                );
            }
        }
        error
    }

    fn write_set(&mut self, number: u32, compiled: &Compiled) -> Result<()> {
        for (key, rule) in &compiled.rules {
            let id = match self.rules.get(rule) {
                Some(id) => *id,
                None => {
                    self.next_rule = self.next_rule.wrapping_add(1).max(1);
                    self.rules.insert(rule.clone(), self.next_rule);
                    self.next_rule
                }
            };
            self.names.set_rule(id, rule);
            let key = RuleKey {
                set: number,
                ..*key
            };
            self.kernel.set_rule(key, id).with_context(|| {
                format!(
                    "could not write the {} rules of NetworkPolicy {}/{}",
                    compiled.rules.len(),
                    rule.policy.0,
                    rule.policy.1
                )
            })?;
        }
        for (block, class) in &compiled.cidrs {
            self.kernel.set_cidr(number, *block, *class)?;
        }
        self.kernel.set_set(number, compiled.shapes())
    }

    fn erase_set(&mut self, number: u32, compiled: &Compiled) -> Result<()> {
        self.kernel.remove_set(number)?;
        for key in compiled.rules.keys() {
            self.kernel.remove_rule(RuleKey {
                set: number,
                ..*key
            })?;
        }
        for block in compiled.cidrs.keys() {
            self.kernel.remove_cidr(number, *block)?;
        }
        Ok(())
    }

    /// As [`refresh`](Self::refresh), with failures told in the log alone.
    pub fn refresh_or_warn(&mut self) {
        if let Err(error) = self.refresh() {
            warn!(error = format!("{error:#}"), "policy is not up to date");
        }
    }

    /// Policies as rows for the command line.
    pub fn policy_rows(&self) -> Vec<Value> {
        self.policies
            .iter()
            .map(|(name, spec)| {
                let pods: Vec<&Name> = self
                    .endpoints
                    .values()
                    .filter(|one| self.sets.iter().any(|(set, at)| one.sets.contains(&at.number) && set.policies.contains(name)))
                    .map(|one| &one.pod)
                    .collect();
                let types: Vec<&str> = [Direction::Ingress, Direction::Egress]
                    .into_iter()
                    .filter(|direction| super::compile::isolates(spec, *direction))
                    .map(Direction::name)
                    .collect();
                let state = self.refused.get(name).map_or("in force", String::as_str);
                json!({"namespace": name.0, "policy": name.1, "types": types, "pods": pods.len(), "state": state})
            })
            .collect()
    }

    /// Identities as rows for the command line.
    pub fn identity_rows(&self) -> Vec<Value> {
        self.identities
            .iter()
            .map(|(kind, identity)| {
                let labels: Vec<String> = kind.labels.iter().map(|(key, value)| format!("{key}={value}")).collect();
                json!({"identity": identity, "namespace": kind.namespace, "labels": labels, "pods": self.counts.get(kind)})
            })
            .collect()
    }
}

fn view(pod: &Pod) -> PodView {
    let spec = pod.spec.as_ref();
    let status = pod.status.as_ref();
    let host_network = spec.and_then(|spec| spec.host_network).unwrap_or(false);
    let finished = status
        .and_then(|status| status.phase.as_deref())
        .is_some_and(|phase| phase == "Succeeded" || phase == "Failed");
    let containers = spec.into_iter().flat_map(|spec| {
        // Sidecars' ports count as well.
        spec.containers
            .iter()
            .chain(spec.init_containers.iter().flatten())
    });
    let ports = containers
        .flat_map(|container| container.ports.iter().flatten())
        .filter_map(|port| {
            let number = u16::try_from(port.container_port).ok()?;
            Some((
                port.name.clone()?,
                protocol(port.protocol.as_deref()),
                number,
            ))
        });
    let addresses = status
        .into_iter()
        .flat_map(|status| status.pod_ips.iter().flatten())
        .filter_map(|ip| ip.ip.parse().ok());
    // A pod of the host's network is the node; the address of a finished pod may be another's by now.
    let addresses = if host_network || finished {
        Vec::new()
    } else {
        addresses.collect()
    };
    let owner = pod
        .metadata
        .owner_references
        .iter()
        .flatten()
        .find(|owner| owner.controller == Some(true));
    PodView {
        kind: Kind {
            namespace: pod.metadata.namespace.clone().unwrap_or_default(),
            labels: pod.metadata.labels.clone().unwrap_or_default(),
            ports: ports.collect(),
        },
        addresses,
        workload: owner.map(|owner| (owner.kind.clone(), owner.name.clone())),
    }
}

/// FNV-1a over everything that makes the kind, with separators that no label may hold.
fn hash(kind: &Kind) -> u32 {
    let mut hash = 0x811c_9dc5_u32;
    let mut eat = |text: &str| {
        for byte in text.bytes().chain([0]) {
            hash = (hash ^ u32::from(byte)).wrapping_mul(0x0100_0193);
        }
    };
    eat(&kind.namespace);
    for (key, value) in &kind.labels {
        eat(key);
        eat(value);
    }
    for (name, protocol, port) in &kind.ports {
        eat(name);
        eat(&format!("{protocol}/{port}"));
    }
    hash
}

#[cfg(test)]
mod tests;
