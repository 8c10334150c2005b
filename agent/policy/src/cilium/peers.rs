//! Whom rules of Cilium are about.

use std::net::IpAddr;
use std::sync::Arc;

use ipnet::IpNet;
use serde_json::Value;
use xebec_dataplane_common::policy::{
    IDENTITY_HOST, IDENTITY_REMOTE_NODE, IDENTITY_UNMANAGED, IDENTITY_WORLD,
};

use super::labels;
use crate::domains::Pattern;
use crate::network_policy::cidr;
use crate::object::{fields, list};
use crate::rule::{Action, Block, Direction, Peer, Place, ServicePeer, Which};

/// What can't be enforced, and what to do.
const UNKNOWN: [(&str, &str); 8] = [
    (
        "toNodes",
        "single nodes can't be told apart; use toEntities",
    ),
    (
        "fromNodes",
        "single nodes can't be told apart; use fromEntities",
    ),
    (
        "toGroups",
        "groups of providers can't be enforced; use toCIDRSet",
    ),
    (
        "fromGroups",
        "groups of providers can't be enforced; use fromCIDRSet",
    ),
    ("toRequires", "can't be enforced; use toEndpoints"),
    ("fromRequires", "can't be enforced; use fromEndpoints"),
    ("authentication", "can't be enforced; leave it out"),
    ("log", "can't be done; leave it out"),
];

/// The peers of a rule; none where it names none, which is everybody.
pub(super) fn read(
    rule: &Value,
    direction: Direction,
    action: Action,
    namespace: &str,
) -> Result<Option<Vec<Peer>>, String> {
    let side = match direction {
        Direction::Ingress => "from",
        Direction::Egress => "to",
    };
    let names = ["Endpoints", "Entities", "CIDR", "CIDRSet"].map(|name| format!("{side}{name}"));
    let mut names = Vec::from(names);
    if direction == Direction::Egress {
        if action == Action::Deny && !rule["toFQDNs"].is_null() {
            return Err(
                ".toFQDNs: of names not all addresses are known, so only rules that allow can have them; use toCIDR"
                    .to_owned(),
            );
        }
        names.extend(["toFQDNs", "toServices"].map(str::to_owned));
    }
    for field in fields(rule) {
        if let Some((_, why)) = UNKNOWN.iter().find(|(one, _)| *one == field) {
            if field == "authentication" && rule[field]["mode"] == "disabled" {
                continue;
            }
            return Err(format!(".{field}: {why}"));
        }
        if !names.iter().any(|one| *one == field) && !["toPorts", "icmps"].contains(&field) {
            return Err(format!(".{field}: is not known here; leave it out"));
        }
    }
    let mut lists = Vec::new();
    for name in &names {
        if let Some(all) = list(rule, name).map_err(|error| format!(".{error}"))? {
            lists.push((name, all));
        }
    }
    let mut filled = lists.iter().filter(|(_, all)| !all.is_empty());
    if let (Some((one, _)), Some((other, _))) = (filled.next(), filled.next()) {
        return Err(format!(
            ": {one} and {other} can't be in one rule; make two rules of it"
        ));
    }
    if lists.is_empty() {
        return Ok(None);
    }
    // A list that is there and empty is nobody, whatever else there is.
    if lists.iter().any(|(_, all)| all.is_empty()) {
        return Ok(Some(Vec::new()));
    }
    let mut found = Vec::new();
    for (name, all) in lists {
        for (at, one) in all.iter().enumerate() {
            let peers = match &name[side.len()..] {
                "Endpoints" => labels::peers(one, namespace),
                "Entities" => entity(one),
                "CIDR" => block(one, &[]).map(|peer| vec![peer]),
                "FQDNs" => domains(one),
                "Services" => services(one),
                _ => set(one).map(|peer| vec![peer]),
            };
            found.extend(peers.map_err(|error| format!(".{name}[{at}]: {error}"))?);
        }
    }
    Ok(Some(found))
}

fn entity(value: &Value) -> Result<Vec<Peer>, String> {
    let family = |all: &Value| block(all, &[]).map(|peer| vec![peer]);
    Ok(match value.as_str().unwrap_or_default() {
        "all" => vec![Peer::Anybody],
        "cluster" => vec![
            Peer::Pods(Arc::default()),
            Peer::Identity(IDENTITY_HOST),
            Peer::Identity(IDENTITY_REMOTE_NODE),
            Peer::Identity(IDENTITY_UNMANAGED),
            Peer::Place(Place::ApiServer),
        ],
        "host" => vec![Peer::Identity(IDENTITY_HOST)],
        "remote-node" => vec![Peer::Identity(IDENTITY_REMOTE_NODE)],
        "unmanaged" => vec![Peer::Identity(IDENTITY_UNMANAGED)],
        "world" => vec![Peer::Identity(IDENTITY_WORLD)],
        "world-ipv4" => return family(&"0.0.0.0/0".into()),
        "world-ipv6" => return family(&"::/0".into()),
        "kube-apiserver" => vec![Peer::Place(Place::ApiServer)],
        // Parts of Cilium that are not here, and pods that nothing is known of, which may speak with nobody anyway.
        "health" | "ingress" | "init" | "none" => Vec::new(),
        _ => {
            return Err(format!(
                "{value} is no entity; use all, cluster, host, remote-node, kube-apiserver, unmanaged, world or none"
            ));
        }
    })
}

