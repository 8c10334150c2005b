//! Ranges of pod addresses: each node gets one of each family, unless it brings its own.

use std::collections::{BTreeMap, HashMap};
use std::net::IpAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use anyhow::Context;
use ipnet::IpNet;
use k8s_openapi::api::core::v1::Node;
use kube::api::{Api, Patch, PatchParams};
use kube::runtime::events::EventType;
use serde_json::json;
use tokio_util::sync::CancellationToken;

use crate::Config;
use crate::cluster::{Cluster, Teller, is_code};
use crate::informer::Key;
use crate::queue::{Again, Queue};

/// Registers with the watches and gives the loop.
pub(crate) fn start(
    cluster: &Arc<Cluster>,
    config: &Config,
    shutdown: CancellationToken,
) -> impl Future<Output = anyhow::Result<()>> + Send + 'static {
    let queue = Queue::new();
    let blocks: Result<Vec<Blocks>, String> = config
        .cluster_cidrs
        .iter()
        .map(|range| {
            let length = match range {
                IpNet::V4(_) => config.node_cidr_mask_size_ipv4,
                IpNet::V6(_) => config.node_cidr_mask_size_ipv6,
            };
            Blocks::new(range.trunc(), length)
        })
        .collect();
    if !config.cluster_cidrs.is_empty() {
        let wake = queue.clone();
        cluster.nodes.on_change(move |old, new| {
            if old.map(|node| ranges(node)) != new.map(|node| ranges(node))
                && let Some(node) = new.or(old)
            {
                wake.add(Key::of(node.as_ref()));
            }
        });
    }
    let (cluster, wake) = (cluster.clone(), queue.clone());
    async move {
        let blocks = blocks.map_err(anyhow::Error::msg)?;
        if blocks.is_empty() {
            shutdown.cancelled().await;
            return Ok(());
        }
        let controller = Arc::new(Controller {
            teller: Teller::new(cluster.client.clone(), "node-ipam-controller"),
            cluster,
            queue: wake,
            state: Mutex::new(State {
                blocks,
                held: HashMap::new(),
                waiting: HashMap::new(),
            }),
        });
        controller.cluster.nodes.synced().await;
        // What nodes have already is nobody else's.
        for node in controller.cluster.nodes.all() {
            controller
                .lock()
                .hold(&Key::of(node.as_ref()), ranges(&node));
        }
        queue
            .run("node ipam", 1, shutdown, |key| {
                let controller = controller.clone();
                async move { controller.reconcile(&key).await }
            })
            .await;
        Ok(())
    }
}

/// The node's ranges.
fn ranges(node: &Node) -> Vec<IpNet> {
    let Some(spec) = &node.spec else {
        return Vec::new();
    };
    let all = spec.pod_cidrs.iter().flatten();
    let first = spec.pod_cidr.iter().filter(|_| spec.pod_cidrs.is_none());
    let parsed = all.chain(first).filter_map(|range| range.parse().ok());
    parsed.collect()
}

/// The equal parts of one range, by number.
struct Blocks {
    range: IpNet,
    length: u8,
    /// Who has which; a node may bring a range that is of another size than ours.
    used: BTreeMap<u128, Key>,
    next: u128,
}

fn number(ip: IpAddr) -> u128 {
    match ip {
        IpAddr::V4(v4) => u32::from(v4).into(),
        IpAddr::V6(v6) => v6.into(),
    }
}

impl Blocks {
    fn new(range: IpNet, length: u8) -> Result<Self, String> {
        if !(range.prefix_len()..=range.max_prefix_len()).contains(&length) {
            return Err(format!(
                "the range of pods {range} has no part with a prefix of {length}: make the range larger, or the nodes' parts smaller"
            ));
        }
        // Numbers of parts fit well, and nobody has that many nodes.
        if length - range.prefix_len() > 64 {
            return Err(format!(
                "the range of pods {range} has too many parts with a prefix of {length}"
            ));
        }
        Ok(Self {
            range,
            length,
            used: BTreeMap::new(),
            next: 0,
        })
    }

