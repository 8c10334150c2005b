//! The agent alone, by its own command, on a node whose kubelet is no part of Xebec: what a DaemonSet does on any
//! Kubernetes, and the way back.

use std::collections::BTreeSet;
use std::fs::File;
use std::io::Write;
use std::net::{IpAddr, SocketAddr};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use anyhow::{Context, Result, bail, ensure};
use nix::sys::signal::Signal;
use serde_json::{Value, json};
use xebec_tests::place::{PROTOCOLS, Place, Protocol, Server};
use xebec_tests::{ask_socket, eventually, kill, succeed, xebec_bin};

use super::world::{
    FAMILIES, MINUTE, NAMESPACE, PORT, TARGET, World, cgroups, ip, ip_command, of, service, spread,
};

const NODE: &str = "third";
const NETNS: &str = "xebec-test-third";
const CABLE: &str = "xbthird0";
const ADDRESSES: [&str; 2] = ["10.245.0.60", "fd00:10:245::3c"];
/// Its pods'.
const RANGES: [&str; 2] = ["10.244.60.0/24", "fd00:10:244:60::/64"];
/// The machine's address at the nodes' switch, where the API server is.
const API: &str = "10.245.0.1";
const NODE_PORT: u16 = 30_029;
const ALL: [&str; 3] = ["a1", "a2", "b1"];
/// Another plugin's configuration, which was there before.
const OTHER: &str = "10-other.conflist";

/// A machine at the nodes' switch, with folders of its own, and the agent on it.
struct Third {
    dir: tempfile::TempDir,
    cgroup: PathBuf,
    node: Place,
    pod: Place,
    agent: Option<Child>,
}

