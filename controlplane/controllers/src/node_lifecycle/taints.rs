//! Taints: which a node should carry by its conditions, and how long a pod tolerates them.

use std::time::Duration;

use k8s_openapi::api::core::v1::{Node, NodeCondition, Taint, Toleration};
use k8s_openapi::jiff::{SignedDuration, Timestamp};

use crate::pods;

const NOT_READY: &str = "node.kubernetes.io/not-ready";
const UNREACHABLE: &str = "node.kubernetes.io/unreachable";
const UNSCHEDULABLE: &str = "node.kubernetes.io/unschedulable";
const NO_SCHEDULE: &str = "NoSchedule";
const NO_EXECUTE: &str = "NoExecute";

/// Condition, the status that taints, and the taint's key.
const BY_CONDITION: &[(&str, &str, &str)] = &[
    ("Ready", "False", NOT_READY),
    ("Ready", "Unknown", UNREACHABLE),
    (
        "MemoryPressure",
        "True",
        "node.kubernetes.io/memory-pressure",
    ),
    ("DiskPressure", "True", "node.kubernetes.io/disk-pressure"),
    ("PIDPressure", "True", "node.kubernetes.io/pid-pressure"),
    (
        "NetworkUnavailable",
        "True",
        "node.kubernetes.io/network-unavailable",
    ),
];

/// The node's condition of this type.
pub(super) fn condition<'a>(node: &'a Node, type_: &str) -> Option<&'a NodeCondition> {
    let conditions = node.status.as_ref()?.conditions.as_ref()?;
    conditions.iter().find(|condition| condition.type_ == type_)
}

fn taints(node: &Node) -> &[Taint] {
    let spec = node.spec.as_ref();
    spec.and_then(|spec| spec.taints.as_deref()).unwrap_or(&[])
}

/// The taints that pods have to leave for.
pub(super) fn no_execute(node: &Node) -> Vec<Taint> {
    taints(node)
        .iter()
        .filter(|taint| taint.effect == NO_EXECUTE)
        .cloned()
        .collect()
}

/// The taints that the node should carry, `None` where it carries them. Taints of others stay.
pub(super) fn wanted(node: &Node) -> Option<Vec<Taint>> {
    let holds = |type_: &str, status: &str| {
        condition(node, type_).is_some_and(|condition| condition.status == status)
    };
    let mut wanted: Vec<(&str, &str)> = Vec::new();
    for (type_, status, key) in BY_CONDITION {
        if holds(type_, status) {
            wanted.push((key, NO_SCHEDULE));
            if *type_ == "Ready" {
                wanted.push((key, NO_EXECUTE));
            }
        }
    }
    if node.spec.as_ref().and_then(|spec| spec.unschedulable) == Some(true) {
        wanted.push((UNSCHEDULABLE, NO_SCHEDULE));
    }
    // A node that never said whether it is ready keeps the taint that it registered with.
    let silent = condition(node, "Ready").is_none();
    let ours = |taint: &Taint| {
        let key = taint.key.as_str();
        let by_condition = BY_CONDITION
            .iter()
            .any(|(type_, _, ours)| *ours == key && !(silent && *type_ == "Ready"));
        match taint.effect.as_str() {
            NO_SCHEDULE => by_condition || key == UNSCHEDULABLE,
            NO_EXECUTE => (key == NOT_READY || key == UNREACHABLE) && !silent,
            _ => false,
        }
    };
    let is =
        |taint: &Taint, (key, effect): (&str, &str)| taint.key == key && taint.effect == effect;
    let have = taints(node);
    let mut result: Vec<Taint> = have
        .iter()
        .filter(|taint| !ours(taint) || wanted.iter().any(|wanted| is(taint, *wanted)))
        .cloned()
        .collect();
    for (key, effect) in wanted {
        if !result.iter().any(|taint| is(taint, (key, effect))) {
            result.push(Taint {
                key: key.into(),
                effect: effect.into(),
                time_added: Some(pods::now()),
                value: None,
            });
        }
    }
    (result != have).then_some(result)
}

/// How long a pod may stay on its node.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Stay {
    ForEver,
    /// This long from now; zero: its time is over.
    For(Duration),
}

/// How long a pod with these tolerations may stay under these NoExecute taints.
pub(super) fn stay(taints: &[Taint], tolerations: &[Toleration], now: Timestamp) -> Stay {
    let mut shortest: Option<Duration> = None;
    for taint in taints {
        let tolerating: Vec<_> = tolerations
            .iter()
            .filter(|toleration| tolerates(toleration, taint))
            .collect();
        if tolerating.is_empty() {
            return Stay::For(Duration::ZERO);
        }
        // Of several the shortest counts; one without a time tolerates for ever.
        let Some(seconds) = tolerating
            .iter()
            .filter_map(|toleration| toleration.toleration_seconds)
            .min()
        else {
            continue;
        };
        let since = taint.time_added.as_ref().map_or(now, |added| added.0);
        let left = SignedDuration::from_secs(seconds.max(0)) - now.duration_since(since);
        let left = Duration::try_from(left.max(SignedDuration::ZERO)).unwrap_or_default();
        shortest = Some(shortest.map_or(left, |shortest| shortest.min(left)));
    }
    shortest.map_or(Stay::ForEver, Stay::For)
}

