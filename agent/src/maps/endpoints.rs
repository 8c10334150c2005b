//! The pods of this node: where they are, what they are, and which sets judge them.
//!
//! What may change for a pod that talks stands in one word of an array (`STANDINGS`), since an entry of a hash map that
//! changes is for a moment not there. The word names chains of sets, which never change.

use std::collections::{HashMap, VecDeque};
use std::net::IpAddr;

use anyhow::{Context, Result, bail, ensure};
use aya::maps::{self, Map, MapData, MapError};
use bytemuck::{bytes_of, must_cast};
use xebec_dataplane_common::policy::{
    self, CHAINS_NUMBER, Chains, IDENTITY_HOST, LEARNS, READS_HTTP, Standing,
};
use xebec_policy::kernel::Endpoint;

use super::growing::Growing;
use super::table::Table;
use super::{gone, key, take};

/// Different chains at most: 8 MB of the kernel's memory.
const CHAINS: u32 = 1 << 16;

const ENTRY: usize = size_of::<policy::Endpoint>();

/// The maps.
pub(super) struct Endpoints {
    map: maps::HashMap<MapData, [u8; 16], [u8; ENTRY]>,
    standings: Table,
    host: Table,
    chains: Growing,
    numbers: Numbers,
    known: HashMap<IpAddr, (u32, Endpoint)>,
    /// Slots that no pod has, those that were free longest first: a packet may still look at what stood in the last ones.
    free: VecDeque<u32>,
}

/// Which chains have which numbers. They stay until one of their sets goes, which is when no pod has been under it for
/// a while.
#[derive(Default)]
struct Numbers {
    of: HashMap<Chains, u32>,
    by_set: HashMap<u32, Vec<Chains>>,
    last: u32,
}

/// The sets of chains, each once.
fn sets(chains: &Chains) -> impl Iterator<Item = u32> + use<> {
    let all = [
        chains.ingress,
        chains.egress,
        chains.ingress_audit,
        chains.egress_audit,
    ];
    let mut all: Vec<u32> = all.as_flattened().to_vec();
    all.sort_unstable();
    all.dedup();
    all.into_iter().filter(|set| *set != 0)
}

impl Numbers {
    /// A number that no chains have.
    fn next(&mut self) -> u32 {
        // Nobody has so many that all are taken.
        loop {
            self.last = self.last % (CHAINS_NUMBER - 1) + 1;
            if !self.of.values().any(|number| *number == self.last) {
                return self.last;
            }
        }
    }

    fn add(&mut self, chains: Chains, number: u32) {
        self.of.insert(chains, number);
        for set in sets(&chains) {
            self.by_set.entry(set).or_default().push(chains);
        }
    }

    /// The numbers of all chains with this set, which have none from here on.
    fn without(&mut self, set: u32) -> Vec<u32> {
        let mut numbers = Vec::new();
        for chains in self.by_set.remove(&set).unwrap_or_default() {
            numbers.extend(self.of.remove(&chains));
            for other in sets(&chains) {
                if let Some(with) = self.by_set.get_mut(&other) {
                    with.retain(|one| *one != chains);
                }
            }
        }
        numbers
    }
}

/// An array of words.
pub(super) fn words(ebpf: &aya::Ebpf, name: &str) -> Result<Table> {
    match ebpf.map(name) {
        Some(Map::Array(data)) => {
            Table::of(data).with_context(|| format!("could not look at the eBPF map {name}"))
        }
        _ => bail!("the eBPF object has no array {name}"),
    }
}

impl Endpoints {
    pub fn new(ebpf: &mut aya::Ebpf) -> Result<Self> {
        let (standings, host) = (words(ebpf, "STANDINGS")?, words(ebpf, "HOST")?);
        let sizes = (size_of::<u32>(), size_of::<Chains>());
        Ok(Self {
            map: take(ebpf, "ENDPOINTS")?,
            free: (0..standings.capacity()).collect(),
            standings,
            host,
            chains: Growing::new(ebpf, "CHAINS", sizes, CHAINS)?,
            numbers: Numbers::default(),
            known: HashMap::new(),
        })
    }

    /// What an endpoint is to the programs.
    pub fn get(&self, address: IpAddr) -> Result<Option<Endpoint>> {
        match self.map.get(&key(address), 0) {
            Ok(_) => Ok(self.known.get(&address).map(|(_, endpoint)| *endpoint)),
            Err(MapError::KeyNotFound) => Ok(None),
            Err(error) => Err(error).context("could not read the map of endpoints"),
        }
    }

