//! Flows as clients read them: gRPC over the socket.

use super::*;
use hyper_util::rt::TokioIo;
use tokio::net::UnixStream;
use tonic::transport::{Channel, Endpoint};
use tonic::{Code, Streaming};
use xebec_hubble::flow::{FlowFilter, LostEventSource, layer4::Protocol};
use xebec_hubble::observer::get_flows_response::ResponseTypes;
use xebec_hubble::observer::observer_client::ObserverClient;
use xebec_hubble::observer::{
    GetAgentEventsRequest, GetDebugEventsRequest, GetFlowsRequest, GetFlowsResponse,
    GetNamespacesRequest, GetNodesRequest, ServerStatusRequest,
};
use xebec_hubble::wkt::{FieldMask, Timestamp};

/// A server on a socket of its own, and a client of it.
struct Served {
    flows: Flows,
    client: ObserverClient<Channel>,
    shutdown: CancellationToken,
    _dir: tempfile::TempDir,
}

impl Served {
    async fn new(flows: Flows) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let socket = dir.path().join("hubble.sock");
        let shutdown = CancellationToken::new();
        let serving = serve::run(
            socket.clone(),
            None,
            flows.clone(),
            watch::channel(None).1,
            shutdown.clone(),
        );
        tokio::spawn(async move { serving.await.unwrap() });
        while !socket.exists() {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        let channel = Endpoint::from_static("http://agent")
            .connect_with_connector(tower::service_fn(move |_| {
                let socket = socket.clone();
                async move { UnixStream::connect(socket).await.map(TokioIo::new) }
            }))
            .await
            .unwrap();
        Self {
            flows,
            client: ObserverClient::new(channel),
            shutdown,
            _dir: dir,
        }
    }

    /// A flow from this port, of `WEB` to `API`; one entry.
    fn passes(&self, port: u16, seconds: u64) {
        let event = Event {
            time: seconds * 1_000_000_000,
            source_port: port.to_be(),
            set: 0,
            ..event(WEB, API)
        };
        self.flows.take(&[event.into()], 0);
    }

    async fn ask(&mut self, asked: GetFlowsRequest) -> Streaming<GetFlowsResponse> {
        self.client.get_flows(asked).await.unwrap().into_inner()
    }

    /// Ports of all that a request is told.
    async fn ports(&mut self, asked: GetFlowsRequest) -> Vec<u32> {
        let mut stream = self.ask(asked).await;
        let mut ports = Vec::new();
        while let Some(answer) = stream.message().await.unwrap() {
            ports.push(port(&answer));
        }
        ports
    }
}

impl Drop for Served {
    fn drop(&mut self) {
        self.shutdown.cancel();
    }
}

fn port(answer: &GetFlowsResponse) -> u32 {
    let Some(ResponseTypes::Flow(flow)) = &answer.response_types else {
        panic!("no flow: {answer:?}");
    };
    match flow.l4.as_ref().and_then(|l4| l4.protocol.as_ref()) {
        Some(Protocol::Tcp(tcp)) => tcp.source_port,
        other => panic!("no TCP: {other:?}"),
    }
}

fn last(number: u64) -> GetFlowsRequest {
    GetFlowsRequest {
        number,
        ..GetFlowsRequest::default()
    }
}

fn at(seconds: i64) -> Option<Timestamp> {
    Some(Timestamp { seconds, nanos: 0 })
}

