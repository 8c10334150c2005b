//! What all kinds of policies are made of, whichever API they come by.

use std::fmt;
use std::sync::Arc;

use ipnet::IpNet;
use xebec_dataplane_common::policy::{SEATS, WIDE};

use crate::domains::Pattern;
use crate::selector::Selector;

/// Namespace and name.
pub type Name = (String, String);

/// Which way packets go, seen from the pod.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Direction {
    /// To the pod.
    Ingress,
    /// From the pod.
    Egress,
}

impl Direction {
    /// Both.
    pub const ALL: [Self; 2] = [Self::Ingress, Self::Egress];

    /// As policyTypes name it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Ingress => "Ingress",
            Self::Egress => "Egress",
        }
    }

    /// Its place in what has one for each.
    pub fn index(self) -> usize {
        self as usize
    }
}

/// In which order policies are asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Tier {
    /// Before all others: ClusterNetworkPolicy (tier Admin), AdminNetworkPolicy.
    Admin,
    /// NetworkPolicy and Cilium's.
    Network,
    /// Where none of the former isolates: ClusterNetworkPolicy (tier Baseline), BaselineAdminNetworkPolicy.
    Baseline,
}

impl Tier {
    /// All, in their order.
    pub const ALL: [Self; 3] = [Self::Admin, Self::Network, Self::Baseline];

    /// Where its sets are in a chain.
    pub fn seats(self) -> impl Iterator<Item = Seat> {
        let all = Seat::ALL.into_iter();
        all.filter(move |seat| seat.tier() == self)
    }
}

/// How many kinds of pods are many. Those of a namespace are as well, be they few: more of them come.
const MANY: usize = 8;

/// Where in a chain the set of a policy is ([`Chain`](xebec_dataplane_common::policy::Chain)).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Seat {
    /// That of the first tier.
    Admin,
    /// Of the second tier, with policies that are for many kinds of pods, which have it in common: so a change of one of
    /// them has few sets made anew.
    Wide,
    /// Of the second tier, with the others.
    Network,
    /// That of the last tier.
    Baseline,
}

impl Seat {
    /// All, in their order.
    pub const ALL: [Self; SEATS] = [Self::Admin, Self::Wide, Self::Network, Self::Baseline];

    /// The tier that its set decides in.
    pub fn tier(self) -> Tier {
        match self {
            Self::Admin => Tier::Admin,
            Self::Wide | Self::Network => Tier::Network,
            Self::Baseline => Tier::Baseline,
        }
    }

    /// That of a policy, which is for so many kinds of this node's pods when it comes.
    pub fn of(policy: &Policy, kinds: usize) -> Self {
        let wide = || kinds >= MANY || policy.subject.looks_at_namespaces_alone();
        match policy.tier {
            Tier::Admin => Self::Admin,
            Tier::Network if wide() => Self::Wide,
            Tier::Network => Self::Network,
            Tier::Baseline => Self::Baseline,
        }
    }

    /// The place in the chain.
    pub fn place(self) -> usize {
        match self {
            Self::Admin => 0,
            Self::Wide => WIDE,
            Self::Network => WIDE + 1,
            Self::Baseline => SEATS - 1,
        }
    }
}

/// What a rule does with what it matches.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Action {
    /// Lets it through.
    Allow,
    /// Drops it.
    Deny,
    /// Leaves it to the next tier.
    Pass,
}

/// The kinds of objects that are policies.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Source {
    /// `networking.k8s.io/v1`.
    NetworkPolicy,
    /// `policy.networking.k8s.io/v1alpha2`.
    ClusterNetworkPolicy,
    /// `policy.networking.k8s.io/v1alpha1`.
    AdminNetworkPolicy,
    /// `policy.networking.k8s.io/v1alpha1`.
    BaselineAdminNetworkPolicy,
    /// `cilium.io/v2`.
    CiliumNetworkPolicy,
    /// `cilium.io/v2`.
    CiliumClusterwideNetworkPolicy,
    /// `cilium.io/v2`: no policy, but policies refer to it.
    CiliumCidrGroup,
}

