//! Two nodes on one machine: Services, node ports, policy and flows across them, restarts, and nothing left behind.

use std::collections::{BTreeMap, BTreeSet};
use std::io::{BufRead, BufReader};
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result};
use k8s_openapi::jiff::Timestamp;
use nix::sys::signal::Signal;
use serde_json::{Value, json};
use xebec_tests::shop::{Clients, From};
use xebec_tests::{
    Cluster, Machine, assert_nothing_left, eventually, kill, pids_of, shop, succeed, xebec_bin,
};

const MINUTE: Duration = Duration::from_secs(60);
const NODES: [&str; 2] = ["node1", "node2"];

/// What of a pod matters here.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Pod {
    app: String,
    node: String,
    address: String,
    container: String,
    restarts: u64,
}

fn pods(cluster: &Cluster) -> Result<BTreeMap<String, Pod>> {
    let found = cluster.get(&["pods", "-n", "shop", "-l", "app"])?;
    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    let pods = found["items"].as_array().into_iter().flatten().map(|pod| {
        let container = &pod["status"]["containerStatuses"][0];
        let one = Pod {
            app: text(&pod["metadata"]["labels"]["app"]),
            node: text(&pod["spec"]["nodeName"]),
            address: text(&pod["status"]["podIP"]),
            container: text(&container["containerID"]),
            restarts: container["restartCount"].as_u64().unwrap_or(99),
        };
        (text(&pod["metadata"]["name"]), one)
    });
    Ok(pods.collect())
}

/// The shop with its pods spread over both nodes.
fn apply_shop(cluster: &Cluster) -> Result<BTreeMap<String, Pod>> {
    shop::apply(cluster)?;
    let pods = pods(cluster)?;
    for app in ["web", "api"] {
        assert_on_both(&pods, app);
    }
    Ok(pods)
}

fn assert_on_both(pods: &BTreeMap<String, Pod>, app: &str) {
    let all = pods.values().filter(|pod| pod.app == app);
    let nodes: BTreeSet<&str> = all.map(|pod| pod.node.as_str()).collect();
    assert_eq!(
        nodes,
        BTreeSet::from(NODES),
        "{app} runs on both: {pods:#?}"
    );
}

/// From pods on each node, 1,000 requests to each of these: none is lost, and every backend answers, wherever it
/// is. Each `web` answers with its own name and with that of the `api` that it asked through its Service.
fn pods_reach(cluster: &Cluster, urls: &[String]) -> Result<()> {
    let mut backends = cluster.ready_pods("shop", "app=web")?;
    backends.extend(cluster.ready_pods("shop", "app=api")?);
    let all = NODES.iter().flat_map(|node| {
        let one = |url: &String| (From::Node(node), url.clone());
        urls.iter().map(one)
    });
    let clients = Clients::start(cluster, &all.collect::<Vec<_>>(), 1000, 0)?;
    for (what, answers) in clients.finish()? {
        answers.assert_spread(&what, &backends);
        assert_eq!((answers.of("web"), answers.of("api")), (1000, 1000));
    }
    Ok(())
}

/// The pod that no rule lets in is dropped on the other node as well, and the flow says by which policy.
fn denied_across_nodes(cluster: &Cluster, pods: &BTreeMap<String, Pod>) -> Result<()> {
    let home = &pods["stranger"].node;
    shop::stranger_is_denied(cluster, |flow| {
        let target = flow["destination"]["pod_name"].as_str().unwrap_or_default();
        flow["node_name"] != json!(home) && pods.get(target).is_some_and(|pod| pod.node != *home)
    })
}

/// More `web` pods go to both nodes and get traffic. Then one goes while clients on the other node, and one on no
/// node, ask through the cluster IP and node ports: no request fails.
fn scaled_and_robbed(cluster: &Cluster, addresses: &BTreeMap<String, String>) -> Result<()> {
    let ports = addresses
        .values()
        .map(|address| shop::node_port(address, "/whoami"));
    let ports: Vec<String> = ports.collect();
    shop::scale_web(cluster, 5, &ports)?;
    let pods = pods(cluster)?;
    assert_on_both(&pods, "web");
    let url = shop::cluster_ip(cluster, "web", "/whoami")?;
    for (home, other) in [("node1", "node2"), ("node2", "node1")] {
        let victim = pods
            .iter()
            .find(|(_, pod)| pod.app == "web" && pod.node == home)
            .map(|(name, _)| name)
            .with_context(|| format!("no web on {home}"))?;
        let mut load = vec![(From::Node(other), url.clone())];
        for port in &ports {
            load.push((From::Node(other), port.clone()));
        }
        load.push((From::Machine, shop::node_port(&addresses[other], "/whoami")));
        shop::lose_a_backend(cluster, victim, &load)?;
    }
    shop::scale_web(cluster, 3, &ports)
}

