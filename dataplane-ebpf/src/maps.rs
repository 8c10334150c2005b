//! The maps of the dataplane.

use aya_ebpf::macros::map;
use aya_ebpf::maps::{Array, HashMap, LpmTrie, LruHashMap, PerCpuArray, RingBuf};
use xebec_dataplane_common::flow::{Counters, Flow, FlowKey};
use xebec_dataplane_common::nat::{Nat, Settings, Tuple};
use xebec_dataplane_common::policy::{CidrKey, Endpoint, RuleKey, Set};
use xebec_dataplane_common::service::{
    Address, BackendKey, FrontendKey, FrontendValue, ReverseKey, Scope,
};

/// `BPF_F_NO_PREALLOC`: entries take memory only when they are there.
const NO_PREALLOC: u32 = 1;

/// Frontends of Services.
#[map]
pub static FRONTENDS: HashMap<FrontendKey, FrontendValue> =
    HashMap::with_max_entries(65_536, NO_PREALLOC);

/// Backends by set and slot.
#[map]
pub static BACKENDS: HashMap<BackendKey, Address> = HashMap::with_max_entries(262_144, NO_PREALLOC);

/// What a socket asked for, by what it was given.
#[map]
pub static REVERSE: LruHashMap<ReverseKey, Address> = LruHashMap::with_max_entries(65_536, 0);

/// Whose sockets are translated.
#[map]
pub static SCOPE: Array<Scope> = Array::with_max_entries(1, 0);

/// The pods of this node, by address.
#[map]
pub static ENDPOINTS: HashMap<u32, Endpoint> = HashMap::with_max_entries(4_096, NO_PREALLOC);

/// Identities of all pods and nodes, by address.
#[map]
pub static IDENTITIES: HashMap<u32, u32> = HashMap::with_max_entries(524_288, NO_PREALLOC);

/// Compiled sets of rules.
#[map]
pub static SETS: HashMap<u32, Set> = HashMap::with_max_entries(16_384, NO_PREALLOC);

/// The entries of all sets; the value is the rule.
#[map]
pub static RULES: HashMap<RuleKey, u32> = HashMap::with_max_entries(524_288, NO_PREALLOC);

/// Address blocks of all sets; the value is the class.
#[map]
pub static CIDRS: LpmTrie<CidrKey, u32> = LpmTrie::with_max_entries(131_072, NO_PREALLOC);

/// Address blocks that know the way to pods: nodes and pods' ranges.
#[map]
pub static NATIVE: LpmTrie<u32, u8> = LpmTrie::with_max_entries(16_384, NO_PREALLOC);

/// Devices with the XDP hook, by index: they take frames that it sends on. The value is how they send back what they
/// received.
#[map]
pub static EXPRESS: HashMap<u32, u8> = HashMap::with_max_entries(256, NO_PREALLOC);

/// What translation needs to know of the node.
#[map]
pub static SETTINGS: Array<Settings> = Array::with_max_entries(1, 0);

/// Translations, two for each flow. With flows, the one map that is adopted by the next agent: all others are
/// rebuilt from the API.
#[map]
pub static NATS: LruHashMap<Tuple, Nat> = LruHashMap::pinned(131_072, 0);

/// Flows that were allowed; adopted by the next agent.
#[map]
pub static FLOWS: LruHashMap<FlowKey, Flow> = LruHashMap::pinned(131_072, 0);

/// Ports of the first fragment, by addresses, protocol and identification.
#[map]
pub static FRAGMENTS: LruHashMap<[u32; 3], [u16; 2]> = LruHashMap::with_max_entries(4_096, 0);

/// The generation of the rules: flows of an older one are judged anew.
#[map]
pub static GENERATION: Array<u32> = Array::with_max_entries(1, 0);

/// Events of flows.
#[map]
pub static EVENTS: RingBuf = RingBuf::with_byte_size(1 << 20, 0);

/// Counters of each CPU.
#[map]
pub static COUNTERS: PerCpuArray<Counters> = PerCpuArray::with_max_entries(1, 0);
