//! `xebec demo`: the tiny application inside the demo image, an HTTP server that answers its pod's name and a client.

use std::convert::Infallible;
use std::net::SocketAddr;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use bytes::Bytes;
use clap::Subcommand;
use http_body_util::{BodyExt, Empty, Full};
use hyper::service::service_fn;
use hyper_util::rt::TokioIo;
use tokio::net::{TcpListener, TcpStream};

use crate::tcp_bench;

/// What the demo image can do.
#[derive(Subcommand)]
pub enum Demo {
    /// Answer every HTTP request with this host's name, which in a pod is the pod's
    Serve {
        /// Address to listen on [default: port 8080 of both families]
        #[arg(long)]
        listen: Option<SocketAddr>,
        /// Fetch this URL for each request and put its answer behind our own
        #[arg(long)]
        upstream: Option<String>,
    },
    /// Fetch a URL and print the answers
    Get {
        /// The URL, `http://` only
        url: String,
        /// How often; 0 = until stopped
        #[arg(short = 'n', long, default_value_t = 1)]
        count: u64,
        /// Milliseconds between two requests
        #[arg(long, default_value_t = 0)]
        interval_ms: u64,
        /// Milliseconds to wait for an answer
        #[arg(long, default_value_t = 2000)]
        timeout_ms: u64,
        /// Go on after a failed request
        #[arg(long)]
        keep_going: bool,
        /// Print only how many answers came from whom, at the end
        #[arg(long)]
        summary: bool,
    },
    /// The answering end of the network benchmarks
    #[command(hide = true)]
    TcpServe {
        /// Address to listen on
        #[arg(long, default_value = "0.0.0.0:8081")]
        listen: SocketAddr,
    },
    /// The asking end of the network benchmarks; prints transactions or bytes per second
    #[command(hide = true)]
    TcpBench {
        /// The answering end
        address: SocketAddr,
        /// What to measure
        #[arg(long, value_enum)]
        mode: tcp_bench::Mode,
        /// For how long
        #[arg(long, default_value_t = 2.0)]
        seconds: f64,
    },
}

impl Demo {
    /// Runs the server until SIGTERM, or the client to its end.
    pub async fn run(self) -> Result<()> {
        match self {
            Self::Serve { listen, upstream } => serve(listen, upstream).await,
            Self::TcpServe { listen } => tcp_bench::serve(listen),
            Self::TcpBench {
                address,
                mode,
                seconds,
            } => tcp_bench::run(address, mode, seconds),
            Self::Get {
                url,
                count,
                interval_ms,
                timeout_ms,
                keep_going,
                summary,
            } => {
                let interval = Duration::from_millis(interval_ms);
                get_many(
                    &url,
                    count,
                    interval,
                    Duration::from_millis(timeout_ms),
                    keep_going,
                    summary,
                )
                .await
            }
        }
    }
}

/// Listens where it was told to; otherwise to both families, or to IPv4 alone where there is no IPv6.
async fn listener(told: Option<SocketAddr>) -> Result<TcpListener> {
    const PORT: u16 = 8080;
    let both = SocketAddr::from((std::net::Ipv6Addr::UNSPECIFIED, PORT));
    let listen = told.unwrap_or(both);
    match TcpListener::bind(listen).await {
        Err(_) if told.is_none() => {
            let listen = SocketAddr::from((std::net::Ipv4Addr::UNSPECIFIED, PORT));
            let listener = TcpListener::bind(listen).await;
            listener.with_context(|| format!("could not listen on {listen}"))
        }
        outcome => outcome.with_context(|| format!("could not listen on {listen}")),
    }
}

async fn serve(listen: Option<SocketAddr>, upstream: Option<String>) -> Result<()> {
    let name = nix::unistd::gethostname().context("could not read the host name")?;
    let name = name.to_string_lossy().into_owned();
    let listener = listener(listen).await?;
    println!("{name} listens on {}", listener.local_addr()?);
    let mut terminate = tokio::signal::unix::signal(tokio::signal::unix::SignalKind::terminate())
        .context("could not listen for SIGTERM")?;
    let mut connections = tokio::task::JoinSet::new();
    loop {
        let (stream, peer) = tokio::select! {
            accepted = listener.accept() => match accepted {
                Ok(accepted) => accepted,
                // The descriptor table may be full for a moment; the next accept tells.
                Err(error) => { eprintln!("could not accept: {error}"); tokio::time::sleep(Duration::from_millis(10)).await; continue }
            },
            _ = terminate.recv() => break,
            Some(_) = connections.join_next() => continue,
        };
        let (name, upstream) = (name.clone(), upstream.clone());
        connections.spawn(async move {
            let service =
                service_fn(move |request| answer(request, name.clone(), upstream.clone(), peer));
            let _ = hyper::server::conn::http1::Builder::new()
                .serve_connection(TokioIo::new(stream), service)
                .await;
        });
    }
    // Connections that were accepted before SIGTERM get their answer.
    let _ = tokio::time::timeout(Duration::from_secs(5), async {
        while connections.join_next().await.is_some() {}
    })
    .await;
    Ok(())
}

