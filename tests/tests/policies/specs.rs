//! What Kubernetes' own suite asks of NetworkPolicies, each with who reaches whom as a person reads it. Nothing here
//! comes from the evaluator, which is checked by it.

use xebec_policy_oracle::Protocol::{self, Sctp, Tcp, Udp};

use super::Facts;
use super::case::{Action, Case, Expected, Group, Step, labels, name};
use super::policy::{
    Policy, Rule, all, around, block, namespaces, none_of, one_of, pod, pods, pods_of, port,
    port_of, protocol, wide, with,
};

/// A port, and who does not reach whom at it.
type At = (Protocol, u16, &'static [&'static str]);

/// Only y reaches `x/a`.
const ONLY_Y: &[&str] = &["no x>x/a", "no z>x/a"];
/// Nobody reaches `x/a`.
const NOT_XA: &[&str] = &["no *>x/a"];
/// Nobody reaches x.
const NOT_X: &[&str] = &["no *>x"];
/// Only `x/b` reaches `x/a`.
const ONLY_XB: &[&str] = &["no *>x/a", "yes x/b>x/a"];
/// Only `y/a` reaches `x/a`.
const ONLY_YA: &[&str] = &["no *>x/a", "yes y/a>x/a"];
/// x reaches nobody.
const X_NOT: &[&str] = &["no x>*"];
/// Everybody reaches everybody.
const ALL: &[&str] = &[];

fn step(actions: impl IntoIterator<Item = impl Into<Action>>, stated: &[At]) -> Step {
    Step {
        actions: actions.into_iter().map(Into::into).collect(),
        expected: Expected::Stated(stated.to_vec()),
    }
}

/// A case of one step with one policy.
fn one(what: &str, policy: Policy, stated: &[At]) -> Case {
    several(what, vec![step([policy], stated)])
}

fn several(what: &str, steps: Vec<Step>) -> Case {
    Case::new(Group::Specs, what, steps)
}

/// A policy for all pods of x, and one for `x/a`.
fn for_x(name: &str) -> Policy {
    Policy::new("x", name, all())
}

fn for_a(name: &str) -> Policy {
    Policy::new("x", name, pod("a"))
}

/// A namespace by the label that the API gives it.
fn called(namespace: &str) -> serde_json::Value {
    with("kubernetes.io/metadata.name", namespace)
}

/// All but a namespace.
fn all_but(namespace: &str) -> serde_json::Value {
    none_of("kubernetes.io/metadata.name", &[namespace])
}

fn from_y() -> Rule {
    Rule::peers([namespaces(called("y"))])
}

fn ya() -> Rule {
    Rule::peers([pods_of(called("y"), pod("a"))])
}

/// All of them.
pub fn cases(facts: &Facts) -> Vec<Case> {
    [
        isolation(),
        peers(),
        ports(),
        changes(),
        egress(),
        several_policies(),
        blocks(facts),
        protocols(),
    ]
    .concat()
}

fn isolation() -> Vec<Case> {
    vec![
        one(
            "nothing in",
            for_x("no-in").ingress([]),
            &[(Tcp, 80, NOT_X)],
        ),
        one(
            "nothing in or out",
            for_x("no-both").ingress([]).egress([]),
            &[(Tcp, 80, &["no *>x", "no x>*"])],
        ),
        several(
            "nothing into x but to one pod",
            vec![step(
                [
                    for_x("no-in").ingress([]),
                    for_a("but-a").ingress([Rule::peers([pods_of(all(), all())])]),
                ],
                &[(Tcp, 80, &["no *>x", "yes *>x/a"])],
            )],
        ),
        one(
            "everything in",
            for_x("all-in").ingress([Rule::any()]),
            &[(Tcp, 80, ALL), (Tcp, 81, ALL)],
        ),
        one(
            "nothing from other namespaces",
            for_x("own").ingress([Rule::peers([pods(all())])]),
            &[(Tcp, 80, &["no y>x", "no z>x"])],
        ),
    ]
}

