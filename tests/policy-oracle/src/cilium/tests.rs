use serde_json::{Value, json};

use crate::testing::{cluster, egress, ingress, packet, places};
use crate::{Cluster, Side, judge};

fn policy(kind: &str, namespace: Option<&str>, name: &str, spec: Value) -> Value {
    let mut metadata = json!({"name": name});
    if let Some(namespace) = namespace {
        metadata["namespace"] = json!(namespace);
    }
    json!({"apiVersion": "cilium.io/v2", "kind": kind, "metadata": metadata, "spec": spec})
}

/// A CiliumNetworkPolicy of namespace default for the pods with role db, or as the spec says.
fn cnp(name: &str, spec: Value) -> Value {
    let mut spec = spec;
    if spec["endpointSelector"].is_null() {
        spec["endpointSelector"] = json!({"matchLabels": {"role": "db"}});
    }
    policy("CiliumNetworkPolicy", Some("default"), name, spec)
}

fn ccnp(name: &str, spec: Value) -> Value {
    policy("CiliumClusterwideNetworkPolicy", None, name, spec)
}

fn group(name: &str, blocks: &[&str]) -> Value {
    policy(
        "CiliumCIDRGroup",
        None,
        name,
        json!({"externalCIDRs": blocks}),
    )
}

fn network_policy(name: &str, spec: Value) -> Value {
    json!({"apiVersion": "networking.k8s.io/v1", "kind": "NetworkPolicy", "metadata": {"namespace": "default", "name": name}, "spec": spec})
}

const OTHERS: [&str; 8] = [
    "default/front",
    "default/far",
    "other/front",
    "n1",
    "n2",
    "default/host",
    "10.9.9.9",
    "172.17.1.5",
];

/// Whom default/db may send to by a rule.
fn receivers(clusterwide: bool, rule: Value, more: Vec<Value>) -> Vec<&'static str> {
    let spec = json!({"endpointSelector": {"matchLabels": {"role": "db"}}, "egress": [rule]});
    let own = if clusterwide {
        ccnp("a", spec)
    } else {
        cnp("a", spec)
    };
    let cluster = cluster(more.into_iter().chain([own]));
    let gets_there = |to: &&str| egress(&cluster, "default/db", to, "tcp:80").allowed;
    OTHERS.into_iter().filter(gets_there).collect()
}

#[test]
fn endpoints_of_a_namespaces_policy() {
    let pods = ["default/front", "default/far"];
    let every = ["default/front", "default/far", "other/front"];
    for (selector, expected) in [
        (json!({}), pods.to_vec()),
        (
            json!({"matchLabels": {"role": "front"}}),
            vec!["default/front"],
        ),
        (
            json!({"matchLabels": {"k8s:role": "front"}}),
            vec!["default/front"],
        ),
        (
            json!({"matchLabels": {"any:role": "front"}}),
            vec!["default/front"],
        ),
        (json!({"matchLabels": {"reserved:role": "front"}}), vec![]),
        (
            json!({"matchLabels": {"role": "front", "io.kubernetes.pod.namespace": "other"}}),
            vec!["other/front"],
        ),
        (
            json!({"matchLabels": {"k8s:io.kubernetes.pod.namespace": "other"}}),
            vec!["other/front"],
        ),
        (
            json!({"matchExpressions": [{"key": "any:io.kubernetes.pod.namespace", "operator": "Exists"}]}),
            every.to_vec(),
        ),
        (
            json!({"matchExpressions": [{"key": "k8s:io.kubernetes.pod.namespace", "operator": "In", "values": ["other", "third"]}]}),
            vec!["other/front"],
        ),
        // Who is no pod has no namespace, so is in none of these.
        (
            json!({"matchExpressions": [{"key": "io.kubernetes.pod.namespace", "operator": "NotIn", "values": ["default"]}]}),
            vec![
                "other/front",
                "n1",
                "n2",
                "default/host",
                "10.9.9.9",
                "172.17.1.5",
            ],
        ),
        (
            json!({"matchExpressions": [
                {"key": "io.kubernetes.pod.namespace", "operator": "DoesNotExist"},
                {"key": "any:host", "operator": "Exists"},
            ]}),
            vec!["n1", "default/host"],
        ),
        (
            json!({"matchLabels": {"io.cilium.k8s.namespace.labels.project": "other"}}),
            vec!["other/front"],
        ),
        (
            json!({"matchLabels": {"k8s:io.cilium.k8s.policy.serviceaccount": "front-account"}}),
            vec!["default/front"],
        ),
        (
            json!({"matchExpressions": [{"key": "role", "operator": "NotIn", "values": ["front"]}]}),
            vec!["default/far"],
        ),
        (
            json!({"matchLabels": {"reserved:host": ""}}),
            vec!["n1", "default/host"],
        ),
        (
            json!({"matchLabels": {"reserved:remote-node": ""}}),
            vec!["n2"],
        ),
        (
            json!({"matchLabels": {"reserved:world": ""}}),
            vec!["10.9.9.9", "172.17.1.5"],
        ),
    ] {
        let found = receivers(false, json!({"toEndpoints": [selector]}), vec![]);
        assert_eq!(found, expected, "{selector}");
    }
}

