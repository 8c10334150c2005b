//! What the scheduler knows of the cluster: nodes with what runs or will run on them, changed one event at a time.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

use crate::view::{NodeInfo, NodeView, PodView, Resources};

/// Nodes and the pods on them. Each node's info is shared with snapshots and copied only when it changes.
#[derive(Default)]
pub(crate) struct Cache {
    nodes: BTreeMap<String, Arc<NodeInfo>>,
    /// Pods that use a node, by uid: bound ones, and assumed ones whose binding is on its way.
    pods: HashMap<String, Arc<PodView>>,
    /// Pods seen before their node.
    homeless: HashMap<String, Vec<String>>,
}

impl Cache {
    /// Adds or changes a node; true if that may let more pods fit.
    pub(crate) fn set_node(&mut self, node: NodeView) -> bool {
        let node = Arc::new(node);
        let name = node.name.clone();
        if let Some(info) = self.nodes.get_mut(&name) {
            let before = info.node.clone();
            Arc::make_mut(info).node = node.clone();
            return before.labels != node.labels
                || before.taints != node.taints
                || before.unschedulable != node.unschedulable
                || before.allocatable != node.allocatable
                || before.max_pods != node.max_pods;
        }
        let info = NodeInfo {
            node,
            requested: Resources::default(),
            pods: 0,
            host_ports: Vec::new(),
        };
        self.nodes.insert(name.clone(), Arc::new(info));
        for uid in self.homeless.remove(&name).unwrap_or_default() {
            if let Some(pod) = self.pods.get(&uid).cloned() {
                self.charge(&name, &pod);
            }
        }
        true
    }

    /// Forgets a node; its pods are remembered until they are deleted themselves.
    pub(crate) fn remove_node(&mut self, name: &str) {
        self.nodes.remove(name);
        let orphans: Vec<String> = self
            .pods
            .values()
            .filter(|pod| pod.node_name.as_deref() == Some(name))
            .map(|pod| pod.uid.clone())
            .collect();
        if !orphans.is_empty() {
            self.homeless.insert(name.to_owned(), orphans);
        }
    }

    /// Records a pod that has a node (bound, or assumed); a second record of it replaces the first.
    pub(crate) fn set_pod(&mut self, pod: Arc<PodView>) {
        self.remove_pod(&pod.uid);
        let Some(node) = pod.node_name.clone() else {
            return;
        };
        self.pods.insert(pod.uid.clone(), pod.clone());
        if self.nodes.contains_key(&node) {
            self.charge(&node, &pod);
        } else {
            self.homeless.entry(node).or_default().push(pod.uid.clone());
        }
    }

    /// Forgets a pod; true if it used a node, so that room came free.
    pub(crate) fn remove_pod(&mut self, uid: &str) -> bool {
        let Some(pod) = self.pods.remove(uid) else {
            return false;
        };
        let Some(name) = pod.node_name.as_deref() else {
            return false;
        };
        if let Some(homeless) = self.homeless.get_mut(name) {
            homeless.retain(|other| other != uid);
        }
        let Some(info) = self.nodes.get_mut(name) else {
            return false;
        };
        let info = Arc::make_mut(info);
        info.requested.subtract(&pod.requests);
        info.pods -= 1;
        for port in &pod.host_ports {
            if let Some(at) = info.host_ports.iter().position(|used| used == port) {
                info.host_ports.swap_remove(at);
            }
        }
        true
    }

    fn charge(&mut self, node: &str, pod: &PodView) {
        let Some(info) = self.nodes.get_mut(node) else {
            return;
        };
        let info = Arc::make_mut(info);
        info.requested.add(&pod.requests);
        info.pods += 1;
        info.host_ports.extend(pod.host_ports.iter().cloned());
    }

    /// All nodes as they are now; later changes do not show in it.
    pub(crate) fn snapshot(&self) -> Vec<Arc<NodeInfo>> {
        self.nodes.values().cloned().collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use k8s_openapi::api::core::v1 as core;

    fn pod(uid: &str, node: &str, cpu: &str) -> Arc<PodView> {
        let pod: core::Pod = serde_json::from_value(serde_json::json!({
            "metadata": {"name": uid, "namespace": "default", "uid": uid},
            "spec": {"nodeName": node, "containers": [
                {"name": "c", "ports": [{"containerPort": 1, "hostPort": 80}], "resources": {"requests": {"cpu": cpu}}}]},
        }))
        .unwrap();
        Arc::new(PodView::from(&pod))
    }

    #[test]
    fn charges_are_given_back_whatever_the_order_of_events() {
        let mut cache = Cache::default();
        cache.set_pod(pod("early", "n1", "1"));
        cache.set_node(NodeView {
            name: "n1".into(),
            ..NodeView::default()
        });
        cache.set_pod(pod("late", "n1", "2"));
        cache.set_pod(pod("late", "n1", "2"));
        let used = |cache: &Cache| cache.snapshot()[0].requested.milli_cpu;
        assert_eq!(used(&cache), 3000);
        cache.remove_node("n1");
        cache.set_node(NodeView {
            name: "n1".into(),
            ..NodeView::default()
        });
        assert_eq!(used(&cache), 3000);
        assert!(cache.remove_pod("early"));
        assert!(cache.remove_pod("late"));
        assert!(!cache.remove_pod("late"));
        let info = &cache.snapshot()[0];
        assert_eq!(
            (info.requested.milli_cpu, info.pods, info.host_ports.len()),
            (0, 0, 0)
        );
    }
}
