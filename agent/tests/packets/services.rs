//! Services at pods' devices: what a pod sends to a Service goes to a backend, and the answer comes from the Service.

use std::collections::HashSet;

use xebec_agent::maps::ServiceKernel;
use xebec_dataplane_common::flow::REASON_NO_SERVICE;
use xebec_dataplane_common::ip::Ip;
use xebec_dataplane_common::service::{
    DROP_INSIDE, DROP_OUTSIDE, ENDING, EXTERNAL, HASH_INSIDE, HASH_OUTSIDE, ON_THIS_NODE,
    SOURCE_RANGES, THIS_NODE,
};
use xebec_policy::kernel::PolicyKernel;

use super::packet::INIT;
use super::{
    ACK, FAMILIES, FIN, Family, Front, Kernel, OK, POD_MAC, Packet, REDIRECT, RST, SHOT, at,
    client, far, far_node, left_out, node, pod, router, sctp, service, source_port, tcp, udp, web,
};

/// The Service's port 80, with backend 1 at an address.
fn one(kernel: &mut Kernel, f: Family, backend: std::net::IpAddr) {
    kernel.backend(1, backend, 8080, ON_THIS_NODE, 1);
    let front = Front {
        service: 1,
        inside: vec![1],
        ..Front::default()
    };
    kernel.service(service(f), 80, &front);
}

/// The Service's port 80 with this many backends of another node: number n is 10.244.1.n.
fn many(kernel: &mut Kernel, f: Family, count: u32, flags: u32, affinity: u32) -> Front {
    for number in 1..=count {
        kernel.backend(number, backend(f, number), 8080, 0, 1);
    }
    let front = Front {
        service: 1,
        flags,
        affinity,
        inside: (1..=count).collect(),
        outside: vec![],
    };
    kernel.service(service(f), 80, &front);
    front
}

fn backend(f: Family, number: u32) -> std::net::IpAddr {
    at(f, [10, 244, 1, number as u8])
}

/// Sends a pod's packet to a Service of `many` and gives the backend's number.
fn chosen(kernel: &mut Kernel, f: Family, sent: &Packet) -> u32 {
    let (verdict, out) = kernel.run("xebec_from_pod", &sent.bytes());
    assert_eq!(verdict, OK, "{sent:?}");
    (1..100)
        .find(|number| {
            let mut expected = sent.to(backend(f, *number), 8080);
            expected.source_port = source_port(&out);
            out == expected.bytes()
        })
        .unwrap_or_else(|| panic!("{sent:?} became {out:02x?}"))
}

fn kinds(f: Family) -> [Packet; 6] {
    let mut without_checksum = udp(pod(f), service(f), 4001, 80);
    without_checksum.no_checksum = true;
    [
        tcp(pod(f), service(f), 4000, 80, "S"),
        udp(pod(f), service(f), 4000, 80),
        without_checksum,
        tcp(pod(f), service(f), 4002, 80, "S").with_options(),
        udp(pod(f), service(f), 4002, 80).with_options(),
        sctp(pod(f), service(f), 4003, 80, INIT),
    ]
}

#[test]
fn to_a_backend_of_this_node_and_back() {
    if left_out() {
        return;
    }
    for f in FAMILIES {
        for sent in kinds(f) {
            let mut kernel = Kernel::shared();
            one(&mut kernel, f, web(f));
            let seen = sent.to(web(f), 8080).handed_over(POD_MAC);
            assert_eq!(
                kernel.run("xebec_from_pod", &sent.bytes()),
                (REDIRECT, seen.bytes()),
                "{sent:?}"
            );
            assert_eq!(kernel.event().unwrap().service, 1);
            kernel.as_web();
            let mut answer = seen.answer();
            answer.ttl = 64;
            let expected = answer.from(service(f), 80).handed_over(POD_MAC);
            assert_eq!(
                kernel.run("xebec_from_pod", &answer.bytes()),
                (REDIRECT, expected.bytes()),
                "answer to {sent:?}"
            );
            // What goes on, both ways.
            kernel.as_pod();
            assert_eq!(
                kernel.run("xebec_from_pod", &sent.bytes()),
                (REDIRECT, seen.bytes())
            );
            assert_eq!(kernel.translations(), 2);
            // On its last hop it is the stack's to answer.
            let mut last = sent.clone();
            last.ttl = 1;
            let expected = last.to(web(f), 8080);
            assert_eq!(
                kernel.run("xebec_from_pod", &last.bytes()),
                (OK, expected.bytes())
            );
        }
    }
}