    fn count(&self) -> u128 {
        1 << (self.length - self.range.prefix_len())
    }

    /// The bits of an address that lie within one part.
    fn shift(&self) -> u32 {
        u32::from(self.range.max_prefix_len() - self.length)
    }

    /// The numbers of the parts that this range touches.
    fn touched(&self, range: &IpNet) -> Option<std::ops::RangeInclusive<u128>> {
        let inside = self.range.contains(range) || range.contains(&self.range);
        let base = number(self.range.network());
        // A whole range is shifted out where one part is all there is of 128 bits.
        let part = |ip: IpAddr| number(ip).saturating_sub(base).checked_shr(self.shift());
        let first = part(range.network()).unwrap_or(0);
        let last = part(range.broadcast()).unwrap_or(0).min(self.count() - 1);
        inside.then_some(first..=last)
    }

    fn part(&self, part: u128) -> Option<IpNet> {
        let offset = part.checked_shl(self.shift()).unwrap_or(0);
        let number = number(self.range.network()) + offset;
        let address = match self.range {
            IpNet::V4(_) => IpAddr::V4(u32::try_from(number).ok()?.into()),
            IpNet::V6(_) => IpAddr::V6(number.into()),
        };
        IpNet::new(address, self.length).ok()
    }

    /// The node has this range: what of ours lies in it is its own, as far as nobody has it.
    fn hold(&mut self, key: &Key, range: &IpNet) {
        // A node with far more than one of our parts has the first ones in the books; it is a mistake anyway.
        for part in self.touched(range).into_iter().flatten().take(1 << 16) {
            self.used.entry(part).or_insert_with(|| key.clone());
        }
    }

    fn take(&mut self, key: &Key) -> Option<IpNet> {
        let count = self.count();
        if self.used.len() as u128 >= count {
            return None;
        }
        while self.used.contains_key(&self.next) {
            self.next = (self.next + 1) % count;
        }
        let part = self.next;
        self.next = (part + 1) % count;
        self.used.insert(part, key.clone());
        self.part(part)
    }
}

struct State {
    blocks: Vec<Blocks>,
    held: HashMap<Key, Vec<IpNet>>,
    /// Nodes that found no range, and what was told about it.
    waiting: HashMap<Key, String>,
}

impl State {
    fn hold(&mut self, key: &Key, ranges: Vec<IpNet>) {
        for range in &ranges {
            let blocks = self.blocks.iter_mut();
            blocks.for_each(|blocks| blocks.hold(key, range));
        }
        if !ranges.is_empty() {
            self.held.insert(key.clone(), ranges);
        }
    }

    /// One of each range, or what is missing.
    fn take(&mut self, key: &Key) -> Result<Vec<IpNet>, String> {
        let mut taken = Vec::new();
        for blocks in &mut self.blocks {
            match blocks.take(key) {
                Some(range) => taken.push(range),
                None => {
                    let range = blocks.range;
                    self.give_back(key);
                    return Err(format!("no part of the range of pods {range} is free"));
                }
            }
        }
        self.held.insert(key.clone(), taken.clone());
        Ok(taken)
    }

    fn give_back(&mut self, key: &Key) -> bool {
        let mut any = false;
        for blocks in &mut self.blocks {
            let before = blocks.used.len();
            blocks.used.retain(|_, owner| owner != key);
            any |= blocks.used.len() < before;
        }
        self.held.remove(key);
        any
    }
}

struct Controller {
    cluster: Arc<Cluster>,
    teller: Teller,
    queue: Arc<Queue<Key>>,
    state: Mutex<State>,
}

