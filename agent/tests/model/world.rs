//! The tables of a random run, in the model and in the kernel alike.

use std::net::IpAddr;

use rand::rngs::StdRng;
use rand::seq::{IndexedRandom, IteratorRandom};
use rand::{Rng, SeedableRng};

use xebec_dataplane_common::ip::Ip;
use xebec_dataplane_common::nat::{DIRECT_TCP, DIRECT_UDP, Settings};
use xebec_dataplane_common::policy::{
    Chains, NO_SHAPE, RuleKey, SET_DENIES, SET_FIRST, SHAPE_IDENTITY, SHAPE_PROTOCOL, SHAPES, Set,
};
use xebec_dataplane_common::service::{
    DROP_INSIDE, DROP_OUTSIDE, ENDING, EXTERNAL, HASH_INSIDE, HASH_OUTSIDE,
};
use xebec_policy::kernel::{Endpoint, PolicyKernel};

use super::rules::{Backend, Ends, Frontend, Model, Pod};
use super::traffic::flow_key;
use crate::packets::kernel::ALLOWS;
use crate::packets::{FAMILIES, Family, Front, Kernel, POD_MAC, at, far_node, node, settings};

/// Pods of a node.
pub const PODS: usize = 3;

/// Pods' addresses: those of IPv4, then those of IPv6.
pub fn pod_address(index: usize) -> IpAddr {
    at(
        FAMILIES[index / PODS],
        [10, 244, 0, 5 + (index % PODS) as u8],
    )
}

pub fn far_pod(family: Family, index: u8) -> IpAddr {
    at(family, [10, 244, 1, 1 + index])
}

/// A backend outside of the cluster.
pub fn outsider(family: Family) -> IpAddr {
    at(family, [203, 0, 113, 77])
}

/// How many backends a family has, and one.
const BACKENDS: u32 = 12;

/// A frontend's address (none for node ports), port, and number of its Service.
pub fn frontends(family: Family) -> Vec<(Option<IpAddr>, u16, u32)> {
    let mut all = Vec::new();
    for index in 0..5 {
        all.push((
            Some(at(family, [10, 96, 0, 10 + index])),
            80,
            1 + u32::from(index),
        ));
    }
    for index in 0..3 {
        all.push((None, 30_080 + index, 11 + u32::from(index)));
    }
    all.push((Some(at(family, [203, 0, 113, 80])), 80, 21));
    all
}

pub struct World {
    pub model: Model,
    pub random: StdRng,
    devices: [u32; PODS],
    sets: u32,
}

impl World {
    pub fn new(kernel: &mut Kernel, devices: [u32; PODS], seed: u64) -> Self {
        kernel.reset();
        let around = seed % 2 == 1;
        let direct = match seed / 2 % 4 {
            0 => DIRECT_TCP,
            1 | 2 => DIRECT_TCP | DIRECT_UDP,
            _ => 0,
        };
        kernel.settings(Settings {
            around: around.into(),
            direct,
            ..settings(61_000, 4_536)
        });
        let mut world = Self {
            model: Model {
                now: 0,
                flows: Default::default(),
                pods: Vec::new(),
                nodes: Default::default(),
                identities: Default::default(),
                sets: Default::default(),
                generation: 1,
                backends: Default::default(),
                frontends: Default::default(),
                affinities: Default::default(),
                around,
                direct: [(DIRECT_TCP, 6), (DIRECT_TCP, 132), (DIRECT_UDP, 17)]
                    .into_iter()
                    .filter_map(|(kind, protocol)| (direct & kind != 0).then_some(protocol))
                    .collect(),
                native: Vec::new(),
                ports: 61_000..=65_535,
            },
            random: StdRng::seed_from_u64(seed),
            devices,
            sets: 20,
        };
        for family in FAMILIES {
            let model = &mut world.model;
            model.nodes.insert(node(family), true);
            model.nodes.insert(far_node(family), false);
            model.native.extend([node(family), far_node(family)]);
            model.identities.insert(node(family), 1);
            for index in 0..5 {
                let address = far_pod(family, index);
                model.identities.insert(address, 1100);
                model.native.push(address);
                kernel.policy().set_identity(address, 1100).unwrap();
            }
        }
        for index in 0..2 * PODS {
            let address = pod_address(index);
            let identity = 1000 + (index % PODS) as u32;
            world.model.native.push(address);
            world.model.identities.insert(address, identity);
            kernel.policy().set_identity(address, identity).unwrap();
            world.model.pods.push(Pod {
                address,
                identity,
                ingress: 0,
                egress: 0,
            });
            world.write_pod(kernel, index);
        }
        for family in FAMILIES {
            let base = base(family);
            for number in 1..BACKENDS {
                let address = match number {
                    1..=3 => pod_address((number - 1) as usize + (base / 100) as usize * PODS),
                    4..=8 => far_pod(family, (number - 4) as u8),
                    9 => node(family),
                    10 => far_node(family),
                    // Without a route to pods.
                    _ => outsider(family),
                };
                let backend = Backend {
                    end: (address, 8080),
                    generation: 1,
                    ending: false,
                };
                world.write_backend(kernel, base + number, backend);
            }
            for frontend in frontends(family) {
                world.new_frontend(kernel, family, frontend);
            }
        }
        world
    }

