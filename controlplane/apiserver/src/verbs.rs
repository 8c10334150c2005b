//! The verbs of every stored resource: get, list, watch, create, update, patch, delete, deletecollection.

use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use bytes::Bytes;
use futures::StreamExt;
use http::{HeaderMap, Response, StatusCode, header};
use http_body::Frame;
use http_body_util::{BodyExt, StreamBody};
use serde_json::{Value, json};
use xebec_schema::apply::{self, ApplyError, ApplyOptions};
use xebec_schema::decode::{self, FieldValidation, Media};
use xebec_schema::field_error::FieldError;
use xebec_schema::selector::{FieldSelector, LabelSelector};
use xebec_schema::table::{self, Resource};
use xebec_schema::{Object, convert, defaults, patch, strategy};
use xebec_store::{KeyValue, RangeRequest, Txn};

use crate::encode::{self, ListHead};
use crate::error::ApiError;
use crate::handler::{self, Answer, Call, Handler, collect};
use crate::registry::{self, DeleteOptions, Part, now, prefix_range};
use crate::request::{Query, ResourceRequest};
use crate::server::{RequestBody, ResponseBody};
use crate::watch::{self, Shape, WatchRequest, selected, shaped};

const PATCH_TYPES: &str = "application/json-patch+json, application/merge-patch+json, application/strategic-merge-patch+json, application/apply-patch+yaml";
const BODY_TYPES: &str = "application/json, application/yaml";

/// Ends a watch's count when its stream goes.
struct Watching(std::sync::Arc<crate::metrics::Metrics>);

impl Drop for Watching {
    fn drop(&mut self) {
        self.0.watch_ended();
    }
}

/// The media type of a body without its parameters.
pub(crate) fn media_type(headers: &HeaderMap) -> &str {
    let text = headers
        .get(header::CONTENT_TYPE)
        .and_then(|value| value.to_str().ok())
        .unwrap_or("application/json");
    text.split(';').next().unwrap_or_default().trim()
}

fn body_media(headers: &HeaderMap) -> Result<Media, ApiError> {
    match media_type(headers) {
        "application/json" | "" => Ok(Media::Json),
        "application/yaml" => Ok(Media::Yaml),
        _ => Err(ApiError::unsupported_media(BODY_TYPES)),
    }
}

/// `?dryRun=`
pub(crate) fn dry_run(query: &Query, kind: &str) -> Result<bool, ApiError> {
    match query.get("dryRun") {
        None => Ok(false),
        Some("All") => Ok(true),
        Some(other) => {
            let error = FieldError::not_supported("dryRun", &json!([other]), &["All"]);
            Err(ApiError::invalid(kind, "meta.k8s.io", "", &[error]))
        }
    }
}

fn validation(query: &Query) -> Result<FieldValidation, ApiError> {
    match query.get("fieldValidation") {
        None | Some("Warn") => Ok(FieldValidation::Warn),
        Some("Ignore") => Ok(FieldValidation::Ignore),
        Some("Strict") => Ok(FieldValidation::Strict),
        Some(other) => {
            let error = FieldError::not_supported(
                "fieldValidation",
                &json!(other),
                &["Ignore", "Strict", "Warn"],
            );
            Err(ApiError::invalid(
                "CreateOptions",
                "meta.k8s.io",
                "",
                &[error],
            ))
        }
    }
}

/// The manager that a write is booked to: as asked, or the first part of the user agent.
fn manager(call: &Call) -> String {
    if let Some(manager) = call.query.get("fieldManager") {
        return manager.to_owned();
    }
    let agent = call
        .headers
        .get(header::USER_AGENT)
        .and_then(|value| value.to_str().ok())
        .unwrap_or("unknown");
    agent
        .split('/')
        .next()
        .unwrap_or_default()
        .chars()
        .filter(|c| !c.is_control())
        .take(128)
        .collect()
}

/// Reads the object in a body as this resource's kind, in the real server's words where it is another.
pub(crate) fn decode_as(
    body: &[u8],
    headers: &HeaderMap,
    resource: &Resource,
    query: &Query,
) -> Result<(Object, Vec<String>), ApiError> {
    decode_kind(
        body,
        body_media(headers)?,
        &resource.api_version(),
        resource.kind,
        resource.type_id,
        validation(query)?,
    )
}

