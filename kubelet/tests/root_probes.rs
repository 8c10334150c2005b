//! Probes and hooks over the network: HTTPS, gRPC, redirects, and what is said of those that fail.
#![allow(clippy::unwrap_used, reason = "a test may panic")]

mod harness;

use std::convert::Infallible;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicU16, Ordering};
use std::sync::{Arc, Mutex};

use http::{Request, Response};
use http_body_util::Empty;
use hyper::body::{Bytes, Incoming};
use hyper::service::service_fn;
use hyper_util::rt::TokioIo;
use serde_json::{Value, json};
use tokio::net::TcpListener;
use tonic_health::ServingStatus;

use harness::{Node, container, is_running, not_root, shell};

/// A server with a certificate that nobody knows. `/ready` answers as it is set, `/moved` leads there.
struct Server {
    port: u16,
    ready: Arc<AtomicU16>,
    /// Path, Host and User-Agent of each request.
    heard: Arc<Mutex<Vec<[String; 3]>>>,
}

impl Server {
    async fn start(tls: bool) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let server = Self {
            port: listener.local_addr().unwrap().port(),
            ready: Arc::new(AtomicU16::new(503)),
            heard: Arc::default(),
        };
        let (ready, heard) = (server.ready.clone(), server.heard.clone());
        let acceptor = tls.then(|| tokio_rustls::TlsAcceptor::from(Arc::new(harness::tls())));
        tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                let (ready, heard, acceptor) = (ready.clone(), heard.clone(), acceptor.clone());
                tokio::spawn(async move {
                    let service =
                        service_fn(|request| std::future::ready(answer(&request, &ready, &heard)));
                    let http = hyper::server::conn::http1::Builder::new();
                    match acceptor {
                        Some(acceptor) => {
                            let Ok(stream) = acceptor.accept(stream).await else {
                                return;
                            };
                            let _ = http.serve_connection(TokioIo::new(stream), service).await;
                        }
                        None => {
                            let _ = http.serve_connection(TokioIo::new(stream), service).await;
                        }
                    }
                });
            }
        });
        server
    }

    fn set(&self, status: u16) {
        self.ready.store(status, Ordering::Relaxed);
    }

    fn paths(&self) -> Vec<String> {
        let heard = self.heard.lock().unwrap();
        heard.iter().map(|[path, ..]| path.clone()).collect()
    }
}

fn answer(
    request: &Request<Incoming>,
    ready: &AtomicU16,
    heard: &Mutex<Vec<[String; 3]>>,
) -> Result<Response<Empty<Bytes>>, Infallible> {
    let header = |name: &str| {
        let value = request.headers().get(name);
        value
            .map(|v| v.to_str().unwrap().to_owned())
            .unwrap_or_default()
    };
    let path = request.uri().path().to_owned();
    let mut response = Response::builder();
    response = match path.as_str() {
        "/ready" => response.status(ready.load(Ordering::Relaxed)),
        "/moved" => response.status(302).header("location", "/ready"),
        _ => response.status(404),
    };
    let entry = [path, header("host"), header("user-agent")];
    heard.lock().unwrap().push(entry);
    Ok(response.body(Empty::new()).unwrap())
}

fn runs_with(more: Value) -> Value {
    let mut container = shell("trap 'exit 0' TERM; while true; do sleep 0.1; done");
    for (key, value) in more.as_object().unwrap() {
        container[key] = value.clone();
    }
    container
}

fn often(mut probe: Value) -> Value {
    probe["periodSeconds"] = json!(1);
    probe["failureThreshold"] = json!(1);
    probe
}

