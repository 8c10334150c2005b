//! One request from credentials to answer: who asks, what about, may they, and which part serves it.

use std::collections::HashSet;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use http::{HeaderMap, HeaderValue, Request, Response, StatusCode, header};
use http_body_util::{BodyExt, Full, Limited};
use ipnet::IpNet;
use serde_json::{Value, json};
use xebec_schema::table;
use xebec_store::Store;

use crate::authn::{self, UserInfo};
use crate::documents::{Documents, Form};
use crate::error::ApiError;
use crate::metrics::{Labels, Metrics};
use crate::registry::{self, Registry};
use crate::request::{self, Query};
use crate::server::{Config, RequestBody, ResponseBody};
use crate::services::Allocator;
use crate::tokens::Tokens;
use crate::watch::Shape;
use crate::{authz, discovery, encode};

/// Bytes that the body of a request may have.
const BODY_LIMIT: usize = 3 * 1024 * 1024;

/// Bytes that all warnings of one answer may have.
const WARNINGS_LIMIT: usize = 4096;

/// Where a request's user comes from.
#[derive(Clone)]
pub(crate) enum Identity {
    /// A TLS connection, with the user of its client certificate if it had one.
    Connection { certificate: Option<Arc<UserInfo>> },
    /// A part of this process.
    Known(Arc<UserInfo>),
}

/// Everything that serving a request needs.
pub(crate) struct Handler {
    pub config: Config,
    pub tokens: Tokens,
    pub allocator: Arc<Allocator>,
    pub registry: Registry,
    pub metrics: Arc<Metrics>,
    pub documents: Arc<Documents>,
}

/// The parts of a request that serving it looks at.
pub(crate) struct Call {
    pub user: UserInfo,
    pub headers: HeaderMap,
    pub query: Query,
    pub negotiated: Negotiated,
}

/// How an answer goes out.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Negotiated {
    pub yaml: bool,
    pub shape: Shape,
}

pub(crate) type Answer = Result<Response<ResponseBody>, ApiError>;

pub(crate) fn full(bytes: Bytes) -> ResponseBody {
    Full::new(bytes)
        .map_err(|never| match never {})
        .boxed_unsync()
}

/// An answer of these bytes.
pub(crate) fn bytes(
    status: StatusCode,
    content_type: &'static str,
    body: Bytes,
) -> Response<ResponseBody> {
    let mut response = Response::new(full(body));
    *response.status_mut() = status;
    response
        .headers_mut()
        .insert(header::CONTENT_TYPE, HeaderValue::from_static(content_type));
    response
}

/// An answer of this value.
pub(crate) fn value(status: StatusCode, value: &Value, yaml: bool) -> Response<ResponseBody> {
    bytes(
        status,
        if yaml {
            "application/yaml"
        } else {
            "application/json"
        },
        encode::value(value, yaml),
    )
}

fn text(status: StatusCode, body: impl Into<Bytes>) -> Response<ResponseBody> {
    bytes(status, "text/plain; charset=utf-8", body.into())
}

/// `Warning` headers (RFC 7234) about what was left out of an object.
pub(crate) fn warn(
    mut response: Response<ResponseBody>,
    warnings: &[String],
) -> Response<ResponseBody> {
    let mut told = HashSet::new();
    let mut length = 0;
    for warning in warnings {
        length += warning.len();
        // Headers are not the place for more, and no client takes it.
        if length > WARNINGS_LIMIT || !told.insert(warning) {
            continue;
        }
        let escaped = warning.replace('\\', "\\\\").replace('"', "\\\"");
        if let Ok(value) = HeaderValue::from_str(&format!("299 - \"{escaped}\"")) {
            response.headers_mut().append(header::WARNING, value);
        }
    }
    response
}

/// The same, before the warnings that are there already.
pub(crate) fn warn_first(
    mut response: Response<ResponseBody>,
    warnings: &[String],
) -> Response<ResponseBody> {
    if warnings.is_empty() {
        return response;
    }
    let headers = response.headers_mut();
    let others: Vec<HeaderValue> = headers.get_all(header::WARNING).iter().cloned().collect();
    headers.remove(header::WARNING);
    let mut response = warn(response, warnings);
    for other in others {
        response.headers_mut().append(header::WARNING, other);
    }
    response
}

