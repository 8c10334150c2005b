//! Changing a part of an object: the three patches, and server-side apply.

use bytes::Bytes;
use http::StatusCode;
use serde_json::{Value, json};
use xebec_schema::apply::{self, ApplyError, ApplyOptions};
use xebec_schema::decode::{self, FieldValidation, Media};
use xebec_schema::field_error::FieldError;
use xebec_schema::table::Resource;
use xebec_schema::{Object, convert, patch, warnings};

use super::body::{agree, decode_kind, media_type};
use super::options::{check_manager, dry_run, manager, validation};
use super::to_stored;
use crate::error::ApiError;
use crate::handler::{Answer, Call, Handler, collect};
use crate::registry::{Part, now};
use crate::request::ResourceRequest;
use crate::server::RequestBody;

pub(crate) const PATCH_TYPES: &str = "application/json-patch+json, application/merge-patch+json, application/strategic-merge-patch+json, application/apply-patch+yaml";

/// A patch as it was sent.
pub(crate) struct Sent<'a> {
    pub media: &'a str,
    pub body: &'a Bytes,
    pub validation: FieldValidation,
}

/// A patch, and what it is to change.
#[derive(Clone, Copy)]
struct Change<'a> {
    about: &'a ResourceRequest,
    sent: &'a Sent<'a>,
    part: Part,
    dry: bool,
    options: &'a ApplyOptions<'a>,
}

fn bad_options(error: FieldError) -> ApiError {
    ApiError::invalid("PatchOptions", "meta.k8s.io", "", &[error])
}

/// Whose fields a patch writes: apply must say, other patches may.
pub(crate) fn patch_manager(call: &Call, applying: bool) -> Result<String, ApiError> {
    let kind = "PatchOptions";
    if !applying {
        if call.query.get("force").is_some() {
            return Err(bad_options(FieldError::forbidden(
                "force",
                "may not be specified for non-apply patch",
            )));
        }
        return manager(call, kind);
    }
    let Some(manager) = call.query.get("fieldManager") else {
        return Err(bad_options(FieldError::required(
            "fieldManager",
            "is required for apply patch",
        )));
    };
    check_manager(manager, kind)?;
    Ok(manager.to_owned())
}

/// The kind of patch, where it is a known one.
pub(crate) fn patch_media(call: &Call) -> Result<String, ApiError> {
    let media = media_type(&call.headers);
    if PATCH_TYPES.split(", ").any(|one| one == media) {
        return Ok(media.to_owned());
    }
    Err(ApiError::unsupported_media(PATCH_TYPES))
}

/// An object with a patch made to it, brought into its type's shape; and what the type does not know of it.
pub(crate) fn patched(
    live: &Object,
    sent: &Sent<'_>,
    resource: &Resource,
) -> Result<(Object, Vec<String>), ApiError> {
    let misfit = |shown: &Value, why: &str| {
        ApiError::invalid("", "", "", &[FieldError::invalid("patch", shown, why)])
    };
    let strategic = sent.media == "application/strategic-merge-patch+json";
    let mut new = match sent.media {
        "application/json-patch+json" => patch::json_patch(live, sent.body)?,
        "application/merge-patch+json" => patch::merge_patch(live, sent.body)?,
        _ => patch::strategic_merge_patch(live, sent.body, resource.type_id)?,
    };
    if strategic {
        let shown = || {
            let sent = serde_json::from_slice(sent.body).unwrap_or(Value::Null);
            Value::from(patch::go_map(&sent))
        };
        if let Some(why) = patch::misfit(&new, resource.type_id) {
            return Err(misfit(&shown(), &why));
        }
        // The target's kind is known: what was replaced as a whole need not say it again.
        if let Some(map) = new.as_object_mut() {
            map.insert("apiVersion".into(), resource.api_version().into());
            map.insert("kind".into(), resource.kind.into());
        }
    }
    let (version, kind) = decode::gvk_of(&new);
    if version != resource.api_version() || kind != resource.kind {
        let why = format!(
            "{kind} in version {version:?} cannot be handled as a {}",
            resource.kind
        );
        return Err(misfit(&new.to_string().into(), &why));
    }
    let before = new.clone();
    let unknown = decode::conform(&mut new, resource.type_id)
        .map_err(|error| misfit(&before.to_string().into(), &error.0))?;
    let unknown = match sent.validation {
        FieldValidation::Strict if !unknown.is_empty() => {
            let why = format!("strict decoding error: {}", unknown.join(", "));
            let sent = serde_json::from_slice(sent.body).unwrap_or(Value::Null);
            return Err(misfit(&patch::go_map(&sent).into(), &why));
        }
        FieldValidation::Warn => unknown,
        _ => Vec::new(),
    };
    if !new["metadata"].is_object() {
        new["metadata"] = json!({});
    }
    Ok((new, unknown))
}

