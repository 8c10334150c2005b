//! What is to be looked at: which pods of which Services changed, told by the watches.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use k8s_openapi::api::core::v1::{Node, Pod, Service};
use k8s_openapi::api::discovery::v1::EndpointSlice;
use k8s_openapi::jiff::{SignedDuration, Timestamp};
use kube::ResourceExt;

use super::index::{Index, service_of};
use super::{slices, topology};
use crate::cluster::Cluster;
use crate::informer::Key;
use crate::pods;
use crate::queue::Queue;

/// A Service that is older than this was there before these controllers were.
const NEW: SignedDuration = SignedDuration::from_secs(60);

/// What of a Service is to be looked at.
#[derive(Default)]
pub(super) struct Dirty {
    pub all: bool,
    pub pods: HashSet<Arc<str>>,
    /// The first moment at which something happened that is not written yet.
    pub since: Option<Timestamp>,
}

#[derive(Default)]
struct State {
    index: Index,
    dirty: HashMap<Key, Dirty>,
    /// Services whose hints depend on the nodes.
    hinted: HashSet<Key>,
    ratios: Option<Arc<BTreeMap<String, f64>>>,
}

impl State {
    fn mark(&mut self, service: &Key, pod: &str, since: Option<Timestamp>) {
        let dirty = self.dirty.entry(service.clone()).or_default();
        if !dirty.all && !dirty.pods.contains(pod) {
            dirty.pods.insert(pod.into());
        }
        dirty.since = [dirty.since, since].into_iter().flatten().min();
    }

    fn mark_all(&mut self, service: &Key) {
        let dirty = self.dirty.entry(service.clone()).or_default();
        dirty.all = true;
        dirty.pods = HashSet::new();
    }
}

/// What is to be looked at.
pub(super) struct Work {
    pub queue: Arc<Queue<Key>>,
    state: Mutex<State>,
}

