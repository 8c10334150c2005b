//! Strategic merge patches: lists of structs are merged by a key of theirs, and directives say what goes.

use serde_json::{Map, Value};

use super::{PatchError, go_map};
use crate::Object;
use crate::table::{self, Field, Kind, TypeId};

/// Applies a strategic merge patch to an object of this type.
pub fn strategic_merge_patch(
    object: &Object,
    patch: &[u8],
    ty: TypeId,
) -> Result<Object, PatchError> {
    let patch = super::parse_map(patch)?;
    let mut result = object.clone();
    merge_map(&mut result, &patch, Some(ty))?;
    Ok(result)
}

/// What a directive key is about: `$setElementOrder/containers` is about `containers`.
fn directive<'a>(key: &'a str, name: &str) -> Option<&'a str> {
    key.strip_prefix(name)?.strip_prefix('/')
}

/// A value that the object did not have: taken as it is, but for nulls and what is marked to go.
fn taken(value: &Value) -> Option<Value> {
    match value {
        Value::Object(map) if map.contains_key("$patch") => None,
        Value::Object(map) => Some(
            map.iter()
                .filter(|(_, value)| !value.is_null())
                .filter_map(|(key, value)| Some((key.clone(), taken(value)?)))
                .collect::<Map<_, _>>()
                .into(),
        ),
        Value::Array(items) => Some(items.iter().filter_map(taken).collect()),
        other => Some(other.clone()),
    }
}

fn set(map: &mut Map<String, Value>, key: &str, value: &Value) {
    match taken(value) {
        Some(value) => map.insert(key.to_owned(), value),
        None => map.remove(key),
    };
}

