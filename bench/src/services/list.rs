//! The Services of the benchmark: those that kube-proxy's rule sets were written for, and as many more as are asked for.

use std::io::Read;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

/// The namespace of all of them.
pub const NAMESPACE: &str = "bench";
/// The port of every Service, and the node port where there is one.
pub const PORT: u16 = 80;
/// The port of every backend.
pub const TARGET_PORT: u16 = 8080;
/// The node port of [`outside`].
pub const NODE_PORT: u16 = 30080;
/// The first and the last byte of the backends that there are: 10.244.2.2 to 10.244.2.11.
pub const BACKENDS: std::ops::RangeInclusive<u8> = 2..=11;

/// Those of a Service that gets more flows than a node has ports towards ten backends; the others are not there.
pub const MANY: std::ops::RangeInclusive<u8> = 2..=201;

/// One Service, as in `services.json.gz`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Listed {
    /// Its name.
    pub name: String,
    /// Its address.
    #[serde(rename = "clusterIP")]
    pub cluster_ip: Ipv4Addr,
    /// Its port.
    pub port: u16,
    /// TCP.
    pub protocol: String,
    /// The backends' port.
    pub target_port: u16,
    /// The backends' addresses.
    pub endpoints: Vec<Ipv4Addr>,
}

/// The folder of kube-proxy's rule sets: `$XEBEC_BENCH_KUBE_PROXY`, or where they lie beside a clone of the project.
pub fn rule_sets() -> PathBuf {
    std::env::var_os("XEBEC_BENCH_KUBE_PROXY").map_or_else(
        || PathBuf::from("../shared/golden/kube-proxy"),
        PathBuf::from,
    )
}

/// The content of a file that gzip made.
pub fn unzipped(path: &Path) -> Result<Vec<u8>> {
    let file =
        std::fs::File::open(path).with_context(|| format!("could not read {}", path.display()))?;
    let mut content = Vec::new();
    flate2::read::GzDecoder::new(file)
        .read_to_end(&mut content)
        .with_context(|| format!("{} is not what gzip makes", path.display()))?;
    Ok(content)
}

/// So many Services with so many endpoints each: those of the rule sets where there are such, made ones where not.
pub fn services(count: usize, endpoints: usize) -> Result<Vec<Listed>> {
    let path = rule_sets().join(format!("{count}/services.json.gz"));
    if endpoints == BACKENDS.count() && path.exists() {
        let listed: Vec<Listed> = serde_json::from_slice(&unzipped(&path)?)
            .with_context(|| format!("{} is no list of Services", path.display()))?;
        ensure!(
            listed.len() == count && listed.first().is_some_and(|first| first.name == "s0"),
            "{} holds other Services than its folder's name says",
            path.display()
        );
        return Ok(listed);
    }
    Ok((0..count).map(|index| made(index, endpoints)).collect())
}

/// Service number `index`, whose endpoints nobody else has; only those of the first one are there.
fn made(index: usize, endpoints: usize) -> Listed {
    let number = index as u32;
    let endpoints = match index {
        0 => BACKENDS.take(endpoints).map(backend).collect(),
        // From 10.128.0.0 on, as in the rule sets; wrapped before it leaves 10.128.0.0/10.
        _ => (0..endpoints as u32)
            .map(|one| {
                let place = (number * endpoints as u32 + one) % 0x003f_ffff;
                Ipv4Addr::from_bits(0x0a80_0000 + place)
            })
            .collect(),
    };
    Listed {
        name: format!("s{index}"),
        // 10.100.0.0 on: beyond the API server's own Service.
        cluster_ip: Ipv4Addr::from_bits(0x0a64_0000 + number),
        port: PORT,
        protocol: "TCP".to_owned(),
        target_port: TARGET_PORT,
        endpoints,
    }
}

/// The address of a backend that is there.
pub fn backend(last: u8) -> Ipv4Addr {
    Ipv4Addr::new(10, 244, 2, last)
}

/// Its other address.
pub fn backend6(last: u8) -> Ipv6Addr {
    Ipv6Addr::new(0xfd00, 0x244, 2, 0, 0, 0, 0, u16::from(last))
}

/// A Service and its EndpointSlices, one of each family.
pub struct Objects {
    /// The Service.
    pub service: Value,
    /// The slices.
    pub slices: Vec<Value>,
}

/// As the API takes it.
pub fn pair(listed: &Listed) -> Objects {
    let spec = json!({
        "clusterIP": listed.cluster_ip,
        "ports": [{"name": "http", "protocol": listed.protocol, "port": listed.port, "targetPort": listed.target_port}],
    });
    let ports = json!([{"name": "http", "protocol": listed.protocol, "port": listed.target_port}]);
    objects(&listed.name, spec, ports, &v4(&listed.endpoints))
}

