//! Addresses of this node's pods: handed out from its range, remembered on disk, so that a restart gives none twice.

use std::collections::BTreeMap;
use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use ipnet::Ipv4Net;

/// Who has which address; the file is the truth.
pub struct Ipam {
    range: Ipv4Net,
    path: PathBuf,
    taken: BTreeMap<Ipv4Addr, String>,
    last: Ipv4Addr,
}

impl Ipam {
    /// Reads the records in `dir`, or begins anew.
    pub fn open(dir: &Path, range: Ipv4Net) -> Result<Self> {
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
            range,
            path,
            last: range.network(),
            taken,
        })
    }

    /// The owner's address: the one it has, or the next free one. Recently freed addresses come last.
    pub fn allocate(&mut self, owner: &str) -> Result<Ipv4Addr> {
        if let Some((address, _)) = self.taken.iter().find(|(_, other)| *other == owner) {
            return Ok(*address);
        }
        let usable = |address: &Ipv4Addr| {
            *address != self.range.network()
                && *address != self.range.broadcast()
                && !self.taken.contains_key(address)
        };
        let after = self
            .range
            .hosts()
            .filter(|address| *address > self.last)
            .find(usable);
        let Some(address) = after.or_else(|| self.range.hosts().find(usable)) else {
            bail!("no free address is left in {}", self.range);
        };
        self.taken.insert(address, owner.to_owned());
        self.last = address;
        self.save()?;
        Ok(address)
    }

    /// Gives an owner's address back; one that has none is no error.
    pub fn release(&mut self, owner: &str) -> Result<()> {
        let before = self.taken.len();
        self.taken.retain(|_, other| other != owner);
        if self.taken.len() == before {
            Ok(())
        } else {
            self.save()
        }
    }

    /// Who has an address.
    pub fn owners(&self) -> impl Iterator<Item = (&str, Ipv4Addr)> {
        self.taken
            .iter()
            .map(|(address, owner)| (owner.as_str(), *address))
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

    #[test]
    fn addresses_are_unique_kept_and_reused_last() {
        let dir = tempfile::tempdir().unwrap();
        let range = "10.1.2.0/29".parse().unwrap();
        let mut ipam = Ipam::open(dir.path(), range).unwrap();
        let all: Vec<Ipv4Addr> = (0..6)
            .map(|n| ipam.allocate(&format!("c{n}")).unwrap())
            .collect();
        assert_eq!(all, range.hosts().collect::<Vec<_>>());
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
        let mut ipam = Ipam::open(dir.path(), range).unwrap();
        ipam.release("c0").unwrap();
        ipam.release("c4").unwrap();
        ipam.release("nobody").unwrap();
        assert_eq!(ipam.allocate("new").unwrap(), all[0]);
        assert_eq!(ipam.allocate("newer").unwrap(), all[4]);
    }
}
