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
use tokio::sync::{mpsc, watch};
use tokio_util::task::AbortOnDropHandle;
use tracing::{debug, warn};
use xebec_cri_api::v1;
use xebec_cri_api::v1::ContainerState::{ContainerExited, ContainerRunning};

use crate::backoff::Backoff;
use crate::config::Config;
use crate::container::{self, Given};
use crate::env::{self, Sources};
use crate::events::Teller;
use crate::last_words;
use crate::probes::{self, Kind, Verdict};
use crate::pull_secrets;
use crate::runtime::{CONTAINER_NAME, PodState, Readiness, Runtime};
use crate::status::{self, Facts, Known};
use crate::tokens::Tokens;
use crate::volumes;

mod report;
mod start;
mod stop;

/// Projected volumes and tokens are looked at again this often.
const REFRESH: Duration = Duration::from_secs(60);
/// A failed step is tried again after this.
const RETRY: Duration = Duration::from_secs(2);

/// A pod that waits this long for the node's network says so.
const PATIENCE: Duration = Duration::from_secs(2);

/// A sandbox or a container that could not be made or started is tried again after this.
const START_AGAIN: Duration = Duration::from_secs(10);

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
    /// What the runtime last said of itself and of the network; none before it was asked.
    pub readiness: watch::Receiver<Option<Readiness>>,
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
    wakes: mpsc::UnboundedReceiver<Wake>,
    /// When the pod must have ended, once it is to end.
    limit: watch::Sender<Option<Instant>>,
    /// The pod has ended for good, and what it used is given back.
    settled: bool,
    /// The object is gone from the API.
    gone: bool,
    backoff: Backoff,
    /// What a container waits for: reason and message, by its name.
    waiting: HashMap<String, (String, String)>,
    /// When a container that could not be started is tried again, by its name.
    not_before: HashMap<String, Instant>,
    /// What containers said at their end, by container id.
    messages: HashMap<String, String>,
    /// Why an image could not be pulled, by its name.
    pull_errors: HashMap<String, String>,
    /// By container id.
    probed: HashMap<String, Probed>,
    tasks: HashMap<(String, Kind), AbortOnDropHandle<()>>,
    verdicts: (
        mpsc::UnboundedSender<Verdict>,
        mpsc::UnboundedReceiver<Verdict>,
    ),
    mounts: Option<(volumes::Mounts, Instant)>,
    tokens: Tokens,
    sandbox_attempt: u32,
    /// When a sandbox that could not be made is tried again.
    sandbox_at: Option<Instant>,
    /// Since when the pod waits for the node's network, and whether an event says so.
    waits_for_network: Option<(Instant, bool)>,
    over: Option<(&'static str, String, String)>,
    /// Earliest time at which there is something to do without being told.
    next: Option<Instant>,
    /// Something was told while a step was under way, which may have looked before.
    woken: bool,
}

/// Whether the worker goes on.
#[derive(PartialEq)]
enum Step {
    GoOn,
    Finished,
}

impl Worker {
    pub(crate) fn new(shared: Shared, pod: Pod, wakes: mpsc::UnboundedReceiver<Wake>) -> Self {
        let mut worker = Self {
            shared,
            pod,
            wakes,
            limit: watch::channel(None).0,
            settled: false,
            gone: false,
            backoff: Backoff::default(),
            waiting: HashMap::new(),
            not_before: HashMap::new(),
            messages: HashMap::new(),
            pull_errors: HashMap::new(),
            probed: HashMap::new(),
            tasks: HashMap::new(),
            verdicts: mpsc::unbounded_channel(),
            mounts: None,
            tokens: Tokens::default(),
            sandbox_attempt: 0,
            sandbox_at: None,
            waits_for_network: None,
            over: None,
            next: None,
            woken: false,
        };
        worker.note_leaving();
        worker
    }

