//! Random clusters, changes of them, and packets.

use rand::Rng;
use rand::rngs::StdRng;
use serde_json::{Value, json};

use crate::{Answer, Cluster, object};

mod admin;
mod cilium;
mod network_policy;
mod packets;
mod pods;
mod words;

pub use packets::packets;
use words::{ADDRESSES, HOMES, NAMES, SERVICES, labels, one};

/// What a cluster has besides NetworkPolicies.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Options {
    /// Cilium's policies.
    pub cilium: bool,
    /// The policies of administrators.
    pub admin: bool,
}

/// A group of APIs whose policies come and go together.
#[derive(Clone, Copy, PartialEq)]
enum Family {
    Network,
    Admin,
    Cilium,
}

/// Leaves names of ports out of egress rules about address blocks, and about Services, which may be some: there they stand
/// for nothing yet (see README.md).
pub fn without_names_in_blocks(cluster: &mut Cluster) {
    for policy in &mut cluster.policies {
        let fields = policy.as_object_mut().into_iter().flatten();
        let specs = fields.filter_map(|(key, value)| match key.as_str() {
            "spec" => Some(std::slice::from_mut(value)),
            "specs" => value.as_array_mut().map(Vec::as_mut_slice),
            _ => None,
        });
        for spec in specs.flatten() {
            for list in ["egress", "egressDeny"] {
                let rules = spec.get_mut(list).and_then(Value::as_array_mut);
                rules.into_iter().flatten().for_each(name_no_ports);
            }
        }
    }
}

fn name_no_ports(rule: &mut Value) {
    let mut peers = rule["to"].as_array().into_iter().flatten();
    if rule.get("toServices").is_none() && !peers.any(|peer| peer.get("ipBlock").is_some()) {
        return;
    }
    let number = |port: &mut Value, number: Value| {
        let name = port["port"].as_str().unwrap_or_default();
        if name.starts_with(|one: char| one.is_ascii_alphabetic()) {
            port["port"] = number;
        }
    };
    if let Some(ports) = rule.get_mut("ports").and_then(Value::as_array_mut) {
        ports.iter_mut().for_each(|port| number(port, json!(80)));
    }
    let of_cilium = rule.get_mut("toPorts").and_then(Value::as_array_mut);
    for one in of_cilium.into_iter().flatten() {
        let ports = one.get_mut("ports").and_then(Value::as_array_mut);
        let ports = ports.into_iter().flatten();
        ports.for_each(|port| number(port, json!("80")));
    }
}

/// Seeds of so many histories: others each time, and told; `XEBEC_SEED` is one to repeat.
///
/// # Panics
/// If `XEBEC_SEED` is no number.
#[allow(clippy::expect_used, reason = "for tests, which may panic")]
pub fn seeds(histories: u64) -> std::ops::Range<u64> {
    let given = std::env::var("XEBEC_SEED");
    let (first, count) = match given {
        Ok(seed) => (seed.parse().expect("XEBEC_SEED is a number"), 1),
        Err(_) => (u64::from(rand::rng().random::<u32>()), histories),
    };
    println!("{count} seeds from {first} on");
    first..first + count
}

const FAMILIES: [Family; 3] = [Family::Network, Family::Admin, Family::Cilium];
const NAMESPACES: [&str; 3] = ["x", "y", "z"];
const NODES: [&str; 2] = ["n1", "n2"];
const MOST_PODS: usize = 10;
const MOST_POLICIES: usize = 8;

