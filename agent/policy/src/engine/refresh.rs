//! Brings the kernel in step with what is known: sets first, then who has which address, then the pods under the sets,
//! then what nobody needs any more.

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::sync::Arc;

use anyhow::Result;
use hashbrown::HashSet;
use tracing::warn;
use xebec_dataplane_common::policy::{self, Chain, IDENTITY_HELD, IDENTITY_HOST};

use super::{Chains, Engine, Local, Problem, set_key};
use crate::kernel::{Endpoint, PolicyKernel};
use crate::kind::Kind;
use crate::policies::Row;
use crate::rule::{Direction, Name, PolicyRef, Seat, Tier};
use crate::sets::{Full, View};

/// As the kernel has them: what is enforced, and what would be, were nothing in audit mode.
fn kernel_chains(enforced: Chains, audited: Chains) -> policy::Chains {
    policy::Chains {
        ingress: enforced[0],
        egress: enforced[1],
        ingress_audit: audited[0],
        egress_audit: audited[1],
    }
}

impl<K: PolicyKernel> Engine<K> {
    /// Brings the kernel in step with all that changed. Where a set can't be written, the one before it stays, and
    /// what did not fit is among the [`problems`](Self::problems).
    pub fn refresh(&mut self) -> Result<()> {
        self.resolve_again();
        self.meet();
        let stale = std::mem::take(&mut self.stale);
        let mut written: BTreeSet<IpAddr> = std::mem::take(&mut self.changed);
        for address in &written {
            self.join(*address);
        }
        let wanted: BTreeSet<u32> = self
            .locals
            .iter()
            .filter(|(identity, local)| stale.contains(identity) || local.chains.is_none())
            .map(|(identity, _)| *identity)
            .collect();
        let mut old = Vec::new();
        for identity in wanted {
            match self.choose(identity) {
                Ok(before) => {
                    self.full.remove(&identity);
                    if let Some(before) = before {
                        old.extend(before.as_flattened().as_flattened().iter().copied());
                        self.host_moved |= identity == IDENTITY_HOST;
                        if let Some(local) = self.locals.get(&identity) {
                            written.extend(&local.endpoints);
                        }
                    }
                }
                Err(error) => {
                    // It is tried again with the next change.
                    self.stale.insert(identity);
                    self.complain(identity, &error);
                }
            }
        }
        let mut outcome = self.write_addresses();
        if let Err(error) = self.write_host() {
            outcome = Err(error);
        }
        for address in written {
            if let Err(error) = self.write_endpoint(address) {
                self.changed.insert(address);
                outcome = Err(error);
            }
        }
        if self.judge_anew {
            self.generation = self.generation.wrapping_add(1);
            match self.kernel.set_generation(self.generation) {
                Ok(()) => self.judge_anew = false,
                Err(error) => outcome = Err(error),
            }
        }
        for set in old {
            self.sets
                .release(&mut self.selectors, &mut self.places, set);
        }
        self.part();
        outcome
    }

    /// Gives sets the entries of kinds that nobody has met yet.
    fn meet(&mut self) {
        for identity in std::mem::take(&mut self.fresh) {
            let Some(kind) = self.kinds.get(identity).cloned() else {
                continue;
            };
            let sets = self.selectors.begin(identity, &kind, &self.namespaces);
            self.give_entries(identity, &kind, sets);
        }
        for identity in std::mem::take(&mut self.held) {
            if let Some(kind) = self.kinds.get(identity).cloned() {
                let sets = self.selectors.sets_of(identity, &kind);
                self.give_entries(identity, &kind, sets);
                let own = self.addresses.iter();
                let own = own.filter(|(_, owner)| owner.identity == identity);
                self.moved.extend(own.map(|(address, _)| *address));
                if let Some(local) = self.locals.get(&identity) {
                    self.changed.extend(&local.endpoints);
                }
            }
        }
    }

    fn give_entries(&mut self, identity: u32, kind: &Kind, sets: HashSet<u32>) {
        for set in sets {
            let met = self
                .sets
                .meet(&mut self.kernel, &self.selectors, set, identity, kind);
            if let Err(error) = met {
                warn!(
                    error = format!("{error:#}"),
                    namespace = kind.namespace,
                    "rules have no room for pods that are new: nobody under these rules may speak with them"
                );
                self.held.insert(identity);
            }
        }
    }

