//! One pod's worker: compares what is wanted with what runs, and does the next step.

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use k8s_openapi::api::core::v1::{Container, LifecycleHandler, Pod};
use k8s_openapi::jiff::Timestamp;
use kube::Api;
use kube::api::{DeleteParams, Patch, PatchParams, Preconditions};
use tokio::sync::mpsc;
use tokio::task::AbortHandle;
use tracing::{debug, warn};
use xebec_cri_api::v1;
use xebec_cri_api::v1::ContainerState::{ContainerExited, ContainerRunning};

use crate::backoff::Backoff;
use crate::config::Config;
use crate::container::{self, Given};
use crate::env::{self, Sources};
use crate::events::Teller;
use crate::probes::{self, Kind, Verdict};
use crate::runtime::{PodState, Runtime};
use crate::status::{self, Facts, Known};
use crate::volumes;

/// Projected volumes and tokens are looked at again this often.
const REFRESH: Duration = Duration::from_secs(60);
/// A failed step is tried again after this.
const RETRY: Duration = Duration::from_secs(2);

/// Why a worker is woken.
#[derive(Clone, Debug)]
pub(crate) enum Wake {
    /// The Pod object is this now.
    Pod(Box<Pod>),
    /// The Pod object is gone.
    Gone,
    /// Something happened to its containers.
    Runtime,
}

/// What every worker has.
#[derive(Clone)]
pub(crate) struct Shared {
    pub client: kube::Client,
    pub config: Arc<Config>,
    pub runtime: Runtime,
    pub teller: Teller,
}

/// What a probe has said of a container.
#[derive(Clone, Debug, Default)]
struct Probed {
    started: Option<bool>,
    ready: Option<bool>,
    live: Option<bool>,
}

pub(crate) struct Worker {
    shared: Shared,
    pod: Pod,
    /// The object is gone from the API.
    gone: bool,
    backoff: Backoff,
    /// What a container waits for: reason and message, by its name.
    waiting: HashMap<String, (String, String)>,
    /// By container id.
    probed: HashMap<String, Probed>,
    tasks: HashMap<(String, Kind), AbortHandle>,
    verdicts: (
        mpsc::UnboundedSender<Verdict>,
        mpsc::UnboundedReceiver<Verdict>,
    ),
    mounts: Option<(volumes::Mounts, Instant)>,
    sandbox_attempt: u32,
    over: Option<(&'static str, String, String)>,
    /// Earliest time at which there is something to do without being told.
    next: Option<Instant>,
}

/// Whether the worker goes on.
#[derive(PartialEq)]
enum Step {
    GoOn,
    Finished,
}

impl Worker {
    pub(crate) fn new(shared: Shared, pod: Pod) -> Self {
        Self {
            shared,
            pod,
            gone: false,
            backoff: Backoff::default(),
            waiting: HashMap::new(),
            probed: HashMap::new(),
            tasks: HashMap::new(),
            verdicts: mpsc::unbounded_channel(),
            mounts: None,
            sandbox_attempt: 0,
            over: None,
            next: None,
        }
    }

