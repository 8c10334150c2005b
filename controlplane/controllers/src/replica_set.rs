//! ReplicaSet: keeps as many pods as asked for.

use std::cmp::Ordering;
use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context;
use k8s_openapi::api::apps::v1::{ReplicaSet, ReplicaSetCondition};
use k8s_openapi::api::core::v1::{Pod, PodTemplateSpec};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use k8s_openapi::jiff::Timestamp;
use kube::api::{Api, DeleteParams, Patch, PatchParams, PostParams, Preconditions};
use kube::runtime::events::EventType;
use kube::{Resource, ResourceExt};
use serde_json::json;
use tokio_util::sync::CancellationToken;

use crate::cluster::{Cluster, Teller, is_code, is_namespace_terminating};
use crate::informer::Key;
use crate::pods::{self, is_active, is_ready, is_terminating, node_name, until_available};
use crate::queue::{Again, Queue};
use crate::refs::{self, claim, controller_of, controller_ref};

/// Pods made or removed in one reconcile at most; upstream's burst.
const BURST: usize = 500;

/// Registers with the watches and gives the loop.
pub(crate) fn start(
    cluster: &Arc<Cluster>,
    shutdown: CancellationToken,
) -> impl Future<Output = anyhow::Result<()>> + Send + 'static {
    let queue = Queue::new();
    let wake = queue.clone();
    cluster.replica_sets.on_change(move |_, new| {
        if let Some(new) = new {
            wake.add(Key::of(new.as_ref()));
        }
    });
    let (wake, sets) = (queue.clone(), Arc::downgrade(cluster));
    cluster.pods.on_change(move |old, new| {
        for pod in [old, new].into_iter().flatten() {
            let namespace = pod.metadata.namespace.as_deref().unwrap_or_default();
            match controller_of(&pod.metadata) {
                Some(owner) if owner.kind == "ReplicaSet" => {
                    wake.add(Key::new(namespace, &owner.name));
                }
                Some(_) => {}
                // An orphan wakes those that might adopt it.
                None => {
                    let Some(cluster) = sets.upgrade() else {
                        return;
                    };
                    for set in cluster.replica_sets.in_namespace(namespace) {
                        let selector = set.spec.as_ref().map(|spec| refs::selector(&spec.selector));
                        if let Some(Ok(Some(selector))) = selector
                            && refs::matches(&selector, &pod.metadata)
                        {
                            wake.add(Key::of(set.as_ref()));
                        }
                    }
                }
            }
        }
    });
    let controller = Arc::new(Controller {
        teller: Teller::new(cluster.client.clone(), "replicaset-controller"),
        cluster: cluster.clone(),
    });
    async move {
        controller.cluster.pods.synced().await;
        controller.cluster.replica_sets.synced().await;
        queue
            .run("replica set", 5, shutdown, |key| {
                let controller = controller.clone();
                async move { controller.reconcile(&key).await }
            })
            .await;
        Ok(())
    }
}

struct Controller {
    cluster: Arc<Cluster>,
    teller: Teller,
}

impl Controller {
    async fn reconcile(&self, key: &Key) -> anyhow::Result<Again> {
        let cluster = &self.cluster;
        let Some(set) = cluster.replica_sets.get(key) else {
            return Ok(None);
        };
        let Some(spec) = &set.spec else {
            return Ok(None);
        };
        let Some(selector) = refs::selector(&spec.selector)? else {
            return Ok(None);
        };
        let claimed = claim(
            &cluster.client,
            set.as_ref(),
            &selector,
            &cluster.pods,
            is_active,
        )
        .await?;
        let (active, others): (Vec<_>, Vec<_>) =
            claimed.into_iter().partition(|pod| is_active(pod));
        let terminating = others.iter().filter(|pod| is_terminating(pod)).count();
        let managed = if set.metadata.deletion_timestamp.is_none() {
            self.scale(&set, spec.replicas.unwrap_or(1), &active).await
        } else {
            Ok(())
        };
        // The status is of what was there before, plus what was learned: the writes above wake us again.
        let again = self
            .write_status(&set, &active, terminating, managed.as_ref().err())
            .await?;
        match managed {
            Err(Refused { error, .. }) if !is_namespace_terminating(&error) => {
                Err(error).context("could not bring about the wanted pods")
            }
            _ => Ok(again),
        }
    }

