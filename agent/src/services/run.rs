//! Keeps the kernel in step with the API's Services.

use std::net::IpAddr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use anyhow::Result;
use futures::stream::BoxStream;
use futures::{FutureExt, StreamExt};
use hashbrown::HashSet;
use kube::Api;
use kube::runtime::watcher::{self, Event};
use kube::runtime::{WatchStreamExt, watcher as watch};
use serde::de::DeserializeOwned;
use serde_json::{Value, json};
use tokio::sync::{Notify, mpsc, oneshot, watch as signal};
use tokio_util::sync::CancellationToken;
use tracing::warn;
use xebec_dataplane_common::service::Backend;

use super::addresses::{self, NodePortAddresses};
use super::backends::Target;
use super::extents::REST;
use super::health::Health;
use super::metrics::Metrics;
use super::names::ServiceNames;
use super::notices::{Notice, Reason};
use super::objects::{EndpointSlice, Service};
use super::tables::Tables;
use crate::announce::Announced;
use crate::events::Teller;
use crate::host_ports::HostPort;
use crate::maps::{Room, ServiceMaps};
use crate::nodes::{NodeView, Nodes};
use crate::parting::Parted;
use crate::sockets;

/// Changes that are taken before the kernel is brought in step, where that many are there already.
const AT_ONCE: usize = 4096;
/// When a failed write is tried again.
const PATIENCE: Duration = Duration::from_secs(1);

/// What Services need of the node.
#[derive(Clone, Debug)]
pub struct Options {
    /// Name of the node.
    pub node_name: String,
    /// The node's addresses, at most one of a family.
    pub node_ips: Vec<IpAddr>,
    /// Where node ports are reached.
    pub node_ports: NodePortAddresses,
}

/// Whom is told of backends that leave.
#[derive(Clone)]
pub struct Left {
    /// Those that are nobody's any more.
    pub gone: mpsc::UnboundedSender<sockets::Backend>,
    /// Those that left one Service and are another's.
    pub parted: mpsc::UnboundedSender<Parted>,
}

/// The Services of this node; cheap to clone.
#[derive(Clone)]
pub struct Services {
    tables: Arc<Mutex<Tables<ServiceMaps>>>,
    metrics: Metrics,
    lack: signal::Sender<Option<Room>>,
    paused: Arc<AtomicBool>,
    growing: Arc<AtomicBool>,
    announced: signal::Sender<Vec<Announced>>,
    left: Left,
    rewritten: Arc<Notify>,
    names: ServiceNames,
}

impl Services {
    /// Services in these maps. `before` is the map of backends of the agent before this one, if its flows are still
    /// there: they know their backends by its numbers.
    /// Backends that go are told to `left`.
    pub fn new(maps: ServiceMaps, node_name: &str, before: Vec<Backend>, left: Left) -> Self {
        let tables = Tables::new(maps, node_name, before);
        let names = tables.numbers.clone();
        Self {
            names,
            tables: Arc::new(Mutex::new(tables)),
            metrics: Metrics::default(),
            lack: signal::Sender::default(),
            paused: Arc::default(),
            growing: Arc::default(),
            announced: signal::Sender::default(),
            left,
            rewritten: Arc::default(),
        }
    }

    /// What numbers of Services' ports are called.
    pub fn names(&self) -> ServiceNames {
        self.names.clone()
    }

    fn tables(&self) -> MutexGuard<'_, Tables<ServiceMaps>> {
        self.tables.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// One row a frontend.
    pub fn rows(&self) -> Vec<Value> {
        self.tables().rows()
    }

    /// The numbers.
    pub fn metrics(&self) -> Metrics {
        self.metrics.clone()
    }

    /// How far the kernel is: Services that have frontends, how many of them do not fit, and whether larger maps are
    /// being made. As it was when the kernel was last brought in step.
    pub fn standing(&self) -> Value {
        json!({
            "known": self.metrics.services.get(),
            "lacking": self.metrics.lacking.get(),
            "growing": self.growing.load(Ordering::Acquire),
        })
    }

    /// Larger maps are being made from here on, or not any more.
    pub fn set_growing(&self, growing: bool) {
        self.growing.store(growing, Ordering::Release);
    }

    /// Roughly how much room in the maps everything would need, while something does not fit.
    pub fn lack(&self) -> signal::Receiver<Option<Room>> {
        self.lack.subscribe()
    }

    /// How much room in the maps everything would need.
    pub fn need(&self) -> Room {
        self.tables().whole_need()
    }

