//! The part that runs programs on frames: in the node's network namespace, where the kernel knows its devices.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use anyhow::{Context, Result, ensure};
use serde::{Deserialize, Serialize};
use serde_json::json;

use super::frame::{Content, Frame};
use super::kernel::{Kind, Program};
use super::scenario::{Becomes, Flows, SCENARIOS, Scenario};
use super::wrap::{self, Pick, Vary};
use crate::services::{MANY, TARGET_PORT, backend, backend6, part};

/// Runs before anything counts, if not half as many count.
const WARM: u32 = 2_000;
/// One run of so many is looked at whole.
const LOOK: u32 = 500;
/// One wrong frame in so many is chance: a new flow may find no free port in a few tries.
const SELDOM: usize = 10;
/// Loops in the kernel.
const LOOPS: usize = 10;
/// Runs in a loop. Before one of XDP the kernel waits, and caches are cold then: of fewer runs, those would be most.
const LOOP: u32 = 50_000;
/// The same of new flows, for which there must be ports.
const LOOP_FRESH: u32 = 3_000;

/// `TC_ACT_REDIRECT`.
const REDIRECT: u32 = 7;

/// What there is of one family.
#[derive(Clone, Copy, Serialize, Deserialize)]
pub struct Target {
    /// The one sender, if not any number of them.
    pub sender: Option<IpAddr>,
    /// The Service.
    pub service: SocketAddr,
    /// What is no Service.
    pub nowhere: SocketAddr,
}

/// A frame, and where the number of its flow goes.
pub type Template = (Vec<u8>, Option<Vary>);

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
    /// Of IPv4 and of IPv6.
    pub targets: [Target; 2],
    /// The scenario's place in the list.
    pub scenario: usize,
    /// Single runs that count.
    pub samples: u32,
    /// Which round it is: new flows are new ones.
    pub round: u32,
}