#[test]
fn endpoints_of_a_clusters_policy() {
    for (selector, expected) in [
        (
            json!({}),
            vec!["default/front", "default/far", "other/front"],
        ),
        (
            json!({"matchLabels": {"role": "front"}}),
            vec!["default/front", "other/front"],
        ),
        (
            json!({"matchLabels": {"k8s:io.kubernetes.pod.namespace": "default"}}),
            vec!["default/front", "default/far"],
        ),
        (
            json!({"matchExpressions": [{"key": "io.cilium.k8s.namespace.labels.project", "operator": "NotIn", "values": ["mine"]}]}),
            vec!["other/front"],
        ),
    ] {
        let found = receivers(true, json!({"toEndpoints": [selector]}), vec![]);
        assert_eq!(found, expected, "{selector}");
    }
}

#[test]
fn entities() {
    let pods = ["default/front", "default/far", "other/front"];
    let nodes = ["n1", "n2", "default/host"];
    let world = ["10.9.9.9", "172.17.1.5"];
    for (entities, expected) in [
        (json!(["all"]), OTHERS.to_vec()),
        (json!(["world"]), world.to_vec()),
        (json!(["cluster"]), [pods, nodes].concat()),
        (json!(["host"]), vec!["n1", "default/host"]),
        (json!(["remote-node"]), vec!["n2"]),
        (
            json!(["host", "world"]),
            [&["n1", "default/host"], &world[..]].concat(),
        ),
        (json!(["none"]), vec![]),
        (json!(["unmanaged", "init", "health", "ingress"]), vec![]),
    ] {
        let found = receivers(false, json!({"toEntities": entities}), vec![]);
        assert_eq!(found, expected, "{entities}");
    }
}

#[test]
fn blocks_are_of_addresses_outside() {
    let groups = || {
        vec![
            group("g", &["172.17.0.0/16", "10.9.9.9/32"]),
            group("none", &[]),
        ]
    };
    for (rule, expected) in [
        (
            json!({"toCIDR": ["0.0.0.0/0"]}),
            vec!["10.9.9.9", "172.17.1.5"],
        ),
        (
            json!({"toCIDR": ["10.0.0.0/8", "192.168.0.0/16"]}),
            vec!["10.9.9.9"],
        ),
        (json!({"toCIDR": ["172.17.1.5"]}), vec!["172.17.1.5"]),
        (json!({"toCIDR": ["::/0"]}), vec![]),
        (
            json!({"toCIDRSet": [{"cidr": "0.0.0.0/0", "except": ["172.17.0.0/16"]}]}),
            vec!["10.9.9.9"],
        ),
        // What one set leaves out another may have.
        (
            json!({"toCIDRSet": [{"cidr": "0.0.0.0/0", "except": ["172.17.0.0/16"]}, {"cidr": "172.17.1.0/24"}]}),
            vec!["10.9.9.9", "172.17.1.5"],
        ),
        (
            json!({"toCIDRSet": [{"cidrGroupRef": "g"}]}),
            vec!["10.9.9.9", "172.17.1.5"],
        ),
        (
            json!({"toCIDRSet": [{"cidrGroupRef": "g", "except": ["172.17.1.0/24"]}]}),
            vec!["10.9.9.9"],
        ),
        (json!({"toCIDRSet": [{"cidrGroupRef": "none"}]}), vec![]),
        (json!({"toCIDRSet": [{"cidrGroupRef": "missing"}]}), vec![]),
    ] {
        assert_eq!(receivers(false, rule.clone(), groups()), expected, "{rule}");
    }
}

