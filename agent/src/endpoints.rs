//! Endpoints: the pods of this node, made and unmade by CNI requests and remembered across restarts.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv6Addr};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Context, Result};
use ipnet::IpNet;
use rtnetlink::Handle;
use serde::{Deserialize, Deserializer, Serialize};
use serde_json::{Value, json};
use tokio::sync::{Mutex, watch};
use xebec_policy::rule::Name;

use crate::dataplane::{Dataplane, Known};
use crate::host_ports::{HostPort, Mapping};
use crate::ipam::Ipam;
use crate::link::{self, Wires};

/// One pod's connection.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Endpoint {
    /// CNI container id: the sandbox.
    pub container_id: String,
    /// Name of the device in the pod.
    pub ifname: String,
    /// Name of the host's end.
    pub device: String,
    /// The pod's addresses, one of each family that the node has a range of, the primary one first.
    #[serde(alias = "address", deserialize_with = "one_or_many")]
    pub addresses: Vec<IpAddr>,
    /// Network namespace, as the runtime named it.
    pub netns: PathBuf,
    /// Namespace of the pod.
    pub namespace: String,
    /// Name of the pod.
    pub pod: String,
    /// Hardware address of the pod's end.
    #[serde(default)]
    pub mac: [u8; 6],
    /// Ports of the node that lead to it.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub ports: Vec<Mapping>,
}

/// A list, or the one thing that records had before there could be several.
pub fn one_or_many<'de, D: Deserializer<'de>, T: Deserialize<'de>>(
    deserializer: D,
) -> Result<Vec<T>, D::Error> {
    #[derive(Deserialize)]
    #[serde(untagged)]
    enum Either<T> {
        One(T),
        Many(Vec<T>),
    }
    Ok(match Either::deserialize(deserializer)? {
        Either::One(one) => vec![one],
        Either::Many(many) => many,
    })
}

impl Endpoint {
    fn name(&self) -> Name {
        (self.namespace.clone(), self.pod.clone())
    }
}

/// A CNI error (spec 1.1.0, section 5).
#[derive(Debug)]
pub struct CniError {
    /// The specification's code.
    pub code: u32,
    /// What happened.
    pub message: String,
}

impl From<anyhow::Error> for CniError {
    fn from(error: anyhow::Error) -> Self {
        // 999: an error of the plugin's own.
        Self {
            code: 999,
            message: format!("{error:#}"),
        }
    }
}

/// Tells who reads flows whose sockets are in a pod's network namespace. Nothing else needs it.
async fn name(dataplane: &Dataplane, endpoint: &Endpoint) {
    match link::cookie_of(&endpoint.netns).await {
        Ok(cookie) => dataplane.names.set_local(cookie, &endpoint.addresses),
        Err(error) => tracing::warn!(
            error = format!("{error:#}"),
            pod = format!("{}/{}", endpoint.namespace, endpoint.pod),
            "flows will not tell whose sockets these are"
        ),
    }
}

/// All endpoints of the node.
pub struct Endpoints {
    state: Mutex<State>,
    path: PathBuf,
    netlink: Handle,
    /// None where pods are only taken away.
    dataplane: Option<Arc<Dataplane>>,
    host_ports: watch::Sender<Vec<HostPort>>,
    /// The node's address of IPv6.
    source6: Option<Ipv6Addr>,
}

struct State {
    ipam: Ipam,
    endpoints: BTreeMap<String, Endpoint>,
}

impl Endpoints {
    /// Reads what the last agent of this node, which has these addresses, left.
    pub fn open(
        dir: &Path,
        ranges: &[IpNet],
        node_ips: &[IpAddr],
        dataplane: Option<Arc<Dataplane>>,
    ) -> Result<Self> {
        let ipam = Ipam::open(dir, ranges)?;
        let path = dir.join("endpoints.json");
        let endpoints = match std::fs::read(&path) {
            Ok(text) => serde_json::from_slice(&text)
                .with_context(|| format!("{} can't be read", path.display()))?,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => BTreeMap::new(),
            Err(error) => {
                return Err(error).with_context(|| format!("could not read {}", path.display()));
            }
        };
        let host_ports = watch::Sender::new(host_ports(&endpoints));
        Ok(Self {
            state: Mutex::new(State { ipam, endpoints }),
            path,
            netlink: link::handle()?,
            dataplane,
            host_ports,
            source6: node_ips.iter().find_map(|ip| match ip {
                IpAddr::V6(ip) => Some(*ip),
                IpAddr::V4(_) => None,
            }),
        })
    }

