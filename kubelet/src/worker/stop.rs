//! Containers and pods that are to end: hooks, signals, and what is removed afterwards.

use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;

use super::*;

/// When what is being stopped must have ended; it only ever comes closer.
pub(super) type Limit = watch::Receiver<Option<Instant>>;

/// No container gets less than this to end by itself.
const LEAST_GRACE: Duration = Duration::from_secs(1);
/// A hook that used up the grace leaves this for the signal.
const AFTER_HOOK: Duration = Duration::from_secs(2);

/// What stopping needs, so that the worker can listen meanwhile.
#[derive(Clone)]
pub(super) struct Stopper {
    pub shared: Shared,
    pub pod: Pod,
    pub limit: Limit,
    pub grace: i64,
}

impl Stopper {
    /// When the grace is over: the container's own, or earlier if the whole pod must be gone by then.
    fn deadline(&mut self, started: Instant) -> Instant {
        let own = started + Duration::from_secs(self.grace.max(0) as u64);
        let pods = *self.limit.borrow_and_update();
        pods.map_or(own, |limit| limit.min(own))
    }

    /// Ready when the deadline may have come closer; never if nobody can say so.
    async fn hurried(&mut self) {
        if self.limit.changed().await.is_err() {
            std::future::pending().await
        }
    }

    /// preStop hook, SIGTERM, and SIGKILL once the grace is over; all within the grace, also if that is cut short.
    pub(super) async fn stop(mut self, spec: Option<Container>, id: String) -> Result<()> {
        let started = Instant::now();
        let hook = spec
            .as_ref()
            .and_then(|spec| Some((spec, spec.lifecycle.as_ref()?.pre_stop.as_ref()?)));
        let mut least = LEAST_GRACE;
        if let Some((spec, hook)) = hook.filter(|_| self.grace > 0) {
            least = AFTER_HOOK;
            let ip = self.pod.status.as_ref().and_then(|s| s.pod_ip.clone());
            let ip = ip.unwrap_or_default();
            let runtime = self.shared.runtime.clone();
            let mut running = std::pin::pin!(run_hook(&runtime, hook, spec, &id, &ip));
            let outcome = loop {
                let deadline = self.deadline(started);
                tokio::select! {
                    outcome = &mut running => break outcome,
                    () = tokio::time::sleep_until(deadline.into()) => {
                        break Err(anyhow::anyhow!("not done within the grace period"));
                    }
                    () = self.hurried() => least = LEAST_GRACE,
                }
            };
            if let Err(error) = outcome {
                let note = format!("PreStopHook failed: {error:#}");
                self.shared
                    .teller
                    .warning(&self.pod, Some(&spec.name), "FailedPreStopHook", note)
                    .await;
            }
        }
        let runtime = self.shared.runtime.clone();
        loop {
            let left = self
                .deadline(started)
                .saturating_duration_since(Instant::now())
                .max(least);
            // Whole seconds, rounded up.
            let seconds = left.as_secs() + u64::from(left.subsec_nanos() > 0);
            tokio::select! {
                stopped = runtime.stop_container(&id, seconds as i64) => return stopped,
                // Asked again with less time, the runtime does not wait for the first one.
                () = self.hurried() => least = LEAST_GRACE,
            }
        }
    }

    /// Stops every running container, all at once but for the sidecars, which follow in reverse order; then the sandbox.
    pub(super) async fn stop_all(self, state: PodState) -> Result<()> {
        let spec = self.pod.spec.clone().unwrap_or_default();
        let inits: Vec<Container> = spec.init_containers.unwrap_or_default();
        let sidecar = |name: &str| {
            inits
                .iter()
                .position(|c| c.name == name && status::is_sidecar(c))
        };
        let all: Vec<&Container> = spec.containers.iter().chain(&inits).collect();
        let mut groups: Vec<Vec<_>> = vec![Vec::new(); inits.len() + 1];
        for container in &state.containers {
            // One that was made and never started is not waited for.
            if container.state() == ContainerRunning {
                let name = container.labels.get(CONTAINER_NAME).cloned();
                let name = name.unwrap_or_default();
                let group = sidecar(&name).map_or(0, |at| inits.len() - at);
                let spec = all.iter().find(|c| c.name == name).map(|c| (*c).clone());
                groups[group].push((name, spec, container.id.clone()));
            }
        }
        for group in groups {
            let stops = group.into_iter().map(|(name, spec, id)| {
                let this = self.clone();
                async move {
                    let note = format!("Stopping container {name}");
                    this.shared
                        .teller
                        .normal(&this.pod, Some(&name), "Killing", note)
                        .await;
                    this.stop(spec, id).await
                }
            });
            for stopped in futures::future::join_all(stops).await {
                stopped.context("could not stop a container")?;
            }
        }
        let ready = |s: &&v1::PodSandboxStatus| s.state() == v1::PodSandboxState::SandboxReady;
        for sandbox in state.sandboxes.iter().filter(ready) {
            self.shared
                .runtime
                .stop_sandbox(&sandbox.id)
                .await
                .context("could not stop the sandbox")?;
        }
        Ok(())
    }
}

