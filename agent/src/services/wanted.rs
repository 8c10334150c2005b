//! What frontends and runs of backends a Service, or a pod's host port, asks for on this node.

use std::net::IpAddr;

use ipnet::IpNet;
use xebec_dataplane_common::ip::Ip;
use xebec_dataplane_common::service::{
    DROP_INSIDE, DROP_OUTSIDE, EXTERNAL, FrontendKey, HASH_INSIDE, HASH_OUTSIDE, KEEP_SOURCE,
    SOURCE_RANGES, THIS_NODE,
};

use super::maglev::Candidate;
use super::pool::{LOCAL, Places};
use super::select::{Choice, Policy, READY, SERVING, TERMINATING, Traits, choose};
use super::view::{Algorithm, ServiceView, SliceView};
use crate::host_ports::HostPort;

/// What kind of address a frontend has.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Kind {
    ClusterIp,
    ExternalIp,
    LoadBalancer,
    NodePort,
    HostPort,
}

impl Kind {
    pub const fn name(self) -> &'static str {
        match self {
            Self::ClusterIp => "ClusterIP",
            Self::ExternalIp => "ExternalIP",
            Self::LoadBalancer => "LoadBalancer",
            Self::NodePort => "NodePort",
            Self::HostPort => "HostPort",
        }
    }
}

/// A frontend.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Front {
    pub key: FrontendKey,
    pub kind: Kind,
    pub flags: u32,
    /// Indexes of runs.
    pub inside: u8,
    pub outside: u8,
}

/// An endpoint of a port.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct End {
    pub ip: Ip,
    pub port: u16,
    pub traits: Traits,
    /// Number of its place, if it has one.
    pub place: u32,
}

impl End {
    /// How much an endpoint that is named twice is believed: one on this node most.
    fn rank(&self) -> (bool, bool, bool, bool) {
        let has = |bit| self.traits & bit != 0;
        (has(LOCAL), has(READY), has(SERVING), !has(TERMINATING))
    }
}

/// A run of slots: which endpoints, how often, and how one is chosen.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WantedRun {
    /// Of endpoints of this node alone.
    local: bool,
    pub algorithm: Algorithm,
    /// Indexes of endpoints, and their weights.
    pub members: Vec<(u32, u16)>,
}

/// All that one port of a Service asks for in one family.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Wanted {
    /// Index of the port.
    pub port: u16,
    pub number: u16,
    pub protocol: u8,
    pub v4: bool,
    pub affinity: u32,
    pub fronts: Vec<Front>,
    pub runs: Vec<WantedRun>,
    /// In order of their addresses.
    pub ends: Vec<End>,
    pub ranges: Vec<IpNet>,
}

fn key(address: Ip, port: u16, protocol: u8) -> FrontendKey {
    FrontendKey {
        address,
        port: port.to_be(),
        protocol,
        pad: 0,
    }
}

/// The endpoints of a port of a Service, each once, in order.
fn ends<'a>(
    slices: impl Iterator<Item = &'a SliceView>,
    places: &Places,
    name: &str,
    protocol: u8,
    v4: bool,
) -> Vec<End> {
    let mut all: Vec<End> = Vec::new();
    for slice in slices.filter(|slice| slice.is_v4() == v4) {
        let ports = slice.ports.iter();
        for port in ports.filter(|port| port.protocol == protocol && *port.name == *name) {
            all.extend(slice.endpoints().map(|(ip, place, state)| End {
                ip,
                port: port.port,
                traits: places.traits(place) | state,
                place,
            }));
        }
    }
    all.sort_unstable_by(|a, b| {
        let place = |end: &End| (end.ip.0.map(u32::from_be), end.port);
        place(a)
            .cmp(&place(b))
            .then_with(|| b.rank().cmp(&a.rank()))
            .then_with(|| a.place.cmp(&b.place))
    });
    all.dedup_by(|a, b| (a.ip, a.port) == (b.ip, b.port));
    all
}

