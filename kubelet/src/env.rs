//! A container's environment: values, references, Service variables, and `$(NAME)` in commands.

use std::collections::BTreeMap;
use std::net::IpAddr;

use anyhow::{Result, bail};
use k8s_openapi::api::core::v1::{ConfigMap, Container, Pod, Secret, Service};
use kube::Api;
use xebec_schema::quantity::Quantity;

/// What references are resolved against.
pub(crate) struct Sources<'a> {
    pub client: &'a kube::Client,
    pub pod: &'a Pod,
    pub node_name: &'a str,
    pub node_ips: &'a [IpAddr],
    /// The primary one first.
    pub pod_ips: &'a [String],
}

/// Replaces `$(NAME)` by its value; `$$` stands for one `$`, and unknown names stay as they are.
pub(crate) fn expand(text: &str, variables: &BTreeMap<String, String>) -> String {
    let mut out = String::new();
    let mut rest = text;
    while let Some(at) = rest.find('$') {
        out.push_str(&rest[..at]);
        rest = &rest[at..];
        if let Some(after) = rest.strip_prefix("$$") {
            out.push('$');
            rest = after;
        } else if let Some((name, after)) = rest
            .strip_prefix("$(")
            .and_then(|inner| inner.split_once(')'))
        {
            match variables.get(name) {
                Some(value) => out.push_str(value),
                None => out.push_str(&format!("$({name})")),
            }
            rest = after;
        } else {
            out.push('$');
            rest = &rest[1..];
        }
    }
    out.push_str(rest);
    out
}

/// `{NAME}_SERVICE_HOST` and the like of the Services that have an address.
pub(crate) fn service_variables(services: &[Service]) -> BTreeMap<String, String> {
    let mut variables = BTreeMap::new();
    for service in services {
        let Some(spec) = &service.spec else { continue };
        let Some(address) = spec
            .cluster_ip
            .as_deref()
            .filter(|ip| !ip.is_empty() && *ip != "None")
        else {
            continue;
        };
        let name = service
            .metadata
            .name
            .as_deref()
            .unwrap_or_default()
            .to_uppercase()
            .replace('-', "_");
        let Some(first) = spec.ports.iter().flatten().next() else {
            continue;
        };
        variables.insert(format!("{name}_SERVICE_HOST"), address.to_owned());
        variables.insert(format!("{name}_SERVICE_PORT"), first.port.to_string());
        let host = if address.contains(':') {
            format!("[{address}]")
        } else {
            address.to_owned()
        };
        let url =
            |port: i32, protocol: &str| format!("{}://{host}:{port}", protocol.to_lowercase());
        for (index, port) in spec.ports.iter().flatten().enumerate() {
            let protocol = port.protocol.as_deref().unwrap_or("TCP");
            if let Some(port_name) = port.name.as_deref().filter(|name| !name.is_empty()) {
                let port_name = port_name.to_uppercase().replace('-', "_");
                variables.insert(
                    format!("{name}_SERVICE_PORT_{port_name}"),
                    port.port.to_string(),
                );
            }
            if index == 0 {
                variables.insert(format!("{name}_PORT"), url(port.port, protocol));
            }
            let prefix = format!("{name}_PORT_{}_{protocol}", port.port);
            variables.insert(prefix.clone(), url(port.port, protocol));
            variables.insert(format!("{prefix}_PROTO"), protocol.to_lowercase());
            variables.insert(format!("{prefix}_PORT"), port.port.to_string());
            variables.insert(format!("{prefix}_ADDR"), address.to_owned());
        }
    }
    variables
}

/// The Services that a pod sees: those of its namespace, and the API server's.
pub(crate) async fn services(client: &kube::Client, pod: &Pod) -> Result<Vec<Service>> {
    let namespace = pod.metadata.namespace.as_deref().unwrap_or_default();
    let mut found = Vec::new();
    if pod
        .spec
        .as_ref()
        .and_then(|spec| spec.enable_service_links)
        .unwrap_or(true)
    {
        found = Api::<Service>::namespaced(client.clone(), namespace)
            .list(&Default::default())
            .await?
            .items;
    }
    let is_kubernetes = |service: &Service| service.metadata.name.as_deref() == Some("kubernetes");
    if namespace != "default" || !found.iter().any(is_kubernetes) {
        found.retain(|service| !is_kubernetes(service));
        found.extend(
            Api::<Service>::namespaced(client.clone(), "default")
                .get_opt("kubernetes")
                .await?,
        );
    }
    Ok(found)
}

