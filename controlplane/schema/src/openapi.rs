//! The OpenAPI documents that clients read: v3 per group and version, and v2 for older ones, made from the type table.

pub mod gnostic;

use std::collections::BTreeSet;

use serde_json::{Map, Value, json};

use crate::Object;
use crate::table::{self, Kind, ListType, Resource, Type};

/// `v1` → `api/v1`, `apps/v1` → `apis/apps/v1`.
fn group_version_path(resource: &Resource) -> String {
    if resource.group.is_empty() {
        format!("api/{}", resource.version)
    } else {
        format!("apis/{}/{}", resource.group, resource.version)
    }
}

/// `/openapi/v3`: where each group's document is.
pub fn v3_index() -> Object {
    let paths: BTreeSet<String> = table::resources().iter().map(group_version_path).collect();
    let entries: Map<String, Value> = paths
        .into_iter()
        .map(|path| {
            let url = format!("/openapi/v3/{path}?hash={}", env!("CARGO_PKG_VERSION"));
            (path, json!({"serverRelativeURL": url}))
        })
        .collect();
    json!({"paths": entries})
}

/// `/openapi/v3/<path>`, such as `apis/apps/v1`; none for a group that is not served.
pub fn v3(path: &str) -> Option<Object> {
    let resources: Vec<&Resource> = table::resources()
        .iter()
        .filter(|r| group_version_path(r) == path)
        .collect();
    if resources.is_empty() {
        return None;
    }
    let mut wanted: BTreeSet<&'static str> = BTreeSet::new();
    resources
        .iter()
        .for_each(|resource| collect(resource.ty(), &mut wanted));
    let schemas: Map<String, Value> = wanted
        .iter()
        .filter_map(|name| table::type_by_name(name))
        .map(|id| {
            (
                table::get(id).name.to_owned(),
                schema(table::get(id), table::kinds_of(id), "#/components/schemas/"),
            )
        })
        .collect();
    Some(json!({
        "openapi": "3.0.0",
        "info": {"title": "Kubernetes", "version": "v1.36.0"},
        "paths": paths(&resources, "#/components/schemas/", true),
        "components": {"schemas": schemas},
    }))
}

/// `/openapi/v2`: everything in one document.
pub fn v2() -> Object {
    let definitions: Map<String, Value> = table::types()
        .iter()
        .filter_map(|ty| {
            table::type_by_name(ty.name).map(|id| {
                (
                    ty.name.to_owned(),
                    schema(ty, table::kinds_of(id), "#/definitions/"),
                )
            })
        })
        .collect();
    let resources: Vec<&Resource> = table::resources().iter().collect();
    json!({
        "swagger": "2.0",
        "info": {"title": "Kubernetes", "version": "v1.36.0"},
        "paths": paths(&resources, "#/definitions/", false),
        "definitions": definitions,
    })
}

/// A type and all that it holds.
fn collect(ty: &'static Type, wanted: &mut BTreeSet<&'static str>) {
    if !wanted.insert(ty.name) {
        return;
    }
    for field in &ty.fields {
        let mut kind = &field.kind;
        while let Kind::List(inner) | Kind::Map(inner) = kind {
            kind = inner;
        }
        if let Kind::Struct(id) = kind {
            collect(table::get(*id), wanted);
        }
    }
}

fn kind_schema(kind: &Kind, prefix: &str) -> Value {
    match kind {
        Kind::String => json!({"type": "string"}),
        Kind::Int32 => json!({"type": "integer", "format": "int32"}),
        Kind::Int64 => json!({"type": "integer", "format": "int64"}),
        Kind::Double => json!({"type": "number", "format": "double"}),
        Kind::Boolean => json!({"type": "boolean"}),
        Kind::Bytes => json!({"type": "string", "format": "byte"}),
        Kind::Any => json!({"type": "object"}),
        Kind::Quantity => json!({"type": "string"}),
        Kind::IntOrString => json!({"type": "string", "format": "int-or-string"}),
        Kind::Time | Kind::MicroTime => json!({"type": "string", "format": "date-time"}),
        Kind::List(inner) => json!({"type": "array", "items": kind_schema(inner, prefix)}),
        Kind::Map(inner) => {
            json!({"type": "object", "additionalProperties": kind_schema(inner, prefix)})
        }
        Kind::Struct(id) => json!({"$ref": format!("{prefix}{}", table::get(*id).name)}),
    }
}

