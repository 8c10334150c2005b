//! `policy-peers`: the rates of a pod under policies and the time of a policy's change, beside the rules of iptables with
//! ipset and those of nftables that other engines would write for the same policies (see [`ipset`] and [`nft`]).
//!
//! Every variant has a stage of its own, with a hundred pods of the node in its rules; all stages of one size exist side
//! by side, and a round measures each once. The policy that lets the pod through stands amid all others of it. The change
//! is one of that policy: of the peers, the time from the start of the program that loads the changed chain to the answer
//! to the first datagram that it lets through, without what an engine does before; of Xebec, the same from before the
//! write to the API.

use std::collections::BTreeMap;
use std::net::SocketAddrV4;

use anyhow::{Context, Result, ensure};
use serde_json::Value;

use super::rig::Rig;
use super::{ipset, list, nft, traffic};
use crate::row::{Aim, Case, Row, median, number};
use crate::services::stage::Stage;
use crate::services::wire::{Measured, Mode, Order, Seen};
use crate::services::{Part, TARGET_PORT, backend, control, part};
use crate::tail::millis;
use crate::{Effort, Outcome};

const NAME: &str = "policy-peers";
/// What stands before the table.
const TEXT: &str = "The same policies as rules of iptables with sets of ipset, laid out as Calico's Felix lays them out, and as sets, maps and chains of nftables; IPv4. A hundred pods of the node and a thousand others, of 50 apps; the policies are dealt out to the apps. A change of the peers is the program that loads the changed chain, without the engine that writes it; of Xebec it begins before the write to the API.";
/// Pods of the node in all rules.
const PODS: usize = 100;
/// The least part of a peer's rate, and of that of no rules.
const BESIDE_PEER: Aim = Aim::Ratio(1.0);
const BESIDE_BARE: Aim = Aim::Ratio(0.95);
/// Longer than this nothing takes that is open.
const PATIENCE: f64 = 30.0;
/// What answers nothing for so many seconds is closed.
const CLOSED: f64 = 0.02;

/// What is measured.
const MODES: [(Mode, &str); 2] = [
    (Mode::Crr, "connect/request/response"),
    (Mode::Rr, "request/response"),
];

/// What the node does.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
enum Way {
    /// Routes.
    Bare,
    /// iptables as it was first, with ipset.
    Legacy,
    /// iptables by nftables, with ipset.
    Compatible,
    /// nftables.
    Nftables,
    /// Xebec.
    Xebec,
}

impl Way {
    const ALL: [Self; 5] = [
        Self::Bare,
        Self::Legacy,
        Self::Compatible,
        Self::Nftables,
        Self::Xebec,
    ];

    fn name(self) -> &'static str {
        match self {
            Self::Bare => "no rules",
            Self::Legacy => "iptables-legacy and ipset",
            Self::Compatible => "iptables-nft and ipset",
            Self::Nftables => "nftables",
            Self::Xebec => "Xebec",
        }
    }

    /// The program that loads rules, and its arguments for all of them and for a change.
    fn loader(
        self,
    ) -> Option<(
        &'static str,
        &'static [&'static str],
        &'static [&'static str],
    )> {
        match self {
            Self::Legacy => Some(("iptables-legacy-restore", &[], &["--noflush"])),
            Self::Compatible => Some(("iptables-nft-restore", &[], &["--noflush"])),
            Self::Nftables => Some(("nft", &["-f", "-"], &["-f", "-"])),
            Self::Bare | Self::Xebec => None,
        }
    }

    /// What is loaded when the policy that changes has changed.
    fn change(self, open: bool) -> String {
        match self {
            Self::Nftables => nft::change(open),
            _ => ipset::change(open),
        }
    }
}

/// A node.
enum Node {
    Plain(Box<Stage>),
    Xebec(Box<Rig>),
}

/// A pod that asks, and the node that it is on.
struct Lane {
    way: Way,
    // Dropped before its node.
    asker: Part,
    node: Node,
}

/// What one size gave, by way.
#[derive(Default)]
struct Measurements {
    rates: BTreeMap<(usize, Way), Vec<f64>>,
    changes: BTreeMap<Way, Vec<f64>>,
    notes: Vec<String>,
}

/// Measures at every size.
pub fn run(effort: Effort) -> Result<Outcome> {
    let sizes: &[usize] = effort.of(&[10, 250, 2_500], &[10, 250]);
    let mut rows = Vec::new();
    let mut text = TEXT.to_owned();
    for &policies in sizes {
        let mut all = Measurements::default();
        let mut lanes = Vec::new();
        for way in Way::ALL {
            match Lane::new(way, policies) {
                Ok(lane) => lanes.push(lane),
                Err(error) => all.note(policies, way, &error),
            }
        }
        measure(&mut lanes, policies, effort, &mut all);
        for lane in lanes {
            lane.end()?;
        }
        rows.extend(all.rows(policies)?);
        for note in all.notes {
            text += &format!("\n- not measured: {note}");
        }
    }
    ensure!(!rows.is_empty(), "nothing could be measured");
    Outcome::apart(NAME, &text, rows)
}

