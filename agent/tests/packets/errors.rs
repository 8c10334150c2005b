//! ICMP errors about translated flows: whoever sent the packet that they quote must recognize it.

use std::net::Ipv4Addr;

use super::{
    Kernel, OK, Packet, REDIRECT, client, icmp, left_out, node, pod, source_port, tcp, udp, web,
};

/// Unreachable port, time exceeded, and packet too big.
const KINDS: [(u8, u8); 3] = [(3, 3), (11, 0), (3, 4)];

fn router() -> Ipv4Addr {
    Ipv4Addr::new(203, 0, 113, 9)
}

/// An error that quotes this packet as far as `length` bytes of it.
fn about(packet: &Packet, from: Ipv4Addr, to: Ipv4Addr, kind: (u8, u8), length: usize) -> Packet {
    let bytes = packet.bytes();
    let end = bytes.len().min(14 + length);
    icmp(from, to, kind.0, kind.1, &bytes[14..end])
}

/// What pods sent to the outside, in the node's name.
#[test]
fn errors_about_pods_packets_find_the_pod() {
    if left_out() {
        return;
    }
    let mut without_checksum = udp(pod(), client(), 4000, 53);
    without_checksum.no_checksum = true;
    for sent in [
        udp(pod(), client(), 4000, 53),
        without_checksum,
        tcp(pod(), client(), 4001, 80, "S"),
        icmp(pod(), client(), 8, 0, &[0x12, 0x34, 0, 1, 9, 9]),
    ] {
        let mut kernel = Kernel::new();
        let out = kernel.run("xebec_to_network", &sent.bytes()).1;
        let mut seen = sent.clone();
        seen.source = node();
        seen.set_source_port(source_port(&out));
        for sender in [client(), router()] {
            for kind in KINDS {
                // All of it, and the least that is quoted, without TCP's checksum.
                for length in [500, 28] {
                    let error = about(&seen, sender, node(), kind, length);
                    let expected = about(&sent, sender, pod(), kind, length);
                    assert_eq!(
                        kernel.run("xebec_from_network", &error.bytes()),
                        (OK, expected.bytes()),
                        "{sent:?} {kind:?}"
                    );
                }
            }
        }
        // About a flow that is not known: the node's own.
        let mut other = seen.clone();
        other.destination = router();
        let error = about(&other, router(), node(), (3, 3), 500).bytes();
        assert_eq!(
            kernel.run("xebec_from_network", &error),
            (OK, error.clone())
        );
        assert_eq!(kernel.run_early(0, &error), (super::PASS, error));
    }
}

/// What a client sent to a node port whose backend is on this node: the pod's error is the node's to the client.
#[test]
fn a_pods_error_about_a_node_port_is_the_nodes() {
    if left_out() {
        return;
    }
    let mut kernel = Kernel::new();
    kernel.node_port(30_080, web(), 8080);
    let sent = udp(client(), node(), 4000, 30_080);
    let seen = udp(client(), web(), 4000, 8080);
    assert_eq!(
        kernel.run("xebec_from_network", &sent.bytes()),
        (OK, seen.bytes())
    );
    let error = about(&seen, web(), client(), (3, 3), 500);
    let expected = about(&sent, node(), client(), (3, 3), 500);
    assert_eq!(
        kernel.run("xebec_to_network", &error.bytes()),
        (OK, expected.bytes())
    );
    // Who came by the pod's own address gets the pod's error.
    let direct = udp(client(), web(), 4001, 8080);
    let error = about(&direct, web(), client(), (3, 3), 500).bytes();
    assert_eq!(kernel.run("xebec_to_network", &error), (OK, error.clone()));
}

/// The backend is on another node: its error, and one of a router between, are the node's to the client.
#[test]
fn an_error_from_another_nodes_backend_goes_on_to_the_client() {
    if left_out() {
        return;
    }
    let far = Ipv4Addr::new(10, 244, 1, 5);
    let mut kernel = Kernel::new();
    kernel.node_port(30_080, far, 8080);
    for sent in [
        udp(client(), node(), 4000, 30_080),
        tcp(client(), node(), 4000, 30_080, "S"),
    ] {
        let out = kernel.run("xebec_from_network", &sent.bytes()).1;
        let mut seen = sent.clone();
        (seen.source, seen.source_port) = (node(), source_port(&out));
        (seen.destination, seen.destination_port) = (far, 8080);
        for sender in [far, router()] {
            for kind in KINDS {
                let error = about(&seen, sender, node(), kind, 500);
                let mut expected = about(&sent, node(), client(), kind, 500);
                expected.ttl -= 1;
                assert_eq!(
                    kernel.run("xebec_from_network", &error.bytes()),
                    (REDIRECT, expected.bytes()),
                    "{sent:?} {kind:?}"
                );
            }
        }
    }
}
