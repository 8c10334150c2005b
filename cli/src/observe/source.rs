//! Where flows come from: the agents of this machine, a server of Hubble's API, or a file.

use std::io::BufRead;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};
use clap::Args;
use hyper_util::rt::TokioIo;
use tokio::net::UnixStream;
use tokio::sync::mpsc;
use tonic::transport::{Certificate, Channel, ClientTlsConfig, Endpoint, Identity};
use xebec_hubble::filter::Filters;
use xebec_hubble::observer::observer_client::ObserverClient;
use xebec_hubble::observer::{GetFlowsRequest, GetFlowsResponse};

/// How many answers of one server wait to be printed.
const AHEAD: usize = 256;

/// A server of Hubble's API.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Server {
    /// A UNIX socket.
    Unix(PathBuf),
    /// `HOST:PORT`, and whether its name asks for TLS.
    Tcp(String, bool),
}

/// How a server proves who it is, and we to it.
#[derive(Args, Clone, Debug, Default)]
pub struct Tls {
    /// Use TLS; for servers whose address begins with tls:// this is so
    #[arg(long)]
    tls: bool,
    /// Authorities of servers (PEM)
    #[arg(long, value_name = "FILE", value_delimiter = ',')]
    tls_ca_cert_files: Vec<PathBuf>,
    /// Our certificate (PEM)
    #[arg(long, value_name = "FILE", requires = "tls_client_key_file")]
    tls_client_cert_file: Option<PathBuf>,
    /// Its key (PEM)
    #[arg(long, value_name = "FILE", requires = "tls_client_cert_file")]
    tls_client_key_file: Option<PathBuf>,
    /// The name in the server's certificate, where it is not that of its address
    #[arg(long, value_name = "NAME")]
    tls_server_name: Option<String>,
}

impl Tls {
    fn is_asked_for(&self) -> bool {
        self.tls || !self.tls_ca_cert_files.is_empty() || self.tls_client_cert_file.is_some()
    }

    fn config(&self) -> Result<ClientTlsConfig> {
        let read = |path: &PathBuf| {
            std::fs::read(path).with_context(|| format!("could not read {}", path.display()))
        };
        ensure!(
            !self.tls_ca_cert_files.is_empty(),
            "--tls-ca-cert-files is missing: the server could be anybody"
        );
        let mut config = ClientTlsConfig::new();
        for path in &self.tls_ca_cert_files {
            config = config.ca_certificate(Certificate::from_pem(read(path)?));
        }
        if let (Some(cert), Some(key)) = (&self.tls_client_cert_file, &self.tls_client_key_file) {
            config = config.identity(Identity::from_pem(read(cert)?, read(key)?));
        }
        if let Some(name) = &self.tls_server_name {
            config = config.domain_name(name);
        }
        Ok(config)
    }
}

impl Server {
    /// Reads `unix:///run/xebec/hubble.sock`, `HOST:PORT` or `tls://HOST:PORT`.
    pub fn parse(text: &str) -> Result<Self> {
        if let Some(path) = text.strip_prefix("unix://") {
            return Ok(Self::Unix(path.into()));
        }
        let (address, tls) = match text.strip_prefix("tls://") {
            Some(address) => (address, true),
            None => (text.strip_prefix("tcp://").unwrap_or(text), false),
        };
        let port = address
            .rsplit_once(':')
            .map(|(_, port)| port.parse::<u16>());
        match port {
            Some(Ok(_)) => Ok(Self::Tcp(address.to_owned(), tls)),
            _ => bail!("{text:?} is neither HOST:PORT nor tls://HOST:PORT nor unix:///PATH"),
        }
    }

    async fn connect(&self, with: &Tls) -> Result<Channel> {
        match self {
            Self::Unix(path) => {
                let path = path.clone();
                // The name is for the HTTP header alone.
                Endpoint::from_static("http://localhost")
                    .connect_with_connector(tower::service_fn(move |_| {
                        let path = path.clone();
                        async move { UnixStream::connect(path).await.map(TokioIo::new) }
                    }))
                    .await
            }
            Self::Tcp(address, tls) => {
                let tls = *tls || with.is_asked_for();
                let scheme = if tls { "https" } else { "http" };
                let mut endpoint = Endpoint::from_shared(format!("{scheme}://{address}"))
                    .with_context(|| format!("{address:?} is no address"))?;
                if tls {
                    endpoint = endpoint
                        .tls_config(with.config()?)
                        .context("the certificates can't be used")?;
                }
                endpoint.connect().await
            }
        }
        .with_context(|| format!("could not connect to {self}"))
    }
}

