//! Direct server return: what goes to the node of a backend, and what that node makes of it, byte for byte.

use std::net::IpAddr;

use xebec_dataplane_common::nat::{DIRECT_TCP, DIRECT_UDP, Settings};

use super::packet::{Packet, told_by};
use super::wires::{OTHER_NODE, OWN, ROUTER, Wires, ip};
use super::{
    ACK, FAMILIES, FIN, Family, Kernel, OK, REDIRECT, SHOT, WHYS, Why, at, client, error, far,
    far_node, left_out, node, router, settings, tcp, udp, web,
};
use xebec_agent::loader::Xdp;

const FROM_NETWORK: &str = "xebec_from_network";
const TO_NETWORK: &str = "xebec_to_network";
/// Whoever sends frames.
const THERE: [u8; 6] = [2, 0, 0, 0, 0, 1];

fn directly(direct: u32) -> Settings {
    Settings {
        direct,
        ..settings(61_000, 4_536)
    }
}

/// A frame in a Geneve packet between nodes, with its backend.
pub fn wrapped(frame: &[u8], between: [IpAddr; 2], port: u16, backend: (IpAddr, u16)) -> Vec<u8> {
    let inner = &frame[14..];
    let v4 = between[0].is_ipv4();
    let mut geneve = vec![6, 0x40, frame[12], frame[13], 0, 0, 0, 0];
    geneve.extend([0xff, 0x58, 0x81, 5]);
    match backend.0 {
        IpAddr::V4(address) => geneve.extend(address.to_ipv6_mapped().octets()),
        IpAddr::V6(address) => geneve.extend(address.octets()),
    }
    geneve.extend(backend.1.to_be_bytes());
    geneve.extend([0, 0]);
    geneve.extend(inner);
    let mut outer = udp(between[0], between[1], port, 6081).with(geneve);
    outer.no_checksum = true;
    // Its class and flow label are the inner packet's.
    let first = u32::from_be_bytes([inner[0], inner[1], inner[2], inner[3]]);
    outer.class = if v4 { inner[1] } else { (first >> 20) as u8 };
    outer.label = first & 0xf_ffff;
    let mut bytes = outer.bytes();
    bytes[..12].copy_from_slice(&frame[..12]);
    bytes
}

/// The port that an outer packet came from.
pub fn outer_port(out: &[u8], f: Family) -> u16 {
    let at = if f == Family::V4 { 34 } else { 54 };
    u16::from_be_bytes([out[at], out[at + 1]])
}

#[test]
fn a_packet_goes_to_the_backends_node_as_it_came() {
    if left_out() {
        return;
    }
    for f in FAMILIES {
        let mut kernel = Kernel::shared();
        kernel.settings(directly(DIRECT_TCP | DIRECT_UDP));
        kernel.node_port(30_080, far(f), 8080);
        for sent in [
            tcp(client(f), node(f), 4000, 30_080, "S"),
            udp(client(f), node(f), 4000, 30_080),
            udp(client(f), node(f), 4001, 30_080).with_options(),
        ] {
            let more = sent.flags_if_tcp(ACK);
            // Errors about answers, which the client sends here, too.
            let about = sent.answer();
            let found = error(router(f), node(f), Why::TooBig, &about, 500);
            for packet in [&sent, &more, &found] {
                let (verdict, out) = kernel.run(FROM_NETWORK, &packet.bytes());
                assert_eq!(verdict, REDIRECT);
                let port = outer_port(&out, f);
                assert!(port >= 0xc000);
                let inner = packet.hop().bytes();
                let backend = (far(f), 8080);
                assert_eq!(out, wrapped(&inner, [node(f), far_node(f)], port, backend));
                // XDP leaves it to tc.
                let frame = packet.bytes();
                assert_eq!(kernel.run_early(0, &frame), (super::PASS, frame));
            }
            // One entry is all that this node needs.
            assert_eq!(kernel.translations(), 1);
            kernel.forget(&sent);
        }
    }
}