    async fn scale(
        &self,
        set: &ReplicaSet,
        wanted: i32,
        active: &[Arc<Pod>],
    ) -> Result<(), Refused> {
        let wanted = usize::try_from(wanted).unwrap_or(0);
        if active.len() < wanted {
            self.create(set, (wanted - active.len()).min(BURST)).await
        } else if active.len() > wanted {
            let surplus = (active.len() - wanted).min(BURST);
            let related = self.related(set);
            let victims = choose_victims(active, &related, surplus);
            self.delete(set, victims).await
        } else {
            Ok(())
        }
    }

    /// Slow start: batches of 1, 2, 4 …, so that what fails always (a quota) fails once and not five hundred times.
    async fn create(&self, set: &ReplicaSet, count: usize) -> Result<(), Refused> {
        let namespace = set.metadata.namespace.clone().unwrap_or_default();
        let api = Api::<Pod>::namespaced(self.cluster.client.clone(), &namespace);
        let pod = pod_from(set);
        let params = PostParams::default();
        let (mut made, mut batch) = (0, 1);
        while made < count {
            let size = batch.min(count - made);
            let created = (0..size).map(|_| api.create(&params, &pod));
            let mut failure = None;
            for result in futures::future::join_all(created).await {
                match result {
                    Ok(pod) => {
                        let note = format!("Created pod: {}", pod.name_any());
                        self.teller
                            .tell(set, EventType::Normal, "SuccessfulCreate", note);
                        self.cluster.pods.note(pod);
                    }
                    Err(error) => failure = Some(error),
                }
            }
            if let Some(error) = failure {
                if !is_namespace_terminating(&error) {
                    let note = format!("Error creating: {}", words(&error));
                    self.teller
                        .tell(set, EventType::Warning, "FailedCreate", note);
                }
                return Err(Refused {
                    reason: "FailedCreate",
                    error,
                });
            }
            made += size;
            batch *= 2;
        }
        Ok(())
    }

    async fn delete(&self, set: &ReplicaSet, victims: Vec<Arc<Pod>>) -> Result<(), Refused> {
        let namespace = set.metadata.namespace.clone().unwrap_or_default();
        let api = Api::<Pod>::namespaced(self.cluster.client.clone(), &namespace);
        let deleted = victims.iter().map(|pod| {
            let api = &api;
            async move {
                let params = DeleteParams::default().preconditions(Preconditions {
                    uid: pod.metadata.uid.clone(),
                    resource_version: None,
                });
                (pod, api.delete(&pod.name_any(), &params).await)
            }
        });
        let mut failure = Ok(());
        for (pod, result) in futures::future::join_all(deleted).await {
            match result {
                Ok(answer) => {
                    let note = format!("Deleted pod: {}", pod.name_any());
                    self.teller
                        .tell(set, EventType::Normal, "SuccessfulDelete", note);
                    // A pod on a node stays while it is being stopped; else it is gone at once.
                    match answer.left() {
                        Some(pod) if node_name(&pod).is_some() && is_terminating(&pod) => {
                            self.cluster.pods.note(pod)
                        }
                        _ => self.cluster.pods.note_gone(pod),
                    }
                }
                Err(error) if is_code(&error, 404) || is_code(&error, 409) => {}
                Err(error) => {
                    let note = format!("Error deleting: {}", words(&error));
                    self.teller
                        .tell(set, EventType::Warning, "FailedDelete", note);
                    failure = Err(Refused {
                        reason: "FailedDelete",
                        error,
                    });
                }
            }
        }
        failure
    }

