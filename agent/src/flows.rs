//! Flows: events of the kernel, named and kept, for those who ask who talked to whom.

pub mod export;
mod message;
pub mod metrics;
pub mod observer;
pub mod peers;
mod reader;
pub(crate) mod serve;
mod store;

use std::hash::{BuildHasher, RandomState};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use aya::maps::{MapData, PerCpuArray, RingBuf};
use nix::time::{ClockId, clock_gettime};
use tokio::io::unix::AsyncFd;
use tokio::sync::{oneshot, watch};
use tokio_util::sync::CancellationToken;
use xebec_dataplane_common::flow::{Counters, DROPPED, Event, REASON_POLICY};
use xebec_hubble::flow::Flow;
use xebec_policy::names::{Names, Peer, RuleName};
use xebec_policy::rule::PolicyRef;

use crate::maps::{FlowMaps, next_event};
use metrics::{FlowMetrics, Lost};
use store::{Entry, Store};

/// How many flows are kept where nothing else is asked for.
pub const KEPT: usize = 16_384;
/// How long events gather before they are read.
const GATHER: Duration = Duration::from_millis(50);
/// How many events are taken while names and flows are held: a millisecond at most, also of a busy CPU.
const AT_ONCE: usize = 256;
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
}

/// Gives this thread a smaller share of a busy CPU: who reads what others did must not slow them down.
fn give_way() {
    // SAFETY: the function takes numbers alone; on Linux 0 is the calling thread (setpriority(2)).
    if unsafe { libc::setpriority(libc::PRIO_PROCESS, 0, NICE) } != 0 {
        let error = std::io::Error::last_os_error();
        tracing::warn!(%error, "events of flows are read with the priority of all else");
    }
}

/// All flows of the node; cheap to clone.
#[derive(Clone)]
pub struct Flows {
    store: Arc<Mutex<Store>>,
    /// How many flows there ever were.
    news: Arc<watch::Sender<u64>>,
    /// Tells this agent's flows from those of the one before it.
    session: u64,
    names: Names,
    /// Whoever has no name.
    world: Arc<Peer>,
    node_name: Arc<str>,
    metrics: FlowMetrics,
    counters: Option<Arc<PerCpuArray<MapData, [u8; size_of::<Counters>()]>>>,
}

impl Flows {
    /// No flows yet, and room for so many; these are counted.
    pub fn new(names: Names, node_name: &str, room: usize, metrics: FlowMetrics) -> Self {
        let session = RandomState::new().hash_one(node_name);
        Self {
            store: Arc::new(Mutex::new(Store::new(room))),
            news: Arc::new(watch::channel(0).0),
            session,
            names,
            world: Arc::new(Peer::world()),
            node_name: node_name.into(),
            metrics,
            counters: None,
        }
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
    async fn run(self, events: RingBuf<MapData>, shutdown: CancellationToken) -> Result<()> {
        // SAFETY: the ring owns its map's descriptor, gives the same one always, and lives in the `AsyncFd`.
        let ring = unsafe { AsyncFd::register(events) };
        let mut ring = ring.context("could not wait for events of flows")?;
        let mut batch = Vec::with_capacity(AT_ONCE);
        // What an agent before this one had no room for is not told again.
        let mut lost = self.counters()?.lost;
        loop {
            let mut ready = tokio::select! {
                () = shutdown.cancelled() => return Ok(()),
                ready = ring.readable_mut() => ready.context("could not wait for events of flows")?,
            };
            // The kernel wakes us only when we have read all: while we wait, events cost their writers nothing
            // more. At 400,000 events a second the ring is not full before we read on.
            tokio::select! {
                () = shutdown.cancelled() => return Ok(()),
                () = tokio::time::sleep(GATHER) => {}
            }
            let offset = wall_clock_offset();
            let ring = ready.get_inner_mut();
            while !shutdown.is_cancelled() {
                batch.extend(std::iter::from_fn(|| next_event(ring)).take(AT_ONCE));
                if batch.is_empty() {
                    break;
                }
                // CPUs take the time before they take their place in the ring.
                batch.sort_by_key(|event| event.time);
                self.take(&batch, offset);
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
    pub fn take(&self, events: &[Event], offset: i64) {
        let world = &self.world;
        let names = self.names.now();
        let now = Instant::now();
        let mut store = self.store();
        for event in events {
            let mut seen = Seen {
                event: *event,
                kind: if event.verdict == DROPPED {
                    Kind::Dropped
                } else {
                    Kind::Passed
                },
                time: offset.saturating_add_unsigned(event.time),
                source: names.peer(event.source.into()).unwrap_or(world).clone(),
                destination: names
                    .peer(event.destination.into())
                    .unwrap_or(world)
                    .clone(),
                rule: match event.rule {
                    0 => None,
                    rule => names.rule(rule).cloned(),
                },
                denied_by: match event.reason {
                    REASON_POLICY => names.policies(event.set).cloned(),
                    _ => None,
                },
            };
            // Policies have judged it: that is told, and then what became of it.
            if event.set != 0 {
                let what = std::mem::replace(&mut seen.kind, Kind::Verdict);
                self.metrics.count(&seen, now);
                store.push(Entry::Flow(seen.clone()));
                seen.kind = what;
            }
            self.metrics.count(&seen, now);
            store.push(Entry::Flow(seen));
        }
        let next = store.next();
        drop(store);
        // Nobody may follow.
        self.news.send_replace(next);
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
        self.counters.as_ref().map_or_else(
            || Ok(Counters::default()),
            |counters| FlowMaps::counters(counters),
        )
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