pub(crate) fn decode_kind(
    body: &[u8],
    media: Media,
    api_version: &str,
    kind: &str,
    type_id: table::TypeId,
    validation: FieldValidation,
) -> Result<(Object, Vec<String>), ApiError> {
    let version = |of: &str| of.rsplit('/').next().unwrap_or_default().to_owned();
    let (mut value, duplicates) = decode::parse(body, media).map_err(|error| {
        let shown: String = body.iter().take(35).map(|byte| format!("{byte:02x}")).collect();
        let dots = if body.len() > 35 { " ..." } else { "" };
        ApiError::bad_request(format!("the object provided is unrecognized (must be of type {kind}): couldn't get version/kind; json parse error: {} ({shown}{dots})", error.0))
    })?;
    if !value.is_object() {
        return Err(ApiError::bad_request(format!(
            "{kind} in version {:?} cannot be handled as a {kind}: expected an object",
            version(api_version)
        )));
    }
    let (given_version, given_kind) = decode::gvk_of(&value);
    if !given_version.is_empty()
        && given_version != api_version
        && (given_kind == kind || given_kind.is_empty())
    {
        return Err(ApiError::bad_request(format!(
            "the API version in the data ({given_version}) does not match the expected API version ({api_version})"
        )));
    }
    if !given_kind.is_empty() && given_kind != kind {
        let (group, number) = given_version
            .split_once('/')
            .unwrap_or(("", &given_version));
        let why = if table::resource_for_kind(group, number, &given_kind).is_some() {
            format!(
                "converting ({number}.{given_kind}) to ({}.{kind}): unknown conversion",
                version(api_version)
            )
        } else {
            format!(
                "no kind {given_kind:?} is registered for version {given_version:?} in scheme \"pkg/api/legacyscheme/scheme.go:30\""
            )
        };
        return Err(ApiError::bad_request(format!(
            "{given_kind} in version {:?} cannot be handled as a {kind}: {why}",
            version(&given_version)
        )));
    }
    let cannot = |why: String| {
        ApiError::bad_request(format!(
            "{kind} in version {:?} cannot be handled as a {kind}: {why}",
            version(api_version)
        ))
    };
    let unknown = decode::conform(&mut value, type_id).map_err(|error| cannot(error.0))?;
    value["apiVersion"] = api_version.into();
    value["kind"] = kind.into();
    let mut warnings = Vec::new();
    if validation != FieldValidation::Ignore {
        warnings.extend(unknown);
        warnings.extend(duplicates);
    }
    if validation == FieldValidation::Strict && !warnings.is_empty() {
        return Err(cannot(format!(
            "strict decoding error: {}",
            warnings.join(", ")
        )));
    }
    if !value["metadata"].is_object() {
        value["metadata"] = json!({});
    }
    Ok((value, warnings))
}

/// Name and namespace of a body must be those of the path.
fn agree(about: &ResourceRequest, object: &mut Object) -> Result<(), ApiError> {
    let metadata = &mut object["metadata"];
    let given = metadata["namespace"]
        .as_str()
        .unwrap_or_default()
        .to_owned();
    match &about.namespace {
        Some(namespace) if given.is_empty() => metadata["namespace"] = namespace.clone().into(),
        Some(namespace) if *namespace == given => {}
        None if given.is_empty() => {}
        _ => {
            return Err(ApiError::bad_request(
                "the namespace of the provided object does not match the namespace sent on the request",
            ));
        }
    }
    if let Some(name) = &about.name {
        let given = metadata["name"].as_str().unwrap_or_default();
        if given.is_empty() {
            metadata["name"] = name.clone().into();
        } else if given != name {
            return Err(ApiError::bad_request(format!(
                "the name of the object ({given}) does not match the name on the URL ({name})"
            )));
        }
    }
    Ok(())
}

