//! Containers: made, started, stopped, removed; and processes run in them.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, bail, ensure};
use serde_json::Value;
use xebec_cri_api::v1;
use xebec_shim::log_file::now_nanos;
use xebec_shim::protocol::{ExecRequest, FrameKind, Reply, Request, StartRequest};

use crate::images::ImageRecord;
use crate::images::store::{ExecutionConfig, random_hex};
use crate::records::{Container, ContainerRecord, Phase, Sandbox};
use crate::runtime::Runtime;
use crate::shim_client::{Frame, ShimClient};
use crate::spec::{self, Namespaces, PidNamespace};
use crate::users::{self, Identity};
use crate::{overlay, shim_client, status};

/// Output of a synchronous exec beyond which the rest is thrown away.
const EXEC_SYNC_LIMIT: usize = 16 << 20;

/// What a synchronous exec gave.
pub struct ExecOutput {
    /// Standard output.
    pub stdout: Vec<u8>,
    /// Standard error.
    pub stderr: Vec<u8>,
    /// Exit code.
    pub exit_code: i32,
}

/// Why a synchronous exec gave nothing.
pub enum ExecError {
    /// The time was up, and the process was killed.
    Timeout,
    /// Anything else.
    Other(anyhow::Error),
}

impl Runtime {
    /// Makes a container: mounts its root and writes its specification.
    pub async fn create_container(
        &self,
        sandbox: &Arc<Sandbox>,
        config: v1::ContainerConfig,
    ) -> anyhow::Result<Arc<Container>> {
        let _names = self.names.lock().await;
        let pod = sandbox.record();
        ensure!(pod.ready, "sandbox {:?} is not running", sandbox.id);
        let metadata = config
            .metadata
            .clone()
            .context("the container config has no metadata")?;
        if let Some(other) = self
            .registry
            .containers_of(&sandbox.id)
            .into_iter()
            .find(|c| c.config.metadata.as_ref() == Some(&metadata))
        {
            bail!(
                "container name \"{}_{}\" of this pod is reserved for {:?}",
                metadata.name,
                metadata.attempt,
                other.id
            );
        }
        ensure!(
            config.cdi_devices.is_empty(),
            "CDI devices are not supported yet"
        );
        let wanted = config
            .image
            .as_ref()
            .map(|i| i.image.clone())
            .unwrap_or_default();
        // Keeps the layers while no record names them as used.
        let images = self.images.clone();
        let _lock = tokio::task::spawn_blocking(move || images.lock_shared()).await??;
        let image = self
            .images
            .find(&wanted)?
            .with_context(|| format!("image {wanted:?} is not on this node; pull it first"))?;
        let settings = self.images.config(&image)?.config;

        let id = random_hex(32)?;
        let dir = self.config.root.join("containers").join(&id);
        let made = self.build_bundle(&id, &dir, sandbox, config, &image, &settings);
        match made {
            Ok(container) => {
                let container = Arc::new(container);
                self.registry.add_container(container.clone());
                self.publish(&id, sandbox, v1::ContainerEventType::ContainerCreatedEvent);
                Ok(container)
            }
            Err(err) => {
                let _ = overlay::unmount(&dir.join("rootfs"));
                let _ = std::fs::remove_dir_all(&dir);
                Err(err)
            }
        }
    }

