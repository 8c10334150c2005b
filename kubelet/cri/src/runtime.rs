//! The runtime as a whole: what it holds, how it starts, how it watches shims.

use std::collections::BTreeSet;
use std::sync::Arc;

use anyhow::Context;
use tokio::sync::{Mutex, broadcast};
use tokio_util::sync::CancellationToken;
use xebec_cri_api::v1;
use xebec_shim::protocol::{ExitRecord, Reply, Request};

use crate::Config;
use crate::cni::Cni;
use crate::images::ImageStore;
use crate::records::{Container, Phase, Registry, Sandbox};
use crate::shim_client::{Frame, ShimClient};
use crate::streaming::tokens::Tokens;

/// All state of the server.
pub struct Runtime {
    /// As given.
    pub config: Config,
    /// Sandboxes and containers.
    pub registry: Registry,
    /// Images.
    pub images: ImageStore,
    /// CNI plugins.
    pub cni: Cni,
    /// Container events.
    pub events: broadcast::Sender<v1::ContainerEventResponse>,
    /// Streams asked for and not yet used.
    pub(crate) tokens: Tokens,
    /// Ends watchers and streams.
    pub shutdown: CancellationToken,
    /// Held while a sandbox or container is made or removed, so that names stay unique.
    pub names: Mutex<()>,
}

impl Runtime {
    /// Opens the stores and finds what runs from before.
    pub async fn open(config: Config, shutdown: CancellationToken) -> anyhow::Result<Self> {
        for dir in [
            config.root.join("sandboxes"),
            config.root.join("containers"),
            config.state.join("netns"),
            config.state.join("shim"),
            config.state.join("shm"),
        ] {
            std::fs::create_dir_all(&dir)
                .with_context(|| format!("cannot make {}", dir.display()))?;
        }
        let runtime = Self {
            images: ImageStore::open(&config.root)?,
            cni: Cni {
                bin_dirs: config.cni_bin_dirs.clone(),
                conf_dir: config.cni_conf_dir.clone(),
            },
            registry: Registry::default(),
            events: crate::events::channel(),
            tokens: Tokens::default(),
            shutdown,
            names: Mutex::new(()),
            config,
        };
        runtime.load()?;
        Ok(runtime)
    }

    /// Reads all records; what can't be read is reported and left alone.
    fn load(&self) -> anyhow::Result<()> {
        for (kind, sandbox) in [("sandboxes", true), ("containers", false)] {
            for entry in std::fs::read_dir(self.config.root.join(kind))? {
                let path = entry?.path();
                let Some(id) = path.file_name().and_then(|n| n.to_str()).map(str::to_owned) else {
                    continue;
                };
                let loaded = if sandbox {
                    Sandbox::load(id, path.clone()).map(|s| self.registry.add_sandbox(Arc::new(s)))
                } else {
                    Container::load(id, path.clone())
                        .map(|c| self.registry.add_container(Arc::new(c)))
                };
                if let Err(err) = loaded {
                    // A crash in the midst of its making: nothing can run in it.
                    tracing::warn!("removing half-made {}: {err:#}", path.display());
                    let _ = crate::overlay::unmount(&path.join("rootfs"));
                    let _ = std::fs::remove_dir_all(&path);
                }
            }
        }
        Ok(())
    }

    /// Connects to the shims of all sandboxes that were ready.
    pub async fn recover(self: &Arc<Self>) {
        for sandbox in self.registry.sandboxes() {
            if sandbox.record().ready {
                self.watch(sandbox).await;
            }
        }
        for container in self.registry.containers() {
            let record = container.record();
            let ready = self
                .registry
                .sandbox(&record.sandbox)
                .is_some_and(|s| s.record().ready);
            if record.phase == Phase::Running && !ready {
                self.container_ended(&container, None);
            }
        }
        let in_use = self.chains_in_use();
        let images = self.images.clone();
        let collected = tokio::task::spawn_blocking(move || images.collect(&in_use)).await;
        if let Ok(Err(err)) = collected {
            tracing::warn!("cannot clean up the image store: {err:#}");
        }
    }

    /// The layers that containers are mounted on.
    pub fn chains_in_use(&self) -> BTreeSet<String> {
        self.registry
            .containers()
            .iter()
            .flat_map(|c| c.record().chain)
            .collect()
    }

