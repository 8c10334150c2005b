//! Labels that say whom a flow is of, as Hubble's metrics have them: `sourceContext=pod|ip;labelsContext=source_app`.

use std::borrow::Cow;
use std::net::IpAddr;
use std::sync::Arc;

use anyhow::{Context as _, Result, bail};
use smallvec::SmallVec;
use xebec_dataplane_common::flow::EGRESS;
use xebec_policy::names::Peer;

use super::super::Seen;

/// The value of a label.
pub(super) type Value = Cow<'static, str>;
/// The values of all labels of a series.
pub(super) type Values = SmallVec<[Value; 8]>;

/// How one end is called.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Identifier {
    Identity,
    Namespace,
    Pod,
    PodName,
    Dns,
    Ip,
    ReservedIdentity,
    Workload,
    WorkloadName,
    App,
}

impl Identifier {
    fn parse(text: &str) -> Result<Self> {
        Ok(match text {
            "identity" => Self::Identity,
            "namespace" => Self::Namespace,
            "pod" => Self::Pod,
            "pod-name" => Self::PodName,
            "dns" => Self::Dns,
            "ip" => Self::Ip,
            "reserved-identity" => Self::ReservedIdentity,
            "workload" => Self::Workload,
            "workload-name" => Self::WorkloadName,
            "app" => Self::App,
            _ => bail!(
                "{text:?} is none of identity, namespace, pod, pod-name, dns, ip, reserved-identity, workload, workload-name and app"
            ),
        })
    }

    /// `called` are the names that the other end asked for.
    fn of(self, peer: &Peer, address: IpAddr, called: Option<&Vec<String>>) -> String {
        let (namespace, pod) = &peer.pod;
        let of_namespace = |name: &str| match (namespace.as_str(), name) {
            (_, "") => String::new(),
            ("", name) => name.to_owned(),
            (namespace, name) => format!("{namespace}/{name}"),
        };
        let workload = peer.workload.as_ref().map_or("", |(_, name)| name);
        match self {
            Self::Identity => peer.labels.join(","),
            Self::Namespace => namespace.clone(),
            Self::Pod => of_namespace(pod),
            Self::PodName => pod.clone(),
            Self::Dns => called.map(|names| names.join(",")).unwrap_or_default(),
            Self::Ip => address.to_string(),
            Self::ReservedIdentity => {
                let mut labels = peer.labels.iter();
                let reserved = labels.find(|label| label.starts_with("reserved:"));
                reserved.cloned().unwrap_or_default()
            }
            Self::Workload => of_namespace(workload),
            Self::WorkloadName => workload.to_owned(),
            Self::App => app(peer).to_owned(),
        }
    }
}

/// What a pod's labels call its application.
fn app(peer: &Peer) -> &str {
    let of = |key: &str| {
        let mut labels = peer.labels.iter();
        labels.find_map(|label| {
            label
                .strip_prefix("k8s:")?
                .strip_prefix(key)?
                .strip_prefix('=')
        })
    };
    ["app.kubernetes.io/name", "k8s-app", "app"]
        .into_iter()
        .find_map(of)
        .unwrap_or_default()
}

/// Labels of `labelsContext`, in the order in which series have them.
const LABELS: [&str; 13] = [
    "source_ip",
    "source_pod",
    "source_namespace",
    "source_workload",
    "source_workload_kind",
    "source_app",
    "destination_ip",
    "destination_pod",
    "destination_namespace",
    "destination_workload",
    "destination_workload_kind",
    "destination_app",
    "traffic_direction",
];

/// Ways to call one end, the first of which that gives a name is used; by direction.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct End {
    egress: Vec<Identifier>,
    ingress: Vec<Identifier>,
}

impl End {
    fn is_empty(&self) -> bool {
        self.egress.is_empty() && self.ingress.is_empty()
    }

