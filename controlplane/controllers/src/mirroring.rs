//! EndpointSlices of Services without a selector, from the Endpoints that somebody wrote for them.

use std::collections::{BTreeMap, HashSet};
use std::net::IpAddr;
use std::sync::Arc;

use anyhow::Context;
use k8s_openapi::api::core::v1::{EndpointAddress, EndpointSubset, Endpoints, Service};
use k8s_openapi::api::discovery::v1::{Endpoint, EndpointConditions, EndpointPort, EndpointSlice};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use kube::ResourceExt;
use kube::api::{Api, DeleteParams, PostParams, Preconditions};
use tokio_util::sync::CancellationToken;

use crate::cluster::{Cluster, is_code, is_namespace_terminating};
use crate::endpoint_slice::{MANAGED_BY, SERVICE_NAME};
use crate::informer::Key;
use crate::queue::{Again, Queue};
use crate::refs::controller_ref;

const OURS: &str = "endpointslicemirroring-controller.k8s.io";
const SKIP: &str = "endpointslice.kubernetes.io/skip-mirror";
/// Who elects a leader by Endpoints means no endpoints by them.
const LEADER: &str = "control-plane.alpha.kubernetes.io/leader";
const TRIGGERED: &str = "endpoints.kubernetes.io/last-change-trigger-time";
const LAST_APPLIED: &str = "kubectl.kubernetes.io/last-applied-configuration";
/// Addresses of a subset and family that are mirrored at most (`--mirroring-max-endpoints-per-subset`).
const MOST: usize = 1000;

/// Registers with the watches and gives the loop.
pub(crate) fn start(
    cluster: &Arc<Cluster>,
    shutdown: CancellationToken,
) -> impl Future<Output = anyhow::Result<()>> + Send + 'static {
    let queue = Queue::new();
    let wake = queue.clone();
    cluster.endpoints.on_change(move |old, new| {
        // Most are made by a controller here, for Services with a selector.
        if [old, new].into_iter().flatten().any(|one| is_mirrored(one))
            && let Some(endpoints) = new.or(old)
        {
            wake.add(Key::of(endpoints.as_ref()));
        }
    });
    let wake = queue.clone();
    cluster.services.on_change(move |old, new| {
        let selects = |service: &Arc<Service>| has_selector(service);
        if old.is_none_or(selects) != new.is_none_or(selects)
            && let Some(service) = new.or(old)
        {
            wake.add(Key::of(service.as_ref()));
        }
    });
    let wake = queue.clone();
    cluster.endpoint_slices.on_change(move |old, new| {
        for slice in [old, new]
            .into_iter()
            .flatten()
            .filter(|slice| is_ours(slice))
        {
            if let Some(service) = slice.labels().get(SERVICE_NAME) {
                wake.add(Key::new(&slice.namespace().unwrap_or_default(), service));
            }
        }
    });
    let controller = Arc::new(Controller {
        cluster: cluster.clone(),
    });
    async move {
        let cluster = &controller.cluster;
        cluster.services.synced().await;
        cluster.endpoint_slices.synced().await;
        cluster.endpoints.synced().await;
        queue
            .run("endpoint slice mirroring", 5, shutdown, |key| {
                let controller = controller.clone();
                async move { controller.reconcile(&key).await }
            })
            .await;
        Ok(())
    }
}

fn is_ours(slice: &EndpointSlice) -> bool {
    slice.labels().get(MANAGED_BY).is_some_and(|by| by == OURS)
}

fn has_selector(service: &Service) -> bool {
    let spec = service.spec.as_ref();
    let selector = spec.and_then(|spec| spec.selector.as_ref());
    selector.is_some_and(|selector| !selector.is_empty())
}

fn is_mirrored(endpoints: &Endpoints) -> bool {
    endpoints.metadata.deletion_timestamp.is_none()
        && endpoints
            .labels()
            .get(SKIP)
            .is_none_or(|skip| skip != "true")
        && !endpoints.annotations().contains_key(LEADER)
}

struct Controller {
    cluster: Arc<Cluster>,
}

