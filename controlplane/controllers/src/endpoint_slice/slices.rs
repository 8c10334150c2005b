//! Which slices a Service should have, and the fewest changes from the ones that it has.

use std::collections::{BTreeMap, HashMap};
use std::net::IpAddr;
use std::sync::Arc;

use k8s_openapi::api::core::v1::{Node, ObjectReference, Pod, Service, ServicePort};
use k8s_openapi::api::discovery::v1::{Endpoint, EndpointConditions, EndpointPort, EndpointSlice};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;
use kube::ResourceExt;

use crate::pods;
use crate::refs::controller_ref;

pub(super) const SERVICE_NAME: &str = "kubernetes.io/service-name";
const MANAGED_BY: &str = "endpointslice.kubernetes.io/managed-by";
const OURS: &str = "endpointslice-controller.k8s.io";
const HEADLESS: &str = "service.kubernetes.io/headless";
/// Endpoints of one slice at most (kube-controller-manager's `--max-endpoints-per-slice`).
const FULL: usize = 100;

/// What to write.
#[derive(Debug, Default)]
pub(super) struct Plan {
    pub create: Vec<EndpointSlice>,
    pub update: Vec<EndpointSlice>,
    pub delete: Vec<Arc<EndpointSlice>>,
}

pub(super) fn is_ours(slice: &EndpointSlice) -> bool {
    slice.labels().get(MANAGED_BY).map(String::as_str) == Some(OURS)
}

fn selector(service: &Service) -> Option<&BTreeMap<String, String>> {
    let spec = service.spec.as_ref()?;
    if spec.type_.as_deref() == Some("ExternalName") {
        return None;
    }
    spec.selector
        .as_ref()
        .filter(|selector| !selector.is_empty())
}

pub(super) fn has_selector(service: &Service) -> bool {
    selector(service).is_some()
}

pub(super) fn selects(service: &Service, pod: &Pod) -> bool {
    selector(service).is_some_and(|selector| {
        selector
            .iter()
            .all(|(name, value)| pod.labels().get(name) == Some(value))
    })
}

pub(super) fn zone(node: &Node) -> Option<&str> {
    node.labels()
        .get("topology.kubernetes.io/zone")
        .map(String::as_str)
}

/// Endpoints that share a slice have the same address family and the same ports.
type Group = (String, Vec<EndpointPort>);

/// Compares what is there with what should be.
pub(super) fn plan(
    service: &Service,
    pods: &[Arc<Pod>],
    existing: &[Arc<EndpointSlice>],
    zone: impl Fn(&str) -> Option<String>,
) -> Plan {
    let families = families(service);
    let mut groups: Vec<(Group, Vec<Endpoint>)> = Vec::new();
    for pod in pods
        .iter()
        .filter(|pod| selects(service, pod) && !pods::is_finished(pod))
    {
        let ports = ports(service, pod);
        for family in &families {
            let Some(address) = address(pod, family) else {
                continue;
            };
            let group = (family.clone(), ports.clone());
            let endpoint = endpoint(service, pod, address, &zone);
            match groups.iter_mut().find(|(known, _)| *known == group) {
                Some((_, endpoints)) => endpoints.push(endpoint),
                None => groups.push((group, vec![endpoint])),
            }
        }
    }
    // A Service without a pod has one empty slice for each family, so that it can be told from one
    // that nobody has looked at yet.
    for family in &families {
        if !groups.iter().any(|((known, _), _)| known == family) {
            groups.push(((family.clone(), Vec::new()), Vec::new()));
        }
    }
    let mut plan = Plan::default();
    let mut left: Vec<&Arc<EndpointSlice>> = existing
        .iter()
        .filter(|slice| slice.metadata.deletion_timestamp.is_none())
        .collect();
    for ((family, ports), wanted) in groups {
        let (same, others): (Vec<_>, Vec<_>) = left
            .into_iter()
            .partition(|slice| slice.address_type == family && same_ports(slice, &ports));
        left = others;
        fill(service, &family, &ports, wanted, same, &mut plan);
    }
    plan.delete.extend(left.into_iter().cloned());
    plan
}

fn same_ports(slice: &EndpointSlice, ports: &[EndpointPort]) -> bool {
    slice.ports.as_deref().unwrap_or(&[]) == ports
}

