//! `flows-read`: what it costs to put names to events of flows and to keep them, how many reach readers of Hubble's API,
//! and the memory of a flow that is kept.
//!
//! Events are given to the agent's store as its reader of the kernel's ring gives them; readers are clients of the gRPC
//! server over a UNIX socket, in this process, which has the machine's CPUs for all of them together. What a reader
//! missed is told to it, and counted here: told and missed are all that there were, or the benchmark fails.

use std::net::{IpAddr, Ipv4Addr};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use tokio_util::sync::CancellationToken;
use xebec_agent::flows::metrics::FlowMetrics;
use xebec_agent::flows::observer::NodeObserver;
use xebec_agent::flows::{Directory, Flows, KEPT, Report};
use xebec_dataplane_common::TCP;
use xebec_dataplane_common::flow::{Event, FORWARDED, INGRESS};
use xebec_hubble::client::Server;
use xebec_hubble::observer::GetFlowsRequest;
use xebec_hubble::observer::get_flows_response::ResponseTypes;
use xebec_hubble::observer::observer_client::ObserverClient;
use xebec_hubble::serve::Api;
use xebec_policy::names::{Names, Peer};

use crate::row::{Aim, Case, Row};
use crate::services::stage::Folder;
use crate::{Effort, Outcome};

/// The benchmark.
pub const NAME: &str = "flows-read";
const TEXT: &str = "Events of flows from the agent's store on; the kernel's side is not in these numbers. Readers and the one who writes share the machine's two CPUs.";
/// Pods whose flows these are.
const PODS: u32 = 1_000;
/// Events that are read out of the ring at a time.
const BATCH: usize = 256;
/// Events named and kept a second by one CPU.
const NAMED: Aim = Aim::AtLeast(200_000.0);

/// Events a second that readers follow.
const RATES: [u32; 2] = [10_000, 200_000];

/// Measures all.
pub fn run(effort: Effort) -> Result<Outcome> {
    let mut rows = Vec::new();
    for (words, metrics) in [
        ("named and kept", ""),
        (
            "named, kept and counted in the usual metrics",
            xebec_agent::flows::metrics::DEFAULT,
        ),
        (
            "the same, each metric with both pods as labels",
            "drop:sourceContext=pod;destinationContext=pod tcp:sourceContext=pod;destinationContext=pod flow:sourceContext=pod;destinationContext=pod",
        ),
    ] {
        let rates: Vec<f64> = (0..effort.of(7, 2))
            .map(|_| named(effort, metrics))
            .collect::<Result<_>>()?;
        rows.push(row(words, "1/s", NAMED, &rates)?);
    }
    rows.push(memory()?);
    for (readers, written) in [1, 10, 100]
        .into_iter()
        .flat_map(|readers| RATES.map(|rate| (readers, rate)))
    {
        let mut told = Vec::new();
        let mut share = Vec::new();
        for _ in 0..effort.of(5, 1) {
            let read = read(effort, readers, written)?;
            told.push(read.told as f64 / read.seconds);
            share.push(100.0 * read.missed as f64 / (read.told + read.missed) as f64);
        }
        let words = format!("told to readers in sum: {readers}, of {written} events a second");
        rows.push(row(&words, "1/s", Aim::None, &told)?);
        let words = format!("missed by them, and told so: {readers}, of {written} events a second");
        rows.push(row(&words, "%", Aim::None, &share)?);
    }
    Outcome::apart(NAME, TEXT, rows)
}

fn row(words: &str, unit: &'static str, aim: Aim, rounds: &[f64]) -> Result<Row> {
    eprintln!("bench: {NAME}: {words}: {rounds:.0?} {unit}");
    let case = Case {
        bench: NAME,
        case: words,
        unit,
        aim,
    };
    Row::alone(case, rounds)
}

fn address(number: u32) -> Ipv4Addr {
    Ipv4Addr::from(u32::from(Ipv4Addr::new(10, 244, 0, 0)) + number)
}

/// A store, and names of all pods.
fn flows(room: usize, metrics: &str) -> Result<Flows> {
    let names = Names::default();
    for number in 0..PODS {
        let labels = [
            ("app".to_owned(), format!("app-{}", number / 10)),
            ("pod-template-hash".to_owned(), "56df9bc644".to_owned()),
        ];
        let name = (
            "shop".to_owned(),
            format!("app-{}-56df9bc644-{number:05}", number / 10),
        );
        let owner = (
            "ReplicaSet".to_owned(),
            format!("app-{}-56df9bc644", number / 10),
        );
        let peer = Peer::pod(&name, 1_000 + number / 10, &labels.into(), Some(&owner));
        names.set(IpAddr::V4(address(number)), peer);
    }
    Ok(Flows::new(
        Directory {
            names,
            ..Directory::default()
        },
        "node1",
        room,
        FlowMetrics::parse(metrics)?,
    ))
}

/// First packets between pods, all of other flows.
fn batch(first: u64) -> Vec<Report> {
    (first..)
        .take(BATCH)
        .map(|number| {
            let spread = (number as u32).wrapping_mul(2_654_435_761);
            Event {
                time: number,
                source: address(spread % PODS).into(),
                destination: address(spread / PODS % PODS).into(),
                source_port: ((number % 28_000) as u16 + 32_768).to_be(),
                destination_port: 8_080_u16.to_be(),
                protocol: TCP,
                tcp_flags: 2,
                verdict: FORWARDED,
                direction: INGRESS,
                reason: 0,
                reply: 0,
                length: 60,
                set: 0,
                rule: 0,
                ..bytemuck::Zeroable::zeroed()
            }
            .into()
        })
        .collect()
}

