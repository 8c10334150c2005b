//! The pods' side of the dataplane: policy and hooks of each pod's device.

use std::net::IpAddr;
use std::time::Duration;

use anyhow::{Context, Result};
use tokio::sync::{Mutex, watch};
use xebec_policy::names::Names;
use xebec_policy::rule::Name;

use crate::link::Wires;
use crate::loader::Loaded;
use crate::maps::PolicyMaps;
use crate::policy::watch::Shared;

/// How long a new pod may wait until the API has told of it.
const PATIENCE: Duration = Duration::from_secs(20);

/// Whether the API must know a pod before it is connected.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Known {
    /// It must: without labels there is no telling which policies hold.
    Must,
    /// A pod that runs already goes on under the rules that it had.
    IfPresent,
}

/// Policy, and the programs that enforce it.
pub struct Dataplane {
    /// What the API says.
    pub engine: Shared<PolicyMaps>,
    /// The programs.
    pub programs: Mutex<Loaded>,
    /// True once all of the API's state is known; sent again with every change.
    pub synced: watch::Receiver<bool>,
    /// What the node's pods are called in flows.
    pub names: Names,
}

impl Dataplane {
    /// Puts a pod under its policies, then attaches the hooks. Until both have succeeded the pod must not run.
    pub async fn connect(
        &self,
        pod: &Name,
        addresses: &[IpAddr],
        wires: Wires,
        device: &str,
        known: Known,
    ) -> Result<()> {
        // A sandbox that is no pod of the cluster has no name and no policies.
        if known == Known::Must && !pod.1.is_empty() {
            let mut synced = self.synced.clone();
            let wait = async {
                loop {
                    let ready = *synced.borrow_and_update();
                    if ready && self.engine.lock().await.knows(pod) {
                        return Ok::<(), anyhow::Error>(());
                    }
                    synced.changed().await.context("the agent is stopping")?;
                }
            };
            tokio::time::timeout(PATIENCE, wait).await.with_context(|| {
                format!("the API has not told of the pod {}/{} within {PATIENCE:?}, so its policies are not known", pod.0, pod.1)
            })??;
        }
        let mut engine = self.engine.lock().await;
        for address in addresses {
            engine.connect(pod, *address, wires.ifindex, wires.mac)?;
        }
        drop(engine);
        self.programs.lock().await.attach_pod(device)
    }

    /// Forgets a pod whose device is gone.
    pub async fn disconnect(&self, addresses: &[IpAddr], device: &str) -> Result<()> {
        let mut engine = self.engine.lock().await;
        for address in addresses {
            engine.disconnect(*address)?;
        }
        drop(engine);
        self.programs.lock().await.detach_pod(device)
    }
}
