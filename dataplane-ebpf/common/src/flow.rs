//! Flow entries, and the events that tell of flows.

use bytemuck::{Pod, Zeroable};

use crate::ip::Ip;
use crate::nat::Tuple;

/// Both ends of a flow, the one with the lower port (then address) first: both directions have the same key.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Pod, Zeroable)]
pub struct FlowKey {
    /// Address of the lower end.
    pub low: Ip,
    /// Address of the higher end.
    pub high: Ip,
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
    pub fn new(tuple: &Tuple) -> (Self, bool) {
        let mut key = Self::zeroed();
        let up = Self::write(tuple, &mut key);
        (key, up)
    }

    /// Writes the key of a packet over another, and tells whether it goes from the lower end to the higher.
    #[inline(always)]
    pub fn write(tuple: &Tuple, key: &mut Self) -> bool {
        // Ports alone decide nearly always.
        let up = tuple.source_port < tuple.destination_port
            || tuple.source_port == tuple.destination_port && tuple.source <= tuple.destination;
        if up {
            key.low = tuple.source.words();
            key.high = tuple.destination.words();
            key.low_port = tuple.source_port;
            key.high_port = tuple.destination_port;
        } else {
            key.low = tuple.destination.words();
            key.high = tuple.source.words();
            key.low_port = tuple.destination_port;
            key.high_port = tuple.source_port;
        }
        key.protocol = tuple.protocol;
        up
    }
}

/// One second, in ns.
pub const SECOND: u64 = 1_000_000_000;

/// ns of the monotonic clock, in the ticks that flows are dated with: 2^30 ns, a little more than a second. They
/// last for 146 years.
#[inline(always)]
pub const fn ticks(ns: u64) -> u32 {
    (ns >> 30) as u32
}

/// µs of the monotonic clock, as flows are timed with: 31 bits, for 35 minutes.
#[inline(always)]
pub const fn micros(ns: u64) -> u32 {
    (ns / 1_000) as u32 & (u32::MAX >> 1)
}

/// Set in [`Flow::bytes`] where one of its halves is about to have no room.
pub const MANY_BYTES: u64 = 0x8000_0000_8000_0000;

/// How long a flow of this protocol may be silent before it is forgotten, in ticks: 6 hours of TCP and SCTP, a minute
/// of others.
#[inline(always)]
pub const fn longest_idle(protocol: u8) -> u32 {
    if protocol == crate::TCP || protocol == crate::SCTP {
        ticks(6 * 3_600 * SECOND)
    } else {
        ticks(61 * SECOND)
    }
}

/// An end that has closed may still wait for the other, as long as Linux's connection tracking lets it
/// (`nf_conntrack_tcp_timeout_fin_wait`); after that another flow may have the port.
const CLOSED_IDLE: u32 = ticks(121 * SECOND);

/// Where both have closed, one of them remembers the connection and would refuse another in its place for a minute
/// (Linux's `TCP_TIMEWAIT_LEN`).
const OVER_IDLE: u32 = ticks(61 * SECOND);

/// Nobody has answered yet: as long as Linux's connection tracking waits for that
/// (`nf_conntrack_tcp_timeout_syn_sent`).
const UNANSWERED_IDLE: u32 = ticks(121 * SECOND);

/// How long a flow that has no connection, or none yet, keeps a port that others have nothing left but. Resolvers answer
/// sooner, and who goes on later gets another port.
const SILENT: u32 = ticks(5 * SECOND);

