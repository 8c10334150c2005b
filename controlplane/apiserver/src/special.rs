//! Subresources with a meaning of their own, and resources that are answered on the spot.

use http::StatusCode;
use serde_json::{Value, json};
use xebec_schema::Object;
use xebec_schema::field_error::FieldError;
use xebec_schema::table::{self, Resource};

use crate::authn::UserInfo;
use crate::authz;
use crate::error::ApiError;
use crate::handler::{Answer, Call, Handler, type_of};
use crate::registry::{self, DeleteOptions, Part};
use crate::request::ResourceRequest;

/// Limits of a token's life, seconds.
const SHORTEST_TOKEN: i64 = 600;
const LONGEST_TOKEN: i64 = 1 << 32;

impl Handler {
    /// A subresource other than `status`.
    pub(crate) async fn subresource(&self, sub: &str, call: Call) -> Answer {
        let resource = call.request.resource;
        let allowed = resource
            .subresource(sub)
            .is_some_and(|sub| sub.verbs.contains(&call.request.verb));
        if !allowed || call.request.name.is_none() {
            return Err(ApiError::method_not_allowed());
        }
        match (resource.plural, sub) {
            (_, "scale") => self.scale(call).await,
            ("pods", "binding") => self.bind(call).await,
            ("pods", "eviction") => self.evict(call).await,
            ("pods", "log" | "exec" | "attach" | "portforward") => self.pod_stream(sub, call).await,
            ("pods", "ephemeralcontainers" | "resize") if call.request.verb == "get" => {
                let object = self
                    .registry
                    .get(
                        resource,
                        call.request.namespace.as_deref(),
                        call.request.name.as_deref().unwrap_or_default(),
                    )
                    .await?;
                Ok(call.accept.respond(StatusCode::OK, &object))
            }
            ("namespaces", "finalize") => self.finalize(call).await,
            ("serviceaccounts", "token") => self.token(call).await,
            _ => Err(ApiError::method_not_allowed()),
        }
    }

    /// `namespaces/finalize`: writes `spec.finalizers`.
    async fn finalize(&self, mut call: Call) -> Answer {
        let (body, media) = self.read_body(&mut call).await?;
        let resource = call.request.resource;
        let (object, _) = self.decode_as(
            &call,
            &body,
            media,
            ("", "v1", "Namespace"),
            resource.type_id,
        )?;
        let name = call.request.name.clone().unwrap_or_default();
        let written = self
            .registry
            .update(resource, None, &name, Part::Raw, false, |old| {
                let mut new = old.clone();
                new["spec"]["finalizers"] = object["spec"]["finalizers"].clone();
                new["metadata"]["resourceVersion"] = object["metadata"]["resourceVersion"].clone();
                Ok(new)
            })
            .await?;
        Ok(call.accept.respond(StatusCode::OK, &written))
    }

