//! kill -9 of the whole cluster's process: pods, their addresses and their connections go on, and the next
//! `up` finds them running.

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader};
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result};
use nix::sys::signal::Signal;
use xebec_tests::{Cluster, Machine, assert_nothing_left, eventually, kill, shop};

/// Name, address, container id and restart count of the shop's pods.
fn pods(cluster: &Cluster) -> Result<BTreeMap<String, (String, String, u64)>> {
    let pods = cluster.get(&["pods", "-n", "shop"])?;
    Ok(pods["items"]
        .as_array()
        .into_iter()
        .flatten()
        .map(|pod| {
            let container = &pod["status"]["containerStatuses"][0];
            let text = |value: &serde_json::Value| value.as_str().unwrap_or_default().to_owned();
            let state = (
                text(&pod["status"]["podIP"]),
                text(&container["containerID"]),
                container["restartCount"].as_u64().unwrap_or(99),
            );
            (text(&pod["metadata"]["name"]), state)
        })
        .collect())
}

/// How many answers come over the connection, one a second.
const ANSWERS: usize = 14;

/// The network namespace of the first pod whose name begins so.
fn network_of(cluster: &Cluster, prefix: &str) -> Result<String> {
    let endpoints = cluster.run(&["endpoint", "list", "-o", "json"])?;
    let endpoints: serde_json::Value =
        serde_json::from_str(&endpoints).context("the list is no JSON")?;
    let sandbox = endpoints
        .as_array()
        .into_iter()
        .flatten()
        .find(|one| {
            one["pod"]
                .as_str()
                .is_some_and(|pod| pod.starts_with(prefix))
        })
        .and_then(|one| one["container"].as_str())
        .with_context(|| format!("no endpoint {prefix}*"))?;
    let nodes = cluster.get(&["nodes"])?;
    let node = nodes["items"][0]["metadata"]["name"]
        .as_str()
        .context("no node")?;
    let path = cluster
        .run_dir()
        .join(format!("nodes/{node}/cri/netns/{sandbox}"));
    Ok(path.to_string_lossy().into_owned())
}

#[test]
fn killing_everything_but_the_shims_disturbs_nobody() -> Result<()> {
    let before = Machine::now()?;
    let mut cluster = Cluster::up("restart", &[])?;
    cluster.k(&["apply", "-f", &shop::manifest().to_string_lossy()])?;
    eventually("the shop is Ready", Duration::from_secs(60), || {
        Ok(cluster.ready_pods("shop", "app=web")?.len() == 3
            && cluster.ready_pods("shop", "app=api")?.len() == 2)
    })?;
    let running = pods(&cluster)?;
    // One connection between pods that stays open over the kill and the restart, under a policy that allows it.
    let address = running
        .iter()
        .find(|(name, _)| name.starts_with("api-"))
        .map(|(_, pod)| pod.0.clone())
        .context("no api pod")?;
    let urls: Vec<String> = (0..ANSWERS)
        .map(|n| format!("http://{address}:8080/whoami?{n}"))
        .collect();
    let mut client = Command::new("nsenter")
        .arg(format!("--net={}", network_of(&cluster, "web-")?))
        .args([
            "curl",
            "--silent",
            "--show-error",
            "--fail",
            "--rate",
            "1/s",
            "--write-out",
            "%{num_connects}\\n",
        ])
        .args(&urls)
        .stdout(Stdio::piped())
        .spawn()
        .context("could not start curl")?;
    // Between the pod's names stand the counts of connections that each answer needed.
    let mut answers = BufReader::new(client.stdout.take().context("curl has no output")?)
        .lines()
        .filter(|line| !line.as_ref().is_ok_and(|line| line.starts_with("api-")));
    assert_eq!(
        answers.next().transpose()?.as_deref(),
        Some("1"),
        "the first answer opens the connection"
    );
    kill(cluster.pid()?, Signal::SIGKILL)?;
    for _ in 0..3 {
        assert_eq!(
            answers.next().transpose()?.as_deref(),
            Some("0"),
            "while nothing but the shims runs"
        );
    }
    cluster.start()?;
    let rest: Vec<String> = answers.collect::<Result<_, _>>()?;
    assert!(client.wait()?.success(), "the connection broke");
    assert_eq!(
        rest,
        ["0"; ANSWERS - 4],
        "all answers came over the one connection"
    );
    eventually(
        "the API knows the pods again",
        Duration::from_secs(60),
        || Ok(cluster.ready_pods("shop", "app=web")?.len() == 3),
    )?;
    assert_eq!(
        running,
        pods(&cluster)?,
        "the same containers run, with the same addresses"
    );
    // Killed once more, `down` alone cleans up.
    kill(cluster.pid()?, Signal::SIGKILL)?;
    cluster.down()?;
    assert_nothing_left(&before)?;
    Ok(())
}