impl Work {
    pub(super) fn new() -> Arc<Self> {
        Arc::new(Self {
            queue: Queue::new(),
            state: Mutex::default(),
        })
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What of this Service is to be looked at; from now on nothing is.
    pub(super) fn take(&self, key: &Key) -> Dirty {
        self.lock().dirty.remove(key).unwrap_or_default()
    }

    /// All of it is to be looked at, whenever it comes to its turn.
    pub(super) fn mark_all(&self, key: &Key) {
        self.lock().mark_all(key);
    }

    /// Each zone's part of the cluster's CPUs.
    pub(super) fn ratios(&self) -> Option<Arc<BTreeMap<String, f64>>> {
        self.lock().ratios.clone()
    }

    /// The names of pods that the Service may select.
    pub(super) fn pods_of(&self, service: &Service) -> Vec<Arc<str>> {
        self.lock().index.pods_of(service)
    }

    /// Hears of each change.
    pub(super) fn listen(self: &Arc<Self>, cluster: &Arc<Cluster>) {
        let (work, weak) = (self.clone(), Arc::downgrade(cluster));
        cluster.services.on_change(move |old, new| {
            if let Some(service) = new.or(old) {
                let now = weak.upgrade();
                let now = now.and_then(|all| all.services.get(&Key::of(service.as_ref())));
                work.service(old.map(Arc::as_ref), new.map(Arc::as_ref), now.as_deref());
            }
        });
        let (work, weak) = (self.clone(), Arc::downgrade(cluster));
        cluster.pods.on_change(move |old, new| {
            if let Some(pod) = new.or(old) {
                let now = weak.upgrade();
                let now = now.and_then(|all| all.pods.get(&Key::of(pod.as_ref())));
                work.pod(old.map(Arc::as_ref), new.map(Arc::as_ref), now.as_deref());
            }
        });
        let work = self.clone();
        cluster.endpoint_slices.on_change(move |old, new| {
            work.slice(old.map(Arc::as_ref), new.map(Arc::as_ref));
        });
        let (work, weak) = (self.clone(), Arc::downgrade(cluster));
        cluster.nodes.on_change(move |old, new| {
            if let Some(cluster) = weak.upgrade() {
                work.node(&cluster, old.map(Arc::as_ref), new.map(Arc::as_ref));
            }
        });
    }

    fn service(&self, old: Option<&Service>, new: Option<&Service>, now: Option<&Service>) {
        let Some(one) = new.or(old) else { return };
        let key = Key::of(one);
        // Its status is written by others and does not matter here.
        if let (Some(old), Some(new)) = (old, new)
            && old.spec == new.spec
            && old.labels() == new.labels()
            && old.annotations() == new.annotations()
            && old.metadata.uid == new.metadata.uid
        {
            return;
        }
        let mut state = self.lock();
        state.index.service(old, now);
        state.hinted.remove(&key);
        if new.is_some_and(topology::is_asked_for) {
            state.hinted.insert(key.clone());
        }
        state.mark_all(&key);
        let made = one.metadata.creation_timestamp.as_ref().map(|made| made.0);
        let made = made.filter(|made| Timestamp::now().duration_since(*made) < NEW);
        if let (None, Some(made), Some(dirty)) = (old, made, state.dirty.get_mut(&key)) {
            dirty.since = Some(made);
        }
        drop(state);
        self.queue.add(key);
    }

    fn pod(&self, old: Option<&Pod>, new: Option<&Pod>, now: Option<&Pod>) {
        let Some(one) = new.or(old) else { return };
        let mut state = self.lock();
        state.index.pod(old, now);
        if let (Some(old), Some(new)) = (old, new)
            && !matters(old, new)
        {
            return;
        }
        let since = match (old, new) {
            (Some(old), Some(new)) if readied(old) != readied(new) => readied(new),
            _ => None,
        };
        let name = one.name_any();
        let mut services: HashSet<Key> = HashSet::new();
        for pod in [old, new].into_iter().flatten() {
            services.extend(state.index.services_of(pod));
        }
        for service in &services {
            state.mark(service, &name, since);
        }
        drop(state);
        services.into_iter().for_each(|key| self.queue.add(key));
    }

    /// Somebody else's change is put right; what we wrote ourselves is as it should be.
    fn slice(&self, old: Option<&EndpointSlice>, new: Option<&EndpointSlice>) {
        let mut state = self.lock();
        let mut services = HashSet::new();
        if let (Some(old), Some(new)) = (old, new)
            && service_of(old) == service_of(new)
            && slices::is_ours(old)
            && old.labels() == new.labels()
            && old.metadata.owner_references == new.metadata.owner_references
            && old.ports == new.ports
        {
            if let Some(service) = service_of(new) {
                match differing(old, new) {
                    Some(pods) => pods.iter().for_each(|pod| state.mark(&service, pod, None)),
                    None => state.mark_all(&service),
                }
                services.insert(service);
            }
        } else {
            for slice in [old, new].into_iter().flatten() {
                if let Some(service) = service_of(slice).filter(|_| slices::is_ours(slice)) {
                    let pods = slice.endpoints.iter().flatten().map(slices::pod_of);
                    for pod in pods {
                        match pod {
                            Some(pod) => state.mark(&service, pod, None),
                            None => state.mark_all(&service),
                        }
                    }
                    services.insert(service);
                }
            }
        }
        drop(state);
        services.into_iter().for_each(|key| self.queue.add(key));
    }

    fn node(&self, cluster: &Cluster, old: Option<&Node>, new: Option<&Node>) {
        let Some(one) = new.or(old) else { return };
        let zone = |node: &Node| super::endpoint::zone(node).map(str::to_owned);
        let (before, after) = (old.map(topology::share), new.map(topology::share));
        let moved = old.map(zone) != new.map(zone);
        let mut services = HashSet::new();
        if before != after {
            let nodes = cluster.nodes.all();
            let ratios = topology::ratios(nodes.iter().map(|node| topology::share(node)));
            let mut state = self.lock();
            if state.ratios.as_deref() != ratios.as_ref() {
                state.ratios = ratios.map(Arc::new);
                services.extend(state.hinted.iter().cloned());
            }
        }
        if moved {
            let name = one.name_any();
            let pods = cluster.pods.all();
            let mut state = self.lock();
            for pod in pods
                .iter()
                .filter(|pod| pods::node_name(pod) == Some(&name))
            {
                for service in state.index.services_of(pod) {
                    state.mark(&service, &pod.name_any(), None);
                    services.insert(service);
                }
            }
        }
        services.into_iter().for_each(|key| self.queue.add(key));
    }
}

/// Pods whose endpoints are not the same in both; none where that can't be told.
fn differing(old: &EndpointSlice, new: &EndpointSlice) -> Option<HashSet<String>> {
    let (old, new) = (old.endpoints.as_deref(), new.endpoints.as_deref());
    let (old, new) = (old.unwrap_or(&[]), new.unwrap_or(&[]));
    let mut before = HashMap::with_capacity(old.len());
    for endpoint in old {
        before.insert(slices::pod_of(endpoint)?, endpoint);
    }
    let mut found = HashSet::new();
    for endpoint in new {
        let pod = slices::pod_of(endpoint)?;
        // One that stands twice differs, too.
        if before.remove(pod) != Some(endpoint) {
            found.insert(pod.to_owned());
        }
    }
    found.extend(before.into_keys().map(str::to_owned));
    Some(found)
}

/// When the pod became ready, or ceased to be.
fn readied(pod: &Pod) -> Option<Timestamp> {
    let condition = pods::condition(pod, "Ready")?;
    condition.last_transition_time.as_ref().map(|time| time.0)
}

/// Whether the change of a pod can change an endpoint.
fn matters(old: &Pod, new: &Pod) -> bool {
    let ips = |pod: &Pod| {
        let status = pod.status.as_ref();
        status.map(|status| (status.pod_ips.clone(), status.pod_ip.clone()))
    };
    pods::is_ready(old) != pods::is_ready(new)
        || pods::is_terminating(old) != pods::is_terminating(new)
        || pods::is_finished(old) != pods::is_finished(new)
        || old.labels() != new.labels()
        || old.metadata.uid != new.metadata.uid
        || pods::node_name(old) != pods::node_name(new)
        || ips(old) != ips(new)
}