/// The host is no node, but reaches pods and kubelets of all of them.
fn host_reaches_all(cluster: &Cluster, pods: &BTreeMap<String, Pod>) -> Result<()> {
    for (name, pod) in pods.iter().filter(|(_, pod)| pod.app == "web") {
        let url = format!("http://{}:8080/whoami", pod.address);
        let curl = Command::new("curl")
            .args(["--silent", "--show-error", "--fail", "--max-time", "5"])
            .arg(&url)
            .output()?;
        assert_eq!(succeed(&url, curl)?.trim(), name);
        let log = cluster.k(&["logs", "-n", "shop", name])?;
        assert!(log.contains("listens on"), "{log}");
        let inside = ["exec", "-n", "shop", name, "--", "/bin/xebec"];
        let ask = ["demo", "get", "http://127.0.0.1:8080/whoami"];
        assert_eq!(cluster.k(&[&inside[..], &ask].concat())?.trim(), name);
        assert_eq!(through_port_forward(cluster, name)?.trim(), name);
    }
    Ok(())
}

fn through_port_forward(cluster: &Cluster, pod: &str) -> Result<String> {
    let mut forward = cluster
        .kubectl(&["port-forward", "-n", "shop", pod, ":8080"])
        .stdout(Stdio::piped())
        .spawn()
        .context("could not start kubectl")?;
    let pipe = forward.stdout.take().context("kubectl has no output")?;
    // It says more than one line, and ends where nobody listens.
    let mut lines = BufReader::new(pipe).lines();
    let first = lines.next().transpose();
    let answer = first.map_err(anyhow::Error::from).and_then(|first| {
        // Forwarding from 127.0.0.1:40123 -> 8080
        let line = first.unwrap_or_default();
        let address = line.split(' ').nth(2).unwrap_or_default();
        let url = format!("http://{address}/whoami");
        let curl = Command::new("curl")
            .args(["--silent", "--show-error", "--fail", "--max-time", "5"])
            .arg(&url)
            .output()?;
        succeed(&format!("{line}: {url}"), curl)
    });
    forward.kill()?;
    forward.wait()?;
    answer
}

/// Each node has a route to each other's pods, and node ports at its address, for as long as there is the other.
fn routes_follow_nodes(cluster: &Cluster) -> Result<()> {
    let node = json!({
        "apiVersion": "v1",
        "kind": "Node",
        "metadata": {"name": "far"},
        "spec": {"podCIDR": "10.244.77.0/24", "podCIDRs": ["10.244.77.0/24"]},
        "status": {"addresses": [{"type": "InternalIP", "address": "10.245.0.77"}]},
    });
    shop::apply_objects(cluster, &[node])?;
    let known = || -> Result<Vec<bool>> {
        NODES
            .iter()
            .map(|node| {
                let routes = cluster.in_node(node, &["ip", "route", "show", "10.244.77.0/24"])?;
                Ok(routes.contains("via 10.245.0.77 dev eth0"))
            })
            .collect()
    };
    eventually(
        "all know the new node",
        MINUTE,
        || Ok(known()? == [true; 2]),
    )?;
    // Nobody is there: who gets an answer from its node port was sent to a backend.
    let url = shop::node_port("10.245.0.77", "/whoami");
    let wanted = NODES.map(|node| (From::Node(node), url.clone()));
    for (what, answers) in Clients::start(cluster, &wanted, 20, 0)?.finish()? {
        assert_eq!(
            (answers.of("web"), answers.failures.len()),
            (20, 0),
            "{what}"
        );
    }
    cluster.k(&["delete", "node", "far"])?;
    eventually("all have forgotten it", MINUTE, || {
        Ok(known()? == [false; 2])
    })?;
    Ok(())
}

/// Clients that are no node's reach every backend through the port of any node; none of 1,000 requests is lost.
fn host_reaches_node_ports(cluster: &Cluster, addresses: &BTreeMap<String, String>) -> Result<()> {
    let backends = cluster.ready_pods("shop", "app=web")?;
    for address in addresses.values() {
        let url = shop::node_port(address, "/whoami");
        let answers = shop::ask(&url, 1000)?;
        answers.assert_spread(&url, &backends);
        assert_eq!(answers.of("web"), 1000);
    }
    Ok(())
}

/// The command line tells of both nodes.
fn command_line_shows_both(cluster: &Cluster, pods: &BTreeMap<String, Pod>) -> Result<()> {
    let status = cluster.run(&["status"])?;
    let endpoints = cluster.run(&["endpoint", "list"])?;
    let images = cluster.run(&["image", "list"])?;
    for node in NODES {
        for line in ["Process of", "Node", "Agent"].map(|what| format!("{what} {node}")) {
            assert!(status.contains(&line), "{line}: {status}");
        }
        assert!(
            images
                .lines()
                .any(|line| line.starts_with(node) && line.contains("xebec.local/demo")),
            "{images}"
        );
    }
    for (name, pod) in pods {
        let shown = endpoints
            .lines()
            .any(|line| line.contains(name) && line.contains(&pod.node));
        assert!(shown, "{name}: {endpoints}");
    }
    Ok(())
}

