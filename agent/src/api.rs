//! The agent's socket: HTTP/1.1 and JSON for the CNI plugin and the command line.

use std::convert::Infallible;
use std::path::PathBuf;
use std::sync::Arc;

use anyhow::{Context, Result};
use bytes::Bytes;
use http::{Method, Request, Response, StatusCode};
use http_body_util::{BodyExt, Full, Limited};
use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper_util::rt::TokioIo;
use serde_json::{Value, json};
use tokio::net::UnixListener;
use tokio_util::sync::CancellationToken;

use crate::endpoints::Endpoints;
use crate::services::Shown;

/// Bytes of a request: a CNI configuration with its previous result.
const LIMIT: usize = 1 << 20;

/// Serves until `shutdown`.
pub(crate) async fn run(
    socket: PathBuf,
    endpoints: Arc<Endpoints>,
    services: Shown,
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
        let (endpoints, services) = (endpoints.clone(), services.clone());
        tokio::spawn(async move {
            let service = service_fn(move |request| {
                let (endpoints, services) = (endpoints.clone(), services.clone());
                async move { Ok::<_, Infallible>(answer(request, &endpoints, &services).await) }
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

fn reply(status: StatusCode, value: &Value) -> Response<Full<Bytes>> {
    let mut response = Response::new(Full::new(Bytes::from(value.to_string())));
    *response.status_mut() = status;
    response.headers_mut().insert(
        http::header::CONTENT_TYPE,
        http::HeaderValue::from_static("application/json"),
    );
    response
}

async fn answer(
    request: Request<Incoming>,
    endpoints: &Endpoints,
    services: &Shown,
) -> Response<Full<Bytes>> {
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
        (&Method::GET, "/tables") => reply(StatusCode::OK, &json!(["endpoints", "services"])),
        (&Method::GET, "/tables/services") => reply(StatusCode::OK, &services.rows().into()),
        (&Method::GET, "/tables/endpoints") => {
            let rows: Vec<Value> = endpoints
                .list()
                .await
                .into_iter()
                .map(|one| json!({"namespace": one.namespace, "pod": one.pod, "address": one.address, "device": one.device, "container": one.container_id}))
                .collect();
            reply(StatusCode::OK, &rows.into())
        }
        (&Method::GET, "/status") => reply(
            StatusCode::OK,
            &json!({"healthy": true, "endpoints": endpoints.list().await.len()}),
        ),
        _ => reply(
            StatusCode::NOT_FOUND,
            &json!({"error": format!("the agent has no {path}")}),
        ),
    }
}
