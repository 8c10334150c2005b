//! Engines of two nodes over plain kernels: long random histories of the API, judged by the plain reading of the
//! objects. `XEBEC_SEED` repeats one.
#![allow(clippy::unwrap_used, reason = "a test may panic")]

mod audited;
mod corrupted;
mod explained;
mod plain;
mod resolved;

use plain::{Node, sides};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use xebec_policy::kind::Kind;
use xebec_policy_oracle::random::{Options, change, cluster, packets, without_names_in_blocks};
use xebec_policy_oracle::shrink::shrink;
use xebec_policy_oracle::{Cluster, Packet, judge};

/// How many histories each of the tests has.
const HISTORIES: u64 = 60;
/// How many changes each has.
const CHANGES: usize = 20;
/// How many packets are judged after each.
const PACKETS: usize = 40;

/// How a node is made.
type Make = fn(&str) -> Node;

fn plainly(name: &str) -> Node {
    Node::new(name, Kind::hash)
}

fn nodes(cluster: &Cluster, make: Make) -> Vec<Node> {
    let names = cluster.nodes.iter();
    names
        .map(|node| make(node["metadata"]["name"].as_str().unwrap()))
        .collect()
}

/// Fails unless the kernels of both ends' nodes say what the objects say.
fn compare(nodes: &[Node], cluster: &Cluster, packet: &Packet) -> Result<(), String> {
    let right = judge(cluster, packet);
    for side in sides(cluster, packet) {
        let ingress = side.ingress;
        let right = if ingress {
            &right.ingress
        } else {
            &right.egress
        };
        let node = nodes.iter().find(|node| node.name == side.home).unwrap();
        let (allowed, rule) = node.judge(&side, packet);
        if allowed != right.allowed {
            return Err(format!(
                "{packet:?}, ingress {ingress}: {allowed} by {rule}, not {right:?}"
            ));
        }
        let names = node.names.now();
        let named = names.rule(rule).map(|rule| &rule.id).map(|rule| {
            (
                rule.policy.source.kind().to_owned(),
                rule.policy.namespace.clone(),
                rule.policy.name.clone(),
                rule.list.to_owned(),
                rule.index,
            )
        });
        let by: Vec<_> = right
            .by
            .iter()
            .map(|one| {
                (
                    one.kind.clone(),
                    one.namespace.clone(),
                    one.name.clone(),
                    one.list.clone(),
                    one.index,
                )
            })
            .collect();
        let told = match &named {
            Some(named) => by.contains(named),
            None => by.is_empty(),
        };
        if !told {
            return Err(format!(
                "{packet:?}, ingress {ingress}: by {named:?}, not one of {by:?}"
            ));
        }
    }
    Ok(())
}

/// A mistake in few words: the smallest cluster that shows it, if new nodes make it too.
fn told(cluster: &Cluster, packet: &Packet, make: Make) -> String {
    let mistake = |cluster: &Cluster| {
        let mut nodes = nodes(cluster, make);
        nodes.iter_mut().for_each(|node| node.learn(cluster, 0));
        compare(&nodes, cluster, packet).err()
    };
    if mistake(cluster).is_none() {
        return format!("(only after this history)\n{cluster:#?}");
    }
    let fails = |cluster: &Cluster| packet.is_in(cluster) && mistake(cluster).is_some();
    let smallest = shrink(cluster.clone(), fails);
    format!("{}\n{smallest:#?}", mistake(&smallest).unwrap_or_default())
}

/// Gives a node other labels.
fn change_node(random: &mut StdRng, cluster: &mut Cluster) {
    let node = random.random_range(0..cluster.nodes.len());
    let zone = ["a", "b", "c"][random.random_range(0..3)];
    cluster.nodes[node]["metadata"]["labels"]["zone"] = zone.into();
}

const NETWORK: Options = Options {
    cilium: false,
    admin: false,
};
const ADMIN: Options = Options {
    cilium: false,
    admin: true,
};
const CILIUM: Options = Options {
    cilium: true,
    admin: false,
};
const ALL: Options = Options {
    cilium: true,
    admin: true,
};

fn history(seed: u64, options: &Options, make: Make) {
    let mut random = StdRng::seed_from_u64(seed);
    let mut world = cluster(&mut random, options);
    without_names_in_blocks(&mut world);
    let mut nodes = nodes(&world, make);
    for step in 0..CHANGES {
        if step > 0 {
            match random.random_range(0..10) {
                0 => change_node(&mut random, &mut world),
                _ => change(&mut random, &mut world),
            }
            without_names_in_blocks(&mut world);
        }
        for node in &mut nodes {
            node.learn(&world, random.random_range(0..3));
            if random.random_bool(0.5) {
                node.sweep();
            }
        }
        for packet in packets(&mut random, &world, PACKETS) {
            if let Err(why) = compare(&nodes, &world, &packet) {
                let smaller = told(&world, &packet, make);
                panic!("seed {seed}, step {step}: {why}\n{smaller}");
            }
        }
    }
    // Nothing is left of what is gone.
    world = Cluster {
        nodes: world.nodes,
        ..Cluster::default()
    };
    for node in &mut nodes {
        node.learn(&world, 0);
        node.sweep();
        node.kernel.with(|plain| {
            assert_eq!(
                (
                    plain.endpoints.len(),
                    plain.rules.len(),
                    plain.blocks.len(),
                    plain.sets.len()
                ),
                (0, 0, 0, 0),
                "seed {seed}"
            );
        });
        assert_eq!(node.engine.identity_rows(), Vec::<serde_json::Value>::new());
    }
}

fn seeds() -> std::ops::Range<u64> {
    xebec_policy_oracle::random::seeds(HISTORIES)
}

#[test]
fn network_policies_are_what_they_say() {
    seeds().for_each(|seed| history(seed, &NETWORK, plainly));
}

#[test]
fn policies_of_administrators_are_what_they_say() {
    seeds().for_each(|seed| history(seed, &ADMIN, plainly));
}

#[test]
fn policies_of_cilium_are_what_they_say() {
    seeds().for_each(|seed| history(seed, &CILIUM, plainly));
}

#[test]
fn policies_of_all_kinds_are_what_they_say() {
    seeds().for_each(|seed| history(seed, &ALL, plainly));
}

#[test]
fn where_all_kinds_have_one_hash_too() {
    seeds()
        .take(30)
        .for_each(|seed| history(seed, &ALL, |name| Node::new(name, |_| 4_000_000_000)));
}

#[test]
fn which_labels_count_changes_no_verdict() {
    seeds()
        .take(30)
        .for_each(|seed| history(seed, &ALL, |name| Node::with_labels(name, &["none"])));
}
