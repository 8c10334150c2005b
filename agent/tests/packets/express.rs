//! Frames through the XDP program, by `BPF_PROG_TEST_RUN`: byte for byte what tc makes of them, or untouched.

use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use xebec_agent::loader::{By, Xdp};

use super::wires::{OTHER_NODE, OWN, ROUTER, Wires, ip, neighbour};
use super::{
    FAMILIES, Family, Kernel, OK, PASS, Packet, REDIRECT, SENT_ON, TX, Why, at, client, echo,
    error, far_node, icmp, left_out, node, source_port, tcp, udp, web,
};

/// A client outside, a node port, and a backend on this node: rewritten, and on to the stack.
#[test]
fn to_a_pod_of_this_node() {
    if left_out() {
        return;
    }
    for f in FAMILIES {
        let mut without_checksum = udp(client(f), node(f), 4000, 30_080);
        without_checksum.no_checksum = true;
        for sent in [
            tcp(client(f), node(f), 4000, 30_080, "S"),
            udp(client(f), node(f), 4000, 30_080),
            without_checksum,
        ] {
            let mut kernel = Kernel::shared();
            kernel.serve_early();
            kernel.node_port(30_080, web(f), 8080);
            let mut expected = sent.clone();
            (expected.destination, expected.destination_port) = (web(f), 8080);
            let (verdict, out) = kernel.run_early(0, &sent.bytes());
            assert_eq!((verdict, &out), (PASS, &expected.bytes()), "{sent:?}");
            // tc sees it next, and does not translate it again.
            assert_eq!(kernel.run("xebec_from_network", &out), (OK, out));
            assert_eq!(kernel.translated(), (0, 1));
            // The answer of the pod finds the translation.
            let mut answer = expected.answer();
            answer.no_checksum = sent.no_checksum;
            let mut back = answer.clone();
            (back.source, back.source_port) = (node(f), 30_080);
            assert_eq!(
                kernel.run("xebec_to_network", &answer.bytes()),
                (OK, back.bytes())
            );
        }
    }
}

#[test]
fn what_is_not_simple_or_not_translated_passes_untouched() {
    if left_out() {
        return;
    }
    for f in FAMILIES {
        let mut kernel = Kernel::shared();
        kernel.node_port(30_080, web(f), 8080);
        let simple = || tcp(client(f), node(f), 4000, 30_080, "S");
        let options = simple().with_options();
        let (mut first, mut later, mut last) = (simple(), simple(), simple());
        first.fragment(7, 0, true);
        later.fragment(7, 64, false);
        last.ttl = 1;
        let quoted = udp(node(f), client(f), 30_080, 4000);
        let mut tagged = simple().bytes();
        tagged.splice(12..12, [0x81, 0, 0, 7]);
        let mut other = simple().bytes();
        let wrong: u16 = if f == Family::V4 { 0x86dd } else { 0x0800 };
        other[12..14].copy_from_slice(&wrong.to_be_bytes());
        for frame in [
            options.bytes(),
            first.bytes(),
            later.bytes(),
            last.bytes(),
            tagged,
            other,
            tcp(client(f), node(f), 4000, 22, "S").bytes(),
            tcp(client(f), node(f), 4000, 30_080, "A").bytes(),
            tcp(client(f), web(f), 4000, 30_080, "S").bytes(),
            error(client(f), node(f), Why::NoPort, &quoted, 500).bytes(),
            echo(client(f), node(f), 1).bytes(),
        ] {
            assert_eq!(
                kernel.run_early(0, &frame),
                (PASS, frame.clone()),
                "{frame:02x?}"
            );
        }
        let end = simple().transport_at() + 20;
        let whole = simple().bytes();
        for length in 14..end {
            let cut = &whole[..length];
            assert_eq!(kernel.run_early(0, cut), (PASS, cut.to_vec()), "{length}");
        }
        kernel.no_backends(30_080);
        assert_eq!(kernel.run_early(0, &whole), (PASS, whole.clone()));
        assert_eq!(kernel.translated(), (0, 0));
    }
}

/// A frame after it was sent on: one hop less, other hardware addresses.
fn sent_on(packet: &Packet, from: [u8; 6], to: [u8; 6]) -> Vec<u8> {
    let mut sent = packet.clone();
    sent.ttl -= 1;
    (sent.mac_source, sent.mac_destination) = (from, to);
    sent.bytes()
}

