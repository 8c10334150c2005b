//! A network namespace with devices, routes and neighbours, for frames that leave the node.

use std::net::IpAddr;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::process::Command;
use std::time::{Duration, Instant};

use nix::sched::{CloneFlags, unshare};
use xebec_agent::network::Device;

use super::{FAMILIES, at};

/// The hardware address of the router to the client, and of the other node.
pub const ROUTER: [u8; 6] = [2, 0, 0, 0, 0, 0xaa];
pub const OTHER_NODE: [u8; 6] = [2, 0, 0, 0, 0, 0xbb];
/// Hardware addresses of the node's own devices.
pub const OWN: [[u8; 6]; 2] = [[2, 0, 0, 0, 1, 0], [2, 0, 0, 0, 1, 1]];

/// Two devices of a node in a namespace that ends with its thread: by `wire0` the client and the node that has
/// 10.244.1.0/24 are reached, by `wire1` the one that has 10.244.2.0/24.
pub struct Wires {
    pub devices: [Device; 2],
}

impl Wires {
    /// Runs a test there, on a thread of its own.
    pub fn with(test: impl FnOnce(&Self) + Send) {
        namespace(|| test(&Self::new()));
    }

    fn new() -> Self {
        ip("link set lo up");
        for (index, network) in [(0, "192.0.2"), (1, "203.0.113")] {
            let mac = format!("02:00:00:00:01:0{index}");
            ip(&format!(
                "link add wire{index} address {mac} type veth peer name far{index}"
            ));
            ip(&format!("addr add {network}.10/24 dev wire{index}"));
            let network = network.replace('.', ":");
            ip(&format!(
                "-6 addr add fd00:{network}::10/64 dev wire{index} nodad"
            ));
            for device in ["wire", "far"] {
                ip(&format!("link set {device}{index} addrgenmode none"));
                ip(&format!("link set {device}{index} up"));
            }
        }
        for f in FAMILIES {
            neighbour("replace", at(f, [192, 0, 2, 1]), 0, ROUTER);
            neighbour("replace", at(f, [192, 0, 2, 20]), 0, OTHER_NODE);
            neighbour("replace", at(f, [203, 0, 113, 20]), 1, OTHER_NODE);
        }
        for route in [
            "198.51.100.0/24 via 192.0.2.1",
            "10.244.1.0/24 via 192.0.2.20",
            "10.244.2.0/24 via 203.0.113.20",
            "fd00:198:51:100::/64 via fd00:192:0:2::1",
            "fd00:10:244:1::/64 via fd00:192:0:2::20",
            "fd00:10:244:2::/64 via fd00:203:0:113::20",
        ] {
            ip(&format!("route add {route}"));
        }
        forward();
        Self {
            // The first is as if it were hardware.
            devices: [(0, Some("pci")), (1, None)].map(|(index, bus)| {
                let name = format!("wire{index}");
                Device {
                    index: nix::net::if_::if_nametoindex(name.as_str()).unwrap(),
                    name,
                    bus: bus.map(str::to_owned),
                }
            }),
        }
    }

    /// Sends a frame to a device from its other end.
    pub fn send(&self, device: u8, frame: &[u8]) {
        let index = nix::net::if_::if_nametoindex(format!("far{device}").as_str()).unwrap();
        // SAFETY: the structure holds numbers alone, of which all may be 0.
        let mut whom: libc::sockaddr_ll = unsafe { std::mem::zeroed() };
        whom.sll_family = libc::AF_PACKET as u16;
        whom.sll_ifindex = index as i32;
        // SAFETY: the socket is closed here, and the kernel reads frame and address within their lengths.
        unsafe {
            let socket = libc::socket(libc::AF_PACKET, libc::SOCK_RAW | libc::SOCK_CLOEXEC, 0);
            assert!(socket >= 0);
            let sent = libc::sendto(
                socket,
                frame.as_ptr().cast(),
                frame.len(),
                0,
                (&raw const whom).cast(),
                size_of::<libc::sockaddr_ll>() as u32,
            );
            libc::close(socket);
            assert_eq!(sent, frame.len() as isize);
        }
    }

