//! `pods/log|exec|attach|portforward`: passed on to the pod's kubelet, upgrades included.

use std::net::SocketAddr;
use std::sync::Arc;

use bytes::Bytes;
use http::{Request, Response, StatusCode};
use http_body_util::{BodyExt, Empty};
use hyper::upgrade::OnUpgrade;
use hyper_util::rt::TokioIo;
use tokio::net::TcpStream;
use xebec_schema::Object;
use xebec_schema::table;

use crate::error::ApiError;
use crate::handler::{Answer, Call, Handler, full};
use crate::server::BoxError;

/// Headers of one connection that are not passed on, but for the upgrade itself.
const HOP_BY_HOP: &[&str] = &[
    "host",
    "authorization",
    "keep-alive",
    "te",
    "trailer",
    "transfer-encoding",
    "content-length",
];

impl Handler {
    pub(crate) async fn pod_stream(&self, sub: &str, mut call: Call) -> Answer {
        let name = call.request.name.clone().unwrap_or_default();
        let namespace = call.request.namespace.clone().unwrap_or_default();
        let pod = self
            .registry
            .get(call.request.resource, Some(&namespace), &name)
            .await?;
        let node_name = pod["spec"]["nodeName"].as_str().unwrap_or_default();
        if node_name.is_empty() {
            return Err(ApiError::bad_request(format!(
                "pod {name} does not have a host assigned"
            )));
        }
        let path = kubelet_path(sub, &call, &namespace, &name, &pod)?;
        let node = self.node_address(node_name).await?;
        let mut request = Request::builder().method(call.method.clone()).uri(path);
        if let Some(headers) = request.headers_mut() {
            headers.extend(
                call.headers
                    .iter()
                    .filter(|(name, _)| !HOP_BY_HOP.contains(&name.as_str()))
                    .map(|(n, v)| (n.clone(), v.clone())),
            );
            if let Ok(host) = http::HeaderValue::from_str(&node.to_string()) {
                headers.insert(http::header::HOST, host);
            }
        }
        let request = request
            .body(Empty::<Bytes>::new())
            .map_err(|error| ApiError::bad_request(error.to_string()))?;
        let unreachable = |error: String| {
            ApiError::internal(format!(
                "error dialing backend: node {node_name} at {node}: {error}"
            ))
        };
        let mut response = self.ask_kubelet(node, request).await.map_err(unreachable)?;
        if response.status() != StatusCode::SWITCHING_PROTOCOLS {
            let (parts, body) = response.into_parts();
            return Ok(Response::from_parts(
                parts,
                body.map_err(|error| Box::new(error) as BoxError)
                    .boxed_unsync(),
            ));
        }
        let Some(client) = call.extensions.remove::<OnUpgrade>() else {
            return Err(ApiError::bad_request("this connection can't be upgraded"));
        };
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
        Ok(Response::from_parts(parts, full(Bytes::new())))
    }

    async fn node_address(&self, name: &str) -> Result<SocketAddr, ApiError> {
        let Some(nodes) = table::resource("", "v1", "nodes") else {
            return Err(ApiError::no_resource());
        };
        let node = self.registry.get(nodes, None, name).await?;
        let port = node["status"]["daemonEndpoints"]["kubeletEndpoint"]["Port"]
            .as_u64()
            .unwrap_or(10250) as u16;
        let addresses = node["status"]["addresses"].as_array().into_iter().flatten();
        let address = addresses
            .filter(|a| a["type"] == "InternalIP")
            .find_map(|a| a["address"].as_str()?.parse().ok());
        let address =
            address.ok_or_else(|| ApiError::internal(format!("node {name} has no InternalIP")))?;
        Ok(SocketAddr::new(address, port))
    }

