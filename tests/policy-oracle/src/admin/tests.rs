use serde_json::{Value, json};

use crate::testing::{cluster, egress, ingress, packet, places};
use crate::{Cluster, Side, judge};

fn policy(version: &str, kind: &str, name: &str, spec: Value) -> Value {
    json!({"apiVersion": format!("policy.networking.k8s.io/{version}"), "kind": kind, "metadata": {"name": name}, "spec": spec})
}

/// A ClusterNetworkPolicy for every pod.
fn cnp(name: &str, tier: &str, priority: u16, rules: Value) -> Value {
    let mut spec = rules;
    spec["tier"] = json!(tier);
    spec["priority"] = json!(priority);
    if spec["subject"].is_null() {
        spec["subject"] = json!({"namespaces": {}});
    }
    policy("v1alpha2", "ClusterNetworkPolicy", name, spec)
}

fn anp(name: &str, priority: u16, rules: Value) -> Value {
    let mut spec = rules;
    spec["priority"] = json!(priority);
    spec["subject"] = json!({"namespaces": {}});
    policy("v1alpha1", "AdminNetworkPolicy", name, spec)
}

fn banp(rules: Value) -> Value {
    let mut spec = rules;
    spec["subject"] = json!({"namespaces": {}});
    policy("v1alpha1", "BaselineAdminNetworkPolicy", "default", spec)
}

fn network_policy(spec: Value) -> Value {
    json!({"apiVersion": "networking.k8s.io/v1", "kind": "NetworkPolicy", "metadata": {"namespace": "default", "name": "np"}, "spec": spec})
}

/// A rule for everybody who sends.
fn from_all(action: &str) -> Value {
    json!({"action": action, "from": [{"namespaces": {}}]})
}

fn front_to_db(cluster: &Cluster) -> Side {
    ingress(cluster, "default/front", "default/db", "tcp:80")
}

#[test]
fn the_first_rule_that_matches_decides() {
    let front = json!([{"pods": {"namespaceSelector": {}, "podSelector": {"matchLabels": {"role": "front"}}}}]);
    let rules = json!({"ingress": [{"action": "Accept", "from": front}, {"action": "Deny", "from": [{"namespaces": {}}]}]});
    let cluster = cluster([cnp("a", "Admin", 10, rules)]);
    let side = front_to_db(&cluster);
    assert!(side.allowed && !side.isolated);
    assert_eq!(places(&side.by), [("a", "ingress", 0)]);
    assert_eq!(side.by[0].kind, "ClusterNetworkPolicy");
    assert_eq!(side.by[0].namespace, "");
    let side = ingress(&cluster, "default/far", "default/db", "tcp:80");
    assert!(!side.allowed);
    assert_eq!(places(&side.by), [("a", "ingress", 1)]);
    // No rule for this direction, nor for those who are no pods.
    assert!(egress(&cluster, "default/db", "default/far", "tcp:80").allowed);
    assert!(ingress(&cluster, "10.9.9.9", "default/db", "tcp:80").allowed);
    assert!(ingress(&cluster, "n2", "default/db", "tcp:80").allowed);
}

#[test]
fn lower_priorities_come_first_and_then_names() {
    let one = |name: &str, priority, action: &str| {
        cnp(
            name,
            "Admin",
            priority,
            json!({"ingress": [from_all(action)]}),
        )
    };
    for (policies, name, allowed) in [
        ([one("a", 20, "Deny"), one("b", 9, "Accept")], "b", true),
        ([one("a", 9, "Deny"), one("b", 20, "Accept")], "a", false),
        ([one("b", 5, "Deny"), one("a", 5, "Accept")], "a", true),
        (
            [
                anp("a", 5, json!({"ingress": [from_all("Allow")]})),
                one("b", 4, "Deny"),
            ],
            "b",
            false,
        ),
        (
            [
                anp("b", 5, json!({"ingress": [from_all("Deny")]})),
                one("a", 5, "Accept"),
            ],
            "a",
            true,
        ),
    ] {
        let side = front_to_db(&cluster(policies));
        assert_eq!(places(&side.by), [(name, "ingress", 0)]);
        assert_eq!(side.allowed, allowed);
    }
}