/// Events a second that one thread names and keeps.
fn named(effort: Effort, metrics: &str) -> Result<f64> {
    let flows = flows(KEPT, metrics)?;
    let batches: Vec<Vec<Report>> = (0..64).map(|at| batch(at * BATCH as u64)).collect();
    batches.iter().for_each(|batch| flows.take(batch, 0));
    let rounds = effort.of(200, 10);
    let began = Instant::now();
    for _ in 0..rounds {
        batches.iter().for_each(|batch| flows.take(batch, 0));
    }
    let events = rounds * batches.len() * BATCH;
    Ok(events as f64 / began.elapsed().as_secs_f64())
}

/// Bytes of this process in memory.
fn resident() -> Result<u64> {
    let text =
        std::fs::read_to_string("/proc/self/statm").context("could not read /proc/self/statm")?;
    let pages = text
        .split(' ')
        .nth(1)
        .and_then(|pages| pages.parse::<u64>().ok());
    Ok(pages.context("/proc/self/statm has no second number")? * 4_096)
}

/// Bytes of a flow that is kept, of very many.
fn memory() -> Result<Row> {
    const MANY: usize = 1 << 20;
    let flows = flows(MANY, "")?;
    let before = resident()?;
    for at in 0..MANY / BATCH {
        flows.take(&batch((at * BATCH) as u64), 0);
    }
    let bytes = resident()?.saturating_sub(before) as f64 / MANY as f64;
    row("memory of a flow that is kept", "B", Aim::None, &[bytes])
}

/// What all readers together saw.
struct Seen {
    told: u64,
    missed: u64,
    seconds: f64,
}

/// Gives so many events a second to a store that is followed.
fn read(effort: Effort, readers: u64, rate: u32) -> Result<Seen> {
    let folder = Folder::new(&format!("{NAME}-{readers}"))?;
    let socket = folder.path().join("hubble.sock");
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .context("could not start a runtime")?;
    let flows = flows(KEPT, "")?;
    runtime.block_on(follow(effort, (readers, rate), flows, socket))
}

async fn follow(
    effort: Effort,
    (readers, rate): (u64, u32),
    flows: Flows,
    socket: PathBuf,
) -> Result<Seen> {
    let shutdown = CancellationToken::new();
    let observer = NodeObserver::new(flows.clone(), shutdown.clone());
    let api = Api::new(
        observer,
        None::<xebec_agent::flows::peers::Peers>,
        shutdown.clone(),
    )
    .await;
    let serving = socket.clone();
    let served = tokio::spawn(async move { api.unix(&serving).await });
    while !socket.exists() {
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    let (told, missed) = (Arc::new(AtomicU64::new(0)), Arc::new(AtomicU64::new(0)));
    let mut following = Vec::new();
    for _ in 0..readers {
        let channel = Server::Unix(socket.clone()).connect(None).await?;
        let asked = GetFlowsRequest {
            follow: true,
            ..GetFlowsRequest::default()
        };
        let mut stream = ObserverClient::new(channel)
            .get_flows(asked)
            .await?
            .into_inner();
        let (told, missed) = (told.clone(), missed.clone());
        following.push(tokio::spawn(async move {
            while let Ok(Some(answer)) = stream.message().await {
                match answer.response_types {
                    Some(ResponseTypes::LostEvents(lost)) => {
                        missed.fetch_add(lost.num_events_lost, Ordering::Relaxed)
                    }
                    _ => told.fetch_add(1, Ordering::Relaxed),
                };
            }
        }));
    }
    let began = Instant::now();
    let lasts = effort.of(Duration::from_secs(2), Duration::from_millis(200));
    let writer = flows.clone();
    let written = tokio::task::spawn_blocking(move || {
        let batches: Vec<Vec<Report>> = (0..64).map(|at| batch(at * BATCH as u64)).collect();
        let mut written = 0;
        while began.elapsed() < lasts {
            for batch in &batches {
                writer.take(batch, 0);
                written += batch.len() as u64;
                let due = Duration::from_secs_f64(written as f64 / f64::from(rate));
                std::thread::sleep(due.saturating_sub(began.elapsed()));
            }
        }
        written
    });
    let written = written.await.context("the writer panicked")?;
    let all = written * readers;
    let sum = || told.load(Ordering::Relaxed) + missed.load(Ordering::Relaxed);
    let patience = Instant::now() + Duration::from_secs(60);
    while sum() < all && Instant::now() < patience {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    let seconds = began.elapsed().as_secs_f64();
    ensure!(
        sum() == all,
        "{} events were told or missed, of {written} for each of {readers} readers",
        sum()
    );
    shutdown.cancel();
    for reader in following {
        reader.await.context("a reader panicked")?;
    }
    served.await.context("the server panicked")??;
    Ok(Seen {
        told: told.load(Ordering::Relaxed),
        missed: missed.load(Ordering::Relaxed),
        seconds,
    })
}
