//! What a Service without endpoints answers, byte for byte.

use std::io::ErrorKind;
use std::net::{IpAddr, TcpStream, UdpSocket};
use std::sync::Barrier;

use nix::sched::{CloneFlags, unshare};
use xebec_agent::loader::Xdp;
use xebec_agent::network::Device;
use xebec_dataplane_common::flow::{DROPPED, REASON_NO_SERVICE};
use xebec_dataplane_common::service::{DROP_INSIDE, DROP_OUTSIDE, SOURCE_RANGES};

use super::both::{Datagram, HERE, THERE, at, error, sctp, tcp, udp};
use super::wires::{Wires, ip};
use super::{Kernel, OK, PASS, POD_MAC, REDIRECT, SHOT, left_out};

const FIN: u8 = 1;
const SYN: u8 = 2;
const RST: u8 = 4;
const ACK: u8 = 16;

/// A client's address, the Service's, and the program that meets the client's packets.
type Way = (IpAddr, IpAddr, &'static str);

const FROM_POD: &str = "xebec_from_pod";
const FROM_NETWORK: &str = "xebec_from_network";

/// Services without endpoints, and who asks for them: pods for ClusterIPs, others for node ports and addresses
/// outside the node.
fn ways() -> (Kernel, Vec<Way>) {
    let mut kernel = Kernel::new();
    let node6 = at("2001:db8::10");
    kernel.node6(node6);
    kernel.pod_at(at("fd00::5"), true);
    for address in [
        "10.96.0.9",
        "fd96::9",
        "0.0.0.0",
        "::",
        "203.0.113.80",
        "2001:db8:80::1",
    ] {
        kernel.service(at(address), 30_080, 0, None);
    }
    let ways = [
        ("10.244.0.5", "10.96.0.9", FROM_POD),
        ("fd00::5", "fd96::9", FROM_POD),
        ("198.51.100.7", "192.0.2.10", FROM_NETWORK),
        ("2001:db8:7::7", "2001:db8::10", FROM_NETWORK),
        ("198.51.100.7", "203.0.113.80", FROM_NETWORK),
        ("2001:db8:7::7", "2001:db8:80::1", FROM_NETWORK),
    ];
    let ways = ways.map(|(client, service, program)| (at(client), at(service), program));
    (kernel, ways.to_vec())
}

/// An answer as it leaves: to the pod's own hardware address, or to whom the frame came from.
fn back(mut answer: Datagram, program: &str) -> Vec<u8> {
    answer.mac_source = HERE;
    answer.mac_destination = if program == FROM_POD { POD_MAC } else { THERE };
    answer.bytes()
}

#[test]
fn tcp_is_reset() {
    if left_out() {
        return;
    }
    let (mut kernel, ways) = ways();
    let mut answered = 0;
    for (client, service, program) in ways {
        let ports = (4000, 30_080);
        let sent = |numbers, flags, data: &[u8]| {
            let mut sent = tcp((client, service), ports, numbers, flags, 8192, data);
            sent.class = 0x2a;
            sent
        };
        let reset = |numbers, flags| {
            let mut reset = tcp((service, client), (30_080, 4000), numbers, flags, 0, &[]);
            reset.class = 0x28;
            back(reset, program)
        };
        for (numbers, flags, data, expected) in [
            ((7, 0), SYN, &b""[..], ((0, 8), RST | ACK)),
            ((7, 9), SYN, b"early", ((0, 13), RST | ACK)),
            ((u32::MAX, 0), SYN, b"odd", ((0, 3), RST | ACK)),
            // The length of all that a frame takes.
            ((1, 0), SYN, &[0xff; 1460], ((0, 1462), RST | ACK)),
        ] {
            let frame = sent(numbers, flags, data).bytes();
            let expected = reset(expected.0, expected.1);
            assert_eq!(
                kernel.run(program, &frame),
                (REDIRECT, expected),
                "{client} {flags}"
            );
            let event = kernel.last_event().unwrap();
            assert_eq!(
                (event.verdict, event.reason, event.destination),
                (DROPPED, REASON_NO_SERVICE, service.into())
            );
            assert_ne!(event.service, 0);
            answered += 1;
        }
        // Segments of connections that nobody knows. Those to the node itself are reset by its stack.
        let stack = service == at("192.0.2.10") || service == at("2001:db8::10");
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
        let ends = (client, service);
        let ports = (4000, 30_080);
        for sent in [
            udp(ends, ports, b""),
            udp(ends, ports, b"four"),
            udp(ends, ports, b"an odd length"),
            udp(ends, ports, &[0xa5; 419]),
            udp(ends, ports, &[0xa5; 421]),
            udp(ends, ports, &[0xff; 1400]),
            sctp(ends, ports, 1, &[3; 16]),
        ] {
            let mut frame = sent.bytes();
            let end = frame.len().min(14 + 448);
            let (kind, code) = if client.is_ipv4() { (3, 3) } else { (1, 4) };
            let mut expected = error((service, client), kind, code, &frame[14..end]);
            expected.class = 0xc0;
            let expected = (REDIRECT, back(expected, program));
            assert_eq!(kernel.run(program, &frame), expected, "{sent:?}");
            assert_eq!(kernel.last_event().unwrap().reason, REASON_NO_SERVICE);
            // What fills a short frame up is no part of the packet.
            frame.extend([0x55; 18]);
            assert_eq!(kernel.run(program, &frame), expected, "{sent:?}");
        }
    }
    assert_eq!(kernel.refused().0, 6 * 7 * 2);
}

#[test]
fn what_must_not_be_answered_is_not() {
    if left_out() {
        return;
    }
    let (mut kernel, ways) = ways();
    for (client, service, program) in ways {
        let ends = (client, service);
        let syn = tcp(ends, (4000, 30_080), (7, 0), SYN, 8192, b"");
        // To many, or to another and overheard: a pod's is dropped, the network's is the stack's.
        let left = if program == FROM_POD { SHOT } else { OK };
        for mac in [[0xff; 6], [1, 0, 0x5e, 0, 0, 1], [2, 0, 0, 0, 0, 9]] {
            let mut sent = syn.clone();
            sent.mac_destination = mac;
            let frame = sent.bytes();
            assert_eq!(
                kernel.run(program, &frame),
                (left, frame.clone()),
                "{mac:?}"
            );
        }
        // Errors, and parts of datagrams.
        let quote = udp((service, client), (30_080, 4000), b"").bytes();
        let frame = error(ends, if client.is_ipv4() { 3 } else { 1 }, 3, &quote[14..]).bytes();
        assert_eq!(kernel.run(program, &frame), (OK, frame.clone()));
        if client.is_ipv4() {
            let mut later = udp(ends, (4000, 30_080), b"").bytes();
            later[20..22].copy_from_slice(&[0, 1]);
            assert_eq!(kernel.run(program, &later), (left, later.clone()));
            let mut first = syn.bytes();
            first[20..22].copy_from_slice(&[0x20, 0]);
            assert_eq!(kernel.run(program, &first), (SHOT, first.clone()));
        }
        if program == FROM_NETWORK {
            let nobodies = [
                "0.0.0.0",
                "127.0.0.1",
                "224.0.0.1",
                "255.255.255.255",
                "::",
                "ff02::1",
            ];
            for nobody in nobodies.map(at) {
                if nobody.is_ipv4() == client.is_ipv4() {
                    let frame = udp((nobody, service), (4000, 30_080), b"").bytes();
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
            kernel.service(service, 30_081, flags, None);
            let ends = (client, service);
            for frame in [
                tcp(ends, (4000, 30_081), (7, 0), SYN, 8192, b"").bytes(),
                udp(ends, (4000, 30_081), b"").bytes(),
            ] {
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
    let mut kernel = Kernel::new();
    let (pod, service) = (at("10.244.0.5"), at("10.96.0.9"));
    let sent = udp((pod, service), (4000, 53), b"?").bytes();
    kernel.service(service, 53, 0, None);
    assert_eq!(kernel.run(FROM_POD, &sent).0, REDIRECT);
    assert_eq!(kernel.refused().0, 1);
    kernel.service(service, 53, 0, Some((at("10.244.0.6"), 5353)));
    let mut served = udp((pod, at("10.244.0.6")), (4000, 5353), b"?");
    (served.mac_source, served.mac_destination, served.hops) = (HERE, POD_MAC, 63);
    assert_eq!(kernel.run(FROM_POD, &sent), (REDIRECT, served.bytes()));
    kernel.end_backend();
    kernel.service(service, 53, 0, None);
    let (verdict, out) = kernel.run(FROM_POD, &sent);
    assert_eq!((verdict, out[23]), (REDIRECT, 1));
    assert_eq!(kernel.refused().0, 2);
}

/// Real sockets in namespaces, whose kernels leave checksums to the last device: both a pod's and an outside client's
/// learn at once that nobody is there.
#[test]
fn sockets_are_refused_at_once() {
    if left_out() {
        return;
    }
    Wires::with(|_| {
        let mut kernel = Kernel::new();
        for address in ["10.96.0.9", "fd96::9"] {
            kernel.service(at(address), 80, 0, None);
        }
        let own: [&[&str]; 2] = [
            &["10.244.0.5/32", "fd00::5/128"],
            &["198.51.100.7/32", "2001:db8:7::7/128"],
        ];
        // By devices that leave checksums to others, and by one that makes the checksums that were left to it.
        let devices = ["pod0", "client0", "client1"]
            .into_iter()
            .zip([own[0], own[1], own[1]]);
        for (device, addresses) in devices {
            let (ready, go_on) = (Barrier::new(2), Barrier::new(2));
            std::thread::scope(|scope| {
                let (ready, go_on) = (&ready, &go_on);
                let (tell, hear) = std::sync::mpsc::channel();
                let host = scope.spawn(move || {
                    unshare(CloneFlags::CLONE_NEWNET).unwrap();
                    tell.send(nix::unistd::gettid()).unwrap();
                    ready.wait();
                    go_on.wait();
                    for address in addresses {
                        let nodad = if address.contains(':') { " nodad" } else { "" };
                        ip(&format!("addr add {address} dev eth0{nodad}"));
                    }
                    ip("link set eth0 up");
                    for (gateway, family) in [("169.254.1.1", "-4"), ("fe80::1", "-6")] {
                        ip(&format!("{family} neigh replace {gateway} dev eth0 lladdr 02:00:00:00:02:01 nud permanent"));
                        ip(&format!("{family} route add default via {gateway} dev eth0 onlink"));
                    }
                    go_on.wait();
                    for service in ["10.96.0.9", "fd96::9"].map(at) {
                        ask(service);
                    }
                });
                let thread = hear.recv().unwrap();
                ready.wait();
                let namespace = format!("/proc/{}/task/{thread}/ns/net", std::process::id());
                ip(&format!(
                    "link add {device} address 02:00:00:00:02:01 type veth peer name eth0 address 02:00:00:00:02:02 netns {namespace}"
                ));
                ip(&format!("link set {device} up"));
                if device == "client1" {
                    let mut ethtool = std::process::Command::new("ethtool");
                    let off = ethtool.args(["-K", device, "tx", "off"]).output().unwrap();
                    assert!(off.status.success(), "{off:?}");
                }
                let index = nix::net::if_::if_nametoindex(device).unwrap();
                if device == "pod0" {
                    for address in ["10.244.0.5", "fd00::5"] {
                        kernel.pod_on(at(address), index, [2, 0, 0, 0, 2, 2]);
                    }
                    kernel.loaded.attach_pod(device).unwrap();
                } else {
                    let name = device.to_owned();
                    let device = Device {
                        index,
                        name,
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
        assert_eq!(kernel.refused().0, 3 * 2 * 3);
    });
}

/// A connection, and datagrams, a short and a long one.
fn ask(service: IpAddr) {
    let limit = std::time::Duration::from_secs(3);
    let to = (service, 80).into();
    let began = std::time::Instant::now();
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
    // At once, and not when the first segment is sent again.
    assert!(began.elapsed() < std::time::Duration::from_millis(900));
}
