//! The same policies as nftables' own sets and maps: a set for each selector, a chain for each policy and direction, a
//! chain for each pod that asks its policies one after the other, and pods' chains found by a map of devices. A packet
//! of a connection that is known is let through before any of them.

use std::collections::BTreeSet;
use std::fmt::Write;

use super::ipset::{Way, members, peers, set};
use super::list::{self, Peer, Policy};

/// `policy` is a word of its own there.
const TABLE: &str = "ip policies";

fn named(name: &str) -> String {
    name.replace(['-', '.'], "_")
}

/// The rules of a policy's chain, each for one peer and one protocol.
fn rules_of(policy: &Policy, way: Way) -> Vec<String> {
    let end = if way == Way::In { "saddr" } else { "daddr" };
    let mut rules = Vec::new();
    for rule in way.rules(policy).unwrap_or_default() {
        for peer in &rule.peers {
            let whom = match peer {
                Peer::Block { block, except } => format!("ip {end} {block} ip {end} != {except}"),
                _ => format!("ip {end} @{}", named(&set(peer))),
            };
            for ports in &rule.ports {
                let protocol = if ports.udp { "udp" } else { "tcp" };
                let numbers: Vec<String> = ports.numbers.iter().map(u16::to_string).collect();
                rules.push(format!(
                    "{whom} {protocol} dport {{ {} }} accept",
                    numbers.join(", ")
                ));
            }
        }
    }
    rules
}

/// What `nft -f` reads for a node with these pods.
pub fn rules(policies: &[Policy], devices: &[(String, String)]) -> String {
    let mut text = format!("table {TABLE} {{\n");
    for peer in peers(policies) {
        if matches!(peer, Peer::Block { .. }) {
            continue;
        }
        let addresses: Vec<String> = members(peer).iter().map(ToString::to_string).collect();
        let _ = writeln!(
            text,
            "set {} {{ type ipv4_addr; elements = {{ {} }}; }}",
            named(&set(peer)),
            addresses.join(", ")
        );
    }
    for policy in policies {
        for way in Way::BOTH {
            if way.rules(policy).is_some() {
                let chain = named(&way.chain("p", &policy.name));
                let _ = writeln!(
                    text,
                    "chain {chain} {{\n{}\n}}",
                    rules_of(policy, way).join("\n")
                );
            }
        }
    }
    for way in Way::BOTH {
        for (device, app) in devices {
            let _ = writeln!(text, "chain {} {{", named(&way.chain("w", device)));
            for policy in policies {
                let own = policy.app.as_ref().is_none_or(|of| of == app);
                if own && way.rules(policy).is_some() {
                    let _ = writeln!(text, "jump {}", named(&way.chain("p", &policy.name)));
                }
            }
            text += "drop\n}\n";
        }
    }
    // One chain after the other: what may leave one pod need not be what may enter the next.
    for (way, name, priority, key) in [
        (Way::Out, "from_pods", 0, "iifname"),
        (Way::In, "to_pods", 1, "oifname"),
    ] {
        let map: BTreeSet<String> = devices
            .iter()
            .map(|(device, _)| format!("\"{device}\" : goto {}", named(&way.chain("w", device))))
            .collect();
        let map: Vec<String> = map.into_iter().collect();
        let _ = writeln!(
            text,
            "chain {name} {{\ntype filter hook forward priority {priority}; policy accept;\nct state established,related accept\nct state invalid drop\n{key} vmap {{ {} }}\n}}",
            map.join(", ")
        );
    }
    text + "}\n"
}

/// What `nft -f` reads when the policy that changes has changed: its chain, written anew.
pub fn change(open: bool) -> String {
    let policy = list::moving(open);
    let chain = named(&Way::Out.chain("p", &policy.name));
    let mut text = format!("flush chain {TABLE} {chain}\n");
    for rule in rules_of(&policy, Way::Out) {
        let _ = writeln!(text, "add rule {TABLE} {chain} {rule}");
    }
    text
}

#[cfg(test)]
mod tests {
    use super::super::ipset::{devices, with_moving};
    use super::*;

    #[test]
    fn what_is_jumped_to_and_looked_into_is_there_before_it_is_named() {
        let text = rules(&with_moving(250, true), &devices(100));
        let mut there = BTreeSet::new();
        for line in text.lines() {
            let words: Vec<&str> = line.split_whitespace().collect();
            for pair in words.windows(2) {
                match pair[0] {
                    "jump" | "goto" => {
                        let target = pair[1].trim_end_matches(',');
                        assert!(there.contains(target), "{target}");
                    }
                    "chain" | "set" => {
                        assert!(there.insert(pair[1]), "{} is there twice", pair[1]);
                    }
                    _ => {}
                }
                if let Some(set) = pair[1].strip_prefix('@') {
                    assert!(there.contains(set), "{set}");
                }
            }
        }
        assert_eq!(text.matches(" : goto wo_c").count(), 100);
        let judging = text.matches("dport").count();
        assert_eq!(judging, 250 * 4 + 50 + 2);
        assert_eq!(text.matches('{').count(), text.matches('}').count());
    }

    #[test]
    fn a_change_is_of_one_chain() {
        let text = change(true);
        let own = |line: &str| {
            ["chain", "rule"]
                .iter()
                .any(|what| line.contains(&format!("{what} {TABLE} po_moving")))
        };
        assert!(text.lines().all(own));
        assert_ne!(text, change(false));
        let whole = rules(&with_moving(10, true), &devices(3));
        for rule in rules_of(&list::moving(true), Way::Out) {
            assert!(whole.contains(&rule) && text.contains(&rule));
        }
    }
}
