//! The CRI RuntimeService: messages in, messages out.

use std::collections::HashMap;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use futures::{Stream, StreamExt, stream};
use tokio_stream::wrappers::BroadcastStream;
use tonic::{Request, Response, Status};
use xebec_cri_api::v1;
use xebec_cri_api::v1::runtime_service_server::RuntimeService;
use xebec_shim::protocol::Request as ShimRequest;

use crate::container::ExecError;
use crate::records::{Container, Phase, Sandbox};
use crate::runtime::Runtime;
use crate::streaming::tokens::{Streams, Target};
use crate::{shim_client, stats, status};

/// The service; all work is done by [`Runtime`].
pub struct Service(pub Arc<Runtime>);

type Answer<T> = Result<Response<T>, Status>;
type Flow<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

/// What goes wrong in the runtime is `Unknown`, as with other runtimes.
fn unknown(err: anyhow::Error) -> Status {
    Status::unknown(format!("{err:#}"))
}

fn missing(what: &str) -> Status {
    Status::invalid_argument(format!("the request has no {what}"))
}

fn no_such(what: &str, id: &str) -> Status {
    Status::not_found(format!(
        "an error occurred when try to find {what} {id:?}: not found"
    ))
}

/// A URL for a stream, or why there is none.
fn issue(runtime: &Runtime, target: Target) -> Result<String, Status> {
    runtime
        .tokens
        .issue(target)
        .map_err(|err| Status::resource_exhausted(format!("{err:#}")))
}

fn checked(streams: Streams) -> Result<Streams, Status> {
    streams
        .check()
        .map_err(|err| Status::invalid_argument(format!("{err:#}")))
}

impl Service {
    fn sandbox(&self, id: &str) -> Result<Arc<Sandbox>, Status> {
        self.0
            .registry
            .sandbox(id)
            .ok_or_else(|| no_such("sandbox", id))
    }

    fn container(&self, id: &str) -> Result<Arc<Container>, Status> {
        self.0
            .registry
            .container(id)
            .ok_or_else(|| no_such("container", id))
    }

    fn sandboxes(&self, filter: Option<v1::PodSandboxFilter>) -> Vec<v1::PodSandbox> {
        let filter = filter.unwrap_or_default();
        self.0
            .registry
            .sandboxes()
            .iter()
            .filter(|s| s.id.starts_with(&filter.id))
            .filter(|s| status::selected(&s.config.labels, &filter.label_selector))
            .filter(|s| {
                filter
                    .state
                    .is_none_or(|wanted| wanted.state == status::sandbox_state(s) as i32)
            })
            .map(|s| status::sandbox_item(s))
            .collect()
    }

    fn containers(&self, filter: Option<v1::ContainerFilter>) -> Vec<v1::Container> {
        let filter = filter.unwrap_or_default();
        self.0
            .registry
            .containers()
            .iter()
            .filter(|c| c.id.starts_with(&filter.id))
            .filter(|c| status::selected(&c.config.labels, &filter.label_selector))
            .map(|c| status::container_item(c))
            .filter(|c| c.pod_sandbox_id.starts_with(&filter.pod_sandbox_id))
            .filter(|c| filter.state.is_none_or(|wanted| wanted.state == c.state))
            .collect()
    }

    fn container_stats(&self, filter: Option<v1::ContainerStatsFilter>) -> Vec<v1::ContainerStats> {
        let filter = filter.unwrap_or_default();
        self.0
            .registry
            .containers()
            .iter()
            .filter(|c| c.id.starts_with(&filter.id))
            .filter(|c| status::selected(&c.config.labels, &filter.label_selector))
            .filter(|c| {
                let record = c.record();
                record.phase == Phase::Running && record.sandbox.starts_with(&filter.pod_sandbox_id)
            })
            .map(|c| stats::container(c))
            .collect()
    }

    fn sandbox_stats(&self, filter: Option<v1::PodSandboxStatsFilter>) -> Vec<v1::PodSandboxStats> {
        let filter = filter.unwrap_or_default();
        self.0
            .registry
            .sandboxes()
            .iter()
            .filter(|s| s.id.starts_with(&filter.id))
            .filter(|s| status::selected(&s.config.labels, &filter.label_selector))
            .filter(|s| s.record().ready)
            .map(|s| stats::sandbox(&self.0, s))
            .collect()
    }
}

/// A list in one message of a stream.
fn once<T: Send + 'static>(message: T) -> Answer<Flow<T>> {
    Ok(Response::new(Box::pin(stream::once(async { Ok(message) }))))
}

