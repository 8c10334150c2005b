//! Reading many objects: list, in pages and shapes, and watch.

use base64::Engine;
use base64::alphabet::URL_SAFE;
use base64::engine::DecodePaddingMode;
use base64::engine::general_purpose::{GeneralPurpose, GeneralPurposeConfig, URL_SAFE_NO_PAD};
use futures::StreamExt;
use http::{Response, StatusCode, header};
use http_body::Frame;
use http_body_util::{BodyExt, StreamBody};
use serde_json::{Value, json};
use xebec_schema::field_error::FieldError;
use xebec_schema::selector::{FieldSelector, LabelSelector};
use xebec_schema::table;
use xebec_schema::{Object, convert, json_syntax};
use xebec_store::RangeRequest;

use super::include::Include;
use super::options;
use crate::encode::{self, ListHead};
use crate::error::ApiError;
use crate::handler::{self, Answer, Call, Handler};
use crate::registry::{self, prefix_range};
use crate::request::{Query, ResourceRequest};
use crate::server::ResponseBody;
use crate::watch::{self, Shape, WatchRequest, selected};

/// Reads tokens whose last bits are not 0, too: what they are is for their reader to say.
const LENIENT: GeneralPurpose = GeneralPurpose::new(
    &URL_SAFE,
    GeneralPurposeConfig::new()
        .with_encode_padding(false)
        .with_decode_allow_trailing_bits(true)
        .with_decode_padding_mode(DecodePaddingMode::Indifferent),
);

/// What is wrong with `?resourceVersionMatch=` of a list.
fn check_match(query: &Query) -> Result<(), ApiError> {
    const FIELD: &str = "resourceVersionMatch";
    let Some(matching) = query.get(FIELD).filter(|text| !text.is_empty()) else {
        return Ok(());
    };
    let version = query.get("resourceVersion").unwrap_or_default();
    let forbidden = |why: &str| FieldError::forbidden(FIELD, why);
    let mut errors = Vec::new();
    if version.is_empty() {
        errors.push(forbidden(
            "resourceVersionMatch is forbidden unless resourceVersion is provided",
        ));
    }
    if query.get("continue").is_some_and(|token| !token.is_empty()) {
        errors.push(forbidden(
            "resourceVersionMatch is forbidden when continue is provided",
        ));
    }
    if !matches!(matching, "Exact" | "NotOlderThan") {
        let known = ["Exact", "NotOlderThan", ""];
        errors.push(FieldError::not_supported(FIELD, json!(matching), &known));
    }
    if matching == "Exact" && version == "0" {
        errors.push(forbidden(
            "resourceVersionMatch \"exact\" is forbidden for resourceVersion \"0\"",
        ));
    }
    if errors.is_empty() {
        return Ok(());
    }
    Err(ApiError::invalid("ListOptions", "meta.k8s.io", "", &errors))
}

/// Ends a watch's count when its stream goes.
struct Watching(std::sync::Arc<crate::metrics::Metrics>);

impl Drop for Watching {
    fn drop(&mut self) {
        self.0.watch_ended();
    }
}

impl Handler {
    pub(super) fn selectors(
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

    pub(super) async fn list(&self, about: &ResourceRequest, call: &Call) -> Answer {
        let (query, resource) = (&call.query, about.resource);
        let stored = convert::storage(resource);
        let (labels, fields) = self.selectors(about, query)?;
        // Whoever takes any version gets all of it, as from a cache.
        let any = query.get("resourceVersion") == Some("0");
        let limit = options::number(query, "limit")?.unwrap_or(0).max(0) as usize;
        let limit = if any { 0 } else { limit };
        options::number(query, "timeoutSeconds")?;
        check_match(query)?;
        let version = options::version(query)?.unwrap_or(0);
        let mut range = prefix_range(registry::key(stored, about.namespace.as_deref(), None));
        let prefix = range.start.clone();
        let mut at = None;
        if let Some(token) = query.get("continue") {
            if version > 0 {
                return Err(ApiError::bad_request(
                    "specifying resource version is not allowed when using continue",
                ));
            }
            let bad = |why: &str| {
                ApiError::bad_request(format!(
                    "invalid continue token: continue key is not valid: {why}"
                ))
            };
            let token = LENIENT
                .decode(token.trim_end_matches('='))
                .map_err(|error| bad(&error.to_string()))?;
            let token: Value =
                serde_json::from_slice(&token).map_err(|_| bad(&json_syntax::complaint(&token)))?;
            let bad = || bad("incorrect encoded start or resourceVersion (version meta.k8s.io/v1)");
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
                let mut object = registry::decode(kv)?;
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
            let mut object = registry::decode(kv)?;
            convert::convert(&mut object, stored, resource);
            objects.push(object);
        }
        let include = Include::of(call)?;
        let whole = (include == Include::Whole).then(|| objects.clone());
        let mut list = list_value(&head, call.negotiated.shape, objects);
        include.place(&mut list, whole.as_deref());
        Ok(handler::value(StatusCode::OK, &list, call.negotiated.yaml))
    }

    pub(super) async fn watch(&self, about: &ResourceRequest, call: &Call) -> Answer {
        let query = &call.query;
        let (labels, fields) = self.selectors(about, query)?;
        let stored = convert::storage(about.resource);
        options::number(query, "timeoutSeconds")?;
        let version = options::watch_version(query)?;
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
}

pub(super) fn list_value(head: &ListHead<'_>, shape: Shape, objects: Vec<Object>) -> Value {
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
            // The real server writes none as null here.
            let items = if items.is_empty() {
                Value::Null
            } else {
                items.into()
            };
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
