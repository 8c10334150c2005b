//! Host ports of this node's pods.

use std::net::IpAddr;

/// A port of the node that leads to a container of one of its pods (`hostPort`).
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct HostPort {
    /// IP protocol number.
    pub protocol: u8,
    /// The node's address that it is open at; none for all of them, of the pod's family.
    pub host_ip: Option<IpAddr>,
    /// The node's port.
    pub host_port: u16,
    /// The pod's address.
    pub pod_ip: IpAddr,
    /// The container's port.
    pub container_port: u16,
}
