//! `xdp-lb`: nanoseconds per packet of the real programs, in the scenarios of the Linux kernel's `bench xdp-lb`.
//!
//! An agent fills the maps as it always does, from Services in a real API, and attaches its programs; each is then
//! run by its number with `BPF_PROG_TEST_RUN`, unchanged. A program that sends a packet on rewrites it, so the kernel's
//! own loop (`repeat`) would give it the rewritten one from the second time on. There are two ways around this, and
//! both are measured:
//!
//! - In a loop: a small program of the benchmark (`wrap.rs`) writes the whole frame anew, with the flow's number in it,
//!   and jumps into the measured one by a tail call, which costs next to nothing. The kernel loops over this. What
//!   comes out at the end of each loop is looked at. The aims are about this number: it is the one that others tell.
//! - Single runs: each is one call with `repeat` 1 and a frame of its own, which the kernel copies anew. The time that it
//!   tells is that of the program alone, between two readings of its clock; the system call is not in it. In between the
//!   kernel makes and frees a packet, so caches and branch predictors are cold: this is a packet that comes alone.
//!
//! Both are told over an empty program, run in the same way in the same minute: what writing the frame, choosing a flow
//! and reading the clock cost is in both, and taken off. Not chosen: `BPF_ENABLE_STATS`, which reads the clock for each
//! run as well but gives sums alone, no median; live frames, whose pages the program gets again as it left them.

pub mod expiry;
mod frame;
mod kernel;
pub mod live;
pub mod pound;
mod scenario;
mod wrap;

use std::collections::BTreeMap;
use std::net::IpAddr;

use anyhow::{Context, Result, anyhow};
use aya::programs::loaded_programs;
use serde_json::Value;

use crate::row::{Aim, Case, Row, median, number};
use crate::services::{
    MANY, NODE_IP, NODE_IP6, NODE_PORT, Network, OUTSIDE, OUTSIDE6, PORT, Part, XebecStage,
    backend, backend6,
};
use crate::{Effort, Outcome};
use kernel::Kind;
use pound::{Order, Pounded, Target};
use scenario::{Flows, LEFT_OUT, SCENARIOS};

/// A program that is measured: what it is, its name in the kernel, its kind, and the device that its frames come in at.
struct Subject {
    words: &'static str,
    name: &'static str,
    kind: Kind,
    pod: bool,
}

const SUBJECTS: [Subject; 3] = [
    Subject {
        words: "XDP, from outside",
        name: "xebec_express",
        kind: Kind::Xdp,
        pod: false,
    },
    Subject {
        words: "tc, from outside",
        name: "xebec_from_network",
        kind: Kind::Classifier,
        pod: false,
    },
    Subject {
        words: "tc, from a pod",
        name: "xebec_from_pod",
        kind: Kind::Classifier,
        pod: true,
    },
];

/// Room for a million translated flows: nothing has to go that a scenario wants to find, and new flows come to a table
/// of 524,288 at least: those of `tcp-v4-lru-256k`, in single runs and in loops.
const FLOWS: u32 = 1 << 21;
/// The kernel keeps so many bytes of a program's name.
const NAME: usize = 15;
/// What a subject shall reach in a scenario, in nanoseconds over the floor.
fn aim(subject: &Subject, name: &str) -> Aim {
    let balancer = subject.kind == Kind::Xdp;
    match name {
        "tcp-v4-lru-hit" | "udp-v4-lru-hit" | "tcp-v6-lru-hit" | "udp-v6-lru-hit" => {
            Aim::AtMost(if balancer { 100.0 } else { 150.0 })
        }
        "tcp-v4-lru-diverse" | "udp-v4-lru-diverse" | "tcp-v6-lru-diverse" => {
            Aim::AtMost(if balancer { 180.0 } else { 300.0 })
        }
        "tcp-v4-lru-256k" if balancer => Aim::AtMost(400.0),
        "tcp-v4-lru-miss" | "udp-v4-lru-miss" => Aim::AtMost(800.0),
        _ => Aim::None,
    }
}

