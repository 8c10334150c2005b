//! `flows-cost`: rates of a pod whose flows are observed, beside those of a pod of a node that observes none.
//!
//! Each way of observing has a node of its own with an agent that reads, names, counts and keeps what the programs tell;
//! all nodes exist side by side, and a round measures each once. The pod asks a server on another node, by its address.

use std::net::SocketAddrV4;

use anyhow::{Context, Result};
use xebec_agent::loader::Aggregation;

use crate::row::{Aim, Case, Row};
use crate::services::wire::{Measured, Mode, Order};
use crate::services::{Part, TARGET_PORT, XebecStage, backend, watch};
use crate::{Effort, Outcome};

/// The benchmark.
pub const NAME: &str = "flows-cost";
const TEXT: &str = "A pod under no policies and a server on another node; the same agent that observes nothing (`--enable-hubble=false`) is the peer. Pod, server and agent share the machine's two CPUs, so that what the agent does with events is in these numbers, too.";
/// The least part of the rate without observation.
const AIM: Aim = Aim::Ratio(0.98);
/// Ways of observing, and their aims; that without comes first.
const WAYS: [(Aggregation, &str, Aim); 3] = [
    (Aggregation::Off, "nothing", Aim::None),
    (Aggregation::Medium, "default", AIM),
    (Aggregation::None, "every packet", Aim::None),
];
/// What is measured, in which unit.
const MODES: [(Mode, &str, &str, f64); 4] = [
    (Mode::Rr, "request/response", "1/s", 1.0),
    (Mode::Crr, "connect/request/response", "1/s", 1.0),
    (Mode::Udp, "datagram there and back", "1/s", 1.0),
    (Mode::Stream, "stream", "Gbit/s", 8e-9),
];

/// A node that observes in one way, and its pod.
struct Lane {
    // Dropped before their node.
    asker: Part,
    _other: Part,
    stage: XebecStage,
}

impl Lane {
    fn new(aggregation: Aggregation) -> Result<Self> {
        let mut stage = XebecStage::new(&format!("{NAME}-{aggregation:?}"), 0, 10)?;
        stage.aggregation = aggregation;
        stage.start_agent(false)?;
        let (mut asker, other) = stage.agent_pod()?;
        // It is let through, before anything counts.
        watch(&mut asker, server(), None, 60.0, || Ok(()))?;
        Ok(Self {
            asker,
            _other: other,
            stage,
        })
    }

    fn rate(&mut self, mode: Mode, seconds: f64) -> Result<f64> {
        let order = Order::Measure {
            mode,
            address: server(),
            seconds,
            askers: 1,
        };
        Ok(self.asker.ask::<Measured>(&order)?.rate)
    }
}

fn server() -> SocketAddrV4 {
    SocketAddrV4::new(backend(2), TARGET_PORT)
}

/// Measures all ways in turns.
pub fn run(effort: Effort) -> Result<Outcome> {
    let (rounds, seconds) = effort.of((15, 1.0), (2, 0.3));
    let mut lanes = WAYS
        .iter()
        .map(|(way, words, _)| {
            Lane::new(*way).with_context(|| format!("no node that observes {words}"))
        })
        .collect::<Result<Vec<_>>>()?;
    let mut rows = Vec::new();
    for (mode, what, unit, scale) in MODES {
        let mut all = vec![Vec::new(); WAYS.len()];
        // The first round warms up.
        for round in 0..=rounds {
            let mut line = String::new();
            // Each comes first in one of three rounds.
            for turn in 0..lanes.len() {
                let at = (round + turn) % lanes.len();
                let rate = lanes[at].rate(mode, seconds)? * scale;
                line += &format!(" {} {rate:.3} {unit};", WAYS[at].1);
                if round > 0 {
                    all[at].push(rate);
                }
            }
            eprintln!("bench: {NAME}: {what}, {round}/{rounds}:{line}");
        }
        for ((_, words, aim), rates) in WAYS.iter().zip(&all).skip(1) {
            let pairs: Vec<(f64, f64)> =
                rates.iter().copied().zip(all[0].iter().copied()).collect();
            let case = Case {
                bench: NAME,
                case: &format!("{what}, {words} observed"),
                unit,
                aim: *aim,
            };
            rows.push(Row::paired(case, "not observed", &pairs)?);
        }
    }
    for Lane {
        asker,
        _other: other,
        mut stage,
    } in lanes
    {
        drop((asker, other));
        stage.stop_agent()?;
    }
    Outcome::apart(NAME, TEXT, rows)
}