#[test]
fn tiers_go_before_and_after_network_policies() {
    let admin = |action: &str| cnp("admin", "Admin", 0, json!({"ingress": [from_all(action)]}));
    let base = |action: &str| {
        cnp(
            "base",
            "Baseline",
            0,
            json!({"ingress": [from_all(action)]}),
        )
    };
    let closed = || network_policy(json!({"podSelector": {}}));
    let open = || network_policy(json!({"podSelector": {}, "ingress": [{}]}));
    let cases: Vec<(Vec<Value>, bool, Option<&str>)> = vec![
        (vec![], true, None),
        (
            vec![admin("Accept"), closed(), base("Deny")],
            true,
            Some("admin"),
        ),
        (
            vec![admin("Deny"), open(), base("Accept")],
            false,
            Some("admin"),
        ),
        (vec![admin("Pass"), open(), base("Deny")], true, Some("np")),
        (vec![admin("Pass"), closed(), base("Accept")], false, None),
        (vec![admin("Pass"), base("Deny")], false, Some("base")),
        (vec![admin("Pass"), base("Accept")], true, Some("base")),
        (vec![admin("Pass"), base("Pass")], true, None),
        (vec![admin("Pass")], true, None),
        (vec![open(), base("Deny")], true, Some("np")),
        (vec![closed(), base("Accept")], false, None),
        (vec![base("Deny")], false, Some("base")),
    ];
    for (number, (policies, allowed, by)) in cases.into_iter().enumerate() {
        let isolates = policies.iter().any(|one| one["kind"] == "NetworkPolicy");
        let side = front_to_db(&cluster(policies));
        assert_eq!(side.allowed, allowed, "case {number}");
        assert_eq!(side.isolated, isolates, "case {number}");
        assert_eq!(
            side.by.first().map(|one| one.name.as_str()),
            by,
            "case {number}"
        );
    }
}

#[test]
fn pass_skips_the_rest_of_its_tier() {
    let cluster = cluster([
        cnp(
            "a",
            "Admin",
            1,
            json!({"ingress": [from_all("Pass"), from_all("Deny")]}),
        ),
        cnp("b", "Admin", 2, json!({"ingress": [from_all("Deny")]})),
        cnp(
            "c",
            "Baseline",
            1,
            json!({"ingress": [from_all("Pass"), from_all("Deny")]}),
        ),
        cnp("d", "Baseline", 2, json!({"ingress": [from_all("Deny")]})),
        banp(json!({"ingress": [from_all("Deny")]})),
    ]);
    let side = front_to_db(&cluster);
    assert!(side.allowed && side.by.is_empty());
}

#[test]
fn the_baseline_without_priority_comes_last() {
    let late = banp(json!({"ingress": [from_all("Deny")]}));
    let side = front_to_db(&cluster([late.clone()]));
    assert!(!side.allowed);
    assert_eq!(side.by[0].kind, "BaselineAdminNetworkPolicy");
    let early = cnp(
        "z",
        "Baseline",
        1000,
        json!({"ingress": [from_all("Accept")]}),
    );
    assert!(front_to_db(&cluster([late, early])).allowed);
}

#[test]
fn subjects_are_pods_by_labels_and_namespaces() {
    let deny = json!([from_all("Deny")]);
    let mine = json!({"matchLabels": {"project": "mine"}});
    let front = json!({"matchLabels": {"role": "front"}});
    for (subject, expected) in [
        (
            json!({"namespaces": {}}),
            vec!["default/db", "default/front", "other/front"],
        ),
        (
            json!({"namespaces": mine}),
            vec!["default/db", "default/front"],
        ),
        (
            json!({"pods": {"namespaceSelector": {}, "podSelector": front}}),
            vec!["default/front", "other/front"],
        ),
        (
            json!({"pods": {"namespaceSelector": mine, "podSelector": front}}),
            vec!["default/front"],
        ),
        (
            json!({"pods": {"podSelector": {}}}),
            vec!["default/db", "default/front", "other/front"],
        ),
    ] {
        let cluster = cluster([cnp(
            "a",
            "Admin",
            0,
            json!({"subject": subject, "ingress": deny}),
        )]);
        let all = ["default/db", "default/front", "other/front", "default/host"];
        let is_subject = |to: &&str| !ingress(&cluster, "default/far", to, "tcp:80").allowed;
        let found: Vec<&str> = all.into_iter().filter(is_subject).collect();
        assert_eq!(found, expected, "{subject}");
    }
}

