//! `service-change`: the time from an endpoint's change in the API to the first connection that obeys it.
//!
//! A client of the node's pod connects again and again to a Service with one backend; the backend is changed through
//! the API. Counted is from before the write is sent to when the answer of the new backend is there: the write with
//! its fsync, the watch, the agent, the maps, and a connection are all in it. The second number is a Service that is
//! made anew: both of its objects are written after the client began to ask.

use std::net::SocketAddrV4;

use anyhow::{Context, Result, ensure};
use serde_json::Value;

use super::control::{self, Written};
use super::list::{BACKENDS, EXTRA, MOVING, PORT};
use super::part::Part;
use super::stage::XebecStage;
use super::wire::{self, Seen};
use crate::row::{Aim, Case, Row, median, number};
use crate::{Effort, Outcome};

/// What is known of kube-proxy, which can't run here: it needs a cluster of its own.
const PEERS: &str = "Changes beside kube-proxy 1.36.2, which was measured with 10,000 Services on a machine of this kind in an earlier run, not in this one: a new Service works after 4.5–9.8 s (iptables) and 22–28 s (nftables), its `minSyncPeriod` of 1 s included.";
/// Milliseconds, at every size, of 99 changes in 100.
const AIM: Aim = Aim::AtMost(10.0);

/// Measures at every size.
pub fn run(effort: Effort) -> Result<Outcome> {
    let sizes: &[usize] = effort.of(&[1, 1_000, 10_000, 100_000], &[1, 1_000]);
    let mut rows = Vec::new();
    let mut text = PEERS.to_owned();
    for &services in sizes {
        if let Err(error) = measure(services, effort, &mut rows) {
            let note = format!("{} Services: {error:#}", number(services as f64));
            eprintln!("bench: service-change: {note}");
            text += &format!("\n- not measured: {note}");
        }
    }
    ensure!(!rows.is_empty(), "no size could be measured");
    Outcome::with_details("service-change", &text, rows)
}

/// Measures at one size.
fn measure(services: usize, effort: Effort, rows: &mut Vec<Row>) -> Result<()> {
    let (rounds, changes, made) = effort.of((5, 100, 10), (2, 10, 3));
    let mut stage = XebecStage::new("change", services, BACKENDS.count())?;
    stage.start_agent(false)?;
    let (mut client, _without) = stage.agent_pod()?;
    let moving = SocketAddrV4::new(MOVING, PORT);
    // It obeys at all, before anything counts.
    watch(&mut client, moving, Some(*BACKENDS.start()), 120.0, || {
        Ok(())
    })?;
    let (mut took, mut written) = (Vec::new(), Vec::new());
    for round in 0..rounds {
        let (mut of_all, mut of_writes) = (Vec::new(), Vec::new());
        for change in 1..=changes {
            let turn = round * changes + change;
            let backend = BACKENDS.start() + (turn % BACKENDS.count()) as u8;
            let mut write = None;
            let seen = watch(&mut client, moving, Some(backend), 30.0, || {
                write = Some(
                    stage
                        .control
                        .ask::<Written>(&control::Order::Point { backend })?,
                );
                Ok(())
            })?;
            let write = write.context("nothing was written")?;
            of_all.push(millis(write.asked, seen.answered));
            of_writes.push(millis(write.asked, write.done));
        }
        took.push(of_all);
        written.push(of_writes);
    }
    let size = match services {
        1 => "1 Service".to_owned(),
        more => format!("{} Services", number(more as f64)),
    };
    let what = format!("endpoint changed, first answer of the new one, {size}");
    rows.extend(tail(&what, AIM, &took)?);
    let what = format!("of this, the write itself, {size}");
    rows.extend(tail(&what, Aim::None, &written)?);
    let extra = SocketAddrV4::new(EXTRA, PORT);
    let mut took = Vec::new();
    for _ in 0..rounds {
        let mut of_all = Vec::new();
        for _ in 0..made {
            let mut write = None;
            let order = |present| control::Order::Extra {
                name: "extra".to_owned(),
                present,
            };
            let seen = watch(&mut client, extra, None, 30.0, || {
                write = Some(stage.control.ask::<Written>(&order(true))?);
                Ok(())
            })?;
            let write = write.context("nothing was written")?;
            of_all.push(millis(write.asked, seen.answered));
            stage.control.ask::<Written>(&order(false))?;
            gone(&mut client, extra)?;
        }
        took.push(of_all);
    }
    let what = format!("Service made, first answer, {size}");
    rows.extend(tail(&what, Aim::None, &took)?);
    drop(client);
    stage.stop_agent()?;
    Ok(())
}

