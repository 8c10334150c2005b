//! Tests of what Services are given, over a real store.

#![allow(clippy::unwrap_used, reason = "a failed step fails the test")]

use std::sync::Arc;

use serde_json::json;
use xebec_schema::{defaults, strategy, table, validate};
use xebec_store::{Embedded, Options};

use super::*;

const BOTH: &[&str] = &["10.96.0.0/24", "fd00:96::/112"];

struct Cluster {
    allocator: Allocator,
    store: Arc<dyn Store>,
    _directory: tempfile::TempDir,
}

impl Cluster {
    fn new(cidrs: &[&str]) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let allocator = Allocator {
            cidrs: cidrs.iter().map(|cidr| cidr.parse().unwrap()).collect(),
            ports: 30000..=30020,
        };
        Self {
            allocator,
            store: Embedded::open(&directory.path().join("store"), Options::default()).unwrap(),
            _directory: directory,
        }
    }

    async fn commit(&self, txn: Txn) {
        let done = self.store.txn(txn).await.unwrap();
        assert!(matches!(done, TxnOutcome::Committed(_)), "{done:?}");
    }

    /// What a new Service with this spec becomes, or what is said against it.
    async fn create(&self, spec: Value) -> Result<Value, String> {
        let services = table::resource("", "v1", "services").unwrap();
        let mut service = json!({"metadata": {"name": "s", "namespace": "n"}, "spec": spec});
        defaults::set_defaults(services, &mut service);
        self.allocator
            .assign(self.store.as_ref(), None, &mut service, false)
            .await
            .map_err(|error| error.to_string())?;
        refuse(validate::validate_create(services, &service))?;
        let claims = Allocator::claims(None, &service);
        if !claims.ops.is_empty() {
            self.commit(claims).await;
        }
        Ok(service)
    }

    /// What becomes of it with these changes, as a merge patch.
    async fn patch(&self, old: &Value, patch: Value) -> Result<Value, String> {
        let services = table::resource("", "v1", "services").unwrap();
        let mut new = old.clone();
        json_patch::merge(&mut new, &json!({"spec": patch}));
        defaults::set_defaults(services, &mut new);
        self.allocator
            .assign(self.store.as_ref(), Some(old), &mut new, false)
            .await
            .map_err(|error| error.to_string())?;
        strategy::prepare_for_update(services, old, &mut new);
        defaults::set_defaults(services, &mut new);
        refuse(validate::validate_update(services, old, &new))?;
        let claims = Allocator::claims(Some(old), &new);
        if !claims.ops.is_empty() {
            self.commit(claims).await;
        }
        Ok(new)
    }

    async fn claimed(&self) -> Vec<String> {
        let keys = prefix_range(RANGES.into());
        let request = RangeRequest {
            keys,
            at: None,
            limit: 0,
        };
        let kvs = self.store.range(request).await.unwrap().kvs;
        let last = |kv: &KeyValue| String::from_utf8_lossy(&kv.key[RANGES.len()..]).into_owned();
        kvs.iter().map(last).collect()
    }
}

fn refuse(errors: Vec<FieldError>) -> Result<(), String> {
    match errors.first() {
        Some(error) => Err(error.to_string()),
        None => Ok(()),
    }
}

fn families(service: &Value) -> (&str, Vec<&str>, usize) {
    let spec = &service["spec"];
    let families = list(&spec["ipFamilies"]).iter();
    (
        spec["ipFamilyPolicy"].as_str().unwrap_or_default(),
        families.filter_map(Value::as_str).collect(),
        list(&spec["clusterIPs"]).len(),
    )
}

fn plain(more: Value) -> Value {
    let mut spec = json!({"selector": {"a": "b"}, "ports": [{"port": 80}]});
    json_patch::merge(&mut spec, &more);
    spec
}