/// A container's whole environment, in order.
pub(crate) async fn environment(
    sources: &Sources<'_>,
    container: &Container,
) -> Result<Vec<(String, String)>> {
    let client = sources.client;
    let namespace = sources
        .pod
        .metadata
        .namespace
        .as_deref()
        .unwrap_or_default();
    let mut variables = service_variables(&services(client, sources.pod).await?);
    let mut own: Vec<(String, String)> = Vec::new();
    let mut set = |variables: &mut BTreeMap<String, String>, name: String, value: String| {
        own.retain(|(known, _)| *known != name);
        variables.insert(name.clone(), value.clone());
        own.push((name, value));
    };
    for from in container.env_from.iter().flatten() {
        let prefix = from.prefix.as_deref().unwrap_or_default();
        let mut pairs: BTreeMap<String, String> = BTreeMap::new();
        if let Some(reference) = &from.config_map_ref {
            match Api::<ConfigMap>::namespaced(client.clone(), namespace)
                .get_opt(&reference.name)
                .await?
            {
                Some(map) => pairs.extend(map.data.unwrap_or_default()),
                None if reference.optional == Some(true) => {}
                None => bail!("configmap {:?} not found", reference.name),
            }
        }
        if let Some(reference) = &from.secret_ref {
            match Api::<Secret>::namespaced(client.clone(), namespace)
                .get_opt(&reference.name)
                .await?
            {
                Some(secret) => pairs.extend(
                    secret
                        .data
                        .unwrap_or_default()
                        .into_iter()
                        .map(|(key, value)| (key, String::from_utf8_lossy(&value.0).into_owned())),
                ),
                None if reference.optional == Some(true) => {}
                None => bail!("secret {:?} not found", reference.name),
            }
        }
        for (key, value) in pairs {
            set(&mut variables, format!("{prefix}{key}"), value);
        }
    }
    for variable in container.env.iter().flatten() {
        let value = match &variable.value_from {
            None => Some(expand(
                variable.value.as_deref().unwrap_or_default(),
                &variables,
            )),
            Some(from) => {
                if let Some(field) = &from.field_ref {
                    Some(pod_field(sources, &field.field_path)?)
                } else if let Some(resource) = &from.resource_field_ref {
                    Some(resource_field(
                        sources.pod,
                        container,
                        resource.container_name.as_deref(),
                        &resource.resource,
                        resource.divisor.as_ref().map(|d| d.0.as_str()),
                    )?)
                } else if let Some(reference) = &from.config_map_key_ref {
                    let map = Api::<ConfigMap>::namespaced(client.clone(), namespace)
                        .get_opt(&reference.name)
                        .await?;
                    let value = map.and_then(|map| map.data?.remove(&reference.key));
                    if value.is_none() && reference.optional != Some(true) {
                        bail!(
                            "couldn't find key {} in ConfigMap {namespace}/{}",
                            reference.key,
                            reference.name
                        );
                    }
                    value
                } else if let Some(reference) = &from.secret_key_ref {
                    let secret = Api::<Secret>::namespaced(client.clone(), namespace)
                        .get_opt(&reference.name)
                        .await?;
                    let value = secret
                        .and_then(|secret| secret.data?.remove(&reference.key))
                        .map(|value| String::from_utf8_lossy(&value.0).into_owned());
                    if value.is_none() && reference.optional != Some(true) {
                        bail!(
                            "couldn't find key {} in Secret {namespace}/{}",
                            reference.key,
                            reference.name
                        );
                    }
                    value
                } else {
                    bail!(
                        "environment variable {} has a source that is not supported",
                        variable.name
                    )
                }
            }
        };
        if let Some(value) = value {
            set(&mut variables, variable.name.clone(), value);
        }
    }
    // Service variables come first, so that the pod's own win.
    let names: Vec<String> = own.iter().map(|(name, _)| name.clone()).collect();
    let mut all: Vec<(String, String)> = variables
        .into_iter()
        .filter(|(name, _)| !names.contains(name))
        .collect();
    all.extend(own);
    Ok(all)
}

