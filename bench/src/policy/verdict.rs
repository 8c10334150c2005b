//! `policy-verdict`: what rules cost a packet, in nanoseconds, with up to 524,288 of them in the kernel.
//!
//! The cost of a packet that is judged is the time of one that begins a connection to a pod under rules, less that of
//! the same packet to a pod of the same node under none; both are told, over an empty program. Rules are peers times
//! ports, each an entry of its own. `random` takes another peer and another port each time, so that the kernel looks into
//! parts of its tables that no cache has; `hot` asks one entry again and again. Sizes take turns, and in each round
//! the three programs run one after the other.

use std::path::Path;

use anyhow::{Context, Result, ensure};
use serde_json::Value;

use super::judge::{Order, Packets};
use crate::row::{Aim, Case, Row, median, number};
use crate::services::stage::Folder;
use crate::services::{Network, Part};
use crate::{Effort, Outcome};

const NAME: &str = "policy-verdict";
/// What the numbers are to be compared with.
const TEXT: &str = "Nanoseconds of `xebec_to_pod` in the kernel's own loop, over an empty program. Cilium's look-up in a trie, the same on a machine of this kind in an earlier run, not in this one: random 391 ns with 16 k entries, 786 ns with 64 k, 1,534 ns with 512 k; one entry again and again 124 to 142 ns. Xebec finds out who a packet's peer is as well: this is in its numbers, and not in those.";
/// What knows flows pays nothing for rules: packets per second beside those of a pod without.
const FREE: Aim = Aim::Ratio(0.98);
/// One entry again and again, at every size.
const HOT: Aim = Aim::AtMost(75.0);

/// Peers and ports, and what another entry each time shall cost at most.
const SIZES: [(u32, u32, Aim); 5] = [
    (4, 4, Aim::None),
    (64, 16, Aim::None),
    (1_024, 16, Aim::AtMost(180.0)),
    (4_096, 16, Aim::AtMost(371.0)),
    (16_384, 32, Aim::AtMost(513.0)),
];

/// What is run: whether connections are known, and whether entries are other ones each time.
const KINDS: [(bool, bool, &str); 4] = [
    (false, true, "first packet, random"),
    (false, false, "first packet, hot"),
    (true, true, "established, random"),
    (true, false, "established, hot"),
];

/// One round of one kind: nanoseconds over an empty program, without rules and with them.
type Round = (f64, f64);

struct Size {
    rules: u32,
    random: Aim,
    judge: Part,
    // Dropped after the part that uses it.
    _dir: Folder,
    rounds: [Vec<Round>; 4],
}

/// Measures at all sizes.
pub fn run(effort: Effort) -> Result<Outcome> {
    let (rounds, loops, runs) = effort.of((7, 10, 50_000), (2, 3, 20_000));
    let mut text = TEXT.to_owned();
    let mut sizes = Vec::new();
    for (peers, ports, random) in SIZES {
        let rules = peers * ports;
        match Size::new(peers, ports, random) {
            Ok(size) => sizes.push(size),
            Err(error) => {
                let note = format!("{} rules: {error:#}", number(f64::from(rules)));
                eprintln!("bench: {NAME}: {note}");
                text += &format!("\n- not measured: {note}");
            }
        }
    }
    ensure!(!sizes.is_empty(), "no size could be measured");
    for round in 0..rounds {
        for size in &mut sizes {
            size.measure(round, loops, runs)
                .with_context(|| format!("round {}, {} rules", round + 1, size.rules))?;
        }
    }
    let mut rows = Vec::new();
    for size in &sizes {
        rows.extend(size.rows()?);
    }
    Outcome::apart(NAME, &text, rows)
}

impl Size {
    fn new(peers: u32, ports: u32, random: Aim) -> Result<Self> {
        let rules = peers * ports;
        let dir = Folder::new(&format!("{NAME}-{rules}"))?;
        let mut judge = start(dir.path(), peers, ports)?;
        let there: Value = judge.hear()?;
        ensure!(there["rules"] == rules, "there are other rules: {there}");
        eprintln!(
            "bench: {NAME}: {peers} peers x {ports} ports in the kernel after {:.1} s",
            there["seconds"].as_f64().unwrap_or_default()
        );
        Ok(Self {
            rules,
            random,
            judge,
            _dir: dir,
            rounds: Default::default(),
        })
    }

