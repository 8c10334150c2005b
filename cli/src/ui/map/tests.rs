//! What flows say together.

use serde_json::{Value, json};

use super::*;

fn pod(name: &str, workload: &str) -> Value {
    json!({"namespace": "shop", "pod_name": name, "workloads": [{"kind": "Deployment", "name": workload}]})
}

/// A first packet of `web-1` to `api-1`, with changes.
fn flow(changes: Value) -> Flow {
    let mut flow = json!({
        "time": "2026-01-02T03:04:10Z",
        "verdict": "FORWARDED",
        "l4": {"TCP": {"source_port": 4000, "destination_port": 8080, "flags": {"SYN": true}}},
        "source": pod("web-1", "web"),
        "destination": pod("api-1", "api"),
        "event_type": {"type": 4},
        "traffic_direction": "EGRESS",
        "trace_observation_point": "FROM_ENDPOINT",
        "is_reply": false,
        "Summary": "TCP Flags: SYN",
    });
    for (key, value) in changes.as_object().unwrap() {
        flow[key] = value.clone();
    }
    serde_json::from_value(flow).unwrap()
}

/// s since 1970 of that packet.
const AT: i64 = 1_767_323_050;

fn seen(flows: &[Flow]) -> Vec<Value> {
    let mut map = Map::default();
    flows.iter().for_each(|flow| map.take(flow));
    let picture = serde_json::to_value(map.picture(AT)).unwrap();
    picture["edges"].as_array().unwrap().clone()
}

fn names(edge: &Value) -> [String; 2] {
    ["from", "to"].map(|end| {
        let text = |part: &str| edge[end][part].as_str().unwrap().to_owned();
        join(&text("kind"), &join(&text("namespace"), &text("name")))
    })
}

fn join(one: &str, other: &str) -> String {
    if one.is_empty() {
        other.to_owned()
    } else {
        format!("{one}/{other}")
    }
}

#[test]
fn flows_of_pods_of_one_workload_are_one_line() {
    let other = flow(json!({"source": pod("web-2", "web")}));
    let seen = seen(&[flow(json!({})), other, flow(json!({}))]);
    assert_eq!(seen.len(), 1, "{seen:?}");
    assert_eq!(names(&seen[0]), ["workload/shop/web", "workload/shop/api"]);
    assert_eq!(
        (&seen[0]["begun"], &seen[0]["rate"]),
        (&json!(3), &json!(0.1))
    );
    assert_eq!(seen[0]["ports"], json!(["TCP 8080"]));
}

#[test]
fn each_flow_is_counted_once_wherever_it_is_told_of() {
    let service = json!({"namespace": "shop", "name": "api"});
    let world = json!({"identity": 2, "labels": ["reserved:world"]});
    let verdict = json!({"event_type": {"type": 5}, "trace_observation_point": "UNKNOWN_POINT"});
    let later = json!({"l4": {"TCP": {"source_port": 4000, "destination_port": 8080, "flags": {"ACK": true}}}});
    let flows = [
        // To the Service, and as it is sent on to this node and to another; then by the node of the backend.
        flow(json!({"destination": world, "destination_service": service})),
        flow(json!({"destination_service": service, "trace_observation_point": "TO_ENDPOINT"})),
        flow(json!({"destination_service": service, "trace_observation_point": "TO_NETWORK"})),
        flow(json!({"traffic_direction": "INGRESS", "trace_observation_point": "TO_ENDPOINT"})),
        flow(verdict),
        flow(later),
        // To the outside, as the pod sends it and with the node's address.
        flow(json!({"destination": world})),
        flow(json!({"destination": world, "trace_observation_point": "TO_NETWORK"})),
        // From there, to a node port and then to the pod.
        flow(json!({
            "source": world, "destination": {}, "destination_service": service,
            "traffic_direction": "INGRESS", "trace_observation_point": "FROM_NETWORK",
        })),
        flow(
            json!({"source": world, "traffic_direction": "INGRESS", "trace_observation_point": "TO_ENDPOINT"}),
        ),
    ];
    let seen = seen(&flows);
    let begun: Vec<_> = seen
        .iter()
        .map(|edge| (names(edge).join(" "), edge["begun"].as_u64().unwrap()))
        .collect();
    let wanted = [
        ("world/world workload/shop/api", 1),
        ("workload/shop/web world/world", 1),
        ("workload/shop/web workload/shop/api", 2),
    ];
    assert_eq!(begun, wanted.map(|(pair, begun)| (pair.to_owned(), begun)));
}

