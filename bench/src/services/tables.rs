//! `service-tables`: decoded objects into the kernel's maps, without an API in between.
//!
//! The agent's own tables get Services and EndpointSlices as the watch hands them over, and write maps of the kernel
//! that no program uses. Memory is what the allocator gave out for the tables alone.

use std::net::{IpAddr, Ipv4Addr};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use serde_json::json;
use xebec_agent::maps::{Room, ServiceMaps};
use xebec_agent::services::{EndpointSlice, Service, Tables};

use crate::Effort;
use crate::row::{Aim, Case, Row, median, number};

const ENDPOINTS: usize = 10;
/// Objects are made so many at a time, and dropped when they were handed over, as the watch drops them.
const PART: usize = 1_000;
/// How many endpoints change, one after the other.
const CHANGES: usize = 1_000;

/// Measures all sizes.
pub fn run(effort: Effort) -> Result<Vec<Row>> {
    let sizes: &[usize] = effort.of(&[1_000, 10_000, 100_000], &[1_000]);
    let rounds = effort.of(5, 1);
    let mut rows = Vec::new();
    for &size in sizes {
        let all = (0..rounds)
            .map(|_| fill(size))
            .collect::<Result<Vec<Filled>>>()?;
        let mut row = |case: &str, unit, aim, what: fn(&Filled) -> f64| -> Result<()> {
            let case = format!("{case}, {} x {ENDPOINTS}", number(size as f64));
            let values: Vec<f64> = all.iter().map(what).collect();
            eprintln!(
                "bench: service-tables: {case}: {:.1} {unit}",
                median(&values)
            );
            let case = Case {
                bench: "service-tables",
                case: &case,
                unit,
                aim,
            };
            rows.push(Row::alone(case, &values)?);
            Ok(())
        };
        row(
            "decoded Services into the kernel",
            "1/s",
            Aim::AtLeast(200_000.0),
            |one| one.rate,
        )?;
        row(
            "memory of the tables for each Service",
            "B",
            Aim::AtMost(1024.0),
            |one| one.bytes,
        )?;
        row("one endpoint's change", "µs", Aim::None, |one| one.change)?;
    }
    Ok(rows)
}

/// What one fill took.
struct Filled {
    /// Services per second.
    rate: f64,
    /// Bytes of each.
    bytes: f64,
    /// Microseconds of a change.
    change: f64,
}

fn fill(count: usize) -> Result<Filled> {
    // As the agent's maps are after they have grown to this.
    let entries = u32::try_from(count * 2)
        .context("too many Services")?
        .next_power_of_two();
    let room = Room {
        frontends: entries,
        chunks: entries,
        backends: entries * 8,
        ranges: 1024,
    };
    let maps = ServiceMaps::standalone(room)?;
    let before = allocated();
    let mut tables = Tables::new(maps, "node-1", Vec::new());
    let mut took = Duration::ZERO;
    for part in 0..count / PART {
        let all = (0..PART)
            .map(|one| objects(part * PART + one, ENDPOINTS))
            .collect::<Result<Vec<_>>>()?;
        let began = Instant::now();
        for (service, slice) in &all {
            tables.set_service(service);
            tables.set_slice(slice);
        }
        tables.sync(Instant::now())?;
        took += began.elapsed();
    }
    let bytes = allocated().saturating_sub(before);
    let used = tables.used().frontends as usize;
    ensure!(
        used == count,
        "{used} of {count} Services went into the kernel"
    );
    let mut changing = Duration::ZERO;
    for round in 0..CHANGES {
        let (_, slice) = objects(round % count, ENDPOINTS - 1 - round % 2)?;
        let began = Instant::now();
        tables.set_slice(&slice);
        tables.sync(Instant::now())?;
        changing += began.elapsed();
    }
    Ok(Filled {
        rate: count as f64 / took.as_secs_f64(),
        bytes: bytes as f64 / count as f64,
        change: changing.as_secs_f64() * 1e6 / CHANGES as f64,
    })
}

/// Bytes that are allocated, with what the allocator adds.
fn allocated() -> usize {
    // SAFETY: it only reads the allocator's counters.
    let info = unsafe { libc::mallinfo2() };
    info.uordblks + info.hblkhd
}

/// A Service with so many endpoints, none of which another has.
fn objects(index: usize, endpoints: usize) -> Result<(Service, EndpointSlice)> {
    let address = |base: u32, at: usize| -> Result<String> {
        let at = u32::try_from(at).context("too many addresses")?;
        Ok(IpAddr::from(Ipv4Addr::from_bits(base + at)).to_string())
    };
    let name = format!("service-{index}");
    let service = json!({
        "metadata": {
            "namespace": "default", "name": name,
            "uid": "0b8a2c1e-5a63-4a3b-9c52-0d3c1f0e9a11", "creationTimestamp": "2026-01-01T00:00:00Z",
        },
        "spec": {
            "clusterIPs": [address(0x0a60_0001, index)?],
            "ports": [{"name": "http", "port": 80, "targetPort": 8080}],
        },
    });
    let mut ends = Vec::with_capacity(endpoints);
    for at in 0..endpoints {
        let all = index * ENDPOINTS + at;
        ends.push(json!({
            "addresses": [address(0x0b00_0001, all)?],
            "nodeName": format!("node-{}", all % 100), "zone": format!("z{}", all % 3),
            "conditions": {"ready": true, "serving": true, "terminating": false},
        }));
    }
    let slice = json!({
        "metadata": {
            "namespace": "default", "name": format!("{name}-x7k2p"),
            "labels": {"kubernetes.io/service-name": name},
        },
        "addressType": "IPv4", "endpoints": ends,
        "ports": [{"name": "http", "port": 8080, "protocol": "TCP"}],
    });
    Ok((
        serde_json::from_value(service).context("the Service was not understood")?,
        serde_json::from_value(slice).context("the EndpointSlice was not understood")?,
    ))
}
