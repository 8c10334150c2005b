//! Ports of translated flows while nearly all of them are taken.

use std::collections::BTreeSet;

use xebec_agent::loader::Sizes;

use super::{
    ACK, FAMILIES, FIN, Family, Kernel, OK, Packet, REDIRECT, SHOT, SYN, at, client, far, left_out,
    node, pod, router, settings, source_port, tcp, udp,
};

/// How many ports there are in the test.
const PORTS: u16 = 1000;

/// Every port of one destination's is found, the last one, too, and another destination has all of them.
#[test]
fn all_ports_are_found() {
    if left_out() {
        return;
    }
    for f in FAMILIES {
        let mut kernel = Kernel::shared();
        kernel.settings(settings(61_000, PORTS));
        let mut taken = BTreeSet::new();
        for port in [53, 54] {
            for number in 0..PORTS {
                let sent = udp(pod(f), client(f), 1024 + number, port).bytes();
                let (verdict, out) = kernel.run("xebec_to_network", &sent);
                assert_eq!(verdict, OK, "flow {number} to port {port}");
                taken.insert((port, source_port(&out)));
            }
            assert_eq!(kernel.refused(), (0, u64::from(port) - 53));
            let more = udp(pod(f), client(f), 1023, port).bytes();
            assert_eq!(
                kernel.run("xebec_to_network", &more),
                (SHOT, more.clone()),
                "there are no more"
            );
            assert_eq!(kernel.refused(), (0, u64::from(port) - 52));
        }
        assert_eq!(taken.len(), 2 * usize::from(PORTS));
        assert!(
            taken
                .iter()
                .all(|(_, port)| (61_000..61_000 + PORTS).contains(port))
        );
        // Another protocol has ports of its own.
        let other = tcp(pod(f), client(f), 4000, 53, "S").bytes();
        assert_eq!(kernel.run("xebec_to_network", &other).0, OK);
    }
}

/// What a full table has forgotten half of holds no port, and neither does a connection that nobody has answered for
/// long; one that was answered keeps its port.
#[test]
fn half_a_flow_holds_no_port_and_one_without_an_answer_not_for_long() {
    if left_out() {
        return;
    }
    for f in FAMILIES {
        let mut kernel = Kernel::shared();
        kernel.settings(settings(61_000, 2));
        let sent = |port| tcp(pod(f), client(f), port, 80, "S");
        let mut ports = Vec::new();
        for port in [4001, 4002] {
            let (verdict, out) = kernel.run("xebec_to_network", &sent(port).bytes());
            assert_eq!(verdict, OK);
            ports.push(source_port(&out));
        }
        let full = |kernel: &mut Kernel, port| {
            let (verdict, out) = kernel.run("xebec_to_network", &sent(port).bytes());
            assert_eq!(verdict, SHOT, "took {}", source_port(&out));
        };
        full(&mut kernel, 4003);
        // The first flow is forgotten by half.
        kernel.forget(&sent(4001));
        let (verdict, out) = kernel.run("xebec_to_network", &sent(4003).bytes());
        assert_eq!((verdict, source_port(&out)), (OK, ports[0]));
        full(&mut kernel, 4004);
        // The second one is answered, the third is not. Times are in ticks of a little more than a second.
        let answer = |port| tcp(client(f), node(f), 80, port, "SA");
        assert_eq!(
            kernel
                .run("xebec_from_network", &answer(ports[1]).bytes())
                .0,
            OK
        );
        for port in &ports {
            kernel.change(&answer(*port), |flow| flow.seen -= 3);
        }
        full(&mut kernel, 4004);
        for port in &ports {
            kernel.change(&answer(*port), |flow| flow.seen -= 120);
        }
        let (verdict, out) = kernel.run("xebec_to_network", &sent(4004).bytes());
        assert_eq!((verdict, source_port(&out)), (OK, ports[0]));
        full(&mut kernel, 4005);
    }
}

/// Where all ports are taken, one that asks once and is silent then keeps its port for seconds: so does a datagram's
/// sender, and who opens a connection that nobody answers. Whose connection was answered keeps it.
#[test]
fn who_is_silent_yields_a_port_that_others_need() {
    if left_out() {
        return;
    }
    for f in FAMILIES {
        let asks: [fn(Family, u16) -> Packet; 2] = [
            |f, port| udp(pod(f), client(f), port, 53),
            |f, port| tcp(pod(f), client(f), port, 80, "S"),
        ];
        for sent in asks {
            let mut kernel = Kernel::shared();
            kernel.settings(settings(61_000, 2));
            let ask = |kernel: &mut Kernel, port| {
                let (verdict, out) = kernel.run("xebec_to_network", &sent(f, port).bytes());
                (verdict, source_port(&out))
            };
            let ports = [4001, 4002].map(|port| ask(&mut kernel, port).1);
            let answer = |port| sent(f, 0).answer().to(node(f), port);
            let (verdict, _) = kernel.run("xebec_from_network", &answer(ports[1]).bytes());
            assert_eq!(verdict, OK);
            let age = |kernel: &Kernel, ticks| {
                for port in ports {
                    kernel.change(&answer(port), |flow| {
                        flow.seen -= ticks;
                        flow.paired -= ticks;
                    });
                }
            };
            age(&kernel, 3);
            assert_eq!(ask(&mut kernel, 4003).0, SHOT);
            age(&kernel, 2);
            // A datagram that is answered once more is silent no longer.
            kernel.run("xebec_from_network", &answer(ports[1]).bytes());
            assert_eq!(ask(&mut kernel, 4003), (OK, ports[0]));
            assert_eq!(ask(&mut kernel, 4004).0, SHOT);
        }
    }
}

