//! Requests and answers of HTTP/1 (RFC 9112): their first lines, and of requests the host.

use std::collections::VecDeque;

use xebec_dataplane_common::flow::Event;
use xebec_dataplane_common::ip::Ip;
use xebec_hubble::flow::layer7::Record;
use xebec_hubble::flow::{Http, L7FlowType, Layer7};

use super::Waiting;

/// How long an answer is waited for, ns.
const PATIENCE: u64 = 600 * 1_000_000_000;
/// How many requests of a connection may wait.
const PIPELINED: usize = 16;
/// How many headers the beginning of a message can have.
const HEADERS: usize = 128;
/// Stands for what of a URL was not seen.
const CUT: &str = "…";

/// What is told of HTTP.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Options {
    /// Whether URLs are told without their queries.
    pub redact_query: bool,
}

impl Default for Options {
    fn default() -> Self {
        Self { redact_query: true }
    }
}

/// What a message says.
pub(super) enum Message {
    Request(Http),
    Response { code: u32, protocol: String },
}

/// Reads the beginning of a message; none where it is none of HTTP/1.
pub(super) fn read(bytes: &[u8], options: &Options) -> Option<Message> {
    let mut headers = [httparse::EMPTY_HEADER; HEADERS];
    if bytes.starts_with(b"HTTP/1.") {
        let mut response = httparse::Response::new(&mut headers);
        response.parse(bytes).ok()?;
        return Some(Message::Response {
            code: response.code?.into(),
            protocol: protocol(response.version?),
        });
    }
    let mut request = httparse::Request::new(&mut headers);
    request.parse(bytes).ok()?;
    let method = request.method?.to_owned();
    // Without the line's end, all that there is of it is the target's beginning.
    let (target, protocol) = match (request.path, request.version) {
        (Some(path), Some(version)) => (path.to_owned(), protocol(version)),
        _ => {
            let line = std::str::from_utf8(bytes.get(method.len() + 1..)?).ok()?;
            let target = line.split(' ').next().unwrap_or_default();
            (format!("{target}{CUT}"), String::new())
        }
    };
    Some(Message::Request(Http {
        url: url(&target, host(bytes), options),
        method,
        protocol,
        ..Http::default()
    }))
}

fn protocol(version: u8) -> String {
    format!("HTTP/1.{version}")
}

/// The `Host` of a request, if it is among what was seen.
fn host(bytes: &[u8]) -> Option<&str> {
    let text = match std::str::from_utf8(bytes) {
        Ok(text) => text,
        Err(error) => std::str::from_utf8(&bytes[..error.valid_up_to()]).ok()?,
    };
    // Only lines that are whole.
    let (lines, _) = text.rsplit_once("\r\n")?;
    let headers = lines
        .split("\r\n")
        .skip(1)
        .take_while(|line| !line.is_empty());
    headers
        .filter_map(|line| line.split_once(':'))
        .find(|(name, _)| name.eq_ignore_ascii_case("host"))
        .map(|(_, value)| value.trim())
}

/// The URL of a request, without what may be secret in it.
fn url(target: &str, host: Option<&str>, options: &Options) -> String {
    let target = match target.find(['?', '#']) {
        Some(at) if options.redact_query => &target[..at],
        _ => target,
    };
    match (target.split_once("://"), host) {
        (Some((scheme, rest)), _) => {
            let (authority, path) = rest.split_at(rest.find(['/', '?', '#']).unwrap_or(rest.len()));
            let place = authority.rsplit_once('@').map_or(authority, |(_, at)| at);
            format!("{scheme}://{place}{path}")
        }
        (None, Some(host)) if target.starts_with('/') => format!("http://{host}{target}"),
        _ => target.to_owned(),
    }
}

/// Client and server, with their ports.
type Key = (Ip, u16, Ip, u16);

/// A connection: requests without answers, and what came last.
#[derive(Default)]
struct Connection {
    /// When they were sent, in ns of the kernel's clock.
    requests: VecDeque<(u64, Http)>,
    /// TCP sequence numbers of the last request and the last answer: what is sent twice is told once.
    last: [Option<u64>; 2],
    /// Whether so many requests waited that no answer can be told from another any more.
    crowded: bool,
}

impl Connection {
    fn ask(&mut self, now: u64, request: &Http) {
        self.crowded |= self.requests.len() >= PIPELINED;
        if self.crowded {
            self.requests.clear();
        } else {
            self.requests.push_back((now, request.clone()));
        }
    }
}

/// Requests that wait for their answers.
#[derive(Default)]
pub(super) struct Requests(Waiting<Key, Connection>);

impl Requests {
    /// Tells of a message; of an answer, what it answers, and how long it took. None for what was told before.
    pub fn hear(&mut self, event: &Event, message: Message) -> Option<Layer7> {
        let source = (event.source, event.source_port);
        let destination = (event.destination, event.destination_port);
        let request = matches!(message, Message::Request(_));
        let (client, server) = match request {
            true => (source, destination),
            false => (destination, source),
        };
        let key = (client.0, client.1, server.0, server.1);
        if self.0.get_mut(&key).is_none() {
            self.0.put(key, Connection::default(), event.time);
        }
        let mut known = self.0.get_mut(&key);
        if let Some((since, connection)) = &mut known {
            *since = event.time;
            let last = &mut connection.last[usize::from(request)];
            if last.replace(event.socket) == Some(event.socket) {
                return None;
            }
        }
        let connection = known.map(|(_, connection)| connection);
        Some(match message {
            Message::Request(http) => {
                if let Some(connection) = connection {
                    connection.ask(event.time, &http);
                }
                Layer7 {
                    r#type: L7FlowType::Request.into(),
                    latency_ns: 0,
                    record: Some(Record::Http(http)),
                }
            }
            Message::Response { code, protocol } => {
                // What comes before the answer proper (RFC 9110, 15.2) leaves the request open.
                let asked = connection.and_then(|one| match code {
                    100..200 if code != 101 => one.requests.front().cloned(),
                    _ => one.requests.pop_front(),
                });
                let (since, asked) = asked.unwrap_or((event.time, Http::default()));
                Layer7 {
                    r#type: L7FlowType::Response.into(),
                    latency_ns: event.time.saturating_sub(since),
                    record: Some(Record::Http(Http {
                        code,
                        protocol,
                        ..asked
                    })),
                }
            }
        })
    }

    /// Forgets connections that were silent for long.
    pub fn tidy(&mut self, now: u64) {
        self.0.forget(now.saturating_sub(PATIENCE));
    }
}

/// In Hubble's words.
pub(super) fn summary(said: &Layer7, http: &Http) -> String {
    let Http {
        code,
        method,
        url,
        protocol,
        ..
    } = http;
    if said.r#type() == L7FlowType::Request {
        return format!("{protocol} {method} {url}");
    }
    let took = said.latency_ns / 1_000_000;
    format!("{protocol} {code} {took}ms ({method} {url})")
}