impl Source {
    /// All of them.
    pub const ALL: [Self; 7] = [
        Self::NetworkPolicy,
        Self::ClusterNetworkPolicy,
        Self::AdminNetworkPolicy,
        Self::BaselineAdminNetworkPolicy,
        Self::CiliumNetworkPolicy,
        Self::CiliumClusterwideNetworkPolicy,
        Self::CiliumCidrGroup,
    ];

    /// That of an object, if it is any.
    pub fn of(api_version: &str, kind: &str) -> Option<Self> {
        let mut all = Self::ALL.into_iter();
        all.find(|one| one.api_version() == api_version && one.kind() == kind)
    }

    /// Whether its objects are in namespaces.
    pub fn is_namespaced(self) -> bool {
        matches!(self, Self::NetworkPolicy | Self::CiliumNetworkPolicy)
    }

    /// Its resource, as paths and definitions have it.
    pub fn plural(self) -> &'static str {
        match self {
            Self::NetworkPolicy => "networkpolicies",
            Self::ClusterNetworkPolicy => "clusternetworkpolicies",
            Self::AdminNetworkPolicy => "adminnetworkpolicies",
            Self::BaselineAdminNetworkPolicy => "baselineadminnetworkpolicies",
            Self::CiliumNetworkPolicy => "ciliumnetworkpolicies",
            Self::CiliumClusterwideNetworkPolicy => "ciliumclusterwidenetworkpolicies",
            Self::CiliumCidrGroup => "ciliumcidrgroups",
        }
    }

    /// As `apiVersion` has it.
    pub fn api_version(self) -> &'static str {
        match self {
            Self::NetworkPolicy => "networking.k8s.io/v1",
            Self::ClusterNetworkPolicy => "policy.networking.k8s.io/v1alpha2",
            Self::AdminNetworkPolicy | Self::BaselineAdminNetworkPolicy => {
                "policy.networking.k8s.io/v1alpha1"
            }
            Self::CiliumNetworkPolicy
            | Self::CiliumClusterwideNetworkPolicy
            | Self::CiliumCidrGroup => "cilium.io/v2",
        }
    }

    /// As `kind` has it.
    pub fn kind(self) -> &'static str {
        match self {
            Self::NetworkPolicy => "NetworkPolicy",
            Self::ClusterNetworkPolicy => "ClusterNetworkPolicy",
            Self::AdminNetworkPolicy => "AdminNetworkPolicy",
            Self::BaselineAdminNetworkPolicy => "BaselineAdminNetworkPolicy",
            Self::CiliumNetworkPolicy => "CiliumNetworkPolicy",
            Self::CiliumClusterwideNetworkPolicy => "CiliumClusterwideNetworkPolicy",
            Self::CiliumCidrGroup => "CiliumCIDRGroup",
        }
    }
}

/// A policy's object.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct PolicyRef {
    /// What it is.
    pub source: Source,
    /// Its namespace; empty where it has none.
    pub namespace: String,
    /// Its name.
    pub name: String,
}

impl fmt::Display for PolicyRef {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        out.write_str(self.source.kind())?;
        if self.namespace.is_empty() {
            write!(out, " {}", self.name)
        } else {
            write!(out, " {}/{}", self.namespace, self.name)
        }
    }
}

/// Where a rule stands.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct RuleId {
    /// The policy.
    pub policy: Arc<PolicyRef>,
    /// Under which list of its spec: `ingress`, `egress`, `ingressDeny`, `egressDeny`.
    pub list: &'static str,
    /// Its place there, from 0.
    pub index: usize,
}

impl RuleId {
    /// Which way it judges.
    pub fn direction(&self) -> Direction {
        if self.list.starts_with("egress") {
            Direction::Egress
        } else {
            Direction::Ingress
        }
    }
}

impl fmt::Display for RuleId {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(out, "{} {}[{}]", self.policy, self.list, self.index)
    }
}

