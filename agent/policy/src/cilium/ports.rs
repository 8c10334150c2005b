//! What rules of Cilium are about: ports, and messages of ICMP.

use serde_json::Value;
use xebec_dataplane_common::{ICMP, ICMP6, SCTP, TCP, UDP};

use crate::object::{fields, list};
use crate::rule::Ports;

/// The ports and messages of a rule; none where it names none, which is all.
pub(super) fn read(rule: &Value) -> Result<Option<Vec<Ports>>, String> {
    let of = |error| format!(".{error}");
    let ports = list(rule, "toPorts").map_err(of)?.unwrap_or_default();
    let icmps = list(rule, "icmps").map_err(of)?.unwrap_or_default();
    if !ports.is_empty() && !icmps.is_empty() {
        return Err(": toPorts and icmps can't be in one rule; make two rules of it".to_owned());
    }
    let mut found = Vec::new();
    for (at, one) in ports.iter().enumerate() {
        found.extend(entry(one).map_err(|error| format!(".toPorts[{at}]{error}"))?);
    }
    for (at, one) in icmps.iter().enumerate() {
        found.extend(messages(one).map_err(|error| format!(".icmps[{at}]{error}"))?);
    }
    Ok((!found.is_empty()).then_some(found))
}

/// An entry of `toPorts`.
fn entry(value: &Value) -> Result<Vec<Ports>, String> {
    for field in fields(value) {
        match field {
            "ports" => {}
            "rules" => {
                if let Some(kind) = fields(&value[field]).next() {
                    return Err(format!(
                        ".rules.{kind}: what connections carry can't be enforced; leave it out to mean the whole port"
                    ));
                }
            }
            "serverNames" | "terminatingTLS" | "originatingTLS" | "listener" => {
                return Err(format!(
                    ".{field}: what connections carry can't be enforced; leave it out to mean the whole port"
                ));
            }
            _ => return Err(format!(".{field}: is not known here; leave it out")),
        }
    }
    all(value, "ports", port)
}

/// An entry of `icmps`.
fn messages(value: &Value) -> Result<Vec<Ports>, String> {
    all(value, "fields", |one| Ok(vec![message(one)?]))
}

/// All of a list, which must have some.
fn all(
    value: &Value,
    name: &str,
    read: impl Fn(&Value) -> Result<Vec<Ports>, String>,
) -> Result<Vec<Ports>, String> {
    let entries = list(value, name).map_err(|error| format!(".{error}"))?;
    let mut found = Vec::new();
    for (at, one) in entries.into_iter().flatten().enumerate() {
        found.extend(read(one).map_err(|error| format!(".{name}[{at}]: {error}"))?);
    }
    match found.is_empty() {
        true => Err(format!(".{name}: there are none; name some")),
        false => Ok(found),
    }
}

fn protocols(value: &Value) -> Result<&'static [u8], String> {
    let word = match value {
        Value::Null => String::new(),
        Value::String(word) => word.to_ascii_uppercase(),
        other => other.to_string(),
    };
    match word.as_str() {
        "" | "ANY" => Ok(&[TCP, UDP, SCTP]),
        "TCP" => Ok(&[TCP]),
        "UDP" => Ok(&[UDP]),
        "SCTP" => Ok(&[SCTP]),
        "ICMP" | "ICMPV6" => Err(format!("protocol {value} has no ports; use icmps")),
        _ => Err(format!(
            "protocol {value} is not known; use TCP, UDP, SCTP or ANY"
        )),
    }
}

