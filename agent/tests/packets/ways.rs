//! Which way translated packets take, and what is said of those that have none, byte for byte.

use std::time::Duration;

use xebec_agent::loader::Xdp;
use xebec_dataplane_common::flow::{DROPPED, REASON_NO_ROUTE, REASON_TOO_BIG, REASON_TTL};
use xebec_dataplane_common::nat::Settings;

use super::packet::told_by;
use super::wires::{OTHER_NODE, OWN, ROUTER, Wires, ip, neighbour};
use super::{
    ACK, FAMILIES, Family, HERE, Kernel, OK, POD_MAC, Packet, REDIRECT, SHOT, Why, at, client,
    error, far, icmp, left_out, node, pod, router, service, settings, source_port, tcp, udp, web,
};

const FROM_NETWORK: &str = "xebec_from_network";
const FROM_POD: &str = "xebec_from_pod";
/// Whoever sends frames.
const THERE: [u8; 6] = [2, 0, 0, 0, 0, 1];

/// A client behind one device, a backend behind another: frames go out where the routes lead, with the addresses of
/// the next hop, and back.
#[test]
fn frames_leave_by_the_device_of_their_route() {
    if left_out() {
        return;
    }
    Wires::with(|wires| {
        let mut kernel = Kernel::own();
        kernel.attach(&wires.devices, Xdp::Off).unwrap();
        // With one port alone, its choice is known.
        kernel.settings(settings(61_000, 1));
        for f in FAMILIES {
            let far = at(f, [10, 244, 2, 5]);
            kernel.node_port(30_080, far, 8080);
            let ears = [wires.ear(0), wires.ear(1)];
            let sent = tcp(client(f), node(f), 4000, 30_080, "S").between(ROUTER, OWN[0]);
            wires.send(0, &sent.bytes());
            let there = sent.from(node(f), 61_000).to(far, 8080);
            ears[1].hears(&there.hop().between(OWN[1], OTHER_NODE).bytes());
            let answer = there.answer().between(OTHER_NODE, OWN[1]);
            wires.send(1, &answer.bytes());
            let back = answer.from(node(f), 30_080).to(client(f), 4000);
            ears[0].hears(&back.hop().between(OWN[0], ROUTER).bytes());
        }
    });
}

/// What the routing table said is remembered, but not for long.
#[test]
fn a_route_that_changes_is_obeyed_soon() {
    if left_out() {
        return;
    }
    Wires::with(|wires| {
        let mut kernel = Kernel::own();
        kernel.attach(&wires.devices, Xdp::Off).unwrap();
        kernel.settings(settings(61_000, 1));
        for f in FAMILIES {
            let far = far(f);
            kernel.node_port(30_080, far, 8080);
            let sent = tcp(client(f), node(f), 4000, 30_080, "S").between(ROUTER, OWN[0]);
            let there = sent.from(node(f), 61_000).to(far, 8080).hop();
            let ears = [wires.ear(0), wires.ear(1)];
            wires.send(0, &sent.bytes());
            ears[0].hears(&there.clone().between(OWN[0], OTHER_NODE).bytes());
            let hop = at(f, [203, 0, 113, 20]);
            let net = if f == Family::V4 {
                "10.244.1.0/24"
            } else {
                "fd00:10:244:1::/64"
            };
            ip(&format!("route replace {net} via {hop}"));
            std::thread::sleep(LASTS);
            wires.send(0, &sent.bytes());
            ears[1].hears(&there.clone().between(OWN[1], OTHER_NODE).bytes());
            // So is a neighbour's new address.
            neighbour("replace", hop, 1, ROUTER);
            std::thread::sleep(LASTS);
            wires.send(0, &sent.bytes());
            ears[1].hears(&there.clone().between(OWN[1], ROUTER).bytes());
        }
    });
}

/// Longer than an answer of the routing table is remembered.
const LASTS: Duration = Duration::from_millis(100);

/// A packet to the node's device, as whoever sent it hears of it.
fn refused(sent: &Packet, f: Family, why: Why) -> Vec<u8> {
    let answer = told_by(node(f), sent, why);
    answer
        .between(sent.mac_destination, sent.mac_source)
        .bytes()
}

