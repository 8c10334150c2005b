//! Logs, exec, attach and port-forward: passed on to the pod's kubelet, upgraded connections included.

use std::net::IpAddr;

use http::{HeaderValue, Request, Response, StatusCode, Uri, header};
use http_body_util::BodyExt;
use hyper_util::rt::TokioIo;
use rustls_pki_types::ServerName;
use serde_json::Value;
use tokio::net::TcpStream;
use tracing::debug;
use xebec_schema::table;

use crate::error::ApiError;
use crate::handler::{Answer, Handler};
use crate::request::{Query, ResourceRequest};
use crate::server::{BoxError, RequestBody};

/// Where a kubelet listens unless its Node says otherwise.
const KUBELET_PORT: u16 = 10250;

/// A text as a query value.
fn escape(text: &str) -> String {
    text.bytes()
        .map(|byte| match byte {
            b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'-' | b'_' | b'.' | b'~' => {
                char::from(byte).to_string()
            }
            other => format!("%{other:02X}"),
        })
        .collect()
}

/// The container meant: as asked, or the default one.
fn container<'a>(pod: &'a Value, query: &'a Query, name: &str) -> Result<&'a str, ApiError> {
    let spec = &pod["spec"];
    let names = |list: &str| {
        spec[list]
            .as_array()
            .map(Vec::as_slice)
            .unwrap_or_default()
            .iter()
            .filter_map(|one| one["name"].as_str())
    };
    let all = || {
        names("containers")
            .chain(names("initContainers"))
            .chain(names("ephemeralContainers"))
    };
    if let Some(asked) = query.get("container") {
        return if all().any(|one| one == asked) {
            Ok(asked)
        } else {
            Err(ApiError::bad_request(format!(
                "container {asked} is not valid for pod {name}"
            )))
        };
    }
    let marked = pod["metadata"]["annotations"]["kubectl.kubernetes.io/default-container"].as_str();
    let mut containers = names("containers");
    match (
        marked.filter(|marked| names("containers").any(|one| one == *marked)),
        containers.next(),
        containers.next(),
    ) {
        (Some(marked), _, _) => Ok(marked),
        (None, Some(only), None) => Ok(only),
        _ => {
            let list: Vec<&str> = names("containers").collect();
            Err(ApiError::bad_request(format!(
                "a container name must be specified for pod {name}, choose one of: [{}]",
                list.join(" ")
            )))
        }
    }
}