/// Reads `Accept`: the first type that can be served.
fn negotiate(headers: &HeaderMap) -> Result<Negotiated, ApiError> {
    let mut accepted = headers
        .get_all(header::ACCEPT)
        .iter()
        .filter_map(|value| value.to_str().ok())
        .flat_map(|value| value.split(','))
        .peekable();
    if accepted.peek().is_none() {
        return Ok(Negotiated {
            yaml: false,
            shape: Shape::Whole,
        });
    }
    for entry in accepted {
        let mut parts = entry.split(';').map(str::trim);
        let yaml = match parts.next().unwrap_or_default() {
            "application/json" | "*/*" | "application/*" | "" => false,
            "application/yaml" => true,
            _ => continue,
        };
        let (mut what, mut group, mut version) = ("", "", "");
        for part in parts {
            match part.split_once('=') {
                Some(("as", value)) => what = value,
                Some(("g", value)) => group = value,
                Some(("v", value)) => version = value,
                _ => {}
            }
        }
        let shape = match what {
            "" => Shape::Whole,
            "Table" if group == "meta.k8s.io" && version == "v1" => Shape::Table,
            "PartialObjectMetadata" | "PartialObjectMetadataList"
                if group == "meta.k8s.io" && version == "v1" =>
            {
                Shape::Partial
            }
            // Aggregated discovery asks by the same parameter, and falls back.
            _ => continue,
        };
        return Ok(Negotiated { yaml, shape });
    }
    Err(ApiError::not_acceptable())
}

/// Whether the v2 document is wanted in protobuf: named as client-go does, with an `@` or a dot before the version.
fn accepts_gnostic(headers: &HeaderMap) -> bool {
    let accepted = headers.get_all(header::ACCEPT).iter();
    accepted
        .filter_map(|value| value.to_str().ok())
        .any(|value| value.contains("proto-openapi.spec.v2") && value.contains("+protobuf"))
}

fn accepts_aggregated(headers: &HeaderMap) -> bool {
    headers
        .get_all(header::ACCEPT)
        .iter()
        .filter_map(|value| value.to_str().ok())
        .flat_map(|value| value.split(','))
        .any(|entry| {
            entry.contains("application/json")
                && entry.contains("g=apidiscovery.k8s.io")
                && entry.contains("v=v2")
                && !entry.contains("v=v2beta1")
                && entry.contains("as=APIGroupDiscoveryList")
        })
}

/// The whole body, up to the limit.
pub(crate) async fn collect(body: RequestBody) -> Result<Bytes, ApiError> {
    match Limited::new(body, BODY_LIMIT).collect().await {
        Ok(collected) => Ok(collected.to_bytes()),
        Err(error) if error.is::<http_body_util::LengthLimitError>() => {
            Err(ApiError::too_large(BODY_LIMIT))
        }
        Err(error) => Err(ApiError::bad_request(format!(
            "could not read the body of the request: {error}"
        ))),
    }
}

impl Handler {
    pub(crate) fn new(
        config: Config,
        tokens: Tokens,
        cidrs: Vec<IpNet>,
        store: Arc<dyn Store>,
    ) -> Self {
        let allocator = Arc::new(Allocator {
            cidrs,
            ports: config.node_port_range.clone(),
        });
        let registry = Registry {
            store,
            allocator: allocator.clone(),
            storage_protection: config.storage_protection,
        };
        Self {
            config,
            tokens,
            allocator,
            registry,
            metrics: Arc::default(),
            documents: Arc::default(),
        }
    }

    /// Serves one request; errors become `meta/v1` Status.
    pub(crate) async fn handle(
        self: &Arc<Self>,
        request: Request<RequestBody>,
        identity: Identity,
    ) -> Response<ResponseBody> {
        let yaml = request
            .headers()
            .get(header::ACCEPT)
            .is_some_and(|accept| accept.as_bytes().starts_with(b"application/yaml"));
        let mut response = match self.serve(request, identity).await {
            Ok(response) => response,
            Err(error) if error.is_plain() => {
                let mut response = text(error.code, "404 page not found\n");
                response.headers_mut().insert(
                    header::X_CONTENT_TYPE_OPTIONS,
                    HeaderValue::from_static("nosniff"),
                );
                response
            }
            Err(error) => {
                let response = value(error.code, &error.status(), yaml);
                let mut response = warn(response, &error.warnings);
                if let Some(seconds) = error.retry_after {
                    response
                        .headers_mut()
                        .insert(header::RETRY_AFTER, seconds.into());
                }
                response
            }
        };
        let headers = response.headers_mut();
        if let Ok(id) = HeaderValue::from_str(&registry::uid()) {
            headers.insert("audit-id", id);
        }
        headers
            .entry(header::CACHE_CONTROL)
            .or_insert(HeaderValue::from_static("no-cache, private"));
        response
    }