impl Handler {
    /// Serves a request for a resource whose answer is one object, a list or a watch.
    pub(crate) async fn resource(
        &self,
        about: &ResourceRequest,
        call: &Call,
        body: RequestBody,
    ) -> Answer {
        let known = match &about.subresource {
            Some(name) => about
                .resource
                .subresource(name)
                .is_some_and(|sub| sub.verbs.contains(&about.verb)),
            None => about.resource.has_verb(about.verb),
        };
        if !known {
            return Err(ApiError::method_not_allowed());
        }
        if about.resource.namespaced
            && about.namespace.is_none()
            && !matches!(about.verb, "list" | "watch" | "deletecollection")
            && about.resource.is_stored()
        {
            return Err(ApiError::no_resource());
        }
        match about.subresource.as_deref() {
            Some("status") => self.object(about, call, body, Part::Status).await,
            Some(_) => self.subresource(about, call, body).await,
            None if !about.resource.is_stored() => self.virtual_kind(about, call, body).await,
            None => self.object(about, call, body, Part::Main).await,
        }
    }

    async fn object(
        &self,
        about: &ResourceRequest,
        call: &Call,
        body: RequestBody,
        part: Part,
    ) -> Answer {
        match about.verb {
            "get" => {
                let name = about.name.as_deref().unwrap_or_default();
                let stored = convert::storage(about.resource);
                let kv = self
                    .registry
                    .get_stored(stored, about.namespace.as_deref(), name)
                    .await?;
                if std::ptr::eq(stored, about.resource)
                    && call.negotiated.shape == Shape::Whole
                    && !call.negotiated.yaml
                {
                    return Ok(handler::bytes(
                        StatusCode::OK,
                        "application/json",
                        encode::with_revision(&kv.value, kv.mod_revision),
                    ));
                }
                self.answer(about, call, StatusCode::OK, read(&kv)?, &[])
            }
            "list" => self.list(about, call).await,
            "watch" => self.watch(about, call).await,
            "create" => self.create(about, call, body).await,
            "update" => self.put(about, call, body, part).await,
            "patch" => self.patch(about, call, body, part).await,
            "delete" => self.delete(about, call, body).await,
            "deletecollection" => self.delete_collection(about, call, body).await,
            _ => Err(ApiError::method_not_allowed()),
        }
    }

    /// A stored object as an answer.
    pub(crate) fn answer(
        &self,
        about: &ResourceRequest,
        call: &Call,
        status: StatusCode,
        mut object: Object,
        warnings: &[String],
    ) -> Answer {
        convert::convert(
            &mut object,
            convert::storage(about.resource),
            about.resource,
        );
        let object = shaped(about.resource, call.negotiated.shape, object);
        Ok(handler::warn(
            handler::value(status, &object, call.negotiated.yaml),
            warnings,
        ))
    }

    fn selectors(
        &self,
        about: &ResourceRequest,
        query: &Query,
    ) -> Result<(LabelSelector, FieldSelector), ApiError> {
        let labels = LabelSelector::parse(query.get("labelSelector").unwrap_or_default())
            .map_err(ApiError::bad_request)?;
        let mut text = query.get("fieldSelector").unwrap_or_default().to_owned();
        if let Some(name) = &about.name {
            text = format!("metadata.name={name}");
        }
        let fields = FieldSelector::parse(&text, about.resource).map_err(ApiError::bad_request)?;
        Ok((labels, fields))
    }

