//! Nodes get their ranges of pod addresses through the real API server.

#[allow(dead_code, reason = "other tests use the rest")]
mod harness;

use harness::*;
use k8s_openapi::api::core::v1::Node;
use kube::api::DeleteParams;
use kube::{Api, ResourceExt};
use serde_json::{Value, json};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nodes_get_a_range_of_each_family_and_give_it_back() {
    let cluster = Cluster::start_with(|_, controllers| {
        controllers.cluster_cidrs = ["10.244.0.0/23", "fd00:10::/56"]
            .map(|range| range.parse().expect("a range"))
            .into();
    })
    .await;
    let nodes = Api::<Node>::all(cluster.client.clone());
    let make = async |name: &str, spec: Value| {
        create(&nodes, json!({"metadata": {"name": name}, "spec": spec})).await;
    };
    let has = async |name: &str, wanted: &[&str]| {
        until(&nodes, name, |found| {
            let node = found.iter().find(|node| node.name_any() == name);
            let spec = node.and_then(|node| node.spec.clone()).unwrap_or_default();
            let all = spec.pod_cidrs.unwrap_or_default();
            check(all == wanted && spec.pod_cidr.as_ref() == all.first(), all)
        })
        .await;
    };
    make(
        "own",
        json!({"podCIDR": "10.244.0.0/24", "podCIDRs": ["10.244.0.0/24"]}),
    )
    .await;
    make("a", json!({})).await;
    has("a", &["10.244.1.0/24", "fd00:10::/64"]).await;
    make("b", json!({})).await;
    nodes
        .delete("own", &DeleteParams::default())
        .await
        .expect("deleted");
    has("b", &["10.244.0.0/24", "fd00:10:0:1::/64"]).await;
    cluster.end().await;
}