/// Measures all subjects in all scenarios at each size.
pub fn run(effort: Effort) -> Result<Outcome> {
    let sizes: &[usize] = effort.of(&[1, 100_000], &[1]);
    let samples = effort.of(20_000, 4_000);
    // Floors are measured in turn with the programs, so that both meet the same machine.
    let rounds = effort.of(5, 2);
    let mut rows = Vec::new();
    let mut notes = Vec::new();
    let mut table: BTreeMap<(usize, usize, usize), String> = BTreeMap::new();
    // By scenario and subject: what it cost with the fewest Services and with the most.
    let mut costs: BTreeMap<(usize, usize), Vec<f64>> = BTreeMap::new();
    for (column, &services) in sizes.iter().enumerate() {
        let before = programs()?;
        let mut stage = XebecStage::with_outside("xdp-lb", services, 10, MANY)?;
        stage.flows = FLOWS;
        stage.start_agent(true)?;
        let (mut client, _without) = stage.agent_pod()?;
        let first = crate::services::first_service(services)?;
        crate::services::watch(&mut client, first, None, 300.0, || Ok(()))?;
        let mut pound = Part::start(
            Network::Of(&stage.stage.node),
            false,
            &["--cpu", "0", "pound"],
        )?;
        for (place, subject) in SUBJECTS.iter().enumerate() {
            let setting = Setting::of(subject, &stage, &client)?;
            let program = subject.newest(&before);
            for (index, scenario) in SCENARIOS.iter().enumerate() {
                let words = format!(
                    "{}, {}, {} Service{}",
                    scenario.name,
                    subject.words,
                    number(services as f64),
                    if services == 1 { "" } else { "s" }
                );
                if subject.pod && scenario.flows == Flows::Many(262_144) {
                    // A pod has no more ports than 64k.
                    continue;
                }
                let mut order = setting.order(subject.kind, index, samples);
                if subject.pod {
                    // Below what lies between two scenarios' ports.
                    order.samples = order.samples.min(5_000);
                }
                let measured = program
                    .as_ref()
                    .map_err(|error| anyhow!("{error:#}"))
                    .and_then(|id| in_rounds(rounds, &mut pound, &mut order, *id));
                let (looped, over, last, floor) = match measured {
                    Ok(measured) => measured,
                    Err(error) => {
                        notes.push(format!("{words}: {error:#}"));
                        continue;
                    }
                };
                if let Some(why) = &last.wrong {
                    notes.push(format!("{words}: not there yet ({why})"));
                    eprintln!("bench: xdp-lb: {words}: {why}");
                    continue;
                }
                let single = format!(
                    "alone {:.0}, p99 {:.0}",
                    median(&over),
                    last.p99 - floor.p50
                );
                let cell = match looped.is_empty() {
                    true => format!("({single})"),
                    false => format!("{:.0} ({single})", median(&looped)),
                };
                eprintln!("bench: xdp-lb: {words}: {cell} ns over {:.0}", floor.p50);
                table.insert((index, place, column), cell);
                if let Aim::AtMost(_) = aim(subject, scenario.name) {
                    let cost = if looped.is_empty() { &over } else { &looped };
                    costs.entry((place, index)).or_default().push(median(cost));
                }
                rows.push(Row::alone(
                    Case {
                        bench: "xdp-lb",
                        case: &match looped.is_empty() {
                            true => format!("{words}, single runs"),
                            false => words.clone(),
                        },
                        unit: "ns",
                        aim: aim(subject, scenario.name),
                    },
                    if looped.is_empty() { &over } else { &looped },
                )?);
            }
        }
        drop(pound);
        drop(client);
        stage.stop_agent()?;
    }
    let (changes, lines) = changes(sizes, &costs)?;
    rows.extend(changes);
    notes.extend(lines);
    Ok(Outcome {
        sections: vec![("xdp-lb", markdown(sizes, &table, &notes))],
        rows: rows.into_iter().filter(Row::has_aim).collect(),
        lines: Vec::new(),
    })
}