    fn write_pod(&self, kernel: &mut Kernel, index: usize) {
        let pod = &self.model.pods[index];
        let endpoint = Endpoint {
            ifindex: self.devices[index % PODS],
            identity: pod.identity,
            mac: POD_MAC,
            learns: false,
            reads_http: false,
            chains: Chains {
                ingress: [0, pod.ingress, 0, 0],
                egress: [pod.egress, 0, 0, 0],
                ..Chains::default()
            },
        };
        kernel.policy().set_endpoint(pod.address, endpoint).unwrap();
    }

    fn write_backend(&mut self, kernel: &mut Kernel, number: u32, backend: Backend) {
        let flags = if backend.ending { ENDING } else { 0 };
        kernel.backend(
            number,
            backend.end.0,
            backend.end.1,
            flags,
            backend.generation,
        );
        self.model.backends.insert(number, backend);
    }

    /// Writes a frontend with other backends.
    fn new_frontend(
        &mut self,
        kernel: &mut Kernel,
        family: Family,
        which: (Option<IpAddr>, u16, u32),
    ) {
        let (address, _, service) = which;
        let base = base(family);
        let there: Vec<u32> = (base + 1..base + BACKENDS)
            .filter(|number| self.model.backends[number].generation % 2 == 1)
            .collect();
        let random = &mut self.random;
        let run = |random: &mut StdRng| -> Vec<u32> {
            let count = match random.random_range(0..10) {
                0 => 0,
                1..4 => 1,
                _ => random.random_range(2..40),
            };
            (0..count)
                .filter_map(|_| there.choose(random).copied())
                .collect()
        };
        let external = address.is_none() || service == 21;
        let front = Frontend {
            service,
            affinity: matches!(service, 4 | 13 | 21),
            external,
            drop_inside: random.random_bool(0.5),
            drop_outside: random.random_bool(0.5),
            inside: run(random),
            outside: if external { run(random) } else { Vec::new() },
        };
        self.write_frontend(kernel, family, which, front);
    }

    fn write_frontend(
        &mut self,
        kernel: &mut Kernel,
        family: Family,
        which: (Option<IpAddr>, u16, u32),
        front: Frontend,
    ) {
        let (address, port, service) = which;
        let mut flags = self.random.random_range(0..4) * HASH_INSIDE;
        assert_eq!(HASH_INSIDE | HASH_OUTSIDE, 3);
        for (flag, set) in [
            (EXTERNAL, front.external),
            (DROP_INSIDE, front.drop_inside),
            (DROP_OUTSIDE, front.drop_outside),
        ] {
            if set {
                flags |= flag;
            }
        }
        let written = Front {
            service,
            flags,
            affinity: if front.affinity { 10_800 } else { 0 },
            inside: front.inside.clone(),
            outside: front.outside.clone(),
        };
        for protocol in [6, 17, 132] {
            kernel.front(key(family, address), port, protocol, &written);
            let key = (address, family == Family::V4, port, protocol);
            self.model.frontends.insert(key, front.clone());
        }
    }

    /// Changes something.
    pub fn change(&mut self, kernel: &mut Kernel) {
        let family = *FAMILIES.choose(&mut self.random).unwrap();
        match self.random.random_range(0..12) {
            0..3 => {
                let all = frontends(family);
                let which = *all.choose(&mut self.random).unwrap();
                self.new_frontend(kernel, family, which);
            }
            3 => {
                let (address, port, _) = *frontends(family).choose(&mut self.random).unwrap();
                for protocol in [6, 17, 132] {
                    kernel.no_front(key(family, address), port, protocol);
                    let key = (address, family == Family::V4, port, protocol);
                    self.model.frontends.remove(&key);
                }
            }
            4..7 => self.come_or_go(kernel, family),
            7 => {
                let number = base(family) + self.random.random_range(1..BACKENDS);
                let mut backend = self.model.backends[&number];
                backend.ending = !backend.ending;
                self.write_backend(kernel, number, backend);
            }
            8 if self.random.random_bool(0.5) => self.new_generation(kernel),
            8 => self.forget(kernel),
            _ => self.new_rules(kernel),
        }
    }

