//! The cluster and a machine outside it: node ports from there, and pods' traffic to there.

use std::io::{Read, Write};
use std::net::{IpAddr, Ipv4Addr, TcpListener};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result};
use xebec_tests::{Cluster, Machine, assert_nothing_left, eventually, shop, succeed, xebec_bin};

const MINUTE: Duration = Duration::from_secs(60);
/// Addresses of the benchmarking range (RFC 2544), which nobody routes.
const NODE: Ipv4Addr = Ipv4Addr::new(198, 18, 7, 1);
const OUTSIDE: Ipv4Addr = Ipv4Addr::new(198, 18, 7, 2);
const NAMESPACE: &str = "xebec-test-outside";

/// A machine joined to this one by a cable: a network namespace and a veth pair.
struct Outside;

fn ip(line: &str) -> Result<()> {
    let output = Command::new("ip").args(line.split(' ')).output();
    succeed(&format!("ip {line}"), output.context("could not start ip")?).map(drop)
}

impl Outside {
    fn new() -> Result<Self> {
        let outside = Self;
        outside.remove();
        for line in [
            format!("netns add {NAMESPACE}"),
            format!("link add xbtest0 type veth peer name eth0 netns {NAMESPACE}"),
            // No link-local address, which would come a moment later.
            "link set xbtest0 addrgenmode none".to_owned(),
            "link set xbtest0 up".to_owned(),
            format!("addr add {NODE}/24 dev xbtest0"),
            format!("-n {NAMESPACE} addr add {OUTSIDE}/24 dev eth0"),
            format!("-n {NAMESPACE} link set eth0 up"),
            format!("-n {NAMESPACE} link set lo up"),
        ] {
            ip(&line)?;
        }
        Ok(outside)
    }

    /// Asks a node port of the shop 1,000 times: none is lost, and every web pod answers.
    fn asks_all(&self, cluster: &Cluster) -> Result<()> {
        let url = format!("http://{NODE}:30080/whoami");
        let text = succeed(
            "demo get",
            self.command(&xebec_bin())
                .args(["demo", "get", &url, "-n", "1000"])
                .arg("--summary")
                .output()
                .context("could not start the client")?,
        )?;
        assert!(text.contains("0 failed, 1000 requests"), "{text}");
        for pod in cluster.ready_pods("shop", "app=web")? {
            assert!(text.contains(&pod), "{pod} got no request: {text}");
        }
        Ok(())
    }

    fn remove(&self) {
        let _ = Command::new("ip")
            .args(["netns", "del", NAMESPACE])
            .output();
        let _ = Command::new("ip").args(["link", "del", "xbtest0"]).output();
    }

    /// Runs something there.
    fn command(&self, program: &std::path::Path) -> Command {
        let mut command = Command::new("nsenter");
        command
            .arg(format!("--net=/run/netns/{NAMESPACE}"))
            .arg(program);
        command
    }

    /// Listens there, and gives the address that the first client comes from.
    fn first_client(&self, port: u16) -> Result<std::thread::JoinHandle<Result<IpAddr>>> {
        let namespace = std::fs::File::open(format!("/run/netns/{NAMESPACE}"))
            .context("could not open the namespace")?;
        let (ready, is_ready) = std::sync::mpsc::channel();
        let listening = std::thread::spawn(move || {
            // This thread alone is there.
            nix::sched::setns(&namespace, nix::sched::CloneFlags::CLONE_NEWNET)
                .context("could not enter the namespace")?;
            let listener = TcpListener::bind((OUTSIDE, port)).context("could not listen")?;
            ready.send(()).context("nobody waits")?;
            let (mut stream, peer) = listener.accept().context("could not accept")?;
            let _ = stream.read(&mut [0; 1024]);
            let _ = stream.write_all(
                b"HTTP/1.1 200 OK\r\ncontent-length: 6\r\nconnection: close\r\n\r\nhello\n",
            );
            Ok(peer.ip())
        });
        let _ = is_ready.recv_timeout(Duration::from_secs(5));
        Ok(listening)
    }
}

impl Drop for Outside {
    fn drop(&mut self) {
        self.remove();
    }
}

