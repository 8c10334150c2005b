//! The container runtime, as CRI v1 shows it.

use std::collections::HashMap;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result};
use hyper_util::rt::TokioIo;
use tonic::transport::{Channel, Endpoint};
use xebec_cri_api::v1;
use xebec_cri_api::v1::image_service_client::ImageServiceClient;
use xebec_cri_api::v1::runtime_service_client::RuntimeServiceClient;

/// Labels that every kubelet puts on sandboxes and containers.
pub(crate) const POD_NAME: &str = "io.kubernetes.pod.name";
pub(crate) const POD_NAMESPACE: &str = "io.kubernetes.pod.namespace";
pub(crate) const POD_UID: &str = "io.kubernetes.pod.uid";
pub(crate) const CONTAINER_NAME: &str = "io.kubernetes.container.name";
/// Annotation with the number of restarts before this container.
pub(crate) const RESTARTS: &str = "io.kubernetes.container.restartCount";

/// Clients of both services.
#[derive(Clone)]
pub(crate) struct Runtime {
    runtime: RuntimeServiceClient<Channel>,
    images: ImageServiceClient<Channel>,
    /// Name and version, for the Node.
    pub version: String,
}

/// Why no pod can be run, and why none can get a network; none where they can.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Readiness {
    pub runtime: Option<String>,
    pub network: Option<String>,
}

impl Readiness {
    /// Reads the two conditions that every runtime has to give; what else it says of itself stops no pod.
    fn read(status: &v1::RuntimeStatus) -> Self {
        let why = |what: &str, kind: &str| {
            let found = status.conditions.iter().find(|c| c.r#type == kind);
            match found {
                None => Some(format!("{what} not ready: {kind} is not reported")),
                Some(condition) if condition.status => None,
                Some(condition) => Some(format!(
                    "{what} not ready: {kind}=false reason:{} message:{}",
                    condition.reason, condition.message
                )),
            }
        };
        Self {
            runtime: why("container runtime", "RuntimeReady"),
            network: why("container runtime network", "NetworkReady"),
        }
    }

    /// The message of a Node that is not ready.
    pub(crate) fn message(&self) -> Option<String> {
        match (&self.runtime, &self.network) {
            (Some(runtime), Some(network)) => Some(format!("[{runtime}, {network}]")),
            (runtime, network) => runtime.clone().or(network.clone()),
        }
    }
}

/// What the runtime has of one pod: sandboxes from the newest on, and all containers.
#[derive(Clone, Debug, Default)]
pub(crate) struct PodState {
    pub sandboxes: Vec<v1::PodSandboxStatus>,
    pub containers: Vec<v1::ContainerStatus>,
}

impl PodState {
    /// The sandbox that pods run in now.
    pub(crate) fn ready_sandbox(&self) -> Option<&v1::PodSandboxStatus> {
        self.sandboxes
            .first()
            .filter(|sandbox| sandbox.state() == v1::PodSandboxState::SandboxReady)
    }

    /// The newest container of this name.
    pub(crate) fn latest<'a>(&'a self, name: &'a str) -> Option<&'a v1::ContainerStatus> {
        self.of(name).max_by_key(|container| container.created_at)
    }

    /// The one before it.
    pub(crate) fn previous<'a>(&'a self, name: &'a str) -> Option<&'a v1::ContainerStatus> {
        let latest = self.latest(name)?.id.as_str();
        self.of(name)
            .filter(|container| container.id != latest)
            .max_by_key(|container| container.created_at)
    }

