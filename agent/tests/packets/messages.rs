//! Messages that are told of: what pods ask resolvers and are answered, and HTTP of pods that want it told.

use std::net::IpAddr;
use std::time::Duration;

use xebec_agent::loader::{Aggregation, Sizes};
use xebec_dataplane_common::flow::{AT_MESSAGE, EGRESS, Event, INGRESS};
use xebec_dataplane_common::message::{LONG, SHORT};

use super::kernel::Shared;
use super::{
    ACK, FAMILIES, Kernel, OK, Packet, REDIRECT, SHOT, SYN, client, left_out, pod, service, tcp,
    udp, web,
};

const A_WHILE: Duration = Duration::from_secs(600);
/// A device by which packets of others come.
const OUTSIDE: u32 = 5;
const ASKS: &[u8] = b"GET /cart?secret=1 HTTP/1.1\r\nHost: shop\r\n\r\n";
const ANSWERS: &[u8] = b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n";

fn kernel() -> Shared {
    let mut kernel = Kernel::shared();
    kernel.listen(&[53, 1053], A_WHILE);
    kernel.received_on(OUTSIDE);
    kernel
}

fn leaves(kernel: &mut Kernel, packet: &Packet) {
    assert_ne!(kernel.run("xebec_from_pod", &packet.bytes()).0, SHOT);
}

fn enters(kernel: &mut Kernel, packet: &Packet) {
    assert_eq!(kernel.run("xebec_to_pod", &packet.bytes()).0, OK);
}

/// What the oldest message is of: its ends, whether it was told of at the sender's pod, whether it is a reply.
type Of = ((IpAddr, u16), (IpAddr, u16), u8, u8);

fn of(event: &Event) -> Of {
    assert_eq!(
        (event.at, event.packets, event.bytes),
        (AT_MESSAGE, 0, [0; 2])
    );
    (
        (event.source.into(), u16::from_be(event.source_port)),
        (
            event.destination.into(),
            u16::from_be(event.destination_port),
        ),
        event.direction,
        event.reply,
    )
}

fn assert_told(kernel: &mut Kernel, wanted: Of, message: &[u8]) -> Event {
    let (event, told) = kernel.message().expect("a message");
    assert_eq!((of(&event), &*told), (wanted, message));
    event
}

#[test]
fn questions_and_answers_are_told_as_they_were_sent() {
    if left_out() {
        return;
    }
    for f in FAMILIES {
        let mut kernel = kernel();
        let before = kernel.counters();
        let question = udp(pod(f), client(f), 4000, 53).with(b"question".to_vec());
        leaves(&mut kernel, &question);
        enters(&mut kernel, &question.back(0).with(b"answer".to_vec()));
        let (own, other) = ((pod(f), 4000), (client(f), 53));
        assert_told(&mut kernel, (own, other, EGRESS, 0), b"question");
        assert_told(&mut kernel, (other, own, INGRESS, 1), b"answer");
        // Of long ones as much as there is room for.
        for (length, told) in [(SHORT, SHORT), (SHORT + 1, SHORT + 1), (LONG + 1, LONG)] {
            let data: Vec<u8> = (0..length).map(|at| at as u8).collect();
            leaves(&mut kernel, &question.clone().with(data.clone()));
            assert_told(&mut kernel, (own, other, EGRESS, 0), &data[..told]);
        }
        assert!(kernel.message().is_none());
        // They add up as all events do.
        let now = kernel.counters();
        // The two flows, as packets, too.
        assert_eq!((now.produced - before.produced, now.lost), (7, before.lost));
    }
}

#[test]
fn behind_a_service_the_backend_is_told_of() {
    if left_out() {
        return;
    }
    for f in FAMILIES {
        let mut kernel = kernel();
        kernel.open(service(f), 53, 0, Some((web(f), 5353)));
        let question = udp(pod(f), service(f), 4001, 53).with(b"question".to_vec());
        assert_eq!(kernel.run("xebec_from_pod", &question.bytes()).0, REDIRECT);
        kernel.as_web();
        let answer = udp(web(f), pod(f), 5353, 4001).with(b"answer".to_vec());
        assert_eq!(kernel.run("xebec_from_pod", &answer.bytes()).0, REDIRECT);
        let (own, other) = ((pod(f), 4001), (web(f), 5353));
        let asked = assert_told(&mut kernel, (own, other, EGRESS, 0), b"question");
        let given = assert_told(&mut kernel, (other, own, INGRESS, 1), b"answer");
        assert_eq!((asked.service, given.service), (1, 1));
        assert!(kernel.message().is_none());
    }
}

#[test]
fn of_tcp_what_segments_carry_is_told() {
    if left_out() {
        return;
    }
    for f in FAMILIES {
        let mut kernel = kernel();
        let begin = tcp(pod(f), client(f), 4000, 53, "S").with(vec![]);
        leaves(&mut kernel, &begin);
        enters(&mut kernel, &begin.back(SYN | ACK));
        let mut asks = tcp(pod(f), client(f), 4000, 53, "A").with(b"question".to_vec());
        asks.numbers.0 = 0x1234_5678;
        leaves(&mut kernel, &asks);
        enters(&mut kernel, &begin.back(ACK).with(b"answer".to_vec()));
        let (own, other) = ((pod(f), 4000), (client(f), 53));
        let event = assert_told(&mut kernel, (own, other, EGRESS, 0), b"question");
        assert_eq!(event.socket, 0x1234_5678);
        assert_told(&mut kernel, (other, own, INGRESS, 1), b"answer");
        assert!(kernel.message().is_none());
    }
}

