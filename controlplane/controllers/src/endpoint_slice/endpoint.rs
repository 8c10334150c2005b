//! What a pod is to a Service: an endpoint with an address, ports and conditions, for each of its families.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::Arc;

use k8s_openapi::api::core::v1::{Node, ObjectReference, Pod, Service, ServicePort};
use k8s_openapi::api::discovery::v1::{
    Endpoint, EndpointConditions, EndpointHints, EndpointPort, ForNode, ForZone,
};
use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;
use kube::ResourceExt;

use crate::pods;

/// The ports that share a slice.
pub(super) type Ports = Arc<[EndpointPort]>;

/// One endpoint that a Service should have.
#[derive(Clone, Debug)]
pub(super) struct Wanted {
    pub family: &'static str,
    pub ports: Ports,
    pub endpoint: Endpoint,
}

pub(crate) fn selector(service: &Service) -> Option<&BTreeMap<String, String>> {
    let spec = service.spec.as_ref()?;
    if spec.type_.as_deref() == Some("ExternalName") {
        return None;
    }
    spec.selector
        .as_ref()
        .filter(|selector| !selector.is_empty())
}

pub(super) fn selects(service: &Service, pod: &Pod) -> bool {
    selector(service).is_some_and(|selector| {
        selector
            .iter()
            .all(|(name, value)| pod.labels().get(name) == Some(value))
    })
}

pub(super) fn zone(node: &Node) -> Option<&str> {
    let zone = node.labels().get("topology.kubernetes.io/zone")?;
    (!zone.is_empty()).then_some(zone)
}

pub(crate) fn is_headless(service: &Service) -> bool {
    let spec = service.spec.as_ref();
    let ip = spec.and_then(|spec| spec.cluster_ip.as_deref());
    matches!(ip, None | Some("" | "None"))
}

/// The address types of the Service's families.
pub(super) fn families(service: &Service) -> Vec<&'static str> {
    let spec = service.spec.as_ref();
    let said = spec.and_then(|spec| spec.ip_families.as_ref());
    let has = |family: &str| said.is_some_and(|said| said.iter().any(|one| one == family));
    let mut found: Vec<_> = ["IPv4", "IPv6"].into_iter().filter(|f| has(f)).collect();
    if found.is_empty() {
        found.push("IPv4");
    }
    found
}

/// The family of the Service's first address.
pub(crate) fn first_family(service: &Service) -> &str {
    let spec = service.spec.as_ref();
    let families = spec.and_then(|spec| spec.ip_families.as_ref());
    families
        .and_then(|families| families.first())
        .map_or("IPv4", String::as_str)
}

/// How traffic is kept near, where the Service says so by its field.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Near {
    No,
    Zone,
    Node,
}

/// Makes endpoints of one Service.
pub(super) struct Maker<'a> {
    service: &'a Service,
    families: Vec<&'static str>,
    publish: bool,
    near: Near,
    /// The ports where no pod can have others: all are numbers.
    fixed: Option<Ports>,
    named: Vec<Ports>,
}

impl<'a> Maker<'a> {
    /// `hinted`: hints are made elsewhere.
    pub(super) fn new(service: &'a Service, hinted: bool) -> Self {
        let spec = service.spec.as_ref();
        let near = spec.and_then(|spec| spec.traffic_distribution.as_deref());
        let ports = spec.and_then(|spec| spec.ports.as_deref()).unwrap_or(&[]);
        let by_name = |port: &ServicePort| matches!(&port.target_port, Some(IntOrString::String(name)) if !name.is_empty());
        let fixed = !ports.iter().any(by_name);
        Self {
            service,
            families: families(service),
            publish: spec
                .and_then(|spec| spec.publish_not_ready_addresses)
                .unwrap_or(false),
            near: match near {
                _ if hinted => Near::No,
                Some("PreferClose" | "PreferSameZone") => Near::Zone,
                Some("PreferSameNode") => Near::Node,
                _ => Near::No,
            },
            fixed: fixed.then(|| ports_of(ports, None).into()),
            named: Vec::new(),
        }
    }

