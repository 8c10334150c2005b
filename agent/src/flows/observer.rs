//! Hubble's `observer.Observer` of this node.

use std::collections::BTreeSet;
use std::time::Instant;

use futures::stream::{BoxStream, Stream, StreamExt};
use tokio_util::sync::CancellationToken;
use tonic::{Request, Response, Status};
use xebec_hubble::flow::{AgentEvent, AgentEventType, agent_event};
use xebec_hubble::observer::{
    GetAgentEventsRequest, GetAgentEventsResponse, GetDebugEventsRequest, GetDebugEventsResponse,
    GetFlowsRequest, GetFlowsResponse, GetNamespacesRequest, GetNamespacesResponse,
    GetNodesRequest, GetNodesResponse, Namespace, Node, ServerStatusRequest, ServerStatusResponse,
    Tls, observer_server::Observer,
};
use xebec_hubble::relay::NodeState;
use xebec_hubble::wkt::Timestamp;

use super::Flows;
use super::reader::Reader;
use super::store::Entry;

/// How far back the rate of flows is measured.
const MINUTE: i64 = 60_000_000_000;

/// Serves the flows of this node.
#[derive(Clone)]
pub struct NodeObserver {
    flows: Flows,
    began: Instant,
    started: Timestamp,
    /// Ends those who follow.
    shutdown: CancellationToken,
}

impl NodeObserver {
    /// Serves these from now on until `shutdown`.
    #[must_use]
    pub fn new(flows: Flows, shutdown: CancellationToken) -> Self {
        Self {
            shutdown,
            flows,
            began: Instant::now(),
            started: Timestamp::from_nanos(super::now()),
        }
    }

    /// A stream that ends with the agent.
    fn until_shutdown<T>(
        &self,
        stream: impl Stream<Item = T> + Send + 'static,
    ) -> BoxStream<'static, T> {
        let shutdown = self.shutdown.clone().cancelled_owned();
        stream.take_until(shutdown).boxed()
    }

    fn uptime(&self) -> u64 {
        u64::try_from(self.began.elapsed().as_nanos()).unwrap_or(u64::MAX)
    }
}

/// How the version of this server is told.
fn version() -> String {
    format!("xebec v{}", env!("CARGO_PKG_VERSION"))
}

#[tonic::async_trait]
impl Observer for NodeObserver {
    type GetFlowsStream = BoxStream<'static, Result<GetFlowsResponse, Status>>;

    async fn get_flows(
        &self,
        request: Request<GetFlowsRequest>,
    ) -> Result<Response<Self::GetFlowsStream>, Status> {
        let reader = Reader::new(self.flows.clone(), &request.into_inner()).await;
        let invalid = |error: anyhow::Error| Status::invalid_argument(format!("{error:#}"));
        let reader = reader.map_err(invalid)?;
        let stream = futures::stream::unfold(reader, |mut reader| async move {
            let next = reader.next().await?;
            Some((Ok(next), reader))
        });
        Ok(Response::new(self.until_shutdown(stream)))
    }

    type GetAgentEventsStream = BoxStream<'static, Result<GetAgentEventsResponse, Status>>;

    /// That the agent has started; it tells of nothing else yet.
    async fn get_agent_events(
        &self,
        request: Request<GetAgentEventsRequest>,
    ) -> Result<Response<Self::GetAgentEventsStream>, Status> {
        let asked = request.into_inner();
        let time = self.started.as_nanos();
        let wanted = asked.since.is_none_or(|since| since.as_nanos() <= time)
            && asked.until.is_none_or(|until| time <= until.as_nanos());
        let event = GetAgentEventsResponse {
            agent_event: Some(AgentEvent {
                r#type: AgentEventType::AgentStarted.into(),
                notification: Some(agent_event::Notification::AgentStart(
                    xebec_hubble::flow::TimeNotification {
                        time: Some(self.started),
                    },
                )),
            }),
            node_name: self.flows.node_name().to_owned(),
            time: Some(self.started),
        };
        let now = futures::stream::iter(wanted.then_some(Ok(event)));
        Ok(Response::new(match asked.follow {
            true => self.until_shutdown(now.chain(futures::stream::pending())),
            false => now.boxed(),
        }))
    }

    type GetDebugEventsStream = BoxStream<'static, Result<GetDebugEventsResponse, Status>>;

    /// The programs have no events for debugging.
    async fn get_debug_events(
        &self,
        request: Request<GetDebugEventsRequest>,
    ) -> Result<Response<Self::GetDebugEventsStream>, Status> {
        Ok(Response::new(match request.into_inner().follow {
            true => self.until_shutdown(futures::stream::pending()),
            false => futures::stream::empty().boxed(),
        }))
    }

    /// This node alone.
    async fn get_nodes(
        &self,
        _: Request<GetNodesRequest>,
    ) -> Result<Response<GetNodesResponse>, Status> {
        let store = self.flows.store();
        Ok(Response::new(GetNodesResponse {
            nodes: vec![Node {
                name: self.flows.node_name().to_owned(),
                version: version(),
                address: String::new(),
                state: NodeState::NodeConnected.into(),
                tls: Some(Tls::default()),
                uptime_ns: self.uptime(),
                num_flows: store.len() as u64,
                max_flows: store.room() as u64,
                seen_flows: store.next(),
            }],
        }))
    }

    /// Namespaces of pods in the flows that are kept.
    async fn get_namespaces(
        &self,
        _: Request<GetNamespacesRequest>,
    ) -> Result<Response<GetNamespacesResponse>, Status> {
        let mut names = BTreeSet::new();
        {
            let store = self.flows.store();
            let (_, entries) = store.range(0, u64::MAX);
            for entry in entries {
                let Entry::Flow(seen) = entry else { continue };
                for end in [&seen.source, &seen.destination] {
                    if !end.pod.0.is_empty() && !names.contains(end.pod.0.as_str()) {
                        names.insert(end.pod.0.clone());
                    }
                }
            }
        }
        let namespaces = names.into_iter().map(|namespace| Namespace {
            cluster: xebec_hubble::DEFAULT_CLUSTER.to_owned(),
            namespace,
        });
        Ok(Response::new(GetNamespacesResponse {
            namespaces: namespaces.collect(),
        }))
    }

    async fn server_status(
        &self,
        _: Request<ServerStatusRequest>,
    ) -> Result<Response<ServerStatusResponse>, Status> {
        let now = super::now();
        let store = self.flows.store();
        let recent = store.next() - store.since(now - MINUTE);
        // Where the last minute's flows are not all kept, those that are tell how fast they come.
        let (_, mut entries) = store.range(store.since(now - MINUTE), u64::MAX);
        let span = match entries.next() {
            Some(first) if store.oldest() > 0 && recent as usize == store.len() => {
                (now - first.time()).max(1)
            }
            _ => MINUTE
                .min(i64::try_from(self.uptime()).unwrap_or(MINUTE))
                .max(1),
        };
        Ok(Response::new(ServerStatusResponse {
            num_flows: store.len() as u64,
            max_flows: store.room() as u64,
            seen_flows: store.next(),
            uptime_ns: self.uptime(),
            num_connected_nodes: None,
            num_unavailable_nodes: None,
            unavailable_nodes: Vec::new(),
            version: version(),
            flows_rate: recent as f64 / (span as f64 / 1e9),
        }))
    }
}
