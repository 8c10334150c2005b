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

use super::endpoints::{Endpoints, words};
use super::growing::Growing;
use super::table::Table;
use super::{gone, key, present, take};

/// The maps that pods are judged by.
pub struct PolicyMaps {
    endpoints: Endpoints,
    identities: Growing,
    sets: Growing,
    rules: Growing,
    blocks: LpmTrie<MapData, [u8; size_of::<CidrKey>()], u32>,
    generation: Array<MapData, u32>,
    /// How often any of them was changed, for programs that keep verdicts.
    changes: Table,
    changed: u64,
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
            changes: words(ebpf, "CHANGES")?,
            changed: 0,
            room,
            host_judged: false,
        })
    }

    /// Counts a change that was made, be it in part: no verdict from before it holds.
    fn count(&mut self, outcome: Result<()>) -> Result<()> {
        self.changed += 1;
        let counted = self.changes.set_word(0, self.changed);
        outcome.and(counted.context("a change of the rules can't be told to the programs"))
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
        let set = self.endpoints.set(address, endpoint);
        self.count(set)
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
        let set = self.endpoints.set_host(chains);
        self.count(set)
    }

    fn remove_endpoint(&mut self, address: IpAddr) -> Result<()> {
        let removed = self.endpoints.remove(address);
        self.count(removed)
    }

    fn set_identity(&mut self, address: IpAddr, identity: u32) -> Result<()> {
        let address = Ip::from(address);
        let known = Known { address, identity };
        let set = self.identities.update(bytes_of(&address), bytes_of(&known));
        self.count(set.context("an address gets no identity"))
    }

    fn remove_identity(&mut self, address: IpAddr) -> Result<()> {
        let removed = self.identities.remove_all(&key(address));
        self.count(removed)
    }

    fn set_rules(&mut self, rules: &[(RuleKey, Decision)]) -> Result<()> {
        let (keys, values): (Vec<RuleKey>, Vec<Decision>) = rules.iter().copied().unzip();
        let (keys, values) = (must_cast_slice(&keys), must_cast_slice(&values));
        let set = self.rules.update(keys, values);
        self.count(set.context("rules are not in the kernel"))
    }

    fn remove_rules(&mut self, rules: &[RuleKey]) -> Result<()> {
        let removed = self.rules.remove_all(must_cast_slice(rules));
        self.count(removed.context("rules stay in the kernel"))
    }

    fn set_block(&mut self, set: u32, block: IpNet, class: u32) -> Result<()> {
        let set = self.blocks.insert(&block_key(set, block), class, 0);
        self.count(set.context("the map of address blocks is full"))
    }

    fn remove_block(&mut self, set: u32, block: IpNet) -> Result<()> {
        let removed = self.blocks.remove(&block_key(set, block));
        self.count(gone(removed, "an address block"))
    }

    fn set_set(&mut self, set: u32, value: Set) -> Result<()> {
        let set = self.sets.update(bytes_of(&set), bytes_of(&value));
        self.count(set.context("a set is not in the kernel"))
    }

    fn remove_set(&mut self, set: u32) -> Result<()> {
        let removed = self
            .endpoints
            .remove_set(set)
            .and_then(|()| self.sets.remove_all(bytes_of(&set)));
        self.count(removed.context("a set stays in the kernel"))
    }

    fn set_generation(&mut self, generation: u32) -> Result<()> {
        self.generation
            .set(0, generation, 0)
            .context("could not write the generation of the rules")
    }
}
