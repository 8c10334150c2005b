//! What of Services and EndpointSlices is kept: small, checked, and ready to compute with.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::Arc;

use ipnet::IpNet;
use kube::api::ObjectMeta;
use xebec_dataplane_common::ip::Ip;

use super::objects::{self, EndpointSlice, Service};
use super::pool::{Place, Places, Texts};
use super::select::{READY, SERVING, TERMINATING};

/// Asks that an object is left to another proxy.
const OTHER_PROXY: &str = "service.kubernetes.io/service-proxy-name";
const HEADLESS: &str = "service.kubernetes.io/headless";
/// The Service that a slice belongs to.
const SERVICE_NAME: &str = "kubernetes.io/service-name";
/// `random` or `maglev`.
const ALGORITHM: &str = "xebec.io/lb-algorithm";
/// A JSON object of endpoints' addresses and their weights, 0 to [`MAX_WEIGHT`]; others have 1.
const WEIGHTS: &str = "xebec.io/weights";
/// When what the slice tells of happened (RFC 3339).
const TRIGGERED: &str = "endpoints.kubernetes.io/last-change-trigger-time";
/// The largest weight.
pub const MAX_WEIGHT: u16 = 1000;
/// Faults that are named of one object; a hostile one may have any number.
const MAX_PROBLEMS: usize = 8;

/// How a backend is chosen.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Algorithm {
    Random,
    Maglev,
}

impl Algorithm {
    pub const fn name(self) -> &'static str {
        match self {
            Self::Random => "random",
            Self::Maglev => "maglev",
        }
    }
}

/// A port of a Service.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct PortView {
    pub name: Arc<str>,
    pub port: u16,
    /// 0 for none.
    pub node_port: u16,
    pub protocol: u8,
}

/// What few Services have.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Extra {
    pub external_ips: Vec<Ip>,
    pub load_balancer_ips: Vec<Ip>,
    pub ranges: Vec<IpNet>,
    pub weights: BTreeMap<Ip, u16>,
    pub algorithm: Option<Algorithm>,
    /// What is wrong with the object.
    pub problems: Vec<String>,
}

/// A Service.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ServiceView {
    /// When it was made, in seconds of Unix time.
    pub created: i64,
    pub uid: [u8; 16],
    /// Of IPv4 and of IPv6; [`Ip::NONE`] for none.
    pub cluster_ips: [Ip; 2],
    pub ports: Arc<[PortView]>,
    /// Seconds that a client keeps its backend; 0 for none.
    pub affinity: u32,
    pub internal_local: bool,
    pub external_local: bool,
    /// 0 for none.
    pub health_port: u16,
    pub extra: Option<Box<Extra>>,
}

/// The number of a protocol.
pub fn protocol(name: Option<&str>) -> Option<u8> {
    match name {
        None | Some("" | "TCP") => Some(6),
        Some("UDP") => Some(17),
        Some("SCTP") => Some(132),
        Some(_) => None,
    }
}

/// The name of a protocol.
pub const fn protocol_name(number: u8) -> &'static str {
    match number {
        17 => "UDP",
        132 => "SCTP",
        _ => "TCP",
    }
}

/// Namespace and name as one text.
pub fn full_name(metadata: &ObjectMeta) -> Option<String> {
    let (namespace, name) = (metadata.namespace.as_deref()?, metadata.name.as_deref()?);
    (!namespace.is_empty() && !name.is_empty()).then(|| [namespace, "/", name].concat())
}

