//! Subresources other than status, and the kinds that are answered rather than stored.

use http::StatusCode;
use serde_json::{Value, json};
use xebec_schema::apply::{self, ApplyOptions};
use xebec_schema::decode::{FieldValidation, Media};
use xebec_schema::field_error::FieldError;
use xebec_schema::table::{self, Resource};
use xebec_schema::{Object, patch, shape};

use crate::authn::UserInfo;
use crate::authz;
use crate::error::ApiError;
use crate::handler::{self, Answer, Call, Handler, collect};
use crate::registry::{self, Part, now};
use crate::request::ResourceRequest;
use crate::server::RequestBody;
use crate::verbs::{
    PATCH_TYPES, apply_error, decode_as, decode_kind, dry_run, manager, media_type, patch_manager,
};

/// Shortest and longest life of a requested token, seconds.
const TOKEN_SECONDS: std::ops::RangeInclusive<i64> = 600..=(1 << 32);

impl Handler {
    pub(crate) async fn subresource(
        &self,
        about: &ResourceRequest,
        call: &Call,
        body: RequestBody,
    ) -> Answer {
        let sub = about.subresource.as_deref().unwrap_or_default();
        match (about.resource.plural, sub) {
            (_, "scale") => self.scale(about, call, body).await,
            ("pods", "binding") => self.bind(about, call, body).await,
            ("pods", "eviction") => self.evict(about, call, body).await,
            ("serviceaccounts", "token") => self.token(about, call, body).await,
            ("namespaces", "finalize") => self.finalize(about, call, body).await,
            // Not built yet: refused, so that nobody takes it for done.
            _ => Err(ApiError::method_not_allowed()),
        }
    }

    async fn scale(&self, about: &ResourceRequest, call: &Call, body: RequestBody) -> Answer {
        let resource = about.resource;
        let (name, namespace) = (
            about.name.as_deref().unwrap_or_default(),
            about.namespace.as_deref(),
        );
        let show = |object: &Object| {
            Ok(handler::value(
                StatusCode::OK,
                &scale_of(object),
                call.negotiated.yaml,
            ))
        };
        if about.verb == "get" {
            return show(&self.registry.get(resource, namespace, name).await?);
        }
        let dry = dry_run(&call.query, "UpdateOptions")?;
        let kind = media_type(&call.headers).to_owned();
        let body = collect(body).await?;
        let type_id = table::type_by_name("io.k8s.api.autoscaling.v1.Scale")
            .ok_or_else(|| ApiError::internal("the type table has no Scale"))?;
        let applying = about.verb == "patch" && kind == "application/apply-patch+yaml";
        let manager = match about.verb {
            "patch" => patch_manager(call, applying)?,
            _ => manager(call, "UpdateOptions")?,
        };
        let (time, api_version) = (now(), resource.api_version());
        let track = ApplyOptions {
            manager: &manager,
            force: call.query.flag("force"),
            api_version: &api_version,
            subresource: "scale",
            now: &time,
        };
        let written = self
            .registry
            .update(resource, namespace, name, Part::Main, dry, (!applying).then_some(&track), |old| {
                let scale = scale_of(old);
                let media = if applying || kind == "application/yaml" { Media::Yaml } else { Media::Json };
                let wanted = match (about.verb, kind.as_str()) {
                    ("update", _) | (_, "application/apply-patch+yaml") => decode_kind(&body, media, "autoscaling/v1", "Scale", type_id, FieldValidation::Warn)?.0,
                    (_, "application/json-patch+json") => patch::json_patch(&scale, &body)?,
                    (_, "application/merge-patch+json") => patch::merge_patch(&scale, &body)?,
                    (_, "application/strategic-merge-patch+json") => patch::strategic_merge_patch(&scale, &body, type_id)?,
                    _ => return Err(ApiError::unsupported_media(PATCH_TYPES)),
                };
                let given = wanted["metadata"]["name"].as_str().unwrap_or_default();
                if given != name {
                    return Err(ApiError::bad_request(format!(
                        "the name of the object ({given}) does not match the name on the URL ({name})"
                    )));
                }
                let replicas = &wanted["spec"]["replicas"];
                if replicas.as_i64().is_some_and(|number| number < 0) {
                    let error = FieldError::invalid(
                        "spec.replicas",
                        replicas,
                        "must be greater than or equal to 0",
                    );
                    return Err(ApiError::invalid("Scale", "autoscaling", name, &[error]));
                }
                let version = wanted["metadata"]["resourceVersion"].as_str().unwrap_or_default();
                if !version.is_empty() && version != old["metadata"]["resourceVersion"] {
                    return Err(ApiError::modified(resource, name));
                }
                if applying {
                    // The count of the scale is that of what is scaled.
                    let mut config = json!({"apiVersion": api_version, "kind": resource.kind, "metadata": {"name": name}});
                    if !replicas.is_null() {
                        config["spec"]["replicas"] = replicas.clone();
                    }
                    let live = unversioned(old);
                    let mut new = apply::apply(Some(&live), &config, resource.type_id, &track)
                        .map_err(|error| apply_error(&error))?;
                    // What is applied to a scale is booked without its time, as by the real server.
                    let managers = new["metadata"]["managedFields"].as_array_mut();
                    for one in managers.into_iter().flatten() {
                        if one["subresource"] == "scale" && one["operation"] == "Apply" {
                            one.as_object_mut().map(|one| one.remove("time"));
                        }
                    }
                    return Ok(new);
                }
                let exact = about.verb == "update" && !version.is_empty();
                let mut new = if exact { old.clone() } else { unversioned(old) };
                new["spec"]["replicas"] = replicas.as_i64().unwrap_or(0).into();
                Ok(new)
            })
            .await?;
        show(&written)
    }

