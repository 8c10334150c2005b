//! `services`: rates and latencies through Services, each variant on a stage of its own, all of them round by round.
//!
//! The same two programs ask and answer everywhere, each on a core of its own. A size's stages exist side by side;
//! a round measures every variant once, so what the machine does meanwhile meets all. What the peers' rules don't
//! have (kube-proxy wrote them for Services of TCP without node ports) has the bare path as its only peer, and what
//! could not be measured is named.

use std::collections::BTreeMap;
use std::net::SocketAddrV4;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};

use super::list::{self, NODE_PORT, OUTSIDE, PORT, TARGET_PORT, unzipped};
use super::matrix::{Cell, Matrix};
use super::part::Part;
use super::stage::{self, NODE_IP, Stage, XebecStage, half_of_ports};
use super::wire::{Measured, Mode, Order};
use crate::row::{Aim, Case, Row, median};
use crate::{Effort, Outcome};

/// The least part of the bare path's rate.
const BESIDE_BARE: Aim = Aim::Ratio(0.95);
/// The least part of a peer's rate.
const BESIDE_PEER: Aim = Aim::Ratio(1.0);
/// The least part of the rate with one Service.
const FLAT: Aim = Aim::AtLeast(0.95);
/// The biggest size that there are rules of peers for.
const MOST_RULES: usize = 10_000;
/// How often a variant is tried before it counts as one that does not work.
const TRIES: usize = 2;
/// Transactions under way at the same time.
const ASKERS: usize = 1;

/// Who asks.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum Side {
    /// A pod of the node.
    Pod,
    /// A client outside the cluster.
    Outside,
}

/// What the node does.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum Way {
    /// Routes: the client asks a backend itself.
    Bare,
    /// kube-proxy's rules, iptables.
    Iptables,
    /// kube-proxy's rules, nftables.
    Nftables,
    /// Xebec, at the pod's sockets.
    Sockets,
    /// Xebec, at the packets.
    Packets,
}

impl Way {
    /// Its name in rows and tables.
    pub fn name(self) -> &'static str {
        match self {
            Self::Bare => "bare path",
            Self::Iptables => "kube-proxy 1.36.2 iptables",
            Self::Nftables => "kube-proxy 1.36.2 nftables",
            Self::Sockets => "socket LB",
            Self::Packets => "per packet",
        }
    }
}

/// What is measured, in the order of the table.
const MODES: [(Mode, &str); 3] = [
    (Mode::Crr, "connect/request/response"),
    (Mode::Rr, "request/response"),
    (Mode::Udp, "UDP request"),
];

/// One measured thing.
type Key = (Side, Way, usize);

/// Where a variant's client is, and what it asks.
struct Lane {
    side: Side,
    way: Way,
    /// By mode, as in [`MODES`]; none where there is nothing to ask.
    targets: [Option<SocketAddrV4>; 3],
    asker: Part,
}

impl Lane {
    /// Both of Xebec's ways from a pod are from the same pod: each gets ports of its own.
    fn ports(&self) -> Result<()> {
        match (self.side, self.way) {
            (Side::Pod, Way::Sockets) => half_of_ports(&self.asker, false),
            (Side::Pod, Way::Packets) => half_of_ports(&self.asker, true),
            _ => Ok(()),
        }
    }
}

/// All stages of one size.
#[derive(Default)]
struct Size {
    lanes: Vec<Lane>,
    stages: Vec<Stage>,
    xebec: Option<XebecStage>,
    notes: Vec<String>,
}

/// Measures at every size.
pub fn run(effort: Effort) -> Result<Outcome> {
    let (rounds, seconds) = effort.of((11, 0.5), (3, 0.3));
    let sizes: &[usize] = effort.of(&[1, 1_000, 10_000, 100_000], &[1, 1_000]);
    let mut rows = Vec::new();
    let mut matrix = Matrix::default();
    let mut at_one: BTreeMap<Key, f64> = BTreeMap::new();
    for &services in sizes {
        let mut size = Size::set(services)?;
        size.prove(services);
        let results = size.measure(services, rounds, seconds);
        matrix.notes.append(&mut size.notes);
        // Everything is taken down before the next size.
        drop(size);
        for (key, measured) in &results {
            let (side, way, mode) = *key;
            let bare = results.get(&(side, Way::Bare, mode));
            matrix.cells.push(Cell::new(
                MODES[mode].1,
                side,
                way,
                services,
                measured,
                bare.map(Vec::as_slice),
            ));
            if matches!(way, Way::Sockets | Way::Packets) {
                let flat = bare.map(|bare| median(&ratios(measured, bare)));
                rows.extend(judge(*key, services, measured, &results)?);
                if let (1, Some(ratio)) = (services, flat) {
                    at_one.insert(*key, ratio);
                } else if let (Some(one), Some(ratio)) = (at_one.get(key), flat) {
                    let case = format!("{}, against 1 Service", case_of(*key, services));
                    let case = Case {
                        bench: "services",
                        case: &case,
                        unit: "of its part of the bare path",
                        aim: FLAT,
                    };
                    rows.push(Row::alone(case, &[ratio / one])?);
                }
            }
        }
    }
    Ok(Outcome {
        rows,
        sections: vec![("services", matrix.markdown())],
        lines: matrix.lines()?,
    })
}

