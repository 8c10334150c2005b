//! Pod sandboxes: namespaces, network, shim; made, stopped and removed.

use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, bail, ensure};
use nix::mount::{MsFlags, mount};
use serde_json::json;
use xebec_cri_api::v1;
use xebec_shim::log_file::now_nanos;
use xebec_shim::protocol::{Request, SandboxSpec};

use crate::cni::{Attachment, Pod};
use crate::images::store::random_hex;
use crate::records::{Sandbox, SandboxRecord};
use crate::runtime::Runtime;
use crate::{cni, netns, overlay, shim_client};

/// A sandbox's parts outside its record, by path.
struct Paths {
    dir: PathBuf,
    netns: PathBuf,
    socket: PathBuf,
    shm: PathBuf,
}

impl Runtime {
    fn sandbox_paths(&self, id: &str) -> Paths {
        Paths {
            dir: self.config.root.join("sandboxes").join(id),
            netns: self.config.state.join("netns").join(id),
            socket: self.config.state.join("shim").join(format!("{id}.sock")),
            shm: self.config.state.join("shm").join(id),
        }
    }

    /// Where a sandbox's `/dev/shm` is mounted.
    pub fn shm_path(&self, id: &str) -> PathBuf {
        self.sandbox_paths(id).shm
    }

    fn unified_cgroup(&self, id: &str) -> Option<PathBuf> {
        self.config.unified_cgroup.as_ref().map(|dir| dir.join(id))
    }

    /// Makes a sandbox and starts its shim. Returns when the pod has its network.
    pub async fn run_sandbox(
        self: &Arc<Self>,
        config: v1::PodSandboxConfig,
        handler: String,
    ) -> anyhow::Result<Arc<Sandbox>> {
        ensure!(
            handler.is_empty() || handler == "xebec",
            "no runtime for {handler:?} is configured"
        );
        let metadata = config
            .metadata
            .clone()
            .context("the sandbox config has no metadata")?;
        let id = {
            let _names = self.names.lock().await;
            let taken = self
                .registry
                .sandboxes()
                .into_iter()
                .find(|s| s.config.metadata.as_ref() == Some(&metadata));
            if let Some(other) = taken {
                bail!(
                    "sandbox name \"{}_{}_{}_{}\" is reserved for {:?}",
                    metadata.name,
                    metadata.namespace,
                    metadata.uid,
                    metadata.attempt,
                    other.id
                );
            }
            let id = random_hex(32)?;
            let paths = self.sandbox_paths(&id);
            std::fs::create_dir_all(&paths.dir)?;
            // From here on the name is taken; the sandbox is not ready yet.
            let sandbox = Sandbox::create(
                id.clone(),
                config.clone(),
                paths.dir.clone(),
                SandboxRecord {
                    created_at: now_nanos(),
                    socket: paths.socket.clone(),
                    cgroup_parent: cgroup_parent(&config, &self.config.cgroup_parent),
                    runtime_handler: handler,
                    ..SandboxRecord::default()
                },
            )?;
            self.registry.add_sandbox(Arc::new(sandbox));
            id
        };
        let sandbox = self
            .registry
            .sandbox(&id)
            .context("the new sandbox is gone already")?;
        match self.set_up(&sandbox).await {
            Ok(()) => {
                self.watch(sandbox.clone()).await;
                ensure!(
                    sandbox.record().ready,
                    "the pod's shim has ended right after its start"
                );
                Ok(sandbox)
            }
            Err(err) => {
                if let Err(undo) = self.tear_down(&sandbox).await {
                    tracing::warn!("sandbox {id}: cannot undo its start: {undo:#}");
                }
                self.registry.drop_sandbox(&id);
                let _ = std::fs::remove_dir_all(&sandbox.dir);
                Err(err)
            }
        }
    }

