//! Errors as `meta/v1` Status, in the real server's words.

use http::StatusCode;
use serde_json::{Value, json};
use xebec_schema::decode::DecodeError;
use xebec_schema::field_error::FieldError;
use xebec_schema::patch::PatchError;
use xebec_schema::table::Resource;

/// A Status that ends a request.
#[derive(Debug)]
pub struct ApiError {
    /// The HTTP status.
    pub code: StatusCode,
    reason: &'static str,
    message: String,
    details: Option<Value>,
    /// `Retry-After`, seconds.
    pub retry_after: Option<u32>,
    /// What the object is warned about although it was refused.
    pub(crate) warnings: Vec<String>,
}

impl std::fmt::Display for ApiError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.message)
    }
}

/// `details` of a Status about one object.
fn details(resource: &Resource, name: &str) -> Value {
    let mut details = json!({"kind": resource.plural});
    if !name.is_empty() {
        details["name"] = name.into();
    }
    if !resource.group.is_empty() {
        details["group"] = resource.group.into();
    }
    details
}

impl ApiError {
    fn new(code: StatusCode, reason: &'static str, message: impl Into<String>) -> Self {
        Self {
            code,
            reason,
            message: message.into(),
            details: None,
            retry_after: None,
            warnings: Vec::new(),
        }
    }

    /// Warnings go out with a refusal, too.
    pub(crate) fn with_warnings(mut self, warnings: Vec<String>) -> Self {
        self.warnings = warnings;
        self
    }

    fn without_details(mut self) -> Self {
        self.details = Some(json!({}));
        self
    }

    fn about(mut self, resource: &Resource, name: &str) -> Self {
        self.details = Some(details(resource, name));
        self
    }

    /// 400: the request can't be understood.
    pub fn bad_request(message: impl Into<String>) -> Self {
        Self::new(StatusCode::BAD_REQUEST, "BadRequest", message)
    }

    /// 404: no such object.
    pub fn not_found(resource: &Resource, name: &str) -> Self {
        let message = format!("{} {name:?} not found", resource.qualified());
        Self::new(StatusCode::NOT_FOUND, "NotFound", message).about(resource, name)
    }

    /// 404: no such object, of a resource that goes by another name than its own.
    pub fn not_found_as(what: &str, name: &str) -> Self {
        let message = format!("{what} {name:?} not found");
        let mut error = Self::new(StatusCode::NOT_FOUND, "NotFound", message);
        error.details = Some(json!({"kind": what, "name": name}));
        error
    }

    /// 404: no such path.
    pub fn no_resource() -> Self {
        let mut error = Self::new(
            StatusCode::NOT_FOUND,
            "NotFound",
            "the server could not find the requested resource",
        );
        error.details = Some(json!({}));
        error
    }

    /// 404: a path that is served by nothing.
    pub fn no_path() -> Self {
        Self::new(StatusCode::NOT_FOUND, "", "404 page not found")
    }

    /// Whether it is answered as plain text: the path is none of the API's.
    pub(crate) fn is_plain(&self) -> bool {
        self.code == StatusCode::NOT_FOUND && self.reason.is_empty()
    }

    /// Whether this is a conflict that another try may get past.
    pub fn is_conflict(&self) -> bool {
        self.reason == "Conflict"
    }

    /// 409: others own what would be changed.
    pub fn apply_conflict(message: String, causes: Vec<Value>) -> Self {
        let mut error = Self::new(StatusCode::CONFLICT, "Conflict", message);
        error.details = Some(json!({"causes": causes}));
        error
    }

    /// 405.
    pub fn method_not_allowed() -> Self {
        let message = "the server does not allow this method on the requested resource";
        let mut error = Self::new(StatusCode::METHOD_NOT_ALLOWED, "MethodNotAllowed", message);
        error.details = Some(json!({}));
        error
    }

    /// 409: the name is taken.
    pub fn already_exists(resource: &Resource, name: &str) -> Self {
        let message = format!("{} {name:?} already exists", resource.qualified());
        Self::new(StatusCode::CONFLICT, "AlreadyExists", message).about(resource, name)
    }

    /// 409: it was changed meanwhile, or a precondition failed.
    pub fn conflict(resource: &Resource, name: &str, why: &str) -> Self {
        let message = format!(
            "Operation cannot be fulfilled on {} {name:?}: {why}",
            resource.qualified()
        );
        Self::new(StatusCode::CONFLICT, "Conflict", message).about(resource, name)
    }

