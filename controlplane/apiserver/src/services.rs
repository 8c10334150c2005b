//! Service addresses and node ports: chosen at random, claimed in the same transaction as the Service.

use std::net::Ipv4Addr;
use std::ops::RangeInclusive;

use bytes::Bytes;
use ipnet::Ipv4Net;
use serde_json::{Value, json};
use xebec_schema::Object;
use xebec_schema::field_error::FieldError;
use xebec_schema::strategy::service::has_health_port;
use xebec_store::{Compare, Op, Store, Txn};

use crate::error::ApiError;

/// What Services take from.
pub(crate) struct Allocator {
    pub cidr: Ipv4Net,
    pub ports: RangeInclusive<u16>,
}

/// Tries to find a free one at random before looking at each in turn.
const RANDOM_TRIES: usize = 64;

fn address_key(address: Ipv4Addr) -> Bytes {
    format!("/registry/ranges/serviceips/{address}").into()
}

fn port_key(protocol: &str, port: u64) -> Bytes {
    format!("/registry/ranges/servicenodeports/{protocol}/{port}").into()
}

/// A port's port at the nodes; 0 where it has none.
fn node_port(port: &Value) -> u64 {
    port["nodePort"].as_u64().unwrap_or(0)
}

/// What a Service of this shape holds on to.
fn held(service: &Object) -> Vec<Bytes> {
    let mut keys = Vec::new();
    if let Some(address) = service["spec"]["clusterIP"]
        .as_str()
        .and_then(|text| text.parse().ok())
    {
        keys.push(address_key(address));
    }
    for port in service["spec"]["ports"].as_array().into_iter().flatten() {
        let protocol = port["protocol"].as_str().unwrap_or("TCP");
        if let Some(number) = port["nodePort"].as_u64().filter(|number| *number > 0) {
            keys.push(port_key(protocol, number));
        }
    }
    if let Some(number) = service["spec"]["healthCheckNodePort"]
        .as_u64()
        .filter(|number| *number > 0)
    {
        keys.push(port_key("TCP", number));
    }
    keys.sort();
    keys.dedup();
    keys
}

impl Allocator {
    fn usable(&self, address: Ipv4Addr) -> bool {
        self.cidr.contains(&address)
            && address != self.cidr.network()
            && address != self.cidr.broadcast()
    }

    /// Fills in addresses and ports of a new or changed Service, and gives the writes that claim them and give back
    /// what `old` held. They belong in the same transaction as the Service.
    pub(crate) async fn assign(
        &self,
        store: &dyn Store,
        old: Option<&Object>,
        service: &mut Object,
        dry_run: bool,
    ) -> Result<Txn, ApiError> {
        let name = service["metadata"]["name"]
            .as_str()
            .unwrap_or_default()
            .to_owned();
        let invalid = |error: FieldError| ApiError::invalid("Service", "", &name, &[error]);
        let kind = service["spec"]["type"]
            .as_str()
            .unwrap_or_default()
            .to_owned();
        let before = old.map(held).unwrap_or_default();
        if kind == "ExternalName" {
            for field in [
                "clusterIP",
                "clusterIPs",
                "ipFamilies",
                "ipFamilyPolicy",
                "internalTrafficPolicy",
            ] {
                if let Some(spec) = service["spec"].as_object_mut() {
                    spec.remove(field);
                }
            }
        } else {
            self.assign_address(store, old, service, &before, dry_run)
                .await?;
        }
        let wants_ports = kind == "NodePort"
            || kind == "LoadBalancer" && service["spec"]["allocateLoadBalancerNodePorts"] != false;
        self.assign_ports(store, old, service, &before, wants_ports)
            .await
            .map_err(|error| match error {
                PortError::Api(error) => error,
                PortError::Field(error) => invalid(error),
            })?;
        if has_health_port(&service["spec"]) {
            self.assign_health_port(store, old, service)
                .await
                .map_err(|error| match error {
                    PortError::Api(error) => error,
                    PortError::Field(error) => invalid(error),
                })?;
        }
        let after = held(service);
        let mut txn = Txn::default();
        for key in after.iter().filter(|key| !before.contains(key)) {
            if store.get(key).await?.is_some() {
                return Err(invalid(taken(key, service)));
            }
            txn.compare.push(Compare {
                key: key.clone(),
                mod_revision: 0,
            });
            let owner = format!(
                "{}/{name}",
                service["metadata"]["namespace"]
                    .as_str()
                    .unwrap_or_default()
            );
            txn.ops.push(Op::Put {
                key: key.clone(),
                value: owner.into(),
            });
        }
        txn.ops.extend(
            before
                .iter()
                .filter(|key| !after.contains(key))
                .map(|key| Op::Delete { key: key.clone() }),
        );
        Ok(txn)
    }