/// One handler of a container's lifecycle.
pub(super) async fn run_hook(
    runtime: &Runtime,
    hook: &LifecycleHandler,
    spec: &Container,
    id: &str,
    ip: &str,
) -> Result<()> {
    if let Some(exec) = &hook.exec {
        let command = exec.command.clone().unwrap_or_default();
        // No limit of its own: it is waited for as long as its container may take.
        let (code, output) = runtime.exec_sync(id, command, Duration::ZERO).await?;
        anyhow::ensure!(
            code == 0,
            "command exited with {code}: {}",
            String::from_utf8_lossy(&output).trim()
        );
    }
    if let Some(get) = &hook.http_get {
        let port = match &get.port {
            IntOrString::String(name) if name.is_empty() => 80,
            port => probes::port_of(spec, port).context("the hook's port is not known")?,
        };
        // Any answer will do: a hook tells, it does not ask.
        probes::http::get(get, ip, port).await?;
    }
    if let Some(sleep) = &hook.sleep {
        tokio::time::sleep(Duration::from_secs(sleep.seconds.max(0) as u64)).await;
    }
    Ok(())
}

impl Worker {
    pub(super) fn stopper(&self, grace: i64) -> Stopper {
        Stopper {
            shared: self.shared.clone(),
            pod: self.pod.clone(),
            limit: self.limit.subscribe(),
            grace,
        }
    }

    /// Ends the pod, says how it ended, and lets the API forget it.
    pub(super) async fn terminate(&mut self, state: PodState) -> Result<Step> {
        // Readiness goes on: whether an ending pod still serves is its own to say.
        self.tasks.retain(|(_, kind), _| *kind == Kind::Readiness);
        let stop = self.stopper(i64::from(u32::MAX)).stop_all(state);
        if self.attend(stop).await.transpose()?.is_none() {
            return Ok(Step::Finished);
        }
        self.tasks.clear();
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
        let logs = self.shared.config.log_dir(&self.pod.metadata);
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

    /// Waits for something slow, and keeps the pod's status true while containers end one by one.
    /// None once there is nobody left to wake the pod.
    pub(super) async fn attend<T>(&mut self, slow: impl Future<Output = T>) -> Option<T> {
        let mut slow = std::pin::pin!(slow);
        loop {
            if !self.gone {
                let told = match self.shared.runtime.pod(self.uid()).await {
                    Ok(state) => self.write_status(&state).await,
                    Err(error) => Err(error),
                };
                if let Err(error) = told {
                    let error = format!("{error:#}");
                    warn!(pod = self.key(), error, "could not write the status");
                }
            }
            tokio::select! {
                out = &mut slow => return Some(out),
                wake = self.wakes.recv() => self.take(wake?),
                Some(verdict) = self.verdicts.1.recv() => self.judge(verdict).await,
            }
            while let Ok(wake) = self.wakes.try_recv() {
                self.take(wake);
            }
        }
    }

    /// Waits for something slow, while it is noted what the pod is woken for. It is dropped when the pod is to
    /// end and `for_life` says that it makes no sense then.
    pub(super) async fn meanwhile<T>(
        &mut self,
        for_life: bool,
        slow: impl Future<Output = T>,
    ) -> Result<T> {
        let mut slow = std::pin::pin!(slow);
        loop {
            if for_life && self.is_leaving() {
                anyhow::bail!("the pod is to end");
            }
            tokio::select! {
                out = &mut slow => return Ok(out),
                wake = self.wakes.recv() => match wake {
                    Some(wake) => self.take(wake),
                    None => anyhow::bail!("the kubelet is being stopped"),
                },
            }
        }
    }
}
