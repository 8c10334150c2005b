//! The example application: Services, scaling, a backend lost under load, and nothing left behind.

use std::collections::BTreeMap;
use std::process::Stdio;
use std::time::Duration;

use anyhow::{Context, Result};
use serde_json::Value;
use xebec_tests::{Cluster, Machine, assert_nothing_left, eventually, shop, succeed, xebec_bin};

const MINUTE: Duration = Duration::from_secs(60);

fn apply_shop(cluster: &Cluster) -> Result<()> {
    let manifest = shop();
    cluster.k(&["apply", "-f", &manifest.to_string_lossy()])?;
    eventually("all pods of the shop are Ready", MINUTE, || {
        Ok(cluster.ready_pods("shop", "app=web")?.len() == 3
            && cluster.ready_pods("shop", "app=api")?.len() == 2
            && cluster.ready_pods("shop", "app=stranger")?.len() == 1)
    })
}

/// Runs the demo client and gives how many answers came from whom; fails if any request failed.
fn requests(command: &mut std::process::Command) -> Result<BTreeMap<String, u64>> {
    let text = succeed(
        "demo get",
        command.output().context("could not start the client")?,
    )?;
    let mut answers = BTreeMap::new();
    for line in text.lines() {
        if line.contains(" requests in ") {
            anyhow::ensure!(line.starts_with("0 failed"), "requests were lost: {text}");
            continue;
        }
        // A `web` answers its own name, then its upstream's on a line without a count.
        if let Some((count, name)) = line.split_once(' ') {
            *answers.entry(name.to_owned()).or_default() += count.parse::<u64>().unwrap_or(0);
        }
    }
    Ok(answers)
}

/// From the node itself, which reaches Services as its pods do.
fn through_cluster_ip(cluster: &Cluster) -> Result<BTreeMap<String, u64>> {
    let address = cluster.get(&["service", "api", "-n", "shop"])?["spec"]["clusterIP"]
        .as_str()
        .unwrap_or_default()
        .to_owned();
    requests(std::process::Command::new(xebec_bin()).args([
        "demo",
        "get",
        &format!("http://{address}/whoami"),
        "-n",
        "1000",
        "--summary",
        "--keep-going",
    ]))
}

/// From pods: each `web` answers with its own name and with that of the `api` that it asked through the Service.
fn pods_reach_the_service(cluster: &Cluster) -> Result<()> {
    let address = node_address(cluster)?;
    let text = succeed(
        "demo get",
        std::process::Command::new(xebec_bin())
            .args([
                "demo",
                "get",
                &format!("http://{address}:30080/"),
                "-n",
                "1000",
                "--keep-going",
            ])
            .output()
            .context("could not start the client")?,
    )?;
    let mut apis = BTreeMap::<&str, u64>::new();
    for line in text.lines().filter(|line| line.starts_with("api-")) {
        *apis.entry(line).or_default() += 1;
    }
    assert_eq!(apis.values().sum::<u64>(), 1000, "{apis:?}");
    let ready = cluster.ready_pods("shop", "app=api")?;
    assert!(ready.iter().map(String::as_str).eq(apis.keys().copied()));
    Ok(())
}

/// The pod that no rule lets in is dropped, and its flow says by which policy.
fn denied_flow_names_the_policy(cluster: &Cluster) -> Result<()> {
    eventually(
        "the denied pod's flow is seen with its policy",
        MINUTE,
        || {
            let flows = cluster.run(&[
                "observe",
                "-o",
                "json",
                "--verdict",
                "DROPPED",
                "--namespace",
                "shop",
                "--last",
                "50",
            ])?;
            Ok(flows
                .lines()
                .filter_map(|line| serde_json::from_str::<Value>(line).ok())
                .any(|value| {
                    let flow = &value["flow"];
                    flow["verdict"] == "DROPPED"
                        && flow["source"]["pod_name"] == "stranger"
                        && flow["ingress_denied_by"]
                            .as_array()
                            .is_some_and(|by| by.iter().any(|p| p["name"] == "api-from-web"))
                }))
        },
    )
}

