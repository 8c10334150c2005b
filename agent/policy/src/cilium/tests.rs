use serde_json::{Value, json};

use super::*;
use crate::rule::{Block, Place};
use crate::selector::{Key, Test};

fn policy(spec: Value) -> Value {
    json!({"metadata": {"namespace": "shop", "name": "p"}, "spec": spec})
}

fn spec(lists: Value) -> Value {
    let mut spec = json!({"endpointSelector": {}});
    for (field, value) in lists.as_object().unwrap() {
        spec[field] = value.clone();
    }
    spec
}

/// The peers and ports of a rule that is right.
fn only(list: &str, one: Value) -> (Vec<Peer>, Vec<Ports>) {
    let (all, errors) = read(&policy(spec(json!({list: [one]}))));
    assert_eq!(errors, Vec::<String>::new());
    (all[0].rules[0].peers.clone(), all[0].rules[0].ports.clone())
}

fn pods(all: &[(Key, &str)]) -> Peer {
    let all = all
        .iter()
        .map(|(key, value)| (key.clone(), Test::In([(*value).to_owned()].into())));
    Peer::Pods(Arc::new(all.collect()))
}

#[test]
fn specs_count_on() {
    let one = spec(json!({"ingress": [{}, {"fromEntities": ["what"]}], "egressDeny": [{}]}));
    let two =
        spec(json!({"ingress": [{}], "egressDeny": [{}], "enableDefaultDeny": {"egress": false}}));
    let object = json!({"metadata": {"name": "p", "annotations": {"policy.xebec.io/audit": "true"}}, "spec": one, "specs": [two, {"nodeSelector": 1, "ingress": [{}, {}]}, one]});
    let (all, errors) = read_clusterwide(&object);
    let places: Vec<Vec<_>> = all
        .iter()
        .map(|one| {
            let rules = one.rules.iter();
            rules.map(|rule| (rule.list, rule.index)).collect()
        })
        .collect();
    assert_eq!(
        places,
        [
            vec![("ingress", 0), ("egressDeny", 0)],
            vec![("ingress", 2), ("egressDeny", 1)],
            vec![("ingress", 5), ("egressDeny", 2)],
        ]
    );
    let isolates: Vec<_> = all.iter().map(|one| one.isolates).collect();
    assert_eq!(isolates, [[true, true], [true, false], [true, true]]);
    assert!(
        all.iter()
            .all(|one| one.audit && one.subject.requirements().is_empty())
    );
    let begins: Vec<&str> = errors
        .iter()
        .filter_map(|one| one.split(": ").next())
        .collect();
    assert_eq!(
        begins,
        [
            "spec.ingress[1].fromEntities[0]",
            "specs[1].nodeSelector",
            "specs[2].ingress[1].fromEntities[0]"
        ]
    );
}

#[test]
fn a_policy_for_nodes_is_for_those_alone_and_all_of_it_or_none() {
    let of = |more: Value| {
        let mut spec = json!({"nodeSelector": {"matchLabels": {"k8s:zone": "a"}}, "ingress": [{"fromEntities": ["cluster"]}]});
        for (key, value) in more.as_object().unwrap() {
            spec[key] = value.clone();
        }
        read_clusterwide(&json!({"metadata": {"name": "p"}, "spec": spec}))
    };
    let (all, errors) =
        of(json!({"egressDeny": [{"toServices": [{"k8sService": {"serviceName": "s"}}]}]}));
    assert_eq!(errors, [""; 0]);
    assert!(all[0].for_nodes && all[0].isolates == [true, true]);
    assert!(
        all[0]
            .subject
            .selects_labels(&[("zone".to_owned(), "a".to_owned())].into())
    );
    for (more, words) in [
        (
            json!({"nodeSelector": {"matchLabels": 1}}),
            "spec.nodeSelector: ",
        ),
        (json!({"what": 1}), "spec.what: is not known"),
        (
            json!({"ingressDeny": [{"what": 1}]}),
            "spec.ingressDeny[0].what",
        ),
        (
            json!({"egress": [{"toFQDNs": [{"matchName": "a.b"}]}]}),
            "spec.egress: what resolvers tell nodes",
        ),
        (
            json!({"nodeSelector": {"matchLabels": {"reserved:host": ""}}}),
            "reserved labels are not of others than pods",
        ),
    ] {
        let (all, errors) = of(more);
        assert!(all.is_empty() && errors[0].contains(words), "{errors:?}");
        let last = errors.last().unwrap();
        assert!(last.ends_with("it is for no node"), "{last}");
    }
}

