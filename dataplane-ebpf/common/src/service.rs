//! Services: frontends, the slots that name their backends, the backends, and what was chosen before.
//!
//! A frontend names two runs of slots: one for who is inside the cluster, one for others. A slot holds the number of a
//! backend. Backends have one entry each, however many Services they serve. Maglev's table is a run of slots like any
//! other: only how a place in it is chosen differs.

use bytemuck::{Pod, Zeroable};

use crate::ip::Ip;

/// A Service's frontend. That of a node port has [`Ip::EVERY_V4`] or [`Ip::EVERY_V6`] for its address: the node's
/// addresses are in a map of their own.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Pod, Zeroable)]
pub struct FrontendKey {
    /// Address.
    pub address: Ip,
    /// Port.
    pub port: u16,
    /// IP protocol number.
    pub protocol: u8,
    /// Always 0.
    pub pad: u8,
}

/// A run of slots.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Pod, Zeroable)]
pub struct Run {
    /// Its first chunk.
    pub first: u32,
    /// How many slots it has; with none, packets are refused or dropped.
    pub count: u32,
}

/// What a frontend stands for.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Pod, Zeroable)]
pub struct Frontend {
    /// Number of the Service's port: all its frontends have the same. Never 0.
    pub service: u32,
    /// [`HASH_INSIDE`] and the others.
    pub flags: u32,
    /// For how many seconds a client keeps its backend (`sessionAffinityConfig`); 0 for none.
    pub affinity: u32,
    /// For pods and nodes of the cluster.
    pub inside: Run,
    /// For all others.
    pub outside: Run,
}

/// The place in `inside` is chosen by a hash of the flow, as Maglev's tables want it; otherwise at random.
pub const HASH_INSIDE: u32 = 1;
/// The same of `outside`.
pub const HASH_OUTSIDE: u32 = 1 << 1;
/// Only sources in the Service's blocks are let in (`loadBalancerSourceRanges`).
pub const SOURCE_RANGES: u32 = 1 << 2;
/// Backends of `outside` are all on this node and see the client's address (`externalTrafficPolicy: Local`).
pub const KEEP_SOURCE: u32 = 1 << 3;
/// With no slot in `inside`, packets are dropped: there are backends, but none that may be used from here.
pub const DROP_INSIDE: u32 = 1 << 4;
/// The same of `outside`.
pub const DROP_OUTSIDE: u32 = 1 << 5;
/// Outside clients may use the frontend. Without it, it is a ClusterIP.
pub const EXTERNAL: u32 = 1 << 6;
/// Backends answer outside clients directly (direct server return).
pub const DIRECT_RETURN: u32 = 1 << 7;
/// A node port of this node alone (`hostPort`): at another node's addresses it is none.
pub const THIS_NODE: u32 = 1 << 8;

/// Slots in a chunk: a cache line.
pub const CHUNK: usize = 16;

/// Slots that lie side by side: numbers of backends, 0 for none.
pub type Chunk = [u32; CHUNK];

/// A backend; its number is its index.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Pod, Zeroable)]
pub struct Backend {
    /// Address.
    pub address: Ip,
    /// Port.
    pub port: u16,
    /// [`ON_THIS_NODE`], [`ENDING`].
    pub flags: u16,
    /// Raised when the backend goes: a flow that has another number chooses anew. Odd while the backend is there.
    pub generation: u32,
}

/// The backend is a pod of this node, or on its network.
pub const ON_THIS_NODE: u16 = 1;
/// The backend is about to go: what it has goes on, and affinity gives it nothing new.
pub const ENDING: u16 = 1 << 1;

impl Backend {
    /// Whether a flow that was sent to it when it had this generation may go on.
    #[inline(always)]
    pub const fn is(&self, generation: u32) -> bool {
        self.generation == generation && generation & 1 == 1
    }
}

/// Which client of which Service.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Pod, Zeroable)]
pub struct AffinityKey {
    /// The client's address; of a socket of this node, the cookie of its network namespace in the first two words.
    pub client: Ip,
    /// The Service's number.
    pub service: u32,
    /// 1 where the client is a network namespace.
    pub namespace: u32,
}

/// Its backend.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Pod, Zeroable)]
pub struct Affinity {
    /// When the client last began a flow, in ns of the monotonic clock (`bpf_ktime_get_coarse_ns`).
    pub seen: u64,
    /// The backend's number.
    pub backend: u32,
    /// The backend's generation.
    pub generation: u32,
}

/// A block of sources that a Service lets in; found by the longest prefix over both fields.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Pod, Zeroable)]
pub struct RangeKey {
    /// The Service's number.
    pub service: u32,
    /// Address.
    pub address: Ip,
}

/// An address and port.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Pod, Zeroable)]
pub struct Address {
    /// Address.
    pub address: Ip,
    /// Port.
    pub port: u16,
    /// Always 0.
    pub pad: u16,
}

/// A socket, and an address that it asked for or was given.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Pod, Zeroable)]
pub struct SocketKey {
    /// The kernel's number of the socket (`bpf_get_socket_cookie`).
    pub cookie: u64,
    /// The address.
    pub address: Ip,
    /// The port.
    pub port: u16,
    /// [`ASKED`] or [`GIVEN`].
    pub side: u16,
    /// Always 0.
    pub pad: u32,
}

/// The address is what the socket asked for; the value tells the backend it was given.
pub const ASKED: u16 = 0;
/// The address is the backend's; the value tells what was asked for.
pub const GIVEN: u16 = 1;

/// The other side of a socket's translation.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Pod, Zeroable)]
pub struct SocketValue {
    /// The frontend's address.
    pub address: Ip,
    /// The frontend's port.
    pub port: u16,
    /// IP protocol number.
    pub protocol: u16,
    /// The backend's number.
    pub backend: u32,
    /// The backend's generation.
    pub generation: u32,
    /// Number of the Service's port.
    pub service: u32,
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

/// An address at which node ports are reached is this node's.
pub const OWN: u8 = 1;
/// It is another node's: only sockets and pods of this node are translated on their way there.
pub const OTHERS: u8 = 2;

#[cfg(test)]
mod tests {
    use super::*;
    use core::mem::{offset_of, size_of};

    #[test]
    fn layouts_are_what_the_kernel_side_was_built_with() {
        assert_eq!(
            [
                size_of::<FrontendKey>(),
                size_of::<Frontend>(),
                size_of::<Chunk>(),
                size_of::<Backend>(),
                size_of::<AffinityKey>(),
                size_of::<Affinity>(),
                size_of::<RangeKey>(),
            ],
            [20, 28, 64, 24, 24, 16, 20]
        );
        assert_eq!(
            [
                size_of::<Address>(),
                size_of::<SocketKey>(),
                size_of::<SocketValue>(),
                size_of::<Scope>()
            ],
            [20, 32, 32, 16]
        );
        assert_eq!(
            [
                offset_of!(FrontendKey, port),
                offset_of!(FrontendKey, protocol),
                offset_of!(Frontend, inside),
                offset_of!(Backend, generation),
            ],
            [16, 18, 12, 20]
        );
    }

    #[test]
    fn a_backend_that_went_or_was_never_there_is_not_meant() {
        let mut backend = Backend::default();
        assert!(!backend.is(0));
        backend.generation = 3;
        assert!(backend.is(3) && !backend.is(1));
        backend.generation = 4;
        assert!(!backend.is(3) && !backend.is(4));
    }
}