/// Fragments go as they are, too: those that follow find the first.
#[test]
fn fragments_go_to_the_backends_node() {
    if left_out() {
        return;
    }
    for f in FAMILIES {
        let mut kernel = Kernel::shared();
        kernel.settings(directly(DIRECT_UDP));
        kernel.node_port(30_080, far(f), 8080);
        let mut first = udp(client(f), node(f), 4000, 30_080);
        first.fragment(7, 0, true);
        let mut later = first.clone();
        later.fragment(7, 64, false);
        for packet in [first, later] {
            let (verdict, out) = kernel.run(FROM_NETWORK, &packet.bytes());
            let port = outer_port(&out, f);
            let nodes = [node(f), far_node(f)];
            let expected = wrapped(&packet.hop().bytes(), nodes, port, (far(f), 8080));
            assert_eq!((verdict, out), (REDIRECT, expected));
        }
    }
}

/// Flows of other protocols, who knows the way to pods, and Services of the inside alone are as without it.
#[test]
fn what_is_not_meant_is_masqueraded() {
    if left_out() {
        return;
    }
    for f in FAMILIES {
        let mut kernel = Kernel::shared();
        kernel.node_port(30_080, far(f), 8080);
        let there = |sent: &Packet, kernel: &mut Kernel| {
            let (verdict, out) = kernel.run(FROM_NETWORK, &sent.bytes());
            assert_eq!((verdict, out.len()), (REDIRECT, sent.bytes().len()));
            assert_eq!(kernel.flow(sent).unwrap().to.source, node(f).into());
        };
        kernel.settings(directly(DIRECT_TCP));
        there(&udp(client(f), node(f), 4000, 30_080), &mut kernel);
        kernel.settings(directly(DIRECT_TCP | DIRECT_UDP));
        there(&tcp(far_node(f), node(f), 4000, 30_080, "S"), &mut kernel);
        // Outside of the cluster nobody takes anything out.
        kernel.node_port(30_081, at(f, [203, 0, 113, 77]), 8080);
        there(&tcp(client(f), node(f), 4000, 30_081, "S"), &mut kernel);
        // A backend of this node sees the client anyway.
        kernel.node_port(30_082, web(f), 8080);
        let sent = tcp(client(f), node(f), 4000, 30_082, "S");
        let seen = sent.to(web(f), 8080);
        assert_eq!(kernel.run(FROM_NETWORK, &sent.bytes()), (OK, seen.bytes()));
    }
}

#[test]
fn a_flow_keeps_its_backend_while_it_is_there() {
    if left_out() {
        return;
    }
    for f in FAMILIES {
        let mut kernel = Kernel::shared();
        kernel.settings(directly(DIRECT_TCP | DIRECT_UDP));
        for sent in [
            tcp(client(f), node(f), 4000, 30_080, "S"),
            udp(client(f), node(f), 4000, 30_080),
        ] {
            kernel.node_port(30_080, far(f), 8080);
            kernel.run(FROM_NETWORK, &sent.bytes());
            let more = sent.flags_if_tcp(ACK);
            let to = |kernel: &Kernel| kernel.flow(&sent).unwrap().to.destination_port.to_be();
            // Another one is chosen from now on, but not for this.
            let before = kernel.flow(&sent).unwrap().backend;
            kernel.node_port(30_080, at(f, [10, 244, 1, 6]), 8081);
            assert_eq!(kernel.run(FROM_NETWORK, &more.bytes()).0, REDIRECT);
            assert_eq!(to(&kernel), 8080);
            // It goes: datagrams go to the other, a connection is over.
            kernel.backend(before, far(f), 8080, 0, 2);
            let verdict = kernel.run(FROM_NETWORK, &more.bytes()).0;
            if sent.protocol() == 17 {
                assert_eq!((verdict, to(&kernel)), (REDIRECT, 8081));
            } else {
                assert_eq!(verdict, REDIRECT, "until the client begins anew");
                let end = kernel.run(FROM_NETWORK, &sent.flags(FIN | ACK).bytes()).0;
                assert_eq!(end, REDIRECT);
                assert_eq!(kernel.run(FROM_NETWORK, &sent.bytes()).0, REDIRECT);
                assert_eq!(to(&kernel), 8081);
            }
        }
    }
}

