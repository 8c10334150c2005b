//! A Deployment's status: counts, and the conditions Available, Progressing and ReplicaFailure.

use std::time::Duration;

use k8s_openapi::api::apps::v1::{
    DeploymentCondition, DeploymentSpec, DeploymentStatus, ReplicaSet,
};
use k8s_openapi::jiff::{SignedDuration, Timestamp};
use kube::ResourceExt;
use serde_json::json;

use super::{Rollout, wanted};
use crate::pods;
use crate::queue::Again;

const COMPLETE: &str = "NewReplicaSetAvailable";
const TIMED_OUT: &str = "ProgressDeadlineExceeded";
const PAUSED: &str = "DeploymentPaused";

/// The status to write, `None` where it is as it should be; and when to look again.
pub(super) struct Outcome {
    pub status: Option<serde_json::Value>,
    pub again: Again,
}

/// Conditions by type, with the rules of when their times move.
#[derive(Clone, Debug)]
pub(super) struct Conditions(Vec<DeploymentCondition>);

impl Conditions {
    pub(super) fn new(conditions: Vec<DeploymentCondition>) -> Self {
        Self(conditions)
    }

    fn get(&self, type_: &str) -> Option<&DeploymentCondition> {
        self.0.iter().find(|condition| condition.type_ == type_)
    }

    fn remove(&mut self, type_: &str) {
        self.0.retain(|condition| condition.type_ != type_);
    }

    /// Sets a condition; the same status and reason change nothing, unless `fresh` asks for a new update time.
    fn set(&mut self, type_: &str, status: bool, reason: &str, message: &str, fresh: bool) {
        let status = if status { "True" } else { "False" };
        let before = self.get(type_).cloned();
        if let Some(before) = &before
            && before.status == status
            && before.reason.as_deref() == Some(reason)
            && !fresh
        {
            return;
        }
        let now = pods::now();
        let since = before
            .filter(|before| before.status == status)
            .and_then(|before| before.last_transition_time);
        self.remove(type_);
        self.0.push(DeploymentCondition {
            type_: type_.into(),
            status: status.into(),
            reason: Some(reason.into()),
            message: Some(message.into()),
            last_transition_time: Some(since.unwrap_or_else(|| now.clone())),
            last_update_time: Some(now),
        });
    }

    /// Progress is not expected while the rollout is paused; the deadline starts anew afterwards.
    pub(super) fn pause(&mut self, spec: &DeploymentSpec) {
        if spec.progress_deadline_seconds.is_none() {
            return;
        }
        let reason = self
            .get("Progressing")
            .and_then(|condition| condition.reason.as_deref());
        if reason == Some(TIMED_OUT) {
            return;
        }
        let paused = spec.paused == Some(true);
        if paused && reason != Some(PAUSED) {
            self.unknown(PAUSED, "Deployment is paused");
        } else if !paused && reason == Some(PAUSED) {
            self.unknown("DeploymentResumed", "Deployment is resumed");
        }
    }

    fn unknown(&mut self, reason: &str, message: &str) {
        self.set("Progressing", true, reason, message, false);
        if let Some(last) = self.0.last_mut() {
            last.status = "Unknown".into();
        }
    }

    fn progressing(&mut self, spec: &DeploymentSpec, status: bool, reason: &str, message: String) {
        if has_deadline(spec) {
            self.set("Progressing", status, reason, &message, false);
        }
    }

    pub(super) fn created(&mut self, spec: &DeploymentSpec, name: &str) {
        let message = format!("Created new replica set {name:?}");
        self.progressing(spec, true, "NewReplicaSetCreated", message);
    }

    pub(super) fn create_failed(&mut self, spec: &DeploymentSpec, message: &str) {
        self.progressing(spec, false, "ReplicaSetCreateError", message.into());
    }

    /// The ReplicaSet was there already; said only where nothing else is.
    pub(super) fn found(&mut self, spec: &DeploymentSpec, name: &str) {
        if self.get("Progressing").is_none() {
            let message = format!("Found new replica set {name:?}");
            self.progressing(spec, true, "FoundNewReplicaSet", message);
        }
    }
}

fn has_deadline(spec: &DeploymentSpec) -> bool {
    spec.progress_deadline_seconds
        .is_some_and(|seconds| seconds != i32::MAX)
}

/// Counts from the ReplicaSets' statuses.
fn counts(rollout: &Rollout) -> DeploymentStatus {
    let sum = |count: fn(&k8s_openapi::api::apps::v1::ReplicaSetStatus) -> Option<i32>| -> i32 {
        rollout
            .all()
            .filter_map(|set| set.status.as_ref().and_then(count))
            .sum()
    };
    let some = |count: i32| (count != 0).then_some(count);
    let available = sum(|status| status.available_replicas);
    let wanted_total: i32 = rollout.total();
    let updated = rollout
        .new
        .as_ref()
        .and_then(|new| new.status.as_ref())
        .map_or(0, |status| status.replicas);
    DeploymentStatus {
        replicas: some(sum(|status| Some(status.replicas))),
        updated_replicas: some(updated),
        ready_replicas: some(sum(|status| status.ready_replicas)),
        available_replicas: some(available),
        unavailable_replicas: some((wanted_total - available).max(0)),
        terminating_replicas: Some(sum(|status| status.terminating_replicas)),
        observed_generation: rollout.deployment.metadata.generation,
        collision_count: some(rollout.collisions),
        conditions: None,
    }
}

