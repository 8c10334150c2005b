//! Services in the kernel's maps.

use std::net::IpAddr;
use std::sync::atomic::{Ordering, fence};

use anyhow::{Context, Result};
use aya::maps::lpm_trie::{Key, LpmTrie};
use aya::maps::{Array, HashMap, Map, MapData, MapError, PerCpuHashMap};
use bytemuck::{cast_slice, must_cast};
use ipnet::IpNet;
use xebec_dataplane_common::ip::Ip;
use xebec_dataplane_common::service::{
    Backend, Chunk, Frontend, FrontendKey, GIVEN, RangeKey, Scope, SocketKey,
};

use super::table::Table;
use super::{gone, key, take};

/// How many entries maps have room for, or have.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Room {
    /// Frontends.
    pub frontends: u32,
    /// Chunks of slots.
    pub chunks: u32,
    /// Backends, with the first entry, which is nobody's.
    pub backends: u32,
    /// Blocks of sources.
    pub ranges: u32,
}

/// The kernel's side of Services; tests put a plain model in its place.
pub trait ServiceKernel: Send + 'static {
    /// How much there is room for.
    fn room(&self) -> Room;
    /// Writes backends. One that is another than before was not there for a while.
    fn set_backends(&mut self, backends: &[(u32, Backend)]) -> Result<()>;
    /// Writes chunks of slots, which no frontend names yet.
    fn set_chunks(&mut self, chunks: &[(u32, Chunk)]) -> Result<()>;
    /// Writes frontends; each takes the place of the one before at once.
    fn set_frontends(&mut self, frontends: &[(FrontendKey, Frontend)]) -> Result<()>;
    /// Removes a frontend; one that is not there is no error.
    fn remove_frontend(&mut self, key: FrontendKey) -> Result<()>;
    /// Lets sources of a block into a Service whose frontends have `SOURCE_RANGES`.
    fn set_range(&mut self, service: u32, block: IpNet) -> Result<()>;
    /// Takes such a block back; one that is not there is no error.
    fn remove_range(&mut self, service: u32, block: IpNet) -> Result<()>;
    /// Makes node ports reachable at an address; `whose` is `OWN` or `OTHERS`.
    fn set_node_address(&mut self, address: IpAddr, whose: u8) -> Result<()>;
    /// Node ports are reached there no more.
    fn remove_node_address(&mut self, address: IpAddr) -> Result<()>;
}

/// Which sockets were sent to a backend by a Service.
pub struct SocketMap(HashMap<MapData, [u8; 32], [u8; 32]>);

impl SocketMap {
    pub(crate) fn new(ebpf: &mut aya::Ebpf) -> Result<Self> {
        Ok(Self(take(ebpf, "SOCKETS")?))
    }

    /// Whether the socket with this cookie got to an address and port through a Service.
    pub fn is_translated(&self, cookie: u64, address: IpAddr, port: u16) -> bool {
        let key = SocketKey {
            cookie,
            address: address.into(),
            port: port.to_be(),
            side: GIVEN,
            pad: 0,
        };
        self.0.get(&must_cast(key), 0).is_ok()
    }
}

/// How many flows each Service got.
pub struct Hits(PerCpuHashMap<MapData, u32, u64>);

impl Hits {
    pub(crate) fn new(ebpf: &mut aya::Ebpf) -> Result<Self> {
        Ok(Self(take(ebpf, "HITS")?))
    }

    /// How often a backend of the Service with this number was chosen since the node started, or since the table forgot
    /// it for others.
    pub fn of(&self, service: u32) -> Result<u64> {
        match self.0.get(&service, 0) {
            Ok(each_cpu) => Ok(each_cpu.iter().sum()),
            Err(MapError::KeyNotFound) => Ok(0),
            Err(error) => Err(error).context("could not read how many flows a Service got"),
        }
    }
}

/// Frontends, slots and backends of Services.
pub struct ServiceMaps {
    frontends: Table,
    slots: Table,
    backends: Table,
    ranges: LpmTrie<MapData, [u8; 20], u8>,
    max_ranges: u32,
    node_addresses: HashMap<MapData, [u8; 16], u8>,
    scope: Array<MapData, [u8; 16]>,
}

/// The table behind a map of the loaded object.
fn table(ebpf: &mut aya::Ebpf, name: &str) -> Result<Table> {
    let map = ebpf
        .map(name)
        .with_context(|| format!("the eBPF object has no map {name}"))?;
    let (Map::Array(data) | Map::HashMap(data)) = map else {
        anyhow::bail!("the eBPF map {name} is neither a hash map nor an array");
    };
    Table::of(data).with_context(|| format!("could not look at the eBPF map {name}"))
}

impl ServiceMaps {
    pub(crate) fn new(ebpf: &mut aya::Ebpf) -> Result<Self> {
        let max_ranges = match ebpf.map("RANGES") {
            Some(Map::LpmTrie(data)) => data
                .info()
                .context("could not look at the eBPF map RANGES")?
                .max_entries(),
            _ => anyhow::bail!("the eBPF object has no map RANGES"),
        };
        Ok(Self {
            frontends: table(ebpf, "FRONTENDS")?,
            slots: table(ebpf, "SLOTS")?,
            backends: table(ebpf, "BACKENDS")?,
            ranges: take(ebpf, "RANGES")?,
            max_ranges,
            node_addresses: take(ebpf, "NODE_ADDRESSES")?,
            scope: take(ebpf, "SCOPE")?,
        })
    }

