//! Flows as they are printed; the lines are what `hubble observe` 1.19 prints of the same flows, but for the rule.

use serde_json::{Value, json};

use super::*;

fn style(output: Output) -> Style {
    Style {
        output,
        color: Color::Never,
        names: true,
        node_name: false,
        policy_names: false,
        time: Format::StampMilli,
    }
}

fn print(style: Style, answers: &[Value]) -> String {
    let mut printer = Printer::new(style, Vec::new(), Vec::new());
    for answer in answers {
        let answer = serde_json::from_value(answer.clone()).expect("an answer");
        assert!(printer.print(&answer).unwrap());
    }
    crate::text::write_grid(&mut printer.out, &std::mem::take(&mut printer.rows)).unwrap();
    printer.out.extend(printer.errors);
    String::from_utf8(printer.out).unwrap()
}

/// A connection that a policy lets in.
fn allowed() -> Value {
    json!({"flow": {
        "time": "2026-01-02T03:04:05.678901Z", "verdict": "FORWARDED",
        "IP": {"source": "10.244.0.5", "destination": "10.244.0.6", "ipVersion": "IPv4"},
        "l4": {"TCP": {"source_port": 4000, "destination_port": 8080, "flags": {"SYN": true}}},
        "source": {"namespace": "shop", "pod_name": "web-1", "identity": 7000},
        "destination": {"namespace": "shop", "pod_name": "api-1", "identity": 8000},
        "event_type": {"type": 5}, "policy_match_type": 2,
        "traffic_direction": "INGRESS", "is_reply": false, "node_name": "node1",
        "Summary": "TCP Flags: SYN",
        "ingress_allowed_by": [{
            "kind": "NetworkPolicy", "namespace": "shop", "name": "api",
            "labels": ["k8s:io.cilium.k8s.policy.name=api", "xebec:rule=ingress[2]"],
        }],
    }, "node_name": "node1", "time": "2026-01-02T03:04:05.678901Z"})
}

/// One from outside that none lets in.
fn dropped() -> Value {
    json!({"flow": {
        "time": "2026-01-12T03:04:05Z", "verdict": "DROPPED", "drop_reason_desc": "POLICY_DENIED",
        "IP": {"source": "2001:db8::7", "destination": "fd00::6", "ipVersion": "IPv6"},
        "l4": {"UDP": {"source_port": 4000, "destination_port": 53}},
        "source": {"identity": 2, "labels": ["reserved:world"]},
        "destination": {"namespace": "shop", "pod_name": "api-1", "identity": 8000},
        "event_type": {"type": 1, "sub_type": 133},
        "traffic_direction": "INGRESS", "node_name": "node1", "Summary": "UDP",
        "ingress_denied_by": [{"kind": "NetworkPolicy", "namespace": "shop", "name": "api"}],
    }})
}

fn reply() -> Value {
    json!({"flow": {
        "time": "2026-01-02T03:04:05.5Z", "verdict": "FORWARDED",
        "IP": {"source": "192.0.2.1", "destination": "10.244.0.6", "ipVersion": "IPv4"},
        "l4": {"TCP": {"source_port": 443, "destination_port": 4000}},
        "source": {"identity": 2}, "source_names": ["a.example.com", "b.example.com"],
        "destination": {"namespace": "shop", "pod_name": "web-1", "identity": 7000},
        "event_type": {"type": 4}, "is_reply": true, "Summary": "TCP Flags: SYN, ACK",
    }})
}

fn lost() -> Value {
    json!({
        "lost_events": {"source": "PERF_EVENT_RING_BUFFER", "num_events_lost": "7"},
        "node_name": "node2", "time": "2026-01-02T03:04:05Z",
    })
}