#[test]
fn lists_that_are_there_and_empty_have_nobody() {
    for (rule, expected) in [
        // One that says nothing is there to isolate.
        (json!({}), vec![]),
        (json!({"toEndpoints": null}), vec![]),
        (json!({"toPorts": [], "icmps": []}), vec![]),
        (json!({"toEntities": ["all"]}), OTHERS.to_vec()),
        (
            json!({"toEntities": ["all"], "toPorts": [], "icmps": []}),
            OTHERS.to_vec(),
        ),
        (json!({"toEndpoints": []}), vec![]),
        (json!({"toEntities": []}), vec![]),
        (json!({"toCIDR": []}), vec![]),
        (json!({"toCIDRSet": []}), vec![]),
        (json!({"toEndpoints": [], "toEntities": ["all"]}), vec![]),
        (
            json!({"toEndpoints": [], "toPorts": [{"ports": [{"port": "80"}]}]}),
            vec![],
        ),
        (
            json!({"toPorts": [{"ports": [{"port": "80"}]}]}),
            OTHERS.to_vec(),
        ),
        (json!({"toPorts": [{"ports": [{"port": "81"}]}]}), vec![]),
    ] {
        assert_eq!(receivers(false, rule.clone(), vec![]), expected, "{rule}");
    }
}

const PACKETS: [&str; 12] = [
    "tcp:53", "udp:53", "tcp:80", "tcp:81", "tcp:82", "udp:81", "sctp:81", "tcp:7001", "tcp:8080",
    "udp:8080", "icmp:0", "icmp:8",
];

#[test]
fn ports_and_types_of_every_form() {
    let ports = |ports: Value| json!({"toPorts": [{"ports": ports}]});
    let all_tcp = [
        "tcp:53", "tcp:80", "tcp:81", "tcp:82", "tcp:7001", "tcp:8080",
    ];
    for (rule, expected) in [
        (json!({}), vec![]),
        (json!({"toPorts": []}), vec![]),
        (json!({"toPorts": [], "icmps": []}), vec![]),
        (
            ports(json!([{"port": "81", "protocol": "TCP"}])),
            vec!["tcp:81"],
        ),
        (
            ports(json!([{"port": "81", "protocol": "ANY"}])),
            vec!["tcp:81", "udp:81", "sctp:81"],
        ),
        (
            ports(json!([{"port": "81"}])),
            vec!["tcp:81", "udp:81", "sctp:81"],
        ),
        (
            ports(json!([{"port": "80", "endPort": 81, "protocol": "TCP"}])),
            vec!["tcp:80", "tcp:81"],
        ),
        (
            ports(json!([{"port": "0", "protocol": "TCP"}])),
            all_tcp.to_vec(),
        ),
        (ports(json!([{"port": "web"}])), vec!["tcp:8080"]),
        (ports(json!([{"port": "web", "protocol": "UDP"}])), vec![]),
        (
            ports(json!([{"port": "dns", "protocol": "ANY"}])),
            vec!["udp:53"],
        ),
        (
            ports(json!([{"port": "proxy", "protocol": "TCP"}])),
            vec!["tcp:7001"],
        ),
        (
            json!({"toPorts": [{"ports": [{"port": "80", "protocol": "TCP"}]}, {"ports": [{"port": "81", "protocol": "UDP"}]}]}),
            vec!["tcp:80", "udp:81"],
        ),
        (
            json!({"icmps": [{"fields": [{"type": 8}]}]}),
            vec!["icmp:8"],
        ),
        (
            json!({"icmps": [{"fields": [{"type": "8"}]}]}),
            vec!["icmp:8"],
        ),
        (
            json!({"icmps": [{"fields": [{"type": "EchoReply", "family": "IPv4"}]}, {"fields": [{"type": "EchoRequest"}]}]}),
            vec!["icmp:0", "icmp:8"],
        ),
        (
            json!({"icmps": [{"fields": [{"type": 8, "family": "IPv6"}]}]}),
            vec![],
        ),
    ] {
        for direction in ["ingress", "egress"] {
            let spec = json!({"endpointSelector": {}, direction: [rule]});
            let cluster = cluster([ccnp("a", spec)]);
            let gets_there = |what: &&str| {
                judge(
                    &cluster,
                    &packet(&cluster, "default/front", "default/db", what),
                )
                .allowed
            };
            let found: Vec<&str> = PACKETS.into_iter().filter(gets_there).collect();
            assert_eq!(found, expected, "{direction} {rule}");
        }
    }
}

