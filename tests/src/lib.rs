//! The harness of the end-to-end tests: a cluster that is taken down even when its test fails, and a
//! picture of the machine to compare before and after.

pub mod api;
pub mod browser;
pub mod ethtool;
pub mod place;
pub mod sctp;

use std::collections::BTreeSet;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use serde_json::Value;

pub mod shop;
pub use shop::manifest as shop;

/// The executable under test, from `$XEBEC_BIN` (set by `cargo xtask test`).
pub fn xebec_bin() -> PathBuf {
    std::env::var_os("XEBEC_BIN")
        .map(PathBuf::from)
        .expect("XEBEC_BIN is set by `cargo xtask test`")
}

/// A cluster of the executable under test in folders of its own.
pub struct Cluster {
    dir: PathBuf,
    args: Vec<String>,
    down: bool,
}

impl Cluster {
    /// The folder of this process's cluster of this name.
    pub fn dir_of(name: &str) -> PathBuf {
        PathBuf::from(format!("/tmp/xebec-test-{name}-{}", std::process::id()))
    }

    /// Starts a cluster with these arguments for `up`, and waits until it is Ready.
    pub fn up(name: &str, args: &[&str]) -> Result<Self> {
        take_away_what_was_killed();
        let dir = Self::dir_of(name);
        std::fs::create_dir_all(&dir)
            .with_context(|| format!("could not make {}", dir.display()))?;
        let mut cluster = Self {
            dir,
            args: args.iter().map(|arg| (*arg).to_owned()).collect(),
            down: false,
        };
        cluster.start()?;
        Ok(cluster)
    }

    /// Starts it (again) on the same data.
    pub fn start(&mut self) -> Result<()> {
        let output = self
            .xebec(&["up", "--detach"])
            .args(&self.args)
            .output()
            .context("could not start xebec")?;
        succeed("xebec up", output)?;
        self.down = false;
        Ok(())
    }

    /// Kills it, and starts it on the same data with these arguments; its pods live on.
    pub fn restart(&mut self, args: &[&str]) -> Result<()> {
        let pid = self.pid()?;
        kill(pid, nix::sys::signal::Signal::SIGKILL)?;
        let patience = Duration::from_secs(10);
        eventually("the cluster's process ends", patience, || {
            Ok(has_ended(pid))
        })?;
        self.args = args.iter().map(|arg| (*arg).to_owned()).collect();
        self.start()
    }

    /// Starts it in the foreground, in a process group of its own as a shell does.
    pub fn foreground(&mut self) -> Result<std::process::Child> {
        let mut command = self.xebec(&["up"]);
        command
            .args(&self.args)
            .stdout(std::process::Stdio::piped());
        std::os::unix::process::CommandExt::process_group(&mut command, 0);
        self.down = false;
        command.spawn().context("could not start xebec")
    }

    /// `xebec` with this cluster's folders and the given arguments.
    pub fn xebec(&self, args: &[&str]) -> Command {
        let mut command = Command::new(xebec_bin());
        command
            .env("XEBEC_DATA_DIR", self.dir.join("data"))
            .env("XEBEC_RUN_DIR", self.dir.join("run"))
            .args(args);
        command
    }

    /// Runs `xebec` and gives its standard output.
    pub fn run(&self, args: &[&str]) -> Result<String> {
        succeed(
            &format!("xebec {}", args.join(" ")),
            self.xebec(args).output().context("could not start xebec")?,
        )
    }

    /// The real kubectl, as administrator.
    pub fn kubectl(&self, args: &[&str]) -> Command {
        let mut command =
            Command::new(std::env::var_os("KUBECTL").unwrap_or_else(|| "kubectl".into()));
        command.env("KUBECONFIG", self.kubeconfig()).args(args);
        command
    }

    /// The administrator's kubeconfig.
    pub fn kubeconfig(&self) -> PathBuf {
        self.dir.join("data/admin.kubeconfig")
    }