#[test]
fn on_its_last_hop_a_packet_is_answered() {
    if left_out() {
        return;
    }
    for f in FAMILIES {
        let mut kernel = Kernel::shared();
        kernel.node_port(30_080, far(f), 8080);
        for sent in [
            tcp(client(f), node(f), 4000, 30_080, "S"),
            udp(client(f), node(f), 4000, 30_080).with_options(),
        ] {
            let sent = sent.between(THERE, HERE);
            for ttl in [0, 1] {
                let mut last = sent.clone();
                last.ttl = ttl;
                let expected = (REDIRECT, refused(&last, f, Why::TimeExceeded));
                // Of a flow that would begin, which then does not.
                assert_eq!(kernel.run(FROM_NETWORK, &last.bytes()), expected);
                assert_eq!(kernel.flow(&last), None);
                let event = kernel.last_event().unwrap();
                assert_eq!((event.verdict, event.reason), (DROPPED, REASON_TTL));
                // Overheard, it is nobody's to answer; nor are errors.
                let overheard = last.clone().between(THERE, POD_MAC).bytes();
                assert_eq!(kernel.run(FROM_NETWORK, &overheard).0, SHOT);
            }
            // Of a flow that is known, in both directions.
            assert_eq!(kernel.run(FROM_NETWORK, &sent.bytes()).0, REDIRECT);
            let port = kernel.flow(&sent).unwrap().to.source_port;
            let seen = sent.from(node(f), u16::from_be(port)).to(far(f), 8080);
            for mut last in [sent.flags_if_tcp(ACK), seen.answer()] {
                last.ttl = 1;
                let expected = (REDIRECT, refused(&last, f, Why::TimeExceeded));
                assert_eq!(
                    kernel.run(FROM_NETWORK, &last.bytes()),
                    expected,
                    "{last:?}"
                );
            }
            let mut last = error(far(f), node(f), Why::NoPort, &seen, 500).between(THERE, HERE);
            last.ttl = 1;
            assert_eq!(kernel.run(FROM_NETWORK, &last.bytes()).0, SHOT);
            kernel.forget(&sent);
        }
        assert_eq!(kernel.refused().0, 0, "its Service has endpoints");
    }
}

#[test]
fn what_no_route_takes_is_answered() {
    if left_out() {
        return;
    }
    Wires::with(|wires| {
        let mut kernel = Kernel::own();
        ip("route add prohibit 10.99.1.0/24");
        ip("route add prohibit fd00:10:99:1::/64");
        ip("route add blackhole 10.99.2.0/24");
        ip("route add blackhole fd00:10:99:2::/64");
        ip("route add unreachable 10.99.3.0/24");
        for f in FAMILIES {
            for network in [0, 1, 2, 3] {
                kernel.reset();
                kernel.node_port(30_080, at(f, [10, 99, network, 1]), 8080);
                let sent = tcp(client(f), node(f), 4000, 30_080, "S").between(THERE, OWN[0]);
                let (verdict, out) = kernel.run_on(FROM_NETWORK, wires.index(), 0, &sent.bytes());
                assert_eq!(kernel.translations(), 0);
                assert_eq!(kernel.last_event().unwrap().reason, REASON_NO_ROUTE);
                if network == 2 {
                    assert_eq!((verdict, out), (SHOT, sent.bytes()));
                    continue;
                }
                let (kind, code) = match (f, network) {
                    (Family::V4, 1) => (3, 13),
                    (Family::V4, _) => (3, 0),
                    (Family::V6, 1) => (1, 1),
                    (Family::V6, _) => (1, 0),
                };
                let quoted = [&[0; 4], &sent.bytes()[14..]].concat();
                let mut answer = icmp(node(f), client(f), kind, code, &quoted);
                (answer.class, answer.label) = (0xc0, 0);
                let answer = answer.between(OWN[0], THERE);
                assert_eq!((verdict, out), (REDIRECT, answer.bytes()), "{network}");
            }
        }
    });
}

#[test]
fn what_does_not_fit_is_answered_with_what_would() {
    if left_out() {
        return;
    }
    Wires::with(|wires| {
        let mut kernel = Kernel::own();
        ip("link set wire1 mtu 1400");
        for f in FAMILIES {
            kernel.node_port(30_080, at(f, [10, 244, 2, 5]), 8080);
            let least = tcp(client(f), node(f), 4000, 30_080, "S")
                .with(b"")
                .bytes()
                .len()
                - 14;
            for (length, verdict) in [(1400, REDIRECT), (1401, REDIRECT)] {
                let sent = tcp(client(f), node(f), 4000, 30_080, "S")
                    .with(vec![7; length - least])
                    .between(THERE, OWN[0]);
                let (found, out) = kernel.run_on(FROM_NETWORK, wires.index(), 0, &sent.bytes());
                assert_eq!(found, verdict);
                if length == 1400 {
                    assert_eq!(out.len(), 14 + 1400);
                    kernel.forget(&sent);
                    continue;
                }
                // The error tells of 1400 bytes.
                assert_eq!(out, refused(&sent, f, Why::TooBig));
                assert_eq!(kernel.flow(&sent), None);
                assert_eq!(kernel.last_event().unwrap().reason, REASON_TOO_BIG);
            }
        }
    });
}