/// What a row is called.
fn case_of((side, way, mode): Key, services: usize) -> String {
    let through = match (side, way) {
        (Side::Outside, _) => "NodePort from outside",
        (_, Way::Sockets) => "ClusterIP, socket LB",
        _ => "ClusterIP, per packet",
    };
    let services = crate::row::number(services as f64);
    let plural = if services == "1" { "" } else { "s" };
    format!("{}, {through}, {services} Service{plural}", MODES[mode].1)
}

/// What a note calls a variant.
fn named(key: Key, services: usize) -> String {
    match key.1 {
        Way::Sockets | Way::Packets => case_of(key, services),
        peer => format!(
            "{}, {}, {} Services",
            MODES[key.2].1,
            peer.name(),
            crate::row::number(services as f64)
        ),
    }
}

fn ratios(measured: &[Measured], bare: &[Measured]) -> Vec<f64> {
    measured
        .iter()
        .zip(bare)
        .map(|(ours, bare)| ours.rate / bare.rate)
        .collect()
}

/// Ours beside the bare path and each peer.
fn judge(
    key: Key,
    services: usize,
    ours: &[Measured],
    results: &BTreeMap<Key, Vec<Measured>>,
) -> Result<Vec<Row>> {
    let mut rows = Vec::new();
    let (side, _, mode) = key;
    for (way, aim) in [
        (Way::Bare, BESIDE_BARE),
        (Way::Iptables, BESIDE_PEER),
        (Way::Nftables, BESIDE_PEER),
    ] {
        let Some(peer) = results.get(&(side, way, mode)) else {
            continue;
        };
        let rounds: Vec<(f64, f64)> = ours
            .iter()
            .zip(peer)
            .map(|(ours, peer)| (ours.rate, peer.rate))
            .collect();
        let case = Case {
            bench: "services",
            case: &case_of(key, services),
            unit: "1/s",
            aim,
        };
        rows.push(Row::paired(case, way.name(), &rounds)?);
    }
    Ok(rows)
}

impl Size {
    /// Sets every stage; what can't be set is left out and named.
    fn set(services: usize) -> Result<Self> {
        let mut size = Self::default();
        let backend = Some(SocketAddrV4::new(list::backend(2), TARGET_PORT));
        let mut bare = Stage::new()?;
        let pod = bare.plain_pod()?;
        size.add(Side::Pod, Way::Bare, [backend; 3], pod);
        let outside = bare.take_outside()?;
        size.add(Side::Outside, Way::Bare, [backend; 3], outside);
        size.stages.push(bare);
        let first = Some(stage::first_service(services)?);
        for way in [Way::Iptables, Way::Nftables] {
            if services > MOST_RULES {
                continue;
            }
            match peer(way, services) {
                Ok((stage, pod)) => {
                    // The rules have no UDP and no node ports.
                    size.add(Side::Pod, way, [first, first, None], pod);
                    size.stages.push(stage);
                }
                Err(error) => size.note(services, way.name(), &error),
            }
        }
        if let Err(error) = size.set_xebec(services, first) {
            size.note(services, "Xebec", &error);
        }
        Ok(size)
    }

    fn set_xebec(&mut self, services: usize, first: Option<SocketAddrV4>) -> Result<()> {
        let begun = Instant::now();
        let mut xebec = XebecStage::new("services", services, list::BACKENDS.count())?;
        let loaded = begun.elapsed().as_secs_f64();
        xebec.start_agent(false)?;
        let (mut with, without) = xebec.agent_pod()?;
        if let Some(first) = first {
            // Its Services may come after its pods.
            super::change::watch(&mut with, first, None, 120.0, || Ok(()))?;
        }
        eprintln!(
            "bench: services: {services} Services written in {loaded:.1} s, the pod reaches them after {:.1} s",
            begun.elapsed().as_secs_f64() - loaded
        );
        let cluster = [first, first, Some(SocketAddrV4::new(OUTSIDE, PORT))];
        let node_port = Some(SocketAddrV4::new(NODE_IP, NODE_PORT));
        let outside = xebec.stage.take_outside()?;
        self.add(Side::Pod, Way::Sockets, cluster, with);
        self.add(Side::Pod, Way::Packets, cluster, without);
        self.add(Side::Outside, Way::Packets, [node_port; 3], outside);
        self.xebec = Some(xebec);
        Ok(())
    }

