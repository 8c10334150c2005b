//! Keeps the engine in step with the API.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use anyhow::Result;
use futures::stream::BoxStream;
use futures::{Stream, StreamExt, TryStreamExt};
use k8s_openapi::api::core::v1::{Namespace, Pod};
use k8s_openapi::api::networking::v1::NetworkPolicy;
use kube::Api;
use kube::runtime::watcher::{self, Event};
use kube::runtime::{WatchStreamExt, watcher as watch};
use serde::de::DeserializeOwned;
use tokio::sync::{Mutex, watch as signal};
use tokio_util::sync::CancellationToken;
use tracing::warn;

use super::compile::{Name, name_of};
use super::engine::Engine;
use crate::maps::PolicyKernel;
use crate::nodes::{NodeView, Nodes};

/// An engine that several tasks use.
pub type Shared<K> = Arc<Mutex<Engine<K>>>;

/// One change, of whichever kind.
#[allow(clippy::large_enum_variant, reason = "only one is held at a time")]
enum Change {
    Pod(Event<Pod>),
    Namespace(Event<Namespace>),
    Policy(Event<NetworkPolicy>),
    Nodes(BTreeMap<String, NodeView>),
}

/// Objects of a kind that were listed since its last `Init`.
#[derive(Default)]
struct Listing<T> {
    seen: BTreeSet<T>,
    done: bool,
}

fn changes<T>(
    api: Api<T>,
    wrap: fn(Event<T>) -> Change,
) -> BoxStream<'static, Result<Change, watcher::Error>>
where
    T: kube::Resource + Clone + DeserializeOwned + std::fmt::Debug + Send + 'static,
    T::DynamicType: Default,
{
    watch(api, watcher::Config::default())
        .default_backoff()
        .map_ok(wrap)
        .boxed()
}

/// Every change of what policy depends on.
fn all(
    client: &kube::Client,
) -> impl Stream<Item = Result<Change, watcher::Error>> + Unpin + Send + use<> {
    futures::stream::select_all([
        changes(Api::<Pod>::all(client.clone()), Change::Pod),
        changes(Api::<Namespace>::all(client.clone()), Change::Namespace),
        changes(Api::<NetworkPolicy>::all(client.clone()), Change::Policy),
    ])
}

/// Runs until `shutdown`. `synced` becomes true when everything that the API had at first is known; each later
/// change sends it again, so that waiters look anew.
pub async fn run<K: PolicyKernel>(
    client: kube::Client,
    engine: Shared<K>,
    mut nodes: signal::Receiver<Nodes>,
    synced: signal::Sender<bool>,
    shutdown: CancellationToken,
) -> Result<()> {
    let mut stream = all(&client);
    let (mut pods, mut policies) = (Listing::<Name>::default(), Listing::<Name>::default());
    let mut namespaces = Listing::<String>::default();
    let mut nodes_known = false;
    loop {
        let change = tokio::select! {
            () = shutdown.cancelled() => return Ok(()),
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
            change = stream.next() => match change {
                Some(Ok(change)) => change,
                Some(Err(error)) => {
                    warn!(%error, "a watch of what policy depends on failed; trying again");
                    continue;
                }
                None => anyhow::bail!("the watches of what policy depends on ended"),
            },
        };
        let mut engine = engine.lock().await;
        let outcome = match change {
            Change::Pod(event) => match pods.take(event, pod_name) {
                Taken::Set(pod) => engine.set_pod(&pod),
                Taken::Gone(names) => names.iter().try_for_each(|name| engine.remove_pod(name)),
                Taken::Listed(seen) => engine
                    .pod_names()
                    .iter()
                    .filter(|name| !seen.contains(*name))
                    .try_for_each(|name| engine.remove_pod(name)),
                Taken::Nothing => Ok(()),
            },
            Change::Namespace(event) => {
                match namespaces.take(event, |one| one.metadata.name.clone().unwrap_or_default()) {
                    Taken::Set(one) => engine.set_namespace(
                        one.metadata.name.as_deref().unwrap_or_default(),
                        Some(one.metadata.labels.clone().unwrap_or_default()),
                    ),
                    Taken::Gone(names) => names
                        .iter()
                        .for_each(|name| engine.set_namespace(name, None)),
                    Taken::Listed(seen) => engine
                        .known()
                        .0
                        .iter()
                        .filter(|name| !seen.contains(*name))
                        .for_each(|name| engine.set_namespace(name, None)),
                    Taken::Nothing => {}
                }
                Ok(())
            }
            Change::Nodes(told) => {
                nodes_known = true;
                let gone: Vec<String> = engine
                    .known()
                    .1
                    .into_iter()
                    .filter(|name| !told.contains_key(name))
                    .collect();
                gone.iter()
                    .try_for_each(|name| engine.set_node(name, Vec::new()))
                    .and_then(|()| {
                        told.into_iter()
                            .try_for_each(|(name, node)| engine.set_node(&name, node.addresses))
                    })
            }
            Change::Policy(event) => {
                match policies.take(event, name_of) {
                    Taken::Set(one) => engine
                        .set_policy(&name_of(&one), Some(one.spec.clone().unwrap_or_default())),
                    Taken::Gone(names) => {
                        names.iter().for_each(|name| engine.set_policy(name, None))
                    }
                    Taken::Listed(seen) => engine
                        .known()
                        .2
                        .iter()
                        .filter(|name| !seen.contains(*name))
                        .for_each(|name| engine.set_policy(name, None)),
                    Taken::Nothing => {}
                }
                Ok(())
            }
        };
        if let Err(error) = outcome {
            warn!(
                error = format!("{error:#}"),
                "the dataplane could not take a change"
            );
        }
        // Until all is known, nothing is compiled: half the policies are no policy.
        if pods.done && namespaces.done && nodes_known && policies.done {
            engine.refresh_or_warn();
            drop(engine);
            synced.send_replace(true);
        }
    }
}

/// What an event means to the tables.
enum Taken<T, N> {
    Set(Box<T>),
    Gone(Vec<N>),
    Listed(BTreeSet<N>),
    Nothing,
}

impl<N: Ord + Clone> Listing<N> {
    fn take<T>(&mut self, event: Event<T>, name: impl Fn(&T) -> N) -> Taken<T, N> {
        match event {
            Event::Init => {
                self.seen.clear();
                Taken::Nothing
            }
            Event::InitApply(one) => {
                self.seen.insert(name(&one));
                Taken::Set(Box::new(one))
            }
            Event::InitDone => {
                self.done = true;
                Taken::Listed(std::mem::take(&mut self.seen))
            }
            Event::Apply(one) => Taken::Set(Box::new(one)),
            Event::Delete(one) => Taken::Gone(vec![name(&one)]),
        }
    }
}

fn pod_name(pod: &Pod) -> Name {
    (
        pod.metadata.namespace.clone().unwrap_or_default(),
        pod.metadata.name.clone().unwrap_or_default(),
    )
}