    fn build_bundle(
        &self,
        id: &str,
        dir: &Path,
        sandbox: &Sandbox,
        config: v1::ContainerConfig,
        image: &ImageRecord,
        settings: &ExecutionConfig,
    ) -> anyhow::Result<Container> {
        for part in ["rootfs", "upper", "work"] {
            std::fs::create_dir_all(dir.join(part))?;
        }
        let rootfs = dir.join("rootfs");
        let mut lower: Vec<PathBuf> = image
            .chain
            .iter()
            .map(|c| self.images.layer_dir(c))
            .collect();
        if lower.is_empty() {
            // An image without layers is an empty directory.
            lower.push(dir.join("empty"));
            std::fs::create_dir_all(dir.join("empty"))?;
        }
        overlay::mount(&lower, &dir.join("upper"), &dir.join("work"), &rootfs)?;

        let identity = identity(&config, settings, &rootfs)?;
        let pod = sandbox.record();
        let cgroup = format!("{}/{id}", pod.cgroup_parent);
        let spec = spec::build(&spec::Input {
            config: &config,
            pod: &sandbox.config,
            image: settings,
            identity: &identity,
            rootfs: &rootfs,
            cgroup: &cgroup,
            namespaces: self.namespaces(sandbox, &config)?,
            sandbox_dir: &sandbox.dir,
            shm: &match crate::sandbox::namespace_options(&sandbox.config).ipc() {
                v1::NamespaceMode::Node => PathBuf::from("/dev/shm"),
                _ => self.shm_path(&sandbox.id),
            },
        })?;
        make_working_dir(&rootfs, &spec, &identity)?;
        std::fs::write(dir.join("config.json"), serde_json::to_vec(&spec)?)?;
        Container::create(
            id.to_owned(),
            config.clone(),
            dir.to_owned(),
            ContainerRecord {
                sandbox: sandbox.id.clone(),
                created_at: now_nanos(),
                image: image.id.clone(),
                image_ref: image.digests.first().unwrap_or(&image.id).clone(),
                chain: image.chain.clone(),
                stop_signal: stop_signal(&config, settings),
                cgroup,
                uid: identity.uid,
                gid: identity.gid,
                groups: identity.groups,
                ..ContainerRecord::default()
            },
        )
    }

    fn namespaces(
        &self,
        sandbox: &Sandbox,
        config: &v1::ContainerConfig,
    ) -> anyhow::Result<Namespaces> {
        let pod = sandbox.record();
        let pod_options = crate::sandbox::namespace_options(&sandbox.config);
        let options = config
            .linux
            .as_ref()
            .and_then(|l| l.security_context.as_ref())
            .and_then(|s| s.namespace_options.clone())
            .unwrap_or_else(|| pod_options.clone());
        let of = |pid: i32, kind: &str| PathBuf::from(format!("/proc/{pid}/ns/{kind}"));
        let pid = match options.pid() {
            v1::NamespaceMode::Node => PidNamespace::Host,
            v1::NamespaceMode::Container => PidNamespace::Own,
            v1::NamespaceMode::Pod => match pod.pause_pid {
                Some(pause) => PidNamespace::Join(of(pause, "pid")),
                None => PidNamespace::Own,
            },
            v1::NamespaceMode::Target => {
                let target = self
                    .registry
                    .container(&options.target_id)
                    .with_context(|| format!("target container {:?} not found", options.target_id))?
                    .record();
                ensure!(
                    target.pid > 0,
                    "target container {:?} is not running",
                    options.target_id
                );
                PidNamespace::Join(of(target.pid, "pid"))
            }
        };
        Ok(Namespaces {
            network: pod.netns.clone(),
            ipc: (pod_options.ipc() != v1::NamespaceMode::Node).then(|| of(pod.shim_pid, "ipc")),
            uts: pod.netns.as_ref().map(|_| of(pod.shim_pid, "uts")),
            pid,
        })
    }

    /// Starts a container that was made.
    pub async fn start_container(&self, container: &Arc<Container>) -> anyhow::Result<()> {
        let record = container.record();
        ensure!(
            record.phase == Phase::Created,
            "container {:?} is not in the state created",
            container.id
        );
        let sandbox = self.sandbox_of(container)?;
        let pod = sandbox.record();
        ensure!(pod.ready, "sandbox {:?} is not running", sandbox.id);
        let request = StartRequest {
            id: container.id.clone(),
            bundle: container.dir.to_string_lossy().into_owned(),
            log_path: status::log_path(container, &sandbox),
            tty: container.config.tty,
            stdin: container.config.stdin,
            stdin_once: container.config.stdin_once,
            oom_score_adj: container
                .config
                .linux
                .as_ref()
                .and_then(|l| l.resources.as_ref())
                .map(|r| r.oom_score_adj as i32)
                .filter(|score| *score != 0),
        };
        match shim_client::call(&pod.socket, &Request::Start(request)).await {
            Ok(Reply::Started { pid, started_at }) => {
                container.update(|r| {
                    r.started_at = started_at;
                    // The event of a very short life may have come first.
                    if r.phase == Phase::Created {
                        r.phase = Phase::Running;
                        r.pid = pid;
                    }
                })?;
                self.publish(
                    &container.id,
                    &sandbox,
                    v1::ContainerEventType::ContainerStartedEvent,
                );
                if container.record().phase == Phase::Exited {
                    self.publish(
                        &container.id,
                        &sandbox,
                        v1::ContainerEventType::ContainerStoppedEvent,
                    );
                }
                Ok(())
            }
            Ok(_) => bail!("the pod's shim answered the start with something else"),
            Err(err) => {
                let message = format!("failed to create task: {err:#}");
                container.update(|r| {
                    r.phase = Phase::Exited;
                    r.exit_code = 128;
                    r.reason = "StartError".to_owned();
                    r.message.clone_from(&message);
                    r.finished_at = now_nanos();
                })?;
                self.publish(
                    &container.id,
                    &sandbox,
                    v1::ContainerEventType::ContainerStoppedEvent,
                );
                bail!(message)
            }
        }
    }