impl Controller {
    async fn reconcile(&self, key: &Key) -> anyhow::Result<Again> {
        let service = self.cluster.services.get(key);
        let service = service.filter(|service| !has_selector(service));
        let endpoints = self.cluster.endpoints.get(key);
        let endpoints = endpoints.filter(|one| service.is_some() && is_mirrored(one));
        let mut existing = self.cluster.slices_of(key);
        existing.retain(|slice| is_ours(slice));
        let wanted = endpoints
            .map(|endpoints| mirror(&endpoints))
            .unwrap_or_default();
        let api = Api::<EndpointSlice>::namespaced(self.cluster.client.clone(), &key.namespace);
        let informer = &self.cluster.endpoint_slices;
        for slice in wanted {
            let like = |old: &Arc<EndpointSlice>| {
                old.address_type == slice.address_type && old.ports == slice.ports
            };
            let written = match existing.iter().position(like) {
                Some(index) => {
                    let old = existing.swap_remove(index);
                    if is_same(&old, &slice) {
                        continue;
                    }
                    let mut metadata = old.metadata.clone();
                    metadata.labels = slice.metadata.labels.clone();
                    metadata.annotations = slice.metadata.annotations.clone();
                    metadata.owner_references = slice.metadata.owner_references.clone();
                    let slice = EndpointSlice { metadata, ..slice };
                    api.replace(&old.name_any(), &PostParams::default(), &slice)
                        .await
                }
                None => api.create(&PostParams::default(), &slice).await,
            };
            match written {
                Ok(written) => informer.note(written),
                Err(error) if is_namespace_terminating(&error) => return Ok(None),
                Err(error) => return Err(error).context("could not write an endpoint slice"),
            }
        }
        for slice in existing {
            let params = DeleteParams::default().preconditions(Preconditions {
                uid: slice.metadata.uid.clone(),
                resource_version: None,
            });
            match api.delete(&slice.name_any(), &params).await {
                Ok(_) => informer.note_gone(slice.as_ref()),
                Err(error) if is_code(&error, 404) || is_code(&error, 409) => {}
                Err(error) => return Err(error).context("could not delete an endpoint slice"),
            }
        }
        Ok(None)
    }
}

fn is_same(old: &EndpointSlice, new: &EndpointSlice) -> bool {
    old.labels() == new.labels()
        && old.annotations() == new.annotations()
        && old.metadata.owner_references == new.metadata.owner_references
        && old.endpoints.as_deref().unwrap_or(&[]) == new.endpoints.as_deref().unwrap_or(&[])
}

/// The slices that say the same as the Endpoints: one for each set of ports and family.
fn mirror(endpoints: &Endpoints) -> Vec<EndpointSlice> {
    let mut labels = endpoints.labels().clone();
    labels.insert(SERVICE_NAME.into(), endpoints.name_any());
    labels.insert(MANAGED_BY.into(), OURS.into());
    let annotations = endpoints.annotations().iter();
    let annotations: BTreeMap<_, _> = annotations
        .filter(|(name, _)| ![TRIGGERED, LAST_APPLIED].contains(&name.as_str()))
        .map(|(name, value)| (name.clone(), value.clone()))
        .collect();
    let metadata = ObjectMeta {
        generate_name: Some(format!("{}-", endpoints.name_any())),
        namespace: endpoints.metadata.namespace.clone(),
        labels: Some(labels),
        annotations: Some(annotations).filter(|annotations| !annotations.is_empty()),
        owner_references: Some(vec![controller_ref(endpoints)]),
        ..ObjectMeta::default()
    };
    let mut slices: Vec<EndpointSlice> = Vec::new();
    for subset in endpoints.subsets.iter().flatten() {
        let ports = Some(ports(subset));
        for family in ["IPv4", "IPv6"] {
            let endpoints = of_family(subset, family);
            if endpoints.is_empty() {
                continue;
            }
            let like = |one: &&mut EndpointSlice| one.address_type == family && one.ports == ports;
            match slices.iter_mut().find(like) {
                Some(slice) => slice.endpoints.get_or_insert_default().extend(endpoints),
                None => slices.push(EndpointSlice {
                    metadata: metadata.clone(),
                    address_type: family.into(),
                    ports: ports.clone(),
                    endpoints: Some(endpoints),
                }),
            }
        }
    }
    for slice in &mut slices {
        let mut seen = HashSet::new();
        let endpoints = slice.endpoints.get_or_insert_default();
        endpoints.retain(|endpoint| seen.insert(endpoint.addresses.clone()));
        endpoints.truncate(MOST);
    }
    slices
}