#[tonic::async_trait]
impl RuntimeService for Service {
    async fn version(&self, _: Request<v1::VersionRequest>) -> Answer<v1::VersionResponse> {
        Ok(Response::new(v1::VersionResponse {
            version: "0.1.0".to_owned(),
            runtime_name: "xebec".to_owned(),
            runtime_version: format!("v{}", env!("CARGO_PKG_VERSION")),
            runtime_api_version: "v1".to_owned(),
        }))
    }

    async fn run_pod_sandbox(
        &self,
        request: Request<v1::RunPodSandboxRequest>,
    ) -> Answer<v1::RunPodSandboxResponse> {
        let request = request.into_inner();
        let config = request.config.ok_or_else(|| missing("sandbox config"))?;
        let runtime = self.0.clone();
        // A client that goes away must not leave a half-made sandbox.
        let sandbox =
            tokio::spawn(async move { runtime.run_sandbox(config, request.runtime_handler).await })
                .await
                .map_err(|err| Status::internal(err.to_string()))?
                .map_err(unknown)?;
        for kind in [
            v1::ContainerEventType::ContainerCreatedEvent,
            v1::ContainerEventType::ContainerStartedEvent,
        ] {
            self.0.publish(&sandbox.id, &sandbox, kind);
        }
        Ok(Response::new(v1::RunPodSandboxResponse {
            pod_sandbox_id: sandbox.id.clone(),
        }))
    }

    async fn stop_pod_sandbox(
        &self,
        request: Request<v1::StopPodSandboxRequest>,
    ) -> Answer<v1::StopPodSandboxResponse> {
        if let Some(sandbox) = self.0.registry.sandbox(&request.get_ref().pod_sandbox_id) {
            self.0.stop_sandbox(&sandbox).await.map_err(unknown)?;
        }
        Ok(Response::new(v1::StopPodSandboxResponse {}))
    }

    async fn remove_pod_sandbox(
        &self,
        request: Request<v1::RemovePodSandboxRequest>,
    ) -> Answer<v1::RemovePodSandboxResponse> {
        if let Some(sandbox) = self.0.registry.sandbox(&request.get_ref().pod_sandbox_id) {
            self.0.remove_sandbox(&sandbox).await.map_err(unknown)?;
        }
        Ok(Response::new(v1::RemovePodSandboxResponse {}))
    }

    async fn pod_sandbox_status(
        &self,
        request: Request<v1::PodSandboxStatusRequest>,
    ) -> Answer<v1::PodSandboxStatusResponse> {
        let request = request.into_inner();
        let sandbox = self.sandbox(&request.pod_sandbox_id)?;
        let mut info = HashMap::new();
        if request.verbose {
            let record = serde_json::to_string(&sandbox.record())
                .map_err(|err| Status::internal(err.to_string()))?;
            info.insert("info".to_owned(), record);
        }
        Ok(Response::new(v1::PodSandboxStatusResponse {
            status: Some(status::sandbox(&sandbox)),
            info,
            containers_statuses: self
                .0
                .registry
                .containers_of(&sandbox.id)
                .iter()
                .map(|c| status::container(c, &sandbox))
                .collect(),
            timestamp: xebec_shim::log_file::now_nanos(),
        }))
    }

    async fn list_pod_sandbox(
        &self,
        request: Request<v1::ListPodSandboxRequest>,
    ) -> Answer<v1::ListPodSandboxResponse> {
        Ok(Response::new(v1::ListPodSandboxResponse {
            items: self.sandboxes(request.into_inner().filter),
        }))
    }

    type StreamPodSandboxesStream = Flow<v1::StreamPodSandboxesResponse>;

    async fn stream_pod_sandboxes(
        &self,
        request: Request<v1::StreamPodSandboxesRequest>,
    ) -> Answer<Self::StreamPodSandboxesStream> {
        once(v1::StreamPodSandboxesResponse {
            pod_sandboxes: self.sandboxes(request.into_inner().filter),
        })
    }

    async fn create_container(
        &self,
        request: Request<v1::CreateContainerRequest>,
    ) -> Answer<v1::CreateContainerResponse> {
        let request = request.into_inner();
        let sandbox = self.sandbox(&request.pod_sandbox_id)?;
        let config = request.config.ok_or_else(|| missing("container config"))?;
        let runtime = self.0.clone();
        let container =
            tokio::spawn(async move { runtime.create_container(&sandbox, config).await })
                .await
                .map_err(|err| Status::internal(err.to_string()))?
                .map_err(unknown)?;
        Ok(Response::new(v1::CreateContainerResponse {
            container_id: container.id.clone(),
        }))
    }

