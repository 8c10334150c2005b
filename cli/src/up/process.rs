//! A node in a process and a network namespace of its own: started, told what to do, started again when it ends
//! by itself.

use std::process::Stdio;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use serde::{Deserialize, Serialize};
use tokio::io::AsyncWriteExt;
use tokio::process::{Child, ChildStdin, Command};
use tokio::sync::oneshot;
use tokio::task::JoinHandle;
use tracing::warn;

use super::node::{AGENT_USER, Access, NodeConfig, serving_tls};
use super::switch;
use crate::pki::{Authority, Leaf};

/// What a node's process reads first, as one line: keys go over the pipe and lie on no disk.
#[derive(Serialize, Deserialize)]
pub struct Spec {
    /// The node.
    pub config: NodeConfig,
    /// What it may do at the API server; none: it only takes away the pods that are left of it.
    pub keys: Option<Keys>,
}

/// The credentials of a node's parts.
#[derive(Serialize, Deserialize)]
pub struct Keys {
    authority: String,
    /// A kubeconfig.
    kubelet: String,
    /// A kubeconfig.
    agent: String,
    serving: Leaf,
}

impl Keys {
    /// Signs what this node needs.
    pub fn new(config: &NodeConfig, authority: &Authority, server: &str) -> Result<Self> {
        let kubeconfig = |user: &str, groups: &[&str]| {
            let leaf = authority.client(user, groups)?;
            crate::kubeconfig::render(server, &authority.ca_pem, &leaf)
        };
        Ok(Self {
            authority: authority.ca_pem.clone(),
            kubelet: kubeconfig(&config.user(), &["system:nodes"])?,
            agent: kubeconfig(AGENT_USER.0, AGENT_USER.1)?,
            serving: config.serving_leaf(authority)?,
        })
    }

    /// Clients that use them.
    pub async fn access(&self) -> Result<Access> {
        Ok(Access {
            kubelet: client(&self.kubelet).await?,
            agent: client(&self.agent).await?,
            serving: serving_tls(&self.authority, &self.serving)?,
        })
    }
}

async fn client(kubeconfig: &str) -> Result<kube::Client> {
    let parsed = kube::config::Kubeconfig::from_yaml(kubeconfig)
        .context("the node's kubeconfig can't be read")?;
    let options = kube::config::KubeConfigOptions::default();
    let config = kube::Config::from_custom_kubeconfig(parsed, &options)
        .await
        .context("the node's kubeconfig can't be used")?;
    kube::Client::try_from(config).context("could not make an API client")
}

/// What a node's process can be told.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Order {
    /// End, and leave pods and their network as they are.
    Leave,
    /// Take the pods down, then end.
    Stop,
}

impl Order {
    /// As it is sent.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Leave => "leave",
            Self::Stop => "stop",
        }
    }

    /// As it is heard.
    pub fn parse(line: &str) -> Option<Self> {
        [Self::Leave, Self::Stop]
            .into_iter()
            .find(|order| order.as_str() == line)
    }
}

/// How long a node may take to do as it is told.
const PATIENCE: Duration = Duration::from_secs(60);
/// A process that ends sooner than this after its start would end again.
const TOO_SOON: Duration = Duration::from_secs(5);

/// A node's process, which is kept running.
pub struct Process {
    /// Name of the node.
    pub name: String,
    orders: oneshot::Sender<Order>,
    /// Ends with an error when the node can't be kept running.
    pub task: JoinHandle<Result<()>>,
}

impl Process {
    /// Starts it.
    pub fn start(spec: Spec, log: &str) -> Self {
        let (orders, heard) = oneshot::channel();
        Self {
            name: spec.config.name.clone(),
            orders,
            task: tokio::spawn(supervise(spec, log.to_owned(), heard)),
        }
    }

    /// Tells it to end, and waits until it has.
    pub async fn end(self, order: Order) -> Result<()> {
        // Where nobody hears it, the task has ended with an error that tells more.
        let _ = self.orders.send(order);
        self.task
            .await
            .with_context(|| format!("the task of node {} panicked", self.name))?
    }
}

/// Runs a node's process until it is told to end.
async fn supervise(spec: Spec, log: String, mut orders: oneshot::Receiver<Order>) -> Result<()> {
    let name = &spec.config.name;
    loop {
        let started = Instant::now();
        let (mut child, mut pipe) = spawn(&spec, &log).await?;
        tokio::select! {
            order = &mut orders => {
                // Without one the cluster's process is going: the pipe ends, and the node with it.
                if let Ok(order) = order {
                    say(&mut pipe, order.as_str()).await;
                    return ended(name, &mut child).await;
                }
                return Ok(());
            }
            status = child.wait() => {
                let status = status.with_context(|| format!("could not wait for node {name}"))?;
                ensure!(
                    started.elapsed() > TOO_SOON,
                    "the process of node {name} ended ({status}); the log says why"
                );
                warn!(node = name, %status, "the node's process ended by itself; it is started again");
            }
        }
    }
}

/// Has a process of its own take away what is left of a killed node.
pub async fn remains(config: &NodeConfig, log: &str) -> Result<()> {
    let spec = Spec {
        config: config.clone(),
        keys: None,
    };
    // The pipe stays open until the process has ended.
    let (mut child, _pipe) = spawn(&spec, log).await?;
    ended(&config.name, &mut child).await
}

async fn ended(name: &str, child: &mut Child) -> Result<()> {
    let Ok(status) = tokio::time::timeout(PATIENCE, child.wait()).await else {
        child
            .kill()
            .await
            .with_context(|| format!("could not end the process of node {name}"))?;
        bail!("node {name} did not end within {PATIENCE:?}");
    };
    let status = status.with_context(|| format!("could not wait for node {name}"))?;
    ensure!(
        status.success(),
        "the process of node {name} failed ({status}); the log says why"
    );
    Ok(())
}

/// A line to the node; one that has ended is noticed by its status.
async fn say(pipe: &mut ChildStdin, line: &str) {
    let _ = pipe.write_all(format!("{line}\n").as_bytes()).await;
}

/// Starts the process in the node's network namespace, and tells it what it is.
async fn spawn(spec: &Spec, log: &str) -> Result<(Child, ChildStdin)> {
    let name = spec.config.name.clone();
    let cable = spec.config.cable.clone();
    let cable = cable.with_context(|| format!("node {name} has no network namespace"))?;
    let executable = std::env::current_exe().context("could not find this executable")?;
    let mut command = Command::new(executable);
    command
        .args(["--log", log, "node", &name])
        .stdin(Stdio::piped())
        // Ctrl-C in this terminal is heard by the cluster's process alone.
        .process_group(0);
    let runtime = tokio::runtime::Handle::current();
    // A child has the namespace of the thread that starts it.
    let thread = std::thread::spawn(move || -> Result<Child> {
        switch::enter(&cable.netns)?;
        let _entered = runtime.enter();
        command.spawn().context("could not start the process")
    });
    let child = match thread.join() {
        Ok(child) => child.with_context(|| format!("node {name}")),
        Err(_) => bail!("the thread that starts node {name} panicked"),
    };
    let mut child = child?;
    let mut pipe = child
        .stdin
        .take()
        .context("the node's process has no pipe")?;
    let text = serde_json::to_string(spec).context("could not write JSON")?;
    say(&mut pipe, &text).await;
    Ok((child, pipe))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn orders_are_heard_as_they_were_sent() {
        for order in [Order::Leave, Order::Stop] {
            assert_eq!(Order::parse(order.as_str()), Some(order));
        }
        assert_eq!(Order::parse("stop "), None);
    }
}
