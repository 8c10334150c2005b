//! EndpointSlice: the addresses behind each Service that has a selector.
//!
//! A change of a pod is a change of its own endpoints only: what else a Service has is read over, not made again.

mod endpoint;
mod index;
mod slices;
#[cfg(test)]
mod tests;
mod topology;
mod work;

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

use anyhow::Context;
use futures::{StreamExt, TryStreamExt};
use k8s_openapi::api::core::v1::Service;
use k8s_openapi::api::discovery::v1::EndpointSlice;
use kube::ResourceExt;
use kube::api::{Api, DeleteParams, PostParams, Preconditions};
use kube::runtime::events::EventType;
use tokio_util::sync::CancellationToken;

use crate::cluster::{Cluster, Teller, is_code, is_namespace_terminating};
use crate::informer::Key;
use crate::queue::Again;

use endpoint::{Maker, Wanted};
pub(crate) use endpoint::{first_family, is_headless, selector};
pub(crate) use index::SliceNames;
pub(crate) use slices::{MANAGED_BY, SERVICE_NAME, is_ours};
use slices::{Plan, Scope};
use work::{Dirty, Work};

/// Writes of one Service at a time: the store makes many durable at once.
const WRITES: usize = 16;

/// Registers with the watches and gives the loop.
pub(crate) fn start(
    cluster: &Arc<Cluster>,
    shutdown: CancellationToken,
) -> impl Future<Output = anyhow::Result<()>> + Send + 'static {
    let work = Work::new();
    work.listen(cluster);
    let controller = Arc::new(Controller {
        cluster: cluster.clone(),
        teller: Teller::new(cluster.client.clone(), "endpoint-slice-controller"),
        work: work.clone(),
        told: Mutex::new(HashMap::new()),
    });
    async move {
        let cluster = &controller.cluster;
        cluster.pods.synced().await;
        cluster.services.synced().await;
        cluster.endpoint_slices.synced().await;
        cluster.nodes.synced().await;
        work.queue
            .run("endpoint slice", 5, shutdown, |key| {
                let controller = controller.clone();
                async move { controller.reconcile(&key).await }
            })
            .await;
        Ok(())
    }
}

struct Controller {
    cluster: Arc<Cluster>,
    teller: Teller,
    work: Arc<Work>,
    /// What was last told about the hints of a Service's family; empty where it has them.
    told: Mutex<HashMap<(Key, String), String>>,
}

impl Controller {
    async fn reconcile(&self, key: &Key) -> anyhow::Result<Again> {
        let dirty = self.work.take(key);
        let service = self.cluster.services.get(key);
        // A Service's slices go with it by garbage collection.
        let Some(service) = service else {
            self.told(|told| told.retain(|(service, _), _| service != key));
            return Ok(None);
        };
        if service.metadata.deletion_timestamp.is_some() || selector(&service).is_none() {
            return Ok(None);
        }
        let since = dirty.since.map(|since| since.to_string());
        let plan = self.plan(key, &service, &dirty, since);
        let done = self.carry_out(&service, plan).await;
        if done.is_err() {
            // What was done of it is not known.
            self.work.mark_all(key);
        }
        done
    }

    fn plan(&self, key: &Key, service: &Service, dirty: &Dirty, since: Option<String>) -> Plan {
        let hinted = topology::is_asked_for(service);
        let mut existing = self.cluster.slices_of(key);
        existing.retain(|slice| is_ours(slice));
        let scope = if dirty.all || hinted {
            Scope::All
        } else {
            Scope::Pods(&dirty.pods)
        };
        let names = match scope {
            Scope::All => self.work.pods_of(service),
            Scope::Pods(pods) => pods.iter().cloned().collect(),
        };
        let wanted = self.wanted(key, service, &names, hinted);
        let (mut drafts, gone) = slices::draft(service, wanted, &scope, &existing, hinted);
        if hinted {
            let ratios = self.work.ratios();
            for family in endpoint::families(service) {
                let outcome = topology::add_hints(ratios.as_deref(), &mut drafts, family);
                self.tell(key, service, family, outcome.err());
            }
        } else if dirty.all {
            self.forget(key, service);
        }
        slices::plan(service, drafts, gone, since)
    }