    /// 409 about a kind rather than a resource, as failed preconditions of a delete are told.
    pub fn conflict_of_kind(resource: &Resource, name: &str, why: &str) -> Self {
        let (kind, group) = (resource.kind, resource.group);
        let qualified = if group.is_empty() {
            kind.to_owned()
        } else {
            format!("{kind}.{group}")
        };
        let message = format!("Operation cannot be fulfilled on {qualified} {name:?}: {why}");
        let mut error = Self::new(StatusCode::CONFLICT, "Conflict", message).about(resource, name);
        if let Some(details) = &mut error.details {
            details["kind"] = kind.into();
        }
        error
    }

    /// An error about a stored object, in terms of the version that it was asked for in.
    pub(crate) fn seen_as(mut self, stored: &Resource, asked: &Resource) -> Self {
        if stored.group == asked.group {
            return self;
        }
        let (from, to) = (stored.qualified(), asked.qualified());
        if let Some(rest) = self.message.strip_prefix(&from) {
            self.message = format!("{to}{rest}");
        } else {
            let (from, to) = (format!(" on {from} "), format!(" on {to} "));
            self.message = self.message.replacen(&from, &to, 1);
        }
        if let Some(details) = &mut self.details {
            if details["kind"] == stored.plural {
                details["group"] = asked.group.into();
            }
        }
        self
    }

    /// With what led to it, one entry each.
    pub(crate) fn with_causes(mut self, causes: Value) -> Self {
        let details = self.details.get_or_insert_with(|| json!({}));
        details["causes"] = causes;
        self
    }

    /// The same about a subresource, as messages name it.
    pub fn renamed(mut self, what: &str) -> Self {
        if let Some((head, tail)) = self
            .message
            .split_once(" on ")
            .and_then(|(h, rest)| Some((h, rest.split_once(' ')?.1)))
        {
            self.message = format!("{head} on {what} {tail}");
        }
        if let Some(details) = &mut self.details {
            details["kind"] = what.into();
        }
        self
    }

    /// 409 in its usual form.
    pub fn modified(resource: &Resource, name: &str) -> Self {
        let why = "the object has been modified; please apply your changes to the latest version and try again";
        Self::conflict(resource, name, why)
    }

    /// 401.
    pub fn unauthorized() -> Self {
        Self::new(StatusCode::UNAUTHORIZED, "Unauthorized", "Unauthorized")
    }

    /// 403 with a whole message.
    pub fn forbidden(message: impl Into<String>) -> Self {
        let mut error = Self::new(StatusCode::FORBIDDEN, "Forbidden", message);
        error.details = Some(json!({}));
        error
    }

    /// 403 about one object.
    pub fn forbidden_object(resource: &Resource, name: &str, why: &str) -> Self {
        let message = format!("{} {name:?} is forbidden: {why}", resource.qualified());
        Self::new(StatusCode::FORBIDDEN, "Forbidden", message).about(resource, name)
    }

    /// 406.
    pub fn not_acceptable() -> Self {
        let message =
            "only the following media types are accepted: application/json, application/yaml";
        Self::new(StatusCode::NOT_ACCEPTABLE, "NotAcceptable", message)
    }

    /// 415.
    pub fn unsupported_media(what: &str) -> Self {
        let message = format!(
            "the body of the request was in an unknown format - accepted media types include: {what}"
        );
        Self::new(
            StatusCode::UNSUPPORTED_MEDIA_TYPE,
            "UnsupportedMediaType",
            message,
        )
    }

    /// 413.
    pub fn too_large(limit: usize) -> Self {
        let message = format!("Request entity too large: limit is {limit}");
        Self::new(
            StatusCode::PAYLOAD_TOO_LARGE,
            "RequestEntityTooLarge",
            message,
        )
    }

    /// 410: the history asked for is gone.
    pub fn expired(message: impl Into<String>) -> Self {
        Self::new(StatusCode::GONE, "Expired", message)
    }

    /// 429: a disruption budget does not allow it; `retry`: seconds after which it may.
    pub fn too_many_requests(budget: &str, retry: Option<u32>) -> Self {
        let message = "Cannot evict pod as it would violate the pod's disruption budget.";
        let mut error = Self::new(StatusCode::TOO_MANY_REQUESTS, "TooManyRequests", message);
        let mut details = json!({"causes": [{"reason": "DisruptionBudget", "message": budget}]});
        if let Some(seconds) = retry {
            details["retryAfterSeconds"] = seconds.into();
        }
        error.details = Some(details);
        error.retry_after = retry;
        error
    }

