//! What each field of a filter asks, and what can't be asked.

use crate::flow::{
    CiliumEventType, Dns, DropReason, Endpoint, EventTypeFilter, Flow, FlowFilter, HttpHeader, Ip,
    IpVersion, Layer4, NetworkInterface, Tcp, TcpFlags, TrafficDirection, Udp, Workload,
};
use crate::flow::{Http, Layer7, Service, Verdict, layer4::Protocol, layer7::Record};

use super::Filters;

/// A connection of `shop/web-1` to the Service `shop/api`, as it leaves the pod.
fn flow() -> Flow {
    Flow {
        uuid: "u1".into(),
        verdict: Verdict::Forwarded.into(),
        ip: Some(Ip {
            source: "10.0.1.5".into(),
            source_xlated: "192.0.2.7".into(),
            destination: "fd00::1".into(),
            ip_version: IpVersion::IPv6.into(),
            encrypted: false,
        }),
        l4: Some(Layer4 {
            protocol: Some(Protocol::Tcp(Tcp {
                source_port: 40_000,
                destination_port: 80,
                flags: Some(TcpFlags {
                    syn: true,
                    ack: true,
                    ..TcpFlags::default()
                }),
            })),
        }),
        source: Some(Endpoint {
            identity: 77,
            cluster_name: "default".into(),
            namespace: "shop".into(),
            labels: vec![
                "k8s:app=web".into(),
                "k8s:tier=3".into(),
                "k8s:io.kubernetes.pod.namespace=shop".into(),
            ],
            pod_name: "web-1".into(),
            workloads: vec![Workload {
                name: "web".into(),
                kind: "Deployment".into(),
            }],
            ..Endpoint::default()
        }),
        destination: Some(Endpoint {
            identity: 2,
            labels: vec!["reserved:world".into()],
            ..Endpoint::default()
        }),
        destination_names: vec!["api.example.com".into()],
        destination_service: Some(Service {
            name: "api".into(),
            namespace: "shop".into(),
        }),
        node_name: "node1".into(),
        node_labels: vec!["kubernetes.io/os=linux".into()],
        event_type: Some(CiliumEventType {
            r#type: 4,
            sub_type: 5,
        }),
        traffic_direction: TrafficDirection::Egress.into(),
        is_reply: Some(false.into()),
        interface: Some(NetworkInterface {
            index: 3,
            name: "eth0".into(),
        }),
        ..Flow::default()
    }
}

fn record(record: Record) -> Flow {
    Flow {
        l7: Some(Layer7 {
            record: Some(record),
            ..Layer7::default()
        }),
        event_type: Some(CiliumEventType {
            r#type: 129,
            sub_type: 0,
        }),
        ..flow()
    }
}

fn http() -> Flow {
    record(Record::Http(Http {
        code: 404,
        method: "GET".into(),
        url: "http://api.example.com/page/12?token=x".into(),
        protocol: "HTTP/1.1".into(),
        headers: vec![HttpHeader {
            key: "foo".into(),
            value: "bar".into(),
        }],
    }))
}

fn dns() -> Flow {
    record(Record::Dns(Dns {
        query: "kube-dns.cluster.local.".into(),
        ..Dns::default()
    }))
}

fn dropped() -> Flow {
    Flow {
        verdict: Verdict::Dropped.into(),
        drop_reason_desc: DropReason::PolicyDenied.into(),
        is_reply: None,
        ..flow()
    }
}

type Set = fn(&mut FlowFilter, &str);
type Ask = fn(&mut FlowFilter);

fn texts(text: &str) -> Vec<String> {
    text.split_terminator(';').map(str::to_owned).collect()
}

fn passes(flow: &Flow, set: Set, text: &str) -> Result<bool, String> {
    let mut filter = FlowFilter::default();
    set(&mut filter, text);
    let both = Filters::new(std::slice::from_ref(&filter), &[]).and_then(|allow| {
        let deny = Filters::new(&[], std::slice::from_ref(&filter))?;
        Ok((allow.pass(flow), deny.pass(flow)))
    });
    let (allowed, not_denied) = both.map_err(|error| format!("{error:#}"))?;
    assert_ne!(allowed, not_denied, "{filter:?}: what passes is denied");
    Ok(allowed)
}

