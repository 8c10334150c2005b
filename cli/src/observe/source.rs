//! Where flows come from: the agents of this machine, a server of Hubble's API, or a file.

use std::io::BufRead;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use hyper_util::rt::TokioIo;
use tokio::net::UnixStream;
use tokio::sync::mpsc;
use tonic::transport::{Channel, Endpoint};
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
    /// `HOST:PORT`, without TLS.
    Tcp(String),
}

impl Server {
    /// Reads `unix:///run/xebec/hubble.sock` or `HOST:PORT`.
    pub fn parse(text: &str) -> Result<Self> {
        if let Some(path) = text.strip_prefix("unix://") {
            return Ok(Self::Unix(path.into()));
        }
        let address = text.strip_prefix("tcp://").unwrap_or(text);
        let port = address
            .rsplit_once(':')
            .map(|(_, port)| port.parse::<u16>());
        match port {
            Some(Ok(_)) => Ok(Self::Tcp(address.to_owned())),
            _ => bail!("{text:?} is neither HOST:PORT nor unix:///PATH"),
        }
    }

    async fn connect(&self) -> Result<Channel> {
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
            Self::Tcp(address) => {
                Endpoint::from_shared(format!("http://{address}"))
                    .with_context(|| format!("{address:?} is no address"))?
                    .connect()
                    .await
            }
        }
        .with_context(|| format!("could not connect to {self}"))
    }
}

impl std::fmt::Display for Server {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Unix(path) => write!(f, "unix://{}", path.display()),
            Self::Tcp(address) => f.write_str(address),
        }
    }
}

/// Sends one server's answers on as they come.
async fn read(
    server: &Server,
    asked: GetFlowsRequest,
    answers: &mpsc::Sender<Result<GetFlowsResponse>>,
) -> Result<()> {
    let mut client = ObserverClient::new(server.connect().await?);
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
    asked: &GetFlowsRequest,
) -> Vec<mpsc::Receiver<Result<GetFlowsResponse>>> {
    servers
        .iter()
        .map(|server| {
            let (sender, answers) = mpsc::channel(AHEAD);
            let (server, asked) = (server.clone(), asked.clone());
            tokio::spawn(async move {
                if let Err(error) = read(&server, asked, &sender).await {
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
        for text in ["localhost:4245", "tcp://localhost:4245"] {
            assert_eq!(Server::parse(text).unwrap().to_string(), "localhost:4245");
        }
        for text in ["", "localhost", "localhost:x", "[::1]"] {
            assert!(Server::parse(text).is_err(), "{text}");
        }
    }
}