/// The address, if packets may go to it: not one that means the host itself, a link or many.
pub fn usable(text: &str) -> Result<Ip, String> {
    let address: IpAddr = text
        .parse()
        .map_err(|_| format!("{text:?} is no IP address"))?;
    // An IPv4 address in IPv6's clothes is not let in by another door.
    if matches!(address, IpAddr::V6(six) if six.to_ipv4_mapped().is_some()) {
        return Err(format!("{text} is an IPv4-mapped IPv6 address"));
    }
    let link_local = match address {
        IpAddr::V4(four) => four.is_link_local() || four.is_broadcast(),
        IpAddr::V6(six) => six.is_unicast_link_local(),
    };
    let kind = if address.is_unspecified() {
        "unspecified"
    } else if address.is_loopback() {
        "loopback"
    } else if link_local {
        "link-local"
    } else if address.is_multicast() {
        "multicast"
    } else {
        return Ok(address.into());
    };
    Err(format!("{text} is a {kind} address"))
}

/// The numbers of ports.
fn port(number: i64) -> Option<u16> {
    u16::try_from(number).ok().filter(|port| *port > 0)
}

/// Collects what is wrong, up to a limit.
#[derive(Default)]
struct Problems(Vec<String>);

impl Problems {
    fn add(&mut self, problem: String) {
        match self.0.len() {
            MAX_PROBLEMS => self.0.push("and more".to_owned()),
            more if more > MAX_PROBLEMS => {}
            _ => self.0.push(problem),
        }
    }

    /// What went well; the rest is noted.
    fn take<T>(&mut self, place: &str, outcome: Result<T, String>) -> Option<T> {
        outcome
            .map_err(|error| self.add(format!("{place}: {error}")))
            .ok()
    }
}

fn left_alone(metadata: &ObjectMeta) -> bool {
    let labels = metadata.labels.as_ref();
    labels.is_some_and(|all| all.contains_key(OTHER_PROXY) || all.contains_key(HEADLESS))
}

fn weights(text: &str) -> Result<BTreeMap<Ip, u16>, String> {
    let all: BTreeMap<String, u16> =
        serde_json::from_str(text).map_err(|error| error.to_string())?;
    all.into_iter()
        .map(|(address, weight)| {
            if weight > MAX_WEIGHT {
                return Err(format!(
                    "the weight {weight} of {address} is more than {MAX_WEIGHT}"
                ));
            }
            Ok((usable(&address)?, weight))
        })
        .collect()
}

fn bytes_of_uid(uid: &str) -> [u8; 16] {
    let mut digits = uid.chars().filter(|one| *one != '-');
    let number = digits.try_fold(0_u128, |number, digit| {
        let digit = digit.to_digit(16)?;
        (number.leading_zeros() >= 4).then_some(number << 4 | u128::from(digit))
    });
    number.unwrap_or(0).to_be_bytes()
}

