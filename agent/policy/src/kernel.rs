//! What policy needs of the kernel.

use std::net::IpAddr;

use anyhow::Result;
use ipnet::IpNet;
use xebec_dataplane_common::policy::{Decision, Endpoint, RuleKey, Set};

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

/// The kernel's side of policy; tests put a plain model in its place.
pub trait PolicyKernel: Send + 'static {
    /// How much there is room for.
    fn room(&self) -> Room;
    /// Tells what a pod of this node is.
    fn set_endpoint(&mut self, address: IpAddr, endpoint: Endpoint) -> Result<()>;
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
    /// Takes a set out of force.
    fn remove_set(&mut self, set: u32) -> Result<()>;
    /// From here on flows of another generation are judged anew.
    fn set_generation(&mut self, generation: u32) -> Result<()>;
}
