//! Traffic of a pod under rules beside that of a pod under none: both of the same node, to the same server on another one.

use std::net::SocketAddrV4;

use anyhow::Result;

use super::list::{self, ASKER, Policy};
use super::memory::NAME;
use crate::Effort;
use crate::row::{Aim, Case, Row};
use crate::services::stage::more_ports;
use crate::services::wire::{Measured, Mode, Order};
use crate::services::{Network, Part, TARGET_PORT, XebecStage, backend, control, watch};

/// The least part of the rate without rules.
const AIM: Aim = Aim::Ratio(0.98);
/// How many policies there are; the pod has a fiftieth of them, and one that lets it speak with the server.
const POLICIES: usize = 2_500;
/// What is measured, in which unit. A connection for each transaction pays for the first packet's verdict.
const MODES: [(Mode, &str, &str, f64, Aim); 3] = [
    (Mode::Stream, "stream", "Gbit/s", 8e-9, AIM),
    (Mode::Rr, "request/response", "1/s", 1.0, AIM),
    (Mode::Crr, "connect/request/response", "1/s", 1.0, Aim::None),
];

/// Measures both pods in turns.
pub fn run(effort: Effort) -> Result<Vec<Row>> {
    let (rounds, seconds) = effort.of((11, 1.0), (3, 0.3));
    let mut stage = XebecStage::new("policy-traffic", 0, 10)?;
    let mut objects = list::cluster(0);
    let policies = list::policies(0..POLICIES).into_iter();
    let policies = policies.chain([list::moving(true)]);
    objects.extend(policies.map(|policy: Policy| policy.object()));
    stage
        .control
        .ask::<usize>(&control::Order::Make { objects })?;
    stage.start_agent(false)?;
    let (mut free, _without) = stage.agent_pod()?;
    let mut judged = judged_pod(&stage)?;
    let server = SocketAddrV4::new(backend(2), TARGET_PORT);
    for part in [&mut free, &mut judged] {
        // It is let through, before anything counts.
        watch(part, server, None, 60.0, || Ok(()))?;
    }
    let mut rows = Vec::new();
    for (mode, words, unit, scale, aim) in MODES {
        let ask = |part: &mut Part| -> Result<f64> {
            let order = Order::Measure {
                mode,
                address: server,
                seconds,
                askers: 1,
            };
            Ok(part.ask::<Measured>(&order)?.rate * scale)
        };
        let mut measured = Vec::new();
        // The first round warms up.
        for round in 0..=rounds {
            // Each comes first in every other round.
            let (ours, peer) = if round % 2 == 0 {
                let ours = ask(&mut judged)?;
                (ours, ask(&mut free)?)
            } else {
                let peer = ask(&mut free)?;
                (ask(&mut judged)?, peer)
            };
            eprintln!(
                "bench: {NAME}: {words}, {round}/{rounds}: {ours:.6} {unit}, without rules {peer:.6} {unit}, ratio {:.3}",
                ours / peer
            );
            if round > 0 {
                measured.push((ours, peer));
            }
        }
        let case = Case {
            bench: NAME,
            case: &format!("{words} under rules"),
            unit,
            aim,
        };
        rows.push(Row::paired(case, "no policy", &measured)?);
    }
    drop((free, judged));
    stage.stop_agent()?;
    Ok(rows)
}

/// The pod that asks, under policies, on a node whose agent runs.
pub fn judged_pod(stage: &XebecStage) -> Result<Part> {
    let pod = stage.client_in_pods(Network::Own)?;
    pod.run("ip", "link set lo up")?;
    stage.connect(&pod.netns(), (list::NAMESPACE, ASKER))?;
    more_ports(&pod)?;
    Ok(pod)
}