    /// Runs until the pod is gone and cleaned up.
    pub(crate) async fn run(mut self) {
        loop {
            self.next = None;
            self.woken = false;
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
            if self.woken && !self.wakes.is_closed() {
                continue;
            }
            let next = self.next;
            let sleep = async {
                match next {
                    Some(at) => tokio::time::sleep_until(at.into()).await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                biased;
                wake = self.wakes.recv() => match wake {
                    Some(wake) => self.take(wake),
                    None => break,
                },
                Some(verdict) = self.verdicts.1.recv() => self.judge(verdict).await,
                Ok(()) = self.shared.readiness.changed(), if self.waits_for_network.is_some() => {}
                () = sleep => {}
            }
            while let Ok(wake) = self.wakes.try_recv() {
                self.take(wake);
            }
        }
    }

    fn take(&mut self, wake: Wake) {
        self.woken = true;
        match wake {
            Wake::Pod(pod) => self.pod = *pod,
            Wake::Gone => self.gone = true,
            Wake::Runtime => {}
        }
        self.note_leaving();
    }

    fn is_leaving(&self) -> bool {
        self.gone || self.pod.metadata.deletion_timestamp.is_some()
    }

    /// Notes by when the pod must have ended. A second delete may bring that closer, nothing puts it off.
    fn note_leaving(&mut self) {
        if !self.is_leaving() {
            return;
        }
        let allowed = if self.gone { 1 } else { self.grace() };
        let limit = Instant::now() + Duration::from_secs(allowed as u64);
        self.limit.send_if_modified(|known| {
            let closer = known.is_none_or(|known| limit < known);
            if closer {
                *known = Some(limit);
            }
            closer
        });
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

    /// The pod's addresses, the primary one first; on the node's own network they are the node's.
    fn pod_ips(&self, sandbox: &v1::PodSandboxStatus) -> Vec<String> {
        let node = self.shared.config.node_addresses();
        let own = status::sandbox_ips(sandbox.network.as_ref(), &node);
        if own.is_empty() { node } else { own }
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
        if self.settled && !self.is_leaving() {
            return Ok(Step::GoOn);
        }
        let state = self
            .shared
            .runtime
            .pod(self.uid())
            .await
            .context("could not ask the container runtime")?;
        if self.is_leaving() {
            return self.terminate(state).await;
        }
        let phase = self.pod.status.as_ref().and_then(|s| s.phase.as_deref());
        if matches!(phase, Some("Succeeded" | "Failed")) {
            self.tasks.clear();
            let stop = self.stopper(self.grace()).stop_all(state);
            self.meanwhile(false, stop).await??;
            // Logs and ended containers stay until the object goes; memory and disk are given back now.
            volumes::remove(&self.pod_dir())?;
            self.settled = true;
            return Ok(Step::GoOn);
        }
        self.check_deadline();
        if self.over.is_some() {
            let stop = self.stopper(self.grace()).stop_all(state);
            if self.attend(stop).await.transpose()?.is_none() {
                return Ok(Step::Finished);
            }
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

    /// Whether the pod can get a network, or needs none. Where not, the worker wakes once that changes.
    async fn has_network(&mut self) -> bool {
        let known = self.shared.readiness.borrow_and_update().clone();
        let hosts = self.pod.spec.as_ref().and_then(|s| s.host_network) == Some(true);
        if hosts || known.as_ref().is_some_and(|known| known.network.is_none()) {
            self.waits_for_network = None;
            return true;
        }
        let now = Instant::now();
        let (since, is_told) = *self.waits_for_network.get_or_insert((now, false));
        // That a node which starts has no network for a moment is no news.
        match known.and_then(|known| known.network) {
            _ if is_told => {}
            Some(why) if now >= since + PATIENCE => {
                self.waits_for_network = Some((since, true));
                let note = format!("network is not ready: {why}");
                self.shared
                    .teller
                    .warning(&self.pod, None, "NetworkNotReady", note)
                    .await;
            }
            _ if now < since + PATIENCE => self.wake_at(since + PATIENCE),
            // Nobody has asked the runtime yet; who does so wakes the worker.
            _ => {}
        }
        false
    }

    async fn make_sandbox(&mut self, state: &PodState) -> Result<Option<v1::PodSandboxStatus>> {
        if !self.has_network().await {
            return Ok(None);
        }
        if let Some(at) = self.sandbox_at.filter(|at| *at > Instant::now()) {
            self.wake_at(at);
            return Ok(None);
        }
        for old in &state.sandboxes {
            self.shared.runtime.stop_sandbox(&old.id).await?;
        }
        let logs = self.shared.config.log_dir(&self.pod.metadata);
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
                self.sandbox_at = None;
                let state = self.shared.runtime.pod(self.uid()).await?;
                Ok(state.sandboxes.into_iter().find(|sandbox| sandbox.id == id))
            }
            Err(error) => {
                self.sandbox_attempt += 1;
                let again = Instant::now() + START_AGAIN;
                self.sandbox_at = Some(again);
                self.wake_at(again);
                let note = format!("Failed to create pod sandbox: {error:#}");
                warn!(pod = self.key(), note);
                self.shared
                    .teller
                    .warning(&self.pod, None, "FailedCreatePodSandBox", note)
                    .await;
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
        let ips = self.pod_ips(sandbox);
        let pod_dir = self.pod_dir();
        let sources = Sources {
            client: &self.shared.client,
            pod: &self.pod,
            node_name: &self.shared.config.node_name,
            node_ips: &self.shared.config.node_ips,
            pod_ips: &ips,
        };
        let first = self.mounts.is_none();
        match volumes::prepare(&sources, &pod_dir, &mut self.tokens, first).await {
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
}

/// Whether a container belongs to this sandbox: it was made after it.
fn in_sandbox(
    container: &v1::ContainerStatus,
    state: &PodState,
    sandbox: &v1::PodSandboxStatus,
) -> bool {
    state.sandboxes.len() <= 1 || container.created_at >= sandbox.created_at
}
