//! Packets through the real tc programs, by `BPF_PROG_TEST_RUN`: every byte of what comes out is judged.
#![allow(clippy::unwrap_used, reason = "tests")]

mod model;
mod packets;

use packets::{
    ACK, FAMILIES, Family, Kernel, OK, POD_MAC, REDIRECT, SHOT, SYN, Why, at, client, echo, error,
    far, node, pod, tcp, udp, web,
};
use xebec_dataplane_common::flow::{
    DROPPED, EGRESS, FORWARDED, INGRESS, REASON_INVALID, REASON_NO_MAPPING, REASON_POLICY,
    REASON_SOURCE,
};
use xebec_policy::kernel::PolicyKernel;

/// From one pod of the node to another, to which it is handed directly.
#[test]
fn between_pods_a_packet_is_routed_by_the_program() {
    if packets::left_out() {
        return;
    }
    for f in FAMILIES {
        let mut kernel = Kernel::shared();
        let sent = tcp(pod(f), web(f), 4000, 80, "S");
        let (verdict, out) = kernel.run("xebec_from_pod", &sent.bytes());
        assert_eq!(verdict, REDIRECT);
        let mut expected = sent.clone();
        expected.mac_source = sent.mac_destination;
        expected.mac_destination = POD_MAC;
        expected.ttl -= 1;
        assert_eq!(out, expected.bytes());
        let event = kernel.event().unwrap();
        assert_eq!(
            (event.verdict, event.source, event.destination),
            (FORWARDED, pod(f).into(), web(f).into())
        );
        // A packet on its last hop goes to the stack, which answers for it.
        let mut last = tcp(pod(f), web(f), 4001, 80, "S");
        last.ttl = 1;
        assert_eq!(
            kernel.run("xebec_from_pod", &last.bytes()),
            (OK, last.bytes())
        );
    }
}

#[test]
fn a_pod_speaks_for_itself_alone() {
    if packets::left_out() {
        return;
    }
    for f in FAMILIES {
        let mut kernel = Kernel::shared();
        for forged in [node(f), web(f), client(f), at(f, [10, 244, 0, 99])] {
            let sent = tcp(forged, at(f, [203, 0, 113, 1]), 4000, 80, "S");
            let verdict = kernel.run("xebec_from_pod", &sent.bytes()).0;
            // The web pod is an endpoint as well, but not of this device.
            assert_eq!(verdict, SHOT, "{forged}");
            let event = kernel.event().unwrap();
            assert_eq!(
                (event.verdict, event.reason),
                (DROPPED, REASON_SOURCE),
                "{forged}"
            );
        }
        // What says that it is of the other family goes nowhere, nor does what is no IP; ARP is the stack's.
        let mut other = tcp(pod(f), web(f), 4000, 80, "S").bytes();
        for ethertype in [
            if f == Family::V4 { 0x86dd } else { 0x0800 },
            0x8100,
            0x88cc_u16,
        ] {
            other[12..14].copy_from_slice(&ethertype.to_be_bytes());
            assert_eq!(kernel.run("xebec_from_pod", &other), (SHOT, other.clone()));
        }
        other[12..14].copy_from_slice(&0x0806_u16.to_be_bytes());
        assert_eq!(kernel.run("xebec_from_pod", &other).0, OK);
    }
}

#[test]
fn rules_judge_what_begins_and_answers_come_back() {
    if packets::left_out() {
        return;
    }
    for f in FAMILIES {
        let mut kernel = Kernel::shared();
        kernel.isolate_web(80);
        let refused = tcp(pod(f), web(f), 4000, 81, "S");
        assert_eq!(
            kernel.run("xebec_from_pod", &refused.bytes()),
            (SHOT, refused.bytes())
        );
        let event = kernel.event().unwrap();
        assert_eq!(
            (event.verdict, event.reason, event.direction, event.set),
            (DROPPED, REASON_POLICY, INGRESS, 7)
        );
        let allowed = tcp(pod(f), web(f), 4000, 80, "S");
        assert_eq!(kernel.run("xebec_from_pod", &allowed.bytes()).0, REDIRECT);
        let event = kernel.event().unwrap();
        assert_eq!((event.verdict, event.rule), (FORWARDED, 42));
        // The web pod may send nothing of its own, but answers.
        kernel.isolate_web_egress();
        kernel.as_web();
        let answer = tcp(web(f), pod(f), 80, 4000, "SA");
        assert_eq!(kernel.run("xebec_from_pod", &answer.bytes()).0, REDIRECT);
        let own = tcp(web(f), pod(f), 5000, 80, "S");
        assert_eq!(kernel.run("xebec_from_pod", &own.bytes()).0, SHOT);
        assert_eq!(kernel.last_event().unwrap().direction, EGRESS);
    }
}