    /// The ports of the node that lead to its pods, in order; told of whenever they change.
    pub fn host_ports(&self) -> watch::Receiver<Vec<HostPort>> {
        self.host_ports.subscribe()
    }

    /// Puts the pods that were connected before this agent started under it.
    pub async fn adopt(&self) -> Result<()> {
        let Some(dataplane) = &self.dataplane else {
            return Ok(());
        };
        for endpoint in self.list().await {
            // A device that is gone went with its pod, whose removal is still to come.
            if let Some((ifindex, _)) = link::find(&self.netlink, &endpoint.device).await? {
                let wires = Wires {
                    ifindex,
                    mac: endpoint.mac,
                };
                dataplane
                    .connect(
                        &endpoint.name(),
                        &endpoint.addresses,
                        wires,
                        &endpoint.device,
                        Known::IfPresent,
                    )
                    .await?;
                name(dataplane, &endpoint).await;
            }
        }
        Ok(())
    }

    /// All endpoints, by container id.
    pub async fn list(&self) -> Vec<Endpoint> {
        self.state
            .lock()
            .await
            .endpoints
            .values()
            .cloned()
            .collect()
    }

    /// Carries out a CNI request; the answer is the plugin's result, null where it has none.
    pub async fn cni(&self, request: &Value) -> Result<Value, CniError> {
        let text = |key: &str| request[key].as_str().unwrap_or_default();
        match text("command") {
            "ADD" => self.add(request).await,
            "DEL" => {
                self.remove(&key_of(text("containerID"), text("ifname")))
                    .await?;
                Ok(Value::Null)
            }
            "CHECK" => {
                self.check(&key_of(text("containerID"), text("ifname")))
                    .await
            }
            "STATUS" => Ok(Value::Null),
            "GC" => self.collect(request).await,
            other => Err(CniError {
                code: 4,
                message: format!("CNI_COMMAND {other:?} is not known"),
            }),
        }
    }

    async fn add(&self, request: &Value) -> Result<Value, CniError> {
        let text = |key: &str| request[key].as_str().unwrap_or_default().to_owned();
        let (container_id, ifname, netns) = (text("containerID"), text("ifname"), text("netns"));
        for (name, value) in [
            ("CNI_CONTAINERID", &container_id),
            ("CNI_IFNAME", &ifname),
            ("CNI_NETNS", &netns),
        ] {
            if value.is_empty() {
                return Err(CniError {
                    code: 4,
                    message: format!("{name} is missing"),
                });
            }
        }
        let args = text("args");
        let arg = |name: &str| {
            args.split(';')
                .find_map(|pair| pair.strip_prefix(name)?.strip_prefix('='))
                .unwrap_or_default()
                .to_owned()
        };
        let ports = Mapping::all_of(&request["config"]).map_err(|error| CniError {
            code: 7,
            message: format!("{error:#}"),
        })?;
        let key = key_of(&container_id, &ifname);
        let mut state = self.state.lock().await;
        let addresses = state.ipam.allocate(&key)?;
        let mut endpoint = Endpoint {
            device: device_name(&key),
            netns: netns.into(),
            namespace: arg("K8S_POD_NAMESPACE"),
            pod: arg("K8S_POD_NAME"),
            container_id,
            ifname,
            addresses,
            mac: [0; 6],
            ports,
        };
        // Others need not wait while this pod's policy is looked up.
        drop(state);
        let outcome = self.wire(&mut endpoint).await;
        let mut state = self.state.lock().await;
        if let Err(error) = outcome {
            self.unwire(&endpoint.device, &endpoint.addresses).await?;
            state.ipam.release(&key)?;
            return Err(error.into());
        }
        let result = result_of(&endpoint, request);
        state.endpoints.insert(key, endpoint);
        self.save(&state)?;
        Ok(result)
    }