#[test]
fn each_field_asks_what_its_name_says() {
    let source_ip: Set = |filter, text| filter.source_ip = texts(text);
    let destination_ip: Set = |filter, text| filter.destination_ip = texts(text);
    let xlated: Set = |filter, text| filter.source_ip_xlated = texts(text);
    let source_pod: Set = |filter, text| filter.source_pod = texts(text);
    let destination_pod: Set = |filter, text| filter.destination_pod = texts(text);
    let service: Set = |filter, text| filter.destination_service = texts(text);
    let label: Set = |filter, text| filter.source_label = texts(text);
    let to_label: Set = |filter, text| filter.destination_label = texts(text);
    let fqdn: Set = |filter, text| filter.destination_fqdn = texts(text);
    let source_port: Set = |filter, text| filter.source_port = texts(text);
    let port: Set = |filter, text| filter.destination_port = texts(text);
    let node: Set = |filter, text| filter.node_name = texts(text);
    let node_label: Set = |filter, text| filter.node_labels = texts(text);
    let protocol: Set = |filter, text| filter.protocol = texts(text);
    let uuid: Set = |filter, text| filter.uuid = texts(text);
    let cluster: Set = |filter, text| filter.source_cluster_name = texts(text);
    let query: Set = |filter, text| filter.dns_query = texts(text);
    let code: Set = |filter, text| filter.http_status_code = texts(text);
    let method: Set = |filter, text| filter.http_method = texts(text);
    let path: Set = |filter, text| filter.http_path = texts(text);
    let url: Set = |filter, text| filter.http_url = texts(text);
    let table: &[(Flow, Set, &str, bool)] = &[
        (flow(), source_ip, "10.0.1.5", true),
        (flow(), source_ip, "10.0.1.6", false),
        (flow(), source_ip, "10.0.1.6;10.0.0.0/16", true),
        (flow(), source_ip, "0.0.0.0/0", true),
        (flow(), source_ip, "::/0", false),
        (flow(), source_ip, "10.0.1.4/31", true),
        (flow(), source_ip, "10.0.1.6/31", false),
        (flow(), destination_ip, "fd00::/8", true),
        (flow(), destination_ip, "fd00:0::1", true),
        (flow(), xlated, "192.0.2.0/24", true),
        (flow(), source_pod, "shop/web", true),
        (flow(), source_pod, "shop/", true),
        (flow(), source_pod, "/", true),
        (flow(), source_pod, "/web", true),
        (flow(), source_pod, "web-1", false),
        (flow(), source_pod, "other/web;shop/w", true),
        (flow(), source_pod, "shop/api", false),
        (flow(), destination_pod, "/", false),
        (flow(), service, "shop/api", true),
        (flow(), service, "shop/web", false),
        (flow(), label, "app=web", true),
        (flow(), label, "k8s:app=web", true),
        (flow(), label, "any:app=web", true),
        (flow(), label, "reserved:app=web", false),
        (flow(), label, "app==web,tier", true),
        (flow(), label, "app in (api, web), tier notin (1,2)", true),
        (flow(), label, "app!=web", false),
        (flow(), label, "!app", false),
        (flow(), label, "! canary", true),
        (flow(), label, "canary!=yes", true),
        (flow(), label, "tier>2,tier<4", true),
        (flow(), label, "tier>3", false),
        (flow(), label, "app>1", false),
        (flow(), label, "app=api;tier=3", true),
        (flow(), label, "io.kubernetes.pod.namespace=shop", true),
        (flow(), to_label, "reserved:world", true),
        (flow(), to_label, "reserved:host", false),
        (flow(), fqdn, "api.example.com", true),
        (flow(), fqdn, "API.example.com.", true),
        (flow(), fqdn, "*.example.com", true),
        (flow(), fqdn, "*.com", true),
        (flow(), fqdn, "example.com", false),
        (flow(), source_port, "40000", true),
        (flow(), port, "80;443", true),
        (flow(), port, "8", false),
        (flow(), node, "node1", true),
        (flow(), node, "node*", true),
        (flow(), node, "default/node1", true),
        (flow(), node, "default/", true),
        (flow(), node, "other/", false),
        (flow(), node, "node", false),
        (flow(), node_label, "kubernetes.io/os=linux", true),
        (flow(), node_label, "kubernetes.io/os=plan9", false),
        (flow(), protocol, "TCP", true),
        (flow(), protocol, "udp;icmp", false),
        (flow(), protocol, "http", false),
        (http(), protocol, "http", true),
        (http(), protocol, "tcp", true),
        (dns(), protocol, "dns", true),
        (flow(), uuid, "u0;u1", true),
        (flow(), uuid, "u", false),
        (flow(), cluster, "default", true),
        (flow(), cluster, "def", false),
        (dns(), query, r"kube.*local", true),
        (dns(), query, r"^local", false),
        (http(), query, ".", false),
        (http(), code, "404", true),
        (http(), code, "4+", true),
        (http(), code, "40+;5+", true),
        (http(), code, "5+;403", false),
        (flow(), code, "4+", false),
        (http(), method, "get", true),
        (http(), method, "post", false),
        (http(), path, r"^/page/\d+$", true),
        (http(), path, "token", false),
        (http(), url, "example.*token", true),
        (dns(), url, ".", false),
    ];
    for (flow, set, text, wanted) in table {
        assert_eq!(
            passes(flow, *set, text),
            Ok(*wanted),
            "{text:?} of {flow:?}"
        );
    }
}

