//! Which backend a new flow to a Service goes to.

use aya_ebpf::helpers::bpf_get_prandom_u32;
use aya_ebpf::maps::lpm_trie::Key;
use xebec_dataplane_common::ip::Ip;
use xebec_dataplane_common::nat::Tuple;
use xebec_dataplane_common::service::{
    Affinity, AffinityKey, Backend, CHUNK, DROP_INSIDE, DROP_OUTSIDE, ENDING, EXTERNAL, Frontend,
    FrontendKey, HASH_INSIDE, HASH_OUTSIDE, OWN, RangeKey, Run, SOURCE_RANGES, THIS_NODE,
};

use crate::flow::now_ns;
use crate::hash;
use crate::maps::{AFFINITIES, BACKENDS, FRONTENDS, HITS, NODE_ADDRESSES, RANGES, SLOTS, remember};

/// The address is no Service's.
pub const NONE: u32 = 0;
/// A backend was chosen.
pub const CHOSEN: u32 = 1;
/// The Service has no endpoints: the sender is told at once.
pub const REFUSE: u32 = 2;
/// The packet must not be let in, or there are endpoints but none that may be used from here.
pub const DROP: u32 = 3;

/// Who asks.
#[derive(Clone, Copy)]
pub struct Client {
    /// The address, or the cookie of the network namespace, for affinity.
    pub address: Ip,
    /// Whether it is a namespace.
    pub namespace: bool,
    /// Whether its own address is known only to the hook that its packets meet.
    pub unseen: bool,
    /// A pod or a node of the cluster.
    pub inside: bool,
}

/// What was chosen.
pub struct Choice {
    /// The backend's number.
    pub backend: u32,
    /// The backend's generation.
    pub generation: u32,
    /// Number of the Service's port.
    pub service: u32,
    /// The frontend's flags.
    pub flags: u32,
    /// The backend's address.
    pub address: Ip,
    /// The backend's port.
    pub port: u16,
}

impl Choice {
    /// None yet.
    #[inline(always)]
    pub const fn new() -> Self {
        Self {
            backend: 0,
            generation: 0,
            service: 0,
            flags: 0,
            address: Ip::NONE,
            port: 0,
        }
    }
}

/// The frontend with this key. Where one changes, the kernel puts the new entry before it takes the old one away, but
/// elsewhere: who passes in between may find neither, and both the next time.
#[inline(always)]
fn at(key: &FrontendKey) -> Option<&'static Frontend> {
    // SAFETY: entries stay readable until the program ends.
    unsafe { FRONTENDS.get(key).or_else(|| FRONTENDS.get(key)) }
}

/// The frontend of a destination.
#[inline(always)]
fn frontend(tuple: &Tuple, inside: bool) -> Option<&'static Frontend> {
    let mut key = FrontendKey {
        address: tuple.destination,
        port: tuple.destination_port,
        protocol: tuple.protocol,
        pad: 0,
    };
    if let Some(found) = at(&key) {
        return Some(found);
    }
    // SAFETY: the value is read once, here.
    let whose = *(unsafe { NODE_ADDRESSES.get(&tuple.destination) }?);
    if !inside && whose != OWN {
        return None;
    }
    key.address = tuple.destination.every();
    let found = at(&key)?;
    if whose != OWN && found.flags & THIS_NODE != 0 {
        return None;
    }
    Some(found)
}

/// Whether a destination inside the cluster is a Service's.
#[inline(always)]
pub fn is_frontend(tuple: &Tuple) -> bool {
    frontend(tuple, true).is_some()
}

/// The number of the Service that a destination at any node is of; 0 for none.
#[inline(never)]
pub fn service(tuple: &Tuple) -> u32 {
    match frontend(tuple, true) {
        Some(frontend) => frontend.service,
        None => 0,
    }
}