    /// `pods/binding`: gives a pod its node, once.
    async fn bind(&self, mut call: Call) -> Answer {
        let (body, media) = self.read_body(&mut call).await?;
        let ty = type_of("", "v1", "Binding")?;
        let (binding, _) = self.decode_as(&call, &body, media, ("", "v1", "Binding"), ty)?;
        let name = call.request.name.clone().unwrap_or_default();
        let metadata = &binding["metadata"];
        if metadata["name"]
            .as_str()
            .is_some_and(|given| !given.is_empty() && given != name)
        {
            return Err(ApiError::bad_request(
                "name in URL does not match name in Binding object",
            ));
        }
        let target = &binding["target"];
        match target["kind"].as_str() {
            None | Some("" | "Node") => {}
            Some(_) => {
                let error =
                    FieldError::not_supported("target.kind", &target["kind"], &["Node", "<empty>"]);
                return Err(ApiError::internal(error.to_string()));
            }
        }
        let node = target["name"].as_str().unwrap_or_default().to_owned();
        if node.is_empty() {
            return Err(ApiError::internal(
                FieldError::required("target.name", "").to_string(),
            ));
        }
        let uid = metadata["uid"].clone();
        let resource = call.request.resource;
        self.registry
            .update(resource, call.request.namespace.as_deref(), &name, Part::Raw, self.dry_run(&call)?, |old| {
                let conflict = |why: String| binding_conflict(resource, &name, &why);
                if uid.as_str().is_some_and(|uid| !uid.is_empty() && old["metadata"]["uid"] != uid) {
                    return Err(conflict(format!("Precondition failed: UID in precondition: {}, UID in object meta: {}", uid.as_str().unwrap_or_default(), old["metadata"]["uid"].as_str().unwrap_or_default())));
                }
                if !old["metadata"]["deletionTimestamp"].is_null() {
                    return Err(conflict(format!("pod {name} is being deleted, cannot be assigned to a host")));
                }
                if let Some(bound) = old["spec"]["nodeName"].as_str().filter(|bound| !bound.is_empty()) {
                    return Err(conflict(format!("pod {name} is already assigned to node {bound:?}")));
                }
                if old["spec"]["schedulingGates"].as_array().is_some_and(|gates| !gates.is_empty()) {
                    return Err(conflict(format!("pod {name} has non-empty .spec.schedulingGates")));
                }
                let mut new = old.clone();
                new["spec"]["nodeName"] = node.clone().into();
                for (key, value) in metadata["annotations"].as_object().into_iter().flatten() {
                    new["metadata"]["annotations"][key] = value.clone();
                }
                set_condition(&mut new, json!({"type": "PodScheduled", "status": "True", "lastProbeTime": null, "lastTransitionTime": registry::now()}));
                Ok(new)
            })
            .await?;
        Ok(call.accept.respond(StatusCode::CREATED, &success()))
    }

    /// `pods/eviction`: a delete that respects PodDisruptionBudgets.
    async fn evict(&self, mut call: Call) -> Answer {
        let (body, media) = self.read_body(&mut call).await?;
        let ty = type_of("policy", "v1", "Eviction")?;
        let (eviction, _) =
            self.decode_as(&call, &body, media, ("policy", "v1", "Eviction"), ty)?;
        let name = call.request.name.clone().unwrap_or_default();
        if eviction["metadata"]["name"]
            .as_str()
            .is_some_and(|given| !given.is_empty() && given != name)
        {
            return Err(ApiError::bad_request(
                "name in URL does not match name in Eviction object",
            ));
        }
        let resource = call.request.resource;
        let namespace = call.request.namespace.clone().unwrap_or_default();
        let pod = self.registry.get(resource, Some(&namespace), &name).await?;
        let free = matches!(
            pod["status"]["phase"].as_str(),
            Some("Pending" | "Succeeded" | "Failed")
        ) || !pod["metadata"]["deletionTimestamp"].is_null();
        if !free {
            self.spend_disruption(&namespace, &name, &pod).await?;
        }
        let options = DeleteOptions {
            grace: eviction["deleteOptions"]["gracePeriodSeconds"].as_i64(),
            dry_run: self.dry_run(&call)?,
            ..DeleteOptions::default()
        };
        self.delete_object(resource, Some(&namespace), &name, &options)
            .await?;
        Ok(call.accept.respond(StatusCode::CREATED, &success()))
    }

