//! The eBPF maps that this process holds: for the command line, the metrics, and whoever reads one by its name.

use std::collections::BTreeMap;

use anyhow::{Context, Result};
use aya::maps::MapData;
use serde_json::{Value, json};
use xebec_dataplane_common::table::WAYS;

use crate::maps::flow_table::FLOWS;

/// A map, as the kernel describes it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Held {
    /// The kernel's number of it.
    pub id: u32,
    /// Its name, of which the kernel keeps 15 characters.
    pub name: String,
    /// `Hash`, `LruHash` and so on.
    pub kind: String,
    /// Bytes of a key.
    pub key_size: u64,
    /// Bytes of a value.
    pub value_size: u64,
    /// How many entries there is room for; in the table of flows, a set of the kernel's holds several.
    pub capacity: u64,
    /// Memory that it takes now.
    pub bytes: u64,
}

impl Held {
    /// Opens it.
    pub fn open(&self) -> Result<MapData> {
        MapData::from_id(self.id).with_context(|| format!("could not open the map {}", self.name))
    }
}

/// All of them, by name; where one replaces another of its name, the newer one comes last.
pub(crate) fn held() -> Result<Vec<Held>> {
    let mut maps = BTreeMap::new();
    let descriptors =
        std::fs::read_dir("/proc/self/fdinfo").context("could not list /proc/self/fdinfo")?;
    for entry in descriptors.flatten() {
        // Descriptors come and go meanwhile.
        let Ok(text) = std::fs::read_to_string(entry.path()) else {
            continue;
        };
        let fields: BTreeMap<&str, u64> = text
            .lines()
            .filter_map(|line| {
                let (name, value) = line.split_once(':')?;
                Some((name, value.trim().parse().ok()?))
            })
            .collect();
        if let (Some(id), Some(capacity)) = (fields.get("map_id"), fields.get("max_entries")) {
            let of = |name: &str| fields.get(name).copied().unwrap_or(0);
            let row = (of("key_size"), of("value_size"), *capacity, of("memlock"));
            maps.insert(*id, row);
        }
    }
    let mut held: Vec<Held> = aya::maps::loaded_maps()
        .filter_map(Result::ok)
        .filter_map(|map| {
            let (key_size, value_size, capacity, bytes) = *maps.get(&u64::from(map.id()))?;
            let name = map.name_as_str()?.to_owned();
            let capacity = match &*name {
                FLOWS => capacity * WAYS as u64,
                _ => capacity,
            };
            Some(Held {
                id: map.id(),
                name,
                kind: map
                    .map_type()
                    .map_or_else(|_| "unknown".to_owned(), |kind| format!("{kind:?}")),
                key_size,
                value_size,
                capacity,
                bytes,
            })
        })
        .collect();
    held.sort_by(|a, b| (&a.name, a.id).cmp(&(&b.name, b.id)));
    Ok(held)
}

/// Opens the newest map of this name.
pub(crate) fn open(name: &str) -> Result<MapData> {
    let held = held()?;
    let map = held.iter().rev().find(|map| map.name == name);
    map.with_context(|| format!("the agent holds no map {name}"))?
        .open()
}

/// One row for each map.
pub fn rows() -> Result<Vec<Value>> {
    let row = |map: &Held| {
        json!({
            "map": map.name, "id": map.id, "type": map.kind, "key_size": map.key_size,
            "value_size": map.value_size, "max_entries": map.capacity, "memory_bytes": map.bytes,
        })
    };
    Ok(held()?.iter().map(row).collect())
}

#[cfg(test)]
mod tests {
    use aya::maps::HashMap;

    use super::*;

    #[test]
    fn a_map_of_this_process_is_found() {
        if !nix::unistd::geteuid().is_root() {
            println!("skipped: it needs root");
            return;
        }
        let map: HashMap<MapData, u32, [u8; 12]> = HashMap::create(4_801, 1).unwrap();
        let found = held().unwrap();
        let found = found.iter().find(|one| one.capacity == 4_801).unwrap();
        assert_eq!((found.key_size, found.value_size), (4, 12));
        assert_eq!(found.kind, "Hash");
        let info = found.open().unwrap().info().unwrap();
        assert_eq!(info.max_entries(), 4_801);
        drop(map);
        let missing = open("no such map").err().unwrap().to_string();
        assert!(missing.contains("no such map"), "{missing}");
    }
}
