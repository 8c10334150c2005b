//! The example application: Services, scaling, a backend lost under load, and nothing left behind.

use std::time::Duration;

use anyhow::{Context, Result};
use xebec_tests::shop::From;
use xebec_tests::{Cluster, Machine, assert_nothing_left, eventually, shop};

const MINUTE: Duration = Duration::from_secs(60);

/// 1,000 requests through the cluster IP and through the node port: none is lost, and each backend answers. From
/// the node itself, which reaches Services as its pods do; each `web` asks an `api` through its Service.
fn all_backends_answer(cluster: &Cluster, port: &str) -> Result<()> {
    let (web, api) = (
        cluster.ready_pods("shop", "app=web")?,
        cluster.ready_pods("shop", "app=api")?,
    );
    let both = web.union(&api).cloned().collect();
    for (url, pods, counts) in [
        (
            shop::cluster_ip(cluster, "api", "/whoami")?,
            &api,
            (0, 1000),
        ),
        (format!("{port}/whoami"), &web, (1000, 0)),
        (format!("{port}/"), &both, (1000, 1000)),
    ] {
        let answers = shop::ask(&url, 1000)?;
        answers.assert_spread(&url, pods);
        assert_eq!((answers.of("web"), answers.of("api")), counts, "{url}");
    }
    Ok(())
}

/// One of five backends goes while the node and a pod ask.
fn no_request_fails_when_a_backend_goes(cluster: &Cluster, node: &str, port: &str) -> Result<()> {
    let victim = cluster.ready_pods("shop", "app=web")?;
    let victim = victim.first().context("no web pod")?;
    let load = [
        (From::Machine, format!("{port}/whoami")),
        (From::Node(node), format!("{port}/whoami")),
        (
            From::Node(node),
            shop::cluster_ip(cluster, "web", "/whoami")?,
        ),
    ];
    shop::lose_a_backend(cluster, victim, &load)
}

/// Commands whose objects kubectl sends in protobuf.
fn typed_commands(cluster: &Cluster) -> Result<()> {
    cluster.k(&["create", "namespace", "typed"])?;
    cluster.k(&[
        "create",
        "deployment",
        "one",
        "-n",
        "typed",
        "--image=xebec.local/demo:latest",
        "--replicas=2",
        "--port=8080",
    ])?;
    let made = cluster.get(&["deployment", "one", "-n", "typed"])?;
    assert_eq!(made["spec"]["replicas"], 2);
    assert_eq!(
        made["spec"]["template"]["spec"]["containers"][0]["ports"][0]["containerPort"],
        8080
    );
    cluster.k(&[
        "create",
        "configmap",
        "settings",
        "-n",
        "typed",
        "--from-literal=colour=red",
    ])?;
    let made = cluster.get(&["configmap", "settings", "-n", "typed"])?;
    assert_eq!(made["data"]["colour"], "red");
    cluster.k(&[
        "expose",
        "deployment",
        "one",
        "-n",
        "typed",
        "--port=80",
        "--target-port=8080",
    ])?;
    cluster.k(&["delete", "namespace", "typed"])?;
    Ok(())
}

#[test]
fn shop_on_one_node_and_nothing_left_behind() -> Result<()> {
    let before = Machine::now()?;
    let mut cluster = Cluster::up("shop", &[])?;
    shop::apply(&cluster)?;
    let addresses = shop::node_addresses(&cluster)?;
    let (node, address) = addresses.first_key_value().context("no node")?;
    let port = shop::node_port(address, "");
    all_backends_answer(&cluster, &port)?;
    shop::stranger_is_denied(&cluster, |_| true)?;
    let logs = cluster.k(&["logs", "-n", "shop", "deployment/web"])?;
    assert!(logs.contains("listens on"), "{logs}");
    shop::scale_web(&cluster, 5, &[format!("{port}/whoami")])?;
    no_request_fails_when_a_backend_goes(&cluster, node, &port)?;
    typed_commands(&cluster)?;
    cluster.run(&["status"])?;
    cluster.down()?;
    assert_nothing_left(&before)?;
    // The data survived: the next `up` finds the same objects and runs their pods.
    cluster.start()?;
    eventually("the shop's pods run again", MINUTE, || {
        let ready = cluster.ready_pods("shop", "app=web")?;
        Ok(ready.len() == 5
            && shop::ask(&format!("{port}/whoami"), 200)?
                .by_pod
                .keys()
                .eq(&ready))
    })?;
    shop::assert_pods_waited_for_the_network(&cluster);
    cluster.down()?;
    assert_nothing_left(&before)?;
    Ok(())
}
