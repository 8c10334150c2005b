//! What messages say: questions to resolvers and their answers, requests of HTTP/1 and theirs.

mod dns;
mod http;
mod names;

use std::sync::Arc;

use hashbrown::HashMap;
use smallvec::SmallVec;
use std::hash::Hash;
use xebec_dataplane_common::flow::Event;
use xebec_dataplane_common::ip::Ip;
use xebec_hubble::flow::layer7::Record;
use xebec_hubble::flow::{L7FlowType, Layer7};
use xebec_policy::names::Peer;

pub(super) use dns::rcode;
pub use http::Options as HttpOptions;
use names::Names;

/// How many questions may wait for answers; those beyond get no latency.
const WAITING: usize = 16_384;

/// Listens to messages, and keeps in mind what they were about.
#[derive(Default)]
pub(super) struct Listener {
    options: HttpOptions,
    questions: dns::Questions,
    requests: http::Requests,
    names: Names,
}

/// What one packet says.
pub(super) type Said = SmallVec<[Layer7; 1]>;

impl Listener {
    /// Tells of HTTP as these options have it.
    pub fn new(options: HttpOptions) -> Self {
        Self {
            options,
            ..Self::default()
        }
    }

    /// What a packet says: nothing where it can't be read, or was heard before. `whom` is who got it.
    pub fn hear(&mut self, event: &Event, bytes: &[u8], whom: &Arc<Peer>) -> Said {
        if let Some(message) = http::read(bytes, &self.options) {
            return self.requests.hear(event, message).into_iter().collect();
        }
        let mut said = Said::new();
        for message in dns::messages(event.protocol, bytes) {
            let Some(message) = dns::Message::read(message) else {
                continue;
            };
            for (address, ttl) in &message.addresses {
                let name = message.name.as_str();
                let at = event.time;
                self.names
                    .learn((event.destination, (*address).into()), whom, name, *ttl, at);
            }
            said.push(self.questions.hear(event, message));
        }
        said
    }

    /// The names that `whom` at this address asked for and got the other address for, the last one first.
    pub fn names(&mut self, whom: &Peer, own: Ip, other: Ip, now: u64) -> Option<Arc<Vec<String>>> {
        self.names.get((own, other), whom, now)
    }

    /// Forgets what nobody has answered, and tells how many questions to resolvers were among that.
    pub fn tidy(&mut self, now: u64) -> u64 {
        self.requests.tidy(now);
        self.questions.tidy(now)
    }
}

/// As Hubble tells of it in a line.
pub(super) fn summary(said: &Layer7) -> String {
    match &said.record {
        Some(Record::Dns(one)) => dns::summary(said.r#type(), one),
        Some(Record::Http(one)) => http::summary(said, one),
        None => String::new(),
    }
}

/// Whether it answers.
pub(super) fn is_response(said: &Layer7) -> bool {
    said.r#type() == L7FlowType::Response
}

/// What waits for its answer, each since a moment (ns of the kernel's clock).
struct Waiting<K, V>(HashMap<K, (u64, V)>);

impl<K, V> Default for Waiting<K, V> {
    fn default() -> Self {
        Self(HashMap::new())
    }
}

impl<K: Eq + Hash, V> Waiting<K, V> {
    fn put(&mut self, key: K, value: V, now: u64) {
        if self.0.len() < WAITING || self.0.contains_key(&key) {
            self.0.insert(key, (now, value));
        }
    }

    fn take(&mut self, key: &K) -> Option<(u64, V)> {
        self.0.remove(key)
    }

    fn get_mut(&mut self, key: &K) -> Option<&mut (u64, V)> {
        self.0.get_mut(key)
    }

    /// Forgets what has waited since before a moment, and tells how much that was.
    fn forget(&mut self, before: u64) -> u64 {
        let all = self.0.len();
        self.0.retain(|_, (since, _)| *since >= before);
        (all - self.0.len()) as u64
    }
}

#[cfg(test)]
mod tests;
