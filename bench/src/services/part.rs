//! Processes of a benchmark with a network namespace of their own: this executable again, told what to do line by line.

use std::io::{BufRead, BufReader, Write};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use clap::{Parser, Subcommand};
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::Value;
use xebec_tests::eventually;

use super::{agent, control, wire};
use crate::cleanup::OnInterrupt;
use crate::policy::{fill, judge, pods};

/// The first argument that makes this executable a part.
pub const PART: &str = "part";

#[derive(Parser)]
#[command(name = "xebec-bench part", hide = true)]
struct Args {
    /// A cgroup v2 folder to run in
    #[arg(long)]
    cgroup: Option<PathBuf>,
    /// The core to keep to
    #[arg(long)]
    cpu: Option<usize>,
    #[command(subcommand)]
    role: Role,
}

#[derive(Subcommand)]
enum Role {
    /// Keeps a network namespace
    Hold,
    /// Answers
    Serve(wire::Serve),
    /// Asks
    Ask,
    /// The API server
    Control(control::Args),
    /// The agent
    Agent(agent::Args),
    /// Runs programs on frames
    Pound,
    /// Enters flows and has them expire
    Expire,
    /// Sends live frames
    Live,
    /// Drops what comes in at a device
    Sink { device: String },
    /// Many pods, and what asks them
    Pods(pods::Args),
    /// Programs under rules
    Judge(judge::Args),
    /// Maps of policy
    Fill(fill::Args),
}

/// Runs as a part, when the arguments say so.
pub fn main() -> Result<()> {
    let args = Args::parse_from(std::env::args_os().skip(1));
    if let Some(cgroup) = &args.cgroup {
        let path = cgroup.join("cgroup.procs");
        std::fs::write(&path, "0")
            .with_context(|| format!("could not write {}", path.display()))?;
    }
    if let Some(cpu) = args.cpu {
        let mut cpus = nix::sched::CpuSet::new();
        cpus.set(cpu).context("there is no such core")?;
        nix::sched::sched_setaffinity(nix::unistd::Pid::from_raw(0), &cpus)
            .with_context(|| format!("could not keep to core {cpu}"))?;
        // Cores are shared out between sessions first (sched_autogroup): as a session of its own, before the others.
        // Where either is not allowed or not there, it is as every process is.
        let _ = nix::unistd::setsid();
        let _ = std::fs::write("/proc/self/autogroup", "-20");
    }
    match args.role {
        Role::Hold => {
            // Until the benchmark ends or lets go.
            let mut line = String::new();
            std::io::stdin().read_line(&mut line)?;
            Ok(())
        }
        Role::Serve(serve) => wire::serve(&serve),
        Role::Ask => wire::ask(),
        Role::Control(control) => control::run(control),
        Role::Agent(agent) => agent::run(agent),
        Role::Pound => crate::lb::pound::run(),
        Role::Expire => crate::lb::expiry::obey(),
        Role::Live => crate::lb::live::send(),
        Role::Sink { device } => crate::lb::live::sink(&device),
        Role::Pods(args) => pods::run(&args),
        Role::Judge(args) => judge::run(&args),
        Role::Fill(args) => fill::run(&args),
    }
}

/// What a part that speaks TLS runs with, and so does a node's agent: two threads.
pub fn runtime() -> Result<tokio::runtime::Runtime> {
    rustls::crypto::ring::default_provider()
        .install_default()
        .map_err(|_| anyhow::anyhow!("another TLS provider is installed already"))?;
    tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .context("could not start the async runtime")
}

/// In which network namespace a part runs.
pub enum Network<'a> {
    /// One that is made for it.
    Own,
    /// That of another part.
    Of(&'a Part),
}

/// A running part; killed when this is dropped, or when the benchmark dies.
pub struct Part {
    child: Child,
    stdin: Option<ChildStdin>,
    stdout: BufReader<ChildStdout>,
    name: String,
    _interrupt: OnInterrupt,
}