#[tokio::test]
async fn requests_choose_by_number_time_and_filter() {
    let mut served = Served::new(flows()).await;
    for port in 1..=300 {
        served.passes(port, u64::from(port));
    }
    let from_ports = |ports: &[u16]| FlowFilter {
        source_port: ports.iter().map(u16::to_string).collect(),
        ..FlowFilter::default()
    };
    let all: Vec<u32> = (1..=300).collect();
    let table: Vec<(&str, GetFlowsRequest, Vec<u32>)> = vec![
        ("all", last(0), all.clone()),
        ("more than there are", last(u64::MAX), all.clone()),
        ("the newest", last(2), vec![299, 300]),
        (
            "the oldest",
            GetFlowsRequest {
                first: true,
                ..last(2)
            },
            vec![1, 2],
        ),
        (
            "since",
            GetFlowsRequest {
                since: at(299),
                ..last(0)
            },
            vec![299, 300],
        ),
        (
            "until",
            GetFlowsRequest {
                until: at(2),
                ..last(0)
            },
            vec![1, 2],
        ),
        (
            "between",
            GetFlowsRequest {
                since: at(5),
                until: at(7),
                ..last(0)
            },
            vec![5, 6, 7],
        ),
        (
            "the newest of a time",
            GetFlowsRequest {
                since: at(5),
                until: at(7),
                ..last(2)
            },
            vec![6, 7],
        ),
        (
            "the oldest of a time",
            GetFlowsRequest {
                since: at(5),
                first: true,
                ..last(1)
            },
            vec![5],
        ),
        (
            "the newest of those that pass",
            GetFlowsRequest {
                whitelist: vec![from_ports(&[3, 4, 200])],
                ..last(2)
            },
            vec![4, 200],
        ),
        (
            "the oldest of those that pass",
            GetFlowsRequest {
                whitelist: vec![from_ports(&[3, 4, 200])],
                first: true,
                ..last(2)
            },
            vec![3, 4],
        ),
        (
            "without",
            GetFlowsRequest {
                blacklist: vec![from_ports(&[299])],
                ..last(2)
            },
            vec![298, 300],
        ),
        (
            "none passes",
            GetFlowsRequest {
                whitelist: vec![from_ports(&[301])],
                ..last(9)
            },
            vec![],
        ),
    ];
    for (what, asked, wanted) in table {
        assert_eq!(served.ports(asked).await, wanted, "{what}");
    }
}

#[tokio::test]
async fn a_follower_sees_each_flow_once_and_ends_with_the_agent() {
    let mut served = Served::new(flows()).await;
    served.passes(1, 1);
    served.passes(2, 2);
    let follow = GetFlowsRequest {
        follow: true,
        ..last(1)
    };
    let mut stream = served.ask(follow.clone()).await;
    assert_eq!(port(&stream.message().await.unwrap().unwrap()), 2);
    // Without a number nothing that is over is told.
    let mut news = served
        .ask(GetFlowsRequest {
            number: 0,
            ..follow
        })
        .await;
    for number in 3..=400 {
        served.passes(number, u64::from(number));
    }
    for number in 3..=400 {
        assert_eq!(port(&stream.message().await.unwrap().unwrap()), number);
        assert_eq!(port(&news.message().await.unwrap().unwrap()), number);
    }
    served.shutdown.cancel();
    let end = tokio::time::timeout(Duration::from_secs(10), stream.message()).await;
    assert!(!matches!(end, Ok(Ok(Some(_))) | Err(_)), "{end:?}");
}

#[tokio::test]
async fn who_is_too_slow_is_told_how_much_was_missed() {
    let mut flows = flows();
    flows.store = Arc::new(Mutex::new(Store::new(100)));
    let mut served = Served::new(flows).await;
    let follow = GetFlowsRequest {
        follow: true,
        ..last(0)
    };
    let mut stream = served.ask(follow).await;
    // More than all buffers between the two hold.
    let all = 50_000_u64;
    for number in 0..all {
        served.passes((number % 60_000) as u16, 1);
    }
    served.flows.lost(7, 2_000_000_000);
    let (mut told, mut missed) = (0, 0);
    loop {
        let answer = stream.message().await.unwrap().unwrap();
        match answer.response_types.unwrap() {
            ResponseTypes::Flow(_) => told += 1,
            ResponseTypes::LostEvents(lost) => match lost.source() {
                LostEventSource::HubbleRingBuffer => missed += lost.num_events_lost,
                LostEventSource::PerfEventRingBuffer => {
                    assert_eq!(lost.num_events_lost, 7);
                    break;
                }
                other => panic!("{other:?}"),
            },
            other => panic!("{other:?}"),
        }
    }
    assert_eq!(told + missed, all);
    assert!(missed > 0);
}

#[tokio::test]
async fn a_mask_leaves_nothing_but_what_is_asked_for() {
    let mut served = Served::new(flows()).await;
    served.passes(9, 1);
    let asked = GetFlowsRequest {
        field_mask: Some(FieldMask {
            paths: vec!["verdict".into(), "source.pod_name".into()],
        }),
        ..last(1)
    };
    let answer = served.ask(asked).await.message().await.unwrap().unwrap();
    assert_eq!(answer.node_name, "here");
    assert_eq!(answer.time, at(1));
    let Some(ResponseTypes::Flow(flow)) = answer.response_types else {
        panic!("no flow");
    };
    assert_eq!(
        json(&flow),
        json!({"verdict": "FORWARDED", "source": {"pod_name": "web-1"}})
    );
}

