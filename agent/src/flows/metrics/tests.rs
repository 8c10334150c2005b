//! What is counted, under which labels.

use std::net::Ipv4Addr;

use xebec_dataplane_common::flow::{
    AT_MESSAGE, DROPPED, EGRESS, Event, FORWARDED, INGRESS, REASON_TTL,
};
use xebec_hubble::flow::L7FlowType;
use xebec_policy::names::Peer;

use super::*;

fn pod(name: &str) -> Arc<Peer> {
    let labels = [("app".to_owned(), name[..3].to_owned())].into();
    let owner = ("Deployment".to_owned(), name[..3].to_owned());
    let name = ("shop".to_owned(), name.to_owned());
    Arc::new(Peer::pod(&name, 1000, &labels, Some(&owner)))
}

/// A first packet of `web-1` to `api-1`.
fn seen() -> Seen {
    Seen {
        event: Event {
            time: 0,
            source: Ipv4Addr::new(10, 0, 0, 1).into(),
            destination: Ipv4Addr::new(10, 0, 0, 2).into(),
            source_port: 4000_u16.to_be(),
            destination_port: 80_u16.to_be(),
            protocol: TCP,
            tcp_flags: 0x02,
            verdict: FORWARDED,
            direction: INGRESS,
            reason: 0,
            reply: 0,
            length: 60,
            set: 0,
            rule: 0,
            ..bytemuck::Zeroable::zeroed()
        },
        kind: Kind::Passed,
        time: 0,
        source: pod("web-1"),
        destination: pod("api-1"),
        rule: None,
        denied_by: None,
        service: None,
        called: [None, None],
        said: None,
        here: false,
    }
}

fn dropped(reason: u8) -> Seen {
    let mut seen = seen();
    seen.kind = Kind::Dropped;
    seen.event.verdict = DROPPED;
    seen.event.reason = reason;
    seen
}

/// What is served after these flows, without the lines that say what it is.
fn served(metrics: &FlowMetrics, flows: &[Seen]) -> Vec<String> {
    let now = Instant::now();
    for flow in flows {
        metrics.count(flow, now);
    }
    let mut registry = Registry::default();
    crate::metrics::Register::register(metrics, &mut registry);
    let mut text = String::new();
    prometheus_client::encoding::text::encode(&mut text, &registry).unwrap();
    let lines = text.lines().filter(|line| !line.starts_with('#'));
    let always = ["hubble_lost", "xebec_dns_unanswered"];
    let lines = lines.filter(|line| !always.iter().any(|name| line.starts_with(name)));
    let mut lines: Vec<String> = lines.map(str::to_owned).collect();
    lines.sort();
    lines
}

