//! Whom a policy is for, all or nothing as rules, a namespace by the label that the API gives it, and one long example.

use serde_json::json;
use xebec_policy_oracle::Protocol;

use super::NAMESPACES;
use super::case::{Action, Case, Expected, Group, Step, again, labels, name, step};
use super::policy::{
    DIRECTIONS, Policy, Rule, all, base, base_with_peers, namespaces as in_namespaces, one_of, pod,
    port, with,
};

/// The base policy in each namespace, and for other pods.
pub fn targets() -> Vec<Case> {
    let mut cases = Vec::new();
    for namespace in NAMESPACES {
        let mut policy = base();
        policy.namespace = namespace.to_owned();
        let what = format!("in {namespace}");
        cases.push(Case::new(Group::Targets, what, vec![step([policy])]));
    }
    for (what, selector) in [
        ("all pods", all()),
        ("one pod by its label", pod("a")),
        ("two pods by an expression", one_of("pod", &["a", "b"])),
    ] {
        let mut policy = base();
        policy.pods = selector;
        cases.push(Case::new(Group::Targets, what, vec![step([policy])]));
    }
    cases
}

/// The base policy with no rule, or one that allows everything, in one direction.
pub fn rules() -> Vec<Case> {
    let mut cases = Vec::new();
    for (ingress, direction) in DIRECTIONS {
        for (what, rules) in [("nothing", vec![]), ("everything", vec![Rule::any()])] {
            let mut policy = base();
            match ingress {
                true => policy.ingress = Some(rules),
                false => policy.egress = Some(rules),
            }
            let what = format!("{what} {direction}");
            cases.push(Case::new(Group::Rules, what, vec![step([policy])]));
        }
    }
    cases
}

/// A namespace by the label with its name.
pub fn namespaces() -> Vec<Case> {
    let one = |(ingress, direction): (bool, &str)| {
        let peer = in_namespaces(with("kubernetes.io/metadata.name", "z"));
        let policy = base_with_peers(ingress, vec![peer]);
        let what = format!("by its own label, {direction}");
        Case::new(Group::Namespaces, what, vec![step([policy])])
    };
    DIRECTIONS.map(one).into()
}

/// A namespace and a pod come and go while one named port is open.
pub fn example() -> Vec<Case> {
    let policy = Policy::new("x", "port-81", json!({"matchLabels": {}}))
        .ingress([Rule::ports([port("serve-81-tcp")])]);
    let (by_number, by_name) = (again(), again());
    let at_81 = |step: Step| Step {
        expected: Expected::Judged(Some((Protocol::Tcp, 81))),
        ..step
    };
    let steps = vec![
        step([policy]),
        step([
            Action::CreateNamespace("w".to_owned(), labels(&[("ns", "w")])),
            Action::CreatePod(name("w", "a"), labels(&[("pod", "a")])),
        ]),
        step([Action::DeletePod(name("w", "a"))]),
        step([Action::DeleteNamespace("w".to_owned())]),
        again(),
        at_81(by_number),
        at_81(by_name),
    ];
    let what = "one named port, while a namespace comes and goes";
    vec![Case::new(Group::Example, what, steps)]
}
