//! Policies that are custom resources: in force while the API has them, from the moment that it has their kind.

use serde_json::{Value, json};

use crate::alone;
use crate::stage::{FAR_POD, OTHER, OUTSIDE, Options, Stage, left_out, other_node};

/// Defines a kind.
fn define(stage: &Stage, plural: &str, group: &str) {
    let name = format!("{plural}.{group}");
    let definition = json!({"metadata": {"name": name}});
    stage.api.set("customresourcedefinitions", [definition]);
}

/// Waits until the pod reaches these of the addresses, and none of the others.
fn wait_for(stage: &mut Stage, what: &str, wanted: [bool; 3]) {
    stage.wait(what, |stage| {
        [0, 1].into_iter().all(|family| {
            let reached = [FAR_POD, OUTSIDE, OTHER].map(|of| {
                let to = of[family].parse().unwrap();
                stage.seen_source(to, true).is_some()
            });
            reached == wanted
        })
    });
}

fn object(api: &str, kind: &str, metadata: Value, spec: Value) -> Value {
    json!({"apiVersion": api, "kind": kind, "metadata": metadata, "spec": spec})
}

#[test]
fn kinds_are_followed_while_they_are_defined() {
    if left_out() {
        return;
    }
    let _alone = alone();
    let mut stage = Stage::new();
    stage.start(&Options::default());
    stage.wait_until_ready();
    stage.connect();
    let absent = "the API has no ClusterNetworkPolicy, AdminNetworkPolicy, BaselineAdminNetworkPolicy, CiliumNetworkPolicy, CiliumClusterwideNetworkPolicy, CiliumCIDRGroup";
    assert_eq!(stage.log().matches(absent).count(), 1, "{}", stage.log());
    wait_for(&mut stage, "all is reached", [true; 3]);

    // An object that there was before its kind was known here: of a group of blocks that comes later still.
    let cilium = "cilium.io";
    let deny = json!({"endpointSelector": {}, "egress": [{"toEntities": ["all"]}], "egressDeny": [
        {"toCIDRSet": [{"cidrGroupRef": "far"}]},
    ]});
    let cnp = object(
        "cilium.io/v2",
        "CiliumNetworkPolicy",
        json!({"namespace": "n", "name": "far"}),
        deny,
    );
    stage.api.set("ciliumnetworkpolicies", [cnp]);
    define(&stage, "ciliumnetworkpolicies", cilium);
    stage.wait("the policy is known", |stage| {
        let policies = stage.try_ask("GET", "/tables/policies", "").unwrap();
        policies[0]["state"] == "in force"
    });
    wait_for(&mut stage, "a group that is not there", [true; 3]);
    define(&stage, "ciliumcidrgroups", cilium);
    let blocks = |blocks: Value| {
        object(
            "cilium.io/v2",
            "CiliumCIDRGroup",
            json!({"name": "far"}),
            json!({"externalCIDRs": blocks}),
        )
    };
    let far = blocks(json!([
        format!("{}/32", FAR_POD[0]),
        format!("{}/128", FAR_POD[1])
    ]));
    stage.api.set("ciliumcidrgroups", [far]);
    wait_for(&mut stage, "the far pod is denied", [false, true, true]);
    let outside = blocks(json!([
        format!("{}/32", OUTSIDE[0]),
        format!("{}/128", OUTSIDE[1])
    ]));
    stage.api.set("ciliumcidrgroups", [outside]);
    wait_for(&mut stage, "who is outside is denied", [true, false, true]);
    stage.api.remove("ciliumcidrgroups", "/far");
    wait_for(&mut stage, "the group is gone", [true; 3]);

    // The API server is where its Service's endpoints are.
    let entity = json!({"endpointSelector": {}, "egress": [{"toEntities": ["kube-apiserver"]}]});
    let cnp = object(
        "cilium.io/v2",
        "CiliumNetworkPolicy",
        json!({"namespace": "n", "name": "far"}),
        entity,
    );
    stage.api.set("ciliumnetworkpolicies", [cnp]);
    wait_for(&mut stage, "nobody is the API server", [false; 3]);
    let slice = |name: &str, address: &str| {
        json!({
            "metadata": {"namespace": "default", "name": name},
            "addressType": "IPv4", "ports": [], "endpoints": [{"addresses": [address]}],
        })
    };
    stage.api.set(
        "default/endpointslices",
        [slice("4", OUTSIDE[0]), slice("6", OUTSIDE[1])],
    );
    wait_for(&mut stage, "the API server alone", [false, true, false]);

    // After another agent, too.
    stage.kill();
    stage.start(&Options::default());
    stage.wait_until_ready();
    wait_for(&mut stage, "still that alone", [false, true, false]);
    // With the definition, the objects go.
    stage.api.remove(
        "customresourcedefinitions",
        "/ciliumnetworkpolicies.cilium.io",
    );
    wait_for(&mut stage, "the kind is gone", [true; 3]);
}