    /// The pod's endpoints: none where it is not one of the Service's, has ended, or has no address yet.
    /// `zone` gives none where there is no such node, and its zone, if it has one, otherwise.
    pub(super) fn make(
        &mut self,
        pod: &Pod,
        node: impl Fn(&str) -> Option<Option<String>>,
    ) -> Vec<Wanted> {
        if !selects(self.service, pod) || pods::is_finished(pod) {
            return Vec::new();
        }
        let addresses: Vec<_> = self
            .families
            .iter()
            .filter_map(|family| Some((*family, address(pod, family)?)))
            .collect();
        if addresses.is_empty() {
            return Vec::new();
        }
        let zone = match pods::node_name(pod).map(node) {
            Some(Some(zone)) => zone,
            // Its node is gone, or not known yet: traffic to it would be lost.
            _ if !self.publish => return Vec::new(),
            _ => None,
        };
        let ports = self.ports(pod);
        let endpoint = self.endpoint(pod, zone);
        addresses
            .into_iter()
            .map(|(family, address)| Wanted {
                family,
                ports: ports.clone(),
                endpoint: Endpoint {
                    addresses: vec![address],
                    ..endpoint.clone()
                },
            })
            .collect()
    }

    /// Shared by all pods that have the same.
    fn ports(&mut self, pod: &Pod) -> Ports {
        if let Some(ports) = &self.fixed {
            return ports.clone();
        }
        let spec = self.service.spec.as_ref();
        let ports = spec.and_then(|spec| spec.ports.as_deref()).unwrap_or(&[]);
        let ports = ports_of(ports, Some(pod));
        if let Some(known) = self.named.iter().find(|known| ***known == *ports) {
            return known.clone();
        }
        let ports: Ports = ports.into();
        self.named.push(ports.clone());
        ports
    }

    fn endpoint(&self, pod: &Pod, zone: Option<String>) -> Endpoint {
        let serving = pods::is_ready(pod);
        let terminating = pods::is_terminating(pod);
        let ready = self.publish || (serving && !terminating);
        let spec = pod.spec.as_ref();
        let name = self.service.name_any();
        let named = spec.filter(|spec| spec.subdomain.as_deref() == Some(name.as_str()));
        let node_name = pods::node_name(pod).map(str::to_owned);
        Endpoint {
            addresses: Vec::new(),
            conditions: Some(EndpointConditions {
                ready: Some(ready),
                serving: Some(serving),
                terminating: Some(terminating),
            }),
            hostname: named
                .and_then(|spec| spec.hostname.clone())
                .filter(|name| !name.is_empty()),
            hints: self.hints(ready, zone.as_deref(), node_name.as_deref()),
            zone,
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

    fn hints(&self, ready: bool, zone: Option<&str>, node: Option<&str>) -> Option<EndpointHints> {
        if !ready || self.near == Near::No {
            return None;
        }
        let for_zones = zone.map(|zone| vec![ForZone { name: zone.into() }]);
        let node = node.filter(|_| self.near == Near::Node);
        let for_nodes = node.map(|node| vec![ForNode { name: node.into() }]);
        let some = for_zones.is_some() || for_nodes.is_some();
        some.then_some(EndpointHints {
            for_nodes,
            for_zones,
        })
    }
}

fn address(pod: &Pod, family: &str) -> Option<String> {
    let status = pod.status.as_ref()?;
    let ips = status.pod_ips.iter().flatten().map(|ip| &ip.ip);
    let ips = ips.chain(&status.pod_ip);
    let mut ips = ips.filter_map(|ip| ip.parse::<IpAddr>().ok());
    let found = ips.find(|ip| ip.is_ipv4() == (family == "IPv4"))?;
    Some(found.to_string())
}

/// The Service's ports with the numbers that they have in this pod.
fn ports_of(ports: &[ServicePort], pod: Option<&Pod>) -> Vec<EndpointPort> {
    let mut found: Vec<EndpointPort> = ports
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
fn target(port: &ServicePort, pod: Option<&Pod>) -> Option<i32> {
    let name = match &port.target_port {
        None | Some(IntOrString::Int(0)) => return Some(port.port),
        Some(IntOrString::Int(number)) => return Some(*number),
        Some(IntOrString::String(name)) if name.is_empty() => return Some(port.port),
        Some(IntOrString::String(name)) => name,
    };
    let spec = pod?.spec.as_ref()?;
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
