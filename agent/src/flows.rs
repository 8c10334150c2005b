//! Flows: events of the kernel, named and kept, for those who ask who talked to whom.

pub mod export;
mod layer7;
mod message;
pub mod metrics;
pub mod observer;
pub mod peers;
mod reader;
pub(crate) mod serve;
mod store;

use std::hash::{BuildHasher, RandomState};
use std::net::IpAddr;
use std::sync::atomic::AtomicU64;
use std::sync::atomic::Ordering::Relaxed;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use nix::time::{ClockId, clock_gettime};
use tokio::io::unix::AsyncFd;
use tokio::sync::{oneshot, watch};
use tokio_util::sync::CancellationToken;
use xebec_dataplane_common::flow::{
    AT_MESSAGE, AT_POD, AT_SOCKET, Counters, DROPPED, EGRESS, Event, INGRESS, REASON_POLICY,
};
use xebec_dataplane_common::ip::Ip;
use xebec_hubble::flow::{Flow, Layer7};
use xebec_policy::names::{Names, Peer, RuleName};
use xebec_policy::rule::PolicyRef;

pub use crate::maps::Report;
use crate::maps::{Counting, FlowMaps, Rings};
use crate::services::ServiceNames;
pub use layer7::HttpOptions;
use layer7::Listener;
use metrics::{FlowMetrics, Lost};
use store::{Entry, Store};

/// How many flows are kept where nothing else is asked for.
pub const KEPT: usize = 16_384;
/// How long events gather before they are read.
const GATHER: Duration = Duration::from_millis(10);
/// How long ago an event must have been so that all before it are written, whichever CPU writes them: none takes this
/// long, ns.
const WRITTEN: u64 = 1_000_000;
/// How many events are taken while names and flows are held: a millisecond at most, also of a busy CPU.
const AT_ONCE: usize = 256;
/// How often it is looked for questions that nobody answers, at most.
const TIDY: Duration = Duration::from_secs(5);
/// How far this gives way to others: it has a tenth of their share of a busy CPU.
const NICE: i32 = 10;
/// The label of a policy that says which of its rules decided: Hubble has no field for that.
pub const RULE_LABEL: &str = "xebec:rule";
/// What is told of an event.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    /// How policies judged it.
    Verdict,
    /// That it went on.
    Passed,
    /// That it was dropped.
    Dropped,
    /// That it went on as what it was translated to.
    Translated,
    /// What address a socket asked for.
    Asked,
    /// Which one it got.
    Given,
    /// What was said.
    Said,
}

/// One event, with the names that held when it happened.
#[derive(Clone, Debug)]
struct Seen {
    event: Event,
    kind: Kind,
    /// Wall-clock time, in ns since 1970.
    time: i64,
    source: Arc<Peer>,
    destination: Arc<Peer>,
    rule: Option<Arc<RuleName>>,
    denied_by: Option<Arc<Vec<Arc<PolicyRef>>>>,
    /// Namespace and name of the Service that it goes through.
    service: Option<Arc<str>>,
    /// What its source is called by its destination, and what its destination by its source: the names that they asked
    /// for.
    called: [Option<Arc<Vec<String>>>; 2],
    /// What was said.
    said: Option<Arc<Layer7>>,
    /// Whether its receiver is a pod of this node.
    here: bool,
}

impl Seen {
    /// Whether it tells of a packet as nothing else does, which is what metrics count.
    fn is_packet(&self) -> bool {
        self.event.at == AT_POD && matches!(self.kind, Kind::Passed | Kind::Dropped)
    }

    /// The same, of what the packet becomes.
    fn becomes(&self, kind: Kind, names: &xebec_policy::names::Now, world: &Arc<Peer>) -> Self {
        let mut seen = self.clone();
        let event = &mut seen.event;
        event.destination = event.new_destination;
        event.destination_port = event.new_destination_port;
        let to = event.destination.into();
        seen.destination = names.peer(to).unwrap_or(world).clone();
        seen.here = names.is_local(to);
        seen.called[1] = None;
        seen.kind = kind;
        seen
    }

