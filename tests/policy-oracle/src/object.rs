//! Reads objects, and panics where it can't.

use std::collections::BTreeMap;

use serde::Deserialize;
use serde_json::Value;

/// Labels by key.
pub type Labels = BTreeMap<String, String>;

/// What names an object.
#[derive(Deserialize)]
pub struct Metadata {
    pub name: String,
    #[serde(default)]
    pub namespace: String,
    pub labels: Option<Labels>,
}

/// An object's kind.
pub fn kind(object: &Value) -> &str {
    object["kind"]
        .as_str()
        .unwrap_or_else(|| panic!("an object without kind: {object}"))
}

/// An object's apiVersion.
pub fn version(object: &Value) -> &str {
    object["apiVersion"]
        .as_str()
        .unwrap_or_else(|| panic!("an object without apiVersion: {object}"))
}

/// An object's metadata.
pub fn metadata(object: &Value) -> Metadata {
    read(object, "metadata")
}

/// One of an object's fields, which must be there and of the right form.
pub fn read<'a, T: Deserialize<'a>>(object: &'a Value, field: &str) -> T {
    T::deserialize(&object[field])
        .unwrap_or_else(|error| panic!("can't read {field} of {object}: {error}"))
}
