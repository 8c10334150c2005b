//! What flows tell of what pods say: questions to a real resolver, the names that its answers give addresses, and HTTP.

use std::io::{Read, Write};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream};
use std::time::Duration;

use serde_json::{Value, json};
use simple_dns::TYPE;
use xebec_hubble::client::Server;
use xebec_hubble::observer::GetFlowsRequest;
use xebec_hubble::observer::get_flows_response::ResponseTypes;
use xebec_hubble::observer::observer_client::ObserverClient;

use crate::alone;
use crate::domains::{Resolver, ask, ask_by_tcp};
use crate::stage::{FAR_POD, OTHER, OUTSIDE, Options, Stage, TARGET, left_out};

/// How long anything may take.
const PATIENCE: Duration = Duration::from_secs(10);
const MOMENT: Duration = Duration::from_millis(300);
/// The port of a server of HTTP.
const HTTP: u16 = 8088;

/// All flows that the agent keeps and that pass, as JSON.
fn flows(stage: &Stage, pass: impl Fn(&Value) -> bool) -> Vec<Value> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap();
    let server = Server::Unix(stage.path(xebec_agent::HUBBLE_SOCKET));
    let told = runtime.block_on(async {
        let channel = server.connect(None).await.unwrap();
        let mut client = ObserverClient::new(channel);
        let answer = client.get_flows(GetFlowsRequest::default()).await.unwrap();
        let (mut answers, mut told) = (answer.into_inner(), Vec::new());
        while let Some(one) = answers.message().await.unwrap() {
            if let Some(ResponseTypes::Flow(flow)) = one.response_types {
                told.push(serde_json::to_value(flow).unwrap());
            }
        }
        told
    });
    told.into_iter().filter(pass).collect()
}

/// The flows that pass, once there are so many.
fn wait_for(stage: &mut Stage, count: usize, pass: impl Fn(&Value) -> bool) -> Vec<Value> {
    let mut found = Vec::new();
    stage.wait("flows are told of", |stage| {
        found = flows(stage, &pass);
        found.len() >= count
    });
    assert_eq!(found.len(), count, "{found:#?}");
    found
}

fn stage(annotations: Value) -> Stage {
    let mut stage = Stage::new();
    stage.start(&Options::default());
    stage.wait_until_ready();
    let own = stage.connect();
    let pod = json!({
        "metadata": {"namespace": "n", "name": "client", "labels": {}, "annotations": annotations},
        "spec": {"nodeName": "a", "containers": []},
        "status": {"phase": "Running", "podIPs": own.map(|ip| json!({"ip": ip}))},
    });
    stage.api.set("pods", [pod]);
    stage
}

#[test]
fn what_a_pod_asks_resolvers_is_told_and_names_its_flows() {
    if left_out() {
        return;
    }
    let _alone = alone();
    let mut stage = stage(json!({}));
    let records = [
        format!("host-record=site.example,{},{}", OUTSIDE[0], OUTSIDE[1]),
        "cname=alias.example,site.example".to_owned(),
        format!("host-record=tcp.example,{}", FAR_POD[0]),
        "host-record=up.example,192.0.2.1".to_owned(),
        "local=/nowhere.example/".to_owned(),
    ];
    let _resolver = Resolver::start(&stage, &OTHER, &records);
    stage.wait("the resolver answers", |stage| {
        ask(stage, OTHER[0], "up.example", TYPE::A, MOMENT).is_some()
    });
    assert!(ask(&stage, OTHER[0], "alias.example", TYPE::A, PATIENCE).is_some());
    assert!(ask(&stage, OTHER[1], "alias.example", TYPE::AAAA, PATIENCE).is_some());
    assert!(ask(&stage, OTHER[0], "nowhere.example", TYPE::A, PATIENCE).is_some());
    ask_by_tcp(&stage, OTHER[0], "tcp.example");
    for to in [OUTSIDE[0], OUTSIDE[1], FAR_POD[0], FAR_POD[1]] {
        let to = SocketAddr::new(to.parse().unwrap(), TARGET);
        // What is told does not depend on who listens there.
        stage
            .pod
            .run(|| drop(TcpStream::connect_timeout(&to, MOMENT)));
    }
    let line = |flow: &Value| flow["Summary"].as_str().unwrap_or_default().to_owned();
    let of = |name: &'static str| move |flow: &Value| flow["l7"]["dns"]["query"] == name;
    let told = wait_for(&mut stage, 4, of("alias.example."));
    assert_eq!(
        told.iter().map(line).collect::<Vec<_>>(),
        [
            "DNS Query alias.example. A".to_owned(),
            format!(
                "DNS Answer {:?} CNAMEs: \"site.example.\" TTL: 300 (Query alias.example. A)",
                OUTSIDE[0]
            ),
            "DNS Query alias.example. AAAA".to_owned(),
            format!(
                "DNS Answer {:?} CNAMEs: \"site.example.\" TTL: 300 (Query alias.example. AAAA)",
                OUTSIDE[1]
            ),
        ]
    );
    let answer = &told[1];
    assert_eq!(answer["source"]["labels"][0], "reserved:remote-node");
    assert_eq!(answer["destination"]["pod_name"], "client");
    assert_eq!(
        (&answer["Type"], &answer["is_reply"], &answer["verdict"]),
        (&json!("L7"), &json!(true), &json!("FORWARDED"))
    );
    let took: u64 = answer["l7"]["latency_ns"]
        .as_str()
        .unwrap()
        .parse()
        .unwrap();
    assert!((1_000..10_000_000_000).contains(&took), "{took}");
    let failed = wait_for(&mut stage, 2, of("nowhere.example."));
    assert_eq!(failed[1]["l7"]["dns"]["rcode"], 3);
    assert_eq!(wait_for(&mut stage, 2, of("tcp.example.")).len(), 2);
    // Flows to an address show the name that the pod asked for, and none that it did not.
    for (to, names) in [
        (OUTSIDE[0], json!(["alias.example"])),
        (OUTSIDE[1], json!(["alias.example"])),
        (FAR_POD[0], json!(["tcp.example"])),
        (FAR_POD[1], Value::Null),
    ] {
        let begins = |flow: &Value| {
            flow["IP"]["destination"] == to
                && flow["l4"]["TCP"]["flags"]["SYN"] == true
                && flow["trace_observation_point"] == "FROM_ENDPOINT"
        };
        stage.wait("the flow is told of", |stage| {
            !flows(stage, begins).is_empty()
        });
        let flow = &flows(&stage, begins)[0];
        assert_eq!(flow["destination_names"], names, "{flow:#}");
    }
    let metric =
        r#"hubble_dns_responses_total{rcode="Non-Existent Domain",qtypes="A",ips_returned="0"}"#;
    assert_eq!(stage.metric(metric), Some(1.0));
}

