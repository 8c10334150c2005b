//! Where flows come from: the agents of this machine, a server of Hubble's API, or a file.

use std::io::BufRead;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use clap::Args;
use futures::StreamExt;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use xebec_hubble::client::{self, Server};
use xebec_hubble::filter::Filters;
use xebec_hubble::observer::observer_client::ObserverClient;
use xebec_hubble::observer::{GetFlowsRequest, GetFlowsResponse};
use xebec_hubble::order::Answers;

/// How many answers of one server wait to be printed.
const AHEAD: usize = 256;

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
    /// What was asked for; none where nothing was.
    fn asked(&self) -> Option<client::Tls> {
        let asked =
            self.tls || !self.tls_ca_cert_files.is_empty() || self.tls_client_cert_file.is_some();
        let identity = self.tls_client_cert_file.clone();
        asked.then(|| client::Tls {
            cas: self.tls_ca_cert_files.clone(),
            identity: identity.zip(self.tls_client_key_file.clone()),
            server_name: self.tls_server_name.clone(),
        })
    }
}

/// Failures of servers, once their answers have ended.
pub type Failures = mpsc::UnboundedReceiver<anyhow::Error>;

/// What several servers answer, each in its own order.
pub fn ask(servers: &[Server], with: &Tls, asked: &GetFlowsRequest) -> (Vec<Answers>, Failures) {
    let (fails, failures) = mpsc::unbounded_channel();
    let answers = servers.iter().map(|server| {
        let (sender, answers) = mpsc::channel(AHEAD);
        let (server, with, asked) = (server.clone(), with.asked(), asked.clone());
        let fails = fails.clone();
        tokio::spawn(async move {
            if let Err(error) = read(&server, with.as_ref(), asked, &sender).await {
                // Before the answers end. Nobody may wait for it any more.
                let _ = fails.send(error);
            }
        });
        ReceiverStream::new(answers).boxed()
    });
    (answers.collect(), failures)
}

/// Sends one server's answers on as they come.
async fn read(
    server: &Server,
    with: Option<&client::Tls>,
    asked: GetFlowsRequest,
    answers: &mpsc::Sender<GetFlowsResponse>,
) -> Result<()> {
    let mut client = ObserverClient::new(server.connect(with).await?);
    let refused = |status: tonic::Status| anyhow::anyhow!("{server}: {}", status.message());
    let mut stream = client.get_flows(asked).await.map_err(refused)?.into_inner();
    while let Some(answer) = stream.message().await.map_err(refused)? {
        if answers.send(answer).await.is_err() {
            break;
        }
    }
    Ok(())
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