    /// From here on larger maps come for what does not fit, unless [`Self::refuse_growth`] says that they do not.
    pub fn expect_growth(&self) {
        self.tables().expect_growth();
    }

    /// No larger maps come for those that do not fit now, and why; users are told.
    pub fn refuse_growth(&self, why: &str) {
        self.tables().refuse_growth(why);
        self.rewritten.notify_one();
    }

    /// Load balancers' addresses, to be announced on the node's network.
    pub fn announced(&self) -> signal::Receiver<Vec<Announced>> {
        self.announced.subscribe()
    }

    /// How much room in the maps there is.
    pub fn room(&self) -> Room {
        self.tables().room()
    }

    /// All backends go into the map of backends among these, which has room for at least as many. From here on nothing
    /// changes in the kernel, until [`Self::change_backends`].
    pub fn copy_backends(&self, maps: &mut ServiceMaps) -> Result<()> {
        let mut tables = self.tables();
        self.bring_up(&mut tables);
        tables.copy_backends(maps)
    }

    /// All programs that are attached have these maps, of which only that of backends is another than before.
    pub fn change_backends(&self, maps: ServiceMaps) {
        self.tables().change_backends(maps);
        self.go_on();
    }

    /// Everything goes into these maps, which have room for at least as much as those before; the map of backends is
    /// the same. When it returns, programs that have them can take over; from here on nothing changes in the kernel,
    /// until [`Self::go_on`].
    pub fn rewrite(&self, maps: ServiceMaps) -> Result<()> {
        let mut tables = self.tables();
        self.bring_up(&mut tables);
        tables.rewrite(maps, Instant::now())
    }

    /// Programs with these maps are attached, and those before are not.
    pub fn go_on(&self) {
        self.paused.store(false, Ordering::Release);
        self.rewritten.notify_one();
    }

    /// Nothing is left to be written to the maps before, and nothing will be.
    fn bring_up(&self, tables: &mut Tables<ServiceMaps>) {
        if let Err(error) = tables.sync(Instant::now()) {
            Tables::<ServiceMaps>::warn_of(&error);
        }
        self.paused.store(true, Ordering::Release);
    }

    /// What the API had at first is in the kernel, and backends that nobody has claimed go; false while some of it waits
    /// for larger maps: it is not to be missing when programs take over from those of an agent before this one.
    fn settle(&self) -> bool {
        let mut tables = self.tables();
        if self.paused.load(Ordering::Acquire) || tables.waits_for_growth() {
            return false;
        }
        if let Err(error) = tables.settle(Instant::now()) {
            Tables::<ServiceMaps>::warn_of(&error);
        }
        true
    }

    /// Brings the kernel in step; what users are to be told.
    fn sync(
        &self,
    ) -> (
        Vec<Notice>,
        Vec<super::tables::HealthChange>,
        Option<Duration>,
    ) {
        let began = Instant::now();
        let mut tables = self.tables();
        if self.paused.load(Ordering::Acquire) {
            // Who paused it tells when to go on.
            return Default::default();
        }
        let outcome = tables.sync(began);
        let metrics = &self.metrics;
        metrics.sync_seconds.observe(began.elapsed().as_secs_f64());
        let now = SystemTime::now().duration_since(UNIX_EPOCH);
        let now = now.map_or(0.0, |since| since.as_secs_f64());
        match &outcome {
            Ok(()) => {
                metrics.last_sync.set(now);
                for time in tables.take_triggers() {
                    metrics.programming_seconds.observe((now - time).max(0.0));
                }
            }
            Err(error) => {
                metrics.failures.inc();
                Tables::<ServiceMaps>::warn_of(error);
            }
        }
        if let Some(announced) = tables.take_announced() {
            self.announced.send_replace(announced);
        }
        if outcome.is_ok() {
            let backend = |target: Target| sockets::Backend {
                protocol: target.protocol,
                address: target.ip.into(),
                port: target.port,
            };
            // Nobody listens any more when the agent is stopping.
            for target in tables.take_gone() {
                let _ = self.left.gone.send(backend(target));
            }
            for (service, number, target) in tables.take_parted() {
                let _ = self.left.parted.send(Parted {
                    service,
                    number,
                    backend: backend(target),
                });
            }
        }
        let take = |count: &mut u64| std::mem::take(count);
        metrics
            .service_changes
            .inc_by(take(&mut tables.service_changes));
        metrics
            .endpoint_changes
            .inc_by(take(&mut tables.endpoint_changes));
        let (services, lacking) = tables.count();
        metrics.services.set(services as i64);
        metrics.lacking.set(lacking as i64);
        let used = tables.used();
        metrics.backends.set(i64::from(used.backends) - 1);
        metrics.set_room(used, tables.room());
        // Told each time while something lacks: what was tried since may have changed nothing.
        let lack = (lacking > 0).then(|| tables.need());
        self.lack
            .send_if_modified(|before| std::mem::replace(before, lack).is_some() || lack.is_some());
        let notices = tables.take_notices();
        let full = notices
            .iter()
            .filter(|one| one.reason == Reason::DataplaneFull);
        metrics.full.inc_by(full.count() as u64);
        let again = match outcome {
            Err(_) => Some(PATIENCE),
            Ok(()) => tables.wants_another_try().then_some(REST),
        };
        (notices, tables.take_health(), again)
    }
}

