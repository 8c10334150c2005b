//! Packets of pods that go around the stack, where the settings say so: out by the routing table, in by the pod's rules.

use xebec_dataplane_common::flow::{INGRESS, REASON_POLICY};
use xebec_dataplane_common::nat::{MARK_DONE, Settings};
use xebec_policy::kernel::PolicyKernel;

use super::kernel::Shared;
use super::wires::ip;
use super::{
    ACK, FAMILIES, Family, HERE, Kernel, OK, POD_MAC, Packet, REDIRECT, SHOT, Why, at, client,
    error, far, left_out, node, pod, service, settings, source_port, tcp, udp, web,
};

const FROM_NETWORK: &str = "xebec_from_network";
const FROM_POD: &str = "xebec_from_pod";
const TO_NETWORK: &str = "xebec_to_network";
/// Whoever sends frames.
const THERE: [u8; 6] = [2, 0, 0, 0, 0, 1];

fn kernel() -> Shared {
    let mut kernel = Kernel::shared();
    kernel.settings(Settings {
        around: 1,
        ..settings(61_000, 4_536)
    });
    kernel
}

/// A frame that the device gets.
fn here(packet: Packet) -> Packet {
    packet.between(THERE, HERE)
}

#[test]
fn what_leaves_a_pod_takes_its_route() {
    if left_out() {
        return;
    }
    for f in FAMILIES {
        let mut kernel = kernel();
        for sent in [
            tcp(pod(f), far(f), 4000, 8080, "S"),
            udp(pod(f), client(f), 4000, 53).with_options(),
        ] {
            let sent = here(sent);
            // Twice: as the routing table says, and as it said.
            for _ in 0..2 {
                let out = kernel.run(FROM_POD, &sent.bytes());
                assert_eq!(out, (REDIRECT, sent.hop().bytes()));
            }
            // The stack answers for its last hop, and drops what is another's.
            let mut last = sent.clone();
            last.ttl = 1;
            for left in [last, sent.between(THERE, POD_MAC)] {
                let out = kernel.run(FROM_POD, &left.bytes());
                assert_eq!(out, (OK, left.bytes()));
            }
        }
        // Through a Service, with the backend's address.
        kernel.open(service(f), 80, 0, Some((far(f), 8080)));
        let sent = here(tcp(pod(f), service(f), 4001, 80, "S"));
        let there = sent.to(far(f), 8080).hop();
        let out = kernel.run(FROM_POD, &sent.bytes());
        assert_eq!(out, (REDIRECT, there.bytes()));
        // Nor do the programs send it on by a device that has no hooks for the answers, or where the node's own rules
        // are to see it.
        let left = (OK, sent.to(far(f), 8080).bytes());
        kernel.serve(false);
        assert_eq!(kernel.run(FROM_POD, &sent.bytes()), left);
        kernel.serve(true);
        kernel.settings(settings(61_000, 4_536));
        assert_eq!(kernel.run(FROM_POD, &sent.bytes()), left);
    }
}

#[test]
fn what_no_route_sends_on_is_the_stacks() {
    if left_out() {
        return;
    }
    for f in FAMILIES {
        let mut kernel = kernel();
        let (own, others) = match f {
            Family::V4 => ("192.0.2.77", ["127.0.0.1", "224.0.0.5", "255.255.255.255"]),
            Family::V6 => ("2001:db8::77", ["::1", "fe80::7", "ff02::5"]),
        };
        let command = format!("address replace {own} dev lo");
        ip(&command);
        // The node's own twice because that is remembered; and an error.
        let mut left: Vec<Packet> = [own, own]
            .iter()
            .chain(&others)
            .map(|to| here(udp(pod(f), to.parse().unwrap(), 4000, 53)))
            .collect();
        let about = tcp(client(f), pod(f), 4000, 80, "S");
        left.push(here(error(pod(f), client(f), Why::TooBig, &about, 500)));
        for sent in left {
            let out = kernel.run(FROM_POD, &sent.bytes());
            assert_eq!(out, (OK, sent.bytes()), "{sent:?}");
        }
        ip(&command.replace("replace", "delete"));
    }
}

