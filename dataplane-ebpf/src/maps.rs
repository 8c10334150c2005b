//! The maps of the dataplane.

use aya_ebpf::btf_maps::{ArrayOfMaps, HashMap as Inner, RingBuf as Ring};
use aya_ebpf::macros::{btf_map, map};
use aya_ebpf::maps::{Array, HashMap, LpmTrie, LruHashMap, LruPerCpuHashMap, PerCpuArray, RingBuf};
use xebec_dataplane_common::dns::Listening;
use xebec_dataplane_common::flow::{Counters, Event};
use xebec_dataplane_common::ip::Ip;
use xebec_dataplane_common::nat::Settings;
use xebec_dataplane_common::policy::{
    Chains, CidrKey, Decision, Endpoint, Known, RuleKey, Set, Standing,
};
use xebec_dataplane_common::service::{
    Affinity, AffinityKey, Backend, Chunk, Frontend, FrontendKey, RangeKey, Scope, SocketKey,
    SocketValue,
};
use xebec_dataplane_common::table::{FlowSet, Shape};

use crate::packet::Datagram;

/// `BPF_F_NO_PREALLOC`: entries take memory only when they are there.
const NO_PREALLOC: u32 = 1;
/// `BPF_F_MMAPABLE`: the agent writes without a call of the kernel.
pub const MMAPABLE: u32 = 1 << 10;

/// Frontends of Services.
#[map]
pub static FRONTENDS: HashMap<FrontendKey, Frontend> =
    HashMap::with_max_entries(65_536, NO_PREALLOC);

/// Runs of backends' numbers.
#[map]
pub static SLOTS: Array<Chunk> = Array::with_max_entries(16_384, MMAPABLE);

/// Backends by number; adopted by the next agent, since flows name them.
#[map]
pub static BACKENDS: Array<Backend> = Array::pinned(32_768, MMAPABLE);

/// Sources that Services let in.
#[map]
pub static RANGES: LpmTrie<RangeKey, u8> = LpmTrie::with_max_entries(65_536, NO_PREALLOC);

/// Addresses at which node ports are reached.
#[map]
pub static NODE_ADDRESSES: HashMap<Ip, u8> = HashMap::with_max_entries(65_536, NO_PREALLOC);

/// Which backend a client has; adopted by the next agent.
#[map]
pub static AFFINITIES: LruHashMap<AffinityKey, Affinity> = LruHashMap::pinned(65_536, 0);

/// How many flows each Service got, by its number; adopted by the next agent.
#[map]
pub static HITS: LruPerCpuHashMap<u32, u64> = LruPerCpuHashMap::pinned(16_384, 0);

/// Translations of sockets; adopted by the next agent, since sockets outlive agents.
#[map]
pub static SOCKETS: LruHashMap<SocketKey, SocketValue> = LruHashMap::pinned(65_536, 0);

/// Whose sockets are translated.
#[map]
pub static SCOPE: Array<Scope> = Array::with_max_entries(1, 0);

/// The pods of this node, by address.
#[map]
pub static ENDPOINTS: HashMap<Ip, Endpoint> = HashMap::with_max_entries(4_096, NO_PREALLOC);

/// What each of them is, and under which rules, by its slot.
#[map]
pub static STANDINGS: Array<Standing> = Array::with_max_entries(4_096, MMAPABLE);

/// What the node itself is, and under which rules.
#[map]
pub static HOST: Array<Standing> = Array::with_max_entries(1, MMAPABLE);

/// A hash map that the agent replaces with a larger one when it is full; it stands in the only place of a map of maps.
/// The size here is the pattern's alone. Values are told of as words and not as what they are: Linux 6.1 compares what
/// it found of special fields, and that is another error for a structure than for a map that was made without types.
pub type Growing<K, const WORDS: usize> =
    ArrayOfMaps<Inner<K, [u32; WORDS], 1, { NO_PREALLOC as usize }>, 1>;

const fn words<V>() -> usize {
    size_of::<V>() / size_of::<u32>()
}

/// Identities of all pods and nodes, by address.
#[btf_map]
pub static IDENTITIES: Growing<Ip, { words::<Known>() }> = Growing::new();

/// Which sets judge pods, by number.
#[btf_map]
pub static CHAINS: Growing<u32, { words::<Chains>() }> = Growing::new();

/// Compiled sets of rules.
#[btf_map]
pub static SETS: Growing<u32, { words::<Set>() }> = Growing::new();

/// The entries of all sets.
#[btf_map]
pub static RULES: Growing<RuleKey, { words::<Decision>() }> = Growing::new();

/// Where the value of a key is.
#[inline(always)]
pub fn look_up<K, V, const WORDS: usize>(map: &Growing<K, WORDS>, key: &K) -> Option<*const V> {
    const { assert!(words::<V>() == WORDS && align_of::<V>() <= align_of::<u32>()) };
    Some(map.get_value_ptr_mut(0, key)?.cast_const().cast())
}

/// Address blocks of all sets; the value is the class.
#[map]
pub static CIDRS: LpmTrie<CidrKey, u32> = LpmTrie::with_max_entries(131_072, NO_PREALLOC);

/// Address blocks that know the way to pods: nodes and pods' ranges. The value is the address of the node that has them,
/// of the same family, if one does.
#[map]
pub static NATIVE: LpmTrie<Ip, Ip> = LpmTrie::with_max_entries(16_384, NO_PREALLOC);

/// Devices that lead to other nodes and the outside, by index. The value is how they send back what they received: those
/// with the XDP hook take frames that it sends on.
#[map]
pub static DEVICES: HashMap<u32, u8> = HashMap::with_max_entries(256, NO_PREALLOC);

/// What translation needs to know of the node.
#[map]
pub static SETTINGS: Array<Settings> = Array::with_max_entries(1, 0);

/// Flows: what was decided for them and what becomes of them; adopted by the next agent, as all is that packets and
/// sockets made. What the API says is written anew.
#[map]
pub static FLOWS: Array<FlowSet> = Array::pinned(16_384, MMAPABLE);

/// How keys find their places in [`FLOWS`]; adopted with it.
#[map]
pub static SHAPE: Array<Shape> = Array::pinned(1, 0);

/// Ports of the first fragment, by addresses, protocol and identification; adopted by the next agent.
#[map]
pub static FRAGMENTS: LruHashMap<Datagram, [u16; 2]> = LruHashMap::pinned(4_096, 0);

/// The generation of the rules: flows of an older one are judged anew.
#[map]
pub static GENERATION: Array<u32> = Array::with_max_entries(1, 0);

/// Events of flows: a ring for each CPU, whose sizes here are the pattern's alone.
#[btf_map]
pub static EVENTS: ArrayOfMaps<Ring<Event, 4_096>, 1> = ArrayOfMaps::new();

/// Resolvers' answers that are held.
#[map]
pub static ANSWERS: RingBuf = RingBuf::with_byte_size(1 << 18, 0);

/// Whether they are held.
#[map]
pub static LISTENING: Array<Listening> = Array::with_max_entries(1, MMAPABLE);

/// Counters of each CPU.
#[map]
pub static COUNTERS: PerCpuArray<Counters> = PerCpuArray::with_max_entries(1, 0);

/// Puts an entry into a map that forgets what was not asked for longest; false where `flags` forbid it. When all of a
/// full map is asked for now and then, what never was yet goes first, and that is what came last: so it is asked for
/// at once.
#[inline(always)]
pub fn remember<K, V>(map: &LruHashMap<K, V>, key: &K, value: &V, flags: u64) -> bool {
    map.insert(key, value, flags).is_ok() && map.get_ptr(key).is_some()
}
