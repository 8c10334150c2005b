//! Field masks (`google.protobuf.FieldMask`): which parts of a flow are wanted; the others stay empty.

use anyhow::{Context, Result, ensure};
use prost::Message;
use prost::encoding::{
    DecodeContext, WireType, decode_key, decode_varint, encode_key, encode_varint,
};

use crate::flow::Flow;
use crate::pb::fields::FLOW;

/// A field of a message: of `Flow`, or of one inside it.
pub(crate) struct Field {
    pub name: &'static str,
    pub number: u32,
    pub inside: &'static [Field],
}

/// What is wanted of a message: the numbers of fields, each with what is wanted inside; nothing there means all.
type Wanted = Vec<(u32, Mask)>;

/// Which fields of a flow are wanted.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Mask(Wanted);

impl Mask {
    /// Reads paths such as `source.pod_name`; none want all.
    ///
    /// # Errors
    /// Says which path names no field of a flow.
    pub fn new<S: AsRef<str>>(paths: &[S]) -> Result<Option<Self>> {
        let mut mask = Self::default();
        for path in paths {
            let path = path.as_ref();
            let mut at = &mut mask;
            let mut fields = FLOW;
            let mut is_new = true;
            let mut parts = path.split('.').peekable();
            while let Some(part) = parts.next() {
                let field = fields.iter().find(|field| field.name == part);
                let field = field
                    .with_context(|| format!("field mask {path:?}: no flow has a {part:?}"))?;
                // All of it is wanted already.
                if !is_new && at.0.is_empty() {
                    break;
                }
                let place = at.0.iter().position(|(number, _)| *number == field.number);
                is_new = place.is_none();
                let place = place.unwrap_or_else(|| {
                    at.0.push((field.number, Self::default()));
                    at.0.len() - 1
                });
                at = &mut at.0[place].1;
                fields = field.inside;
                if parts.peek().is_none() {
                    at.0.clear();
                }
            }
        }
        ensure!(
            paths.is_empty() || !mask.0.is_empty(),
            "an empty field mask"
        );
        Ok((!paths.is_empty()).then_some(mask))
    }

    /// A flow with nothing but what is wanted.
    #[must_use]
    pub fn apply(&self, flow: &Flow) -> Flow {
        let mut kept = Vec::new();
        let whole = flow.encode_to_vec();
        // What was encoded a moment ago can be read.
        self.copy(&whole, &mut kept)
            .and_then(|()| Flow::decode(&*kept).context("a masked flow"))
            .unwrap_or_default()
    }

    /// Copies what is wanted of an encoded message.
    fn copy(&self, mut message: &[u8], kept: &mut Vec<u8>) -> Result<()> {
        while !message.is_empty() {
            let start = message;
            let (number, kind) = decode_key(&mut message)?;
            let inside = if kind == WireType::LengthDelimited {
                let length = usize::try_from(decode_varint(&mut message)?)?;
                let (inside, rest) = message.split_at_checked(length).context("cut off")?;
                message = rest;
                Some(inside)
            } else {
                prost::encoding::skip_field(kind, number, &mut message, DecodeContext::default())?;
                None
            };
            let Some((_, wanted)) = self.0.iter().find(|(one, _)| *one == number) else {
                continue;
            };
            match inside {
                Some(inside) if !wanted.0.is_empty() => {
                    let mut part = Vec::new();
                    wanted.copy(inside, &mut part)?;
                    encode_key(number, kind, kept);
                    encode_varint(part.len() as u64, kept);
                    kept.extend(part);
                }
                _ => kept.extend(&start[..start.len() - message.len()]),
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::flow::{Endpoint, Ip, TcpFlags};
    use crate::flow::{Layer4, Tcp, layer4::Protocol};

    fn flow() -> Flow {
        Flow {
            node_name: "n".into(),
            verdict: 2,
            source: Some(Endpoint {
                pod_name: "p".into(),
                namespace: "s".into(),
                labels: vec!["a".into(), "b".into()],
                ..Endpoint::default()
            }),
            ip: Some(Ip {
                source: "10.0.0.1".into(),
                ..Ip::default()
            }),
            l4: Some(Layer4 {
                protocol: Some(Protocol::Tcp(Tcp {
                    source_port: 7,
                    flags: Some(TcpFlags {
                        syn: true,
                        ..TcpFlags::default()
                    }),
                    ..Tcp::default()
                })),
            }),
            summary: "sum".into(),
            ..Flow::default()
        }
    }

    fn masked(paths: &[&str]) -> Flow {
        Mask::new(paths).unwrap().unwrap().apply(&flow())
    }

    #[test]
    fn nothing_but_what_is_named_is_kept() {
        let kept = masked(&["node_name", "source.labels", "l4.TCP.flags.SYN", "Summary"]);
        let all = flow();
        assert_eq!(kept.node_name, "n");
        assert_eq!(kept.summary, "sum");
        assert_eq!(kept.verdict, 0);
        assert_eq!(kept.ip, None);
        let source = kept.source.unwrap();
        assert_eq!(source.labels, all.source.as_ref().unwrap().labels);
        assert_eq!(source.pod_name, "");
        let Some(Protocol::Tcp(tcp)) = kept.l4.unwrap().protocol else {
            panic!("no TCP");
        };
        assert_eq!(tcp.source_port, 0);
        assert!(tcp.flags.unwrap().syn);
    }

    #[test]
    fn a_whole_message_is_wanted_whatever_else_is_named_of_it() {
        for paths in [&["source", "source.labels"], &["source.labels", "source"]] {
            assert_eq!(masked(paths).source, flow().source);
        }
        assert_eq!(Mask::new::<&str>(&[]).unwrap(), None);
    }

    #[test]
    fn what_no_flow_has_is_refused() {
        for path in ["sauce", "source.pod", "source.pod_name.x", "", "source."] {
            let error = Mask::new(&[path]).unwrap_err().to_string();
            assert!(error.contains("no flow has a"), "{error}");
        }
    }
}
