use serde_json::{Value, json};

use crate::testing::{cluster, egress, ingress, packet, places};
use crate::{Cluster, End, judge};

fn policy(name: &str, spec: Value) -> Value {
    json!({"apiVersion": "networking.k8s.io/v1", "kind": "NetworkPolicy", "metadata": {"namespace": "default", "name": name}, "spec": spec})
}

/// One policy for default/db.
fn db(spec: Value) -> Cluster {
    let mut spec = spec;
    spec["podSelector"] = json!({"matchLabels": {"role": "db"}});
    cluster([policy("db", spec)])
}

/// Who gets to default/db at TCP 80 if these are the peers of the only rule.
fn senders(from: Value) -> Vec<&'static str> {
    let cluster = db(json!({"ingress": [{"from": from}]}));
    let all = [
        "default/front",
        "other/front",
        "default/far",
        "n2",
        "10.9.9.9",
        "172.17.1.5",
        "172.17.2.5",
    ];
    let gets_there = |from: &&str| ingress(&cluster, from, "default/db", "tcp:80").allowed;
    all.into_iter().filter(gets_there).collect()
}

/// What gets from default/front to default/db if these are the ports of the only rule.
fn ports(ports: Value) -> Vec<&'static str> {
    let cluster = db(json!({"ingress": [{"ports": ports}]}));
    let all = [
        "tcp:53", "udp:53", "tcp:80", "tcp:81", "tcp:82", "udp:81", "sctp:81", "tcp:7000",
        "tcp:7001", "tcp:8080", "udp:8080", "icmp:8",
    ];
    let gets_there = |what: &&str| ingress(&cluster, "default/front", "default/db", what).allowed;
    all.into_iter().filter(gets_there).collect()
}

#[test]
fn the_example_of_the_documentation() {
    let cluster = db(json!({
        "policyTypes": ["Ingress", "Egress"],
        "ingress": [{
            "from": [
                {"ipBlock": {"cidr": "172.17.0.0/16", "except": ["172.17.1.0/24"]}},
                {"namespaceSelector": {"matchLabels": {"project": "other"}}},
                {"podSelector": {"matchLabels": {"role": "front"}}},
            ],
            "ports": [{"protocol": "TCP", "port": 6379}],
        }],
        "egress": [{"to": [{"ipBlock": {"cidr": "10.0.0.0/24"}}], "ports": [{"protocol": "TCP", "port": 5978}]}],
    }));
    for (from, to, what, allowed) in [
        ("default/front", "default/db", "tcp:6379", true),
        ("default/front", "default/db", "tcp:6380", false),
        ("default/front", "default/db", "udp:6379", false),
        ("other/front", "default/db", "tcp:6379", true),
        ("default/far", "default/db", "tcp:6379", false),
        ("172.17.0.1", "default/db", "tcp:6379", true),
        ("172.17.1.1", "default/db", "tcp:6379", false),
        ("172.17.2.0", "default/db", "tcp:6379", true),
        ("default/db", "10.0.0.9", "tcp:5978", true),
        ("default/db", "10.0.0.9", "tcp:5979", false),
        ("default/db", "10.0.1.0", "tcp:5978", false),
        ("default/db", "default/front", "tcp:5978", false),
        ("default/far", "default/front", "tcp:1", true),
    ] {
        let packet = packet(&cluster, from, to, what);
        assert_eq!(
            judge(&cluster, &packet).allowed,
            allowed,
            "{from} to {to}, {what}"
        );
    }
}

