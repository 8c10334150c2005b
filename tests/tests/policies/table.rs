//! A truth table: who should be answered by whom, and who is.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write;
use std::time::{Duration, Instant};

use anyhow::{Result, bail};
use xebec_policy_oracle::Protocol;
use xebec_tests::place::{cgroup_of, inside};

use super::Name;
use super::model::{Pair, word};
use super::sockets::{Heard, Question};
use super::world::World;

/// How long the cluster may take to become what was asked for.
const PATIENCE: Duration = Duration::from_secs(30);
/// How long to wait before those who were not right are asked again.
const BREATH: Duration = Duration::from_millis(50);
/// How long answers may take at first, and at most: longer each time that some did not come, as on a slow machine.
const ANSWERS: [Duration; 2] = [Duration::from_millis(300), Duration::from_secs(3)];

/// By which address a pod is asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Way {
    /// Its own.
    Pod,
    /// Its Service's, which packets bear until the asker's node translates them.
    Service,
    /// The same, which the node's socket programs translate before there is a packet, as they do for what pods run.
    Socket,
}

/// One question, with the way that it takes.
type Cell = (Way, Pair);

/// Compares what is with what should be, until it is the same or the patience is over.
pub fn compare(world: &World, wanted: &BTreeMap<Pair, bool>, ways: &[Way]) -> Result<()> {
    let begun = Instant::now();
    let all = ways
        .iter()
        .flat_map(|way| wanted.keys().map(|pair| (*way, pair.clone())));
    // Raw sockets meet no programs.
    let all = all.filter(|(way, pair)| *way != Way::Socket || pair.protocol != Protocol::Sctp);
    let all: Vec<Cell> = all.collect();
    let right = |cell: &Cell, heard: &Heard| -> Result<bool> {
        Ok(match wanted.get(&cell.1) {
            Some(true) => *heard == Heard::Answer(world.pod(&cell.1.to)?.number),
            _ => *heard == Heard::Silence,
        })
    };
    let mut patience = ANSWERS[0];
    loop {
        let mut seen = ask(world, &all, patience)?;
        let mut wrong = differing(&seen, &right)?;
        if wrong.is_empty() {
            return Ok(());
        }
        // Agents have said that all is in force; whatever is late is told.
        let first: Vec<String> = wrong.iter().take(3).map(|cell| told(cell, &seen)).collect();
        let first = first.join(", ");
        while !wrong.is_empty() {
            if begun.elapsed() > PATIENCE {
                bail!("{}", difference(world, wanted, &seen, &wrong));
            }
            std::thread::sleep(BREATH);
            patience = ANSWERS[1].min(2 * patience);
            seen.extend(ask(world, &wrong, patience)?);
            wrong = differing(&seen, &right)?;
        }
        let late = begun.elapsed().as_secs_f32();
        println!("  late, right after {late:.1} s: {first}");
        // Whoever was right at first was asked before the others were: all once more.
    }
}

fn differing(
    seen: &BTreeMap<Cell, Heard>,
    right: &impl Fn(&Cell, &Heard) -> Result<bool>,
) -> Result<Vec<Cell>> {
    let mut wrong = Vec::new();
    for (cell, heard) in seen {
        if !right(cell, heard)? {
            wrong.push(cell.clone());
        }
    }
    Ok(wrong)
}

/// Asks all of these: at once, but for those who must be on their own node.
fn ask(world: &World, cells: &[Cell], patience: Duration) -> Result<BTreeMap<Cell, Heard>> {
    let mut by_node: BTreeMap<Option<&str>, Vec<&Cell>> = BTreeMap::new();
    for cell in cells {
        let node = match cell.0 {
            Way::Socket => Some(world.pod(&cell.1.from)?.node.as_str()),
            Way::Pod | Way::Service => None,
        };
        by_node.entry(node).or_default().push(cell);
    }
    let mut seen = BTreeMap::new();
    for (node, cells) in by_node {
        seen.extend(match node {
            Some(node) => inside(&cgroup_of(node)?, || ask_at_once(world, &cells, patience))??,
            None => ask_at_once(world, &cells, patience)?,
        });
    }
    Ok(seen)
}