#[tokio::test]
async fn nonsense_is_refused_with_a_reason() {
    let mut served = Served::new(flows()).await;
    let port = FlowFilter {
        source_port: vec!["http".into()],
        ..FlowFilter::default()
    };
    let cel = FlowFilter {
        experimental: Some(xebec_hubble::flow::flow_filter::Experimental {
            cel_expression: vec!["true".into()],
        }),
        ..FlowFilter::default()
    };
    let mask = Some(FieldMask {
        paths: vec!["colour".into()],
    });
    let table = [
        (
            GetFlowsRequest {
                whitelist: vec![port.clone()],
                ..last(1)
            },
            "source_port: \"http\" is no port",
        ),
        (
            GetFlowsRequest {
                blacklist: vec![port],
                ..last(1)
            },
            "source_port",
        ),
        (
            GetFlowsRequest {
                whitelist: vec![cel],
                ..last(1)
            },
            "cel_expression: not supported",
        ),
        (
            GetFlowsRequest {
                field_mask: mask,
                ..last(1)
            },
            "no flow has a \"colour\"",
        ),
        (
            GetFlowsRequest {
                first: true,
                follow: true,
                ..last(1)
            },
            "can't go together",
        ),
    ];
    for (asked, reason) in table {
        let error = served.client.get_flows(asked).await.unwrap_err();
        assert_eq!(error.code(), Code::InvalidArgument);
        assert!(error.message().contains(reason), "{error}");
    }
}

#[tokio::test]
async fn the_server_tells_of_itself() {
    let mut served = Served::new(flows()).await;
    served.passes(1, 1);
    served.passes(2, 2);
    let now = u64::try_from(now() / 1_000_000_000).unwrap();
    served.passes(3, now);
    let status = served.client.server_status(ServerStatusRequest {}).await;
    let status = status.unwrap().into_inner();
    assert_eq!(
        (status.num_flows, status.max_flows, status.seen_flows),
        (3, KEPT as u64, 3)
    );
    assert!(status.flows_rate > 0.0, "{status:?}");
    assert!(status.version.starts_with("xebec v"), "{status:?}");
    let nodes = served.client.get_nodes(GetNodesRequest {}).await;
    let nodes = nodes.unwrap().into_inner().nodes;
    assert_eq!(nodes.len(), 1);
    assert_eq!((nodes[0].name.as_str(), nodes[0].seen_flows), ("here", 3));
    let namespaces = served.client.get_namespaces(GetNamespacesRequest {}).await;
    let namespaces = namespaces.unwrap().into_inner().namespaces;
    assert_eq!(namespaces.len(), 1);
    assert_eq!(namespaces[0].namespace, "shop");
    let asked = GetAgentEventsRequest::default();
    let mut events = served
        .client
        .get_agent_events(asked)
        .await
        .unwrap()
        .into_inner();
    let event = json!(events.message().await.unwrap().unwrap().agent_event);
    assert_eq!(event["type"], "AGENT_STARTED");
    assert_eq!(events.message().await.unwrap(), None);
    let asked = GetDebugEventsRequest::default();
    let mut events = served
        .client
        .get_debug_events(asked)
        .await
        .unwrap()
        .into_inner();
    assert_eq!(events.message().await.unwrap(), None);
}

#[tokio::test]
async fn garbage_and_clients_that_never_read_harm_nobody() {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    let served = Served::new(flows()).await;
    for number in 0..2_000 {
        served.passes(number, 1);
    }
    let socket = served._dir.path().join("hubble.sock");
    let mut garbage = UnixStream::connect(&socket).await.unwrap();
    garbage.write_all(&[0xff; 4_096]).await.unwrap();
    let mut answer = Vec::new();
    let ended = tokio::time::timeout(Duration::from_secs(10), garbage.read_to_end(&mut answer));
    // It is thrown out, with or without a word.
    ended.await.expect("the connection ends").ok();
    let mut idle = Vec::new();
    for _ in 0..200 {
        let follow = GetFlowsRequest {
            follow: true,
            ..last(2_000)
        };
        let mut client = served.client.clone();
        idle.push(tokio::spawn(async move { client.get_flows(follow).await }));
    }
    // Others are answered meanwhile.
    let mut other = Served::new(served.flows.clone()).await;
    assert_eq!(other.ports(last(3)).await.len(), 3);
}

