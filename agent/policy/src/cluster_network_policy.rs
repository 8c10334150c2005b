//! `policy.networking.k8s.io/v1alpha2 ClusterNetworkPolicy`.

use serde::Deserialize;
use serde_json::Value;
use xebec_dataplane_common::{SCTP, TCP, UDP};

use crate::admin::{self, Form, named, only_of, priority};
use crate::object::{parse, range};
use crate::rule::{Action, Policy, Ports, Source, Tier};

const FORM: Form = Form {
    source: Source::ClusterNetworkPolicy,
    actions: &[
        ("Accept", Action::Allow),
        ("Deny", Action::Deny),
        ("Pass", Action::Pass),
    ],
    ports: "protocols",
    port,
};

/// Reads a ClusterNetworkPolicy. What can't be understood is an error, and lets nothing through meanwhile.
pub fn read(policy: &Value) -> (Vec<Policy>, Vec<String>) {
    let spec = &policy["spec"];
    let tier = match spec["tier"].as_str() {
        Some("Admin") => Ok(Tier::Admin),
        Some("Baseline") => Ok(Tier::Baseline),
        _ => Err(format!(
            "spec.tier: {} is no tier; use Admin or Baseline",
            spec["tier"]
        )),
    };
    let turn = tier.and_then(|tier| Ok((tier, priority(spec)?)));
    admin::read(policy, &FORM, turn)
}

/// A port of the destination.
#[derive(Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct Transport {
    destination_port: Port,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
