//! Keeps the engine in step with the API, and the kernel free of what it no longer needs.

use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Result;
use futures::stream::BoxStream;
use futures::{Stream, StreamExt, TryStreamExt};
use k8s_openapi::api::core::v1::{Namespace, Pod, Service};
use k8s_openapi::api::discovery::v1::EndpointSlice;
use k8s_openapi::api::networking::v1::NetworkPolicy;
use kube::Api;
use kube::runtime::watcher::{self, Event};
use kube::runtime::{WatchStreamExt, watcher as watch};
use serde::de::DeserializeOwned;
use tokio::sync::{Mutex, Notify, mpsc, watch as signal};
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;
use tracing::warn;

use xebec_policy::engine::Engine;
use xebec_policy::kernel::PolicyKernel;

use super::conditions::{self, Conditions};
use super::custom::Custom;
use super::known::{Change, Known};
use super::notices::Told;
use crate::domains;
use crate::events::Teller;
use crate::maps::usage;
use crate::nodes::Nodes;

/// How often it is looked for domains' addresses that ended.
const EXPIRY: Duration = Duration::from_secs(10);
/// How many changes wait for the engine, and are taken together.
const AT_ONCE: usize = 1024;

/// How many sets that nobody needs any more are removed at a time.
const SWEPT: usize = 2;

/// The addresses of this node's devices, once they are known.
pub type Local = Option<Vec<IpAddr>>;

/// An engine that several tasks use.
pub type Shared<K> = Arc<Mutex<Engine<K>>>;

fn changes<T>(
    api: Api<T>,
    config: watcher::Config,
    wrap: fn(Event<T>) -> Change,
) -> BoxStream<'static, Result<Change, watcher::Error>>
where
    T: kube::Resource + Clone + DeserializeOwned + std::fmt::Debug + Send + 'static,
    T::DynamicType: Default,
{
    watch(api, config).default_backoff().map_ok(wrap).boxed()
}

/// Every change of the kinds that every API has.
fn all(
    client: &kube::Client,
) -> impl Stream<Item = Result<Change, watcher::Error>> + Unpin + Send + use<> {
    let every = watcher::Config::default;
    let api_server = every().labels("kubernetes.io/service-name=kubernetes");
    let near = Api::<EndpointSlice>::namespaced(client.clone(), "default");
    futures::stream::select_all([
        changes(Api::<Pod>::all(client.clone()), every(), Change::Pod),
        changes(
            Api::<Namespace>::all(client.clone()),
            every(),
            Change::Namespace,
        ),
        changes(
            Api::<NetworkPolicy>::all(client.clone()),
            every(),
            Change::Policy,
        ),
        changes(near, api_server, Change::ApiServer),
    ])
}

/// Every change of Services, and of the slices of those that Kubernetes does not make slices for.
fn services(
    client: &kube::Client,
) -> impl Stream<Item = Result<Change, watcher::Error>> + Unpin + Send + use<> {
    let every = watcher::Config::default;
    let by_others =
        every().labels("endpointslice.kubernetes.io/managed-by!=endpointslice-controller.k8s.io");
    futures::stream::select(
        changes(
            Api::<Service>::all(client.clone()),
            every(),
            Change::Service,
        ),
        changes(
            Api::<EndpointSlice>::all(client.clone()),
            by_others,
            Change::Slice,
        ),
    )
}

/// Runs until `shutdown`. `synced` becomes true when everything that the API had at first is known; each later
/// change sends it again, so that waiters look anew.
pub(crate) async fn run<K: PolicyKernel>(
    client: kube::Client,
    shared: Shared<K>,
    told: (signal::Receiver<Nodes>, signal::Receiver<Local>),
    teller: Teller,
    synced: signal::Sender<bool>,
    shutdown: CancellationToken,
) -> Result<()> {
    let retired = Notify::new();
    tokio::select! {
        () = shutdown.cancelled() => Ok(()),
        outcome = keep(client, &shared, told, teller, synced, &retired) => outcome,
        () = expire(&shared, &retired) => Ok(()),
        () = sweep(&shared, &retired) => Ok(()),
    }
}

