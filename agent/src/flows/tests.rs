//! Flows as they are kept, filtered and written.

use super::*;
use xebec_dataplane_common::flow::{FORWARDED, INGRESS};

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
    names.set_rule(42, &rule);
    Flows::new(names, "here")
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
    flows.take(
        &[event],
        1_767_323_045_000_000_000,
        &Arc::new(Peer::world()),
    );
}

fn newest(flows: &Flows) -> Value {
    let (seen, _) = flows.read(&Filter::parse("last=1").unwrap());
    flows.to_json(&seen[0])
}

#[test]
fn an_allowed_flow_names_ends_and_rule() {
    let flows = flows();
    take(&flows, event(WEB, API));
    let value = newest(&flows);
    assert_eq!(value["time"], "2026-01-02T03:04:10Z");
    let flow = &value["flow"];
    assert_eq!(flow["verdict"], "FORWARDED");
    assert_eq!(flow["source"]["pod_name"], "web-1");
    assert_eq!(flow["source"]["labels"], json!(["k8s:app=web"]));
    assert_eq!(
        flow["destination"]["workloads"],
        json!([{"kind": "ReplicaSet", "name": "api"}])
    );
    assert_eq!(
        flow["l4"],
        json!({"TCP": {"source_port": 4000, "destination_port": 8080, "flags": {"SYN": true}}})
    );
    assert_eq!(
        flow["ingress_allowed_by"],
        json!([{"kind": "NetworkPolicy", "namespace": "shop", "name": "api-from-web", "rule": 2}])
    );
    assert_eq!(flow["ingress_denied_by"], Value::Null);
}

#[test]
fn a_dropped_flow_names_reason_and_policies() {
    let flows = flows();
    take(&flows, dropped([198, 51, 100, 7], API));
    let flow = &newest(&flows)["flow"];
    assert_eq!(flow["drop_reason_desc"], "POLICY_DENIED");
    assert_eq!(flow["drop_reason"], 133);
    assert_eq!(flow["source"]["labels"], json!(["reserved:world"]));
    assert_eq!(flow["source"]["pod_name"], Value::Null);
    assert_eq!(flow["ingress_denied_by"][0]["name"], "api-from-web");
    assert_eq!(flow["ingress_allowed_by"], Value::Null);
}

#[test]
fn what_is_audited_says_who_would_have_dropped_it() {
    let flows = flows();
    let audited = Event {
        verdict: AUDITED,
        ..dropped(WEB, API)
    };
    take(&flows, audited);
    let flow = &newest(&flows)["flow"];
    assert_eq!(flow["verdict"], "AUDIT");
    assert_eq!(flow["ingress_denied_by"][0]["name"], "api-from-web");
    assert_eq!(flow["ingress_denied_by"][0]["rule"], Value::Null);
    assert_eq!(flow["drop_reason"], Value::Null);
    assert_eq!(flow["ingress_allowed_by"], Value::Null);
    // By a rule that says so.
    let denied = Event {
        verdict: DROPPED,
        reason: REASON_RULE,
        ..event(WEB, API)
    };
    take(&flows, denied);
    let flow = &newest(&flows)["flow"];
    assert_eq!(flow["drop_reason_desc"], "POLICY_DENY");
    assert_eq!(flow["ingress_denied_by"][0]["rule"], 2);
}

#[test]
fn filters_choose_and_nonsense_is_refused() {
    let flows = flows();
    take(&flows, event(WEB, API));
    take(&flows, dropped([198, 51, 100, 7], API));
    take(
        &flows,
        Event {
            protocol: UDP,
            destination_port: 53_u16.to_be(),
            ..event([198, 51, 100, 7], [198, 51, 100, 8])
        },
    );
    for (query, count) in [
        ("", 3),
        ("last=2", 2),
        ("namespace=shop", 2),
        ("namespace=other", 0),
        ("pod=web-1", 1),
        ("pod=shop/api", 2),
        ("pod=other/api", 0),
        ("verdict=dropped", 1),
        ("protocol=UDP", 1),
        ("protocol=tcp&port=8080", 2),
        ("port=53", 1),
        ("since=3600", 0),
    ] {
        let (seen, _) = flows.read(&Filter::parse(query).unwrap());
        assert_eq!(seen.len(), count, "{query}");
    }
    for query in [
        "port=70000",
        "port=http",
        "last=-1",
        "since=soon",
        "colour=red",
    ] {
        assert!(Filter::parse(query).is_err(), "{query}");
    }
}

#[test]
fn the_newest_are_kept_and_followers_see_each_once() {
    let flows = flows();
    for port in 0..5_000_u16 {
        take(
            &flows,
            Event {
                source_port: port.to_be(),
                ..event(WEB, API)
            },
        );
    }
    let all = Filter::parse("last=100000").unwrap();
    let (seen, mut news) = flows.read(&all);
    assert_eq!(seen.len(), KEPT);
    assert_eq!(u16::from_be(seen[0].event.source_port), 5_000 - 4_095);
    take(&flows, dropped(WEB, API));
    assert_eq!(news.try_recv().unwrap().event.verdict, DROPPED);
    assert!(news.try_recv().is_err());
}

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
