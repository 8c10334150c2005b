//! Small typed views of Pods and Nodes: just what scheduling decides on.

use std::collections::BTreeMap;
use std::sync::Arc;

use k8s_openapi::api::core::v1 as core;
use xebec_schema::quantity::Quantity;

/// Amounts of resources in their smallest unit: CPU in milli-cores, all others in units.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Resources {
    /// CPU in thousandths of a core.
    pub milli_cpu: i64,
    /// Memory in bytes.
    pub memory: i64,
    /// Ephemeral storage in bytes.
    pub ephemeral_storage: i64,
    /// Extended resources by name, in units.
    pub scalar: BTreeMap<String, i64>,
}

impl Resources {
    /// Reads a `ResourceList`; entries that are no quantity count as nothing (the API server refuses them).
    pub fn from_list<'a, Q: AsRef<str> + 'a>(
        list: impl IntoIterator<Item = (&'a String, Q)>,
    ) -> Self {
        let mut sum = Self::default();
        for (name, quantity) in list {
            let Ok(quantity) = Quantity::parse(quantity.as_ref()) else {
                continue;
            };
            match name.as_str() {
                "cpu" => sum.milli_cpu = quantity.milli_value(),
                "memory" => sum.memory = quantity.value(),
                "ephemeral-storage" => sum.ephemeral_storage = quantity.value(),
                "pods" => {}
                _ => {
                    sum.scalar.insert(name.clone(), quantity.value());
                }
            }
        }
        sum
    }

    /// Adds another amount.
    pub fn add(&mut self, other: &Self) {
        self.milli_cpu += other.milli_cpu;
        self.memory += other.memory;
        self.ephemeral_storage += other.ephemeral_storage;
        for (name, amount) in &other.scalar {
            *self.scalar.entry(name.clone()).or_default() += amount;
        }
    }

    /// Takes another amount away.
    pub fn subtract(&mut self, other: &Self) {
        self.milli_cpu -= other.milli_cpu;
        self.memory -= other.memory;
        self.ephemeral_storage -= other.ephemeral_storage;
        for (name, amount) in &other.scalar {
            *self.scalar.entry(name.clone()).or_default() -= amount;
        }
    }

    /// Raises each amount to at least the other's.
    fn raise_to(&mut self, other: &Self) {
        self.milli_cpu = self.milli_cpu.max(other.milli_cpu);
        self.memory = self.memory.max(other.memory);
        self.ephemeral_storage = self.ephemeral_storage.max(other.ephemeral_storage);
        for (name, amount) in &other.scalar {
            let mine = self.scalar.entry(name.clone()).or_default();
            *mine = (*mine).max(*amount);
        }
    }
}

/// A Pod as the scheduler sees it.
#[derive(Clone, Debug)]
pub struct PodView {
    /// `metadata.namespace`.
    pub namespace: String,
    /// `metadata.name`.
    pub name: String,
    /// `metadata.uid`.
    pub uid: String,
    /// `spec.nodeName`, where it is bound.
    pub node_name: Option<String>,
    /// `spec.priority`.
    pub priority: i32,
    /// What the pod asks for, init containers and overhead counted as upstream does.
    pub requests: Resources,
    /// `spec.nodeSelector`.
    pub node_selector: BTreeMap<String, String>,
    /// `spec.affinity.nodeAffinity`.
    pub node_affinity: Option<Box<core::NodeAffinity>>,
    /// `spec.tolerations`.
    pub tolerations: Vec<core::Toleration>,
    /// Host ports asked for, as (protocol, address, port).
    pub host_ports: Vec<(String, String, i32)>,
    /// `spec.schedulingGates` is not empty.
    pub gated: bool,
    /// `spec.schedulerName`.
    pub scheduler_name: String,
    /// Succeeded, Failed: it uses nothing any more.
    pub finished: bool,
    /// `metadata.deletionTimestamp` is set.
    pub terminating: bool,
}

impl PodView {
    /// `namespace/name`.
    pub fn key(&self) -> String {
        format!("{}/{}", self.namespace, self.name)
    }
}

impl From<&core::Pod> for PodView {
    fn from(pod: &core::Pod) -> Self {
        let spec = pod.spec.as_ref();
        let phase = pod
            .status
            .as_ref()
            .and_then(|status| status.phase.as_deref());
        Self {
            namespace: pod.metadata.namespace.clone().unwrap_or_default(),
            name: pod.metadata.name.clone().unwrap_or_default(),
            uid: pod.metadata.uid.clone().unwrap_or_default(),
            node_name: spec
                .and_then(|s| s.node_name.clone())
                .filter(|name| !name.is_empty()),
            priority: spec.and_then(|s| s.priority).unwrap_or(0),
            requests: spec.map(pod_requests).unwrap_or_default(),
            node_selector: spec
                .and_then(|s| s.node_selector.clone())
                .unwrap_or_default(),
            node_affinity: spec
                .and_then(|s| s.affinity.as_ref())
                .and_then(|affinity| affinity.node_affinity.clone())
                .map(Box::new),
            tolerations: spec.and_then(|s| s.tolerations.clone()).unwrap_or_default(),
            host_ports: spec.map(host_ports).unwrap_or_default(),
            gated: spec
                .and_then(|s| s.scheduling_gates.as_ref())
                .is_some_and(|gates| !gates.is_empty()),
            scheduler_name: spec
                .and_then(|s| s.scheduler_name.clone())
                .unwrap_or_default(),
            finished: matches!(phase, Some("Succeeded" | "Failed")),
            terminating: pod.metadata.deletion_timestamp.is_some(),
        }
    }
}

/// The effective request: the larger of the sum of the containers and each init step, with
/// restartable init containers running beside all that follows them, plus overhead (KEP-753).
fn pod_requests(spec: &core::PodSpec) -> Resources {
    let container = |c: &core::Container| {
        let list = c.resources.as_ref().and_then(|r| r.requests.as_ref());
        Resources::from_list(
            list.into_iter()
                .flatten()
                .map(|(name, quantity)| (name, &quantity.0)),
        )
    };
    let mut sum = Resources::default();
    spec.containers.iter().for_each(|c| sum.add(&container(c)));
    let (mut sidecars, mut peak) = (Resources::default(), Resources::default());
    for init in spec.init_containers.iter().flatten() {
        let mut step = container(init);
        if init.restart_policy.as_deref() == Some("Always") {
            sidecars.add(&step);
            step = sidecars.clone();
        } else {
            step.add(&sidecars);
        }
        peak.raise_to(&step);
    }
    sum.add(&sidecars);
    sum.raise_to(&peak);
    let overhead = spec
        .overhead
        .iter()
        .flatten()
        .map(|(name, quantity)| (name, &quantity.0));
    sum.add(&Resources::from_list(overhead));
    sum
}

fn host_ports(spec: &core::PodSpec) -> Vec<(String, String, i32)> {
    spec.containers
        .iter()
        .flat_map(|c| c.ports.iter().flatten())
        .filter_map(|port| {
            let number = port.host_port.filter(|number| *number > 0)?;
            let address = port
                .host_ip
                .clone()
                .filter(|ip| !ip.is_empty())
                .unwrap_or_else(|| "0.0.0.0".into());
            Some((
                port.protocol.clone().unwrap_or_else(|| "TCP".into()),
                address,
                number,
            ))
        })
        .collect()
}

/// A Node as the scheduler sees it, without what runs on it.
#[derive(Clone, Debug, Default)]
pub struct NodeView {
    /// `metadata.name`.
    pub name: String,
    /// `metadata.labels`.
    pub labels: BTreeMap<String, String>,
    /// `spec.unschedulable`.
    pub unschedulable: bool,
    /// `spec.taints`.
    pub taints: Vec<core::Taint>,
    /// `status.allocatable`.
    pub allocatable: Resources,
    /// `status.allocatable.pods`.
    pub max_pods: i64,
}

impl From<&core::Node> for NodeView {
    fn from(node: &core::Node) -> Self {
        let spec = node.spec.as_ref();
        let allocatable = node
            .status
            .as_ref()
            .and_then(|status| status.allocatable.as_ref());
        Self {
            name: node.metadata.name.clone().unwrap_or_default(),
            labels: node.metadata.labels.clone().unwrap_or_default(),
            unschedulable: spec.and_then(|s| s.unschedulable).unwrap_or(false),
            taints: spec.and_then(|s| s.taints.clone()).unwrap_or_default(),
            allocatable: Resources::from_list(
                allocatable.into_iter().flatten().map(|(n, q)| (n, &q.0)),
            ),
            max_pods: allocatable
                .and_then(|list| list.get("pods"))
                .and_then(|quantity| Quantity::parse(&quantity.0).ok())
                .map_or(0, |quantity| quantity.value()),
        }
    }
}

/// A node with what runs on it; cheap to clone into a snapshot.
#[derive(Clone, Debug)]
pub struct NodeInfo {
    /// The node itself.
    pub node: Arc<NodeView>,
    /// What its pods ask for.
    pub requested: Resources,
    /// How many pods it has.
    pub pods: i64,
    /// Host ports in use.
    pub host_ports: Vec<(String, String, i32)>,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn init_containers_raise_the_request_and_sidecars_add_to_it() {
        let pod: core::Pod = serde_json::from_value(serde_json::json!({
            "metadata": {"name": "p"},
            "spec": {
                "initContainers": [
                    {"name": "side", "restartPolicy": "Always", "resources": {"requests": {"cpu": "100m"}}},
                    {"name": "big", "resources": {"requests": {"cpu": "2", "memory": "1Gi"}}},
                ],
                "containers": [{"name": "a", "resources": {"requests": {"cpu": "500m"}}},
                               {"name": "b", "resources": {"requests": {"cpu": "250m", "memory": "64Mi"}}}],
                "overhead": {"cpu": "10m"},
            },
        }))
        .unwrap();
        let view = PodView::from(&pod);
        assert_eq!(
            view.requests.milli_cpu, 2110,
            "2 cores of the init step beside the sidecar, plus overhead"
        );
        assert_eq!(view.requests.memory, 1 << 30);
    }
}
