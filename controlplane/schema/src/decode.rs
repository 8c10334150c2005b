//! Decoding request bodies: JSON or YAML against the type table, with what is unknown or doubled reported.

use std::fmt;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use serde::de::{DeserializeSeed, MapAccess, SeqAccess, Visitor};
use serde_json::{Map, Number, Value};

use crate::Object;
use crate::json_syntax;
use crate::limits::{Budget, TooMuch};
use crate::place::Place;
use crate::quantity::Quantity;
use crate::table::{self, Kind, Type, TypeId};
use crate::times::{self, Precision};

/// What happens to fields that are unknown or doubled (`?fieldValidation=`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FieldValidation {
    /// Dropped silently.
    Ignore,
    /// Dropped, with a warning.
    Warn,
    /// Refused.
    Strict,
}

/// The encoding of a body.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Media {
    /// `application/json`
    Json,
    /// `application/yaml`
    Yaml,
}

/// A decoded object.
#[derive(Debug)]
pub struct Decoded {
    /// The object with unknown fields and nulls left out.
    pub object: Object,
    /// What was left out, for `Warning` headers.
    pub warnings: Vec<String>,
}

/// Why a body can't be decoded; the message is the real server's.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct DecodeError(pub String);

/// Stands for the struct's field in a message until the struct is known.
const FIELD: &str = "\0";

/// Nesting beyond this is refused before it can exhaust the stack.
const DEEPEST: usize = 500;
/// Fields that are told of as unknown or doubled.
const MOST_NOTES: usize = 100;

/// A value of any shape, with duplicate keys noted on the way.
pub fn parse(body: &[u8], media: Media) -> Result<(Value, Vec<String>), DecodeError> {
    let mut duplicates = Vec::new();
    let budget = Budget::new();
    let value = match media {
        Media::Json => {
            let mut reader = serde_json::Deserializer::from_slice(body);
            let seed = Noting {
                place: Place::ROOT,
                duplicates: &mut duplicates,
                depth: 0,
                budget: &budget,
            };
            let value = seed
                .deserialize(&mut reader)
                .map_err(|error| json_error(&error, body))?;
            reader.end().map_err(|error| json_error(&error, body))?;
            value
        }
        Media::Yaml => {
            let text =
                std::str::from_utf8(body).map_err(|_| DecodeError("yaml: invalid UTF-8".into()))?;
            let reader = serde_yaml_ng::Deserializer::from_str(text);
            let seed = Noting {
                place: Place::ROOT,
                duplicates: &mut duplicates,
                depth: 0,
                budget: &budget,
            };
            seed.deserialize(reader).map_err(|error| {
                DecodeError(format!("error converting YAML to JSON: yaml: {error}"))
            })?
        }
    };
    Ok((value, duplicates))
}

/// JSON that no type is known of, as a part of a body that has this budget.
pub(crate) fn free_form(text: &[u8], budget: &Budget) -> Result<Value, serde_json::Error> {
    let mut reader = serde_json::Deserializer::from_slice(text);
    let seed = Noting {
        place: Place::ROOT,
        duplicates: &mut Vec::new(),
        depth: 0,
        budget,
    };
    let value = seed.deserialize(&mut reader)?;
    reader.end()?;
    Ok(value)
}

fn json_error(error: &serde_json::Error, body: &[u8]) -> DecodeError {
    DecodeError(match error.classify() {
        serde_json::error::Category::Eof => "unexpected end of JSON input".into(),
        serde_json::error::Category::Syntax => json_syntax::complaint(body),
        _ => error.to_string(),
    })
}

/// `apiVersion` and `kind` of a body.
pub fn gvk_of(value: &Value) -> (String, String) {
    let text = |key: &str| value[key].as_str().unwrap_or_default().to_owned();
    (text("apiVersion"), text("kind"))
}

struct Noting<'a> {
    place: Place<'a>,
    duplicates: &'a mut Vec<String>,
    depth: usize,
    budget: &'a Budget,
}