#[test]
fn http_of_a_pod_with_the_annotation_is_told() {
    if left_out() {
        return;
    }
    let _alone = alone();
    let mut stage = stage(json!({"observe.xebec.io/http": "true"}));
    let far: IpAddr = FAR_POD[0].parse().unwrap();
    stage.on_other_node(|| {
        let listener = TcpListener::bind((far, HTTP)).unwrap();
        std::thread::spawn(move || {
            for mut stream in listener.incoming().flatten() {
                let mut buffer = [0; 1024];
                while let Ok(1..) = stream.read(&mut buffer) {
                    std::thread::sleep(Duration::from_millis(20));
                    let answer = b"HTTP/1.1 503 Service Unavailable\r\nContent-Length: 0\r\n\r\n";
                    if stream.write_all(answer).is_err() {
                        break;
                    }
                }
            }
        });
    });
    let get = |stage: &Stage, path: &str| {
        stage.pod.run(|| {
            let mut stream = TcpStream::connect((far, HTTP)).unwrap();
            let request = format!("GET {path}?key=secret HTTP/1.1\r\nHost: api\r\n\r\n");
            for _ in 0..2 {
                stream.write_all(request.as_bytes()).unwrap();
                assert!(stream.read(&mut [0; 1024]).unwrap() > 0);
            }
        });
    };
    // The annotation may come to the agent a moment after the pod.
    stage.wait("HTTP is told of", |stage| {
        get(stage, "/first");
        !flows(stage, |flow| flow["l7"]["http"]["code"] == 503).is_empty()
    });
    get(&stage, "/orders");
    let url = "http://api/orders";
    let told = wait_for(&mut stage, 4, |flow| flow["l7"]["http"]["url"] == url);
    for (request, response) in [(&told[0], &told[1]), (&told[2], &told[3])] {
        assert_eq!(request["Summary"], format!("HTTP/1.1 GET {url}"));
        assert_eq!(request["traffic_direction"], "EGRESS");
        assert_eq!(response["traffic_direction"], "EGRESS");
        assert_eq!(response["l7"]["http"]["code"], 503);
        let took: u64 = response["l7"]["latency_ns"]
            .as_str()
            .unwrap()
            .parse()
            .unwrap();
        assert!(took >= 20_000_000, "{took}");
    }
    let metric = r#"hubble_http_responses_total{method="GET",status="503",reporter="client"}"#;
    assert!(stage.metric(metric).unwrap() >= 3.0);
    // Without it, nothing is.
    let mut pod = json!({
        "metadata": {"namespace": "n", "name": "client", "labels": {}},
        "spec": {"nodeName": "a", "containers": []},
    });
    pod["status"] = json!({"phase": "Running"});
    stage.api.set("pods", [pod]);
    stage.wait("HTTP is told of no more", |stage| {
        let count = |stage: &Stage| {
            let of = |flow: &Value| flow["l7"]["http"]["url"] == "http://api/last";
            flows(stage, of).len()
        };
        let before = count(stage);
        get(stage, "/last");
        std::thread::sleep(MOMENT);
        count(stage) == before
    });
}