    /// `pods/binding`, and the older `bindings`.
    pub(crate) async fn bind(
        &self,
        about: &ResourceRequest,
        call: &Call,
        body: RequestBody,
    ) -> Answer {
        let type_id = table::type_by_name("io.k8s.api.core.v1.Binding")
            .ok_or_else(|| ApiError::internal("the type table has no Binding"))?;
        let (binding, _) = decode_kind(
            &collect(body).await?,
            Media::Json,
            "v1",
            "Binding",
            type_id,
            FieldValidation::Warn,
        )?;
        let given = binding["metadata"]["name"].as_str().unwrap_or_default();
        let name = about.name.as_deref().unwrap_or(given);
        if !given.is_empty() && given != name {
            return Err(ApiError::bad_request(
                "name in URL does not match name in Binding object",
            ));
        }
        let node = binding["target"]["name"].as_str().unwrap_or_default();
        if node.is_empty() {
            return Err(ApiError::unexplained("target.name: Required value"));
        }
        let target = &binding["target"]["kind"];
        if !matches!(target.as_str(), None | Some("" | "Node")) {
            let error = FieldError::not_supported("target.kind", target, &["Node", "<empty>"]);
            return Err(ApiError::unexplained(error.to_string()));
        }
        let pods = table::resource("", "v1", "pods").ok_or_else(ApiError::no_resource)?;
        let uid = binding["metadata"]["uid"].as_str().unwrap_or_default();
        let dry = dry_run(&call.query, "CreateOptions")?;
        let change = |old: &Object| {
            let conflict =
                |why: &str| Err(ApiError::conflict(pods, name, why).renamed("pods/binding"));
            if !uid.is_empty() && old["metadata"]["uid"] != uid {
                return conflict(
                    "the UID in the precondition does not match the UID in record. The object might have been deleted and then recreated",
                );
            }
            if !old["metadata"]["deletionTimestamp"].is_null() {
                return conflict(&format!(
                    "pod {name} is being deleted, cannot be assigned to a host"
                ));
            }
            if let Some(host) = old["spec"]["nodeName"]
                .as_str()
                .filter(|host| !host.is_empty())
            {
                return conflict(&format!("pod {name} is already assigned to node {host:?}"));
            }
            let gates = old["spec"]["schedulingGates"].as_array();
            if gates.is_some_and(|gates| !gates.is_empty()) {
                return conflict(&format!("pod {name} has non-empty .spec.schedulingGates"));
            }
            let mut new = unversioned(old);
            new["spec"]["nodeName"] = node.into();
            for (key, value) in binding["metadata"]["annotations"]
                .as_object()
                .into_iter()
                .flatten()
            {
                new["metadata"]["annotations"][key] = value.clone();
            }
            let condition = json!({"type": "PodScheduled", "status": "True", "lastProbeTime": null, "lastTransitionTime": now()});
            set_condition(&mut new, condition);
            Ok(new)
        };
        self.registry
            .update(
                pods,
                about.namespace.as_deref(),
                name,
                Part::Raw,
                dry,
                None,
                change,
            )
            .await?;
        Ok(handler::value(
            StatusCode::CREATED,
            &success(201),
            call.negotiated.yaml,
        ))
    }

