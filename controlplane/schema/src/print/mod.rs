//! Server-side tables: the columns and cells that `kubectl get` shows.

mod columns;
mod others;

use serde_json::{Value, json};

use crate::defaults::TEMPLATE_GENERATION;
use crate::table::Resource;
use crate::{Object, convert};

/// `meta.k8s.io/v1` TableColumnDefinitions.
pub fn columns(resource: &Resource) -> Vec<Value> {
    columns::of(resource)
}

/// The row of one object, beside whose cells stands its metadata. `now`: seconds since the epoch, for ages.
pub fn row(resource: &Resource, object: &Object, now: i64) -> Value {
    let mut metadata = convert::partial_metadata(object);
    if let Some(annotations) = metadata["metadata"]
        .get_mut("annotations")
        .and_then(Value::as_object_mut)
    {
        // An annotation that stands for a field of an older version; tables are made before it is added.
        annotations.remove(TEMPLATE_GENERATION);
        if annotations.is_empty() {
            if let Some(metadata) = metadata["metadata"].as_object_mut() {
                metadata.remove("annotations");
            }
        }
    }
    let mut row = json!({"cells": cells(resource, object, now), "object": metadata});
    let end = match object["status"]["phase"].as_str() {
        Some("Succeeded") => ("Succeeded", "The pod has completed successfully."),
        Some("Failed") => ("Failed", "The pod failed."),
        _ => return row,
    };
    if resource.group.is_empty() && resource.kind == "Pod" {
        let (reason, message) = end;
        row["conditions"] =
            json!([{"type": "Completed", "status": "True", "reason": reason, "message": message}]);
    }
    row
}

/// The cells of one object, in the columns' order. `now`: seconds since the epoch, for ages.
pub fn cells(resource: &Resource, object: &Object, now: i64) -> Vec<Value> {
    let name = object["metadata"]["name"].clone();
    let age: Value = age(&object["metadata"]["creationTimestamp"], now).into();
    let spec = &object["spec"];
    let status = &object["status"];
    let number = |value: &Value| value.as_i64().unwrap_or(0);
    let template = &spec["template"]["spec"];
    match (resource.group, resource.kind) {
        ("", "Pod") => pod(object, age, now),
        ("", "Node") => node(object, age),
        ("", "Service") => service(object, age),
        ("", "Namespace") => vec![name, text(&status["phase"]), age],
        ("", "Secret") => vec![
            name,
            text(&object["type"]),
            count(&object["data"]).into(),
            age,
        ],
        ("", "ConfigMap") => vec![
            name,
            (count(&object["data"]) + count(&object["binaryData"])).into(),
            age,
        ],
        ("", "ServiceAccount") => vec![
            name,
            object["secrets"].as_array().map_or(0, Vec::len).into(),
            age,
        ],
        ("", "Endpoints") => vec![name, endpoints(object).into(), age],
        ("", "Event") | ("events.k8s.io", "Event") => event(object, now),
        ("", "ReplicationController") | ("apps", "ReplicaSet") => vec![
            name,
            number(&spec["replicas"]).into(),
            number(&status["replicas"]).into(),
            number(&status["readyReplicas"]).into(),
            age,
            containers(template, "name"),
            containers(template, "image"),
            selector_or_map(&spec["selector"]),
        ],
        ("apps", "Deployment") => vec![
            name,
            format!(
                "{}/{}",
                number(&status["readyReplicas"]),
                number(&spec["replicas"])
            )
            .into(),
            number(&status["updatedReplicas"]).into(),
            number(&status["availableReplicas"]).into(),
            age,
            containers(template, "name"),
            containers(template, "image"),
            selector(&spec["selector"]).into(),
        ],
        ("apps", "StatefulSet") => vec![
            name,
            format!(
                "{}/{}",
                number(&status["readyReplicas"]),
                number(&spec["replicas"])
            )
            .into(),
            age,
            containers(template, "name"),
            containers(template, "image"),
        ],
        ("apps", "DaemonSet") => vec![
            name,
            number(&status["desiredNumberScheduled"]).into(),
            number(&status["currentNumberScheduled"]).into(),
            number(&status["numberReady"]).into(),
            number(&status["updatedNumberScheduled"]).into(),
            number(&status["numberAvailable"]).into(),
            labels(&template["nodeSelector"]).into(),
            age,
            containers(template, "name"),
            containers(template, "image"),
            selector(&spec["selector"]).into(),
        ],
        ("discovery.k8s.io", "EndpointSlice") => {
            let ports = object["ports"]
                .as_array()
                .into_iter()
                .flatten()
                .map(|port| port["port"].to_string());
            let addresses: Vec<String> = object["endpoints"]
                .as_array()
                .into_iter()
                .flatten()
                .flat_map(|e| e["addresses"].as_array().into_iter().flatten())
                .filter_map(|a| a.as_str().map(str::to_owned))
                .collect();
            vec![
                name,
                object["addressType"].clone(),
                more(ports.collect(), "<unset>").into(),
                more(addresses, "<unset>").into(),
                age,
            ]
        }
        ("networking.k8s.io", "NetworkPolicy") => {
            vec![name, selector(&spec["podSelector"]).into(), age]
        }
        ("coordination.k8s.io", "Lease") => vec![name, text(&spec["holderIdentity"]), age],
        ("scheduling.k8s.io", "PriorityClass") => {
            vec![
                name,
                number(&object["value"]).into(),
                (object["globalDefault"] == true).into(),
                age,
                text(&object["preemptionPolicy"]),
            ]
        }
        _ => others::cells(resource, object, age, now),
    }
}

