//! Ports of translated flows while nearly all of them are taken.

use std::collections::BTreeSet;

use super::{FAMILIES, Kernel, OK, SHOT, client, left_out, pod, settings, source_port, tcp, udp};

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