    /// Where the cluster's data lies.
    pub fn data(&self) -> PathBuf {
        self.dir.join("data")
    }

    /// Runs kubectl and gives its standard output.
    pub fn k(&self, args: &[&str]) -> Result<String> {
        succeed(
            &format!("kubectl {}", args.join(" ")),
            self.kubectl(args)
                .output()
                .context("could not start kubectl")?,
        )
    }

    /// `kubectl get … -o json`.
    pub fn get(&self, args: &[&str]) -> Result<Value> {
        let text = self.k(&[&["get"], args, &["-o", "json"]].concat())?;
        serde_json::from_str(&text).context("kubectl printed no JSON")
    }

    /// Names of the Ready pods with this label that are not on their way out.
    pub fn ready_pods(&self, namespace: &str, selector: &str) -> Result<BTreeSet<String>> {
        let pods = self.get(&["pods", "-n", namespace, "-l", selector])?;
        Ok(pods["items"]
            .as_array()
            .into_iter()
            .flatten()
            .filter(|pod| pod["metadata"]["deletionTimestamp"].is_null())
            .filter(|pod| {
                pod["status"]["conditions"].as_array().is_some_and(|all| {
                    all.iter()
                        .any(|c| c["type"] == "Ready" && c["status"] == "True")
                })
            })
            .filter_map(|pod| pod["metadata"]["name"].as_str().map(str::to_owned))
            .collect())
    }

    /// Its folder of sockets and mounts.
    pub fn run_dir(&self) -> PathBuf {
        self.dir.join("run")
    }

    /// Pid of the process that runs the cluster.
    pub fn pid(&self) -> Result<i32> {
        let state =
            std::fs::read(self.dir.join("run/up.json")).context("the cluster has no state file")?;
        let state: Value = serde_json::from_slice(&state).context("the state file is no JSON")?;
        state["pid"]
            .as_i64()
            .map(|pid| pid as i32)
            .context("the state file names no pid")
    }

    /// `xebec down`.
    pub fn down(&mut self) -> Result<()> {
        self.run(&["down"])?;
        self.down = true;
        Ok(())
    }

    /// Runs a command in the network namespace of one of several nodes and gives its standard output.
    pub fn in_node(&self, node: &str, command: &[&str]) -> Result<String> {
        let netns = self.netns(node);
        let mut nsenter = Command::new("nsenter");
        nsenter
            .arg(format!("--net={}", netns.display()))
            .args(command);
        succeed(
            &format!("{} on {node}", command.join(" ")),
            nsenter.output().context("could not start nsenter")?,
        )
    }

    /// Where the network namespace of one of several nodes is.
    pub fn netns(&self, node: &str) -> PathBuf {
        self.dir.join(format!("run/nodes/{node}/netns"))
    }

    /// What a node's agent says of itself.
    pub fn agent_status(&self, node: &str) -> Result<Value> {
        self.ask_agent(node, "/status")
    }

    /// What a node's agent answers to a request for this path.
    pub fn ask_agent(&self, node: &str, path: &str) -> Result<Value> {
        let socket = self.dir.join(format!("run/nodes/{node}/agent.sock"));
        ask_socket(&socket, path)
    }

    /// The log of the cluster's process.
    pub fn log(&self) -> String {
        std::fs::read_to_string(self.dir.join("data/up.log")).unwrap_or_default()
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("--- log of the cluster ---\n{}", self.log());
        }
        if !self.down {
            if let Err(error) = self.run(&["down"]) {
                eprintln!("could not take the cluster down: {error:#}");
            }
        }
        let _ = std::fs::remove_dir_all(&self.dir);
    }
}

