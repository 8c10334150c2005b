//! Services of both families, and of IPv6 alone, over two nodes, with real sockets: every kind of frontend, from pods, from the machine and
//! by a load balancer's address that a node announces; one without endpoints refuses at once.

use std::collections::BTreeSet;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};
use xebec_tests::shop::{Clients, From};
use xebec_tests::{Cluster, Machine, assert_nothing_left, eventually, shop};

const MINUTE: Duration = Duration::from_secs(60);
const NODES: [&str; 2] = ["node1", "node2"];

/// Two `web` pods, one on each node.
fn pods() -> Vec<Value> {
    let pod = |node: &&str| {
        json!({
            "apiVersion": "v1",
            "kind": "Pod",
            "metadata": {"name": format!("web-{node}"), "namespace": "shop", "labels": {"app": "web"}},
            "spec": {
                "nodeName": node,
                "terminationGracePeriodSeconds": 1,
                "containers": [{
                    "name": "web",
                    "image": "xebec.local/demo:latest",
                    "imagePullPolicy": "IfNotPresent",
                    "args": ["serve"],
                    "readinessProbe": {"httpGet": {"path": "/whoami", "port": 8080}, "periodSeconds": 1},
                }],
            },
        })
    };
    NODES.iter().map(pod).collect()
}

fn service(name: &str, spec: Value) -> Value {
    json!({
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"name": name, "namespace": "shop"},
        "spec": spec,
    })
}

fn texts(list: &Value) -> Vec<String> {
    let all = list.as_array().into_iter().flatten();
    all.filter_map(|one| one.as_str().map(str::to_owned))
        .collect()
}

fn url(address: &str, port: u16) -> String {
    if address.contains(':') {
        format!("http://[{address}]:{port}/whoami")
    } else {
        format!("http://{address}:{port}/whoami")
    }
}

/// Every frontend is answered by both backends, from pods of both nodes; node ports and the load balancer's address
/// from the machine, too, which is no node.
fn every_frontend_answers(
    cluster: &Cluster,
    backends: &BTreeSet<String>,
    families: usize,
) -> Result<()> {
    let web = cluster.get(&["service", "web", "-n", "shop"])?;
    let nodes = cluster.get(&["nodes"])?;
    let items = nodes["items"].as_array().context("no nodes")?;
    let addresses = items
        .iter()
        .flat_map(|node| node["status"]["addresses"].as_array().into_iter().flatten())
        .filter(|one| one["type"] == "InternalIP")
        .filter_map(|one| one["address"].as_str());
    let outside: Vec<String> = addresses
        .map(|address| url(address, 30_080))
        .chain([url(&load_balancer(cluster)?.context("no address")?, 80)])
        .collect();
    let right = outside.len() == NODES.len() * families + 1;
    ensure!(right, "{families} addresses a node: {outside:?}");
    let cluster_ips = texts(&web["spec"]["clusterIPs"]);
    ensure!(cluster_ips.len() == families, "{families}: {cluster_ips:?}");
    let inside = cluster_ips.iter().map(|address| url(address, 80));
    let mut wanted: Vec<(From<'_>, String)> = outside
        .iter()
        .map(|url| (From::Machine, url.clone()))
        .collect();
    for url in inside.chain(outside.iter().cloned()) {
        wanted.extend(NODES.map(|node| (From::Node(node), url.clone())));
    }
    for (what, answers) in Clients::start(cluster, &wanted, 50, 0)?.finish()? {
        answers.assert_spread(&what, backends);
        assert_eq!(answers.of("web"), 50, "{what}");
    }
    Ok(())
}

fn load_balancer(cluster: &Cluster) -> Result<Option<String>> {
    let web = cluster.get(&["service", "web", "-n", "shop"])?;
    let address = &web["status"]["loadBalancer"]["ingress"][0]["ip"];
    Ok(address.as_str().map(str::to_owned))
}

/// Who asks a Service without endpoints is told so: nothing waits for an answer that never comes.
fn nobody_is_told_of(cluster: &Cluster) -> Result<()> {
    let none = cluster.get(&["service", "nobody", "-n", "shop"])?;
    for address in texts(&none["spec"]["clusterIPs"]) {
        let url = url(&address, 80);
        let ask = [
            "exec",
            "-n",
            "shop",
            "web-node1",
            "--",
            "/bin/xebec",
            "demo",
            "get",
        ];
        let refused = cluster.k(&[&ask[..], &[url.as_str()]].concat());
        let error = format!("{:#}", refused.err().context("nobody answered")?);
        ensure!(error.contains("refused"), "{url}: {error}");
    }
    Ok(())
}

/// With so many families.
fn scenario(cluster: &mut Cluster, families: usize) -> Result<()> {
    cluster.k(&["create", "namespace", "shop"])?;
    let web = json!({"app": "web"});
    let policy = if families == 2 {
        "RequireDualStack"
    } else {
        "SingleStack"
    };
    let mut objects = pods();
    objects.push(service(
        "web",
        json!({
            "type": "LoadBalancer",
            "ipFamilyPolicy": policy,
            "selector": web,
            "ports": [{"port": 80, "targetPort": 8080, "nodePort": 30_080}],
        }),
    ));
    objects.push(service(
        "nobody",
        json!({
            "ipFamilyPolicy": policy,
            "selector": {"app": "nobody"},
            "ports": [{"port": 80}],
        }),
    ));
    shop::apply_objects(cluster, &objects)?;
    eventually(
        "both pods are ready, and there is an address",
        MINUTE,
        || {
            let ready = cluster.ready_pods("shop", "app=web")?.len();
            Ok(ready == 2 && load_balancer(cluster)?.is_some())
        },
    )?;
    let address = load_balancer(cluster)?.context("no address")?;
    eventually("a node announces the address", MINUTE, || {
        Ok(shop::ask(&url(&address, 80), 1).is_ok())
    })?;
    let backends = cluster.ready_pods("shop", "app=web")?;
    every_frontend_answers(cluster, &backends, families)?;
    nobody_is_told_of(cluster)?;
    cluster.down()
}

fn over_two_nodes(name: &str, pods: &str, balancers: &str, families: usize) -> Result<()> {
    let before = Machine::now()?;
    let ranges = ["--pod-cidr", pods, "--load-balancer-cidr", balancers];
    let mut cluster = Cluster::up(name, &[&["--nodes", "2"], &ranges[..]].concat())?;
    scenario(&mut cluster, families)?;
    drop(cluster);
    assert_nothing_left(&before)
}

#[test]
fn services_of_both_families_over_two_nodes() -> Result<()> {
    let pods = "10.244.0.0/16,fd00:10:244::/56";
    over_two_nodes("services", pods, "10.245.0.200-10.245.0.210", 2)
}

/// Pods, nodes and Services have no address of IPv4 at all.
#[test]
fn services_of_ipv6_alone_over_two_nodes() -> Result<()> {
    let balancers = "fd00:10:245::c8-fd00:10:245::d2";
    over_two_nodes("services-six", "fd00:10:244::/56", balancers, 1)
}