    /// How many active pods of the same owner (all ReplicaSets of one Deployment) each node has.
    fn related(&self, set: &ReplicaSet) -> HashMap<String, usize> {
        let namespace = set.metadata.namespace.as_deref().unwrap_or_default();
        let owner = controller_of(&set.metadata).map(|owner| owner.uid.clone());
        let sets: Vec<String> = self
            .cluster
            .replica_sets
            .in_namespace(namespace)
            .iter()
            .filter(|other| {
                other.metadata.uid == set.metadata.uid
                    || (owner.is_some()
                        && controller_of(&other.metadata).map(|owner| &owner.uid) == owner.as_ref())
            })
            .filter_map(|other| other.metadata.uid.clone())
            .collect();
        let mut related = HashMap::new();
        for pod in self.cluster.pods.in_namespace(namespace) {
            if is_active(&pod)
                && controller_of(&pod.metadata).is_some_and(|owner| sets.contains(&owner.uid))
                && let Some(node) = node_name(&pod)
            {
                *related.entry(node.to_owned()).or_insert(0) += 1;
            }
        }
        related
    }

    async fn write_status(
        &self,
        set: &ReplicaSet,
        active: &[Arc<Pod>],
        terminating: usize,
        refused: Option<&Refused>,
    ) -> anyhow::Result<Again> {
        let Some(spec) = &set.spec else {
            return Ok(None);
        };
        let min_ready = spec.min_ready_seconds.unwrap_or(0);
        let now = Timestamp::now();
        let labels = spec
            .template
            .as_ref()
            .and_then(|template| template.metadata.as_ref())
            .and_then(|meta| meta.labels.clone())
            .unwrap_or_default();
        let labelled = |pod: &&Arc<Pod>| {
            labels
                .iter()
                .all(|(name, value)| pod.labels().get(name) == Some(value))
        };
        let waits: Vec<_> = active
            .iter()
            .filter_map(|pod| until_available(pod, min_ready, now))
            .collect();
        let available = waits.iter().filter(|wait| wait.is_zero()).count();
        let next = waits.into_iter().filter(|wait| !wait.is_zero()).min();
        let again = next.and_then(|wait| Duration::try_from(wait).ok());
        let old = set.status.clone().unwrap_or_default();
        let conditions = failure_condition(old.conditions.as_deref().unwrap_or(&[]), refused);
        let number = |count: usize| i32::try_from(count).unwrap_or(i32::MAX);
        let mut new = old.clone();
        new.replicas = number(active.len());
        new.fully_labeled_replicas = some(number(active.iter().filter(labelled).count()));
        new.ready_replicas = some(number(active.iter().filter(|pod| is_ready(pod)).count()));
        new.available_replicas = some(number(available));
        new.terminating_replicas = Some(number(terminating));
        new.observed_generation = set.metadata.generation;
        new.conditions = (!conditions.is_empty()).then_some(conditions);
        if new == old {
            return Ok(again);
        }
        let status = json!({
            "replicas": new.replicas,
            "fullyLabeledReplicas": new.fully_labeled_replicas,
            "readyReplicas": new.ready_replicas,
            "availableReplicas": new.available_replicas,
            "terminatingReplicas": new.terminating_replicas,
            "observedGeneration": new.observed_generation,
            "conditions": new.conditions,
        });
        let patch = json!({
            "metadata": {"uid": set.metadata.uid, "resourceVersion": set.metadata.resource_version},
            "status": status,
        });
        let namespace = set.metadata.namespace.clone().unwrap_or_default();
        let api = Api::<ReplicaSet>::namespaced(self.cluster.client.clone(), &namespace);
        match api
            .patch_status(
                &set.name_any(),
                &PatchParams::default(),
                &Patch::Merge(patch),
            )
            .await
        {
            Ok(written) => self.cluster.replica_sets.note(written),
            Err(error) if is_code(&error, 404) => {}
            Err(error) => return Err(error).context("could not write the status"),
        }
        Ok(again)
    }
}