/// Each way once a round; one that fails is left out from then on, and named.
fn measure(lanes: &mut Vec<Lane>, policies: usize, effort: Effort, all: &mut Measurements) {
    let (rounds, seconds, changes) = effort.of((11, 0.5, 10), (3, 0.3, 3));
    // The first round warms up.
    for round in 0..=rounds {
        let mut line = String::new();
        lanes.retain_mut(|lane| {
            let way = lane.way;
            match lane.round(seconds, changes) {
                Ok((rates, change)) => {
                    line += &format!(" {way:?} {:.0}/s, {:.0}/s", rates[0], rates[1]);
                    if let Some(change) = change {
                        line += &format!(", changed in {change:.1} ms");
                    }
                    line += ";";
                    if round > 0 {
                        for (mode, rate) in rates.into_iter().enumerate() {
                            all.rates.entry((mode, way)).or_default().push(rate);
                        }
                        all.changes.entry(way).or_default().extend(change);
                    }
                    true
                }
                Err(error) => {
                    all.forget(way);
                    all.note(policies, way, &error);
                    false
                }
            }
        });
        eprintln!("bench: {NAME}: {policies} policies, {round}/{rounds}:{line}");
    }
}

impl Lane {
    /// One whose rules are loaded, and whose pod reaches the server over TCP and, so far, not over UDP.
    fn new(way: Way, policies: usize) -> Result<Self> {
        let begun = std::time::Instant::now();
        let mut lane = if way == Way::Xebec {
            let mut all = ipset::with_moving(policies, false);
            let first = all.split_off(all.len() / 2);
            let mut rig = Rig::new(NAME, PODS - 1, &first)?;
            rig.add(&all)?;
            Self {
                way,
                asker: traffic::judged_pod(&rig.stage)?,
                node: Node::Xebec(Box::new(rig)),
            }
        } else {
            let stage = Stage::new()?;
            let asker = stage.plain_pod()?;
            load(&stage, way, policies)?;
            Self {
                way,
                asker,
                node: Node::Plain(Box::new(stage)),
            }
        };
        eprintln!(
            "bench: {NAME}: {policies} policies, {}: there after {:.1} s",
            way.name(),
            begun.elapsed().as_secs_f64()
        );
        if way != Way::Bare {
            lane.prove_closed()?;
        }
        Ok(lane)
    }

    fn prove_closed(&mut self) -> Result<()> {
        ensure!(
            self.reach(CLOSED, |_| Ok(())).is_err(),
            "what no policy lets through was let through"
        );
        Ok(())
    }

    /// Has the pod ask, then does something; when it was asked for, and what the pod saw.
    fn reach(
        &mut self,
        seconds: f64,
        then: impl FnOnce(&mut Node) -> Result<()>,
    ) -> Result<(u64, Seen)> {
        let address = server();
        self.asker.tell(&Order::Reach { address, seconds })?;
        self.asker.hear::<Value>()?;
        let asked = part::now()?;
        let done = then(&mut self.node);
        // What it saw is heard in any case, or it would be taken for the next answer.
        let seen = self.asker.hear();
        done?;
        Ok((asked, seen?))
    }

    /// Rates by mode, and milliseconds of a change, median of some.
    fn round(&mut self, seconds: f64, changes: usize) -> Result<([f64; 2], Option<f64>)> {
        let mut rates = [0.0; 2];
        for (rate, (mode, _)) in rates.iter_mut().zip(MODES) {
            let order = Order::Measure {
                mode,
                address: server(),
                seconds,
                askers: 1,
            };
            *rate = self.asker.ask::<Measured>(&order)?.rate;
        }
        if self.way == Way::Bare {
            return Ok((rates, None));
        }
        let way = self.way;
        let mut took = Vec::new();
        for _ in 0..changes {
            let (asked, seen) = self.reach(PATIENCE, |node| node.change(way, true))?;
            took.push(millis(asked, seen.answered));
            self.node.change(way, false)?;
            if way == Way::Xebec {
                // It is in force a moment after the write.
                xebec_tests::eventually(
                    "the end of what was open",
                    std::time::Duration::from_secs(10),
                    || Ok(self.prove_closed().is_ok()),
                )?;
            } else {
                self.prove_closed()?;
            }
        }
        Ok((rates, Some(median(&took))))
    }