#[test]
fn types_of_icmpv6() {
    let fields = json!([{"type": "EchoRequest", "family": "IPv6"}, {"type": 0}]);
    let cluster = cluster([cnp(
        "a",
        json!({"ingress": [{"icmps": [{"fields": fields}]}]}),
    )]);
    for (from, number, allowed) in [
        ("fd00::9", 128, true),
        ("fd00::9", 129, false),
        ("fd00::9", 0, false),
        ("10.9.9.9", 0, true),
        ("10.9.9.9", 128, false),
    ] {
        let mut packet = packet(&cluster, from, "default/db", &format!("icmp:{number}"));
        // Codes don't matter.
        packet.port |= 3;
        if packet.from_address.is_ipv6() {
            packet.to_address = "fd00::1:1:1".parse().unwrap();
        }
        assert_eq!(judge(&cluster, &packet).allowed, allowed, "{from} {number}");
    }
}

/// The table of Cilium's documentation of deny policies.
#[test]
fn denying_beats_allowing() {
    let client = json!({"matchLabels": {"role": "front"}});
    let port = |port: &str| json!({"toPorts": [{"ports": [{"port": port, "protocol": "TCP"}]}]});
    let allow = json!([port("80"), port("81"), {"fromEndpoints": [client]}]);
    let layer_4 = port("80");
    let layer_3 = json!({"fromEndpoints": [client]});
    for (allow, deny, expected) in [
        (&allow, json!(null), vec!["tcp:81", "tcp:80", "icmp:8"]),
        (&allow, json!([layer_4]), vec!["tcp:81", "icmp:8"]),
        (&allow, json!([layer_3]), vec![]),
        (&allow, json!([layer_4, layer_3]), vec![]),
        (&json!(null), json!([layer_4]), vec![]),
    ] {
        let cluster = cluster([
            cnp("a", json!({"ingress": allow})),
            cnp("b", json!({"ingressDeny": deny})),
        ]);
        let gets_there =
            |what: &&str| ingress(&cluster, "default/front", "default/db", what).allowed;
        let all = ["tcp:81", "tcp:80", "icmp:8"];
        let found: Vec<&str> = all.into_iter().filter(gets_there).collect();
        assert_eq!(found, expected, "{deny}");
    }
}

fn front_to_db(policies: Vec<Value>) -> Side {
    let cluster = cluster(policies);
    ingress(&cluster, "default/front", "default/db", "tcp:80")
}

#[test]
fn denying_beats_network_policies_and_is_named() {
    let open = network_policy("np", json!({"podSelector": {}, "ingress": [{}]}));
    let side = front_to_db(vec![
        open.clone(),
        cnp(
            "b",
            json!({"ingress": [{"fromEntities": ["all"]}], "ingressDeny": [{"fromEntities": ["none"]}, {"fromEntities": ["cluster"]}]}),
        ),
        ccnp(
            "a",
            json!({"endpointSelector": {}, "ingressDeny": [{"fromEntities": ["all"]}]}),
        ),
    ]);
    assert!(!side.allowed && side.isolated);
    assert_eq!(
        places(&side.by),
        [("a", "ingressDeny", 0), ("b", "ingressDeny", 1)]
    );
    let side = front_to_db(vec![
        open,
        cnp(
            "b",
            json!({"ingress": [{"fromEntities": ["none"]}, {"fromEntities": ["all"]}]}),
        ),
    ]);
    assert!(side.allowed);
    assert_eq!(
        places(&side.by),
        [("b", "ingress", 1), ("np", "ingress", 0)]
    );
    assert_eq!(side.by[0].kind, "CiliumNetworkPolicy");
    assert_eq!(side.by[0].namespace, "default");
}