    /// Takes one disruption from the budget that covers a pod, if there is one.
    async fn spend_disruption(
        &self,
        namespace: &str,
        name: &str,
        pod: &Object,
    ) -> Result<(), ApiError> {
        let Some(budgets) = table::resource("policy", "v1", "poddisruptionbudgets") else {
            return Ok(());
        };
        let range = registry::prefix_range(registry::key(budgets, Some(namespace), None));
        let found = self
            .registry
            .store
            .range(xebec_store::RangeRequest {
                keys: range,
                at: None,
                limit: 0,
            })
            .await?;
        let mut covering = Vec::new();
        for kv in &found.kvs {
            let budget =
                crate::encode::parse(kv).map_err(|error| ApiError::internal(error.to_string()))?;
            let selector =
                xebec_schema::selector::LabelSelector::from_object(&budget["spec"]["selector"])
                    .map_err(ApiError::internal)?;
            if !budget["spec"]["selector"].is_null()
                && selector.matches(pod["metadata"]["labels"].as_object())
            {
                covering.push(budget);
            }
        }
        match covering.as_slice() {
            [] => Ok(()),
            [budget] => {
                let budget_name = budget["metadata"]["name"]
                    .as_str()
                    .unwrap_or_default()
                    .to_owned();
                self.registry
                    .update(budgets, Some(namespace), &budget_name, Part::Raw, false, |old| {
                        let allowed = old["status"]["disruptionsAllowed"].as_i64().unwrap_or(0);
                        if allowed <= 0 {
                            return Err(ApiError::too_many_requests("Cannot evict pod as it would violate the pod's disruption budget."));
                        }
                        let mut new = old.clone();
                        new["status"]["disruptionsAllowed"] = (allowed - 1).into();
                        new["status"]["disruptedPods"][name] = registry::now().into();
                        Ok(new)
                    })
                    .await
                    .map(drop)
            }
            _ => Err(ApiError::internal(
                "This pod has more than one PodDisruptionBudget, which the eviction subresource does not support.",
            )),
        }
    }

    /// `scale` of Deployments, ReplicaSets, StatefulSets and ReplicationControllers.
    async fn scale(&self, mut call: Call) -> Answer {
        let resource = call.request.resource;
        let name = call.request.name.clone().unwrap_or_default();
        let namespace = call.request.namespace.clone();
        let current = self
            .registry
            .get(resource, namespace.as_deref(), &name)
            .await?;
        let wanted = match call.request.verb {
            "get" => return Ok(call.accept.respond(StatusCode::OK, &scale_of(&current))),
            "update" => {
                let (body, media) = self.read_body(&mut call).await?;
                let ty = type_of("autoscaling", "v1", "Scale")?;
                self.decode_as(&call, &body, media, ("autoscaling", "v1", "Scale"), ty)?
                    .0
            }
            _ => {
                let (body, _) = self.read_body(&mut call).await?;
                let media = call
                    .headers
                    .get(http::header::CONTENT_TYPE)
                    .and_then(|value| value.to_str().ok())
                    .unwrap_or_default();
                let mut patched = if media.starts_with("application/json-patch+json") {
                    xebec_schema::patch::json_patch(&scale_of(&current), &body)?
                } else {
                    xebec_schema::patch::merge_patch(&scale_of(&current), &body)?
                };
                if let Some(metadata) = patched["metadata"]
                    .as_object_mut()
                    .filter(|_| !String::from_utf8_lossy(&body).contains("resourceVersion"))
                {
                    metadata.remove("resourceVersion");
                }
                patched
            }
        };
        let replicas = wanted["spec"]["replicas"].as_i64().unwrap_or(0);
        if replicas < 0 {
            let error = FieldError::invalid(
                "spec.replicas",
                &wanted["spec"]["replicas"],
                "must be greater than or equal to 0",
            );
            return Err(ApiError::invalid("Scale", "autoscaling", &name, &[error]));
        }
        let version = wanted["metadata"]["resourceVersion"]
            .as_str()
            .unwrap_or_default()
            .to_owned();
        let written = self
            .registry
            .update(
                resource,
                namespace.as_deref(),
                &name,
                Part::Main,
                self.dry_run(&call)?,
                |old| {
                    let mut new = old.clone();
                    new["spec"]["replicas"] = replicas.into();
                    new["metadata"]["resourceVersion"] = version.clone().into();
                    Ok(new)
                },
            )
            .await?;
        Ok(call.accept.respond(StatusCode::OK, &scale_of(&written)))
    }

