//! `xdp-live`: packets per second with live frames, which the XDP program sends on to another device.
//!
//! The kernel makes frames of pages that it uses again (`BPF_F_TEST_XDP_LIVE_FRAMES`), and what is sent on really leaves
//! by the other device; behind it a program drops it at once. Beside the agent's own program, attached as it always is,
//! runs one that only redirects. Both get the frame written anew each time, as in `xdp-lb`. What was sent is compared
//! with what the device behind has received.

use anyhow::{Context, Result, ensure};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::SUBJECTS;
use super::kernel::{Kind, Program};
use super::pound::Target;
use super::setting::{self, Setting};
use super::stand::programs;
use super::wrap::{self, Pick};
use crate::Effort;
use crate::row::{Aim, Case, Row};
use crate::services::{Network, Part, XebecStage, first_service, part, watch};

/// The place of `tcp-v4-lru-hit` or `tcp-v4-lru-diverse` among the scenarios, by how many flows there are.
const SCENARIOS: [(&str, &str); 2] = [
    ("one flow", "tcp-v4-lru-hit"),
    ("4,096 flows", "tcp-v4-lru-diverse"),
];

/// What is sent, and how much.
#[derive(Serialize, Deserialize)]
pub struct Order {
    /// The agent's program; none for one that only redirects.
    program: Option<u32>,
    /// The device that frames come in at, and the one that they leave by.
    devices: [u32; 2],
    hardware: [[u8; 6]; 2],
    target: Target,
    scenario: usize,
    frames: u32,
}

/// Measures.
pub fn run(effort: Effort) -> Result<Vec<Row>> {
    let (rounds, frames) = effort.of((9, 2_000_000), (2, 100_000));
    let before = programs()?;
    let mut stage = XebecStage::new("xdp-live", 1, 10)?;
    stage.start_agent(true)?;
    let (mut client, _without) = stage.agent_pod()?;
    watch(&mut client, first_service(1)?, None, 300.0, || Ok(()))?;
    let express = &SUBJECTS[0];
    let id = express.newest(&before)?;
    let setting = Setting::of(express, &stage, &client)?;
    let out = stage.stage.node.run("ip", "-json link show dev b0")?;
    let out: Value = serde_json::from_str(&out).context("ip printed no JSON")?;
    let mut sink = Part::start(Network::Of(&stage.stage.server), false, &["sink", "eth0"])?;
    sink.hear::<Value>()?;
    let mut live = Part::start(
        Network::Of(&stage.stage.node),
        false,
        &["--cpu", "0", "live"],
    )?;
    let mut rows = Vec::new();
    for (words, scenario) in SCENARIOS {
        let mut order = Order {
            program: None,
            devices: [setting.device, setting::index(&out[0])?],
            hardware: setting.hardware,
            target: setting.targets[0],
            scenario: super::scenario::place(scenario).context("there is no such scenario")?,
            frames,
        };
        let mut measured = Vec::new();
        for _ in 0..rounds {
            let mut of = |program| -> Result<f64> {
                order.program = program;
                let received = received(&stage)?;
                let rate: f64 = live.ask(&order)?;
                let arrived = self::received(&stage)? - received;
                // The API's and the neighbours' frames come on top.
                ensure!(
                    arrived + f64::from(frames) / 100.0 >= f64::from(frames),
                    "of {frames} frames {arrived} arrived"
                );
                Ok(rate)
            };
            let (ours, bare) = (of(Some(id))?, of(None)?);
            eprintln!("bench: xdp-live: {words}: {ours:.0}/s, redirect alone {bare:.0}/s");
            measured.push((ours, bare));
        }
        let case = Case {
            bench: "xdp-live",
            case: &format!("frames through XDP to another device, {words}"),
            unit: "1/s",
            aim: Aim::None,
        };
        rows.push(Row::paired(
            case,
            "a program that only redirects",
            &measured,
        )?);
    }
    drop(client);
    stage.stop_agent()?;
    Ok(rows)
}

/// How many frames the backends' device has received.
fn received(stage: &XebecStage) -> Result<f64> {
    let text = stage
        .stage
        .server
        .run("ip", "-json -statistics link show dev eth0")?;
    let links: Value = serde_json::from_str(&text).context("ip printed no JSON")?;
    links[0]["stats64"]["rx"]["packets"]
        .as_f64()
        .context("ip printed no number of packets")
}

/// The part that sends.
pub fn send() -> Result<()> {
    part::obey(|order: Order| {
        let program = match order.program {
            Some(id) => Program::by_id(id, Kind::Xdp)?,
            None => Program::redirect(order.devices[1])?,
        };
        let pound = super::pound::Order {
            program: order.program,
            kind: Kind::Xdp,
            device: order.devices[0],
            hardware: order.hardware,
            targets: [order.target; 2],
            scenario: order.scenario,
            samples: 0,
            round: 0,
        };
        let (flows, begins, goes_on) = pound.frames()?;
        let pick = |all: Pick| match flows {
            1 => Pick::First,
            _ => all,
        };
        // Flows are begun one by one, as they would come.
        let (frame, vary) = begins;
        let begin = wrap::wrap(&program, Kind::Xdp, &frame, pick(Pick::Next(0)), vary)?;
        begin.program.run(&frame, order.devices[0], flows, None)?;
        let (frame, vary) = goes_on;
        let wrapped = wrap::wrap(&program, Kind::Xdp, &frame, pick(Pick::Below(flows)), vary)?;
        let nanos = wrapped
            .program
            .run_live(&frame, order.devices[0], order.frames)?;
        Ok(json!(f64::from(order.frames) / nanos * 1e9))
    })
}

/// The part that drops what comes in at a device of its namespace.
pub fn sink(device: &str) -> Result<()> {
    let index = nix::net::if_::if_nametoindex(device)
        .with_context(|| format!("there is no device {device}"))?;
    let _link = Program::drop()?.attach(index)?;
    part::say(&json!({"dropping": true}))?;
    let mut line = String::new();
    std::io::stdin().read_line(&mut line)?;
    Ok(())
}
