//! What resolvers answer: who may be believed, and what the kernel learns of it.

use std::collections::BTreeSet;
use std::net::IpAddr;

use tracing::warn;
use xebec_dataplane_common::policy::{IDENTITY_HOST, IDENTITY_REMOTE_NODE};

use super::Engine;
use crate::domains::{Domains, Told};
use crate::kernel::PolicyKernel;
use crate::kind::Kind;

/// Where the cluster's resolver is, and the label that its pods have, whichever program it is.
const RESOLVER: (&str, &str, &str) = ("kube-system", "k8s-app", "kube-dns");

fn is_resolver(kind: &Kind) -> bool {
    let (namespace, label, value) = RESOLVER;
    kind.namespace == namespace && kind.labels.get(label).is_some_and(|own| own == value)
}

impl<K: PolicyKernel> Engine<K> {
    /// Whether what an address answers is believed: that of a node, or of a pod of the cluster's resolver.
    pub fn is_resolver(&self, address: IpAddr) -> bool {
        let Some(owner) = self.addresses.get(&address) else {
            return false;
        };
        match owner.identity {
            IDENTITY_HOST | IDENTITY_REMOTE_NODE => true,
            identity => self
                .kinds
                .get(identity)
                .is_some_and(|kind| is_resolver(kind)),
        }
    }

    /// Ports that the cluster's resolver says it answers at.
    pub fn resolver_ports(&self) -> BTreeSet<u16> {
        let kinds = self.kinds.of_namespace(RESOLVER.0);
        let kinds = kinds.filter_map(|identity| self.kinds.get(identity));
        kinds
            .filter(|kind| is_resolver(kind))
            .flat_map(|kind| &kind.ports)
            .filter(|(name, ..)| name.starts_with("dns"))
            .map(|(_, _, port)| *port)
            .collect()
    }

    /// Takes what a resolver answered for a name ([`plain`](crate::domains::plain)); once this returns, the kernel lets
    /// through what rules about the name allow. What did not fit is among the [`problems`](Self::problems) after the
    /// next refresh.
    pub fn learn(&mut self, name: &str, told: &[Told]) {
        let (sets, lost) = self.places.learn(name, told);
        self.forget_addresses(&lost);
        let addresses: Vec<IpAddr> = told.iter().map(|one| one.address).collect();
        for set in sets {
            let learned = self
                .sets
                .learn(&mut self.kernel, &self.places, set, &addresses);
            if let Err(error) = learned {
                warn!(
                    error = format!("{error:#}"),
                    name, "rules do not know all addresses of a name"
                );
                self.supersede([set].into());
            }
        }
    }

    /// Forgets what resolvers told that ended before `now`, in seconds since 1970, and is not used any more.
    pub fn expire_domains(&mut self, now: u64, used: impl Fn(IpAddr) -> bool) {
        let lost = self.places.expire(now, used);
        self.forget_addresses(&lost);
    }

    /// Takes addresses that names lost from the sets with rules about them; where that fails, the next refresh makes other
    /// sets.
    fn forget_addresses(&mut self, lost: &BTreeSet<IpAddr>) {
        if lost.is_empty() {
            return;
        }
        for set in self.places.about_domains() {
            let forgotten = self.sets.forget(&mut self.kernel, &self.places, set, lost);
            if let Err(error) = forgotten {
                warn!(
                    error = format!("{error:#}"),
                    "rules know addresses that names lost, until they are made anew"
                );
                self.supersede([set].into());
            }
        }
    }

    /// The names that resolvers told of.
    pub fn domains(&self) -> &Domains {
        self.places.domains()
    }
}
