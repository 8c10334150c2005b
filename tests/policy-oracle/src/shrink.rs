//! Makes a cluster that shows a mistake smaller.

use serde_json::Value;

use crate::Cluster;

/// A place in an object: keys of maps, numbers of lists.
#[derive(Clone)]
enum Step {
    Key(String),
    Index(usize),
}

/// Lists whose every entry may go, the last one too.
const LISTS: [&str; 10] = [
    "egress",
    "egressDeny",
    "except",
    "externalCIDRs",
    "ingress",
    "ingressDeny",
    "initContainers",
    "matchExpressions",
    "policyTypes",
    "specs",
];

/// Lists that an object can't be without, or that mean something else when they are empty: one entry stays.
const FILLED: [&str; 20] = [
    "fields",
    "from",
    "fromCIDR",
    "fromCIDRSet",
    "fromEndpoints",
    "fromEntities",
    "icmps",
    "networks",
    "ports",
    "protocols",
    "to",
    "toCIDR",
    "toCIDRSet",
    "toEndpoints",
    "toEntities",
    "toFQDNs",
    "toPorts",
    "toServices",
    "values",
    "domainNames",
];

/// Maps whose every entry may go.
const MAPS: [&str; 2] = ["labels", "matchLabels"];

/// Fields that may go.
const FIELDS: [&str; 6] = [
    "enableDefaultDeny",
    "endPort",
    "icmps",
    "ports",
    "protocols",
    "toPorts",
];

/// Labels that the API server gives.
const GIVEN: [&str; 2] = ["kubernetes.io/metadata.name", "kubernetes.io/hostname"];

/// Removes policies, pods, Services, answers of resolvers, rules, peers, ports and labels one after the other, as long as the cluster still fails, until
/// nothing more can go. `fails` must answer for clusters, too, that lack pods: see [`crate::Packet::is_in`].
pub fn shrink(mut cluster: Cluster, mut fails: impl FnMut(&Cluster) -> bool) -> Cluster {
    loop {
        let mut smaller = false;
        for part in [policies, pods, services, slices] {
            smaller |= objects(&mut cluster, part, &mut fails);
        }
        smaller |= answers(&mut cluster, &mut fails);
        for part in [policies, pods, namespaces, nodes] {
            for index in 0..part(&mut cluster).len() {
                smaller |= insides(&mut cluster, part, index, &mut fails);
            }
        }
        if !smaller {
            return cluster;
        }
    }
}

type Part = fn(&mut Cluster) -> &mut Vec<Value>;

fn policies(cluster: &mut Cluster) -> &mut Vec<Value> {
    &mut cluster.policies
}

fn pods(cluster: &mut Cluster) -> &mut Vec<Value> {
    &mut cluster.pods
}

fn services(cluster: &mut Cluster) -> &mut Vec<Value> {
    &mut cluster.services
}

fn slices(cluster: &mut Cluster) -> &mut Vec<Value> {
    &mut cluster.slices
}

fn namespaces(cluster: &mut Cluster) -> &mut Vec<Value> {
    &mut cluster.namespaces
}

fn nodes(cluster: &mut Cluster) -> &mut Vec<Value> {
    &mut cluster.nodes
}

/// Removes whole objects, the last one first.
fn objects(cluster: &mut Cluster, part: Part, fails: &mut impl FnMut(&Cluster) -> bool) -> bool {
    let mut smaller = false;
    for index in (0..part(cluster).len()).rev() {
        let mut tried = cluster.clone();
        part(&mut tried).remove(index);
        if fails(&tried) {
            *cluster = tried;
            smaller = true;
        }
    }
    smaller
}

/// Removes what resolvers answered.
fn answers(cluster: &mut Cluster, fails: &mut impl FnMut(&Cluster) -> bool) -> bool {
    let mut smaller = false;
    for index in (0..cluster.answers.len()).rev() {
        let mut tried = cluster.clone();
        tried.answers.remove(index);
        if fails(&tried) {
            *cluster = tried;
            smaller = true;
        }
    }
    smaller
}

/// Removes what can go from one object.
fn insides(
    cluster: &mut Cluster,
    part: Part,
    index: usize,
    fails: &mut impl FnMut(&Cluster) -> bool,
) -> bool {
    let mut smaller = false;
    let mut kept = 0;
    loop {
        let mut places = Vec::new();
        collect(&part(cluster)[index], &mut Vec::new(), &mut places);
        let Some(place) = places.get(kept) else {
            return smaller;
        };
        let mut tried = cluster.clone();
        remove(&mut part(&mut tried)[index], place);
        if fails(&tried) {
            *cluster = tried;
            smaller = true;
        } else {
            kept += 1;
        }
    }
}

