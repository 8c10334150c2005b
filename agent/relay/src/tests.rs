//! A relay before servers that tell what the test says.

use std::path::Path;
use std::time::Duration;

use futures::stream::{BoxStream, StreamExt};
use tokio::sync::broadcast;
use tonic::{Request, Response, Status};
use xebec_hubble::flow::{Flow, FlowFilter};
use xebec_hubble::observer::get_flows_response::ResponseTypes;
use xebec_hubble::observer::observer_client::ObserverClient;
use xebec_hubble::observer::observer_server::Observer;
use xebec_hubble::observer::*;
use xebec_hubble::peer::ChangeNotificationType::{PeerAdded, PeerDeleted};
use xebec_hubble::relay::NodeState;
use xebec_hubble::wkt::Timestamp;

use super::*;

/// A node that tells of flows at these seconds, and then, if it is followed, of those that come.
#[derive(Clone)]
struct Teller {
    name: &'static str,
    seconds: Vec<i64>,
    /// Seconds of flows to come; none for a failure.
    news: broadcast::Sender<Option<i64>>,
}

impl Teller {
    fn new(name: &'static str, seconds: &[i64]) -> Self {
        Self {
            name,
            seconds: seconds.to_vec(),
            news: broadcast::channel(16).0,
        }
    }
}

fn answer(name: &str, seconds: i64) -> GetFlowsResponse {
    GetFlowsResponse {
        node_name: name.into(),
        time: Some(Timestamp { seconds, nanos: 0 }),
        response_types: Some(ResponseTypes::Flow(Flow::default())),
    }
}

#[async_trait]
impl Observer for Teller {
    type GetFlowsStream = BoxStream<'static, Result<GetFlowsResponse, Status>>;

    async fn get_flows(
        &self,
        request: Request<GetFlowsRequest>,
    ) -> Result<Response<Self::GetFlowsStream>, Status> {
        let name = self.name;
        let kept = self.seconds.clone().into_iter();
        let kept = futures::stream::iter(kept.map(move |seconds| Ok(answer(name, seconds))));
        if !request.into_inner().follow {
            return Ok(Response::new(kept.boxed()));
        }
        let news = futures::stream::unfold(self.news.subscribe(), move |mut news| async move {
            let next = match news.recv().await.ok()? {
                Some(seconds) => Ok(answer(name, seconds)),
                None => Err(Status::internal("it broke")),
            };
            Some((next, news))
        });
        Ok(Response::new(kept.chain(news).boxed()))
    }

    type GetAgentEventsStream = BoxStream<'static, Result<GetAgentEventsResponse, Status>>;

    async fn get_agent_events(
        &self,
        _: Request<GetAgentEventsRequest>,
    ) -> Result<Response<Self::GetAgentEventsStream>, Status> {
        Err(Status::unimplemented("no"))
    }

    type GetDebugEventsStream = BoxStream<'static, Result<GetDebugEventsResponse, Status>>;

    async fn get_debug_events(
        &self,
        _: Request<GetDebugEventsRequest>,
    ) -> Result<Response<Self::GetDebugEventsStream>, Status> {
        Err(Status::unimplemented("no"))
    }

    async fn get_nodes(
        &self,
        _: Request<GetNodesRequest>,
    ) -> Result<Response<GetNodesResponse>, Status> {
        Err(Status::unimplemented("no"))
    }

    async fn get_namespaces(
        &self,
        _: Request<GetNamespacesRequest>,
    ) -> Result<Response<GetNamespacesResponse>, Status> {
        let of = |namespace: &str| Namespace {
            cluster: "default".into(),
            namespace: namespace.into(),
        };
        Ok(Response::new(GetNamespacesResponse {
            namespaces: vec![of("shared"), of(self.name)],
        }))
    }

