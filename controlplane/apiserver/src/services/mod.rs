//! Service addresses and node ports: chosen at random, claimed in the same transaction as the Service.

mod addresses;
mod families;
mod ports;
#[cfg(test)]
mod tests;

pub(crate) use addresses::first;

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::ops::RangeInclusive;

use bytes::Bytes;
use ipnet::IpNet;
use serde_json::Value;
use xebec_schema::Object;
use xebec_schema::field_error::FieldError;
use xebec_schema::table::Resource;
use xebec_store::{Compare, KeyValue, Op, RangeRequest, Store, Txn, TxnOutcome};

use crate::error::ApiError;
use crate::registry::{decode, key, prefix_range};

/// Where claims are kept.
const RANGES: &str = "/registry/ranges/";
/// Tries to find a free one at random before looking at each in turn.
const RANDOM_TRIES: usize = 64;

/// What Services take from.
pub(crate) struct Allocator {
    /// At most one range of each family; the first is the one of Services that do not say.
    pub cidrs: Vec<IpNet>,
    pub ports: RangeInclusive<u16>,
}

fn address_key(address: IpAddr) -> Bytes {
    format!("{RANGES}serviceips/{address}").into()
}

/// A number is one Service's, with whatever protocols.
fn port_key(port: u64) -> Bytes {
    format!("{RANGES}servicenodeports/{port}").into()
}

/// A text that is there and not empty.
fn text(value: &Value) -> Option<&str> {
    value.as_str().filter(|text| !text.is_empty())
}

fn kind(spec: &Value) -> &str {
    spec["type"].as_str().unwrap_or_default()
}

fn list(value: &Value) -> &[Value] {
    value.as_array().map(Vec::as_slice).unwrap_or_default()
}

fn invalid(service: &Object, errors: &[FieldError]) -> ApiError {
    let name = service["metadata"]["name"].as_str().unwrap_or_default();
    ApiError::invalid("Service", "", name, errors)
}

/// What a Service of this shape holds on to.
fn held(service: &Object) -> BTreeSet<Bytes> {
    let spec = &service["spec"];
    let addresses = list(&spec["clusterIPs"]).iter().chain([&spec["clusterIP"]]);
    let addresses = addresses.filter_map(|ip| ip.as_str()?.parse().ok());
    let numbers = list(&spec["ports"]).iter().map(|port| &port["nodePort"]);
    let numbers = numbers.chain([&spec["healthCheckNodePort"]]);
    let numbers = numbers.filter_map(Value::as_u64).filter(|port| *port > 0);
    addresses
        .map(address_key)
        .chain(numbers.map(port_key))
        .collect()
}

impl Allocator {
    /// Fills in addresses and ports of a new or changed Service. `claims` makes them its own.
    pub(crate) async fn assign(
        &self,
        store: &dyn Store,
        old: Option<&Object>,
        service: &mut Object,
        dry_run: bool,
    ) -> Result<(), ApiError> {
        let before = old.map(|old| &old["spec"]);
        families::keep_allocated(before, &mut service["spec"]);
        let configured: Vec<&str> = self.cidrs.iter().map(families::of_range).collect();
        let errors = families::choose(before, service, &configured);
        if !errors.is_empty() {
            return Err(invalid(service, &errors));
        }
        let before = old.map(held).unwrap_or_default();
        self.assign_addresses(store, service, &before, dry_run)
            .await?;
        self.assign_ports(store, old, service, &before).await
    }

    /// The writes that claim what a Service has and give back what it had before. They belong in the same
    /// transaction as the Service.
    pub(crate) fn claims(old: Option<&Object>, service: &Object) -> Txn {
        let (before, after) = (old.map(held).unwrap_or_default(), held(service));
        let part = |field: &str| service["metadata"][field].as_str().unwrap_or_default();
        let owner = format!("{}/{}", part("namespace"), part("name"));
        let mut txn = Txn::default();
        for key in after.difference(&before) {
            txn.compare.push(Compare {
                key: key.clone(),
                mod_revision: 0,
            });
            txn.ops.push(Op::Put {
                key: key.clone(),
                value: owner.clone().into(),
            });
        }
        let gone = before.difference(&after);
        txn.ops
            .extend(gone.map(|key| Op::Delete { key: key.clone() }));
        txn
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

    /// Brings the claims into line with the Services that there are, should anything have set them apart.
    pub(crate) async fn repair(
        &self,
        store: &dyn Store,
        services: &Resource,
    ) -> Result<(), ApiError> {
        let all = |prefix: Bytes| RangeRequest {
            keys: prefix_range(prefix),
            at: None,
            limit: 0,
        };
        let claimed = store.range(all(RANGES.into())).await?.kvs;
        let claimed: BTreeSet<Bytes> = claimed.into_iter().map(|kv| kv.key).collect();
        let mut wanted = BTreeSet::new();
        let kvs: Vec<KeyValue> = store.range(all(key(services, None, None))).await?.kvs;
        for kv in &kvs {
            wanted.extend(held(&decode(kv)?));
        }
        let ops: Vec<Op> = wanted
            .difference(&claimed)
            .map(|key| Op::Put {
                key: key.clone(),
                value: Bytes::from_static(b"repaired"),
            })
            .chain(
                claimed
                    .difference(&wanted)
                    .map(|key| Op::Delete { key: key.clone() }),
            )
            .collect();
        if ops.is_empty() {
            return Ok(());
        }
        tracing::info!(changes = ops.len(), "Service addresses and ports repaired");
        let compare = Vec::new();
        match store.txn(Txn { compare, ops }).await? {
            TxnOutcome::Committed(_) => Ok(()),
            TxnOutcome::Conflict { .. } => Err(ApiError::internal(
                "the claims of Services could not be repaired",
            )),
        }
    }
}