    fn of(&self, egress: bool, (peer, address, called): &Party) -> Value {
        let ways = if egress { &self.egress } else { &self.ingress };
        let mut names = ways
            .iter()
            .map(|way| way.of(peer, *address, called.as_deref()));
        names
            .find(|name| !name.is_empty())
            .unwrap_or_default()
            .into()
    }
}

/// Who talks: who it is, at which address, and what the other end calls it.
type Party<'a> = (&'a Peer, IpAddr, Option<Arc<Vec<String>>>);

/// Which labels a metric has for those who talk.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Context {
    labels: Vec<&'static str>,
    source: End,
    destination: End,
}

impl Context {
    /// Takes one option of a metric.
    ///
    /// # Errors
    /// If there is no such option or value.
    pub(super) fn set(&mut self, option: &str, value: &str) -> Result<()> {
        let ways = || {
            let ways = value.split('|').map(Identifier::parse);
            ways.collect::<Result<Vec<_>>>()
                .with_context(|| format!("{option}={value}"))
        };
        match option.to_ascii_lowercase().as_str() {
            "sourcecontext" => {
                let ways = ways()?;
                self.source = End {
                    egress: ways.clone(),
                    ingress: ways,
                };
            }
            "destinationcontext" => {
                let ways = ways()?;
                self.destination = End {
                    egress: ways.clone(),
                    ingress: ways,
                };
            }
            "sourceegresscontext" => self.source.egress = ways()?,
            "sourceingresscontext" => self.source.ingress = ways()?,
            "destinationegresscontext" => self.destination.egress = ways()?,
            "destinationingresscontext" => self.destination.ingress = ways()?,
            "labelscontext" => {
                let wanted: Vec<&str> = value.split(',').collect();
                if let Some(unknown) = wanted.iter().find(|one| !LABELS.contains(one)) {
                    bail!(
                        "{option}={value}: {unknown:?} is none of {}",
                        LABELS.join(", ")
                    );
                }
                self.labels = LABELS
                    .into_iter()
                    .filter(|one| wanted.contains(one))
                    .collect();
            }
            _ => bail!(
                "no option {option:?}: there are sourceContext, destinationContext, sourceEgressContext, sourceIngressContext, destinationEgressContext, destinationIngressContext and labelsContext"
            ),
        }
        Ok(())
    }

    /// The names of its labels.
    pub(super) fn names(&self) -> Vec<&'static str> {
        let mut names = self.labels.clone();
        for (name, end) in [("source", &self.source), ("destination", &self.destination)] {
            if !end.is_empty() {
                names.push(name);
            }
        }
        names
    }

    /// The values of its labels for a flow, in the order of the names.
    pub(super) fn values(&self, seen: &Seen, values: &mut Values) {
        let [source, destination] = seen.called.clone();
        let ends: [Party; 2] = [
            (&*seen.source, seen.event.source.into(), source),
            (
                &*seen.destination,
                seen.event.destination.into(),
                destination,
            ),
        ];
        let egress = seen.event.direction == EGRESS;
        for name in &self.labels {
            let (end, what) = match name.split_once('_') {
                Some(("source", what)) => (&ends[0], what),
                Some(("destination", what)) => (&ends[1], what),
                _ => (&ends[0], "direction"),
            };
            let (peer, address, _) = end;
            let workload = peer.workload.as_ref();
            values.push(match what {
                "ip" => address.to_string().into(),
                "pod" => peer.pod.1.clone().into(),
                "namespace" => peer.pod.0.clone().into(),
                "workload" => workload
                    .map_or_else(String::new, |one| one.1.clone())
                    .into(),
                "workload_kind" => workload
                    .map_or_else(String::new, |one| one.0.clone())
                    .into(),
                "app" => app(peer).to_owned().into(),
                _ if egress => "egress".into(),
                _ => "ingress".into(),
            });
        }
        for (end, party) in [&self.source, &self.destination].into_iter().zip(&ends) {
            if !end.is_empty() {
                values.push(end.of(egress, party));
            }
        }
    }
}
