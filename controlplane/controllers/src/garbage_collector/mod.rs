//! Garbage collection by owner references: background, foreground and orphaning deletion.

mod graph;

use std::collections::HashSet;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use anyhow::Context;
use futures::TryStreamExt;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::OwnerReference;
use kube::api::{
    Api, DeleteParams, DynamicObject, PartialObjectMeta, Patch, PatchParams, Preconditions,
    PropagationPolicy,
};
use kube::discovery::{ApiResource, Discovery, Scope};
use kube::runtime::WatchStreamExt;
use kube::runtime::watcher::{self, Event, watcher};
use kube::{Client, ResourceExt};
use serde_json::json;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use tracing::{debug, info, warn};

use crate::cluster::is_code;
use crate::queue::{Again, Queue};
use graph::{FOREGROUND, Graph, Node, ORPHAN, Work};

type Meta = PartialObjectMeta<DynamicObject>;

/// How long to wait before discovery is tried again.
const DISCOVER_AGAIN: Duration = Duration::from_secs(1);

struct Resource {
    api: ApiResource,
    namespaced: bool,
}

struct Collector {
    client: Client,
    resources: Vec<Resource>,
    graph: Mutex<Graph>,
    queue: Arc<Queue<Work>>,
    /// How many watches have not listed yet; until then nothing is judged.
    unsynced: watch::Sender<usize>,
}

/// Watches the metadata of every kind that can be deleted, and collects.
pub(crate) async fn start(client: Client, shutdown: CancellationToken) -> anyhow::Result<()> {
    let resources = loop {
        match discover(&client).await {
            Ok(resources) => break resources,
            Err(error) => warn!(%error, "garbage collection waits for discovery"),
        }
        tokio::select! {
            () = shutdown.cancelled() => return Ok(()),
            () = tokio::time::sleep(DISCOVER_AGAIN) => {}
        }
    };
    debug!(kinds = resources.len(), "garbage collection watches");
    let collector = Arc::new(Collector {
        client,
        unsynced: watch::Sender::new(resources.len()),
        resources,
        graph: Mutex::new(Graph::default()),
        queue: Queue::new(),
    });
    let watches =
        (0..collector.resources.len()).map(|resource| collector.watch(resource, &shutdown));
    let work = async {
        let mut unsynced = collector.unsynced.subscribe();
        tokio::select! {
            () = shutdown.cancelled() => return,
            // The sender lives in the collector: this can't fail.
            _ = unsynced.wait_for(|unsynced| *unsynced == 0) => {}
        }
        let ownerless = collector.graph().ownerless();
        collector.look_at(ownerless);
        collector
            .queue
            .run("garbage collector", 20, shutdown.clone(), |work| {
                let collector = collector.clone();
                async move {
                    match work {
                        Work::Dependent(uid) => collector.dependent(&uid).await,
                        Work::Owner(uid) => collector.owner(&uid).await,
                    }
                }
            })
            .await;
    };
    tokio::join!(futures::future::join_all(watches), work);
    Ok(())
}

async fn discover(client: &Client) -> kube::Result<Vec<Resource>> {
    let discovery = Discovery::new(client.clone()).run_aggregated().await?;
    Ok(discovery
        .groups()
        .flat_map(|group| group.recommended_resources())
        .filter(|(api, capabilities)| {
            // Events are the most numerous of all, and own nothing.
            api.plural != "events"
                && ["list", "watch", "delete"]
                    .iter()
                    .all(|verb| capabilities.supports_operation(verb))
        })
        .map(|(api, capabilities)| Resource {
            api,
            namespaced: capabilities.scope == Scope::Namespaced,
        })
        .collect())
}

/// What an owner is to its dependent.
enum Standing {
    /// There, and staying.
    Solid,
    /// Gone.
    Dangling,
    /// Going, once its dependents are gone.
    Waiting,
}

impl Collector {
    fn graph(&self) -> MutexGuard<'_, Graph> {
        self.graph.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn look_at(&self, work: Vec<Work>) {
        work.into_iter().for_each(|work| self.queue.add(work));
    }

