//! The agent's programs, maps and compiler in this process, without an API and without devices: what policies and pods
//! are there is said by calls, and what the kernel has then is what it would have of an agent.

use std::net::IpAddr;
use std::path::Path;

use anyhow::{Context, Result, bail};
use serde_json::{Value, json};
use xebec_agent::loader::{Loaded, Sizes};
use xebec_agent::maps::PolicyMaps;
use xebec_policy::engine::Engine;
use xebec_policy::names::Names;
use xebec_policy::rule::Source;
use xebec_policy::selector::Labels;

/// The namespace of all pods.
const NAMESPACE: &str = "n";
/// The loopback device, which stands for pods' devices.
pub const DEVICE: u32 = 1;
/// The hardware address of pods.
const MAC: [u8; 6] = [2; 6];

/// A node.
pub struct Node {
    /// The programs.
    pub loaded: Loaded,
    engine: Engine<PolicyMaps>,
}

impl Node {
    /// One without pods, whose table of flows has so many entries. A BPF filesystem is mounted at `dir`.
    pub fn new(dir: &Path, flows: u32) -> Result<Self> {
        let sizes = Sizes {
            flows,
            ..Sizes::default()
        };
        let mut loaded = Loaded::with_sizes(dir, sizes)?;
        let maps = loaded.maps()?;
        let mut engine = Engine::new(maps.policy, Names::default(), "bench", 1);
        engine.set_namespace(NAMESPACE, Some(Labels::new()));
        Ok(Self { loaded, engine })
    }

    /// A pod with this label and address; of this node if it is `here`.
    pub fn add_pod(
        &mut self,
        name: &str,
        (key, value): (&str, &str),
        address: IpAddr,
        here: bool,
    ) -> Result<()> {
        let pod = json!({
            "metadata": {"namespace": NAMESPACE, "name": name, "labels": {key: value}},
            "spec": {"nodeName": if here { "bench" } else { "other" }, "containers": []},
            "status": {"phase": "Running", "podIPs": [{"ip": address}]},
        });
        let pod = serde_json::from_value(pod).context("the pod is malformed")?;
        self.engine.set_pod(&pod);
        if here {
            let name = (NAMESPACE.to_owned(), name.to_owned());
            self.engine.connect(&name, address, DEVICE, MAC)?;
        }
        Ok(())
    }

    /// A NetworkPolicy of this name and content.
    pub fn add_policy(&mut self, name: &str, spec: &Value) {
        let policy = json!({
            "metadata": {"namespace": NAMESPACE, "name": name},
            "spec": spec,
        });
        self.engine.set_object(Source::NetworkPolicy, &policy);
    }

    /// Brings the kernel in step, and removes what is not needed any more; fails where something does not fit.
    pub fn settle(&mut self) -> Result<()> {
        self.engine.refresh()?;
        let retired = self.engine.retired();
        self.engine.sweep(&retired)?;
        if let Some(problem) = self.engine.problems().next() {
            bail!("{}", problem.why);
        }
        if let Some((policy, errors)) = self.engine.errors().iter().next() {
            bail!("{policy}: {}", errors.join("; "));
        }
        Ok(())
    }
}