/// A Service of both families that is reached from outside by TCP and UDP, and from pods by UDP.
pub fn outside(all: std::ops::RangeInclusive<u8>) -> Objects {
    let backends = all.clone().map(|last| IpAddr::from(backend(last)));
    let backends: Vec<IpAddr> = backends
        .chain(all.map(|last| IpAddr::from(backend6(last))))
        .collect();
    let spec = json!({
        "type": "NodePort",
        "ipFamilyPolicy": "RequireDualStack",
        "clusterIP": OUTSIDE,
        "clusterIPs": [IpAddr::from(OUTSIDE), IpAddr::from(OUTSIDE6)],
        "ports": [
            {"name": "tcp", "protocol": "TCP", "port": PORT, "targetPort": TARGET_PORT, "nodePort": NODE_PORT},
            {"name": "udp", "protocol": "UDP", "port": PORT, "targetPort": TARGET_PORT, "nodePort": NODE_PORT},
        ],
    });
    let ports = json!([
        {"name": "tcp", "protocol": "TCP", "port": TARGET_PORT},
        {"name": "udp", "protocol": "UDP", "port": TARGET_PORT},
    ]);
    objects("outside", spec, ports, &backends)
}

/// A Service with one backend, which changes.
pub fn moving() -> Objects {
    let spec = json!({
        "clusterIP": MOVING,
        "ports": [{"name": "http", "protocol": "TCP", "port": PORT, "targetPort": TARGET_PORT}],
    });
    let ports = json!([{"name": "http", "protocol": "TCP", "port": TARGET_PORT}]);
    objects("moving", spec, ports, &[backend(*BACKENDS.start()).into()])
}

/// The address of [`outside`].
pub const OUTSIDE: Ipv4Addr = Ipv4Addr::new(10, 96, 255, 1);
/// Its other address.
pub const OUTSIDE6: Ipv6Addr = Ipv6Addr::new(0xfd00, 0x96, 0, 0, 0, 0, 0, 0x1001);
/// The address of the Service that comes and goes.
pub const EXTRA: Ipv4Addr = Ipv4Addr::new(10, 96, 255, 3);
/// The address of [`moving`].
pub const MOVING: Ipv4Addr = Ipv4Addr::new(10, 96, 255, 2);

fn v4(addresses: &[Ipv4Addr]) -> Vec<IpAddr> {
    addresses.iter().map(|one| IpAddr::from(*one)).collect()
}

fn objects(name: &str, mut spec: Value, ports: Value, endpoints: &[IpAddr]) -> Objects {
    // Without a selector, so that no controller has a say.
    spec["sessionAffinity"] = json!("None");
    let slice = |family: &str, six: bool| {
        let endpoints = endpoints.iter().filter(|one| one.is_ipv6() == six);
        let endpoints: Vec<Value> = endpoints.map(|address| endpoint(*address)).collect();
        (!six || !endpoints.is_empty()).then(|| {
            json!({
                "apiVersion": "discovery.k8s.io/v1",
                "kind": "EndpointSlice",
                "metadata": {
                    "name": format!("{name}-{}", if six { 2 } else { 1 }),
                    "namespace": NAMESPACE,
                    "labels": {"kubernetes.io/service-name": name},
                },
                "addressType": family,
                "ports": ports,
                "endpoints": endpoints,
            })
        })
    };
    Objects {
        service: json!({
            "apiVersion": "v1",
            "kind": "Service",
            "metadata": {"name": name, "namespace": NAMESPACE},
            "spec": spec,
        }),
        slices: [slice("IPv4", false), slice("IPv6", true)]
            .into_iter()
            .flatten()
            .collect(),
    }
}

/// One endpoint of a slice; those that are there live on the node `other`.
pub fn endpoint(address: IpAddr) -> Value {
    json!({"addresses": [address], "conditions": {"ready": true}, "nodeName": "other"})
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests may panic")]
    use super::*;

    #[test]
    fn made_services_have_addresses_and_endpoints_of_their_own() {
        let all: Vec<Listed> = (0..100_000).map(|index| made(index, 10)).collect();
        let addresses: std::collections::BTreeSet<_> =
            all.iter().map(|one| one.cluster_ip).collect();
        assert_eq!(addresses.len(), all.len());
        assert!(
            all.iter()
                .all(|one| (96..112).contains(&one.cluster_ip.octets()[1]))
        );
        let endpoints: std::collections::BTreeSet<_> =
            all.iter().flat_map(|one| &one.endpoints).collect();
        assert_eq!(endpoints.len(), all.len() * 10);
        assert_eq!(all[0].endpoints[9], Ipv4Addr::new(10, 244, 2, 11));
        assert_eq!(made(1, 10).endpoints[0], Ipv4Addr::new(10, 128, 0, 10));
    }
}