    async fn server_status(
        &self,
        _: Request<ServerStatusRequest>,
    ) -> Result<Response<ServerStatusResponse>, Status> {
        let count = self.seconds.len() as u64;
        Ok(Response::new(ServerStatusResponse {
            num_flows: count,
            max_flows: 100,
            seen_flows: count,
            uptime_ns: count,
            flows_rate: 1.0,
            ..ServerStatusResponse::default()
        }))
    }
}

/// Tells of nodes, first those that it was made with.
#[derive(Clone)]
struct Known {
    nodes: Vec<ChangeNotification>,
    news: broadcast::Sender<ChangeNotification>,
}

#[async_trait]
impl Peer for Known {
    type NotifyStream = BoxStream<'static, Result<ChangeNotification, Status>>;

    async fn notify(
        &self,
        _: Request<NotifyRequest>,
    ) -> Result<Response<Self::NotifyStream>, Status> {
        let news = futures::stream::unfold(self.news.subscribe(), |mut news| async move {
            Some((Ok(news.recv().await.ok()?), news))
        });
        let known = futures::stream::iter(self.nodes.clone().into_iter().map(Ok));
        Ok(Response::new(known.chain(news).boxed()))
    }
}

fn peer(
    dir: &Path,
    name: &str,
    kind: xebec_hubble::peer::ChangeNotificationType,
) -> ChangeNotification {
    ChangeNotification {
        name: name.into(),
        address: format!("unix://{}", dir.join(name).display()),
        r#type: kind.into(),
        tls: None,
    }
}

/// Two nodes, one that is known and does not answer, and a relay before them.
struct Stage {
    dir: tempfile::TempDir,
    known: broadcast::Sender<ChangeNotification>,
    b: Teller,
    client: ObserverClient<tonic::transport::Channel>,
    shutdown: CancellationToken,
}

impl Drop for Stage {
    fn drop(&mut self) {
        self.shutdown.cancel();
    }
}

impl Stage {
    async fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let shutdown = CancellationToken::new();
        let known = Known {
            nodes: ["a", "b", "gone"]
                .map(|name| peer(dir.path(), name, PeerAdded))
                .to_vec(),
            news: broadcast::channel(16).0,
        };
        let (a, b) = (Teller::new("a", &[1, 4, 5]), Teller::new("b", &[2, 3]));
        let on_a = Api::new(a, Some(known.clone()), shutdown.clone()).await;
        let on_b = Api::new(b.clone(), None::<Known>, shutdown.clone()).await;
        for (api, name) in [(on_a, "a"), (on_b, "b")] {
            let socket = dir.path().join(name);
            tokio::spawn(async move { api.unix(&socket).await });
        }
        let socket = dir.path().join("relay");
        let config = Config {
            peers: Peers::Told(Server::Unix(dir.path().join("a"))),
            tls: None,
            listen: None,
            socket: Some(socket.clone()),
        };
        tokio::spawn(run(config, shutdown.clone()));
        while !socket.exists() {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        let channel = Server::Unix(socket).connect(None).await.unwrap();
        let mut stage = Self {
            dir,
            known: known.news,
            b,
            client: ObserverClient::new(channel),
            shutdown,
        };
        stage.until(|nodes| nodes.len() == 3).await;
        stage
    }

