//! The node's own rules (host firewall), by real sockets: who reaches it, whom it reaches, and what becomes of connections
//! that are there.

use std::io::{Read, Write};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream};
use std::time::Duration;

use serde_json::{Value, json};

use crate::alone;
use crate::stage::{FAR_POD, NODE, OTHER, OUTSIDE, Options, Stage, TARGET, left_out};

/// Ports that the node listens at.
const OPEN: u16 = 7001;
const CLOSED: u16 = 7002;
/// How long it is waited for what is forbidden.
const MOMENT: Duration = Duration::from_millis(300);

/// Who connects.
#[derive(Clone, Copy)]
enum Who {
    Node,
    OtherNode,
    Pod,
}

fn connect(stage: &Stage, from: Who, to: SocketAddr) -> Option<TcpStream> {
    let dial = || {
        let stream = TcpStream::connect_timeout(&to, MOMENT).ok()?;
        stream.set_read_timeout(Some(MOMENT)).unwrap();
        Some(stream)
    };
    match from {
        Who::Node => stage.on_node(dial),
        Who::OtherNode => stage.on_other_node(dial),
        Who::Pod => stage.pod.run(dial),
    }
}

/// Whether the other end answers.
fn answers(stream: &mut TcpStream) -> bool {
    let mut answer = [0; 4];
    stream.write_all(b"ping").is_ok() && stream.read_exact(&mut answer).is_ok()
}

/// Answers every piece with itself, on all of the node's addresses.
fn listen(stage: &Stage, port: u16) {
    stage.on_node(|| {
        let listener = TcpListener::bind(("::", port)).unwrap();
        std::thread::spawn(move || {
            for mut stream in listener.incoming().flatten() {
                std::thread::spawn(move || {
                    let mut buffer = [0; 64];
                    while let Ok(length @ 1..) = stream.read(&mut buffer) {
                        if stream.write_all(&buffer[..length]).is_err() {
                            break;
                        }
                    }
                });
            }
        });
    });
}

fn at(addresses: [&str; 2], family: usize, port: u16) -> SocketAddr {
    SocketAddr::new(addresses[family].parse::<IpAddr>().unwrap(), port)
}

/// Waits until who connects to whom is as it should be, over both families.
fn wait_for(stage: &mut Stage, what: &str, wanted: &[(Who, [&str; 2], u16, bool)]) {
    stage.wait(what, |stage| {
        wanted.iter().all(|(from, to, port, reached)| {
            (0..2).all(|family| {
                let mut stream = connect(stage, *from, at(*to, family, *port));
                stream.as_mut().is_some_and(answers) == *reached
            })
        })
    });
}

fn policy(spec: Value) -> Value {
    json!({
        "apiVersion": "cilium.io/v2", "kind": "CiliumClusterwideNetworkPolicy",
        "metadata": {"name": "nodes"}, "spec": spec,
    })
}

fn ports(port: u16) -> Value {
    json!([{"ports": [{"port": port.to_string(), "protocol": "TCP"}]}])
}

