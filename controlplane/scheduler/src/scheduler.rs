//! The loop: watch events into cache and queue; one pod after the other through the profile; binding beside the loop.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Instant;

use futures::{StreamExt, TryStreamExt};
use k8s_openapi::api::core::v1::{Node, Pod};
use kube::runtime::watcher::{self, Event};
use kube::runtime::{WatchStreamExt, watcher as watch};
use kube::{Api, Resource};
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;
use tracing::{debug, warn};

use crate::cache::Cache;
use crate::events::Teller;
use crate::framework::{Profile, Refusal};
use crate::plugins;
use crate::queue::Queue;
use crate::view::{NodeView, PodView};

/// How the scheduler runs.
#[derive(Clone, Debug, Default)]
pub struct Config {}

/// The end of a binding that ran beside the loop.
struct Bound {
    pod: Arc<PodView>,
    result: Result<(), Refusal>,
}

struct Scheduler {
    profiles: HashMap<String, Arc<Profile>>,
    cache: Cache,
    queue: Queue,
    teller: Teller,
    /// Pods seen in the last relist, to find the ones that went away meanwhile.
    known_pods: HashMap<String, String>,
    known_nodes: Vec<String>,
    round: usize,
    bound: mpsc::Sender<Bound>,
}

/// Runs until `shutdown`; errors only where no watch can be set up at all.
pub async fn run(
    client: kube::Client,
    _config: Config,
    shutdown: CancellationToken,
) -> anyhow::Result<()> {
    let profile = Arc::new(plugins::default_profile(client.clone()));
    let (bound, mut bound_results) = mpsc::channel(1024);
    let mut scheduler = Scheduler {
        profiles: HashMap::from([(profile.scheduler_name.clone(), profile)]),
        cache: Cache::default(),
        queue: Queue::default(),
        teller: Teller::new(client.clone()),
        known_pods: HashMap::new(),
        known_nodes: Vec::new(),
        round: 0,
        bound,
    };
    let config = watcher::Config::default();
    let mut nodes = watch(Api::<Node>::all(client.clone()), config.clone())
        .default_backoff()
        .into_stream()
        .boxed();
    // Pods that are done use nothing and are of no interest.
    let live = config.fields("status.phase!=Succeeded,status.phase!=Failed");
    let mut pods = watch(Api::<Pod>::all(client), live)
        .default_backoff()
        .into_stream()
        .boxed();
    loop {
        scheduler.schedule_all();
        let release = scheduler.queue.next_release();
        let sleep = async {
            match release {
                Some(at) => tokio::time::sleep_until(at.into()).await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            () = shutdown.cancelled() => return Ok(()),
            event = nodes.try_next() => match event {
                Ok(Some(event)) => scheduler.node_event(event),
                Ok(None) => anyhow::bail!("the watch of nodes ended"),
                Err(error) => warn!(%error, "the watch of nodes failed; trying again"),
            },
            event = pods.try_next() => match event {
                Ok(Some(event)) => scheduler.pod_event(event),
                Ok(None) => anyhow::bail!("the watch of pods ended"),
                Err(error) => warn!(%error, "the watch of pods failed; trying again"),
            },
            Some(bound) = bound_results.recv() => scheduler.binding_done(bound),
            () = sleep => {}
        }
    }
}

impl Scheduler {
    fn node_event(&mut self, event: Event<Node>) {
        let wake = match event {
            Event::Init => {
                self.known_nodes.clear();
                false
            }
            Event::InitApply(node) => {
                self.known_nodes
                    .push(node.meta().name.clone().unwrap_or_default());
                self.cache.set_node(NodeView::from(&node))
            }
            Event::InitDone => {
                for info in self.cache.snapshot() {
                    if !self.known_nodes.contains(&info.node.name) {
                        self.cache.remove_node(&info.node.name);
                    }
                }
                true
            }
            Event::Apply(node) => self.cache.set_node(NodeView::from(&node)),
            Event::Delete(node) => {
                self.cache
                    .remove_node(node.metadata.name.as_deref().unwrap_or_default());
                false
            }
        };
        if wake {
            self.queue.wake(Instant::now());
        }
    }

    fn pod_event(&mut self, event: Event<Pod>) {
        match event {
            Event::Init => self.known_pods.values_mut().for_each(String::clear),
            Event::InitApply(pod) | Event::Apply(pod) => self.set_pod(&pod),
            Event::InitDone => {
                // A name that the relist did not fill in again is gone.
                let gone: Vec<String> = self
                    .known_pods
                    .iter()
                    .filter(|(_, seen)| seen.is_empty())
                    .map(|(uid, _)| uid.clone())
                    .collect();
                gone.iter().for_each(|uid| self.forget_pod(uid));
            }
            Event::Delete(pod) => self.forget_pod(pod.metadata.uid.as_deref().unwrap_or_default()),
        }
    }

    fn set_pod(&mut self, pod: &Pod) {
        let view = Arc::new(PodView::from(pod));
        if view.finished {
            return self.forget_pod(&view.uid);
        }
        self.known_pods.insert(view.uid.clone(), view.key());
        if view.node_name.is_some() {
            self.queue.remove(&view.uid);
            self.cache.set_pod(view);
            return;
        }
        let Some(profile) = self.profiles.get(&view.scheduler_name) else {
            return;
        };
        if view.terminating {
            return self.queue.remove(&view.uid);
        }
        let gated = profile
            .pre_enqueue
            .iter()
            .any(|plugin| plugin.pre_enqueue(&view).is_err());
        self.queue.set(view, gated);
    }

    fn forget_pod(&mut self, uid: &str) {
        self.known_pods.remove(uid);
        self.queue.remove(uid);
        if self.cache.remove_pod(uid) {
            self.queue.wake(Instant::now());
        }
    }

    /// Tries every active pod; a chosen node is charged at once, and the binding runs beside the loop.
    fn schedule_all(&mut self) {
        while let Some(pod) = self.queue.pop(Instant::now()) {
            let Some(profile) = self.profiles.get(&pod.scheduler_name).cloned() else {
                continue;
            };
            self.round = self.round.wrapping_add(1);
            match profile.select(&pod, &self.cache.snapshot(), self.round) {
                Ok(node) => self.assume(pod, node, profile),
                Err(error) => {
                    debug!(pod = pod.key(), %error, "no node fits");
                    self.queue.failed(pod.clone(), true, Instant::now());
                    let teller = self.teller.clone();
                    tokio::spawn(
                        async move { teller.failed(&pod, &error.to_string(), true).await },
                    );
                }
            }
        }
    }

    fn assume(&mut self, pod: Arc<PodView>, node: String, profile: Arc<Profile>) {
        let assumed = PodView {
            node_name: Some(node.clone()),
            ..PodView::clone(&pod)
        };
        self.cache.set_pod(Arc::new(assumed));
        let (teller, bound) = (self.teller.clone(), self.bound.clone());
        tokio::spawn(async move {
            let result = bind(&profile, &pod, &node).await;
            if result.is_ok() {
                teller.scheduled(&pod, &node).await;
            }
            // The loop is gone only when the scheduler stops.
            let _ = bound.send(Bound { pod, result }).await;
        });
    }

    fn binding_done(&mut self, Bound { pod, result }: Bound) {
        let Err(refusal) = result else { return };
        warn!(pod = pod.key(), reason = refusal.reason, "binding failed");
        self.cache.remove_pod(&pod.uid);
        self.queue.failed(pod.clone(), false, Instant::now());
        self.queue.wake(Instant::now());
        let teller = self.teller.clone();
        tokio::spawn(async move { teller.failed(&pod, &refusal.reason, false).await });
    }
}

/// Reserve, permit, pre-bind, bind, post-bind; what was reserved is given back when a later step refuses.
async fn bind(profile: &Profile, pod: &PodView, node: &str) -> Result<(), Refusal> {
    let mut reserved = Vec::new();
    let outcome = async {
        for plugin in &profile.reserve {
            reserved.push(plugin);
            plugin.reserve(pod, node)?;
        }
        for plugin in &profile.permit {
            plugin.permit(pod, node)?;
        }
        for plugin in &profile.pre_bind {
            plugin.pre_bind(pod, node).await?;
        }
        let binder = profile
            .bind
            .first()
            .ok_or_else(|| Refusal::new("the profile has no bind plugin"))?;
        binder.bind(pod, node).await
    }
    .await;
    match &outcome {
        Ok(()) => profile
            .post_bind
            .iter()
            .for_each(|plugin| plugin.post_bind(pod, node)),
        Err(_) => reserved
            .iter()
            .rev()
            .for_each(|plugin| plugin.unreserve(pod, node)),
    }
    outcome
}