/// A random cluster: three namespaces, two nodes, 4 to 9 pods and up to 6 policies, at least one of each of the groups
/// that the options ask for.
pub fn cluster(random: &mut StdRng, options: &Options) -> Cluster {
    let mut cluster = Cluster {
        namespaces: NAMESPACES
            .iter()
            .map(|name| namespace(random, name))
            .collect(),
        nodes: (1..)
            .zip(NODES)
            .map(|(number, name)| node(random, number, name))
            .collect(),
        ..Cluster::default()
    };
    for _ in 0..random.random_range(4..10) {
        pods::add(random, &mut cluster);
    }
    let wanted: Vec<Family> = FAMILIES
        .into_iter()
        .filter(|family| match family {
            Family::Network => true,
            Family::Admin => options.admin,
            Family::Cilium => options.cilium,
        })
        .collect();
    for family in &wanted {
        if *family != Family::Network {
            add_policy(random, &mut cluster, *family);
        }
    }
    for _ in cluster.policies.len()..random.random_range(0..7) {
        let family = *one(random, &wanted);
        add_policy(random, &mut cluster, family);
    }
    if wanted.len() > 1 {
        for _ in 0..random.random_range(0..4) {
            answer(random, &mut cluster);
            service(random, &mut cluster);
        }
    }
    cluster
}

/// A Service comes, changes or goes.
fn service(random: &mut StdRng, cluster: &mut Cluster) {
    let (namespace, name) = (*one(random, &HOMES), *one(random, &SERVICES));
    let is = |one: &Value| {
        let metadata = object::metadata(one);
        metadata.namespace == namespace && metadata.name == name
    };
    cluster.services.retain(|one| !is(one));
    cluster.slices.retain(|one| !is(one));
    if random.random_bool(0.2) {
        return;
    }
    let spec = match random.random_bool(0.6) {
        true => json!({"selector": labels(random, &["app", "tier"])}),
        false => json!({}),
    };
    let labels = labels(random, &["app", "tier"]);
    cluster.services.push(json!({
        "metadata": {"namespace": namespace, "name": name, "labels": labels},
        "spec": spec,
    }));
    // Others may write slices for any.
    let addresses: Vec<&str> = (0..3).map(|_| *one(random, &ADDRESSES)).collect();
    cluster.slices.push(json!({
        "metadata": {"namespace": namespace, "name": name, "labels": {"kubernetes.io/service-name": name}},
        "endpoints": [{"addresses": addresses}],
    }));
}

/// A resolver answers, and time goes by.
fn answer(random: &mut StdRng, cluster: &mut Cluster) {
    cluster.now += 1;
    cluster.answers.retain(|one| one.until >= cluster.now);
    let name = *one(random, &NAMES);
    let Ok(address) = one(random, &ADDRESSES).parse() else {
        return;
    };
    cluster.answers.push(Answer {
        name: name.to_owned(),
        address,
        until: cluster.now + random.random_range(0..8),
    });
}

/// Changes one thing: a policy, a pod, the labels of a pod or namespace, that a pod has ended, a Service,
/// or what resolvers answered. Policies that are added
/// are of APIs that the cluster has policies of already, or NetworkPolicies.
pub fn change(random: &mut StdRng, cluster: &mut Cluster) {
    let policies = cluster.policies.len();
    let pods = cluster.pods.len();
    let only = count(cluster, Family::Network) == policies;
    match random.random_range(0..12) {
        10.. if !only && random.random_bool(0.5) => service(random, cluster),
        10.. if !only => answer(random, cluster),
        0..=1 if policies < MOST_POLICIES => {
            let present: Vec<Family> = FAMILIES
                .into_iter()
                .filter(|family| *family == Family::Network || count(cluster, *family) > 0)
                .collect();
            let family = *one(random, &present);
            add_policy(random, cluster, family);
        }
        2 if policies > 0 => {
            let index = random.random_range(0..policies);
            let family = family(&cluster.policies[index]);
            // The last one stays, for its kind would not come back.
            if family == Family::Network || count(cluster, family) > 1 {
                cluster.policies.remove(index);
            } else {
                edit(random, &mut cluster.policies[index]);
            }
        }
        3..=5 if policies > 0 => {
            let index = random.random_range(0..policies);
            edit(random, &mut cluster.policies[index]);
        }
        6 if pods > 0 => {
            let index = random.random_range(0..pods);
            if random.random_bool(0.2) {
                cluster.pods[index]["status"]["phase"] = json!("Succeeded");
            } else {
                cluster.pods[index]["metadata"]["labels"] = labels(random, &["app", "tier"]);
            }
        }
        7 => {
            let index = random.random_range(0..cluster.namespaces.len());
            let name = object::metadata(&cluster.namespaces[index]).name;
            cluster.namespaces[index] = namespace(random, &name);
        }
        8 if pods > 1 => {
            let index = random.random_range(0..pods);
            cluster.pods.remove(index);
        }
        _ if pods < MOST_PODS => pods::add(random, cluster),
        _ => {
            let index = random.random_range(0..pods);
            cluster.pods.remove(index);
            pods::add(random, cluster);
        }
    }
}

