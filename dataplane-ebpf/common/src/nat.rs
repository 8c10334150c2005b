//! What a packet's addresses and ports are and become, and what translation needs to know of the node.

use bytemuck::{Pod, Zeroable};

use crate::ip::Ip;

/// Addresses, ports and protocol of a packet, in its direction.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Pod, Zeroable)]
pub struct Tuple {
    /// Source address.
    pub source: Ip,
    /// Destination address.
    pub destination: Ip,
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
    /// Writes that of the packets that answer over another.
    #[inline(always)]
    pub fn reverse(&self, answer: &mut Self) {
        answer.source = self.destination.words();
        answer.destination = self.source.words();
        answer.source_port = self.destination_port;
        answer.destination_port = self.source_port;
        answer.protocol = self.protocol;
    }

    /// Writes another over it.
    #[inline(always)]
    pub fn set(&mut self, other: &Self) {
        self.source = other.source.words();
        self.destination = other.destination.words();
        self.source_port = other.source_port;
        self.destination_port = other.destination_port;
        self.protocol = other.protocol;
    }
}

/// A device with the XDP hook sends frames back by the queue that they came by (`XDP_TX`).
pub const BACK_BY_QUEUE: u8 = 1;
/// A device with the XDP hook sends frames back as it sends those of other devices. A veth device's other end is not
/// woken for `XDP_TX` unless it has a program, too.
pub const BACK_BY_REDIRECT: u8 = 2;
/// A device without the XDP hook.
pub const BACK_BY_TC: u8 = 3;

/// The mark (`skb->mark`) of a packet with which all is done, from the hook that sends it around the stack to the one
/// that it leaves by, which takes it off. The stack never sees it, and a pod's own marks end at its device.
pub const MARK_DONE: u32 = 0x5845_4245;

/// What translation needs to know of the node. All zeros turn it off.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Pod, Zeroable)]
pub struct Settings {
    /// The node's IPv4 address, which its pods use towards the outside; [`Ip::NONE`] if it has none.
    pub node4: Ip,
    /// The node's IPv6 address.
    pub node6: Ip,
    /// First port for translated flows, in the CPU's byte order.
    pub first_port: u16,
    /// How many ports there are from the first; 0 turns translation off.
    pub ports: u16,
    /// First node port, in the CPU's byte order.
    pub first_node_port: u16,
    /// Last node port.
    pub last_node_port: u16,
    /// How many ICMP errors each CPU may send in a second, and as many at once as in 50 ms; 0 for no limit.
    pub errors: u32,
    /// Which flows from outside backends of other nodes answer directly (direct server return): [`DIRECT_TCP`],
    /// [`DIRECT_UDP`].
    pub direct: u32,
    /// 1 where packets of pods take their way around the stack; 0 where the node's own rules are to see them.
    pub around: u32,
    /// What the choice of a port for a connection begins with; others must not know it.
    pub seed: u32,
}

/// Those of TCP and SCTP.
pub const DIRECT_TCP: u32 = 1;
/// Those of UDP.
pub const DIRECT_UDP: u32 = 1 << 1;

impl Settings {
    /// The node's address of the same family as this one.
    #[inline(always)]
    pub fn node(&self, like: &Ip) -> Ip {
        if like.is_v4() { self.node4 } else { self.node6 }
    }
}

/// The port of Geneve (RFC 8926, 3.3).
pub const GENEVE_PORT: u16 = 6081;
/// The header of the option that tells the backend: a class for experiments, a type that is critical, and five words of
/// data. These are the backend's address, its port, and two bytes of 0.
pub const GENEVE_OPTION: u32 = 0xff58_8105;

#[cfg(test)]
mod tests {
    use super::*;
    use core::mem::{offset_of, size_of};

    #[test]
    fn layouts_are_what_the_kernel_side_was_built_with() {
        assert_eq!([size_of::<Tuple>(), size_of::<Settings>()], [40, 56]);
        assert_eq!(
            [
                offset_of!(Tuple, source_port),
                offset_of!(Tuple, protocol),
                offset_of!(Settings, first_port)
            ],
            [32, 36, 32]
        );
    }
}