    async fn list(&self, about: &ResourceRequest, call: &Call) -> Answer {
        let (query, resource) = (&call.query, about.resource);
        let stored = convert::storage(resource);
        let (labels, fields) = self.selectors(about, query)?;
        let number = |key: &str| match query.get(key).map(str::parse::<u64>) {
            None => Ok(0),
            Some(Ok(number)) => Ok(number),
            Some(Err(_)) => {
                let error = FieldError::invalid(
                    key,
                    &json!(query.get(key)),
                    "strconv.ParseUint: parsing: invalid syntax",
                );
                Err(ApiError::invalid(
                    "ListOptions",
                    "meta.k8s.io",
                    "",
                    &[error],
                ))
            }
        };
        let limit = number("limit")? as usize;
        let version = number("resourceVersion")?;
        let mut range = prefix_range(registry::key(stored, about.namespace.as_deref(), None));
        let prefix = range.start.clone();
        let mut at = None;
        if let Some(token) = query.get("continue") {
            let bad =
                || ApiError::bad_request("continue key is not valid: the token can't be read");
            let token: Value = URL_SAFE_NO_PAD
                .decode(token.trim_end_matches('='))
                .ok()
                .and_then(|text| serde_json::from_slice(&text).ok())
                .ok_or_else(bad)?;
            let start = token["start"]
                .as_str()
                .filter(|start| !start.contains(".."))
                .ok_or_else(bad)?;
            at = Some(token["rv"].as_u64().ok_or_else(bad)?);
            range.start = [prefix.as_ref(), start.as_bytes(), b"\0"].concat().into();
        } else if version > 0 {
            let current = self.registry.store.revision();
            if version > current {
                return Err(ApiError::too_large_version(version, current));
            }
            let matching = query.get("resourceVersionMatch");
            if matching == Some("Exact") || matching.is_none() && limit > 0 {
                at = Some(version);
            }
        }
        let everything = labels.is_everything() && fields.is_everything();
        let bounded = if everything && limit > 0 { limit } else { 0 };
        let found = self.registry.store.range(RangeRequest { keys: range, at, limit: bounded }).await.map_err(|error| match error {
            xebec_store::Error::Compacted { .. } if query.get("continue").is_some() => ApiError::expired("The provided continue parameter is too old to display a consistent list result. You must start a new list without the continue parameter."),
            other => other.into(),
        })?;
        let mut kvs = Vec::new();
        let mut more = found.count > found.kvs.len();
        for kv in &found.kvs {
            let keep = everything || {
                let mut object = read(kv)?;
                convert::convert(&mut object, stored, resource);
                selected(&labels, &fields, &object)
            };
            if !keep {
                continue;
            }
            if limit > 0 && kvs.len() == limit {
                more = true;
                break;
            }
            kvs.push(kv);
        }
        let next = kvs.last().filter(|_| more && limit > 0).map(|last| {
            let start = String::from_utf8_lossy(&last.key[prefix.len()..]).into_owned();
            URL_SAFE_NO_PAD.encode(
                json!({"v": "meta.k8s.io/v1", "rv": found.revision, "start": start}).to_string(),
            )
        });
        let remaining = (next.is_some() && everything).then(|| found.count - kvs.len());
        let head = ListHead {
            resource,
            revision: found.revision,
            next,
            remaining,
        };
        if std::ptr::eq(stored, resource)
            && call.negotiated.shape == Shape::Whole
            && !call.negotiated.yaml
        {
            return Ok(handler::bytes(
                StatusCode::OK,
                "application/json",
                encode::list(&head, kvs.into_iter()),
            ));
        }
        let mut objects = Vec::new();
        for kv in kvs {
            let mut object = read(kv)?;
            convert::convert(&mut object, stored, resource);
            objects.push(object);
        }
        let list = list_value(&head, call.negotiated.shape, objects);
        Ok(handler::value(StatusCode::OK, &list, call.negotiated.yaml))
    }

    async fn watch(&self, about: &ResourceRequest, call: &Call) -> Answer {
        let query = &call.query;
        let (labels, fields) = self.selectors(about, query)?;
        let stored = convert::storage(about.resource);
        let version = match query.get("resourceVersion") {
            None => None,
            Some(text) => Some(text.parse::<u64>().map_err(|_| {
                let error = FieldError::invalid(
                    "resourceVersion",
                    &json!(text),
                    &format!("strconv.ParseUint: parsing {text:?}: invalid syntax"),
                );
                ApiError::invalid("ListOptions", "meta.k8s.io", "", &[error])
            })?),
        };
        let send_initial =
            query.flag("sendInitialEvents") && query.get("sendInitialEvents").is_some();
        if query.get("sendInitialEvents").is_some()
            && query.get("resourceVersionMatch") != Some("NotOlderThan")
        {
            let error = FieldError::forbidden(
                "resourceVersionMatch",
                "sendInitialEvents requires setting resourceVersionMatch to NotOlderThan",
            );
            return Err(ApiError::invalid(
                "ListOptions",
                "meta.k8s.io",
                "",
                &[error],
            ));
        }
        if query.get("sendInitialEvents").is_none() && query.get("resourceVersionMatch").is_some() {
            let error = FieldError::forbidden(
                "resourceVersionMatch",
                "resourceVersionMatch is forbidden for watch unless sendInitialEvents is provided",
            );
            return Err(ApiError::invalid(
                "ListOptions",
                "meta.k8s.io",
                "",
                &[error],
            ));
        }
        let bookmarks = query.flag("allowWatchBookmarks");
        let current = self.registry.store.revision();
        let asked = version.filter(|version| *version > 0);
        if let Some(version) = asked.filter(|version| *version > current) {
            return Err(ApiError::too_large_version(version, current));
        }
        let initial = send_initial || asked.is_none() && query.get("sendInitialEvents").is_none();
        let request = WatchRequest {
            asked: about.resource,
            stored,
            prefix: registry::key(stored, about.namespace.as_deref(), None),
            labels,
            fields,
            initial,
            mark_initial_end: send_initial && bookmarks,
            from: if initial { None } else { asked },
            bookmarks,
            timeout: handler::watch_timeout(query),
            shape: call.negotiated.shape,
        };
        let events = watch::start(self.registry.store.clone(), request).await?;
        self.metrics.watch_started();
        let counted = Watching(self.metrics.clone());
        let frames = events.map(move |event| {
            let _ = &counted;
            Ok::<_, crate::server::BoxError>(Frame::data(event))
        });
        let body: ResponseBody = StreamBody::new(frames).boxed_unsync();
        let mut response = Response::new(body);
        response.headers_mut().insert(
            header::CONTENT_TYPE,
            http::HeaderValue::from_static("application/json"),
        );
        Ok(response)
    }

