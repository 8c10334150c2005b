//! The scheduling framework: extension points and the order in which plugins run.

use std::sync::Arc;

use crate::view::{NodeInfo, PodView};

/// Why a node can't take a pod, or why a step refused it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Refusal {
    /// What the user reads in the `FailedScheduling` event.
    pub reason: String,
    /// No removal of other pods could help.
    pub unresolvable: bool,
}

impl Refusal {
    /// A refusal that freeing resources might lift.
    pub fn new(reason: impl Into<String>) -> Self {
        Self {
            reason: reason.into(),
            unresolvable: false,
        }
    }

    /// A refusal that freeing resources can't lift.
    pub fn unresolvable(reason: impl Into<String>) -> Self {
        Self {
            reason: reason.into(),
            unresolvable: true,
        }
    }
}

/// The highest score a plugin may give a node.
pub const MAX_NODE_SCORE: i64 = 100;

/// A plugin's name, as profiles and metrics show it.
pub trait Plugin: Send + Sync {
    /// Upstream's name of the plugin, such as `NodeResourcesFit`.
    fn name(&self) -> &'static str;
}

/// Before a pod enters the active queue.
pub trait PreEnqueue: Plugin {
    /// Refuses to let the pod be scheduled for now.
    fn pre_enqueue(&self, pod: &PodView) -> Result<(), Refusal>;
}

/// Once per pod, before the nodes are looked at.
pub trait PreFilter: Plugin {
    /// Refuses the pod, or names the only nodes worth looking at.
    fn pre_filter(&self, pod: &PodView) -> Result<Option<Vec<String>>, Refusal>;
}

/// Whether one node can take the pod.
pub trait Filter: Plugin {
    /// Refuses the node.
    fn filter(&self, pod: &PodView, node: &NodeInfo) -> Result<(), Refusal>;
}

/// When no node can take the pod (preemption hangs here).
pub trait PostFilter: Plugin {
    /// Names a node on which room was made, if any.
    fn post_filter(&self, pod: &PodView, nodes: &[Arc<NodeInfo>]) -> Option<String>;
}

/// How much a node is liked.
pub trait Score: Plugin {
    /// A raw score; `normalize` brings it to 0..=100.
    fn score(&self, pod: &PodView, node: &NodeInfo) -> i64;
    /// Brings the raw scores of all nodes to 0..=`MAX_NODE_SCORE`.
    fn normalize(&self, _scores: &mut [i64]) {}
}

/// After the choice: claim, and give back if a later step fails.
pub trait Reserve: Plugin {
    /// Claims what the pod needs on the node.
    fn reserve(&self, pod: &PodView, node: &str) -> Result<(), Refusal>;
    /// Gives it back.
    fn unreserve(&self, pod: &PodView, node: &str);
}

/// May hold a pod back just before binding.
pub trait Permit: Plugin {
    /// Refuses the binding.
    fn permit(&self, pod: &PodView, node: &str) -> Result<(), Refusal>;
}

/// Work that must be done before the binding is written.
pub trait PreBind: Plugin {
    /// Does it, or refuses.
    fn pre_bind<'a>(
        &'a self,
        pod: &'a PodView,
        node: &'a str,
    ) -> futures::future::BoxFuture<'a, Result<(), Refusal>>;
}

/// Writes the binding.
pub trait Bind: Plugin {
    /// Binds the pod to the node.
    fn bind<'a>(
        &'a self,
        pod: &'a PodView,
        node: &'a str,
    ) -> futures::future::BoxFuture<'a, Result<(), Refusal>>;
}

/// Told after a binding was written.
pub trait PostBind: Plugin {
    /// Takes note.
    fn post_bind(&self, pod: &PodView, node: &str);
}

