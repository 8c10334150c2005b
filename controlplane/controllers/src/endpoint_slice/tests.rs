//! Tests of the plan of slices: whole and in parts, with hints, near the limits.

#![allow(clippy::unwrap_used, reason = "a failed step fails the test")]

use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::sync::Arc;

use k8s_openapi::api::core::v1::{Node, Pod, Service};
use k8s_openapi::api::discovery::v1::EndpointSlice;
use kube::ResourceExt;
use serde_json::{Value, json};

use super::endpoint::{Maker, families};
use super::slices::{FULL, Plan, Scope, draft};
use super::{slices, topology};
use crate::pods;

fn service(more: Value) -> Service {
    let mut service = json!({
        "metadata": {"name": "web", "namespace": "shop", "uid": "s", "labels": {"team": "x"}},
        "spec": {"selector": {"app": "web"}, "clusterIP": "10.96.0.9", "ipFamilies": ["IPv4"],
            "ports": [{"name": "http", "port": 80, "protocol": "TCP", "targetPort": "web"}]},
    });
    for (part, fields) in more.as_object().into_iter().flatten() {
        for (field, value) in fields.as_object().into_iter().flatten() {
            service[part][field] = value.clone();
        }
    }
    serde_json::from_value(service).unwrap()
}

/// Every seventh pod has another port.
fn pod(n: usize, ready: bool) -> Pod {
    let status = if ready { "True" } else { "False" };
    let port = if n.is_multiple_of(7) { 9090 } else { 8080 };
    let v4 = format!("10.244.{}.{}", n / 250, n % 250 + 1);
    serde_json::from_value(json!({
        "metadata": {"name": format!("web-{n}"), "namespace": "shop", "uid": format!("p{n}"), "labels": {"app": "web"}},
        "spec": {"nodeName": format!("n{}", n % 3), "containers": [{"name": "c", "ports": [{"name": "web", "containerPort": port}]}]},
        "status": {"phase": "Running", "podIP": v4, "podIPs": [{"ip": v4}, {"ip": format!("fd00::{n:x}")}],
            "conditions": [{"type": "Ready", "status": status}]},
    }))
    .unwrap()
}

/// There are three nodes, each with a zone of its own.
fn node(name: &str) -> Option<Option<String>> {
    name.strip_prefix('n').map(|n| Some(format!("z{n}")))
}

type Slices = BTreeMap<String, Arc<EndpointSlice>>;

fn list(slices: &Slices) -> Vec<Arc<EndpointSlice>> {
    slices.values().cloned().collect()
}

/// The plan for these pods; only those in scope are looked at.
fn plan<'a>(
    service: &Service,
    pods: impl IntoIterator<Item = &'a Pod>,
    scope: &Scope<'_>,
    slices: &Slices,
) -> Plan {
    let mut maker = Maker::new(service, false);
    let pods = pods.into_iter();
    let wanted = pods.flat_map(|pod| maker.make(pod, node)).collect();
    let (drafts, gone) = draft(service, wanted, scope, &list(slices), false);
    slices::plan(service, drafts, gone, None)
}

/// What the API server would hold after the plan.
fn apply(plan: Plan, slices: &mut Slices, serial: &mut usize) -> usize {
    let writes = plan.create.len() + plan.update.len() + plan.delete.len();
    for slice in plan.delete {
        slices.remove(&slice.name_any());
    }
    for slice in plan.update {
        slices.insert(slice.name_any(), Arc::new(slice));
    }
    for mut slice in plan.create {
        *serial += 1;
        slice.metadata.name = Some(format!("web-{serial}"));
        slices.insert(slice.name_any(), Arc::new(slice));
    }
    writes
}

fn whole(service: &Service, pods: &[Pod]) -> Vec<EndpointSlice> {
    let plan = plan(service, pods, &Scope::All, &Slices::new());
    assert!(plan.update.is_empty() && plan.delete.is_empty());
    plan.create
}