    /// `namespaces/finalize`: the finalizers of the spec, and nothing else.
    async fn finalize(&self, about: &ResourceRequest, call: &Call, body: RequestBody) -> Answer {
        let (given, _) = decode_as(
            &collect(body).await?,
            &call.headers,
            about.resource,
            &call.query,
        )?;
        let name = about.name.as_deref().unwrap_or_default();
        let change = |old: &Object| {
            let mut new = old.clone();
            new["metadata"]["resourceVersion"] = given["metadata"]["resourceVersion"].clone();
            match given["spec"]["finalizers"]
                .as_array()
                .filter(|all| !all.is_empty())
            {
                Some(all) => new["spec"]["finalizers"] = all.clone().into(),
                None => {
                    if let Some(spec) = new["spec"].as_object_mut() {
                        spec.remove("finalizers");
                    }
                }
            }
            Ok(new)
        };
        let written = self
            .registry
            .update(
                about.resource,
                None,
                name,
                Part::Raw,
                dry_run(&call.query, "UpdateOptions")?,
                None,
                change,
            )
            .await?;
        self.answer(about, call, StatusCode::OK, written, &[])
    }

    /// `serviceaccounts/token`: a signed token, bound to what the request names.
    async fn token(&self, about: &ResourceRequest, call: &Call, body: RequestBody) -> Answer {
        let type_id = table::type_by_name("io.k8s.api.authentication.v1.TokenRequest")
            .ok_or_else(|| ApiError::internal("the type table has no TokenRequest"))?;
        let (mut request, _) = decode_kind(
            &collect(body).await?,
            Media::Json,
            "authentication.k8s.io/v1",
            "TokenRequest",
            type_id,
            FieldValidation::Warn,
        )?;
        let (name, namespace) = (
            about.name.as_deref().unwrap_or_default(),
            about.namespace.as_deref().unwrap_or_default(),
        );
        let account = self
            .registry
            .get(about.resource, Some(namespace), name)
            .await?;
        let given = &request["metadata"]["name"];
        if given
            .as_str()
            .is_some_and(|given| !given.is_empty() && given != name)
        {
            let why = "must match the service account name if specified";
            let error = FieldError::invalid("metadata.name", given, why);
            let (kind, group) = ("TokenRequest", "authentication.k8s.io");
            return Err(ApiError::invalid(kind, group, name, &[error]));
        }
        let seconds = request["spec"]["expirationSeconds"]
            .as_i64()
            .unwrap_or(3600);
        request["spec"]["expirationSeconds"] = seconds.into();
        let manager = manager(call, "CreateOptions")?;
        let track = ApplyOptions {
            manager: &manager,
            force: false,
            api_version: "authentication.k8s.io/v1",
            subresource: "token",
            now: &now(),
        };
        shape::complete(&mut request, type_id);
        apply::track_update(None, &mut request, type_id, &track);
        if !TOKEN_SECONDS.contains(&seconds) {
            let detail = if seconds < 600 {
                "may not specify a duration less than 10 minutes"
            } else {
                "may not specify a duration larger than 2^32 seconds"
            };
            let error = FieldError::invalid("spec.expirationSeconds", json!(seconds), detail);
            return Err(ApiError::invalid(
                "TokenRequest",
                "authentication.k8s.io",
                "",
                &[error],
            ));
        }
        let audiences = match request["spec"]["audiences"]
            .as_array()
            .filter(|all| !all.is_empty())
        {
            Some(all) => Value::from(all.clone()),
            None => json!([self.tokens.issuer]),
        };
        let mut kubernetes = json!({"namespace": namespace, "serviceaccount": {"name": name, "uid": account["metadata"]["uid"]}});
        let bound = request["spec"]["boundObjectRef"].clone();
        if let Some(kind) = bound["kind"].as_str() {
            let plural = match kind {
                "Pod" => "pods",
                "Secret" => "secrets",
                "Node" => "nodes",
                _ => {
                    return Err(ApiError::bad_request(format!(
                        "cannot bind token to object of type {}, Kind={kind}",
                        group_version(bound["apiVersion"].as_str().unwrap_or_default())
                    )));
                }
            };
            let resource = table::resource("", "v1", plural).ok_or_else(ApiError::no_resource)?;
            let bound_name = bound["name"].as_str().unwrap_or_default();
            let object = self
                .registry
                .get(resource, Some(namespace), bound_name)
                .await?;
            let uid = bound["uid"].as_str().unwrap_or_default();
            if !uid.is_empty() && object["metadata"]["uid"] != uid {
                let was = object["metadata"]["uid"].as_str().unwrap_or_default();
                return Err(ApiError::conflict(
                    resource,
                    bound_name,
                    &format!(
                        "the UID in the bound object reference ({uid}) does not match the UID in record. The object might have been deleted and then recreated ({was})"
                    ),
                ));
            }
            if kind == "Pod" && object["spec"]["serviceAccountName"] != name {
                return Err(ApiError::bad_request(format!(
                    "cannot bind token for serviceaccount {name:?} to pod running with different serviceaccount name."
                )));
            }
            kubernetes[kind.to_ascii_lowercase()] =
                json!({"name": bound_name, "uid": object["metadata"]["uid"]});
        }
        let start = time::OffsetDateTime::now_utc();
        let end = start + time::Duration::seconds(seconds);
        let claims = json!({
            "iss": self.tokens.issuer, "sub": format!("system:serviceaccount:{namespace}:{name}"), "aud": audiences,
            "iat": start.unix_timestamp(), "nbf": start.unix_timestamp(), "exp": end.unix_timestamp(),
            "jti": registry::uid(), "kubernetes.io": kubernetes,
        });
        let expiry = end
            .replace_nanosecond(0)
            .unwrap_or(end)
            .format(&time::format_description::well_known::Rfc3339)
            .unwrap_or_default();
        request["spec"]["audiences"] = audiences;
        let metadata = &mut request["metadata"];
        metadata["name"] = name.into();
        metadata["namespace"] = namespace.into();
        metadata["creationTimestamp"] = now().into();
        metadata["uid"] = account["metadata"]["uid"].clone();
        request["status"] = json!({"token": self.tokens.sign(&claims).map_err(ApiError::internal)?, "expirationTimestamp": expiry});
        Ok(handler::value(
            StatusCode::CREATED,
            &request,
            call.negotiated.yaml,
        ))
    }