/// Keeps each endpoint in the slice that it is in, puts new ones where there is room, and drops empty slices.
fn fill(
    service: &Service,
    family: &str,
    ports: &[EndpointPort],
    wanted: Vec<Endpoint>,
    slices: Vec<&Arc<EndpointSlice>>,
    plan: &mut Plan,
) {
    let empty = wanted.is_empty();
    let identity = |endpoint: &Endpoint| {
        let uid = endpoint
            .target_ref
            .as_ref()
            .and_then(|target| target.uid.clone());
        (endpoint.addresses.first().cloned(), uid)
    };
    let order: Vec<_> = wanted.iter().map(identity).collect();
    let mut missing: HashMap<_, Endpoint> = order.iter().cloned().zip(wanted).collect();
    let mut contents: Vec<(&Arc<EndpointSlice>, Vec<Endpoint>)> = slices
        .into_iter()
        .map(|slice| {
            let kept = slice.endpoints.iter().flatten();
            // Taken as it should be now, which may differ from as it was.
            (
                slice,
                kept.filter_map(|endpoint| missing.remove(&identity(endpoint)))
                    .collect(),
            )
        })
        .collect();
    let mut new = order
        .iter()
        .filter_map(|identity| missing.remove(identity))
        .collect::<Vec<_>>()
        .into_iter();
    // The fullest that have room first, so that few slices change.
    contents.sort_by_key(|(_, endpoints)| std::cmp::Reverse(endpoints.len()));
    for (_, endpoints) in &mut contents {
        if !endpoints.is_empty() || empty {
            let room = FULL.saturating_sub(endpoints.len());
            endpoints.extend(new.by_ref().take(room));
        }
    }
    // Slices that lost all their endpoints are used again before new ones are made.
    for (_, endpoints) in contents
        .iter_mut()
        .filter(|(_, endpoints)| endpoints.is_empty())
    {
        endpoints.extend(new.by_ref().take(FULL));
    }
    let mut placeholder = empty;
    for (slice, endpoints) in contents {
        if endpoints.is_empty() && !std::mem::take(&mut placeholder) {
            plan.delete.push(slice.clone());
            continue;
        }
        let fresh = EndpointSlice {
            metadata: ObjectMeta {
                labels: Some(labels(service, slice.labels())),
                owner_references: Some(vec![controller_ref(service)]),
                ..slice.metadata.clone()
            },
            endpoints: Some(endpoints),
            ..EndpointSlice::clone(slice)
        };
        let as_it_is = EndpointSlice {
            endpoints: Some(slice.endpoints.clone().unwrap_or_default()),
            ..EndpointSlice::clone(slice)
        };
        if fresh != as_it_is {
            plan.update.push(fresh);
        }
    }
    let mut new = new.peekable();
    while new.peek().is_some() || placeholder {
        placeholder = false;
        plan.create.push(EndpointSlice {
            metadata: ObjectMeta {
                generate_name: Some(format!("{}-", service.name_any())),
                namespace: service.metadata.namespace.clone(),
                labels: Some(labels(service, &BTreeMap::new())),
                owner_references: Some(vec![controller_ref(service)]),
                ..ObjectMeta::default()
            },
            address_type: family.into(),
            endpoints: Some(new.by_ref().take(FULL).collect()),
            ports: Some(ports.to_vec()),
        });
    }
}

/// The Service's labels, without reserved ones, and ours.
fn labels(service: &Service, before: &BTreeMap<String, String>) -> BTreeMap<String, String> {
    let reserved = |name: &str| name == SERVICE_NAME || name == MANAGED_BY || name == HEADLESS;
    let mut labels: BTreeMap<String, String> = service
        .labels()
        .iter()
        .filter(|(name, _)| !reserved(name))
        .map(|(name, value)| (name.clone(), value.clone()))
        .collect();
    // Others may have marked the slice too.
    for (name, value) in before.iter().filter(|(name, _)| !reserved(name)) {
        labels.entry(name.clone()).or_insert_with(|| value.clone());
    }
    labels.insert(SERVICE_NAME.into(), service.name_any());
    labels.insert(MANAGED_BY.into(), OURS.into());
    if is_headless(service) {
        labels.insert(HEADLESS.into(), String::new());
    }
    labels
}

fn is_headless(service: &Service) -> bool {
    let ip = service
        .spec
        .as_ref()
        .and_then(|spec| spec.cluster_ip.as_deref());
    ip == Some("None")
}

/// The address types of the Service's families.
fn families(service: &Service) -> Vec<String> {
    let families = service
        .spec
        .as_ref()
        .and_then(|spec| spec.ip_families.clone());
    families
        .filter(|families| !families.is_empty())
        .unwrap_or_else(|| vec!["IPv4".into()])
}

fn address(pod: &Pod, family: &str) -> Option<String> {
    let status = pod.status.as_ref()?;
    let fits = |ip: &&String| {
        ip.parse()
            .is_ok_and(|ip: IpAddr| ip.is_ipv4() == (family == "IPv4"))
    };
    let ips = status.pod_ips.iter().flatten().map(|ip| &ip.ip);
    ips.chain(&status.pod_ip).find(fits).cloned()
}

