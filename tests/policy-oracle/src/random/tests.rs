//! Whether random clusters have what they should, often enough to find mistakes.

use rand::SeedableRng;

use super::*;
use crate::{End, Protocol, judge};

fn every_option() -> Vec<Options> {
    let mut all = Vec::new();
    for cilium in [false, true] {
        for admin in [false, true] {
            all.push(Options { cilium, admin });
        }
    }
    all
}

#[test]
fn a_seed_makes_the_same_again() {
    let make = |seed| {
        let mut random = StdRng::seed_from_u64(seed);
        let mut cluster = cluster(&mut random, &Options::default());
        change(&mut random, &mut cluster);
        let packets = packets(&mut random, &cluster, 10);
        (cluster, packets)
    };
    assert!(make(7) == make(7));
    assert!(make(7) != make(8));
}

#[test]
fn every_cluster_and_change_is_understood() {
    for options in every_option() {
        for seed in 0..25 {
            let mut random = StdRng::seed_from_u64(seed);
            let mut cluster = cluster(&mut random, &options);
            assert_eq!(cluster.namespaces.len(), 3);
            assert_eq!(cluster.nodes.len(), 2);
            assert!((4..10).contains(&cluster.pods.len()));
            assert!(cluster.policies.len() <= 6);
            for _ in 0..10 {
                for packet in packets(&mut random, &cluster, 10) {
                    let verdict = judge(&cluster, &packet);
                    assert_eq!(
                        verdict.allowed,
                        verdict.egress.allowed && verdict.ingress.allowed
                    );
                }
                let before = cluster.clone();
                change(&mut random, &mut cluster);
                let moved = [
                    before.pods != cluster.pods,
                    before.namespaces != cluster.namespaces,
                    before.policies != cluster.policies,
                ];
                assert!(moved.iter().filter(|one| **one).count() <= 1);
                assert_eq!(before.nodes, cluster.nodes);
            }
        }
    }
}

/// How often the packets of random clusters are of some sort.
#[test]
fn every_sort_of_packet_and_verdict_is_common() {
    for options in every_option() {
        let mut total = 0_u32;
        let mut sorts = std::collections::BTreeMap::<&str, u32>::new();
        for seed in 0..100 {
            let mut random = StdRng::seed_from_u64(seed);
            let cluster = cluster(&mut random, &options);
            for packet in packets(&mut random, &cluster, 20) {
                let verdict = judge(&cluster, &packet);
                total += 1;
                let mut count = |sort, is| *sorts.entry(sort).or_default() += u32::from(is);
                count("allowed", verdict.allowed);
                count("forbidden", !verdict.allowed);
                count("forbidden by egress", !verdict.egress.allowed);
                count("forbidden by ingress", !verdict.ingress.allowed);
                count(
                    "allowed by egress rule",
                    verdict.egress.allowed && !verdict.egress.by.is_empty(),
                );
                count(
                    "allowed by ingress rule",
                    verdict.ingress.allowed && !verdict.ingress.by.is_empty(),
                );
                count("IPv6", packet.to_address.is_ipv6());
                count("SCTP", packet.protocol == Protocol::Sctp);
                count("ICMP", packet.protocol == Protocol::Icmp);
                count("from a node", matches!(packet.from, End::Node(_)));
                count("to a node", matches!(packet.to, End::Node(_)));
                count("from outside", packet.from == End::Address);
                count("to outside", packet.to == End::Address);
            }
        }
        for (sort, number) in sorts {
            assert!(
                number * 40 > total,
                "{options:?}: {sort}: {number} of {total}"
            );
        }
    }
}

/// Every list of every kind decides for some packets.
#[test]
fn every_list_decides_sometimes() {
    let options = Options {
        cilium: true,
        admin: true,
    };
    let mut lists = std::collections::BTreeMap::<(String, String), u32>::new();
    for seed in 0..300 {
        let mut random = StdRng::seed_from_u64(seed);
        let cluster = cluster(&mut random, &options);
        for packet in packets(&mut random, &cluster, 20) {
            let verdict = judge(&cluster, &packet);
            for rule in [verdict.egress.by, verdict.ingress.by]
                .into_iter()
                .flatten()
            {
                *lists.entry((rule.kind, rule.list)).or_default() += 1;
            }
        }
    }
    let admin = [
        "AdminNetworkPolicy",
        "BaselineAdminNetworkPolicy",
        "ClusterNetworkPolicy",
    ];
    let cilium = ["CiliumClusterwideNetworkPolicy", "CiliumNetworkPolicy"];
    let allow = ["ingress", "egress"];
    let deny = ["ingressDeny", "egressDeny"];
    let kinds = ["NetworkPolicy"].into_iter().chain(admin).chain(cilium);
    let expected = kinds.flat_map(|kind| allow.map(|list| (kind, list))).chain(
        cilium
            .into_iter()
            .flat_map(|kind| deny.map(|list| (kind, list))),
    );
    for (kind, list) in expected {
        let number = lists.get(&(kind.to_owned(), list.to_owned())).copied();
        println!("{kind} {list}: {number:?}");
        assert!(
            number.is_some_and(|number| number > 5),
            "{kind} {list}: {number:?}"
        );
    }
}
