//! Node lifecycle: nodes whose lease is not renewed are lost; taints follow conditions; pods leave nodes they don't tolerate.

mod taints;

use std::collections::{HashMap, HashSet};
use std::fmt;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::Context;
use k8s_openapi::api::core::v1::{Node, Pod};
use k8s_openapi::jiff::Timestamp;
use kube::ResourceExt;
use kube::api::{Api, DeleteParams, Patch, PatchParams, Preconditions};
use kube::runtime::events::EventType;
use serde_json::json;
use tokio_util::sync::CancellationToken;
use tracing::info;

use crate::Config;
use crate::cluster::{Cluster, Teller, is_code};
use crate::informer::Key;
use crate::pods::{self, is_ready, is_terminating, node_name};
use crate::queue::{Again, Queue};

/// What is looked at.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
enum Work {
    Node(String),
    Pod(Key),
}

impl fmt::Display for Work {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Node(name) => write!(f, "node {name}"),
            Self::Pod(key) => write!(f, "pod {key}"),
        }
    }
}

/// When each node gave its last sign of life, by our own clock: theirs may be wrong.
#[derive(Default)]
struct Heard(Mutex<HashMap<String, Instant>>);

impl Heard {
    fn now(&self, node: &str) {
        self.lock().insert(node.into(), Instant::now());
    }
    fn forget(&self, node: &str) {
        self.lock().remove(node);
    }
    /// How long the node has been silent; one that was never heard of begins now.
    fn silence(&self, node: &str) -> Duration {
        self.lock()
            .entry(node.into())
            .or_insert_with(Instant::now)
            .elapsed()
    }
    fn lock(&self) -> std::sync::MutexGuard<'_, HashMap<String, Instant>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

struct Controller {
    cluster: Arc<Cluster>,
    heard: Arc<Heard>,
    grace: Duration,
    queue: Arc<Queue<Work>>,
    /// Nodes that have a timer running.
    armed: Arc<Mutex<HashSet<String>>>,
    teller: Teller,
}

/// Registers with the watches and gives the loop.
pub(crate) fn start(
    cluster: &Arc<Cluster>,
    config: &Config,
    shutdown: CancellationToken,
) -> impl Future<Output = anyhow::Result<()>> + Send + 'static {
    let queue = Queue::new();
    let heard = Arc::new(Heard::default());
    let (wake, ears, weak) = (queue.clone(), heard.clone(), Arc::downgrade(cluster));
    cluster.nodes.on_change(move |old, new| {
        let Some(node) = new else {
            if let Some(old) = old {
                ears.forget(&old.name_any());
            }
            return;
        };
        let name = node.name_any();
        let heartbeat = |node: &Arc<Node>| {
            taints::condition(node, "Ready").and_then(|ready| ready.last_heartbeat_time.clone())
        };
        if old.is_none_or(|old| heartbeat(old) != heartbeat(node)) {
            ears.now(&name);
        }
        let no_execute = taints::no_execute(node);
        if old.is_none_or(|old| taints::no_execute(old) != no_execute)
            && !no_execute.is_empty()
            && let Some(cluster) = weak.upgrade()
        {
            for pod in cluster.pods.all() {
                if node_name(&pod) == Some(name.as_str()) {
                    wake.add(Work::Pod(Key::of(pod.as_ref())));
                }
            }
        }
        wake.add(Work::Node(name));
    });
    let (wake, ears, weak) = (queue.clone(), heard.clone(), Arc::downgrade(cluster));
    cluster.leases.on_change(move |old, new| {
        let Some(lease) = new else { return };
        let renewed = |lease: &k8s_openapi::api::coordination::v1::Lease| {
            lease.spec.as_ref().and_then(|spec| spec.renew_time.clone())
        };
        if old.is_some_and(|old| renewed(old) == renewed(lease)) {
            return;
        }
        let name = lease.name_any();
        ears.now(&name);
        // A node that was lost is looked at when its status comes; until then there is nothing to do.
        let Some(cluster) = weak.upgrade() else {
            return;
        };
        if old.is_none() && cluster.nodes.get(&Key::new("", &name)).is_some() {
            wake.add(Work::Node(name));
        }
    });
    let (wake, weak) = (queue.clone(), Arc::downgrade(cluster));
    cluster.pods.on_change(move |_, new| {
        let (Some(pod), Some(cluster)) = (new, weak.upgrade()) else {
            return;
        };
        let Some(node) = node_name(pod).and_then(|node| cluster.nodes.get(&Key::new("", node)))
        else {
            return;
        };
        if !is_terminating(pod) && !taints::no_execute(&node).is_empty() {
            wake.add(Work::Pod(Key::of(pod.as_ref())));
        }
    });
    let controller = Arc::new(Controller {
        cluster: cluster.clone(),
        heard,
        grace: config.node_monitor_grace_period,
        queue: queue.clone(),
        armed: Arc::default(),
        teller: Teller::new(cluster.client.clone(), "node-controller"),
    });
    async move {
        controller.cluster.nodes.synced().await;
        controller.cluster.leases.synced().await;
        controller.cluster.pods.synced().await;
        queue
            .run("node lifecycle", 5, shutdown, |work| {
                let controller = controller.clone();
                async move {
                    match work {
                        Work::Node(name) => controller.node(&name).await,
                        Work::Pod(key) => controller.pod(&key).await,
                    }
                }
            })
            .await;
        Ok(())
    }
}