impl Third {
    fn new() -> Result<Self> {
        let cgroup = cgroups()?.join(NETNS);
        remove_network();
        let _ = std::fs::remove_dir(cgroup.join("pods"));
        let _ = std::fs::remove_dir(&cgroup);
        let place = |name: &str, netns: &str, cgroup: &Path| {
            let netns = PathBuf::from("/run/netns").join(netns);
            Place::new(name, Some(netns), Some(cgroup.to_path_buf()))
        };
        let third = Self {
            dir: tempfile::tempdir().context("could not make a folder")?,
            node: place(NODE, NETNS, &cgroup),
            pod: place("c1", &format!("{NETNS}-c1"), &cgroup.join("pods")),
            cgroup,
            agent: None,
        };
        for folder in [&third.cgroup, &third.cgroup.join("pods")] {
            std::fs::create_dir(folder)
                .with_context(|| format!("could not make {}", folder.display()))?;
        }
        for folder in ["bpf", "net.d"] {
            std::fs::create_dir(third.path(folder)).context("could not make a folder")?;
        }
        std::fs::write(third.path("net.d").join(OTHER), "{}").context("could not write")?;
        for line in [
            format!("netns add {NETNS}"),
            format!("netns add {NETNS}-c1"),
            format!("link add {CABLE} type veth peer name eth0 netns {NETNS}"),
            format!("link set {CABLE} addrgenmode none"),
            format!("link set {CABLE} master xebec0 up"),
            format!("-n {NETNS} addr add {}/24 dev eth0", ADDRESSES[0]),
            format!("-n {NETNS} addr add {}/64 dev eth0 nodad", ADDRESSES[1]),
            format!("-n {NETNS} link set eth0 up"),
            format!("-n {NETNS} link set lo up"),
        ] {
            ip_command(&line)?;
        }
        Ok(third)
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// `xebec agent` there, with its folders.
    fn command(&self, action: &[&str]) -> Command {
        let mut command = Command::new("nsenter");
        command
            .arg(format!("--net=/run/netns/{NETNS}"))
            .arg(xebec_bin())
            .arg("agent")
            .args(action)
            .args(["--node-name", NODE]);
        for (flag, folder) in [
            ("--data-dir", "data"),
            ("--run-dir", "run"),
            ("--bpf-root", "bpf"),
            ("--cni-conf-dir", "net.d"),
            ("--cni-bin-dir", "bin"),
        ] {
            command.arg(flag).arg(self.path(folder));
        }
        command
    }

    /// Starts the agent, and waits until it has all hooks in place.
    fn start(&mut self) -> Result<()> {
        let log = File::options()
            .create(true)
            .append(true)
            .open(self.path("log"))
            .context("could not open the log")?;
        let mut command = self.command(&[]);
        command
            .arg("--kubeconfig")
            .arg(self.path("kubeconfig"))
            .arg("--cgroup-root")
            .arg(&self.cgroup)
            .arg("--pod-cgroup")
            .arg(self.cgroup.join("pods"))
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(log);
        self.agent = Some(command.spawn().context("could not start the agent")?);
        eventually("the agent has taken over", MINUTE, || {
            let ended = self.agent.as_mut().map(Child::try_wait).transpose()?;
            ensure!(ended.flatten().is_none(), "it ended");
            let status = self.ask("/status")?;
            Ok(status["devices"].as_str().is_some_and(|by| !by.is_empty()))
        })
        .with_context(|| std::fs::read_to_string(self.path("log")).unwrap_or_default())
    }

    /// Ends it by a signal, and gives whether it says that all went well.
    fn end(&mut self, signal: Signal) -> Result<bool> {
        let mut agent = self.agent.take().context("no agent runs")?;
        kill(i32::try_from(agent.id())?, signal)?;
        Ok(agent
            .wait()
            .context("could not wait for the agent")?
            .success())
    }

    fn ask(&self, path: &str) -> Result<Value> {
        let socket = format!("run/nodes/{NODE}/agent.sock");
        ask_socket(&self.path(&socket), path)
    }

    /// Connects the pod as a container runtime does: by the first configuration and the plugin that it names.
    fn add_pod(&self) -> Result<[IpAddr; 2]> {
        let conf = std::fs::read(self.path("net.d/05-xebec.conflist"));
        let conf: Value = serde_json::from_slice(&conf.context("no configuration")?)?;
        let mut config = conf["plugins"][0].clone();
        config["name"] = conf["name"].clone();
        config["cniVersion"] = conf["cniVersion"].clone();
        let plugin = config["type"].as_str().context("it names no plugin")?;
        let mut child = Command::new(self.path("bin").join(plugin))
            .env_clear()
            .env("CNI_COMMAND", "ADD")
            .env("CNI_CONTAINERID", "c1")
            .env("CNI_NETNS", format!("/run/netns/{NETNS}-c1"))
            .env("CNI_IFNAME", "eth0")
            .env("CNI_PATH", self.path("bin"))
            .env(
                "CNI_ARGS",
                format!("IgnoreUnknown=1;K8S_POD_NAMESPACE={NAMESPACE};K8S_POD_NAME=c1;K8S_POD_INFRA_CONTAINER_ID=c1"),
            )
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .context("could not start the plugin")?;
        let mut stdin = child.stdin.take().context("no standard input")?;
        stdin.write_all(config.to_string().as_bytes())?;
        drop(stdin);
        let output = child.wait_with_output();
        let answer = succeed("the plugin", output.context("the plugin's end")?)?;
        let answer: Value = serde_json::from_str(&answer).with_context(|| answer.clone())?;
        let ip = |index: usize| {
            let text = answer["ips"][index]["address"].as_str().unwrap_or_default();
            let (address, _) = text.split_once('/').unwrap_or_default();
            ip(address).with_context(|| answer.to_string())
        };
        Ok([ip(0)?, ip(1)?])
    }

    /// What stands in a folder.
    fn names(&self, folder: &str) -> BTreeSet<String> {
        let entries = std::fs::read_dir(self.path(folder));
        let names = entries.into_iter().flatten().flatten();
        names
            .filter_map(|entry| entry.file_name().into_string().ok())
            .collect()
    }

    /// What `ip` says there.
    fn ip(&self, words: &str) -> Result<String> {
        let output = Command::new("ip")
            .args(["-n", NETNS])
            .args(words.split(' '))
            .output();
        succeed(words, output.context("could not start ip")?)
    }
}

fn remove_network() {
    for netns in [NETNS.to_owned(), format!("{NETNS}-c1")] {
        let _ = Command::new("ip").args(["netns", "del", &netns]).output();
    }
    let _ = Command::new("ip").args(["link", "del", CABLE]).output();
}

impl Drop for Third {
    fn drop(&mut self) {
        if let Some(mut agent) = self.agent.take() {
            let _ = agent.kill();
            let _ = agent.wait();
        }
        let _ = nix::mount::umount2(&self.path("bpf"), nix::mount::MntFlags::MNT_DETACH);
        remove_network();
        let _ = std::fs::remove_dir(self.cgroup.join("pods"));
        let _ = std::fs::remove_dir(&self.cgroup);
    }
}

/// The Node, as its kubelet would register it.
fn register(world: &World, third: &Third) -> Result<()> {
    let kubeconfig = ["config", "view", "--raw", "--minify", "--output", "json"];
    let mut kubeconfig: Value = serde_json::from_str(&world.cluster.k(&kubeconfig)?)?;
    let server = &mut kubeconfig["clusters"][0]["cluster"]["server"];
    let port = server.as_str().and_then(|server| server.rsplit(':').next());
    *server = format!("https://{API}:{}", port.context("no port")?).into();
    std::fs::write(third.path("kubeconfig"), kubeconfig.to_string())
        .context("could not write the kubeconfig")?;
    world.apply(&[json!({
        "apiVersion": "v1", "kind": "Node",
        "metadata": {"name": NODE, "labels": {"kubernetes.io/hostname": NODE}},
        "spec": {"podCIDR": RANGES[0], "podCIDRs": RANGES},
    })])?;
    let addresses = ADDRESSES.map(|address| json!({"type": "InternalIP", "address": address}));
    let status = json!({"status": {
        "addresses": addresses, "conditions": [{"type": "Ready", "status": "True"}],
    }});
    patch(world, &["node", NODE], &status)
}

fn patch(world: &World, what: &[&str], status: &Value) -> Result<()> {
    let patch = status.to_string();
    let rest = ["--subresource=status", "--type=merge", "-p", &patch];
    world
        .cluster
        .k(&[&["patch"], what, &rest].concat())
        .map(drop)
}

/// The pod, as that kubelet would tell of it.
fn run_pod(world: &World, third: &Third) -> Result<[IpAddr; 2]> {
    world.apply(&[json!({
        "apiVersion": "v1", "kind": "Pod",
        "metadata": {"name": "c1", "namespace": NAMESPACE, "labels": {"app": NODE}},
        "spec": {
            "nodeName": NODE, "terminationGracePeriodSeconds": 0,
            "containers": [{"name": "c", "image": "none"}],
        },
    })])?;
    let addresses = third.add_pod()?;
    let ips = addresses.map(|ip| json!({"ip": ip}));
    let status = json!({"status": {
        "phase": "Running", "podIP": addresses[0], "podIPs": ips,
        "conditions": [{"type": "Ready", "status": "True"}],
    }});
    patch(world, &["pod", "c1", "-n", NAMESPACE], &status)?;
    Ok(addresses)
}

/// Whom each reaches by Services: pods and processes of this node, of others, and machines outside.
fn reaches(world: &World, third: &Third) -> Result<()> {
    let (web, own) = (
        world.cluster_ips("alone-web")?,
        world.cluster_ips("alone-own")?,
    );
    for v4 in FAMILIES {
        let [web, own] = [web, own].map(|ips| SocketAddr::new(of(ips, v4), PORT));
        let near = SocketAddr::new(ip(of(ADDRESSES, v4))?, NODE_PORT);
        let far = SocketAddr::new(of(world.node("node1")?.addresses, v4), NODE_PORT);
        for protocol in PROTOCOLS {
            for place in [&third.pod, &third.pod.without_sockets(), &third.node] {
                spread(place, protocol, web, &ALL)?;
                for to in [own, near] {
                    spread(place, protocol, to, &["c1"])?;
                }
            }
            for pod in ["a1", "late"] {
                let place = &world.pod(pod)?.place;
                spread(place, protocol, own, &["c1"])?;
                spread(&place.without_sockets(), protocol, own, &["c1"])?;
            }
            for to in [near, far] {
                spread(&world.outside, protocol, to, &["c1"])?;
            }
        }
    }
    Ok(())
}

/// A policy about the pod holds, and no longer when it is gone.
fn obeys_policies(world: &World, third: &Third, pod: [IpAddr; 2]) -> Result<()> {
    let rows = |count: u64| {
        eventually("the agent knows the policies", MINUTE, || {
            let rows = third.ask("/tables/policies")?;
            Ok(rows.as_array().map(Vec::len) == Some(usize::try_from(count)?))
        })
    };
    world.apply(&[json!({
        "apiVersion": "networking.k8s.io/v1", "kind": "NetworkPolicy",
        "metadata": {"name": "alone", "namespace": NAMESPACE},
        "spec": {
            "podSelector": {"matchLabels": {"app": NODE}},
            "ingress": [{"from": [{"podSelector": {"matchLabels": {"app": "web"}}}]}],
        },
    })])?;
    rows(1)?;
    for v4 in FAMILIES {
        let to = SocketAddr::new(of(pod, v4), TARGET);
        eventually("the policy holds", MINUTE, || {
            world.pod("late")?.place.is_silent(Protocol::Tcp, to)
        })?;
        spread(&world.pod("a1")?.place, Protocol::Tcp, to, &["c1"])?;
    }
    world
        .cluster
        .k(&["delete", "networkpolicy", "alone", "-n", NAMESPACE])?;
    rows(0)?;
    let to = SocketAddr::new(pod[0], TARGET);
    eventually("the policy is gone", MINUTE, || {
        Ok(world.pod("late")?.place.ask(Protocol::Tcp, to).is_ok())
    })
}

/// Nothing of the agent is left where it was.
fn is_clean(third: &Third) -> Result<()> {
    ensure!(
        third.names("net.d") == BTreeSet::from([OTHER.to_owned()]),
        "{:?}",
        third.names("net.d")
    );
    // The BPF filesystem has files of the kernel's own.
    ensure!(!third.names("bpf").contains("xebec"), "pins are left");
    for folder in ["bin", "run/nodes", "data/nodes"] {
        ensure!(
            third.names(folder).is_empty(),
            "{folder}: {:?}",
            third.names(folder)
        );
    }
    let links: Value = serde_json::from_str(&third.ip("-json link show")?)?;
    let names = links.as_array().into_iter().flatten();
    let names: BTreeSet<_> = names.filter_map(|link| link["ifname"].as_str()).collect();
    ensure!(names == BTreeSet::from(["eth0", "lo"]), "{names:?}");
    for family in ["-4", "-6"] {
        let routes = third.ip(&format!("{family} route show"))?;
        ensure!(!routes.contains("244"), "{routes}");
    }
    Ok(())
}

/// A node with the agent alone beside two whole ones: Services, node ports and policies of the same cluster; it is killed,
/// started again and ended, and nobody notices; then it is taken away.
pub fn agent_alone(world: &mut World) -> Result<()> {
    let mut third = Third::new()?;
    register(world, &third)?;
    world.apply(&[
        service("alone-web", json!({"selector": {"app": "web"}})),
        service(
            "alone-own",
            json!({"type": "NodePort", "selector": {"app": NODE}, "nodePort": NODE_PORT}),
        ),
    ])?;
    third.start()?;
    let aside = format!("{OTHER}.xebec_bak");
    ensure!(
        third.names("net.d") == BTreeSet::from(["05-xebec.conflist".to_owned(), aside]),
        "{:?}",
        third.names("net.d")
    );
    let pod = run_pod(world, &third)?;
    let server = Server::start(&third.pod.without_sockets(), "c1", TARGET)?;
    world.settled("alone-web", 3)?;
    world.settled("alone-own", 1)?;
    eventually("the agent knows its own pod", MINUTE, || {
        let rows = third.ask("/tables/services")?.to_string();
        Ok(pod
            .iter()
            .all(|ip| rows.contains(&SocketAddr::new(*ip, TARGET).to_string())))
    })?;
    reaches(world, &third)?;
    obeys_policies(world, &third, pod)?;
    let (status, _, body) = third
        .node
        .http_get("127.0.0.1:10249".parse()?, "/proxyMode")?;
    ensure!((status, body.as_str()) == (200, "xebec"), "{status} {body}");

    // Who talks notices neither a crash nor an end.
    let web = world.cluster_ips("alone-web")?;
    let mut talks = Vec::new();
    for v4 in FAMILIES {
        let web = SocketAddr::new(of(web, v4), PORT);
        let near = SocketAddr::new(ip(of(ADDRESSES, v4))?, NODE_PORT);
        for protocol in PROTOCOLS {
            for (place, to) in [
                (&third.pod, web),
                (&third.pod.without_sockets(), web),
                (&third.node, web),
                (&world.outside, near),
            ] {
                let what = format!("{}, {protocol:?} to {to}", place.name);
                let mut talk = place.talk(protocol, to).with_context(|| what.clone())?;
                let name = talk.ask().with_context(|| what.clone())?.name;
                talks.push((what, talk, name));
            }
        }
    }
    let mut go_on = |when: &str| -> Result<()> {
        for (what, talk, name) in &mut talks {
            let answer = talk.ask().with_context(|| format!("{when}: {what}"))?;
            ensure!(
                answer.name == *name,
                "{when}: {what}: {answer:?}, not {name}"
            );
        }
        Ok(())
    };
    third.end(Signal::SIGKILL)?;
    go_on("killed")?;
    reaches(world, &third).context("killed")?;
    third.start()?;
    go_on("started again")?;
    reaches(world, &third).context("started again")?;
    ensure!(third.end(Signal::SIGTERM)?, "it ended badly");
    go_on("ended")?;
    reaches(world, &third).context("ended")?;

    // The way back is refused while the agent runs, and may be gone twice.
    third.start()?;
    let output = third.command(&["cleanup"]).output()?;
    let text = String::from_utf8_lossy(&output.stderr).into_owned();
    ensure!(
        !output.status.success() && text.contains("runs on this node still"),
        "{text}"
    );
    third.end(Signal::SIGTERM)?;
    drop(server);
    for _ in 0..2 {
        let said = succeed("cleanup", third.command(&["cleanup"]).output()?)?;
        ensure!(said.contains("third: links, maps"), "{said}");
        is_clean(&third)?;
    }
    let to = SocketAddr::new(web[0], PORT);
    if let Ok(answer) = third.node.ask(Protocol::Tcp, to) {
        bail!("sockets are translated still: {answer:?}");
    }
    let pod = [
        "delete",
        "pod",
        "c1",
        "-n",
        NAMESPACE,
        "--force",
        "--grace-period=0",
    ];
    world.cluster.k(&pod)?;
    world.cluster.k(&["delete", "node", NODE])?;
    world.delete(&["alone-web", "alone-own"])
}