#[test]
fn an_endpoint_says_all_that_clients_need() {
    let made = whole(&service(json!({})), &[pod(1, true), pod(2, false)]);
    assert_eq!(made.len(), 1);
    let slice = serde_json::to_value(&made[0]).unwrap();
    assert_eq!(
        slice["metadata"]["labels"],
        json!({"kubernetes.io/service-name": "web", "team": "x",
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
        json!({"addresses": ["10.244.0.2"], "nodeName": "n1", "zone": "z1",
            "conditions": {"ready": true, "serving": true, "terminating": false},
            "targetRef": {"kind": "Pod", "namespace": "shop", "name": "web-1", "uid": "p1"}})
    );
    assert_eq!(
        slice["endpoints"][1]["conditions"],
        json!({"ready": false, "serving": false, "terminating": false})
    );
}

#[test]
fn conditions_of_stopping_pods_and_of_those_that_are_published_early() {
    let conditions = |service: &Service, pod: Pod| {
        let made = whole(service, &[pod]);
        let endpoint = made[0].endpoints.as_ref().unwrap()[0].clone();
        let found = endpoint.conditions.unwrap();
        (
            found.ready.unwrap(),
            found.serving.unwrap(),
            found.terminating.unwrap(),
        )
    };
    let stopping = |ready: bool| {
        let mut pod = pod(1, ready);
        pod.metadata.deletion_timestamp = Some(pods::now());
        pod
    };
    let (normal, early) = (
        service(json!({})),
        service(json!({"spec": {"publishNotReadyAddresses": true}})),
    );
    assert_eq!(conditions(&normal, stopping(true)), (false, true, true));
    assert_eq!(conditions(&normal, stopping(false)), (false, false, true));
    assert_eq!(conditions(&early, pod(1, false)), (true, false, false));
    assert_eq!(conditions(&early, stopping(false)), (true, false, true));
}

#[test]
fn who_has_ended_or_is_on_no_known_node_is_no_endpoint() {
    let mut ended = pod(1, true);
    ended.status.as_mut().unwrap().phase = Some("Succeeded".into());
    let mut lost = pod(2, true);
    lost.spec.as_mut().unwrap().node_name = Some("gone".into());
    let mut silent = pod(3, true);
    silent.status.as_mut().unwrap().pod_ip = None;
    silent.status.as_mut().unwrap().pod_ips = None;
    let pods = [ended, lost, silent];
    let endpoints = |service: &Service| {
        let made = whole(service, &pods);
        made[0].endpoints.clone().unwrap_or_default()
    };
    assert!(endpoints(&service(json!({}))).is_empty());
    let early = service(json!({"spec": {"publishNotReadyAddresses": true}}));
    let found = endpoints(&early);
    assert_eq!(found.len(), 1);
    assert_eq!(
        (found[0].zone.as_ref(), found[0].node_name.as_deref()),
        (None, Some("gone"))
    );
}

#[test]
fn families_and_ports_have_slices_of_their_own() {
    let both = service(json!({"spec": {"ipFamilies": ["IPv6", "IPv4"], "clusterIP": "None"}}));
    let pods: Vec<_> = (1..=14).map(|n| pod(n, true)).collect();
    let made = whole(&both, &pods);
    let mut found: Vec<_> = made
        .iter()
        .map(|slice| {
            let port = slice.ports.as_ref().unwrap()[0].port.unwrap();
            (
                slice.address_type.as_str(),
                port,
                slice.endpoints.as_ref().unwrap().len(),
            )
        })
        .collect();
    found.sort_unstable();
    assert_eq!(
        found,
        [
            ("IPv4", 8080, 12),
            ("IPv4", 9090, 2),
            ("IPv6", 8080, 12),
            ("IPv6", 9090, 2)
        ]
    );
    assert!(
        made.iter()
            .all(|slice| slice.labels()["service.kubernetes.io/headless"].is_empty())
    );
    // With one family less, its slices go.
    let (mut slices, mut serial) = (Slices::new(), 0);
    apply(
        Plan {
            create: made,
            ..Plan::default()
        },
        &mut slices,
        &mut serial,
    );
    let one = service(json!({"spec": {"ipFamilies": ["IPv6"], "clusterIP": "None"}}));
    let less = plan(&one, &pods, &Scope::All, &slices);
    assert_eq!(
        (less.create.len(), less.update.len(), less.delete.len()),
        (0, 0, 2)
    );
    assert!(less.delete.iter().all(|slice| slice.address_type == "IPv4"));
}

#[test]
fn a_service_without_pods_has_one_empty_slice_of_each_family() {
    let both = service(json!({"spec": {"ipFamilies": ["IPv4", "IPv6"]}}));
    let (mut slices, mut serial) = (Slices::new(), 0);
    let writes = apply(
        plan(&both, [], &Scope::All, &slices),
        &mut slices,
        &mut serial,
    );
    assert_eq!((writes, slices.len()), (2, 2));
    assert!(
        slices
            .values()
            .all(|slice| slice.ports.as_ref().unwrap().is_empty())
    );
    assert_eq!(
        apply(
            plan(&both, [], &Scope::All, &slices),
            &mut slices,
            &mut serial
        ),
        0
    );
    // The first pod takes them over, and the last one leaves them.
    let one = pod(1, true);
    let only: HashSet<Arc<str>> = HashSet::from(["web-1".into()]);
    assert_eq!(
        apply(
            plan(&both, [&one], &Scope::Pods(&only), &slices),
            &mut slices,
            &mut serial
        ),
        2
    );
    assert_eq!((slices.len(), serial), (2, 2));
    assert_eq!(
        apply(
            plan(&both, [], &Scope::Pods(&only), &slices),
            &mut slices,
            &mut serial
        ),
        2
    );
    assert!(
        slices
            .values()
            .all(|slice| slice.ports.as_ref().unwrap().is_empty())
    );
}

#[test]
fn labels_follow_the_service_and_strangers_slices_go() {
    let (mut slices, mut serial) = (Slices::new(), 0);
    let pods = [pod(1, true)];
    apply(
        plan(&service(json!({})), &pods, &Scope::All, &slices),
        &mut slices,
        &mut serial,
    );
    let other = service(json!({"metadata": {"labels": {"team": "y"}}}));
    let changed = plan(&other, &pods, &Scope::All, &slices);
    assert_eq!(changed.update[0].labels()["team"], "y");
    let none = service(json!({"metadata": {"labels": {}}}));
    let changed = plan(&none, &pods, &Scope::All, &slices);
    assert!(!changed.update[0].labels().contains_key("team"));
    let again = service(json!({"metadata": {"uid": "another"}}));
    let changed = plan(&again, &pods, &Scope::All, &slices);
    assert_eq!((changed.create.len(), changed.delete.len()), (1, 1));
}

#[test]
fn hints_of_a_service_that_keeps_traffic_near() {
    let hints = |near: Value| {
        let near = service(json!({"spec": {"trafficDistribution": near}}));
        let made = whole(&near, &[pod(1, true), pod(2, false)]);
        let made = serde_json::to_value(&made[0]).unwrap();
        assert!(made["endpoints"][1]["hints"].is_null(), "it is not ready");
        made["endpoints"][0]["hints"].clone()
    };
    let zone = json!({"forZones": [{"name": "z1"}]});
    assert_eq!(hints(json!("PreferClose")), zone);
    assert_eq!(hints(json!("PreferSameZone")), zone);
    assert_eq!(
        hints(json!("PreferSameNode")),
        json!({"forZones": [{"name": "z1"}], "forNodes": [{"name": "n1"}]})
    );
    assert!(hints(json!(null)).is_null());
}

fn shares(cpus: &[(&str, &str)]) -> Option<BTreeMap<String, f64>> {
    let node = |(zone, cpu): &(&str, &str)| -> Node {
        let labels = json!({"topology.kubernetes.io/zone": zone});
        serde_json::from_value(json!({"metadata": {"labels": labels}, "status": {
            "allocatable": {"cpu": cpu}, "conditions": [{"type": "Ready", "status": "True"}]}}))
        .unwrap()
    };
    topology::ratios(cpus.iter().map(node).map(|node| topology::share(&node)))
}

/// How many hints each zone has after the pods' zones are balanced.
fn balanced(
    ratios: Option<&BTreeMap<String, f64>>,
    pods: &[Pod],
    slices: &mut Slices,
    serial: &mut usize,
) -> (Result<BTreeMap<String, usize>, String>, usize) {
    let auto = service(
        json!({"metadata": {"annotations": {"service.kubernetes.io/topology-mode": "Auto"}}}),
    );
    assert!(topology::is_asked_for(&auto));
    let mut maker = Maker::new(&auto, true);
    let wanted = pods.iter().flat_map(|pod| maker.make(pod, node)).collect();
    let (mut drafts, gone) = draft(&auto, wanted, &Scope::All, &list(slices), true);
    let outcome = topology::add_hints(ratios, &mut drafts, "IPv4");
    let writes = apply(slices::plan(&auto, drafts, gone, None), slices, serial);
    let mut zones: BTreeMap<String, usize> = BTreeMap::new();
    let endpoints = slices
        .values()
        .flat_map(|slice| slice.endpoints.iter().flatten());
    for hints in endpoints.filter_map(|endpoint| endpoint.hints.as_ref()) {
        for zone in hints.for_zones.iter().flatten() {
            *zones.entry(zone.name.clone()).or_default() += 1;
        }
    }
    if outcome.is_err() {
        assert!(zones.is_empty());
    }
    (outcome.map(|()| zones), writes)
}

#[test]
fn each_zone_has_its_share_of_the_endpoints() {
    let (mut slices, mut serial) = (Slices::new(), 0);
    let even = shares(&[("z0", "2"), ("z1", "2"), ("z2", "1500m"), ("z2", "500m")]);
    // Pods are numbered so that all are in two of the three zones.
    let pods: Vec<_> = (0..180)
        .filter(|n| n % 3 != 2)
        .map(|n| pod(n, true))
        .collect();
    let (zones, _) = balanced(even.as_ref(), &pods, &mut slices, &mut serial);
    assert_eq!(
        zones.unwrap(),
        BTreeMap::from([("z0".into(), 40), ("z1".into(), 40), ("z2".into(), 40)])
    );
    let (_, writes) = balanced(even.as_ref(), &pods, &mut slices, &mut serial);
    assert_eq!(writes, 0, "nothing changed");
    // One zone is stronger than the others.
    let strong = shares(&[("z0", "8"), ("z1", "2"), ("z2", "2")]);
    let (zones, _) = balanced(strong.as_ref(), &pods, &mut slices, &mut serial);
    let zones = zones.unwrap();
    assert_eq!(zones.values().sum::<usize>(), 120);
    assert!((67..=82).contains(&zones["z0"]), "{zones:?}");
    assert!(zones["z1"] >= 17 && zones["z2"] >= 17, "{zones:?}");

    for (cpus, pods, why) in [
        (
            vec![("z0", "4")],
            &pods[..],
            "Insufficient Node information",
        ),
        (
            vec![("z0", "4"), ("", "4")],
            &pods[..],
            "Insufficient Node information",
        ),
        (
            vec![("z0", "4"), ("z1", "0")],
            &pods[..],
            "Insufficient Node information",
        ),
        (
            vec![("z0", "4"), ("z1", "4"), ("z2", "4")],
            &pods[..2],
            "Insufficient number of endpoints (2 endpoints, 3 zones), addressType: IPv4",
        ),
        (
            vec![("z0", "4"), ("z1", "5"), ("z2", "1")],
            &pods[..3],
            "Minimum allocation of required endpoints exceeds overload threshold (3 endpoints, 3 zones), addressType: IPv4",
        ),
    ] {
        let (outcome, _) = balanced(shares(&cpus).as_ref(), pods, &mut slices, &mut serial);
        assert!(
            outcome.as_ref().is_err_and(|said| said.starts_with(why)),
            "{outcome:?}"
        );
    }
}

fn found(slices: &Slices) -> BTreeSet<String> {
    let mut all = BTreeSet::new();
    for slice in slices.values() {
        assert!(slice.endpoints.as_ref().unwrap().len() <= FULL);
        for endpoint in slice.endpoints.iter().flatten() {
            let port = slice.ports.as_ref().unwrap()[0].port.unwrap();
            let ready = endpoint.conditions.as_ref().unwrap().ready.unwrap();
            let text = format!("{} {port} {ready}", endpoint.addresses[0]);
            assert!(all.insert(text), "twice: {endpoint:?}");
        }
    }
    all
}

/// Random pods come, go and change, told whole or in parts: the slices always hold exactly them, none twice, none
/// beyond 100, and a second look changes nothing.
#[test]
fn slices_follow_the_pods() {
    let mut random = 88172645463325252u64;
    let mut below = |n: usize| {
        random ^= random << 13;
        random ^= random >> 7;
        random ^= random << 17;
        (random % n as u64) as usize
    };
    let both = service(json!({"spec": {"ipFamilies": ["IPv4", "IPv6"]}}));
    let mut pods: BTreeMap<String, Pod> = BTreeMap::new();
    let (mut slices, mut serial) = (Slices::new(), 0);
    apply(
        plan(&both, [], &Scope::All, &slices),
        &mut slices,
        &mut serial,
    );
    for round in 0..150 {
        let mut touched: HashSet<Arc<str>> = HashSet::new();
        for _ in 0..[1, 1, 3, 40, 300][below(5)] {
            let n = below(600);
            let name = format!("web-{n}");
            touched.insert(name.as_str().into());
            // Now and then nearly everybody leaves.
            if below(if round % 50 > 40 { 10 } else { 2 }) > 0 {
                pods.remove(&name);
            } else {
                pods.insert(name, pod(n, below(3) > 0));
            }
        }
        let told = touched.iter().filter_map(|name| pods.get(&**name));
        let part = plan(&both, told, &Scope::Pods(&touched), &slices);
        apply(part, &mut slices, &mut serial);
        let mut wanted = BTreeSet::new();
        let mut maker = Maker::new(&both, false);
        for one in pods.values().flat_map(|pod| maker.make(pod, node)) {
            let ready = one.endpoint.conditions.unwrap().ready.unwrap();
            let port = one.ports[0].port.unwrap();
            wanted.insert(format!("{} {port} {ready}", one.endpoint.addresses[0]));
        }
        assert_eq!(found(&slices), wanted, "round {round}");
        for family in families(&both) {
            assert!(slices.values().any(|slice| slice.address_type == family));
        }
        let again = plan(&both, pods.values(), &Scope::All, &slices);
        assert_eq!(apply(again, &mut slices, &mut serial), 0, "round {round}");
    }
}

/// One Service with 20,000 endpoints: one pod's change is one slice's change, and cheap.
#[test]
fn one_of_many_changes_one_slice() {
    let one = service(json!({"spec": {"ports": [{"port": 80, "targetPort": 8080}]}}));
    let pods: Vec<_> = (0..20_000).map(|n| pod(n, true)).collect();
    let (mut slices, mut serial) = (Slices::new(), 0);
    let writes = apply(
        plan(&one, &pods, &Scope::All, &slices),
        &mut slices,
        &mut serial,
    );
    assert_eq!((writes, slices.len()), (200, 200));
    let started = std::time::Instant::now();
    for n in 0..200 {
        let changed = pod(n * 97, false);
        let only: HashSet<Arc<str>> = HashSet::from([changed.name_any().as_str().into()]);
        let writes = apply(
            plan(&one, [&changed], &Scope::Pods(&only), &slices),
            &mut slices,
            &mut serial,
        );
        assert_eq!(writes, 1);
    }
    let took = started.elapsed() / 200;
    println!("one of 20,000: {took:?}");
    // Many leave: their slices shrink; those that come fill them up again before there are new ones.
    let many: HashSet<Arc<str>> = (0..1000)
        .map(|n| format!("web-{}", n * 20).into())
        .collect();
    apply(
        plan(&one, [], &Scope::Pods(&many), &slices),
        &mut slices,
        &mut serial,
    );
    assert_eq!(slices.len(), 200);
    let back: Vec<_> = (0..5).map(|n| pod(n * 20, true)).collect();
    let names: HashSet<Arc<str>> = back
        .iter()
        .map(|pod| pod.name_any().as_str().into())
        .collect();
    let writes = apply(
        plan(&one, &back, &Scope::Pods(&names), &slices),
        &mut slices,
        &mut serial,
    );
    assert_eq!((writes, slices.len()), (1, 200));
}