impl std::fmt::Display for Server {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Unix(path) => write!(f, "unix://{}", path.display()),
            Self::Tcp(address, _) => f.write_str(address),
        }
    }
}

/// Sends one server's answers on as they come.
async fn read(
    server: &Server,
    with: &Tls,
    asked: GetFlowsRequest,
    answers: &mpsc::Sender<Result<GetFlowsResponse>>,
) -> Result<()> {
    let mut client = ObserverClient::new(server.connect(with).await?);
    let refused = |status: tonic::Status| anyhow::anyhow!("{server}: {}", status.message());
    let mut stream = client.get_flows(asked).await.map_err(refused)?.into_inner();
    while let Some(answer) = stream.message().await.map_err(refused)? {
        if answers.send(Ok(answer)).await.is_err() {
            break;
        }
    }
    Ok(())
}

/// The answers of several servers, each in its own order.
pub fn ask(
    servers: &[Server],
    with: &Tls,
    asked: &GetFlowsRequest,
) -> Vec<mpsc::Receiver<Result<GetFlowsResponse>>> {
    servers
        .iter()
        .map(|server| {
            let (sender, answers) = mpsc::channel(AHEAD);
            let (server, with, asked) = (server.clone(), with.clone(), asked.clone());
            tokio::spawn(async move {
                if let Err(error) = read(&server, &with, asked, &sender).await {
                    // Nobody may wait for it any more.
                    let _ = sender.send(Err(error)).await;
                }
            });
            answers
        })
        .collect()
}

/// Answers of a file, as `-o json` wrote them, or `-` for standard input; those that are asked for.
pub fn file(path: &Path, asked: &GetFlowsRequest) -> Result<Vec<GetFlowsResponse>> {
    let reader: Box<dyn BufRead> = if path == Path::new("-") {
        Box::new(std::io::stdin().lock())
    } else {
        let file = std::fs::File::open(path)
            .with_context(|| format!("could not open {}", path.display()))?;
        Box::new(std::io::BufReader::new(file))
    };
    let filters = Filters::new(&asked.whitelist, &asked.blacklist)?;
    let mut chosen = std::collections::VecDeque::new();
    let number = usize::try_from(asked.number).unwrap_or(usize::MAX);
    for (line, text) in (1..).zip(reader.lines()) {
        let place = || format!("{}, line {line}", path.display());
        let text = text.with_context(place)?;
        if text.trim().is_empty() {
            continue;
        }
        let answer: GetFlowsResponse = serde_json::from_str(&text).with_context(place)?;
        if !is_wanted(&answer, &filters, asked) {
            continue;
        }
        chosen.push_back(answer);
        if number != 0 && chosen.len() > number {
            if asked.first {
                chosen.pop_back();
                break;
            }
            chosen.pop_front();
        }
    }
    Ok(chosen.into())
}

fn is_wanted(answer: &GetFlowsResponse, filters: &Filters, asked: &GetFlowsRequest) -> bool {
    use xebec_hubble::observer::get_flows_response::ResponseTypes;
    let Some(ResponseTypes::Flow(flow)) = &answer.response_types else {
        return true;
    };
    let key = |time: &xebec_hubble::wkt::Timestamp| (time.seconds, time.nanos);
    let time = answer.time.as_ref().or(flow.time.as_ref()).map(key);
    asked
        .since
        .as_ref()
        .is_none_or(|since| time >= Some(key(since)))
        && asked
            .until
            .as_ref()
            .is_none_or(|until| time <= Some(key(until)))
        && filters.pass(flow)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn servers_are_sockets_or_addresses() {
        let unix = Server::parse("unix:///run/xebec/hubble.sock").unwrap();
        assert_eq!(unix.to_string(), "unix:///run/xebec/hubble.sock");
        for (text, tls) in [
            ("localhost:4245", false),
            ("tcp://localhost:4245", false),
            ("tls://localhost:4245", true),
        ] {
            let tcp = Server::Tcp("localhost:4245".to_owned(), tls);
            assert_eq!(Server::parse(text).unwrap(), tcp);
        }
        for text in ["", "localhost", "localhost:x", "[::1]"] {
            assert!(Server::parse(text).is_err(), "{text}");
        }
    }
}
