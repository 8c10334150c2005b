//! The pods of this node: a worker for each, woken by the API's watch and the runtime's events.

use std::collections::{HashMap, HashSet};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use anyhow::Result;
use futures::TryStreamExt;
use k8s_openapi::api::core::v1::Pod;
use kube::Api;
use kube::runtime::watcher::{self, Event};
use kube::runtime::{WatchStreamExt, watcher as watch};
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tracing::{info, warn};

use crate::config::Config;
use crate::events::Teller;
use crate::runtime::{POD_UID, Runtime};
use crate::worker::{Shared, Wake, Worker};

/// All workers; cheap to clone.
#[derive(Clone)]
pub(crate) struct Pods {
    shared: Shared,
    workers: Arc<Mutex<HashMap<String, Handle>>>,
    tracker: TaskTracker,
}

/// How long workers may take to finish what they are at when the kubelet ends.
const FAREWELL: Duration = Duration::from_secs(5);

struct Handle {
    pod: Pod,
    wakes: mpsc::UnboundedSender<Wake>,
}

impl Pods {
    pub(crate) fn new(
        client: kube::Client,
        config: Arc<Config>,
        runtime: Runtime,
        teller: Teller,
    ) -> Self {
        Self {
            shared: Shared {
                client,
                config,
                runtime,
                teller,
            },
            workers: Arc::default(),
            tracker: TaskTracker::new(),
        }
    }

    /// The Pod objects as they were last seen.
    pub(crate) fn list(&self) -> Vec<Pod> {
        self.lock()
            .values()
            .map(|handle| handle.pod.clone())
            .collect()
    }

    /// A pod by its name.
    pub(crate) fn find(&self, namespace: &str, name: &str) -> Option<Pod> {
        let same = |pod: &&Handle| {
            pod.pod.metadata.namespace.as_deref() == Some(namespace)
                && pod.pod.metadata.name.as_deref() == Some(name)
        };
        self.lock()
            .values()
            .find(same)
            .map(|handle| handle.pod.clone())
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, HashMap<String, Handle>> {
        self.workers.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Runs until `shutdown`; pods stay as they are.
    pub(crate) async fn run(self, shutdown: CancellationToken) -> Result<()> {
        let events = tokio::spawn(self.clone().follow_runtime(shutdown.clone()));
        let config = watcher::Config::default()
            .fields(&format!("spec.nodeName={}", self.shared.config.node_name));
        let mut pods = std::pin::pin!(
            watch(Api::<Pod>::all(self.shared.client.clone()), config).default_backoff()
        );
        let mut seen = HashSet::new();
        loop {
            let event = tokio::select! {
                () = shutdown.cancelled() => break,
                event = pods.try_next() => event,
            };
            match event {
                Ok(Some(Event::Init)) => seen.clear(),
                Ok(Some(Event::InitApply(pod))) => {
                    seen.insert(pod.metadata.uid.clone().unwrap_or_default());
                    self.set(pod);
                }
                Ok(Some(Event::Apply(pod))) => self.set(pod),
                Ok(Some(Event::Delete(pod))) => {
                    self.gone(pod.metadata.uid.as_deref().unwrap_or_default())
                }
                Ok(Some(Event::InitDone)) => {
                    let lost: Vec<String> = self
                        .lock()
                        .keys()
                        .filter(|uid| !seen.contains(*uid))
                        .cloned()
                        .collect();
                    lost.iter().for_each(|uid| self.gone(uid));
                    self.remove_orphans(&seen).await;
                }
                Ok(None) => anyhow::bail!("the watch of pods ended"),
                Err(error) => warn!(%error, "the watch of pods failed; trying again"),
            }
        }
        events.abort();
        // A worker whose wakes have no sender any more ends after the sync that it is at.
        self.lock().clear();
        self.tracker.close();
        if tokio::time::timeout(FAREWELL, self.tracker.wait())
            .await
            .is_err()
        {
            warn!("some pods are still being synced; they are left as they are");
        }
        Ok(())
    }

    /// Gives a pod to its worker, which is made if need be.
    fn set(&self, pod: Pod) {
        let uid = pod.metadata.uid.clone().unwrap_or_default();
        let mut workers = self.lock();
        if let Some(handle) = workers.get_mut(&uid) {
            handle.pod = pod.clone();
            if handle.wakes.send(Wake::Pod(Box::new(pod.clone()))).is_ok() {
                return;
            }
        }
        let (wakes, receiver) = mpsc::unbounded_channel();
        let worker = Worker::new(self.shared.clone(), pod.clone());
        workers.insert(uid.clone(), Handle { pod, wakes });
        drop(workers);
        let pods = self.clone();
        self.tracker.spawn(async move {
            worker.run(receiver).await;
            pods.lock().remove(&uid);
        });
    }

    fn gone(&self, uid: &str) {
        if let Some(handle) = self.lock().get(uid) {
            // A worker that has ended has nothing left to do.
            let _ = handle.wakes.send(Wake::Gone);
        }
    }

    /// What the runtime has of pods that the API does not know any more.
    async fn remove_orphans(&self, known: &HashSet<String>) {
        let found = match self.shared.runtime.known_pods().await {
            Ok(found) => found,
            Err(error) => {
                return warn!(
                    error = format!("{error:#}"),
                    "could not list the runtime's pods"
                );
            }
        };
        for (uid, (namespace, name)) in found.into_iter().filter(|(uid, _)| !known.contains(uid)) {
            info!(
                namespace,
                name, uid, "removing a pod that the API does not know"
            );
            let pod = Pod {
                metadata: kube::api::ObjectMeta {
                    name: Some(name),
                    namespace: Some(namespace),
                    uid: Some(uid.clone()),
                    ..Default::default()
                },
                spec: Some(Default::default()),
                ..Pod::default()
            };
            self.set(pod);
            self.gone(&uid);
        }
    }

    /// Wakes workers by the runtime's events; a broken stream is opened again, and all are woken since some may be lost.
    async fn follow_runtime(self, shutdown: CancellationToken) {
        while !shutdown.is_cancelled() {
            match self.shared.runtime.events().await {
                Ok(mut events) => {
                    self.lock()
                        .values()
                        .for_each(|handle| drop(handle.wakes.send(Wake::Runtime)));
                    while let Ok(Some(event)) = events.message().await {
                        let uid = event.pod_sandbox_status.as_ref().and_then(|sandbox| {
                            sandbox
                                .labels
                                .get(POD_UID)
                                .cloned()
                                .or_else(|| Some(sandbox.metadata.as_ref()?.uid.clone()))
                        });
                        if let Some(handle) = uid
                            .as_ref()
                            .and_then(|uid| self.lock().get(uid).map(|handle| handle.wakes.clone()))
                        {
                            let _ = handle.send(Wake::Runtime);
                        }
                    }
                }
                Err(error) => warn!(
                    error = format!("{error:#}"),
                    "the container runtime gives no events"
                ),
            }
            tokio::time::sleep(Duration::from_secs(1)).await;
        }
    }
}
