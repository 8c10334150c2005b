//! Protobuf's own messages (package `google.protobuf`) as far as they are used here, with the JSON that the standard
//! says they have.

use std::collections::BTreeMap;

use jiff::Timestamp as Time;
use serde::de::Error as _;
use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// A time.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, prost::Message)]
pub struct Timestamp {
    /// Seconds since 1970.
    #[prost(int64, tag = "1")]
    pub seconds: i64,
    /// The part of the second that is over, ns.
    #[prost(int32, tag = "2")]
    pub nanos: i32,
}

impl Timestamp {
    /// A time in ns since 1970.
    #[must_use]
    pub const fn from_nanos(nanos: i64) -> Self {
        Self {
            seconds: nanos.div_euclid(1_000_000_000),
            nanos: nanos.rem_euclid(1_000_000_000) as i32,
        }
    }

    /// ns since 1970; what is too far away is as far as can be.
    #[must_use]
    pub const fn as_nanos(&self) -> i64 {
        self.seconds
            .saturating_mul(1_000_000_000)
            .saturating_add(self.nanos as i64)
    }
}

impl From<Time> for Timestamp {
    fn from(time: Time) -> Self {
        Self {
            seconds: time.as_second(),
            nanos: time.subsec_nanosecond(),
        }
    }
}

impl TryFrom<Timestamp> for Time {
    type Error = jiff::Error;

    fn try_from(time: Timestamp) -> Result<Self, jiff::Error> {
        Self::new(time.seconds, time.nanos)
    }
}

impl Serialize for Timestamp {
    /// RFC 3339 in UTC, with 0, 3, 6 or 9 digits of the second's part.
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let time = Time::try_from(*self).map_err(serde::ser::Error::custom)?;
        let digits = match time.subsec_nanosecond() {
            0 => 0,
            nanos if nanos % 1_000_000 == 0 => 3,
            nanos if nanos % 1_000 == 0 => 6,
            _ => 9,
        };
        serializer.collect_str(&format_args!("{time:.digits$}"))
    }
}

impl<'de> Deserialize<'de> for Timestamp {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        text.parse::<Time>()
            .map(Self::from)
            .map_err(|_| D::Error::custom(format!("{text:?} is no time of RFC 3339")))
    }
}

/// Fields of a message.
#[derive(Clone, PartialEq, Eq, Hash, prost::Message)]
pub struct FieldMask {
    /// Their paths, such as `source.pod_name`.
    #[prost(string, repeated, tag = "1")]
    pub paths: Vec<String>,
}

impl Serialize for FieldMask {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&self.paths.join(","))
    }
}

impl<'de> Deserialize<'de> for FieldMask {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        let paths = text.split(',').filter(|path| !path.is_empty());
        Ok(Self {
            paths: paths.map(str::to_owned).collect(),
        })
    }
}

/// Any message. [`Struct`] alone is known here; the JSON of all others keeps their type alone.
#[derive(Clone, PartialEq, Eq, Hash, prost::Message)]
pub struct Any {
    /// Its type's URL.
    #[prost(string, tag = "1")]
    pub type_url: String,
    /// Its bytes.
    #[prost(bytes = "vec", tag = "2")]
    pub value: Vec<u8>,
}

/// The type's URL of [`Struct`].
const STRUCT: &str = "type.googleapis.com/google.protobuf.Struct";

impl From<&Struct> for Any {
    fn from(value: &Struct) -> Self {
        Self {
            type_url: STRUCT.to_owned(),
            value: prost::Message::encode_to_vec(value),
        }
    }
}

impl Any {
    /// The structure that it is, if it is one.
    #[must_use]
    pub fn as_struct(&self) -> Option<Struct> {
        (self.type_url == STRUCT)
            .then(|| prost::Message::decode(&*self.value).ok())
            .flatten()
    }
}

#[derive(Serialize, Deserialize)]
struct AnyJson {
    #[serde(rename = "@type")]
    type_url: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    value: Option<Struct>,
}

impl Serialize for Any {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let value = self.as_struct();
        let type_url = self.type_url.clone();
        AnyJson { type_url, value }.serialize(serializer)
    }
}

impl<'de> Deserialize<'de> for Any {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let AnyJson { type_url, value } = AnyJson::deserialize(deserializer)?;
        let value = value.map(|value| prost::Message::encode_to_vec(&value));
        Ok(Self {
            type_url,
            value: value.unwrap_or_default(),
        })
    }
}

/// What JSON's objects can say.
#[derive(Clone, PartialEq, prost::Message, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Struct {
    /// By name.
    #[prost(btree_map = "string, message", tag = "1")]
    pub fields: BTreeMap<String, Value>,
}

/// What JSON can say; null without a kind.
#[derive(Clone, PartialEq, prost::Message, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Value {
    /// What it is.
    #[prost(oneof = "Kind", tags = "2, 3, 4, 5, 6")]
    pub kind: Option<Kind>,
}

