//! The programs in the kernel with a few pods, to run packets through them.

use std::net::IpAddr;
use std::ops::{Deref, DerefMut};
use std::os::fd::{AsFd, OwnedFd};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use aya::TestRun;
use aya::programs::TestRunOptions;
use bytemuck::Zeroable;
use xebec_agent::loader::{Aggregation, By, Loaded, Maps, Sizes, Xdp};
use xebec_agent::maps::{PolicyMaps, ServiceKernel};
use xebec_agent::network::Device;
use xebec_dataplane_common::dns::Held;
use xebec_dataplane_common::flow::{Counters, Event, Flow, FlowKey, TURN_NONE};
use xebec_dataplane_common::ip::Ip;
use xebec_dataplane_common::nat::{BACK_BY_QUEUE, BACK_BY_TC, Settings, Tuple};
use xebec_dataplane_common::policy::{
    self, Chains, Decision, NO_SHAPE, RuleKey, SET_DENIES, SET_FIRST, SHAPE_PROTOCOL, SHAPES, Set,
    port_bits,
};
use xebec_dataplane_common::service::{
    Affinity, AffinityKey, Backend, CHUNK, EXTERNAL, Frontend, FrontendKey, OTHERS,
    OWN as OWN_ADDRESS, Run,
};
use xebec_policy::kernel::{Endpoint, PolicyKernel};

use super::table::{Flows, Place, Table};
use super::{FAMILIES, POD_MAC, Packet, far_node, node, pod, settings, web};

/// The loopback device stands for the pod's, and this for the web pod's.
const WEB_IFINDEX: u32 = 77;

/// A frontend of a Service, as tests write it down.
#[derive(Clone, Debug, Default)]
pub struct Front {
    pub service: u32,
    pub flags: u32,
    pub affinity: u32,
    pub inside: Vec<u32>,
    pub outside: Vec<u32>,
}

/// A block of addresses of a set or a Service: how many bits, then these.
type Block = [u32; 6];

/// The maps that are read or emptied.
pub struct Tables {
    pub flows: Flows,
    pub affinities: Table<AffinityKey, Affinity>,
    pub backends: Table<u32, Backend>,
    fragments: Table<[u32; 10], u32>,
    frontends: Table<FrontendKey, Frontend>,
    node_addresses: Table<Ip, u8>,
    endpoints: Table<Ip, policy::Endpoint>,
    pub identities: Place<Ip, policy::Known>,
    pub rules: Place<RuleKey, Decision>,
    ranges: Table<Block, u8>,
    cidrs: Table<Block, u32>,
    ways: Table<u32, [u8; 88]>,
    devices: Table<u32, u8>,
}

/// Loaded programs with two pods, a node, and a folder that goes with them.
pub struct Kernel {
    loaded: Loaded,
    maps: Maps,
    tables: Tables,
    dir: Option<Folder>,
    ifindex: u32,
    ingress_ifindex: u32,
    /// Devices and sets of the pod and the web pod.
    pods: [(u32, [u32; 2]); 2],
    /// Whether the pod's rules name domains.
    learns: bool,
    reads_http: bool,
    /// The generation of the rules.
    generation: u32,
    /// Services that were made.
    services: u32,
    /// The first chunk of slots that is not in use.
    chunks: u32,
    /// Counters at the beginning.
    base: Counters,
    /// Room for what a program makes of a frame.
    room: Vec<u8>,
    /// The mark that the last frame had then.
    mark: u32,
}

/// The one that tests take in turns.
static SHARED: Mutex<Option<Kernel>> = Mutex::new(None);

