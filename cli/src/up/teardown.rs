//! Taking a node down so that nothing is left: no process, mount, namespace, route or device.

use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result};
use tokio_util::sync::CancellationToken;
use tracing::warn;
use xebec_cri_api::v1;

use super::node::{NodeConfig, Running};
use crate::paths::{Layout, NodeLayout};

/// The folder of all our cgroups in each hierarchy.
pub const CGROUPS: &str = "xebec";

/// Stops the kubelet, removes every pod sandbox through CRI, then ends the rest and cleans up.
pub async fn node(mut running: Running, config: &NodeConfig) {
    running.end_kubelet().await;
    // They may be starting still, and pods of a killed predecessor be known to them alone.
    sockets(&config.layout).await;
    if let Err(error) = remove_sandboxes(&config.layout).await {
        warn!(error = format!("{error:#}"), "could not remove all pods");
    }
    running.rest.cancel();
    while running.tasks.join_next().await.is_some() {}
    if let Err(error) = clean(config).await {
        warn!(
            error = format!("{error:#}"),
            "could not clean up all of the node"
        );
    }
}

/// After a cluster that was killed: starts runtime and agent alone, which remove its pods.
pub async fn remains(config: &NodeConfig) -> Result<()> {
    let layout = &config.layout;
    let rest = CancellationToken::new();
    let (agent, cri) = (config.agent(), config.runtime()?);
    let parts = [
        tokio::spawn(xebec_agent::run_detached(agent, rest.clone())),
        tokio::spawn(xebec_cri::run(cri, rest.clone())),
    ];
    sockets(layout).await;
    let removed = remove_sandboxes(layout).await;
    rest.cancel();
    for part in parts {
        part.await.context("a part panicked")??;
    }
    removed?;
    clean(config).await
}

/// Waits until runtime and agent answer, which without an answer is told by what is asked of them next.
async fn sockets(layout: &NodeLayout) {
    for _ in 0..250 {
        if layout.cri_socket().exists()
            && layout.agent_socket().exists()
            && crate::image::connect(&layout.cri_socket()).await.is_ok()
        {
            break;
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

/// Stops and removes every sandbox that the runtime has.
pub async fn remove_sandboxes(layout: &NodeLayout) -> Result<()> {
    let channel = crate::image::connect(&layout.cri_socket()).await?;
    let mut runtime = v1::runtime_service_client::RuntimeServiceClient::new(channel);
    let list = runtime
        .list_pod_sandbox(v1::ListPodSandboxRequest::default())
        .await
        .context("could not list pod sandboxes")?
        .into_inner();
    let removals = list.items.into_iter().map(|sandbox| {
        let mut runtime = runtime.clone();
        async move {
            let id = sandbox.id;
            let containers = v1::ListContainersRequest {
                filter: Some(v1::ContainerFilter {
                    pod_sandbox_id: id.clone(),
                    ..Default::default()
                }),
            };
            // Two seconds to end by themselves; a cluster that is taken down is not drained.
            for container in runtime
                .list_containers(containers)
                .await?
                .into_inner()
                .containers
            {
                let stop = v1::StopContainerRequest {
                    container_id: container.id,
                    timeout: 2,
                };
                runtime.stop_container(stop).await?;
            }
            runtime
                .stop_pod_sandbox(v1::StopPodSandboxRequest {
                    pod_sandbox_id: id.clone(),
                })
                .await?;
            runtime
                .remove_pod_sandbox(v1::RemovePodSandboxRequest { pod_sandbox_id: id })
                .await?;
            Ok::<(), tonic::Status>(())
        }
    });
    let all = futures::future::join_all(removals);
    let results = tokio::time::timeout(Duration::from_secs(40), all)
        .await
        .context("pods did not end within 40 s")?;
    results
        .into_iter()
        .collect::<Result<Vec<()>, _>>()
        .map(drop)
        .context("could not remove a pod sandbox")
}

/// Removes what agent and runtime made outside their folders; safe to repeat.
async fn clean(config: &NodeConfig) -> Result<()> {
    xebec_agent::cleanup(&config.layout.agent_state())
        .await
        .context("could not remove the pods' devices")?;
    cgroups(config)
}

/// Removes a node's cgroups, of which no process may be a member any more.
pub fn cgroups(config: &NodeConfig) -> Result<()> {
    remove_cgroups(&config.pod_cgroup);
    // In v1 each controller has a hierarchy of its own.
    let mounts =
        std::fs::read_to_string("/proc/self/mounts").context("could not read /proc/self/mounts")?;
    for line in mounts.lines() {
        let mut words = line.split(' ').skip(1);
        if let (Some(point), Some("cgroup" | "cgroup2")) = (words.next(), words.next()) {
            let point = Path::new(point);
            remove_cgroups(&point.join(config.cgroup_parent.trim_start_matches('/')));
            // Several nodes share the folder above theirs: the last one takes it away.
            let _ = std::fs::remove_dir(point.join(CGROUPS));
        }
    }
    Ok(())
}

/// Removes a tree of cgroups from the leaves on; one that is in use refuses, and then it is not ours alone.
fn remove_cgroups(dir: &Path) {
    for entry in std::fs::read_dir(dir).into_iter().flatten().flatten() {
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            remove_cgroups(&entry.path());
        }
    }
    let _ = std::fs::remove_dir(dir);
}

/// Removes the run folder with whatever is still mounted in it.
pub fn run_dir(layout: &Layout) -> Result<()> {
    let mounts =
        std::fs::read_to_string("/proc/self/mounts").context("could not read /proc/self/mounts")?;
    let prefix = format!("{}/", layout.run.display());
    // Later mounts lie on earlier ones: undo them from the last to the first.
    for line in mounts.lines().rev() {
        let mut words = line.split(' ').skip(1);
        let (Some(point), Some(kind)) = (words.next(), words.next()) else {
            continue;
        };
        if !point.starts_with(&prefix) {
            continue;
        }
        // Links end with their filesystem; what kernels without such links have does not.
        if kind == "bpf" {
            if let Err(error) = xebec_agent::loader::detach(Path::new(point)) {
                warn!(
                    point,
                    error = format!("{error:#}"),
                    "could not detach programs"
                );
            }
        }
        if let Err(error) = nix::mount::umount2(point, nix::mount::MntFlags::MNT_DETACH) {
            warn!(point, %error, "could not unmount");
        }
    }
    match std::fs::remove_dir_all(&layout.run) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            Err(error).with_context(|| format!("could not remove {}", layout.run.display()))
        }
        _ => Ok(()),
    }
}
