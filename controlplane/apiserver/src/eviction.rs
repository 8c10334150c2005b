//! `pods/eviction`: a delete that asks the pod's disruption budget first.

use http::StatusCode;
use serde_json::{Value, json};
use xebec_schema::Object;
use xebec_schema::apply::ApplyOptions;
use xebec_schema::selector::LabelSelector;
use xebec_schema::table;
use xebec_store::RangeRequest;

use crate::error::ApiError;
use crate::handler::{self, Answer, Call, Handler, collect};
use crate::registry::{self, DeleteOptions, Part, now, prefix_range};
use crate::request::ResourceRequest;
use crate::server::RequestBody;
use crate::special::{set_condition, success, unversioned};
use crate::verbs::dry_run;

/// Evicted pods that a budget remembers until they are gone.
const MOST_DISRUPTED: usize = 2000;

impl Handler {
    pub(crate) async fn evict(
        &self,
        about: &ResourceRequest,
        call: &Call,
        body: RequestBody,
    ) -> Answer {
        let name = about.name.as_deref().unwrap_or_default();
        let body = collect(body).await?;
        let given: Value = serde_json::from_slice(&body).map_err(|error| {
            ApiError::bad_request(format!("the eviction can't be read: {error}"))
        })?;
        if given["metadata"]["name"]
            .as_str()
            .is_some_and(|given| given != name)
        {
            return Err(ApiError::bad_request(
                "name in URL does not match name in Eviction object",
            ));
        }
        let asked = &given["deleteOptions"];
        let text = |value: &Value| value.as_str().map(str::to_owned);
        let options = DeleteOptions {
            grace: asked["gracePeriodSeconds"].as_i64(),
            uid: text(&asked["preconditions"]["uid"]),
            resource_version: text(&asked["preconditions"]["resourceVersion"]),
            propagation: text(&asked["propagationPolicy"]),
            dry_run: dry_run(&call.query, "CreateOptions")? || asked["dryRun"] == json!(["All"]),
        };
        let namespace = about.namespace.as_deref();
        let pod = self.registry.get(about.resource, namespace, name).await?;
        if !needs_no_leave(&pod) {
            self.ask_budget(&pod, namespace, options.dry_run).await?;
        }
        if !options.dry_run {
            self.mark_evicted(about, name).await?;
        }
        self.registry
            .delete(about.resource, namespace, name, &options)
            .await?;
        Ok(handler::value(
            StatusCode::CREATED,
            &success(201),
            call.negotiated.yaml,
        ))
    }

    /// Takes one disruption from the budget that selects the pod, where one does.
    async fn ask_budget(
        &self,
        pod: &Object,
        namespace: Option<&str>,
        dry: bool,
    ) -> Result<(), ApiError> {
        let Some(budgets) = table::resource("policy", "v1", "poddisruptionbudgets") else {
            return Ok(());
        };
        let found = self
            .registry
            .store
            .range(RangeRequest {
                keys: prefix_range(registry::key(budgets, namespace, None)),
                at: None,
                limit: 0,
            })
            .await?;
        let mut names = Vec::new();
        for kv in &found.kvs {
            let budget = registry::decode(kv)?;
            let selector = LabelSelector::from_object(&budget["spec"]["selector"])
                .map_err(ApiError::internal)?;
            if selector.matches(pod["metadata"]["labels"].as_object()) {
                let name = budget["metadata"]["name"].as_str().unwrap_or_default();
                names.push(name.to_owned());
            }
        }
        let budget = match names.as_slice() {
            [] => return Ok(()),
            [one] => one,
            _ => {
                return Err(ApiError::unexplained(
                    "This pod has more than one PodDisruptionBudget, which the eviction subresource does not support.",
                ));
            }
        };
        let pod_name = pod["metadata"]["name"].as_str().unwrap_or_default();
        let (time, api_version) = (now(), budgets.api_version());
        let track = ApplyOptions {
            manager: "kube-apiserver",
            force: false,
            api_version: &api_version,
            subresource: "status",
            now: &time,
        };
        self.registry
            .update(
                budgets,
                namespace,
                budget,
                Part::Status,
                dry,
                Some(&track),
                |old| take_disruption(old, pod_name),
            )
            .await
            .map(drop)
    }

    /// Others see by a condition that the pod does not end by itself.
    async fn mark_evicted(&self, about: &ResourceRequest, name: &str) -> Result<(), ApiError> {
        let change = |old: &Object| {
            let mut new = unversioned(old);
            if old["metadata"]["deletionTimestamp"].is_null() {
                let condition = json!({
                    "type": "DisruptionTarget", "status": "True", "reason": "EvictionByEvictionAPI",
                    "message": "Eviction API: evicting", "lastProbeTime": null, "lastTransitionTime": now(),
                });
                set_condition(&mut new, condition);
            }
            Ok(new)
        };
        let namespace = about.namespace.as_deref();
        self.registry
            .update(
                about.resource,
                namespace,
                name,
                Part::Raw,
                false,
                None,
                change,
            )
            .await
            .map(drop)
    }
}

/// Pods whose end disturbs nobody: not started, ended, or on their way out.
fn needs_no_leave(pod: &Object) -> bool {
    matches!(
        pod["status"]["phase"].as_str(),
        Some("Succeeded" | "Failed" | "Pending")
    ) || !pod["metadata"]["deletionTimestamp"].is_null()
}

/// The budget with one disruption less, or why there is none.
fn take_disruption(budget: &Object, pod: &str) -> Result<Object, ApiError> {
    let name = budget["metadata"]["name"].as_str().unwrap_or_default();
    let status = &budget["status"];
    let number = |key: &str| status[key].as_i64().unwrap_or(0);
    let seen = number("observedGeneration");
    if seen < budget["metadata"]["generation"].as_i64().unwrap_or(0) {
        let why = format!("The disruption budget {name} is still being processed by the server.");
        return Err(ApiError::too_many_requests(&why, Some(10)));
    }
    let disrupted = status["disruptedPods"]
        .as_object()
        .map_or(0, |all| all.len());
    if disrupted > MOST_DISRUPTED {
        return Err(ApiError::too_many_requests(
            "DisruptedPods map too big - too many evictions not confirmed by PDB controller",
            Some(10),
        ));
    }
    let left = number("disruptionsAllowed") - 1;
    if left < 0 {
        let why = format!(
            "The disruption budget {name} needs {} healthy pods and has {} currently",
            number("desiredHealthy"),
            number("currentHealthy")
        );
        return Err(ApiError::too_many_requests(&why, None));
    }
    let mut new = unversioned(budget);
    let (value, reason) = if left > 0 {
        ("True", "SufficientPods")
    } else {
        ("False", "InsufficientPods")
    };
    let before = status["conditions"].as_array().into_iter().flatten();
    let same = |one: &&Value| one["type"] == "DisruptionAllowed" && one["status"] == value;
    let since = match before.clone().find(same) {
        Some(one) => one["lastTransitionTime"].clone(),
        None => now().into(),
    };
    let condition = json!({
        "type": "DisruptionAllowed", "status": value, "reason": reason, "message": "",
        "observedGeneration": seen, "lastTransitionTime": since,
    });
    new["status"]["disruptionsAllowed"] = left.into();
    new["status"]["disruptedPods"][pod] = now().into();
    set_condition(&mut new, condition);
    Ok(new)
}