/// The kernel that all tests share, emptied.
pub struct Shared(MutexGuard<'static, Option<Kernel>>);

impl Deref for Shared {
    type Target = Kernel;

    fn deref(&self) -> &Kernel {
        self.0.as_ref().unwrap()
    }
}

impl DerefMut for Shared {
    fn deref_mut(&mut self) -> &mut Kernel {
        self.0.as_mut().unwrap()
    }
}

/// What an entry says that lets through.
pub const ALLOWS: Decision = Decision {
    verdict: 0,
    rule: 42,
};

/// Runs a program of tc on a frame: its verdict, the frame and its mark as they are then.
pub fn test_run(
    loaded: &mut Loaded,
    program: &str,
    context: &[u8; 192],
    frame: &[u8],
    room: &mut [u8],
) -> anyhow::Result<(u32, Vec<u8>, u32)> {
    let mut after = [0; 192];
    let mut options = TestRunOptions::new();
    options.data_in = Some(frame);
    options.data_out = Some(room);
    options.ctx_in = Some(context);
    options.ctx_out = Some(&mut after);
    let result = loaded.classifier(program)?.test_run(options)?;
    let mark = u32::from_ne_bytes([after[8], after[9], after[10], after[11]]);
    let out = room[..result.data_size_out as usize].to_vec();
    Ok((result.return_value, out, mark))
}

impl Kernel {
    /// The kernel that is loaded once for all tests, emptied; needs root.
    pub fn shared() -> Shared {
        super::wires::routed();
        let mut kernel = SHARED.lock().unwrap_or_else(PoisonError::into_inner);
        match &mut *kernel {
            Some(kernel) => kernel.reset(),
            none => {
                let mut new = Self::own();
                // It stays for as long as the process does, but its folder need not: nothing of it is pinned elsewhere.
                new.dir = None;
                *none = Some(new);
            }
        }
        Shared(kernel)
    }

    /// One that is the test's own, with a folder of pinned links; needs root.
    pub fn own() -> Self {
        // Tests empty it often, and none fills a part of it that would count.
        Self::with_sizes(Sizes {
            flows: 1 << 16,
            ..Sizes::default()
        })
    }

    /// The same with maps of these sizes.
    pub fn with_sizes(sizes: Sizes) -> Self {
        Self::with_aggregation(sizes, Aggregation::default())
    }

    /// The same with programs that put events together like this.
    pub fn with_aggregation(sizes: Sizes, aggregation: Aggregation) -> Self {
        let dir = Folder(tempfile::tempdir().unwrap());
        let mut loaded = Loaded::with_aggregation(dir.0.path(), sizes, aggregation).unwrap();
        let maps = loaded.maps().unwrap();
        let tables = tables(&mut loaded);
        let mut kernel = Self {
            loaded,
            maps,
            tables,
            dir: Some(dir),
            ifindex: 1,
            ingress_ifindex: 0,
            pods: [(1, [0; 2]), (WEB_IFINDEX, [0; 2])],
            learns: false,
            reads_http: false,
            generation: 0,
            services: 0,
            chunks: 1,
            base: Counters::zeroed(),
            room: vec![0; 4096],
            mark: 0,
        };
        kernel.fill();
        kernel
    }

    /// As if it had just been loaded.
    pub fn reset(&mut self) {
        let tables = &self.tables;
        tables.flows.clear();
        tables.affinities.clear();
        tables.fragments.clear();
        tables.frontends.clear();
        tables.node_addresses.clear();
        let endpoints = tables.endpoints.keys();
        tables.identities.now().clear();
        tables.rules.now().clear();
        tables.ranges.clear();
        tables.cidrs.clear();
        // Another namespace may have other routes.
        tables.ways.wipe();
        for number in 0..256 {
            tables.backends.set(&number, Backend::default());
        }
        for address in endpoints {
            self.policy().remove_endpoint(address.into()).unwrap();
        }
        (self.ifindex, self.ingress_ifindex) = (1, 0);
        self.pods = [(1, [0; 2]), (WEB_IFINDEX, [0; 2])];
        (self.services, self.chunks) = (0, 1);
        self.learns = false;
        self.reads_http = false;
        self.generation = 0;
        self.policy().set_host(Chains::default()).unwrap();
        self.listen(&[], Duration::ZERO);
        while self.event().is_some() || self.maps.domains.take().is_some() {}
        self.fill();
    }

    fn fill(&mut self) {
        self.base = self.maps.flows.count().unwrap();
        for family in FAMILIES {
            let services = &mut self.maps.services;
            services
                .set_node_address(node(family), OWN_ADDRESS)
                .unwrap();
            services.set_node_address(far_node(family), OTHERS).unwrap();
            for (address, identity) in [(pod(family), 1000), (web(family), 1001), (node(family), 1)]
            {
                self.policy().set_identity(address, identity).unwrap();
            }
        }
        for (block, node) in [
            ("10.244.0.0/24", "192.0.2.10"),
            ("10.244.1.0/24", "192.0.2.20"),
            ("192.0.2.10/32", "192.0.2.10"),
            ("192.0.2.20/32", "192.0.2.20"),
            ("fd00:10:244::/64", "fd00:192:0:2::10"),
            ("fd00:10:244:1::/64", "fd00:192:0:2::20"),
            ("fd00:192:0:2::10/128", "fd00:192:0:2::10"),
            ("fd00:192:0:2::20/128", "fd00:192:0:2::20"),
        ] {
            let (native, node) = (block.parse().unwrap(), node.parse().unwrap());
            self.maps.network.set_native(native, Some(node)).unwrap();
        }
        self.endpoints();
        self.serve(true);
        self.policy().set_generation(0).unwrap();
        self.settings(settings(61_000, 4_536));
    }

    pub fn policy(&mut self) -> &mut PolicyMaps {
        &mut self.maps.policy
    }

    pub fn maps(&mut self) -> &mut Maps {
        &mut self.maps
    }

    pub fn tables(&self) -> &Tables {
        &self.tables
    }

    pub fn settings(&mut self, settings: Settings) {
        self.maps.network.set_settings(settings).unwrap();
    }

    /// Whether the device to the outside has the hooks.
    pub fn serve(&mut self, yes: bool) {
        let Ok(index) = nix::net::if_::if_nametoindex("out0") else {
            return;
        };
        self.tables.devices.clear();
        self.tables.ways.wipe();
        if yes {
            self.tables.devices.set(&index, BACK_BY_TC);
        }
    }

    /// The device that packets come in by has XDP, too.
    pub fn serve_early(&mut self) {
        self.tables.devices.set(&self.ifindex, BACK_BY_QUEUE);
    }

    /// Writes who the pods are.
    fn endpoints(&mut self) {
        for family in FAMILIES {
            for (index, address) in [pod(family), web(family)].into_iter().enumerate() {
                let (ifindex, sets) = self.pods[index];
                let endpoint = Endpoint {
                    ifindex,
                    identity: 1000 + index as u32,
                    mac: POD_MAC,
                    learns: self.learns && index == 0,
                    reads_http: self.reads_http && index == 0,
                    chains: Chains {
                        ingress: [sets[0], 0, 0, 0],
                        egress: [0, 0, 0, sets[1]],
                        ..Chains::default()
                    },
                };
                self.policy().set_endpoint(address, endpoint).unwrap();
            }
        }
    }

    /// From here on the device is the web pod's.
    pub fn as_web(&mut self) {
        (self.pods[0].0, self.pods[1].0) = (WEB_IFINDEX, 1);
        self.endpoints();
    }

    /// From here on the device is the pod's.
    pub fn as_pod(&mut self) {
        (self.pods[0].0, self.pods[1].0) = (1, WEB_IFINDEX);
        self.endpoints();
    }

    /// The device on which the node received packets; 0 for its own.
    pub fn received_on(&mut self, ifindex: u32) {
        self.ingress_ifindex = ifindex;
    }

    fn set(&mut self, number: u32, protocol: u8, port: Option<u16>) {
        let shape = SHAPE_PROTOCOL | 16;
        if let Some(port) = port {
            let key = RuleKey {
                set: number,
                peer: 0,
                port: port_bits(port.to_be(), 16),
                protocol,
                shape,
            };
            self.policy().set_rules(&[(key, ALLOWS)]).unwrap();
        }
        let mut shapes = [NO_SHAPE; SHAPES];
        shapes[0] = shape;
        let flags = SET_DENIES | SET_FIRST;
        self.policy()
            .set_set(number, Set { shapes, flags })
            .unwrap();
    }

    fn isolate_web_as(&mut self, protocol: u8, port: u16) {
        self.tables.rules.now().clear();
        self.set(7, protocol, Some(port));
        self.pods[1].1[0] = 7;
        self.endpoints();
    }

    /// The web pod lets in this TCP port alone, by rule 42 of set 7.
    pub fn isolate_web(&mut self, port: u16) {
        self.isolate_web_as(6, port);
    }

    /// The web pod lets in this UDP port alone.
    pub fn isolate_web_udp(&mut self, port: u16) {
        self.isolate_web_as(17, port);
    }

    /// The web pod may send nothing.
    pub fn isolate_web_egress(&mut self) {
        self.set(8, 6, None);
        self.pods[1].1[1] = 8;
        self.endpoints();
    }

    /// The pod lets nothing in.
    pub fn isolate_pod(&mut self) {
        self.set(9, 6, None);
        self.pods[0].1 = [9, 0];
        self.endpoints();
    }

    /// The pod may send to this TCP port alone.
    pub fn isolate_pod_egress(&mut self, port: u16) {
        self.set(10, 6, Some(port));
        self.pods[0].1[1] = 10;
        self.endpoints();
    }

    /// The node lets in this TCP port alone, and sends to this one alone; any where none is told.
    pub fn isolate_host(&mut self, ingress: Option<u16>, egress: Option<u16>) {
        self.tables.rules.now().clear();
        let mut chains = Chains::default();
        for (number, port, chain) in [
            (11, ingress, &mut chains.ingress),
            (12, egress, &mut chains.egress),
        ] {
            if port.is_some() {
                self.set(number, 6, port);
                *chain = [0, 0, number, 0];
            }
        }
        self.policy().set_host(chains).unwrap();
        self.generation += 1;
        let generation = self.generation;
        self.policy().set_generation(generation).unwrap();
    }

    /// The pod's rules name domains.
    pub fn learn_domains(&mut self) {
        self.learns = true;
        self.endpoints();
    }

    /// What the pod speaks of HTTP is told of.
    pub fn read_http(&mut self) {
        self.reads_http = true;
        self.endpoints();
    }

    /// For a while answers from these ports are held for the pod.
    pub fn listen(&mut self, ports: &[u16], long: Duration) {
        self.maps.domains.listen(ports, long).unwrap();
    }

    /// The oldest answer that is held.
    pub fn held(&mut self) -> Option<Box<Held>> {
        self.maps.domains.take()
    }

    /// How many answers were held, and how many could not be.
    pub fn answers(&self) -> (u64, u64) {
        let now = self.maps.flows.count().unwrap();
        (now.held - self.base.held, now.unheld - self.base.unheld)
    }

    /// The pod is under no rules.
    pub fn open_pod(&mut self) {
        self.pods[0].1 = [0; 2];
        self.endpoints();
    }

    /// Writes a backend.
    pub fn backend(
        &mut self,
        number: u32,
        address: IpAddr,
        port: u16,
        flags: u16,
        generation: u32,
    ) {
        let backend = Backend {
            address: address.into(),
            port: port.to_be(),
            flags,
            generation,
        };
        self.maps
            .services
            .set_backends(&[(number, backend)])
            .unwrap();
    }

    fn run_of(&mut self, backends: &[u32]) -> Run {
        let first = self.chunks;
        for part in backends.chunks(CHUNK) {
            let mut chunk = [0; CHUNK];
            chunk[..part.len()].copy_from_slice(part);
            self.maps
                .services
                .set_chunks(&[(self.chunks, chunk)])
                .unwrap();
            self.chunks = (self.chunks + 1) % 16_000;
        }
        Run {
            first,
            count: backends.len() as u32,
        }
    }

    /// Writes a frontend.
    pub fn front(&mut self, address: Ip, port: u16, protocol: u8, front: &Front) {
        // A run lies side by side.
        if self.chunks + (front.inside.len() + front.outside.len()) as u32 / 16 + 2 > 16_000 {
            self.chunks = 1;
        }
        let value = Frontend {
            service: front.service,
            flags: front.flags,
            affinity: front.affinity,
            inside: self.run_of(&front.inside),
            outside: self.run_of(&front.outside),
        };
        self.maps
            .services
            .set_frontends(&[(front_key(address, port, protocol), value)])
            .unwrap();
    }

    /// A frontend of TCP, UDP and SCTP for all.
    pub fn service(&mut self, address: IpAddr, port: u16, front: &Front) {
        for protocol in [6, 17, 132] {
            self.front(address.into(), port, protocol, front);
        }
    }

    /// Removes a frontend.
    pub fn no_front(&mut self, address: Ip, port: u16, protocol: u8) {
        self.maps
            .services
            .remove_frontend(front_key(address, port, protocol))
            .unwrap();
    }

    /// A node port with one backend.
    pub fn node_port(&mut self, port: u16, backend: IpAddr, backend_port: u16) {
        let every = Ip::from(backend).every();
        self.open(every, port, 0, Some((backend, backend_port)));
    }

    /// A node port without backends.
    pub fn no_backends(&mut self, port: u16) {
        for every in [Ip::EVERY_V4, Ip::EVERY_V6] {
            self.open(every, port, 0, None);
        }
    }

    /// A new Service's address for pods and others, with one backend or none.
    pub fn open(
        &mut self,
        address: impl Into<Ip>,
        port: u16,
        flags: u32,
        backend: Option<(IpAddr, u16)>,
    ) {
        self.services += 1;
        let number = self.services;
        if let Some((address, port)) = backend {
            self.backend(number, address, port, 0, 1);
        }
        let backends: Vec<u32> = backend.iter().map(|_| number).collect();
        let front = Front {
            service: number,
            flags: EXTERNAL | flags,
            affinity: 0,
            inside: backends.clone(),
            outside: backends,
        };
        let address = address.into();
        for protocol in [6, 17, 132] {
            self.front(address, port, protocol, &front);
        }
    }

    /// The backend of the newest Service of `open` goes.
    pub fn end_backend(&mut self) {
        let gone = Backend {
            generation: 2,
            ..Backend::default()
        };
        let services = &mut self.maps.services;
        services.set_backends(&[(self.services, gone)]).unwrap();
    }

    /// From here on the pod is at this device, with the hooks.
    pub fn attach_pod(&mut self, device: &str) {
        self.pods[0].0 = nix::net::if_::if_nametoindex(device).unwrap();
        self.endpoints();
        self.loaded.attach_pod(device).unwrap();
    }

    /// Attaches the hooks of devices that lead outside.
    pub fn attach(&mut self, devices: &[Device], xdp: Xdp) -> anyhow::Result<Vec<By>> {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .unwrap();
        runtime.block_on(self.loaded.attach_network(devices, xdp))
    }

    /// The programs of an agent that comes after this one.
    pub fn next_agent(&mut self) {
        let dir = self.dir.as_ref().unwrap().0.path();
        self.loaded = Loaded::new(dir).unwrap();
        self.maps = self.loaded.maps().unwrap();
        self.tables = tables(&mut self.loaded);
    }

    /// How many translations are known, of both directions.
    pub fn translations(&self) -> usize {
        let entries = self.tables.flows.entries();
        let turned = entries.iter().filter(|(_, flow)| flow.turn != TURN_NONE);
        turned.count()
    }

    /// The entry of a packet's flow.
    pub fn flow(&self, packet: &Packet) -> Option<Flow> {
        self.tables.flows.get(&flow_key(packet))
    }

    /// Forgets the entry of a packet's flow.
    pub fn forget(&self, packet: &Packet) {
        assert!(self.tables.flows.remove(&flow_key(packet)), "{packet:?}");
    }

    /// Changes the entry of a packet's flow.
    pub fn change(&self, packet: &Packet, change: impl Fn(&mut Flow)) {
        let mut flow = self.flow(packet).unwrap();
        change(&mut flow);
        assert!(self.tables.flows.set(&flow_key(packet), flow));
    }

    /// Runs a program on a frame: its verdict and the frame as it is then.
    pub fn run(&mut self, program: &str, frame: &[u8]) -> (u32, Vec<u8>) {
        self.run_on(program, self.ifindex, self.ingress_ifindex, frame)
    }

    /// A program of tc, for whoever runs it by itself.
    pub fn program(&mut self, name: &str) -> OwnedFd {
        let program = self.loaded.classifier(name).unwrap();
        let descriptor = program.fd().unwrap().as_fd();
        descriptor.try_clone_to_owned().unwrap()
    }

    /// The same at a device, which must be one of this namespace, of a frame that was received by another.
    pub fn run_on(
        &mut self,
        program: &str,
        device: u32,
        received: u32,
        frame: &[u8],
    ) -> (u32, Vec<u8>) {
        self.run_marked(program, device, received, 0, frame)
    }

    /// The same of a frame with a mark.
    pub fn run_marked(
        &mut self,
        program: &str,
        device: u32,
        received: u32,
        mark: u32,
        frame: &[u8],
    ) -> (u32, Vec<u8>) {
        // struct __sk_buff of linux/bpf.h: mark, ingress_ifindex and ifindex are its third, tenth and eleventh words.
        let mut context = [0_u8; 192];
        context[8..12].copy_from_slice(&mark.to_ne_bytes());
        context[36..40].copy_from_slice(&received.to_ne_bytes());
        context[40..44].copy_from_slice(&device.to_ne_bytes());
        self.run_in(program, &context, frame)
            .unwrap_or_else(|error| panic!("{program}: {error}"))
    }

    /// The same of a frame of which only the first bytes are in one piece; none if this kernel can't make it.
    pub fn run_in_pieces(
        &mut self,
        program: &str,
        first: u32,
        frame: &[u8],
    ) -> Option<(u32, Vec<u8>)> {
        let mut context = [0_u8; 192];
        context[36..40].copy_from_slice(&self.ingress_ifindex.to_ne_bytes());
        context[40..44].copy_from_slice(&self.ifindex.to_ne_bytes());
        context[80..84].copy_from_slice(&first.to_ne_bytes());
        self.run_in(program, &context, frame).ok()
    }

    fn run_in(
        &mut self,
        program: &str,
        context: &[u8; 192],
        frame: &[u8],
    ) -> anyhow::Result<(u32, Vec<u8>)> {
        let run = test_run(&mut self.loaded, program, context, frame, &mut self.room)?;
        let (verdict, out, mark) = run;
        self.mark = mark;
        Ok((verdict, out))
    }

    /// Runs the XDP program on a frame that came by this device, or by the loopback device if that is 0.
    pub fn run_early(&mut self, device: u32, frame: &[u8]) -> (u32, Vec<u8>) {
        // struct xdp_md of linux/bpf.h: where the data ends, and the device, are its second and fourth words.
        let mut context = [0_u8; 24];
        context[4..8].copy_from_slice(&(frame.len() as u32).to_ne_bytes());
        context[12..16].copy_from_slice(&device.to_ne_bytes());
        let mut options = TestRunOptions::new();
        options.data_in = Some(frame);
        options.data_out = Some(&mut self.room);
        options.ctx_in = Some(&context);
        let result = self.loaded.express().unwrap().test_run(options).unwrap();
        let out = self.room[..result.data_size_out as usize].to_vec();
        (result.return_value, out)
    }

    /// The mark of the frame that the last program of tc left.
    pub fn mark(&self) -> u32 {
        self.mark
    }

    /// The oldest event that was not read yet.
    pub fn event(&mut self) -> Option<Event> {
        self.maps.flows.next_event()
    }

    /// The oldest message that was not read yet; events without one are left out.
    pub fn message(&mut self) -> Option<(Event, Box<[u8]>)> {
        loop {
            let report = self.maps.flows.next_report()?;
            if let Some(message) = report.message {
                return Some((report.event, message));
            }
        }
    }

    /// Events until a moment that is over, in ns of the monotonic clock.
    pub fn events_until(&mut self, until: u64, into: &mut Vec<Event>) {
        let mut reports = Vec::new();
        self.maps.flows.read(until, &mut reports);
        into.extend(reports.into_iter().map(|report| report.event));
    }

    /// The newest event.
    pub fn last_event(&mut self) -> Option<Event> {
        std::iter::from_fn(|| self.event()).last()
    }

    /// How many packets from the network tc and XDP translated.
    pub fn translated(&self) -> (u64, u64) {
        let now = self.maps.flows.count().unwrap();
        (
            now.translated - self.base.translated,
            now.translated_early - self.base.translated_early,
        )
    }

    /// All counters.
    pub fn counters(&self) -> Counters {
        self.maps.flows.count().unwrap()
    }

    /// Packets and bytes of all flows that no event has told of: the beginner's bytes in the lower half, the replies' in
    /// the upper.
    pub fn untold(&self) -> (u64, u64) {
        let entries = self.tables.flows.entries();
        let packets = entries.iter().map(|(_, flow)| u64::from(flow.packets));
        let timed = |flow: &Flow| flow.bytes & u64::from(u32::MAX);
        let bytes = entries.iter().map(|(_, flow)| match flow.timed {
            0 => flow.bytes,
            _ => timed(flow),
        });
        (packets.sum(), bytes.sum())
    }

    /// How many packets were dropped.
    pub fn dropped(&self) -> u64 {
        self.maps.flows.count().unwrap().dropped - self.base.dropped
    }

    /// Packets that were answered for Services without endpoints, and flows that got no port.
    pub fn refused(&self) -> (u64, u64) {
        let now = self.maps.flows.count().unwrap();
        (
            now.refused - self.base.refused,
            now.no_port - self.base.no_port,
        )
    }
}

/// A folder on which a BPF filesystem is mounted, until it is dropped.
struct Folder(tempfile::TempDir);

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = nix::mount::umount2(self.0.path(), nix::mount::MntFlags::MNT_DETACH);
    }
}