/// Collects the places that can go, outer ones first.
fn collect(value: &Value, path: &mut Vec<Step>, places: &mut Vec<Vec<Step>>) {
    let of = |path: &Vec<Step>, step: Step| {
        let mut place = path.clone();
        place.push(step);
        place
    };
    let own = match path.last() {
        Some(Step::Key(key)) => key.clone(),
        _ => String::new(),
    };
    match value {
        Value::Array(list) => {
            let least = match own.as_str() {
                own if LISTS.contains(&own) => 0,
                own if FILLED.contains(&own) => 1,
                _ => list.len(),
            };
            if list.len() > least {
                places.extend((0..list.len()).map(|index| of(path, Step::Index(index))));
            }
            for (index, one) in list.iter().enumerate() {
                path.push(Step::Index(index));
                collect(one, path, places);
                path.pop();
            }
        }
        Value::Object(map) => {
            // An entry of toPorts is nothing without ports.
            let is_port_entry = match path.as_slice() {
                [.., Step::Key(list), Step::Index(_)] => list == "toPorts",
                _ => false,
            };
            for key in map.keys() {
                let is_entry = MAPS.contains(&own.as_str()) && !GIVEN.contains(&key.as_str());
                if is_entry || FIELDS.contains(&key.as_str()) && !is_port_entry {
                    places.push(of(path, Step::Key(key.clone())));
                }
            }
            for (key, one) in map {
                path.push(Step::Key(key.clone()));
                collect(one, path, places);
                path.pop();
            }
        }
        _ => {}
    }
}

fn remove(value: &mut Value, place: &[Step]) {
    let Some((last, outer)) = place.split_last() else {
        return;
    };
    let mut value = value;
    for step in outer {
        value = match step {
            Step::Key(key) => &mut value[key],
            Step::Index(index) => &mut value[index],
        };
    }
    match (last, value) {
        (Step::Key(key), Value::Object(map)) => {
            map.remove(key);
        }
        (Step::Index(index), Value::Array(list)) => {
            list.remove(*index);
        }
        _ => unreachable!("collected from the same object"),
    }
}

#[cfg(test)]
mod tests {
    use rand::SeedableRng;
    use rand::rngs::StdRng;
    use serde_json::json;

    use super::*;
    use crate::judge;
    use crate::random::{self, Options};

    fn size(cluster: &Cluster) -> usize {
        let Cluster {
            namespaces,
            pods,
            nodes,
            policies,
            ..
        } = cluster;
        json!([namespaces, pods, nodes, policies]).to_string().len()
    }

    #[test]
    fn what_is_shrunk_still_fails_and_is_smaller() {
        let mut shrunk = 0;
        for seed in 0..40 {
            let mut random = StdRng::seed_from_u64(seed);
            let options = Options {
                cilium: seed % 2 == 1,
                admin: seed % 4 > 1,
            };
            let cluster = random::cluster(&mut random, &options);
            let forbidden = random::packets(&mut random, &cluster, 50)
                .into_iter()
                .find(|packet| !judge(&cluster, packet).ingress.allowed);
            let Some(packet) = forbidden else {
                continue;
            };
            let fails = |cluster: &Cluster| {
                packet.is_in(cluster) && !judge(cluster, &packet).ingress.allowed
            };
            let small = shrink(cluster.clone(), fails);
            assert!(fails(&small));
            assert!(size(&small) < size(&cluster));
            assert_eq!(small.policies.len(), 1);
            assert!(small.pods.len() <= 2);
            shrunk += 1;
        }
        assert!(shrunk > 10);
    }

    #[test]
    fn only_what_matters_stays() {
        let policy = json!({
            "apiVersion": "networking.k8s.io/v1",
            "kind": "NetworkPolicy",
            "metadata": {"namespace": "x", "name": "one"},
            "spec": {
                "podSelector": {"matchLabels": {"app": "a"}, "matchExpressions": [{"key": "tier", "operator": "Exists"}]},
                "policyTypes": ["Ingress", "Egress"],
                "ingress": [
                    {"from": [{"podSelector": {}}, {"ipBlock": {"cidr": "10.0.0.0/8", "except": ["10.1.0.0/16", "10.2.0.0/16"]}}]},
                    {"ports": [{"port": 80}]},
                ],
            },
        });
        let cluster = Cluster {
            policies: vec![policy.clone(), policy],
            ..Cluster::default()
        };
        let small = shrink(cluster, |cluster| {
            cluster
                .policies
                .iter()
                .any(|one| one.to_string().contains("10.2.0.0/16"))
        });
        assert_eq!(
            small.policies,
            [json!({
                "apiVersion": "networking.k8s.io/v1",
                "kind": "NetworkPolicy",
                "metadata": {"namespace": "x", "name": "one"},
                "spec": {
                    "podSelector": {"matchLabels": {}, "matchExpressions": []},
                    "policyTypes": [],
                    "ingress": [{"from": [{"ipBlock": {"cidr": "10.0.0.0/8", "except": ["10.2.0.0/16"]}}]}],
                },
            })]
        );
    }
}