#[test]
fn to_a_backend_of_another_node_and_back() {
    if left_out() {
        return;
    }
    for f in FAMILIES {
        for sent in kinds(f) {
            let mut kernel = Kernel::shared();
            one(&mut kernel, f, far(f));
            let seen = sent.to(far(f), 8080);
            assert_eq!(
                kernel.run("xebec_from_pod", &sent.bytes()),
                (OK, seen.bytes()),
                "{sent:?}"
            );
            // The device to the other node leaves it as it is, in both directions.
            assert_eq!(
                kernel.run("xebec_to_network", &seen.bytes()),
                (OK, seen.bytes())
            );
            let answer = seen.answer();
            assert_eq!(
                kernel.run("xebec_from_network", &answer.bytes()),
                (OK, answer.bytes())
            );
            assert_eq!(
                kernel.run_early(0, &answer.bytes()),
                (super::PASS, answer.bytes())
            );
            kernel.received_on(1);
            let expected = answer.from(service(f), 80);
            assert_eq!(
                kernel.run("xebec_to_pod", &answer.bytes()),
                (OK, expected.bytes()),
                "answer to {sent:?}"
            );
            // Another's packet to the same port is no answer.
            let stranger = answer.from(router(f), 8080);
            assert_eq!(
                kernel.run("xebec_to_pod", &stranger.bytes()),
                (OK, stranger.bytes())
            );
        }
    }
}

/// A pod that reaches itself sees the node: no stack takes its own address from outside.
#[test]
fn a_pod_reaches_itself_through_its_service() {
    if left_out() {
        return;
    }
    for f in FAMILIES {
        for sent in kinds(f) {
            let mut kernel = Kernel::shared();
            one(&mut kernel, f, pod(f));
            let (verdict, out) = kernel.run("xebec_from_pod", &sent.bytes());
            let mut seen = sent.to(pod(f), 8080).from(node(f), 0);
            seen.source_port = kernel.flow(&sent).unwrap().to.source_port.to_be();
            assert!(seen.source_port >= 61_000);
            let handed = seen.handed_over(POD_MAC);
            assert_eq!((verdict, out), (REDIRECT, handed.bytes()), "{sent:?}");
            let answer = seen.answer();
            let expected = answer
                .from(service(f), 80)
                .to(pod(f), sent.source_port)
                .handed_over(POD_MAC);
            assert_eq!(
                kernel.run("xebec_from_pod", &answer.bytes()),
                (REDIRECT, expected.bytes()),
                "answer to {sent:?}"
            );
            let (more, handed) = (sent.flags_if_tcp(ACK), handed.flags_if_tcp(ACK));
            let again = kernel.run("xebec_from_pod", &more.bytes());
            assert_eq!(again, (REDIRECT, handed.bytes()));
        }
    }
}

/// Rules are about the backend's address and port, not about the Service's.
#[test]
fn rules_judge_the_backend() {
    if left_out() {
        return;
    }
    for f in FAMILIES {
        let mut kernel = Kernel::shared();
        one(&mut kernel, f, web(f));
        let sent = tcp(pod(f), service(f), 4000, 80, "S");
        kernel.isolate_web(80);
        assert_eq!(
            kernel.run("xebec_from_pod", &sent.bytes()),
            (SHOT, sent.bytes())
        );
        assert_eq!(kernel.translations(), 0);
        kernel.isolate_web(8080);
        assert_eq!(kernel.run("xebec_from_pod", &sent.bytes()).0, REDIRECT);
        assert_eq!(kernel.last_event().unwrap().rule, 42);
        // Forbidden now, an open connection ends with its next packet.
        kernel.isolate_web(443);
        kernel.policy().set_generation(2).unwrap();
        let more = sent.flags(ACK);
        assert_eq!(
            kernel.run("xebec_from_pod", &more.bytes()),
            (SHOT, more.bytes())
        );
        // What the pod may send is asked of the backend, too.
        let mut kernel = {
            drop(kernel);
            Kernel::shared()
        };
        one(&mut kernel, f, far(f));
        kernel.isolate_pod_egress(80);
        assert_eq!(
            kernel.run("xebec_from_pod", &sent.bytes()),
            (SHOT, sent.bytes())
        );
        kernel.isolate_pod_egress(8080);
        assert_eq!(kernel.run("xebec_from_pod", &sent.bytes()).0, OK);
    }
}