impl Controller {
    async fn node(&self, name: &str) -> anyhow::Result<Again> {
        let Some(mut node) = self.cluster.nodes.get(&Key::new("", name)) else {
            return Ok(None);
        };
        let silence = self.heard.silence(name);
        let mut again = Some(
            self.grace
                .saturating_sub(silence)
                .max(Duration::from_millis(10)),
        );
        let status =
            |node: &Node| taints::condition(node, "Ready").map(|ready| ready.status.clone());
        if silence >= self.grace {
            // Until it is heard of again; its next status wakes us.
            again = None;
            if status(&node).as_deref() != Some("Unknown") {
                info!(node = name, ?silence, "the node stopped renewing its lease");
                self.teller.tell(
                    node.as_ref(),
                    EventType::Normal,
                    "NodeNotReady",
                    format!("Node {name} status is now: NodeNotReady"),
                );
                node = Arc::new(self.lose(&node).await?);
            }
        }
        if let Some(wanted) = taints::wanted(&node) {
            let patch = json!({
                "metadata": {"resourceVersion": node.metadata.resource_version},
                "spec": {"taints": wanted},
            });
            let api = Api::<Node>::all(self.cluster.client.clone());
            let written = api
                .patch(name, &PatchParams::default(), &Patch::Merge(patch))
                .await
                .context("could not write the taints")?;
            self.cluster.nodes.note(written);
        }
        if matches!(status(&node).as_deref(), Some("False" | "Unknown")) {
            self.unready_pods(name).await?;
        }
        // One timer per node is enough.
        if let Some(wait) = again {
            self.arm(name, wait);
        }
        Ok(None)
    }

    /// Looks at the node again when it could be lost at the earliest.
    fn arm(&self, name: &str, wait: Duration) {
        // Reconciles between arm no second one: the timer finds out how long it still has.
        let armed = self
            .armed
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .insert(name.to_owned());
        if !armed {
            return;
        }
        let (timers, queue) = (self.armed.clone(), Arc::downgrade(&self.queue));
        let name = name.to_owned();
        tokio::spawn(async move {
            tokio::time::sleep(wait).await;
            if let Some(queue) = queue.upgrade() {
                timers
                    .lock()
                    .unwrap_or_else(PoisonError::into_inner)
                    .remove(&name);
                queue.add(Work::Node(name));
            }
        });
    }

