//! Rules that name Services: what they mean is put in their place, again whenever Services change.

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::sync::Arc;

use super::Engine;
use crate::kernel::PolicyKernel;
use crate::rule::{Name, Peer, Policy, PolicyRef};
use crate::services::ServiceView;

impl<K: PolicyKernel> Engine<K> {
    /// Whether rules name Services: they must be told before the next refresh.
    pub fn asks_for_services(&self) -> bool {
        !self.with_services.is_empty()
    }

    /// Takes a Service; none removes it.
    pub fn set_service(&mut self, name: &Name, service: Option<ServiceView>) {
        self.services_moved |= self.services.set(name, service);
    }

    /// Takes an EndpointSlice of a Service without a selector: whose it is, and its addresses; none removes it.
    pub fn set_service_slice(&mut self, name: &Name, slice: Option<(Name, BTreeSet<IpAddr>)>) {
        self.services_moved |= self.services.set_slice(name, slice);
    }

    /// Names of all Services and their slices that are known.
    pub fn known_services(&self) -> [Vec<Name>; 2] {
        self.services.names()
    }

    /// The same policies with whom their Services are made of. What was read is kept.
    pub(super) fn resolve(&mut self, id: &Arc<PolicyRef>, policies: Vec<Policy>) -> Vec<Policy> {
        let mut peers = policies
            .iter()
            .flat_map(|policy| &policy.rules)
            .flat_map(|rule| &rule.peers);
        if !peers.any(|peer| matches!(peer, Peer::Services(_))) {
            self.with_services.remove(id);
            return policies;
        }
        let resolved = self.resolved(&policies);
        self.with_services.insert(id.clone(), policies);
        resolved
    }

    fn resolved(&self, policies: &[Policy]) -> Vec<Policy> {
        let mut resolved = policies.to_vec();
        let rules = resolved.iter_mut().flat_map(|policy| &mut policy.rules);
        for rule in rules {
            let peers = std::mem::take(&mut rule.peers).into_iter();
            rule.peers = peers
                .flat_map(|peer| match peer {
                    Peer::Services(service) => self.services.peers(&service),
                    other => vec![other],
                })
                .collect();
        }
        resolved
    }

    /// Services may mean others now.
    pub(super) fn resolve_again(&mut self) {
        if !std::mem::take(&mut self.services_moved) {
            return;
        }
        let all = self.with_services.iter();
        let all: Vec<_> = all
            .map(|(id, policies)| (id.clone(), self.resolved(policies)))
            .collect();
        for (id, policies) in all {
            self.take_policies(&id, policies);
        }
    }
}