impl Handler {
    /// Passes a streaming request on to the kubelet of the pod's node.
    pub(crate) async fn stream(
        &self,
        about: &ResourceRequest,
        query: &Query,
        request: Request<RequestBody>,
    ) -> Answer {
        let sub = about.subresource.as_deref().unwrap_or_default();
        let known = about
            .resource
            .subresource(sub)
            .is_some_and(|one| one.verbs.contains(&about.verb));
        if !known || about.resource.plural != "pods" || sub == "proxy" {
            return Err(ApiError::method_not_allowed());
        }
        let (name, namespace) = (
            about.name.as_deref().unwrap_or_default(),
            about.namespace.as_deref().unwrap_or_default(),
        );
        let pod = self
            .registry
            .get(about.resource, Some(namespace), name)
            .await?;
        let Some(node) = pod["spec"]["nodeName"]
            .as_str()
            .filter(|node| !node.is_empty())
        else {
            return Err(ApiError::bad_request(format!(
                "pod {name} does not have a host assigned"
            )));
        };
        let path = match sub {
            "portforward" => format!("/portForward/{namespace}/{name}"),
            "log" => format!(
                "/containerLogs/{namespace}/{name}/{}",
                container(&pod, query, name)?
            ),
            other => format!(
                "/{other}/{namespace}/{name}/{}",
                container(&pod, query, name)?
            ),
        };
        let parameters = match sub {
            "log" => [
                "follow",
                "previous",
                "timestamps",
                "sinceSeconds",
                "sinceTime",
                "tailLines",
                "limitBytes",
                "stream",
            ]
            .iter()
            .filter_map(|key| Some(format!("{key}={}", escape(query.get(key)?))))
            .collect(),
            "portforward" => query
                .all("ports")
                .map(|port| format!("port={}", escape(port)))
                .collect(),
            _ => {
                let streams = [
                    ("stdin", "input"),
                    ("stdout", "output"),
                    ("stderr", "error"),
                    ("tty", "tty"),
                ];
                let wanted = streams
                    .iter()
                    .filter(|(ours, _)| query.get(ours).is_some_and(|on| on == "true" || on == "1"))
                    .map(|(_, theirs)| format!("{theirs}=1"));
                wanted
                    .chain(
                        query
                            .all("command")
                            .map(|word| format!("command={}", escape(word))),
                    )
                    .collect::<Vec<_>>()
            }
        };
        let path = format!("{path}?{}", parameters.join("&"));
        let (address, port) = self.kubelet_address(node).await?;
        let failed = |error: &dyn std::fmt::Display| {
            ApiError::internal(format!(
                "error dialing backend: the kubelet of node {node} at {address}:{port} can't be reached: {error}"
            ))
        };
        let tcp = TcpStream::connect((address, port))
            .await
            .map_err(|error| failed(&error))?;
        let connector = tokio_rustls::TlsConnector::from(self.config.kubelet_client_tls.clone());
        let tls = connector
            .connect(ServerName::IpAddress(address.into()), tcp)
            .await
            .map_err(|error| failed(&error))?;
        let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(tls))
            .await
            .map_err(|error| failed(&error))?;
        tokio::spawn(async move {
            if let Err(error) = connection.with_upgrades().await {
                debug!(%error, "connection to a kubelet ended");
            }
        });
        forward(&mut sender, request, &path, &format!("{address}:{port}"))
            .await
            .map_err(|error| failed(&error))
    }

    async fn kubelet_address(&self, name: &str) -> Result<(IpAddr, u16), ApiError> {
        let nodes = table::resource("", "v1", "nodes").ok_or_else(ApiError::no_resource)?;
        let node = self.registry.get(nodes, None, name).await?;
        let addresses = node["status"]["addresses"]
            .as_array()
            .map(Vec::as_slice)
            .unwrap_or_default();
        let internal = addresses
            .iter()
            .find(|one| one["type"] == "InternalIP")
            .and_then(|one| one["address"].as_str()?.parse().ok());
        let port = node["status"]["daemonEndpoints"]["kubeletEndpoint"]["Port"]
            .as_u64()
            .and_then(|port| u16::try_from(port).ok());
        let address = internal.ok_or_else(|| {
            ApiError::internal(format!(
                "node {name} has no InternalIP yet: its kubelet can't be reached"
            ))
        })?;
        Ok((address, port.unwrap_or(KUBELET_PORT)))
    }
}

async fn forward(
    sender: &mut hyper::client::conn::http1::SendRequest<RequestBody>,
    mut request: Request<RequestBody>,
    path: &str,
    host: &str,
) -> Forwarded {
    let upgrade = request.headers().contains_key(header::UPGRADE);
    let ours = upgrade.then(|| hyper::upgrade::on(&mut request));
    let (parts, body) = request.into_parts();
    let mut onward = Request::builder()
        .method(parts.method)
        .uri(path.parse::<Uri>()?)
        .body(body)?;
    for (name, value) in &parts.headers {
        // The caller's credentials are not the kubelet's business.
        let private = *name == header::AUTHORIZATION
            || *name == header::HOST
            || name.as_str().starts_with("impersonate-");
        if !private {
            onward.headers_mut().append(name, value.clone());
        }
    }
    onward
        .headers_mut()
        .insert(header::HOST, HeaderValue::from_str(host)?);
    let mut response = sender.send_request(onward).await?;
    if response.status() == StatusCode::SWITCHING_PROTOCOLS {
        let theirs = hyper::upgrade::on(&mut response);
        if let Some(ours) = ours {
            tokio::spawn(async move {
                let (ours, theirs) = match tokio::try_join!(ours, theirs) {
                    Ok(both) => both,
                    Err(error) => return debug!(%error, "a connection could not be upgraded"),
                };
                if let Err(error) = tokio::io::copy_bidirectional(
                    &mut TokioIo::new(ours),
                    &mut TokioIo::new(theirs),
                )
                .await
                {
                    debug!(%error, "a stream to a kubelet ended");
                }
            });
        }
    }
    Ok(response.map(|body| {
        body.map_err(|error| Box::new(error) as BoxError)
            .boxed_unsync()
    }))
}

/// An answer whose error is about the kubelet.
type Forwarded = Result<Response<crate::server::ResponseBody>, BoxError>;