#[test]
fn what_comes_for_a_pod_is_judged_and_handed_over() {
    if left_out() {
        return;
    }
    for f in FAMILIES {
        let mut kernel = kernel();
        kernel.isolate_web(8080);
        let sent = here(tcp(client(f), web(f), 4000, 8080, "S"));
        let out = kernel.run(FROM_NETWORK, &sent.bytes());
        assert_eq!(out, (REDIRECT, sent.handed_over(POD_MAC).bytes()));
        let event = kernel.last_event().unwrap();
        assert_eq!((event.direction, event.rule), (INGRESS, 42));
        // Against the rules.
        let denied = here(tcp(client(f), web(f), 4000, 8081, "S"));
        assert_eq!(kernel.run(FROM_NETWORK, &denied.bytes()).0, SHOT);
        let event = kernel.last_event().unwrap();
        assert_eq!((event.direction, event.reason), (INGRESS, REASON_POLICY));
        // An answer to what the pod began.
        let asked = here(tcp(web(f), client(f), 4000, 443, "S"));
        kernel.as_web();
        assert_eq!(kernel.run(FROM_POD, &asked.bytes()).0, REDIRECT);
        let answer = here(asked.answer());
        let out = kernel.run(FROM_NETWORK, &answer.bytes());
        assert_eq!(out, (REDIRECT, answer.handed_over(POD_MAC).bytes()));
        kernel.as_pod();
        // What the stack would not send on, or answers for: the pod's own hook judges what it still sends.
        let mut last = sent.clone();
        last.ttl = 1;
        let left = [
            last,
            sent.clone().between(THERE, POD_MAC),
            here(tcp(pod(f), web(f), 4000, 8080, "S")),
            here(error(client(f), web(f), Why::TooBig, &sent.answer(), 500)),
        ];
        for sent in left {
            let out = kernel.run(FROM_NETWORK, &sent.bytes());
            assert_eq!(out, (OK, sent.bytes()), "{sent:?}");
        }
        // Not by the programs, where the node's own rules are to see it.
        kernel.settings(settings(61_000, 4_536));
        let out = kernel.run(FROM_NETWORK, &sent.bytes());
        assert_eq!(out, (OK, sent.bytes()));
    }
}

/// Both translations of a packet happen in one hook: that of what it came for, and that of whom the pod asked.
#[test]
fn what_is_translated_is_handed_over_at_once() {
    if left_out() {
        return;
    }
    for f in FAMILIES {
        let mut kernel = kernel();
        kernel.isolate_web(8080);
        for (port, backend_port, verdict) in [(30_080, 8080, REDIRECT), (30_081, 8081, SHOT)] {
            kernel.node_port(port, web(f), backend_port);
            let sent = here(tcp(client(f), node(f), 4000, port, "S"));
            let inside = sent.to(web(f), backend_port);
            let (found, out) = kernel.run(FROM_NETWORK, &sent.bytes());
            assert_eq!(found, verdict, "{sent:?}");
            if found == REDIRECT {
                assert_eq!(out, inside.handed_over(POD_MAC).bytes());
            }
        }
        // A backend of another node answers a pod of this one.
        kernel.open(service(f), 80, 0, Some((far(f), 8080)));
        let asked = here(udp(pod(f), service(f), 4000, 80));
        let there = asked.to(far(f), 8080);
        assert_eq!(
            kernel.run(FROM_POD, &asked.bytes()),
            (REDIRECT, there.hop().bytes())
        );
        let answer = here(there.answer());
        let back = answer.from(service(f), 80).handed_over(POD_MAC);
        assert_eq!(
            kernel.run(FROM_NETWORK, &answer.bytes()),
            (REDIRECT, back.bytes())
        );
        // Whom a pod asked under the node's address.
        let outside = at(f, [203, 0, 113, 77]);
        let asked = here(tcp(pod(f), outside, 4000, 443, "S"));
        assert_eq!(kernel.run(FROM_POD, &asked.bytes()).0, REDIRECT);
        let (verdict, out) = kernel.run(TO_NETWORK, &asked.bytes());
        let port = source_port(&out);
        assert_eq!(verdict, OK);
        let answer = here(asked.answer().to(node(f), port)).flags_if_tcp(ACK);
        let back = answer.to(pod(f), 4000).handed_over(POD_MAC);
        assert_eq!(
            kernel.run(FROM_NETWORK, &answer.bytes()),
            (REDIRECT, back.bytes())
        );
    }
}

