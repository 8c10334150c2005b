//! Frames that are cut, malformed, tagged, in pieces or of other protocols: they pass as they are or are dropped, or
//! are translated wholly.

use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

use super::packet::Transport;
use super::{
    FAMILIES, Family, Front, Kernel, OK, PASS, POD_MAC, Packet, REDIRECT, SHOT, Why, client, echo,
    error, icmp, left_out, node, other, pod, router, sctp, service, tcp, udp, web,
};

/// A Service at a ClusterIP and a node port, both with the web pod behind them.
fn filled(f: Family) -> super::kernel::Shared {
    let mut kernel = Kernel::shared();
    kernel.backend(1, web(f), 8080, 1, 1);
    let front = Front {
        service: 1,
        inside: vec![1],
        ..Front::default()
    };
    kernel.service(service(f), 80, &front);
    kernel.backend(2, web(f), 8080, 1, 1);
    let port = Front {
        service: 2,
        flags: xebec_dataplane_common::service::EXTERNAL,
        inside: vec![2],
        outside: vec![2],
        ..Front::default()
    };
    for protocol in [6, 17, 132] {
        let every = xebec_dataplane_common::ip::Ip::from(node(f)).every();
        kernel.front(every, 30_080, protocol, &port);
    }
    kernel
}

/// Packets that some hook translates, with the hook.
fn translated(f: Family) -> Vec<(&'static str, Packet)> {
    let mut all = Vec::new();
    for packet in [
        tcp(pod(f), service(f), 4000, 80, "S"),
        udp(pod(f), service(f), 4000, 80),
        tcp(pod(f), service(f), 4001, 80, "S").with_options(),
    ] {
        all.push(("xebec_from_pod", packet));
    }
    for packet in [
        tcp(client(f), node(f), 4000, 30_080, "S"),
        udp(client(f), node(f), 4000, 30_080).with_options(),
    ] {
        all.push(("xebec_from_network", packet));
    }
    // Errors about what the web pod answers.
    let answer = udp(web(f), client(f), 8080, 4000);
    all.push(("xebec_from_network", udp(client(f), node(f), 4000, 30_080)));
    all.push((
        "xebec_to_network",
        error(web(f), client(f), Why::NoPort, &answer.answer(), 500),
    ));
    for packet in [
        tcp(pod(f), client(f), 4000, 80, "S"),
        udp(pod(f), client(f), 4000, 53).with_options(),
        echo(pod(f), client(f), 0x1234),
        sctp(pod(f), client(f), 4000, 80, super::packet::INIT),
    ] {
        all.push(("xebec_to_network", packet));
    }
    all
}

/// Whether all checksums of a frame are right that lie within it; none for one that is no whole TCP or UDP packet.
fn right(frame: &[u8]) -> Option<bool> {
    use etherparse::{NetHeaders, PacketHeaders, TransportHeader};
    let headers = PacketHeaders::from_ethernet_slice(frame).ok()?;
    let payload = headers.payload.slice();
    let (found, right) = match (headers.net?, headers.transport?) {
        (NetHeaders::Ipv4(ip, _), TransportHeader::Tcp(tcp)) => {
            if ip.header_checksum != ip.calc_header_checksum() {
                return Some(false);
            }
            (tcp.checksum, tcp.calc_checksum_ipv4(&ip, payload).ok()?)
        }
        (NetHeaders::Ipv4(ip, _), TransportHeader::Udp(udp)) => {
            if ip.header_checksum != ip.calc_header_checksum() {
                return Some(false);
            }
            (udp.checksum, udp.calc_checksum_ipv4(&ip, payload).ok()?)
        }
        (NetHeaders::Ipv6(ip, _), TransportHeader::Tcp(tcp)) => {
            (tcp.checksum, tcp.calc_checksum_ipv6(&ip, payload).ok()?)
        }
        (NetHeaders::Ipv6(ip, _), TransportHeader::Udp(udp)) => {
            (udp.checksum, udp.calc_checksum_ipv6(&ip, payload).ok()?)
        }
        _ => return None,
    };
    Some(found == right)
}