/// A run of the tests that was killed could not take its cluster down, which the next one would meet.
fn take_away_what_was_killed() {
    let folders = std::fs::read_dir("/tmp").into_iter().flatten().flatten();
    for dir in folders.map(|entry| entry.path()) {
        let name = dir.file_name().and_then(|name| name.to_str());
        let of = name
            .filter(|name| name.starts_with("xebec-test-"))
            .and_then(|name| name.rsplit_once('-'))
            .and_then(|(_, pid)| pid.parse::<u32>().ok());
        let Some(pid) = of else { continue };
        if Path::new(&format!("/proc/{pid}")).exists() || !dir.join("run/up.json").exists() {
            continue;
        }
        eprintln!("taking away {}, whose test was killed", dir.display());
        drop(Cluster {
            dir,
            args: Vec::new(),
            down: false,
        });
    }
}

/// What an agent answers at its socket to a request for this path.
pub fn ask_socket(socket: &Path, path: &str) -> Result<Value> {
    let mut stream = UnixStream::connect(socket)
        .with_context(|| format!("could not connect to {}", socket.display()))?;
    // By HTTP/1.0 nothing comes in chunks.
    write!(
        stream,
        "GET {path} HTTP/1.0\r\nhost: agent\r\nconnection: close\r\n\r\n"
    )
    .context("could not ask the agent")?;
    let mut text = String::new();
    stream
        .read_to_string(&mut text)
        .context("the agent did not answer")?;
    let (_, body) = text
        .split_once("\r\n\r\n")
        .with_context(|| format!("the agent answered {text:?}"))?;
    serde_json::from_str(body).with_context(|| format!("the agent answered {text:?}"))
}

/// Sends a signal to a process, or to a group where the number is negative.
pub fn kill(pid: i32, signal: nix::sys::signal::Signal) -> Result<()> {
    nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid), signal)
        .with_context(|| format!("could not send {signal} to {pid}"))
}

/// Whether all threads of a process have ended, and have let go of its locks and sockets.
fn has_ended(pid: i32) -> bool {
    let Ok(threads) = std::fs::read_dir(format!("/proc/{pid}/task")) else {
        return true;
    };
    // The first one is left until somebody has waited for the process.
    threads.flatten().all(|thread| {
        let stat = std::fs::read_to_string(thread.path().join("stat")).unwrap_or_default();
        // The state follows the name, which stands in brackets (proc(5)).
        stat.rsplit_once(") ")
            .is_some_and(|(_, fields)| fields.starts_with(['Z', 'X']))
    })
}

