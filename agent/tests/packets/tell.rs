//! Events of flows: what is told of packets, what is counted instead, and what is lost.

use std::time::{Duration, Instant};

use xebec_agent::loader::{Aggregation, Sizes};
use xebec_agent::maps::ServiceKernel;
use xebec_dataplane_common::flow::{
    AT_POD, DROPPED, EGRESS, Event, FROM_NETWORK, INGRESS, TO_NETWORK,
};
use xebec_dataplane_common::ip::Ip;
use xebec_dataplane_common::service::{ON_THIS_NODE, OWN as OWN_ADDRESS};

use super::{
    ACK, FAMILIES, Family, Front, Kernel, OK, Packet, REDIRECT, SHOT, client, echo, left_out, node,
    pod, service, settings, tcp, udp, web,
};

/// A kernel whose programs put events together like this.
fn kernel(aggregation: Aggregation) -> Kernel {
    super::wires::routed();
    let sizes = Sizes {
        flows: 1 << 16,
        ..Sizes::default()
    };
    Kernel::with_aggregation(sizes, aggregation)
}

fn with_service(kernel: &mut Kernel, f: Family) {
    kernel.backend(1, web(f), 8080, ON_THIS_NODE, 1);
    let front = Front {
        service: 1,
        inside: vec![1],
        ..Front::default()
    };
    kernel.service(service(f), 80, &front);
}

fn events(kernel: &mut Kernel) -> Vec<Event> {
    std::iter::from_fn(|| kernel.event()).collect()
}

/// A millisecond ago, in ns of the monotonic clock.
fn settled() -> u64 {
    let now = nix::time::clock_gettime(nix::time::ClockId::CLOCK_MONOTONIC).unwrap();
    Duration::from(now).as_nanos() as u64 - 1_000_000
}

/// Numbers that look like chance and are the same each time.
struct Chance(u64);

impl Chance {
    fn below(&mut self, end: u64) -> u64 {
        self.0 = self
            .0
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) % end
    }
}

/// A packet of one of some flows, and whether the web pod sends it.
fn some(chance: &mut Chance) -> (Packet, bool) {
    let f = FAMILIES[chance.below(2) as usize];
    let port = 4_000 + chance.below(20) as u16;
    let data = vec![7; chance.below(900) as usize];
    let flags = ["S", "SA", "A", "A", "A", "A", "FA", "R"][chance.below(8) as usize];
    let (to, their) = match chance.below(3) {
        // With ports of their own: translated, they would be others' flows.
        0 => (service(f), 80),
        1 => (web(f), 8080),
        _ => (web(f), 9090),
    };
    let port = if their == 80 { port + 1_000 } else { port };
    let answers = chance.below(2) == 1 && to == web(f);
    let (from, by, to, at) = if answers {
        (to, their, pod(f), port)
    } else {
        (pod(f), port, to, their)
    };
    let packet = match chance.below(3) {
        0 => udp(from, to, by, at),
        _ => tcp(from, to, by, at, flags),
    };
    (packet.with(data), answers)
}

