//! The kinds of patch: JSON (RFC 6902), merge (RFC 7396), strategic merge; apply has its own module.

mod json;
mod strategic;

pub use json::json_patch;
pub use strategic::strategic_merge_patch;

use serde_json::Value;

use crate::Object;
use crate::table::{self, Kind, TypeId};

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

/// Applies a merge patch.
pub fn merge_patch(object: &Object, patch: &[u8]) -> Result<Object, PatchError> {
    let patch = parse_map(patch)?;
    let mut result = object.clone();
    json_patch::merge(&mut result, &patch);
    Ok(result)
}

/// Why a strategically merged object does not fit its type, in the words of the conversion that finds it.
pub fn misfit(value: &Value, ty: TypeId) -> Option<String> {
    let map = value.as_object()?;
    map.iter().find_map(|(key, value)| {
        let field = table::get(ty).field(key)?;
        misfit_kind(value, &field.kind)
    })
}

fn misfit_kind(value: &Value, kind: &Kind) -> Option<String> {
    let go = match value {
        Value::Null => return None,
        Value::Bool(_) => "bool",
        Value::Number(number) if number.is_f64() => "float64",
        Value::Number(_) => "int64",
        Value::String(_) => "string",
        Value::Array(_) => "slice",
        Value::Object(_) => "map",
    };
    match (kind, value) {
        (Kind::List(inner), Value::Array(items)) => {
            items.iter().find_map(|item| misfit_kind(item, inner))
        }
        (Kind::List(_), _) => Some(format!("cannot restore slice from {go}")),
        (Kind::Map(inner), Value::Object(map)) => {
            map.values().find_map(|item| misfit_kind(item, inner))
        }
        (Kind::Map(_), _) => Some(format!("cannot restore map from {go}")),
        (Kind::Struct(ty), Value::Object(_)) => misfit(value, *ty),
        (Kind::Struct(_), _) => Some(format!("cannot restore struct from: {go}")),
        (Kind::Int32, Value::Number(_)) | (Kind::Int64, Value::Number(_)) => None,
        (Kind::Int32, _) => Some("unrecognized type: int32".into()),
        (Kind::Int64, _) => Some("unrecognized type: int64".into()),
        (Kind::Boolean, Value::Bool(_)) | (Kind::String, Value::String(_)) => None,
        (Kind::Boolean, _) => Some("unrecognized type: bool".into()),
        (Kind::String, _) => Some("unrecognized type: string".into()),
        _ => None,
    }
}

fn parse(patch: &[u8]) -> Result<Value, PatchError> {
    crate::decode::parse(patch, crate::decode::Media::Json)
        .map(|(value, _)| value)
        .map_err(|error| PatchError::Malformed(error.0))
}

fn json_kind(value: &Value) -> &'static str {
    match value {
        Value::Array(_) => "array",
        Value::String(_) => "string",
        Value::Number(_) => "number",
        Value::Object(_) => "object",
        _ => "bool",
    }
}

fn parse_map(patch: &[u8]) -> Result<Value, PatchError> {
    let patch = parse(patch)?;
    if patch.is_object() {
        return Ok(patch);
    }
    Err(PatchError::Malformed(format!(
        "json: cannot unmarshal {} into Go value of type map[string]interface {{}}",
        json_kind(&patch)
    )))
}

/// A map as Go prints it.
pub fn go_map(value: &Value) -> String {
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

    #[test]
    fn merge_patches() {
        let object = json!({"a": [1, 2], "b": {"c": 1}});
        assert_eq!(
            merge_patch(&object, br#"{"b":{"c":null},"a":[3]}"#).unwrap(),
            json!({"a": [3], "b": {}})
        );
        assert!(matches!(
            merge_patch(&object, b"[]"),
            Err(PatchError::Malformed(_))
        ));
    }

    #[test]
    fn misfits_are_named_as_by_the_conversion() {
        let ty = table::type_by_name("io.k8s.api.apps.v1.Deployment").unwrap();
        let of = |spec: Value| misfit(&json!({"spec": spec}), ty);
        assert_eq!(
            of(json!({"replicas": "x"})).unwrap(),
            "unrecognized type: int32"
        );
        assert_eq!(
            of(json!({"selector": []})).unwrap(),
            "cannot restore struct from: slice"
        );
        assert_eq!(of(json!({"replicas": 1, "selector": {}})), None);
    }
}
