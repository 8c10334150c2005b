//! `xebec down`: stops the running cluster, or cleans up after one that was killed.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use clap::Args;

use crate::paths::Layout;
use crate::up::state::UpState;
use crate::up::{nodes, teardown};

/// How `down` stops.
#[derive(Args)]
pub struct Down {
    /// Seconds to wait for the cluster's process to end
    #[arg(long, default_value_t = 90)]
    timeout: u64,
    /// Remove the cluster's data too: objects, certificates, images
    #[arg(long)]
    purge: bool,
}

impl Down {
    /// Leaves no process, mount, namespace, route or device behind.
    pub async fn run(self, layout: Layout, log: &str) -> Result<()> {
        crate::up::require_root()?;
        match UpState::read(&layout)? {
            Some(state) if state.is_running() => {
                self.stop(&state).await?;
                // Started with --keep, it left its pods; `down` means them too.
                if UpState::read(&layout)?.is_some() {
                    clean_up_after(&layout, &state, log).await?;
                }
                println!("stopped");
            }
            Some(state) => {
                clean_up_after(&layout, &state, log).await?;
                println!("cleaned up after a cluster that had ended without `down`");
            }
            None => println!("no cluster runs here"),
        }
        if self.purge {
            match std::fs::remove_dir_all(&layout.data) {
                Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                    return Err(error)
                        .with_context(|| format!("could not remove {}", layout.data.display()));
                }
                _ => println!("removed {}", layout.data.display()),
            }
        }
        Ok(())
    }

    async fn stop(&self, state: &UpState) -> Result<()> {
        let pid = nix::unistd::Pid::from_raw(state.pid);
        nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGTERM)
            .with_context(|| format!("could not signal process {pid}"))?;
        let deadline = Instant::now() + Duration::from_secs(self.timeout);
        while state.is_running() {
            if Instant::now() > deadline {
                bail!(
                    "process {pid} did not end within {} s; its log says why",
                    self.timeout
                );
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        Ok(())
    }
}

/// The process is gone but its pods and programs are not: starts the parts that can remove them, and removes them.
async fn clean_up_after(layout: &Layout, state: &UpState, log: &str) -> Result<()> {
    nodes::remains(&state.nodes, log)
        .await
        .with_context(|| format!("could not clean up after {}", state.node_names()))?;
    teardown::run_dir(layout)
}