impl ServiceView {
    /// None for a Service that is no matter of ours: headless, `ExternalName`, another proxy's.
    pub fn new(service: &Service, texts: &mut Texts) -> Option<Self> {
        let metadata = &service.metadata;
        if left_alone(metadata) {
            return None;
        }
        let mut problems = Problems::default();
        let nothing = objects::ServiceFields::default();
        let fields = match &service.fields {
            Ok(fields) => fields,
            Err(fault) => {
                problems.add(fault.clone());
                &nothing
            }
        };
        let spec = &fields.spec;
        let kind = spec.kind.as_deref().unwrap_or("ClusterIP");
        let single = spec.cluster_ip.as_slice();
        let listed = spec.cluster_ips.as_deref().filter(|all| !all.is_empty());
        let cluster = listed.unwrap_or(if single == [""] { &[] } else { single });
        let none = cluster.first().is_none_or(|first| first == "None");
        if service.fields.is_ok() && (kind == "ExternalName" || none) {
            return None;
        }
        let mut cluster_ips = [Ip::NONE; 2];
        for text in cluster {
            if let Some(ip) = problems.take("spec.clusterIPs", usable(text)) {
                let place = &mut cluster_ips[usize::from(!ip.is_v4())];
                if !place.is_some() {
                    *place = ip;
                }
            }
        }
        let mut ports = Vec::with_capacity(spec.ports.as_ref().map_or(0, Vec::len));
        for one in spec.ports.iter().flatten() {
            let checked = port(one.port)
                .ok_or_else(|| format!("{} is no port", one.port))
                .and_then(|port| {
                    let name = one.protocol.as_deref();
                    let protocol = protocol(name)
                        .ok_or_else(|| format!("protocol {:?} is not known", name.unwrap_or("")))?;
                    Ok((port, protocol))
                });
            let Some((number, protocol)) = problems.take("spec.ports", checked) else {
                continue;
            };
            let node_port = match one.node_port.unwrap_or(0) {
                0 => 0,
                wanted => {
                    let checked = port(wanted).ok_or_else(|| format!("{wanted} is no port"));
                    problems.take("spec.ports.nodePort", checked).unwrap_or(0)
                }
            };
            ports.push(PortView {
                name: texts.get(one.name.as_deref().unwrap_or("")),
                port: number,
                node_port,
                protocol,
            });
        }
        let mut extra = Extra::default();
        for text in spec.external_ips.iter().flatten() {
            extra
                .external_ips
                .extend(problems.take("spec.externalIPs", usable(text)));
        }
        let balancer = fields.status.load_balancer.as_ref();
        for ingress in balancer
            .and_then(|one| one.ingress.as_ref())
            .into_iter()
            .flatten()
        {
            // With another mode, a proxy of the provider's stands before the Service.
            let ours = ingress.ip_mode.as_deref().unwrap_or("VIP") == "VIP";
            if let Some(text) = ingress
                .ip
                .as_deref()
                .filter(|text| ours && !text.is_empty())
            {
                let place = "status.loadBalancer.ingress";
                extra
                    .load_balancer_ips
                    .extend(problems.take(place, usable(text)));
            }
        }
        for text in spec.load_balancer_source_ranges.iter().flatten() {
            let checked = text
                .trim()
                .parse::<IpNet>()
                .map_err(|_| format!("{text:?} is no block of addresses"));
            let block = problems.take("spec.loadBalancerSourceRanges", checked);
            extra.ranges.extend(block.map(|block| block.trunc()));
        }
        extra.ranges.sort();
        extra.ranges.dedup();
        // Ranges that can't be read let nobody in, which is what was meant of those not in them.
        let fenced = spec
            .load_balancer_source_ranges
            .iter()
            .flatten()
            .next()
            .is_some();
        if fenced && extra.ranges.is_empty() {
            extra.load_balancer_ips.clear();
        }
        let annotation = |key: &str| metadata.annotations.as_ref().and_then(|all| all.get(key));
        if let Some(text) = annotation(ALGORITHM) {
            extra.algorithm = match text.as_str() {
                "random" => Some(Algorithm::Random),
                "maglev" => Some(Algorithm::Maglev),
                other => {
                    problems.add(format!(
                        "{ALGORITHM}: {other:?} is neither random nor maglev"
                    ));
                    None
                }
            };
        }
        if let Some(text) = annotation(WEIGHTS) {
            extra.weights = problems.take(WEIGHTS, weights(text)).unwrap_or_default();
        }
        let affinity = if spec.session_affinity.as_deref() == Some("ClientIP") {
            let config = spec.session_affinity_config.as_ref();
            let seconds = config
                .and_then(|config| config.client_ip.as_ref()?.timeout_seconds)
                .unwrap_or(10_800);
            seconds.clamp(1, 86_400) as u32
        } else {
            0
        };
        let external = matches!(kind, "LoadBalancer" | "NodePort")
            || kind == "ClusterIP" && !extra.external_ips.is_empty();
        let local = |policy: &Option<String>| policy.as_deref() == Some("Local");
        let external_local = external && local(&spec.external_traffic_policy);
        let health_port = match spec.health_check_node_port.unwrap_or(0) {
            wanted if kind == "LoadBalancer" && external_local && wanted != 0 => {
                let checked = port(wanted).ok_or_else(|| format!("{wanted} is no port"));
                problems
                    .take("spec.healthCheckNodePort", checked)
                    .unwrap_or(0)
            }
            _ => 0,
        };
        extra.problems = problems.0;
        let created = metadata.creation_timestamp.as_ref();
        Some(Self {
            created: created.map_or(i64::MAX, |time| time.0.as_second()),
            uid: metadata.uid.as_deref().map_or([0; 16], bytes_of_uid),
            cluster_ips,
            ports: texts.ports.get(&ports),
            affinity,
            internal_local: local(&spec.internal_traffic_policy),
            external_local,
            health_port,
            extra: (extra != Extra::default()).then(|| Box::new(extra)),
        })
    }