fn text(value: &Value) -> Value {
    value.as_str().unwrap_or_default().into()
}

fn count(value: &Value) -> usize {
    value.as_object().map_or(0, serde_json::Map::len)
}

fn join_or(parts: Vec<String>, none: &str) -> String {
    if parts.is_empty() {
        none.to_owned()
    } else {
        parts.join(",")
    }
}

/// At most three, and how many there are beyond.
fn more(parts: Vec<String>, none: &str) -> String {
    if parts.len() <= 3 {
        return join_or(parts, none);
    }
    format!("{} + {} more...", parts[..3].join(","), parts.len() - 3)
}

fn containers(spec: &Value, field: &str) -> Value {
    let all = spec["containers"]
        .as_array()
        .into_iter()
        .flatten()
        .map(|c| c[field].as_str().unwrap_or_default().to_owned());
    all.collect::<Vec<_>>().join(",").into()
}

/// A label map as `a=b,c=d`.
fn labels(map: &Value) -> String {
    let parts = map
        .as_object()
        .into_iter()
        .flatten()
        .map(|(key, value)| format!("{key}={}", value.as_str().unwrap_or_default()));
    join_or(parts.collect(), "<none>")
}

fn selector_or_map(value: &Value) -> Value {
    if value.get("matchLabels").is_some() || value.get("matchExpressions").is_some() {
        selector(value).into()
    } else {
        labels(value).into()
    }
}

/// A LabelSelector in its string form.
fn selector(selector: &Value) -> String {
    let mut parts: Vec<String> = selector["matchLabels"]
        .as_object()
        .into_iter()
        .flatten()
        .map(|(key, value)| format!("{key}={}", value.as_str().unwrap_or_default()))
        .collect();
    for expression in selector["matchExpressions"]
        .as_array()
        .into_iter()
        .flatten()
    {
        let key = expression["key"].as_str().unwrap_or_default();
        let mut values: Vec<&str> = expression["values"]
            .as_array()
            .into_iter()
            .flatten()
            .filter_map(Value::as_str)
            .collect();
        values.sort_unstable();
        parts.push(match expression["operator"].as_str().unwrap_or_default() {
            "In" => format!("{key} in ({})", values.join(",")),
            "NotIn" => format!("{key} notin ({})", values.join(",")),
            "DoesNotExist" => format!("!{key}"),
            _ => key.to_owned(),
        });
    }
    parts.sort();
    join_or(parts, "<none>")
}

/// Seconds since the epoch of an RFC 3339 time in UTC.
pub fn unix_seconds(time: &str) -> Option<i64> {
    let number = |range: std::ops::Range<usize>| time.get(range)?.parse::<i64>().ok();
    let (year, month, day) = (number(0..4)?, number(5..7)?, number(8..10)?);
    let (hour, minute, second) = (number(11..13)?, number(14..16)?, number(17..19)?);
    // Days since the epoch of a civil date (proleptic Gregorian), counting years from March.
    let (y, m) = if month > 2 {
        (year, month - 3)
    } else {
        (year - 1, month + 9)
    };
    let days =
        365 * y + y.div_euclid(4) - y.div_euclid(100) + y.div_euclid(400) + (153 * m + 2) / 5 + day
            - 1
            - 719_468;
    Some(((days * 24 + hour) * 60 + minute) * 60 + second)
}

