//! Ports of Services at the nodes, also the one that tells balancers of a node's health.

use std::collections::{BTreeMap, BTreeSet};

use bytes::Bytes;
use serde_json::Value;
use xebec_schema::Object;
use xebec_schema::field_error::FieldError;
use xebec_schema::strategy::service::has_health_port;
use xebec_store::Store;

use super::{Allocator, RANDOM_TRIES, kind, list, port_key};
use crate::error::ApiError;

const HEALTH: &str = "healthCheckNodePort";

fn number(port: &Value) -> u64 {
    port["nodePort"].as_u64().unwrap_or(0)
}

/// What one write takes.
struct Taking<'a> {
    allocator: &'a Allocator,
    store: &'a dyn Store,
    taken: BTreeSet<u64>,
}

impl Taking<'_> {
    /// Takes this one; or why not.
    async fn take(&mut self, port: u64) -> Result<Result<(), String>, ApiError> {
        let range = &self.allocator.ports;
        if !u16::try_from(port).is_ok_and(|port| range.contains(&port)) {
            return Ok(Err(format!(
                "provided port is not in the valid range. The range of valid ports is {}-{}",
                range.start(),
                range.end()
            )));
        }
        if self.taken.contains(&port) || self.store.get(&port_key(port)).await?.is_some() {
            return Ok(Err("provided port is already allocated".into()));
        }
        self.taken.insert(port);
        Ok(Ok(()))
    }

    /// Takes any.
    async fn next(&mut self, what: &str) -> Result<u64, ApiError> {
        let range = &self.allocator.ports;
        let random = (0..RANDOM_TRIES).map(|_| rand::random_range(range.clone()));
        for port in random.chain(range.clone()) {
            let port = u64::from(port);
            if !self.taken.contains(&port) && self.store.get(&port_key(port)).await?.is_none() {
                self.taken.insert(port);
                return Ok(port);
            }
        }
        Err(ApiError::internal(format!(
            "failed to allocate a {what}: range is full"
        )))
    }
}

impl Allocator {
    /// Ports at the nodes for those that need one. `before`: what is this Service's already.
    pub(super) async fn assign_ports(
        &self,
        store: &dyn Store,
        old: Option<&Object>,
        service: &mut Object,
        before: &BTreeSet<Bytes>,
    ) -> Result<(), ApiError> {
        let mut taking = Taking {
            allocator: self,
            store,
            taken: BTreeSet::new(),
        };
        if matches!(kind(&service["spec"]), "NodePort" | "LoadBalancer") {
            each_port(&mut taking, service, before, old.is_none()).await?;
        }
        let had = old.is_some_and(|old| has_health_port(&old["spec"]));
        if !has_health_port(&service["spec"]) || had {
            return Ok(());
        }
        let asked = service["spec"][HEALTH].as_u64().unwrap_or(0);
        if asked == 0 {
            service["spec"][HEALTH] = taking.next("HealthCheck NodePort").await?.into();
            return Ok(());
        }
        taking.take(asked).await?.map_err(|why| {
            ApiError::internal(format!(
                "failed to allocate requested HealthCheck NodePort {asked}: {why}"
            ))
        })
    }
}

/// `new`: ports of a new Service that are the same number by different protocols have the same number at the nodes.
async fn each_port(
    taking: &mut Taking<'_>,
    service: &mut Object,
    before: &BTreeSet<Bytes>,
    new: bool,
) -> Result<(), ApiError> {
    let spec = &service["spec"];
    let chosen = kind(spec) == "NodePort" || spec["allocateLoadBalancerNodePorts"] != false;
    let ports = list(&spec["ports"]).to_vec();
    let mut of_port: BTreeMap<u64, u64> = BTreeMap::new();
    for (index, port) in ports.iter().enumerate() {
        let said = number(port);
        if said == 0 && !chosen {
            continue;
        }
        let own = port["port"].as_u64().unwrap_or(0);
        let known = of_port.get(&own).copied().filter(|_| new);
        let asked = match (known, said) {
            (Some(known), 0) => {
                service["spec"]["ports"][index]["nodePort"] = known.into();
                continue;
            }
            (Some(known), said) if known == said => continue,
            (Some(_), said) => said,
            // One that follows may say which it is to be.
            (None, 0) if new => ports
                .iter()
                .find(|other| other["port"] == port["port"] && number(other) != 0)
                .map_or(0, number),
            (None, said) => said,
        };
        let mine = before.contains(&port_key(asked)) || !new && taking.taken.contains(&asked);
        let given = if asked == 0 {
            taking.next("nodePort").await?
        } else if mine {
            asked
        } else {
            if let Err(why) = taking.take(asked).await? {
                let path = format!("spec.ports[{index}].nodePort");
                let error = FieldError::invalid(path, asked, &why);
                return Err(super::invalid(service, &[error]));
            }
            asked
        };
        of_port.entry(own).or_insert(given);
        service["spec"]["ports"][index]["nodePort"] = given.into();
    }
    Ok(())
}