/// One socket serves the flows of both nodes, in the order of time; their metrics count them.
fn flows_of_both_at_one_socket(cluster: &Cluster, pods: &BTreeMap<String, Pod>) -> Result<()> {
    let socket = cluster.run_dir().join("hubble.sock");
    let server = format!("unix://{}", socket.display());
    let observe = ["observe", "--server", &server, "--all", "-o", "json"];
    let flows = cluster.run(&[&observe[..], &["--verdict", "FORWARDED"]].concat())?;
    let flows = flows.lines().map(serde_json::from_str::<Value>);
    let flows = flows.collect::<Result<Vec<_>, _>>()?;
    for node in NODES {
        let of_node = flows.iter().filter(|flow| flow["node_name"] == node);
        let mut ends =
            of_node.flat_map(|flow| [&flow["flow"]["source"], &flow["flow"]["destination"]]);
        // A node sees its own pods at least.
        let sees = |end: &Value| {
            let pod = end["pod_name"].as_str().and_then(|name| pods.get(name));
            pod.is_some_and(|pod| pod.node == node)
        };
        assert!(
            ends.any(sees),
            "{node} tells of none of its pods: {flows:#?}"
        );
    }
    let time = |flow: &Value| {
        flow["time"]
            .as_str()
            .and_then(|time| time.parse::<Timestamp>().ok())
    };
    let times: Vec<_> = flows.iter().map(time).collect();
    assert!(times.is_sorted() && !times.contains(&None), "{times:#?}");
    // Who asks for a Service is told of with its name, whether packets or sockets are translated.
    let asked = cluster.run(&[&observe[..], &["--to-service", "shop/api"]].concat())?;
    let asked = asked.lines().map(serde_json::from_str::<Value>);
    let asked = asked.collect::<Result<Vec<_>, _>>()?;
    let named = asked.iter().any(|flow| {
        let pod = flow["flow"]["source"]["pod_name"].as_str();
        pod.is_some_and(|name| pods.contains_key(name))
    });
    assert!(named, "no pod asks for shop/api: {asked:#?}");
    let dropped = [
        "--verdict",
        "DROPPED",
        "--from-pod",
        "shop/stranger",
        "--to-label",
        "app=api",
    ];
    let dropped =
        cluster.run(&[&observe[..4], &dropped, &["-t", "drop", "-o", "compact"]].concat())?;
    assert!(
        dropped.contains("POLICY_DENIED DROPPED")
            && dropped.contains("NetworkPolicy shop/api-from-web ingress"),
        "{dropped}"
    );
    Ok(())
}

/// The process of a node.
fn node_process(cluster: &Cluster, node: &str) -> Result<Option<i32>> {
    let parent = format!("PPid:\t{}", cluster.pid()?);
    let wanted = format!("\0node\0{node}\0");
    Ok(pids_of(&xebec_bin()).into_iter().find(|pid| {
        let read = |name: &str| std::fs::read_to_string(format!("/proc/{pid}/{name}"));
        read("status").is_ok_and(|status| status.lines().any(|line| line == parent))
            && read("cmdline").is_ok_and(|line| line.ends_with(&wanted))
    }))
}

/// A node's process that dies is started again; the pods of the node do not notice.
fn node_process_comes_back(cluster: &Cluster, pods: &BTreeMap<String, Pod>) -> Result<()> {
    let first = node_process(cluster, "node2")?.context("node2 has no process")?;
    kill(first, Signal::SIGKILL)?;
    eventually("node2 has a new process", MINUTE, || {
        Ok(node_process(cluster, "node2")?.is_some_and(|pid| pid != first))
    })?;
    eventually("its agent answers", MINUTE, || {
        Ok(cluster
            .run(&["endpoint", "list", "--node", "node2"])
            .is_ok())
    })?;
    eventually("the same pods are Ready", MINUTE, || shop::is_up(cluster))?;
    assert_eq!(*pods, self::pods(cluster)?, "the same containers run");
    Ok(())
}