    async fn create(&self, about: &ResourceRequest, call: &Call, body: RequestBody) -> Answer {
        let dry = dry_run(&call.query, "CreateOptions")?;
        let (object, warnings) = decode_as(
            &collect(body).await?,
            &call.headers,
            about.resource,
            &call.query,
        )?;
        let manager = manager(call);
        let object = self
            .create_object(about, object, dry, Some(&manager))
            .await?;
        self.answer(about, call, StatusCode::CREATED, object, &warnings)
    }

    /// Defaults, admits and stores a decoded object. `manager`: who its fields are booked to, unless they are already.
    async fn create_object(
        &self,
        about: &ResourceRequest,
        mut object: Object,
        dry: bool,
        manager: Option<&str>,
    ) -> Result<Object, ApiError> {
        let resource = about.resource;
        agree(about, &mut object)?;
        if object["metadata"]["resourceVersion"]
            .as_str()
            .is_some_and(|version| !version.is_empty())
        {
            return Err(ApiError::bad_request(
                "resourceVersion should not be set on objects to be created",
            ));
        }
        if let Some(metadata) = object["metadata"].as_object_mut() {
            for field in [
                "resourceVersion",
                "deletionTimestamp",
                "deletionGracePeriodSeconds",
                "selfLink",
            ] {
                metadata.remove(field);
            }
        }
        let stored = convert::storage(resource);
        let api_version = resource.api_version();
        defaults::set_defaults(resource, &mut object);
        convert::convert(&mut object, resource, stored);
        let name = object["metadata"]["name"]
            .as_str()
            .unwrap_or_default()
            .to_owned();
        if let Some(namespace) = &about.namespace {
            self.registry
                .admit_namespace(stored, namespace, &name)
                .await?;
        }
        self.registry.admit_create(stored, &mut object).await?;
        let time = now();
        let track = manager.map(|manager| ApplyOptions {
            manager,
            force: false,
            api_version: &api_version,
            subresource: "",
            now: &time,
        });
        let is_service = stored.kind == "Service" && stored.group.is_empty();
        let mut track = track.as_ref();
        if let Some(options) = track.filter(|_| is_service) {
            // An address that the server chooses belongs to no manager.
            strategy::prepare_for_create(stored, &mut object);
            apply::track_update(None, &mut object, stored.type_id, options);
            track = None;
        }
        for _ in 0..5 {
            let mut attempt = object.clone();
            let extra = if is_service {
                self.allocator
                    .assign(self.registry.store.as_ref(), None, &mut attempt)
                    .await?
            } else {
                Txn::default()
            };
            match self
                .registry
                .create(stored, attempt, extra, dry, track)
                .await
            {
                // Somebody took the same address at the same moment: choose another one.
                Err(error) if error.code == StatusCode::CONFLICT && error.is_conflict() => {}
                other => return other,
            }
        }
        Err(ApiError::unavailable(
            "addresses are taken faster than they can be chosen; please try again",
        ))
    }

