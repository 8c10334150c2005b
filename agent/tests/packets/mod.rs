//! Building packets, and a kernel with the programs and a few pods to run them.

mod around;
mod crc;
pub mod direct;
mod errors;
mod express;
mod flows;
mod fragments;
mod hold;
mod host;
pub mod kernel;
mod messages;
mod odd;
pub mod packet;
mod policy;
mod ports;
mod refuse;
mod sctp;
mod services;
pub mod table;
mod tell;
mod together;
mod verdicts;
mod ways;
pub mod wires;

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use xebec_agent::loader::Loaded;
use xebec_dataplane_common::nat::Settings;

pub use kernel::{Front, Kernel};
pub use packet::{
    ACK, FAMILIES, FIN, Family, Packet, RST, SYN, WHYS, Why, echo, error, icmp, other, sctp,
    source_port, tcp, udp,
};

/// Whether to leave a test out: `cargo xtask test` builds the programs and runs these tests as root.
pub fn left_out() -> bool {
    if nix::unistd::geteuid().is_root() && Loaded::built_in() {
        return false;
    }
    eprintln!("left out: this test needs root, and an agent built by `cargo xtask`");
    true
}

/// `TC_ACT_OK`.
pub const OK: u32 = 0;
/// `TC_ACT_SHOT`.
pub const SHOT: u32 = 2;
/// `TC_ACT_REDIRECT`.
pub const REDIRECT: u32 = 7;

/// `XDP_PASS`.
pub const PASS: u32 = 2;
/// `XDP_TX`.
pub const TX: u32 = 3;
/// `XDP_REDIRECT`.
pub const SENT_ON: u32 = 4;

/// The hardware address of the device by which frames come: the loopback's.
pub const HERE: [u8; 6] = [0; 6];

/// A pod's hardware address.
pub const POD_MAC: [u8; 6] = [2, 0, 0, 0, 0, 9];

/// An address of four numbers: `10.244.0.5`, or `fd00:10:244::5`, where the numbers read the same in hexadecimal.
pub fn at(family: Family, numbers: [u8; 4]) -> IpAddr {
    let hex = |number: u8| u16::from_str_radix(&number.to_string(), 16).unwrap();
    let [a, b, c, d] = numbers;
    match family {
        Family::V4 => Ipv4Addr::from(numbers).into(),
        Family::V6 => Ipv6Addr::new(0xfd00, hex(a), hex(b), hex(c), 0, 0, 0, hex(d)).into(),
    }
}

/// A pod of this node.
pub fn pod(family: Family) -> IpAddr {
    at(family, [10, 244, 0, 5])
}

/// Another.
pub fn web(family: Family) -> IpAddr {
    at(family, [10, 244, 0, 6])
}

/// A pod of another node.
pub fn far(family: Family) -> IpAddr {
    at(family, [10, 244, 1, 5])
}

/// This node.
pub fn node(family: Family) -> IpAddr {
    at(family, [192, 0, 2, 10])
}

/// The other node.
pub fn far_node(family: Family) -> IpAddr {
    at(family, [192, 0, 2, 20])
}

/// Someone outside.
pub fn client(family: Family) -> IpAddr {
    at(family, [198, 51, 100, 7])
}

/// A Service.
pub fn service(family: Family) -> IpAddr {
    at(family, [10, 96, 0, 10])
}

/// A router on the way to the outside.
pub fn router(family: Family) -> IpAddr {
    at(family, [203, 0, 113, 9])
}

/// The node's settings with these ports.
pub fn settings(first_port: u16, ports: u16) -> Settings {
    Settings {
        node4: node(Family::V4).into(),
        node6: node(Family::V6).into(),
        first_port,
        ports,
        first_node_port: 30_000,
        last_node_port: 32_767,
        errors: 0,
        direct: 0,
        around: 0,
        seed: 0,
    }
}
