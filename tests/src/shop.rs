//! The example application under test: put in place, asked by many clients, scaled, robbed of a backend.

use std::collections::{BTreeMap, BTreeSet};
use std::io::Write;
use std::path::PathBuf;
use std::process::{Command, Output, Stdio};
use std::thread::JoinHandle;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};

use crate::{Cluster, eventually, succeed, xebec_bin};

const MINUTE: Duration = Duration::from_secs(60);
/// The port of `web` at every node.
const NODE_PORT: u16 = 30080;

/// The manifest; tests run in their package's folder.
pub fn manifest() -> PathBuf {
    PathBuf::from("../docs/examples/shop.yaml")
}

/// Applies the manifest and waits for all of its pods.
pub fn apply(cluster: &Cluster) -> Result<()> {
    cluster.k(&["apply", "-f", &manifest().to_string_lossy()])?;
    eventually("all pods of the shop are Ready", MINUTE, || is_up(cluster))
        .with_context(|| cluster.k(&["get", "events", "-A"]).unwrap_or_default())
}

/// Whether the pods of the manifest are Ready: three `web`, two `api` and the stranger.
pub fn is_up(cluster: &Cluster) -> Result<bool> {
    for (selector, count) in [("app=web", 3), ("app=api", 2), ("app=stranger", 1)] {
        if cluster.ready_pods("shop", selector)?.len() != count {
            return Ok(false);
        }
    }
    Ok(true)
}