/// What each subject costs with the most Services over what it costs with the fewest, by scenarios that have an aim.
fn changes(
    sizes: &[usize],
    costs: &BTreeMap<(usize, usize), Vec<f64>>,
) -> Result<(Vec<Row>, Vec<String>)> {
    let (mut rows, mut lines) = (Vec::new(), Vec::new());
    let (Some(fewest), Some(most)) = (sizes.first(), sizes.last()) else {
        return Ok((rows, lines));
    };
    for (place, subject) in SUBJECTS.iter().enumerate() {
        let of_subject = costs.iter().filter(|((one, _), _)| *one == place);
        let ratios: Vec<f64> = of_subject
            .filter_map(|(_, costs)| match costs.as_slice() {
                [few, many] => Some(many / few),
                _ => None,
            })
            .collect();
        if ratios.is_empty() {
            continue;
        }
        let words = format!(
            "{}, {} Services over {}",
            subject.words,
            number(*most as f64),
            number(*fewest as f64)
        );
        let (low, high) = ratios
            .iter()
            .fold((f64::MAX, f64::MIN), |(low, high), one| {
                (low.min(*one), high.max(*one))
            });
        lines.push(format!(
            "{words}, by scenarios that have an aim: median {:.2}, {low:.2} to {high:.2}",
            median(&ratios)
        ));
        rows.push(Row::alone(
            Case {
                bench: "xdp-lb",
                case: &words,
                unit: "times",
                aim: Aim::AtMost(1.05),
            },
            &ratios,
        )?);
    }
    Ok((rows, lines))
}

/// All rounds of the program and of an empty one: differences in loops (none where there are none) and of single runs,
/// and what was measured last.
fn in_rounds(
    rounds: u32,
    pound: &mut Part,
    order: &mut Order,
    id: u32,
) -> Result<(Vec<f64>, Vec<f64>, Pounded, Pounded)> {
    let (mut looped, mut over) = (Vec::new(), Vec::new());
    let mut last = None;
    for round in 0..rounds {
        order.round = round;
        order.program = None;
        let floor: Pounded = pound.ask(&order)?;
        order.program = Some(id);
        let ours: Pounded = pound.ask(&order)?;
        over.push(ours.p50 - floor.p50);
        looped.extend(
            ours.looped
                .zip(floor.looped)
                .map(|(ours, floor)| ours - floor),
        );
        let wrong = ours.wrong.is_some();
        last = Some((ours, floor));
        if wrong {
            break;
        }
    }
    let (ours, floor) = last.context("nothing was measured")?;
    Ok((looped, over, ours, floor))
}

/// All programs of the kernel: their numbers and names.
fn programs() -> Result<BTreeMap<u32, String>> {
    let mut found = BTreeMap::new();
    for program in loaded_programs() {
        // One that ends while we look is none of ours.
        let Ok(program) = program else { continue };
        let name = program.name_as_str().unwrap_or_default().to_owned();
        found.insert(program.id(), name);
    }
    Ok(found)
}

impl Subject {
    /// The number of the agent's program, which was not there before the agent was. One whose maps have grown has loaded
    /// its programs again: the last ones are those that are attached.
    fn newest(&self, before: &BTreeMap<u32, String>) -> Result<u32> {
        let name = &self.name[..self.name.len().min(NAME)];
        let own = |(id, found): &(u32, String)| found == name && !before.contains_key(id);
        let (id, _) = programs()?
            .into_iter()
            .rfind(own)
            .with_context(|| format!("the agent loaded no {}", self.name))?;
        Ok(id)
    }
}

/// Where a subject's frames come in, and what they ask.
struct Setting {
    device: u32,
    hardware: [[u8; 6]; 2],
    targets: [Target; 2],
}

