//! The agent's socket: HTTP/1.1 and JSON for the CNI plugin and the command line.

use std::convert::Infallible;
use std::path::PathBuf;
use std::sync::Arc;

use anyhow::{Context, Result, bail};
use bytes::Bytes;
use http::{Method, Request, Response, StatusCode};
use http_body_util::combinators::UnsyncBoxBody;
use http_body_util::{BodyExt, Full, Limited, StreamBody};
use hyper::body::{Frame, Incoming};
use hyper::service::service_fn;
use hyper_util::rt::TokioIo;
use serde_json::{Value, json};
use tokio::net::UnixListener;
use tokio_util::sync::CancellationToken;
use xebec_policy::explain::{Asked, Party};

use crate::endpoints::Endpoints;
use crate::flows::Flows;
use crate::maps::{Hits, PolicyMaps, dump};
use crate::network::Served;
use crate::policy::watch::Shared;
use crate::services::Services;

/// Bytes of a request: a CNI configuration with its previous result.
const LIMIT: usize = 1 << 20;

/// What can be asked.
#[derive(Clone)]
pub(crate) struct Tables {
    pub endpoints: Arc<Endpoints>,
    /// None where pods are only taken away.
    pub services: Option<Services>,
    /// None where pods are only taken away.
    pub hits: Option<Arc<Hits>>,
    /// None where pods are only taken away.
    pub engine: Option<Shared<PolicyMaps>>,
    pub flows: Flows,
    pub served: Served,
}

type Body = UnsyncBoxBody<Bytes, Infallible>;

/// Serves until `shutdown`.
pub(crate) async fn run(
    socket: PathBuf,
    tables: Tables,
    shutdown: CancellationToken,
) -> Result<()> {
    let _ = std::fs::remove_file(&socket);
    let listener = UnixListener::bind(&socket)
        .with_context(|| format!("could not listen on {}", socket.display()))?;
    // Whoever may write to it may connect pods: root alone.
    use std::os::unix::fs::PermissionsExt;
    std::fs::set_permissions(&socket, std::fs::Permissions::from_mode(0o600))
        .context("could not protect the agent's socket")?;
    loop {
        let stream = tokio::select! {
            () = shutdown.cancelled() => break,
            accepted = listener.accept() => accepted.context("could not accept on the agent's socket")?.0,
        };
        let tables = tables.clone();
        tokio::spawn(async move {
            let service = service_fn(move |request| {
                let tables = tables.clone();
                async move { Ok::<_, Infallible>(answer(request, &tables).await) }
            });
            // A client that goes away is no fault.
            let _ = hyper::server::conn::http1::Builder::new()
                .serve_connection(TokioIo::new(stream), service)
                .await;
        });
    }
    let _ = std::fs::remove_file(&socket);
    Ok(())
}

fn reply(status: StatusCode, value: &Value) -> Response<Body> {
    let mut response = Response::new(Full::new(Bytes::from(value.to_string())).boxed_unsync());
    *response.status_mut() = status;
    response.headers_mut().insert(
        http::header::CONTENT_TYPE,
        http::HeaderValue::from_static("application/json"),
    );
    response
}

/// What maps of the kernel hold, as newline-delimited JSON.
fn dumped(what: dump::What, query: &str) -> Response<Body> {
    let filter = match dump::Filter::parse(query) {
        Ok(filter) => filter,
        Err(error) => {
            return reply(
                StatusCode::BAD_REQUEST,
                &json!({"error": format!("{error:#}")}),
            );
        }
    };
    let (out, pieces) = tokio::sync::mpsc::channel(4);
    tokio::task::spawn_blocking(move || dump::read(what, filter, out));
    let pieces = futures::stream::unfold(pieces, |mut pieces| async move {
        let piece = pieces.recv().await?;
        Some((Ok(Frame::data(piece)), pieces))
    });
    let mut response = Response::new(StreamBody::new(pieces).boxed_unsync());
    response.headers_mut().insert(
        http::header::CONTENT_TYPE,
        http::HeaderValue::from_static("application/x-ndjson"),
    );
    response
}