/// A field of the pod (`fieldRef`).
pub(crate) fn pod_field(sources: &Sources<'_>, path: &str) -> Result<String> {
    let (metadata, spec) = (&sources.pod.metadata, sources.pod.spec.as_ref());
    let subscript = |map: &Option<BTreeMap<String, String>>, prefix: &str| {
        let key = path
            .strip_prefix(prefix)?
            .strip_prefix("['")?
            .strip_suffix("']")?;
        Some(
            map.as_ref()
                .and_then(|map| map.get(key))
                .cloned()
                .unwrap_or_default(),
        )
    };
    let lines = |map: &Option<BTreeMap<String, String>>| {
        map.iter()
            .flatten()
            .map(|(key, value)| format!("{key}={value:?}"))
            .collect::<Vec<_>>()
            .join("\n")
    };
    Ok(match path {
        "metadata.name" => metadata.name.clone().unwrap_or_default(),
        "metadata.namespace" => metadata.namespace.clone().unwrap_or_default(),
        "metadata.uid" => metadata.uid.clone().unwrap_or_default(),
        "metadata.labels" => lines(&metadata.labels),
        "metadata.annotations" => lines(&metadata.annotations),
        "spec.nodeName" => sources.node_name.to_owned(),
        "spec.serviceAccountName" => spec
            .and_then(|spec| spec.service_account_name.clone())
            .unwrap_or_default(),
        "status.hostIP" => sources
            .node_ips
            .first()
            .map(IpAddr::to_string)
            .unwrap_or_default(),
        "status.hostIPs" => {
            let all: Vec<String> = sources.node_ips.iter().map(IpAddr::to_string).collect();
            all.join(",")
        }
        "status.podIP" => sources.pod_ips.first().cloned().unwrap_or_default(),
        "status.podIPs" => sources.pod_ips.join(","),
        other => subscript(&metadata.labels, "metadata.labels")
            .or_else(|| subscript(&metadata.annotations, "metadata.annotations"))
            .ok_or_else(|| anyhow::anyhow!("unsupported fieldPath: {other}"))?,
    })
}

/// A container's limit or request in units of a divisor, rounded up (`resourceFieldRef`).
pub(crate) fn resource_field(
    pod: &Pod,
    own: &Container,
    name: Option<&str>,
    resource: &str,
    divisor: Option<&str>,
) -> Result<String> {
    let spec = pod.spec.as_ref();
    let container = match name.filter(|name| !name.is_empty()) {
        None => own,
        Some(name) => match spec.and_then(|spec| {
            spec.containers
                .iter()
                .chain(spec.init_containers.iter().flatten())
                .find(|c| c.name == name)
        }) {
            Some(container) => container,
            None => bail!("container {name} not found"),
        },
    };
    let Some((list, which)) = resource.split_once('.') else {
        bail!("unsupported resource {resource}")
    };
    let resources = container.resources.as_ref();
    let amounts = match list {
        "limits" => resources.and_then(|r| r.limits.as_ref()),
        "requests" => resources.and_then(|r| r.requests.as_ref()),
        _ => bail!("unsupported resource {resource}"),
    };
    let amount = amounts
        .and_then(|amounts| amounts.get(which))
        .and_then(|q| Quantity::parse(&q.0).ok())
        .map_or(0, |q| q.nano_value());
    let divisor = divisor
        .and_then(|text| Quantity::parse(text).ok())
        .map(|q| q.nano_value())
        .filter(|d| *d > 0)
        .unwrap_or(1_000_000_000);
    Ok(((amount + divisor - 1) / divisor).to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_expanded_and_unknown_ones_kept() {
        let variables = BTreeMap::from([("A".to_owned(), "1".to_owned())]);
        for (text, wanted) in [
            ("$(A)/$(B)", "1/$(B)"),
            ("$$(A)", "$(A)"),
            ("a$b", "a$b"),
            ("$(A", "$(A"),
            ("$", "$"),
        ] {
            assert_eq!(expand(text, &variables), wanted);
        }
    }

    #[test]
    fn services_become_variables() {
        let service: Service = serde_json::from_value(serde_json::json!({
            "metadata": {"name": "my-api"}, "spec": {"clusterIP": "10.96.0.9", "ports": [{"name": "http", "port": 80, "protocol": "TCP"}]},
        })).unwrap();
        let variables = service_variables(&[service]);
        assert_eq!(variables["MY_API_SERVICE_HOST"], "10.96.0.9");
        assert_eq!(variables["MY_API_SERVICE_PORT_HTTP"], "80");
        assert_eq!(variables["MY_API_PORT_80_TCP"], "tcp://10.96.0.9:80");
        let service: Service = serde_json::from_value(serde_json::json!({
            "metadata": {"name": "six"}, "spec": {"clusterIP": "fd00::9", "ports": [{"port": 80, "protocol": "TCP"}]},
        })).unwrap();
        let variables = service_variables(&[service]);
        assert_eq!(variables["SIX_SERVICE_HOST"], "fd00::9");
        assert_eq!(variables["SIX_PORT"], "tcp://[fd00::9]:80");
        assert_eq!(variables["SIX_PORT_80_TCP_ADDR"], "fd00::9");
    }
}
