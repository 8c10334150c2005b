//! `cilium.io` CiliumNetworkPolicy, CiliumClusterwideNetworkPolicy and CiliumCIDRGroup.
//!
//! Their rules and those of NetworkPolicies are one tier; a rule that denies beats all that allow.

use std::collections::BTreeMap;
use std::net::IpAddr;

use ipnet::IpNet;
use serde::Deserialize;
use serde_json::Value;

use crate::ends::{Party, Pod, PortProtocol};
use crate::object;
use crate::selector::Selector;
use crate::services::Named;
use crate::tiers::{Found, View};
use crate::{Direction, Protocol, RuleRef, names};

/// The blocks of CiliumCIDRGroups, by name.
pub type Groups = BTreeMap<String, Vec<Block>>;

/// A CiliumNetworkPolicy or CiliumClusterwideNetworkPolicy.
pub struct CiliumPolicy {
    kind: String,
    /// Empty for one of the whole cluster.
    namespace: String,
    name: String,
    specs: Vec<Spec>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
struct Spec {
    endpoint_selector: Option<Selector>,
    node_selector: Option<Selector>,
    enable_default_deny: Option<DefaultDeny>,
    ingress: Option<Vec<Rule>>,
    ingress_deny: Option<Vec<Rule>>,
    egress: Option<Vec<Rule>>,
    egress_deny: Option<Vec<Rule>>,
    #[serde(rename = "labels")]
    _labels: Option<Value>,
    #[serde(rename = "description")]
    _description: Option<String>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct DefaultDeny {
    ingress: Option<bool>,
    egress: Option<bool>,
}

/// A rule of either direction, which its fields' names must fit.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Rule {
    #[serde(rename = "fromEndpoints", alias = "toEndpoints")]
    endpoints: Option<Vec<Selector>>,
    #[serde(rename = "fromEntities", alias = "toEntities")]
    entities: Option<Vec<Entity>>,
    #[serde(rename = "fromCIDR", alias = "toCIDR")]
    blocks: Option<Vec<Block>>,
    #[serde(rename = "fromCIDRSet", alias = "toCIDRSet")]
    sets: Option<Vec<BlockSet>>,
    #[serde(rename = "toFQDNs")]
    domains: Option<Vec<Domain>>,
    #[serde(rename = "toServices")]
    services: Option<Vec<Named>>,
    #[serde(rename = "toPorts")]
    ports: Option<Vec<Ports>>,
    icmps: Option<Vec<Icmps>>,
}

/// Those with addresses by a name, or by names like a pattern.
#[derive(Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
struct Domain {
    match_name: Option<String>,
    match_pattern: Option<String>,
}

#[derive(Clone, Copy, Deserialize)]
#[serde(rename_all = "kebab-case")]
enum Entity {
    All,
    Cluster,
    Health,
    Host,
    Ingress,
    Init,
    None,
    RemoteNode,
    Unmanaged,
    World,
}

/// A block of addresses, or a single address.
#[derive(Deserialize)]
#[serde(untagged)]
pub enum Block {
    Net(IpNet),
    Address(IpAddr),
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
struct BlockSet {
    cidr: Option<Block>,
    cidr_group_ref: Option<String>,
    except: Option<Vec<Block>>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Ports {
    ports: Vec<Port>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
struct Port {
    /// A number, 0 for all, or a name.
    port: String,
    end_port: Option<u16>,
    protocol: Option<AnyProtocol>,
}

#[derive(Clone, Copy, Default, Deserialize, PartialEq)]
#[serde(rename_all = "UPPERCASE")]
enum AnyProtocol {
    #[default]
    Any,
    Tcp,
    Udp,
    Sctp,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Icmps {
    fields: Vec<Icmp>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Icmp {
    #[serde(default)]
    family: Family,
    r#type: NumberOrName,
}

#[derive(Clone, Copy, Default, Deserialize, PartialEq)]
enum Family {
    #[default]
    IPv4,
    IPv6,
}

#[derive(Deserialize)]
#[serde(untagged)]
enum NumberOrName {
    Number(u8),
    Name(String),
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct GroupSpec {
    #[serde(rename = "externalCIDRs")]
    blocks: Vec<Block>,
}

/// A rule with the list it stands in.
struct Listed<'a> {
    rule: &'a Rule,
    denies: bool,
    list: &'static str,
    index: usize,
}

const NAMESPACE: &str = "io.kubernetes.pod.namespace";
const NAMESPACE_LABELS: &str = "io.cilium.k8s.namespace.labels.";
const SERVICE_ACCOUNT: &str = "io.cilium.k8s.policy.serviceaccount";

/// Reads a CiliumCIDRGroup.
pub fn group(object: &Value) -> (String, Vec<Block>) {
    let spec: GroupSpec = object::read(object, "spec");
    (object::metadata(object).name, spec.blocks)
}

impl CiliumPolicy {
    /// Reads one.
    pub fn of(policy: &Value) -> Self {
        let metadata = object::metadata(policy);
        let kind = object::kind(policy).to_owned();
        let one: Option<Spec> = object::read(policy, "spec");
        let several: Option<Vec<Spec>> = object::read(policy, "specs");
        let read = Self {
            kind,
            namespace: metadata.namespace,
            name: metadata.name,
            specs: one
                .into_iter()
                .chain(several.into_iter().flatten())
                .collect(),
        };
        read.check(policy);
        read
    }

    /// Refuses what the API refuses, and what would be ambiguous.
    fn check(&self, policy: &Value) {
        let check = |is: bool, what: &str| assert!(is, "{what}: {policy}");
        let is_clusterwide = self.kind == "CiliumClusterwideNetworkPolicy";
        check(
            self.namespace.is_empty() == is_clusterwide,
            "a namespace, or none, as the kind has it",
        );
        let several = policy["specs"].as_array().into_iter().flatten();
        for spec in std::iter::once(&policy["spec"]).chain(several) {
            for (list, foreign) in [
                ("ingress", "to"),
                ("ingressDeny", "to"),
                ("egress", "from"),
                ("egressDeny", "from"),
            ] {
                let rules = spec[list].as_array().into_iter().flatten();
                let keys = rules
                    .filter_map(Value::as_object)
                    .flat_map(|rule| rule.keys());
                for key in keys.filter(|key| *key != "toPorts") {
                    check(
                        !key.starts_with(foreign),
                        "peers must be of the rule's direction",
                    );
                }
            }
        }
        for spec in &self.specs {
            check(
                spec.endpoint_selector.is_some() != spec.node_selector.is_some(),
                "either endpointSelector or nodeSelector",
            );
            check(
                is_clusterwide || spec.node_selector.is_none(),
                "a namespace has no nodes",
            );
            let keys = spec.endpoint_selector.iter().flat_map(Selector::keys);
            let keys: Vec<&str> = keys.collect();
            check(
                is_clusterwide || !keys.iter().any(|key| is_label(key, NAMESPACE)),
                "the endpointSelector of a namespace's policy names no namespace",
            );
            for direction in [Direction::Ingress, Direction::Egress] {
                for Listed { rule, denies, .. } in spec.rules(direction) {
                    check(
                        !denies || rule.domains.is_none(),
                        "names are for rules that allow",
                    );
                    check(
                        spec.node_selector.is_none() || rule.domains.is_none(),
                        "names are for pods",
                    );
                    for service in rule.services.iter().flatten() {
                        check(service.is_right(), "an entry of toServices names some");
                    }
                    for domain in rule.domains.iter().flatten() {
                        check(
                            domain.match_name.is_some() || domain.match_pattern.is_some(),
                            "an entry of toFQDNs has a name or a pattern",
                        );
                    }
                    let sizes = rule.peer_lists();
                    let filled = sizes.iter().flatten().filter(|size| **size > 0).count();
                    check(filled <= 1, "a rule has peers of one form");
                    let has = |size: Option<usize>| size.is_some_and(|size| size > 0);
                    let ports = has(rule.ports.as_ref().map(Vec::len));
                    let icmps = has(rule.icmps.as_ref().map(Vec::len));
                    check(!ports || !icmps, "toPorts and icmps are for two rules");
                    for ports in rule.ports.iter().flatten() {
                        check(!ports.ports.is_empty(), "an entry of toPorts has ports");
                        for port in &ports.ports {
                            let number = port.number();
                            let has_letter = port.port.chars().any(|one| one.is_ascii_alphabetic());
                            check(
                                number.is_some() || has_letter,
                                "a port is a number or a name",
                            );
                            check(
                                port.end_port
                                    .is_none_or(|end| number.is_some_and(|one| one <= end)),
                                "endPort goes with a port's number, not above it",
                            );
                        }
                    }
                    for icmps in rule.icmps.iter().flatten() {
                        check(!icmps.fields.is_empty(), "an entry of icmps has fields");
                        for field in &icmps.fields {
                            check(field.number().is_some(), "a type of ICMP that is known");
                        }
                    }
                    for set in rule.sets.iter().flatten() {
                        check(
                            set.cidr.is_some() != set.cidr_group_ref.is_some(),
                            "either cidr or cidrGroupRef",
                        );
                    }
                }
            }
        }
    }

    /// Adds what its rules say of a packet.
    pub fn ask(&self, groups: &Groups, view: &View<'_>, found: &mut Found) {
        // The places of the lists of all specs go on counting.
        let mut before = BTreeMap::<&str, usize>::new();
        for spec in &self.specs {
            let selects = self.is_subject(spec, view);
            let rules = spec.rules(view.direction);
            if selects && !rules.is_empty() && spec.denies_by_default(view.direction) {
                found.isolated = true;
            }
            let mut counts = BTreeMap::<&str, usize>::new();
            for Listed {
                rule,
                denies,
                list,
                index,
            } in rules
            {
                *counts.entry(list).or_default() += 1;
                if !selects || !rule.is(view, &self.namespace, groups) {
                    continue;
                }
                let place = RuleRef {
                    kind: self.kind.clone(),
                    namespace: self.namespace.clone(),
                    name: self.name.clone(),
                    list: list.into(),
                    index: index + before.get(list).copied().unwrap_or_default(),
                };
                if denies {
                    found.deny.push(place);
                } else {
                    found.allow.push(place);
                }
            }
            for (list, count) in counts {
                *before.entry(list).or_default() += count;
            }
        }
    }

    fn is_subject(&self, spec: &Spec, view: &View<'_>) -> bool {
        let pod = view.subject;
        if view.is_node {
            let of_node = |key: &str| {
                let sources = ["k8s:", "any:"];
                let plain = sources.iter().find_map(|one| key.strip_prefix(one));
                pod.labels.get(plain.unwrap_or(key)).map(String::as_str)
            };
            let selector = spec.node_selector.as_ref();
            return selector.is_some_and(|one| one.matches_with(of_node));
        }
        let Some(selector) = &spec.endpoint_selector else {
            return false;
        };
        let labels = pod_labels(pod);
        (self.namespace.is_empty() || self.namespace == pod.namespace)
            && selector.matches_with(|key| find(&labels, key))
    }
}

impl Spec {
    /// The rules of a direction, those that allow first.
    fn rules(&self, direction: Direction) -> Vec<Listed<'_>> {
        let lists = match direction {
            Direction::Ingress => [
                ("ingress", &self.ingress, false),
                ("ingressDeny", &self.ingress_deny, true),
            ],
            Direction::Egress => [
                ("egress", &self.egress, false),
                ("egressDeny", &self.egress_deny, true),
            ],
        };
        let mut all = Vec::new();
        for (list, rules, denies) in lists {
            for (index, rule) in rules.iter().flatten().enumerate() {
                all.push(Listed {
                    rule,
                    denies,
                    list,
                    index,
                });
            }
        }
        all
    }

    /// Whether a pod that it has rules for is isolated, which it is unless the policy says otherwise.
    fn denies_by_default(&self, direction: Direction) -> bool {
        let said = self
            .enable_default_deny
            .as_ref()
            .and_then(|said| match direction {
                Direction::Ingress => said.ingress,
                Direction::Egress => said.egress,
            });
        said.unwrap_or(true)
    }
}

impl Rule {
    /// How many entries each list of peers has, if it is there.
    fn peer_lists(&self) -> [Option<usize>; 6] {
        [
            self.endpoints.as_ref().map(Vec::len),
            self.entities.as_ref().map(Vec::len),
            self.blocks.as_ref().map(Vec::len),
            self.sets.as_ref().map(Vec::len),
            self.domains.as_ref().map(Vec::len),
            self.services.as_ref().map(Vec::len),
        ]
    }

    fn is(&self, view: &View<'_>, namespace: &str, groups: &Groups) -> bool {
        !self.is_empty() && self.has_peer(view, namespace, groups) && self.has_port(view)
    }

    /// Whether it names neither peers nor ports: such a rule is there to isolate, and is about nobody.
    fn is_empty(&self) -> bool {
        let has = |size: Option<usize>| size.is_some_and(|size| size > 0);
        self.peer_lists().iter().all(Option::is_none)
            && !has(self.ports.as_ref().map(Vec::len))
            && !has(self.icmps.as_ref().map(Vec::len))
    }

    /// Whether the other end is a peer: anybody if there is no list but ports, nobody if a list is there and empty.
    fn has_peer(&self, view: &View<'_>, namespace: &str, groups: &Groups) -> bool {
        let lists = self.peer_lists();
        if lists.contains(&Some(0)) {
            return false;
        }
        if lists.iter().all(Option::is_none) {
            return true;
        }
        let mut endpoints = self.endpoints.iter().flatten();
        let mut entities = self.entities.iter().flatten();
        let mut blocks = self.blocks.iter().flatten();
        let mut sets = self.sets.iter().flatten();
        let mut domains = self.domains.iter().flatten();
        let mut services = self.services.iter().flatten();
        // Blocks are of addresses outside of the cluster alone.
        let is_outside = matches!(view.peer, Party::Outside);
        let address = view.peer_address();
        endpoints.any(|one| is_endpoint(one, view, namespace))
            || entities.any(|one| one.is(view))
            || is_outside && blocks.any(|one| one.has(&address))
            || is_outside && sets.any(|one| one.has(&address, groups))
            || services.any(|one| one.has(view.services, view.peer, address))
            || is_outside && domains.any(|one| view.names.iter().any(|name| one.is(name)))
    }

    /// Whether the packet is for a port, or of an ICMP type, of the rule; with peers alone, every packet is.
    fn has_port(&self, view: &View<'_>) -> bool {
        let ports: Vec<&Ports> = self.ports.iter().flatten().collect();
        let icmps: Vec<&Icmps> = self.icmps.iter().flatten().collect();
        if ports.is_empty() && icmps.is_empty() {
            return true;
        }
        let mut ports = ports.iter().flat_map(|one| &one.ports);
        let mut icmps = icmps.iter().flat_map(|one| &one.fields);
        ports.any(|one| one.is(view)) || icmps.any(|one| one.is(view))
    }
}

impl Domain {
    fn is(&self, name: &str) -> bool {
        let (one, like) = (self.match_name.as_ref(), self.match_pattern.as_ref());
        one.is_some_and(|one| names::is(name, one))
            || like.is_some_and(|like| names::is_like(name, like))
    }
}

/// Whether the other end has labels that a selector of peers asks for. Where the selector doesn't say of which
/// namespaces, it is of pods: of the policy's namespace, or of all if the policy is the cluster's.
fn is_endpoint(selector: &Selector, view: &View<'_>, namespace: &str) -> bool {
    let labels = match view.peer {
        Party::Pod(pod) => pod_labels(pod),
        Party::Node(node) if node.name == view.subject.node => reserved("host"),
        Party::Node(_) => reserved("remote-node"),
        Party::Outside => reserved("world"),
    };
    let keys = selector.keys();
    let is_reserved = keys.iter().any(|key| key.starts_with("reserved:"));
    let says_namespace = keys.iter().any(|key| is_label(key, NAMESPACE));
    let says_labels = keys.iter().any(|key| has_prefix(key, NAMESPACE_LABELS));
    let fits = if is_reserved || says_namespace {
        true
    } else if namespace.is_empty() {
        view.peer.pod().is_some()
    } else {
        says_labels
            || view
                .peer
                .pod()
                .is_some_and(|pod| pod.namespace == namespace)
    };
    fits && selector.matches_with(|key| find(&labels, key))
}

/// Labels by source and key.
type Labels = BTreeMap<(&'static str, String), String>;

fn reserved(name: &str) -> Labels {
    [(("reserved", name.to_owned()), String::new())].into()
}

fn pod_labels(pod: &Pod) -> Labels {
    let own = pod
        .labels
        .iter()
        .map(|(key, value)| (key.clone(), value.clone()));
    let spaces = pod.namespace_labels.iter();
    let spaces = spaces.map(|(key, value)| (format!("{NAMESPACE_LABELS}{key}"), value.clone()));
    let more = [
        (NAMESPACE.to_owned(), pod.namespace.clone()),
        (SERVICE_ACCOUNT.to_owned(), pod.service_account.clone()),
    ];
    let all = own.chain(spaces).chain(more);
    all.map(|(key, value)| (("k8s", key), value)).collect()
}

/// The source that a selector's key asks for, and the key without it; a source of any if none is said.
fn split(key: &str) -> (&str, &str) {
    key.split_once(':').unwrap_or(("any", key))
}

fn is_label(key: &str, label: &str) -> bool {
    let (source, key) = split(key);
    matches!(source, "any" | "k8s") && key == label
}

fn has_prefix(key: &str, prefix: &str) -> bool {
    let (source, key) = split(key);
    matches!(source, "any" | "k8s") && key.starts_with(prefix)
}

fn find<'a>(labels: &'a Labels, key: &str) -> Option<&'a str> {
    let (source, key) = split(key);
    let sources: &[&'static str] = match source {
        "any" => &["k8s", "reserved"],
        "k8s" => &["k8s"],
        "reserved" => &["reserved"],
        other => panic!("{other} is no source of labels that is known here"),
    };
    let mut values = sources
        .iter()
        .filter_map(|source| labels.get(&(*source, key.to_owned())));
    values.next().map(String::as_str)
}

impl Entity {
    fn is(self, view: &View<'_>) -> bool {
        match (self, view.peer) {
            (Self::All, _) | (Self::World, Party::Outside) => true,
            (Self::Cluster, peer) => !matches!(peer, Party::Outside),
            (Self::Host, Party::Node(node)) => node.name == view.subject.node,
            (Self::RemoteNode, Party::Node(node)) => node.name != view.subject.node,
            // The rest are parts of Cilium, or pods that it doesn't know.
            _ => false,
        }
    }
}

impl Block {
    fn has(&self, address: &IpAddr) -> bool {
        match self {
            Self::Net(net) => net.contains(address),
            Self::Address(one) => one == address,
        }
    }
}

impl BlockSet {
    /// A group that isn't there has no addresses.
    fn has(&self, address: &IpAddr, groups: &Groups) -> bool {
        let group = self
            .cidr_group_ref
            .iter()
            .filter_map(|name| groups.get(name));
        let mut blocks = self.cidr.iter().chain(group.flatten());
        let mut holes = self.except.iter().flatten();
        blocks.any(|one| one.has(address)) && !holes.any(|one| one.has(address))
    }
}

impl Port {
    fn number(&self) -> Option<u16> {
        self.port.parse().ok()
    }

    fn is(&self, view: &View<'_>) -> bool {
        let protocols: &[PortProtocol] = match self.protocol.unwrap_or_default() {
            AnyProtocol::Any => &[PortProtocol::Tcp, PortProtocol::Udp, PortProtocol::Sctp],
            AnyProtocol::Tcp => &[PortProtocol::Tcp],
            AnyProtocol::Udp => &[PortProtocol::Udp],
            AnyProtocol::Sctp => &[PortProtocol::Sctp],
        };
        protocols.iter().any(|protocol| match self.number() {
            Some(0) => protocol.is(view.packet.protocol),
            Some(first) => view.is_for(*protocol, first, self.end_port.unwrap_or(first)),
            None => protocol.is(view.packet.protocol) && view.is_for_named(&self.port),
        })
    }
}

impl Icmp {
    /// The type's number.
    fn number(&self) -> Option<u8> {
        let name = match &self.r#type {
            NumberOrName::Number(number) => return Some(*number),
            NumberOrName::Name(name) => name.as_str(),
        };
        let names: &[(&str, u8)] = match self.family {
            Family::IPv4 => &ICMP_TYPES,
            Family::IPv6 => &ICMPV6_TYPES,
        };
        let named = names.iter().find(|(one, _)| *one == name);
        named.map_or_else(|| name.parse().ok(), |(_, number)| Some(*number))
    }

    /// Whether the packet is of this type, with whichever code.
    fn is(&self, view: &View<'_>) -> bool {
        let packet = view.packet;
        let family = match packet.to_address {
            IpAddr::V4(_) => Family::IPv4,
            IpAddr::V6(_) => Family::IPv6,
        };
        let [kind, _code] = packet.port.to_be_bytes();
        packet.protocol == Protocol::Icmp && self.family == family && self.number() == Some(kind)
    }
}

/// Names of types of ICMP, with the numbers that IANA gave them.
const ICMP_TYPES: [(&str, u8); 14] = [
    ("EchoReply", 0),
    ("DestinationUnreachable", 3),
    ("Redirect", 5),
    ("Echo", 8),
    ("EchoRequest", 8),
    ("RouterAdvertisement", 9),
    ("RouterSelection", 10),
    ("TimeExceeded", 11),
    ("ParameterProblem", 12),
    ("Timestamp", 13),
    ("TimestampReply", 14),
    ("Photuris", 40),
    ("ExtendedEchoRequest", 42),
    ("ExtendedEchoReply", 43),
];

/// Names of types of ICMPv6.
const ICMPV6_TYPES: [(&str, u8); 27] = [
    ("DestinationUnreachable", 1),
    ("PacketTooBig", 2),
    ("TimeExceeded", 3),
    ("ParameterProblem", 4),
    ("EchoRequest", 128),
    ("EchoReply", 129),
    ("MulticastListenerQuery", 130),
    ("MulticastListenerReport", 131),
    ("MulticastListenerDone", 132),
    ("RouterSolicitation", 133),
    ("RouterAdvertisement", 134),
    ("NeighborSolicitation", 135),
    ("NeighborAdvertisement", 136),
    ("RedirectMessage", 137),
    ("RouterRenumbering", 138),
    ("ICMPNodeInformationQuery", 139),
    ("ICMPNodeInformationResponse", 140),
    ("InverseNeighborDiscoverySolicitation", 141),
    ("InverseNeighborDiscoveryAdvertisement", 142),
    ("HomeAgentAddressDiscoveryRequest", 144),
    ("HomeAgentAddressDiscoveryReply", 145),
    ("MobilePrefixSolicitation", 146),
    ("MobilePrefixAdvertisement", 147),
    ("DuplicateAddressRequestCodeSuffix", 157),
    ("DuplicateAddressConfirmationCodeSuffix", 158),
    ("ExtendedEchoRequest", 160),
    ("ExtendedEchoReply", 161),
];

#[cfg(test)]
mod tests;
