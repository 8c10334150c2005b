//! The v2 document in protobuf, as client-go asks for it (`openapi.v2.Document` of gnostic's OpenAPIv2.proto): with
//! the fields that the document has.

use prost::Message;
use serde_json::Value;

/// The media type of this form.
pub const MEDIA_TYPE: &str = "application/com.github.proto-openapi.spec.v2.v1.0+protobuf";

#[derive(Message)]
struct Document {
    #[prost(string, tag = "1")]
    swagger: String,
    #[prost(message, optional, tag = "2")]
    info: Option<Info>,
    #[prost(message, optional, tag = "8")]
    paths: Option<Paths>,
    #[prost(message, optional, tag = "9")]
    definitions: Option<NamedSchemas>,
}

#[derive(Message)]
struct Info {
    #[prost(string, tag = "1")]
    title: String,
    #[prost(string, tag = "2")]
    version: String,
}

/// `Definitions` and `Properties`.
#[derive(Message)]
struct NamedSchemas {
    #[prost(message, repeated, tag = "1")]
    all: Vec<NamedSchema>,
}

#[derive(Message)]
struct NamedSchema {
    #[prost(string, tag = "1")]
    name: String,
    #[prost(message, optional, tag = "2")]
    value: Option<Schema>,
}

#[derive(Message)]
struct Schema {
    #[prost(string, tag = "1")]
    reference: String,
    #[prost(string, tag = "2")]
    format: String,
    #[prost(string, repeated, tag = "19")]
    required: Vec<String>,
    #[prost(message, optional, boxed, tag = "21")]
    additional_properties: Option<Box<SchemaOf>>,
    #[prost(message, optional, tag = "22")]
    kind: Option<TypeItem>,
    #[prost(message, optional, boxed, tag = "23")]
    items: Option<Box<SchemaOf>>,
    #[prost(message, optional, tag = "25")]
    properties: Option<NamedSchemas>,
    #[prost(message, repeated, tag = "31")]
    extensions: Vec<NamedAny>,
}

/// `AdditionalPropertiesItem` and `ItemsItem`: one schema.
#[derive(Message)]
struct SchemaOf {
    #[prost(message, optional, boxed, tag = "1")]
    schema: Option<Box<Schema>>,
}

#[derive(Message)]
struct TypeItem {
    #[prost(string, repeated, tag = "1")]
    value: Vec<String>,
}

#[derive(Message)]
struct NamedAny {
    #[prost(string, tag = "1")]
    name: String,
    #[prost(message, optional, tag = "2")]
    value: Option<Any>,
}

#[derive(Message)]
struct Any {
    /// YAML, of which JSON is a part.
    #[prost(string, tag = "2")]
    yaml: String,
}

#[derive(Message)]
struct Paths {
    #[prost(message, repeated, tag = "2")]
    all: Vec<NamedPath>,
}

#[derive(Message)]
struct NamedPath {
    #[prost(string, tag = "1")]
    name: String,
    #[prost(message, optional, tag = "2")]
    value: Option<PathItem>,
}

#[derive(Message)]
struct PathItem {
    #[prost(message, optional, tag = "2")]
    get: Option<Operation>,
    #[prost(message, optional, tag = "3")]
    put: Option<Operation>,
    #[prost(message, optional, tag = "4")]
    post: Option<Operation>,
    #[prost(message, optional, tag = "5")]
    delete: Option<Operation>,
    #[prost(message, optional, tag = "8")]
    patch: Option<Operation>,
}

#[derive(Message)]
struct Operation {
    #[prost(message, repeated, tag = "8")]
    parameters: Vec<ParametersItem>,
    #[prost(message, repeated, tag = "13")]
    extensions: Vec<NamedAny>,
}

#[derive(Message)]
struct ParametersItem {
    #[prost(message, optional, tag = "1")]
    parameter: Option<Parameter>,
}

#[derive(Message)]
struct Parameter {
    #[prost(message, optional, tag = "2")]
    other_than_body: Option<NonBody>,
}

#[derive(Message)]
struct NonBody {
    #[prost(message, optional, tag = "3")]
    query: Option<Query>,
}

#[derive(Message)]
struct Query {
    #[prost(string, tag = "2")]
    place: String,
    #[prost(string, tag = "4")]
    name: String,
    #[prost(string, tag = "6")]
    kind: String,
    #[prost(bool, tag = "20")]
    unique_items: bool,
}

