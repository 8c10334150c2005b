//! Reading request bodies in Kubernetes' protobuf encoding, by the field numbers of the type table.

use serde_json::{Map, Value, json};
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;
use time::macros::format_description;

use crate::limits::{Budget, TooMuch};
use crate::shape;
use crate::table::{self, Kind, TypeId};

/// What every such body begins with.
const MAGIC: &[u8] = b"k8s\0";
/// Nesting beyond this is refused before it can exhaust the stack.
const DEEPEST: usize = 100;

/// How deep a message lies in its body, and what the body's values may still cost.
#[derive(Clone, Copy)]
struct Limits<'a> {
    depth: usize,
    budget: &'a Budget,
}

impl Limits<'_> {
    fn deeper(self) -> Self {
        let depth = self.depth + 1;
        Self { depth, ..self }
    }
}

/// Why a body can't be read.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ProtobufError {
    /// It does not begin as such bodies do.
    #[error(
        "provided data does not appear to be a protobuf message, expected prefix [107 56 115 0]"
    )]
    NoPrefix,
    /// It ends within a value.
    #[error("unexpected EOF")]
    End,
    /// A field whose number is not known here, of a type that has such.
    #[error("field {1} of {0} is not known in protobuf; send this object as JSON")]
    Unnumbered(&'static str, u32),
    /// It is no message of its type.
    #[error("proto: {0}")]
    Malformed(&'static str),
    /// It would cost too much.
    #[error("proto: {0}")]
    TooMuch(String),
}

impl From<TooMuch> for ProtobufError {
    fn from(error: TooMuch) -> Self {
        Self::TooMuch(error.to_string())
    }
}

use ProtobufError::{End, Malformed};

/// The envelope of a body: version and kind as they are said there, and the message within.
#[derive(Debug, PartialEq, Eq)]
pub struct Envelope<'a> {
    /// `apiVersion`.
    pub api_version: String,
    /// `kind`.
    pub kind: String,
    /// The encoded object.
    pub raw: &'a [u8],
}

/// Takes a body out of its envelope.
pub fn open(body: &[u8]) -> Result<Envelope<'_>, ProtobufError> {
    let message = body.strip_prefix(MAGIC).ok_or(ProtobufError::NoPrefix)?;
    let mut envelope = Envelope {
        api_version: String::new(),
        kind: String::new(),
        raw: &[],
    };
    for field in fields(message) {
        match field? {
            (1, Wire::Bytes(meta)) => {
                for field in fields(meta) {
                    match field? {
                        (1, Wire::Bytes(version)) => envelope.api_version = text(version)?,
                        (2, Wire::Bytes(kind)) => envelope.kind = text(kind)?,
                        _ => {}
                    }
                }
            }
            (2, Wire::Bytes(raw)) => envelope.raw = raw,
            _ => {}
        }
    }
    Ok(envelope)
}

/// A message of a type as the object that JSON would say.
pub fn decode(message: &[u8], ty: TypeId) -> Result<Value, ProtobufError> {
    let limits = Limits {
        depth: 0,
        budget: &Budget::new(),
    };
    let mut value = structure(message, ty, limits)?;
    // The encoding has no absent texts and numbers; what stands for absent ones goes.
    shape::complete(&mut value, ty);
    Ok(value)
}

/// The value of one field on the wire.
enum Wire<'a> {
    Number(u64),
    Bytes(&'a [u8]),
}

/// The fields of a message, by number.
fn fields(message: &[u8]) -> impl Iterator<Item = Result<(u32, Wire<'_>), ProtobufError>> {
    let mut rest = message;
    std::iter::from_fn(move || {
        if rest.is_empty() {
            return None;
        }
        let read = field(&mut rest);
        if read.is_err() {
            rest = &[];
        }
        Some(read)
    })
}