/// One row a frontend, with how many flows its Service's port got.
fn services(tables: &Tables) -> Result<Vec<Value>> {
    let mut rows = tables
        .services
        .as_ref()
        .map(Services::rows)
        .unwrap_or_default();
    let Some(hits) = &tables.hits else {
        return Ok(rows);
    };
    // Frontends of one port follow each other.
    let mut last = (0, 0);
    for row in &mut rows {
        let number = row["number"].as_u64().unwrap_or_default() as u32;
        if number == 0 {
            continue;
        }
        if number != last.0 {
            last = (number, hits.of(number)?);
        }
        row["hits"] = last.1.into();
    }
    Ok(rows)
}

/// What becomes of a flow, and why: `from` and `to` are `NAMESPACE/POD`, `node:NAME`, `domain:NAME` or an address, `protocol` is a
/// number, `port` the destination's, `family` 4 or 6.
async fn explain(tables: &Tables, query: &str) -> Result<Value> {
    let party = |text: &str| -> Result<Party> {
        if let Ok(address) = text.parse() {
            return Ok(Party::Address(address));
        }
        if let Some(domain) = text.strip_prefix("domain:") {
            return Ok(Party::Domain(domain.to_owned()));
        }
        match (text.strip_prefix("node:"), text.split_once('/')) {
            (Some(node), _) => Ok(Party::Node(node.to_owned())),
            (None, Some((namespace, pod))) => Ok(Party::Pod((namespace.into(), pod.into()))),
            (None, None) => bail!(
                "{text:?} is neither NAMESPACE/POD nor node:NAME nor domain:NAME nor an address"
            ),
        }
    };
    let (mut from, mut to, mut v4) = (None, None, None);
    let (mut protocol, mut port) = (xebec_dataplane_common::TCP, 0);
    for (key, value) in form_urlencoded::parse(query.as_bytes()) {
        let number = || {
            value
                .parse()
                .with_context(|| format!("{key}={value} is no number"))
        };
        match &*key {
            "from" => from = Some(party(&value)?),
            "to" => to = Some(party(&value)?),
            "protocol" => protocol = u8::try_from(number()?).context("protocols are below 256")?,
            "port" => port = number()?,
            "family" => v4 = Some(value == "4"),
            other => bail!("{other:?} can't be asked for"),
        }
    }
    let asked = Asked {
        from: from.context("from is missing")?,
        to: to.context("to is missing")?,
        protocol,
        port,
        v4,
    };
    let engine = tables
        .engine
        .as_ref()
        .context("no policies are known here")?;
    let explanation = engine.lock().await.explain(&asked)?;
    serde_json::to_value(explanation).context("could not write JSON")
}

