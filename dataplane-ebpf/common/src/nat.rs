//! Address translation: what a packet's addresses and ports become.

use bytemuck::{Pod, Zeroable};

use crate::flow::{SECOND, longest_idle};

/// Addresses, ports and protocol of a packet, in its direction.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Pod, Zeroable)]
pub struct Tuple {
    /// IPv4 source address.
    pub source: u32,
    /// IPv4 destination address.
    pub destination: u32,
    /// Source port, or of ICMP echo the identifier.
    pub source_port: u16,
    /// Destination port, or of ICMP echo the identifier.
    pub destination_port: u16,
    /// IP protocol number.
    pub protocol: u8,
    /// Always 0.
    pub pad: [u8; 3],
}

impl Tuple {
    /// That of the packets that answer.
    #[inline(always)]
    pub fn reversed(&self) -> Self {
        Self {
            source: self.destination,
            destination: self.source,
            source_port: self.destination_port,
            destination_port: self.source_port,
            protocol: self.protocol,
            pad: [0; 3],
        }
    }
}

/// A translation. Each has its counterpart: the key of the one is the reversed `to` of the other.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Pod, Zeroable)]
pub struct Nat {
    /// When a packet of either direction was last seen, in ns of the monotonic clock (`bpf_ktime_get_coarse_ns`).
    pub seen: u64,
    /// What packets become.
    pub to: Tuple,
    /// 1 once an end of a TCP connection has closed it.
    pub closed: u8,
    /// Always 0.
    pub pad: [u8; 7],
}

/// An end that has closed may still wait for the other, as long as Linux's connection tracking lets it
/// (`nf_conntrack_tcp_timeout_fin_wait`); after that another flow may have the port.
const CLOSED_IDLE: u64 = 120 * SECOND;

impl Nat {
    /// Whether it was silent for so long that it holds no more.
    #[inline(always)]
    pub fn is_forgotten(&self, now: u64) -> bool {
        now.saturating_sub(self.seen) > longest_idle(self.to.protocol)
    }

    /// Whether another flow may take its place.
    #[inline(always)]
    pub fn is_replaceable(&self, now: u64) -> bool {
        self.is_forgotten(now) || self.closed != 0 && now.saturating_sub(self.seen) > CLOSED_IDLE
    }
}

/// A device with the XDP hook sends frames back by the queue that they came by (`XDP_TX`).
pub const BACK_BY_QUEUE: u8 = 1;
/// A device with the XDP hook sends frames back as it sends those of other devices. A veth device's other end is not
/// woken for `XDP_TX` unless it has a program, too.
pub const BACK_BY_REDIRECT: u8 = 2;

/// What translation needs to know of the node.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Pod, Zeroable)]
pub struct Settings {
    /// The node's address, which its pods use towards the outside.
    pub node: u32,
    /// First port for translated flows, in the CPU's byte order.
    pub first_port: u16,
    /// How many ports there are from the first; 0 turns translation off.
    pub ports: u16,
}

#[cfg(test)]
mod tests {
    use super::*;
    use core::mem::{offset_of, size_of};

    #[test]
    fn a_half_closed_connection_holds_but_its_port_may_be_taken() {
        let mut nat = Nat::zeroed();
        nat.to.protocol = crate::TCP;
        nat.closed = 1;
        assert!(!nat.is_replaceable(120 * SECOND));
        assert!(nat.is_replaceable(121 * SECOND) && !nat.is_forgotten(121 * SECOND));
        nat.closed = 0;
        assert!(!nat.is_replaceable(6 * 3_600 * SECOND));
        assert!(nat.is_replaceable(6 * 3_600 * SECOND + 1));
        nat.to.protocol = crate::UDP;
        assert!(!nat.is_forgotten(60 * SECOND) && nat.is_forgotten(60 * SECOND + 1));
    }

    #[test]
    fn layouts_are_what_the_kernel_side_was_built_with() {
        assert_eq!(
            [size_of::<Tuple>(), size_of::<Nat>(), size_of::<Settings>()],
            [16, 32, 8]
        );
        assert_eq!(
            [
                offset_of!(Tuple, protocol),
                offset_of!(Nat, to),
                offset_of!(Nat, closed)
            ],
            [12, 8, 24]
        );
    }
}