    async fn set_up(&self, sandbox: &Sandbox) -> anyhow::Result<()> {
        let id = &sandbox.id;
        let paths = self.sandbox_paths(id);
        let options = namespace_options(&sandbox.config);
        let host_network = options.network() == v1::NamespaceMode::Node;
        let host_ipc = options.ipc() == v1::NamespaceMode::Node;
        if !host_network {
            netns::create(&paths.netns)?;
            sandbox.update(|r| r.netns = Some(paths.netns.clone()))?;
            let pod = self.cni_pod(sandbox);
            let failed = || format!("failed to setup network for sandbox {id:?}");
            let network = cni::load(&self.config.cni_conf_dir).with_context(failed)?;
            // Noted before the plugins run: who finds a start that was cut detaches the pod.
            let begun = Attachment::begun(network.clone());
            sandbox.update(|r| r.attachment = Some(begun))?;
            let added = self.cni.add(&pod, network).await.with_context(failed);
            sandbox.update(|r| r.attachment = added.as_ref().ok().cloned())?;
            added?;
        }
        write_files(sandbox, &paths.dir)?;
        if !host_ipc {
            std::fs::create_dir_all(&paths.shm)?;
            mount(
                Some("shm"),
                &paths.shm,
                Some("tmpfs"),
                MsFlags::MS_NOEXEC | MsFlags::MS_NOSUID | MsFlags::MS_NODEV,
                Some("mode=1777,size=65536k"),
            )
            .context("cannot mount the pod's shared memory")?;
        }
        let spec = SandboxSpec {
            id: id.clone(),
            socket: path_string(&paths.socket)?,
            log: path_string(&paths.dir.join("shim.log"))?,
            hostname: (!host_network && !sandbox.config.hostname.is_empty())
                .then(|| sandbox.config.hostname.clone()),
            host_ipc,
            shared_pid: options.pid() == v1::NamespaceMode::Pod,
            unified_cgroup: match self.unified_cgroup(id) {
                Some(dir) => Some(path_string(&dir)?),
                None => None,
            },
        };
        shim_client::start(
            &self.config.shim_command,
            &spec,
            &paths.dir.join("shim.json"),
        )
        .await?;
        sandbox.update(|r| r.ready = true)
    }

    fn cni_pod(&self, sandbox: &Sandbox) -> Pod {
        let metadata = sandbox.config.metadata.clone().unwrap_or_default();
        Pod {
            id: sandbox.id.clone(),
            netns: sandbox
                .record()
                .netns
                .map(|p| p.to_string_lossy().into_owned())
                .unwrap_or_default(),
            namespace: metadata.namespace,
            name: metadata.name,
            uid: metadata.uid,
            port_mappings: sandbox
                .config
                .port_mappings
                .iter()
                .filter(|m| m.host_port > 0)
                .map(|m| {
                    let protocol = match m.protocol() {
                        v1::Protocol::Tcp => "tcp",
                        v1::Protocol::Udp => "udp",
                        v1::Protocol::Sctp => "sctp",
                    };
                    json!({"hostPort": m.host_port, "containerPort": m.container_port, "protocol": protocol, "hostIP": m.host_ip})
                })
                .collect(),
        }
    }

    /// Kills a sandbox's containers and takes down its network. Safe to repeat.
    pub async fn stop_sandbox(&self, sandbox: &Arc<Sandbox>) -> anyhow::Result<()> {
        for container in self.registry.containers_of(&sandbox.id) {
            self.stop_container(&container, Duration::ZERO).await?;
        }
        let was_ready = sandbox.record().ready;
        self.tear_down(sandbox).await?;
        if was_ready {
            self.publish(
                &sandbox.id,
                sandbox,
                v1::ContainerEventType::ContainerStoppedEvent,
            );
        }
        Ok(())
    }

    /// Stops a sandbox and removes all of it. Safe to repeat.
    pub async fn remove_sandbox(&self, sandbox: &Arc<Sandbox>) -> anyhow::Result<()> {
        self.stop_sandbox(sandbox).await?;
        for container in self.registry.containers_of(&sandbox.id) {
            self.remove_container(&container).await?;
        }
        let _names = self.names.lock().await;
        crate::container::remove_cgroup(&sandbox.record().cgroup_parent);
        if sandbox.dir.exists() {
            std::fs::remove_dir_all(&sandbox.dir)
                .with_context(|| format!("cannot remove {}", sandbox.dir.display()))?;
        }
        self.registry.drop_sandbox(&sandbox.id);
        self.publish(
            &sandbox.id,
            sandbox,
            v1::ContainerEventType::ContainerDeletedEvent,
        );
        Ok(())
    }

