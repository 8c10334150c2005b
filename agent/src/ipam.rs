//! Addresses of this node's pods: handed out from its ranges, remembered on disk, so that a restart gives none twice.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use ipnet::IpNet;

/// Who has which addresses; the file is the truth.
pub struct Ipam {
    /// At most one of a family, the primary one first.
    pools: Vec<Pool>,
    path: PathBuf,
    taken: BTreeMap<IpAddr, String>,
}

/// A range, and where in it the search for a free address begins.
struct Pool {
    range: IpNet,
    last: u128,
}

impl Pool {
    fn new(range: IpNet) -> Self {
        Self {
            last: number(range.network()),
            range,
        }
    }

    /// The next free address; recently freed ones come last.
    fn free(&self, taken: &BTreeMap<IpAddr, String>) -> Option<IpAddr> {
        // The first address stands for the network (IPv4) or for any of its routers (IPv6); the last is
        // IPv4's broadcast.
        let v4 = self.range.addr().is_ipv4();
        let first = number(self.range.network()).checked_add(1)?;
        let last = number(self.range.broadcast()).checked_sub(u128::from(v4))?;
        let after = self.last.max(first - 1).saturating_add(1)..=last;
        let before = first..=self.last.min(last);
        after
            .chain(before)
            .map(|number| address(number, v4))
            .find(|address| !taken.contains_key(address))
    }
}

fn number(address: IpAddr) -> u128 {
    match address {
        IpAddr::V4(address) => u32::from(address).into(),
        IpAddr::V6(address) => address.into(),
    }
}

fn address(number: u128, v4: bool) -> IpAddr {
    if v4 {
        // Of an IPv4 range, so it fits.
        Ipv4Addr::from(number as u32).into()
    } else {
        Ipv6Addr::from(number).into()
    }
}

/// The ranges of a node must be at least one, and at most one of a family.
pub(crate) fn check_ranges(ranges: &[IpNet]) -> Result<()> {
    let of = |v4: bool| {
        ranges
            .iter()
            .filter(move |range| range.addr().is_ipv4() == v4)
    };
    if ranges.is_empty() {
        bail!("the node has no range of pod addresses");
    }
    if of(true).count() > 1 || of(false).count() > 1 {
        let all: Vec<String> = ranges.iter().map(IpNet::to_string).collect();
        bail!(
            "the pod ranges {} are several of one family; a node has at most one of IPv4 and one of IPv6",
            all.join(", ")
        );
    }
    Ok(())
}

impl Ipam {
    /// Reads the records in `dir`, or begins anew.
    pub fn open(dir: &Path, ranges: &[IpNet]) -> Result<Self> {
        std::fs::create_dir_all(dir)
            .with_context(|| format!("could not make {}", dir.display()))?;
        let path = dir.join("addresses.json");
        let taken = match std::fs::read(&path) {
            Ok(text) => serde_json::from_slice(&text)
                .with_context(|| format!("{} can't be read", path.display()))?,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => BTreeMap::new(),
            Err(error) => {
                return Err(error).with_context(|| format!("could not read {}", path.display()));
            }
        };
        Ok(Self {
            pools: ranges.iter().copied().map(Pool::new).collect(),
            path,
            taken,
        })
    }

    /// The owner's addresses, one of each range: those it has, or the next free ones; all of them or none.
    pub fn allocate(&mut self, owner: &str) -> Result<Vec<IpAddr>> {
        let mut addresses = Vec::with_capacity(self.pools.len());
        let mut news = Vec::new();
        for (index, pool) in self.pools.iter().enumerate() {
            let v4 = pool.range.addr().is_ipv4();
            let own = self
                .taken
                .iter()
                .find(|(address, other)| address.is_ipv4() == v4 && *other == owner);
            if let Some((address, _)) = own {
                addresses.push(*address);
                continue;
            }
            let Some(address) = pool.free(&self.taken) else {
                bail!("no free address is left in {}", pool.range);
            };
            news.push((index, address));
            addresses.push(address);
        }
        if news.is_empty() {
            return Ok(addresses);
        }
        for (index, address) in news {
            self.taken.insert(address, owner.to_owned());
            self.pools[index].last = number(address);
        }
        self.save()?;
        Ok(addresses)
    }

    /// Gives an owner's addresses back; one that has none is no error.
    pub fn release(&mut self, owner: &str) -> Result<()> {
        let before = self.taken.len();
        self.taken.retain(|_, other| other != owner);
        if self.taken.len() == before {
            Ok(())
        } else {
            self.save()
        }
    }