/// Node ports are asked for at every node's address by pods, and at this node's by others.
#[test]
fn a_pod_asks_for_a_node_port() {
    if left_out() {
        return;
    }
    for f in FAMILIES {
        let mut kernel = Kernel::shared();
        kernel.node_port(30_080, web(f), 8080);
        for (port, address) in [(4000, node(f)), (4001, far_node(f))] {
            let sent = tcp(pod(f), address, port, 30_080, "S");
            let seen = sent.to(web(f), 8080).handed_over(POD_MAC);
            assert_eq!(
                kernel.run("xebec_from_pod", &sent.bytes()),
                (REDIRECT, seen.bytes())
            );
            kernel.as_web();
            let mut answer = seen.answer();
            answer.ttl = 64;
            let expected = answer.from(address, 30_080).handed_over(POD_MAC);
            assert_eq!(
                kernel.run("xebec_from_pod", &answer.bytes()),
                (REDIRECT, expected.bytes())
            );
            kernel.as_pod();
        }
        let elsewhere = tcp(client(f), far_node(f), 4000, 30_080, "S").bytes();
        assert_eq!(
            kernel.run("xebec_from_network", &elsewhere),
            (OK, elsewhere.clone())
        );
        let no_node = tcp(pod(f), router(f), 4000, 30_080, "S").bytes();
        assert_eq!(
            kernel.run("xebec_from_pod", &no_node),
            (OK, no_node.clone())
        );
    }
}

/// A host port is its own node's: at another node's address it is left to that node.
#[test]
fn a_host_port_is_at_this_node_alone() {
    if left_out() {
        return;
    }
    for f in FAMILIES {
        let mut kernel = Kernel::shared();
        let every = Ip::from(web(f)).every();
        kernel.open(every, 8081, THIS_NODE, Some((web(f), 8080)));
        let sent = tcp(pod(f), node(f), 4000, 8081, "S");
        let seen = sent.to(web(f), 8080).handed_over(POD_MAC);
        assert_eq!(
            kernel.run("xebec_from_pod", &sent.bytes()),
            (REDIRECT, seen.bytes())
        );
        let elsewhere = tcp(pod(f), far_node(f), 4001, 8081, "S").bytes();
        assert_eq!(
            kernel.run("xebec_from_pod", &elsewhere),
            (OK, elsewhere.clone())
        );
    }
}

#[test]
fn a_client_with_affinity_keeps_its_backend() {
    if left_out() {
        return;
    }
    for f in FAMILIES {
        let mut kernel = Kernel::shared();
        let front = many(&mut kernel, f, 16, 0, 10);
        let first = chosen(&mut kernel, f, &udp(pod(f), service(f), 4000, 80));
        for port in 4001..4050 {
            let sent = udp(pod(f), service(f), port, 80);
            assert_eq!(chosen(&mut kernel, f, &sent), first);
            let sent = tcp(pod(f), service(f), port, 80, "S");
            assert_eq!(
                chosen(&mut kernel, f, &sent),
                first,
                "the Service is the same"
            );
        }
        // Another Service has its own.
        let other = Front {
            service: 2,
            ..front.clone()
        };
        kernel.service(service(f), 81, &other);
        let others: HashSet<u32> = (0..8)
            .map(|port| {
                for (key, _) in kernel.tables().affinities.entries() {
                    if key.service == 2 {
                        kernel.tables().affinities.remove(&key);
                    }
                }
                chosen(&mut kernel, f, &udp(pod(f), service(f), 5000 + port, 81))
            })
            .collect();
        assert!(others.len() > 1, "{others:?}");
        let only = |kernel: &Kernel| {
            let found = kernel.tables().affinities.entries();
            found.into_iter().find(|(key, _)| key.service == 1).unwrap()
        };
        // Nearly over, it holds, and begins anew; over, it does not.
        let rewind = |kernel: &Kernel, seconds: u64| {
            let (key, mut value) = only(kernel);
            value.seen -= seconds * 1_000_000_000;
            kernel.tables().affinities.set(&key, value);
        };
        for port in 6000..6010 {
            rewind(&kernel, 8);
            assert_eq!(
                chosen(&mut kernel, f, &udp(pod(f), service(f), port, 80)),
                first
            );
        }
        let after: HashSet<u32> = (0..16)
            .map(|port| {
                rewind(&kernel, 12);
                chosen(&mut kernel, f, &udp(pod(f), service(f), 7000 + port, 80))
            })
            .collect();
        assert!(after.len() > 1, "{after:?}");
        // One that is about to go gets nothing new, one that is gone neither.
        for (flags, generation) in [(ENDING, 1), (0, 2)] {
            let old = only(&kernel).1.backend;
            kernel.backend(old, backend(f, old), 8080, flags, generation);
            let inside = front.inside.iter().copied().filter(|number| *number != old);
            let rest = Front {
                inside: inside.collect(),
                ..front.clone()
            };
            kernel.service(service(f), 80, &rest);
            let new = chosen(
                &mut kernel,
                f,
                &udp(pod(f), service(f), 8000 + generation as u16, 80),
            );
            assert_ne!(new, old);
            assert_eq!(only(&kernel).1.backend, new);
        }
    }
}