#[test]
fn compact_is_a_line_a_flow() {
    assert_eq!(
        print(
            style(Output::Compact),
            &[allowed(), dropped(), reply(), lost()]
        ),
        "Jan  2 03:04:05.678: shop/web-1:4000 (ID:7000) -> shop/api-1:8080 (ID:8000) policy-verdict:L3-L4 INGRESS ALLOWED (TCP Flags: SYN; by NetworkPolicy shop/api ingress[2])\n\
         Jan 12 03:04:05.000: [2001:db8::7]:4000 (world) <> shop/api-1:53 (ID:8000) POLICY_DENIED DROPPED (UDP; by NetworkPolicy shop/api ingress)\n\
         Jan  2 03:04:05.500: shop/web-1:4000 (ID:7000) <- a.example.com,b.example.com:443 (world) to-endpoint FORWARDED (TCP Flags: SYN, ACK)\n\
         Jan  2 03:04:05.000: EVENTS LOST: PERF_EVENT_RING_BUFFER 7\n"
    );
}

#[test]
fn names_nodes_policies_and_colours_are_as_asked() {
    let numeric = Style {
        names: false,
        node_name: true,
        policy_names: true,
        ..style(Output::Compact)
    };
    assert_eq!(
        print(numeric, &[allowed()]),
        "Jan  2 03:04:05.678 [node1]: 10.244.0.5:4000 (ID:7000) -> 10.244.0.6:8080 (ID:8000) policy-verdict:L3-L4 INGRESS ALLOWED BY api (NetworkPolicy) (TCP Flags: SYN)\n"
    );
    let coloured = Style {
        color: Color::Always,
        policy_names: true,
        ..style(Output::Compact)
    };
    assert_eq!(
        print(coloured, &[dropped()]),
        "Jan 12 03:04:05.000: \x1b[36m[2001:db8::7]:\x1b[33m4000\x1b[0m\x1b[0m \x1b[35m(world)\x1b[0m <> \x1b[36mshop/api-1:\x1b[33m53\x1b[0m\x1b[0m \x1b[35m(ID:8000)\x1b[0m POLICY_DENIED \x1b[31mDROPPED\x1b[0m (UDP)\n"
    );
}

#[test]
fn dict_and_table_have_names_for_what_they_show() {
    assert_eq!(
        print(style(Output::Dict), &[dropped(), lost()]),
        "  TIMESTAMP: Jan 12 03:04:05.000\n     SOURCE: [2001:db8::7]:4000\nDESTINATION: shop/api-1:53\n       TYPE: POLICY_DENIED\n    VERDICT: DROPPED\n    SUMMARY: UDP; by NetworkPolicy shop/api ingress\n\
         ------------\n  TIMESTAMP: Jan  2 03:04:05.000\n     SOURCE: PERF_EVENT_RING_BUFFER\n       TYPE: EVENTS LOST\n    SUMMARY: 7\n"
    );
    let table = Style {
        node_name: true,
        ..style(Output::Table)
    };
    assert_eq!(
        print(table, &[dropped(), lost()]),
        "TIMESTAMP             NODE    SOURCE                   DESTINATION     TYPE            VERDICT   SUMMARY\n\
         Jan 12 03:04:05.000   node1   [2001:db8::7]:4000       shop/api-1:53   POLICY_DENIED   DROPPED   UDP; by NetworkPolicy shop/api ingress\n\
         Jan  2 03:04:05.000   node2   PERF_EVENT_RING_BUFFER   -               EVENTS LOST     -         7\n"
    );
}

#[test]
fn json_is_what_the_server_said() {
    let written = print(style(Output::Json), &[allowed(), lost()]);
    let lines: Vec<Value> = written
        .lines()
        .map(|line| serde_json::from_str(line).unwrap())
        .collect();
    assert_eq!(lines, [allowed(), lost()]);
}

#[test]
fn nodes_that_fail_are_told_of_beside_the_flows() {
    let status = |state: &str| {
        json!({
            "node_status": {"state_change": state, "node_names": ["node2", "node3"], "message": "no"},
            "node_name": "relay", "time": "2026-01-02T03:04:05Z",
        })
    };
    assert_eq!(
        print(style(Output::Compact), &[status("NODE_CONNECTED")]),
        ""
    );
    assert_eq!(
        print(
            style(Output::Compact),
            &[status("NODE_UNAVAILABLE"), status("NODE_ERROR")]
        ),
        "Jan  2 03:04:05.000 [relay]: nodes that do not answer: node2, node3\n\
         Jan  2 03:04:05.000 [relay]: \"no\" on nodes node2, node3\n"
    );
}