    /// Kinds that are asked, not stored.
    pub(crate) async fn virtual_kind(
        &self,
        about: &ResourceRequest,
        call: &Call,
        body: RequestBody,
    ) -> Answer {
        if about.resource.kind == "Binding" {
            return self.bind(about, call, body).await;
        }
        if about.resource.kind == "ComponentStatus" {
            let list = json!({"kind": "ComponentStatusList", "apiVersion": "v1", "metadata": {}, "items": []});
            return match &about.name {
                None => Ok(handler::value(StatusCode::OK, &list, call.negotiated.yaml)),
                Some(name) => Err(ApiError::not_found_as("componentstatus", name)),
            };
        }
        let (mut object, warnings) = decode_as(
            &collect(body).await?,
            &call.headers,
            about.resource,
            &call.query,
        )?;
        let spec = object["spec"].clone();
        object["status"] = match about.resource.kind {
            "SelfSubjectReview" => json!({"userInfo": call.user.to_value()}),
            "SelfSubjectAccessReview" => verdict(&call.user, &spec)?,
            "SubjectAccessReview" | "LocalSubjectAccessReview" => {
                let groups: Vec<&str> = spec["groups"]
                    .as_array()
                    .into_iter()
                    .flatten()
                    .filter_map(Value::as_str)
                    .collect();
                let user = UserInfo {
                    name: spec["user"].as_str().unwrap_or_default().into(),
                    groups: groups.into_iter().map(str::to_owned).collect(),
                    ..UserInfo::default()
                };
                verdict(&user, &spec)?
            }
            "SelfSubjectRulesReview" => rules(&call.user),
            "TokenReview" => {
                let audience = spec["audiences"][0].as_str();
                match self
                    .tokens
                    .verify(spec["token"].as_str().unwrap_or_default(), audience)
                {
                    Ok(claims) if self.token_still_holds(&claims.user()).await.is_err() => {
                        json!({"user": {}, "error": "invalid bearer token: its service account or pod is gone"})
                    }
                    Ok(claims) => {
                        json!({"authenticated": true, "user": claims.user().to_value(), "audiences": claims.audiences()})
                    }
                    Err(why) => {
                        json!({"user": {}, "error": format!("invalid bearer token: {why}")})
                    }
                }
            }
            _ => return Err(ApiError::method_not_allowed()),
        };
        if !object["metadata"].is_object() {
            object["metadata"] = json!({});
        }
        Ok(handler::warn(
            handler::value(StatusCode::CREATED, &object, call.negotiated.yaml),
            &warnings,
        ))
    }
}