enum Port {
    Number(i64),
    Range(Range),
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Range {
    start: i64,
    end: i64,
}

fn port(value: &Value) -> Result<Vec<Ports>, String> {
    let field = only_of(value, &["tcp", "udp", "sctp", "destinationNamedPort"])?;
    let of = |error| format!("{field}: {error}");
    let protocol = match field {
        "tcp" => TCP,
        "udp" => UDP,
        "sctp" => SCTP,
        _ => return named(&value[field]).map_err(of),
    };
    let transport: Transport = parse(&value[field]).map_err(of)?;
    let (first, last) = match transport.destination_port {
        Port::Number(number) => range(number, number),
        Port::Range(all) => range(all.start, all.end),
    }
    .map_err(of)?;
    Ok(vec![Ports::Range {
        protocol,
        first,
        last,
    }])
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rule::Peer;
    use serde_json::json;

    fn rule(more: Value) -> Value {
        let mut rule = json!({"action": "Accept", "to": [{"namespaces": {}}]});
        for (field, value) in more.as_object().unwrap() {
            rule[field] = value.clone();
        }
        rule
    }

    fn policy(tier: &str, egress: Value) -> Value {
        json!({"metadata": {"name": "p"}, "spec": {
            "tier": tier, "priority": 7, "subject": {"namespaces": {}}, "egress": egress,
        }})
    }

    #[test]
    fn one_is_read() {
        let (all, errors) = read(&policy(
            "Baseline",
            json!([
                rule(json!({"protocols": [
                    {"tcp": {"destinationPort": {"number": 80}}},
                    {"udp": {"destinationPort": {"range": {"start": 5, "end": 9}}}},
                    {"destinationNamedPort": "web"},
                ]})),
                rule(json!({"action": "Pass"})),
                rule(
                    json!({"action": "Deny", "to": [{"nodes": {}}, {"networks": ["10.0.0.0/8", "::/0"]}]})
                ),
            ]),
        ));
        assert_eq!(errors, Vec::<String>::new());
        let policy = &all[0];
        assert_eq!(
            (policy.tier, policy.priority, policy.isolates),
            (Tier::Baseline, 7, [false, false])
        );
        let actions: Vec<_> = policy.rules.iter().map(|rule| rule.action).collect();
        assert_eq!(actions, [Action::Allow, Action::Pass, Action::Deny]);
        assert_eq!(policy.rules[0].ports.len(), 5);
        assert_eq!(policy.rules[1].ports, [Ports::All]);
        assert_eq!(policy.rules[2].peers.len(), 3);
    }

    #[test]
    fn what_is_wrong_is_told_and_allows_nothing() {
        let bad = [
            (json!({"to": []}), ".to: there is no peer; name one"),
            (json!({"to": [{}]}), ".to[0]: nothing that is known"),
            (json!({"to": 1}), ".to is no list"),
            (
                json!({"to": [{"nodes": {}, "pods": {}}]}),
                ".to[0]: nodes and pods can't be together",
            ),
            (json!({"to": [{"asn": 1}]}), ".to[0]: asn is not known here"),
            (
                json!({"to": [{"networks": []}]}),
                "networks: the list is empty",
            ),
            (
                json!({"to": [{"networks": ["10.0.0.0"]}]}),
                "\"10.0.0.0\" is no address block",
            ),
            (
                json!({"to": [{"domainNames": ["a.*.b"]}]}),
                "domainNames: \"a.*.b\" is no name of a domain",
            ),
            (
                json!({"to": [{"domainNames": []}]}),
                "domainNames: the list is empty",
            ),
            (
                json!({"to": [{"pods": {"podSelector": {}}}]}),
                "pods.namespaceSelector: there is no selector",
            ),
            (
                json!({"to": [{"pods": {"namespaceSelector": {}, "podSelector": {"matchExpressions": [{"key": "a", "operator": "Gt"}]}}}]}),
                "\"Gt\" is no operator",
            ),
            (
                json!({"to": [{"namespaces": {"matchFields": {}}}]}),
                "namespaces: matchFields is not known",
            ),
            (json!({"protocols": []}), ".protocols: the list is empty"),
            (json!({"protocols": [{}]}), ".protocols[0]: nothing that"),
            (
                json!({"protocols": [{"icmp": {}}]}),
                ".protocols[0]: icmp is not known here; use tcp or",
            ),
            (
                json!({"protocols": [{"tcp": {}}]}),
                "missing field `destinationPort`",
            ),
            (
                json!({"protocols": [{"tcp": {"destinationPort": {"number": 70000}}}]}),
                "tcp: port 70000 is not between 1 and 65535",
            ),
            (
                json!({"protocols": [{"tcp": {"destinationPort": {"range": {"start": 9, "end": 8}}}}]}),
                "ends with 8, before it begins with 9",
            ),
            (
                json!({"to": [{"nodes": {}}], "protocols": [{"destinationNamedPort": "web"}]}),
                "only pods name their ports",
            ),
            (json!({"ports": []}), ".ports: is not known here"),
        ];
        for (more, words) in bad {
            let (all, errors) = read(&policy(
                "Admin",
                json!([rule(json!({})), rule(more.clone())]),
            ));
            assert_eq!((all[0].rules.len(), errors.len()), (1, 1), "{words}");
            assert!(errors[0].starts_with("spec.egress[1]."), "{errors:?}");
            assert!(errors[0].contains(words), "{errors:?}");
            assert!(errors[0].ends_with("lets nothing through"), "{errors:?}");
            // What should have denied or passed on denies everything.
            for action in ["Deny", "Pass", "Allow"] {
                let mut more = more.clone();
                more["action"] = action.into();
                let (all, errors) = read(&policy("Admin", json!([rule(more)])));
                let rule = &all[0].rules[0];
                assert_eq!(rule.action, Action::Deny);
                assert_eq!(
                    (&rule.peers[..], &rule.ports[..]),
                    (&[Peer::Anybody][..], &[Ports::All][..])
                );
                assert!(errors[0].contains("denies everything"), "{errors:?}");
            }
        }
    }

    #[test]
    fn senders_are_pods() {
        let mut object = policy("Admin", json!([]));
        object["spec"]["ingress"] = json!([{"action": "Accept", "from": [{"networks": ["::/0"]}]}]);
        let (all, errors) = read(&object);
        assert_eq!(all[0].rules.len(), 0);
        assert_eq!(
            errors,
            [
                "spec.ingress[0].from[0]: networks is not known here; use namespaces or pods; the rule lets nothing through"
            ]
        );
    }

    #[test]
    fn where_it_is_not_known_for_whom_or_when_nothing_is_allowed() {
        let rules = json!([
            rule(json!({})),
            rule(json!({"action": "Deny"})),
            rule(json!({"action": "Pass"})),
        ]);
        for (field, value, words) in [
            ("tier", json!("Middle"), "spec.tier: \"Middle\" is no tier"),
            ("tier", Value::Null, "spec.tier: null is no tier"),
            (
                "priority",
                json!(1001),
                "spec.priority: 1001 is no priority",
            ),
            ("subject", json!({}), "spec.subject: nothing that is known"),
            ("order", json!(1), "spec.order: is not known; leave it out"),
            (
                "subject",
                json!({"namespaces": {"matchLabels": 1}}),
                "spec.subject: namespaces: ",
            ),
        ] {
            let mut object = policy("Baseline", rules.clone());
            object["spec"][field] = value;
            let (all, errors) = read(&object);
            assert!(errors[0].starts_with(words), "{errors:?}");
            assert!(errors[0].contains("which are left out"), "{errors:?}");
            let left = all[0].rules.iter();
            let left: Vec<_> = left.map(|rule| (rule.index, rule.action)).collect();
            assert_eq!(left, [(1, Action::Deny), (2, Action::Deny)]);
            assert!(all[0].subject.requirements().is_empty());
        }
        let (all, errors) = read(&json!({"metadata": {"name": "p"}}));
        assert_eq!(all[0].rules.len(), 2);
        assert!(errors[2].starts_with("spec: is no object"), "{errors:?}");
        let mut object = policy("Admin", json!([]));
        object["spec"]["egress"] = json!({});
        let (all, errors) = read(&object);
        assert_eq!(all[0].rules[0].action, Action::Deny);
        assert!(
            errors[0].starts_with("spec.egress is no list"),
            "{errors:?}"
        );
    }
}