/// The backend is on another node: the frame goes back out, and the answer to the client, too.
#[test]
fn to_a_pod_of_another_node_and_back() {
    if left_out() {
        return;
    }
    Wires::with(|wires| {
        let mut kernel = Kernel::own();
        for f in FAMILIES {
            for (far, device, verdict) in [([10, 244, 1, 5], 0, TX), ([10, 244, 2, 5], 1, SENT_ON)]
            {
                let far = at(f, far);
                kernel.reset();
                kernel.attach(&wires.devices, Xdp::Native).unwrap();
                kernel.node_port(30_080, far, 8080);
                for sent in [
                    tcp(client(f), node(f), 4000, 30_080, "S"),
                    udp(client(f), node(f), 4001, 30_080),
                ] {
                    let (found, out) = kernel.run_early(wires.index(), &sent.bytes());
                    assert_eq!(found, verdict, "{sent:?}");
                    let mut expected = sent.clone();
                    (expected.source, expected.source_port) = (node(f), source_port(&out));
                    (expected.destination, expected.destination_port) = (far, 8080);
                    assert!(expected.source_port >= 61_000);
                    assert_eq!(out, sent_on(&expected, OWN[device], OTHER_NODE));
                    let answer = expected.answer();
                    let mut expected = answer.clone();
                    (expected.source, expected.source_port) = (node(f), 30_080);
                    (expected.destination, expected.destination_port) =
                        (client(f), sent.source_port);
                    assert_eq!(
                        kernel.run_early(wires.index(), &answer.bytes()),
                        (TX, sent_on(&expected, OWN[0], ROUTER))
                    );
                }
                assert_eq!(kernel.translated(), (0, 4));
            }
            // A device that is no hardware sends back as if it had come by another.
            kernel.reset();
            kernel.attach(&wires.devices, Xdp::Native).unwrap();
            kernel.node_port(30_080, at(f, [10, 244, 2, 5]), 8080);
            let sent = tcp(client(f), node(f), 4000, 30_080, "S").bytes();
            let (verdict, _) = kernel.run_early(wires.devices[1].index, &sent);
            assert_eq!(verdict, SENT_ON);
        }
    });
}

/// What XDP can't send passes untouched, nothing is entered for it, and tc does it.
#[test]
fn what_it_can_not_send_is_left_to_tc() {
    if left_out() {
        return;
    }
    Wires::with(|wires| {
        let mut kernel = Kernel::own();
        for f in FAMILIES {
            let sent = tcp(client(f), node(f), 4000, 30_080, "S").bytes();
            let (near, other) = (at(f, [10, 244, 1, 5]), at(f, [10, 244, 2, 5]));
            for far in [near, other] {
                kernel.reset();
                // The other node's device is without XDP.
                kernel.attach(&wires.devices[..1], Xdp::Native).unwrap();
                kernel.node_port(30_080, far, 8080);
                if far == near {
                    neighbour("del", far_node(f), 0, OTHER_NODE);
                }
                assert_eq!(
                    kernel.run_early(wires.index(), &sent),
                    (PASS, sent.clone()),
                    "{far}"
                );
                assert_eq!((kernel.translated(), kernel.translations()), ((0, 0), 0));
                assert_eq!(kernel.run("xebec_from_network", &sent).0, REDIRECT);
                assert_eq!((kernel.translated(), kernel.translations()), ((1, 0), 2));
                // The flow that tc began is XDP's from when the neighbour is known.
                neighbour("replace", far_node(f), 0, OTHER_NODE);
                let more = tcp(client(f), node(f), 4000, 30_080, "A").bytes();
                let verdict = kernel.run_early(wires.index(), &more).0;
                assert_eq!(verdict, if far == near { TX } else { PASS }, "{far}");
            }
        }
        // Too long for the way: tc answers for it. IPv6 has no way that is so short.
        let f = Family::V4;
        let (near, sent) = (
            at(f, [10, 244, 1, 5]),
            tcp(client(f), node(f), 4000, 30_080, "S").bytes(),
        );
        kernel.reset();
        kernel.attach(&wires.devices, Xdp::Native).unwrap();
        kernel.node_port(30_080, near, 8080);
        ip("link set wire0 mtu 68");
        assert_eq!(kernel.run_early(wires.index(), &sent), (PASS, sent.clone()));
        ip("link set wire0 mtu 1500");
        assert_eq!(kernel.run_early(wires.index(), &sent).0, TX);
    });
}

