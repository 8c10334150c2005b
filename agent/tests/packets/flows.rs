//! The two entries of a translated flow: one that is missing is made again, and flows between the same ends don't
//! bend one another.

use xebec_agent::maps::ServiceKernel;
use xebec_dataplane_common::flow::{SECOND, ticks};
use xebec_dataplane_common::service::{ON_THIS_NODE, OWN as OWN_ADDRESS};

use super::{
    ACK, FAMILIES, Family, Front, Kernel, OK, POD_MAC, Packet, REDIRECT, SHOT, client, echo, far,
    left_out, node, pod, service, source_port, tcp, udp, web,
};

fn service_at(kernel: &mut Kernel, f: Family, backend: std::net::IpAddr) {
    kernel.backend(1, backend, 8080, ON_THIS_NODE, 1);
    let front = Front {
        service: 1,
        inside: vec![1],
        ..Front::default()
    };
    kernel.service(service(f), 80, &front);
}

/// A full table may forget either entry: the other makes it again within a second or so.
#[test]
fn an_entry_that_was_forgotten_is_made_again() {
    if left_out() {
        return;
    }
    for f in FAMILIES {
        for sent in [
            tcp(pod(f), service(f), 4000, 80, "S"),
            udp(pod(f), service(f), 4000, 80),
        ] {
            let mut kernel = Kernel::shared();
            kernel.received_on(1);
            service_at(&mut kernel, f, far(f));
            let seen = sent.to(far(f), 8080);
            let (answer, more) = (seen.back(ACK), sent.flags_if_tcp(ACK));
            let (back, seen_more) = (answer.from(service(f), 80), more.to(far(f), 8080));
            assert_eq!(
                kernel.run("xebec_from_pod", &sent.bytes()),
                (OK, seen.bytes())
            );
            assert_eq!(
                kernel.run("xebec_to_pod", &answer.bytes()),
                (OK, back.bytes())
            );
            let (forth, reply) = (kernel.flow(&sent).unwrap(), kernel.flow(&seen).unwrap());
            // The answers' entry goes; the beginner's next packet of another second makes it again.
            kernel.forget(&seen);
            kernel.change(&sent, |flow| flow.paired = 0);
            assert_eq!(
                kernel.run("xebec_from_pod", &more.bytes()),
                (OK, seen_more.bytes())
            );
            let made = kernel.flow(&seen).unwrap();
            assert_eq!(
                (made.to, made.turn, made.other, made.from_low, made.backend),
                (
                    reply.to,
                    reply.turn,
                    reply.other,
                    reply.from_low,
                    reply.backend
                )
            );
            assert_eq!(
                kernel.run("xebec_to_pod", &answer.bytes()),
                (OK, back.bytes())
            );
            // The same the other way round.
            kernel.forget(&sent);
            kernel.change(&seen, |flow| flow.paired = 0);
            assert_eq!(
                kernel.run("xebec_to_pod", &answer.bytes()),
                (OK, back.bytes())
            );
            let made = kernel.flow(&sent).unwrap();
            assert_eq!(
                (made.to, made.turn, made.other, made.from_low, made.backend),
                (
                    forth.to,
                    forth.turn,
                    forth.other,
                    forth.from_low,
                    forth.backend
                )
            );
            assert_eq!(
                kernel.run("xebec_from_pod", &more.bytes()),
                (OK, seen_more.bytes())
            );
            // Without either it begins anew, if it can.
            kernel.forget(&sent);
            kernel.forget(&seen);
            assert_eq!(
                kernel.run("xebec_from_pod", &sent.bytes()),
                (OK, seen.bytes())
            );
        }
    }
}