/// Tells the engine of every change, and `retired` that sets may have become unused.
async fn keep<K: PolicyKernel>(
    client: kube::Client,
    shared: &Shared<K>,
    (mut nodes, mut local): (signal::Receiver<Nodes>, signal::Receiver<Local>),
    teller: Teller,
    synced: signal::Sender<bool>,
    retired: &Notify,
) -> Result<()> {
    let mut tasks = JoinSet::new();
    let (tell, mut changes) = mpsc::channel(AT_ONCE);
    follow(all(&client), tell.clone(), &mut tasks);
    let mut custom = Custom::follow(&client);
    let mut known = Known::default();
    let node = shared.lock().await.node_name().to_owned();
    let (conditions, waiting) = Conditions::new(&node);
    tasks.spawn(conditions::write(client.clone(), waiting));
    let mut told = Told::new(conditions);
    loop {
        let change = tokio::select! {
            changed = nodes.changed() => {
                if changed.is_err() {
                    return Ok(());
                }
                let told = nodes.borrow_and_update().clone();
                match told {
                    Some(told) => Change::Nodes(told),
                    None => continue,
                }
            }
            changed = local.changed() => {
                if changed.is_err() {
                    return Ok(());
                }
                let told = local.borrow_and_update().clone();
                match told {
                    Some(told) => Change::Local(told.into_iter().collect()),
                    None => continue,
                }
            }
            (source, change) = custom.next() => Change::Custom(source, change),
            () = time_of(told.conditions.next()), if known.all() => {
                told.tell_conditions(&*shared.lock().await);
                continue;
            }
            change = changes.recv() => match change {
                Some(change) => change,
                None => anyhow::bail!("the watches of what policy depends on ended"),
            },
        };
        let mut engine = shared.lock().await;
        known.take(&mut engine, &mut told, change);
        // What came meanwhile is taken along: the sets that many policies share are made once for all of it.
        for _ in 0..AT_ONCE {
            let more = || {
                let (source, change) = custom.try_next()?;
                Some(Change::Custom(source, change))
            };
            match changes.try_recv().ok().or_else(more) {
                Some(change) => known.take(&mut engine, &mut told, change),
                None => break,
            }
        }
        if engine.asks_for_services() && known.expect_services() {
            follow(services(&client), tell.clone(), &mut tasks);
        }
        // Until all is known, nothing is compiled: half the policies are no policy.
        if known.all() {
            engine.refresh_or_warn();
            told.news(&engine)
                .into_iter()
                .for_each(|notice| teller.tell(notice));
            drop(engine);
            retired.notify_one();
            synced.send_replace(true);
        }
    }
}

/// Returns at a time, or never.
async fn time_of(at: Option<tokio::time::Instant>) {
    match at {
        Some(at) => tokio::time::sleep_until(at).await,
        None => std::future::pending().await,
    }
}

/// Has changes come in, however long the engine takes for those before.
fn follow(
    mut stream: impl Stream<Item = Result<Change, watcher::Error>> + Unpin + Send + 'static,
    tell: mpsc::Sender<Change>,
    tasks: &mut JoinSet<()>,
) {
    tasks.spawn(async move {
        while let Some(change) = stream.next().await {
            match change {
                Ok(change) => {
                    if tell.send(change).await.is_err() {
                        return;
                    }
                }
                Err(error) => {
                    warn!(%error, "a watch of what policy depends on failed; trying again");
                }
            }
        }
    });
}

/// Forgets domains' addresses that ended, and to which no flow goes any more.
async fn expire<K: PolicyKernel>(engine: &Shared<K>, retired: &Notify) {
    loop {
        tokio::time::sleep(EXPIRY).await;
        if !engine.lock().await.domains().has_ended(domains::now()) {
            continue;
        }
        let used = match tokio::task::spawn_blocking(usage::addresses).await {
            Ok(Ok(used)) => used,
            Ok(Err(error)) => {
                warn!(
                    error = format!("{error:#}"),
                    "addresses of domains stay known"
                );
                continue;
            }
            Err(error) => {
                warn!(%error, "addresses of domains stay known");
                continue;
            }
        };
        let mut engine = engine.lock().await;
        engine.expire_domains(domains::now(), |address| used.contains(&address));
        engine.refresh_or_warn();
        drop(engine);
        retired.notify_one();
    }
}

/// Removes sets that no pod is under, once every program that may still know them has ended.
async fn sweep<K: PolicyKernel>(engine: &Shared<K>, retired: &Notify) {
    loop {
        retired.notified().await;
        let sets = engine.lock().await.retired();
        if sets.is_empty() {
            continue;
        }
        if let Err(error) = tokio::task::spawn_blocking(grace).await {
            warn!(%error, "waiting for programs to end failed");
        }
        // Changes come first.
        for some in sets.chunks(SWEPT) {
            if let Err(error) = engine.lock().await.sweep(some) {
                warn!(error = format!("{error:#}"), "sets of rules stay unused");
            }
            tokio::task::yield_now().await;
        }
    }
}

/// Returns when all programs have ended that run now.
fn grace() {
    /// `MEMBARRIER_CMD_GLOBAL`: waits for what the kernel calls a grace period, within which its programs end.
    const GLOBAL: libc::c_int = 1;
    // SAFETY: the call takes numbers alone (membarrier(2)).
    let outcome = unsafe { libc::syscall(libc::SYS_membarrier, GLOBAL, 0, 0) };
    if outcome != 0 {
        // Kernels that leave CPUs alone do not have it. No program runs for so long.
        std::thread::sleep(std::time::Duration::from_secs(1));
    }
}
