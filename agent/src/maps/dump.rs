//! Reads Services and flows back from the kernel's maps, for the command line: one JSON object a line, as they are met.

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};
use std::ops::ControlFlow;

use anyhow::{Context, Result, bail};
use aya::maps::MapData;
use bytemuck::must_cast;
use bytes::Bytes;
use serde_json::{Value, json};
use tokio::sync::mpsc::Sender;
use xebec_dataplane_common::flow::{
    Flow, FlowKey, TURN_BACK, TURN_DIRECT, TURN_FORTH, TURN_LATE, ticks,
};
use xebec_dataplane_common::ip::Ip;
use xebec_dataplane_common::nat::Tuple;
use xebec_dataplane_common::service::{
    Backend, CHUNK, Chunk, DIRECT_RETURN, DROP_INSIDE, DROP_OUTSIDE, EXTERNAL, Frontend,
    FrontendKey, HASH_INSIDE, HASH_OUTSIDE, KEEP_SOURCE, ON_THIS_NODE, Run, SOURCE_RANGES,
    THIS_NODE,
};
use xebec_dataplane_common::{ICMP, ICMP6, SCTP, TCP, UDP};

use super::batch;
use super::flow_table::FlowTable;
use crate::bpf_maps;

/// Lines are sent on in pieces of this many bytes.
const PIECE: usize = 32 << 10;

/// What is read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum What {
    /// Frontends with their backends.
    Services,
    /// All flows.
    Flows,
    /// Flows that are translated.
    Translations,
}

/// Which entries are told.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Filter {
    address: Option<IpAddr>,
    port: Option<u16>,
}

impl Filter {
    /// From `address=` and `port=` of a query.
    pub fn parse(query: &str) -> Result<Self> {
        let mut filter = Self::default();
        for (key, value) in form_urlencoded::parse(query.as_bytes()) {
            match key.as_ref() {
                "address" => {
                    let address = value.parse();
                    let address: IpAddr =
                        address.with_context(|| format!("address {value:?} is no IP address"))?;
                    filter.address = Some(address.to_canonical());
                }
                "port" => {
                    let port = value.parse();
                    filter.port = Some(port.with_context(|| format!("port {value:?} is no port"))?);
                }
                other => bail!("{other:?} is not known; address and port are"),
            }
        }
        Ok(filter)
    }

    /// Whether one of these is asked for.
    fn passes(&self, mut ends: impl Iterator<Item = SocketAddr>) -> bool {
        if *self == Self::default() {
            return true;
        }
        ends.any(|end| {
            self.address.is_none_or(|address| address == end.ip())
                && self.port.is_none_or(|port| port == end.port())
        })
    }
}

/// Sends lines on in pieces.
struct Lines {
    out: Sender<Bytes>,
    piece: Vec<u8>,
}

impl Lines {
    /// Breaks when nobody reads any more.
    fn put(&mut self, row: &Value) -> ControlFlow<()> {
        self.piece.extend_from_slice(row.to_string().as_bytes());
        self.piece.push(b'\n');
        if self.piece.len() >= PIECE {
            return self.flush();
        }
        ControlFlow::Continue(())
    }

    fn flush(&mut self) -> ControlFlow<()> {
        let piece = Bytes::from(std::mem::take(&mut self.piece));
        match self.out.blocking_send(piece) {
            Ok(()) => ControlFlow::Continue(()),
            Err(_) => ControlFlow::Break(()),
        }
    }
}

/// Reads until the end, or until nobody listens; a failure is the last line. It blocks.
pub(crate) fn read(what: What, filter: Filter, out: Sender<Bytes>) {
    let mut lines = Lines {
        out,
        piece: Vec::new(),
    };
    let outcome = match what {
        What::Services => services(filter, &mut lines),
        What::Flows | What::Translations => flows(what, filter, &mut lines),
    };
    if let Err(error) = outcome {
        let _ = lines.put(&json!({"error": format!("{error:#}")}));
    }
    let _ = lines.flush();
}

/// A protocol's name, or its number where it has none here.
fn protocol(number: u8) -> String {
    match number {
        TCP => "TCP".into(),
        UDP => "UDP".into(),
        SCTP => "SCTP".into(),
        ICMP => "ICMP".into(),
        ICMP6 => "ICMPv6".into(),
        other => other.to_string(),
    }
}

fn socket(address: Ip, port: u16) -> SocketAddr {
    SocketAddr::new(address.into(), u16::from_be(port))
}

/// The maps of Services, for reading.
struct Balancer {
    slots: MapData,
    backends: MapData,
}

