//! Flow entries, and the events that tell of flows.

use bytemuck::{Pod, Zeroable};

/// Both ends of a flow, the one with the lower address (then port) first: both directions have the same key.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Pod, Zeroable)]
pub struct FlowKey {
    /// IPv4 address of the lower end.
    pub low: u32,
    /// IPv4 address of the higher end.
    pub high: u32,
    /// Port of the lower end.
    pub low_port: u16,
    /// Port of the higher end.
    pub high_port: u16,
    /// IP protocol number.
    pub protocol: u8,
    /// Always 0.
    pub pad: [u8; 3],
}

impl FlowKey {
    /// The key of a packet, and whether it goes from the lower end to the higher.
    #[inline(always)]
    pub fn new(source: (u32, u16), destination: (u32, u16), protocol: u8) -> (Self, bool) {
        let up = source.0 < destination.0 || source.0 == destination.0 && source.1 <= destination.1;
        let (low, high) = if up {
            (source, destination)
        } else {
            (destination, source)
        };
        let key = Self {
            low: low.0,
            high: high.0,
            low_port: low.1,
            high_port: high.1,
            protocol,
            pad: [0; 3],
        };
        (key, up)
    }
}

/// One second, in ns.
pub const SECOND: u64 = 1_000_000_000;

/// How long a flow of this protocol may be silent before it is forgotten, ns: 6 hours of TCP, a minute of others.
#[inline(always)]
pub fn longest_idle(protocol: u8) -> u64 {
    if protocol == crate::TCP {
        6 * 3_600 * SECOND
    } else {
        60 * SECOND
    }
}

/// A flow that was allowed.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Pod, Zeroable)]
pub struct Flow {
    /// When a packet was last seen, in ns of the monotonic clock (`bpf_ktime_get_coarse_ns`).
    pub seen: u64,
    /// The rules' generation by which it was judged.
    pub generation: u32,
    /// The rule that allowed it, or 0 where none was needed.
    pub rule: u32,
    /// 1 where the lower end began it.
    pub from_low: u8,
    /// TCP flags that were told of, of the beginner's packets and of the replies.
    pub told: [u8; 2],
    /// Always 0.
    pub pad: [u8; 5],
}

/// What happened to a packet.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Pod, Zeroable)]
pub struct Event {
    /// ns of the monotonic clock (`bpf_ktime_get_ns`).
    pub time: u64,
    /// IPv4 source address.
    pub source: u32,
    /// IPv4 destination address.
    pub destination: u32,
    /// Source port; of ICMP, its type and code.
    pub source_port: u16,
    /// Destination port.
    pub destination_port: u16,
    /// IP protocol number.
    pub protocol: u8,
    /// TCP flags.
    pub tcp_flags: u8,
    /// [`FORWARDED`] or [`DROPPED`].
    pub verdict: u8,
    /// [`INGRESS`] or [`EGRESS`]: which side of the pod was asked.
    pub direction: u8,
    /// Why it was dropped, as Hubble's `DropReason` numbers it.
    pub reason: u8,
    /// 1 for a reply.
    pub reply: u8,
    /// Bytes of the packet.
    pub length: u16,
    /// The set that judged, 0 for none.
    pub set: u32,
    /// The rule that allowed, 0 for none.
    pub rule: u32,
    /// Always 0.
    pub pad: u32,
}

/// The packet went on its way.
pub const FORWARDED: u8 = 1;
/// The packet was dropped.
pub const DROPPED: u8 = 2;

/// Towards the pod.
pub const INGRESS: u8 = 1;
/// From the pod.
pub const EGRESS: u8 = 2;

/// `INVALID_SOURCE_IP`.
pub const REASON_SOURCE: u8 = 132;
/// `POLICY_DENIED`.
pub const REASON_POLICY: u8 = 133;
/// `INVALID_PACKET_DROPPED`.
pub const REASON_INVALID: u8 = 134;

/// `NO_MAPPING_FOR_NAT_MASQUERADE`.
pub const REASON_NO_MAPPING: u8 = 161;

/// Counters of one CPU.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Pod, Zeroable)]
pub struct Counters {
    /// Events that were written.
    pub produced: u64,
    /// Events for which there was no room.
    pub lost: u64,
    /// Packets that went on.
    pub forwarded: u64,
    /// Packets that were dropped.
    pub dropped: u64,
    /// Packets from the network that tc translated.
    pub translated: u64,
    /// Packets from the network that XDP translated.
    pub translated_early: u64,
}

#[cfg(test)]
mod tests {
    use super::*;
    use core::mem::{offset_of, size_of};

    #[test]
    fn layouts_are_what_the_kernel_side_was_built_with() {
        assert_eq!(
            [
                size_of::<FlowKey>(),
                size_of::<Flow>(),
                size_of::<Event>(),
                size_of::<Counters>()
            ],
            [16, 24, 40, 48]
        );
        assert_eq!(
            [offset_of!(Flow, from_low), offset_of!(Flow, told)],
            [16, 17]
        );
        assert_eq!(
            [offset_of!(Event, verdict), offset_of!(Event, set)],
            [22, 28]
        );
        assert_eq!(crate::LAYOUT, 5, "raise it with every change of a layout");
    }

    #[test]
    fn both_directions_have_one_key() {
        let (a, b) = ((5, 80), (9, 4000));
        let ((one, up), (other, down)) = (FlowKey::new(a, b, 6), FlowKey::new(b, a, 6));
        assert_eq!((one, up), (other, !down));
        let ((one, up), (other, down)) = (
            FlowKey::new((5, 1), (5, 2), 6),
            FlowKey::new((5, 2), (5, 1), 6),
        );
        assert_eq!((one, up), (other, !down));
    }
}