    async fn watch(&self, resource: usize, shutdown: &CancellationToken) {
        let api = Api::<Meta>::all_with(self.client.clone(), &self.resources[resource].api);
        let stream = watcher(api, watcher::Config::default()).default_backoff();
        let mut stream = std::pin::pin!(stream);
        let mut listed = HashSet::new();
        let mut first = true;
        loop {
            let event = tokio::select! {
                () = shutdown.cancelled() => return,
                event = stream.try_next() => event,
            };
            let work = match event {
                Ok(Some(Event::Init)) => {
                    listed.clear();
                    continue;
                }
                Ok(Some(Event::InitApply(object))) => {
                    listed.extend(object.metadata.uid.clone());
                    self.graph().set(resource, &object.metadata)
                }
                Ok(Some(Event::InitDone)) => {
                    let work = self.graph().retain(resource, &std::mem::take(&mut listed));
                    if std::mem::take(&mut first) {
                        self.unsynced.send_modify(|unsynced| *unsynced -= 1);
                    }
                    work
                }
                Ok(Some(Event::Apply(object))) => self.graph().set(resource, &object.metadata),
                Ok(Some(Event::Delete(object))) => {
                    let uid = object.metadata.uid.unwrap_or_default();
                    self.graph().remove(&uid)
                }
                Ok(None) => return,
                Err(error) => {
                    debug!(resource = self.resources[resource].api.plural, %error, "the watch was interrupted; resuming");
                    continue;
                }
            };
            self.look_at(work);
        }
    }

    fn api(&self, resource: &Resource, namespace: &str) -> Api<DynamicObject> {
        if resource.namespaced {
            Api::namespaced_with(self.client.clone(), namespace, &resource.api)
        } else {
            Api::all_with(self.client.clone(), &resource.api)
        }
    }

    /// The object as it stands, unless it is gone or another by now.
    async fn live(&self, uid: &str, node: &Node) -> anyhow::Result<Option<Meta>> {
        let api = self.api(&self.resources[node.resource], &node.namespace);
        let live = api.get_metadata_opt(&node.name).await?;
        Ok(live.filter(|live| live.metadata.uid.as_deref() == Some(uid)))
    }

    /// Deletes an object that has no owner left, or takes off the references to those that are gone.
    async fn dependent(&self, uid: &str) -> anyhow::Result<Again> {
        let Some(node) = self.graph().get(uid) else {
            return Ok(None);
        };
        let Some(live) = self.live(uid, &node).await? else {
            return Ok(None);
        };
        if live.metadata.deletion_timestamp.is_some() {
            if node.foreground {
                self.queue.add(Work::Owner(uid.to_owned()));
            }
            return Ok(None);
        }
        let owners = live.metadata.owner_references.clone().unwrap_or_default();
        let (mut solid, mut waiting, mut dangling) = (Vec::new(), false, false);
        for owner in &owners {
            match self.standing(&node, owner).await? {
                Standing::Solid => solid.push(owner),
                Standing::Waiting => waiting = true,
                Standing::Dangling => dangling = true,
            }
        }
        if !waiting && !dangling {
            return Ok(None);
        }
        let api = self.api(&self.resources[node.resource], &node.namespace);
        if !solid.is_empty() {
            let patch = json!({"metadata": {
                "ownerReferences": solid,
                "uid": uid, "resourceVersion": live.metadata.resource_version,
            }});
            return done(
                api.patch(&node.name, &PatchParams::default(), &Patch::Merge(patch))
                    .await
                    .map(drop),
            )
            .context("could not take off references to owners that are gone");
        }
        let finalizer = |name: &str| live.finalizers().iter().any(|finalizer| finalizer == name);
        let has_dependents = !self.graph().dependents(uid).is_empty();
        let policy = if finalizer(ORPHAN) {
            PropagationPolicy::Orphan
        } else if finalizer(FOREGROUND) || (waiting && has_dependents) {
            PropagationPolicy::Foreground
        } else {
            PropagationPolicy::Background
        };
        let params = DeleteParams {
            propagation_policy: Some(policy),
            preconditions: Some(Preconditions {
                uid: Some(uid.to_owned()),
                resource_version: live.metadata.resource_version.clone(),
            }),
            ..DeleteParams::default()
        };
        let resource = &self.resources[node.resource].api.plural;
        info!(
            resource,
            namespace = node.namespace,
            name = node.name,
            "deleting what has no owner left"
        );
        done(api.delete(&node.name, &params).await.map(drop))
            .with_context(|| format!("could not delete {resource} {}", node.name))
    }

