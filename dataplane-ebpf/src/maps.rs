//! The maps of the dataplane.

use aya_ebpf::macros::map;
use aya_ebpf::maps::{HashMap, LruHashMap};
use xebec_dataplane_common::{Address, BackendKey, FrontendKey, FrontendValue, ReverseKey};

/// Frontends of Services.
#[map]
pub static FRONTENDS: HashMap<FrontendKey, FrontendValue> = HashMap::with_max_entries(65_536, 1);

/// Backends by set and slot.
#[map]
pub static BACKENDS: HashMap<BackendKey, Address> = HashMap::with_max_entries(262_144, 1);

/// What a socket asked for, by what it was given.
#[map]
pub static REVERSE: LruHashMap<ReverseKey, Address> = LruHashMap::with_max_entries(65_536, 0);
