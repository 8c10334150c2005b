//! Services that rules name.

use std::net::IpAddr;

use serde::Deserialize;
use serde_json::Value;

use crate::Cluster;
use crate::ends::Party;
use crate::object::{self, Labels, Metadata};
use crate::selector::Selector;

/// A Service, with the addresses in its EndpointSlices.
pub struct Service {
    namespace: String,
    name: String,
    labels: Labels,
    /// Empty where it has none.
    selector: Labels,
    addresses: Vec<IpAddr>,
}

#[derive(Deserialize)]
struct Spec {
    selector: Option<Labels>,
}

/// An entry of `toServices`.
#[derive(Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
pub struct Named {
    k8s_service: Option<ByName>,
    k8s_service_selector: Option<ByLabels>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
struct ByName {
    namespace: Option<String>,
    service_name: String,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct ByLabels {
    namespace: Option<String>,
    selector: Selector,
}

/// The Services of a cluster.
pub fn all(cluster: &Cluster) -> Vec<Service> {
    let services = cluster.services.iter();
    services
        .map(|one| {
            let Metadata {
                namespace,
                name,
                labels,
            } = object::metadata(one);
            let spec: Spec = object::read(one, "spec");
            let addresses = addresses(&cluster.slices, &namespace, &name);
            Service {
                namespace,
                name,
                labels: labels.unwrap_or_default(),
                selector: spec.selector.unwrap_or_default(),
                addresses,
            }
        })
        .collect()
}

fn addresses(slices: &[Value], namespace: &str, service: &str) -> Vec<IpAddr> {
    let own = slices.iter().filter(|one| {
        let metadata = object::metadata(one);
        let of = metadata.labels.unwrap_or_default();
        metadata.namespace == namespace
            && of.get("kubernetes.io/service-name").map(String::as_str) == Some(service)
    });
    let endpoints = own.flat_map(|one| one["endpoints"].as_array().into_iter().flatten());
    let addresses = endpoints.flat_map(|one| one["addresses"].as_array().into_iter().flatten());
    addresses
        .filter_map(|one| one.as_str()?.parse().ok())
        .collect()
}

impl Service {
    /// One of its labels, by its key with or without a source.
    fn label(&self, key: &str) -> Option<&str> {
        let sources = ["k8s:", "any:"];
        let plain = sources.iter().find_map(|one| key.strip_prefix(one));
        self.labels.get(plain.unwrap_or(key)).map(String::as_str)
    }

    /// Whether an end is one that it is made of: a pod of its namespace that its selector selects, or, where it has no
    /// selector, whoever has an address of its endpoints.
    fn has(&self, end: &Party, address: IpAddr) -> bool {
        if self.selector.is_empty() {
            return self.addresses.contains(&address);
        }
        end.pod().is_some_and(|pod| {
            let mut wanted = self.selector.iter();
            pod.namespace == self.namespace
                && wanted.all(|(key, value)| pod.labels.get(key) == Some(value))
        })
    }
}

impl Named {
    /// Whether an end is one that these Services are made of.
    pub fn has(&self, services: &[Service], end: &Party, address: IpAddr) -> bool {
        // Without a namespace, Services of all are meant.
        let near = |namespace: &Option<String>, service: &Service| {
            let namespace = namespace.as_deref().unwrap_or_default();
            namespace.is_empty() || namespace == service.namespace
        };
        let is_named = |service: &Service| {
            self.k8s_service.as_ref().is_some_and(|one| {
                near(&one.namespace, service) && one.service_name == service.name
            })
        };
        let is_labelled = |service: &Service| {
            self.k8s_service_selector.as_ref().is_some_and(|one| {
                near(&one.namespace, service) && one.selector.matches_with(|key| service.label(key))
            })
        };
        let mut services = services.iter();
        services.any(|one| (is_named(one) || is_labelled(one)) && one.has(end, address))
    }

    /// Whether it names any.
    pub fn is_right(&self) -> bool {
        self.k8s_service.is_some() || self.k8s_service_selector.is_some()
    }
}
