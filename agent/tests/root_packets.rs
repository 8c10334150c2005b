//! Packets through the real tc programs, by `BPF_PROG_TEST_RUN`: every byte of what comes out is judged.
#![allow(clippy::unwrap_used, reason = "tests")]

mod packets;

use std::net::Ipv4Addr;

use packets::{Kernel, OK, POD_MAC, REDIRECT, SHOT, client, icmp, node, pod, tcp, udp, web};
use xebec_agent::maps::PolicyKernel;
use xebec_dataplane_common::flow::{
    DROPPED, EGRESS, FORWARDED, INGRESS, REASON_INVALID, REASON_NO_MAPPING, REASON_POLICY,
    REASON_SOURCE,
};

/// From one pod of the node to another, to which it is handed directly.
#[test]
fn between_pods_a_packet_is_routed_by_the_program() {
    if packets::left_out() {
        return;
    }
    let mut kernel = Kernel::new();
    let sent = tcp(pod(), web(), 4000, 80, "S");
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
        (FORWARDED, pod().into(), web().into())
    );
    // A packet on its last hop goes to the stack, which answers for it.
    let mut last = tcp(pod(), web(), 4001, 80, "S");
    last.ttl = 1;
    assert_eq!(
        kernel.run("xebec_from_pod", &last.bytes()),
        (OK, last.bytes())
    );
}

