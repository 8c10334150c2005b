//! Endpoint slices, Endpoints and their mirroring through the real API server; the test plays the kubelets.

#[allow(dead_code, reason = "other tests use the rest")]
mod harness;

use std::collections::BTreeMap;

use futures::StreamExt;
use harness::*;
use k8s_openapi::api::core::v1::{Endpoints, Node, Pod, Service, ServiceAccount};
use k8s_openapi::api::discovery::v1::EndpointSlice;
use kube::api::{DeleteParams, ListParams, Patch, PatchParams};
use kube::{Api, ResourceExt};
use serde_json::{Value, json};

async fn start() -> Cluster {
    let cluster = Cluster::start_with(|server, controllers| {
        // Pods may wait for their node here.
        controllers.pod_gc_quarantine = std::time::Duration::from_secs(3600);
        server.service_cidrs = ["10.96.0.0/16", "fd00:96::/112"]
            .map(|range| range.parse().expect("a range"))
            .into();
    })
    .await;
    cluster.namespace("shop").await;
    let accounts = cluster.api::<ServiceAccount>("shop");
    until(&accounts, "the pods' account", |found| {
        check(!found.is_empty(), found.len())
    })
    .await;
    let nodes = Api::<Node>::all(cluster.client.clone());
    for (name, zone) in [("n0", "z0"), ("n1", "z1")] {
        let labels = json!({"topology.kubernetes.io/zone": zone});
        create(
            &nodes,
            json!({"metadata": {"name": name, "labels": labels}}),
        )
        .await;
        let status = json!({"status": {"allocatable": {"cpu": "2"},
            "conditions": [{"type": "Ready", "status": "True"}]}});
        patch_status(&nodes, name, status).await;
    }
    cluster
}

async fn patch_status<K>(api: &Api<K>, name: &str, status: Value)
where
    K: Clone + serde::de::DeserializeOwned + std::fmt::Debug,
{
    let params = PatchParams::default();
    let patch = Patch::Strategic(status);
    api.patch_status(name, &params, &patch)
        .await
        .expect("the status is written");
}

async fn run(api: &Api<Pod>, n: usize) {
    let spec =
        json!({"nodeName": format!("n{}", n % 2), "containers": [{"name": "c", "image": "i"}]});
    let name = format!("web-{n}");
    create(
        api,
        json!({"metadata": {"name": name, "labels": {"app": "web"}}, "spec": spec}),
    )
    .await;
    set_ready(api, n, true).await;
}

async fn set_ready(api: &Api<Pod>, n: usize, ready: bool) {
    let v4 = format!("10.244.{}.{}", n / 250, n % 250 + 1);
    let status = if ready { "True" } else { "False" };
    let status = json!({"status": {"phase": "Running", "podIP": v4,
        "podIPs": [{"ip": v4}, {"ip": format!("fd00:1::{n:x}")}],
        "conditions": [{"type": "Ready", "status": status, "lastTransitionTime": "2025-01-01T00:00:00Z"}]}});
    patch_status(api, &format!("web-{n}"), status).await;
}

/// Endpoints that are ready, by family.
fn ready(slices: &[EndpointSlice]) -> BTreeMap<String, usize> {
    let mut found = BTreeMap::new();
    for slice in slices {
        let ready = slice.endpoints.iter().flatten().filter(|endpoint| {
            let conditions = endpoint.conditions.as_ref();
            conditions.is_some_and(|conditions| conditions.ready == Some(true))
        });
        *found.entry(slice.address_type.clone()).or_default() += ready.count();
    }
    found
}

fn both(count: usize) -> BTreeMap<String, usize> {
    ["IPv4", "IPv6"]
        .map(|family| (family.to_owned(), count))
        .into()
}

