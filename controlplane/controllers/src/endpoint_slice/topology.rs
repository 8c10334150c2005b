//! Hints by the annotation `service.kubernetes.io/topology-mode: Auto`: each zone has a share of the endpoints that
//! fits its share of the cluster's CPUs, or nobody has any hints.

use std::collections::BTreeMap;

use k8s_openapi::api::core::v1::{Node, Service};
use k8s_openapi::api::discovery::v1::{Endpoint, EndpointHints, ForZone};
use kube::ResourceExt;
use xebec_schema::quantity::Quantity;

use super::endpoint::zone;
use super::slices::Draft;

const MODE: &str = "service.kubernetes.io/topology-mode";
const OLDER_MODE: &str = "service.kubernetes.io/topology-aware-hints";
/// How much more than its share an endpoint may be given to do.
const OVERLOAD: f64 = 0.2;

/// Whether the Service asks for such hints.
pub(super) fn is_asked_for(service: &Service) -> bool {
    let annotations = service.annotations();
    let mode = annotations.get(OLDER_MODE).or(annotations.get(MODE));
    matches!(mode.map(String::as_str), Some("Auto" | "auto"))
}

/// What of a node counts: its zone and CPUs; none where it does not count at all.
pub(super) type Share = Option<(Option<String>, i64)>;

/// What of this node counts.
pub(super) fn share(node: &Node) -> Share {
    let roles = ["control-plane", "master"];
    let role = |role: &&str| {
        let label = format!("node-role.kubernetes.io/{role}");
        node.labels().contains_key(&label)
    };
    let status = node.status.as_ref();
    let conditions = status.and_then(|status| status.conditions.as_ref());
    let ready = conditions
        .into_iter()
        .flatten()
        .any(|one| one.type_ == "Ready" && one.status == "True");
    if roles.iter().any(role) || !ready {
        return None;
    }
    let cpu = status.and_then(|status| status.allocatable.as_ref()?.get("cpu"));
    let cpu = cpu.and_then(|cpu| Quantity::parse(&cpu.0).ok());
    let cpu = cpu.map_or(0, |cpu| cpu.milli_value());
    Some((zone(node).map(str::to_owned), cpu))
}

/// Each zone's part of the CPUs; none where that is not known of every node, or there are no two zones.
pub(super) fn ratios(shares: impl Iterator<Item = Share>) -> Option<BTreeMap<String, f64>> {
    let mut by_zone: BTreeMap<String, i64> = BTreeMap::new();
    for (zone, cpu) in shares.flatten() {
        *by_zone.entry(zone.filter(|_| cpu > 0)?).or_default() += cpu;
    }
    let total: i64 = by_zone.values().sum();
    let ratio = |(zone, cpu)| (zone, cpu as f64 / total as f64);
    (by_zone.len() > 1).then(|| by_zone.into_iter().map(ratio).collect())
}

struct Allocation {
    desired: f64,
    maximum: usize,
}

/// How many of so many endpoints each zone is to have.
fn allocate(
    ratios: Option<&BTreeMap<String, f64>>,
    endpoints: usize,
) -> Result<BTreeMap<String, Allocation>, String> {
    let ratios = ratios.ok_or(
        "Insufficient Node information: allocatable CPU or zone not specified on one or more nodes",
    )?;
    let counts = format!("({endpoints} endpoints, {} zones)", ratios.len());
    if ratios.len() > endpoints {
        return Err(format!("Insufficient number of endpoints {counts}"));
    }
    let least = |ratio: f64| (ratio * endpoints as f64 / (1.0 + OVERLOAD)).ceil();
    let total: usize = ratios.values().map(|ratio| least(*ratio) as usize).sum();
    let spare = endpoints.checked_sub(total).ok_or_else(|| {
        format!("Minimum allocation of required endpoints exceeds overload threshold {counts}")
    })?;
    let allocation = |(zone, ratio): (&String, &f64)| {
        let least = least(*ratio);
        let desired = (ratio * endpoints as f64).max(least);
        let maximum = least as usize + spare;
        (zone.clone(), Allocation { desired, maximum })
    };
    Ok(ratios.iter().map(allocation).collect())
}

fn is_ready(endpoint: &Endpoint) -> bool {
    let conditions = endpoint.conditions.as_ref();
    conditions.is_some_and(|conditions| conditions.ready == Some(true))
}

fn hint(zone: &str) -> Option<EndpointHints> {
    Some(EndpointHints {
        for_nodes: None,
        for_zones: Some(vec![ForZone { name: zone.into() }]),
    })
}