#[test]
fn peers() {
    let all = [
        "default/front",
        "other/front",
        "default/far",
        "n2",
        "10.9.9.9",
        "172.17.1.5",
        "172.17.2.5",
    ];
    let front = json!({"matchLabels": {"role": "front"}});
    let mine = json!({"matchLabels": {"project": "mine"}});
    for (from, expected) in [
        (json!(null), all.to_vec()),
        (json!([]), all.to_vec()),
        (
            json!([{"podSelector": {}}]),
            vec!["default/front", "default/far"],
        ),
        (json!([{"podSelector": front}]), vec!["default/front"]),
        (
            json!([{"namespaceSelector": {}}]),
            vec!["default/front", "other/front", "default/far"],
        ),
        (
            json!([{"namespaceSelector": mine}]),
            vec!["default/front", "default/far"],
        ),
        (
            json!([{"namespaceSelector": {}, "podSelector": front}]),
            vec!["default/front", "other/front"],
        ),
        (
            json!([{"namespaceSelector": mine, "podSelector": front}]),
            vec!["default/front"],
        ),
        (
            json!([{"namespaceSelector": {"matchLabels": {"project": "other"}}}, {"podSelector": {"matchLabels": {"role": "far"}}}]),
            vec!["other/front", "default/far"],
        ),
        (
            json!([{"ipBlock": {"cidr": "172.17.0.0/16", "except": ["172.17.1.0/24"]}}]),
            vec!["172.17.2.5"],
        ),
        // A block is of pods' and nodes' addresses, too.
        (
            json!([{"ipBlock": {"cidr": "10.1.0.0/16", "except": ["10.1.2.4/32"]}}]),
            vec!["default/front", "other/front"],
        ),
        (json!([{"ipBlock": {"cidr": "192.168.0.0/24"}}]), vec!["n2"]),
        (json!([{"ipBlock": {"cidr": "::/0"}}]), vec![]),
    ] {
        assert_eq!(senders(from.clone()), expected, "{from}");
    }
}

#[test]
fn blocks_of_both_families() {
    let cluster = db(
        json!({"ingress": [{"from": [{"ipBlock": {"cidr": "fd00::/8", "except": ["fd00:1::/32"]}}]}]}),
    );
    for (from, allowed) in [("fd00::1", true), ("fd00:1::1", false), ("fe80::1", false)] {
        let mut packet = packet(&cluster, from, "default/db", "tcp:80");
        packet.to_address = "fd00::1:1:1".parse().unwrap();
        assert_eq!(judge(&cluster, &packet).allowed, allowed, "{from}");
    }
}

#[test]
fn ports_of_every_form() {
    let everything = vec![
        "tcp:53", "udp:53", "tcp:80", "tcp:81", "tcp:82", "udp:81", "sctp:81", "tcp:7000",
        "tcp:7001", "tcp:8080", "udp:8080", "icmp:8",
    ];
    for (list, expected) in [
        (json!(null), everything.clone()),
        (json!([]), everything.clone()),
        (
            json!([{}]),
            vec![
                "tcp:53", "tcp:80", "tcp:81", "tcp:82", "tcp:7000", "tcp:7001", "tcp:8080",
            ],
        ),
        (json!([{"protocol": "SCTP"}]), vec!["sctp:81"]),
        (json!([{"port": 81}]), vec!["tcp:81"]),
        (json!([{"port": 81, "protocol": "UDP"}]), vec!["udp:81"]),
        (
            json!([{"port": 80, "endPort": 81}]),
            vec!["tcp:80", "tcp:81"],
        ),
        (
            json!([{"port": 81, "protocol": "UDP"}, {"port": 82}]),
            vec!["tcp:82", "udp:81"],
        ),
        (json!([{"port": "web"}]), vec!["tcp:8080"]),
        (json!([{"port": "dns"}]), vec![]),
        (json!([{"port": "dns", "protocol": "UDP"}]), vec!["udp:53"]),
        (json!([{"port": "proxy"}]), vec!["tcp:7001"]),
        (json!([{"port": "setup"}]), vec![]),
        (json!([{"port": "none"}]), vec![]),
    ] {
        assert_eq!(ports(list.clone()), expected, "{list}");
    }
}