    pub fn set(&mut self, address: IpAddr, endpoint: Endpoint) -> Result<()> {
        let rules = self.rules(endpoint.chains)?;
        let before = self.known.get(&address).copied();
        let slot = before
            .map(|(slot, _)| slot)
            .or_else(|| self.free.pop_front());
        let slot = slot.context("the map of endpoints is full")?;
        let flag = |flag: u32, is_set: bool| if is_set { flag } else { 0 };
        let standing = Standing {
            identity: endpoint.identity,
            rules: rules | flag(LEARNS, endpoint.learns) | flag(READS_HTTP, endpoint.reads_http),
        };
        let written = stand(&mut self.standings, slot, standing).and_then(|()| match before {
            Some((_, old)) if (old.ifindex, old.mac) == (endpoint.ifindex, endpoint.mac) => Ok(()),
            _ => self.place(address, slot, &endpoint),
        });
        match (written, before) {
            (Ok(()), _) => {
                self.known.insert(address, (slot, endpoint));
                Ok(())
            }
            (Err(error), before) => {
                if before.is_none() {
                    self.free.push_front(slot);
                }
                Err(error)
            }
        }
    }

    /// Puts the node itself under these sets.
    pub fn set_host(&mut self, chains: Chains) -> Result<()> {
        let rules = self.rules(chains)?;
        let standing = Standing {
            identity: IDENTITY_HOST,
            rules,
        };
        stand(&mut self.host, 0, standing)
    }

    pub fn remove(&mut self, address: IpAddr) -> Result<()> {
        gone(self.map.remove(&key(address)), "an endpoint")?;
        if let Some((slot, _)) = self.known.remove(&address) {
            self.free.push_back(slot);
        }
        Ok(())
    }

    /// Forgets chains with a set that no packet is judged by any more.
    pub fn remove_set(&mut self, set: u32) -> Result<()> {
        let numbers = self.numbers.without(set);
        let keys: Vec<u8> = numbers
            .iter()
            .flat_map(|number| number.to_ne_bytes())
            .collect();
        if keys.is_empty() {
            return Ok(());
        }
        self.chains.remove_all(&keys)
    }

    /// What a standing says of these chains, which are written if they are new.
    fn rules(&mut self, chains: Chains) -> Result<u32> {
        if chains == Chains::default() {
            return Ok(0);
        }
        if let Some(number) = self.numbers.of.get(&chains) {
            return Ok(chains.standing(*number));
        }
        ensure!(
            self.numbers.of.len() < self.chains.most(),
            "the map of chains is full"
        );
        let number = self.numbers.next();
        self.chains
            .update(bytes_of(&number), bytes_of(&chains))
            .context("a pod's sets are not in the kernel")?;
        self.numbers.add(chains, number);
        Ok(chains.standing(number))
    }

    fn place(&mut self, address: IpAddr, slot: u32, endpoint: &Endpoint) -> Result<()> {
        let entry = policy::Endpoint {
            ifindex: endpoint.ifindex,
            slot,
            mac: endpoint.mac,
            pad: 0,
        };
        let entry: [u8; ENTRY] = must_cast(entry);
        self.map
            .insert(key(address), entry, 0)
            .context("the map of endpoints is full")
    }
}

/// Writes what somebody is, and under which rules.
fn stand(standings: &mut Table, slot: u32, standing: Standing) -> Result<()> {
    standings
        .set_word(slot, must_cast(standing))
        .context("what a pod or the node is can't be written")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn chains(ingress: u32, egress: u32) -> Chains {
        Chains {
            ingress: [0, 0, ingress, 0],
            egress: [0, 0, egress, 0],
            ..Chains::default()
        }
    }

    #[test]
    fn chains_go_with_the_first_of_their_sets() {
        let mut numbers = Numbers::default();
        for (number, (ingress, egress)) in (1..).zip([(5, 6), (5, 5), (7, 6)]) {
            assert_eq!(numbers.next(), number);
            numbers.add(chains(ingress, egress), number);
        }
        assert_eq!(numbers.without(5), [1, 2]);
        assert!(numbers.without(5).is_empty());
        assert_eq!(numbers.of, HashMap::from([(chains(7, 6), 3)]));
        // A number is given out late again, and to one.
        numbers.last = CHAINS_NUMBER - 1;
        assert_eq!([numbers.next(), numbers.next(), numbers.next()], [1, 2, 4]);
        assert_eq!(numbers.without(6), [3]);
        assert!(numbers.by_set.values().all(Vec::is_empty));
    }
}