/// The table of KEP-563: policy, families and addresses that are given, on clusters of one family and of two.
#[tokio::test]
async fn families_follow_from_what_is_given() {
    let (v4, v6, both, other) = (
        Cluster::new(&["10.96.0.0/24"]),
        Cluster::new(&["fd00:96::/112"]),
        Cluster::new(BOTH),
        Cluster::new(&[BOTH[1], BOTH[0]]),
    );
    let (four, six) = ("IPv4", "IPv6");
    let single = |policy: &'static str| json!({"ipFamilyPolicy": policy});
    let cases: Vec<(&Cluster, Value, &str, Vec<&str>)> = vec![
        (&v4, json!({}), "SingleStack", vec![four]),
        (&v6, json!({}), "SingleStack", vec![six]),
        (&both, json!({}), "SingleStack", vec![four]),
        (&other, json!({}), "SingleStack", vec![six]),
        (
            &both,
            json!({"ipFamilies": ["IPv6"]}),
            "SingleStack",
            vec![six],
        ),
        (
            &both,
            json!({"clusterIP": "fd00:96::7"}),
            "SingleStack",
            vec![six],
        ),
        (
            &v4,
            single("PreferDualStack"),
            "PreferDualStack",
            vec![four],
        ),
        (
            &both,
            single("PreferDualStack"),
            "PreferDualStack",
            vec![four, six],
        ),
        (
            &other,
            single("RequireDualStack"),
            "RequireDualStack",
            vec![six, four],
        ),
        (
            &both,
            json!({"ipFamilyPolicy": "RequireDualStack", "ipFamilies": ["IPv6"]}),
            "RequireDualStack",
            vec![six, four],
        ),
        (
            &both,
            json!({"ipFamilyPolicy": "RequireDualStack", "clusterIP": "fd00:96::8",
                "clusterIPs": ["fd00:96::8", "10.96.0.8"]}),
            "RequireDualStack",
            vec![six, four],
        ),
    ];
    for (cluster, given, policy, wanted) in cases {
        let made = cluster.create(plain(given.clone())).await.unwrap();
        assert_eq!(
            families(&made),
            (policy, wanted.clone(), wanted.len()),
            "{given}"
        );
        for (ip, family) in list(&made["spec"]["clusterIPs"]).iter().zip(wanted) {
            let ip: IpAddr = ip.as_str().unwrap().parse().unwrap();
            assert_eq!(families::of_address(ip), family, "{given}");
        }
        assert_eq!(made["spec"]["clusterIP"], made["spec"]["clusterIPs"][0]);
    }
}

#[tokio::test]
async fn headless_services_have_families_without_addresses() {
    let (v4, both) = (Cluster::new(&["10.96.0.0/24"]), Cluster::new(BOTH));
    let headless = |more: Value| {
        let mut spec = json!({"clusterIP": "None", "selector": {"a": "b"}});
        json_patch::merge(&mut spec, &more);
        spec
    };
    let made = both.create(headless(json!({}))).await.unwrap();
    assert_eq!(families(&made), ("SingleStack", vec!["IPv4"], 1));
    let open = json!({"selector": null});
    let made = v4.create(headless(open.clone())).await.unwrap();
    assert_eq!(
        families(&made),
        ("RequireDualStack", vec!["IPv4", "IPv6"], 1)
    );
    let one = json!({"selector": null, "ipFamilyPolicy": "SingleStack", "ipFamilies": ["IPv6"]});
    let made = v4.create(headless(one)).await.unwrap();
    assert_eq!(families(&made), ("SingleStack", vec!["IPv6"], 1));
    let prefers = json!({"ipFamilyPolicy": "PreferDualStack"});
    let made = both.create(headless(prefers)).await.unwrap();
    assert_eq!(
        families(&made),
        ("PreferDualStack", vec!["IPv4", "IPv6"], 1)
    );
    assert!(both.claimed().await.is_empty());
}

