//! A flow as Hubble's API tells of it.

use std::net::IpAddr;

use xebec_dataplane_common::flow::{AUDITED, DROPPED, EGRESS, Event};
use xebec_dataplane_common::{ICMP, ICMP6, SCTP, TCP, UDP};
use xebec_hubble::event;
use xebec_hubble::flow::layer4::Protocol;
use xebec_hubble::flow::{
    CiliumEventType, DropReason, Emitter, Endpoint, Flow, FlowType, IcmPv4, IcmPv6, Ip, IpVersion,
    Layer4, Policy, Sctp, Tcp, TcpFlags, TraceObservationPoint, TraceReason, TrafficDirection, Udp,
    Verdict, Workload,
};
use xebec_hubble::wkt::Timestamp;
use xebec_policy::names::{By, Peer, RuleName};
use xebec_policy::rule::{PolicyRef, RuleId};

use super::{Kind, Seen};

/// The message of a flow; `uuid` is its own.
pub(super) fn message(seen: &Seen, node_name: &str, uuid: String) -> Flow {
    let event = &seen.event;
    let egress = event.direction == EGRESS;
    let (kind, sub_type) = match seen.kind {
        Kind::Verdict => (event::POLICY_VERDICT, 0),
        Kind::Dropped => (event::DROP, i32::from(event.reason)),
        Kind::Passed => (event::TRACE, event::sub_type(point(event))),
    };
    let mut flow = Flow {
        time: Some(Timestamp::from_nanos(seen.time)),
        uuid,
        emitter: Some(Emitter {
            name: "Xebec".to_owned(),
            version: env!("CARGO_PKG_VERSION").to_owned(),
        }),
        verdict: verdict(seen).into(),
        ip: Some(Ip {
            source: IpAddr::from(event.source).to_string(),
            destination: IpAddr::from(event.destination).to_string(),
            ip_version: if event.source.is_v4() {
                IpVersion::IPv4.into()
            } else {
                IpVersion::IPv6.into()
            },
            ..Ip::default()
        }),
        l4: protocol(event).map(|protocol| Layer4 {
            protocol: Some(protocol),
        }),
        source: Some(endpoint(&seen.source)),
        destination: Some(endpoint(&seen.destination)),
        r#type: FlowType::L3L4.into(),
        event_type: Some(CiliumEventType {
            r#type: kind,
            sub_type,
        }),
        node_name: node_name.to_owned(),
        traffic_direction: if egress {
            TrafficDirection::Egress.into()
        } else {
            TrafficDirection::Ingress.into()
        },
        // Nobody asked for what is dropped whether it is a reply.
        is_reply: (seen.kind != Kind::Dropped).then(|| (event.reply != 0).into()),
        summary: summary(event),
        ..Flow::default()
    };
    if seen.kind == Kind::Passed {
        flow.trace_observation_point = point(event).into();
        flow.trace_reason = match (event.reply, event.set) {
            (0, 0) => TraceReason::Unknown.into(),
            (0, _) => TraceReason::New.into(),
            _ => TraceReason::Reply.into(),
        };
    } else if event.verdict == DROPPED {
        flow.drop_reason = event.reason.into();
        flow.drop_reason_desc = DropReason::try_from(i32::from(event.reason))
            .unwrap_or(DropReason::Unknown)
            .into();
    }
    if let (Kind::Verdict, Some(rule)) = (seen.kind, &seen.rule) {
        flow.policy_match_type = match_type(rule);
    }
    decided(seen, egress, &mut flow);
    flow
}

/// By what a rule matches, as Cilium numbers it (`PolicyMatchType`); 0 is for none.
pub(super) const fn match_type(rule: &RuleName) -> u32 {
    match (rule.by_peer, rule.by) {
        (true, By::All) => 1,
        (true, By::Port) => 2,
        (false, By::Port) => 3,
        (false, By::All) => 4,
        (true, By::Protocol) => 5,
        (false, By::Protocol) => 6,
    }
}

/// Which policies decided: the one whose rule says so, or all of which none allows it.
fn decided(seen: &Seen, egress: bool, flow: &mut Flow) {
    let policies = match (&seen.rule, &seen.denied_by) {
        (Some(rule), _) => vec![rule_policy(&rule.id)],
        (None, Some(policies)) => policies.iter().map(|one| policy(one)).collect(),
        (None, None) => return,
    };
    // What only would have been dropped was still let through by nobody.
    let denied = seen.event.reason != 0;
    let list = match (denied, egress) {
        // A trace tells what happened, and a packet in audit mode went on.
        (true, _) if seen.kind == Kind::Passed => return,
        (true, true) => &mut flow.egress_denied_by,
        (true, false) => &mut flow.ingress_denied_by,
        (false, true) => &mut flow.egress_allowed_by,
        (false, false) => &mut flow.ingress_allowed_by,
    };
    *list = policies;
}

