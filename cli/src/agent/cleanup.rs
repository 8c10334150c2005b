//! `xebec agent cleanup`: the way back. Takes away what the agent leaves running on purpose when it ends.

use anyhow::{Context, Result, bail};
use clap::Args;
use tracing::info;

use super::Place;
use crate::paths::Layout;

/// Where the agent ran.
#[derive(Args)]
pub struct Cleanup {
    #[command(flatten)]
    place: Place,
    /// Stay until told to end, for a DaemonSet that cleans each node once
    #[arg(long)]
    stay: bool,
}

impl Cleanup {
    /// Takes everything away; safe to repeat.
    pub async fn run(self, layout: Layout) -> Result<()> {
        crate::up::require_root()?;
        let stop = crate::up::stop_signal()?;
        let held = crate::up::lock(&layout).context(
            "the agent runs on this node still: delete its DaemonSet first, and wait for its pods to end",
        )?;
        if layout.up_state().exists() {
            bail!("a cluster of `xebec up` ran here: take it away with `xebec down`");
        }
        let name = self.place.name()?;
        let node = layout.node(&name);
        // New pods go to the plugin that is to come; then the hooks go, then what they were for.
        self.place.cni.remove()?;
        xebec_agent::remove::pins(&self.place.bpf_dir())?;
        xebec_agent::cleanup(&node.agent_state())
            .await
            .context("could not remove the pods' devices")?;
        let routes = xebec_agent::remove::routes().await?;
        for dir in [&node.run, &node.data] {
            match std::fs::remove_dir_all(dir) {
                Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                    return Err(error)
                        .with_context(|| format!("could not remove {}", dir.display()));
                }
                _ => {}
            }
        }
        drop(held);
        info!(node = name, routes, "nothing of the agent is left");
        println!(
            "{name}: links, maps, {routes} routes, pods' devices and the CNI plugin are removed"
        );
        if self.stay {
            stop.await;
        }
        Ok(())
    }
}