fn ports(subset: &EndpointSubset) -> Vec<EndpointPort> {
    let ports = subset.ports.iter().flatten();
    let mut ports: Vec<_> = ports
        .map(|port| EndpointPort {
            name: Some(port.name.clone().unwrap_or_default()),
            port: Some(port.port),
            protocol: Some(port.protocol.clone().unwrap_or_else(|| "TCP".into())),
            app_protocol: port.app_protocol.clone(),
        })
        .collect();
    ports.sort_by(|a, b| a.name.cmp(&b.name));
    ports
}

fn of_family(subset: &EndpointSubset, family: &str) -> Vec<Endpoint> {
    let fits = |address: &&EndpointAddress| {
        let ip = address.ip.parse::<IpAddr>();
        ip.is_ok_and(|ip| ip.is_ipv4() == (family == "IPv4"))
    };
    let of = |list: &Option<Vec<EndpointAddress>>, ready: bool| -> Vec<Endpoint> {
        let list = list.iter().flatten().filter(fits);
        list.map(|address| endpoint(address, ready)).collect()
    };
    let mut found = of(&subset.addresses, true);
    found.extend(of(&subset.not_ready_addresses, false));
    found
}

fn endpoint(address: &EndpointAddress, ready: bool) -> Endpoint {
    Endpoint {
        addresses: vec![address.ip.clone()],
        conditions: Some(EndpointConditions {
            ready: Some(ready),
            ..EndpointConditions::default()
        }),
        hostname: address.hostname.clone().filter(|name| !name.is_empty()),
        node_name: address.node_name.clone(),
        target_ref: address.target_ref.clone(),
        ..Endpoint::default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn each_family_and_set_of_ports_is_one_slice() {
        let endpoints: Endpoints = serde_json::from_value(json!({
            "metadata": {"name": "db", "namespace": "shop", "uid": "e", "labels": {"team": "x"},
                "annotations": {"a": "b", LAST_APPLIED: "{}"}},
            "subsets": [
                {"addresses": [{"ip": "192.0.2.1"}, {"ip": "fd00::1"}], "notReadyAddresses": [{"ip": "192.0.2.2", "nodeName": "n"}],
                    "ports": [{"port": 5432}]},
                {"addresses": [{"ip": "192.0.2.3"}], "ports": [{"name": "admin", "port": 8080, "protocol": "UDP"}]},
                {"addresses": [{"ip": "192.0.2.1"}, {"ip": "192.0.2.4"}], "ports": [{"port": 5432}]},
            ],
        }))
        .unwrap();
        let found = mirror(&endpoints);
        let addresses = |slice: &EndpointSlice| -> Vec<String> {
            let endpoints = slice.endpoints.iter().flatten();
            endpoints
                .flat_map(|endpoint| endpoint.addresses.clone())
                .collect()
        };
        let shown: Vec<_> = found
            .iter()
            .map(|one| (one.address_type.as_str(), addresses(one)))
            .collect();
        assert_eq!(
            shown,
            [
                (
                    "IPv4",
                    vec!["192.0.2.1".into(), "192.0.2.2".into(), "192.0.2.4".into()]
                ),
                ("IPv6", vec!["fd00::1".into()]),
                ("IPv4", vec!["192.0.2.3".into()]),
            ]
        );
        let first = serde_json::to_value(&found[0]).unwrap();
        assert_eq!(
            first["metadata"],
            json!({"generateName": "db-", "namespace": "shop", "annotations": {"a": "b"},
                "labels": {"team": "x", "kubernetes.io/service-name": "db",
                    "endpointslice.kubernetes.io/managed-by": "endpointslicemirroring-controller.k8s.io"},
                "ownerReferences": [{"apiVersion": "v1", "kind": "Endpoints", "name": "db", "uid": "e",
                    "controller": true, "blockOwnerDeletion": true}]})
        );
        assert_eq!(first["endpoints"][1]["conditions"], json!({"ready": false}));
        assert_eq!(
            first["ports"],
            json!([{"name": "", "port": 5432, "protocol": "TCP"}])
        );
    }
}