/// Standard output of a command that must have succeeded.
pub fn succeed(what: &str, output: Output) -> Result<String> {
    if !output.status.success() {
        bail!(
            "`{what}` failed ({}):\n{}{}",
            output.status,
            String::from_utf8_lossy(&output.stdout),
            String::from_utf8_lossy(&output.stderr)
        );
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// Asks again until it holds; the last error or `what` is the failure.
pub fn eventually(
    what: &str,
    timeout: Duration,
    mut holds: impl FnMut() -> Result<bool>,
) -> Result<()> {
    let deadline = Instant::now() + timeout;
    loop {
        let answer = holds();
        if matches!(answer, Ok(true)) {
            return Ok(());
        }
        if Instant::now() > deadline {
            answer.with_context(|| format!("{what}: not within {timeout:?}"))?;
            bail!("{what}: not within {timeout:?}");
        }
        std::thread::sleep(Duration::from_millis(100));
    }
}

/// What a cluster may leave on a machine: links, routes, mounts, eBPF programs, processes.
pub struct Machine {
    links: BTreeSet<String>,
    routes: BTreeSet<String>,
    rules: BTreeSet<String>,
    mounts: BTreeSet<String>,
    programs: BTreeSet<u32>,
    processes: BTreeSet<String>,
    cgroups: BTreeSet<PathBuf>,
}

impl Machine {
    /// The machine as it is now, without what killed runs of the tests left.
    pub fn now() -> Result<Self> {
        take_away_what_was_killed();
        let lines = |args: &[&str]| -> Result<BTreeSet<String>> {
            let text = succeed(
                "ip",
                Command::new("ip")
                    .args(args)
                    .output()
                    .context("could not start ip")?,
            )?;
            Ok(text.lines().map(str::to_owned).collect())
        };
        let mounts =
            std::fs::read_to_string("/proc/self/mounts").context("could not read mounts")?;
        Ok(Self {
            links: lines(&["-br", "link"])?,
            // Forwarding stays on, and the kernel gives each device of a router such an address by itself (RFC 4291,
            // 2.6.1).
            routes: lines(&["route", "show", "table", "all"])?
                .into_iter()
                .filter(|route| !route.starts_with("anycast "))
                .collect(),
            rules: lines(&["rule"])?,
            mounts: mounts.lines().map(str::to_owned).collect(),
            programs: aya::programs::loaded_programs()
                .filter_map(Result::ok)
                .map(|program| program.id())
                .collect(),
            processes: processes_of(&xebec_bin()),
            cgroups: cgroups(Path::new("/sys/fs/cgroup")),
        })
    }
}

/// Fails if the machine has anything that it had not `before`, or lost what is not a pod's.
///
/// A cluster that someone else ran may end meanwhile; what it takes with it is not judged.
pub fn assert_nothing_left(before: &Machine) -> Result<()> {
    let now = Machine::now()?;
    let text = |ids: &BTreeSet<u32>| -> BTreeSet<String> {
        ids.iter().map(|id| format!("program {id}")).collect()
    };
    let paths = |paths: &BTreeSet<PathBuf>| -> BTreeSet<String> {
        paths
            .iter()
            .map(|path| path.display().to_string())
            .collect()
    };
    let mut changes = Vec::new();
    for (before, now, lost_counts) in [
        (&before.links, &now.links, true),
        (&before.routes, &now.routes, true),
        (&before.rules, &now.rules, true),
        (&before.mounts, &now.mounts, false),
        (&text(&before.programs), &text(&now.programs), false),
        (&before.processes, &now.processes, false),
        (&paths(&before.cgroups), &paths(&now.cgroups), false),
    ] {
        changes.extend(now.difference(before).map(|new| format!("left: {new}")));
        if lost_counts {
            changes.extend(
                before
                    .difference(now)
                    .filter(|lost| !lost.contains("xbc"))
                    .map(|lost| format!("lost: {lost}")),
            );
        }
    }
    anyhow::ensure!(
        changes.is_empty(),
        "the machine changed:\n{}",
        changes.join("\n")
    );
    Ok(())
}

/// Pids of the processes that run this executable.
pub fn pids_of(executable: &Path) -> BTreeSet<i32> {
    std::fs::read_dir("/proc")
        .into_iter()
        .flatten()
        .flatten()
        .filter(|entry| {
            std::fs::read_link(entry.path().join("exe")).is_ok_and(|exe| exe == executable)
        })
        .filter_map(|entry| entry.file_name().to_str()?.parse().ok())
        .collect()
}

/// Processes that run this executable, with their command lines.
fn processes_of(executable: &Path) -> BTreeSet<String> {
    pids_of(executable)
        .into_iter()
        .map(|pid| {
            let command = std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
            format!(
                "{pid} {}",
                String::from_utf8_lossy(&command).replace('\0', " ")
            )
        })
        .collect()
}

/// All cgroup folders with a name of ours.
fn cgroups(dir: &Path) -> BTreeSet<PathBuf> {
    let mut found = BTreeSet::new();
    for entry in std::fs::read_dir(dir).into_iter().flatten().flatten() {
        let path = entry.path();
        if !entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            continue;
        }
        let name = entry.file_name();
        if ["xebec", "kubepods"]
            .iter()
            .any(|ours| name.to_string_lossy().contains(ours))
        {
            found.insert(path.clone());
        }
        found.extend(cgroups(&path));
    }
    found
}
