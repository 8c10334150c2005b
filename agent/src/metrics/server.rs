//! The HTTP servers of metrics and of health.

use std::convert::Infallible;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Result;
use bytes::Bytes;
use http::header::{ACCEPT, CONTENT_TYPE, X_CONTENT_TYPE_OPTIONS};
use http::{HeaderValue, Method, Request, Response, StatusCode};
use http_body_util::Full;
use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::net::TcpListener;
use tokio::sync::Semaphore;
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

use super::{Health, Metrics};

/// How long until a port that another process has is tried again.
const AGAIN: Duration = Duration::from_secs(5);
/// How long a client may take for its request.
const PATIENCE: Duration = Duration::from_secs(10);
/// How many clients are served at once: anybody who reaches the port may be one.
const CLIENTS: usize = 64;

/// OpenMetrics' text form.
const OPENMETRICS: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";
/// The text form before it.
const CLASSIC: &str = "text/plain; version=0.0.4; charset=utf-8";

/// What a server answers with.
#[derive(Clone)]
pub(super) enum Pages {
    /// Those of kube-proxy's metrics port.
    Metrics(Arc<Metrics>),
    /// Those of its health port.
    Health(Health),
}

/// Serves until `shutdown`; nowhere without an address.
pub(super) async fn run(
    address: Option<SocketAddr>,
    what: &'static str,
    pages: Pages,
    shutdown: CancellationToken,
) -> Result<()> {
    let Some(address) = address else {
        return Ok(());
    };
    let Some(listener) = listen(address, what, &shutdown).await else {
        return Ok(());
    };
    info!(%address, "{what} served");
    serve(listener, pages, shutdown).await;
    Ok(())
}

/// Waits for the port; none when the agent ends before.
async fn listen(
    address: SocketAddr,
    what: &str,
    shutdown: &CancellationToken,
) -> Option<TcpListener> {
    let mut told = false;
    loop {
        match TcpListener::bind(address).await {
            Ok(listener) => return Some(listener),
            Err(error) if !told => {
                warn!(%address, %error, "{what} can't be served (does kube-proxy run still?); trying again until they can");
                told = true;
            }
            Err(_) => {}
        }
        tokio::select! {
            () = shutdown.cancelled() => return None,
            () = tokio::time::sleep(AGAIN) => {}
        }
    }
}

async fn serve(listener: TcpListener, pages: Pages, shutdown: CancellationToken) {
    let places = Arc::new(Semaphore::new(CLIENTS));
    loop {
        let Ok(place) = places.clone().acquire_owned().await else {
            return;
        };
        let stream = tokio::select! {
            () = shutdown.cancelled() => return,
            accepted = listener.accept() => match accepted {
                Ok((stream, _)) => stream,
                // No descriptor is left, or the client went away at once.
                Err(_) => {
                    tokio::time::sleep(Duration::from_millis(50)).await;
                    continue;
                }
            },
        };
        let (pages, shutdown) = (pages.clone(), shutdown.clone());
        tokio::spawn(async move {
            let service = service_fn(move |request| {
                let pages = pages.clone();
                async move { Ok::<_, Infallible>(answer(&request, &pages).await) }
            });
            let connection = hyper::server::conn::http1::Builder::new()
                .timer(TokioTimer::new())
                .header_read_timeout(PATIENCE)
                .serve_connection(TokioIo::new(stream), service);
            // A client that goes away is no fault.
            tokio::select! {
                _ = connection => {}
                () = shutdown.cancelled() => {}
            }
            drop(place);
        });
    }
}

