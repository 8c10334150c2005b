//! Services that rules name: whom they are made of.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::Arc;

use crate::rule::{Block, Name, Peer, ServicePeer, Which};
use crate::selector::{Key, Labels, Test};

/// What of a Service rules look at.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ServiceView {
    /// Its labels.
    pub labels: Labels,
    /// Its `spec.selector`; empty where its endpoints are written by others.
    pub selector: Labels,
}

/// The Services that there are, and the endpoints of those without a selector.
#[derive(Debug, Default)]
pub struct Services {
    services: BTreeMap<Name, ServiceView>,
    /// EndpointSlices: whose they are, and their addresses.
    slices: BTreeMap<Name, (Name, BTreeSet<IpAddr>)>,
}

/// Takes an entry, or its end; whether that is news.
fn put<T: PartialEq>(all: &mut BTreeMap<Name, T>, name: &Name, value: Option<T>) -> bool {
    match value {
        Some(value) if all.get(name) == Some(&value) => false,
        Some(value) => {
            all.insert(name.clone(), value);
            true
        }
        None => all.remove(name).is_some(),
    }
}

impl Services {
    /// Takes a Service; none removes it. Whether that is news.
    pub fn set(&mut self, name: &Name, service: Option<ServiceView>) -> bool {
        put(&mut self.services, name, service)
    }

    /// Takes an EndpointSlice: its Service, and its addresses; none removes it. Whether that is news.
    pub fn set_slice(&mut self, name: &Name, slice: Option<(Name, BTreeSet<IpAddr>)>) -> bool {
        put(&mut self.slices, name, slice)
    }

    /// Names of all Services and slices that are known.
    pub fn names(&self) -> [Vec<Name>; 2] {
        [
            self.services.keys().cloned().collect(),
            self.slices.keys().cloned().collect(),
        ]
    }

    /// Whom a rule means: the pods that a Service selects, ready or not, and the endpoints of one without a selector.
    pub fn peers(&self, peer: &ServicePeer) -> Vec<Peer> {
        let meant = |(namespace, name): &Name, service: &ServiceView| {
            let near = peer
                .namespace
                .as_ref()
                .is_none_or(|own| **own == **namespace);
            near && match &peer.which {
                Which::Name(wanted) => **wanted == **name,
                Which::Labels(selector) => selector.selects_labels(&service.labels),
            }
        };
        let all = self.services.iter();
        let all = all.filter(|(name, service)| meant(name, service));
        all.flat_map(|(name, service)| match service.selector.is_empty() {
            true => self.endpoints(name).map(Peer::Block).collect(),
            false => vec![pods(&name.0, &service.selector)],
        })
        .collect()
    }

    fn endpoints(&self, service: &Name) -> impl Iterator<Item = Block> {
        let slices = self.slices.values().filter(move |(of, _)| of == service);
        let addresses: BTreeSet<IpAddr> = slices.flat_map(|(_, all)| all.iter().copied()).collect();
        addresses.into_iter().map(|address| Block {
            cidr: address.into(),
            except: Vec::new(),
            outside: false,
        })
    }
}

/// Pods of a namespace with these labels.
fn pods(namespace: &str, labels: &Labels) -> Peer {
    let one = |value: &str| Test::In(BTreeSet::from([value.to_owned()]));
    let labels = labels.iter();
    let labels = labels.map(|(key, value)| (Key::Label(key.clone()), one(value)));
    let asked = labels.chain([(Key::Namespace, one(namespace))]);
    Peer::Pods(Arc::new(asked.collect()))
}