#[test]
fn only_sources_in_the_ranges_are_let_in() {
    if left_out() {
        return;
    }
    for f in FAMILIES {
        let mut kernel = Kernel::shared();
        kernel.backend(1, web(f), 8080, ON_THIS_NODE, 1);
        let front = Front {
            service: 9,
            flags: EXTERNAL | SOURCE_RANGES,
            inside: vec![1],
            outside: vec![1],
            ..Front::default()
        };
        let address = at(f, [203, 0, 113, 80]);
        kernel.service(address, 80, &front);
        let sent = tcp(client(f), address, 4000, 80, "S");
        assert_eq!(
            kernel.run("xebec_from_network", &sent.bytes()),
            (SHOT, sent.bytes())
        );
        assert_eq!(
            kernel.run_early(0, &sent.bytes()),
            (super::PASS, sent.bytes())
        );
        // Another Service's range lets in nobody here.
        let (other, own) = match f {
            Family::V4 => ("0.0.0.0/0", "198.51.100.0/24"),
            Family::V6 => ("::/0", "fd00:198:51:100::/64"),
        };
        kernel
            .maps()
            .services
            .set_range(8, other.parse().unwrap())
            .unwrap();
        assert_eq!(kernel.run("xebec_from_network", &sent.bytes()).0, SHOT);
        kernel
            .maps()
            .services
            .set_range(9, own.parse().unwrap())
            .unwrap();
        let seen = sent.to(web(f), 8080);
        assert_eq!(
            kernel.run("xebec_from_network", &sent.bytes()),
            (OK, seen.bytes())
        );
        let stranger = tcp(router(f), address, 4000, 80, "S").bytes();
        assert_eq!(
            kernel.run("xebec_from_network", &stranger),
            (SHOT, stranger.clone())
        );
    }
}

#[test]
fn without_a_backend_nothing_is_let_through() {
    if left_out() {
        return;
    }
    for f in FAMILIES {
        let mut kernel = Kernel::shared();
        let address = at(f, [203, 0, 113, 80]);
        let mut front = Front {
            service: 3,
            flags: EXTERNAL | DROP_INSIDE | DROP_OUTSIDE,
            ..Front::default()
        };
        kernel.service(address, 80, &front);
        for sent in [
            tcp(client(f), address, 4000, 80, "S"),
            udp(client(f), address, 4000, 80),
        ] {
            assert_eq!(
                kernel.run("xebec_from_network", &sent.bytes()),
                (SHOT, sent.bytes())
            );
            let inside = sent.from(pod(f), 4000);
            assert_eq!(
                kernel.run("xebec_from_pod", &inside.bytes()),
                (SHOT, inside.bytes())
            );
            let event = kernel.last_event().unwrap();
            assert_eq!((event.reason, event.service), (REASON_NO_SERVICE, 3));
        }
        // Backends for those inside alone, and for others alone.
        kernel.backend(1, web(f), 8080, ON_THIS_NODE, 1);
        front.inside = vec![1];
        kernel.service(address, 80, &front);
        let sent = udp(pod(f), address, 4000, 80);
        assert_eq!(kernel.run("xebec_from_pod", &sent.bytes()).0, REDIRECT);
        let sent = udp(client(f), address, 4000, 80).bytes();
        assert_eq!(
            kernel.run("xebec_from_network", &sent),
            (SHOT, sent.clone())
        );
        (front.inside, front.outside) = (vec![], vec![1]);
        kernel.service(address, 80, &front);
        assert_eq!(kernel.run("xebec_from_network", &sent).0, OK);
        let sent = udp(pod(f), address, 4001, 80).bytes();
        assert_eq!(kernel.run("xebec_from_pod", &sent), (SHOT, sent.clone()));
    }
}

