//! EndpointSlice: the addresses behind each Service that has a selector.

mod slices;

use std::sync::Arc;

use anyhow::Context;
use k8s_openapi::api::core::v1::{Node, Pod, Service};
use k8s_openapi::api::discovery::v1::EndpointSlice;
use kube::ResourceExt;
use kube::api::{Api, DeleteParams, PostParams, Preconditions};
use tokio_util::sync::CancellationToken;

use crate::cluster::{Cluster, is_code, is_namespace_terminating};
use crate::informer::Key;
use crate::pods;
use crate::queue::{Again, Queue};

use slices::SERVICE_NAME;

/// Registers with the watches and gives the loop.
pub(crate) fn start(
    cluster: &Arc<Cluster>,
    shutdown: CancellationToken,
) -> impl Future<Output = anyhow::Result<()>> + Send + 'static {
    let queue = Queue::new();
    let wake = queue.clone();
    cluster.services.on_change(move |old, new| {
        if let Some(service) = new.or(old) {
            wake.add(Key::of(service.as_ref()));
        }
    });
    let wake = queue.clone();
    cluster.endpoint_slices.on_change(move |old, new| {
        // Somebody else's change is put right; the answers to our own writes find nothing to do.
        for slice in [old, new].into_iter().flatten() {
            if slices::is_ours(slice)
                && let Some(service) = slice.labels().get(SERVICE_NAME)
            {
                wake.add(Key::new(&slice.namespace().unwrap_or_default(), service));
            }
        }
    });
    let (wake, weak) = (queue.clone(), Arc::downgrade(cluster));
    cluster.pods.on_change(move |old, new| {
        let Some(cluster) = weak.upgrade() else {
            return;
        };
        let Some(pod) = new.or(old) else { return };
        if let (Some(old), Some(new)) = (old, new)
            && !matters(old, new)
        {
            return;
        }
        for service in cluster
            .services
            .in_namespace(&pod.namespace().unwrap_or_default())
        {
            let selected = |pod: &Arc<Pod>| slices::selects(&service, pod);
            if old.is_some_and(selected) || new.is_some_and(selected) {
                wake.add(Key::of(service.as_ref()));
            }
        }
    });
    let (wake, weak) = (queue.clone(), Arc::downgrade(cluster));
    cluster.nodes.on_change(move |old, new| {
        let zone = |node: &Arc<Node>| slices::zone(node).map(str::to_owned);
        if old.and_then(zone) == new.and_then(zone) {
            return;
        }
        if let Some(cluster) = weak.upgrade() {
            cluster
                .services
                .all()
                .iter()
                .for_each(|service| wake.add(Key::of(service.as_ref())));
        }
    });
    let controller = Arc::new(Controller {
        cluster: cluster.clone(),
    });
    async move {
        let cluster = &controller.cluster;
        cluster.pods.synced().await;
        cluster.services.synced().await;
        cluster.endpoint_slices.synced().await;
        cluster.nodes.synced().await;
        queue
            .run("endpoint slice", 5, shutdown, |key| {
                let controller = controller.clone();
                async move { controller.reconcile(&key).await }
            })
            .await;
        Ok(())
    }
}

/// Whether the change of a pod can change an endpoint.
fn matters(old: &Pod, new: &Pod) -> bool {
    let ips = |pod: &Pod| {
        pod.status
            .as_ref()
            .and_then(|status| status.pod_ips.clone())
    };
    pods::is_ready(old) != pods::is_ready(new)
        || pods::is_terminating(old) != pods::is_terminating(new)
        || pods::is_finished(old) != pods::is_finished(new)
        || old.labels() != new.labels()
        || old.metadata.uid != new.metadata.uid
        || pods::node_name(old) != pods::node_name(new)
        || ips(old) != ips(new)
        || old
            .status
            .as_ref()
            .and_then(|status| status.pod_ip.as_ref())
            != new
                .status
                .as_ref()
                .and_then(|status| status.pod_ip.as_ref())
}

struct Controller {
    cluster: Arc<Cluster>,
}

impl Controller {
    async fn reconcile(&self, key: &Key) -> anyhow::Result<Again> {
        let cluster = &self.cluster;
        // A Service's slices go with it by garbage collection.
        let Some(service) = cluster.services.get(key) else {
            return Ok(None);
        };
        if service.metadata.deletion_timestamp.is_some() || !slices::has_selector(&service) {
            return Ok(None);
        }
        let existing: Vec<Arc<EndpointSlice>> = cluster
            .endpoint_slices
            .in_namespace(&key.namespace)
            .into_iter()
            .filter(|slice| {
                slices::is_ours(slice) && slice.labels().get(SERVICE_NAME) == Some(&key.name)
            })
            .collect();
        let pods = cluster.pods.in_namespace(&key.namespace);
        let zone = |node: &str| -> Option<String> {
            let node = cluster.nodes.get(&Key::new("", node))?;
            slices::zone(&node).map(str::to_owned)
        };
        let plan = slices::plan(&service, &pods, &existing, zone);
        self.carry_out(&service, plan).await
    }

    async fn carry_out(&self, service: &Service, plan: slices::Plan) -> anyhow::Result<Again> {
        let namespace = service.namespace().unwrap_or_default();
        let informer = &self.cluster.endpoint_slices;
        let api = Api::<EndpointSlice>::namespaced(self.cluster.client.clone(), &namespace);
        // New addresses first, so that a move between slices shows no gap.
        for slice in &plan.create {
            match api.create(&PostParams::default(), slice).await {
                Ok(created) => informer.note(created),
                Err(error) if is_namespace_terminating(&error) => return Ok(None),
                Err(error) => return Err(error).context("could not create an endpoint slice"),
            }
        }
        for slice in &plan.update {
            // It carries the resourceVersion that it was made from: what somebody else changed meanwhile is not lost.
            let written = api
                .replace(&slice.name_any(), &PostParams::default(), slice)
                .await
                .with_context(|| format!("could not update endpoint slice {}", slice.name_any()))?;
            informer.note(written);
        }
        for slice in &plan.delete {
            let params = DeleteParams::default().preconditions(Preconditions {
                uid: slice.metadata.uid.clone(),
                resource_version: None,
            });
            match api.delete(&slice.name_any(), &params).await {
                Ok(_) => informer.note_gone(slice),
                Err(error) if is_code(&error, 404) || is_code(&error, 409) => {}
                Err(error) => return Err(error).context("could not delete an endpoint slice"),
            }
        }
        Ok(None)
    }
}