    pub fn extra(&self) -> &Extra {
        static NONE: Extra = Extra {
            external_ips: Vec::new(),
            load_balancer_ips: Vec::new(),
            ranges: Vec::new(),
            weights: BTreeMap::new(),
            algorithm: None,
            problems: Vec::new(),
        };
        self.extra.as_deref().unwrap_or(&NONE)
    }

    /// The uid as the API writes it.
    pub fn uid_text(&self) -> Option<String> {
        let hex = format!("{:032x}", u128::from_be_bytes(self.uid));
        (self.uid != [0; 16]).then(|| {
            [
                &hex[..8],
                &hex[8..12],
                &hex[12..16],
                &hex[16..20],
                &hex[20..],
            ]
            .join("-")
        })
    }
}

/// A port of a slice.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct SlicePort {
    pub name: Arc<str>,
    pub port: u16,
    pub protocol: u8,
}

/// Endpoints of one family: address, number of the place and state. The state is in the place's upper bits.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Endpoints {
    V4(Box<[(u32, u32)]>),
    V6(Box<[([u32; 4], u32)]>),
}

fn named(all: &Option<Vec<objects::Named>>) -> Box<[&str]> {
    let all = all.iter().flatten();
    all.map(|one| &*one.name).collect()
}

/// Bits of the state above the place's number.
const STATE_SHIFT: u32 = 29;

/// A slice of a Service.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SliceView {
    pub ports: Arc<[SlicePort]>,
    endpoints: Endpoints,
    #[allow(
        clippy::box_collection,
        reason = "nearly all slices have none, and there are many"
    )]
    pub problems: Option<Box<Vec<String>>>,
}

