//! Ports of translated flows while nearly all of them are taken.

use std::collections::BTreeSet;

use super::{
    FAMILIES, Kernel, OK, SHOT, client, left_out, node, pod, settings, source_port, tcp, udp,
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
/// two minutes; one that was answered keeps its port.
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
            kernel.change(&answer(*port), |flow| flow.seen -= 110);
        }
        full(&mut kernel, 4004);
        for port in &ports {
            kernel.change(&answer(*port), |flow| flow.seen -= 4);
        }
        let (verdict, out) = kernel.run("xebec_to_network", &sent(4004).bytes());
        assert_eq!((verdict, source_port(&out)), (OK, ports[0]));
        full(&mut kernel, 4005);
    }
}