/// The Service's ports with the numbers that they have in this pod.
fn ports(service: &Service, pod: &Pod) -> Vec<EndpointPort> {
    let ports = service.spec.as_ref().and_then(|spec| spec.ports.as_deref());
    let mut found: Vec<EndpointPort> = ports
        .unwrap_or(&[])
        .iter()
        .filter_map(|port| {
            Some(EndpointPort {
                name: Some(port.name.clone().unwrap_or_default()),
                port: Some(target(port, pod)?),
                protocol: Some(protocol(port.protocol.as_deref()).into()),
                app_protocol: port.app_protocol.clone(),
            })
        })
        .collect();
    found.sort_by(|a, b| a.name.cmp(&b.name));
    found
}

fn protocol(protocol: Option<&str>) -> &str {
    protocol.unwrap_or("TCP")
}

/// A number, or the container port of that name and protocol.
fn target(port: &ServicePort, pod: &Pod) -> Option<i32> {
    let name = match &port.target_port {
        None | Some(IntOrString::Int(0)) => return Some(port.port),
        Some(IntOrString::Int(number)) => return Some(*number),
        Some(IntOrString::String(name)) if name.is_empty() => return Some(port.port),
        Some(IntOrString::String(name)) => name,
    };
    let spec = pod.spec.as_ref()?;
    // Init containers that stay (sidecars) serve too.
    let sidecars = spec.init_containers.iter().flatten();
    let sidecars =
        sidecars.filter(|container| container.restart_policy.as_deref() == Some("Always"));
    spec.containers
        .iter()
        .chain(sidecars)
        .flat_map(|container| container.ports.iter().flatten())
        .find(|declared| {
            declared.name.as_ref() == Some(name)
                && protocol(declared.protocol.as_deref()) == protocol(port.protocol.as_deref())
        })
        .map(|declared| declared.container_port)
}

