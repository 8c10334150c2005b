//! The four kinds of patch: JSON (RFC 6902), merge (RFC 7396), strategic merge; apply has its own module.

use serde_json::{Map, Value};

use crate::Object;
use crate::table::{self, Field, Kind, TypeId};

/// Why a patch was not applied.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PatchError {
    /// The patch itself can't be read (400).
    #[error("{0}")]
    Malformed(String),
    /// It can be read, and does not fit the object (422).
    #[error("{0}")]
    Unprocessable(String),
    /// It asks for too much at once (413).
    #[error("{0}")]
    TooLarge(String),
    /// A list of structs lacks its merge key; the real server answers 500.
    #[error("{0}")]
    Internal(String),
}

/// Operations that one JSON patch may have.
const MOST_OPERATIONS: usize = 10_000;

/// Applies a JSON patch.
pub fn json_patch(object: &Object, patch: &[u8]) -> Result<Object, PatchError> {
    let operations: Value = parse(patch)?;
    let count = operations.as_array().map_or(0, Vec::len);
    if count > MOST_OPERATIONS {
        return Err(PatchError::TooLarge(format!(
            "Request entity too large: The allowed maximum operations in a JSON patch is {MOST_OPERATIONS}, got {count}"
        )));
    }
    let operations: json_patch::Patch = serde_json::from_value(operations)
        .map_err(|error| PatchError::Malformed(error.to_string()))?;
    let mut result = object.clone();
    json_patch::patch(&mut result, &operations).map_err(|_| {
        PatchError::Unprocessable(
            "the server rejected our request due to an error in our request".into(),
        )
    })?;
    Ok(result)
}

/// Applies a merge patch.
pub fn merge_patch(object: &Object, patch: &[u8]) -> Result<Object, PatchError> {
    let patch = parse_map(patch)?;
    let mut result = object.clone();
    json_patch::merge(&mut result, &patch);
    Ok(result)
}

/// Applies a strategic merge patch to an object of this type.
pub fn strategic_merge_patch(
    object: &Object,
    patch: &[u8],
    ty: TypeId,
) -> Result<Object, PatchError> {
    let patch = parse_map(patch)?;
    let mut result = object.clone();
    merge_struct(&mut result, &patch, ty)?;
    Ok(result)
}

fn parse(patch: &[u8]) -> Result<Value, PatchError> {
    crate::decode::parse(patch, crate::decode::Media::Json)
        .map(|(value, _)| value)
        .map_err(|error| PatchError::Malformed(error.0))
}

fn parse_map(patch: &[u8]) -> Result<Value, PatchError> {
    let patch = parse(patch)?;
    if patch.is_object() {
        return Ok(patch);
    }
    let found = match patch {
        Value::Array(_) => "array",
        Value::String(_) => "string",
        Value::Number(_) => "number",
        _ => "bool",
    };
    Err(PatchError::Malformed(format!(
        "json: cannot unmarshal {found} into Go value of type map[string]interface {{}}"
    )))
}

/// What a directive key is about: `$setElementOrder/containers` is about `containers`.
fn directive<'a>(key: &'a str, name: &str) -> Option<&'a str> {
    key.strip_prefix(name)?.strip_prefix('/')
}

fn merge_struct(target: &mut Value, patch: &Value, ty: TypeId) -> Result<(), PatchError> {
    let Some(patch) = patch.as_object() else {
        *target = patch.clone();
        return Ok(());
    };
    match patch.get("$patch").and_then(Value::as_str) {
        Some("replace") => {
            *target = Value::Object(
                patch
                    .iter()
                    .filter(|(key, _)| *key != "$patch")
                    .map(|(k, v)| (k.clone(), v.clone()))
                    .collect(),
            );
            return Ok(());
        }
        Some("delete") => {
            *target = Value::Object(Map::new());
            return Ok(());
        }
        Some("merge") | None => {}
        Some(other) => {
            return Err(PatchError::Internal(format!(
                "Unknown patch type found: {other}"
            )));
        }
    }
    if !target.is_object() {
        *target = Value::Object(Map::new());
    }
    let Some(map) = target.as_object_mut() else {
        return Ok(());
    };
    if let Some(keep) = patch.get("$retainKeys").and_then(Value::as_array) {
        map.retain(|key, _| keep.iter().any(|one| one == key));
    }
    let ty = table::get(ty);
    for (key, value) in patch {
        if let Some(name) = directive(key, "$deleteFromPrimitiveList") {
            if let (Some(list), Some(gone)) = (
                map.get_mut(name).and_then(Value::as_array_mut),
                value.as_array(),
            ) {
                list.retain(|item| !gone.contains(item));
            }
            continue;
        }
        if key.starts_with('$') {
            continue;
        }
        if value.is_null() {
            map.remove(key);
            continue;
        }
        let order = patch
            .get(&format!("$setElementOrder/{key}"))
            .and_then(Value::as_array);
        merge_field(
            map.entry(key.clone()).or_insert(Value::Null),
            value,
            ty.field(key),
            order,
        )?;
    }
    // An order may come for a list that the patch itself does not touch.
    for (key, value) in patch {
        if let (Some(name), Some(order)) = (directive(key, "$setElementOrder"), value.as_array())
            && !patch.contains_key(name)
            && let Some(list) = map.get_mut(name).and_then(Value::as_array_mut)
        {
            sort_by_order(
                list,
                order,
                ty.field(name).and_then(|field| field.merge_key),
            );
        }
    }
    Ok(())
}

