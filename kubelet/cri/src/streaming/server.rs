//! The streaming server: takes a token's connection, agrees on a protocol, upgrades.

use std::convert::Infallible;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, ensure};
use bytes::Bytes;
use http::header::{
    CONNECTION, HeaderMap, HeaderName, HeaderValue, SEC_WEBSOCKET_ACCEPT, SEC_WEBSOCKET_KEY,
    SEC_WEBSOCKET_PROTOCOL, SEC_WEBSOCKET_VERSION, UPGRADE,
};
use http::{Method, Request, Response, StatusCode};
use http_body_util::Full;
use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::net::TcpListener;

use super::tokens::Target;
use super::{spdy, websocket};
use crate::runtime::Runtime;

/// How long a client may take for its request's headers.
const HEADERS: Duration = Duration::from_secs(10);

/// Where SPDY clients say what they want to speak over it.
const STREAM_PROTOCOL: HeaderName = HeaderName::from_static("x-stream-protocol-version");

type Answer = Response<Full<Bytes>>;

/// Listens on a loopback address; URLs name it from now on.
pub(crate) async fn listen(runtime: &Runtime) -> anyhow::Result<TcpListener> {
    let address = runtime.config.streaming_address;
    ensure!(
        address.ip().is_loopback(),
        "the streaming address {address} is no loopback address: only the kubelet may reach it"
    );
    let listener = TcpListener::bind(address)
        .await
        .with_context(|| format!("cannot listen on {address} for streams"))?;
    runtime.tokens.set_address(listener.local_addr()?);
    Ok(listener)
}

/// Serves until the runtime's shutdown.
pub(crate) async fn serve(runtime: Arc<Runtime>, listener: TcpListener) {
    loop {
        let accepted = tokio::select! {
            () = runtime.shutdown.cancelled() => return,
            accepted = listener.accept() => accepted,
        };
        let (stream, peer) = match accepted {
            Ok(accepted) => accepted,
            Err(err) => {
                tracing::warn!("cannot accept a stream's connection: {err}");
                tokio::time::sleep(Duration::from_millis(50)).await;
                continue;
            }
        };
        let _ = stream.set_nodelay(true);
        let runtime = runtime.clone();
        tokio::spawn(async move {
            let service = service_fn(|request| {
                let answer = answer(&runtime, peer, request);
                std::future::ready(Ok::<_, Infallible>(answer))
            });
            let connection = hyper::server::conn::http1::Builder::new()
                .timer(TokioTimer::new())
                .header_read_timeout(HEADERS)
                .serve_connection(TokioIo::new(stream), service)
                .with_upgrades();
            let ended = tokio::select! {
                ended = connection => ended,
                () = runtime.shutdown.cancelled() => return,
            };
            if let Err(err) = ended {
                tracing::debug!("a stream's connection from {peer} failed: {err}");
            }
        });
    }
}

fn text(status: StatusCode, text: impl Into<String>) -> Answer {
    let mut answer = Response::new(Full::new(Bytes::from(text.into())));
    *answer.status_mut() = status;
    answer
}

/// What is spoken on a connection once it is upgraded.
enum Wire {
    WebSocket,
    Spdy,
}

fn answer(runtime: &Arc<Runtime>, peer: SocketAddr, mut request: Request<Incoming>) -> Answer {
    if !matches!(*request.method(), Method::GET | Method::POST) {
        return text(StatusCode::METHOD_NOT_ALLOWED, "405 method not allowed\n");
    }
    let Some(target) = runtime.tokens.take(request.uri().path()) else {
        tracing::debug!("a client at {peer} has no token");
        return text(StatusCode::NOT_FOUND, "404 page not found\n");
    };
    let (wire, headers) = match agree(&target, request.headers()) {
        Ok(agreed) => agreed,
        Err((status, why)) => return text(status, format!("unable to upgrade: {why}\n")),
    };
    let upgrade = hyper::upgrade::on(&mut request);
    let runtime = runtime.clone();
    tokio::spawn(async move {
        let work = async {
            match upgrade.await {
                Ok(connection) => stream(&runtime, &target, wire, connection).await,
                Err(err) => tracing::debug!("a stream to {peer} was not upgraded: {err}"),
            }
        };
        tokio::select! {
            () = work => {}
            () = runtime.shutdown.cancelled() => {}
        }
    });
    let mut answer = text(StatusCode::SWITCHING_PROTOCOLS, "");
    *answer.headers_mut() = headers;
    answer
}