#[test]
fn rules_isolate_unless_the_policy_says_otherwise() {
    let nobody = json!([{"fromEntities": ["none"]}]);
    let far = json!([{"fromEndpoints": [{"matchLabels": {"role": "far"}}]}]);
    let all = json!([{"fromEntities": ["all"]}]);
    for (spec, allowed, isolated) in [
        (json!({"ingress": []}), true, false),
        (json!({"egress": [{}]}), true, false),
        (json!({"ingress": nobody}), false, true),
        (json!({"ingress": all}), true, true),
        (json!({"ingressDeny": nobody}), false, true),
        (
            json!({"ingress": nobody, "enableDefaultDeny": {}}),
            false,
            true,
        ),
        (
            json!({"ingress": nobody, "enableDefaultDeny": {"ingress": true}}),
            false,
            true,
        ),
        (
            json!({"ingress": nobody, "enableDefaultDeny": {"ingress": false}}),
            true,
            false,
        ),
        (
            json!({"ingress": nobody, "enableDefaultDeny": {"egress": false}}),
            false,
            true,
        ),
        (
            json!({"ingressDeny": far, "enableDefaultDeny": {"ingress": false}}),
            true,
            false,
        ),
        (
            json!({"ingressDeny": all, "enableDefaultDeny": {"ingress": false}}),
            false,
            false,
        ),
        // What isn't ruled isn't isolated, whatever the policy says.
        (
            json!({"egress": [{}], "enableDefaultDeny": {"ingress": true}}),
            true,
            false,
        ),
        // Another pod's policy.
        (
            json!({"endpointSelector": {"matchLabels": {"role": "far"}}, "ingress": nobody}),
            true,
            false,
        ),
    ] {
        let side = front_to_db(vec![cnp("a", spec.clone())]);
        assert_eq!(side.allowed, allowed, "{spec}");
        assert_eq!(side.isolated, isolated, "{spec}");
    }
    // One policy that isolates is enough.
    let quiet = json!({"ingress": nobody, "enableDefaultDeny": {"ingress": false}});
    let side = front_to_db(vec![cnp("a", quiet), cnp("b", json!({"ingress": nobody}))]);
    assert!(!side.allowed && side.isolated && side.by.is_empty());
}

#[test]
fn subjects() {
    let nobody = json!([{"fromEntities": ["none"]}]);
    let all = [
        "default/db",
        "default/front",
        "default/far",
        "other/front",
        "default/host",
    ];
    let subjects = |policy: Value| {
        let cluster = cluster([policy]);
        let is_subject = |to: &&str| !ingress(&cluster, "10.9.9.9", to, "tcp:80").allowed;
        all.into_iter().filter(is_subject).collect::<Vec<&str>>()
    };
    let spec = |selector: Value| json!({"endpointSelector": selector, "ingress": nobody});
    assert_eq!(
        subjects(cnp("a", spec(json!({})))),
        ["default/db", "default/front", "default/far"]
    );
    for (selector, expected) in [
        (
            json!({}),
            vec!["default/db", "default/front", "default/far", "other/front"],
        ),
        (
            json!({"matchLabels": {"role": "front"}}),
            vec!["default/front", "other/front"],
        ),
        (
            json!({"matchLabels": {"k8s:io.kubernetes.pod.namespace": "other"}}),
            vec!["other/front"],
        ),
        (
            json!({"matchLabels": {"io.cilium.k8s.namespace.labels.project": "mine", "any:role": "far"}}),
            vec!["default/far"],
        ),
        (
            json!({"matchLabels": {"io.cilium.k8s.policy.serviceaccount": "db-account"}}),
            vec!["default/db"],
        ),
    ] {
        assert_eq!(
            subjects(ccnp("a", spec(selector.clone()))),
            expected,
            "{selector}"
        );
    }
}

#[test]
fn specs_go_on_counting() {
    let selector = json!({"matchLabels": {"role": "db"}});
    let mut policy = cnp(
        "a",
        json!({"ingress": [{"fromEntities": ["none"]}, {"fromEntities": ["all"]}], "ingressDeny": [{"fromEntities": ["none"]}]}),
    );
    policy["specs"] = json!([
        {"endpointSelector": {"matchLabels": {"role": "far"}}, "ingress": [{"fromEntities": ["all"]}]},
        {"endpointSelector": selector, "ingress": [{"fromEntities": ["all"]}], "egress": [{"toEntities": ["all"]}]},
    ]);
    let cluster = cluster([policy]);
    let side = ingress(&cluster, "default/front", "default/db", "tcp:80");
    assert_eq!(places(&side.by), [("a", "ingress", 1), ("a", "ingress", 3)]);
    let side = ingress(&cluster, "default/front", "default/far", "tcp:80");
    assert_eq!(places(&side.by), [("a", "ingress", 2)]);
    let side = egress(&cluster, "default/db", "default/far", "tcp:80");
    assert_eq!(places(&side.by), [("a", "egress", 0)]);
}