    /// Maps that belong to no program, for measuring.
    pub fn standalone(room: Room) -> Result<Self> {
        const NO_PREALLOC: u32 = 1;
        let new = || -> Result<Self, anyhow::Error> {
            Ok(Self {
                frontends: Table::hash(20, 28, room.frontends)?,
                slots: Table::array(size_of::<Chunk>(), room.chunks)?,
                backends: Table::array(size_of::<Backend>(), room.backends)?,
                ranges: LpmTrie::create(room.ranges, NO_PREALLOC)?,
                max_ranges: room.ranges,
                node_addresses: HashMap::create(1024, 0)?,
                scope: Array::create(1, 0)?,
            })
        };
        new().context("could not make the maps of Services (is this root?)")
    }

    /// Tells whose sockets are translated.
    pub fn set_scope(&mut self, scope: Scope) -> Result<()> {
        self.scope
            .set(0, must_cast::<_, [u8; 16]>(scope), 0)
            .context("could not write whose sockets are translated")
    }

    /// A frontend as the kernel has it.
    pub fn frontend(&self, key: FrontendKey) -> Result<Option<Frontend>> {
        let mut value = [0; 28];
        let there = self
            .frontends
            .get(bytemuck::bytes_of(&key), &mut value)
            .context("could not read a frontend")?;
        Ok(there.then(|| must_cast(value)))
    }

    /// A chunk of slots as the kernel has it.
    pub fn chunk(&self, number: u32) -> Result<Chunk> {
        let mut value = [0; 64];
        self.slots
            .get(&number.to_ne_bytes(), &mut value)
            .context("could not read slots")?;
        Ok(must_cast(value))
    }

    /// A backend as the kernel has it.
    pub fn backend(&self, number: u32) -> Result<Backend> {
        let mut value = [0; 24];
        self.backends
            .get(&number.to_ne_bytes(), &mut value)
            .context("could not read a backend")?;
        Ok(must_cast(value))
    }

    /// All backends as the kernel has them, those that are gone among them.
    pub fn all_backends(&self) -> Result<Vec<Backend>> {
        (0..self.backends.capacity())
            .map(|number| self.backend(number))
            .collect()
    }
}

impl ServiceKernel for ServiceMaps {
    fn room(&self) -> Room {
        Room {
            frontends: self.frontends.capacity(),
            chunks: self.slots.capacity(),
            backends: self.backends.capacity(),
            ranges: self.max_ranges,
        }
    }

    fn set_backends(&mut self, backends: &[(u32, Backend)]) -> Result<()> {
        let mut others = Vec::new();
        for (number, backend) in backends {
            let Some(place) = self.backends.place(*number) else {
                others.push((*number, *backend));
                continue;
            };
            let place = place.cast::<Backend>().as_ptr();
            // SAFETY: the place is in the mapped array, which has 8 bytes' alignment and entries of this size.
            // Programs read meanwhile: who reads the new generation must read the rest as new.
            unsafe {
                (&raw mut (*place).address).write_volatile(backend.address);
                (&raw mut (*place).port).write_volatile(backend.port);
                (&raw mut (*place).flags).write_volatile(backend.flags);
                fence(Ordering::Release);
                (&raw mut (*place).generation).write_volatile(backend.generation);
            }
        }
        let keys: Vec<u32> = others.iter().map(|(number, _)| *number).collect();
        let values: Vec<Backend> = others.iter().map(|(_, backend)| *backend).collect();
        self.backends
            .update(cast_slice(&keys), cast_slice(&values))
            .context("could not write backends")
    }

    fn set_chunks(&mut self, chunks: &[(u32, Chunk)]) -> Result<()> {
        let mut others = Vec::new();
        for (number, chunk) in chunks {
            match self.slots.place(*number) {
                // SAFETY: the place is in the mapped array, whose entries have this size.
                Some(place) => unsafe { place.cast::<Chunk>().write_volatile(*chunk) },
                None => others.push((*number, *chunk)),
            }
        }
        fence(Ordering::Release);
        let keys: Vec<u32> = others.iter().map(|(number, _)| *number).collect();
        let values: Vec<Chunk> = others.iter().map(|(_, chunk)| *chunk).collect();
        self.slots
            .update(cast_slice(&keys), cast_slice(&values))
            .context("could not write slots")
    }

    fn set_frontends(&mut self, frontends: &[(FrontendKey, Frontend)]) -> Result<()> {
        let keys: Vec<FrontendKey> = frontends.iter().map(|(key, _)| *key).collect();
        let values: Vec<Frontend> = frontends.iter().map(|(_, value)| *value).collect();
        self.frontends
            .update(cast_slice(&keys), cast_slice(&values))
            .context("could not write frontends")
    }

    fn remove_frontend(&mut self, key: FrontendKey) -> Result<()> {
        self.frontends
            .remove(bytemuck::bytes_of(&key))
            .map(drop)
            .context("could not remove a frontend")
    }

    fn set_range(&mut self, service: u32, block: IpNet) -> Result<()> {
        self.ranges
            .insert(&range_key(service, block), 1, 0)
            .context("the map of source ranges is full")
    }

    fn remove_range(&mut self, service: u32, block: IpNet) -> Result<()> {
        gone(
            self.ranges.remove(&range_key(service, block)),
            "a source range",
        )
    }

    fn set_node_address(&mut self, address: IpAddr, whose: u8) -> Result<()> {
        self.node_addresses
            .insert(key(address), whose, 0)
            .context("the map of node addresses is full")
    }

    fn remove_node_address(&mut self, address: IpAddr) -> Result<()> {
        gone(self.node_addresses.remove(&key(address)), "a node address")
    }
}

fn range_key(service: u32, block: IpNet) -> Key<[u8; 20]> {
    let address = Ip::from(block.network());
    let bits = 32 + address.prefix_bits(block.prefix_len());
    Key::new(bits, must_cast(RangeKey { service, address }))
}
