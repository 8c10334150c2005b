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
use crate::row::{Aim, Row, number};
use crate::tail::{millis, tail};
use crate::{Effort, Outcome};

/// What is known of kube-proxy, which can't run here: it needs a cluster of its own.
const PEERS: &str = "Changes beside kube-proxy 1.36.2, which was measured with 10,000 Services on a machine of this kind in an earlier run, not in this one: a new Service works after 4.5–9.8 s (iptables) and 22–28 s (nftables), its `minSyncPeriod` of 1 s included.";
const NAME: &str = "service-change";
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
            eprintln!("bench: {NAME}: {note}");
            text += &format!("\n- not measured: {note}");
        }
    }
    ensure!(!rows.is_empty(), "no size could be measured");
    Outcome::with_details(NAME, &text, rows)
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
    rows.extend(tail(NAME, &what, AIM, &took)?);
    let what = format!("of this, the write itself, {size}");
    rows.extend(tail(NAME, &what, Aim::None, &written)?);
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
    rows.extend(tail(NAME, &what, Aim::None, &took)?);
    drop(client);
    stage.stop_agent()?;
    Ok(())
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