/// An authority, and certificates of it.
struct Authority {
    issuer: rcgen::Issuer<'static, rcgen::KeyPair>,
    pem: String,
}

impl Authority {
    fn new() -> Self {
        let key = rcgen::KeyPair::generate().unwrap();
        let mut params = rcgen::CertificateParams::new(Vec::<String>::new()).unwrap();
        params.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
        let pem = params.self_signed(&key).unwrap().pem();
        Self {
            issuer: rcgen::Issuer::new(params, key),
            pem,
        }
    }

    /// Certificate and key of this name (PEM).
    fn issue(&self, name: &str) -> (String, String) {
        let key = rcgen::KeyPair::generate().unwrap();
        let params = rcgen::CertificateParams::new([name.to_owned()]).unwrap();
        let cert = params.signed_by(&key, &self.issuer).unwrap();
        (cert.pem(), key.serialize_pem())
    }
}

/// What a client with this certificate, who believes this authority, gets from a server.
async fn asks(
    address: std::net::SocketAddr,
    believes: &Authority,
    is: Option<(String, String)>,
) -> Result<u64, String> {
    use tonic::transport::{Certificate, ClientTlsConfig, Identity};
    let mut tls = ClientTlsConfig::new()
        .ca_certificate(Certificate::from_pem(&believes.pem))
        .domain_name("node.test");
    if let Some((cert, key)) = is {
        tls = tls.identity(Identity::from_pem(cert, key));
    }
    let endpoint = Endpoint::from_shared(format!("https://{address}")).unwrap();
    let channel = endpoint.tls_config(tls).unwrap().connect().await;
    let mut client = ObserverClient::new(channel.map_err(|error| format!("{error:?}"))?);
    let status = client.server_status(ServerStatusRequest {}).await;
    status
        .map(|status| status.into_inner().num_flows)
        .map_err(|error| format!("{error:?}"))
}

#[tokio::test]
async fn without_a_certificate_nobody_reads_flows_over_tcp() {
    let dir = tempfile::tempdir().unwrap();
    let file = |name: &str| dir.path().join(name);
    let (ours, others) = (Authority::new(), Authority::new());
    let write = |(cert, key): (String, String)| {
        std::fs::write(file("cert"), cert).unwrap();
        std::fs::write(file("key"), key).unwrap();
    };
    write(ours.issue("node.test"));
    std::fs::write(file("ca"), &ours.pem).unwrap();
    let free = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let address = free.local_addr().unwrap();
    drop(free);
    let listen = xebec_hubble::serve::Listen {
        address,
        tls: Some(xebec_hubble::tls::Files {
            cert: file("cert"),
            key: file("key"),
            client_cas: vec![file("ca")],
        }),
    };
    let flows = flows();
    take(&flows, event(WEB, API));
    let shutdown = CancellationToken::new();
    let serving = serve::run(
        file("hubble.sock"),
        Some(listen),
        flows,
        watch::channel(None).1,
        shutdown.clone(),
    );
    let serving = tokio::spawn(serving);
    let friend = || Some(ours.issue("relay.test"));
    while tokio::net::TcpStream::connect(address).await.is_err() {
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    assert_eq!(asks(address, &ours, friend()).await, Ok(2));
    let nobody = asks(address, &ours, None).await;
    assert!(nobody.is_err(), "{nobody:?}");
    let stranger = asks(address, &ours, Some(others.issue("relay.test"))).await;
    assert!(stranger.is_err(), "{stranger:?}");
    let deceived = asks(address, &others, friend()).await;
    assert!(deceived.is_err(), "{deceived:?}");
    // Without TLS, not even an error can be read.
    let plain = Endpoint::from_shared(format!("http://{address}")).unwrap();
    if let Ok(channel) = plain.connect().await {
        let mut client = ObserverClient::new(channel);
        assert!(client.server_status(ServerStatusRequest {}).await.is_err());
    }
    // A new certificate is served without a restart; a broken one is not.
    std::fs::write(file("ca"), "nonsense").unwrap();
    assert_eq!(asks(address, &ours, friend()).await, Ok(2));
    write(others.issue("node.test"));
    std::fs::write(file("ca"), &others.pem).unwrap();
    let new = asks(address, &others, Some(others.issue("relay.test"))).await;
    assert_eq!(new, Ok(2));
    assert!(asks(address, &ours, friend()).await.is_err());
    shutdown.cancel();
    serving.await.unwrap().unwrap();
}