    /// The sandbox that a container is in.
    pub fn sandbox_of(&self, container: &Container) -> anyhow::Result<Arc<Sandbox>> {
        let id = container.record().sandbox;
        self.registry
            .sandbox(&id)
            .with_context(|| format!("sandbox {id:?} of container {:?} is gone", container.id))
    }

    /// Asks a container to end, and kills it after `grace`. Safe to repeat.
    pub async fn stop_container(
        &self,
        container: &Arc<Container>,
        grace: Duration,
    ) -> anyhow::Result<()> {
        let record = container.record();
        if record.phase == Phase::Exited {
            return Ok(());
        }
        if record.phase == Phase::Created {
            return container.update(|r| {
                r.phase = Phase::Exited;
                r.finished_at = now_nanos();
                r.reason = "Error".to_owned();
                r.exit_code = 128 + libc::SIGKILL;
            });
        }
        let sandbox = self.sandbox_of(container)?;
        let socket = sandbox.record().socket;
        let kill = |signal: i32, all: bool| Request::Kill {
            id: container.id.clone(),
            signal,
            all,
        };
        if grace > Duration::ZERO {
            shim_client::call(&socket, &kill(record.stop_signal, false)).await?;
            if tokio::time::timeout(grace, container.ended()).await.is_ok() {
                return Ok(());
            }
        }
        if let Err(err) = shim_client::call(&socket, &kill(libc::SIGKILL, true)).await {
            if container.record().phase == Phase::Exited || !sandbox.record().ready {
                return Ok(());
            }
            return Err(err);
        }
        tokio::time::timeout(Duration::from_secs(20), container.ended())
            .await
            .with_context(|| format!("container {:?} does not end after SIGKILL", container.id))
    }

    /// Kills a container if need be and removes all of it. Safe to repeat.
    pub async fn remove_container(&self, container: &Arc<Container>) -> anyhow::Result<()> {
        self.stop_container(container, Duration::ZERO).await?;
        let record = container.record();
        let sandbox = self.registry.sandbox(&record.sandbox);
        if let Some(sandbox) = &sandbox
            && sandbox.record().ready
        {
            let request = Request::Delete {
                id: container.id.clone(),
            };
            shim_client::call(&sandbox.record().socket, &request).await?;
        }
        remove_cgroup(&record.cgroup);
        overlay::unmount(&container.dir.join("rootfs"))?;
        if container.dir.exists() {
            let dir = container.dir.clone();
            tokio::task::spawn_blocking(move || std::fs::remove_dir_all(dir))
                .await?
                .with_context(|| format!("cannot remove {}", container.dir.display()))?;
        }
        self.registry.drop_container(&container.id);
        if let Some(sandbox) = &sandbox {
            self.publish(
                &container.id,
                sandbox,
                v1::ContainerEventType::ContainerDeletedEvent,
            );
        }
        Ok(())
    }

