//! `flow-idle`: what flows cost that nobody uses any more: their memory, and the time until others have their places.
//!
//! The table of flows (`FLOWS`) is an LRU hash map of fixed size that nobody sweeps: a flow that was silent for too long
//! is forgotten by whoever meets it, and its entries go when a newcomer needs room. So the time to expire a million flows
//! is what a million newcomers pay on top. In each round the agent's own program enters that many new flows (the first
//! packets of `tcp-v4-lru-miss`, each with a port of the node's: two entries) into an empty table that has room for them
//! and little more; then all are dated back beyond what is forgotten; then the program enters as many others.
//!
//! Which entry goes, the kernel's LRU decides: it keeps two lists, and those that were used since they were made come
//! into the one that newcomers do not reach while it has no more than half of all. Both kinds of expired flows are
//! measured: never used again, and used; and of these, how many entries stand as many newcomers, of one packet each.
//!
//! Beside it, a sweep as others make it who track connections: these flows are dated back too, and read, judged and
//! deleted in batches (`BPF_MAP_LOOKUP_AND_DELETE_BATCH`, which is the cheapest way: one that keeps those that are not
//! over has to delete by key, one by one or with a second call).

use std::mem::offset_of;
use std::time::Instant;

use anyhow::{Context, Result, ensure};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use xebec_dataplane_common::TCP;
use xebec_dataplane_common::flow::{Flow, FlowKey, longest_idle, ticks};

use super::kernel::{Program, Table};
use super::pound;
use super::wrap::{self, Pick};
use super::{SUBJECTS, Setting, programs};
use crate::Effort;
use crate::row::{Aim, Case, Row, number};
use crate::services::{MANY, Network, Part, XebecStage, part};

/// The name of the table of flows.
const TABLE: &str = "FLOWS";
/// What enters flows.
const SCENARIO: &str = "tcp-v4-lru-miss";
/// A flow that is translated has so many entries.
const ENTRIES: u32 = 2;
/// One entry in so many may be missing, or another's: the agent and the API talk, too, and chance has ports collide.
const SELDOM: u64 = 100;
/// Ticks beyond what a flow may be silent.
const BEYOND: u32 = 1_000;

/// One round of so many flows.
#[derive(Serialize, Deserialize)]
pub struct Order {
    pound: pound::Order,
    table: u32,
    flows: u32,
}

/// What it gave.
#[derive(Serialize, Deserialize)]
struct Told {
    /// Nanoseconds of a new flow in an empty table, over an empty program.
    empty: f64,
    /// The same among expired ones, whose places are taken.
    expired: f64,
    /// The same among expired ones that were used.
    used: f64,
    /// Of the entries of these, so many of a hundred are there after as many new flows.
    left: f64,
    /// Nanoseconds of a sweep for each expired flow.
    sweep: f64,
}