#[test]
fn every_packet_is_told_of_once_at_every_level() {
    if left_out() {
        return;
    }
    const PACKETS: u64 = 4_000;
    let mut told = Vec::new();
    for aggregation in [
        Aggregation::None,
        Aggregation::Low,
        Aggregation::Medium,
        Aggregation::Maximum,
        Aggregation::Off,
    ] {
        let mut kernel = kernel(aggregation);
        for f in FAMILIES {
            with_service(&mut kernel, f);
        }
        // What comes to port 9090 is dropped.
        kernel.isolate_web(8080);
        let before = kernel.counters();
        let mut chance = Chance(5);
        let mut all = Vec::new();
        let mut bytes = 0;
        for number in 0..PACKETS {
            let (packet, answers) = some(&mut chance);
            if answers {
                kernel.as_web();
            } else {
                kernel.as_pod();
            }
            let frame = packet.bytes();
            bytes += frame.len() as u64;
            let (verdict, _) = kernel.run("xebec_from_pod", &frame);
            assert!([OK, SHOT, REDIRECT].contains(&verdict), "{packet:?}");
            if number % 500 == 0 {
                all.extend(events(&mut kernel));
            }
        }
        all.extend(events(&mut kernel));
        let now = kernel.counters();
        let produced = now.produced - before.produced;
        assert_eq!(produced, all.len() as u64, "{aggregation:?}");
        assert_eq!(now.lost, before.lost, "{aggregation:?}");
        let went = now.forwarded + now.dropped - before.forwarded - before.dropped;
        assert_eq!(went, PACKETS, "{aggregation:?}");
        told.push(all.len());
        if aggregation == Aggregation::Off {
            assert!(all.is_empty());
            continue;
        }
        let (untold, untold_bytes) = kernel.untold();
        let sum: u64 = all.iter().map(|event| u64::from(event.packets)).sum();
        assert_eq!(sum + untold, PACKETS, "{aggregation:?}");
        let aggregated = now.aggregated - before.aggregated;
        assert_eq!(aggregated, PACKETS - produced, "{aggregation:?}");
        let sum: u64 = all
            .iter()
            .flat_map(|event| event.bytes)
            .map(u64::from)
            .sum();
        let waiting = (untold_bytes & u64::from(u32::MAX)) + (untold_bytes >> 32);
        assert_eq!(sum + waiting, bytes, "{aggregation:?}");
        let drops = all.iter().filter(|event| event.verdict == DROPPED);
        assert_eq!(drops.count() as u64, now.dropped - before.dropped);
    }
    assert_eq!(told[0] as u64, PACKETS);
    assert!(
        told[1] < told[0] && told[2] < told[0] && told[3] < told[1] && told[3] < told[2],
        "{told:?}"
    );
}

#[test]
fn what_there_is_no_room_for_is_counted_exactly() {
    if left_out() {
        return;
    }
    let mut kernel = kernel(Aggregation::None);
    let before = kernel.counters();
    let frame = tcp(pod(Family::V4), web(Family::V4), 4000, 80, "A").bytes();
    for _ in 0..40_000 {
        kernel.run("xebec_from_pod", &frame);
    }
    let read = events(&mut kernel).len() as u64;
    let now = kernel.counters();
    let lost = now.lost - before.lost;
    assert_eq!(now.produced - before.produced, 40_000);
    assert_eq!(read + lost, 40_000);
    // The rings of two CPUs have no room for more.
    assert!(lost > 20_000 && read > 5_000, "{read} read");
    // Packets went on all the same, and there is room again.
    assert_eq!(now.forwarded - before.forwarded, 40_000);
    kernel.run("xebec_from_pod", &frame);
    assert_eq!(events(&mut kernel).len(), 1);
    assert_eq!(kernel.counters().lost, now.lost);
}

#[test]
fn what_several_cpus_write_at_once_is_read_or_counted_as_lost() {
    if left_out() {
        return;
    }
    let mut kernel = kernel(Aggregation::None);
    let program = kernel.program("xebec_from_pod");
    let frame = tcp(pod(Family::V4), web(Family::V4), 4000, 80, "A").bytes();
    let before = kernel.counters();
    let all = std::thread::scope(|scope| {
        let write = || {
            for _ in 0..20_000 {
                super::together::run(&program, 1, &frame);
            }
        };
        let writers = [scope.spawn(write), scope.spawn(write)];
        let mut all = Vec::new();
        loop {
            let over = writers.iter().all(|writer| writer.is_finished());
            kernel.events_until(settled(), &mut all);
            if over {
                break;
            }
        }
        all.extend(events(&mut kernel));
        all
    });
    let lost = kernel.counters().lost - before.lost;
    assert_eq!(all.len() as u64 + lost, 40_000);
    assert!(all.is_sorted_by_key(|event| event.time));
}