async fn stream(
    runtime: &Arc<Runtime>,
    target: &Target,
    wire: Wire,
    connection: hyper::upgrade::Upgraded,
) {
    match target {
        Target::Exec { streams, .. } | Target::Attach { streams, .. } => match wire {
            Wire::WebSocket => {
                let socket = websocket::open(connection).await;
                websocket::process(runtime, target, *streams, socket).await;
            }
            Wire::Spdy => {
                let session = spdy::open(connection);
                spdy::process(runtime, target, *streams, session).await;
            }
        },
        Target::PortForward { sandbox } => {
            let session = match wire {
                Wire::WebSocket => spdy::tunnel(websocket::open(connection).await),
                Wire::Spdy => spdy::open(connection),
            };
            match runtime.registry.sandbox(sandbox) {
                Some(sandbox) => spdy::forward(runtime, &sandbox, session).await,
                None => tracing::debug!("a pod has gone before its port-forward began"),
            }
        }
    }
}

/// All elements of a header that is a list, over all its lines.
fn list<'a>(headers: &'a HeaderMap, name: &HeaderName) -> impl Iterator<Item = &'a str> {
    headers
        .get_all(name)
        .iter()
        .filter_map(|value| value.to_str().ok())
        .flat_map(|value| value.split(','))
        .map(str::trim)
        .filter(|one| !one.is_empty())
}

/// The protocol to speak, and the headers of the answer that say so.
fn agree(target: &Target, request: &HeaderMap) -> Result<(Wire, HeaderMap), (StatusCode, String)> {
    let asks =
        |protocol: &str| list(request, &UPGRADE).any(|one| one.eq_ignore_ascii_case(protocol));
    if !list(request, &CONNECTION).any(|one| one.eq_ignore_ascii_case("upgrade")) {
        return Err((
            StatusCode::BAD_REQUEST,
            "the request asks for no upgrade: use WebSocket or SPDY/3.1".to_owned(),
        ));
    }
    let mut headers = HeaderMap::new();
    headers.insert(CONNECTION, HeaderValue::from_static("Upgrade"));
    if asks("websocket") {
        let key = request.get(SEC_WEBSOCKET_KEY);
        let version = request.get(SEC_WEBSOCKET_VERSION);
        let (Some(key), true) = (key, version.is_some_and(|v| v == "13")) else {
            return Err((
                StatusCode::BAD_REQUEST,
                "the WebSocket request has no key or another version than 13".to_owned(),
            ));
        };
        let ours = match target {
            Target::Exec { .. } | Target::Attach { .. } => websocket::PROCESS_PROTOCOLS,
            Target::PortForward { .. } => websocket::FORWARD_PROTOCOLS,
        };
        let protocol = choose(list(request, &SEC_WEBSOCKET_PROTOCOL), ours)?;
        headers.insert(UPGRADE, HeaderValue::from_static("websocket"));
        headers.insert(SEC_WEBSOCKET_PROTOCOL, HeaderValue::from_static(protocol));
        let accept = websocket::accept_key(key.as_bytes());
        if let Ok(accept) = HeaderValue::from_str(&accept) {
            headers.insert(SEC_WEBSOCKET_ACCEPT, accept);
        }
        return Ok((Wire::WebSocket, headers));
    }
    if asks("SPDY/3.1") {
        let ours = match target {
            Target::Exec { .. } | Target::Attach { .. } => spdy::PROCESS_PROTOCOLS,
            Target::PortForward { .. } => spdy::FORWARD_PROTOCOLS,
        };
        let protocol = choose(list(request, &STREAM_PROTOCOL), ours)?;
        headers.insert(UPGRADE, HeaderValue::from_static("SPDY/3.1"));
        headers.insert(STREAM_PROTOCOL, HeaderValue::from_static(protocol));
        return Ok((Wire::Spdy, headers));
    }
    Err((
        StatusCode::BAD_REQUEST,
        "the request asks for an unknown protocol: use WebSocket or SPDY/3.1".to_owned(),
    ))
}

/// The first protocol of the client's that is one of ours.
fn choose<'a>(
    theirs: impl Iterator<Item = &'a str>,
    ours: &'static [&'static str],
) -> Result<&'static str, (StatusCode, String)> {
    let theirs: Vec<&str> = theirs.collect();
    let common = theirs
        .iter()
        .find_map(|wanted| ours.iter().find(|our| *our == wanted));
    common.copied().ok_or_else(|| {
        (
            StatusCode::FORBIDDEN,
            format!(
                "unable to negotiate protocol: client supports [{}], server accepts [{}]",
                theirs.join(" "),
                ours.join(" ")
            ),
        )
    })
}
