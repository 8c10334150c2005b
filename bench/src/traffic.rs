//! Starts the asking end of the TCP benchmark in the namespaces and cgroups of another process.

use std::net::SocketAddrV4;
use std::path::PathBuf;
use std::process::Command;

use anyhow::{Context, Result, bail};
use xebec_tests::{succeed, xebec_bin};

/// Where `xebec demo tcp-serve` listens unless told otherwise.
pub const PORT: u16 = 8081;
/// The core of answering processes.
pub const SERVER_CPU: usize = 0;

/// What is asked.
#[derive(Clone, Copy)]
pub enum Mode {
    /// One byte there and back, again and again.
    RequestResponse,
    /// The same with a connection for each.
    ConnectRequestResponse,
    /// Bytes one way.
    Stream,
}

impl Mode {
    fn flag(self) -> &'static str {
        match self {
            Self::RequestResponse => "rr",
            Self::ConnectRequestResponse => "crr",
            Self::Stream => "stream",
        }
    }
}

/// Where a process runs: with the network of another process, and in the cgroups of a pod.
pub struct Place {
    pid: i32,
    cgroups: Vec<PathBuf>,
}

impl Place {
    /// The same cgroups with the network of another process.
    pub fn with_network_of(&self, pid: i32) -> Self {
        Self {
            pid,
            cgroups: self.cgroups.clone(),
        }
    }

    /// Moves a process, with all its threads, into the cgroups.
    pub fn take_in(&self, pid: i32) -> Result<()> {
        for dir in &self.cgroups {
            let path = dir.join("cgroup.procs");
            std::fs::write(&path, pid.to_string())
                .with_context(|| format!("could not write {}", path.display()))?;
        }
        Ok(())
    }

    /// As if it were a process of the pod with this uid, whose container runs `tcp-serve`.
    pub fn of_pod(uid: &str) -> Result<Self> {
        let pid = container_process(uid)?;
        Ok(Self {
            pid,
            cgroups: cgroups_of(pid)?,
        })
    }

    /// The process whose place this is.
    pub fn pid(&self) -> i32 {
        self.pid
    }

    /// Asks for so many seconds; transactions or bytes per second.
    pub fn measure(&self, address: SocketAddrV4, mode: Mode, seconds: f64) -> Result<f64> {
        // The shell enters the cgroups before it becomes the client, so that all of the client runs in them.
        let mut command = Command::new("sh");
        command
            .args([
                "-c",
                "netns=$1 cpu=$2; shift 2
                 for dir in $BENCH_CGROUPS; do echo 0 > $dir/cgroup.procs || exit 1; done
                 exec nsenter --net=$netns taskset -c $cpu \"$@\"",
                "sh",
            ])
            .arg(format!("/proc/{}/ns/net", self.pid))
            .arg(client_cpu()?.to_string())
            .arg(xebec_bin())
            .args(["demo", "tcp-bench", &address.to_string()])
            .args(["--mode", mode.flag()])
            .args(["--seconds", &seconds.to_string()])
            .env("BENCH_CGROUPS", self.cgroups_as_words()?);
        let output = command.output().context("could not start the client")?;
        let text = succeed("xebec demo tcp-bench", output)?;
        text.trim()
            .parse()
            .with_context(|| format!("the client printed no number but {text:?}"))
    }

    fn cgroups_as_words(&self) -> Result<String> {
        let mut words = Vec::new();
        for dir in &self.cgroups {
            let dir = dir
                .to_str()
                .filter(|dir| !dir.contains(char::is_whitespace));
            words.push(dir.context("a cgroup folder has blanks in its name")?);
        }
        Ok(words.join(" "))
    }
}

/// The core of asking processes: another than the answering ones', where there is one.
pub fn client_cpu() -> Result<usize> {
    let cores = std::thread::available_parallelism().context("could not count the cores")?;
    Ok(if cores.get() > 1 {
        SERVER_CPU + 1
    } else {
        SERVER_CPU
    })
}

/// Keeps all threads of a process to one core.
pub fn pin(pid: i32, cpu: usize) -> Result<()> {
    let output = Command::new("taskset")
        .args(["-a", "-c", "-p", &cpu.to_string(), &pid.to_string()])
        .output()
        .context("could not start taskset (package util-linux)")?;
    succeed("taskset", output).map(drop)
}

/// The `tcp-serve` process in the cgroup of a pod.
fn container_process(uid: &str) -> Result<i32> {
    let name = format!("pod{uid}");
    for entry in std::fs::read_dir("/proc")
        .context("could not list /proc")?
        .flatten()
    {
        let Some(pid) = entry
            .file_name()
            .to_str()
            .and_then(|name| name.parse().ok())
        else {
            continue;
        };
        // Processes may end while we look.
        let cgroups = std::fs::read_to_string(entry.path().join("cgroup")).unwrap_or_default();
        let command = std::fs::read_to_string(entry.path().join("cmdline")).unwrap_or_default();
        if cgroups.contains(&name) && command.split('\0').any(|word| word == "tcp-serve") {
            return Ok(pid);
        }
    }
    bail!("no process runs in the cgroup {name}")
}

/// The folders of a process's cgroups, one per hierarchy that is mounted.
fn cgroups_of(pid: i32) -> Result<Vec<PathBuf>> {
    let read = |path: String| {
        std::fs::read_to_string(&path).with_context(|| format!("could not read {path}"))
    };
    let memberships = read(format!("/proc/{pid}/cgroup"))?;
    let mounts = read("/proc/self/mounts".to_owned())?;
    let mut folders = Vec::new();
    // Lines are `number:controllers:/path`; the controllers of cgroup v2 are empty.
    for line in memberships.lines() {
        let mut words = line.splitn(3, ':').skip(1);
        let (Some(controllers), Some(path)) = (words.next(), words.next()) else {
            bail!("/proc/{pid}/cgroup has a strange line: {line}");
        };
        let point = mounts.lines().find_map(|mount| {
            let words: Vec<&str> = mount.split(' ').collect();
            let (point, kind, options) = (words.get(1)?, words.get(2)?, words.get(3)?);
            let ours = match controllers {
                "" => *kind == "cgroup2",
                _ => {
                    *kind == "cgroup"
                        && controllers
                            .split(',')
                            .all(|controller| options.split(',').any(|option| option == controller))
                }
            };
            ours.then(|| PathBuf::from(point))
        });
        if let Some(point) = point {
            folders.push(point.join(path.trim_start_matches('/')));
        }
    }
    Ok(folders)
}
