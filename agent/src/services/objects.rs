//! Services and EndpointSlices as the API sends them, with no more fields than the dataplane needs.
//!
//! What can't be read makes the object faulty, never the watch: one bad object must not keep the others away.

use std::borrow::Cow;
use std::collections::BTreeMap;

use kube::Resource;
use kube::api::ObjectMeta;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Deserializer};
use serde_json::Value;

/// A Service.
#[derive(Clone, Debug)]
pub struct Service {
    /// Name, namespace, labels and the like.
    pub metadata: ObjectMeta,
    /// Its fields, or what is wrong with them.
    pub fields: Result<ServiceFields, String>,
}

#[derive(Clone, Debug, Default)]
pub struct ServiceFields {
    pub spec: ServiceSpec,
    pub status: ServiceStatus,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct ServiceSpec {
    #[serde(rename = "type")]
    pub kind: Option<String>,
    #[serde(rename = "clusterIP")]
    pub cluster_ip: Option<String>,
    #[serde(rename = "clusterIPs")]
    pub cluster_ips: Option<Vec<String>>,
    #[serde(rename = "externalIPs")]
    pub external_ips: Option<Vec<String>>,
    pub ports: Option<Vec<ServicePort>>,
    pub session_affinity: Option<String>,
    pub session_affinity_config: Option<AffinityConfig>,
    pub external_traffic_policy: Option<String>,
    pub internal_traffic_policy: Option<String>,
    pub load_balancer_source_ranges: Option<Vec<String>>,
    pub health_check_node_port: Option<i64>,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct ServicePort {
    pub name: Option<String>,
    pub protocol: Option<String>,
    pub port: i64,
    pub node_port: Option<i64>,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
pub struct AffinityConfig {
    #[serde(rename = "clientIP")]
    pub client_ip: Option<ClientIp>,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct ClientIp {
    pub timeout_seconds: Option<i64>,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct ServiceStatus {
    pub load_balancer: Option<LoadBalancerStatus>,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
pub struct LoadBalancerStatus {
    pub ingress: Option<Vec<Ingress>>,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Ingress {
    pub ip: Option<String>,
    pub ip_mode: Option<String>,
}

/// An EndpointSlice.
#[derive(Clone, Debug)]
pub struct EndpointSlice {
    /// Name, namespace, labels and the like.
    pub metadata: ObjectMeta,
    /// Its fields, or what is wrong with them.
    pub fields: Result<SliceFields, String>,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct SliceFields {
    pub address_type: String,
    pub endpoints: Option<Vec<Endpoint>>,
    pub ports: Option<Vec<SlicePort>>,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Endpoint {
    pub addresses: Vec<String>,
    pub conditions: Option<Conditions>,
    pub node_name: Option<String>,
    pub zone: Option<String>,
    pub hints: Option<Hints>,
}

#[derive(Clone, Copy, Debug, Default, Deserialize)]
#[serde(default)]
pub struct Conditions {
    pub ready: Option<bool>,
    pub serving: Option<bool>,
    pub terminating: Option<bool>,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Hints {
    pub for_zones: Option<Vec<Named>>,
    pub for_nodes: Option<Vec<Named>>,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
pub struct Named {
    pub name: String,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
pub struct SlicePort {
    pub name: Option<String>,
    pub protocol: Option<String>,
    pub port: Option<i64>,
}

/// What is kept of the metadata: managed fields and owners are not even built.
#[derive(Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct Metadata {
    name: Option<String>,
    namespace: Option<String>,
    uid: Option<String>,
    resource_version: Option<String>,
    creation_timestamp: Option<Value>,
    labels: Option<BTreeMap<String, String>>,
    annotations: Option<BTreeMap<String, String>>,
}

impl From<Metadata> for ObjectMeta {
    fn from(from: Metadata) -> Self {
        Self {
            name: from.name,
            namespace: from.namespace,
            uid: from.uid,
            resource_version: from.resource_version,
            creation_timestamp: from
                .creation_timestamp
                .and_then(|time| serde_json::from_value(time).ok()),
            labels: from.labels,
            annotations: from.annotations.map(|all| {
                let wanted = |key: &String| key.contains("xebec.io/") || key.contains("endpoints.");
                all.into_iter().filter(|(key, _)| wanted(key)).collect()
            }),
            ..Self::default()
        }
    }
}

/// Reads a part of an object; one that is missing is empty.
fn part<T: DeserializeOwned + Default>(value: Value, name: &str) -> Result<T, String> {
    match value {
        Value::Null => Ok(T::default()),
        value => T::deserialize(value).map_err(|error| format!("{name}: {error}")),
    }
}

/// The metadata, or as much as can be read of it.
fn metadata(mut value: Value) -> (ObjectMeta, Option<String>) {
    let text = |key: &str| value[key].as_str().map(str::to_owned);
    let names = (text("name"), text("namespace"), text("resourceVersion"));
    match part::<Metadata>(value.take(), "metadata") {
        Ok(read) => (read.into(), None),
        Err(error) => {
            let least = ObjectMeta {
                name: names.0,
                namespace: names.1,
                resource_version: names.2,
                ..ObjectMeta::default()
            };
            (least, Some(error))
        }
    }
}

impl<'de> Deserialize<'de> for Service {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        #[derive(Default, Deserialize)]
        #[serde(default)]
        struct Parts {
            metadata: Value,
            spec: Value,
            status: Value,
        }
        let parts = Parts::deserialize(from)?;
        let (metadata, fault) = metadata(parts.metadata);
        let fields = fault.map_or(Ok(()), Err).and_then(|()| {
            Ok(ServiceFields {
                spec: part(parts.spec, "spec")?,
                status: part(parts.status, "status")?,
            })
        });
        Ok(Self { metadata, fields })
    }
}

impl<'de> Deserialize<'de> for EndpointSlice {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        #[derive(Default, Deserialize)]
        #[serde(rename_all = "camelCase", default)]
        struct Parts {
            metadata: Value,
            address_type: Value,
            endpoints: Value,
            ports: Value,
        }
        let parts = Parts::deserialize(from)?;
        let (metadata, fault) = metadata(parts.metadata);
        let fields = fault.map_or(Ok(()), Err).and_then(|()| {
            Ok(SliceFields {
                address_type: part(parts.address_type, "addressType")?,
                endpoints: part(parts.endpoints, "endpoints")?,
                ports: part(parts.ports, "ports")?,
            })
        });
        Ok(Self { metadata, fields })
    }
}

macro_rules! resource {
    ($kind:ident, $group:literal, $plural:literal) => {
        impl Resource for $kind {
            type DynamicType = ();
            type Scope = kube::core::NamespaceResourceScope;

            fn kind(_: &()) -> Cow<'_, str> {
                stringify!($kind).into()
            }

            fn group(_: &()) -> Cow<'_, str> {
                $group.into()
            }

            fn version(_: &()) -> Cow<'_, str> {
                "v1".into()
            }

            fn plural(_: &()) -> Cow<'_, str> {
                $plural.into()
            }

            fn meta(&self) -> &ObjectMeta {
                &self.metadata
            }

            fn meta_mut(&mut self) -> &mut ObjectMeta {
                &mut self.metadata
            }
        }
    };
}

resource!(Service, "", "services");
resource!(EndpointSlice, "discovery.k8s.io", "endpointslices");

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn garbage_makes_one_object_faulty_and_keeps_its_name() {
        let bad = json!([
            {"metadata": {"name": "a", "namespace": "b"}, "spec": {"ports": "all"}},
            {"metadata": {"name": "a", "namespace": "b"}, "spec": {"ports": [{"port": "http"}]}},
            {"metadata": {"name": "a", "namespace": "b", "labels": 3}, "spec": null},
            {"metadata": {"name": "a", "namespace": "b"}, "status": 5},
        ]);
        let all: Vec<Service> = serde_json::from_value(bad).unwrap();
        for one in all {
            assert_eq!(one.metadata.name.as_deref(), Some("a"));
            assert!(one.fields.is_err(), "{one:?}");
        }
        let slice: EndpointSlice = serde_json::from_value(
            json!({"metadata": {"name": "x"}, "endpoints": [{"addresses": [7]}]}),
        )
        .unwrap();
        assert!(slice.fields.is_err());
        assert_eq!(slice.metadata.name.as_deref(), Some("x"));
        // Nothing at all is an object without a name.
        let none: Service = serde_json::from_value(json!({})).unwrap();
        assert!(none.metadata.name.is_none() && none.fields.is_ok());
    }
}
