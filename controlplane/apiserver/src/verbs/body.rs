//! Reading the object in a request's body as the kind that its path names, in the real server's words where it is not.

use http::{HeaderMap, HeaderValue, header};
use http_body_util::{BodyExt, Full};
use serde_json::json;
use xebec_schema::Object;
use xebec_schema::decode::{self, FieldValidation, Media};
use xebec_schema::protobuf::{self, ProtobufError};
use xebec_schema::table::{self, Resource};

use super::options;
use crate::error::ApiError;
use crate::handler::{Call, collect};
use crate::request::{Query, ResourceRequest};
use crate::server::RequestBody;

const BODY_TYPES: &str = "application/json, application/yaml, application/vnd.kubernetes.protobuf";
/// The media type of bodies in protobuf, as typed clients send them.
pub(super) const PROTOBUF: &str = "application/vnd.kubernetes.protobuf";
const SCHEME: &str = "pkg/api/legacyscheme/scheme.go:30";

/// The media type of a body without its parameters.
pub(crate) fn media_type(headers: &HeaderMap) -> &str {
    let text = headers
        .get(header::CONTENT_TYPE)
        .and_then(|value| value.to_str().ok())
        .unwrap_or("application/json");
    text.split(';').next().unwrap_or_default().trim()
}

pub(crate) fn body_media(headers: &HeaderMap) -> Result<Media, ApiError> {
    match media_type(headers) {
        "application/json" | "" => Ok(Media::Json),
        "application/yaml" => Ok(Media::Yaml),
        _ => Err(ApiError::unsupported_media(BODY_TYPES)),
    }
}

/// A request whose body is protobuf as the same request with a body in JSON.
pub(super) async fn from_protobuf(
    about: &ResourceRequest,
    call: &Call,
    body: RequestBody,
) -> Result<(Call, RequestBody), ApiError> {
    let body = collect(body).await?;
    let json = if body.is_empty() {
        body
    } else {
        let bad = |error: ProtobufError| ApiError::bad_request(error.to_string());
        let envelope = protobuf::open(&body).map_err(bad)?;
        let version = envelope.api_version.as_str();
        let (group, number) = version.split_once('/').unwrap_or(("", version));
        // Typed clients leave out the kind: it is the path's.
        let ty = match &about.subresource {
            _ if !envelope.kind.is_empty() => table::type_of_kind(group, number, &envelope.kind),
            _ if about.verb.starts_with("delete") => {
                table::type_by_name("io.k8s.apimachinery.pkg.apis.meta.v1.DeleteOptions")
            }
            Some(name) => about.resource.subresource(name).and_then(|sub| {
                let own = (about.resource.group, about.resource.version);
                let (group, version) = if sub.version.is_empty() {
                    own
                } else {
                    (sub.group, sub.version)
                };
                table::type_of_kind(group, version, sub.kind)
            }),
            None => Some(about.resource.type_id),
        };
        let mut object = match ty {
            Some(ty) => protobuf::decode(envelope.raw, ty).map_err(bad)?,
            // That the kind is not known is said where it is compared with the path's.
            None => json!({}),
        };
        if !envelope.kind.is_empty() {
            object["apiVersion"] = version.into();
            object["kind"] = envelope.kind.into();
        }
        object.to_string().into()
    };
    let mut headers = call.headers.clone();
    headers.insert(
        header::CONTENT_TYPE,
        HeaderValue::from_static("application/json"),
    );
    let call = Call {
        user: call.user.clone(),
        headers,
        query: call.query.clone(),
        negotiated: call.negotiated,
    };
    let body = Full::new(json).map_err(|never| match never {});
    Ok((call, body.boxed_unsync()))
}

/// Reads the object in a body as this resource's kind.
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
        options::validation(query)?,
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
    let (group, number) = given_version
        .split_once('/')
        .unwrap_or(("", &given_version));
    // An older version of the same kind is known, though it is not served.
    let expected_group = api_version.split_once('/').map_or("", |(group, _)| group);
    let known_as_this = given_kind == kind
        && (group == expected_group && number.contains("beta")
            || table::resource_for_kind(group, number, kind).is_some());
    if !given_version.is_empty()
        && given_version != api_version
        && (known_as_this || given_kind.is_empty())
    {
        return Err(ApiError::bad_request(format!(
            "the API version in the data ({given_version}) does not match the expected API version ({api_version})"
        )));
    }
    if !given_kind.is_empty() && given_kind != kind
        || !given_version.is_empty() && given_version != api_version
    {
        let why = if table::resource_for_kind(group, number, &given_kind).is_some() {
            format!(
                "converting ({number}.{given_kind}) to ({}.{kind}): unknown conversion",
                internal_package(api_version)
            )
        } else {
            format!(
                "no kind {given_kind:?} is registered for version {given_version:?} in scheme \"{SCHEME}\""
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

/// The package of the group's internal types, which messages name.
fn internal_package(api_version: &str) -> &str {
    let group = api_version
        .split_once('/')
        .map_or("core", |(group, _)| group);
    group.split('.').next().unwrap_or(group)
}

/// Name and namespace of a body must be those of the path; where the path has a name, the body must have it too.
pub(crate) fn agree(about: &ResourceRequest, object: &mut Object) -> Result<(), ApiError> {
    if let Some(name) = &about.name {
        let given = object["metadata"]["name"].as_str().unwrap_or_default();
        if given.is_empty() {
            return Err(ApiError::bad_request(format!(
                "the name of the object ({name} based on URL) was undeterminable: name must be provided"
            )));
        }
        if given != name {
            return Err(ApiError::bad_request(format!(
                "the name of the object ({given}) does not match the name on the URL ({name})"
            )));
        }
    }
    agree_namespace(about, object)
}

/// The namespace of a body must be that of the path, and is it where the body is silent.
pub(crate) fn agree_namespace(
    about: &ResourceRequest,
    object: &mut Object,
) -> Result<(), ApiError> {
    let metadata = &mut object["metadata"];
    let given = metadata["namespace"].as_str().unwrap_or_default();
    match &about.namespace {
        Some(namespace) if given.is_empty() => {
            metadata["namespace"] = namespace.clone().into();
            Ok(())
        }
        Some(namespace) if *namespace == given => Ok(()),
        None if given.is_empty() => Ok(()),
        // A kind without namespaces has none, whatever its body says.
        None if !about.resource.namespaced => {
            if let Some(metadata) = metadata.as_object_mut() {
                metadata.remove("namespace");
            }
            Ok(())
        }
        _ => Err(ApiError::bad_request(
            "the namespace of the provided object does not match the namespace sent on the request",
        )),
    }
}
