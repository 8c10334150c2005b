//! A flow as Hubble's API tells of it.

use std::net::IpAddr;

use xebec_dataplane_common::flow::{AUDITED, DROPPED, EGRESS, Event, FROM_NETWORK, TO_NETWORK};
use xebec_dataplane_common::policy::IDENTITY_HOST;
use xebec_dataplane_common::{ICMP, ICMP6, SCTP, TCP, UDP};
use xebec_hubble::event;
use xebec_hubble::flow::layer4::Protocol;
use xebec_hubble::flow::{
    CiliumEventType, DropReason, Emitter, Endpoint, Flow, FlowType, IcmPv4, IcmPv6, Ip, IpVersion,
    Layer4, Policy, Sctp, Service, SocketTranslationPoint as Xlate, Tcp, TcpFlags,
    TraceObservationPoint, TraceReason, TrafficDirection, Udp, Verdict, Workload,
};
use xebec_hubble::wkt::{Any, Struct, Timestamp};
use xebec_policy::names::{By, Peer, RuleName};
use xebec_policy::rule::{PolicyRef, RuleId};

use super::{Kind, Seen, layer7};

/// The message of a flow; `uuid` is its own.
pub(super) fn message(seen: &Seen, node_name: &str, uuid: String) -> Flow {
    let event = &seen.event;
    let egress = event.direction == EGRESS;
    let (kind, sub_type) = match seen.kind {
        Kind::Verdict => (event::POLICY_VERDICT, 0),
        Kind::Dropped => (event::DROP, i32::from(event.reason)),
        Kind::Passed | Kind::Translated => (event::TRACE, event::sub_type(point(seen))),
        Kind::Asked => (
            event::TRACE_SOCK,
            Xlate::SockXlatePointPreDirectionFwd as i32,
        ),
        Kind::Given => (
            event::TRACE_SOCK,
            Xlate::SockXlatePointPostDirectionFwd as i32,
        ),
        Kind::Said => (event::L7, 0),
    };
    let [source_names, destination_names] = seen
        .called
        .each_ref()
        .map(|names| names.as_deref().cloned().unwrap_or_default());
    let mut flow = Flow {
        time: Some(Timestamp::from_nanos(seen.time)),
        uuid,
        emitter: Some(Emitter {
            name: "Xebec".to_owned(),
            version: env!("CARGO_PKG_VERSION").to_owned(),
        }),
        verdict: verdict(seen).into(),
        ip: Some(ip(seen)),
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
        source_names,
        destination_names,
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
    if event.reply != 0 {
        flow.source_service = service(seen);
    } else {
        flow.destination_service = service(seen);
    }
    match seen.kind {
        Kind::Passed | Kind::Translated => {
            flow.trace_observation_point = point(seen).into();
            flow.trace_reason = match (event.reply, event.set) {
                (0, 0) => TraceReason::Unknown.into(),
                (0, _) => TraceReason::New.into(),
                _ => TraceReason::Reply.into(),
            };
        }
        Kind::Asked | Kind::Given => of_socket(event, sub_type, &mut flow),
        Kind::Said => of_message(seen, &mut flow),
        Kind::Verdict | Kind::Dropped => {
            if event.verdict == DROPPED {
                flow.drop_reason = event.reason.into();
                flow.drop_reason_desc = DropReason::try_from(i32::from(event.reason))
                    .unwrap_or(DropReason::Unknown)
                    .into();
            }
        }
    }
    if seen.kind == Kind::Passed {
        flow.extensions = counts(event).as_ref().map(Any::from);
    }
    if let (Kind::Verdict, Some(rule)) = (seen.kind, &seen.rule) {
        flow.policy_match_type = match_type(rule);
    }
    decided(seen, egress, &mut flow);
    flow
}

/// Its addresses; where its source is translated, what it becomes.
fn ip(seen: &Seen) -> Ip {
    let event = &seen.event;
    let leaves = seen.kind == Kind::Translated || event.at == TO_NETWORK;
    let becomes = leaves && event.new_source.is_some() && event.new_source != event.source;
    Ip {
        source: address(event.source),
        source_xlated: if becomes {
            address(event.new_source)
        } else {
            String::new()
        },
        destination: address(event.destination),
        ip_version: if event.destination.is_v4() {
            IpVersion::IPv4.into()
        } else {
            IpVersion::IPv6.into()
        },
        ..Ip::default()
    }
}

/// Of a socket that is not bound to any, none.
fn address(address: xebec_dataplane_common::ip::Ip) -> String {
    if address.is_some() {
        IpAddr::from(address).to_string()
    } else {
        String::new()
    }
}

fn service(seen: &Seen) -> Option<Service> {
    let (namespace, name) = seen.service.as_ref()?.split_once('/')?;
    Some(Service {
        name: name.to_owned(),
        namespace: namespace.to_owned(),
    })
}

/// What is told of a socket's translation and of no packet.
fn of_socket(event: &Event, point: i32, flow: &mut Flow) {
    flow.r#type = FlowType::Sock.into();
    flow.sock_xlate_point = point;
    flow.socket_cookie = event.socket;
    flow.is_reply = None;
    flow.traffic_direction = TrafficDirection::Unknown.into();
    if without_flags(flow) {
        flow.summary = "TCP".to_owned();
    }
}

/// What is told of what was said.
fn of_message(seen: &Seen, flow: &mut Flow) {
    flow.r#type = FlowType::L7.into();
    without_flags(flow);
    if let Some(said) = &seen.said {
        flow.summary = layer7::summary(said);
        flow.l7 = Some((**said).clone());
    }
}

/// Takes TCP's flags away where no packet is told of; false for another protocol.
fn without_flags(flow: &mut Flow) -> bool {
    if let Some(Layer4 {
        protocol: Some(Protocol::Tcp(tcp)),
    }) = &mut flow.l4
    {
        tcp.flags = None;
        return true;
    }
    false
}

/// What Hubble has no field for: how many packets an event tells of, if there is more than its own, their bytes, and
/// how long the answer to a connection's first packet took.
fn counts(event: &Event) -> Option<Struct> {
    let mut told = Struct::default();
    let mut tell = |name: &str, number: u32| {
        told.fields
            .insert(name.to_owned(), f64::from(number).into());
    };
    if event.packets > 1 {
        tell("packets", event.packets);
        tell("bytes", event.bytes[0]);
        tell("reply_bytes", event.bytes[1]);
    }
    if event.answered_in > 0 {
        tell("answered_in_us", event.answered_in);
    }
    (!told.fields.is_empty()).then_some(told)
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
        (true, _) if matches!(seen.kind, Kind::Passed | Kind::Translated) => return,
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

/// Where a packet was seen.
pub(super) fn point(seen: &Seen) -> TraceObservationPoint {
    use TraceObservationPoint as Point;
    let host = |peer: &Peer| peer.identity == IDENTITY_HOST;
    match (seen.event.at, seen.event.direction, seen.kind) {
        (FROM_NETWORK, ..) => Point::FromNetwork,
        (TO_NETWORK, ..) => Point::ToNetwork,
        (_, _, Kind::Translated) if seen.here => Point::ToEndpoint,
        (_, _, Kind::Translated) => Point::ToNetwork,
        (_, EGRESS, _) if host(&seen.source) => Point::FromHost,
        (_, EGRESS, _) => Point::FromEndpoint,
        _ if host(&seen.destination) => Point::ToHost,
        _ => Point::ToEndpoint,
    }
}

pub(super) const fn verdict(seen: &Seen) -> Verdict {
    match (seen.event.verdict, seen.kind) {
        (_, Kind::Asked) => Verdict::Traced,
        (_, Kind::Given) => Verdict::Translated,
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
