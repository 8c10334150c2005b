//! `service-sync`: an agent that starts with nothing in the kernel beside an API full of Services.
//!
//! The agent is a process of its own, as on a node of its own, and reads the API over TLS. Counted is from its start
//! (before it loads its programs) to the first connection through a Service; a look at its table then proves that
//! all were there. The same is measured with one Service: what is left when this is taken away is what Services cost.

use std::net::SocketAddrV4;
use std::time::Duration;

use anyhow::{Context, Result, ensure};

use super::change::watch;
use super::list;
use super::part::Network;
use super::stage::XebecStage;
use crate::row::{Aim, Case, Row, median, number};
use crate::{Effort, Outcome};

/// What is known of others, which can't run here.
const PEERS: &str = "Full syncs beside others, which were measured elsewhere and not in this run: kube-proxy 1.36.2 with 10,000 Services x 10 on a machine of this kind 24 s and 323 MB (iptables), 53 s and 278 MB (nftables); Cilium 1.19 with 30,000 x 4 1,111 MiB of agent memory (tke-guide, 2026).";
/// How many Services with how many endpoints, and the memory that is allowed, in MiB.
const SIZES: [(usize, usize, Aim); 2] = [(10_000, 10, Aim::None), (30_000, 4, Aim::AtMost(150.0))];
/// How long the agent is left alone before its memory counts as steady.
const REST: Duration = Duration::from_secs(5);

/// What one start took.
struct Start {
    seconds: f64,
    peak: f64,
    steady: f64,
}

/// Measures a start with one Service and with many.
pub fn run(effort: Effort) -> Result<Outcome> {
    let rounds = effort.of(3, 1);
    let sizes: &[(usize, usize, Aim)] = effort.of(&SIZES, &[(1_000, 10, Aim::None)]);
    let mut rows = Vec::new();
    let one = starts(1, 10, rounds)?;
    let all = |starts: &[Start], what: fn(&Start) -> f64| -> Vec<f64> {
        starts.iter().map(what).collect()
    };
    let base_seconds = median(&all(&one, |start| start.seconds));
    let base_memory = median(&all(&one, |start| start.steady));
    row(
        &mut rows,
        "agent started, 1 Service",
        "s",
        Aim::None,
        &all(&one, |one| one.seconds),
    )?;
    row(
        &mut rows,
        "steady memory of the agent, 1 Service",
        "MiB",
        Aim::None,
        &all(&one, |one| one.steady),
    )?;
    let mut text = PEERS.to_owned();
    for (services, endpoints, memory) in sizes {
        let size = format!("{} Services x {endpoints}", number(*services as f64));
        let many = match starts(*services, *endpoints, rounds) {
            Ok(many) => many,
            Err(error) => {
                eprintln!("bench: service-sync: {size}: {error:#}");
                text += &format!("\n- not measured: {size}: {error:#}");
                continue;
            }
        };
        row(
            &mut rows,
            &format!("agent started, all in the kernel, {size}"),
            "s",
            Aim::None,
            &all(&many, |one| one.seconds),
        )?;
        let rates: Vec<f64> = many
            .iter()
            .map(|one| *services as f64 / (one.seconds - base_seconds).max(1e-3))
            .collect();
        row(
            &mut rows,
            &format!("Services from the API into the kernel, {size}"),
            "1/s",
            Aim::None,
            &rates,
        )?;
        row(
            &mut rows,
            &format!("peak memory of the agent, {size}"),
            "MiB",
            Aim::None,
            &all(&many, |one| one.peak),
        )?;
        row(
            &mut rows,
            &format!("steady memory of the agent, {size}"),
            "MiB",
            *memory,
            &all(&many, |one| one.steady),
        )?;
        let each: Vec<f64> = many
            .iter()
            .map(|one| (one.steady - base_memory) * 1024.0 / *services as f64)
            .collect();
        row(
            &mut rows,
            &format!("steady memory for each Service, {size}"),
            "KiB",
            Aim::AtMost(1.0),
            &each,
        )?;
    }
    Outcome::with_details("service-sync", &text, rows)
}

fn row(
    rows: &mut Vec<Row>,
    case: &str,
    unit: &'static str,
    aim: Aim,
    values: &[f64],
) -> Result<()> {
    eprintln!("bench: service-sync: {case}: {:.3} {unit}", median(values));
    rows.push(Row::alone(
        Case {
            bench: "service-sync",
            case,
            unit,
            aim,
        },
        values,
    )?);
    Ok(())
}

/// Starts the agent so many times.
fn starts(services: usize, endpoints: usize, rounds: usize) -> Result<Vec<Start>> {
    let mut stage = XebecStage::new("sync", services, endpoints)?;
    let first = list::services(services, endpoints)?;
    let first = first.first().context("there are no Services")?;
    let first = SocketAddrV4::new(first.cluster_ip, first.port);
    let mut starts = Vec::new();
    for _ in 0..rounds {
        // Of the node itself: it needs no pod, only that the sockets' programs are there.
        let mut client = stage.client_in_pods(Network::Of(&stage.stage.node))?;
        let mut begun = 0;
        let seen = watch(&mut client, first, None, 300.0, || {
            begun = stage.start_agent(false)?;
            Ok(())
        })?;
        let agent = stage.agent.as_ref().context("the agent has ended")?.pid();
        std::thread::sleep(REST);
        let start = Start {
            seconds: seen.answered.saturating_sub(begun) as f64 / 1e9,
            peak: memory(agent, "status", "VmHWM:")?,
            steady: memory(agent, "smaps_rollup", "Pss:")?,
        };
        // Besides those: the API server's own, and the two of the benchmark.
        let known = stage.table("services")?.len();
        ensure!(
            known >= services,
            "the agent let connections through with {known} of {services} Services"
        );
        starts.push(start);
        stage.stop_agent()?;
    }
    Ok(starts)
}

/// A line of a file of /proc, in MiB.
fn memory(pid: u32, file: &str, line: &str) -> Result<f64> {
    let path = format!("/proc/{pid}/{file}");
    let text = std::fs::read_to_string(&path).with_context(|| format!("could not read {path}"))?;
    text.lines()
        .find_map(|one| one.strip_prefix(line))
        .and_then(|rest| rest.trim().strip_suffix("kB"))
        .and_then(|number| number.trim().parse::<f64>().ok())
        .map(|kilobytes| kilobytes / 1024.0)
        .with_context(|| format!("{path} has no line {line}"))
}