    async fn ask_kubelet(
        &self,
        node: SocketAddr,
        request: Request<Empty<Bytes>>,
    ) -> Result<Response<hyper::body::Incoming>, String> {
        let text = |error: &dyn std::error::Error| error.to_string();
        let connecting =
            tokio::time::timeout(std::time::Duration::from_secs(10), TcpStream::connect(node))
                .await;
        let stream = connecting
            .map_err(|_| "no answer within 10 s".to_owned())?
            .map_err(|error| text(&error))?;
        stream.set_nodelay(true).map_err(|error| text(&error))?;
        let connector =
            tokio_rustls::TlsConnector::from(Arc::clone(&self.config.kubelet_client_tls));
        let name = rustls_pki_types::ServerName::from(node.ip());
        let stream = connector
            .connect(name, stream)
            .await
            .map_err(|error| text(&error))?;
        let handshake = hyper::client::conn::http1::handshake(TokioIo::new(stream)).await;
        let (mut sender, connection) = handshake.map_err(|error| text(&error))?;
        tokio::spawn(connection.with_upgrades());
        sender
            .send_request(request)
            .await
            .map_err(|error| text(&error))
    }
}

/// The kubelet's path for a stream, with the container filled in.
fn kubelet_path(
    sub: &str,
    call: &Call,
    namespace: &str,
    name: &str,
    pod: &Object,
) -> Result<String, ApiError> {
    if sub == "portforward" {
        return Ok(format!("/portForward/{namespace}/{name}"));
    }
    let names = |list: &str| -> Vec<String> {
        pod["spec"][list]
            .as_array()
            .into_iter()
            .flatten()
            .filter_map(|c| c["name"].as_str().map(str::to_owned))
            .collect()
    };
    let all = names("containers");
    let container = match call.query.get("container") {
        Some(asked)
            if [
                all.clone(),
                names("initContainers"),
                names("ephemeralContainers"),
            ]
            .concat()
            .iter()
            .any(|one| one == asked) =>
        {
            asked.to_owned()
        }
        Some(asked) => {
            return Err(ApiError::bad_request(format!(
                "container {asked} is not valid for pod {name}"
            )));
        }
        None => match all.as_slice() {
            [only] => only.clone(),
            several => {
                return Err(ApiError::bad_request(format!(
                    "a container name must be specified for pod {name}, choose one of: [{}]",
                    several.join(" ")
                )));
            }
        },
    };
    let mut query: Vec<String> = Vec::new();
    let mut add = |key: &str, value: &str| query.push(format!("{key}={}", escape(value)));
    if sub == "log" {
        for key in [
            "follow",
            "previous",
            "sinceSeconds",
            "sinceTime",
            "timestamps",
            "tailLines",
            "limitBytes",
            "stream",
        ] {
            if let Some(value) = call.query.get(key) {
                add(key, value);
            }
        }
        let waiting = |list: &str| {
            pod["status"][list]
                .as_array()
                .into_iter()
                .flatten()
                .find(|one| one["name"] == container.as_str())
                .and_then(|one| {
                    one["state"]["waiting"]["reason"]
                        .as_str()
                        .map(str::to_owned)
                })
        };
        if let Some(reason) = waiting("containerStatuses").filter(|reason| {
            matches!(
                reason.as_str(),
                "ContainerCreating" | "PodInitializing" | "ErrImagePull" | "ImagePullBackOff"
            )
        }) {
            return Err(ApiError::bad_request(format!(
                "container {container:?} in pod {name:?} is waiting to start: {reason}"
            )));
        }
        return Ok(format!(
            "/containerLogs/{namespace}/{name}/{container}?{}",
            query.join("&")
        ));
    }
    for (key, kubelet) in [
        ("stdin", "input"),
        ("stdout", "output"),
        ("stderr", "error"),
        ("tty", "tty"),
    ] {
        if call
            .query
            .get(key)
            .is_some_and(|value| matches!(value, "true" | "1"))
        {
            add(kubelet, "1");
        }
    }
    for command in call.query.all("command") {
        add("command", command);
    }
    Ok(format!(
        "/{sub}/{namespace}/{name}/{container}?{}",
        query.join("&")
    ))
}

fn escape(text: &str) -> String {
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"-._~".contains(&byte);
    text.bytes()
        .map(|byte| {
            if plain(byte) {
                (byte as char).to_string()
            } else {
                format!("%{byte:02X}")
            }
        })
        .collect()
}