impl Balancer {
    /// The backends of a run: for each number its entry, and how many of the slots are its.
    fn run(&self, run: Run) -> Result<Vec<(u32, Backend, usize)>> {
        let chunks = (run.count as usize).div_ceil(CHUNK);
        let chunks: Vec<Chunk> = batch::range(&self.slots, run.first, chunks as u32)?;
        let mut shares: BTreeMap<u32, usize> = BTreeMap::new();
        for slot in chunks.as_flattened().iter().take(run.count as usize) {
            *shares.entry(*slot).or_default() += 1;
        }
        let entry = |(number, slots)| {
            let found: Vec<[u8; 24]> = batch::range(&self.backends, number, 1)?;
            let found = found.first().context("a backend is beyond the map's end")?;
            Ok((number, must_cast(*found), slots))
        };
        shares.into_iter().map(entry).collect()
    }
}

/// The names of a frontend's flags.
fn flags(flags: u32) -> Vec<&'static str> {
    [
        (EXTERNAL, "external"),
        (HASH_INSIDE, "hash-inside"),
        (HASH_OUTSIDE, "hash-outside"),
        (SOURCE_RANGES, "source-ranges"),
        (KEEP_SOURCE, "keep-source"),
        (DROP_INSIDE, "drop-inside"),
        (DROP_OUTSIDE, "drop-outside"),
        (DIRECT_RETURN, "direct-return"),
        (THIS_NODE, "this-node"),
    ]
    .iter()
    .filter(|(flag, _)| flags & flag != 0)
    .map(|(_, name)| *name)
    .collect()
}

fn services(filter: Filter, lines: &mut Lines) -> Result<()> {
    let balancer = Balancer {
        slots: bpf_maps::open("SLOTS")?,
        backends: bpf_maps::open("BACKENDS")?,
    };
    let mut failed = None;
    batch::entries::<[u8; 20], [u8; 28]>(
        &bpf_maps::open("FRONTENDS")?,
        |key, value| match frontend(must_cast(*key), must_cast(*value), &balancer, filter) {
            Ok(Some(row)) => lines.put(&row),
            Ok(None) => ControlFlow::Continue(()),
            Err(error) => {
                failed = Some(error);
                ControlFlow::Break(())
            }
        },
    )?;
    failed.map_or(Ok(()), Err)
}

/// The row of a frontend, if it or one of its backends is asked for.
fn frontend(
    key: FrontendKey,
    value: Frontend,
    balancer: &Balancer,
    filter: Filter,
) -> Result<Option<Value>> {
    let at = socket(key.address, key.port);
    let inside = balancer.run(value.inside)?;
    let outside = if value.outside == value.inside {
        inside.clone()
    } else {
        balancer.run(value.outside)?
    };
    let backends = inside.iter().chain(&outside);
    let ends = backends.map(|(_, backend, _)| socket(backend.address, backend.port));
    if !filter.passes(std::iter::once(at).chain(ends)) {
        return Ok(None);
    }
    let rows = |run: &[(u32, Backend, usize)]| -> Vec<Value> {
        run.iter()
            .map(|(number, backend, slots)| {
                json!({
                    "backend": socket(backend.address, backend.port).to_string(),
                    "number": number,
                    "slots": slots,
                    "generation": backend.generation,
                    "present": backend.is(backend.generation),
                    "local": backend.flags & ON_THIS_NODE != 0,
                })
            })
            .collect()
    };
    Ok(Some(json!({
        "frontend": format!("{at}/{}", protocol(key.protocol)),
        "number": value.service,
        "flags": flags(value.flags),
        "affinity_seconds": value.affinity,
        "inside": rows(&inside),
        "outside": rows(&outside),
    })))
}

/// The tuple of a flow's packets: of its beginner's, or of the replies.
fn tuple(key: &FlowKey, from_low: bool) -> Tuple {
    let mut up = Tuple {
        source: key.low,
        destination: key.high,
        source_port: key.low_port,
        destination_port: key.high_port,
        protocol: key.protocol,
        pad: [0; 3],
    };
    if !from_low {
        up = reversed(&up);
    }
    up
}

/// The tuple of the packets that answer.
fn reversed(tuple: &Tuple) -> Tuple {
    let mut answer = *tuple;
    tuple.reverse(&mut answer);
    answer
}