    /// The same, of a message: its direction is that of the connection, seen from the pod that it was told of at.
    fn says(mut self, said: Layer7) -> Self {
        let event = &mut self.event;
        let answers = layer7::is_response(&said);
        event.reply = answers.into();
        if answers {
            event.direction = INGRESS + EGRESS - event.direction;
        }
        self.said = Some(Arc::new(said));
        self
    }
}

/// Gives this thread a smaller share of a busy CPU: who reads what others did must not slow them down.
fn give_way() {
    // SAFETY: the function takes numbers alone; on Linux 0 is the calling thread (setpriority(2)).
    if unsafe { libc::setpriority(libc::PRIO_PROCESS, 0, NICE) } != 0 {
        let error = std::io::Error::last_os_error();
        tracing::warn!(%error, "events of flows are read with the priority of all else");
    }
}

/// Who is who.
#[derive(Clone, Default)]
pub struct Directory {
    /// Pods, nodes, rules.
    pub names: Names,
    /// Services.
    pub services: ServiceNames,
    /// The node's addresses.
    pub node_ips: Vec<IpAddr>,
}

/// All flows of the node; cheap to clone.
#[derive(Clone)]
pub struct Flows {
    store: Arc<Mutex<Store>>,
    listener: Arc<Mutex<Listener>>,
    /// How many flows there ever were.
    news: Arc<watch::Sender<u64>>,
    /// Tells this agent's flows from those of the one before it.
    session: u64,
    directory: Arc<Directory>,
    /// Whoever has no name.
    world: Arc<Peer>,
    node_name: Arc<str>,
    metrics: FlowMetrics,
    counters: Option<Arc<Counting>>,
    /// How many events of the kernel were taken.
    taken: Arc<AtomicU64>,
}

impl Flows {
    /// No flows yet, and room for so many; these are counted.
    pub fn new(directory: Directory, node_name: &str, room: usize, metrics: FlowMetrics) -> Self {
        let session = RandomState::new().hash_one(node_name);
        Self {
            store: Arc::new(Mutex::new(Store::new(room))),
            listener: Arc::default(),
            news: Arc::new(watch::channel(0).0),
            session,
            directory: Arc::new(directory),
            world: Arc::new(Peer::world()),
            node_name: node_name.into(),
            metrics,
            counters: None,
            taken: Arc::default(),
        }
    }

    /// The same, telling of HTTP as these options have it.
    pub fn with_http(mut self, options: HttpOptions) -> Self {
        self.listener = Arc::new(Mutex::new(Listener::new(options)));
        self
    }

    /// Takes the kernel's events until `shutdown`; woken by them, it never asks by itself. It has a thread of its own,
    /// which gives way to whom it observes.
    pub(crate) fn follow(
        &mut self,
        maps: FlowMaps,
        shutdown: CancellationToken,
    ) -> Result<impl Future<Output = Result<()>> + use<>> {
        let (events, counters) = maps.split();
        self.counters = Some(Arc::new(counters));
        let flows = self.clone();
        let (ends, ended) = oneshot::channel();
        std::thread::Builder::new()
            .name("flows".to_owned())
            .spawn(move || {
                give_way();
                let runtime = tokio::runtime::Builder::new_current_thread()
                    .enable_all()
                    .build()
                    .context("could not start a runtime for events of flows");
                // Nobody waits any more when the agent stops.
                let _ =
                    ends.send(runtime.and_then(|one| one.block_on(flows.run(events, shutdown))));
            })
            .context("could not start a thread for events of flows")?;
        Ok(async { ended.await.context("reading events of flows panicked")? })
    }

