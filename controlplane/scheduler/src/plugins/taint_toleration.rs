//! TaintToleration: a node's taints against a pod's tolerations.

use k8s_openapi::api::core::v1::{Taint, Toleration};

use crate::framework::{Filter, MAX_NODE_SCORE, Plugin, Refusal, Score};
use crate::view::{NodeInfo, PodView};

/// Keeps pods off nodes whose `NoSchedule` and `NoExecute` taints they do not tolerate, and
/// prefers nodes with fewer untolerated `PreferNoSchedule` taints.
pub struct TaintToleration;

/// Whether any toleration covers the taint (core/v1 Toleration).
pub(crate) fn tolerates(tolerations: &[Toleration], taint: &Taint) -> bool {
    tolerations.iter().any(|toleration| {
        let empty_or = |mine: &Option<String>, theirs: &str| {
            mine.as_deref()
                .is_none_or(|mine| mine.is_empty() || mine == theirs)
        };
        let exists = toleration.operator.as_deref() == Some("Exists");
        let key_ok = match toleration.key.as_deref() {
            None | Some("") => exists,
            Some(key) => key == taint.key,
        };
        let value_ok = exists
            || toleration.value.as_deref().unwrap_or("") == taint.value.as_deref().unwrap_or("");
        empty_or(&toleration.effect, &taint.effect) && key_ok && value_ok
    })
}

impl Plugin for TaintToleration {
    fn name(&self) -> &'static str {
        "TaintToleration"
    }
}

impl Filter for TaintToleration {
    fn filter(&self, pod: &PodView, node: &NodeInfo) -> Result<(), Refusal> {
        let hard = |taint: &&Taint| matches!(taint.effect.as_str(), "NoSchedule" | "NoExecute");
        match node
            .node
            .taints
            .iter()
            .filter(hard)
            .find(|taint| !tolerates(&pod.tolerations, taint))
        {
            Some(taint) => Err(Refusal::unresolvable(format!(
                "node(s) had untolerated taint {{{}: {}}}",
                taint.key,
                taint.value.as_deref().unwrap_or("")
            ))),
            None => Ok(()),
        }
    }
}

impl Score for TaintToleration {
    fn score(&self, pod: &PodView, node: &NodeInfo) -> i64 {
        let soft = node
            .node
            .taints
            .iter()
            .filter(|taint| taint.effect == "PreferNoSchedule");
        soft.filter(|taint| !tolerates(&pod.tolerations, taint))
            .count() as i64
    }

    fn normalize(&self, scores: &mut [i64]) {
        let most = scores.iter().copied().max().unwrap_or(0);
        for score in scores {
            *score = if most == 0 {
                MAX_NODE_SCORE
            } else {
                MAX_NODE_SCORE - *score * MAX_NODE_SCORE / most
            };
        }
    }
}
