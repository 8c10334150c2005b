//! ICMP errors about translated flows: whoever sent the packet that they quote must recognize it.

use super::{
    FAMILIES, Kernel, OK, REDIRECT, WHYS, Why, client, echo, error, far, left_out, node, pod,
    router, source_port, tcp, udp, web,
};

/// What pods sent to the outside, in the node's name.
#[test]
fn errors_about_pods_packets_find_the_pod() {
    if left_out() {
        return;
    }
    for f in FAMILIES {
        let mut without_checksum = udp(pod(f), client(f), 4000, 53);
        without_checksum.no_checksum = true;
        for sent in [
            udp(pod(f), client(f), 4000, 53),
            without_checksum,
            tcp(pod(f), client(f), 4001, 80, "S"),
            echo(pod(f), client(f), 0x1234),
        ] {
            let mut kernel = Kernel::shared();
            let out = kernel.run("xebec_to_network", &sent.bytes()).1;
            let mut seen = sent.clone();
            seen.source = node(f);
            seen.set_source_port(source_port(&out));
            for sender in [client(f), router(f)] {
                for kind in WHYS {
                    // All of it, and the least that is quoted, without TCP's checksum.
                    for length in [500, sent.network_bytes() + 8] {
                        let found = error(sender, node(f), kind, &seen, length);
                        let expected = error(sender, pod(f), kind, &sent, length);
                        assert_eq!(
                            kernel.run("xebec_from_network", &found.bytes()),
                            (OK, expected.bytes()),
                            "{sent:?} {kind:?}"
                        );
                    }
                }
            }
            // About a flow that is not known: the node's own.
            let mut other = seen.clone();
            other.destination = router(f);
            let found = error(router(f), node(f), Why::NoPort, &other, 500).bytes();
            assert_eq!(
                kernel.run("xebec_from_network", &found),
                (OK, found.clone())
            );
            assert_eq!(kernel.run_early(0, &found), (super::PASS, found));
        }
    }
}

/// What a client sent to a node port whose backend is on this node: the pod's error is the node's to the client.
#[test]
fn a_pods_error_about_a_node_port_is_the_nodes() {
    if left_out() {
        return;
    }
    for f in FAMILIES {
        let mut kernel = Kernel::shared();
        kernel.node_port(30_080, web(f), 8080);
        let sent = udp(client(f), node(f), 4000, 30_080);
        let seen = udp(client(f), web(f), 4000, 8080);
        assert_eq!(
            kernel.run("xebec_from_network", &sent.bytes()),
            (OK, seen.bytes())
        );
        let found = error(web(f), client(f), Why::NoPort, &seen, 500);
        let expected = error(node(f), client(f), Why::NoPort, &sent, 500);
        assert_eq!(
            kernel.run("xebec_to_network", &found.bytes()),
            (OK, expected.bytes())
        );
        // Who came by the pod's own address gets the pod's error.
        let direct = udp(client(f), web(f), 4001, 8080);
        let found = error(web(f), client(f), Why::NoPort, &direct, 500).bytes();
        assert_eq!(kernel.run("xebec_to_network", &found), (OK, found.clone()));
    }
}

/// The backend is on another node: its error, and one of a router between, are the node's to the client.
#[test]
fn an_error_from_another_nodes_backend_goes_on_to_the_client() {
    if left_out() {
        return;
    }
    for f in FAMILIES {
        let far = far(f);
        let mut kernel = Kernel::shared();
        kernel.node_port(30_080, far, 8080);
        for sent in [
            udp(client(f), node(f), 4000, 30_080),
            tcp(client(f), node(f), 4000, 30_080, "S"),
        ] {
            let out = kernel.run("xebec_from_network", &sent.bytes()).1;
            let mut seen = sent.clone();
            (seen.source, seen.source_port) = (node(f), source_port(&out));
            (seen.destination, seen.destination_port) = (far, 8080);
            for sender in [far, router(f)] {
                for kind in WHYS {
                    let found = error(sender, node(f), kind, &seen, 500);
                    let mut expected = error(node(f), client(f), kind, &sent, 500);
                    expected.ttl -= 1;
                    assert_eq!(
                        kernel.run("xebec_from_network", &found.bytes()),
                        (REDIRECT, expected.bytes()),
                        "{sent:?} {kind:?}"
                    );
                }
            }
        }
    }
}
