//! Tells when a table that forgets its oldest entries is full of what is in use.

use std::collections::HashSet;
use std::time::Duration;

use anyhow::{Context, Result};
use k8s_openapi::api::core::v1::ObjectReference;
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

use crate::events::{Notice, Teller};
use crate::maps::flow_table::FLOWS;
use crate::maps::usage::{self, Table};

/// How often tables are read: the kernel tells nobody when it forgets.
const PERIOD: Duration = Duration::from_secs(30);
/// A table is full from here on: of affinities, the kernel keeps up to 128 places free for each CPU.
const FULL: f64 = 0.9;
/// That of flows: one in a hundred then finds no place in its set but that of another that goes on.
const FULL_OF_FLOWS: f64 = 0.7;
/// It is no longer full where so much less is in use.
const LESS: f64 = 0.1;

/// Looks at the tables until `shutdown`, and tells of those that are full by a warning and an Event of the node.
pub(crate) async fn run(
    teller: Teller,
    node_name: String,
    shutdown: CancellationToken,
) -> Result<()> {
    let node = ObjectReference {
        api_version: Some("v1".to_owned()),
        kind: Some("Node".to_owned()),
        // As the kubelet has it: Events of a node name it so, too.
        uid: Some(node_name.clone()),
        name: Some(node_name),
        ..ObjectReference::default()
    };
    let mut told = Told::default();
    loop {
        tokio::select! {
            () = shutdown.cancelled() => return Ok(()),
            () = tokio::time::sleep(PERIOD) => {}
        }
        let counted = tokio::task::spawn_blocking(usage::count).await;
        let tables = match counted.context("counting panicked")? {
            Ok(usage) => usage.tables,
            Err(error) => {
                warn!(
                    error = format!("{error:#}"),
                    "could not see whether tables are full"
                );
                continue;
            }
        };
        for table in tables {
            let Some((reason, words)) = told.news(&table) else {
                continue;
            };
            teller.tell(Notice {
                about: node.clone(),
                reason: reason.to_owned(),
                action: "WatchTables",
                words,
            });
        }
    }
}

/// Tables that were told to be full, and have been since.
#[derive(Debug, Default)]
struct Told(HashSet<&'static str>);

impl Told {
    /// What is to be told of a table, if it has become full: an Event's reason and words.
    fn news(&mut self, table: &Table) -> Option<(&'static str, String)> {
        let pressure = table.pressure();
        let full = match table.name {
            FLOWS => FULL_OF_FLOWS,
            _ => FULL,
        };
        if pressure < full - LESS && self.0.remove(table.name) {
            info!(table = table.name, "a table has room again");
        }
        if pressure < full || !self.0.insert(table.name) {
            return None;
        }
        let (reason, what, flag) = match table.name {
            "AFFINITIES" => (
                "AffinityTableFull",
                "clients of Services with sessionAffinity",
                "--affinity-entries",
            ),
            _ => ("FlowTableFull", "flows that go on", "--flow-entries"),
        };
        let words = format!(
            "{} of the {} entries of {} are of {what}: those that were silent longest are forgotten. Give the agent more by {flag}",
            table.in_use, table.capacity, table.name
        );
        Some((reason, words))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_full_table_is_told_once_until_it_had_room() {
        let mut told = Told::default();
        let mut look = |name: &'static str, in_use: u64| {
            let table = Table {
                name,
                in_use,
                capacity: 1_000,
            };
            told.news(&table)
        };
        assert_eq!(look("FLOWS", 699), None);
        let (reason, words) = look("FLOWS", 700).unwrap();
        assert_eq!(reason, "FlowTableFull");
        assert!(
            words.contains("700 of the 1000") && words.contains("--flow-entries"),
            "{words}"
        );
        assert_eq!(look("FLOWS", 1_000), None);
        assert_eq!(look("FLOWS", 600), None);
        assert_eq!(look("FLOWS", 1_000), None);
        // Each by itself.
        assert_eq!(look("AFFINITIES", 899), None);
        let (reason, words) = look("AFFINITIES", 1_000).unwrap();
        assert_eq!(reason, "AffinityTableFull");
        assert!(words.contains("--affinity-entries"), "{words}");
        assert_eq!(look("FLOWS", 599), None);
        assert!(look("FLOWS", 990).is_some());
    }
}
