//! Which slices a Service should have, and the fewest changes from the ones that it has.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::sync::Arc;

use k8s_openapi::api::core::v1::Service;
use k8s_openapi::api::discovery::v1::{Endpoint, EndpointPort, EndpointSlice};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use kube::ResourceExt;

use super::endpoint::{Ports, Wanted, families, is_headless};
use crate::refs::controller_ref;

pub(crate) const SERVICE_NAME: &str = "kubernetes.io/service-name";
pub(crate) const MANAGED_BY: &str = "endpointslice.kubernetes.io/managed-by";
const OURS: &str = "endpointslice-controller.k8s.io";
const HEADLESS: &str = "service.kubernetes.io/headless";
/// When the change happened that a slice was written for; proxies measure by it how long they took.
const TRIGGERED: &str = "endpoints.kubernetes.io/last-change-trigger-time";
/// Endpoints of one slice at most (kube-controller-manager's `--max-endpoints-per-slice`).
pub(super) const FULL: usize = 100;

/// What to write.
#[derive(Debug, Default)]
pub(super) struct Plan {
    pub create: Vec<EndpointSlice>,
    pub update: Vec<EndpointSlice>,
    pub delete: Vec<Arc<EndpointSlice>>,
}

/// Whose endpoints are looked at; all others stay as they are.
pub(super) enum Scope<'a> {
    All,
    Pods(&'a HashSet<Arc<str>>),
}

impl Scope<'_> {
    fn has(&self, pod: Option<&str>) -> bool {
        match (self, pod) {
            (Scope::All, _) => true,
            (Scope::Pods(pods), Some(pod)) => pods.contains(pod),
            (Scope::Pods(_), None) => false,
        }
    }
}

/// Whether it is one of this controller's.
pub(crate) fn is_ours(slice: &EndpointSlice) -> bool {
    slice.labels().get(MANAGED_BY).map(String::as_str) == Some(OURS)
}

/// The pod that an endpoint is.
pub(super) fn pod_of(endpoint: &Endpoint) -> Option<&str> {
    let target = endpoint.target_ref.as_ref()?;
    target
        .name
        .as_deref()
        .filter(|_| target.kind.as_deref() == Some("Pod"))
}

/// One slice on its way to what it is to be.
pub(super) struct Draft {
    /// As it is; none for a new one.
    pub old: Option<Arc<EndpointSlice>>,
    pub family: &'static str,
    /// None where they are as they were.
    ports: Option<Ports>,
    /// None where they are as they were.
    endpoints: Option<Vec<Endpoint>>,
    relabel: bool,
}

impl Draft {
    fn old_endpoints(&self) -> &[Endpoint] {
        let old = self.old.as_ref();
        old.and_then(|old| old.endpoints.as_deref()).unwrap_or(&[])
    }

    pub(super) fn endpoints(&self) -> &[Endpoint] {
        self.endpoints.as_deref().unwrap_or(self.old_endpoints())
    }

    /// To be changed.
    pub(super) fn endpoints_mut(&mut self) -> &mut Vec<Endpoint> {
        if self.endpoints.is_none() {
            self.endpoints = Some(self.old_endpoints().to_vec());
        }
        self.endpoints.get_or_insert_default()
    }

    pub(super) fn is_changed(&self) -> bool {
        self.old.is_none() || self.endpoints.is_some() || self.ports.is_some() || self.relabel
    }

    fn ports(&self) -> &[EndpointPort] {
        let old = self.old.as_ref().and_then(|old| old.ports.as_deref());
        self.ports.as_deref().unwrap_or(old.unwrap_or(&[]))
    }

    /// Puts every endpoint in scope right, or out. Those that are found are taken from `wanted`.
    /// `hinted`: hints are not the endpoint's own matter; they stay as long as it is as ready as it was.
    fn correct(&mut self, scope: &Scope<'_>, wanted: &mut Missing, hinted: bool) {
        let Some(old) = self.old.clone() else { return };
        let endpoints = old.endpoints.as_deref().unwrap_or(&[]);
        let ports = old.ports.as_deref().unwrap_or(&[]);
        let mut fresh: Option<Vec<Endpoint>> = None;
        for (index, endpoint) in endpoints.iter().enumerate() {
            let pod = pod_of(endpoint);
            let right = if scope.has(pod) {
                let right = pod.and_then(|pod| wanted.take(self.family, pod, ports));
                right.map(|right| match hinted && ready(&right) == ready(endpoint) {
                    true => Endpoint {
                        hints: endpoint.hints.clone(),
                        ..right
                    },
                    false => right,
                })
            } else {
                if let Some(fresh) = &mut fresh {
                    fresh.push(endpoint.clone());
                }
                continue;
            };
            match right {
                Some(right) if right == *endpoint => {
                    if let Some(fresh) = &mut fresh {
                        fresh.push(right);
                    }
                }
                other => {
                    let fresh = fresh.get_or_insert_with(|| endpoints[..index].to_vec());
                    fresh.extend(other);
                }
            }
        }
        self.endpoints = fresh;
    }
}