    async fn start_container(
        &self,
        request: Request<v1::StartContainerRequest>,
    ) -> Answer<v1::StartContainerResponse> {
        let container = self.container(&request.get_ref().container_id)?;
        let runtime = self.0.clone();
        tokio::spawn(async move { runtime.start_container(&container).await })
            .await
            .map_err(|err| Status::internal(err.to_string()))?
            .map_err(unknown)?;
        Ok(Response::new(v1::StartContainerResponse {}))
    }

    async fn stop_container(
        &self,
        request: Request<v1::StopContainerRequest>,
    ) -> Answer<v1::StopContainerResponse> {
        let request = request.into_inner();
        if let Some(container) = self.0.registry.container(&request.container_id) {
            let grace = Duration::from_secs(request.timeout.max(0) as u64);
            self.0
                .stop_container(&container, grace)
                .await
                .map_err(unknown)?;
        }
        Ok(Response::new(v1::StopContainerResponse {}))
    }

    async fn remove_container(
        &self,
        request: Request<v1::RemoveContainerRequest>,
    ) -> Answer<v1::RemoveContainerResponse> {
        if let Some(container) = self.0.registry.container(&request.get_ref().container_id) {
            self.0.remove_container(&container).await.map_err(unknown)?;
        }
        Ok(Response::new(v1::RemoveContainerResponse {}))
    }

    async fn list_containers(
        &self,
        request: Request<v1::ListContainersRequest>,
    ) -> Answer<v1::ListContainersResponse> {
        Ok(Response::new(v1::ListContainersResponse {
            containers: self.containers(request.into_inner().filter),
        }))
    }

    type StreamContainersStream = Flow<v1::StreamContainersResponse>;

    async fn stream_containers(
        &self,
        request: Request<v1::StreamContainersRequest>,
    ) -> Answer<Self::StreamContainersStream> {
        once(v1::StreamContainersResponse {
            containers: self.containers(request.into_inner().filter),
        })
    }

    async fn container_status(
        &self,
        request: Request<v1::ContainerStatusRequest>,
    ) -> Answer<v1::ContainerStatusResponse> {
        let request = request.into_inner();
        let container = self.container(&request.container_id)?;
        let sandbox = self.0.sandbox_of(&container).map_err(unknown)?;
        let mut info = HashMap::new();
        if request.verbose {
            let record = serde_json::to_string(&container.record())
                .map_err(|err| Status::internal(err.to_string()))?;
            info.insert("info".to_owned(), record);
        }
        Ok(Response::new(v1::ContainerStatusResponse {
            status: Some(status::container(&container, &sandbox)),
            info,
        }))
    }

    async fn update_container_resources(
        &self,
        request: Request<v1::UpdateContainerResourcesRequest>,
    ) -> Answer<v1::UpdateContainerResourcesResponse> {
        let request = request.into_inner();
        let container = self.container(&request.container_id)?;
        let resources = request.linux.ok_or_else(|| missing("linux resources"))?;
        stats::update(&container, &resources).map_err(unknown)?;
        Ok(Response::new(v1::UpdateContainerResourcesResponse {}))
    }

    async fn reopen_container_log(
        &self,
        request: Request<v1::ReopenContainerLogRequest>,
    ) -> Answer<v1::ReopenContainerLogResponse> {
        let container = self.container(&request.get_ref().container_id)?;
        if container.record().phase != Phase::Running {
            return Err(Status::unknown("container is not running"));
        }
        let socket = self
            .0
            .sandbox_of(&container)
            .map_err(unknown)?
            .record()
            .socket;
        let request = ShimRequest::ReopenLog {
            id: container.id.clone(),
        };
        shim_client::call(&socket, &request)
            .await
            .map_err(unknown)?;
        Ok(Response::new(v1::ReopenContainerLogResponse {}))
    }

    async fn exec_sync(
        &self,
        request: Request<v1::ExecSyncRequest>,
    ) -> Answer<v1::ExecSyncResponse> {
        let request = request.into_inner();
        let container = self.container(&request.container_id)?;
        let timeout = (request.timeout > 0).then(|| Duration::from_secs(request.timeout as u64));
        match self.0.exec_sync(&container, &request.cmd, timeout).await {
            Ok(output) => Ok(Response::new(v1::ExecSyncResponse {
                stdout: output.stdout,
                stderr: output.stderr,
                exit_code: output.exit_code,
            })),
            Err(ExecError::Timeout) => Err(Status::deadline_exceeded(format!(
                "failed to exec in container: timeout {}s exceeded: context deadline exceeded",
                request.timeout
            ))),
            Err(ExecError::Other(err)) => Err(unknown(err)),
        }
    }

