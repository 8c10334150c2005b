//! What the kernel counts: packets, events of flows, and its maps.

use anyhow::Result;
use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, EncodeMetric};
use prometheus_client::metrics::MetricType;
use prometheus_client::metrics::counter::ConstCounter;
use prometheus_client::metrics::gauge::ConstGauge;

use crate::bpf_maps::Held;
use crate::flows::Flows;
use crate::maps::batch;
use crate::maps::usage::Usage;

/// Counters of packets and events, read when somebody asks.
pub(super) struct Packets(pub Flows);

impl std::fmt::Debug for Packets {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.write_str("Packets")
    }
}

impl Collector for Packets {
    fn encode(&self, mut encoder: DescriptorEncoder) -> std::fmt::Result {
        let counters = match self.0.counters() {
            Ok(counters) => counters,
            Err(error) => {
                tracing::warn!(error = format!("{error:#}"), "metrics lack the counters");
                return Ok(());
            }
        };
        for (name, help, value) in [
            (
                "xebec_events_produced",
                "Events of flows that there were to tell: those that were read, those that were lost, and those that wait to be read",
                counters.produced,
            ),
            (
                "xebec_events_delivered",
                "Events of flows that were read from the kernel",
                self.0.taken(),
            ),
            (
                "xebec_events_aggregated_packets",
                "Packets without an event of their own, which another one of their flow tells of",
                counters.aggregated,
            ),
            (
                "xebec_events_lost",
                "Events of flows for which there was no room",
                counters.lost,
            ),
            (
                "xebec_forwarded_packets",
                "Packets of pods that went on, and those to the node where it is under rules",
                counters.forwarded,
            ),
            (
                "xebec_dropped_packets",
                "Packets that were dropped",
                counters.dropped,
            ),
            (
                "xebec_refused_packets",
                "Packets to Services without endpoints that were answered with a reset or an ICMP error",
                counters.refused,
            ),
            (
                "xebec_nat_no_port_packets",
                "Packets that were dropped because no port was free to translate them to",
                counters.no_port,
            ),
            (
                "xebec_dns_answers_held",
                "Resolvers' answers that were held until rules for domains knew their addresses",
                counters.held,
            ),
            (
                "xebec_dns_answers_not_held",
                "Resolvers' answers to pods under rules for domains that could not be held: too long, in fragments, or more at once than there was room for",
                counters.unheld,
            ),
        ] {
            let metric = encoder.encode_descriptor(name, help, None, MetricType::Counter)?;
            ConstCounter::new(value).encode(metric)?;
        }
        let help = "Packets from the network that were translated, by the hook that did it";
        let name = "xebec_translated_packets";
        let mut metric = encoder.encode_descriptor(name, help, None, MetricType::Counter)?;
        for (hook, value) in [
            ("tc", counters.translated),
            ("xdp", counters.translated_early),
        ] {
            let labels = [("hook", hook)];
            ConstCounter::new(value).encode(metric.encode_family(&labels)?)?;
        }
        Ok(())
    }
}

/// The node's ports and the entries of tables that flows and affinities take up, counted (by this function) when
/// somebody asks.
#[derive(Debug)]
pub(super) struct InUse(pub fn() -> Result<Usage>);

impl Collector for InUse {
    fn encode(&self, mut encoder: DescriptorEncoder) -> std::fmt::Result {
        let Usage { ports, tables } = match (self.0)() {
            Ok(usage) => usage,
            Err(error) => {
                tracing::warn!(
                    error = format!("{error:#}"),
                    "metrics lack ports and tables in use"
                );
                return Ok(());
            }
        };
        for (name, help, value) in [
            (
                "xebec_nat_ports_used",
                "Translated flows that hold a port of the node; those to different ends may hold the same",
                ports.used,
            ),
            (
                "xebec_nat_ports_used_most",
                "Ports of the node that translated flows to the one end with the most of them hold",
                ports.busiest,
            ),
            (
                "xebec_nat_ports",
                "Ports of the node that translated flows to each end may hold",
                ports.available,
            ),
        ] {
            let metric = encoder.encode_descriptor(name, help, None, MetricType::Gauge)?;
            ConstGauge::new(value).encode(metric)?;
        }
        let help = "Part that is in use of a table which forgets what was not asked for longest when it is full";
        let name = "xebec_bpf_map_pressure";
        let mut metric = encoder.encode_descriptor(name, help, None, MetricType::Gauge)?;
        for table in tables {
            let labels = [("map", table.name)];
            ConstGauge::new(table.pressure()).encode(metric.encode_family(&labels)?)?;
        }
        Ok(())
    }
}

