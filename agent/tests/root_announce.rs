//! Two nodes and a client on a bridge: who answers for a LoadBalancer address, and what the client believes.
#![allow(clippy::unwrap_used, reason = "tests")]

mod lan;
mod leases;

use std::collections::BTreeSet;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use lan::{Lan, NODES, V4, V6, left_out};
use leases::{Announcer, SOON, Table, Way, service};
use xebec_agent::announce::{Announced, Config, Timing};

const LEASE: &str = "xebec-l2announce-shop-web";
const SECOND: Duration = Duration::from_secs(1);

fn web(eligible: bool) -> Vec<Announced> {
    vec![service("shop", "web", &[V4, V6], eligible)]
}

fn start(lan: &Lan, table: &std::sync::Arc<Table>, node: usize, timing: Timing) -> Announcer {
    let config = Config {
        node: NODES[node].into(),
        devices: vec!["eth0".into()],
        timing,
    };
    let enter = lan.enter(NODES[node]);
    Announcer::start(config, Way::to(table), web(true), enter)
}

fn index(node: &str) -> usize {
    NODES.iter().position(|one| *one == node).unwrap()
}

#[test]
fn the_elected_node_answers_and_is_followed_by_the_other_when_it_stops_or_dies() {
    if left_out() {
        return;
    }
    let lan = Lan::new();
    let table = Table::new();
    // With the times that are used outside of tests.
    let timing = Timing::default();
    assert_eq!(
        (timing.lease, timing.renew, timing.retry),
        (15 * SECOND, 5 * SECOND, 2 * SECOND)
    );
    let mut nodes: Vec<Option<Announcer>> = [0, 1]
        .map(|node| Some(start(&lan, &table, node, timing)))
        .into();
    let first = table.wait(LEASE, SECOND, |holder| holder.is_some());
    let (first, second) = (index(&first), 1 - index(&first));
    // The client's kernel asks, and finds the holder, by both families; packets get there.
    let client = lan.client();
    client.until(NODES[first], SECOND);
    for address in [V4, V6] {
        assert_eq!(
            lan.neighbour(address),
            Some(lan.mac(NODES[first])),
            "{address}"
        );
    }
    // So it does when it has forgotten: the question goes to the group of the address, through a bridge that snoops.
    // The holder's kernel tells of the group when it gets round to it (RFC 3810, 6.1).
    let group = "ff02::1:ff00:100";
    let deadline = Instant::now() + 5 * SECOND;
    while !lan.snooped().contains(group) {
        assert!(Instant::now() < deadline, "{}", lan.snooped());
        std::thread::sleep(SECOND / 20);
    }
    lan.forget();
    client.until(NODES[first], SECOND);

    // A holder that stops is followed at once; the client's kernel, which knew the first, is told.
    let began = Instant::now();
    nodes[first].take().unwrap().stop();
    client.until(NODES[second], SECOND);
    println!("failover from a holder that stopped: {:?}", began.elapsed());
    assert_eq!(table.holder(LEASE).as_deref(), Some(NODES[second]));
    for address in [V4, V6] {
        assert_eq!(
            lan.neighbour(address),
            Some(lan.mac(NODES[second])),
            "{address}"
        );
    }

    // A node that dies is followed when its lease has run out.
    nodes[first] = Some(start(&lan, &table, first, timing));
    std::thread::sleep(SECOND);
    let began = Instant::now();
    lan.unplug(NODES[second]);
    nodes[second].take().unwrap().kill();
    client.until(NODES[first], 20 * SECOND);
    let took = began.elapsed();
    println!("failover from a node that died, with a lease of 15 s: {took:?}");
    assert!(took > 9 * SECOND, "{took:?}");
}

