//! Endpoints, the older form of a Service's endpoint slices, for those who still read it: made from the slices, of the
//! first family, with a thousand addresses at most.

use std::collections::BTreeMap;
use std::sync::Arc;

use anyhow::Context;
use k8s_openapi::api::core::v1::{
    EndpointAddress, EndpointPort, EndpointSubset, Endpoints, Service,
};
use k8s_openapi::api::discovery::v1::{Endpoint, EndpointSlice};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use kube::ResourceExt;
use kube::api::{Api, DeleteParams, PostParams, Preconditions};
use tokio_util::sync::CancellationToken;

use crate::cluster::{Cluster, is_code, is_namespace_terminating};
use crate::endpoint_slice::{SERVICE_NAME, first_family, is_headless, is_ours, selector};
use crate::informer::Key;
use crate::queue::{Again, Queue};

const MANAGED_BY: &str = "endpoints.kubernetes.io/managed-by";
const OURS: &str = "endpoint-controller";
const HEADLESS: &str = "service.kubernetes.io/headless";
const OVER_CAPACITY: &str = "endpoints.kubernetes.io/over-capacity";
/// Addresses of one object at most.
const CAPACITY: usize = 1000;

/// Registers with the watches and gives the loop.
pub(crate) fn start(
    cluster: &Arc<Cluster>,
    shutdown: CancellationToken,
) -> impl Future<Output = anyhow::Result<()>> + Send + 'static {
    let queue = Queue::new();
    let wake = queue.clone();
    cluster.services.on_change(move |old, new| {
        let same = |old: &Arc<Service>, new: &Arc<Service>| {
            old.spec == new.spec && old.labels() == new.labels()
        };
        match (old, new) {
            (Some(old), Some(new)) if same(old, new) => {}
            _ => [old, new]
                .into_iter()
                .flatten()
                .for_each(|one| wake.add(Key::of(one.as_ref()))),
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
    let wake = queue.clone();
    cluster.endpoints.on_change(move |old, new| {
        // Ones that somebody else makes or changes, and ones that are left over.
        if let Some(endpoints) = new.or(old) {
            wake.add(Key::of(endpoints.as_ref()));
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
            .run("endpoints", 5, shutdown, |key| {
                let controller = controller.clone();
                async move { controller.reconcile(&key).await }
            })
            .await;
        Ok(())
    }
}

struct Controller {
    cluster: Arc<Cluster>,
}

impl Controller {
    async fn reconcile(&self, key: &Key) -> anyhow::Result<Again> {
        let known = self.cluster.endpoints.get(key);
        let Some(service) = self.cluster.services.get(key) else {
            return self.leave(key, known).await;
        };
        if service.metadata.deletion_timestamp.is_some() || selector(&service).is_none() {
            return Ok(None);
        }
        let mut slices = self.cluster.slices_of(key);
        let family = first_family(&service);
        slices.retain(|slice| is_ours(slice) && slice.address_type == family);
        if slices.is_empty() {
            // They are on their way.
            return Ok(None);
        }
        let (subsets, truncated) = subsets(&service, &slices);
        let api = Api::<Endpoints>::namespaced(self.cluster.client.clone(), &key.namespace);
        let metadata = metadata(&service, known.as_deref(), truncated);
        let fresh = Endpoints {
            metadata,
            subsets: Some(subsets),
        };
        let written = match known {
            Some(known) => {
                let same = known.metadata == fresh.metadata
                    && known.subsets.as_deref().unwrap_or(&[])
                        == fresh.subsets.as_deref().unwrap_or(&[]);
                if same {
                    return Ok(None);
                }
                api.replace(&key.name, &PostParams::default(), &fresh).await
            }
            None => api.create(&PostParams::default(), &fresh).await,
        };
        match written {
            Ok(written) => self.cluster.endpoints.note(written),
            Err(error) if is_namespace_terminating(&error) => {}
            Err(error) => return Err(error).context("could not write endpoints"),
        }
        Ok(None)
    }

    /// The Service is gone: so are the endpoints that were made for it. What else has a name of its own stays: others
    /// use these objects for leader election.
    async fn leave(&self, key: &Key, known: Option<Arc<Endpoints>>) -> anyhow::Result<Again> {
        let ours = |one: &Arc<Endpoints>| one.labels().get(MANAGED_BY).is_some_and(|by| by == OURS);
        let Some(known) = known.filter(ours) else {
            return Ok(None);
        };
        let api = Api::<Endpoints>::namespaced(self.cluster.client.clone(), &key.namespace);
        let params = DeleteParams::default().preconditions(Preconditions {
            uid: known.metadata.uid.clone(),
            resource_version: None,
        });
        match api.delete(&key.name, &params).await {
            Ok(_) => self.cluster.endpoints.note_gone(known.as_ref()),
            Err(error) if is_code(&error, 404) || is_code(&error, 409) => {}
            Err(error) => return Err(error).context("could not delete endpoints"),
        }
        Ok(None)
    }
}

fn metadata(service: &Service, known: Option<&Endpoints>, truncated: bool) -> ObjectMeta {
    let mut metadata = known
        .map(|known| known.metadata.clone())
        .unwrap_or_default();
    metadata.name = service.metadata.name.clone();
    metadata.namespace = service.metadata.namespace.clone();
    let mut labels = service.labels().clone();
    labels.remove(HEADLESS);
    if is_headless(service) {
        labels.insert(HEADLESS.into(), String::new());
    }
    labels.insert(MANAGED_BY.into(), OURS.into());
    metadata.labels = Some(labels);
    let mut annotations = metadata.annotations.take().unwrap_or_default();
    annotations.remove(OVER_CAPACITY);
    if truncated {
        annotations.insert(OVER_CAPACITY.into(), "truncated".into());
    }
    metadata.annotations = Some(annotations).filter(|annotations| !annotations.is_empty());
    metadata
}

fn is_ready(endpoint: &Endpoint) -> bool {
    let conditions = endpoint.conditions.as_ref();
    conditions.is_none_or(|conditions| conditions.ready != Some(false))
}

/// Endpoints with the same ports, in an order that does not depend on how they are spread over slices. True: there
/// are more than fit.
fn subsets(service: &Service, slices: &[Arc<EndpointSlice>]) -> (Vec<EndpointSubset>, bool) {
    let spec = service.spec.as_ref();
    let publish = spec.and_then(|spec| spec.publish_not_ready_addresses) == Some(true);
    let shown = |endpoint: &&Endpoint| {
        let conditions = endpoint.conditions.as_ref();
        publish || conditions.is_none_or(|conditions| conditions.terminating != Some(true))
    };
    let mut groups: BTreeMap<String, EndpointSubset> = BTreeMap::new();
    let mut count = 0;
    // Those that are ready come first where there is no room for all.
    for ready in [true, false] {
        for slice in slices {
            let endpoints = slice.endpoints.iter().flatten().filter(shown);
            for endpoint in endpoints.filter(|endpoint| is_ready(endpoint) == ready) {
                count += 1;
                if count > CAPACITY {
                    return (sorted(groups), true);
                }
                let ports = slice.ports.as_deref().unwrap_or(&[]);
                let subset = groups
                    .entry(format!("{ports:?}"))
                    .or_insert_with(|| EndpointSubset {
                        ports: Some(ports.iter().filter_map(port).collect()),
                        ..EndpointSubset::default()
                    });
                let list = if ready {
                    &mut subset.addresses
                } else {
                    &mut subset.not_ready_addresses
                };
                list.get_or_insert_default().push(address(endpoint));
            }
        }
    }
    (sorted(groups), false)
}

fn sorted(groups: BTreeMap<String, EndpointSubset>) -> Vec<EndpointSubset> {
    let mut subsets: Vec<_> = groups.into_values().collect();
    for subset in &mut subsets {
        let lists = [&mut subset.addresses, &mut subset.not_ready_addresses];
        for list in lists.into_iter().flatten() {
            list.sort_by(|a, b| a.ip.cmp(&b.ip));
        }
    }
    subsets
}

fn port(port: &k8s_openapi::api::discovery::v1::EndpointPort) -> Option<EndpointPort> {
    Some(EndpointPort {
        name: port.name.clone().filter(|name| !name.is_empty()),
        port: port.port?,
        protocol: port.protocol.clone(),
        app_protocol: port.app_protocol.clone(),
    })
}

fn address(endpoint: &Endpoint) -> EndpointAddress {
    EndpointAddress {
        ip: endpoint.addresses.first().cloned().unwrap_or_default(),
        hostname: endpoint.hostname.clone(),
        node_name: endpoint.node_name.clone(),
        target_ref: endpoint.target_ref.clone(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn slice(name: &str, port: i32, endpoints: serde_json::Value) -> Arc<EndpointSlice> {
        Arc::new(
            serde_json::from_value(json!({"metadata": {"name": name}, "addressType": "IPv4",
                "ports": [{"name": "", "port": port, "protocol": "TCP"}], "endpoints": endpoints}))
            .unwrap(),
        )
    }

    fn endpoint(ip: &str, ready: bool, terminating: bool) -> serde_json::Value {
        json!({"addresses": [ip], "conditions": {"ready": ready, "serving": true, "terminating": terminating}})
    }

    #[test]
    fn subsets_are_as_slices_say() {
        let slices = [
            slice(
                "a",
                80,
                json!([
                    endpoint("10.0.0.3", true, false),
                    endpoint("10.0.0.2", false, false)
                ]),
            ),
            slice(
                "b",
                80,
                json!([
                    endpoint("10.0.0.1", true, false),
                    endpoint("10.0.0.4", false, true)
                ]),
            ),
            slice("c", 90, json!([endpoint("10.0.0.5", true, false)])),
        ];
        let (found, truncated) = subsets(&Service::default(), &slices);
        assert!(!truncated);
        assert_eq!(
            serde_json::to_value(found).unwrap(),
            json!([
                {"addresses": [{"ip": "10.0.0.1"}, {"ip": "10.0.0.3"}], "notReadyAddresses": [{"ip": "10.0.0.2"}],
                    "ports": [{"port": 80, "protocol": "TCP"}]},
                {"addresses": [{"ip": "10.0.0.5"}], "ports": [{"port": 90, "protocol": "TCP"}]},
            ])
        );
    }

    #[test]
    fn a_thousand_fit_and_the_ready_ones_come_first() {
        let many = |from: usize, ready: bool| -> Vec<_> {
            let ip = |n: usize| format!("10.1.{}.{}", n / 250, n % 250);
            (from..from + 600)
                .map(|n| endpoint(&ip(n), ready, false))
                .collect()
        };
        let slices = [
            slice("a", 80, json!(many(0, false))),
            slice("b", 80, json!(many(600, true))),
        ];
        let (found, truncated) = subsets(&Service::default(), &slices);
        assert!(truncated);
        assert_eq!(found[0].addresses.as_ref().unwrap().len(), 600);
        assert_eq!(found[0].not_ready_addresses.as_ref().unwrap().len(), 400);
    }
}