/// An entry of `toFQDNs`: a name, a pattern, or either of both.
fn domains(value: &Value) -> Result<Vec<Peer>, String> {
    const KNOWN: [&str; 2] = ["matchName", "matchPattern"];
    if let Some(field) = fields(value).find(|one| !KNOWN.contains(one)) {
        return Err(format!(
            "{field} is not known; use matchName or matchPattern"
        ));
    }
    let mut found = Vec::new();
    for (field, read) in KNOWN.into_iter().zip([Pattern::name, Pattern::wildcard]) {
        if !value[field].is_null() {
            let text = value[field].as_str().unwrap_or_default();
            let pattern = read(text).map_err(|error| format!("{field}: {error}"))?;
            found.push(Peer::Place(Place::Domains(Arc::new(pattern))));
        }
    }
    match found.is_empty() {
        true => Err("has neither matchName nor matchPattern; write one".to_owned()),
        false => Ok(found),
    }
}

/// An entry of `toServices`: a Service by its name, Services by their labels, or either of both.
fn services(value: &Value) -> Result<Vec<Peer>, String> {
    const KNOWN: [&str; 2] = ["k8sService", "k8sServiceSelector"];
    if let Some(field) = fields(value).find(|one| !KNOWN.contains(one)) {
        return Err(format!("{field} is not known; use k8sService"));
    }
    let mut found = Vec::new();
    for (form, more) in KNOWN.into_iter().zip(["serviceName", "selector"]) {
        let one = &value[form];
        if one.is_null() {
            continue;
        }
        if let Some(field) = fields(one).find(|one| !["namespace", more].contains(one)) {
            return Err(format!(
                "{form}: {field} is not known; use {more} and namespace"
            ));
        }
        let which = match (more, &one[more]) {
            ("serviceName", Value::String(name)) if !name.is_empty() => {
                Which::Name(name.as_str().into())
            }
            ("serviceName", _) => {
                return Err(format!("{form}: there is no serviceName; write one"));
            }
            (_, labels) => Which::Labels(Arc::new(
                labels::of_others(labels).map_err(|error| format!("{form}: selector: {error}"))?,
            )),
        };
        let namespace = match &one["namespace"] {
            Value::Null => None,
            Value::String(name) if name.is_empty() => None,
            Value::String(name) => Some(name.as_str().into()),
            other => return Err(format!("{form}: {other} is no namespace; use a string")),
        };
        found.push(Peer::Services(ServicePeer { namespace, which }));
    }
    match found.is_empty() {
        true => Err("has neither k8sService nor k8sServiceSelector; write one".to_owned()),
        false => Ok(found),
    }
}

/// Reads an address block, or a single address.
pub(super) fn read_block(value: &Value) -> Result<IpNet, String> {
    let text = value.as_str().unwrap_or_default();
    match text.parse::<IpAddr>() {
        Ok(address) => Ok(address.into()),
        Err(_) => cidr(text),
    }
}

fn block(value: &Value, except: &[IpNet]) -> Result<Peer, String> {
    Ok(Peer::Block(Block {
        cidr: read_block(value)?,
        except: except.to_vec(),
        outside: true,
    }))
}

fn set(value: &Value) -> Result<Peer, String> {
    const KNOWN: [&str; 4] = ["cidr", "cidrGroupRef", "cidrGroupSelector", "except"];
    if let Some(field) = fields(value).find(|one| !KNOWN.contains(one)) {
        return Err(format!("{field} is not known; leave it out"));
    }
    if !value["cidrGroupSelector"].is_null() {
        return Err(
            "cidrGroupSelector: groups can't be found by labels; use cidrGroupRef".to_owned(),
        );
    }
    let holes = list(value, "except")?.into_iter().flatten();
    let except: Vec<IpNet> = holes.map(read_block).collect::<Result<_, _>>()?;
    match (&value["cidr"], &value["cidrGroupRef"]) {
        (Value::Null, Value::String(name)) => Ok(Peer::Place(Place::Group {
            name: name.as_str().into(),
            except,
        })),
        (cidr, Value::Null) if !cidr.is_null() => {
            let whole = read_block(cidr)?;
            match except.iter().find(|one| !whole.contains(*one)) {
                Some(stray) => Err(format!(
                    "except {stray} is no part of {whole}; leave it out"
                )),
                None => block(cidr, &except),
            }
        }
        _ => Err("has not one of cidr and cidrGroupRef; name one".to_owned()),
    }
}