fn policy(policy: &PolicyRef) -> Policy {
    let kind = policy.source.kind();
    let of = |key: &str, value: &str| format!("k8s:io.cilium.k8s.policy.{key}={value}");
    let mut labels = vec![of("derived-from", kind), of("name", &policy.name)];
    if !policy.namespace.is_empty() {
        labels.push(of("namespace", &policy.namespace));
    }
    Policy {
        name: policy.name.clone(),
        namespace: policy.namespace.clone(),
        labels,
        revision: 0,
        kind: kind.to_owned(),
    }
}

/// A policy with the place of the rule in it: Hubble has no field for that, so it is a label.
fn rule_policy(rule: &RuleId) -> Policy {
    let mut policy = policy(&rule.policy);
    let place = format!("{}={}[{}]", super::RULE_LABEL, rule.list, rule.index);
    policy.labels.push(place);
    policy
}

pub(super) const fn point(event: &Event) -> TraceObservationPoint {
    if event.direction == EGRESS {
        TraceObservationPoint::FromEndpoint
    } else {
        TraceObservationPoint::ToEndpoint
    }
}

pub(super) const fn verdict(seen: &Seen) -> Verdict {
    match (seen.event.verdict, seen.kind) {
        (DROPPED, _) => Verdict::Dropped,
        (AUDITED, Kind::Verdict) => Verdict::Audit,
        _ => Verdict::Forwarded,
    }
}

fn endpoint(peer: &Peer) -> Endpoint {
    let workload = peer.workload.iter().map(|(kind, name)| Workload {
        name: name.clone(),
        kind: kind.clone(),
    });
    Endpoint {
        identity: peer.identity,
        cluster_name: if peer.pod.1.is_empty() {
            String::new()
        } else {
            xebec_hubble::DEFAULT_CLUSTER.to_owned()
        },
        namespace: peer.pod.0.clone(),
        labels: peer.labels.clone(),
        pod_name: peer.pod.1.clone(),
        workloads: workload.collect(),
        ..Endpoint::default()
    }
}

fn flags(event: &Event) -> TcpFlags {
    let has = |bit: u8| event.tcp_flags >> bit & 1 == 1;
    TcpFlags {
        fin: has(0),
        syn: has(1),
        rst: has(2),
        psh: has(3),
        ack: has(4),
        urg: has(5),
        ece: has(6),
        cwr: has(7),
        ns: false,
    }
}

fn protocol(event: &Event) -> Option<Protocol> {
    let source_port = u16::from_be(event.source_port).into();
    let destination_port = u16::from_be(event.destination_port).into();
    // ICMP has its type and code there.
    let [kind, code] = event.source_port.to_ne_bytes().map(u32::from);
    Some(match event.protocol {
        TCP => Protocol::Tcp(Tcp {
            source_port,
            destination_port,
            flags: Some(flags(event)),
        }),
        UDP => Protocol::Udp(Udp {
            source_port,
            destination_port,
        }),
        SCTP => Protocol::Sctp(Sctp {
            source_port,
            destination_port,
        }),
        ICMP => Protocol::IcmPv4(IcmPv4 { r#type: kind, code }),
        ICMP6 => Protocol::IcmPv6(IcmPv6 { r#type: kind, code }),
        _ => return None,
    })
}

/// As Hubble writes it; SYN and ACK come first.
fn summary(event: &Event) -> String {
    let [kind, code] = event.source_port.to_ne_bytes();
    match event.protocol {
        TCP => {
            const ORDER: [(u8, &str); 8] = [
                (1, "SYN"),
                (4, "ACK"),
                (2, "RST"),
                (0, "FIN"),
                (3, "PSH"),
                (5, "URG"),
                (6, "ECE"),
                (7, "CWR"),
            ];
            let has = |bit: u8| event.tcp_flags >> bit & 1 == 1;
            let set = ORDER.iter().filter(|(bit, _)| has(*bit));
            let names: Vec<&str> = set.map(|(_, name)| *name).collect();
            return format!("TCP Flags: {}", names.join(", "));
        }
        UDP => return "UDP".to_owned(),
        SCTP => return "SCTP".to_owned(),
        ICMP | ICMP6 => {}
        other => return format!("IP protocol {other}"),
    }
    let family = if event.protocol == ICMP { "v4" } else { "v6" };
    match icmp(event.protocol, kind) {
        "" => format!("ICMP{family} type {kind} code {code}"),
        named => format!("ICMP{family} {named}"),
    }
}

/// What messages of ICMP of this type are called; nothing for those that are seldom.
pub(super) const fn icmp(protocol: u8, kind: u8) -> &'static str {
    match (protocol, kind) {
        (ICMP, 0) => "EchoReply",
        (ICMP, 3) => "DestinationUnreachable",
        (ICMP, 8) => "EchoRequest",
        (ICMP, 11) => "TimeExceeded",
        (ICMP6, 1) => "DestinationUnreachable",
        (ICMP6, 2) => "PacketTooBig",
        (ICMP6, 3) => "TimeExceeded",
        (ICMP6, 128) => "EchoRequest",
        (ICMP6, 129) => "EchoReply",
        _ => "",
    }
}
