//! `healthCheckNodePort`: load balancers ask here whether this node has endpoints of a Service.

use std::collections::HashMap;
use std::convert::Infallible;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use anyhow::{Context, Result};
use bytes::Bytes;
use http::{Response, StatusCode};
use http_body_util::Full;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::net::TcpListener;
use tokio::sync::Semaphore;
use tokio::task::JoinSet;
use tokio_util::sync::{CancellationToken, DropGuard};

use super::tables::HealthChange;

/// Connections to one Service's port at a time.
const CONNECTIONS: usize = 64;
/// For how long a client may take to ask.
const PATIENCE: Duration = Duration::from_secs(10);

struct Server {
    port: u16,
    count: Arc<AtomicU32>,
    /// Ends the connections.
    _stop: DropGuard,
    listeners: JoinSet<()>,
}

impl Server {
    /// Afterwards the port is free.
    async fn close(mut self) {
        self.listeners.shutdown().await;
    }
}

/// The servers of all Services that have one.
#[derive(Default)]
pub struct Health {
    servers: HashMap<Arc<str>, Server>,
    addresses: Vec<IpAddr>,
    /// Services whose port could not be opened, with what they should answer.
    waiting: HashMap<Arc<str>, (u16, u32)>,
}

/// The answer, as kube-proxy words it.
fn answer(service: &str, count: u32) -> Response<Full<Bytes>> {
    let (namespace, name) = service.split_once('/').unwrap_or(("", service));
    let quote = |text: &str| serde_json::Value::from(text).to_string();
    let body = format!(
        "{{\n\t\"service\": {{\n\t\t\"namespace\": {},\n\t\t\"name\": {}\n\t}},\n\t\"localEndpoints\": {count},\n\t\"serviceProxyHealthy\": true\n}}",
        quote(namespace),
        quote(name)
    );
    let mut response = Response::new(Full::new(Bytes::from(body)));
    if count == 0 {
        *response.status_mut() = StatusCode::SERVICE_UNAVAILABLE;
    }
    let headers = response.headers_mut();
    let fixed = http::HeaderValue::from_static;
    headers.insert(http::header::CONTENT_TYPE, fixed("application/json"));
    headers.insert(http::header::X_CONTENT_TYPE_OPTIONS, fixed("nosniff"));
    headers.insert("X-Load-Balancing-Endpoint-Weight", count.into());
    response
}

/// Serves one listener until it is told to stop.
async fn serve(
    listener: TcpListener,
    service: Arc<str>,
    count: Arc<AtomicU32>,
    stop: CancellationToken,
) {
    let room = Arc::new(Semaphore::new(CONNECTIONS));
    loop {
        let accepted = tokio::select! {
            () = stop.cancelled() => return,
            accepted = async {
                let permit = room.clone().acquire_owned().await;
                (permit, listener.accept().await)
            } => accepted,
        };
        let (permit, Ok((stream, _))) = accepted else {
            // Out of descriptors: others may close theirs meanwhile.
            tokio::time::sleep(Duration::from_millis(100)).await;
            continue;
        };
        let (service, count, stop) = (service.clone(), count.clone(), stop.clone());
        tokio::spawn(async move {
            let _permit = permit;
            let respond = service_fn(move |_request| {
                let response = answer(&service, count.load(Ordering::Relaxed));
                async move { Ok::<_, Infallible>(response) }
            });
            let mut server = hyper::server::conn::http1::Builder::new();
            server
                .timer(TokioTimer::new())
                .header_read_timeout(PATIENCE);
            // A client that goes away is no fault.
            tokio::select! {
                () = stop.cancelled() => {}
                _ = server.serve_connection(TokioIo::new(stream), respond) => {}
            }
        });
    }
}

impl Health {
    /// Where the ports are opened from now on: all node addresses, or those that node ports are limited to.
    pub async fn set_addresses(&mut self, addresses: Vec<IpAddr>) -> Vec<(Arc<str>, String)> {
        if self.addresses == addresses {
            return Vec::new();
        }
        self.addresses = addresses;
        let mut all: Vec<HealthChange> = Vec::new();
        for (name, server) in std::mem::take(&mut self.servers) {
            let count = server.count.load(Ordering::Relaxed);
            all.push((name, Some((server.port, count))));
            server.close().await;
        }
        let waiting = std::mem::take(&mut self.waiting);
        all.extend(waiting.into_iter().map(|(name, told)| (name, Some(told))));
        self.apply(all).await
    }