    /// Ends the shim and removes network, namespaces and mounts.
    async fn tear_down(&self, sandbox: &Sandbox) -> anyhow::Result<()> {
        let paths = self.sandbox_paths(&sandbox.id);
        let record = sandbox.record();
        sandbox.update(|r| r.ready = false)?;
        // The network first: no packet should find a half-gone pod.
        if let Some(attachment) = &record.attachment {
            self.detach(sandbox, attachment).await?;
        }
        if paths.socket.exists() {
            self.end_shim(&paths.socket).await;
        }
        netns::remove(&paths.netns)?;
        overlay::unmount(&paths.shm)?;
        match std::fs::remove_dir(&paths.shm) {
            Err(err) if err.kind() != std::io::ErrorKind::NotFound => {
                return Err(err).with_context(|| format!("cannot remove {}", paths.shm.display()));
            }
            _ => {}
        }
        if let Some(dir) = self.unified_cgroup(&sandbox.id) {
            // The shim does this itself unless it was killed.
            let _ = std::fs::remove_dir(dir);
        }
        sandbox.update(|r| {
            r.netns = None;
            r.attachment = None;
        })
    }

    async fn detach(&self, sandbox: &Sandbox, attachment: &Attachment) -> anyhow::Result<()> {
        let mut pod = self.cni_pod(sandbox);
        // After a reboot the namespace is gone; plugins then get an empty path.
        if !Path::new(&pod.netns).exists() {
            pod.netns.clear();
        }
        self.cni
            .del(&pod, attachment)
            .await
            .with_context(|| format!("failed to destroy network for sandbox {:?}", sandbox.id))
    }

    /// Asks a shim to end, and waits until it has.
    async fn end_shim(&self, socket: &Path) {
        let wait = async {
            let mut client = shim_client::ShimClient::connect(socket).await?;
            // Who listens, not who is in the record: a start that was cut has noted nobody.
            let process = shim_client::Process::open(client.peer()?)?;
            client.call(&Request::Shutdown).await?;
            process.ended().await
        };
        match tokio::time::timeout(Duration::from_secs(10), wait).await {
            Ok(Err(err)) => tracing::debug!("a shim has ended before: {err:#}"),
            Ok(Ok(())) => {}
            Err(_) => tracing::warn!("the shim at {} takes long to end", socket.display()),
        }
        let _ = std::fs::remove_file(socket);
    }
}

/// The pod's namespace choices.
pub fn namespace_options(config: &v1::PodSandboxConfig) -> v1::NamespaceOption {
    config
        .linux
        .as_ref()
        .and_then(|l| l.security_context.as_ref())
        .and_then(|s| s.namespace_options.clone())
        .unwrap_or_default()
}

fn cgroup_parent(config: &v1::PodSandboxConfig, default: &str) -> String {
    let asked = config
        .linux
        .as_ref()
        .map(|l| l.cgroup_parent.clone())
        .unwrap_or_default();
    let parent = if asked.is_empty() {
        let uid = config
            .metadata
            .as_ref()
            .map(|m| m.uid.clone())
            .unwrap_or_default();
        format!("{}/pod{uid}", default.trim_end_matches('/'))
    } else {
        asked
    };
    format!("/{}", parent.trim_matches('/'))
}

/// The files that every container of the pod sees unless it mounts its own.
fn write_files(sandbox: &Sandbox, dir: &Path) -> anyhow::Result<()> {
    let resolv = match &sandbox.config.dns_config {
        Some(dns) => {
            let mut text = String::new();
            if !dns.searches.is_empty() {
                text.push_str(&format!("search {}\n", dns.searches.join(" ")));
            }
            for server in &dns.servers {
                text.push_str(&format!("nameserver {server}\n"));
            }
            if !dns.options.is_empty() {
                text.push_str(&format!("options {}\n", dns.options.join(" ")));
            }
            text
        }
        None => std::fs::read_to_string("/etc/resolv.conf").unwrap_or_default(),
    };
    let hostname = if sandbox.config.hostname.is_empty() {
        nix::unistd::gethostname()
            .map(|n| n.to_string_lossy().into_owned())
            .unwrap_or_default()
    } else {
        sandbox.config.hostname.clone()
    };
    let hosts = std::fs::read_to_string("/etc/hosts").unwrap_or_default();
    for (name, text) in [
        ("resolv.conf", resolv),
        ("hostname", format!("{hostname}\n")),
        ("hosts", hosts),
    ] {
        let path = dir.join(name);
        std::fs::write(&path, text).with_context(|| format!("cannot write {}", path.display()))?;
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o644))?;
    }
    Ok(())
}

fn path_string(path: &Path) -> anyhow::Result<String> {
    Ok(path
        .to_str()
        .with_context(|| format!("{} is not valid UTF-8", path.display()))?
        .to_owned())
}