#[test]
fn flows_are_counted_under_hubble_s_names() {
    let flow = |change: fn(&mut Seen)| {
        let mut seen = seen();
        change(&mut seen);
        seen
    };
    let flows = [
        flow(|_| ()),
        flow(|seen| {
            seen.event.tcp_flags = 0x12;
            seen.event.reply = 1;
        }),
        flow(|seen| seen.event.tcp_flags = 0x11),
        flow(|seen| seen.kind = Kind::Verdict),
        flow(|seen| seen.event.protocol = UDP),
        flow(|seen| {
            seen.event.protocol = ICMP;
            seen.event.source_port = u16::from_ne_bytes([8, 0]);
        }),
        flow(|seen| {
            seen.destination = Arc::new(Peer::world());
            seen.event.direction = EGRESS;
            seen.event.destination_port = 443_u16.to_be();
        }),
        dropped(REASON_POLICY),
        dropped(REASON_TTL),
    ];
    assert_eq!(
        served(&FlowMetrics::parse(DEFAULT).unwrap(), &flows),
        [
            r#"hubble_drop_total{reason="POLICY_DENIED",protocol="TCP"} 1"#,
            r#"hubble_drop_total{reason="TTL_EXCEEDED",protocol="TCP"} 1"#,
            r#"hubble_flows_processed_total{protocol="ICMPv4",type="Trace",subtype="to-endpoint",verdict="FORWARDED"} 1"#,
            r#"hubble_flows_processed_total{protocol="TCP",type="Drop",subtype="",verdict="DROPPED"} 2"#,
            r#"hubble_flows_processed_total{protocol="TCP",type="PolicyVerdict",subtype="",verdict="FORWARDED"} 1"#,
            r#"hubble_flows_processed_total{protocol="TCP",type="Trace",subtype="from-endpoint",verdict="FORWARDED"} 1"#,
            r#"hubble_flows_processed_total{protocol="TCP",type="Trace",subtype="to-endpoint",verdict="FORWARDED"} 3"#,
            r#"hubble_flows_processed_total{protocol="UDP",type="Trace",subtype="to-endpoint",verdict="FORWARDED"} 1"#,
            r#"hubble_flows_to_world_total{protocol="TCP",verdict="FORWARDED"} 1"#,
            r#"hubble_icmp_total{family="IPv4",type="EchoRequest"} 1"#,
            r#"hubble_policy_verdicts_total{direction="ingress",match="none",action="forwarded"} 1"#,
            r#"hubble_port_distribution_total{protocol="ICMPv4",port="0"} 1"#,
            r#"hubble_port_distribution_total{protocol="TCP",port="443"} 1"#,
            r#"hubble_port_distribution_total{protocol="TCP",port="80"} 2"#,
            r#"hubble_port_distribution_total{protocol="UDP",port="80"} 1"#,
            r#"hubble_tcp_flags_total{flag="FIN",family="IPv4"} 1"#,
            r#"hubble_tcp_flags_total{flag="SYN",family="IPv4"} 2"#,
            r#"hubble_tcp_flags_total{flag="SYN-ACK",family="IPv4"} 1"#,
        ]
    );
}