/// Cut anywhere: unchanged, dropped, or changed as the whole would have been.
#[test]
fn frames_of_every_length_are_never_changed_by_half() {
    if left_out() {
        return;
    }
    for f in FAMILIES {
        for (hook, packet) in translated(f) {
            let whole = packet.bytes();
            let kernel = &mut *filled(f);
            let known = udp(client(f), node(f), 4000, 30_080).bytes();
            assert_eq!(kernel.run("xebec_from_network", &known).0, OK);
            // The flow is known, so that its cut packets are translated if any are.
            let (verdict, full) = kernel.run(hook, &whole);
            assert!(
                verdict != SHOT && (full != whole || packet.protocol() == 132),
                "{packet:?}"
            );
            let error = matches!(&packet.transport, Transport::Icmp { kind, .. } if *kind != 8 && *kind != 128);
            for length in 14 + packet.network_bytes()..whole.len() {
                // What an error's checksum becomes depends on how much of the packet it quotes.
                if error && length < packet.transport_at() + packet.network_bytes() + 16 {
                    continue;
                }
                let cut = &whole[..length];
                let (verdict, out) = kernel.run(hook, cut);
                assert!(
                    verdict == SHOT || out == cut || out == full[..length],
                    "{packet:?} cut to {length} became {out:02x?}"
                );
                if hook == "xebec_from_network" {
                    let (verdict, out) = kernel.run_early(0, cut);
                    assert_eq!(verdict, PASS);
                    assert!(
                        out == cut || out == full[..length],
                        "{packet:?} cut to {length}"
                    );
                }
            }
        }
    }
}

/// Bytes of the headers that are anything: whatever a hook changes has right checksums if it had before.
#[test]
fn malformed_headers_do_no_harm() {
    if left_out() {
        return;
    }
    let seed = rand::random();
    eprintln!("seed {seed}");
    let mut random = StdRng::seed_from_u64(seed);
    for f in FAMILIES {
        let kernel = &mut *filled(f);
        let packets = translated(f);
        let (mut changed, mut dropped, mut left) = (0, 0, 0);
        for _ in 0..20_000 {
            let (hook, packet) = &packets[random.random_range(0..packets.len())];
            let mut frame = packet.bytes();
            for _ in 0..random.random_range(0..3) {
                let end = (packet.transport_at() + 20).min(frame.len());
                let at = random.random_range(14..end);
                frame[at] = random.random();
            }
            let (verdict, out) = kernel.run(hook, &frame);
            match (verdict, out == frame) {
                (SHOT, _) => dropped += 1,
                (_, true) => left += 1,
                _ => {
                    changed += 1;
                    if right(&frame) == Some(true) {
                        assert_eq!(
                            right(&out),
                            Some(true),
                            "{hook} made of {frame:02x?} {out:02x?}"
                        );
                    }
                }
            }
            assert_eq!(out.len(), frame.len());
        }
        eprintln!("{changed} changed, {dropped} dropped, {left} left");
        assert!(changed > 1000 && dropped > 400 && left > 1000);
    }
}

/// A frame whose headers are not in one piece is read all the same.
#[test]
fn frames_in_pieces_become_what_whole_ones_do() {
    if left_out() {
        return;
    }
    for f in FAMILIES {
        for (hook, packet) in translated(f) {
            let kernel = &mut *filled(f);
            let whole = kernel.run(hook, &packet.bytes());
            for first in [14, 15, 34, 54, 60] {
                // Kernels before 6.18 can't make such a frame.
                if let Some(found) = kernel.run_in_pieces(hook, first, &packet.bytes()) {
                    assert_eq!(found, whole, "{packet:?} in pieces at {first}");
                }
            }
        }
    }
}

/// A tag that is still in the frame makes it another network's.
#[test]
fn tagged_frames_are_not_ours() {
    if left_out() {
        return;
    }
    for f in FAMILIES {
        let kernel = &mut *filled(f);
        for (hook, packet) in translated(f) {
            for ethertype in [0x8100_u16, 0x88a8] {
                let mut tagged = packet.bytes();
                let [high, low] = ethertype.to_be_bytes();
                tagged.splice(12..12, [high, low, 0, 7]);
                let expected = if hook == "xebec_from_pod" { SHOT } else { OK };
                assert_eq!(
                    kernel.run(hook, &tagged),
                    (expected, tagged.clone()),
                    "{hook}"
                );
                assert_eq!(kernel.run_early(0, &tagged), (PASS, tagged.clone()));
            }
        }
        assert_eq!(kernel.translations(), 0);
    }
}