/// The maps that the agent holds, asked of the kernel (by this function) when somebody asks.
#[derive(Debug)]
pub(super) struct KernelMaps(pub fn() -> Result<Vec<Held>>);

/// Larger maps are not counted: that would cost more than the number is worth.
const CHEAP: u64 = 131_072;

/// How many entries a map has, where that is cheap to find out.
fn entries(map: &Held) -> Option<usize> {
    if map.kind != "Hash" || map.capacity > CHEAP {
        return None;
    }
    batch::count(&map.open().ok()?).ok()
}

impl Collector for KernelMaps {
    fn encode(&self, mut encoder: DescriptorEncoder) -> std::fmt::Result {
        let mut maps = match (self.0)() {
            Ok(maps) => maps,
            Err(error) => {
                tracing::warn!(error = format!("{error:#}"), "metrics lack the maps");
                return Ok(());
            }
        };
        // What is not ours has no upper-case name: the loader's own for constants, for example. Of two with one name
        // the newer one counts.
        maps.retain(|map| {
            map.name
                .starts_with(|first: char| first.is_ascii_uppercase())
        });
        maps.reverse();
        maps.dedup_by(|a, b| a.name == b.name);
        maps.reverse();
        let mut family = |name: &str, help: &str, value: &dyn Fn(&Held) -> Option<u64>| {
            let mut metric = encoder.encode_descriptor(name, help, None, MetricType::Gauge)?;
            for map in &maps {
                if let Some(value) = value(map) {
                    let labels = [("map", map.name.as_str())];
                    ConstGauge::new(value).encode(metric.encode_family(&labels)?)?;
                }
            }
            std::fmt::Result::Ok(())
        };
        family(
            "xebec_bpf_map_capacity",
            "Entries that a map of the kernel has room for",
            &|map| Some(map.capacity),
        )?;
        family(
            "xebec_bpf_map_entries",
            "Entries of a map of the kernel, where they are cheap to count",
            &|map| entries(map).map(|count| count as u64),
        )?;
        family(
            "xebec_bpf_map_bytes",
            "Memory of a map of the kernel",
            &|map| Some(map.bytes),
        )
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use aya::maps::{HashMap, MapData};
    use prometheus_client::registry::Registry;

    use super::*;
    use crate::bpf_maps;
    use crate::flows::Directory;
    use crate::flows::metrics::FlowMetrics;
    use crate::maps::usage::{Ports, Table};

    fn text(collector: impl Collector) -> String {
        let mut registry = Registry::default();
        registry.register_collector(Box::new(collector));
        super::super::encode(&registry).unwrap()
    }

    #[test]
    fn counters_have_the_names_that_dashboards_use() {
        let told = text(Packets(Flows::new(
            Directory::default(),
            "a",
            1,
            FlowMetrics::default(),
        )));
        for line in [
            "xebec_events_produced_total 0\n",
            "xebec_events_lost_total 0\n",
            "xebec_events_delivered_total 0\n",
            "xebec_events_aggregated_packets_total 0\n",
            "xebec_forwarded_packets_total 0\n",
            "xebec_dropped_packets_total 0\n",
            "xebec_refused_packets_total 0\n",
            "xebec_nat_no_port_packets_total 0\n",
            "xebec_translated_packets_total{hook=\"tc\"} 0\n",
            "xebec_translated_packets_total{hook=\"xdp\"} 0\n",
        ] {
            assert!(told.contains(line), "{told}");
        }
    }

    /// Names of the metrics that a collector tells of.
    fn names(collector: impl Collector) -> BTreeSet<String> {
        let told = text(collector);
        let kinds = told.lines().filter_map(|line| line.strip_prefix("# TYPE "));
        kinds
            .filter_map(|line| match line.split_once(' ')? {
                (name, "counter") => Some(format!("{name}_total")),
                (name, "histogram") => Some(format!("{name}_bucket")),
                (name, _) => Some(name.to_owned()),
            })
            .collect()
    }

    #[test]
    fn the_dashboard_asks_for_nothing_that_is_not_there() {
        let flows = || Flows::new(Directory::default(), "a", 1, FlowMetrics::default());
        let pressure = || {
            let table = |name| Table {
                name,
                in_use: 0,
                capacity: 1,
            };
            Ok(Usage {
                ports: Ports::default(),
                tables: [table("FLOWS"), table("AFFINITIES")],
            })
        };
        let mut known = names(Packets(flows()));
        known.extend(names(FlowMetrics::usual()));
        known.extend(names(InUse(pressure)));
        let dashboard = include_str!("../../../deploy/grafana/flows.json");
        let dashboard: serde_json::Value = serde_json::from_str(dashboard).unwrap();
        let mut asked = BTreeSet::new();
        for panel in dashboard["panels"].as_array().unwrap() {
            let targets = panel["targets"].as_array().unwrap();
            assert!(!targets.is_empty(), "{panel}");
            for target in targets {
                let text = target["expr"].as_str().unwrap();
                let words = text.split(|c: char| !c.is_ascii_alphanumeric() && c != '_');
                let metrics =
                    words.filter(|word| word.starts_with("hubble_") || word.starts_with("xebec_"));
                asked.extend(metrics.map(str::to_owned));
            }
        }
        assert!(asked.len() > 10, "{asked:?}");
        let unknown: Vec<_> = asked.difference(&known).collect();
        assert!(unknown.is_empty(), "{unknown:?}");
    }

    #[test]
    fn what_is_in_use_is_told_with_how_much_there_is() {
        let told = text(InUse(|| {
            let table = |name: &'static str, in_use: u64| Table {
                name,
                in_use,
                capacity: 1_000,
            };
            Ok(Usage {
                ports: Ports {
                    used: 9,
                    busiest: 7,
                    available: 4_536,
                },
                tables: [table("FLOWS", 250), table("AFFINITIES", 1_000)],
            })
        }));
        for line in [
            "xebec_nat_ports_used 9\n",
            "xebec_nat_ports_used_most 7\n",
            "xebec_nat_ports 4536\n",
            "xebec_bpf_map_pressure{map=\"FLOWS\"} 0.25\n",
            "xebec_bpf_map_pressure{map=\"AFFINITIES\"} 1.0\n",
        ] {
            assert!(told.contains(line), "{told}");
        }
        // What can't be counted is left out, and the rest is told.
        let told = text(InUse(|| anyhow::bail!("no map")));
        assert_eq!(told, "# EOF\n");
    }