impl<'de> DeserializeSeed<'de> for Noting<'_> {
    type Value = Value;
    fn deserialize<D: serde::Deserializer<'de>>(self, deserializer: D) -> Result<Value, D::Error> {
        if self.depth > DEEPEST {
            return Err(serde::de::Error::custom(TooMuch::Depth));
        }
        self.budget.value().map_err(serde::de::Error::custom)?;
        deserializer.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for Noting<'_> {
    type Value = Value;
    fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.write_str("a value")
    }
    fn visit_bool<E>(self, value: bool) -> Result<Value, E> {
        Ok(value.into())
    }
    fn visit_i64<E>(self, value: i64) -> Result<Value, E> {
        Ok(value.into())
    }
    fn visit_u64<E>(self, value: u64) -> Result<Value, E> {
        Ok(value.into())
    }
    fn visit_f64<E>(self, value: f64) -> Result<Value, E> {
        Ok(Number::from_f64(value).map_or(Value::Null, Value::Number))
    }
    fn visit_str<E>(self, value: &str) -> Result<Value, E> {
        Ok(value.into())
    }
    fn visit_string<E>(self, value: String) -> Result<Value, E> {
        Ok(value.into())
    }
    fn visit_unit<E>(self) -> Result<Value, E> {
        Ok(Value::Null)
    }
    fn visit_none<E>(self) -> Result<Value, E> {
        Ok(Value::Null)
    }
    fn visit_some<D: serde::Deserializer<'de>>(self, deserializer: D) -> Result<Value, D::Error> {
        self.deserialize(deserializer)
    }
    fn visit_seq<A: SeqAccess<'de>>(self, mut items: A) -> Result<Value, A::Error> {
        let mut list = Vec::new();
        loop {
            let seed = Noting {
                place: self.place.index(list.len()),
                duplicates: self.duplicates,
                depth: self.depth + 1,
                budget: self.budget,
            };
            match items.next_element_seed(seed)? {
                Some(item) => list.push(item),
                None => return Ok(list.into()),
            }
        }
    }
    fn visit_map<A: MapAccess<'de>>(self, mut entries: A) -> Result<Value, A::Error> {
        self.budget.map().map_err(serde::de::Error::custom)?;
        let mut map = Map::new();
        while let Some(key) = entries.next_key::<Key>()? {
            let place = self.place.field(&key.0);
            let seed = Noting {
                place,
                duplicates: self.duplicates,
                depth: self.depth + 1,
                budget: self.budget,
            };
            let value = entries.next_value_seed(seed)?;
            if map.contains_key(&key.0) {
                note(self.duplicates, "duplicate", &place);
            }
            map.insert(key.0, value);
        }
        Ok(map.into())
    }
}

/// A key: YAML lets numbers and truth values be keys, the API takes them as text.
struct Key(String);

impl<'de> serde::Deserialize<'de> for Key {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct KeyVisitor;
        impl Visitor<'_> for KeyVisitor {
            type Value = Key;
            fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
                f.write_str("a key")
            }
            fn visit_str<E>(self, value: &str) -> Result<Key, E> {
                Ok(Key(value.to_owned()))
            }
            fn visit_bool<E>(self, value: bool) -> Result<Key, E> {
                Ok(Key(value.to_string()))
            }
            fn visit_i64<E>(self, value: i64) -> Result<Key, E> {
                Ok(Key(value.to_string()))
            }
            fn visit_u64<E>(self, value: u64) -> Result<Key, E> {
                Ok(Key(value.to_string()))
            }
            fn visit_f64<E>(self, value: f64) -> Result<Key, E> {
                Ok(Key(value.to_string()))
            }
        }
        deserializer.deserialize_any(KeyVisitor)
    }
}

/// Notes what is wrong with a field. A body can have more such fields than anybody reads of.
fn note(notes: &mut Vec<String>, what: &str, place: &Place<'_>) {
    if notes.len() < MOST_NOTES {
        notes.push(format!("{what} field {:?}", place.to_string()));
    }
}

