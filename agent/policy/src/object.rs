//! What objects of all kinds have, and how their parts are read.

use k8s_openapi::apimachinery::pkg::apis::meta::v1::LabelSelector;
use serde::de::DeserializeOwned;
use serde_json::Value;

use crate::rule::{PolicyRef, Source};
use crate::selector::{Key, Test, requirements};

/// Put on a pod with `"true"`, this has flows tell of the HTTP that it speaks.
pub const OBSERVE_HTTP: &str = "observe.xebec.io/http";
/// Put on a policy or a pod with `"true"`, this has drops told and not made.
pub const AUDIT: &str = "policy.xebec.io/audit";

/// Where an object of this kind is.
pub fn id(source: Source, object: &Value) -> PolicyRef {
    let text = |field: &str| {
        let value = object["metadata"][field].as_str();
        value.unwrap_or_default().to_owned()
    };
    PolicyRef {
        source,
        namespace: if source.is_namespaced() {
            text("namespace")
        } else {
            String::new()
        },
        name: text("name"),
    }
}

/// Whether an object asks for drops to be told and not made.
pub fn audit(object: &Value) -> bool {
    object["metadata"]["annotations"][AUDIT] == "true"
}

/// Reads a part of an object.
pub fn parse<T: DeserializeOwned>(value: &Value) -> Result<T, String> {
    T::deserialize(value).map_err(|error| format!("{error}; write it as the API has it"))
}

/// A field that is a list; nothing where it is not there.
pub fn list<'a>(object: &'a Value, field: &str) -> Result<Option<&'a [Value]>, String> {
    match &object[field] {
        Value::Null => Ok(None),
        Value::Array(all) => Ok(Some(all)),
        _ => Err(format!("{field} is no list; make it one")),
    }
}

/// The fields of an object that say something.
pub fn fields(object: &Value) -> impl Iterator<Item = &str> {
    let all = object.as_object().into_iter().flatten();
    all.filter(|(_, value)| !value.is_null())
        .map(|(field, _)| field.as_str())
}

/// Reads a label selector; `key` tells whose labels they are.
pub fn selector(value: &Value, key: impl Fn(&str) -> Key) -> Result<Vec<(Key, Test)>, String> {
    if !value.is_object() {
        return Err("there is no selector; {} selects all".to_owned());
    }
    if let Some(field) =
        fields(value).find(|one| !["matchLabels", "matchExpressions"].contains(one))
    {
        return Err(format!(
            "{field} is not known; use matchLabels and matchExpressions"
        ));
    }
    requirements(&parse::<LabelSelector>(value)?, key)
}

/// A port's number.
pub fn port(number: i64) -> Result<u16, String> {
    let port = u16::try_from(number).ok().filter(|port| *port > 0);
    port.ok_or_else(|| format!("port {number} is not between 1 and 65535"))
}

/// Ports from the first to the last.
pub fn range(first: i64, last: i64) -> Result<(u16, u16), String> {
    let (first, last) = (port(first)?, port(last)?);
    if last < first {
        return Err(format!(
            "the range ends with {last}, before it begins with {first}"
        ));
    }
    Ok((first, last))
}