fn versions(slices: &[EndpointSlice]) -> BTreeMap<String, String> {
    let version =
        |one: &EndpointSlice| (one.name_any(), one.resource_version().unwrap_or_default());
    slices.iter().map(version).collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn two_families_of_slices_follow_three_hundred_pods() {
    let cluster = start().await;
    let (pods, slices) = (
        cluster.api::<Pod>("shop"),
        cluster.api::<EndpointSlice>("shop"),
    );
    let services = cluster.api::<Service>("shop");
    let service = json!({"metadata": {"name": "web"}, "spec": {"selector": {"app": "web"},
        "ipFamilyPolicy": "RequireDualStack", "ports": [{"port": 80, "targetPort": 8080}]}});
    create(&services, service).await;
    let runs = (0..300).map(|n| run(&pods, n));
    futures::stream::iter(runs)
        .buffer_unordered(32)
        .collect::<()>()
        .await;
    let before = until(&slices, "all are endpoints", |found| {
        check(ready(found) == both(300), ready(found))?;
        Ok(found.to_vec())
    })
    .await;
    assert!(before.len() <= 8, "they are full: {}", before.len());

    // One pod's change is written once for each family, and nothing else is.
    set_ready(&pods, 42, false).await;
    let after = until(&slices, "one is not ready", |found| {
        check(ready(found) == both(299), ready(found))?;
        Ok(found.to_vec())
    })
    .await;
    let (old, new) = (versions(&before), versions(&after));
    let changed: Vec<_> = new
        .iter()
        .filter(|(name, version)| old.get(*name) != Some(*version))
        .collect();
    assert_eq!((changed.len(), old.len()), (2, new.len()));
    let trigger = "endpoints.kubernetes.io/last-change-trigger-time";
    assert!(
        after.iter().all(|one| {
            let is_changed = changed.iter().any(|(name, _)| **name == one.name_any());
            !is_changed || !one.annotations().contains_key(trigger)
        }),
        "the time of the change is the same as before"
    );

    // What somebody else does to a slice is put right.
    let victim = after[0].name_any();
    let patch = Patch::Merge(json!({"endpoints": []}));
    slices
        .patch(&victim, &PatchParams::default(), &patch)
        .await
        .expect("patched");
    slices
        .delete(&after[1].name_any(), &DeleteParams::default())
        .await
        .expect("deleted");
    until(&slices, "it is put right", |found| {
        check(ready(found) == both(299), ready(found))
    })
    .await;

    // Hints come and go with the field.
    let near = |value: Value| json!({"spec": {"trafficDistribution": value}});
    let patch = Patch::Merge(near(json!("PreferSameNode")));
    services
        .patch("web", &PatchParams::default(), &patch)
        .await
        .expect("patched");
    let hinted = |found: &[EndpointSlice]| {
        let all = found
            .iter()
            .flat_map(|slice| slice.endpoints.iter().flatten());
        let hints = all.filter_map(|endpoint| endpoint.hints.as_ref());
        hints
            .filter(|hints| hints.for_nodes.is_some() && hints.for_zones.is_some())
            .count()
    };
    until(&slices, "hints", |found| {
        check(hinted(found) == 2 * 299, hinted(found))
    })
    .await;
    let patch = Patch::Merge(near(Value::Null));
    services
        .patch("web", &PatchParams::default(), &patch)
        .await
        .expect("patched");
    until(&slices, "no hints", |found| {
        check(hinted(found) == 0, hinted(found))
    })
    .await;

    // One family less, and Endpoints are of the first one.
    let one = json!({"spec": {"ipFamilyPolicy": "SingleStack"}});
    services
        .patch("web", &PatchParams::default(), &Patch::Merge(one))
        .await
        .expect("patched");
    until(&slices, "one family", |found| {
        let found = ready(found);
        check(found == BTreeMap::from([("IPv4".into(), 299)]), found)
    })
    .await;
    let endpoints = cluster.api::<Endpoints>("shop");
    until(&endpoints, "endpoints", |found| {
        let subset = found
            .first()
            .and_then(|one| one.subsets.as_ref()?.first().cloned());
        let subset = subset.ok_or("no subset")?;
        let count = |list: &Option<Vec<_>>| list.as_ref().map_or(0, Vec::len);
        let counts = (count(&subset.addresses), count(&subset.not_ready_addresses));
        check(counts == (299, 1), counts)
    })
    .await;
    services
        .delete("web", &DeleteParams::default())
        .await
        .expect("deleted");
    until(&endpoints, "no endpoints", |found| {
        check(found.is_empty(), found.len())
    })
    .await;
    until(&slices, "no slices", |found| {
        check(found.is_empty(), found.len())
    })
    .await;
    cluster.end().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn zones_share_by_annotation_and_pods_wait_for_their_node() {
    let cluster = start().await;
    let (pods, slices) = (
        cluster.api::<Pod>("shop"),
        cluster.api::<EndpointSlice>("shop"),
    );
    let annotation = json!({"service.kubernetes.io/topology-mode": "Auto"});
    let service = json!({"metadata": {"name": "web", "annotations": annotation},
        "spec": {"selector": {"app": "web"}, "ports": [{"port": 80}]}});
    create(&cluster.api::<Service>("shop"), service).await;
    for n in [0, 2, 4, 6] {
        run(&pods, n).await;
    }
    let zones = |found: &[EndpointSlice]| {
        let mut zones: BTreeMap<String, usize> = BTreeMap::new();
        let all = found
            .iter()
            .flat_map(|slice| slice.endpoints.iter().flatten());
        for hints in all.filter_map(|endpoint| endpoint.hints.as_ref()) {
            for zone in hints.for_zones.iter().flatten() {
                *zones.entry(zone.name.clone()).or_default() += 1;
            }
        }
        zones
    };
    // All run in one zone; two of them are lent to the other one.
    let shared = BTreeMap::from([("z0".to_owned(), 2), ("z1".to_owned(), 2)]);
    until(&slices, "shared", |found| {
        check(zones(found) == shared, zones(found))
    })
    .await;
    // A node without a zone makes it impossible to say.
    let nodes = Api::<Node>::all(cluster.client.clone());
    create(&nodes, json!({"metadata": {"name": "n9"}})).await;
    let status = json!({"status": {"allocatable": {"cpu": "2"},
        "conditions": [{"type": "Ready", "status": "True"}]}});
    patch_status(&nodes, "n9", status).await;
    until(&slices, "no hints", |found| {
        check(zones(found).is_empty(), zones(found))
    })
    .await;

    let spec = json!({"nodeName": "n7", "containers": [{"name": "c", "image": "i"}]});
    let late = json!({"metadata": {"name": "web-8", "labels": {"app": "web"}}, "spec": spec});
    create(&pods, late).await;
    set_ready(&pods, 8, true).await;
    run(&pods, 10).await;
    // Without a kubelet nobody makes a pod ready again that its new node's silence made unready.
    let count = |found: &[EndpointSlice]| {
        let all = found
            .iter()
            .flat_map(|slice| slice.endpoints.iter().flatten());
        all.count()
    };
    until(&slices, "the late one is left out", |found| {
        check(count(found) == 5, count(found))
    })
    .await;
    create(&nodes, json!({"metadata": {"name": "n7"}})).await;
    until(&slices, "the late one is in", |found| {
        check(count(found) == 6, count(found))
    })
    .await;
    cluster.end().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn endpoints_written_by_hand_become_slices() {
    let cluster = start().await;
    let (services, slices) = (
        cluster.api::<Service>("shop"),
        cluster.api::<EndpointSlice>("shop"),
    );
    let endpoints = cluster.api::<Endpoints>("shop");
    let hand = json!({"metadata": {"name": "db"}, "subsets": [
        {"addresses": [{"ip": "192.0.2.1"}, {"ip": "2001:db8::1"}], "ports": [{"port": 5432}]}]});
    create(&endpoints, hand).await;
    let service = json!({"metadata": {"name": "db"}, "spec": {"ports": [{"port": 5432}]}});
    create(&services, service).await;
    let mirrored = |count: usize| {
        move |found: &[EndpointSlice]| {
            let by = "endpointslice.kubernetes.io/managed-by";
            let ours = found.iter().filter(|slice| {
                slice
                    .labels()
                    .get(by)
                    .is_some_and(|by| by == "endpointslicemirroring-controller.k8s.io")
            });
            check(ours.count() == count, found)
        }
    };
    until(&slices, "mirrored", mirrored(2)).await;
    let less =
        json!({"subsets": [{"addresses": [{"ip": "192.0.2.9"}], "ports": [{"port": 5432}]}]});
    endpoints
        .patch("db", &PatchParams::default(), &Patch::Merge(less))
        .await
        .expect("patched");
    until(&slices, "one is left", mirrored(1)).await;
    let found = slices
        .list(&ListParams::default())
        .await
        .expect("listed")
        .items;
    let addresses = found[0]
        .endpoints
        .iter()
        .flatten()
        .flat_map(|one| one.addresses.clone());
    assert_eq!(addresses.collect::<Vec<_>>(), ["192.0.2.9"]);
    let skip = json!({"metadata": {"labels": {"endpointslice.kubernetes.io/skip-mirror": "true"}}});
    endpoints
        .patch("db", &PatchParams::default(), &Patch::Merge(skip))
        .await
        .expect("patched");
    until(&slices, "none", mirrored(0)).await;
    let again = json!({"metadata": {"labels": {"endpointslice.kubernetes.io/skip-mirror": null}}});
    endpoints
        .patch("db", &PatchParams::default(), &Patch::Merge(again))
        .await
        .expect("patched");
    until(&slices, "one again", mirrored(1)).await;
    // With a selector, slices are made from pods.
    let selector = json!({"spec": {"selector": {"app": "db"}}});
    services
        .patch("db", &PatchParams::default(), &Patch::Merge(selector))
        .await
        .expect("patched");
    until(&slices, "none by hand", mirrored(0)).await;
    cluster.end().await;
}