fn node_address(cluster: &Cluster) -> Result<String> {
    let nodes = cluster.get(&["nodes"])?;
    Ok(nodes["items"][0]["status"]["addresses"]
        .as_array()
        .and_then(|all| all.iter().find(|a| a["type"] == "InternalIP"))
        .and_then(|a| a["address"].as_str())
        .context("the node has no address")?
        .to_owned())
}

fn through_node_port(cluster: &Cluster, count: u64) -> Result<BTreeMap<String, u64>> {
    let address = node_address(cluster)?;
    let url = format!("http://{address}:30080/whoami");
    let count = count.to_string();
    requests(std::process::Command::new(xebec_bin()).args([
        "demo",
        "get",
        &url,
        "-n",
        &count,
        "--summary",
        "--keep-going",
    ]))
}

fn assert_spread(
    answers: &BTreeMap<String, u64>,
    pods: &std::collections::BTreeSet<String>,
    total: u64,
) {
    assert_eq!(answers.values().sum::<u64>(), total, "{answers:?}");
    assert_eq!(
        answers.keys().collect::<Vec<_>>(),
        pods.iter().collect::<Vec<_>>(),
        "every backend answers, and nobody else"
    );
}

fn scaled_pods_get_traffic(cluster: &Cluster) -> Result<()> {
    cluster.k(&["scale", "deployment/web", "-n", "shop", "--replicas=5"])?;
    eventually("five web pods are Ready", MINUTE, || {
        Ok(cluster.ready_pods("shop", "app=web")?.len() == 5)
    })?;
    let pods = cluster.ready_pods("shop", "app=web")?;
    eventually("all five answer", MINUTE, || {
        Ok(through_node_port(cluster, 200)?.keys().collect::<Vec<_>>()
            == pods.iter().collect::<Vec<_>>())
    })
}

/// Requests go on while a backend is deleted: none fails.
fn no_request_fails_when_a_backend_goes(cluster: &Cluster) -> Result<()> {
    let victim = cluster
        .ready_pods("shop", "app=web")?
        .into_iter()
        .next()
        .context("no web pod")?;
    let address = node_address(cluster)?;
    let load = std::process::Command::new(xebec_bin())
        .args([
            "demo",
            "get",
            &format!("http://{address}:30080/whoami"),
            "-n",
            "2000",
            "--interval-ms",
            "2",
            "--summary",
            "--keep-going",
        ])
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .context("could not start the client")?;
    cluster.k(&["delete", "pod", &victim, "-n", "shop", "--wait=true"])?;
    let text = succeed(
        "demo get",
        load.wait_with_output()
            .context("could not wait for the client")?,
    )?;
    assert!(
        text.contains("0 failed, 2000 requests"),
        "requests failed when {victim} went: {text}\n{}",
        cluster.log()
    );
    Ok(())
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
    apply_shop(&cluster)?;
    assert_spread(
        &through_cluster_ip(&cluster)?,
        &cluster.ready_pods("shop", "app=api")?,
        1000,
    );
    assert_spread(
        &through_node_port(&cluster, 1000)?,
        &cluster.ready_pods("shop", "app=web")?,
        1000,
    );
    pods_reach_the_service(&cluster)?;
    denied_flow_names_the_policy(&cluster)?;
    let logs = cluster.k(&["logs", "-n", "shop", "deployment/web"])?;
    let answers = cluster.k(&["logs", "-n", "shop", "stranger"])?;
    assert!(
        !answers.contains("api-"),
        "the stranger got through: {answers}"
    );
    assert!(logs.contains("listens on"), "{logs}");
    scaled_pods_get_traffic(&cluster)?;
    no_request_fails_when_a_backend_goes(&cluster)?;
    typed_commands(&cluster)?;
    cluster.run(&["status"])?;
    cluster.down()?;
    assert_nothing_left(&before)?;
    // The data survived: the next `up` finds the same objects and runs their pods.
    cluster.start()?;
    eventually("the shop's pods run again", MINUTE, || {
        let ready = cluster.ready_pods("shop", "app=web")?;
        Ok(ready.len() == 5 && through_node_port(&cluster, 200)?.keys().eq(ready.iter()))
    })?;
    cluster.down()?;
    assert_nothing_left(&before)?;
    Ok(())
}