#[tokio::test]
async fn what_does_not_go_together_is_refused() {
    let (v4, both) = (Cluster::new(&["10.96.0.0/24"]), Cluster::new(BOTH));
    let two = json!(["10.96.0.9", "fd00:96::9"]);
    for (cluster, given, error) in [
        (
            &v4,
            json!({"ipFamilyPolicy": "RequireDualStack"}),
            r#"spec.ipFamilyPolicy: Invalid value: "RequireDualStack": this cluster is not configured for dual-stack services"#,
        ),
        (
            &v4,
            json!({"ipFamilies": ["IPv6"]}),
            r#"spec.ipFamilies[0]: Invalid value: "IPv6": not configured on this cluster"#,
        ),
        (
            &both,
            json!({"ipFamilies": ["IPv4", "IPv6"]}),
            r#"spec.ipFamilyPolicy: Invalid value: "SingleStack": must be 'RequireDualStack' or 'PreferDualStack' when multiple IP families are specified"#,
        ),
        (
            &both,
            json!({"clusterIP": "10.96.0.9", "clusterIPs": two}),
            r#"spec.ipFamilyPolicy: Invalid value: "SingleStack": must be 'RequireDualStack' or 'PreferDualStack' when multiple cluster IPs are specified"#,
        ),
        (
            &both,
            json!({"clusterIP": "10.96.0.9", "ipFamilies": ["IPv6"]}),
            r#"spec.clusterIPs[0]: Invalid value: "10.96.0.9": expected an IPv6 value as indicated by `ipFamilies[0]`"#,
        ),
        (
            &both,
            json!({"clusterIPs": two}),
            r#"spec.clusterIPs: Invalid value: ["10.96.0.9","fd00:96::9"]: must be empty when `clusterIP` is not specified"#,
        ),
        (
            &both,
            json!({"clusterIP": "10.96.0.9", "clusterIPs": ["10.96.0.9", "10.96.0.10"], "ipFamilyPolicy": "PreferDualStack"}),
            r#"spec.clusterIPs: Invalid value: ["10.96.0.9","10.96.0.10"]: may specify no more than one IP for each IP family"#,
        ),
        (
            &both,
            json!({"clusterIP": "fd00:97::1"}),
            r#"spec.clusterIPs: Invalid value: ["fd00:97::1"]: failed to allocate IP fd00:97::1: the provided IP (fd00:97::1) is not in the valid range. The range of valid IPs is fd00:96::/112"#,
        ),
        (
            &both,
            json!({"type": "NodePort", "clusterIP": "None"}),
            r#"spec.clusterIPs[0]: Invalid value: "None": may not be set to 'None' for NodePort services"#,
        ),
        (
            &both,
            json!({"type": "LoadBalancer", "ports": [{"port": 10250}]}),
            "spec.ports[0]: Invalid value: 10250: may not expose port 10250 externally since it is used by kubelet",
        ),
        (
            &both,
            json!({"type": "ExternalName", "externalName": "a.example", "ipFamilyPolicy": "SingleStack"}),
            "spec.ipFamilyPolicy: Forbidden: may not be set for ExternalName services",
        ),
    ] {
        let said = cluster.create(plain(given.clone())).await.unwrap_err();
        assert!(said.contains(error), "{given}:\n{said}\n{error}");
        assert!(cluster.claimed().await.is_empty(), "{given}");
    }
}

#[tokio::test]
async fn one_family_becomes_two_and_one_again() {
    let cluster = Cluster::new(BOTH);
    let one = cluster.create(plain(json!({}))).await.unwrap();
    let wish = json!({"ipFamilyPolicy": "PreferDualStack"});
    let two = cluster.patch(&one, wish).await.unwrap();
    assert_eq!(families(&two), ("PreferDualStack", vec!["IPv4", "IPv6"], 2));
    assert_eq!(two["spec"]["clusterIPs"][0], one["spec"]["clusterIP"]);
    assert_eq!(cluster.claimed().await.len(), 2);

    let first = json!({"clusterIPs": [two["spec"]["clusterIPs"][0]]});
    let said = cluster.patch(&two, first).await.unwrap_err();
    assert!(
        said.contains("must be 'SingleStack' to release the secondary cluster IP"),
        "{said}"
    );
    let said = cluster
        .patch(&two, json!({"ipFamilies": ["IPv4"]}))
        .await
        .unwrap_err();
    assert!(
        said.contains("must be 'SingleStack' to release the secondary IP family"),
        "{said}"
    );
    let swapped = json!({"ipFamilies": ["IPv6", "IPv4"]});
    assert!(cluster.patch(&two, swapped).await.is_err());
    let moved = json!({"clusterIP": "10.96.0.200"});
    let said = cluster.patch(&one, moved).await.unwrap_err();
    assert!(
        said.contains(
            r#"spec.clusterIPs[0]: Invalid value: ["10.96.0.200"]: may not change once set"#
        ),
        "{said}"
    );

    let back = cluster
        .patch(&two, json!({"ipFamilyPolicy": "SingleStack"}))
        .await
        .unwrap();
    assert_eq!(back["spec"], one["spec"]);
    assert_eq!(cluster.claimed().await.len(), 1, "the second went back");
}

