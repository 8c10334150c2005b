//! SCTP through Services and to the outside: ports change, and its checksum of everything fits afterwards.

use xebec_dataplane_common::flow::REASON_CHECKSUM;

use super::kernel::Shared;
use super::packet::{ABORT, DATA, INIT, INIT_ACK, SHUTDOWN_COMPLETE};
use super::{
    FAMILIES, Family, Kernel, OK, PASS, POD_MAC, Packet, REDIRECT, SHOT, client, left_out, node,
    pod, sctp, service, source_port, web,
};

/// A ClusterIP and a node port, with the web pod's ports behind them.
fn served(f: Family) -> Shared {
    let mut kernel = Kernel::shared();
    kernel.open(service(f), 80, 0, Some((web(f), 8080)));
    kernel.node_port(30_080, web(f), 9090);
    kernel
}

#[test]
fn services_with_other_ports_serve_it() {
    if left_out() {
        return;
    }
    for f in FAMILIES {
        let mut kernel = served(f);
        // Chunks of all lengths that count: none, odd ones, and all that a frame takes.
        for (index, length) in [0, 1, 4, 16, 255, 256, 1000, 1444].into_iter().enumerate() {
            let data: Vec<u8> = (0..length).map(|byte| (byte * 7 % 251) as u8).collect();
            let port = 4000 + index as u16;
            for options in [false, true] {
                // Where headers leave no room, there are no options.
                if options && length > 1400 {
                    continue;
                }
                let made = |packet: Packet| match options {
                    true => packet.with(data.clone()).with_options(),
                    false => packet.with(data.clone()),
                };
                let sent = made(sctp(pod(f), service(f), port, 80, INIT));
                let expected = sent.to(web(f), 8080).handed_over(POD_MAC);
                assert_eq!(
                    kernel.run("xebec_from_pod", &sent.bytes()),
                    (REDIRECT, expected.bytes()),
                    "{sent:?}"
                );
                let sent = made(sctp(client(f), node(f), port, 30_080, INIT));
                let expected = sent.to(web(f), 9090);
                let answer = made(sctp(web(f), client(f), 9090, port, INIT_ACK));
                let back = answer.from(node(f), 30_080);
                if index % 2 == 0 || options {
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
        }
    }
}

#[test]
fn what_is_behind_the_packet_and_wrong_checksums_stay() {
    if left_out() {
        return;
    }
    for f in FAMILIES {
        let mut kernel = served(f);
        let begun = sctp(client(f), node(f), 4000, 30_080, INIT);
        assert_eq!(kernel.run("xebec_from_network", &begun.bytes()).0, OK);
        // What fills a short frame up is no part of the packet.
        let packet = sctp(client(f), node(f), 4000, 30_080, DATA).with(b"");
        let (mut sent, mut expected) = (packet.bytes(), packet.to(web(f), 9090).bytes());
        sent.extend([0x55; 10]);
        expected.extend([0x55; 10]);
        assert_eq!(kernel.run("xebec_from_network", &sent), (OK, expected));
        // A wrong checksum stays as wrong as it was, and none stays none.
        let mut sent = packet.with(b"four");
        let mut expected = sent.to(web(f), 9090);
        sent.crc = Some(sent.crc() ^ 0x1000);
        expected.crc = Some(expected.crc() ^ 0x1000);
        assert_eq!(
            kernel.run("xebec_from_network", &sent.bytes()),
            (OK, expected.bytes())
        );
        (sent.crc, expected.crc) = (Some(0), Some(0));
        assert_eq!(
            kernel.run("xebec_from_network", &sent.bytes()),
            (OK, expected.bytes())
        );
    }
}

#[test]
fn to_the_outside_its_port_changes() {
    if left_out() {
        return;
    }
    for f in FAMILIES {
        let mut kernel = Kernel::shared();
        let sent = sctp(pod(f), client(f), 4000, 80, INIT).with(b"some tags");
        let (verdict, out) = kernel.run("xebec_to_network", &sent.bytes());
        let port = source_port(&out);
        assert!(port >= 61_000, "{port}");
        let expected = sent.from(node(f), port);
        assert_eq!((verdict, out), (OK, expected.bytes()));
        let answer = sctp(client(f), node(f), 80, port, INIT_ACK).with(b"others");
        assert_eq!(
            kernel.run("xebec_from_network", &answer.bytes()),
            (OK, answer.to(pod(f), 4000).bytes())
        );
    }
}

/// The first fragment does not tell how long the whole is, so its checksum can't be mended.
#[test]
fn a_fragment_whose_port_would_change_is_dropped() {
    if left_out() {
        return;
    }
    for f in FAMILIES {
        let mut kernel = served(f);
        kernel.open(service(f), 81, 0, Some((web(f), 81)));
        for (port, verdict) in [(80, SHOT), (81, REDIRECT)] {
            let mut sent = sctp(pod(f), service(f), 4000, port, INIT);
            sent.fragment(7, 0, true);
            assert_eq!(kernel.run("xebec_from_pod", &sent.bytes()).0, verdict);
            let reason = if port == 80 { REASON_CHECKSUM } else { 0 };
            assert_eq!(kernel.last_event().unwrap().reason, reason);
        }
    }
}

#[test]
fn associations_begin_and_end() {
    if left_out() {
        return;
    }
    for f in FAMILIES {
        for end in [ABORT, SHUTDOWN_COMPLETE] {
            let mut kernel = Kernel::shared();
            kernel.node_port(30_080, web(f), 9090);
            let sent = |chunk| sctp(client(f), node(f), 4000, 30_080, chunk);
            let seen = |by, chunk| (OK, sent(chunk).to(by, 9090).bytes());
            // Nothing but INIT begins one.
            for chunk in [DATA, INIT_ACK, ABORT] {
                let frame = sent(chunk).bytes();
                assert_eq!(
                    kernel.run("xebec_from_network", &frame),
                    (OK, frame.clone())
                );
            }
            assert_eq!(kernel.translations(), 0);
            assert_eq!(
                kernel.run("xebec_from_network", &sent(INIT).bytes()),
                seen(web(f), INIT)
            );
            // Sent again, it goes where it went; other backends are others'.
            kernel.node_port(30_080, pod(f), 9090);
            assert_eq!(
                kernel.run("xebec_from_network", &sent(INIT).bytes()),
                seen(web(f), INIT)
            );
            let answer = sctp(web(f), client(f), 9090, 4000, INIT_ACK);
            let back = answer.from(node(f), 30_080).bytes();
            assert_eq!(kernel.run("xebec_to_network", &answer.bytes()), (OK, back));
            for chunk in [DATA, end] {
                assert_eq!(
                    kernel.run("xebec_from_network", &sent(chunk).bytes()),
                    seen(web(f), chunk)
                );
            }
            // Over, and the next is a new one.
            assert_eq!(
                kernel.run("xebec_from_network", &sent(INIT).bytes()),
                seen(pod(f), INIT)
            );
            assert_eq!(kernel.translations(), 2);
        }
    }
}