#[test]
fn fields_that_are_no_text_ask_as_well() {
    let table: &[(&str, Flow, Ask, bool)] = &[
        (
            "identity",
            flow(),
            |f| f.source_identity = vec![1, 77],
            true,
        ),
        ("other", flow(), |f| f.source_identity = vec![2], false),
        ("world", flow(), |f| f.destination_identity = vec![2], true),
        ("verdict", flow(), |f| f.verdict = vec![2, 1], true),
        ("verdict", flow(), |f| f.verdict = vec![2], false),
        (
            "reason",
            dropped(),
            |f| f.drop_reason_desc = vec![133],
            true,
        ),
        (
            "reason",
            dropped(),
            |f| f.drop_reason_desc = vec![181],
            false,
        ),
        ("direction", flow(), |f| f.traffic_direction = vec![2], true),
        (
            "direction",
            flow(),
            |f| f.traffic_direction = vec![1],
            false,
        ),
        ("version", flow(), |f| f.ip_version = vec![2], true),
        ("version", flow(), |f| f.ip_version = vec![1], false),
        ("plain", flow(), |f| f.encrypted = vec![false], true),
        ("reply", flow(), |f| f.reply = vec![false], true),
        ("reply", flow(), |f| f.reply = vec![true], false),
        ("dropped", dropped(), |f| f.reply = vec![false], true),
        ("dropped", dropped(), |f| f.reply = vec![true], false),
        (
            "unknown",
            Flow {
                is_reply: None,
                ..flow()
            },
            |f| f.reply = vec![false, true],
            false,
        ),
        (
            "interface",
            flow(),
            |f| f.interface = vec![interface("eth0")],
            true,
        ),
        (
            "interface",
            flow(),
            |f| f.interface = vec![interface("eth1")],
            false,
        ),
        (
            "flags",
            flow(),
            |f| {
                f.tcp_flags = vec![TcpFlags {
                    syn: true,
                    ..Default::default()
                }]
            },
            true,
        ),
        (
            "all flags",
            flow(),
            |f| {
                f.tcp_flags = vec![TcpFlags {
                    syn: true,
                    rst: true,
                    ..Default::default()
                }]
            },
            false,
        ),
        ("type", flow(), |f| f.event_type = vec![kind(4, None)], true),
        (
            "type",
            flow(),
            |f| f.event_type = vec![kind(1, None), kind(4, Some(5))],
            true,
        ),
        (
            "type",
            flow(),
            |f| f.event_type = vec![kind(4, Some(0))],
            false,
        ),
        (
            "workload",
            flow(),
            |f| f.source_workload = vec![workload("Deployment", "")],
            true,
        ),
        (
            "workload",
            flow(),
            |f| f.source_workload = vec![workload("", "web")],
            true,
        ),
        (
            "workload",
            flow(),
            |f| f.source_workload = vec![workload("Job", "web")],
            false,
        ),
        (
            "header",
            http(),
            |f| {
                f.http_header = vec![HttpHeader {
                    key: "foo".into(),
                    value: "bar".into(),
                }]
            },
            true,
        ),
        // Between fields all must hold.
        (
            "and",
            flow(),
            |f| {
                f.source_port = vec!["40000".into()];
                f.destination_port = vec!["81".into()];
            },
            false,
        ),
        ("nothing", flow(), |_| {}, true),
    ];
    for (what, flow, set, wanted) in table {
        let mut filter = FlowFilter::default();
        set(&mut filter);
        let filters = Filters::new(std::slice::from_ref(&filter), &[]).unwrap();
        assert_eq!(filters.pass(flow), *wanted, "{what}: {filter:?}");
    }
}

