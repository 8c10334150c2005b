//! `flow-idle`: what flows cost that nobody uses any more: their memory, and the time until others have their places.
//!
//! Nobody sweeps the table of flows: a flow that was silent for too long is forgotten by whoever meets it, and its places
//! go to newcomers. So the time to expire a million flows is what a million newcomers pay on top. In each round the
//! agent's own program enters that many new flows (the first packets of `tcp-v4-lru-miss`, each with a port of the node's:
//! two entries) into an empty table that has room for twice as many; then all are dated back beyond what is forgotten;
//! then the program enters as many others, which take what is free, and as many again, which take the places of the first.
//!
//! Beside it, a sweep as others make it who track connections: all entries are read, judged, and removed where they are
//! over, in the kernel's memory itself, without a call for each.

use std::ops::ControlFlow;
use std::time::Instant;

use anyhow::{Context, Result, ensure};
use aya::maps::MapData;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use xebec_agent::maps::flow_table::{self, FlowTable};
use xebec_dataplane_common::flow::{longest_idle, ticks};

use super::SUBJECTS;
use super::kernel::Program;
use super::pound;
use super::setting::Setting;
use super::stand::programs;
use super::wrap::{self, Pick};
use crate::Effort;
use crate::row::{Aim, Case, Row, number};
use crate::services::{MANY, Network, Part, XebecStage, part};

/// What enters flows.
const SCENARIO: &str = "tcp-v4-lru-miss";
/// A flow that is translated has so many entries.
const ENTRIES: u32 = 2;
/// The table has room for so many times the flows.
const ROOM: u32 = 2;
/// One entry in so many may be missing, or another's: the agent and the API talk, too, chance has ports collide, and some
/// sets get more than they have room for.
const SELDOM: u64 = 100;
/// Ticks beyond what a flow may be silent.
const BEYOND: u32 = 1_000;

/// One round of so many flows.
#[derive(Serialize, Deserialize)]
pub struct Order {
    pound: pound::Order,
    /// Numbers of the maps of the table and of its shape.
    maps: [u32; 2],
    flows: u32,
}

/// What it gave.
#[derive(Serialize, Deserialize)]
struct Told {
    /// Nanoseconds of a new flow in an empty table, over an empty program.
    empty: f64,
    /// The same in one that is full of others, of which half are expired.
    expired: f64,
    /// Of the entries of the expired ones, so many of a hundred are there after as many new flows.
    left: f64,
    /// Nanoseconds of a sweep for each expired flow.
    sweep: f64,
}

/// Measures.
pub fn run(effort: Effort) -> Result<Vec<Row>> {
    let (rounds, flows) = effort.of((5, 1_000_000), (2, 100_000));
    let before = programs()?;
    let mut stage = XebecStage::with_outside("flow-idle", 1, 10, MANY)?;
    stage.flows = flows * ENTRIES * ROOM;
    stage.start_agent(false)?;
    let (client, _without) = stage.agent_pod()?;
    let subject = &SUBJECTS[1];
    let program = subject.newest(&before)?;
    let setting = Setting::of(subject, &stage, &client)?;
    let scenario = super::scenario::place(SCENARIO).context("there is no such scenario")?;
    let maps = stage.table("maps")?;
    let map = |name: &str| {
        let map = maps.iter().find(|row| row["map"] == name);
        map.with_context(|| format!("the agent has no map {name}"))
    };
    let id = |name: &str| {
        let id = map(name)?["id"].as_u64().and_then(|id| id.try_into().ok());
        id.context("the agent's map has no number")
    };
    let maps = [id(flow_table::FLOWS)?, id(flow_table::SHAPE)?];
    let entry = entry(map(flow_table::FLOWS)?)?;
    let mut part = Part::start(
        Network::Of(&stage.stage.node),
        false,
        &["--cpu", "0", "expire"],
    )?;
    let mut told = Vec::new();
    for round in 0..rounds {
        let mut pound = setting.order(subject.kind, scenario, 0);
        pound.program = Some(program);
        pound.round = round;
        let order = Order { pound, maps, flows };
        let one: Told = part.ask(&order)?;
        eprintln!(
            "bench: flow-idle: a new flow {:.0} ns, in place of an expired one {:.0} ns ({:.1} % are left); a sweep {:.0} ns a flow",
            one.empty, one.expired, one.left, one.sweep
        );
        told.push(one);
    }
    drop(part);
    drop(client);
    stage.stop_agent()?;
    let slabs = std::fs::read_to_string("/proc/slabinfo").unwrap_or_default();
    rows(flows, entry, tracked(&slabs), &told)
}