    async fn exec(&self, request: Request<v1::ExecRequest>) -> Answer<v1::ExecResponse> {
        let request = request.into_inner();
        let container = self.container(&request.container_id)?;
        if container.record().phase != Phase::Running {
            return Err(Status::unknown("container is not running"));
        }
        if request.cmd.is_empty() {
            return Err(missing("command"));
        }
        let streams = checked(Streams {
            tty: request.tty,
            stdin: request.stdin,
            stdout: request.stdout,
            stderr: request.stderr,
        })?;
        let target = Target::Exec {
            container: container.id.clone(),
            command: request.cmd,
            streams,
        };
        let url = issue(&self.0, target)?;
        Ok(Response::new(v1::ExecResponse { url }))
    }

    async fn attach(&self, request: Request<v1::AttachRequest>) -> Answer<v1::AttachResponse> {
        let request = request.into_inner();
        let container = self.container(&request.container_id)?;
        if container.record().phase != Phase::Running {
            return Err(Status::unknown("container is not running"));
        }
        let streams = checked(Streams {
            tty: request.tty,
            stdin: request.stdin,
            stdout: request.stdout,
            stderr: request.stderr,
        })?;
        let target = Target::Attach {
            container: container.id.clone(),
            streams,
        };
        let url = issue(&self.0, target)?;
        Ok(Response::new(v1::AttachResponse { url }))
    }

    async fn port_forward(
        &self,
        request: Request<v1::PortForwardRequest>,
    ) -> Answer<v1::PortForwardResponse> {
        let request = request.into_inner();
        let sandbox = self.sandbox(&request.pod_sandbox_id)?;
        if !sandbox.record().ready {
            return Err(Status::unknown("sandbox is not running"));
        }
        let target = Target::PortForward {
            sandbox: sandbox.id.clone(),
        };
        let url = issue(&self.0, target)?;
        Ok(Response::new(v1::PortForwardResponse { url }))
    }

    async fn container_stats(
        &self,
        request: Request<v1::ContainerStatsRequest>,
    ) -> Answer<v1::ContainerStatsResponse> {
        let container = self.container(&request.get_ref().container_id)?;
        Ok(Response::new(v1::ContainerStatsResponse {
            stats: Some(stats::container(&container)),
        }))
    }

    async fn list_container_stats(
        &self,
        request: Request<v1::ListContainerStatsRequest>,
    ) -> Answer<v1::ListContainerStatsResponse> {
        Ok(Response::new(v1::ListContainerStatsResponse {
            stats: self.container_stats(request.into_inner().filter),
        }))
    }

    type StreamContainerStatsStream = Flow<v1::StreamContainerStatsResponse>;

    async fn stream_container_stats(
        &self,
        request: Request<v1::StreamContainerStatsRequest>,
    ) -> Answer<Self::StreamContainerStatsStream> {
        once(v1::StreamContainerStatsResponse {
            container_stats: self.container_stats(request.into_inner().filter),
        })
    }

    async fn pod_sandbox_stats(
        &self,
        request: Request<v1::PodSandboxStatsRequest>,
    ) -> Answer<v1::PodSandboxStatsResponse> {
        let sandbox = self.sandbox(&request.get_ref().pod_sandbox_id)?;
        Ok(Response::new(v1::PodSandboxStatsResponse {
            stats: Some(stats::sandbox(&self.0, &sandbox)),
        }))
    }

    async fn list_pod_sandbox_stats(
        &self,
        request: Request<v1::ListPodSandboxStatsRequest>,
    ) -> Answer<v1::ListPodSandboxStatsResponse> {
        Ok(Response::new(v1::ListPodSandboxStatsResponse {
            stats: self.sandbox_stats(request.into_inner().filter),
        }))
    }

    type StreamPodSandboxStatsStream = Flow<v1::StreamPodSandboxStatsResponse>;

    async fn stream_pod_sandbox_stats(
        &self,
        request: Request<v1::StreamPodSandboxStatsRequest>,
    ) -> Answer<Self::StreamPodSandboxStatsStream> {
        once(v1::StreamPodSandboxStatsResponse {
            pod_sandbox_stats: self.sandbox_stats(request.into_inner().filter),
        })
    }