fn peers() -> Vec<Case> {
    let b = || pods(pod("b"));
    let from =
        |peers: &[serde_json::Value]| for_a("from").ingress([Rule::peers(peers.iter().cloned())]);
    let b_and_c = one_of("pod", &["b", "c"]);
    vec![
        one(
            "pods of the same namespace",
            from(&[b()]),
            &[(Tcp, 80, ONLY_XB)],
        ),
        one(
            "all namespaces",
            from(&[namespaces(all())]),
            &[(Tcp, 80, ALL)],
        ),
        one(
            "another namespace",
            from(&[namespaces(called("y"))]),
            &[(Tcp, 80, ONLY_Y)],
        ),
        one(
            "pods by an expression",
            from(&[pods(one_of("pod", &["b"]))]),
            &[(Tcp, 80, ONLY_XB)],
        ),
        one(
            "namespaces by an expression",
            from(&[namespaces(one_of("kubernetes.io/metadata.name", &["y"]))]),
            &[(Tcp, 80, ONLY_Y)],
        ),
        one(
            "pods or namespaces",
            from(&[namespaces(all_but("x")), b()]),
            &[(Tcp, 80, &["no x/c>x/a"])],
        ),
        one(
            "pods of namespaces",
            from(&[pods_of(all_but("x"), pod("b"))]),
            &[(Tcp, 80, &["no *>x/a", "yes y/b>x/a", "yes z/b>x/a"])],
        ),
        one(
            "several pods of several namespaces",
            from(&[pods_of(all_but("x"), b_and_c)]),
            &[(Tcp, 80, &["no x>x/a", "no y/a>x/a", "no z/a>x/a"])],
        ),
        one(
            "any of several pods",
            from(&[b(), pods(pod("c"))]),
            &[(Tcp, 80, &["no *>x/a", "yes x>x/a"])],
        ),
        one(
            "one pod of another namespace",
            for_a("from").ingress([ya()]),
            &[(Tcp, 80, ONLY_YA)],
        ),
        one(
            "a namespace by its own label",
            for_a("own-label").ingress([from_y()]),
            &[(Tcp, 80, ONLY_Y)],
        ),
        one(
            "all but a namespace by its own label",
            for_a("own-label").egress([Rule::peers([namespaces(all_but("y"))])]),
            &[(Tcp, 80, &["no x/a>y"])],
        ),
    ]
}

fn ports() -> Vec<Case> {
    vec![
        one(
            "a namespace at a port",
            for_a("y-at-81").ingress([from_y().at([port_of("TCP", 81)])]),
            &[(Tcp, 81, ONLY_Y)],
        ),
        one(
            "a named port",
            for_x("at-81").ingress([Rule::ports([port("serve-81-tcp")])]),
            &[(Tcp, 81, ALL), (Tcp, 80, NOT_X)],
        ),
        one(
            "a namespace at a named port",
            for_a("y-at-80").ingress([from_y().at([port_of("TCP", "serve-80-tcp")])]),
            &[(Tcp, 80, ONLY_Y), (Tcp, 81, NOT_XA)],
        ),
        one(
            "a named port of others",
            for_x("to-80").egress([Rule::ports([port("serve-80-tcp")])]),
            &[(Tcp, 80, ALL), (Tcp, 81, X_NOT)],
        ),
        one(
            "all ports of a protocol",
            for_a("tcp").ingress([Rule::ports([protocol("TCP")])]),
            &[(Tcp, 80, ALL), (Udp, 80, NOT_XA)],
        ),
    ]
}

fn changes() -> Vec<Case> {
    let changes = |rules: Vec<Rule>| for_x("changes").ingress(rules);
    let updated = pods(serde_json::json!({"matchLabels": {"pod": "b", "pod2": "updated"}}));
    vec![
        several(
            "a policy changes",
            vec![
                step([changes(vec![Rule::any()])], &[(Tcp, 81, ALL)]),
                step(
                    [Action::Update(changes(vec![]).object())],
                    &[(Tcp, 81, NOT_X)],
                ),
            ],
        ),
        several(
            "a namespace gets the label",
            vec![
                step(
                    [for_a("new").ingress([Rule::peers([namespaces(with("ns2", "updated"))])])],
                    &[(Tcp, 80, NOT_XA)],
                ),
                step(
                    [Action::LabelNamespace(
                        "y".to_owned(),
                        labels(&[("ns", "y"), ("ns2", "updated")]),
                    )],
                    &[(Tcp, 80, ONLY_Y)],
                ),
            ],
        ),
        several(
            "a pod gets the label",
            vec![
                step(
                    [for_a("new").ingress([Rule::peers([updated])])],
                    &[(Tcp, 80, NOT_XA)],
                ),
                step(
                    [Action::LabelPod(
                        name("x", "b"),
                        labels(&[("pod", "b"), ("pod2", "updated")]),
                    )],
                    &[(Tcp, 80, ONLY_XB)],
                ),
            ],
        ),
        several(
            "a pod is isolated by its label",
            vec![
                step(
                    [Policy::new("x", "alone", with("target", "isolated")).ingress([])],
                    &[(Tcp, 80, ALL)],
                ),
                step(
                    [Action::LabelPod(
                        name("x", "a"),
                        labels(&[("pod", "a"), ("target", "isolated")]),
                    )],
                    &[(Tcp, 80, NOT_XA)],
                ),
            ],
        ),
        several(
            "a policy goes",
            vec![
                step(
                    [for_x("goes").ingress([]).egress([])],
                    &[(Tcp, 80, &["no x>*", "no *>x"])],
                ),
                step([Action::Delete(name("x", "goes"))], &[(Tcp, 80, ALL)]),
            ],
        ),
    ]
}

