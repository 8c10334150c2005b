//! What the runtime knows of sandboxes and containers, and keeps on disk.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard};

use anyhow::Context;
use prost::Message;
use serde::{Deserialize, Serialize};
use tokio::sync::watch;
use xebec_cri_api::v1;

use crate::cni::Attachment;
use crate::images::store::replace_file;

/// The changing part of a sandbox; `record.json`.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct SandboxRecord {
    /// Nanoseconds since 1970.
    pub created_at: i64,
    /// Its shim lives and its network stands.
    pub ready: bool,
    /// Its network namespace; `None` with the host's network.
    pub netns: Option<PathBuf>,
    /// What the CNI plugins gave.
    pub attachment: Option<Attachment>,
    /// The shim's socket.
    pub socket: PathBuf,
    /// PID of the shim, in whose IPC and UTS namespaces the pod lives.
    pub shim_pid: i32,
    /// PID of the first process of a PID namespace that the pod shares.
    pub pause_pid: Option<i32>,
    /// The cgroup above the containers' own.
    pub cgroup_parent: String,
    /// The runtime handler asked for.
    #[serde(default)]
    pub runtime_handler: String,
}

/// A container's state, in the order of its life.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq, Serialize, Deserialize)]
pub enum Phase {
    /// Its root is mounted; nothing runs yet.
    #[default]
    Created,
    /// Its process runs.
    Running,
    /// Its process has ended.
    Exited,
}

/// The changing part of a container; `record.json`.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct ContainerRecord {
    /// The sandbox it belongs to.
    pub sandbox: String,
    /// State.
    pub phase: Phase,
    /// Nanoseconds since 1970.
    pub created_at: i64,
    /// Nanoseconds since 1970, 0 before.
    pub started_at: i64,
    /// Nanoseconds since 1970, 0 before.
    pub finished_at: i64,
    /// Exit code, or 128 + signal.
    pub exit_code: i32,
    /// One word about the end: Completed, Error, OOMKilled, StartError, Unknown.
    pub reason: String,
    /// More about the end.
    pub message: String,
    /// Id of its image.
    pub image: String,
    /// A name of its image with a digest, or its id.
    pub image_ref: String,
    /// Chain ids of the layers it is mounted on.
    pub chain: Vec<String>,
    /// PID of its first process, 0 when none runs.
    pub pid: i32,
    /// The signal that asks it to end.
    pub stop_signal: i32,
    /// Path of its cgroup from the hierarchies' roots.
    pub cgroup: String,
    /// User and groups of its first process.
    pub uid: u32,
    /// User and groups of its first process.
    pub gid: u32,
    /// User and groups of its first process.
    pub groups: Vec<u32>,
}

/// Where limits are that were changed since the container was made.
const RESOURCES: &str = "resources.pb";

/// A sandbox: what was asked for, and what is.
pub struct Sandbox {
    /// 64 hex digits.
    pub id: String,
    /// As the kubelet gave it.
    pub config: v1::PodSandboxConfig,
    /// Its directory on disk.
    pub dir: PathBuf,
    record: Mutex<SandboxRecord>,
}

/// A container: what was asked for, and what is.
pub struct Container {
    /// 64 hex digits.
    pub id: String,
    /// As the kubelet gave it.
    pub config: v1::ContainerConfig,
    /// Its directory on disk, which is its OCI bundle.
    pub dir: PathBuf,
    record: Mutex<ContainerRecord>,
    resources: Mutex<Option<v1::LinuxContainerResources>>,
    phase: watch::Sender<Phase>,
}

impl Sandbox {
    /// Writes a new sandbox to `dir`.
    pub fn create(
        id: String,
        config: v1::PodSandboxConfig,
        dir: PathBuf,
        record: SandboxRecord,
    ) -> anyhow::Result<Self> {
        replace_file(&dir.join("config.pb"), &config.encode_to_vec())?;
        replace_file(&dir.join("record.json"), &serde_json::to_vec(&record)?)?;
        Ok(Self {
            id,
            config,
            dir,
            record: Mutex::new(record),
        })
    }

    /// Reads a sandbox back.
    pub fn load(id: String, dir: PathBuf) -> anyhow::Result<Self> {
        let (config, record) = read_pair(&dir)?;
        Ok(Self {
            id,
            config,
            dir,
            record: Mutex::new(record),
        })
    }

    /// A copy of the record.
    pub fn record(&self) -> SandboxRecord {
        lock(&self.record).clone()
    }

    /// Changes the record, on disk too.
    pub fn update(&self, change: impl FnOnce(&mut SandboxRecord)) -> anyhow::Result<()> {
        let mut record = lock(&self.record);
        change(&mut record);
        replace_file(
            &self.dir.join("record.json"),
            &serde_json::to_vec(&*record)?,
        )
    }
}

impl Container {
    /// Writes a new container to `dir`.
    pub fn create(
        id: String,
        config: v1::ContainerConfig,
        dir: PathBuf,
        record: ContainerRecord,
    ) -> anyhow::Result<Self> {
        replace_file(&dir.join("config.pb"), &config.encode_to_vec())?;
        replace_file(&dir.join("record.json"), &serde_json::to_vec(&record)?)?;
        let phase = watch::Sender::new(record.phase);
        let resources = config.linux.as_ref().and_then(|l| l.resources.clone());
        Ok(Self {
            id,
            config,
            dir,
            record: Mutex::new(record),
            resources: Mutex::new(resources),
            phase,
        })
    }

