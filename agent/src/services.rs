//! Services: what the API says of them and their endpoints becomes frontends and backends in the kernel.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::net::{IpAddr, Ipv4Addr};
use std::sync::{Arc, Mutex, PoisonError};

use anyhow::Result;
use futures::{StreamExt, TryStreamExt};
use k8s_openapi::api::core::v1::Service;
use k8s_openapi::api::discovery::v1::EndpointSlice;
use kube::Api;
use kube::runtime::watcher::{self, Event};
use kube::runtime::{WatchStreamExt, watcher as watch};
use serde_json::{Value, json};
use tokio::sync::{oneshot, watch as signal};
use tokio_util::sync::CancellationToken;
use tracing::warn;
use xebec_dataplane_common::ip::Ip;
use xebec_dataplane_common::service::{Backend, CHUNK, EXTERNAL, Frontend, FrontendKey, OWN, Run};

use crate::maps::ServiceMaps;
use crate::nodes::Nodes;

/// A Service's or slice's namespace and name.
type Name = (String, String);
/// Addresses and ports of backends, in order.
type Backends = Vec<(IpAddr, u16)>;

/// What of a Service the dataplane needs.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct ServiceView {
    cluster_ip: Option<IpAddr>,
    ports: Vec<PortView>,
    publish_not_ready: bool,
}

#[derive(Clone, Debug, PartialEq, Eq)]
struct PortView {
    name: String,
    port: u16,
    node_port: u16,
    protocol: u8,
}

/// What of an EndpointSlice it needs.
#[derive(Clone, Debug, PartialEq, Eq)]
struct SliceView {
    service: Name,
    /// Address, ready, and still serving while it ends.
    endpoints: Vec<(IpAddr, bool, bool)>,
    /// Name, port, protocol.
    ports: Vec<(String, u16, u8)>,
}

fn protocol(name: Option<&str>) -> u8 {
    match name {
        Some("UDP") => 17,
        Some("SCTP") => 132,
        _ => 6,
    }
}

fn protocol_name(number: u8) -> &'static str {
    match number {
        17 => "UDP",
        132 => "SCTP",
        _ => "TCP",
    }
}

impl From<&Service> for ServiceView {
    fn from(service: &Service) -> Self {
        let Some(spec) = &service.spec else {
            return Self::default();
        };
        let number = |value: i32| u16::try_from(value).unwrap_or(0);
        Self {
            cluster_ip: spec.cluster_ip.as_deref().and_then(|ip| ip.parse().ok()),
            ports: spec
                .ports
                .iter()
                .flatten()
                .map(|port| PortView {
                    name: port.name.clone().unwrap_or_default(),
                    port: number(port.port),
                    node_port: port.node_port.map_or(0, number),
                    protocol: protocol(port.protocol.as_deref()),
                })
                .collect(),
            publish_not_ready: spec.publish_not_ready_addresses.unwrap_or(false),
        }
    }
}

impl From<&EndpointSlice> for SliceView {
    fn from(slice: &EndpointSlice) -> Self {
        let metadata = &slice.metadata;
        let service = metadata
            .labels
            .iter()
            .flatten()
            .find(|(key, _)| *key == "kubernetes.io/service-name")
            .map(|(_, name)| name.clone());
        let mut endpoints = Vec::new();
        for endpoint in slice.endpoints.iter().flatten() {
            let conditions = endpoint.conditions.clone().unwrap_or_default();
            let ready = conditions.ready.unwrap_or(true);
            let ending =
                conditions.terminating.unwrap_or(false) && conditions.serving.unwrap_or(ready);
            // All addresses of one endpoint are the same backend; clients take the first.
            if let Some(address) = endpoint
                .addresses
                .first()
                .and_then(|address| address.parse().ok())
            {
                endpoints.push((address, ready, ending));
            }
        }
        let ports = slice.ports.iter().flatten().filter_map(|port| {
            let number = port.port.and_then(|number| u16::try_from(number).ok())?;
            Some((
                port.name.clone().unwrap_or_default(),
                number,
                protocol(port.protocol.as_deref()),
            ))
        });
        Self {
            service: (
                metadata.namespace.clone().unwrap_or_default(),
                service.unwrap_or_default(),
            ),
            ports: ports.collect(),
            endpoints,
        }
    }
}

/// A frontend as it is in the kernel.
#[derive(Clone, Debug)]
struct Installed {
    keys: Vec<FrontendKey>,
    backends: Backends,
}

/// Tables of the API's state, and what of it is in the kernel.
struct Reconciler {
    kernel: ServiceMaps,
    /// Addresses that node ports are reached at.
    node_addresses: Vec<IpAddr>,
    services: HashMap<Name, ServiceView>,
    slices: BTreeMap<Name, SliceView>,
    /// By Service and port.
    installed: BTreeMap<(Name, u16, u8), Installed>,
    next_chunk: u32,
    next_backend: u32,
}

