//! What a Service without endpoints answers, byte for byte.

use std::io::ErrorKind;
use std::net::{IpAddr, TcpStream, UdpSocket};
use std::sync::Barrier;

use nix::sched::{CloneFlags, unshare};
use xebec_agent::loader::Xdp;
use xebec_agent::network::Device;
use xebec_dataplane_common::flow::{DROPPED, REASON_NO_SERVICE};
use xebec_dataplane_common::service::{DROP_INSIDE, DROP_OUTSIDE, SOURCE_RANGES};

use super::kernel::Shared;
use super::packet::{INIT, refusal};
use super::wires::{Wires, ip};
use super::{
    ACK, FAMILIES, FIN, Family, HERE, Kernel, OK, PASS, POD_MAC, Packet, REDIRECT, RST, SHOT, SYN,
    Why, at, client, error, left_out, node, pod, sctp, service, tcp, udp, web,
};

/// Whoever sends frames.
const THERE: [u8; 6] = [2, 0, 0, 0, 0, 1];

/// A client's address, the Service's, and the program that meets the client's packets.
type Way = (IpAddr, IpAddr, &'static str);

/// The node's device that leads to a host, and the host's addresses.
type Host = (&'static str, fn(Family) -> IpAddr);

const FROM_POD: &str = "xebec_from_pod";
const FROM_NETWORK: &str = "xebec_from_network";

/// Services without endpoints, and who asks for them: pods for ClusterIPs, others for node ports and addresses
/// outside the node.
fn ways() -> (Shared, Vec<Way>) {
    let mut kernel = Kernel::shared();
    kernel.no_backends(30_080);
    let mut ways = Vec::new();
    for f in FAMILIES {
        let outer = at(f, [203, 0, 113, 80]);
        for address in [service(f), outer] {
            kernel.open(address, 30_080, 0, None);
        }
        ways.push((pod(f), service(f), FROM_POD));
        ways.push((client(f), node(f), FROM_NETWORK));
        ways.push((client(f), outer, FROM_NETWORK));
    }
    (kernel, ways)
}

/// A packet to this host's device.
fn here(packet: Packet) -> Packet {
    packet.between(THERE, HERE)
}

/// An answer as it leaves: to the pod's own hardware address, or to whom the frame came from.
fn back(mut answer: Packet, program: &str) -> Vec<u8> {
    answer.label = 0;
    let to = if program == FROM_POD { POD_MAC } else { THERE };
    answer.between(HERE, to).bytes()
}

#[test]
fn tcp_is_reset() {
    if left_out() {
        return;
    }
    let (mut kernel, ways) = ways();
    let mut answered = 0;
    for (client, service, program) in ways {
        let sent = |numbers, flags, data: &'static [u8]| {
            let mut sent = here(tcp(client, service, 4000, 30_080, "")).with(data);
            (sent.numbers, sent.class) = (numbers, 0x2a);
            sent.flags(flags)
        };
        let reset = |numbers, flags| {
            let mut reset = tcp(service, client, 30_080, 4000, "").with(b"");
            (reset.numbers, reset.class, reset.window) = (numbers, 0x28, 0);
            back(reset.flags(flags), program)
        };
        for (numbers, flags, data, expected) in [
            ((7, 0), SYN, &b""[..], ((0, 8), RST | ACK)),
            ((7, 9), SYN, b"early", ((0, 13), RST | ACK)),
            ((u32::MAX, 0), SYN, b"odd", ((0, 3), RST | ACK)),
            // The length of all that a frame takes.
            ((1, 0), SYN, &[0xff; 1440], ((0, 1442), RST | ACK)),
        ] {
            for options in [false, true] {
                let mut sent = sent(numbers, flags, data);
                if options {
                    sent = sent.with_options();
                }
                assert_eq!(
                    kernel.run(program, &sent.bytes()),
                    (REDIRECT, reset(expected.0, expected.1)),
                    "{sent:?}"
                );
                let event = kernel.last_event().unwrap();
                assert_eq!(
                    (event.verdict, event.reason, event.destination),
                    (DROPPED, REASON_NO_SERVICE, service.into())
                );
                assert_ne!(event.service, 0);
                answered += 1;
            }
        }
        // Segments of connections that nobody knows. Those to the node itself are reset by its stack.
        let stack = FAMILIES.map(node).contains(&service);
        for (flags, data, expected) in [
            (ACK, &b"more"[..], ((0x8000_0001, 0), RST)),
            (FIN | ACK, b"", ((0x8000_0001, 0), RST)),
            (SYN | ACK, b"", ((0x8000_0001, 0), RST)),
            (FIN, b"end", ((0, 11), RST | ACK)),
        ] {
            let frame = sent((7, 0x8000_0001), flags, data).bytes();
            let expected = if stack {
                (OK, frame.clone())
            } else {
                answered += 1;
                (REDIRECT, reset(expected.0, expected.1))
            };
            assert_eq!(kernel.run(program, &frame), expected, "{client} {flags}");
        }
        // Nor is a reset answered.
        for flags in [RST, RST | ACK] {
            let frame = sent((7, 9), flags, b"").bytes();
            let (verdict, out) = kernel.run(program, &frame);
            assert_eq!((verdict, out), (OK, frame), "{client} {flags}");
        }
        // XDP leaves it to tc.
        let frame = sent((7, 0), SYN, b"").bytes();
        assert_eq!(kernel.run_early(0, &frame), (PASS, frame.clone()));
    }
    assert_eq!(kernel.refused(), (answered, 0));
    assert_eq!(kernel.dropped(), answered);
    assert_eq!(kernel.translations(), 0);
}

#[test]
fn senders_of_others_learn_that_the_port_is_unreachable() {
    if left_out() {
        return;
    }
    let (mut kernel, ways) = ways();
    for (client, service, program) in ways {
        let sent = here(udp(client, service, 4000, 30_080));
        for sent in [
            sent.clone().with(b""),
            sent.clone().with(b"four"),
            sent.clone().with(b"an odd length"),
            sent.clone().with(&[0xa5; 419]),
            sent.clone().with(&[0xa5; 421]),
            sent.clone().with(&[0xff; 1400]),
            sent.with_options(),
            here(sctp(client, service, 4000, 30_080, INIT)).with(&[3; 16]),
        ] {
            let mut frame = sent.bytes();
            let expected = (REDIRECT, back(refusal(&sent), program));
            assert_eq!(kernel.run(program, &frame), expected, "{sent:?}");
            assert_eq!(kernel.last_event().unwrap().reason, REASON_NO_SERVICE);
            // What fills a short frame up is no part of the packet.
            frame.extend([0x55; 18]);
            assert_eq!(kernel.run(program, &frame), expected, "{sent:?}");
        }
    }
    assert_eq!(kernel.refused().0, 6 * 8 * 2);
}

#[test]
fn what_must_not_be_answered_is_not() {
    if left_out() {
        return;
    }
    let (mut kernel, ways) = ways();
    for (client, service, program) in ways {
        let syn = here(tcp(client, service, 4000, 30_080, "S"));
        // To many, or to another and overheard: a pod's is dropped, the network's is the stack's.
        let left = if program == FROM_POD { SHOT } else { OK };
        for mac in [[0xff; 6], [1, 0, 0x5e, 0, 0, 1], [2, 0, 0, 0, 0, 9]] {
            let frame = syn.clone().between(THERE, mac).bytes();
            assert_eq!(
                kernel.run(program, &frame),
                (left, frame.clone()),
                "{mac:?}"
            );
        }
        // Errors, and parts of datagrams.
        let about = udp(service, client, 30_080, 4000);
        let frame = here(error(client, service, Why::NoPort, &about, 500)).bytes();
        assert_eq!(kernel.run(program, &frame), (OK, frame.clone()));
        let mut later = here(udp(client, service, 4000, 30_080));
        later.fragment(7, 8, false);
        let later = later.bytes();
        assert_eq!(kernel.run(program, &later), (left, later.clone()));
        let mut first = syn.clone();
        first.fragment(8, 0, true);
        let first = first.bytes();
        assert_eq!(kernel.run(program, &first), (SHOT, first.clone()));
        if program == FROM_NETWORK {
            let nobodies = [
                "0.0.0.0",
                "127.0.0.1",
                "224.0.0.1",
                "255.255.255.255",
                "::",
                "ff02::1",
            ];
            for nobody in nobodies.map(|text| text.parse::<IpAddr>().unwrap()) {
                if nobody.is_ipv4() == client.is_ipv4() {
                    let frame = here(udp(nobody, service, 4000, 30_080)).bytes();
                    assert_eq!(
                        kernel.run(program, &frame),
                        (SHOT, frame.clone()),
                        "{nobody}"
                    );
                }
            }
        }
    }
    assert_eq!(kernel.refused().0, 0);
}

/// There are endpoints, but none that may be used from here; or the source is not let in.
#[test]
fn what_is_dropped_is_dropped_silently() {
    if left_out() {
        return;
    }
    let (mut kernel, ways) = ways();
    for (client, service, program) in ways {
        for flags in [DROP_INSIDE | DROP_OUTSIDE, SOURCE_RANGES] {
            kernel.open(service, 30_081, flags, None);
            for packet in [
                tcp(client, service, 4000, 30_081, "S"),
                udp(client, service, 4000, 30_081),
                sctp(client, service, 4000, 30_081, INIT),
            ] {
                let frame = here(packet).bytes();
                assert_eq!(
                    kernel.run(program, &frame),
                    (SHOT, frame.clone()),
                    "{client}"
                );
            }
        }
    }
    assert_eq!(kernel.refused().0, 0);
}

/// A Service that gets its first endpoint serves the flow that was refused just before, and one that loses its last
/// refuses what it had.
#[test]
fn endpoints_come_and_go() {
    if left_out() {
        return;
    }
    for f in FAMILIES {
        let mut kernel = Kernel::shared();
        let sent = here(udp(pod(f), service(f), 4000, 53));
        let refused = (REDIRECT, back(refusal(&sent), FROM_POD));
        kernel.open(service(f), 53, 0, None);
        assert_eq!(kernel.run(FROM_POD, &sent.bytes()), refused);
        assert_eq!(kernel.refused().0, 1);
        kernel.open(service(f), 53, 0, Some((web(f), 5353)));
        let served = sent.to(web(f), 5353).handed_over(POD_MAC);
        assert_eq!(
            kernel.run(FROM_POD, &sent.bytes()),
            (REDIRECT, served.bytes())
        );
        kernel.end_backend();
        kernel.open(service(f), 53, 0, None);
        assert_eq!(kernel.run(FROM_POD, &sent.bytes()), refused);
        assert_eq!(kernel.refused().0, 2);
    }
}

/// Real sockets in namespaces, whose kernels leave checksums to the last device: both a pod's and an outside client's
/// learn at once that nobody is there.
#[test]
fn sockets_are_refused_at_once() {
    if left_out() {
        return;
    }
    Wires::with(|_| {
        let mut kernel = Kernel::own();
        for address in FAMILIES.map(service) {
            kernel.open(address, 80, 0, None);
        }
        // By devices that leave checksums to others, and by one that makes the checksums that were left to it.
        let whose: [Host; 3] = [("pod0", pod), ("client0", client), ("client1", client)];
        for (device, address) in whose {
            let (ready, go_on) = (Barrier::new(2), Barrier::new(2));
            std::thread::scope(|scope| {
                let (ready, go_on) = (&ready, &go_on);
                let (tell, hear) = std::sync::mpsc::channel();
                let host = scope.spawn(move || {
                    unshare(CloneFlags::CLONE_NEWNET).unwrap();
                    tell.send(nix::unistd::gettid()).unwrap();
                    ready.wait();
                    go_on.wait();
                    for address in FAMILIES.map(address) {
                        let rest = if address.is_ipv4() { "/32 dev eth0" } else { "/128 dev eth0 nodad" };
                        ip(&format!("addr add {address}{rest}"));
                    }
                    ip("link set eth0 up");
                    for (gateway, family) in [("169.254.1.1", "-4"), ("fe80::1", "-6")] {
                        ip(&format!("{family} neigh replace {gateway} dev eth0 lladdr 02:00:00:00:02:01 nud permanent"));
                        ip(&format!("{family} route add default via {gateway} dev eth0 onlink"));
                    }
                    go_on.wait();
                    FAMILIES.map(service).into_iter().for_each(ask);
                });
                let thread = hear.recv().unwrap();
                ready.wait();
                let namespace = format!("/proc/{}/task/{thread}/ns/net", std::process::id());
                ip(&format!(
                    "link add {device} address 02:00:00:00:02:01 type veth peer name eth0 address 02:00:00:00:00:09 netns {namespace}"
                ));
                ip(&format!("link set {device} up"));
                if device == "client1" {
                    let mut ethtool = std::process::Command::new("ethtool");
                    let off = ethtool.args(["-K", device, "tx", "off"]).output().unwrap();
                    assert!(off.status.success(), "{off:?}");
                }
                if device == "pod0" {
                    kernel.attach_pod(device);
                } else {
                    let device = Device {
                        index: nix::net::if_::if_nametoindex(device).unwrap(),
                        name: device.to_owned(),
                        bus: None,
                    };
                    kernel.attach(&[device], Xdp::Off).unwrap();
                }
                go_on.wait();
                // A device sends nothing until the kernel has seen to it that the other end is up.
                while !ip(&format!("link show {device}")).contains("state UP") {
                    std::thread::sleep(std::time::Duration::from_millis(10));
                }
                go_on.wait();
                if let Err(panic) = host.join() {
                    std::panic::resume_unwind(panic);
                }
            });
        }
        // Each at once: an answer that was not understood would have been asked for again.
        assert_eq!(kernel.refused().0, 3 * 2 * 3);
    });
}

/// A connection, and datagrams, a short and a long one.
fn ask(service: IpAddr) {
    let limit = std::time::Duration::from_secs(3);
    let to = (service, 80).into();
    let error = TcpStream::connect_timeout(&to, limit).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::ConnectionRefused, "{service}");
    let any = if service.is_ipv4() {
        "0.0.0.0:0"
    } else {
        "[::]:0"
    };
    for data in [&b"question"[..], &[7; 1400]] {
        let socket = UdpSocket::bind(any).unwrap();
        socket.set_read_timeout(Some(limit)).unwrap();
        socket.connect(to).unwrap();
        socket.send(data).unwrap();
        let error = socket.recv(&mut [0; 1]).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::ConnectionRefused, "{service}");
    }
}
