//! A node with Xebec's agent, an API with the cluster and the policies of [`list`], and as many pods of the node as are
//! asked for, each connected by the agent as every pod is.

use std::net::{IpAddr, Ipv4Addr};
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use serde_json::{Value, json};
use xebec_tests::eventually;

use super::list::{self, Policy};
use super::pods::{self, Seen};
use crate::services::control::{self, Written};
use crate::services::{NAMESPACE, Network, Part, XebecStage, agent};

/// How long all policies may take to come into the kernel.
const SETTLING: Duration = Duration::from_secs(120);

/// The node and its pods.
pub struct Rig {
    // Dropped in this order: the pods before the agent's node.
    pods: Part,
    /// The rest.
    pub stage: XebecStage,
    policies: usize,
}

impl Rig {
    /// A node with so many pods under policies, and one under none that asks them; and what is there before the agent is.
    pub fn new(name: &str, pods: usize, first: &[Policy]) -> Result<Self> {
        let mut stage = XebecStage::new(name, 0, 10)?;
        let mut objects = list::cluster(pods);
        objects.extend(first.iter().map(Policy::object));
        stage
            .control
            .ask::<usize>(&control::Order::Make { objects })?;
        stage.start_agent(false)?;
        stage.wait_for_agent()?;
        let cpu = crate::traffic::client_cpu()?.to_string();
        let words = ["--cpu", &cpu, "pods", "--count", &pods.to_string()];
        let mut part = Part::start(Network::Own, false, &words)?;
        let spaces: Vec<PathBuf> = part.hear()?;
        ensure!(spaces.len() == pods + 1, "there are {} pods", spaces.len());
        stage.connect(&spaces[0], (NAMESPACE, agent::POD))?;
        let mut addresses = Vec::new();
        for (number, space) in spaces.iter().skip(1).enumerate() {
            let name = list::local(number);
            let address = stage
                .connect(space, (list::NAMESPACE, &name))
                .with_context(|| format!("could not connect the pod {name}"))?;
            addresses.push(v4(address)?);
        }
        part.ask::<usize>(&pods::Order::Pods { addresses })?;
        stage.wait_for_services()?;
        Ok(Self {
            pods: part,
            stage,
            policies: first.len(),
        })
    }

    /// Writes policies, and waits until all that there are are in force.
    pub fn add(&mut self, policies: &[Policy]) -> Result<()> {
        let objects = policies.iter().map(Policy::object).collect();
        self.stage
            .control
            .ask::<usize>(&control::Order::Make { objects })?;
        self.policies += policies.len();
        self.settle()
    }

    /// Waits until all policies are in force.
    pub fn settle(&self) -> Result<()> {
        eventually("all policies in the kernel", SETTLING, || {
            let rows = self.stage.table("policies")?;
            if let Some(row) = rows.iter().find(|row| row["state"] != "in force") {
                bail!("a policy does not fit: {row}");
            }
            Ok(rows.len() >= self.policies)
        })
    }

    /// Opens one port of all pods and closes the other, by one write of a policy that is for all pods of the namespace or,
    /// `by_label`, for those with a label that all have; that write, and what was seen of it.
    pub fn switch(&mut self, open: usize, by_label: bool) -> Result<(Written, Seen)> {
        self.pods.tell(&pods::Order::Watch {
            open,
            seconds: 30.0,
        })?;
        self.pods.hear::<Value>()?;
        let mut object = list::switch(pods::PORTS[open]).object();
        // It is merged into what was there.
        let labelled = by_label.then(|| json!([{"key": "app", "operator": "Exists"}]));
        object["spec"]["podSelector"] = json!({"matchExpressions": labelled});
        let written = self
            .stage
            .control
            .ask::<Written>(&control::Order::Policy { object })?;
        Ok((written, self.pods.hear::<Seen>()?))
    }

    /// Ends the pods and the agent.
    pub fn end(mut self) -> Result<()> {
        drop(self.pods);
        self.stage.stop_agent()
    }
}

/// An address of IPv4.
pub fn v4(address: IpAddr) -> Result<Ipv4Addr> {
    match address {
        IpAddr::V4(address) => Ok(address),
        IpAddr::V6(address) => bail!("the agent gave a pod {address} first"),
    }
}