/// Many packets of all kinds, with right and with wrong checksums: whatever XDP changes, tc changes alike.
#[test]
fn random_packets_become_what_tc_makes_of_them() {
    if left_out() {
        return;
    }
    Wires::with(|wires| {
        let mut kernel = Kernel::own();
        for f in FAMILIES {
            kernel.reset();
            kernel.attach(&wires.devices, Xdp::Native).unwrap();
            // With one port alone, tc's choice is the same as XDP's. Each node port has one backend.
            kernel.settings(super::settings(61_000, 1));
            for port in 0..PORTS {
                let backend = match port % 3 {
                    0 => web(f),
                    1 => at(f, [10, 244, 1, port as u8]),
                    _ => at(f, [10, 244, 2, port as u8]),
                };
                kernel.node_port(30_000 + port, backend, 8000 + port);
            }
            let seed = rand::random();
            eprintln!("seed {seed}");
            let mut random = StdRng::seed_from_u64(seed);
            let (mut stayed, mut sent_on, mut untouched) = (0, 0, 0);
            for _ in 0..20_000 {
                let frame = any_frame(&mut random, f);
                let (verdict, early) = kernel.run_early(wires.index(), &frame);
                if early == frame {
                    assert_eq!(verdict, PASS);
                    untouched += 1;
                    continue;
                }
                let (tc, mut late) = kernel.run("xebec_from_network", &frame);
                if tc == REDIRECT {
                    // The stack gives it its hardware addresses afterwards.
                    late[..12].copy_from_slice(&early[..12]);
                    assert!([TX, SENT_ON].contains(&verdict));
                    sent_on += 1;
                } else {
                    assert_eq!((tc, verdict), (OK, PASS));
                    stayed += 1;
                }
                assert_eq!(early, late, "of {frame:02x?}");
            }
            eprintln!("{stayed} stayed, {sent_on} went on, {untouched} untouched");
            assert!(stayed > 1000 && sent_on > 1000 && untouched > 1000);
        }
    });
}

/// Node ports of the random test.
const PORTS: u16 = 30;

fn any_frame(random: &mut StdRng, f: Family) -> Vec<u8> {
    let port = random.random_range(0..PORTS);
    let far = if port % 3 == 1 { 1 } else { 2 };
    let mut packet = match random.random_range(0..10) {
        // Answers of backends, and strangers' packets to the same port.
        0..3 => {
            let from = at(f, [10, 244, far, port as u8]);
            let flags = ["SA", "A", "FA", "R"][random.random_range(0..4)];
            match random.random_bool(0.5) {
                true => tcp(from, node(f), 8000 + port, 61_000, flags),
                false => udp(from, node(f), 8000 + port, 61_000),
            }
        }
        // Clients, of whom each has a few ports.
        3..9 => {
            let (own, flags) = (
                4000 + random.random_range(0..3),
                ["S", "S", "A", "FA", "R"][random.random_range(0..5)],
            );
            match random.random_bool(0.5) {
                true => tcp(client(f), node(f), own, 30_000 + port, flags),
                false => udp(client(f), node(f), own, 30_000 + port),
            }
        }
        _ => {
            let kinds = if f == Family::V4 {
                [0, 8, 13]
            } else {
                [128, 129, 135]
            };
            let kind = kinds[random.random_range(0..3)];
            icmp(client(f), node(f), kind, 0, &[0; 8])
        }
    };
    packet.ttl = if random.random_bool(0.1) {
        random.random_range(0..3)
    } else {
        random.random()
    };
    packet.no_checksum = random.random_bool(0.2);
    if random.random_bool(0.05) {
        packet = packet.with_options();
    }
    let (mut frame, at) = (packet.bytes(), packet.transport_at());
    // A wrong checksum stays as wrong as it was; those at the ends of their range are of interest, too.
    let checksum = at
        + match packet.protocol() {
            6 => 16,
            17 => 6,
            _ => 2,
        };
    if random.random_bool(0.2) && frame.len() > checksum + 2 {
        let odd = [0, 1, 0xfffe, 0xffff, random.random()][random.random_range(0..5)];
        frame[checksum..checksum + 2].copy_from_slice(&u16::to_be_bytes(odd));
    }
    if f == Family::V4 && random.random_bool(0.1) {
        let odd = [0, 0xffff, 0xfeff, random.random()][random.random_range(0..4)];
        frame[24..26].copy_from_slice(&u16::to_be_bytes(odd));
    }
    if random.random_bool(0.02) {
        frame.truncate(random.random_range(14..frame.len()));
    }
    frame
}