impl SliceView {
    /// None for a slice that is no matter of ours. The places that it names are held.
    pub fn new(slice: &EndpointSlice, texts: &mut Texts, places: &mut Places) -> Option<Self> {
        if left_alone(&slice.metadata) {
            return None;
        }
        let mut problems = Problems::default();
        let nothing = objects::SliceFields::default();
        let fields = match &slice.fields {
            Ok(fields) => fields,
            Err(fault) => {
                problems.add(fault.clone());
                &nothing
            }
        };
        let v4 = match fields.address_type.as_str() {
            "IPv4" => true,
            "IPv6" => false,
            "FQDN" => return None,
            other => {
                if slice.fields.is_ok() {
                    problems.add(format!("addressType {other:?} is not known"));
                }
                true
            }
        };
        let count = fields.endpoints.as_ref().map_or(0, Vec::len);
        let mut four = Vec::with_capacity(if v4 { count } else { 0 });
        let mut six = Vec::with_capacity(count - four.capacity());
        for one in fields.endpoints.iter().flatten() {
            // All addresses of one endpoint are the same backend; the first is taken.
            let checked = one
                .addresses
                .first()
                .ok_or_else(|| "an endpoint has no address".to_owned())
                .and_then(|text| usable(text))
                .and_then(|ip| {
                    let right = ip.is_v4() == v4;
                    right.then_some(ip).ok_or_else(|| {
                        format!("{} is not of {}", IpAddr::from(ip), fields.address_type)
                    })
                });
            let Some(ip) = problems.take("endpoints", checked) else {
                continue;
            };
            let conditions = one.conditions.unwrap_or_default();
            let bit = |set: bool, bit: u8| if set { bit } else { 0 };
            let state = bit(conditions.ready.unwrap_or(true), READY)
                | bit(conditions.serving.unwrap_or(true), SERVING)
                | bit(conditions.terminating.unwrap_or(false), TERMINATING);
            let hints = one.hints.as_ref();
            let place = Place {
                node: one.node_name.as_deref(),
                zone: one.zone.as_deref(),
                for_zones: hints.map_or_else(Box::default, |hints| named(&hints.for_zones)),
                for_nodes: hints.map_or_else(Box::default, |hints| named(&hints.for_nodes)),
            };
            let held = places.hold(&place, texts) | u32::from(state >> 5) << STATE_SHIFT;
            if v4 {
                four.push((ip.as_v4(), held));
            } else {
                six.push((ip.0, held));
            }
        }
        let mut ports = Vec::with_capacity(fields.ports.as_ref().map_or(0, Vec::len));
        for one in fields.ports.iter().flatten() {
            // No number means all ports, which no Service's port can.
            let Some(wanted) = one.port else { continue };
            let checked = port(wanted).ok_or_else(|| format!("{wanted} is no port"));
            let checked = checked.and_then(|port| {
                protocol(one.protocol.as_deref())
                    .map(|protocol| (port, protocol))
                    .ok_or_else(|| "the protocol is not known".to_owned())
            });
            if let Some((port, protocol)) = problems.take("ports", checked) {
                ports.push(SlicePort {
                    name: texts.get(one.name.as_deref().unwrap_or("")),
                    port,
                    protocol,
                });
            }
        }
        Some(Self {
            ports: texts.slice_ports.get(&ports),
            endpoints: if v4 {
                Endpoints::V4(four.into())
            } else {
                Endpoints::V6(six.into())
            },
            problems: (!problems.0.is_empty()).then(|| Box::new(problems.0)),
        })
    }

    /// Whether its endpoints have IPv4 addresses.
    pub fn is_v4(&self) -> bool {
        matches!(self.endpoints, Endpoints::V4(_))
    }

    /// Addresses, numbers of places, and [`READY`], [`SERVING`] and [`TERMINATING`] of its endpoints.
    pub fn endpoints(&self) -> impl Iterator<Item = (Ip, u32, u8)> {
        let (four, six): (&[_], &[_]) = match &self.endpoints {
            Endpoints::V4(all) => (all, &[]),
            Endpoints::V6(all) => (&[], all),
        };
        let four = four.iter().map(|(ip, held)| (Ip::v4(*ip), *held));
        let six = six.iter().map(|(ip, held)| (Ip(*ip), *held));
        four.chain(six).map(|(ip, held)| {
            let place = held & ((1 << STATE_SHIFT) - 1);
            (ip, place, ((held >> STATE_SHIFT) as u8) << 5)
        })
    }

    /// Lets go of the places.
    pub fn release(&self, places: &mut Places) {
        self.endpoints()
            .for_each(|(_, place, _)| places.release(place));
    }
}

/// The Service that a slice belongs to.
pub fn service_name(slice: &EndpointSlice) -> Option<String> {
    let metadata = &slice.metadata;
    let service = metadata.labels.as_ref()?.get(SERVICE_NAME)?;
    let namespace = metadata.namespace.as_deref()?;
    (!service.is_empty()).then(|| [namespace, "/", service].concat())
}

/// When what a slice tells of happened, in seconds of Unix time.
pub fn triggered(slice: &EndpointSlice) -> Option<f64> {
    let text = slice.metadata.annotations.as_ref()?.get(TRIGGERED)?;
    let time: k8s_openapi::jiff::Timestamp = text.parse().ok()?;
    Some(time.as_nanosecond() as f64 / 1e9)
}