#[test]
fn names_of_ports_are_the_receivers() {
    let with = |to: Value| {
        db(json!({"policyTypes": ["Egress"], "egress": [{"to": to, "ports": [{"port": "web"}]}]}))
    };
    let everybody = with(json!([]));
    for (to, what, allowed) in [
        ("default/front", "tcp:8080", true),
        ("default/front", "tcp:80", false),
        ("10.9.9.9", "tcp:8080", false),
        ("n2", "tcp:8080", false),
        ("default/host", "tcp:8080", false),
    ] {
        let side = egress(&everybody, "default/db", to, what);
        assert_eq!(side.allowed, allowed, "{to} {what}");
    }
    let block = with(json!([{"ipBlock": {"cidr": "10.0.0.0/8"}}]));
    assert!(egress(&block, "default/db", "default/front", "tcp:8080").allowed);
    assert!(!egress(&block, "default/db", "10.9.9.9", "tcp:8080").allowed);
}

#[test]
fn types_and_isolation() {
    let rule = json!([{"ports": [{"port": 80}]}]);
    for (spec, ingress_isolated, egress_isolated) in [
        (json!({}), true, false),
        (json!({"policyTypes": []}), true, false),
        (json!({"egress": []}), true, false),
        (json!({"egress": rule}), true, true),
        (
            json!({"policyTypes": ["Ingress"], "egress": rule}),
            true,
            false,
        ),
        (
            json!({"policyTypes": ["Egress"], "ingress": rule}),
            false,
            true,
        ),
        (json!({"policyTypes": ["Egress"]}), false, true),
        (json!({"policyTypes": ["Ingress", "Egress"]}), true, true),
    ] {
        let cluster = db(spec.clone());
        let into = ingress(&cluster, "default/front", "default/db", "tcp:81");
        let out = egress(&cluster, "default/db", "default/front", "tcp:81");
        assert_eq!(into.isolated, ingress_isolated, "{spec}");
        assert_eq!(into.allowed, !ingress_isolated, "{spec}");
        assert_eq!(out.isolated, egress_isolated, "{spec}");
        assert_eq!(out.allowed, !egress_isolated, "{spec}");
    }
}

#[test]
fn policies_of_a_pod_add_up_and_are_named() {
    let front = json!([{"podSelector": {"matchLabels": {"role": "front"}}}]);
    let mut elsewhere = policy("elsewhere", json!({"podSelector": {}, "ingress": [{}]}));
    elsewhere["metadata"]["namespace"] = json!("other");
    let cluster = cluster([
        policy("nothing", json!({"podSelector": {}})),
        policy(
            "b",
            json!({"podSelector": {}, "ingress": [{"ports": [{"port": 1}]}, {"from": front}]}),
        ),
        policy(
            "a",
            json!({"podSelector": {"matchLabels": {"role": "db"}}, "ingress": [{"ports": [{"port": 80}]}]}),
        ),
        elsewhere,
    ]);
    let side = ingress(&cluster, "default/front", "default/db", "tcp:80");
    assert!(side.allowed && side.isolated);
    assert_eq!(places(&side.by), [("a", "ingress", 0), ("b", "ingress", 1)]);
    assert_eq!(side.by[0].kind, "NetworkPolicy");
    assert_eq!(side.by[0].namespace, "default");
    let side = ingress(&cluster, "default/far", "default/db", "tcp:81");
    assert!(!side.allowed && side.isolated && side.by.is_empty());
    let side = ingress(&cluster, "default/db", "default/far", "tcp:80");
    assert!(!side.allowed);
    let side = egress(&cluster, "default/db", "default/far", "tcp:81");
    assert!(side.allowed && !side.isolated && side.by.is_empty());
}

#[test]
fn both_ends_must_allow() {
    let rule = |port: u16| json!([{"ports": [{"port": port}]}]);
    let cluster = cluster([
        policy(
            "in",
            json!({"podSelector": {"matchLabels": {"role": "db"}}, "ingress": rule(80)}),
        ),
        policy(
            "out",
            json!({"podSelector": {"matchLabels": {"role": "front"}}, "policyTypes": ["Egress"], "egress": [rule(80)[0], rule(81)[0]]}),
        ),
    ]);
    for (what, egress, ingress) in [
        ("tcp:80", true, true),
        ("tcp:81", true, false),
        ("tcp:82", false, false),
    ] {
        let verdict = judge(
            &cluster,
            &packet(&cluster, "default/front", "default/db", what),
        );
        assert_eq!(verdict.egress.allowed, egress, "{what}");
        assert_eq!(verdict.ingress.allowed, ingress, "{what}");
        assert_eq!(verdict.allowed, egress && ingress, "{what}");
    }
}