/// Whether the rollout has reached its end.
pub(super) fn is_complete(rollout: &Rollout) -> bool {
    complete(&counts(rollout), rollout.desired())
}

fn complete(status: &DeploymentStatus, desired: i32) -> bool {
    let is = |count: Option<i32>| count.unwrap_or(0) == desired;
    is(status.updated_replicas) && is(status.replicas) && is(status.available_replicas)
}

/// What the status should be.
pub(super) fn of(rollout: &Rollout) -> Outcome {
    let old = rollout.deployment.status.clone().unwrap_or_default();
    let mut new = counts(rollout);
    let mut conditions = rollout.conditions.clone();
    let again = judge(rollout, &old, &new, &mut conditions, Timestamp::now());
    new.conditions = (!conditions.0.is_empty()).then_some(conditions.0);
    let status = (new != old).then(|| {
        json!({
            "replicas": new.replicas,
            "updatedReplicas": new.updated_replicas,
            "readyReplicas": new.ready_replicas,
            "availableReplicas": new.available_replicas,
            "unavailableReplicas": new.unavailable_replicas,
            "terminatingReplicas": new.terminating_replicas,
            "observedGeneration": new.observed_generation,
            "collisionCount": new.collision_count,
            "conditions": new.conditions,
        })
    });
    Outcome { status, again }
}

/// Sets the conditions; gives when the deadline is to be looked at.
fn judge(
    rollout: &Rollout,
    old: &DeploymentStatus,
    new: &DeploymentStatus,
    conditions: &mut Conditions,
    now: Timestamp,
) -> Again {
    let (spec, desired) = (&rollout.spec, rollout.desired());
    let least = if rollout.is_rolling() {
        desired - rollout.limits.unavailable
    } else {
        desired
    };
    if new.available_replicas.unwrap_or(0) >= least {
        let message = "Deployment has minimum availability.";
        conditions.set(
            "Available",
            true,
            "MinimumReplicasAvailable",
            message,
            false,
        );
    } else {
        let message = "Deployment does not have minimum availability.";
        conditions.set(
            "Available",
            false,
            "MinimumReplicasUnavailable",
            message,
            false,
        );
    }
    let failed = rollout
        .new
        .iter()
        .chain(&rollout.old)
        .find_map(|set| replica_failure(set));
    match failed {
        Some((reason, message)) => conditions.set("ReplicaFailure", true, &reason, &message, false),
        None => conditions.remove("ReplicaFailure"),
    }
    if !has_deadline(spec) {
        conditions.remove("Progressing");
        return None;
    }
    let reason = |conditions: &Conditions| {
        conditions
            .get("Progressing")
            .and_then(|condition| condition.reason.clone())
    };
    let number = |count: Option<i32>| count.unwrap_or(0);
    let settled =
        new.replicas == new.updated_replicas && reason(conditions).as_deref() == Some(COMPLETE);
    if !settled && spec.paused != Some(true) {
        let name = rollout.new.as_ref().map_or_else(
            || format!("Deployment {:?}", rollout.deployment.name_any()),
            |set| format!("ReplicaSet {:?}", set.name_any()),
        );
        let behind =
            |status: &DeploymentStatus| number(status.replicas) - number(status.updated_replicas);
        let moved = number(new.updated_replicas) > number(old.updated_replicas)
            || behind(new) < behind(old)
            || number(new.ready_replicas) > number(old.ready_replicas)
            || number(new.available_replicas) > number(old.available_replicas);
        if complete(new, desired)
            && rollout
                .new
                .as_ref()
                .is_some_and(|set| wanted(set) == desired)
        {
            let message = format!("{name} has successfully progressed.");
            conditions.set("Progressing", true, COMPLETE, &message, false);
        } else if moved {
            let message = format!("{name} is progressing.");
            conditions.set("Progressing", true, "ReplicaSetUpdated", &message, true);
        } else if left(conditions, spec, now).is_some_and(|left| left <= SignedDuration::ZERO) {
            let message = format!("{name} has timed out progressing.");
            conditions.set("Progressing", false, TIMED_OUT, &message, false);
        }
    }
    match reason(conditions).as_deref() {
        Some(COMPLETE | TIMED_OUT | PAUSED) => None,
        // A second more, so that the deadline has passed for certain.
        _ => left(conditions, spec, now)
            .and_then(|left| Duration::try_from(left + SignedDuration::from_secs(1)).ok()),
    }
}

/// How much of the progress deadline is left.
fn left(conditions: &Conditions, spec: &DeploymentSpec, now: Timestamp) -> Option<SignedDuration> {
    let since = conditions.get("Progressing")?.last_update_time.as_ref()?.0;
    let deadline = SignedDuration::from_secs(i64::from(spec.progress_deadline_seconds?));
    Some(deadline - now.duration_since(since))
}

fn replica_failure(set: &ReplicaSet) -> Option<(String, String)> {
    let conditions = set.status.as_ref()?.conditions.as_ref()?;
    let failure = conditions
        .iter()
        .find(|condition| condition.type_ == "ReplicaFailure" && condition.status == "True")?;
    Some((
        failure.reason.clone().unwrap_or_default(),
        failure.message.clone().unwrap_or_default(),
    ))
}