/// The row of a flow at this moment (in ticks), if it is asked for.
fn flow(key: &FlowKey, flow: &Flow, now: u32, what: What, filter: Filter) -> Option<Value> {
    let forth = tuple(key, flow.from_low != 0);
    let turned = match flow.turn & (TURN_FORTH | TURN_BACK) {
        // Its packets go to the backend's node as they are, and their translation is that node's.
        TURN_FORTH if flow.turn & TURN_DIRECT != 0 => Some(("dsr", forth)),
        TURN_FORTH => Some(("forward", forth)),
        TURN_BACK => Some(("reply", reversed(&forth))),
        _ => None,
    };
    if what == What::Translations && turned.is_none() {
        return None;
    }
    let ends = |tuple: &Tuple| {
        [
            socket(tuple.source, tuple.source_port),
            socket(tuple.destination, tuple.destination_port),
        ]
    };
    let becomes = turned.map(|_| ends(&flow.to));
    if !filter.passes(
        ends(&forth)
            .into_iter()
            .chain(becomes.into_iter().flatten()),
    ) {
        return None;
    }
    let state = if flow.is_forgotten(key.protocol, now) {
        "expired"
    } else if flow.closed != 0 {
        "closed"
    } else {
        "open"
    };
    let mut row = json!({
        "protocol": protocol(key.protocol),
        "source": socket(forth.source, forth.source_port).to_string(),
        "destination": socket(forth.destination, forth.destination_port).to_string(),
        "state": state,
        // Ticks are a little longer than seconds.
        "idle_seconds": (u64::from(flow.idle(now)) << 30) / 1_000_000_000,
        "rule": flow.rule,
        "service": flow.service,
        "backend": flow.backend,
    });
    if let (Some((direction, of)), Some([source, destination])) = (turned, becomes) {
        row["translation"] = json!({
            "direction": direction,
            "hook": if flow.turn & TURN_LATE != 0 { "egress" } else { "ingress" },
            "source": socket(of.source, of.source_port).to_string(),
            "destination": socket(of.destination, of.destination_port).to_string(),
            "new_source": source.to_string(),
            "new_destination": destination.to_string(),
        });
    }
    Some(row)
}

fn flows(what: What, filter: Filter, lines: &mut Lines) -> Result<()> {
    let clock = nix::time::clock_gettime(nix::time::ClockId::CLOCK_MONOTONIC)
        .context("could not read the clock")?;
    let now = ticks(std::time::Duration::from(clock).as_nanos() as u64);
    FlowTable::open()?.each(|key, value| match flow(key, value, now, what, filter) {
        Some(row) => lines.put(&row),
        None => ControlFlow::Continue(()),
    });
    Ok(())
}

#[cfg(test)]
mod tests {
    use bytemuck::Zeroable;

    use super::*;

    fn ip(text: &str) -> Ip {
        text.parse::<IpAddr>().unwrap().into()
    }

    /// A client's connection to a node port as it is before translation: the frontend has the lower port.
    fn node_port() -> (FlowKey, Flow) {
        let before = Tuple {
            source: ip("192.0.2.9"),
            destination: ip("192.0.2.1"),
            source_port: 40_000_u16.to_be(),
            destination_port: 30_080_u16.to_be(),
            protocol: TCP,
            pad: [0; 3],
        };
        let (key, up) = FlowKey::new(&before);
        let mut flow = Flow::zeroed();
        flow.from_low = up.into();
        flow.turn = TURN_FORTH;
        flow.seen = 100;
        flow.service = 7;
        flow.backend = 3;
        flow.to = Tuple {
            source: ip("192.0.2.1"),
            destination: ip("10.244.1.5"),
            source_port: 61_000_u16.to_be(),
            destination_port: 80_u16.to_be(),
            protocol: TCP,
            pad: [0; 3],
        };
        (key, flow)
    }

    #[test]
    fn a_translated_flow_tells_both_sides() {
        let (key, value) = node_port();
        let row = flow(&key, &value, 102, What::Translations, Filter::default()).unwrap();
        assert_eq!(
            row,
            json!({
                "protocol": "TCP", "source": "192.0.2.9:40000", "destination": "192.0.2.1:30080", "state": "open",
                "idle_seconds": 2, "rule": 0, "service": 7, "backend": 3,
                "translation": {
                    "direction": "forward", "hook": "ingress",
                    "source": "192.0.2.9:40000", "destination": "192.0.2.1:30080",
                    "new_source": "192.0.2.1:61000", "new_destination": "10.244.1.5:80",
                },
            })
        );
        let mut back = value;
        back.turn = TURN_BACK | TURN_LATE;
        let row = flow(&key, &back, 102, What::Flows, Filter::default()).unwrap();
        assert_eq!(row["translation"]["direction"], "reply");
        assert_eq!(row["translation"]["hook"], "egress");
        assert_eq!(row["translation"]["source"], "192.0.2.1:30080");
        let mut direct = value;
        direct.turn = TURN_FORTH | TURN_DIRECT;
        let row = flow(&key, &direct, 102, What::Flows, Filter::default()).unwrap();
        assert_eq!(row["translation"]["direction"], "dsr");
        assert_eq!(row["translation"]["new_destination"], "10.244.1.5:80");
    }