    /// Room that no other test's map has.
    const CAPACITY: u64 = 4_803;

    /// This test's map as if it were the dataplane's, one before it of the same name, and one that is too large.
    fn maps() -> Result<Vec<Held>> {
        let mut all = bpf_maps::held()?;
        all.retain(|map| map.capacity == CAPACITY);
        let Some(map) = all.pop() else {
            anyhow::bail!("the test's map is not there");
        };
        let as_if = |name: &str, capacity| Held {
            name: name.into(),
            capacity,
            ..map.clone()
        };
        Ok(vec![
            as_if("FRONTENDS", 1),
            as_if("FRONTENDS", CAPACITY),
            as_if("RULES", CHEAP + 1),
            as_if("rodata", 1),
        ])
    }

    #[test]
    fn maps_are_told_once_and_counted_where_it_is_cheap() {
        if !nix::unistd::geteuid().is_root() {
            println!("skipped: it needs root");
            return;
        }
        let mut map: HashMap<MapData, u32, u32> = HashMap::create(CAPACITY as u32, 1).unwrap();
        for key in 0..3 {
            map.insert(key, 0, 0).unwrap();
        }
        let told = text(KernelMaps(maps));
        let of = |name: &str| -> Vec<&str> {
            let lines = told
                .lines()
                .filter(|line| line.starts_with(&format!("{name}{{")));
            lines.collect()
        };
        assert_eq!(
            of("xebec_bpf_map_capacity"),
            [
                format!("xebec_bpf_map_capacity{{map=\"FRONTENDS\"}} {CAPACITY}"),
                format!("xebec_bpf_map_capacity{{map=\"RULES\"}} {}", CHEAP + 1),
            ]
        );
        assert_eq!(
            of("xebec_bpf_map_entries"),
            ["xebec_bpf_map_entries{map=\"FRONTENDS\"} 3"]
        );
        assert_eq!(of("xebec_bpf_map_bytes").len(), 2);
    }
}