#[test]
fn tiers_and_labels_of_nodes_and_what_is_wrong() {
    if left_out() {
        return;
    }
    let _alone = alone();
    let mut stage = Stage::new();
    let group = "policy.networking.k8s.io";
    for plural in [
        "clusternetworkpolicies",
        "adminnetworkpolicies",
        "baselineadminnetworkpolicies",
    ] {
        define(&stage, plural, group);
    }
    let nodes = object(
        "policy.networking.k8s.io/v1alpha1",
        "AdminNetworkPolicy",
        json!({"name": "edge"}),
        json!({"priority": 1, "subject": {"namespaces": {}}, "egress": [
            {"action": "Deny", "to": [{"nodes": {"matchLabels": {"edge": "true"}}}]},
        ]}),
    );
    stage.api.set("adminnetworkpolicies", [nodes]);
    stage.start(&Options::default());
    stage.wait_until_ready();
    stage.connect();
    wait_for(&mut stage, "all is reached", [true; 3]);
    stage
        .api
        .set("nodes", [other_node(json!({"edge": "true"}))]);
    wait_for(&mut stage, "the edge is denied", [true, true, false]);
    stage.api.set("nodes", [other_node(json!({}))]);
    wait_for(&mut stage, "it is none any more", [true; 3]);

    let blocks = |of: [&str; 2]| json!([format!("{}/32", of[0]), format!("{}/128", of[1])]);
    let tier = |tier: &str, action: &str, to: [&str; 2]| {
        let name = format!("{tier}-{action}").to_lowercase();
        let tier = json!({
            "tier": tier, "priority": 10, "subject": {"namespaces": {}},
            "egress": [{"action": action, "to": [{"networks": blocks(to)}]}],
        });
        object(
            "policy.networking.k8s.io/v1alpha2",
            "ClusterNetworkPolicy",
            json!({"name": name}),
            tier,
        )
    };
    // The administrators' tier is asked first, the baseline last.
    let accept = tier("Admin", "Accept", FAR_POD);
    let deny = [
        tier("Baseline", "Deny", FAR_POD),
        tier("Baseline", "Deny", OUTSIDE),
    ];
    stage.api.set("clusternetworkpolicies", [accept]);
    for (at, mut one) in deny.into_iter().enumerate() {
        one["metadata"]["name"] = format!("deny-{at}").into();
        stage.api.set("clusternetworkpolicies", [one]);
    }
    wait_for(&mut stage, "who is outside is denied", [true, false, true]);
    stage.api.remove("clusternetworkpolicies", "/admin-accept");
    wait_for(&mut stage, "so is the far pod", [false, false, true]);

    let broken = object(
        "policy.networking.k8s.io/v1alpha2",
        "ClusterNetworkPolicy",
        json!({"name": "broken"}),
        json!({"tier": "Admin", "priority": 5, "subject": {"namespaces": {}}, "egress": [
            {"action": "Accept", "to": [{"domainNames": ["*"]}]},
        ]}),
    );
    stage.api.set("clusternetworkpolicies", [broken]);
    stage.wait("an event on the policy", |stage| {
        let mut events = stage.api.events().into_iter();
        events.any(|(reason, about, words)| {
            reason == "InvalidPolicy" && about == "broken" && words.contains("domainNames")
        })
    });
    wait_for(
        &mut stage,
        "nothing else is disturbed",
        [false, false, true],
    );
    let condition = |stage: &Stage, name: &str| {
        let status = stage.api.status("clusternetworkpolicies", name);
        status["conditions"][0].clone()
    };
    stage.wait("what it says of itself", |stage| {
        let broken = condition(stage, "/broken");
        broken["status"] == "False" && condition(stage, "/deny-0")["status"] == "True"
    });
    let broken = condition(&stage, "/broken");
    assert_eq!(broken["type"], "Accepted");
    let words = broken["message"].as_str().unwrap();
    assert!(words.contains("domainNames"), "{broken}");
    // As it is mended, it says so.
    let mended = tier("Admin", "Accept", FAR_POD);
    let mended = json!({"metadata": {"name": "broken"}, "spec": mended["spec"], "status": {"conditions": [broken]}});
    stage.api.set("clusternetworkpolicies", [mended]);
    stage.wait("that all is well", |stage| {
        let condition = condition(stage, "/broken");
        condition["status"] == "True" && condition["reason"] == "Accepted"
    });
    wait_for(&mut stage, "it is in force", [true, false, true]);
}