    /// Waits until the relay knows such nodes.
    async fn until(&mut self, right: impl Fn(&[Node]) -> bool) -> Vec<Node> {
        for _ in 0..2_000 {
            let nodes = self.client.get_nodes(GetNodesRequest {}).await.unwrap();
            let nodes = nodes.into_inner().nodes;
            if right(&nodes) {
                return nodes;
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        panic!("the nodes do not become right");
    }

    async fn flows(&mut self, asked: GetFlowsRequest) -> tonic::Streaming<GetFlowsResponse> {
        self.client.get_flows(asked).await.unwrap().into_inner()
    }
}

/// An answer in short: node and second of a flow, or a state and its nodes.
fn told(answer: Option<GetFlowsResponse>) -> (String, i64) {
    let answer = answer.expect("an answer");
    match answer.response_types.unwrap() {
        ResponseTypes::NodeStatus(status) => {
            let names = status.node_names.join(",");
            (
                format!(
                    "{} {names} {}",
                    status.state_change().as_str_name(),
                    status.message
                ),
                0,
            )
        }
        _ => (answer.node_name, answer.time.unwrap().seconds),
    }
}

fn flow(node: &str, seconds: i64) -> (String, i64) {
    (node.to_owned(), seconds)
}

#[tokio::test]
async fn flows_of_all_nodes_come_in_order_and_who_is_missing_is_told() {
    let mut stage = Stage::new().await;
    let mut flows = stage.flows(GetFlowsRequest::default()).await;
    assert_eq!(
        told(flows.message().await.unwrap()).0,
        "NODE_CONNECTED a,b "
    );
    assert_eq!(
        told(flows.message().await.unwrap()).0,
        "NODE_UNAVAILABLE gone "
    );
    for (node, seconds) in [("a", 1), ("b", 2), ("b", 3), ("a", 4), ("a", 5)] {
        assert_eq!(told(flows.message().await.unwrap()), flow(node, seconds));
    }
    assert!(flows.message().await.unwrap().is_none());
    let refused = GetFlowsRequest {
        whitelist: vec![FlowFilter {
            source_port: vec!["http".into()],
            ..FlowFilter::default()
        }],
        ..GetFlowsRequest::default()
    };
    let refused = stage.client.get_flows(refused).await.unwrap_err();
    assert_eq!(refused.code(), tonic::Code::InvalidArgument);
}

#[tokio::test]
async fn who_follows_hears_the_others_when_a_node_fails() {
    let mut stage = Stage::new().await;
    let follow = GetFlowsRequest {
        follow: true,
        ..GetFlowsRequest::default()
    };
    let mut flows = stage.flows(follow).await;
    for _ in 0..2 {
        flows.message().await.unwrap();
    }
    let mut seconds = Vec::new();
    for _ in 0..5 {
        seconds.push(told(flows.message().await.unwrap()).1);
    }
    assert_eq!(seconds, [1, 2, 3, 4, 5]);
    stage.b.news.send(Some(7)).unwrap();
    assert_eq!(told(flows.message().await.unwrap()), flow("b", 7));
    stage.b.news.send(None).unwrap();
    assert_eq!(
        told(flows.message().await.unwrap()).0,
        "NODE_ERROR b it broke"
    );
}

#[tokio::test]
async fn status_nodes_and_namespaces_are_those_of_all() {
    let mut stage = Stage::new().await;
    let status = stage.client.server_status(ServerStatusRequest {}).await;
    let status = status.unwrap().into_inner();
    assert_eq!(
        (status.num_flows, status.max_flows, status.uptime_ns),
        (5, 200, 3)
    );
    assert_eq!(status.num_connected_nodes.unwrap().value, 2);
    assert_eq!(status.unavailable_nodes, ["gone"]);
    let nodes = stage.until(|_| true).await;
    let states: Vec<_> = nodes
        .iter()
        .map(|node| (node.name.as_str(), node.state()))
        .collect();
    assert_eq!(
        states,
        [
            ("a", NodeState::NodeConnected),
            ("b", NodeState::NodeConnected),
            ("gone", NodeState::NodeUnavailable)
        ]
    );
    let namespaces = stage.client.get_namespaces(GetNamespacesRequest {}).await;
    let namespaces = namespaces.unwrap().into_inner().namespaces;
    let names: Vec<_> = namespaces
        .iter()
        .map(|one| one.namespace.as_str())
        .collect();
    assert_eq!(names, ["a", "b", "shared"]);
}

#[tokio::test]
async fn nodes_that_go_are_asked_no_more() {
    let mut stage = Stage::new().await;
    let gone = peer(stage.dir.path(), "gone", PeerDeleted);
    stage.known.send(gone).unwrap();
    stage.until(|nodes| nodes.len() == 2).await;
}
