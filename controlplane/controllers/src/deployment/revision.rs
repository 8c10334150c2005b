//! The annotations by which revisions are counted, and sizes remembered, on ReplicaSets.

use std::collections::BTreeMap;
use std::sync::Arc;

use k8s_openapi::api::apps::v1::ReplicaSet;
use kube::ResourceExt;

use super::Rollout;
use super::rolling::Limits;

pub(super) const REVISION: &str = "deployment.kubernetes.io/revision";
/// Revisions that this ReplicaSet had before it was rolled back to, comma-separated.
const HISTORY: &str = "deployment.kubernetes.io/revision-history";
/// The Deployment's size when this ReplicaSet got its own.
const DESIRED: &str = "deployment.kubernetes.io/desired-replicas";
/// That with the surge.
const MOST: &str = "deployment.kubernetes.io/max-replicas";
/// What is the Deployment's alone, or a ReplicaSet's own.
const NOT_COPIED: &[&str] = &[
    "kubectl.kubernetes.io/last-applied-configuration",
    REVISION,
    HISTORY,
    DESIRED,
    MOST,
    "deprecated.deployment.rollback.to",
];

fn number<T: std::str::FromStr>(set: &ReplicaSet, name: &str) -> Option<T> {
    set.annotations().get(name)?.parse().ok()
}

/// The ReplicaSet's revision, 0 where it has none.
pub(super) fn of(set: &ReplicaSet) -> i64 {
    number(set, REVISION).unwrap_or(0)
}

/// The Deployment's size that this ReplicaSet knows of.
pub(super) fn desired(set: &ReplicaSet) -> Option<i32> {
    number(set, DESIRED)
}

/// The most pods that all ReplicaSets could have when this one got its size.
pub(super) fn most(set: &ReplicaSet) -> Option<i32> {
    number(set, MOST)
}

/// The revision after all old ones.
pub(super) fn next(old: &[Arc<ReplicaSet>]) -> i64 {
    old.iter().map(|set| of(set)).max().unwrap_or(0) + 1
}

/// The sizes as annotations.
pub(super) fn numbers(limits: &Limits) -> BTreeMap<String, String> {
    BTreeMap::from([
        (DESIRED.to_owned(), limits.desired.to_string()),
        (MOST.to_owned(), limits.most().to_string()),
    ])
}

/// All annotations that the current ReplicaSet should have. A rollback makes an old one the current
/// one again, under a new number.
pub(super) fn annotations(
    rollout: &Rollout,
    new: Option<&ReplicaSet>,
    number: i64,
) -> BTreeMap<String, String> {
    let mut annotations = new.map(|new| new.annotations().clone()).unwrap_or_default();
    for (name, value) in rollout.deployment.annotations() {
        if !NOT_COPIED.contains(&name.as_str()) {
            annotations.insert(name.clone(), value.clone());
        }
    }
    let before = new.map_or(0, of);
    if before < number {
        if before > 0 {
            let history = annotations.entry(HISTORY.into()).or_default();
            if !history.is_empty() {
                history.push(',');
            }
            history.push_str(&before.to_string());
        }
        annotations.insert(REVISION.into(), number.to_string());
    }
    if new.is_none() {
        annotations.extend(numbers(&rollout.limits));
    }
    annotations
}
