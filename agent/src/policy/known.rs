//! What the API has told so far, and how the engine learns of it.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::Arc;

use k8s_openapi::api::core::v1::{Namespace, Pod, Service};
use k8s_openapi::api::discovery::v1::EndpointSlice;
use k8s_openapi::api::networking::v1::NetworkPolicy;
use kube::api::{DynamicObject, ObjectMeta};
use kube::runtime::watcher::Event;
use tracing::{info, warn};

use xebec_policy::engine::Engine;
use xebec_policy::kernel::PolicyKernel;
use xebec_policy::rule::{Name, PolicyRef, Source};
use xebec_policy::selector::Labels;
use xebec_policy::services::ServiceView;
use xebec_policy::{network_policy, pod};

use super::custom;
use super::listing::{Listing, Taken};
use super::notices::Told;
use crate::nodes::NodeView;

/// The Service that a slice belongs to.
const SERVICE_NAME: &str = "kubernetes.io/service-name";

/// One change, of whichever kind.
#[allow(clippy::large_enum_variant, reason = "only one is held at a time")]
pub(super) enum Change {
    Pod(Event<Pod>),
    Namespace(Event<Namespace>),
    Policy(Event<NetworkPolicy>),
    Custom(Source, custom::Change),
    ApiServer(Event<EndpointSlice>),
    Nodes(BTreeMap<String, NodeView>),
    /// The addresses of this node's devices.
    Local(BTreeSet<IpAddr>),
    Service(Event<Service>),
    /// Of Services without a selector.
    Slice(Event<EndpointSlice>),
}

/// What the API has told of since it was asked.
#[derive(Default)]
pub(super) struct Known {
    pods: Listing<Name>,
    namespaces: Listing<String>,
    policies: Listing<PolicyRef>,
    custom: BTreeMap<Source, Listing<PolicyRef>>,
    /// Kinds that the API does not have.
    absent: BTreeSet<Source>,
    api_server: Listing<String>,
    /// The addresses of the API server by EndpointSlice.
    slices: BTreeMap<String, Vec<IpAddr>>,
    nodes: bool,
    local: bool,
    /// Services and slices, once rules name any.
    services: Option<(Listing<Name>, Listing<Name>)>,
    /// Whether it was said which kinds are not there.
    said: bool,
}

impl Known {
    /// Whether all is known; the first time, it says which kinds there are not.
    pub fn all(&mut self) -> bool {
        let done = |source: &Source| {
            let listed = self.custom.get(source).is_some_and(|one| one.done);
            listed || self.absent.contains(source)
        };
        let known = self.pods.done
            && self.namespaces.done
            && self.policies.done
            && self.api_server.done
            && self.nodes
            && self.local
            && self
                .services
                .as_ref()
                .is_none_or(|(all, slices)| all.done && slices.done)
            && custom::KINDS.iter().all(done);
        if known && !std::mem::replace(&mut self.said, true) && !self.absent.is_empty() {
            let kinds: Vec<&str> = self.absent.iter().map(|one| one.kind()).collect();
            info!(
                "the API has no {}: there are no policies of these kinds",
                kinds.join(", ")
            );
        }
        known
    }

    /// From here on Services are to be told before all is known; false if they were before.
    pub fn expect_services(&mut self) -> bool {
        let new = self.services.is_none();
        self.services.get_or_insert_default();
        new
    }

    /// Tells the engine of a change.
    pub fn take<K: PolicyKernel>(
        &mut self,
        engine: &mut Engine<K>,
        told: &mut Told,
        change: Change,
    ) {
        match change {
            Change::Pod(event) => match self.pods.take(event, pod::name) {
                Taken::Set(pod) => engine.set_pod(&pod),
                Taken::Gone(names) => names.iter().for_each(|name| engine.remove_pod(name)),
                Taken::Listed(seen) => engine
                    .pod_names()
                    .iter()
                    .filter(|name| !seen.contains(*name))
                    .for_each(|name| engine.remove_pod(name)),
                Taken::Nothing => {}
            },
            Change::Namespace(event) => {
                let name = |one: &Namespace| one.metadata.name.clone().unwrap_or_default();
                match self.namespaces.take(event, name) {
                    Taken::Set(one) => {
                        let labels = one.metadata.labels.clone().unwrap_or_default();
                        engine.set_namespace(&name(&one), Some(labels));
                    }
                    Taken::Gone(names) => names
                        .iter()
                        .for_each(|name| engine.set_namespace(name, None)),
                    Taken::Listed(seen) => engine
                        .known()
                        .0
                        .iter()
                        .filter(|name| !seen.contains(*name))
                        .for_each(|name| engine.set_namespace(name, None)),
                    Taken::Nothing => {}
                }
            }
            Change::Nodes(nodes) => {
                self.nodes = true;
                let gone = engine.known().1.into_iter();
                gone.filter(|name| !nodes.contains_key(name))
                    .for_each(|name| engine.set_node(&name, Labels::new(), Vec::new()));
                nodes
                    .into_iter()
                    .for_each(|(name, node)| engine.set_node(&name, node.labels, node.addresses));
            }
            Change::Local(addresses) => {
                self.local = true;
                engine.set_local_addresses(addresses);
            }
            Change::ApiServer(event) => self.take_api_server(engine, event),
            Change::Service(event) => {
                let (all, _) = self.services.get_or_insert_default();
                take_service(all, engine, event);
            }
            Change::Slice(event) => {
                let (_, slices) = self.services.get_or_insert_default();
                take_slice(slices, engine, event);
            }
            Change::Policy(event) => match self.policies.take(event, network_policy::id) {
                Taken::Set(one) => {
                    let (policy, errors) = network_policy::read(&one);
                    told.set_uid(&policy.id, one.metadata.uid.clone());
                    engine.set_policy(&policy.id.clone(), vec![policy], errors);
                }
                Taken::Gone(ids) => forget(engine, told, ids),
                Taken::Listed(seen) => forget_others(engine, told, Source::NetworkPolicy, &seen),
                Taken::Nothing => {}
            },
            Change::Custom(source, change) => self.take_custom(engine, told, source, change),
        }
    }