/// A flow: what was decided for it, and what its packets become. One that is translated has two entries: one for its
/// tuple before, one for its tuple after. Each says what the packets of one direction become, and the key of each is
/// made of what the other's packets become.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Pod, Zeroable)]
pub struct Flow {
    /// What the packets of the direction [`Flow::turn`] become; unused without a turn.
    pub to: Tuple,
    /// Bytes that no event has told of, and none will where the entry is forgotten: the beginner's in the lower half, the replies' in the upper. While
    /// [`Flow::timed`] is 1, the upper half is the time of the packet that began it, by [`micros`].
    pub bytes: u64,
    /// Packets of both directions that no event has told of.
    pub packets: u32,
    /// When a packet was last seen, in [`ticks`].
    pub seen: u32,
    /// When its counterpart was last seen to be there, in [`ticks`].
    pub paired: u32,
    /// The rules' generation by which it was judged; 0 where it was not.
    pub generation: u32,
    /// The rule that allowed it, or 0 where none was needed.
    pub rule: u32,
    /// The backend that was chosen, 0 for none.
    pub backend: u32,
    /// The backend's generation.
    pub backend_generation: u32,
    /// Number of the Service's port, 0 for none.
    pub service: u32,
    /// 1 where the lower end began it.
    pub from_low: u8,
    /// [`TURN_NONE`] and the others.
    pub turn: u8,
    /// TCP flags that were told of, of the beginner's packets and of the replies.
    pub told: [u8; 2],
    /// Which ends have closed a TCP connection: [`CLOSED_FORTH`], [`CLOSED_BACK`].
    pub closed: u8,
    /// The turn of its counterpart.
    pub other: u8,
    /// 1 where a process of this node began it: rules do not bind it, whatever its address, nor the answers.
    pub exempt: u8,
    /// 1 from a handshake's beginning to its answer.
    pub timed: u8,
}

/// Nothing is translated.
pub const TURN_NONE: u8 = 0;
/// The beginner's packets are translated.
pub const TURN_FORTH: u8 = 1;
/// The replies are translated.
pub const TURN_BACK: u8 = 2;
/// Set where packets are translated when they leave, by routes chosen before; else when they come in.
pub const TURN_LATE: u8 = 4;

/// Nothing is translated any more: the beginner's connection has become another one. The entry keeps its port from
/// others while the far end may remember it.
pub const TURN_KEPT: u8 = 16;

/// The beginner has closed.
pub const CLOSED_FORTH: u8 = 1;
/// The other end has closed.
pub const CLOSED_BACK: u8 = 2;
/// Nothing more is said.
pub const CLOSED: u8 = CLOSED_FORTH | CLOSED_BACK;

/// Set where the way of the packets ends on this node once they are translated.
pub const TURN_STAYS: u8 = 32;

/// Set where packets go to the backend's node as they are, and answers come by another way: there is no other entry.
pub const TURN_DIRECT: u8 = 8;

impl Flow {
    /// For how many ticks it was silent; 0 where another CPU saw a packet since `now` was asked for.
    #[inline(always)]
    pub const fn idle(&self, now: u32) -> u32 {
        let idle = now.wrapping_sub(self.seen);
        if (idle as i32) < 0 { 0 } else { idle }
    }

    /// Whether it was silent for so long that it holds no more.
    #[inline(always)]
    pub const fn is_forgotten(&self, protocol: u8, now: u32) -> bool {
        self.idle(now) > longest_idle(protocol)
    }

    /// Whether another flow may take its place.
    #[inline(always)]
    pub const fn is_replaceable(&self, protocol: u8, now: u32) -> bool {
        let idle = self.idle(now);
        self.is_forgotten(protocol, now)
            || self.closed != 0 && idle > CLOSED_IDLE
            || self.closed == CLOSED && idle > OVER_IDLE
            || self.told[1] == 0 && idle > UNANSWERED_IDLE
    }

    /// Whether another flow that finds no other place may take its own: it is over, or its ends may not have known of
    /// each other, and it was silent for some seconds.
    #[inline(always)]
    pub const fn yields(&self, protocol: u8, now: u32) -> bool {
        let connection = protocol == crate::TCP || protocol == crate::SCTP;
        self.closed == CLOSED || (!connection || self.told[1] == 0) && self.idle(now) > SILENT
    }
}