fn field<'a>(rest: &mut &'a [u8]) -> Result<(u32, Wire<'a>), ProtobufError> {
    let tag = varint(rest)?;
    let number = u32::try_from(tag >> 3).map_err(|_| Malformed("illegal tag"))?;
    let value = match tag & 7 {
        0 => Wire::Number(varint(rest)?),
        1 => Wire::Number(u64::from_le_bytes(
            take(rest, 8)?.try_into().map_err(|_| End)?,
        )),
        2 => {
            let length = usize::try_from(varint(rest)?).map_err(|_| End)?;
            Wire::Bytes(take(rest, length)?)
        }
        5 => Wire::Number(u64::from(u32::from_le_bytes(
            take(rest, 4)?.try_into().map_err(|_| End)?,
        ))),
        _ => return Err(Malformed("illegal wireType")),
    };
    Ok((number, value))
}

fn take<'a>(rest: &mut &'a [u8], length: usize) -> Result<&'a [u8], ProtobufError> {
    let (taken, after) = rest.split_at_checked(length).ok_or(End)?;
    *rest = after;
    Ok(taken)
}

fn varint(rest: &mut &[u8]) -> Result<u64, ProtobufError> {
    let mut value = 0;
    for shift in (0..64).step_by(7) {
        let byte = take(rest, 1)?[0];
        value |= u64::from(byte & 0x7f) << shift;
        if byte & 0x80 == 0 {
            return Ok(value);
        }
    }
    Err(Malformed("integer overflow"))
}

fn text(bytes: &[u8]) -> Result<String, ProtobufError> {
    String::from_utf8(bytes.to_vec()).map_err(|_| Malformed("a string is not UTF-8"))
}

fn structure(message: &[u8], ty: TypeId, limits: Limits<'_>) -> Result<Value, ProtobufError> {
    limits.budget.map()?;
    let mut map = Map::new();
    read_into(&mut map, message, ty, &[], limits)?;
    Ok(Value::Object(map))
}

/// Reads a message, or one around some of its fields that JSON does not name, into the object.
fn read_into(
    map: &mut Map<String, Value>,
    message: &[u8],
    ty: TypeId,
    outer: &[u32],
    limits: Limits<'_>,
) -> Result<(), ProtobufError> {
    if limits.depth > DEEPEST {
        return Err(TooMuch::Depth.into());
    }
    let types = &table::get(ty).fields;
    for entry in fields(message) {
        let (number, wire) = entry?;
        let found = types
            .iter()
            .find(|field| field.number == number && *field.outer == *outer);
        let Some(field) = found else {
            let within = [outer, &[number]].concat();
            let embeds = types.iter().any(|field| field.outer.starts_with(&within));
            match wire {
                Wire::Bytes(bytes) if embeds => {
                    read_into(map, bytes, ty, &within, limits.deeper())?
                }
                // What a newer client knows and this server does not is left out, but not what it knows in JSON.
                _ if types
                    .iter()
                    .any(|field| field.number == 0 && !is_type_meta(field.name)) =>
                {
                    return Err(ProtobufError::Unnumbered(table::get(ty).name, number));
                }
                _ => {}
            }
            continue;
        };
        match &field.kind {
            Kind::List(inner) => {
                let items = map.entry(field.name).or_insert_with(|| json!([]));
                if let Some(items) = items.as_array_mut() {
                    many(&wire, inner, limits, items)?;
                }
            }
            Kind::Map(inner) => {
                let (key, value) = entry_of(&wire, inner, limits)?;
                let entries = map.entry(field.name).or_insert_with(|| json!({}));
                entries[key] = value;
            }
            kind => {
                let value = one(&wire, kind, limits)?;
                map.insert(field.name.to_owned(), value);
            }
        }
    }
    Ok(())
}

/// These travel in the envelope.
fn is_type_meta(name: &str) -> bool {
    matches!(name, "kind" | "apiVersion")
}

/// An item of a repeated field, or several numbers packed into one.
fn many(
    wire: &Wire<'_>,
    kind: &Kind,
    limits: Limits<'_>,
    items: &mut Vec<Value>,
) -> Result<(), ProtobufError> {
    if let (Wire::Bytes(packed), Kind::Int32 | Kind::Int64 | Kind::Boolean) = (wire, kind) {
        let mut packed = *packed;
        while !packed.is_empty() {
            let number = Wire::Number(varint(&mut packed)?);
            items.push(one(&number, kind, limits)?);
        }
        return Ok(());
    }
    items.push(one(wire, kind, limits)?);
    Ok(())
}