/// A listing that may be under way.
#[derive(Default)]
struct Listing {
    seen: HashSet<u64>,
    under_way: bool,
    done: bool,
}

/// Where an object's name is when there is no such object any more.
fn name(metadata: &kube::api::ObjectMeta) -> Option<String> {
    super::view::full_name(metadata)
}

impl Listing {
    fn see(&mut self, hash: Option<u64>) {
        if self.under_way {
            self.seen.extend(hash);
        }
    }

    /// Takes an event of Services.
    fn service(&mut self, event: Event<Service>, tables: &mut Tables<ServiceMaps>) {
        match event {
            Event::Init => (self.under_way, self.seen) = (true, HashSet::new()),
            Event::InitApply(one) | Event::Apply(one) => {
                let name = tables.set_service(&one);
                self.see(name);
            }
            Event::InitDone => {
                tables.keep_services(&std::mem::take(&mut self.seen));
                (self.under_way, self.done) = (false, true);
            }
            Event::Delete(one) => {
                if let Some(name) = name(&one.metadata) {
                    tables.remove_service(&name);
                }
            }
        }
    }

    /// Takes an event of EndpointSlices.
    fn slice(&mut self, event: Event<EndpointSlice>, tables: &mut Tables<ServiceMaps>) {
        match event {
            Event::Init => (self.under_way, self.seen) = (true, HashSet::new()),
            Event::InitApply(one) | Event::Apply(one) => {
                let name = tables.set_slice(&one);
                self.see(name);
            }
            Event::InitDone => {
                tables.keep_slices(&std::mem::take(&mut self.seen));
                (self.under_way, self.done) = (false, true);
            }
            Event::Delete(one) => {
                if let Some(name) = name(&one.metadata) {
                    tables.remove_slice(&name);
                }
            }
        }
    }
}

type Events<T> = BoxStream<'static, Result<Event<T>, watcher::Error>>;

fn events<T>(client: &kube::Client) -> Events<T>
where
    T: kube::Resource<DynamicType = ()>
        + Clone
        + DeserializeOwned
        + std::fmt::Debug
        + Send
        + 'static,
{
    watch(Api::<T>::all(client.clone()), watcher::Config::default())
        .default_backoff()
        .boxed()
}

/// An event, if the stream goes on.
fn event<T>(
    next: Option<Result<Event<T>, watcher::Error>>,
    what: &str,
) -> Result<Option<Event<T>>> {
    match next {
        Some(Ok(event)) => Ok(Some(event)),
        Some(Err(error)) => {
            warn!(%error, "the watch of {what} failed; trying again");
            Ok(None)
        }
        None => anyhow::bail!("the watch of {what} ended"),
    }
}

/// A change, or the end of changes for ever.
async fn changed<T>(receiver: &mut signal::Receiver<T>) {
    if receiver.changed().await.is_err() {
        std::future::pending::<()>().await;
    }
}

/// Keeps the kernel in step until `shutdown`. `ready` is sent once, when everything that the API had at first is
/// in the kernel.
#[allow(
    clippy::too_many_arguments,
    reason = "what the agent has, it is told of one by one"
)]
pub(crate) async fn run(
    client: kube::Client,
    services: Services,
    options: Options,
    nodes: signal::Receiver<Nodes>,
    local: signal::Receiver<Option<Vec<IpAddr>>>,
    host_ports: signal::Receiver<Vec<HostPort>>,
    teller: Teller,
    ready: oneshot::Sender<()>,
    shutdown: CancellationToken,
) -> Result<()> {
    let keeping = keep(
        client, services, options, nodes, host_ports, local, teller, ready,
    );
    tokio::select! {
        () = shutdown.cancelled() => Ok(()),
        outcome = keeping => outcome,
    }
}