impl Reconciler {
    fn new(kernel: ServiceMaps, node_addresses: Vec<IpAddr>) -> Self {
        Self {
            kernel,
            node_addresses,
            services: HashMap::new(),
            slices: BTreeMap::new(),
            installed: BTreeMap::new(),
            next_chunk: 0,
            next_backend: 0,
        }
    }

    /// Where connections to a port go: ready endpoints, or where there is none those that still serve while they end.
    fn backends(&self, name: &Name, service: &ServiceView, port: &PortView) -> Backends {
        let of = |wanted: &dyn Fn(bool, bool) -> bool| -> Backends {
            let mut found = BTreeSet::new();
            for slice in self.slices.values().filter(|slice| slice.service == *name) {
                let number = slice
                    .ports
                    .iter()
                    .find(|(name, _, protocol)| *name == port.name && *protocol == port.protocol);
                let Some((_, number, _)) = number else {
                    continue;
                };
                found.extend(
                    slice
                        .endpoints
                        .iter()
                        .filter(|(_, ready, ending)| wanted(*ready, *ending))
                        .map(|(ip, _, _)| (*ip, *number)),
                );
            }
            found.into_iter().collect()
        };
        let ready = of(&|ready, _| ready || service.publish_not_ready);
        if ready.is_empty() {
            of(&|_, ending| ending)
        } else {
            ready
        }
    }

    /// Brings the kernel in step with one Service.
    fn reconcile(&mut self, name: &Name) -> Result<()> {
        let service = self.services.get(name).cloned().unwrap_or_default();
        let mut wanted: BTreeMap<(u16, u8), (Vec<FrontendKey>, Backends)> = BTreeMap::new();
        for port in &service.ports {
            let Some(cluster_ip) = service.cluster_ip else {
                continue;
            };
            let key = |ip: Ip, number: u16| FrontendKey {
                address: ip,
                port: number.to_be(),
                protocol: port.protocol,
                pad: 0,
            };
            let mut keys = vec![key(cluster_ip.into(), port.port)];
            if port.node_port > 0 {
                keys.push(key(Ip::EVERY_V4, port.node_port));
            }
            wanted.insert(
                (port.port, port.protocol),
                (keys, self.backends(name, &service, port)),
            );
        }
        for ((port, protocol), (keys, backends)) in &wanted {
            let id = (name.clone(), *port, *protocol);
            let before = self.installed.get(&id).cloned();
            if before
                .as_ref()
                .is_some_and(|before| before.keys == *keys && before.backends == *backends)
            {
                continue;
            }
            let first = self.next_chunk;
            for some in backends.chunks(CHUNK) {
                let mut chunk = [0; CHUNK];
                for (slot, (ip, port)) in chunk.iter_mut().zip(some) {
                    self.next_backend += 1;
                    *slot = self.next_backend;
                    self.kernel.set_backend(
                        self.next_backend,
                        Backend {
                            address: (*ip).into(),
                            port: port.to_be(),
                            flags: 0,
                            generation: 1,
                        },
                    )?;
                }
                self.kernel.set_chunk(self.next_chunk, chunk)?;
                self.next_chunk += 1;
            }
            let run = Run {
                first,
                count: backends.len() as u32,
            };
            for key in keys {
                let value = Frontend {
                    service: 1,
                    flags: EXTERNAL,
                    affinity: 0,
                    inside: run,
                    outside: run,
                };
                self.kernel.set_frontend(*key, value)?;
            }
            if let Some(before) = before {
                for gone in before.keys.iter().filter(|key| !keys.contains(key)) {
                    self.kernel.remove_frontend(*gone)?;
                }
            }
            self.installed.insert(
                id,
                Installed {
                    keys: keys.clone(),
                    backends: backends.clone(),
                },
            );
        }
        let gone: Vec<(Name, u16, u8)> = self
            .installed
            .range((name.clone(), 0, 0)..=(name.clone(), u16::MAX, u8::MAX))
            .map(|(id, _)| id.clone())
            .filter(|(_, port, protocol)| !wanted.contains_key(&(*port, *protocol)))
            .collect();
        for id in gone {
            let Some(before) = self.installed.remove(&id) else {
                continue;
            };
            for key in &before.keys {
                self.kernel.remove_frontend(*key)?;
            }
        }
        Ok(())
    }

    fn rows(&self) -> Vec<Value> {
        let mut rows = Vec::new();
        for ((name, _, protocol), installed) in &self.installed {
            let backends: Vec<String> = installed
                .backends
                .iter()
                .map(|(ip, port)| format!("{ip}:{port}"))
                .collect();
            for key in &installed.keys {
                let ip = IpAddr::from(key.address);
                rows.push(json!({
                    "service": format!("{}/{}", name.0, name.1),
                    "frontend": format!("{ip}:{}/{}", u16::from_be(key.port), protocol_name(*protocol)),
                    "backends": backends,
                }));
            }
        }
        rows
    }
}

/// What is in the kernel, as rows for the command line.
#[derive(Clone, Default)]
pub struct Shown(Arc<Mutex<Vec<Value>>>);