/// What happened to a packet, or to a socket.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Pod, Zeroable)]
pub struct Event {
    /// ns of the monotonic clock (`bpf_ktime_get_ns`).
    pub time: u64,
    /// Source address. Of a socket's translation, the cookie of its network namespace, the lower word first.
    pub source: Ip,
    /// Destination address; of a socket's translation, the one that was asked for.
    pub destination: Ip,
    /// Source port; of ICMP, its type and code.
    pub source_port: u16,
    /// Destination port.
    pub destination_port: u16,
    /// IP protocol number.
    pub protocol: u8,
    /// TCP flags.
    pub tcp_flags: u8,
    /// [`FORWARDED`], [`DROPPED`] or [`AUDITED`].
    pub verdict: u8,
    /// [`INGRESS`] or [`EGRESS`]: which side of the pod was asked.
    pub direction: u8,
    /// Why it was dropped, as Hubble's `DropReason` numbers it.
    pub reason: u8,
    /// 1 for a reply.
    pub reply: u8,
    /// Bytes of the packet, 65,535 where there are more; of a message, those of it that are told.
    pub length: u16,
    /// The set that judged, 0 for none.
    pub set: u32,
    /// The rule that decided, 0 for none.
    pub rule: u32,
    /// Number of the Service's port that the packet was sent to, 0 for none.
    pub service: u32,
    /// What the source becomes; [`Ip::NONE`] for both where nothing is translated.
    pub new_source: Ip,
    /// What the destination becomes.
    pub new_destination: Ip,
    /// What the source port becomes.
    pub new_source_port: u16,
    /// What the destination port becomes.
    pub new_destination_port: u16,
    /// Packets that this event tells of: its own and those since the flow's last event that had none. 0 where another
    /// hook tells of them.
    pub packets: u32,
    /// Their bytes: the beginner's, and the replies'.
    pub bytes: [u32; 2],
    /// From the packet that began a connection to this, its first answer, µs; 0 for all others.
    pub answered_in: u32,
    /// [`AT_POD`] and the others.
    pub at: u8,
    /// Always 0.
    pub pad: [u8; 3],
    /// The socket's cookie, of a socket's translation; of a message by TCP, the sequence number of its first byte.
    pub socket: u64,
}

/// At a pod, or at the node itself: its side of the flow was judged.
pub const AT_POD: u8 = 0;
/// Where it came from the network: it begins a flow that is translated.
pub const FROM_NETWORK: u8 = 1;
/// Where it leaves for the network: it begins a flow that is translated.
pub const TO_NETWORK: u8 = 2;
/// At a socket, which got another address than it asked for.
pub const AT_SOCKET: u8 = 3;
/// At the pod that asked a resolver or was answered by it, or that has its HTTP told: it has a message with it
/// ([`crate::message`]).
pub const AT_MESSAGE: u8 = 4;

/// How events are put together: one for each packet.
pub const AGGREGATE_NONE: u32 = 0;
/// For the beginning of a flow, its first answer and its end, and each second.
pub const AGGREGATE_LOW: u32 = 1;
/// The same, but each four seconds.
pub const AGGREGATE_MEDIUM: u32 = 2;
/// For the beginning and the end, and each minute.
pub const AGGREGATE_MAXIMUM: u32 = 3;
/// There are none, of drops neither.
pub const AGGREGATE_OFF: u32 = 4;

/// How many [`ticks`] flows are silent on events where nothing else happens, as a power of two.
pub const fn aggregate_shift(level: u32) -> u32 {
    match level {
        AGGREGATE_NONE | AGGREGATE_LOW => 0,
        AGGREGATE_MEDIUM => 2,
        _ => 6,
    }
}

/// The packet went on its way.
pub const FORWARDED: u8 = 1;
/// The packet was dropped.
pub const DROPPED: u8 = 2;
/// The packet went on its way, which a policy in audit mode would not have let it.
pub const AUDITED: u8 = 4;

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

/// `POLICY_DENY`: a rule says so; `POLICY_DENIED` is what none allows.
pub const REASON_RULE: u8 = 181;
/// `ERROR_WHILE_CORRECTING_L4_CHECKSUM`.
pub const REASON_CHECKSUM: u8 = 154;
/// `FRAGMENTATION_NEEDED`.
pub const REASON_TOO_BIG: u8 = 157;
/// `SERVICE_BACKEND_NOT_FOUND`.
pub const REASON_NO_SERVICE: u8 = 158;
/// `NO_MAPPING_FOR_NAT_MASQUERADE`.
pub const REASON_NO_MAPPING: u8 = 167;
/// `FIB_LOOKUP_FAILED`.
pub const REASON_NO_ROUTE: u8 = 169;
/// `FIRST_LOGICAL_DATAGRAM_FRAGMENT_NOT_FOUND`.
pub const REASON_FRAGMENT: u8 = 175;
/// `TTL_EXCEEDED`.
pub const REASON_TTL: u8 = 196;

