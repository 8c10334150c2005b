//! Policies, namespaces, pods and labels come, change and go.

use super::case::{Action, Case, Group, Step, labels, name, step};
use super::policy::{
    base, base_with_peers, base_with_ports, namespaces, one_of, pods_of, port_of, with,
};

/// All of them.
pub fn cases() -> Vec<Case> {
    let named = |what: &str, steps: Vec<Step>| Case::new(Group::Actions, what, steps);
    let at_81 = base_with_ports(true, vec![port_of("UDP", "serve-81-udp")]);
    let new_namespaces = base_with_peers(true, vec![namespaces(with("new-ns", "qrs"))]);
    let new_pods = pods_of(one_of("ns", &["y", "z"]), with("new-label", "abc"));
    let new_pods = base_with_peers(true, vec![new_pods]);
    let label_y =
        |pairs: &[(&str, &str)]| step([Action::LabelNamespace("y".to_owned(), labels(pairs))]);
    let label_yb = |pairs: &[(&str, &str)]| step([Action::LabelPod(name("y", "b"), labels(pairs))]);
    let pod = |namespace: &str, own: &str| {
        Action::CreatePod(name(namespace, own), labels(&[("pod", own)]))
    };
    let other = "y-2".to_owned();
    vec![
        named(
            "a policy comes and goes",
            vec![step([base()]), step([Action::Delete(name("x", "base"))])],
        ),
        named(
            "a policy changes",
            vec![step([base()]), step([Action::Update(at_81.object())])],
        ),
        named(
            "a namespace comes and goes",
            vec![
                step([base()]),
                step([
                    Action::CreateNamespace(other.clone(), labels(&[("ns", "y")])),
                    pod(&other, "a"),
                    pod(&other, "b"),
                ]),
                step([Action::DeleteNamespace(other.clone())]),
            ],
        ),
        named(
            "a namespace becomes a peer, and is none again",
            vec![
                step([new_namespaces]),
                label_y(&[("ns", "y"), ("new-ns", "qrs")]),
                label_y(&[("ns", "y")]),
            ],
        ),
        named(
            "a pod comes and goes",
            vec![
                step([base()]),
                step([pod("x", "d")]),
                step([Action::DeletePod(name("x", "d"))]),
            ],
        ),
        named(
            "a pod becomes a peer, and is none again",
            vec![
                step([new_pods]),
                label_yb(&[("pod", "b"), ("new-label", "abc")]),
                label_yb(&[("pod", "b")]),
            ],
        ),
    ]
}
