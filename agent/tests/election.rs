//! Which node announces a Service: elections by Leases, on a table with the API server's rules.
#![allow(clippy::unwrap_used, reason = "tests")]

mod leases;

use std::collections::BTreeSet;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use leases::{Announcer, SOON, Table, Way, service};
use xebec_agent::announce::{Announced, Config};

const LEASE: &str = "xebec-l2announce-shop-web";

/// Without addresses, only the lease tells.
fn web(eligible: bool) -> Vec<Announced> {
    vec![service("shop", "web", &[], eligible)]
}

fn start(table: &Arc<Table>, node: &str, wanted: Vec<Announced>) -> Announcer {
    let config = Config {
        node: node.into(),
        devices: vec!["lo".into()],
        timing: SOON,
    };
    Announcer::start(config, Way::to(table), wanted, || {})
}

const SECOND: Duration = Duration::from_secs(1);

fn held(holder: Option<&str>) -> bool {
    holder.is_some()
}

#[test]
fn one_node_holds_the_lease_and_renews_it() {
    let table = Table::new();
    let nodes = ["a", "b", "c"].map(|node| start(&table, node, web(true)));
    let holder = table.wait(LEASE, SECOND, held);
    let lease = table.lease(LEASE).unwrap();
    let labels = lease.metadata.labels.unwrap();
    assert_eq!(labels["xebec.io/lease"], "l2-announcement");
    let first = lease.spec.unwrap();
    assert_eq!(first.lease_duration_seconds, Some(2));
    assert_eq!(first.lease_transitions, Some(0));
    assert_eq!(first.acquire_time, first.renew_time);
    std::thread::sleep(3 * SECOND);
    let later = table.spec(LEASE).unwrap();
    assert_eq!(later.holder_identity, Some(holder));
    assert_eq!(later.lease_transitions, Some(0));
    assert_eq!(later.acquire_time, first.acquire_time);
    let renewed = later.renew_time.unwrap().0.as_millisecond();
    let passed = renewed - first.renew_time.unwrap().0.as_millisecond();
    assert!((2_000..=3_500).contains(&passed), "{passed}");
    drop(nodes);
}

#[test]
fn a_holder_that_stops_or_may_no_longer_is_followed_at_once() {
    let table = Table::new();
    let mut nodes: Vec<Announcer> = ["a", "b"].map(|node| start(&table, node, web(true))).into();
    let first = table.wait(LEASE, SECOND, held);
    let at = nodes.iter().position(|one| one.node == first).unwrap();
    let stopped = nodes.remove(at);
    let began = Instant::now();
    stopped.stop();
    let second = table.wait(LEASE, SECOND, |holder| {
        holder.is_some_and(|one| one != first)
    });
    println!(
        "after a holder stopped, the next held the lease in {:?}",
        began.elapsed()
    );
    assert_eq!(table.spec(LEASE).unwrap().lease_transitions, Some(1));
    // Who comes later takes nothing away.
    let again = start(&table, &first, web(true));
    std::thread::sleep(SECOND / 2);
    assert_eq!(table.holder(LEASE), Some(second.clone()));
    nodes[0].wanted.send_replace(web(false));
    table.wait(LEASE, SECOND, |holder| holder == Some(&first));
    // With nobody to hold it, nobody does; and who may again does.
    again.wanted.send_replace(web(false));
    table.wait(LEASE, SECOND, |holder| holder.is_none());
    std::thread::sleep(SECOND);
    assert_eq!(table.holder(LEASE), None);
    nodes[0].wanted.send_replace(web(true));
    table.wait(LEASE, SECOND, |holder| holder == Some(&second));
}

#[test]
fn a_holder_that_was_killed_is_followed_when_its_lease_ends_or_comes_again_at_once() {
    let table = Table::new();
    let holder = start(&table, "a", web(true));
    table.wait(LEASE, SECOND, held);
    holder.kill();
    // The same node again, after its agent was killed.
    let again = start(&table, "a", web(true));
    let renewed = table.spec(LEASE).unwrap().renew_time;
    let began = Instant::now();
    while table.spec(LEASE).unwrap().renew_time == renewed {
        assert!(began.elapsed() < SECOND / 2);
        std::thread::sleep(Duration::from_millis(5));
    }
    assert_eq!(table.spec(LEASE).unwrap().lease_transitions, Some(0));
    let next = start(&table, "b", web(true));
    std::thread::sleep(SECOND);
    again.kill();
    let began = Instant::now();
    table.wait(LEASE, 4 * SECOND, |holder| holder == Some("b"));
    let took = began.elapsed();
    // It was renewed at most half a second before, which is why less than the lease may be left.
    assert!(took >= SECOND + SECOND / 3 && took < 3 * SECOND, "{took:?}");
    println!("after a holder was killed, the next held its lease of 2 s in {took:?}");
    drop(next);
}