/// Each pod's hook tells of the first answer, also of a flow that is translated on its way out.
#[test]
fn the_first_answer_to_a_pod_is_told_of() {
    if left_out() {
        return;
    }
    for f in FAMILIES {
        for sent in [
            udp(pod(f), client(f), 4000, 53),
            tcp(pod(f), client(f), 4000, 80, "S"),
        ] {
            let mut kernel = Kernel::shared();
            kernel.received_on(1);
            assert_eq!(kernel.run("xebec_from_pod", &sent.bytes()).0, OK);
            let out = kernel.run("xebec_to_network", &sent.bytes()).1;
            let seen = sent.from(node(f), source_port(&out));
            for flags in [super::SYN | ACK, super::FIN | ACK] {
                while kernel.event().is_some() {}
                let (answer, back) = (seen.back(flags), sent.back(flags));
                let translated = kernel.run("xebec_from_network", &answer.bytes());
                assert_eq!(translated, (OK, back.bytes()));
                assert_eq!(kernel.run("xebec_to_pod", &back.bytes()).0, OK);
                if flags & super::SYN != 0 || sent.protocol() == 6 {
                    let event = kernel.event().unwrap_or_else(|| panic!("{sent:?} {flags}"));
                    assert_eq!((event.reply, event.tcp_flags & flags), (1, event.tcp_flags));
                }
            }
        }
    }
}

/// A pod's packets to the outside keep their port as long as one entry is left.
#[test]
fn a_masquerade_that_was_forgotten_is_made_again() {
    if left_out() {
        return;
    }
    for f in FAMILIES {
        for sent in [
            tcp(pod(f), client(f), 4000, 80, "S"),
            udp(pod(f), client(f), 4000, 80),
            echo(pod(f), client(f), 0x1234),
        ] {
            let mut kernel = Kernel::shared();
            let (verdict, out) = kernel.run("xebec_to_network", &sent.bytes());
            let mut seen = sent.from(node(f), sent.source_port);
            seen.set_source_port(source_port(&out));
            assert_eq!((verdict, &out), (OK, &seen.bytes()));
            let answer = seen.answer();
            let back = sent.answer();
            kernel.forget(&seen);
            kernel.change(&sent, |flow| flow.paired = 0);
            assert_eq!(
                kernel.run("xebec_to_network", &sent.bytes()),
                (OK, out.clone())
            );
            assert_eq!(
                kernel.run("xebec_from_network", &answer.bytes()),
                (OK, back.bytes())
            );
            kernel.forget(&sent);
            kernel.change(&seen, |flow| flow.paired = 0);
            assert_eq!(
                kernel.run("xebec_from_network", &answer.bytes()),
                (OK, back.bytes())
            );
            assert_eq!(
                kernel.run("xebec_to_network", &sent.bytes()),
                (OK, out.clone())
            );
            // The answers' entry is another's by now: the flow begins anew, with a port of its own.
            kernel.change(&seen, |flow| flow.to.destination_port ^= 1);
            kernel.change(&sent, |flow| flow.paired = 0);
            let again = kernel.run("xebec_to_network", &sent.bytes()).1;
            assert_ne!(source_port(&again), source_port(&out));
        }
    }
}

/// One who talks to a backend by its own address and through the Service, from the same port: whichever came first, the
/// datagrams that bear the ends by themselves have the place, the others get another port, and both are answered by
/// whom they asked.
#[test]
fn a_direct_flow_is_not_bent_by_one_through_the_service() {
    if left_out() {
        return;
    }
    for (f, translated_first) in FAMILIES.into_iter().flat_map(|f| [(f, false), (f, true)]) {
        let mut kernel = Kernel::shared();
        service_at(&mut kernel, f, web(f));
        let direct = udp(pod(f), web(f), 4000, 8080);
        let through = udp(pod(f), service(f), 4000, 80);
        let seen = direct.handed_over(POD_MAC);
        if translated_first {
            let out = kernel.run("xebec_from_pod", &through.bytes());
            assert_eq!(out, (REDIRECT, seen.bytes()));
        }
        let out = kernel.run("xebec_from_pod", &direct.bytes());
        assert_eq!(out, (REDIRECT, seen.bytes()));
        let ask = |kernel: &mut Kernel| {
            let (verdict, out) = kernel.run("xebec_from_pod", &through.bytes());
            let mut expected = seen.clone();
            expected.source_port = source_port(&out);
            assert_eq!((verdict, out), (REDIRECT, expected.bytes()));
            expected.source_port
        };
        let port = ask(&mut kernel);
        assert!(port >= 61_000);
        assert_eq!(ask(&mut kernel), port);
        kernel.as_web();
        let answer = direct.answer();
        let back = answer.handed_over(POD_MAC);
        assert_eq!(
            kernel.run("xebec_from_pod", &answer.bytes()),
            (REDIRECT, back.bytes())
        );
        assert_eq!(
            kernel.run("xebec_from_pod", &answer.to(pod(f), port).bytes()),
            (REDIRECT, back.from(service(f), 80).bytes())
        );
    }
}