    async fn update_runtime_config(
        &self,
        _: Request<v1::UpdateRuntimeConfigRequest>,
    ) -> Answer<v1::UpdateRuntimeConfigResponse> {
        // It carries the pod CIDR for runtimes that write CNI configurations;
        // here the network's own agent does that.
        Ok(Response::new(v1::UpdateRuntimeConfigResponse {}))
    }

    async fn status(&self, request: Request<v1::StatusRequest>) -> Answer<v1::StatusResponse> {
        let network = match self.0.cni.status().await {
            Ok(()) => v1::RuntimeCondition {
                r#type: "NetworkReady".to_owned(),
                status: true,
                ..v1::RuntimeCondition::default()
            },
            Err(err) => v1::RuntimeCondition {
                r#type: "NetworkReady".to_owned(),
                status: false,
                reason: "NetworkPluginNotReady".to_owned(),
                message: format!("Network plugin returns error: {err:#}"),
            },
        };
        let mut info = HashMap::new();
        if request.get_ref().verbose {
            info.insert("config".to_owned(), format!("{:?}", self.0.config));
        }
        Ok(Response::new(v1::StatusResponse {
            status: Some(v1::RuntimeStatus {
                conditions: vec![
                    v1::RuntimeCondition {
                        r#type: "RuntimeReady".to_owned(),
                        status: true,
                        ..v1::RuntimeCondition::default()
                    },
                    network,
                ],
            }),
            info,
            runtime_handlers: vec![v1::RuntimeHandler {
                name: String::new(),
                features: Some(v1::RuntimeHandlerFeatures::default()),
            }],
            features: Some(v1::RuntimeFeatures {
                supplemental_groups_policy: true,
                ..v1::RuntimeFeatures::default()
            }),
        }))
    }

    async fn checkpoint_container(
        &self,
        _: Request<v1::CheckpointContainerRequest>,
    ) -> Answer<v1::CheckpointContainerResponse> {
        Err(Status::unimplemented("checkpoints are not supported"))
    }

    type GetContainerEventsStream = Flow<v1::ContainerEventResponse>;

    async fn get_container_events(
        &self,
        _: Request<v1::GetEventsRequest>,
    ) -> Answer<Self::GetContainerEventsStream> {
        let events = BroadcastStream::new(self.0.events.subscribe()).map(|event| {
            // The subscriber lists everything anew after a broken stream.
            event.map_err(|lag| Status::data_loss(format!("events were lost: {lag}")))
        });
        let shutdown = self.0.shutdown.clone();
        let events = events.take_until(shutdown.cancelled_owned());
        Ok(Response::new(Box::pin(events)))
    }

    async fn list_metric_descriptors(
        &self,
        _: Request<v1::ListMetricDescriptorsRequest>,
    ) -> Answer<v1::ListMetricDescriptorsResponse> {
        Err(Status::unimplemented(
            "pod sandbox metrics are not supported",
        ))
    }

    async fn list_pod_sandbox_metrics(
        &self,
        _: Request<v1::ListPodSandboxMetricsRequest>,
    ) -> Answer<v1::ListPodSandboxMetricsResponse> {
        Err(Status::unimplemented(
            "pod sandbox metrics are not supported",
        ))
    }

    type StreamPodSandboxMetricsStream = Flow<v1::StreamPodSandboxMetricsResponse>;

    async fn stream_pod_sandbox_metrics(
        &self,
        _: Request<v1::StreamPodSandboxMetricsRequest>,
    ) -> Answer<Self::StreamPodSandboxMetricsStream> {
        Err(Status::unimplemented(
            "pod sandbox metrics are not supported",
        ))
    }

    async fn runtime_config(
        &self,
        _: Request<v1::RuntimeConfigRequest>,
    ) -> Answer<v1::RuntimeConfigResponse> {
        Ok(Response::new(v1::RuntimeConfigResponse {
            linux: Some(v1::LinuxRuntimeConfiguration {
                cgroup_driver: v1::CgroupDriver::Cgroupfs as i32,
            }),
        }))
    }

    async fn update_pod_sandbox_resources(
        &self,
        request: Request<v1::UpdatePodSandboxResourcesRequest>,
    ) -> Answer<v1::UpdatePodSandboxResourcesResponse> {
        // The pod's own cgroup is the kubelet's; a sandbox without a process in
        // it has nothing to resize.
        self.sandbox(&request.get_ref().pod_sandbox_id)?;
        Ok(Response::new(v1::UpdatePodSandboxResourcesResponse {}))
    }
}
