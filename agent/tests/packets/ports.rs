//! Ports of translated flows while nearly all of them are taken.

use super::both::{at, tcp, udp};
use super::{Kernel, OK, SHOT, left_out, settings};

/// How many ports there are in the test.
const PORTS: u16 = 1000;

/// Every port of one destination's is found, the last one, too, and another destination has all of them.
#[test]
fn all_ports_are_found() {
    if left_out() {
        return;
    }
    let mut kernel = Kernel::new();
    kernel.settings(settings(61_000, PORTS));
    let pod = at("10.244.0.5");
    let mut taken = std::collections::BTreeSet::new();
    for (destination, port) in [("198.51.100.7", 53), ("198.51.100.7", 54)] {
        for number in 0..PORTS {
            let sent = udp((pod, at(destination)), (1024 + number, port), b"").bytes();
            let (verdict, out) = kernel.run("xebec_to_network", &sent);
            assert_eq!(verdict, OK, "flow {number} to {destination}:{port}");
            taken.insert((port, u16::from_be_bytes([out[34], out[35]])));
        }
        assert_eq!(kernel.refused(), (0, u64::from(port) - 53));
        let more = udp((pod, at(destination)), (1023, port), b"").bytes();
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
    let other = tcp((pod, at("198.51.100.7")), (4000, 53), (7, 0), 2, 8192, b"").bytes();
    assert_eq!(kernel.run("xebec_to_network", &other).0, OK);
}
