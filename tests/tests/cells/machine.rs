//! A machine at the nodes' switch with an agent of its own, started by `xebec agent`, and a pod that is connected by the
//! CNI plugin as container runtimes do.

use std::collections::BTreeSet;
use std::fs::File;
use std::io::Write;
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use anyhow::{Context, Result, ensure};
use nix::sys::signal::Signal;
use serde_json::Value;
use xebec_tests::place::Place;
use xebec_tests::{ask_socket, eventually, kill, succeed, xebec_bin};

use super::world::{MINUTE, NAMESPACE, cgroups, ip, ip_command};

/// The node's name.
pub const NODE: &str = "third";
const NETNS: &str = "xebec-test-third";
const CABLE: &str = "xbthird0";
/// Its addresses.
pub const ADDRESSES: [&str; 2] = ["10.245.0.60", "fd00:10:245::3c"];
/// Another plugin's configuration, which was there before.
pub const OTHER: &str = "10-other.conflist";

/// A machine at the nodes' switch, with folders of its own, and the agent on it.
pub struct Third {
    dir: tempfile::TempDir,
    cgroup: PathBuf,
    pub node: Place,
    pub pod: Place,
    agent: Option<Child>,
}

impl Third {
    pub fn new() -> Result<Self> {
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

    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// `xebec agent` there, with its folders.
    pub fn command(&self, action: &[&str]) -> Command {
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
    pub fn start(&mut self) -> Result<()> {
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
    pub fn end(&mut self, signal: Signal) -> Result<bool> {
        let mut agent = self.agent.take().context("no agent runs")?;
        kill(i32::try_from(agent.id())?, signal)?;
        Ok(agent
            .wait()
            .context("could not wait for the agent")?
            .success())
    }

    pub fn ask(&self, path: &str) -> Result<Value> {
        let socket = format!("run/nodes/{NODE}/agent.sock");
        ask_socket(&self.path(&socket), path)
    }

    /// Connects the pod as a container runtime does: by the first configuration and the plugin that it names.
    pub fn add_pod(&self) -> Result<[IpAddr; 2]> {
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
    pub fn names(&self, folder: &str) -> BTreeSet<String> {
        let entries = std::fs::read_dir(self.path(folder));
        let names = entries.into_iter().flatten().flatten();
        names
            .filter_map(|entry| entry.file_name().into_string().ok())
            .collect()
    }

    /// What `ip` says there.
    pub fn ip(&self, words: &str) -> Result<String> {
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
