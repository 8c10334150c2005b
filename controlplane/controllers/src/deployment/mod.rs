//! Deployment: rolls its pods from one template to the next by scaling ReplicaSets.

mod revision;
mod rolling;
mod status;
mod template;

use std::sync::Arc;

use anyhow::Context;
use k8s_openapi::api::apps::v1::{Deployment, DeploymentSpec, ReplicaSet};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use kube::api::{Api, DeleteParams, Patch, PatchParams, PostParams};
use kube::runtime::events::EventType;
use kube::{Resource, ResourceExt};
use serde_json::json;
use tokio_util::sync::CancellationToken;

use crate::cluster::{Cluster, Teller, is_code, is_namespace_terminating};
use crate::informer::Key;
use crate::pods::is_finished;
use crate::queue::{Again, Queue};
use crate::refs::{self, claim, controller_of, controller_ref, controls};
use rolling::{Limits, Size};
use status::Conditions;
use template::HASH_LABEL;

/// Registers with the watches and gives the loop.
pub(crate) fn start(
    cluster: &Arc<Cluster>,
    shutdown: CancellationToken,
) -> impl Future<Output = anyhow::Result<()>> + Send + 'static {
    let queue = Queue::new();
    let wake = queue.clone();
    cluster.deployments.on_change(move |_, new| {
        if let Some(new) = new {
            wake.add(Key::of(new.as_ref()));
        }
    });
    let (wake, weak) = (queue.clone(), Arc::downgrade(cluster));
    cluster.replica_sets.on_change(move |old, new| {
        for set in [old, new].into_iter().flatten() {
            let namespace = set.metadata.namespace.as_deref().unwrap_or_default();
            match controller_of(&set.metadata) {
                Some(owner) if owner.kind == "Deployment" => {
                    wake.add(Key::new(namespace, &owner.name));
                }
                Some(_) => {}
                // An orphan wakes those that might adopt it.
                None => {
                    let Some(cluster) = weak.upgrade() else {
                        return;
                    };
                    for deployment in cluster.deployments.in_namespace(namespace) {
                        let selector = deployment
                            .spec
                            .as_ref()
                            .map(|spec| refs::selector(&spec.selector));
                        if let Some(Ok(Some(selector))) = selector
                            && refs::matches(&selector, &set.metadata)
                        {
                            wake.add(Key::of(deployment.as_ref()));
                        }
                    }
                }
            }
        }
    });
    // Recreate waits until the last old pod is gone.
    let (wake, weak) = (queue.clone(), Arc::downgrade(cluster));
    cluster.pods.on_change(move |old, new| {
        let Some(pod) = new.or(old).filter(|pod| new.is_none() || is_finished(pod)) else {
            return;
        };
        let (Some(cluster), Some(owner)) = (weak.upgrade(), controller_of(&pod.metadata)) else {
            return;
        };
        let namespace = pod.metadata.namespace.as_deref().unwrap_or_default();
        if owner.kind == "ReplicaSet"
            && let Some(set) = cluster.replica_sets.get(&Key::new(namespace, &owner.name))
            && let Some(owner) = controller_of(&set.metadata)
        {
            wake.add(Key::new(namespace, &owner.name));
        }
    });
    let controller = Arc::new(Controller {
        teller: Teller::new(cluster.client.clone(), "deployment-controller"),
        cluster: cluster.clone(),
    });
    async move {
        controller.cluster.pods.synced().await;
        controller.cluster.replica_sets.synced().await;
        controller.cluster.deployments.synced().await;
        queue
            .run("deployment", 5, shutdown, |key| {
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
}

/// One Deployment with the ReplicaSets that it owns, as one reconcile sees and changes them.
struct Rollout {
    deployment: Arc<Deployment>,
    spec: DeploymentSpec,
    limits: Limits,
    /// The one that has the current template.
    new: Option<Arc<ReplicaSet>>,
    /// All others, oldest first.
    old: Vec<Arc<ReplicaSet>>,
    conditions: Conditions,
    /// `status.collisionCount`, maybe raised.
    collisions: i32,
}

impl Rollout {
    fn desired(&self) -> i32 {
        self.limits.desired
    }
    fn all(&self) -> impl Iterator<Item = &Arc<ReplicaSet>> {
        self.old.iter().chain(&self.new)
    }
    fn total(&self) -> i32 {
        self.all().map(|set| wanted(set)).sum()
    }
    fn is_rolling(&self) -> bool {
        let strategy = self
            .spec
            .strategy
            .as_ref()
            .and_then(|strategy| strategy.type_.as_deref());
        strategy != Some("Recreate")
    }
    fn namespace(&self) -> String {
        self.deployment
            .metadata
            .namespace
            .clone()
            .unwrap_or_default()
    }
}

fn wanted(set: &ReplicaSet) -> i32 {
    set.spec
        .as_ref()
        .and_then(|spec| spec.replicas)
        .unwrap_or(1)
}

fn available(set: &ReplicaSet) -> i32 {
    set.status
        .as_ref()
        .and_then(|status| status.available_replicas)
        .unwrap_or(0)
}

fn size(set: &ReplicaSet) -> Size {
    Size {
        spec: wanted(set),
        available: available(set),
    }
}

fn by_age(sets: &mut [Arc<ReplicaSet>]) {
    sets.sort_by(|a, b| {
        let age = |set: &ReplicaSet| (set.meta().creation_timestamp.clone(), set.name_any());
        age(a).cmp(&age(b))
    });
}

impl Controller {
    async fn reconcile(&self, key: &Key) -> anyhow::Result<Again> {
        let Some(deployment) = self.cluster.deployments.get(key) else {
            return Ok(None);
        };
        let Some(spec) = deployment.spec.clone() else {
            return Ok(None);
        };
        let Some(selector) = refs::selector(&spec.selector)? else {
            let note = "This deployment is selecting all pods. A non-empty selector is required.";
            self.teller.tell(
                deployment.as_ref(),
                EventType::Warning,
                "SelectingAll",
                note.into(),
            );
            return Ok(None);
        };
        let cluster = &self.cluster;
        let mut sets = claim(
            &cluster.client,
            deployment.as_ref(),
            &selector,
            &cluster.replica_sets,
            |_| true,
        )
        .await?;
        by_age(&mut sets);
        let same = |set: &&Arc<ReplicaSet>| {
            let template = set.spec.as_ref().and_then(|spec| spec.template.as_ref());
            template.is_some_and(|template| template::equal(template, &spec.template))
        };
        let new = sets.iter().find(same).cloned();
        sets.retain(|set| Some(&set.metadata.uid) != new.as_ref().map(|new| &new.metadata.uid));
        let rolling = spec
            .strategy
            .as_ref()
            .and_then(|strategy| strategy.rolling_update.as_ref());
        let mut limits = Limits::new(
            spec.replicas.unwrap_or(1),
            rolling.and_then(|rolling| rolling.max_surge.as_ref()),
            rolling.and_then(|rolling| rolling.max_unavailable.as_ref()),
        );
        let status = deployment.status.clone().unwrap_or_default();
        let mut rollout = Rollout {
            conditions: Conditions::new(status.conditions.unwrap_or_default()),
            collisions: status.collision_count.unwrap_or(0),
            deployment,
            spec,
            limits,
            new,
            old: sets,
        };
        if !rollout.is_rolling() {
            limits.surge = 0;
            rollout.limits = limits;
        }
        if rollout.deployment.metadata.deletion_timestamp.is_some() {
            return self.write_status(&rollout).await;
        }
        rollout.conditions.pause(&rollout.spec);
        let result = self.roll(&mut rollout).await;
        if let Err(error) = &result
            && error
                .downcast_ref::<kube::Error>()
                .is_some_and(is_namespace_terminating)
        {
            return Ok(None);
        }
        // Also after a failure: the conditions tell of it.
        let again = self.write_status(&rollout).await?;
        result.map(|()| again)
    }

    async fn roll(&self, rollout: &mut Rollout) -> anyhow::Result<()> {
        if rollout.spec.paused == Some(true) {
            self.refresh_new(rollout).await?;
            self.share_out(rollout).await?;
            return self.clean_up(rollout).await;
        }
        let scaled = rollout
            .all()
            .filter(|set| wanted(set) > 0)
            .any(|set| revision::desired(set).is_some_and(|desired| desired != rollout.desired()));
        if scaled {
            self.refresh_new(rollout).await?;
            return self.share_out(rollout).await;
        }
        if rollout.is_rolling() {
            self.rolling_update(rollout).await
        } else {
            self.recreate(rollout).await
        }
    }

    async fn rolling_update(&self, rollout: &mut Rollout) -> anyhow::Result<()> {
        self.ensure_new(rollout).await?;
        if let Some(new) = rollout.new.clone() {
            let to = rollout.limits.new_size(wanted(&new), rollout.total());
            if self.scale(rollout, &new, to).await? {
                return Ok(());
            }
            let sizes: Vec<Size> = rollout.old.iter().map(|set| size(set)).collect();
            let targets = rollout.limits.old_sizes(size(&new), &sizes);
            let mut changed = false;
            for (set, to) in rollout.old.clone().into_iter().zip(targets) {
                changed |= self.scale(rollout, &set, to).await?;
            }
            if changed {
                return Ok(());
            }
        }
        self.clean_up(rollout).await
    }

    async fn recreate(&self, rollout: &mut Rollout) -> anyhow::Result<()> {
        self.refresh_new(rollout).await?;
        let mut changed = false;
        for set in rollout.old.clone() {
            changed |= self.scale(rollout, &set, 0).await?;
        }
        // Old and new must never run at the same time: also what is still being stopped counts.
        if changed || self.old_pods_run(rollout) {
            return Ok(());
        }
        self.ensure_new(rollout).await?;
        if let Some(new) = rollout.new.clone() {
            self.scale(rollout, &new, rollout.desired()).await?;
        }
        self.clean_up(rollout).await
    }

    fn old_pods_run(&self, rollout: &Rollout) -> bool {
        self.cluster
            .pods
            .in_namespace(&rollout.namespace())
            .iter()
            .any(|pod| {
                !is_finished(pod)
                    && rollout
                        .old
                        .iter()
                        .any(|set| controls(set.as_ref(), &pod.metadata))
            })
    }

    /// Brings the annotations of the current ReplicaSet up to date, if there is one.
    async fn refresh_new(&self, rollout: &mut Rollout) -> anyhow::Result<()> {
        let Some(new) = rollout.new.clone() else {
            return Ok(());
        };
        let number = revision::next(&rollout.old);
        let annotations = revision::annotations(rollout, Some(&new), number);
        let min_ready = rollout.spec.min_ready_seconds;
        let stale = new.annotations() != &annotations
            || new
                .spec
                .as_ref()
                .and_then(|spec| spec.min_ready_seconds)
                .unwrap_or(0)
                != min_ready.unwrap_or(0);
        if stale {
            let patch = json!({
                "metadata": {"uid": new.metadata.uid, "annotations": annotations},
                "spec": {"minReadySeconds": min_ready},
            });
            rollout.new = Some(self.patch_set(&new, patch).await?);
        }
        if let Some(new) = rollout.new.clone() {
            self.set_revision(rollout, &new).await?;
            rollout.conditions.found(&rollout.spec, &new.name_any());
        }
        Ok(())
    }

    /// Makes the ReplicaSet of the current template if there is none.
    async fn ensure_new(&self, rollout: &mut Rollout) -> anyhow::Result<()> {
        if rollout.new.is_some() {
            return self.refresh_new(rollout).await;
        }
        let deployment = rollout.deployment.clone();
        let hash = template::hash(&rollout.spec.template, rollout.collisions)?;
        let mut template = rollout.spec.template.clone();
        let mut selector = rollout.spec.selector.clone();
        let meta = template.metadata.get_or_insert_default();
        let labels = meta.labels.get_or_insert_default();
        labels.insert(HASH_LABEL.into(), hash.clone());
        let labels = labels.clone();
        selector
            .match_labels
            .get_or_insert_default()
            .insert(HASH_LABEL.into(), hash.clone());
        let number = revision::next(&rollout.old);
        let size = if rollout.is_rolling() {
            rollout.limits.new_size(0, rollout.total())
        } else {
            rollout.desired()
        };
        let set = ReplicaSet {
            metadata: ObjectMeta {
                name: Some(format!("{}-{hash}", deployment.name_any())),
                namespace: deployment.metadata.namespace.clone(),
                labels: Some(labels),
                annotations: Some(revision::annotations(rollout, None, number)),
                owner_references: Some(vec![controller_ref(deployment.as_ref())]),
                ..ObjectMeta::default()
            },
            spec: Some(k8s_openapi::api::apps::v1::ReplicaSetSpec {
                replicas: Some(size),
                min_ready_seconds: rollout.spec.min_ready_seconds,
                selector,
                template: Some(template),
            }),
            status: None,
        };
        let api = Api::<ReplicaSet>::namespaced(self.cluster.client.clone(), &rollout.namespace());
        let created = match api.create(&PostParams::default(), &set).await {
            Ok(created) => created,
            Err(error) if is_code(&error, 409) => {
                let there = api.get_opt(&set.name_any()).await?;
                let there = there.filter(|there| {
                    let template = there.spec.as_ref().and_then(|spec| spec.template.as_ref());
                    controls(deployment.as_ref(), &there.metadata)
                        && template.is_some_and(|t| template::equal(t, &rollout.spec.template))
                });
                let Some(there) = there else {
                    // Another template has the same hash, or another owner the name: try with another hash.
                    rollout.collisions += 1;
                    anyhow::bail!("the name {} is taken", set.name_any());
                };
                there
            }
            Err(error) => {
                let words = match &error {
                    kube::Error::Api(status) => status.message.clone(),
                    error => error.to_string(),
                };
                if !is_namespace_terminating(&error) {
                    let note = format!(
                        "Failed to create new replica set {:?}: {words}",
                        set.name_any()
                    );
                    rollout.conditions.create_failed(&rollout.spec, &note);
                    self.teller.tell(
                        deployment.as_ref(),
                        EventType::Warning,
                        "ReplicaSetCreateError",
                        note,
                    );
                }
                return Err(error.into());
            }
        };
        if size > 0 {
            let note = format!(
                "Scaled up replica set {} from 0 to {size}",
                created.name_any()
            );
            self.teller.tell(
                deployment.as_ref(),
                EventType::Normal,
                "ScalingReplicaSet",
                note,
            );
        }
        rollout
            .conditions
            .created(&rollout.spec, &created.name_any());
        self.cluster.replica_sets.note(created.clone());
        let created = Arc::new(created);
        rollout.new = Some(created.clone());
        self.set_revision(rollout, &created).await
    }

    /// Shows the current ReplicaSet's revision on the Deployment, where `kubectl rollout history` looks.
    async fn set_revision(&self, rollout: &mut Rollout, new: &ReplicaSet) -> anyhow::Result<()> {
        let number = revision::of(new).to_string();
        let deployment = &rollout.deployment;
        if deployment.annotations().get(revision::REVISION) == Some(&number) {
            return Ok(());
        }
        let patch = json!({"metadata": {
            "uid": deployment.metadata.uid,
            "annotations": {revision::REVISION: number},
        }});
        let api = Api::<Deployment>::namespaced(self.cluster.client.clone(), &rollout.namespace());
        let written = api
            .patch(
                &deployment.name_any(),
                &PatchParams::default(),
                &Patch::Merge(patch),
            )
            .await
            .context("could not write the revision")?;
        self.cluster.deployments.note(written.clone());
        rollout.deployment = Arc::new(written);
        Ok(())
    }

    /// A change of size outside of a rollout's steps: shared out among the ReplicaSets that have pods.
    async fn share_out(&self, rollout: &mut Rollout) -> anyhow::Result<()> {
        let active: Vec<_> = rollout
            .all()
            .filter(|set| wanted(set) > 0)
            .cloned()
            .collect();
        if active.len() <= 1 {
            let newest = rollout.new.clone().or_else(|| rollout.old.last().cloned());
            if let Some(set) = active.into_iter().next().or(newest) {
                self.scale(rollout, &set, rollout.desired()).await?;
            }
            return Ok(());
        }
        let saturated = rollout.new.as_ref().is_some_and(|new| {
            wanted(new) == rollout.desired()
                && available(new) == rollout.desired()
                && revision::desired(new) == Some(rollout.desired())
        });
        if saturated {
            for set in rollout.old.clone() {
                self.scale(rollout, &set, 0).await?;
            }
            return Ok(());
        }
        if !rollout.is_rolling() {
            return Ok(());
        }
        let most = if rollout.desired() > 0 {
            rollout.limits.most()
        } else {
            0
        };
        let growing = most > rollout.total();
        let mut sets = active;
        // The largest first; of equals the newest when growing, the oldest when shrinking.
        if growing {
            sets.reverse();
        }
        sets.sort_by_key(|set| std::cmp::Reverse(wanted(set)));
        let shares: Vec<(i32, i32)> = sets
            .iter()
            .map(|set| {
                let of = revision::most(set).or(rollout
                    .deployment
                    .status
                    .as_ref()
                    .and_then(|s| s.replicas));
                (wanted(set), of.unwrap_or(most))
            })
            .collect();
        for (set, to) in sets.into_iter().zip(rolling::proportional(&shares, most)) {
            self.scale(rollout, &set, to).await?;
        }
        Ok(())
    }

    /// Gives a ReplicaSet a size, and tells; whether that changed anything but annotations.
    async fn scale(
        &self,
        rollout: &mut Rollout,
        set: &Arc<ReplicaSet>,
        to: i32,
    ) -> anyhow::Result<bool> {
        let from = wanted(set);
        let stale = revision::desired(set) != Some(rollout.desired())
            || revision::most(set) != Some(rollout.limits.most());
        // Empty ones need no numbers until they are used again.
        if from == to && (!stale || to == 0) {
            return Ok(false);
        }
        let patch = json!({
            "metadata": {
                "uid": set.metadata.uid,
                "annotations": revision::numbers(&rollout.limits),
            },
            "spec": {"replicas": to},
        });
        let written = self.patch_set(set, patch).await?;
        for known in rollout.old.iter_mut().chain(&mut rollout.new) {
            if known.metadata.uid == written.metadata.uid {
                *known = written.clone();
            }
        }
        if from != to {
            let direction = if to > from { "up" } else { "down" };
            let note = format!(
                "Scaled {direction} replica set {} from {from} to {to}",
                set.name_any()
            );
            self.teller.tell(
                rollout.deployment.as_ref(),
                EventType::Normal,
                "ScalingReplicaSet",
                note,
            );
        }
        Ok(from != to)
    }

    async fn patch_set(
        &self,
        set: &ReplicaSet,
        patch: serde_json::Value,
    ) -> anyhow::Result<Arc<ReplicaSet>> {
        let namespace = set.metadata.namespace.clone().unwrap_or_default();
        let api = Api::<ReplicaSet>::namespaced(self.cluster.client.clone(), &namespace);
        let written = api
            .patch(
                &set.name_any(),
                &PatchParams::default(),
                &Patch::Merge(patch),
            )
            .await
            .with_context(|| format!("could not change replica set {}", set.name_any()))?;
        self.cluster.replica_sets.note(written.clone());
        Ok(Arc::new(written))
    }

    /// Once the rollout is complete, removes the oldest ReplicaSets beyond the history limit.
    async fn clean_up(&self, rollout: &Rollout) -> anyhow::Result<()> {
        let Some(keep) = rollout.spec.revision_history_limit else {
            return Ok(());
        };
        if !status::is_complete(rollout) {
            return Ok(());
        }
        let idle = |set: &&Arc<ReplicaSet>| {
            let status = set.status.clone().unwrap_or_default();
            wanted(set) == 0
                && status.replicas == 0
                && status.observed_generation.unwrap_or(0) >= set.metadata.generation.unwrap_or(0)
                && set.metadata.deletion_timestamp.is_none()
        };
        let mut old: Vec<_> = rollout.old.iter().filter(idle).collect();
        old.sort_by_key(|set| revision::of(set));
        let surplus = rollout
            .old
            .len()
            .saturating_sub(usize::try_from(keep).unwrap_or(usize::MAX));
        let api = Api::<ReplicaSet>::namespaced(self.cluster.client.clone(), &rollout.namespace());
        for set in old.into_iter().take(surplus) {
            match api.delete(&set.name_any(), &DeleteParams::default()).await {
                Ok(_) => {}
                Err(error) if is_code(&error, 404) => {}
                Err(error) => return Err(error).context("could not remove an old replica set"),
            }
        }
        Ok(())
    }

    async fn write_status(&self, rollout: &Rollout) -> anyhow::Result<Again> {
        let outcome = status::of(rollout);
        if let Some(status) = outcome.status {
            let deployment = &rollout.deployment;
            let patch = json!({"metadata": {"uid": deployment.metadata.uid}, "status": status});
            let api =
                Api::<Deployment>::namespaced(self.cluster.client.clone(), &rollout.namespace());
            match api
                .patch_status(
                    &deployment.name_any(),
                    &PatchParams::default(),
                    &Patch::Merge(patch),
                )
                .await
            {
                Ok(written) => self.cluster.deployments.note(written),
                Err(error) if is_code(&error, 404) => {}
                Err(error) => return Err(error).context("could not write the status"),
            }
        }
        Ok(outcome.again)
    }
}
