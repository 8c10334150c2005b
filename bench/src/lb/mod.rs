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
mod setting;
mod told;
mod wrap;

use std::collections::BTreeMap;

use anyhow::{Context, Result, bail, ensure};
use aya::programs::loaded_programs;

use crate::row::{Aim, Case, Row, median, number};
use crate::services::{MANY, Network, Part, XebecStage};
use crate::{Effort, Outcome};
use kernel::Kind;
use pound::{Order, Pounded};
use scenario::{Flows, SCENARIOS};
use setting::Setting;
use told::Told;

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

/// Measures all subjects in all scenarios at each size; sizes take turns, as programs and floors do, so that all meet the
/// same machine.
pub fn run(effort: Effort) -> Result<Outcome> {
    let sizes: &[usize] = effort.of(&[1, 100_000], &[1]);
    let samples = effort.of(20_000, 4_000);
    let rounds = effort.of(5, 2);
    let mut stands = Vec::new();
    for &services in sizes {
        stands.push(Stand::new(services)?);
    }
    let mut rows = Vec::new();
    let mut told = Told::new(sizes);
    for (place, subject) in SUBJECTS.iter().enumerate() {
        for (index, scenario) in SCENARIOS.iter().enumerate() {
            if subject.pod && scenario.flows == Flows::Many(262_144) {
                // A pod has no more ports than 64k.
                continue;
            }
            let mut orders = Vec::new();
            for stand in &stands {
                let mut order = stand.settings[place].order(subject.kind, index, samples);
                if subject.pod {
                    // All rounds' flows fit below what lies between two scenarios' ports.
                    order.samples = order.samples.min(1_000);
                }
                orders.push(order);
            }
            let measured = in_rounds(rounds, &mut stands, place, &mut orders);
            for (column, (measured, stand)) in measured.into_iter().zip(&stands).enumerate() {
                let words = format!(
                    "{}, {}, {} Service{}",
                    scenario.name,
                    subject.words,
                    number(stand.services as f64),
                    if stand.services == 1 { "" } else { "s" }
                );
                let measured = match measured {
                    Ok(measured) => measured,
                    Err(error) => {
                        eprintln!("bench: xdp-lb: {words}: {error:#}");
                        told.notes.push(format!("{words}: {error:#}"));
                        continue;
                    }
                };
                let cell = measured.cell();
                eprintln!(
                    "bench: xdp-lb: {words}: {cell} ns over {:.0}",
                    measured.floor
                );
                let aim = aim(subject, scenario.name);
                let case = match measured.looped.is_empty() {
                    true => format!("{words}, single runs"),
                    false => words,
                };
                rows.push(Row::alone(
                    Case {
                        bench: "xdp-lb",
                        case: &case,
                        unit: "ns",
                        aim,
                    },
                    measured.costs(),
                )?);
                told.cells.insert((index, place, column), cell);
                if let Aim::AtMost(_) = aim {
                    let costs = told.costs.entry((place, index)).or_default();
                    costs.insert(column, measured.costs().to_vec());
                }
            }
        }
    }
    for stand in stands {
        stand.end()?;
    }
    rows.extend(told.changes()?);
    Ok(Outcome {
        sections: vec![("xdp-lb", told.markdown())],
        rows: rows.into_iter().filter(Row::has_aim).collect(),
        lines: Vec::new(),
    })
}

/// A node with an agent, some Services, and the part that runs its programs.
struct Stand {
    // Dropped in this order: what runs before where it runs.
    pound: Part,
    client: Part,
    _without: Part,
    stage: XebecStage,
    services: usize,
    /// By subject: where its frames come in, and its number.
    settings: Vec<Setting>,
    programs: Vec<u32>,
}