fn namespace(random: &mut StdRng, name: &str) -> Value {
    let mut labels = labels(random, &["env"]);
    labels["kubernetes.io/metadata.name"] = json!(name);
    json!({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name, "labels": labels}})
}

fn node(random: &mut StdRng, number: u8, name: &str) -> Value {
    let mut labels = labels(random, &["zone"]);
    labels["kubernetes.io/hostname"] = json!(name);
    json!({
        "apiVersion": "v1",
        "kind": "Node",
        "metadata": {"name": name, "labels": labels},
        "status": {"addresses": [
            {"type": "Hostname", "address": name},
            {"type": "InternalIP", "address": format!("192.168.0.{number}")},
            {"type": "InternalIP", "address": format!("fd01::{number}")},
        ]},
    })
}

fn family(policy: &Value) -> Family {
    match object::kind(policy) {
        "NetworkPolicy" => Family::Network,
        "ClusterNetworkPolicy" | "AdminNetworkPolicy" | "BaselineAdminNetworkPolicy" => {
            Family::Admin
        }
        "CiliumNetworkPolicy" | "CiliumClusterwideNetworkPolicy" | "CiliumCIDRGroup" => {
            Family::Cilium
        }
        kind => panic!("{kind} is none of the policies that are made here"),
    }
}

fn count(cluster: &Cluster, wanted: Family) -> usize {
    let policies = cluster.policies.iter();
    policies.filter(|one| family(one) == wanted).count()
}

fn add_policy(random: &mut StdRng, cluster: &mut Cluster, family: Family) {
    let mut policy = random_policy(random, family);
    let name = policy["metadata"]["name"].clone();
    let is_there = |one: &Value| one["kind"] == policy["kind"] && one["metadata"]["name"] == name;
    if policy["metadata"]["name"].is_null() {
        policy["metadata"]["name"] = json!(words::free_name(&cluster.policies, "policy"));
    } else if let Some(present) = cluster.policies.iter_mut().find(|one| is_there(one)) {
        // There can be only one of this kind and name.
        *present = policy;
        return;
    }
    cluster.policies.push(policy);
}

/// A policy of one of these kinds, without a name if it may have any.
fn random_policy(random: &mut StdRng, family: Family) -> Value {
    match family {
        Family::Network => network_policy::policy(random),
        Family::Admin => admin::policy(random),
        Family::Cilium => cilium::policy(random),
    }
}

/// Takes one field of a policy's spec, or all of it, from another random policy of its kind.
fn edit(random: &mut StdRng, policy: &mut Value) {
    let other = loop {
        let other = random_policy(random, family(policy));
        if other["kind"] == policy["kind"] && other["spec"].is_object() {
            break other;
        }
    };
    let specs = [&policy["spec"], &other["spec"]];
    let fields = specs.into_iter().filter_map(Value::as_object);
    let fields: Vec<String> = fields.flat_map(|fields| fields.keys().cloned()).collect();
    let for_nodes = |policy: &Value| policy["spec"].get("nodeSelector").is_some();
    let other_form = for_nodes(policy) != for_nodes(&other);
    if !policy["spec"].is_object() || fields.is_empty() || other_form || random.random_bool(0.3) {
        policy["spec"] = other["spec"].clone();
        return;
    }
    let field = one(random, &fields);
    match other["spec"].get(field) {
        Some(value) => policy["spec"][field] = value.clone(),
        None => {
            if let Some(spec) = policy["spec"].as_object_mut() {
                spec.remove(field);
            }
        }
    }
}

#[cfg(test)]
mod tests;
