//! SCTP through Services and to the outside: ports change, and its checksum of everything fits afterwards.

use xebec_dataplane_common::flow::REASON_CHECKSUM;

use super::both::{Datagram, HERE, at, crc32c, sctp};
use super::{Kernel, OK, PASS, POD_MAC, REDIRECT, SHOT, left_out};

const DATA: u8 = 0;
const INIT: u8 = 1;
const INIT_ACK: u8 = 2;
const ABORT: u8 = 6;
const SHUTDOWN_COMPLETE: u8 = 14;

/// Families' clients, Services and backends: of a pod, and of someone outside.
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
    kernel
}

/// What a pod of this node is handed.
fn handed(mut packet: Datagram) -> Vec<u8> {
    (packet.mac_source, packet.mac_destination, packet.hops) = (HERE, POD_MAC, 63);
    packet.bytes()
}

/// The checksum's place in a frame.
fn checksum(frame: &mut [u8], v4: bool) -> &mut [u8] {
    let place = if v4 { 14 + 20 + 8 } else { 14 + 40 + 8 };
    &mut frame[place..place + 4]
}

#[test]
fn the_test_knows_the_checksum() {
    assert_eq!(crc32c(b"123456789"), 0xe306_9283);
}

#[test]
fn services_with_other_ports_serve_it() {
    if left_out() {
        return;
    }
    for [pod, service, backend, client, node] in FAMILIES.map(|all| all.map(at)) {
        let mut kernel = kernel();
        kernel.service(service, 80, 0, Some((backend, 8080)));
        let every = if pod.is_ipv4() { "0.0.0.0" } else { "::" };
        kernel.service(at(every), 30_080, 0, Some((backend, 9090)));
        // Chunks of all lengths that count: none, odd ones, and all that a frame takes.
        for (index, length) in [0, 1, 4, 16, 255, 256, 1000, 1444].into_iter().enumerate() {
            let data: Vec<u8> = (0..length).map(|byte| (byte * 7 % 251) as u8).collect();
            let port = 4000 + index as u16;
            let sent = sctp((pod, service), (port, 80), INIT, &data);
            let expected = sctp((pod, backend), (port, 8080), INIT, &data);
            assert_eq!(
                kernel.run("xebec_from_pod", &sent.bytes()),
                (REDIRECT, handed(expected)),
                "{pod} {length}"
            );
            let sent = sctp((client, node), (port, 30_080), INIT, &data);
            let expected = sctp((client, backend), (port, 9090), INIT, &data);
            let answer = sctp((backend, client), (9090, port), INIT_ACK, &data);
            let back = sctp((node, client), (30_080, port), INIT_ACK, &data);
            if index % 2 == 0 {
                assert_eq!(
                    kernel.run("xebec_from_network", &sent.bytes()),
                    (OK, expected.bytes())
                );
            } else {
                assert_eq!(kernel.run_early(0, &sent.bytes()), (PASS, expected.bytes()));
            }
            assert_eq!(
                kernel.run("xebec_to_network", &answer.bytes()),
                (OK, back.bytes())
            );
        }
        // What fills a short frame up is no part of the packet.
        let (mut sent, mut expected) = (
            sctp((client, node), (4000, 30_080), DATA, b"").bytes(),
            sctp((client, backend), (4000, 9090), DATA, b"").bytes(),
        );
        sent.extend([0x55; 10]);
        expected.extend([0x55; 10]);
        assert_eq!(kernel.run("xebec_from_network", &sent), (OK, expected));
        // A wrong checksum stays as wrong as it was, and none stays none.
        let (mut sent, mut expected) = (
            sctp((client, node), (4000, 30_080), DATA, b"four").bytes(),
            sctp((client, backend), (4000, 9090), DATA, b"four").bytes(),
        );
        checksum(&mut sent, pod.is_ipv4())[1] ^= 0x10;
        checksum(&mut expected, pod.is_ipv4())[1] ^= 0x10;
        assert_eq!(
            kernel.run("xebec_from_network", &sent),
            (OK, expected.clone())
        );
        checksum(&mut sent, pod.is_ipv4()).fill(0);
        checksum(&mut expected, pod.is_ipv4()).fill(0);
        assert_eq!(kernel.run("xebec_from_network", &sent), (OK, expected));
    }
}

