//! Resources that share their storage under two versions: events and autoscalers.

use serde_json::{Map, Value, json};

use crate::Object;
use crate::shape;
use crate::table::{self, Resource};

/// The resource under whose version objects are stored.
pub fn storage(resource: &'static Resource) -> &'static Resource {
    let stored = match (resource.group, resource.version, resource.plural) {
        ("events.k8s.io", _, "events") => table::resource("", "v1", "events"),
        ("autoscaling", "v1", "horizontalpodautoscalers") => {
            table::resource("autoscaling", "v2", "horizontalpodautoscalers")
        }
        _ => None,
    };
    stored.unwrap_or(resource)
}

/// Fields of events: `events.k8s.io/v1` on the left, `v1` on the right.
const EVENT_FIELDS: &[(&str, &str)] = &[
    ("regarding", "involvedObject"),
    ("note", "message"),
    ("reportingController", "reportingComponent"),
    ("deprecatedSource", "source"),
    ("deprecatedFirstTimestamp", "firstTimestamp"),
    ("deprecatedLastTimestamp", "lastTimestamp"),
    ("deprecatedCount", "count"),
];

/// Brings an object from one version to another of the same storage; elsewhere it is left as it is.
pub fn convert(object: &mut Object, from: &Resource, to: &Resource) {
    if (from.group, from.version) == (to.group, to.version) {
        return;
    }
    if from.plural == "events" {
        let new_to_old = from.group == "events.k8s.io";
        if let Some(map) = object.as_object_mut() {
            for (new, old) in EVENT_FIELDS {
                let (source, target) = if new_to_old { (new, old) } else { (old, new) };
                if let Some(value) = map.remove(*source) {
                    map.insert((*target).to_owned(), value);
                }
            }
        }
    } else if from.plural == "horizontalpodautoscalers" {
        let to_v2 = from.version == "v1";
        convert_autoscaler(&mut object["spec"], to_v2);
        // The old version knows one metric, and says it elsewhere.
        if let Some(status) = object["status"].as_object_mut().filter(|_| !to_v2) {
            status.remove("currentMetrics");
        }
    }
    object["apiVersion"] = to.api_version().into();
    object["kind"] = to.kind.into();
    shape::complete(object, to.type_id);
}

/// `autoscaling/v1` knows a CPU target only; v2 has it as one of its metrics.
fn convert_autoscaler(spec: &mut Value, to_v2: bool) {
    let Some(map) = spec.as_object_mut() else {
        return;
    };
    if to_v2 {
        if let Some(target) = map.remove("targetCPUUtilizationPercentage") {
            let metric = json!({"type": "Resource", "resource": {
                "name": "cpu", "target": {"type": "Utilization", "averageUtilization": target}}});
            map.insert("metrics".into(), json!([metric]));
        }
        return;
    }
    let metrics = map.remove("metrics").unwrap_or_default();
    let cpu = metrics
        .as_array()
        .into_iter()
        .flatten()
        .find(|metric| metric["resource"]["name"] == "cpu");
    if let Some(target) = cpu
        .map(|metric| &metric["resource"]["target"]["averageUtilization"])
        .filter(|t| !t.is_null())
    {
        map.insert("targetCPUUtilizationPercentage".into(), target.clone());
    }
    map.remove("behavior");
}

/// `meta/v1` PartialObjectMetadata of an object.
pub fn partial_metadata(object: &Object) -> Object {
    let mut partial = Map::new();
    partial.insert("apiVersion".into(), "meta.k8s.io/v1".into());
    partial.insert("kind".into(), "PartialObjectMetadata".into());
    partial.insert("metadata".into(), object["metadata"].clone());
    Value::Object(partial)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn events_go_there_and_back() {
        let new = table::resource("events.k8s.io", "v1", "events").unwrap();
        let old = storage(new);
        let mut event = json!({"apiVersion": "events.k8s.io/v1", "kind": "Event", "note": "n", "regarding": {"name": "p"}, "reason": "r"});
        shape::complete(&mut event, new.type_id);
        let mut converted = event.clone();
        convert(&mut converted, new, old);
        assert_eq!(converted["apiVersion"], "v1");
        assert_eq!(converted["message"], "n");
        assert_eq!(converted["involvedObject"], json!({"name": "p"}));
        assert!(converted.get("note").is_none());
        convert(&mut converted, old, new);
        assert_eq!(converted, event);
    }
}