#[test]
fn receivers() {
    let all = [
        "default/front",
        "other/front",
        "n1",
        "n2",
        "default/host",
        "10.9.9.9",
        "192.168.0.9",
    ];
    for (to, expected) in [
        (
            json!([{"namespaces": {}}]),
            vec!["default/front", "other/front"],
        ),
        (
            json!([{"pods": {"namespaceSelector": {"matchLabels": {"project": "other"}}, "podSelector": {}}}]),
            vec!["other/front"],
        ),
        (json!([{"nodes": {}}]), vec!["n1", "n2", "default/host"]),
        (
            json!([{"nodes": {"matchLabels": {"zone": "west"}}}]),
            vec!["n2"],
        ),
        // Networks are of pods' and nodes' addresses, too.
        (
            json!([{"networks": ["10.0.0.0/8"]}]),
            vec!["default/front", "other/front", "10.9.9.9"],
        ),
        (
            json!([{"networks": ["192.168.0.2/32", "10.9.0.0/16"]}, {"nodes": {"matchLabels": {"zone": "east"}}}]),
            vec!["n1", "n2", "default/host", "10.9.9.9"],
        ),
        (json!([{"networks": ["::/0"]}]), vec![]),
    ] {
        let cluster = cluster([cnp(
            "a",
            "Admin",
            0,
            json!({"egress": [{"action": "Deny", "to": to}]}),
        )]);
        let is_peer = |to: &&str| !egress(&cluster, "default/db", to, "icmp:8").allowed;
        let found: Vec<&str> = all.into_iter().filter(is_peer).collect();
        assert_eq!(found, expected, "{to}");
    }
}

#[test]
fn nodes_are_their_addresses() {
    let rule = json!({"action": "Deny", "to": [{"nodes": {}}]});
    let cluster = cluster([cnp("a", "Admin", 0, json!({"egress": [rule]}))]);
    let mut packet = packet(&cluster, "default/db", "n1", "tcp:80");
    assert!(!judge(&cluster, &packet).allowed);
    // The node's end of the pods' network is none of the addresses in its status.
    packet.to_address = "10.1.1.254".parse().unwrap();
    assert!(judge(&cluster, &packet).allowed);
}

#[test]
fn names_are_of_those_whom_resolvers_gave_them() {
    let mut cluster = cluster([cnp(
        "a",
        "Admin",
        0,
        json!({"egress": [{"action": "Accept", "to": [{"domainNames": ["*.example.com"]}]}, {"action": "Deny", "to": [{"networks": ["0.0.0.0/0"]}]}]}),
    )]);
    assert!(!egress(&cluster, "default/db", "10.9.9.9", "tcp:443").allowed);
    let answer = |name: &str, address: &str, until| crate::Answer {
        name: name.to_owned(),
        address: address.parse().unwrap(),
        until,
    };
    cluster.answers = vec![
        answer("a.b.Example.com.", "10.9.9.9", 5),
        answer("example.com", "10.9.9.8", 5),
        answer("www.example.com", "10.1.1.2", 5),
    ];
    cluster.now = 5;
    assert!(egress(&cluster, "default/db", "10.9.9.9", "tcp:443").allowed);
    assert!(!egress(&cluster, "default/db", "10.9.9.8", "tcp:443").allowed);
    // Pods are meant by their labels alone.
    assert!(!egress(&cluster, "default/db", "default/front", "tcp:443").allowed);
    cluster.now = 6;
    assert!(!egress(&cluster, "default/db", "10.9.9.9", "tcp:443").allowed);
}

const PACKETS: [&str; 9] = [
    "tcp:53", "udp:53", "tcp:80", "tcp:81", "udp:81", "sctp:81", "tcp:8080", "udp:8080", "icmp:8",
];

#[test]
fn protocols_of_every_form() {
    for (protocols, expected) in [
        (json!(null), PACKETS.to_vec()),
        (
            json!([{"tcp": {"destinationPort": {"number": 81}}}]),
            vec!["tcp:81"],
        ),
        (
            json!([{"udp": {"destinationPort": {"number": 81}}}]),
            vec!["udp:81"],
        ),
        (
            json!([{"sctp": {"destinationPort": {"number": 81}}}]),
            vec!["sctp:81"],
        ),
        (
            json!([{"tcp": {"destinationPort": {"range": {"start": 53, "end": 80}}}}]),
            vec!["tcp:53", "tcp:80"],
        ),
        (json!([{"destinationNamedPort": "web"}]), vec!["tcp:8080"]),
        (
            json!([{"destinationNamedPort": "dns"}, {"tcp": {"destinationPort": {"number": 81}}}]),
            vec!["udp:53", "tcp:81"],
        ),
        (json!([{"destinationNamedPort": "setup"}]), vec![]),
    ] {
        for direction in ["ingress", "egress"] {
            let peers = ["from", "to"][usize::from(direction == "egress")];
            let mut rule = json!({"action": "Deny", peers: [{"namespaces": {}}]});
            rule["protocols"] = protocols.clone();
            let cluster = cluster([cnp("a", "Admin", 0, json!({direction: [rule]}))]);
            let is_denied = |what: &&str| {
                !judge(
                    &cluster,
                    &packet(&cluster, "default/front", "default/db", what),
                )
                .allowed
            };
            let found: Vec<&str> = PACKETS.into_iter().filter(is_denied).collect();
            assert_eq!(found, expected, "{direction} {protocols}");
        }
    }
}