fn rows(flows: u32, entry: f64, tracked: Option<f64>, told: &[Told]) -> Result<Vec<Row>> {
    let many = number(f64::from(flows));
    let case = |case, unit| Case {
        bench: "flow-idle",
        case,
        unit,
        aim: Aim::None,
    };
    let pairs = |each: fn(&Told) -> (f64, f64)| told.iter().map(each).collect::<Vec<_>>();
    let seconds = |each| {
        let all = pairs(each).into_iter();
        let of = |nanos: f64| nanos * f64::from(flows) / 1e9;
        all.map(|(ours, peer)| (of(ours), of(peer)))
            .collect::<Vec<_>>()
    };
    let both = f64::from(ENTRIES) * entry;
    let memory = case("memory of a translated flow, both entries", "B");
    Ok(vec![
        Row::alone(
            case("memory of an entry of the table of flows", "B"),
            &[entry],
        )?,
        match tracked {
            Some(object) => Row::paired(
                memory,
                "nf_conntrack's object, without extensions",
                &[(both, object)],
            )?,
            None => Row::alone(memory, &[both])?,
        },
        Row::paired(
            case(
                &format!("a new flow in a full table, {many} of it expired"),
                "ns",
            ),
            "in an empty table",
            &pairs(|one| (one.expired, one.empty)),
        )?,
        Row::paired(
            case(
                &format!("{many} new flows in a full table with as many expired ones"),
                "s",
            ),
            "a sweep, then the same in an empty table",
            &seconds(|one| (one.expired, one.sweep + one.empty)),
        )?,
        Row::alone(
            case(
                "of the expired ones' entries, left by as many new flows",
                "%",
            ),
            &told.iter().map(|one| one.left).collect::<Vec<_>>(),
        )?,
    ])
}

/// Bytes that the kernel has for each entry of a map, by the agent's row of it.
fn entry(map: &Value) -> Result<f64> {
    let of = |name: &str| {
        let number = map[name].as_f64().filter(|number| *number > 0.0);
        number.with_context(|| format!("the agent tells no {name} of {}", map["map"]))
    };
    Ok(of("memory_bytes")? / of("max_entries")?)
}

/// Bytes of an object of the kernel's connection tracking, by `/proc/slabinfo`, if there is any.
fn tracked(slabs: &str) -> Option<f64> {
    // Name, objects in use, objects, bytes of each.
    let mut lines = slabs.lines().map(str::split_ascii_whitespace);
    let mut words =
        lines.find_map(|mut words| (words.next()? == "nf_conntrack").then_some(words))?;
    words.nth(2)?.parse().ok()
}

/// The part that enters flows, dates them back, and sweeps.
pub fn obey() -> Result<()> {
    part::obey(|order: Order| Ok(json!(measure(&order)?)))
}