    /// Makes an endpoint one of its pod's kind, if that has changed; it stays under the old one's sets until it is
    /// written.
    fn join(&mut self, address: IpAddr) {
        let Some(connected) = self.endpoints.get_mut(&address) else {
            return;
        };
        // A pod that the API has forgotten keeps what it had until it is disconnected.
        let Some(row) = self.pods.get(&connected.pod) else {
            return;
        };
        connected.audit = row.view.audit;
        let Some(identity) = row.identity else {
            return;
        };
        if self.locals.contains_key(&identity) {
            return;
        }
        let Some(kind) = self.kinds.get(identity) else {
            return;
        };
        let namespace = self.namespaces.get(&kind.namespace);
        let local = Local {
            policies: self.policies.about(kind, namespace),
            ..Local::default()
        };
        self.locals.insert(identity, local);
    }

    /// Writes the sets of a kind; those before, where they are others.
    fn choose(&mut self, identity: u32) -> Result<Option<[Chains; 2]>> {
        let kind = match identity {
            IDENTITY_HOST => Some(self.host.clone()),
            _ => self.kinds.get(identity).cloned(),
        };
        let (Some(kind), Some(local)) = (kind, self.locals.get(&identity)) else {
            return Ok(None);
        };
        let numbers = local.policies.clone();
        let mut chains = [[Chain::default(); 2]; 2];
        for direction in Direction::ALL {
            for seat in Seat::ALL {
                let tier = seat.tier();
                let (way, place) = (direction.index(), seat.place());
                let whole = self.policies.chosen(&numbers, seat, direction, true);
                let audited = whole.iter().any(|row| row.policy.audit);
                let outcome = self.choose_set(whole, &kind, tier, direction);
                let outcome = outcome.and_then(|set| {
                    chains[1][way][place] = set;
                    if !audited {
                        self.sets.share(set);
                        return Ok(set);
                    }
                    let enforced = self.policies.chosen(&numbers, seat, direction, false);
                    self.choose_set(enforced, &kind, tier, direction)
                });
                match outcome {
                    Ok(set) => chains[0][way][place] = set,
                    Err(error) => {
                        self.give_back(chains.as_flattened().as_flattened());
                        return Err(error);
                    }
                }
            }
        }
        let Some(local) = self.locals.get_mut(&identity) else {
            return Ok(None);
        };
        let before = local.chains.replace(chains);
        if before == Some(chains) {
            self.give_back(chains.as_flattened().as_flattened());
            return Ok(None);
        }
        self.judge_anew = true;
        Ok(Some(before.unwrap_or_default()))
    }

    /// The set of these policies for a kind, which is written if it is new.
    fn choose_set(
        &mut self,
        policies: Vec<Arc<Row>>,
        kind: &Kind,
        tier: Tier,
        direction: Direction,
    ) -> Result<u32> {
        let key = set_key(&policies, kind, tier, direction);
        let view = View {
            kinds: &self.kinds,
            namespaces: &self.namespaces,
        };
        self.sets.acquire(
            &mut self.kernel,
            &self.names,
            (&mut self.selectors, &mut self.places),
            view,
            (key, policies, kind),
        )
    }

    fn give_back(&mut self, sets: &[u32]) {
        for set in sets {
            self.sets
                .release(&mut self.selectors, &mut self.places, *set);
        }
    }

    fn complain(&mut self, identity: u32, error: &anyhow::Error) {
        let policies = self.locals.get(&identity).map(|local| {
            let rows = local
                .policies
                .iter()
                .filter_map(|at| self.policies.get(*at));
            rows.map(|row| row.policy.id.clone()).collect()
        });
        let pods = self
            .endpoints
            .values()
            .filter(|one| {
                let row = self.pods.get(&one.pod);
                row.is_some_and(|row| row.identity == Some(identity))
            })
            .map(|one| one.pod.clone())
            .collect::<BTreeSet<Name>>();
        let mut policies: Vec<Arc<PolicyRef>> = policies.unwrap_or_default();
        // The one whose rule has most is named, if there is one.
        if let Some(Full {
            most: Some((rule, _)),
            ..
        }) = error.downcast_ref()
        {
            policies = vec![rule.policy.clone()];
        }
        let problem = Problem {
            pods: pods.into_iter().collect(),
            policies,
            why: format!("{error:#}"),
        };
        let all = vec![problem];
        if self.full.get(&identity) != Some(&all) {
            warn!(
                why = all[0].why,
                pods = all[0].pods.len(),
                "policies could not be put into force; the rules before them stay"
            );
            self.full.insert(identity, all);
        }
    }

