//! `writes`: durable writes per second through HTTPS, with one connection per client.

use std::fs::File;
use std::io::Write;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use bytes::Bytes;
use http_body_util::{BodyExt, Full};
use hyper::client::conn::http1::SendRequest;
use hyper_util::rt::TokioIo;
use kube::client::ConfigExt;
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;

use crate::Effort;
use crate::cluster::BenchCluster;
use crate::row::{Aim, Case, Row};

/// Writers at the same time, and what is to be reached.
const CLIENTS: [(usize, Aim); 3] = [
    (1, Aim::None),
    (16, Aim::None),
    (256, Aim::AtLeast(10_000.0)),
];

/// Each client creates small ConfigMaps, one after the other, over its own HTTP/1.1 connection with the
/// administrator's certificate. The peer is the disk alone: one writer that appends as many bytes to a file in the
/// same folder and waits for fdatasync each time. Clients and server share the machine.
pub fn run(effort: Effort) -> Result<Vec<Row>> {
    let (rounds, length) = effort.of(
        (5, Duration::from_secs(3)),
        (2, Duration::from_millis(1000)),
    );
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
        .context("could not start the async runtime")?;
    let mut cluster = BenchCluster::up("writes", &["--no-demo-image"])?;
    let disk = nix::sys::statfs::statfs(&cluster.data()).context("could not look at the disk")?;
    ensure!(
        disk.filesystem_type() != nix::sys::statfs::TMPFS_MAGIC,
        "/tmp is a tmpfs here, where no write is durable"
    );
    let server = runtime.block_on(Server::of(&cluster))?;
    let mut serial = 0;
    let mut rows = Vec::new();
    for (clients, aim) in CLIENTS {
        let mut measured = Vec::new();
        for round in 0..rounds {
            serial += 1;
            let ours = runtime.block_on(write_all(&server, clients, serial, length))?;
            let peer = synced_appends(&cluster.data().join("bench-appends"), length)?;
            eprintln!(
                "bench: writes, {clients} clients, {}/{rounds}: {ours:.0}/s, disk alone {peer:.0}/s",
                round + 1
            );
            measured.push((ours, peer));
        }
        let case = Case {
            bench: "writes",
            case: &match clients {
                1 => "ConfigMaps created, 1 client".to_owned(),
                more => format!("ConfigMaps created, {more} clients"),
            },
            unit: "1/s",
            aim,
        };
        rows.push(Row::paired(case, "append + fdatasync", &measured)?);
    }
    cluster.down()?;
    Ok(rows)
}

/// The API server, and how to speak to it.
struct Server {
    host: String,
    port: u16,
    tls: TlsConnector,
}

impl Server {
    async fn of(cluster: &BenchCluster) -> Result<Self> {
        let config = cluster.config().await?;
        let mut tls = config
            .rustls_client_config()
            .context("the kubeconfig's certificates are of no use")?;
        tls.alpn_protocols = vec![b"http/1.1".to_vec()];
        Ok(Self {
            host: config
                .cluster_url
                .host()
                .context("the kubeconfig's server has no host")?
                .to_owned(),
            port: config.cluster_url.port_u16().unwrap_or(443),
            tls: TlsConnector::from(Arc::new(tls)),
        })
    }

    async fn connect(&self) -> Result<SendRequest<Full<Bytes>>> {
        let stream = TcpStream::connect((self.host.as_str(), self.port))
            .await
            .context("could not connect to the API server")?;
        stream
            .set_nodelay(true)
            .context("could not set TCP_NODELAY")?;
        let name = rustls::pki_types::ServerName::try_from(self.host.clone())
            .context("the API server's host is no name for TLS")?;
        let stream = self
            .tls
            .connect(name, stream)
            .await
            .context("the API server refused TLS")?;
        let (sender, connection) =
            hyper::client::conn::http1::handshake(TokioIo::new(stream)).await?;
        tokio::spawn(connection);
        Ok(sender)
    }
}

/// The object that a client creates: about as many bytes as a Lease or an Event has.
fn object(serial: usize, client: usize, number: u64) -> String {
    format!(
        r#"{{"apiVersion":"v1","kind":"ConfigMap","metadata":{{"name":"w-{serial}-{client}-{number}","labels":{{"app":"bench"}}}},"data":{{"text":"{:0>200}"}}}}"#,
        number
    )
}

/// Writes per second of all clients; each write counts when its answer has arrived.
async fn write_all(
    server: &Server,
    clients: usize,
    serial: usize,
    length: Duration,
) -> Result<f64> {
    let mut senders = Vec::new();
    for _ in 0..clients {
        senders.push(server.connect().await?);
    }
    let started = Instant::now();
    let mut tasks = tokio::task::JoinSet::new();
    for (client, mut sender) in senders.into_iter().enumerate() {
        let host = server.host.clone();
        tasks.spawn(async move {
            let mut done = 0;
            while started.elapsed() < length {
                create(&mut sender, &host, object(serial, client, done)).await?;
                done += 1;
            }
            anyhow::Ok(done)
        });
    }
    let mut done = 0;
    while let Some(finished) = tasks.join_next().await {
        done += finished.context("a client panicked")??;
    }
    Ok(done as f64 / started.elapsed().as_secs_f64())
}

async fn create(sender: &mut SendRequest<Full<Bytes>>, host: &str, object: String) -> Result<()> {
    let request = http::Request::post("/api/v1/namespaces/default/configmaps")
        .header(http::header::HOST, host)
        .header(http::header::CONTENT_TYPE, "application/json")
        .body(Full::new(Bytes::from(object)))
        .context("our request is none")?;
    sender
        .ready()
        .await
        .context("the API server ended the connection")?;
    let response = sender
        .send_request(request)
        .await
        .context("the API server did not answer")?;
    let status = response.status();
    let body = response
        .into_body()
        .collect()
        .await
        .context("the API server's answer broke off")?
        .to_bytes();
    ensure!(
        status == http::StatusCode::CREATED,
        "the API server answered {status}: {}",
        String::from_utf8_lossy(&body)
    );
    Ok(())
}

/// What the disk can do for one writer that waits for each write.
fn synced_appends(path: &Path, length: Duration) -> Result<f64> {
    let mut file =
        File::create(path).with_context(|| format!("could not make {}", path.display()))?;
    let started = Instant::now();
    let mut done = 0;
    while started.elapsed() < length {
        file.write_all(object(0, 0, done).as_bytes())
            .and_then(|()| file.sync_data())
            .with_context(|| format!("could not write {}", path.display()))?;
        done += 1;
    }
    let elapsed = started.elapsed();
    std::fs::remove_file(path).with_context(|| format!("could not remove {}", path.display()))?;
    Ok(done as f64 / elapsed.as_secs_f64())
}
