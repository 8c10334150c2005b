//! The pods of this node: a worker for each, woken by the API's watch and the runtime's events.

use std::collections::{HashMap, HashSet};
use std::path::{Path, PathBuf};
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

use crate::runtime::POD_UID;
use crate::volumes;
use crate::worker::{Shared, Wake, Worker};

/// All workers; cheap to clone.
#[derive(Clone)]
pub(crate) struct Pods {
    shared: Shared,
    workers: Arc<Mutex<HashMap<String, Handle>>>,
    tasks: TaskTracker,
    /// Told to begin no more.
    shutdown: CancellationToken,
    /// Told to drop what they are at.
    overdue: CancellationToken,
}

/// How long workers may take to finish what they are at when the kubelet ends.
const FAREWELL: Duration = Duration::from_secs(5);

struct Handle {
    pod: Pod,
    wakes: mpsc::UnboundedSender<Wake>,
}

impl Pods {
    pub(crate) fn new(shared: Shared, shutdown: CancellationToken) -> Self {
        Self {
            shared,
            workers: Arc::default(),
            tasks: TaskTracker::new(),
            shutdown,
            overdue: CancellationToken::new(),
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
    pub(crate) async fn run(self) -> Result<()> {
        // Whatever way this ends, no worker stays.
        let _end = self.overdue.clone().drop_guard();
        let outcome = tokio::select! {
            () = self.shutdown.cancelled() => Ok(()),
            () = self.follow_runtime() => Ok(()),
            ended = self.follow_api() => ended,
        };
        // A worker that nobody can wake any more ends after the step that it is at.
        self.lock().clear();
        self.tasks.close();
        if tokio::time::timeout(FAREWELL, self.tasks.wait())
            .await
            .is_err()
        {
            warn!("some pods are still being synced; they are left as they are");
            self.overdue.cancel();
            self.tasks.wait().await;
        }
        outcome
    }

    async fn follow_api(&self) -> Result<()> {
        let config = watcher::Config::default()
            .fields(&format!("spec.nodeName={}", self.shared.config.node_name));
        let mut pods = std::pin::pin!(
            watch(Api::<Pod>::all(self.shared.client.clone()), config).default_backoff()
        );
        let mut seen = HashSet::new();
        loop {
            match pods.try_next().await {
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
                    self.remove_leftovers(&seen);
                }
                Ok(None) => anyhow::bail!("the watch of pods ended"),
                Err(error) => warn!(%error, "the watch of pods failed; trying again"),
            }
        }
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
        let worker = Worker::new(self.shared.clone(), pod.clone(), receiver);
        workers.insert(uid.clone(), Handle { pod, wakes });
        drop(workers);
        let pods = self.clone();
        self.tasks.spawn(async move {
            // What a worker leaves undone is taken up by the next kubelet, from what it finds.
            tokio::select! {
                () = pods.overdue.cancelled() => {}
                () = worker.run() => {}
            }
            // Unless the pod has been given to a new worker already.
            let mut workers = pods.lock();
            if workers
                .get(&uid)
                .is_some_and(|handle| handle.wakes.is_closed())
            {
                workers.remove(&uid);
            }
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

    /// Folders of pods that neither the API nor the runtime knows any more.
    fn remove_leftovers(&self, known: &HashSet<String>) {
        let root = &self.shared.config.root;
        for (folder, uid, path) in leftovers(root) {
            if known.contains(&uid) || self.lock().contains_key(&uid) {
                continue;
            }
            info!(uid, folder, "removing what a pod has left");
            let removed = if folder == "pods" {
                volumes::remove(&path)
            } else {
                std::fs::remove_dir_all(&path).map_err(Into::into)
            };
            if let Err(error) = removed {
                let error = format!("{error:#}");
                warn!(error, "could not remove what a pod has left");
            }
        }
    }

    /// Wakes workers by the runtime's events; a broken stream is opened again, and all are woken since some may be lost.
    async fn follow_runtime(&self) {
        loop {
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

/// The folders of pods under the kubelet's root: kind, uid and path.
fn leftovers(root: &Path) -> Vec<(&'static str, String, PathBuf)> {
    let mut found = Vec::new();
    for folder in ["pods", "logs"] {
        let entries = std::fs::read_dir(root.join(folder)).into_iter().flatten();
        for entry in entries.flatten() {
            let name = entry.file_name().to_string_lossy().into_owned();
            // `pods/<uid>` and `logs/<namespace>_<name>_<uid>`
            let uid = match folder {
                "pods" => Some(name.as_str()),
                _ => name.splitn(3, '_').nth(2),
            };
            if let Some(uid) = uid {
                found.push((folder, uid.to_owned(), entry.path()));
            }
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn folders_tell_whose_they_are() {
        let root = tempfile::tempdir().unwrap();
        for dir in ["pods/u-1", "logs/default_web-0_u-2", "logs/other"] {
            std::fs::create_dir_all(root.path().join(dir)).unwrap();
        }
        let found = leftovers(root.path());
        let shown: Vec<_> = found.iter().map(|(f, uid, _)| (*f, uid.as_str())).collect();
        assert_eq!(shown, [("pods", "u-1"), ("logs", "u-2")]);
        assert_eq!(found[1].2, root.path().join("logs/default_web-0_u-2"));
    }
}