    pub(crate) fn of<'a>(&'a self, name: &'a str) -> impl Iterator<Item = &'a v1::ContainerStatus> {
        self.containers.iter().filter(move |container| {
            container
                .labels
                .get(CONTAINER_NAME)
                .is_some_and(|label| label == name)
        })
    }
}

impl Runtime {
    /// Connects, waiting a while for a runtime that is just being started.
    pub(crate) async fn connect(socket: &Path) -> Result<Self> {
        let path = socket.to_path_buf();
        let endpoint = Endpoint::from_static("http://cri");
        let connect = || {
            let path = path.clone();
            endpoint.connect_with_connector(tower::service_fn(move |_| {
                let path = path.clone();
                async move {
                    tokio::net::UnixStream::connect(path)
                        .await
                        .map(TokioIo::new)
                }
            }))
        };
        let mut tries = 0;
        let channel = loop {
            match connect().await {
                Ok(channel) => break channel,
                Err(_) if tries < 1500 => tries += 1,
                Err(error) => {
                    return Err(error).with_context(|| {
                        format!("no container runtime answers at {}", socket.display())
                    });
                }
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        };
        let mut runtime = RuntimeServiceClient::new(channel.clone());
        let version = runtime
            .version(v1::VersionRequest::default())
            .await
            .context("the container runtime does not speak CRI v1")?
            .into_inner();
        Ok(Self {
            runtime,
            images: ImageServiceClient::new(channel),
            version: format!("{}://{}", version.runtime_name, version.runtime_version),
        })
    }

    /// Events of all containers, as they happen.
    pub(crate) async fn events(&self) -> Result<tonic::Streaming<v1::ContainerEventResponse>> {
        Ok(self
            .runtime
            .clone()
            .get_container_events(v1::GetEventsRequest::default())
            .await
            .map_err(plain)?
            .into_inner())
    }

    /// Sets `over` once a container has ended, or the runtime does not know it any more.
    pub(crate) async fn tell_end(self, id: String, over: tokio::sync::watch::Sender<bool>) {
        let follow = async {
            loop {
                let events = self.events().await;
                // Asked once the stream is open: it may have ended before.
                if self.has_ended(&id).await {
                    break;
                }
                if let Ok(mut events) = events {
                    while let Ok(Some(event)) = events.message().await {
                        if event.container_id == id && self.has_ended(&id).await {
                            return;
                        }
                    }
                }
                // The runtime is being restarted, or has no events to give.
                tokio::time::sleep(Duration::from_secs(1)).await;
            }
        };
        tokio::select! {
            () = follow => drop(over.send(true)),
            () = over.closed() => {}
        }
    }

    async fn has_ended(&self, id: &str) -> bool {
        let request = v1::ContainerStatusRequest {
            container_id: id.to_owned(),
            verbose: false,
        };
        match self.runtime.clone().container_status(request).await {
            Ok(answer) => answer
                .into_inner()
                .status
                .is_none_or(|status| status.state() == v1::ContainerState::ContainerExited),
            Err(status) => status.code() == tonic::Code::NotFound,
        }
    }

    /// What the runtime says of itself and of the network.
    pub(crate) async fn readiness(&self) -> Result<Readiness> {
        let status = self
            .runtime
            .clone()
            .status(v1::StatusRequest::default())
            .await
            .map_err(plain)?
            .into_inner()
            .status
            .unwrap_or_default();
        Ok(Readiness::read(&status))
    }

    /// The pods that the runtime knows, by uid, with name and namespace.
    pub(crate) async fn known_pods(&self) -> Result<HashMap<String, (String, String)>> {
        let list = self
            .runtime
            .clone()
            .list_pod_sandbox(v1::ListPodSandboxRequest::default())
            .await
            .map_err(plain)?
            .into_inner();
        Ok(list
            .items
            .into_iter()
            .filter_map(|sandbox| {
                let label = |key: &str| sandbox.labels.get(key).cloned().unwrap_or_default();
                Some((
                    sandbox.labels.get(POD_UID)?.clone(),
                    (label(POD_NAMESPACE), label(POD_NAME)),
                ))
            })
            .collect())
    }

    /// All that the runtime has of one pod.
    pub(crate) async fn pod(&self, uid: &str) -> Result<PodState> {
        let label = HashMap::from([(POD_UID.to_owned(), uid.to_owned())]);
        let filter = v1::PodSandboxFilter {
            label_selector: label.clone(),
            ..Default::default()
        };
        let mut client = self.runtime.clone();
        let list = client
            .list_pod_sandbox(v1::ListPodSandboxRequest {
                filter: Some(filter),
            })
            .await
            .map_err(plain)?
            .into_inner();
        let mut state = PodState::default();
        for sandbox in list.items {
            let request = v1::PodSandboxStatusRequest {
                pod_sandbox_id: sandbox.id,
                verbose: false,
            };
            match client.pod_sandbox_status(request).await {
                Ok(status) => state.sandboxes.extend(status.into_inner().status),
                Err(status) if status.code() == tonic::Code::NotFound => {}
                Err(status) => return Err(plain(status)),
            }
        }
        state
            .sandboxes
            .sort_by_key(|sandbox| std::cmp::Reverse(sandbox.created_at));
        let filter = v1::ContainerFilter {
            label_selector: label,
            ..Default::default()
        };
        let list = client
            .list_containers(v1::ListContainersRequest {
                filter: Some(filter),
            })
            .await
            .map_err(plain)?
            .into_inner();
        for container in list.containers {
            let request = v1::ContainerStatusRequest {
                container_id: container.id,
                verbose: false,
            };
            match client.container_status(request).await {
                Ok(status) => state.containers.extend(status.into_inner().status),
                Err(status) if status.code() == tonic::Code::NotFound => {}
                Err(status) => return Err(plain(status)),
            }
        }
        Ok(state)
    }

    pub(crate) async fn run_sandbox(&self, config: v1::PodSandboxConfig) -> Result<String> {
        let request = v1::RunPodSandboxRequest {
            config: Some(config),
            runtime_handler: String::new(),
        };
        Ok(self
            .runtime
            .clone()
            .run_pod_sandbox(request)
            .await
            .map_err(plain)?
            .into_inner()
            .pod_sandbox_id)
    }

    pub(crate) async fn stop_sandbox(&self, id: &str) -> Result<()> {
        let request = v1::StopPodSandboxRequest {
            pod_sandbox_id: id.to_owned(),
        };
        self.runtime
            .clone()
            .stop_pod_sandbox(request)
            .await
            .map(drop)
            .map_err(plain)
    }

    pub(crate) async fn remove_sandbox(&self, id: &str) -> Result<()> {
        let request = v1::RemovePodSandboxRequest {
            pod_sandbox_id: id.to_owned(),
        };
        self.runtime
            .clone()
            .remove_pod_sandbox(request)
            .await
            .map(drop)
            .map_err(plain)
    }

    pub(crate) async fn create_container(
        &self,
        sandbox: &str,
        config: v1::ContainerConfig,
        sandbox_config: v1::PodSandboxConfig,
    ) -> Result<String> {
        let request = v1::CreateContainerRequest {
            pod_sandbox_id: sandbox.to_owned(),
            config: Some(config),
            sandbox_config: Some(sandbox_config),
        };
        Ok(self
            .runtime
            .clone()
            .create_container(request)
            .await
            .map_err(plain)?
            .into_inner()
            .container_id)
    }

    pub(crate) async fn start_container(&self, id: &str) -> Result<()> {
        let request = v1::StartContainerRequest {
            container_id: id.to_owned(),
        };
        self.runtime
            .clone()
            .start_container(request)
            .await
            .map(drop)
            .map_err(plain)
    }

    /// SIGTERM, and SIGKILL after `grace` seconds.
    pub(crate) async fn stop_container(&self, id: &str, grace: i64) -> Result<()> {
        let request = v1::StopContainerRequest {
            container_id: id.to_owned(),
            timeout: grace,
        };
        self.runtime
            .clone()
            .stop_container(request)
            .await
            .map(drop)
            .map_err(plain)
    }

    pub(crate) async fn remove_container(&self, id: &str) -> Result<()> {
        let request = v1::RemoveContainerRequest {
            container_id: id.to_owned(),
        };
        self.runtime
            .clone()
            .remove_container(request)
            .await
            .map(drop)
            .map_err(plain)
    }

    /// Runs a command in a container; its exit code and output.
    pub(crate) async fn exec_sync(
        &self,
        id: &str,
        command: Vec<String>,
        timeout: Duration,
    ) -> Result<(i32, Vec<u8>)> {
        let request = v1::ExecSyncRequest {
            container_id: id.to_owned(),
            cmd: command,
            timeout: timeout.as_secs() as i64,
        };
        let answer = self
            .runtime
            .clone()
            .exec_sync(request)
            .await
            .map_err(plain)?
            .into_inner();
        Ok((answer.exit_code, [answer.stdout, answer.stderr].concat()))
    }

    /// URL of a stream.
    pub(crate) async fn exec_url(&self, request: v1::ExecRequest) -> Result<String> {
        Ok(self
            .runtime
            .clone()
            .exec(request)
            .await
            .map_err(plain)?
            .into_inner()
            .url)
    }

    /// URL of a stream.
    pub(crate) async fn attach_url(&self, request: v1::AttachRequest) -> Result<String> {
        Ok(self
            .runtime
            .clone()
            .attach(request)
            .await
            .map_err(plain)?
            .into_inner()
            .url)
    }

    /// URL of a stream.
    pub(crate) async fn port_forward_url(&self, request: v1::PortForwardRequest) -> Result<String> {
        Ok(self
            .runtime
            .clone()
            .port_forward(request)
            .await
            .map_err(plain)?
            .into_inner()
            .url)
    }

    /// The image, if the runtime has it.
    pub(crate) async fn image(&self, image: &str) -> Result<Option<v1::Image>> {
        let spec = v1::ImageSpec {
            image: image.to_owned(),
            ..Default::default()
        };
        let request = v1::ImageStatusRequest {
            image: Some(spec),
            verbose: false,
        };
        let status = self
            .images
            .clone()
            .image_status(request)
            .await
            .map_err(plain)?
            .into_inner();
        Ok(status.image)
    }

    /// Pulls an image with one of these credentials, or without any where there is none.
    pub(crate) async fn pull(&self, image: &str, tries: Vec<v1::AuthConfig>) -> Result<()> {
        let mut tries = tries.into_iter().map(Some).collect::<Vec<_>>();
        if tries.is_empty() {
            tries.push(None);
        }
        let mut errors: Vec<String> = Vec::new();
        for auth in tries {
            match self.pull_once(image, auth).await {
                Ok(()) => return Ok(()),
                Err(error) => errors.push(format!("{error:#}")),
            }
        }
        errors.dedup();
        anyhow::bail!("{}", errors.join("; "))
    }

    async fn pull_once(&self, image: &str, auth: Option<v1::AuthConfig>) -> Result<()> {
        let spec = v1::ImageSpec {
            image: image.to_owned(),
            ..Default::default()
        };
        let request = v1::PullImageRequest {
            image: Some(spec),
            auth,
            ..Default::default()
        };
        self.images
            .clone()
            .pull_image(request)
            .await
            .map(drop)
            .map_err(plain)
    }

    /// Images for the Node's status, as (names, bytes).
    pub(crate) async fn list_images(&self) -> Result<Vec<(Vec<String>, i64)>> {
        let list = self
            .images
            .clone()
            .list_images(v1::ListImagesRequest::default())
            .await
            .map_err(plain)?
            .into_inner();
        Ok(list
            .images
            .into_iter()
            .map(|image| {
                (
                    [image.repo_digests, image.repo_tags].concat(),
                    image.size as i64,
                )
            })
            .collect())
    }
}

/// The message of a status: what the runtime says, without gRPC's frame around it.
fn plain(status: tonic::Status) -> anyhow::Error {
    anyhow::anyhow!("{}", status.message())
}