/// Chooses a backend for a new flow.
#[inline(never)]
pub fn choose(tuple: &Tuple, client: &Client, choice: &mut Choice) -> u32 {
    choice.service = 0;
    let Some(frontend) = frontend(tuple, client.inside) else {
        return NONE;
    };
    // A pod's loopback is its own, and what comes by a wire is for nobody's: the node's own sockets alone may.
    if (!client.namespace || client.unseen) && tuple.destination.is_loopback_v4() {
        return NONE;
    }
    let (service, flags) = (frontend.service, frontend.flags);
    choice.service = service;
    choice.flags = flags;
    if flags & SOURCE_RANGES != 0 {
        // Its packets' hook sees what address it has.
        if client.unseen {
            return NONE;
        }
        if !client.namespace && !lets_in(service, &tuple.source) {
            return DROP;
        }
    }
    // An address that is not meant for the outside serves it as it serves the cluster.
    let inside = client.inside || flags & EXTERNAL == 0;
    let (run, hashed, drops) = if inside {
        (frontend.inside, flags & HASH_INSIDE, flags & DROP_INSIDE)
    } else {
        (frontend.outside, flags & HASH_OUTSIDE, flags & DROP_OUTSIDE)
    };
    if run.count == 0 {
        return if drops != 0 { DROP } else { REFUSE };
    }
    let key = AffinityKey {
        client: client.address,
        service,
        namespace: u32::from(client.namespace),
    };
    let lasts = frontend.affinity;
    if lasts != 0 && remembered(&key, lasts, choice) {
        hit(service);
        return CHOSEN;
    }
    let place = if hashed != 0 {
        hash::of(hash::ALL_NODES, tuple, lasts != 0)
    } else {
        // SAFETY: the helper has no arguments.
        unsafe { bpf_get_prandom_u32() }
    };
    if !slot(&run, place, choice) {
        return NONE;
    }
    if lasts != 0 {
        let value = Affinity {
            seen: now_ns(),
            backend: choice.backend,
            generation: choice.generation,
        };
        remember(&AFFINITIES, &key, &value, 0);
    }
    hit(service);
    CHOSEN
}

/// Whether a packet that begins nothing is for a Service without endpoints that lets its sender in. What such a Service
/// had is over.
#[inline(never)]
pub fn refuses(tuple: &Tuple, inside: bool, choice: &mut Choice) -> bool {
    let Some(frontend) = frontend(tuple, inside) else {
        return false;
    };
    if tuple.destination.is_loopback_v4() {
        return false;
    }
    let flags = frontend.flags;
    choice.service = frontend.service;
    let (run, drops) = if inside || flags & EXTERNAL == 0 {
        (frontend.inside, flags & DROP_INSIDE)
    } else {
        (frontend.outside, flags & DROP_OUTSIDE)
    };
    run.count == 0
        && drops == 0
        && (flags & SOURCE_RANGES == 0 || lets_in(frontend.service, &tuple.source))
}

/// Whether a Service lets a source in.
#[inline(always)]
fn lets_in(service: u32, source: &Ip) -> bool {
    let key = RangeKey {
        service,
        address: *source,
    };
    RANGES.get(&Key::new(160, key)).is_some()
}

/// The backend in a place of a run.
#[inline(always)]
fn slot(run: &Run, place: u32, choice: &mut Choice) -> bool {
    let slot = place % run.count;
    let Some(chunk) = SLOTS.get(run.first + slot / CHUNK as u32) else {
        return false;
    };
    let number = chunk[slot as usize % CHUNK];
    let Some(backend) = BACKENDS.get(number) else {
        return false;
    };
    take(number, backend, choice)
}

#[inline(always)]
fn take(number: u32, backend: &Backend, choice: &mut Choice) -> bool {
    choice.backend = number;
    choice.generation = backend.generation;
    choice.address = backend.address;
    choice.port = backend.port;
    choice.generation & 1 == 1
}

/// The backend that a client had before, if it may still have it.
#[inline(always)]
fn remembered(key: &AffinityKey, lasts: u32, choice: &mut Choice) -> bool {
    let Some(affinity) = AFFINITIES.get_ptr_mut(key) else {
        return false;
    };
    // SAFETY: entries of a map stay readable and writable until the program ends, even when they are replaced.
    unsafe {
        let now = now_ns();
        let idle = now.saturating_sub((*affinity).seen);
        if idle > u64::from(lasts) * xebec_dataplane_common::flow::SECOND {
            return false;
        }
        let number = (*affinity).backend;
        let Some(backend) = BACKENDS.get(number) else {
            return false;
        };
        // One that is about to go gets nothing new.
        if !backend.is((*affinity).generation) || backend.flags & ENDING != 0 {
            return false;
        }
        (*affinity).seen = now;
        take(number, backend, choice)
    }
}

/// Counts a flow that a Service got.
#[inline(always)]
fn hit(service: u32) {
    match HITS.get_ptr_mut(&service) {
        // SAFETY: the entry is this CPU's own.
        Some(hits) => unsafe { *hits += 1 },
        None => {
            let _ = HITS.insert(&service, &1, 0);
        }
    }
}