    async fn serve(self: &Arc<Self>, request: Request<RequestBody>, identity: Identity) -> Answer {
        let user = match identity {
            Identity::Known(user) => (*user).clone(),
            Identity::Connection { certificate } => {
                let user =
                    authn::authenticate(request.headers(), certificate.as_deref(), &self.tokens)?;
                if request.headers().contains_key(header::AUTHORIZATION) {
                    self.token_still_holds(&user).await?;
                }
                user
            }
        };
        let user = authn::impersonated(request.headers(), &user)?.unwrap_or(user);
        let query = Query::parse(request.uri().query());
        let path = request.uri().path().to_owned();
        let Some(about) = request::parse(request.method(), &path, &query) else {
            authz::path(
                &user,
                &path,
                &request.method().as_str().to_ascii_lowercase(),
            )?;
            return self.plain(&request, &path, &query);
        };
        authz::resource(&user, &about)?;
        let labels = Labels {
            verb: if about.verb == "deletecollection" {
                "DELETECOLLECTION".into()
            } else {
                about.verb.to_ascii_uppercase()
            },
            group: about.resource.group,
            version: about.resource.version,
            resource: about.resource.plural,
            subresource: about.subresource.clone().unwrap_or_default(),
            scope: match (&about.name, &about.namespace) {
                (Some(_), _) => "resource",
                (None, Some(_)) => "namespace",
                (None, None) => "cluster",
            },
        };
        let started = Instant::now();
        let long_running = about.verb == "watch"
            || matches!(
                about.subresource.as_deref(),
                Some("log" | "exec" | "attach" | "portforward")
            );
        let guard =
            (!long_running).then(|| self.metrics.inflight(!matches!(about.verb, "get" | "list")));
        let streams = matches!(
            about.subresource.as_deref(),
            Some("log" | "exec" | "attach" | "portforward" | "proxy")
        );
        let answer = if streams {
            self.stream(&about, &query, request).await
        } else {
            match negotiate(request.headers()) {
                Ok(negotiated) => {
                    let (parts, body) = request.into_parts();
                    let call = Call {
                        user,
                        headers: parts.headers,
                        query,
                        negotiated,
                    };
                    self.resource(&about, &call, body).await
                }
                Err(error) => Err(error),
            }
        };
        drop(guard);
        let code = answer
            .as_ref()
            .map_or_else(|error| error.code, |response| response.status());
        self.metrics
            .record(labels, code.as_u16(), started.elapsed(), long_running);
        answer
    }

    /// A token is good only while its account, and the pod it is bound to, are the same ones.
    pub(crate) async fn token_still_holds(&self, user: &UserInfo) -> Result<(), ApiError> {
        let rest = user
            .name
            .strip_prefix("system:serviceaccount:")
            .and_then(|rest| rest.split_once(':'));
        let (namespace, name) = rest.ok_or_else(ApiError::unauthorized)?;
        let extra = |key: &str| {
            user.extra
                .iter()
                .find(|(name, _)| name == key)
                .and_then(|(_, values)| values.first())
        };
        let mut wanted = vec![("serviceaccounts", name, user.uid.as_str())];
        if let (Some(name), Some(uid)) = (
            extra("authentication.kubernetes.io/pod-name"),
            extra("authentication.kubernetes.io/pod-uid"),
        ) {
            wanted.push(("pods", name, uid));
        }
        for (plural, name, uid) in wanted {
            let resource = table::resource("", "v1", plural).ok_or_else(ApiError::unauthorized)?;
            let found = self
                .registry
                .get(resource, Some(namespace), name)
                .await
                .map_err(|_| ApiError::unauthorized())?;
            if found["metadata"]["uid"] != uid {
                return Err(ApiError::unauthorized());
            }
        }
        Ok(())
    }