#[allow(clippy::too_many_arguments, reason = "the parts of `run`")]
async fn keep(
    client: kube::Client,
    services: Services,
    options: Options,
    mut nodes: signal::Receiver<Nodes>,
    mut host_ports: signal::Receiver<Vec<HostPort>>,
    mut local: signal::Receiver<Option<Vec<IpAddr>>>,
    teller: Teller,
    ready: oneshot::Sender<()>,
) -> Result<()> {
    let mut service_events = events::<Service>(&client);
    let mut slice_events = events::<EndpointSlice>(&client);
    let (mut listed, mut sliced) = (Listing::default(), Listing::default());
    let mut health = Health::default();
    let mut ready = Some(ready);
    let mut again: Option<tokio::time::Instant> = None;
    let mut node_news = true;
    host_ports.mark_changed();
    loop {
        let retry = async {
            match again {
                Some(at) => tokio::time::sleep_until(at).await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            next = service_events.next() => {
                let first = event(next, "services")?;
                let mut tables = services.tables();
                first.into_iter().for_each(|one| listed.service(one, &mut tables));
            }
            next = slice_events.next() => {
                let first = event(next, "endpoint slices")?;
                let mut tables = services.tables();
                first.into_iter().for_each(|one| sliced.slice(one, &mut tables));
            }
            () = changed(&mut nodes) => node_news = true,
            () = changed(&mut local) => node_news = true,
            () = changed(&mut host_ports) => {
                let ports = host_ports.borrow_and_update().clone();
                services.tables().set_host_ports(&ports);
            }
            () = services.rewritten.notified() => {}
            () = retry => {}
        }
        // What is there already goes in one step with it.
        for _ in 0..AT_ONCE {
            let mut any = false;
            if let Some(next) = service_events.next().now_or_never() {
                any = true;
                let next = event(next, "services")?;
                let mut tables = services.tables();
                next.into_iter()
                    .for_each(|one| listed.service(one, &mut tables));
            }
            if let Some(next) = slice_events.next().now_or_never() {
                any = true;
                let next = event(next, "endpoint slices")?;
                let mut tables = services.tables();
                next.into_iter()
                    .for_each(|one| sliced.slice(one, &mut tables));
            }
            if !any {
                break;
            }
        }
        if std::mem::take(&mut node_news) {
            let told = nodes.borrow_and_update().clone();
            let local = local.borrow_and_update().clone().unwrap_or_default();
            let (wanted, node) = (&options.node_ports, &options.node_name);
            let all = addresses::of(wanted, node, &options.node_ips, &local, &told);
            let at = addresses::for_health(wanted, &all);
            {
                let mut tables = services.tables();
                let view = told.as_ref().and_then(|nodes| nodes.get(node));
                tables.set_zone(view.and_then(NodeView::zone).unwrap_or(""));
                if let Err(error) = tables.set_node_addresses(all) {
                    Tables::<ServiceMaps>::warn_of(&error);
                    node_news = true;
                }
            }
            if node_news {
                again = Some(tokio::time::Instant::now() + PATIENCE);
            }
            let failed = health.set_addresses(at).await;
            failed
                .into_iter()
                .for_each(|(name, error)| tell_of_health(&teller, &name, error));
        }
        // Until all is known, nothing is written: a Service without its endpoints would be refused.
        let known = nodes.borrow().is_some() && local.borrow().is_some();
        if !(listed.done && sliced.done && known) {
            continue;
        }
        let (notices, changes, later) = services.sync();
        let retry_addresses = again.filter(|_| node_news);
        again = later
            .map(|later| tokio::time::Instant::now() + later)
            .or(retry_addresses);
        notices.into_iter().for_each(|notice| notice.tell(&teller));
        if !changes.is_empty() {
            let failed = health.apply(changes).await;
            failed
                .into_iter()
                .for_each(|(name, error)| tell_of_health(&teller, &name, error));
        }
        if ready.is_some() && services.settle() {
            if let Some(ready) = ready.take() {
                // Nobody waits any more when the agent is stopping.
                let _ = ready.send(());
            }
        }
    }
}

fn tell_of_health(teller: &Teller, name: &str, error: String) {
    let reason = Reason::FailedToStartServiceHealthcheck;
    Notice::new(name, None, reason, error).tell(teller);
}