async fn until_ready(node: &Node, name: &str, ready: bool) {
    node.until(name, &format!("ready={ready}"), |pod| {
        is_running(pod) && container(pod).ready == ready
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn https_probes_take_any_certificate_and_follow_redirects() {
    if not_root() {
        return;
    }
    let node = Node::start(21061).await;
    let server = Server::start(true).await;
    let get = json!({"path": "/moved", "port": server.port, "scheme": "HTTPS", "httpHeaders": [{"name": "Host", "value": "me.example"}]});
    let readiness = often(json!({"httpGet": get}));
    node.pod(
        "tls",
        runs_with(json!({"readinessProbe": readiness})),
        json!({}),
    )
    .await;
    // One that speaks HTTP to it is not understood.
    let plain = often(json!({"httpGet": {"path": "/ready", "port": server.port}}));
    node.pod(
        "plain",
        runs_with(json!({"readinessProbe": plain})),
        json!({}),
    )
    .await;
    let alive = often(
        json!({"httpGet": {"path": "/ready", "port": server.port, "scheme": "HTTPS"}, "initialDelaySeconds": 1}),
    );
    let alive = runs_with(json!({"livenessProbe": alive}));
    node.pod("alive", alive, json!({})).await;

    until_ready(&node, "tls", false).await;
    let says = "Unhealthy: Readiness probe failed: HTTP probe failed with statuscode: 503";
    node.until_said("tls", |said| said == says).await;
    node.until("alive", "started again", |pod| {
        container(pod).restart_count > 0
    })
    .await;
    server.set(200);
    until_ready(&node, "tls", true).await;
    let heard = server.heard.lock().unwrap().clone();
    let seen = |path: &str, host: &str| {
        let wanted = [path.to_owned(), host.to_owned(), "kube-probe/1.36".into()];
        assert!(heard.contains(&wanted), "{wanted:?} is not in {heard:?}");
    };
    seen("/moved", "me.example");
    seen("/ready", "me.example");
    seen("/ready", &format!("127.0.0.1:{}", server.port));
    server.set(500);
    until_ready(&node, "tls", false).await;
    until_ready(&node, "plain", false).await;
    node.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn grpc_probes_ask_the_health_service() {
    if not_root() {
        return;
    }
    let node = Node::start(21062).await;
    let (reporter, service) = tonic_health::server::health_reporter();
    reporter
        .set_service_status("app", ServingStatus::NotServing)
        .await;
    let port = free_port();
    let address = SocketAddr::from(([127, 0, 0, 1], port));
    tokio::spawn(
        tonic::transport::Server::builder()
            .add_service(service)
            .serve(address),
    );
    let closed = free_port();
    for (name, port, service) in [
        ("app", port, "app"),
        ("server", port, ""),
        ("unknown", port, "other"),
        ("closed", closed, "app"),
    ] {
        let probe = often(json!({"grpc": {"port": port, "service": service}}));
        let container = runs_with(json!({"readinessProbe": probe}));
        node.pod(name, container, json!({})).await;
    }
    until_ready(&node, "server", true).await;
    let says =
        "Unhealthy: Readiness probe failed: service unhealthy (responded with \"NOT_SERVING\")";
    node.until_said("app", |said| said == says).await;
    until_ready(&node, "app", false).await;
    reporter
        .set_service_status("app", ServingStatus::Serving)
        .await;
    until_ready(&node, "app", true).await;
    for (name, part) in [
        (
            "unknown",
            "error: health rpc probe failed: rpc error: code = NotFound".to_owned(),
        ),
        (
            "closed",
            format!("error: failed to connect service at \"127.0.0.1:{closed}\": "),
        ),
    ] {
        until_ready(&node, name, false).await;
        let said = node.events(name).await;
        let start = format!("Unhealthy: Readiness probe failed: {part}");
        assert!(
            said.iter().any(|said| said.starts_with(&start)),
            "{said:#?}"
        );
    }
    node.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn hooks_are_told_over_http() {
    if not_root() {
        return;
    }
    let node = Node::start(21063).await;
    let (plain, tls) = (Server::start(false).await, Server::start(true).await);
    // The answer is 404, and does not matter.
    let hooks = json!({
        "postStart": {"httpGet": {"path": "/started", "port": plain.port}},
        "preStop": {"httpGet": {"path": "/ends", "port": tls.port, "scheme": "HTTPS"}},
    });
    node.pod("hooked", runs_with(json!({"lifecycle": hooks})), json!({}))
        .await;
    until_ready(&node, "hooked", true).await;
    node.delete("hooked", Some(5)).await;
    node.until_gone("hooked").await;
    assert_eq!(plain.paths(), ["/started"]);
    assert_eq!(tls.paths(), ["/ends"]);

    // One that nobody hears ends its container.
    let hook = json!({"postStart": {"httpGet": {"path": "/", "port": free_port()}}});
    node.pod("unheard", runs_with(json!({"lifecycle": hook})), json!({}))
        .await;
    node.until("unheard", "started again", |pod| {
        container(pod).restart_count > 0
    })
    .await;
    let said = node.events("unheard").await;
    let failed = |said: &&String| said.starts_with("FailedPostStartHook: PostStartHook failed");
    assert!(said.iter().any(|said| failed(&said)), "{said:#?}");
    node.end().await;
}

/// A port on which nobody listens.
fn free_port() -> u16 {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    listener.local_addr().unwrap().port()
}