#[test]
fn what_does_not_fit_then_is_answered() {
    if left_out() {
        return;
    }
    Wires::with(|wires| {
        let mut kernel = Kernel::own();
        ip("link set wire0 mtu 1400");
        kernel.settings(directly(DIRECT_TCP));
        for (f, more) in [(Family::V4, 60), (Family::V6, 80)] {
            kernel.node_port(30_080, far(f), 8080);
            let sent = tcp(client(f), node(f), 4000, 30_080, "S").between(THERE, OWN[0]);
            let rest = sent.clone().with(b"").bytes().len() - 14;
            let fits = sent.clone().with(vec![7; 1400 - more - rest]);
            let (verdict, out) = kernel.run_on(FROM_NETWORK, wires.index(), 0, &fits.bytes());
            assert_eq!((verdict, out.len()), (REDIRECT, 14 + 1400));
            let long = sent.with(vec![7; 1401 - more - rest]);
            let (verdict, out) = kernel.run_on(FROM_NETWORK, wires.index(), 0, &long.bytes());
            let mut answer = told_by(node(f), &long, Why::TooBig);
            if let super::packet::Transport::Icmp { body, .. } = &mut answer.transport {
                body[..4].copy_from_slice(&(1400 - more as u32).to_be_bytes());
            }
            let answer = answer.between(OWN[0], THERE).bytes();
            assert_eq!((verdict, out), (REDIRECT, answer));
        }
    });
}

/// On the backend's node: the pod sees the client, and its answers are the other node's port's.
#[test]
fn the_backends_node_takes_it_out() {
    if left_out() {
        return;
    }
    for f in FAMILIES {
        let nodes = [far_node(f), node(f)];
        let mut kernel = Kernel::shared();
        kernel.settings(directly(DIRECT_TCP | DIRECT_UDP));
        for (backend, sent) in [
            (web(f), tcp(client(f), far_node(f), 4000, 30_080, "S")),
            (web(f), udp(client(f), far_node(f), 4000, 30_080)),
            (node(f), udp(client(f), far_node(f), 4001, 30_080)),
            (
                web(f),
                udp(client(f), far_node(f), 4002, 30_080).with_options(),
            ),
        ] {
            let take = |kernel: &mut Kernel, packet: &Packet| {
                let frame = wrapped(&packet.bytes(), nodes, 50_000, (backend, 8080));
                kernel.run(FROM_NETWORK, &frame)
            };
            for flags in [2, ACK] {
                let packet = sent.flags_if_tcp(flags);
                let seen = packet.to(backend, 8080);
                assert_eq!(take(&mut kernel, &packet), (OK, seen.bytes()), "{packet:?}");
                let answer = seen.answer();
                let back = answer.from(far_node(f), 30_080);
                assert_eq!(kernel.run(TO_NETWORK, &answer.bytes()), (OK, back.bytes()));
            }
            // What a router says of an answer went to the other node.
            for why in WHYS {
                let seen = sent.to(backend, 8080);
                let found = error(router(f), far_node(f), why, &sent.answer(), 500);
                let expected = error(router(f), backend, why, &seen.answer(), 500);
                assert_eq!(take(&mut kernel, &found), (OK, expected.bytes()));
                // And of what was sent to the pod, the pod itself says it as the other node.
                let found = error(backend, client(f), why, &seen, 500);
                let expected = error(far_node(f), client(f), why, &sent, 500);
                let (verdict, out) = kernel.run(TO_NETWORK, &found.bytes());
                assert_eq!((verdict, out), (OK, expected.bytes()));
            }
            assert_eq!(kernel.translations(), 2);
            // The other node chose another: so it is.
            if backend == web(f) {
                let again = sent.flags_if_tcp(ACK);
                let frame = wrapped(&again.bytes(), nodes, 50_000, (backend, 9090));
                let seen = again.to(backend, 9090);
                assert_eq!(kernel.run(FROM_NETWORK, &frame), (OK, seen.bytes()));
                assert_eq!(kernel.translations(), 2);
            }
            kernel.tables().flows.clear();
        }
    }
}