#[test]
fn tiers_of_administrators_go_before_and_after() {
    let tier = |tier: &str, action: &str| {
        json!({
            "apiVersion": "policy.networking.k8s.io/v1alpha2",
            "kind": "ClusterNetworkPolicy",
            "metadata": {"name": tier},
            "spec": {
                "tier": tier,
                "priority": 1,
                "subject": {"namespaces": {}},
                "ingress": [{"action": action, "from": [{"namespaces": {}}]}],
            },
        })
    };
    let deny = cnp("deny", json!({"ingressDeny": [{"fromEntities": ["all"]}]}));
    assert!(front_to_db(vec![tier("Admin", "Accept"), deny.clone()]).allowed);
    assert!(!front_to_db(vec![tier("Baseline", "Accept"), deny]).allowed);
    // A rule that allows without isolating decides, too; what it doesn't allow goes on.
    let quiet = |rule: Value| {
        cnp(
            "quiet",
            json!({"ingress": [rule], "enableDefaultDeny": {"ingress": false}}),
        )
    };
    assert!(
        front_to_db(vec![
            tier("Baseline", "Deny"),
            quiet(json!({"fromEntities": ["all"]}))
        ])
        .allowed
    );
    let none = quiet(json!({"fromEntities": ["none"]}));
    assert!(!front_to_db(vec![tier("Baseline", "Deny"), none]).allowed);
}

#[test]
fn probes_get_through() {
    let cluster = cluster([cnp(
        "a",
        json!({"ingressDeny": [{"fromEntities": ["all"]}], "egressDeny": [{"toEntities": ["all"]}]}),
    )]);
    for (from, to, allowed) in [
        ("n1", "default/db", true),
        ("default/host", "default/db", true),
        ("n2", "default/db", false),
        ("default/db", "n1", false),
        ("default/db", "default/db", true),
    ] {
        assert_eq!(
            judge(&cluster, &packet(&cluster, from, to, "tcp:80")).allowed,
            allowed,
            "{from} to {to}"
        );
    }
}

fn message(cluster: &Cluster) -> String {
    let packet = packet(cluster, "n1", "n2", "tcp:80");
    let error = std::panic::catch_unwind(|| judge(cluster, &packet)).unwrap_err();
    error.downcast_ref::<String>().unwrap().clone()
}

#[test]
fn what_is_not_understood_is_a_panic() {
    for (spec, part) in [
        (
            json!({"egressDeny": [{"toFQDNs": [{"matchName": "a.b"}]}]}),
            "names are for",
        ),
        (json!({"egress": [{"toFQDNs": [{}]}]}), "has a name"),
        (json!({"egress": [{"toServices": [{}]}]}), "names some"),
        (
            json!({"ingress": [{"fromNodes": [{}]}]}),
            "unknown field `fromNodes`",
        ),
        (json!({"ingress": [{"toEndpoints": [{}]}]}), "direction"),
        (
            json!({"egressDeny": [{"fromEndpoints": [{}]}]}),
            "direction",
        ),
        (
            json!({"ingress": [{"fromEntities": ["kube-apiserver"]}]}),
            "unknown variant",
        ),
        (
            json!({"ingress": [{"fromEntities": ["all"], "fromCIDR": ["10.0.0.0/8"]}]}),
            "one form",
        ),
        (
            json!({"ingress": [{"toPorts": [{"ports": [{"port": "80"}]}], "icmps": [{"fields": [{"type": 8}]}]}]}),
            "two rules",
        ),
        (
            json!({"ingress": [{"toPorts": [{"ports": [{"port": "80"}], "rules": {"http": []}}]}]}),
            "unknown field `rules`",
        ),
        (
            json!({"ingress": [{"toPorts": [{"ports": [{"port": "70000"}]}]}]}),
            "a number or a name",
        ),
        (
            json!({"ingress": [{"toPorts": [{"ports": [{"port": "80", "endPort": 79}]}]}]}),
            "endPort",
        ),
        (
            json!({"ingress": [{"icmps": [{"fields": [{"type": "PacketTooBig"}]}]}]}),
            "ICMP",
        ),
        (
            json!({"ingress": [{"fromCIDRSet": [{"except": []}]}]}),
            "either cidr",
        ),
        (
            json!({"ingress": [{"fromCIDRSet": [{"cidrGroupSelector": {}}]}]}),
            "unknown field",
        ),
        (
            json!({"endpointSelector": {"matchLabels": {"k8s:io.kubernetes.pod.namespace": "other"}}, "ingress": [{}]}),
            "names no namespace",
        ),
    ] {
        let message = message(&cluster([cnp("a", spec)]));
        assert!(message.contains(part), "{message}");
    }
    let both = json!({"nodeSelector": {}, "endpointSelector": {}, "ingress": [{}]});
    assert!(message(&cluster([ccnp("a", both)])).contains("either endpointSelector"));
    let homeless = policy(
        "CiliumNetworkPolicy",
        None,
        "a",
        json!({"endpointSelector": {}}),
    );
    assert!(message(&cluster([homeless])).contains("a namespace, or none"));
}
