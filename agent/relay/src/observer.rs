//! `observer.Observer` of all nodes.

use std::collections::BTreeSet;
use std::time::Duration;

use anyhow::Result;
use futures::future::join_all;
use futures::stream::{BoxStream, Stream, StreamExt};
use tokio_util::sync::CancellationToken;
use tonic::{Request, Response, Status, async_trait};
use xebec_hubble::filter::Filters;
use xebec_hubble::mask::Mask;
use xebec_hubble::observer::get_flows_response::ResponseTypes;
use xebec_hubble::observer::observer_client::ObserverClient;
use xebec_hubble::observer::observer_server::Observer;
use xebec_hubble::observer::{
    GetAgentEventsRequest, GetAgentEventsResponse, GetDebugEventsRequest, GetDebugEventsResponse,
    GetFlowsRequest, GetFlowsResponse, GetNamespacesRequest, GetNamespacesResponse,
    GetNodesRequest, GetNodesResponse, Namespace, Node, ServerStatusRequest, ServerStatusResponse,
    Tls,
};
use xebec_hubble::order::{Answers, Ended, Following};
use xebec_hubble::relay::{NodeState, NodeStatusEvent};
use xebec_hubble::wkt::Timestamp;

use crate::nodes::Nodes;

/// Who tells of the nodes' states.
const NAME: &str = "relay";

/// Asks all nodes.
#[derive(Clone)]
pub(crate) struct Relay {
    nodes: Nodes,
    shutdown: CancellationToken,
}

/// How long a node may take to begin to answer.
const PATIENCE: Duration = Duration::from_secs(5);
/// Bytes of an answer: all namespaces of a node.
const LONGEST: usize = 16 << 20;

impl Relay {
    pub(crate) const fn new(nodes: Nodes, shutdown: CancellationToken) -> Self {
        Self { nodes, shutdown }
    }

    /// What every node answers, by name, with where it serves.
    async fn ask<T, F>(
        &self,
        one: impl Fn(ObserverClient<tonic::transport::Channel>) -> F,
    ) -> Vec<(String, crate::nodes::Node, Result<T>)>
    where
        F: Future<Output = Result<Response<T>, Status>>,
    {
        let asked = self.nodes.all().into_iter().map(|(name, node)| {
            let one = &one;
            async move {
                let answer = async {
                    let channel = self.nodes.connect(&name, &node).await?;
                    let client = ObserverClient::new(channel).max_decoding_message_size(LONGEST);
                    anyhow::Ok(one(client).await?.into_inner())
                };
                let answer = tokio::time::timeout(PATIENCE, answer).await;
                let answer = answer.unwrap_or_else(|_| Err(anyhow::anyhow!("it does not answer")));
                (name, node, answer)
            }
        });
        join_all(asked).await
    }

    fn until_shutdown<T>(
        &self,
        stream: impl Stream<Item = T> + Send + 'static,
    ) -> BoxStream<'static, T> {
        let shutdown = self.shutdown.clone().cancelled_owned();
        stream.take_until(shutdown).boxed()
    }
}

fn now() -> Timestamp {
    let since = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    let nanos = since.map_or(0, |since| since.as_nanos());
    Timestamp::from_nanos(i64::try_from(nanos).unwrap_or(i64::MAX))
}

/// That nodes are in a state.
fn state(state: NodeState, node_names: Vec<String>, message: String) -> GetFlowsResponse {
    GetFlowsResponse {
        node_name: NAME.to_owned(),
        time: Some(now()),
        response_types: Some(ResponseTypes::NodeStatus(NodeStatusEvent {
            state_change: state.into(),
            node_names,
            message,
        })),
    }
}

/// One node's answers; that it fails is one of them.
fn answers(name: String, stream: tonic::Streaming<GetFlowsResponse>) -> Answers {
    stream
        .map(move |answer| {
            answer.unwrap_or_else(|status| {
                let message = status.message().to_owned();
                state(NodeState::NodeError, vec![name.clone()], message)
            })
        })
        .boxed()
}

/// What nodes told of themselves, for those that did not.
fn unreachable<T>(all: &[(String, crate::nodes::Node, Result<T>)]) -> Vec<String> {
    let failed = all.iter().filter(|(_, _, answer)| answer.is_err());
    failed.map(|(name, ..)| name.clone()).collect()
}

#[async_trait]
impl Observer for Relay {
    type GetFlowsStream = BoxStream<'static, Result<GetFlowsResponse, Status>>;