/// As many as it saved up, and then no more for a while; TCP's resets are no errors.
#[test]
fn errors_have_a_limit() {
    if left_out() {
        return;
    }
    for f in FAMILIES {
        let mut kernel = Kernel::shared();
        kernel.no_backends(30_080);
        let limit = |errors| Settings {
            errors,
            ..settings(61_000, 4_536)
        };
        let sent = udp(client(f), node(f), 4000, 30_080).between(THERE, HERE);
        // One at once, and another after 50 ms.
        kernel.settings(limit(20));
        std::thread::sleep(std::time::Duration::from_millis(100));
        let mut told = 0;
        for _ in 0..100 {
            told += u32::from(kernel.run(FROM_NETWORK, &sent.bytes()).0 == REDIRECT);
        }
        // Programs run on whatever CPU the test is on.
        assert!((1..=20).contains(&told), "{told}");
        let syn = tcp(client(f), node(f), 4000, 30_080, "S").between(THERE, HERE);
        assert_eq!(kernel.run(FROM_NETWORK, &syn.bytes()).0, REDIRECT);
        kernel.settings(limit(0));
        for _ in 0..100 {
            assert_eq!(kernel.run(FROM_NETWORK, &sent.bytes()).0, REDIRECT);
        }
    }
}

/// A Service whose backend is outside of the cluster: the backend sees the node, and the pod the Service.
#[test]
fn a_pod_asks_for_a_backend_outside() {
    if left_out() {
        return;
    }
    for f in FAMILIES {
        let outside = at(f, [203, 0, 113, 77]);
        for sent in [
            tcp(pod(f), service(f), 4000, 80, "S"),
            udp(pod(f), service(f), 4000, 80),
        ] {
            let mut kernel = Kernel::shared();
            kernel.open(service(f), 80, 0, Some((outside, 8080)));
            let (verdict, out) = kernel.run(FROM_POD, &sent.bytes());
            let port = source_port(&out);
            assert!(port >= 61_000);
            let there = sent.from(node(f), port).to(outside, 8080);
            assert_eq!((verdict, &out), (REDIRECT, &there.hop().bytes()));
            // Where it leaves it stays what it is.
            assert_eq!(kernel.run("xebec_to_network", &out), (OK, out));
            // So does what goes on.
            let more = sent.flags_if_tcp(ACK);
            assert_eq!(
                kernel.run(FROM_POD, &more.bytes()),
                (REDIRECT, there.flags_if_tcp(ACK).hop().bytes())
            );
            // The answer is the Service's, by the first hook, and the pod's own lets it in.
            kernel.isolate_pod();
            let answer = there.answer();
            let back = answer.from(service(f), 80).to(pod(f), 4000);
            assert_eq!(
                kernel.run(FROM_NETWORK, &answer.bytes()),
                (OK, back.bytes())
            );
            assert_eq!(
                kernel.run("xebec_to_pod", &back.bytes()),
                (OK, back.bytes())
            );
            // Errors of a router on the way, too.
            let found = error(router(f), node(f), Why::TooBig, &there, 500);
            let expected = error(service(f), pod(f), Why::TooBig, &sent, 500).bytes();
            let (verdict, out) = kernel.run(FROM_NETWORK, &found.bytes());
            assert_eq!((verdict, &out), (OK, &expected));
            assert_eq!(kernel.run("xebec_to_pod", &out), (OK, out));
            // On its last hop the pod is told.
            let mut last = sent.between(THERE, HERE);
            last.ttl = 1;
            let answer = told_by(node(f), &last, Why::TimeExceeded).between(HERE, POD_MAC);
            assert_eq!(
                kernel.run(FROM_POD, &last.bytes()),
                (REDIRECT, answer.bytes())
            );
        }
    }
}

/// Errors that quote extension headers, and options, are about the flow behind them.
#[test]
fn errors_quote_extension_headers() {
    if left_out() {
        return;
    }
    for f in FAMILIES {
        let mut kernel = Kernel::shared();
        kernel.node_port(30_080, web(f), 8080);
        for (port, sent) in [
            (4000, udp(client(f), node(f), 4000, 30_080)),
            (4001, tcp(client(f), node(f), 4001, 30_080, "S")),
        ] {
            let mut sent = sent.with_options();
            for whole in [true, false] {
                if !whole {
                    sent.fragment(9, 0, true);
                }
                let seen = sent.to(web(f), 8080);
                assert_eq!(
                    kernel.run(FROM_NETWORK, &sent.bytes()),
                    (OK, seen.bytes()),
                    "{port}"
                );
                for length in [500, seen.transport_at() - 14 + 8] {
                    let found = error(web(f), client(f), Why::NoPort, &seen, length);
                    let expected = error(node(f), client(f), Why::NoPort, &sent, length);
                    assert_eq!(
                        kernel.run("xebec_to_network", &found.bytes()),
                        (OK, expected.bytes()),
                        "{whole}"
                    );
                }
            }
            // A later fragment tells of no ports: nobody can say whose it was.
            let mut later = sent.to(web(f), 8080);
            later.fragment(9, 64, false);
            let found = error(web(f), client(f), Why::NoPort, &later, 500).bytes();
            assert_eq!(kernel.run("xebec_to_network", &found), (OK, found.clone()));
        }
    }
}