#[test]
fn a_new_generation_of_rules_judges_flows_that_go_on() {
    if packets::left_out() {
        return;
    }
    for f in FAMILIES {
        let mut kernel = Kernel::shared();
        kernel.isolate_web(80);
        kernel.run(
            "xebec_from_pod",
            &tcp(pod(f), web(f), 4000, 80, "S").bytes(),
        );
        let more = tcp(pod(f), web(f), 4000, 80, "A");
        assert_eq!(kernel.run("xebec_from_pod", &more.bytes()).0, REDIRECT);
        kernel.isolate_web(443);
        assert_eq!(
            kernel.run("xebec_from_pod", &more.bytes()).0,
            REDIRECT,
            "the same generation"
        );
        kernel.policy().set_generation(99).unwrap();
        assert_eq!(kernel.run("xebec_from_pod", &more.bytes()).0, SHOT);
        // What never began is not let in by its flags.
        let stray = tcp(pod(f), web(f), 4009, 80, "A");
        assert_eq!(kernel.run("xebec_from_pod", &stray.bytes()).0, SHOT);
    }
}

#[test]
fn what_enters_a_pod_from_elsewhere_is_judged_and_the_nodes_own_is_let_in() {
    if packets::left_out() {
        return;
    }
    for f in FAMILIES {
        let mut kernel = Kernel::shared();
        kernel.isolate_web(80);
        kernel.as_web();
        kernel.received_on(1);
        for (packet, verdict) in [
            (tcp(client(f), web(f), 4000, 81, "S"), SHOT),
            (tcp(pod(f), web(f), 4000, 80, "S"), OK),
            (udp(pod(f), web(f), 4000, 80), SHOT),
            // Not for this pod: misrouted.
            (tcp(client(f), pod(f), 4000, 80, "S"), SHOT),
        ] {
            let sent = packet.bytes();
            assert_eq!(
                kernel.run("xebec_to_pod", &sent),
                (verdict, sent),
                "{packet:?}"
            );
        }
        assert_eq!(kernel.last_event().unwrap().reason, REASON_INVALID);
        // A process of the node: it came in by no device.
        kernel.received_on(0);
        let probe = tcp(node(f), web(f), 4000, 81, "S");
        assert_eq!(
            kernel.run("xebec_to_pod", &probe.bytes()),
            (OK, probe.bytes())
        );
    }
}

#[test]
fn what_the_node_began_goes_on_whatever_its_address_and_the_rules_are() {
    if packets::left_out() {
        return;
    }
    for f in FAMILIES {
        let mut kernel = Kernel::shared();
        kernel.isolate_web(80);
        kernel.as_web();
        // The API tells of no node with this address.
        for begun in [
            tcp(client(f), web(f), 4000, 81, "S"),
            udp(client(f), web(f), 4000, 81),
        ] {
            kernel.received_on(0);
            let sent = begun.bytes();
            assert_eq!(kernel.run("xebec_to_pod", &sent), (OK, sent));
            let answer = begun.back(SYN | ACK).bytes();
            assert_ne!(kernel.run("xebec_from_pod", &answer).0, SHOT);
            kernel.policy().set_generation(99).unwrap();
            let more = begun.back(ACK).bytes();
            assert_ne!(kernel.run("xebec_from_pod", &more).0, SHOT);
            kernel.policy().set_generation(1).unwrap();
            // The same from elsewhere is judged, and so is what answers it.
            kernel.received_on(1);
            if begun.protocol() == 17 {
                kernel.isolate_web_udp(81);
            } else {
                kernel.isolate_web(81);
            }
            let other = begun.from(client(f), 4001);
            assert_eq!(kernel.run("xebec_to_pod", &other.bytes()).0, OK);
            kernel.isolate_web(80);
            kernel.policy().set_generation(98).unwrap();
            let answer = other.back(ACK).bytes();
            assert_eq!(kernel.run("xebec_from_pod", &answer).0, SHOT);
        }
        // An agent of before did not note it: then the node's address tells.
        let begun = tcp(node(f), web(f), 4002, 81, "S");
        kernel.received_on(0);
        assert_eq!(kernel.run("xebec_to_pod", &begun.bytes()).0, OK);
        kernel.change(&begun, |flow| flow.exempt = 0);
        kernel.policy().set_generation(97).unwrap();
        let answer = begun.back(ACK).bytes();
        assert_ne!(kernel.run("xebec_from_pod", &answer).0, SHOT);
    }
}