fn entry_of(
    wire: &Wire<'_>,
    kind: &Kind,
    limits: Limits<'_>,
) -> Result<(String, Value), ProtobufError> {
    let Wire::Bytes(message) = wire else {
        return Err(Malformed("wrong wireType of a map's entry"));
    };
    let (mut key, mut value) = (String::new(), None);
    for entry in fields(message) {
        match entry? {
            (1, Wire::Bytes(bytes)) => key = text(bytes)?,
            (2, wire) => value = Some(one(&wire, kind, limits)?),
            _ => {}
        }
    }
    let value = value.map_or_else(|| one(&Wire::Bytes(&[]), kind, limits), Ok)?;
    Ok((key, value))
}

fn one(wire: &Wire<'_>, kind: &Kind, limits: Limits<'_>) -> Result<Value, ProtobufError> {
    limits.budget.value()?;
    let wrong = Err(Malformed("wrong wireType"));
    Ok(match (kind, wire) {
        (Kind::Boolean, Wire::Number(number)) => (*number != 0).into(),
        (Kind::Int32 | Kind::Int64, Wire::Number(number)) => number.cast_signed().into(),
        (Kind::Double, Wire::Number(bits)) => f64::from_bits(*bits).into(),
        (_, Wire::Number(_)) => return wrong,
        (Kind::String, Wire::Bytes(bytes)) => text(bytes)?.into(),
        (Kind::Bytes, Wire::Bytes(bytes)) => {
            use base64::Engine;
            base64::engine::general_purpose::STANDARD
                .encode(bytes)
                .into()
        }
        (Kind::Struct(ty), Wire::Bytes(bytes)) => structure(bytes, *ty, limits.deeper())?,
        (Kind::Quantity, Wire::Bytes(bytes)) => {
            let mut quantity = String::new();
            for field in fields(bytes) {
                if let (1, Wire::Bytes(bytes)) = field? {
                    quantity = text(bytes)?;
                }
            }
            if quantity.is_empty() {
                "0".into()
            } else {
                quantity.into()
            }
        }
        (Kind::IntOrString, Wire::Bytes(bytes)) => int_or_string(bytes)?,
        (Kind::Time | Kind::MicroTime, Wire::Bytes(bytes)) => moment(bytes, kind)?,
        // Free-form JSON travels as it is, in the only field of its message.
        (Kind::Any, Wire::Bytes(bytes)) => {
            let mut value = Value::Null;
            for field in fields(bytes) {
                if let (1, Wire::Bytes(json)) = field? {
                    value = crate::decode::free_form(json, limits.budget).map_err(|_| {
                        Malformed("a raw value is not JSON, or has too many values")
                    })?;
                }
            }
            value
        }
        // A list within a map is a message of its own.
        (Kind::List(inner), Wire::Bytes(bytes)) => {
            let mut items = Vec::new();
            for field in fields(bytes) {
                if let (1, wire) = field? {
                    many(&wire, inner, limits.deeper(), &mut items)?;
                }
            }
            items.into()
        }
        (Kind::Int32 | Kind::Int64 | Kind::Boolean | Kind::Double | Kind::Map(_), _) => {
            return wrong;
        }
    })
}

fn int_or_string(message: &[u8]) -> Result<Value, ProtobufError> {
    let (mut is_text, mut number, mut word) = (false, 0, String::new());
    for field in fields(message) {
        match field? {
            (1, Wire::Number(kind)) => is_text = kind == 1,
            (2, Wire::Number(value)) => number = value.cast_signed(),
            (3, Wire::Bytes(bytes)) => word = text(bytes)?,
            _ => {}
        }
    }
    Ok(if is_text { word.into() } else { number.into() })
}

