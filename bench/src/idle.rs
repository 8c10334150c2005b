//! `idle`: what a cluster without pods costs, and the size of the executable.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use nix::time::ClockId;
use nix::unistd::Pid;
use xebec_tests::{pids_of, xebec_bin};

use crate::Effort;
use crate::cluster::BenchCluster;
use crate::row::{Aim, Case, Row};

/// Starts a cluster, leaves it alone, and looks at all its processes: those that run the executable.
///
/// Memory is the sum of their proportional set sizes (PSS: a page that n processes map counts as 1/n in each). Maps of
/// eBPF programs belong to the kernel and have a row of their own, by what each says it holds.
pub fn run(effort: Effort) -> Result<Vec<Row>> {
    let settle = Duration::from_secs(effort.of(30, 3));
    let quiet = Duration::from_secs(effort.of(60, 10));
    let mut cluster = BenchCluster::up("idle", &[])?;
    std::thread::sleep(settle);
    let executable = xebec_bin()
        .canonicalize()
        .context("$XEBEC_BIN names no file")?;
    let pids = pids_of(&executable);
    ensure!(
        pids.contains(&cluster.pid()?),
        "the cluster's process does not run {}",
        executable.display()
    );
    eprintln!("bench: idle: {} processes, quiet for {quiet:?}", pids.len());
    let (started, before) = (Instant::now(), cpu_seconds(&pids)?);
    std::thread::sleep(quiet);
    let (elapsed, after) = (started.elapsed(), cpu_seconds(&pids)?);
    ensure!(
        pids_of(&executable) == pids,
        "processes came or went while the cluster was idle"
    );
    let cpu = 100.0 * (after - before) / elapsed.as_secs_f64();
    let mut memory = 0;
    let mut maps = 0;
    for pid in &pids {
        memory += pss(*pid)?;
        maps += map_memory(*pid)?;
    }
    cluster.down()?;
    let size = executable
        .metadata()
        .context("could not look at the executable")?
        .len();
    let case = |case, unit, aim| Case {
        bench: "idle",
        case,
        unit,
        aim,
    };
    let megabytes = |bytes: u64| bytes as f64 / 1e6;
    Ok(vec![
        Row::alone(
            case("memory of all processes (PSS)", "MB", Aim::AtMost(100.0)),
            &[megabytes(memory)],
        )?,
        Row::alone(
            case("memory of eBPF maps, in the kernel", "MB", Aim::None),
            &[megabytes(maps)],
        )?,
        Row::alone(case("CPU, % of a core", "%", Aim::AtMost(1.0)), &[cpu])?,
        Row::alone(
            case("size of the executable", "MB", Aim::AtMost(40.0)),
            &[megabytes(size)],
        )?,
    ])
}

/// Processor time of these processes so far, threads that ended included.
fn cpu_seconds(pids: &std::collections::BTreeSet<i32>) -> Result<f64> {
    pids.iter()
        .map(|pid| {
            let time = ClockId::pid_cpu_clock_id(Pid::from_raw(*pid))
                .and_then(ClockId::now)
                .with_context(|| format!("could not read the processor time of {pid}"))?;
            Ok(Duration::from(time).as_secs_f64())
        })
        .sum()
}

/// Proportional set size of a process in bytes.
fn pss(pid: i32) -> Result<u64> {
    let path = format!("/proc/{pid}/smaps_rollup");
    let text = std::fs::read_to_string(&path).with_context(|| format!("could not read {path}"))?;
    let kilobytes: u64 = field(&text, "Pss:")
        .and_then(|rest| rest.strip_suffix("kB"))
        .and_then(|number| number.trim().parse().ok())
        .with_context(|| format!("{path} has no Pss"))?;
    Ok(kilobytes * 1024)
}

/// Bytes of the eBPF maps that a process has open, each map once.
fn map_memory(pid: i32) -> Result<u64> {
    let path = format!("/proc/{pid}/fdinfo");
    let entries = std::fs::read_dir(&path).with_context(|| format!("could not list {path}"))?;
    let mut maps = std::collections::BTreeMap::new();
    for entry in entries.flatten() {
        // It may be closed meanwhile.
        let Ok(text) = std::fs::read_to_string(entry.path()) else {
            continue;
        };
        if let (Some(id), Some(bytes)) = (field(&text, "map_id:"), field(&text, "memlock:")) {
            let bytes: u64 = bytes
                .parse()
                .with_context(|| format!("memlock {bytes:?} of an eBPF map is no number"))?;
            maps.insert(id.to_owned(), bytes);
        }
    }
    Ok(maps.values().sum())
}

/// What a `Key: value` line says.
fn field<'a>(text: &'a str, key: &str) -> Option<&'a str> {
    text.lines()
        .find_map(|line| line.strip_prefix(key))
        .map(str::trim)
}
