//! Containers and pods that are to end: hooks, signals, and what is removed afterwards.

use super::*;

impl Worker {
    pub(super) async fn hook(
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
    pub(super) async fn stop(&self, spec: &Container, id: &str, grace: i64) -> Result<()> {
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
    pub(super) async fn stop_all(&self, state: &PodState, grace: i64) -> Result<()> {
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
    pub(super) async fn terminate(&mut self, state: PodState) -> Result<Step> {
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
}