/// Whom a rule is about.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Peer {
    /// Everybody.
    Anybody,
    /// Pods.
    Pods(Arc<Selector>),
    /// Whoever has this identity of those that are no pods'.
    Identity(u32),
    /// Addresses.
    Block(Block),
    /// Addresses that others tell of.
    Place(Place),
    /// Whom Services are made of; the engine puts them in its place.
    Services(ServicePeer),
}

/// Services.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct ServicePeer {
    /// Of this namespace alone, or of all.
    pub namespace: Option<Arc<str>>,
    /// Which of them.
    pub which: Which,
}

/// Which Services are meant.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Which {
    /// The one of this name.
    Name(Arc<str>),
    /// Those with these labels.
    Labels(Arc<Selector>),
}

/// Addresses that are found by what they are of.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Place {
    /// Nodes, by their labels.
    Nodes(Arc<Selector>),
    /// The API server.
    ApiServer,
    /// What resolvers answered for domains, as far as it is outside of the cluster.
    Domains(Arc<Pattern>),
    /// A group of address blocks, of which only those outside of the cluster are meant.
    Group {
        /// Its name.
        name: Arc<str>,
        /// What of it is not meant.
        except: Vec<IpNet>,
    },
}

/// An address block with its exceptions.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Block {
    /// The block.
    pub cidr: IpNet,
    /// What of it is not meant.
    pub except: Vec<IpNet>,
    /// Whether pods and nodes in it are not meant either.
    pub outside: bool,
}

/// What a rule is about.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Ports {
    /// Everything.
    All,
    /// A protocol.
    Protocol(u8),
    /// Ports from the first to the last.
    Range {
        /// IP protocol number.
        protocol: u8,
        /// The first.
        first: u16,
        /// The last.
        last: u16,
    },
    /// What the destination calls so.
    Named {
        /// IP protocol number.
        protocol: u8,
        /// Name of a container's port.
        name: Arc<str>,
    },
    /// ICMP messages.
    Icmp {
        /// IP protocol number: that of ICMP or ICMPv6.
        protocol: u8,
        /// Type.
        kind: u8,
    },
}

/// A rule.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Rule {
    /// Which way.
    pub direction: Direction,
    /// Under which list of the spec it stands.
    pub list: &'static str,
    /// Its place there, from 0.
    pub index: usize,
    /// What it does.
    pub action: Action,
    /// Whom it is about: any of these.
    pub peers: Vec<Peer>,
    /// What it is about: any of these.
    pub ports: Vec<Ports>,
}

impl Rule {
    /// One that denies everything: what stands in for what is not understood.
    pub fn deny_all(direction: Direction, list: &'static str, index: usize) -> Self {
        Self {
            direction,
            list,
            index,
            action: Action::Deny,
            peers: vec![Peer::Anybody],
            ports: vec![Ports::All],
        }
    }
}

/// A policy.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Policy {
    /// Its object.
    pub id: Arc<PolicyRef>,
    /// When it is asked.
    pub tier: Tier,
    /// Before which others of its tier: lower first. Where all rules of a tier are asked at once, 0.
    pub priority: i32,
    /// The pods that it is for; of one for nodes, their labels.
    pub subject: Arc<Selector>,
    /// Whether it is for nodes, and not for pods.
    pub for_nodes: bool,
    /// Whether what no rule allows is denied, by [`Direction::index`].
    pub isolates: [bool; 2],
    /// Whether it tells what it would drop, and drops nothing.
    pub audit: bool,
    /// Its rules, in their order.
    pub rules: Vec<Rule>,
}

impl Policy {
    /// Where a rule of it stands.
    pub fn rule_id(&self, rule: &Rule) -> RuleId {
        RuleId {
            policy: self.id.clone(),
            list: rule.list,
            index: rule.index,
        }
    }

    /// Whether it has a say in a direction.
    pub fn judges(&self, direction: Direction) -> bool {
        self.isolates[direction.index()]
            || self.rules.iter().any(|rule| rule.direction == direction)
    }
}