fn ready(endpoint: &Endpoint) -> bool {
    let conditions = endpoint.conditions.as_ref();
    conditions.is_some_and(|conditions| conditions.ready == Some(true))
}

/// Endpoints that are in no slice yet.
struct Missing {
    by_pod: HashMap<(&'static str, String), Wanted>,
    order: Vec<(&'static str, String)>,
}

impl Missing {
    fn new(wanted: Vec<Wanted>) -> Self {
        let name = |one: &Wanted| pod_of(&one.endpoint).unwrap_or_default().to_owned();
        let order: Vec<_> = wanted.iter().map(|one| (one.family, name(one))).collect();
        Self {
            by_pod: order.iter().cloned().zip(wanted).collect(),
            order,
        }
    }

    fn take(
        &mut self,
        family: &'static str,
        pod: &str,
        ports: &[EndpointPort],
    ) -> Option<Endpoint> {
        let key = (family, pod.to_owned());
        if *self.by_pod.get(&key)?.ports != *ports {
            return None;
        }
        self.by_pod.remove(&key).map(|wanted| wanted.endpoint)
    }

    /// What is left, by family and ports.
    fn groups(mut self) -> Vec<(&'static str, Ports, Vec<Endpoint>)> {
        let mut groups: Vec<(&'static str, Ports, Vec<Endpoint>)> = Vec::new();
        for key in &self.order {
            let Some(one) = self.by_pod.remove(key) else {
                continue;
            };
            let same = |(family, ports, _): &&mut (&str, Ports, Vec<Endpoint>)| {
                *family == one.family && (Arc::ptr_eq(ports, &one.ports) || **ports == *one.ports)
            };
            match groups.iter_mut().find(same) {
                Some((_, _, endpoints)) => endpoints.push(one.endpoint),
                None => groups.push((one.family, one.ports, vec![one.endpoint])),
            }
        }
        groups
    }
}

/// The slices as they are to be, with those that are of no use any more. `wanted`: the endpoints in scope.
pub(super) fn draft(
    service: &Service,
    wanted: Vec<Wanted>,
    scope: &Scope<'_>,
    existing: &[Arc<EndpointSlice>],
    hinted: bool,
) -> (Vec<Draft>, Vec<Arc<EndpointSlice>>) {
    let families = families(service);
    let labels = labels(service);
    let mut missing = Missing::new(wanted);
    let (mut drafts, mut gone) = (Vec::new(), Vec::new());
    for slice in existing {
        if slice.metadata.deletion_timestamp.is_some() {
            continue;
        }
        let family = families
            .iter()
            .find(|family| slice.address_type == **family);
        let Some(family) = family.filter(|_| is_owned(slice, service)) else {
            gone.push(slice.clone());
            continue;
        };
        let mut draft = Draft {
            old: Some(slice.clone()),
            family,
            ports: None,
            endpoints: None,
            relabel: *slice.labels() != labels,
        };
        draft.correct(scope, &mut missing, hinted);
        drafts.push(draft);
    }
    for (family, ports, endpoints) in missing.groups() {
        place(family, &ports, endpoints, &mut drafts);
    }
    drop_empty(&families, &mut drafts, &mut gone);
    (drafts, gone)
}

fn is_owned(slice: &EndpointSlice, service: &Service) -> bool {
    let owners = slice.metadata.owner_references.iter().flatten();
    owners
        .filter(|owner| owner.kind == "Service")
        .any(|owner| Some(&owner.uid) == service.metadata.uid.as_ref())
}

/// Finds room for new endpoints: in slices that change anyway, then in one that takes them all, then in new ones.
fn place(family: &'static str, ports: &Ports, new: Vec<Endpoint>, drafts: &mut Vec<Draft>) {
    let mut new = new.into_iter();
    let fits = |draft: &Draft| {
        draft.family == family && (draft.ports() == &**ports || draft.endpoints().is_empty())
    };
    let size = |draft: &Draft| draft.endpoints().len();
    // Slices that lost all of theirs, or never had any, come last but before new ones are made.
    let mut changed: Vec<usize> = (0..drafts.len())
        .filter(|index| {
            let draft = &drafts[*index];
            fits(draft) && size(draft) < FULL && (draft.is_changed() || size(draft) == 0)
        })
        .collect();
    changed.sort_by_key(|index| std::cmp::Reverse(size(&drafts[*index])));
    for index in changed {
        fill(&mut drafts[index], ports, &mut new);
    }
    if new.len() > 0 && new.len() < FULL {
        let room = |draft: &Draft| FULL.checked_sub(size(draft) + new.len());
        let best = (0..drafts.len())
            .filter(|index| fits(&drafts[*index]) && !drafts[*index].is_changed())
            .filter_map(|index| Some((room(&drafts[index])?, index)))
            .min();
        if let Some((_, index)) = best {
            fill(&mut drafts[index], ports, &mut new);
        }
    }
    while new.len() > 0 {
        let mut draft = Draft {
            old: None,
            family,
            ports: Some(ports.clone()),
            endpoints: Some(Vec::new()),
            relabel: true,
        };
        fill(&mut draft, ports, &mut new);
        drafts.push(draft);
    }
}

fn fill(draft: &mut Draft, ports: &Ports, new: &mut std::vec::IntoIter<Endpoint>) {
    if new.len() == 0 {
        return;
    }
    if draft.ports() != &**ports {
        draft.ports = Some(ports.clone());
    }
    let endpoints = draft.endpoints_mut();
    let room = FULL.saturating_sub(endpoints.len());
    endpoints.extend(new.by_ref().take(room));
}

/// Empty slices go. A family without any has an empty one without ports, so that a Service without a pod can be told
/// from one that nobody has looked at yet.
fn drop_empty(
    families: &[&'static str],
    drafts: &mut Vec<Draft>,
    gone: &mut Vec<Arc<EndpointSlice>>,
) {
    for family in families {
        let of_family = |draft: &Draft| draft.family == *family;
        let mut keep_one = !drafts
            .iter()
            .any(|draft| of_family(draft) && !draft.endpoints().is_empty());
        if keep_one && !drafts.iter().any(of_family) {
            drafts.push(Draft {
                old: None,
                family,
                ports: Some(Arc::from([])),
                endpoints: Some(Vec::new()),
                relabel: true,
            });
        }
        drafts.retain_mut(|draft| {
            if !of_family(draft) || !draft.endpoints().is_empty() {
                return true;
            }
            if std::mem::take(&mut keep_one) {
                if !draft.ports().is_empty() {
                    draft.ports = Some(Arc::from([]));
                }
                return true;
            }
            gone.extend(draft.old.take());
            false
        });
    }
}

/// What to write; `since`: when that happened which it is written for.
pub(super) fn plan(
    service: &Service,
    drafts: Vec<Draft>,
    gone: Vec<Arc<EndpointSlice>>,
    since: Option<String>,
) -> Plan {
    let mut plan = Plan {
        delete: gone,
        ..Plan::default()
    };
    for draft in drafts {
        if !draft.is_changed() {
            continue;
        }
        let ports = Some(draft.ports().to_vec());
        let Draft {
            old,
            family,
            endpoints,
            ..
        } = draft;
        match old {
            Some(old) => {
                let mut metadata = old.metadata.clone();
                metadata.labels = Some(labels(service));
                let annotations = metadata.annotations.get_or_insert_default();
                match &since {
                    Some(since) => drop(annotations.insert(TRIGGERED.into(), since.clone())),
                    None => drop(annotations.remove(TRIGGERED)),
                }
                plan.update.push(EndpointSlice {
                    metadata,
                    endpoints: endpoints
                        .or_else(|| old.endpoints.clone())
                        .or(Some(Vec::new())),
                    ports,
                    address_type: family.into(),
                });
            }
            None => plan.create.push(EndpointSlice {
                metadata: ObjectMeta {
                    generate_name: Some(format!("{}-", service.name_any())),
                    namespace: service.metadata.namespace.clone(),
                    labels: Some(labels(service)),
                    annotations: since
                        .as_ref()
                        .map(|since| BTreeMap::from([(TRIGGERED.to_owned(), since.clone())])),
                    owner_references: Some(vec![controller_ref(service)]),
                    ..ObjectMeta::default()
                },
                endpoints,
                ports,
                address_type: family.into(),
            }),
        }
    }
    plan
}

/// The Service's labels, without reserved ones, and ours.
fn labels(service: &Service) -> BTreeMap<String, String> {
    let reserved = |name: &str| name == SERVICE_NAME || name == MANAGED_BY || name == HEADLESS;
    let labels = service.labels().iter().filter(|(name, _)| !reserved(name));
    let mut labels: BTreeMap<_, _> = labels
        .map(|(name, value)| (name.clone(), value.clone()))
        .collect();
    labels.insert(SERVICE_NAME.into(), service.name_any());
    labels.insert(MANAGED_BY.into(), OURS.into());
    if is_headless(service) {
        labels.insert(HEADLESS.into(), String::new());
    }
    labels
}
