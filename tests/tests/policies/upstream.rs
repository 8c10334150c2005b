//! Some of what Kubernetes' own suite has, at all ports and judged by the evaluator.

use serde_json::json;
use xebec_policy_oracle::Protocol;

use super::case::{Action, Case, Expected, Group, Step, again, labels, name, step};
use super::policy::{
    Policy, Rule, all, namespaces, none_of, one_of, pod, pods, pods_of, port, port_of, with,
};

/// Policies for all pods of x, and for `x/a`.
fn for_all(name: &str) -> Policy {
    Policy::new("x", name, json!({"matchLabels": {}}))
}

fn for_a(name: &str) -> Policy {
    Policy::new("x", name, pod("a"))
}

/// All of them.
pub fn cases() -> Vec<Case> {
    let named = |what: &str, steps: Vec<Step>| Case::new(Group::Upstream, what, steps);
    let y = || with("ns", "y");
    let names = || port_of("UDP", 53);
    let from_y_at = |number: u16| {
        for_a(&format!("from-y-at-{number}"))
            .ingress([Rule::peers([namespaces(y())]).at([port_of("TCP", number)])])
    };
    let from_xa = |to: &str| {
        let xa = pods_of(with("ns", "x"), pod("a"));
        Policy::new("y", &format!("to-{to}"), pod(to)).ingress([Rule::peers([xa])])
    };
    let not_x = pods_of(none_of("ns", &["x"]), one_of("pod", &["b", "c"]));
    let everything = for_all("changes").ingress([Rule::any()]);
    let nothing = for_all("changes").ingress([]);
    let labelled_b = json!({"matchLabels": {"pod": "b", "pod2": "updated"}});
    let at_81 = Step {
        expected: Expected::Judged(Some((Protocol::Tcp, 81))),
        ..step([for_all("named").ingress([Rule::ports([port("serve-81-tcp")])])])
    };
    vec![
        named(
            "nothing in",
            vec![step([Policy::new("x", "no-in", all()).ingress([])])],
        ),
        named(
            "nothing in, names alone out",
            vec![step([Policy::new("x", "no-both", all())
                .ingress([])
                .egress([Rule::ports([names(), port_of("TCP", 53)])])])],
        ),
        named(
            "b and c of other namespaces",
            vec![step([for_a("others").ingress([Rule::peers([not_x])])])],
        ),
        named(
            "one port, then another one too",
            vec![step([from_y_at(81)]), again(), step([from_y_at(80)])],
        ),
        named(
            "everything in",
            vec![step([for_all("all-in").ingress([Rule::any()])]), again()],
        ),
        named("one named port", vec![at_81, again()]),
        named(
            "everything, then nothing",
            vec![step([everything]), step([Action::Update(nothing.object())])],
        ),
        named(
            "a namespace gets the label",
            vec![
                step([for_a("new").ingress([Rule::peers([namespaces(with("ns2", "updated"))])])]),
                step([Action::LabelNamespace(
                    "y".to_owned(),
                    labels(&[("ns", "y"), ("ns2", "updated")]),
                )]),
            ],
        ),
        named(
            "a pod gets the label",
            vec![
                step([for_a("new").ingress([Rule::peers([pods(labelled_b)])])]),
                step([Action::LabelPod(
                    name("x", "b"),
                    labels(&[("pod", "b"), ("pod2", "updated")]),
                )]),
            ],
        ),
        named(
            "a pod is isolated by its label",
            vec![
                step([Policy::new("x", "alone", with("target", "isolated")).ingress([])]),
                step([Action::LabelPod(
                    name("x", "a"),
                    labels(&[("target", "isolated")]),
                )]),
            ],
        ),
        named(
            "in from b, out at 80 and for names",
            vec![
                step([for_a("both")
                    .ingress([Rule::peers([pods(pod("b"))])])
                    .egress([Rule::ports([port(80), names()])])]),
                again(),
            ],
        ),
        named(
            "one side allows, the other does not",
            vec![step([
                for_a("to-ya").egress([
                    Rule::peers([pods_of(y(), pod("a"))]),
                    Rule::ports([names()]),
                ]),
                from_xa("a"),
                from_xa("b"),
            ])],
        ),
        named(
            "nothing, until the policy goes",
            vec![
                step([Policy::new("x", "none", all()).ingress([]).egress([])]),
                step([Action::Delete(name("x", "none"))]),
            ],
        ),
    ]
}