#[test]
fn contexts_say_whom_a_flow_is_of() {
    let mut out = seen();
    out.event.direction = EGRESS;
    out.destination = Arc::new(Peer::world());
    for (options, labels) in [
        ("sourceContext=pod", r#"source="shop/web-1""#),
        (
            "sourceContext=pod-name;destinationContext=ip",
            r#"source="web-1",destination="10.0.0.2""#,
        ),
        (
            "destinationContext=workload|reserved-identity",
            r#"destination="reserved:world""#,
        ),
        ("sourceContext=workload", r#"source="shop/web""#),
        ("sourceContext=workload-name", r#"source="web""#),
        ("sourceContext=namespace", r#"source="shop""#),
        ("sourceContext=app", r#"source="web""#),
        ("sourceContext=identity", r#"source="k8s:app=web""#),
        ("sourceContext=dns", r#"source="""#),
        ("sourceEgressContext=ip", r#"source="10.0.0.1""#),
        ("sourceIngressContext=ip", r#"source="""#),
        (
            "destinationEgressContext=ip;destinationIngressContext=pod",
            r#"destination="10.0.0.2""#,
        ),
        (
            "labelsContext=traffic_direction,source_app,source_workload_kind,destination_pod",
            r#"source_workload_kind="Deployment",source_app="web",destination_pod="",traffic_direction="egress""#,
        ),
        (
            "labelsContext=source_ip,source_pod,source_namespace,source_workload;sourceContext=pod-name",
            r#"source_ip="10.0.0.1",source_pod="web-1",source_namespace="shop",source_workload="web",source="web-1""#,
        ),
    ] {
        let metrics = FlowMetrics::parse(&format!("port-distribution:{options}")).unwrap();
        assert_eq!(
            served(&metrics, &[out.clone()]),
            [format!(
                r#"hubble_port_distribution_total{{protocol="TCP",port="80",{labels}}} 1"#
            )],
            "{options}"
        );
    }
}

#[test]
fn flows_to_the_world_are_counted_as_asked() {
    let mut out = seen();
    out.destination = Arc::new(Peer::world());
    let mut later = out.clone();
    later.event.tcp_flags = 0x10;
    let mut lost = dropped(REASON_TTL);
    lost.destination = Arc::new(Peer::world());
    let flows = [out, later, lost];
    for (options, wanted) in [
        ("", vec![r#"{protocol="TCP",verdict="FORWARDED"} 2"#]),
        (
            "syn-only",
            vec![r#"{protocol="TCP",verdict="FORWARDED"} 1"#],
        ),
        (
            "any-drop;port",
            vec![
                r#"{protocol="TCP",verdict="DROPPED",port="80"} 1"#,
                r#"{protocol="TCP",verdict="FORWARDED",port="80"} 2"#,
            ],
        ),
    ] {
        let metrics = FlowMetrics::parse(&format!("flows-to-world:{options}")).unwrap();
        let wanted: Vec<String> = wanted
            .iter()
            .map(|line| format!("hubble_flows_to_world_total{line}"))
            .collect();
        assert_eq!(served(&metrics, &flows), wanted, "{options}");
    }
}

#[test]
fn there_are_no_more_series_than_may_be() {
    let mut metrics = FlowMetrics::parse("port-distribution").unwrap();
    metrics.most = 2;
    let to = |port: u16| {
        let mut seen = seen();
        seen.event.destination_port = port.to_be();
        seen
    };
    assert_eq!(
        served(&metrics, &[to(1), to(2), to(3), to(4), to(1)]),
        [
            r#"hubble_port_distribution_total{protocol="TCP",port="1"} 2"#,
            r#"hubble_port_distribution_total{protocol="TCP",port="2"} 1"#,
            r#"hubble_port_distribution_total{protocol="other",port="other"} 2"#,
        ]
    );
    // Who was not seen for long makes room.
    let later = Instant::now() + IDLE + SWEEP;
    metrics.count(&to(5), later);
    let text = served(&metrics, &[]);
    assert!(
        text.contains(&r#"hubble_port_distribution_total{protocol="TCP",port="5"} 1"#.to_owned())
    );
    assert_eq!(text.len(), 2, "{text:?}");
}

#[test]
fn nonsense_is_refused_and_losses_are_always_there() {
    for (text, reason) in [
        ("rain", "no metric \"rain\": there are dns, drop"),
        ("drop drop", "asked for twice"),
        ("drop:colour=red", "no option \"colour\""),
        (
            "drop:sourceContext=colour",
            "\"colour\" is none of identity",
        ),
        (
            "drop:labelsContext=source_colour",
            "\"source_colour\" is none of source_ip",
        ),
        ("drop:port", "no option \"port\""),
    ] {
        let error = format!("{:#}", FlowMetrics::parse(text).unwrap_err());
        assert!(error.contains(reason), "{text}: {error}");
    }
    let metrics = FlowMetrics::parse("").unwrap();
    metrics.count_lost(Lost::Kernel, 3);
    metrics.count_lost(Lost::Store, 4);
    metrics.count_unanswered(5);
    let mut registry = Registry::default();
    crate::metrics::Register::register(&metrics, &mut registry);
    let mut text = String::new();
    prometheus_client::encoding::text::encode(&mut text, &registry).unwrap();
    assert!(text.contains(r#"hubble_lost_events_total{source="perf_event_ring_buffer"} 3"#));
    assert!(text.contains(r#"hubble_lost_events_total{source="hubble_ring_buffer"} 4"#));
    assert!(text.contains("xebec_dns_unanswered_queries_total 5"));
}

/// A message of `web-1` to `api-1`.
fn said(kind: L7FlowType, latency_ns: u64, record: Record) -> Seen {
    let mut seen = seen();
    seen.kind = Kind::Said;
    seen.event.at = AT_MESSAGE;
    // Both are seen at the client.
    seen.event.direction = match kind {
        L7FlowType::Request => EGRESS,
        _ => INGRESS,
    };
    seen.says(Layer7 {
        r#type: kind.into(),
        latency_ns,
        record: Some(record),
    })
}

#[test]
fn what_is_said_is_counted_under_hubble_s_names() {
    let asks = flow::Dns {
        query: "a.example.".to_owned(),
        qtypes: vec!["A".to_owned()],
        ..flow::Dns::default()
    };
    let fails = flow::Dns {
        rcode: 3,
        ..asks.clone()
    };
    let answers = flow::Dns {
        ips: vec!["192.0.2.1".to_owned()],
        rrtypes: vec!["CNAME".to_owned(), "A".to_owned()],
        ..asks.clone()
    };
    let gets = flow::Http {
        method: "GET".to_owned(),
        protocol: "HTTP/1.1".to_owned(),
        ..flow::Http::default()
    };
    let given = flow::Http {
        code: 503,
        ..gets.clone()
    };
    let odd = flow::Http {
        method: "BREW".to_owned(),
        ..gets.clone()
    };
    use L7FlowType::{Request, Response};
    let flows = [
        said(Request, 0, Record::Dns(asks)),
        said(Response, 2_000_000, Record::Dns(answers)),
        said(Response, 0, Record::Dns(fails)),
        said(Request, 0, Record::Http(gets)),
        said(Response, 300_000_000, Record::Http(given)),
        said(Request, 0, Record::Http(odd)),
    ];
    let all = FlowMetrics::parse("dns:query http flow port-distribution tcp").unwrap();
    let lines = served(&all, &flows);
    let counts: Vec<&str> = lines
        .iter()
        .filter(|line| !line.contains("_bucket") && !line.contains("_sum"))
        .map(String::as_str)
        .collect();
    assert_eq!(
        counts,
        [
            r#"hubble_dns_queries_total{rcode="",qtypes="A",ips_returned="0",query="a.example."} 1"#,
            r#"hubble_dns_response_types_total{type="A",qtypes="A",query="a.example."} 1"#,
            r#"hubble_dns_response_types_total{type="CNAME",qtypes="A",query="a.example."} 1"#,
            r#"hubble_dns_responses_total{rcode="No Error",qtypes="A",ips_returned="1",query="a.example."} 1"#,
            r#"hubble_dns_responses_total{rcode="Non-Existent Domain",qtypes="A",ips_returned="0",query="a.example."} 1"#,
            r#"hubble_flows_processed_total{protocol="DNS",type="L7",subtype="DNS",verdict="FORWARDED"} 3"#,
            r#"hubble_flows_processed_total{protocol="HTTP",type="L7",subtype="HTTP",verdict="FORWARDED"} 3"#,
            r#"hubble_http_request_duration_seconds_count{method="GET",reporter="client"} 1"#,
            r#"hubble_http_requests_total{method="GET",protocol="HTTP/1.1",reporter="client"} 1"#,
            r#"hubble_http_requests_total{method="other",protocol="HTTP/1.1",reporter="client"} 1"#,
            r#"hubble_http_responses_total{method="GET",status="503",reporter="client"} 1"#,
            r#"xebec_dns_response_duration_seconds_count{rcode="No Error"} 1"#,
        ]
    );
    let has = |line: &str| assert!(lines.iter().any(|one| one == line), "{line}: {lines:#?}");
    has(r#"hubble_http_request_duration_seconds_sum{method="GET",reporter="client"} 0.3"#);
    has(
        r#"hubble_http_request_duration_seconds_bucket{le="0.25",method="GET",reporter="client"} 0"#,
    );
    has(
        r#"hubble_http_request_duration_seconds_bucket{le="0.5",method="GET",reporter="client"} 1"#,
    );
    let newer = served(&FlowMetrics::parse("httpV2").unwrap(), &flows);
    let line = r#"hubble_http_requests_total{method="GET",protocol="HTTP/1.1",status="503",reporter="client"} 1"#;
    assert!(newer.iter().any(|one| one == line), "{newer:#?}");
    let error = FlowMetrics::parse("http httpV2").unwrap_err().to_string();
    assert!(error.contains("asked for twice"), "{error}");
}
