//! Containers that are to run: pulled, made, started, and started again.

use super::*;

impl Worker {
    /// Starts a container that is not there, restarts one that has ended as the policy says, ends one that is not alive.
    pub(super) async fn keep_running(
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
                    let probe = if probed.live == Some(false) {
                        &spec.liveness_probe
                    } else {
                        &spec.startup_probe
                    };
                    let grace = probe
                        .as_ref()
                        .and_then(|probe| probe.termination_grace_period_seconds)
                        .unwrap_or(self.grace());
                    let stop = self
                        .stopper(grace)
                        .stop(Some(spec.clone()), container.id.clone());
                    self.meanwhile(false, stop).await??;
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
    pub(super) async fn start(
        &mut self,
        spec: &Container,
        sandbox: &v1::PodSandboxStatus,
        restarts: i32,
    ) -> Result<()> {
        // What happens to the pod meanwhile is no reason to try again earlier.
        if let Some(at) = self.not_before.get(&spec.name).copied() {
            if at > Instant::now() {
                self.wake_at(at);
                return Ok(());
            }
        }
        let Some(image) = self.ensure_image(spec).await? else {
            return Ok(());
        };
        let ips = self.pod_ips(sandbox);
        let shared = self.shared.clone();
        let sources = Sources {
            client: &shared.client,
            pod: &self.pod,
            node_name: &shared.config.node_name,
            node_ips: &shared.config.node_ips,
            pod_ips: &ips,
        };
        let mounts = self
            .mounts
            .as_ref()
            .map(|(mounts, _)| mounts.clone())
            .unwrap_or_default();
        let configured = async {
            let given = Given {
                image: &image,
                env: env::environment(&sources, spec).await?,
                mounts: &mounts,
                restarts,
                pod_dir: &self.pod_dir(),
                pod_ips: &ips,
            };
            container::container(&self.pod, spec, given)
        };
        let (config, bound) = match configured.await {
            Ok(configured) => configured,
            Err(error) => {
                let reason = "CreateContainerConfigError";
                self.could_not_start(spec, reason, &error).await;
                return Ok(());
            }
        };
        let logs = shared.config.log_dir(&self.pod.metadata).join(&spec.name);
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
        drop(bound);
        match made {
            Ok(id) => {
                self.waiting.remove(&spec.name);
                self.not_before.remove(&spec.name);
                shared
                    .teller
                    .normal(
                        &self.pod,
                        Some(&spec.name),
                        "Started",
                        format!("Container started: {}", spec.name),
                    )
                    .await;
                let ip = ips.first().map_or("", String::as_str);
                self.post_start(spec, &id, ip).await?;
                Ok(())
            }
            Err((reason, error)) => {
                self.could_not_start(spec, reason, &error).await;
                Ok(())
            }
        }
    }

    /// The postStart hook; a container whose hook fails is ended.
    async fn post_start(&mut self, spec: &Container, id: &str, ip: &str) -> Result<()> {
        let Some(hook) = spec.lifecycle.as_ref().and_then(|l| l.post_start.as_ref()) else {
            return Ok(());
        };
        let runtime = self.shared.runtime.clone();
        let hook = stop::run_hook(&runtime, hook, spec, id, ip);
        if let Err(error) = self.meanwhile(true, hook).await? {
            let note = format!("PostStartHook failed: {error:#}");
            self.shared
                .teller
                .warning(&self.pod, Some(&spec.name), "FailedPostStartHook", note)
                .await;
            let stop = self
                .stopper(self.grace())
                .stop(Some(spec.clone()), id.to_owned());
            self.meanwhile(false, stop).await??;
        }
        Ok(())
    }

    /// Says why a container does not start, and when it is tried again.
    async fn could_not_start(&mut self, spec: &Container, reason: &str, error: &anyhow::Error) {
        let message = format!("{error:#}");
        warn!(
            pod = self.key(),
            container = spec.name,
            reason,
            message,
            "could not start the container"
        );
        let note = format!("Error: {message}");
        self.waiting
            .insert(spec.name.clone(), (reason.into(), message));
        self.shared
            .teller
            .warning(&self.pod, Some(&spec.name), "Failed", note)
            .await;
        let again = Instant::now() + START_AGAIN;
        self.not_before.insert(spec.name.clone(), again);
        self.wake_at(again);
    }

    /// The image by its pull policy; none while it is not there.
    pub(super) async fn ensure_image(&mut self, spec: &Container) -> Result<Option<v1::Image>> {
        let image = spec.image.clone().unwrap_or_default();
        let runtime = self.shared.runtime.clone();
        let policy = spec.image_pull_policy.as_deref().unwrap_or("IfNotPresent");
        let present = match runtime.image(&image).await {
            Ok(present) => present,
            Err(error) => {
                let error = error.context(format!("Failed to inspect image {image:?}"));
                self.could_not_start(spec, "ImageInspectError", &error)
                    .await;
                return Ok(None);
            }
        };
        match (policy, present) {
            ("Always", _) | (_, None) if policy != "Never" => {}
            (_, Some(found)) => return Ok(Some(found)),
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
            let cause = self.pull_errors.get(&image);
            let shown = match cause {
                Some(cause) => format!("{message}: ErrImagePull: {cause}"),
                None => message.clone(),
            };
            self.waiting
                .insert(spec.name.clone(), ("ImagePullBackOff".into(), shown));
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
        let (auths, missing) =
            pull_secrets::credentials(&self.shared.client, &self.pod, &image).await;
        if !missing.is_empty() {
            let note = format!(
                "Unable to retrieve some image pull secrets ({}); attempting to pull the image may not succeed.",
                missing.join(", ")
            );
            self.shared
                .teller
                .warning(&self.pod, None, "FailedToRetrieveImagePullSecret", note)
                .await;
        }
        let started = Instant::now();
        match self.meanwhile(true, runtime.pull(&image, auths)).await? {
            Ok(_) => {
                self.backoff.clear(&key);
                self.pull_errors.remove(&image);
                let note = format!(
                    "Successfully pulled image {image:?} in {}ms",
                    started.elapsed().as_millis()
                );
                self.shared
                    .teller
                    .normal(&self.pod, Some(&spec.name), "Pulled", note)
                    .await;
                let found = runtime.image(&image).await?;
                found
                    .map(Some)
                    .context("the runtime lost the image that it just pulled")
            }
            Err(error) => {
                let message = format!("Failed to pull image {image:?}: {error:#}");
                let cause = format!("{error:#}");
                self.waiting
                    .insert(spec.name.clone(), ("ErrImagePull".into(), cause.clone()));
                self.pull_errors.insert(image, cause);
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
}