/// A pod reaches a machine outside, which sees the node's address.
fn pod_reaches(cluster: &Cluster, outside: &Outside) -> Result<()> {
    eventually("pods can be made", MINUTE, || {
        Ok(cluster.get(&["serviceaccount", "default"]).is_ok())
    })?;
    let client = outside.first_client(8000)?;
    let pod = format!(
        r#"{{"apiVersion":"v1","kind":"Pod","metadata":{{"name":"caller","namespace":"default"}},
        "spec":{{"restartPolicy":"Never","containers":[{{"name":"caller","image":"xebec.local/demo:latest",
        "imagePullPolicy":"IfNotPresent","args":["get","http://{OUTSIDE}:8000/"]}}]}}}}"#
    );
    let manifest =
        std::env::temp_dir().join(format!("xebec-test-caller-{}.json", std::process::id()));
    std::fs::write(&manifest, pod).context("could not write the manifest")?;
    cluster.k(&["apply", "-f", &manifest.to_string_lossy()])?;
    let _ = std::fs::remove_file(&manifest);
    eventually("the caller has its answer", MINUTE, || {
        Ok(cluster.k(&["logs", "caller"])?.contains("hello"))
    })?;
    let seen = client
        .join()
        .map_err(|_| anyhow::anyhow!("the listener panicked"))??;
    assert_eq!(
        seen,
        IpAddr::V4(NODE),
        "outside, a pod bears its node's address"
    );
    Ok(())
}

#[test]
fn pods_of_several_nodes_to_the_outside() -> Result<()> {
    let outside = Outside::new()?;
    let before = Machine::now()?;
    let node_ip = NODE.to_string();
    let mut cluster = Cluster::up("outside-two", &["--nodes", "2", "--node-ip", &node_ip])?;
    pod_reaches(&cluster, &outside)?;
    // The nodes' own processes too: they pull images.
    let client = outside.first_client(8001)?;
    let url = format!("http://{OUTSIDE}:8001/");
    let answer = cluster.in_node("node2", &["curl", "--silent", "--max-time", "5", &url])?;
    assert_eq!(answer, "hello\n");
    let seen = client
        .join()
        .map_err(|_| anyhow::anyhow!("the listener panicked"))??;
    assert_eq!(seen, IpAddr::V4(NODE));
    cluster.down()?;
    assert_nothing_left(&before)
}

#[test]
fn node_ports_from_outside_and_pods_to_the_outside() -> Result<()> {
    let outside = Outside::new()?;
    let before = Machine::now()?;
    let node_ip = NODE.to_string();
    let mut cluster = Cluster::up("outside", &["--node-ip", &node_ip])?;
    cluster.k(&["apply", "-f", &shop::manifest().to_string_lossy()])?;
    eventually("the web pods are Ready", MINUTE, || {
        Ok(cluster.ready_pods("shop", "app=web")?.len() == 3)
    })?;
    outside.asks_all(&cluster)?;
    // The cable's end is no hardware: XDP would not see which of its frames lack their checksums.
    let node = cluster.get(&["nodes"])?["items"][0]["metadata"]["name"].clone();
    let status = cluster.agent_status(node.as_str().unwrap_or_default())?;
    let devices = status["devices"].as_str().unwrap_or_default();
    assert!(devices.contains("xbtest0 by tc"), "{status}");
    // The pods see who asks.
    let flows = cluster.run(&[
        "observe",
        "--namespace",
        "shop",
        "--last",
        "200",
        "-o",
        "json",
    ])?;
    assert!(
        flows
            .lines()
            .any(|line| line.contains(&format!("\"source\":\"{OUTSIDE}\""))),
        "no flow came from {OUTSIDE}: {flows}"
    );
    // While every pod runs: one that has ended may lose its network meanwhile.
    pod_is_refused(&cluster, node.as_str().unwrap_or_default())?;
    pod_reaches(&cluster, &outside)?;
    cluster.down()?;
    assert_nothing_left(&before)
}

/// A pod's datagram to a port outside where nobody listens: the error comes back to the pod.
fn pod_is_refused(cluster: &Cluster, node: &str) -> Result<()> {
    let namespaces = cluster.run_dir().join(format!("nodes/{node}/cri/netns"));
    let pod = std::fs::read_dir(&namespaces)
        .with_context(|| format!("could not list {}", namespaces.display()))?
        .next()
        .context("no pod has a network namespace")??;
    let namespace = std::fs::File::open(pod.path()).context("could not open a pod's namespace")?;
    let asking = std::thread::spawn(move || {
        // This thread alone is there.
        nix::sched::setns(&namespace, nix::sched::CloneFlags::CLONE_NEWNET)
            .context("could not enter the pod's namespace")?;
        let socket = std::net::UdpSocket::bind("0.0.0.0:0").context("could not bind")?;
        socket
            .set_read_timeout(Some(Duration::from_secs(5)))
            .context("could not set a timeout")?;
        socket.connect((OUTSIDE, 9)).context("could not connect")?;
        socket
            .send(b"is anybody there?")
            .context("could not send")?;
        Ok::<_, anyhow::Error>(socket.recv(&mut [0; 16]))
    });
    let answer = asking
        .join()
        .map_err(|_| anyhow::anyhow!("the thread in the pod's namespace panicked"))??;
    let kind = answer.as_ref().map_err(std::io::Error::kind);
    assert_eq!(kind, Err(std::io::ErrorKind::ConnectionRefused));
    Ok(())
}