async fn answer(
    request: http::Request<hyper::body::Incoming>,
    name: String,
    upstream: Option<String>,
    peer: SocketAddr,
) -> Result<http::Response<Full<Bytes>>, Infallible> {
    let mut status = http::StatusCode::OK;
    let mut text = match request.uri().path() {
        "/healthz" => "ok\n".to_owned(),
        "/client" => format!("{peer}\n"),
        _ => format!("{name}\n"),
    };
    if let (Some(upstream), "/") = (upstream, request.uri().path()) {
        match get(&upstream, Duration::from_secs(2)).await {
            Ok(body) => text.push_str(&body),
            Err(error) => {
                status = http::StatusCode::BAD_GATEWAY;
                text.push_str(&format!("{upstream}: {error:#}\n"));
            }
        }
    }
    let mut response = http::Response::new(Full::new(Bytes::from(text)));
    *response.status_mut() = status;
    Ok(response)
}

async fn get_many(
    url: &str,
    count: u64,
    interval: Duration,
    timeout: Duration,
    keep_going: bool,
    summary: bool,
) -> Result<()> {
    let mut answers = std::collections::BTreeMap::<String, u64>::new();
    let mut failed = 0u64;
    let started = Instant::now();
    let mut done = 0u64;
    while count == 0 || done < count {
        done += 1;
        match get(url, timeout).await {
            Ok(body) if summary => *answers.entry(body.trim_end().to_owned()).or_default() += 1,
            Ok(body) => print!("{body}"),
            Err(error) if keep_going => {
                failed += 1;
                eprintln!("{url}: {error:#}");
            }
            Err(error) => return Err(error),
        }
        if !interval.is_zero() {
            tokio::time::sleep(interval).await;
        }
    }
    if summary {
        for (answer, times) in &answers {
            println!("{times} {answer}");
        }
        println!(
            "{failed} failed, {done} requests in {:.2} s",
            started.elapsed().as_secs_f64()
        );
    }
    if failed > 0 && !summary {
        bail!("{failed} of {done} requests failed");
    }
    Ok(())
}

/// One GET over a connection of its own.
async fn get(url: &str, timeout: Duration) -> Result<String> {
    let uri: http::Uri = url.parse().with_context(|| format!("{url:?} is no URL"))?;
    if uri.scheme_str() != Some("http") {
        bail!("{url:?}: only http:// is spoken here");
    }
    let host = uri
        .host()
        .with_context(|| format!("{url:?} names no host"))?;
    let address = format!("{host}:{}", uri.port_u16().unwrap_or(80));
    let path = uri.path_and_query().map_or("/", |p| p.as_str());
    let exchange = async {
        let stream = TcpStream::connect(&address)
            .await
            .with_context(|| format!("could not connect to {address}"))?;
        let (mut sender, connection) =
            hyper::client::conn::http1::handshake(TokioIo::new(stream)).await?;
        let connection = tokio::spawn(connection);
        let request = http::Request::get(path)
            .header(http::header::HOST, host)
            .header(http::header::CONNECTION, "close")
            .body(Empty::<Bytes>::new())?;
        let response = sender.send_request(request).await.context("no answer")?;
        let status = response.status();
        let body = response
            .into_body()
            .collect()
            .await
            .context("the answer broke off")?
            .to_bytes();
        connection.abort();
        let body = String::from_utf8_lossy(&body).into_owned();
        if !status.is_success() {
            bail!("{status}: {}", body.trim_end());
        }
        Ok(body)
    };
    tokio::time::timeout(timeout, exchange)
        .await
        .with_context(|| format!("no answer within {} ms", timeout.as_millis()))?
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn the_client_reads_what_the_server_answers() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        drop(listener);
        let server = tokio::spawn(serve(Some(address), None));
        let url = format!("http://{address}/healthz");
        let mut last = get(&url, Duration::from_secs(1)).await;
        for _ in 0..50 {
            if last.is_ok() {
                break;
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
            last = get(&url, Duration::from_secs(1)).await;
        }
        assert_eq!(last.unwrap(), "ok\n");
        server.abort();
        assert!(
            get("https://localhost/", Duration::from_secs(1))
                .await
                .is_err()
        );
    }
}