    /// Takes events out of the ring until `shutdown`.
    async fn run(self, events: Rings, shutdown: CancellationToken) -> Result<()> {
        // SAFETY: the rings own their epoll, give the same one always, and live in the `AsyncFd`.
        let rings = unsafe { AsyncFd::register(events) };
        let mut rings = rings.context("could not wait for events of flows")?;
        let mut batch = Vec::new();
        // What an agent before this one had no room for is not told again.
        let mut lost = self.counters()?.lost;
        let mut tidied = Instant::now();
        loop {
            let mut ready = tokio::select! {
                () = shutdown.cancelled() => return Ok(()),
                ready = rings.readable_mut() => ready.context("could not wait for events of flows")?,
            };
            // The kernel wakes us only when we have read all: while we wait, events cost their writers nothing
            // more. At 700,000 events a second its ring is not full before we read on.
            tokio::select! {
                () = shutdown.cancelled() => return Ok(()),
                () = tokio::time::sleep(GATHER) => {}
            }
            let offset = wall_clock_offset();
            let rings = ready.get_inner_mut();
            rings.rest();
            while !shutdown.is_cancelled() {
                let now = nanos_of(ClockId::CLOCK_MONOTONIC).unsigned_abs();
                rings.read(now.saturating_sub(WRITTEN), &mut batch);
                if tidied.elapsed() >= TIDY {
                    tidied = Instant::now();
                    self.metrics.count_unanswered(self.listener().tidy(now));
                }
                if batch.is_empty() {
                    if !rings.has_later() {
                        break;
                    }
                    tokio::select! {
                        () = shutdown.cancelled() => return Ok(()),
                        () = tokio::time::sleep(GATHER) => {}
                    }
                }
                for some in batch.chunks(AT_ONCE) {
                    self.take(some, offset);
                }
                self.taken.fetch_add(batch.len() as u64, Relaxed);
                batch.clear();
            }
            ready.clear_ready();
            let count = self.counters()?.lost;
            if count != lost {
                self.lost(count.wrapping_sub(lost), now());
                lost = count;
            }
        }
    }

    /// Names events and keeps them; `offset` is what to add to their times to get the time of day, ns. There may be
    /// hundreds of thousands in a second, so what can be is done once for all.
    pub fn take(&self, reports: &[Report], offset: i64) {
        let world = &self.world;
        let names = self.directory.names.now();
        let services = self.directory.services.now();
        let now = Instant::now();
        let mut listener = self.listener();
        let mut store = self.store();
        for Report { event, message } in reports {
            let mut event = *event;
            let kind = match (event.at, event.verdict) {
                (AT_SOCKET, _) => Kind::Asked,
                (AT_MESSAGE, _) => Kind::Said,
                (_, DROPPED) => Kind::Dropped,
                _ => Kind::Passed,
            };
            if kind == Kind::Asked {
                event.source = self.of_socket(&event, &names);
            }
            let to = event.destination.into();
            let source = names.peer(event.source.into()).unwrap_or(world).clone();
            let destination = names.peer(to).unwrap_or(world).clone();
            let (from, at) = (event.source, event.time);
            let called = [
                listener.names(&destination, event.destination, from, at),
                listener.names(&source, from, event.destination, at),
            ];
            let seen = Seen {
                event,
                kind,
                time: offset.saturating_add_unsigned(event.time),
                source,
                destination,
                called,
                said: None,
                rule: match event.rule {
                    0 => None,
                    rule => names.rule(rule).cloned(),
                },
                denied_by: match event.reason {
                    REASON_POLICY => names.policies(event.set).cloned(),
                    _ => None,
                },
                service: match event.service {
                    0 => None,
                    service => services.get(service).cloned(),
                },
                here: names.is_local(to),
            };
            let mut tell = |seen: Seen| {
                self.metrics.count(&seen, now);
                store.push(Entry::Flow(seen));
            };
            if kind == Kind::Said {
                let bytes = message.as_deref().unwrap_or_default();
                for said in listener.hear(&event, bytes, &seen.destination) {
                    tell(seen.clone().says(said));
                }
                continue;
            }
            // Answers are told of as they were sent: what they become is where the question went.
            let turned = event.new_destination != Ip::NONE && event.reply == 0;
            // Policies have judged it: that is told, and then what became of it.
            if event.set != 0 {
                tell(if turned {
                    seen.becomes(Kind::Verdict, &names, world)
                } else {
                    let kind = Kind::Verdict;
                    Seen {
                        kind,
                        ..seen.clone()
                    }
                });
            }
            let after = match seen.kind {
                Kind::Asked => Some(Kind::Given),
                Kind::Passed if turned && event.at == AT_POD => Some(Kind::Translated),
                _ => None,
            };
            match after {
                Some(kind) => {
                    tell(seen.clone());
                    tell(seen.becomes(kind, &names, world));
                }
                None if turned && seen.kind == Kind::Dropped => {
                    tell(seen.becomes(Kind::Dropped, &names, world));
                }
                None => tell(seen),
            }
        }
        let next = store.next();
        drop(store);
        // Nobody may follow.
        self.news.send_replace(next);
    }