    /// Runs until the pod is gone and cleaned up.
    pub(crate) async fn run(mut self, mut wakes: mpsc::UnboundedReceiver<Wake>) {
        loop {
            self.next = None;
            match self.sync().await {
                Ok(Step::Finished) => break,
                Ok(Step::GoOn) => {}
                Err(error) => {
                    warn!(
                        pod = self.key(),
                        error = format!("{error:#}"),
                        "could not sync the pod"
                    );
                    self.wake_at(Instant::now() + RETRY);
                }
            }
            let next = self.next;
            let sleep = async {
                match next {
                    Some(at) => tokio::time::sleep_until(at.into()).await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                wake = wakes.recv() => match wake {
                    Some(wake) => self.take(wake),
                    None => break,
                },
                Some(verdict) = self.verdicts.1.recv() => self.judge(verdict).await,
                () = sleep => {}
            }
            while let Ok(wake) = wakes.try_recv() {
                self.take(wake);
            }
        }
        self.tasks.values().for_each(AbortHandle::abort);
    }

    fn take(&mut self, wake: Wake) {
        match wake {
            Wake::Pod(pod) => self.pod = *pod,
            Wake::Gone => self.gone = true,
            Wake::Runtime => {}
        }
    }

    fn key(&self) -> String {
        let text = |value: &Option<String>| value.clone().unwrap_or_default();
        format!(
            "{}/{}",
            text(&self.pod.metadata.namespace),
            text(&self.pod.metadata.name)
        )
    }

    fn uid(&self) -> &str {
        self.pod.metadata.uid.as_deref().unwrap_or_default()
    }

    fn pod_dir(&self) -> PathBuf {
        self.shared.config.pod_dir(self.uid())
    }

    fn wake_at(&mut self, at: Instant) {
        self.next = Some(self.next.map_or(at, |next| next.min(at)));
    }

    async fn judge(&mut self, verdict: Verdict) {
        let probed = self.probed.entry(verdict.container_id.clone()).or_default();
        match verdict.kind {
            Kind::Startup => probed.started = Some(verdict.passed),
            Kind::Readiness => probed.ready = Some(verdict.passed),
            Kind::Liveness => probed.live = Some(verdict.passed),
        }
        if !verdict.passed {
            let note = format!("{:?} probe failed: {}", verdict.kind, verdict.message);
            self.shared
                .teller
                .warning(&self.pod, Some(&verdict.container), "Unhealthy", note)
                .await;
        }
    }

    async fn sync(&mut self) -> Result<Step> {
        let state = self
            .shared
            .runtime
            .pod(self.uid())
            .await
            .context("could not ask the container runtime")?;
        if self.gone || self.pod.metadata.deletion_timestamp.is_some() {
            return self.terminate(state).await;
        }
        let phase = self.pod.status.as_ref().and_then(|s| s.phase.as_deref());
        if matches!(phase, Some("Succeeded" | "Failed")) {
            self.stop_all(&state, 0).await?;
            return Ok(Step::GoOn);
        }
        self.check_deadline();
        if self.over.is_some() {
            self.stop_all(&state, self.grace()).await?;
            let state = self.shared.runtime.pod(self.uid()).await?;
            self.write_status(&state).await?;
            return Ok(Step::GoOn);
        }
        let outcome = self.advance(&state).await;
        // What was started is looked at afresh, also after a failed step: the status says how far it came.
        let state = self.shared.runtime.pod(self.uid()).await?;
        self.watch_probes(&state);
        self.write_status(&state).await?;
        outcome.map(|()| Step::GoOn)
    }

    fn grace(&self) -> i64 {
        let metadata = &self.pod.metadata;
        metadata
            .deletion_grace_period_seconds
            .or(self
                .pod
                .spec
                .as_ref()
                .and_then(|s| s.termination_grace_period_seconds))
            .unwrap_or(30)
            .max(0)
    }

    /// `spec.activeDeadlineSeconds`
    fn check_deadline(&mut self) {
        let limit = self
            .pod
            .spec
            .as_ref()
            .and_then(|s| s.active_deadline_seconds);
        let started = self.pod.status.as_ref().and_then(|s| s.start_time.as_ref());
        let (Some(limit), Some(started)) = (limit, started) else {
            return;
        };
        let left = limit - Timestamp::now().duration_since(started.0).as_secs();
        if left <= 0 {
            self.over = Some((
                "Failed",
                "DeadlineExceeded".into(),
                "Pod was active on the node longer than the specified deadline".into(),
            ));
        } else {
            self.wake_at(Instant::now() + Duration::from_secs(left as u64));
        }
    }

    /// Starts what is to be started next.
    async fn advance(&mut self, state: &PodState) -> Result<()> {
        let Some(spec) = self.pod.spec.clone() else {
            return Ok(());
        };
        let policy = spec.restart_policy.as_deref().unwrap_or("Always");
        let inits = spec.init_containers.clone().unwrap_or_default();
        let sandbox = match state.ready_sandbox() {
            Some(sandbox) => sandbox.clone(),
            None if !self.wants_sandbox(state, &spec.containers, policy) => return Ok(()),
            None => match self.make_sandbox(state).await? {
                Some(sandbox) => sandbox,
                None => return Ok(()),
            },
        };
        self.refresh_volumes(&sandbox).await?;
        for init in &inits {
            let latest = state
                .latest(&init.name)
                .filter(|c| in_sandbox(c, state, &sandbox));
            if status::is_sidecar(init) {
                self.keep_running(init, latest, state, &sandbox, "Always")
                    .await?;
                let started = latest.is_some_and(|c| {
                    c.state() == ContainerRunning && self.known(&init.name, state).started
                });
                if !started {
                    return Ok(());
                }
                continue;
            }
            match latest {
                Some(container)
                    if container.state() == ContainerExited && container.exit_code == 0 =>
                {
                    continue;
                }
                Some(container) if container.state() == ContainerExited && policy == "Never" => {
                    return Ok(());
                }
                other => {
                    let again = if policy == "Never" {
                        "Never"
                    } else {
                        "OnFailure"
                    };
                    return self.keep_running(init, other, state, &sandbox, again).await;
                }
            }
        }
        for container in &spec.containers {
            let latest = state
                .latest(&container.name)
                .filter(|c| in_sandbox(c, state, &sandbox));
            self.keep_running(container, latest, state, &sandbox, policy)
                .await?;
        }
        Ok(())
    }

    /// A pod whose containers have all ended for good needs no new sandbox.
    fn wants_sandbox(&self, state: &PodState, containers: &[Container], policy: &str) -> bool {
        policy == "Always"
            || containers
                .iter()
                .any(|container| match state.latest(&container.name) {
                    None => true,
                    Some(latest) => {
                        latest.state() != ContainerExited
                            || policy == "OnFailure" && latest.exit_code != 0
                    }
                })
    }

    async fn make_sandbox(&mut self, state: &PodState) -> Result<Option<v1::PodSandboxStatus>> {
        if let Some(until) = self.backoff.until("sandbox", Instant::now()) {
            self.wake_at(until);
            return Ok(None);
        }
        for old in &state.sandboxes {
            self.shared.runtime.stop_sandbox(&old.id).await?;
        }
        let metadata = &self.pod.metadata;
        let text = |value: &Option<String>| value.clone().unwrap_or_default();
        let logs = self.shared.config.log_dir(
            &text(&metadata.namespace),
            &text(&metadata.name),
            &text(&metadata.uid),
        );
        std::fs::create_dir_all(&logs)
            .with_context(|| format!("could not make {}", logs.display()))?;
        let newest = state
            .sandboxes
            .iter()
            .filter_map(|s| s.metadata.as_ref())
            .map(|m| m.attempt + 1)
            .max()
            .unwrap_or(0);
        self.sandbox_attempt = newest.max(self.sandbox_attempt);
        let config = container::sandbox(&self.shared.config, &self.pod, self.sandbox_attempt);
        match self.shared.runtime.run_sandbox(config).await {
            Ok(id) => {
                self.backoff.clear("sandbox");
                let state = self.shared.runtime.pod(self.uid()).await?;
                Ok(state.sandboxes.into_iter().find(|sandbox| sandbox.id == id))
            }
            Err(error) => {
                self.sandbox_attempt += 1;
                self.backoff
                    .failed("sandbox", Duration::ZERO, Instant::now());
                // The network may come any moment while the node starts: the first tries follow quickly.
                let soon = Instant::now()
                    + if self.sandbox_attempt < 10 {
                        Duration::from_millis(200)
                    } else {
                        self.backoff.wait("sandbox")
                    };
                if self.sandbox_attempt < 10 {
                    self.backoff.clear("sandbox");
                }
                self.wake_at(soon);
                let note = format!("Failed to create pod sandbox: {error:#}");
                warn!(pod = self.key(), note);
                if self.sandbox_attempt == 3 || self.sandbox_attempt >= 10 {
                    self.shared
                        .teller
                        .warning(&self.pod, None, "FailedCreatePodSandBox", note)
                        .await;
                }
                Ok(None)
            }
        }
    }

    async fn refresh_volumes(&mut self, sandbox: &v1::PodSandboxStatus) -> Result<()> {
        let now = Instant::now();
        if let Some((_, at)) = &self.mounts {
            if now < *at + REFRESH {
                let again = *at + REFRESH;
                if self.has_api_volumes() {
                    self.wake_at(again);
                }
                return Ok(());
            }
        }
        let ip = sandbox
            .network
            .as_ref()
            .map(|network| network.ip.clone())
            .unwrap_or_default();
        let sources = Sources {
            client: &self.shared.client,
            pod: &self.pod,
            node_name: &self.shared.config.node_name,
            node_ip: self.shared.config.node_ip,
            pod_ip: Some(&ip),
        };
        match volumes::prepare(&sources, &self.pod_dir()).await {
            Ok(mounts) => {
                self.mounts = Some((mounts, now));
                if self.has_api_volumes() {
                    self.wake_at(now + REFRESH);
                }
                Ok(())
            }
            Err(error) => {
                self.shared
                    .teller
                    .warning(&self.pod, None, "FailedMount", format!("{error:#}"))
                    .await;
                Err(error)
            }
        }
    }

    /// Whether any volume shows what may change in the API.
    fn has_api_volumes(&self) -> bool {
        self.pod
            .spec
            .iter()
            .flat_map(|s| s.volumes.iter().flatten())
            .any(|v| {
                v.projected.is_some()
                    || v.config_map.is_some()
                    || v.secret.is_some()
                    || v.downward_api.is_some()
            })
    }

    /// Starts a container that is not there, restarts one that has ended as the policy says, ends one that is not alive.
    async fn keep_running(
        &mut self,
        spec: &Container,
        latest: Option<&v1::ContainerStatus>,
        state: &PodState,
        sandbox: &v1::PodSandboxStatus,
        policy: &str,
    ) -> Result<()> {
        let Some(container) = latest else {
            // In a new sandbox the count goes on from the old one's containers.
            let restarts = state
                .latest(&spec.name)
                .map_or(0, |old| status::restarts(old) + 1);
            return self.start(spec, sandbox, restarts).await;
        };
        match container.state() {
            ContainerRunning => {
                self.waiting.remove(&spec.name);
                let probed = self.probed.get(&container.id).cloned().unwrap_or_default();
                if probed.live == Some(false) || probed.started == Some(false) {
                    let why = if probed.live == Some(false) {
                        "liveness"
                    } else {
                        "startup"
                    };
                    let note = format!(
                        "Container {} failed {why} probe, will be restarted",
                        spec.name
                    );
                    self.shared
                        .teller
                        .normal(&self.pod, Some(&spec.name), "Killing", note)
                        .await;
                    self.stop(spec, &container.id, self.grace()).await?;
                    self.wake_at(Instant::now());
                }
                Ok(())
            }
            ContainerExited => {
                let again = policy == "Always" || policy == "OnFailure" && container.exit_code != 0;
                if !again {
                    self.waiting.remove(&spec.name);
                    return Ok(());
                }
                let now = Instant::now();
                let noted = format!("{}/{}", spec.name, container.id);
                if !self.waiting.contains_key(&noted) {
                    let ran = Duration::from_nanos(
                        (container.finished_at - container.started_at).max(0) as u64,
                    );
                    // The first end is forgiven: it is started again at once.
                    if status::restarts(container) > 0
                        || self.backoff.until(&spec.name, now).is_some()
                    {
                        self.backoff.failed(&spec.name, ran, now);
                    }
                    self.waiting
                        .retain(|key, _| !key.starts_with(&format!("{}/", spec.name)));
                    self.waiting.insert(noted, Default::default());
                }
                if let Some(until) = self.backoff.until(&spec.name, now) {
                    let wait = self.backoff.wait(&spec.name).as_secs();
                    let message = format!(
                        "back-off {wait}s restarting failed container={} pod={}",
                        spec.name,
                        self.key()
                    );
                    if self
                        .waiting
                        .insert(spec.name.clone(), ("CrashLoopBackOff".into(), message))
                        .is_none()
                    {
                        let note = format!(
                            "Back-off restarting failed container {} in pod {}",
                            spec.name,
                            self.key()
                        );
                        self.shared
                            .teller
                            .warning(&self.pod, Some(&spec.name), "BackOff", note)
                            .await;
                    }
                    self.wake_at(until);
                    return Ok(());
                }
                // The last two are kept: the one that ended for its log, and the one that starts.
                let mut old: Vec<&v1::ContainerStatus> = state
                    .of(&spec.name)
                    .filter(|c| c.id != container.id)
                    .collect();
                old.sort_by_key(|c| std::cmp::Reverse(c.created_at));
                for dead in old {
                    if let Err(error) = self.shared.runtime.remove_container(&dead.id).await {
                        debug!(
                            container = dead.id,
                            error = format!("{error:#}"),
                            "could not remove an old container"
                        );
                    }
                }
                self.start(spec, sandbox, status::restarts(container) + 1)
                    .await
            }
            // Created and never started: a kubelet that was ended in between left it.
            _ => {
                self.shared.runtime.remove_container(&container.id).await?;
                self.start(spec, sandbox, status::restarts(container)).await
            }
        }
    }

    /// Pulls, creates and starts a container.
    async fn start(
        &mut self,
        spec: &Container,
        sandbox: &v1::PodSandboxStatus,
        restarts: i32,
    ) -> Result<()> {
        let Some(image) = self.ensure_image(spec).await? else {
            return Ok(());
        };
        let ip = sandbox
            .network
            .as_ref()
            .map(|network| network.ip.clone())
            .unwrap_or_default();
        let shared = self.shared.clone();
        let sources = Sources {
            client: &shared.client,
            pod: &self.pod,
            node_name: &shared.config.node_name,
            node_ip: shared.config.node_ip,
            pod_ip: Some(&ip),
        };
        let env = match env::environment(&sources, spec).await {
            Ok(env) => env,
            Err(error) => {
                let message = format!("{error:#}");
                self.waiting.insert(
                    spec.name.clone(),
                    ("CreateContainerConfigError".into(), message.clone()),
                );
                self.shared
                    .teller
                    .warning(
                        &self.pod,
                        Some(&spec.name),
                        "Failed",
                        format!("Error: {message}"),
                    )
                    .await;
                self.wake_at(Instant::now() + RETRY);
                return Ok(());
            }
        };
        let mounts = self
            .mounts
            .as_ref()
            .map(|(mounts, _)| mounts.clone())
            .unwrap_or_default();
        let given = Given {
            image,
            env,
            mounts: &mounts,
            restarts,
            pod_dir: &self.pod_dir(),
            pod_ip: &ip,
        };
        let config = container::container(&self.pod, spec, given)?;
        let metadata = &self.pod.metadata;
        let text = |value: &Option<String>| value.clone().unwrap_or_default();
        let logs = shared
            .config
            .log_dir(
                &text(&metadata.namespace),
                &text(&metadata.name),
                &text(&metadata.uid),
            )
            .join(&spec.name);
        std::fs::create_dir_all(&logs)
            .with_context(|| format!("could not make {}", logs.display()))?;
        let sandbox_config = container::sandbox(&shared.config, &self.pod, self.sandbox_attempt);
        let made = async {
            let id = shared
                .runtime
                .create_container(&sandbox.id, config, sandbox_config)
                .await
                .map_err(|error| ("CreateContainerError", error))?;
            shared
                .teller
                .normal(
                    &self.pod,
                    Some(&spec.name),
                    "Created",
                    format!("Container created: {}", spec.name),
                )
                .await;
            shared
                .runtime
                .start_container(&id)
                .await
                .map_err(|error| ("RunContainerError", error))?;
            Ok(id)
        }
        .await;
        match made {
            Ok(id) => {
                self.waiting.remove(&spec.name);
                shared
                    .teller
                    .normal(
                        &self.pod,
                        Some(&spec.name),
                        "Started",
                        format!("Container started: {}", spec.name),
                    )
                    .await;
                if let Some(hook) = spec.lifecycle.as_ref().and_then(|l| l.post_start.as_ref()) {
                    if let Err(error) = self.hook(hook, spec, &id, &ip).await {
                        let note = format!("PostStartHook failed: {error:#}");
                        shared
                            .teller
                            .warning(&self.pod, Some(&spec.name), "FailedPostStartHook", note)
                            .await;
                        self.stop(spec, &id, self.grace()).await?;
                    }
                }
                Ok(())
            }
            Err((reason, error)) => {
                let message = format!("{error:#}");
                warn!(
                    pod = self.key(),
                    container = spec.name,
                    message,
                    "could not start the container"
                );
                self.waiting
                    .insert(spec.name.clone(), (reason.into(), message.clone()));
                shared
                    .teller
                    .warning(
                        &self.pod,
                        Some(&spec.name),
                        "Failed",
                        format!("Error: {message}"),
                    )
                    .await;
                self.backoff
                    .failed(&spec.name, Duration::ZERO, Instant::now());
                self.wake_at(Instant::now() + self.backoff.wait(&spec.name));
                Ok(())
            }
        }
    }

    /// The image by its pull policy; none while it is not there.
    async fn ensure_image(&mut self, spec: &Container) -> Result<Option<String>> {
        let image = spec.image.clone().unwrap_or_default();
        let runtime = self.shared.runtime.clone();
        let policy = spec.image_pull_policy.as_deref().unwrap_or("IfNotPresent");
        let present = runtime.image(&image).await?;
        match (policy, present) {
            ("Always", _) | (_, None) if policy != "Never" => {}
            (_, Some(_)) => return Ok(Some(image)),
            (_, None) => {
                let message =
                    format!("Container image {image:?} is not present with pull policy of Never");
                if self
                    .waiting
                    .insert(
                        spec.name.clone(),
                        ("ErrImageNeverPull".into(), message.clone()),
                    )
                    .is_none()
                {
                    self.shared
                        .teller
                        .warning(&self.pod, Some(&spec.name), "ErrImageNeverPull", message)
                        .await;
                }
                return Ok(None);
            }
        }
        let key = format!("image {image}");
        let now = Instant::now();
        if let Some(until) = self.backoff.until(&key, now) {
            let message = format!("Back-off pulling image {image:?}");
            self.waiting.insert(
                spec.name.clone(),
                ("ImagePullBackOff".into(), message.clone()),
            );
            self.shared
                .teller
                .normal(&self.pod, Some(&spec.name), "BackOff", message)
                .await;
            self.wake_at(until);
            return Ok(None);
        }
        self.shared
            .teller
            .normal(
                &self.pod,
                Some(&spec.name),
                "Pulling",
                format!("Pulling image {image:?}"),
            )
            .await;
        let started = Instant::now();
        match runtime.pull(&image).await {
            Ok(_) => {
                self.backoff.clear(&key);
                let note = format!(
                    "Successfully pulled image {image:?} in {}ms",
                    started.elapsed().as_millis()
                );
                self.shared
                    .teller
                    .normal(&self.pod, Some(&spec.name), "Pulled", note)
                    .await;
                Ok(Some(image))
            }
            Err(error) => {
                let message = format!("Failed to pull image {image:?}: {error:#}");
                self.waiting.insert(
                    spec.name.clone(),
                    ("ErrImagePull".into(), format!("{error:#}")),
                );
                self.shared
                    .teller
                    .warning(&self.pod, Some(&spec.name), "Failed", message)
                    .await;
                self.backoff.failed(&key, Duration::ZERO, now);
                self.wake_at(now + Duration::from_secs(1));
                Ok(None)
            }
        }
    }

    async fn hook(
        &self,
        hook: &LifecycleHandler,
        spec: &Container,
        id: &str,
        ip: &str,
    ) -> Result<()> {
        if let Some(exec) = &hook.exec {
            let (code, output) = self
                .shared
                .runtime
                .exec_sync(
                    id,
                    exec.command.clone().unwrap_or_default(),
                    Duration::from_secs(600),
                )
                .await?;
            anyhow::ensure!(
                code == 0,
                "exit code {code}: {}",
                String::from_utf8_lossy(&output).trim()
            );
        }
        if let Some(get) = &hook.http_get {
            let port = probes::port_of(spec, &get.port).context("the hook's port is not known")?;
            let status = probes::http_get(get, ip, port).await?;
            anyhow::ensure!((200..400).contains(&status), "HTTP status {status}");
        }
        if let Some(sleep) = &hook.sleep {
            tokio::time::sleep(Duration::from_secs(sleep.seconds.max(0) as u64)).await;
        }
        Ok(())
    }

    /// preStop hook, SIGTERM, and SIGKILL once the grace is over; all within the grace.
    async fn stop(&self, spec: &Container, id: &str, grace: i64) -> Result<()> {
        let started = Instant::now();
        if let Some(hook) = spec
            .lifecycle
            .as_ref()
            .and_then(|l| l.pre_stop.as_ref())
            .filter(|_| grace > 0)
        {
            let ip = self
                .pod
                .status
                .as_ref()
                .and_then(|s| s.pod_ip.clone())
                .unwrap_or_default();
            let limit = Duration::from_secs(grace as u64);
            let outcome = match tokio::time::timeout(limit, self.hook(hook, spec, id, &ip)).await {
                Ok(outcome) => outcome,
                Err(_) => Err(anyhow::anyhow!("not done within {grace} s")),
            };
            if let Err(error) = outcome {
                self.shared
                    .teller
                    .warning(
                        &self.pod,
                        Some(&spec.name),
                        "FailedPreStopHook",
                        format!("PreStopHook failed: {error:#}"),
                    )
                    .await;
            }
        }
        let left = (grace - started.elapsed().as_secs() as i64).max(if grace > 0 { 2 } else { 0 });
        self.shared.runtime.stop_container(id, left).await
    }

    /// Stops every running container at once, sidecars last, and the sandbox.
    async fn stop_all(&self, state: &PodState, grace: i64) -> Result<()> {
        let Some(spec) = &self.pod.spec else {
            return Ok(());
        };
        let inits = spec.init_containers.iter().flatten();
        for group in [spec.containers.iter().collect::<Vec<_>>(), inits.collect()] {
            let stops = group.into_iter().filter_map(|one| {
                let running = state
                    .latest(&one.name)
                    .filter(|c| c.state() == ContainerRunning)?;
                let id = running.id.clone();
                Some(async move {
                    self.shared
                        .teller
                        .normal(
                            &self.pod,
                            Some(&one.name),
                            "Killing",
                            format!("Stopping container {}", one.name),
                        )
                        .await;
                    self.stop(one, &id, grace).await
                })
            });
            for stopped in futures::future::join_all(stops).await {
                stopped.context("could not stop a container")?;
            }
        }
        for sandbox in &state.sandboxes {
            self.shared
                .runtime
                .stop_sandbox(&sandbox.id)
                .await
                .context("could not stop the sandbox")?;
        }
        Ok(())
    }

    /// Ends the pod, says how it ended, and lets the API forget it.
    async fn terminate(&mut self, state: PodState) -> Result<Step> {
        self.tasks.drain().for_each(|(_, task)| task.abort());
        let grace = if self.gone {
            self.grace().min(1)
        } else {
            self.grace()
        };
        // Not ready from now on, so that no new connections come while it ends.
        self.probed
            .values_mut()
            .for_each(|probed| probed.ready = Some(false));
        self.stop_all(&state, grace).await?;
        let state = self.shared.runtime.pod(self.uid()).await?;
        if !self.gone {
            self.write_status(&state).await?;
        }
        for sandbox in &state.sandboxes {
            self.shared
                .runtime
                .remove_sandbox(&sandbox.id)
                .await
                .context("could not remove the sandbox")?;
        }
        volumes::remove(&self.pod_dir())?;
        let metadata = &self.pod.metadata;
        let text = |value: &Option<String>| value.clone().unwrap_or_default();
        let logs = self.shared.config.log_dir(
            &text(&metadata.namespace),
            &text(&metadata.name),
            &text(&metadata.uid),
        );
        let _ = std::fs::remove_dir_all(logs);
        if !self.gone {
            let api =
                Api::<Pod>::namespaced(self.shared.client.clone(), &text(&metadata.namespace));
            let params = DeleteParams {
                grace_period_seconds: Some(0),
                preconditions: Some(Preconditions {
                    uid: metadata.uid.clone(),
                    resource_version: None,
                }),
                ..DeleteParams::default()
            };
            match api.delete(&text(&metadata.name), &params).await {
                Err(kube::Error::Api(status)) if matches!(status.code, 404 | 409) => {}
                other => {
                    other.context("could not delete the pod")?;
                }
            }
        }
        Ok(Step::Finished)
    }

    /// What is known of a container, for the status.
    fn known(&self, name: &str, state: &PodState) -> Known {
        let spec = self.pod.spec.as_ref().and_then(|s| {
            s.containers
                .iter()
                .chain(s.init_containers.iter().flatten())
                .find(|c| c.name == name)
        });
        let has = |probe: fn(&Container) -> bool| spec.is_some_and(probe);
        let latest = state.latest(name);
        let probed = latest
            .and_then(|c| self.probed.get(&c.id))
            .cloned()
            .unwrap_or_default();
        // A kubelet that was restarted believes what the last one wrote, until a probe says otherwise.
        let before = self.pod.status.as_ref().and_then(|s| {
            s.container_statuses
                .iter()
                .chain(&s.init_container_statuses)
                .flatten()
                .find(|c| c.name == name)
        });
        let same = before.filter(|before| {
            latest.is_some_and(|c| {
                before
                    .container_id
                    .as_deref()
                    .is_some_and(|id| id.ends_with(&c.id))
            })
        });
        let started = probed.started.unwrap_or_else(|| {
            !has(|c| c.startup_probe.is_some()) || same.is_some_and(|s| s.started == Some(true))
        });
        let ready = probed.ready.unwrap_or_else(|| {
            !has(|c| c.readiness_probe.is_some()) || same.is_some_and(|s| s.ready)
        });
        let leaving = self.pod.metadata.deletion_timestamp.is_some();
        Known {
            waiting: self.waiting.get(name).cloned(),
            started,
            ready: ready && !leaving,
        }
    }

    /// Starts the probes of running containers, and ends those of others.
    fn watch_probes(&mut self, state: &PodState) {
        let Some(spec) = self.pod.spec.clone() else {
            return;
        };
        let pod_ip = state
            .ready_sandbox()
            .and_then(|s| s.network.as_ref())
            .map(|network| network.ip.clone())
            .filter(|ip| !ip.is_empty());
        let pod_ip = pod_ip.unwrap_or_else(|| self.shared.config.node_ip.to_string());
        let running: Vec<&v1::ContainerStatus> = state
            .containers
            .iter()
            .filter(|c| c.state() == ContainerRunning)
            .collect();
        self.tasks.retain(|(id, _), task| {
            let keep = running.iter().any(|container| container.id == *id);
            if !keep {
                task.abort();
            }
            keep
        });
        self.probed
            .retain(|id, _| state.containers.iter().any(|container| container.id == *id));
        for container in spec
            .containers
            .iter()
            .chain(spec.init_containers.iter().flatten())
        {
            let Some(latest) = state
                .latest(&container.name)
                .filter(|c| c.state() == ContainerRunning)
            else {
                continue;
            };
            let started = self.known(&container.name, state).started;
            // The others begin when the startup probe has passed.
            let probes = [
                (
                    Kind::Startup,
                    container.startup_probe.as_ref().filter(|_| !started),
                ),
                (
                    Kind::Readiness,
                    container.readiness_probe.as_ref().filter(|_| started),
                ),
                (
                    Kind::Liveness,
                    container.liveness_probe.as_ref().filter(|_| started),
                ),
            ];
            for (kind, probe) in probes {
                let Some(probe) = probe else { continue };
                let key = (latest.id.clone(), kind);
                if self.tasks.contains_key(&key) {
                    continue;
                }
                let target = probes::Target {
                    container: container.clone(),
                    container_id: latest.id.clone(),
                    pod_ip: pod_ip.clone(),
                };
                let task = tokio::spawn(probes::run(
                    self.shared.runtime.clone(),
                    target,
                    kind,
                    probe.clone(),
                    self.verdicts.0.clone(),
                ));
                self.tasks.insert(key, task.abort_handle());
            }
        }
    }

    async fn write_status(&mut self, state: &PodState) -> Result<()> {
        let runtime_name = self
            .shared
            .runtime
            .version
            .split("://")
            .next()
            .unwrap_or_default()
            .to_owned();
        let new = {
            let known = |name: &str| self.known(name, state);
            status::pod_status(&Facts {
                pod: &self.pod,
                state,
                node_ip: self.shared.config.node_ip.to_string(),
                runtime_name: &runtime_name,
                known: &known,
                over: self.over.clone(),
            })
        };
        if self.pod.status.as_ref() == Some(&new) {
            return Ok(());
        }
        let api = Api::<Pod>::namespaced(
            self.shared.client.clone(),
            self.pod.metadata.namespace.as_deref().unwrap_or_default(),
        );
        let mut status = serde_json::to_value(&new).context("could not encode the status")?;
        // What is not said any more must go, which a merge does by null.
        for key in ["reason", "message"] {
            if status.get(key).is_none()
                && self.pod.status.as_ref().is_some_and(|old| {
                    if key == "reason" {
                        old.reason.is_some()
                    } else {
                        old.message.is_some()
                    }
                })
            {
                status[key] = serde_json::Value::Null;
            }
        }
        let patch = serde_json::json!({"metadata": {"uid": self.uid()}, "status": status});
        match api
            .patch_status(
                self.pod.metadata.name.as_deref().unwrap_or_default(),
                &PatchParams::default(),
                &Patch::Merge(patch),
            )
            .await
        {
            Ok(pod) => {
                self.pod.status = pod.status;
                Ok(())
            }
            Err(kube::Error::Api(status)) if status.code == 404 => Ok(()),
            Err(error) => Err(error).context("could not write the pod's status"),
        }
    }
}

/// Whether a container belongs to this sandbox: it was made after it.
fn in_sandbox(
    container: &v1::ContainerStatus,
    state: &PodState,
    sandbox: &v1::PodSandboxStatus,
) -> bool {
    state.sandboxes.len() <= 1 || container.created_at >= sandbox.created_at
}