#[test]
fn directions_without_rules_are_open() {
    for (lists, expected) in [
        (json!({"ingress": [{}]}), [true, false]),
        (json!({"ingress": [], "egress": [{}]}), [false, true]),
        (json!({"ingressDeny": [{}]}), [true, false]),
        (
            json!({"ingress": [{}], "enableDefaultDeny": {"ingress": false, "egress": true}}),
            [false, false],
        ),
        (
            json!({"egressDeny": [{}], "enableDefaultDeny": {"egress": true}}),
            [false, true],
        ),
    ] {
        let (all, errors) = read(&policy(spec(lists)));
        assert_eq!((all[0].isolates, errors), (expected, Vec::new()));
    }
}

#[test]
fn peers_are_read() {
    let namespace = || (Key::Namespace, "shop");
    let label = |key: &str| Key::Label(key.to_owned());
    let cases: Vec<(Value, Vec<Peer>)> = vec![
        // A rule that names nobody is there to isolate, unless it has ports.
        (json!({}), vec![]),
        (json!({"toPorts": []}), vec![]),
        (
            json!({"toPorts": [{"ports": [{"port": "80"}]}]}),
            vec![Peer::Anybody],
        ),
        (json!({"fromCIDR": []}), vec![]),
        (json!({"fromEndpoints": [{}]}), vec![pods(&[namespace()])]),
        (
            json!({"fromEndpoints": [{"matchLabels": {"k8s:app": "web"}}]}),
            vec![pods(&[(label("app"), "web"), namespace()])],
        ),
        (
            json!({"fromEndpoints": [{"matchLabels": {"k8s:io.kubernetes.pod.namespace": "other"}}]}),
            vec![pods(&[(Key::Namespace, "other")])],
        ),
        (
            json!({"fromEndpoints": [{"matchLabels": {"io.cilium.k8s.namespace.labels.env": "a", "any:io.cilium.k8s.policy.serviceaccount": "robot"}}]}),
            vec![pods(&[
                (Key::NamespaceLabel("env".to_owned()), "a"),
                (Key::ServiceAccount, "robot"),
            ])],
        ),
        (
            json!({"fromEndpoints": [{"matchLabels": {"reserved:host": ""}}]}),
            vec![Peer::Identity(1)],
        ),
        (
            json!({"fromEndpoints": [{"matchLabels": {"reserved:init": ""}}]}),
            vec![],
        ),
        (
            json!({"fromEndpoints": [{"matchExpressions": [{"key": "reserved:world", "operator": "DoesNotExist"}]}]}),
            vec![
                Peer::Pods(Arc::default()),
                Peer::Identity(1),
                Peer::Identity(6),
                Peer::Identity(3),
            ],
        ),
        (json!({"fromEntities": ["all"]}), vec![Peer::Anybody]),
        (
            json!({"fromEntities": ["host", "remote-node", "world", "none", "unmanaged", "init", "health"]}),
            [1, 6, 2, 3].map(Peer::Identity).into(),
        ),
        (
            json!({"fromEntities": ["kube-apiserver"]}),
            vec![Peer::Place(Place::ApiServer)],
        ),
        (
            json!({"fromCIDR": ["192.0.2.1"]}),
            vec![Peer::Block(Block {
                cidr: "192.0.2.1/32".parse().unwrap(),
                except: vec![],
                outside: true,
            })],
        ),
        (
            json!({"fromCIDRSet": [{"cidr": "10.0.0.0/8", "except": ["10.1.0.0/16"]}, {"cidrGroupRef": "g"}]}),
            vec![
                Peer::Block(Block {
                    cidr: "10.0.0.0/8".parse().unwrap(),
                    except: vec!["10.1.0.0/16".parse().unwrap()],
                    outside: true,
                }),
                Peer::Place(Place::Group {
                    name: "g".into(),
                    except: vec![],
                }),
            ],
        ),
    ];
    for (rule, expected) in cases {
        assert_eq!(only("ingress", rule.clone()).0, expected, "{rule}");
    }
    // A policy of the cluster is about pods of all namespaces.
    let (all, _) = read_clusterwide(&policy(spec(json!({"ingress": [{"fromEndpoints": [{}]}]}))));
    assert_eq!(all[0].rules[0].peers, [Peer::Pods(Arc::default())]);
}