    /// The address of the pod that a socket is in; the node's own where it is in none.
    fn of_socket(&self, event: &Event, names: &xebec_policy::names::Now) -> Ip {
        let [low, high, ..] = event.source.0;
        let cookie = u64::from(high) << 32 | u64::from(low);
        let like = event.destination.into();
        let own = || {
            self.directory
                .node_ips
                .iter()
                .find(|own| own.is_ipv4() == event.destination.is_v4())
        };
        match names.in_namespace(cookie, like) {
            Some(address) => address.into(),
            None => own().map_or(Ip::NONE, |own| (*own).into()),
        }
    }

    /// Keeps in mind that the kernel had no room for some.
    fn lost(&self, count: u64, time: i64) {
        self.metrics.count_lost(Lost::Kernel, count);
        let mut store = self.store();
        store.push(Entry::Lost(count, time));
        let next = store.next();
        drop(store);
        self.news.send_replace(next);
    }

    /// The kernel's counters.
    pub fn counters(&self) -> Result<Counters> {
        self.counters
            .as_ref()
            .map_or_else(|| Ok(Counters::default()), |counters| counters.all())
    }

    /// How many events of the kernel were taken; all others were lost, or wait in its rings.
    pub fn taken(&self) -> u64 {
        self.taken.load(Relaxed)
    }

    /// The message of the flow of this number.
    fn message(&self, number: u64, seen: &Seen) -> Flow {
        message::message(seen, &self.node_name, self.uuid(number))
    }

    /// A name for the flow of this number that no other one has, whichever agent tells of it (RFC 9562, version 8).
    fn uuid(&self, number: u64) -> String {
        let bits = u128::from(self.session) << 64 | u128::from(number);
        let bits = bits & !(0xf << 76) & !(0x3 << 62) | 0x8 << 76 | 0x2 << 62;
        let hex = format!("{bits:032x}");
        let (a, b, c, d, e) = (
            &hex[..8],
            &hex[8..12],
            &hex[12..16],
            &hex[16..20],
            &hex[20..],
        );
        format!("{a}-{b}-{c}-{d}-{e}")
    }

    fn listener(&self) -> MutexGuard<'_, Listener> {
        self.listener.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn store(&self) -> MutexGuard<'_, Store> {
        self.store.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Tells when there are new ones: how many there ever were.
    fn news(&self) -> watch::Receiver<u64> {
        self.news.subscribe()
    }

    /// The node's name.
    fn node_name(&self) -> &str {
        &self.node_name
    }
}

/// What to add to the monotonic clock to get the time of day, ns.
fn wall_clock_offset() -> i64 {
    now() - nanos_of(ClockId::CLOCK_MONOTONIC)
}

/// The time of day, ns since 1970.
fn now() -> i64 {
    nanos_of(ClockId::CLOCK_REALTIME)
}

/// What a clock says, ns.
fn nanos_of(clock: ClockId) -> i64 {
    clock_gettime(clock).map_or(0, |time| time.tv_sec() * 1_000_000_000 + time.tv_nsec())
}

#[cfg(test)]
mod tests;
