//! Pod garbage collection: pods on nodes that are gone, pods deleted before they had a node, and too many finished ones.

use std::fmt;
use std::sync::Arc;

use anyhow::Context;
use k8s_openapi::api::core::v1::{Node, Pod};
use kube::ResourceExt;
use kube::api::{Api, DeleteParams, Patch, PatchParams, Preconditions};
use serde_json::json;
use tokio_util::sync::CancellationToken;
use tracing::info;

use crate::Config;
use crate::cluster::{Cluster, is_code};
use crate::informer::Key;
use crate::pods::{self, is_finished, is_terminating, node_name};
use crate::queue::{Again, Queue};

/// What is looked at.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
enum Work {
    /// A pod that may be without a place.
    Pod(Key),
    /// The number of finished pods.
    Finished,
}

impl fmt::Display for Work {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Pod(key) => write!(f, "pod {key}"),
            Self::Finished => f.write_str("finished pods"),
        }
    }
}

/// Registers with the watches and gives the loop.
pub(crate) fn start(
    cluster: &Arc<Cluster>,
    config: &Config,
    shutdown: CancellationToken,
) -> impl Future<Output = anyhow::Result<()>> + Send + 'static {
    let queue = Queue::new();
    let quarantine = config.pod_gc_quarantine;
    let threshold = config.terminated_pod_threshold;
    let (wake, weak) = (queue.clone(), Arc::downgrade(cluster));
    cluster.pods.on_change(move |old, new| {
        let (Some(pod), Some(cluster)) = (new, weak.upgrade()) else {
            return;
        };
        let key = || Work::Pod(Key::of(pod.as_ref()));
        match node_name(pod) {
            None if is_terminating(pod) => wake.add(key()),
            Some(node)
                if old.is_none_or(|old| node_name(old).is_none())
                    && cluster.nodes.get(&Key::new("", node)).is_none() =>
            {
                wake.add_after(key(), quarantine);
            }
            _ => {}
        }
        if is_finished(pod) && old.is_none_or(|old| !is_finished(old)) {
            wake.add(Work::Finished);
        }
    });
    let (wake, weak) = (queue.clone(), Arc::downgrade(cluster));
    cluster.nodes.on_change(move |old, new| {
        let (Some(node), None, Some(cluster)) = (old, new, weak.upgrade()) else {
            return;
        };
        for pod in cluster.pods.all() {
            if node_name(&pod) == Some(node.name_any().as_str()) {
                wake.add_after(Work::Pod(Key::of(pod.as_ref())), quarantine);
            }
        }
    });
    let cluster = cluster.clone();
    async move {
        cluster.pods.synced().await;
        cluster.nodes.synced().await;
        queue
            .run("pod gc", 2, shutdown, |work| {
                let cluster = cluster.clone();
                async move {
                    match work {
                        Work::Pod(key) => pod(&cluster, &key).await,
                        Work::Finished => finished(&cluster, threshold).await,
                    }
                }
            })
            .await;
        Ok(())
    }
}

async fn pod(cluster: &Cluster, key: &Key) -> anyhow::Result<Again> {
    let Some(pod) = cluster.pods.get(key) else {
        return Ok(None);
    };
    let Some(node) = node_name(&pod) else {
        if is_terminating(&pod) {
            remove(cluster, &pod).await?;
        }
        return Ok(None);
    };
    // The cache may be behind: a pod's node must be known to be gone.
    let nodes = Api::<Node>::all(cluster.client.clone());
    if cluster.nodes.get(&Key::new("", node)).is_some()
        || nodes.get_metadata_opt(node).await?.is_some()
    {
        return Ok(None);
    }
    info!(pod = %key, node, "removing a pod whose node is gone");
    if !is_finished(&pod) {
        let condition = json!({
            "type": "DisruptionTarget", "status": "True", "reason": "DeletionByPodGC",
            "message": "PodGC: node no longer exists", "lastTransitionTime": pods::now(),
        });
        let patch = json!({"metadata": {"uid": pod.metadata.uid}, "status": {"phase": "Failed", "conditions": [condition]}});
        let api = Api::<Pod>::namespaced(cluster.client.clone(), &key.namespace);
        match api
            .patch_status(&key.name, &PatchParams::default(), &Patch::Strategic(patch))
            .await
        {
            Ok(_) => {}
            Err(error) if is_code(&error, 404) => return Ok(None),
            Err(error) => return Err(error).context("could not mark the pod as failed"),
        }
    }
    remove(cluster, &pod).await?;
    Ok(None)
}

/// Removes the oldest finished pods beyond the threshold.
async fn finished(cluster: &Cluster, threshold: usize) -> anyhow::Result<Again> {
    if threshold == 0 {
        return Ok(None);
    }
    let mut finished: Vec<_> = cluster
        .pods
        .all()
        .into_iter()
        .filter(|pod| is_finished(pod))
        .collect();
    if finished.len() <= threshold {
        return Ok(None);
    }
    finished.sort_by(|a, b| {
        a.metadata
            .creation_timestamp
            .cmp(&b.metadata.creation_timestamp)
    });
    finished.truncate(finished.len() - threshold);
    for pod in finished {
        remove(cluster, &pod).await?;
    }
    Ok(None)
}

/// Deletes at once: there is no kubelet to wait for.
async fn remove(cluster: &Cluster, pod: &Pod) -> anyhow::Result<()> {
    let api = Api::<Pod>::namespaced(cluster.client.clone(), &pod.namespace().unwrap_or_default());
    let params = DeleteParams::default()
        .grace_period(0)
        .preconditions(Preconditions {
            uid: pod.metadata.uid.clone(),
            resource_version: None,
        });
    match api.delete(&pod.name_any(), &params).await {
        Ok(_) => Ok(()),
        Err(error) if is_code(&error, 404) || is_code(&error, 409) => Ok(()),
        Err(error) => {
            Err(error).with_context(|| format!("could not delete pod {}", pod.name_any()))
        }
    }
}