#[test]
fn ports_are_read() {
    let range = |protocol, first, last| Ports::Range {
        protocol,
        first,
        last,
    };
    let ports =
        |one: Value| json!({"toEntities": ["all"], "toPorts": [{"ports": [one], "rules": {}}]});
    let icmp = |one: Value| json!({"icmps": [{"fields": [one]}]});
    let cases: Vec<(Value, Vec<Ports>)> = vec![
        (
            json!({"toEntities": ["all"], "icmps": []}),
            vec![Ports::All],
        ),
        (
            ports(json!({"port": "80", "protocol": "TCP"})),
            vec![range(6, 80, 80)],
        ),
        (
            ports(json!({"port": "80", "endPort": 90, "protocol": "udp"})),
            vec![range(17, 80, 90)],
        ),
        (
            ports(json!({"port": "80", "endPort": 0})),
            [6, 17, 132].map(|one| range(one, 80, 80)).into(),
        ),
        (
            ports(json!({"port": "0", "protocol": "ANY"})),
            [6, 17, 132].map(Ports::Protocol).into(),
        ),
        (
            ports(json!({"port": "Web", "protocol": "SCTP"})),
            vec![Ports::Named {
                protocol: 132,
                name: "web".into(),
            }],
        ),
        (
            icmp(json!({"type": 8})),
            vec![Ports::Icmp {
                protocol: 1,
                kind: 8,
            }],
        ),
        (
            icmp(json!({"type": "EchoRequest", "family": "IPv6"})),
            vec![Ports::Icmp {
                protocol: 58,
                kind: 128,
            }],
        ),
        (
            icmp(json!({"type": "129", "family": "IPv6"})),
            vec![Ports::Icmp {
                protocol: 58,
                kind: 129,
            }],
        ),
    ];
    for (rule, expected) in cases {
        assert_eq!(only("egress", rule.clone()).1, expected, "{rule}");
    }
}

