//! Addresses of Services: one from the range of each of a Service's families.

use std::collections::BTreeSet;
use std::net::IpAddr;

use bytes::Bytes;
use ipnet::IpNet;
use serde_json::Value;
use xebec_schema::Object;
use xebec_schema::field_error::FieldError;
use xebec_store::Store;

use super::{Allocator, RANDOM_TRIES, address_key, families, kind, list, text};
use crate::error::ApiError;

/// Addresses that are looked at in turn, at most, when luck finds none.
const SEARCHED: u128 = 1 << 16;

/// A range's first and last address that a Service may have.
fn ends(range: &IpNet) -> (u128, u128) {
    let number = |address: IpAddr| match address {
        IpAddr::V4(v4) => u32::from(v4).into(),
        IpAddr::V6(v6) => u128::from(v6),
    };
    let (first, last) = (number(range.network()), number(range.broadcast()));
    match range {
        IpNet::V4(_) => (first + 1, last.saturating_sub(1)),
        IpNet::V6(_) => (first + 1, last),
    }
}

fn address(range: &IpNet, number: u128) -> IpAddr {
    match range {
        IpNet::V4(_) => IpAddr::V4((number as u32).into()),
        IpNet::V6(_) => IpAddr::V6(number.into()),
    }
}

fn usable(range: &IpNet, ip: IpAddr) -> bool {
    let no_host = matches!(range, IpNet::V4(range) if IpAddr::V4(range.broadcast()) == ip);
    range.contains(&ip) && ip != range.network() && !no_host
}

/// The first address of a range, which is the API server's own Service's.
pub(crate) fn first(range: &IpNet) -> IpAddr {
    address(range, ends(range).0)
}

impl Allocator {
    /// One address for each family that has none. `before`: what is this Service's already.
    pub(super) async fn assign_addresses(
        &self,
        store: &dyn Store,
        service: &mut Object,
        before: &BTreeSet<Bytes>,
        dry_run: bool,
    ) -> Result<(), ApiError> {
        let spec = &mut service["spec"];
        if kind(spec) == "ExternalName" || spec["clusterIPs"][0] == "None" {
            return Ok(());
        }
        let wanted: Vec<String> = list(&spec["ipFamilies"])
            .iter()
            .filter_map(|family| family.as_str().map(str::to_owned))
            .collect();
        let mut all = list(&spec["clusterIPs"]).to_vec();
        if all.len() < wanted.len() {
            all.resize(wanted.len(), Value::from(""));
        }
        service["spec"]["clusterIPs"] = all.into();
        self.check(store, service, before).await?;
        for (index, family) in wanted.iter().enumerate() {
            if text(&service["spec"]["clusterIPs"][index]).is_some() {
                continue;
            }
            let range = self.range(family).ok_or_else(|| {
                ApiError::internal(format!("there is no range of Services of family {family}"))
            })?;
            let ip = if dry_run {
                // A dry run takes nothing; the range's own address stands for one to come.
                range.network()
            } else {
                free_address(store, range).await?
            };
            service["spec"]["clusterIPs"][index] = ip.to_string().into();
        }
        service["spec"]["clusterIP"] = service["spec"]["clusterIPs"][0].clone();
        Ok(())
    }

    fn range(&self, family: &str) -> Option<&IpNet> {
        let fits = |range: &&IpNet| families::of_range(range) == family;
        self.cidrs.iter().find(fits)
    }

    /// Addresses that were asked for must be in the range of their family and free.
    async fn check(
        &self,
        store: &dyn Store,
        service: &Object,
        before: &BTreeSet<Bytes>,
    ) -> Result<(), ApiError> {
        let all = &service["spec"]["clusterIPs"];
        for ip in list(all) {
            let Some(ip) = text(ip).and_then(|ip| ip.parse::<IpAddr>().ok()) else {
                continue;
            };
            let key = address_key(ip);
            if before.contains(&key) {
                continue;
            }
            let refused = |why: &str| {
                let detail = format!("failed to allocate IP {ip}: {why}");
                let error = FieldError::invalid("spec.clusterIPs", all, &detail);
                Err(super::invalid(service, &[error]))
            };
            match self.range(families::of_address(ip)) {
                Some(range) if !usable(range, ip) => {
                    return refused(&format!(
                        "the provided IP ({ip}) is not in the valid range. The range of valid IPs is {range}"
                    ));
                }
                Some(_) => {}
                None => return refused("no range of that family is configured on this cluster"),
            }
            if store.get(&key).await?.is_some() {
                return refused("provided IP is already allocated");
            }
        }
        Ok(())
    }
}

async fn free_address(store: &dyn Store, range: &IpNet) -> Result<IpAddr, ApiError> {
    let (first, last) = ends(range);
    let full = || ApiError::internal("failed to allocate a serviceIP: range is full");
    if first > last {
        return Err(full());
    }
    // The lower part of the range is left to those who ask for an address of their own (KEP-3070).
    let size = last - first;
    let reserved = (size / 16).clamp(16.min(size / 2), 256);
    let random = (0..RANDOM_TRIES).map(|_| rand::random_range(first + reserved..=last));
    let end = last.min(first.saturating_add(SEARCHED));
    for number in random.chain(first..=end) {
        let ip = address(range, number);
        if store.get(&address_key(ip)).await?.is_none() {
            return Ok(ip);
        }
    }
    Err(full())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_have_hosts() {
        let range = |text: &str| text.parse::<IpNet>().unwrap();
        let usable = |net: &str, ip: &str| usable(&range(net), ip.parse().unwrap());
        assert!(usable("10.0.0.0/30", "10.0.0.1") && usable("10.0.0.0/30", "10.0.0.2"));
        assert!(!usable("10.0.0.0/30", "10.0.0.0") && !usable("10.0.0.0/30", "10.0.0.3"));
        assert!(!usable("fd00::/112", "fd00::") && usable("fd00::/112", "fd00::ffff"));
        assert!(!usable("fd00::/112", "fd00::1:0"));
        assert_eq!(first(&range("fd00::/108")).to_string(), "fd00::1");
        assert_eq!(first(&range("10.96.0.0/12")).to_string(), "10.96.0.1");
    }
}