/// The same of one outside, which asks a backend of this node by itself and by a node port: another node that
/// masquerades does, when its ports come round.
#[test]
fn a_direct_flow_from_the_network_is_not_bent_by_one_through_a_node_port() {
    if left_out() {
        return;
    }
    for (f, translated_first) in FAMILIES.into_iter().flat_map(|f| [(f, false), (f, true)]) {
        let mut kernel = Kernel::shared();
        kernel.node_port(30_080, web(f), 8080);
        let direct = udp(client(f), web(f), 4000, 8080);
        let through = udp(client(f), node(f), 4000, 30_080);
        let ask = |kernel: &mut Kernel, sent: &Packet| {
            let (verdict, out) = kernel.run("xebec_from_network", &sent.bytes());
            let mut expected = direct.clone();
            expected.source_port = source_port(&out);
            assert_eq!((verdict, &out), (OK, &expected.bytes()));
            // The stack brings it to the pod.
            kernel.as_web();
            assert_eq!(kernel.run("xebec_to_pod", &out), (OK, out));
            kernel.as_pod();
            expected.source_port
        };
        kernel.received_on(1);
        if translated_first {
            assert_eq!(ask(&mut kernel, &through), 4000);
        }
        assert_eq!(ask(&mut kernel, &direct), 4000);
        let port = ask(&mut kernel, &through);
        assert!(port >= 61_000);
        assert_eq!(ask(&mut kernel, &through), port);
        assert_eq!(ask(&mut kernel, &direct), 4000);
        for (port, answers) in [(4000, 8080), (port, 30_080)] {
            let answer = direct.answer().to(client(f), port);
            let (_, out) = kernel.run("xebec_to_network", &answer.bytes());
            assert_eq!(source_port(&out), answers, "to port {port}");
        }
    }
}

/// Node ports at the loopback address are for sockets of the node alone.
#[test]
fn loopback_is_nobodys_on_a_wire() {
    if left_out() {
        return;
    }
    let f = Family::V4;
    let mut kernel = Kernel::shared();
    kernel.node_port(30_080, web(f), 8080);
    let loopback: std::net::IpAddr = [127, 0, 0, 1].into();
    let services = &mut kernel.maps().services;
    services.set_node_address(loopback, OWN_ADDRESS).unwrap();
    for sent in [
        udp(client(f), loopback, 4000, 30_080),
        tcp(client(f), loopback, 4000, 30_080, "S"),
    ] {
        let sent = sent.bytes();
        assert_eq!(kernel.run("xebec_from_network", &sent), (OK, sent.clone()));
        assert_eq!(kernel.run_early(0, &sent), (super::PASS, sent.clone()));
    }
    let sent = udp(pod(f), loopback, 4000, 30_080);
    let (_, out) = kernel.run("xebec_from_pod", &sent.bytes());
    assert_eq!(out, sent.bytes());
    assert_eq!(kernel.translations(), 0);
}

/// Translated first: as long as it lives there is no other flow between its ends; when it has ended there is.
#[test]
fn a_direct_connection_follows_one_through_the_service() {
    if left_out() {
        return;
    }
    for f in FAMILIES {
        let mut kernel = Kernel::shared();
        service_at(&mut kernel, f, web(f));
        let through = tcp(pod(f), service(f), 4000, 80, "S");
        let direct = tcp(pod(f), web(f), 4000, 8080, "S");
        for sent in [&through, &through.flags(super::FIN | ACK)] {
            assert_eq!(kernel.run("xebec_from_pod", &sent.bytes()).0, REDIRECT);
        }
        let seen = direct.handed_over(POD_MAC);
        assert_eq!(
            kernel.run("xebec_from_pod", &direct.bytes()),
            (REDIRECT, seen.bytes())
        );
        kernel.as_web();
        let answer = direct.answer();
        let back = answer.handed_over(POD_MAC);
        assert_eq!(
            kernel.run("xebec_from_pod", &answer.bytes()),
            (REDIRECT, back.bytes())
        );
    }
}