    fn take_custom<K: PolicyKernel>(
        &mut self,
        engine: &mut Engine<K>,
        told: &mut Told,
        source: Source,
        change: custom::Change,
    ) {
        let event = match change {
            custom::Change::Event(event) => *event,
            custom::Change::Absent => {
                self.absent.insert(source);
                return forget_others(engine, told, source, &BTreeSet::new());
            }
        };
        let id = |one: &DynamicObject| PolicyRef {
            source,
            namespace: one.metadata.namespace.clone().unwrap_or_default(),
            name: one.metadata.name.clone().unwrap_or_default(),
        };
        match self.custom.entry(source).or_default().take(event, id) {
            Taken::Set(mut one) => {
                told.saw(&id(&one), &one);
                one.metadata.managed_fields = None;
                match serde_json::to_value(&one) {
                    Ok(object) => {
                        engine.set_object(source, &object);
                    }
                    Err(error) => warn!(%error, "{} can't be read", id(&one)),
                }
            }
            Taken::Gone(ids) => forget(engine, told, ids),
            Taken::Listed(seen) => {
                if self.absent.remove(&source) && self.said {
                    info!("the API has {} now", source.kind());
                }
                forget_others(engine, told, source, &seen);
            }
            Taken::Nothing => {}
        }
    }

    fn take_api_server<K: PolicyKernel>(
        &mut self,
        engine: &mut Engine<K>,
        event: Event<EndpointSlice>,
    ) {
        let name = |one: &EndpointSlice| one.metadata.name.clone().unwrap_or_default();
        match self.api_server.take(event, name) {
            Taken::Set(slice) => {
                let all = slice.endpoints.iter().flatten();
                let all = all.flat_map(|endpoint| &endpoint.addresses);
                let addresses = all.filter_map(|address| address.parse().ok());
                self.slices.insert(name(&slice), addresses.collect());
            }
            Taken::Gone(names) => self.slices.retain(|name, _| !names.contains(name)),
            Taken::Listed(seen) => self.slices.retain(|name, _| seen.contains(name)),
            Taken::Nothing => {}
        }
        if self.api_server.done {
            engine.set_api_server(self.slices.values().flatten().copied().collect());
        }
    }
}

fn take_service<K: PolicyKernel>(
    all: &mut Listing<Name>,
    engine: &mut Engine<K>,
    event: Event<Service>,
) {
    match all.take(event, |one| name_of(&one.metadata)) {
        Taken::Set(one) => {
            let spec = one.spec.unwrap_or_default();
            let view = ServiceView {
                labels: one.metadata.labels.clone().unwrap_or_default(),
                selector: spec.selector.unwrap_or_default(),
            };
            engine.set_service(&name_of(&one.metadata), Some(view));
        }
        Taken::Gone(names) => names.iter().for_each(|name| engine.set_service(name, None)),
        Taken::Listed(seen) => {
            let [known, _] = engine.known_services();
            let gone = known.iter().filter(|name| !seen.contains(*name));
            gone.for_each(|name| engine.set_service(name, None));
        }
        Taken::Nothing => {}
    }
}

fn take_slice<K: PolicyKernel>(
    slices: &mut Listing<Name>,
    engine: &mut Engine<K>,
    event: Event<EndpointSlice>,
) {
    match slices.take(event, |one| name_of(&one.metadata)) {
        Taken::Set(one) => {
            let name = name_of(&one.metadata);
            let labels = one.metadata.labels.as_ref();
            let service = labels.and_then(|all| all.get(SERVICE_NAME)).cloned();
            let all = one.endpoints.iter().flatten();
            let all = all.flat_map(|endpoint| &endpoint.addresses);
            let addresses = all.filter_map(|address| address.parse().ok()).collect();
            let slice = service.map(|service| ((name.0.clone(), service), addresses));
            engine.set_service_slice(&name, slice);
        }
        Taken::Gone(names) => {
            let names = names.iter();
            names.for_each(|name| engine.set_service_slice(name, None));
        }
        Taken::Listed(seen) => {
            let [_, known] = engine.known_services();
            let gone = known.iter().filter(|name| !seen.contains(*name));
            gone.for_each(|name| engine.set_service_slice(name, None));
        }
        Taken::Nothing => {}
    }
}

fn name_of(metadata: &ObjectMeta) -> Name {
    let text = |one: &Option<String>| one.clone().unwrap_or_default();
    (text(&metadata.namespace), text(&metadata.name))
}

fn forget<K: PolicyKernel>(engine: &mut Engine<K>, told: &mut Told, ids: Vec<PolicyRef>) {
    for id in ids {
        told.forget(&id);
        engine.remove_object(&Arc::new(id));
    }
}

/// Forgets the objects of a kind that are not among these.
fn forget_others<K: PolicyKernel>(
    engine: &mut Engine<K>,
    told: &mut Told,
    source: Source,
    seen: &BTreeSet<PolicyRef>,
) {
    let known = engine.ids_of(source).into_iter();
    let gone = known.filter(|id| !seen.contains(&**id));
    forget(engine, told, gone.map(|id| (*id).clone()).collect());
}
