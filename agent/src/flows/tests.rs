//! Flows as they are kept, filtered and written.

use super::*;
use serde_json::{Value, json};
use xebec_dataplane_common::flow::{AUDITED, EGRESS, FORWARDED, INGRESS, REASON_RULE, TO_NETWORK};
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
    let services = ServiceNames::default();
    services.add(9, &"shop/api".into());
    let directory = Directory {
        names,
        services,
        node_ips: vec!["192.0.2.10".parse().unwrap()],
    };
    Flows::new(directory, "here", KEPT, FlowMetrics::usual())
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
        ..bytemuck::Zeroable::zeroed()
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
    flows.take(&[event.into()], 1_767_323_045_000_000_000);
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

/// All flows that one event becomes.
fn told(event: Event) -> Vec<Value> {
    let flows = flows();
    take(&flows, event);
    let store = flows.store();
    let (first, entries) = store.range(0, u64::MAX);
    let all = (first..).zip(entries).map(|(number, entry)| match entry {
        Entry::Flow(seen) => json(&flows.message(number, seen)),
        Entry::Lost(..) => panic!("nothing is lost"),
    });
    all.collect()
}

/// An address of a Service, of which `api` is the backend.
const SERVICE: [u8; 4] = [10, 96, 0, 9];

/// What a pod sends to a Service.
fn to_service() -> Event {
    Event {
        direction: EGRESS,
        service: 9,
        new_source: std::net::Ipv4Addr::from(WEB).into(),
        new_destination: std::net::Ipv4Addr::from(API).into(),
        new_source_port: 4000_u16.to_be(),
        new_destination_port: 8080_u16.to_be(),
        destination_port: 80_u16.to_be(),
        ..event(WEB, SERVICE)
    }
}

#[test]
fn what_goes_to_a_service_is_told_of_before_and_after_its_translation() {
    let all = told(to_service());
    let service = json!({"name": "api", "namespace": "shop"});
    let rows: Vec<_> = all
        .iter()
        .map(|flow| {
            assert_eq!(flow["destination_service"], service);
            let point = flow["trace_observation_point"].clone();
            let kind = flow["event_type"]["type"].clone();
            (kind, point, flow["IP"]["destination"].clone())
        })
        .collect();
    assert_eq!(
        rows,
        [
            // Rules judge the backend.
            (json!(5), json!(null), json!("10.244.0.6")),
            (json!(4), json!("FROM_ENDPOINT"), json!("10.96.0.9")),
            (json!(4), json!("TO_NETWORK"), json!("10.244.0.6")),
        ]
    );
    assert_eq!(all[2]["destination"]["pod_name"], "api-1");
    assert_eq!(all[2]["l4"]["TCP"]["destination_port"], 8080);
    // What is refused is told of as what was refused.
    let refused = Event {
        verdict: DROPPED,
        reason: REASON_POLICY,
        rule: 0,
        ..to_service()
    };
    for flow in told(refused) {
        assert_eq!(flow["verdict"], "DROPPED");
        assert_eq!(flow["IP"]["destination"], "10.244.0.6");
    }
    // An answer is told of as it was sent.
    let answer = Event {
        reply: 1,
        set: 0,
        new_source: std::net::Ipv4Addr::from(SERVICE).into(),
        new_destination: std::net::Ipv4Addr::from(WEB).into(),
        service: 9,
        ..event(API, WEB)
    };
    let all = told(answer);
    assert_eq!(all.len(), 1);
    assert_eq!(all[0]["source_service"], service);
    assert_eq!(all[0].get("destination_service"), None);
}

#[test]
fn a_pod_of_this_node_is_reached_without_a_network() {
    let flows = flows();
    let address = std::net::Ipv4Addr::from(API).into();
    flows.directory.names.set_local(7, &[address]);
    take(&flows, to_service());
    let flow = json(&newest(&flows, Kind::Translated));
    assert_eq!(flow["trace_observation_point"], "TO_ENDPOINT");
    flows.directory.names.remove_local(&[address]);
    take(&flows, to_service());
    let flow = json(&newest(&flows, Kind::Translated));
    assert_eq!(flow["trace_observation_point"], "TO_NETWORK");
}

#[test]
fn who_leaves_by_the_nodes_address_is_told_of_with_both() {
    let node: xebec_dataplane_common::ip::Ip = std::net::Ipv4Addr::new(192, 0, 2, 10).into();
    let all = told(Event {
        at: TO_NETWORK,
        direction: EGRESS,
        set: 0,
        rule: 0,
        new_source: node,
        new_destination: std::net::Ipv4Addr::new(198, 51, 100, 7).into(),
        ..event(WEB, [198, 51, 100, 7])
    });
    assert_eq!(all.len(), 1);
    assert_eq!(all[0]["trace_observation_point"], "TO_NETWORK");
    assert_eq!(all[0]["IP"]["source"], "10.244.0.5");
    assert_eq!(all[0]["IP"]["source_xlated"], "192.0.2.10");
}

#[test]
fn a_sockets_translation_names_its_pod() {
    let socket = Event {
        at: AT_SOCKET,
        direction: EGRESS,
        set: 0,
        rule: 0,
        source: xebec_dataplane_common::ip::Ip([7, 1, 0, 0]),
        source_port: 0,
        new_source: xebec_dataplane_common::ip::Ip::NONE,
        socket: 77,
        tcp_flags: 0,
        ..to_service()
    };
    for (known, pod, address) in [
        (true, json!("web-1"), "10.244.0.5"),
        (false, json!(null), "192.0.2.10"),
    ] {
        let flows = flows();
        if known {
            let address = std::net::Ipv4Addr::from(WEB).into();
            flows.directory.names.set_local(1 << 32 | 7, &[address]);
        }
        take(&flows, socket);
        let asked = json(&newest(&flows, Kind::Asked));
        let given = json(&newest(&flows, Kind::Given));
        assert_eq!(
            (&asked["verdict"], &given["verdict"]),
            (&json!("TRACED"), &json!("TRANSLATED"))
        );
        assert_eq!(
            asked["sock_xlate_point"],
            "SOCK_XLATE_POINT_PRE_DIRECTION_FWD"
        );
        assert_eq!(
            given["sock_xlate_point"],
            "SOCK_XLATE_POINT_POST_DIRECTION_FWD"
        );
        assert_eq!(
            (&asked["IP"]["destination"], &given["IP"]["destination"]),
            (&json!("10.96.0.9"), &json!("10.244.0.6"))
        );
        for flow in [asked, given] {
            assert_eq!(
                (&flow["Type"], &flow["socket_cookie"]),
                (&json!("SOCK"), &json!("77"))
            );
            assert_eq!(
                flow["source"].get("pod_name").cloned().unwrap_or_default(),
                pod
            );
            assert_eq!(flow["IP"]["source"], address);
            assert_eq!(flow["Summary"], "TCP");
        }
    }
}

#[test]
fn what_an_event_stands_for_is_told_where_it_is_more_than_a_packet() {
    let flow = |event| told(event).pop().unwrap();
    let one = Event {
        packets: 1,
        bytes: [60, 0],
        ..event(WEB, API)
    };
    assert_eq!(flow(one).get("extensions"), None);
    let many = Event {
        packets: 4,
        bytes: [200, 3_000_000_000],
        answered_in: 750,
        ..one
    };
    let told = json!({"packets": 4, "bytes": 200, "reply_bytes": 3_000_000_000_u32, "answered_in_us": 750});
    assert_eq!(flow(many)["extensions"]["value"], told);
}
