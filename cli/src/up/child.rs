//! `xebec node`: the process of a node that has a network namespace of its own; `up` starts it and holds its pipe.

use std::io::BufRead;
use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use nix::fcntl::{Flock, FlockArg};
use tokio::sync::mpsc;

use super::node::{self, NodeConfig};
use super::process::{Keys, Order, Spec};
use super::{switch, teardown};
use crate::paths::private_dir;

/// How long a process of this node that has lost its cluster may take to end.
const PATIENCE: Duration = Duration::from_secs(10);

/// Runs the node as standard input tells, until it is told to end. When that stream ends without a word, the
/// cluster's process was killed, and this one ends at once as a part of it would.
pub fn run(name: &str) -> Result<()> {
    let mut line = String::new();
    std::io::stdin()
        .lock()
        .read_line(&mut line)
        .context("could not read what to run")?;
    let spec: Spec = serde_json::from_str(&line)
        .context("this is started by `xebec up --nodes`, which says what to run")?;
    drop(line);
    if spec.config.name != name {
        bail!("told to run node {}, not {name}", spec.config.name);
    }
    super::install_tls_provider()?;
    private_dir(&spec.config.layout.run)?;
    let lock = lock(&spec.config)?;
    // For `status`, which must not take a pid for this node's that is another's by now.
    std::fs::write(spec.config.layout.lock(), std::process::id().to_string())
        .with_context(|| format!("could not write {}", spec.config.layout.lock().display()))?;
    join_cgroup(&spec.config)?;
    let orders = hear();
    tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .context("could not start the async runtime")?
        .block_on(async {
            switch::configure_inside(&spec.config).await?;
            match &spec.keys {
                Some(keys) => run_node(&spec.config, keys, orders).await,
                None => teardown::remains(&spec.config).await,
            }
        })?;
    drop(lock);
    Ok(())
}

/// The process that runs a node now, if there is one.
pub fn process_of(node: &NodeConfig) -> Option<i32> {
    let path = node.layout.lock();
    let file = std::fs::File::open(&path).ok()?;
    match Flock::lock(file, FlockArg::LockSharedNonblock) {
        // Nobody holds it.
        Ok(_) => None,
        Err(_) => std::fs::read_to_string(&path).ok()?.trim().parse().ok(),
    }
}

async fn run_node(
    config: &NodeConfig,
    keys: &Keys,
    mut orders: mpsc::UnboundedReceiver<Order>,
) -> Result<()> {
    let mut running = node::start(config, keys.access().await?)?;
    let order = tokio::select! {
        order = orders.recv() => order,
        error = running.first_failure() => return Err(error),
    };
    match order {
        Some(Order::Stop) => teardown::node(running, config).await,
        Some(Order::Leave) | None => running.leave().await,
    }
    Ok(())
}

/// Hears what `up` says on a thread that nobody waits for.
fn hear() -> mpsc::UnboundedReceiver<Order> {
    let (sender, orders) = mpsc::unbounded_channel();
    std::thread::spawn(move || {
        for line in std::io::stdin().lock().lines() {
            match line.as_deref().map(Order::parse) {
                Ok(Some(order)) => drop(sender.send(order)),
                Ok(None) => {}
                Err(_) => break,
            }
        }
        std::process::exit(1);
    });
    orders
}

/// One process a node: one that a killed cluster left may still be on its way out.
fn lock(config: &NodeConfig) -> Result<Flock<OwnedFd>> {
    let path = config.layout.lock();
    let file = std::fs::OpenOptions::new()
        .create(true)
        .truncate(false)
        .write(true)
        .open(&path)
        .with_context(|| format!("could not make {}", path.display()))?;
    let mut file = OwnedFd::from(file);
    let deadline = Instant::now() + PATIENCE;
    loop {
        match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
            Ok(lock) => return Ok(lock),
            Err((back, nix::errno::Errno::EWOULDBLOCK)) if Instant::now() < deadline => {
                file = back;
                std::thread::sleep(Duration::from_millis(20));
            }
            Err((_, error)) => {
                return Err(error).with_context(|| {
                    format!(
                        "could not lock {}: another process runs node {}",
                        path.display(),
                        config.name
                    )
                });
            }
        }
    }
}

/// A folder of the node's own in cgroup v2, below which all its processes are: its socket programs see them, and
/// nobody else's.
fn join_cgroup(config: &NodeConfig) -> Result<()> {
    // In a leaf: with controllers in use, a folder that has others below it may hold no process.
    let dir = config.cgroup_root.join("node");
    std::fs::create_dir_all(&dir)
        .and_then(|()| std::fs::write(dir.join("cgroup.procs"), "0"))
        .with_context(|| format!("could not join the cgroup {}", dir.display()))
}