/// Decodes a body as a type: wrong types are errors, unknown fields go by `validation`.
pub fn decode(
    body: &[u8],
    media: Media,
    ty: TypeId,
    validation: FieldValidation,
) -> Result<Decoded, DecodeError> {
    let (mut value, duplicates) = parse(body, media)?;
    let mut warnings = Vec::new();
    let unknown = conform(&mut value, ty)?;
    if validation != FieldValidation::Ignore {
        warnings.extend(unknown);
        warnings.extend(duplicates);
    }
    if validation == FieldValidation::Strict && !warnings.is_empty() {
        return Err(DecodeError(format!(
            "strict decoding error: {}",
            warnings.join(", ")
        )));
    }
    Ok(Decoded {
        object: value,
        warnings,
    })
}

/// Brings a value into the shape of a type, and says which fields were not of it.
pub fn conform(value: &mut Value, ty: TypeId) -> Result<Vec<String>, DecodeError> {
    let mut unknown = Vec::new();
    if !value.is_object() {
        return Err(mismatch(value, &Place::ROOT, &struct_name(table::get(ty))));
    }
    check_struct(value, ty, &Place::ROOT, &mut unknown)?;
    Ok(unknown)
}

fn check_struct(
    value: &mut Value,
    ty: TypeId,
    place: &Place<'_>,
    unknown: &mut Vec<String>,
) -> Result<(), DecodeError> {
    let ty = table::get(ty);
    let Some(map) = value.as_object_mut() else {
        return Err(mismatch(value, place, &struct_name(ty)));
    };
    let mut error = None;
    map.retain(|key, value| {
        if error.is_some() {
            return true;
        }
        let place = place.field(key);
        let Some(field) = ty.field(key) else {
            // A type without fields of its own (a raw extension) takes anything.
            if ty.fields.is_empty() {
                return true;
            }
            note(unknown, "unknown", &place);
            return false;
        };
        if value.is_null() {
            return false;
        }
        error = check(value, &field.kind, &place, unknown)
            .err()
            .map(|error| name_field(error, ty.name, &place));
        true
    });
    error.map_or(Ok(()), Err)
}

/// Go names the innermost struct and the way to its field, without list indices.
fn name_field(error: DecodeError, ty: &str, place: &Place<'_>) -> DecodeError {
    if !error.0.contains(FIELD) {
        return error;
    }
    let mut way = ty.rsplit('.').next().unwrap_or_default().to_owned();
    for part in place.to_string().split('.') {
        way.push('.');
        way.push_str(part.split('[').next().unwrap_or_default());
    }
    DecodeError(error.0.replace(FIELD, &way))
}