#[test]
fn answers_tell_how_long_they_took_the_other_way_round() {
    let extensions = |took: u64| json!({"@type": "type.googleapis.com/google.protobuf.Struct", "value": {"answered_in_us": took}});
    let mut flows: Vec<Flow> = (1..=100)
        .map(|took| {
            flow(json!({
                "source": pod("api-1", "api"), "destination": pod("web-1", "web"), "is_reply": true,
                "l4": {"TCP": {"source_port": 8080, "destination_port": 4000, "flags": {"SYN": true, "ACK": true}}},
                "extensions": extensions(took),
            }))
        })
        .collect();
    for code in [200, 503] {
        flows.push(flow(json!({
            "source": pod("api-1", "api"), "destination": pod("web-1", "web"), "is_reply": true,
            "l4": {"TCP": {"source_port": 8080, "destination_port": 4000}},
            "Type": "L7", "event_type": {"type": 129},
            "l7": {"type": "RESPONSE", "latency_ns": "2000000", "http": {"code": code}},
        })));
    }
    let seen = seen(&flows);
    assert_eq!(seen.len(), 1);
    assert_eq!(names(&seen[0]), ["workload/shop/web", "workload/shop/api"]);
    assert_eq!(seen[0]["handshake"], json!([50, 95]));
    assert_eq!(seen[0]["answer"], json!([2_000, 2_000]));
    assert_eq!(
        (&seen[0]["requests"], &seen[0]["failed"]),
        (&json!(2), &json!(1))
    );
    assert_eq!(seen[0]["ports"], json!(["TCP 8080"]));
}

#[test]
fn drops_have_their_rules() {
    let by = json!([{
        "kind": "NetworkPolicy", "namespace": "shop", "name": "api-from-web",
        "labels": ["xebec:rule=ingress[0]"],
    }]);
    let drop = json!({
        "verdict": "DROPPED", "event_type": {"type": 1, "sub_type": 133}, "drop_reason_desc": "POLICY_DENIED",
        "ingress_denied_by": by, "is_reply": null, "traffic_direction": "INGRESS",
        "trace_observation_point": "UNKNOWN_POINT",
    });
    let seen = seen(&vec![flow(drop); 10]);
    assert_eq!(
        (&seen[0]["dropped"], &seen[0]["begun"]),
        (&json!(10), &json!(0))
    );
    let drops = seen[0]["drops"].as_array().unwrap();
    assert_eq!(drops.len(), 8);
    assert_eq!(
        drops[0],
        json!({
            "time": AT * 1_000_000_000, "what": "TCP Flags: SYN", "reason": "POLICY_DENIED",
            "by": "NetworkPolicy shop/api-from-web ingress[0]",
        })
    );
}

#[test]
fn those_outside_are_called_by_what_is_known_of_them() {
    let world = json!({"identity": 2, "labels": ["reserved:world"]});
    let node = json!({"identity": 6, "labels": ["reserved:remote-node", "k8s:kubernetes.io/hostname=node2"]});
    let bare = json!({"namespace": "shop", "pod_name": "alone"});
    for (destination, wanted) in [
        (json!({"destination": world}), "world/world"),
        (
            json!({"destination": world, "destination_names": ["a.example", "b.example"]}),
            "domain/a.example",
        ),
        (json!({"destination": node}), "node/node2"),
        (json!({"destination": bare}), "workload/shop/alone"),
        (json!({"destination": {"identity": 9}}), "world/unknown"),
    ] {
        assert_eq!(names(&seen(&[flow(destination)])[0])[1], wanted);
    }
    // From outside, the pod's node tells.
    let from = json!({"source": world, "traffic_direction": "INGRESS", "trace_observation_point": "TO_ENDPOINT"});
    assert_eq!(
        names(&seen(&[flow(from)])[0]),
        ["world/world", "workload/shop/api"]
    );
}

#[test]
fn what_is_over_is_forgotten_and_there_is_no_more_than_there_may_be() {
    let mut map = Map::default();
    for number in 0..EDGES + 5 {
        let name = format!("web-{number}");
        map.take(&flow(json!({"source": pod(&name, &name)})));
    }
    map.lose(7);
    let picture = map.picture(AT + WINDOW - 1);
    assert_eq!(
        (picture.edges.len(), picture.beyond, picture.lost),
        (EDGES, 5, 7)
    );
    let picture = map.picture(AT + WINDOW);
    assert_eq!((picture.edges.len(), picture.beyond), (0, 5));
}
