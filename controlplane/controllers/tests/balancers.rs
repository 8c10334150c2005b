//! Load balancers' addresses through the real API server, also over a restart.

#[allow(dead_code, reason = "other tests use the rest")]
mod harness;

use harness::*;
use k8s_openapi::api::core::v1::{Event, Service};
use kube::api::{DeleteParams, ListParams, Patch, PatchParams};
use kube::{Api, ResourceExt};
use serde_json::{Value, json};

async fn start(directory: tempfile::TempDir, ranges: &[&str]) -> Cluster {
    Cluster::start_in(directory, |server, controllers| {
        server.service_cidrs = ["10.96.0.0/16", "fd00:96::/112"]
            .map(|range| range.parse().expect("a range"))
            .into();
        controllers.load_balancer_ranges = ranges
            .iter()
            .map(|range| range.parse().expect("a range"))
            .collect();
    })
    .await
}

async fn balancer(api: &Api<Service>, name: &str, more: Value) -> Service {
    let mut spec =
        json!({"type": "LoadBalancer", "selector": {"app": name}, "ports": [{"port": 80}]});
    for (field, value) in more.as_object().into_iter().flatten() {
        spec[field] = value.clone();
    }
    create(api, json!({"metadata": {"name": name}, "spec": spec})).await
}

fn addresses(service: &Service) -> Vec<String> {
    let status = service
        .status
        .iter()
        .filter_map(|status| status.load_balancer.as_ref());
    let ingress = status.flat_map(|balancer| balancer.ingress.iter().flatten());
    ingress
        .map(|one| {
            assert_eq!(one.ip_mode.as_deref(), Some("VIP"));
            one.ip.clone().unwrap_or_default()
        })
        .collect()
}

async fn has(api: &Api<Service>, name: &str, wanted: &[&str]) {
    until(api, name, |services| {
        let found = services.iter().find(|one| one.name_any() == name);
        let found = found.map(addresses).unwrap_or_default();
        check(found == wanted, found)
    })
    .await;
}

async fn patch(api: &Api<Service>, name: &str, spec: Value) {
    let patch = Patch::Merge(json!({"spec": spec}));
    let params = PatchParams::default();
    api.patch(name, &params, &patch).await.expect("patched");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn balancers_get_addresses_keep_them_and_give_them_back() {
    let ranges = ["192.0.2.1-192.0.2.2", "fd00:1b::/124"];
    let directory = before_a_restart(&ranges).await;
    let cluster = start(directory, &ranges).await;
    after_a_restart(&cluster).await;
    cluster.end().await;
}

async fn before_a_restart(ranges: &[&str]) -> tempfile::TempDir {
    let cluster = start(tempfile::tempdir().expect("a folder"), ranges).await;
    cluster.namespace("shop").await;
    let api = cluster.api::<Service>("shop");
    balancer(&api, "a", json!({"loadBalancerIP": "192.0.2.2"})).await;
    has(&api, "a", &["192.0.2.2"]).await;
    balancer(
        &api,
        "b",
        json!({"ipFamilyPolicy": "PreferDualStack", "loadBalancerClass": "xebec.io/l2"}),
    )
    .await;
    has(&api, "b", &["192.0.2.1", "fd00:1b::1"]).await;
    balancer(
        &api,
        "other",
        json!({"loadBalancerClass": "example.com/other"}),
    )
    .await;
    balancer(&api, "c", json!({})).await;
    let events = cluster.api::<Event>("shop");
    let failed = until(&events, "an event", |events| {
        let found = events
            .iter()
            .find(|event| event.reason.as_deref() == Some("AllocationFailed"));
        found
            .cloned()
            .ok_or_else(|| format!("{} events", events.len()))
    })
    .await;
    assert_eq!(failed.involved_object.name.as_deref(), Some("c"));
    assert_eq!(failed.type_.as_deref(), Some("Warning"));
    let said = failed.message.unwrap_or_default();
    assert!(
        said.ends_with("no IPv4 address is free in the pools"),
        "{said}"
    );
    cluster.end().await
}

/// Everybody has what he had, and who waits still does.
async fn after_a_restart(cluster: &Cluster) {
    let api = cluster.api::<Service>("shop");
    let before = api.list(&ListParams::default()).await.expect("listed");
    balancer(&api, "six", json!({"ipFamilies": ["IPv6"]})).await;
    has(&api, "six", &["fd00:1b::2"]).await;
    has(&api, "a", &["192.0.2.2"]).await;
    has(&api, "b", &["192.0.2.1", "fd00:1b::1"]).await;
    has(&api, "c", &[]).await;
    has(&api, "other", &[]).await;
    let after = api.list(&ListParams::default()).await.expect("listed");
    for old in before.items {
        let new = after
            .items
            .iter()
            .find(|new| new.name_any() == old.name_any());
        let new = new.expect("it is still there");
        assert_eq!(
            old.resource_version(),
            new.resource_version(),
            "nothing was written"
        );
    }

    // Another type loses its addresses at once, and who waits gets them.
    patch(&api, "a", json!({"type": "ClusterIP"})).await;
    assert!(addresses(&api.get("a").await.expect("a")).is_empty());
    has(&api, "c", &["192.0.2.2"]).await;
    patch(
        &api,
        "a",
        json!({"type": "LoadBalancer", "loadBalancerIP": null}),
    )
    .await;
    api.delete("b", &DeleteParams::default())
        .await
        .expect("deleted");
    has(&api, "a", &["192.0.2.1"]).await;
    // One family less.
    patch(&api, "six", json!({"ipFamilyPolicy": "RequireDualStack"})).await;
    has(&api, "six", &["fd00:1b::2"]).await;
    api.delete("c", &DeleteParams::default())
        .await
        .expect("deleted");
    has(&api, "six", &["fd00:1b::2", "192.0.2.2"]).await;
    patch(&api, "six", json!({"ipFamilyPolicy": "SingleStack"})).await;
    has(&api, "six", &["fd00:1b::2"]).await;
    balancer(&api, "d", json!({})).await;
    has(&api, "d", &["192.0.2.2"]).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn two_hundred_balancers_have_two_hundred_addresses() {
    let cluster = start(tempfile::tempdir().expect("a folder"), &["198.18.0.0/22"]).await;
    cluster.namespace("shop").await;
    let api = cluster.api::<Service>("shop");
    let no_ports = json!({"allocateLoadBalancerNodePorts": false});
    for index in 0..200 {
        balancer(&api, &format!("s{index}"), no_ports.clone()).await;
    }
    let found = until(&api, "addresses", |services| {
        let found: std::collections::BTreeSet<_> = services.iter().flat_map(addresses).collect();
        check(found.len() == 200, found.len()).map(|()| found)
    })
    .await;
    assert!(found.contains("198.18.0.1") && !found.contains("198.18.0.0"));
    cluster.end().await;
}