/// Whether the toleration is for this taint (v1.Toleration.ToleratesTaint).
fn tolerates(toleration: &Toleration, taint: &Taint) -> bool {
    let text = |text: &Option<String>| text.clone().unwrap_or_default();
    let (effect, key) = (text(&toleration.effect), text(&toleration.key));
    if (!effect.is_empty() && effect != taint.effect) || (!key.is_empty() && key != taint.key) {
        return false;
    }
    match toleration.operator.as_deref() {
        Some("Exists") => true,
        None | Some("" | "Equal") => {
            !key.is_empty() && text(&toleration.value) == text(&taint.value)
        }
        Some(_) => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn node(ready: Option<&str>, taints: serde_json::Value) -> Node {
        let conditions: Vec<_> = ready
            .iter()
            .map(|status| json!({"type": "Ready", "status": status}))
            .collect();
        serde_json::from_value(json!({
            "metadata": {"name": "n"},
            "spec": {"taints": taints},
            "status": {"conditions": conditions},
        }))
        .unwrap()
    }

    fn names(taints: Option<Vec<Taint>>) -> Vec<String> {
        taints
            .into_iter()
            .flatten()
            .map(|taint| format!("{}:{}", taint.key, taint.effect))
            .collect()
    }

    #[test]
    fn taints_follow_conditions_and_leave_others_alone() {
        let foreign = json!([{"key": "gpu", "effect": "NoSchedule"}]);
        assert_eq!(wanted(&node(Some("True"), foreign.clone())), None);
        assert_eq!(
            names(wanted(&node(Some("Unknown"), foreign))),
            [
                "gpu:NoSchedule",
                "node.kubernetes.io/unreachable:NoSchedule",
                "node.kubernetes.io/unreachable:NoExecute"
            ]
        );
        let lost = json!([{"key": UNREACHABLE, "effect": NO_SCHEDULE}, {"key": UNREACHABLE, "effect": NO_EXECUTE}]);
        assert_eq!(wanted(&node(Some("True"), lost.clone())), Some(vec![]));
        assert_eq!(wanted(&node(Some("Unknown"), lost.clone())), None);
        assert_eq!(
            names(wanted(&node(Some("False"), lost))),
            [
                "node.kubernetes.io/not-ready:NoSchedule",
                "node.kubernetes.io/not-ready:NoExecute"
            ]
        );
        let registered = json!([{"key": NOT_READY, "effect": NO_SCHEDULE}]);
        assert_eq!(wanted(&node(None, registered.clone())), None);
        assert_eq!(wanted(&node(Some("True"), registered)), Some(vec![]));
    }

    #[test]
    fn pods_stay_as_long_as_they_tolerate_all_taints() {
        let now: Timestamp = "2025-01-01T00:01:40Z".parse().unwrap();
        let taint = |key: &str| -> Taint {
            serde_json::from_value(
                json!({"key": key, "effect": NO_EXECUTE, "timeAdded": "2025-01-01T00:00:00Z"}),
            )
            .unwrap()
        };
        let tolerate = |value: serde_json::Value| -> Vec<Toleration> {
            serde_json::from_value(value).unwrap()
        };
        let lost = [taint(UNREACHABLE)];
        let minutes = tolerate(
            json!([{"key": UNREACHABLE, "operator": "Exists", "effect": NO_EXECUTE, "tolerationSeconds": 300}]),
        );
        assert_eq!(
            stay(&lost, &minutes, now),
            Stay::For(Duration::from_secs(200))
        );
        assert_eq!(stay(&lost, &[], now), Stay::For(Duration::ZERO));
        assert_eq!(stay(&[], &[], now), Stay::ForEver);
        assert_eq!(
            stay(&lost, &tolerate(json!([{"operator": "Exists"}])), now),
            Stay::ForEver
        );
        assert_eq!(
            stay(&[taint(UNREACHABLE), taint("other")], &minutes, now),
            Stay::For(Duration::ZERO)
        );
        let over =
            tolerate(json!([{"key": UNREACHABLE, "operator": "Exists", "tolerationSeconds": 60}]));
        assert_eq!(stay(&lost, &over, now), Stay::For(Duration::ZERO));
        let other = tolerate(json!([{"key": UNREACHABLE, "operator": "Equal", "value": "x"}]));
        assert_eq!(stay(&lost, &other, now), Stay::For(Duration::ZERO));
    }
}