/// kill -9 of everything but the shims: a connection goes on meanwhile, and the next `up` finds the same pods.
fn killed_cluster_comes_back(cluster: &mut Cluster, pods: &BTreeMap<String, Pod>) -> Result<()> {
    let far = pods
        .values()
        .find(|pod| pod.app == "web" && pod.node == "node2")
        .context("no web on node2")?;
    let urls: Vec<String> = (0..6)
        .map(|n| format!("http://{}:8080/whoami?{n}", far.address))
        .collect();
    let mut client = Command::new("curl")
        .args(["--silent", "--show-error", "--fail", "--rate", "1/s"])
        .args(["--write-out", "%{num_connects}\\n"])
        .args(&urls)
        .stdout(Stdio::piped())
        .spawn()
        .context("could not start curl")?;
    let mut answers = BufReader::new(client.stdout.take().context("curl has no output")?)
        .lines()
        .filter(|line| !line.as_ref().is_ok_and(|line| line.starts_with("web-")));
    assert_eq!(answers.next().transpose()?.as_deref(), Some("1"));
    // What no node has any more must go although nobody hears of its end.
    let stale = ["10.244.99.0/24", "via", "10.245.0.12", "proto", "88"];
    cluster.in_node("node1", &[&["ip", "route", "add"], &stale[..]].concat())?;
    kill(cluster.pid()?, Signal::SIGKILL)?;
    let rest: Vec<String> = answers.collect::<Result<_, _>>()?;
    assert!(client.wait()?.success(), "the connection broke");
    assert_eq!(rest, ["0"; 5], "all answers came over the one connection");
    // Other nodes would not find these pods.
    let other = cluster.xebec(&["up", "--nodes", "3"]).output()?;
    let says = String::from_utf8_lossy(&other.stderr).into_owned();
    assert!(
        !other.status.success() && says.contains("xebec down"),
        "{says}"
    );
    cluster.start()?;
    eventually("the stale route has gone", MINUTE, || {
        let route = ["ip", "route", "show", stale[0]];
        Ok(cluster.in_node("node1", &route)?.is_empty())
    })?;
    eventually("the API knows the pods again", MINUTE, || {
        shop::is_up(cluster)
    })?;
    assert_eq!(*pods, self::pods(cluster)?, "the same containers run");
    Ok(())
}

#[test]
fn shop_on_two_nodes_and_nothing_left_behind() -> Result<()> {
    let before = Machine::now()?;
    let mut cluster = Cluster::up("nodes", &["--nodes", "2"])?;
    let addresses = shop::node_addresses(&cluster)?;
    assert!(addresses.keys().eq(NODES), "{addresses:?}");
    let pods = apply_shop(&cluster)?;
    command_line_shows_both(&cluster, &pods)?;
    host_reaches_all(&cluster, &pods)?;
    host_reaches_node_ports(&cluster, &addresses)?;
    let mut urls = vec![shop::cluster_ip(&cluster, "web", "/")?];
    for address in addresses.values() {
        urls.push(shop::node_port(address, "/"));
    }
    pods_reach(&cluster, &urls)?;
    denied_across_nodes(&cluster, &pods)?;
    flows_of_both_at_one_socket(&cluster, &pods)?;
    scaled_and_robbed(&cluster, &addresses)?;
    let pods = self::pods(&cluster)?;
    routes_follow_nodes(&cluster)?;
    node_process_comes_back(&cluster, &pods)?;
    killed_cluster_comes_back(&mut cluster, &pods)?;
    pods_reach(&cluster, &urls[..1])?;
    cluster.down()?;
    assert_nothing_left(&before)?;
    // The data survived: the next `up` runs the same pods.
    cluster.start()?;
    eventually("the shop's pods run again", MINUTE, || {
        let now = self::pods(&cluster)?;
        Ok(now.keys().eq(pods.keys()) && shop::is_up(&cluster)?)
    })?;
    shop::assert_pods_waited_for_the_network(&cluster);
    pods_reach(&cluster, &urls[..1])?;
    // Killed, `down` alone cleans up.
    kill(cluster.pid()?, Signal::SIGKILL)?;
    cluster.down()?;
    assert_nothing_left(&before)?;
    Ok(())
}

#[test]
fn ctrl_c_takes_both_nodes_down() -> Result<()> {
    let before = Machine::now()?;
    let mut cluster = Cluster::up("nodes-ctrl-c", &["--nodes", "2"])?;
    shop::apply(&cluster)?;
    cluster.down()?;
    // As from a terminal: the signal goes to the whole group.
    let mut foreground = cluster.foreground()?;
    let mut lines = BufReader::new(foreground.stdout.take().context("up has no output")?).lines();
    let first = lines.next().transpose()?.unwrap_or_default();
    assert!(
        first.starts_with("Ready in") && first.ends_with("node1, node2"),
        "{first}"
    );
    eventually("the shop's pods run again", MINUTE, || {
        shop::is_up(&cluster)
    })?;
    let group = i32::try_from(foreground.id()).context("a pid is too large")?;
    kill(-group, Signal::SIGINT)?;
    assert!(foreground.wait()?.success());
    assert_nothing_left(&before)?;
    assert!(cluster.run(&["down"])?.contains("no cluster runs"));
    cluster.down()?;
    Ok(())
}