/// Of all rounds the 99th percentile, which an aim is for, and the median; with an aim, the one worst of all, too.
fn tail(what: &str, aim: Aim, rounds: &[Vec<f64>]) -> Result<Vec<Row>> {
    let p99s: Vec<f64> = rounds.iter().map(|took| at(took, 0.99)).collect();
    let medians: Vec<f64> = rounds.iter().map(|took| median(took)).collect();
    let all = rounds.concat();
    let worst = at(&all, 1.0);
    eprintln!(
        "bench: service-change: {what}: {:.3} ms, p99 {:.3} ms, worst {worst:.3} ms",
        median(&medians),
        median(&p99s),
    );
    let row = |last: &str, aim, values: &[f64]| {
        let case = Case {
            bench: "service-change",
            case: &format!("{what}, {last}"),
            unit: "ms",
            aim,
        };
        Row::alone(case, values)
    };
    let mut rows = vec![row("median", Aim::None, &medians)?, row("p99", aim, &p99s)?];
    if aim != Aim::None {
        let last = format!("worst of {}", all.len());
        rows.push(row(&last, Aim::None, &[worst])?);
    }
    Ok(rows)
}

/// The value that this part of all are not above.
fn at(values: &[f64], part: f64) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let place = ((sorted.len() as f64 * part).ceil() as usize).saturating_sub(1);
    sorted.get(place).copied().unwrap_or(f64::NAN)
}

/// Lets the client ask, then does something, then hears what the client saw.
pub fn watch(
    client: &mut Part,
    address: SocketAddrV4,
    backend: Option<u8>,
    seconds: f64,
    then: impl FnOnce() -> Result<()>,
) -> Result<Seen> {
    client.tell(&wire::Order::Watch {
        address,
        backend,
        seconds,
    })?;
    client.hear::<Value>()?;
    then()?;
    client.hear()
}

/// Waits until a Service that was taken away answers no more.
fn gone(client: &mut Part, address: SocketAddrV4) -> Result<()> {
    xebec_tests::eventually(
        "the end of a Service",
        std::time::Duration::from_secs(30),
        || Ok(watch(client, address, None, 0.05, || Ok(())).is_err()),
    )
}

fn millis(from: u64, to: u64) -> f64 {
    to.saturating_sub(from) as f64 / 1e6
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests may panic")]
    use super::*;

    #[test]
    fn the_aim_is_for_the_99th_percentile_and_the_worst_is_not_hidden() {
        // One in a hundred is slow; in the second round two are.
        let mut rounds = vec![vec![1.0; 100]; 3];
        rounds[0][7] = 500.0;
        rounds[1][3] = 40.0;
        rounds[1][90] = 30.0;
        let rows = tail("w", Aim::AtMost(10.0), &rounds).unwrap();
        let [middle, p99, worst] = &rows[..] else {
            panic!("three rows");
        };
        assert_eq!((p99.ours, p99.met, p99.rounds), (1.0, Some(true), 3));
        assert_eq!(p99.spread, 29.0);
        assert_eq!((middle.ours, middle.met), (1.0, None));
        assert_eq!(
            (worst.ours, worst.case.as_str()),
            (500.0, "w, worst of 300")
        );
        rounds[2][0..2].fill(30.0);
        let rows = tail("w", Aim::AtMost(10.0), &rounds).unwrap();
        assert_eq!(rows[1].met, Some(false));
        assert_eq!(tail("w", Aim::None, &rounds).unwrap().len(), 2);
        assert!(tail("w", Aim::None, &[]).is_err());
    }
}