/// An API version as messages show it: with its slash even where it has no group.
fn group_version(version: &str) -> String {
    if version.contains('/') {
        version.to_owned()
    } else {
        format!("/{version}")
    }
}

fn scale_of(object: &Object) -> Value {
    let metadata = &object["metadata"];
    let mut kept = json!({});
    for field in [
        "name",
        "namespace",
        "uid",
        "resourceVersion",
        "creationTimestamp",
    ] {
        if !metadata[field].is_null() {
            kept[field] = metadata[field].clone();
        }
    }
    let mut scale = json!({
        "kind": "Scale", "apiVersion": "autoscaling/v1", "metadata": kept,
        "spec": {}, "status": {"replicas": object["status"]["replicas"].as_i64().unwrap_or(0)},
    });
    if let Some(replicas) = object["spec"]["replicas"]
        .as_i64()
        .filter(|replicas| *replicas != 0)
    {
        scale["spec"]["replicas"] = replicas.into();
    }
    let selector = &object["spec"]["selector"];
    let labels = if selector["matchLabels"].is_object() {
        &selector["matchLabels"]
    } else {
        selector
    };
    let mut terms: Vec<String> = labels
        .as_object()
        .into_iter()
        .flatten()
        .filter_map(|(key, value)| Some(format!("{key}={}", value.as_str()?)))
        .collect();
    for requirement in selector["matchExpressions"]
        .as_array()
        .into_iter()
        .flatten()
    {
        let key = requirement["key"].as_str().unwrap_or_default();
        let values: Vec<&str> = requirement["values"]
            .as_array()
            .into_iter()
            .flatten()
            .filter_map(Value::as_str)
            .collect();
        terms.push(match requirement["operator"].as_str().unwrap_or_default() {
            "Exists" => key.to_owned(),
            "DoesNotExist" => format!("!{key}"),
            "NotIn" => format!("{key} notin ({})", values.join(",")),
            _ => format!("{key} in ({})", values.join(",")),
        });
    }
    if !terms.is_empty() {
        scale["status"]["selector"] = terms.join(",").into();
    }
    scale
}

