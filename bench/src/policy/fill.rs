//! The part that fills the maps of policy with rules of many pods, and says what they take of the kernel's memory.

use std::collections::BTreeMap;
use std::net::Ipv4Addr;
use std::path::PathBuf;

use anyhow::{Context, Result, ensure};
use serde::{Deserialize, Serialize};
use serde_json::json;

use super::node::Node;
use crate::services::part;

/// The maps that pods are judged by; those that grow have one of their name in another of their name.
const MAPS: [&str; 11] = [
    "ENDPOINTS",
    "STANDINGS",
    "CHAINS",
    "IDENTITIES",
    "SETS",
    "RULES",
    "CIDRS",
    "GENERATION",
    "HOST",
    "CHANGES",
    "VERDICTS",
];
/// Peers and ports of one policy.
const POLICY: (usize, u16) = (5, 10);

#[derive(clap::Args)]
pub struct Args {
    /// Where a BPF filesystem is mounted
    #[arg(long)]
    dir: PathBuf,
    /// Groups of pods that have the same policies
    #[arg(long)]
    groups: usize,
    /// Pods in each
    #[arg(long)]
    pods: usize,
    /// Rules of each: peers times ports
    #[arg(long)]
    rules: usize,
}

/// Bytes by map.
pub type Taken = BTreeMap<String, u64>;

/// What is there.
#[derive(Serialize, Deserialize)]
pub struct Filled {
    /// Without pods.
    pub before: Taken,
    /// With all of them.
    pub after: Taken,
    /// Peers of other nodes.
    pub peers: usize,
}

/// Fills, and says what it takes.
pub fn run(args: &Args) -> Result<()> {
    part::say(&match fill(args) {
        Ok(filled) => json!(filled),
        Err(error) => json!({"error": format!("{error:#}")}),
    })
}

fn fill(args: &Args) -> Result<Filled> {
    let mut node = Node::new(&args.dir, xebec_agent::loader::FLOWS)?;
    node.settle()?;
    let before = taken()?;
    let policies = args.rules / (POLICY.0 * usize::from(POLICY.1));
    let peers = policies * POLICY.0;
    for peer in 0..peers {
        let address = Ipv4Addr::from_bits(0x0a80_0001 + peer as u32);
        node.add_pod(
            &format!("r{peer}"),
            ("peer", &peer.to_string()),
            address.into(),
            false,
        )?;
    }
    for group in 0..args.groups {
        for policy in 0..policies {
            node.add_policy(&format!("g{group}-{policy}"), &spec(group, policy));
        }
    }
    for pod in 0..args.groups * args.pods {
        let address = Ipv4Addr::from_bits(0x0af4_0002 + pod as u32);
        let group = (pod % args.groups).to_string();
        node.add_pod(&format!("l{pod}"), ("group", &group), address.into(), true)?;
    }
    node.settle()?;
    Ok(Filled {
        before,
        after: taken()?,
        peers,
    })
}

/// What policy number `policy` of a group lets through: no other group has the same ports.
fn spec(group: usize, policy: usize) -> serde_json::Value {
    let peers = policy * POLICY.0..(policy + 1) * POLICY.0;
    let from: Vec<_> = peers
        .map(|peer| json!({"podSelector": {"matchLabels": {"peer": peer.to_string()}}}))
        .collect();
    let first = 1_000 + group as u16 * POLICY.1;
    let ports: Vec<_> = (first..first + POLICY.1)
        .map(|port| json!({"protocol": "TCP", "port": port}))
        .collect();
    json!({
        "podSelector": {"matchLabels": {"group": group.to_string()}},
        "policyTypes": ["Ingress"],
        "ingress": [{"from": from, "ports": ports}],
    })
}

/// The kernel's memory for each of the maps, as it tells of those that this process has open.
fn taken() -> Result<Taken> {
    let mut taken: Taken = MAPS.map(|name| (name.to_owned(), 0)).into();
    for row in xebec_agent::bpf_maps::rows()? {
        if let Some(sum) = row["map"].as_str().and_then(|name| taken.get_mut(name)) {
            *sum += row["memory_bytes"]
                .as_u64()
                .context("the kernel does not tell what a map takes")?;
        }
    }
    if let Some((name, _)) = taken.iter().find(|(_, bytes)| **bytes == 0) {
        ensure!(*name == "CIDRS", "the kernel tells of no map {name}");
    }
    Ok(taken)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn groups_have_rules_of_their_own() {
        let ports = |group| spec(group, 0)["ingress"][0]["ports"].to_string();
        let all: BTreeSet<String> = (0..50).map(ports).collect();
        assert_eq!(all.len(), 50);
        let peers = |policy| spec(0, policy)["ingress"][0]["from"].to_string();
        assert_ne!(peers(0), peers(9));
    }
}