    fn wanted(&self, key: &Key, service: &Service, pods: &[Arc<str>], hinted: bool) -> Vec<Wanted> {
        let mut maker = Maker::new(service, hinted);
        let mut zones: HashMap<String, Option<Option<String>>> = HashMap::new();
        let mut wanted = Vec::with_capacity(pods.len());
        for name in pods {
            let Some(pod) = self.cluster.pods.get(&Key::new(&key.namespace, name)) else {
                continue;
            };
            if let Some(name) = crate::pods::node_name(&pod)
                && !zones.contains_key(name)
            {
                let node = self.cluster.nodes.get(&Key::new("", name));
                let zone = node.map(|node| endpoint::zone(&node).map(str::to_owned));
                zones.insert(name.to_owned(), zone);
            }
            wanted.extend(maker.make(&pod, |name| zones.get(name).cloned().flatten()));
        }
        wanted
    }

    /// Tells when hints are given, or why they are not, when that is another thing than before.
    fn tell(&self, key: &Key, service: &Service, family: &str, problem: Option<String>) {
        let now = problem.clone().unwrap_or_default();
        let before = self.told(|told| told.insert((key.clone(), family.to_owned()), now.clone()));
        if before.as_ref() == Some(&now) {
            return;
        }
        match problem {
            Some(why) => {
                let reason = "TopologyAwareHintsDisabled";
                self.teller.tell(service, EventType::Warning, reason, why);
            }
            None => {
                let note = format!("Topology Aware Hints has been enabled, addressType: {family}");
                let reason = "TopologyAwareHintsEnabled";
                self.teller.tell(service, EventType::Normal, reason, note);
            }
        }
    }

    /// The Service does not ask for hints any more, if it did.
    fn forget(&self, key: &Key, service: &Service) {
        for family in ["IPv4", "IPv6"] {
            let before = self.told(|told| told.remove(&(key.clone(), family.to_owned())));
            if before.is_some_and(|before| before.is_empty()) {
                let note = format!("Topology Aware Hints has been disabled, addressType: {family}");
                let reason = "TopologyAwareHintsDisabled";
                self.teller.tell(service, EventType::Warning, reason, note);
            }
        }
    }

    fn told<T>(&self, look: impl FnOnce(&mut HashMap<(Key, String), String>) -> T) -> T {
        look(&mut self.told.lock().unwrap_or_else(PoisonError::into_inner))
    }

    async fn carry_out(&self, service: &Service, plan: Plan) -> anyhow::Result<Again> {
        let namespace = service.namespace().unwrap_or_default();
        let informer = &self.cluster.endpoint_slices;
        let api = Api::<EndpointSlice>::namespaced(self.cluster.client.clone(), &namespace);
        let api = &api;
        // New addresses first, so that a move between slices shows no gap.
        let create = plan.create.into_iter().map(|slice| async move {
            match api.create(&PostParams::default(), &slice).await {
                Ok(created) => informer.note(created),
                Err(error) if is_namespace_terminating(&error) => {}
                Err(error) => return Err(error).context("could not create an endpoint slice"),
            }
            Ok(())
        });
        let update = plan.update.into_iter().map(|slice| async move {
            let name = slice.name_any();
            // It carries the resourceVersion that it was made from: what somebody else changed meanwhile is not lost.
            let written = api
                .replace(&name, &PostParams::default(), &slice)
                .await
                .with_context(|| format!("could not update endpoint slice {name}"))?;
            informer.note(written);
            Ok(())
        });
        let delete = plan.delete.into_iter().map(|slice| async move {
            let params = DeleteParams::default().preconditions(Preconditions {
                uid: slice.metadata.uid.clone(),
                resource_version: None,
            });
            match api.delete(&slice.name_any(), &params).await {
                Ok(_) => informer.note_gone(slice.as_ref()),
                Err(error) if is_code(&error, 404) || is_code(&error, 409) => {}
                Err(error) => return Err(error).context("could not delete an endpoint slice"),
            }
            Ok(())
        });
        at_once(create).await?;
        at_once(update).await?;
        at_once(delete).await?;
        Ok(None)
    }
}

async fn at_once<F>(writes: impl Iterator<Item = F>) -> anyhow::Result<()>
where
    F: Future<Output = anyhow::Result<()>>,
{
    let writes = futures::stream::iter(writes).buffer_unordered(WRITES);
    writes.try_collect::<()>().await
}