#[test]
fn a_hash_chooses_the_same_again_and_chance_does_not() {
    if left_out() {
        return;
    }
    for f in FAMILIES {
        let mut kernel = Kernel::shared();
        for (flags, same) in [(HASH_INSIDE, true), (0, false)] {
            many(&mut kernel, f, 32, flags, 0);
            let mut all = HashSet::new();
            for port in 4000..4100 {
                let sent = udp(pod(f), service(f), port, 80);
                let mut found = HashSet::new();
                for _ in 0..5 {
                    kernel.tables().flows.clear();
                    found.insert(chosen(&mut kernel, f, &sent));
                }
                assert!(!same || found.len() == 1, "{found:?}");
                all.extend(found);
            }
            assert!(all.len() > 24, "{all:?}");
        }
    }
}

/// Nodes agree about clients of the outside: which of a Service's addresses they ask makes no difference.
#[test]
fn a_hash_for_the_outside_is_of_the_client_and_the_ports_alone() {
    if left_out() {
        return;
    }
    for f in FAMILIES {
        let mut kernel = Kernel::shared();
        for number in 1..=32_u16 {
            kernel.backend(number.into(), web(f), 8_000 + number, ON_THIS_NODE, 1);
        }
        let addresses = [80, 81].map(|last| at(f, [203, 0, 113, last]));
        for (hash, same) in [(HASH_OUTSIDE, true), (HASH_INSIDE, false)] {
            let front = Front {
                service: 1,
                flags: EXTERNAL | hash,
                inside: (1..=32).collect(),
                outside: (1..=32).collect(),
                ..Front::default()
            };
            for address in addresses {
                kernel.service(address, 80, &front);
            }
            let mut all = HashSet::new();
            let mut agreed = 0;
            for port in 4000..4100 {
                let mut found = HashSet::new();
                for address in addresses {
                    kernel.tables().flows.clear();
                    let sent = udp(client(f), address, port, 80);
                    let (verdict, out) = kernel.run("xebec_from_network", &sent.bytes());
                    let chosen = (1..=32_u16)
                        .find(|number| out == sent.to(web(f), 8_000 + number).bytes())
                        .unwrap_or_else(|| panic!("{sent:?} became {out:02x?}"));
                    assert_eq!(verdict, OK);
                    found.insert(chosen);
                }
                agreed += u32::from(found.len() == 1);
                all.extend(found);
            }
            // By chance one in 32 agrees.
            assert_eq!(agreed == 100, same, "{agreed}");
            assert!(all.len() > 24, "{all:?}");
        }
    }
}

/// The backend is taken out of the Service and another put in.
fn replaced(kernel: &mut Kernel, f: Family, old: u32, new: u32) {
    kernel.backend(old, backend(f, old), 8080, 0, 2);
    kernel.backend(new, backend(f, new), 8080, 0, 1);
    let front = Front {
        service: 1,
        inside: vec![new],
        ..Front::default()
    };
    kernel.service(service(f), 80, &front);
}

#[test]
fn who_talks_to_a_backend_that_is_gone_talks_to_another() {
    if left_out() {
        return;
    }
    for f in FAMILIES {
        // Whether a connection stays: UDP never, answered or not; TCP once it was answered.
        let tcp_sent = tcp(pod(f), service(f), 4000, 80, "S");
        let udp_sent = udp(pod(f), service(f), 4000, 80);
        for (sent, answered, stays) in [
            (&udp_sent, false, false),
            (&udp_sent, true, false),
            (&tcp_sent, false, false),
            (&tcp_sent, true, true),
        ] {
            let mut kernel = Kernel::shared();
            kernel.received_on(1);
            many(&mut kernel, f, 1, 0, 0);
            assert_eq!(chosen(&mut kernel, f, sent), 1);
            // What is sent again keeps its backend, also when there are others by now.
            many(&mut kernel, f, 32, 0, 0);
            for _ in 0..4 {
                assert_eq!(chosen(&mut kernel, f, sent), 1);
            }
            if answered {
                let answer = sent.to(backend(f, 1), 8080).answer();
                assert_eq!(kernel.run("xebec_to_pod", &answer.bytes()).0, OK);
            }
            replaced(&mut kernel, f, 1, 40);
            let more = if stays { sent.flags(ACK) } else { sent.clone() };
            assert_eq!(
                chosen(&mut kernel, f, &more),
                if stays { 1 } else { 40 },
                "{sent:?}"
            );
            let answer = more
                .to(backend(f, if stays { 1 } else { 40 }), 8080)
                .back(ACK);
            let expected = answer.from(service(f), 80);
            assert_eq!(
                kernel.run("xebec_to_pod", &answer.bytes()),
                (OK, expected.bytes())
            );
            assert_eq!(kernel.translations(), 2, "nothing of the old one is left");
        }
    }
}

