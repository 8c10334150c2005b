//! What policy needs of the kernel.

use std::net::IpAddr;

use anyhow::Result;
use ipnet::IpNet;
use xebec_dataplane_common::policy::{Chains, Decision, RuleKey, Set};

/// How much the kernel's maps hold.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Room {
    /// Entries of all sets.
    pub rules: usize,
    /// Address blocks of all sets.
    pub blocks: usize,
    /// Sets.
    pub sets: usize,
}

/// A pod of this node.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Endpoint {
    /// Index of the host's end of its veth pair.
    pub ifindex: u32,
    /// What its labels make it.
    pub identity: u32,
    /// Hardware address of the pod's end.
    pub mac: [u8; 6],
    /// Whether its rules name domains, so that it gets resolvers' answers after the engine.
    pub learns: bool,
    /// Whether the HTTP that it speaks is told of.
    pub reads_http: bool,
    /// The sets that judge it.
    pub chains: Chains,
}

/// The kernel's side of policy; tests put a plain model in its place.
pub trait PolicyKernel: Send + 'static {
    /// How much there is room for.
    fn room(&self) -> Room;
    /// Tells what a pod of this node is; packets see all of it or what it was before.
    fn set_endpoint(&mut self, address: IpAddr, endpoint: Endpoint) -> Result<()>;
    /// Puts the node itself under sets; packets see all of them or those of before.
    fn set_host(&mut self, chains: Chains) -> Result<()>;
    /// Forgets a pod of this node.
    fn remove_endpoint(&mut self, address: IpAddr) -> Result<()>;
    /// Gives an address its identity.
    fn set_identity(&mut self, address: IpAddr, identity: u32) -> Result<()>;
    /// Makes an address part of the world again.
    fn remove_identity(&mut self, address: IpAddr) -> Result<()>;
    /// Writes entries of sets.
    fn set_rules(&mut self, rules: &[(RuleKey, Decision)]) -> Result<()>;
    /// Removes entries of sets, as far as they are there.
    fn remove_rules(&mut self, rules: &[RuleKey]) -> Result<()>;
    /// Gives an address block of a set its class.
    fn set_block(&mut self, set: u32, block: IpNet, class: u32) -> Result<()>;
    /// Removes an address block of a set.
    fn remove_block(&mut self, set: u32, block: IpNet) -> Result<()>;
    /// Puts a set into force, whose entries are all written.
    fn set_set(&mut self, set: u32, value: Set) -> Result<()>;
    /// Takes a set out of force. No pod has been under it for so long that no packet is judged by it any more.
    fn remove_set(&mut self, set: u32) -> Result<()>;
    /// From here on flows of another generation are judged anew.
    fn set_generation(&mut self, generation: u32) -> Result<()>;
}