    /// Opens, changes and closes; whose port could not be opened, and why.
    pub async fn apply(&mut self, changes: Vec<HealthChange>) -> Vec<(Arc<str>, String)> {
        let mut failed = Vec::new();
        // Ports that are closed can be another's at once.
        let (closed, kept): (Vec<_>, Vec<_>) =
            changes.into_iter().partition(|(_, told)| told.is_none());
        let closes = !closed.is_empty();
        for (name, _) in closed {
            if let Some(server) = self.servers.remove(&name) {
                server.close().await;
            }
            self.waiting.remove(&name);
        }
        let mut wanted: Vec<(Arc<str>, (u16, u32))> = kept
            .into_iter()
            .filter_map(|(name, told)| Some((name, told?)))
            .collect();
        if closes {
            wanted.extend(self.waiting.drain());
        }
        for (name, (port, count)) in wanted {
            if let Some(server) = self.servers.get(&name) {
                if server.port == port {
                    server.count.store(count, Ordering::Relaxed);
                    continue;
                }
                if let Some(server) = self.servers.remove(&name) {
                    server.close().await;
                }
            }
            match self.open(&name, port, count).await {
                Ok(server) => {
                    self.waiting.remove(&name);
                    self.servers.insert(name, server);
                }
                Err(error) => {
                    if self.waiting.insert(name.clone(), (port, count)).is_none() {
                        failed.push((name, format!("{error:#}")));
                    }
                }
            }
        }
        failed
    }

    async fn open(&self, name: &str, port: u16, count: u32) -> Result<Server> {
        let mut listeners = Vec::with_capacity(self.addresses.len());
        for address in &self.addresses {
            let at = SocketAddr::new(*address, port);
            let listener = TcpListener::bind(at)
                .await
                .with_context(|| format!("could not listen on {at} for health checks"))?;
            listeners.push(listener);
        }
        let (stop, count) = (CancellationToken::new(), Arc::new(AtomicU32::new(count)));
        let service: Arc<str> = name.into();
        let mut tasks = JoinSet::new();
        for listener in listeners {
            tasks.spawn(serve(
                listener,
                service.clone(),
                count.clone(),
                stop.clone(),
            ));
        }
        Ok(Server {
            port,
            count,
            _stop: stop.drop_guard(),
            listeners: tasks,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::Ipv4Addr;
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    async fn ask(port: u16) -> Result<String> {
        let mut stream = tokio::net::TcpStream::connect((Ipv4Addr::LOCALHOST, port)).await?;
        stream
            .write_all(b"GET / HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n")
            .await?;
        let mut text = String::new();
        stream.read_to_string(&mut text).await?;
        Ok(text)
    }

    #[tokio::test]
    async fn load_balancers_get_the_answers_of_kube_proxy() {
        let free = || std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let taken = free();
        let port = free().local_addr().unwrap().port();
        let mut health = Health::default();
        health.set_addresses(vec![Ipv4Addr::LOCALHOST.into()]).await;
        let name: Arc<str> = "shop/web".into();
        let failed = health.apply(vec![(name.clone(), Some((port, 2)))]).await;
        assert!(failed.is_empty(), "{failed:?}");
        let text = ask(port).await.unwrap();
        assert!(text.starts_with("HTTP/1.1 200 OK\r\n"), "{text}");
        for header in [
            "content-type: application/json\r\n",
            "x-content-type-options: nosniff\r\n",
            "x-load-balancing-endpoint-weight: 2\r\n",
        ] {
            assert!(text.to_lowercase().contains(header), "{text}");
        }
        let body = "{\n\t\"service\": {\n\t\t\"namespace\": \"shop\",\n\t\t\"name\": \"web\"\n\t},\n\t\"localEndpoints\": 2,\n\t\"serviceProxyHealthy\": true\n}";
        assert!(text.ends_with(body), "{text}");
        health.apply(vec![(name.clone(), Some((port, 0)))]).await;
        let text = ask(port).await.unwrap();
        assert!(text.starts_with("HTTP/1.1 503 "), "{text}");
        // A port that another program has is told of once, and the others work.
        let other: Arc<str> = "shop/other".into();
        let busy = taken.local_addr().unwrap().port();
        let failed = health.apply(vec![(other.clone(), Some((busy, 1)))]).await;
        assert_eq!(failed.len(), 1);
        assert!(
            health
                .apply(vec![(other.clone(), Some((busy, 2)))])
                .await
                .is_empty()
        );
        health.apply(vec![(name, None)]).await;
        assert!(ask(port).await.is_err());
    }
}