    /// Makes the wires, and puts them under policy before anything can be sent.
    async fn wire(&self, endpoint: &mut Endpoint) -> Result<()> {
        let wires = link::connect(
            &self.netlink,
            &endpoint.device,
            &endpoint.netns,
            &endpoint.ifname,
            &endpoint.addresses,
            self.source6,
        )
        .await?;
        endpoint.mac = wires.mac;
        match &self.dataplane {
            Some(dataplane) => {
                dataplane
                    .connect(
                        &endpoint.name(),
                        &endpoint.addresses,
                        wires,
                        &endpoint.device,
                        Known::Must,
                    )
                    .await?;
                name(dataplane, endpoint).await;
                Ok(())
            }
            None => Ok(()),
        }
    }

    async fn unwire(&self, device: &str, addresses: &[IpAddr]) -> Result<()> {
        link::remove(&self.netlink, device).await?;
        if let Some(dataplane) = &self.dataplane {
            dataplane.names.remove_local(addresses);
            dataplane.disconnect(addresses, device).await?;
        }
        Ok(())
    }

    async fn remove(&self, key: &str) -> Result<()> {
        let mut state = self.state.lock().await;
        let endpoint = state.endpoints.get(key);
        let addresses = endpoint.map_or(&[][..], |endpoint| &endpoint.addresses);
        self.unwire(&device_name(key), addresses).await?;
        state.ipam.release(key)?;
        if state.endpoints.remove(key).is_some() {
            self.save(&state)?;
        }
        Ok(())
    }

    async fn check(&self, key: &str) -> Result<Value, CniError> {
        let state = self.state.lock().await;
        let Some(endpoint) = state.endpoints.get(key) else {
            return Err(CniError {
                code: 3,
                message: "the container is not known to the agent".into(),
            });
        };
        if link::find(&self.netlink, &endpoint.device).await?.is_none() {
            return Err(CniError {
                code: 999,
                message: format!("the device {} is gone", endpoint.device),
            });
        }
        Ok(Value::Null)
    }

    /// Removes what is not among `cni.dev/valid-attachments`.
    async fn collect(&self, request: &Value) -> Result<Value, CniError> {
        let valid: Vec<String> = request["config"]["cni.dev/valid-attachments"]
            .as_array()
            .into_iter()
            .flatten()
            .map(|one| {
                key_of(
                    one["containerID"].as_str().unwrap_or_default(),
                    one["ifname"].as_str().unwrap_or_default(),
                )
            })
            .collect();
        let known: Vec<String> = self
            .state
            .lock()
            .await
            .ipam
            .owners()
            .map(str::to_owned)
            .collect();
        for key in known.iter().filter(|key| !valid.contains(key)) {
            self.remove(key).await?;
        }
        Ok(Value::Null)
    }

    /// Writes the records, and tells what follows from them.
    fn save(&self, state: &State) -> Result<()> {
        let now = host_ports(&state.endpoints);
        self.host_ports.send_if_modified(|told| {
            let news = *told != now;
            if news {
                *told = now;
            }
            news
        });
        let write = || -> std::io::Result<()> {
            let temporary = self.path.with_extension("tmp");
            std::fs::write(&temporary, serde_json::to_vec(&state.endpoints)?)?;
            std::fs::rename(&temporary, &self.path)
        };
        write().with_context(|| format!("could not write {}", self.path.display()))
    }
}

fn key_of(container_id: &str, ifname: &str) -> String {
    format!("{container_id}/{ifname}")
}

/// A device name (at most 15 bytes) from a container's id and interface: the same ones give the same name.
pub fn device_name(key: &str) -> String {
    // FNV-1a, 64 bit: ids are random already, this only shortens them.
    let hash = key.bytes().fold(0xcbf2_9ce4_8422_2325u64, |hash, byte| {
        (hash ^ u64::from(byte)).wrapping_mul(0x100_0000_01b3)
    });
    format!("xbc{:011x}", hash & 0xfff_ffff_ffff)
}