fn reply(status: StatusCode, kind: &'static str, body: String) -> Response<Full<Bytes>> {
    let mut response = Response::new(Full::new(Bytes::from(body)));
    *response.status_mut() = status;
    let headers = response.headers_mut();
    headers.insert(CONTENT_TYPE, HeaderValue::from_static(kind));
    headers.insert(X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff"));
    response
}

fn plain(status: StatusCode, text: &str) -> Response<Full<Bytes>> {
    reply(status, "text/plain; charset=utf-8", text.to_owned())
}

async fn answer(request: &Request<Incoming>, pages: &Pages) -> Response<Full<Bytes>> {
    if !matches!(*request.method(), Method::GET | Method::HEAD) {
        return plain(StatusCode::METHOD_NOT_ALLOWED, "only GET is served here\n");
    }
    let healthy = |(healthy, value): (bool, serde_json::Value)| {
        let status = if healthy {
            StatusCode::OK
        } else {
            StatusCode::SERVICE_UNAVAILABLE
        };
        reply(status, "application/json", value.to_string())
    };
    match (pages, request.uri().path()) {
        (Pages::Metrics(metrics), "/metrics") => {
            let accepts = request.headers().get(ACCEPT);
            let modern = accepts
                .and_then(|accepts| accepts.to_str().ok())
                .is_some_and(|accepts| accepts.contains("application/openmetrics-text"));
            match metrics.text().await {
                Ok(text) if modern => reply(StatusCode::OK, OPENMETRICS, text),
                Ok(text) => reply(StatusCode::OK, CLASSIC, classic(&text)),
                Err(error) => plain(StatusCode::INTERNAL_SERVER_ERROR, &format!("{error:#}\n")),
            }
        }
        (Pages::Metrics(_), "/proxyMode") => plain(StatusCode::OK, "xebec"),
        (Pages::Metrics(_), "/healthz") => plain(StatusCode::OK, "ok"),
        (Pages::Health(health), "/healthz") => healthy(health.healthz()),
        (Pages::Health(health), "/livez") => healthy(health.livez()),
        _ => plain(StatusCode::NOT_FOUND, "404 page not found\n"),
    }
}

/// OpenMetrics' text as the form before it wants it: families are named as their samples are, and nothing tells the end.
fn classic(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    let lines: Vec<&str> = text.lines().collect();
    let kind_of = |name: &str| {
        lines.iter().find_map(|line| {
            let (told, kind) = line.strip_prefix("# TYPE ")?.split_once(' ')?;
            (told == name).then_some(kind)
        })
    };
    for line in &lines {
        let mut words = line.splitn(4, ' ');
        match (words.next(), words.next(), words.next(), words.next()) {
            (Some("#"), Some("EOF" | "UNIT"), ..) => {}
            (Some("#"), Some(what @ ("HELP" | "TYPE")), Some(name), Some(rest)) => {
                let (suffix, kind) = match kind_of(name) {
                    Some("counter") => ("_total", "counter"),
                    Some("info") => ("_info", "gauge"),
                    Some(kind) => ("", kind),
                    None => ("", rest),
                };
                let rest = if what == "TYPE" { kind } else { rest };
                out.push_str(&format!("# {what} {name}{suffix} {rest}\n"));
            }
            _ => {
                out.push_str(line);
                out.push('\n');
            }
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use prometheus_client::metrics::counter::Counter;
    use prometheus_client::metrics::info::Info;
    use prometheus_client::registry::Registry;
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    use super::*;

    #[test]
    fn both_text_forms_name_the_same_samples() {
        let mut registry = Registry::default();
        let counter = Counter::<u64>::default();
        counter.inc_by(3);
        registry.register("xebec_things", "Things", counter);
        registry.register("xebec_build", "Version", Info::new([("version", "1")]));
        let text = super::super::encode(&registry).unwrap();
        assert!(text.contains("# TYPE xebec_things counter\n") && text.ends_with("# EOF\n"));
        assert_eq!(
            classic(&text),
            "# HELP xebec_things_total Things.\n# TYPE xebec_things_total counter\nxebec_things_total 3\n\
             # HELP xebec_build_info Version.\n# TYPE xebec_build_info gauge\nxebec_build_info{version=\"1\"} 1\n"
        );
    }

    async fn get(address: SocketAddr, path: &str) -> String {
        let mut stream = tokio::net::TcpStream::connect(address).await.unwrap();
        let request = format!("GET {path} HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n");
        stream.write_all(request.as_bytes()).await.unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await.unwrap();
        answer
    }

    #[tokio::test]
    async fn health_is_served_and_a_taken_port_is_waited_for() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let (health, shutdown) = (Health::default(), CancellationToken::new());
        // The port is taken: the server ends with the agent, without an error.
        let waiting = tokio::spawn(run(
            Some(address),
            "health",
            Pages::Health(health.clone()),
            shutdown.child_token(),
        ));
        let server = tokio::spawn(serve(
            listener,
            Pages::Health(health.clone()),
            shutdown.clone(),
        ));
        assert!(get(address, "/healthz").await.starts_with("HTTP/1.1 503"));
        health.updated();
        let answer = get(address, "/healthz").await;
        assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
        assert!(answer.contains("\"nodeEligible\":true"), "{answer}");
        health.set_eligible(false);
        assert!(get(address, "/healthz").await.starts_with("HTTP/1.1 503"));
        assert!(get(address, "/livez").await.starts_with("HTTP/1.1 200"));
        assert!(get(address, "/metrics").await.starts_with("HTTP/1.1 404"));
        assert!(!waiting.is_finished());
        shutdown.cancel();
        waiting.await.unwrap().unwrap();
        server.await.unwrap();
    }
}