    async fn put(
        &self,
        about: &ResourceRequest,
        call: &Call,
        body: RequestBody,
        part: Part,
    ) -> Answer {
        let dry = dry_run(&call.query, "UpdateOptions")?;
        let (mut object, warnings) = decode_as(
            &collect(body).await?,
            &call.headers,
            about.resource,
            &call.query,
        )?;
        agree(about, &mut object)?;
        let stored = convert::storage(about.resource);
        defaults::set_defaults(about.resource, &mut object);
        convert::convert(&mut object, about.resource, stored);
        let (manager, api_version, time) = (manager(call), about.resource.api_version(), now());
        let track = ApplyOptions {
            manager: &manager,
            force: false,
            api_version: &api_version,
            subresource: about.subresource.as_deref().unwrap_or_default(),
            now: &time,
        };
        let name = about.name.as_deref().unwrap_or_default();
        let written = self
            .registry
            .update(
                stored,
                about.namespace.as_deref(),
                name,
                part,
                dry,
                Some(&track),
                |_| Ok(object.clone()),
            )
            .await?;
        self.answer(about, call, StatusCode::OK, written, &warnings)
    }

    async fn patch(
        &self,
        about: &ResourceRequest,
        call: &Call,
        body: RequestBody,
        part: Part,
    ) -> Answer {
        let dry = dry_run(&call.query, "PatchOptions")?;
        let kind = media_type(&call.headers).to_owned();
        if !PATCH_TYPES.split(", ").any(|one| one == kind) {
            return Err(ApiError::unsupported_media(PATCH_TYPES));
        }
        let body = collect(body).await?;
        let resource = about.resource;
        let stored = convert::storage(resource);
        let name = about.name.as_deref().unwrap_or_default();
        let (api_version, time) = (resource.api_version(), now());
        let applying = kind == "application/apply-patch+yaml";
        let manager = if applying {
            let missing = || {
                ApiError::invalid(
                    "PatchOptions",
                    "meta.k8s.io",
                    "",
                    &[FieldError::required(
                        "fieldManager",
                        "is required for apply patch",
                    )],
                )
            };
            call.query
                .get("fieldManager")
                .ok_or_else(missing)?
                .to_owned()
        } else {
            if call.query.flag("force") {
                let error =
                    FieldError::forbidden("force", "may not be specified for non-apply patch");
                return Err(ApiError::invalid(
                    "PatchOptions",
                    "meta.k8s.io",
                    "",
                    &[error],
                ));
            }
            manager(call)
        };
        let options = ApplyOptions {
            manager: &manager,
            force: call.query.flag("force"),
            api_version: &api_version,
            subresource: about.subresource.as_deref().unwrap_or_default(),
            now: &time,
        };
        let strictness = validation(&call.query)?;
        if applying {
            let (mut config, warnings) = decode_kind(
                &body,
                Media::Yaml,
                &api_version,
                resource.kind,
                resource.type_id,
                strictness,
            )?;
            agree(about, &mut config)?;
            let missing = self
                .registry
                .get_stored(stored, about.namespace.as_deref(), name)
                .await
                .is_err();
            if missing && part == Part::Main {
                let object = apply::apply(None, &config, resource.type_id, &options)
                    .map_err(|error| apply_error(&error))?;
                let object = self.create_object(about, object, dry, None).await?;
                return self.answer(about, call, StatusCode::CREATED, object, &warnings);
            }
            let written = self
                .registry
                .update(
                    stored,
                    about.namespace.as_deref(),
                    name,
                    part,
                    dry,
                    None,
                    |old| {
                        let mut live = old.clone();
                        convert::convert(&mut live, stored, resource);
                        let mut new =
                            apply::apply(Some(&live), &config, resource.type_id, &options)
                                .map_err(|error| apply_error(&error))?;
                        if config["metadata"]["resourceVersion"].is_null() {
                            new["metadata"]["resourceVersion"] =
                                old["metadata"]["resourceVersion"].clone();
                        }
                        defaults::set_defaults(resource, &mut new);
                        convert::convert(&mut new, resource, stored);
                        Ok(without_version(old, new))
                    },
                )
                .await?;
            return self.answer(about, call, StatusCode::OK, written, &warnings);
        }
        let mut warnings = Vec::new();
        let written = self
            .registry
            .update(stored, about.namespace.as_deref(), name, part, dry, Some(&options), |old| {
                let mut live = old.clone();
                convert::convert(&mut live, stored, resource);
                let mut new = match kind.as_str() {
                    "application/json-patch+json" => patch::json_patch(&live, &body)?,
                    "application/merge-patch+json" => patch::merge_patch(&live, &body)?,
                    _ => patch::strategic_merge_patch(&live, &body, resource.type_id)?,
                };
                let cannot = |why: String| ApiError::bad_request(format!("{} in version {:?} cannot be handled as a {}: {why}", resource.kind, resource.version, resource.kind));
                let unknown = decode::conform(&mut new, resource.type_id).map_err(|error| cannot(error.0))?;
                match strictness {
                    FieldValidation::Strict if !unknown.is_empty() => return Err(cannot(format!("strict decoding error: {}", unknown.join(", ")))),
                    FieldValidation::Warn => warnings = unknown,
                    _ => {}
                }
                if new["apiVersion"] != api_version.as_str() || new["kind"] != resource.kind {
                    let (version, kind) = decode::gvk_of(&new);
                    return Err(ApiError::bad_request(format!("the API version in the data ({version}, {kind}) does not match the expected API version ({api_version})")));
                }
                agree(about, &mut new)?;
                defaults::set_defaults(resource, &mut new);
                convert::convert(&mut new, resource, stored);
                Ok(without_version(old, new))
            })
            .await?;
        self.answer(about, call, StatusCode::OK, written, &warnings)
    }