/// Weights of the chosen ones. Where all are 0, nobody was meant to be left alone: they are equal.
fn weighted(chosen: &[u32], ends: &[End], view: &ServiceView) -> Vec<(u32, u16)> {
    let weights = &view.extra().weights;
    let of = |index: u32| {
        let ip = ends[index as usize].ip;
        weights.get(&ip).copied().unwrap_or(1)
    };
    if weights.is_empty() || chosen.iter().all(|index| of(*index) == 0) {
        return chosen.iter().map(|index| (*index, 1)).collect();
    }
    let with = chosen.iter().map(|index| (*index, of(*index)));
    with.filter(|(_, weight)| *weight > 0).collect()
}

/// Frontends of one port of a Service in one family, without what they lead to.
fn fronts(view: &ServiceView, index: usize, v4: bool) -> Vec<(Kind, FrontendKey)> {
    let port = &view.ports[index];
    let extra = view.extra();
    let mut all = Vec::with_capacity(1 + usize::from(port.node_port > 0));
    let mut add = |kind: Kind, ip: Ip, number: u16| {
        let key = key(ip, number, port.protocol);
        // The same address may stand in two lists.
        if all.iter().all(|(_, other)| *other != key) {
            all.push((kind, key));
        }
    };
    let cluster_ip = view.cluster_ips[usize::from(!v4)];
    add(Kind::ClusterIp, cluster_ip, port.port);
    for (kind, ips) in [
        (Kind::ExternalIp, &extra.external_ips),
        (Kind::LoadBalancer, &extra.load_balancer_ips),
    ] {
        for ip in ips.iter().filter(|ip| ip.is_v4() == v4) {
            add(kind, *ip, port.port);
        }
    }
    if port.node_port > 0 {
        let every = if v4 { Ip::EVERY_V4 } else { Ip::EVERY_V6 };
        add(Kind::NodePort, every, port.node_port);
    }
    all
}

/// What a Service asks for.
pub fn of_service<'a>(
    view: &ServiceView,
    slices: impl Iterator<Item = &'a SliceView> + Clone,
    places: &Places,
) -> Vec<Wanted> {
    let mut all: Vec<Wanted> = Vec::with_capacity(view.ports.len());
    let extra = view.extra();
    let inside = extra.algorithm.unwrap_or(Algorithm::Random);
    let outside = extra.algorithm.unwrap_or(Algorithm::Maglev);
    for (index, port) in view.ports.iter().enumerate() {
        for v4 in [true, false] {
            let twice = all.iter().any(|other| {
                (other.number, other.protocol, other.v4) == (port.port, port.protocol, v4)
            });
            if !view.cluster_ips[usize::from(!v4)].is_some() || twice {
                continue;
            }
            let fronts = fronts(view, index, v4);
            let policy = Policy {
                internal_local: view.internal_local,
                external_local: view.external_local,
                external: fronts.len() > 1,
            };
            let ends = ends(slices.clone(), places, &port.name, port.protocol, v4);
            let choice = choose(ends.iter().map(|end| end.traits), policy);
            let ranges: Vec<IpNet> = extra
                .ranges
                .iter()
                .filter(|block| matches!(block, IpNet::V4(_)) == v4)
                .copied()
                .collect();
            let mut wanted = Wanted {
                port: index as u16,
                number: port.port,
                protocol: port.protocol,
                v4,
                affinity: view.affinity,
                fronts: Vec::with_capacity(fronts.len()),
                runs: Vec::with_capacity(1),
                ends,
                ranges,
            };
            let fenced = !wanted.ranges.is_empty();
            // A frontend that two ports of a Service ask for is the first one's.
            let others = || all.iter().flat_map(|other| &other.fronts);
            let fronts = fronts.into_iter();
            for (kind, key) in fronts.filter(|(_, key)| others().all(|one| one.key != *key)) {
                wanted.add(kind, key, view, &choice, (inside, outside), fenced);
            }
            all.push(wanted);
        }
    }
    all
}