    /// `serviceaccounts/token`: a token for an account, bound to a pod where one is named.
    async fn token(&self, mut call: Call) -> Answer {
        let (body, media) = self.read_body(&mut call).await?;
        let ty = type_of("authentication.k8s.io", "v1", "TokenRequest")?;
        let (mut request, _) = self.decode_as(
            &call,
            &body,
            media,
            ("authentication.k8s.io", "v1", "TokenRequest"),
            ty,
        )?;
        let name = call.request.name.clone().unwrap_or_default();
        let namespace = call.request.namespace.clone().unwrap_or_default();
        let account = self
            .registry
            .get(call.request.resource, Some(&namespace), &name)
            .await?;
        let seconds = request["spec"]["expirationSeconds"]
            .as_i64()
            .unwrap_or(3600);
        let bound = request["spec"]["boundObjectRef"].clone();
        if seconds < SHORTEST_TOKEN || seconds > LONGEST_TOKEN {
            let detail = if seconds < SHORTEST_TOKEN {
                "may not specify a duration less than 10 minutes"
            } else {
                "may not specify a duration larger than 2^32 seconds"
            };
            let error = FieldError::invalid("spec.expirationSeconds", &json!(seconds), detail);
            return Err(ApiError::invalid(
                "TokenRequest",
                "authentication.k8s.io",
                "",
                &[error],
            ));
        }
        let mut kubernetes = json!({
            "namespace": namespace,
            "serviceaccount": {"name": name, "uid": account["metadata"]["uid"]},
        });
        match bound["kind"].as_str() {
            None => {}
            Some(kind @ ("Pod" | "Secret")) => {
                let plural = if kind == "Pod" { "pods" } else { "secrets" };
                let Some(resource) = table::resource("", "v1", plural) else {
                    return Err(ApiError::no_resource());
                };
                let object_name = bound["name"].as_str().unwrap_or_default();
                let object = self
                    .registry
                    .get(resource, Some(&namespace), object_name)
                    .await?;
                let uid = object["metadata"]["uid"].as_str().unwrap_or_default();
                if bound["uid"]
                    .as_str()
                    .is_some_and(|wanted| !wanted.is_empty() && wanted != uid)
                {
                    return Err(ApiError::conflict(
                        resource,
                        object_name,
                        "the UID in the bound object reference does not match the UID in record. The object might have been deleted and then recreated",
                    ));
                }
                kubernetes[kind.to_lowercase()] = json!({"name": object_name, "uid": uid});
            }
            Some(kind) => {
                return Err(ApiError::bad_request(format!(
                    "cannot bind token to object of type {}, Kind={kind}",
                    bound["apiVersion"]
                        .as_str()
                        .map_or_else(String::new, |v| format!("/{v}"))
                )));
            }
        }
        let now = time::OffsetDateTime::now_utc();
        let end = now + time::Duration::seconds(seconds);
        let audiences = match request["spec"]["audiences"]
            .as_array()
            .filter(|all| !all.is_empty())
        {
            Some(all) => Value::Array(all.clone()),
            None => json!([self.tokens.issuer]),
        };
        let claims = json!({
            "iss": self.tokens.issuer, "aud": audiences, "sub": format!("system:serviceaccount:{namespace}:{name}"),
            "iat": now.unix_timestamp(), "nbf": now.unix_timestamp(), "exp": end.unix_timestamp(),
            "jti": uuid::Uuid::new_v4().to_string(), "kubernetes.io": kubernetes,
        });
        let token = self.tokens.sign(&claims).map_err(ApiError::internal)?;
        let shown = end.replace_nanosecond(0).unwrap_or(end);
        request["status"] = json!({
            "token": token,
            "expirationTimestamp": shown.format(&time::format_description::well_known::Rfc3339).unwrap_or_default(),
        });
        request["spec"]["audiences"] = audiences;
        request["spec"]["expirationSeconds"] = seconds.into();
        request["metadata"]["name"] = name.into();
        request["metadata"]["namespace"] = namespace.into();
        request["metadata"]["creationTimestamp"] = registry::now().into();
        Ok(call.accept.respond(StatusCode::CREATED, &request))
    }

