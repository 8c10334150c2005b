//! A cluster for a benchmark: the tests' harness, taken down on interrupts too, with a client of its API.

use std::path::PathBuf;
use std::process::Command;

use anyhow::{Context, Result};
use kube::config::{KubeConfigOptions, Kubeconfig};
use xebec_tests::Cluster;

use crate::cleanup::OnInterrupt;

/// A running cluster in folders of its own.
pub struct BenchCluster {
    // Dropped in this order: the cluster first, while an interrupt would still clean up.
    cluster: Cluster,
    _interrupt: OnInterrupt,
}

impl BenchCluster {
    /// Starts one and waits until it is Ready.
    pub fn up(name: &str, args: &[&str]) -> Result<Self> {
        let name = format!("bench-{name}");
        let interrupt = OnInterrupt::run(take_down(&name));
        Ok(Self {
            cluster: Cluster::up(&name, args)?,
            _interrupt: interrupt,
        })
    }

    /// How to reach its API as administrator.
    pub async fn config(&self) -> Result<kube::Config> {
        let path = self.cluster.kubeconfig();
        let kubeconfig = Kubeconfig::read_from(&path)
            .with_context(|| format!("could not read {}", path.display()))?;
        kube::Config::from_custom_kubeconfig(kubeconfig, &KubeConfigOptions::default())
            .await
            .with_context(|| format!("{} is of no use", path.display()))
    }

    /// A client of its API as administrator.
    pub async fn client(&self) -> Result<kube::Client> {
        kube::Client::try_from(self.config().await?).context("could not make a client")
    }
}

impl std::ops::Deref for BenchCluster {
    type Target = Cluster;
    fn deref(&self) -> &Cluster {
        &self.cluster
    }
}

impl std::ops::DerefMut for BenchCluster {
    fn deref_mut(&mut self) -> &mut Cluster {
        &mut self.cluster
    }
}

/// `xebec down` for a cluster of this name, and the end of its folder.
fn take_down(name: &str) -> Command {
    let dir: PathBuf = Cluster::dir_of(name);
    let mut command = Command::new("sh");
    command
        .args(["-c", "\"$XEBEC_BIN\" down; rm -rf \"$BENCH_DIR\""])
        .env("XEBEC_BIN", xebec_tests::xebec_bin())
        .env("XEBEC_DATA_DIR", dir.join("data"))
        .env("XEBEC_RUN_DIR", dir.join("run"))
        .env("BENCH_DIR", dir);
    command
}