    /// Follows a shim's events; first takes over its state.
    pub async fn watch(self: &Arc<Self>, sandbox: Arc<Sandbox>) {
        match self.attach_shim(&sandbox).await {
            Ok(client) => {
                let runtime = self.clone();
                tokio::spawn(async move {
                    let end = tokio::select! {
                        end = runtime.follow(&sandbox, client) => end,
                        () = runtime.shutdown.cancelled() => return,
                    };
                    if let Err(err) = end {
                        tracing::warn!("sandbox {}: {err:#}", sandbox.id);
                    }
                    runtime.shim_gone(&sandbox);
                });
            }
            Err(err) => {
                tracing::warn!("sandbox {} has no shim any more: {err:#}", sandbox.id);
                self.shim_gone(&sandbox);
            }
        }
    }

    async fn attach_shim(self: &Arc<Self>, sandbox: &Arc<Sandbox>) -> anyhow::Result<ShimClient> {
        let socket = sandbox.record().socket;
        let mut client = ShimClient::connect(&socket).await?;
        // Events first, then the state: nothing falls between the two.
        client.call(&Request::Events).await?;
        let state = crate::shim_client::call(&socket, &Request::State).await?;
        let Reply::State {
            pid,
            pause_pid,
            containers,
        } = state
        else {
            anyhow::bail!("the shim answers a state request with something else");
        };
        sandbox.update(|r| {
            r.shim_pid = pid;
            r.pause_pid = pause_pid;
        })?;
        for container in self.registry.containers_of(&sandbox.id) {
            let record = container.record();
            match containers.iter().find(|c| c.id == container.id) {
                Some(state) => match &state.exit {
                    Some(exit) if record.phase != Phase::Exited => {
                        self.container_ended(&container, Some(exit.clone()));
                    }
                    Some(_) => {}
                    // Started, and this server's predecessor died before it knew.
                    None if record.phase == Phase::Created && state.pid > 0 => {
                        container.update(|r| {
                            r.phase = Phase::Running;
                            r.pid = state.pid;
                            r.started_at = state.started_at;
                        })?;
                    }
                    None => {}
                },
                None if record.phase == Phase::Running => self.container_ended(&container, None),
                None => {}
            }
        }
        Ok(client)
    }

    async fn follow(&self, sandbox: &Arc<Sandbox>, mut client: ShimClient) -> anyhow::Result<()> {
        while let Some(frame) = client.next().await? {
            if let Frame::Reply(Reply::Exited { id, exit }) = frame
                && let Some(container) = self.registry.container(&id)
            {
                self.container_ended(&container, Some(exit));
                self.publish(&id, sandbox, v1::ContainerEventType::ContainerStoppedEvent);
            }
        }
        Ok(())
    }

    /// Records that a sandbox's shim has ended, and with it all it ran.
    fn shim_gone(&self, sandbox: &Arc<Sandbox>) {
        let was_ready = sandbox.record().ready;
        if let Err(err) = sandbox.update(|r| r.ready = false) {
            tracing::warn!("sandbox {}: {err:#}", sandbox.id);
        }
        for container in self.registry.containers_of(&sandbox.id) {
            if container.record().phase == Phase::Running {
                crate::container::kill_cgroup(&container.record().cgroup);
                self.container_ended(&container, None);
                self.publish(
                    &container.id,
                    sandbox,
                    v1::ContainerEventType::ContainerStoppedEvent,
                );
            }
        }
        if was_ready {
            self.publish(
                &sandbox.id,
                sandbox,
                v1::ContainerEventType::ContainerStoppedEvent,
            );
        }
    }

    /// Records a container's end: from its shim, else from disk, else unknown.
    pub fn container_ended(&self, container: &Container, exit: Option<ExitRecord>) {
        let exit = exit.or_else(|| {
            let text = std::fs::read(container.dir.join("exit.json")).ok()?;
            serde_json::from_slice(&text).ok()
        });
        let updated = container.update(|r| {
            if r.phase == Phase::Exited {
                return;
            }
            r.phase = Phase::Exited;
            r.pid = 0;
            match exit {
                Some(exit) => {
                    r.exit_code = exit.exit_code;
                    r.finished_at = exit.finished_at;
                    r.message = exit.message;
                    r.reason = match (exit.oom_killed, exit.exit_code) {
                        (true, _) => "OOMKilled",
                        (false, 0) => "Completed",
                        _ => "Error",
                    }
                    .to_owned();
                }
                None => {
                    r.exit_code = 255;
                    r.finished_at = xebec_shim::log_file::now_nanos();
                    r.reason = "Unknown".to_owned();
                    r.message = "the pod's supervisor has ended; the exit code is lost".to_owned();
                }
            }
        });
        if let Err(err) = updated {
            tracing::warn!("container {}: {err:#}", container.id);
        }
    }
}