fn moment(message: &[u8], kind: &Kind) -> Result<Value, ProtobufError> {
    // A moment that was never set is an empty message.
    if message.is_empty() {
        return Ok(Value::Null);
    }
    let (mut seconds, mut nanos) = (0_i64, 0_i64);
    for field in fields(message) {
        match field? {
            (1, Wire::Number(value)) => seconds = value.cast_signed(),
            (2, Wire::Number(value)) => nanos = value.cast_signed(),
            _ => {}
        }
    }
    const OUTSIDE: ProtobufError = Malformed("a moment is out of range");
    let moment = OffsetDateTime::from_unix_timestamp(seconds).map_err(|_| OUTSIDE)?;
    let nanos = u32::try_from(nanos).unwrap_or(0);
    let written = if matches!(kind, Kind::MicroTime) {
        moment
            .replace_nanosecond(nanos.min(999_999_999))
            .unwrap_or(moment)
            .format(format_description!(
                "[year]-[month]-[day]T[hour]:[minute]:[second].[subsecond digits:6]Z"
            ))
    } else {
        moment.format(&Rfc3339)
    };
    Ok(written.map_err(|_| OUTSIDE)?.into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_kubectl_sends_for_a_namespace_is_read() {
        let body = b"k8s\0\x0a\x0f\x0a\x02v1\x12\x09Namespace\x12\x19\x0a\x11\x0a\x01z\x12\0\x1a\0\"\0*\x002\x008\0B\0\x12\0\x1a\x02\x0a\0\x1a\0\"\0";
        let envelope = open(body).unwrap();
        assert_eq!(envelope.kind, "Namespace");
        let ty = table::type_of_kind("", "v1", "Namespace").unwrap();
        let object = decode(envelope.raw, ty).unwrap();
        assert_eq!(object["metadata"]["name"], "z", "{object}");
    }

    /// A field with a message's bytes.
    fn nested(number: u8, inner: &[u8]) -> Vec<u8> {
        let mut message = vec![number << 3 | 2];
        let mut length = inner.len();
        while length > 0x7f {
            message.push(length as u8 | 0x80);
            length >>= 7;
        }
        message.push(length as u8);
        message.extend_from_slice(inner);
        message
    }

    #[test]
    fn a_small_body_cannot_become_a_huge_object() {
        let pod = table::type_of_kind("", "v1", "Pod").unwrap();
        // Two bytes make a container, which has half a kilobyte of fields that are always written.
        let spec = [0x12, 0].repeat(1_500_000);
        let refused = decode(&nested(2, &spec), pod).unwrap_err();
        assert!(matches!(refused, ProtobufError::TooMuch(_)), "{refused}");
        // Text that travels as it is costs the same.
        let raw = format!("[{}0]", "[],".repeat(1_000_000));
        let revision = table::type_of_kind("apps", "v1", "ControllerRevision").unwrap();
        let message = nested(2, &nested(1, raw.as_bytes()));
        assert!(decode(&message, revision).is_err());
        let message = nested(2, &nested(1, b"{\"a\":[1]}"));
        let sound = decode(&message, revision).unwrap();
        assert_eq!(sound["data"]["a"][0], 1);
    }

    #[test]
    fn deep_nesting_is_refused_before_the_stack_ends() {
        let schema = "io.k8s.apiextensions-apiserver.pkg.apis.apiextensions.v1.JSONSchemaProps";
        let ty = table::type_by_name(schema).unwrap();
        let not = table::get(ty).field("not").unwrap().number;
        let mut message = Vec::new();
        for _ in 0..10_000 {
            let mut outer = Vec::new();
            // Field numbers above 15 have a tag of two bytes.
            let mut tag = u64::from(not) << 3 | 2;
            for number in [&mut tag, &mut (message.len() as u64)] {
                while *number > 0x7f {
                    outer.push(*number as u8 | 0x80);
                    *number >>= 7;
                }
                outer.push(*number as u8);
            }
            outer.extend_from_slice(&message);
            message = outer;
        }
        let refused = decode(&message, ty).unwrap_err();
        assert_eq!(refused.to_string(), "proto: exceeded max depth");
    }
}