#[test]
fn events_after_a_moment_wait_for_those_before_it() {
    if left_out() {
        return;
    }
    let mut kernel = kernel(Aggregation::None);
    let frame = tcp(pod(Family::V4), web(Family::V4), 4000, 80, "A").bytes();
    kernel.run("xebec_from_pod", &frame);
    let first = kernel.event().unwrap().time;
    for _ in 0..2 {
        kernel.run("xebec_from_pod", &frame);
    }
    let mut read = Vec::new();
    kernel.events_until(first, &mut read);
    assert!(read.is_empty());
    let later = events(&mut kernel);
    assert!(later.len() == 2 && later[0].time <= later[1].time && first < later[0].time);
    kernel.run("xebec_from_pod", &frame);
    kernel.events_until(u64::MAX, &mut read);
    assert_eq!(read.len(), 1);
}

#[test]
fn a_connection_is_told_of_where_it_begins_is_answered_and_ends() {
    if left_out() {
        return;
    }
    // Of which packets of the connection below there are events.
    for (aggregation, expected) in [
        (Aggregation::None, vec![1; 10]),
        (Aggregation::Medium, vec![1, 1, 6, 1]),
        (Aggregation::Maximum, vec![1, 1, 6, 1]),
    ] {
        let mut kernel = kernel(aggregation);
        let f = Family::V4;
        let there = |flags| tcp(pod(f), web(f), 4000, 80, flags);
        let back = |flags| tcp(web(f), pod(f), 80, 4000, flags);
        for packet in [
            there("S"),
            back("SA"),
            there("A"),
            there("A"),
            back("A"),
            there("A"),
            back("A"),
            there("FA"),
            back("FA"),
            there("A"),
        ] {
            if packet.source == web(f) {
                kernel.as_web();
            } else {
                kernel.as_pod();
            }
            kernel.run("xebec_from_pod", &packet.bytes());
        }
        let all = events(&mut kernel);
        let packets: Vec<u32> = all.iter().map(|event| event.packets).collect();
        assert_eq!(packets, expected, "{aggregation:?}");
        if let [begin, answer, end, over] = &all[..] {
            assert_eq!((begin.reply, answer.reply), (0, 1));
            assert!(answer.answered_in > 0 && answer.answered_in < 1_000_000);
            assert_eq!(begin.answered_in + end.answered_in + over.answered_in, 0);
            // Segments without data: four of six are the beginner's.
            let one = there("A").bytes().len() as u32;
            assert_eq!((end.bytes, over.bytes), ([4 * one, 2 * one], [0, one]));
        }
    }
}

#[test]
fn how_long_an_answer_took_is_told_but_not_of_what_was_sent_twice() {
    if left_out() {
        return;
    }
    for f in FAMILIES {
        let mut kernel = Kernel::shared();
        for (port, times) in [(4000, 1), (4001, 2)] {
            kernel.as_pod();
            let sent = tcp(pod(f), web(f), port, 80, "S");
            for _ in 0..times {
                kernel.run("xebec_from_pod", &sent.bytes());
            }
            events(&mut kernel);
            let began = Instant::now();
            std::thread::sleep(Duration::from_millis(3));
            kernel.as_web();
            kernel.run("xebec_from_pod", &sent.answer().bytes());
            let event = kernel.event().unwrap();
            let took = Duration::from_micros(event.answered_in.into());
            if times == 1 {
                // The packet that began it was sent a moment before the clock was asked.
                let most = began.elapsed() + Duration::from_millis(500);
                assert!(Duration::from_millis(3) <= took && took < most, "{took:?}");
            } else {
                assert_eq!(took, Duration::ZERO);
            }
            // No other answer has a time.
            kernel.run("xebec_from_pod", &sent.back(ACK).bytes());
            assert!(kernel.event().is_none());
        }
    }
}

