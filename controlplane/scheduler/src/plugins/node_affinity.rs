//! NodeAffinity: node selectors and node affinity, required and preferred.

use std::collections::BTreeMap;

use k8s_openapi::api::core::v1::{NodeSelectorRequirement, NodeSelectorTerm};

use crate::framework::{Filter, MAX_NODE_SCORE, Plugin, PreFilter, Refusal, Score};
use crate::view::{NodeInfo, NodeView, PodView};

/// `spec.nodeSelector` and `spec.affinity.nodeAffinity`.
pub struct NodeAffinity;

/// One requirement against a label map (core/v1 NodeSelectorOperator).
fn matches_requirement(
    requirement: &NodeSelectorRequirement,
    map: &BTreeMap<String, String>,
) -> bool {
    let value = map.get(&requirement.key);
    let values = requirement.values.as_deref().unwrap_or_default();
    let compare = |less: bool| -> bool {
        let (Some(value), [bound]) = (value, values) else {
            return false;
        };
        match (value.parse::<i64>(), bound.parse::<i64>()) {
            (Ok(value), Ok(bound)) => {
                if less {
                    value < bound
                } else {
                    value > bound
                }
            }
            _ => false,
        }
    };
    match requirement.operator.as_str() {
        "In" => value.is_some_and(|value| values.contains(value)),
        "NotIn" => !value.is_some_and(|value| values.contains(value)),
        "Exists" => value.is_some(),
        "DoesNotExist" => value.is_none(),
        "Gt" => compare(false),
        "Lt" => compare(true),
        _ => false,
    }
}

/// One term: all its expressions and fields hold; an empty term matches nothing.
fn matches_term(term: &NodeSelectorTerm, node: &NodeView) -> bool {
    let expressions = term.match_expressions.as_deref().unwrap_or_default();
    let fields = term.match_fields.as_deref().unwrap_or_default();
    if expressions.is_empty() && fields.is_empty() {
        return false;
    }
    let own_fields = BTreeMap::from([("metadata.name".to_owned(), node.name.clone())]);
    expressions
        .iter()
        .all(|requirement| matches_requirement(requirement, &node.labels))
        && fields
            .iter()
            .all(|requirement| matches_requirement(requirement, &own_fields))
}

fn required_terms(pod: &PodView) -> Option<&[NodeSelectorTerm]> {
    let affinity = pod.node_affinity.as_ref()?;
    let required = affinity
        .required_during_scheduling_ignored_during_execution
        .as_ref()?;
    Some(&required.node_selector_terms)
}

impl Plugin for NodeAffinity {
    fn name(&self) -> &'static str {
        "NodeAffinity"
    }
}

impl PreFilter for NodeAffinity {
    /// A pod whose every term names nodes by `metadata.name` (a DaemonSet's) looks at those alone.
    fn pre_filter(&self, pod: &PodView) -> Result<Option<Vec<String>>, Refusal> {
        let Some(terms) = required_terms(pod) else {
            return Ok(None);
        };
        let mut names = Vec::new();
        for term in terms {
            let named = term
                .match_fields
                .iter()
                .flatten()
                .find(|field| field.key == "metadata.name" && field.operator == "In");
            match named.and_then(|field| field.values.as_ref()) {
                Some(values) => names.extend(values.iter().cloned()),
                None => return Ok(None),
            }
        }
        if names.is_empty() {
            return Err(Refusal::unresolvable("pod affinity terms conflict"));
        }
        Ok(Some(names))
    }
}

impl Filter for NodeAffinity {
    fn filter(&self, pod: &PodView, node: &NodeInfo) -> Result<(), Refusal> {
        let selector_ok = pod
            .node_selector
            .iter()
            .all(|(key, value)| node.node.labels.get(key) == Some(value));
        let affinity_ok = required_terms(pod)
            .is_none_or(|terms| terms.iter().any(|term| matches_term(term, &node.node)));
        if selector_ok && affinity_ok {
            return Ok(());
        }
        Err(Refusal::unresolvable(
            "node(s) didn't match Pod's node affinity/selector",
        ))
    }
}

impl Score for NodeAffinity {
    fn score(&self, pod: &PodView, node: &NodeInfo) -> i64 {
        let preferred = pod.node_affinity.as_ref().and_then(|affinity| {
            affinity
                .preferred_during_scheduling_ignored_during_execution
                .as_deref()
        });
        preferred
            .unwrap_or_default()
            .iter()
            .filter(|term| matches_term(&term.preference, &node.node))
            .map(|term| i64::from(term.weight))
            .sum()
    }

    fn normalize(&self, scores: &mut [i64]) {
        let most = scores.iter().copied().max().unwrap_or(0);
        if most > 0 {
            scores
                .iter_mut()
                .for_each(|score| *score = *score * MAX_NODE_SCORE / most);
        }
    }
}