    /// Reviews and the like: a POST that is answered and forgotten.
    pub(crate) async fn virtual_resource(&self, mut call: Call) -> Answer {
        let resource = call.request.resource;
        if resource.plural == "componentstatuses" && call.request.verb == "list" {
            let list = json!({"kind": "ComponentStatusList", "apiVersion": "v1", "metadata": {}, "items": []});
            return Ok(call.accept.respond(StatusCode::OK, &list));
        }
        if call.request.verb != "create" {
            return Err(ApiError::method_not_allowed());
        }
        if resource.kind == "Binding" {
            return Err(ApiError::bad_request(
                "use the binding subresource of the pod: pods/<name>/binding",
            ));
        }
        let (body, media) = self.read_body(&mut call).await?;
        let expected = (resource.group, resource.version, resource.kind);
        let (mut review, _) = self.decode_as(&call, &body, media, expected, resource.type_id)?;
        review["status"] = match resource.kind {
            "SelfSubjectAccessReview" => access(&call.user, &review["spec"]),
            "SubjectAccessReview" | "LocalSubjectAccessReview" => {
                let groups: Vec<&str> = review["spec"]["groups"]
                    .as_array()
                    .into_iter()
                    .flatten()
                    .filter_map(Value::as_str)
                    .collect();
                access(
                    &UserInfo::new(review["spec"]["user"].as_str().unwrap_or_default(), &groups),
                    &review["spec"],
                )
            }
            "SelfSubjectReview" => json!({"userInfo": call.user.to_value()}),
            "SelfSubjectRulesReview" => rules(&call.user),
            "TokenReview" => self.review_token(&review["spec"]).await,
            _ => return Err(ApiError::method_not_allowed()),
        };
        if review["metadata"].is_null() {
            review["metadata"] = json!({"creationTimestamp": null});
        }
        Ok(call.accept.respond(StatusCode::CREATED, &review))
    }

    /// Whose token it is, and whether what it is bound to still exists.
    async fn review_token(&self, spec: &Value) -> Value {
        let wanted: Vec<&str> = spec["audiences"]
            .as_array()
            .into_iter()
            .flatten()
            .filter_map(Value::as_str)
            .collect();
        let token = spec["token"].as_str().unwrap_or_default();
        let verified = if wanted.is_empty() {
            self.tokens.verify(token, None)
        } else {
            wanted
                .iter()
                .map(|audience| self.tokens.verify(token, Some(audience)))
                .find(Result::is_ok)
                .unwrap_or(Err("for another audience"))
        };
        match verified {
            Ok(claims) if self.still_there(claims.bound()).await => {
                let audiences: Vec<String> = claims
                    .audiences()
                    .into_iter()
                    .filter(|one| wanted.is_empty() || wanted.contains(&one.as_str()))
                    .collect();
                json!({"authenticated": true, "user": claims.user().to_value(), "audiences": audiences})
            }
            Ok(_) => {
                json!({"user": {}, "error": "[invalid bearer token, what the token is bound to is gone]"})
            }
            Err(why) => json!({"user": {}, "error": format!("[invalid bearer token, {why}]")}),
        }
    }

    async fn still_there(&self, bound: &Value) -> bool {
        let namespace = bound["namespace"].as_str();
        for (claim, plural) in [
            ("serviceaccount", "serviceaccounts"),
            ("pod", "pods"),
            ("secret", "secrets"),
        ] {
            let Some(name) = bound[claim]["name"].as_str() else {
                continue;
            };
            let Some(resource) = table::resource("", "v1", plural) else {
                return false;
            };
            match self.registry.get(resource, namespace, name).await {
                Ok(object) if object["metadata"]["uid"] == bound[claim]["uid"] => {}
                _ => return false,
            }
        }
        true
    }
}