#[test]
fn a_flow_that_goes_on_is_told_of_again_after_a_while() {
    if left_out() {
        return;
    }
    let mut kernel = kernel(Aggregation::Low);
    let frame = udp(pod(Family::V4), web(Family::V4), 4000, 80).bytes();
    let began = Instant::now();
    let mut sent = 0;
    let mut told = Vec::new();
    // A tick lasts a little more than a second.
    while told.len() < 3 && began.elapsed() < Duration::from_secs(10) {
        kernel.run("xebec_from_pod", &frame);
        sent += 1;
        told.extend(events(&mut kernel));
        std::thread::sleep(Duration::from_millis(20));
    }
    let packets: Vec<u32> = told.iter().map(|event| event.packets).collect();
    assert_eq!(packets.len(), 3);
    assert!(
        packets[0] == 1 && packets[1] > 1 && packets[2] > 10,
        "{packets:?}"
    );
    assert_eq!(packets.iter().sum::<u32>(), sent);
}

#[test]
fn what_a_packet_becomes_is_told_of() {
    if left_out() {
        return;
    }
    for f in FAMILIES {
        let mut kernel = Kernel::shared();
        with_service(&mut kernel, f);
        let sent = tcp(pod(f), service(f), 4000, 80, "S");
        kernel.run("xebec_from_pod", &sent.bytes());
        let event = kernel.event().unwrap();
        assert_eq!((event.at, event.service), (AT_POD, 1));
        assert_eq!(event.destination, service(f).into());
        assert_eq!(event.new_source, pod(f).into());
        assert_eq!(event.new_destination, web(f).into());
        let ports = (event.new_source_port, event.new_destination_port);
        assert_eq!(ports, (4000_u16.to_be(), 8080_u16.to_be()));
        kernel.as_web();
        let answer = sent.to(web(f), 8080).answer();
        kernel.run("xebec_from_pod", &answer.bytes());
        let event = kernel.event().unwrap();
        assert_eq!((event.reply, event.source), (1, web(f).into()));
        assert_eq!(event.new_source, service(f).into());
        assert_eq!(event.new_source_port, 80_u16.to_be());
        // What is not translated becomes nothing.
        kernel.as_pod();
        kernel.run("xebec_from_pod", &echo(pod(f), web(f), 7).bytes());
        let event = kernel.event().unwrap();
        assert_eq!(
            (event.new_source, event.new_destination),
            (Ip::NONE, Ip::NONE)
        );
    }
}

#[test]
fn a_flow_that_is_translated_at_the_network_is_told_of_there_once() {
    if left_out() {
        return;
    }
    for f in FAMILIES {
        let mut kernel = Kernel::shared();
        kernel.settings(settings(20_000, 100));
        // Out: the pod's flow has the node's address from there on.
        let sent = tcp(pod(f), client(f), 4000, 443, "S");
        let (verdict, _) = kernel.run_on("xebec_to_network", 1, 1, &sent.bytes());
        assert_eq!(verdict, OK);
        let event = kernel.event().unwrap();
        assert_eq!((event.at, event.direction), (TO_NETWORK, EGRESS));
        assert_eq!(
            (event.source, event.new_source),
            (pod(f).into(), node(f).into())
        );
        assert_eq!((event.packets, event.bytes), (0, [0, 0]));
        let more = tcp(pod(f), client(f), 4000, 443, "A");
        kernel.run_on("xebec_to_network", 1, 1, &more.bytes());
        assert!(kernel.event().is_none());
        // In: to a node port, by tc and by XDP.
        let address = node(f);
        kernel
            .maps()
            .services
            .set_node_address(address, OWN_ADDRESS)
            .unwrap();
        kernel.node_port(30_080, web(f), 8080);
        for (port, early) in [(5000, false), (5001, true)] {
            let sent = tcp(client(f), address, port, 30_080, "S");
            if early {
                kernel.run_early(1, &sent.bytes());
            } else {
                kernel.run("xebec_from_network", &sent.bytes());
            }
            let event = kernel.event().unwrap();
            assert_eq!((event.at, event.direction), (FROM_NETWORK, INGRESS));
            assert_eq!(event.destination, address.into());
            assert_eq!(event.new_destination, web(f).into());
            assert_eq!(event.new_destination_port, 8080_u16.to_be());
            assert!(event.service != 0 && event.packets == 0);
            let frame = sent.bytes().len();
            assert_eq!(usize::from(event.length), frame);
            events(&mut kernel);
        }
    }
}