/// `kubectl apply` of a stream of objects.
pub fn apply_objects(cluster: &Cluster, objects: &[Value]) -> Result<()> {
    let mut kubectl = cluster
        .kubectl(&["apply", "-f", "-"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .context("could not start kubectl")?;
    let mut pipe = kubectl.stdin.take().context("kubectl has no input")?;
    for object in objects {
        writeln!(pipe, "{object}").context("kubectl does not read")?;
    }
    drop(pipe);
    succeed("kubectl apply", kubectl.wait_with_output()?).map(drop)
}

/// The nodes' names with their addresses.
pub fn node_addresses(cluster: &Cluster) -> Result<BTreeMap<String, String>> {
    let nodes = cluster.get(&["nodes"])?;
    let one = |node: &Value| {
        let addresses = node["status"]["addresses"].as_array()?;
        let own = addresses.iter().find(|a| a["type"] == "InternalIP")?;
        let name = node["metadata"]["name"].as_str()?.to_owned();
        Some((name, own["address"].as_str()?.to_owned()))
    };
    let items = nodes["items"].as_array().into_iter().flatten();
    Ok(items.filter_map(one).collect())
}

/// `web`'s node port at this address.
pub fn node_port(address: &str, path: &str) -> String {
    format!("http://{address}:{NODE_PORT}{path}")
}

/// A Service of the shop at its cluster IP.
pub fn cluster_ip(cluster: &Cluster, service: &str, path: &str) -> Result<String> {
    let service = cluster.get(&["service", service, "-n", "shop"])?;
    let address = service["spec"]["clusterIP"]
        .as_str()
        .context("the Service has no address")?;
    Ok(format!("http://{address}{path}"))
}

/// What a client was answered.
#[derive(Debug, Default)]
pub struct Answers {
    /// How often each pod of the shop answered.
    pub by_pod: BTreeMap<String, u64>,
    /// What the client said of requests that failed.
    pub failures: Vec<String>,
}

impl Answers {
    /// Reads what `demo get` prints: a `web` answers its own name, then its upstream's on a line of its own.
    fn read(text: &str) -> Self {
        let mut answers = Self::default();
        for line in text.lines() {
            if line.starts_with("web-") || line.starts_with("api-") {
                *answers.by_pod.entry(line.to_owned()).or_default() += 1;
            } else {
                answers.failures.push(line.to_owned());
            }
        }
        answers
    }

    /// How many answers came from pods of this app.
    pub fn of(&self, app: &str) -> u64 {
        let prefix = format!("{app}-");
        let all = self
            .by_pod
            .iter()
            .filter(|(pod, _)| pod.starts_with(&prefix));
        all.map(|(_, count)| count).sum()
    }

    /// Fails unless each of these pods answered, nobody else did, and no request was lost.
    pub fn assert_spread(&self, what: &str, pods: &BTreeSet<String>) {
        assert!(self.failures.is_empty(), "{what}: {self:?}");
        assert!(
            self.by_pod.keys().eq(pods),
            "{what}: every backend answers, and nobody else: {self:?}"
        );
    }
}

fn client_args(url: &str, count: u64, interval_ms: u64) -> Vec<String> {
    let args = ["demo", "get", url, "--keep-going"];
    let mut args: Vec<String> = args.into_iter().map(str::to_owned).collect();
    args.push(format!("--count={count}"));
    args.push(format!("--interval-ms={interval_ms}"));
    // A machine that stands still for seconds now and then has lost no request by that.
    args.push("--timeout-ms=10000".to_owned());
    args
}

fn answers_of(output: std::io::Result<Output>) -> Result<Answers> {
    let output = output.context("could not start the client")?;
    Ok(Answers::read(&format!(
        "{}{}",
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    )))
}

/// Asks from the machine itself, one request after the other.
pub fn ask(url: &str, count: u64) -> Result<Answers> {
    let mut client = Command::new(xebec_bin());
    let answers = answers_of(client.args(client_args(url, count, 0)).output())?;
    ensure!(
        answers.failures.is_empty(),
        "{url}: requests were lost: {answers:?}"
    );
    Ok(answers)
}

/// Where a client runs.
#[derive(Clone, Copy, Debug)]
pub enum From<'a> {
    /// A process of the machine.
    Machine,
    /// A pod of this node.
    Node(&'a str),
}

/// Clients that ask at the same time, each so many requests.
pub struct Clients<'a> {
    cluster: &'a Cluster,
    here: Vec<(String, JoinHandle<std::io::Result<Output>>)>,
    pods: Vec<(String, String)>,
}

impl<'a> Clients<'a> {
    /// Starts a client for each of these URLs.
    pub fn start(
        cluster: &'a Cluster,
        wanted: &[(From<'_>, String)],
        count: u64,
        interval_ms: u64,
    ) -> Result<Self> {
        let mut clients = Self {
            cluster,
            here: Vec::new(),
            pods: Vec::new(),
        };
        let mut objects = Vec::new();
        for (at, (from, url)) in wanted.iter().enumerate() {
            let args = client_args(url, count, interval_ms);
            let what = format!("{from:?} to {url}");
            match from {
                From::Machine => {
                    let client = move || Command::new(xebec_bin()).args(args).output();
                    clients.here.push((what, std::thread::spawn(client)));
                }
                From::Node(node) => {
                    let name = format!("client-{at}");
                    objects.push(client_pod(&name, node, &args));
                    clients.pods.push((what, name));
                }
            }
        }
        if !objects.is_empty() {
            apply_objects(cluster, &objects)?;
        }
        Ok(clients)
    }

    /// Waits until each of the pods has got some answers.
    fn until_under_way(&self) -> Result<()> {
        for (what, name) in &self.pods {
            eventually(&format!("{what}: under way"), MINUTE, || {
                Ok(self.log(name)?.lines().count() > 100)
            })?;
        }
        Ok(())
    }

    fn log(&self, name: &str) -> Result<String> {
        self.cluster.k(&["logs", "-n", "shop", name])
    }

    /// What each was answered, by where it ran and what it asked. The clients are gone then.
    pub fn finish(self) -> Result<Vec<(String, Answers)>> {
        let mut all = Vec::new();
        for (what, name) in &self.pods {
            eventually(&format!("{what}: done"), MINUTE, || {
                let pod = self.cluster.get(&["pod", name, "-n", "shop"])?;
                Ok(["Succeeded", "Failed"]
                    .iter()
                    .any(|end| pod["status"]["phase"] == *end))
            })?;
            all.push((what.clone(), Answers::read(&self.log(name)?)));
        }
        if !self.pods.is_empty() {
            let names = self.pods.iter().map(|(_, name)| name.as_str());
            let delete = ["delete", "pod", "-n", "shop"].into_iter().chain(names);
            self.cluster.k(&delete.collect::<Vec<_>>())?;
        }
        for (what, client) in self.here {
            let output = client
                .join()
                .map_err(|_| anyhow::anyhow!("{what}: the client panicked"))?;
            all.push((what, answers_of(output)?));
        }
        Ok(all)
    }
}

fn client_pod(name: &str, node: &str, args: &[String]) -> Value {
    json!({
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": name, "namespace": "shop"},
        "spec": {
            "nodeName": node,
            "restartPolicy": "Never",
            "terminationGracePeriodSeconds": 1,
            "containers": [{
                "name": "client",
                "image": "xebec.local/demo:latest",
                "imagePullPolicy": "IfNotPresent",
                // The image's own command is the demo already.
                "args": &args[1..],
            }],
        },
    })
}

/// The pod that no rule lets in is dropped, and a flow that is also like this says by which policy.
pub fn stranger_is_denied(cluster: &Cluster, like: impl Fn(&Value) -> bool) -> Result<()> {
    eventually("the stranger's flow is dropped", MINUTE, || {
        let dropped = ["observe", "-o", "json", "--verdict", "DROPPED"];
        let last = ["--namespace", "shop", "--last", "100"];
        let flows = cluster.run(&[&dropped[..], &last].concat())?;
        let flows = flows
            .lines()
            .filter_map(|line| serde_json::from_str::<Value>(line).ok());
        Ok(flows.map(|value| value["flow"].clone()).any(|flow| {
            let by = flow["ingress_denied_by"].as_array();
            flow["verdict"] == "DROPPED"
                && flow["source"]["pod_name"] == "stranger"
                && by.is_some_and(|by| by.iter().any(|p| p["name"] == "api-from-web"))
                && like(&flow)
        }))
    })?;
    let answers = cluster.k(&["logs", "-n", "shop", "stranger"])?;
    ensure!(
        !answers.contains("api-"),
        "the stranger got through: {answers}"
    );
    explains(cluster)
}

/// `policy explain` says of `web` and the stranger towards `api` what their packets meet, and by which rule.
fn explains(cluster: &Cluster) -> Result<()> {
    let pod = |app: &str| -> Result<String> {
        let name = cluster
            .ready_pods("shop", &format!("app={app}"))?
            .pop_first();
        Ok(format!(
            "shop/{}",
            name.with_context(|| format!("no {app} is ready"))?
        ))
    };
    let api = pod("api")?;
    for (from, allowed) in [(pod("web")?, true), ("shop/stranger".to_owned(), false)] {
        let ask = ["policy", "explain", "--from", &from, "--to", &api];
        let ask = [&ask[..], &["--port", "8080/TCP", "-o", "json"]].concat();
        let output = cluster
            .xebec(&ask)
            .output()
            .context("could not start xebec")?;
        let text = String::from_utf8_lossy(&output.stdout);
        let answer: Value = serde_json::from_str(&text).with_context(|| text.to_string())?;
        let ingress = &answer["ingress"];
        ensure!(answer["allowed"] == allowed, "{from}: {answer}");
        ensure!(
            output.status.success() == allowed,
            "{from}: {:?}",
            output.status
        );
        // It is the set that is in the kernel.
        ensure!(ingress["asked"][0]["set"].is_u64(), "{answer}");
        let (field, words) = match allowed {
            true => (&ingress["rule"], "shop/api-from-web ingress[0]"),
            false => (
                &ingress["remedies"][0],
                "allows port 8080/TCP, but to others",
            ),
        };
        let right = field.as_str().is_some_and(|text| text.contains(words));
        ensure!(right, "{from}: {answer}");
    }
    Ok(())
}

/// Scales `web`, and waits until all its pods, and no others, answer at these URLs.
pub fn scale_web(cluster: &Cluster, replicas: usize, urls: &[String]) -> Result<()> {
    let wanted = format!("--replicas={replicas}");
    cluster.k(&["scale", "deployment/web", "-n", "shop", &wanted])?;
    eventually(&format!("{replicas} web pods are Ready"), MINUTE, || {
        let all = cluster.get(&["pods", "-n", "shop", "-l", "app=web"])?;
        Ok(cluster.ready_pods("shop", "app=web")?.len() == replicas
            && all["items"].as_array().map(Vec::len) == Some(replicas))
    })?;
    let pods = cluster.ready_pods("shop", "app=web")?;
    for url in urls {
        eventually(&format!("all {replicas} answer at {url}"), MINUTE, || {
            Ok(ask(url, 200)?.by_pod.keys().eq(&pods))
        })?;
    }
    Ok(())
}

/// Requests go on while a backend is deleted: none fails.
pub fn lose_a_backend(cluster: &Cluster, victim: &str, load: &[(From<'_>, String)]) -> Result<()> {
    const REQUESTS: u64 = 2000;
    let clients = Clients::start(cluster, load, REQUESTS, 2)?;
    clients.until_under_way()?;
    cluster.k(&["delete", "pod", victim, "-n", "shop", "--wait=true"])?;
    for (what, answers) in clients.finish()? {
        ensure!(
            answers.failures.is_empty() && answers.of("web") == REQUESTS,
            "{what}: requests failed when {victim} went: {answers:?}"
        );
        let its = answers.by_pod.get(victim).copied().unwrap_or(0);
        ensure!(its > 0, "{what}: {victim} never answered: {answers:?}");
    }
    eventually("its successor is Ready", MINUTE, || {
        Ok(cluster.ready_pods("shop", "app=web")?.len() == 5)
    })
}

/// Fails if a sandbox was asked for before the agent was there to connect it.
pub fn assert_pods_waited_for_the_network(cluster: &Cluster) {
    let log = cluster.log();
    let mut early = log
        .lines()
        .filter(|line| line.contains("setup network") || line.contains("network setup"));
    assert_eq!(early.next(), None, "a sandbox was tried too early");
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_no_answer_is_a_failure() {
        let answers = Answers::read(
            "web-1\napi-1\nweb-2\nhttp://10.96.0.9/: could not connect to 10.96.0.9:80\nweb-1\n",
        );
        assert_eq!((answers.of("web"), answers.of("api")), (3, 1));
        assert_eq!(answers.by_pod["web-1"], 2);
        assert_eq!(answers.failures.len(), 1);
    }
}