fn merge_field(
    target: &mut Value,
    patch: &Value,
    field: Option<&Field>,
    order: Option<&Vec<Value>>,
) -> Result<(), PatchError> {
    let replace_all = target.is_null() && !patch.is_object() && !patch.is_array();
    let Some(field) = field.filter(|_| !replace_all) else {
        merge_any(target, patch);
        return Ok(());
    };
    match (&field.kind, patch) {
        (Kind::Struct(ty), Value::Object(_)) => merge_struct(target, patch, *ty),
        (Kind::List(inner), Value::Array(items)) if field.merge => {
            match (&**inner, field.merge_key) {
                (Kind::Struct(ty), Some(key)) => merge_list(target, items, *ty, key, order),
                _ => {
                    merge_scalars(target, items, order);
                    Ok(())
                }
            }
        }
        (Kind::List(_), Value::Array(items)) => {
            *target = Value::Array(
                items
                    .iter()
                    .filter(|item| item.get("$patch").is_none())
                    .cloned()
                    .collect(),
            );
            Ok(())
        }
        (Kind::Map(_) | Kind::Any, Value::Object(_)) => {
            merge_any(target, patch);
            Ok(())
        }
        _ => {
            *target = patch.clone();
            Ok(())
        }
    }
}

/// Maps and values without a type: a merge patch, with `$patch: replace`.
fn merge_any(target: &mut Value, patch: &Value) {
    let Some(map) = patch.as_object() else {
        *target = patch.clone();
        return;
    };
    let mut plain = map.clone();
    plain.retain(|key, _| !key.starts_with("$patch"));
    if map.get("$patch").is_some_and(|kind| kind == "replace") {
        *target = Value::Object(plain);
    } else {
        json_patch::merge(target, &Value::Object(plain));
    }
}

/// A list of scalars that are a set: new ones are added at the end.
fn merge_scalars(target: &mut Value, items: &[Value], order: Option<&Vec<Value>>) {
    if !target.is_array() {
        *target = Value::Array(Vec::new());
    }
    let Some(list) = target.as_array_mut() else {
        return;
    };
    for item in items {
        if !list.contains(item) {
            list.push(item.clone());
        }
    }
    if let Some(order) = order {
        sort_by_order(list, order, None);
    }
}

/// A list of structs told apart by `key`.
fn merge_list(
    target: &mut Value,
    items: &[Value],
    ty: TypeId,
    key: &str,
    order: Option<&Vec<Value>>,
) -> Result<(), PatchError> {
    if !target.is_array() {
        *target = Value::Array(Vec::new());
    }
    let Some(list) = target.as_array_mut() else {
        return Ok(());
    };
    if items.iter().any(|item| item["$patch"] == "replace") {
        list.clear();
    }
    for item in items {
        if item["$patch"] == "replace" && item.as_object().is_some_and(|map| map.len() == 1) {
            continue;
        }
        let Some(value) = item.get(key) else {
            return Err(PatchError::Internal(format!(
                "map: {} does not contain declared merge key: {key}",
                go_map(item)
            )));
        };
        let found = list.iter().position(|old| old.get(key) == Some(value));
        if item["$patch"] == "delete" {
            list.retain(|old| old.get(key) != Some(value));
            continue;
        }
        match found {
            Some(at) => merge_struct(&mut list[at], item, ty)?,
            None => {
                let mut new = Value::Object(Map::new());
                merge_struct(&mut new, item, ty)?;
                list.push(new);
            }
        }
    }
    if let Some(order) = order {
        sort_by_order(list, order, Some(key));
    }
    Ok(())
}

/// Brings the items that `order` names into that order; the others keep their place relative to those around them.
fn sort_by_order(list: &mut Vec<Value>, order: &[Value], key: Option<&str>) {
    let id = |item: &Value| key.map_or_else(|| item.clone(), |key| item[key].clone());
    let rank = |item: &Value| order.iter().position(|one| id(one) == id(item));
    let mut named: Vec<(usize, Value)> = Vec::new();
    let mut others: Vec<(usize, Value)> = Vec::new();
    for (at, item) in list.drain(..).enumerate() {
        match rank(&item) {
            Some(rank) => named.push((rank, item)),
            None => others.push((at, item)),
        }
    }
    named.sort_by_key(|(rank, _)| *rank);
    list.extend(named.into_iter().map(|(_, item)| item));
    for (at, item) in others {
        let at = at.min(list.len());
        list.insert(at, item);
    }
}

