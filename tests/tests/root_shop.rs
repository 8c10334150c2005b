//! The example application on one node and on two: Services, policy, flows, scaling, a backend lost under
//! load, and nothing left behind.

use std::collections::BTreeMap;
use std::process::Stdio;
use std::time::Duration;

use anyhow::{Context, Result};
use serde_json::Value;
use xebec_tests::{Cluster, Machine, eventually, shop, succeed, xebec_bin};

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

fn through_cluster_ip(cluster: &Cluster) -> Result<BTreeMap<String, u64>> {
    let address = cluster.get(&["service", "api", "-n", "shop"])?["spec"]["clusterIP"]
        .as_str()
        .unwrap_or_default()
        .to_owned();
    let url = format!("http://{address}/");
    let pod = cluster
        .ready_pods("shop", "app=web")?
        .into_iter()
        .next()
        .context("no web pod")?;
    requests(&mut cluster.kubectl(&[
        "exec",
        "-n",
        "shop",
        &pod,
        "--",
        "/bin/xebec",
        "demo",
        "get",
        &url,
        "-n",
        "1000",
        "--summary",
        "--keep-going",
    ]))
}

fn through_node_port(cluster: &Cluster, count: u64) -> Result<BTreeMap<String, u64>> {
    let nodes = cluster.get(&["nodes"])?;
    let address = nodes["items"][0]["status"]["addresses"]
        .as_array()
        .and_then(|all| all.iter().find(|a| a["type"] == "InternalIP"))
        .and_then(|a| a["address"].as_str())
        .context("the node has no address")?
        .to_owned();
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
    let address = cluster.get(&["nodes"])?["items"][0]["status"]["addresses"][0]["address"]
        .as_str()
        .unwrap_or_default()
        .to_owned();
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
    denied_flow_names_the_policy(&cluster)?;
    let logs = cluster.k(&["logs", "-n", "shop", "deployment/web"])?;
    assert!(logs.contains("listens on"), "{logs}");
    scaled_pods_get_traffic(&cluster)?;
    no_request_fails_when_a_backend_goes(&cluster)?;
    cluster.run(&["status"])?;
    cluster.down()?;
    assert_eq!(before, Machine::now()?);
    // The data survived: the next `up` finds the same objects and runs their pods.
    cluster.start()?;
    eventually("the shop's pods run again", MINUTE, || {
        Ok(cluster.ready_pods("shop", "app=web")?.len() == 5
            && cluster.ready_pods("shop", "app=api")?.len() == 2)
    })?;
    cluster.down()?;
    assert_eq!(before, Machine::now()?);
    Ok(())
}

#[test]
fn shop_on_two_nodes() -> Result<()> {
    let before = Machine::now()?;
    let mut cluster = Cluster::up("two", &["--nodes", "2"])?;
    apply_shop(&cluster)?;
    let pods = cluster.get(&["pods", "-n", "shop"])?;
    let nodes: std::collections::BTreeSet<&str> = pods["items"]
        .as_array()
        .into_iter()
        .flatten()
        .filter_map(|pod| pod["spec"]["nodeName"].as_str())
        .collect();
    assert_eq!(nodes.len(), 2, "pods spread over both nodes");
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
    denied_flow_names_the_policy(&cluster)?;
    cluster.down()?;
    assert_eq!(before, Machine::now()?);
    Ok(())
}
