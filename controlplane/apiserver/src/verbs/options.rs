//! The options of writes: dry run, field validation, field manager, how to delete.

use bytes::Bytes;
use http::header;
use serde_json::{Value, json};
use xebec_schema::decode::{self, FieldValidation};
use xebec_schema::field_error::FieldError;

use super::body::body_media;
use crate::error::ApiError;
use crate::handler::Call;
use crate::registry::DeleteOptions;
use crate::request::Query;

/// Bytes that a field manager's name may have.
const LONGEST_MANAGER: usize = 128;

fn invalid(kind: &str, errors: &[FieldError]) -> ApiError {
    ApiError::invalid(kind, "meta.k8s.io", "", errors)
}

/// `?dryRun=`
pub(crate) fn dry_run(query: &Query, kind: &str) -> Result<bool, ApiError> {
    let given: Vec<&str> = query.all("dryRun").filter(|one| !one.is_empty()).collect();
    dry_run_of(&given, kind)
}

fn dry_run_of(given: &[&str], kind: &str) -> Result<bool, ApiError> {
    if given.iter().all(|one| *one == "All") {
        return Ok(!given.is_empty());
    }
    let error = FieldError::not_supported("dryRun", json!(given), &["All"]);
    Err(invalid(kind, &[error]))
}

pub(crate) fn validation(query: &Query) -> Result<FieldValidation, ApiError> {
    match query.get("fieldValidation") {
        None | Some("Warn") => Ok(FieldValidation::Warn),
        Some("Ignore") => Ok(FieldValidation::Ignore),
        Some("Strict") => Ok(FieldValidation::Strict),
        Some(other) => {
            let error = FieldError::not_supported(
                "fieldValidation",
                json!(other),
                &["Ignore", "Strict", "Warn"],
            );
            Err(invalid("CreateOptions", &[error]))
        }
    }
}

/// The manager that a write is booked to: as asked, or the first part of the user agent.
pub(crate) fn manager(call: &Call, kind: &str) -> Result<String, ApiError> {
    if let Some(manager) = call.query.get("fieldManager") {
        check_manager(manager, kind)?;
        return Ok(manager.to_owned());
    }
    let agent = call
        .headers
        .get(header::USER_AGENT)
        .and_then(|value| value.to_str().ok())
        .unwrap_or("unknown");
    Ok(agent
        .split('/')
        .next()
        .unwrap_or_default()
        .chars()
        .filter(|c| !c.is_control())
        .take(LONGEST_MANAGER)
        .collect())
}

/// A manager's name is short and printable.
pub(crate) fn check_manager(manager: &str, kind: &str) -> Result<(), ApiError> {
    let mut errors = Vec::new();
    if manager.len() > LONGEST_MANAGER {
        errors.push(FieldError::too_long("fieldManager", LONGEST_MANAGER));
    }
    if let Some((at, bad)) = manager.chars().enumerate().find(|(_, c)| c.is_control()) {
        let shown: String = manager
            .chars()
            .map(|c| match c {
                c if c.is_ascii_control() => format!("\\x{:02x}", u32::from(c)),
                c => c.to_string(),
            })
            .collect();
        errors.push(FieldError {
            reason: "FieldValueInvalid",
            field: "fieldManager".into(),
            message: format!(
                "Invalid value: \"{shown}\": invalid character U+{:04X} (at position {at})",
                u32::from(bad)
            ),
        });
    }
    if errors.is_empty() {
        return Ok(());
    }
    Err(invalid(kind, &errors))
}

/// A whole number in the query, in the words of the parser that reads it.
pub(crate) fn number(query: &Query, key: &str) -> Result<Option<i64>, ApiError> {
    query
        .get(key)
        .map(|text| {
            text.parse().map_err(|_| {
                ApiError::bad_request(format!(
                    "strconv.ParseInt: parsing {text:?}: invalid syntax"
                ))
            })
        })
        .transpose()
}