    /// The writes that give back what a deleted Service held.
    pub(crate) fn release(service: &Object) -> Txn {
        Txn {
            compare: Vec::new(),
            ops: held(service)
                .into_iter()
                .map(|key| Op::Delete { key })
                .collect(),
        }
    }

    async fn assign_address(
        &self,
        store: &dyn Store,
        old: Option<&Object>,
        service: &mut Object,
        before: &[Bytes],
        dry_run: bool,
    ) -> Result<(), ApiError> {
        let spec = &mut service["spec"];
        let text = |value: &Value| {
            value
                .as_str()
                .filter(|text| !text.is_empty())
                .map(str::to_owned)
        };
        let asked = text(&spec["clusterIP"]).or_else(|| text(&spec["clusterIPs"][0]));
        let kept = old.and_then(|old| text(&old["spec"]["clusterIP"]));
        let name = service["metadata"]["name"]
            .as_str()
            .unwrap_or_default()
            .to_owned();
        let address = match asked.or(kept) {
            Some(address) => {
                if address.parse::<std::net::Ipv6Addr>().is_ok() {
                    let error = FieldError::invalid(
                        "spec.clusterIPs[0]",
                        json!([address]),
                        "IPv6 is not configured on this cluster",
                    );
                    return Err(ApiError::invalid("Service", "", &name, &[error]));
                }
                if let Ok(parsed) = address.parse::<Ipv4Addr>() {
                    if !self.usable(parsed) && !before.contains(&address_key(parsed)) {
                        let detail = format!(
                            "failed to allocate IP {parsed}: the provided IP ({parsed}) is not in the valid range. The range of valid IPs is {}",
                            self.cidr
                        );
                        let error =
                            FieldError::invalid("spec.clusterIPs", json!([address]), &detail);
                        return Err(ApiError::invalid("Service", "", &name, &[error]));
                    }
                }
                address
            }
            // A dry run takes nothing; the range's own address stands for one to come.
            None if dry_run => self.cidr.network().to_string(),
            None => self.free_address(store).await?.to_string(),
        };
        let spec = &mut service["spec"];
        spec["clusterIPs"] = json!([address]);
        spec["clusterIP"] = address.into();
        // Whoever names the endpoints of a headless Service may name them in both families.
        let both = spec["clusterIP"] == "None" && spec["selector"].is_null();
        let families = if both {
            (json!(["IPv4", "IPv6"]), "RequireDualStack")
        } else {
            (json!(["IPv4"]), "SingleStack")
        };
        for (field, value) in [
            ("ipFamilies", families.0),
            ("ipFamilyPolicy", families.1.into()),
        ] {
            if spec[field].is_null() {
                spec[field] = value;
            }
        }
        Ok(())
    }

    async fn free_address(&self, store: &dyn Store) -> Result<Ipv4Addr, ApiError> {
        let (first, last) = (
            u32::from(self.cidr.network()),
            u32::from(self.cidr.broadcast()),
        );
        // The lower part of the range is left to those who ask for an address of their own (KEP-3070).
        let offset = ((last - first) / 16).clamp(16.min((last - first) / 2), 256);
        for _ in 0..RANDOM_TRIES {
            let address = Ipv4Addr::from(rand::random_range(first + offset..=last));
            if self.usable(address) && store.get(&address_key(address)).await?.is_none() {
                return Ok(address);
            }
        }
        for number in first + 1..last {
            let address = Ipv4Addr::from(number);
            if store.get(&address_key(address)).await?.is_none() {
                return Ok(address);
            }
        }
        Err(ApiError::internal(
            "failed to allocate a serviceIP: range is full",
        ))
    }