impl Part {
    /// Starts one. `own_mounts` gives it a mount namespace whose mounts end with it.
    pub fn start(network: Network, own_mounts: bool, words: &[&str]) -> Result<Self> {
        let executable =
            std::env::current_exe().context("could not find the benchmark's executable")?;
        let mut command = Command::new("setpriv");
        // Should the benchmark be killed, the kernel ends this too.
        command.args(["--pdeathsig", "KILL"]);
        let netns;
        match &network {
            Network::Own => command.args(["unshare", "--net"]),
            Network::Of(other) => {
                netns = format!("--net={}", other.netns().display());
                command.args(["nsenter", &netns])
            }
        };
        if own_mounts {
            command.args(["unshare", "--mount", "--propagation", "private"]);
        }
        // What keeps to a core is measured: before whatever else wants that core. Where this is not allowed, it is as
        // every process is.
        if words.contains(&"--cpu") {
            command.args(["nice", "-n", "-20"]);
        }
        let mut child = command
            .arg(executable)
            .arg(PART)
            .args(words)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .context("could not start setpriv, unshare or nsenter (package util-linux)")?;
        let mut kill = Command::new("kill");
        kill.args(["-KILL", &child.id().to_string()]);
        let (stdin, stdout) = (child.stdin.take(), child.stdout.take());
        let part = Self {
            _interrupt: OnInterrupt::run(kill),
            stdin,
            stdout: BufReader::new(stdout.context("a part has no standard output")?),
            name: words.join(" "),
            child,
        };
        if matches!(network, Network::Own) {
            let ours = inode(Path::new("/proc/self/ns/net"))?;
            eventually(
                "a network namespace of its own",
                // The kernel may be taking hundreds of others away, one by one.
                Duration::from_secs(120),
                || Ok(inode(&part.netns())? != ours),
            )?;
        }
        Ok(part)
    }

    /// Its process.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Its network namespace.
    pub fn netns(&self) -> PathBuf {
        PathBuf::from(format!("/proc/{}/ns/net", self.pid()))
    }

    /// Tells it something.
    pub fn tell(&mut self, order: &impl Serialize) -> Result<()> {
        let line = serde_json::to_string(order).context("could not write an order as JSON")?;
        let stdin = self.stdin.as_mut().context("the part was told to end")?;
        writeln!(stdin, "{line}").with_context(|| format!("{} has ended", self.name))
    }

    /// What it says next; an object with `error` is one.
    pub fn hear<T: DeserializeOwned>(&mut self) -> Result<T> {
        let mut line = String::new();
        let length = self
            .stdout
            .read_line(&mut line)
            .with_context(|| format!("could not hear {}", self.name))?;
        ensure!(length > 0, "{} has ended", self.name);
        let value: Value =
            serde_json::from_str(&line).with_context(|| format!("{} said {line:?}", self.name))?;
        if let Some(error) = value["error"].as_str() {
            bail!("{error}");
        }
        serde_json::from_value(value).with_context(|| format!("{} said {line:?}", self.name))
    }

    /// Asks it something.
    pub fn ask<T: DeserializeOwned>(&mut self, order: &impl Serialize) -> Result<T> {
        self.tell(order)?;
        self.hear()
    }

    /// Runs a program in its network namespace; what it printed.
    pub fn run(&self, program: &str, words: &str) -> Result<String> {
        let words = words.split(' ').filter(|word| !word.is_empty());
        let output = Command::new("nsenter")
            .arg(format!("--net={}", self.netns().display()))
            .arg(program)
            .args(words.clone())
            .output()
            .with_context(|| format!("could not start {program}"))?;
        let line: Vec<&str> = words.collect();
        xebec_tests::succeed(&format!("{program} {}", line.join(" ")), output)
    }

    /// Ends it the way it ends by itself, which it gets some seconds for.
    pub fn end(mut self) {
        drop(self.stdin.take());
        let ended = eventually("its end", Duration::from_secs(10), || {
            Ok(self.child.try_wait()?.is_some())
        });
        // What does not end is killed.
        drop(ended);
    }
}

impl Drop for Part {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn inode(path: &Path) -> Result<u64> {
    let metadata =
        std::fs::metadata(path).with_context(|| format!("could not look at {}", path.display()))?;
    Ok(metadata.ino())
}

/// Answers every order that comes on standard input until it ends.
pub fn obey<O: DeserializeOwned>(mut obey: impl FnMut(O) -> Result<Value>) -> Result<()> {
    for line in std::io::stdin().lock().lines() {
        let line = line.context("could not read an order")?;
        let order = serde_json::from_str(&line)
            .with_context(|| format!("{line:?} is no order for this part"));
        say(&match order.and_then(&mut obey) {
            Ok(value) => value,
            Err(error) => serde_json::json!({"error": format!("{error:#}")}),
        })?;
    }
    Ok(())
}

/// Says something to the benchmark.
pub fn say(value: &impl Serialize) -> Result<()> {
    let line = serde_json::to_string(value).context("could not write an answer as JSON")?;
    let mut out = std::io::stdout().lock();
    writeln!(out, "{line}")
        .and_then(|()| out.flush())
        .context("the benchmark does not listen")
}

/// Nanoseconds of the clock that all processes share.
pub fn now() -> Result<u64> {
    let time = nix::time::clock_gettime(nix::time::ClockId::CLOCK_MONOTONIC)
        .context("could not read the clock")?;
    Ok(time.tv_sec() as u64 * 1_000_000_000 + time.tv_nsec() as u64)
}
