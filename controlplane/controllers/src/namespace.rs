//! Namespace: empties one that is being deleted, then lets it go.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context;
use k8s_openapi::api::core::v1::{Namespace, NamespaceCondition};
use kube::api::{Api, DeleteParams, DynamicObject, ListParams, Patch, PatchParams, PostParams};
use kube::discovery::{ApiResource, Discovery, Scope};
use kube::{Client, ResourceExt};
use serde_json::json;
use tokio_util::sync::CancellationToken;
use tracing::info;

use crate::cluster::{Cluster, is_code};
use crate::informer::Key;
use crate::pods;
use crate::queue::{Again, Queue};

const FINALIZER: &str = "kubernetes";
/// How often what is left is looked at, while something is: pods take their time to stop.
const LOOK_AGAIN: Duration = Duration::from_millis(500);

/// Registers with the watches and gives the loop.
pub(crate) fn start(
    cluster: &Arc<Cluster>,
    shutdown: CancellationToken,
) -> impl Future<Output = anyhow::Result<()>> + Send + 'static {
    let queue = Queue::new();
    let wake = queue.clone();
    cluster.namespaces.on_change(move |_, new| {
        if let Some(namespace) = new.filter(|new| new.metadata.deletion_timestamp.is_some()) {
            wake.add(Key::of(namespace.as_ref()));
        }
    });
    let cluster = cluster.clone();
    async move {
        cluster.namespaces.synced().await;
        queue
            .run("namespace", 5, shutdown, |key| {
                let cluster = cluster.clone();
                async move { reconcile(&cluster, &key).await }
            })
            .await;
        Ok(())
    }
}

fn finalizers(namespace: &Namespace) -> &[String] {
    let spec = namespace.spec.as_ref();
    spec.and_then(|spec| spec.finalizers.as_deref())
        .unwrap_or(&[])
}

async fn reconcile(cluster: &Cluster, key: &Key) -> anyhow::Result<Again> {
    let Some(namespace) = cluster.namespaces.get(key) else {
        return Ok(None);
    };
    let ours = finalizers(&namespace)
        .iter()
        .any(|finalizer| finalizer == FINALIZER);
    if namespace.metadata.deletion_timestamp.is_none() || !ours {
        return Ok(None);
    }
    let name = namespace.name_any();
    let left = empty(&cluster.client, &name).await;
    let conditions = left.conditions(&namespace);
    let before = namespace
        .status
        .as_ref()
        .and_then(|status| status.conditions.clone());
    if Some(&conditions) != before.as_ref() {
        let patch = json!({"metadata": {"uid": namespace.metadata.uid}, "status": {"conditions": conditions}});
        let api = Api::<Namespace>::all(cluster.client.clone());
        match api
            .patch_status(&name, &PatchParams::default(), &Patch::Merge(patch))
            .await
        {
            Ok(written) => cluster.namespaces.note(written),
            Err(error) if is_code(&error, 404) => return Ok(None),
            Err(error) => return Err(error).context("could not write the conditions"),
        }
    }
    if let Some(error) = left.errors.into_iter().next() {
        return Err(error);
    }
    if !left.counts.is_empty() {
        return Ok(Some(LOOK_AGAIN));
    }
    finalize(&cluster.client, &name, namespace.metadata.uid.as_deref()).await
}

/// Takes our finalizer off, after which the API server removes the namespace.
async fn finalize(client: &Client, name: &str, uid: Option<&str>) -> anyhow::Result<Again> {
    let api = Api::<Namespace>::all(client.clone());
    let Some(mut live) = api.get_opt(name).await? else {
        return Ok(None);
    };
    if live.metadata.uid.as_deref() != uid {
        return Ok(None);
    }
    let kept = finalizers(&live)
        .iter()
        .filter(|finalizer| *finalizer != FINALIZER);
    let kept: Vec<String> = kept.cloned().collect();
    live.spec.get_or_insert_default().finalizers = Some(kept);
    match api
        .replace_subresource("finalize", name, &PostParams::default(), &live)
        .await
    {
        Ok(_) => info!(namespace = name, "namespace emptied and let go"),
        Err(error) if is_code(&error, 404) => {}
        Err(error) => return Err(error).context("could not finalize the namespace"),
    }
    Ok(None)
}

/// What deleting the content came to.
#[derive(Default)]
struct Left {
    /// Objects that remain, by resource (`pods.`, `deployments.apps`).
    counts: BTreeMap<String, usize>,
    /// Finalizers on them.
    finalizers: BTreeMap<String, usize>,
    discovery_failed: Option<String>,
    errors: Vec<anyhow::Error>,
}

/// Deletes everything in the namespace, pods first, and tells what is left.
async fn empty(client: &Client, namespace: &str) -> Left {
    let mut left = Left::default();
    let resources = match discover(client).await {
        Ok(resources) => resources,
        Err(error) => {
            left.discovery_failed = Some(error.to_string());
            left.errors
                .push(anyhow::Error::from(error).context("discovery failed"));
            return left;
        }
    };
    let is_pods = |resource: &ApiResource| resource.group.is_empty() && resource.plural == "pods";
    let (pods, others): (Vec<_>, Vec<_>) = resources
        .into_iter()
        .partition(|(resource, _)| is_pods(resource));
    // Pods end before what they may still need (policies, secrets) goes (KEP-5080).
    for (resource, collection) in pods {
        remove(client, namespace, &resource, collection, &mut left).await;
    }
    if !left.counts.is_empty() {
        return left;
    }
    for (resource, collection) in others {
        remove(client, namespace, &resource, collection, &mut left).await;
    }
    left
}

