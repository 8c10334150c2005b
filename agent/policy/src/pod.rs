//! What of a Pod policy looks at.

use std::net::IpAddr;

use k8s_openapi::api::core::v1::Pod;

use crate::kind::{Kind, Relevant};
use crate::network_policy::protocol;
use crate::object::{AUDIT, OBSERVE_HTTP};
use crate::rule::Name;
use crate::selector::Labels;

/// What of a Pod is needed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PodView {
    /// Its kind, with all of its labels; none for a pod of the host's network, and for one that has ended.
    pub kind: Option<Kind>,
    /// Its addresses.
    pub addresses: Vec<IpAddr>,
    /// Kind and name of its controller.
    pub workload: Option<(String, String)>,
    /// Whether what its policies would drop is told alone.
    pub audit: bool,
    /// Whether flows tell of the HTTP that it speaks.
    pub reads_http: bool,
    /// The node that it runs on.
    pub node: String,
    /// Its `metadata.uid`.
    pub uid: Option<String>,
}

/// Its namespace and name.
pub fn name(pod: &Pod) -> Name {
    (
        pod.metadata.namespace.clone().unwrap_or_default(),
        pod.metadata.name.clone().unwrap_or_default(),
    )
}

/// Looks at a Pod.
pub fn view(pod: &Pod) -> PodView {
    let (spec, status) = (pod.spec.as_ref(), pod.status.as_ref());
    let host_network = spec.and_then(|spec| spec.host_network).unwrap_or(false);
    let finished = status
        .and_then(|status| status.phase.as_deref())
        .is_some_and(|phase| phase == "Succeeded" || phase == "Failed");
    let containers = spec.into_iter().flat_map(|spec| {
        // Sidecars' ports count as well; those of other init containers are nobody's once the pod serves.
        let before = spec.init_containers.iter().flatten();
        let sidecars = before.filter(|one| one.restart_policy.as_deref() == Some("Always"));
        spec.containers.iter().chain(sidecars)
    });
    let ports = containers
        .flat_map(|container| container.ports.iter().flatten())
        .filter_map(|port| {
            let number = u16::try_from(port.container_port).ok()?;
            let protocol = protocol(port.protocol.as_deref()).ok()?;
            Some((port.name.clone()?, protocol, number))
        });
    let addresses = status
        .into_iter()
        .flat_map(|status| status.pod_ips.iter().flatten())
        .filter_map(|ip| ip.ip.parse().ok());
    let owners = pod.metadata.owner_references.iter().flatten();
    let mut owners = owners.filter(|owner| owner.controller == Some(true));
    // A pod of the host's network is the node; the address of a finished pod may be another's by now.
    let own = !host_network && !finished;
    let annotations = pod.metadata.annotations.as_ref();
    let has =
        |key| annotations.is_some_and(|all| all.get(key).is_some_and(|value| value == "true"));
    PodView {
        kind: own.then(|| Kind {
            namespace: pod.metadata.namespace.clone().unwrap_or_default(),
            service_account: spec
                .and_then(|spec| spec.service_account_name.clone())
                .unwrap_or_default(),
            labels: pod.metadata.labels.clone().unwrap_or_default(),
            ports: ports.collect(),
        }),
        addresses: if own { addresses.collect() } else { Vec::new() },
        workload: owners
            .next()
            .map(|owner| workload(&owner.kind, &owner.name, pod.metadata.labels.as_ref())),
        audit: has(AUDIT),
        reads_http: has(OBSERVE_HTTP),
        node: spec
            .and_then(|spec| spec.node_name.clone())
            .unwrap_or_default(),
        uid: pod.metadata.uid.clone(),
    }
}

/// Who made a pod's controller, as far as names tell: the pods of a Deployment have a ReplicaSet's name without their
/// hash, those of a CronJob a Job's without the minute.
fn workload(kind: &str, name: &str, labels: Option<&Labels>) -> (String, String) {
    let hash = labels.and_then(|labels| labels.get("pod-template-hash"));
    let above = match (kind, hash, name.rsplit_once('-')) {
        ("ReplicaSet", Some(hash), Some((deployment, last))) if last == hash => {
            Some(("Deployment", deployment))
        }
        ("Job", _, Some((job, minute)))
            if (8..=10).contains(&minute.len())
                && minute.bytes().all(|digit| digit.is_ascii_digit()) =>
        {
            Some(("CronJob", job))
        }
        _ => None,
    };
    let (kind, name) = above.unwrap_or((kind, name));
    (kind.to_owned(), name.to_owned())
}

/// A kind without the labels that do not count, but for those that policies ask for.
pub fn relevant(mut kind: Kind, labels: &Relevant, asked: impl Fn(&str) -> bool) -> Kind {
    kind.labels.retain(|key, _| labels.has(key) || asked(key));
    kind
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pods_are_called_by_who_made_their_controllers() {
        let labels = Labels::from([("pod-template-hash".to_owned(), "56df9bc644".to_owned())]);
        for (kind, name, wanted) in [
            ("ReplicaSet", "web-56df9bc644", ("Deployment", "web")),
            ("ReplicaSet", "web-other", ("ReplicaSet", "web-other")),
            ("Job", "backup-29384756", ("CronJob", "backup")),
            ("Job", "backup-1", ("Job", "backup-1")),
            ("Job", "backup-2938475a", ("Job", "backup-2938475a")),
            ("DaemonSet", "agent", ("DaemonSet", "agent")),
        ] {
            let (kind, name) = workload(kind, name, Some(&labels));
            assert_eq!((kind.as_str(), name.as_str()), wanted);
        }
        let bare = workload("ReplicaSet", "web-56df9bc644", None);
        assert_eq!(bare.0, "ReplicaSet");
    }
}