#[test]
fn errors_pass_with_the_flow_that_they_are_about() {
    if packets::left_out() {
        return;
    }
    for f in FAMILIES {
        let mut kernel = Kernel::shared();
        kernel.isolate_web(80);
        let sent = udp(pod(f), web(f), 4000, 80);
        let about = |about: &packets::Packet| error(web(f), pod(f), Why::NoPort, about, 500);
        kernel.isolate_pod();
        kernel.as_web();
        assert_eq!(
            kernel.run("xebec_from_pod", &about(&sent).bytes()).0,
            SHOT,
            "about no flow"
        );
        let begun = tcp(pod(f), web(f), 4000, 80, "S");
        kernel.open_pod();
        kernel.as_pod();
        assert_eq!(kernel.run("xebec_from_pod", &begun.bytes()).0, REDIRECT);
        kernel.isolate_pod();
        kernel.as_web();
        assert_eq!(
            kernel.run("xebec_from_pod", &about(&begun).bytes()).0,
            REDIRECT
        );
    }
}

/// Cut anywhere, or with a header that contradicts itself, a packet is dropped, and nothing is read beyond it.
#[test]
fn cut_and_contradictory_packets_are_dropped() {
    if packets::left_out() {
        return;
    }
    for f in FAMILIES {
        let mut kernel = Kernel::shared();
        for whole in [
            tcp(pod(f), web(f), 4000, 80, "S"),
            udp(pod(f), web(f), 4000, 80),
            error(
                pod(f),
                web(f),
                Why::NoPort,
                &udp(web(f), pod(f), 80, 4000),
                500,
            ),
        ] {
            let bytes = whole.bytes();
            let headers = whole.header_bytes();
            for length in 14 + whole.network_bytes()..headers {
                assert_eq!(
                    kernel.run("xebec_from_pod", &bytes[..length]),
                    (SHOT, bytes[..length].to_vec()),
                    "{whole:?} cut to {length}"
                );
            }
            for first in [
                0x05,
                0x35,
                0x40,
                0x44,
                if f == Family::V4 { 0x65 } else { 0x45 },
            ] {
                let mut odd = bytes.clone();
                odd[14] = first;
                assert_eq!(
                    kernel.run("xebec_from_pod", &odd).0,
                    SHOT,
                    "version and length {first:#x}"
                );
            }
        }
        assert!(kernel.dropped() > 40);
    }
}

#[test]
fn later_fragments_follow_the_first() {
    if packets::left_out() {
        return;
    }
    for f in FAMILIES {
        let mut kernel = Kernel::shared();
        kernel.isolate_web_udp(80);
        let (mut first, mut later) = (udp(pod(f), web(f), 4000, 80), udp(pod(f), web(f), 0, 0));
        first.fragment(7, 0, true);
        later.fragment(7, 64, false);
        assert_eq!(
            kernel.run("xebec_from_pod", &later.bytes()).0,
            SHOT,
            "before the first"
        );
        assert_eq!(kernel.run("xebec_from_pod", &first.bytes()).0, REDIRECT);
        assert_eq!(kernel.run("xebec_from_pod", &later.bytes()).0, REDIRECT);
        let mut other = later.clone();
        other.fragment(8, 64, false);
        assert_eq!(
            kernel.run("xebec_from_pod", &other.bytes()).0,
            SHOT,
            "of another datagram"
        );
    }
}