/// Neighbour discovery is the link's business, whatever the rules say; echo of routers and multicast are not let
/// through as such.
#[test]
fn neighbours_find_each_other_whatever_the_rules() {
    if left_out() {
        return;
    }
    let f = Family::V6;
    let kernel = &mut *filled(f);
    kernel.isolate_web(80);
    kernel.isolate_web_egress();
    kernel.as_web();
    for kind in [133, 135, 136, 143] {
        let sent = icmp(web(f), pod(f), kind, 0, &[0; 20]).bytes();
        assert_eq!(
            kernel.run("xebec_from_pod", &sent),
            (OK, sent.clone()),
            "{kind}"
        );
        let sent = icmp(pod(f), web(f), kind, 0, &[0; 20]).bytes();
        assert_eq!(
            kernel.run("xebec_to_pod", &sent),
            (OK, sent.clone()),
            "{kind}"
        );
        let sent = icmp(client(f), node(f), kind, 0, &[0; 20]).bytes();
        assert_eq!(
            kernel.run("xebec_from_network", &sent),
            (OK, sent.clone()),
            "{kind}"
        );
    }
    let sent = echo(web(f), pod(f), 7).bytes();
    assert_eq!(kernel.run("xebec_from_pod", &sent), (SHOT, sent.clone()));
    // ICMP of the other family is no ICMP.
    let odd = icmp(web(Family::V4), pod(Family::V4), 135, 0, &[0; 20]).bytes();
    assert_eq!(kernel.run("xebec_from_pod", &odd), (SHOT, odd.clone()));
}

/// A packet of IPv6 with an address that stands for one of IPv4 would be taken for one of IPv4.
#[test]
fn mapped_addresses_are_no_addresses_of_packets() {
    if left_out() {
        return;
    }
    let kernel = &mut *filled(Family::V6);
    let mapped = |address: std::net::IpAddr| match address {
        std::net::IpAddr::V4(address) => address.to_ipv6_mapped().into(),
        v6 => v6,
    };
    let (v4, v6) = (Family::V4, Family::V6);
    let sent = tcp(mapped(pod(v4)), mapped(web(v4)), 4000, 80, "S").bytes();
    assert_eq!(kernel.run("xebec_from_pod", &sent), (SHOT, sent.clone()));
    let sent = tcp(pod(v6), mapped(client(v4)), 4000, 80, "S").bytes();
    assert_eq!(kernel.run("xebec_from_pod", &sent), (SHOT, sent.clone()));
    assert_eq!(kernel.run("xebec_to_network", &sent), (OK, sent.clone()));
}

/// Protocols without ports are judged by addresses, and to the outside they bear the node's address like all else.
#[test]
fn protocols_without_ports_go_by_their_addresses() {
    if left_out() {
        return;
    }
    for f in FAMILIES {
        let kernel = &mut *filled(f);
        let sent = other(pod(f), web(f), 47);
        let seen = sent.handed_over(POD_MAC);
        assert_eq!(
            kernel.run("xebec_from_pod", &sent.bytes()),
            (REDIRECT, seen.bytes())
        );
        kernel.isolate_web(80);
        let second = other(pod(f), web(f), 4);
        assert_eq!(kernel.run("xebec_from_pod", &second.bytes()).0, SHOT);
        let out = other(pod(f), client(f), 47);
        let seen = out.from(node(f), 0);
        assert_eq!(
            kernel.run("xebec_to_network", &out.bytes()),
            (OK, seen.bytes())
        );
        // There is one such place for each destination.
        let taken = other(web(f), client(f), 47).bytes();
        assert_eq!(
            kernel.run("xebec_to_network", &taken),
            (SHOT, taken.clone())
        );
        let free = other(web(f), router(f), 47);
        let seen = free.from(node(f), 0);
        assert_eq!(
            kernel.run("xebec_to_network", &free.bytes()),
            (OK, seen.bytes())
        );
    }
}
