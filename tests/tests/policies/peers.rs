//! The base policy with no, one and two peers of each form, in each direction.

use serde_json::Value;

use super::Facts;
use super::case::{Case, Group, step};
use super::policy::{
    DIRECTIONS, all, around, base_with_peers, block, namespaces, pod, pods, pods_of, with,
};

/// A peer, what it is called, and whether it is about addresses.
type Peer = (&'static str, Value, bool);

fn peers(facts: &Facts) -> Vec<Peer> {
    let own_x = || with("ns", "x");
    // All pods of a node, and two or four of them.
    let (node, few) = (around(facts.zc, 8), around(facts.zc, 2));
    vec![
        ("all pods here", pods(all()), false),
        ("c here", pods(pod("c")), false),
        ("all namespaces", namespaces(all()), false),
        ("all pods anywhere", pods_of(all(), all()), false),
        ("c anywhere", pods_of(all(), pod("c")), false),
        ("namespace x", namespaces(own_x()), false),
        ("all pods of x", pods_of(own_x(), all()), false),
        ("c of x", pods_of(own_x(), pod("c")), false),
        ("a block", block(&node, &[]), true),
        ("a block with a hole", block(&node, &[few]), true),
    ]
}

/// All of them.
pub fn cases(facts: &Facts) -> Vec<Case> {
    let mut cases = Vec::new();
    let mut add = |what: String, ingress: bool, chosen: &[&Peer]| {
        let list = chosen.iter().map(|(_, peer, _)| peer.clone()).collect();
        let steps = vec![step([base_with_peers(ingress, list)])];
        let case = Case::new(Group::Peers, what, steps);
        let blocks = chosen.iter().any(|(.., block)| *block);
        cases.push(if blocks {
            case.of_family(facts.v4)
        } else {
            case
        });
    };
    let peers = peers(facts);
    for (ingress, direction) in DIRECTIONS {
        add(format!("{direction}: an empty list"), ingress, &[]);
        for (at, one) in peers.iter().enumerate() {
            add(format!("{direction}: {}", one.0), ingress, &[one]);
            for other in &peers[at + 1..] {
                let what = format!("{direction}: {} and {}", one.0, other.0);
                add(what, ingress, &[one, other]);
            }
        }
    }
    cases
}