/// The document, encoded.
pub fn encode(document: &Value) -> Vec<u8> {
    let paths = document["paths"].as_object().into_iter().flatten();
    let message = Document {
        swagger: text(&document["swagger"]),
        info: Some(Info {
            title: text(&document["info"]["title"]),
            version: text(&document["info"]["version"]),
        }),
        paths: Some(Paths {
            all: paths
                .map(|(name, value)| NamedPath {
                    name: name.clone(),
                    value: Some(path(value)),
                })
                .collect(),
        }),
        definitions: named(&document["definitions"]),
    };
    message.encode_to_vec()
}

fn text(value: &Value) -> String {
    value.as_str().unwrap_or_default().to_owned()
}

fn named(schemas: &Value) -> Option<NamedSchemas> {
    let all = schemas
        .as_object()?
        .iter()
        .map(|(name, value)| NamedSchema {
            name: name.clone(),
            value: Some(schema(value)),
        });
    Some(NamedSchemas { all: all.collect() })
}

fn schema(value: &Value) -> Schema {
    let inner = |key: &str| {
        value.get(key).map(|inner| {
            Box::new(SchemaOf {
                schema: Some(Box::new(schema(inner))),
            })
        })
    };
    let required = value["required"].as_array().into_iter().flatten();
    Schema {
        reference: text(&value["$ref"]),
        format: text(&value["format"]),
        required: required.map(text).collect(),
        additional_properties: inner("additionalProperties"),
        kind: value.get("type").map(|kind| TypeItem {
            value: vec![text(kind)],
        }),
        items: inner("items"),
        properties: value.get("properties").and_then(named),
        extensions: extensions(value),
    }
}

fn extensions(value: &Value) -> Vec<NamedAny> {
    let all = value.as_object().into_iter().flatten();
    all.filter(|(name, _)| name.starts_with("x-"))
        .map(|(name, value)| NamedAny {
            name: name.clone(),
            value: Some(Any {
                yaml: value.to_string(),
            }),
        })
        .collect()
}

fn path(value: &Value) -> PathItem {
    let of = |method: &str| value.get(method).map(operation);
    PathItem {
        get: of("get"),
        put: of("put"),
        post: of("post"),
        delete: of("delete"),
        patch: of("patch"),
    }
}

fn operation(value: &Value) -> Operation {
    let parameters = value["parameters"].as_array().into_iter().flatten();
    let parameters = parameters.map(|one| ParametersItem {
        parameter: Some(Parameter {
            other_than_body: Some(NonBody {
                query: Some(Query {
                    place: text(&one["in"]),
                    name: text(&one["name"]),
                    kind: text(&one["type"]),
                    unique_items: one["uniqueItems"] == true,
                }),
            }),
        }),
    });
    Operation {
        parameters: parameters.collect(),
        extensions: extensions(value),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_document_has_what_kubectl_reads() {
        let bytes = encode(&crate::openapi::v2());
        let document = Document::decode(&bytes[..]).unwrap();
        assert_eq!(document.swagger, "2.0");
        let definitions = document.definitions.unwrap().all;
        let pod = definitions
            .iter()
            .find(|one| one.name == "io.k8s.api.core.v1.Pod")
            .and_then(|one| one.value.as_ref())
            .unwrap();
        let kind = &pod.extensions[0];
        assert_eq!(kind.name, "x-kubernetes-group-version-kind");
        let yaml = &kind.value.as_ref().unwrap().yaml;
        assert!(yaml.contains("\"kind\":\"Pod\""), "{yaml}");
        let properties = &pod.properties.as_ref().unwrap().all;
        assert!(properties.iter().any(|one| {
            one.name == "spec"
                && one.value.as_ref().unwrap().reference
                    == "#/definitions/io.k8s.api.core.v1.PodSpec"
        }));
        let paths = document.paths.unwrap().all;
        let patch = paths
            .iter()
            .find(|one| one.name == "/api/v1/namespaces/{namespace}/pods/{name}")
            .and_then(|one| one.value.as_ref()?.patch.as_ref())
            .unwrap();
        let names = patch.parameters.iter().map(|one| {
            let other = one.parameter.as_ref().unwrap().other_than_body.as_ref();
            other.unwrap().query.as_ref().unwrap().name.as_str()
        });
        assert!(names.into_iter().any(|name| name == "dryRun"));
    }
}