/// What a pod's hook or the network's sent on, the hook that it leaves by lets through as it is; what it has yet to judge
/// it is not kept from.
#[test]
fn what_is_done_is_not_done_again() {
    if left_out() {
        return;
    }
    for f in FAMILIES {
        let mut kernel = kernel();
        let sends = |kernel: &mut Kernel, program: &str, sent: &Packet, there: &Packet| {
            let out = kernel.run(program, &sent.bytes());
            assert_eq!(out, (REDIRECT, there.hop().bytes()), "{program} {sent:?}");
            let mark = kernel.mark();
            let frame = there.hop().bytes();
            let (verdict, out) = kernel.run_marked(TO_NETWORK, 1, 0, mark, &frame);
            assert_eq!((verdict, kernel.mark()), (OK, 0), "{sent:?}");
            if mark == MARK_DONE {
                assert_eq!(out, frame);
            }
            (mark, out)
        };
        // To a pod of another node, by itself and through a Service.
        let sent = here(tcp(pod(f), far(f), 4000, 8080, "S"));
        assert_eq!(sends(&mut kernel, FROM_POD, &sent, &sent).0, MARK_DONE);
        kernel.open(service(f), 80, 0, Some((far(f), 8080)));
        let sent = here(tcp(pod(f), service(f), 4001, 80, "S"));
        let there = sent.to(far(f), 8080);
        assert_eq!(sends(&mut kernel, FROM_POD, &sent, &there).0, MARK_DONE);
        // The first packet to the outside gets a port where it leaves; the next bears it from the beginning.
        let outside = at(f, [203, 0, 113, 77]);
        let sent = here(tcp(pod(f), outside, 4000, 443, "S"));
        let (mark, out) = sends(&mut kernel, FROM_POD, &sent, &sent);
        assert_eq!(mark, 0);
        let port = source_port(&out);
        let next = here(tcp(pod(f), outside, 4000, 443, "A"));
        let there = next.from(node(f), port);
        assert_eq!(sends(&mut kernel, FROM_POD, &next, &there).0, MARK_DONE);
        // Judged anew, it is looked for again.
        kernel.policy().set_generation(7).unwrap();
        let (mark, out) = sends(&mut kernel, FROM_POD, &next, &next);
        assert_eq!((mark, out), (0, there.hop().bytes()));
        // Another's mark stays, and the hook looks as it would.
        let frame = next.bytes();
        let (_, out) = kernel.run_marked(TO_NETWORK, 1, 0, 77, &frame);
        assert_eq!((kernel.mark(), out), (77, there.bytes()));
        kernel.run_marked(FROM_POD, 1, 0, 77, &frame);
        assert_eq!(kernel.mark(), 77);
        // A pod that is behind a node port answers with the node's.
        kernel.node_port(30_080, pod(f), 8080);
        let asked = here(tcp(client(f), node(f), 4000, 30_080, "S"));
        assert_eq!(kernel.run(FROM_NETWORK, &asked.bytes()).0, REDIRECT);
        let inside = here(asked.to(pod(f), 8080).answer());
        let answer = inside.from(node(f), 30_080);
        assert_eq!(sends(&mut kernel, FROM_POD, &inside, &answer).0, MARK_DONE);
        // From the network to another node.
        kernel.node_port(30_081, far(f), 8080);
        let asked = here(tcp(client(f), node(f), 4000, 30_081, "S"));
        let (verdict, out) = kernel.run(FROM_NETWORK, &asked.bytes());
        let there = asked
            .to(far(f), 8080)
            .from(node(f), source_port(&out))
            .hop();
        assert_eq!(
            (verdict, kernel.mark(), out),
            (REDIRECT, MARK_DONE, there.bytes())
        );
    }
}
