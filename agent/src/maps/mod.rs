//! The kernel's maps, as the agent writes and reads them.

pub(crate) mod batch;
pub(crate) mod dump;
mod endpoints;
mod events;
pub mod flow_table;
mod growing;
mod memory;
pub(crate) mod parted;
mod policy;
mod present;
mod services;
mod table;
pub(crate) mod usage;

use std::net::IpAddr;

use anyhow::{Context, Result};
use aya::maps::lpm_trie::{Key, LpmTrie};
use aya::maps::{Array, Map, MapData, MapError};
use bytemuck::must_cast;
use ipnet::IpNet;
use xebec_dataplane_common::ip::Ip;
use xebec_dataplane_common::nat::Settings;

pub(crate) use events::{Counting, EVENTS, Rings, places};
pub use events::{FlowMaps, Report};
pub use policy::PolicyMaps;
pub use services::{Hits, Room, ServiceKernel, ServiceMaps, SocketMap};

/// Takes a map out of the loaded object by its name.
pub(crate) fn take<T: TryFrom<Map, Error = MapError>>(
    ebpf: &mut aya::Ebpf,
    name: &str,
) -> Result<T> {
    let map = ebpf
        .take_map(name)
        .with_context(|| format!("the eBPF object has no map {name}"))?;
    T::try_from(map).with_context(|| format!("the eBPF map {name} is of another kind"))
}

/// What is not there need not be removed.
pub(crate) fn gone(outcome: Result<(), MapError>, what: &'static str) -> Result<()> {
    match outcome {
        Ok(()) | Err(MapError::KeyNotFound) => Ok(()),
        Err(MapError::SyscallError(error))
            if error.io_error.raw_os_error() == Some(libc::ENOENT) =>
        {
            Ok(())
        }
        Err(error) => Err(error).with_context(|| format!("could not remove {what}")),
    }
}

/// An address as the maps hold it.
fn key(address: IpAddr) -> [u8; 16] {
    must_cast(Ip::from(address))
}

/// A block as the maps hold it.
fn block_key(block: IpNet) -> Key<[u8; 16]> {
    let address = Ip::from(block.network());
    Key::new(address.prefix_bits(block.prefix_len()), must_cast(address))
}

/// Translation: settings, and who needs none.
pub struct NetworkMaps {
    settings: Array<MapData, [u8; size_of::<Settings>()]>,
    native: LpmTrie<MapData, [u8; 16], [u8; 16]>,
}

impl NetworkMaps {
    pub(crate) fn new(ebpf: &mut aya::Ebpf) -> Result<Self> {
        Ok(Self {
            settings: take(ebpf, "SETTINGS")?,
            native: take(ebpf, "NATIVE")?,
        })
    }

    /// Tells the programs of the node.
    pub fn set_settings(&mut self, settings: Settings) -> Result<()> {
        self.settings
            .set(0, must_cast::<_, [u8; size_of::<Settings>()]>(settings), 0)
            .context("could not write the settings of translation")
    }

    /// From here on packets to this block keep their source; `home` is the node that has it, if one does.
    pub fn set_native(&mut self, block: IpNet, home: Option<IpAddr>) -> Result<()> {
        let home = home.map_or(Ip::NONE, Ip::from);
        self.native
            .insert(&block_key(block), must_cast::<_, [u8; 16]>(home), 0)
            .context("the map of native address blocks is full")
    }

    /// Packets to this block bear the node's address again.
    pub fn remove_native(&mut self, block: IpNet) -> Result<()> {
        gone(
            self.native.remove(&block_key(block)),
            "a native address block",
        )
    }
}