    #[test]
    fn flows_are_told_by_what_is_asked_for() {
        let (key, value) = node_port();
        let told = |what: What, query: &str| {
            flow(&key, &value, 102, what, Filter::parse(query).unwrap()).is_some()
        };
        for query in [
            "",
            "address=192.0.2.9",
            "port=30080",
            "address=10.244.1.5&port=80",
            "address=::ffff:10.244.1.5",
        ] {
            assert!(told(What::Flows, query), "{query}");
        }
        for query in ["address=10.9.9.9", "port=81", "address=192.0.2.9&port=80"] {
            assert!(!told(What::Flows, query), "{query}");
        }
        let mut plain = value;
        plain.turn = 0;
        assert!(flow(&key, &plain, 102, What::Translations, Filter::default()).is_none());
        let row = flow(&key, &plain, 102, What::Flows, Filter::default()).unwrap();
        assert!(row.get("translation").is_none());
        for query in ["address=x", "port=70000", "pod=a"] {
            assert!(Filter::parse(query).is_err(), "{query}");
        }
    }

    #[test]
    fn old_and_closed_flows_are_named_so() {
        let (key, mut value) = node_port();
        let state = |value: &Flow, now: u32| {
            flow(&key, value, now, What::Flows, Filter::default()).unwrap()["state"].clone()
        };
        assert_eq!(
            state(&value, 100 + ticks(7 * 3_600 * 1_000_000_000)),
            "expired"
        );
        value.closed = 1;
        assert_eq!(state(&value, 101), "closed");
    }

    #[test]
    fn services_are_read_back_from_the_kernel() {
        use aya::maps::Array;
        if !nix::unistd::geteuid().is_root() {
            println!("skipped: it needs root");
            return;
        }
        // Room that no other test's maps have.
        let mut slots: Array<MapData, [u8; 64]> = Array::create(1_201, 0).unwrap();
        let mut backends: Array<MapData, [u8; 24]> = Array::create(1_202, 0).unwrap();
        let mut chunk: Chunk = [5; CHUNK];
        slots.set(3, must_cast::<_, [u8; 64]>(chunk), 0).unwrap();
        chunk[1] = 6;
        slots.set(4, must_cast::<_, [u8; 64]>(chunk), 0).unwrap();
        for (number, last, flags) in [(5, "10.0.0.5", ON_THIS_NODE), (6, "fd00::6", 0)] {
            let backend = Backend {
                address: ip(last),
                port: 8_080_u16.to_be(),
                flags,
                generation: 2 * number - 5,
            };
            backends
                .set(number, must_cast::<_, [u8; 24]>(backend), 0)
                .unwrap();
        }
        let open = |capacity| {
            let held = bpf_maps::held().unwrap();
            let map = held.iter().find(|map| map.capacity == capacity).unwrap();
            map.open().unwrap()
        };
        let balancer = Balancer {
            slots: open(1_201),
            backends: open(1_202),
        };
        let key = FrontendKey {
            address: ip("10.96.0.10"),
            port: 53_u16.to_be(),
            protocol: UDP,
            pad: 0,
        };
        let run = |first, count| Run { first, count };
        let value = Frontend {
            service: 9,
            flags: EXTERNAL | HASH_OUTSIDE,
            affinity: 10_800,
            inside: run(3, 18),
            outside: Run::default(),
        };
        let row = frontend(key, value, &balancer, Filter::default())
            .unwrap()
            .unwrap();
        assert_eq!(row["frontend"], "10.96.0.10:53/UDP");
        assert_eq!(row["flags"], json!(["external", "hash-outside"]));
        assert_eq!(
            row["inside"],
            json!([
                {"backend": "10.0.0.5:8080", "number": 5, "slots": 17, "generation": 5, "present": true, "local": true},
                {"backend": "[fd00::6]:8080", "number": 6, "slots": 1, "generation": 7, "present": true, "local": false},
            ])
        );
        assert_eq!(row["outside"], json!([]));
        let asked = |query: &str| {
            let filter = Filter::parse(query).unwrap();
            frontend(key, value, &balancer, filter).unwrap().is_some()
        };
        assert!(asked("address=fd00::6") && asked("port=53") && !asked("port=54"));
        let beyond = Frontend {
            inside: run(1_200, 17),
            ..value
        };
        assert!(frontend(key, beyond, &balancer, Filter::default()).is_err());
    }
}