#[test]
fn to_the_outside_its_port_changes() {
    if left_out() {
        return;
    }
    for [pod, _, _, client, node] in FAMILIES.map(|all| all.map(at)) {
        let mut kernel = kernel();
        let sent = sctp((pod, client), (4000, 80), INIT, b"some tags");
        let (verdict, out) = kernel.run("xebec_to_network", &sent.bytes());
        let place = if pod.is_ipv4() { 34 } else { 54 };
        let port = u16::from_be_bytes([out[place], out[place + 1]]);
        assert!(port >= 61_000, "{port}");
        let expected = sctp((node, client), (port, 80), INIT, b"some tags");
        assert_eq!((verdict, out), (OK, expected.bytes()));
        let answer = sctp((client, node), (80, port), INIT_ACK, b"others");
        let back = sctp((client, pod), (80, 4000), INIT_ACK, b"others");
        assert_eq!(
            kernel.run("xebec_from_network", &answer.bytes()),
            (OK, back.bytes())
        );
    }
}

/// The first fragment does not tell how long the whole is, so its checksum can't be mended.
#[test]
fn a_fragment_whose_port_would_change_is_dropped() {
    if left_out() {
        return;
    }
    let mut kernel = kernel();
    let [pod, service, backend, ..] = FAMILIES[0].map(at);
    kernel.service(service, 80, 0, Some((backend, 8080)));
    kernel.service(service, 81, 0, Some((backend, 81)));
    for (port, verdict) in [(80, SHOT), (81, REDIRECT)] {
        let mut sent = sctp((pod, service), (4000, port), INIT, b"").bytes();
        sent[20] = 0x20;
        assert_eq!(kernel.run("xebec_from_pod", &sent).0, verdict);
        let reason = if port == 80 { REASON_CHECKSUM } else { 0 };
        assert_eq!(kernel.last_event().unwrap().reason, reason);
    }
}

#[test]
fn associations_begin_and_end() {
    if left_out() {
        return;
    }
    let [_, _, _, client, node] = FAMILIES[0].map(at);
    let (one, two) = (at("10.244.0.6"), at("10.244.0.5"));
    for end in [ABORT, SHUTDOWN_COMPLETE] {
        let mut kernel = kernel();
        let every = at("0.0.0.0");
        kernel.service(every, 30_080, 0, Some((one, 9090)));
        let sent = |chunk| sctp((client, node), (4000, 30_080), chunk, b"").bytes();
        let seen = |by, chunk| (OK, sctp((client, by), (4000, 9090), chunk, b"").bytes());
        // Nothing but INIT begins one.
        for chunk in [DATA, INIT_ACK, ABORT] {
            let frame = sent(chunk);
            assert_eq!(
                kernel.run("xebec_from_network", &frame),
                (OK, frame.clone())
            );
        }
        assert_eq!(kernel.translations(), 0);
        assert_eq!(
            kernel.run("xebec_from_network", &sent(INIT)),
            seen(one, INIT)
        );
        // Sent again, it goes where it went; other backends are others'.
        kernel.service(every, 30_080, 0, Some((two, 9090)));
        assert_eq!(
            kernel.run("xebec_from_network", &sent(INIT)),
            seen(one, INIT)
        );
        let answer = sctp((one, client), (9090, 4000), INIT_ACK, b"").bytes();
        let back = sctp((node, client), (30_080, 4000), INIT_ACK, b"").bytes();
        assert_eq!(kernel.run("xebec_to_network", &answer), (OK, back));
        for chunk in [DATA, end] {
            assert_eq!(
                kernel.run("xebec_from_network", &sent(chunk)),
                seen(one, chunk)
            );
        }
        // Over, and the next is a new one.
        assert_eq!(
            kernel.run("xebec_from_network", &sent(INIT)),
            seen(two, INIT)
        );
        assert_eq!(kernel.translations(), 2);
    }
}