    async fn assign_ports(
        &self,
        store: &dyn Store,
        old: Option<&Object>,
        service: &mut Object,
        before: &[Bytes],
        wanted: bool,
    ) -> Result<(), PortError> {
        let old_ports = old
            .map(|old| old["spec"]["ports"].clone())
            .unwrap_or_default();
        let count = service["spec"]["ports"].as_array().map_or(0, Vec::len);
        let mut chosen: Vec<Bytes> = Vec::new();
        for index in 0..count {
            let port = service["spec"]["ports"][index].clone();
            let protocol = port["protocol"].as_str().unwrap_or("TCP").to_owned();
            let mut number = node_port(&port);
            if !wanted {
                // A change to ClusterIP drops what was allocated, not what the user asks for (validation refuses that).
                let was = old_ports
                    .as_array()
                    .into_iter()
                    .flatten()
                    .any(|p| p["nodePort"] == port["nodePort"]);
                if was {
                    if let Some(port) = service["spec"]["ports"][index].as_object_mut() {
                        port.remove("nodePort");
                    }
                }
                continue;
            }
            if number == 0 {
                let same =
                    |p: &&Value| p["port"] == port["port"] && p["protocol"] == port["protocol"];
                number = old_ports
                    .as_array()
                    .into_iter()
                    .flatten()
                    .find(same)
                    .map_or(0, node_port);
            }
            let path = format!("spec.ports[{index}].nodePort");
            let refused = |detail: &str| {
                let error = FieldError::invalid(path.clone(), number, detail);
                Err(PortError::Field(error))
            };
            if number == 0 {
                number = self.free_port(store, &protocol, &chosen).await?.into();
            } else if chosen.contains(&port_key(&protocol, number)) {
                return refused("provided port is already allocated");
            } else if !u16::try_from(number).is_ok_and(|number| self.ports.contains(&number))
                && !before.contains(&port_key(&protocol, number))
            {
                let detail = format!(
                    "provided port is not in the valid range. The range of valid ports is {}-{}",
                    self.ports.start(),
                    self.ports.end()
                );
                return refused(&detail);
            }
            chosen.push(port_key(&protocol, number));
            service["spec"]["ports"][index]["nodePort"] = number.into();
        }
        Ok(())
    }

    /// The port by which a load balancer asks a node whether it has endpoints of its own.
    async fn assign_health_port(
        &self,
        store: &dyn Store,
        old: Option<&Object>,
        service: &mut Object,
    ) -> Result<(), PortError> {
        const FIELD: &str = "healthCheckNodePort";
        let number = |service: &Object| service["spec"][FIELD].as_u64().unwrap_or(0);
        let mut port = number(service);
        let kept = old.map_or(0, number);
        if port == 0 {
            port = kept;
        }
        if port == 0 {
            port = self.free_port(store, "TCP", &held(service)).await?.into();
        } else if port != kept && !u16::try_from(port).is_ok_and(|port| self.ports.contains(&port))
        {
            let detail = format!(
                "provided port is not in the valid range. The range of valid ports is {}-{}",
                self.ports.start(),
                self.ports.end()
            );
            let path = format!("spec.{FIELD}");
            return Err(PortError::Field(FieldError::invalid(
                path,
                json!(port),
                &detail,
            )));
        }
        service["spec"][FIELD] = port.into();
        Ok(())
    }

    async fn free_port(
        &self,
        store: &dyn Store,
        protocol: &str,
        chosen: &[Bytes],
    ) -> Result<u16, PortError> {
        let random = (0..RANDOM_TRIES).map(|_| rand::random_range(self.ports.clone()));
        for port in random.chain(self.ports.clone()) {
            let key = port_key(protocol, port.into());
            if !chosen.contains(&key) && store.get(&key).await.map_err(ApiError::from)?.is_none() {
                return Ok(port);
            }
        }
        Err(ApiError::internal("failed to allocate a nodePort: range is full").into())
    }
}

enum PortError {
    Api(ApiError),
    Field(FieldError),
}

impl From<ApiError> for PortError {
    fn from(error: ApiError) -> Self {
        Self::Api(error)
    }
}

/// The error about a key that another Service holds.
fn taken(key: &Bytes, service: &Object) -> FieldError {
    let key = String::from_utf8_lossy(key);
    let last = key.rsplit('/').next().unwrap_or_default();
    if key.contains("/serviceips/") {
        let detail = format!("failed to allocate IP {last}: provided IP is already allocated");
        return FieldError::invalid("spec.clusterIPs", json!([last]), &detail);
    }
    let number: u64 = last.parse().unwrap_or(0);
    let ports = service["spec"]["ports"]
        .as_array()
        .map(Vec::as_slice)
        .unwrap_or_default();
    let index = ports
        .iter()
        .position(|port| port["nodePort"] == number)
        .unwrap_or(0);
    FieldError::invalid(
        format!("spec.ports[{index}].nodePort"),
        json!(number),
        "provided port is already allocated",
    )
}