    /// Reads a container back.
    pub fn load(id: String, dir: PathBuf) -> anyhow::Result<Self> {
        let (config, record): (v1::ContainerConfig, ContainerRecord) = read_pair(&dir)?;
        let phase = watch::Sender::new(record.phase);
        let resources = match std::fs::read(dir.join(RESOURCES)) {
            Ok(changed) => Some(
                v1::LinuxContainerResources::decode(changed.as_slice())
                    .with_context(|| format!("cannot decode {RESOURCES} of container {id}"))?,
            ),
            Err(err) if err.kind() != std::io::ErrorKind::NotFound => {
                return Err(err)
                    .with_context(|| format!("cannot read {RESOURCES} of container {id}"));
            }
            Err(_) => config.linux.as_ref().and_then(|l| l.resources.clone()),
        };
        Ok(Self {
            id,
            config,
            dir,
            record: Mutex::new(record),
            resources: Mutex::new(resources),
            phase,
        })
    }

    /// A copy of the record.
    pub fn record(&self) -> ContainerRecord {
        lock(&self.record).clone()
    }

    /// Its limits: as they were asked for, or as they were changed since.
    pub fn resources(&self) -> Option<v1::LinuxContainerResources> {
        lock(&self.resources).clone()
    }

    /// Notes changed limits, on disk too; those that are not set stay as they were.
    pub fn change_resources(&self, asked: &v1::LinuxContainerResources) -> anyhow::Result<()> {
        let mut known = lock(&self.resources);
        let mut next = known.clone().unwrap_or_default();
        if !asked.hugepage_limits.is_empty() {
            next.hugepage_limits.clear();
        }
        next.merge(asked.encode_to_vec().as_slice())
            .context("cannot merge limits")?;
        replace_file(&self.dir.join(RESOURCES), &next.encode_to_vec())?;
        *known = Some(next);
        Ok(())
    }

    /// Changes the record, on disk too, and wakes who waits for its phase.
    pub fn update(&self, change: impl FnOnce(&mut ContainerRecord)) -> anyhow::Result<()> {
        let mut record = lock(&self.record);
        change(&mut record);
        let phase = record.phase;
        let written = replace_file(
            &self.dir.join("record.json"),
            &serde_json::to_vec(&*record)?,
        );
        drop(record);
        self.phase.send_replace(phase);
        written
    }

    /// Returns once the container has ended.
    pub async fn ended(&self) {
        let mut phase = self.phase.subscribe();
        // The sender lives as long as `self`.
        let _ = phase.wait_for(|p| *p == Phase::Exited).await;
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // A panic while a record was locked leaves the record whole enough to read.
    mutex
        .lock()
        .unwrap_or_else(std::sync::PoisonError::into_inner)
}

fn read_pair<C: Message + Default, R: for<'de> Deserialize<'de>>(
    dir: &Path,
) -> anyhow::Result<(C, R)> {
    let read = |name: &str| {
        let path = dir.join(name);
        std::fs::read(&path).with_context(|| format!("cannot read {}", path.display()))
    };
    let config = C::decode(read("config.pb")?.as_slice())
        .with_context(|| format!("{}/config.pb is damaged", dir.display()))?;
    let record = serde_json::from_slice(&read("record.json")?)
        .with_context(|| format!("{}/record.json is damaged", dir.display()))?;
    Ok((config, record))
}

/// All sandboxes and containers, by id.
#[derive(Default)]
pub struct Registry {
    sandboxes: Mutex<BTreeMap<String, Arc<Sandbox>>>,
    containers: Mutex<BTreeMap<String, Arc<Container>>>,
}

impl Registry {
    /// The sandbox with this id, or with the only id that starts so.
    pub fn sandbox(&self, id: &str) -> Option<Arc<Sandbox>> {
        by_prefix(&lock(&self.sandboxes), id)
    }

    /// The container with this id, or with the only id that starts so.
    pub fn container(&self, id: &str) -> Option<Arc<Container>> {
        by_prefix(&lock(&self.containers), id)
    }

    /// All sandboxes.
    pub fn sandboxes(&self) -> Vec<Arc<Sandbox>> {
        lock(&self.sandboxes).values().cloned().collect()
    }

    /// All containers.
    pub fn containers(&self) -> Vec<Arc<Container>> {
        lock(&self.containers).values().cloned().collect()
    }

    /// The containers of one sandbox.
    pub fn containers_of(&self, sandbox: &str) -> Vec<Arc<Container>> {
        lock(&self.containers)
            .values()
            .filter(|c| lock(&c.record).sandbox == sandbox)
            .cloned()
            .collect()
    }

    /// Adds a sandbox.
    pub fn add_sandbox(&self, sandbox: Arc<Sandbox>) {
        lock(&self.sandboxes).insert(sandbox.id.clone(), sandbox);
    }

    /// Adds a container.
    pub fn add_container(&self, container: Arc<Container>) {
        lock(&self.containers).insert(container.id.clone(), container);
    }

    /// Forgets a sandbox.
    pub fn drop_sandbox(&self, id: &str) {
        lock(&self.sandboxes).remove(id);
    }

    /// Forgets a container.
    pub fn drop_container(&self, id: &str) {
        lock(&self.containers).remove(id);
    }
}

fn by_prefix<T>(map: &BTreeMap<String, Arc<T>>, id: &str) -> Option<Arc<T>> {
    if let Some(found) = map.get(id) {
        return Some(found.clone());
    }
    if id.is_empty() {
        return None;
    }
    let mut matches = map
        .range(id.to_owned()..)
        .take_while(|(key, _)| key.starts_with(id));
    match (matches.next(), matches.next()) {
        (Some((_, found)), None) => Some(found.clone()),
        _ => None,
    }
}