    fn write_addresses(&mut self) -> Result<()> {
        let mut outcome = Ok(());
        for address in std::mem::take(&mut self.moved) {
            let written = match self.addresses.get(&address) {
                Some(owner) if self.held.contains(&owner.identity) => {
                    self.kernel.set_identity(address, IDENTITY_HELD)
                }
                Some(owner) => self.kernel.set_identity(address, owner.identity),
                None => self.kernel.remove_identity(address),
            };
            // Where there are no rules, who somebody is makes no difference.
            self.judge_anew |= self.sets.used().sets > 0;
            if let Err(error) = written {
                self.moved.insert(address);
                outcome = Err(error);
            }
        }
        outcome
    }

    /// Tells the kernel under which sets the node itself is, if these are there.
    fn write_host(&mut self) -> Result<()> {
        let local = self.locals.get(&IDENTITY_HOST);
        let Some([enforced, whole]) = local.and_then(|local| local.chains) else {
            return Ok(());
        };
        if !self.host_moved {
            return Ok(());
        }
        let audited = match enforced == whole {
            true => Chains::default(),
            false => whole,
        };
        self.kernel.set_host(kernel_chains(enforced, audited))?;
        self.host_moved = false;
        Ok(())
    }

    /// Tells the kernel what a pod of this node is, if its sets are there.
    fn write_endpoint(&mut self, address: IpAddr) -> Result<()> {
        let Some(connected) = self.endpoints.get(&address) else {
            return Ok(());
        };
        let Some(row) = self.pods.get(&connected.pod) else {
            return Ok(());
        };
        let (Some(identity), reads_http) = (row.identity, row.view.reads_http) else {
            return Ok(());
        };
        let Some([enforced, whole]) = self.locals.get(&identity).and_then(|local| local.chains)
        else {
            return Ok(());
        };
        let none = Chains::default();
        let (enforced, audited) = match connected.audit {
            true => (none, whole),
            false if enforced == whole => (enforced, none),
            false => (enforced, whole),
        };
        let endpoint = Endpoint {
            ifindex: connected.ifindex,
            identity: if self.held.contains(&identity) {
                IDENTITY_HELD
            } else {
                identity
            },
            mac: connected.mac,
            learns: self.names_domains(identity),
            reads_http,
            chains: kernel_chains(enforced, audited),
        };
        if connected.written != Some(endpoint) {
            self.kernel.set_endpoint(address, endpoint)?;
            self.judge_anew = true;
        }
        let before = connected.identity;
        if let Some(connected) = self.endpoints.get_mut(&address) {
            connected.written = Some(endpoint);
        }
        if before == Some(identity) {
            return Ok(());
        }
        // The kind stays as long as it has endpoints, whether the API still has pods of it or not.
        if let Some(kind) = self.kinds.get(identity).cloned() {
            self.kinds.add((*kind).clone());
        }
        let old = self.endpoints.get_mut(&address).map(|connected| {
            let old = connected.clone();
            connected.identity = Some(identity);
            old
        });
        self.leave(address, old.as_ref());
        if let Some(local) = self.locals.get_mut(&identity) {
            local.endpoints.insert(address);
        }
        Ok(())
    }

    /// Whether rules for a kind name domains.
    fn names_domains(&self, identity: u32) -> bool {
        let numbers = self
            .locals
            .get(&identity)
            .map(|local| local.policies.iter());
        let mut rows = numbers
            .into_iter()
            .flatten()
            .filter_map(|at| self.policies.get(*at));
        rows.any(|row| row.names_domains())
    }

    /// Takes the entries of kinds that have no pods any more from the sets.
    fn part(&mut self) {
        for identity in std::mem::take(&mut self.gone) {
            if self.kinds.pods(identity) > 0 {
                continue;
            }
            let Some(kind) = self.kinds.get(identity).cloned() else {
                continue;
            };
            // One that nobody has connected to leaves no sets.
            if self
                .locals
                .get(&identity)
                .is_some_and(|local| local.endpoints.is_empty())
            {
                self.drop_local(identity);
            }
            let mut left = false;
            for set in self.selectors.sets_of(identity, &kind) {
                let parted =
                    self.sets
                        .part(&mut self.kernel, &self.selectors, set, identity, &kind);
                if let Err(error) = parted {
                    warn!(
                        error = format!("{error:#}"),
                        "entries of pods that are gone stay in a set"
                    );
                    left = true;
                }
            }
            if left {
                self.gone.insert(identity);
                continue;
            }
            self.selectors.end(identity, &kind);
            self.kinds.forget(identity);
            self.held.remove(&identity);
            self.fresh.remove(&identity);
        }
    }
}