/// A write that the API server refused, and the condition's reason for it.
struct Refused {
    reason: &'static str,
    error: kube::Error,
}

/// The server's own words, without the client's around them.
fn words(error: &kube::Error) -> String {
    match error {
        kube::Error::Api(status) => status.message.clone(),
        error => error.to_string(),
    }
}

/// Counts of zero are left out, as upstream's are.
fn some(count: i32) -> Option<i32> {
    (count != 0).then_some(count)
}

fn failure_condition(
    old: &[ReplicaSetCondition],
    refused: Option<&Refused>,
) -> Vec<ReplicaSetCondition> {
    let mut conditions: Vec<_> = old.to_vec();
    let before = conditions
        .iter()
        .position(|condition| condition.type_ == "ReplicaFailure");
    match (before, refused) {
        (None, Some(refused)) => conditions.push(ReplicaSetCondition {
            type_: "ReplicaFailure".into(),
            status: "True".into(),
            reason: Some(refused.reason.into()),
            message: Some(words(&refused.error)),
            last_transition_time: Some(pods::now()),
        }),
        (Some(at), None) => {
            conditions.remove(at);
        }
        _ => {}
    }
    conditions
}

/// A pod as the template says.
fn pod_from(set: &ReplicaSet) -> Pod {
    let template = set.spec.as_ref().and_then(|spec| spec.template.clone());
    let PodTemplateSpec { metadata, spec } = template.unwrap_or_default();
    let metadata = metadata.unwrap_or_default();
    Pod {
        metadata: ObjectMeta {
            generate_name: Some(format!("{}-", set.name_any())),
            namespace: set.metadata.namespace.clone(),
            labels: metadata.labels,
            annotations: metadata.annotations,
            finalizers: metadata.finalizers,
            owner_references: Some(vec![controller_ref(set)]),
            ..ObjectMeta::default()
        },
        spec,
        status: None,
    }
}

/// The pods to remove first: the ones whose loss costs least.
fn choose_victims(
    active: &[Arc<Pod>],
    related: &HashMap<String, usize>,
    count: usize,
) -> Vec<Arc<Pod>> {
    let mut ranked: Vec<_> = active.to_vec();
    ranked.sort_by(|a, b| cheaper(a, b, related));
    ranked.truncate(count);
    ranked
}