/// Counters of one CPU.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Pod, Zeroable)]
pub struct Counters {
    /// Events that there were to tell.
    pub produced: u64,
    /// Those of them for which there was no room.
    pub lost: u64,
    /// Packets that have no event of their own: another one of their flow tells of them.
    pub aggregated: u64,
    /// Packets that went on.
    pub forwarded: u64,
    /// Packets that were dropped.
    pub dropped: u64,
    /// Packets from the network that tc translated.
    pub translated: u64,
    /// Packets from the network that XDP translated.
    pub translated_early: u64,
    /// Packets to Services without endpoints that were answered for it; they count as dropped, too.
    pub refused: u64,
    /// Flows that got no port for want of a free one; their packets count as dropped, too.
    pub no_port: u64,
    /// Resolvers' answers that were held until the agent had learned of them; it sends them on.
    pub held: u64,
    /// Those that could not be held: their pods may know of addresses before the agent does.
    pub unheld: u64,
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
            [40, 88, 128, 88]
        );
        assert_eq!(
            [
                offset_of!(Flow, seen),
                offset_of!(Flow, service),
                offset_of!(Flow, from_low),
                offset_of!(Flow, told)
            ],
            [52, 76, 80, 82]
        );
        assert_eq!(
            [offset_of!(Event, verdict), offset_of!(Event, set)],
            [46, 52]
        );
        assert_eq!(crate::LAYOUT, 13, "raise it with every change of a layout");
    }

    fn tuple(source: (u32, u16), destination: (u32, u16)) -> Tuple {
        Tuple {
            source: Ip::v4(source.0),
            destination: Ip::v4(destination.0),
            source_port: source.1,
            destination_port: destination.1,
            protocol: crate::TCP,
            pad: [0; 3],
        }
    }

    #[test]
    fn both_directions_have_one_key() {
        for (a, b) in [((5, 80), (9, 4000)), ((5, 1), (5, 2)), ((9, 7), (5, 7))] {
            let (one, up) = FlowKey::new(&tuple(a, b));
            let (other, down) = FlowKey::new(&tuple(b, a));
            assert_eq!((one, up), (other, !down));
        }
    }

    #[test]
    fn a_half_closed_connection_holds_but_its_port_may_be_taken() {
        let mut flow = Flow::zeroed();
        flow.closed = 1;
        flow.told[1] = 1;
        let after = |seconds: u64| ticks(seconds * SECOND);
        assert!(!flow.is_replaceable(crate::TCP, after(120)));
        assert!(flow.is_replaceable(crate::TCP, after(123)));
        assert!(!flow.is_forgotten(crate::TCP, after(123)));
        // Answered, it keeps its place before anybody; datagrams do not.
        assert!(!flow.yields(crate::TCP, after(120)));
        assert!(!flow.yields(crate::UDP, after(4)) && flow.yields(crate::UDP, after(7)));
        flow.closed = CLOSED;
        assert!(flow.yields(crate::TCP, 0));
        assert!(!flow.is_replaceable(crate::TCP, after(60)));
        assert!(flow.is_replaceable(crate::TCP, after(63)));
        flow.closed = 0;
        assert!(!flow.is_replaceable(crate::TCP, after(6 * 3_600)));
        assert!(flow.is_replaceable(crate::TCP, after(6 * 3_600 + 2)));
        assert!(!flow.is_forgotten(crate::UDP, after(60)));
        assert!(flow.is_forgotten(crate::UDP, after(63)));
    }

    #[test]
    fn a_flow_that_another_cpu_saw_a_moment_later_is_not_forgotten() {
        let mut flow = Flow::zeroed();
        flow.seen = 1_000;
        for protocol in [crate::TCP, crate::UDP] {
            assert!(!flow.is_forgotten(protocol, 999));
            assert!(!flow.is_replaceable(protocol, 999));
            assert!(!flow.yields(protocol, 999));
        }
    }

    #[test]
    fn a_connection_without_an_answer_holds_its_port_for_two_minutes() {
        let flow = Flow::zeroed();
        assert!(!flow.is_replaceable(crate::TCP, ticks(120 * SECOND)));
        assert!(flow.is_replaceable(crate::TCP, ticks(123 * SECOND)));
    }
}