#[test]
fn a_question_has_one_answer_even_while_a_holder_is_cut_off() {
    if left_out() {
        return;
    }
    let lan = Lan::new();
    let table = Table::new();
    let nodes = [0, 1].map(|node| start(&lan, &table, node, SOON));
    let first = table.wait(LEASE, SECOND, |holder| holder.is_some());
    let (first, second) = (index(&first), 1 - index(&first));
    let asker = lan.asker();
    assert_eq!(asker.ask(V4), [lan.mac(NODES[first])]);
    // The holder cannot renew, and does not know who can.
    nodes[first].way.cut.store(true, Ordering::Relaxed);
    let began = Instant::now();
    let (mut silent, mut answered) = (None, None);
    while began.elapsed() < 5 * SECOND && answered.is_none() {
        let answers = asker.ask(V4);
        assert!(answers.len() <= 1, "{answers:?}");
        if answers.is_empty() {
            silent = silent.or(Some(began.elapsed()));
        }
        if answers == [lan.mac(NODES[second])] {
            answered = Some(began.elapsed());
        }
    }
    let (silent, answered) = (silent.unwrap(), answered.unwrap());
    println!("cut off, with a lease of 2 s: silent after {silent:?}, followed after {answered:?}");
    assert!(silent < answered && silent > SECOND / 2, "{silent:?}");

    // Who may not any more falls silent; with nobody else, nobody answers.
    nodes[second].wanted.send_replace(web(false));
    let began = Instant::now();
    while !asker.ask(V4).is_empty() {
        assert!(began.elapsed() < SECOND / 2);
    }
    std::thread::sleep(SECOND / 2);
    assert!(asker.ask(V4).is_empty());
}

#[test]
fn it_is_said_three_times_and_nothing_else_is_answered() {
    if left_out() {
        return;
    }
    let lan = Lan::new();
    let table = Table::new();
    let asker = lan.asker();
    let node = start(&lan, &table, 0, SOON);
    table.wait(LEASE, SECOND, |holder| holder.is_some());
    let said = asker.listen(3 * SECOND);
    let mac = lan.mac(NODES[0]);
    let times: Vec<Duration> = said.iter().map(|(when, _, _)| *when).collect();
    assert!(
        said.iter().all(|(_, from, of)| *from == mac && *of == V4),
        "{said:?}"
    );
    assert_eq!(times.len(), 3, "{times:?}");
    for pair in times.windows(2) {
        let apart = pair[1] - pair[0];
        assert!(
            apart > SECOND * 8 / 10 && apart < SECOND * 12 / 10,
            "{times:?}"
        );
    }
    assert!(asker.ask("10.77.0.101").is_empty());
    // A frame of another network on the same wire.
    assert!(asker.ask_in(V4, Some(7)).is_empty());
    assert_eq!(asker.ask(V4), [mac]);
    // So many that the kernel filters them no more.
    let many: Vec<String> = (0..1000)
        .map(|n| format!("10.78.{}.{}", n / 250, n % 250))
        .collect();
    let many: Vec<&str> = many.iter().map(String::as_str).collect();
    node.wanted.send_replace(vec![
        service("shop", "web", &[V4], true),
        service("shop", "many", &many, true),
    ]);
    table.wait("xebec-l2announce-shop-many", SECOND, |holder| {
        holder.is_some()
    });
    let said = asker.listen(SECOND * 5 / 2).into_iter();
    let heard: BTreeSet<String> = said.map(|(_, _, of)| of).collect();
    assert_eq!(heard.len(), 1000);
    assert_eq!(asker.ask("10.78.3.249"), [mac]);
    assert_eq!(asker.ask(V4), [mac]);
    assert!(asker.ask("10.77.0.101").is_empty());
    // Without Services, silence, and no lease.
    node.wanted.send_replace(Vec::new());
    std::thread::sleep(SECOND / 5);
    assert!(asker.ask(V4).is_empty());
    assert_eq!(table.names(), Vec::<String>::new());
}

#[test]
fn a_device_that_goes_down_and_comes_again_is_spoken_at_again() {
    if left_out() {
        return;
    }
    let lan = Lan::new();
    let table = Table::new();
    let _node = start(&lan, &table, 0, SOON);
    let client = lan.client();
    client.until(NODES[0], 2 * SECOND);
    lan.unplug(NODES[0]);
    std::thread::sleep(SECOND / 2);
    lan.forget();
    lan.plug(NODES[0]);
    client.until(NODES[0], 8 * SECOND);
}
