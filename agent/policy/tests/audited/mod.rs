//! Policies and pods in audit mode: nothing changes, but what they would drop is told.

use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use serde_json::{Value, json};
use xebec_policy::object::AUDIT;
use xebec_policy_oracle::random::{change, cluster, packets};
use xebec_policy_oracle::{Cluster, Packet, judge};

use crate::explained::explain;
use crate::plain::{Node, pod_of, sides};
use crate::{ALL, nodes, plainly, seeds, without_names_in_blocks};

fn audited(object: &Value) -> bool {
    object["metadata"]["annotations"][AUDIT] == "true"
}

/// Puts some objects into audit mode.
fn audit_some(random: &mut StdRng, objects: &mut [Value]) {
    for object in objects {
        if random.random_bool(0.3) {
            object["metadata"]["annotations"] = json!({AUDIT: "true"});
        }
    }
}

/// The cluster without the policies that are in audit mode.
fn enforced(cluster: &Cluster) -> Cluster {
    let mut without = cluster.clone();
    without.policies.retain(|one| !audited(one));
    without
}

fn compare(nodes: &[Node], cluster: &Cluster, packet: &Packet) {
    let (now, whole) = (judge(&enforced(cluster), packet), judge(cluster, packet));
    for side in sides(cluster, packet) {
        let (now, whole) = match side.ingress {
            true => (&now.ingress, &whole.ingress),
            false => (&now.egress, &whole.egress),
        };
        let home = nodes.iter().find(|node| node.name == side.home).unwrap();
        let open = pod_of(cluster, side.own).is_some_and(audited);
        let allowed = now.allowed || open;
        assert_eq!(
            home.judge(&side, packet).0,
            allowed,
            "{packet:?}\n{cluster:#?}"
        );
        let (would, rule) = home.judge_audit(&side, packet);
        assert_eq!(would, whole.allowed, "{packet:?}\n{cluster:#?}");
        let named = home.names.now().rule(rule).map(|rule| rule.id.clone());
        let told = match &named {
            None => whole.by.is_empty(),
            Some(named) => whole.by.iter().any(|one| {
                (one.kind.as_str(), &one.name, one.index)
                    == (named.policy.source.kind(), &named.policy.name, named.index)
            }),
        };
        assert!(told, "{packet:?}: {named:?}, not {whole:?}");
        let said = &explain(home, packet)[usize::from(side.ingress)];
        assert_eq!(said.allowed, allowed);
        assert_eq!(said.audit.is_some(), allowed && !would);
    }
}

#[test]
fn what_is_audited_drops_nothing_and_is_told() {
    seeds().for_each(|seed| {
        let mut random = StdRng::seed_from_u64(seed);
        let mut world = cluster(&mut random, &ALL);
        without_names_in_blocks(&mut world);
        let mut nodes = nodes(&world, plainly);
        for _ in 0..4 {
            let (policies, pods) = (&mut world.policies, &mut world.pods);
            audit_some(&mut random, policies);
            audit_some(&mut random, &mut pods[..1]);
            for node in &mut nodes {
                node.learn(&world, random.random_range(0..3));
            }
            for packet in packets(&mut random, &world, 40) {
                compare(&nodes, &world, &packet);
            }
            change(&mut random, &mut world);
            without_names_in_blocks(&mut world);
        }
    });
}