    /// Hears what comes out at a device's other end, from here on.
    pub fn ear(&self, device: u8) -> Ear {
        let index = nix::net::if_::if_nametoindex(format!("far{device}").as_str()).unwrap();
        // SAFETY: the structure holds numbers alone, of which all may be 0.
        let mut whom: libc::sockaddr_ll = unsafe { std::mem::zeroed() };
        whom.sll_family = libc::AF_PACKET as u16;
        whom.sll_protocol = (libc::ETH_P_ALL as u16).to_be();
        whom.sll_ifindex = index as i32;
        // SAFETY: the socket is the ear's own, and the kernel reads the address within its length.
        unsafe {
            let kind = libc::SOCK_RAW | libc::SOCK_CLOEXEC;
            let protocol = i32::from((libc::ETH_P_ALL as u16).to_be());
            let socket = libc::socket(libc::AF_PACKET, kind, protocol);
            assert!(socket >= 0);
            let socket = OwnedFd::from_raw_fd(socket);
            let length = size_of::<libc::sockaddr_ll>() as u32;
            let bound = libc::bind(socket.as_raw_fd(), (&raw const whom).cast(), length);
            assert_eq!(bound, 0);
            Ear(socket)
        }
    }

    /// The first device's index.
    pub fn index(&self) -> u32 {
        self.devices[0].index
    }
}

thread_local! {
    static ROUTED: std::cell::Cell<bool> = const { std::cell::Cell::new(false) };
}

/// Puts this thread, once, into a network namespace in which the loopback routes everything to the outside.
pub fn routed() {
    if ROUTED.replace(true) {
        return;
    }
    unshare(CloneFlags::CLONE_NEWNET).unwrap();
    ip("link set lo up");
    ip("link add out0 type veth peer name out1");
    for device in ["out0", "out1"] {
        ip(&format!("link set {device} up"));
    }
    forward();
    // A router that is met already.
    for (family, router) in [("-4", "192.0.2.1"), ("-6", "fe80::1")] {
        ip(&format!(
            "neigh add {router} lladdr 02:00:00:00:00:aa dev out0 nud permanent"
        ));
        ip(&format!(
            "{family} route add default via {router} dev out0 onlink"
        ));
    }
}

/// Makes the namespace a router's.
fn forward() {
    for file in ["ipv4/ip_forward", "ipv6/conf/all/forwarding"] {
        std::fs::write(format!("/proc/sys/net/{file}"), "1").unwrap();
    }
}

/// What comes out of a device.
pub struct Ear(OwnedFd);

impl Ear {
    /// Waits for this frame.
    pub fn hears(&self, frame: &[u8]) {
        let mut others = Vec::new();
        let end = Instant::now() + Duration::from_secs(3);
        while Instant::now() < end {
            let mut room = [0; 2048];
            // SAFETY: the kernel writes within the room.
            let length = unsafe {
                let flags = libc::MSG_DONTWAIT;
                libc::recv(
                    self.0.as_raw_fd(),
                    room.as_mut_ptr().cast(),
                    room.len(),
                    flags,
                )
            };
            match usize::try_from(length) {
                Ok(length) if room[..length] == *frame => return,
                Ok(length) => others.push(room[..length].to_vec()),
                Err(_) => std::thread::sleep(Duration::from_millis(5)),
            }
        }
        panic!("{frame:02x?} did not come, but {others:02x?}");
    }
}

/// Runs a test in a network namespace of its own, on a thread that ends with it.
pub fn namespace(test: impl FnOnce() + Send) {
    std::thread::scope(|scope| {
        let thread = scope.spawn(|| {
            unshare(CloneFlags::CLONE_NEWNET).unwrap();
            test();
        });
        if let Err(panic) = thread.join() {
            std::panic::resume_unwind(panic);
        }
    });
}

/// Adds or removes a neighbour of a device.
pub fn neighbour(verb: &str, address: IpAddr, device: u8, mac: [u8; 6]) {
    let mac = mac.map(|byte| format!("{byte:02x}")).join(":");
    ip(&format!(
        "neigh {verb} {address} dev wire{device} lladdr {mac} nud permanent"
    ));
}

/// Runs `ip` and gives what it prints.
pub fn ip(line: &str) -> String {
    let output = Command::new("ip").args(line.split(' ')).output().unwrap();
    let error = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "ip {line}: {error}");
    String::from_utf8(output.stdout).unwrap()
}