impl Setting {
    fn of(subject: &Subject, stage: &XebecStage, pod: &Part) -> Result<Self> {
        let links = |part: &Part, words: &str| -> Result<Value> {
            serde_json::from_str(&part.run("ip", words)?).context("ip printed no JSON")
        };
        let inside = links(pod, "-json addr show dev eth0")?;
        // The node's end of the pod's cable is the one whose number the pod's end names.
        let device = if subject.pod {
            let number = inside[0]["link_index"]
                .as_u64()
                .context("the pod's device names no other end")?;
            let all = links(&stage.stage.node, "-json link show")?;
            all.as_array()
                .into_iter()
                .flatten()
                .find(|link| link["ifindex"].as_u64() == Some(number))
                .cloned()
                .context("the pod's device has no other end on the node")?
        } else {
            links(&stage.stage.node, "-json link show dev o0")?[0].clone()
        };
        let near = mac(&device)?;
        // A port of a backend where nobody serves.
        let nowhere: [IpAddr; 2] = [backend(2).into(), backend6(2).into()];
        let target = |sender, service: (IpAddr, u16), six: bool| Target {
            sender,
            service: service.into(),
            nowhere: (nowhere[usize::from(six)], 9).into(),
        };
        Ok(if subject.pod {
            let address = |family: &str| -> Result<IpAddr> {
                let all = inside[0]["addr_info"].as_array().into_iter().flatten();
                let mut global = all.filter(|one| one["scope"] == "global");
                global
                    .find(|one| one["family"] == family)
                    .and_then(|one| one["local"].as_str()?.parse().ok())
                    .with_context(|| format!("the pod has no address of {family}"))
            };
            Self {
                device: index(&device)?,
                hardware: [near, mac(&inside[0])?],
                targets: [
                    target(Some(address("inet")?), (OUTSIDE.into(), PORT), false),
                    target(Some(address("inet6")?), (OUTSIDE6.into(), PORT), true),
                ],
            }
        } else {
            Self {
                device: index(&device)?,
                hardware: [near, [2, 0, 0, 0, 0, 9]],
                targets: [
                    target(None, (NODE_IP.into(), NODE_PORT), false),
                    target(None, (NODE_IP6.into(), NODE_PORT), true),
                ],
            }
        })
    }

    fn order(&self, kind: Kind, scenario: usize, samples: u32) -> Order {
        Order {
            program: None,
            kind,
            device: self.device,
            hardware: self.hardware,
            targets: self.targets,
            scenario,
            samples,
            round: 0,
        }
    }
}

fn index(link: &Value) -> Result<u32> {
    link["ifindex"]
        .as_u64()
        .and_then(|index| index.try_into().ok())
        .context("a device has no number")
}

fn mac(link: &Value) -> Result<[u8; 6]> {
    let text = link["address"].as_str().unwrap_or_default();
    let bytes: Vec<u8> = text
        .split(':')
        .filter_map(|byte| u8::from_str_radix(byte, 16).ok())
        .collect();
    bytes
        .try_into()
        .ok()
        .with_context(|| format!("{text:?} is no hardware address"))
}

/// The table: a line for each scenario.
fn markdown(
    sizes: &[usize],
    table: &BTreeMap<(usize, usize, usize), String>,
    notes: &[String],
) -> String {
    let row = |words: &[String]| format!("| {} |", words.join(" | "));
    let mut head = vec!["scenario".to_owned()];
    for subject in &SUBJECTS {
        for size in sizes {
            head.push(format!("{}, {}", subject.words, number(*size as f64)));
        }
    }
    let mut lines = vec![
        "Nanoseconds of the program over an empty one, in a loop that writes the packet anew (and for a packet that comes alone: median, 99th percentile); columns by number of Services. Scenarios are named as in the Linux kernel's `bench xdp-lb`. Aims: XDP at most 100 ns for one flow (`hit`), 180 for 4,096 (`diverse`), 400 for 262,144 (`256k`); tc, which also enforces policy and tells of flows, 150 and 300; a new flow (`miss`, in a table of 524,288 and more) 800.".to_owned(),
        String::new(),
        row(&head),
        row(&vec!["---".to_owned(); head.len()]),
    ];
    for (index, scenario) in SCENARIOS.iter().enumerate() {
        let mut words = vec![scenario.name.to_owned()];
        for place in 0..SUBJECTS.len() {
            for column in 0..sizes.len() {
                let cell = table.get(&(index, place, column));
                words.push(cell.cloned().unwrap_or_else(|| "–".to_owned()));
            }
        }
        lines.push(row(&words));
    }
    lines.push(String::new());
    lines.extend(notes.iter().map(|note| format!("- {note}")));
    lines.extend(
        LEFT_OUT
            .iter()
            .map(|(names, why)| format!("- not measured: {names}: {why}")),
    );
    lines.join("\n")
}
