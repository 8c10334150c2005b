//! The kubelet's HTTPS server: health, pods, logs, and the streams of exec, attach and port-forward.

use std::convert::Infallible;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::sync::Arc;

use anyhow::{Context, Result, ensure};
use bytes::Bytes;
use futures::StreamExt;
use http::{Method, Request, Response, StatusCode};
use http_body::Frame;
use http_body_util::combinators::UnsyncBoxBody;
use http_body_util::{BodyExt, Empty, Full, StreamBody};
use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper_util::rt::TokioIo;
use k8s_openapi::jiff::Timestamp;
use tokio::net::{TcpListener, TcpStream};
use tokio_util::sync::CancellationToken;
use tracing::{debug, warn};
use xebec_cri_api::v1;

use crate::config::Config;
use crate::logs::{Log, Wanted};
use crate::pods::Pods;
use crate::runtime::{PodState, Runtime};

type Body = UnsyncBoxBody<Bytes, std::io::Error>;

/// The only ones who may use more than `/healthz`.
const API_SERVER: &str = "kube-apiserver-kubelet-client";
const MASTERS: &str = "system:masters";

struct Server {
    runtime: Runtime,
    pods: Pods,
}

/// Serves until `shutdown`.
pub(crate) async fn run(
    config: Arc<Config>,
    runtime: Runtime,
    pods: Pods,
    shutdown: CancellationToken,
) -> Result<()> {
    // The kernel gives a socket of all addresses of IPv6 those of IPv4, too.
    let any = if config.node_ips.iter().any(IpAddr::is_ipv6) {
        IpAddr::from(std::net::Ipv6Addr::UNSPECIFIED)
    } else {
        IpAddr::from(Ipv4Addr::UNSPECIFIED)
    };
    let address = SocketAddr::new(any, config.port);
    let listener = TcpListener::bind(address)
        .await
        .with_context(|| format!("could not listen on {address} (is another kubelet running?)"))?;
    let tls = tokio_rustls::TlsAcceptor::from(config.tls.clone());
    let server = Arc::new(Server { runtime, pods });
    loop {
        let (stream, peer) = tokio::select! {
            () = shutdown.cancelled() => return Ok(()),
            accepted = listener.accept() => match accepted {
                Ok(accepted) => accepted,
                Err(error) => {
                    warn!(%error, "could not accept a connection");
                    tokio::time::sleep(std::time::Duration::from_millis(50)).await;
                    continue;
                }
            },
        };
        let (tls, server) = (tls.clone(), server.clone());
        tokio::spawn(async move {
            let _ = stream.set_nodelay(true);
            let stream =
                match tokio::time::timeout(std::time::Duration::from_secs(10), tls.accept(stream))
                    .await
                {
                    Ok(Ok(stream)) => stream,
                    _ => return debug!(%peer, "TLS handshake failed"),
                };
            let trusted = stream
                .get_ref()
                .1
                .peer_certificates()
                .and_then(|all| all.first())
                .is_some_and(|certificate| is_trusted(certificate));
            let service = service_fn(move |request: Request<Incoming>| {
                let server = server.clone();
                async move { Ok::<_, Infallible>(server.handle(request, trusted).await) }
            });
            let connection = hyper::server::conn::http1::Builder::new()
                .serve_connection(TokioIo::new(stream), service)
                .with_upgrades();
            if let Err(error) = connection.await {
                debug!(%peer, %error, "connection ended");
            }
        });
    }
}

/// Whether a verified client certificate is the API server's or an administrator's.
fn is_trusted(certificate: &[u8]) -> bool {
    let Ok((_, certificate)) = x509_parser::parse_x509_certificate(certificate) else {
        return false;
    };
    let subject = certificate.subject();
    let name = subject
        .iter_common_name()
        .next()
        .and_then(|name| name.as_str().ok());
    name == Some(API_SERVER)
        || subject
            .iter_organization()
            .any(|o| o.as_str() == Ok(MASTERS))
}

fn text(status: StatusCode, text: impl Into<String>) -> Response<Body> {
    let mut response = Response::new(
        Full::new(Bytes::from(text.into()))
            .map_err(|never| match never {})
            .boxed_unsync(),
    );
    *response.status_mut() = status;
    response
}

/// `key=value` pairs, unescaped.
fn query(request: &Request<Incoming>) -> Vec<(String, String)> {
    let unescape = |text: &str| {
        let (mut out, bytes, mut at) = (Vec::new(), text.as_bytes(), 0);
        while at < bytes.len() {
            let hex = bytes
                .get(at + 1..at + 3)
                .and_then(|hex| u8::from_str_radix(std::str::from_utf8(hex).ok()?, 16).ok());
            match (bytes[at], hex) {
                (b'%', Some(byte)) => {
                    out.push(byte);
                    at += 2;
                }
                (b'+', _) => out.push(b' '),
                (byte, _) => out.push(byte),
            }
            at += 1;
        }
        String::from_utf8_lossy(&out).into_owned()
    };
    let pairs = request
        .uri()
        .query()
        .unwrap_or_default()
        .split('&')
        .filter(|pair| !pair.is_empty());
    pairs
        .map(|pair| {
            pair.split_once('=')
                .map_or((unescape(pair), String::new()), |(k, v)| {
                    (unescape(k), unescape(v))
                })
        })
        .collect()
}