#[test]
fn a_short_silence_of_the_api_changes_nothing_and_a_lost_lease_is_noticed() {
    let table = Table::new();
    let nodes = ["a", "b"].map(|node| start(&table, node, web(true)));
    let holder = table.wait(LEASE, SECOND, held);
    let of = |name: &str| nodes.iter().find(|one| one.node == name).unwrap();
    of(&holder).way.cut.store(true, Ordering::Relaxed);
    std::thread::sleep(SECOND * 9 / 10);
    of(&holder).way.cut.store(false, Ordering::Relaxed);
    std::thread::sleep(2 * SECOND);
    assert_eq!(table.holder(LEASE), Some(holder.clone()));
    assert_eq!(table.spec(LEASE).unwrap().lease_transitions, Some(0));
    // Longer, and another has it; who had it sees that and does not take it back.
    of(&holder).way.cut.store(true, Ordering::Relaxed);
    let other = table.wait(LEASE, 4 * SECOND, |now| {
        now.is_some_and(|now| now != holder)
    });
    of(&holder).way.cut.store(false, Ordering::Relaxed);
    std::thread::sleep(2 * SECOND);
    assert_eq!(table.holder(LEASE), Some(other));
    // A lease that somebody took away is made again, by one of them.
    table.remove(LEASE);
    table.wait(LEASE, 2 * SECOND, held);
}

#[test]
fn services_are_shared_out_and_leases_go_with_them() {
    let table = Table::new();
    let all: Vec<Announced> = (0..40)
        .map(|number| service("shop", &format!("web-{number}"), &[], true))
        .collect();
    let nodes = ["a", "b", "c"].map(|node| start(&table, node, Vec::new()));
    std::thread::sleep(SECOND / 5);
    assert_eq!(table.names(), Vec::<String>::new());
    for node in &nodes {
        node.wanted.send_replace(all.clone());
    }
    let names: BTreeSet<String> = (0..40)
        .map(|n| format!("xebec-l2announce-shop-web-{n}"))
        .collect();
    let holders: BTreeSet<String> = names
        .iter()
        .map(|name| table.wait(name, SECOND, held))
        .collect();
    assert_eq!(holders.len(), 3);
    for node in &nodes {
        node.wanted.send_replace(all[..1].to_vec());
    }
    let began = Instant::now();
    while table.names() != ["xebec-l2announce-shop-web-0"] {
        assert!(began.elapsed() < SECOND, "{:?}", table.names());
        std::thread::sleep(Duration::from_millis(5));
    }
}

#[test]
fn services_whose_leases_would_have_one_name_have_two() {
    let table = Table::new();
    let both = vec![
        service("shop-web", "a", &[], true),
        service("shop", "web-a", &[], true),
    ];
    let node = start(&table, "a", both);
    table.wait("xebec-l2announce-shop-web-a", SECOND, held);
    table.wait("xebec-l2announce-shop-web.a", SECOND, held);
    drop(node);
}

#[test]
fn a_node_without_devices_leaves_it_to_others() {
    let table = Table::new();
    let config = Config {
        node: "a".into(),
        devices: Vec::new(),
        timing: SOON,
    };
    let _mute = Announcer::start(config, Way::to(&table), web(true), || {});
    std::thread::sleep(SECOND);
    assert_eq!(table.names(), Vec::<String>::new());
}

#[test]
fn a_service_that_goes_and_comes_again_is_elected_for_again() {
    let table = Table::new();
    let node = start(&table, "a", web(true));
    for _ in 0..20 {
        table.wait(LEASE, SECOND, held);
        node.wanted.send_replace(Vec::new());
        std::thread::sleep(Duration::from_millis(3));
        node.wanted.send_replace(web(true));
    }
    // Whoever was still taking the lease away is done by then.
    std::thread::sleep(SECOND);
    let first = table.spec(LEASE).unwrap().renew_time;
    std::thread::sleep(SECOND);
    assert!(table.spec(LEASE).unwrap().renew_time > first);
}