    /// Starts a process in a container; the connection carries its streams.
    pub async fn open_exec(
        &self,
        container: &Container,
        command: &[String],
        tty: bool,
        stdin: bool,
    ) -> anyhow::Result<ShimClient> {
        ensure!(
            container.record().phase == Phase::Running,
            "container {:?} is not running",
            container.id
        );
        ensure!(!command.is_empty(), "no command is given");
        let text = std::fs::read(container.dir.join("config.json"))
            .context("cannot read the container's specification")?;
        let mut spec: Value = serde_json::from_slice(&text)?;
        let mut process = spec["process"].take();
        process["args"] = command.into();
        process["terminal"] = tty.into();
        if tty && let Some(env) = process["env"].as_array_mut() {
            let has_term = env
                .iter()
                .any(|e| e.as_str().is_some_and(|e| e.starts_with("TERM=")));
            if !has_term {
                env.push("TERM=xterm".into());
            }
        }
        let socket = self.sandbox_of(container)?.record().socket;
        let mut client = ShimClient::connect(&socket).await?;
        client
            .call(&Request::Exec(ExecRequest {
                id: container.id.clone(),
                process,
                tty,
                stdin,
            }))
            .await
            .context("failed to exec in container")?;
        Ok(client)
    }

    /// Joins the streams of a container's first process.
    pub async fn open_attach(&self, container: &Container) -> anyhow::Result<ShimClient> {
        let socket = self.sandbox_of(container)?.record().socket;
        let mut client = ShimClient::connect(&socket).await?;
        client
            .call(&Request::Attach {
                id: container.id.clone(),
            })
            .await
            .context("failed to attach to container")?;
        Ok(client)
    }

    /// Runs a process in a container and gathers its output.
    pub async fn exec_sync(
        &self,
        container: &Container,
        command: &[String],
        timeout: Option<Duration>,
    ) -> Result<ExecOutput, ExecError> {
        let run = async {
            let mut client = self.open_exec(container, command, false, false).await?;
            let mut output = ExecOutput {
                stdout: Vec::new(),
                stderr: Vec::new(),
                exit_code: 0,
            };
            loop {
                match client.next().await? {
                    Some(Frame::Output(kind, data)) => {
                        let into = match kind {
                            FrameKind::Stderr => &mut output.stderr,
                            _ => &mut output.stdout,
                        };
                        let room = EXEC_SYNC_LIMIT.saturating_sub(into.len());
                        into.extend_from_slice(&data[..data.len().min(room)]);
                    }
                    Some(Frame::Reply(Reply::Exited { exit, .. })) => {
                        output.exit_code = exit.exit_code;
                        return anyhow::Ok(output);
                    }
                    Some(Frame::Reply(Reply::Error { message })) => bail!(message),
                    Some(Frame::Reply(_)) => {}
                    None => bail!("the container has ended during the exec"),
                }
            }
        };
        match timeout {
            // Dropping the connection makes the shim kill the process.
            Some(limit) => match tokio::time::timeout(limit, run).await {
                Ok(done) => done.map_err(ExecError::Other),
                Err(_) => Err(ExecError::Timeout),
            },
            None => run.await.map_err(ExecError::Other),
        }
    }
}

fn identity(
    config: &v1::ContainerConfig,
    image: &ExecutionConfig,
    rootfs: &Path,
) -> anyhow::Result<Identity> {
    let security = config
        .linux
        .as_ref()
        .and_then(|l| l.security_context.clone())
        .unwrap_or_default();
    let mut user = match (&security.run_as_user, security.run_as_username.as_str()) {
        (Some(uid), _) => uid.value.to_string(),
        (None, name) if !name.is_empty() => name.to_owned(),
        _ => image.user.clone(),
    };
    if let Some(gid) = &security.run_as_group {
        let name = user.split(':').next().unwrap_or("").to_owned();
        user = format!("{name}:{}", gid.value);
    }
    let passwd = users::read_in_root(rootfs, "/etc/passwd")?;
    let group = users::read_in_root(rootfs, "/etc/group")?;
    let mut found = users::resolve(&user, &passwd, &group)?;
    if security.supplemental_groups_policy() == v1::SupplementalGroupsPolicy::Strict {
        found.groups.clear();
    } else if security.run_as_group.is_some() {
        // A given primary group does not take the user's other groups away.
        let name = user.split(':').next().unwrap_or("");
        found.groups = users::resolve(name, &passwd, &group)?.groups;
    }
    for gid in &security.supplemental_groups {
        let gid = u32::try_from(*gid).context("a supplemental group is out of range")?;
        if !found.groups.contains(&gid) {
            found.groups.push(gid);
        }
    }
    Ok(found)
}

