//! What the engine knows, as rows for the command line.

use std::collections::BTreeSet;
use std::net::IpAddr;

use serde_json::{Value, json};
use xebec_dataplane_common::policy::IDENTITY_HOST;

use crate::domains::Pattern;
use crate::engine::Engine;
use crate::kernel::PolicyKernel;
use crate::kind::Kind;
use crate::places::places;
use crate::rule::{Direction, Name, Place, PolicyRef};

impl<K: PolicyKernel> Engine<K> {
    /// Policies.
    pub fn policy_rows(&self) -> Vec<Value> {
        self.policy_ids()
            .iter()
            .map(|id| self.policy_row(id))
            .collect()
    }

    fn policy_row(&self, id: &PolicyRef) -> Value {
        let rows: Vec<_> = self.policies.of(id).collect();
        let numbers: BTreeSet<u32> = rows.iter().map(|row| row.number).collect();
        let pods: BTreeSet<&Name> = self
            .endpoints
            .values()
            .filter(|one| {
                let local = one.identity.and_then(|at| self.locals.get(&at));
                local.is_some_and(|local| !local.policies.is_disjoint(&numbers))
            })
            .map(|one| &one.pod)
            .collect();
        let types: Vec<&str> = Direction::ALL
            .into_iter()
            .filter(|way| rows.iter().any(|row| row.policy.judges(*way)))
            .map(Direction::name)
            .collect();
        let rules: usize = rows.iter().map(|row| row.policy.rules.len()).sum();
        let first = rows.first().map(|row| &row.policy);
        json!({
            "namespace": id.namespace,
            "policy": id.name,
            "kind": id.source.kind(),
            "types": types,
            "rules": rules,
            "pods": pods.len(),
            "node": self.locals.get(&IDENTITY_HOST).is_some_and(|host| !host.policies.is_disjoint(&numbers)),
            "mode": if first.is_some_and(|policy| policy.audit) { "audit" } else { "enforce" },
            "state": self.state(id),
        })
    }

    /// Whether a policy is in force, or what is in the way.
    fn state(&self, id: &PolicyRef) -> String {
        if let Some(errors) = self.errors().get(id) {
            return format!("not whole: {}", errors.join("; "));
        }
        let full = self
            .problems()
            .find(|problem| problem.policies.iter().any(|one| **one == *id));
        full.map_or_else(
            || "in force".to_owned(),
            |problem| format!("as before: {}", problem.why),
        )
    }

    /// Identities of pods.
    pub fn identity_rows(&self) -> Vec<Value> {
        let mut rows: Vec<_> = self.kinds.all().collect();
        rows.sort_by(|a, b| (&a.1, a.0).cmp(&(&b.1, b.0)));
        rows.into_iter()
            .map(|(identity, kind)| {
                let labels = kind.labels.iter();
                let labels: Vec<String> = labels
                    .map(|(key, value)| format!("{key}={value}"))
                    .collect();
                let ports = kind.ports.iter();
                let ports: Vec<String> = ports
                    .map(|(name, protocol, port)| format!("{name}:{port}/{protocol}"))
                    .collect();
                let pods = self.pods.values();
                let pods = pods.filter(|pod| pod.identity == Some(identity)).count();
                json!({
                    "identity": identity,
                    "namespace": kind.namespace,
                    "service_account": kind.service_account,
                    "labels": labels,
                    "named_ports": ports,
                    "pods": pods,
                })
            })
            .collect()
    }

    /// What resolvers told of domains, with the policies whose rules are about them; `now` in seconds since 1970.
    pub fn domain_rows(&self, now: u64) -> Vec<Value> {
        let ids = self.policy_ids();
        let rows = ids.iter().flat_map(|id| self.policies.of(id));
        let meaning: Vec<(String, Vec<&Pattern>)> = rows
            .map(|row| {
                let places = row.policy.rules.iter().flat_map(places);
                let patterns = places.filter_map(|place| match place {
                    Place::Domains(pattern) => Some(&**pattern),
                    _ => None,
                });
                (row.policy.id.to_string(), patterns.collect())
            })
            .collect();
        let about = |name: &str| -> Vec<&str> {
            let own = meaning.iter();
            let own = own.filter(|(_, all)| all.iter().any(|one| one.matches(name)));
            own.map(|(id, _)| &**id).collect()
        };
        let all = self.domains().all();
        all.flat_map(|(name, told)| {
            let policies = about(name);
            told.into_iter().map(move |one| {
                json!({
                    "domain": &**name,
                    "address": one.address,
                    "seconds_left": one.until.saturating_sub(now),
                    "policies": policies,
                })
            })
        })
        .collect()
    }

    /// What is known of the endpoint with an address: identity, labels, and its sets.
    pub fn endpoint_row(&self, address: IpAddr) -> Option<Value> {
        let connected = self.endpoints.get(&address)?;
        let mut row = json!({"identity": connected.identity, "audit": connected.audit});
        if let Some(identity) = connected.identity {
            if let Some(kind) = self.kinds.get(identity) {
                add_labels(&mut row, kind);
            }
            self.add_sets(&mut row, identity, connected.audit);
        }
        Some(row)
    }

    /// The same of the node itself, if policies are for it.
    pub fn host_row(&self) -> Option<Value> {
        let local = self.locals.get(&IDENTITY_HOST)?;
        if local.policies.is_empty() {
            return None;
        }
        let mut row = json!({"identity": IDENTITY_HOST, "audit": false});
        add_labels(&mut row, &self.host);
        self.add_sets(&mut row, IDENTITY_HOST, false);
        Some(row)
    }

    /// What a kind of this node is under.
    fn add_sets(&self, row: &mut Value, identity: u32, audit: bool) {
        let Some(local) = self.locals.get(&identity) else {
            return;
        };
        let Some([enforced, whole]) = local.chains else {
            return;
        };
        for direction in Direction::ALL {
            let word = direction.name().to_ascii_lowercase();
            let chain = enforced[direction.index()];
            let size: usize = chain
                .iter()
                .filter_map(|set| self.sets.get(*set))
                .map(|made| made.content.rules.len())
                .sum();
            let enforced = chain.iter().any(|set| *set != 0) && !audit;
            row[format!("{word}_enforced")] = enforced.into();
            row[format!("{word}_sets")] = chain.iter().filter(|set| **set != 0).copied().collect();
            row[format!("{word}_entries")] = size.into();
        }
        row["audited"] = (whole != enforced || audit).into();
        let rows = local
            .policies
            .iter()
            .filter_map(|at| self.policies.get(*at));
        row["policies"] = rows.map(|row| row.policy.id.to_string()).collect();
    }
}

fn add_labels(row: &mut Value, kind: &Kind) {
    let labels = kind.labels.iter();
    row["labels"] = labels
        .map(|(key, value)| format!("{key}={value}"))
        .collect();
}