/// An object to be changed whatever others do to it meanwhile: the change is made again on what they left.
pub(crate) fn unversioned(object: &Object) -> Object {
    let mut object = object.clone();
    if let Some(metadata) = object["metadata"].as_object_mut() {
        metadata.remove("resourceVersion");
    }
    object
}

/// Puts a condition in the place of the one of its type.
pub(crate) fn set_condition(object: &mut Object, condition: Value) {
    match object["status"]["conditions"].as_array_mut() {
        Some(all) => match all.iter_mut().find(|one| one["type"] == condition["type"]) {
            Some(one) => *one = condition,
            None => all.push(condition),
        },
        None => object["status"]["conditions"] = json!([condition]),
    }
}

pub(crate) fn success(code: u16) -> Value {
    json!({"kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Success", "code": code})
}

fn verdict(user: &UserInfo, spec: &Value) -> Result<Value, ApiError> {
    let asked = &spec["resourceAttributes"];
    let text = |value: &Value| {
        value
            .as_str()
            .filter(|text| !text.is_empty())
            .map(str::to_owned)
    };
    let result = if asked.is_object() {
        let group = asked["group"].as_str().unwrap_or_default();
        let plural = asked["resource"].as_str().unwrap_or_default();
        let found: Option<&'static Resource> = table::resources()
            .iter()
            .find(|one| one.group == group && one.plural == plural);
        match found {
            Some(resource) => authz::resource(
                user,
                &ResourceRequest {
                    resource,
                    namespace: text(&asked["namespace"]),
                    name: text(&asked["name"]),
                    subresource: text(&asked["subresource"]),
                    verb: known_verb(asked["verb"].as_str().unwrap_or_default()),
                },
            )
            .is_ok(),
            None => authz::is_trusted(user),
        }
    } else if spec["nonResourceAttributes"].is_object() {
        let asked = &spec["nonResourceAttributes"];
        authz::path(
            user,
            asked["path"].as_str().unwrap_or_default(),
            asked["verb"].as_str().unwrap_or_default(),
        )
        .is_ok()
    } else {
        let error = FieldError::invalid(
            "spec.resourceAttributes",
            &Value::Null,
            "exactly one of nonResourceAttributes or resourceAttributes must be specified",
        );
        return Err(ApiError::invalid(
            "SelfSubjectAccessReview",
            "authorization.k8s.io",
            "",
            &[error],
        ));
    };
    Ok(json!({"allowed": result}))
}

fn known_verb(verb: &str) -> &'static str {
    let known = [
        "get",
        "list",
        "watch",
        "create",
        "update",
        "patch",
        "delete",
        "deletecollection",
    ];
    known.into_iter().find(|one| *one == verb).unwrap_or("*")
}

fn rules(user: &UserInfo) -> Value {
    if authz::is_trusted(user) {
        return json!({"resourceRules": [{"verbs": ["*"], "apiGroups": ["*"], "resources": ["*"]}], "nonResourceRules": [{"verbs": ["*"], "nonResourceURLs": ["*"]}], "incomplete": false});
    }
    json!({
        "resourceRules": [
            {"verbs": ["create"], "apiGroups": ["authorization.k8s.io"], "resources": ["selfsubjectaccessreviews", "selfsubjectrulesreviews"]},
            {"verbs": ["create"], "apiGroups": ["authentication.k8s.io"], "resources": ["selfsubjectreviews"]},
        ],
        "nonResourceRules": [{"verbs": ["get"], "nonResourceURLs": ["/api", "/api/*", "/apis", "/apis/*", "/healthz", "/livez", "/openapi", "/openapi/*", "/readyz", "/version"]}],
        "incomplete": false,
    })
}