fn ask_at_once(
    world: &World,
    cells: &[&Cell],
    patience: Duration,
) -> Result<BTreeMap<Cell, Heard>> {
    let mut by_pod: BTreeMap<&Name, Vec<&Cell>> = BTreeMap::new();
    for cell in cells {
        by_pod.entry(&cell.1.from).or_default().push(cell);
    }
    let mut asked = Vec::new();
    for (from, cells) in by_pod {
        let mut questions = Vec::new();
        for (way, pair) in &cells {
            questions.push(Question {
                protocol: pair.protocol,
                to: world.target(*way, pair)?,
            });
        }
        asked.push((cells, world.pod(from)?.talker.ask(questions, patience)?));
    }
    let mut seen = BTreeMap::new();
    for (cells, heard) in asked {
        let heard = heard.recv()?;
        seen.extend(cells.into_iter().cloned().zip(heard));
    }
    Ok(seen)
}

/// A question and what was heard.
fn told(cell: &Cell, seen: &BTreeMap<Cell, Heard>) -> String {
    let (way, Pair { from, to, .. }) = cell;
    let (family, heard) = (if cell.1.v4 { 4 } else { 6 }, seen.get(cell));
    format!(
        "{}/{} to {}/{} ({way:?}, IPv{family}, {} {}): {heard:?}",
        from.0,
        from.1,
        to.0,
        to.1,
        word(cell.1.protocol),
        cell.1.port
    )
}

/// A sign for what was heard.
fn sign(world: &World, cell: &Cell, heard: &Heard) -> char {
    match heard {
        Heard::Answer(number) if world.pod(&cell.1.to).is_ok_and(|to| to.number == *number) => 'o',
        Heard::Answer(_) => '?',
        Heard::Silence => '.',
        Heard::Refusal(_) => '!',
    }
}

/// What should be beside what is, for each port where they differ; ports that look alike share a picture.
fn difference(
    world: &World,
    wanted: &BTreeMap<Pair, bool>,
    seen: &BTreeMap<Cell, Heard>,
    wrong: &[Cell],
) -> String {
    let pods: Vec<&Name> = world.model.pods.keys().collect();
    let heads: BTreeSet<_> = wrong.iter().map(head).collect();
    let mut pictures: BTreeMap<String, Vec<String>> = BTreeMap::new();
    for (way, v4, protocol, port) in heads {
        let mut picture = format!("{:>8}", "from\\to");
        for half in ["", " |"] {
            picture += half;
            for to in &pods {
                let _ = write!(picture, " {:>4}", format!("{}/{}", to.0, to.1));
            }
        }
        for from in &pods {
            let _ = write!(picture, "\n{:>8}", format!("{}/{}", from.0, from.1));
            let (mut should, mut does) = (String::new(), String::new());
            for to in &pods {
                let pair = Pair {
                    from: (*from).clone(),
                    to: (*to).clone(),
                    v4,
                    protocol,
                    port,
                };
                let allowed = wanted.get(&pair);
                let cell = (way, pair);
                let sign = seen.get(&cell).map(|heard| sign(world, &cell, heard));
                let mark = if wrong.contains(&cell) { '*' } else { ' ' };
                let expected = match allowed {
                    Some(true) => 'o',
                    Some(false) => '.',
                    None => ' ',
                };
                let _ = write!(should, " {:>4}", expected);
                let _ = write!(does, " {:>4}", format!("{mark}{}", sign.unwrap_or(' ')));
            }
            picture += &should;
            picture += " |";
            picture += does.trim_end();
        }
        let family = if v4 { "IPv4" } else { "IPv6" };
        let what = format!("{way:?} {family} {} {port}", word(protocol));
        pictures.entry(picture).or_default().push(what);
    }
    let mut text = format!(
        "{} of {} are not as they should be (o answered, . silent, ! refused, ? another answered; expected, then seen)",
        wrong.len(),
        seen.len()
    );
    for (picture, whats) in pictures {
        let _ = write!(text, "\n{}:\n{picture}", whats.join(", "));
    }
    text
}

type Head = (Way, bool, Protocol, u16);

fn head((way, pair): &Cell) -> Head {
    (*way, pair.v4, pair.protocol, pair.port)
}