fn endpoint(
    service: &Service,
    pod: &Pod,
    address: String,
    zone: &impl Fn(&str) -> Option<String>,
) -> Endpoint {
    let spec = service.spec.as_ref();
    let publish = spec
        .and_then(|spec| spec.publish_not_ready_addresses)
        .unwrap_or(false);
    let serving = publish || pods::is_ready(pod);
    let terminating = pods::is_terminating(pod);
    let pod_spec = pod.spec.as_ref();
    let named =
        pod_spec.filter(|spec| spec.subdomain.as_deref() == Some(service.name_any().as_str()));
    let node_name = pods::node_name(pod).map(str::to_owned);
    Endpoint {
        addresses: vec![address],
        conditions: Some(EndpointConditions {
            ready: Some(publish || (serving && !terminating)),
            serving: Some(serving),
            terminating: Some(terminating),
        }),
        hostname: named
            .and_then(|spec| spec.hostname.clone())
            .filter(|name| !name.is_empty()),
        zone: node_name.as_deref().and_then(zone),
        node_name,
        target_ref: Some(ObjectReference {
            kind: Some("Pod".into()),
            namespace: pod.metadata.namespace.clone(),
            name: pod.metadata.name.clone(),
            uid: pod.metadata.uid.clone(),
            ..ObjectReference::default()
        }),
        ..Endpoint::default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn service(port: serde_json::Value) -> Service {
        serde_json::from_value(json!({
            "metadata": {"name": "web", "namespace": "shop", "uid": "s", "labels": {"team": "x"}},
            "spec": {"selector": {"app": "web"}, "clusterIP": "10.96.0.9", "ipFamilies": ["IPv4"],
                "ports": [{"name": "http", "port": 80, "protocol": "TCP", "targetPort": port}]},
        }))
        .unwrap()
    }

    fn pod(n: usize, ready: bool) -> Arc<Pod> {
        let status = if ready { "True" } else { "False" };
        Arc::new(
            serde_json::from_value(json!({
                "metadata": {"name": format!("web-{n}"), "namespace": "shop", "uid": format!("p{n}"), "labels": {"app": "web"}},
                "spec": {"nodeName": "n1", "containers": [{"name": "c", "ports": [{"name": "web", "containerPort": 8080}]}]},
                "status": {"phase": "Running", "podIP": format!("10.244.{}.{}", n / 250, n % 250 + 1),
                    "conditions": [{"type": "Ready", "status": status}]},
            }))
            .unwrap(),
        )
    }

    fn zones(_: &str) -> Option<String> {
        Some("z1".into())
    }

    /// What the API server would hold after the plan.
    fn apply(
        plan: Plan,
        existing: &[Arc<EndpointSlice>],
        serial: &mut usize,
    ) -> Vec<Arc<EndpointSlice>> {
        let gone: Vec<_> = plan.delete.iter().map(|slice| slice.name_any()).collect();
        let changed: Vec<_> = plan.update.iter().map(|slice| slice.name_any()).collect();
        let mut all: Vec<_> = existing
            .iter()
            .filter(|slice| {
                !gone.contains(&slice.name_any()) && !changed.contains(&slice.name_any())
            })
            .cloned()
            .collect();
        all.extend(plan.update.into_iter().map(Arc::new));
        for mut slice in plan.create {
            *serial += 1;
            slice.metadata.name = Some(format!("web-{serial}"));
            all.push(Arc::new(slice));
        }
        all
    }

    #[test]
    fn an_endpoint_says_all_that_clients_need() {
        let plan = plan(
            &service(json!("web")),
            &[pod(1, true), pod(2, false)],
            &[],
            zones,
        );
        assert_eq!(
            (plan.create.len(), plan.update.len(), plan.delete.len()),
            (1, 0, 0)
        );
        let slice = serde_json::to_value(&plan.create[0]).unwrap();
        assert_eq!(
            slice["metadata"]["labels"],
            json!({
            "kubernetes.io/service-name": "web", "team": "x",
            "endpointslice.kubernetes.io/managed-by": "endpointslice-controller.k8s.io"})
        );
        assert_eq!(slice["metadata"]["generateName"], "web-");
        assert_eq!(slice["metadata"]["ownerReferences"][0]["kind"], "Service");
        assert_eq!(slice["addressType"], "IPv4");
        assert_eq!(
            slice["ports"],
            json!([{"name": "http", "port": 8080, "protocol": "TCP"}])
        );
        assert_eq!(
            slice["endpoints"][0],
            json!({
            "addresses": ["10.244.0.2"], "nodeName": "n1", "zone": "z1",
            "conditions": {"ready": true, "serving": true, "terminating": false},
            "targetRef": {"kind": "Pod", "namespace": "shop", "name": "web-1", "uid": "p1"}})
        );
        assert_eq!(
            slice["endpoints"][1]["conditions"],
            json!({"ready": false, "serving": false, "terminating": false})
        );
    }

    #[test]
    fn a_stopping_pod_serves_but_is_not_ready() {
        let mut stopping = Pod::clone(&pod(1, true));
        stopping.metadata.deletion_timestamp = Some(pods::now());
        let plan = plan(&service(json!(8080)), &[Arc::new(stopping)], &[], zones);
        let endpoint = &plan.create[0].endpoints.as_ref().unwrap()[0];
        let conditions = endpoint.conditions.as_ref().unwrap();
        assert_eq!(
            (conditions.ready, conditions.serving, conditions.terminating),
            (Some(false), Some(true), Some(true))
        );
    }

    #[test]
    fn a_service_without_pods_has_one_empty_slice() {
        let mut serial = 0;
        let service = service(json!(8080));
        let first = apply(plan(&service, &[], &[], zones), &[], &mut serial);
        assert_eq!(first.len(), 1);
        let again = plan(&service, &[], &first, zones);
        assert!(
            again.create.is_empty() && again.update.is_empty() && again.delete.is_empty(),
            "{again:?}"
        );
    }

    /// Random pods come and go: the slices always hold exactly them, none twice, none beyond 100, and a
    /// second look changes nothing.
    #[test]
    fn slices_follow_the_pods() {
        let mut random = 88172645463325252u64;
        let mut below = |n: usize| {
            random ^= random << 13;
            random ^= random >> 7;
            random ^= random << 17;
            (random % n as u64) as usize
        };
        let service = service(json!("web"));
        let (mut serial, mut slices) = (0, Vec::new());
        for round in 0..60 {
            let count = [0, 1, 30, 250, 420][below(5)];
            let pods: Vec<_> = (0..count)
                .map(|_| below(600))
                .collect::<std::collections::BTreeSet<_>>()
                .into_iter()
                .map(|n| pod(n, below(2) == 0))
                .collect();
            slices = apply(plan(&service, &pods, &slices, zones), &slices, &mut serial);
            let mut found: Vec<_> = slices
                .iter()
                .flat_map(|slice| slice.endpoints.iter().flatten())
                .map(|endpoint| {
                    (
                        endpoint.addresses[0].clone(),
                        endpoint.conditions.as_ref().unwrap().ready,
                    )
                })
                .collect();
            let mut wanted: Vec<_> = pods
                .iter()
                .map(|pod| {
                    (
                        pod.status.as_ref().unwrap().pod_ip.clone().unwrap(),
                        Some(pods::is_ready(pod)),
                    )
                })
                .collect();
            found.sort();
            wanted.sort();
            assert_eq!(found, wanted, "round {round}");
            assert!(
                slices
                    .iter()
                    .all(|slice| slice.endpoints.as_ref().unwrap().len() <= FULL)
            );
            assert!(!slices.is_empty());
            let again = plan(&service, &pods, &slices, zones);
            assert!(
                again.create.is_empty() && again.update.is_empty() && again.delete.is_empty(),
                "round {round}"
            );
        }
    }
}