#[test]
fn ports_of_every_form() {
    for (ports, expected) in [
        (json!(null), PACKETS.to_vec()),
        (json!([{"portNumber": {"port": 81}}]), vec!["tcp:81"]),
        (
            json!([{"portNumber": {"port": 81, "protocol": "UDP"}}]),
            vec!["udp:81"],
        ),
        (
            json!([{"portRange": {"start": 53, "end": 80}}]),
            vec!["tcp:53", "tcp:80"],
        ),
        (
            json!([{"portRange": {"start": 53, "end": 81, "protocol": "UDP"}}]),
            vec!["udp:53", "udp:81"],
        ),
        (json!([{"namedPort": "web"}]), vec!["tcp:8080"]),
        (json!([{"namedPort": "dns"}]), vec!["udp:53"]),
    ] {
        let mut rule = from_all("Deny");
        rule["ports"] = ports.clone();
        for policy in [
            anp("a", 0, json!({"ingress": [rule]})),
            banp(json!({"ingress": [rule]})),
        ] {
            let cluster = cluster([policy]);
            let is_denied =
                |what: &&str| !ingress(&cluster, "default/front", "default/db", what).allowed;
            let found: Vec<&str> = PACKETS.into_iter().filter(is_denied).collect();
            assert_eq!(found, expected, "{ports}");
        }
    }
}

#[test]
fn probes_get_through() {
    let deny = json!({"egress": [{"action": "Deny", "to": [{"networks": ["0.0.0.0/0"]}]}], "ingress": [from_all("Deny")]});
    let cluster = cluster([
        cnp("a", "Admin", 0, deny),
        network_policy(json!({"podSelector": {}})),
    ]);
    assert!(ingress(&cluster, "n1", "default/db", "tcp:80").allowed);
    assert!(!ingress(&cluster, "n2", "default/db", "tcp:80").allowed);
    assert!(!egress(&cluster, "default/db", "n1", "tcp:80").allowed);
}

#[test]
fn what_is_not_of_a_kind_is_a_panic() {
    let to_networks = json!([{"networks": ["10.0.0.0/8"]}]);
    for (policy, part) in [
        (cnp("a", "Admin", 1001, json!({})), "a priority is"),
        (cnp("a", "Middle", 1, json!({})), "unknown variant `Middle`"),
        (
            cnp("a", "Admin", 1, json!({"ingress": [from_all("Allow")]})),
            "the action",
        ),
        (
            anp("a", 1, json!({"ingress": [from_all("Accept")]})),
            "the action",
        ),
        (banp(json!({"ingress": [from_all("Pass")]})), "the action"),
        (banp(json!({"priority": 1})), "no priority"),
        (anp("a", 1, json!({"tier": "Admin"})), "no tier"),
        (
            cnp(
                "a",
                "Admin",
                1,
                json!({"ingress": [{"action": "Deny", "from": to_networks}]}),
            ),
            "senders are pods",
        ),
        (
            cnp(
                "a",
                "Admin",
                1,
                json!({"ingress": [{"action": "Deny", "to": [{"namespaces": {}}]}]}),
            ),
            "direction",
        ),
        (
            cnp(
                "a",
                "Admin",
                1,
                json!({"ingress": [{"action": "Deny", "from": []}]}),
            ),
            "there must be peers",
        ),
        (
            cnp(
                "a",
                "Admin",
                1,
                json!({"ingress": [{"action": "Deny", "from": [{"namespaces": {}, "pods": {}}]}]}),
            ),
            "can't read spec",
        ),
        (
            anp(
                "a",
                1,
                json!({"ingress": [{"action": "Deny", "from": [{"namespaces": {}}], "protocols": []}]}),
            ),
            "form",
        ),
        (
            cnp(
                "a",
                "Admin",
                1,
                json!({"egress": [{"action": "Deny", "to": [{"domainNames": ["a.b"]}]}]}),
            ),
            "names are for",
        ),
    ] {
        let cluster = cluster([policy]);
        let packet = packet(&cluster, "n1", "n2", "tcp:80");
        let error = std::panic::catch_unwind(|| judge(&cluster, &packet)).unwrap_err();
        let message = error.downcast_ref::<String>().unwrap();
        assert!(message.contains(part), "{message}");
    }
}