fn egress() -> Vec<Case> {
    vec![
        one(
            "one pod asks nobody",
            for_a("no-out").egress([]),
            &[(Tcp, 80, &["no x/a>*"])],
        ),
        one(
            "a namespace asks nobody",
            for_x("no-out").egress([]),
            &[(Tcp, 80, X_NOT)],
        ),
        one(
            "one pod of another namespace is asked",
            for_a("to-ya").egress([ya()]),
            &[(Tcp, 80, &["no x/a>*", "yes x/a>y/a"])],
        ),
        one(
            "both directions in one policy",
            for_a("both")
                .ingress([Rule::peers([pods(pod("b"))])])
                .egress([Rule::ports([port(80)])]),
            &[
                (Tcp, 80, ONLY_XB),
                (Tcp, 81, &["no *>x/a", "no x/a>*", "yes x/b>x/a"]),
            ],
        ),
    ]
}

fn several_policies() -> Vec<Case> {
    let y_at = |number: u16| {
        for_a(&format!("y-at-{number}")).ingress([from_y().at([port_of("TCP", number)])])
    };
    let at_80 = || [Rule::ports([port(80)])];
    let from_xa = |to: &str| {
        let xa = Rule::peers([pods_of(called("x"), pod("a"))]);
        Policy::new("y", &format!("from-xa-{to}"), pod(to)).ingress([xa])
    };
    vec![
        several(
            "one port, then another one too",
            vec![
                step([y_at(81)], &[(Tcp, 81, ONLY_Y), (Tcp, 80, NOT_XA)]),
                step([y_at(80)], &[(Tcp, 80, ONLY_Y)]),
            ],
        ),
        several(
            "one port in, then everything",
            vec![
                step([for_x("80").ingress(at_80())], &[(Tcp, 81, NOT_X)]),
                step([for_x("all").ingress([Rule::any()])], &[(Tcp, 81, ALL)]),
            ],
        ),
        several(
            "one port out, then everything",
            vec![
                step([for_x("80").egress(at_80())], &[(Tcp, 81, X_NOT)]),
                step([for_x("all").egress([Rule::any()])], &[(Tcp, 81, ALL)]),
            ],
        ),
        several(
            "the asked allow it, the asker does not",
            vec![step(
                [for_a("to-ya").egress([ya()]), from_xa("a"), from_xa("b")],
                &[(
                    Tcp,
                    80,
                    &["no x/a>*", "no *>y/a", "yes x/a>y/a", "no *>y/b"],
                )],
            )],
        ),
        several(
            "one direction apart from the other",
            vec![
                step([for_a("out").egress([Rule::any()])], &[(Tcp, 80, ALL)]),
                step([for_a("in").ingress([])], &[(Tcp, 80, NOT_XA)]),
            ],
        ),
    ]
}

fn blocks(facts: &Facts) -> Vec<Case> {
    let to = |peer: serde_json::Value| for_a("to").egress([Rule::peers([peer])]);
    let alone = |address| around(address, 0);
    let but_b = || to(block(&wide(facts.xb, 4), &[alone(facts.xb)]));
    let only_b = to(block(&alone(facts.xb), &[]));
    let not_b: &[At] = &[(Tcp, 80, &["no x/a>x/b"])];
    [
        one(
            "one address is asked",
            to(block(&alone(facts.yb), &[])),
            &[(Tcp, 80, &["no x/a>*", "yes x/a>y/b"])],
        ),
        one("a block without one address is asked", but_b(), not_b),
        several(
            "a block without one address, then that address",
            vec![
                step([but_b()], not_b),
                step(
                    [Action::Update(only_b.object())],
                    &[(Tcp, 80, &["no x/a>*", "yes x/a>x/b"])],
                ),
            ],
        ),
    ]
    .map(|case| case.of_family(facts.v4))
    .into()
}

fn protocols() -> Vec<Case> {
    let at = |protocol: &str, number: u16| {
        for_a("at").ingress([Rule::ports([port_of(protocol, number)])])
    };
    let mut cases = vec![
        several(
            "SCTP is not TCP",
            vec![step(
                [for_x("no-in").ingress([]), at("SCTP", 81)],
                &[(Tcp, 81, NOT_X)],
            )],
        ),
        one("SCTP isolates", at("SCTP", 80), &[(Tcp, 81, NOT_XA)]),
        one("UDP is not TCP", at("UDP", 81), &[(Tcp, 81, NOT_XA)]),
    ];
    for (protocol, word) in [(Udp, "UDP"), (Sctp, "SCTP")] {
        cases.extend([
            one(
                &format!("{word}: nothing in"),
                for_x("no-in").ingress([]),
                &[(protocol, 80, NOT_X)],
            ),
            one(
                &format!("{word}: a namespace at a port"),
                for_a("y-at-81").ingress([from_y().at([port_of(word, 81)])]),
                &[(protocol, 81, ONLY_Y)],
            ),
            one(
                &format!("{word}: one pod of another namespace"),
                for_a("from").ingress([ya()]),
                &[(protocol, 80, ONLY_YA)],
            ),
        ]);
    }
    cases
}