impl Handler {
    pub(super) async fn patch(
        &self,
        about: &ResourceRequest,
        call: &Call,
        body: RequestBody,
        part: Part,
    ) -> Answer {
        let media = patch_media(call)?;
        let dry = dry_run(&call.query, "PatchOptions")?;
        let applying = media == "application/apply-patch+yaml";
        let manager = patch_manager(call, applying)?;
        let body = collect(body).await?;
        let sent = Sent {
            media: &media,
            body: &body,
            validation: validation(&call.query)?,
        };
        let (api_version, time) = (about.resource.api_version(), now());
        let options = ApplyOptions {
            manager: &manager,
            force: call.query.flag("force"),
            api_version: &api_version,
            subresource: about.subresource.as_deref().unwrap_or_default(),
            now: &time,
        };
        let change = Change {
            about,
            sent: &sent,
            part,
            dry,
            options: &options,
        };
        let mut warnings = Vec::new();
        let written = if applying {
            self.apply(&change, &mut warnings).await
        } else {
            let patched = self.patch_object(&change, &mut warnings).await;
            patched.map(|object| (StatusCode::OK, object))
        };
        self.written(about, call, written, warnings)
    }

    /// Changes the object that a patch is for by what it says.
    async fn change_object(
        &self,
        change: &Change<'_>,
        track: Option<&ApplyOptions<'_>>,
        by: impl FnMut(&Object) -> Result<Object, ApiError>,
    ) -> Result<Object, ApiError> {
        let about = change.about;
        self.registry
            .update(
                about.resource,
                about.namespace.as_deref(),
                about.name.as_deref().unwrap_or_default(),
                change.part,
                change.dry,
                track,
                by,
            )
            .await
    }

    async fn patch_object(
        &self,
        change: &Change<'_>,
        warnings: &mut Vec<String>,
    ) -> Result<Object, ApiError> {
        let about = change.about;
        let resource = about.resource;
        let stored = convert::storage(resource);
        let name = about.name.as_deref().unwrap_or_default();
        let patch = |old: &Object| {
            let mut live = old.clone();
            convert::convert(&mut live, stored, resource);
            let (mut new, unknown) = patched(&live, change.sent, resource)?;
            agree(about, &mut new)?;
            *warnings = unknown;
            let uid = &new["metadata"]["uid"];
            if !uid.is_null() && *uid != old["metadata"]["uid"] {
                return Err(immutable_uid(resource, name, &new));
            }
            to_stored(&mut new, resource);
            warnings.extend(warnings::of(stored, &new, Some(old)));
            Ok(without_version(old, new))
        };
        self.change_object(change, Some(change.options), patch)
            .await
    }