/// A client outside, a node port, and a backend on this node: the pod sees the client.
#[test]
fn node_port_to_a_pod_of_this_node() {
    if packets::left_out() {
        return;
    }
    for f in FAMILIES {
        for options in [false, true] {
            for make in [tcp, |from, to, a, b, _: &str| udp(from, to, a, b)] {
                let mut kernel = Kernel::shared();
                kernel.node_port(30_080, web(f), 8080);
                let mut sent = make(client(f), node(f), 4000, 30_080, "S");
                if options {
                    sent = sent.with_options();
                }
                let mut expected = sent.clone();
                (expected.destination, expected.destination_port) = (web(f), 8080);
                assert_eq!(
                    kernel.run("xebec_from_network", &sent.bytes()),
                    (OK, expected.bytes())
                );
                let mut answer = make(web(f), client(f), 8080, 4000, "SA");
                if options {
                    answer = answer.with_options();
                }
                let mut expected = answer.clone();
                (expected.source, expected.source_port) = (node(f), 30_080);
                assert_eq!(
                    kernel.run("xebec_to_network", &answer.bytes()),
                    (OK, expected.bytes())
                );
            }
        }
    }
}

/// A client that used a node port comes from the same port of its own to the backend itself: that is answered as itself.
#[test]
fn an_ended_node_port_connection_does_not_bend_a_direct_one() {
    if packets::left_out() {
        return;
    }
    for f in FAMILIES {
        let mut kernel = Kernel::shared();
        kernel.node_port(30_080, web(f), 8080);
        kernel.as_web();
        kernel.received_on(1);
        let begin = tcp(client(f), web(f), 4000, 8080, "S").bytes();
        let answer = tcp(web(f), client(f), 8080, 4000, "SA");
        let mut as_node_port = answer.clone();
        (as_node_port.source, as_node_port.source_port) = (node(f), 30_080);
        let through = tcp(client(f), node(f), 4000, 30_080, "S").bytes();
        assert_eq!(kernel.run("xebec_from_network", &through).0, OK);
        // As long as it lives, the pod can't have another between the same ends.
        assert_eq!(
            kernel.run("xebec_from_network", &begin),
            (OK, begin.clone())
        );
        let translated = (OK, as_node_port.bytes());
        assert_eq!(kernel.run("xebec_to_network", &answer.bytes()), translated);
        let end = tcp(client(f), node(f), 4000, 30_080, "FA").bytes();
        assert_eq!(kernel.run("xebec_from_network", &end).0, OK);
        assert_eq!(
            kernel.run("xebec_from_network", &begin),
            (OK, begin.clone())
        );
        assert_eq!(kernel.run("xebec_to_pod", &begin).0, OK);
        let itself = (OK, answer.bytes());
        assert_eq!(kernel.run("xebec_to_network", &answer.bytes()), itself);
    }
}

/// The backend is a pod on the host's network: it sees the client, and its answers bear the node port.
#[test]
fn node_port_to_this_nodes_own_network() {
    if packets::left_out() {
        return;
    }
    for f in FAMILIES {
        let mut kernel = Kernel::shared();
        kernel.node_port(30_080, node(f), 8080);
        for flags in ["S", "A"] {
            let sent = tcp(client(f), node(f), 4000, 30_080, flags);
            let mut expected = sent.clone();
            expected.destination_port = 8080;
            assert_eq!(
                kernel.run("xebec_from_network", &sent.bytes()),
                (OK, expected.bytes())
            );
            let answer = tcp(node(f), client(f), 8080, 4000, "SA");
            let mut expected = answer.clone();
            expected.source_port = 30_080;
            assert_eq!(
                kernel.run("xebec_to_network", &answer.bytes()),
                (OK, expected.bytes())
            );
        }
        let other = tcp(node(f), client(f), 8080, 4001, "SA").bytes();
        assert_eq!(kernel.run("xebec_to_network", &other), (OK, other.clone()));
    }
}

