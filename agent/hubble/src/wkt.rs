//! Protobuf's own messages (package `google.protobuf`) as far as they are used here, with the JSON that the standard
//! says they have.

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

/// Any message; none is known here, and its JSON keeps its type alone.
#[derive(Clone, PartialEq, Eq, Hash, prost::Message, Serialize, Deserialize)]
pub struct Any {
    /// Its type's URL.
    #[prost(string, tag = "1")]
    #[serde(rename = "@type")]
    pub type_url: String,
    /// Its bytes.
    #[prost(bytes = "vec", tag = "2")]
    #[serde(skip)]
    pub value: Vec<u8>,
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
}