    async fn apply(
        &self,
        change: &Change<'_>,
        warnings: &mut Vec<String>,
    ) -> Result<(StatusCode, Object), ApiError> {
        let Change {
            about,
            sent,
            options,
            ..
        } = *change;
        let resource = about.resource;
        let stored = convert::storage(resource);
        let name = about.name.as_deref().unwrap_or_default();
        check_target(sent.body, resource)?;
        let (mut config, unknown) = decode_kind(
            sent.body,
            Media::Yaml,
            options.api_version,
            resource.kind,
            resource.type_id,
            sent.validation,
        )?;
        *warnings = unknown;
        let named = !config["metadata"]["name"].is_null();
        if let Some(metadata) = config["metadata"].as_object_mut() {
            metadata.entry("name").or_insert_with(|| name.into());
        }
        let mut agreed = config.clone();
        agree(about, &mut agreed)?;
        let found = self
            .registry
            .get_stored(stored, about.namespace.as_deref(), name)
            .await;
        match found {
            Err(error) if error.code == StatusCode::NOT_FOUND && change.part == Part::Main => {
                if !named {
                    // Only what is there can be meant without its name.
                    agreed["metadata"]["name"] = Value::Null;
                    agree(about, &mut agreed)?;
                }
                if let Some(uid) = config["metadata"]["uid"].as_str() {
                    let why = format!(
                        "uid mismatch: the provided object specified uid {uid}, and no existing object was found"
                    );
                    return Err(ApiError::conflict(stored, name, &why));
                }
                // What is not there has no version that could be another one.
                if let Some(metadata) = agreed["metadata"].as_object_mut() {
                    metadata.remove("resourceVersion");
                }
                let object = apply::apply(None, &agreed, resource.type_id, options)
                    .map_err(|error| apply_error(&error))?;
                let made = self
                    .create_object(about, object, change.dry, None, warnings)
                    .await?;
                return Ok((StatusCode::CREATED, made));
            }
            Err(error) => return Err(error),
            Ok(_) => {}
        }
        let merge = |old: &Object| {
            let mut live = old.clone();
            convert::convert(&mut live, stored, resource);
            let mut new = apply::apply(Some(&live), &config, resource.type_id, options)
                .map_err(|error| apply_error(&error))?;
            if config["metadata"]["resourceVersion"].is_null() {
                new["metadata"]["resourceVersion"] = old["metadata"]["resourceVersion"].clone();
            }
            to_stored(&mut new, resource);
            Ok(without_version(old, new))
        };
        let written = self.change_object(change, None, merge).await?;
        Ok((StatusCode::OK, written))
    }
}

/// What is applied must be an object of the kind that the path names, with values of the right types.
fn check_target(body: &[u8], resource: &Resource) -> Result<(), ApiError> {
    let (config, _) = decode::parse(body, Media::Yaml)
        .map_err(|error| ApiError::bad_request(format!("error decoding YAML: {}", error.0)))?;
    let what = match &config {
        Value::Object(_) | Value::Null => "",
        Value::Array(_) => "array",
        Value::String(_) => "string",
        Value::Number(_) => "number",
        Value::Bool(_) => "bool",
    };
    if !what.is_empty() {
        return Err(ApiError::bad_request(format!(
            "error decoding YAML: error unmarshaling JSON: while decoding JSON: json: cannot unmarshal {what} into Go value of type map[string]interface {{}}"
        )));
    }
    let (mut version, kind) = decode::gvk_of(&config);
    let fits = version == resource.api_version() && kind == resource.kind;
    if !version.contains('/') {
        version.insert(0, '/');
    }
    if !fits {
        return Err(ApiError::bad_request(format!(
            "invalid object type: {version}, Kind={kind}"
        )));
    }
    if let Some(why) = apply::mistyped(&config, resource.type_id) {
        let text = |key: &str| config["metadata"][key].as_str().unwrap_or_default();
        return Err(ApiError::unexplained(format!(
            "failed to create typed patch object ({}/{}; {version}, Kind={kind}): {why}",
            text("namespace"),
            text("name")
        )));
    }
    Ok(())
}

/// A patch may not give an object another UID; the real server finds that twice.
fn immutable_uid(resource: &Resource, name: &str, new: &Object) -> ApiError {
    let error = FieldError::invalid(
        "metadata.uid",
        &new["metadata"]["uid"],
        "field is immutable",
    );
    let errors = [error.clone(), error];
    ApiError::invalid(resource.kind, resource.group, name, &errors)
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
