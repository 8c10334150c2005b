//! Services: frontends, backends, and the way back.

use bytemuck::{Pod, Zeroable};

/// A Service's frontend.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Pod, Zeroable)]
pub struct FrontendKey {
    /// IPv4 address.
    pub address: u32,
    /// Port.
    pub port: u16,
    /// IP protocol number.
    pub protocol: u8,
    /// Always 0.
    pub pad: u8,
}

/// What a frontend stands for.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Pod, Zeroable)]
pub struct FrontendValue {
    /// The set of backends; a changed set has a new number, so that a lookup never sees half a change.
    pub set: u32,
    /// How many backends the set has; 0 refuses connections.
    pub count: u32,
}

/// One place of a set of backends.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Pod, Zeroable)]
pub struct BackendKey {
    /// The set.
    pub set: u32,
    /// 0 to count-1.
    pub slot: u32,
}

/// An address that connections go to.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Pod, Zeroable)]
pub struct Address {
    /// IPv4 address.
    pub address: u32,
    /// Port.
    pub port: u16,
    /// Always 0.
    pub pad: u16,
}

/// A socket and the backend that it was sent to.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Pod, Zeroable)]
pub struct ReverseKey {
    /// The kernel's number of the socket (`bpf_get_socket_cookie`).
    pub cookie: u64,
    /// The backend's address.
    pub address: u32,
    /// The backend's port.
    pub port: u16,
    /// Always 0.
    pub pad: u16,
}

/// Whose sockets are translated: the node's own and its pods'. Others in the same tree of cgroups have a network
/// of their own, where a pod's address means nothing.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Pod, Zeroable)]
pub struct Scope {
    /// Cookie of the node's network namespace (`SO_NETNS_COOKIE`).
    pub netns: u64,
    /// Number of the cgroup that all pods are in.
    pub pods: u64,
}

#[cfg(test)]
mod tests {
    use super::*;
    use core::mem::{offset_of, size_of};

    #[test]
    fn layouts_are_what_the_kernel_side_was_built_with() {
        assert_eq!(
            [
                size_of::<FrontendKey>(),
                size_of::<FrontendValue>(),
                size_of::<BackendKey>()
            ],
            [8, 8, 8]
        );
        assert_eq!(
            [
                size_of::<Address>(),
                size_of::<ReverseKey>(),
                size_of::<Scope>()
            ],
            [8, 16, 16]
        );
        assert_eq!(
            [
                offset_of!(FrontendKey, port),
                offset_of!(FrontendKey, protocol)
            ],
            [4, 6]
        );
        assert_eq!(
            [
                offset_of!(ReverseKey, address),
                offset_of!(ReverseKey, port)
            ],
            [8, 12]
        );
    }
}
