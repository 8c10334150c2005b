//! The nodes of a cluster: one that is this process and this machine, or several that have their own.

use std::net::IpAddr;

use anyhow::{Result, bail};
use tracing::warn;

use super::control_plane::ControlPlane;
use super::node::{self, Access, NodeConfig, Running};
use super::process::{self, Keys, Order, Process, Spec};
use super::{switch, teardown};
use crate::paths::Layout;
use crate::pki::Authority;

/// Nodes that run.
pub enum Nodes {
    /// One, as tasks of this process.
    Here(Box<Running>),
    /// Each a process in a network namespace of its own.
    Apart(Vec<Process>),
}

impl Nodes {
    /// Starts them all.
    pub async fn start(
        nodes: &[NodeConfig],
        authority: &Authority,
        control_plane: &ControlPlane,
        outside: &Outside<'_>,
    ) -> Result<Self> {
        if let [only] = nodes {
            if only.cable.is_none() {
                let access = Access::in_process(only, authority, control_plane)?;
                return Ok(Self::Here(Box::new(node::start(only, access)?)));
            }
        }
        switch::ensure(nodes).await?;
        switch::sign(&outside.layout.run)?;
        open_gateway(nodes, outside).await?;
        let specs: Vec<Spec> = nodes
            .iter()
            .map(|config| {
                Ok(Spec {
                    config: config.clone(),
                    keys: Some(Keys::new(config, authority, outside.server)?),
                })
            })
            .collect::<Result<_>>()?;
        let start = |spec| Process::start(spec, outside.log);
        Ok(Self::Apart(specs.into_iter().map(start).collect()))
    }

    /// The error of the first node that can't go on; waits for ever while all run.
    pub async fn first_failure(&mut self) -> anyhow::Error {
        let processes = match self {
            Self::Here(running) => return running.first_failure().await,
            Self::Apart(processes) => processes,
        };
        let tasks = processes.iter_mut().map(|process| &mut process.task);
        match futures::future::select_all(tasks).await.0 {
            Ok(Ok(())) => anyhow::anyhow!("a node ended by itself"),
            Ok(Err(error)) => error,
            Err(error) => anyhow::anyhow!("the task of a node panicked: {error}"),
        }
    }

    /// Ends the nodes and leaves pods and their network as they are.
    pub async fn leave(self) {
        match self {
            Self::Here(running) => running.leave().await,
            Self::Apart(processes) => end(processes, Order::Leave).await,
        }
    }

    /// Takes the pods down, ends the nodes and removes what they made.
    pub async fn take_down(self, nodes: &[NodeConfig]) {
        match (self, nodes) {
            (Self::Here(running), [only]) => return teardown::node(*running, only).await,
            (Self::Here(running), _) => return running.leave().await,
            (Self::Apart(processes), _) => end(processes, Order::Stop).await,
        }
        if let Err(error) = clean(nodes).await {
            warn!(error = format!("{error:#}"), "could not clean up all");
        }
    }
}

/// What nodes with processes of their own need from this one.
pub struct Outside<'a> {
    /// Where they find the API server.
    pub server: &'a str,
    /// What they log.
    pub log: &'a str,
    /// The machine's addresses, at most one of a family.
    pub addresses: &'a [IpAddr],
    /// The folders of the cluster.
    pub layout: &'a Layout,
}

/// Nodes behind the switch reach the outside with the machine's address; without a network there is none.
async fn open_gateway(nodes: &[NodeConfig], outside: &Outside<'_>) -> Result<()> {
    let addresses = outside.addresses.iter().copied();
    let addresses: Vec<IpAddr> = addresses.filter(|one| !one.is_loopback()).collect();
    if addresses.is_empty() {
        return Ok(());
    }
    let mut config = xebec_agent::gateway::Config {
        addresses,
        nodes: Vec::new(),
        native: Vec::new(),
        bpf_dir: outside.layout.gateway_bpf(),
    };
    for node in nodes {
        if let Some(cable) = &node.cable {
            config.nodes.extend(&node.ips);
            config
                .native
                .extend(node.pod_cidrs.iter().chain(&cable.ranges));
        }
    }
    xebec_agent::gateway::open(&config).await
}

async fn end(processes: Vec<Process>, order: Order) {
    let ends = processes.into_iter().map(|process| process.end(order));
    for outcome in futures::future::join_all(ends).await {
        if let Err(error) = outcome {
            warn!(
                error = format!("{error:#}"),
                "a node did not end as it should"
            );
        }
    }
}

/// Takes away what is left of a cluster that was killed.
pub async fn remains(nodes: &[NodeConfig], log: &str) -> Result<()> {
    match nodes {
        [only] if only.cable.is_none() => teardown::remains(only).await,
        _ if nodes.iter().any(|node| node.cable.is_none()) => {
            bail!("the state file names nodes that can't run together")
        }
        _ => {
            // A namespace that a reboot took is needed to take the records of its pods away.
            switch::ensure(nodes).await?;
            let ends = nodes.iter().map(|node| process::remains(node, log));
            let outcome: Result<Vec<()>> =
                futures::future::join_all(ends).await.into_iter().collect();
            outcome?;
            clean(nodes).await
        }
    }
}

/// Removes what nodes with processes of their own leave, now that these have ended.
async fn clean(nodes: &[NodeConfig]) -> Result<()> {
    nodes.iter().try_for_each(teardown::cgroups)?;
    switch::remove(nodes).await
}