async fn answer(request: Request<Incoming>, tables: &Tables) -> Response<Body> {
    let endpoints = &tables.endpoints;
    let path = request.uri().path().to_owned();
    match (request.method(), path.as_str()) {
        (&Method::POST, "/cni") => {
            let cni_error = |code: u32, message: String| {
                reply(
                    StatusCode::BAD_REQUEST,
                    &json!({"code": code, "msg": message}),
                )
            };
            let body = match Limited::new(request.into_body(), LIMIT).collect().await {
                Ok(body) => body.to_bytes(),
                Err(error) => return cni_error(6, format!("the request can't be read: {error}")),
            };
            let Ok(request) = serde_json::from_slice::<Value>(&body) else {
                return cni_error(6, "the request is no JSON".into());
            };
            match endpoints.cni(&request).await {
                Ok(result) => reply(StatusCode::OK, &result),
                Err(error) => cni_error(error.code, error.message),
            }
        }
        (&Method::GET, "/tables") => reply(
            StatusCode::OK,
            &json!([
                "endpoints",
                "services",
                "policies",
                "identities",
                "fqdns",
                "maps",
                "devices"
            ]),
        ),
        (&Method::GET, "/tables/services") => match services(tables) {
            Ok(rows) => reply(StatusCode::OK, &rows.into()),
            Err(error) => reply(
                StatusCode::INTERNAL_SERVER_ERROR,
                &json!({"error": format!("{error:#}")}),
            ),
        },
        (&Method::GET, "/tables/maps") => match crate::bpf_maps::rows() {
            Ok(rows) => reply(StatusCode::OK, &rows.into()),
            Err(error) => reply(
                StatusCode::INTERNAL_SERVER_ERROR,
                &json!({"error": format!("{error:#}")}),
            ),
        },
        (&Method::GET, "/tables/policies") => match &tables.engine {
            Some(engine) => reply(StatusCode::OK, &engine.lock().await.policy_rows().into()),
            None => reply(StatusCode::OK, &json!([])),
        },
        (&Method::GET, "/tables/identities") => match &tables.engine {
            Some(engine) => reply(StatusCode::OK, &engine.lock().await.identity_rows().into()),
            None => reply(StatusCode::OK, &json!([])),
        },
        (&Method::GET, "/tables/fqdns") => match &tables.engine {
            Some(engine) => {
                let rows = engine.lock().await.domain_rows(crate::domains::now());
                reply(StatusCode::OK, &rows.into())
            }
            None => reply(StatusCode::OK, &json!([])),
        },
        (&Method::GET, "/tables/endpoints") => {
            let all = endpoints.list().await;
            let engine = match &tables.engine {
                Some(engine) => Some(engine.lock().await),
                None => None,
            };
            let node = engine.as_ref().and_then(|engine| engine.host_row());
            let node = node.map(|more| {
                let mut row = json!({"namespace": "", "pod": "node", "address": null, "addresses": [], "device": null, "container": null});
                if let (Some(row), Value::Object(more)) = (row.as_object_mut(), more) {
                    row.extend(more);
                }
                row
            });
            let rows: Vec<Value> = all
                .into_iter()
                .map(|one| {
                    let first = one.addresses.first().copied();
                    let mut row = json!({"namespace": one.namespace, "pod": one.pod, "address": first, "addresses": one.addresses, "device": one.device, "container": one.container_id});
                    let more = engine.as_ref().and_then(|engine| engine.endpoint_row(first?));
                    if let (Some(row), Some(Value::Object(more))) = (row.as_object_mut(), more) {
                        row.extend(more);
                    }
                    row
                })
                .chain(node)
                .collect();
            reply(StatusCode::OK, &rows.into())
        }
        (&Method::GET, "/policy/explain") => {
            let query = request.uri().query().unwrap_or_default();
            match explain(tables, query).await {
                Ok(value) => reply(StatusCode::OK, &value),
                Err(error) => reply(
                    StatusCode::BAD_REQUEST,
                    &json!({"error": format!("{error:#}")}),
                ),
            }
        }
        (&Method::GET, "/status") => match tables.flows.counters() {
            Ok(counters) => reply(
                StatusCode::OK,
                &json!({
                    "healthy": true,
                    "endpoints": endpoints.list().await.len(),
                    "devices": tables.served.words(),
                    "services": tables.services.as_ref().map(Services::standing),
                    "packets": {
                        "forwarded": counters.forwarded,
                        "dropped": counters.dropped,
                        "refused": counters.refused,
                        "no_port": counters.no_port,
                    },
                    "dns_answers": {"held": counters.held, "not_held": counters.unheld},
                    "translated": {"tc": counters.translated, "xdp": counters.translated_early},
                    "flow_events": {
                        "produced": counters.produced,
                        "delivered": tables.flows.taken(),
                        "lost": counters.lost,
                        "aggregated_packets": counters.aggregated,
                    },
                }),
            ),
            Err(error) => reply(
                StatusCode::OK,
                &json!({"healthy": false, "error": format!("{error:#}")}),
            ),
        },
        (&Method::GET, "/bpf/lb" | "/bpf/flow" | "/bpf/nat") => {
            let what = match path.as_str() {
                "/bpf/lb" => dump::What::Services,
                "/bpf/flow" => dump::What::Flows,
                _ => dump::What::Translations,
            };
            dumped(what, request.uri().query().unwrap_or_default())
        }
        _ => reply(
            StatusCode::NOT_FOUND,
            &json!({"error": format!("the agent has no {path}")}),
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    async fn ask(query: &str) -> (StatusCode, String) {
        let response = dumped(dump::What::Flows, query);
        let status = response.status();
        let body = response.into_body().collect().await.unwrap().to_bytes();
        (status, String::from_utf8(body.to_vec()).unwrap())
    }

    #[tokio::test]
    async fn what_can_not_be_read_is_the_last_line() {
        let (status, text) = ask("port=80").await;
        assert_eq!(status, StatusCode::OK);
        let last: Value = serde_json::from_str(text.trim_end()).unwrap();
        // This process holds none of the dataplane's maps.
        assert!(last["error"].as_str().unwrap().contains("FLOWS"), "{text}");
        let (status, text) = ask("pod=a").await;
        assert_eq!(status, StatusCode::BAD_REQUEST);
        assert!(text.contains("address and port"), "{text}");
    }
}