/// A map as Go prints it.
fn go_map(value: &Value) -> String {
    match value {
        Value::Object(map) => {
            let parts: Vec<String> = map
                .iter()
                .map(|(key, value)| format!("{key}:{}", go_map(value)))
                .collect();
            format!("map[{}]", parts.join(" "))
        }
        Value::Array(items) => format!(
            "[{}]",
            items.iter().map(go_map).collect::<Vec<_>>().join(" ")
        ),
        Value::String(text) => text.clone(),
        Value::Null => "<nil>".into(),
        other => other.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn strategic(object: Value, patch: Value) -> Result<Value, PatchError> {
        let ty = table::type_by_name("io.k8s.api.apps.v1.Deployment").unwrap();
        strategic_merge_patch(&object, patch.to_string().as_bytes(), ty)
    }

    fn containers(list: Value) -> Value {
        json!({"spec": {"template": {"spec": {"containers": list}}}})
    }

    #[test]
    fn lists_merge_by_key_with_order_and_deletion() {
        let object = containers(json!([{"name": "a", "image": "1"}, {"name": "b", "image": "1"}]));
        let patched = strategic(
            object.clone(),
            containers(json!([{"name": "b", "image": "2"}, {"name": "c", "image": "3"}])),
        );
        assert_eq!(
            patched.unwrap(),
            containers(
                json!([{"name": "a", "image": "1"}, {"name": "b", "image": "2"}, {"name": "c", "image": "3"}])
            )
        );
        let patched = strategic(
            object.clone(),
            containers(json!([{"name": "a", "$patch": "delete"}])),
        );
        assert_eq!(
            patched.unwrap(),
            containers(json!([{"name": "b", "image": "1"}]))
        );
        let patch = json!({"spec": {"template": {"spec": {
            "$setElementOrder/containers": [{"name": "b"}, {"name": "a"}], "containers": [{"name": "a", "image": "9"}]}}}});
        assert_eq!(
            strategic(object.clone(), patch).unwrap(),
            containers(json!([{"name": "b", "image": "1"}, {"name": "a", "image": "9"}]))
        );
        let error = strategic(object, containers(json!([{"image": "x"}]))).unwrap_err();
        assert_eq!(
            error.to_string(),
            "map: map[image:x] does not contain declared merge key: name"
        );
    }

    #[test]
    fn null_removes_and_replace_replaces() {
        let object = json!({"metadata": {"labels": {"a": "1", "b": "2"}}, "spec": {"replicas": 3, "paused": true}});
        let patch =
            json!({"metadata": {"labels": {"a": null, "c": "3"}}, "spec": {"paused": null}});
        assert_eq!(
            strategic(object.clone(), patch).unwrap(),
            json!({"metadata": {"labels": {"b": "2", "c": "3"}}, "spec": {"replicas": 3}})
        );
        let patch = json!({"metadata": {"labels": {"$patch": "replace", "z": "1"}}});
        assert_eq!(
            strategic(object, patch).unwrap()["metadata"]["labels"],
            json!({"z": "1"})
        );
    }

    #[test]
    fn strategy_retains_keys() {
        let object = json!({"spec": {"strategy": {"type": "RollingUpdate", "rollingUpdate": {"maxSurge": 1}}}});
        let patch = json!({"spec": {"strategy": {"$retainKeys": ["type"], "type": "Recreate"}}});
        assert_eq!(
            strategic(object, patch).unwrap(),
            json!({"spec": {"strategy": {"type": "Recreate"}}})
        );
    }

    #[test]
    fn json_and_merge_patches() {
        let object = json!({"a": [1, 2], "b": {"c": 1}});
        assert_eq!(
            json_patch(&object, br#"[{"op":"add","path":"/a/1","value":9}]"#).unwrap(),
            json!({"a": [1, 9, 2], "b": {"c": 1}})
        );
        assert!(matches!(
            json_patch(&object, br#"[{"op":"test","path":"/b/c","value":2}]"#),
            Err(PatchError::Unprocessable(_))
        ));
        assert!(matches!(
            json_patch(&object, b"{}"),
            Err(PatchError::Malformed(_))
        ));
        assert_eq!(
            merge_patch(&object, br#"{"b":{"c":null},"a":[3]}"#).unwrap(),
            json!({"a": [3], "b": {}})
        );
        assert!(matches!(
            merge_patch(&object, b"[]"),
            Err(PatchError::Malformed(_))
        ));
    }
}