fn front_key(address: Ip, port: u16, protocol: u8) -> FrontendKey {
    FrontendKey {
        address,
        port: port.to_be(),
        protocol,
        pad: 0,
    }
}

/// The key of a packet's flow.
pub fn flow_key(packet: &Packet) -> FlowKey {
    let tuple = Tuple {
        source: packet.source.into(),
        destination: packet.destination.into(),
        source_port: packet.source_port.to_be(),
        destination_port: packet.destination_port.to_be(),
        protocol: packet.protocol(),
        pad: [0; 3],
    };
    FlowKey::new(&tuple).0
}

/// Finds the maps that the programs use.
fn tables(loaded: &mut Loaded) -> Tables {
    let mut numbers = Vec::new();
    for name in ["xebec_from_pod", "xebec_from_network", "xebec_to_network"] {
        let info = loaded.classifier(name).unwrap().info().unwrap();
        numbers.extend(info.map_ids().unwrap().unwrap());
    }
    Tables {
        flows: Flows::find(&numbers).unwrap(),
        affinities: Table::find(&numbers, "AFFINITIES").unwrap(),
        backends: Table::find(&numbers, "BACKENDS").unwrap(),
        fragments: Table::find(&numbers, "FRAGMENTS").unwrap(),
        frontends: Table::find(&numbers, "FRONTENDS").unwrap(),
        node_addresses: Table::find(&numbers, "NODE_ADDRESSES").unwrap(),
        endpoints: Table::find(&numbers, "ENDPOINTS").unwrap(),
        identities: Place::find(&numbers, "IDENTITIES").unwrap(),
        rules: Place::find(&numbers, "RULES").unwrap(),
        ranges: Table::find(&numbers, "RANGES").unwrap(),
        cidrs: Table::find(&numbers, "CIDRS").unwrap(),
        ways: Table::find(&numbers, "WAYS").unwrap(),
        devices: Table::find(&numbers, "DEVICES").unwrap(),
    }
}