    /// Each comes first in every other round.
    fn measure(&mut self, round: u32, loops: u32, runs: u32) -> Result<()> {
        for ((established, random, words), rounds) in KINDS.iter().zip(&mut self.rounds) {
            let mut ask = |packets| {
                let order = Order {
                    packets,
                    established: *established,
                    random: *random,
                    loops,
                    runs,
                };
                self.judge.ask::<f64>(&order)
            };
            let floor = ask(Packets::None)?;
            let (free, judged) = if round.is_multiple_of(2) {
                let free = ask(Packets::Free)?;
                (free, ask(Packets::Judged)?)
            } else {
                let judged = ask(Packets::Judged)?;
                (ask(Packets::Free)?, judged)
            };
            eprintln!(
                "bench: {NAME}: {} rules, {words}: {:.0} ns, without rules {:.0} ns, over {floor:.0} ns",
                self.rules,
                judged - floor,
                free - floor
            );
            rounds.push((free - floor, judged - floor));
        }
        Ok(())
    }

    fn rows(&self) -> Result<Vec<Row>> {
        let mut rows = Vec::new();
        for ((established, random, words), rounds) in KINDS.iter().zip(&self.rounds) {
            let words = format!("{words}, {} rules", number(f64::from(self.rules)));
            if *established {
                rows.push(rates(&words, rounds)?);
            } else {
                rows.push(added(
                    &words,
                    if *random { self.random } else { HOT },
                    rounds,
                )?);
            }
            let both: Vec<(f64, f64)> = rounds
                .iter()
                .map(|(free, judged)| (*judged, *free))
                .collect();
            let case = Case {
                bench: NAME,
                case: &format!("{words}, the whole packet"),
                unit: "ns",
                aim: Aim::None,
            };
            rows.push(Row::paired(case, "no policy", &both)?);
        }
        Ok(rows)
    }
}

/// What rules add.
fn added(words: &str, aim: Aim, rounds: &[Round]) -> Result<Row> {
    let costs: Vec<f64> = rounds.iter().map(|(free, judged)| judged - free).collect();
    eprintln!("bench: {NAME}: {words}: {:.0} ns more", median(&costs));
    let case = Case {
        bench: NAME,
        case: &format!("{words}, added by rules"),
        unit: "ns",
        aim,
    };
    Row::alone(case, &costs)
}

/// Packets per second of one core, beside those without rules.
fn rates(words: &str, rounds: &[Round]) -> Result<Row> {
    let rounds: Vec<(f64, f64)> = rounds
        .iter()
        .map(|(free, judged)| (1e9 / judged, 1e9 / free))
        .collect();
    let case = Case {
        bench: NAME,
        case: words,
        unit: "packets/s",
        aim: FREE,
    };
    Row::paired(case, "no policy", &rounds)
}

fn start(dir: &Path, peers: u32, ports: u32) -> Result<Part> {
    let dir = dir.display().to_string();
    let (peers, ports) = (peers.to_string(), ports.to_string());
    let words = [
        "--cpu", "0", "judge", "--dir", &dir, "--peers", &peers, "--ports", &ports,
    ];
    // Its BPF filesystem ends with it.
    Part::start(Network::Own, true, &words)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests may panic")]
    use super::*;

    #[test]
    fn what_rules_add_is_the_difference_within_a_round() {
        // The machine was half as fast in the second round.
        let rounds = [(100.0, 150.0), (200.0, 300.0), (100.0, 152.0)];
        let row = added("w", Aim::AtMost(60.0), &rounds).unwrap();
        assert_eq!((row.ours, row.met), (52.0, Some(true)));
        let row = rates("w", &[(100.0, 100.0), (50.0, 51.0), (100.0, 99.0)]).unwrap();
        assert_eq!((row.ratio, row.met), (Some(1.0), Some(true)));
        let row = rates("w", &[(97.0, 100.0)]).unwrap();
        assert_eq!(row.met, Some(false));
    }

    #[test]
    fn sizes_are_those_that_were_promised() {
        let rules: Vec<u32> = SIZES
            .iter()
            .map(|(peers, ports, _)| peers * ports)
            .collect();
        assert_eq!(rules, [16, 1_024, 16_384, 65_536, 524_288]);
    }
}