/// A client's connection over one that ended gets the port again that it had towards the same backend: that remembers the
/// one before for a while, and would refuse any other in its place. Towards another backend it gets another port, and
/// the former is kept from others.
#[test]
fn a_connection_that_begins_again_has_the_port_that_it_had() {
    if left_out() {
        return;
    }
    for f in FAMILIES {
        let mut kernel = Kernel::shared();
        kernel.settings(settings(61_000, 3));
        kernel.node_port(30_080, far(f), 8080);
        let sent = |port| tcp(client(f), node(f), port, 30_080, "S");
        let run = |kernel: &mut Kernel, packet: &Packet| {
            let (verdict, out) = kernel.run("xebec_from_network", &packet.bytes());
            (verdict == REDIRECT).then(|| source_port(&out))
        };
        // Both ends close.
        let closed = |kernel: &mut Kernel, port| {
            let had = run(kernel, &sent(port)).unwrap();
            let seen = tcp(node(f), far(f), had, 8080, "S");
            assert_eq!(run(kernel, &seen.back(SYN | ACK)), Some(30_080));
            assert_eq!(run(kernel, &sent(port).flags(FIN | ACK)), Some(had));
            assert_eq!(run(kernel, &seen.back(FIN | ACK)), Some(30_080));
            had
        };
        let first = closed(&mut kernel, 4001);
        for _ in 0..8 {
            assert_eq!(closed(&mut kernel, 4001), first);
        }
        assert_eq!(kernel.translations(), 2);
        // The next connection of this client goes to another backend, and is no reason to forget the one before.
        kernel.node_port(30_080, at(f, [10, 244, 1, 6]), 8080);
        assert!(run(&mut kernel, &sent(4001)).is_some());
        let old = tcp(node(f), far(f), first, 8080, "A");
        let late = old.answer().bytes();
        assert_eq!(
            kernel.run("xebec_from_network", &late),
            (OK, late.clone()),
            "what the former backend still says is not the new connection's"
        );
        // Others get other ports, while there are any; then those of connections that are over.
        kernel.node_port(30_080, far(f), 8080);
        let mut taken: Vec<_> = (4002..4004)
            .map(|port| run(&mut kernel, &sent(port)).unwrap())
            .collect();
        assert!(!taken.contains(&first));
        taken.push(run(&mut kernel, &sent(4004)).unwrap());
        taken.sort_unstable();
        assert_eq!(taken, [61_000, 61_001, 61_002]);
        assert_eq!(run(&mut kernel, &sent(4005)), None, "all are open");
        assert_eq!(kernel.refused(), (0, 1));
    }
}

/// Where the table is full of flows that all go on, many that begin in one moment don't push each other out.
#[test]
fn a_full_table_forgets_no_flow_that_begins() {
    if left_out() {
        return;
    }
    const ENTRIES: u16 = 8_192;
    /// So many ask before the first is answered.
    const AT_ONCE: usize = 256;
    let mut kernel = Kernel::with_sizes(Sizes {
        flows: ENTRIES.into(),
        ..Sizes::default()
    });
    kernel.settings(settings(61_000, PORTS));
    // Each takes two entries: twice as many as there is room for.
    let own: Vec<u16> = (0..ENTRIES).collect();
    for some in own.chunks(AT_ONCE) {
        let ask = |own: &u16| {
            let port = 1024 + own / 16;
            let sent = udp(pod(Family::V4), client(Family::V4), *own, port);
            let (verdict, out) = kernel.run("xebec_to_network", &sent.bytes());
            assert_eq!(verdict, OK);
            let answer = udp(
                client(Family::V4),
                node(Family::V4),
                port,
                source_port(&out),
            );
            (sent, answer)
        };
        let asked: Vec<_> = some.iter().map(ask).collect();
        for (own, (sent, answer)) in some.iter().zip(asked) {
            let (verdict, out) = kernel.run("xebec_from_network", &answer.bytes());
            let meant = sent.answer().bytes();
            assert_eq!((verdict, out), (OK, meant), "the answer to port {own}");
        }
    }
}

/// A client that opens one connection after the other uses each port again as late as it can, and gets the one that it
/// had for its own port also where that is forgotten. Another client's are elsewhere.
#[test]
fn ports_of_connections_keep_their_order() {
    if left_out() {
        return;
    }
    for f in FAMILIES {
        let mut kernel = Kernel::shared();
        kernel.settings(settings(61_000, PORTS));
        kernel.node_port(30_080, far(f), 8080);
        let mut run = |from, port| {
            let sent = tcp(from, node(f), port, 30_080, "S");
            let (verdict, out) = kernel.run("xebec_from_network", &sent.bytes());
            assert_eq!(verdict, REDIRECT);
            kernel.forget(&sent);
            kernel.forget(&tcp(far(f), node(f), 8080, source_port(&out), "SA"));
            source_port(&out)
        };
        // As Linux chooses them: those that are even first.
        let own: Vec<u16> = (0..PORTS).map(|number| 20_000 + 2 * number).collect();
        let given: Vec<u16> = own.iter().map(|port| run(client(f), *port)).collect();
        assert_eq!(given.iter().collect::<BTreeSet<_>>().len(), own.len());
        let again: Vec<u16> = own.iter().map(|port| run(client(f), *port)).collect();
        assert_eq!(again, given);
        let another = own.iter().zip(&given);
        let same = another.filter(|(port, given)| run(router(f), **port) == **given);
        assert!(same.count() < own.len() / 2);
    }
}