fn check(
    value: &mut Value,
    kind: &Kind,
    place: &Place<'_>,
    unknown: &mut Vec<String>,
) -> Result<(), DecodeError> {
    let bad = |value: &Value, go: &str| Err(mismatch(value, place, go));
    match kind {
        Kind::Any => {}
        Kind::String if !value.is_string() => return bad(value, "string"),
        Kind::Boolean if !value.is_boolean() => return bad(value, "bool"),
        Kind::Int32 => match whole(value) {
            Some(number) if i32::try_from(number).is_ok() => *value = number.into(),
            _ => return bad(value, "int32"),
        },
        Kind::Int64 => match whole(value) {
            Some(number) => *value = number.into(),
            None => return bad(value, "int64"),
        },
        Kind::Double if !value.is_number() => return bad(value, "float64"),
        Kind::Bytes if !value.is_string() => return bad(value, "[]byte"),
        Kind::Bytes => {
            let text = value.as_str().unwrap_or_default();
            if let Err(error) = STANDARD.decode(text) {
                let at = match error {
                    base64::DecodeError::InvalidByte(at, _)
                    | base64::DecodeError::InvalidLastSymbol(at, _) => at,
                    _ => text.len(),
                };
                return Err(DecodeError(format!(
                    "illegal base64 data at input byte {at}"
                )));
            }
        }
        Kind::Quantity => {
            let text = match value {
                Value::String(text) => text.clone(),
                Value::Number(number) => number.to_string(),
                _ => return bad(value, "resource.Quantity"),
            };
            let quantity =
                Quantity::parse(&text).map_err(|error| DecodeError(error.to_string()))?;
            *value = quantity.canonical().into();
        }
        Kind::IntOrString => match value {
            Value::String(_) => {}
            _ => match whole(value).filter(|number| i32::try_from(*number).is_ok()) {
                Some(number) => *value = number.into(),
                None => return bad(value, "intstr.IntOrString"),
            },
        },
        Kind::Time | Kind::MicroTime => {
            let Some(text) = value.as_str() else {
                return bad(value, "string");
            };
            let precision = match kind {
                Kind::MicroTime => Precision::Micros,
                _ => Precision::Seconds,
            };
            *value = times::canonical(text, precision)
                .map_err(DecodeError)?
                .into();
        }
        Kind::List(inner) => {
            let Some(list) = value.as_array_mut() else {
                return bad(value, &go_name(kind));
            };
            for (index, item) in list.iter_mut().enumerate() {
                if item.is_null() {
                    *item = zero(inner);
                    continue;
                }
                check(item, inner, &place.index(index), unknown)?;
            }
        }
        Kind::Map(inner) => {
            let Some(map) = value.as_object_mut() else {
                return bad(value, &go_name(kind));
            };
            for (key, item) in map.iter_mut() {
                if item.is_null() {
                    *item = zero(inner);
                    continue;
                }
                check(item, inner, &place.field(key), unknown)?;
            }
        }
        Kind::Struct(ty) => check_struct(value, *ty, place, unknown)?,
        _ => {}
    }
    Ok(())
}

/// What Go makes of a null in a list or map.
fn zero(kind: &Kind) -> Value {
    match kind {
        Kind::String | Kind::Bytes => "".into(),
        Kind::Int32 | Kind::Int64 | Kind::IntOrString => 0.into(),
        Kind::Boolean => false.into(),
        Kind::Quantity => "0".into(),
        Kind::Struct(_) | Kind::Map(_) => Value::Object(Map::new()),
        Kind::List(_) => Value::Array(Vec::new()),
        Kind::Double => 0.into(),
        Kind::Any | Kind::Time | Kind::MicroTime => Value::Null,
    }
}

/// A whole number, also where it is written with an exponent or a fraction of zero.
fn whole(value: &Value) -> Option<i64> {
    value.as_i64().or_else(|| {
        let float = value.as_f64()?;
        (float.fract() == 0.0 && float.abs() < 9e15).then_some(float as i64)
    })
}

fn go_name(kind: &Kind) -> String {
    match kind {
        Kind::String => "string".into(),
        Kind::Int32 => "int32".into(),
        Kind::Int64 => "int64".into(),
        Kind::Double => "float64".into(),
        Kind::Boolean => "bool".into(),
        Kind::Bytes => "[]uint8".into(),
        Kind::Quantity => "resource.Quantity".into(),
        Kind::IntOrString => "intstr.IntOrString".into(),
        Kind::Time => "v1.Time".into(),
        Kind::MicroTime => "v1.MicroTime".into(),
        Kind::Any => "interface {}".into(),
        Kind::List(inner) => format!("[]{}", go_name(inner)),
        Kind::Map(inner) => format!("map[string]{}", go_name(inner)),
        Kind::Struct(ty) => struct_name(table::get(*ty)),
    }
}

/// A struct as Go names it: `v1.PodSpec`.
fn struct_name(ty: &Type) -> String {
    let mut parts = ty.name.rsplit('.');
    let (name, version) = (
        parts.next().unwrap_or_default(),
        parts.next().unwrap_or_default(),
    );
    format!("{version}.{name}")
}