/// Measures.
pub fn run(effort: Effort) -> Result<Vec<Row>> {
    let (rounds, flows) = effort.of((5, 1_000_000), (2, 100_000));
    let before = programs()?;
    let mut stage = XebecStage::with_outside("flow-idle", 1, 10, MANY)?;
    // As much as the flows need, and what each CPU keeps free for itself.
    stage.flows = flows * ENTRIES + (1 << 14);
    stage.start_agent(false)?;
    let (client, _without) = stage.agent_pod()?;
    let subject = &SUBJECTS[1];
    let program = subject.newest(&before)?;
    let setting = Setting::of(subject, &stage, &client)?;
    let scenario = super::scenario::place(SCENARIO).context("there is no such scenario")?;
    let table = stage.table("maps")?;
    let table = table.iter().find(|row| row["map"] == TABLE);
    let table = table.with_context(|| format!("the agent has no map {TABLE}"))?;
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
        let order = Order {
            pound,
            table: table["id"]
                .as_u64()
                .and_then(|id| id.try_into().ok())
                .context("the agent's map has no number")?,
            flows,
        };
        let one: Told = part.ask(&order)?;
        eprintln!(
            "bench: flow-idle: a new flow {:.0} ns, among expired ones {:.0} ns, used ones {:.0} ns ({:.1} % are left); a sweep {:.0} ns a flow",
            one.empty, one.expired, one.used, one.left, one.sweep
        );
        told.push(one);
    }
    drop(part);
    drop(client);
    stage.stop_agent()?;
    let slabs = std::fs::read_to_string("/proc/slabinfo").unwrap_or_default();
    rows(flows, entry(table)?, tracked(&slabs), &told)
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
            case(&format!("a new flow among {many} expired ones"), "ns"),
            "in an empty table",
            &pairs(|one| (one.expired, one.empty)),
        )?,
        Row::paired(
            case(
                &format!("{many} expired flows replaced by as many new ones"),
                "s",
            ),
            "a sweep in batches, then the same in an empty table",
            &seconds(|one| (one.expired, one.sweep + one.empty)),
        )?,
        Row::paired(
            case("of this, what the expired ones add", "s"),
            "the sweep alone",
            &seconds(|one| (one.expired - one.empty, one.sweep)),
        )?,
        Row::paired(
            case(
                &format!("a new flow among {many} expired ones that were used"),
                "ns",
            ),
            "in an empty table",
            &pairs(|one| (one.used, one.empty)),
        )?,
        Row::alone(
            case(
                "entries of used expired ones that as many new flows leave",
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
    let table = Table::by_id(order.table)?;
    ensure!(
        table.sizes() == (size_of::<FlowKey>(), size_of::<Flow>()),
        "the agent's table of flows is of another version"
    );
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
    table.walk(true, |_, _| Ok(()))?;
    let empty = run(&program, first)? - floor;
    age(&table, Used::No)?;
    let [new, old] = count(&table)?;
    ensure!(
        old + all / SELDOM >= all && new <= all / SELDOM,
        "of {all} entries {old} are there and expired, and {new} are not"
    );
    let expired = run(&program, second)? - floor;
    let [new, old] = count(&table)?;
    // Some are left for want of somebody who takes their place: the table has a little more room.
    ensure!(
        new + all / SELDOM >= all,
        "of {all} entries of new flows {new} are there, and {old} of expired ones"
    );
    age(&table, Used::Yes)?;
    let used = run(&program, third)? - floor;
    let [_, old] = count(&table)?;
    let left = old as f64 * 100.0 / all as f64;
    age(&table, Used::No)?;
    let now = now()?;
    let mut swept = 0;
    let began = Instant::now();
    table.walk(true, |_, values| {
        swept += dates(values).filter(|seen| is_over(*seen, now)).count() as u64;
        Ok(())
    })?;
    let sweep = began.elapsed().as_secs_f64() * 1e9 / f64::from(flows);
    ensure!(
        swept + all / SELDOM >= all,
        "of {all} entries the sweep found {swept} that are over"
    );
    Ok(Told {
        empty,
        expired,
        used,
        left,
        sweep,
    })
}

/// When all flows of a batch were last seen.
fn dates(values: &[u8]) -> impl Iterator<Item = u32> {
    values
        .chunks_exact(size_of::<Flow>())
        .map(|flow| match flow[offset_of!(Flow, seen)..] {
            [a, b, c, d, ..] => u32::from_ne_bytes([a, b, c, d]),
            _ => 0,
        })
}

fn now() -> Result<u32> {
    Ok(ticks(part::now()?))
}

fn is_over(seen: u32, now: u32) -> bool {
    now.wrapping_sub(seen) > longest_idle(TCP)
}

/// Whether flows were used after they began.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Used {
    Yes,
    No,
}

/// Dates all flows back, beyond what any may be silent.
fn age(table: &Table, used: Used) -> Result<()> {
    let past = now()?.wrapping_sub(longest_idle(TCP) + BEYOND);
    // What is written over what is there counts as used, and what is made does not.
    table.walk(used == Used::No, |keys, values| {
        date(values, past);
        table.update(keys, values)
    })
}

/// Writes when all flows of a batch, and their counterparts, were last seen.
fn date(values: &mut [u8], seen: u32) {
    for flow in values.chunks_exact_mut(size_of::<Flow>()) {
        for place in [offset_of!(Flow, seen), offset_of!(Flow, paired)] {
            flow[place..place + 4].copy_from_slice(&seen.to_ne_bytes());
        }
    }
}

/// How many entries are of flows that hold, and of those that are over.
fn count(table: &Table) -> Result<[u64; 2]> {
    let now = now()?;
    let mut found = [0; 2];
    table.walk(false, |_, values| {
        for seen in dates(values) {
            found[usize::from(is_over(seen, now))] += 1;
        }
        Ok(())
    })?;
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
    fn dates_are_written_where_the_programs_read_them() {
        let flow = size_of::<Flow>();
        let mut values = vec![7_u8; 3 * flow];
        date(&mut values, 0x0102_0304);
        assert_eq!(dates(&values).collect::<Vec<_>>(), [0x0102_0304; 3]);
        let changed = values.iter().filter(|byte| **byte != 7).count();
        assert_eq!(changed, 3 * 8, "both dates, and nothing else");
        // As the programs judge it, also where the machine has not been up for as long.
        let now = ticks(1_000_000_000 * 60);
        let past = now.wrapping_sub(longest_idle(TCP) + BEYOND);
        assert!(is_over(past, now) && !is_over(now, now));
    }

    #[test]
    fn a_row_for_each_number() {
        let told = [100.0, 200.0, 300.0].map(|empty| Told {
            empty,
            expired: 2.0 * empty,
            used: 3.0 * empty,
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
        assert_eq!(of(4), (0.2, Some(0.8), "s"));
        assert_eq!(of(5), (600.0, Some(200.0), "ns"));
        assert_eq!(of(6), (20.0, None, "%"));
        assert!(all[2].case.contains("1,000,000"));
        let all = rows(1_000_000, 190.0, None, &told).unwrap();
        assert_eq!((all[1].ours, all[1].peer), (380.0, None));
        assert!(rows(1, 190.0, None, &[]).is_err());
    }
}