    /// Paths that are no resources: health, discovery, documents.
    fn plain(&self, request: &Request<RequestBody>, path: &str, query: &Query) -> Answer {
        if !matches!(request.method().as_str(), "GET" | "HEAD") {
            // A document can only be read; what is neither it nor a resource is not there.
            let document = match path_parts(path).as_slice() {
                ["version" | "api" | "apis"] | ["api", "v1"] => true,
                ["apis", group] => discovery::api_group(group).is_some(),
                ["apis", group, version] => discovery::api_resources(group, version).is_some(),
                _ => false,
            };
            return Err(if document {
                ApiError::method_not_allowed()
            } else {
                ApiError::no_resource()
            });
        }
        let yaml = negotiate(request.headers()).is_ok_and(|negotiated| negotiated.yaml);
        let document = |body: Value| Ok(value(StatusCode::OK, &body, yaml));
        let found = |body: Option<Value>| {
            body.map(|body| value(StatusCode::OK, &body, yaml))
                .ok_or_else(|| not_found(&path_parts(path)))
        };
        let parts = path_parts(path);
        match parts.as_slice() {
            ["" | "index.html"] => document(json!({"paths": discovery::paths()})),
            [check @ ("healthz" | "livez" | "readyz")] => Ok(health(
                check,
                query.get("verbose").is_some() || query.flag("verbose"),
            )),
            ["healthz" | "livez" | "readyz", "ping" | "etcd"] => Ok(text(StatusCode::OK, "ok")),
            ["version"] => document(discovery::version()),
            ["metrics"] => Ok(bytes(
                StatusCode::OK,
                "text/plain; version=0.0.4; charset=utf-8",
                self.metrics
                    .render(self.registry.store.size_on_disk())
                    .into(),
            )),
            [root @ ("api" | "apis")] if accepts_aggregated(request.headers()) => {
                let body = encode::value(&discovery::aggregated(*root == "api"), false);
                let mut response = bytes(
                    StatusCode::OK,
                    "application/json;g=apidiscovery.k8s.io;v=v2;as=APIGroupDiscoveryList",
                    body,
                );
                response
                    .headers_mut()
                    .insert(header::CACHE_CONTROL, HeaderValue::from_static("public"));
                response
                    .headers_mut()
                    .insert(header::VARY, HeaderValue::from_static("Accept"));
                Ok(response)
            }
            ["api"] => document(discovery::api_versions(&format!(
                "{}:{}",
                self.config.advertise_address, self.config.secure_port
            ))),
            ["apis"] => document(discovery::api_groups()),
            ["api", version] => found(discovery::api_resources("", version)),
            ["apis", group] => found(discovery::api_group(group)),
            ["apis", group, version] => found(discovery::api_resources(group, version)),
            ["openapi", rest @ ..] => {
                let form = match rest {
                    // client-go reads protobuf alone, and takes whatever comes for it.
                    ["v2"] if accepts_gnostic(request.headers()) => Form::Protobuf,
                    _ if yaml => Form::Yaml,
                    _ => Form::Json,
                };
                self.documents
                    .answer(&rest.join("/"), form, request.headers())
                    .ok_or_else(|| not_found(&parts))
            }
            ["openid", "v1", "jwks"] => document(self.tokens.jwks()),
            [".well-known", "openid-configuration"] => document(json!({
                "issuer": self.tokens.issuer,
                "jwks_uri": format!("https://{}:{}/openid/v1/jwks", self.config.advertise_address, self.config.secure_port),
                "response_types_supported": ["id_token"], "subject_types_supported": ["public"],
                "id_token_signing_alg_values_supported": ["ES256"],
            })),
            _ => Err(not_found(&parts)),
        }
    }
}

fn path_parts(path: &str) -> Vec<&str> {
    let path = path.strip_prefix('/').unwrap_or(path);
    path.strip_suffix('/').unwrap_or(path).split('/').collect()
}

/// A path that is not served: of a group that is, the API says so; of others, nobody knows.
fn not_found(parts: &[&str]) -> ApiError {
    let known = match parts {
        ["api", ..] => true,
        ["apis", group, ..] => discovery::api_group(group).is_some(),
        ["openapi", ..] => true,
        _ => false,
    };
    if known {
        ApiError::no_resource()
    } else {
        ApiError::no_path()
    }
}

fn health(check: &str, verbose: bool) -> Response<ResponseBody> {
    if verbose {
        let mut response = text(
            StatusCode::OK,
            format!("[+]ping ok\n[+]etcd ok\n{check} check passed\n"),
        );
        response.headers_mut().insert(
            header::X_CONTENT_TYPE_OPTIONS,
            HeaderValue::from_static("nosniff"),
        );
        return response;
    }
    text(StatusCode::OK, "ok")
}

/// How long a watch lasts where it does not say: between half an hour and an hour, so that watches do not all end at once.
pub(crate) fn watch_timeout(query: &Query) -> Duration {
    match query
        .get("timeoutSeconds")
        .and_then(|text| text.parse::<u64>().ok())
        .filter(|seconds| *seconds > 0)
    {
        Some(seconds) => Duration::from_secs(seconds),
        None => Duration::from_secs(rand::random_range(1800..3600)),
    }
}
