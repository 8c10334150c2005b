//! The compiler against the plain reading of the objects, and what it refuses.

use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use serde_json::json;

use super::*;
use crate::policy::naive::{
    self, ADDRESSES, NAMESPACES, Other, PORTS, PROTOCOLS, World, allowing, number_of,
};

fn world(random: &mut StdRng) -> (World, BTreeMap<Kind, u32>) {
    let mut world = World::default();
    for name in NAMESPACES {
        world.namespaces.insert(name.into(), naive::labels(random));
    }
    let mut identities = BTreeMap::new();
    for number in 0..8 {
        let kind = Kind {
            namespace: NAMESPACES[random.random_range(0..NAMESPACES.len())].into(),
            labels: naive::labels(random),
            ports: naive::named_ports(random),
        };
        identities.insert(kind, 1000 + number);
    }
    for number in 0..random.random_range(1..7) {
        let namespace = NAMESPACES[random.random_range(0..NAMESPACES.len())];
        let name = (namespace.to_owned(), format!("p{number}"));
        world.policies.insert(name, naive::policy(random));
    }
    (world, identities)
}

#[test]
fn verdicts_and_rules_are_those_of_the_objects() {
    let (mut asked, mut allowed, mut refused) = (0_u64, 0_u64, 0);
    for seed in 0..200 {
        let random = &mut StdRng::seed_from_u64(seed);
        let (world, identities) = world(random);
        let view = View {
            policies: &world.policies,
            namespaces: &world.namespaces,
            identities: &identities,
        };
        let others: Vec<(Other<'_>, u32)> = identities
            .iter()
            .map(|(kind, identity)| {
                let address = ADDRESSES[random.random_range(0..ADDRESSES.len())];
                (
                    Other {
                        kind: Some(kind),
                        address,
                    },
                    *identity,
                )
            })
            .chain(ADDRESSES.map(|address| {
                (
                    Other {
                        kind: None,
                        address,
                    },
                    2,
                )
            }))
            .collect();
        for pod in identities.keys() {
            for direction in [Direction::Ingress, Direction::Egress] {
                let Ok(set) = compile(&view, pod, direction) else {
                    refused += 1;
                    continue;
                };
                for (other, identity) in &others {
                    for protocol in PROTOCOLS {
                        for port in PORTS.into_iter().chain([53, 60_000]) {
                            let expected = allowing(&world, pod, direction, *other, protocol, port);
                            let found = set.as_ref().map(|set| {
                                set.judge(other.address, *identity, number_of(protocol), port)
                            });
                            asked += 1;
                            match (expected, found) {
                                (None, None) => {}
                                (Some(rules), Some(Some(rule))) if rules.contains(rule) => {
                                    allowed += 1;
                                }
                                (Some(rules), Some(None)) if rules.is_empty() => {}
                                (expected, found) => panic!(
                                    "seed {seed}, {direction:?} of {pod:?}, other {:?} {}, {protocol}/{port}: expected {expected:?}, found {found:?}; policies {:#?}",
                                    other.kind, other.address, world.policies
                                ),
                            }
                        }
                    }
                }
            }
        }
    }
    // The clusters are such that both answers are frequent, and hardly any is refused.
    assert!(
        asked > 500_000 && allowed > asked / 20,
        "{allowed} of {asked}"
    );
    assert!(refused < 15, "{refused} sets were refused");
}

#[test]
fn ranges_of_ports_become_few_blocks() {
    for (first, last, most) in [
        (1, 65_535, 16),
        (80, 80, 1),
        (8080, 8090, 5),
        (1024, 65_535, 6),
    ] {
        let blocks = port_range(first, last);
        assert!(blocks.len() <= most, "{first}-{last}: {blocks:?}");
        for port in 0..=u16::MAX {
            let inside = blocks
                .iter()
                .filter(|(start, bits)| port_bits(port.to_be(), *bits) == start.to_be())
                .count();
            assert_eq!(
                inside,
                usize::from((first..=last).contains(&port)),
                "{port}"
            );
        }
    }
}

fn refusal(ports: serde_json::Value, peers: serde_json::Value) -> String {
    let spec = json!({"podSelector": {}, "ingress": [{"ports": ports, "from": peers}]});
    let policies = BTreeMap::from([(
        ("x".to_owned(), "p".to_owned()),
        serde_json::from_value(spec).unwrap(),
    )]);
    let pod = Kind {
        namespace: "x".into(),
        labels: Labels::new(),
        ports: BTreeSet::new(),
    };
    let view = View {
        policies: &policies,
        namespaces: &BTreeMap::new(),
        identities: &BTreeMap::new(),
    };
    let refused = compile(&view, &pod, Direction::Ingress).unwrap_err();
    assert_eq!(refused.policy, ("x".to_owned(), "p".to_owned()));
    refused.why
}

#[test]
fn what_makes_no_sense_is_refused_with_the_reason() {
    assert_eq!(
        refusal(json!([{"port": 70_000}]), json!([])),
        "port 70000 is not between 1 and 65535"
    );
    assert_eq!(
        refusal(json!([{"port": 80, "endPort": 70}]), json!([])),
        "endPort 70 is below port 80"
    );
    let why = refusal(json!([]), json!([{"ipBlock": {"cidr": "10.0.0.0/33"}}]));
    assert_eq!(
        why,
        "\"10.0.0.0/33\" is no address block (such as 192.0.2.0/24)"
    );
}