fn mismatch(value: &Value, place: &Place<'_>, go: &str) -> DecodeError {
    let found = match value {
        Value::Null => "null",
        Value::Bool(_) => "bool",
        Value::Number(_) => "number",
        Value::String(_) => "string",
        Value::Array(_) => "array",
        Value::Object(_) => "object",
    };
    if place.is_root() {
        return DecodeError(format!(
            "json: cannot unmarshal {found} into Go value of type {go}"
        ));
    }
    DecodeError(format!(
        "json: cannot unmarshal {found} into Go struct field {FIELD} of type {go}"
    ))
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn a_small_body_cannot_become_a_huge_object() {
        let ty = table::type_of_kind("", "v1", "Pod").unwrap();
        let body = format!(
            "{{\"spec\":{{\"containers\":[{}{{}}]}}}}",
            "{},".repeat(900_000)
        );
        let refused = decode(body.as_bytes(), Media::Json, ty, FieldValidation::Ignore);
        let told = refused.unwrap_err().to_string();
        assert!(told.contains("too many fields and items"), "{told}");
        // A long key is not copied for each of the many values below it.
        let key = "k".repeat(1_000_000);
        let body = format!("{{\"{key}\":[{}0]}}", "0,".repeat(400_000));
        let (value, _) = parse(body.as_bytes(), Media::Json).unwrap();
        assert_eq!(value[&key].as_array().unwrap().len(), 400_001);
    }

    fn pod(body: &str, validation: FieldValidation) -> Result<Decoded, DecodeError> {
        decode(
            body.as_bytes(),
            Media::Json,
            table::type_by_name("io.k8s.api.core.v1.Pod").unwrap(),
            validation,
        )
    }

    #[test]
    fn unknown_and_doubled_fields() {
        let body =
            r#"{"kind":"Pod","spec":{"foo":1,"containers":[{"name":"a","name":"b","bar":2}]}}"#;
        let decoded = pod(body, FieldValidation::Warn).unwrap();
        assert_eq!(
            decoded.warnings,
            [
                r#"unknown field "spec.containers[0].bar""#,
                r#"unknown field "spec.foo""#,
                r#"duplicate field "spec.containers[0].name""#
            ]
        );
        assert_eq!(
            decoded.object["spec"],
            json!({"containers": [{"name": "b"}]})
        );
        assert!(
            pod(body, FieldValidation::Ignore)
                .unwrap()
                .warnings
                .is_empty()
        );
        assert!(
            pod(body, FieldValidation::Strict)
                .unwrap_err()
                .0
                .starts_with("strict decoding error: unknown field")
        );
    }

    #[test]
    fn wrong_types_and_broken_json() {
        for body in [
            "",
            "{",
            "[]",
            r#"{"spec":5}"#,
            r#"{"spec":{"containers":{}}}"#,
            r#"{"spec":{"hostNetwork":"x"}}"#,
        ] {
            assert!(pod(body, FieldValidation::Ignore).is_err(), "{body}");
        }
        let deep = format!("{}1{}", "[".repeat(100_000), "]".repeat(100_000));
        assert!(pod(&deep, FieldValidation::Ignore).is_err());
    }

    #[test]
    fn quantities_are_made_canonical_and_nulls_left_out() {
        let body = r#"{"spec":{"containers":[{"name":"a","image":null,"resources":{"limits":{"cpu":0.5,"memory":"1024Mi"}}}]}}"#;
        let object = pod(body, FieldValidation::Strict).unwrap().object;
        assert_eq!(
            object["spec"]["containers"][0],
            json!({"name": "a", "resources": {"limits": {"cpu": "500m", "memory": "1Gi"}}})
        );
    }

    #[test]
    fn yaml_is_the_same() {
        let ty = table::type_by_name("io.k8s.api.core.v1.ConfigMap").unwrap();
        let decoded = decode(
            b"kind: ConfigMap\ndata: {a: b}\n",
            Media::Yaml,
            ty,
            FieldValidation::Strict,
        )
        .unwrap();
        assert_eq!(
            decoded.object,
            json!({"kind": "ConfigMap", "data": {"a": "b"}})
        );
        assert!(decode(b"a: [", Media::Yaml, ty, FieldValidation::Strict).is_err());
    }
}