#[test]
fn nobody_else_may_have_it_taken_out() {
    if left_out() {
        return;
    }
    for f in FAMILIES {
        let mut kernel = Kernel::shared();
        kernel.settings(directly(DIRECT_TCP));
        let sent = tcp(client(f), far_node(f), 4000, 30_080, "S").bytes();
        let nodes = [far_node(f), node(f)];
        let right = wrapped(&sent, nodes, 50_000, (web(f), 8080));
        // Others than nodes, pods of nodes, the node itself.
        for sender in [client(f), far(f), node(f)] {
            let frame = wrapped(&sent, [sender, node(f)], 50_000, (web(f), 8080));
            assert_eq!(
                kernel.run(FROM_NETWORK, &frame),
                (OK, frame.clone()),
                "{sender}"
            );
        }
        // Another option, without one, a fragment, and cut short.
        let at = if f == Family::V4 {
            14 + 20 + 8
        } else {
            14 + 40 + 8
        };
        for (place, value) in [(0, 0), (1, 0), (3, 7), (8, 1), (10, 0x82), (11, 4)] {
            let mut other = right.clone();
            other[at + place] = value;
            assert_eq!(
                kernel.run(FROM_NETWORK, &other),
                (OK, other.clone()),
                "{place}"
            );
        }
        for length in at..at + 33 {
            let short = right[..length].to_vec();
            assert_eq!(
                kernel.run(FROM_NETWORK, &short),
                (OK, short.clone()),
                "{length}"
            );
        }
        // What is inside is cut short, or is no IP.
        let network = if f == Family::V4 { 20 } else { 40 };
        for length in [at + 32 + network, at + 32 + network + 13] {
            assert_eq!(
                kernel.run(FROM_NETWORK, &right[..length]).0,
                SHOT,
                "{length}"
            );
        }
        // The backend is not here: nothing goes round in circles.
        for backend in [far(f), far_node(f), client(f)] {
            let frame = wrapped(&sent, nodes, 50_000, (backend, 8080));
            assert_eq!(kernel.run(FROM_NETWORK, &frame).0, SHOT, "{backend}");
        }
        assert_eq!(kernel.translations(), 0);
        kernel.settings(directly(0));
        assert_eq!(kernel.run(FROM_NETWORK, &right), (OK, right.clone()));
        kernel.settings(directly(DIRECT_TCP));
        assert_eq!(kernel.run(FROM_NETWORK, &right).0, OK);
        assert_eq!(kernel.translations(), 2);
    }
}

/// Frames that really leave, to the node that has the backend.
#[test]
fn frames_leave_for_the_backends_node() {
    if left_out() {
        return;
    }
    Wires::with(|wires| {
        let mut kernel = Kernel::own();
        kernel.attach(&wires.devices, Xdp::Off).unwrap();
        kernel.settings(directly(DIRECT_TCP));
        for f in FAMILIES {
            kernel.node_port(30_080, far(f), 8080);
            let ear = wires.ear(0);
            let sent = tcp(client(f), node(f), 4000, 30_080, "S").between(ROUTER, OWN[0]);
            let shadow = kernel
                .run_on(FROM_NETWORK, wires.index(), 0, &sent.bytes())
                .1;
            wires.send(0, &sent.bytes());
            let inner = sent.hop().between(OWN[0], OTHER_NODE).bytes();
            let port = outer_port(&shadow, f);
            ear.hears(&wrapped(
                &inner,
                [node(f), far_node(f)],
                port,
                (far(f), 8080),
            ));
        }
    });
}
