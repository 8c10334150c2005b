//! `xebec relay`: one endpoint for the flows of all nodes; flags as Hubble's relay has them.

use std::net::SocketAddr;
use std::path::PathBuf;

use anyhow::{Context, Result, bail};
use clap::Args;
use tokio::signal::unix::{SignalKind, signal};
use tokio_util::sync::CancellationToken;
use xebec_hubble::client::{Server, Tls};
use xebec_hubble::serve::Listen;
use xebec_hubble::tls::Files;

/// Flags of the relay.
#[derive(Args)]
pub struct Relay {
    /// A server that knows the nodes: an agent's socket, or its address
    #[arg(long, value_name = "SERVER", default_value = "unix:///run/xebec/hubble.sock", value_parser = parse_server)]
    peer_service: Server,
    /// Where it serves
    #[arg(long, value_name = "[ADDRESS]:PORT", default_value = ":4245", value_parser = crate::agent::parse_address)]
    listen_address: SocketAddr,
    /// Serve without TLS, to whoever asks
    #[arg(long)]
    disable_server_tls: bool,
    /// The relay's certificate as a server (PEM); it is read anew when it changes
    #[arg(long, value_name = "FILE")]
    tls_relay_server_cert_file: Option<PathBuf>,
    /// Its key (PEM)
    #[arg(long, value_name = "FILE")]
    tls_relay_server_key_file: Option<PathBuf>,
    /// Authorities whose clients may read flows (PEM)
    #[arg(long, value_name = "FILE", value_delimiter = ',')]
    tls_relay_client_ca_files: Vec<PathBuf>,
    /// Ask nodes without TLS
    #[arg(long)]
    disable_client_tls: bool,
    /// The relay's certificate as a client of nodes (PEM)
    #[arg(long, value_name = "FILE", requires = "tls_relay_client_key_file")]
    tls_relay_client_cert_file: Option<PathBuf>,
    /// Its key (PEM)
    #[arg(long, value_name = "FILE", requires = "tls_relay_client_cert_file")]
    tls_relay_client_key_file: Option<PathBuf>,
    /// Authorities of nodes (PEM)
    #[arg(long, value_name = "FILE", value_delimiter = ',')]
    tls_hubble_server_ca_files: Vec<PathBuf>,
}

fn parse_server(text: &str) -> Result<Server, String> {
    Server::parse(text).map_err(|error| format!("{error:#}"))
}

impl Relay {
    fn config(&self) -> Result<xebec_relay::Config> {
        let tls = match (
            &self.tls_relay_server_cert_file,
            &self.tls_relay_server_key_file,
            &self.tls_relay_client_ca_files[..],
        ) {
            _ if self.disable_server_tls => None,
            (Some(cert), Some(key), [_, ..]) => Some(Files {
                cert: cert.clone(),
                key: key.clone(),
                client_cas: self.tls_relay_client_ca_files.clone(),
            }),
            _ => bail!(
                "--tls-relay-server-cert-file, --tls-relay-server-key-file and --tls-relay-client-ca-files are needed, so that nobody reads flows without a certificate (or --disable-server-tls, for everybody to read them)"
            ),
        };
        let identity = self.tls_relay_client_cert_file.clone();
        Ok(xebec_relay::Config {
            peers: xebec_relay::Peers::Told(self.peer_service.clone()),
            tls: (!self.disable_client_tls).then(|| Tls {
                cas: self.tls_hubble_server_ca_files.clone(),
                identity: identity.zip(self.tls_relay_client_key_file.clone()),
                server_name: None,
            }),
            listen: Some(Listen {
                address: self.listen_address,
                tls,
            }),
            socket: None,
        })
    }

    /// Serves until it is told to end.
    pub async fn run(self) -> Result<()> {
        let shutdown = CancellationToken::new();
        let mut end = signal(SignalKind::terminate()).context("could not wait for signals")?;
        let ended = shutdown.clone();
        tokio::spawn(async move {
            tokio::select! {
                _ = end.recv() => {}
                _ = tokio::signal::ctrl_c() => {}
            }
            ended.cancel();
        });
        xebec_relay::run(self.config()?, shutdown).await
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser;

    #[derive(Parser)]
    struct Line {
        #[command(flatten)]
        relay: Relay,
    }

    fn config(line: &str) -> Result<xebec_relay::Config, String> {
        let line = Line::try_parse_from(["relay"].into_iter().chain(line.split_whitespace()));
        let relay = line.map_err(|error| error.to_string())?.relay;
        relay.config().map_err(|error| error.to_string())
    }

    #[test]
    fn nobody_reads_flows_without_a_certificate_unless_that_is_said() {
        assert!(config("").unwrap_err().contains("--disable-server-tls"));
        let open = config("--disable-server-tls --disable-client-tls").unwrap();
        assert_eq!((open.listen.unwrap().tls, open.tls), (None, None));
        let closed = config(
            "--tls-relay-server-cert-file c --tls-relay-server-key-file k --tls-relay-client-ca-files a \
             --tls-hubble-server-ca-files h --tls-relay-client-cert-file rc --tls-relay-client-key-file rk",
        );
        let closed = closed.unwrap();
        assert!(closed.listen.unwrap().tls.is_some());
        assert!(closed.tls.unwrap().identity.is_some());
        assert!(
            config("--disable-server-tls --tls-relay-client-cert-file x")
                .unwrap_err()
                .contains("key")
        );
    }
}