fn success() -> Value {
    json!({"kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Success", "code": 201})
}

fn binding_conflict(resource: &Resource, name: &str, why: &str) -> ApiError {
    ApiError::conflict(resource, name, why).renamed("pods/binding")
}

/// Sets or replaces a condition of the status by its type.
fn set_condition(object: &mut Object, condition: Value) {
    match object["status"]["conditions"].as_array_mut() {
        Some(all) => {
            all.retain(|one| one["type"] != condition["type"]);
            all.push(condition);
        }
        None => object["status"]["conditions"] = json!([condition]),
    }
}

/// `autoscaling/v1` Scale of a workload.
fn scale_of(object: &Object) -> Object {
    let metadata = &object["metadata"];
    let selector = &object["spec"]["selector"];
    let labels = selector.get("matchLabels").unwrap_or(selector);
    let text: Vec<String> = labels
        .as_object()
        .into_iter()
        .flatten()
        .map(|(key, value)| format!("{key}={}", value.as_str().unwrap_or_default()))
        .collect();
    let mut own = json!({});
    for key in [
        "name",
        "namespace",
        "uid",
        "resourceVersion",
        "creationTimestamp",
    ] {
        own[key] = metadata[key].clone();
    }
    json!({
        "kind": "Scale", "apiVersion": "autoscaling/v1", "metadata": own,
        "spec": {"replicas": object["spec"]["replicas"].as_i64().unwrap_or(0)},
        "status": {"replicas": object["status"]["replicas"].as_i64().unwrap_or(0), "selector": text.join(",")},
    })
}

/// The status of an access review.
fn access(user: &UserInfo, spec: &Value) -> Value {
    let allowed = match (&spec["resourceAttributes"], &spec["nonResourceAttributes"]) {
        (Value::Object(attributes), _) => {
            let text = |key: &str| {
                attributes
                    .get(key)
                    .and_then(Value::as_str)
                    .unwrap_or_default()
            };
            let resource = table::resources()
                .iter()
                .find(|r| r.group == text("group") && r.plural == text("resource"));
            let verb = [
                "get",
                "list",
                "watch",
                "create",
                "update",
                "patch",
                "delete",
                "deletecollection",
            ]
            .into_iter()
            .find(|verb| *verb == text("verb"))
            .unwrap_or("");
            match resource {
                Some(resource) => {
                    let request = ResourceRequest {
                        resource,
                        namespace: None,
                        name: None,
                        subresource: None,
                        verb,
                    };
                    authz::resource(user, &request).is_ok()
                }
                None => authz::is_trusted(user),
            }
        }
        (_, Value::Object(attributes)) => {
            let text = |key: &str| {
                attributes
                    .get(key)
                    .and_then(Value::as_str)
                    .unwrap_or_default()
            };
            authz::path(user, text("path"), text("verb")).is_ok()
        }
        _ => false,
    };
    json!({"allowed": allowed})
}

/// The status of a rules review, as far as the rules are known.
fn rules(user: &UserInfo) -> Value {
    let all = json!([{"verbs": ["*"], "apiGroups": ["*"], "resources": ["*"]}]);
    let (resources, paths) = if authz::is_trusted(user) {
        (all, json!([{"verbs": ["*"], "nonResourceURLs": ["*"]}]))
    } else {
        (
            json!([{"verbs": ["create"], "apiGroups": ["authorization.k8s.io"], "resources": ["selfsubjectaccessreviews", "selfsubjectrulesreviews"]}]),
            json!([{"verbs": ["get"], "nonResourceURLs": ["/healthz", "/livez", "/readyz", "/version", "/api", "/apis"]}]),
        )
    };
    json!({"resourceRules": resources, "nonResourceRules": paths, "incomplete": false})
}