/// The backend is on another node: the packet goes on at once, in this node's name.
#[test]
fn node_port_to_a_pod_of_another_node() {
    if packets::left_out() {
        return;
    }
    for f in FAMILIES {
        let far = far(f);
        let mut kernel = Kernel::shared();
        kernel.node_port(30_080, far, 8080);
        let sent = tcp(client(f), node(f), 4000, 30_080, "S");
        let (verdict, out) = kernel.run("xebec_from_network", &sent.bytes());
        assert_eq!(verdict, REDIRECT);
        let port = packets::source_port(&out);
        assert!((61_000..=65_535).contains(&port), "{port}");
        let mut expected = sent.clone();
        (expected.source, expected.source_port) = (node(f), port);
        (expected.destination, expected.destination_port) = (far, 8080);
        expected.ttl -= 1;
        assert_eq!(out, expected.bytes());
        let answer = tcp(far, node(f), 8080, port, "SA");
        let mut expected = answer.clone();
        (expected.source, expected.source_port) = (node(f), 30_080);
        (expected.destination, expected.destination_port) = (client(f), 4000);
        expected.ttl -= 1;
        assert_eq!(
            kernel.run("xebec_from_network", &answer.bytes()),
            (REDIRECT, expected.bytes())
        );
        // What goes on keeps its port, also when the backend is gone; what begins anew does not.
        kernel.node_port(30_080, web(f), 8080);
        let more = tcp(client(f), node(f), 4000, 30_080, "A");
        let (verdict, out) = kernel.run("xebec_from_network", &more.bytes());
        assert_eq!((verdict, packets::source_port(&out)), (REDIRECT, port));
        let (verdict, out) = kernel.run("xebec_from_network", &sent.bytes());
        assert_eq!((verdict, packets::source_port(&out)), (OK, 4000));
    }
}

#[test]
fn what_is_not_translated_is_left_as_it_is() {
    if packets::left_out() {
        return;
    }
    for f in FAMILIES {
        let mut kernel = Kernel::shared();
        kernel.node_port(30_080, web(f), 8080);
        for packet in [
            tcp(client(f), node(f), 4000, 22, "S"),
            tcp(client(f), node(f), 4000, 30_080, "A"),
            tcp(client(f), web(f), 4000, 80, "S"),
            udp(client(f), at(f, [10, 96, 0, 1]), 4000, 443),
            echo(client(f), node(f), 1),
        ] {
            let sent = packet.bytes();
            assert_eq!(
                kernel.run("xebec_from_network", &sent),
                (OK, sent.clone()),
                "{packet:?}"
            );
        }
        for packet in [
            tcp(node(f), client(f), 4000, 80, "S"),
            // Other nodes and their pods know the way to ours.
            tcp(pod(f), at(f, [10, 244, 1, 5]), 4000, 80, "S"),
            tcp(pod(f), at(f, [192, 0, 2, 20]), 4000, 80, "S"),
        ] {
            let sent = packet.bytes();
            assert_eq!(
                kernel.run("xebec_to_network", &sent),
                (OK, sent.clone()),
                "{packet:?}"
            );
        }
        // What can't be judged is left to the stack; what lacks its checksum can't be translated.
        let whole = tcp(pod(f), client(f), 4000, 80, "S");
        let (at, headers) = (whole.transport_at(), 14 + whole.network_bytes());
        let whole = whole.bytes();
        for length in headers..at + 20 {
            let cut = &whole[..length];
            let (verdict, out) = kernel.run("xebec_to_network", cut);
            let expected = if (at + 14..at + 18).contains(&length) {
                SHOT
            } else {
                OK
            };
            assert_eq!(verdict, expected, "cut to {length}");
            // Cut behind the checksum it is as whole as it must be.
            assert!(length >= at + 18 || out == cut, "cut to {length}");
        }
    }
}