#[tokio::test]
async fn one_that_prefers_two_families_changes_only_when_it_is_asked_to() {
    let single = Cluster::new(&BOTH[..1]);
    let wish = json!({"ipFamilyPolicy": "PreferDualStack"});
    let made = single.create(plain(wish)).await.unwrap();
    // The same Service after the cluster was given a second range.
    let cluster = Cluster::new(BOTH);
    let same = cluster.patch(&made, json!({"sessionAffinity": "None"}));
    assert_eq!(families(&same.await.unwrap()).1, ["IPv4"]);
    let more = json!({"ipFamilyPolicy": "RequireDualStack"});
    let more = cluster.patch(&made, more).await.unwrap();
    assert_eq!(
        families(&more),
        ("RequireDualStack", vec!["IPv4", "IPv6"], 2)
    );
}

#[tokio::test]
async fn ports_at_the_nodes() {
    let cluster = Cluster::new(BOTH);
    let dns = json!({"type": "NodePort", "ports": [
        {"name": "a", "port": 53, "protocol": "UDP"}, {"name": "b", "port": 53, "protocol": "TCP"},
        {"name": "c", "port": 54, "protocol": "TCP"}]});
    let made = cluster.create(plain(dns)).await.unwrap();
    let port = |service: &Value, index: usize| service["spec"]["ports"][index]["nodePort"].clone();
    assert_eq!(
        port(&made, 0),
        port(&made, 1),
        "one number for both protocols"
    );
    assert_ne!(port(&made, 0), port(&made, 2));
    let ask = |number: Value| {
        plain(
            json!({"type": "NodePort", "ports": [{"port": 9, "protocol": "SCTP", "nodePort": number}]}),
        )
    };
    let said = cluster.create(ask(port(&made, 0))).await.unwrap_err();
    let taken = format!(
        "spec.ports[0].nodePort: Invalid value: {}: provided port is already allocated",
        port(&made, 0)
    );
    assert!(said.contains(&taken), "{said}");
    let said = cluster.create(ask(json!(40000))).await.unwrap_err();
    assert!(
        said.contains("Invalid value: 40000: provided port is not in the valid range. The range of valid ports is 30000-30020"),
        "{said}"
    );
    // A client that leaves the numbers out keeps them, by name.
    let again = json!({"ports": [{"name": "c", "port": 99, "protocol": "TCP", "targetPort": 99},
        {"name": "a", "port": 53, "protocol": "UDP", "targetPort": 53}]});
    let again = cluster.patch(&made, again).await.unwrap();
    assert_eq!(
        (port(&again, 0), port(&again, 1)),
        (port(&made, 2), port(&made, 0))
    );

    let internal = cluster
        .patch(&again, json!({"type": "ClusterIP"}))
        .await
        .unwrap();
    assert!(port(&internal, 0).is_null());
    assert_eq!(
        cluster.claimed().await.len(),
        1,
        "{:?}",
        cluster.claimed().await
    );
    let name = json!({"type": "ExternalName", "externalName": "a.example"});
    let name = cluster.patch(&internal, name).await.unwrap();
    assert!(cluster.claimed().await.is_empty());
    assert_eq!(families(&name), ("", vec![], 0));
    let back = cluster
        .patch(&name, json!({"type": "NodePort"}))
        .await
        .unwrap();
    assert_eq!(families(&back), ("SingleStack", vec!["IPv4"], 1));
    assert_eq!(cluster.claimed().await.len(), 3);
}