#[test]
fn what_is_wrong_is_told_and_allows_nothing() {
    let to = |one: Value| json!({"toEndpoints": [{"matchLabels": one}]});
    let ports = |one: Value| json!({"toPorts": [{"ports": [one]}]});
    let carried =
        |field: &str, value: Value| json!({"toPorts": [{"ports": [{"port": "80"}], field: value}]});
    let bad: Vec<(Value, &str)> = vec![
        (json!(1), ": is no rule"),
        (
            json!({"toFQDNs": [{}]}),
            ".toFQDNs[0]: has neither matchName nor matchPattern",
        ),
        (
            json!({"toServices": [{}]}),
            ".toServices[0]: has neither k8sService nor",
        ),
        (
            json!({"toNodes": [{}]}),
            ".toNodes: single nodes can't be told apart; use toEntities",
        ),
        (
            json!({"toGroups": [{}]}),
            ".toGroups: groups of providers can't be enforced; use toCIDRSet",
        ),
        (
            json!({"toRequires": [{}]}),
            ".toRequires: can't be enforced; use toEndpoints",
        ),
        (
            json!({"authentication": {"mode": "required"}}),
            ".authentication: can't be enforced; leave it out",
        ),
        (
            json!({"fromEntities": ["all"]}),
            ".fromEntities: is not known here; leave it out",
        ),
        (
            json!({"toEntities": {}}),
            ".toEntities is no list; make it one",
        ),
        (
            json!({"toEntities": ["moon"]}),
            ".toEntities[0]: \"moon\" is no entity; use all",
        ),
        (
            json!({"toEntities": ["all"], "toCIDR": ["::/0"]}),
            ": toEntities and toCIDR can't be in one rule; make two",
        ),
        (
            json!({"toCIDR": ["ten"]}),
            ".toCIDR[0]: \"ten\" is no address block",
        ),
        (
            json!({"toCIDRSet": [{}]}),
            ".toCIDRSet[0]: has not one of cidr and cidrGroupRef",
        ),
        (
            json!({"toCIDRSet": [{"cidr": "::/0", "cidrGroupRef": "g"}]}),
            ".toCIDRSet[0]: has not one of",
        ),
        (
            json!({"toCIDRSet": [{"cidr": "10.0.0.0/8", "except": ["11.0.0.0/9"]}]}),
            "except 11.0.0.0/9 is no part of 10.0.0.0/8",
        ),
        (
            json!({"toCIDRSet": [{"cidrGroupSelector": {}}]}),
            "cidrGroupSelector: groups can't be found by labels; use cidrGroupRef",
        ),
        (json!({"toCIDRSet": [{"asn": 1}]}), "asn is not known"),
        (
            json!({"toEndpoints": [1]}),
            ".toEndpoints[0]: there is no selector",
        ),
        (
            to(json!({"container:a": "b"})),
            "\"container\" is no source of labels",
        ),
        (
            to(json!({"reserved:moon": ""})),
            "reserved:moon is not known in selectors; use",
        ),
        (
            to(json!({"io.cilium.k8s.policy.cluster": "a"})),
            "there is one cluster only",
        ),
        (
            json!({"toPorts": [{"ports": [{"port": "80"}]}], "icmps": [{"fields": [{"type": 8}]}]}),
            ": toPorts and icmps can't be in one rule",
        ),
        (
            json!({"toPorts": [{}]}),
            ".toPorts[0].ports: there are none; name some",
        ),
        (
            carried("rules", json!({"http": [{}]})),
            ".toPorts[0].rules.http: what connections carry can't be enforced; leave it out",
        ),
        (
            carried("rules", json!({"kafka": []})),
            ".toPorts[0].rules.kafka: ",
        ),
        (
            carried("rules", json!({"dns": [{"matchPattern": "*"}]})),
            ".toPorts[0].rules.dns: ",
        ),
        (
            carried("serverNames", json!(["a.b"])),
            ".toPorts[0].serverNames: ",
        ),
        (
            carried("terminatingTLS", json!({})),
            ".toPorts[0].terminatingTLS: ",
        ),
        (
            carried("originatingTLS", json!({})),
            ".toPorts[0].originatingTLS: ",
        ),
        (carried("listener", json!({})), ".toPorts[0].listener: "),
        (
            carried("moon", json!({})),
            ".toPorts[0].moon: is not known here",
        ),
        (ports(json!({"port": 80})), "port 80 is neither a number"),
        (ports(json!({"port": "080"})), "port \"080\" is neither"),
        (ports(json!({"port": "70000"})), "port \"70000\" is neither"),
        (ports(json!({"port": "a_b"})), "port \"a_b\" is neither"),
        (
            ports(json!({"port": "web", "endPort": 9})),
            "endPort needs a port that is a number",
        ),
        (
            ports(json!({"port": "9", "endPort": 8})),
            "endPort 8 is not between port 9 and",
        ),
        (
            ports(json!({"port": "9", "protocol": "GRE"})),
            "protocol \"GRE\" is not known; use TCP",
        ),
        (
            ports(json!({"port": "9", "protocol": "ICMP"})),
            "protocol \"ICMP\" has no ports; use icmps",
        ),
        (
            ports(json!({"port": "9", "name": "x"})),
            "name is not known",
        ),
        (json!({"icmps": [{}]}), ".icmps[0].fields: there are none"),
        (
            json!({"icmps": [{"fields": [{"type": 256}]}]}),
            ".icmps[0].fields[0]: type 256 is not known; use a number",
        ),
        (
            json!({"icmps": [{"fields": [{"type": 1, "family": "IPX"}]}]}),
            "family \"IPX\" is not known; use IPv4 or IPv6",
        ),
    ];
    for (rule, words) in bad {
        let allow = policy(spec(json!({"egress": [{}, rule]})));
        let (all, errors) = read(&allow);
        assert_eq!((all[0].rules.len(), errors.len()), (1, 1), "{words}");
        assert_eq!(all[0].isolates, [false, true]);
        assert!(errors[0].starts_with("spec.egress[1]"), "{errors:?}");
        assert!(errors[0].contains(words), "{errors:?}");
        assert!(errors[0].ends_with("lets nothing through"), "{errors:?}");
        let deny = policy(spec(json!({"egressDeny": [rule]})));
        let (all, errors) = read(&deny);
        assert_eq!(
            all[0].rules,
            [Rule::deny_all(Direction::Egress, "egressDeny", 0)]
        );
        assert!(errors[0].contains("denies everything"), "{errors:?}");
    }
}