#[test]
fn a_pod_speaks_for_itself_alone() {
    if packets::left_out() {
        return;
    }
    let mut kernel = Kernel::new();
    for forged in [node(), web(), client(), Ipv4Addr::new(10, 244, 0, 99)] {
        let sent = tcp(forged, Ipv4Addr::new(203, 0, 113, 1), 4000, 80, "S");
        kernel.with_ifindex(1);
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
    // What is no IPv4 goes nowhere; ARP is the stack's.
    let mut other = tcp(pod(), web(), 4000, 80, "S").bytes();
    other[12..14].copy_from_slice(&0x86dd_u16.to_be_bytes());
    assert_eq!(kernel.run("xebec_from_pod", &other).0, SHOT);
    other[12..14].copy_from_slice(&0x0806_u16.to_be_bytes());
    assert_eq!(kernel.run("xebec_from_pod", &other).0, OK);
}

#[test]
fn rules_judge_what_begins_and_answers_come_back() {
    if packets::left_out() {
        return;
    }
    let mut kernel = Kernel::new();
    kernel.isolate_web(80);
    let refused = tcp(pod(), web(), 4000, 81, "S");
    assert_eq!(
        kernel.run("xebec_from_pod", &refused.bytes()),
        (SHOT, refused.bytes())
    );
    let event = kernel.event().unwrap();
    assert_eq!(
        (event.verdict, event.reason, event.direction, event.set),
        (DROPPED, REASON_POLICY, INGRESS, 7)
    );
    let allowed = tcp(pod(), web(), 4000, 80, "S");
    assert_eq!(kernel.run("xebec_from_pod", &allowed.bytes()).0, REDIRECT);
    let event = kernel.event().unwrap();
    assert_eq!((event.verdict, event.rule), (FORWARDED, 42));
    // The web pod may send nothing of its own, but answers.
    kernel.isolate_web_egress();
    kernel.as_web();
    let answer = tcp(web(), pod(), 80, 4000, "SA");
    assert_eq!(kernel.run("xebec_from_pod", &answer.bytes()).0, REDIRECT);
    let own = tcp(web(), pod(), 5000, 80, "S");
    assert_eq!(kernel.run("xebec_from_pod", &own.bytes()).0, SHOT);
    assert_eq!(kernel.last_event().unwrap().direction, EGRESS);
}

#[test]
fn a_new_generation_of_rules_judges_flows_that_go_on() {
    if packets::left_out() {
        return;
    }
    let mut kernel = Kernel::new();
    kernel.isolate_web(80);
    kernel.run("xebec_from_pod", &tcp(pod(), web(), 4000, 80, "S").bytes());
    let more = tcp(pod(), web(), 4000, 80, "A");
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
    let stray = tcp(pod(), web(), 4009, 80, "A");
    assert_eq!(kernel.run("xebec_from_pod", &stray.bytes()).0, SHOT);
}

#[test]
fn what_enters_a_pod_from_elsewhere_is_judged_and_the_nodes_own_is_let_in() {
    if packets::left_out() {
        return;
    }
    let mut kernel = Kernel::new();
    kernel.isolate_web(80);
    kernel.as_web();
    kernel.received_on(1);
    for (packet, verdict) in [
        (tcp(client(), web(), 4000, 81, "S"), SHOT),
        (tcp(pod(), web(), 4000, 80, "S"), OK),
        (udp(pod(), web(), 4000, 80), SHOT),
        // Not for this pod: misrouted.
        (tcp(client(), pod(), 4000, 80, "S"), SHOT),
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
    let probe = tcp(node(), web(), 4000, 81, "S");
    assert_eq!(
        kernel.run("xebec_to_pod", &probe.bytes()),
        (OK, probe.bytes())
    );
}

#[test]
fn errors_pass_with_the_flow_that_they_are_about() {
    if packets::left_out() {
        return;
    }
    let mut kernel = Kernel::new();
    kernel.isolate_web(80);
    let sent = udp(pod(), web(), 4000, 80);
    let error = |about: &packets::Packet| icmp(web(), pod(), 3, 3, &about.bytes()[14..]);
    kernel.isolate_pod();
    kernel.as_web();
    assert_eq!(
        kernel.run("xebec_from_pod", &error(&sent).bytes()).0,
        SHOT,
        "about no flow"
    );
    let begun = tcp(pod(), web(), 4000, 80, "S");
    kernel.open_pod();
    kernel.as_pod();
    assert_eq!(kernel.run("xebec_from_pod", &begun.bytes()).0, REDIRECT);
    kernel.isolate_pod();
    kernel.as_web();
    assert_eq!(
        kernel.run("xebec_from_pod", &error(&begun).bytes()).0,
        REDIRECT
    );
}

/// Cut anywhere, or with a header that contradicts itself, a packet is dropped, and nothing is read beyond it.
#[test]
fn cut_and_contradictory_packets_are_dropped() {
    if packets::left_out() {
        return;
    }
    let mut kernel = Kernel::new();
    for whole in [
        tcp(pod(), web(), 4000, 80, "S"),
        udp(pod(), web(), 4000, 80),
        icmp(
            pod(),
            web(),
            3,
            3,
            &udp(web(), pod(), 80, 4000).bytes()[14..],
        ),
    ] {
        let bytes = whole.bytes();
        let headers = whole.header_bytes();
        for length in 34..headers {
            assert_eq!(
                kernel.run("xebec_from_pod", &bytes[..length]).0,
                SHOT,
                "{whole:?} cut to {length}"
            );
        }
        for first in [0x05, 0x35, 0x40, 0x44, 0x65] {
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

#[test]
fn later_fragments_follow_the_first() {
    if packets::left_out() {
        return;
    }
    let mut kernel = Kernel::new();
    kernel.isolate_web_udp(80);
    let (mut first, mut later) = (udp(pod(), web(), 4000, 80), udp(pod(), web(), 0, 0));
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

/// A client outside, a node port, and a backend on this node: the pod sees the client.
#[test]
fn node_port_to_a_pod_of_this_node() {
    if packets::left_out() {
        return;
    }
    for options in [&[][..], &[1, 1, 1, 0]] {
        for make in [tcp, |from, to, a, b, _: &str| udp(from, to, a, b)] {
            let mut kernel = Kernel::new();
            kernel.node_port(30_080, web(), 8080);
            let mut sent = make(client(), node(), 4000, 30_080, "S");
            sent.options = options.to_vec();
            let mut expected = sent.clone();
            (expected.destination, expected.destination_port) = (web(), 8080);
            assert_eq!(
                kernel.run("xebec_from_network", &sent.bytes()),
                (OK, expected.bytes())
            );
            let mut answer = make(web(), client(), 8080, 4000, "SA");
            answer.options = options.to_vec();
            let mut expected = answer.clone();
            (expected.source, expected.source_port) = (node(), 30_080);
            assert_eq!(
                kernel.run("xebec_to_network", &answer.bytes()),
                (OK, expected.bytes())
            );
        }
    }
}

/// A client that used a node port comes from the same port of its own to the backend itself: that is answered as itself.
#[test]
fn an_ended_node_port_connection_does_not_bend_a_direct_one() {
    if packets::left_out() {
        return;
    }
    let mut kernel = Kernel::new();
    kernel.node_port(30_080, web(), 8080);
    kernel.as_web();
    kernel.received_on(1);
    let begin = tcp(client(), web(), 4000, 8080, "S").bytes();
    let answer = tcp(web(), client(), 8080, 4000, "SA");
    let mut as_node_port = answer.clone();
    (as_node_port.source, as_node_port.source_port) = (node(), 30_080);
    let through = tcp(client(), node(), 4000, 30_080, "S").bytes();
    assert_eq!(kernel.run("xebec_from_network", &through).0, OK);
    // As long as it lives, the pod can't have another between the same ends.
    assert_eq!(
        kernel.run("xebec_from_network", &begin),
        (OK, begin.clone())
    );
    let translated = (OK, as_node_port.bytes());
    assert_eq!(kernel.run("xebec_to_network", &answer.bytes()), translated);
    let end = tcp(client(), node(), 4000, 30_080, "FA").bytes();
    assert_eq!(kernel.run("xebec_from_network", &end).0, OK);
    assert_eq!(
        kernel.run("xebec_from_network", &begin),
        (OK, begin.clone())
    );
    assert_eq!(kernel.run("xebec_to_pod", &begin).0, OK);
    let itself = (OK, answer.bytes());
    assert_eq!(kernel.run("xebec_to_network", &answer.bytes()), itself);
}

/// The backend is a pod on the host's network: it sees the client, and its answers bear the node port.
#[test]
fn node_port_to_this_nodes_own_network() {
    if packets::left_out() {
        return;
    }
    let mut kernel = Kernel::new();
    kernel.node_port(30_080, node(), 8080);
    for flags in ["S", "A"] {
        let sent = tcp(client(), node(), 4000, 30_080, flags);
        let mut expected = sent.clone();
        expected.destination_port = 8080;
        assert_eq!(
            kernel.run("xebec_from_network", &sent.bytes()),
            (OK, expected.bytes())
        );
        let answer = tcp(node(), client(), 8080, 4000, "SA");
        let mut expected = answer.clone();
        expected.source_port = 30_080;
        assert_eq!(
            kernel.run("xebec_to_network", &answer.bytes()),
            (OK, expected.bytes())
        );
    }
    let other = tcp(node(), client(), 8080, 4001, "SA").bytes();
    assert_eq!(kernel.run("xebec_to_network", &other), (OK, other.clone()));
}

/// The backend is on another node: the packet goes on at once, in this node's name.
#[test]
fn node_port_to_a_pod_of_another_node() {
    if packets::left_out() {
        return;
    }
    let far = Ipv4Addr::new(10, 244, 1, 5);
    let mut kernel = Kernel::new();
    kernel.node_port(30_080, far, 8080);
    let sent = tcp(client(), node(), 4000, 30_080, "S");
    let (verdict, out) = kernel.run("xebec_from_network", &sent.bytes());
    assert_eq!(verdict, REDIRECT);
    let port = packets::source_port(&out);
    assert!((61_000..=65_535).contains(&port), "{port}");
    let mut expected = sent.clone();
    (expected.source, expected.source_port) = (node(), port);
    (expected.destination, expected.destination_port) = (far, 8080);
    expected.ttl -= 1;
    assert_eq!(out, expected.bytes());
    let answer = tcp(far, node(), 8080, port, "SA");
    let mut expected = answer.clone();
    (expected.source, expected.source_port) = (node(), 30_080);
    (expected.destination, expected.destination_port) = (client(), 4000);
    expected.ttl -= 1;
    assert_eq!(
        kernel.run("xebec_from_network", &answer.bytes()),
        (REDIRECT, expected.bytes())
    );
    // What goes on keeps its port, also when the backend is gone; what begins anew does not.
    kernel.node_port(30_080, web(), 8080);
    let more = tcp(client(), node(), 4000, 30_080, "A");
    let (verdict, out) = kernel.run("xebec_from_network", &more.bytes());
    assert_eq!((verdict, packets::source_port(&out)), (REDIRECT, port));
    let (verdict, out) = kernel.run("xebec_from_network", &sent.bytes());
    assert_eq!((verdict, packets::source_port(&out)), (OK, 4000));
}

#[test]
fn what_is_not_translated_is_left_as_it_is() {
    if packets::left_out() {
        return;
    }
    let mut kernel = Kernel::new();
    kernel.node_port(30_080, web(), 8080);
    for packet in [
        tcp(client(), node(), 4000, 22, "S"),
        tcp(client(), node(), 4000, 30_080, "A"),
        tcp(client(), web(), 4000, 80, "S"),
        udp(client(), Ipv4Addr::new(10, 96, 0, 1), 4000, 443),
        icmp(client(), node(), 8, 0, &[0, 1, 0, 1]),
    ] {
        let sent = packet.bytes();
        assert_eq!(
            kernel.run("xebec_from_network", &sent),
            (OK, sent.clone()),
            "{packet:?}"
        );
    }
    for packet in [
        tcp(node(), client(), 4000, 80, "S"),
        // Other nodes and their pods know the way to ours.
        tcp(pod(), Ipv4Addr::new(10, 244, 1, 5), 4000, 80, "S"),
        tcp(pod(), Ipv4Addr::new(192, 0, 2, 20), 4000, 80, "S"),
    ] {
        let sent = packet.bytes();
        assert_eq!(
            kernel.run("xebec_to_network", &sent),
            (OK, sent.clone()),
            "{packet:?}"
        );
    }
    // What can't be judged is left to the stack; what lacks its checksum can't be translated.
    let whole = tcp(pod(), client(), 4000, 80, "S").bytes();
    for length in 34..54 {
        let verdict = kernel.run("xebec_to_network", &whole[..length]).0;
        let expected = if (48..52).contains(&length) { SHOT } else { OK };
        assert_eq!(verdict, expected, "cut to {length}");
    }
}

#[test]
fn pods_use_the_nodes_address_towards_the_outside() {
    if packets::left_out() {
        return;
    }
    let mut kernel = Kernel::new();
    let mut without_checksum = udp(pod(), client(), 4000, 53);
    without_checksum.no_checksum = true;
    for sent in [
        tcp(pod(), client(), 4000, 80, "S"),
        udp(pod(), client(), 4000, 53),
        without_checksum,
        icmp(pod(), client(), 8, 0, &[0x12, 0x34, 0, 1, 9, 9]),
    ] {
        let (verdict, out) = kernel.run("xebec_to_network", &sent.bytes());
        assert_eq!(verdict, OK);
        let port = packets::source_port(&out);
        assert!((61_000..=65_535).contains(&port), "{port}");
        let mut expected = sent.clone();
        expected.source = node();
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
        stranger.source = Ipv4Addr::new(203, 0, 113, 66);
        assert_eq!(
            kernel.run("xebec_from_network", &stranger.bytes()),
            (OK, stranger.bytes())
        );
    }
}

#[test]
fn who_came_by_the_pods_own_address_is_answered_from_it() {
    if packets::left_out() {
        return;
    }
    let mut kernel = Kernel::new();
    kernel.as_web();
    kernel.received_on(1);
    let asked = tcp(client(), web(), 4000, 80, "S");
    assert_eq!(kernel.run("xebec_to_pod", &asked.bytes()).0, OK);
    let answer = tcp(web(), client(), 80, 4000, "SA").bytes();
    assert_eq!(
        kernel.run("xebec_to_network", &answer),
        (OK, answer.clone())
    );
    let own = tcp(web(), client(), 5000, 80, "S").bytes();
    assert_ne!(kernel.run("xebec_to_network", &own).1, own);
}

#[test]
fn fragments_to_the_outside_are_translated_together() {
    if packets::left_out() {
        return;
    }
    let mut kernel = Kernel::new();
    let (mut first, mut later) = (udp(pod(), client(), 4000, 53), udp(pod(), client(), 0, 0));
    first.fragment(7, 0, true);
    later.fragment(7, 64, false);
    let (verdict, out) = kernel.run("xebec_to_network", &first.bytes());
    assert_eq!(verdict, OK);
    let mut expected = first.clone();
    expected.source = node();
    expected.set_source_port(packets::source_port(&out));
    assert_eq!(out, expected.bytes());
    let mut expected = later.clone();
    expected.source = node();
    // The bytes after the header are the middle of a datagram and stay.
    assert_eq!(
        kernel.run("xebec_to_network", &later.bytes()),
        (OK, expected.bytes_as_of(&later))
    );
}

#[test]
fn without_a_free_port_the_packet_is_dropped_and_told_of() {
    if packets::left_out() {
        return;
    }
    let mut kernel = Kernel::new();
    kernel.settings(packets::settings(61_000, 1));
    assert_eq!(
        kernel
            .run(
                "xebec_to_network",
                &tcp(pod(), client(), 4000, 80, "S").bytes()
            )
            .0,
        OK
    );
    let second = tcp(pod(), client(), 4001, 80, "S");
    assert_eq!(
        kernel.run("xebec_to_network", &second.bytes()),
        (SHOT, second.bytes())
    );
    assert_eq!(kernel.last_event().unwrap().reason, REASON_NO_MAPPING);
    // Another destination has ports of its own.
    let third = tcp(pod(), client(), 4001, 81, "S");
    assert_eq!(kernel.run("xebec_to_network", &third.bytes()).0, OK);
}