#[tokio::test]
async fn balancers_may_do_without_node_ports_and_have_one_for_health() {
    let cluster = Cluster::new(BOTH);
    let spec = json!({"type": "LoadBalancer", "allocateLoadBalancerNodePorts": false,
        "externalTrafficPolicy": "Local", "loadBalancerClass": "example.com/a"});
    let made = cluster.create(plain(spec)).await.unwrap();
    assert!(made["spec"]["ports"][0]["nodePort"].is_null());
    let health = made["spec"]["healthCheckNodePort"].as_u64().unwrap();
    assert!((30000..=30020).contains(&health));
    assert!(
        cluster
            .claimed()
            .await
            .contains(&format!("servicenodeports/{health}"))
    );
    let said = cluster
        .patch(&made, json!({"healthCheckNodePort": health + 1}))
        .await
        .unwrap_err();
    assert_eq!(
        said,
        "spec.healthCheckNodePort: Forbidden: field is immutable"
    );
    let said = cluster
        .patch(&made, json!({"loadBalancerClass": "example.com/b"}))
        .await
        .unwrap_err();
    assert!(said.ends_with("may not change once set"), "{said}");
    let open = cluster
        .patch(&made, json!({"externalTrafficPolicy": "Cluster"}))
        .await
        .unwrap();
    assert!(open["spec"]["healthCheckNodePort"].is_null());
    assert_eq!(cluster.claimed().await.len(), 1);

    // With node ports, and without again: they go when they are taken out.
    let with = cluster
        .patch(&open, json!({"allocateLoadBalancerNodePorts": true}))
        .await
        .unwrap();
    assert_eq!(cluster.claimed().await.len(), 2);
    let kept = cluster
        .patch(&with, json!({"allocateLoadBalancerNodePorts": false}))
        .await
        .unwrap();
    assert_eq!(kept["spec"]["ports"], with["spec"]["ports"]);
    let gone = json!({"ports": [{"port": 80, "protocol": "TCP", "targetPort": 80}]});
    cluster.patch(&kept, gone).await.unwrap();
    assert_eq!(cluster.claimed().await.len(), 1);
}

/// Every address of a range can be had, and no more.
#[tokio::test]
async fn a_range_is_used_up_to_its_last_address() {
    let cluster = Cluster::new(&["10.96.0.0/29", "fd00:96::/125"]);
    for _ in 0..6 {
        cluster.create(plain(json!({}))).await.unwrap();
    }
    let said = cluster.create(plain(json!({}))).await.unwrap_err();
    assert!(said.contains("range is full"), "{said}");
    for _ in 0..7 {
        let six = plain(json!({"ipFamilies": ["IPv6"]}));
        cluster.create(six).await.unwrap();
    }
    assert_eq!(cluster.claimed().await.len(), 13);
}

#[tokio::test]
async fn claims_are_put_right_at_the_start() {
    let cluster = Cluster::new(BOTH);
    let services = table::resource("", "v1", "services").unwrap();
    let made = cluster
        .create(plain(json!({"type": "NodePort"})))
        .await
        .unwrap();
    let right = cluster.claimed().await;
    let value = crate::encode::store(&made);
    let old: Bytes = format!("{RANGES}servicenodeports/TCP/30005").into();
    let ops = vec![
        Op::Put {
            key: key(services, Some("n"), Some("s")),
            value,
        },
        Op::Put {
            key: old,
            value: Bytes::from_static(b"n/gone"),
        },
        Op::Delete {
            key: format!("{RANGES}{}", right[0]).into(),
        },
    ];
    cluster
        .commit(Txn {
            compare: Vec::new(),
            ops,
        })
        .await;
    assert_ne!(cluster.claimed().await, right);
    let store = cluster.store.as_ref();
    cluster.allocator.repair(store, services).await.unwrap();
    assert_eq!(cluster.claimed().await, right);
}