fn port(value: &Value) -> Result<Vec<Ports>, String> {
    const KNOWN: [&str; 3] = ["port", "endPort", "protocol"];
    if let Some(field) = fields(value).find(|one| !KNOWN.contains(one)) {
        return Err(format!("{field} is not known; leave it out"));
    }
    let text = value["port"].as_str().unwrap_or_default();
    let protocols = protocols(&value["protocol"])?.iter();
    let last = match &value["endPort"] {
        Value::Null => None,
        other => Some(other.as_i64().unwrap_or(-1)).filter(|last| *last != 0),
    };
    let letters = text.bytes().any(|one| one.is_ascii_alphabetic());
    let fits = |one: u8| one.is_ascii_alphanumeric() || one == b'-';
    if letters && text.len() <= 15 && text.bytes().all(fits) {
        if last.is_some() {
            return Err("endPort needs a port that is a number".to_owned());
        }
        let name = text.to_ascii_lowercase();
        return Ok(protocols
            .map(|protocol| Ports::Named {
                protocol: *protocol,
                name: name.as_str().into(),
            })
            .collect());
    }
    let plain = !text.starts_with('0') || text == "0";
    let Some(first) = text.parse::<u16>().ok().filter(|_| plain) else {
        return Err(format!(
            "port {} is neither a number up to 65535 nor a name; write it as a string",
            value["port"]
        ));
    };
    let last = match last {
        None => first,
        Some(last) => u16::try_from(last)
            .ok()
            .filter(|last| *last >= first)
            .ok_or_else(|| {
                format!("endPort {last} is not between port {first} and 65535; write a higher one")
            })?,
    };
    Ok(protocols
        .map(|protocol| match first {
            0 => Ports::Protocol(*protocol),
            _ => Ports::Range {
                protocol: *protocol,
                first,
                last,
            },
        })
        .collect())
}

fn message(value: &Value) -> Result<Ports, String> {
    let (protocol, names): (u8, &[(&str, u8)]) = match value["family"].as_str() {
        Some("IPv4") => (ICMP, &ICMP_NAMES),
        Some("IPv6") => (ICMP6, &ICMP6_NAMES),
        None if value["family"].is_null() => (ICMP, &ICMP_NAMES),
        _ => {
            return Err(format!(
                "family {} is not known; use IPv4 or IPv6",
                value["family"]
            ));
        }
    };
    let kind = match &value["type"] {
        Value::Number(number) => number.as_u64().and_then(|number| number.try_into().ok()),
        Value::String(text) => {
            let named = names.iter().find(|(one, _)| one == text);
            named.map_or_else(|| text.parse().ok(), |(_, kind)| Some(*kind))
        }
        _ => None,
    };
    let kind = kind.ok_or_else(|| {
        format!(
            "type {} is not known; use a number up to 255",
            value["type"]
        )
    })?;
    Ok(Ports::Icmp { protocol, kind })
}

/// What types of ICMP are called.
const ICMP_NAMES: [(&str, u8); 14] = [
    ("EchoReply", 0),
    ("DestinationUnreachable", 3),
    ("Redirect", 5),
    ("Echo", 8),
    ("EchoRequest", 8),
    ("RouterAdvertisement", 9),
    ("RouterSelection", 10),
    ("TimeExceeded", 11),
    ("ParameterProblem", 12),
    ("Timestamp", 13),
    ("TimestampReply", 14),
    ("Photuris", 40),
    ("ExtendedEchoRequest", 42),
    ("ExtendedEchoReply", 43),
];

/// What types of ICMPv6 are called.
const ICMP6_NAMES: [(&str, u8); 27] = [
    ("DestinationUnreachable", 1),
    ("PacketTooBig", 2),
    ("TimeExceeded", 3),
    ("ParameterProblem", 4),
    ("EchoRequest", 128),
    ("EchoReply", 129),
    ("MulticastListenerQuery", 130),
    ("MulticastListenerReport", 131),
    ("MulticastListenerDone", 132),
    ("RouterSolicitation", 133),
    ("RouterAdvertisement", 134),
    ("NeighborSolicitation", 135),
    ("NeighborAdvertisement", 136),
    ("RedirectMessage", 137),
    ("RouterRenumbering", 138),
    ("ICMPNodeInformationQuery", 139),
    ("ICMPNodeInformationResponse", 140),
    ("InverseNeighborDiscoverySolicitation", 141),
    ("InverseNeighborDiscoveryAdvertisement", 142),
    ("HomeAgentAddressDiscoveryRequest", 144),
    ("HomeAgentAddressDiscoveryReply", 145),
    ("MobilePrefixSolicitation", 146),
    ("MobilePrefixAdvertisement", 147),
    ("DuplicateAddressRequestCodeSuffix", 157),
    ("DuplicateAddressConfirmationCodeSuffix", 158),
    ("ExtendedEchoRequest", 160),
    ("ExtendedEchoReply", 161),
];