#[test]
fn where_it_is_not_known_for_whom_everybody_is_isolated() {
    for (field, value, words) in [
        (
            "endpointSelector",
            Value::Null,
            "spec.endpointSelector: there is no selector",
        ),
        (
            "endpointSelector",
            json!({"matchLabels": {"io.kubernetes.pod.namespace": "other"}}),
            "its own namespace alone; leave",
        ),
        (
            "nodeSelector",
            json!({}),
            "spec.nodeSelector: can't be together",
        ),
        ("order", json!(1), "spec.order: is not known; leave it out"),
    ] {
        let mut object = policy(spec(json!({"ingress": [{}], "ingressDeny": [{}]})));
        object["spec"][field] = value;
        let (all, errors) = read(&object);
        assert!(errors[0].contains(words), "{errors:?}");
        assert_eq!(all[0].subject.requirements().len(), 1);
        assert_eq!(all[0].subject.namespace(), Some("shop"));
        assert_eq!(all[0].isolates, [true, false]);
        let left: Vec<_> = all[0].rules.iter().map(|rule| rule.list).collect();
        assert_eq!(left, ["ingressDeny"]);
    }
}

#[test]
fn what_has_another_form_is_told() {
    for (object, policies, words) in [
        (json!({}), 0, "neither spec nor specs"),
        (
            json!({"specs": {}}),
            1,
            "specs is no list; make it one; all is denied",
        ),
        (
            json!({"spec": 1}),
            1,
            "spec: is no object; write one; all is denied",
        ),
        (json!({"specs": [1]}), 1, "specs[0]: is no object"),
        (
            json!({"spec": {"nodeSelector": {}, "ingress": [{}]}}),
            0,
            "spec.nodeSelector: only a CiliumClusterwideNetworkPolicy can be for nodes",
        ),
        (
            json!({"spec": {"endpointSelector": {}, "ingressDeny": 1}}),
            1,
            "spec.ingressDeny is no list; make it one; all is denied",
        ),
        (
            json!({"spec": {"endpointSelector": {}, "ingress": [{}], "enableDefaultDeny": {"ingress": 1}}}),
            1,
            "spec.enableDefaultDeny.ingress: 1 is neither true nor false",
        ),
    ] {
        let (all, errors) = read(&object);
        assert_eq!(all.len(), policies);
        assert!(errors[0].contains(words), "{errors:?}");
        assert!(all.iter().all(|one| one.isolates[0]));
    }
    // Pods are never what reserved labels are for.
    let init = json!({"spec": {"endpointSelector": {"matchLabels": {"reserved:init": ""}}, "ingress": [{}]}});
    assert_eq!(read_clusterwide(&init), (vec![], vec![]));
}