#[test]
fn nodes_and_pods_on_their_network() {
    let cluster = cluster([policy(
        "nothing",
        json!({"podSelector": {}, "policyTypes": ["Ingress", "Egress"]}),
    )]);
    for (from, to, allowed) in [
        // From the pod's own node, and who is that node.
        ("n1", "default/db", true),
        ("default/host", "default/db", true),
        ("n2", "default/db", false),
        ("default/host", "default/far", false),
        // Policies select no pod that is its node.
        ("10.9.9.9", "default/host", true),
        ("default/host", "10.9.9.9", true),
        ("default/host", "other/front", true),
        ("default/db", "n1", false),
        ("n1", "n2", true),
        ("10.9.9.9", "n1", true),
        // A pod can't be kept from itself.
        ("default/db", "default/db", true),
        ("other/front", "default/front", false),
    ] {
        let packet = packet(&cluster, from, to, "tcp:80");
        assert_eq!(judge(&cluster, &packet).allowed, allowed, "{from} to {to}");
    }
    let mut open = cluster;
    open.policies = vec![policy(
        "pods",
        json!({"podSelector": {}, "ingress": [{"from": [{"namespaceSelector": {}}]}]}),
    )];
    // A selector of pods doesn't select one that is its node.
    assert!(ingress(&open, "default/db", "default/far", "tcp:80").allowed);
    assert!(!ingress(&open, "default/host", "default/far", "tcp:80").allowed);
}

#[test]
fn a_pod_that_has_ended_is_nobody() {
    let mut cluster = db(json!({"ingress": [{"from": [{"podSelector": {}}]}]}));
    assert!(ingress(&cluster, "default/front", "default/db", "tcp:80").allowed);
    cluster.pods[1]["status"]["phase"] = json!("Succeeded");
    assert!(!ingress(&cluster, "default/front", "default/db", "tcp:80").allowed);
    cluster.pods[0]["status"]["phase"] = json!("Failed");
    let side = ingress(&cluster, "default/far", "default/db", "tcp:80");
    assert!(side.allowed && !side.isolated);
}

#[test]
fn a_policy_that_cannot_be_read_is_a_panic() {
    for (spec, part) in [
        (
            json!({"podSelector": {}, "ingres": []}),
            "unknown field `ingres`",
        ),
        (json!({"podSelector": {}, "ingress": {}}), "sequence"),
        (
            json!({"podSelector": {}, "ingress": [{"from": [{}]}]}),
            "a peer must be",
        ),
        (
            json!({"podSelector": {}, "ingress": [{"ports": [{"port": 70000}]}]}),
            "NumberOrName",
        ),
        (
            json!({"podSelector": {}, "ingress": [{"ports": [{"port": "web", "endPort": 90}]}]}),
            "endPort",
        ),
        (
            json!({"podSelector": {}, "ingress": [{"from": [{"ipBlock": {"cidr": "10.0.0.0"}}]}]}),
            "invalid",
        ),
    ] {
        let cluster = cluster([policy("wrong", spec.clone())]);
        let packet = packet(&cluster, "n1", "n2", "tcp:80");
        let error = std::panic::catch_unwind(|| judge(&cluster, &packet)).unwrap_err();
        let message = error.downcast_ref::<String>().unwrap();
        assert!(message.contains(part), "{message}");
    }
}

#[test]
#[should_panic(expected = "no pod default/nobody")]
fn an_unknown_pod_is_a_panic() {
    let cluster = cluster([]);
    let mut packet = packet(&cluster, "n1", "n2", "tcp:80");
    packet.to = End::Pod {
        namespace: "default".into(),
        name: "nobody".into(),
    };
    judge(&cluster, &packet);
}