/// The only port is free again when the flow that had it was silent for long enough, or ended and that is long ago.
#[test]
fn a_port_is_free_again_after_its_flow() {
    if left_out() {
        return;
    }
    for f in FAMILIES {
        for (first, seconds_held, seconds_free) in [
            (udp(pod(f), client(f), 4000, 53), 3, 7),
            (
                tcp(pod(f), client(f), 4000, 80, "S"),
                6 * 3_500,
                6 * 3_600 + 3,
            ),
            (tcp(pod(f), client(f), 4000, 80, "FA"), 100, 124),
        ] {
            let mut kernel = Kernel::shared();
            kernel.settings(super::settings(61_000, 1));
            let mut seen = first.from(node(f), 61_000);
            seen.ttl = 64;
            assert_eq!(
                kernel.run("xebec_to_network", &first.bytes()),
                (OK, seen.bytes())
            );
            // The end is told to both entries with the next packet.
            assert_eq!(
                kernel.run("xebec_to_network", &first.bytes()),
                (OK, seen.bytes())
            );
            let second = first.from(web(f), 4001).flags_if_tcp(super::SYN);
            let rewind = |kernel: &Kernel, seconds: u64| {
                let ago = ticks(seconds * SECOND);
                for packet in [&first, &seen] {
                    kernel.change(packet, |flow| flow.seen = flow.paired.wrapping_sub(ago));
                    // One that was never answered goes sooner.
                    kernel.change(packet, |flow| flow.told[1] = 1);
                }
            };
            rewind(&kernel, seconds_held);
            let refused = kernel.run("xebec_to_network", &second.bytes());
            assert_eq!(refused, (SHOT, second.bytes()), "{first:?}");
            rewind(&kernel, seconds_free);
            let expected = second.from(node(f), 61_000);
            let entered = kernel.run("xebec_to_network", &second.bytes());
            assert_eq!(entered, (OK, expected.bytes()), "{first:?}");
            assert_eq!(kernel.translations(), 2, "nothing of the old one is left");
        }
    }
}

/// Who talks to a Service again after a long silence gets a backend anew.
#[test]
fn a_silent_flow_is_forgotten() {
    if left_out() {
        return;
    }
    for f in FAMILIES {
        let mut kernel = Kernel::shared();
        service_at(&mut kernel, f, far(f));
        let sent = udp(pod(f), service(f), 4000, 80);
        let seen = sent.to(far(f), 8080);
        assert_eq!(
            kernel.run("xebec_from_pod", &sent.bytes()),
            (OK, seen.bytes())
        );
        service_at_second(&mut kernel, f);
        for (seconds, backend) in [(50, far(f)), (63, web(f))] {
            for packet in [&sent, &seen] {
                let ago = ticks(seconds * SECOND);
                kernel.change(packet, |flow| flow.seen = flow.paired.wrapping_sub(ago));
                kernel.change(packet, |flow| flow.paired = flow.seen);
            }
            let expected = sent.to(backend, 8080);
            let expected = match backend == web(f) {
                true => expected.handed_over(POD_MAC),
                false => expected,
            };
            assert_eq!(
                kernel.run("xebec_from_pod", &sent.bytes()).1,
                expected.bytes(),
                "{seconds}"
            );
        }
    }
}

/// The Service's only backend is another by now, and the one before is still there.
fn service_at_second(kernel: &mut Kernel, f: Family) {
    kernel.backend(2, web(f), 8080, ON_THIS_NODE, 1);
    let front = Front {
        service: 1,
        inside: vec![2],
        ..Front::default()
    };
    kernel.service(service(f), 80, &front);
}