/// The CNI result of an ADD.
fn result_of(endpoint: &Endpoint, request: &Value) -> Value {
    let version = request["config"]["cniVersion"].as_str().unwrap_or("1.0.0");
    let of_address = |address: &IpAddr| {
        let whole = IpNet::from(*address);
        let mut ip = json!({"address": whole.to_string(), "interface": 1});
        if version.starts_with("0.") {
            ip["version"] = if address.is_ipv4() { "4" } else { "6" }.into();
        }
        ip
    };
    let route =
        |address: &IpAddr| json!({"dst": if address.is_ipv4() { "0.0.0.0/0" } else { "::/0" }});
    let addresses = &endpoint.addresses;
    json!({
        "cniVersion": version,
        "interfaces": [
            {"name": endpoint.device},
            {"name": endpoint.ifname, "sandbox": endpoint.netns},
        ],
        "ips": addresses.iter().map(of_address).collect::<Vec<_>>(),
        "routes": addresses.iter().map(route).collect::<Vec<_>>(),
        "dns": {},
    })
}

/// The ports of all endpoints, in order.
fn host_ports(endpoints: &BTreeMap<String, Endpoint>) -> Vec<HostPort> {
    let mut all: Vec<HostPort> = endpoints
        .values()
        .flat_map(|endpoint| {
            let ports = endpoint.ports.iter();
            ports.flat_map(|port| port.to(&endpoint.addresses))
        })
        .collect();
    all.sort();
    all.dedup();
    all
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn device_names_fit_and_differ() {
        let (a, b) = (device_name("a/eth0"), device_name("a/eth1"));
        assert_ne!(a, b);
        assert_eq!(a, device_name("a/eth0"));
        assert!(
            a.len() <= 14,
            "room for the temporary name of the other end: {a}"
        );
    }

    #[test]
    fn what_an_agent_of_one_family_wrote_is_read() {
        let old = r#"{"a/eth0": {"container_id": "a", "ifname": "eth0", "device": "xbc1", "address": "10.1.2.3",
            "netns": "/ns", "namespace": "n", "pod": "p", "mac": [2, 0, 0, 0, 0, 1]}}"#;
        let read: BTreeMap<String, Endpoint> = serde_json::from_str(old).unwrap();
        let endpoint = &read["a/eth0"];
        assert_eq!(endpoint.addresses, ["10.1.2.3".parse::<IpAddr>().unwrap()]);
        assert!(endpoint.ports.is_empty());
        let written = serde_json::to_string(&read).unwrap();
        assert!(written.contains(r#""addresses":["10.1.2.3"]"#), "{written}");
        let again: BTreeMap<String, Endpoint> = serde_json::from_str(&written).unwrap();
        assert_eq!(again["a/eth0"].addresses, endpoint.addresses);
    }

    #[test]
    fn a_result_tells_of_every_address() {
        let endpoint: Endpoint = serde_json::from_value(json!({
            "container_id": "a", "ifname": "eth0", "device": "xbc1", "netns": "/ns", "namespace": "n", "pod": "p",
            "addresses": ["fd00:1::3", "10.1.2.3"],
        }))
        .unwrap();
        let new = result_of(&endpoint, &json!({"config": {"cniVersion": "1.1.0"}}));
        assert_eq!(
            new["ips"],
            json!([{"address": "fd00:1::3/128", "interface": 1}, {"address": "10.1.2.3/32", "interface": 1}])
        );
        assert_eq!(
            new["routes"],
            json!([{"dst": "::/0"}, {"dst": "0.0.0.0/0"}])
        );
        let old = result_of(&endpoint, &json!({"config": {"cniVersion": "0.3.1"}}));
        assert_eq!(
            (&old["ips"][0]["version"], &old["ips"][1]["version"]),
            (&json!("6"), &json!("4"))
        );
    }
}