fn measure(order: &Order) -> Result<Told> {
    let (flows, pound) = (order.flows, &order.pound);
    let [table, shape] = order.maps.map(MapData::from_id);
    let table = FlowTable::new(
        &table.context("could not open the table of flows")?,
        shape.context("could not open its shape")?,
    )?;
    let id = pound.program.context("there is no program to measure")?;
    let program = Program::by_id(id, pound.kind)?;
    let (_, _, (frame, vary)) = pound.frames()?;
    let run = |program: &Program, first: u64| -> Result<f64> {
        let wrapped = wrap::wrap(program, pound.kind, &frame, Pick::Next(first), vary)?;
        let ran = wrapped.program.run(&frame, pound.device, flows, None)?;
        Ok(f64::from(ran.nanos))
    };
    let all = u64::from(flows * ENTRIES);
    let [first, second, third] =
        [0, 1, 2].map(|part| (u64::from(pound.round) * 3 + part) * u64::from(flows));
    let floor = run(&Program::empty(pound.kind)?, first)?;
    table.retain(|_, _| false);
    let empty = run(&program, first)? - floor;
    age(&table)?;
    let [new, old] = count(&table)?;
    ensure!(
        old + all / SELDOM >= all && new <= all / SELDOM,
        "of {all} entries {old} are there and expired, and {new} are not"
    );
    // These take what is free, and then the table is full.
    run(&program, second)?;
    let expired = run(&program, third)? - floor;
    let [_, old] = count(&table)?;
    let left = old as f64 * 100.0 / all as f64;
    age(&table)?;
    let now = now()?;
    let mut judged = 0;
    let began = Instant::now();
    let swept = table.retain(|key, flow| {
        judged += 1;
        !flow.is_replaceable(key.protocol, now)
    });
    let sweep = began.elapsed().as_secs_f64() * 1e9 / (judged as f64 / f64::from(ENTRIES));
    ensure!(
        swept as u64 + all / SELDOM >= all,
        "of {all} entries the sweep found {swept} that are over"
    );
    Ok(Told {
        empty,
        expired,
        left,
        sweep,
    })
}

fn now() -> Result<u32> {
    Ok(ticks(part::now()?))
}

/// Dates all flows back, beyond what any may be silent. For the table they stay as old as they are.
fn age(table: &FlowTable) -> Result<()> {
    let now = now()?;
    table.retain(|key, flow| {
        flow.seen = now.wrapping_sub(longest_idle(key.protocol) + BEYOND);
        flow.paired = flow.seen;
        true
    });
    Ok(())
}

/// How many entries are of flows that hold, and of those that are over.
fn count(table: &FlowTable) -> Result<[u64; 2]> {
    let now = now()?;
    let mut found = [0; 2];
    table.each(|key, flow| {
        found[usize::from(flow.is_forgotten(key.protocol, now))] += 1;
        ControlFlow::Continue(())
    });
    Ok(found)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests may panic")]
    use super::*;

    #[test]
    fn memory_is_told_by_the_kernel() {
        let map = json!({"map": "FLOWS", "memory_bytes": 3_840, "max_entries": 20});
        assert_eq!(entry(&map).unwrap(), 192.0);
        assert!(entry(&json!({"map": "FLOWS", "memory_bytes": 0, "max_entries": 20})).is_err());
        assert!(entry(&json!({})).is_err());
        let slabs = "slabinfo - version: 2.1\n# name <active_objs>\n\
            nf_conntrack_expect 0 0 208 39 2 : tunables 0 0 0\n\
            nf_conntrack        12 32 256 16 1 : tunables 0 0 0\n";
        assert_eq!(tracked(slabs), Some(256.0));
        assert_eq!(
            tracked("slabinfo - version: 2.1\nkmalloc-256 1 2 256"),
            None
        );
        assert_eq!(tracked("nf_conntrack 1"), None);
    }

    #[test]
    fn a_row_for_each_number() {
        let told = [100.0, 200.0, 300.0].map(|empty| Told {
            empty,
            expired: 2.0 * empty,
            left: empty / 10.0,
            sweep: 4.0 * empty,
        });
        let all = rows(1_000_000, 190.0, Some(256.0), &told).unwrap();
        let of = |place: usize| (all[place].ours, all[place].peer, all[place].unit);
        assert_eq!(of(0), (190.0, None, "B"));
        assert_eq!(of(1), (380.0, Some(256.0), "B"));
        assert_eq!(of(2), (400.0, Some(200.0), "ns"));
        // A sweep alone takes nobody in.
        assert_eq!(of(3), (0.4, Some(1.0), "s"));
        assert_eq!((all[3].rounds, all[3].ratio), (3, Some(0.4)));
        assert_eq!(of(4), (20.0, None, "%"));
        assert!(all[2].case.contains("1,000,000"));
        let all = rows(1_000_000, 190.0, None, &told).unwrap();
        assert_eq!((all[1].ours, all[1].peer), (380.0, None));
        assert!(rows(1, 190.0, None, &[]).is_err());
    }
}