    fn add(&mut self, side: Side, way: Way, targets: [Option<SocketAddrV4>; 3], asker: Part) {
        self.lanes.push(Lane {
            side,
            way,
            targets,
            asker,
        });
    }

    fn note(&mut self, services: usize, what: &str, error: &anyhow::Error) {
        let note = format!("{what}, {services} Services: {error:#}");
        eprintln!("bench: services: {note}");
        self.notes.push(note);
    }

    /// Takes out what does not answer at all, before anything counts.
    fn prove(&mut self, services: usize) {
        let mut notes = Vec::new();
        for lane in &mut self.lanes {
            // What one way leaves behind at the servers, the other would run into.
            if let Err(error) = lane.ports() {
                let what = format!("{:?}, {}", lane.side, lane.way.name());
                notes.push(format!("{what}: no ports of its own: {error:#}"));
                lane.targets = [None; 3];
            }
            for (mode, target) in lane.targets.iter_mut().enumerate() {
                let Some(address) = *target else { continue };
                let order = order(mode, address, 0.1);
                let mut outcome = lane.asker.ask::<Measured>(&order);
                for _ in 1..TRIES {
                    if outcome.is_ok() {
                        break;
                    }
                    std::thread::sleep(Duration::from_millis(100));
                    outcome = lane.asker.ask::<Measured>(&order);
                }
                if let Err(error) = outcome {
                    let what = named((lane.side, lane.way, mode), services);
                    notes.push(format!("{what}: not there yet ({error:#})"));
                    *target = None;
                }
            }
        }
        for note in notes {
            eprintln!("bench: services: {note}");
            self.notes.push(note);
        }
    }

    /// Every variant once a round; one that fails within is left out from then on, and named.
    fn measure(
        &mut self,
        services: usize,
        rounds: usize,
        seconds: f64,
    ) -> BTreeMap<Key, Vec<Measured>> {
        let mut results: BTreeMap<Key, Vec<Measured>> = BTreeMap::new();
        for round in 0..rounds {
            for (mode, (_, words)) in MODES.iter().enumerate() {
                let mut line = String::new();
                let mut notes = Vec::new();
                for lane in &mut self.lanes {
                    let Some(address) = lane.targets[mode] else {
                        continue;
                    };
                    let key = (lane.side, lane.way, mode);
                    let outcome = lane
                        .ports()
                        .and_then(|()| lane.asker.ask::<Measured>(&order(mode, address, seconds)));
                    match outcome {
                        Ok(measured) => {
                            line +=
                                &format!(" {:?} {:?} {:.0}/s;", lane.side, lane.way, measured.rate);
                            results.entry(key).or_default().push(measured);
                        }
                        Err(error) => {
                            lane.targets[mode] = None;
                            results.remove(&key);
                            notes.push(format!(
                                "{}: given up in round {}: {error:#}",
                                named(key, services),
                                round + 1
                            ));
                        }
                    }
                }
                eprintln!(
                    "bench: services: {services}, {words}, {}/{rounds}:{line}",
                    round + 1
                );
                self.notes.append(&mut notes);
            }
        }
        results
    }
}

fn order(mode: usize, address: SocketAddrV4, seconds: f64) -> Order {
    Order::Measure {
        mode: MODES[mode].0,
        address,
        seconds,
        askers: ASKERS,
    }
}

/// A node with the rules that kube-proxy wrote for so many Services.
fn peer(way: Way, services: usize) -> Result<(Stage, Part)> {
    let (file, program, words): (_, _, &[&str]) = match way {
        Way::Nftables => ("nftables.rules.gz", "nft", &["-f", "-"]),
        _ => ("iptables.rules.gz", "iptables-legacy-restore", &[]),
    };
    let path = list::rule_sets().join(format!("{services}/{file}"));
    ensure!(
        path.exists(),
        "there is no {} (XEBEC_BENCH_KUBE_PROXY names the folder of kube-proxy's rule sets)",
        path.display()
    );
    let stage = Stage::new()?;
    let pod = stage.plain_pod()?;
    let begun = Instant::now();
    stage
        .feed(program, words, &unzipped(&path)?)
        .with_context(|| format!("could not load {}", path.display()))?;
    eprintln!(
        "bench: services: rules of {} loaded in {:.1} s",
        path.display(),
        begun.elapsed().as_secs_f64()
    );
    Ok((stage, pod))
}
