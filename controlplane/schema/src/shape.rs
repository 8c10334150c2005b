//! The shape that Go's types give an object: fields that are always written, and empty ones that never are.

use serde_json::{Map, Value};

use crate::Object;
use crate::table::{self, Kind, TypeId, Zero};

/// What stands for a field that was not set; none where nothing does.
fn unset(zero: Zero, kind: &Kind) -> Option<Value> {
    Some(match zero {
        Zero::AsGiven | Zero::Nothing => return None,
        Zero::Null => Value::Null,
        Zero::Text => "".into(),
        Zero::False => false.into(),
        Zero::Number => 0.into(),
        Zero::Quantity => "0".into(),
        Zero::Struct => match kind {
            Kind::Struct(ty) => empty(*ty),
            _ => return None,
        },
    })
}

/// An object of this type before any field is set.
pub fn empty(ty: TypeId) -> Object {
    let mut value = Value::Object(Map::new());
    complete(&mut value, ty);
    value
}

fn is_empty(value: &Value) -> bool {
    match value {
        Value::Null => true,
        Value::Bool(truth) => !truth,
        Value::Number(number) => number.as_f64() == Some(0.0),
        Value::String(text) => text.is_empty(),
        Value::Array(items) => items.is_empty(),
        Value::Object(map) => map.is_empty(),
    }
}

/// Gives a decoded object the shape in which it is answered. Doing it again changes nothing.
pub fn complete(value: &mut Value, ty: TypeId) {
    walk(value, ty, false);
}

/// The shape in which an object is stored, and read from then on: a list that is always written is null when empty.
pub fn store(value: &mut Value, ty: TypeId) {
    walk(value, ty, true);
}

fn walk(value: &mut Value, ty: TypeId, stored: bool) {
    let Some(map) = value.as_object_mut() else {
        return;
    };
    for field in &table::get(ty).fields {
        match map.get_mut(field.name) {
            Some(value) if field.zero == Zero::Nothing && is_empty(value) => {
                map.remove(field.name);
            }
            Some(Value::Array(items)) if stored && items.is_empty() && field.zero == Zero::Null => {
                map.insert(field.name.to_owned(), Value::Null);
            }
            Some(Value::Null) | None => match unset(field.zero, &field.kind) {
                Some(value) => drop(map.insert(field.name.to_owned(), value)),
                None => drop(map.remove(field.name)),
            },
            Some(value) => within(value, &field.kind, stored),
        }
    }
}

fn within(value: &mut Value, kind: &Kind, stored: bool) {
    match kind {
        Kind::Struct(ty) => walk(value, *ty, stored),
        Kind::List(inner) => value
            .as_array_mut()
            .into_iter()
            .flatten()
            .for_each(|item| within(item, inner, stored)),
        Kind::Map(inner) => value
            .as_object_mut()
            .into_iter()
            .flatten()
            .for_each(|(_, item)| within(item, inner, stored)),
        _ => {}
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn shaped(kind: &str, mut value: Value) -> Value {
        let ty = table::type_by_name(&format!("io.k8s.api.{kind}")).unwrap();
        complete(&mut value, ty);
        let once = value.clone();
        complete(&mut value, ty);
        assert_eq!(once, value);
        value
    }

    #[test]
    fn some_fields_are_always_written_and_some_never_empty() {
        assert_eq!(
            shaped(
                "core.v1.NodeStatus",
                json!({"conditions": [{"type": "Ready"}], "addresses": []})
            )["conditions"],
            json!([{"type": "Ready", "status": "", "lastHeartbeatTime": null, "lastTransitionTime": null}])
        );
        let pod = shaped(
            "core.v1.Pod",
            json!({"metadata": {"labels": {}}, "spec": {"hostNetwork": false, "automountServiceAccountToken": false, "tolerations": []}}),
        );
        assert_eq!(
            pod,
            json!({"metadata": {}, "spec": {"containers": null, "automountServiceAccountToken": false}, "status": {}})
        );
    }
}
