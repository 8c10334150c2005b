//! Questions to resolvers and their answers (RFC 1035).

use std::fmt::Write as _;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use simple_dns::rdata::RData;
use simple_dns::{Name, Packet, PacketFlag, QTYPE, TYPE};
use smallvec::{SmallVec, smallvec};
use xebec_dataplane_common::TCP;
use xebec_dataplane_common::flow::Event;
use xebec_dataplane_common::ip::Ip;
use xebec_hubble::flow::layer7::Record;
use xebec_hubble::flow::{Dns, L7FlowType, Layer7};

use super::Waiting;
use crate::domains::Answer;

/// How long a resolver is waited for: it gives up itself before, ns.
const PATIENCE: u64 = 15 * 1_000_000_000;
/// Where it was seen, as Hubble has `proxy` for what Cilium's own resolver saw.
const SOURCE: &str = "datapath";

/// What a message says.
pub(super) struct Message {
    id: u16,
    kind: L7FlowType,
    said: Dns,
    /// The name that was asked for, as names are compared, and the addresses that it has for so many seconds.
    pub name: String,
    pub addresses: Vec<(IpAddr, u32)>,
}

/// The messages in the payload of a packet; of TCP, those that begin and end in it.
pub(super) fn messages(protocol: u8, payload: &[u8]) -> SmallVec<[&[u8]; 1]> {
    // Some write the length of a message in a segment of its own.
    if protocol != TCP || Packet::parse(payload).is_ok() {
        return smallvec![payload];
    }
    let (mut rest, mut messages) = (payload, SmallVec::new());
    while let Some((length, behind)) = rest.split_first_chunk::<2>() {
        let length = usize::from(u16::from_be_bytes(*length));
        let Some((message, after)) = behind.split_at_checked(length) else {
            break;
        };
        messages.push(message);
        rest = after;
    }
    messages
}

/// A name as in zone files (RFC 1035, 5.1), with the dot at its end.
fn text(name: &Name<'_>) -> String {
    let mut text = String::new();
    for label in name.as_bytes() {
        for byte in label {
            let _ = match byte {
                b'.' | b'\\' => write!(text, "\\{}", char::from(*byte)),
                b'!'..=b'~' => write!(text, "{}", char::from(*byte)),
                _ => write!(text, "\\{byte:03}"),
            };
        }
        text.push('.');
    }
    if text.is_empty() {
        text.push('.');
    }
    text
}

fn type_name(one: TYPE) -> String {
    match one {
        TYPE::Unknown(number) => format!("TYPE{number}"),
        other => format!("{other:?}"),
    }
}

fn question_type(one: QTYPE) -> String {
    match one {
        QTYPE::TYPE(one) => type_name(one),
        other => format!("{other:?}"),
    }
}

/// What a code of an answer is called (IANA's registry, in the words of Hubble's metrics).
pub(in super::super) fn rcode(code: u32) -> &'static str {
    const NAMES: [&str; 11] = [
        "No Error",
        "Format Error",
        "Server Failure",
        "Non-Existent Domain",
        "Not Implemented",
        "Query Refused",
        "Name Exists when it should not",
        "RR Set Exists when it should not",
        "RR Set that should exist does not",
        "Server Not Authoritative for zone",
        "Name not contained in zone",
    ];
    let name = usize::try_from(code).ok().and_then(|code| NAMES.get(code));
    name.copied().unwrap_or("Unknown")
}

impl Message {
    /// None where it is no message.
    pub fn read(bytes: &[u8]) -> Option<Self> {
        // What is cut off still says what was asked, and whether that failed.
        let begun = || {
            let mut begun = bytes.to_vec();
            begun.get_mut(6..12)?.fill(0);
            Some(begun)
        };
        let copy;
        let message = match Packet::parse(bytes) {
            Ok(message) => message,
            Err(_) => {
                copy = begun()?;
                Packet::parse(&copy).ok()?
            }
        };
        let question = message.questions.first()?;
        let answers = message.has_flags(PacketFlag::RESPONSE);
        let mut said = Dns {
            query: text(&question.qname),
            observation_source: SOURCE.to_owned(),
            qtypes: message
                .questions
                .iter()
                .map(|one| question_type(one.qtype))
                .collect(),
            ..Dns::default()
        };
        if answers {
            // The higher bits are in no message that resolvers of pods send.
            said.rcode = u32::from(bytes.get(3)? & 0xf);
            said.ttl = message.answers.iter().map(|one| one.ttl).min().unwrap_or(0);
            for record in &message.answers {
                let kind = type_name(record.rdata.type_code());
                match &record.rdata {
                    RData::A(one) => said.ips.push(Ipv4Addr::from(one.address).to_string()),
                    RData::AAAA(one) => said.ips.push(Ipv6Addr::from(one.address).to_string()),
                    RData::CNAME(to) => said.cnames.push(text(&to.0)),
                    _ => {}
                }
                said.rrtypes.push(kind);
            }
        }
        let answer = Answer::of(&message);
        let (name, addresses) = answer
            .map(|one| (one.name, one.addresses))
            .unwrap_or_default();
        Some(Self {
            id: message.id(),
            kind: if answers {
                L7FlowType::Response
            } else {
                L7FlowType::Request
            },
            said,
            name,
            addresses,
        })
    }
}

/// Client, its port, resolver, and the question's number.
type Key = (Ip, u16, Ip, u16);

/// Questions that wait for their answers.
#[derive(Default)]
pub(super) struct Questions(Waiting<Key, ()>);

impl Questions {
    /// Tells of a message; of an answer, how long it took.
    pub fn hear(&mut self, event: &Event, message: Message) -> Layer7 {
        let (from, to) = (event.source, event.destination);
        let mut latency = 0;
        if message.kind == L7FlowType::Response {
            let key = (to, event.destination_port, from, message.id);
            if let Some((asked, ())) = self.0.take(&key) {
                latency = event.time.saturating_sub(asked);
            }
        } else {
            let key = (from, event.source_port, to, message.id);
            self.0.put(key, (), event.time);
        }
        Layer7 {
            r#type: message.kind.into(),
            latency_ns: latency,
            record: Some(Record::Dns(message.said)),
        }
    }

    /// Forgets what will not be answered any more, and tells how much that is.
    pub fn tidy(&mut self, now: u64) -> u64 {
        self.0.forget(now.saturating_sub(PATIENCE))
    }
}

/// In Hubble's words.
pub(super) fn summary(kind: L7FlowType, said: &Dns) -> String {
    let types = said.qtypes.join(",");
    if kind == L7FlowType::Request {
        return format!("DNS Query {} {types}", said.query);
    }
    let mut answer = Vec::new();
    if said.rcode != 0 {
        answer.push(format!("RCode: {}", rcode(said.rcode)));
    } else {
        if !said.ips.is_empty() {
            answer.push(format!("{:?}", said.ips.join(",")));
        }
        if !said.cnames.is_empty() {
            answer.push(format!("CNAMEs: {:?}", said.cnames.join(",")));
        }
    }
    format!(
        "DNS Answer {} TTL: {} (Query {} {types})",
        answer.join(" "),
        said.ttl,
        said.query
    )
}