fn cheaper(a: &Pod, b: &Pod, related: &HashMap<String, usize>) -> Ordering {
    let phase = |pod: &Pod| match pods::phase(pod) {
        "Pending" => 0,
        "Unknown" => 1,
        _ => 2,
    };
    let cost = |pod: &Pod| -> i64 {
        let cost = pod
            .annotations()
            .get("controller.kubernetes.io/pod-deletion-cost");
        cost.and_then(|cost| cost.parse().ok()).unwrap_or(0)
    };
    let crowd = |pod: &Pod| {
        let node = node_name(pod).unwrap_or_default();
        related.get(node).copied().unwrap_or(0)
    };
    let ready_since = |pod: &Pod| {
        let ready = pods::condition(pod, "Ready").filter(|condition| condition.status == "True");
        ready.and_then(|ready| ready.last_transition_time.clone())
    };
    let restarts = |pod: &Pod| -> i32 {
        let statuses = pod
            .status
            .as_ref()
            .and_then(|status| status.container_statuses.as_ref());
        statuses
            .into_iter()
            .flatten()
            .map(|status| status.restart_count)
            .max()
            .unwrap_or(0)
    };
    (node_name(a).is_some().cmp(&node_name(b).is_some()))
        .then_with(|| phase(a).cmp(&phase(b)))
        .then_with(|| is_ready(a).cmp(&is_ready(b)))
        .then_with(|| cost(a).cmp(&cost(b)))
        // Crowded nodes lose first.
        .then_with(|| crowd(b).cmp(&crowd(a)))
        // Then the ones that have been ready for the shortest time, restarted most, are newest.
        .then_with(|| ready_since(b).cmp(&ready_since(a)))
        .then_with(|| restarts(b).cmp(&restarts(a)))
        .then_with(|| {
            b.meta()
                .creation_timestamp
                .cmp(&a.meta().creation_timestamp)
        })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pod(name: &str, node: &str, ready: bool, more: serde_json::Value) -> Arc<Pod> {
        let status = if ready { "True" } else { "False" };
        let mut pod = json!({
            "metadata": {"name": name},
            "spec": {"containers": [], "nodeName": node},
            "status": {"phase": "Running", "conditions": [
                {"type": "Ready", "status": status, "lastTransitionTime": "2024-01-01T00:00:00Z"}]},
        });
        fn merge(into: &mut serde_json::Value, from: serde_json::Value) {
            match (into, from) {
                (serde_json::Value::Object(into), serde_json::Value::Object(from)) => {
                    for (key, value) in from {
                        merge(into.entry(key).or_insert(serde_json::Value::Null), value);
                    }
                }
                (into, from) => *into = from,
            }
        }
        merge(&mut pod, more);
        Arc::new(serde_json::from_value(pod).unwrap())
    }

    #[test]
    fn the_pods_that_cost_least_go_first() {
        let related = HashMap::from([("a".to_owned(), 3), ("b".to_owned(), 1)]);
        let pods = [
            pod("on-b", "b", true, json!({})),
            pod(
                "restarted",
                "a",
                true,
                json!({"status": {"containerStatuses": [
                {"name": "c", "image": "", "imageID": "", "ready": true, "restartCount": 3}]}}),
            ),
            pod("on-a", "a", true, json!({})),
            pod(
                "dear",
                "a",
                true,
                json!({"metadata": {"annotations":
                {"controller.kubernetes.io/pod-deletion-cost": "10"}}}),
            ),
            pod("unready", "b", false, json!({})),
            pod(
                "pending",
                "b",
                false,
                json!({"status": {"phase": "Pending"}}),
            ),
            pod(
                "unassigned",
                "",
                false,
                json!({"status": {"phase": "Pending"}}),
            ),
            pod(
                "young",
                "a",
                true,
                json!({"status": {"conditions": [
                {"type": "Ready", "status": "True", "lastTransitionTime": "2025-01-01T00:00:00Z"}]}}),
            ),
        ];
        let order: Vec<String> = choose_victims(&pods, &related, 8)
            .iter()
            .map(|pod| pod.name_any())
            .collect();
        assert_eq!(
            order,
            [
                "unassigned",
                "pending",
                "unready",
                "young",
                "restarted",
                "on-a",
                "on-b",
                "dear"
            ]
        );
        assert_eq!(choose_victims(&pods, &related, 2).len(), 2);
    }

    #[test]
    fn a_made_pod_is_what_the_template_says_and_is_owned() {
        let set: ReplicaSet = serde_json::from_value(json!({
            "metadata": {"name": "web-1", "namespace": "shop", "uid": "u1"},
            "spec": {"selector": {"matchLabels": {"app": "web"}}, "template": {
                "metadata": {"labels": {"app": "web"}, "annotations": {"a": "b"}},
                "spec": {"containers": [{"name": "c", "image": "i"}]}}},
        }))
        .unwrap();
        let pod = pod_from(&set);
        assert_eq!(pod.metadata.generate_name.as_deref(), Some("web-1-"));
        assert_eq!(pod.metadata.name, None);
        assert_eq!(pod.labels()["app"], "web");
        let owner = controller_of(&pod.metadata).unwrap();
        assert_eq!(
            (owner.kind.as_str(), owner.uid.as_str()),
            ("ReplicaSet", "u1")
        );
        assert_eq!(owner.api_version, "apps/v1");
    }
}