fn age(created: &Value, now: i64) -> String {
    created
        .as_str()
        .and_then(unix_seconds)
        .map_or_else(|| "<unknown>".into(), |then| human(now - then))
}

/// A span as kubectl shows it (`duration.HumanDuration`).
pub fn human(seconds: i64) -> String {
    let (minutes, hours, days) = (seconds / 60, seconds / 3600, seconds / 86_400);
    let pair = |big: i64, unit: &str, small: i64, small_unit: &str| {
        if small == 0 {
            format!("{big}{unit}")
        } else {
            format!("{big}{unit}{small}{small_unit}")
        }
    };
    match seconds {
        i64::MIN..=-2 => "<invalid>".into(),
        -1..=0 => "0s".into(),
        1..120 => format!("{seconds}s"),
        120..600 => pair(minutes, "m", seconds % 60, "s"),
        600..10_800 => format!("{minutes}m"),
        10_800..28_800 => pair(hours, "h", minutes % 60, "m"),
        28_800..172_800 => format!("{hours}h"),
        172_800..691_200 => pair(days, "d", hours % 24, "h"),
        691_200..63_072_000 => format!("{days}d"),
        63_072_000..252_288_000 => pair(days / 365, "y", days % 365, "d"),
        _ => format!("{}y", days / 365),
    }
}

fn pod(pod: &Object, age: Value, now: i64) -> Vec<Value> {
    let (spec, status) = (&pod["spec"], &pod["status"]);
    let list = |key: &str| {
        status[key]
            .as_array()
            .map(Vec::as_slice)
            .unwrap_or_default()
    };
    let sidecar = |name: &Value| {
        spec["initContainers"]
            .as_array()
            .into_iter()
            .flatten()
            .any(|c| c["name"] == *name && c["restartPolicy"] == "Always")
    };
    let mut total = spec["containers"].as_array().map_or(0, Vec::len);
    total += spec["initContainers"]
        .as_array()
        .into_iter()
        .flatten()
        .filter(|c| c["restartPolicy"] == "Always")
        .count();
    let (mut ready, mut restarts, mut last_restart) = (0, 0, None::<i64>);
    let mut reason = status["reason"]
        .as_str()
        .filter(|r| !r.is_empty())
        .or(status["phase"].as_str())
        .unwrap_or_default()
        .to_owned();
    if pod["status"]["conditions"]
        .as_array()
        .into_iter()
        .flatten()
        .any(|c| c["type"] == "PodScheduled" && c["reason"] == "SchedulingGated")
    {
        reason = "SchedulingGated".into();
    }
    let finished_at = |one: &Value| {
        one["lastState"]["terminated"]["finishedAt"]
            .as_str()
            .and_then(unix_seconds)
    };
    let exit = |terminated: &Value| {
        if let Some(reason) = terminated["reason"].as_str().filter(|r| !r.is_empty()) {
            return reason.to_owned();
        }
        match terminated["signal"].as_i64().unwrap_or(0) {
            0 => format!("ExitCode:{}", terminated["exitCode"].as_i64().unwrap_or(0)),
            signal => format!("Signal:{signal}"),
        }
    };
    let init_total = spec["initContainers"].as_array().map_or(0, Vec::len);
    let mut initializing = false;
    let mut init_restarts = 0;
    for (index, one) in list("initContainerStatuses").iter().enumerate() {
        init_restarts += one["restartCount"].as_i64().unwrap_or(0);
        last_restart = last_restart.max(finished_at(one));
        let state = &one["state"];
        if state["terminated"].is_object() && state["terminated"]["exitCode"] == 0 {
            continue;
        }
        if sidecar(&one["name"]) && one["started"] == true {
            ready += i64::from(one["ready"] == true);
            restarts += one["restartCount"].as_i64().unwrap_or(0);
            continue;
        }
        reason = if state["terminated"].is_object() {
            format!("Init:{}", exit(&state["terminated"]))
        } else {
            match state["waiting"]["reason"].as_str() {
                Some(why) if !why.is_empty() && why != "PodInitializing" => format!("Init:{why}"),
                _ => format!("Init:{index}/{init_total}"),
            }
        };
        initializing = true;
        break;
    }
    if initializing {
        restarts = init_restarts;
    } else {
        let mut running = false;
        for one in list("containerStatuses").iter().rev() {
            restarts += one["restartCount"].as_i64().unwrap_or(0);
            last_restart = last_restart.max(finished_at(one));
            let state = &one["state"];
            if let Some(why) = state["waiting"]["reason"]
                .as_str()
                .filter(|why| !why.is_empty())
            {
                reason = why.to_owned();
            } else if state["terminated"].is_object() {
                reason = exit(&state["terminated"]);
            } else if one["ready"] == true && state["running"].is_object() {
                running = true;
                ready += 1;
            }
        }
        if reason == "Completed" && running {
            let is_ready = list("conditions")
                .iter()
                .any(|c| c["type"] == "Ready" && c["status"] == "True");
            reason = if is_ready { "Running" } else { "NotReady" }.into();
        }
    }
    if !pod["metadata"]["deletionTimestamp"].is_null() {
        reason = match status["reason"].as_str() {
            Some("NodeLost") => "Unknown".into(),
            _ if !matches!(status["phase"].as_str(), Some("Succeeded" | "Failed")) => {
                "Terminating".into()
            }
            _ => reason,
        };
    }
    let restarts: Value = match last_restart.filter(|_| restarts != 0) {
        Some(then) => format!("{restarts} ({} ago)", human(now - then)).into(),
        None => restarts.to_string().into(),
    };
    let or_none = |value: &Value| {
        value
            .as_str()
            .filter(|text| !text.is_empty())
            .unwrap_or("<none>")
            .to_owned()
    };
    let gates = spec["readinessGates"]
        .as_array()
        .map(Vec::as_slice)
        .unwrap_or_default();
    let passed = gates
        .iter()
        .filter(|gate| {
            list("conditions")
                .iter()
                .any(|c| c["type"] == gate["conditionType"] && c["status"] == "True")
        })
        .count();
    let gates = if gates.is_empty() {
        "<none>".to_owned()
    } else {
        format!("{passed}/{}", gates.len())
    };
    vec![
        pod["metadata"]["name"].clone(),
        format!("{ready}/{total}").into(),
        reason.into(),
        restarts,
        age,
        or_none(&status["podIP"]).into(),
        or_none(&spec["nodeName"]).into(),
        or_none(&status["nominatedNodeName"]).into(),
        gates.into(),
    ]
}