impl Stand {
    fn new(services: usize) -> Result<Self> {
        let before = programs()?;
        let mut stage =
            XebecStage::with_outside(&format!("xdp-lb-{services}"), services, 10, MANY)?;
        stage.flows = FLOWS;
        stage.start_agent(true)?;
        let (mut client, without) = stage.agent_pod()?;
        let first = crate::services::first_service(services)?;
        crate::services::watch(&mut client, first, None, 300.0, || Ok(()))?;
        let words = ["--cpu", "0", "pound"];
        let pound = Part::start(Network::Of(&stage.stage.node), false, &words)?;
        let (mut settings, mut numbers) = (Vec::new(), Vec::new());
        for subject in &SUBJECTS {
            settings.push(Setting::of(subject, &stage, &client)?);
            numbers.push(subject.newest(&before)?);
        }
        Ok(Self {
            pound,
            client,
            _without: without,
            stage,
            services,
            settings,
            programs: numbers,
        })
    }

    fn end(mut self) -> Result<()> {
        drop(self.pound);
        drop(self.client);
        self.stage.stop_agent()
    }

    /// How many backends were chosen for new flows so far.
    fn chosen(&self) -> Result<u64> {
        let rows = self.stage.table("services")?;
        let each = rows
            .iter()
            .map(|row| (row["number"].as_u64(), row["hits"].as_u64().unwrap_or(0)));
        Ok(each.collect::<BTreeMap<_, _>>().values().sum())
    }
}

/// What all rounds of one subject gave in one scenario at one size, over an empty program: nanoseconds.
struct Measured {
    /// In loops; none where there are none.
    looped: Vec<f64>,
    /// Medians of single runs.
    over: Vec<f64>,
    /// Their 99th percentile, of the last round.
    p99: f64,
    /// The empty program's.
    floor: f64,
}

impl Measured {
    /// What the aims are about.
    fn costs(&self) -> &[f64] {
        match self.looped.is_empty() {
            true => &self.over,
            false => &self.looped,
        }
    }

    fn cell(&self) -> String {
        let single = format!("alone {:.0}, p99 {:.0}", median(&self.over), self.p99);
        match self.looped.is_empty() {
            true => format!("({single})"),
            false => format!("{:.0} ({single})", median(&self.looped)),
        }
    }
}

/// All rounds of a subject in a scenario: the program and an empty one, at each size.
fn in_rounds(
    rounds: u32,
    stands: &mut [Stand],
    subject: usize,
    orders: &mut [Order],
) -> Vec<Result<Measured>> {
    let mut all: Vec<Result<(Measured, u64)>> = stands
        .iter()
        .zip(&*orders)
        .map(|(stand, order)| {
            let before = match order.is_fresh() {
                true => stand.chosen()?,
                false => 0,
            };
            let none = Measured {
                looped: Vec::new(),
                over: Vec::new(),
                p99: 0.0,
                floor: 0.0,
            };
            Ok((none, before))
        })
        .collect();
    for round in 0..rounds {
        for ((stand, order), measured) in stands.iter_mut().zip(&mut *orders).zip(&mut all) {
            let Ok((so_far, _)) = measured else { continue };
            order.round = round;
            if let Err(error) = so_far.add(stand, subject, order) {
                *measured = Err(error);
            }
        }
    }
    let ends = all.into_iter().zip(stands).zip(orders);
    ends.map(|((measured, stand), order)| {
        let (measured, before) = measured?;
        let begun = u64::from(rounds * order.begun(!measured.looped.is_empty()));
        if order.is_fresh() {
            // A new flow may find no free port in a few tries; what was known is not counted at all.
            let chosen = stand.chosen()? - before;
            ensure!(
                chosen + begun / 10 >= begun,
                "of {begun} new flows {chosen} were new"
            );
        }
        Ok(measured)
    })
    .collect()
}

impl Measured {
    fn add(&mut self, stand: &mut Stand, subject: usize, order: &mut Order) -> Result<()> {
        order.program = None;
        let floor: Pounded = stand.pound.ask(&order)?;
        order.program = Some(stand.programs[subject]);
        let ours: Pounded = stand.pound.ask(&order)?;
        if let Some(why) = ours.wrong {
            bail!("not there yet ({why})");
        }
        self.over.push(ours.p50 - floor.p50);
        let looped = ours.looped.zip(floor.looped);
        self.looped.extend(looped.map(|(ours, floor)| ours - floor));
        self.p99 = ours.p99 - floor.p50;
        self.floor = floor.p50;
        Ok(())
    }
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
