//! Flows as they are kept, filtered and written.

use super::*;
use serde_json::{Value, json};
use xebec_dataplane_common::flow::{AUDITED, FORWARDED, INGRESS, REASON_RULE};
use xebec_dataplane_common::{ICMP, ICMP6, SCTP, TCP, UDP};
use xebec_policy::names::By;
use xebec_policy::rule::RuleId;

const WEB: [u8; 4] = [10, 244, 0, 5];
const API: [u8; 4] = [10, 244, 0, 6];

fn flows() -> Flows {
    let names = Names::default();
    for (address, pod, identity) in [(WEB, "web-1", 1000), (API, "api-1", 1001)] {
        let labels = [("app".to_owned(), pod[..3].to_owned())].into();
        let name = ("shop".to_owned(), pod.to_owned());
        let owner = ("ReplicaSet".to_owned(), pod[..3].to_owned());
        names.set(
            address.into(),
            Peer::pod(&name, identity, &labels, Some(&owner)),
        );
    }
    let policy = Arc::new(PolicyRef {
        source: xebec_policy::rule::Source::NetworkPolicy,
        namespace: "shop".to_owned(),
        name: "api-from-web".to_owned(),
    });
    names.set_set(7, vec![policy.clone()]);
    let rule = RuleId {
        policy,
        list: "ingress",
        index: 2,
    };
    let rule = RuleName {
        id: rule,
        by_peer: true,
        by: By::Port,
    };
    names.set_rule(42, rule);
    Flows::new(names, "here", KEPT, FlowMetrics::usual())
}

fn event(source: [u8; 4], destination: [u8; 4]) -> Event {
    Event {
        time: 5_000_000_000,
        source: std::net::Ipv4Addr::from(source).into(),
        destination: std::net::Ipv4Addr::from(destination).into(),
        source_port: 4000_u16.to_be(),
        destination_port: 8080_u16.to_be(),
        protocol: TCP,
        tcp_flags: 0x02,
        verdict: FORWARDED,
        direction: INGRESS,
        reason: 0,
        reply: 0,
        length: 60,
        set: 7,
        rule: 42,
        service: 0,
    }
}

fn dropped(source: [u8; 4], destination: [u8; 4]) -> Event {
    Event {
        verdict: DROPPED,
        reason: REASON_POLICY,
        rule: 0,
        ..event(source, destination)
    }
}

fn take(flows: &Flows, event: Event) {
    flows.take(&[event], 1_767_323_045_000_000_000);
}

/// The newest flow of a kind.
fn newest(flows: &Flows, kind: Kind) -> Flow {
    let store = flows.store();
    let (first, entries) = store.range(0, u64::MAX);
    let of_kind = (first..)
        .zip(entries)
        .filter_map(|(number, entry)| match entry {
            Entry::Flow(seen) if seen.kind == kind => Some(flows.message(number, seen)),
            _ => None,
        });
    of_kind.last().expect("a flow of this kind")
}

fn json(flow: &Flow) -> Value {
    serde_json::to_value(flow).expect("JSON")
}

#[test]
fn an_allowed_flow_names_ends_and_rule() {
    let flows = flows();
    take(&flows, event(WEB, API));
    let by = json!([{
        "name": "api-from-web", "namespace": "shop", "kind": "NetworkPolicy",
        "labels": [
            "k8s:io.cilium.k8s.policy.derived-from=NetworkPolicy",
            "k8s:io.cilium.k8s.policy.name=api-from-web",
            "k8s:io.cilium.k8s.policy.namespace=shop",
            "xebec:rule=ingress[2]",
        ],
    }]);
    let uuid = newest(&flows, Kind::Passed).uuid;
    assert_eq!((uuid.len(), &uuid[14..15]), (36, "8"), "{uuid}");
    let flow = json(&newest(&flows, Kind::Passed));
    assert_eq!(
        flow,
        json!({
            "time": "2026-01-02T03:04:10Z",
            "uuid": uuid,
            "emitter": {"name": "Xebec", "version": env!("CARGO_PKG_VERSION")},
            "verdict": "FORWARDED",
            "IP": {"source": "10.244.0.5", "destination": "10.244.0.6", "ipVersion": "IPv4"},
            "l4": {"TCP": {"source_port": 4000, "destination_port": 8080, "flags": {"SYN": true}}},
            "source": {
                "identity": 1000, "cluster_name": "default", "namespace": "shop",
                "labels": ["k8s:app=web"], "pod_name": "web-1",
                "workloads": [{"kind": "ReplicaSet", "name": "web"}],
            },
            "destination": {
                "identity": 1001, "cluster_name": "default", "namespace": "shop",
                "labels": ["k8s:app=api"], "pod_name": "api-1",
                "workloads": [{"kind": "ReplicaSet", "name": "api"}],
            },
            "Type": "L3_L4",
            "node_name": "here",
            "event_type": {"type": 4},
            "traffic_direction": "INGRESS",
            "trace_observation_point": "TO_ENDPOINT",
            "trace_reason": "NEW",
            "is_reply": false,
            "Summary": "TCP Flags: SYN",
            "ingress_allowed_by": by,
        })
    );
    let verdict = json(&newest(&flows, Kind::Verdict));
    assert_eq!(verdict["event_type"], json!({"type": 5}));
    assert_eq!(verdict["policy_match_type"], 2);
    assert_eq!(verdict["verdict"], "FORWARDED");
    assert_eq!(verdict["ingress_allowed_by"], by);
    assert_ne!(verdict["uuid"], flow["uuid"]);
}