/// Kinds of [`Value`].
#[derive(Clone, PartialEq, prost::Oneof, Serialize, Deserialize)]
#[serde(untagged)]
pub enum Kind {
    /// A number.
    #[prost(double, tag = "2")]
    Number(#[serde(serialize_with = "number")] f64),
    /// A text.
    #[prost(string, tag = "3")]
    String(String),
    /// Yes or no.
    #[prost(bool, tag = "4")]
    Bool(bool),
    /// An object.
    #[prost(message, tag = "5")]
    Struct(Struct),
    /// An array.
    #[prost(message, tag = "6")]
    List(List),
}

/// An array of JSON.
#[derive(Clone, PartialEq, prost::Message, Serialize, Deserialize)]
#[serde(transparent)]
pub struct List {
    /// Its values.
    #[prost(message, repeated, tag = "1")]
    pub values: Vec<Value>,
}

/// As protobuf writes it: whole numbers without a fraction.
fn number<S: Serializer>(value: &f64, serializer: S) -> Result<S::Ok, S::Error> {
    const EXACT: f64 = 9_007_199_254_740_992.0;
    if value.fract() == 0.0 && value.abs() <= EXACT {
        serializer.serialize_i64(*value as i64)
    } else {
        serializer.serialize_f64(*value)
    }
}

impl From<f64> for Value {
    fn from(value: f64) -> Self {
        let kind = Some(Kind::Number(value));
        Self { kind }
    }
}

impl From<String> for Value {
    fn from(value: String) -> Self {
        let kind = Some(Kind::String(value));
        Self { kind }
    }
}

impl Struct {
    /// A number by its name.
    #[must_use]
    pub fn number(&self, name: &str) -> Option<f64> {
        match self.fields.get(name)?.kind.as_ref()? {
            Kind::Number(number) => Some(*number),
            _ => None,
        }
    }
}

/// Values that may be absent, whose JSON is the bare value.
macro_rules! wrapper {
    ($name:ident, $kind:ident, $of:ty) => {
        /// A value that may be absent.
        #[derive(Clone, Copy, PartialEq, Eq, Hash, prost::Message, Serialize, Deserialize)]
        #[serde(transparent)]
        pub struct $name {
            /// The value.
            #[prost($kind, tag = "1")]
            pub value: $of,
        }

        impl From<$of> for $name {
            fn from(value: $of) -> Self {
                Self { value }
            }
        }
    };
}

wrapper!(BoolValue, bool, bool);
wrapper!(Int32Value, int32, i32);
wrapper!(UInt32Value, uint32, u32);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_have_as_many_digits_as_protobuf_says() {
        for (nanos, text) in [
            (0, "2026-01-02T03:04:10Z"),
            (120_000_000, "2026-01-02T03:04:10.120Z"),
            (120_400_000, "2026-01-02T03:04:10.120400Z"),
            (1, "2026-01-02T03:04:10.000000001Z"),
        ] {
            let time = Timestamp {
                seconds: 1_767_323_050,
                nanos,
            };
            let json = serde_json::to_value(time).unwrap();
            assert_eq!(json, text);
            assert_eq!(serde_json::from_value::<Timestamp>(json).unwrap(), time);
            assert_eq!(Timestamp::from_nanos(time.as_nanos()), time);
        }
        let zoned: Timestamp = serde_json::from_str("\"2026-01-02T04:04:10+01:00\"").unwrap();
        assert_eq!(zoned.seconds, 1_767_323_050);
        assert!(serde_json::from_str::<Timestamp>("\"today\"").is_err());
        let far = Timestamp {
            seconds: i64::MAX,
            nanos: 0,
        };
        assert!(serde_json::to_value(far).is_err());
        assert_eq!(far.as_nanos(), i64::MAX);
        assert_eq!(Timestamp::from_nanos(-1).nanos, 999_999_999);
    }

    #[test]
    fn the_others_are_as_protobuf_says() {
        let mask = FieldMask {
            paths: vec!["a.b".into(), "c".into()],
        };
        let json = serde_json::to_value(&mask).unwrap();
        assert_eq!(json, "a.b,c");
        assert_eq!(serde_json::from_value::<FieldMask>(json).unwrap(), mask);
        assert_eq!(serde_json::to_value(BoolValue::from(false)).unwrap(), false);
        assert_eq!(
            serde_json::from_str::<UInt32Value>("7").unwrap(),
            UInt32Value { value: 7 }
        );
    }

    #[test]
    fn any_is_a_structure_with_its_json_or_its_type_alone() {
        let json = r#"{"@type":"type.googleapis.com/google.protobuf.Struct","value":{"a":[1,2.5,null,"x"],"b":{"c":true}}}"#;
        let any: Any = serde_json::from_str(json).unwrap();
        assert_eq!(serde_json::to_string(&any).unwrap(), json);
        let encoded = prost::Message::encode_to_vec(&any);
        let decoded: Any = prost::Message::decode(&*encoded).unwrap();
        assert_eq!(decoded, any);
        let other = r#"{"@type":"type.googleapis.com/other"}"#;
        let any: Any = serde_json::from_str(other).unwrap();
        assert_eq!(serde_json::to_string(&any).unwrap(), other);
        assert_eq!(any.as_struct(), None);
    }
}