impl Wanted {
    fn add(
        &mut self,
        kind: Kind,
        key: FrontendKey,
        view: &ServiceView,
        choice: &Choice,
        (inside, outside): (Algorithm, Algorithm),
        fenced: bool,
    ) {
        let chosen = |local: bool| {
            if local {
                &choice.local
            } else {
                &choice.cluster
            }
        };
        let (ends, runs) = (&self.ends, &mut self.runs);
        // Index of a run, which is added where it is not there yet.
        let mut run = |local: bool, algorithm: Algorithm| {
            let mut those = runs.iter();
            let index = those.position(|one| (one.local, one.algorithm) == (local, algorithm));
            index.unwrap_or_else(|| {
                runs.push(WantedRun {
                    local,
                    algorithm,
                    members: weighted(chosen(local), ends, view),
                });
                runs.len() - 1
            }) as u8
        };
        let hash = |algorithm, flag| {
            if algorithm == Algorithm::Maglev {
                flag
            } else {
                0
            }
        };
        let mut flags = hash(inside, HASH_INSIDE);
        let missed = |local: bool, flag| {
            if chosen(local).is_empty() && choice.any {
                flag
            } else {
                0
            }
        };
        let (first, second) = if kind == Kind::ClusterIp {
            // Who is outside has no business here; who is sent here all the same is treated as if inside.
            let first = run(view.internal_local, inside);
            flags |= hash(inside, HASH_OUTSIDE)
                | missed(view.internal_local, DROP_INSIDE | DROP_OUTSIDE);
            (first, first)
        } else {
            // Who is in the cluster may go anywhere, whatever the policy for those outside.
            let first = run(false, inside);
            let second = run(view.external_local, outside);
            flags |= EXTERNAL
                | hash(outside, HASH_OUTSIDE)
                | missed(false, DROP_INSIDE)
                | missed(view.external_local, DROP_OUTSIDE);
            if view.external_local {
                flags |= KEEP_SOURCE;
            }
            if fenced && kind == Kind::LoadBalancer {
                flags |= SOURCE_RANGES;
            }
            (first, second)
        };
        self.fronts.push(Front {
            key,
            kind,
            flags,
            inside: first,
            outside: second,
        });
    }

    /// What Maglev's table is made of.
    pub fn candidates(&self, run: &WantedRun) -> Vec<Candidate> {
        let members = run.members.iter();
        members
            .map(|(index, weight)| {
                let end = &self.ends[*index as usize];
                Candidate {
                    ip: end.ip,
                    port: end.port,
                    weight: *weight,
                }
            })
            .collect()
    }
}

/// What a host port of a pod of this node asks for.
pub fn of_host_port(port: &HostPort) -> Vec<Wanted> {
    let ip = Ip::from(port.pod_ip);
    let v4 = port.pod_ip.is_ipv4();
    let all = if v4 { Ip::EVERY_V4 } else { Ip::EVERY_V6 };
    // `hostIP: 0.0.0.0` and `::` are written ways to say all.
    let host = port.host_ip.filter(|host: &IpAddr| !host.is_unspecified());
    if host.is_some_and(|host| host.is_ipv4() != v4) || port.host_port == 0 {
        return Vec::new();
    }
    let address = host.map_or(all, Ip::from);
    vec![Wanted {
        port: 0,
        number: port.host_port,
        protocol: port.protocol,
        v4,
        affinity: 0,
        fronts: vec![Front {
            key: key(address, port.host_port, port.protocol),
            kind: Kind::HostPort,
            flags: EXTERNAL | KEEP_SOURCE | THIS_NODE,
            inside: 0,
            outside: 0,
        }],
        runs: vec![WantedRun {
            local: true,
            algorithm: Algorithm::Random,
            members: vec![(0, 1)],
        }],
        ends: vec![End {
            ip,
            port: port.container_port,
            traits: LOCAL | READY | SERVING,
            place: u32::MAX,
        }],
        ranges: Vec::new(),
    }]
}