impl Controller {
    async fn reconcile(&self, key: &Key) -> anyhow::Result<Again> {
        let Some(node) = self.cluster.nodes.get(key) else {
            let mut state = self.lock();
            state.waiting.remove(key);
            if state.give_back(key) {
                state
                    .waiting
                    .keys()
                    .for_each(|key| self.queue.add(key.clone()));
            }
            return Ok(None);
        };
        let has = ranges(&node);
        if !has.is_empty() {
            let mut state = self.lock();
            state.waiting.remove(key);
            if state.held.get(key) != Some(&has) {
                state.give_back(key);
                state.hold(key, has);
            }
            return Ok(None);
        }
        let taken = {
            let mut state = self.lock();
            let held = state.held.get(key).cloned();
            held.map_or_else(|| state.take(key), Ok)
        };
        let taken = match taken {
            Ok(taken) => taken,
            Err(why) => {
                let before = self.lock().waiting.insert(key.clone(), why.clone());
                if before.as_ref() != Some(&why) {
                    let note = format!("Node {key} status is now: CIDRNotAvailable: {why}");
                    let kind = EventType::Warning;
                    self.teller
                        .tell(node.as_ref(), kind, "CIDRNotAvailable", note);
                }
                return Ok(None);
            }
        };
        let all: Vec<String> = taken.iter().map(ToString::to_string).collect();
        // Made from this node: one that brings its own meanwhile is not overruled.
        let patch = json!({"metadata": {"resourceVersion": node.metadata.resource_version},
            "spec": {"podCIDR": all[0], "podCIDRs": all}});
        let api = Api::<Node>::all(self.cluster.client.clone());
        let params = PatchParams::default();
        match api.patch(&key.name, &params, &Patch::Merge(patch)).await {
            Ok(written) => self.cluster.nodes.note(written),
            Err(error) if is_code(&error, 404) => {}
            Err(error) => return Err(error).context("could not give a node its range of pods"),
        }
        self.lock().waiting.remove(key);
        Ok(None)
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn state(ranges: &[(&str, u8)]) -> State {
        let blocks =
            |(range, length): &(&str, u8)| Blocks::new(range.parse().unwrap(), *length).unwrap();
        State {
            blocks: ranges.iter().map(blocks).collect(),
            held: HashMap::new(),
            waiting: HashMap::new(),
        }
    }

    fn take(state: &mut State, node: &str) -> Vec<String> {
        let taken = state.take(&Key::new("", node)).unwrap_or_default();
        taken.iter().map(ToString::to_string).collect()
    }

    #[test]
    fn each_node_has_a_part_of_each_range() {
        let mut state = state(&[("10.244.0.0/22", 24), ("fd00:10::/56", 64)]);
        assert_eq!(take(&mut state, "a"), ["10.244.0.0/24", "fd00:10::/64"]);
        assert_eq!(take(&mut state, "b"), ["10.244.1.0/24", "fd00:10:0:1::/64"]);
        // One that brings twice as much, and one that brings something else.
        state.hold(&Key::new("", "c"), vec!["10.244.2.0/23".parse().unwrap()]);
        state.hold(&Key::new("", "d"), vec!["192.168.0.0/24".parse().unwrap()]);
        assert!(take(&mut state, "e").is_empty());
        assert!(
            !state.blocks[1].used.values().any(|key| key.name == "e"),
            "all or nothing"
        );
        state.give_back(&Key::new("", "a"));
        assert_eq!(take(&mut state, "e"), ["10.244.0.0/24", "fd00:10:0:2::/64"]);
    }

    #[test]
    fn whole_ranges_and_single_addresses() {
        let mut one = state(&[("::/0", 64), ("10.0.0.0/8", 8)]);
        assert_eq!(take(&mut one, "a"), ["::/64", "10.0.0.0/8"]);
        assert!(take(&mut one, "b").is_empty());
        let mut tiny = state(&[("10.0.0.0/31", 32)]);
        assert_eq!(take(&mut tiny, "a"), ["10.0.0.0/32"]);
        assert_eq!(take(&mut tiny, "b"), ["10.0.0.1/32"]);
        assert!(Blocks::new("10.0.0.0/24".parse().unwrap(), 16).is_err());
        assert!(Blocks::new("fd00::/16".parse().unwrap(), 120).is_err());
    }
}