    async fn standing(&self, dependent: &Node, owner: &OwnerReference) -> anyhow::Result<Standing> {
        let (group, version) = owner
            .api_version
            .rsplit_once('/')
            .unwrap_or(("", &owner.api_version));
        let of_kind =
            |resource: &&Resource| resource.api.group == group && resource.api.kind == owner.kind;
        let known = self
            .resources
            .iter()
            .filter(of_kind)
            .max_by_key(|resource| resource.api.version == version);
        // What can't be looked up must not be taken for gone.
        let Some(resource) = known else {
            anyhow::bail!(
                "the kind of the owner, {}/{}, is not known",
                owner.api_version,
                owner.kind
            );
        };
        if resource.namespaced && dependent.namespace.is_empty() {
            warn!(
                name = dependent.name,
                owner = owner.name,
                "an object without a namespace can't be owned by one with a namespace; leaving it"
            );
            return Ok(Standing::Solid);
        }
        let live = self
            .api(resource, &dependent.namespace)
            .get_metadata_opt(&owner.name)
            .await?;
        let Some(live) = live.filter(|live| live.metadata.uid.as_ref() == Some(&owner.uid)) else {
            return Ok(Standing::Dangling);
        };
        let foreground = live
            .finalizers()
            .iter()
            .any(|finalizer| finalizer == FOREGROUND);
        Ok(
            if live.metadata.deletion_timestamp.is_some() && foreground {
                Standing::Waiting
            } else {
                Standing::Solid
            },
        )
    }

    /// Lets an object go that waits for its dependents, when none holds it any more.
    async fn owner(&self, uid: &str) -> anyhow::Result<Again> {
        let Some(node) = self
            .graph()
            .get(uid)
            .filter(|node| node.foreground || node.orphan)
        else {
            return Ok(None);
        };
        let dependents = self.graph().dependents(uid);
        if node.orphan {
            for dependent in dependents {
                self.let_go(&dependent, uid).await?;
            }
            return self.take_off(uid, &node, ORPHAN).await;
        }
        let blocked = {
            let graph = self.graph();
            dependents
                .iter()
                .any(|dependent| graph.blocks(dependent, uid))
        };
        if !blocked {
            return self.take_off(uid, &node, FOREGROUND).await;
        }
        self.look_at(dependents.into_iter().map(Work::Dependent).collect());
        Ok(None)
    }

    /// Takes the reference to one owner off a dependent.
    async fn let_go(&self, dependent: &str, owner: &str) -> anyhow::Result<()> {
        let Some(node) = self.graph().get(dependent) else {
            return Ok(());
        };
        let Some(live) = self.live(dependent, &node).await? else {
            return Ok(());
        };
        let all = live.metadata.owner_references.clone().unwrap_or_default();
        let kept: Vec<_> = all
            .iter()
            .filter(|reference| reference.uid != owner)
            .collect();
        if kept.len() == all.len() {
            return Ok(());
        }
        let patch = json!({"metadata": {
            "ownerReferences": kept,
            "uid": dependent, "resourceVersion": live.metadata.resource_version,
        }});
        let api = self.api(&self.resources[node.resource], &node.namespace);
        done(
            api.patch(&node.name, &PatchParams::default(), &Patch::Merge(patch))
                .await
                .map(drop),
        )
        .context("could not let a dependent go")?;
        Ok(())
    }

    /// Takes a finalizer off, after which the API server may remove the object.
    async fn take_off(&self, uid: &str, node: &Node, finalizer: &str) -> anyhow::Result<Again> {
        let Some(live) = self.live(uid, node).await? else {
            return Ok(None);
        };
        let kept: Vec<_> = live
            .finalizers()
            .iter()
            .filter(|name| *name != finalizer)
            .collect();
        if kept.len() == live.finalizers().len() {
            return Ok(None);
        }
        let patch = json!({"metadata": {
            "finalizers": kept,
            "uid": uid, "resourceVersion": live.metadata.resource_version,
        }});
        let api = self.api(&self.resources[node.resource], &node.namespace);
        done(
            api.patch(&node.name, &PatchParams::default(), &Patch::Merge(patch))
                .await
                .map(drop),
        )
        .with_context(|| format!("could not take the finalizer {finalizer} off {}", node.name))
    }
}

/// That the object is gone is as good.
fn done(result: kube::Result<()>) -> anyhow::Result<Again> {
    match result {
        Ok(()) => Ok(None),
        Err(error) if is_code(&error, 404) => Ok(None),
        Err(error) => Err(error.into()),
    }
}