    /// Nothing is known of the node any more: its conditions say so.
    async fn lose(&self, node: &Node) -> anyhow::Result<Node> {
        let now = pods::now();
        let conditions: Vec<_> = ["Ready", "MemoryPressure", "DiskPressure", "PIDPressure"]
            .into_iter()
            .map(|type_| match taints::condition(node, type_) {
                Some(known) => json!({
                    "type": type_, "status": "Unknown", "reason": "NodeStatusUnknown",
                    "message": "Kubelet stopped posting node status.",
                    "lastHeartbeatTime": known.last_heartbeat_time, "lastTransitionTime": now,
                }),
                None => json!({
                    "type": type_, "status": "Unknown", "reason": "NodeStatusNeverUpdated",
                    "message": "Kubelet never posted node status.",
                    "lastHeartbeatTime": node.metadata.creation_timestamp, "lastTransitionTime": now,
                }),
            })
            .collect();
        // The resourceVersion: a status that the kubelet posts at this moment wins.
        let patch = json!({
            "metadata": {"resourceVersion": node.metadata.resource_version},
            "status": {"conditions": conditions},
        });
        let api = Api::<Node>::all(self.cluster.client.clone());
        let written = api
            .patch_status(
                &node.name_any(),
                &PatchParams::default(),
                &Patch::Strategic(patch),
            )
            .await
            .context("could not write the conditions")?;
        self.cluster.nodes.note(written.clone());
        Ok(written)
    }

    /// Nobody else can say that the pods of a lost node are not ready; Services must stop sending to them.
    async fn unready_pods(&self, node: &str) -> anyhow::Result<()> {
        for pod in self.cluster.pods.all() {
            if node_name(&pod) != Some(node) || !is_ready(&pod) {
                continue;
            }
            let patch = json!({"metadata": {"uid": pod.metadata.uid}, "status": {"conditions": [{
                "type": "Ready", "status": "False", "reason": "NodeNotReady",
                "message": "the node of the pod is not ready", "lastTransitionTime": pods::now(),
            }]}});
            let api = Api::<Pod>::namespaced(
                self.cluster.client.clone(),
                &pod.namespace().unwrap_or_default(),
            );
            match api
                .patch_status(
                    &pod.name_any(),
                    &PatchParams::default(),
                    &Patch::Strategic(patch),
                )
                .await
            {
                Ok(written) => self.cluster.pods.note(written),
                Err(error) if is_code(&error, 404) || is_code(&error, 409) => {}
                Err(error) => return Err(error).context("could not mark a pod as not ready"),
            }
        }
        Ok(())
    }

    /// Evicts a pod whose time on its node is over.
    async fn pod(&self, key: &Key) -> anyhow::Result<Again> {
        let Some(pod) = self
            .cluster
            .pods
            .get(key)
            .filter(|pod| !is_terminating(pod))
        else {
            return Ok(None);
        };
        let Some(node) =
            node_name(&pod).and_then(|node| self.cluster.nodes.get(&Key::new("", node)))
        else {
            return Ok(None);
        };
        let tolerations = pod
            .spec
            .as_ref()
            .and_then(|spec| spec.tolerations.as_deref())
            .unwrap_or(&[]);
        match taints::stay(&taints::no_execute(&node), tolerations, Timestamp::now()) {
            taints::Stay::ForEver => return Ok(None),
            taints::Stay::For(wait) if !wait.is_zero() => return Ok(Some(wait)),
            taints::Stay::For(_) => {}
        }
        let note = format!("Marking for deletion Pod {key}");
        self.teller.tell(
            pod.as_ref(),
            EventType::Normal,
            "TaintManagerEviction",
            note,
        );
        let patch = json!({"metadata": {"uid": pod.metadata.uid}, "status": {"conditions": [{
            "type": "DisruptionTarget", "status": "True", "reason": "DeletionByTaintManager",
            "message": "Taint manager: deleting due to NoExecute taint", "lastTransitionTime": pods::now(),
        }]}});
        let api = Api::<Pod>::namespaced(self.cluster.client.clone(), &key.namespace);
        match api
            .patch_status(&key.name, &PatchParams::default(), &Patch::Strategic(patch))
            .await
        {
            Ok(_) => {}
            Err(error) if is_code(&error, 404) => return Ok(None),
            Err(error) => {
                return Err(error).context("could not write the DisruptionTarget condition");
            }
        }
        let params = DeleteParams::default().preconditions(Preconditions {
            uid: pod.metadata.uid.clone(),
            resource_version: None,
        });
        match api.delete(&key.name, &params).await {
            Ok(_) => Ok(None),
            Err(error) if is_code(&error, 404) || is_code(&error, 409) => Ok(None),
            Err(error) => Err(error).context("could not evict the pod"),
        }
    }
}