#[test]
fn a_node_has_rules_of_its_own() {
    if left_out() {
        return;
    }
    let _alone = alone();
    let mut stage = Stage::new();
    let definition = "ciliumclusterwidenetworkpolicies.cilium.io";
    stage.api.set(
        "customresourcedefinitions",
        [json!({"metadata": {"name": definition}})],
    );
    stage.start(&Options::default());
    stage.wait_until_ready();
    stage.connect();
    listen(&stage, OPEN);
    listen(&stage, CLOSED);
    use Who::{Node, OtherNode, Pod};
    let open = [
        (OtherNode, NODE, OPEN, true),
        (OtherNode, NODE, CLOSED, true),
        (Pod, NODE, OPEN, true),
        (Node, OTHER, TARGET, true),
    ];
    // The server of all ports is of IPv4 alone.
    let open = |stage: &mut Stage, what: &str| {
        wait_for(stage, what, &open[..3]);
        let to = at(OTHER, 0, TARGET);
        stage.wait(what, |stage| {
            let mut stream = connect(stage, Node, to);
            stream.as_mut().is_some_and(answers)
        });
    };
    open(&mut stage, "all is open");
    let own = at(NODE, 0, OPEN);
    let mut kept = connect(&stage, OtherNode, own).unwrap();
    let mut cut = connect(&stage, OtherNode, at(NODE, 0, CLOSED)).unwrap();
    let mut begun = connect(&stage, Node, at(OTHER, 0, TARGET)).unwrap();
    assert!([&mut kept, &mut cut, &mut begun].into_iter().all(answers));

    let from_nodes = json!([{"fromEntities": ["remote-node"], "toPorts": ports(OPEN)}]);
    let of = |more: Value| {
        let mut spec = json!({"nodeSelector": {"matchLabels": {"role": "guarded"}}});
        spec["ingress"] = from_nodes.clone();
        for (key, value) in more.as_object().unwrap() {
            spec[key] = value.clone();
        }
        policy(spec)
    };
    // For another node first.
    stage
        .api
        .set("ciliumclusterwidenetworkpolicies", [of(json!({}))]);
    stage.wait("the policy is known", |stage| {
        let policies = stage.try_ask("GET", "/tables/policies", "").unwrap();
        policies[0]["state"] == "in force" && policies[0]["node"] == false
    });
    open(&mut stage, "another node is guarded");
    stage.label_node(json!({"role": "guarded"}));
    wait_for(
        &mut stage,
        "the node is guarded",
        &[
            (OtherNode, NODE, OPEN, true),
            (OtherNode, NODE, CLOSED, false),
            (Pod, NODE, OPEN, false),
        ],
    );
    // What was there before is judged as if it began now, whoever speaks first.
    assert!(answers(&mut kept) && answers(&mut begun), "{}", stage.log());
    assert!(!answers(&mut cut));
    // The pod is not the node's to lose.
    assert!(
        stage
            .seen_source(OUTSIDE[0].parse().unwrap(), true)
            .is_some()
    );
    let path = "/policy/explain?from=node:b&to=node:a&port=7002";
    let said = stage.try_ask("GET", path, "").unwrap();
    assert_eq!(said["ingress"]["allowed"], false, "{said}");
    let remedies = said["ingress"]["remedies"].to_string();
    assert!(remedies.contains("add it to its ports"), "{said}");

    // After another agent, too, and without one.
    stage.kill();
    assert!(answers(&mut kept) && connect(&stage, OtherNode, at(NODE, 0, CLOSED)).is_none());
    stage.start(&Options::default());
    stage.wait_until_ready();
    assert!(answers(&mut kept) && answers(&mut begun), "{}", stage.log());
    assert!(connect(&stage, OtherNode, at(NODE, 0, CLOSED)).is_none());

    // What it sends: to one port of the other node.
    let egress = json!([{"toEntities": ["remote-node"], "toPorts": ports(TARGET)}]);
    stage.api.set(
        "ciliumclusterwidenetworkpolicies",
        [of(json!({"egress": egress}))],
    );
    wait_for(
        &mut stage,
        "the node may ask one port alone",
        &[
            (Node, OTHER, TARGET + 1, false),
            (Node, FAR_POD, TARGET + 1, false),
            (OtherNode, NODE, OPEN, true),
        ],
    );
    assert!(connect(&stage, Node, at(OTHER, 0, TARGET)).is_some());
    assert!(answers(&mut kept) && answers(&mut begun));
    // What is broken is for no node, and says so.
    stage.api.set(
        "ciliumclusterwidenetworkpolicies",
        [of(json!({"egress": [{"toNodes": [{}]}]}))],
    );
    open(&mut stage, "what is broken is for no node");
    stage.wait("an event says so", |stage| {
        let mut events = stage.api.events().into_iter();
        events.any(|(reason, about, words)| {
            reason == "InvalidPolicy" && about == "nodes" && words.contains("it is for no node")
        })
    });
}
