//! What is known of a pod's containers, and its status in the API.

use super::*;

impl Worker {
    /// What is known of a container, for the status.
    pub(super) fn known(&self, name: &str, state: &PodState) -> Known {
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
        Known {
            waiting: self.waiting.get(name).cloned(),
            started,
            // Nothing else says of such a pod that it is about to end.
            ready: ready && self.over.is_none(),
        }
    }

    /// Adds to ended containers what they said at their end; each is read once.
    async fn hear_last_words(&mut self, state: &mut PodState) {
        let known = |id: &String| state.containers.iter().any(|c| c.id == *id);
        self.messages.retain(|id, _| known(id));
        let dir = self.pod_dir();
        for container in &mut state.containers {
            if container.state() != ContainerExited {
                continue;
            }
            let said = match self.messages.get(&container.id) {
                Some(said) => said.clone(),
                None => {
                    let name = container.labels.get(CONTAINER_NAME);
                    let spec = self.pod.spec.as_ref().and_then(|s| {
                        let all = s
                            .containers
                            .iter()
                            .chain(s.init_containers.iter().flatten());
                        all.into_iter().find(|c| Some(&c.name) == name)
                    });
                    let said = match spec {
                        Some(spec) => last_words::read(&dir, spec, container).await,
                        None => String::new(),
                    };
                    self.messages.insert(container.id.clone(), said.clone());
                    said
                }
            };
            if !said.is_empty() {
                let between = if container.message.is_empty() {
                    ""
                } else {
                    ": "
                };
                container.message = format!("{}{between}{said}", container.message);
            }
        }
    }

    /// Starts the probes of running containers, and ends those of others.
    pub(super) fn watch_probes(&mut self, state: &PodState) {
        let Some(spec) = self.pod.spec.clone() else {
            return;
        };
        let sandbox = state.ready_sandbox();
        let pod_ip = sandbox.and_then(|s| self.pod_ips(s).into_iter().next());
        let pod_ip = pod_ip.unwrap_or_default();
        let running: Vec<&v1::ContainerStatus> = state
            .containers
            .iter()
            .filter(|c| c.state() == ContainerRunning)
            .collect();
        self.tasks
            .retain(|(id, _), _| running.iter().any(|container| container.id == *id));
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
                self.tasks.insert(key, AbortOnDropHandle::new(task));
            }
        }
    }

    pub(super) async fn write_status(&mut self, state: &PodState) -> Result<()> {
        let runtime_name = self
            .shared
            .runtime
            .version
            .split("://")
            .next()
            .unwrap_or_default()
            .to_owned();
        let mut heard = state.clone();
        self.hear_last_words(&mut heard).await;
        let runs = state
            .containers
            .iter()
            .any(|container| container.state() == ContainerRunning);
        let new = {
            let known = |name: &str| self.known(name, state);
            status::pod_status(&Facts {
                pod: &self.pod,
                state: &heard,
                node_ips: self.shared.config.node_addresses(),
                runtime_name: &runtime_name,
                known: &known,
                // A pod has not failed before its last container has ended.
                over: self.over.clone().filter(|_| !runs),
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
