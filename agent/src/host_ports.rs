//! Ports of the node that lead to pods (`hostPort`).

use std::net::IpAddr;

use anyhow::{Context, Result, bail};
use serde::{Deserialize, Serialize};
use serde_json::Value;

/// A port of the node that leads to a pod's.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct HostPort {
    /// The protocol's number.
    pub protocol: u8,
    /// The node's address that it is at; none: at every one of the pod's family.
    pub host_ip: Option<IpAddr>,
    /// The node's port.
    pub host_port: u16,
    /// The pod's address.
    pub pod_ip: IpAddr,
    /// The pod's port.
    pub container_port: u16,
}

/// A port mapping as the container runtime tells of it (`runtimeConfig.portMappings`).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Mapping {
    /// The protocol's number.
    protocol: u8,
    /// The node's address that it is at, or all of them (of one family, or of both).
    host_ip: Option<IpAddr>,
    host_port: u16,
    container_port: u16,
}

impl Mapping {
    /// The mappings of a CNI configuration; one that can't be carried out is an error.
    pub fn all_of(config: &Value) -> Result<Vec<Self>> {
        let told = &config["runtimeConfig"]["portMappings"];
        let all = told.as_array().into_iter().flatten();
        all.filter_map(|one| Self::of(one).transpose()).collect()
    }

    /// One of them; none where no port of the node is asked for.
    fn of(told: &Value) -> Result<Option<Self>> {
        let port = |key: &str| {
            let number = told[key].as_u64().unwrap_or(0);
            u16::try_from(number)
                .with_context(|| format!("port mapping: {key} {number} is no port"))
        };
        let (host_port, container_port) = (port("hostPort")?, port("containerPort")?);
        if host_port == 0 {
            return Ok(None);
        }
        if container_port == 0 {
            bail!("port mapping: {host_port} leads to no containerPort");
        }
        let protocol = told["protocol"].as_str().unwrap_or("tcp");
        let protocol = match protocol.to_ascii_lowercase().as_str() {
            "tcp" => libc::IPPROTO_TCP,
            "udp" => libc::IPPROTO_UDP,
            "sctp" => libc::IPPROTO_SCTP,
            _ => bail!("port mapping: the protocol {protocol:?} is not known"),
        } as u8;
        let host_ip = match told["hostIP"].as_str().unwrap_or_default() {
            "" => None,
            text => Some(
                text.parse()
                    .with_context(|| format!("port mapping: hostIP {text:?} is no address"))?,
            ),
        };
        Ok(Some(Self {
            protocol,
            host_ip,
            host_port,
            container_port,
        }))
    }

    /// What it means for a pod with these addresses: one port for each of the family that it is for.
    pub fn to(&self, addresses: &[IpAddr]) -> impl Iterator<Item = HostPort> {
        let fits = |address: &&IpAddr| {
            self.host_ip
                .is_none_or(|host| host.is_ipv4() == address.is_ipv4())
        };
        addresses.iter().filter(fits).map(|address| HostPort {
            protocol: self.protocol,
            host_ip: self.host_ip.filter(|host| !host.is_unspecified()),
            host_port: self.host_port,
            pod_ip: *address,
            container_port: self.container_port,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn ports(mappings: Value, addresses: &[&str]) -> Result<Vec<String>> {
        let all = Mapping::all_of(&json!({"runtimeConfig": {"portMappings": mappings}}))?;
        let addresses: Vec<IpAddr> = addresses.iter().map(|one| one.parse().unwrap()).collect();
        let text = |port: HostPort| {
            let host = port.host_ip.map_or("*".to_owned(), |ip| ip.to_string());
            format!(
                "{} {host} {} {} {}",
                port.protocol, port.host_port, port.pod_ip, port.container_port
            )
        };
        Ok(all
            .iter()
            .flat_map(|one| one.to(&addresses))
            .map(text)
            .collect())
    }

    #[test]
    fn a_port_is_at_the_addresses_that_it_is_asked_for_at() {
        let both = ["10.1.2.3", "fd00:1::3"];
        let at = |host: &str| {
            let one =
                json!([{"hostPort": 80, "containerPort": 8080, "protocol": "tcp", "hostIP": host}]);
            ports(one, &both).unwrap()
        };
        let (v4, v6) = ("6 * 80 10.1.2.3 8080", "6 * 80 fd00:1::3 8080");
        assert_eq!(at(""), [v4, v6]);
        assert_eq!(at("0.0.0.0"), [v4]);
        assert_eq!(at("::"), [v6]);
        assert_eq!(at("192.0.2.1"), ["6 192.0.2.1 80 10.1.2.3 8080"]);
        assert_eq!(at("fd00::1"), ["6 fd00::1 80 fd00:1::3 8080"]);
    }

    #[test]
    fn what_is_no_port_of_the_node_is_left_out_and_nonsense_refused() {
        let udp = json!([
            {"containerPort": 53, "protocol": "UDP"},
            {"hostPort": 0, "containerPort": 53},
            {"hostPort": 53, "containerPort": 53, "protocol": "UDP"},
            {"hostPort": 9, "containerPort": 9},
        ]);
        assert_eq!(
            ports(udp, &["10.1.2.3"]).unwrap(),
            ["17 * 53 10.1.2.3 53", "6 * 9 10.1.2.3 9"]
        );
        for bad in [
            json!({"hostPort": 70000, "containerPort": 1}),
            json!({"hostPort": 1}),
            json!({"hostPort": 1, "containerPort": 1, "protocol": "icmp"}),
            json!({"hostPort": 1, "containerPort": 1, "hostIP": "here"}),
        ] {
            ports(json!([bad]), &["10.1.2.3"]).unwrap_err();
        }
        assert!(Mapping::all_of(&json!({})).unwrap().is_empty());
    }
}
