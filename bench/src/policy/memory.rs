//! `policy-memory`: the kernel's memory for the rules of 1,000 pods, and what rules cost traffic.
//!
//! Memory is what the kernel says of each map that pods are judged by (`memlock` of its descriptor): addresses and
//! identities of all pods, sets, entries. The agent's programs, maps and compiler fill them, without an API in between.

use anyhow::{Context, Result};

use super::fill::{Filled, Taken};
use super::traffic;
use crate::row::{Aim, Case, Row};
use crate::services::stage::Folder;
use crate::services::{Network, Part};
use crate::{Effort, Outcome};

/// The benchmark.
pub const NAME: &str = "policy-memory";
/// What the numbers are to be compared with.
const TEXT: &str = "Memory beside Cilium, whose maps of policy are one for each pod: about 50 MB for 1,000 pods with 500 rules each by its own account (CFP-45118), in which it proposes to share them (less than 1 MB).";
/// Rules of each pod, peers times ports.
const RULES: usize = 500;
/// Groups with the same policies, and pods in each.
const SHAPES: [(usize, usize, &str); 2] = [
    (1, 1_000, "1,000 pods x 500 rules, the same for all"),
    (
        50,
        20,
        "50 groups of 20 pods x 500 rules, each group's its own",
    ),
];
const AIM: Aim = Aim::AtMost(1_000.0);
/// Bytes of a kB.
const KB: f64 = 1_000.0;

/// Measures both.
pub fn run(effort: Effort) -> Result<Outcome> {
    let mut rows = Vec::new();
    for (groups, pods, words) in SHAPES {
        let filled = fill(groups, pods).with_context(|| words.to_owned())?;
        if rows.is_empty() {
            rows.push(row(
                "maps of policy, no pods",
                Aim::None,
                sum(&filled.before),
            )?);
        }
        rows.push(row(
            &format!("maps of policy, {words}"),
            AIM,
            sum(&filled.after),
        )?);
        for (map, bytes) in &filled.after {
            let case = format!("of this, {map}, {words}");
            rows.push(row(&case, Aim::None, *bytes)?);
        }
    }
    rows.extend(traffic::run(effort)?);
    Outcome::apart(NAME, TEXT, rows)
}

fn fill(groups: usize, pods: usize) -> Result<Filled> {
    let dir = Folder::new(&format!("{NAME}-{groups}"))?;
    let path = dir.path().display().to_string();
    let (groups, pods, rules) = (groups.to_string(), pods.to_string(), RULES.to_string());
    let words = [
        "fill", "--dir", &path, "--groups", &groups, "--pods", &pods, "--rules", &rules,
    ];
    // Its BPF filesystem ends with it.
    let mut part = Part::start(Network::Own, true, &words)?;
    part.hear()
}

fn sum(taken: &Taken) -> u64 {
    taken.values().sum()
}

fn row(words: &str, aim: Aim, bytes: u64) -> Result<Row> {
    let kilobytes = bytes as f64 / KB;
    eprintln!("bench: {NAME}: {words}: {kilobytes:.1} kB");
    let case = Case {
        bench: NAME,
        case: words,
        unit: "kB",
        aim,
    };
    Row::alone(case, &[kilobytes])
}
