//! The controllers against the real API server over the real store; the tests play the node.

mod harness;

use harness::*;
use std::collections::BTreeSet;
use std::time::Duration;

use k8s_openapi::api::apps::v1::{Deployment, ReplicaSet};
use k8s_openapi::api::coordination::v1::Lease;
use k8s_openapi::api::core::v1::{ConfigMap, Namespace, Node, Pod, Service, ServiceAccount};
use k8s_openapi::api::discovery::v1::EndpointSlice;
use kube::api::{DeleteParams, ListParams, Patch, PatchParams};
use kube::{Api, ResourceExt};
use serde_json::{Value, json};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_deployment_rolls_its_service_follows_and_it_can_go_back() {
    let cluster = Cluster::start().await;
    let _kubelet = cluster.node("n1").await;
    cluster.namespace("shop").await;
    let deployments = cluster.api::<Deployment>("shop");
    let service = json!({"metadata": {"name": "web"}, "spec": {"selector": {"app": "web"},
        "ports": [{"name": "http", "port": 80, "targetPort": "http"}]}});
    create(&cluster.api::<Service>("shop"), service).await;
    create(&deployments, web(3, "i:1", json!({}))).await;
    let first = rolled_out(&cluster, "i:1", 3).await;
    assert_eq!(
        first.annotations()["deployment.kubernetes.io/revision"],
        "1"
    );
    let conditions: BTreeSet<_> = first
        .status
        .iter()
        .flat_map(|status| status.conditions.iter().flatten())
        .map(|c| (c.type_.clone(), c.status.clone()))
        .collect();
    assert_eq!(
        conditions,
        BTreeSet::from([
            ("Available".into(), "True".into()),
            ("Progressing".into(), "True".into())
        ])
    );
    let slices = cluster.api::<EndpointSlice>("shop");
    let before = until(&slices, "three endpoints", |slices| {
        let found = addresses(slices);
        check(found.len() == 3, slices).map(|()| found)
    })
    .await;

    // The rollout never has more than one above, nor one too few (25 % of 3, rounded up and down).
    let pods = cluster.api::<Pod>("shop");
    let watched = {
        let (pods, stop) = (pods.clone(), cluster.stop.child_token());
        let ended = stop.clone();
        let task = tokio::spawn(async move {
            let (mut most, mut least) = (0, usize::MAX);
            while !ended.is_cancelled() {
                let all = pods
                    .list(&ListParams::default())
                    .await
                    .expect("listed")
                    .items;
                let active: Vec<_> = all
                    .iter()
                    .filter(|pod| pod.metadata.deletion_timestamp.is_none())
                    .collect();
                let ready = active.iter().filter(|pod| {
                    let conditions = pod
                        .status
                        .iter()
                        .flat_map(|status| status.conditions.iter().flatten());
                    conditions
                        .into_iter()
                        .any(|c| c.type_ == "Ready" && c.status == "True")
                });
                (most, least) = (most.max(active.len()), least.min(ready.count()));
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
            (most, least)
        });
        (task, stop)
    };
    let to = |image: &str| {
        Patch::Strategic(
            json!({"spec": {"template": {"spec": {"containers": [{"name": "c", "image": image}]}}}}),
        )
    };
    deployments
        .patch("web", &PatchParams::default(), &to("i:2"))
        .await
        .expect("patched");
    let second = rolled_out(&cluster, "i:2", 3).await;
    watched.1.cancel();
    let (most, least) = watched.0.await.expect("no panic");
    assert!(
        most <= 4 && least >= 3,
        "at most {most} pods, at least {least} ready"
    );
    assert_eq!(
        second.annotations()["deployment.kubernetes.io/revision"],
        "2"
    );
    until(&slices, "three other endpoints", |slices| {
        let found = addresses(slices);
        check(found.len() == 3 && found.is_disjoint(&before), slices)
    })
    .await;

    // Going back uses the old ReplicaSet under a new number.
    deployments
        .patch("web", &PatchParams::default(), &to("i:1"))
        .await
        .expect("patched");
    let third = rolled_out(&cluster, "i:1", 3).await;
    assert_eq!(
        third.annotations()["deployment.kubernetes.io/revision"],
        "3"
    );
    let sets = cluster
        .api::<ReplicaSet>("shop")
        .list(&ListParams::default())
        .await
        .expect("listed")
        .items;
    let mut revisions: Vec<_> = sets
        .iter()
        .map(|set| {
            let note = |name: &str| {
                set.annotations()
                    .get(&format!("deployment.kubernetes.io/{name}"))
                    .cloned()
            };
            (
                note("revision"),
                note("revision-history"),
                set.spec.as_ref().and_then(|spec| spec.replicas),
            )
        })
        .collect();
    revisions.sort();
    assert_eq!(
        revisions,
        [
            (Some("2".into()), None, Some(0)),
            (Some("3".into()), Some("1".into()), Some(3)),
        ]
    );

    let size = Patch::Merge(json!({"spec": {"replicas": 5}}));
    deployments
        .patch("web", &PatchParams::default(), &size)
        .await
        .expect("patched");
    rolled_out(&cluster, "i:1", 5).await;
    until(&slices, "five endpoints", |slices| {
        check(addresses(slices).len() == 5, slices)
    })
    .await;
    let slice = &slices
        .list(&ListParams::default())
        .await
        .expect("listed")
        .items[0];
    let port = &slice.ports.as_ref().expect("ports")[0];
    assert_eq!(
        (port.name.as_deref(), port.port),
        (Some("http"), Some(8080))
    );
    assert_eq!(
        slice.endpoints.as_ref().expect("endpoints")[0]
            .zone
            .as_deref(),
        Some("z1")
    );
    let size = Patch::Merge(json!({"spec": {"replicas": 1}}));
    deployments
        .patch("web", &PatchParams::default(), &size)
        .await
        .expect("patched");
    rolled_out(&cluster, "i:1", 1).await;
    until(&pods, "one pod", |pods| check(pods.len() == 1, pods.len())).await;
    cluster.end().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn recreate_runs_old_and_new_never_at_the_same_time() {
    let cluster = Cluster::start().await;
    let _kubelet = cluster.node("n1").await;
    cluster.namespace("shop").await;
    let deployments = cluster.api::<Deployment>("shop");
    create(&deployments, web(3, "i:1", json!({"type": "Recreate"}))).await;
    rolled_out(&cluster, "i:1", 3).await;
    let pods = cluster.api::<Pod>("shop");
    let patch = Patch::Strategic(
        json!({"spec": {"template": {"spec": {"containers": [{"name": "c", "image": "i:2"}]}}}}),
    );
    deployments
        .patch("web", &PatchParams::default(), &patch)
        .await
        .expect("patched");
    loop {
        let images: BTreeSet<_> = pods
            .list(&ListParams::default())
            .await
            .expect("listed")
            .items
            .iter()
            .filter_map(|pod| pod.spec.as_ref()?.containers[0].image.clone())
            .collect();
        assert!(images.len() <= 1, "{images:?} at the same time");
        if images.contains("i:2") {
            break;
        }
    }
    rolled_out(&cluster, "i:2", 3).await;
    cluster.end().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn replica_sets_adopt_and_release_and_replace_lost_pods() {
    let cluster = Cluster::start().await;
    let _kubelet = cluster.node("n1").await;
    cluster.namespace("shop").await;
    let pods = cluster.api::<Pod>("shop");
    until(
        &cluster.api::<ServiceAccount>("shop"),
        "a service account",
        |found| check(!found.is_empty(), found),
    )
    .await;
    let orphan = json!({"metadata": {"name": "orphan", "labels": {"app": "web"}}, "spec": {"containers": [{"name": "c", "image": "i"}]}});
    create(&pods, orphan).await;
    let mut set = web(3, "i:1", json!({}));
    set["spec"]
        .as_object_mut()
        .expect("a spec")
        .remove("strategy");
    let set = create(&cluster.api::<ReplicaSet>("shop"), set).await;
    let owned = |pod: &Pod| {
        pod.owner_references()
            .iter()
            .any(|owner| Some(&owner.uid) == set.metadata.uid.as_ref())
    };
    let three = |pods: &[Pod]| {
        check(
            pods.iter().filter(|pod| owned(pod)).count() == 3,
            pods.iter().map(ResourceExt::name_any).collect::<Vec<_>>(),
        )
    };
    until(&pods, "the orphan and two more", |pods| {
        three(pods)?;
        check(
            pods.len() == 3
                && pods
                    .iter()
                    .any(|pod| pod.name_any() == "orphan" && owned(pod)),
            pods.len(),
        )
    })
    .await;
    let patch = Patch::Merge(json!({"metadata": {"labels": {"app": "other"}}}));
    pods.patch("orphan", &PatchParams::default(), &patch)
        .await
        .expect("patched");
    until(&pods, "released and replaced", |pods| {
        three(pods)?;
        check(
            pods.len() == 4
                && pods
                    .iter()
                    .any(|pod| pod.name_any() == "orphan" && !owned(pod)),
            pods.len(),
        )
    })
    .await;
    let victim = pods
        .list(&ListParams::default())
        .await
        .expect("listed")
        .items
        .into_iter()
        .find(|pod| owned(pod))
        .expect("an owned pod");
    let _ = pods
        .delete(&victim.name_any(), &DeleteParams::default())
        .await
        .expect("deleted");
    until(&pods, "replaced", |pods| {
        three(pods)?;
        check(
            pods.iter()
                .all(|pod| pod.metadata.uid != victim.metadata.uid),
            pods.len(),
        )
    })
    .await;
    until(&cluster.api::<ReplicaSet>("shop"), "status", |sets| {
        let status = sets[0].status.clone().unwrap_or_default();
        check(
            (
                status.replicas,
                status.ready_replicas,
                status.available_replicas,
            ) == (3, Some(3), Some(3)),
            status,
        )
    })
    .await;
    cluster.end().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_owned_goes_with_its_owner_or_is_let_go() {
    let cluster = Cluster::start().await;
    let _kubelet = cluster.node("n1").await;
    cluster.namespace("shop").await;
    let (deployments, sets, pods) = (
        cluster.api::<Deployment>("shop"),
        cluster.api::<ReplicaSet>("shop"),
        cluster.api::<Pod>("shop"),
    );
    let none = |found: usize| check(found == 0, found);

    for params in [DeleteParams::background(), DeleteParams::foreground()] {
        create(&deployments, web(2, "i:1", json!({}))).await;
        rolled_out(&cluster, "i:1", 2).await;
        let _ = deployments.delete("web", &params).await.expect("deleted");
        until(&deployments, "no deployment", |found| none(found.len())).await;
        if params.propagation_policy == DeleteParams::foreground().propagation_policy {
            // In the foreground the owner goes last.
            assert_eq!(
                sets.list(&ListParams::default())
                    .await
                    .expect("listed")
                    .items
                    .len(),
                0
            );
            assert_eq!(
                pods.list(&ListParams::default())
                    .await
                    .expect("listed")
                    .items
                    .len(),
                0
            );
        }
        until(&sets, "no replica set", |found| none(found.len())).await;
        until(&pods, "no pod", |found| none(found.len())).await;
    }

    create(&deployments, web(2, "i:1", json!({}))).await;
    rolled_out(&cluster, "i:1", 2).await;
    let _ = deployments
        .delete("web", &DeleteParams::orphan())
        .await
        .expect("deleted");
    until(&deployments, "no deployment", |found| none(found.len())).await;
    let kept = sets
        .list(&ListParams::default())
        .await
        .expect("listed")
        .items;
    assert_eq!(kept.len(), 1);
    assert!(kept[0].owner_references().is_empty());
    assert_eq!(
        pods.list(&ListParams::default())
            .await
            .expect("listed")
            .items
            .len(),
        2
    );

    // An object with two owners stays until the last one goes.
    let maps = cluster.api::<ConfigMap>("shop");
    let owners = [
        create(&maps, json!({"metadata": {"name": "a"}})).await,
        create(&maps, json!({"metadata": {"name": "b"}})).await,
    ];
    let references: Vec<_> = owners.iter().map(|owner| json!({"apiVersion": "v1", "kind": "ConfigMap", "name": owner.name_any(), "uid": owner.uid()})).collect();
    create(
        &maps,
        json!({"metadata": {"name": "owned", "ownerReferences": references}}),
    )
    .await;
    let owned = |maps: &[ConfigMap]| {
        maps.iter()
            .find(|map| map.name_any() == "owned")
            .map(|map| map.owner_references().len())
    };
    let _ = maps
        .delete("a", &DeleteParams::default())
        .await
        .expect("deleted");
    until(&maps, "one owner left", |maps| {
        check(owned(maps) == Some(1), owned(maps))
    })
    .await;
    let _ = maps
        .delete("b", &DeleteParams::default())
        .await
        .expect("deleted");
    until(&maps, "gone", |maps| {
        check(owned(maps).is_none(), owned(maps))
    })
    .await;
    cluster.end().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_namespace_is_furnished_and_goes_with_all_its_content() {
    let cluster = Cluster::start().await;
    let _kubelet = cluster.node("n1").await;
    cluster.namespace("shop").await;
    let (maps, accounts) = (
        cluster.api::<ConfigMap>("shop"),
        cluster.api::<ServiceAccount>("shop"),
    );
    let furnished = |maps: &[ConfigMap]| {
        let map = maps
            .iter()
            .find(|map| map.name_any() == "kube-root-ca.crt")
            .ok_or("no map")?;
        check(
            map.data.as_ref().is_some_and(|data| data["ca.crt"] == CA),
            map,
        )
    };
    until(&maps, "the CA", furnished).await;
    until(&accounts, "default", |found| {
        check(found.iter().any(|a| a.name_any() == "default"), found)
    })
    .await;
    let wrong = Patch::Merge(json!({"data": {"ca.crt": "wrong"}}));
    maps.patch("kube-root-ca.crt", &PatchParams::default(), &wrong)
        .await
        .expect("patched");
    until(&maps, "the CA put right", furnished).await;
    let _ = maps
        .delete("kube-root-ca.crt", &DeleteParams::default())
        .await
        .expect("deleted");
    until(&maps, "the CA made again", furnished).await;

    create(&cluster.api::<Deployment>("shop"), web(3, "i:1", json!({}))).await;
    rolled_out(&cluster, "i:1", 3).await;
    let held = json!({"metadata": {"name": "held", "finalizers": ["example.com/hold"]}});
    create(&maps, held).await;
    let namespaces = Api::<Namespace>::all(cluster.client.clone());
    let _ = namespaces
        .delete("shop", &DeleteParams::default())
        .await
        .expect("deleted");
    let shop = |found: &[Namespace]| {
        found
            .iter()
            .find(|namespace| namespace.name_any() == "shop")
            .cloned()
    };
    until(&namespaces, "the finalizer is told of", |found| {
        let shop = shop(found).ok_or("gone, in spite of the finalizer")?;
        let conditions = shop
            .status
            .and_then(|status| status.conditions)
            .unwrap_or_default();
        check(
            conditions.iter().any(|c| {
                c.type_ == "NamespaceFinalizersRemaining"
                    && c.status == "True"
                    && c.message
                        .as_deref()
                        .is_some_and(|m| m.contains("example.com/hold in 1 resource instances"))
            }),
            conditions,
        )
    })
    .await;
    until(&cluster.api::<Pod>("shop"), "no pod", |found| {
        check(found.is_empty(), found.len())
    })
    .await;
    let release = Patch::Merge(json!({"metadata": {"finalizers": null}}));
    maps.patch("held", &PatchParams::default(), &release)
        .await
        .expect("patched");
    until(&namespaces, "gone", |found| {
        check(shop(found).is_none(), shop(found))
    })
    .await;
    cluster.end().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_silent_node_is_lost_its_pods_leave_and_vanish_with_it() {
    let cluster = Cluster::start_with(|_, controllers| {
        controllers.node_monitor_grace_period = Duration::from_secs(2);
    })
    .await;
    let kubelet = cluster.node("n1").await;
    cluster.namespace("shop").await;
    let leases = cluster.api::<Lease>("kube-node-lease");
    create(
        &leases,
        json!({"metadata": {"name": "n1"}, "spec": {"holderIdentity": "n1"}}),
    )
    .await;
    let pods = cluster.api::<Pod>("shop");
    until(
        &cluster.api::<ServiceAccount>("shop"),
        "a service account",
        |found| check(!found.is_empty(), found),
    )
    .await;
    let pod = |name: &str, seconds: Value| {
        json!({"metadata": {"name": name}, "spec": {
        "containers": [{"name": "c", "image": "i"}],
        "tolerations": [{"key": "node.kubernetes.io/unreachable", "operator": "Exists", "effect": "NoExecute", "tolerationSeconds": seconds}]}})
    };
    create(&pods, pod("leaves", json!(1))).await;
    create(&pods, pod("stays", json!(null))).await;
    until(&pods, "running", |pods| {
        let running = |pod: &Pod| {
            pod.status
                .as_ref()
                .and_then(|status| status.phase.as_deref())
                == Some("Running")
        };
        check(pods.len() == 2 && pods.iter().all(running), pods.len())
    })
    .await;
    let nodes = Api::<Node>::all(cluster.client.clone());
    let ready = |nodes: &[Node]| {
        let conditions = nodes
            .first()
            .and_then(|node| node.status.as_ref()?.conditions.clone())
            .unwrap_or_default();
        conditions
            .iter()
            .find(|c| c.type_ == "Ready")
            .map(|c| c.status.clone())
    };
    // As long as the lease is renewed the node is not lost, whatever its status says.
    for renewal in 0..8 {
        let time = format!("2025-01-01T00:00:{renewal:02}.000000Z");
        leases
            .patch(
                "n1",
                &PatchParams::default(),
                &Patch::Merge(json!({"spec": {"renewTime": time}})),
            )
            .await
            .expect("renewed");
        tokio::time::sleep(Duration::from_millis(500)).await;
    }
    assert_eq!(
        ready(
            &nodes
                .list(&ListParams::default())
                .await
                .expect("listed")
                .items
        )
        .as_deref(),
        Some("True")
    );
    until(&nodes, "lost", |nodes| {
        check(ready(nodes).as_deref() == Some("Unknown"), ready(nodes))?;
        let taints: Vec<_> = nodes[0]
            .spec
            .iter()
            .flat_map(|spec| spec.taints.iter().flatten())
            .map(|taint| format!("{}:{}", taint.key, taint.effect))
            .collect();
        check(
            taints
                == [
                    "node.kubernetes.io/unreachable:NoSchedule",
                    "node.kubernetes.io/unreachable:NoExecute",
                ],
            taints,
        )
    })
    .await;
    until(&pods, "one left, the other not ready", |pods| {
        check(pods.len() == 1 && pods[0].name_any() == "stays", pods.len())?;
        let conditions = pods[0]
            .status
            .as_ref()
            .and_then(|status| status.conditions.clone())
            .unwrap_or_default();
        check(
            conditions
                .iter()
                .any(|c| c.type_ == "Ready" && c.status == "False"),
            conditions,
        )
    })
    .await;
    // The kubelet is heard of again.
    let back = json!({"status": {"conditions": [{"type": "Ready", "status": "True", "lastHeartbeatTime": "2025-01-01T01:00:00Z"}]}});
    nodes
        .patch_status("n1", &PatchParams::default(), &Patch::Strategic(back))
        .await
        .expect("patched");
    until(&nodes, "no taints", |nodes| {
        let taints = nodes[0]
            .spec
            .as_ref()
            .and_then(|spec| spec.taints.clone())
            .unwrap_or_default();
        check(taints.is_empty(), taints)
    })
    .await;
    kubelet.abort();
    let _ = nodes
        .delete("n1", &DeleteParams::default())
        .await
        .expect("deleted");
    until(&pods, "no pod on a node that is gone", |pods| {
        check(pods.is_empty(), pods.len())
    })
    .await;
    cluster.end().await;
}