#[test]
fn a_dropped_flow_names_reason_and_policies() {
    let flows = flows();
    take(&flows, dropped([198, 51, 100, 7], API));
    for kind in [Kind::Dropped, Kind::Verdict] {
        let flow = json(&newest(&flows, kind));
        assert_eq!(flow["verdict"], "DROPPED");
        assert_eq!(flow["drop_reason_desc"], "POLICY_DENIED");
        assert_eq!(flow["drop_reason"], 133);
        assert_eq!(flow["source"]["labels"], json!(["reserved:world"]));
        assert_eq!(flow["source"]["pod_name"], Value::Null);
        assert_eq!(flow["ingress_denied_by"][0]["name"], "api-from-web");
        assert_eq!(flow["ingress_allowed_by"], Value::Null);
    }
    let flow = json(&newest(&flows, Kind::Dropped));
    assert_eq!(flow["event_type"], json!({"type": 1, "sub_type": 133}));
    assert_eq!(flow["is_reply"], Value::Null);
    // No policy has judged it: there is no verdict to tell.
    let before = flows.store().next();
    let event = Event {
        reason: xebec_dataplane_common::flow::REASON_TTL,
        set: 0,
        ..dropped(WEB, API)
    };
    take(&flows, event);
    assert_eq!(flows.store().next(), before + 1);
}

#[test]
fn what_is_audited_says_who_would_have_dropped_it() {
    let flows = flows();
    let audited = Event {
        verdict: AUDITED,
        ..dropped(WEB, API)
    };
    take(&flows, audited);
    let flow = json(&newest(&flows, Kind::Verdict));
    assert_eq!(flow["verdict"], "AUDIT");
    assert_eq!(flow["ingress_denied_by"][0]["name"], "api-from-web");
    assert_eq!(
        flow["ingress_denied_by"][0]["labels"]
            .as_array()
            .map(Vec::len),
        Some(3)
    );
    assert_eq!(flow["drop_reason"], Value::Null);
    assert_eq!(flow["ingress_allowed_by"], Value::Null);
    // The packet went on.
    let flow = json(&newest(&flows, Kind::Passed));
    assert_eq!(flow["verdict"], "FORWARDED");
    assert_eq!(flow["ingress_denied_by"], Value::Null);
    // By a rule that says so.
    let denied = Event {
        verdict: DROPPED,
        reason: REASON_RULE,
        ..event(WEB, API)
    };
    take(&flows, denied);
    let flow = json(&newest(&flows, Kind::Dropped));
    assert_eq!(flow["drop_reason_desc"], "POLICY_DENY");
    assert_eq!(
        flow["ingress_denied_by"][0]["labels"][3],
        "xebec:rule=ingress[2]"
    );
}

#[test]
fn every_protocol_has_its_layer_and_summary() {
    let flows = flows();
    let kind = |kind: u8, code: u8| u16::from_ne_bytes([kind, code]);
    for (protocol, port, flags, layer, summary) in [
        (TCP, 4000_u16.to_be(), 0x12, "TCP", "TCP Flags: SYN, ACK"),
        (TCP, 4000_u16.to_be(), 0x11, "TCP", "TCP Flags: ACK, FIN"),
        (UDP, 4000_u16.to_be(), 0, "UDP", "UDP"),
        (SCTP, 4000_u16.to_be(), 0, "SCTP", "SCTP"),
        (ICMP, kind(8, 0), 0, "ICMPv4", "ICMPv4 EchoRequest"),
        (
            ICMP,
            kind(3, 4),
            0,
            "ICMPv4",
            "ICMPv4 DestinationUnreachable",
        ),
        (ICMP, kind(5, 1), 0, "ICMPv4", "ICMPv4 type 5 code 1"),
        (ICMP6, kind(129, 0), 0, "ICMPv6", "ICMPv6 EchoReply"),
    ] {
        let event = Event {
            protocol,
            source_port: port,
            tcp_flags: flags,
            ..event(WEB, API)
        };
        take(&flows, event);
        let flow = json(&newest(&flows, Kind::Passed));
        assert!(flow["l4"][layer].is_object(), "{flow}");
        assert_eq!(flow["Summary"], summary);
    }
}

mod exported;
mod served;

#[test]
fn only_who_reads_events_gives_way() {
    // SAFETY: the function takes numbers alone.
    let nice = || unsafe { libc::getpriority(libc::PRIO_PROCESS, 0) };
    let before = nice();
    let reader = std::thread::spawn(move || {
        give_way();
        nice()
    });
    assert_eq!((reader.join().unwrap(), nice()), (NICE, before));
}
