//! Truth tables of NetworkPolicies: who reaches whom, as it should be and as it is.

use std::net::IpAddr;

pub mod actions;
pub mod case;
pub mod conflicts;
pub mod model;
pub mod peers;
pub mod policy;
pub mod ports;
pub mod rules;
pub mod sockets;
pub mod specs;
pub mod table;
pub mod upstream;
pub mod world;

pub use xebec_tests::api::Name;
/// Where pods answer, by TCP, UDP and SCTP.
pub const PORTS: [u16; 2] = [80, 81];
/// The namespaces, each with a label `ns` of its name.
pub const NAMESPACES: [&str; 3] = ["x", "y", "z"];
/// The pods of each namespace, each with a label `pod` of its name.
pub const PODS: [&str; 3] = ["a", "b", "c"];

/// One of a pair, by family.
pub fn of<T: Copy>(pair: [T; 2], v4: bool) -> T {
    pair[usize::from(!v4)]
}

/// What a case needs to know of the cluster: addresses of pods that blocks are about, in one family.
pub struct Facts {
    /// The family.
    pub v4: bool,
    /// The address of `x/b`.
    pub xb: IpAddr,
    /// The address of `y/b`.
    pub yb: IpAddr,
    /// The address of `z/c`.
    pub zc: IpAddr,
}