fn node(node: &Object, age: Value) -> Vec<Value> {
    let status = &node["status"];
    let ready = status["conditions"]
        .as_array()
        .into_iter()
        .flatten()
        .find(|c| c["type"] == "Ready");
    let mut state = match ready.map(|c| c["status"].as_str().unwrap_or_default()) {
        Some("True") => "Ready",
        Some(_) => "NotReady",
        None => "Unknown",
    }
    .to_owned();
    if node["spec"]["unschedulable"] == true {
        state.push_str(",SchedulingDisabled");
    }
    let mut roles: Vec<String> = Vec::new();
    for (key, value) in node["metadata"]["labels"].as_object().into_iter().flatten() {
        if let Some(role) = key
            .strip_prefix("node-role.kubernetes.io/")
            .filter(|role| !role.is_empty())
        {
            roles.push(role.to_owned());
        } else if key == "kubernetes.io/role" {
            roles.extend(value.as_str().map(str::to_owned));
        }
    }
    roles.sort();
    let address = |kind: &str| {
        let all = status["addresses"].as_array().into_iter().flatten();
        all.filter(|a| a["type"] == kind)
            .find_map(|a| a["address"].as_str())
            .unwrap_or("<none>")
            .to_owned()
    };
    let info = |key: &str| {
        status["nodeInfo"][key]
            .as_str()
            .filter(|text| !text.is_empty())
            .unwrap_or("<unknown>")
            .to_owned()
    };
    let kernel = match status["nodeInfo"]["architecture"].as_str() {
        Some(machine) if !machine.is_empty() => format!("{} ({machine})", info("kernelVersion")),
        _ => info("kernelVersion"),
    };
    vec![
        node["metadata"]["name"].clone(),
        state.into(),
        join_or(roles, "<none>").into(),
        age,
        text(&status["nodeInfo"]["kubeletVersion"]),
        address("InternalIP").into(),
        address("ExternalIP").into(),
        info("osImage").into(),
        kernel.into(),
        info("containerRuntimeVersion").into(),
    ]
}