/// Every namespaced resource that can be listed and deleted, and whether as a collection.
async fn discover(client: &Client) -> kube::Result<Vec<(ApiResource, bool)>> {
    let discovery = Discovery::new(client.clone()).run_aggregated().await?;
    Ok(discovery
        .groups()
        .flat_map(|group| group.recommended_resources())
        .filter(|(_, capabilities)| {
            capabilities.scope == Scope::Namespaced
                && capabilities.supports_operation("list")
                && capabilities.supports_operation("delete")
        })
        .map(|(resource, capabilities)| {
            (
                resource,
                capabilities.supports_operation("deletecollection"),
            )
        })
        .collect())
}

async fn remove(
    client: &Client,
    namespace: &str,
    resource: &ApiResource,
    collection: bool,
    left: &mut Left,
) {
    let what = format!("{}.{}", resource.plural, resource.group);
    if let Err(error) = try_remove(client, namespace, resource, collection, &what, left).await
        // A resource that went away meanwhile has no objects.
        && !is_code(&error, 404)
        && !is_code(&error, 405)
    {
        left.errors
            .push(anyhow::Error::from(error).context(format!("could not delete all {what}")));
    }
}

async fn try_remove(
    client: &Client,
    namespace: &str,
    resource: &ApiResource,
    collection: bool,
    what: &str,
    left: &mut Left,
) -> kube::Result<()> {
    let api = Api::<DynamicObject>::namespaced_with(client.clone(), namespace, resource);
    let first = api.list_metadata(&ListParams::default()).await?.items;
    if first.is_empty() {
        return Ok(());
    }
    // Objects that are going already need no second request.
    if first
        .iter()
        .any(|object| object.metadata.deletion_timestamp.is_none())
    {
        let params = DeleteParams::background();
        if collection {
            api.delete_collection(&params, &ListParams::default())
                .await?;
        } else {
            for object in &first {
                match api.delete(&object.name_any(), &params).await {
                    Err(error) if !is_code(&error, 404) => return Err(error),
                    _ => {}
                }
            }
        }
    }
    for object in api.list_metadata(&ListParams::default()).await?.items {
        *left.counts.entry(what.to_owned()).or_insert(0) += 1;
        for finalizer in object.finalizers() {
            *left.finalizers.entry(finalizer.clone()).or_insert(0) += 1;
        }
    }
    Ok(())
}

impl Left {
    /// Upstream's five conditions, in its words; their times move only with their status.
    fn conditions(&self, namespace: &Namespace) -> Vec<NamespaceCondition> {
        let list = |counts: &BTreeMap<String, usize>, text: fn(&str, usize) -> String| {
            counts
                .iter()
                .map(|(what, count)| text(what, *count))
                .collect::<Vec<_>>()
                .join(", ")
        };
        let content = (!self.counts.is_empty()).then(|| {
            let text = list(&self.counts, |what, count| {
                format!("{what} has {count} resource instances")
            });
            format!("Some resources are remaining: {text}")
        });
        let finalizers = (!self.finalizers.is_empty()).then(|| {
            let text = list(&self.finalizers, |what, count| {
                format!("{what} in {count} resource instances")
            });
            format!("Some content in the namespace has finalizers remaining: {text}")
        });
        let failed = (!self.errors.is_empty() && self.discovery_failed.is_none()).then(|| {
            let text: Vec<String> = self
                .errors
                .iter()
                .map(|error| format!("{error:#}"))
                .collect();
            format!(
                "Failed to delete all resource types, {} remaining: {}",
                text.len(),
                text.join(", ")
            )
        });
        let all = [
            (
                "NamespaceDeletionDiscoveryFailure",
                &self.discovery_failed,
                "DiscoveryFailed",
                "ResourcesDiscovered",
                "All resources successfully discovered",
            ),
            (
                "NamespaceDeletionGroupVersionParsingFailure",
                &None,
                "GroupVersionParsingFailed",
                "ParsedGroupVersions",
                "All legacy kube types successfully parsed",
            ),
            (
                "NamespaceDeletionContentFailure",
                &failed,
                "ContentDeletionFailed",
                "ContentDeleted",
                "All content successfully deleted, may be waiting on finalization",
            ),
            (
                "NamespaceContentRemaining",
                &content,
                "SomeResourcesRemain",
                "ContentRemoved",
                "All content successfully removed",
            ),
            (
                "NamespaceFinalizersRemaining",
                &finalizers,
                "SomeFinalizersRemain",
                "ContentHasNoFinalizers",
                "All content-preserving finalizers finished",
            ),
        ];
        let before = namespace
            .status
            .as_ref()
            .and_then(|status| status.conditions.as_deref())
            .unwrap_or(&[]);
        all.into_iter()
            .map(|(type_, problem, bad, good, fine)| {
                let status = if problem.is_some() { "True" } else { "False" };
                let since = before
                    .iter()
                    .find(|condition| condition.type_ == type_ && condition.status == status)
                    .and_then(|condition| condition.last_transition_time.clone());
                NamespaceCondition {
                    type_: type_.into(),
                    status: status.into(),
                    reason: Some(if problem.is_some() { bad } else { good }.into()),
                    message: Some(problem.clone().unwrap_or_else(|| fine.into())),
                    last_transition_time: Some(since.unwrap_or_else(pods::now)),
                }
            })
            .collect()
    }
}
