//! Address blocks of a set: which of its rules mean an address.

use std::collections::{BTreeMap, BTreeSet};

use ipnet::{IpNet, Ipv4Net};

use crate::rule::Block;

/// Prefixes with their classes, and what the classes are.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Classes {
    /// The longest of these that holds an address tells its class; 0 is no class.
    pub prefixes: BTreeMap<IpNet, u32>,
    /// Whose blocks hold the addresses of a class, from that of class 1 on.
    pub members: Vec<Vec<usize>>,
}

/// Gives each prefix that a block or an exception names the class of the owners whose blocks hold it, so that the
/// longest prefix of an address tells all of them at once. Each block comes with its owner.
pub fn classes<'a>(blocks: impl IntoIterator<Item = (usize, &'a Block)>) -> Classes {
    let blocks: Vec<(usize, &Block)> = blocks.into_iter().collect();
    // What begins at a prefix, and what ends.
    let mut edges = BTreeMap::<IpNet, (Vec<usize>, BTreeSet<usize>)>::new();
    for (at, (_, block)) in blocks.iter().enumerate() {
        edges.entry(block.cidr).or_default().0.push(at);
        for hole in &block.except {
            edges.entry(*hole).or_default().1.insert(at);
        }
    }
    // In the kernel's table IPv4 is a part of IPv6: a wide block of IPv6 must not hold it.
    if edges.keys().any(|prefix| matches!(prefix, IpNet::V6(_))) {
        edges.entry(IpNet::V4(Ipv4Net::default())).or_default();
    }
    let mut classes = Classes::default();
    let mut numbers = BTreeMap::<Vec<usize>, u32>::new();
    // The prefixes around the one that is looked at, each with the blocks that hold it: in order, an outer one comes
    // before those within.
    let mut around: Vec<(IpNet, Vec<usize>)> = Vec::new();
    for (prefix, (begins, ends)) in edges {
        while around
            .last()
            .is_some_and(|(outer, _)| !outer.contains(&prefix))
        {
            around.pop();
        }
        let outer = around.last().map_or(&[][..], |(_, holding)| holding);
        let holding: Vec<usize> = outer
            .iter()
            .chain(&begins)
            .filter(|at| !ends.contains(at))
            .copied()
            .collect();
        let owners: BTreeSet<usize> = holding
            .iter()
            .filter_map(|at| blocks.get(*at))
            .map(|(owner, _)| *owner)
            .collect();
        let owners: Vec<usize> = owners.into_iter().collect();
        let class = match numbers.get(&owners) {
            _ if owners.is_empty() => 0,
            Some(class) => *class,
            None => {
                classes.members.push(owners.clone());
                let class = classes.members.len() as u32;
                numbers.insert(owners, class);
                class
            }
        };
        classes.prefixes.insert(prefix, class);
        around.push((prefix, holding));
    }
    classes
}

#[cfg(test)]
mod tests {
    use super::*;

    fn block(cidr: &str, except: &[&str]) -> Block {
        Block {
            cidr: cidr.parse().unwrap(),
            except: except.iter().map(|one| one.parse().unwrap()).collect(),
            outside: false,
        }
    }

    fn owners(classes: &Classes, address: &str) -> Vec<usize> {
        let address: std::net::IpAddr = address.parse().unwrap();
        let longest = classes
            .prefixes
            .iter()
            .filter(|(prefix, _)| prefix.contains(&address))
            .max_by_key(|(prefix, _)| prefix.prefix_len());
        match longest {
            Some((_, class)) if *class > 0 => classes.members[*class as usize - 1].clone(),
            _ => Vec::new(),
        }
    }

    #[test]
    fn the_longest_prefix_tells_all_owners() {
        let all = [
            (7, block("10.0.0.0/8", &["10.1.0.0/16"])),
            (8, block("10.1.2.0/24", &[])),
            (7, block("10.1.2.128/25", &[])),
            (9, block("0.0.0.0/0", &["10.1.2.3/32"])),
        ];
        let classes = classes(all.iter().map(|(owner, block)| (*owner, block)));
        assert_eq!(owners(&classes, "10.2.0.1"), [7, 9]);
        assert_eq!(owners(&classes, "10.1.0.1"), [9]);
        assert_eq!(owners(&classes, "10.1.2.4"), [8, 9]);
        assert_eq!(owners(&classes, "10.1.2.3"), [8]);
        assert_eq!(owners(&classes, "10.1.2.200"), [7, 8, 9]);
        assert_eq!(owners(&classes, "192.0.2.1"), [9]);
    }

    #[test]
    fn many_blocks_of_one_rule_are_one_class() {
        let all: Vec<Block> = (0..10_000u32)
            .map(|at| {
                let address = std::net::Ipv4Addr::from(0x0a00_0000 + at * 512);
                block(&format!("{address}/24"), &[])
            })
            .collect();
        let classes = classes(all.iter().map(|block| (3, block)));
        assert_eq!((classes.prefixes.len(), classes.members.len()), (10_000, 1));
    }

    #[test]
    fn all_of_ipv6_is_not_ipv4() {
        let all = block("::/0", &[]);
        let classes = classes([(1, &all)]);
        assert_eq!(classes.prefixes[&"0.0.0.0/0".parse::<IpNet>().unwrap()], 0);
        assert_eq!(owners(&classes, "2001:db8::1"), [1]);
    }
}
