//! Selectors of Cilium: labels have sources, and namespaces are labels of their pods.

use std::collections::BTreeSet;
use std::sync::Arc;

use serde_json::Value;
use xebec_dataplane_common::policy::{
    IDENTITY_HOST, IDENTITY_REMOTE_NODE, IDENTITY_UNMANAGED, IDENTITY_WORLD,
};

use crate::object::selector;
use crate::rule::Peer;
use crate::selector::{Key, Selector, Test};

const NAMESPACE: &str = "io.kubernetes.pod.namespace";
const NAMESPACE_LABELS: &str = "io.cilium.k8s.namespace.labels.";
const SERVICE_ACCOUNT: &str = "io.cilium.k8s.policy.serviceaccount";
const CLUSTER: &str = "io.cilium.k8s.policy.cluster";

/// Whom reserved labels are for, who is no pod.
const RESERVED: [(&str, u32); 4] = [
    ("host", IDENTITY_HOST),
    ("remote-node", IDENTITY_REMOTE_NODE),
    ("world", IDENTITY_WORLD),
    ("unmanaged", IDENTITY_UNMANAGED),
];
/// Reserved labels that nobody has here.
const NOBODY: [&str; 4] = ["health", "ingress", "init", "none"];

/// Where a label is from.
#[derive(Clone, Copy, PartialEq)]
enum Source {
    Any,
    Kubernetes,
    Reserved,
}

/// What is asked of one label.
struct Asked {
    source: Source,
    key: String,
    test: Test,
}

fn read(value: &Value) -> Result<Vec<Asked>, String> {
    let all = selector(value, |key| Key::Label(key.to_owned()))?;
    let all = all.into_iter().filter_map(|(key, test)| match key {
        Key::Label(key) => Some((key, test)),
        _ => None,
    });
    all.map(|(raw, test)| {
        let (source, key) = match raw.split_once(':') {
            None => (Source::Any, raw.as_str()),
            Some(("any", key)) => (Source::Any, key),
            Some(("k8s", key)) => (Source::Kubernetes, key),
            Some(("reserved", key)) => (Source::Reserved, key),
            Some((other, _)) => {
                return Err(format!(
                    "{other:?} is no source of labels that is known here; use k8s, any or reserved"
                ));
            }
        };
        let known = NOBODY.contains(&key) || RESERVED.iter().any(|(name, _)| *name == key);
        if source == Source::Reserved && !known {
            return Err(format!(
                "{raw} is not known in selectors; use fromEntities or toEntities"
            ));
        }
        if source != Source::Reserved && key == CLUSTER {
            return Err(format!("{raw}: there is one cluster only; leave it out"));
        }
        Ok(Asked {
            source,
            key: key.to_owned(),
            test,
        })
    })
    .collect()
}

impl Asked {
    fn is_namespace(&self) -> bool {
        self.source != Source::Reserved && self.key == NAMESPACE
    }

    fn is_namespace_label(&self) -> bool {
        self.source != Source::Reserved && self.key.starts_with(NAMESPACE_LABELS)
    }

    /// Whether what is no pod and has this reserved label passes.
    fn passes_reserved(&self, name: &str) -> bool {
        let has = self.source != Source::Kubernetes && self.key == name;
        self.test.passes(has.then_some(""))
    }

    /// What is asked of pods; none where none passes.
    fn of_pods(&self) -> Option<Option<(Key, Test)>> {
        let key = match self.key.as_str() {
            _ if self.source == Source::Reserved => {
                return self.test.passes(None).then_some(None);
            }
            NAMESPACE => Key::Namespace,
            SERVICE_ACCOUNT => Key::ServiceAccount,
            key => match key.strip_prefix(NAMESPACE_LABELS) {
                Some(label) => Key::NamespaceLabel(label.to_owned()),
                None => Key::Label(key.to_owned()),
            },
        };
        Some(Some((key, self.test.clone())))
    }
}

fn own(namespace: &str) -> (Key, Test) {
    let names = BTreeSet::from([namespace.to_owned()]);
    (Key::Namespace, Test::In(names))
}

fn pods(asked: &[Asked]) -> Option<BTreeSet<(Key, Test)>> {
    let all: Option<Vec<_>> = asked.iter().map(Asked::of_pods).collect();
    all.map(|all| all.into_iter().flatten().collect())
}

/// All pods that a policy of a namespace, or of the cluster, may be for.
pub(super) fn all(namespace: &str) -> Selector {
    let own = (!namespace.is_empty()).then(|| own(namespace));
    own.into_iter().collect()
}

/// A selector of what is no pod, whose labels have no source but Kubernetes.
pub(super) fn of_others(value: &Value) -> Result<Selector, String> {
    let asked = read(value)?;
    let all = asked.into_iter().map(|one| match one.source {
        Source::Reserved => Err(format!(
            "{}: reserved labels are not of others than pods; leave it out",
            one.key
        )),
        _ => Ok((Key::Label(one.key), one.test)),
    });
    all.collect()
}

/// The pods that a policy is for; none where it can be for none.
pub(super) fn subject(value: &Value, namespace: &str) -> Result<Option<Selector>, String> {
    let asked = read(value)?;
    if !namespace.is_empty() {
        let mut others = asked.iter().filter(|one| one.is_namespace());
        if others.any(|one| !one.test.passes(Some(namespace))) {
            return Err(format!(
                "it can be for pods of its own namespace alone; leave {NAMESPACE} out, or use a CiliumClusterwideNetworkPolicy"
            ));
        }
    }
    let pods = pods(&asked).map(|mut pods| {
        pods.extend(all(namespace).requirements().iter().cloned());
        Selector::from_iter(pods)
    });
    Ok(pods)
}

/// Whom a selector of peers selects. Where it does not say of which namespaces, it is of pods: of the policy's namespace,
/// or of all if the policy is the cluster's.
pub(super) fn peers(value: &Value, namespace: &str) -> Result<Vec<Peer>, String> {
    let asked = read(value)?;
    let anywhere = asked
        .iter()
        .any(|one| one.source == Source::Reserved || one.is_namespace());
    let labels = asked.iter().any(Asked::is_namespace_label);
    let anywhere = anywhere || labels && !namespace.is_empty();
    let mut found = Vec::new();
    if let Some(mut pods) = pods(&asked) {
        if !anywhere {
            pods.extend(all(namespace).requirements().iter().cloned());
        }
        found.push(Peer::Pods(Arc::new(Selector::from_iter(pods))));
    }
    if anywhere {
        let passes = |name| asked.iter().all(|one| one.passes_reserved(name));
        let others = RESERVED.iter().filter(|(name, _)| passes(name));
        found.extend(others.map(|(_, identity)| Peer::Identity(*identity)));
    }
    Ok(found)
}