/// Makes the working directory if the image lacks it, as other runtimes do.
fn make_working_dir(rootfs: &Path, spec: &Value, identity: &Identity) -> anyhow::Result<()> {
    let dir = spec["process"]["cwd"].as_str().unwrap_or("/");
    let mut at = rootfs.to_owned();
    for part in Path::new(dir).components() {
        if let std::path::Component::Normal(name) = part {
            at.push(name);
            match std::fs::symlink_metadata(&at) {
                Ok(meta) if meta.is_dir() => {}
                // A link may lead out of the root: leave it to the container.
                Ok(_) => return Ok(()),
                Err(err) if err.kind() == std::io::ErrorKind::NotFound => {
                    std::fs::create_dir(&at)?;
                    std::os::unix::fs::chown(&at, Some(identity.uid), Some(identity.gid))?;
                }
                Err(err) => return Err(err.into()),
            }
        }
    }
    Ok(())
}

fn stop_signal(config: &v1::ContainerConfig, image: &ExecutionConfig) -> i32 {
    let asked = config.stop_signal();
    let name = if asked == v1::Signal::RuntimeDefault {
        image.stop_signal.clone()
    } else {
        asked.as_str_name().trim_start_matches("SIGNAL_").to_owned()
    };
    parse_signal(&name).unwrap_or(libc::SIGTERM)
}

fn parse_signal(name: &str) -> Option<i32> {
    if let Ok(number) = name.parse::<i32>() {
        return (1..=64).contains(&number).then_some(number);
    }
    let upper = name.to_ascii_uppercase();
    let short = upper.strip_prefix("SIG").unwrap_or(&upper);
    let real_time = |rest: &str, words: [&str; 2]| -> Option<i32> {
        if rest.is_empty() {
            return Some(0);
        }
        words
            .iter()
            .find_map(|w| rest.strip_prefix(w))
            .and_then(|n| n.parse().ok())
    };
    if let Some(rest) = short.strip_prefix("RTMIN") {
        return real_time(rest, ["+", "PLUS"]).map(|n| 34 + n);
    }
    if let Some(rest) = short.strip_prefix("RTMAX") {
        return real_time(rest, ["-", "MINUS"]).map(|n| 64 - n);
    }
    format!("SIG{short}")
        .parse::<nix::sys::signal::Signal>()
        .ok()
        .map(|s| s as i32)
}

/// Kills every process in a container's cgroup, for when its shim is gone.
pub fn kill_cgroup(path: &str) {
    for dir in cgroup_dirs(path) {
        let procs = std::fs::read_to_string(dir.join("cgroup.procs")).unwrap_or_default();
        for pid in procs.lines().filter_map(|l| l.parse::<i32>().ok()) {
            if pid > 1 {
                // SAFETY: plain kill; the cgroup belongs to one container alone.
                unsafe { libc::kill(pid, libc::SIGKILL) };
            }
        }
    }
}

/// Removes a cgroup from every hierarchy, if it is there and empty.
pub fn remove_cgroup(path: &str) {
    for dir in cgroup_dirs(path) {
        let _ = std::fs::remove_dir(dir);
    }
}

/// A cgroup's directory in every hierarchy that has it.
pub fn cgroup_dirs(path: &str) -> Vec<PathBuf> {
    let path = path.trim_matches('/');
    if path.is_empty() || path.split('/').any(|p| p == "..") {
        return Vec::new();
    }
    let root = Path::new("/sys/fs/cgroup");
    let mut found = vec![root.join(path)];
    for entry in std::fs::read_dir(root).into_iter().flatten().flatten() {
        if entry.file_type().is_ok_and(|t| t.is_dir()) {
            found.push(entry.path().join(path));
        }
    }
    found.retain(|dir| dir.is_dir());
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn signals_are_known_by_name_and_number() {
        for (name, number) in [
            ("SIGTERM", Some(15)),
            ("quit", Some(3)),
            ("9", Some(9)),
            ("SIGRTMIN+3", Some(37)),
            ("SIGRTMAXMINUS1", Some(63)),
            ("65", None),
            ("SIGNONE", None),
        ] {
            assert_eq!(parse_signal(name), number, "{name}");
        }
    }
}
