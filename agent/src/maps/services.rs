//! Services in the kernel's maps.

use std::net::IpAddr;

use anyhow::{Context, Result};
use aya::maps::lpm_trie::{Key, LpmTrie};
use aya::maps::{Array, HashMap, MapData};
use bytemuck::must_cast;
use ipnet::IpNet;
use xebec_dataplane_common::ip::Ip;
use xebec_dataplane_common::service::{Backend, Chunk, Frontend, FrontendKey, RangeKey, Scope};

use super::{gone, key, take};

/// Frontends, slots and backends of Services.
pub struct ServiceMaps {
    frontends: HashMap<MapData, [u8; 20], [u8; 28]>,
    slots: Array<MapData, [u8; 64]>,
    backends: Array<MapData, [u8; 24]>,
    ranges: LpmTrie<MapData, [u8; 20], u8>,
    node_addresses: HashMap<MapData, [u8; 16], u8>,
    scope: Array<MapData, [u8; 16]>,
}

impl ServiceMaps {
    pub(crate) fn new(ebpf: &mut aya::Ebpf) -> Result<Self> {
        Ok(Self {
            frontends: take(ebpf, "FRONTENDS")?,
            slots: take(ebpf, "SLOTS")?,
            backends: take(ebpf, "BACKENDS")?,
            ranges: take(ebpf, "RANGES")?,
            node_addresses: take(ebpf, "NODE_ADDRESSES")?,
            scope: take(ebpf, "SCOPE")?,
        })
    }

    /// How many chunks of slots there is room for.
    pub fn chunks(&self) -> u32 {
        self.slots.len()
    }

    /// How many backends there is room for; the first number is no backend's.
    pub fn backends(&self) -> u32 {
        self.backends.len()
    }

    /// Tells whose sockets are translated.
    pub fn set_scope(&mut self, scope: Scope) -> Result<()> {
        self.scope
            .set(0, must_cast::<_, [u8; 16]>(scope), 0)
            .context("could not write whose sockets are translated")
    }

    /// Writes a backend.
    pub fn set_backend(&mut self, number: u32, backend: Backend) -> Result<()> {
        self.backends
            .set(number, must_cast::<_, [u8; 24]>(backend), 0)
            .context("the map of backends is full")
    }

    /// Writes a chunk of slots, which no frontend names yet.
    pub fn set_chunk(&mut self, number: u32, chunk: Chunk) -> Result<()> {
        self.slots
            .set(number, must_cast::<_, [u8; 64]>(chunk), 0)
            .context("the map of slots is full")
    }

    /// Writes a frontend.
    pub fn set_frontend(&mut self, key: FrontendKey, value: Frontend) -> Result<()> {
        self.frontends
            .insert(
                must_cast::<_, [u8; 20]>(key),
                must_cast::<_, [u8; 28]>(value),
                0,
            )
            .context("the map of frontends is full")
    }

    /// Removes a frontend; one that is not there is no error.
    pub fn remove_frontend(&mut self, key: FrontendKey) -> Result<()> {
        gone(self.frontends.remove(&must_cast(key)), "a frontend")
    }

    /// Lets sources of a block into a Service whose frontends have `SOURCE_RANGES`.
    pub fn set_range(&mut self, service: u32, block: IpNet) -> Result<()> {
        self.ranges
            .insert(&range_key(service, block), 1, 0)
            .context("the map of source ranges is full")
    }

    /// Takes such a block back; one that is not there is no error.
    pub fn remove_range(&mut self, service: u32, block: IpNet) -> Result<()> {
        gone(
            self.ranges.remove(&range_key(service, block)),
            "a source range",
        )
    }

    /// Makes node ports reachable at an address; `whose` is `OWN` or `OTHERS`.
    pub fn set_node_address(&mut self, address: IpAddr, whose: u8) -> Result<()> {
        self.node_addresses
            .insert(key(address), whose, 0)
            .context("the map of node addresses is full")
    }

    /// Node ports are reached there no more.
    pub fn remove_node_address(&mut self, address: IpAddr) -> Result<()> {
        gone(self.node_addresses.remove(&key(address)), "a node address")
    }
}

fn range_key(service: u32, block: IpNet) -> Key<[u8; 20]> {
    let address = Ip::from(block.network());
    let bits = 32 + address.prefix_bits(block.prefix_len());
    Key::new(bits, must_cast(RangeKey { service, address }))
}