/// New rules judge an open connection anew: it is still open, and stays with its backend.
#[test]
fn new_rules_do_not_make_an_open_connection_a_new_one() {
    if left_out() {
        return;
    }
    for f in FAMILIES {
        let mut kernel = Kernel::shared();
        kernel.received_on(1);
        many(&mut kernel, f, 1, 0, 0);
        let sent = tcp(pod(f), service(f), 4000, 80, "S");
        assert_eq!(chosen(&mut kernel, f, &sent), 1);
        let answer = sent.to(backend(f, 1), 8080).answer();
        assert_eq!(kernel.run("xebec_to_pod", &answer.bytes()).0, OK);
        let more = sent.flags(ACK);
        assert_eq!(chosen(&mut kernel, f, &more), 1);
        kernel.policy().set_generation(2).unwrap();
        assert_eq!(chosen(&mut kernel, f, &more), 1);
        replaced(&mut kernel, f, 1, 40);
        assert_eq!(chosen(&mut kernel, f, &more), 1);
    }
}

/// A client takes the port of a connection that ended: it is a new one, also to another backend.
#[test]
fn a_port_that_is_used_again_gets_another_choice() {
    if left_out() {
        return;
    }
    for f in FAMILIES {
        for end in [FIN | ACK, RST] {
            let mut kernel = Kernel::shared();
            kernel.received_on(1);
            many(&mut kernel, f, 1, 0, 0);
            let sent = tcp(pod(f), service(f), 4000, 80, "S");
            assert_eq!(chosen(&mut kernel, f, &sent), 1);
            let answer = sent.to(backend(f, 1), 8080).answer();
            assert_eq!(kernel.run("xebec_to_pod", &answer.bytes()).0, OK);
            assert_eq!(chosen(&mut kernel, f, &sent.flags(ACK)), 1);
            assert_eq!(chosen(&mut kernel, f, &sent.flags(end)), 1);
            assert_eq!(
                chosen(&mut kernel, f, &sent.flags(ACK)),
                1,
                "its last words"
            );
            let front = Front {
                service: 1,
                inside: vec![2],
                ..Front::default()
            };
            kernel.backend(2, backend(f, 2), 8080, 0, 1);
            kernel.service(service(f), 80, &front);
            assert_eq!(chosen(&mut kernel, f, &sent), 2);
            assert_eq!(kernel.translations(), 2);
            let answer = sent.to(backend(f, 2), 8080).answer();
            let expected = answer.from(service(f), 80);
            assert_eq!(
                kernel.run("xebec_to_pod", &answer.bytes()),
                (OK, expected.bytes())
            );
            let flow = kernel.flow(&sent).unwrap();
            assert_eq!((flow.backend, flow.closed), (2, 0));
        }
    }
}

/// A frontend that goes leaves the connections that it had, and lets nothing new in.
#[test]
fn a_service_that_is_removed_keeps_what_it_has() {
    if left_out() {
        return;
    }
    for f in FAMILIES {
        let mut kernel = Kernel::shared();
        many(&mut kernel, f, 4, 0, 0);
        let sent = udp(pod(f), service(f), 4000, 80);
        let first = chosen(&mut kernel, f, &sent);
        for protocol in [6, 17, 132] {
            kernel.no_front(Ip::from(service(f)), 80, protocol);
        }
        assert_eq!(chosen(&mut kernel, f, &sent), first);
        let new = udp(pod(f), service(f), 4001, 80).bytes();
        assert_eq!(kernel.run("xebec_from_pod", &new), (OK, new.clone()));
    }
}
