//! `policy.networking.k8s.io/v1alpha1` AdminNetworkPolicy and BaselineAdminNetworkPolicy.

use serde::Deserialize;
use serde_json::Value;

use crate::admin::{self, Form, named, only_of, priority};
use crate::network_policy::protocol;
use crate::object::{parse, range};
use crate::rule::{Action, Policy, Ports, Source, Tier};

const ADMIN: Form = Form {
    source: Source::AdminNetworkPolicy,
    actions: &[
        ("Allow", Action::Allow),
        ("Deny", Action::Deny),
        ("Pass", Action::Pass),
    ],
    ports: "ports",
    port,
};

const BASELINE: Form = Form {
    source: Source::BaselineAdminNetworkPolicy,
    actions: &[("Allow", Action::Allow), ("Deny", Action::Deny)],
    ports: "ports",
    port,
};

/// A BaselineAdminNetworkPolicy has no priority: it is asked after all that have one.
const LAST: i32 = 1001;

/// Reads an AdminNetworkPolicy. What can't be understood is an error, and lets nothing through meanwhile.
pub fn read(policy: &Value) -> (Vec<Policy>, Vec<String>) {
    let turn = priority(&policy["spec"]).map(|priority| (Tier::Admin, priority));
    admin::read(policy, &ADMIN, turn)
}

/// Reads a BaselineAdminNetworkPolicy, in the same way.
pub fn read_baseline(policy: &Value) -> (Vec<Policy>, Vec<String>) {
    admin::read(policy, &BASELINE, Ok((Tier::Baseline, LAST)))
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Number {
    protocol: Option<String>,
    port: i64,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Range {
    protocol: Option<String>,
    start: i64,
    end: i64,
}

fn port(value: &Value) -> Result<Vec<Ports>, String> {
    let field = only_of(value, &["portNumber", "portRange", "namedPort"])?;
    let read = || {
        let (over, (first, last)) = match field {
            "portNumber" => {
                let one: Number = parse(&value[field])?;
                (one.protocol, range(one.port, one.port)?)
            }
            "portRange" => {
                let all: Range = parse(&value[field])?;
                (all.protocol, range(all.start, all.end)?)
            }
            _ => return named(&value[field]),
        };
        Ok(vec![Ports::Range {
            protocol: protocol(over.as_deref())?,
            first,
            last,
        }])
    };
    read().map_err(|error: String| format!("{field}: {error}"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn policy(rule: Value) -> Value {
        json!({"metadata": {"name": "default"}, "spec": {
            "priority": 3, "subject": {"pods": {"namespaceSelector": {}, "podSelector": {}}}, "ingress": [rule],
        }})
    }

    #[test]
    fn both_kinds_are_read() {
        let rule = json!({"action": "Allow", "from": [{"namespaces": {}}], "ports": [
            {"portNumber": {"port": 80}},
            {"portRange": {"start": 5, "end": 9, "protocol": "SCTP"}},
            {"namedPort": "web"},
        ]});
        let (all, errors) = read(&policy(rule.clone()));
        assert_eq!(errors, Vec::<String>::new());
        assert_eq!((all[0].tier, all[0].priority), (Tier::Admin, 3));
        assert_eq!(
            all[0].rules[0].ports[..2],
            [
                Ports::Range {
                    protocol: 6,
                    first: 80,
                    last: 80
                },
                Ports::Range {
                    protocol: 132,
                    first: 5,
                    last: 9
                },
            ]
        );
        let (all, errors) = read_baseline(&policy(rule));
        assert_eq!(errors, Vec::<String>::new());
        assert_eq!((all[0].tier, all[0].priority), (Tier::Baseline, LAST));
    }

    #[test]
    fn what_is_wrong_is_told() {
        let ports =
            |port: Value| json!({"action": "Allow", "from": [{"namespaces": {}}], "ports": [port]});
        for (rule, words) in [
            (
                ports(json!({"portNumber": {"port": 0}})),
                ".ports[0]: portNumber: port 0 is not between",
            ),
            (
                ports(json!({"portNumber": {"port": 1, "protocol": "GRE"}})),
                "protocol \"GRE\" is not known; use TCP",
            ),
            (
                ports(json!({"portRange": {"start": 1}})),
                "portRange: missing field `end`",
            ),
            (
                ports(json!({"namedPort": ""})),
                "namedPort: \"\" is no name of a port",
            ),
            (
                json!({"action": "Accept", "from": [{"namespaces": {}}]}),
                ".action: \"Accept\" is not known; use Allow or Deny",
            ),
        ] {
            let (_, errors) = read(&policy(rule));
            assert_eq!(errors.len(), 1, "{errors:?}");
            assert!(errors[0].starts_with("spec.ingress[0]."), "{errors:?}");
            assert!(errors[0].contains(words), "{errors:?}");
        }
        // A baseline has nothing to pass on to.
        let pass = policy(json!({"action": "Pass", "from": [{"namespaces": {}}]}));
        assert_eq!(read(&pass).1.len(), 0);
        let (all, errors) = read_baseline(&pass);
        assert!(errors[0].contains("use Allow or Deny"), "{errors:?}");
        assert_eq!(all[0].rules[0].action, Action::Deny);
    }
}