#[test]
fn pods_use_the_nodes_address_towards_the_outside() {
    if packets::left_out() {
        return;
    }
    for f in FAMILIES {
        let mut kernel = Kernel::shared();
        let mut without_checksum = udp(pod(f), client(f), 4000, 53);
        without_checksum.no_checksum = true;
        for sent in [
            tcp(pod(f), client(f), 4000, 80, "S"),
            udp(pod(f), client(f), 4000, 53),
            without_checksum,
            echo(pod(f), client(f), 0x1234),
        ] {
            let (verdict, out) = kernel.run("xebec_to_network", &sent.bytes());
            assert_eq!(verdict, OK);
            let port = packets::source_port(&out);
            assert!((61_000..=65_535).contains(&port), "{port}");
            let mut expected = sent.clone();
            expected.source = node(f);
            expected.set_source_port(port);
            assert_eq!(out, expected.bytes(), "{sent:?}");
            // The same flow keeps its port, and its answers find the pod.
            assert_eq!(kernel.run("xebec_to_network", &sent.bytes()).1, out);
            let answer = expected.answer();
            let mut back = sent.answer();
            back.ttl = answer.ttl;
            assert_eq!(
                kernel.run("xebec_from_network", &answer.bytes()),
                (OK, back.bytes())
            );
            // Another's answer to that port does not.
            let mut stranger = answer.clone();
            stranger.source = at(f, [203, 0, 113, 66]);
            assert_eq!(
                kernel.run("xebec_from_network", &stranger.bytes()),
                (OK, stranger.bytes())
            );
        }
    }
}

#[test]
fn who_came_by_the_pods_own_address_is_answered_from_it() {
    if packets::left_out() {
        return;
    }
    for f in FAMILIES {
        let mut kernel = Kernel::shared();
        kernel.as_web();
        kernel.received_on(1);
        let asked = tcp(client(f), web(f), 4000, 80, "S");
        assert_eq!(kernel.run("xebec_to_pod", &asked.bytes()).0, OK);
        let answer = tcp(web(f), client(f), 80, 4000, "SA").bytes();
        assert_eq!(
            kernel.run("xebec_to_network", &answer),
            (OK, answer.clone())
        );
        let own = tcp(web(f), client(f), 5000, 80, "S").bytes();
        assert_ne!(kernel.run("xebec_to_network", &own).1, own);
    }
}

#[test]
fn fragments_to_the_outside_are_translated_together() {
    if packets::left_out() {
        return;
    }
    for f in FAMILIES {
        let mut kernel = Kernel::shared();
        let (mut first, mut later) = (
            udp(pod(f), client(f), 4000, 53),
            udp(pod(f), client(f), 0, 0),
        );
        first.fragment(7, 0, true);
        later.fragment(7, 64, false);
        let (verdict, out) = kernel.run("xebec_to_network", &first.bytes());
        assert_eq!(verdict, OK);
        let mut expected = first.clone();
        expected.source = node(f);
        expected.set_source_port(packets::source_port(&out));
        assert_eq!(out, expected.bytes());
        let mut expected = later.clone();
        expected.source = node(f);
        // The bytes after the header are the middle of a datagram and stay.
        assert_eq!(
            kernel.run("xebec_to_network", &later.bytes()),
            (OK, expected.bytes_as_of(&later))
        );
    }
}

#[test]
fn without_a_free_port_the_packet_is_dropped_and_told_of() {
    if packets::left_out() {
        return;
    }
    for f in FAMILIES {
        let mut kernel = Kernel::shared();
        kernel.settings(packets::settings(61_000, 1));
        assert_eq!(
            kernel
                .run(
                    "xebec_to_network",
                    &tcp(pod(f), client(f), 4000, 80, "S").bytes()
                )
                .0,
            OK
        );
        let second = tcp(pod(f), client(f), 4001, 80, "S");
        assert_eq!(
            kernel.run("xebec_to_network", &second.bytes()),
            (SHOT, second.bytes())
        );
        assert_eq!(kernel.last_event().unwrap().reason, REASON_NO_MAPPING);
        // Another destination has ports of its own.
        let third = tcp(pod(f), client(f), 4001, 81, "S");
        assert_eq!(kernel.run("xebec_to_network", &third.bytes()).0, OK);
    }
}
