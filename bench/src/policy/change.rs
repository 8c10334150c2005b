//! `policy-change`: the time from a policy's change in the API until every pod of the node is judged by it.
//!
//! One policy is for all pods of the namespace, and each change of it opens one port of UDP and closes another; then it is
//! for the pods with a label, which all have: so it is not with the policies that all kinds of pods have in common. A pod that
//! is under no policy sends packets to all pods of the node, one after the other, each until it arrives; then over the
//! other port, until none does. Counted is from before the write is sent: the write with its fsync, the watch, the
//! compilation of every set of rules that the policy is part of, the maps, and the packets themselves are in it. `opened`
//! ends with the first packet to the last pod that a rule of the new policy let through; `closed` with the first one that
//! it dropped, of a flow that was let through before.
//!
//! The pods are network namespaces with sockets, connected by the agent as all pods are. They are of fifty apps; each has
//! a fiftieth of the other policies, so a change of who is selected by labels has the node make as many sets anew as it
//! has apps, all different.

use anyhow::{Result, ensure};

use super::list;
use super::pods::PORTS;
use super::rig::Rig;
use crate::row::{Aim, Case, Row, number};
use crate::tail::{at, millis, tail};
use crate::{Effort, Outcome};

const NAME: &str = "policy-change";
/// What is known of Cilium, which can't run here: it needs a cluster of its own.
const PEERS: &str = "Changes beside Cilium, which was measured elsewhere and not in this run: with 250 policies the 99th percentile of what an endpoint's regeneration takes is 0.6 s (policies of namespaces) to 3 s (of the cluster), after a trigger that waits up to 1 s. Pods are of 50 apps, each app has a fiftieth of the policies, and the policy that changes is for all pods of the namespace or, where it says so, for those with a label, which all have.";
/// Milliseconds, of 99 changes in 100, for this many pods and fewer.
const AIM: (f64, usize) = (10.0, 100);

/// Measures at every size.
pub fn run(effort: Effort) -> Result<Outcome> {
    let pods: &[usize] = effort.of(&[1, 100, 500], &[1, 100]);
    let mut rows = Vec::new();
    let mut text = PEERS.to_owned();
    for &pods in pods {
        if let Err(error) = measure(pods, effort, &mut rows) {
            let note = format!("{}: {error:#}", counted_pods(pods));
            eprintln!("bench: {NAME}: {note}");
            text += &format!("\n- not measured: {note}");
        }
    }
    ensure!(!rows.is_empty(), "no size could be measured");
    Outcome::apart(NAME, &text, rows)
}

fn counted_pods(count: usize) -> String {
    let plural = if count == 1 { "" } else { "s" };
    format!("{count} pod{plural}")
}

/// Measures with so many pods, under more and more policies.
fn measure(pods: usize, effort: Effort, rows: &mut Vec<Row>) -> Result<()> {
    let sizes: &[usize] = effort.of(&[10, 250, 2_500], &[10, 250]);
    let mut rig = Rig::new(NAME, pods, &[list::switch(PORTS[0])])?;
    let mut there = 0;
    // It is open from the beginning.
    let mut open = 0;
    let aim = match pods {
        few if few <= AIM.1 => Aim::AtMost(AIM.0),
        _ => Aim::None,
    };
    // What labels cost is told of one number of pods.
    let ways: &[bool] = if pods == AIM.1 {
        &[false, true]
    } else {
        &[false]
    };
    for &policies in sizes {
        rig.add(&list::policies(there..policies))?;
        there = policies;
        for &by_label in ways {
            let all = format!(
                "{}{}, {} policies",
                counted_pods(pods),
                if by_label { " by a label" } else { "" },
                number(policies as f64)
            );
            let [opened, closed, written] = changes(&mut rig, &mut open, by_label, effort)?;
            for (what, times) in [("opened", &opened), ("closed", &closed)] {
                let what = format!("policy changed, {what} for all of {all}");
                tell(&what, aim, times, rows)?;
            }
            let what = format!("of this, the write itself, {all}");
            rows.extend(tail(NAME, &what, Aim::None, &written)?);
        }
    }
    rig.end()
}

/// Milliseconds until a change was seen to open, to close, and until it was written; in rounds.
fn changes(
    rig: &mut Rig,
    open: &mut usize,
    by_label: bool,
    effort: Effort,
) -> Result<[Vec<Vec<f64>>; 3]> {
    let (rounds, changes) = effort.of((5, 100), (2, 10));
    let mut all = [const { Vec::new() }; 3];
    for round in 0..=rounds {
        let mut own = [const { Vec::new() }; 3];
        // The first round warms up.
        for _ in 0..if round == 0 { 3 } else { changes } {
            *open = 1 - *open;
            let (write, seen) = rig.switch(*open, by_label)?;
            for (times, end) in own.iter_mut().zip([seen.opened, seen.closed, write.done]) {
                times.push(millis(write.asked, end));
            }
        }
        if round > 0 {
            all.iter_mut().zip(own).for_each(|(all, own)| all.push(own));
        }
    }
    Ok(all)
}

/// The rows of one kind of change.
fn tell(what: &str, aim: Aim, times: &[Vec<f64>], rows: &mut Vec<Row>) -> Result<()> {
    rows.extend(tail(NAME, what, aim, times)?);
    if aim == Aim::None {
        // Not promised, but not hidden.
        let all = times.concat();
        let case = Case {
            bench: NAME,
            case: &format!("{what}, worst of {}", all.len()),
            unit: "ms",
            aim,
        };
        rows.push(Row::alone(case, &[at(&all, 1.0)])?);
    }
    Ok(())
}