    async fn get_flows(
        &self,
        request: Request<GetFlowsRequest>,
    ) -> Result<Response<Self::GetFlowsStream>, Status> {
        let asked = request.into_inner();
        // What no node can read is refused here, once.
        let invalid = |error: anyhow::Error| Status::invalid_argument(format!("{error:#}"));
        Filters::new(&asked.whitelist, &asked.blacklist).map_err(invalid)?;
        let paths = asked
            .field_mask
            .as_ref()
            .map_or(&[][..], |mask| &mask.paths);
        Mask::new(paths).map_err(invalid)?;
        let of_all = self
            .ask(|mut client| {
                let asked = asked.clone();
                async move { client.get_flows(asked).await }
            })
            .await;
        let lacking = unreachable(&of_all);
        let mut streams = Vec::new();
        let mut there = Vec::new();
        for (name, _, answer) in of_all {
            match answer {
                Ok(stream) => {
                    there.push(name.clone());
                    streams.push(answers(name, stream));
                }
                Err(error) => {
                    tracing::warn!(node = name, error = format!("{error:#}"), "gives no flows")
                }
            }
        }
        let mut first = Vec::new();
        if !there.is_empty() {
            first.push(state(NodeState::NodeConnected, there, String::new()));
        }
        if !lacking.is_empty() {
            first.push(state(NodeState::NodeUnavailable, lacking, String::new()));
        }
        let first = futures::stream::iter(first);
        if asked.follow {
            let mut following = Following::default();
            streams
                .into_iter()
                .for_each(|stream| following.push(stream));
            let flows = futures::stream::unfold(following, |mut following| async move {
                let next = following.next().await?;
                Some((next, following))
            });
            return Ok(Response::new(
                self.until_shutdown(first.chain(flows).map(Ok)),
            ));
        }
        let flows = futures::stream::unfold(Ended::new(streams), |mut ended| async move {
            let next = ended.next().await?;
            Some((next, ended))
        });
        Ok(Response::new(
            self.until_shutdown(first.chain(flows).map(Ok)),
        ))
    }

    type GetAgentEventsStream = BoxStream<'static, Result<GetAgentEventsResponse, Status>>;

    async fn get_agent_events(
        &self,
        _: Request<GetAgentEventsRequest>,
    ) -> Result<Response<Self::GetAgentEventsStream>, Status> {
        Err(Status::unimplemented(
            "ask a node for the events of its agent",
        ))
    }

    type GetDebugEventsStream = BoxStream<'static, Result<GetDebugEventsResponse, Status>>;

    async fn get_debug_events(
        &self,
        _: Request<GetDebugEventsRequest>,
    ) -> Result<Response<Self::GetDebugEventsStream>, Status> {
        Err(Status::unimplemented(
            "ask a node for the events of its programs",
        ))
    }

    async fn get_nodes(
        &self,
        _: Request<GetNodesRequest>,
    ) -> Result<Response<GetNodesResponse>, Status> {
        let of_all = self
            .ask(|mut client| async move { client.server_status(ServerStatusRequest {}).await })
            .await;
        let nodes = of_all.into_iter().map(|(name, node, answer)| {
            let tls = Some(Tls {
                enabled: node.server_name.is_some(),
                server_name: node.server_name.unwrap_or_default(),
            });
            let known = Node {
                name,
                address: node.server.to_string(),
                tls,
                ..Node::default()
            };
            match answer {
                Ok(status) => Node {
                    version: status.version,
                    state: NodeState::NodeConnected.into(),
                    uptime_ns: status.uptime_ns,
                    num_flows: status.num_flows,
                    max_flows: status.max_flows,
                    seen_flows: status.seen_flows,
                    ..known
                },
                Err(_) => Node {
                    state: NodeState::NodeUnavailable.into(),
                    ..known
                },
            }
        });
        Ok(Response::new(GetNodesResponse {
            nodes: nodes.collect(),
        }))
    }

    async fn get_namespaces(
        &self,
        _: Request<GetNamespacesRequest>,
    ) -> Result<Response<GetNamespacesResponse>, Status> {
        let of_all = self
            .ask(|mut client| async move { client.get_namespaces(GetNamespacesRequest {}).await })
            .await;
        let known = of_all.into_iter().filter_map(|(_, _, answer)| answer.ok());
        let names = known.flat_map(|answer| answer.namespaces);
        let names: BTreeSet<_> = names.map(|one| (one.cluster, one.namespace)).collect();
        let namespaces = names
            .into_iter()
            .map(|(cluster, namespace)| Namespace { cluster, namespace });
        Ok(Response::new(GetNamespacesResponse {
            namespaces: namespaces.collect(),
        }))
    }

    async fn server_status(
        &self,
        _: Request<ServerStatusRequest>,
    ) -> Result<Response<ServerStatusResponse>, Status> {
        let of_all = self
            .ask(|mut client| async move { client.server_status(ServerStatusRequest {}).await })
            .await;
        let lacking = unreachable(&of_all);
        let mut sum = ServerStatusResponse {
            num_connected_nodes: Some(((of_all.len() - lacking.len()) as u32).into()),
            num_unavailable_nodes: Some((lacking.len() as u32).into()),
            unavailable_nodes: lacking,
            version: format!("xebec v{}", env!("CARGO_PKG_VERSION")),
            ..ServerStatusResponse::default()
        };
        for status in of_all.into_iter().filter_map(|(_, _, answer)| answer.ok()) {
            sum.num_flows += status.num_flows;
            sum.max_flows += status.max_flows;
            sum.seen_flows += status.seen_flows;
            sum.uptime_ns = sum.uptime_ns.max(status.uptime_ns);
            sum.flows_rate += status.flows_rate;
        }
        Ok(Response::new(sum))
    }
}