/// What came of it.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Pounded {
    /// Nanoseconds of half of the single runs at most.
    pub p50: f64,
    /// Nanoseconds of 99 of 100 single runs at most.
    pub p99: f64,
    /// Nanoseconds of a run in the kernel's own loop with what writes the frame anew, median of the loops.
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
    fn target(&self, scenario: &Scenario) -> &Target {
        &self.targets[usize::from(scenario.six)]
    }

    /// The frame of flow 0 as [`wrap`] takes it, and where the flow's number goes.
    fn template(&self, scenario: &Scenario, content: Content) -> Template {
        let spare = match content {
            Content::Tcp(_) => [6, 10],
            Content::Udp => [8, 10],
            _ => return (self.frame(scenario, content, 0), None),
        };
        let place = self.scenario as u32;
        let target = self.target(scenario);
        let port = match (target.sender, self.kind) {
            (Some(_), _) => 1_024 + place * 7_919 % 64_000,
            (None, Kind::Xdp) => 1_024 + place * 2_000,
            (None, Kind::Classifier) => 2_024 + place * 2_000,
        };
        let vary = Vary {
            six: scenario.six,
            address_bits: if target.sender.is_none() { 16 } else { 0 },
            receiver: false,
            port: port as u16,
            spare,
        };
        // Other senders than those of single runs.
        let sender = target.sender.unwrap_or(if scenario.six {
            Ipv6Addr::new(0x2001, 0xdb8, 1, 0, 0, 0, 0, 0).into()
        } else {
            Ipv4Addr::new(198, 51, 0, 0).into()
        });
        (self.from(scenario, content, (sender, 0)), Some(vary))
    }

    /// How many flows the scenario has, and what begins them and what goes on, as [`wrap`] takes it.
    pub fn frames(&self) -> Result<(u32, Template, Template)> {
        let scenario = SCENARIOS
            .get(self.scenario)
            .context("there is no such scenario")?;
        let flows = scenario.flows.known();
        let begins = scenario.begins.unwrap_or(scenario.content);
        Ok((
            flows,
            self.template(scenario, begins),
            self.template(scenario, scenario.content),
        ))
    }

    /// Whether it begins new flows that a Service takes.
    pub fn is_fresh(&self) -> bool {
        SCENARIOS.get(self.scenario).is_some_and(|scenario| {
            scenario.flows == Flows::Fresh && scenario.becomes == Becomes::Sent
        })
    }

    /// How many flows a round of new ones begins.
    pub fn begun(&self, looped: bool) -> u32 {
        let loops = (LOOPS as u32 + 1) * LOOP_FRESH;
        self.singles() + if looped { loops } else { 0 }
    }

    /// Single runs before anything counts.
    fn warm(&self) -> u32 {
        WARM.min(self.samples / 2)
    }

    fn singles(&self) -> u32 {
        self.warm() + self.samples
    }

    /// A frame of flow number `flow` of the scenario.
    fn frame(&self, scenario: &Scenario, content: Content, flow: u32) -> Vec<u8> {
        let place = self.scenario as u32;
        let source = match self.target(scenario).sender {
            // One address has ports alone; scenarios next to each other have none in common.
            Some(sender) => (sender, (1_024 + (place * 7_919 + flow) % 64_000) as u16),
            None => {
                let low = flow & 0x1_ffff;
                let address = if scenario.six {
                    let [high, low] = [(low >> 16) as u16, low as u16];
                    Ipv6Addr::new(0x2001, 0xdb8, 2, 0, 0, 0, high, low).into()
                } else {
                    // 198.18.0.0/15 is for benchmarks.
                    Ipv4Addr::from_bits(0xc612_0000 + low).into()
                };
                // A flow that one kind of program began is none of the other's new ones.
                let new = flow >= scenario.flows.known();
                let kind = match self.kind {
                    Kind::Classifier if new => 1_000,
                    _ => 0,
                };
                (
                    address,
                    (1_024 + place * 2_000 + kind + (flow >> 17) % 1_000) as u16,
                )
            }
        };
        self.from(scenario, content, source)
    }

    fn from(&self, scenario: &Scenario, content: Content, source: (IpAddr, u16)) -> Vec<u8> {
        let target = self.target(scenario);
        Frame {
            hardware: self.hardware,
            source: source.into(),
            destination: if scenario.service {
                target.service
            } else {
                target.nowhere
            },
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
    let known = scenario.flows.known();
    if let Some(begins) = scenario.begins {
        for flow in 0..known {
            let frame = order.frame(scenario, begins, flow);
            program.run(&frame, order.device, 1, None)?;
        }
    }
    let mut chance = Chance(0x9e37_79b9);
    // No round's new flows are those of one before.
    let mut fresh = known + order.round * order.singles();
    let mut nanos = Vec::with_capacity(order.samples as usize);
    let mut verdicts = Vec::with_capacity(order.samples as usize);
    let mut wrong = Vec::new();
    let mut looked: usize = 0;
    for sample in 0..order.singles() {
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
        if sample >= order.warm() {
            nanos.push(ran.nanos);
            verdicts.push(ran.verdict);
        }
    }
    ensure!(!nanos.is_empty(), "nothing was run");
    nanos.sort_unstable();
    verdicts.sort_unstable();
    let at = |part: f64| f64::from(nanos[((nanos.len() - 1) as f64 * part) as usize]);
    let looped = looped(order, scenario, &program, known, &mut wrong)?;
    looked += looped.map_or(0, |_| LOOPS + 1);
    Ok(Pounded {
        p50: at(0.5),
        p99: at(0.99),
        looped,
        verdict: most_common(&verdicts),
        // An empty program does nothing right.
        wrong: wrong
            .first()
            .filter(|_| order.program.is_some() && wrong.len() * SELDOM > looked)
            .map(|why| format!("{} of {looked} looks: {why}", wrong.len())),
    })
}

/// Runs in the kernel's own loop; none where there are too few ports for new flows.
fn looped(
    order: &Order,
    scenario: &Scenario,
    program: &Program,
    known: u32,
    wrong: &mut Vec<String>,
) -> Result<Option<f64>> {
    if order.target(scenario).sender.is_some()
        && matches!(scenario.flows, Flows::Fresh | Flows::Half(_))
    {
        return Ok(None);
    }
    if let Some(begins) = scenario.begins {
        let (frame, vary) = order.template(scenario, begins);
        let all = wrap::wrap(program, order.kind, &frame, Pick::Next(0), vary)?;
        all.program.run(&frame, order.device, known, None)?;
    }
    let first = u64::from(order.round + 1) << 20;
    let pick = match scenario.flows {
        Flows::One => Pick::First,
        Flows::Many(flows) => Pick::Below(flows),
        Flows::Fresh => Pick::Next(first),
        Flows::Half(flows) => Pick::Half(flows, first),
    };
    let runs = match scenario.flows {
        Flows::One | Flows::Many(_) => LOOP,
        Flows::Fresh | Flows::Half(_) => LOOP_FRESH,
    };
    let (frame, vary) = order.template(scenario, scenario.content);
    let wrapped = wrap::wrap(program, order.kind, &frame, pick, vary)?;
    let mut nanos = Vec::with_capacity(LOOPS);
    for round in 0..=LOOPS {
        let mut out = vec![0; frame.len() + 256];
        let ran = wrapped
            .program
            .run(&frame, order.device, runs, Some(&mut out))?;
        // The senders are others than the template's; all else must be the same.
        let mut before = frame.clone();
        if vary.is_some() && out.len() == frame.len() {
            for (place, byte) in before.iter_mut().enumerate() {
                if vary.is_some_and(|vary| vary.writes(place)) {
                    *byte = out[place];
                }
            }
        }
        if let Some(why) = differs(scenario, &before, &out, ran.verdict, order.kind) {
            wrong.push(format!("in a loop: {why}"));
        }
        // The first one warms up.
        if round > 0 {
            nanos.push(f64::from(ran.nanos));
        }
    }
    Ok(Some(crate::row::median(&nanos)))
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
            let (address, port) = if scenario.six {
                let bytes: [u8; 16] = after.get(38..54)?.try_into().ok()?;
                (IpAddr::from(bytes), after.get(56..58)?)
            } else {
                let bytes: [u8; 4] = after.get(30..34)?.try_into().ok()?;
                (IpAddr::from(bytes), after.get(36..38)?)
            };
            let mut backends = MANY;
            let sent = backends.any(|last| match address {
                IpAddr::V4(ip) => ip == backend(last),
                IpAddr::V6(ip) => ip == backend6(last),
            });
            let sent = sent && *port == TARGET_PORT.to_be_bytes();
            (!sent).then(|| format!("not sent to a backend (verdict {verdict})"))
        }
        Becomes::Same if dropped => Some(format!("dropped (verdict {verdict})")),
        Becomes::SameOrDropped if dropped => None,
        Becomes::Same if kind == Kind::Classifier && verdict == REDIRECT => {
            // A pod's packet that goes around the stack has met a router: it has other hardware addresses and one hop
            // less. What comes after these is the same.
            let from = if scenario.six { 22 } else { 26 };
            (before.get(from..) != after.get(from..))
                .then(|| format!("changed (verdict {verdict})"))
        }
        _ => (before != after).then(|| format!("changed (verdict {verdict})")),
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests may panic")]
    use super::*;
    use crate::lb::scenario;

    #[test]
    fn what_is_sent_on_as_it_is_may_have_other_hardware_addresses_and_one_hop_less() {
        for (name, ends, hops) in [
            ("pass-v4-no-vip", ["192.0.2.2:4000", "10.244.2.2:9"], 22),
            ("pass-v6-no-vip", ["[2001:db8::2]:4000", "[fd00::2]:9"], 21),
        ] {
            let scenario = &SCENARIOS[scenario::place(name).unwrap()];
            let [source, destination] = ends.map(|end| end.parse::<SocketAddr>().unwrap());
            let before = Frame {
                hardware: [[2; 6], [4; 6]],
                source,
                destination,
                content: scenario.content,
            }
            .bytes();
            let mut after = before.clone();
            after[..12].fill(6);
            after[hops] -= 1;
            let wrong = |after: &[u8], verdict| {
                differs(scenario, &before, after, verdict, Kind::Classifier).is_some()
            };
            assert!(!wrong(&after, REDIRECT) && !wrong(&before, 0));
            // Left to the stack it is untouched; sent on it still has both ends; dropped is neither.
            assert!(wrong(&after, 0) && wrong(&before, 2));
            let mut other = after;
            other[34] ^= 1;
            assert!(wrong(&other, REDIRECT), "{name}");
        }
    }
}
