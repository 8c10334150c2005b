//! The node's own rules: what comes to it, and what it sends elsewhere.

use xebec_dataplane_common::flow::{DROPPED, EGRESS, INGRESS, REASON_FRAGMENT, REASON_POLICY};

use super::kernel::Shared;
use super::{
    ACK, FAMILIES, Kernel, OK, Packet, SHOT, SYN, client, far, left_out, node, pod, tcp, udp, web,
};

const FROM_NETWORK: &str = "xebec_from_network";
const TO_NETWORK: &str = "xebec_to_network";
const FROM_POD: &str = "xebec_from_pod";
const TO_POD: &str = "xebec_to_pod";
/// A device by which packets of others come.
const OUTSIDE: u32 = 5;

fn kernel(ingress: Option<u16>, egress: Option<u16>) -> Shared {
    let mut kernel = Kernel::shared();
    kernel.isolate_host(ingress, egress);
    kernel
}

/// That a program lets a packet through as it is.
fn assert_passes(kernel: &mut Kernel, program: &str, packet: &Packet) {
    let bytes = packet.bytes();
    let out = kernel.run(program, &bytes);
    assert_eq!(out, (OK, bytes), "{program}: {packet:?}");
}

/// That a program drops it and tells of it, as no rule's.
fn assert_dropped(kernel: &mut Kernel, program: &str, packet: &Packet, direction: u8) {
    while kernel.event().is_some() {}
    let verdict = kernel.run(program, &packet.bytes()).0;
    assert_eq!(verdict, SHOT, "{program}: {packet:?}");
    let event = kernel.event().unwrap();
    assert_eq!(
        (event.verdict, event.reason, event.direction),
        (DROPPED, REASON_POLICY, direction)
    );
}

#[test]
fn without_rules_nothing_is_asked_and_no_flow_entered() {
    if left_out() {
        return;
    }
    for f in FAMILIES {
        let mut kernel = kernel(None, None);
        let begin = tcp(client(f), node(f), 4000, 22, "S");
        assert_passes(&mut kernel, FROM_NETWORK, &begin);
        assert_passes(&mut kernel, TO_NETWORK, &begin.back(SYN | ACK));
        assert!(kernel.flow(&begin).is_none() && kernel.event().is_none());
    }
}

#[test]
fn what_comes_to_the_node_is_judged_and_its_answers_pass() {
    if left_out() {
        return;
    }
    for f in FAMILIES {
        // Nobody may be asked by the node, but those who ask are answered.
        let mut kernel = kernel(Some(80), Some(9));
        let begin = tcp(client(f), node(f), 4000, 80, "S");
        assert_passes(&mut kernel, FROM_NETWORK, &begin);
        let event = kernel.event().unwrap();
        assert_eq!((event.direction, event.set, event.rule), (INGRESS, 11, 42));
        assert_passes(&mut kernel, TO_NETWORK, &begin.back(SYN | ACK));
        assert_passes(&mut kernel, FROM_NETWORK, &begin.flags(ACK));
        for other in [
            tcp(client(f), node(f), 4000, 22, "S"),
            udp(client(f), node(f), 4000, 80),
            tcp(client(f), node(f), 4002, 81, "A"),
        ] {
            assert_dropped(&mut kernel, FROM_NETWORK, &other, INGRESS);
        }
        // The rules change: neither end is heard any more.
        kernel.isolate_host(Some(81), Some(9));
        assert_dropped(&mut kernel, TO_NETWORK, &begin.back(ACK), EGRESS);
        assert_dropped(&mut kernel, FROM_NETWORK, &begin.flags(ACK), INGRESS);
        // And back.
        kernel.isolate_host(Some(80), Some(9));
        assert_passes(&mut kernel, TO_NETWORK, &begin.back(ACK));
        assert_passes(&mut kernel, FROM_NETWORK, &begin.flags(ACK));
    }
}

#[test]
fn what_the_node_sends_is_judged_and_answered() {
    if left_out() {
        return;
    }
    for f in FAMILIES {
        let mut kernel = kernel(Some(9), Some(443));
        for to in [client(f), far(f)] {
            let begin = tcp(node(f), to, 4000, 443, "S");
            assert_passes(&mut kernel, TO_NETWORK, &begin);
            assert_passes(&mut kernel, FROM_NETWORK, &begin.back(SYN | ACK));
            assert_dropped(
                &mut kernel,
                TO_NETWORK,
                &tcp(node(f), to, 4000, 80, "S"),
                EGRESS,
            );
            assert_dropped(
                &mut kernel,
                TO_NETWORK,
                &udp(node(f), to, 4000, 443),
                EGRESS,
            );
            // A stranger is no answer.
            let stranger = tcp(to, node(f), 80, 4000, "SA");
            assert_dropped(&mut kernel, FROM_NETWORK, &stranger, INGRESS);
        }
        // What it sends on for others is not its own.
        let sent = tcp(pod(f), far(f), 4000, 80, "S");
        let out = kernel.run_on(TO_NETWORK, 1, OUTSIDE, &sent.bytes());
        assert_eq!(out.0, OK);
    }
}

