//! Map keys and values: the only code that both sides of the kernel boundary share.
//!
//! Addresses and ports are in network byte order, as the kernel's socket structures hold them.
#![no_std]

/// Raised whenever a struct here changes, so that maps of another layout are never adopted.
pub const LAYOUT: u32 = 1;

/// A Service's frontend.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
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
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FrontendValue {
    /// The set of backends; a changed set has a new number, so that a lookup never sees half a change.
    pub set: u32,
    /// How many backends the set has; 0 refuses connections.
    pub count: u32,
}

/// One place of a set of backends.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct BackendKey {
    /// The set.
    pub set: u32,
    /// 0 to count-1.
    pub slot: u32,
}

/// An address that connections go to.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
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
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
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

impl FrontendKey {
    /// As the kernel's map holds it.
    pub fn to_bytes(self) -> [u8; 8] {
        let ([a, b, c, d], [e, f]) = (self.address.to_ne_bytes(), self.port.to_ne_bytes());
        [a, b, c, d, e, f, self.protocol, self.pad]
    }
}

impl FrontendValue {
    /// As the kernel's map holds it.
    pub fn to_bytes(self) -> [u8; 8] {
        pair(self.set, self.count)
    }
}

impl BackendKey {
    /// As the kernel's map holds it.
    pub fn to_bytes(self) -> [u8; 8] {
        pair(self.set, self.slot)
    }
}

impl Address {
    /// As the kernel's map holds it.
    pub fn to_bytes(self) -> [u8; 8] {
        let ([a, b, c, d], [e, f], [g, h]) = (
            self.address.to_ne_bytes(),
            self.port.to_ne_bytes(),
            self.pad.to_ne_bytes(),
        );
        [a, b, c, d, e, f, g, h]
    }
}

fn pair(first: u32, second: u32) -> [u8; 8] {
    let ([a, b, c, d], [e, f, g, h]) = (first.to_ne_bytes(), second.to_ne_bytes());
    [a, b, c, d, e, f, g, h]
}

#[cfg(test)]
mod tests {
    use super::*;
    use core::mem::{offset_of, size_of};

    #[test]
    fn layouts_are_what_the_kernel_side_was_built_with() {
        assert_eq!(
            (size_of::<FrontendKey>(), size_of::<FrontendValue>()),
            (8, 8)
        );
        assert_eq!(
            (
                size_of::<BackendKey>(),
                size_of::<Address>(),
                size_of::<ReverseKey>()
            ),
            (8, 8, 16)
        );
        assert_eq!(
            (
                offset_of!(FrontendKey, port),
                offset_of!(FrontendKey, protocol)
            ),
            (4, 6)
        );
        assert_eq!(
            (
                offset_of!(ReverseKey, address),
                offset_of!(ReverseKey, port)
            ),
            (8, 12)
        );
        assert_eq!(LAYOUT, 1, "raise it with every change above");
    }
}