fn kind(r#type: i32, sub_type: Option<i32>) -> EventTypeFilter {
    EventTypeFilter {
        r#type,
        match_sub_type: sub_type.is_some(),
        sub_type: sub_type.unwrap_or(0),
    }
}

fn workload(kind: &str, name: &str) -> Workload {
    Workload {
        name: name.into(),
        kind: kind.into(),
    }
}

fn interface(name: &str) -> NetworkInterface {
    NetworkInterface {
        name: name.into(),
        index: 0,
    }
}

#[test]
fn ports_are_of_any_protocol_that_has_them() {
    let flow = Flow {
        l4: Some(Layer4 {
            protocol: Some(Protocol::Udp(Udp {
                source_port: 53,
                destination_port: 9,
            })),
        }),
        ..flow()
    };
    assert_eq!(
        passes(&flow, |f, text| f.source_port = texts(text), "53"),
        Ok(true)
    );
    // No flags are set where there are none.
    let filter = FlowFilter {
        tcp_flags: vec![TcpFlags::default()],
        ..FlowFilter::default()
    };
    assert!(!Filters::new(&[filter], &[]).unwrap().pass(&flow));
}

#[test]
fn one_of_many_filters_is_enough_and_what_is_denied_is_out() {
    let of = |pod: &str| FlowFilter {
        source_pod: vec![pod.into()],
        ..FlowFilter::default()
    };
    let pass = |allow: &[FlowFilter], deny: &[FlowFilter]| {
        Filters::new(allow, deny).unwrap().pass(&flow())
    };
    assert!(pass(&[], &[]));
    assert!(pass(&[of("a/"), of("shop/")], &[]));
    assert!(!pass(&[of("a/"), of("b/")], &[]));
    assert!(!pass(&[of("shop/")], &[of("a/"), of("shop/web")]));
    assert!(pass(&[of("shop/")], &[of("a/")]));
}

#[test]
fn what_can_not_be_read_says_which_field_and_why() {
    let table: &[(Set, &str, &str)] = &[
        (
            |f, t| f.source_ip = texts(t),
            "10.0.0",
            "source_ip: \"10.0.0\" is neither",
        ),
        (
            |f, t| f.destination_ip = texts(t),
            "10.0.0.0/33",
            "not 0 to 32",
        ),
        (
            |f, t| f.destination_port = texts(t),
            "http",
            "destination_port: \"http\" is no port",
        ),
        (|f, t| f.destination_port = texts(t), "65536", "is no port"),
        (
            |f, t| f.source_pod = vec![t.into()],
            "",
            "source_pod: an empty name",
        ),
        (
            |f, t| f.source_label = texts(t),
            "app in web",
            "no operator",
        ),
        (
            |f, t| f.source_label = texts(t),
            "app in (web",
            "a ( without a )",
        ),
        (|f, t| f.source_label = texts(t), "app=a b", "no value"),
        (|f, t| f.source_label = texts(t), "=web", "no label's key"),
        (
            |f, t| f.source_label = texts(t),
            "tier>high",
            "no whole number",
        ),
        (|f, t| f.source_fqdn = texts(t), "a b", "no name has a ' '"),
        (|f, t| f.source_fqdn = texts(t), "a..", "is no name"),
        (
            |f, t| f.node_name = texts(t),
            "a/b/c",
            "node_name: \"a/b/c\" is neither",
        ),
        (
            |f, t| f.protocol = texts(t),
            "quic",
            "protocol: \"quic\" is none of",
        ),
        (|f, t| f.http_status_code = texts(t), "4", "neither a code"),
        (
            |f, t| f.http_status_code = texts(t),
            "600",
            "neither a code",
        ),
        (
            |f, t| f.http_status_code = texts(t),
            "+4+",
            "neither a code",
        ),
        (|f, t| f.http_path = texts(t), "(", "no regular expression"),
        (|f, t| f.dns_query = texts(t), "[", "no regular expression"),
        (
            |f, t| f.source_cluster_name = vec![t.into()],
            "",
            "an empty name",
        ),
        (
            |f, t| {
                f.http_method = texts(t);
                f.event_type = vec![kind(4, None)];
            },
            "get",
            "http_method: only events of the type l7",
        ),
    ];
    for (set, text, wanted) in table {
        let error = passes(&flow(), *set, text).unwrap_err();
        assert!(error.contains(wanted), "{text:?}: {error}");
    }
}
