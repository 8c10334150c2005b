//! Fragments through Services: what they are put together to is what the whole would have become.

use xebec_dataplane_common::flow::{DROPPED, REASON_FRAGMENT};

use super::both::{Datagram, HERE, at, udp};
use super::{Kernel, OK, POD_MAC, REDIRECT, SHOT, left_out};

/// A pod, a Service, its backend on this node, a client outside, and the node.
const FAMILIES: [[&str; 5]; 2] = [
    [
        "10.244.0.5",
        "10.96.0.9",
        "10.244.0.6",
        "198.51.100.7",
        "192.0.2.10",
    ],
    [
        "fd00::5",
        "fd96::9",
        "fd00::6",
        "2001:db8:7::7",
        "2001:db8::10",
    ],
];

fn kernel() -> Kernel {
    let mut kernel = Kernel::new();
    kernel.node6(at("2001:db8::10"));
    kernel.pod_at(at("fd00::5"), true);
    kernel.pod_at(at("fd00::6"), false);
    for [_, service, backend, _, node] in FAMILIES.map(|all| all.map(at)) {
        kernel.service(service, 53, 0, Some((backend, 5353)));
        let every = if node.is_ipv4() { "0.0.0.0" } else { "::" };
        kernel.service(at(every), 30_053, 0, Some((backend, 5353)));
    }
    kernel
}

/// What a pod of this node is handed.
fn handed(mut packet: Datagram) -> Vec<u8> {
    (packet.mac_source, packet.mac_destination, packet.hops) = (HERE, POD_MAC, 63);
    packet.bytes()
}

#[test]
fn of_datagrams_to_services_follow_the_first() {
    if left_out() {
        return;
    }
    let mut kernel = kernel();
    for [pod, service, backend, client, node] in FAMILIES.map(|all| all.map(at)) {
        let data: Vec<u8> = (0..1600_u32).map(|byte| (byte % 251) as u8).collect();
        let sent = udp((pod, service), (4000, 53), &data).parts(7, 1400);
        let seen = udp((pod, backend), (4000, 5353), &data).parts(7, 1400);
        for (sent, seen) in sent.into_iter().zip(seen) {
            assert_eq!(
                kernel.run("xebec_from_pod", &sent.bytes()),
                (REDIRECT, handed(seen)),
                "{pod}"
            );
        }
        let sent = udp((client, node), (4000, 30_053), &data).parts(8, 1400);
        let seen = udp((client, backend), (4000, 5353), &data).parts(8, 1400);
        for (sent, seen) in sent.into_iter().zip(seen) {
            assert_eq!(
                kernel.run("xebec_from_network", &sent.bytes()),
                (OK, seen.bytes()),
                "{client}"
            );
        }
        // The answer, too.
        let sent = udp((backend, client), (5353, 4000), &data).parts(9, 1400);
        let seen = udp((node, client), (30_053, 4000), &data).parts(9, 1400);
        for (sent, seen) in sent.into_iter().zip(seen) {
            assert_eq!(
                kernel.run("xebec_to_network", &sent.bytes()),
                (OK, seen.bytes()),
                "{client}"
            );
        }
    }
}

/// Whom a fragment is for that comes before the first of its datagram, nothing tells: what a pod sends is dropped and
/// told of, for it may be forbidden. What comes from the network may be the node's own, and is the stack's. A pod gets
/// it if no rules are asked for the pod.
#[test]
fn before_the_first_are_dropped_where_rules_may_be_slipped_past() {
    if left_out() {
        return;
    }
    let mut kernel = kernel();
    for [pod, service, _, client, node] in FAMILIES.map(|all| all.map(at)) {
        let [_, later] = udp((pod, service), (4000, 53), &[7; 100]).parts(17, 64);
        let later = later.bytes();
        assert_eq!(kernel.run("xebec_from_pod", &later), (SHOT, later.clone()));
        let event = kernel.last_event().unwrap();
        assert_eq!((event.verdict, event.reason), (DROPPED, REASON_FRAGMENT));
        let [_, later] = udp((client, node), (4000, 30_053), &[7; 100]).parts(18, 64);
        let later = later.bytes();
        assert_eq!(
            kernel.run("xebec_from_network", &later),
            (OK, later.clone())
        );
        let [_, later] = udp((client, pod), (4000, 53), &[7; 100]).parts(19, 64);
        let later = later.bytes();
        assert_eq!(kernel.run("xebec_to_pod", &later), (OK, later.clone()));
    }
    kernel.isolate_pod();
    let [_, later] = udp(
        (at("198.51.100.7"), at("10.244.0.5")),
        (4000, 53),
        &[7; 100],
    )
    .parts(20, 64);
    let later = later.bytes();
    assert_eq!(kernel.run("xebec_to_pod", &later), (SHOT, later.clone()));
    assert_eq!(kernel.last_event().unwrap().reason, REASON_FRAGMENT);
}