    /// 500 without a reason, as the real server answers for some broken patches.
    pub fn unexplained(message: impl Into<String>) -> Self {
        Self::new(StatusCode::INTERNAL_SERVER_ERROR, "", message)
    }

    /// 500.
    pub fn internal(message: impl Into<String>) -> Self {
        let message = message.into();
        tracing::debug!(message, "internal error answered");
        Self::new(StatusCode::INTERNAL_SERVER_ERROR, "InternalError", message)
    }

    /// 503.
    pub fn unavailable(message: impl Into<String>) -> Self {
        Self::new(
            StatusCode::SERVICE_UNAVAILABLE,
            "ServiceUnavailable",
            message,
        )
    }

    /// 504: a revision that is still to come.
    pub fn too_large_version(requested: u64, current: u64) -> Self {
        let message =
            format!("Timeout: Too large resource version: {requested}, current: {current}");
        let mut error = Self::new(StatusCode::GATEWAY_TIMEOUT, "Timeout", message);
        error.details = Some(json!({
            "causes": [{"message": "Too large resource version", "reason": "ResourceVersionTooLarge"}],
            "retryAfterSeconds": 1,
        }));
        error.retry_after = Some(1);
        error
    }

    /// 422: the object is not valid.
    pub fn invalid(kind: &str, group: &str, name: &str, errors: &[FieldError]) -> Self {
        // The message says each once, the causes as often as it was found.
        let mut shown: Vec<String> = Vec::new();
        for text in errors.iter().map(ToString::to_string) {
            if !shown.contains(&text) {
                shown.push(text);
            }
        }
        let shown = if shown.len() == 1 {
            shown[0].clone()
        } else {
            format!("[{}]", shown.join(", "))
        };
        let qualified = if group.is_empty() {
            kind.to_owned()
        } else {
            format!("{kind}.{group}")
        };
        let causes: Vec<Value> = errors
            .iter()
            .map(|error| json!({"reason": error.reason, "message": error.message, "field": error.field}))
            .collect();
        let mut status = Self::new(
            StatusCode::UNPROCESSABLE_ENTITY,
            "Invalid",
            format!("{qualified} {name:?} is invalid: {shown}"),
        );
        let mut details = json!({"causes": causes});
        if !kind.is_empty() {
            details["kind"] = kind.into();
        }
        if !name.is_empty() {
            details["name"] = name.into();
        }
        if !group.is_empty() {
            details["group"] = group.into();
        }
        status.details = Some(details);
        status
    }

    /// The `meta/v1` Status.
    pub fn status(&self) -> Value {
        let mut status = json!({
            "kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Failure",
            "message": self.message, "code": self.code.as_u16(),
        });
        if !self.reason.is_empty() {
            status["reason"] = self.reason.into();
        }
        if let Some(details) = &self.details {
            status["details"] = details.clone();
        }
        if let (Some(seconds), Some(details)) = (self.retry_after, status.get_mut("details")) {
            details["retryAfterSeconds"] = seconds.into();
        }
        status
    }
}

impl From<xebec_store::Error> for ApiError {
    fn from(error: xebec_store::Error) -> Self {
        use xebec_store::Error;
        match error {
            Error::Compacted { .. } => {
                Self::expired("The resourceVersion for the provided list is too old.")
            }
            Error::Future { requested, current } => Self::too_large_version(requested, current),
            Error::Unwritable(why) => Self::unavailable(format!("the store can't write: {why}")),
            other => Self::internal(other.to_string()),
        }
    }
}

impl From<PatchError> for ApiError {
    fn from(error: PatchError) -> Self {
        match error {
            PatchError::Malformed(message) => Self::bad_request(message),
            PatchError::Unprocessable(message) => {
                Self::new(StatusCode::UNPROCESSABLE_ENTITY, "Invalid", message).without_details()
            }
            PatchError::TooLarge(message) => Self::new(
                StatusCode::PAYLOAD_TOO_LARGE,
                "RequestEntityTooLarge",
                format!("Request entity too large: {message}"),
            ),
            PatchError::Internal(message) => Self::unexplained(message),
        }
    }
}

impl From<DecodeError> for ApiError {
    fn from(error: DecodeError) -> Self {
        Self::bad_request(error.0)
    }
}
