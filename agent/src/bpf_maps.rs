//! The eBPF maps that this process holds, for the command line.

use std::collections::BTreeMap;

use anyhow::{Context, Result};
use serde_json::{Value, json};

/// One row for each map, as the kernel describes it in fdinfo (proc(5)).
pub(crate) fn rows() -> Result<Vec<Value>> {
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
    let mut rows: Vec<Value> = aya::maps::loaded_maps()
        .filter_map(Result::ok)
        .filter_map(|map| {
            let (key, value, capacity, bytes) = maps.get(&u64::from(map.id()))?;
            let kind = map.map_type().map_or_else(|_| "unknown".to_owned(), |kind| format!("{kind:?}"));
            Some(json!({
                "map": map.name_as_str()?, "id": map.id(), "type": kind,
                "key_size": key, "value_size": value, "max_entries": capacity, "memory_bytes": bytes,
            }))
        })
        .collect();
    rows.sort_by(|a, b| a["map"].as_str().cmp(&b["map"].as_str()));
    Ok(rows)
}