    async fn delete(&self, about: &ResourceRequest, call: &Call, body: RequestBody) -> Answer {
        let options = delete_options(&collect(body).await?, call)?;
        let stored = convert::storage(about.resource);
        let name = about.name.as_deref().unwrap_or_default();
        self.registry.admit_delete(stored, name)?;
        let (object, gone) = self
            .registry
            .delete(stored, about.namespace.as_deref(), name, &options)
            .await?;
        // Kinds whose registry gives back what it deleted.
        let shows = matches!(
            stored.kind,
            "Pod"
                | "PersistentVolume"
                | "PersistentVolumeClaim"
                | "PodTemplate"
                | "ResourceQuota"
                | "Service"
                | "ServiceAccount"
        ) && stored.group.is_empty();
        if !gone || shows {
            return self.answer(about, call, StatusCode::OK, object, &[]);
        }
        let mut details =
            json!({"name": name, "kind": about.resource.plural, "uid": object["metadata"]["uid"]});
        if !about.resource.group.is_empty() {
            details["group"] = about.resource.group.into();
        }
        let status = json!({"kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Success", "details": details});
        Ok(handler::value(
            StatusCode::OK,
            &status,
            call.negotiated.yaml,
        ))
    }

    async fn delete_collection(
        &self,
        about: &ResourceRequest,
        call: &Call,
        body: RequestBody,
    ) -> Answer {
        let options = delete_options(&collect(body).await?, call)?;
        let stored = convert::storage(about.resource);
        let (labels, fields) = self.selectors(about, &call.query)?;
        let keys = prefix_range(registry::key(stored, about.namespace.as_deref(), None));
        let found = self
            .registry
            .store
            .range(RangeRequest {
                keys,
                at: None,
                limit: 0,
            })
            .await?;
        let mut deleted = Vec::new();
        for kv in &found.kvs {
            let mut object = read(kv)?;
            convert::convert(&mut object, stored, about.resource);
            if !selected(&labels, &fields, &object) {
                continue;
            }
            let name = object["metadata"]["name"].as_str().unwrap_or_default();
            match self
                .registry
                .delete(
                    stored,
                    object["metadata"]["namespace"].as_str(),
                    name,
                    &options,
                )
                .await
            {
                Ok((mut object, _)) => {
                    convert::convert(&mut object, stored, about.resource);
                    deleted.push(object);
                }
                // It went meanwhile, which is what was asked for.
                Err(error) if error.code == StatusCode::NOT_FOUND => {}
                Err(error) => return Err(error),
            }
        }
        let head = ListHead {
            resource: about.resource,
            revision: self.registry.store.revision(),
            next: None,
            remaining: None,
        };
        Ok(handler::value(
            StatusCode::OK,
            &list_value(&head, call.negotiated.shape, deleted),
            call.negotiated.yaml,
        ))
    }
}

