//! What flags ask for.

use clap::{Args, FromArgMatches};
use serde_json::{Value, json};

use super::*;

fn read(line: &str) -> Result<FilterArgs, String> {
    let command = FilterArgs::augment_args(Command::new("observe").no_binary_name(true));
    let matches = command
        .try_get_matches_from(line.split_whitespace())
        .map_err(|error| error.to_string())?;
    FilterArgs::from_arg_matches(&matches).map_err(|error| error.to_string())
}

fn json_of(filters: &[FlowFilter]) -> Value {
    serde_json::to_value(filters).unwrap()
}

#[test]
fn flags_become_filters() {
    for (line, allow) in [
        ("", json!([])),
        ("--from-pod shop/web", json!([{"source_pod": ["shop/web"]}])),
        (
            "--to-pod a --to-pod b",
            json!([{"destination_pod": ["a", "b"]}]),
        ),
        (
            "--pod web",
            json!([{"source_pod": ["web"]}, {"destination_pod": ["web"]}]),
        ),
        (
            "--pod web --verdict dropped",
            json!([
                {"source_pod": ["web"], "verdict": ["DROPPED"]},
                {"destination_pod": ["web"], "verdict": ["DROPPED"]},
            ]),
        ),
        (
            "-n shop",
            json!([{"source_pod": ["shop/"]}, {"destination_pod": ["shop/"]}]),
        ),
        (
            "-n shop -n kube-system --pod web",
            json!([
                {"source_pod": ["shop/web", "kube-system/web"]},
                {"destination_pod": ["shop/web", "kube-system/web"]},
            ]),
        ),
        (
            "--from-namespace a --to-namespace b",
            json!([{"source_pod": ["a/"], "destination_pod": ["b/"]}]),
        ),
        (
            "-A",
            json!([{"source_pod": ["/"]}, {"destination_pod": ["/"]}]),
        ),
        ("--to-all-namespaces", json!([{"destination_pod": ["/"]}])),
        (
            "--to-namespace b --to-service api",
            json!([{"destination_service": ["b/api"]}]),
        ),
        (
            "--from-label app=web --to-label reserved:world",
            json!([{"source_label": ["app=web"], "destination_label": ["reserved:world"]}]),
        ),
        (
            "--to-identity world --from-identity 77",
            json!([{"source_identity": [77], "destination_identity": [2]}]),
        ),
        (
            "--to-ip 10.0.0.0/8 --to-port 80",
            json!([{"destination_ip": ["10.0.0.0/8"], "destination_port": ["80"]}]),
        ),
        (
            "--snat-ip 192.0.2.1",
            json!([{"source_ip_xlated": ["192.0.2.1"]}]),
        ),
        (
            "--workload Deployment/web",
            json!([
                {"source_workload": [{"kind": "Deployment", "name": "web"}]},
                {"destination_workload": [{"kind": "Deployment", "name": "web"}]},
            ]),
        ),
        (
            "--to-fqdn *.example.com",
            json!([{"destination_fqdn": ["*.example.com"]}]),
        ),
        ("-4 -6", json!([{"ip_version": ["IPv4", "IPv6"]}])),
        (
            "--protocol tcp --protocol DNS",
            json!([{"protocol": ["tcp", "DNS"]}]),
        ),
        (
            "--tcp-flags syn,ack",
            json!([{"tcp_flags": [{"SYN": true, "ACK": true}]}]),
        ),
        (
            "--verdict DROPPED --verdict AUDIT",
            json!([{"verdict": ["DROPPED", "AUDIT"]}]),
        ),
        (
            "--drop-reason-desc policy_denied",
            json!([{"drop_reason_desc": ["POLICY_DENIED"]}]),
        ),
        ("-t drop", json!([{"event_type": [{"type": 1}]}])),
        (
            "-t trace:to-endpoint -t 4:5",
            json!([{"event_type": [
                {"type": 4, "match_sub_type": true},
                {"type": 4, "match_sub_type": true, "sub_type": 5},
            ]}]),
        ),
        (
            "--traffic-direction egress",
            json!([{"traffic_direction": ["EGRESS"]}]),
        ),
        ("--reply", json!([{"reply": [true]}])),
        (
            "--http-status 5+ --http-method get",
            json!([{"http_status_code": ["5+"], "http_method": ["get"]}]),
        ),
        (
            "--http-header foo:bar:x",
            json!([{"http_header": [{"key": "foo", "value": "bar:x"}]}]),
        ),
        (
            "--node-name node* --uuid u",
            json!([{"node_name": ["node*"], "uuid": ["u"]}]),
        ),
        ("--unencrypted", json!([{"encrypted": [false]}])),
        (
            "--interface eth0",
            json!([{"interface": [{"name": "eth0"}]}]),
        ),
        (
            "--cel-expression true",
            json!([{"experimental": {"cel_expression": ["true"]}}]),
        ),
    ] {
        let read = read(line).unwrap_or_else(|error| panic!("{line}: {error}"));
        assert_eq!(json_of(&read.allow), allow, "{line}");
        assert!(read.deny.is_empty(), "{line}");
    }
}

#[test]
fn not_turns_the_next_flag_alone() {
    let read = read("--not --from-pod a/ --to-port 80 --not --verdict DROPPED --reply").unwrap();
    assert_eq!(
        json_of(&read.deny),
        json!([{"source_pod": ["a/"], "verdict": ["DROPPED"]}])
    );
    assert_eq!(
        json_of(&read.allow),
        json!([{"destination_port": ["80"], "reply": [true]}])
    );
}

#[test]
fn nonsense_is_refused_with_a_reason() {
    for (line, reason) in [
        ("--not", "--not stands before no filter"),
        ("--not --not --reply", "before another --not"),
        ("--verdict MAYBE", "possible values"),
        ("--drop-reason-desc WEATHER", "invalid value"),
        ("--protocol quic", "possible values"),
        ("--tcp-flags syn,ok", "\"ok\" is none of FIN"),
        ("--type rain", "no such type; there are capture, drop"),
        ("--type trace:nowhere", "trace has no \"nowhere\""),
        (
            "--identity nobody",
            "neither a number nor one of unknown, host, world",
        ),
        ("--http-header foo", "it is KEY:VALUE"),
        (
            "--ip 10.0.0.1 --from-ip 10.0.0.2",
            "--from-ip and --ip can't stand together",
        ),
        (
            "--pod a --to-fqdn b",
            "--to-fqdn and --pod can't stand together",
        ),
        ("-n shop --from-pod web", "can't stand together"),
        (
            "-n shop --pod other/web",
            "other/web is in none of the namespaces shop",
        ),
    ] {
        let error = read(line).unwrap_err();
        assert!(error.contains(reason), "{line}: {error}");
    }
}

#[test]
fn every_flag_asks_for_something() {
    for Flag(name, _, takes, _) in FLAGS {
        let value = match takes {
            Nothing => "",
            OneOf(values) => values()[0],
            Text(_) => match *name {
                "tcp-flags" => "syn",
                "type" => "drop",
                "http-header" => "a:b",
                name if name.ends_with("identity") => "host",
                _ => "x",
            },
        };
        let read =
            read(&format!("--{name} {value}")).unwrap_or_else(|error| panic!("{name}: {error}"));
        assert_ne!(read.allow, [FlowFilter::default()], "{name}");
        assert!(!read.allow.is_empty(), "{name}");
    }
}