#[test]
fn only_one_way_under_rules_has_the_other_open() {
    if left_out() {
        return;
    }
    for f in FAMILIES {
        let mut kernel = kernel(Some(80), None);
        let begin = tcp(node(f), client(f), 4000, 443, "S");
        assert_passes(&mut kernel, TO_NETWORK, &begin);
        assert_passes(&mut kernel, FROM_NETWORK, &begin.back(SYN | ACK));
        kernel.isolate_host(None, Some(443));
        let begin = tcp(client(f), node(f), 4001, 22, "S");
        assert_passes(&mut kernel, FROM_NETWORK, &begin);
        assert_passes(&mut kernel, TO_NETWORK, &begin.back(SYN | ACK));
    }
}

#[test]
fn pods_of_the_node_are_judged_where_they_leave() {
    if left_out() {
        return;
    }
    for f in FAMILIES {
        let mut kernel = kernel(Some(80), None);
        let begin = tcp(pod(f), node(f), 4000, 80, "S");
        assert_passes(&mut kernel, FROM_POD, &begin);
        assert_passes(&mut kernel, TO_POD, &begin.back(SYN | ACK));
        assert_dropped(
            &mut kernel,
            FROM_POD,
            &tcp(pod(f), node(f), 4000, 22, "S"),
            INGRESS,
        );
        kernel.isolate_host(Some(81), None);
        assert_dropped(&mut kernel, TO_POD, &begin.back(ACK), INGRESS);
        assert_dropped(&mut kernel, FROM_POD, &begin.flags(ACK), INGRESS);
        // Its own pods the node always reaches, and they answer.
        kernel.isolate_host(Some(9), Some(9));
        let probe = tcp(node(f), pod(f), 4001, 8080, "S");
        assert_passes(&mut kernel, TO_POD, &probe);
        assert_passes(&mut kernel, FROM_POD, &probe.back(SYN | ACK));
    }
}

#[test]
fn what_is_for_others_is_not_judged() {
    if left_out() {
        return;
    }
    for f in FAMILIES {
        let mut kernel = kernel(Some(9), Some(9));
        assert_passes(
            &mut kernel,
            FROM_NETWORK,
            &tcp(client(f), far(f), 4000, 80, "S"),
        );
        // For a pod, by its address or by a node port.
        assert_passes(
            &mut kernel,
            FROM_NETWORK,
            &tcp(client(f), pod(f), 4000, 80, "S"),
        );
        kernel.node_port(30_080, web(f), 80);
        let sent = tcp(client(f), node(f), 4001, 30_080, "S");
        let out = kernel.run(FROM_NETWORK, &sent.bytes());
        assert_eq!(out, (OK, sent.to(web(f), 80).bytes()));
        // Through a node port to a process of the node itself, after the translation.
        kernel.node_port(30_081, node(f), 9);
        let sent = tcp(client(f), node(f), 4002, 30_081, "S");
        let out = kernel.run(FROM_NETWORK, &sent.bytes());
        assert_eq!(out, (OK, sent.to(node(f), 9).bytes()));
        kernel.node_port(30_082, node(f), 10);
        let sent = tcp(client(f), node(f), 4003, 30_082, "S");
        assert_eq!(kernel.run(FROM_NETWORK, &sent.bytes()).0, SHOT);
    }
}

#[test]
fn fragments_slip_past_nothing() {
    if left_out() {
        return;
    }
    for f in FAMILIES {
        let mut kernel = kernel(Some(9), None);
        let [_, later] = udp(client(f), node(f), 4000, 53).parts(17, 24);
        assert_eq!(kernel.run(FROM_NETWORK, &later).0, SHOT);
        assert_eq!(kernel.last_event().unwrap().reason, REASON_FRAGMENT);
        let [_, later] = udp(client(f), far(f), 4000, 53).parts(18, 24);
        assert_eq!(kernel.run(FROM_NETWORK, &later), (OK, later.clone()));
    }
}