#[test]
fn a_rule_of_layer_7_is_refused_loudly() {
    if left_out() {
        return;
    }
    let _alone = alone();
    let mut stage = Stage::new();
    define(&stage, "ciliumnetworkpolicies", "cilium.io");
    let http = json!([{"ports": [{"port": "80", "protocol": "TCP"}], "rules": {"http": [{"method": "GET"}]}}]);
    let metadata = json!({"namespace": "n", "name": "get"});
    let policy = object(
        "cilium.io/v2",
        "CiliumNetworkPolicy",
        metadata,
        json!({"endpointSelector": {}, "egress": [{"toEntities": ["all"], "toPorts": http}]}),
    );
    stage.api.set("ciliumnetworkpolicies", [policy]);
    stage.start(&Options::default());
    stage.wait_until_ready();
    stage.connect();
    wait_for(&mut stage, "nothing gets out", [false; 3]);
    stage.wait("its status and an event say why", |stage| {
        let status = stage.api.status("ciliumnetworkpolicies", "n/get");
        let valid = &status["conditions"][0];
        let tells = |words: &str| words.contains("http");
        let mut events = stage.api.events().into_iter();
        valid["type"] == "Valid"
            && valid["status"] == "False"
            && valid["message"].as_str().is_some_and(tells)
            && events.any(|(reason, about, words)| {
                reason == "InvalidPolicy" && about == "get" && tells(&words)
            })
    });
}

#[test]
fn services_are_whom_they_are_made_of() {
    if left_out() {
        return;
    }
    let _alone = alone();
    let mut stage = Stage::new();
    define(&stage, "ciliumnetworkpolicies", "cilium.io");
    stage.start(&Options::default());
    stage.wait_until_ready();
    stage.connect();
    wait_for(&mut stage, "all is reached", [true; 3]);
    let service = |labels: Value| {
        json!({
            "metadata": {"namespace": "n", "name": "bank", "labels": labels},
            "spec": {"ports": [{"port": 80}]},
        })
    };
    let slice = |name: &str, address: &str| {
        json!({
            "metadata": {"namespace": "n", "name": name, "labels": {"kubernetes.io/service-name": "bank"}},
            "addressType": if address.contains(':') { "IPv6" } else { "IPv4" },
            "ports": [], "endpoints": [{"addresses": [address]}],
        })
    };
    stage.api.set("services", [service(json!({}))]);
    let slices = [slice("bank-4", OUTSIDE[0]), slice("bank-6", OUTSIDE[1])];
    stage.api.set("endpointslices", slices);
    let to = |services: Value| {
        let egress = json!({"endpointSelector": {}, "egress": [{"toServices": services}]});
        let metadata = json!({"namespace": "n", "name": "bank"});
        object("cilium.io/v2", "CiliumNetworkPolicy", metadata, egress)
    };
    let named = to(json!([{"k8sService": {"serviceName": "bank", "namespace": "n"}}]));
    stage.api.set("ciliumnetworkpolicies", [named]);
    wait_for(&mut stage, "the bank is outside", [false, true, false]);
    let slices = [slice("bank-4", FAR_POD[0]), slice("bank-6", FAR_POD[1])];
    stage.api.set("endpointslices", slices);
    wait_for(&mut stage, "the bank has moved", [true, false, false]);
    let labelled = json!([{"k8sServiceSelector": {"selector": {"matchLabels": {"kind": "bank"}}}}]);
    stage.api.set("ciliumnetworkpolicies", [to(labelled)]);
    wait_for(&mut stage, "no Service has this label", [false; 3]);
    stage
        .api
        .set("services", [service(json!({"kind": "bank"}))]);
    wait_for(&mut stage, "the bank has it now", [true, false, false]);
    stage.kill();
    stage.start(&Options::default());
    stage.wait_until_ready();
    wait_for(&mut stage, "after another agent, too", [true, false, false]);
    stage.api.remove("services", "n/bank");
    wait_for(&mut stage, "the bank is gone", [false; 3]);
}