impl Server {
    async fn handle(&self, request: Request<Incoming>, trusted: bool) -> Response<Body> {
        let path = request.uri().path().to_owned();
        if path == "/healthz" {
            return text(StatusCode::OK, "ok");
        }
        if !trusted {
            return text(
                StatusCode::FORBIDDEN,
                "only the API server and administrators may ask this\n",
            );
        }
        let parts: Vec<&str> = path.split('/').filter(|part| !part.is_empty()).collect();
        let outcome = match (request.method(), parts.as_slice()) {
            (&Method::GET, ["pods"]) => self.pod_list(),
            (&Method::GET, ["metrics"]) => Ok(text(
                StatusCode::OK,
                format!(
                    "# TYPE kubelet_running_pods gauge\nkubelet_running_pods {}\n",
                    self.pods.list().len()
                ),
            )),
            (&Method::GET, ["containerLogs", namespace, name, container]) => {
                self.log(&request, namespace, name, container).await
            }
            (_, [kind @ ("exec" | "attach"), namespace, name, container]) => {
                let (kind, namespace, name, container) = (
                    (*kind).to_owned(),
                    (*namespace).to_owned(),
                    (*name).to_owned(),
                    (*container).to_owned(),
                );
                self.stream(request, &kind, &namespace, &name, Some(&container))
                    .await
            }
            (_, ["portForward", namespace, name]) => {
                let (namespace, name) = ((*namespace).to_owned(), (*name).to_owned());
                self.stream(request, "portForward", &namespace, &name, None)
                    .await
            }
            _ => Ok(text(StatusCode::NOT_FOUND, "404 page not found\n")),
        };
        outcome
            .unwrap_or_else(|error| text(StatusCode::INTERNAL_SERVER_ERROR, format!("{error:#}\n")))
    }

    fn pod_list(&self) -> Result<Response<Body>> {
        let list = serde_json::json!({"kind": "PodList", "apiVersion": "v1", "metadata": {}, "items": self.pods.list()});
        let mut response = text(StatusCode::OK, list.to_string());
        response.headers_mut().insert(
            http::header::CONTENT_TYPE,
            http::HeaderValue::from_static("application/json"),
        );
        Ok(response)
    }

    /// What the runtime has of a pod of this node.
    async fn state(&self, namespace: &str, name: &str) -> Result<PodState> {
        let pod = self
            .pods
            .find(namespace, name)
            .with_context(|| format!("pod {namespace}/{name} is not on this node"))?;
        let uid = pod.metadata.uid.as_deref().unwrap_or_default();
        self.runtime
            .pod(uid)
            .await
            .context("could not ask the container runtime")
    }

    /// The newest container of this name, or the one before it.
    async fn container(
        &self,
        namespace: &str,
        name: &str,
        container: &str,
        previous: bool,
    ) -> Result<v1::ContainerStatus> {
        let state = self.state(namespace, name).await?;
        if previous {
            let ended = state
                .latest(container)
                .filter(|c| c.state() == v1::ContainerState::ContainerExited);
            return state
                .previous(container)
                .or(ended)
                .cloned()
                .with_context(|| {
                    format!("previous terminated container {container:?} in pod {name:?} not found")
                });
        }
        state
            .latest(container)
            .cloned()
            .with_context(|| format!("container {container:?} in pod {name:?} is not available"))
    }

    async fn log(
        &self,
        request: &Request<Incoming>,
        namespace: &str,
        name: &str,
        container: &str,
    ) -> Result<Response<Body>> {
        let query = query(request);
        let get = |key: &str| {
            query
                .iter()
                .find(|(name, _)| name == key)
                .map(|(_, value)| value.as_str())
                .filter(|value| !value.is_empty())
        };
        let number = |key: &str| {
            get(key)
                .map(|text| {
                    text.parse::<usize>()
                        .with_context(|| format!("{key} is no number"))
                })
                .transpose()
        };
        let since = match (get("sinceTime"), number("sinceSeconds")?) {
            (Some(time), _) => Some(time.parse().context("sinceTime is no time")?),
            // What lies before the beginning of time leaves nothing out.
            (None, Some(seconds)) => Timestamp::now()
                .checked_sub(std::time::Duration::from_secs(seconds as u64))
                .ok(),
            (None, None) => None,
        };
        let wanted = Wanted {
            follow: get("follow") == Some("true"),
            timestamps: get("timestamps") == Some("true"),
            tail: number("tailLines")?,
            limit: number("limitBytes")?,
            since,
        };
        let status = self
            .container(namespace, name, container, get("previous") == Some("true"))
            .await?;
        let path = std::path::PathBuf::from(&status.log_path);
        let follow = wanted.follow;
        let log = Log::open(path, wanted).await?;
        let (sender, receiver) = tokio::sync::mpsc::channel(4);
        let (over, ended) =
            tokio::sync::watch::channel(status.state() == v1::ContainerState::ContainerExited);
        if follow && !*ended.borrow() {
            tokio::spawn(self.runtime.clone().tell_end(status.id.clone(), over));
        }
        tokio::spawn(async move {
            if let Err(error) = log.send(sender, ended).await {
                warn!(error = format!("{error:#}"), "could not send a log");
            }
        });
        let frames = futures::stream::unfold(receiver, |mut receiver| async move {
            receiver.recv().await.map(|bytes| (bytes, receiver))
        });
        let mut response = Response::new(
            StreamBody::new(frames.map(|bytes| Ok(Frame::data(bytes)))).boxed_unsync(),
        );
        response.headers_mut().insert(
            http::header::CONTENT_TYPE,
            http::HeaderValue::from_static("text/plain"),
        );
        Ok(response)
    }