/// By default no device gets it that is no hardware; it is taken over by the next agent, and goes when it is not
/// wanted any more.
#[test]
fn the_hook_is_attached_where_it_is_wanted() {
    if left_out() {
        return;
    }
    Wires::with(|wires| {
        let mut kernel = Kernel::own();
        let mut only = wires.devices[0].clone();
        only.bus = None;
        let only = &[only][..];
        let program = || -> Option<String> {
            let shown = ip("-d link show wire0");
            let mode = shown
                .lines()
                .next()?
                .split(' ')
                .find(|word| word.starts_with("xdp"))?;
            let id = shown.split("prog/xdp id ").nth(1)?.split(' ').next()?;
            Some(format!("{mode} {id}"))
        };
        let by = kernel.attach(only, Xdp::Auto).unwrap();
        assert!(
            matches!(&by[..], [By::Tc(why)] if why.contains("no hardware")),
            "{by:?}"
        );
        assert_eq!(program(), None);
        // Hardware whose driver can't: tc alone, and asked for by name an error.
        let mut dummy = wires.devices[0].clone();
        ip("link add nic0 type bridge");
        dummy.name = "nic0".into();
        dummy.index = nix::net::if_::if_nametoindex("nic0").unwrap();
        dummy.bus = Some("pci".into());
        let dummy = [dummy];
        let by = kernel.attach(&dummy, Xdp::Auto).unwrap();
        assert!(
            matches!(&by[..], [By::Tc(why)] if why.contains("nic0 refuses")),
            "{by:?}"
        );
        let error = format!("{:#}", kernel.attach(&dummy, Xdp::Native).unwrap_err());
        assert!(
            error.contains("--xdp auto") && error.contains("native mode"),
            "{error}"
        );

        assert_eq!(kernel.attach(only, Xdp::Native).unwrap(), [By::Native]);
        let first = program().unwrap();
        assert!(first.starts_with("xdp "), "{first}");
        // The next agent's program takes the place of this one's.
        kernel.next_agent();
        assert_eq!(program().unwrap(), first);
        assert_eq!(kernel.attach(only, Xdp::Native).unwrap(), [By::Native]);
        let second = program().unwrap();
        assert!(second.starts_with("xdp ") && second != first, "{second}");
        assert_eq!(kernel.attach(only, Xdp::Generic).unwrap(), [By::Generic]);
        assert!(program().unwrap().starts_with("xdpgeneric "));
        assert_eq!(kernel.attach(only, Xdp::Off).unwrap().len(), 1);
        // Links end a moment after their pins.
        let mut waits = 0;
        while program().is_some() {
            waits += 1;
            assert!(waits < 100, "{:?}", program());
            std::thread::sleep(std::time::Duration::from_millis(20));
        }
    });
}

/// A tag that the kernel took out of a frame still makes it another network's.
#[test]
fn a_tagged_frame_is_not_translated_by_tc() {
    if left_out() {
        return;
    }
    Wires::with(|wires| {
        let mut kernel = Kernel::own();
        kernel.attach(&wires.devices, Xdp::Off).unwrap();
        for (index, f) in (1..).zip(FAMILIES) {
            kernel.node_port(30_080, web(f), 8080);
            let mut sent = tcp(client(f), node(f), 4000, 30_080, "S");
            sent.mac_destination = OWN[0];
            let mut tagged = sent.bytes();
            tagged.splice(12..12, [0x81, 0, 0, 7]);
            wires.send(0, &tagged);
            // Frames arrive in their order: when the second was translated, the first was not.
            sent.source_port = 4001;
            wires.send(0, &sent.bytes());
            let mut waits = 0;
            while kernel.translated().0 < index {
                waits += 1;
                assert!(waits < 100, "{:?}", kernel.translated());
                std::thread::sleep(std::time::Duration::from_millis(20));
            }
            assert_eq!(kernel.translated(), (index, 0));
            assert!(kernel.flow(&sent).is_some());
            sent.source_port = 4000;
            assert_eq!(kernel.flow(&sent), None);
        }
    });
}
