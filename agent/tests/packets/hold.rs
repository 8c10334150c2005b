//! Resolvers' answers to pods whose rules name domains: they are held, as the pod is to get them.

use std::net::IpAddr;
use std::time::Duration;

use xebec_dataplane_common::dns::LONGEST;
use xebec_dataplane_common::nat::Settings;

use super::kernel::Shared;
use super::{
    ACK, FAMILIES, Family, HERE, Kernel, OK, POD_MAC, Packet, REDIRECT, SHOT, client, far,
    left_out, node, pod, service, settings, tcp, udp, web,
};

const A_WHILE: Duration = Duration::from_secs(600);
/// A device by which packets of others come.
const OUTSIDE: u32 = 5;
/// Whoever sends frames.
const THERE: [u8; 6] = [2, 0, 0, 0, 0, 1];

fn kernel() -> Shared {
    let mut kernel = Kernel::shared();
    kernel.learn_domains();
    kernel.listen(&[53, 1053], A_WHILE);
    kernel.received_on(OUTSIDE);
    kernel
}

/// A pod's question to an outsider was let through; its answer, with some data.
fn asked(kernel: &mut Kernel, f: Family, from: u16, port: u16, data: Vec<u8>) -> Packet {
    let question = udp(pod(f), client(f), from, port);
    assert_ne!(kernel.run("xebec_from_pod", &question.bytes()).0, SHOT);
    question.back(0).with(data)
}

/// That the frame is held for the pod, and nothing else is.
fn assert_held(kernel: &mut Kernel, frame: &[u8], server: IpAddr, here: bool) {
    let held = kernel.held().unwrap();
    assert_eq!(&held.frame[..usize::from(held.length)], frame);
    assert_eq!(
        (IpAddr::from(held.server), held.ifindex, held.here),
        (server, 1, u8::from(here))
    );
    assert!(kernel.held().is_none());
}

#[test]
fn an_answer_from_outside_is_held_as_it_is() {
    if left_out() {
        return;
    }
    for f in FAMILIES {
        let mut kernel = kernel();
        let answer = asked(&mut kernel, f, 4000, 53, b"answer".to_vec());
        let bytes = answer.bytes();
        assert_eq!(kernel.run("xebec_to_pod", &bytes), (SHOT, bytes.clone()));
        assert_held(&mut kernel, &bytes, client(f), false);
        // As long as there is room, to the last byte.
        let room = LONGEST - asked(&mut kernel, f, 4001, 1053, vec![]).bytes().len();
        let longest = asked(&mut kernel, f, 4001, 1053, vec![7; room]);
        assert_eq!(kernel.run("xebec_to_pod", &longest.bytes()).0, SHOT);
        assert_held(&mut kernel, &longest.bytes(), client(f), false);
        assert_eq!((kernel.answers(), kernel.dropped()), ((2, 0), 0));
        // One of this node's own processes answers.
        kernel.received_on(0);
        let question = udp(pod(f), node(f), 4002, 53);
        assert_ne!(kernel.run("xebec_from_pod", &question.bytes()).0, SHOT);
        let bytes = question.back(0).bytes();
        assert_eq!(kernel.run("xebec_to_pod", &bytes).0, SHOT);
        assert_held(&mut kernel, &bytes, node(f), true);
    }
}

#[test]
fn what_comes_around_the_stack_is_held_as_the_pod_would_get_it() {
    if left_out() {
        return;
    }
    for f in FAMILIES {
        let mut kernel = kernel();
        // From the network, where it is handed over.
        kernel.settings(Settings {
            around: 1,
            ..settings(61_000, 4_536)
        });
        let question = udp(pod(f), far(f), 4000, 53).between(THERE, HERE);
        assert_ne!(kernel.run("xebec_from_pod", &question.bytes()).0, SHOT);
        let answer = question.back(0).with(b"answer".to_vec());
        let answer = answer.between(THERE, HERE);
        let seen = answer.handed_over(POD_MAC).bytes();
        assert_eq!(kernel.run("xebec_from_network", &answer.bytes()).0, SHOT);
        assert_held(&mut kernel, &seen, far(f), false);
        // From a pod of this node, behind a Service.
        kernel.open(service(f), 53, 0, Some((web(f), 5353)));
        let question = udp(pod(f), service(f), 4001, 53);
        assert_eq!(kernel.run("xebec_from_pod", &question.bytes()).0, REDIRECT);
        kernel.as_web();
        let sent = udp(web(f), pod(f), 5353, 4001).with(b"answer".to_vec());
        let seen = sent.from(service(f), 53).handed_over(POD_MAC).bytes();
        assert_eq!(kernel.run("xebec_from_pod", &sent.bytes()).0, SHOT);
        let held = kernel.held().unwrap();
        assert_eq!(&held.frame[..usize::from(held.length)], seen);
        assert_eq!(IpAddr::from(held.server), web(f));
    }
}