fn schema(ty: &Type, kinds: Vec<(&str, &str, &str)>, prefix: &str) -> Value {
    let mut properties = Map::new();
    for field in &ty.fields {
        let mut property = kind_schema(&field.kind, prefix);
        if matches!(field.kind, Kind::List(_)) {
            let name = match field.list_type {
                ListType::Atomic => "atomic",
                ListType::Set => "set",
                ListType::Map => "map",
            };
            property["x-kubernetes-list-type"] = name.into();
            if !field.list_keys.is_empty() {
                property["x-kubernetes-list-map-keys"] = json!(field.list_keys);
            }
        }
        if let Some(key) = field.merge_key {
            property["x-kubernetes-patch-merge-key"] = key.into();
        }
        match (field.merge, field.retain_keys) {
            (true, true) => property["x-kubernetes-patch-strategy"] = "merge,retainKeys".into(),
            (true, false) => property["x-kubernetes-patch-strategy"] = "merge".into(),
            (false, true) => property["x-kubernetes-patch-strategy"] = "retainKeys".into(),
            (false, false) => {}
        }
        properties.insert(field.name.to_owned(), property);
    }
    let required: Vec<&str> = ty
        .fields
        .iter()
        .filter(|field| field.required)
        .map(|field| field.name)
        .collect();
    let mut schema = json!({"type": "object", "properties": properties});
    if !required.is_empty() {
        schema["required"] = json!(required);
    }
    if !kinds.is_empty() {
        let kinds: Vec<Value> = kinds
            .iter()
            .map(|(g, v, k)| json!({"group": g, "version": v, "kind": k}))
            .collect();
        schema["x-kubernetes-group-version-kind"] = kinds.into();
    }
    schema
}

fn paths(resources: &[&Resource], prefix: &str, v3: bool) -> Map<String, Value> {
    let mut paths = Map::new();
    for resource in resources {
        let namespace = if resource.namespaced {
            "namespaces/{namespace}/"
        } else {
            ""
        };
        let collection = format!(
            "/{}/{namespace}{}",
            group_version_path(resource),
            resource.plural
        );
        let mut of_collection = Map::new();
        let mut of_object = Map::new();
        for (verb, method, action) in [
            ("list", "get", "list"),
            ("create", "post", "post"),
            ("deletecollection", "delete", "deletecollection"),
        ] {
            if resource.has_verb(verb) {
                of_collection.insert(method.into(), operation(resource, action, prefix, v3));
            }
        }
        for (verb, method, action) in [
            ("get", "get", "get"),
            ("update", "put", "put"),
            ("patch", "patch", "patch"),
            ("delete", "delete", "delete"),
        ] {
            if resource.has_verb(verb) {
                of_object.insert(method.into(), operation(resource, action, prefix, v3));
            }
        }
        paths.insert(collection.clone(), Value::Object(of_collection));
        if !of_object.is_empty() {
            paths.insert(format!("{collection}/{{name}}"), Value::Object(of_object));
        }
    }
    paths
}

fn operation(resource: &Resource, action: &str, prefix: &str, v3: bool) -> Value {
    let query: &[&str] = match action {
        "post" | "put" => &["dryRun", "fieldManager", "fieldValidation"],
        "patch" => &["dryRun", "fieldManager", "fieldValidation", "force"],
        "list" => &[
            "labelSelector",
            "fieldSelector",
            "limit",
            "continue",
            "resourceVersion",
            "watch",
        ],
        _ => &["dryRun"],
    };
    let parameters: Vec<Value> = query
        .iter()
        .map(|name| {
            let kind = if matches!(*name, "force" | "watch") {
                "boolean"
            } else {
                "string"
            };
            if v3 {
                json!({"name": name, "in": "query", "schema": {"type": kind, "uniqueItems": true}})
            } else {
                json!({"name": name, "in": "query", "type": kind, "uniqueItems": true})
            }
        })
        .collect();
    let reference = json!({"$ref": format!("{prefix}{}", resource.ty().name)});
    let response = if v3 {
        json!({"description": "OK", "content": {"application/json": {"schema": reference}}})
    } else {
        json!({"description": "OK", "schema": reference})
    };
    json!({
        "x-kubernetes-action": action,
        "x-kubernetes-group-version-kind": {"group": resource.group, "version": resource.version, "kind": resource.kind},
        "parameters": parameters,
        "responses": {"200": response},
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_reference_has_its_schema() {
        for path in v3_index()["paths"].as_object().unwrap().keys() {
            let document = v3(path).unwrap();
            let text = document.to_string();
            for part in text.split("#/components/schemas/").skip(1) {
                let name = part.split('"').next().unwrap();
                assert!(
                    document["components"]["schemas"][name].is_object(),
                    "{path}: {name}"
                );
            }
        }
        assert!(v3("apis/nosuch/v1").is_none());
        assert_eq!(v2()["swagger"], "2.0");
    }
}