    /// Who has an address, each once for every one that it has.
    pub fn owners(&self) -> impl Iterator<Item = &str> {
        self.taken.values().map(String::as_str)
    }

    fn save(&self) -> Result<()> {
        let write = || -> std::io::Result<()> {
            let temporary = self.path.with_extension("tmp");
            std::fs::write(&temporary, serde_json::to_vec(&self.taken)?)?;
            std::fs::rename(&temporary, &self.path)
        };
        write().with_context(|| format!("could not write {}", self.path.display()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ranges(all: &[&str]) -> Vec<IpNet> {
        all.iter().map(|text| text.parse().unwrap()).collect()
    }

    fn ips(all: &[&str]) -> Vec<IpAddr> {
        all.iter().map(|text| text.parse().unwrap()).collect()
    }

    #[test]
    fn addresses_are_unique_kept_and_reused_last() {
        for (text, size) in [("10.1.2.0/29", 6), ("fd00:1::/125", 7)] {
            let dir = tempfile::tempdir().unwrap();
            let range = ranges(&[text]);
            let mut ipam = Ipam::open(dir.path(), &range).unwrap();
            let all: Vec<Vec<IpAddr>> = (0..size)
                .map(|n| ipam.allocate(&format!("c{n}")).unwrap())
                .collect();
            let hosts = range[0].hosts().filter(|one| *one != range[0].network());
            assert_eq!(all.concat(), hosts.collect::<Vec<_>>());
            assert!(
                ipam.allocate("one-too-many")
                    .unwrap_err()
                    .to_string()
                    .contains("no free address")
            );
            assert_eq!(
                ipam.allocate("c3").unwrap(),
                all[3],
                "asking again gives the same"
            );
            let mut ipam = Ipam::open(dir.path(), &range).unwrap();
            ipam.release("c0").unwrap();
            ipam.release("c4").unwrap();
            ipam.release("nobody").unwrap();
            assert_eq!(ipam.allocate("new").unwrap(), all[0]);
            assert_eq!(ipam.allocate("newer").unwrap(), all[4]);
        }
    }

    #[test]
    fn freed_addresses_come_last() {
        let dir = tempfile::tempdir().unwrap();
        let mut ipam = Ipam::open(dir.path(), &ranges(&["10.1.2.0/29"])).unwrap();
        let first = ipam.allocate("a").unwrap();
        ipam.release("a").unwrap();
        assert_ne!(ipam.allocate("b").unwrap(), first);
        for owner in ["c", "d", "e", "f"] {
            assert_ne!(ipam.allocate(owner).unwrap(), first);
        }
        assert_eq!(ipam.allocate("g").unwrap(), first);
    }

    #[test]
    fn one_address_of_each_family_or_none() {
        let dir = tempfile::tempdir().unwrap();
        let both = ranges(&["fd00:1::/64", "10.1.2.0/30"]);
        let mut ipam = Ipam::open(dir.path(), &both).unwrap();
        assert_eq!(ipam.allocate("a").unwrap(), ips(&["fd00:1::1", "10.1.2.1"]));
        assert_eq!(ipam.allocate("b").unwrap(), ips(&["fd00:1::2", "10.1.2.2"]));
        ipam.allocate("c").unwrap_err();
        assert!(!ipam.owners().any(|owner| owner == "c"));
        assert_eq!(ipam.owners().count(), 4);
        ipam.release("a").unwrap();
        assert_eq!(ipam.owners().collect::<Vec<_>>(), ["b", "b"]);
    }

    #[test]
    fn what_an_agent_with_one_range_wrote_is_read() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(
            dir.path().join("addresses.json"),
            r#"{"10.1.2.1":"a/eth0","10.1.2.2":"b/eth0"}"#,
        )
        .unwrap();
        let both = ranges(&["10.1.2.0/24", "fd00:1::/64"]);
        let mut ipam = Ipam::open(dir.path(), &both).unwrap();
        assert_eq!(
            ipam.allocate("a/eth0").unwrap(),
            ips(&["10.1.2.1", "fd00:1::1"])
        );
        assert_eq!(
            ipam.allocate("new").unwrap(),
            ips(&["10.1.2.3", "fd00:1::2"])
        );
    }

    #[test]
    fn a_range_of_each_family_at_most() {
        check_ranges(&ranges(&["fd00:1::/64"])).unwrap();
        check_ranges(&ranges(&["10.1.2.0/24", "fd00:1::/64"])).unwrap();
        check_ranges(&[]).unwrap_err();
        let two = check_ranges(&ranges(&["10.1.2.0/24", "10.1.3.0/24"]));
        assert!(two.unwrap_err().to_string().contains("one family"));
    }
}
