//! What a Service loses when its type changes: what was filled in for the old type and left as it was.

use serde_json::Value;

fn kind(spec: &Value) -> &str {
    spec["type"].as_str().unwrap_or_default()
}

fn has_cluster_address(spec: &Value) -> bool {
    kind(spec) != "ExternalName"
}

fn has_node_ports(spec: &Value) -> bool {
    matches!(kind(spec), "NodePort" | "LoadBalancer")
}

/// Whether clients outside the cluster can reach it.
pub fn is_external(spec: &Value) -> bool {
    let addresses = spec["externalIPs"].as_array();
    matches!(kind(spec), "NodePort" | "LoadBalancer")
        || kind(spec) == "ClusterIP" && addresses.is_some_and(|all| !all.is_empty())
}

/// Whether a load balancer asks a port of its own for the nodes' health.
pub fn has_health_port(spec: &Value) -> bool {
    kind(spec) == "LoadBalancer" && spec["externalTrafficPolicy"] == "Local"
}

/// Only what the user left alone is dropped: what was changed too is for validation to refuse.
pub(super) fn drop_what_went_with_the_type(old: &Value, new: &mut Value) {
    type Needs = fn(&Value) -> bool;
    let fields: [(&str, Needs); 9] = [
        ("clusterIP", has_cluster_address),
        ("clusterIPs", has_cluster_address),
        ("ipFamilies", has_cluster_address),
        ("ipFamilyPolicy", has_cluster_address),
        ("internalTrafficPolicy", has_cluster_address),
        ("healthCheckNodePort", has_health_port),
        ("externalTrafficPolicy", is_external),
        ("allocateLoadBalancerNodePorts", |spec| {
            kind(spec) == "LoadBalancer"
        }),
        ("loadBalancerClass", |spec| kind(spec) == "LoadBalancer"),
    ];
    let gone: Vec<&str> = fields
        .iter()
        .filter(|(field, needs)| needs(old) && !needs(new) && old[*field] == new[*field])
        .map(|(field, _)| *field)
        .collect();
    let asks = |number: &u64| !node_ports(old).contains(number);
    if has_node_ports(old) && !has_node_ports(new) && !node_ports(new).iter().any(asks) {
        for port in new["ports"].as_array_mut().into_iter().flatten() {
            if let Some(port) = port.as_object_mut() {
                port.remove("nodePort");
            }
        }
    }
    if let Some(map) = new.as_object_mut() {
        map.retain(|field, _| !gone.contains(&field.as_str()));
    }
}

/// The ports at the nodes that are said.
fn node_ports(spec: &Value) -> Vec<u64> {
    let ports = spec["ports"].as_array().into_iter().flatten();
    let numbers = ports.filter_map(|port| port["nodePort"].as_u64());
    numbers.filter(|number| *number != 0).collect()
}

/// A balancer's addresses go as soon as it is none any more, though it is taken down later.
pub(super) fn drop_status_of_balancer(object: &mut Value) {
    if kind(&object["spec"]) != "LoadBalancer" && !object["status"].is_null() {
        object["status"]["loadBalancer"] = serde_json::json!({});
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn a_balancer_that_becomes_internal_loses_its_ports_unless_they_were_changed() {
        let old = json!({"type": "LoadBalancer", "externalTrafficPolicy": "Local", "healthCheckNodePort": 31000,
            "allocateLoadBalancerNodePorts": true, "clusterIP": "10.96.0.9", "ports": [{"port": 80, "nodePort": 30080}]});
        let mut new = old.clone();
        new["type"] = "ClusterIP".into();
        drop_what_went_with_the_type(&old, &mut new);
        assert_eq!(
            new,
            json!({"type": "ClusterIP", "clusterIP": "10.96.0.9", "ports": [{"port": 80}]})
        );
        let mut new = old.clone();
        new["type"] = "ClusterIP".into();
        new["ports"][0]["nodePort"] = 30081.into();
        drop_what_went_with_the_type(&old, &mut new);
        assert_eq!(new["ports"][0]["nodePort"], 30081);
        let mut new = old.clone();
        new["allocateLoadBalancerNodePorts"] = false.into();
        drop_what_went_with_the_type(&old, &mut new);
        assert_eq!(new["ports"][0]["nodePort"], 30080, "what is there stays");
    }

    #[test]
    fn what_is_no_balancer_has_no_addresses_of_one() {
        let status = json!({"loadBalancer": {"ingress": [{"ip": "192.0.2.1"}]}, "conditions": []});
        let mut service = json!({"spec": {"type": "LoadBalancer"}, "status": status});
        drop_status_of_balancer(&mut service);
        assert_eq!(service["status"], status);
        service["spec"]["type"] = "NodePort".into();
        drop_status_of_balancer(&mut service);
        assert_eq!(
            service["status"],
            json!({"loadBalancer": {}, "conditions": []})
        );
    }
}