    /// Asks the runtime for a stream's URL, and joins the client with it.
    async fn stream(
        &self,
        mut request: Request<Incoming>,
        kind: &str,
        namespace: &str,
        name: &str,
        container: Option<&str>,
    ) -> Result<Response<Body>> {
        let query = query(&request);
        let flag = |key: &str| {
            query
                .iter()
                .any(|(name, value)| name == key && value == "1")
        };
        let url = if let Some(container) = container {
            let status = self.container(namespace, name, container, false).await?;
            ensure!(
                status.state() == v1::ContainerState::ContainerRunning,
                "container not found ({container:?})"
            );
            let id = status.id;
            let command = query
                .iter()
                .filter(|(name, _)| name == "command")
                .map(|(_, value)| value.clone())
                .collect();
            let (stdin, stdout, tty) = (flag("input"), flag("output"), flag("tty"));
            // A terminal has one output; who asks for two gets that one.
            let stderr = flag("error") && !tty;
            if !(stdin || stdout || stderr) {
                return Ok(text(
                    StatusCode::BAD_REQUEST,
                    "you must specify at least 1 of stdin, stdout, stderr\n",
                ));
            }
            if kind == "exec" {
                self.runtime
                    .exec_url(v1::ExecRequest {
                        container_id: id,
                        cmd: command,
                        tty,
                        stdin,
                        stdout,
                        stderr,
                    })
                    .await?
            } else {
                self.runtime
                    .attach_url(v1::AttachRequest {
                        container_id: id,
                        stdin,
                        tty,
                        stdout,
                        stderr,
                    })
                    .await?
            }
        } else {
            let state = self.state(namespace, name).await?;
            let sandbox = state
                .ready_sandbox()
                .context("the pod has no running sandbox")?;
            self.runtime
                .port_forward_url(v1::PortForwardRequest {
                    pod_sandbox_id: sandbox.id.clone(),
                    port: vec![],
                })
                .await?
        };
        let url: http::Uri = url
            .parse()
            .context("the runtime's stream has no usable URL")?;
        let authority = url
            .authority()
            .context("the runtime's stream has no address")?
            .to_string();
        let stream = TcpStream::connect(&authority)
            .await
            .with_context(|| format!("could not connect to the runtime's stream at {authority}"))?;
        let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream))
            .await
            .context("the runtime's stream speaks no HTTP")?;
        tokio::spawn(connection.with_upgrades());
        let mut onward = Request::builder()
            .method(request.method().clone())
            .uri(url.path_and_query().map_or("/", |path| path.as_str()));
        if let Some(headers) = onward.headers_mut() {
            headers.extend(
                request
                    .headers()
                    .iter()
                    .map(|(name, value)| (name.clone(), value.clone())),
            );
            if let Ok(host) = http::HeaderValue::from_str(&authority) {
                headers.insert(http::header::HOST, host);
            }
        }
        let onward = onward
            .body(Empty::<Bytes>::new())
            .context("could not build the request")?;
        let mut response = sender
            .send_request(onward)
            .await
            .context("the runtime's stream did not answer")?;
        if response.status() != StatusCode::SWITCHING_PROTOCOLS {
            let (parts, body) = response.into_parts();
            return Ok(Response::from_parts(
                parts,
                body.map_err(std::io::Error::other).boxed_unsync(),
            ));
        }
        let client = hyper::upgrade::on(&mut request);
        let backend = hyper::upgrade::on(&mut response);
        tokio::spawn(async move {
            let (Ok(client), Ok(backend)) = tokio::join!(client, backend) else {
                return;
            };
            // Either end may close at any time; that is how a stream ends.
            let _ = tokio::io::copy_bidirectional(
                &mut TokioIo::new(client),
                &mut TokioIo::new(backend),
            )
            .await;
        });
        let (parts, _) = response.into_parts();
        Ok(Response::from_parts(
            parts,
            Empty::new().map_err(|never| match never {}).boxed_unsync(),
        ))
    }
}
