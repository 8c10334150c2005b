//! Endpoints, identities and compiled policy.

use std::net::IpAddr;

use anyhow::{Context, Result, bail};
use aya::maps::lpm_trie::{Key, LpmTrie};
use aya::maps::{Array, Map, MapData};
use bytemuck::{bytes_of, must_cast, must_cast_slice};
use ipnet::IpNet;
use tracing::warn;
use xebec_dataplane_common::ip::Ip;
use xebec_dataplane_common::policy::{Chains, CidrKey, Decision, Known, RuleKey, Set};
use xebec_policy::kernel::{Endpoint, PolicyKernel, Room};

use super::endpoints::Endpoints;
use super::growing::Growing;
use super::{gone, key, present, take};

/// The maps that pods are judged by.
pub struct PolicyMaps {
    endpoints: Endpoints,
    identities: Growing,
    sets: Growing,
    rules: Growing,
    blocks: LpmTrie<MapData, [u8; size_of::<CidrKey>()], u32>,
    generation: Array<MapData, u32>,
    room: Room,
    /// Whether the node itself is under rules.
    host_judged: bool,
}

/// Addresses of pods and nodes at most: 96 MB of the kernel's memory.
const IDENTITIES: u32 = 1 << 20;
/// Sets at most: 10 MB.
const SETS: u32 = 1 << 16;
/// Entries of all sets at most: 96 MB.
const RULES: u32 = 1 << 20;

fn block_key(set: u32, block: IpNet) -> Key<[u8; size_of::<CidrKey>()]> {
    let address = Ip::from(block.network());
    let bits = 32 + address.prefix_bits(block.prefix_len());
    Key::new(bits, must_cast(CidrKey { set, address }))
}

impl PolicyMaps {
    pub(crate) fn new(ebpf: &mut aya::Ebpf) -> Result<Self> {
        let rules = (size_of::<RuleKey>(), size_of::<Decision>());
        let rules = Growing::new(ebpf, "RULES", rules, RULES)?;
        let sets = Growing::new(ebpf, "SETS", (size_of::<u32>(), size_of::<Set>()), SETS)?;
        let identities = (size_of::<Ip>(), size_of::<Known>());
        let identities = Growing::new(ebpf, "IDENTITIES", identities, IDENTITIES)?;
        let blocks = ebpf.take_map("CIDRS");
        let blocks = blocks.context("the eBPF object has no map CIDRS")?;
        let Map::LpmTrie(data) = &blocks else {
            bail!("the eBPF map CIDRS is of another kind");
        };
        let info = data.info().context("could not ask for a map's size")?;
        let room = Room {
            rules: rules.most(),
            blocks: info.max_entries() as usize,
            sets: sets.most(),
        };
        Ok(Self {
            endpoints: Endpoints::new(ebpf)?,
            identities,
            sets,
            rules,
            blocks: LpmTrie::try_from(blocks).context("the eBPF map CIDRS has other entries")?,
            generation: take(ebpf, "GENERATION")?,
            room,
            host_judged: false,
        })
    }

    /// What a pod of this node is to the programs.
    pub fn endpoint(&self, address: IpAddr) -> Result<Option<Endpoint>> {
        self.endpoints.get(address)
    }
}

impl PolicyKernel for PolicyMaps {
    fn room(&self) -> Room {
        self.room
    }

    fn set_endpoint(&mut self, address: IpAddr, endpoint: Endpoint) -> Result<()> {
        self.endpoints.set(address, endpoint)
    }

    fn set_host(&mut self, chains: Chains) -> Result<()> {
        // Until now nobody took note of the node's flows.
        if !std::mem::replace(&mut self.host_judged, chains != Chains::default()) {
            if let Err(error) = present::note() {
                warn!(
                    error = format!("{error:#}"),
                    "connections of the node that are there may be taken for new ones by its policies"
                );
            }
        }
        self.endpoints.set_host(chains)
    }

    fn remove_endpoint(&mut self, address: IpAddr) -> Result<()> {
        self.endpoints.remove(address)
    }

    fn set_identity(&mut self, address: IpAddr, identity: u32) -> Result<()> {
        let address = Ip::from(address);
        let known = Known { address, identity };
        self.identities
            .update(bytes_of(&address), bytes_of(&known))
            .context("an address gets no identity")
    }

    fn remove_identity(&mut self, address: IpAddr) -> Result<()> {
        self.identities.remove_all(&key(address))
    }

    fn set_rules(&mut self, rules: &[(RuleKey, Decision)]) -> Result<()> {
        let (keys, values): (Vec<RuleKey>, Vec<Decision>) = rules.iter().copied().unzip();
        self.rules
            .update(must_cast_slice(&keys), must_cast_slice(&values))
            .context("rules are not in the kernel")
    }

    fn remove_rules(&mut self, rules: &[RuleKey]) -> Result<()> {
        self.rules
            .remove_all(must_cast_slice(rules))
            .context("rules stay in the kernel")
    }

    fn set_block(&mut self, set: u32, block: IpNet, class: u32) -> Result<()> {
        self.blocks
            .insert(&block_key(set, block), class, 0)
            .context("the map of address blocks is full")
    }

    fn remove_block(&mut self, set: u32, block: IpNet) -> Result<()> {
        gone(
            self.blocks.remove(&block_key(set, block)),
            "an address block",
        )
    }

    fn set_set(&mut self, set: u32, value: Set) -> Result<()> {
        self.sets
            .update(bytes_of(&set), bytes_of(&value))
            .context("a set is not in the kernel")
    }

    fn remove_set(&mut self, set: u32) -> Result<()> {
        self.endpoints.remove_set(set)?;
        self.sets
            .remove_all(bytes_of(&set))
            .context("a set stays in the kernel")
    }

    fn set_generation(&mut self, generation: u32) -> Result<()> {
        self.generation
            .set(0, generation, 0)
            .context("could not write the generation of the rules")
    }
}