fn service(service: &Object, age: Value) -> Vec<Value> {
    let spec = &service["spec"];
    let kind = spec["type"].as_str().unwrap_or_default();
    let cluster_ip = spec["clusterIP"]
        .as_str()
        .filter(|ip| !ip.is_empty())
        .unwrap_or("<none>");
    let mut external: Vec<String> = spec["externalIPs"]
        .as_array()
        .into_iter()
        .flatten()
        .filter_map(|ip| ip.as_str().map(str::to_owned))
        .collect();
    let external = match kind {
        "ExternalName" => text(&spec["externalName"])
            .as_str()
            .unwrap_or_default()
            .to_owned(),
        "LoadBalancer" => {
            let ingress = service["status"]["loadBalancer"]["ingress"]
                .as_array()
                .into_iter()
                .flatten();
            external.splice(
                0..0,
                ingress.filter_map(|one| {
                    one["ip"]
                        .as_str()
                        .or(one["hostname"].as_str())
                        .map(str::to_owned)
                }),
            );
            join_or(external, "<pending>")
        }
        _ => join_or(external, "<none>"),
    };
    let ports = spec["ports"].as_array().into_iter().flatten().map(|port| {
        let protocol = port["protocol"].as_str().unwrap_or_default();
        match port["nodePort"].as_i64().unwrap_or(0) {
            0 => format!("{}/{protocol}", port["port"]),
            node => format!("{}:{node}/{protocol}", port["port"]),
        }
    });
    vec![
        service["metadata"]["name"].clone(),
        kind.into(),
        cluster_ip.into(),
        external.into(),
        join_or(ports.collect(), "<none>").into(),
        age,
        labels(&spec["selector"]).into(),
    ]
}

fn endpoints(object: &Object) -> String {
    let mut all = Vec::new();
    for subset in object["subsets"].as_array().into_iter().flatten() {
        for address in subset["addresses"].as_array().into_iter().flatten() {
            for port in subset["ports"].as_array().into_iter().flatten() {
                all.push(format!(
                    "{}:{}",
                    address["ip"].as_str().unwrap_or_default(),
                    port["port"]
                ));
            }
        }
    }
    more(all, "<none>")
}

fn event(event: &Object, now: i64) -> Vec<Value> {
    let pick = |keys: &[&str]| {
        keys.iter()
            .map(|key| &event[*key])
            .find(|value| !value.is_null())
            .cloned()
            .unwrap_or_default()
    };
    let regarding = pick(&["involvedObject", "regarding"]);
    let kind = regarding["kind"]
        .as_str()
        .unwrap_or_default()
        .to_lowercase();
    let first = pick(&["firstTimestamp", "deprecatedFirstTimestamp", "eventTime"]);
    let last = match &event["series"]["lastObservedTime"] {
        Value::Null => pick(&["lastTimestamp", "deprecatedLastTimestamp", "eventTime"]),
        time => time.clone(),
    };
    let count = event["series"]["count"]
        .as_i64()
        .or(event["count"].as_i64())
        .filter(|count| *count > 0)
        .unwrap_or(1);
    let source = pick(&["source", "deprecatedSource"]);
    let component = source["component"]
        .as_str()
        .filter(|c| !c.is_empty())
        .or(pick(&["reportingComponent", "reportingController"]).as_str())
        .unwrap_or_default()
        .to_owned();
    let component = match source["host"].as_str().filter(|host| !host.is_empty()) {
        Some(host) => format!("{component}, {host}"),
        None => match event["reportingInstance"].as_str() {
            Some(instance) if !instance.is_empty() => format!("{component}, {instance}"),
            _ => component,
        },
    };
    vec![
        age(&last, now).into(),
        text(&event["type"]),
        text(&event["reason"]),
        format!("{kind}/{}", regarding["name"].as_str().unwrap_or_default()).into(),
        text(&regarding["fieldPath"]),
        component.into(),
        pick(&["message", "note"])
            .as_str()
            .unwrap_or_default()
            .trim()
            .into(),
        age(&first, now).into(),
        count.into(),
        event["metadata"]["name"].clone(),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::table;

    #[test]
    fn every_resource_has_as_many_cells_as_columns() {
        for resource in table::resources() {
            assert_eq!(
                columns(resource).len(),
                cells(resource, &json!({"metadata": {"name": "x"}}), 0).len(),
                "{}",
                resource.plural
            );
        }
    }

    #[test]
    fn times_and_spans() {
        assert_eq!(unix_seconds("1970-01-01T00:00:00Z"), Some(0));
        assert_eq!(unix_seconds("2026-11-21T04:01:19Z"), Some(1_795_233_679));
        for (seconds, shown) in [
            (0, "0s"),
            (119, "119s"),
            (125, "2m5s"),
            (600, "10m"),
            (10_860, "3h1m"),
            (90_000, "25h"),
            (200_000, "2d7h"),
            (63_072_000, "2y"),
        ] {
            assert_eq!(human(seconds), shown);
        }
    }
}