/// `?resourceVersion=`
pub(crate) fn version(query: &Query) -> Result<Option<u64>, ApiError> {
    query
        .get("resourceVersion")
        .map(|text| {
            text.parse().map_err(|_| {
                ApiError::bad_request(format!(
                    "invalid resource version: resourceVersion: Invalid value: {text:?}: strconv.ParseUint: parsing {text:?}: invalid syntax"
                ))
            })
        })
        .transpose()
}

/// `?resourceVersion=` of a watch.
pub(crate) fn watch_version(query: &Query) -> Result<Option<u64>, ApiError> {
    let text = query.get("resourceVersion").unwrap_or_default();
    if text.is_empty() {
        return Ok(None);
    }
    text.parse().map(Some).map_err(|_| {
        ApiError::unexplained(format!(
            "resourceVersion: Invalid value: {text:?}: strconv.ParseUint: parsing {text:?}: invalid syntax"
        ))
    })
}

/// Refuses a `?resourceVersion=` of one object that is none, or is still to come.
pub(crate) fn present_version(query: &Query, current: u64) -> Result<(), ApiError> {
    match watch_version(query)? {
        Some(version) if version > current => Err(ApiError::too_large_version(version, current)),
        _ => Ok(()),
    }
}

/// The body of a delete as `DeleteOptions`; empty where there is none.
fn delete_body(body: &Bytes, call: &Call) -> Result<Value, ApiError> {
    if body.is_empty() {
        return Ok(json!({}));
    }
    let (mut given, _) = decode::parse(body, body_media(&call.headers)?).map_err(|error| {
        ApiError::bad_request(format!(
            "couldn't get version/kind; json parse error: {}",
            error.0
        ))
    })?;
    let (version, kind) = decode::gvk_of(&given);
    if !kind.is_empty() && kind != "DeleteOptions" {
        return Err(ApiError::bad_request(format!(
            "no kind {kind:?} is registered for version {version:?} in scheme \"pkg/apis/meta/internalversion/scheme/register.go:27\""
        )));
    }
    let ty =
        xebec_schema::table::type_by_name("io.k8s.apimachinery.pkg.apis.meta.v1.DeleteOptions");
    if let Some(ty) = ty {
        decode::conform(&mut given, ty)?;
    }
    Ok(given)
}

/// `DeleteOptions` from the body, or the query where there is none.
pub(crate) fn delete_options(body: &Bytes, call: &Call) -> Result<DeleteOptions, ApiError> {
    let query = &call.query;
    let given = delete_body(body, call)?;
    let text = |value: &Value| value.as_str().map(str::to_owned);
    let grace = number(query, "gracePeriodSeconds")?.or(given["gracePeriodSeconds"].as_i64());
    let orphan = given["orphanDependents"]
        .as_bool()
        .or(query.get("orphanDependents").map(|text| text == "true"));
    let asked =
        text(&given["propagationPolicy"]).or(query.get("propagationPolicy").map(str::to_owned));
    let kind = "DeleteOptions";
    if let (Some(policy), Some(_)) = (&asked, orphan) {
        let error = FieldError::invalid(
            "propagationPolicy",
            json!(policy),
            "orphanDependents and deletionPropagation cannot be both set",
        );
        return Err(invalid(kind, &[error]));
    }
    if let Some(policy) = asked
        .as_deref()
        .filter(|policy| !matches!(*policy, "Foreground" | "Background" | "Orphan"))
    {
        let error = FieldError::not_supported(
            "propagationPolicy",
            json!(policy),
            &["Foreground", "Background", "Orphan", "nil"],
        );
        return Err(invalid(kind, &[error]));
    }
    let in_body: Vec<&str> = given["dryRun"]
        .as_array()
        .into_iter()
        .flatten()
        .filter_map(Value::as_str)
        .collect();
    let dry = dry_run(query, kind)? | dry_run_of(&in_body, kind)?;
    let propagation =
        asked.or(orphan.map(|orphan| if orphan { "Orphan" } else { "Background" }.to_owned()));
    Ok(DeleteOptions {
        grace,
        uid: text(&given["preconditions"]["uid"]),
        resource_version: text(&given["preconditions"]["resourceVersion"]),
        propagation,
        dry_run: dry,
    })
}
