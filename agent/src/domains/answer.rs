//! What a DNS message (RFC 1035) says of addresses.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use simple_dns::rdata::RData;
use simple_dns::{Name, Packet, PacketFlag, RCODE};
use xebec_dataplane_common::TCP;
use xebec_policy::domains;

/// Aliases that are followed at most.
const ALIASES: usize = 16;

/// The addresses that a name was told to have.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Answer {
    /// The name that was asked for, as names are compared.
    pub name: String,
    /// Its addresses, and for how many seconds each holds.
    pub addresses: Vec<(IpAddr, u32)>,
}

/// A name, unless it has other characters than names of hosts: a dot within a label would be read as its end.
fn text(name: &Name<'_>) -> Option<String> {
    let mut labels = Vec::new();
    for label in name.as_bytes() {
        let plain = |one: &u8| one.is_ascii_alphanumeric() || matches!(one, b'-' | b'_');
        if !label.iter().all(plain) {
            return None;
        }
        labels.push(std::str::from_utf8(label).ok()?);
    }
    Some(domains::plain(&labels.join(".")))
}

impl Answer {
    /// What the messages in the payload of a packet say; of TCP, those that begin and end in it.
    pub fn all(protocol: u8, payload: &[u8]) -> Vec<Self> {
        if protocol != TCP {
            return Self::read(payload).into_iter().collect();
        }
        let (mut rest, mut found) = (payload, Vec::new());
        while let Some((length, behind)) = rest.split_first_chunk::<2>() {
            let length = usize::from(u16::from_be_bytes(*length));
            let Some((message, after)) = behind.split_at_checked(length) else {
                break;
            };
            found.extend(Self::read(message));
            rest = after;
        }
        found
    }

    fn read(message: &[u8]) -> Option<Self> {
        Self::of(&Packet::parse(message).ok()?)
    }

    /// What a message says; none where it is no answer, or one without addresses.
    pub fn of(message: &Packet<'_>) -> Option<Self> {
        if !message.has_flags(PacketFlag::RESPONSE) || message.rcode() != RCODE::NoError {
            return None;
        }
        let [question] = &message.questions[..] else {
            return None;
        };
        let name = text(&question.qname)?;
        // The answer may be under the name that the asked one is an alias of.
        let mut names = vec![name.clone()];
        let mut holds = u32::MAX;
        for _ in 0..ALIASES {
            let alias = message
                .answers
                .iter()
                .find_map(|record| match &record.rdata {
                    RData::CNAME(to) if text(&record.name).as_ref() == names.last() => {
                        Some((text(&to.0)?, record.ttl))
                    }
                    _ => None,
                });
            match alias {
                Some((to, ttl)) if !names.contains(&to) => {
                    holds = holds.min(ttl);
                    names.push(to);
                }
                _ => break,
            }
        }
        let records = message.answers.iter().filter(|record| {
            let own = text(&record.name);
            own.is_some_and(|own| names.contains(&own))
        });
        let addresses: Vec<(IpAddr, u32)> = records
            .filter_map(|record| {
                let address = match &record.rdata {
                    RData::A(one) => Ipv4Addr::from(one.address).into(),
                    RData::AAAA(one) => Ipv6Addr::from(one.address).into(),
                    _ => return None,
                };
                Some((address, record.ttl.min(holds)))
            })
            .collect();
        (!addresses.is_empty()).then_some(Self { name, addresses })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use simple_dns::rdata::{A, AAAA, CNAME};
    use simple_dns::{CLASS, QCLASS, QTYPE, Question, ResourceRecord, TYPE};
    use xebec_dataplane_common::UDP;

    fn message(asked: &str, records: Vec<(&str, RData<'static>)>) -> Vec<u8> {
        let mut message = Packet::new_reply(7);
        message.questions.push(Question::new(
            Name::new_unchecked(asked).into_owned(),
            QTYPE::TYPE(TYPE::A),
            QCLASS::CLASS(CLASS::IN),
            false,
        ));
        for ((name, data), ttl) in records.into_iter().zip(30..) {
            let name = Name::new_unchecked(name).into_owned();
            let record = ResourceRecord::new(name, CLASS::IN, ttl, data);
            message.answers.push(record);
        }
        message.build_bytes_vec_compressed().unwrap()
    }

    fn address(number: u32) -> RData<'static> {
        RData::A(A { address: number })
    }

    fn alias(to: &'static str) -> RData<'static> {
        RData::CNAME(CNAME(Name::new_unchecked(to)))
    }

    #[test]
    fn addresses_are_those_of_the_name_that_was_asked_for() {
        let bytes = message(
            "WWW.Example.com",
            vec![
                ("www.example.com", alias("cdn.example.net")),
                ("CDN.example.net", address(0xc000_0201)),
                ("other.example", address(0xc000_0202)),
                ("cdn.example.net", RData::AAAA(AAAA { address: 1 << 125 })),
            ],
        );
        let wanted = Answer {
            name: "www.example.com".to_owned(),
            // The alias ends before the address.
            addresses: vec![
                ("192.0.2.1".parse().unwrap(), 30),
                ("2000::".parse().unwrap(), 30),
            ],
        };
        assert_eq!(Answer::all(UDP, &bytes), [wanted]);
    }

    #[test]
    fn what_is_no_answer_says_nothing() {
        let good = message("a.b", vec![("a.b", address(1))]);
        assert_eq!(Answer::all(UDP, &good).len(), 1);
        for length in 0..good.len() {
            assert_eq!(Answer::all(UDP, &good[..length]), [], "{length}");
        }
        let mut query = good.clone();
        query[2] &= 0x7f;
        let mut failed = good.clone();
        failed[3] |= 3;
        for bytes in [
            query,
            failed,
            message("a.b", vec![]),
            message("a.b", vec![("c.d", address(1))]),
            message("a.b", vec![("a.b", alias("c.d")), ("c.d", alias("a.b"))]),
            vec![0xff; 600],
        ] {
            assert_eq!(Answer::all(UDP, &bytes), []);
        }
        // A label that holds a dot is not two.
        let mut dotted = message("aXb.c", vec![("aXb.c", address(1))]);
        let wrong = dotted.iter_mut().filter(|byte| **byte == b'X');
        wrong.for_each(|byte| *byte = b'.');
        assert_eq!(Answer::all(UDP, &dotted), []);
    }

    #[test]
    fn several_messages_may_be_in_one_segment() {
        let one = message("a.b", vec![("a.b", address(1))]);
        let mut stream = Vec::new();
        for _ in 0..2 {
            stream.extend(u16::try_from(one.len()).unwrap().to_be_bytes());
            stream.extend(&one);
        }
        assert_eq!(Answer::all(TCP, &stream).len(), 2);
        assert_eq!(Answer::all(TCP, &stream[..stream.len() - 1]).len(), 1);
        assert_eq!(Answer::all(TCP, &[]), []);
    }
}