#[test]
fn by_tcp_all_that_a_resolver_sends_is_held() {
    if left_out() {
        return;
    }
    for f in FAMILIES {
        let mut kernel = kernel();
        let begin = tcp(pod(f), client(f), 4000, 53, "S");
        assert_ne!(kernel.run("xebec_from_pod", &begin.bytes()).0, SHOT);
        for part in [
            begin.back(super::SYN | ACK),
            begin.back(ACK).with(b"answer".to_vec()),
        ] {
            assert_eq!(kernel.run("xebec_to_pod", &part.bytes()).0, SHOT);
            assert_held(&mut kernel, &part.bytes(), client(f), false);
        }
    }
}

#[test]
fn nothing_else_is_held() {
    if left_out() {
        return;
    }
    for f in FAMILIES {
        let mut kernel = kernel();
        // Not asked for: who is let in may not tell the pod's node what names mean.
        let forged = udp(client(f), pod(f), 53, 4000);
        assert_eq!(kernel.run("xebec_to_pod", &forged.bytes()).0, OK);
        // A question to the pod, which may be a resolver itself.
        let question = udp(client(f), pod(f), 53, 53);
        assert_eq!(kernel.run("xebec_to_pod", &question.bytes()).0, OK);
        // Another port.
        let answer = asked(&mut kernel, f, 4001, 54, b"answer".to_vec());
        assert_eq!(kernel.run("xebec_to_pod", &answer.bytes()).0, OK);
        assert_eq!(kernel.answers(), (0, 0));
        // Too long, and in parts.
        let answer = asked(&mut kernel, f, 4002, 53, vec![7; LONGEST]);
        assert_eq!(kernel.run("xebec_to_pod", &answer.bytes()).0, OK);
        for part in answer.parts(7, 1_400) {
            assert_eq!(kernel.run("xebec_to_pod", &part).0, OK);
        }
        assert_eq!(kernel.answers(), (0, 3));
        // Nobody is there to send it on.
        for (ports, long) in [(&[53][..], Duration::ZERO), (&[], A_WHILE)] {
            kernel.listen(ports, long);
            let answer = asked(&mut kernel, f, 4003, 53, b"answer".to_vec());
            assert_eq!(kernel.run("xebec_to_pod", &answer.bytes()).0, OK);
        }
        assert_eq!(kernel.answers(), (0, 4));
        assert!(kernel.held().is_none());
    }
}

#[test]
fn a_pod_whose_rules_name_no_domains_gets_its_answers() {
    if left_out() {
        return;
    }
    for f in FAMILIES {
        let mut kernel = Kernel::shared();
        kernel.listen(&[53], A_WHILE);
        kernel.received_on(OUTSIDE);
        let answer = asked(&mut kernel, f, 4000, 53, b"answer".to_vec());
        assert_eq!(kernel.run("xebec_to_pod", &answer.bytes()).0, OK);
        assert_eq!((kernel.answers(), kernel.held().is_none()), ((0, 0), true));
    }
}

#[test]
fn more_than_there_is_room_for_goes_on() {
    if left_out() {
        return;
    }
    let f = FAMILIES[0];
    let mut kernel = kernel();
    let answer = asked(&mut kernel, f, 4000, 53, b"answer".to_vec());
    let (mut held, mut passed) = (0, 0);
    while passed < 5 {
        match kernel.run("xebec_to_pod", &answer.bytes()).0 {
            SHOT => held += 1,
            _ => passed += 1,
        }
    }
    assert!(held > 100, "{held}");
    assert_eq!(kernel.answers(), (held, passed));
    assert_eq!(std::iter::from_fn(|| kernel.held()).count() as u64, held);
    assert_eq!(kernel.run("xebec_to_pod", &answer.bytes()).0, SHOT);
}