    fn end(self) -> Result<()> {
        drop(self.asker);
        match self.node {
            Node::Plain(_) => Ok(()),
            Node::Xebec(rig) => rig.end(),
        }
    }
}

impl Node {
    fn change(&mut self, way: Way, open: bool) -> Result<()> {
        match self {
            Self::Plain(stage) => {
                let (program, _, words) = way.loader().context("there are no rules")?;
                stage.feed(program, words, way.change(open).as_bytes())
            }
            Self::Xebec(rig) => {
                let object = list::moving(open).object();
                let order = control::Order::Policy { object };
                rig.stage.control.ask::<control::Written>(&order).map(drop)
            }
        }
    }
}

fn server() -> SocketAddrV4 {
    SocketAddrV4::new(backend(2), TARGET_PORT)
}

/// Loads a peer's rules.
fn load(stage: &Stage, way: Way, policies: usize) -> Result<()> {
    let Some((program, words, _)) = way.loader() else {
        return Ok(());
    };
    let (policies, devices) = (ipset::with_moving(policies, false), ipset::devices(PODS));
    let text = if way == Way::Nftables {
        nft::rules(&policies, &devices)
    } else {
        stage
            .feed("ipset", &["restore"], ipset::sets(&policies).as_bytes())
            .context("could not make sets (package ipset)")?;
        ipset::rules(&policies, &devices)
    };
    stage
        .feed(program, words, text.as_bytes())
        .context("could not load rules")
}

impl Measurements {
    fn note(&mut self, policies: usize, way: Way, error: &anyhow::Error) {
        let note = format!("{}, {policies} policies: {error:#}", way.name());
        eprintln!("bench: {NAME}: {note}");
        self.notes.push(note);
    }

    fn forget(&mut self, way: Way) {
        self.rates.retain(|(_, of), _| *of != way);
        self.changes.remove(&way);
    }

    /// Xebec beside each of the others.
    fn rows(&self, policies: usize) -> Result<Vec<Row>> {
        let size = format!("{} policies", number(policies as f64));
        let mut rows = Vec::new();
        for way in Way::ALL.into_iter().filter(|way| *way != Way::Xebec) {
            let aim = if way == Way::Bare {
                BESIDE_BARE
            } else {
                BESIDE_PEER
            };
            for (mode, (_, words)) in MODES.iter().enumerate() {
                let ours = self.rates.get(&(mode, Way::Xebec));
                let words = format!("{words}, {size}");
                rows.extend(beside(
                    &words,
                    "1/s",
                    aim,
                    way,
                    ours,
                    self.rates.get(&(mode, way)),
                )?);
            }
            let words = format!("a policy's change, {size}");
            let (ours, peer) = (self.changes.get(&Way::Xebec), self.changes.get(&way));
            rows.extend(beside(&words, "ms", Aim::None, way, ours, peer)?);
        }
        Ok(rows)
    }
}

/// A row where both were measured.
fn beside(
    words: &str,
    unit: &'static str,
    aim: Aim,
    way: Way,
    ours: Option<&Vec<f64>>,
    peer: Option<&Vec<f64>>,
) -> Result<Option<Row>> {
    let (Some(ours), Some(peer)) = (ours, peer) else {
        return Ok(None);
    };
    let rounds: Vec<(f64, f64)> = ours.iter().copied().zip(peer.iter().copied()).collect();
    if rounds.is_empty() {
        return Ok(None);
    }
    let case = Case {
        bench: NAME,
        case: words,
        unit,
        aim,
    };
    Row::paired(case, way.name(), &rounds).map(Some)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests may panic")]
    use super::*;

    #[test]
    fn a_way_that_failed_has_no_rows() {
        let mut all = Measurements::default();
        for way in [Way::Bare, Way::Legacy, Way::Nftables, Way::Xebec] {
            for mode in 0..MODES.len() {
                all.rates.insert((mode, way), vec![100.0, 110.0, 120.0]);
            }
            let changes = if way == Way::Bare {
                vec![]
            } else {
                vec![2.0, 3.0, 4.0]
            };
            all.changes.insert(way, changes);
        }
        // Nobody changes what has no rules.
        assert_eq!(all.rows(10).unwrap().len(), 2 + 3 + 3);
        all.forget(Way::Legacy);
        let rows = all.rows(10).unwrap();
        assert_eq!(rows.len(), 2 + 3);
        assert!(
            rows.iter()
                .all(|row| row.peer_name.as_deref() != Some(Way::Legacy.name()))
        );
        all.forget(Way::Xebec);
        assert!(all.rows(10).unwrap().is_empty());
    }
}