/// Merges a patch into a struct, or into a map where there is no type.
fn merge_map(target: &mut Value, patch: &Value, ty: Option<TypeId>) -> Result<(), PatchError> {
    let Some(patch) = patch.as_object() else {
        *target = patch.clone();
        return Ok(());
    };
    match patch.get("$patch").and_then(Value::as_str) {
        Some("replace") => {
            let mut plain = patch.clone();
            plain.remove("$patch");
            *target = plain.into();
            return Ok(());
        }
        Some("delete") => {
            *target = Value::Object(Map::new());
            return Ok(());
        }
        Some("merge") | None => {}
        Some(other) => {
            let shown = go_map(&patch.clone().into());
            return Err(PatchError::Internal(format!(
                "Unknown patch type: '{other}' in map: '{shown}'"
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
    let field = |key: &str| ty.and_then(|ty| table::get(ty).field(key));
    let mut done = Vec::new();
    for (key, order) in patch {
        let Some(name) = directive(key, "$setElementOrder") else {
            continue;
        };
        let order = order
            .as_array()
            .ok_or_else(|| PatchError::Internal(format!("{key} of the patch is not a list")))?;
        in_order(map, patch, name, order, field(name))?;
        done.push(name);
    }
    for (key, value) in patch {
        if let Some(name) = directive(key, "$deleteFromPrimitiveList") {
            let list = map.get_mut(name).and_then(Value::as_array_mut);
            if let (Some(list), Some(gone)) = (list, value.as_array()) {
                list.retain(|item| !gone.contains(item));
            }
            continue;
        }
        if key.starts_with("$setElementOrder/")
            || matches!(key.as_str(), "$retainKeys" | "$patch")
            || done.contains(&key.as_str())
        {
            continue;
        }
        if value.is_null() {
            map.remove(key);
            continue;
        }
        match map.get_mut(key) {
            Some(target @ Value::Object(_)) if value.is_object() => {
                let inner = match field(key).map(|field| &field.kind) {
                    Some(Kind::Struct(ty)) => Some(*ty),
                    _ => None,
                };
                merge_map(target, value, inner)?;
            }
            Some(Value::Array(list)) if value.is_array() => {
                let items = value.as_array().map_or(&[][..], Vec::as_slice);
                merge_list(list, items, field(key))?;
            }
            _ => set(map, key, value),
        }
    }
    Ok(())
}

/// The merge key of a list of structs that is merged; none where its items are themselves the keys.
fn merged_by(field: &Field) -> Option<(&'static str, TypeId)> {
    match &field.kind {
        Kind::List(inner) => match (&**inner, field.merge_key) {
            (Kind::Struct(ty), Some(key)) => Some((key, *ty)),
            _ => None,
        },
        _ => None,
    }
}

fn id<'a>(item: &'a Value, key: Option<&str>) -> Result<&'a Value, PatchError> {
    match key {
        None => Ok(item),
        Some(key) => item.get(key).ok_or_else(|| {
            PatchError::Internal(format!(
                "map: {} does not contain declared merge key: {key}",
                go_map(item)
            ))
        }),
    }
}

/// A list with an order that the patch says, whether or not the patch changes its items.
fn in_order(
    map: &mut Map<String, Value>,
    patch: &Map<String, Value>,
    name: &str,
    order: &[Value],
    field: Option<&Field>,
) -> Result<(), PatchError> {
    let by = field.and_then(merged_by).map(|(key, _)| key);
    let items = patch.get(name).and_then(Value::as_array);
    if let Some(items) = items {
        let kept: Vec<&Value> = items
            .iter()
            .filter(|item| item.get("$patch").is_none())
            .collect();
        let mut ordered = order.iter();
        for item in &kept {
            let wanted = id(item, by)?;
            let found = ordered.any(|one| id(one, by).is_ok_and(|one| one == wanted));
            if !found {
                let shown = |items: &mut dyn Iterator<Item = &Value>| {
                    format!("[{}]", items.map(go_map).collect::<Vec<_>>().join(" "))
                };
                return Err(PatchError::Internal(format!(
                    "The order in patch list:\n{}\n doesn't match $setElementOrder list:\n{}\n",
                    shown(&mut kept.iter().copied()),
                    shown(&mut order.iter())
                )));
            }
        }
    }
    let before = map.get(name).and_then(Value::as_array).cloned();
    let mut merged = match (&before, items) {
        (Some(before), Some(items)) => {
            let mut list = before.clone();
            merge_list(&mut list, items, field)?;
            list
        }
        (None, Some(_)) => match patch.get(name).and_then(taken) {
            Some(Value::Array(list)) => list,
            _ => Vec::new(),
        },
        (Some(before), None) => before.clone(),
        (None, None) => return Ok(()),
    };
    arrange(&mut merged, order, &before.unwrap_or_default(), by)?;
    map.insert(name.to_owned(), merged.into());
    Ok(())
}

/// Merges the items of a patch into a list.
fn merge_list(
    list: &mut Vec<Value>,
    items: &[Value],
    field: Option<&Field>,
) -> Result<(), PatchError> {
    let Some(field) = field.filter(|field| field.merge) else {
        *list = items.to_vec();
        return Ok(());
    };
    let before = list.clone();
    let Some((key, ty)) = merged_by(field) else {
        for item in items {
            if !list.contains(item) {
                list.push(item.clone());
            }
        }
        return arrange(list, items, &before, None);
    };
    let mut plain = Vec::new();
    let mut replace = false;
    for item in items {
        match item.get("$patch").and_then(Value::as_str) {
            None => plain.push(item.clone()),
            Some("replace") => replace = true,
            Some("delete") => {
                let gone = id(item, Some(key))?;
                list.retain(|old| old.get(key) != Some(gone));
            }
            Some(other) => {
                let shown = go_map(item);
                return Err(PatchError::Internal(format!(
                    "Unknown patch type: '{other}' in map: '{shown}'"
                )));
            }
        }
    }
    if replace {
        *list = plain;
        return Ok(());
    }
    for item in &plain {
        let wanted = id(item, Some(key))?;
        match list.iter_mut().find(|old| old.get(key) == Some(wanted)) {
            Some(old) => merge_map(old, item, Some(ty))?,
            None => list.push(item.clone()),
        }
    }
    arrange(list, &plain, &before, Some(key))
}

/// Puts the items that `order` names into that order, and the others among them where `before` had them: each goes
/// before the first named one that it preceded, as far as that can be told.
fn arrange(
    list: &mut Vec<Value>,
    order: &[Value],
    before: &[Value],
    key: Option<&str>,
) -> Result<(), PatchError> {
    let place = |of: &[Value], item: &Value| -> Result<Option<usize>, PatchError> {
        let wanted = id(item, key)?;
        Ok(of
            .iter()
            .position(|one| id(one, key).is_ok_and(|one| one == wanted)))
    };
    let (mut named, mut others) = (Vec::new(), Vec::new());
    for item in list.drain(..) {
        let was = place(before, &item)?;
        match place(order, &item)? {
            Some(at) => named.push((at, was, item)),
            None => others.push((was, item)),
        }
    }
    named.sort_by_key(|(at, _, _)| *at);
    others.sort_by_key(|(was, _)| *was);
    let mut others = others.into_iter().peekable();
    for (_, was, item) in named {
        while let Some(other) =
            others.next_if(|(other, _)| matches!((other, was), (Some(a), Some(b)) if *a < b))
        {
            list.push(other.1);
        }
        list.push(item);
    }
    list.extend(others.map(|(_, item)| item));
    Ok(())
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
        let patch = json!([{"name": "b", "image": "2"}, {"name": "c", "image": "3"}]);
        // What is new comes after the named ones that it follows in the patch.
        assert_eq!(
            strategic(object.clone(), containers(patch)).unwrap(),
            containers(
                json!([{"name": "a", "image": "1"}, {"name": "b", "image": "2"}, {"name": "c", "image": "3"}])
            )
        );
        let only_new = containers(json!([{"name": "c", "image": "3"}]));
        let names = |object: &Value| -> Vec<Value> {
            let list = object["spec"]["template"]["spec"]["containers"].as_array();
            list.unwrap()
                .iter()
                .map(|one| one["name"].clone())
                .collect()
        };
        let patched = strategic(object.clone(), only_new).unwrap();
        assert_eq!(names(&patched), ["c", "a", "b"]);
        let delete = containers(json!([{"name": "a", "$patch": "delete"}]));
        assert_eq!(names(&strategic(object.clone(), delete).unwrap()), ["b"]);
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
    fn an_order_must_name_what_the_patch_has() {
        let object = containers(json!([{"name": "a"}]));
        let patch = json!({"spec": {"template": {"spec": {
            "$setElementOrder/containers": [{"name": "b"}], "containers": [{"name": "c", "image": "c:1"}]}}}});
        assert_eq!(
            strategic(object, patch).unwrap_err().to_string(),
            "The order in patch list:\n[map[image:c:1 name:c]]\n doesn't match $setElementOrder list:\n[map[name:b]]\n"
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
}