/// One scheduler profile: a name that pods ask for, and its plugins in order.
#[derive(Default)]
pub struct Profile {
    /// `spec.schedulerName` of the pods it serves.
    pub scheduler_name: String,
    /// Run in order; the first refusal counts.
    pub pre_enqueue: Vec<Arc<dyn PreEnqueue>>,
    /// Run in order; the node sets are intersected.
    pub pre_filter: Vec<Arc<dyn PreFilter>>,
    /// Run in order on each node; the first refusal counts.
    pub filter: Vec<Arc<dyn Filter>>,
    /// Run in order until one names a node.
    pub post_filter: Vec<Arc<dyn PostFilter>>,
    /// With their weights.
    pub score: Vec<(Arc<dyn Score>, i64)>,
    /// Run in order; undone in reverse.
    pub reserve: Vec<Arc<dyn Reserve>>,
    /// Run in order.
    pub permit: Vec<Arc<dyn Permit>>,
    /// Run in order.
    pub pre_bind: Vec<Arc<dyn PreBind>>,
    /// The first binds.
    pub bind: Vec<Arc<dyn Bind>>,
    /// Run in order.
    pub post_bind: Vec<Arc<dyn PostBind>>,
}

/// No node fits: how many nodes there are and why each was refused.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct FitError {
    /// Nodes in the cluster.
    pub nodes: usize,
    /// Reasons with the number of nodes that gave each.
    pub reasons: std::collections::BTreeMap<String, usize>,
}

impl std::fmt::Display for FitError {
    /// The message of upstream's `FailedScheduling` event.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        if self.nodes == 0 {
            return write!(f, "no nodes available to schedule pods");
        }
        write!(f, "0/{} nodes are available:", self.nodes)?;
        let mut parts: Vec<String> = self
            .reasons
            .iter()
            .map(|(reason, count)| format!("{count} {reason}"))
            .collect();
        parts.sort();
        write!(f, " {}.", parts.join(", "))
    }
}

impl Profile {
    /// Chooses a node: filters all, scores those left, takes the best (the first by name among equals
    /// after rotating by `round`, so that equals share the pods).
    pub fn select(
        &self,
        pod: &PodView,
        nodes: &[Arc<NodeInfo>],
        round: usize,
    ) -> Result<String, FitError> {
        let mut error = FitError {
            nodes: nodes.len(),
            ..FitError::default()
        };
        let mut only: Option<Vec<String>> = None;
        for plugin in &self.pre_filter {
            match plugin.pre_filter(pod) {
                Ok(None) => {}
                Ok(Some(names)) => match &mut only {
                    Some(only) => only.retain(|name| names.contains(name)),
                    None => only = Some(names),
                },
                Err(refusal) => {
                    error.reasons.insert(refusal.reason, nodes.len());
                    return Err(error);
                }
            }
        }
        let mut fitting = Vec::new();
        for node in nodes {
            if only
                .as_ref()
                .is_some_and(|only| !only.contains(&node.node.name))
            {
                *error
                    .reasons
                    .entry("node(s) didn't satisfy plugin(s) [NodeAffinity]".into())
                    .or_default() += 1;
                continue;
            }
            match self
                .filter
                .iter()
                .find_map(|plugin| plugin.filter(pod, node).err())
            {
                None => fitting.push(node),
                Some(refusal) => *error.reasons.entry(refusal.reason).or_default() += 1,
            }
        }
        if fitting.is_empty() {
            return self
                .post_filter
                .iter()
                .find_map(|plugin| plugin.post_filter(pod, nodes))
                .ok_or(error);
        }
        let mut totals = vec![0i64; fitting.len()];
        if fitting.len() > 1 {
            for (plugin, weight) in &self.score {
                let mut scores: Vec<i64> =
                    fitting.iter().map(|node| plugin.score(pod, node)).collect();
                plugin.normalize(&mut scores);
                for (total, score) in totals.iter_mut().zip(scores) {
                    *total += weight * score.clamp(0, MAX_NODE_SCORE);
                }
            }
        }
        let start = round % fitting.len();
        let best = (0..fitting.len())
            .map(|offset| (start + offset) % fitting.len())
            .reduce(|best, at| if totals[at] > totals[best] { at } else { best })
            .unwrap_or(0);
        Ok(fitting[best].node.name.clone())
    }
}
