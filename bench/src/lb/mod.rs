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
pub mod frame;
pub mod kernel;
pub mod live;
pub mod pound;
mod rounds;
mod scenario;
mod setting;
mod stand;
mod told;
pub mod wrap;

use anyhow::Result;

use crate::row::{Aim, Case, Row, number};
use crate::{Effort, Outcome};
use kernel::Kind;
use rounds::in_rounds;
use scenario::{Flows, SCENARIOS};
use stand::Stand;
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