/// A patch that leaves the resource version alone is made again when others were faster.
fn without_version(old: &Object, mut new: Object) -> Object {
    if new["metadata"]["resourceVersion"] == old["metadata"]["resourceVersion"] {
        if let Some(metadata) = new["metadata"].as_object_mut() {
            metadata.remove("resourceVersion");
        }
    }
    new
}

pub(crate) fn apply_error(error: &ApplyError) -> ApiError {
    match error {
        ApplyError::Invalid(message) => ApiError::bad_request(message.clone()),
        ApplyError::Conflicts(conflicts) => {
            let causes = conflicts
                .iter()
                .map(|one| json!({"reason": "FieldManagerConflict", "message": format!("conflict with {}", one.who()), "field": one.field_path}))
                .collect();
            ApiError::apply_conflict(error.to_string(), causes)
        }
    }
}

pub(crate) fn read(kv: &KeyValue) -> Result<Object, ApiError> {
    encode::parse(kv)
        .map_err(|error| ApiError::internal(format!("a stored object can't be read: {error}")))
}

fn list_value(head: &ListHead<'_>, shape: Shape, objects: Vec<Object>) -> Value {
    let mut metadata = json!({"resourceVersion": head.revision.to_string()});
    if let Some(next) = &head.next {
        metadata["continue"] = next.clone().into();
    }
    if let Some(remaining) = head.remaining {
        metadata["remainingItemCount"] = remaining.into();
    }
    match shape {
        Shape::Table => match table::resource(
            head.resource.group,
            head.resource.version,
            head.resource.plural,
        ) {
            Some(resource) => watch::table(resource, metadata, &objects),
            None => Value::Null,
        },
        Shape::Partial => {
            let items: Vec<Value> = objects.iter().map(convert::partial_metadata).collect();
            json!({"kind": "PartialObjectMetadataList", "apiVersion": "meta.k8s.io/v1", "metadata": metadata, "items": items})
        }
        Shape::Whole => {
            let strip = |mut object: Object| {
                if let Some(object) = object.as_object_mut() {
                    object.remove("kind");
                    object.remove("apiVersion");
                }
                object
            };
            let items: Vec<Value> = objects.into_iter().map(strip).collect();
            json!({"kind": head.resource.list_kind(), "apiVersion": head.resource.api_version(), "metadata": metadata, "items": items})
        }
    }
}

/// `DeleteOptions` from the body, or the query where there is none.
pub(crate) fn delete_options(body: &Bytes, call: &Call) -> Result<DeleteOptions, ApiError> {
    let query = &call.query;
    let given = if body.is_empty() {
        json!({})
    } else {
        decode::parse(body, body_media(&call.headers)?)?.0
    };
    let text = |value: &Value| value.as_str().map(str::to_owned);
    let grace = match query.get("gracePeriodSeconds") {
        Some(seconds) => Some(seconds.parse().map_err(|_| {
            ApiError::bad_request(format!("gracePeriodSeconds is no number: {seconds:?}"))
        })?),
        None => given["gracePeriodSeconds"].as_i64(),
    };
    let orphan = given["orphanDependents"]
        .as_bool()
        .or(query.get("orphanDependents").map(|text| text == "true"));
    let asked =
        text(&given["propagationPolicy"]).or(query.get("propagationPolicy").map(str::to_owned));
    if let Some(policy) = asked
        .as_deref()
        .filter(|policy| !matches!(*policy, "Foreground" | "Background" | "Orphan"))
    {
        let error = FieldError::not_supported(
            "propagationPolicy",
            &json!(policy),
            &["Background", "Foreground", "Orphan"],
        );
        return Err(ApiError::invalid(
            "DeleteOptions",
            "meta.k8s.io",
            "",
            &[error],
        ));
    }
    let dry = dry_run(query, "DeleteOptions")?
        || given["dryRun"]
            .as_array()
            .is_some_and(|all| all.iter().any(|one| one == "All"));
    Ok(DeleteOptions {
        grace,
        uid: text(&given["preconditions"]["uid"]),
        resource_version: text(&given["preconditions"]["resourceVersion"]),
        propagation: asked.or(orphan.filter(|orphan| *orphan).map(|_| "Orphan".into())),
        dry_run: dry,
    })
}