#[test]
fn nothing_else_is_told() {
    if left_out() {
        return;
    }
    for f in FAMILIES {
        let mut kernel = kernel();
        // Neither a resolver's port, nor an answer, nor what others ask the pod.
        leaves(
            &mut kernel,
            &udp(pod(f), client(f), 4000, 54).with(b"question".to_vec()),
        );
        enters(
            &mut kernel,
            &udp(client(f), pod(f), 53, 4001).with(b"forged".to_vec()),
        );
        let asked = udp(client(f), pod(f), 4002, 53).with(b"question".to_vec());
        enters(&mut kernel, &asked);
        leaves(&mut kernel, &asked.back(0).with(b"answer".to_vec()));
        // Nobody asked for HTTP to be told.
        leaves(
            &mut kernel,
            &tcp(pod(f), client(f), 4003, 80, "SA").with(ASKS.to_vec()),
        );
        // Parts, and nothing at all.
        let question = udp(pod(f), client(f), 4004, 53).with(vec![]);
        leaves(&mut kernel, &question);
        for part in question.clone().with(vec![7; 3_000]).parts(7, 1_400) {
            kernel.run("xebec_from_pod", &part);
        }
        // Nobody listens.
        kernel.listen(&[], A_WHILE);
        leaves(&mut kernel, &question.with(b"question".to_vec()));
        assert_eq!(kernel.message(), None);
    }
}

#[test]
fn who_observes_nothing_has_no_messages() {
    if left_out() {
        return;
    }
    let sizes = Sizes {
        flows: 1 << 16,
        ..Sizes::default()
    };
    let mut kernel = Kernel::with_aggregation(sizes, Aggregation::Off);
    kernel.listen(&[53], A_WHILE);
    kernel.read_http();
    let f = FAMILIES[0];
    leaves(
        &mut kernel,
        &udp(pod(f), client(f), 4000, 53).with(b"question".to_vec()),
    );
    leaves(
        &mut kernel,
        &tcp(pod(f), client(f), 4003, 80, "SA").with(ASKS.to_vec()),
    );
    assert_eq!((kernel.message(), kernel.counters().produced), (None, 0));
}

#[test]
fn http_of_a_pod_that_wants_it_is_told_both_ways() {
    if left_out() {
        return;
    }
    for f in FAMILIES {
        let mut kernel = kernel();
        kernel.read_http();
        // It asks.
        let begin = tcp(pod(f), client(f), 4000, 80, "S");
        leaves(&mut kernel, &begin);
        let own = (pod(f), 4000);
        let asks = tcp(pod(f), client(f), 4000, 80, "A");
        leaves(&mut kernel, &asks.clone().with(ASKS.to_vec()));
        leaves(&mut kernel, &asks.clone().with(b"a body".to_vec()));
        leaves(&mut kernel, &asks.clone().with(b"GET".to_vec()));
        enters(&mut kernel, &begin.back(ACK).with(ANSWERS.to_vec()));
        assert_told(&mut kernel, (own, (client(f), 80), EGRESS, 0), ASKS);
        assert_told(&mut kernel, ((client(f), 80), own, INGRESS, 1), ANSWERS);
        // It is asked; of a long message, its beginning.
        let begin = tcp(client(f), pod(f), 4001, 80, "S");
        enters(&mut kernel, &begin);
        let mut long = ASKS.to_vec();
        long.resize(1_300, b'x');
        enters(
            &mut kernel,
            &tcp(client(f), pod(f), 4001, 80, "A").with(long.clone()),
        );
        leaves(&mut kernel, &begin.back(ACK).with(ANSWERS.to_vec()));
        let own = (pod(f), 80);
        assert_told(
            &mut kernel,
            ((client(f), 4001), own, INGRESS, 0),
            &long[..SHORT],
        );
        assert_told(&mut kernel, (own, (client(f), 4001), EGRESS, 1), ANSWERS);
        assert!(kernel.message().is_none());
    }
}

#[test]
fn between_pods_of_a_node_http_is_told_once() {
    if left_out() {
        return;
    }
    for f in FAMILIES {
        let mut kernel = kernel();
        kernel.read_http();
        for (sent, told) in [
            (tcp(pod(f), web(f), 4000, 80, "S"), None),
            (
                tcp(pod(f), web(f), 4000, 80, "A").with(ASKS.to_vec()),
                Some(EGRESS),
            ),
        ] {
            assert_eq!(kernel.run("xebec_from_pod", &sent.bytes()).0, REDIRECT);
            let direction = kernel.message().map(|(event, _)| event.direction);
            assert_eq!(direction, told);
        }
        // The web pod, which does not ask for that, answers.
        kernel.as_web();
        let answer = tcp(web(f), pod(f), 80, 4000, "A").with(ANSWERS.to_vec());
        assert_eq!(kernel.run("xebec_from_pod", &answer.bytes()).0, REDIRECT);
        assert_told(
            &mut kernel,
            ((web(f), 80), (pod(f), 4000), INGRESS, 1),
            ANSWERS,
        );
        assert!(kernel.message().is_none());
    }
}