/// Gives the endpoints of one family their hints, or takes them all away and says why.
pub(super) fn add_hints(
    ratios: Option<&BTreeMap<String, f64>>,
    drafts: &mut [Draft],
    family: &str,
) -> Result<(), String> {
    let of_family = |draft: &&mut Draft| draft.family == family;
    let all = drafts.iter().filter(|draft| draft.family == family);
    let endpoints = all.flat_map(|draft| draft.endpoints());
    let ready: Vec<&Endpoint> = endpoints.filter(|one| is_ready(one)).collect();
    let outcome = allocate(ratios, ready.len()).and_then(|allocations| {
        if ready.iter().any(|endpoint| endpoint.zone.is_none()) {
            return Err("One or more endpoints do not have a zone specified".into());
        }
        Ok(allocations)
    });
    let allocations = match outcome {
        Ok(allocations) => allocations,
        Err(why) => {
            for draft in drafts.iter_mut().filter(of_family) {
                if draft.endpoints().iter().any(|one| one.hints.is_some()) {
                    draft
                        .endpoints_mut()
                        .iter_mut()
                        .for_each(|one| one.hints = None);
                }
            }
            return Err(format!("{why}, addressType: {family}"));
        }
    };
    let mut given: BTreeMap<String, usize> = BTreeMap::new();
    let mut free = Vec::new();
    // Slices that are not written anyway keep their hints as long as these allow everybody his least.
    for draft in drafts.iter_mut().filter(of_family) {
        match hints_of(draft, &given, &allocations).filter(|_| !draft.is_changed()) {
            Some(hints) => {
                for (zone, count) in hints {
                    *given.entry(zone).or_default() += count;
                }
            }
            None => free.push(draft),
        }
    }
    for draft in &mut free {
        for endpoint in draft.endpoints_mut() {
            endpoint.hints = None;
            if let Some(zone) = endpoint.zone.clone().filter(|_| is_ready(endpoint)) {
                endpoint.hints = hint(&zone);
                *given.entry(zone).or_default() += 1;
            }
        }
    }
    redistribute(&mut free, &given, &allocations);
    Ok(())
}

/// How many hints for each zone a slice has; none where they can't stay.
fn hints_of(
    draft: &Draft,
    given: &BTreeMap<String, usize>,
    allocations: &BTreeMap<String, Allocation>,
) -> Option<BTreeMap<String, usize>> {
    let mut found: BTreeMap<String, usize> = BTreeMap::new();
    for endpoint in draft.endpoints() {
        let zones = endpoint
            .hints
            .as_ref()
            .and_then(|hints| hints.for_zones.as_ref());
        if !is_ready(endpoint) {
            // None was given when it was not ready.
            if endpoint.hints.is_some() {
                return None;
            }
            continue;
        }
        for zone in zones.filter(|zones| !zones.is_empty())? {
            *found.entry(zone.name.clone()).or_default() += 1;
        }
    }
    let fits = |(zone, count): (&String, &usize)| {
        let before = given.get(zone).copied().unwrap_or(0);
        let most = allocations.get(zone).map(|allocation| allocation.maximum);
        most.is_some_and(|most| before + count <= most)
    };
    found.iter().all(fits).then_some(found)
}

/// Zones with more than their share give endpoints to those with less.
fn redistribute(
    drafts: &mut [&mut Draft],
    given: &BTreeMap<String, usize>,
    allocations: &BTreeMap<String, Allocation>,
) {
    let (mut too_many, mut too_few) = (BTreeMap::new(), BTreeMap::new());
    for (zone, allocation) in allocations {
        let surplus = given.get(zone).copied().unwrap_or(0) as f64 - allocation.desired;
        if surplus > 0.0 {
            too_many.insert(zone.clone(), surplus);
        } else if surplus < 0.0 {
            too_few.insert(zone.clone(), -surplus);
        }
    }
    let most = |zones: &BTreeMap<String, f64>| {
        let most = zones.iter().max_by(|a, b| a.1.total_cmp(b.1));
        most.map(|(zone, count)| (zone.clone(), *count))
    };
    let (mut giving, mut receiving): (BTreeMap<String, usize>, Vec<String>) = Default::default();
    while let (Some((from, give)), Some((to, take))) = (most(&too_many), most(&too_few)) {
        if give < 1.0 && take < 1.0 || give < 0.5 || take < 0.5 {
            break;
        }
        *giving.entry(from.clone()).or_default() += 1;
        receiving.push(to.clone());
        too_many.entry(from).and_modify(|left| *left -= 1.0);
        too_few.entry(to).and_modify(|left| *left -= 1.0);
    }
    for draft in drafts {
        for endpoint in draft.endpoints_mut().iter_mut().filter(|one| is_ready(one)) {
            let from = endpoint.zone.as_ref().and_then(|zone| giving.get_mut(zone));
            let Some(left) = from.filter(|left| **left > 0) else {
                continue;
            };
            let Some(to) = receiving.pop() else { return };
            *left -= 1;
            endpoint.hints = hint(&to);
        }
    }
}