impl Shown {
    /// One row a frontend.
    pub fn rows(&self) -> Vec<Value> {
        self.0
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }

    fn set(&self, rows: Vec<Value>) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = rows;
    }
}

/// Where node ports are reached: at this node, and at every other one, whose backends are the same.
fn node_addresses(own: IpAddr, nodes: &Nodes) -> Vec<IpAddr> {
    let mut all = vec![IpAddr::V4(Ipv4Addr::LOCALHOST)];
    let others = nodes.iter().flat_map(|nodes| nodes.values());
    for address in std::iter::once(own).chain(others.flat_map(|view| view.addresses.clone())) {
        if !all.contains(&address) {
            all.push(address);
        }
    }
    all
}

/// Keeps the kernel in step until `shutdown`. `ready` is sent once, when everything that the API had at first is in the kernel.
pub(crate) async fn run(
    client: kube::Client,
    maps: ServiceMaps,
    node_ip: IpAddr,
    mut nodes: signal::Receiver<Nodes>,
    shown: Shown,
    ready: oneshot::Sender<()>,
    shutdown: CancellationToken,
) -> Result<()> {
    let mut reconciler = Reconciler::new(maps, node_addresses(node_ip, &None));
    let mut services = watch(
        Api::<Service>::all(client.clone()),
        watcher::Config::default(),
    )
    .default_backoff()
    .boxed();
    let mut slices = watch(
        Api::<EndpointSlice>::all(client),
        watcher::Config::default(),
    )
    .default_backoff()
    .boxed();
    let (mut ready, mut listed) = (Some(ready), (false, false, false));
    let (mut seen_services, mut seen_slices): (BTreeSet<Name>, BTreeSet<Name>) = Default::default();
    let name = |metadata: &kube::api::ObjectMeta| -> Name {
        (
            metadata.namespace.clone().unwrap_or_default(),
            metadata.name.clone().unwrap_or_default(),
        )
    };
    loop {
        let mut changed: Vec<Name> = Vec::new();
        tokio::select! {
            () = shutdown.cancelled() => return Ok(()),
            told = nodes.changed() => {
                // The watch of nodes ends when the agent does.
                if told.is_err() {
                    return Ok(());
                }
                listed.2 = true;
                let addresses = node_addresses(node_ip, &nodes.borrow_and_update());
                for address in &addresses {
                    reconciler.kernel.set_node_address(*address, OWN)?;
                }
                reconciler.node_addresses = addresses;
            }
            event = services.try_next() => match event {
                Ok(Some(Event::Init)) => seen_services.clear(),
                Ok(Some(Event::InitApply(service) | Event::Apply(service))) => {
                    let name = name(&service.metadata);
                    seen_services.insert(name.clone());
                    reconciler.services.insert(name.clone(), ServiceView::from(&service));
                    changed.push(name);
                }
                Ok(Some(Event::InitDone)) => {
                    listed.0 = true;
                    changed = reconciler.services.keys().filter(|name| !seen_services.contains(*name)).cloned().collect();
                    reconciler.services.retain(|name, _| seen_services.contains(name));
                }
                Ok(Some(Event::Delete(service))) => {
                    let name = name(&service.metadata);
                    reconciler.services.remove(&name);
                    changed.push(name);
                }
                Ok(None) => anyhow::bail!("the watch of services ended"),
                Err(error) => warn!(%error, "the watch of services failed; trying again"),
            },
            event = slices.try_next() => match event {
                Ok(Some(Event::Init)) => seen_slices.clear(),
                Ok(Some(Event::InitApply(slice) | Event::Apply(slice))) => {
                    let (name, view) = (name(&slice.metadata), SliceView::from(&slice));
                    seen_slices.insert(name.clone());
                    changed.push(view.service.clone());
                    changed.extend(reconciler.slices.insert(name, view).map(|before| before.service));
                }
                Ok(Some(Event::InitDone)) => {
                    listed.1 = true;
                    let gone: Vec<Name> = reconciler.slices.keys().filter(|name| !seen_slices.contains(*name)).cloned().collect();
                    changed.extend(gone.iter().filter_map(|name| reconciler.slices.remove(name)).map(|before| before.service));
                }
                Ok(Some(Event::Delete(slice))) => {
                    changed.extend(reconciler.slices.remove(&name(&slice.metadata)).map(|before| before.service));
                }
                Ok(None) => anyhow::bail!("the watch of endpoint slices ended"),
                Err(error) => warn!(%error, "the watch of endpoint slices failed; trying again"),
            },
        }
        for name in &changed {
            if let Err(error) = reconciler.reconcile(name) {
                warn!(
                    service = format!("{}/{}", name.0, name.1),
                    error = format!("{error:#}"),
                    "the dataplane could not take the Service; what was there stays"
                );
            }
        }
        if !changed.is_empty() {
            shown.set(reconciler.rows());
        }
        if listed == (true, true, true) {
            if let Some(ready) = ready.take() {
                // Nobody waits any more when the agent is stopping.
                let _ = ready.send(());
            }
        }
    }
}