    fn come_or_go(&mut self, kernel: &mut Kernel, family: Family) {
        let number = base(family) + self.random.random_range(1..BACKENDS);
        let mut backend = self.model.backends[&number];
        let goes = backend.generation % 2 == 1;
        backend.generation += 1;
        backend.ending = false;
        // It is taken out of all runs first.
        for which in frontends(family) {
            let key = (which.0, family == Family::V4, which.1, 6);
            let Some(front) = self.model.frontends.get(&key) else {
                continue;
            };
            if goes && (front.inside.contains(&number) || front.outside.contains(&number)) {
                let mut front = front.clone();
                front.inside.retain(|other| *other != number);
                front.outside.retain(|other| *other != number);
                self.write_frontend(kernel, family, which, front);
            }
        }
        self.write_backend(kernel, number, backend);
    }

    /// A full table forgets an entry.
    fn forget(&mut self, kernel: &mut Kernel) {
        let mut keys: Vec<_> = self.model.flows.keys().copied().collect();
        // The same order each time.
        keys.sort_unstable();
        if let Some(key) = keys.choose(&mut self.random).copied() {
            self.model.flows.remove(&key);
            let (from, to, protocol) = key;
            let ends = Ends { from, to, protocol };
            assert!(kernel.tables().flows.remove(&flow_key(ends)));
        }
    }

    fn new_generation(&mut self, kernel: &mut Kernel) {
        self.model.generation += 1;
        let generation = self.model.generation;
        kernel.policy().set_generation(generation).unwrap();
    }

    /// Isolates a pod in one direction by other rules, or not at all.
    fn new_rules(&mut self, kernel: &mut Kernel) {
        let index = self.random.random_range(0..2 * PODS);
        let mut number = 0;
        if self.random.random_bool(0.6) {
            self.sets += 1;
            number = self.sets;
            let mut entries = Vec::new();
            for _ in 0..self.random.random_range(0..5) {
                let peers = [0, 0, 0, 1, 2, 1000, 1001, 1002, 1100];
                let peer = *peers.choose(&mut self.random).unwrap();
                let protocol = *[6, 6, 17, 17, 132].choose(&mut self.random).unwrap();
                let port = *[8080, 8080, 80, 53, 30_080, 4_000]
                    .choose(&mut self.random)
                    .unwrap();
                entries.push((peer, protocol, port));
                let shape = SHAPE_PROTOCOL | 16 | if peer == 0 { 0 } else { SHAPE_IDENTITY };
                let key = RuleKey {
                    set: number,
                    peer,
                    port: u16::to_be(port),
                    protocol,
                    shape,
                };
                kernel.policy().set_rules(&[(key, ALLOWS)]).unwrap();
            }
            let mut shapes = [NO_SHAPE; SHAPES];
            shapes[0] = SHAPE_PROTOCOL | 16;
            shapes[1] = SHAPE_PROTOCOL | SHAPE_IDENTITY | 16;
            let flags = SET_DENIES | SET_FIRST;
            kernel
                .policy()
                .set_set(number, Set { shapes, flags })
                .unwrap();
            self.model.sets.insert(number, entries);
        }
        let pod = &mut self.model.pods[index];
        match self.random.random_bool(0.5) {
            true => pod.ingress = number,
            false => pod.egress = number,
        }
        self.write_pod(kernel, index);
        if self.random.random_bool(0.7) {
            self.new_generation(kernel);
        }
    }

    /// One of some.
    pub fn any<T: Clone>(&mut self, from: impl IntoIterator<Item = T>) -> T {
        from.into_iter().choose(&mut self.random).unwrap()
    }
}

/// Where the numbers of a family's backends begin.
fn base(family: Family) -> u32 {
    match family {
        Family::V4 => 0,
        Family::V6 => 100,
    }
}

fn key(family: Family, address: Option<IpAddr>) -> Ip {
    address.map_or(Ip::from(node(family)).every(), Ip::from)
}
