//! The part that runs programs on frames: in the node's network namespace, where the kernel knows its devices.

use std::net::{Ipv4Addr, SocketAddrV4};

use anyhow::{Context, Result, ensure};
use serde::{Deserialize, Serialize};
use serde_json::json;

use super::frame::{Content, Frame};
use super::kernel::{Kind, Program};
use super::scenario::{Becomes, Flows, SCENARIOS, Scenario};
use crate::services::part;

/// Runs before anything counts.
const WARM: u32 = 2_000;
/// One run of so many is looked at whole.
const LOOK: u32 = 500;
/// How often a frame that is left as it is goes through in the kernel's own loop.
const LOOP: u32 = 100_000;

/// Which program, on what.
#[derive(Serialize, Deserialize)]
pub struct Order {
    /// Its number; none for an empty one.
    pub program: Option<u32>,
    /// What it is.
    pub kind: Kind,
    /// The device that frames come in at.
    pub device: u32,
    /// Hardware addresses: the device's own, the sender's.
    pub hardware: [[u8; 6]; 2],
    /// The one sender, if not any number of them.
    pub sender: Option<Ipv4Addr>,
    /// The Service.
    pub service: SocketAddrV4,
    /// What is no Service.
    pub nowhere: SocketAddrV4,
    /// The scenario's place in the list.
    pub scenario: usize,
    /// Runs that count.
    pub samples: u32,
}

/// What came of it.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Pounded {
    /// Nanoseconds of half of the runs at most.
    pub p50: f64,
    /// Nanoseconds of 99 of 100 runs at most.
    pub p99: f64,
    /// Nanoseconds of each run in the kernel's own loop, where that is honest: nothing is changed by the program.
    pub looped: Option<f64>,
    /// What the program returned most often.
    pub verdict: u32,
    /// Why the scenario does not count.
    pub wrong: Option<String>,
}

/// Obeys.
pub fn run() -> Result<()> {
    part::obey(|order: Order| Ok(json!(pound(&order)?)))
}

impl Order {
    /// A frame of flow number `flow` of the scenario.
    fn frame(&self, scenario: &Scenario, content: Content, flow: u32) -> Vec<u8> {
        let place = self.scenario as u32;
        let source = match self.sender {
            // One address has ports alone; scenarios next to each other have none in common.
            Some(sender) => (sender, (1_024 + (place * 7_919 + flow) % 64_000) as u16),
            // 198.18.0.0/15 is for benchmarks.
            None => (
                Ipv4Addr::from_bits(0xc612_0000 + (flow & 0x1_ffff)),
                (1_024 + place * 2_000 + (flow >> 17) % 2_000) as u16,
            ),
        };
        let target = if scenario.service {
            self.service
        } else {
            self.nowhere
        };
        Frame {
            hardware: self.hardware,
            source,
            destination: (*target.ip(), target.port()),
            content,
        }
        .bytes()
    }
}

/// Numbers without an order that can be guessed by a cache (xorshift).
struct Chance(u32);

impl Chance {
    fn below(&mut self, end: u32) -> u32 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 17;
        self.0 ^= self.0 << 5;
        self.0 % end
    }
}

fn pound(order: &Order) -> Result<Pounded> {
    let scenario = SCENARIOS
        .get(order.scenario)
        .context("there is no such scenario")?;
    let program = match order.program {
        Some(id) => Program::by_id(id, order.kind)?,
        None => Program::empty(order.kind)?,
    };
    let known = match scenario.flows {
        Flows::One => 1,
        Flows::Many(flows) | Flows::Half(flows) => flows,
        Flows::Fresh => 0,
    };
    if let Some(begins) = scenario.begins {
        for flow in 0..known {
            let frame = order.frame(scenario, begins, flow);
            program.run(&frame, order.device, 1, None)?;
        }
    }
    let mut chance = Chance(0x9e37_79b9);
    let mut fresh = known;
    let mut nanos = Vec::with_capacity(order.samples as usize);
    let mut verdicts = Vec::with_capacity(order.samples as usize);
    let mut wrong = Vec::new();
    let mut looked = 0;
    for sample in 0..WARM + order.samples {
        let mut new = || {
            fresh += 1;
            fresh - 1
        };
        let flow = match scenario.flows {
            Flows::One => 0,
            Flows::Many(flows) => chance.below(flows),
            Flows::Fresh => new(),
            Flows::Half(flows) => match chance.below(2) {
                0 => chance.below(flows),
                _ => new(),
            },
        };
        let frame = order.frame(scenario, scenario.content, flow);
        if sample % LOOK == LOOK / 2 {
            // Not counted: giving the frame back has a cost of its own.
            let mut out = vec![0; frame.len() + 256];
            let ran = program.run(&frame, order.device, 1, Some(&mut out))?;
            looked += 1;
            if let Some(why) = differs(scenario, &frame, &out, ran.verdict, order.kind) {
                wrong.push(why);
            }
            continue;
        }
        let ran = program.run(&frame, order.device, 1, None)?;
        if sample >= WARM {
            nanos.push(ran.nanos);
            verdicts.push(ran.verdict);
        }
    }
    ensure!(!nanos.is_empty(), "nothing was run");
    nanos.sort_unstable();
    verdicts.sort_unstable();
    let at = |part: f64| f64::from(nanos[((nanos.len() - 1) as f64 * part) as usize]);
    let looped = match scenario.becomes {
        Becomes::Same if wrong.is_empty() => {
            let frame = order.frame(scenario, scenario.content, 0);
            let ran = program.run(&frame, order.device, LOOP, None)?;
            Some(f64::from(ran.nanos))
        }
        _ => None,
    };
    Ok(Pounded {
        p50: at(0.5),
        p99: at(0.99),
        looped,
        verdict: most_common(&verdicts),
        // An empty program does nothing right.
        wrong: wrong
            .first()
            .filter(|_| order.program.is_some())
            .map(|why| format!("{} of {looked} looks: {why}", wrong.len())),
    })
}

/// The most common of sorted values.
fn most_common(sorted: &[u32]) -> u32 {
    sorted
        .chunk_by(|one, other| one == other)
        .max_by_key(|run| run.len())
        .and_then(|run| run.first())
        .copied()
        .unwrap_or_default()
}

/// What is wrong with a frame as it left.
fn differs(
    scenario: &Scenario,
    before: &[u8],
    after: &[u8],
    verdict: u32,
    kind: Kind,
) -> Option<String> {
    let dropped = match kind {
        Kind::Xdp => verdict <= 1,
        Kind::Classifier => verdict == 2,
    };
    match scenario.becomes {
        Becomes::Sent if dropped => Some(format!("dropped (verdict {verdict})")),
        Becomes::Sent => {
            let address = after.get(30..34)?;
            let port = after.get(36..38)?;
            let sent = address[..3] == [10, 244, 2]
                && (2..=11).contains(&address[3])
                && *port == crate::services::TARGET_PORT.to_be_bytes();
            (!sent).then(|| format!("not sent to a backend (verdict {verdict})"))
        }
        Becomes::Same if dropped => Some(format!("dropped (verdict {verdict})")),
        Becomes::SameOrDropped if dropped => None,
        _ => (before != after).then(|| format!("changed (verdict {verdict})")),
    }
}
